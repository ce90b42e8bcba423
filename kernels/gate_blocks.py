"""Arithmetic of the density gate, by the formulas of `gate.py`: a head's Gaussians, weights, their gradients."""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

from .algorithms import SIGMA_FLOOR, VARIANCE_FLOOR, WIDTH_FLOOR
from .blocks import LOG2_SQRT_2PI
from .operands import Strided
from .params import sum_columns

SQRT_HALF_LOG2_E = tl.constexpr(0.8493218002880191)
INV_SQRT_HALF_LOG2_E = tl.constexpr(1.1774100225154747)
INV_HALF_LOG2_E = tl.constexpr(1.3862943611198906)
MIN_VARIANCE = tl.constexpr(VARIANCE_FLOOR)
MIN_SIGMA = tl.constexpr(SIGMA_FLOOR)
MIN_WIDTH = tl.constexpr(WIDTH_FLOOR)


class Parameters(NamedTuple):
    """Hold the parameters (heads, K) as kernels take them."""

    mean_offsets: Strided
    log_sigma: Strided


class Gaussians(NamedTuple):
    """Hold [1, 1] for each Gaussian of a head: mean_offset, sigma and log2 of 1/(sqrt(2π)·sigma·K)."""

    mean_offset: list
    sigma: list
    log2_scale: list


class Scales(NamedTuple):
    """Hold [1, BLOCK_C] for each Gaussian, so that scaled z, which is z·sqrt(log2(e)/2), is factor·d - shift; x - mean
    being d - mean_error.
    """

    factor: list
    shift: list


# --- Gaussians of a head, and of a chunk ------------------------------------------------------------


@triton.jit
def softplus(x):
    """Return log(1 + exp(x)), x beyond 20. log(1 + t) loses t against 1: log(u)·t/(u - 1), u = 1 + t as rounded, does
    not.
    """
    t = tl.exp(tl.minimum(x, 20.0))
    u = 1.0 + t
    return tl.where(x > 20, x, tl.where(u == 1, t, tl.log(u) * (t / tl.where(u == 1, 1.0, u - 1.0))))


@triton.jit
def load_gaussians(parameters, head, _position, _view, K: tl.constexpr, PLAN: tl.constexpr):
    """Return the Gaussians of a head."""
    mean_offsets, log_sigmas = parameters.mean_offsets, parameters.log_sigma
    offsets, sigmas, log2_scales = [], [], []
    for k in tl.static_range(K):
        place = tl.zeros([1, 1], tl.int32) + k
        offset = tl.load(mean_offsets.data + head * mean_offsets.strides[0] + place * mean_offsets.strides[1])
        log_sigma = tl.load(log_sigmas.data + head * log_sigmas.strides[0] + place * log_sigmas.strides[1])
        sigma = softplus(log_sigma.to(PLAN.ACC)) + MIN_SIGMA
        offsets, sigmas = offsets + [offset.to(PLAN.ACC)], sigmas + [sigma]
        log2_scales = log2_scales + [tl.full([1, 1], -LOG2_SQRT_2PI, PLAN.ACC) - tl.log2(sigma * K)]
    return Gaussians(offsets, sigmas, log2_scales)


@triton.jit
def find_std(variance):
    """Return (std, 1/std where the variance is above its floor and 0 below)."""
    floor = tl.full([1, 1], MIN_VARIANCE, variance.dtype)  # tl.maximum takes a plain literal as fp32 (Triton 3.6)
    floored = tl.maximum(variance, floor, propagate_nan=tl.PropagateNan.ALL)
    inverse = tl.rsqrt(floored)
    return floored * inverse, tl.where(variance >= floor, inverse, 0.0)


@triton.jit
def scale_gaussians(gaussians, mean_error, std, K: tl.constexpr):
    """Return the Scales of each column's chunk."""
    factors, shifts = [], []
    for k in tl.static_range(K):
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
def weigh(d, scales, gaussians, valid, K: tl.constexpr):
    """Return (weights, slopes) of every block: slopes are Σ_k N_k·z_k/width_k, both factors as scaled."""
    weights, slopes = [], []
    for i in tl.static_range(len(d)):
        z, weight = weigh_one(d[i], 0, scales, gaussians)
        slope = weight * z * scales.factor[0]
        for k in tl.static_range(1, K):
            z, density = weigh_one(d[i], k, scales, gaussians)
            weight += density
            slope += density * z * scales.factor[k]
        weights, slopes = weights + [weight], slopes + [slope]
    masked = []
    for i in tl.static_range(len(d)):
        masked = masked + [tl.where(valid[i], weights[i], 0.0)]
    return masked, slopes


@triton.jit
def add_tile_products(products, d, h, scales, gaussians, K: tl.constexpr):
    """Return Σ t·z, Σ t·z² and Σ t of every Gaussian, z as scaled, with those of one more tile: of every place in a
    block by itself.
    """
    more = []
    for k in tl.static_range(K):
        sum_tz, sum_tzz, sum_t = products[3 * k], products[3 * k + 1], products[3 * k + 2]
        for i in tl.static_range(len(d)):
            z, density = weigh_one(d[i], k, scales, gaussians)
            t = h[i] * density
            sum_tz += t * z
            sum_tzz += t * z * z
            sum_t += t
        more = more + [sum_tz, sum_tzz, sum_t]
    return more


@triton.jit
def sum_chunks(products, scales, gaussians, std, column_mask, K: tl.constexpr):
    """Return Σ Σ_k q_k·z_k·sigma_k of each column, and what its tile adds to every Gaussian's Σ q and
    Σ (q·z·std + t/sigma), [1, 1] each.
    """
    sum_qzs = tl.zeros_like(std)
    totals = []
    for k in tl.static_range(K):
        sigma, factor = gaussians.sigma[k], scales.factor[k]
        # of z as it is: unscaled
        sum_q = tl.sum(products[3 * k], 0)[None, :] * -INV_HALF_LOG2_E * factor
        sum_qz = tl.sum(products[3 * k + 1], 0)[None, :] * (-INV_HALF_LOG2_E * INV_SQRT_HALF_LOG2_E) * factor
        sum_qzs += sum_qz * sigma
        sum_sigma = sum_qz * std + tl.sum(products[3 * k + 2], 0)[None, :] / sigma
        totals = totals + [sum_columns(sum_q, column_mask), sum_columns(sum_sigma, column_mask)]
    return sum_qzs, totals


@triton.jit
def find_q(h, slopes):
    """Return q of every block."""
    q = []
    for i in tl.static_range(len(h)):
        q = q + [h[i] * -INV_HALF_LOG2_E * slopes[i]]
    return q


@triton.jit
def differentiate_x(gradients, d, weights, q, common, slope):
    """Return dx of every block, but for the residual's part. The mean of q, in common, is that of the same numbers:
    where all are alike nothing is left.
    """
    grad = []
    for i in tl.static_range(len(d)):
        grad = grad + [gradients.y[i] * weights[i] + (q[i] - (common + slope * d[i]))]
    return grad
