"""NVIDIA's compute-sanitizer over small cases of every kernel: memcheck, which sees accesses outside allocations and
misaligned ones, and racecheck, which sees races in shared memory. Each case has a process of its own under each tool.
"""

from __future__ import annotations

import os
import re
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch

from bench.device.cases import FP32, helpers
from bench.device.plan import PATIENCE, wait
from bench.device.session import Job, Session

TOOLS = ("memcheck", "racecheck")
SUMMARY = re.compile(r"(?:ERROR|RACECHECK) SUMMARY: (\d+) .*")
REPORT = 1500  # characters of what the tool reports first
STATUS = 9  # of a tool that found errors
LONGEST = PATIENCE - 5  # seconds of a case, which takes some: the process that waits for it is not to be ended
UNCACHED = "PYTORCH_NO_CUDA_MEMORY_CACHING"  # each tensor is an allocation, whose end the tool knows


def jobs(session: Session) -> list[Job]:
    """Return a job a tool and case; where nothing is launched, those of the process under the tool instead."""
    if session.compiling:
        return sanitized_jobs(session)
    return [Job(f"{tool}-{name}", partial(sanitize, session, tool, name)) for tool in TOOLS for name in find_calls()]


def find_sanitizer() -> str | None:
    """Return the path of compute-sanitizer, on PATH or beside CUDA; None where there is none."""
    if found := shutil.which("compute-sanitizer"):
        return found
    compiler = shutil.which("nvcc")
    homes = [os.environ.get(name) for name in ("CUDA_HOME", "CUDA_PATH")]
    homes += [compiler and Path(compiler).resolve().parents[1], "/usr/local/cuda", "/opt/cuda"]
    places = (Path(home) / folder for home in homes if home for folder in ("bin", "compute-sanitizer"))
    return next(filter(None, (shutil.which("compute-sanitizer", path=place) for place in places)), None)


def sanitize(session: Session, tool: str, name: str) -> Iterator[dict]:
    """Run a case under a tool; yield whether it found nothing, its summary, and what it reported first."""
    program = find_sanitizer()
    if program is None:
        yield {"skipped": "compute-sanitizer is neither on PATH nor beside CUDA"}
        return
    path = session.out / f"{tool}-{name}.txt"
    path.unlink(missing_ok=True)
    inner = [sys.executable, "-m", "bench.device.part", "sanitized", f"--out={session.out}", f"--call={session.call}",
             f"--began={session.began}", f"--until={session.until}", f"--only=^{re.escape(name)}$"]  # fmt: skip
    words = [program, "--tool", tool, "--target-processes", "all", "--error-exitcode", str(STATUS), *inner]
    status = wait(words, path, time.time() + LONGEST)
    yield read_report(path.read_text(errors="replace"), status)


def read_report(text: str, status: int | None) -> dict:
    """Return what a tool found, from what it printed and its exit status, None of one that was ended: every hazard
    counts, and a tool that printed no summary found nothing out.
    """
    summaries = list(SUMMARY.finditer(text))
    row = {
        "ok": status == 0 and bool(summaries) and all(summary[1] == "0" for summary in summaries),
        "status": "ended at its limit" if status is None else status,
        "summary": "; ".join(summary[0] for summary in summaries),
    }
    if not row["ok"]:
        lines = [line for line in text.splitlines() if line.startswith("=========")]
        row["error"] = "\n".join(lines or text.splitlines()[-20:])[:REPORT] or "it printed nothing"
    return row


# --- In the process under a tool ----------------------------------------------------------------------
def sanitized_jobs(session: Session) -> list[Job]:
    """Return a job a case, which runs both passes once."""
    os.environ[UNCACHED] = "1"
    return [Job(name, partial(run, session, call)) for name, call in find_calls().items()]


def find_calls() -> dict[str, Callable[[str], object]]:
    """Return calls on a device by name, which run every kernel: of each algorithm columns and rows, on chip and
    streamed, long rows whose steps one program takes, layers in one launch, and the fused gate.
    """
    import digests  # the tests', as the sample is
    from emulator import sample

    masked = [(case, dtype) for case, dtype in sample.SAMPLE if case.mask]
    found = {f"{case}-{str(dtype)[6:]}": partial(attend, case, dtype, sample.crowded) for case, dtype in masked}
    long_rows = helpers.Case((2, 16_500), 1, params="one", weights=False)
    found[f"{long_rows}-whole"] = partial(attend, long_rows, FP32, helpers.taking_rows_whole)
    together = ("layers", "stable layers", "gated")
    return found | {name: partial(digests.CALLS[name], "triton") for name in together}


def attend(case: helpers.Case, dtype: torch.dtype, context: Callable, device: str) -> None:
    """Run both passes of a case on a device, in a context."""
    with context():
        helpers.run(case, helpers.inputs(case, dtype, device=device), "triton")


def run(session: Session, call: Callable[[str], object]) -> Iterator[dict]:
    """Run a call and wait for the device; yield the kernels that were launched."""
    with helpers.recorded_launches() as launches:
        call(session.tensors)
    if session.device == "cuda":
        torch.cuda.synchronize()
    yield {"ok": bool(launches), "launches": launches}
