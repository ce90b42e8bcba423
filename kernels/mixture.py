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

A chunk that fits on chip is read once. A longer one is streamed: `stats.py` and `_scales` walk it first, in the
backward pass `_sums`, then the same `_forward` and `_backward` take its blocks one by one.
"""

from __future__ import annotations

import math
import struct

import torch
import triton
import triton.language as tl
from torch import Tensor

from daam.kernels.call import Call
from daam.kernels.launch import BACKWARD_MIXTURE, FORWARD_MIXTURE, split_float
from daam.kernels.layout import Strided
from daam.kernels.passes import Backward, Forward
from daam.kernels.stats import find_stats
from daam.kernels.tile import (
    at_of,
    chunk_numbers,
    deviation,
    first_tile,
    gradients,
    inverse_count,
    padded_in,
    read_tile,
    share_less_one,
    store_partials,
    sum_partials,
    sum_to_one,
    write_dx,
    write_outputs,
)

# --- Kernels ------------------------------------------------------------------------------------
# x, mask, y, … are `layout.Strided` or None, extent is `call.Extent`, gaussians is (mean_offsets, c, how many). The
# statistics of streamed chunks are mean, rest, r2 and the least s.


@triton.jit
def _gaussian(gaussians, head, ACC: tl.constexpr, BLOCK_K: tl.constexpr):
    """a, m, v and l/log(2) of one head, scalars.

    Relative to the narrowest Gaussian, so that 1/c² overflows nowhere but in its limit: there, with c below 1e-12, all
    weight is on one position whatever a is.
    """
    mean_offsets, c, count = gaussians
    ks = tl.arange(0, BLOCK_K)
    offset = tl.load(mean_offsets.data + head * mean_offsets.strides[0] + ks * mean_offsets.strides[1], ks < count, 0.0)
    scale = tl.load(c.data + head * c.strides[0] + ks * c.strides[1], ks < count, float("inf"))
    offset, scale = offset.to(ACC), tl.abs(scale.to(ACC))
    narrowest = tl.min(scale, 0)
    part = narrowest / scale
    part *= part
    total = tl.sum(part, 0)
    m = tl.sum(offset * part, 0) / total
    v = tl.sum((offset - m) * (offset - m) * part, 0) / total
    precision = tl.minimum(1.0 / narrowest, 1099511627776.0)  # 2**40
    log = tl.where(ks < count, tl.log2(scale) + 1.3257480647361593, 0.0)  # log2(sqrt(2π))
    return total * precision * precision, m, v, tl.sum(log, 0)


@triton.jit
def _frame(gaussian, r2):
    """What columns measure in: p, (m - p)² + v, and the factor of s in log2 of the weights."""
    a, m, v, _log = gaussian
    far = 4.0 / tl.sqrt(r2)
    origin = tl.minimum(tl.maximum(m, -far), far)
    return origin, (m - origin) * (m - origin) + v, 0.7213475204444817 * a * r2


@triton.jit
def _distance(d, gaussian, origin, valid):
    """d - p, and s where it is valid. Selected before it is used: fused into one of its uses, the product would differ
    from what it is compared with by a rounding error, which a narrow Gaussian's precision makes anything.
    """
    f = d - origin
    return f, tl.where(valid, f * (d - (2.0 * gaussian[1] - origin)), 1e37)


@triton.jit
def _relative(s, nearest, precision, valid):
    """Weights relative to the likeliest position of the chunk, where s is least. The difference comes first: a product
    can be so large that it is wrong by more than 1.
    """
    return tl.where(valid, tl.exp2((nearest - s) * precision), 0.0)


@triton.jit
def _scale(total, nearest, rest, precision, gaussian, log_eps):
    """What relative weights, whose sum is total, are multiplied by, and whether it is free (1.0) or clamped to eps
    (0.0).
    """
    inverse = 1.0 / total
    cap = tl.exp2(-(nearest + rest) * precision - gaussian[3] - log_eps[0] - log_eps[1])
    clamped = cap < inverse  # not so where eps is 0 and an overflow makes the cap NaN
    return tl.where(clamped, cap, inverse), 1.0 - clamped.to(total.dtype)


@triton.jit
def _weights(s, rest, precision, gaussian, log_eps, valid, share):
    """Weights of a tile that holds whole chunks, and whether their sum is free."""
    nearest = tl.where(share > 0, tl.min(s, 0)[None, :], 0.0)
    w = _relative(s, nearest, precision, valid)
    scale, free = _scale(tl.where(share > 0, tl.sum(w, 0)[None, :], 1.0), nearest, rest, precision, gaussian, log_eps)
    return w * scale, free


@triton.jit
def _forward(
    x, gaussians, mask, padding, stats, scales, y, weights, eps, log_eps, extent,
    RESIDUAL: tl.constexpr, ACC: tl.constexpr, INDEX: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_CHUNK: tl.constexpr, BLOCK_INNER: tl.constexpr,
):  # fmt: skip
    head, first, step, row = first_tile(extent, BLOCK_CHUNK)
    gaussian = _gaussian(gaussians, head, ACC, BLOCK_K)
    for tile in range(first, extent.tiles, step):
        at, inside, valid, raw, xv = read_tile(
            x, mask, tile, head, row, extent, ACC, INDEX, BLOCK_CHUNK, BLOCK_INNER
        )  # fmt: skip
        d, r2, last = deviation(xv, valid, mask, padding, stats, extent, at, head, eps, True, ACC)
        origin, rest, precision = _frame(gaussian, r2)
        _f, s = _distance(d, gaussian, origin, valid)
        if stats is None:
            w, _free = _weights(s, rest, precision, gaussian, log_eps, valid, last)
        else:
            at_scale, _far, ok = chunk_numbers(scales, extent, at, head)
            w = _relative(s, last, precision, valid) * tl.load(at_scale, ok, 0.0)
        write_outputs(y, weights, xv, raw, w, padding, extent, at, inside, RESIDUAL)


@triton.jit
def _scales(
    x, gaussians, mask, padding, stats, scales, log_eps, extent,
    ACC: tl.constexpr, INDEX: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_CHUNK: tl.constexpr, BLOCK_INNER: tl.constexpr,
):  # fmt: skip
    """The least s of every chunk of one tile's columns, in place of its 1/n, and the scale of its weights, if asked."""
    head, tile = tl.program_id(1).to(tl.int64), tl.program_id(0)
    gaussian = _gaussian(gaussians, head, ACC, BLOCK_K)
    at = at_of(tile, head, 0, extent, INDEX, BLOCK_CHUNK, BLOCK_INNER)
    at_mean, step, ok = chunk_numbers(stats, extent, at, head)
    r2 = tl.load(at_mean + 2 * step, ok, 0.0)
    origin, rest, precision = _frame(gaussian, r2)
    nearest = tl.zeros([BLOCK_INNER], ACC) + 1e37  # not inf: the difference of two of them is NaN
    total = tl.zeros([BLOCK_INNER], ACC)
    for row in range(0, extent.chunk, BLOCK_CHUNK):
        at, _inside, valid, _raw, xv = read_tile(
            x, mask, tile, head, row, extent, ACC, INDEX, BLOCK_CHUNK, BLOCK_INNER
        )  # fmt: skip
        d, _r2, _last = deviation(xv, valid, mask, padding, stats, extent, at, head, None, True, ACC)
        _f, s = _distance(d, gaussian, origin, valid)
        before, nearest = nearest, tl.minimum(nearest, tl.min(s, 0))
        less = tl.exp2((nearest - before)[None, :] * precision)
        total = total * tl.sum(less, 0) + tl.sum(_relative(s, nearest[None, :], precision, valid), 0)
    total = tl.where(total == 0, 1.0, total)[None, :]
    scale, _free = _scale(total, nearest[None, :], rest, precision, gaussian, log_eps)
    tl.store(at_mean + 3 * step, nearest[None, :], ok)
    if scales is not None:
        at_scale, _step, ok = chunk_numbers(scales, extent, at, head)
        tl.store(at_scale, scale, ok)


