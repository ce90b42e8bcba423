"""Mixture of densities (arXiv 2401.11143, Algorithm 2, as gaussian-adaptive-attention 0.1.5 has it), both passes.

A head's product of Gaussians is one Gaussian, whose numbers are made in the prologue of every program:

    a = Σ 1/c_k²      m = Σ (o_k/c_k²)/a      v = Σ ((o_k - m)²/c_k²)/a      l = Σ log(sqrt(2π)·|c_k|)

Over one chunk of length n, with d = x - mean, e = d - m and r2 = 1/(var + eps), var unbiased and centred:

    log g = -(a·r2/2)·(e² + v) - l      weights = exp(log g - max(log Σ g, log eps))      y = x·weights (+ x)

    h = (grad_y·x + grad_weights)·weights      free = [log Σ g >= log eps]
    k = h - free·weights·Σ h                   clamped = (1 - free)·Σ h
    dx = grad_y·weights - a·r2·(k·e - Σ k·e/n - d·r2·(Σ k·e² + clamped·v)/(n - 1)) (+ grad_y)

and per head, summed over all chunks, δ_k being o_k - m:

    ke = Σ r2·Σ k·e      kee = Σ r2·(Σ k·e² + clamped·v)      cr = Σ r2·clamped      cl = Σ clamped
    d_mean_offset_k = (ke - δ_k·cr)/c_k²      d_c_k = (kee - 2δ_k·ke + (δ_k² - v)·cr)/c_k³ - cl/c_k

e² is taken as s + (m - p)², s = (d - p)·(d - q), q = 2m - p, where the origin p is m or, if that is further off, four
standard deviations: so far out, e² would round away what tells the positions apart. Positions that hold the padding
value count as zeros in mean and variance, so dx has neither sum there, and pass x through.

A chunk that fits on chip is read once. A longer one is streamed: `stats.py` and `_scales` walk its strips first, in the
backward pass `_sums`, and `_merge_…` makes of theirs the numbers of the chunk; then the same `_forward` and `_backward`
take the strips again.
"""

from __future__ import annotations

import math
import struct

import torch
import triton
import triton.language as tl
from torch import Tensor

from daam.kernels.call import Call
from daam.kernels.launch import BACKWARD_MIXTURE, FORWARD_MIXTURE, power_of_2, split_float
from daam.kernels.layout import Strided
from daam.kernels.passes import Backward, Forward
from daam.kernels.stats import find_stats, store_strip, strip_numbers
from daam.kernels.tile import (
    added,
    along_chunk,
    at_of,
    columns_inside,
    convert,
    deviation,
    first_tile,
    gradients,
    inverse_count,
    less,
    load_numbers,
    next_tile,
    of_weights,
    padded_in,
    products,
    read_tile,
    reciprocal,
    rounded_product,
    share_less_one,
    spot_of,
    store_numbers,
    store_partials,
    sum_partials,
    sum_to_one,
    there,
    write_dx,
    write_outputs,
)

# --- Kernels ------------------------------------------------------------------------------------
# x, mask, y, … are `layout.Strided` or None, extent is `layout.Extent`, gaussians is (mean_offsets, c, how many). The
# statistics of streamed chunks are mean, rest, r2 and the least s.


