"""Parts common to the algorithms: a call's inputs cut into heads, heads of unequal length, slices of a large x."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial, wraps
from inspect import signature

import torch
from torch import Tensor
from torch.nn.parameter import Parameter

from daam.kernels.operands import acc_dtype

LOG2_E = 1.4426950408889634
TINY = 2**13  # elements, up to which calls take longer than what they do: a call more a Gaussian, or a pass less, count
SLICE = 2**19  # elements, 2 MB in fp32: as measured, with some six temporaries of that size


class Chunks:
    """Cut one call's inputs into heads: x of shape (…, N, …) becomes (…, heads, N // heads, …), in fp32 or fp64. Of a
    single head it stays (…, N, …): a tiny x takes the time of the calls that are made for it.

    `raw` is x as it came, `x` has zeros where the mask is False; `count` is the number of valid positions of a chunk (1
    where there is none, so that it can divide); `dim` is the dimension that runs along a chunk. Where `padding` is
    given, `padded` tells which positions hold it, and `stats_x`, which the statistics are those of, has zeros there, or
    x as it is without `zero_padding`.
    """

    def __init__(
        self, x: Tensor, heads: int, mask: Tensor | None, axis: int, padding: float | None = None,
        zero_padding: bool = True,
    ):  # fmt: skip
        self.dtype, self.x_dtype = acc_dtype(x), x.dtype
        self.axis, self.heads = axis, heads
        self.single, self.tiny = heads == 1, mask is None and can_branch(x) and x.numel() <= TINY
        self.length, self.dim, self.rank = x.shape[axis] // heads, axis + (heads > 1), x.dim() + (heads > 1)
        self.invalid = None if mask is None else self.split(~mask)
        self.raw = self.split(x)
        self.x = self.valid(self.raw)
        # compared in x's dtype, which rounds the value
        self.padded = None if padding is None else self.split(x == padding)
        self.stats_x = self.x if padding is None or not zero_padding else self.x.masked_fill(self.padded, 0)
        self.count, self.empty = self.length, 0
        if mask is not None:
            count = self.length - self.invalid.sum(self.dim, keepdim=True)
            self.count, self.empty = count.clamp(min=1), (count == 0).to(self.dtype)

    def split(self, t: Tensor) -> Tensor:
        """Return a tensor like x cut into heads, in the compute dtype unless it is bool."""
        t = t if t.dtype in (self.dtype, torch.bool) else t.to(self.dtype)
        return t if self.single else t.reshape(*t.shape[: self.axis], self.heads, self.length, *t.shape[self.dim :])

    def merge(self, t: Tensor) -> Tensor:
        """Return a tensor that is cut into heads in x's shape and dtype."""
        if not self.single:
            t = t.reshape(*t.shape[: self.axis], self.heads * self.length, *t.shape[self.dim + 1 :])
        return t if t.dtype == self.x_dtype else t.to(self.x_dtype)

    def outputs(self, weights: Tensor, residual: bool, return_weights: bool) -> tuple[Tensor, Tensor | None]:
        """Return (y, weights) like x from weights cut into heads; those not asked for are None, and overwritten."""
        y = weights * self.x if return_weights else weights.mul_(self.x)
        if self.padded is not None:
            y = torch.where(self.padded, self.x, y)
        if residual:
            y += self.raw
        outputs = (self.merge(t) for t in ((y, weights) if return_weights else (y,)))
        # no views to autograd: users change outputs in place. torch.jit would take these sizes for constants
        if not (self.single or torch._C._get_tracing_state()):
            outputs = (torch.ops.aten._unsafe_view.default(t, t.shape) for t in outputs)
        y, *weights = outputs
        return y, weights[0] if weights else None

    def weigh_x(self, weights: Tensor, residual: bool) -> Tensor:
        """Return y like x from weights cut into heads, by operations that can be differentiated."""
        y = self.x * weights
        if self.padded is not None:
            y = torch.where(self.padded, self.x, y)
        return self.merge(y + self.raw if residual else y)

    def gradients(self, grad_y: Tensor | None, grad_weights: Tensor | None) -> tuple[Tensor | int, ...]:
        """Return (g, h, raw), cut into heads: raw is grad_y as it came, g has zeros where x is not valid, and h =
        g·x + grad_weights is the gradient of the weights. All that comes of a grad_y of None is 0.
        """
        raw = 0 if grad_y is None else self.split(grad_y)
        g = raw if grad_y is None else self.valid(raw)
        h = 0 if grad_y is None else g * self.x
        if self.padded is not None and grad_y is not None:
            h = h.masked_fill(self.padded, 0)
        if grad_weights is not None:
            h = h + self.valid(self.split(grad_weights))
        return g, h, raw

    def input_grad(self, dx: Tensor, g: Tensor | int, weights: Tensor, raw: Tensor | int, residual: bool) -> Tensor:
        """Return dx + g·weights where x is valid (+ raw), like x. dx, the part by way of weights, is overwritten."""
        if isinstance(g, Tensor):
            dx.addcmul_(g, weights)
        dx = self.valid(dx)
        if residual:
            dx += raw
        return self.merge(dx)

    def valid(self, t: Tensor) -> Tensor:
        """Return a tensor that is cut into heads with zeros where the mask is False."""
        return t if self.invalid is None else t.masked_fill(self.invalid, 0)  # unlike where, keeps the order of strides

    def sum(self, t: Tensor) -> Tensor:
        return t.sum(self.dim, keepdim=True)

    def inverse_sum(self, t: Tensor) -> Tensor:
        """Return 1 / Σ t over each chunk, 1 where no position is valid and it is 0."""
        total = self.sum(t)
        return (total + self.empty if isinstance(self.empty, Tensor) else total).reciprocal()

    def mean(self, t: Tensor) -> Tensor:
        return self.sum(t) / self.count

    def centred(self) -> tuple[Tensor, Tensor]:
        """Return d = x - mean, 0 where x is not valid, and the sum of the squares that var is made of."""
        if self.stats_x is not self.x:
            d, mean_error, sum_squares = self.nearly_centred()
            return self.valid(d - mean_error), sum_squares
        d = self.valid(self.x - self.mean(self.x))
        d = self.valid(d - self.mean(d))  # see `nearly_centred`
        return d, self.sum(d * d)

    def nearly_centred(self) -> tuple[Tensor, Tensor | None, Tensor]:
        """Return (x - mean as computed, what that mean was short of, Σ (x - mean)² over a chunk).

        In fp32 a large mean carries a rounding error of its own size: the mean of x - mean takes it back. Of a tiny x
        it is taken back already, and None.
        """
        if self.tiny and self.stats_x is self.x:
            d, sum_squares = self.centred()
            return d, None, sum_squares
        mean = self.mean(self.stats_x)
        d = self.valid(self.stats_x - mean)
        mean_error = self.mean(d)
        # both sums in one pass; of a constant chunk they cancel to a rounding error of either sign
        sum_squares = (self.sum(d * d) - self.count * mean_error * mean_error).clamp(min=0)
        return d if self.stats_x is self.x else self.x - mean, mean_error, sum_squares

    @property
    def freedom(self) -> Tensor | int:
        """Return n - 1, by which an unbiased variance divides, at least 1: a tensor under a mask, else a number."""
        return (self.count - 1).clamp(min=1) if isinstance(self.count, Tensor) else self.count - 1

    def var_eps(self, sum_squares: Tensor, eps: float) -> Tensor:
        """Return var + eps, var unbiased, 0 of one valid position; 1 more where no position is valid."""
        return sum_squares / self.freedom + (addend(eps, sum_squares) + self.empty)

    def param(self, p: Tensor, feature_axis: int | None = None) -> Tensor:
        """Return a parameter (heads, P) as it broadcasts against the chunks; P follows feature_axis, if given."""
        p = p if p.dtype == self.dtype else p.to(self.dtype)
        if self.single and feature_axis in (None, self.rank - 1):
            return p  # (1, 1) or (1, P)
        shape = [1] * self.rank
        if self.single:
            shape[feature_axis] = p.shape[1]
            return p.reshape(shape)
        shape[self.axis] = self.heads
        if feature_axis is not None:
            # heads stands before a feature axis that follows the normalised one, behind one that precedes it
            precedes = feature_axis < self.axis
            shape[feature_axis if precedes else feature_axis + 1] = p.shape[1]
            p = p.t() if precedes else p
        return p.reshape(shape)

    def stack(self, params: Tensor) -> Tensor:
        """Return parameters (heads, P) in P rows that each broadcast against the chunks."""
        shape = [params.shape[1], *[1] * self.rank]
        if not self.single:
            shape[1 + self.axis] = self.heads
        return params.t().reshape(shape)

    def param_grad(self, g: Tensor, p: Tensor, feature_axis: int | None = None) -> Tensor:
        """Return a gradient for each position, or for each chunk, summed to the shape of the parameter, (heads, P)."""
        if self.single:
            features = [] if feature_axis is None else [feature_axis]
            return g.sum([d for d in range(g.dim()) if d not in features]).reshape(p.shape)
        precedes = feature_axis is not None and feature_axis < self.axis
        g = g.sum([d for d, size in enumerate(self.param(p, feature_axis).shape) if size == 1 and d != self.axis])
        return (g.t() if precedes else g).reshape(p.shape)


