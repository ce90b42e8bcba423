"""Predict with a finished run: the class of each text, image or sound of new data, and the probability of every class.

Probabilities are the mean of those that the models of all parts of the run give (folds or seeds); --part takes the
model of one. The encoder is loaded from where it was when the cache was made, or from --encoder, and is known by what
is in it. The table has a row for each example: its name, which is the number of its row, counted from 0, or the path of
its file below the folder; the class of the highest probability; and p(class) of every class.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from daam.recipes.arguments import device, positive
from daam.recipes.data import name_sources, read_unlabelled
from daam.recipes.errors import Parser, guarded
from daam.recipes.examples import DataError, Example
from daam.recipes.extraction import iterate_features, load_encoder_of
from daam.recipes.fitting import autocast
from daam.recipes.methods import LORA
from daam.recipes.progress import Progress
from daam.recipes.runs import RunError
from daam.recipes.saved import cache_of, columns_of, load_model, load_part, read_finished
from daam.recipes.scores import write_predictions

SHOWN = 10  # classes whose predictions are counted in a line
EXAMPLE = """example:
  python -m daam.recipes.predict runs/daam --data new.csv --output predictions.csv"""


@torch.no_grad()
def predict(
    run: str | Path, examples: list[Example], pooling: nn.Module, collate: Callable[[list], dict[str, Tensor]], *,
    parts: Sequence[int] | None = None, device: str = "cpu", batch: int = 32,
) -> Tensor:  # fmt: skip
    """Return the probability of every class for each example, (examples, classes) in fp32 on the CPU: the mean of those
    that the models of some parts of a run give. Features are made batch by batch, and none are kept.

    Args:
        pooling, collate: what `load_encoder_of` gives for the run's cache, on the device; or an encoder of one's own,
            the one that the cache was made with. LoRA puts its adapters into it.
        parts: of the run, counted from 0; None: all.
        batch: examples in a call of the encoder, at most.

    Raises:
        RunError: see `saved.load_model`. CacheError, DataError, EncoderError: an example, see `iterate_features`.
    """
    results = read_finished(run)
    parts = range(len(results["parts"])) if parts is None else parts
    model, states = load_model(run, parts[0], pooling).to(device), []
    for part in parts:
        load_part(model, run, part)
        states.append({name: t.clone() for name, t in model.state_dict().items()})
    found = torch.zeros(len(examples), len(results["names"]))
    with Progress(total=len(examples), desc="predictions", unit="examples") as bar:
        for places, inputs in _inputs(results, examples, pooling, collate, batch):
            inputs = {name: t.to(device) for name, t in inputs.items()}
            for state in states:  # in one model: LoRA's holds the encoder
                with autocast(device):  # as it was tested
                    scores = functional_call(model, state, (), inputs)
                found[places] += scores.float().softmax(1).cpu()
            bar.update(len(places))
    return found / len(states)


def _inputs(
    results: dict[str, Any], examples: list[Example], pooling: nn.Module, collate: Callable, batch: int
) -> Iterator[tuple[list[int], dict[str, Tensor]]]:
    """Yield places of examples, and the arguments of the model's forward pass for them."""
    if results["method"] in LORA:
        # any may share a batch, or LoRA would not have trained, unless lengths that were tried were all one
        batch = batch if (cache_of(results).get("checked") or {}).get("shape") is None else 1
        for start in range(0, len(examples), batch):
            chosen = examples[start : start + batch]
            yield list(range(start, start + len(chosen))), collate([example.source for example in chosen])
        return
    layers = results["settings"]["layers"]
    for places, features in iterate_features(pooling, collate, examples, cache_of(results), batch):
        yield places, {"x": features[:, layers] if layers else features}


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that predict and evaluate share."""
    add = parser.add_argument
    add("run", type=Path, help="folder of a finished run of daam.recipes.train, or of a method in a comparison")
    add("--text", metavar="COLUMN", help="column of texts (default: as in the data that the run trained on)")
    add("--part", type=int, metavar="I", help="take the model of this part, counted from 0 (default: the mean of the "
        "probabilities that the models of all parts give)")  # fmt: skip
    add("--encoder", help="where the encoder is now, if it has moved since the features were made")
    add("--device", type=device, default="cpu", help="where encoder and model run, like cuda (default %(default)s)")
    add("--batch", type=positive, default=32, help="examples a call of the encoder (default %(default)s)")


def predict_data(args: argparse.Namespace, results: dict[str, Any], modality: str, examples: list[Example]) -> Tensor:
    """Return the probabilities that a command line asks for, (examples, classes), and print what they are of. Raise a
    DataError where the examples are of another modality than those that the run trained on.
    """
    about = cache_of(results)
    if modality != about["modality"]:
        raise DataError(f"--data {args.data} holds {modality}, expected {about['modality']}, as {args.run} trained on")
    pooling, collate = load_encoder_of(about, args.encoder, args.device)
    parts = None if args.part is None else [args.part]
    found = predict(args.run, examples, pooling, collate, parts=parts, device=args.device, batch=args.batch)
    print(f"model     {results['method']} of {args.run}, {_tell_parts(args, results)}")
    print(f"examples  {len(examples)} of {args.data}")
    if cut := sum(example.source in collate.cut for example in examples):
        print(f"          {cut} are longer than {collate.limit:g} {collate.unit}: cut off there")
    return found


def _tell_parts(args: argparse.Namespace, results: dict[str, Any]) -> str:
    """Return in words whose probabilities they are."""
    return f"part {args.part}" if args.part is not None else f"mean of {len(results['parts'])} parts"


def _check_output(args: argparse.Namespace) -> None:
    """Raise a RunError where --output is a folder, or would replace the data or a file of the run."""
    output = args.output.resolve()
    if output.is_dir():
        raise RunError(f"--output {args.output} is a folder, expected a file, like predictions.csv")
    if output == Path(args.data).resolve() or output.parent == args.run.resolve():
        raise RunError(f"--output {args.output} is the data, or in the folder of the run: expected another file")


@guarded
def main(argv: list[str] | None = None) -> None:
    """Run the command line: predict new data."""
    parser = Parser(description=__doc__, epilog=EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser)
    parser.add_argument("--data", required=True,
                        help=".csv, .tsv or .jsonl of texts, a folder of images or sounds, or one of them")  # fmt: skip
    parser.add_argument("--output", required=True, type=Path, metavar="CSV", help="table of the predictions")
    args = parser.parse_args(argv)
    results = read_finished(args.run)
    _check_output(args)
    text, _ = columns_of(results, args.text)
    modality, examples = read_unlabelled(args.data, text=text)
    probabilities = predict_data(args, results, modality, examples)
    names, predictions = results["names"], probabilities.argmax(1).tolist()
    args.output.parent.mkdir(parents=True, exist_ok=True)
    columns = {"example": name_sources(args.data, examples)}
    write_predictions(args.output, columns, predictions, probabilities.tolist(), names)
    most = Counter(names[i] for i in predictions).most_common()
    more = f" and {len(most) - SHOWN} classes more" if len(most) > SHOWN else ""
    print(f"predicted {', '.join(f'{count} {name}' for name, count in most[:SHOWN])}{more}")
    print(f"table     {args.output.resolve()}")


if __name__ == "__main__":
    main()
