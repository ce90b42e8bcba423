"""Compare two results of the benchmarks or of the audit, and fail on what became worse.

    python -m bench.compare BASE NEW [--plot regression.png]

Cases are aligned by full name. Times count in multiples of the run's yardsticks: of the copy that took turns with the
case, or of all copies and layer_norms of the run, whichever changed less; a busy moment moves one of them, a slower
kernel both. They fail where they grew by more than max(5 %, 3·IQR) on a GPU, by more than 25 % on a CPU, if they are
this project's; a CPU's lesser changes are only reported. Counted figures fail on any increase: bytes; of the audit
stack, loads, stores, instructions and special functions an element, narrower accesses, and registers past 128, which
leave a multiprocessor 16 warps. Exit code 1 on a failure, 2 where there is nothing to compare.
"""

from __future__ import annotations

import argparse
import functools
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path

from bench import plot
from bench.results import OWN, YARDSTICKS, Run, UnusableError, read

LEAST, OF_IQR, CPU = 0.05, 3, 0.25
BYTES = ("bytes", "kernel_bytes", "saved_bytes", "peak_bytes")
COUNTED = ("stack", "loads", "stores", "instructions", "special")
WIDTHS = ("load_bits", "store_bits")
REGISTERS = 128


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


def compare(base: Run, new: Run) -> list[Change]:
    """Changes of every figure of the cases that both have, the worst first. UnusableError where there are none."""
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
    return sorted(found, key=lambda change: (change.failed, change.worse - change.limit), reverse=True)


def _yardstick(base: Run, new: Run, common: list[str]) -> float:
    """How many times as long the yardsticks took in the new run."""
    names = [name for name in common if new.rows[name]["provider"] in YARDSTICKS]
    times = [new.rows[name]["seconds"]["p50"] / base.rows[name]["seconds"]["p50"] for name in names]
    return statistics.median(times) if times else 1.0


def _speed(yardstick: float, name: str, base: dict, new: dict) -> list[Change]:
    if new["provider"] == "copy":
        return []
    before, after = base["of_copy"], new["of_copy"]
    on_cpu = "peak_bytes" not in new
    limit = CPU if on_cpu else max(LEAST, OF_IQR * max(one["iqr"] / one["p50"] for one in (before, after)))
    judged = new["provider"] in OWN
    seconds = [one["seconds"]["p50"] for one in (base, new)]
    worse = min(after["p50"] / before["p50"], seconds[1] / seconds[0] / yardstick) - 1
    return [
        Change(name, "time", *seconds, worse, limit, judged),
        *(_counted(name, figure, base, new, judged) for figure in BYTES if figure in base and figure in new),
    ]


def _audit(name: str, base: dict, new: dict) -> list[Change]:
    narrower = [Change(name, key, base[key], new[key], (base[key] - new[key]) / (base[key] or 1)) for key in WIDTHS]
    registers = _counted(name, "registers", base, new, new["registers"] > REGISTERS)
    return [registers, *narrower, *(_counted(name, key, base, new) for key in COUNTED)]


def _counted(name: str, key: str, base: dict, new: dict, judged: bool = True) -> Change:
    return Change(name, key, base[key], new[key], (new[key] - base[key]) / (base[key] or 1), judged=judged)


def table(changes: list[Change], base: Run, new: Run) -> str:
    """Every change that failed, and those past what noise explains; how many did not."""
    lines = [f"base: {base.title}", f"new:  {new.title}", ""]
    shown = [one for one in changes if one.worse > min(one.limit, LEAST) or one.improved]
    width = max((len(_short(one.name)) for one in shown), default=0)
    for one in shown:
        verdict = "FAILED" if one.failed else "worse" if one.worse > 0 else "better"
        lines.append(
            f"{_short(one.name):{width}}  {one.figure:12} {one.base:12.6g} -> {one.new:12.6g}  "
            f"{100 * one.worse:+8.1f} % (limit {100 * one.limit:.0f} %)  {verdict}"
        )
    for which, here, there in (("missing", base.rows, new.rows), ("new", new.rows, base.rows)):
        if names := [name for name in here if name not in there]:
            lines.append(f"{len(names)} cases {which}: {', '.join(map(_short, names[:5]))}{', …' * (len(names) > 5)}")
    cases = len({one.name for one in changes})
    failed = sum(one.failed for one in changes)
    lines.append(f"{cases} cases, {len(changes)} figures: {failed} failed, {len(changes) - len(shown)} unchanged")
    return "\n".join(lines)


def _short(name: str) -> str:
    """A case without the test that it is of."""
    return name.partition("[")[2].rstrip("]") or name


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("base", type=Path)
    parser.add_argument("new", type=Path)
    parser.add_argument("--plot", type=Path, default=Path("regression.png"), help="where the plot goes")
    args = parser.parse_args(arguments)
    try:
        base, new = read(args.base), read(args.new)
        changes = compare(base, new)
    except UnusableError as problem:
        print(problem, file=sys.stderr)
        return 2
    print(table(changes, base, new))
    plot.regression(changes, f"{args.new.name} against {args.base.name}\n{new.title}", args.plot)
    return 1 if any(change.failed for change in changes) else 0


if __name__ == "__main__":
    sys.exit(main())
