"""Arithmetic of the mixture of densities, by the formulas of `mixture.py`: a head's Gaussian, weights, their gradients.

e² is s + (m - p)², s = (d - p)·(d - q), q = 2m - p: see there for the origin p.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

from .blocks import (
    HALF_LOG2_E,
    LOG2_SQRT_2PI,
    add_blocks,
    centre,
    inverse_count_less_one,
    invert_variance,
    multiply_rounded,
    reciprocal,
    where_nonempty,
)
from .operands import Split, Strided
from .params import sum_columns, zero_blocks
from .streamed import load_strip_numbers
from .tile import zero_padding

FAR = tl.constexpr(1e37)  # s of what is not valid. Not inf: the difference of two of them is NaN
MAX_PRECISION = tl.constexpr(1099511627776.0)  # 2**40


class Parameters(NamedTuple):
    """Hold the parameters (heads, n) as kernels take them."""

    mean_offsets: Strided
    c: Strided
    n: int


class Settings(NamedTuple):
    """Hold eps and log2 of eps as kernels take them."""

    eps: Split
    log2_eps: Split


class Gaussian(NamedTuple):
    """Hold a, m, v, l/log(2) and a·log2(e)/2 of a head, scalars."""

    a: tl.tensor
    m: tl.tensor
    v: tl.tensor
    log2_norm: tl.tensor
    half_log2_a: tl.tensor


class Frame(NamedTuple):
    """Hold what columns measure in: p, (m - p)² + v, and the factor of s in log2 of the weights."""

    origin: tl.tensor
    offset_cost: tl.tensor
    log2_factor: tl.tensor


class Sums(NamedTuple):
    """Hold free·Σ h, Σ k·e/n and inv_var·(Σ k·e² + clamped·v)/(n - 1) of a chunk, [1, BLOCK_C] each, which dx takes."""

    free_h: tl.tensor
    mean_ke: tl.tensor
    slope: tl.tensor


class Chunk(NamedTuple):
    """Hold what tiles of a streamed chunk share: the Gaussian, numbers [1, BLOCK_C], and Sums in the backward pass."""

    gaussian: Gaussian
    frame: Frame
    mean_error: tl.tensor
    inv_var: tl.tensor
    min_s: tl.tensor
    scale: tl.tensor
    sums: Sums | list


# --- The Gaussian of a head, and of a chunk -------------------------------------------------------
@triton.jit
def load_moments(parameters, head, K: tl.constexpr, ACC: tl.constexpr):
    """Return (|c|, which exist, a, m, v) of a head, all but the first in fp64: an error of a or m is one of all weights
    alike, which does not average out of the sums that become gradients of the parameters.

    Relative to the narrowest Gaussian, so that 1/c² overflows nowhere but in its limit: there, with c below 1e-12, all
    weight is on one position whatever a is.
    """
    mean_offsets, c, ks = parameters.mean_offsets, parameters.c, tl.arange(0, K)
    inside = ks < parameters.n
    offset = tl.load(mean_offsets.data + head * mean_offsets.strides[0] + ks * mean_offsets.strides[1], inside, 0.0)
    scale = tl.load(c.data + head * c.strides[0] + ks * c.strides[1], inside, float("inf"))
    offset, scale = offset.to(tl.float64), tl.abs(scale.to(ACC))
    narrowest = tl.min(scale, 0).to(tl.float64)
    ratio = narrowest / scale.to(tl.float64)
    ratio *= ratio
    total = tl.sum(ratio, 0)
    m = tl.sum(offset * ratio, 0) / total
    v = tl.sum((offset - m) * (offset - m) * ratio, 0) / total
    precision = tl.minimum(1.0 / narrowest, MAX_PRECISION)
    return scale, inside, total * precision * precision, m, v


@triton.jit
def load_gaussian(parameters, head, _position, _view, PLAN: tl.constexpr):
    """Return the Gaussian of a head, rounded once."""
    scale, inside, a, m, v = load_moments(parameters, head, PLAN.K, PLAN.ACC)
    log2_norm = tl.sum(tl.where(inside, tl.log2(scale) + LOG2_SQRT_2PI, 0.0), 0)
    return Gaussian(a.to(PLAN.ACC), m.to(PLAN.ACC), v.to(PLAN.ACC), log2_norm, (a * HALF_LOG2_E).to(PLAN.ACC))


@triton.jit
def find_frame(gaussian, inv_var):
    """Return the Frame of each column's chunk."""
    limit = tl.rsqrt(inv_var) * 4.0
    origin = tl.minimum(tl.maximum(gaussian.m, -limit), limit)
    offset_cost = (gaussian.m - origin) * (gaussian.m - origin) + gaussian.v
    return Frame(origin, offset_cost, gaussian.half_log2_a * inv_var)


