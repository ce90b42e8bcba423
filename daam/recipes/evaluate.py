"""Score a finished run on labelled data that it has not seen: accuracy, balanced accuracy and macro F1.

Predictions are those of daam.recipes.predict, with the same options. Besides scores.json the folder gets
predictions.csv, with the label beside, classes.csv, confusion.csv and confusion.png, as that of a run has them. Labels
must be among the classes of the run; not all of these need have examples.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from torch import Tensor

from daam.recipes.data import name_sources, read_examples
from daam.recipes.errors import Parser, guarded
from daam.recipes.examples import Example, encode_labels, hash_contents
from daam.recipes.plots import plot_confusion
from daam.recipes.predict import add_options, predict_data
from daam.recipes.runs import RunError, check_output, write_json
from daam.recipes.saved import cache_of, columns_of, read_finished
from daam.recipes.scores import confusion, score, write_classes, write_predictions

EXAMPLE = """example:
  python -m daam.recipes.evaluate runs/daam --data labelled.csv --output evaluation"""


def evaluate(
    output: Path, results: dict[str, Any], examples: list[Example], titles: list[str], probabilities: Tensor
) -> dict[str, Any]:
    """Write what is to be said of the probabilities, (examples, classes), that a run gives to labelled examples into a
    folder, and return the scores. titles: what examples are called. Raise a DataError where a label is none of the
    run's.
    """
    names, truth = results["names"], encode_labels(examples, results["names"]).tolist()
    predictions = probabilities.argmax(1).tolist()
    scores = {"method": results["method"], "examples": len(examples), **score(truth, predictions)}
    output.mkdir(parents=True, exist_ok=True)
    columns = {"example": titles, "label": [example.label for example in examples]}
    write_predictions(output / "predictions.csv", columns, predictions, probabilities.tolist(), names)
    write_classes(output, truth, predictions, names)
    title = f"{results['method']}: accuracy {scores['accuracy']:.3f} on {len(examples)} examples"
    plot_confusion(results, confusion(truth, predictions, len(names)), output / "confusion.png", title)
    write_json(output / "scores.json", scores)
    return scores


@guarded
def main(argv: list[str] | None = None) -> None:
    """Run the command line: score a run on labelled data."""
    parser = Parser(description=__doc__, epilog=EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser)
    parser.add_argument(
        "--data",
        required=True,
        help=".csv, .tsv or .jsonl of text,label; or a folder with one subfolder for each class",
    )
    parser.add_argument("--label", metavar="COLUMN", help="column of labels (default: as in the run's data)")
    parser.add_argument("--output", required=True, type=Path, help="folder of the scores and tables")
    args = parser.parse_args(argv)
    results = read_finished(args.run)
    check_output(args.output)
    if (args.output / "run.json").exists():
        raise RunError(f"--output {args.output} is a run, expected another folder: its tables would be replaced")
    text, label = columns_of(results, args.text, args.label)
    modality, examples = read_examples(args.data, text=text, label=label, least_classes=1)
    encode_labels(examples, results["names"])  # a wrong label shows before an encoder is loaded
    about = cache_of(results)
    if hash_contents(examples) == about.get("contents_sha256", about.get("examples_sha256")):
        print(f"{args.data} is the data that {args.run} was trained on: new examples will have lower scores")
    probabilities = predict_data(args, results, modality, examples)
    scores = evaluate(args.output, results, examples, name_sources(args.data, examples), probabilities)
    for name in ("accuracy", "balanced_accuracy", "macro_f1"):
        print(f"{name.replace('_', ' '):18}{scores[name]:.4f}")
    print(args.output.resolve())


if __name__ == "__main__":
    main()
