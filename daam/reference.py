"""The eager backend: plain PyTorch, on any device, in fp32 (fp64 for fp64 x).

Every algorithm has a section with two pairs of functions. `density` and `density_grad` are the specification: they read
like the paper, are differentiable to any order, and serve vmap, forward-mode AD and double backward. `density_forward`
and `density_backward` compute the same numbers in place, with few temporaries; they are what runs otherwise. The tests
tie the pairs.

All of them share the view of the operators in `daam.ops`: `axis` is the axis that is normalised, `feature_axis` the one
that the second dimension of the parameters follows, both non-negative; `mask` is None or a bool tensor that broadcasts
against x.
"""

from __future__ import annotations

import torch
from torch import Tensor


def compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype all arithmetic on x runs in: fp64 for fp64, fp32 for everything else."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


class _Chunks:
    """One call's inputs cut into heads: x of shape (…, N, …) becomes (…, heads, N // heads, …), in the compute dtype.

    `x` holds zeros where the mask is False, `raw` what came; `count` is the number of valid positions of a chunk (1
    where there is none, so that it can divide); `dim` is the dimension that runs along a chunk.
    """

    def __init__(self, x: Tensor, heads: int, mask: Tensor | None, axis: int, feature_axis: int):
        self.dtype = compute_dtype(x)
        self.axis, self.feature_axis, self.heads = axis, feature_axis, heads
        self.length, self.dim, self.rank = x.shape[axis] // heads, axis + 1, x.dim() + 1
        self.invalid = None if mask is None else self.split(~mask)
        self.raw = self.split(x)
        self.x = self.valid(self.raw)
        self.count, self.empty = self.length, 0
        if mask is not None:
            count = self.length - self.invalid.sum(self.dim, keepdim=True)
            self.count, self.empty = count.clamp(min=1), (count == 0).to(self.dtype)

    def split(self, t: Tensor) -> Tensor:
        t = t if t.dtype == torch.bool else t.to(self.dtype)
        return t.reshape(*t.shape[: self.axis], self.heads, self.length, *t.shape[self.dim :])

    def merge(self, t: Tensor, dtype: torch.dtype) -> Tensor:
        return t.reshape(*t.shape[: self.axis], self.heads * self.length, *t.shape[self.dim + 1 :]).to(dtype)

    def output(self, t: Tensor, dtype: torch.dtype) -> Tensor:
        """`merge` of a tensor of our own that is no view to autograd: users change outputs in place."""
        t = self.merge(t, dtype)
        return torch.ops.aten._unsafe_view.default(t, t.shape)

    def valid(self, t: Tensor) -> Tensor:
        return t if self.invalid is None else t.masked_fill(self.invalid, 0)  # unlike where, keeps the order of strides

    def mean(self, t: Tensor) -> Tensor:
        return t.sum(self.dim, keepdim=True) / self.count

    def centred(self) -> Tensor:
        """x - mean. The mean is corrected by the mean of x - mean: in fp32 a large mean carries a rounding error of its
        own size.
        """
        d = self.valid(self.x - self.mean(self.x))
        return self.valid(d - self.mean(d))

    def spread(self, d: Tensor, eps: float) -> Tensor:
        """var + eps, and 1 more where no position is valid, so that it can divide whatever eps is."""
        return self.mean(d * d) + (eps + self.empty)

    def param(self, p: Tensor) -> Tensor:
        """(heads, P) in the shape that broadcasts against the chunks."""
        shape = [1] * self.rank
        shape[self.axis] = self.heads
        if p.shape[1] != 1:
            # heads stands before a feature axis that follows the normalised one, behind one that precedes it
            before = self.feature_axis < self.axis
            shape[self.feature_axis if before else self.feature_axis + 1] = p.shape[1]
            p = p.t() if before else p
        return p.to(self.dtype).reshape(shape)

    def param_grad(self, g: Tensor, p: Tensor) -> Tensor:
        """What `param` broadcast, summed back to (heads, P)."""
        before = p.shape[1] != 1 and self.feature_axis < self.axis
        g = g.sum([d for d, size in enumerate(self.param(p).shape) if size == 1 and d != self.axis])
        return (g.t() if before else g).reshape(p.shape).to(p.dtype)


# --- Density attention, arXiv 2401.11143, Algorithm 1 ---------------------------------------------


