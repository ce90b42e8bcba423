"""Density attention, arXiv 2401.11143, Algorithm 1.

Parameters mean_offset and c are (heads, P), P following `feature_axis`, or 1 where it is None. Over a chunk of length
n, with d = x - mean, e = d - mean_offset, inv_var = 1/(var + eps), var biased, and h = grad_y·x + grad_weights:

    weights = exp(-e²·inv_var/(2c))      y = x·weights
    he = h·weights·e·inv_var/c           dx = grad_y·weights - he + (Σ he + inv_var·d·Σ he·e)/n
    d_mean_offset = Σ he                 d_c = Σ he·e/(2c)
"""

from __future__ import annotations

import torch
from torch import Tensor

from daam.reference.chunks import LOG2_E, Chunks, addend, cut_into_slices


def formula(
    x: Tensor, mean_offset: Tensor, c: Tensor, mask: Tensor | None, axis: int, feature_axis: int | None, eps: float,
    residual: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Return (y, weights): z = (x - mean - mean_offset)/sqrt(var + eps), weights = exp(-z²/(2c)), y = x·weights."""
    chunks = Chunks(x, c.shape[0], mask, axis)
    weights = weigh(chunks, *chunks.centred(), mean_offset, c, feature_axis, eps)
    return chunks.weigh_x(weights, residual), chunks.merge(weights)


def weigh(
    chunks: Chunks, d: Tensor, sum_squares: Tensor, mean_offset: Tensor, c: Tensor, feature_axis: int | None, eps: float
) -> Tensor:
    """Return the weights, cut into heads, of x - mean and Σ (x - mean)²."""
    z = (d - chunks.param(mean_offset, feature_axis)) * torch.rsqrt(_var_eps(chunks, sum_squares, eps))
    return chunks.valid(torch.exp(-z * z / (2 * chunks.param(c, feature_axis))))


def gradient(
    grad_y: Tensor | None, grad_weights: Tensor | None, x: Tensor, mean_offset: Tensor, c: Tensor, mask: Tensor | None,
    axis: int, feature_axis: int | None, eps: float, residual: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Return gradients of x, mean_offset and c by this module's formulas, which are differentiable themselves."""
    chunks = Chunks(x, c.shape[0], mask, axis)
    scale = chunks.param(c, feature_axis)
    d, sum_squares = chunks.centred()
    inv_var = 1 / _var_eps(chunks, sum_squares, eps)
    e = d - chunks.param(mean_offset, feature_axis)
    weights = chunks.valid(torch.exp(-e * e * inv_var / (2 * scale)))
    g, h, raw = chunks.gradients(grad_y, grad_weights)
    he = h * weights / scale * e * inv_var
    hee = he * e
    dx = chunks.valid(g * weights - he + chunks.mean(he) + inv_var * d * chunks.mean(hee))
    d_mean_offset = chunks.param_grad(he, mean_offset, feature_axis)
    d_c = chunks.param_grad(hee / (2 * scale), c, feature_axis)
    return chunks.merge(dx + raw if residual else dx), d_mean_offset, d_c


@cut_into_slices
def forward(
    x: Tensor, mean_offset: Tensor, c: Tensor, mask: Tensor | None, axis: int, feature_axis: int | None, eps: float,
    residual: bool, return_weights: bool,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """Return (y, weights) as `formula` does, computed in place; the weights are None if not asked for."""
    chunks = Chunks(x, c.shape[0], mask, axis)
    d, sum_squares = chunks.centred()
    factor = _var_eps(chunks, sum_squares, eps).reciprocal_() * (-LOG2_E / 2 / chunks.param(c, feature_axis))
    weights = chunks.valid(d.sub_(chunks.param(mean_offset, feature_axis)).square_().mul_(factor).exp2_())
    return chunks.outputs(weights, residual, return_weights)


@cut_into_slices
def backward(
    grad_y: Tensor | None, grad_weights: Tensor | None, x: Tensor, mean_offset: Tensor, c: Tensor, mask: Tensor | None,
    axis: int, feature_axis: int | None, eps: float, residual: bool, need_x: bool, need_params: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    """Return the gradients that `gradient` does, computed in place; those not needed are None."""
    chunks = Chunks(x, c.shape[0], mask, axis)
    scale = chunks.param(c, feature_axis)
    d, sum_squares = chunks.centred()
    inv_var = _var_eps(chunks, sum_squares, eps).reciprocal_()
    e = d - chunks.param(mean_offset, feature_axis)
    weights = chunks.valid((e * e).mul_(inv_var * (-LOG2_E / 2 / scale)).exp2_())
    g, h, raw = chunks.gradients(grad_y, grad_weights)
    he = (h * weights).mul_(e).mul_(inv_var / scale)
    hee = he * e
    dx = d_mean_offset = d_c = None
    if need_x:
        dx = (d * chunks.mean(hee).mul_(inv_var)).add_(chunks.mean(he)).sub_(he)
        dx = chunks.input_grad(dx, g, weights, raw, residual)
    if need_params:
        d_mean_offset = chunks.param_grad(he, mean_offset, feature_axis)
        d_c = chunks.param_grad(hee / (2 * scale), c, feature_axis)
    return dx, d_mean_offset, d_c


def _var_eps(chunks: Chunks, sum_squares: Tensor, eps: float) -> Tensor:
    """Return var + eps of each chunk, and 1 more where no position is valid, so that it can divide whatever eps is."""
    return sum_squares / chunks.count + (addend(eps, sum_squares) + chunks.empty)
