"""The density gate, arXiv 2512.07168 (the JEPA tokenizer): a true mixture of Gaussians, not normalised over the chunk.

Parameters mean_offsets and log_sigma are (heads, num_gaussians), mean_offsets in units of x. Over a chunk of length n,
with d = x - mean, std = sqrt(max(var, 1e-6)), var biased, h = grad_y·x + grad_weights, and for each of K Gaussians
sigma_k = softplus(log_sigma_k) + 1e-3, width_k = std·sigma_k + 1e-8 and z_k = (d - mean_offset_k)/width_k:

    N_k = exp(-z_k²/2)/(sqrt(2π)·sigma_k·K)      weights = Σ_k N_k      y = x·weights
    t_k = h·N_k      q_k = -t_k·z_k/width_k      Q = Σ_k q_k      S = Σ_k q_k·z_k·sigma_k
    dx = grad_y·weights + Q - Σ Q/n - [var >= 1e-6]·(d/std)·Σ S/n
    d_mean_offset_k = -Σ q_k      d_log_sigma_k = -(Σ q_k·z_k·std + Σ t_k/sigma_k)·sigmoid(log_sigma_k)
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import softplus

from daam.kernels.algorithms import SIGMA_FLOOR, VARIANCE_FLOOR, WIDTH_FLOOR
from daam.reference.chunks import LOG2_E, Chunks, addend, clip, cut_into_parts, cut_into_slices

MOST_STACKED = 16  # Gaussians of a tiny x that are computed at once
DENSITY_AT_0 = 0.3989422804014327  # 1/sqrt(2π)


@cut_into_parts
def formula(
    x: Tensor, mean_offsets: Tensor, log_sigma: Tensor, mask: Tensor | None, axis: int, residual: bool
) -> tuple[Tensor, Tensor]:
    """Return (y, weights) by this module's formulas, each like x; y = x·weights, plus x with residual."""
    chunks = Chunks(x, log_sigma.shape[0], mask, axis)
    weights = weigh(chunks, *chunks.centred(), mean_offsets, log_sigma)
    return chunks.weigh_x(weights, residual), chunks.merge(weights)


def weigh(chunks: Chunks, d: Tensor, sum_squares: Tensor, mean_offsets: Tensor, log_sigma: Tensor) -> Tensor:
    """Return the weights, cut into heads, of x - mean and Σ (x - mean)²."""
    std = clip(sum_squares / chunks.count, VARIANCE_FLOOR, math.inf).sqrt()
    weights = 0
    for offset, sigma in _gaussians(chunks, mean_offsets, log_sigma):
        z = (d - offset) / (std * sigma + addend(WIDTH_FLOOR, std))
        weights = weights + torch.exp(-z * z / 2) * (DENSITY_AT_0 / sigma)
    return chunks.valid(weights / log_sigma.shape[1])


