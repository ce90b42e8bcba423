"""Counters of the device while kernels run, which Nsight Compute reads (ncu)."""

from __future__ import annotations

import csv
import shutil
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch

from bench.device.cases import PROFILED
from bench.device.plan import wait
from bench.device.session import Job, Session
from bench.device.times import empty_tensors
from bench.workloads import Workload

SECTIONS = (
    "SpeedOfLight", "LaunchStats", "Occupancy", "WarpStateStats", "MemoryWorkloadAnalysis", "SchedulerStats",
    "InstructionStats",
)  # fmt: skip
KEPT = (  # beginnings of the names of metrics
    "DRAM Throughput", "Duration", "Registers Per Thread", "Issue Slots Busy", "Achieved Occupancy", "Local",
    "Compute (SM) Throughput", "Executed Ipc Active", "Stall",
)  # fmt: skip

COLUMNS = {"kernel": "Kernel Name", "metric": "Metric Name", "unit": "Metric Unit", "value": "Metric Value"}
FORBIDDEN = "ERR_NVGPUCTRPERM"  # what ncu says where counters are another's to read
TABLES = 15  # seconds before the deadline when no workload is begun: ncu prints its tables when all are done
GRACE = 8  # seconds past the deadline when ncu is ended


def jobs(session: Session) -> list[Job]:
    """Return the one job that profiles; where there are no counters, those of the profiled process instead."""
    return profile_jobs(session) if session.compiling else [Job("ncu", partial(count, session))]


def count(session: Session) -> Iterator[dict]:
    """Profile a process and yield its metrics, those of the kernels that it reached in time."""
    if shutil.which("ncu") is None:
        yield {"skipped": "ncu is not installed"}
        return
    path = session.out / "ncu.csv"
    path.unlink(missing_ok=True)
    profiled = [sys.executable, "-m", "bench.device.part", "profile", f"--out={session.out}", f"--call={session.call}",
                f"--began={session.began}", f"--until={session.until - TABLES}"]  # fmt: skip
    wanted = ["--profile-from-start", "off", *(word for name in SECTIONS for word in ("--section", name))]
    told = ["--csv", "--page", "details", "--print-details", "all", "--clock-control", "none"]
    status = wait(["ncu", *wanted, *told, *profiled], path, session.until + GRACE)
    if reason := next((line for line in path.read_text(errors="replace").splitlines() if FORBIDDEN in line), None):
        yield {"skipped": reason}
        return
    yield from read_metrics(path)
    yield {"ok": status == 0, "status": "ended at its limit" if status is None else status}


def read_metrics(path: Path) -> Iterator[dict]:
    """Yield the kept metrics of a file that ncu wrote, beside whatever else it says there."""
    columns: list[str] = []
    for text in path.read_text(errors="replace").splitlines():
        line = next(csv.reader([text]), [])
        if "Metric Name" in line:
            columns = line
        elif columns and len(line) > columns.index(COLUMNS["value"]):
            row = dict(zip(columns, line, strict=False))  # a metric has none of the last columns, which are of rules
            if row["Metric Name"].startswith(KEPT):
                yield {name: row[column] for name, column in COLUMNS.items()}


def profile_jobs(session: Session) -> list[Job]:
    """Return a job a workload: two forward and backward passes, the second between the profiler's start and stop."""
    return [Job(str(workload), partial(profile, session, workload)) for workload in PROFILED]


def profile(session: Session, workload: Workload) -> Iterator[dict]:
    """Run both passes twice, the profiler watching the second time; where nothing is launched, once."""
    if session.compiling:
        leaves, grad_y = empty_tensors(workload)
        torch.autograd.grad(workload.call(*leaves, backend="triton"), leaves, grad_y)
        yield {}
        return
    x, params, grad_y = workload.inputs("cuda")
    leaves = tuple(t.requires_grad_() for t in (x, *params))
    torch.autograd.grad(workload.call(*leaves, backend="triton"), leaves, grad_y)
    torch.cuda.synchronize()
    torch.cuda.profiler.start()
    torch.autograd.grad(workload.call(*leaves, backend="triton"), leaves, grad_y)
    torch.cuda.synchronize()
    torch.cuda.profiler.stop()
    yield {}
