"""The jobs of a part, where their results go, and until when one may begin."""

from __future__ import annotations

import contextlib
import json
import os
import re
import sys
import time
import traceback
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
RESULTS = "results.jsonl"
LOST = 40  # exit status of a process that has lost its CUDA context; pytest's own are 0 to 5
HUNG = -99  # in place of the exit status of a process that was ended since it was too long at one job


@dataclass(frozen=True)
class Job:
    """Hold one case: run() yields what is written of it, as soon as it is known."""

    name: str
    run: Callable[[], Iterable[dict]]


@dataclass(frozen=True)
class Session:
    """Hold one process's share of a call.

    device: "cuda"; "emulated", where kernels are compiled for sm_90 and their PTX is emulated on CPU tensors; "none",
    where they are compiled and launch nothing; "cpu", where only what needs no kernel of ours runs. began: when the
    call did, and until: when nothing new begins, in seconds since the epoch. shard: (k, n) for the kth of every n jobs.
    only: what names of jobs must match. progress: a file of the jobs that are left, the one that runs first.
    """

    call: str
    out: Path
    device: str = "cuda"
    began: float = 0.0
    until: float = float("inf")
    shard: tuple[int, int] = (0, 1)
    only: str = ""
    progress: Path | None = None

    @property
    def compiling(self) -> bool:
        """Tell whether launches do nothing, so that results mean nothing."""
        return self.device == "none"

    @property
    def tensors(self) -> str:
        """Return the device of tensors."""
        return "cuda" if self.device == "cuda" else "cpu"

    @property
    def late(self) -> bool:
        """Tell whether nothing new may begin."""
        return time.time() > self.until

    def write(self, part: str, **row) -> None:
        """Append one line of JSON in one write: processes share the file."""
        times = {"began": round(self.began), "t": round(time.time() - self.began, 1)}
        append(self.out / RESULTS, {"call": self.call, "part": part, **times, **row})

    def note(self, left: list[tuple[int, str]]) -> None:
        """Write the numbers and names of the jobs that are left, the one that begins first."""
        if self.progress:
            unfinished = self.progress.with_suffix(".new")
            unfinished.write_text(json.dumps(left))
            unfinished.replace(self.progress)


def append(path: Path, row: dict) -> None:
    """Append a line of JSON to a file in one write."""
    with path.open("ab", buffering=0) as file:
        file.write((json.dumps(row, default=str) + "\n").encode())


def read(out: Path) -> list[dict]:
    """Return the rows that are written so far; a line that is cut off is left out."""
    path = out / RESULTS
    rows = []
    for line in path.read_text(errors="replace").splitlines() if path.exists() else []:
        with contextlib.suppress(ValueError):
            rows.append(json.loads(line))
    return rows


def run_jobs(session: Session, part: str, jobs: list[Job]) -> None:
    """Run this process's share of the jobs; write of each what it yields, its error, or that the deadline is past.

    Where one loses the CUDA context, every later one would fail: the process ends with LOST, and another goes on.
    """
    kernels = count_kernels()
    first, step = session.shard
    mine = [(i, job) for i, job in list(enumerate(jobs))[first::step] if re.search(session.only, job.name)]
    names = [(i, job.name) for i, job in mine]
    for k, (i, job) in enumerate(mine):
        about = {"part": part, "i": i, "case": job.name}
        session.note(names[k:])
        if session.late:
            session.write(**about, skipped="past the deadline")
            continue
        began, before = time.time(), dict(kernels)
        try:
            for found in job.run():
                seconds = round(time.time() - began, 2)
                made = {name: kernels[name] - before[name] for name in kernels}
                session.write(**about, **found, seconds=seconds, **made)
                began, before = time.time(), dict(kernels)
        except Exception as error:
            if is_out_of_memory(error):
                session.write(**about, skipped=describe_error(error))
                continue
            session.write(**about, ok=False, error=describe_error(error), trace=traceback.format_exc()[-1500:])
            end_where_lost(session)
    session.note([])


def describe_error(error: BaseException) -> str:
    """Return an error as one line of a result."""
    return f"{type(error).__name__}: {error}"[:800]


def is_out_of_memory(error: Exception) -> bool:
    """Tell whether the device's memory was full, of which other processes of a part hold the rest."""
    import torch

    return isinstance(error, torch.OutOfMemoryError)


def end_where_lost(session: Session) -> None:
    """End this process with LOST where an error has taken its CUDA context along."""
    if session.device == "cuda" and context_is_lost():
        sys.stdout.flush()
        os._exit(LOST)  # the interpreter's own end would ask the driver again


def context_is_lost() -> bool:
    """Tell whether the device answers no more, after an error that a kernel made."""
    import torch

    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False


def count_kernels() -> dict[str, int]:
    """Count the kernels that Triton compiles and those that it finds in its cache, from now on, in what is returned."""
    counts = {"compiled": 0, "cached": 0}
    try:
        from triton import knobs
    except ImportError:
        return counts

    def listener(*, cache_hit: bool, **_):
        counts["cached" if cache_hit else "compiled"] += 1

    knobs.compilation.listener = listener
    return counts
