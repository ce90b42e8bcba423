"""Mixture of densities (arXiv 2401.11143, Algorithm 2, as gaussian-adaptive-attention 0.1.5 has it), both passes.

A head's product of Gaussians is one Gaussian, whose numbers are made in the prologue of every program:

    a = Σ 1/c_k²      m = Σ (o_k/c_k²)/a      v = Σ ((o_k - m)²/c_k²)/a      l = Σ log(sqrt(2π)·|c_k|)

Over one chunk of length n, with d = x - mean, e = d - m and inv_var = 1/(var + eps), var unbiased and centred:

    log g = -(a·inv_var/2)·(e² + v) - l      weights = exp(log g - max(log Σ g, log eps))      y = x·weights (+ x)

    h = (grad_y·x + grad_weights)·weights      free = [log Σ g >= log eps]
    k = h - free·weights·Σ h                   clamped = (1 - free)·Σ h
    dx = grad_y·weights - a·inv_var·(k·e - Σ k·e/n - d·inv_var·(Σ k·e² + clamped·v)/(n - 1)) (+ grad_y)

and per head, summed over all chunks, δ_k being o_k - m:

    ke = Σ inv_var·Σ k·e      kee = Σ inv_var·(Σ k·e² + clamped·v)      cr = Σ inv_var·clamped      cl = Σ clamped
    d_mean_offset_k = (ke - δ_k·cr)/c_k²      d_c_k = (kee - 2δ_k·ke + (δ_k² - v)·cr)/c_k³ - cl/c_k

e² is taken as s + (m - p)², s = (d - p)·(d - q), q = 2m - p, where the origin p is m or, if that is further off, four
standard deviations: so far out, e² would round away what tells the positions apart. Positions that hold the padding
value count as zeros in mean and variance, so dx has neither sum there, and pass x through.

A chunk that fits on chip is read once. A longer one is streamed (`streamed.py`): its statistics, then the least s and
the sum of weights relative to it, in the backward pass its sums, then outputs, each a walk over its strips.
"""

from __future__ import annotations

import functools
import math
from functools import partial

import triton
import triton.language as tl
from torch import Tensor

from . import passes
from .algorithms import MIXTURE
from .blocks import add_products, find_h, inverse_count, inverse_count_less_one, multiply_rounded
from .host import Call, Numbers
from .mixture_blocks import (
    FAR,
    Chunk,
    Parameters,
    Settings,
    Sums,
    add_relative,
    add_weighted,
    centre_unpadded,
    count_rows,
    differentiate_x,
    find_excess,
    find_frame,
    find_scale,
    load_gaussian,
    load_moments,
    measure,
    merge_relative,
    merge_weighted,
    reduce_relative,
    sum_head,
    weigh,
    weigh_gaps,
)
from .operands import Split, Strided, power_of_2, split_float, strided_of
from .params import add_lists, load_entries, store_partials, zero_blocks
from .streamed import find_stats, locate_chunks, store_strip_numbers
from .tile import float_of, load_blocks, load_gradients, load_numbers, store_dx, store_numbers, store_outputs
from .walk import columns_inside, find_program, locate, next_tile, place_tile, start_walk, view_of


# --- Chunks on chip -------------------------------------------------------------------------------
@triton.jit
def weigh_on_chip(x, gaussian, padding, tile, mask, settings, length, _view, PLAN: tl.constexpr):
    """Return the weights of every block of a tile that holds whole chunks."""
    d, centred, inv_var = centre_unpadded(x, padding, tile, mask, settings.eps, length, PLAN.ACC)
    frame = find_frame(gaussian, inv_var)
    _f, s = measure(d, centred.mean_error, gaussian, frame, tile.valid)
    weights, _gaps, _min_s, _free = weigh(s, frame, gaussian, settings.log2_eps, tile.valid, centred.inv_count, mask)
    return weights


@triton.jit
def differentiate_on_chip(x, gradients, gaussian, padding, tile, mask, settings, length, PLAN: tl.constexpr):
    """Return (dx of every block but for the residual's part; Σ k·e, Σ k·e² + clamped·v, clamped, inv_var, 1/n)."""
    # the forward pass again
    h = find_h(gradients, x, padding)
    d, centred, inv_var = centre_unpadded(x, padding, tile, mask, settings.eps, length, PLAN.ACC)
    frame, inv_count = find_frame(gaussian, inv_var), centred.inv_count
    f, s = measure(d, centred.mean_error, gaussian, frame, tile.valid)
    weights, gaps, min_s, free = weigh(s, frame, gaussian, settings.log2_eps, tile.valid, inv_count, mask)
    # sums over the chunk of what reaches the weights
    sum_h = tl.sum(add_products(h, weights), 0)[None, :]
    free_h, clamped = free * sum_h, (1.0 - free) * sum_h
    k = find_excess(h, weights, free_h)
    kee = clamped * (min_s + frame.offset_cost) - tl.sum(add_products(k, gaps), 0)[None, :]
    ke = tl.sum(add_products(k, f), 0)[None, :] + clamped * (frame.origin - gaussian.m)
    sums = Sums(free_h, ke * inv_count, kee * inv_var * inverse_count_less_one(inv_count))
    grad = differentiate_x(
        gradients, x, d, centred.mean_error, f, frame, h, k, weights, sums, gaussian, inv_var, padding
    )  # fmt: skip
    return grad, ke, kee, clamped, inv_var, inv_count