@triton.jit
def _gaussian(gaussians, head, ACC: tl.constexpr, BLOCK_K: tl.constexpr):
    """a, m, v and l/log(2) of one head, and a·log2(e)/2, scalars.

    In fp64 up to their last rounding: an error of a or m is one of all weights alike, which does not average out of the
    sums that become gradients of the parameters. Relative to the narrowest Gaussian, so that 1/c² overflows nowhere but
    in its limit: there, with c below 1e-12, all weight is on one position whatever a is.
    """
    mean_offsets, c, count = gaussians
    ks = tl.arange(0, BLOCK_K)
    offset = tl.load(mean_offsets.data + head * mean_offsets.strides[0] + ks * mean_offsets.strides[1], ks < count, 0.0)
    scale = tl.load(c.data + head * c.strides[0] + ks * c.strides[1], ks < count, float("inf"))
    offset, scale = offset.to(tl.float64), tl.abs(scale.to(ACC))
    narrowest = tl.min(scale, 0).to(tl.float64)
    part = narrowest / scale.to(tl.float64)
    part *= part
    total = tl.sum(part, 0)
    m = tl.sum(offset * part, 0) / total
    v = tl.sum((offset - m) * (offset - m) * part, 0) / total
    precision = tl.minimum(1.0 / narrowest, 1099511627776.0)  # 2**40
    a = total * precision * precision
    log = tl.where(ks < count, tl.log2(scale) + 1.3257480647361593, 0.0)  # log2(sqrt(2π))
    return a.to(ACC), m.to(ACC), v.to(ACC), tl.sum(log, 0), (a * 0.7213475204444817).to(ACC)


@triton.jit
def _frame(gaussian, r2):
    """What columns measure in: p, (m - p)² + v, and the factor of s in log2 of the weights."""
    m, v, half_log2_a = gaussian[1], gaussian[2], gaussian[4]
    far = 4.0 * tl.rsqrt(r2)
    origin = tl.minimum(tl.maximum(m, -far), far)
    return origin, (m - origin) * (m - origin) + v, half_log2_a * r2


@triton.jit
def _distance(d, rest, gaussian, origin, valid):
    """d - p, and s where it is valid, of every block; x - mean is d - rest.

    s is compared, and what it is compared with subtracted from it: both must be the same rounded product. What a fused
    one leaves in the difference a narrow Gaussian's precision would make anything.
    """
    near, far = rest + origin, rest + (2.0 * gaussian[1] - origin)
    f, s = (), ()
    for i in tl.static_range(len(d)):
        from_near = d[i] - near
        f = f + (from_near,)
        s = s + (tl.where(valid[i], rounded_product(from_near, d[i] - far), 1e37),)
    return f, s


@triton.jit
def _nearest(s):
    """The least s of all blocks."""
    least = s[0]
    for i in tl.static_range(1, len(s)):
        least = tl.minimum(least, s[i])
    return least


@triton.jit
def _under(s, nearest):
    """The least s less that of every block's positions: what weights depend on, and sums are of. The difference comes
    first: a product can be so large that it is wrong by more than 1, and a mean of s by more than what tells positions
    apart.
    """
    parts = ()
    for i in tl.static_range(len(s)):
        parts = parts + (nearest - s[i],)
    return parts


@triton.jit
def _relative(under, precision, valid):
    """Weights relative to the likeliest position of the chunk, where s is least."""
    parts = ()
    for i in tl.static_range(len(under)):
        parts = parts + (tl.where(valid[i], tl.exp2(under[i] * precision), 0.0),)
    return parts


@triton.jit
def _times(w, scale):
    parts = ()
    for i in tl.static_range(len(w)):
        parts = parts + (w[i] * scale,)
    return parts


@triton.jit
def _scale(total, nearest, away, precision, gaussian, log_eps):
    """What relative weights, whose sum is total, are multiplied by, and whether it is free (1.0) or clamped to eps
    (0.0). away is what `_frame` has beside s.
    """
    inverse = reciprocal(total)
    # NaN where eps is 0 and the cap overflows: then it is none
    cap = tl.exp2(-(nearest + away) * precision - (gaussian[3] + log_eps[0] + log_eps[1]))
    return tl.minimum(cap, inverse), 1.0 - (cap < inverse).to(total.dtype)


