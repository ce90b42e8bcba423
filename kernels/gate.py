"""The density gate (the JEPA tokenizer, arXiv 2512.07168), forward and backward.

Over one chunk of length n, with d = x - mean, var biased and centred, std = sqrt(max(var, 1e-6)) and for each of K
Gaussians sigma_k = softplus(log_sigma_k) + 1e-3, width_k = std·sigma_k + 1e-8, z_k = (d - mean_offset_k)/width_k:

    N_k = exp(-z_k²/2)/(sqrt(2π)·sigma_k·K)      weights = Σ_k N_k      y = x·weights (+ x)

    t_k = (grad_y·x + grad_weights)·N_k      q_k = -t_k·z_k/width_k      q = Σ_k q_k
    dx = grad_y·weights + q - Σ q/n - [var >= 1e-6]·(d/std)·Σ Σ_k q_k·z_k·sigma_k/n (+ grad_y)
    d_mean_offset_k = -Σ q_k      d_log_sigma_k = -(Σ q_k·z_k·std + Σ t_k/sigma_k)·sigmoid(log_sigma_k)

Of a streamed chunk (`streamed.py`) var takes the place of 1/(var + eps) among its numbers.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import triton
import triton.language as tl

from . import passes
from .algorithms import GATE, SIGMA_FLOOR, VARIANCE_FLOOR, WIDTH_FLOOR
from .blocks import LOG2_SQRT_2PI, add_blocks, centre, find_h, softplus, where_nonempty
from .host import Call, Numbers
from .operands import Strided, strided_of
from .params import add_lists, load_entries, store_partials, sum_columns, zero_blocks
from .streamed import find_stats, merge_sums, store_strip_numbers
from .tile import load_blocks, load_gradients, load_numbers, store_dx, store_outputs
from .walk import columns_inside, locate, next_tile, place_tile, start_walk, view_of

SQRT_HALF_LOG2_E = tl.constexpr(0.8493218002880191)
INV_SQRT_HALF_LOG2_E = tl.constexpr(1.1774100225154747)
INV_HALF_LOG2_E = tl.constexpr(1.3862943611198906)
MIN_VARIANCE, MIN_SIGMA, MIN_WIDTH = map(tl.constexpr, (VARIANCE_FLOOR, SIGMA_FLOOR, WIDTH_FLOOR))


class Parameters(NamedTuple):
    """Hold the parameters (heads, K) as kernels take them."""

    mean_offsets: Strided
    log_sigma: Strided


class Gaussians(NamedTuple):
    """Hold [1, 1] for each Gaussian of a head: mean_offset, sigma and log2 of 1/(sqrt(2π)·sigma·K)."""

    mean_offset: list
    sigma: list
    log2_scale: list


class Sums(NamedTuple):
    """Hold what dx takes from the sums over a chunk, [1, BLOCK_C]: dx = grad_y·weights + q - (common + slope·d)."""

    common: tl.tensor
    slope: tl.tensor


class Scales(NamedTuple):
    """Hold [1, BLOCK_C] a Gaussian: scaled z, z·sqrt(log2(e)/2), is factor·d - shift; d is x - mean + mean_error."""

    factor: list
    shift: list


class Chunk(NamedTuple):
    """Hold what the tiles of a streamed chunk share, and in the backward pass what dx takes from the sums over it."""

    scales: Scales
    gaussians: Gaussians
    sums: Sums | list


@triton.jit
def load_gaussians(parameters, head, _position, _view, PLAN: tl.constexpr):
    """Return the Gaussians of a head."""
    mean_offsets, log_sigmas = parameters.mean_offsets, parameters.log_sigma
    offsets, sigmas, log2_scales = [], [], []
    for k in tl.static_range(PLAN.K):
        place = tl.zeros([1, 1], tl.int32) + k
        offset = tl.load(mean_offsets.data + head * mean_offsets.strides[0] + place * mean_offsets.strides[1])
        log_sigma = tl.load(log_sigmas.data + head * log_sigmas.strides[0] + place * log_sigmas.strides[1])
        sigma = softplus(log_sigma.to(PLAN.ACC)) + MIN_SIGMA
        offsets, sigmas = offsets + [offset.to(PLAN.ACC)], sigmas + [sigma]
        log2_scales = log2_scales + [tl.full([1, 1], -LOG2_SQRT_2PI, PLAN.ACC) - tl.log2(sigma * PLAN.K)]
    return Gaussians(offsets, sigmas, log2_scales)


@triton.jit
def find_std(variance):
    """Return (std, 1/std where the variance is above its floor and 0 below)."""
    floor = tl.full([1, 1], MIN_VARIANCE, variance.dtype)  # tl.maximum takes a plain literal as fp32 (Triton 3.6)
    floored = tl.maximum(variance, floor, propagate_nan=tl.PropagateNan.ALL)
    inverse = tl.rsqrt(floored)
    return floored * inverse, tl.where(variance >= floor, inverse, 0.0)


@triton.jit
def scale_gaussians(gaussians, mean_error, std):
    """Return the Scales of each column's chunk."""
    factors, shifts = [], []
    for k in tl.static_range(len(gaussians.sigma)):
        root = tl.rsqrt(std * gaussians.sigma[k] + MIN_WIDTH)  # squared, 1/width: a division takes eight instructions
        factor = root * root * SQRT_HALF_LOG2_E
        factors, shifts = factors + [factor], shifts + [(mean_error + gaussians.mean_offset[k]) * factor]
    return Scales(factors, shifts)


