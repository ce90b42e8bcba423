"""The density gate with what is around it, a projection and a product, out of differentiable operations.

For x of (batch, channels, times) in any order of dimensions, in fp32, or fp64 for fp64 x:

    p = Σ_c weight·x + bias      gate = weights of `gate.py` for p      y = x·(1 + alpha·gate)

and y = x where a mask is False, where nothing else sees x. The eager backend of `DensityGate` is the published formula,
which rounds p to x's dtype; this is what its fused kernels compute, for what PyTorch transforms, to any order.
"""

from __future__ import annotations

import torch
from torch import Tensor

from daam.kernels.operands import acc_dtype
from daam.reference import gate


def formula(
    x: Tensor, weight: Tensor, bias: Tensor, alpha: Tensor, mean_offsets: Tensor, log_sigma: Tensor,
    mask: Tensor | None, channel_axis: int, time_axis: int, gate_dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Return (y, gate): y in x's order of dimensions and the dtype that x and the gate promote to, the gate of shape
    (batch, 1, times) in its dtype. mask: bool, (batch, times).
    """
    order = (3 - channel_axis - time_axis, channel_axis, time_axis)
    rows, _columns, p = _project(x.permute(order), weight, bias, mask)
    weights = _weigh(p, mean_offsets, log_sigma, mask)
    y = rows * (1 + alpha.to(rows.dtype) * weights)
    if mask is not None:
        y = torch.where(mask.unsqueeze(1), y, x.permute(order))
    y = y.to(torch.promote_types(x.dtype, gate_dtype)).permute([order.index(i) for i in range(3)])
    return y, weights.to(gate_dtype)


def gradient(
    grad_y: Tensor | None, grad_gate: Tensor | None, x: Tensor, weight: Tensor, bias: Tensor, alpha: Tensor,
    mean_offsets: Tensor, log_sigma: Tensor, mask: Tensor | None, channel_axis: int, time_axis: int,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Return the gradients of x, weight, bias, alpha, mean_offsets and log_sigma, in the dtype of arithmetic,
    differentiable themselves. At least one of grad_y and grad_gate is there.
    """
    order = (3 - channel_axis - time_axis, channel_axis, time_axis)
    rows, columns, p = _project(x.permute(order), weight, bias, mask)
    weights, factor = _weigh(p, mean_offsets, log_sigma, mask), alpha.to(rows.dtype)
    valid = None if mask is None else mask.unsqueeze(1)
    h, d_alpha, dx = 0, torch.zeros_like(factor), 0
    if grad_y is not None:
        raw = grad_y.permute(order).to(rows.dtype)
        s = (_where(valid, raw) * rows).sum(1, keepdim=True)
        h, d_alpha, dx = factor * s, (s * weights).sum(), raw * (1 + factor * weights)
        dx = dx if valid is None else torch.where(valid, dx, raw)
    if grad_gate is not None:
        h = h + _where(valid, grad_gate.to(rows.dtype))
    dp, *parameters = gate.gradient(None, h, p, mean_offsets.unsqueeze(0), log_sigma.unsqueeze(0), valid, 2, False)
    dx = dx + _where(valid, columns * dp)
    d_weight = (rows * dp).sum((0, 2)).reshape(weight.shape)
    dx = dx.permute([order.index(i) for i in range(3)])
    return dx, d_weight, dp.sum().reshape(bias.shape), d_alpha.reshape(alpha.shape), *(t.squeeze(0) for t in parameters)


def _project(x: Tensor, weight: Tensor, bias: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Return x (batch, channels, times) with 0 where not valid, the weights (channels, 1) and p (batch, 1, times)."""
    rows = x.to(acc_dtype(x))
    rows = rows if mask is None else rows.masked_fill(~mask.unsqueeze(1), 0)
    columns = weight.to(rows.dtype).reshape(-1, 1)
    return rows, columns, (rows * columns).sum(1, keepdim=True) + bias.to(rows.dtype)


def _weigh(p: Tensor, mean_offsets: Tensor, log_sigma: Tensor, mask: Tensor | None) -> Tensor:
    """Return the gate's weights of p, (batch, 1, times)."""
    mask = None if mask is None else mask.unsqueeze(1)
    return gate.formula(p, mean_offsets.unsqueeze(0), log_sigma.unsqueeze(0), mask, 2, False)[1]


def _where(valid: Tensor | None, t: Tensor) -> Tensor:
    """Return t with 0 where not valid."""
    return t if valid is None else t.masked_fill(~valid, 0)