@triton.jit
def _weights(s, away, precision, gaussian, log_eps, valid, share, mask):
    """Weights of a tile that holds whole chunks, `_under`, the least s and whether the sum of the weights is free."""
    nearest = there(share, mask, tl.min(_nearest(s), 0)[None, :], 0.0)
    under = _under(s, nearest)
    w = _relative(under, precision, valid)
    total = there(share, mask, along_chunk(added(w)), 1.0)
    scale, free = _scale(total, nearest, away, precision, gaussian, log_eps)
    return _times(w, scale), under, nearest, free


@triton.jit
def _forward(
    x, gaussians, mask, padding, stats, scales, y, weights, eps, log_eps, extent,
    RESIDUAL: tl.constexpr, ACC: tl.constexpr, INDEX: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_CHUNK: tl.constexpr, BLOCK_INNER: tl.constexpr, PARTS: tl.constexpr, RAGGED: tl.constexpr,
):  # fmt: skip
    head, start, first, step, spot, apart = first_tile(extent, stats is not None)
    gaussian = _gaussian(gaussians, head, ACC, BLOCK_K)
    for _tile in range(first, extent.tiles, step):
        if stats is None:
            at, inside, valid, raw, xv = read_tile(
                x, mask, spot, head, start, extent, RESIDUAL, ACC, INDEX, BLOCK_CHUNK, BLOCK_INNER, PARTS, RAGGED
            )
            d, rest, r2, share = deviation(xv, valid, mask, padding, extent, eps, True, ACC)
            origin, away, precision = _frame(gaussian, r2)
            _f, s = _distance(d, rest, gaussian, origin, valid)
            w, _u, _least, _free = _weights(s, away, precision, gaussian, log_eps, valid, share, mask)
            write_outputs(y, weights, xv, raw, w, padding, extent, at, inside, RESIDUAL)
        else:
            own = at_of(spot, head, start, extent, INDEX, BLOCK_CHUNK, BLOCK_INNER)
            mean, rest, r2, nearest = load_numbers(stats, extent, own, head, 4)
            (scale,) = load_numbers(scales, extent, own, head, 1)
            origin, _away, precision = _frame(gaussian, r2)
            for row in range(start, tl.minimum(start + extent.strip, extent.chunk), BLOCK_CHUNK * PARTS):
                at, inside, valid, raw, xv = read_tile(
                    x, mask, spot, head, row, extent, RESIDUAL, ACC, INDEX, BLOCK_CHUNK, BLOCK_INNER, PARTS, RAGGED
                )
                _f, s = _distance(less(xv, mean), rest, gaussian, origin, valid)
                w = _times(_relative(_under(s, nearest), precision, valid), scale)
                write_outputs(y, weights, xv, raw, w, padding, extent, at, inside, RESIDUAL)
        spot = next_tile(spot, apart, extent)


@triton.jit
def _scales(
    x, gaussians, mask, stats, strips, extent,
    ACC: tl.constexpr, INDEX: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_CHUNK: tl.constexpr, BLOCK_INNER: tl.constexpr, PARTS: tl.constexpr, RAGGED: tl.constexpr,
):  # fmt: skip
    """The least s of every chunk's strip of one tile's columns, and the sum of the weights relative to it."""
    head, start, _first, _step, spot, _apart = first_tile(extent, True)
    gaussian = _gaussian(gaussians, head, ACC, BLOCK_K)
    own = at_of(spot, head, start, extent, INDEX, BLOCK_CHUNK, BLOCK_INNER)
    mean, rest, r2 = load_numbers(stats, extent, own, head, 3)
    origin, _away, precision = _frame(gaussian, r2)
    # of every place in a block by itself: they are compared once, at the end
    nearest = tl.zeros([BLOCK_CHUNK, BLOCK_INNER], ACC) + 1e37  # not inf: the difference of two of them is NaN
    total = tl.zeros([BLOCK_CHUNK, BLOCK_INNER], ACC)
    for row in range(start, tl.minimum(start + extent.strip, extent.chunk), BLOCK_CHUNK * PARTS):
        _at, _inside, valid, _raw, xv = read_tile(
            x, mask, spot, head, row, extent, False, ACC, INDEX, BLOCK_CHUNK, BLOCK_INNER, PARTS, RAGGED
        )
        _f, s = _distance(less(xv, mean), rest, gaussian, origin, valid)
        before, nearest = nearest, tl.minimum(nearest, _nearest(s))
        more = added(_relative(_under(s, nearest), precision, valid))
        total = total * tl.exp2((nearest - before) * precision) + more
    least = tl.min(nearest, 0)[None, :]
    total = along_chunk(total * tl.exp2((least - nearest) * precision))
    store_strip(strips, extent, own, head, start, (least, total))