@triton.jit
def mixture_forward(inputs, parameters, outputs, settings, extent, RESIDUAL: tl.constexpr, PLAN: tl.constexpr):
    """Store y and the weights."""
    view = view_of(extent, PLAN)
    walk = start_walk(extent, view, BACKWARDS=False)
    gaussian = load_gaussian(parameters, walk.head, None, view, PLAN)
    padding = None if inputs.padding is None else float_of(inputs.padding, PLAN.ACC)
    index = walk.index
    for _ in range(walk.first_tile, view.n_tiles, walk.tile_step):
        tile = place_tile(inputs.mask, index, walk, walk.strip_row, view, PLAN.RAGGED_P, PLAN)
        raw, x = load_blocks(inputs.x, inputs.mask, tile, view, RESIDUAL, PLAN)
        weights = weigh_on_chip(x, gaussian, padding, tile, inputs.mask, settings, walk.length, view, PLAN)
        store_outputs(outputs, x, raw, weights, padding, tile, view, RESIDUAL, PLAN)
        index = next_tile(index, walk.index_step, view)


@triton.jit
def mixture_backward(inputs, parameters, dx, partials, settings, extent, RESIDUAL: tl.constexpr, PLAN: tl.constexpr):
    """Store dx, and this program's sums ke, kee, cr and cl."""
    view = view_of(extent, PLAN)
    walk = start_walk(extent, view, BACKWARDS=False)
    gaussian = load_gaussian(parameters, walk.head, None, view, PLAN)
    padding = None if inputs.padding is None else float_of(inputs.padding, PLAN.ACC)
    totals = zero_blocks(4, 1, 1, PLAN.ACC)
    index = walk.index
    for _ in range(walk.first_tile, view.n_tiles, walk.tile_step):
        tile = place_tile(inputs.mask, index, walk, walk.strip_row, view, PLAN.RAGGED_P, PLAN)
        _raw, x = load_blocks(inputs.x, inputs.mask, tile, view, False, PLAN)
        gradients = load_gradients(inputs, tile, view, RESIDUAL, PLAN)
        grad, ke, kee, clamped, inv_var, inv_count = differentiate_on_chip(
            x, gradients, gaussian, padding, tile, inputs.mask, settings, walk.length, PLAN
        )  # fmt: skip
        if dx is not None:
            store_dx(dx, grad, gradients.raw, tile, view, RESIDUAL, PLAN)
        if partials is not None:
            inside = columns_inside(tile.position, view) & (inv_count > 0)
            totals = add_lists(totals, sum_head(ke, kee, clamped, inv_var, inside))
        index = next_tile(index, walk.index_step, view)
    if partials is not None:
        store_partials(partials, totals, walk.head, walk.program)


@triton.jit
def finish_gradients(totals, parameters, head, entries, inside, K: tl.constexpr):
    """Return the gradients of some Gaussians' parameters from ke, kee, cr and cl, in fp64: 1/c³ overflows fp32."""
    ke, kee, cr, cl = totals
    _scale, _inside, _a, m, v = load_moments(parameters, head, K, tl.float64)
    offset = load_entries(parameters.mean_offsets, head, entries, inside, 0.0) - m
    c = load_entries(parameters.c, head, entries, inside, 1.0)
    c_gradient = (kee - 2.0 * offset * ke + (offset * offset - v) * cr) / c / c / c - cl / c
    return (ke - offset * cr) / c / c, c_gradient


# --- Streamed chunks (`streamed.py`) --------------------------------------------------------------
# The least s of a chunk, and the sum of weights relative to it, take one more pass than statistics; then it has the
# scale of its weights. Sums for the backward pass are of relative weights: their scale need not be known before.


