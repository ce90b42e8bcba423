"""Layers of a mixture of densities on one axis, one after the other: as one call, and which way that goes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Literal, overload

import torch
from torch import Tensor

from daam.backend import Backend, backend_for
from daam.block_ops import BLOCKS
from daam.checks import check_floating, check_heads, check_params, check_recompute, check_tensor, check_x
from daam.dtensors import are_dtensors
from daam.functional import _Mixture, check_settings, in_memory_order, mixture_attention, stable_mixture_attention
from daam.ops import _forward_mode, _transformed
from daam.pieces import Group
from daam.ways import Plan, differentiates, is_plain, is_plain_parameter, plan_layers

if TYPE_CHECKING:
    from typing_extensions import Unpack


class _Block(_Mixture, total=False):
    stable: bool
    recompute: bool | None


@overload
def density_block(
    x: Tensor, mean_offsets: Sequence[Tensor], c: Sequence[Tensor], *, return_weights: Literal[False] = ...,
    **options: Unpack[_Block],
) -> Tensor: ...  # fmt: skip
@overload
def density_block(
    x: Tensor, mean_offsets: Sequence[Tensor], c: Sequence[Tensor], *, return_weights: Literal[True],
    **options: Unpack[_Block],
) -> tuple[Tensor, tuple[Tensor, ...]]: ...  # fmt: skip
@overload
def density_block(
    x: Tensor, mean_offsets: Sequence[Tensor], c: Sequence[Tensor], *, return_weights: bool,
    **options: Unpack[_Block],
) -> Tensor | tuple[Tensor, tuple[Tensor, ...]]: ...  # fmt: skip
def density_block(
    x: Tensor, mean_offsets: Sequence[Tensor], c: Sequence[Tensor], *, norm_axis: int = 1, eps: float = 1e-8,
    padding_value: float | None = None, mask: Tensor | None = None, residual: bool = True, stable: bool = False,
    recompute: bool | None = None, return_weights: bool = False, backend: Backend = "auto", group: Group = None,
) -> Tensor | tuple[Tensor, tuple[Tensor, ...]]:  # fmt: skip
    """Weigh x by layers of mixtures of densities that share their axis and their heads, one after the other.

    A layer is `daam.mixture_attention`, or with stable `daam.stable_mixture_attention`, of its own Gaussians:
    x = layer(x) + x each, or x = layer(x) without residual. Where chunks stay on chip, up to four layers are one launch
    forward and two backward on Triton: x is read once and y written once, values of layers are kept in fp32, or x's
    fp64, and the backward pass, which finds them anew, saves x alone. More layers are runs of as many.

    Args:
        x: (…, norm_axis, …), rank 2 or more, fp16, bf16, fp32 or fp64, any strides; nothing is copied to change them.
        mean_offsets, c: one of each a layer, (num_heads, num_gaussians) in any floating dtype; layers have the same
            heads, and Gaussians as many as they like.
        norm_axis, eps, padding_value, mask: of all layers, as one layer has them. Padding that is not 0 doubles in
            every layer with residual, as published, and is padding no more.
        residual: add its x to what each layer makes.
        stable: whether layers are of the stabilised dialect.
        recompute: save x alone for the backward pass, and find the values of layers anew, whatever that costs; None:
            where that is expected to be faster (`fusion_for` says); False: never.
        return_weights: return the weights of each layer too; they are differentiable.
        backend: "auto", "triton" or "eager"; see `daam.backend_for`.
        group: processes that x is spread over along norm_axis, as one layer has them; layers then go one by one, as
            they do of DTensors.

    Returns:
        y, or (y, weights), the latter one a layer, in x's shape, dtype and memory order.

    Raises:
        TypeError: an argument has the wrong type or dtype, or mean_offsets or c is no sequence of tensors.
        ValueError: there is no layer, lengths differ, or layers differ in heads; and what a layer raises.
        RuntimeError: backend "triton" cannot run here; the message says why.
    """
    axis = check_x(x, norm_axis)
    settings = (eps, check_settings(eps, padding_value, mask))
    if group is not None or are_dtensors(x):
        layer = partial(
            stable_mixture_attention if stable else mixture_attention, norm_axis=axis, eps=eps,
            padding_value=padding_value, mask=mask, residual=residual, backend=backend, group=group,
        )  # fmt: skip
        return _attend_one_by_one(layer, x, mean_offsets, c, recompute, return_weights)
    backend, algorithm = backend_for(x, backend)[0], "stable" if stable else "mixture"
    plan = _plan(x, mean_offsets, c, axis, mask, recompute, backend)

    def attend(x: Tensor, mask: Tensor | None, axes: tuple[int, ...]) -> list[Tensor]:
        how = (*axes, *settings, residual)
        return BLOCKS[algorithm](x, mean_offsets, c, mask, how, recompute, return_weights, backend, plan)

    y, *weights = in_memory_order(attend, x, mask, (axis,))
    return (y, tuple(weights)) if return_weights else y


def _attend_one_by_one(
    layer: Callable, x: Tensor, mean_offsets: Sequence[Tensor], c: Sequence[Tensor], recompute: bool | None,
    return_weights: bool,
) -> Tensor | tuple[Tensor, tuple[Tensor, ...]]:  # fmt: skip
    """Return what `density_block` does, each layer by the function of one."""
    _check_sequences(mean_offsets, c, recompute)
    weights = []
    for p, q in zip(mean_offsets, c, strict=True):
        x = layer(x, p, q, return_weights=return_weights)
        if return_weights:
            x, found = x
            weights.append(found)
    return (x, tuple(weights)) if return_weights else x


def fusion_for(
    x: Tensor, mean_offsets: Sequence[Tensor], c: Sequence[Tensor], *, norm_axis: int = 1, mask: Tensor | None = None,
    recompute: bool | None = None, backend: Backend = "auto", group: Group = None,
) -> tuple[str, str]:  # fmt: skip
    """Return which way `density_block` goes with these arguments, and the reason.

    Args: those of `density_block`; of the tensors shape, strides, dtype, device and requires_grad matter, and
        whether gradients are recorded now.

    Returns:
        ("fused", "recomputed" or "layers", reason): all layers of a run in one launch a pass; one by one, with x alone
        saved; or one by one, each as its function would run. The reason is in words.

    Raises:
        TypeError, ValueError, RuntimeError: as `density_block` does.
    """
    axis, backend = check_x(x, norm_axis), backend_for(x, backend)[0]
    if group is not None or are_dtensors(x):
        _check_sequences(mean_offsets, c, recompute)
        return "layers", "norm_axis, or a DTensor, is spread over processes"
    plan = _plan(x, mean_offsets, c, axis, mask, recompute, backend)
    if plan is None:
        raise RuntimeError("fusion_for is called while compiling, where layers are not planned yet")
    return plan.way.name, plan.way.reason


_plans: dict[tuple, Plan] = {}  # of plain tensors: to check them anew takes as long as a layer
MOST_PLANS = 1024


def _plan(
    x: Tensor, mean_offsets: Sequence[Tensor], c: Sequence[Tensor], axis: int, mask: Tensor | None,
    recompute: bool | None, backend: str,
) -> Plan | None:  # fmt: skip
    """Return the plan of layers, None while compiling; raise TypeError or ValueError where they do not fit."""
    if mask is not None:
        check_tensor("mask", mask)
    _check_sequences(mean_offsets, c, recompute)
    if torch.compiler.is_compiling():  # the operator, which the compiler does not look into, plans
        _check_layers(x, mean_offsets, c, axis)
        return None
    if _transformed() or _forward_mode():
        return _plan_anew(x, mean_offsets, c, axis, mask is not None, recompute, backend)
    params, masked = (*mean_offsets, *c), mask is not None
    plain = type(x) is Tensor and is_plain(x) and all(map(is_plain_parameter, params))
    if not plain or (masked and not is_plain(mask)):
        return _plan_anew(x, mean_offsets, c, axis, masked, recompute, backend)
    how = (len(c), axis, masked, recompute, backend, differentiates(x, params))
    key = (x.shape, x.stride(), x.dtype, x.device, *how, *[(t.shape, t.dtype, t.device) for t in params])
    found = _plans.get(key)
    if found is None:
        found = _plan_anew(x, mean_offsets, c, axis, masked, recompute, backend)
        found = found._replace(plain=backend == "triton" and not x.is_meta)
        if len(_plans) >= MOST_PLANS:
            _plans.clear()
        _plans[key] = found
    return found


def _check_sequences(mean_offsets: Sequence[Tensor], c: Sequence[Tensor], recompute: bool | None) -> None:
    """Raise TypeError or ValueError where parameters are no sequences of as many layers, or recompute is no choice."""
    check_recompute(recompute)
    for name, given in (("mean_offsets", mean_offsets), ("c", c)):
        if not isinstance(given, (list, tuple)):
            raise TypeError(f"{name} is a {type(given).__name__}, expected a list of tensors, one a layer")
    if not c or len(mean_offsets) != len(c):
        raise ValueError(f"mean_offsets has {len(mean_offsets)} layers and c has {len(c)}, expected as many, 1 or more")


def _plan_anew(
    x: Tensor, mean_offsets: Sequence[Tensor], c: Sequence[Tensor], axis: int, masked: bool, recompute: bool | None,
    backend: str,
) -> Plan:  # fmt: skip
    """Return what `_plan` does."""
    heads = _check_layers(x, mean_offsets, c, axis)
    return plan_layers(x, (*mean_offsets, *c), axis, heads, masked, recompute, backend)


def _check_layers(x: Tensor, mean_offsets: Sequence[Tensor], c: Sequence[Tensor], axis: int) -> int:
    """Return the heads of all layers; raise TypeError or ValueError where layers do not fit x or each other."""
    for layer, (p, q) in enumerate(zip(mean_offsets, c, strict=True)):
        params = {f"mean_offsets[{layer}]": p, f"c[{layer}]": q}
        check_floating(params)
        check_params(x, params, "num_gaussians")
        check_heads(len(q), axis, x.shape[axis], unbiased=True)
        if q.shape[0] != c[0].shape[0]:
            raise ValueError(f"c[{layer}] has {q.shape[0]} heads, expected {c[0].shape[0]}, as c[0] has")
    return c[0].shape[0]
