"""Chunks that are too long to stay on chip: walks over their strips, their statistics, and sums of strips.

A chunk is cut into strips of fixed length, one a program (or all, `whole.py`), and a strip into tiles: what kernels
here do is a walk over their tiles, `forward_streamed` and `backward_streamed` with an algorithm's own functions.
Statistics take one pass over x, but for the first tile of a strip. Each place of a block measures from the mean of the
first values it meets, so that differences stay small where the mean is large:

    mean_error = Σ (x - mean)/n      squares = Σ (x - mean)² - n·mean_error²

which costs no more digits than a place has values. Places, then strips are merged in order, which costs none:

    Σ (x - mean)² = Σ_parts squares + Σ_parts n_part·(mean_part - mean)²
"""

from __future__ import annotations

import triton
import triton.language as tl

from .blocks import add_blocks, inverse_count, inverse_count_less_one
from .host import Call
from .operands import Split, Strided
from .params import add_row_totals, store_totals, zero_totals
from .tile import float_of, load_blocks, number_pointers, store_dx, store_numbers, store_outputs, zero_padding
from .walk import TileIndex, find_program, locate, next_tile, place_tile, start_walk, view_of


@triton.jit(repr=lambda call: f"{call.constants['NAME']}_forward_streamed")
def forward_streamed(
    inputs, parameters, numbers, outputs, extent, PREPARE: tl.constexpr, OPEN: tl.constexpr,
    WEIGH: tl.constexpr, NAME: tl.constexpr, RESIDUAL: tl.constexpr, PLAN: tl.constexpr,
):  # fmt: skip
    """Store y and the weights of a strip of each chunk, with what PREPARE makes of the parameters, OPEN of that and the
    numbers of a chunk, as (mean, chunk), and WEIGH of x, its mean, a chunk, the padding value and what is valid.
    """
    view = view_of(extent, PLAN)
    walk = start_walk(extent, view, BACKWARDS=True)
    first = locate(walk.index, walk.head, walk.strip_row, view, PLAN)
    prepared = PREPARE(parameters, walk.head, first, view, PLAN)
    padding = None if inputs.padding is None else float_of(inputs.padding, PLAN.ACC)
    index = walk.index
    for _ in range(walk.first_tile, view.n_tiles, walk.tile_step):
        position = locate(index, walk.head, walk.strip_row, view, PLAN)
        mean, chunk = OPEN(prepared, numbers, walk.head, position, view, PLAN)
        for row in range(walk.strip_row, walk.strip_end, PLAN.BLOCK_P * PLAN.N_BLOCKS):
            tile = place_tile(inputs.mask, index, walk, row, view, PLAN.RAGGED_P, PLAN)
            raw, x = load_blocks(inputs.x, inputs.mask, tile, view, RESIDUAL, PLAN)
            weights = WEIGH(x, mean, chunk, padding, tile.valid)
            store_outputs(outputs, x, raw, weights, padding, tile, view, RESIDUAL, PLAN)
        index = next_tile(index, walk.index_step, view)


@triton.jit(repr=lambda call: f"{call.constants['NAME']}_backward_streamed")
def backward_streamed(
    inputs, parameters, numbers, dx, partials, extent, PREPARE: tl.constexpr, OPEN: tl.constexpr,
    DIFFERENTIATE: tl.constexpr, NAME: tl.constexpr, RESIDUAL: tl.constexpr, PLAN: tl.constexpr,
):  # fmt: skip
    """Store dx of a strip of each chunk, and where parameters vary along it their totals of this program.
    DIFFERENTIATE makes of x, its mean and a chunk (dx, grad_y as it came, he, e), the last two for the totals.
    """
    view = view_of(extent, PLAN)
    walk = start_walk(extent, view, BACKWARDS=True)
    first = locate(walk.index, walk.head, walk.strip_row, view, PLAN)
    prepared = PREPARE(parameters, walk.head, first, view, PLAN)
    padding = None if inputs.padding is None else float_of(inputs.padding, PLAN.ACC)
    totals = [] if partials is None else zero_totals(PLAN)
    index = walk.index
    for _ in range(walk.first_tile, view.n_tiles, walk.tile_step):
        position = locate(index, walk.head, walk.strip_row, view, PLAN)
        mean, chunk = OPEN(prepared, numbers, walk.head, position, view, PLAN)
        for row in range(walk.strip_row, walk.strip_end, PLAN.BLOCK_P * PLAN.N_BLOCKS):
            tile = place_tile(inputs.mask, index, walk, row, view, PLAN.RAGGED_P, PLAN)
            _raw, x = load_blocks(inputs.x, inputs.mask, tile, view, False, PLAN)
            grad, raw, he, e = DIFFERENTIATE(x, mean, chunk, inputs, padding, tile, view, RESIDUAL, PLAN)
            if dx is not None:
                store_dx(dx, grad, raw, tile, view, RESIDUAL, PLAN)
            if partials is not None:
                totals = add_row_totals(totals, he, e)
        index = next_tile(index, walk.index_step, view)
    if partials is not None:
        store_totals(partials, totals, walk, first, view, PLAN)


