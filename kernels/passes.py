"""What a forward and a backward pass do on the host, whatever the algorithm: outputs, statistics, sums, and a `Call`
for every part of the axis.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator

import torch
from torch import Tensor

from daam.kernels import launch
from daam.kernels.call import Call
from daam.kernels.layout import Strided, acc_dtype, parts


@functools.lru_cache(maxsize=1024)
def _stats_shape(
    tiles: launch.Tiles, shape: torch.Size, strides: tuple[int, ...], dtype: torch.dtype, axis: int, heads: int,
    feature_axis: int | None,
) -> tuple[int, ...] | None:  # fmt: skip
    """`launch.stats_shape`, kept: it is asked at every call, and takes as long as all other questions."""
    x = torch.empty_strided(shape, strides, dtype=dtype, device="meta")
    return launch.stats_shape(tiles, x, axis, heads, feature_axis)


class _Pass:
    """A pass on x. stats: statistics of its chunks, None where these stay on chip."""

    def __init__(
        self, tiles: launch.Tiles, x: Tensor, mask: Tensor | None, heads: int, axis: int, feature_axis: int | None,
        stats: Tensor | None = None,
    ):  # fmt: skip
        self.tiles, self.x, self.mask, self.heads, self.axis, self.feature_axis = (
            tiles,
            x,
            mask,
            heads,
            axis,
            feature_axis,
        )
        shape = _stats_shape(tiles, x.shape, x.stride(), x.dtype, axis, heads, feature_axis)
        if stats is None and shape is not None:
            stats = x.new_empty(shape, dtype=acc_dtype(x))
        self.stats = stats

    def _calls(self, **tensors: Tensor | None) -> Iterator[Call]:
        """A call for every part of the axis, one or two, on x, mask and tensors; none where x is empty."""
        mask = None if self.mask is None else self.mask.expand(self.x.shape)
        for part in parts(self.x.shape[self.axis], self.heads) if self.x.numel() else ():
            yield Call(self.tiles, part, self.axis, self.feature_axis, self.stats, self.x, mask, **tensors)


class Forward(_Pass):
    """A forward pass. y, weights: contiguous; weights are None where not asked for."""

    def __init__(
        self, x: Tensor, mask: Tensor | None, heads: int, axis: int, return_weights: bool,
        feature_axis: int | None = None, tiles: launch.Tiles = launch.FORWARD,
    ):  # fmt: skip
        super().__init__(tiles, x, mask, heads, axis, feature_axis)
        self.y, self.weights = x.new_empty(x.shape), x.new_empty(x.shape) if return_weights else None

    def calls(self) -> Iterator[Call]:
        """A call for every part of the axis, on x, mask, y and weights."""
        return self._calls(y=self.y, weights=self.weights)

    def outputs(self, save_stats: bool) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """y, weights, and stats where they are worth keeping."""
        keep = save_stats and launch.worth_keeping(self.x, self.axis, self.heads)
        return self.y, self.weights, self.stats if keep else None


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
        super().__init__(tiles, x, mask, heads, axis, feature_axis, stats)
        self.grad_y, self.grad_weights, self.need_params = grad_y, grad_weights, need_params
        self.lacks_stats = stats is None and self.stats is not None
        self.dx = x.new_empty(x.shape) if need_x else None

    def calls(self) -> Iterator[Call]:
        """A call for every part of the axis, on x, mask, grad_y, grad_weights and dx."""
        return self._calls(grad_y=self.grad_y, grad_weights=self.grad_weights, dx=self.dx)

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
        return tuple((p.new_empty if self.x.numel() else p.new_zeros)(p.shape) for p in params)
