"""Stabilised mixture of densities, arXiv 2602.09040: what stands far from a Gaussian is clamped, and weights sum to 1.

Parameters mean_offsets and c are (heads, num_gaussians). Over a chunk of n positions, with its mean, its unbiased
variance, r = 1/sqrt(var + eps), o_k = mean_offset_k, c'_k = clamp(c_k, 0.01, 10) and S_k = 1/(c'_k² + eps):

    e_k = x - mean - o_k      u_k = clamp(e_k·r, -10, 10)      log w = -½·Σ_k (S_k·u_k² + log(2π/S_k))
    weights = softmax(log w) over the chunk      y = x·weights

At padding log w is -1e9, which leaves it no weight, and y is x; mean and variance count it as any position. log w is
-1e9 too where it is NaN: a chunk that holds one, and one of nothing but padding, have equal weights. With
h = (grad_y·x + grad_weights)·weights, 0 at padding, k = h - weights·Σ h, and [.] = 1 where |e_k·r| <= 10, else 0:

    E = Σ_k S_k·e_k·[.]      Q = Σ_k S_k·e_k²·[.]
    dx = grad_y·weights (grad_y at padding) - r²·(k·E - Σ k·E/n) + r⁴·(x - mean)·Σ k·Q/(n - 1)
    d_mean_offset_k = S_k·Σ r²·k·e_k·[.]      d_c_k = [0.01 <= c_k <= 10]·c'_k·S_k²·Σ k·u_k²

Where nothing of a chunk is clamped log w is one quadratic in x, as the mixture's is: see `product.py`. `forward` and
`backward` compute that, and what each Gaussian adds only for chunks that clamp somewhere, if there are any.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from daam.reference.chunks import Chunks, addend, can_branch, clip, cut_into_parts, cut_into_slices
from daam.reference.product import Product, add_error

WIDTHS = (0.01, 10.0)  # what c is clamped to
FARTHEST = 10.0  # what u is clamped to, on either side, in standard deviations
LOG_NOTHING = -1e9  # of a weight that is none


@cut_into_parts
def formula(
    x: Tensor, mean_offsets: Tensor, c: Tensor, mask: Tensor | None, axis: int, eps: float, padding: float | None,
    residual: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Return (y, weights) by this module's formulas, each like x; y = x·weights, plus x with residual."""
    chunks = Chunks(x, c.shape[0], mask, axis, padding, zero_padding=False)
    log_w = log_weights(chunks, *chunks.centred(), mean_offsets, c, eps)
    weights = normalise(chunks, log_w, *sum_exponentials(chunks, log_w), eps)
    return chunks.weigh_x(weights, residual), chunks.merge(weights)


def log_weights(
    chunks: Chunks, d: Tensor, sum_squares: Tensor, mean_offsets: Tensor, c: Tensor, eps: float
) -> Tensor:  # fmt: skip
    """Return log w, cut into heads, of x - mean and Σ (x - mean)²; -1e9 where it is no number, or hidden."""
    inv_std = torch.rsqrt(chunks.var_eps(sum_squares, eps))
    log_w = torch.zeros_like(d)
    for offset, width in _gaussians(chunks, mean_offsets, c):
        u = clip((d - offset) * inv_std, -FARTHEST, FARTHEST)
        variance = width * width + addend(eps, width)
        log_w = log_w - u * u / (2 * variance) - (2 * math.pi * variance).log() / 2
    return _hide(chunks, log_w)


