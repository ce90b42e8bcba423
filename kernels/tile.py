"""What every kernel does with a tile: addresses, loads, parameters, centred statistics, outputs.

A tile is a tuple of PARTS blocks [BLOCK_CHUNK, BLOCK_INNER], one below the other: positions along one chunk x places
along the inner dimension, each column a chunk of its own. Blocks are as wide as one load a thread, so that sums along a
chunk add registers first and cross lanes last, and so few that hardly any stand outside a chunk. A tile stands `at`
(place, position, col, rows, cols, row, offsets, stride): the outer place, the first position along the axis and along
the inner dimension, all int64, the ranges that count on from there in a block, the first position within the chunk, and
x's offsets of its first block and stride along the axis, for all tensors that have x's strides. Tensors come as
`layout.Strided`, or None; extent is `layout.Extent`.
"""

import triton
import triton.language as tl

# --- Where a tile stands ------------------------------------------------------------------------


@triton.jit
def spot_of(tile, extent):
    """(outer place, block along the inner dimension) of a tile, 32 bits: a 64-bit product of two of them is one
    instruction.
    """
    return tile // extent.blocks, tile % extent.blocks


@triton.jit
def first_tile(extent, BACKWARDS: tl.constexpr):
    """This program's head, the first row of its strip of the chunk, its first tile and how far apart its tiles are,
    the first one's (place, block), and the step in these.

    BACKWARDS: the last program comes first, since what the kernel before read last is still in the cache.
    """
    head, program = tl.program_id(1), tl.program_id(0)
    if BACKWARDS:
        head, program = tl.num_programs(1) - 1 - head, tl.num_programs(0) - 1 - program
    step = tl.num_programs(0) // extent.strips
    first = program // extent.strips
    start = (program % extent.strips).to(tl.int64) * extent.strip
    return head.to(tl.int64), start, first, step, spot_of(first, extent), spot_of(step, extent)


@triton.jit
def next_tile(spot, apart, extent):
    """(place, block) of the program's next tile: a division a tile would cost more than the tile."""
    block = spot[1] + apart[1]
    over = block >= extent.blocks
    return spot[0] + apart[0] + over.to(tl.int32), tl.where(over, block - extent.blocks, block)


@triton.jit
def chunk_of(extent):
    """Positions of a chunk. What is a multiple of 8, but not of 16, comes in eighths: Triton looks for 16 only, and
    would load 16 bits at a time.
    """
    return extent.chunk if extent.chunk_eighths is None else extent.chunk_eighths * 8


@triton.jit
def stride_of(strides, i: tl.constexpr, extent, OF_X: tl.constexpr):
    """The i-th stride; of x in eighths too, but for the one that is 1."""
    if OF_X and extent.chunk_eighths is not None:
        return strides[i] * 8 if i != 0 else strides[i]
    elif OF_X and extent.inner_eighths is not None:
        return strides[i] * 8 if i != 1 else strides[i]
    else:
        return strides[i]


@triton.jit
def at_of(spot, head, row, extent, INDEX: tl.constexpr, BLOCK_CHUNK: tl.constexpr, BLOCK_INNER: tl.constexpr):
    """Where the tile stands that begins at `row` of its chunk. A loop's index is a plain int in the interpreter: hence
    cast.
    """
    rows, cols = tl.arange(0, BLOCK_CHUNK).to(INDEX), tl.arange(0, BLOCK_INNER).to(INDEX)
    place, col = tl.cast(spot[0], tl.int64), tl.cast(spot[1], tl.int64) * BLOCK_INNER
    row = tl.cast(row, tl.int64)
    return place, head * chunk_of(extent) + row, col, rows, cols, row


@triton.jit
def columns_inside(extent, at):
    """[1, BLOCK_INNER]."""
    inner = extent.inner if extent.inner_eighths is None else extent.inner_eighths * 8
    return (at[2] + at[4] < inner)[None, :]


@triton.jit
def rows_inside(extent, at, i: tl.constexpr, RAGGED: tl.constexpr):
    """Of the i-th block, [BLOCK_CHUNK, 1]. RAGGED: whether (rows, columns) of a tile may stand outside; where none may,
    the compiler sees it and drops the masks of loads and stores, and the selects.
    """
    if RAGGED[0]:
        return (at[5] + i * at[3].shape[0] + at[3] < chunk_of(extent))[:, None]
    else:
        return tl.full([1, 1], True, tl.int1)


@triton.jit
def inside_of(extent, at, PARTS: tl.constexpr, RAGGED: tl.constexpr):
    """Which of each block are elements of the chunk."""
    parts = ()
    for i in tl.static_range(PARTS):
        rows = rows_inside(extent, at, i, RAGGED)
        parts = parts + (rows & columns_inside(extent, at) if RAGGED[1] else rows,)
    return parts