# --- Numbers of strips ----------------------------------------------------------------------------
@triton.jit
def store_strip_numbers(strips, walk, position, view, numbers):
    """Store numbers of this program's strip of each column's chunk."""
    pointers, distance, inside = number_pointers(strips, walk.head, position, view)
    for i in tl.static_range(len(numbers)):
        place = i * view.n_strips + walk.strip_row // view.strip
        tl.store(pointers + place * distance, numbers[i], inside)


@triton.jit
def load_strip_numbers(strips, number, first, head, position, view, default, PLAN: tl.constexpr):
    """Return one number of the strips from the first on, [BLOCK_P, BLOCK_C]; the default for absent ones."""
    pointers, distance, inside = number_pointers(strips, head, position, view)
    places = first + tl.arange(0, PLAN.BLOCK_P)[:, None]
    distance = tl.cast(distance, tl.int64)
    return tl.load(pointers + (number * view.n_strips + places) * distance, inside & (places < view.n_strips), default)


@triton.jit
def locate_chunks(head, extent, view, PLAN: tl.constexpr):
    """Return the Position of the chunks whose strips a program merges."""
    program = find_program(extent)
    return locate(TileIndex(program // view.n_blocks, program % view.n_blocks), head, 0, view, PLAN)


@triton.jit
def merge_strip_sums(strips, sums, extent, N: tl.constexpr, PLAN: tl.constexpr):
    """Store N sums of every chunk of one tile's columns, from those of its strips."""
    view, head = view_of(extent, PLAN), tl.program_id(1).to(tl.int64)
    position = locate_chunks(head, extent, view, PLAN)
    pointers, distance, inside = number_pointers(sums, head, position, view)
    for number in tl.static_range(N):
        total = tl.zeros([1, PLAN.BLOCK_C], PLAN.ACC)
        for first in range(0, view.n_strips, PLAN.BLOCK_P):
            total += tl.sum(load_strip_numbers(strips, number, first, head, position, view, 0.0, PLAN), 0)[None, :]
        tl.store(pointers + number * distance, total, inside)


def merge_sums(call: Call, strips: Strided, n: int) -> Strided:
    """Return n sums of each chunk, from those of its strips."""
    if call.extent.n_strips == 1 and not call.exchanges:
        return strips
    sums = call.of_strips(n, strips=1)
    call.launch_merge(merge_strip_sums, strips, sums, N=n)
    return sums


# --- Statistics -----------------------------------------------------------------------------------
@triton.jit
def merge_moments(mean, mean_error, squares, n):
    """Return mean, Σ (x - mean)² and n of every column from those of its parts, empty ones too; few, so in fp64."""
    n, mean = n.to(tl.float64), mean.to(tl.float64) + mean_error.to(tl.float64)
    total_n = tl.sum(n, 0)[None, :]
    total_mean = tl.sum(mean * n, 0)[None, :] * inverse_count(total_n)
    distance = tl.where(n > 0, mean - total_mean, 0.0)
    return total_mean, tl.sum(squares.to(tl.float64) + n * distance * distance, 0)[None, :], total_n


@triton.jit
def split_mean(mean, ACC: tl.constexpr):
    """Return a mean as near as one number can be, and what that is short of."""
    rounded = mean.to(ACC)
    return rounded, (mean - rounded).to(ACC)


@triton.jit
def count_met(walk, PLAN: tl.constexpr):
    """Return how many positions of a strip each row of places meets where there is no mask, [BLOCK_P, 1]."""
    left = (walk.strip_end - walk.strip_row).to(tl.int32) - tl.arange(0, PLAN.BLOCK_P)[:, None]
    return ((left + (PLAN.BLOCK_P - 1)) // PLAN.BLOCK_P).to(PLAN.ACC)


@triton.jit
def load_tile(inputs, index, walk, row, view, RAGGED_P: tl.constexpr, PLAN: tl.constexpr):
    """Return (x as statistics count it, valid) of every block of a tile, RAGGED_P blocks of which may end before."""
    tile = place_tile(inputs.mask, index, walk, row, view, RAGGED_P, PLAN)
    _raw, x = load_blocks(inputs.x, inputs.mask, tile, view, False, PLAN)
    padding = None if inputs.padding is None else float_of(inputs.padding, PLAN.ACC)
    return zero_padding(x, padding), tile.valid


@triton.jit
def find_first_mean(x, valid, ACC: tl.constexpr):
    """Return (mean, n) of what each place of a block meets in a tile."""
    n = add_blocks([block.to(ACC) for block in valid])
    return add_blocks(x) * inverse_count(n), n


@triton.jit
def add_differences(sums, x, valid, LATE: tl.constexpr):
    """Return mean, n, Σ (x - mean) and Σ (x - mean)² of every place, with those of one more tile. LATE: whether a place
    may meet its first values in any tile, so that mean and n are not known before.
    """
    mean, n, total, squares = sums
    if LATE:
        first_mean, met = find_first_mean(x, valid, mean.dtype)
        mean = tl.where(n == 0, first_mean, mean)
        n += met
    for i in tl.static_range(len(x)):
        difference = tl.where(valid[i], x[i] - mean, 0.0)  # 0 - mean at a masked place would enter the sums
        total += difference
        squares = tl.fma(difference, difference, squares)
    return [mean, n, total, squares]


@triton.jit
def strip_stats(inputs, strips, extent, PLAN: tl.constexpr):
    """Store mean, mean_error, Σ (x - mean - mean_error)² and n of a strip of each chunk."""
    view = view_of(extent, PLAN)
    walk = start_walk(extent, view, BACKWARDS=False)
    TILE: tl.constexpr = PLAN.BLOCK_P * PLAN.N_BLOCKS
    # a mask may leave a place without values in the first tile; where strips are one tile, it is not read twice
    LATE: tl.constexpr = inputs.mask is not None or PLAN.VARIES == "chunk"
    # without a mask, tiles inside the chunk need none of positions either; the last one has a turn of its own
    ALIKE: tl.constexpr = LATE or PLAN.RAGGED_P == 0
    end = walk.strip_end if ALIKE else walk.strip_row + (walk.strip_end - walk.strip_row) // TILE * TILE
    index = walk.index
    for _ in range(walk.first_tile, view.n_tiles, walk.tile_step):
        position = locate(index, walk.head, walk.strip_row, view, PLAN)
        zeros = tl.zeros([PLAN.BLOCK_P, PLAN.BLOCK_C], PLAN.ACC)
        mean, n = zeros, zeros
        if not LATE:  # the first tile is read twice: at once, so that only its statistics wait for it
            first_x, first_valid = load_tile(inputs, index, walk, walk.strip_row, view, PLAN.RAGGED_P, PLAN)
            mean, _met = find_first_mean(first_x, first_valid, PLAN.ACC)
            n += count_met(walk, PLAN)
        sums = [mean, n, zeros, zeros]
        for row in range(walk.strip_row, end, TILE):
            x, valid = load_tile(inputs, index, walk, row, view, PLAN.RAGGED_P if LATE else 0, PLAN)
            sums = add_differences(sums, x, valid, LATE)
        if not ALIKE and end < walk.strip_end:
            x, valid = load_tile(inputs, index, walk, end, view, PLAN.RAGGED_P, PLAN)
            sums = add_differences(sums, x, valid, LATE)
        mean, n, total, squares = sums
        mean_error = total * inverse_count(n)
        squares = tl.maximum(squares - total * mean_error, 0.0, propagate_nan=tl.PropagateNan.ALL)
        mean, squares, n = merge_moments(mean, mean_error, squares, n)
        mean, mean_error = split_mean(mean, PLAN.ACC)
        store_strip_numbers(strips, walk, position, view, [mean, mean_error, squares.to(PLAN.ACC), n.to(PLAN.ACC)])
        index = next_tile(index, walk.index_step, view)


@triton.jit
def merge_strip_stats(strips, stats, eps, extent, UNBIASED: tl.constexpr, PLAN: tl.constexpr):
    """Store mean, mean_error, 1/(var + eps), or var where eps is None, and 1/n of every chunk of one tile's columns."""
    view, head = view_of(extent, PLAN), tl.program_id(1).to(tl.int64)
    position = locate_chunks(head, extent, view, PLAN)
    mean = tl.zeros([1, PLAN.BLOCK_C], tl.float64)
    squares, n = mean, mean
    for first in range(0, view.n_strips, PLAN.BLOCK_P):
        parts = []
        for number in tl.static_range(4):
            parts = parts + [load_strip_numbers(strips, number, first, head, position, view, 0.0, PLAN)]
        mean_part, squares_part, n_part = merge_moments(parts[0], parts[1], parts[2], parts[3])
        distance = tl.where(n_part > 0, mean_part - mean, 0.0)
        n_before, n = n, n + n_part
        squares += squares_part + distance * distance * n_before * n_part * inverse_count(n)
        mean += distance * n_part * inverse_count(n)
    inv_count = inverse_count(n)
    variance = squares * (inverse_count_less_one(inv_count) if UNBIASED else inv_count)
    if eps is not None:
        variance = 1.0 / (variance + (tl.cast(eps.high, variance.dtype) + eps.low))
    variance = tl.where(inv_count > 0, variance, 0.0)
    mean, mean_error = split_mean(mean, PLAN.ACC)
    store_numbers(stats, head, position, view, [mean, mean_error, variance.to(PLAN.ACC), inv_count.to(PLAN.ACC)])


def find_stats(call: Call, eps: Split | None, unbiased: bool = False, padding: bool = True) -> Strided:
    """Return the statistics of the call, filled: mean, mean_error, 1/(var + eps), or var where eps is None, and 1/n.
    padding: whether it counts as zeros, else as it is.
    """
    strips, stats = call.of_strips(4), call.of_chunks(call.stats)
    call.launch(strip_stats, call.programs, call.inputs if padding else call.inputs._replace(padding=None), strips)
    call.launch_merge(merge_strip_stats, strips, stats, eps, UNBIASED=unbiased)
    return stats
