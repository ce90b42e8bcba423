"""Scores of predictions against scikit-learn and by hand, the paired test, and the tables that are written."""

import csv
import math

import numpy as np
import pytest
from scipy import stats

pytest.importorskip("sklearn")

from sklearn.metrics import accuracy_score, balanced_accuracy_score, f1_score

from daam.recipes.runs import Part
from daam.recipes.scores import confusion, p_value, pooled, score, write_scores


def test_scores_are_scikit_learns():
    generator = np.random.default_rng(0)
    labels = generator.integers(0, 4, 200)
    predictions = np.where(generator.random(200) < 0.5, labels, generator.integers(0, 4, 200))
    expected = {
        "accuracy": accuracy_score(labels, predictions),
        "balanced_accuracy": balanced_accuracy_score(labels, predictions),
        "macro_f1": f1_score(labels, predictions, average="macro"),
    }  # fmt: skip
    assert score(labels.tolist(), predictions.tolist()) == pytest.approx(expected)


def test_a_rare_class_counts_in_balanced_scores():
    found = score([0] * 9 + [1], [0] * 10)
    assert found["accuracy"] == 0.9 and found["balanced_accuracy"] == 0.5
    assert found["macro_f1"] == pytest.approx(18 / 19 / 2)
    # a class that only predictions have is no class of these examples
    assert score([0, 0], [0, 2]) == pytest.approx({"accuracy": 0.5, "balanced_accuracy": 0.5, "macro_f1": 2 / 3})


def test_the_paired_test_without_common_examples_is_students():
    first, second = [0.7, 0.72, 0.69, 0.75, 0.71], [0.68, 0.73, 0.66, 0.71, 0.7]
    assert p_value(first, second, 0.0) == pytest.approx(stats.ttest_rel(first, second).pvalue)
    t = np.mean(np.subtract(first, second)) / math.sqrt((1 / 5 + 0.25) * np.var(np.subtract(first, second), ddof=1))
    assert p_value(first, second, 0.25) == pytest.approx(2 * stats.t.sf(t, 4))
    assert p_value(first, second, 0.25) > p_value(first, second, 0.0)


def test_the_paired_test_of_few_or_equal_parts():
    assert math.isnan(p_value([0.7], [0.6], 0.25))
    assert p_value([0.7, 0.6], [0.7, 0.6], 0.25) == 1
    assert math.isnan(p_value([0.7, 0.6], [0.6, 0.5], 0.25))


def test_two_folds_of_the_same_method_do_not_differ():
    """Check how often 400 pairs of methods that are the same differ by the test: in about 5 of 100, and no more."""
    generator = np.random.default_rng(0)
    test, folds = 80, 5
    found = [p_value(*generator.binomial(test, 0.7, (2, folds)) / test, 1 / (folds - 1)) < 0.05 for _ in range(400)]
    assert np.mean(found) < 0.06


def read(path):
    with path.open() as file:
        return list(csv.reader(file))


def test_tables_of_predictions(tmp_path):
    labels, names = [0, 1, 2, 0, 1, 2], ["a", "b,c", "d"]
    parts = [
        Part(test=[0, 4], predictions=[0, 2], probabilities=[[0.6, 0.3, 0.1], [0.2, 0.3, 0.5]]),
        Part(test=[5, 1], predictions=[2, 1], probabilities=[[0, 0, 1], [0.25, 0.5, 0.25]]),
    ]
    write_scores(tmp_path, labels, names, parts)
    assert read(tmp_path / "predictions.csv") == [
        ["part", "example", "label", "prediction", "p(a)", "p(b,c)", "p(d)"],
        ["0", "0", "a", "a", "0.6", "0.3", "0.1"],
        ["0", "4", "b,c", "d", "0.2", "0.3", "0.5"],
        ["1", "5", "d", "d", "0", "0", "1"],
        ["1", "1", "b,c", "b,c", "0.25", "0.5", "0.25"],
    ]
    assert pooled(labels, parts) == ([0, 1, 2, 1], [0, 2, 2, 1])
    assert confusion(*pooled(labels, parts), 3).tolist() == [[1, 0, 0], [0, 1, 1], [0, 0, 1]]
    assert read(tmp_path / "confusion.csv")[1:] == [["a", "1", "0", "0"], ["b,c", "0", "1", "1"], ["d", "0", "0", "1"]]
    rows = read(tmp_path / "classes.csv")
    assert rows[0] == ["class", "precision", "recall", "f1", "examples"]
    assert rows[2] == ["b,c", "1.0000", "0.5000", "0.6667", "2"] and rows[3][1:3] == ["0.5000", "1.0000"]
