"""Where a tile stands, how it is loaded, and how it is stored.

A tile is N_BLOCKS blocks [BLOCK_P, BLOCK_C], one below the other: positions of BLOCK_C chunks, each a column. What has
an element for each of them is a list of blocks. Blocks are as wide as one load a thread, so that sums over a chunk
add registers first and cross lanes last, and so few that hardly any stand outside a chunk.

PLAN is `host.Constants`, view is the `View` of a call. Tensors come as `operands.Strided`, or None.
"""

from typing import NamedTuple

import triton
import triton.language as tl


class View(NamedTuple):
    """Hold what all tensors of a call look like: `operands.Extent`, with its eighths multiplied out."""

    sizes: tuple
    strides: tuple
    n_tiles: tl.tensor
    n_blocks: tl.tensor
    n_strips: tl.tensor
    strip: tl.tensor
    chunk: tl.tensor
    inner: tl.tensor


class TileIndex(NamedTuple):
    """Hold which tile of a head: its outer place, and its block of columns. 32 bits: a 64-bit product of two is one
    instruction.
    """

    outer: tl.tensor
    block: tl.tensor


class Walk(NamedTuple):
    """Hold what a program takes: the tiles first_tile, first_tile + tile_step, … of a head, and of each the strip of
    the chunk that begins at strip_row; the index of the first tile, and the step of an index.
    """

    head: tl.tensor
    strip_row: tl.tensor
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


class Gradients(NamedTuple):
    """Hold the blocks of grad_y as it came, of grad_y and of grad_weights with 0 where not valid; [] for none."""

    raw: list
    y: list
    weights: list


# --- Where a tile stands ------------------------------------------------------------------------


@triton.jit
def view_of(extent):
    """Return the View of an Extent. Triton looks for multiples of 16 only, and would load what is a multiple of 8 in
    16 bits at a time: such sizes and strides come in eighths, but for the stride that is 1.
    """
    chunk, inner, strides = extent.chunk, extent.inner, extent.strides
    if extent.chunk_eighths is not None:
        chunk = extent.chunk_eighths * 8
        strides = [extent.strides[0]] + [stride * 8 for stride in extent.strides[1:]]
    elif extent.inner_eighths is not None:
        inner = extent.inner_eighths * 8
        strides = [extent.strides[0] * 8, extent.strides[1]] + [stride * 8 for stride in extent.strides[2:]]
    return View(
        extent.sizes, strides, extent.n_tiles, extent.n_blocks, extent.n_strips, extent.strip, chunk, inner
    )  # fmt: skip


