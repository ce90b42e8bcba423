"""Train several methods on the same parts with the same budget and set them side by side.

A row is printed as soon as its method ends; then a table (table.md, table.csv, comparison.json) and a plot are written,
beside a folder a method with its predictions, scores of classes and confusion matrix. What is there already is not
trained again, and goes on with more --epochs.
"""

from __future__ import annotations

import argparse
import math
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from daam.recipes import processes
from daam.recipes.cache import read_cache, write_whole
from daam.recipes.errors import Parser, guarded
from daam.recipes.lock import exclusive
from daam.recipes.methods import METHODS
from daam.recipes.plots import plot_comparison
from daam.recipes.runs import PAPER, Settings, write_json
from daam.recipes.scores import LEVEL, p_value, write_csv
from daam.recipes.train import METHODS_HELP, add_settings, check_methods, layer_places, train

EXAMPLE = """example: the methods that train on features, on 1,000 short texts:
  python -m daam.recipes.compare cache --folds 3 --output comparison

methods:
{methods}

Interrupted, run the same command again: it goes on where it stopped. Finished, run it with more --epochs. Several
processes, each on its own folds or seeds, and on its own GPU with --device cuda:
  torchrun --nproc-per-node=2 -m daam.recipes.compare cache --folds 3 --output comparison"""
DEFAULT = ("last", "weighted_sum", "attentive", "linear", "logistic_last", "logistic", "mha", "none", "daam",
           "daamv2", "mixture", "gqdaam")  # fmt: skip
COLUMNS = ("method", "test accuracy", "balanced accuracy", "macro F1", "below the best", "trainable parameters",
           "seconds", "MB")  # fmt: skip


def columns_of(row: dict[str, Any], best: dict[str, Any] | None) -> list[str]:
    """Return a row of the table: a run's results in words, and whether they differ from the best run's, if given."""
    scores = ["{mean:.3f} ± {std:.3f}".format(**row[name]) for name in ("accuracy", "balanced_accuracy", "macro_f1")]
    seconds, memory = f"{row['seconds']:.1f}", f"{row['memory']['bytes'] / 1e6:.2f}"
    return [row["method"], *scores, _difference(row, best), f"{row['trainable_parameters']:,}", seconds, memory]


def _difference(row: dict[str, Any], best: dict[str, Any] | None) -> str:
    """Return in words whether a run is below the best one by more than chance, by its p value."""
    if best is None or row is best:
        return "" if best is None else "the best"
    p = compare_runs(row, best)
    if math.isnan(p):
        return "unknown"
    return f"yes (p {p:.3f})" if p < LEVEL else f"no (p {p:.2f})"


def compare_runs(first: dict[str, Any], second: dict[str, Any]) -> float:
    """Return the p value of the difference of two runs' accuracies on the same parts; see `scores.p_value`. NaN where
    all parts have the same test examples, as the data names them: their spread says nothing of others.
    """
    if tests_once(first):
        return math.nan
    parts = first["parts"], second["parts"]
    accuracies = [[part["accuracy"] for part in run] for run in parts]
    shares = [len(part["test"]) / part["train"] for part in first["parts"]]
    return p_value(*accuracies, float(np.mean(shares)))


def tests_once(row: dict[str, Any]) -> bool:
    """Return whether all parts of a run test the same examples."""
    return all(part["test"] == row["parts"][0]["test"] for part in row["parts"])


def table(rows: list[dict[str, Any]]) -> str:
    """Return a table of the results of runs as Markdown, the most accurate first, with what there is to say of it."""
    ranked = sorted(rows, key=lambda row: -row["accuracy"]["mean"])
    lines = [_line(COLUMNS), _line(["---"] * len(COLUMNS))]
    lines += [_line(columns_of(row, ranked[0])) for row in ranked]
    return "\n".join([*lines, "", *notes(ranked)])


