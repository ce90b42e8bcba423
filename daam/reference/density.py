"""Density attention, arXiv 2401.11143, Algorithm 1.

Parameters mean_offset and c are (heads, P), P following `feature_axis`, or 1 where it is None.
"""

from __future__ import annotations

import torch
from torch import Tensor

from daam.reference.chunks import Chunks, in_slices

LOG2_E = 1.4426950408889634


def formula(
    x: Tensor, mean_offset: Tensor, c: Tensor, mask: Tensor | None, axis: int, feature_axis: int | None, eps: float,
    residual: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """y and weights, as the paper writes them: z = (x - mean - mean_offset) / sqrt(var + eps), weights = exp(-z²/(2c)),
    y = x·weights.
    """
    chunks = Chunks(x, c.shape[0], mask, axis)
    d, square = chunks.centred()
    z = (d - chunks.param(mean_offset, feature_axis)) * torch.rsqrt(_spread(chunks, square, eps))
    weights = chunks.valid(torch.exp(-z * z / (2 * chunks.param(c, feature_axis))))
    y = chunks.x * weights
    if residual:
        y = y + chunks.raw
    return chunks.merge(y), chunks.merge(weights)


def gradient(
    grad_y: Tensor | None, grad_weights: Tensor | None, x: Tensor, mean_offset: Tensor, c: Tensor, mask: Tensor | None,
    axis: int, feature_axis: int | None, eps: float, residual: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of x, mean_offset and c in closed form, differentiable themselves.

    With e = x - mean - mean_offset, r2 = 1/(var + eps), h = (grad_y·x + grad_weights)·weights and sums over a chunk of
    length n: s1 = r2·Σ h·e/c, s2 = r2·Σ h·e²/c, dx = grad_y·weights - r2·h·e/c + (s1 + r2·s2·(x - mean))/n.
    """
    chunks = Chunks(x, c.shape[0], mask, axis)
    scale = chunks.param(c, feature_axis)
    d, square = chunks.centred()
    r2 = 1 / _spread(chunks, square, eps)
    e = d - chunks.param(mean_offset, feature_axis)
    weights = chunks.valid(torch.exp(-e * e * r2 / (2 * scale)))
    g, h, raw = chunks.gradients(grad_y, grad_weights)
    he = h * weights / scale * e * r2
    hee = he * e
    dx = chunks.valid(g * weights - he + chunks.mean(he) + r2 * d * chunks.mean(hee))
    if residual:
        dx = dx + raw
    return (
        chunks.merge(dx),
        chunks.param_grad(he, mean_offset, feature_axis),
        chunks.param_grad(hee / (2 * scale), c, feature_axis),
    )


@in_slices
def forward(
    x: Tensor, mean_offset: Tensor, c: Tensor, mask: Tensor | None, axis: int, feature_axis: int | None, eps: float,
    residual: bool, return_weights: bool,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """`formula` in place."""
    chunks = Chunks(x, c.shape[0], mask, axis)
    d, square = chunks.centred()
    k = _spread(chunks, square, eps).reciprocal_() * (-LOG2_E / 2 / chunks.param(c, feature_axis))
    weights = chunks.valid(d.sub_(chunks.param(mean_offset, feature_axis)).square_().mul_(k).exp2_())
    return chunks.outputs(weights, residual, return_weights)


@in_slices
def backward(
    grad_y: Tensor | None, grad_weights: Tensor | None, x: Tensor, mean_offset: Tensor, c: Tensor, mask: Tensor | None,
    axis: int, feature_axis: int | None, eps: float, residual: bool, need_x: bool, need_params: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    """`gradient` in place."""
    chunks = Chunks(x, c.shape[0], mask, axis)
    scale = chunks.param(c, feature_axis)
    d, square = chunks.centred()
    r2 = _spread(chunks, square, eps).reciprocal_()
    e = d - chunks.param(mean_offset, feature_axis)
    weights = chunks.valid((e * e).mul_(r2 * (-LOG2_E / 2 / scale)).exp2_())
    g, h, raw = chunks.gradients(grad_y, grad_weights)
    he = (h * weights).mul_(e).mul_(r2 / scale)
    hee = he * e
    dx = d_mean_offset = d_c = None
    if need_x:
        dx = (d * chunks.mean(hee).mul_(r2)).add_(chunks.mean(he)).sub_(he)
        dx = chunks.input_grad(dx, g, weights, raw, residual)
    if need_params:
        d_mean_offset = chunks.param_grad(he, mean_offset, feature_axis)
        d_c = chunks.param_grad(hee / (2 * scale), c, feature_axis)
    return dx, d_mean_offset, d_c


def _spread(chunks: Chunks, square: Tensor, eps: float) -> Tensor:
    """var + eps, and 1 more where no position is valid, so that it can divide whatever eps is."""
    return square / chunks.count + (eps + chunks.empty)
