"""What the algorithms share: a call's inputs cut into heads, and heads of unequal length."""

from __future__ import annotations

import functools
from collections.abc import Callable
from functools import partial
from inspect import signature

import torch
from torch import Tensor

from daam.kernels.layout import acc_dtype, parts

SLICE = 2**19  # elements, 2 MB in fp32: as measured, with some six temporaries of that size


class Chunks:
    """One call's inputs cut into heads: x of shape (…, N, …) becomes (…, heads, N // heads, …), in the compute dtype.

    `x` holds zeros where the mask is False, `raw` what came; `count` is the number of valid positions of a chunk (1
    where there is none, so that it can divide); `dim` is the dimension that runs along a chunk. Where `padding` is
    given, `padded` says which positions hold it, and `counted` has zeros there: the statistics are those of `counted`.
    """

    def __init__(self, x: Tensor, heads: int, mask: Tensor | None, axis: int, padding: float | None = None):
        self.dtype, self.x_dtype = acc_dtype(x), x.dtype
        self.axis, self.heads = axis, heads
        self.length, self.dim, self.rank = x.shape[axis] // heads, axis + 1, x.dim() + 1
        self.invalid = None if mask is None else self.split(~mask)
        self.raw = self.split(x)
        self.x = self.valid(self.raw)
        # compared in x's dtype, which rounds the value
        self.padded = None if padding is None else self.split(x == padding)
        self.counted = self.x if padding is None else self.x.masked_fill(self.padded, 0)
        self.count, self.empty = self.length, 0
        if mask is not None:
            count = self.length - self.invalid.sum(self.dim, keepdim=True)
            self.count, self.empty = count.clamp(min=1), (count == 0).to(self.dtype)

    def split(self, t: Tensor) -> Tensor:
        t = t if t.dtype == torch.bool else t.to(self.dtype)
        return t.reshape(*t.shape[: self.axis], self.heads, self.length, *t.shape[self.dim :])

    def merge(self, t: Tensor) -> Tensor:
        t = t.reshape(*t.shape[: self.axis], self.heads * self.length, *t.shape[self.dim + 1 :])
        return t.to(self.x_dtype)

    def outputs(self, weights: Tensor, residual: bool, return_weights: bool) -> tuple[Tensor, Tensor | None]:
        """y and weights from weights of our own. They are no views to autograd: users change outputs in place."""
        y = weights * self.x if return_weights else weights.mul_(self.x)
        if self.padded is not None:
            y = torch.where(self.padded, self.x, y)
        if residual:
            y += self.raw
        outputs = (self.merge(t) for t in ((y, weights) if return_weights else (y,)))
        y, *weights = (torch.ops.aten._unsafe_view.default(t, t.shape) for t in outputs)
        return y, weights[0] if weights else None

    def gradients(self, grad_y: Tensor | None, grad_weights: Tensor | None) -> tuple[Tensor | int, ...]:
        """grad_y where it counts, what reaches the weights, and grad_y as it came; 0 for a grad_y of None."""
        raw = 0 if grad_y is None else self.split(grad_y)
        g = raw if grad_y is None else self.valid(raw)
        of_weights = 0 if grad_y is None else g * self.x
        if self.padded is not None and grad_y is not None:
            of_weights = of_weights.masked_fill(self.padded, 0)
        if grad_weights is not None:
            of_weights = of_weights + self.valid(self.split(grad_weights))
        return g, of_weights, raw

    def input_grad(
        self, indirect: Tensor, g: Tensor | int, weights: Tensor, raw: Tensor | int, residual: bool
    ) -> Tensor:
        """g·weights + indirect where x is valid, in the place of indirect; g and raw as `gradients` has them."""
        if isinstance(g, Tensor):
            indirect.addcmul_(g, weights)
        dx = self.valid(indirect)
        if residual:
            dx += raw
        return self.merge(dx)

    def valid(self, t: Tensor) -> Tensor:
        return t if self.invalid is None else t.masked_fill(self.invalid, 0)  # unlike where, keeps the order of strides

    def sum(self, t: Tensor) -> Tensor:
        return t.sum(self.dim, keepdim=True)

    def mean(self, t: Tensor) -> Tensor:
        return self.sum(t) / self.count

    def centred(self) -> tuple[Tensor, Tensor]:
        """x - mean, and the sum of its squares over a chunk."""
        d, rest, square = self.nearly_centred()
        return self.valid(d - rest), square

    def nearly_centred(self) -> tuple[Tensor, Tensor, Tensor]:
        """x less its mean as computed, what that was short of, and the sum of (x - mean)² over a chunk.

        In fp32 a large mean carries a rounding error of its own size: the mean of x - mean takes it back.
        """
        mean = self.mean(self.counted)
        d = self.valid(self.counted - mean)
        rest = self.mean(d)
        # both sums in one pass; of a constant chunk they cancel to a rounding error of either sign
        square = (self.sum(d * d) - self.count * rest * rest).clamp(min=0)
        return d if self.padded is None else self.x - mean, rest, square

    def param(self, p: Tensor, feature_axis: int | None = None) -> Tensor:
        """(heads, P) in the shape that broadcasts against the chunks; P follows feature_axis, or is 1."""
        shape = [1] * self.rank
        shape[self.axis] = self.heads
        if feature_axis is not None:
            # heads stands before a feature axis that follows the normalised one, behind one that precedes it
            before = feature_axis < self.axis
            shape[feature_axis if before else feature_axis + 1] = p.shape[1]
            p = p.t() if before else p
        return p.to(self.dtype).reshape(shape)

    def param_grad(self, g: Tensor, p: Tensor, feature_axis: int | None = None) -> Tensor:
        """What `param` broadcast, summed back to (heads, P)."""
        before = feature_axis is not None and feature_axis < self.axis
        g = g.sum([d for d, size in enumerate(self.param(p, feature_axis).shape) if size == 1 and d != self.axis])
        return (g.t() if before else g).reshape(p.shape)