@triton.jit
def _merge_scales(
    strips, gaussians, stats, scales, log_eps, extent,
    ACC: tl.constexpr, INDEX: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_CHUNK: tl.constexpr, BLOCK_INNER: tl.constexpr,
):  # fmt: skip
    """The least s of every chunk of one tile's columns, in place of its 1/n, and the scale of its weights, if asked."""
    head, spot = tl.program_id(1).to(tl.int64), spot_of(tl.program_id(0), extent)
    gaussian = _gaussian(gaussians, head, ACC, BLOCK_K)
    at = at_of(spot, head, 0, extent, INDEX, BLOCK_CHUNK, BLOCK_INNER)
    mean, rest, r2 = load_numbers(stats, extent, at, head, 3)
    _origin, away, precision = _frame(gaussian, r2)
    nearest, total = tl.zeros_like(r2) + 1e37, tl.zeros_like(r2)
    for first in range(0, extent.strips, BLOCK_CHUNK):
        least = strip_numbers(strips, 0, first, extent, at, head, BLOCK_CHUNK, 1e37)
        sums = strip_numbers(strips, 1, first, extent, at, head, BLOCK_CHUNK, 0.0)
        before, nearest = nearest, tl.minimum(nearest, tl.min(least, 0)[None, :])
        more = along_chunk(sums * tl.exp2((nearest - least) * precision))
        total = total * tl.exp2((nearest - before) * precision) + more
    total = tl.where(total == 0, 1.0, total)
    scale, _free = _scale(total, nearest, away, precision, gaussian, log_eps)
    store_numbers(stats, extent, at, head, (mean, rest, r2, nearest))
    if scales is not None:
        store_numbers(scales, extent, at, head, (scale,))


@triton.jit
def _sums(
    x, grad_y, grad_weights, gaussians, mask, padding, stats, strips, extent,
    ACC: tl.constexpr, INDEX: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_CHUNK: tl.constexpr, BLOCK_INNER: tl.constexpr, PARTS: tl.constexpr, RAGGED: tl.constexpr,
):  # fmt: skip
    """Σ h, Σ h·f, Σ h·u, Σ w, Σ w·f, Σ w·u and n of every chunk's strip of one tile's columns, f being d - p and u what
    `_under` gives.

    Of relative weights, so that their scale need not be known before.
    """
    head, start, _first, _step, spot, _apart = first_tile(extent, True)
    gaussian = _gaussian(gaussians, head, ACC, BLOCK_K)
    own = at_of(spot, head, start, extent, INDEX, BLOCK_CHUNK, BLOCK_INNER)
    mean, rest, r2, nearest = load_numbers(stats, extent, own, head, 4)
    origin, _away, precision = _frame(gaussian, r2)
    sum_h = tl.zeros([BLOCK_CHUNK, BLOCK_INNER], ACC)
    sum_hf, sum_hu, sum_w, sum_wf, sum_wu, n = sum_h, sum_h, sum_h, sum_h, sum_h, sum_h
    for row in range(start, tl.minimum(start + extent.strip, extent.chunk), BLOCK_CHUNK * PARTS):
        at, inside, valid, _raw, xv = read_tile(
            x, mask, spot, head, row, extent, False, ACC, INDEX, BLOCK_CHUNK, BLOCK_INNER, PARTS, RAGGED
        )
        f, s = _distance(less(xv, mean), rest, gaussian, origin, valid)
        under = _under(s, nearest)
        w = _relative(under, precision, valid)
        h = of_weights(gradients(grad_y, grad_weights, mask, extent, at, inside, valid, False, ACC), xv, padding)
        for i in tl.static_range(PARTS):
            hw = h[i] * w[i]
            sum_h += hw
            sum_hf += hw * f[i]
            sum_hu += hw * under[i]
            sum_w += w[i]
            sum_wf += w[i] * f[i]
            sum_wu += w[i] * under[i]
        if mask is not None:
            n += added(convert(valid, ACC))
    if mask is None:
        length = (tl.minimum(start + extent.strip, extent.chunk) - start).to(ACC)
        n = tl.where(tl.arange(0, BLOCK_CHUNK)[:, None] == 0, length, n)
    sums = (along_chunk(sum_h), along_chunk(sum_hf), along_chunk(sum_hu), along_chunk(sum_w), along_chunk(sum_wf))
    store_strip(strips, extent, own, head, start, sums + (along_chunk(sum_wu), along_chunk(n)))


