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
from torch import from_numpy

from daam.importance import importance_factor, layer_contribution
from daam.recipes.errors import extra

with extra():
    # neither pyplot nor matplotlib.use: who imports a recipe into a notebook keeps the notebook's own backend
    from matplotlib import rc_context
    from matplotlib.axes import Axes
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.image import AxesImage

BASELINES = ("logistic_last", "logistic", "last", "linear")
MOST_NUMBERS, MOST_NAMES = 30, 60  # classes of which counts, and names, are legible


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
    """Draw test accuracy of several runs against trainable parameters, mean and spread over parts, into a file, with
    lines for chance and for the first of BASELINES that is among them.
    """
    with _picture(path, (8, 4.5)) as figure:
        axes = figure.subplots()
        for i, row in enumerate(sorted(rows, key=lambda row: row["trainable_parameters"])):
            accuracy, parameters = row["accuracy"], row["trainable_parameters"]
            axes.errorbar(parameters, accuracy["mean"], accuracy["std"], fmt="osD"[i // 10 % 3], capsize=3,
                          color=f"C{i % 10}", label=f"{row['method']} ({parameters:,})")  # fmt: skip
        axes.axhline(rows[0]["chance"], color="gray", linewidth=0.8, linestyle=":", label="the most frequent class")
        found = {row["method"]: row["accuracy"]["mean"] for row in rows}
        if baseline := next((name for name in BASELINES if name in found), None):
            axes.axhline(found[baseline], color="black", linewidth=0.8, linestyle="--", label=f"{baseline}, baseline")
        axes.set(xscale="log", xlabel="trainable parameters", ylabel="test accuracy")
        axes.grid(alpha=0.3)
        _add_legend(axes, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
        parts = len(rows[0]["parts"])
        _add_title(figure, f"Test accuracy: mean ± standard deviation of {parts} parts\n{describe(rows[0])}")


def plot_confusion(results: dict[str, Any], matrix: np.ndarray, path: Path, title: str | None = None) -> None:
    """Draw how many examples of each class are taken for each, (classes, classes), into a file; colours are shares of a
    class. title: None for the run's own test examples.
    """
    names, size = results["names"], 2.5 + 0.45 * min(len(matrix), 40)
    with _picture(path, (size + 1.5, size)) as figure:
        axes = figure.subplots()
        shares = matrix / np.maximum(matrix.sum(1, keepdims=True), 1)
        image = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
        figure.colorbar(image, ax=axes, label="share of the class")
        if len(names) <= MOST_NUMBERS:
            for (row, column), count in np.ndenumerate(matrix):
                color = "white" if shares[row, column] > 0.5 else "black"
                axes.text(column, row, count, ha="center", va="center", color=color, fontsize=8)
        ticks = range(0, len(names), 1 + len(names) // MOST_NAMES)
        shown = [name if len(name) <= 30 else f"{name[:29]}…" for name in (" ".join(names[i].split()) for i in ticks)]
        axes.set_xticks(ticks, shown, rotation=90, fontsize=8, parse_math=False)
        axes.set_yticks(ticks, shown, fontsize=8, parse_math=False)
        axes.set(xlabel="taken for", ylabel="class")
        _add_title(figure, title or f"{results['method']}: test accuracy {accuracy_of(results)}")


def plot_importance(
    trained: np.ndarray, untrained: np.ndarray, names: list[int], heads: int, about: str, path: Path
) -> None:
    """Draw maps of mean weights, (layers, features), of trained and of untrained decoders into a file: the importance
    factor of both, their difference in parts of the trained map's range, and the contribution of each layer in percent.
    names: the layers' numbers. about: the title.
    """
    layers = len(trained)
    with _picture(path, (17, 1.7 + max(3, 0.22 * layers))) as figure:
        maps = [from_numpy(weights) for weights in (trained, untrained)]
        difference = (trained - untrained) / (np.ptp(trained) or 1)
        most = np.abs(difference).max() or 1
        first, second, third, bars = figure.subplots(1, 4, width_ratios=(3, 3, 3, 2), sharey=True)
        images = [
            _draw_map(axes, importance_factor(weights).numpy(), heads, title, cmap="viridis", vmin=0, vmax=1)
            for axes, weights, title in zip((first, second), maps, ("Trained", "Untrained"), strict=True)
        ]
        figure.colorbar(images[-1], ax=second, label="importance factor, (w - min) / (max - min)")
        image = _draw_map(third, difference, heads, "Difference", cmap="RdBu_r", vmin=-most, vmax=most)
        figure.colorbar(image, ax=third, label="(trained - untrained) / (max - min)")
        first.set(ylabel="encoder layer")
        for shift, weights, label in zip((0.2, -0.2), maps, ("trained", "untrained"), strict=True):
            shares = layer_contribution(weights).numpy()
            bars.barh(np.arange(1, layers + 1) + shift, shares, height=0.4, label=label)
        bars.set(xlabel="percent of all weights", title="Layer contribution")
        bars.set_yticks(range(1, layers + 1), names)
        bars.axvline(100 / layers, color="black", linewidth=0.8, linestyle="--", label="an equal share")
        _add_legend(bars, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
        _add_title(figure, about)


def _draw_map(axes: Axes, values: np.ndarray, heads: int, title: str, **scale: Any) -> AxesImage:
    """Draw a map of (layers, features) and the ends of its heads; return the image, of which a colorbar is made."""
    layers, features = values.shape
    extent = (0, features, 0.5, layers + 0.5)
    image = axes.imshow(values, aspect="auto", origin="lower", extent=extent, interpolation="nearest", **scale)
    for edge in range(layers // heads, layers, layers // heads):
        axes.axhline(edge + 0.5, color="white" if scale["cmap"] == "viridis" else "black", linewidth=1)
    axes.set(xlabel="feature", title=title)
    return image


def plot_gaussians(
    learned: tuple[np.ndarray, np.ndarray], start: tuple[np.ndarray, np.ndarray], about: str, path: Path
) -> None:
    """Draw what every head learned beside what it was before training, mean offsets and scaled variances of (heads, P)
    each, into a file: its Gaussians, as their mean and middle half, and ranges of both parameters. about: the title.
    """
    with _picture(path, (13, 4)) as figure:
        curves, offsets, scales = figure.subplots(1, 3)
        _draw_curves(curves, learned, start)
        for axes, values, before, title in zip(
            (offsets, scales), learned, start, ("Mean offset", "Scaled variance"), strict=True
        ):
            heads = np.arange(1, len(values) + 1)
            for shift, shown, color in ((-0.2, values, "C0"), (0.2, before, "0.5")):
                line = {"color": color}
                axes.boxplot(list(shown), positions=heads + shift, widths=0.3, whis=(0, 100), manage_ticks=False,
                             boxprops=line, whiskerprops=line, capprops=line, medianprops=line)  # fmt: skip
                axes.plot([], color=color, label="learned" if shown is values else "before training")
            axes.set_xticks(heads)
            axes.set(xlabel="head", title=f"{title}: range, quartiles", ylabel=title.lower())
            _add_legend(axes, fontsize=7)
        _add_title(figure, about)


def _draw_curves(axes: Axes, learned: tuple[np.ndarray, np.ndarray], start: tuple[np.ndarray, np.ndarray]) -> None:
    """Draw the Gaussians of every head, wide and with their middle half as learned, thin and dashed as before."""
    z, alike = np.linspace(-4, 4, 161), all(np.ptp(values, 0).max() == 0 for values in start)
    for h, (mean_offset, c, *before) in enumerate(zip(*learned, *start, strict=True)):
        style = ("-", (0, (8, 1)), "-.", ":")[h % 4]  # heads that learned the same stay visible
        gates = _gates(z, mean_offset, c)
        low, high = np.quantile(gates, [0.25, 0.75], axis=1)
        (line,) = axes.plot(z, gates.mean(1), linestyle=style, linewidth=2.5, alpha=0.6, label=f"head {h + 1}")
        color = line.get_color()
        axes.fill_between(z, low, high, color=color, alpha=0.2, linewidth=0)
        # heads that begin alike would hide each other's colour
        axes.plot(z, _gates(z, *before).mean(1), "--", linewidth=1, color="black" if alike else color, zorder=3)
    axes.plot([], "--", linewidth=1, color="black", label="before training")
    axes.set(xlabel="x - mean, at a standard deviation of 1", ylabel="gate", title="Gaussians: mean, middle half")
    _add_legend(axes, fontsize=7)


def _gates(z: np.ndarray, mean_offset: np.ndarray, c: np.ndarray) -> np.ndarray:
    """Return Gaussians of (P,) mean offsets and scaled variances at every z, (points,): (points, P)."""
    return np.exp(-((z[:, None] - mean_offset) ** 2) / (2 * c))


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
