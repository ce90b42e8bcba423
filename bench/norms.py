"""Norms and softmax along the last axis, as others launch them: kernels to hold the performance model against.

    layer_norm(8192, 4096, GPUS["h100"])                          # this project's own, in a popular form
    liger("rms", 8192, 4096, GPUS["h200"])["backward"]            # those of liger-kernel, which is imported

Layer norm and softmax are written here in the form that Triton's tutorials made common. A row is a block, of as many
warps as hold it, 256 elements each and 8 at most. Layer norm's backward pass leaves partial sums of the parameters'
gradients for every tile of 2^14 elements, which a second kernel adds up. All is in bf16. Nothing runs: launches are
recorded, with the bytes that they move, and so no GPU is needed.
"""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Iterator
from dataclasses import dataclass
from types import ModuleType, SimpleNamespace
from unittest import mock

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from bench import aot, model
from bench.gpus import Gpu
from bench.modelled import count_unrolled, take

ITEM = 2  # bytes of an element of bf16
SUMMED = 4  # bytes of an element of partial sums in fp32
TILE = 2**14  # elements of a tile of layer norm's backward pass
GROUPS, COLUMNS = 64, 8  # of partial sums that are added up at once
EPS = 1e-5


@dataclass(frozen=True)
class Step:
    """Describe a launch of a pass, None where torch launches one of its own. rows: that a program goes through, one a
    turn of its loop, where it has one, which loads so many bytes (loaded). read, written: bytes in memory. cached: of
    those read, bytes that were written just before.
    """

    recorded: aot.Launch | None
    read: float
    written: float
    rows: float = 1
    loaded: float = 0
    cached: float = 0


# --- Kernels --------------------------------------------------------------------------------------
@triton.jit
def layer_norm_forward(x, weight, bias, y, means, inv_stds, n_columns, eps, BLOCK: tl.constexpr):
    """Store the layer norm of a row, its mean and the reciprocal of its standard deviation."""
    row, columns = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    valid = columns < n_columns
    values = tl.load(x + row * n_columns + columns, valid, 0.0).to(tl.float32)
    mean = tl.sum(values, 0) / n_columns
    centred = tl.where(valid, values - mean, 0.0)
    inv_std = tl.rsqrt(tl.sum(centred * centred, 0) / n_columns + eps)
    tl.store(means + row, mean)
    tl.store(inv_stds + row, inv_std)
    scale = tl.load(weight + columns, valid, 0.0).to(tl.float32)
    shift = tl.load(bias + columns, valid, 0.0).to(tl.float32)
    tl.store(y + row * n_columns + columns, centred * inv_std * scale + shift, valid)


