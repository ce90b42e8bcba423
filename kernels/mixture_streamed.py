"""The mixture of densities over chunks that are streamed (`streamed.py`), by the formulas of `mixture.py`.

The least s of a chunk, and the sum of weights relative to it, take one more pass than statistics; then it has the scale
of its weights. Sums for the backward pass are of relative weights, so that their scale need not be known before.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

from .blocks import add_blocks, inverse_count, inverse_count_less_one, multiply_rounded
from .host import Backward, Call, Numbers
from .mixture_blocks import (
    FAR,
    Frame,
    Gaussian,
    Parameters,
    Settings,
    Sums,
    differentiate_padded,
    differentiate_x,
    find_frame,
    find_scale,
    load_gaussian,
    measure,
    minimum_of,
    sum_head,
    weigh_gaps,
)
from .operands import Strided, power_of_2
from .params import store_partials, zero_blocks
from .streamed import find_stats, load_strip_numbers, locate_chunks, store_strip_numbers
from .tile import (
    columns_inside,
    load_blocks,
    load_gradients,
    load_numbers,
    locate,
    place_tile,
    start_walk,
    store_numbers,
    view_of,
)


class Chunk(NamedTuple):
    """Hold what the tiles of a streamed chunk share, numbers [1, BLOCK_C] each, and the Gaussian."""

    gaussian: Gaussian
    frame: Frame
    mean_error: tl.tensor
    inv_var: tl.tensor
    min_s: tl.tensor
    scale: tl.tensor


class ChunkSums(NamedTuple):
    """Hold what the tiles of a streamed chunk share in the backward pass."""

    chunk: Chunk
    sums: Sums


@triton.jit
def mixture_scales(inputs, parameters, numbers, strips, extent, K: tl.constexpr, PLAN: tl.constexpr):
    """Store the least s of a strip of each chunk of one tile's columns, and the sum of the weights relative to it."""
    view = view_of(extent)
    walk = start_walk(view, True)
    gaussian = load_gaussian(parameters, walk.head, None, view, K, PLAN)
    position = locate(walk.index, walk.head, walk.strip_row, view, PLAN)
    mean, mean_error, inv_var = load_numbers(numbers.stats, walk.head, position, view, 3)
    frame = find_frame(gaussian, inv_var)
    # of every place in a block by itself: they are compared once, at the end
    min_s = tl.zeros([PLAN.BLOCK_P, PLAN.BLOCK_C], PLAN.ACC) + FAR
    total = tl.zeros([PLAN.BLOCK_P, PLAN.BLOCK_C], PLAN.ACC)
    end = tl.minimum(walk.strip_row + view.strip, view.chunk)
    for row in range(walk.strip_row, end, PLAN.BLOCK_P * PLAN.N_BLOCKS):
        tile = place_tile(inputs.mask, walk.index, walk.head, row, view, PLAN)
        _raw, x = load_blocks(inputs.x, inputs.mask, tile, view, False, PLAN)
        _f, s = measure([block - mean for block in x], mean_error, gaussian, frame, tile.valid)
        before, min_s = min_s, tl.minimum(min_s, minimum_of(s))
        more = add_blocks(weigh_gaps([min_s - block for block in s], frame.log2_factor, tile.valid))
        total = total * tl.exp2((min_s - before) * frame.log2_factor) + more
    least = tl.min(min_s, 0)[None, :]
    total = tl.sum(total * tl.exp2((least - min_s) * frame.log2_factor), 0)[None, :]
    store_strip_numbers(strips, walk, position, view, [least, total])


@triton.jit
def merge_scales(strips, parameters, numbers, settings, extent, K: tl.constexpr, PLAN: tl.constexpr):
    """Store the least s of every chunk of one tile's columns, in place of its 1/n, and the scale of its weights, if
    asked.
    """
    view, head = view_of(extent), tl.program_id(1).to(tl.int64)
    gaussian = load_gaussian(parameters, head, None, view, K, PLAN)
    position = locate_chunks(head, view, PLAN)
    mean, mean_error, inv_var = load_numbers(numbers.stats, head, position, view, 3)
    frame = find_frame(gaussian, inv_var)
    min_s, total = tl.zeros_like(inv_var) + FAR, tl.zeros_like(inv_var)
    for first in range(0, view.n_strips, PLAN.BLOCK_P):
        least = load_strip_numbers(strips, 0, first, head, position, view, FAR, PLAN)
        sums = load_strip_numbers(strips, 1, first, head, position, view, 0.0, PLAN)
        before, min_s = min_s, tl.minimum(min_s, tl.min(least, 0)[None, :])
        more = tl.sum(sums * tl.exp2((min_s - least) * frame.log2_factor), 0)[None, :]
        total = total * tl.exp2((min_s - before) * frame.log2_factor) + more
    total = tl.where(total == 0, 1.0, total)
    scale, _free = find_scale(total, min_s, frame, gaussian, settings.log2_eps)
    store_numbers(numbers.stats, head, position, view, [mean, mean_error, inv_var, min_s])
    if numbers.scales is not None:
        store_numbers(numbers.scales, head, position, view, [scale])


