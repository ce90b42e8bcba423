"""Mixture of densities, arXiv 2401.11143, Algorithm 2, as the package gaussian-adaptive-attention 0.1.5 computes it.

Parameters mean_offsets and c are (heads, num_gaussians). The product of a head's Gaussians is one Gaussian: with
inv_var = 1/(var + eps), o = mean_offsets, a = Σ 1/c_k², m = Σ (o_k/c_k²)/a, v = Σ ((o_k - m)²/c_k²)/a and
l = Σ log(sqrt(2π)·|c_k|),

    log Π_k g_k = -(a·inv_var/2)·((x - mean - m)² + v) - l

so that nothing but four numbers a head depends on the number of Gaussians; `product.py` has how the square is taken.
weights = exp(log Π g - max(log Σ Π g, log eps)) underflows nowhere but where a weight itself does.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from daam.reference.chunks import LOG2_E, Chunks, cut_into_parts, cut_into_slices
from daam.reference.product import Product, add_error, constant

HALF_LOG_2PI = 0.9189385332046727


@cut_into_parts
def formula(
    x: Tensor, mean_offsets: Tensor, c: Tensor, mask: Tensor | None, axis: int, eps: float, padding: float | None,
    residual: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Return (y, weights): with z_k = (x - mean - mean_offset_k) / sqrt(var + eps) and g_k = exp(-z_k²/(2c_k²)) /
    sqrt(2π·c_k²), weights = Π_k g_k / max(Σ_chunk Π_k g_k, eps), product and sum in log space; y = x·weights.
    """
    chunks = Chunks(x, c.shape[0], mask, axis, padding)
    log_w = log_weights(chunks, *chunks.centred(), mean_offsets, c, eps)
    weights = normalise(chunks, log_w, *sum_exponentials(chunks, log_w), eps)
    return chunks.weigh_x(weights, residual), chunks.merge(weights)


def log_weights(
    chunks: Chunks, d: Tensor, sum_squares: Tensor, mean_offsets: Tensor, c: Tensor, eps: float
) -> Tensor:  # fmt: skip
    """Return log Π_k g_k, cut into heads, of x - mean and Σ (x - mean)²; -inf where x is not valid."""
    inv_std = torch.rsqrt(chunks.var_eps(sum_squares, eps))
    log_product = torch.zeros_like(d)
    for offset, scale in zip(mean_offsets.split(1, 1), c.split(1, 1), strict=True):
        scale = chunks.param(scale)
        z = (d - chunks.param(offset)) * inv_std / scale
        log_product = log_product - z * z / 2 - HALF_LOG_2PI - scale.abs().log()
    if chunks.invalid is None:
        return log_product
    return log_product.masked_fill(chunks.invalid & (chunks.empty == 0), -math.inf)


def sum_exponentials(chunks: Chunks, log_w: Tensor) -> tuple[Tensor, Tensor]:
    """Return the largest log w of each chunk, a constant, and Σ exp(log w - largest)."""
    # of torch's logsumexp, forward mode has no backward; infinite, the largest would make NaN of what is infinite
    largest = log_w.detach().amax(chunks.dim, keepdim=True)
    largest = largest.masked_fill(largest.isinf(), 0)
    return largest, chunks.sum((log_w - largest).exp())


def normalise(chunks: Chunks, log_w: Tensor, largest: Tensor, total: Tensor, eps: float) -> Tensor:
    """Return the weights of log w, of what `sum_exponentials` returns."""
    log_sum = total.log() + largest
    if eps > 0:
        log_sum = log_sum.clamp(min=math.log(eps))
    return chunks.valid(torch.exp(log_w - log_sum))


