"""Run the tests on several pairs of torch and Triton, each in an environment of its own, and keep what each found.

    python tests/matrix.py                     # all pairs, into bench/history/matrix.json: an hour of two idle cores;
                                               README has the table that it prints at last
    python tests/matrix.py --only oldest       # this one anew, beside what the file holds of the others

Environments stand in build/matrix, some 6 GB each where a build of torch for GPUs is what pip finds. What is no part of
a pair is pinned as ever. Code 1: a test failed, or a part of them ran none.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import subprocess
import sys
import time
import venv
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parents[1]
KEPT = ROOT / "bench" / "history" / "matrix.json"
PARTS = ("test-daam", "test-others", "test-emulated-sample", *(f"test-interpreted-{shard}" for shard in range(4)))
# What pip is asked for. Its newest pair is what torch itself asks for.
PAIRS = {
    "oldest": ("torch==2.11.0", "triton==3.6.0", "numpy<2.4"),  # its interpreter needs the older NumPy
    "pinned": (),
    "newest": ("torch", "triton"),
}
VERSIONS = "import json, numpy, torch, triton; print(json.dumps([m.__version__ for m in (torch, triton, numpy)]))"


def install(name: str, folder: Path) -> Path:
    """Make the environment of a pair, and return the file that says so, as the Makefile's INSTALLED does."""
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    of_pair = {re.match(r"\w+", requirement)[0] for requirement in PAIRS[name]}
    pins = folder / "constraints.txt"
    venv.create(folder, with_pip=True, clear=True)
    pins.write_text("\n".join(line for line in lines if re.match(r"#?[\w-]*", line)[0] not in of_pair))
    asked = ["--no-compile", "--constraint", str(pins), "--editable", ".[test]", *PAIRS[name]]
    subprocess.run([folder / "bin" / "python", "-m", "pip", "install", "--quiet", *asked], cwd=ROOT, check=True)
    installed = folder / "installed"
    installed.touch()
    return installed


def run_parts(folder: Path, installed: Path, log: Path) -> None:
    """Run the parts of `make test` in an environment, to the end whatever fails, into a log."""
    command = ["make", "--keep-going", "--jobs=2", "--output-sync=target"]
    command += [*PARTS, f"BIN={folder / 'bin'}", f"INSTALLED={installed}"]
    environment = {**os.environ, "OMP_WAIT_POLICY": "passive"}  # as of `make test`
    with log.open("w") as file:
        subprocess.run(command, cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT)


def read_log(text: str) -> dict:
    """Return how many tests passed, failed and were skipped in a log of pytest, in how many runs, and which failed."""
    found = {"passed": 0, "failed": 0, "skipped": 0, "runs": 0}
    for line in re.findall(r"^.* in [\d.]+s(?: \([\d:]+\))?$", text, re.MULTILINE):
        counts = {word: int(number) for number, word in re.findall(r"(\d+) (passed|failed|skipped|errors?)\b", line)}
        found["runs"] += bool(counts)
        for word, number in counts.items():
            found["failed" if word.startswith("error") else word] += number
    return found | {"failures": sorted(set(re.findall(r"^(?:FAILED|ERROR) (\S+)", text, re.MULTILINE)))}


def measure(name: str, folder: Path) -> dict:
    """Return what the tests found on a pair: versions, the commit, seconds, counts of tests, failures."""
    installed = install(name, folder)
    done = subprocess.run([folder / "bin" / "python", "-c", VERSIONS], capture_output=True, text=True, check=True)
    command = ["git", "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout.strip()
    began, log = time.time(), folder.with_suffix(".log")
    run_parts(folder, installed, log)
    about = dict(zip(("torch", "triton", "numpy"), json.loads(done.stdout), strict=True))
    about |= {"python": platform.python_version(), "commit": commit, "seconds": round(time.time() - began)}
    counts = read_log(log.read_text())
    counts["failed"] += len(PARTS) - counts["runs"]  # a part that ran nothing
    return about | counts


def write_table(results: dict[str, dict]) -> str:
    """Return README's table of results, by pair."""
    lines = ["| torch | Triton | NumPy | tests passed | failed |", "|---|---|---|---|---|"]
    for result in results.values():
        versions = [result[package].partition("+")[0] for package in ("torch", "triton", "numpy")]
        lines.append("| " + " | ".join([*versions, f"{result['passed']:,}", str(result["failed"])]) + " |")
    return "\n".join(lines)


def is_green(result: dict) -> bool:
    """Tell whether no test failed, and every part ran some."""
    return not result["failed"] and not result["failures"] and result["runs"] == len(PARTS)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", action="append", choices=list(PAIRS), help="a pair; may be repeated")
    parser.add_argument("--output", type=Path, default=KEPT, help="file of the results")
    options = parser.parse_args(arguments)
    results = json.loads(options.output.read_text()) if options.output.exists() else {}
    names = options.only or list(PAIRS)
    for name in names:
        result = results[name] = measure(name, ROOT / "build" / "matrix" / name)
        print(f"{name}: " + ", ".join(f"{key} {value}" for key, value in result.items()), flush=True)
    # at last: a test holds README against the file, on every pair
    results = {key: results[key] for key in PAIRS if key in results}
    options.output.write_text(json.dumps(results, indent=1) + "\n")
    print(write_table(results))
    return int(not all(is_green(results[name]) for name in names))


if __name__ == "__main__":
    sys.exit(main())
