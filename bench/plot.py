"""Plots of the benchmarks, from result files alone.

    python -m bench.plot RESULTS.json [--history bench/history] [--output plots]

latency, throughput and memory against length; speed-up against the fastest other provider; the history of the device's
dated runs and this one; and, from the audits in the history, instructions and modelled share of a copy.
"""

from __future__ import annotations

import argparse
import itertools
import math
import re
import sys
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from bench.results import OWN, PASSES, YARDSTICKS, Change, Run, UnusableError, history, read, short

Case = dict[str, Any]
COLOURS = {
    "triton": "tab:red", "eager": "tab:blue", "compile": "tab:green", "published": "tab:purple",
    "formula": "tab:pink", "compile_formula": "tab:olive", "sdpa": "tab:orange", "multihead_attention": "tab:brown",
    "layer_norm": "0.55", "copy": "black",
}  # fmt: skip


def _length(case: Case) -> int:
    """Return the length of the axis that a case cuts."""
    return case["shape"][case["axis"]]


def curves(cases: Iterable[Case]) -> dict[str, list[Case]]:
    """Return the cases of workloads that differ in nothing but the length of the axis, or in how as many elements are
    cut, where there are three lengths or more, by a title.
    """
    found = defaultdict(list)
    for case in cases:
        others = {key: case[key] for key in ("family", "algorithm", "heads", "gaussians", "dtype")}
        found[tuple(others.values())].append(case)
    lines = [members for members in found.values() if len(set(map(_length, members))) >= 3]
    return {_title(members): members for members in lines if _comparable(members)}


def _comparable(cases: list[Case]) -> bool:
    """Tell whether workloads have the same sizes beside the length of the axis, or nearly as many elements."""
    others = {math.prod(case["shape"]) / _length(case) for case in cases}
    sizes = [math.prod(case["shape"]) for case in cases]
    return len(others) == 1 or max(sizes) < 1.1 * min(sizes)


def _title(cases: list[Case]) -> str:
    """Return a title of workloads that differ in length: the algorithm, and the sizes that they have in common."""
    first, sizes = cases[0], []
    for dimension, lengths in enumerate(zip(*(case["shape"] for case in cases), strict=True)):
        if dimension == first["axis"]:
            sizes.append("length")
        else:
            sizes.append(str(lengths[0]) if len(set(lengths)) == 1 else "rows")
    return f"{first['algorithm']}, {' x '.join(sizes)}\n{_numbers(first)}"


def _numbers(case: Case) -> str:
    """Return a case's heads, Gaussians and dtype in words."""
    counts = {"head": case["heads"], "Gaussian": case["gaussians"]}
    return ", ".join(f"{n} {name}{'s' if n > 1 else ''}" for name, n in counts.items()) + f", {case['dtype']}"


def _by_provider(cases: Iterable[Case]) -> dict[str, list[Case]]:
    """Return cases by provider, in the order of COLOURS, from the shortest to the longest."""
    found = defaultdict(list)
    for case in sorted(cases, key=_length):
        found[case["provider"]].append(case)
    return {name: found[name] for name in COLOURS if name in found}


def _line(axes: Axes, name: str, cases: list[Case], low: list[float], middle: list[float], high: list[float]) -> None:
    """Draw a provider's medians, middle, against the length of its cases, with a band from low to high."""
    lengths = list(map(_length, cases))
    style = "--" if name in YARDSTICKS else "-"
    axes.plot(lengths, middle, style, color=COLOURS[name], label=name, marker=".", linewidth=1.2)
    axes.fill_between(lengths, low, high, color=COLOURS[name], alpha=0.2, linewidth=0)


def _grid(rows: int, columns: int, title: str) -> tuple[Figure, list[list[Axes]]]:
    """Return an empty figure with a title, and its panels row by row."""
    figure, axes = plt.subplots(rows, columns, figsize=(4.2 * columns + 1, 3.1 * rows + 0.8), squeeze=False,
                                layout="constrained")  # fmt: skip
    figure.suptitle(title, fontsize=10)
    return figure, axes.tolist()


