"""What a forward and a backward pass do on the host, whatever the algorithm: outputs, statistics, sums, and a `Call`
for every part of the axis.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from daam.kernels import launch
from daam.kernels.call import Call, plan
from daam.kernels.layout import Strided, acc_dtype


class _Pass:
    """A pass on x and others of its shape. mask: broadcast against x, or None. stats: statistics of its chunks, None
    where these stay on chip.
    """

    def __init__(
        self, tiles: launch.Tiles, x: Tensor, mask: Tensor | None, heads: int, axis: int, feature_axis: int | None,
        stats: Tensor | None = None, **others: Tensor | None,
    ):  # fmt: skip
        self.x, self.axis = x, axis
        self.tensors = {"x": x, "mask": mask, **others}
        specs = [None if t is None else (t.shape, t.stride(), t.dtype) for t in self.tensors.values()]
        # not whether weights are written: y is the same to the bit with and without them
        weights = others.get("grad_weights") is not None
        self.plan = plan(tiles, axis, heads, feature_axis, weights, *specs)
        if self.plan.stats_shape is None:
            stats = None
        elif stats is None:
            stats = x.new_empty(self.plan.stats_shape, dtype=acc_dtype(x))
        self.stats = stats

    def calls(self) -> Iterator[Call]:
        """A call for every part of the axis, one or two, on the tensors by name; none where x is empty."""
        tensors = self.tensors
        if len(self.plan.parts) > 1 and tensors["mask"] is not None:
            tensors = tensors | {"mask": tensors["mask"].expand(self.x.shape)}
        for part in self.plan.parts:
            yield Call(part, self.axis, self.stats, tensors)


class Forward(_Pass):
    """A forward pass. y, weights: contiguous; weights are None where not asked for."""

    def __init__(
        self, x: Tensor, mask: Tensor | None, heads: int, axis: int, return_weights: bool,
        feature_axis: int | None = None, tiles: launch.Tiles = launch.FORWARD,
    ):  # fmt: skip
        self.y, self.weights = _like(x), _like(x) if return_weights else None
        super().__init__(tiles, x, mask, heads, axis, feature_axis, y=self.y, weights=self.weights)

    def outputs(self, save_stats: bool) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """y, weights, and stats where they are worth keeping."""
        return self.y, self.weights, self.stats if save_stats and self.plan.keeps_stats else None


class Backward(_Pass):
    """A backward pass, whose stats are those of the forward pass, or None where it kept none.

    dx: contiguous, None where not needed. need_params: whether gradients of the parameters are needed. lacks_stats:
    whether chunks are streamed and their statistics are still to be found.
    """

    def __init__(
        self, x: Tensor, mask: Tensor | None, grad_y: Tensor | None, grad_weights: Tensor | None, stats: Tensor | None,
        heads: int, axis: int, need_x: bool, need_params: bool, feature_axis: int | None = None,
        tiles: launch.Tiles = launch.BACKWARD,
    ):  # fmt: skip
        self.need_params, self.dx = need_params, _like(x) if need_x else None
        super().__init__(
            tiles, x, mask, heads, axis, feature_axis, stats, grad_y=grad_y, grad_weights=grad_weights, dx=self.dx
        )
        self.lacks_stats = stats is None and self.stats is not None

    def partials(self, call: Call, numbers: int, groups: int, params: int = 1) -> Strided | None:
        """Room for so many sums of every parameter from each group of programs, (numbers, heads, groups, params)."""
        if not self.need_params:
            return None
        t = self.x.new_empty((numbers, call.part.heads, groups, params), dtype=acc_dtype(self.x))
        return Strided(t, t.stride())

    def param_grads(self, *params: Tensor) -> tuple[Tensor | None, ...]:
        """Room for the parameters' gradients, zeros where x is empty and nothing will be written."""
        if not self.need_params:
            return (None,) * len(params)
        if not self.plan.parts:
            return tuple(p.new_zeros(p.shape) for p in params)
        return tuple(map(_like, params))


def _like(t: Tensor) -> Tensor:
    """Room for as much, contiguous."""
    return torch.empty_like(t, memory_format=torch.contiguous_format)