@triton.jit
def _sums(
    x, grad_y, grad_weights, gaussians, mask, padding, stats, sums, partials, eps, log_eps, extent,
    ACC: tl.constexpr, INDEX: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_CHUNK: tl.constexpr, BLOCK_INNER: tl.constexpr,
):  # fmt: skip
    """The weights' scale, free·Σ h, Σ k·e/n and r2·(Σ k·e² + clamped·v)/(n - 1) of every chunk of one tile's columns.

    Sums are of relative weights, so that their scale need not be known before.
    """
    head, tile = tl.program_id(1).to(tl.int64), tl.program_id(0)
    gaussian = _gaussian(gaussians, head, ACC, BLOCK_K)
    at = at_of(tile, head, 0, extent, INDEX, BLOCK_CHUNK, BLOCK_INNER)
    at_mean, step, ok = chunk_numbers(stats, extent, at, head)
    r2, nearest = tl.load(at_mean + 2 * step, ok, 0.0), tl.load(at_mean + 3 * step, ok, 0.0)
    origin, rest, precision = _frame(gaussian, r2)
    sum_h = tl.zeros([BLOCK_CHUNK, BLOCK_INNER], ACC)
    sum_hf, sum_hs, sum_w, sum_wf, sum_ws = sum_h, sum_h, sum_h, sum_h, sum_h
    n = tl.zeros([BLOCK_INNER], ACC)
    for row in range(0, extent.chunk, BLOCK_CHUNK):
        at, inside, valid, _raw, xv = read_tile(
            x, mask, tile, head, row, extent, ACC, INDEX, BLOCK_CHUNK, BLOCK_INNER
        )  # fmt: skip
        d, _r2, _last = deviation(xv, valid, mask, padding, stats, extent, at, head, eps, True, ACC)
        f, s = _distance(d, gaussian, origin, valid)
        w = _relative(s, nearest, precision, valid)
        h, _raw = gradients(xv, grad_y, grad_weights, padding, extent, at, inside, valid, ACC)
        h *= w
        sum_h += h
        sum_hf += h * f
        sum_hs += h * s
        sum_w += w
        sum_wf += w * f
        sum_ws += w * s
        n += tl.sum(valid.to(ACC), 0)
    total = tl.sum(sum_w, 0)[None, :]
    total = tl.where(total == 0, 1.0, total)
    scale, free = _scale(total, nearest, rest, precision, gaussian, log_eps)
    all_h = tl.sum(sum_h, 0)[None, :] * scale
    taken, clamped = free * all_h, (1.0 - free) * all_h
    ke = scale * (tl.sum(sum_hf, 0)[None, :] - taken * tl.sum(sum_wf, 0)[None, :]) + clamped * (origin - gaussian[1])
    kee = scale * (tl.sum(sum_hs, 0)[None, :] - taken * tl.sum(sum_ws, 0)[None, :]) + clamped * rest
    share = inverse_count(n)[None, :]
    at_scale, step, ok = chunk_numbers(sums, extent, at, head)
    tl.store(at_scale, scale, ok)
    tl.store(at_scale + step, taken, ok)
    tl.store(at_scale + 2 * step, ke * share, ok)
    tl.store(at_scale + 3 * step, kee * r2 * share_less_one(share), ok)
    if partials is not None:
        store_partials(partials, _head_sums(ke, kee, clamped, r2, ok & (share > 0)), head)


