"""Tell how close to their bounds the accuracy tests come, under all that CPUs differ in.

    python tests/margins.py                                        # the accuracy tests
    python tests/margins.py tests/daam/test_extremes.py -k gate    # what pytest is told, with TRITON_INTERPRET as it is
    python tests/margins.py --only avx2-1 --only avx512-2

Vector units, and how many threads share a sum, decide in which order numbers are added and which exp is called: errors
of float32 differ by that. A test that one of them brings near its bound fails on a CPU that nobody has tried. Every
configuration runs in processes of its own. Code 1: a test failed, or an error takes more than 75 % of its bound.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parents[1]
MOST = 0.75  # of a bound: a quarter is left for CPUs whose units none of these is
CLOSEST = 10
LEVELS = ("default", "avx2", "avx512")
THREADS = (1, 2)
# As torch, oneDNN and MKL name these levels. NumPy, with which the interpreter computes, is told what to leave out.
VARIABLES = {
    "ATEN_CPU_CAPABILITY": LEVELS,
    "ONEDNN_MAX_CPU_ISA": ("SSE41", "AVX2", "AVX512_CORE"),
    "MKL_ENABLE_INSTRUCTIONS": ("SSE4_2", "AVX2", "AVX512"),
}
ABOVE = {"default": ("",), "avx2": ("AVX512", "X86_V4"), "avx512": ()}  # beginnings of its names

COMPILED = "not kernel and not emulated and not audit and not long and not slow and not gpu"
# Those against float64 to 1e-11 take most of the time and none of the bounds: fp32 and less is what can come close.
CLOSE = (
    "errors_are_those_of_eager",
    "large_mean",
    "test_extremes",
    "nan_and_inf",
    "train_as",
    "fullgraph",
    "dynamic_shapes",
    "published",
)


def measuring() -> list[str]:
    """Return the test files that judge an error, as pytest takes them."""
    found = [path for path in sorted((ROOT / "tests").rglob("test_*.py")) if path.stem != "test_margins"]
    return [str(path) for path in found if any(name in path.read_text() for name in ("within(", "close("))]


def configurations() -> dict[str, dict[str, str]]:
    """Return the environment of every configuration that this machine can run, by name: {level}-{threads}."""
    import torch
    from numpy._core import _multiarray_umath as units

    best = torch.backends.cpu.get_cpu_capability().lower()
    levels = LEVELS[: LEVELS.index(best) + 1] if best in LEVELS else LEVELS[:1]
    found = {}
    for level in levels:
        disabled = [
            name for name in units.__cpu_dispatch__ if units.__cpu_features__[name] and name.startswith(ABOVE[level])
        ]
        knobs = {name: values[LEVELS.index(level)] for name, values in VARIABLES.items()}
        knobs |= {"NPY_DISABLE_CPU_FEATURES": " ".join(disabled)} if disabled else {}
        for threads in THREADS:
            found[f"{level}-{threads}"] = {**knobs, "OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
    return found


def commands(arguments: Sequence[str]) -> list[tuple[dict[str, str], list[str]]]:
    """Return (environment, pytest's arguments) of what a configuration runs: the accuracy tests if none are given."""
    if arguments:
        return [({}, list(arguments))]
    files = measuring()
    return [
        ({"TRITON_INTERPRET": "0"}, ["-m", COMPILED, *files]),
        ({"TRITON_INTERPRET": "1"}, ["-m", "kernel and not long and not slow", "-k", " or ".join(CLOSE), *files]),
    ]


def measure(environment: dict[str, str], arguments: Sequence[str], path: Path) -> list[str]:
    """Run the tests in an environment, their lines into path, and return the commands that failed."""
    path.unlink(missing_ok=True)
    failed = []
    for knobs, options in commands(arguments):
        command = [sys.executable, "-m", "pytest", "-q", "--no-header", *options]
        done = subprocess.run(command, cwd=ROOT, env={**os.environ, **environment, **knobs, "DAAM_MARGINS": str(path)})
        if done.returncode:
            failed.append(f"{path.stem}: pytest ended with {done.returncode}: {' '.join(options)}")
    return failed


def report(paths: Sequence[Path], failed: Sequence[str] = ()) -> tuple[str, int]:
    """Return the closest calls of files of lines, each with its worst configuration, and the code to end with."""
    worst = {}
    for path in paths:
        for line in path.read_text().splitlines() if path.exists() else ():
            entry = json.loads(line) | {"configuration": path.stem}
            key = entry["test"], entry["what"]
            if key not in worst or entry["share"] > worst[key]["share"]:
                worst[key] = entry
    found = sorted(worst.values(), key=lambda entry: -entry["share"])
    over = [entry for entry in found if entry["share"] > MOST]
    text = [
        f"{entry['share']:8.3f}  {entry['error']:.2e} of {entry['bound']:.2e}  {entry['configuration']:9}"
        f" {entry['what']}  {entry['test']}"
        for entry in found[: max(CLOSEST, len(over))]
    ]
    text += [f"{len(found)} errors judged, {len(over)} above {MOST} of their bounds", *failed]
    return "\n".join(text), int(bool(over or failed or not found))


def main(arguments: Sequence[str] | None = None) -> int:
    names = configurations()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", action="append", choices=list(names), help="a configuration; may be repeated")
    parser.add_argument("--output", type=Path, default=ROOT / "build" / "margins", help="folder of the errors found")
    options, options_of_pytest = parser.parse_known_args(arguments)
    options.output.mkdir(parents=True, exist_ok=True)
    paths, failed = [], []
    for name in options.only or names:
        print(f"== {name}", flush=True)
        paths.append((options.output / f"{name}.jsonl").absolute())
        failed += measure(names[name], options_of_pytest, paths[-1])
    text, code = report(paths, failed)
    print(text)
    return code


if __name__ == "__main__":
    sys.exit(main())
