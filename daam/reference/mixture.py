"""Mixture of densities, arXiv 2401.11143, Algorithm 2, as the package gaussian-adaptive-attention 0.1.5 computes it.

Parameters mean_offsets and c are (heads, num_gaussians). The product of a head's Gaussians is one Gaussian: with
r2 = 1/(var + eps), a = Σ 1/c_k², m = Σ (o_k/c_k²)/a, v = Σ ((o_k - m)²/c_k²)/a and l = Σ log(sqrt(2π)·|c_k|),

    log Π_k g_k = -(a·r2/2)·((x - mean - m)² + v) - l

so that nothing but four numbers a head depends on the number of Gaussians. weights = exp(log Π g - max(log Σ Π g,
log eps)) underflows nowhere but where a weight itself does. Where m is far from x - mean, (x - mean - m)² would round
away what tells positions apart: it is taken as (x - mean - p)·(x - mean - (2m - p)) + (m - p)², p being m or, if that
is further off, four standard deviations; the last term, being the same for all positions, joins v.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from daam.reference.chunks import Chunks, in_parts, in_slices

LOG2_E = 1.4426950408889634
HALF_LOG_2PI = 0.9189385332046727


@in_parts
def formula(
    x: Tensor, mean_offsets: Tensor, c: Tensor, mask: Tensor | None, axis: int, eps: float, padding: float | None,
    residual: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """y and weights: z_k = (x - mean - mean_offset_k) / sqrt(var + eps), g_k = exp(-z_k²/(2c_k²)) / sqrt(2π·c_k²),
    weights = Π_k g_k / max(Σ_chunk Π_k g_k, eps), the product and the sum in log space; y = x·weights.
    """
    chunks = Chunks(x, c.shape[0], mask, axis, padding)
    d, square = chunks.centred()
    r = torch.rsqrt(_variance(chunks, square) + (eps + chunks.empty))
    log = torch.zeros_like(d)
    for offset, scale in zip(mean_offsets.split(1, 1), c.split(1, 1), strict=True):
        scale = chunks.param(scale)
        z = (d - chunks.param(offset)) * r / scale
        log = log - z * z / 2 - HALF_LOG_2PI - scale.abs().log()
    if mask is not None:
        log = log.masked_fill(chunks.invalid & (chunks.empty == 0), -math.inf)
    log_sum = _log_sum_exp(log, chunks.dim)
    if eps > 0:
        log_sum = log_sum.clamp(min=math.log(eps))
    weights = chunks.valid(torch.exp(log - log_sum))
    y = chunks.x * weights
    if padding is not None:
        y = torch.where(chunks.padded, chunks.x, y)
    if residual:
        y = y + chunks.raw
    return chunks.merge(y), chunks.merge(weights)


@in_parts
def gradient(
    grad_y: Tensor | None, grad_weights: Tensor | None, x: Tensor, mean_offsets: Tensor, c: Tensor, mask: Tensor | None,
    axis: int, eps: float, padding: float | None, residual: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of x, mean_offsets and c in closed form, differentiable themselves.

    With e = x - mean - m, h = (grad_y·x + grad_weights)·weights, free = 1 where the sum is not clamped to eps and 0
    where it is, k = h - free·weights·Σ h, clamped = (1 - free)·Σ h and sums over a chunk of length n:
    dx = grad_y·weights - a·r2·(k·e - Σ k·e/n - (x - mean)·r2·(Σ k·e² + clamped·v)/(n - 1)).
    """
    chunks = Chunks(x, c.shape[0], mask, axis, padding)
    d, square = chunks.centred()
    fit = _Fit(chunks, mean_offsets, c, square, eps)
    f = d - fit.origin
    s = f * (d - fit.mirror)
    weights, free = fit.weights(s)
    g, h, raw = chunks.gradients(grad_y, grad_weights)
    h = h * weights
    total = chunks.sum(h)
    k, clamped = h - weights * (total * free), total * (1 - free)
    sum_ke, sum_kee = fit.sums(chunks.sum(k * f), chunks.sum(k * s), clamped)
    common = sum_ke / chunks.count + d * (fit.r2 * sum_kee / fit.freedom)
    if padding is not None:
        common = common.masked_fill(chunks.padded, 0)
        weights = torch.where(chunks.padded, 1, weights)
    dx = chunks.valid(g * weights + fit.a * fit.r2 * (common - k * (d - fit.m)))
    if residual:
        dx = dx + raw
    return chunks.merge(dx), *fit.chain(mean_offsets, c, sum_ke, sum_kee, clamped)


