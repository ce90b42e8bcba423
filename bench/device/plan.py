"""The plan as data, and what runs it: a part after another, each in processes that end by themselves, or are ended."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from bench.device import summary
from bench.device.session import HUNG, LOST, ROOT, Session, describe_error

START = 90  # seconds that a machine takes to start, once for each call
BUDGET = 13 * 60  # seconds that the calls and their starts may take in all, of a quarter of an hour


@dataclass(frozen=True)
class Part:
    """Describe one kind of processes in a call.

    expected: the seconds it should take. deadline, limit: seconds after the call began, when it begins nothing new and
    when it is ended. processes: how many share its jobs.
    """

    name: str
    expected: int
    deadline: int
    limit: int
    processes: int = 1


# Steps follow each other, parts of a step run at once: nothing is timed beside other work. For 16 cores.
PLAN: dict[str, tuple[tuple[Part, ...], ...]] = {
    "first": (
        (Part("info", 15, 30, 45),),
        # without .gpu/ kernels are compiled here, some 900 at half a second: the last cases are not reached
        (Part("correct", 50, 85, 100, 10), Part("bits", 45, 85, 100, 3), Part("warm", 80, 95, 110, 3)),
        (Part("time", 95, 205, 220),),
        (Part("host", 25, 225, 235),),
        (Part("counters", 45, 265, 280),),
    ),
    "second": (
        (Part("correct", 40, 60, 80, 12), Part("bits", 40, 60, 80, 4)),
        (Part("tests", 155, 220, 235, 14),),
        (Part("sweep", 55, 290, 300),),
        (Part("time", 20, 310, 320),),
    ),
    # in place of the times of `first`, where that found results that are wrong
    "third": ((Part("time", 95, 100, 115),),),
    # what the memory of a GPU gives, whatever the kernels are
    "streams": ((Part("streams", 30, 60, 70),),),
    # accesses and races of small cases of every kernel, under NVIDIA's tool
    "sanitizer": ((Part("sanitizer", 150, 240, 270, 8),),),
}
# the tests of the part `tests`, which pytest runs
TESTS = (
    "tests/kernels",
    "tests/hardening/test_determinism.py",
    "tests/hardening/test_memory.py",
    *(f"tests/daam/test_{name}.py" for name in ("extremes", "gpu", "train", "functional", "ops", "published")),
)
CHOSEN = "(kernel or gpu) and not long and not slow"
PATIENCE = 45  # seconds that a process may be at one job on a GPU while others wait for it
# the parts whose jobs --only chooses among; the others are done whole
NAMED = ("time", "sweep", "streams", "sanitizer")


def expected_seconds(call: str) -> int:
    """Return the seconds that a call should take, without the machine's start."""
    return sum(max(part.expected for part in step) for step in PLAN[call])


def latest_end(call: str) -> int:
    """Return the seconds after which a call has ended in any case."""
    return PLAN[call][-1][-1].limit


def format_plan(calls: list[str]) -> str:
    """Return the plan of some calls as text, and what it adds up to."""
    lines = [f"{'':24}expected   deadline      limit  processes"]
    for call in calls:
        for part in (part for step in PLAN[call] for part in step):
            times = "".join(f"{seconds:>9} s" for seconds in (part.expected, part.deadline, part.limit))
            lines.append(f"{call:12}{part.name:10}{times}{part.processes:>11}")
    starts = START * len(calls)
    needed, most = starts + sum(map(expected_seconds, calls)), starts + sum(map(latest_end, calls))
    lines.append(f"with {len(calls)} starts of {START} s: {needed / 60:.1f} minutes, {most / 60:.1f} at most")
    return "\n".join(lines)


def run_call(session: Session) -> bool:
    """Run the parts of a call on the GPU, say of each what it found, and return whether all is well."""
    session = replace(session, began=time.time())
    for step in PLAN[session.call]:
        with ThreadPoolExecutor(len(step)) as pool:
            list(pool.map(partial(try_part, session), step))
    rows = summary.rows_of(session)
    if not rows:
        print(f"{session.call}: nothing was run", flush=True)
    return bool(rows) and not any(map(summary.is_wrong, rows))


