"""Stabilised mixture of densities (arXiv 2602.09040), both passes: tails are clamped, and weights are a softmax.

Over one chunk of length n, with e_k = x - mean - o_k, inv_var = 1/(var + eps), var unbiased and centred, padding as
anything else, c'_k = clamp(c_k, 0.01, 10), S_k = 1/(c'_k² + eps) and u_k = clamp(e_k·sqrt(inv_var), -10, 10):

    log w = -Σ_k (S_k·u_k² + log(2π/S_k))/2      weights = softmax(log w) over the chunk      y = x·weights (+ x)

Padding has no weight, and y = x there; where a chunk has nothing else, or is not finite, all weights are 1/n. With
h = grad_y·x + grad_weights, grad_y·x being 0 at padding, and [.] = 1 where |e_k·sqrt(inv_var)| <= 10, else 0:

    a = Σ S_k      E = Σ S_k·e_k·[.]      Q = Σ S_k·e_k²·[.]      he = a·inv_var·(h - Σ h·weights)·weights
    dx = grad_y·weights (grad_y at padding) - he·E/a + Σ he·E/(a·n) + inv_var·(x - mean)·Σ he·Q/(a·(n - 1)) (+ grad_y)
    d_mean_offset_k = (S_k/a)·Σ he·e_k·[.]      d_c_k = (c'_k·S_k²/a)·Σ he·u_k²/inv_var·[0.01 <= c_k <= 10]

Where a chunk clamps nowhere, E/a = f = x - mean - m with m = Σ S_k·o_k/a, and Q/a and Σ_k S_k·u_k²/(a·inv_var) are f²
but for what is the same in all of it: no number of a position depends on K. Only tiles where a chunk may clamp take
a loop over Gaussians, which changes nothing of other chunks.

Streamed chunks (`streamed.py`) are read as the mixture's are, but that totals for the parameters come last, with dx.
"""

from __future__ import annotations

from functools import partial

import triton
import triton.language as tl
from torch import Tensor

from . import passes
from .algorithms import STABLE
from .blocks import find_h, inverse_count, inverse_count_less_one, multiply_rounded
from .host import Call, Numbers
from .mixture_blocks import (
    FAR,
    Sums,
    add_relative,
    add_weighted,
    count_rows,
    merge_relative,
    merge_weighted,
    reduce_relative,
    weigh_gaps,
)
from .operands import power_of_2, split_float, strided_of
from .params import load_entries, sum_columns, zero_blocks
from .stable_blocks import (
    NARROWEST,
    WIDEST,
    Chunk,
    Parameters,
    add_clamped,
    add_free,
    differentiate_x,
    find_frame,
    find_he,
    find_log2_factor,
    find_moments,
    find_reach,
    find_scale,
    hide_padding,
    load_gaussians,
    load_product,
    measure,
    multiply,
    pass_directly,
    store_parameter_totals,
    where_equal,
)
from .stable_on_chip import differentiate_on_chip, keep_totals, weigh_on_chip, zero_totals
from .streamed import find_stats, locate_chunks, store_strip_numbers
from .tile import float_of, load_blocks, load_gradients, load_numbers, store_dx, store_numbers, store_outputs
from .walk import columns_inside, locate, next_tile, place_tile, start_walk, view_of


# --- Chunks on chip -------------------------------------------------------------------------------
@triton.jit
def stable_forward(inputs, parameters, outputs, _settings, extent, RESIDUAL: tl.constexpr, PLAN: tl.constexpr):
    """Store y and the weights."""
    view = view_of(extent, PLAN)
    walk = start_walk(extent, view, BACKWARDS=False)
    product = load_product(parameters, walk.head, None, view, PLAN)
    padding = None if inputs.padding is None else float_of(inputs.padding, PLAN.ACC)
    index = walk.index
    for _ in range(walk.first_tile, view.n_tiles, walk.tile_step):
        tile = place_tile(inputs.mask, index, walk, walk.strip_row, view, PLAN.RAGGED_P, PLAN)
        raw, x = load_blocks(inputs.x, inputs.mask, tile, view, RESIDUAL, PLAN)
        weights = weigh_on_chip(x, product, padding, tile, inputs.mask, None, walk.length, view, PLAN)
        store_outputs(outputs, x, raw, weights, padding, tile, view, RESIDUAL, PLAN)
        index = next_tile(index, walk.index_step, view)