@triton.jit
def offsets(strides, extent, at, OF_X: tl.constexpr):
    """Of the first block: of its first element, and of the others from there. A tensor that is the same along the inner
    dimension has one stride less, and one column.
    """
    place, offset = at[0], at[1] * stride_of(strides, 0, extent, OF_X)
    within = at[3][:, None] * stride_of(strides, 0, extent, OF_X)
    if len(strides) > 1 + len(extent.sizes):
        offset += at[2] * stride_of(strides, 1, extent, OF_X)
        within += at[4][None, :] * stride_of(strides, 1, extent, OF_X)
    for i in tl.static_range(len(extent.sizes)):
        stride = stride_of(strides, (2 if len(strides) > 1 + len(extent.sizes) else 1) + i, extent, OF_X)
        if i + 1 < len(extent.sizes):
            offset += (place % extent.sizes[i]) * stride
            place = place // extent.sizes[i]
        else:
            offset += place * stride
    return offset, within


@triton.jit
def blocks(t, extent, at, PARTS: tl.constexpr):
    """Pointers of every block of a tile. How far they are apart is in the width that offsets in a tile need."""
    first, within = at[6] if len(t.strides) == 0 else offsets(t.strides, extent, at, False)
    data = t.data + first
    stride = tl.cast(at[7] if len(t.strides) == 0 else t.strides[0], at[3].dtype)
    pointers = ()
    for i in tl.static_range(PARTS):
        pointers = pointers + (data + (within + stride * (i * at[3].shape[0])),)
    return pointers


@triton.jit
def load(t, extent, at, inside):
    """A tile as it is in memory, 0 outside."""
    pointers, parts = blocks(t, extent, at, len(inside)), ()
    for i in tl.static_range(len(inside)):
        parts = parts + (tl.load(pointers[i], inside[i], 0),)
    return parts


@triton.jit
def store(t, extent, at, inside, values):
    pointers = blocks(t, extent, at, len(inside))
    for i in tl.static_range(len(inside)):
        tl.store(pointers[i], values[i].to(t.data.dtype.element_ty), inside[i])


@triton.jit
def valid_in(mask, extent, at, inside, RAGGED: tl.constexpr):
    """Where a tile holds positions that count: inside the chunk, and True in the mask if there is one. [BLOCK_CHUNK, 1]
    where it is the same for all columns.

    Columns outside may be valid: they hold 0, reach no other column and are never stored, but sums over columns must
    leave them out.
    """
    parts = ()
    if mask is not None:
        pointers = blocks(mask, extent, at, len(inside))
    for i in tl.static_range(len(inside)):
        rows = rows_inside(extent, at, i, RAGGED)
        if mask is None:
            parts = parts + (rows,)
        elif len(mask.strides) == 1 + len(extent.sizes):
            parts = parts + (rows & (tl.load(pointers[i], rows, 0) != 0),)
        else:
            parts = parts + (inside[i] & (tl.load(pointers[i], inside[i], 0) != 0),)
    return parts


@triton.jit
def load_valid(t, mask, extent, at, inside, valid, ACC: tl.constexpr, RAW: tl.constexpr):
    """A tile as it came, and with 0 for what is not valid. Without RAW both may be the latter, and where all columns
    have one mask nothing else is loaded.
    """
    if mask is None:
        raw = convert(load(t, extent, at, inside), ACC)
        return raw, raw
    elif RAW or len(mask.strides) != 1 + len(extent.sizes):
        raw = convert(load(t, extent, at, inside), ACC)
        return raw, only(valid, raw)
    else:
        wanted = ()
        for i in tl.static_range(len(inside)):
            wanted = wanted + (inside[i] & valid[i],)
        raw = convert(load(t, extent, at, wanted), ACC)
        return raw, raw


@triton.jit
def read_tile(
    x, mask, spot, head, row, extent, RAW: tl.constexpr, ACC: tl.constexpr, INDEX: tl.constexpr,
    BLOCK_CHUNK: tl.constexpr, BLOCK_INNER: tl.constexpr, PARTS: tl.constexpr, RAGGED: tl.constexpr,
):  # fmt: skip
    """Where a tile stands (`at_of`), which of it is inside and valid, and x: as it came, if RAW, and with 0 for what is
    not valid.
    """
    at = at_of(spot, head, row, extent, INDEX, BLOCK_CHUNK, BLOCK_INNER)
    at = at + (offsets(extent.strides, extent, at, True), stride_of(extent.strides, 0, extent, True))
    inside = inside_of(extent, at, PARTS, RAGGED)
    valid = valid_in(mask, extent, at, inside, RAGGED)
    raw, values = load_valid(x, mask, extent, at, inside, valid, ACC, RAW)
    return at, inside, valid, raw, values