def try_part(session: Session, part: Part) -> None:
    """Run a part of a call, and write what kept it from ending: the next part begins all the same."""
    only = session.only if part.name in NAMED else ""
    try:
        run_part(replace(session, only=only), part)
    except Exception as error:
        session.write(part.name, ok=False, error=describe_error(error), trace=traceback.format_exc()[-1500:])
        print(f"{session.call} {part.name}: {describe_error(error)}", flush=True)


def run_part(session: Session, part: Part) -> None:
    """Run a part in its processes, and tell how many cases there were and which were wrong."""
    began = time.time()
    if part.name == "tests" and importlib.util.find_spec("pytest") is None:
        session.write(part.name, skipped="pytest is not installed")
        return
    session = replace(session, until=session.began + part.deadline)
    with ThreadPoolExecutor(part.processes) as pool:
        list(pool.map(partial(run_shard, session, part), range(part.processes)))
    print(summary.summarize(session, part.name, time.time() - began, part.expected), flush=True)


def run_shard(session: Session, part: Part, k: int) -> None:
    """Run the kth share of a part's jobs. Where a process dies of a case, another goes on with the next."""
    first, end = k, session.began + part.limit
    with tempfile.TemporaryDirectory() as folder:
        progress = Path(folder) / "progress"
        while True:
            progress.unlink(missing_ok=True)
            shard = replace(session, shard=(first, part.processes), progress=progress)
            watched = progress if session.device == "cuda" else None
            code = wait(command(shard, part.name), session.out / "log.txt", end, watched)
            finished = [0]
            if part.name == "tests":  # 1: some failed, and have said so
                finished.append(1)
                if first != k:  # 5: none is left, after the last one that a process died of
                    finished.append(5)
            if code in finished:
                return
            (i, case), *left = read_progress(progress) or [(first, None)]
            if code != LOST:
                reasons = {None: "ended at its limit", HUNG: f"was at it for {PATIENCE} s and was ended"}
                reason = reasons.get(code, f"died, exit status {code}: log.txt may say why")
                session.write(part.name, i=i, case=case, ok=False, error=f"the process of share {k} {reason}")
            if code is None or not (code == LOST or code < 0) or case is None:
                for i, case in left:
                    session.write(part.name, i=i, case=case, skipped=f"not reached by the process of share {k}")
                return
            first = i + part.processes


def read_progress(path: Path) -> list[tuple[int, str]]:
    """Return the jobs that a process has left, the one that runs first; none where it says nothing that can be read."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return []


def command(session: Session, part: str) -> list[str]:
    """Return the command of a process that does a share of a part."""
    options = {
        "--call": session.call, "--out": session.out, "--device": session.device, "--began": session.began,
        "--until": session.until, "--shard": "{}/{}".format(*session.shard), "--progress": session.progress,
    }  # fmt: skip
    if part == "tests":
        # no:logging: torch 2.11 cannot format records of its own that pytest would capture
        plugins = ["-p", "no:cacheprovider", "-p", "no:logging", "-p", "bench.device.project_tests"]
        words = ["pytest", "-q", "--continue-on-collection-errors", *plugins, "-m", CHOSEN, *TESTS]
    else:
        words = ["bench.device.part", part]
        options["--only"] = session.only
    return [sys.executable, "-m", *words, *(f"{name}={value}" for name, value in options.items() if value is not None)]


def wait(words: list[str], output: Path, end: float, progress: Path | None = None) -> int | None:
    """Return the exit status of a command whose output goes to the end of a file. It is ended, with all it had started,
    where it has not ended in time: None; or where its progress says that it was too long at one job: HUNG.
    """
    with output.open("ab") as file:
        process = subprocess.Popen(words, cwd=ROOT, stdout=file, stderr=file, start_new_session=True)
        while True:
            with contextlib.suppress(subprocess.TimeoutExpired):
                return process.wait(max(0.1, min(1.0, end - time.time())))
            if time.time() < end and not is_stuck(progress):
                continue
            found = None if time.time() >= end else HUNG
            os.killpg(process.pid, signal.SIGKILL)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(10)  # the driver may hold it
            return found


def is_stuck(progress: Path | None) -> bool:
    """Tell whether a process has been at a job for too long while others wait for it."""
    if progress is None or len(read_progress(progress)) < 2:
        return False
    return time.time() - progress.stat().st_mtime > PATIENCE
