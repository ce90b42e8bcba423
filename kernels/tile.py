"""What every kernel does with a tile: addresses, loads, parameters, centred statistics, outputs.

A tile is [BLOCK_CHUNK, BLOCK_INNER]: positions along one chunk x places along the inner dimension, each column a chunk
of its own. It stands `at` (place, row, col, rows, cols): the outer place, the first position along the axis and along
the inner dimension, all int64, and the ranges that count on from there. Tensors come as `layout.Strided`, or None;
extent is `call.Extent`.
"""

import triton
import triton.language as tl


@triton.jit
def ranges(INDEX: tl.constexpr, BLOCK_CHUNK: tl.constexpr, BLOCK_INNER: tl.constexpr):
    return tl.arange(0, BLOCK_CHUNK).to(INDEX), tl.arange(0, BLOCK_INNER).to(INDEX)


@triton.jit
def at_of(
    tile, head, row, extent, INDEX: tl.constexpr, BLOCK_CHUNK: tl.constexpr, BLOCK_INNER: tl.constexpr
):  # fmt: skip
    """Where the part of a tile stands that begins at `row` of its chunk. A loop's index is a plain int in the
    interpreter: hence cast.
    """
    rows, cols = ranges(INDEX, BLOCK_CHUNK, BLOCK_INNER)
    tile, row = tl.cast(tile, tl.int64), tl.cast(row, tl.int64)
    return tile // extent.blocks, head * extent.chunk + row, tile % extent.blocks * BLOCK_INNER, rows, cols


@triton.jit
def columns_inside(extent, at):
    return at[2] + at[4] < extent.inner


@triton.jit
def inside_of(extent, row, at):
    """Where the tile that begins at `row` of its chunk holds elements of the chunk at all."""
    return (row + at[3] < extent.chunk)[:, None] & columns_inside(extent, at)[None, :]


@triton.jit
def pointers(t, sizes, at):
    """Pointers of the tile. sizes are those of the outer dimensions, the fastest first."""
    place, row, col, rows, cols = at
    offset = row * t.strides[0] + col * t.strides[1]
    for i in tl.static_range(len(sizes)):
        offset += (place % sizes[i]) * t.strides[2 + i]
        place = place // sizes[i]
    return t.data + offset + rows[:, None] * t.strides[0] + cols[None, :] * t.strides[1]


@triton.jit
def load(t, sizes, at, inside, ACC: tl.constexpr):
    """A tile in the dtype of the arithmetic, 0 outside."""
    return tl.load(pointers(t, sizes, at), inside, 0.0).to(ACC)


@triton.jit
def store(t, sizes, at, inside, values):
    tl.store(pointers(t, sizes, at), values.to(t.data.dtype.element_ty), inside)


@triton.jit
def valid_in(mask, sizes, at, inside):
    """Where a tile holds positions that count: inside, and True in the mask if there is one."""
    if mask is None:
        return inside
    else:
        return inside & (tl.load(pointers(mask, sizes, at), inside, 0) != 0)


@triton.jit
def first_tile(extent, BLOCK_CHUNK: tl.constexpr):
    """This program's head, its first tile, how far apart its tiles are, and the block of the chunk that it takes of
    each.
    """
    head, program = tl.program_id(1).to(tl.int64), tl.program_id(0).to(tl.int64)
    step = tl.num_programs(0) // extent.row_blocks
    return head, program // extent.row_blocks, step, program % extent.row_blocks * BLOCK_CHUNK


@triton.jit
def read_tile(
    x, mask, tile, head, row, extent,
    ACC: tl.constexpr, INDEX: tl.constexpr, BLOCK_CHUNK: tl.constexpr, BLOCK_INNER: tl.constexpr,
):  # fmt: skip
    """Where a tile stands (`at_of`), which of it is inside and valid, and x: as it came, and with 0 for what is not
    valid.
    """
    at = at_of(tile, head, row, extent, INDEX, BLOCK_CHUNK, BLOCK_INNER)
    inside = inside_of(extent, row, at)
    valid = valid_in(mask, extent.sizes, at, inside)
    raw = load(x, extent.sizes, at, inside, ACC)
    return at, inside, valid, raw, tl.where(valid, raw, 0.0)


@triton.jit
def chunk_numbers(t, extent, at, head):
    """Numbers of each column's chunk: pointers [1, BLOCK_INNER] to the first, distance to the next, which exist."""
    place, _row, col, _rows, cols = at
    first = pointers(t, extent.sizes, (place, head, col, tl.arange(0, 1), cols))
    return first, t.strides[len(extent.sizes) + 2], columns_inside(extent, at)[None, :]


@triton.jit
def load_param(p, head, row, at, extent, other, ACC: tl.constexpr, VARIES: tl.constexpr):
    """A (heads, P) parameter of one head in a shape that broadcasts against the tile that begins at `row` of its chunk;
    `other` fills the tile's rim. p has the strides (head, feature).
    """
    _place, _row, col, rows, cols = at
    data = p.data + head * p.strides[0]
    if VARIES == "chunk":
        return tl.load(data + (row + rows) * p.strides[1], row + rows < extent.chunk, other).to(ACC)[:, None]
    elif VARIES == "inner":
        return tl.load(data + (col + cols) * p.strides[1], columns_inside(extent, at), other).to(ACC)[None, :]
    else:
        return tl.load(data + tl.zeros([1, 1], tl.int32)).to(ACC)


@triton.jit
def inverse_count(n):
    """1/n, and 0 for columns with no valid position."""
    return tl.where(n > 0, 1.0 / tl.maximum(n, 1.0), 0.0)