# A function of the reference takes ([grad_y, grad_weights,] x, two parameters, mask, axis, …) and returns (y, weights)
# or the gradients of (x, both parameters).


def in_parts(function: Callable) -> Callable:
    """Let a function of heads of equal length take any: the last head takes the remainder, in a call of its own."""
    first = _place_of_x(function)

    @functools.wraps(function)
    def run(*args):
        x, params, axis = args[first], args[first + 1], args[first + 4]
        pieces = parts(x.shape[axis], params.shape[0])
        if len(pieces) == 1:
            return function(*args)
        results = [
            function(*_each(args, first, partial(piece.positions_of, axis=axis), partial(piece.heads_of, dim=0)))
            for piece in pieces
        ]
        dims = (axis, 0, 0) if first else (axis, axis)
        columns = zip(dims, zip(*results, strict=True), strict=True)
        return tuple(None if ts[0] is None else torch.cat(ts, dim) for dim, ts in columns)

    return run


def in_slices(function: Callable) -> Callable:
    """Let a function take a large x on the CPU in slices of another axis, whose temporaries stay in the cache."""
    first = _place_of_x(function)
    feature_axis = [i for i, name in enumerate(signature(function).parameters) if name == "feature_axis"]

    @functools.wraps(function)
    def run(*args):
        x, taken = args[first], [args[i] for i in (first + 4, *feature_axis)]
        if torch.compiler.is_compiling() or not x.is_cpu or x.numel() < 2 * SLICE:
            return function(*args)
        dim = next((d for d, size in enumerate(x.shape) if size > 1 and d not in taken), None)
        if dim is None:
            return function(*args)

        def slice_of(t, start):
            return t if t.shape[dim] == 1 else t[(slice(None),) * dim + (slice(start, start + step),)]

        size, step, whole = x.shape[dim], max(1, SLICE * x.shape[dim] // x.numel()), None
        for start in range(0, size, step):
            results = function(*_each(args, first, partial(slice_of, start=start), lambda p: p))
            # into one tensor at once: joined afterwards, slices would touch as much memory again
            of_x = (True, not first, not first)[: len(results)]
            pairs = list(zip(results, of_x, strict=True))
            if whole is None:
                whole = tuple(
                    None if t is None else t.new_empty(x.shape) if like_x else torch.zeros_like(t)
                    for t, like_x in pairs
                )
            for total, (t, like_x) in zip(whole, pairs, strict=True):
                if t is not None:
                    slice_of(total, start).copy_(t) if like_x else total.add_(t)
        return whole

    return run


def _place_of_x(function: Callable) -> int:
    return tuple(signature(function).parameters).index("x")


def _each(args: tuple, first: int, of_x: Callable, of_params: Callable) -> tuple:
    """args with what is shaped like x, and both parameters, changed."""
    like_x, params, mask, others = args[: first + 1], args[first + 1 : first + 3], args[first + 3], args[first + 4 :]
    *like_x, mask = (None if t is None else of_x(t) for t in (*like_x, mask))
    return *like_x, *map(of_params, params), mask, *others