def _sweep(run: Run, quantity: str, unit: str, values) -> Figure | None:
    """Draw a quantity against length, a row of panels a curve, a column a pass; None where the run has no curves.
    values(case) gives the quantity's p20, p50 and p80.
    """
    found = curves(run.rows.values())
    if not found:
        return None
    figure, grid = _grid(len(found), len(PASSES), f"{quantity}: median, band from p20 to p80\n{run.title}")
    for (title, cases), row in zip(found.items(), grid, strict=True):
        for pass_name, axes in zip(PASSES, row, strict=True):
            for name, line in _by_provider(case for case in cases if case["pass"] == pass_name).items():
                _line(axes, name, line, *zip(*map(values, line), strict=True))
            _axes(axes, f"{title}\n{pass_name}", "length (positions)", unit, log=True)
    _legend(figure, grid)
    return figure


def _axes(axes: Axes, title: str, x: str, y: str, log: bool = False) -> None:
    """Write title and labels on a panel, and scale both axes logarithmically where log says so."""
    axes.set_title(title, fontsize=8)
    axes.set_xlabel(x, fontsize=8)
    axes.set_ylabel(y, fontsize=8)
    axes.tick_params(labelsize=8)
    axes.grid(alpha=0.3)
    if log:
        axes.set_xscale("log", base=2)
        _log(axes)


def _log(axes: Axes) -> None:
    """Scale y logarithmically, over a decade at least, with plain numbers."""
    axes.set_yscale("log")
    low, high = axes.get_ylim()
    missing = max(1.0, (10 * low / high) ** 0.5)
    axes.set_ylim(low / missing, high * missing)
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high / low < 1e3 else (1,)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())


def _legend(figure: Figure, grid: list[list[Axes]]) -> None:
    """Put one legend below the whole figure."""
    found = {}
    for axes in itertools.chain(*grid):
        found |= dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
    figure.legend(found.values(), found.keys(), loc="outside lower center", ncols=len(found), fontsize=8)


def latency(run: Run) -> Figure | None:
    """Draw milliseconds against length; None where the run has no curves."""
    return _sweep(run, "Latency", "ms", lambda case: [1e3 * case["seconds"][p] for p in ("p20", "p50", "p80")])


def throughput(run: Run) -> Figure | None:
    """Draw GB/s of the bytes that the pass must move against length; None where the run has no curves."""
    return _sweep(
        run, "Bytes that the pass must move, per second; the copy is the roof", "GB/s",
        lambda case: [case["bytes"] / case["seconds"][p] / 1e9 for p in ("p80", "p50", "p20")],
    )  # fmt: skip


def memory(run: Run) -> Figure | None:
    """Draw memory against length, what is kept on a CPU or allocated at most on a GPU; None without curves."""
    found = curves(
        case for case in run.rows.values() if case["pass"] == "forward+backward" and case["provider"] != "copy"
    )
    if not found:
        return None
    key = "saved_bytes" if "saved_bytes" in next(iter(found.values()))[0] else "peak_bytes"
    titles = {"saved_bytes": "Bytes saved for backward", "peak_bytes": "Peak of allocated bytes, forward and backward"}
    figure, grid = _grid(1, len(found), f"{titles[key]}\n{run.title}")
    for (title, cases), axes in zip(found.items(), grid[0], strict=True):
        for name, line in _by_provider(cases).items():
            values = [case[key] / 2**20 for case in line]
            _line(axes, name, line, values, values, values)
        _axes(axes, title, "length (positions)", "MiB", log=True)
    _legend(figure, grid)
    return figure