@in_parts
@in_slices
def forward(
    x: Tensor, mean_offsets: Tensor, c: Tensor, mask: Tensor | None, axis: int, eps: float, padding: float | None,
    residual: bool, return_weights: bool,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """`formula` in place."""
    chunks = Chunks(x, c.shape[0], mask, axis, padding)
    d, rest, square = chunks.nearly_centred()
    fit = _Fit(chunks, mean_offsets, c, square, eps)
    s = (d - (fit.origin + rest)).mul_(d - (fit.mirror + rest))
    return chunks.outputs(fit.weights(s)[0], residual, return_weights)


@in_parts
@in_slices
def backward(
    grad_y: Tensor | None, grad_weights: Tensor | None, x: Tensor, mean_offsets: Tensor, c: Tensor, mask: Tensor | None,
    axis: int, eps: float, padding: float | None, residual: bool, need_x: bool, need_params: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    """`gradient` in place. In place is only what came of both gradients, either of which may be batched
    (is_grads_batched) where x is not.
    """
    chunks = Chunks(x, c.shape[0], mask, axis, padding)
    d, rest, square = chunks.nearly_centred()
    fit = _Fit(chunks, mean_offsets, c, square, eps)
    f = d - (fit.origin + rest)
    s = (d - (fit.mirror + rest)).mul_(f)
    weights, scale, free = fit.relative_weights(s)
    g, h, raw = chunks.gradients(grad_y, grad_weights)
    k = h * weights
    total = chunks.sum(k).mul_(scale)
    weights = weights * scale
    k.mul_(scale).addcmul_(weights, total * -free)
    clamped = total * (1 - free)
    kf = k * f
    sum_ke, sum_kee = fit.sums(chunks.sum(kf), chunks.sum(s * k), clamped)
    dx = d_mean_offsets = d_c = None
    if need_x:
        # x - mean = f + origin, x - mean - m = f + (origin - m)
        along = fit.r2 * sum_kee / fit.freedom
        scale = fit.a * fit.r2
        common = (f * along).add_(sum_ke / chunks.count + along * fit.origin)
        if padding is not None:
            common.masked_fill_(chunks.padded, 0)
            weights.masked_fill_(chunks.padded, 1)
        dx = common.sub_(kf).sub_(k.mul_(fit.origin - fit.m)).mul_(scale)
        dx = chunks.input_grad(dx, g, weights, raw, residual)
    if need_params:
        d_mean_offsets, d_c = fit.chain(mean_offsets, c, sum_ke, sum_kee, clamped)
    return dx, d_mean_offsets, d_c


def _log_sum_exp(log: Tensor, dim: int) -> Tensor:
    """Return log Σ exp along a dimension, which is kept. Of torch's logsumexp, forward mode has no backward."""
    # a constant, which the derivatives do without; infinite, it would make NaN of what is infinite as it is
    largest = log.detach().amax(dim, keepdim=True)
    largest = largest.masked_fill(largest.isinf(), 0)
    return (log - largest).exp().sum(dim, keepdim=True).log() + largest


def _variance(chunks: Chunks, square: Tensor) -> Tensor:
    """Unbiased; 0 where one position is valid."""
    return square / _freedom(chunks)


def _freedom(chunks: Chunks) -> Tensor | int:
    count = chunks.count  # a tensor under a mask; else two or more, as the functional sees to
    return (count - 1).clamp(min=1) if isinstance(count, Tensor) else count - 1


class _Fit:
    """The Gaussian that a head's product is, on every chunk: all numbers broadcast against the chunks.

    a, m, v as above; r2; origin p and mirror 2m - p; freedom: n - 1.
    """

    def __init__(self, chunks: Chunks, mean_offsets: Tensor, c: Tensor, square: Tensor, eps: float):
        offsets, scales = mean_offsets.to(chunks.dtype), c.to(chunks.dtype)
        # relative to the narrowest Gaussian, so that 1/c² overflows nowhere but in its limit: there, with c below
        # 1e-12, all weight is on one position whatever a is
        narrowest = scales.detach().abs().amin(1, keepdim=True)
        part = (narrowest / scales).square()
        total = part.sum(1, keepdim=True)
        m = (offsets * part).sum(1, keepdim=True) / total
        v = ((offsets - m).square() * part).sum(1, keepdim=True) / total
        log2 = (scales.abs().log2() + HALF_LOG_2PI * LOG2_E).sum(1, keepdim=True)
        a = total * narrowest.reciprocal().clamp(max=2.0**40).square()
        self.chunks = chunks
        self.a, self.m, self.v, log2 = (chunks.param(t) for t in (a, m, v, log2))
        self.freedom = _freedom(chunks)
        variance = _variance(chunks, square) + (eps + chunks.empty)
        self.r2 = 1 / variance
        far = 4 * variance.detach().sqrt()
        self.origin = torch.minimum(torch.maximum(self.m.detach(), -far), far)
        self.mirror = 2 * self.m - self.origin
        self.rest = self.v + (self.m - self.origin).square()
        self.precision = self.a * self.r2 * (LOG2_E / 2)
        self.floor = log2 + (math.log2(eps) if eps > 0 else -math.inf)

    def weights(self, s: Tensor) -> tuple[Tensor, Tensor]:
        """Weights, and 1 where their sum is free, 0 where eps clamps it."""
        weights, scale, free = self.relative_weights(s)
        return weights * scale, free

    def relative_weights(self, s: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Weights but for their scale, that scale, and where it is free, from
        s = (x - mean - origin)·(x - mean - mirror).
        """
        chunks = self.chunks
        known = s.detach() if chunks.invalid is None else s.detach().masked_fill(chunks.invalid, math.inf)
        nearest = known.amin(chunks.dim, keepdim=True)
        if chunks.invalid is not None:
            nearest = nearest.masked_fill(chunks.empty.bool(), 0)
        # relative to the likeliest position of the chunk; as differences, since a product can be large, and wrong by 1
        weights = chunks.valid(((nearest - s) * self.precision).exp2())
        share = 1 / (chunks.sum(weights) + chunks.empty)
        cap = torch.exp2(-(nearest + self.rest) * self.precision - self.floor)
        clamped = cap < share  # not so where eps is 0 and an overflow makes the cap NaN
        return weights, torch.where(clamped, cap, share), (~clamped).to(s.dtype)

    def sums(self, sum_kf: Tensor, sum_ks: Tensor, clamped: Tensor) -> tuple[Tensor, Tensor]:
        """Σ k·e and Σ k·e² + clamped·v from the sums about the origin: Σ k = clamped."""
        return sum_kf + clamped * (self.origin - self.m), sum_ks + clamped * self.rest

    def chain(
        self, mean_offsets: Tensor, c: Tensor, sum_ke: Tensor, sum_kee: Tensor, clamped: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Gradients of mean_offsets and c, by way of a, m, v and l."""
        of_heads = (sum_ke * self.r2, sum_kee * self.r2, clamped * self.r2, clamped)
        m, v, ke, kee, r2, one = (self.chunks.param_grad(t, c[:, :1]) for t in (self.m, self.v, *of_heads))
        offset, scale = mean_offsets.to(ke.dtype) - m, c.to(ke.dtype)
        d_c = (kee - 2 * offset * ke + (offset.square() - v) * r2) / scale / scale / scale - one / scale
        return (ke - offset * r2) / scale / scale, d_c
