"""Say what arguments must be. Every error names the argument, what came and what was expected."""

from __future__ import annotations

import numbers
from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import Parameter, is_lazy

_FLOATING = frozenset({torch.float16, torch.bfloat16, torch.float32, torch.float64})


def check_x(x: Any, norm_axis: int) -> int:
    """Return norm_axis counted from the front; raise TypeError or ValueError where it, or x, does not fit."""
    check_floating({"x": x})
    rank = x.dim()
    if rank < 2:
        raise ValueError(f"x has rank {rank} (shape {tuple(x.shape)}), expected rank 2 or more")
    if isinstance(norm_axis, bool) or not isinstance(norm_axis, int):
        raise TypeError(f"norm_axis is {norm_axis!r}, expected an int")
    if not -rank <= norm_axis < rank:
        raise ValueError(f"norm_axis is {norm_axis}, expected {-rank} to {rank - 1} for x of shape {tuple(x.shape)}")
    return norm_axis % rank


def check_floating(tensors: dict[str, Any]) -> None:
    """Raise TypeError where one of the tensors, by name, is no dense tensor of a floating dtype."""
    for name, t in tensors.items():
        check_tensor(name, t)
        if t.dtype not in _FLOATING:
            raise TypeError(f"{name} has dtype {t.dtype}, expected one of float16, bfloat16, float32, float64")


def check_tensor(name: str, t: Any) -> None:
    """Raise TypeError where t is no dense tensor of this process."""
    # checked first: sparse, nested and lazy tensors have no sizes or strides to be asked for
    if not isinstance(t, Tensor):
        raise TypeError(f"{name} is a {type(t).__name__}, expected a Tensor")
    if t.layout is not torch.strided or t.is_nested:  # nested ones may be strided
        kind, remedy = str(t.layout).removeprefix("torch.").removeprefix("_"), "convert it with .to_dense()"
        if t.is_nested:
            kind = f"nested ({kind})"
            remedy = "pad it with torch.nested.to_padded_tensor, and say with a mask what is valid"
        raise TypeError(f"{name} is a {kind} tensor, expected a dense one, of layout torch.strided: {remedy}")
    if type(t) not in (Tensor, Parameter):
        _check_subclass(name, t)


def _check_subclass(name: str, t: Tensor) -> None:
    """Raise TypeError for subclasses that cannot work. Others may: fake tensors do, and tensors in a tracer."""
    if not hasattr(t, "device_mesh") and is_lazy(t):  # of a DTensor compilers cannot ask it
        raise TypeError(f"{name} is uninitialized, expected a Tensor with sizes: run its lazy module once before")
    if type(t).__name__ == "MaskedTensor":
        raise TypeError(f"{name} is a MaskedTensor, expected a plain Tensor: pass its get_data(), and a mask beside it")


def has_hooks(module: nn.Module) -> bool:
    """Tell whether a module has hooks of its own, which must see it called."""
    return bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )


def lacks_memory(error: BaseException) -> bool:
    """Tell whether an exception says that memory is used up, on the host or on a device."""
    # torch.OutOfMemoryError is a RuntimeError; the CPU's allocator raises a plain one
    words = ("out of memory", "can't allocate memory", "not enough memory")
    return isinstance(error, MemoryError) or any(word in str(error).lower() for word in words)


def has_autocast(device: str) -> bool:
    """Tell whether autocast is on for a type of device."""
    # meta has none; is_autocast_available would say so, and Dynamo of torch 2.11 cannot call it
    return device != "meta" and torch.is_autocast_enabled(device)


def check_dtype(x: Tensor, weight: Tensor, layer: str) -> None:
    """Raise TypeError where x has another dtype than a convolution's weight, which autocast alone makes one."""
    if x.dtype == weight.dtype:
        return
    check_floating({"x": x})
    castable = torch.float64 not in (x.dtype, weight.dtype)
    if not (castable and has_autocast(x.device.type)):
        raise TypeError(
            f"x has dtype {x.dtype}, expected {weight.dtype}, the dtype of {layer}'s weight: cast x or the module, "
            f"x.to({weight.dtype}) or module.to({x.dtype})" + (", or call it under torch.autocast" if castable else "")
        )


def check_params(x: Tensor, params: dict[str, Tensor], columns: str) -> None:
    """Check that floating parameters are (num_heads, columns), alike, on x's device."""
    reference, shape = next(iter(params)), next(iter(params.values())).shape
    for name, p in params.items():
        if p.dim() != 2 or p.shape[0] < 1:
            raise ValueError(
                f"{name} has shape {tuple(p.shape)}, expected (num_heads, {columns}) with num_heads at least 1"
            )
        if p.shape[1] < 1 and columns == "num_gaussians":
            raise ValueError(f"{name} has shape {tuple(p.shape)}, expected num_gaussians at least 1")
        if p.shape != shape:
            raise ValueError(f"{name} has shape {tuple(p.shape)}, expected {tuple(shape)}, the shape of {reference}")
        if p.device != x.device:
            raise ValueError(f"{name} is on {p.device}, expected x's device {x.device}")


def check_heads(heads: int, axis: int, size: int, unbiased: bool = False) -> None:
    """Check that each head has a position of norm_axis, two where the variance is unbiased."""
    if heads > size:
        raise ValueError(f"num_heads is {heads}, more heads than the {size} positions of norm_axis {axis}")
    if unbiased and size // heads < 2:
        raise ValueError(
            f"num_heads is {heads}, which cuts the {size} positions of norm_axis {axis} into chunks of one element: "
            "expected two or more, since the variance is unbiased"
        )


def check_choice(name: str, value: str, choices: Collection[str]) -> None:
    if value not in choices:
        raise ValueError(f"{name} is {value!r}, expected one of {', '.join(map(repr, choices))}")


def check_recompute(recompute: Any) -> None:
    if not any(recompute is choice for choice in (None, True, False)):
        raise TypeError(f"recompute is {recompute!r}, expected True, False or None")


def check_positive(**sizes: int) -> None:
    for name, size in sizes.items():
        if isinstance(size, bool) or not isinstance(size, int) or size < 1:
            raise ValueError(f"{name} is {size!r}, expected a positive int")


def check_eps(eps: Any) -> None:
    if not isinstance(eps, (float, int)) or not 0 <= eps < float("inf"):
        raise ValueError(f"eps is {eps!r}, expected a finite number, 0 or more")


def check_mask(x: Tensor, mask: Any, axis: int) -> None:
    check_tensor("mask", mask)
    if mask.dtype != torch.bool:
        raise TypeError(f"mask has dtype {mask.dtype}, expected bool, True where x is valid")
    if mask.shape != (shape := x.shape[: axis + 1]):
        raise ValueError(f"mask has shape {tuple(mask.shape)}, expected x's shape up to norm_axis, {tuple(shape)}")
    if mask.device != x.device:
        raise ValueError(f"mask is on {mask.device}, expected x's device {x.device}")


def check_padding(value: Any) -> float:
    """Return the padding value as a float; raise TypeError or ValueError where it is no number a float can hold."""
    # comparisons rather than math.isnan and float(): torch.compile makes the value a symbol
    if isinstance(value, bool) or not isinstance(value, (float, int, numbers.Real)):
        raise TypeError(f"padding_value is {value!r}, expected a number or None")
    if value != value:
        raise ValueError("padding_value is nan, which equals nothing: expected a number; a mask can mark NaN")
    if isinstance(value, int) and abs(value) >= 2**1023:
        raise ValueError(f"padding_value is an int of {value.bit_length()} bits, expected one that a float can hold")
    return value * 1.0