@triton.jit
def _merge_sums(
    strips, gaussians, stats, sums, partials, log_eps, extent,
    ACC: tl.constexpr, INDEX: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_CHUNK: tl.constexpr, BLOCK_INNER: tl.constexpr,
):  # fmt: skip
    """The weights' scale, free·Σ h, Σ k·e/n and r2·(Σ k·e² + clamped·v)/(n - 1) of the chunks of one tile's columns.

    Strips are added in fp64. Sums of k are differences: where all weight is on one position nothing is left of them, if
    products are rounded there as they were in `_sums`.
    """
    head, spot = tl.program_id(1).to(tl.int64), spot_of(tl.program_id(0), extent)
    gaussian = _gaussian(gaussians, head, ACC, BLOCK_K)
    at = at_of(spot, head, 0, extent, INDEX, BLOCK_CHUNK, BLOCK_INNER)
    _mean, _rest, r2, nearest = load_numbers(stats, extent, at, head, 4)
    origin, away, precision = _frame(gaussian, r2)
    zero = tl.zeros_like(r2).to(tl.float64)
    of_strips = (zero, zero, zero, zero, zero, zero, zero)
    for first in range(0, extent.strips, BLOCK_CHUNK):
        more = ()
        for i in tl.static_range(7):
            part = strip_numbers(strips, i, first, extent, at, head, BLOCK_CHUNK, 0.0)
            more = more + (of_strips[i] + along_chunk(part.to(tl.float64)),)
        of_strips = more
    sum_h, sum_hf, sum_hu, sum_w, sum_wf, sum_wu, n = convert(of_strips, ACC)
    scale, free = _scale(tl.where(sum_w == 0, 1.0, sum_w), nearest, away, precision, gaussian, log_eps)
    all_h = sum_h * scale
    taken, clamped = free * all_h, (1.0 - free) * all_h
    ke = scale * (sum_hf - rounded_product(taken, sum_wf)) + clamped * (origin - gaussian[1])
    kee = clamped * (nearest + away) - scale * (sum_hu - rounded_product(taken, sum_wu))
    share = inverse_count(n)
    store_numbers(sums, extent, at, head, (scale, taken, ke * share, kee * r2 * share_less_one(share)))
    if partials is not None:
        counted = columns_inside(extent, at) & (share > 0)
        store_partials(partials, _head_sums(ke, kee, clamped, r2, counted), head)


@triton.jit
def _head_sums(ke, kee, clamped, r2, counted):
    """What a tile adds to ke, kee, cr and cl, [1, 1] each, from the columns that count."""
    sums = (ke * r2, kee * r2, clamped * r2, clamped)
    totals = ()
    for i in tl.static_range(4):
        totals = totals + (sum_to_one(tl.where(counted, sums[i], 0.0)),)
    return totals