# --- One block ------------------------------------------------------------------------------------
@triton.jit
def weigh_one(d, k: tl.constexpr, scales, gaussians):
    """Return (scaled z, N) of one block and one Gaussian."""
    z = scales.factor[k] * d - scales.shift[k]
    return z, tl.exp2(gaussians.log2_scale[k] - z * z)


@triton.jit
def weigh(d, scales, gaussians, valid):
    """Return the weights of every block."""
    weights = []
    for i in tl.static_range(len(d)):
        weight = 0.0
        for k in tl.static_range(len(gaussians.sigma)):
            _z, density = weigh_one(d[i], k, scales, gaussians)
            weight = density if k == 0 else weight + density
        weights = weights + [tl.where(valid[i], weight, 0.0)]
    return weights


@triton.jit
def weigh_products(products, d, h, scales, gaussians, valid):
    """Return (products with one more tile's Σ t·z, Σ t·z² and Σ t of every Gaussian, place by place, z as scaled, the
    weights and q of every block). One block after the other: of all at once the densities would not fit.
    """
    weights, q = [], []
    for i in tl.static_range(len(d)):
        more, weight, slope = [], 0.0, 0.0
        for k in tl.static_range(len(gaussians.sigma)):
            z, density = weigh_one(d[i], k, scales, gaussians)
            t = h[i] * density
            tz = t * z
            more = more + [products[3 * k] + tz, products[3 * k + 1] + tz * z, products[3 * k + 2] + t]
            weight = density if k == 0 else weight + density
            slope = tz * scales.factor[k] if k == 0 else slope + tz * scales.factor[k]
        products, weights = more, weights + [tl.where(valid[i], weight, 0.0)]
        q = q + [slope * -INV_HALF_LOG2_E]
    return products, weights, q


@triton.jit
def sum_chunks(products, scales, gaussians, std, column_mask):
    """Return a column's Σ Σ_k q_k·z_k·sigma_k, and [1, 1] of every Gaussian a tile's Σ q and Σ (q·z·std + t/sigma)."""
    sum_qzs = tl.zeros_like(std)
    totals = []
    for k in tl.static_range(len(gaussians.sigma)):
        sigma, factor = gaussians.sigma[k], scales.factor[k]
        # of z as it is: unscaled
        sum_q = tl.sum(products[3 * k], 0)[None, :] * -INV_HALF_LOG2_E * factor
        sum_qz = tl.sum(products[3 * k + 1], 0)[None, :] * (-INV_HALF_LOG2_E * INV_SQRT_HALF_LOG2_E) * factor
        sum_qzs += sum_qz * sigma
        sum_sigma = sum_qz * std + tl.sum(products[3 * k + 2], 0)[None, :] / sigma
        totals = totals + [sum_columns(sum_q, column_mask), sum_columns(sum_sigma, column_mask)]
    return sum_qzs, totals


@triton.jit
def differentiate_x(gradients, d, weights, q, sums):
    """Return dx of every block but the residual's part. sums.common has the mean of the same q: equal ones cancel."""
    grad = []
    for i in tl.static_range(len(d)):
        grad = grad + [gradients.y[i] * weights[i] + (q[i] - (sums.common + sums.slope * d[i]))]
    return grad