@triton.jit
def stable_backward(inputs, parameters, dx, partials, _settings, extent, RESIDUAL: tl.constexpr, PLAN: tl.constexpr):
    """Store dx, and this program's totals for both parameters of every Gaussian."""
    view = view_of(extent, PLAN)
    walk = start_walk(extent, view, BACKWARDS=False)
    product = load_product(parameters, walk.head, None, view, PLAN)
    padding = None if inputs.padding is None else float_of(inputs.padding, PLAN.ACC)
    totals = zero_totals(PLAN)
    index = walk.index
    for _ in range(walk.first_tile, view.n_tiles, walk.tile_step):
        tile = place_tile(inputs.mask, index, walk, walk.strip_row, view, PLAN.RAGGED_P, PLAN)
        _raw, x = load_blocks(inputs.x, inputs.mask, tile, view, False, PLAN)
        gradients = load_gradients(inputs, tile, view, RESIDUAL, PLAN)
        grad, totals = differentiate_on_chip(
            x, gradients, totals, product, padding, tile, inputs.mask, walk.length, view, PLAN
        )  # fmt: skip
        if dx is not None:
            store_dx(dx, grad, gradients.raw, tile, view, RESIDUAL, PLAN)
        index = next_tile(index, walk.index_step, view)
    if partials is not None:
        keep_totals(partials, totals, product, walk, PLAN)


@triton.jit
def finish_gradients(totals, parameters, head, entries, inside, K: tl.constexpr):
    """Return the gradients of some Gaussians' parameters from Σ he·e_k·[.] and Σ he·u_k²/inv_var."""
    sum_he_offset, sum_he_width = totals
    a, _m, _v, _most = find_moments(parameters, head, K)
    _offset, width, precision = load_gaussians(parameters, head, entries, tl.float64)
    c = load_entries(parameters.c, head, entries, inside, 1.0)
    part = precision / a
    narrowest = tl.full([1], NARROWEST, parameters.c.data.dtype.element_ty).to(tl.float64)  # as c is rounded
    free = (c >= narrowest) & (c <= WIDEST)
    return part * sum_he_offset, tl.where(free, width * precision * part * sum_he_width, 0.0)


# --- Streamed chunks (`streamed.py`) --------------------------------------------------------------
@triton.jit
def stable_scales(inputs, parameters, numbers, strips, extent, PLAN: tl.constexpr):
    """Store the least s of a strip of each chunk of one tile's columns, and the sum of the weights relative to it."""
    view = view_of(extent, PLAN)
    walk = start_walk(extent, view, BACKWARDS=True)
    product = load_product(parameters, walk.head, None, view, PLAN)
    padding = None if inputs.padding is None else float_of(inputs.padding, PLAN.ACC)
    position = locate(walk.index, walk.head, walk.strip_row, view, PLAN)
    mean, mean_error, inv_var = load_numbers(numbers.stats, walk.head, position, view, 3)
    log2_factor = find_log2_factor(product, inv_var)
    # of every place in a block by itself: they are compared once, at the end
    min_s = tl.zeros([PLAN.BLOCK_P, PLAN.BLOCK_C], PLAN.ACC) + FAR
    total = tl.zeros([PLAN.BLOCK_P, PLAN.BLOCK_C], PLAN.ACC)
    for row in range(walk.strip_row, walk.strip_end, PLAN.BLOCK_P * PLAN.N_BLOCKS):
        tile = place_tile(inputs.mask, walk.index, walk, row, view, PLAN.RAGGED_P, PLAN)
        _raw, x = load_blocks(inputs.x, inputs.mask, tile, view, False, PLAN)
        shown, d = hide_padding(x, tile.valid, padding), [block - mean for block in x]
        frame = find_frame(product, mean_error, inv_var, find_reach(d, tile.valid))
        _f, s, _q = measure(d, mean_error, product, frame, shown)
        min_s, total = add_relative(min_s, total, s, log2_factor, shown)
    store_strip_numbers(strips, walk, position, view, reduce_relative(min_s, total, log2_factor))


@triton.jit
def merge_scales(strips, parameters, numbers, extent, PADDED: tl.constexpr, PLAN: tl.constexpr):
    """Store the least s of every chunk of one tile's columns, in place of its 1/n, and the scale of its weights."""
    view, head = view_of(extent, PLAN), tl.program_id(1).to(tl.int64)
    product = load_product(parameters, head, None, view, PLAN)
    position = locate_chunks(head, extent, view, PLAN)
    mean, mean_error, inv_var, inv_count = load_numbers(numbers.stats, head, position, view, 4)
    log2_factor = find_log2_factor(product, inv_var)
    min_s, total = merge_relative(strips, log2_factor, head, position, view, PLAN)
    scale = find_scale(total, log2_factor, inv_count, PADDED)
    store_numbers(numbers.stats, head, position, view, [mean, mean_error, inv_var, min_s])
    store_numbers(numbers.scales, head, position, view, [scale])


