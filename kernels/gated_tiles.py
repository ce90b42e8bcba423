"""How large a tile of x (batch, channels, times) is in the kernels of the fused gate, and how many programs take one.

A tile is N_C·N_T blocks [BLOCK_C, BLOCK_T] of one batch (`gated_blocks.py`). Blocks are as wide as one load a thread
along the dimension that is fastest in memory, and what a kernel sums over goes over a thread's registers first.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
import triton.language as tl
from torch import Tensor

from .operands import Strided, acc_dtype, encode, power_of_2

CHANNEL, TIME = 1, 2  # dimensions of x, of which one may have stride 1


class Plan(NamedTuple):
    """Hold what a kernel is compiled for: a block, and how many a tile has; the tiles that a program takes along the
    times; whether channels and times may stand outside; the unit of strides, and of the length of what has stride 1;
    which dimension that is, -1 for none; the dtypes of arithmetic and of offsets in a tile.
    """

    BLOCK_C: int
    BLOCK_T: int
    N_C: int
    N_T: int
    STRIP: int
    RAGGED_C: bool
    RAGGED_T: bool
    UNIT: int
    FASTEST: int
    ACC: tl.dtype
    INDEX: tl.dtype


class Sizes(NamedTuple):
    """Hold sizes of x, strips of its times, groups of its channels that programs take, and its strides; as arguments
    encoded (`operands.encode`), so that kernels are not compiled for values.
    """

    channels: int
    times: int
    n_strips: int
    n_groups: int
    strides: tuple[int, ...]


class Call(NamedTuple):
    """Hold what a kernel is launched with: sizes, encoded; the programs; its constants; and the programs that share a
    group of channels, each with sums of its own.
    """

    sizes: Sizes
    programs: int
    constants: dict[str, object]
    n_sums: int


THREADS, WARP = 128, 32
RUN, LONG_RUN, LONG = 128, 256, 4096  # bytes along the times at once, from so many times on: fewer fill a GPU sooner
# Columns, or rows, of a number a thread or more are laid out for themselves, and blocks moved to their layout in a loop
AT_MOST = 64
# Bytes that a thread loads of a tensor before it uses the first: more leave registers to fewer programs
AT_ONCE = {"project": 64, "outputs": 64, "sums": 32, "gradients": 32}
# Elements, and at least times, of which one program sums dp·x: its fp32 numbers are 1 % of what it moves
STRIP, STRIP_TIMES = 8192, 64


@functools.lru_cache(maxsize=1024)
def find_call(kind: str, dtype: torch.dtype, shape: torch.Size, strides: tuple[int, ...], *others: tuple) -> Call:
    """Return the call of a kernel of a kind on x of a dtype, a shape (batch, channels, times) and strides.

    kind: "project", a sum over channels; "sums", that of a product; "outputs" of some channels and times; "gradients",
    the same from two tensors, with sums over the times of a strip. others: strides of tensors of x's shape,
    () where x's. No tile depends on the batch: it has those of its rows.
    """
    batch, channels, times = shape
    fastest, unit = _find_unit(dtype, shape, strides)
    (block_c, block_t), n_blocks = _find_block(kind, dtype, shape, strides, unit)
    n_c = n_t = 1
    if _in_channels(shape, strides):
        n_t = min(n_blocks, power_of_2(-(-times // block_t)))
    else:
        n_c = min(n_blocks, power_of_2(-(-channels // block_c)))
    tile_c, tile_t = block_c * n_c, block_t * n_t
    strip = 1
    if kind == "gradients":
        strip = -(-min(times, max(STRIP_TIMES, STRIP // tile_c)) // tile_t)
    reach = max((tile_c - 1) * s[CHANNEL] + (tile_t - 1) * s[TIME] for s in (strides, *others) if s)
    plan = Plan(
        block_c, block_t, n_c, n_t, strip, channels % tile_c != 0, times % tile_t != 0, unit, fastest,
        tl.float64 if dtype == torch.float64 else tl.float32,
        tl.int32 if max(reach, channels, times) < 2**31 else tl.int64,
    )  # fmt: skip
    n_strips, n_groups = -(-times // (tile_t * strip)), 1
    if kind in ("outputs", "gradients"):
        n_groups = -(-channels // tile_c)
    steps = tuple(1 if i == fastest else encode(step // unit) for i, step in enumerate(strides))
    lengths = (size // unit if i == fastest else size for i, size in ((CHANNEL, channels), (TIME, times)))
    sizes = Sizes(*map(encode, (*lengths, n_strips, n_groups)), steps)
    return Call(sizes, batch * n_groups * n_strips, {"PLAN": plan, "num_warps": THREADS // WARP}, batch * n_strips)


def _in_channels(shape: torch.Size, strides: tuple[int, ...]) -> bool:
    """Tell whether channels are closer in memory than times; of one channel or one time the stride means nothing."""
    channel, time = (strides[i] if shape[i] > 1 else 0 for i in (CHANNEL, TIME))
    return channel == 1 if 1 in (channel, time) else 0 < channel < time


def _find_unit(dtype: torch.dtype, shape: torch.Size, strides: tuple[int, ...]) -> tuple[int, int]:
    """Return which dimension has stride 1, -1 for none, and how many elements can be moved at a time: what divides all
    other strides and the length along it. That of a batch counts for a single row too, which has it.
    """
    fastest = CHANNEL if _in_channels(shape, strides) else TIME
    if strides[fastest] != 1:
        return -1, 1
    other = CHANNEL + TIME - fastest
    steps = (strides[0], strides[other] if shape[other] > 1 else 0, shape[fastest])
    fits = max(steps) < 2**31  # multiplied by the unit in 32 bits
    units = (n for n in (8, 4, 2) if n * dtype.itemsize <= 16)
    return fastest, next((n for n in units if fits and not any(step % n for step in steps)), 1)


def _find_block(
    kind: str, dtype: torch.dtype, shape: torch.Size, strides: tuple[int, ...], unit: int
) -> tuple[tuple[int, int], int]:
    """Return the channels and times of a block, of four warps that load `unit` elements a thread, and how many blocks
    are loaded at once.
    """
    _batch, channels, times = shape
    n_blocks = min(16 if kind in ("project", "outputs") else 8, AT_ONCE[kind] // (unit * dtype.itemsize))
    if _in_channels(shape, strides):
        block_c = min(AT_MOST, WARP * unit, power_of_2(channels))
        return (block_c, min(THREADS * unit // block_c, power_of_2(times))), n_blocks
    # a thread has all channels of its times; sums over times stay in a warp, of a row of one channel or several
    run = (RUN if times < LONG else LONG_RUN) // dtype.itemsize
    block_t = min(min(AT_MOST, WARP * unit) if kind == "gradients" else run, power_of_2(times))
    return (min(THREADS * unit // block_t, power_of_2(channels)), block_t), n_blocks


def strided_like(t: Tensor | None, x: Tensor) -> Strided | None:
    """Return a tensor of x's shape as kernels take it: without strides where they are x's."""
    if t is None:
        return None
    same = all(a == b for a, b, size in zip(t.stride(), x.stride(), x.shape, strict=True) if size > 1)
    return Strided(t, () if same else t.stride())


def strided_rows(t: Tensor | None) -> Strided | None:
    """Return a tensor (batch, times) as kernels take it: without strides where it is contiguous."""
    return None if t is None else Strided(t, () if t.is_contiguous() else t.stride())


def new_numbers(x: Tensor, *shape: int) -> Tensor:
    """Return room for numbers of a shape in the dtype of arithmetic on x."""
    return x.new_empty(shape, dtype=acc_dtype(x))