# --- Chunks on chip -------------------------------------------------------------------------------
@triton.jit
def gate_forward(inputs, parameters, outputs, _settings, extent, RESIDUAL: tl.constexpr, PLAN: tl.constexpr):
    """Store y and the weights."""
    view = view_of(extent, PLAN)
    walk = start_walk(extent, view, BACKWARDS=False)
    gaussians = load_gaussians(parameters, walk.head, None, view, PLAN)
    index = walk.index
    for _ in range(walk.first_tile, view.n_tiles, walk.tile_step):
        tile = place_tile(inputs.mask, index, walk, walk.strip_row, view, PLAN.RAGGED_P, PLAN)
        raw, x = load_blocks(inputs.x, inputs.mask, tile, view, RESIDUAL, PLAN)
        centred = centre(x, tile, inputs.mask, walk.length, PLAN.ACC)
        variance = where_nonempty(centred.squares * centred.inv_count, centred.inv_count, inputs.mask, 0.0)
        std, _inv_std = find_std(variance)
        scales = scale_gaussians(gaussians, centred.mean_error, std)
        weights = weigh(centred.blocks, scales, gaussians, tile.valid)
        store_outputs(outputs, x, raw, weights, None, tile, view, RESIDUAL, PLAN)
        index = next_tile(index, walk.index_step, view)


@triton.jit
def gate_backward(inputs, parameters, dx, partials, _settings, extent, RESIDUAL: tl.constexpr, PLAN: tl.constexpr):
    """Store dx, and this program's sums of q and q·z·std + t/sigma for every Gaussian."""
    view = view_of(extent, PLAN)
    walk = start_walk(extent, view, BACKWARDS=False)
    gaussians = load_gaussians(parameters, walk.head, None, view, PLAN)
    totals = zero_blocks(2 * PLAN.K, 1, 1, PLAN.ACC)
    index = walk.index
    for _ in range(walk.first_tile, view.n_tiles, walk.tile_step):
        tile = place_tile(inputs.mask, index, walk, walk.strip_row, view, PLAN.RAGGED_P, PLAN)
        _raw, x = load_blocks(inputs.x, inputs.mask, tile, view, False, PLAN)
        gradients = load_gradients(inputs, tile, view, RESIDUAL, PLAN)
        centred = centre(x, tile, inputs.mask, walk.length, PLAN.ACC)
        variance = where_nonempty(centred.squares * centred.inv_count, centred.inv_count, inputs.mask, 0.0)
        std, inv_std = find_std(variance)
        scales = scale_gaussians(gaussians, centred.mean_error, std)
        # what reaches the weights, and its sums over the chunk
        h = find_h(gradients, x, None)
        products = zero_blocks(3 * PLAN.K, PLAN.BLOCK_P, PLAN.BLOCK_C, PLAN.ACC)
        products, weights, q = weigh_products(products, centred.blocks, h, scales, gaussians, tile.valid)
        sum_qzs, more = sum_chunks(products, scales, gaussians, std, columns_inside(tile.position, view))
        if dx is not None:
            slope = inv_std * (centred.inv_count * sum_qzs)
            common = centred.inv_count * tl.sum(add_blocks(q), 0)[None, :] - slope * centred.mean_error
            grad = differentiate_x(gradients, centred.blocks, weights, q, Sums(common, slope))
            store_dx(dx, grad, gradients.raw, tile, view, RESIDUAL, PLAN)
        if partials is not None:
            totals = add_lists(totals, more)
        index = next_tile(index, walk.index_step, view)
    if partials is not None:
        store_partials(partials, totals, walk.head, walk.program)


@triton.jit
def finish_gradients(totals, parameters, head, entries, inside, _K: tl.constexpr):
    """Return the gradients of some Gaussians' parameters from Σ q and Σ (q·z·std + t/sigma)."""
    total_q, total_sigma = totals
    log_sigma = load_entries(parameters.log_sigma, head, entries, inside, 0.0)
    return -total_q, -total_sigma / (1.0 + tl.exp(-log_sigma))


# --- Streamed chunks (`streamed.py`) --------------------------------------------------------------
@triton.jit
def open_chunk(gaussians, numbers, head, position, view, _PLAN: tl.constexpr):
    """Return (mean, chunk), with the sums where numbers have them."""
    mean, mean_error, variance, inv_count = load_numbers(numbers.stats, head, position, view, 4)
    std, inv_std = find_std(variance)
    scales, sums = scale_gaussians(gaussians, mean_error, std), []
    if numbers.sums is not None:
        sum_q, sum_qzs = load_numbers(numbers.sums, head, position, view, 2)
        slope = inv_std * (inv_count * sum_qzs)
        sums = Sums(inv_count * sum_q - slope * mean_error, slope)
    return mean, Chunk(scales, gaussians, sums)