@triton.jit
def _head_sums(ke, kee, clamped, r2, there):
    """What a tile adds to ke, kee, cr and cl, [1, 1] each."""
    r2, one = tl.where(there, r2, 0.0), tl.where(there, clamped, 0.0)
    return sum_to_one(ke * r2), sum_to_one(kee * r2), sum_to_one(one * r2), sum_to_one(one)


@triton.jit
def _backward(
    x, grad_y, grad_weights, gaussians, mask, padding, stats, sums, dx, partials, eps, log_eps, extent,
    RESIDUAL: tl.constexpr, ACC: tl.constexpr, INDEX: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_CHUNK: tl.constexpr, BLOCK_INNER: tl.constexpr,
):  # fmt: skip
    head, first, step, row = first_tile(extent, BLOCK_CHUNK)
    gaussian = _gaussian(gaussians, head, ACC, BLOCK_K)
    a, m, _v, _log = gaussian
    zero = tl.zeros([1, 1], ACC)
    totals = (zero, zero, zero, zero)
    for tile in range(first, extent.tiles, step):
        at, inside, valid, _raw, xv = read_tile(x, mask, tile, head, row, extent, ACC, INDEX, BLOCK_CHUNK, BLOCK_INNER)
        d, r2, last = deviation(xv, valid, mask, padding, stats, extent, at, head, eps, True, ACC)
        origin, rest, precision = _frame(gaussian, r2)
        f, s = _distance(d, gaussian, origin, valid)
        h, raw = gradients(xv, grad_y, grad_weights, padding, extent, at, inside, valid, ACC)
        if sums is None:
            w, free = _weights(s, rest, precision, gaussian, log_eps, valid, last)
            h *= w
            all_h = tl.sum(h, 0)[None, :]
            k, clamped = h - w * (free * all_h), (1.0 - free) * all_h
            ke = tl.sum(k * f, 0)[None, :] + clamped * (origin - m)
            kee = tl.sum(k * s, 0)[None, :] + clamped * rest
            mean_ke, slope = ke * last, kee * r2 * share_less_one(last)
            if partials is not None:
                added = _head_sums(ke, kee, clamped, r2, last > 0)
                totals = (totals[0] + added[0], totals[1] + added[1], totals[2] + added[2], totals[3] + added[3])
        else:
            at_scale, far, ok = chunk_numbers(sums, extent, at, head)
            w = _relative(s, last, precision, valid) * tl.load(at_scale, ok, 0.0)
            k = h * w - w * tl.load(at_scale + far, ok, 0.0)
            mean_ke, slope = tl.load(at_scale + 2 * far, ok, 0.0), tl.load(at_scale + 3 * far, ok, 0.0)
        if dx is not None:
            common = mean_ke + d * slope
            if padding is not None:
                common = tl.where(padded_in(xv, padding), 0.0, common)
                w = tl.where(padded_in(xv, padding), 1.0, w)
            grad = raw * w + a * r2 * (common - k * (d - m))
            write_dx(dx, grad, raw, extent, at, inside, valid, RESIDUAL)
    if partials is not None:
        store_partials(partials, totals, head)