@triton.jit
def find_scale(total, min_s, frame, gaussian, log2_eps):
    """Return what relative weights of sum total are multiplied by, and whether that is free (1.0) or eps's (0.0)."""
    inverse = reciprocal(total)
    # NaN where eps is 0 and the cap overflows: then it is none
    log2_floor = gaussian.log2_norm + log2_eps.high + log2_eps.low
    cap = tl.exp2(-(min_s + frame.offset_cost) * frame.log2_factor - log2_floor)
    return tl.minimum(cap, inverse), 1.0 - (cap < inverse).to(total.dtype)


# --- One block ------------------------------------------------------------------------------------
@triton.jit
def measure(d, mean_error, gaussian, frame, valid):
    """Return (f, s) of every block: d - p, and s where it is valid; x - mean is d - mean_error.

    s is compared, and what it is compared with subtracted from it: both must be the same rounded product. What a fused
    one leaves in the difference a narrow Gaussian's precision would make anything.
    """
    near, far = mean_error + frame.origin, mean_error + (2.0 * gaussian.m - frame.origin)
    f, s = [], []
    for i in tl.static_range(len(d)):
        distance = d[i] - near
        f, s = f + [distance], s + [tl.where(valid[i], multiply_rounded(distance, d[i] - far), FAR)]
    return f, s


@triton.jit
def minimum_of(blocks):
    """Return the least of all blocks."""
    least = blocks[0]
    for i in tl.static_range(1, len(blocks)):
        least = tl.minimum(least, blocks[i])
    return least


@triton.jit
def weigh_gaps(gaps, log2_factor, valid):
    """Return weights relative to the likeliest position of the chunk, where s is least. gaps: the least s less that of
    every block. The difference comes first: a product can be so large that it is wrong by more than 1, and a mean of s
    by more than what tells positions apart.
    """
    weights = []
    for i in tl.static_range(len(gaps)):
        weights = weights + [tl.where(valid[i], tl.exp2(gaps[i] * log2_factor), 0.0)]
    return weights


@triton.jit
def weigh(s, frame, gaussian, log2_eps, valid, inv_count, mask):
    """Return (weights, gaps, the least s, whether the sum of the weights is free) of a tile that holds whole chunks."""
    min_s = where_nonempty(tl.min(minimum_of(s), 0)[None, :], inv_count, mask, 0.0)
    gaps = [min_s - block for block in s]
    relative = weigh_gaps(gaps, frame.log2_factor, valid)
    total = where_nonempty(tl.sum(add_blocks(relative), 0)[None, :], inv_count, mask, 1.0)
    scale, free = find_scale(total, min_s, frame, gaussian, log2_eps)
    return [block * scale for block in relative], gaps, min_s, free


@triton.jit
def find_excess(h, weights, free_h):
    """Return k of every block; h is not multiplied by the weights yet."""
    k = []
    for i in tl.static_range(len(h)):
        k = k + [h[i] * weights[i] - free_h * weights[i]]
    return k


@triton.jit
def differentiate_x(gradients, x, d, mean_error, f, frame, h, k, weights, sums, gaussian, inv_var, padding):
    """Return dx of every block; without k ([]) it takes less: dx = weights·(grad_y - (h - free·Σ h)·…). e is f less
    m - p, which is 0 unless m is beyond four standard deviations.
    """
    factor = gaussian.a * inv_var
    slope = factor * sums.slope
    constant, shift, grad = factor * sums.mean_ke - slope * mean_error, factor * (gaussian.m - frame.origin), []
    for i in tl.static_range(len(h)):
        common, ae = constant + slope * d[i], factor * f[i] - shift
        if padding is not None:
            padded = x[i] == padding
            direct = tl.where(padded, gradients.y[i], gradients.y[i] * weights[i])
            block = direct + tl.where(padded, 0.0, common) - (h[i] - sums.free_h) * weights[i] * ae
        elif len(k) == 0:
            block = (gradients.y[i] - (h[i] - sums.free_h) * ae) * weights[i] + common
        else:
            block = gradients.y[i] * weights[i] + (common - k[i] * ae)
        grad = grad + [block]
    return grad


