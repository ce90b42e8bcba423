"""Launches of this project's kernels as the model takes them (`bench/model.py`), and what their passes come to."""

from __future__ import annotations

import importlib
import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from bench import byte_model, model
from bench.aot import Compiled, Launch, compile_for, recording
from bench.gpus import Gpu
from bench.machine_code import Instruction, find_turn, main_loop
from bench.workloads import Workload
from daam.kernels.algorithms import ALGORITHMS, count_tensors
from daam.kernels.gated_tiles import CHANNEL, TIME, Sizes
from daam.kernels.operands import Extent, Inputs, Outputs
from daam.kernels.whole import take_steps


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
        kernels.backward(torch.empty_like(x), x if full else None, *args, stats, *how, True, True)
    return {"forward": forward, "backward": backward}


def record_layers(
    algorithm: str, layers: int, x: torch.Tensor, p: torch.Tensor, mask: torch.Tensor | None, axis: int, full: bool
) -> dict[str, list[Launch]]:
    """Return the launches of passes as `record_passes` does, of layers with residual that share one. full: with
    weights.
    """
    kernels = importlib.import_module(f"daam.kernels.{algorithm}_layers")
    settings = ALGORITHMS[algorithm].settings_of(None, None, None)
    args, how = (x, [p] * layers, [p] * layers, mask), (axis, *settings, True)
    with recording() as forward:
        kernels.forward(*args, *how, full)
    with recording() as backward:
        kernels.backward(torch.empty_like(x), *args, *how, True, True)
    return {"forward": forward, "backward": backward}


def record_gated(x: torch.Tensor, gaussians: int, full: bool) -> dict[str, list[Launch]]:
    """Return the launches of passes of the gate with its projection and product, x (batch, channels, times) of any
    order on the meta device. full: with a mask, and a gradient of the gate.
    """
    kernels = importlib.import_module("daam.kernels.gated")
    batch, channels, times = x.shape
    order = sorted(range(3), key=x.stride, reverse=True)
    ordered, axes = x.permute(order), (order.index(1), order.index(2))
    params = [x.new_empty(shape) for shape in ((1, channels, 1), (1,), (), (gaussians,), (gaussians,))]
    mask = x.new_empty((batch, times), dtype=torch.bool) if full else None
    with recording() as forward:
        _y, gate, p, gates, stats = kernels.forward(ordered, *params, mask, *axes, x.dtype, True)
    gates = gate.squeeze(1) if gates is None else gates
    with recording() as backward:
        grads = torch.empty_like(ordered), gate if full else None
        kernels.backward(*grads, ordered, *params, mask, p, gates, stats, *axes, *[True] * 5)
    return {"forward": forward, "backward": backward}


def launches(*args, **options) -> list[Launch]:
    """Return what `record_passes` records, one after the other."""
    return list(itertools.chain(*record_passes(*args, **options).values()))


def count_unrolled(code: list[Instruction], loaded: float, num_warps: int) -> int:
    """Return how often LLVM unrolled the main loop, a turn of which loads so many bytes as it was written."""
    return max(1, int(_count_bytes(code, num_warps) / loaded))


def _count_bytes(code: list[Instruction], num_warps: int, loads: bool = True) -> float:
    """Return the bytes that a program loads in a turn of the main loop, or else stores."""
    return sum(step.bits for step in find_turn(code) if step.bits and step.loads == loads) / 8 * 32 * num_warps