# --- Tuples of blocks ---------------------------------------------------------------------------


@triton.jit
def convert(values, ACC: tl.constexpr):
    parts = ()
    for i in tl.static_range(len(values)):
        parts = parts + (values[i].to(ACC),)
    return parts


@triton.jit
def only(valid, values):
    """0 for what is not valid."""
    parts = ()
    for i in tl.static_range(len(values)):
        parts = parts + (tl.where(valid[i], values[i], 0.0),)
    return parts


@triton.jit
def less(values, row):
    parts = ()
    for i in tl.static_range(len(values)):
        parts = parts + (values[i] - row,)
    return parts


@triton.jit
def added(values):
    """The sum of all blocks."""
    total = values[0]
    for i in tl.static_range(1, len(values)):
        total += values[i]
    return total


@triton.jit
def rounded_product(a, b):
    """a·b, rounded once wherever it is used. The compiler may fuse a plain product, unrounded, into one sum and not
    into another: what should cancel then leaves a rounding error, and lanes, or launches of other sizes, differ in the
    last bit. Adding 0 it may not leave out, since that makes 0 of -0.
    """
    return tl.fma(a, b, 0.0)


@triton.jit
def products(a, b):
    """The sum of a·b over all blocks."""
    total = rounded_product(a[0], b[0])
    for i in tl.static_range(1, len(a)):
        total = tl.fma(a[i], b[i], total)
    return total


@triton.jit
def along_chunk(block):
    """A block summed along the chunk, [1, BLOCK_INNER]."""
    return tl.sum(block, 0)[None, :]


# --- Numbers of a chunk -------------------------------------------------------------------------


@triton.jit
def chunk_numbers(t, extent, at, head):
    """Numbers of each column's chunk: pointers [1, BLOCK_INNER] to the first, distance to the next, which exist."""
    first, within = offsets(t.strides, extent, (at[0], head, at[2], tl.arange(0, 1), at[4]), False)
    return t.data + first + within, t.strides[len(extent.sizes) + 2], columns_inside(extent, at)


@triton.jit
def load_numbers(t, extent, at, head, COUNT: tl.constexpr):
    """So many numbers of each column's chunk, [1, BLOCK_INNER] each."""
    first, step, ok = chunk_numbers(t, extent, at, head)
    numbers = ()
    for i in tl.static_range(COUNT):
        numbers = numbers + (tl.load(first + i * step, ok, 0.0),)
    return numbers


@triton.jit
def store_numbers(t, extent, at, head, numbers):
    first, step, ok = chunk_numbers(t, extent, at, head)
    for i in tl.static_range(len(numbers)):
        tl.store(first + i * step, numbers[i], ok)


@triton.jit
def refined(inverse, x):
    """An approximate 1/x after one step of Newton's: right to its last bit, exact where 1/x is a power of two."""
    return tl.fma(inverse, tl.fma(-x, inverse, 1.0), inverse)


@triton.jit
def reciprocal(x):
    """1/x of positive x, refined; 0 of inf and inf of 0. A division takes two instructions more and is approximate."""
    root = tl.rsqrt(x)
    square = root * root
    inverse = refined(square, x)
    return tl.where(inverse > 0, inverse, square)


@triton.jit
def inverse_count(n):
    """1/n, refined, and 0 for columns with no valid position: what is wrong with it is wrong for a whole chunk."""
    divisor = tl.maximum(n, 1.0)
    return tl.where(n > 0, refined(1.0 / divisor, divisor), 0.0)


@triton.jit
def share_of(valid, mask, extent, ACC: tl.constexpr):
    """1/n of each column, n its valid positions; 0 where it has none."""
    if mask is None:
        return inverse_count(tl.zeros([1, 1], ACC) + extent.chunk)
    else:
        return inverse_count(along_chunk(added(convert(valid, ACC))))


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
        parts = ()
        for i in tl.static_range(len(x)):
            parts = parts + (tl.where(padded_in(x[i], padding), 0.0, x[i]),)
        return parts