@triton.jit
def mixture_scales(inputs, parameters, numbers, strips, extent, PLAN: tl.constexpr):
    """Store the least s of a strip of each chunk of one tile's columns, and the sum of the weights relative to it."""
    view = view_of(extent, PLAN)
    walk = start_walk(extent, view, BACKWARDS=True)
    gaussian = load_gaussian(parameters, walk.head, None, view, PLAN)
    position = locate(walk.index, walk.head, walk.strip_row, view, PLAN)
    mean, mean_error, inv_var = load_numbers(numbers.stats, walk.head, position, view, 3)
    frame = find_frame(gaussian, inv_var)
    # of every place in a block by itself: they are compared once, at the end
    min_s = tl.zeros([PLAN.BLOCK_P, PLAN.BLOCK_C], PLAN.ACC) + FAR
    total = tl.zeros([PLAN.BLOCK_P, PLAN.BLOCK_C], PLAN.ACC)
    for row in range(walk.strip_row, walk.strip_end, PLAN.BLOCK_P * PLAN.N_BLOCKS):
        tile = place_tile(inputs.mask, walk.index, walk, row, view, PLAN.RAGGED_P, PLAN)
        _raw, x = load_blocks(inputs.x, inputs.mask, tile, view, False, PLAN)
        _f, s = measure([block - mean for block in x], mean_error, gaussian, frame, tile.valid)
        min_s, total = add_relative(min_s, total, s, frame.log2_factor, tile.valid)
    store_strip_numbers(strips, walk, position, view, reduce_relative(min_s, total, frame.log2_factor))


@triton.jit
def merge_scales(strips, parameters, numbers, settings, extent, PLAN: tl.constexpr):
    """Store the least s of every chunk of one tile's columns, in place of its 1/n, and the scale of its weights."""
    view, head = view_of(extent, PLAN), tl.program_id(1).to(tl.int64)
    gaussian = load_gaussian(parameters, head, None, view, PLAN)
    position = locate_chunks(head, extent, view, PLAN)
    mean, mean_error, inv_var = load_numbers(numbers.stats, head, position, view, 3)
    frame = find_frame(gaussian, inv_var)
    min_s, total = merge_relative(strips, frame.log2_factor, head, position, view, PLAN)
    total = tl.where(total == 0, 1.0, total)
    scale, _free = find_scale(total, min_s, frame, gaussian, settings.log2_eps)
    store_numbers(numbers.stats, head, position, view, [mean, mean_error, inv_var, min_s])
    store_numbers(numbers.scales, head, position, view, [scale])


@triton.jit
def open_chunk(gaussian, numbers, head, position, view, _PLAN: tl.constexpr):
    """Return (mean, chunk), with the sums where numbers have them."""
    mean, mean_error, inv_var, min_s = load_numbers(numbers.stats, head, position, view, 4)
    if numbers.sums is None:
        (scale,) = load_numbers(numbers.scales, head, position, view, 1)
        sums = []
    else:
        scale, free_h, mean_ke, slope = load_numbers(numbers.sums, head, position, view, 4)
        sums = Sums(free_h, mean_ke, slope)
    return mean, Chunk(gaussian, find_frame(gaussian, inv_var), mean_error, inv_var, min_s, scale, sums)


@triton.jit
def weigh_centred(centred, chunk, valid):
    """Return (f, weights) of every block."""
    f, s = measure(centred, chunk.mean_error, chunk.gaussian, chunk.frame, valid)
    relative = weigh_gaps([chunk.min_s - block for block in s], chunk.frame.log2_factor, valid)
    return f, [block * chunk.scale for block in relative]


@triton.jit
def weigh_chunk(x, mean, chunk, _padding, valid):
    """Return the weights of every block."""
    _f, weights = weigh_centred([block - mean for block in x], chunk, valid)
    return weights


@triton.jit
def mixture_sums(inputs, parameters, numbers, strips, extent, PLAN: tl.constexpr):
    """Store Σ h, Σ h·f, Σ h·u, Σ w, Σ w·f, Σ w·u and n of a strip of each chunk of one tile's columns, f being d - p, u
    the gaps, and w relative weights, so that their scale need not be known before.
    """
    view = view_of(extent, PLAN)
    walk = start_walk(extent, view, BACKWARDS=True)
    gaussian = load_gaussian(parameters, walk.head, None, view, PLAN)
    position = locate(walk.index, walk.head, walk.strip_row, view, PLAN)
    mean, mean_error, inv_var, min_s = load_numbers(numbers.stats, walk.head, position, view, 4)
    frame = find_frame(gaussian, inv_var)
    padding = None if inputs.padding is None else float_of(inputs.padding, PLAN.ACC)
    sums = zero_blocks(7, PLAN.BLOCK_P, PLAN.BLOCK_C, PLAN.ACC)
    for row in range(walk.strip_row, walk.strip_end, PLAN.BLOCK_P * PLAN.N_BLOCKS):
        tile = place_tile(inputs.mask, walk.index, walk, row, view, PLAN.RAGGED_P, PLAN)
        _raw, x = load_blocks(inputs.x, inputs.mask, tile, view, False, PLAN)
        f, s = measure([block - mean for block in x], mean_error, gaussian, frame, tile.valid)
        gaps = [min_s - block for block in s]
        w = weigh_gaps(gaps, frame.log2_factor, tile.valid)
        h = find_h(load_gradients(inputs, tile, view, False, PLAN), x, padding)
        sums = add_weighted(sums, h, w, f, gaps, tile.valid, inputs.mask)
    sums = count_rows(sums, walk, inputs.mask, PLAN)
    store_strip_numbers(strips, walk, position, view, [tl.sum(block, 0)[None, :] for block in sums])


