"""Compare two results of the benchmarks or of the audit, and fail on what became worse.

    python -m bench.compare BASE NEW [--plot regression.png]

Cases are aligned by full name. Times count in multiples of the copy that took turns with the case, and fail where they
grew by more than max(5 %, 3·IQR of base) on a GPU, by more than 25 % on a CPU or of the host, if they are this
project's. The latter must also have grown so much in multiples of all copies and layer_norms of the run: a busy moment
moves one of the two, slower code both. Lesser changes are only reported. Counted figures fail on any increase: bytes;
of the audit stack, shared memory, loads, stores, instructions and special functions an element, narrower accesses,
shorter runs, a smaller share of a copy, registers past 128 and warps below 16. So does a case of ours that is missing,
and any case with a figure that is none: missing, infinite, negative, not a number, or a time of 0. Exit code 1 on a
failure, 2 where there is nothing to compare.
"""

from __future__ import annotations

import argparse
import functools
import math
import statistics
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from bench import plot
from bench.results import LEAST, OWN, YARDSTICKS, Change, Run, UnusableError, read, short

OF_IQR, CPU = 3, 0.25
BYTES = ("bytes", "kernel_bytes", "saved_bytes", "peak_bytes")
COUNTED = ("stack", "shared", "loads", "stores", "instructions", "special")
WIDTHS = ("load_bits", "store_bits")
REGISTERS, WARPS = 128, 16
# what a case must tell
TIMES = ("seconds.p50", "of_copy.p50")
AUDITED = ("registers", *WIDTHS, *COUNTED)


def compare(base: Run, new: Run, whole: bool = True, files: tuple[str, str] = ("base", "new")) -> list[Change]:
    """Return the changes of every figure of the cases that both runs have, the worst first.

    Args:
        whole: whether cases that new lacks are changes too.
        files: what base and new are called where a case is unusable.

    Raises:
        UnusableError: the runs differ in kind, device or compiler, or have no case in common.
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
    found = [*_unusable(base, common, files[0]), *_unusable(new, new.rows, files[1])]
    unusable = {change.name for change in found}
    common = [name for name in common if name not in unusable]
    if base.kind == "speed":
        yardstick = _yardstick(base, new, common)
        compare_case = functools.partial(_speed, yardstick)
    else:
        compare_case = _audit
    for name in common:
        found += compare_case(name, base.rows[name], new.rows[name])
    if whole:
        missing = [name for name in base.rows if name not in new.rows]
        found += [Change(name, "missing", 1, 0, 1, judged=_ours(base.rows[name])) for name in missing]
    return sorted(found, key=lambda change: (change.failed, change.worse - change.limit), reverse=True)


def _unusable(run: Run, names: Iterable[str], file: str) -> list[Change]:
    """Return a failure for every named case that holds a figure that is none, whoever's it is: such figures compare as
    neither better nor worse, and other figures of a file that has them are not to be trusted.
    """
    found = []
    for name in names:
        if faults := list(_faults(run.kind, run.rows[name])):
            more = f", and {len(faults) - 1} more" if len(faults) > 1 else ""
            found.append(Change(name, "unusable", math.nan, math.nan, math.inf, why=f"in {file}: {faults[0]}{more}"))
    return found


def _faults(kind: str, case: Any) -> Iterator[str]:
    """Yield in words what is wrong with the figures of a case, of a run of a kind."""
    if not isinstance(case, dict):
        yield f"the case is {case!r}, expected its figures by name"
        return
    figures = _flat(case)
    required = TIMES if kind == "speed" else AUDITED
    figures = {name: figures[name] for name in required if name in figures} | figures  # what is judged by comes first
    for name in required:
        whole = name.partition(".")[0]
        if name not in figures:
            yield f"{name} is missing" + (f", {whole} is {figures[whole]!r}" if whole in figures else "")
    for name, value in figures.items():
        if name in TIMES and not (_is_finite(value) and value > 0):
            yield f"{name} is {value!r}, expected a finite number above 0"
        elif _is_counted(name, value, required) and not (_is_finite(value) and value >= 0):
            yield f"{name} is {value!r}, expected a finite number, 0 or more"
        elif isinstance(value, float) and not math.isfinite(value):
            yield f"{name} is {value!r}, expected a finite number"


def _flat(case: dict[str, Any]) -> dict[str, Any]:
    """Return the figures of a case by name, those in its dicts by names like seconds.p50."""
    flat = {}
    for name, value in case.items():
        if isinstance(value, dict):
            flat |= {f"{name}.{key}": figure for key, figure in value.items()}
        else:
            flat[name] = value
    return flat


def _is_counted(name: str, value: Any, required: tuple[str, ...]) -> bool:
    """Tell whether a figure is one of those that count something or spread about a time, and so must be 0 or more."""
    if name == "warps":
        return value is not None  # as gfx942's are
    return name in required or name in BYTES or name.partition(".")[0] in ("seconds", "of_copy")


def _is_finite(value: Any) -> bool:
    """Tell whether a value is a finite number that a float can hold."""
    try:
        return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:  # an int of hundreds of digits
        return False


def _yardstick(base: Run, new: Run, common: list[str]) -> float:
    """Return how many times as long layer_norms and copies took in the new run, by the median of the common cases."""
    names = [name for name in common if new.rows[name].get("provider") in YARDSTICKS]
    times = [new.rows[name]["seconds"]["p50"] / base.rows[name]["seconds"]["p50"] for name in names]
    yardstick = statistics.median(times) if times else 1.0
    if not 0 < yardstick < math.inf:
        raise UnusableError(f"layer_norms and copies took {yardstick} times as long")
    return yardstick


def _ours(case: dict) -> bool:
    """Tell whether a case, which may be of an audit, is this project's; one that names no provider is."""
    return not isinstance(case, dict) or case.get("provider", OWN[0]) in OWN


