"""What `bench.numerics` found: whether our claims hold of it, tables and a picture.

A kernel's error is within the rule of the tests, 2·(eager's error + 2·eps·M) (`helpers.bound`, of one draw); emulated,
where instructions are as wrong as documented, within twice that. Kernels and the eager backend, compiled too, are
finite wherever the exact value is.
"""

from __future__ import annotations

import json
import math
import os
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import fields
from pathlib import Path
from unittest import mock

from bench.device.cases import helpers
from bench.numerics_points import DTYPES, FACTORS, Point

RULES = {"interpreted": 1.0, "emulated": 2.0}  # kernels, and how many times the bound they may take
FINITE = ("eager", "compile", *RULES)
# What does not hold: algorithm, c, and the largest error of a kernel there. Why stands in bench/history/README.md.
KNOWN = {("gate", 1e-3): 3e-5, ("gate", 1e3): 8e-7, ("stable", 1e-3): 3e-5}
COLOURS = {
    "published": "tab:purple", "eager": "tab:blue", "compile": "tab:green", "interpreted": "tab:red",
    "emulated": "tab:orange",
}  # fmt: skip
LIKE_X = ("y", "weights", "dx")


def read(path: Path) -> list[dict]:
    """Return the records of a file."""
    return json.loads(path.read_text())["points"]


def write(path: Path, records: Sequence[dict], versions: dict[str, str]) -> None:
    """Write records to a file, a line each."""
    lines = ",\n".join(map(json.dumps, records))
    path.write_text(f'{{"versions": {json.dumps(versions)}, "points": [\n{lines}\n]}}\n')


def point_of(record: dict) -> Point:
    """Return the point that a record is of."""
    return Point(**{each.name: record.get(each.name, each.default) for each in fields(Point)})


def compared(record: dict) -> Iterator[tuple[str, str, float, float, float]]:
    """Yield (provider, result, its error, eager's, the share of what it may have) of kernels; NaN where not finite."""
    point, errors = point_of(record), record["errors"]
    case, dtype = point.case, DTYPES[point.dtype]
    for provider in RULES.keys() & errors.keys() if "eager" in errors else ():
        with mock.patch.dict(os.environ, TRITON_INTERPRET=str(int(provider == "interpreted"))):
            for name, error in errors[provider].items():
                error, eager = (math.nan if e is None else e for e in (error, errors["eager"].get(name)))
                bound = RULES[provider] * helpers.bound(case, name, dtype, eager, point.draws)
                yield provider, name, error, eager, error / bound


def find_faults(records: Iterable[dict], known: dict[tuple[str, float], float] = KNOWN) -> list[str]:
    """Return a line a claim that does not hold and is not known to."""
    found = []
    for record in records:
        point = point_of(record)
        for provider in FINITE:
            missing = [name for name, error in record["errors"].get(provider, {}).items() if error is None]
            found += [f"{provider}: {name} is not finite at {point}" for name in missing]
        for provider, name, error, eager, share in compared(record):
            if share > 1 and not error <= known.get((point.algorithm, point.c), 0.0):
                found.append(f"{provider}: {name} has {error:.1e}, eager {eager:.1e}, {share:.2f} of it, at {point}")
    return found


def tables(records: Sequence[dict]) -> str:
    """Return all tables."""
    return "\n\n".join((claims_table(records), means_table(records)))


def _row(*cells: object) -> str:
    """Return a row of a table."""
    return f"| {' | '.join(map(str, cells))} |"


def _head(*titles: str) -> list[str]:
    """Return the head of a table."""
    return [_row(*titles), _row(*["---"] * len(titles))]


def _worst(errors: Sequence[float | None]) -> str:
    """Return the largest of errors, and how many are none since results are not finite."""
    finite, lost = [error for error in errors if error is not None], sum(error is None for error in errors)
    text = f"{max(finite):.1e}" if finite else ""
    return f"{text}, {lost} not finite" if lost else text