@triton.jit
def _chain(partials, groups, gaussians, d_mean_offsets, d_c, BLOCK_K: tl.constexpr, BLOCK: tl.constexpr):
    """Gradients of one head's parameters from the partial sums, in fixed order and fp64: 1/c³ overflows fp32."""
    head = tl.program_id(1).to(tl.int64)
    mean_offsets, c, count = gaussians
    ke, kee = sum_partials(partials, groups, 0, head, BLOCK), sum_partials(partials, groups, 1, head, BLOCK)
    cr, cl = sum_partials(partials, groups, 2, head, BLOCK), sum_partials(partials, groups, 3, head, BLOCK)
    _a, m, v, _log = _gaussian(gaussians, head, tl.float64, BLOCK_K)
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
        scales = call.of_chunks(torch.empty_like(run.stats[:1])) if call.streamed else None
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
        partials, groups = run.launch(
            call, _sums, _backward, inputs, (numbers.eps, numbers.log_eps), sums=4, partials=4, residual=residual,
            BLOCK_K=numbers.block,
        )  # fmt: skip
        if need_params:
            of_grads = map(call.of_heads, grads)
            call.launch_sums(_chain, 1, partials, groups, numbers.gaussians, *of_grads, BLOCK_K=numbers.block)
    return run.dx, *grads


class _Numbers:
    """What the kernels of one call take beside tensors like x."""

    def __init__(self, call: Call, mean_offsets: Tensor, c: Tensor, eps: float, padding: int | None):
        self.call, self.padding = call, padding
        self.gaussians = (call.of_heads(mean_offsets), call.of_heads(c), c.shape[1])
        self.block = triton.next_power_of_2(c.shape[1])
        self.eps = split_float(eps)
        self.log_eps = split_float(math.log2(eps)) if eps > 0 else (-math.inf, 0.0)

    def find(self, stats: Strided, scales: Strided | None) -> None:
        """Fill the statistics of streamed chunks, and the scale of each chunk's weights."""
        call = self.call
        find_stats(call, stats, self.eps, self.padding, unbiased=True)
        inputs = (call.of.x, self.gaussians, call.of.mask, self.padding, stats, scales, self.log_eps)
        call.launch(_scales, call.extent.tiles, *inputs, BLOCK_K=self.block)


def _bits(padding: float | None, dtype: torch.dtype) -> int | None:
    """The padding value, rounded to x's dtype, as the bits of an fp64 number."""
    if padding is None:
        return None
    return struct.unpack("<q", struct.pack("<d", torch.tensor(padding, dtype=dtype).item()))[0]