@triton.jit
def _backward(
    x, grad_y, grad_weights, gaussians, mask, padding, stats, sums, dx, partials, eps, log_eps, extent,
    RESIDUAL: tl.constexpr, ACC: tl.constexpr, INDEX: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_CHUNK: tl.constexpr, BLOCK_INNER: tl.constexpr, PARTS: tl.constexpr, RAGGED: tl.constexpr,
):  # fmt: skip
    head, start, first, step, spot, apart = first_tile(extent, stats is not None)
    gaussian = _gaussian(gaussians, head, ACC, BLOCK_K)
    zero = tl.zeros([1, 1], ACC)
    totals = (zero, zero, zero, zero)
    for _tile in range(first, extent.tiles, step):
        if stats is None:
            at, inside, valid, _raw, xv = read_tile(
                x, mask, spot, head, start, extent, False, ACC, INDEX, BLOCK_CHUNK, BLOCK_INNER, PARTS, RAGGED
            )
            d, rest, r2, share = deviation(xv, valid, mask, padding, extent, eps, True, ACC)
            origin, away, precision = _frame(gaussian, r2)
            f, s = _distance(d, rest, gaussian, origin, valid)
            w, under, nearest, free = _weights(s, away, precision, gaussian, log_eps, valid, share, mask)
            gradient = gradients(grad_y, grad_weights, mask, extent, at, inside, valid, RESIDUAL, ACC)
            h = of_weights(gradient, xv, padding)
            all_h = along_chunk(products(h, w))
            taken, clamped = free * all_h, (1.0 - free) * all_h
            k = _excess(h, w, taken)
            ke = along_chunk(products(k, f)) + clamped * (origin - gaussian[1])
            kee = clamped * (nearest + away) - along_chunk(products(k, under))
            if dx is not None:
                numbers = (taken, ke * share, kee * r2 * share_less_one(share))
                grad = _gradient(gradient, xv, d, rest, h, k, w, numbers, gaussian, r2, padding)
                write_dx(dx, grad, gradient[0], extent, at, inside, valid, RESIDUAL)
            if partials is not None:
                counted = columns_inside(extent, at) & (share > 0)
                more = _head_sums(ke, kee, clamped, r2, counted)
                totals = (totals[0] + more[0], totals[1] + more[1], totals[2] + more[2], totals[3] + more[3])
        else:
            own = at_of(spot, head, start, extent, INDEX, BLOCK_CHUNK, BLOCK_INNER)
            mean, rest, r2, nearest = load_numbers(stats, extent, own, head, 4)
            scale, taken, mean_ke, slope = load_numbers(sums, extent, own, head, 4)
            origin, _away, precision = _frame(gaussian, r2)
            for row in range(start, tl.minimum(start + extent.strip, extent.chunk), BLOCK_CHUNK * PARTS):
                at, inside, valid, _raw, xv = read_tile(
                    x, mask, spot, head, row, extent, False, ACC, INDEX, BLOCK_CHUNK, BLOCK_INNER, PARTS, RAGGED
                )
                d = less(xv, mean)
                _f, s = _distance(d, rest, gaussian, origin, valid)
                w = _times(_relative(_under(s, nearest), precision, valid), scale)
                gradient = gradients(grad_y, grad_weights, mask, extent, at, inside, valid, RESIDUAL, ACC)
                h = of_weights(gradient, xv, padding)
                grad = _gradient(gradient, xv, d, rest, h, None, w, (taken, mean_ke, slope), gaussian, r2, padding)
                write_dx(dx, grad, gradient[0], extent, at, inside, valid, RESIDUAL)
        spot = next_tile(spot, apart, extent)
    if partials is not None:
        store_partials(partials, totals, head)


