"""Which tiles a program takes, and where a tile stands.

A tile is N_BLOCKS blocks [BLOCK_P, BLOCK_C], one below the other: positions of BLOCK_C chunks, each a column. What has
an element for each of them is a list of blocks. Blocks are as wide as one load a thread, so that sums over a chunk
add registers first and cross lanes last, and so few that hardly any stand outside a chunk.

PLAN is `host.Constants`, view an `operands.Extent` decoded. Tensors come as `operands.Strided`,
or None.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from .operands import Extent


class TileIndex(NamedTuple):
    """Hold which tile of a head: outer place and block of columns; 32 bits: a 64-bit product is one instruction."""

    outer: tl.tensor
    block: tl.tensor


class Walk(NamedTuple):
    """Hold which program of a head this is, and what it takes: the tiles first_tile, first_tile + tile_step, … of a
    head, whose chunks have a length, and of each the strip of the chunk from strip_row up to strip_end, which may be
    none of a shorter head; the index of the first tile, and the step of an index.
    """

    program: tl.tensor
    head: tl.tensor
    length: tl.tensor
    strip_row: tl.tensor
    strip_end: tl.tensor
    first_tile: tl.tensor
    tile_step: tl.tensor
    index: TileIndex
    index_step: TileIndex


class Position(NamedTuple):
    """Hold where a tile stands: its outer place, its first row of the chunk, of the axis, its first column, all int64;
    the ranges that count on from there in a block; and in tensors of x's strides the offset of its first element, those
    of the first block from there, and the stride along the axis.
    """

    outer: tl.tensor
    row: tl.tensor
    axis_row: tl.tensor
    column: tl.tensor
    rows: tl.tensor
    columns: tl.tensor
    base: tl.tensor
    within: tl.tensor
    row_stride: tl.tensor


class Tile(NamedTuple):
    """Hold where a tile stands, which elements of its blocks are inside the chunk, and which of them are valid."""

    position: Position
    inside: list
    valid: list


@triton.jit
def view_of(extent, PLAN: tl.constexpr):
    """Return an Extent as it is, decoded: what should be known to be a multiple of PLAN.UNIT is multiplied by it."""
    strides = []
    for i in tl.static_range(len(extent.strides)):
        strides = strides + [1 if i == PLAN.FASTEST else (extent.strides[i] >> 1) * PLAN.UNIT]
    n_strips, strip = 1, 0
    if extent.n_strips is not None:
        n_strips, strip = extent.n_strips >> 1, (extent.strip >> 1) * (PLAN.BLOCK_P * PLAN.N_BLOCKS)
    UNIT_P: tl.constexpr = PLAN.UNIT if PLAN.FASTEST == 0 else 1
    UNIT_C: tl.constexpr = PLAN.UNIT if PLAN.FASTEST == 1 else 1
    chunk, inner = (extent.chunk >> 1) * UNIT_P, (extent.inner >> 1) * UNIT_C
    longest = chunk if extent.longest is None else (extent.longest >> 1) * UNIT_P
    if extent.n_strips is None and PLAN.RAGGED_P == 0:  # chunks fill their tiles: a number that compilers know
        chunk = PLAN.BLOCK_P * PLAN.N_BLOCKS
        longest = chunk
    sizes = [size >> 1 for size in extent.sizes]
    n_tiles, n_blocks = extent.n_tiles >> 1, extent.n_blocks >> 1
    # a number in place of None, which Triton 3.6 does not return in a record; nobody asks a view for it
    return Extent(sizes, strides, n_tiles, n_blocks, n_strips, strip, chunk, longest, inner, 0)


@triton.jit
def find_program(extent):
    """Return which program of a head this is: that of the grid, or the one whose turn it is (`whole.py`)."""
    return tl.program_id(0) if extent.program is None else extent.program


@triton.jit
def start_walk(extent, view, BACKWARDS: tl.constexpr):
    """Return this program's Walk. BACKWARDS: the grid's last program first, as what was read last may be cached."""
    head, program = tl.program_id(1), find_program(extent)
    if BACKWARDS and extent.program is None:
        head, program = tl.num_programs(1) - 1 - head, tl.num_programs(0) - 1 - program
    length = tl.where(head == tl.num_programs(1) - 1, view.longest, view.chunk)
    step = view.n_tiles if extent.program is not None else tl.num_programs(0) // view.n_strips
    first = program // view.n_strips
    strip_row = (program % view.n_strips).to(tl.int64) * view.strip
    strip_end = tl.maximum(strip_row, tl.minimum(strip_row + view.strip, length))
    head = head.to(tl.int64)
    index = TileIndex(first // view.n_blocks, first % view.n_blocks)
    index_step = TileIndex(step // view.n_blocks, step % view.n_blocks)
    return Walk(program, head, length, strip_row, strip_end, first, step, index, index_step)


@triton.jit
def next_tile(index, step, view):
    """Return the index of the program's next tile: a division a tile would cost more than the tile."""
    block = index.block + step.block
    over = block >= view.n_blocks
    return TileIndex(index.outer + step.outer + over.to(tl.int32), tl.where(over, block - view.n_blocks, block))