@triton.jit
def layer_norm_backward(
    x, grad_y, weight, means, inv_stds, grad_x, sums_weight, sums_bias, n_rows, n_columns, ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Store the gradient of ROWS rows, and their share of the gradients of weight and bias."""
    group = tl.program_id(0).to(tl.int64)
    rows, columns = group * ROWS + tl.arange(0, ROWS)[:, None], tl.arange(0, BLOCK)[None, :]
    inside, valid = rows < n_rows, columns < n_columns
    offsets = rows * n_columns + columns
    values = tl.load(x + offsets, inside & valid, 0.0).to(tl.float32)
    grads = tl.load(grad_y + offsets, inside & valid, 0.0).to(tl.float32)
    scale = tl.load(weight + columns, valid, 0.0).to(tl.float32)
    mean, inv_std = tl.load(means + rows, inside, 0.0), tl.load(inv_stds + rows, inside, 0.0)
    normal = tl.where(valid, (values - mean) * inv_std, 0.0)
    scaled = grads * scale
    of_normal = tl.sum(scaled * normal, 1)[:, None] / n_columns
    of_scaled = tl.sum(scaled, 1)[:, None] / n_columns
    tl.store(grad_x + offsets, (scaled - normal * of_normal - of_scaled) * inv_std, inside & valid)
    sums = group * n_columns + columns
    tl.store(sums_weight + sums, tl.sum(grads * normal, 0)[None, :], valid)
    tl.store(sums_bias + sums, tl.sum(grads, 0)[None, :], valid)


@triton.jit
def sum_groups(
    sums_weight, sums_bias, grad_weight, grad_bias, n_groups, n_columns, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    """Store the gradients of COLUMNS columns' weights and biases, from all groups' shares, so many ROWS at once."""
    columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    total_weight = tl.zeros([ROWS, COLUMNS], tl.float32)
    total_bias = tl.zeros([ROWS, COLUMNS], tl.float32)
    for first in range(0, n_groups, ROWS):
        groups = first + tl.arange(0, ROWS)[:, None]
        valid = (groups < n_groups) & (columns < n_columns)
        total_weight += tl.load(sums_weight + groups * n_columns + columns, valid, 0.0)
        total_bias += tl.load(sums_bias + groups * n_columns + columns, valid, 0.0)
    tl.store(grad_weight + columns, tl.sum(total_weight, 0)[None, :], columns < n_columns)
    tl.store(grad_bias + columns, tl.sum(total_bias, 0)[None, :], columns < n_columns)


@triton.jit
def softmax_forward(x, y, n_rows, n_columns, BLOCK: tl.constexpr):
    """Store the softmax of every so many rows, one at a time."""
    columns = tl.arange(0, BLOCK)
    for row in range(tl.program_id(0), n_rows, tl.num_programs(0)):
        start = row.to(tl.int64) * n_columns
        values = tl.load(x + start + columns, columns < n_columns, -float("inf")).to(tl.float32)
        shares = tl.exp(values - tl.max(values, 0))
        tl.store(y + start + columns, shares / tl.sum(shares, 0), columns < n_columns)


# --- Launches -------------------------------------------------------------------------------------
def layer_norm(n_rows: int, n_columns: int, gpu: Gpu) -> list[Step]:
    """Return the launches of layer norm's forward and backward pass."""
    x, weight, stats = _empty(n_rows, n_columns), _empty(n_columns), _empty(n_rows, dtype=torch.float32)
    block, warps = _row(n_columns)
    rows = max(1, TILE // block)
    n_groups = -(-n_rows // rows)
    sums = _empty(n_groups, n_columns)
    with aot.recording_triton() as made:
        layer_norm_forward[(n_rows,)](x, weight, weight, x, stats, stats, n_columns, EPS, BLOCK=block, num_warps=warps)
        layer_norm_backward[(n_groups,)](
            x, x, weight, stats, stats, x, sums, sums, n_rows, n_columns, ROWS=rows, BLOCK=block, num_warps=warps
        )
        sum_groups[(-(-n_columns // COLUMNS),)](
            sums, sums, weight, weight, n_groups, n_columns, ROWS=GROUPS, COLUMNS=COLUMNS, num_warps=4
        )
    forward, backward, last = made
    moved, summed = ITEM * n_rows * n_columns, 2 * sums.nbytes
    turns = -(-n_groups // GROUPS)
    return [
        Step(forward, moved, moved),
        Step(backward, 2 * moved, moved + summed),
        Step(last, summed, 0, turns, 2 * ITEM * GROUPS * COLUMNS, summed),
    ]


def softmax(n_rows: int, n_columns: int, gpu: Gpu) -> list[Step]:
    """Return the launch of softmax's forward pass: of as many programs as the GPU holds at once."""
    x = _empty(n_rows, n_columns)
    block, warps = _row(n_columns)

    def record(programs: int) -> aot.Launch:
        with aot.recording_triton() as made:
            softmax_forward[(programs,)](x, x, n_rows, n_columns, BLOCK=block, num_warps=warps)
        (one,) = made
        return one

    compiled = aot.compile_for(gpu.target, record(1))
    resident = model.resident_warps(compiled.registers, compiled.shared, warps) // warps
    programs = min(n_rows, gpu.multiprocessors * resident)
    moved = ITEM * n_rows * n_columns
    return [Step(record(programs), moved, moved, n_rows / programs, ITEM * block)]


def _row(n_columns: int) -> tuple[int, int]:
    """Return the elements of a block that holds a row, and the warps that take it."""
    block = triton.next_power_of_2(n_columns)
    return block, min(8, max(1, block // 256))


def _empty(*shape: int, dtype: torch.dtype = torch.bfloat16, device: str = "meta") -> Tensor:
    """Return a tensor without memory."""
    return torch.empty(shape, dtype=dtype, device=device)


# --- Those of liger-kernel ------------------------------------------------------------------------
def liger(kind: str, n_rows: int, n_columns: int, gpu: Gpu) -> dict[str, list[Step]]:
    """Return the launches of a "forward" and a "backward" pass of liger-kernel's "rms" or "layer" norm.

    What torch does beside them counts as launches that move its bytes: RMS norm's dx is set to zero first, and partial
    sums, one a multiprocessor, are added up and cast.
    """
    module = import_liger(kind)
    with aot.recording_triton() as made, _pretending(gpu):
        x, weight = (_empty(*shape, device="cuda") for shape in ((n_rows, n_columns), (n_columns,)))
        if kind == "rms":
            y, x, inv_rms, *settings, casting = module.rms_norm_forward(x, weight, EPS, 0.0, "llama", None)
            module.rms_norm_backward(y, x, weight, inv_rms, 0.0, casting, *settings, False, None)
        else:
            y, x, mean, inv_std, *_ = module.layer_norm_forward(x, weight, weight, EPS)
            module.layer_norm_backward(y, x, weight, weight, mean, inv_std)
    forward, backward = made
    moved, partial = ITEM * n_rows * n_columns, SUMMED * gpu.multiprocessors * n_columns
    n_params = 1 if kind == "rms" else 2
    rows = -(-n_rows // gpu.multiprocessors)
    block = backward.meta["BLOCK_SIZE"]
    steps = [Step(backward, 2 * moved, moved + n_params * partial, rows, 2 * ITEM * block)]
    steps += n_params * [
        Step(None, partial, SUMMED * n_columns, cached=partial),
        Step(None, SUMMED * n_columns, ITEM * n_columns, cached=SUMMED * n_columns),
    ]
    zeroed = [Step(None, 0, moved)] if kind == "rms" else []
    return {"forward": [Step(forward, moved, moved)], "backward": zeroed + steps}


def import_liger(kind: str) -> ModuleType:
    """Return the module of liger-kernel with the "rms" or the "layer" norm.

    Raises:
        ImportError: it is not installed; the message says how to.
    """
    try:
        return importlib.import_module(f"liger_kernel.ops.{kind}_norm")
    except ImportError as error:
        raise ImportError(f"{error}. Its norms need the extra: pip install 'daam-triton[bench]'") from error


@contextlib.contextmanager
def _pretending(gpu: Gpu) -> Iterator[None]:
    """Let tensors seem to stand on a GPU until the block ends, which has as many multiprocessors as the one given."""
    properties = SimpleNamespace(multi_processor_count=gpu.multiprocessors)
    with (
        mock.patch.object(torch.cuda, "get_device_properties", lambda _: properties),
        mock.patch.object(torch.cuda, "device", contextlib.nullcontext),
        FakeTensorMode(),
    ):
        yield


# --- What they take -------------------------------------------------------------------------------
def estimate(steps: list[Step], gpu: Gpu) -> float:
    """Return the microseconds that a pass of such launches is modelled to take."""
    return 1e6 * model.add_launches([_estimate(step, gpu) for step in steps], gpu)


def count_spills(steps: list[Step], gpu: Gpu) -> int:
    """Return the most bytes a thread that a kernel of a pass spills."""
    return max(aot.compile_for(gpu.target, step.recorded).stack for step in steps if step.recorded)


def _estimate(step: Step, gpu: Gpu) -> float:
    """Return the seconds of a launch; of one of torch's what its bytes take, and one access of memory."""
    if step.recorded is None:
        launch = model.Launched([], 32, 0, 4, 1, 1, step.read, step.written, step.cached)
        return model.find_memory_time(launch, gpu) + gpu.latency / 1e9
    compiled = aot.compile_for(gpu.target, step.recorded)
    code = compiled.instructions
    unrolled = count_unrolled(code, step.loaded, step.recorded.meta["num_warps"]) if step.loaded else 1
    launch = take(step.recorded, compiled, code, step.rows / unrolled, step.read, step.written, step.cached)
    return model.estimate(launch, gpu).seconds
