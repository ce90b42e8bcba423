"""What every kernel does with a tile: addresses, loads, parameters and centred statistics.

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
def place_of(tile, extent, BLOCK_INNER: tl.constexpr):
    """Outer place and first column of a tile. A loop's index is a plain int in the interpreter: hence cast."""
    tile = tl.cast(tile, tl.int64)
    return tile // extent.blocks, tile % extent.blocks * BLOCK_INNER


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
def centre(x, valid, mean, share):
    """x - mean over the valid positions of each column and 0 elsewhere, and what the mean was short of.

    A large mean is rounded by as much as small deviations measure: the mean of x - mean takes that back.
    """
    # where: 0 - mean at a masked place would enter the sums
    d = tl.where(valid, x - mean[None, :], 0.0)
    rest = tl.sum(d, 0) * share
    return tl.where(valid, d - rest[None, :], 0.0), rest


@triton.jit
def inverse_spread(square, share, eps):
    """1/(var + eps), and 0 for columns with no valid position: none of theirs reaches a result, whatever eps is."""
    return tl.where(share > 0, 1.0 / (square * share + eps[0] + eps[1]), 0.0)
