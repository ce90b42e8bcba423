"""Arithmetic of the stabilised mixture, by the formulas of `stable.py`: one quadratic, and Gaussians where they clamp.

Where chunks clamp, u² is less that of an origin p: a Gaussian that clamps there and here adds nothing to it, so that
what all positions share rounds nothing away.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

from .blocks import (
    HALF_LOG2_E,
    add_blocks,
    add_products,
    centre,
    inverse_count_less_one,
    invert_variance,
    multiply_rounded,
    reciprocal,
    where_nonempty,
)
from .mixture_blocks import FAR, Sums, minimum_of, weigh_gaps
from .operands import Split, Strided
from .params import add_lists, sum_columns
from .walk import columns_inside

NARROWEST, WIDEST = tl.constexpr(0.01), tl.constexpr(10.0)  # what c is clamped to
FARTHEST = tl.constexpr(10.0)  # of u, on either side
# Chunks clamp as if they reached six standard deviations, which those up to 36 positions do not pass: where an offset
# is beyond four. So where none clamps p is m, and no Gaussian clamps there
NEAR, UNCLAMPED = tl.constexpr(0.4), tl.constexpr(36)


class Parameters(NamedTuple):
    """Hold the parameters (heads, n) and eps as kernels take them."""

    mean_offsets: Strided
    c: Strided
    n: int
    eps: Split


class Product(NamedTuple):
    """Hold a, m, v, a·log2(e)/2 and the largest |mean_offset| of a head, scalars, and where its parameters are."""

    a: tl.tensor
    m: tl.tensor
    v: tl.tensor
    half_log2_a: tl.tensor
    most_offset: tl.tensor
    parameters: Parameters
    head: tl.tensor


class Frame(NamedTuple):
    """Hold of each column's chunk what s and its gradients are multiplied by, in log2 of the weights and as a·inv_var,
    ten standard deviations, and whether it clamps; and whether one of the tile does, a scalar.
    """

    log2_factor: tl.tensor
    factor: tl.tensor
    limit: tl.tensor
    clamps: tl.tensor
    any_clamps: tl.tensor


class Gaussian(NamedTuple):
    """Hold S_k/a, and of each column mean_offset_k + mean_error, p - mean_offset_k, and that clamped."""

    precision: tl.tensor
    centre: tl.tensor
    distance: tl.tensor
    clamped: tl.tensor


class Chunk(NamedTuple):
    """Hold what tiles of a streamed chunk share: numbers [1, BLOCK_C], and Sums in the backward pass, times a·inv_var.
    scale: 1/Σ relative weights, or -1/n where all are equal since none has any.
    """

    product: Product
    mean_error: tl.tensor
    inv_var: tl.tensor
    min_s: tl.tensor
    scale: tl.tensor
    sums: Sums | list


# --- Gaussians of a head, and of a chunk ----------------------------------------------------------
@triton.jit
def load_gaussians(parameters, head, ks, ACC: tl.constexpr):
    """Return (mean_offset, clamped c, S) of some Gaussians of a head, one or a vector; (0, 1, S of 1) if absent."""
    mean_offsets, c, inside = parameters.mean_offsets, parameters.c, ks < parameters.n
    offset = tl.load(mean_offsets.data + head * mean_offsets.strides[0] + ks * mean_offsets.strides[1], inside, 0.0)
    width = tl.load(c.data + head * c.strides[0] + ks * c.strides[1], inside, 1.0).to(ACC)
    zero = tl.zeros_like(width)  # tl.maximum takes a plain literal as fp32 (Triton 3.6)
    width = tl.maximum(width, zero + NARROWEST, propagate_nan=tl.PropagateNan.ALL)
    width = tl.minimum(width, zero + WIDEST, propagate_nan=tl.PropagateNan.ALL)
    precision = 1.0 / (width * width + (tl.cast(parameters.eps.high, ACC) + parameters.eps.low))
    return offset.to(ACC), width, precision


@triton.jit
def find_moments(parameters, head, K: tl.constexpr):
    """Return (a, m, v, the largest |mean_offset|) of a head in fp64, as `mixture_blocks.load_moments` does."""
    ks = tl.arange(0, K)
    offset, _width, precision = load_gaussians(parameters, head, ks, tl.float64)
    precision = tl.where(ks < parameters.n, precision, 0.0)
    a = tl.sum(precision, 0)
    m = tl.sum(offset * precision, 0) / a
    return a, m, tl.sum((offset - m) * (offset - m) * precision, 0) / a, tl.max(tl.abs(offset), 0)


@triton.jit
def load_product(parameters, head, _position, _view, PLAN: tl.constexpr):
    """Return the Product of a head, rounded once."""
    a, m, v, most = find_moments(parameters, head, PLAN.K)
    a, m, v, half_log2_a, most = [t.to(PLAN.ACC) for t in [a, m, v, a * HALF_LOG2_E, most]]
    return Product(a, m, v, half_log2_a, most, parameters, head)


@triton.jit
def find_log2_factor(product, inv_var):
    """Return the factor of s in log2 of the weights, 0 where they are equal since the variance or m is not finite."""
    m = tl.zeros_like(inv_var) + product.m
    return tl.where((inv_var > 0) & (inv_var < float("inf")) & (m == m), product.half_log2_a * inv_var, 0.0)


@triton.jit
def find_frame(product, mean_error, inv_var, reach):
    """Return the Frame of each column's chunk; reach: no less than |x - mean + mean_error| anywhere in the tile.

    A chunk whose variance or Gaussians are not finite clamps, to nothing: its weights are equal.
    """
    limit, m = tl.sqrt(reciprocal(inv_var)) * FARTHEST, tl.zeros_like(inv_var) + product.m
    near = (product.most_offset < limit * NEAR) & (m == m)
    clamps = ~((reach + tl.abs(mean_error) + product.most_offset < limit) & near)
    log2_factor, any_clamps = find_log2_factor(product, inv_var), tl.max(clamps.to(tl.int32)) > 0
    return Frame(log2_factor, product.a * inv_var, tl.where(log2_factor > 0, limit, 0.0), clamps, any_clamps)


@triton.jit
def find_reach(d, valid):
    """Return the largest |d| of each column where it is valid."""
    negative = []
    for i in tl.static_range(len(d)):
        negative = negative + [-tl.abs(tl.where(valid[i], d[i], 0.0))]
    return -tl.min(minimum_of(negative), 0)[None, :]


@triton.jit
def centre_chunks(x, tile, mask, parameters, length, view, PLAN: tl.constexpr):
    """Return (the Centred chunks, inv_var, their reach) of a tile that holds whole ones; padding counts as it is."""
    chunk = centre(x, tile, mask, length, PLAN.ACC)
    inv_divisor = inverse_count_less_one(chunk.inv_count)
    inv_var = invert_variance(chunk.squares, inv_divisor, chunk.inv_count, mask, parameters.eps)
    if PLAN.RAGGED_C:  # columns outside would clamp
        inv_var = tl.where(columns_inside(tile.position, view), inv_var, 0.0)
    if PLAN.BLOCK_P * PLAN.N_BLOCKS <= UNCLAMPED:
        return chunk, inv_var, tl.sqrt(chunk.squares)
    else:
        return chunk, inv_var, find_reach(chunk.blocks, tile.valid)


@triton.jit
def clamp(x, limit):
    """Return x, at most the limit on either side."""
    return tl.minimum(tl.maximum(x, -limit), limit)


@triton.jit
def place_gaussian(product, mean_error, limit, k):
    """Return the Gaussian k of each column; the origin p is m or, if that is further off, four deviations."""
    offset, _width, precision = load_gaussians(product.parameters, product.head, k, product.a.dtype)
    distance = clamp(product.m, limit * NEAR) - offset
    return Gaussian(precision / product.a, mean_error + offset, distance, clamp(distance, limit))


# --- One block ------------------------------------------------------------------------------------
@triton.jit
def hide_padding(x, valid, padding):
    """Return which positions have a weight: the valid ones that are not padding."""
    shown = valid
    if padding is not None:
        shown = []
        for i in tl.static_range(len(x)):
            shown = shown + [valid[i] & (x[i] != padding)]
    return shown


@triton.jit
def clamp_block(d, gaussian, limit):
    """Return (e, 0 where it clamps, and u²/inv_var less that of p) of a block."""
    e = d - gaussian.centre
    clamped = clamp(e, limit)
    return tl.where(clamped == e, e, 0.0), (clamped - gaussian.clamped) * (clamped + gaussian.clamped)


@triton.jit
def add_gaussians(d, mean_error, product, frame):
    """Return (E/a, Σ_k S_k·u_k²/(a·inv_var) less that of p, Q/a) of a block."""
    slopes, costs, squares = tl.zeros_like(d), tl.zeros_like(d), tl.zeros_like(d)
    for k in range(product.parameters.n):
        gaussian = place_gaussian(product, mean_error, frame.limit, k)
        e, cost = clamp_block(d, gaussian, frame.limit)
        slopes, costs = tl.fma(e, gaussian.precision, slopes), tl.fma(cost, gaussian.precision, costs)
        squares = tl.fma(e * e, gaussian.precision, squares)
    return slopes, costs, squares


@triton.jit
def measure(d, mean_error, product, frame, shown):
    """Return (f, s, q) of every block: E/a, what log w is but for a factor and what is the same in all of a chunk, FAR
    where it has no weight, and Q/a. Where it clamps nowhere s is f², rounded, and q is f² + v.
    """
    near = mean_error + product.m
    if frame.any_clamps:
        f, s, q = [], [], []
        for i in tl.static_range(len(d)):  # one by one: sums of all blocks at once would spill
            slope, cost, square = add_gaussians(d[i], mean_error, product, frame)
            distance = d[i] - near
            squared = multiply_rounded(distance, distance)
            f = f + [tl.where(frame.clamps, slope, distance)]
            s = s + [tl.where(shown[i], tl.where(frame.clamps, cost, squared), FAR)]
            q = q + [tl.where(frame.clamps, square, squared + product.v)]
    else:
        f, s, q = [], [], []
        for i in tl.static_range(len(d)):
            distance = d[i] - near
            squared = multiply_rounded(distance, distance)
            f, s, q = f + [distance], s + [tl.where(shown[i], squared, FAR)], q + [squared + product.v]
    return f, s, q


@triton.jit
def find_scale(total, log2_factor, inv_count, PADDED: tl.constexpr):
    """Return what relative weights of sum total are multiplied by; -1/n where all are equal since none has any."""
    scale = reciprocal(tl.where(total == 0, 1.0, total))
    return tl.where((total == 0) | (log2_factor == 0), -inv_count, scale) if PADDED else scale


@triton.jit
def where_equal(weights, equal, valid, inv_count):
    """Return the weights, and 1/n of chunks where all are equal since none has any."""
    found = []
    for i in tl.static_range(len(weights)):
        found = found + [tl.where(equal, tl.where(valid[i], inv_count, 0.0), weights[i])]
    return found


@triton.jit
def weigh(s, frame, shown, valid, inv_count, mask, padding):
    """Return (weights, which chunks have equal ones by default) of a tile that holds whole chunks."""
    min_s = where_nonempty(tl.min(minimum_of(s), 0)[None, :], inv_count, mask, 0.0)
    relative = weigh_gaps([min_s - block for block in s], frame.log2_factor, shown)
    total = where_nonempty(tl.sum(add_blocks(relative), 0)[None, :], inv_count, mask, 1.0)
    scale, equal = reciprocal(total), (total == 0) | (frame.log2_factor == 0)
    weights = [block * scale for block in relative]
    if padding is not None:
        weights = where_equal(weights, equal, valid, inv_count)
    return weights, equal


@triton.jit
def find_he(h, weights, sum_h, frame, equal, padding):
    """Return he of every block, k·a·inv_var; h is not multiplied by the weights yet. Equal weights pass no gradient."""
    he = []
    for i in tl.static_range(len(h)):
        block = (h[i] * weights[i] - sum_h * weights[i]) * frame.factor
        he = he + [block if padding is None else tl.where(equal, 0.0, block)]
    return he


@triton.jit
def multiply(a, b):
    """Return the products of two lists of blocks."""
    blocks = []
    for i in tl.static_range(len(a)):
        blocks = blocks + [a[i] * b[i]]
    return blocks


@triton.jit
def pass_directly(gradients, x, weights, padding):
    """Return what dx has of grad_y directly, of every block, but for the residual."""
    direct = []
    for i in tl.static_range(len(x)):
        block = gradients.y[i] * weights[i]
        direct = direct + [block if padding is None else tl.where(x[i] == padding, gradients.y[i], block)]
    return direct


@triton.jit
def differentiate_x(direct, d, mean_error, hef, sums):
    """Return dx of every block but the residual's part."""
    constant, grad = sums.mean_ke - sums.slope * mean_error, []
    for i in tl.static_range(len(d)):
        grad = grad + [direct[i] + (constant + sums.slope * d[i] - hef[i])]
    return grad