def claims_table(records: Sequence[dict]) -> str:
    """Return a table of every algorithm and dtype: the largest errors of y, weights and dx, the largest share of what
    kernels may have, and how many of their errors are more than twice eager's, with the largest of those.
    """
    providers = "eager", "compile", "interpreted", "emulated", "published"
    lines = _head("algorithm", "dtype", *providers, "share of the bound", "more than twice eager's", "largest of these")
    groups = defaultdict(list)
    for record in records:
        groups[record["algorithm"], record["dtype"]].append(record)
    for key, group in groups.items():
        found = [record["errors"] for record in group]
        worst = [_worst([e for errors in found for name, e in errors.get(p, {}).items() if name in LIKE_X])
                 for p in providers]  # fmt: skip
        pairs = [pair for record in group for pair in compared(record)]
        doubled = [error for _, _, error, eager, _ in pairs if error > 2 * eager]
        share = f"{max((share for *_, share in pairs), default=0.0):.2f}"
        lines.append(_row(*key, *worst, share, f"{len(doubled)} of {len(pairs)}", _worst(doubled)))
    return "\n".join(lines)


def means_table(records: Sequence[dict]) -> str:
    """Return a table of the errors of y in fp32 against the mean of x, whose spread is 1: ours and published."""
    algorithms, providers = ("density", "mixture"), ("published", "eager", "interpreted")
    lines = _head("mean", *[f"{algorithm}, {provider}" for algorithm in algorithms for provider in providers])
    found = {(r["mean"], r["algorithm"]): r for r in records if (r["factor"], r["dtype"]) == ("mean", "float32")}
    for mean in FACTORS["mean"]:
        errors = [found[mean, algorithm]["errors"] for algorithm in algorithms]
        lines.append(_row(f"{mean:,.0f}", *[_worst([one[p]["y"]]) for one in errors for p in providers if p in one]))
    return "\n".join(lines)


def plot(records: Sequence[dict]):
    """Return a picture of the largest error in fp32 of y, weights and dx: a row an algorithm, a column a factor."""
    from matplotlib.figure import Figure

    algorithms = list(dict.fromkeys(record["algorithm"] for record in records))
    size = 2.6 * len(FACTORS), 2.0 * len(algorithms)
    figure = Figure(figsize=size, layout="constrained")
    grid = figure.subplots(len(algorithms), len(FACTORS), squeeze=False, sharey=True)
    for algorithm, row in zip(algorithms, grid, strict=True):
        for factor, axes in zip(FACTORS, row, strict=True):
            of_panel = {"algorithm": algorithm, "factor": factor, "dtype": "float32"}
            _draw(axes, factor, [r for r in records if of_panel.items() <= r.items()])
            axes.set_title(f"{algorithm}, {factor}", fontsize=8)
    figure.suptitle("Largest error of y, weights and dx in fp32; a cross: not finite", fontsize=9)
    lines = {line.get_label(): line for axes in grid.flat for line in axes.get_lines() if line.get_label() in COLOURS}
    figure.legend(handles=lines.values(), loc="outside lower center", ncols=len(COLOURS), fontsize=8)
    return figure


def _draw(axes, factor: str, records: Sequence[dict]) -> None:
    """Draw every provider's errors against a factor."""
    for provider, colour in COLOURS.items():
        found = [(record[factor], record["errors"].get(provider)) for record in records]
        values = [(value, [errors.get(name, 0.0) for name in LIKE_X]) for value, errors in found if errors]
        finite = [(value, max(errors)) for value, errors in values if None not in errors]
        if values:
            axes.plot(*zip(*finite, strict=True), ".-", color=colour, label=provider, linewidth=1, markersize=4)
        if lost := [value for value, errors in values if None in errors]:
            axes.plot(lost, [1.0] * len(lost), "x", color=colour)
    axes.set_yscale("log")
    axes.set_ylim(1e-8, 10)
    axes.set_xscale({"mean": "symlog", "gaussians": "linear"}.get(factor, "log"))
    if factor == "mean":
        axes.set_xlim(left=-0.3)
    axes.tick_params(labelsize=7)