def _line(cells: tuple[str, ...] | list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def notes(rows: list[dict[str, Any]]) -> list[str]:
    """Return what a reader has to know of a table, as sentences, and what was warned of."""
    parts, settings = rows[0]["parts"], asdict(Settings.of(rows[0]))
    memory = " or ".join(dict.fromkeys(row["memory"]["what"] for row in rows))
    rates = f"{'of the paper; ' if is_papers(settings) else ''}rates " + ", ".join(f"{r:g}" for r in settings["rates"])
    features = "standardised" if settings["standardize"] else "as they are"
    weights = ", class weights" if settings["class_weights"] else ""
    test = f"by a paired t test over the parts, corrected for their common training examples, at {LEVEL}"
    spread = f"{len(parts)} test parts"
    if tests_once(rows[0]):
        test = "unknown, as all test the same examples"
        spread = f"{len(parts)} repetitions, on the same test examples"
    lines = [
        f"Mean ± standard deviation of {spread}; saying the most frequent class gives {rows[0]['chance']:.3f}. "
        f"Below the best: {test}. Seconds of training a part, at all rates; MB {memory}.",
        f"Settings: {rates}, at most {settings['epochs']} epochs "
        f"({settings['stop_after']} without a better one), batches of {settings['batch']}, {settings['loss']} loss, "
        f"{settings['conv_channels']} channels between convolutions, layers {features}{weights}.",
    ]
    for row in rows:
        told: dict[str, list[str]] = {}
        for i, part in enumerate(row["parts"]):
            for text in part["warnings"]:
                told.setdefault(text, []).append(str(i))
        lines += [f"Warning, {row['method']}, part {', '.join(where)}: {text}." for text, where in told.items()]
    return lines


def is_papers(settings: dict[str, Any]) -> bool:
    """Return whether settings, by name, are the paper's."""
    default = asdict(Settings(""))
    expected = PAPER | {name: default[name] for name in ("weight_decay", "class_weights")}
    return {name: settings[name] for name in expected} == expected


def write_comparison(rows: list[dict[str, Any]], output: Path) -> str:
    """Write table.md, table.csv, comparison.json and comparison.png of runs into a folder; return the table."""
    write_json(output / "comparison.json", rows)
    text = table(rows)
    write_whole(output / "table.md", f"{text}\n".encode())
    best = max(rows, key=lambda row: row["accuracy"]["mean"])
    header = ["method", "accuracy", "accuracy std", "balanced accuracy", "macro F1", "p of the difference to the best",
              "trainable parameters", "seconds", "bytes", "parts"]  # fmt: skip
    lines = [
        [row["method"], row["accuracy"]["mean"], row["accuracy"]["std"], row["balanced_accuracy"]["mean"],
         row["macro_f1"]["mean"], "" if row is best else compare_runs(row, best), row["trainable_parameters"],
         row["seconds"], row["memory"]["bytes"], len(row["parts"])]
        for row in rows
    ]  # fmt: skip
    write_csv(output / "table.csv", [header, *lines])
    plot_comparison(rows, output / "comparison.png")
    return text


@partial(guarded, several=True)
def main(argv: list[str] | None = None) -> None:
    """Run the command line: train several methods on a cache and compare them."""
    parser = Parser(description=__doc__, epilog=EXAMPLE.format(methods=METHODS_HELP),
                    formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    add_settings(parser)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(DEFAULT), metavar="METHOD",
                        help="below (default: all but gqa, mha_bn and LoRA)")  # fmt: skip
    args = parser.parse_args(argv)
    methods, rows = list(dict.fromkeys(args.methods)), []
    with processes.joined(args.device) as args.device:
        cache = read_cache(args.cache)
        args.layers = layer_places(args.layers, cache)
        jobs = check_methods(args, methods, cache)
        with exclusive(args.output):
            print(f"\n{_line(COLUMNS)}\n{_line(['---'] * len(COLUMNS))}", flush=True)
            for method in methods:
                rows.append(train(args, cache, method, args.output / method, jobs.get(method)))
                print(_line(columns_of(rows[-1], None)), flush=True)
            if processes.rank() == 0:
                print(f"\n{write_comparison(rows, args.output)}\n\n{args.output.resolve()}")


if __name__ == "__main__":
    main()