@triton.jit
def open_chunk(gaussian, numbers, head, position, view, _K: tl.constexpr, _PLAN: tl.constexpr):
    """Return (mean, chunk) for the forward pass."""
    mean, mean_error, inv_var, min_s = load_numbers(numbers.stats, head, position, view, 4)
    (scale,) = load_numbers(numbers.scales, head, position, view, 1)
    return mean, Chunk(gaussian, find_frame(gaussian, inv_var), mean_error, inv_var, min_s, scale)


@triton.jit
def weigh_chunk(centred, chunk, valid, _K: tl.constexpr):
    """Return the weights of every block."""
    _f, s = measure(centred, chunk.mean_error, chunk.gaussian, chunk.frame, valid)
    relative = weigh_gaps([chunk.min_s - block for block in s], chunk.frame.log2_factor, valid)
    return [block * chunk.scale for block in relative]


@triton.jit
def mixture_sums(inputs, parameters, padding, numbers, strips, extent, K: tl.constexpr, PLAN: tl.constexpr):
    """Store Σ h, Σ h·f, Σ h·u, Σ w, Σ w·f, Σ w·u and n of a strip of each chunk of one tile's columns, f being d - p, u
    the gaps, and w relative weights, so that their scale need not be known before.
    """
    view = view_of(extent)
    walk = start_walk(view, True)
    gaussian = load_gaussian(parameters, walk.head, None, view, K, PLAN)
    position = locate(walk.index, walk.head, walk.strip_row, view, PLAN)
    mean, mean_error, inv_var, min_s = load_numbers(numbers.stats, walk.head, position, view, 4)
    frame = find_frame(gaussian, inv_var)
    sum_h = tl.zeros([PLAN.BLOCK_P, PLAN.BLOCK_C], PLAN.ACC)
    sum_hf, sum_hu, sum_w, sum_wf, sum_wu, n = sum_h, sum_h, sum_h, sum_h, sum_h, sum_h
    end = tl.minimum(walk.strip_row + view.strip, view.chunk)
    for row in range(walk.strip_row, end, PLAN.BLOCK_P * PLAN.N_BLOCKS):
        tile = place_tile(inputs.mask, walk.index, walk.head, row, view, PLAN)
        _raw, x = load_blocks(inputs.x, inputs.mask, tile, view, False, PLAN)
        f, s = measure([block - mean for block in x], mean_error, gaussian, frame, tile.valid)
        gaps = [min_s - block for block in s]
        w = weigh_gaps(gaps, frame.log2_factor, tile.valid)
        h = differentiate_padded(load_gradients(inputs, tile, view, False, PLAN), x, padding)
        for i in tl.static_range(PLAN.N_BLOCKS):
            hw = h[i] * w[i]
            sum_h += hw
            sum_hf += hw * f[i]
            sum_hu += hw * gaps[i]
            sum_w += w[i]
            sum_wf += w[i] * f[i]
            sum_wu += w[i] * gaps[i]
        if inputs.mask is not None:
            n += add_blocks([valid.to(PLAN.ACC) for valid in tile.valid])
    if inputs.mask is None:
        n = tl.where(tl.arange(0, PLAN.BLOCK_P)[:, None] == 0, (end - walk.strip_row).to(PLAN.ACC), n)
    sums = [sum_h, sum_hf, sum_hu, sum_w, sum_wf, sum_wu, n]
    store_strip_numbers(strips, walk, position, view, [tl.sum(block, 0)[None, :] for block in sums])


