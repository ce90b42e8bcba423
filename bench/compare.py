"""Compare two results of the benchmarks or of the audit, and fail on what became worse.

    python -m bench.compare BASE NEW [--plot regression.png]

Cases are aligned by full name. Times count in multiples of the copy that took turns with the case, and fail where they
grew by more than max(5 %, 3·IQR of base) on a GPU, by more than 25 % on a CPU or of the host, if they are this
project's. The latter must also have grown so much in multiples of all copies and layer_norms of the run: a busy moment
moves one of the two, slower code both. Lesser changes are only reported. Counted figures fail on any increase: bytes;
of the audit stack, shared memory, loads, stores, instructions and special functions an element, narrower accesses,
registers past 128 and warps below 16. So does a case of ours that is missing. Exit code 1 on a failure, 2 where there
is nothing to compare.
"""

from __future__ import annotations

import argparse
import functools
import math
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path

from bench import plot
from bench.results import OWN, YARDSTICKS, Run, UnusableError, read, short

LEAST, OF_IQR, CPU = 0.05, 3, 0.25
BYTES = ("bytes", "kernel_bytes", "saved_bytes", "peak_bytes")
COUNTED = ("stack", "shared", "loads", "stores", "instructions", "special")
WIDTHS = ("load_bits", "store_bits")
REGISTERS, WARPS = 128, 16


@dataclass(frozen=True)
class Change:
    """One figure of one case. worse: by how much, relative to base unless that is 0. limit: what it may be."""

    name: str
    figure: str
    base: float
    new: float
    worse: float
    limit: float = 0.0
    judged: bool = True

    @property
    def failed(self) -> bool:
        return self.judged and self.worse > self.limit

    @property
    def improved(self) -> bool:
        return -self.worse > max(self.limit, LEAST if self.figure == "time" else 0)


def compare(base: Run, new: Run, whole: bool = True) -> list[Change]:
    """Changes of every figure of the cases that both have, the worst first. whole: what new lacks is a change too.
    UnusableError where nothing is in both.
    """
    if base.kind != new.kind:
        raise UnusableError(f"one is the result of the {base.kind}, the other of the {new.kind}")
    if base.kind == "speed" and base.device != new.device:
        raise UnusableError(f"devices differ: {base.device} and {new.device}")
    if base.kind == "audit" and base.versions != new.versions:
        raise UnusableError(f"compilers differ: triton {base.versions['triton']} and {new.versions['triton']}")
    common = [name for name in base.rows if name in new.rows]
    if not common:
        raise UnusableError("no case is in both")
    changes = functools.partial(_speed, _yardstick(base, new, common)) if base.kind == "speed" else _audit
    found = [change for name in common for change in changes(name, base.rows[name], new.rows[name])]
    gone = (name for name in base.rows if name not in new.rows) if whole else ()
    found += [Change(name, "missing", 1, 0, 1, judged=_ours(base.rows[name])) for name in gone]
    return sorted(found, key=lambda change: (change.failed, change.worse - change.limit), reverse=True)


def _yardstick(base: Run, new: Run, common: list[str]) -> float:
    """How many times as long the yardsticks took in the new run."""
    names = [name for name in common if new.rows[name]["provider"] in YARDSTICKS]
    times = [new.rows[name]["seconds"]["p50"] / base.rows[name]["seconds"]["p50"] for name in names]
    return statistics.median(times) if times else 1.0


def _ours(case: dict) -> bool:
    """Whether a case, which may be of an audit, is this project's."""
    return case.get("provider", OWN[0]) in OWN


def _speed(yardstick: float, name: str, base: dict, new: dict) -> list[Change]:
    if new["provider"] == "copy":
        return []
    before, after, judged = base["of_copy"], new["of_copy"], _ours(new)
    seconds = [one["seconds"]["p50"] for one in (base, new)]
    # an erratic new run does not raise its own limit
    worse, limit = after["p50"] / before["p50"], max(LEAST, OF_IQR * before["iqr"] / before["p50"])
    if "peak_bytes" not in new:  # on a CPU, or of the host
        worse, limit = min(worse, seconds[1] / seconds[0] / yardstick), CPU
    return [
        Change(name, "time", *seconds, worse - 1, limit, judged),
        *(_counted(name, figure, base, new, judged) for figure in BYTES if figure in base),
    ]


def _audit(name: str, base: dict, new: dict) -> list[Change]:
    fewer = [_fewer(name, key, base, new) for key in WIDTHS]
    if base["warps"] is not None:
        fewer.append(_fewer(name, "warps", base, new, new["warps"] < WARPS))
    registers = _counted(name, "registers", base, new, new["registers"] > REGISTERS)
    return [registers, *fewer, *(_counted(name, key, base, new) for key in COUNTED)]


def _fewer(name: str, key: str, base: dict, new: dict, judged: bool = True) -> Change:
    return Change(name, key, base[key], new[key], (base[key] - new[key]) / (base[key] or 1), judged=judged)


def _counted(name: str, key: str, base: dict, new: dict, judged: bool = True) -> Change:
    after = new.get(key, math.inf)  # what is no longer counted has not become better
    return Change(name, key, base[key], after, (after - base[key]) / (base[key] or 1), judged=judged)


def table(changes: list[Change], base: Run, new: Run) -> str:
    """Every change that failed, and those past what noise explains; how many did not."""
    lines = [f"base: {base.title}", f"new:  {new.title}", ""]
    shown = [one for one in changes if one.worse > min(one.limit, LEAST) or one.improved]
    width = max((len(short(one.name)) for one in shown), default=0)
    for one in shown:
        verdict = "FAILED" if one.failed else "worse" if one.worse > 0 else "better"
        lines.append(
            f"{short(one.name):{width}}  {one.figure:12} {one.base:12.6g} -> {one.new:12.6g}  "
            f"{100 * one.worse:+8.1f} % (limit {100 * one.limit:.0f} %)  {verdict}"
        )
    for which, here, there in (("missing", base.rows, new.rows), ("new", new.rows, base.rows)):
        if count := len(set(here) - set(there)):
            lines.append(f"{count} cases {which}")
    cases = len({one.name for one in changes})
    failed = sum(one.failed for one in changes)
    lines.append(f"{cases} cases, {len(changes)} figures: {failed} failed, {len(changes) - len(shown)} unchanged")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("base", type=Path)
    parser.add_argument("new", type=Path)
    parser.add_argument("--subset", action="store_true", help="new is a choice of cases: what it lacks does not fail")
    parser.add_argument("--plot", type=Path, default=Path("regression.png"), help="where the plot goes")
    args = parser.parse_args(arguments)
    try:
        base, new = read(args.base), read(args.new)
        changes = compare(base, new, not args.subset)
    except UnusableError as problem:
        print(problem, file=sys.stderr)
        return 2
    print(table(changes, base, new))
    plot.regression(changes, f"{args.new.name} against {args.base.name}\n{new.title}", args.plot)
    return 1 if any(change.failed for change in changes) else 0


if __name__ == "__main__":
    sys.exit(main())
