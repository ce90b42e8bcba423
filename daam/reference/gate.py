"""The density gate, arXiv 2512.07168 (the JEPA tokenizer): a true mixture of Gaussians, not normalised over the chunk.

Parameters mean_offsets and log_sigma are (heads, num_gaussians), mean_offsets in units of x.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import softplus

from daam.reference.chunks import Chunks, in_parts, in_slices

LOG2_E = 1.4426950408889634
DENSITY_AT_0 = 0.3989422804014327  # 1/sqrt(2π)
VARIANCE_FLOOR, SIGMA_FLOOR, WIDTH_FLOOR = 1e-6, 1e-3, 1e-8  # as published


@in_parts
def formula(
    x: Tensor, mean_offsets: Tensor, log_sigma: Tensor, mask: Tensor | None, axis: int, residual: bool
) -> tuple[Tensor, Tensor]:
    """y and weights: sigma_k = softplus(log_sigma_k) + 1e-3, std = sqrt(max(var, 1e-6)),
    z_k = (x - mean - mean_offset_k) / (std·sigma_k + 1e-8), weights = mean_k exp(-z_k²/2) / (sqrt(2π)·sigma_k),
    y = x·weights.
    """
    chunks = Chunks(x, log_sigma.shape[0], mask, axis)
    d, square = chunks.centred()
    std = (square / chunks.count).clamp(min=VARIANCE_FLOOR).sqrt()
    weights = 0
    for offset, sigma in _gaussians(chunks, mean_offsets, log_sigma):
        z = (d - offset) / (std * sigma + WIDTH_FLOOR)
        weights = weights + torch.exp(-z * z / 2) * (DENSITY_AT_0 / sigma)
    weights = chunks.valid(weights / log_sigma.shape[1])
    y = chunks.x * weights
    if residual:
        y = y + chunks.raw
    return chunks.merge(y), chunks.merge(weights)


@in_parts
def gradient(
    grad_y: Tensor | None, grad_weights: Tensor | None, x: Tensor, mean_offsets: Tensor, log_sigma: Tensor,
    mask: Tensor | None, axis: int, residual: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of x, mean_offsets and log_sigma in closed form, differentiable themselves.

    With N_k a Gaussian's part of the weights, width_k = std·sigma_k + 1e-8, t_k = (grad_y·x + grad_weights)·N_k,
    q_k = -t_k·z_k/width_k and sums over a chunk of length n:
    dx = grad_y·weights + Σ_k q_k - Σ Σ_k q_k/n - [var >= 1e-6]·((x - mean)/std)·Σ Σ_k q_k·z_k·sigma_k/n.
    """
    chunks = Chunks(x, log_sigma.shape[0], mask, axis)
    d, square = chunks.centred()
    variance = square / chunks.count
    std = variance.clamp(min=VARIANCE_FLOOR).sqrt()
    g, h, raw = chunks.gradients(grad_y, grad_weights)
    weights, q_all, qzs_all, d_offsets, d_sigmas = 0, 0, 0, [], []
    for offset, sigma in _gaussians(chunks, mean_offsets, log_sigma):
        width = std * sigma + WIDTH_FLOOR
        z = (d - offset) / width
        part = torch.exp(-z * z / 2) * (DENSITY_AT_0 / log_sigma.shape[1] / sigma)
        t = chunks.valid(h * part)
        q = -t * z / width
        weights, q_all, qzs_all = weights + part, q_all + q, qzs_all + q * z * sigma
        d_offsets.append(chunks.param_grad(-q, mean_offsets[:, :1]))
        d_sigmas.append(chunks.param_grad(-q * z * std - t / sigma, log_sigma[:, :1]))
    slope = (variance >= VARIANCE_FLOOR).to(d.dtype) / std
    dx = chunks.valid(g * weights + q_all - chunks.mean(q_all) - d * (slope * chunks.mean(qzs_all)))
    if residual:
        dx = dx + raw
    sigmoid = log_sigma.to(d.dtype).sigmoid()
    return chunks.merge(dx), torch.cat(d_offsets, 1), torch.cat(d_sigmas, 1) * sigmoid


@in_parts
@in_slices
def forward(
    x: Tensor, mean_offsets: Tensor, log_sigma: Tensor, mask: Tensor | None, axis: int, residual: bool,
    return_weights: bool,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """`formula` in place."""
    chunks = Chunks(x, log_sigma.shape[0], mask, axis)
    d, square = chunks.centred()
    std = (square / chunks.count).clamp_(min=VARIANCE_FLOOR).sqrt_()
    weights = torch.zeros_like(d)
    for offset, sigma in _gaussians(chunks, mean_offsets, log_sigma):
        weights += _part((d - offset).div_(std * sigma + WIDTH_FLOOR), sigma, log_sigma.shape[1])
    return chunks.outputs(chunks.valid(weights), residual, return_weights)


@in_parts
@in_slices
def backward(
    grad_y: Tensor | None, grad_weights: Tensor | None, x: Tensor, mean_offsets: Tensor, log_sigma: Tensor,
    mask: Tensor | None, axis: int, residual: bool, need_x: bool, need_params: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    """`gradient` in place. In place is only what came of both gradients, either of which may be batched
    (is_grads_batched) where x is not.
    """
    chunks = Chunks(x, log_sigma.shape[0], mask, axis)
    d, square = chunks.centred()
    variance = square / chunks.count
    std = variance.clamp(min=VARIANCE_FLOOR).sqrt_()
    g, h, raw = chunks.gradients(grad_y, grad_weights)
    weights, q_all, qzs_all, d_offsets, d_sigmas = torch.zeros_like(d), 0, 0, [], []
    for offset, sigma in _gaussians(chunks, mean_offsets, log_sigma):
        width = std * sigma + WIDTH_FLOOR
        z = (d - offset).div_(width)
        part = _part(z.clone(), sigma, log_sigma.shape[1])
        t = chunks.valid(h * part)
        q = (t * z).div_(-width)
        qz = q * z
        weights, q_all, qzs_all = weights.add_(part), q_all + q, qzs_all + qz * sigma
        if need_params:
            d_offsets.append(-chunks.param_grad(q, mean_offsets[:, :1]))
            d_sigmas.append(-chunks.param_grad(chunks.sum(qz) * std + chunks.sum(t) / sigma, log_sigma[:, :1]))
    dx = d_mean_offsets = d_log_sigma = None
    if need_x:
        slope = (variance >= VARIANCE_FLOOR).to(d.dtype).div_(std)
        dx = q_all.sub_(chunks.mean(q_all)).sub_(d * (slope * chunks.mean(qzs_all)))
        dx = chunks.input_grad(dx, g, weights, raw, residual)
    if need_params:
        d_mean_offsets = torch.cat(d_offsets, 1)
        d_log_sigma = torch.cat(d_sigmas, 1) * log_sigma.to(d.dtype).sigmoid()
    return dx, d_mean_offsets, d_log_sigma


def _gaussians(chunks: Chunks, mean_offsets: Tensor, log_sigma: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Offset and sigma of every Gaussian, which broadcast against the chunks."""
    sigmas = softplus(log_sigma.to(chunks.dtype)) + SIGMA_FLOOR
    pairs = zip(mean_offsets.split(1, 1), sigmas.split(1, 1), strict=True)
    return [(chunks.param(offset), chunks.param(sigma)) for offset, sigma in pairs]


def _part(z: Tensor, sigma: Tensor, gaussians: int) -> Tensor:
    """A Gaussian's part of the weights, from its z and in its place."""
    return z.square_().mul_(-LOG2_E / 2).exp2_().mul_(DENSITY_AT_0 / gaussians / sigma)