@triton.jit
def positive(square):
    """At least 0, or NaN."""
    return tl.maximum(square, 0.0, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def spread_of(square, share, eps, UNBIASED: tl.constexpr):
    """var + eps, or var where eps is None, from the sum of squares."""
    variance = square * (share_less_one(share) if UNBIASED else share)
    return variance if eps is None else variance + (tl.cast(eps[0], square.dtype) + eps[1])


@triton.jit
def there(share, mask, values, other):
    """`other` for columns with no valid position: none of theirs reaches a result, whatever eps is."""
    return values if mask is None else tl.where(share > 0, values, other)


@triton.jit
def deviation(x, valid, mask, padding, extent, eps, UNBIASED: tl.constexpr, ACC: tl.constexpr):
    """d and rest, d - rest being x - mean over the valid positions of each column, 1/(var + eps), or var where eps is
    None, and 1/n, of a tile that holds whole chunks. d is 0 where x is not valid.

    A large mean is rounded by as much as small deviations measure: the mean of d, which it was short of, is the rest.
    """
    share = share_of(valid, mask, extent, ACC)
    counts = counted(x, padding)
    mean = along_chunk(added(counts)) * share
    d = only(valid, less(counts, mean))  # 0 - mean at a masked place would enter the sums
    total = along_chunk(added(d))
    rest = total * share
    square = positive(along_chunk(products(d, d)) - total * rest)
    if padding is not None:
        d = only(valid, less(x, mean))
    spread = spread_of(square, share, eps, UNBIASED)
    return d, rest, there(share, mask, spread if eps is None else reciprocal(spread), 0.0), share


# --- Parameters, gradients and outputs ----------------------------------------------------------


@triton.jit
def load_param(p, head, row, at, extent, other, ACC: tl.constexpr, VARIES: tl.constexpr, PARTS: tl.constexpr):
    """A (heads, P) parameter of one head, for each block of the tile that begins at `row` of its chunk in a shape that
    broadcasts against it; `other` fills the tile's rim. p has the strides (head, feature).
    """
    col, rows, cols = at[2], at[3], at[4]
    data = p.data + head * p.strides[0]
    parts = ()
    for i in tl.static_range(PARTS):
        if VARIES == "chunk":
            place = row + i * rows.shape[0] + rows
            value = tl.load(data + place * p.strides[1], place < chunk_of(extent), other).to(ACC)[:, None]
        elif VARIES == "inner":
            value = tl.load(data + (col + cols)[None, :] * p.strides[1], columns_inside(extent, at), other).to(ACC)
        else:
            value = tl.load(data + tl.zeros([1, 1], tl.int32)).to(ACC)
        parts = parts + (value,)
    return parts


@triton.jit
def gradients(grad_y, grad_weights, mask, extent, at, inside, valid, RAW: tl.constexpr, ACC: tl.constexpr):
    """grad_y as it came, if RAW, and both gradients with 0 for what is not valid; no tuple of grad_weights without
    them, 0 without grad_y.
    """
    if grad_y is None:
        raw = ()
        for _ in tl.static_range(len(inside)):
            raw = raw + (tl.zeros([1, 1], ACC),)
        values = raw
    else:
        raw, values = load_valid(grad_y, mask, extent, at, inside, valid, ACC, RAW)
    if grad_weights is None:
        return raw, values, ()
    else:
        return raw, values, load_valid(grad_weights, mask, extent, at, inside, valid, ACC, False)[1]


@triton.jit
def of_weights(gradient, x, padding):
    """What reaches the weights of positions that hold x, dL/dweights, from `gradients`."""
    parts = ()
    for i in tl.static_range(len(x)):
        h = gradient[1][i] * x[i]
        if padding is not None:
            h = tl.where(padded_in(x[i], padding), 0.0, h)
        parts = parts + (h if len(gradient[2]) == 0 else h + gradient[2][i],)
    return parts


@triton.jit
def write_outputs(y, weights, x, raw, w, padding, extent, at, inside, RESIDUAL: tl.constexpr):
    """y = x·w, or x where it is padding, and the weights where they are wanted."""
    parts = ()
    for i in tl.static_range(len(x)):
        out = x[i] * w[i]
        if padding is not None:
            out = tl.where(padded_in(x[i], padding), x[i], out)
        parts = parts + (out + raw[i] if RESIDUAL else out,)
    store(y, extent, at, inside, parts)
    if weights is not None:
        store(weights, extent, at, inside, w)


@triton.jit
def write_dx(dx, grad, raw, extent, at, inside, valid, RESIDUAL: tl.constexpr):
    """dx = grad where x is valid; raw is grad_y as it came."""
    parts = ()
    for i in tl.static_range(len(grad)):
        out = tl.where(valid[i], grad[i], 0.0)
        parts = parts + (out + raw[i] if RESIDUAL else out,)
    store(dx, extent, at, inside, parts)


# --- Sums over all chunks -----------------------------------------------------------------------


@triton.jit
def sum_to_one(numbers):
    """A row of numbers added, [1, 1]: carried through a loop as a row they crash LLVM's vectoriser (Triton 3.9)."""
    return tl.sum(numbers, 1)[:, None]


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