@triton.jit
def open_chunk(product, numbers, head, position, view, _PLAN: tl.constexpr):
    """Return (mean, chunk), with the sums where numbers have them."""
    mean, mean_error, inv_var, min_s = load_numbers(numbers.stats, head, position, view, 4)
    if numbers.sums is None:
        (scale,) = load_numbers(numbers.scales, head, position, view, 1)
        sums = []
    else:
        scale, sum_h, mean_hef, slope = load_numbers(numbers.sums, head, position, view, 4)
        sums = Sums(sum_h, mean_hef, slope)
    return mean, Chunk(product, mean_error, inv_var, min_s, scale, sums)


@triton.jit
def weigh_blocks(s, chunk, frame, shown, valid, padding):
    """Return the weights of every block."""
    weights = weigh_gaps([chunk.min_s - block for block in s], frame.log2_factor, shown)
    weights = [block * chunk.scale for block in weights]
    return weights if padding is None else where_equal(weights, chunk.scale < 0, valid, -chunk.scale)


@triton.jit
def weigh_chunk(x, mean, chunk, padding, valid):
    """Return the weights of every block."""
    shown, d = hide_padding(x, valid, padding), [block - mean for block in x]
    frame = find_frame(chunk.product, chunk.mean_error, chunk.inv_var, find_reach(d, valid))
    _f, s, _q = measure(d, chunk.mean_error, chunk.product, frame, shown)
    return weigh_blocks(s, chunk, frame, shown, valid, padding)


@triton.jit
def stable_sums(inputs, parameters, numbers, strips, extent, PLAN: tl.constexpr):
    """Store Σ h, Σ h·f, Σ h·u, Σ w, Σ w·f, Σ w·u and n of a strip of each chunk of one tile's columns, f being E/a, u
    the least s less Q/a, and w relative weights, so that their scale need not be known before.
    """
    view = view_of(extent, PLAN)
    walk = start_walk(extent, view, BACKWARDS=True)
    product = load_product(parameters, walk.head, None, view, PLAN)
    position = locate(walk.index, walk.head, walk.strip_row, view, PLAN)
    mean, mean_error, inv_var, min_s = load_numbers(numbers.stats, walk.head, position, view, 4)
    padding = None if inputs.padding is None else float_of(inputs.padding, PLAN.ACC)
    sums = zero_blocks(7, PLAN.BLOCK_P, PLAN.BLOCK_C, PLAN.ACC)
    for row in range(walk.strip_row, walk.strip_end, PLAN.BLOCK_P * PLAN.N_BLOCKS):
        tile = place_tile(inputs.mask, walk.index, walk, row, view, PLAN.RAGGED_P, PLAN)
        _raw, x = load_blocks(inputs.x, inputs.mask, tile, view, False, PLAN)
        shown, d = hide_padding(x, tile.valid, padding), [block - mean for block in x]
        frame = find_frame(product, mean_error, inv_var, find_reach(d, tile.valid))
        f, s, q = measure(d, mean_error, product, frame, shown)
        w = weigh_gaps([min_s - block for block in s], frame.log2_factor, shown)
        h = find_h(load_gradients(inputs, tile, view, False, PLAN), x, padding)
        sums = add_weighted(sums, h, w, f, [min_s - block for block in q], tile.valid, inputs.mask)
    sums = count_rows(sums, walk, inputs.mask, PLAN)
    store_strip_numbers(strips, walk, position, view, [tl.sum(block, 0)[None, :] for block in sums])


@triton.jit
def merge_stable_sums(strips, parameters, numbers, extent, PADDED: tl.constexpr, PLAN: tl.constexpr):
    """Store the scale, Σ h, Σ he·E/(a·n) and inv_var·Σ he·Q/(a·(n - 1)) of every chunk of one tile's columns."""
    view, head = view_of(extent, PLAN), tl.program_id(1).to(tl.int64)
    product = load_product(parameters, head, None, view, PLAN)
    position = locate_chunks(head, extent, view, PLAN)
    _mean, _error, inv_var = load_numbers(numbers.stats, head, position, view, 3)
    sum_h, sum_hf, sum_hu, sum_w, sum_wf, sum_wu, n = merge_weighted(strips, head, position, view, PLAN)
    inv_count = inverse_count(n)
    scale = find_scale(sum_w, find_log2_factor(product, inv_var), inv_count, PADDED)
    free_h = sum_h * scale
    factor = tl.where(scale < 0, 0.0, product.a * inv_var * scale)
    hef = factor * (sum_hf - multiply_rounded(free_h, sum_wf))
    slope = factor * (multiply_rounded(free_h, sum_wu) - sum_hu) * inv_var * inverse_count_less_one(inv_count)
    store_numbers(numbers.sums, head, position, view, [scale, free_h, hef * inv_count, slope])


