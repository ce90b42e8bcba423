"""How much of x a program holds: what fits on chip, in which tile, and how many programs there are.

What decides is the shape and the strides of x, never its batch: a contiguous batch equals its rows bit for bit.

- contiguous: chunks along the fastest dimension; one warp a row as long as it can hold it, longer ones more warps.
- strided: chunks along another one; one warp holds some neighbouring columns, and sums need no barrier.
- streamed: chunks too long for both, read again strip by strip, so that few long chunks still fill a GPU.

What decides within these is how many elements a thread can hold before registers spill (`Budget`).
"""

from __future__ import annotations

import bisect
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .budgets import ALONE, LONGEST_CONTIGUOUS, Budget
from .operands import SHORT, Layout, acc_dtype, axis_is_fastest, find_longest, inner_dim, power_of_2


@dataclass(frozen=True)
class Tile:
    """Hold what a program has in registers: n_blocks blocks, one below the other, of rows positions along the chunk x
    columns places along the inner dimension, and the warps it takes.
    """

    rows: int
    columns: int
    num_warps: int
    n_blocks: int = 1

    @property
    def length(self) -> int:
        """Return how many positions along the chunk it holds."""
        return self.rows * self.n_blocks


# --- The lengths that tiles are made for ----------------------------------------------------------
# A tile serves all chunks down to the next shorter one of these lengths, so that a training loop whose lengths change
# compiles few kernels: at most some quarter more is masked than in a tile of a chunk's own length. The authors' models
# have rows of 187 to 189, 750 and 937 positions, layers of an encoder are 12, 24 or 48, and one more.
ROWS = (
    1, 2, 3, 4, 8, 16, 32, 48, 64, 96, 128, 160, 192, 240, 320, 416, 512, 640, 768, 960, 1152, 1408, 1792, SHORT,
)  # fmt: skip
COLUMNS = (1, 2, 3, 4, 6, 8, 10, 12, 16, 20, 24, 32, 40, 52, 64, 80, 96, 128, 160, 192, 256)


