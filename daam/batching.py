"""What vmap does with operators: one call for all samples, or two where they are heads and heads are uneven.

Samples that share their parameters are an outer dimension of x. Samples with parameters of their own, or with gradients
of them, are heads: those of a sample stand behind those of the sample before, along the normalised axis. That takes
heads of equal length: a last head with a remainder goes by itself.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from daam.reference.chunks import parts


class Operand(NamedTuple):
    """Hold a tensor and its dimension of samples, None where they share it."""

    tensor: Tensor | None
    dim: int | None

    def lead(self, n_samples: int) -> Tensor | None:
        """Return the tensor of all samples, along dimension 0, without memory for those that share it."""
        if self.tensor is None:
            return None
        return (
            self.tensor.expand(n_samples, *self.tensor.shape) if self.dim is None else self.tensor.movedim(self.dim, 0)
        )


Axes = tuple[int, int | None]  # the normalised one, and the one that parameters follow
Results = tuple[Sequence[Tensor], Sequence[Tensor]]  # like x, and like parameters
Call = Callable[[list, list, Any, Axes], Results]


def pair(tensors: Sequence[Tensor | None], dims: Sequence[int | None]) -> list[Operand]:
    """Return tensors with their dimensions of samples, as vmap rules are given them."""
    return [Operand(*both) for both in zip(tensors, dims, strict=True)]


def run_samples(
    call: Call, n_samples: int, like_x: Sequence[Operand], params: Sequence[Operand], mask: Operand, axes: Axes,
    as_heads: bool = False,
) -> Results:  # fmt: skip
    """Return what call(like_x, params, mask, axes) returns, of all samples, along dimension 0.

    Args:
        call: takes x and others of its shape, or None, parameters (heads, P), and a mask, or None, that broadcasts
            against x; returns tensors of x's shape, and of the parameters'.
        n_samples: how many there are.
        like_x, params, mask: the same, of which any may have a dimension of samples; x does so or is shared.
        axes: of one sample.
        as_heads: samples are heads whatever has samples, as they must be where results are like parameters.
    """
    if as_heads or any(p.dim is not None for p in params):
        return _run_as_heads(call, n_samples, like_x, params, mask, axes)
    masks = mask.tensor if mask.tensor is None or mask.dim is not None else mask.tensor.unsqueeze(0)
    masks = masks if mask.dim is None else masks.movedim(mask.dim, 0)
    axis, feature_axis = axes
    axes = axis + 1, None if feature_axis is None else feature_axis + 1
    return call([one.lead(n_samples) for one in like_x], [p.tensor for p in params], masks, axes)


def _run_as_heads(
    call: Call, n_samples: int, like_x: Sequence[Operand], params: Sequence[Operand], mask: Operand, axes: Axes
) -> Results:
    """Return what `run_samples` does, of samples that are heads."""
    axis, _feature_axis = axes
    like_x, params = ([one.lead(n_samples) for one in operands] for operands in (like_x, params))
    masks, outputs, gradients = mask.lead(n_samples), [], []
    for part in parts(like_x[0].shape[axis + 1], params[0].shape[1]):

        def fold(t: Tensor | None, part=part) -> Tensor | None:
            return None if t is None else part.positions_of(t, axis + 1).movedim(0, axis).flatten(axis, axis + 1)

        folded = [fold(t) for t in like_x], [part.heads_of(p, 1).flatten(0, 1) for p in params]
        found = call(*folded, fold(masks), axes)
        outputs.append([t.unflatten(axis, (n_samples, part.length)).movedim(axis, 0) for t in found[0]])
        gradients.append([t.unflatten(0, (n_samples, part.heads)) for t in found[1]])
    return _join(outputs, axis + 1), _join(gradients, 1)


def _join(pieces: list[list[Tensor]], dim: int) -> list[Tensor]:
    """Return tensors joined of their pieces, which are one list each part of the heads."""
    return pieces[0] if len(pieces) == 1 else [torch.cat(ts, dim) for ts in zip(*pieces, strict=True)]
