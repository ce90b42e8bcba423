"""Pictures of the recipes: learning curves, comparisons, importance. They draw results and train nothing.

A picture is the least of what a run gives: one that fails is told in a line of standard error, and ends nothing.
"""

from __future__ import annotations

import contextlib
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from daam.recipes.errors import extra

with extra():
    # neither pyplot nor matplotlib.use: who imports a recipe into a notebook keeps the notebook's own backend
    from matplotlib import rc_context
    from matplotlib.axes import Axes
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure


def plot_curves(results: dict[str, Any], path: Path) -> None:
    """Draw training loss and validation accuracy of every part of a run against the epoch, into a file."""
    with _picture(path, (10, 3.8)) as figure:
        left, right = figure.subplots(1, 2)
        for i, part in enumerate(results["parts"]):
            epochs = range(1, len(part["losses"]) + 1)
            left.plot(epochs, part["losses"], label=f"part {i}")
            (line,) = right.plot(epochs, part["accuracies"])
            best = part["best_epoch"]
            right.plot(best + 1, part["accuracies"][best], "o", color=line.get_color())
        left.set(xlabel="epoch", ylabel=f"training loss ({results['settings']['loss']})", title="Loss", yscale="log")
        right.set(xlabel="epoch", ylabel="validation accuracy", title="Validation; dots: the epoch that is tested")
        _add_legend(left, fontsize=8)
        _add_title(figure, f"{results['method']}: test accuracy {accuracy_of(results)}\n{describe(results)}")


def plot_comparison(rows: list[dict[str, Any]], path: Path) -> None:
    """Draw test accuracy of several runs against trainable parameters, mean and spread over parts, into a file."""
    with _picture(path, (8, 4.5)) as figure:
        axes = figure.subplots()
        for i, row in enumerate(sorted(rows, key=lambda row: row["trainable_parameters"])):
            accuracy, parameters = row["accuracy"], row["trainable_parameters"]
            axes.errorbar(parameters, accuracy["mean"], accuracy["std"], fmt="o", capsize=3, color=f"C{i % 10}",
                          label=f"{row['method']} ({parameters:,})")  # fmt: skip
        axes.set(xscale="log", xlabel="trainable parameters", ylabel="test accuracy")
        axes.grid(alpha=0.3)
        _add_legend(axes, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
        parts = len(rows[0]["parts"])
        _add_title(figure, f"Test accuracy: mean ± standard deviation of {parts} parts\n{describe(rows[0])}")


def plot_importance(
    importance: np.ndarray, contribution: np.ndarray, names: list[int], heads: int, about: str, path: Path
) -> None:
    """Draw the importance factor of every layer and feature, (layers, features), and the contribution of each layer in
    percent, (layers,), into a file. names: the layers' numbers. about: the title.
    """
    layers, features = importance.shape
    with _picture(path, (11, 1.5 + max(3, 0.22 * layers))) as figure:
        left, right = figure.subplots(1, 2, width_ratios=(3, 1), sharey=True)
        extent = (0, features, 0.5, layers + 0.5)
        image = left.imshow(importance, aspect="auto", origin="lower", cmap="viridis", vmin=0, vmax=1, extent=extent,
                            interpolation="nearest")  # fmt: skip
        left.set(xlabel="feature", ylabel="encoder layer", title="Importance factor")
        figure.colorbar(image, ax=left, label="(w - min) / (max - min)")
        right.barh(range(1, layers + 1), contribution)
        right.set(xlabel="percent of all weights", title="Layer contribution")
        right.set_yticks(range(1, layers + 1), names)
        right.axvline(100 / layers, color="black", linewidth=0.8, linestyle="--", label="an equal share")
        _add_legend(right, fontsize=7, loc="lower left")
        for edge in range(layers // heads, layers, layers // heads):
            left.axhline(edge + 0.5, color="white", linewidth=1)  # where one head ends
        _add_title(figure, about)


def plot_gaussians(mean_offset: np.ndarray, c: np.ndarray, about: str, path: Path) -> None:
    """Draw what every head learned, mean offsets and scaled variances of (heads, P), into a file: its Gaussians, as
    their mean and middle half, and ranges of both parameters. about: the title.
    """
    heads, z = len(c), np.linspace(-4, 4, 161)
    with _picture(path, (13, 4)) as figure:
        curves, offsets, scales = figure.subplots(1, 3)
        for h in range(heads):
            style = ("-", "--", "-.", ":")[h % 4]  # heads that learned the same stay visible
            gates = np.exp(-((z[:, None] - mean_offset[h]) ** 2) / (2 * c[h]))
            low, high = np.quantile(gates, [0.25, 0.75], axis=1)
            (line,) = curves.plot(z, gates.mean(1), style, label=f"head {h + 1}")
            curves.fill_between(z, low, high, color=line.get_color(), alpha=0.2, linewidth=0)
        curves.set(
            xlabel="x - mean, at a standard deviation of 1", ylabel="gate", title="Learned Gaussians: mean, middle half"
        )
        _add_legend(curves, fontsize=7)
        for axes, values, title in ((offsets, mean_offset, "Mean offset"), (scales, c, "Scaled variance")):
            axes.boxplot(list(values), whis=(0, 100))
            axes.set(xlabel="head", title=f"{title}: range, quartiles", ylabel=title.lower())
        _add_title(figure, about)


def describe(results: dict[str, Any]) -> str:
    """Return encoder, data, device and version of torch of a run, from its results, in a line."""
    about = results["about"]
    cache, torch = about.get("cache") or {}, about.get("torch")
    parts = (cache.get("encoder"), cache.get("source"), about.get("device"), torch and f"torch {torch}")
    return ", ".join(str(part) for part in parts if part)


def accuracy_of(results: dict[str, Any]) -> str:
    """Return the mean test accuracy of a run's parts, and its standard deviation, as pictures and tables show them."""
    return "{mean:.3f} ± {std:.3f}".format(**results["accuracy"])


@contextlib.contextmanager
def _picture(path: Path, size: tuple[float, float]) -> Iterator[Figure]:
    """Give an empty figure of a size in inches, and write what was drawn on it; tell of an exception, and go on."""
    try:
        # a user's style may have LaTeX set all text, and fail at the _ of a name
        with rc_context({"text.usetex": False}), warnings.catch_warnings():
            # names in a script that the font lacks: they stand as they are in results and tables
            warnings.filterwarnings("ignore", "Glyph .* missing from font")
            figure = Figure(figsize=size, layout="constrained")
            FigureCanvasAgg(figure)
            yield figure
            path.parent.mkdir(parents=True, exist_ok=True)
            figure.savefig(path, dpi=130)
    except Exception as error:
        print(f"no picture {path}:", type(error).__name__, *str(error).split(), file=sys.stderr)


def _add_title(figure: Figure, text: str) -> None:
    """Put text over a figure as it stands: two $ of a name are no mathematics."""
    figure.suptitle(text, fontsize=10, parse_math=False)


def _add_legend(axes: Axes, **options: Any) -> None:
    """Add a legend whose names stand as they are, without mathematics."""
    for text in axes.legend(**options).get_texts():
        text.set_parse_math(False)