def density(
    x: Tensor,
    mean_offset: Tensor,
    c: Tensor,
    mask: Tensor | None,
    axis: int,
    feature_axis: int,
    eps: float,
    residual: bool,
) -> tuple[Tensor, Tensor]:
    """y and weights, as the paper writes them: z = (x - mean - mean_offset) / sqrt(var + eps), weights = exp(-z²/(2c)),
    y = x·weights.
    """
    chunks = _Chunks(x, c.shape[0], mask, axis, feature_axis)
    d = chunks.centred()
    z = (d - chunks.param(mean_offset)) * torch.rsqrt(chunks.spread(d, eps))
    weights = chunks.valid(torch.exp(-z * z / (2 * chunks.param(c))))
    y = chunks.x * weights
    if residual:
        y = y + chunks.raw
    return chunks.merge(y, x.dtype), chunks.merge(weights, x.dtype)


def density_grad(
    grad_y: Tensor | None, grad_weights: Tensor | None, x: Tensor, mean_offset: Tensor, c: Tensor, mask: Tensor | None,
    axis: int, feature_axis: int, eps: float, residual: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of x, mean_offset and c in closed form, differentiable themselves.

    With e = x - mean - mean_offset, r2 = 1/(var + eps), h = (grad_y·x + grad_weights)·weights and sums over a chunk of
    length n: s1 = r2·Σ h·e/c, s2 = r2·Σ h·e²/c, dx = grad_y·weights - r2·h·e/c + (s1 + r2·s2·(x - mean))/n.
    """
    chunks = _Chunks(x, c.shape[0], mask, axis, feature_axis)
    scale = chunks.param(c)
    d = chunks.centred()
    r2 = 1 / chunks.spread(d, eps)
    e = d - chunks.param(mean_offset)
    weights = chunks.valid(torch.exp(-e * e * r2 / (2 * scale)))
    raw = torch.zeros_like(chunks.x) if grad_y is None else chunks.split(grad_y)
    direct, h = chunks.valid(raw) * weights, chunks.valid(raw) * chunks.x
    if grad_weights is not None:
        h = h + chunks.valid(chunks.split(grad_weights))
    he = h * weights / scale * e * r2
    hee = he * e
    dx = chunks.valid(direct - he + chunks.mean(he) + r2 * d * chunks.mean(hee))
    if residual:
        dx = dx + raw
    return (
        chunks.merge(dx, x.dtype),
        chunks.param_grad(he, mean_offset),
        chunks.param_grad(hee / (2 * scale), c),
    )


def density_forward(
    x: Tensor, mean_offset: Tensor, c: Tensor, mask: Tensor | None, axis: int, feature_axis: int, eps: float,
    residual: bool, return_weights: bool,
) -> list[Tensor]:  # fmt: skip
    """`density` in place: [y] or [y, weights]."""
    chunks = _Chunks(x, c.shape[0], mask, axis, feature_axis)
    d = chunks.centred()
    r2 = chunks.spread(d, eps).reciprocal_()
    weights = d.sub_(chunks.param(mean_offset)).square_().mul_(r2 / (-2 * chunks.param(c))).exp_()
    weights = chunks.valid(weights)
    y = weights * chunks.x if return_weights else weights.mul_(chunks.x)
    if residual:
        y += chunks.raw
    outputs = [y, weights] if return_weights else [y]
    return [chunks.output(t, x.dtype) for t in outputs]


def density_backward(
    grad_y: Tensor | None, grad_weights: Tensor | None, x: Tensor, mean_offset: Tensor, c: Tensor, mask: Tensor | None,
    axis: int, feature_axis: int, eps: float, residual: bool, need_x: bool, need_params: bool,
) -> list[Tensor]:  # fmt: skip
    """`density_grad` in place: [dx] if need_x, then [d_mean_offset, d_c] if need_params.

    In place is only what came of both gradients, either of which may be batched (is_grads_batched) where x is not.
    """
    chunks = _Chunks(x, c.shape[0], mask, axis, feature_axis)
    scale, offset = chunks.param(c), chunks.param(mean_offset)
    d = chunks.centred()
    r2 = chunks.spread(d, eps).reciprocal_()
    e = d - offset
    weights = chunks.valid((e * e).mul_(r2 / (-2 * scale)).exp_())
    raw = None if grad_y is None else chunks.split(grad_y)
    if raw is None:
        h = chunks.valid(chunks.split(grad_weights)) * weights
    else:
        g = chunks.valid(raw)
        h = g * chunks.x
        if grad_weights is not None:
            h = h + chunks.valid(chunks.split(grad_weights))
        h *= weights
    he = h.mul_(e).mul_(r2 / scale)
    hee = he * e
    grads = []
    if need_x:
        dx = (d * chunks.mean(hee).mul_(r2)).add_(chunks.mean(he)).sub_(he)
        if raw is not None:
            dx.addcmul_(g, weights)
        dx = chunks.valid(dx)
        if residual and raw is not None:
            dx += raw
        grads.append(chunks.merge(dx, x.dtype))
    if need_params:
        grads += [chunks.param_grad(he, mean_offset), chunks.param_grad(hee / (2 * scale), c)]
    return grads