@triton.jit
def weigh_chunk(x, mean, chunk, _padding, valid):
    """Return the weights of every block."""
    return weigh([block - mean for block in x], chunk.scales, chunk.gaussians, valid)


@triton.jit
def gate_sums(inputs, parameters, numbers, strips, partials, extent, PLAN: tl.constexpr):
    """Store Σ q and Σ Σ_k q_k·z_k·sigma_k of a strip of each chunk of one tile's columns, and the program's totals."""
    view = view_of(extent, PLAN)
    walk = start_walk(extent, view, BACKWARDS=True)
    gaussians = load_gaussians(parameters, walk.head, None, view, PLAN)
    position = locate(walk.index, walk.head, walk.strip_row, view, PLAN)
    mean, mean_error, variance = load_numbers(numbers.stats, walk.head, position, view, 3)
    std, _inv_std = find_std(variance)
    scales = scale_gaussians(gaussians, mean_error, std)
    products = zero_blocks(3 * PLAN.K, PLAN.BLOCK_P, PLAN.BLOCK_C, PLAN.ACC)
    total_q = tl.zeros([PLAN.BLOCK_P, PLAN.BLOCK_C], PLAN.ACC)
    for row in range(walk.strip_row, walk.strip_end, PLAN.BLOCK_P * PLAN.N_BLOCKS):
        tile = place_tile(inputs.mask, walk.index, walk, row, view, PLAN.RAGGED_P, PLAN)
        _raw, x = load_blocks(inputs.x, inputs.mask, tile, view, False, PLAN)
        h = find_h(load_gradients(inputs, tile, view, False, PLAN), x, None)
        d = [block - mean for block in x]
        products, _weights, q = weigh_products(products, d, h, scales, gaussians, tile.valid)
        total_q += add_blocks(q)
    sum_qzs, totals = sum_chunks(products, scales, gaussians, std, columns_inside(position, view))
    store_strip_numbers(strips, walk, position, view, [tl.sum(total_q, 0)[None, :], sum_qzs])
    if partials is not None:
        store_partials(partials, totals, walk.head, walk.program)


@triton.jit
def differentiate_tile(x, mean, chunk, inputs, _padding, tile, view, RAW: tl.constexpr, PLAN: tl.constexpr):
    """Return (dx, grad_y as it came) of every block, and nothing for totals."""
    gradients, centred = load_gradients(inputs, tile, view, RAW, PLAN), [block - mean for block in x]
    # q is rounded as in the sums, so that equal ones cancel; of its products, which nothing reads, no code is made
    h, unused = find_h(gradients, x, None), zero_blocks(3 * PLAN.K, 1, 1, PLAN.ACC)
    _products, weights, q = weigh_products(unused, centred, h, chunk.scales, chunk.gaussians, tile.valid)
    return differentiate_x(gradients, centred, weights, q, chunk.sums), gradients.raw, [], []


# --- On the host ----------------------------------------------------------------------------------
def _sum_chunks(call: Call, parameters: Parameters, _settings: None, numbers: Numbers) -> tuple:
    """Return the sums of streamed chunks, and every program's totals for the parameters if these are needed."""
    strips, partials = call.of_strips(2), call.partials(2 * call.n_params, call.programs)
    call.launch(gate_sums, call.programs, call.inputs, parameters, numbers, strips, partials)
    return merge_sums(call, strips, 2), partials


KERNELS = passes.Kernels(
    GATE,
    gaussians=lambda n_params: n_params,
    n_sums=lambda n_params: 2 * n_params,
    n_entry_sums=2,
    sum_strides=lambda stride: (stride, 2 * stride),
    collect=lambda call, p, q: (Parameters(strided_of(p), strided_of(q)), None),
    find_numbers=lambda call, _parameters, _settings: Numbers(find_stats(call, None)),
    sum_chunks=_sum_chunks,
    finish=finish_gradients,
    forward=gate_forward,
    backward=gate_backward,
    prepare=load_gaussians,
    open_chunk=open_chunk,
    weigh_chunk=weigh_chunk,
    differentiate=differentiate_tile,
)
forward, backward = partial(passes.forward, KERNELS), partial(passes.backward, KERNELS)