def speedup(run: Run) -> Figure | None:
    """Draw how many times as fast as the fastest other provider ours is; None where a run does not have both."""
    backend = "triton" if any(case["backend"] == "triton" for case in run.rows.values()) else "eager"
    groups = defaultdict(dict)
    for case in run.rows.values():
        if case["provider"] not in YARDSTICKS:
            groups[case["pass"], case["workload"]][case["provider"]] = case
    bars = defaultdict(list)
    for cases in groups.values():
        others = [case for name, case in cases.items() if name != backend]
        if backend in cases and others:
            best = min(others, key=lambda case: case["seconds"]["p50"])
            bars[best["pass"]].append((cases[backend], best))
    if not bars:
        return None
    figure, grid = _grid(1, len(bars), f"{backend}: times as fast as the fastest other provider\n{run.title}")
    figure.set_size_inches(4.6 * len(bars) + 2, 0.32 * max(map(len, bars.values())) + 1.8)
    for (pass_name, pairs), axes in zip(bars.items(), grid[0], strict=True):
        _bars(axes, pass_name, pairs)
    for axes in grid[0][1:]:
        axes.set_yticklabels([])
    return figure


def _bars(axes: Axes, pass_name: str, pairs: list[tuple[Case, Case]]) -> None:
    """Draw a bar a pair: how many times as fast as the second case the first one is."""
    for i, (case, rival) in enumerate(pairs):
        times = rival["seconds"]["p50"] / case["seconds"]["p50"]
        axes.barh(i, times, color=COLOURS[rival["provider"]], alpha=0.8)
        axes.text(times, i, f" {times:.2g}, {rival['provider']}", va="center", fontsize=7)
    axes.set_yticks(range(len(pairs)), [_workload(case) for case, _ in pairs])
    axes.axvline(1, color="black", linewidth=0.8)
    axes.margins(x=0.35)
    axes.invert_yaxis()
    _axes(axes, pass_name, "times as fast", "")


