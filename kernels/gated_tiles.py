"""Tiles of x (batch, channels, times) as the fused gate has them: how large they are, where they stand, what is moved.

A tile is N_C·N_T **blocks** [BLOCK_C, BLOCK_T] of one batch, N_C below each other along the channels or N_T beside each
other along the times: one of both numbers is 1. Blocks are as wide as one load a thread along the dimension that is
fastest in memory, and what a kernel sums over goes over a thread's registers first. **Columns** are numbers of a
channel, [BLOCK_C, 1], **rows** numbers of a time, [1, BLOCK_T]: a list of N_C, and one of N_T.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
import triton
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


class Place(NamedTuple):
    """Hold where a tile stands: its batch, first channel and first time, int64, and the ranges of a block from there,
    [BLOCK_C, 1] and [1, BLOCK_T].
    """

    batch: tl.tensor
    channel: tl.tensor
    time: tl.tensor
    channels: tl.tensor
    times: tl.tensor


class Tile(NamedTuple):
    """Hold where a tile stands, which of its channels and times are inside, and which times are valid: columns and
    rows.
    """

    place: Place
    channel_masks: list
    time_masks: list
    valid: list


# --- Where a tile stands --------------------------------------------------------------------------
@triton.jit
def decode(sizes, PLAN: tl.constexpr):
    """Return Sizes as they are: what should be known to be a multiple of PLAN.UNIT is multiplied by it."""
    strides = []
    for i in tl.static_range(3):
        strides = strides + [1 if i == PLAN.FASTEST else (sizes.strides[i] >> 1) * PLAN.UNIT]
    UNIT_C: tl.constexpr = PLAN.UNIT if PLAN.FASTEST == 1 else 1
    UNIT_T: tl.constexpr = PLAN.UNIT if PLAN.FASTEST == 2 else 1
    channels, times = (sizes.channels >> 1) * UNIT_C, (sizes.times >> 1) * UNIT_T
    return Sizes(channels, times, sizes.n_strips >> 1, sizes.n_groups >> 1, strides)


@triton.jit
def find_place(batch, channel, time, PLAN: tl.constexpr):
    """Return the Place of a tile."""
    channels, times = tl.arange(0, PLAN.BLOCK_C).to(PLAN.INDEX), tl.arange(0, PLAN.BLOCK_T).to(PLAN.INDEX)
    # an index of a loop is a plain int in the interpreter: hence cast
    channel, time = tl.cast(channel, tl.int64), tl.cast(time, tl.int64)
    return Place(batch, channel, time, channels[:, None], times[None, :])


@triton.jit
def first_place(sizes, PLAN: tl.constexpr):
    """Return the Place of this program's first tile: the next program takes the next times."""
    program = tl.program_id(0)
    strip, group = program % sizes.n_strips, program // sizes.n_strips
    batch = (group // sizes.n_groups).to(tl.int64)
    channel = (group % sizes.n_groups).to(tl.int64) * (PLAN.BLOCK_C * PLAN.N_C)
    time = strip.to(tl.int64) * (PLAN.BLOCK_T * PLAN.N_T * PLAN.STRIP)
    return find_place(batch, channel, time, PLAN)


@triton.jit
def mask_channels(place, sizes, PLAN: tl.constexpr):
    """Return which channels of a tile are inside, columns: a constant, which compilers see, where sizes divide."""
    masks, left = [], (sizes.channels - place.channel).to(PLAN.INDEX)
    for i in tl.static_range(PLAN.N_C):
        inside = tl.full([1, 1], True, tl.int1)
        if PLAN.RAGGED_C:
            inside = place.channels < left - i * PLAN.BLOCK_C
        masks = masks + [inside]
    return masks


@triton.jit
def open_tile(place, mask, sizes, PLAN: tl.constexpr):
    """Return the Tile of a place."""
    masks, left = [], (sizes.times - place.time).to(PLAN.INDEX)
    for i in tl.static_range(PLAN.N_T):
        inside = tl.full([1, 1], True, tl.int1)
        if PLAN.RAGGED_T:
            inside = place.times < left - i * PLAN.BLOCK_T
        masks = masks + [inside]
    valid = masks
    if mask is not None:
        pointers, valid = row_pointers(mask, place, sizes, PLAN), []
        for i in tl.static_range(PLAN.N_T):
            valid = valid + [masks[i] & (tl.load(pointers[i], masks[i], 0) != 0)]
    return Tile(place, mask_channels(place, sizes, PLAN), masks, valid)


@triton.jit
def move_tile(tile, channel, sizes, PLAN: tl.constexpr):
    """Return the Tile of other channels at the same times."""
    place = find_place(tile.place.batch, channel, tile.place.time, PLAN)
    return Tile(place, mask_channels(place, sizes, PLAN), tile.time_masks, tile.valid)


# --- What stands there ----------------------------------------------------------------------------
@triton.jit
def block_pointers(t, place, sizes, PLAN: tl.constexpr):
    """Return the pointers of every block of a tile. Blocks are apart by one number for all threads."""
    strides = sizes.strides
    if len(t.strides) > 0:
        strides = t.strides
    start = t.data + (place.batch * strides[0] + place.channel * strides[1] + place.time * strides[2])
    start = start + (place.channels * strides[1] + place.times * strides[2])
    down, across = tl.cast(strides[1], PLAN.INDEX), tl.cast(strides[2], PLAN.INDEX)
    pointers = []
    for k in tl.static_range(PLAN.N_T):
        for i in tl.static_range(PLAN.N_C):
            pointers = pointers + [start + (down * (i * PLAN.BLOCK_C) + across * (k * PLAN.BLOCK_T))]
    return pointers


@triton.jit
def mask_blocks(channel_masks, time_masks):
    """Return which elements of every block are inside, from columns and rows."""
    masks = []
    for k in tl.static_range(len(time_masks)):
        for i in tl.static_range(len(channel_masks)):
            masks = masks + [channel_masks[i] & time_masks[k]]
    return masks


@triton.jit
def load_blocks(t, tile, time_masks, sizes, PLAN: tl.constexpr):
    """Return the blocks of a tile, 0 outside and where the time masks, rows, are False."""
    pointers, masks = block_pointers(t, tile.place, sizes, PLAN), mask_blocks(tile.channel_masks, time_masks)
    loaded = []
    for i in tl.static_range(len(pointers)):
        loaded = loaded + [tl.load(pointers[i], masks[i], 0)]
    return [block.to(PLAN.ACC) for block in loaded]


@triton.jit
def load_valid(t, mask, tile, sizes, PLAN: tl.constexpr):
    """Return the blocks of a tile, 0 where not valid. Where a thread loads several times at once it loads all."""
    TOGETHER: tl.constexpr = mask is not None and PLAN.FASTEST == 2 and PLAN.UNIT > 1
    if TOGETHER:
        found, blocks = [], load_blocks(t, tile, tile.time_masks, sizes, PLAN)
        valid = mask_blocks(tile.channel_masks, tile.valid)
        for i in tl.static_range(len(blocks)):
            found = found + [tl.where(valid[i], blocks[i], 0.0)]
    else:
        found = load_blocks(t, tile, tile.valid, sizes, PLAN)
    return found


@triton.jit
def store_blocks(t, blocks, tile, sizes, PLAN: tl.constexpr):
    """Store the elements of a tile that are inside."""
    pointers, masks = block_pointers(t, tile.place, sizes, PLAN), mask_blocks(tile.channel_masks, tile.time_masks)
    for i in tl.static_range(len(pointers)):
        tl.store(pointers[i], blocks[i].to(t.data.dtype.element_ty), masks[i])


@triton.jit
def load_columns(t, tile, PLAN: tl.constexpr):
    """Return a number of each channel, columns."""
    columns = []
    for i in tl.static_range(PLAN.N_C):
        pointers = t.data + (tile.place.channel + i * PLAN.BLOCK_C + tile.place.channels) * t.strides[0]
        columns = columns + [tl.load(pointers, tile.channel_masks[i], 0).to(PLAN.ACC)]
    return columns


@triton.jit
def row_pointers(t, place, sizes, PLAN: tl.constexpr):
    """Return the pointers of rows of a tensor (batch, times)."""
    pointers = []
    for i in tl.static_range(PLAN.N_T):
        if len(t.strides) > 0:
            times = place.time + i * PLAN.BLOCK_T + place.times
            pointers = pointers + [t.data + (place.batch * t.strides[0] + times * t.strides[1])]
        else:
            start = place.batch * sizes.times + place.time
            pointers = pointers + [t.data + start + (i * PLAN.BLOCK_T + place.times)]
    return pointers


@triton.jit
def load_rows(t, tile, sizes, PLAN: tl.constexpr):
    """Return rows of a tensor (batch, times), 0 outside."""
    pointers, rows = row_pointers(t, tile.place, sizes, PLAN), []
    for i in tl.static_range(PLAN.N_T):
        rows = rows + [tl.load(pointers[i], tile.time_masks[i], 0).to(PLAN.ACC)]
    return rows


@triton.jit
def store_rows(t, rows, tile, sizes, PLAN: tl.constexpr):
    """Store rows of a tensor (batch, times)."""
    pointers = row_pointers(t, tile.place, sizes, PLAN)
    for i in tl.static_range(PLAN.N_T):
        tl.store(pointers[i], rows[i].to(t.data.dtype.element_ty), tile.time_masks[i])


# --- On the host ----------------------------------------------------------------------------------
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