@triton.jit
def _excess(h, w, taken):
    """k of every block; h is not multiplied by the weights yet."""
    k = ()
    for i in tl.static_range(len(h)):
        k = k + (h[i] * w[i] - taken * w[i],)
    return k


@triton.jit
def _gradient(gradient, x, d, rest, h, k, w, numbers, gaussian, r2, padding):
    """dx of every block; numbers are free·Σ h, Σ k·e/n and r2·(Σ k·e² + clamped·v)/(n - 1).

    k, where it is not needed otherwise (None), is not made: dx = weights·(grad_y - (h - free·Σ h)·…) takes less.
    """
    factor = gaussian[0] * r2
    slope = factor * numbers[2]
    constant, shift = factor * numbers[1] - slope * rest, factor * (rest + gaussian[1])
    grad = ()
    for i in tl.static_range(len(h)):
        common, ae = constant + slope * d[i], factor * d[i] - shift
        if padding is not None:
            padded = padded_in(x[i], padding)
            direct = tl.where(padded, gradient[1][i], gradient[1][i] * w[i])
            of_block = direct + tl.where(padded, 0.0, common) - (h[i] - numbers[0]) * w[i] * ae
        elif k is None:
            of_block = (gradient[1][i] - (h[i] - numbers[0]) * ae) * w[i] + common
        else:
            of_block = gradient[1][i] * w[i] + (common - k[i] * ae)
        grad = grad + (of_block,)
    return grad


@triton.jit
def _chain(partials, groups, gaussians, d_mean_offsets, d_c, BLOCK_K: tl.constexpr, BLOCK: tl.constexpr):
    """Gradients of one head's parameters from the partial sums, in fixed order and fp64: 1/c³ overflows fp32."""
    head = tl.program_id(1).to(tl.int64)
    mean_offsets, c, count = gaussians
    ke, kee = sum_partials(partials, groups, 0, head, BLOCK), sum_partials(partials, groups, 1, head, BLOCK)
    cr, cl = sum_partials(partials, groups, 2, head, BLOCK), sum_partials(partials, groups, 3, head, BLOCK)
    _a, m, v, _log, _half = _gaussian(gaussians, head, tl.float64, BLOCK_K)
    ks = tl.arange(0, BLOCK_K)
    offset = tl.load(mean_offsets.data + head * mean_offsets.strides[0] + ks * mean_offsets.strides[1], ks < count, 0.0)
    scale = tl.load(c.data + head * c.strides[0] + ks * c.strides[1], ks < count, 1.0).to(tl.float64)
    offset = offset.to(tl.float64) - m
    of_offset = (ke - offset * cr) / scale / scale
    of_scale = (kee - 2.0 * offset * ke + (offset * offset - v) * cr) / scale / scale / scale - cl / scale
    out = d_mean_offsets.data + head * d_mean_offsets.strides[0] + ks
    tl.store(out, of_offset.to(d_mean_offsets.data.dtype.element_ty), ks < count)
    out = d_c.data + head * d_c.strides[0] + ks
    tl.store(out, of_scale.to(d_c.data.dtype.element_ty), ks < count)


# --- Launchers ----------------------------------------------------------------------------------