def find_steps(recorded: Launch) -> list[Launch]:
    """Return the launches whose programs' turns one launch takes (`kernels/whole.py`); of any other itself."""
    if recorded.kernel is not take_steps:
        return [recorded]
    (steps, extent), meta, found = recorded.args, recorded.meta, []
    programs, heads = recorded.grid
    plans = {False: meta["PLAN"], True: meta["MERGED"]}
    for kernel, args, constants, merges in zip(meta["KERNELS"], steps, meta["CONSTANTS"], meta["MERGES"], strict=True):
        named = dict(zip(kernel.arg_names[len(args) + 1 :], (*constants, plans[merges]), strict=True))
        grid = (programs * (1 if merges else extent.n_strips // 2), heads)
        options = ("num_warps",) if merges else ("num_warps", "maxnreg")  # as `host.Call` has them
        found.append(Launch(kernel, (*args, extent), named | {name: meta[name] for name in options}, grid))
    return found


def x_of(recorded: Launch) -> torch.Tensor:
    """Return the tensor x of a launch that moves such."""
    first = recorded.args[0]
    return (first.x if isinstance(first, Inputs) else first).data


def moves_channels(recorded: Launch) -> bool:
    """Tell whether a launch is one of the fused gate's own, which know x as (batch, channels, times)."""
    return isinstance(recorded.args[-1], Sizes)


def count_shares(recorded: Launch) -> tuple[tuple[float, int], tuple[float, int]]:
    """Return (elements of a tile that are inside, on average; how many tiles there are) along the channels and the
    times of such a launch.
    """
    plan, found = recorded.meta["PLAN"], []
    for axis, block in ((CHANNEL, plan.BLOCK_C * plan.N_C), (TIME, plan.BLOCK_T * plan.N_T)):
        size = x_of(recorded).shape[axis]
        n = -(-size // block)
        found.append((size / n, n))
    return tuple(found)


def extent_of(recorded: Launch) -> Extent:
    """Return the extent of a launch whose kernel takes one, decoded, chunks as long as they are on average."""
    extent = recorded.args[-1].decode(recorded.meta["PLAN"].UNIT, recorded.meta["PLAN"].FASTEST)
    more = 0 if extent.longest is None else extent.longest - extent.chunk
    return extent._replace(chunk=extent.chunk + more / recorded.grid[1])


def count_tiles(recorded: Launch, code: list[Instruction]) -> int:
    """Return how many tiles of x a turn of the main loop handles: as often as LLVM unrolled a loop over strips."""
    plan, itemsize = recorded.meta["PLAN"], x_of(recorded).itemsize
    if moves_channels(recorded):
        tile = plan.BLOCK_C * plan.N_C * plan.BLOCK_T * plan.N_T * itemsize
        if main_loop(code) is None:
            return 1
        reads, writes = count_tensors(recorded.name)
        if writes:  # beside x it reads rows, as often as threads share them
            return max(1, int(_count_bytes(code, recorded.meta["num_warps"], loads=False) / tile / writes))
        return count_unrolled(code, tile * reads, recorded.meta["num_warps"])
    rows, extent = plan.BLOCK_P * plan.N_BLOCKS, extent_of(recorded)
    if extent.chunk <= rows:
        return 1
    loaded = rows * plan.BLOCK_C * itemsize * count_moved(recorded)[0]
    return count_unrolled(code, loaded, recorded.meta["num_warps"])


def count_elements(recorded: Launch, code: list[Instruction]) -> float:
    """Return how many elements of x a turn of the main loop handles, of one program: those of its tiles that are inside
    the chunk.
    """
    if moves_channels(recorded):
        (channels, _), (times, _) = count_shares(recorded)
        return channels * times * count_tiles(recorded, code)
    plan, extent = recorded.meta["PLAN"], extent_of(recorded)
    return min(extent.chunk, plan.BLOCK_P * plan.N_BLOCKS) * plan.BLOCK_C * count_tiles(recorded, code)


def count_moved(recorded: Launch) -> tuple[int, int]:
    """Return how many tensors of x's size a launch (reads, writes): `count_tensors`, with those of the weights."""
    (reads, writes), (inputs, *others) = count_tensors(recorded.name), recorded.args
    if moves_channels(recorded):
        return reads, writes
    reads += reads > 1 and inputs.grad_weights is not None
    outputs = next((one for one in others if isinstance(one, Outputs)), None)
    if outputs is not None and outputs.weights is not None:
        writes += len(outputs.weights) if type(outputs.weights) is tuple else 1
    return reads, writes


def count_turns(recorded: Launch, code: list[Instruction]) -> float:
    """Return how many turns of the main loop a program takes, on average."""
    programs, plan = math.prod(recorded.grid), recorded.meta.get("PLAN")
    if moves_channels(recorded):
        (_, n_channels), (_, n_times) = count_shares(recorded)
        return x_of(recorded).shape[0] * n_channels * n_times / programs / count_tiles(recorded, code)
    if plan is not None:
        extent = extent_of(recorded)
        if not count_tensors(recorded.name):
            return -(-extent.n_strips // plan.BLOCK_P)
        tiles = extent.n_tiles * math.ceil(extent.chunk / (plan.BLOCK_P * plan.N_BLOCKS)) * recorded.grid[1]
        return tiles / programs / count_tiles(recorded, code)
    if main_loop(code) is None:
        return 1
    partials = recorded.args[0].data  # of N sums in one loop, which may be unrolled
    block, n_sums = recorded.meta["BLOCK"], recorded.meta["N"]
    read = n_sums * -(-partials.shape[2] // block) * block * recorded.meta.get("ENTRIES", 1) * partials.itemsize
    return max(1.0, read / _count_bytes(code, recorded.meta["num_warps"]))


def launched(recorded: Launch, compiled: Compiled, earlier: float = 0.0, again: bool = False) -> model.Launched:
    """Return a launch for an NVIDIA GPU as the model takes it; earlier: bytes that launches before have read, or again,
    the same programs.
    """
    code, run = compiled.instructions, None
    if count_tensors(recorded.name):
        read, written = (float(n * x_of(recorded).nbytes) for n in count_moved(recorded))
        cached = min(read, earlier)
        run = find_run(recorded, code) if moves_channels(recorded) or not _rows(extent_of(recorded)) else None
    else:  # sums that the launch before has written
        read = cached = float(recorded.args[0].data.nbytes)
        written = 0.0
    return take(recorded, compiled, code, count_turns(recorded, code), read, written, cached, run, again)


def take(
    recorded: Launch, compiled: Compiled, code: list[Instruction], turns: float, read: float, written: float,
    cached: float = 0.0, run: int | None = None, again: bool = False,
) -> model.Launched:  # fmt: skip
    """Return any launch for an NVIDIA GPU as the model takes it; `model.Launched` says what is what."""
    num_warps = recorded.meta.get("num_warps", 4)  # as many as Triton's own default
    return model.Launched(
        code, compiled.registers, compiled.shared, num_warps, math.prod(recorded.grid), turns, read, written, cached,
        run, again,
    )  # fmt: skip


def _rows(extent: Extent) -> bool:
    """Tell whether neighbours of a chunk adjoin in memory."""
    return extent.strides[0] == 1


def find_run(recorded: Launch, code: list[Instruction]) -> int:
    """Return the bytes side by side in memory that one access of a warp touches: lanes go along what is contiguous."""
    plan, x = recorded.meta["PLAN"], x_of(recorded)
    lanes = 32 * max((step.bits for step in find_turn(code) if step.loads), default=0) // 8
    if moves_channels(recorded):
        block = {CHANNEL: plan.BLOCK_C, TIME: plan.BLOCK_T}.get(plan.FASTEST, 1)
        return min(lanes, min(block, x.shape[plan.FASTEST]) * x.itemsize)
    extent = extent_of(recorded)
    if not _rows(extent):
        return min(lanes, min(plan.BLOCK_C, extent.inner) * x.itemsize)
    whole = plan.N_BLOCKS == 1 and extent.chunk == plan.BLOCK_P  # rows follow each other
    return min(lanes, int(min(plan.BLOCK_P, extent.chunk)) * x.itemsize * (plan.BLOCK_C if whole else 1))


def estimate(recorded: list[Launch], gpu: Gpu) -> Iterator[tuple[str, model.Estimate]]:
    """Yield (the kernel's name, its Estimate) of the launches of a pass, in order."""
    touched: set[int] = set()  # storages that were read or written, which L2 may still hold
    for one in recorded:
        again, steps = one.kernel is take_steps, []
        for step in find_steps(one):
            tensors = list(find_tensors(step.args))
            earlier = sum(t.nbytes for t in tensors if t.untyped_storage()._cdata in touched and _fills(t, step))
            steps.append(launched(step, compile_for(gpu.target, step), float(earlier), again))
            touched |= {t.untyped_storage()._cdata for t in tensors}
        if again:
            whole = take(one, compile_for(gpu.target, one), [], 0, 0.0, sum(step.written for step in steps))
            yield one.name, model.estimate_steps(whole, steps, gpu)
        else:
            yield one.name, model.estimate(steps[0], gpu)


def find_tensors(args: Any) -> Iterator[torch.Tensor]:
    """Yield the tensors among arguments of a launch, at any depth of tuples."""
    if isinstance(args, torch.Tensor):
        yield args
    elif isinstance(args, tuple):
        for one in args:
            yield from find_tensors(one)


def _fills(t: torch.Tensor, recorded: Launch) -> bool:
    """Tell whether a tensor has as many elements as x of a launch."""
    return count_tensors(recorded.name) is not None and t.numel() == x_of(recorded).numel()


def model_pass(recorded: list[Launch], least_bytes: float, gpu: Gpu) -> Modelled:
    """Return what a pass of such launches is modelled to take; least_bytes: what it must move."""
    estimates = [found for _, found in estimate(recorded, gpu)]
    seconds = [one.seconds for one in estimates]
    longest = max(estimates, key=lambda one: one.seconds)
    share = least_bytes / gpu.copy / 1e9 / sum(seconds)
    return Modelled(1e6 * model.add_launches(seconds, gpu), share, longest.limit)


def model_workload(workload: Workload, gpu: Gpu) -> dict[str, Modelled]:
    """Return what the passes of a workload are modelled to take."""
    p, mask = torch.empty(workload.params_shape, device="meta"), workload.mask("meta")
    if mask is not None:
        mask = mask.view(*mask.shape, *[1] * (len(workload.shape) - mask.dim()))
    found = record_passes(workload.algorithm, workload.x, p, mask, workload.axis, workload.feature_axis, full=False)
    return {name: model_pass(one, byte_model.least_bytes(workload, name), gpu) for name, one in found.items()}