@triton.jit
def sum_head(ke, kee, clamped, inv_var, inside):
    """Return what a tile adds to ke, kee, cr and cl, [1, 1] each, from the columns that count."""
    return [
        sum_columns(ke * inv_var, inside), sum_columns(kee * inv_var, inside), sum_columns(clamped * inv_var, inside),
        sum_columns(clamped, inside),
    ]  # fmt: skip


@triton.jit
def centre_unpadded(x, padding, tile, mask, eps, length, ACC: tl.constexpr):
    """Return (x - mean of every block, the Centred chunk, inv_var): padding counts as zeros in mean and variance."""
    chunk = centre(zero_padding(x, padding), tile, mask, length, ACC)
    d = chunk.blocks
    if padding is not None:
        d = []
        for i in tl.static_range(len(x)):
            d = d + [tl.where(tile.valid[i], x[i] - chunk.mean, 0.0)]
    inv_divisor = inverse_count_less_one(chunk.inv_count)
    return d, chunk, invert_variance(chunk.squares, inv_divisor, chunk.inv_count, mask, eps)


# --- Sums over strips, of weights relative to the likeliest position ------------------------------
@triton.jit
def add_relative(min_s, total, s, log2_factor, valid):
    """Return the least s of every place in a block, and the sum of weights relative to it, with those of a tile."""
    least = tl.minimum(min_s, minimum_of(s))
    more = add_blocks(weigh_gaps([least - block for block in s], log2_factor, valid))
    return least, total * tl.exp2((least - min_s) * log2_factor) + more


@triton.jit
def reduce_relative(min_s, total, log2_factor):
    """Return the least s of every column, and the sum of weights relative to it, from those of every place."""
    least = tl.min(min_s, 0)[None, :]
    return [least, tl.sum(total * tl.exp2((least - min_s) * log2_factor), 0)[None, :]]


@triton.jit
def merge_relative(strips, log2_factor, head, position, view, PLAN: tl.constexpr):
    """Return the least s of every chunk, and the sum of weights relative to it, from those of its strips."""
    min_s, total = tl.zeros_like(log2_factor) + FAR, tl.zeros_like(log2_factor)
    for first in range(0, view.n_strips, PLAN.BLOCK_P):
        least = load_strip_numbers(strips, 0, first, head, position, view, FAR, PLAN)
        sums = load_strip_numbers(strips, 1, first, head, position, view, 0.0, PLAN)
        before, min_s = min_s, tl.minimum(min_s, tl.min(least, 0)[None, :])
        more = tl.sum(sums * tl.exp2((min_s - least) * log2_factor), 0)[None, :]
        total = total * tl.exp2((min_s - before) * log2_factor) + more
    return min_s, total


@triton.jit
def add_weighted(sums, h, w, f, u, valid, mask):
    """Return Σ h·w, Σ h·w·f, Σ h·w·u, Σ w, Σ w·f, Σ w·u and, under a mask, n of every place with those of a tile."""
    sum_h, sum_hf, sum_hu, sum_w, sum_wf, sum_wu, n = sums
    for i in tl.static_range(len(h)):
        hw = h[i] * w[i]
        sum_h += hw
        sum_hf += hw * f[i]
        sum_hu += hw * u[i]
        sum_w += w[i]
        sum_wf += w[i] * f[i]
        sum_wu += w[i] * u[i]
    if mask is not None:
        n += add_blocks([block.to(n.dtype) for block in valid])
    return [sum_h, sum_hf, sum_hu, sum_w, sum_wf, sum_wu, n]


@triton.jit
def count_rows(sums, walk, mask, PLAN: tl.constexpr):
    """Return the sums with n, the last, in the first row of places, where no mask has counted it."""
    n = sums[len(sums) - 1]
    if mask is None:
        n = tl.where(tl.arange(0, PLAN.BLOCK_P)[:, None] == 0, (walk.strip_end - walk.strip_row).to(PLAN.ACC), n)
    return sums[: len(sums) - 1] + [n]


@triton.jit
def merge_weighted(strips, head, position, view, PLAN: tl.constexpr):
    """Return the seven sums of `add_weighted` of every chunk from those of its strips, which are added in fp64."""
    totals = zero_blocks(7, 1, PLAN.BLOCK_C, tl.float64)
    for first in range(0, view.n_strips, PLAN.BLOCK_P):
        more = []
        for i in tl.static_range(7):
            strip = load_strip_numbers(strips, i, first, head, position, view, 0.0, PLAN).to(tl.float64)
            more = more + [totals[i] + tl.sum(strip, 0)[None, :]]
        totals = more
    return [total.to(PLAN.ACC) for total in totals]