def over_time(runs: list[tuple[str, Run]]) -> Figure | None:
    """Draw forward and backward of ours, in multiples of the copy that took turns with them and relative to the first
    run, against the date. runs: (date, run) pairs, oldest first. None where no run has cases of ours.
    """
    lines = defaultdict(list)
    for date, run in runs:
        for name, case in run.rows.items():
            if case["pass"] == "forward+backward" and case["provider"] in OWN:
                lines[case["provider"], name].append((date, case))
    providers = [name for name in OWN if any(name == provider for provider, _ in lines)]
    if not providers:
        return None
    title = "Forward and backward, in times of a copy of x, relative to the first run: median, p20 to p80"
    figure, grid = _grid(1, len(providers), f"{title}\n{runs[-1][1].title}")
    figure.set_size_inches(6.4 * len(providers) + 1, 5)
    for provider, axes in zip(providers, grid[0], strict=True):
        curves = [points for (name, _), points in lines.items() if name == provider]
        for colour, points in zip(matplotlib.colormaps["turbo"](np.linspace(0, 1, len(curves))), curves, strict=True):
            first = points[0][1]["of_copy"]["p50"]
            low, middle, high = ([case["of_copy"][p] / first for _, case in points] for p in ("p20", "p50", "p80"))
            dates = [date for date, _ in points]
            axes.plot(dates, middle, ".-", color=colour, label=_workload(points[0][1]), linewidth=1)
            axes.vlines(dates, low, high, color=colour, alpha=0.3)
        _axes(axes, provider, "run", "times of the first run")
        axes.tick_params(axis="x", rotation=30)
        axes.legend(fontsize=6, loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


def _workload(case: Case) -> str:
    """Return a case's workload in words."""
    return f"{case['algorithm']} {'x'.join(map(str, case['shape']))}, {_numbers(case)}"


def audit(run: Run) -> Figure | None:
    """Draw an audit in bf16, a panel a kind of chunk: instructions an element and, where it is modelled, the share of
    a copy's bandwidth; None where it holds no bf16.
    """
    panels = defaultdict(dict)
    for name, figures in run.rows.items():
        if found := re.fullmatch(r"[^/]+/(\w+-\w+-\w+)-(\d+)-bf16/\w*?(forward|backward)\w*", name):
            panels[found[1]][int(found[2]), found[3]] = figures
    if not panels:
        return None
    modelled = any(figures["share"] is not None for figures in run.rows.values())
    columns = -(-len(panels) // 2)
    quantities = 2 if modelled else 1  # of each kind of chunk, below each other
    figure, grid = _grid(2 * quantities, columns, f"Static audit, bf16\n{run.title}")
    figure.set_size_inches(3 * columns + 1, 5 * quantities + 0.8)
    instructions = grid[::quantities]
    shares = grid[1::quantities] if modelled else []
    for (title, found), axes in zip(panels.items(), itertools.chain(*instructions), strict=False):
        _audit_bars(axes, title, found, "instructions", "instructions an element")
    for (title, found), axes in zip(panels.items(), itertools.chain(*shares), strict=False):
        _audit_bars(axes, title, found, "share", "modelled share of a copy")
        axes.set_ylim(0, 1.05)
    for axes in itertools.chain(*grid):
        if not axes.has_data():
            axes.set_axis_off()
    _legend(figure, grid)
    return figure


def _audit_bars(axes: Axes, title: str, found: dict[tuple[int, str], dict], key: str, unit: str) -> None:
    """Draw a figure of the kernels found, by chunk and kernel, as two bars a chunk."""
    chunks = sorted({chunk for chunk, _ in found})
    for shift, kernel, colour in ((-0.2, "forward", "tab:blue"), (0.2, "backward", "tab:red")):
        places = [i + shift for i, chunk in enumerate(chunks) if (chunk, kernel) in found]
        values = [found[chunk, kernel][key] for chunk in chunks if (chunk, kernel) in found]
        axes.bar(places, values, 0.4, color=colour, label=kernel.strip("_"))
    axes.set_xticks(range(len(chunks)), chunks)
    _axes(axes, title, "positions of a chunk", unit)
    axes.tick_params(axis="x", rotation=90)


def regression(changes: list[Change], title: str, path: Path) -> None:
    """Draw all changes of times in order, or of counted figures where there are none, with their limits; save it."""
    times = [change for change in changes if change.figure == "time"]
    shown = sorted(times or changes, key=lambda change: change.worse)
    figure, [[axes]] = _grid(1, 1, title)
    figure.set_size_inches(9, 4.5)
    colours = [_colour(change) for change in shown]
    axes.scatter(range(len(shown)), [100 * change.worse for change in shown], c=colours, s=10, zorder=3)
    axes.plot([100 * change.limit for change in shown], color="black", linewidth=0.8, label="limit")
    for i, change in enumerate(shown):
        if change.failed and i >= len(shown) - 8:
            axes.annotate(f"{short(change.name)} {change.figure}", (i, 100 * change.worse),
                          fontsize=6, ha="right", xytext=(-4, 2), textcoords="offset points")  # fmt: skip
    quantity = "time, in multiples of the yardsticks" if times else "counted figures"
    _axes(axes, f"red: failed, grey: not ours ({quantity})", "cases, by their change", "worse by (%)")
    axes.legend(fontsize=8)
    _save(figure, path)


def _colour(change: Change) -> str:
    """Return red for a change that failed, blue for another one of ours, and grey for those of others."""
    if change.failed:
        return "tab:red"
    return "tab:blue" if change.judged else "0.6"


def _save(figure: Figure, path: Path) -> None:
    """Write a figure into a file, and close it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main(arguments: list[str] | None = None) -> int:
    """Run the command line: draw all plots; return 2 where a file is no result."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("results", type=Path)
    parser.add_argument("--history", type=Path, default=Path(__file__).parent / "history")
    parser.add_argument("--output", type=Path, default=Path("plots"), help="folder of the plots")
    args = parser.parse_args(arguments)
    try:
        run = read(args.results)
        earlier = [
            (path.stem, read(path)) for path in history(args.history, run.device) if not path.samefile(args.results)
        ]
        audits = {path.stem: read(path) for path in sorted((args.history / "audit").glob("*.json"))}
    except UnusableError as problem:
        print(problem, file=sys.stderr)
        return 2
    figures = {draw.__name__: draw(run) for draw in (latency, throughput, memory, speedup)}
    figures["history"] = over_time([*earlier, ("this run", run)])
    figures |= {f"audit-{target}": audit(audited) for target, audited in audits.items()}
    for name, figure in figures.items():
        if figure is None:
            print(f"{name}: the results hold nothing to plot", file=sys.stderr)
        else:
            _save(figure, args.output / f"{name}.png")
            print(args.output / f"{name}.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