def _speed(yardstick: float, name: str, base: dict, new: dict) -> list[Change]:
    """Return the changes of a timed case; yardstick: how many times as long the yardsticks took."""
    if new.get("provider") == "copy":
        return []
    before, after, judged = base["of_copy"], new["of_copy"], _ours(new)
    seconds = [case["seconds"]["p50"] for case in (base, new)]
    # an erratic new run does not raise its own limit
    worse, limit = after["p50"] / before["p50"], max(LEAST, OF_IQR * before.get("iqr", 0) / before["p50"])
    if "peak_bytes" not in new:  # on a CPU, or of the host
        worse, limit = min(worse, seconds[1] / seconds[0] / yardstick), CPU
    return [
        Change(name, "time", *seconds, worse - 1, limit, judged),
        *(_counted(name, figure, base, new, judged) for figure in BYTES if figure in base),
    ]


def _audit(name: str, base: dict, new: dict) -> list[Change]:
    """Return the changes of an audited kernel."""
    base, new = (case | {"warps": case.get("warps") or 0} for case in (base, new))  # 0 where the compiler does not tell
    fewer = [_fewer(name, key, base, new) for key in WIDTHS]
    fewer.append(_fewer(name, "warps", base, new, new["warps"] < WARPS))
    fewer += [_fewer(name, key, base, new) for key in ("run", "share") if base.get(key) and new.get(key)]
    registers = _counted(name, "registers", base, new, new["registers"] > REGISTERS)
    return [registers, *fewer, *(_counted(name, key, base, new) for key in COUNTED)]


def _fewer(name: str, key: str, base: dict, new: dict, judged: bool = True) -> Change:
    """Return the change of a figure of which less is worse."""
    return Change(name, key, base[key], new[key], (base[key] - new[key]) / (base[key] or 1), judged=judged)


def _counted(name: str, key: str, base: dict, new: dict, judged: bool = True) -> Change:
    """Return the change of a figure of which more is worse."""
    after = new.get(key, math.inf)  # what is no longer counted has not become better
    return Change(name, key, base[key], after, (after - base[key]) / (base[key] or 1), judged=judged)


def table(changes: list[Change], base: Run, new: Run) -> str:
    """Return as text every change that failed or is past what noise explains, and how many there are of each kind."""
    lines = [f"base: {base.title}", f"new:  {new.title}", ""]
    shown = [change for change in changes if change.worse > min(change.limit, LEAST) or change.improved]
    width = max((len(short(change.name)) for change in shown), default=0)
    for change in shown:
        verdict = "worse" if change.worse > 0 else "better"
        if change.failed:
            verdict = "FAILED"
        if change.why:
            lines.append(f"{short(change.name):{width}}  {change.figure:12} {change.why}  {verdict}")
            continue
        lines.append(
            f"{short(change.name):{width}}  {change.figure:12} {change.base:12.6g} -> {change.new:12.6g}  "
            f"{100 * change.worse:+8.1f} % (limit {100 * change.limit:.0f} %)  {verdict}"
        )
    for kind, names in (("missing", set(base.rows) - set(new.rows)), ("new", set(new.rows) - set(base.rows))):
        if names:
            lines.append(f"{len(names)} cases {kind}")
    cases = len({change.name for change in changes})
    failed = sum(change.failed for change in changes)
    lines.append(f"{cases} cases, {len(changes)} figures: {failed} failed, {len(changes) - len(shown)} unchanged")
    return "\n".join(lines)


def _read(path: Path) -> Run:
    """Return the run that a result file holds; raise an UnusableError where it holds none: JSON may be anything."""
    try:
        run = read(path)
    except (AttributeError, KeyError, TypeError, RecursionError) as error:
        raise UnusableError(f"{path} holds no cases of this suite: {type(error).__name__}: {error}") from error
    if not all(isinstance(name, str) for name in run.rows):
        raise UnusableError(f"{path} holds no cases of this suite: their names are no text")
    return run


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; return 1 where a change failed, 2 where there is nothing to compare."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("base", type=Path)
    parser.add_argument("new", type=Path)
    parser.add_argument("--subset", action="store_true", help="new is a choice of cases: what it lacks does not fail")
    parser.add_argument("--plot", type=Path, default=Path("regression.png"), help="where the plot goes")
    args = parser.parse_args(arguments)
    try:
        base, new = _read(args.base), _read(args.new)
        changes = compare(base, new, not args.subset, (str(args.base), str(args.new)))
    except UnusableError as problem:
        print(problem, file=sys.stderr)
        return 2
    print(table(changes, base, new))
    shown = [change for change in changes if math.isfinite(change.worse)]  # the others have no place on an axis
    plot.regression(shown, f"{args.new.name} against {args.base.name}\n{new.title}", args.plot)
    return 1 if any(change.failed for change in changes) else 0


if __name__ == "__main__":
    sys.exit(main())