def forward(
    x: Tensor, mean_offsets: Tensor, c: Tensor, mask: Tensor | None, axis: int, eps: float, padding: float | None,
    residual: bool, return_weights: bool, save_stats: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:  # fmt: skip
    """y, weights and statistics, contiguous; None where not asked for, and the statistics of chunks on chip."""
    run = Forward(x, mask, c.shape[0], axis, return_weights, tiles=FORWARD_MIXTURE)
    for call in run.calls():
        of, stats = call.of, call.of_chunks(run.stats)
        numbers = _Numbers(call, mean_offsets, c, eps, _bits(padding, x.dtype))
        scales = call.of_strips(1, strips=1) if call.streamed else None
        if call.streamed:
            numbers.find(stats, scales)
        call.launch(
            _forward, call.programs, of.x, numbers.gaussians, of.mask, numbers.padding, stats, scales, of.y, of.weights,
            numbers.eps, numbers.log_eps, RESIDUAL=residual, BLOCK_K=numbers.block,
        )  # fmt: skip
    return run.outputs(save_stats)


def backward(
    grad_y: Tensor | None, grad_weights: Tensor | None, x: Tensor, mean_offsets: Tensor, c: Tensor, mask: Tensor | None,
    stats: Tensor | None, axis: int, eps: float, padding: float | None, residual: bool, need_x: bool, need_params: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    """Gradients of x, mean_offsets and c, contiguous; None where not needed. stats are recomputed where None."""
    heads = c.shape[0]
    run = Backward(x, mask, grad_y, grad_weights, stats, heads, axis, need_x, need_params, tiles=BACKWARD_MIXTURE)
    grads = run.param_grads(mean_offsets, c)
    for call in run.calls():
        of, stats = call.of, call.of_chunks(run.stats)
        numbers = _Numbers(call, mean_offsets, c, eps, _bits(padding, x.dtype))
        if run.lacks_stats:
            numbers.find(stats, None)
        inputs = (of.x, of.grad_y, of.grad_weights, numbers.gaussians, of.mask, numbers.padding, stats)
        constants = (numbers.eps, numbers.log_eps)
        sums, partials, groups = None, None, call.programs
        if call.streamed:
            strips, sums, groups = call.of_strips(7), call.of_strips(4, strips=1), call.extent.tiles
            partials = run.partials(call, 4, groups)
            call.launch(_sums, call.programs, *inputs, strips, BLOCK_K=numbers.block)
            args = (strips, numbers.gaussians, stats, sums, partials, numbers.log_eps)
            call.launch_merge(_merge_sums, *args, BLOCK_K=numbers.block)
        elif need_params:
            groups = call.programs_of_sums(4)
            partials = run.partials(call, 4, groups)
        if need_x or not call.streamed:
            of_backward = None if call.streamed else partials
            programs = call.programs if call.streamed else groups
            call.launch(
                _backward, programs, *inputs, sums, of.dx, of_backward, *constants, RESIDUAL=residual,
                BLOCK_K=numbers.block,
            )  # fmt: skip
        if need_params:
            of_grads = map(call.of_heads, grads)
            call.launch_sums(
                _chain, 1, partials, groups, numbers.gaussians, *of_grads, BLOCK_K=numbers.block, BLOCK=1024
            )
    return run.dx, *grads


class _Numbers:
    """What the kernels of one call take beside tensors like x."""

    def __init__(self, call: Call, mean_offsets: Tensor, c: Tensor, eps: float, padding: int | None):
        self.call, self.padding = call, padding
        self.gaussians = (call.of_heads(mean_offsets), call.of_heads(c), c.shape[1])
        self.block = power_of_2(c.shape[1])
        self.eps = split_float(eps)
        self.log_eps = split_float(math.log2(eps)) if eps > 0 else (-math.inf, 0.0)

    def find(self, stats: Strided, scales: Strided | None) -> None:
        """Fill the statistics of streamed chunks, and the scale of each chunk's weights."""
        call = self.call
        find_stats(call, stats, self.eps, self.padding, unbiased=True)
        strips = call.of_strips(2)
        call.launch(_scales, call.programs, call.of.x, self.gaussians, call.of.mask, stats, strips, BLOCK_K=self.block)
        call.launch_merge(_merge_scales, strips, self.gaussians, stats, scales, self.log_eps, BLOCK_K=self.block)


def _bits(padding: float | None, dtype: torch.dtype) -> int | None:
    """The padding value, rounded to x's dtype, as the bits of an fp64 number."""
    if padding is None:
        return None
    return struct.unpack("<q", struct.pack("<d", torch.tensor(padding, dtype=dtype).item()))[0]