@triton.jit
def merge_mixture_sums(strips, parameters, numbers, partials, settings, extent, K: tl.constexpr, PLAN: tl.constexpr):
    """Store the weights' scale, free·Σ h, Σ k·e/n and inv_var·(Σ k·e² + clamped·v)/(n - 1) of the chunks of one tile's
    columns.

    Strips are added in fp64. Sums of k are differences: where all weight is on one position nothing is left of them, if
    products are rounded there as they were in `mixture_sums`.
    """
    view, head = view_of(extent), tl.program_id(1).to(tl.int64)
    gaussian = load_gaussian(parameters, head, None, view, K, PLAN)
    position = locate_chunks(head, view, PLAN)
    _mean, _error, inv_var, min_s = load_numbers(numbers.stats, head, position, view, 4)
    frame, totals = find_frame(gaussian, inv_var), zero_blocks(7, 1, PLAN.BLOCK_C, tl.float64)
    for first in range(0, view.n_strips, PLAN.BLOCK_P):
        more = []
        for i in tl.static_range(7):
            strip = load_strip_numbers(strips, i, first, head, position, view, 0.0, PLAN).to(tl.float64)
            more = more + [totals[i] + tl.sum(strip, 0)[None, :]]
        totals = more
    sum_h, sum_hf, sum_hu, sum_w, sum_wf, sum_wu, n = [total.to(PLAN.ACC) for total in totals]
    total = tl.where(sum_w == 0, 1.0, sum_w)
    scale, free = find_scale(total, min_s, frame, gaussian, settings.log2_eps)
    all_h = sum_h * scale
    free_h, clamped = free * all_h, (1.0 - free) * all_h
    ke = scale * (sum_hf - multiply_rounded(free_h, sum_wf)) + clamped * (frame.origin - gaussian.m)
    kee = clamped * (min_s + frame.offset_cost) - scale * (sum_hu - multiply_rounded(free_h, sum_wu))
    inv_count = inverse_count(n)
    slope = kee * inv_var * inverse_count_less_one(inv_count)
    store_numbers(numbers.sums, head, position, view, [scale, free_h, ke * inv_count, slope])
    if partials is not None:
        inside = columns_inside(position, view) & (inv_count > 0)
        store_partials(partials, sum_head(ke, kee, clamped, inv_var, inside), head)


@triton.jit
def open_sums(gaussian, numbers, head, position, view, _K: tl.constexpr, _PLAN: tl.constexpr):
    """Return (mean, chunk) for the backward pass."""
    mean, mean_error, inv_var, min_s = load_numbers(numbers.stats, head, position, view, 4)
    scale, free_h, mean_ke, slope = load_numbers(numbers.sums, head, position, view, 4)
    chunk = Chunk(gaussian, find_frame(gaussian, inv_var), mean_error, inv_var, min_s, scale)
    return mean, ChunkSums(chunk, Sums(free_h, mean_ke, slope))


@triton.jit
def differentiate_tile(
    x, centred, chunk_sums, inputs, tile, view, padding, RAW: tl.constexpr, K: tl.constexpr, PLAN: tl.constexpr
):  # fmt: skip
    """Return (dx, grad_y as it came) of every block, and nothing for totals."""
    chunk, sums = chunk_sums.chunk, chunk_sums.sums
    weights = weigh_chunk(centred, chunk, tile.valid, K)
    gradients = load_gradients(inputs, tile, view, RAW, PLAN)
    h = differentiate_padded(gradients, x, padding)
    grad = differentiate_x(
        gradients, x, centred, chunk.mean_error, h, [], weights, sums, chunk.gaussian, chunk.inv_var, padding
    )  # fmt: skip
    return grad, gradients.raw, [], []


# --- On the host ----------------------------------------------------------------------------------


def find_numbers(call: Call, parameters: Parameters, settings: Settings, numbers: Numbers) -> None:
    """Fill the statistics of streamed chunks, and if there is room for it the scale of each chunk's weights."""
    k, strips = power_of_2(parameters.n), call.of_strips(2)
    find_stats(call, numbers.stats, settings.eps, settings.padding, unbiased=True)
    call.launch(mixture_scales, call.programs, call.inputs, parameters, numbers, strips, K=k)
    call.launch_merge(merge_scales, strips, parameters, numbers, settings, K=k)


def sum_chunks(
    run: Backward, call: Call, parameters: Parameters, settings: Settings, numbers: Numbers
) -> tuple[Strided, Strided | None]:  # fmt: skip
    """Return the sums of streamed chunks, and totals for the parameters, of a tile's columns each, if needed."""
    k, strips = power_of_2(parameters.n), call.of_strips(7)
    numbers, partials = numbers._replace(sums=call.of_strips(4, strips=1)), run.partials(call, 4, call.extent.n_tiles)
    call.launch(mixture_sums, call.programs, call.inputs, parameters, settings.padding, numbers, strips, K=k)
    call.launch_merge(merge_mixture_sums, strips, parameters, numbers, partials, settings, K=k)
    return numbers.sums, partials