@triton.jit
def start_walk(view, BACKWARDS: tl.constexpr):
    """Return this program's Walk. BACKWARDS: the last program comes first, since what the kernel before read last is
    still in the cache.
    """
    head, program = tl.program_id(1), tl.program_id(0)
    if BACKWARDS:
        head, program = tl.num_programs(1) - 1 - head, tl.num_programs(0) - 1 - program
    step = tl.num_programs(0) // view.n_strips
    first = program // view.n_strips
    strip_row = (program % view.n_strips).to(tl.int64) * view.strip
    head = head.to(tl.int64)
    index = TileIndex(first // view.n_blocks, first % view.n_blocks)
    index_step = TileIndex(step // view.n_blocks, step % view.n_blocks)
    return Walk(head, strip_row, first, step, index, index_step)


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
def columns_inside(position, view):
    """Return which columns of a tile are inside the inner dimension, [1, BLOCK_C]."""
    return (position.column + position.columns < view.inner)[None, :]


@triton.jit
def place_tile(mask, index, head, row, view, PLAN: tl.constexpr):
    """Return the Tile that begins at a row of its chunk. Where sizes divide, the compiler sees it and drops the masks.

    Columns outside may be valid: they hold 0, reach no other column and are never stored, but sums over columns must
    leave them out.
    """
    position = locate(index, head, row, view, PLAN)
    row_masks, inside = [], []
    for i in tl.static_range(PLAN.N_BLOCKS):
        row_mask = tl.full([1, 1], True, tl.int1)
        if PLAN.RAGGED_P:
            row_mask = (position.row + i * PLAN.BLOCK_P + position.rows < view.chunk)[:, None]
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


# --- What stands there --------------------------------------------------------------------------


@triton.jit
def pointers_of(t, position, view, PLAN: tl.constexpr):
    """Return the pointers of every block of a tile. How far they are apart is in the width of offsets in a tile."""
    base, within, row_stride = position.base, position.within, position.row_stride
    if len(t.strides) > 0:
        base, within = offsets_of(
            t.strides, view, position.outer, position.axis_row, position.column, position.rows, position.columns
        )
        row_stride = t.strides[0]
    start, pointers = t.data + base, []
    for i in tl.static_range(PLAN.N_BLOCKS):
        pointers = pointers + [start + (within + tl.cast(row_stride, PLAN.INDEX) * (i * PLAN.BLOCK_P))]
    return pointers


@triton.jit
def load_blocks(t, mask, tile, view, RAW: tl.constexpr, PLAN: tl.constexpr):
    """Return (raw, blocks): a tile as it came, 0 outside, and with 0 for what is not valid. Without RAW both may be the
    latter, and where all columns have one mask nothing else is loaded.
    """
    SHARED: tl.constexpr = mask is not None and len(mask.strides) == 1 + len(view.sizes)
    pointers, loaded = pointers_of(t, tile.position, view, PLAN), []
    for i in tl.static_range(PLAN.N_BLOCKS):
        wanted = tile.inside[i] if RAW or not SHARED else tile.inside[i] & tile.valid[i]
        loaded = loaded + [tl.load(pointers[i], wanted, 0)]
    raw = [block.to(PLAN.ACC) for block in loaded]
    blocks = raw
    if mask is not None and (RAW or not SHARED):
        blocks = []
        for i in tl.static_range(PLAN.N_BLOCKS):
            blocks = blocks + [tl.where(tile.valid[i], raw[i], 0.0)]
    return raw, blocks


@triton.jit
def load_gradients(inputs, tile, view, RAW: tl.constexpr, PLAN: tl.constexpr):
    """Return the Gradients of a tile; grad_y is 0 where there is none."""
    raw = [tl.zeros([1, 1], PLAN.ACC) for _ in tile.inside]
    y, weights = raw, []
    if inputs.grad_y is not None:
        raw, y = load_blocks(inputs.grad_y, inputs.mask, tile, view, RAW, PLAN)
    if inputs.grad_weights is not None:
        _raw, weights = load_blocks(inputs.grad_weights, inputs.mask, tile, view, False, PLAN)
    return Gradients(raw, y, weights)


@triton.jit
def store_blocks(t, blocks, tile, view, PLAN: tl.constexpr):
    """Store the elements of a tile that are inside."""
    pointers = pointers_of(t, tile.position, view, PLAN)
    for i in tl.static_range(PLAN.N_BLOCKS):
        tl.store(pointers[i], blocks[i].to(t.data.dtype.element_ty), tile.inside[i])


@triton.jit
def store_outputs(outputs, x, raw, weights, tile, view, RESIDUAL: tl.constexpr, PLAN: tl.constexpr):
    """Store y = x·weights (+ x), and the weights where they are wanted."""
    y = []
    for i in tl.static_range(PLAN.N_BLOCKS):
        y = y + [x[i] * weights[i] + raw[i] if RESIDUAL else x[i] * weights[i]]
    store_blocks(outputs.y, y, tile, view, PLAN)
    if outputs.weights is not None:
        store_blocks(outputs.weights, weights, tile, view, PLAN)


@triton.jit
def is_padding(x, padding):
    """Tell where x holds the padding value, which comes as the bits of an fp64 number: floats are passed as fp32."""
    return x == tl.cast(padding, tl.int64).to(tl.float64, bitcast=True).to(x.dtype)


@triton.jit
def zero_padding(x, padding):
    """Return x as statistics count it: 0 at padded positions."""
    return x if padding is None else [tl.where(is_padding(block, padding), 0.0, block) for block in x]


@triton.jit
def store_padded_outputs(
    outputs, x, raw, weights, padding, tile, view, RESIDUAL: tl.constexpr, PLAN: tl.constexpr
):  # fmt: skip
    """Store y = x·weights (+ x), or x where it is padding, and the weights where they are wanted."""
    y = []
    for i in tl.static_range(PLAN.N_BLOCKS):
        gated = x[i] * weights[i]
        gated = tl.where(is_padding(x[i], padding), x[i], gated)
        y = y + [gated + raw[i] if RESIDUAL else gated]
    store_blocks(outputs.y, y, tile, view, PLAN)
    if outputs.weights is not None:
        store_blocks(outputs.weights, weights, tile, view, PLAN)


@triton.jit
def store_dx(dx, grad, raw, tile, view, RESIDUAL: tl.constexpr, PLAN: tl.constexpr):
    """Store dx = grad (+ grad_y, which is raw), with 0 for grad where x is not valid."""
    blocks = []
    for i in tl.static_range(PLAN.N_BLOCKS):
        direct = tl.where(tile.valid[i], grad[i], 0.0)
        blocks = blocks + [direct + raw[i] if RESIDUAL else direct]
    store_blocks(dx, blocks, tile, view, PLAN)


# --- Numbers of a chunk: tensors (n, …, heads, …) whose last stride leads to the next number ---------


@triton.jit
def number_pointers(t, head, position, view):
    """Return (pointers [1, BLOCK_C] to the first number of each column's chunk, the distance to the next, which are
    inside).
    """
    base, within = offsets_of(
        t.strides, view, position.outer, head, position.column, tl.arange(0, 1), position.columns
    )  # fmt: skip
    return t.data + base + within, t.strides[len(view.sizes) + 2], columns_inside(position, view)


@triton.jit
def load_numbers(t, head, position, view, N: tl.constexpr):
    """Return the first N numbers of each column's chunk, [1, BLOCK_C] each."""
    pointers, distance, inside = number_pointers(t, head, position, view)
    numbers = []
    for i in tl.static_range(N):
        numbers = numbers + [tl.load(pointers + i * distance, inside, 0.0)]
    return numbers


@triton.jit
def store_numbers(t, head, position, view, numbers):
    """Store numbers of each column's chunk."""
    pointers, distance, inside = number_pointers(t, head, position, view)
    for i in tl.static_range(len(numbers)):
        tl.store(pointers + i * distance, numbers[i], inside)