@triton.jit
def share_of(valid, mask, extent, at, ACC: tl.constexpr):
    """1/n of each column, n its valid positions; 0 where it has none."""
    if mask is None:
        _place, _row, _col, _rows, cols = at
        return inverse_count(tl.where(columns_inside(extent, at), extent.chunk, tl.zeros_like(cols)).to(ACC))
    else:
        return inverse_count(tl.sum(valid.to(ACC), 0))


@triton.jit
def share_less_one(share):
    """1/(n - 1) from 1/n; 0 where n is 0 or 1."""
    many = share < 0.75
    return tl.where(many, share / (1.0 - tl.where(many, share, 0.0)), 0.0)


@triton.jit
def padded_in(x, padding):
    """Where x holds the padding value, which comes as the bits of an fp64 number: floats are passed as fp32."""
    return x == tl.cast(padding, tl.int64).to(tl.float64, bitcast=True).to(x.dtype)


@triton.jit
def counted(x, padding):
    """x as statistics count it: 0 at padded positions."""
    if padding is None:
        return x
    else:
        return tl.where(padded_in(x, padding), 0.0, x)


@triton.jit
def centre(x, valid, mean, share):
    """x - mean over the valid positions of each column and 0 elsewhere, and what the mean was short of.

    A large mean is rounded by as much as small deviations measure: the mean of x - mean takes that back.
    """
    # where: 0 - mean at a masked place would enter the sums
    d = tl.where(valid, x - mean[None, :], 0.0)
    rest = tl.sum(d, 0) * share
    return tl.where(valid, d - rest[None, :], 0.0), rest


@triton.jit
def spread_of(square, share, eps, UNBIASED: tl.constexpr):
    """1/(var + eps), or var where eps is None, from the sum of squares; 0 for columns with no valid position: none of
    theirs reaches a result, whatever eps is.
    """
    variance = square * (share_less_one(share) if UNBIASED else share)
    if eps is None:
        return variance
    else:
        return tl.where(share > 0, 1.0 / (variance + eps[0] + eps[1]), 0.0)


@triton.jit
def deviation(x, valid, mask, padding, stats, extent, at, head, eps, UNBIASED: tl.constexpr, ACC: tl.constexpr):
    """x - mean, the spread (`spread_of`) and the last number of each column's chunk: from the tile, which then holds
    whole chunks, where the last number is 1/n, or from what `stats.py` left.
    """
    if stats is None:
        share = share_of(valid, mask, extent, at, ACC)
        counts = counted(x, padding)
        mean = tl.sum(counts, 0) * share
        d, rest = centre(counts, valid, mean, share)
        spread = spread_of(tl.sum(d * d, 0), share, eps, UNBIASED)
        if padding is not None:
            d = tl.where(valid, (x - mean[None, :]) - rest[None, :], 0.0)
        return d, spread[None, :], share[None, :]
    else:
        at_mean, step, ok = chunk_numbers(stats, extent, at, head)
        d = (x - tl.load(at_mean, ok, 0.0)) - tl.load(at_mean + step, ok, 0.0)
        return d, tl.load(at_mean + 2 * step, ok, 0.0), tl.load(at_mean + 3 * step, ok, 0.0)


@triton.jit
def gradients(x, grad_y, grad_weights, padding, extent, at, inside, valid, ACC: tl.constexpr):
    """What reaches the weights, and grad_y as it came (0 where there is none)."""
    if grad_y is None:
        raw = tl.zeros_like(x)
        of_weights = tl.where(valid, load(grad_weights, extent.sizes, at, inside, ACC), 0.0)
    else:
        raw = load(grad_y, extent.sizes, at, inside, ACC)
        of_weights = tl.where(valid, raw, 0.0) * x
        if padding is not None:
            of_weights = tl.where(padded_in(x, padding), 0.0, of_weights)
        if grad_weights is not None:
            of_weights += tl.where(valid, load(grad_weights, extent.sizes, at, inside, ACC), 0.0)
    return of_weights, raw


@triton.jit
def write_outputs(y, weights, x, raw, w, padding, extent, at, inside, RESIDUAL: tl.constexpr):
    """y = x·w, or x where it is padding, and the weights where they are wanted."""
    out = x * w
    if padding is not None:
        out = tl.where(padded_in(x, padding), x, out)
    if RESIDUAL:
        out += raw
    store(y, extent.sizes, at, inside, out)
    if weights is not None:
        store(weights, extent.sizes, at, inside, w)


@triton.jit
def write_dx(dx, grad, raw, extent, at, inside, valid, RESIDUAL: tl.constexpr):
    """dx = grad where x is valid; raw is grad_y as it came."""
    grad = tl.where(valid, grad, 0.0)
    if RESIDUAL:
        grad += raw
    store(dx, extent.sizes, at, inside, grad)


@triton.jit
def sum_to_one(values):
    """[1, 1]. Along the chunk first: sums carried through a loop as a row crash LLVM's vectoriser (Triton 3.9)."""
    return tl.sum(tl.sum(values, 0)[None, :], 1)[:, None]


@triton.jit
def store_partials(partials, totals, head):
    """One program's sums, [1, 1] each, at (number, head, program)."""
    step = tl.cast(partials.strides[0], tl.int64)
    data = partials.data + head * partials.strides[1] + tl.program_id(0) + tl.zeros([1, 1], tl.int64)
    for i in tl.static_range(len(totals)):
        tl.store(data + i * step, totals[i])


@triton.jit
def sum_partials(partials, groups, number, head, BLOCK: tl.constexpr):
    """One number's partial sums of a head, added in fixed order and fp64."""
    columns = tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float64)
    data = partials.data + number * tl.cast(partials.strides[0], tl.int64) + head * partials.strides[1] + columns
    for start in range(0, groups, BLOCK):
        total += tl.load(data + start, start + columns < groups, 0.0).to(tl.float64)
    return tl.sum(total, 0)
