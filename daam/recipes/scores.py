"""How right predictions are: scores of test examples, tables of them, and whether two methods differ."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from daam.recipes.cache import write_whole
from daam.recipes.errors import extra
from daam.recipes.runs import SCORES, Part

with extra():
    from scipy.stats import t as student
    from sklearn.metrics import accuracy_score, confusion_matrix, precision_recall_fscore_support

LEVEL = 0.05  # of a test: two methods that differ by less than chance would in one of 20 comparisons do not differ


def score(labels: Sequence[int], predictions: Sequence[int]) -> dict[str, float]:
    """Return accuracy, balanced_accuracy (the mean recall of classes) and macro_f1, over the classes there are."""
    present = np.unique(labels)
    _, recall, f1, _ = precision_recall_fscore_support(labels, predictions, labels=present, zero_division=0)
    values = accuracy_score(labels, predictions), recall.mean(), f1.mean()
    return dict(zip(SCORES, map(float, values), strict=True))


def p_value(first: Sequence[float], second: Sequence[float], test_share: float) -> float:
    """Return how probable a difference between accuracies on the same parts is where there is none: that of a paired t
    test, two-sided, with the correction for parts that train on the same examples (Nadeau and Bengio, 2003).

    test_share: examples that test in examples that train. NaN, unknown, for a single part, and where the difference is
    the same in all: of few test examples that happens by chance.
    """
    differences = np.subtract(first, second)
    n = len(differences)
    if n < 2:
        return math.nan
    mean, variance = differences.mean(), differences.var(ddof=1)
    if variance < 1e-18:  # but for rounding
        return 1.0 if abs(mean) < 1e-9 else math.nan
    return float(2 * student.sf(abs(mean) / math.sqrt((1 / n + test_share) * variance), n - 1))


def pooled(labels: Sequence[int], parts: Iterable[Part]) -> tuple[list[int], list[int]]:
    """Return labels and predictions of the test examples of all parts, one after another."""
    parts = list(parts)
    places = [i for part in parts for i in part.test]
    return [int(labels[i]) for i in places], [p for part in parts for p in part.predictions]


def confusion(labels: Sequence[int], predictions: Sequence[int], classes: int) -> np.ndarray:
    """Return how many examples of each class, by rows, are taken for each, by columns: (classes, classes)."""
    return confusion_matrix(labels, predictions, labels=range(classes))


def write_scores(folder: Path, labels: Sequence[int], names: list[str], parts: list[Part]) -> None:
    """Write predictions.csv, with the probability of every class for each test example, classes.csv and confusion.csv.

    labels: of all examples, as indices of names. Examples count from 0, as rows of a table do, or files in their order.
    """
    truth, predictions = pooled(labels, parts)
    columns = {
        "part": [i for i, part in enumerate(parts) for _ in part.test],
        "example": [place for part in parts for place in part.test],
        "label": [names[label] for label in truth],
    }
    probabilities = [found for part in parts for found in part.probabilities]
    write_predictions(folder / "predictions.csv", columns, predictions, probabilities, names)
    write_classes(folder, truth, predictions, names)


def write_predictions(
    path: Path, columns: dict[str, Sequence[Any]], predictions: Sequence[int], probabilities: Sequence[Sequence[float]],
    names: list[str],
) -> None:  # fmt: skip
    """Write a table with a row for each example: its entries in columns, which go first, by their names, the name of
    the class that is predicted, and the probability of every class. Nine digits tell all numbers in fp32 apart.
    """
    rows = [
        [*entries, names[prediction], *(f"{p:.9g}" for p in found)]
        for *entries, prediction, found in zip(*columns.values(), predictions, probabilities, strict=True)
    ]
    write_csv(path, [[*columns, "prediction", *(f"p({name})" for name in names)], *rows])


def write_classes(folder: Path, labels: Sequence[int], predictions: Sequence[int], names: list[str]) -> None:
    """Write scores of every class into classes.csv, and into confusion.csv how many examples of each, by rows, are
    taken for each, by columns.
    """
    columns = precision_recall_fscore_support(labels, predictions, labels=range(len(names)), zero_division=0)
    write_csv(
        folder / "classes.csv",
        [["class", "precision", "recall", "f1", "examples"]]
        + [
            [name, *(f"{value:.4f}" for value in values), int(count)]
            for name, *values, count in zip(names, *columns, strict=True)
        ],
    )
    matrix = confusion(labels, predictions, len(names))
    write_csv(
        folder / "confusion.csv",
        [["label", *names], *([name, *row] for name, row in zip(names, matrix.tolist(), strict=True))],
    )


def write_csv(path: Path, rows: list[list[Any]]) -> None:
    """Write rows as CSV into a file as a whole, or not at all."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    write_whole(path, text.getvalue().encode())
