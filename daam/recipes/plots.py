"""Pictures of the recipes: learning curves, comparisons, importance. They draw results and train nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.figure import Figure


def plot_curves(results: dict[str, Any], path: Path) -> None:
    """Training loss and validation accuracy of every part against the epoch."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.8), layout="constrained")
    for i, part in enumerate(results["parts"]):
        epochs = range(1, len(part["losses"]) + 1)
        left.plot(epochs, part["losses"], label=f"part {i}")
        (line,) = right.plot(epochs, part["accuracies"])
        best = part["best_epoch"]
        right.plot(best + 1, part["accuracies"][best], "o", color=line.get_color())
    left.set(xlabel="epoch", ylabel=f"training loss ({results['settings']['loss']})", title="Loss", yscale="log")
    right.set(xlabel="epoch", ylabel="validation accuracy", title="Validation; dots: the epoch that is tested")
    left.legend(fontsize=8)
    accuracy = results["accuracy"]
    _save(figure, f"{results['method']}: test accuracy {accuracy['mean']:.3f} ± {accuracy['std']:.3f}", results, path)


def plot_comparison(rows: list[dict[str, Any]], path: Path) -> None:
    """Test accuracy against trainable parameters, mean and spread over parts."""
    figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
    for i, row in enumerate(sorted(rows, key=lambda row: row["trainable_parameters"])):
        accuracy, parameters = row["accuracy"], row["trainable_parameters"]
        axes.errorbar(parameters, accuracy["mean"], accuracy["std"], fmt="o", capsize=3, color=f"C{i % 10}",
                      label=f"{row['method']} ({parameters:,})")  # fmt: skip
    axes.set(xscale="log", xlabel="trainable parameters", ylabel="test accuracy")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    _save(figure, f"Test accuracy: mean ± standard deviation of {len(rows[0]['parts'])} parts", rows[0], path)


def plot_importance(
    importance: np.ndarray, contribution: np.ndarray, names: list[int], heads: int, about: str, path: Path
) -> None:
    """The importance factor of every layer and feature, (layers, features), and the percent of each layer. names: the
    layers' numbers.
    """
    layers, features = importance.shape
    figure, (left, right) = plt.subplots(
        1, 2, figsize=(11, 1.5 + max(3, 0.22 * layers)), layout="constrained", width_ratios=(3, 1), sharey=True
    )
    extent = (0, features, 0.5, layers + 0.5)
    image = left.imshow(importance, aspect="auto", origin="lower", cmap="viridis", vmin=0, vmax=1, extent=extent,
                        interpolation="nearest")  # fmt: skip
    left.set(xlabel="feature", ylabel="encoder layer", title="Importance factor")
    figure.colorbar(image, ax=left, label="(w - min) / (max - min)")
    right.barh(range(1, layers + 1), contribution)
    right.set(xlabel="percent of all weights", title="Layer contribution")
    right.set_yticks(range(1, layers + 1), names)
    right.axvline(100 / layers, color="black", linewidth=0.8, linestyle="--", label="an equal share")
    right.legend(fontsize=7, loc="lower left")
    for edge in range(layers // heads, layers, layers // heads):
        left.axhline(edge + 0.5, color="white", linewidth=1)  # where one head ends
    figure.suptitle(about, fontsize=10)
    _write(figure, path)


def plot_gaussians(mean_offset: np.ndarray, c: np.ndarray, about: str, path: Path) -> None:
    """What every head learned, (heads, P) each: its Gaussians, as their mean and middle half, and ranges of both
    parameters.
    """
    heads = len(c)
    figure, (curves, offsets, scales) = plt.subplots(1, 3, figsize=(13, 4), layout="constrained")
    z = np.linspace(-4, 4, 161)
    for h in range(heads):
        style = ("-", "--", "-.", ":")[h % 4]  # heads that learned the same stay visible
        gates = np.exp(-((z[:, None] - mean_offset[h]) ** 2) / (2 * c[h]))
        low, high = np.quantile(gates, [0.25, 0.75], axis=1)
        (line,) = curves.plot(z, gates.mean(1), style, label=f"head {h + 1}")
        curves.fill_between(z, low, high, color=line.get_color(), alpha=0.2, linewidth=0)
    curves.set(
        xlabel="x - mean, at a standard deviation of 1", ylabel="gate", title="Learned Gaussians: mean, middle half"
    )
    curves.legend(fontsize=7)
    for axes, values, title in ((offsets, mean_offset, "Mean offset"), (scales, c, "Scaled variance")):
        axes.boxplot(list(values), whis=(0, 100))
        axes.set(xlabel="head", title=f"{title}: range, quartiles", ylabel=title.lower())
    figure.suptitle(about, fontsize=10)
    _write(figure, path)


def describe(results: dict[str, Any]) -> str:
    """Data, encoder, device and version of a run in a line."""
    about = results["about"]
    cache = about.get("cache", {})
    parts = (cache.get("encoder"), cache.get("source"), about["device"], f"torch {about['torch']}")
    return ", ".join(str(part) for part in parts if part)


def _save(figure: Figure, title: str, results: dict[str, Any], path: Path) -> None:
    figure.suptitle(f"{title}\n{describe(results)}", fontsize=10)
    _write(figure, path)


def _write(figure: Figure, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    plt.close(figure)