def clip(t: Tensor, low: float, high: float) -> Tensor:
    """Return a tensor clamped to limits; at them its gradient is 1, while that of torch.clamp is 0 since torch 2.15."""
    return torch.where(t < low, low, torch.where(t > high, high, t))


def addend(eps: float, t: Tensor) -> float | Tensor:
    """Return a small number that is added to a tensor, as the exporter to ONNX leaves it: of one dimension there."""
    # its optimiser drops a scalar of up to 1e-8, as if it were 0
    return t.new_full((1,), eps) if torch.compiler.is_exporting() else eps


@dataclass(frozen=True)
class Part:
    """Hold heads of equal length: `heads` of them from `head` on, over `length` positions of the axis from `start`."""

    head: int
    heads: int
    start: int
    length: int

    def heads_of(self, t: Tensor, dim: int) -> Tensor:
        """Return the part's share of a tensor with a dimension of heads."""
        return t if self.heads == t.shape[dim] else t.narrow(dim, self.head, self.heads)

    def positions_of(self, t: Tensor, axis: int) -> Tensor:
        """Return the part's share of a tensor of x's shape."""
        return t if self.length == t.shape[axis] else t.narrow(axis, self.start, self.length)


def parts(size: int, heads: int) -> tuple[Part, ...]:
    """Return an axis cut into chunks of size // heads: all heads at once, or all but the last, which takes the rest."""
    chunk = size // heads
    if size == heads * chunk:
        return (Part(0, heads, 0, size),)
    first = (heads - 1) * chunk
    return Part(0, heads - 1, 0, first), Part(heads - 1, 1, first, size - first)


