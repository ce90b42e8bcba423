"""Stateless layers for Hugging Face's `kernels`: forwards for modules that hold the parameters (`hub.py` packs them).

`kernels.kernelize` puts a forward on every module of a class that was given the name of one of these. Such a class is
this package's, or any that takes the same arguments and has the attributes that the forward reads: as annotated, and
`backend` and `group` if it has them, "auto" and None else. There is no constructor and no other method: `kernels`
refuses them.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from daam import gated
from daam.backend import backend_for
from daam.functional import density_attention, density_gate, mixture_attention, stable_mixture_attention
from daam.ops import _forward_mode, _transformed


class MultiHeadDAAM(nn.Module):
    """Weigh x by `density_attention`. mean_offset, c: (num_heads, P)."""

    can_torch_compile = True
    mean_offset: Tensor
    c: Tensor
    norm_axis: int
    eps: float
    residual: bool

    def forward(
        self, x: Tensor, mask: Tensor | None = None, return_weights: bool = False
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Return y, or (y, weights), each like x; mask as `density_attention` has it."""
        return density_attention(
            x, self.mean_offset, self.c, norm_axis=self.norm_axis, eps=self.eps, mask=mask, residual=self.residual,
            return_weights=return_weights, backend=getattr(self, "backend", "auto"), group=getattr(self, "group", None),
        )  # fmt: skip


class MultiHeadDensityAdaptiveAttention(nn.Module):
    """Weigh x by `mixture_attention`. mean_offsets, c: (num_heads, num_gaussians), or (num_gaussians,) for one head."""

    can_torch_compile = True
    mean_offsets: Tensor
    c: Tensor
    norm_axis: int
    eps: float
    padding_value: float | None

    def forward(
        self, x: Tensor, return_attention_details: bool = False, *, mask: Tensor | None = None, residual: bool = False
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Return y, or (y, weights), each like x; weights are detached as published."""
        return _weigh(mixture_attention, self, x, return_attention_details, mask, residual)


class DensityAdaptiveAttention(MultiHeadDensityAdaptiveAttention):
    """Weigh x by one head of `mixture_attention`. mean_offsets, c: (num_gaussians,)."""


class StableMultiHeadDensityAttention(nn.Module):
    """Weigh x by `stable_mixture_attention`. mean_offsets, c: (num_heads, num_gaussians)."""

    can_torch_compile = True
    mean_offsets: Tensor
    c: Tensor
    norm_axis: int
    eps: float
    padding_value: float | None

    def forward(
        self, x: Tensor, return_attention_details: bool = False, *, mask: Tensor | None = None, residual: bool = False
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Return y, or (y, weights), each like x; weights are detached as published."""
        return _weigh(stable_mixture_attention, self, x, return_attention_details, mask, residual)


class DensityGate(nn.Module):
    """Gate x, (batch, channels, length) or without batch, by `density_gate` of a 1x1 convolution of it.

    gaa: a module with mean_offsets and log_sigma, (num_gaussians,).
    """

    can_torch_compile = True
    to_attn: nn.Conv1d
    gaa: nn.Module
    alpha: Tensor

    def forward(self, x: Tensor, *, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return (y, gate) of x's shape and (batch, 1, length). mask: bool, (batch, length), True where x is valid:
        elsewhere the gate is 0 and y is x.
        """
        if _fuses(self, x):
            params = (self.to_attn.weight, self.to_attn.bias, self.alpha, self.gaa.mean_offsets, self.gaa.log_sigma)
            return gated.gate_channels(x, *params, mask, gated.find_dtype(x))
        mask = None if mask is None else mask.unsqueeze(-2)
        valid = x if mask is None else x.masked_fill(~mask, 0)
        gate = density_gate(
            self.to_attn(valid), self.gaa.mean_offsets, self.gaa.log_sigma, mask=mask, return_weights=True,
            backend=getattr(self, "backend", "auto"), group=getattr(self, "group", None),
        )[1]  # fmt: skip
        y = valid * (1 + self.alpha.reshape(()) * gate)  # of one dimension it would promote a gate of another dtype
        return y if mask is None else torch.where(mask, y, x), gate


def _weigh(attend, module, x, return_weights, mask, residual):
    """Return what a mixture makes of x with a module's parameters and settings."""
    mean_offsets, c = (p.reshape(-1, p.shape[-1]) for p in (module.mean_offsets, module.c))
    out = attend(
        x, mean_offsets, c, norm_axis=module.norm_axis, eps=module.eps, padding_value=module.padding_value, mask=mask,
        residual=residual, return_weights=return_weights, backend=getattr(module, "backend", "auto"),
        group=getattr(module, "group", None),
    )  # fmt: skip
    return (out[0], out[1].detach()) if return_weights else out


def _fuses(module, x):
    """Tell whether a gate's parts may be one launch a pass, as `daam.DensityGate.fusion_for` does."""
    if backend_for(x, getattr(module, "backend", "auto"))[0] != "triton" or getattr(module, "group", None) is not None:
        return False
    if not torch.compiler.is_compiling() and (_transformed() or _forward_mode()):
        return False
    conv, gaa = module.to_attn, module.gaa
    params = {"weight": conv.weight, "bias": conv.bias, "alpha": module.alpha}
    params |= {"mean_offsets": gaa.mean_offsets, "log_sigma": gaa.log_sigma}
    problem = gated.find_override({"to_attn": (conv, nn.Conv1d), "gaa": (gaa, type(gaa))})
    return (problem or gated.find_obstacle(x, conv, params)) is None