@triton.jit
def stable_backward_streamed(
    inputs, parameters, numbers, dx, partials, extent, RESIDUAL: tl.constexpr, PLAN: tl.constexpr
):
    """Store dx of a strip of each chunk of one tile's columns, and the totals of this program."""
    view = view_of(extent, PLAN)
    walk = start_walk(extent, view, BACKWARDS=True)
    product = load_product(parameters, walk.head, None, view, PLAN)
    position = locate(walk.index, walk.head, walk.strip_row, view, PLAN)
    mean, chunk = open_chunk(product, numbers, walk.head, position, view, PLAN)
    padding = None if inputs.padding is None else float_of(inputs.padding, PLAN.ACC)
    free = zero_blocks(3, PLAN.BLOCK_P, PLAN.BLOCK_C, PLAN.ACC)
    totals, inside = zero_blocks(2, 1, PLAN.K, PLAN.ACC), columns_inside(position, view)
    for row in range(walk.strip_row, walk.strip_end, PLAN.BLOCK_P * PLAN.N_BLOCKS):
        tile = place_tile(inputs.mask, walk.index, walk, row, view, PLAN.RAGGED_P, PLAN)
        _raw, x = load_blocks(inputs.x, inputs.mask, tile, view, False, PLAN)
        gradients = load_gradients(inputs, tile, view, RESIDUAL, PLAN)
        shown, d = hide_padding(x, tile.valid, padding), [block - mean for block in x]
        frame = find_frame(product, chunk.mean_error, chunk.inv_var, find_reach(d, tile.valid))
        f, s, _q = measure(d, chunk.mean_error, product, frame, shown)
        weights = weigh_blocks(s, chunk, frame, shown, tile.valid, padding)
        he = find_he(find_h(gradients, x, padding), weights, chunk.sums.free_h, frame, chunk.scale < 0, padding)
        hef = multiply(he, f)
        if dx is not None:
            direct = pass_directly(gradients, x, weights, padding)
            grad = differentiate_x(direct, d, chunk.mean_error, hef, chunk.sums)
            store_dx(dx, grad, gradients.raw, tile, view, RESIDUAL, PLAN)
        if partials is not None:
            free = add_free(free, he, hef, f, frame)
            if frame.any_clamps:
                _heq, totals = add_clamped(totals, frame.limit, d, chunk.mean_error, he, product, frame, inside)
    if partials is not None:
        free = [sum_columns(tl.sum(block, 0)[None, :], inside) for block in free]
        store_parameter_totals(partials, free, totals, product, walk.program)


# --- On the host ----------------------------------------------------------------------------------
def _find_numbers(call: Call, parameters: Parameters, _settings: None) -> Numbers:
    """Return the statistics of streamed chunks, and the scale of each chunk's weights."""
    stats, strips = find_stats(call, parameters.eps, unbiased=True, padding=False), call.of_strips(2)
    numbers, padded = Numbers(stats, call.of_strips(1, strips=1)), call.inputs.padding is not None
    call.launch(stable_scales, call.programs, call.inputs, parameters, Numbers(stats), strips)
    call.launch_merge(merge_scales, strips, parameters, numbers, PADDED=padded)
    return numbers


def _sum_chunks(call: Call, parameters: Parameters, _settings: None, numbers: Numbers) -> tuple:
    """Return the sums of streamed chunks, and room for every program's totals for the parameters, if needed."""
    strips, numbers = call.of_strips(7), numbers._replace(sums=call.of_strips(4, strips=1))
    call.launch(stable_sums, call.programs, call.inputs, parameters, numbers, strips)
    call.launch_merge(merge_stable_sums, strips, parameters, numbers, PADDED=call.inputs.padding is not None)
    return numbers.sums, call.partials(2 * power_of_2(call.n_params), call.programs)


def _collect(call: Call, mean_offsets: Tensor, c: Tensor, eps: float, _padding: float | None) -> tuple:
    """Return the parameters as kernels take them, with eps, and no settings."""
    return Parameters(strided_of(mean_offsets), strided_of(c), c.shape[1], split_float(eps)), None


KERNELS = passes.Kernels(
    STABLE,
    gaussians=power_of_2,
    n_sums=lambda n_params: 2 * power_of_2(n_params),
    n_entry_sums=2,
    sum_strides=lambda stride: (stride, 2 * stride),
    collect=_collect,
    find_numbers=_find_numbers,
    sum_chunks=_sum_chunks,
    finish=finish_gradients,
    forward=stable_forward,
    backward=stable_backward,
    prepare=load_product,
    open_chunk=open_chunk,
    weigh_chunk=weigh_chunk,
    backward_streamed=stable_backward_streamed,
)
forward, backward = partial(passes.forward, KERNELS), partial(passes.backward, KERNELS)
