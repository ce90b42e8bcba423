"""Statistics of streamed chunks, which are too long to stay on chip: mean, variance and 1/n, in one pass over x.

Blocks of a chunk are merged in order by Chan's formula; with d = x - mean' for one mean' that all blocks share,

    Σ (x - mean)² = Σ_blocks Σ (d - rest_block)² + Σ_merges (rest_block - rest)²·n·n_block/(n + n_block)
"""

from __future__ import annotations

import triton
import triton.language as tl

from daam.kernels.call import Call
from daam.kernels.layout import Strided
from daam.kernels.tile import at_of, centre, chunk_numbers, counted, inverse_count, read_tile, spread_of


@triton.jit
def _stats(
    x, mask, padding, stats, eps, extent,
    UNBIASED: tl.constexpr, ACC: tl.constexpr, INDEX: tl.constexpr,
    BLOCK_CHUNK: tl.constexpr, BLOCK_INNER: tl.constexpr,
):  # fmt: skip
    """mean, rest, spread and 1/n of every chunk of one tile's columns; the mean is the sum of the first two.

    All blocks measure from one mean, that of the first that holds a valid position: differences stay small where the
    mean is large.
    """
    head, tile = tl.program_id(1).to(tl.int64), tl.program_id(0)
    mean = tl.zeros([BLOCK_INNER], ACC)
    rest, square, n = mean, mean, mean
    for row in range(0, extent.chunk, BLOCK_CHUNK):
        _at, _inside, valid, _raw, xv = read_tile(
            x, mask, tile, head, row, extent, ACC, INDEX, BLOCK_CHUNK, BLOCK_INNER
        )
        xv = counted(xv, padding)
        n_block = tl.sum(valid.to(ACC), 0)
        # selected before it is used: a product that enters several sums may be fused into some of them and not others
        mean = tl.where(n == 0, tl.sum(xv, 0) * inverse_count(n_block), mean)
        d, rest_block = centre(xv, valid, mean, inverse_count(n_block))
        apart = rest_block - rest
        n_before, n = n, n + n_block
        square += tl.sum(d * d, 0) + apart * apart * n_before * n_block * inverse_count(n)
        rest += apart * n_block * inverse_count(n)
    at = at_of(tile, head, 0, extent, INDEX, BLOCK_CHUNK, BLOCK_INNER)
    at_mean, step, ok = chunk_numbers(stats, extent, at, head)
    tl.store(at_mean, mean[None, :], ok)
    tl.store(at_mean + step, rest[None, :], ok)
    tl.store(at_mean + 2 * step, spread_of(square, inverse_count(n), eps, UNBIASED)[None, :], ok)
    tl.store(at_mean + 3 * step, inverse_count(n)[None, :], ok)


def find_stats(
    call: Call, stats: Strided, eps: tuple[float, float] | None, padding: int | None = None, unbiased: bool = False
) -> None:
    """Fill stats with mean (in two parts), 1/(var + eps), or var where eps is None, and 1/n."""
    call.launch(_stats, call.extent.tiles, call.of.x, call.of.mask, padding, stats, eps, UNBIASED=unbiased)