def find_lengths(layout: Layout) -> tuple[int, int]:
    """Return (low, high): a tile made for chunks of high positions serves all that have more than low. Rows that have
    kernels of their own (`operands.ALIGNED`) have tiles of their own, and beyond the last of the tables there are eight
    lengths between a power of two and the next.
    """
    table = ROWS if layout.contiguous else COLUMNS
    if layout.contiguous and layout.unit > 1 and layout.longest <= SHORT:
        return layout.longest - 1, layout.longest
    i = bisect.bisect_left(table, layout.longest)
    if i < len(table):
        return table[i - 1] if i else 0, table[i]
    step = power_of_2(layout.longest) // 16
    high = -(-layout.longest // step) * step
    return high - step, high


def count_ragged(layout: Layout, tile: Tile) -> int:
    """Return how many blocks of a tile that holds whole chunks, the last ones, positions may stand outside of: as many
    as for the shortest chunks that it serves. Those of heads of unequal length may be shorter; they share the kernels
    of others but where masks cost much, columns of one thread and long rows.
    """
    low, high = find_lengths(layout)
    if layout.chunk == tile.length and (high in (low + 1, ALONE) or high > SHORT):
        return 0
    shortest, dear = low + 1, high > SHORT if layout.contiguous else high <= ALONE
    if layout.longest > layout.chunk or not (dear or high == low + 1):
        shortest = max(0, shortest - (layout.heads - 1))
    return tile.n_blocks - shortest // tile.rows


# --- The tile of a call -------------------------------------------------------------------------
def find_tile(
    budget: Budget, layout: Layout, streamed: bool, along: str, dtype: torch.dtype, mask: bool = False,
    weights: bool = False,
) -> Tile:  # fmt: skip
    """Return the tile of a call with a mask, or a gradient of weights, from what its pass can hold.

    along: what parameters vary along (`operands.varies`). Where that is the inner dimension, they shrink a tile to its
    size; otherwise a batch may be part of it and nothing does. Threads hold a quarter in fp64, where a value and all
    made of it take two registers. Where strides keep accesses narrow, elements of columns have addresses of their own:
    half, and a quarter if they are streamed, or have a mask or weights. Of rows, those with a mask or weights do: half.
    """
    divisor = 4 if dtype == torch.float64 else 1
    if layout.unit == 1:
        divisor *= (2 if mask or weights or streamed else 1) * (1 if layout.contiguous else 2)

    def shared(n: int) -> int:
        return max(1, n // divisor)

    _low, high = find_lengths(layout)
    if streamed:
        elements = budget.streamed_full if along == "chunk" else budget.streamed
        if (mask or weights) and dtype == torch.float32:  # which leaves no room for more
            elements //= 2
        tile = _streamed(shared(elements), shared(budget.streamed_vector), layout.contiguous)
    elif layout.contiguous:
        n_more = (mask or weights) + (along == "chunk")
        elements = (budget.contiguous, budget.contiguous_full, budget.contiguous_most)[n_more]
        # of loads that are of one element whatever a block holds, those of several short rows are too many at once
        narrow = layout.unit == 1
        together = min(budget.together, elements // 2 if narrow else elements)
        vector = 2 if narrow else budget.contiguous_vector
        # eight warps have 255 registers a thread and sixteen 128, which do not hold half as much
        if long := layout.longest > LONGEST_CONTIGUOUS:
            elements = budget.contiguous if along == "chunk" else budget.long
        tile = _contiguous(high, elements if long else shared(elements), shared(vector), shared(together))
    else:
        # fp32 moves twice the bytes an element: it has instructions to spare, and more warps hide more latency
        full = weights or dtype.itemsize > 2 or along == "chunk"
        elements = budget.strided_full if full else budget.strided_masked if mask else budget.strided
        limits = budget.strided_alone // divisor, shared(budget.strided_least_vector), shared(budget.strided_vector)
        tile = _strided(high, shared(elements), *limits)
        fits = min(elements, budget.strided_masked)
        if fits < high <= budget.longest_long and not (mask or weights or along == "chunk"):
            # lanes that share a chunk shuffle for every sum: few do where loads are narrow
            tile = _strided(high, shared(budget.strided_long), 0, shared(2), shared(2))
        elif high % tile.rows or layout.chunk < high == ALONE:  # which with masks would spill
            tile = _strided(high, shared(fits), *limits)
    if tile.num_warps > 16:  # fewer columns instead
        tile = replace(tile, columns=max(1, tile.columns * 16 // tile.num_warps), num_warps=16)
    return replace(tile, columns=min(tile.columns, power_of_2(layout.inner))) if along == "inner" else tile


def _contiguous(chunk: int, elements: int, vector: int, together: int) -> Tile:
    """Return a tile of one warp a row while it can hold it: a row spread over more costs a barrier a sum. Blocks are of
    as few positions as a warp loads at once: a row of 768 is three of them. Up to 32 short rows share a program, so
    that a thread has `together` elements.
    """
    vector = min(vector, elements)
    num_warps = power_of_2(-(-chunk // (32 * elements)))
    several = 2 if chunk > LONGEST_CONTIGUOUS else 4  # of long rows shorter blocks stand outside less
    least = max(min(16, power_of_2(chunk)), power_of_2(-(-chunk * min(several, vector) // elements)))
    sizes = [n for n in (least << k for k in range(8)) if n <= max(least, 32 * vector * num_warps)]
    rows = min(sizes, key=lambda n: (-(-chunk // n) * n, -n))
    n_blocks = -(-chunk // rows)
    columns = 32 * num_warps * together // (rows * n_blocks)
    return Tile(rows, min(32, _power_below(columns)), num_warps, n_blocks)


def _strided(chunk: int, elements: int, alone: int, least: int, most: int) -> Tile:
    """Return a tile of one warp, whose threads load `most` elements at a time, or less, down to `least`, where that
    leaves a chunk to fewer lanes: sums over it need no barrier, and for the shortest ones no other thread. A chunk up
    to `alone` is one thread's where that can hold two, and then has no more than 2·alone elements. Columns no fewer
    than 16, so that accesses stay whole sectors, with more warps where that takes them.
    """
    if chunk <= alone and 2 * chunk <= elements:
        elements, least = min(2 * alone, elements), 2
    vector = min(most, elements, max(least, _power_below(elements // chunk)))
    rows = power_of_2(-(-chunk * vector // elements))
    columns = max(16, 32 * vector // rows)
    return Tile(rows, columns, max(1, rows * columns // (32 * vector)), -(-chunk // rows))


def _streamed(elements: int, vector: int, contiguous: bool) -> Tile:
    """Return a tile of blocks of four warps, of a row, or 8 rows of 128 columns: of bf16 these are 256 bytes, as long a
    run as memory needs to be as fast as it can.
    """
    vector = min(vector, elements)
    rows, columns = (128 * vector, 1) if contiguous else (8, 16 * vector)
    return Tile(rows, columns, 4, elements // vector)


def _power_below(n: int) -> int:
    """Return the largest power of two that is not greater, 1 of 0."""
    return 1 << max(0, n.bit_length() - 1)


# --- Streamed chunks ----------------------------------------------------------------------------

STRIP_CONTIGUOUS, STRIP_STRIDED = 16_384, 512  # positions of a strip: its numbers are 16 bytes, 2 % of what it reads
STRIPS = 8  # merged at a time, in fp64: 16 of 128 columns spill with Triton 3.6


def find_strip(tile: Tile, layout: Layout, along: str) -> int:
    """Return the tiles of a streamed chunk that a program reads, one where parameters vary along it."""
    if along == "chunk":
        return 1
    return -(-(STRIP_CONTIGUOUS if layout.contiguous else STRIP_STRIDED) // tile.length)


def streams(
    budget: Budget, x: Tensor, axis: int, heads: int, feature_axis: int | None = None, masked: bool = False
) -> bool:
    """Tell whether chunks are too long to stay on chip between their statistics and their output: all of them where the
    longest, the last, is. Depends on nothing but x, the axis, what parameters follow, and whether there is a mask,
    which takes registers.
    """
    longest = budget.longest_strided
    if axis_is_fastest(x, axis, inner_dim(x, axis, feature_axis)):
        if masked or x.dtype == torch.float64:
            longest = budget.longest_masked
        else:
            longest = budget.longest_along if feature_axis == axis else budget.longest_contiguous
    return find_longest(x.shape[axis], heads) > (longest // 4 if x.dtype == torch.float64 else longest)


def find_registers(budget: Budget, layout: Layout, along: str, dtype: torch.dtype, full: bool) -> int | None:
    """Return how many registers a thread of streamed rows has at most, None where they would spill: of columns, with a
    mask or a gradient of the weights (full), with parameters that vary along the row, and in fp64.
    """
    spills = full or not layout.contiguous or along == "chunk" or dtype == torch.float64
    return None if spills else budget.streamed_registers


# Rows that a GPU works on at once where a program takes all steps of its own: four a multiprocessor of 132; and the
# bytes that L2 keeps for a second read. Both are an H200's (`bench/gpus.py`); an A100 gains as well, by the model.
AT_WORK, CACHE = 528, 40_000_000


def takes_whole(layout: Layout, moved: int) -> bool:
    """Tell whether one program takes all steps of a streamed row that has few registers (`whole.py`): where there are
    many, and what is moved between two reads of a position, at most half of what rows at work read and write, stays in
    L2. moved: bytes a position, in all tensors.
    """
    rows = layout.places * layout.inner * layout.heads
    return rows >= 2 * AT_WORK and AT_WORK * layout.longest * moved <= 2 * CACHE


def stats_shape(
    budget: Budget, x: Tensor, axis: int, heads: int, feature_axis: int | None = None, masked: bool = False
) -> tuple[int, ...] | None:
    """Return the shape of the statistics of streamed chunks, four numbers each; None where chunks stay on chip."""
    if not streams(budget, x, axis, heads, feature_axis, masked):
        return None
    return (4, *x.shape[:axis], heads, *x.shape[axis + 1 :])


def worth_keeping(x: Tensor, axis: int, heads: int) -> bool:
    """Tell whether a forward pass keeps streamed chunks' statistics: they save a pass over x, for 5 % of its bytes."""
    return 4 * acc_dtype(x).itemsize * 20 <= x.shape[axis] // heads * x.element_size()


# --- Programs -----------------------------------------------------------------------------------

MAX_PROGRAMS = 8192  # per head; beyond that programs take several tiles and load their parameters once
FILL = 1056  # warps that keep a large GPU (132 multiprocessors) busy


def count_programs(n_tiles: int, heads: int, num_warps: int, multiple: int = 1, tiles_each: int = 1) -> int:
    """Return a head's programs: about tiles_each tiles each where that fills the GPU, and a multiple of `multiple`."""
    each = max(1, min(tiles_each, n_tiles * heads * num_warps // FILL), -(-n_tiles // MAX_PROGRAMS))
    return min(n_tiles, -(-n_tiles // (each * multiple)) * multiple)


def index_bits(layout: Layout, tile: Tile) -> int:
    """Return 32, or 64 where an offset in one tile, or a length, can pass 2**31 - 1; those of whole tiles have 64."""
    strides = (t.strides[:2] for t in layout.operands if t is not None)
    reach = max((tile.length - 1) * along + (tile.columns - 1) * across for along, across in strides)
    return 32 if max(reach, layout.longest) < 2**31 else 64