@triton.jit
def merge_mixture_sums(strips, parameters, numbers, partials, settings, extent, PLAN: tl.constexpr):
    """Store the weights' scale, free·Σ h, Σ k·e/n and inv_var·(Σ k·e² + clamped·v)/(n - 1) of the chunks of one tile's
    columns.

    Strips are added in fp64. Sums of k are differences: where all weight is on one position nothing is left of them, if
    products are rounded there as they were in `mixture_sums`.
    """
    view, head = view_of(extent, PLAN), tl.program_id(1).to(tl.int64)
    gaussian = load_gaussian(parameters, head, None, view, PLAN)
    position = locate_chunks(head, extent, view, PLAN)
    _mean, _error, inv_var, min_s = load_numbers(numbers.stats, head, position, view, 4)
    frame = find_frame(gaussian, inv_var)
    sum_h, sum_hf, sum_hu, sum_w, sum_wf, sum_wu, n = merge_weighted(strips, head, position, view, PLAN)
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
        store_partials(partials, sum_head(ke, kee, clamped, inv_var, inside), head, find_program(extent))


@triton.jit
def differentiate_tile(x, mean, chunk, inputs, padding, tile, view, RAW: tl.constexpr, PLAN: tl.constexpr):
    """Return (dx, grad_y as it came) of every block, and nothing for totals."""
    d, gradients = [block - mean for block in x], load_gradients(inputs, tile, view, RAW, PLAN)
    f, weights = weigh_centred(d, chunk, tile.valid)
    h = find_h(gradients, x, padding)
    grad = differentiate_x(
        gradients, x, d, chunk.mean_error, f, chunk.frame, h, [], weights, chunk.sums, chunk.gaussian, chunk.inv_var,
        padding,
    )  # fmt: skip
    return grad, gradients.raw, [], []


# --- On the host ----------------------------------------------------------------------------------
def _collect(
    call: Call, mean_offsets: Tensor, c: Tensor, eps: float, _padding: float | None
) -> tuple[Parameters, Settings]:  # fmt: skip
    """Return the parameters and the settings as kernels take them."""
    return Parameters(strided_of(mean_offsets), strided_of(c), c.shape[1]), _find_settings(eps)


@functools.lru_cache
def _find_settings(eps: float) -> Settings:
    """Return eps and its logarithm as kernels take them."""
    log2_eps = split_float(math.log2(eps)) if eps > 0 else Split(-math.inf, 0.0)
    return Settings(split_float(eps), log2_eps)


def _find_numbers(call: Call, parameters: Parameters, settings: Settings) -> Numbers:
    """Return the statistics of streamed chunks, and the scale of each chunk's weights."""
    stats, strips = find_stats(call, settings.eps, unbiased=True), call.of_strips(2)
    numbers = Numbers(stats, call.of_strips(1, strips=1))
    call.launch(mixture_scales, call.programs, call.inputs, parameters, Numbers(stats), strips)
    call.launch_merge(merge_scales, strips, parameters, numbers, settings)
    return numbers


def _sum_chunks(
    call: Call, parameters: Parameters, settings: Settings, numbers: Numbers
) -> tuple[Strided, Strided | None]:  # fmt: skip
    """Return the sums of streamed chunks, and totals for the parameters, of a tile's columns each, if needed."""
    strips, partials = call.of_strips(7), call.partials(4, call.extent.n_tiles)
    numbers = numbers._replace(sums=call.of_strips(4, strips=1))
    call.launch(mixture_sums, call.programs, call.inputs, parameters, numbers, strips)
    call.launch_merge(merge_mixture_sums, strips, parameters, numbers, partials, settings)
    return numbers.sums, partials


KERNELS = passes.Kernels(
    MIXTURE,
    gaussians=power_of_2,
    n_sums=lambda _n_params: 4,
    n_entry_sums=4,
    sum_strides=lambda stride: (stride, 0),
    collect=_collect,
    find_numbers=_find_numbers,
    sum_chunks=_sum_chunks,
    finish=finish_gradients,
    forward=mixture_forward,
    backward=mixture_backward,
    prepare=load_gaussian,
    open_chunk=open_chunk,
    weigh_chunk=weigh_chunk,
    differentiate=differentiate_tile,
    merges_partials=True,
)
forward, backward = partial(passes.forward, KERNELS), partial(passes.backward, KERNELS)
