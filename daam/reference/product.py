"""Products of a head's Gaussians, as the mixture and the stabilised mixture weigh with: in log space, one quadratic.

With precisions S_k, a = Σ S_k, m = Σ S_k·o_k/a and v = Σ S_k·(o_k - m)²/a,

    Σ_k S_k·(x - mean - o_k)² = a·((x - mean - m)² + v)

so that nothing but numbers of a head depends on the number of Gaussians. Where m is far from x - mean, (x - mean - m)²
would round away what tells positions apart: it is taken as s + (m - p)² with s = (x - mean - p)·(x - mean - (2m - p)),
p being m or, if that is further off, four standard deviations.
"""

from __future__ import annotations

import torch
from torch import Tensor

from daam.reference.chunks import LOG2_E, Chunks


def add_error(t: Tensor, mean_error: Tensor | None) -> Tensor:
    """Return t + mean_error, as `Chunks.nearly_centred` returns it."""
    return t if mean_error is None else t + mean_error


def constant(t: Tensor) -> Tensor:
    """Return a tensor that derivatives do without."""
    return t.detach() if t.requires_grad or torch._C._are_functorch_transforms_active() else t


class Product:
    """Hold the one Gaussian that a head's product is, on every chunk: all numbers broadcast against the chunks.

    a, m and v as above, of offsets and precisions (heads, num_gaussians), the latter in units of `unit`; inv_var:
    1/(var + eps); origin p and mirror 2m - p; freedom: n - 1.
    """

    def __init__(self, chunks: Chunks, offsets: Tensor, precisions: Tensor, unit: Tensor | float, var_eps: Tensor):
        sum_precisions = precisions.sum(1, keepdim=True)
        m = (offsets * precisions).sum(1, keepdim=True) / sum_precisions
        v = ((offsets - m).square() * precisions).sum(1, keepdim=True) / sum_precisions
        self.chunks, self.freedom = chunks, chunks.freedom
        self.a, self.m, self.v = (chunks.param(t) for t in (sum_precisions * unit, m, v))
        self.inv_var = var_eps.reciprocal()
        limit = 4 * constant(var_eps).sqrt()
        self.origin = constant(self.m).clamp(-limit, limit)
        self.mirror = self.m - self.origin + self.m
        self.log2_factor = self.a * self.inv_var * (LOG2_E / 2)

    def relate(self, s: Tensor, hidden: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return (weights relative to the chunk's likeliest position, s of that), of s as above.

        hidden: positions without weight, None for none; where a chunk has no other, s of the likeliest is inf, and 0
        where a mask leaves none.
        """
        chunks = self.chunks
        distances = constant(s) if hidden is None else constant(s).masked_fill(hidden, torch.inf)
        min_s = distances.amin(chunks.dim, keepdim=True)
        if chunks.invalid is not None:
            min_s = min_s.masked_fill(chunks.empty.bool(), 0)
        # as differences, since a product can be large, and wrong by 1
        weights = ((min_s - s) * self.log2_factor).exp2()
        return weights if hidden is None else weights.masked_fill(hidden, 0), min_s
