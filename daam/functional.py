"""The public functions: check the arguments (`checks.py`), choose the backend, call it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, TypedDict, overload

import torch
from torch import Tensor

from daam import ops, sharded
from daam.backend import Backend, backend_for
from daam.checks import check_eps, check_floating, check_heads, check_mask, check_padding, check_params, check_x
from daam.dtensors import are_dtensors, attend_shards
from daam.pieces import Group, pieces_of

if TYPE_CHECKING:
    from typing_extensions import Unpack


class _All(TypedDict, total=False):
    """Hold what all functions take by name, for type checkers: overloads name return_weights alone."""

    norm_axis: int
    mask: Tensor | None
    residual: bool
    backend: Backend
    group: Group


class _Eps(_All, total=False):
    eps: float


class _Mixture(_Eps, total=False):
    padding_value: float | None


@overload
def density_attention(
    x: Tensor, mean_offset: Tensor, c: Tensor, *, return_weights: Literal[False] = False, **options: Unpack[_Eps]
) -> Tensor: ...
@overload
def density_attention(
    x: Tensor, mean_offset: Tensor, c: Tensor, *, return_weights: Literal[True], **options: Unpack[_Eps]
) -> tuple[Tensor, Tensor]: ...
@overload
def density_attention(
    x: Tensor, mean_offset: Tensor, c: Tensor, *, return_weights: bool, **options: Unpack[_Eps]
) -> Tensor | tuple[Tensor, Tensor]: ...
def density_attention(
    x: Tensor, mean_offset: Tensor, c: Tensor, *, norm_axis: int = 1, eps: float = 1e-5, mask: Tensor | None = None,
    residual: bool = False, return_weights: bool = False, backend: Backend = "auto", group: Group = None,
) -> Tensor | tuple[Tensor, Tensor]:  # fmt: skip
    """Gate every feature by how probable it is under a learnable Gaussian (density attention).

    Heads cut norm_axis into contiguous chunks of equal length. Over each chunk, at a fixed place of all other axes,

        z = (x - mean - mean_offset) / sqrt(var + eps)      weights = exp(-z² / (2c))      y = x·weights

    with the chunk's mean and biased variance (arXiv 2401.11143, Algorithm 1; c is not squared, as in its code).

    Args:
        x: (…, norm_axis, …), rank 2 or more, fp16, bf16, fp32 or fp64, any strides; nothing is copied to change them.
        mean_offset, c: (num_heads, P) in any floating dtype, in units of the chunk's values and of z². P is the size of
            x's last axis, or 1 to share one number; where norm_axis is the last axis, P is its size // num_heads, or 1.
        norm_axis: the axis that is normalised; its size must be divisible by num_heads.
        eps: added to the variance.
        mask: bool, x.shape[:norm_axis + 1], True where x is valid. Statistics run over valid positions; elsewhere
            weights and y are 0 (y is x with residual), and nothing that stands there reaches a result or a gradient.
            Several heads cut the axis with its padding: then chunks depend on the padded length; one head's do not.
        residual: return x·weights + x.
        return_weights: return the weights too; they are differentiable.
        backend: "auto", "triton" or "eager"; see `daam.backend_for`.
        group: processes that x is spread over along norm_axis (context parallel): a ProcessGroup, a DeviceMesh of one
            dimension or `daam.AxisPieces`. x, mask and results are then this process's contiguous piece, which may be
            of any size; heads cut all of the axis, in rank order; results are contiguous. All processes of the group
            make the same calls, forward and backward. What each finds of the parameters' gradients is its part of a
            sum: where DDP or FSDP average over the group, losses are to be multiplied by its size. Differentiates once,
            and is no part of a graph of torch.compile.

    Returns:
        y, or (y, weights), in x's shape, dtype and memory order; computed in fp32, fp64 for fp64 x, under autocast too.

    Raises:
        TypeError: x, mean_offset, c or mask has the wrong type or dtype, is sparse or nested, or x alone is no DTensor.
        ValueError: rank, norm_axis, num_heads, eps, a shape, device or backend is wrong; the message says what came.
        RuntimeError: backend "triton" cannot run here; the message says why.
    """
    if are_dtensors(x, mean_offset, c, mask):
        params = {"mean_offset": mean_offset, "c": c}
        return attend_shards(
            density_attention, x, params, mask, norm_axis, True, group, eps=eps, residual=residual,
            return_weights=return_weights, backend=backend,
        )  # fmt: skip
    axis = check_x(x, norm_axis)
    last_axis = x.dim() - 1
    params = {"mean_offset": mean_offset, "c": c}
    check_floating(params)
    check_params(x, params, "P")
    check_eps(eps)
    axes = (axis, None if c.shape[1] == 1 else last_axis)
    check = partial(_check_density, x.shape, c.shape, axis)
    return _attend("density", x, (mean_offset, c), mask, axes, (eps,), residual, return_weights, backend, group, check)


@overload
def mixture_attention(
    x: Tensor, mean_offsets: Tensor, c: Tensor, *, return_weights: Literal[False] = False, **options: Unpack[_Mixture]
) -> Tensor: ...
@overload
def mixture_attention(
    x: Tensor, mean_offsets: Tensor, c: Tensor, *, return_weights: Literal[True], **options: Unpack[_Mixture]
) -> tuple[Tensor, Tensor]: ...
@overload
def mixture_attention(
    x: Tensor, mean_offsets: Tensor, c: Tensor, *, return_weights: bool, **options: Unpack[_Mixture]
) -> Tensor | tuple[Tensor, Tensor]: ...
def mixture_attention(
    x: Tensor, mean_offsets: Tensor, c: Tensor, *, norm_axis: int = 1, eps: float = 1e-8,
    padding_value: float | None = None, mask: Tensor | None = None, residual: bool = False,
    return_weights: bool = False, backend: Backend = "auto", group: Group = None,
) -> Tensor | tuple[Tensor, Tensor]:  # fmt: skip
    """Share one unit of weight among the positions of a chunk, by a product of Gaussians (mixture of densities).

    Heads cut norm_axis into contiguous chunks of size // num_heads positions, the last one takes the remainder. Over
    each chunk, at a fixed place of all other axes, with its mean and unbiased variance,

        z_k = (x - mean - mean_offset_k) / sqrt(var + eps)      g_k = exp(-z_k² / (2c_k²)) / sqrt(2π·c_k²)
        weights = Π_k g_k / max(Σ_chunk Π_k g_k, eps)           y = x·weights

    (arXiv 2401.11143, Algorithm 2, as the package gaussian-adaptive-attention 0.1.5 computes it). The product is one
    Gaussian, so that time and memory do not depend on the number of Gaussians.

    Results differ from that package's where its product, computed in x's dtype, under- or overflows to weights of 0,
    inf or NaN, while log space gives what the formula says; and in half precision, since arithmetic here is fp32.

    Args:
        x: (…, norm_axis, …), rank 2 or more, fp16, bf16, fp32 or fp64, any strides; nothing is copied to change them.
        mean_offsets, c: (num_heads, num_gaussians) in any floating dtype, in units of the chunk's values and of z. The
            sign of c means nothing; a c of 0 gives NaN.
        norm_axis: the axis that is normalised, at least two positions for every head.
        eps: added to the variance, and the least sum that weights are divided by.
        padding_value: positions equal to it (rounded to x's dtype) count as zeros in mean and variance, stay in the sum
            of the weights, and pass x through: y = x there. This reproduces the package; mask leaves padding out.
        mask: bool, x.shape[:norm_axis + 1], True where x is valid. Statistics and sums run over valid positions;
            elsewhere weights and y are 0 (y is x with residual), and nothing that stands there reaches a result or a
            gradient. The variance of one valid position is 0. Several heads cut the axis with its padding.
        residual: return x·weights + x.
        return_weights: return the weights too; they are differentiable.
        backend: "auto", "triton" or "eager"; see `daam.backend_for`.
        group: processes that x is spread over along norm_axis (context parallel): a ProcessGroup, a DeviceMesh of one
            dimension or `daam.AxisPieces`. x, mask and results are then this process's contiguous piece, which may be
            of any size; heads cut all of the axis, in rank order; results are contiguous. All processes of the group
            make the same calls, forward and backward. What each finds of the parameters' gradients is its part of a
            sum: where DDP or FSDP average over the group, losses are to be multiplied by its size. Differentiates once,
            and is no part of a graph of torch.compile.

    Returns:
        y, or (y, weights), in x's shape, dtype and memory order; computed in fp32, fp64 for fp64 x, under autocast too.

    Raises:
        TypeError: an argument has the wrong type or dtype, is sparse or nested, or x alone is no DTensor.
        ValueError: rank, norm_axis, num_heads, eps, padding_value, a shape, a device or the backend does not fit, or
            both mask and padding_value are given; the message says what came.
        RuntimeError: backend "triton" cannot run here; the message says why.
    """
    if are_dtensors(x, mean_offsets, c, mask):
        params = {"mean_offsets": mean_offsets, "c": c}
        return attend_shards(
            mixture_attention, x, params, mask, norm_axis, False, group, eps=eps, padding_value=padding_value,
            residual=residual, return_weights=return_weights, backend=backend,
        )  # fmt: skip
    return _attend_by_product(
        "mixture", x, mean_offsets, c, norm_axis, eps, padding_value, mask, residual, return_weights, backend, group
    )


@overload
def stable_mixture_attention(
    x: Tensor, mean_offsets: Tensor, c: Tensor, *, return_weights: Literal[False] = False, **options: Unpack[_Mixture]
) -> Tensor: ...
@overload
def stable_mixture_attention(
    x: Tensor, mean_offsets: Tensor, c: Tensor, *, return_weights: Literal[True], **options: Unpack[_Mixture]
) -> tuple[Tensor, Tensor]: ...
@overload
def stable_mixture_attention(
    x: Tensor, mean_offsets: Tensor, c: Tensor, *, return_weights: bool, **options: Unpack[_Mixture]
) -> Tensor | tuple[Tensor, Tensor]: ...
def stable_mixture_attention(
    x: Tensor, mean_offsets: Tensor, c: Tensor, *, norm_axis: int = 2, eps: float = 1e-8,
    padding_value: float | None = None, mask: Tensor | None = None, residual: bool = False,
    return_weights: bool = False, backend: Backend = "auto", group: Group = None,
) -> Tensor | tuple[Tensor, Tensor]:  # fmt: skip
    """Share one unit of weight among the positions of a chunk, by a product of Gaussians whose tails are flat.

    Heads cut norm_axis into contiguous chunks of size // num_heads positions, the last one takes the remainder. Over
    each chunk, at a fixed place of all other axes, with its mean and unbiased variance,

        u_k = clamp((x - mean - mean_offset_k) / sqrt(var + eps), -10, 10)      c2_k = clamp(c_k, 0.01, 10)² + eps
        log w = Σ_k -u_k² / (2·c2_k) - log(2π·c2_k) / 2
        weights = softmax(log w) over the chunk                                 y = x·weights

    (arXiv 2602.09040, the stabilised dialect of `mixture_attention`). A chunk whose log w is NaN, since x or a
    parameter is, has equal weights. Gradients of what is clamped are 0. Where no u_k of a chunk reaches 10, as none can
    of short chunks with small offsets, time does not depend on the number of Gaussians.

    Results differ from the authors' code in half precision, since arithmetic here is fp32 and weights are not rounded
    to x's dtype before they multiply x: y is rounded once.

    Args:
        x: (…, norm_axis, …), rank 2 or more, fp16, bf16, fp32 or fp64, any strides; nothing is copied to change them.
        mean_offsets, c: (num_heads, num_gaussians) in any floating dtype, in units of the chunk's values and of u. A c
            below 0.01, a negative one too, counts as 0.01.
        norm_axis: the axis that is normalised, at least two positions for every head.
        eps: added to the variance, and to the square of c.
        padding_value: positions equal to it (rounded to x's dtype) have no weight and pass x through, y = x there, but
            count in mean and variance; a chunk of nothing else has equal weights. mask leaves padding out of both.
        mask: bool, x.shape[:norm_axis + 1], True where x is valid. Statistics and sums run over valid positions;
            elsewhere weights and y are 0 (y is x with residual), and nothing that stands there reaches a result or a
            gradient. The variance of one valid position is 0. Several heads cut the axis with its padding.
        residual: return x·weights + x.
        return_weights: return the weights too; they are differentiable.
        backend: "auto", "triton" or "eager"; see `daam.backend_for`.
        group: processes that x is spread over along norm_axis (context parallel): a ProcessGroup, a DeviceMesh of one
            dimension or `daam.AxisPieces`. x, mask and results are then this process's contiguous piece, which may be
            of any size; heads cut all of the axis, in rank order; results are contiguous. All processes of the group
            make the same calls, forward and backward. What each finds of the parameters' gradients is its part of a
            sum: where DDP or FSDP average over the group, losses are to be multiplied by its size. Differentiates once,
            and is no part of a graph of torch.compile.

    Returns:
        y, or (y, weights), in x's shape, dtype and memory order; computed in fp32, fp64 for fp64 x, under autocast too.

    Raises:
        TypeError: an argument has the wrong type or dtype, is sparse or nested, or x alone is no DTensor.
        ValueError: rank, norm_axis, num_heads, eps, padding_value, a shape, a device or the backend does not fit, or
            both mask and padding_value are given; the message says what came.
        RuntimeError: backend "triton" cannot run here; the message says why.
    """
    if are_dtensors(x, mean_offsets, c, mask):
        params = {"mean_offsets": mean_offsets, "c": c}
        return attend_shards(
            stable_mixture_attention, x, params, mask, norm_axis, False, group, eps=eps, padding_value=padding_value,
            residual=residual, return_weights=return_weights, backend=backend,
        )  # fmt: skip
    return _attend_by_product(
        "stable", x, mean_offsets, c, norm_axis, eps, padding_value, mask, residual, return_weights, backend, group
    )


@overload
def density_gate(
    x: Tensor, mean_offsets: Tensor, log_sigma: Tensor, *, return_weights: Literal[False] = ..., **options: Unpack[_All]
) -> Tensor: ...
@overload
def density_gate(
    x: Tensor, mean_offsets: Tensor, log_sigma: Tensor, *, return_weights: Literal[True], **options: Unpack[_All]
) -> tuple[Tensor, Tensor]: ...
@overload
def density_gate(
    x: Tensor, mean_offsets: Tensor, log_sigma: Tensor, *, return_weights: bool, **options: Unpack[_All]
) -> Tensor | tuple[Tensor, Tensor]: ...
def density_gate(
    x: Tensor, mean_offsets: Tensor, log_sigma: Tensor, *, norm_axis: int = -1, mask: Tensor | None = None,
    residual: bool = False, return_weights: bool = False, backend: Backend = "auto", group: Group = None,
) -> Tensor | tuple[Tensor, Tensor]:  # fmt: skip
    """Gate every value by its density under a mixture of Gaussians (density gate).

    Heads cut norm_axis into contiguous chunks of size // num_heads positions, the last one takes the remainder. Over
    each chunk, at a fixed place of all other axes, with its mean and biased variance,

        sigma_k = softplus(log_sigma_k) + 1e-3          std = sqrt(max(var, 1e-6))
        z_k = (x - mean - mean_offset_k) / (std·sigma_k + 1e-8)
        weights = mean_k exp(-z_k² / 2) / (sqrt(2π)·sigma_k)          y = x·weights

    (the JEPA tokenizer, arXiv 2512.07168). Below the floor of the variance its gradient is 0.

    Args:
        x: (…, norm_axis, …), rank 2 or more, fp16, bf16, fp32 or fp64, any strides; nothing is copied to change them.
        mean_offsets, log_sigma: (num_heads, num_gaussians), or (num_gaussians,) for one head, in any floating dtype;
            mean_offsets in units of x.
        norm_axis: the axis that is normalised.
        mask: bool, x.shape[:norm_axis + 1], True where x is valid. Statistics run over valid positions; elsewhere
            weights and y are 0 (y is x with residual), and nothing that stands there reaches a result or a gradient.
            Several heads cut the axis with its padding.
        residual: return x·weights + x.
        return_weights: return the weights too; they are differentiable.
        backend: "auto", "triton" or "eager"; see `daam.backend_for`.
        group: processes that x is spread over along norm_axis (context parallel): a ProcessGroup, a DeviceMesh of one
            dimension or `daam.AxisPieces`. x, mask and results are then this process's contiguous piece, which may be
            of any size; heads cut all of the axis, in rank order; results are contiguous. All processes of the group
            make the same calls, forward and backward. What each finds of the parameters' gradients is its part of a
            sum: where DDP or FSDP average over the group, losses are to be multiplied by its size. Differentiates once,
            and is no part of a graph of torch.compile.

    Returns:
        y, or (y, weights), in x's shape, dtype and memory order; computed in fp32, fp64 for fp64 x, under autocast too.

    Raises:
        TypeError: an argument has the wrong type or dtype, is sparse or nested, or x alone is no DTensor.
        ValueError: rank, norm_axis, num_heads, a shape, device or backend is wrong; the message says what came.
        RuntimeError: backend "triton" cannot run here; the message says why.
    """
    params = {"mean_offsets": mean_offsets, "log_sigma": log_sigma}
    if are_dtensors(x, mean_offsets, log_sigma, mask):
        return attend_shards(
            density_gate, x, params, mask, norm_axis, False, group, residual=residual, return_weights=return_weights,
            backend=backend,
        )  # fmt: skip
    axis = check_x(x, norm_axis)
    check_floating(params)
    if all(p.dim() == 1 for p in params.values()):
        params = {name: p.unsqueeze(0) for name, p in params.items()}
    check_params(x, params, "num_gaussians")
    check = partial(check_heads, len(params["log_sigma"]), axis)
    return _attend(
        "gate", x, tuple(params.values()), mask, (axis,), (), residual, return_weights, backend, group, check
    )


def _attend_by_product(
    algorithm: str, x: Tensor, mean_offsets: Tensor, c: Tensor, norm_axis: int, eps: float, padding_value: float | None,
    mask: Tensor | None, residual: bool, return_weights: bool, backend: str, group: Group,
) -> Tensor | tuple[Tensor, Tensor]:  # fmt: skip
    """Check what both mixtures take, and call one."""
    axis = check_x(x, norm_axis)
    params = {"mean_offsets": mean_offsets, "c": c}
    check_floating(params)
    check_params(x, params, "num_gaussians")
    settings = (eps, check_settings(eps, padding_value, mask))
    check = partial(check_heads, len(c), axis, unbiased=True)
    return _attend(
        algorithm, x, (mean_offsets, c), mask, (axis,), settings, residual, return_weights, backend, group, check
    )


def _check_density(x_shape: torch.Size, shape: torch.Size, axis: int, size: int) -> None:
    """Check that parameters of a shape are those of heads that divide norm_axis, of so many positions."""
    (heads, n_params), last_axis = shape, len(x_shape) - 1
    check_heads(heads, axis, size)
    if size % heads:
        raise ValueError(f"num_heads is {heads}, expected a divisor of the {size} positions of norm_axis {axis}")
    features = size // heads if axis == last_axis else x_shape[last_axis]
    if n_params != 1 and n_params != features:  # `in` finds no symbol of Dynamo's
        expected = f"({heads}, {features}) or ({heads}, 1)"
        reason = f", since norm_axis {axis} is the last axis, which heads cut" if axis == last_axis else ""
        raise ValueError(
            f"mean_offset and c have shape {tuple(shape)}, expected {expected}{reason}: x is {tuple(x_shape)}"
        )


def check_settings(eps: float, padding_value: float | None, mask: Tensor | None) -> float | None:
    """Check what both mixtures take beside parameters, and return the padding value as a float."""
    check_eps(eps)
    if padding_value is None:
        return None
    padding_value = check_padding(padding_value)
    if mask is not None:
        raise ValueError("mask and padding_value are both given, expected one of them")
    return padding_value


def _attend(
    algorithm: str, x: Tensor, params: tuple[Tensor, ...], mask: Tensor | None, axes: tuple[int | None, ...],
    settings: tuple[Any, ...], residual: bool, return_weights: bool, backend: str, group: Group,
    check: Callable[[int], None],
) -> Tensor | tuple[Tensor, Tensor]:  # fmt: skip
    """Call an algorithm on x; axes: the normalised one, and those among the settings. check: raises where an axis of
    so many positions does not fit the parameters.
    """
    backend = backend_for(x, backend)[0]
    if group is None:
        check(x.shape[axes[0]])
        options = (*settings, residual, return_weights, backend)

        def attend(x: Tensor, mask: Tensor | None, axes: tuple[int | None, ...]) -> tuple[Tensor, ...]:
            return ops.OPERATORS[algorithm](x, *params, mask, *axes, *options)

        outputs = in_memory_order(attend, x, mask, axes)
    else:
        mask, settings = broadcast_mask(x, mask, axes[0]), (*axes[1:], *settings)
        outputs = sharded.attend(
            algorithm, x, params, mask, axes[0], settings, residual, return_weights, backend, pieces_of(group), check
        )
    return tuple(outputs) if return_weights else outputs[0]


def broadcast_mask(x: Tensor, mask: Tensor | None, axis: int) -> Tensor | None:
    """Return a mask of x's shape up to an axis as one that broadcasts against x, after a check."""
    if mask is None:
        return None
    check_mask(x, mask, axis)
    return mask.reshape(*mask.shape, *[1] * (x.dim() - mask.dim()))


def in_memory_order(
    attend: Callable[..., Sequence[Tensor]], x: Tensor, mask: Tensor | None, axes: tuple[int | None, ...]
) -> Sequence[Tensor]:
    """Return attend(x, mask, axes), called with dimensions in memory order, views, in x's order again.

    Operators then only ever allocate contiguous outputs, and a channels-last x has channels-last outputs and gradient.
    mask: of x's shape up to the first of the axes; it is checked, and comes as one that broadcasts against x.
    """
    mask = broadcast_mask(x, mask, axes[0])
    if x.is_contiguous() or 0 in x.stride():  # the order of expanded dimensions means nothing
        return attend(x, mask, axes)
    order = sorted(range(x.dim()), key=x.stride, reverse=True)
    mask = None if mask is None else mask.permute(order)
    axes = tuple(None if axis is None else order.index(axis) for axis in axes)
    inverse = [order.index(d) for d in range(x.dim())]
    return [t.permute(inverse) for t in attend(x.permute(order), mask, axes)]