@cut_into_parts
def gradient(
    grad_y: Tensor | None, grad_weights: Tensor | None, x: Tensor, mean_offsets: Tensor, c: Tensor, mask: Tensor | None,
    axis: int, eps: float, padding: float | None, residual: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Return gradients of x, mean_offsets and c in closed form, which are differentiable themselves.

    With e = x - mean - m, h = (grad_y·x + grad_weights)·weights, free = 1 where the sum is not clamped to eps and 0
    where it is, k = h - free·weights·Σ h, clamped = (1 - free)·Σ h and sums over a chunk of length n:
    dx = grad_y·weights - a·inv_var·(k·e - Σ k·e/n - (x - mean)·inv_var·(Σ k·e² + clamped·v)/(n - 1)).
    """
    chunks = Chunks(x, c.shape[0], mask, axis, padding)
    d, sum_squares = chunks.centred()
    fit = _Fit(chunks, mean_offsets, c, sum_squares, eps)
    f = d - fit.origin
    s = f * (d - fit.mirror)
    weights, free = fit.weights(s)
    g, h, raw = chunks.gradients(grad_y, grad_weights)
    h = h * weights
    sum_h = chunks.sum(h)
    k, clamped = h - weights * (sum_h * free), sum_h * (1 - free)
    sum_ke, sum_kee = fit.sums(chunks.sum(k * f), chunks.sum(k * s), clamped)
    common = sum_ke / chunks.count + d * (fit.inv_var * sum_kee / fit.freedom)
    if padding is not None:
        common = common.masked_fill(chunks.padded, 0)
        weights = torch.where(chunks.padded, 1, weights)
    dx = chunks.valid(g * weights + fit.a * fit.inv_var * (common - k * (d - fit.m)))
    d_params = fit.chain(mean_offsets, c, sum_ke, sum_kee, clamped)
    return chunks.merge(dx + raw if residual else dx), *d_params


@cut_into_parts
@cut_into_slices
def forward(
    x: Tensor, mean_offsets: Tensor, c: Tensor, mask: Tensor | None, axis: int, eps: float, padding: float | None,
    residual: bool, return_weights: bool,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """Return (y, weights) as `formula` does, computed in place; the weights are None if not asked for."""
    chunks = Chunks(x, c.shape[0], mask, axis, padding)
    d, mean_error, sum_squares = chunks.nearly_centred()
    fit = _Fit(chunks, mean_offsets, c, sum_squares, eps)
    s = (d - add_error(fit.origin, mean_error)).mul_(d - add_error(fit.mirror, mean_error))
    weights, scale, _ = fit.relative_weights(s)
    return chunks.outputs(weights.mul_(scale), residual, return_weights)


@cut_into_parts
@cut_into_slices
def backward(
    grad_y: Tensor | None, grad_weights: Tensor | None, x: Tensor, mean_offsets: Tensor, c: Tensor, mask: Tensor | None,
    axis: int, eps: float, padding: float | None, residual: bool, need_x: bool, need_params: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    """Return the gradients that `gradient` does, computed in place; those not needed are None."""
    # in place is only what came of both gradients, either of which may be batched (is_grads_batched) where x is not
    chunks = Chunks(x, c.shape[0], mask, axis, padding)
    d, mean_error, sum_squares = chunks.nearly_centred()
    fit = _Fit(chunks, mean_offsets, c, sum_squares, eps)
    f = d - add_error(fit.origin, mean_error)
    s = (d - add_error(fit.mirror, mean_error)).mul_(f)
    weights, scale, clamped = fit.relative_weights(s)
    free = (~clamped).to(s.dtype)
    g, h, raw = chunks.gradients(grad_y, grad_weights)
    k = h * weights
    sum_h = chunks.sum(k).mul_(scale)
    weights = weights * scale
    k.mul_(scale).addcmul_(weights, sum_h * -free)
    clamped = sum_h * (1 - free)
    kf = k * f
    sum_ke, sum_kee = fit.sums(chunks.sum(kf), chunks.sum(s * k), clamped)
    dx = None
    if need_x:
        # x - mean = f + origin, x - mean - m = f + (origin - m)
        slope = fit.inv_var * sum_kee / fit.freedom
        common = (f * slope).add_(sum_ke / chunks.count + slope * fit.origin)
        if padding is not None:
            common.masked_fill_(chunks.padded, 0)
            weights.masked_fill_(chunks.padded, 1)
        dx = common.sub_(kf).sub_(k.mul_(fit.origin - fit.m)).mul_(fit.a * fit.inv_var)
        dx = chunks.input_grad(dx, g, weights, raw, residual)
    d_params = fit.chain(mean_offsets, c, sum_ke, sum_kee, clamped) if need_params else (None, None)
    return dx, *d_params


class _Fit(Product):
    """Add to the product what it has without its scale: offset_cost: v + (m - p)², and where eps clamps its sum."""

    def __init__(self, chunks: Chunks, mean_offsets: Tensor, c: Tensor, sum_squares: Tensor, eps: float):
        offsets, scales = mean_offsets.to(chunks.dtype), c.to(chunks.dtype)
        # relative to the narrowest Gaussian, so that 1/c² overflows nowhere but in its limit: there, with c below
        # 1e-12, all weight is on one position whatever a is
        widths = scales.abs()
        min_scale = constant(widths).amin(1, keepdim=True)
        precisions = (min_scale / scales).square()
        unit = min_scale.reciprocal().clamp(max=2.0**40).square()
        super().__init__(chunks, offsets, precisions, unit, chunks.var_eps(sum_squares, eps))
        self.offset_cost = self.v + (self.m - self.origin).square()
        # log2 of sqrt(2π)·|c| is added up over Gaussians
        log2_floor = c.shape[1] * HALF_LOG_2PI * LOG2_E + (math.log2(eps) if eps > 0 else -math.inf)
        self.log2_floor = chunks.param(widths.log2().sum(1, keepdim=True) + log2_floor)

    def weights(self, s: Tensor) -> tuple[Tensor, Tensor]:
        """Return (weights, free) of s as `relative_weights` takes it: free is 1 where eps does not clamp their sum."""
        weights, scale, clamped = self.relative_weights(s)
        return weights * scale, (~clamped).to(s.dtype)

    def relative_weights(self, s: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return (weights without their scale, that scale, whether eps clamps their sum) of
        s = (x - mean - origin)·(x - mean - mirror).
        """
        weights, min_s = self.relate(s, self.chunks.invalid)
        inv_sum = self.chunks.inverse_sum(weights)
        cap = torch.addcmul(self.log2_floor, min_s + self.offset_cost, self.log2_factor).neg().exp2()
        clamped = cap < inv_sum  # not so where eps is 0 and an overflow makes the cap NaN
        return weights, torch.where(clamped, cap, inv_sum), clamped

    def sums(self, sum_kf: Tensor, sum_ks: Tensor, clamped: Tensor) -> tuple[Tensor, Tensor]:
        """Return (Σ k·e, Σ k·e² + clamped·v) from Σ k·(x - mean - origin), Σ k·s and Σ k = clamped."""
        return sum_kf + clamped * (self.origin - self.m), sum_ks + clamped * self.offset_cost

    def chain(
        self, mean_offsets: Tensor, c: Tensor, sum_ke: Tensor, sum_kee: Tensor, clamped: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return the gradients of mean_offsets and c, by way of a, m, v and l, from sums over each chunk."""
        sums = (sum_ke * self.inv_var, sum_kee * self.inv_var, clamped * self.inv_var, clamped)
        m, v, ke, kee, cr, cl = (self.chunks.param_grad(t, c[:, :1]) for t in (self.m, self.v, *sums))
        offset, scale = mean_offsets.to(ke.dtype) - m, c.to(ke.dtype)
        d_c = (kee - 2 * offset * ke + (offset.square() - v) * cr) / scale / scale / scale - cl / scale
        return (ke - offset * cr) / scale / scale, d_c
