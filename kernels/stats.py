"""Statistics of streamed chunks, which are too long to stay on chip: mean, variance and 1/n, in one pass over x.

A chunk is cut into strips of fixed length, one a program, and a strip into the places of a block. Each place measures
from the mean of the first values it meets, so that differences stay small where the mean is large:

    rest = Σ (x - mean)/n      square = Σ (x - mean)² - n·rest²

which costs no more digits than a place has values. Places, then strips are merged in order, which costs none:

    Σ (x - mean)² = Σ_parts square + Σ_parts n_part·(mean_part - mean)²
"""

from __future__ import annotations

import triton
import triton.language as tl

from daam.kernels.call import Call
from daam.kernels.layout import Strided
from daam.kernels.tile import (
    added,
    along_chunk,
    at_of,
    chunk_numbers,
    convert,
    counted,
    first_tile,
    inverse_count,
    less,
    next_tile,
    only,
    positive,
    products,
    read_tile,
    spot_of,
    spread_of,
    store_numbers,
)


@triton.jit
def _merged(mean_of, rest_of, square_of, n_of):
    """mean, Σ (x - mean)² and n of every column, from those of parts of it (mean and rest); parts without a value are
    allowed. In fp64: they are few, and their errors would be those of the whole.
    """
    n_of, mean_of = n_of.to(tl.float64), mean_of.to(tl.float64) + rest_of.to(tl.float64)
    n = along_chunk(n_of)
    mean = along_chunk(mean_of * n_of) * inverse_count(n)
    away = tl.where(n_of > 0, mean_of - mean, 0.0)
    return mean, along_chunk(square_of.to(tl.float64) + n_of * away * away), n


@triton.jit
def _in_two(mean, ACC: tl.constexpr):
    """A mean as near as one number can be, and what that is short of."""
    whole = mean.to(ACC)
    return whole, (mean - whole).to(ACC)


@triton.jit
def _stats(
    x, mask, padding, strips, extent,
    ACC: tl.constexpr, INDEX: tl.constexpr,
    BLOCK_CHUNK: tl.constexpr, BLOCK_INNER: tl.constexpr, PARTS: tl.constexpr, RAGGED: tl.constexpr,
):  # fmt: skip
    """mean, rest, Σ (x - mean - rest)² and n of every chunk's strip of one tile's columns."""
    head, start, first_of, step, spot, apart = first_tile(extent, False)
    for _tile in range(first_of, extent.tiles, step):
        own = at_of(spot, head, start, extent, INDEX, BLOCK_CHUNK, BLOCK_INNER)
        mean = tl.zeros([BLOCK_CHUNK, BLOCK_INNER], ACC)
        total, square, n = mean, mean, mean
        for row in range(start, tl.minimum(start + extent.strip, extent.chunk), BLOCK_CHUNK * PARTS):
            _at, _inside, valid, _raw, xv = read_tile(
                x, mask, spot, head, row, extent, False, ACC, INDEX, BLOCK_CHUNK, BLOCK_INNER, PARTS, RAGGED
            )
            xv = counted(xv, padding)
            met = added(convert(valid, ACC))
            mean = tl.where(n == 0, added(xv) * inverse_count(met), mean)
            n += met
            d = only(valid, less(xv, mean))  # 0 - mean at a masked place would enter the sums
            total += added(d)
            square += products(d, d)
        rest = total * inverse_count(n)
        mean, square, n = _merged(mean, rest, positive(square - total * rest), n)
        mean, rest = _in_two(mean, ACC)
        store_strip(strips, extent, own, head, start, (mean, rest, square.to(ACC), n.to(ACC)))
        spot = next_tile(spot, apart, extent)