# A function of the reference takes ([grad_y, grad_weights,] x, two parameters, mask, axis, …) and returns (y, weights)
# or the gradients of (x, both parameters).
def cut_into_parts(function: Callable) -> Callable:
    """Let a function of heads of equal length take any: the last head takes the remainder, in a call of its own."""
    x_index = _find_x(function)

    @wraps(function)
    def run(*args):
        x, params, axis = args[x_index], args[x_index + 1], args[x_index + 4]
        size, heads = x.shape[axis], params.shape[0]
        if heads == 1 or size % heads == 0:
            return function(*args)
        pieces = parts(size, heads)
        cuts = [(partial(piece.positions_of, axis=axis), partial(piece.heads_of, dim=0)) for piece in pieces]
        results = [function(*_cut(args, x_index, *cut)) for cut in cuts]
        dims = (axis, 0, 0) if x_index else (axis, axis)
        columns = zip(dims, zip(*results, strict=True), strict=True)
        return tuple(None if ts[0] is None else torch.cat(ts, dim) for dim, ts in columns)

    return run


def cut_into_slices(function: Callable) -> Callable:
    """Let a function take a large x on the CPU in slices of another axis, whose temporaries stay in the cache."""
    x_index = _find_x(function)
    feature_axis = [i for i, name in enumerate(signature(function).parameters) if name == "feature_axis"]

    @wraps(function)
    def run(*args):
        x = args[x_index]
        if torch.compiler.is_compiling() or not x.is_cpu or x.numel() < 2 * SLICE:
            return function(*args)
        axes = [args[i] for i in (x_index + 4, *feature_axis)]
        dim = next((d for d, size in enumerate(x.shape) if size > 1 and d not in axes), None)
        if dim is None:
            return function(*args)

        def slice_of(t, start):
            return t if t.shape[dim] == 1 else t[(slice(None),) * dim + (slice(start, start + step),)]

        size, step, outputs = x.shape[dim], max(1, SLICE * x.shape[dim] // x.numel()), None
        for start in range(0, size, step):
            results = function(*_cut(args, x_index, partial(slice_of, start=start), lambda p: p))
            # gradients are those of x and of two parameters, which sum over slices; y and weights are like x
            n_like_x = 1 if x_index else 2
            if outputs is None:  # into one tensor at once: joined afterwards, slices would touch as much memory again
                outputs = [
                    None if t is None else t.new_empty(x.shape) if i < n_like_x else torch.zeros_like(t)
                    for i, t in enumerate(results)
                ]
            for i, t in enumerate(results):
                if t is not None:
                    slice_of(outputs[i], start).copy_(t) if i < n_like_x else outputs[i].add_(t)
        return tuple(outputs)

    return run


def can_branch(x: Tensor) -> bool:
    """Tell whether what is computed may depend on values of x: they are here, and no graph is made that must not."""
    if type(x) not in (Tensor, Parameter) or not x.is_cpu:  # a fake tensor has none, a GPU would have to be waited for
        return False
    proxies = torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.PROXY)
    return not (torch.compiler.is_compiling() or proxies or torch._C._get_tracing_state())


def _find_x(function: Callable) -> int:
    """Return the index of x among a function's parameters: 0, or 2 behind the gradients."""
    return tuple(signature(function).parameters).index("x")


def _cut(args: tuple, x_index: int, cut_x: Callable, cut_param: Callable) -> tuple:
    """Return a function's arguments with cut_x of each tensor like x, None aside, and cut_param of both parameters."""
    *tensors, p, q, mask = args[: x_index + 4]
    *tensors, mask = (None if t is None else cut_x(t) for t in (*tensors, mask))
    return *tensors, cut_param(p), cut_param(q), mask, *args[x_index + 4 :]