@triton.jit
def offsets_of(strides, view, outer, axis_row, column, rows, columns):
    """Return (base, within): the offset of a tile's first element, and those of its first block from there. A tensor
    that is the same for all columns has one stride less.
    """
    base, within = axis_row * strides[0], rows[:, None] * strides[0]
    if len(strides) > 1 + len(view.sizes):
        base += column * strides[1]
        within += columns[None, :] * strides[1]
    for i in tl.static_range(len(view.sizes)):
        stride = strides[(2 if len(strides) > 1 + len(view.sizes) else 1) + i]
        if i + 1 < len(view.sizes):
            base += (outer % view.sizes[i]) * stride
            outer = outer // view.sizes[i]
        else:
            base += outer * stride
    return base, within


@triton.jit
def locate(index, head, row, view, PLAN: tl.constexpr):
    """Return the Position of the tile that begins at a row of its chunk."""
    rows, columns = tl.arange(0, PLAN.BLOCK_P).to(PLAN.INDEX), tl.arange(0, PLAN.BLOCK_C).to(PLAN.INDEX)
    # an index of a loop is a plain int in the interpreter: hence cast
    outer, column = tl.cast(index.outer, tl.int64), tl.cast(index.block, tl.int64) * PLAN.BLOCK_C
    row = tl.cast(row, tl.int64)
    axis_row = head * view.chunk + row
    base, within = offsets_of(view.strides, view, outer, axis_row, column, rows, columns)
    return Position(outer, row, axis_row, column, rows, columns, base, within, view.strides[0])


@triton.jit
def pointers_of(t, position, view, PLAN: tl.constexpr):
    """Return the pointers of every block of a tile. How far they are apart is in the width of offsets in a tile."""
    base, within, row_stride = position.base, position.within, position.row_stride
    if len(t.strides) > 0:
        base, within = offsets_of(
            t.strides, view, position.outer, position.axis_row, position.column, position.rows, position.columns
        )
        row_stride = t.strides[0]
    if PLAN.N_BLOCKS == 1:
        return [t.data + base + within]
    # blocks are apart by one number for all threads, in a register that these share
    start, pointers = t.data + (base + within), []
    for i in tl.static_range(PLAN.N_BLOCKS):
        pointers = pointers + [start + tl.cast(row_stride, PLAN.INDEX) * (i * PLAN.BLOCK_P)]
    return pointers


@triton.jit
def columns_inside(position, view):
    """Return which columns of a tile are inside the inner dimension, [1, BLOCK_C]."""
    return (position.column + position.columns < view.inner)[None, :]


@triton.jit
def place_tile(mask, index, walk, row, view, RAGGED_P: tl.constexpr, PLAN: tl.constexpr):
    """Return the Tile that begins at a row of its chunk. Where sizes divide, the compiler sees it and drops the masks.

    Columns outside may be valid: they hold 0, reach no other column and are never stored, but sums over columns must
    leave them out.
    """
    position = locate(index, walk.head, row, view, PLAN)
    left = (walk.length - row).to(PLAN.INDEX)  # positions of the chunk from here on
    row_masks, inside = [], []
    for i in tl.static_range(PLAN.N_BLOCKS):
        row_mask = tl.full([1, 1], True, tl.int1)
        if i >= PLAN.N_BLOCKS - RAGGED_P:
            row_mask = (position.rows < left - i * PLAN.BLOCK_P)[:, None]
        row_masks = row_masks + [row_mask]
        if PLAN.RAGGED_C:
            inside = inside + [row_mask & (position.column + position.columns < view.inner)[None, :]]
        else:
            inside = inside + [row_mask]
    valid = row_masks
    if mask is not None:
        wanted = row_masks if len(mask.strides) == 1 + len(view.sizes) else inside
        pointers, valid = pointers_of(mask, position, view, PLAN), []
        for i in tl.static_range(PLAN.N_BLOCKS):
            valid = valid + [wanted[i] & (tl.load(pointers[i], wanted[i], 0) != 0)]
    return Tile(position, inside, valid)