@triton.jit
def store_strip(strips, extent, at, head, start, numbers):
    """Numbers of the strip that begins at start."""
    first, far, ok = chunk_numbers(strips, extent, at, head)
    for i in tl.static_range(len(numbers)):
        tl.store(first + (i * extent.strips + start // extent.strip) * far, numbers[i], ok)


@triton.jit
def strip_numbers(strips, number, first, extent, at, head, BLOCK_CHUNK: tl.constexpr, other):
    """One number of the strips from the first on, [BLOCK_CHUNK, BLOCK_INNER]; `other` for those that are not there."""
    pointer, far, ok = chunk_numbers(strips, extent, at, head)
    places = first + tl.arange(0, BLOCK_CHUNK)[:, None]
    far = tl.cast(far, tl.int64)
    return tl.load(pointer + (number * extent.strips + places) * far, ok & (places < extent.strips), other)


@triton.jit
def _merge(
    strips, stats, eps, extent,
    UNBIASED: tl.constexpr, ACC: tl.constexpr, INDEX: tl.constexpr,
    BLOCK_CHUNK: tl.constexpr, BLOCK_INNER: tl.constexpr,
):  # fmt: skip
    """mean, rest, spread and 1/n of every chunk of one tile's columns; the mean is the sum of the first two."""
    head, spot = tl.program_id(1).to(tl.int64), spot_of(tl.program_id(0), extent)
    at = at_of(spot, head, 0, extent, INDEX, BLOCK_CHUNK, BLOCK_INNER)
    mean = tl.zeros([1, BLOCK_INNER], tl.float64)
    square, n = mean, mean
    for first in range(0, extent.strips, BLOCK_CHUNK):
        mean_of = strip_numbers(strips, 0, first, extent, at, head, BLOCK_CHUNK, 0.0)
        rest_of = strip_numbers(strips, 1, first, extent, at, head, BLOCK_CHUNK, 0.0)
        square_of = strip_numbers(strips, 2, first, extent, at, head, BLOCK_CHUNK, 0.0)
        n_of = strip_numbers(strips, 3, first, extent, at, head, BLOCK_CHUNK, 0.0)
        mean_block, square_block, n_block = _merged(mean_of, rest_of, square_of, n_of)
        apart = tl.where(n_block > 0, mean_block - mean, 0.0)
        n_before, n = n, n + n_block
        square += square_block + apart * apart * n_before * n_block * inverse_count(n)
        mean += apart * n_block * inverse_count(n)
    share = inverse_count(n)
    spread = spread_of(square, share, eps, UNBIASED)
    spread = tl.where(share > 0, spread if eps is None else 1.0 / spread, 0.0)
    mean, rest = _in_two(mean, ACC)
    store_numbers(stats, extent, at, head, (mean, rest, spread.to(ACC), share.to(ACC)))


@triton.jit
def _add(
    strips, sums, extent, COUNT: tl.constexpr,
    ACC: tl.constexpr, INDEX: tl.constexpr, BLOCK_CHUNK: tl.constexpr, BLOCK_INNER: tl.constexpr,
):  # fmt: skip
    """So many sums of every chunk of one tile's columns, from those of its strips."""
    head, spot = tl.program_id(1).to(tl.int64), spot_of(tl.program_id(0), extent)
    at = at_of(spot, head, 0, extent, INDEX, BLOCK_CHUNK, BLOCK_INNER)
    of_sums, far, ok = chunk_numbers(sums, extent, at, head)
    for number in tl.static_range(COUNT):
        total = tl.zeros([1, BLOCK_INNER], ACC)
        for first in range(0, extent.strips, BLOCK_CHUNK):
            total += along_chunk(strip_numbers(strips, number, first, extent, at, head, BLOCK_CHUNK, 0.0))
        tl.store(of_sums + number * far, total, ok)


def find_stats(
    call: Call, stats: Strided, eps: tuple[float, float] | None, padding: int | None = None, unbiased: bool = False
) -> None:
    """Fill stats with mean (in two parts), 1/(var + eps), or var where eps is None, and 1/n."""
    strips = call.of_strips(4)
    call.launch(_stats, call.programs, call.of.x, call.of.mask, padding, strips)
    call.launch_merge(_merge, strips, stats, eps, UNBIASED=unbiased)


def add_strips(call: Call, strips: Strided, count: int) -> Strided:
    """So many sums of each chunk, from those of its strips."""
    if call.extent.strips == 1:
        return strips
    sums = call.of_strips(count, strips=1)
    call.launch_merge(_add, strips, sums, COUNT=count)
    return sums