@triton.jit
def add_clamped(totals, heq, d, mean_error, he, product, frame, inside):
    """Return (Σ he·Q/a of columns that clamp, heq of others; the totals [1, K] with those of the former)."""
    offsets, widths = totals
    ks, heq_clamped, columns = tl.arange(0, offsets.shape[1])[None, :], tl.zeros_like(heq), inside & frame.clamps
    zero = tl.zeros_like(add_blocks(he))
    for k in range(product.parameters.n):
        gaussian = place_gaussian(product, mean_error, frame.limit, k)
        sum_slope, sum_cost, sum_square = zero, zero, zero
        for i in tl.static_range(len(d)):
            e, cost = clamp_block(d[i], gaussian, frame.limit)
            sum_slope, sum_cost = tl.fma(he[i], e, sum_slope), tl.fma(he[i], cost, sum_cost)
            sum_square = tl.fma(he[i] * e, e, sum_square)
        heq_clamped += tl.sum(sum_square, 0)[None, :] * gaussian.precision
        offsets += tl.where(ks == k, sum_columns(tl.sum(sum_slope, 0)[None, :], columns), 0.0)
        widths += tl.where(ks == k, sum_columns(tl.sum(sum_cost, 0)[None, :], columns), 0.0)
    return tl.where(frame.clamps, heq_clamped, heq), [offsets, widths]


@triton.jit
def add_free(sums, he, hef, f, frame):
    """Return Σ he, Σ he·f, Σ he·f² of every place in a block with those of a tile, of columns that do not clamp."""
    more = [add_blocks(he), add_blocks(hef), add_products(hef, f)]
    return add_lists(sums, [tl.where(frame.clamps, 0.0, block) for block in more])


@triton.jit
def store_parameter_totals(partials, free, totals, product, program):
    """Store one program's totals, at 2k and 2k + 1 those of the Gaussian k: beside its own what columns that do not
    clamp add to each, which is made of Σ he, 0 of whole chunks, Σ he·f and Σ he·f² [1, 1].
    """
    sum_he, sum_hef, sum_heff = free
    offsets, widths = totals
    ks = tl.arange(0, offsets.shape[1])[None, :]
    offset, _width, _precision = load_gaussians(product.parameters, product.head, ks, product.a.dtype)
    distance = tl.cast(partials.strides[0] >> 1, tl.int64)
    start = partials.data + product.head * (partials.strides[1] >> 1) + program + 2 * ks * distance
    tl.store(start, offsets + (sum_hef + (product.m - offset) * sum_he))
    tl.store(start + distance, widths + (sum_heff + 2.0 * (product.m - offset) * sum_hef))