@cut_into_parts
def gradient(
    grad_y: Tensor | None, grad_weights: Tensor | None, x: Tensor, mean_offsets: Tensor, c: Tensor, mask: Tensor | None,
    axis: int, eps: float, padding: float | None, residual: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Return gradients of x, mean_offsets and c by this module's formulas, differentiable themselves."""
    chunks = Chunks(x, c.shape[0], mask, axis, padding, zero_padding=False)
    d, sum_squares = chunks.centred()
    inv_var = 1 / chunks.var_eps(sum_squares, eps)
    inv_std = inv_var.sqrt()
    log_w, sum_e, sum_q, terms = torch.zeros_like(d), 0, 0, []
    for offset, width in _gaussians(chunks, mean_offsets, c):
        e, precision = d - offset, 1 / (width * width + eps)
        inside = ((e * inv_std).abs() <= FARTHEST).to(d.dtype)
        u = clip(e * inv_std, -FARTHEST, FARTHEST)
        log_w = log_w - u * u * precision / 2
        sum_e, sum_q = sum_e + precision * e * inside, sum_q + precision * e * e * inside
        terms.append((precision * inv_var * e * inside, width * precision * precision * u * u))
    log_w = _hide(chunks, log_w)
    weights = normalise(chunks, log_w, *sum_exponentials(chunks, log_w), eps)
    g, h, raw = chunks.gradients(grad_y, grad_weights)
    h = h * weights
    k = h - weights * chunks.sum(h)
    if padding is not None:
        k = k.masked_fill(chunks.padded, 0)
        weights = torch.where(chunks.padded, 1, weights)
    slope = inv_var * chunks.sum(k * sum_q) / chunks.freedom
    dx = chunks.valid(g * weights + inv_var * (chunks.mean(k * sum_e) + d * slope - k * sum_e))
    d_mean_offsets, d_c = (
        torch.cat([chunks.param_grad(k * term, c[:, :1]) for term in column], 1) for column in zip(*terms, strict=True)
    )
    return chunks.merge(dx + raw if residual else dx), d_mean_offsets, d_c * _free(c.to(d.dtype))


@cut_into_parts
@cut_into_slices
def forward(
    x: Tensor, mean_offsets: Tensor, c: Tensor, mask: Tensor | None, axis: int, eps: float, padding: float | None,
    residual: bool, return_weights: bool,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """Return (y, weights) as `formula` does, computed in place; the weights are None if not asked for.

    Where `can_branch` says so, Gaussians cost time only of chunks that clamp somewhere.
    """
    chunks = Chunks(x, c.shape[0], mask, axis, padding, zero_padding=False)
    d, mean_error, sum_squares = chunks.nearly_centred()
    fit = _Fit(chunks, mean_offsets, c, sum_squares, eps)
    f = d - add_error(fit.origin, mean_error)
    s = (d - add_error(fit.mirror, mean_error)).mul_(f)
    if (clamped := fit.find_clamped(x, d, mean_error)) is not None:
        s = clamped.put(sum(share * gap for share, _, gap in fit.each(f, clamped)), s)
    weights, scale, _ = fit.weigh(s, clamped is not None)
    return chunks.outputs(weights.mul_(scale), residual, return_weights)


@cut_into_parts
@cut_into_slices
def backward(
    grad_y: Tensor | None, grad_weights: Tensor | None, x: Tensor, mean_offsets: Tensor, c: Tensor, mask: Tensor | None,
    axis: int, eps: float, padding: float | None, residual: bool, need_x: bool, need_params: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    """Return the gradients that `gradient` does, computed in place; those not needed are None."""
    # in place is only what came of both gradients, either of which may be batched (is_grads_batched) where x is not
    chunks = Chunks(x, c.shape[0], mask, axis, padding, zero_padding=False)
    d, mean_error, sum_squares = chunks.nearly_centred()
    fit = _Fit(chunks, mean_offsets, c, sum_squares, eps)
    f = d - add_error(fit.origin, mean_error)
    s = (d - add_error(fit.mirror, mean_error)).mul_(f)
    # E/a = slopes + shift and Q/a = squares, the latter but for what is the same in all of a chunk, where Σ k is 0
    slopes, squares, shift = f, s, fit.origin - fit.m
    if (clamped := fit.find_clamped(x, d, mean_error)) is not None:
        sums = [0, 0, 0]
        for share, e, gap in fit.each(f, clamped):
            sums = [total + share * term for total, term in zip(sums, (e, e.square(), gap), strict=True)]
        slopes, squares, s = (clamped.put(*pair) for pair in zip(sums, (f, s, s), strict=True))
        shift = shift.masked_fill(clamped.which, 0)
    weights, scale, equal = fit.weigh(s, clamped is not None)
    g, h, raw = chunks.gradients(grad_y, grad_weights)
    k = h * weights
    sum_h = chunks.sum(k).mul_(scale)
    weights = weights * scale
    k.mul_(scale).addcmul_(weights, -sum_h)
    if equal is not None:
        k.masked_fill_(equal, 0)
    kf = k * slopes
    sum_ke, sum_kq = chunks.sum(kf), chunks.sum(squares * k)
    dx, d_params = None, (None, None)
    if need_params:
        d_params = fit.param_gradients(c, k, f, sum_ke, sum_kq, clamped)
    if need_x:
        slope = fit.inv_var * sum_kq / fit.freedom
        mean_ke = sum_ke / chunks.count
        common = (d * slope).add_(mean_ke if mean_error is None else mean_ke - slope * mean_error)
        if padding is not None:
            weights.masked_fill_(chunks.padded, 1)
        dx = common.sub_(kf).sub_(k.mul_(shift)).mul_(fit.a * fit.inv_var)
        dx = chunks.input_grad(dx, g, weights, raw, residual)
    return dx, *d_params


def _gaussians(chunks: Chunks, mean_offsets: Tensor, c: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Return (mean_offset, c') of every Gaussian, in the shape that broadcasts against the chunks."""
    widths = clip(c.to(chunks.dtype), *WIDTHS)
    pairs = zip(mean_offsets.split(1, 1), widths.split(1, 1), strict=True)
    return [(chunks.param(offset), chunks.param(width)) for offset, width in pairs]


def _hidden(chunks: Chunks) -> Tensor | None:
    """Return which positions have no weight: those not valid, or padding; None for none."""
    return chunks.padded if chunks.invalid is None else chunks.invalid


def _hide(chunks: Chunks, log_w: Tensor) -> Tensor:
    """Return log w of no weight where it is no number, x is not valid, or at padding."""
    log_w = torch.where(log_w.isfinite(), log_w, LOG_NOTHING)
    hidden = _hidden(chunks)
    return log_w if hidden is None else log_w.masked_fill(hidden, LOG_NOTHING)


def sum_exponentials(chunks: Chunks, log_w: Tensor) -> tuple[Tensor, Tensor]:
    """Return the largest log w of each chunk, a constant, and Σ exp(log w - largest) over what is valid."""
    largest = log_w.detach().amax(chunks.dim, keepdim=True)
    return largest, chunks.sum(chunks.valid((log_w - largest).exp()))


def normalise(chunks: Chunks, log_w: Tensor, largest: Tensor, total: Tensor, _eps: float) -> Tensor:
    """Return the weights of log w, of what `sum_exponentials` returns: none where x is not valid, nor at padding,
    unless a chunk holds nothing else.
    """
    # divided by their sum, not by its logarithm, which large numbers round: gradients rest on Σ weights being 1
    return chunks.valid((log_w - largest).exp()) / (total + chunks.empty)


def _free(c: Tensor) -> Tensor:
    """Return 1 where c is not clamped, else 0; compared in the dtype of c, which rounds the limits as clamp does."""
    low, high = WIDTHS
    return ((c >= low) & (c <= high)).to(c.dtype)


class _Clamped:
    """Hold which chunks clamp somewhere, and take them out of tensors, with what runs along a chunk as last dimension.

    which: bool, a number each chunk. few: take out just those; else all, as graphs must, and each stays in place.
    """

    def __init__(self, chunks: Chunks, which: Tensor, few: bool):
        self.dim, self.which = chunks.dim, which
        self.index = which.movedim(self.dim, -1)[..., 0].nonzero(as_tuple=True) if few else None

    def pick(self, t: Tensor) -> Tensor:
        """Return those chunks of a tensor that broadcasts against the chunks."""
        if self.index is None:
            return t
        shape = [*self.which.shape]
        shape[self.dim] = t.shape[self.dim] if t.dim() == len(shape) else 1  # of a head, it may have fewer
        return t.expand(shape).movedim(self.dim, -1)[self.index]

    def put(self, picked: Tensor, t: Tensor) -> Tensor:
        """Return a tensor that is cut into chunks with those picked in their places."""
        if self.index is None:
            return torch.where(self.which, picked, t)
        return t.movedim(self.dim, -1).index_put(self.index, picked).movedim(-1, self.dim)

    def sum(self, picked: Tensor) -> Tensor:
        """Return sums over each chunk of what was picked, 0 for the others."""
        dim = self.dim if self.index is None else -1
        return self.put(picked.sum(dim, keepdim=True), torch.zeros_like(self.which, dtype=picked.dtype))


class _Fit(Product):
    """Add to the product of a head's Gaussians where they clamp, and what each adds there."""

    def __init__(self, chunks: Chunks, mean_offsets: Tensor, c: Tensor, sum_squares: Tensor, eps: float):
        self.offsets, self.widths = mean_offsets.to(chunks.dtype), c.to(chunks.dtype).clamp(*WIDTHS)
        self.precisions = 1 / (self.widths.square() + addend(eps, self.widths))
        var_eps = chunks.var_eps(sum_squares, eps)
        super().__init__(chunks, self.offsets, self.precisions, 1, var_eps)
        self.limit = FARTHEST * var_eps.sqrt()

    def find_clamped(self, x: Tensor, d: Tensor, mean_error: Tensor | None) -> _Clamped | None:
        """Return which chunks hold a position that clamps, or have no finite log w; None where none is known to.

        d, mean_error: as `Chunks.nearly_centred` returns them, of x, which says whether it may be known.
        """
        low, high = torch.aminmax(d, dim=self.chunks.dim, keepdim=True)
        first, last = (
            add_error(self.chunks.param(t), mean_error) for t in torch.aminmax(self.offsets, dim=1, keepdim=True)
        )
        free = (high - first <= self.limit) & (low - last >= -self.limit)  # not so of NaN
        free &= (self.limit + self.log2_factor).isfinite()
        if not can_branch(x):
            return _Clamped(self.chunks, ~free, few=False)
        n_clamped = free.numel() - int(free.sum())
        # taken out and put back, a chunk takes about twice the time of one that stays
        return _Clamped(self.chunks, ~free, few=2 * n_clamped < free.numel()) if n_clamped else None

    def each(self, f: Tensor, clamped: _Clamped) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Yield (S_k/a, e_k, 0 where it clamps, u_k²/r² less that of the origin) of every Gaussian and clamped chunk.

        f: x - mean - p, of all chunks.
        """
        f, origin, limit, a = (clamped.pick(t) for t in (f, self.origin, self.limit, self.a))
        farthest = limit.square()
        for offset, precision in zip(self.offsets.split(1, 1), self.precisions.split(1, 1), strict=True):
            offset, precision = (clamped.pick(self.chunks.param(t)) for t in (offset, precision))
            from_origin = origin - offset
            e = f + from_origin
            clamps = ~(e.abs() <= limit)
            origin_cost = from_origin.square()
            base = torch.minimum(origin_cost, farthest)
            gap = f * (e + from_origin) + (origin_cost - base)
            yield precision / a, e.masked_fill(clamps, 0), torch.where(clamps, farthest - base, gap)

    def weigh(self, s: Tensor, clamps: bool) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return (weights without their scale, that scale, where all are equal and have no gradient or None)."""
        weights, min_s = self.relate(s, _hidden(self.chunks))
        chunks = self.chunks
        scale = chunks.inverse_sum(weights)
        if not clamps and chunks.padded is None:
            return weights, scale, None
        equal = ~(min_s * self.log2_factor + self.limit).isfinite()
        return chunks.valid(weights.masked_fill(equal, 1)), torch.where(equal, 1 / chunks.count, scale), equal

    def param_gradients(
        self, c: Tensor, k: Tensor, f: Tensor, sum_ke: Tensor, sum_kq: Tensor, clamped: _Clamped | None
    ) -> tuple[Tensor, Tensor]:
        """Return the gradients of mean_offsets and c from k and, for chunks that clamp nowhere, Σ k·E/a and Σ k·Q/a."""

        def add_up(sums: Tensor) -> Tensor:
            return self.chunks.param_grad(sums * self.inv_var, c[:, :1])

        if clamped is not None:
            sum_ke, sum_kq = (t.masked_fill(clamped.which, 0) for t in (sum_ke, sum_kq))
        ke, kee = add_up(sum_ke), add_up(sum_kq)
        kee = kee - 2 * (self.offsets - self.m.reshape(-1, 1)) * ke
        if clamped is not None:
            k = clamped.pick(k)
            terms = [[add_up(clamped.sum(k * t)) for t in (e, gap)] for _, e, gap in self.each(f, clamped)]
            ke, kee = (t + torch.cat(column, 1) for t, column in zip((ke, kee), zip(*terms, strict=True), strict=True))
        factor = self.widths * self.precisions.square() * _free(c.to(self.widths.dtype))
        return self.precisions * ke, factor * kee
