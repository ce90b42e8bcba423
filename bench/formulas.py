"""The published modules in plain torch operations, as one writes them by the formula: what ours are timed against.

Each takes the parameters of ours by their names, has no mask and no padding, and computes in the dtype of x.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import softplus

import daam
from daam.kernels.algorithms import SIGMA_FLOOR, VARIANCE_FLOOR, WIDTH_FLOOR
from daam.reference.stable import FARTHEST, WIDTHS


class PlainDAAM(daam.MultiHeadDAAM):
    """Weigh x by density attention as Algorithm 1 is written; norm_axis is 1 and not the last one."""

    def forward(self, x: Tensor) -> Tensor:
        """Return y, like x."""
        chunks, dim = x.unflatten(1, (self.num_heads, -1)), 2
        mean_offset, c = (p.view(self.num_heads, *[1] * (x.dim() - 2), -1) for p in (self.mean_offset, self.c))
        mean, variance = chunks.mean(dim, keepdim=True), chunks.var(dim, unbiased=False, keepdim=True)
        z = (chunks - mean - mean_offset) / torch.sqrt(variance + self.eps)
        y = (chunks * torch.exp(-(z**2) / (2 * c))).flatten(1, dim)
        return y + x if self.residual else y


class PlainMixture(daam.MultiHeadDensityAdaptiveAttention):
    """Weigh x by a mixture of densities as Algorithm 2 is written; norm_axis is 1, and heads divide it."""

    def forward(self, x: Tensor, _details: bool = False, *, mask: None = None, residual: bool = False) -> Tensor:
        """Return y, like x."""
        chunks, dim, product = x.unflatten(1, (self.num_heads, -1)), 2, 1.0
        mean, variance = chunks.mean(dim, keepdim=True), chunks.var(dim, keepdim=True)
        for mean_offset, c in zip(self.mean_offsets.unbind(1), self.c.unbind(1), strict=True):
            mean_offset, c = (p.view(-1, *[1] * (x.dim() - 1)) for p in (mean_offset, c))
            z = (chunks - mean - mean_offset) / torch.sqrt(variance + self.eps)
            product = product * (torch.exp(-(z**2) / (2 * c**2)) / torch.sqrt(2 * math.pi * c**2))
        weights = product / product.sum(dim, keepdim=True).clamp(min=self.eps)
        y = (chunks * weights).flatten(1, dim)
        return y + x if residual else y


class PlainStable(daam.StableMultiHeadDensityAttention):
    """Weigh x by a stabilised mixture as its authors write it; norm_axis is 1, and heads divide it."""

    def forward(self, x: Tensor, _details: bool = False, *, mask: None = None, residual: bool = False) -> Tensor:
        """Return y, like x."""
        chunks, dim, total = x.unflatten(1, (self.num_heads, -1)), 2, 0.0
        mean, variance = chunks.mean(dim, keepdim=True), chunks.var(dim, keepdim=True)
        for mean_offset, c in zip(self.mean_offsets.unbind(1), self.c.unbind(1), strict=True):
            mean_offset, c = (p.view(-1, *[1] * (x.dim() - 1)) for p in (mean_offset, c))
            u = ((chunks - mean - mean_offset) / torch.sqrt(variance + self.eps)).clamp(-FARTHEST, FARTHEST)
            square = c.clamp(*WIDTHS) ** 2 + self.eps
            total = total - u**2 / (2 * square) - torch.log(2 * math.pi * square) / 2
        y = (chunks * torch.softmax(total, dim)).flatten(1, dim)
        return y + x if residual else y


class PlainGate(daam.DensityGate):
    """Gate a sequence as the JEPA tokenizer does, all Gaussians at once along a dimension of their own."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return (y, gate)."""
        p = self.to_attn(x).unsqueeze(-1)
        mean, variance = p.mean(-2, keepdim=True), p.var(-2, unbiased=False, keepdim=True)
        sigma = softplus(self.gaa.log_sigma) + SIGMA_FLOOR
        std = variance.clamp(min=VARIANCE_FLOOR).sqrt()
        z = (p - (mean + self.gaa.mean_offsets)) / (std * sigma + WIDTH_FLOOR)
        gate = (torch.exp(-(z**2) / 2) / (math.sqrt(2 * math.pi) * sigma)).mean(-1)
        return x * (1 + self.alpha * gate), gate
