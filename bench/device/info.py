"""The part `info`: what the machine has, and how fast it copies."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
from collections.abc import Iterator
from functools import partial

import torch

from bench import core
from bench.device import machine
from bench.device.session import Job, Session
from bench.device.times import copy_jobs

PACKAGES = ("pytest", "pytest_benchmark", "numpy", "matplotlib", "gaussian_adaptive_attention")
# on `file` depends which launchers Triton finds
TOOLS = ("gcc", "make", "git", "file", "ncu", "compute-sanitizer", "nvidia-smi")
QUERY = "clocks.sm,clocks.max.sm,clocks.mem,power.draw,power.limit,temperature.gpu,driver_version"


def jobs(session: Session) -> list[Job]:
    """Return the jobs of the part: versions and tools, then on a GPU the bandwidth of a copy, a job a size."""
    copies = copy_jobs(session) if session.device == "cuda" else []
    return [Job("machine", partial(describe, session)), *copies]


def describe(session: Session) -> Iterator[dict]:
    """Yield versions, tools, the prepared kernels, and on a GPU the device and its clocks."""
    yield {
        **core.about(),
        "packages": {name: importlib.util.find_spec(name) is not None for name in PACKAGES},
        "tools": [name for name in TOOLS if shutil.which(name)],
        "prepared": machine.read_prepared(),
        "prepared is of these sources": machine.is_prepared(),
        "environment": {k: v for k, v in os.environ.items() if k.startswith(("TRITON", "TORCH", "CUDA", "PYTORCH"))},
    }
    if session.device != "cuda":
        return
    device = torch.cuda.get_device_properties(0)
    yield {"sms": device.multi_processor_count, "l2": device.L2_cache_size, "memory": device.total_memory}
    if shutil.which("nvidia-smi"):
        command = ["nvidia-smi", f"--query-gpu={QUERY}", "--format=csv"]
        yield {"nvidia-smi": subprocess.run(command, capture_output=True, text=True, check=False).stdout.splitlines()}