@cut_into_parts
def gradient(
    grad_y: Tensor | None, grad_weights: Tensor | None, x: Tensor, mean_offsets: Tensor, log_sigma: Tensor,
    mask: Tensor | None, axis: int, residual: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Return gradients of x, mean_offsets and log_sigma by this module's formulas, differentiable themselves."""
    chunks = Chunks(x, log_sigma.shape[0], mask, axis)
    d, sum_squares = chunks.centred()
    variance = sum_squares / chunks.count
    std = clip(variance, VARIANCE_FLOOR, math.inf).sqrt()
    g, h, raw = chunks.gradients(grad_y, grad_weights)
    weights, mixture_q, mixture_qzs, d_offsets, d_sigmas = 0, 0, 0, [], []
    for offset, sigma in _gaussians(chunks, mean_offsets, log_sigma):
        width = std * sigma + WIDTH_FLOOR
        z = (d - offset) / width
        density = torch.exp(-z * z / 2) * (DENSITY_AT_0 / log_sigma.shape[1] / sigma)
        t = chunks.valid(h * density)
        q = -t * z / width
        weights, mixture_q, mixture_qzs = weights + density, mixture_q + q, mixture_qzs + q * z * sigma
        d_offsets.append(chunks.param_grad(-q, mean_offsets[:, :1]))
        d_sigmas.append(chunks.param_grad(-q * z * std - t / sigma, log_sigma[:, :1]))
    slope = (variance >= VARIANCE_FLOOR).to(d.dtype) / std
    dx = chunks.valid(g * weights + mixture_q - chunks.mean(mixture_q) - d * (slope * chunks.mean(mixture_qzs)))
    d_log_sigma = torch.cat(d_sigmas, 1) * log_sigma.to(d.dtype).sigmoid()
    return chunks.merge(dx + raw if residual else dx), torch.cat(d_offsets, 1), d_log_sigma


@cut_into_parts
@cut_into_slices
def forward(
    x: Tensor, mean_offsets: Tensor, log_sigma: Tensor, mask: Tensor | None, axis: int, residual: bool,
    return_weights: bool,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """Return (y, weights) as `formula` does, computed in place; the weights are None if not asked for."""
    chunks = Chunks(x, log_sigma.shape[0], mask, axis)
    d, sum_squares = chunks.centred()
    std = (sum_squares / chunks.count).clamp_(min=VARIANCE_FLOOR).sqrt_()
    n_gaussians, floor = log_sigma.shape[1], addend(WIDTH_FLOOR, std)
    if chunks.tiny and n_gaussians <= MOST_STACKED:
        sigmas = chunks.stack(softplus(log_sigma.to(chunks.dtype)).add_(SIGMA_FLOOR))
        z = (d - chunks.stack(mean_offsets.to(chunks.dtype))).div_(std * sigmas + floor)
        weights = _density(z, sigmas, n_gaussians).sum(0)
    else:
        weights = torch.zeros_like(d)
        for offset, sigma in _gaussians(chunks, mean_offsets, log_sigma):
            weights += _density((d - offset).div_(std * sigma + floor), sigma, n_gaussians)
    return chunks.outputs(chunks.valid(weights), residual, return_weights)


@cut_into_parts
@cut_into_slices
def backward(
    grad_y: Tensor | None, grad_weights: Tensor | None, x: Tensor, mean_offsets: Tensor, log_sigma: Tensor,
    mask: Tensor | None, axis: int, residual: bool, need_x: bool, need_params: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    """Return the gradients that `gradient` does, computed in place; those not needed are None."""
    # in place is only what came of both gradients, either of which may be batched (is_grads_batched) where x is not
    chunks = Chunks(x, log_sigma.shape[0], mask, axis)
    d, sum_squares = chunks.centred()
    variance = sum_squares / chunks.count
    std = variance.clamp(min=VARIANCE_FLOOR).sqrt_()
    g, h, raw = chunks.gradients(grad_y, grad_weights)
    weights, mixture_q, mixture_qzs, d_offsets, d_sigmas = torch.zeros_like(d), 0, 0, [], []
    for offset, sigma in _gaussians(chunks, mean_offsets, log_sigma):
        width = std * sigma + WIDTH_FLOOR
        z = (d - offset).div_(width)
        density = _density(z.clone(), sigma, log_sigma.shape[1])
        t = chunks.valid(density * h)  # in x's memory order, which products have of what comes first
        q = (t * z).div_(-width)
        qz = q * z
        weights, mixture_q, mixture_qzs = weights.add_(density), mixture_q + q, mixture_qzs + qz * sigma
        if need_params:
            d_offsets.append(-chunks.param_grad(q, mean_offsets[:, :1]))
            d_sigmas.append(-chunks.param_grad(chunks.sum(qz) * std + chunks.sum(t) / sigma, log_sigma[:, :1]))
    dx = d_mean_offsets = d_log_sigma = None
    if need_x:
        slope = (variance >= VARIANCE_FLOOR).to(d.dtype).div_(std)
        dx = mixture_q.sub_(chunks.mean(mixture_q)).sub_(d * (slope * chunks.mean(mixture_qzs)))
        dx = chunks.input_grad(dx, g, weights, raw, residual)
    if need_params:
        d_mean_offsets = torch.cat(d_offsets, 1)
        d_log_sigma = torch.cat(d_sigmas, 1) * log_sigma.to(d.dtype).sigmoid()
    return dx, d_mean_offsets, d_log_sigma


def _gaussians(chunks: Chunks, mean_offsets: Tensor, log_sigma: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Return (mean_offset, sigma) of every Gaussian, in the shape that broadcasts against the chunks."""
    sigmas = softplus(log_sigma.to(chunks.dtype)) + SIGMA_FLOOR
    pairs = zip(mean_offsets.split(1, 1), sigmas.split(1, 1), strict=True)
    return [(chunks.param(offset), chunks.param(sigma)) for offset, sigma in pairs]


def _density(z: Tensor, sigma: Tensor, gaussians: int) -> Tensor:
    """Return N_k of one of the Gaussians from its z, which is overwritten."""
    return z.square_().mul_(-LOG2_E / 2).exp2_().mul_(DENSITY_AT_0 / gaussians / sigma)
