"""Launches of this project's kernels as the model takes them (`bench/model.py`), and what their passes come to."""

from __future__ import annotations

import importlib
import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from bench import byte_model, model
from bench.aot import Compiled, Launch, compile_for, recording
from bench.gpus import Gpu
from bench.machine_code import Instruction, instructions, main_loop
from bench.workloads import Workload
from daam.kernels.algorithms import ALGORITHMS, count_tensors
from daam.kernels.operands import Extent


@dataclass(frozen=True)
class Modelled:
    """Hold what a pass is modelled to take: microseconds, with launches; the share that a copy which moves what the
    pass must takes of it, without; and what takes longest in the kernel that takes longest.
    """

    us: float
    share: float
    limit: str


def record_passes(
    algorithm: str, x: torch.Tensor, p: torch.Tensor, mask: torch.Tensor | None, axis: int, feature_axis: int | None,
    full: bool, padding: float | None = None,
) -> dict[str, list[Launch]]:  # fmt: skip
    """Return the launches of a "forward" and a "backward" pass of an algorithm, x and p on the meta device. full: with
    weights, their gradient and residual.
    """
    kernels = importlib.import_module(f"daam.kernels.{algorithm}")
    settings = ALGORITHMS[algorithm].settings_of(feature_axis, None, padding)
    args, how = (x, p, p, mask), (axis, *settings, full)
    with recording() as forward:
        stats = kernels.forward(*args, *how, full, True)[2]
    with recording() as backward:
        kernels.backward(x, x if full else None, *args, stats, *how, True, True)
    return {"forward": forward, "backward": backward}


def launches(*args, **options) -> list[Launch]:
    """Return what `record_passes` records, one after the other."""
    return list(itertools.chain(*record_passes(*args, **options).values()))


def count_elements(recorded: Launch, code: list[Instruction]) -> float:
    """Return how many elements of x a turn of the main loop handles, of one program: those of the tile that are inside
    the chunk, as often as LLVM unrolled a loop over strips.
    """
    plan, extent = recorded.meta["PLAN"], recorded.args[-1]
    rows = min(extent.chunk, plan.BLOCK_P * plan.N_BLOCKS)
    elements = rows * plan.BLOCK_C
    if extent.chunk > rows and (loop := main_loop(code)):
        reads, _writes = count_tensors(recorded.name)
        itemsize = recorded.args[0].x.data.itemsize
        loaded = sum(step.bits for step in code[loop[0] : loop[1] + 1] if step.loads) / 8 / itemsize
        threads = 32 * recorded.meta["num_warps"]
        elements *= max(1, int(loaded * threads / elements / reads))
    return elements


def launched(recorded: Launch, compiled: Compiled, earlier: float = 0.0) -> model.Launched:
    """Return a launch for an NVIDIA GPU as the model takes it; earlier: bytes that launches of the pass have read."""
    code, programs = instructions(compiled.code), math.prod(recorded.grid)
    read = written = cached = 0.0
    run, extent = None, recorded.args[-1]
    if tensors := count_tensors(recorded.name):
        x = recorded.args[0].x.data
        elements = math.prod(extent.sizes) * extent.inner * extent.chunk * recorded.grid[1]
        turns = elements / programs / count_elements(recorded, code)
        read, written = (n * elements * x.itemsize for n in tensors)
        cached = min(read, earlier)
        run = find_run(recorded, compiled) if extent.strides[0] != 1 else None
    elif isinstance(extent, Extent):  # numbers of strips, or of chunks
        turns = -(-extent.n_strips // recorded.meta["PLAN"].BLOCK_P)
    else:
        partials, groups, *_ = recorded.args
        turns = -(-groups // recorded.meta["BLOCK"])
        read = cached = float(partials.data.nbytes)
    num_warps = recorded.meta["num_warps"]
    return model.Launched(
        code, compiled.registers, compiled.shared, num_warps, programs, turns, read, written, cached, run
    )


def find_run(recorded: Launch, compiled: Compiled) -> int:
    """Return the bytes side by side in memory that one access of a warp touches: lanes go along what is contiguous."""
    plan, extent = recorded.meta["PLAN"], recorded.args[-1]
    x, lanes = recorded.args[0].x.data, 32 * compiled.load_bits // 8
    if extent.strides[0] != 1:
        return min(lanes, plan.BLOCK_C * x.itemsize)
    whole = plan.N_BLOCKS == 1 and extent.chunk == plan.BLOCK_P  # rows follow each other
    return min(lanes, extent.chunk * x.itemsize * (plan.BLOCK_C if whole else 1))


def estimate(recorded: list[Launch], gpu: Gpu) -> Iterator[tuple[str, model.Estimate]]:
    """Yield (the kernel's name, its Estimate) of the launches of a pass, in order."""
    earlier = 0.0
    for one in recorded:
        launch = launched(one, compile_for(gpu.target, one), earlier)
        yield one.name, model.estimate(launch, gpu)
        if count_tensors(one.name):
            earlier = max(earlier, launch.read)


def model_pass(recorded: list[Launch], least_bytes: float, gpu: Gpu) -> Modelled:
    """Return what a pass of such launches is modelled to take; least_bytes: what it must move."""
    estimates = [found for _, found in estimate(recorded, gpu)]
    seconds = [one.seconds for one in estimates]
    longest = max(estimates, key=lambda one: one.seconds)
    share = least_bytes / gpu.copy / 1e9 / sum(seconds)
    return Modelled(1e6 * model.add_launches(seconds, gpu), share, longest.limit)


def model_workload(workload: Workload, gpu: Gpu) -> dict[str, Modelled]:
    """Return what the passes of a workload are modelled to take."""
    p = torch.empty(workload.params_shape, device="meta")
    found = record_passes(workload.algorithm, workload.x, p, None, workload.axis, workload.feature_axis, full=False)
    return {name: model_pass(one, byte_model.least_bytes(workload, name), gpu) for name, one in found.items()}
