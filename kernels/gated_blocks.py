"""What the fused gate's kernels have of x (batch, channels, times): where a tile stands, its loads and stores.

A tile is N_C·N_T **blocks** [BLOCK_C, BLOCK_T] of one batch, N_C below each other along the channels or N_T beside each
other along the times: one of both numbers is 1. **Columns** are numbers of a channel, a list of N_C [BLOCK_C, 1],
**rows** numbers of a time, a list of N_T [1, BLOCK_T]. PLAN is `gated_tiles.Plan`; tensors come as `operands.Strided`,
without strides where they have x's, or of (batch, times) are contiguous.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from .gated_tiles import Sizes


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
def mask_range(numbers, left, N: tl.constexpr, BLOCK: tl.constexpr, RAGGED: tl.constexpr):
    """Return which numbers of N blocks are among those left: a constant, which compilers see, where sizes divide."""
    masks = []
    for i in tl.static_range(N):
        inside = tl.full([1, 1], True, tl.int1)
        if RAGGED:
            inside = numbers < left - i * BLOCK
        masks = masks + [inside]
    return masks


@triton.jit
def mask_channels(place, sizes, PLAN: tl.constexpr):
    """Return which channels of a tile are inside, columns."""
    left = (sizes.channels - place.channel).to(PLAN.INDEX)
    return mask_range(place.channels, left, PLAN.N_C, PLAN.BLOCK_C, PLAN.RAGGED_C)


@triton.jit
def open_tile(place, mask, sizes, PLAN: tl.constexpr):
    """Return the Tile of a place."""
    left = (sizes.times - place.time).to(PLAN.INDEX)
    masks = mask_range(place.times, left, PLAN.N_T, PLAN.BLOCK_T, PLAN.RAGGED_T)
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
    together: tl.constexpr = mask is not None and PLAN.FASTEST == 2 and PLAN.UNIT > 1
    if together:
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
