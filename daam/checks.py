"""What arguments must be. Every error names the argument, what came and what was expected."""

from __future__ import annotations

import numbers
from typing import Any

import torch
from torch import Tensor

_FLOATING = frozenset({torch.float16, torch.bfloat16, torch.float32, torch.float64})


def check_x(x: Any, norm_axis: int) -> int:
    """norm_axis counted from the front."""
    check_tensor("x", x)
    if x.dtype not in _FLOATING:
        raise TypeError(f"x has dtype {x.dtype}, expected one of float16, bfloat16, float32, float64")
    if x.dim() < 2:
        raise ValueError(f"x has rank {x.dim()} (shape {tuple(x.shape)}), expected rank 2 or more")
    if isinstance(norm_axis, bool) or not isinstance(norm_axis, int):
        raise TypeError(f"norm_axis is {norm_axis!r}, expected an int")
    if not -x.dim() <= norm_axis < x.dim():
        raise ValueError(
            f"norm_axis is {norm_axis}, expected {-x.dim()} to {x.dim() - 1} for x of shape {tuple(x.shape)}"
        )
    return norm_axis % x.dim()


def check_tensor(name: str, t: Any) -> None:
    if not isinstance(t, Tensor):
        raise TypeError(f"{name} is a {type(t).__name__}, expected a Tensor")
    if type(t) not in (Tensor, torch.nn.Parameter) and hasattr(t, "device_mesh"):
        raise TypeError(
            f"{name} is a DTensor, expected a plain Tensor: call this under "
            "torch.distributed.tensor.experimental.local_map, with norm_axis not sharded"
        )


def check_params(x: Tensor, params: dict[str, Tensor], axis: int, columns: str) -> None:
    """That parameters are (num_heads, columns), floating, alike and on x's device, with a position for every head."""
    first, shape = next(iter(params)), None
    for name, p in params.items():
        check_tensor(name, p)
        if p.dtype not in _FLOATING:
            raise TypeError(f"{name} has dtype {p.dtype}, expected one of float16, bfloat16, float32, float64")
        if p.dim() != 2 or p.shape[0] < 1:
            raise ValueError(
                f"{name} has shape {tuple(p.shape)}, expected (num_heads, {columns}) with num_heads at least 1"
            )
        if p.shape[1] < 1 and columns == "num_gaussians":
            raise ValueError(f"{name} has shape {tuple(p.shape)}, expected num_gaussians at least 1")
        shape = p.shape if shape is None else shape
        if p.shape != shape:
            raise ValueError(f"{name} has shape {tuple(p.shape)}, expected {tuple(shape)}, the shape of {first}")
        if p.device != x.device:
            raise ValueError(f"{name} is on {p.device}, expected x's device {x.device}")
    if shape[0] > x.shape[axis]:
        raise ValueError(f"num_heads is {shape[0]}, more heads than the {x.shape[axis]} positions of norm_axis {axis}")


def check_eps(eps: Any) -> None:
    if not isinstance(eps, float | int) or not 0 <= eps < float("inf"):
        raise ValueError(f"eps is {eps!r}, expected a finite number, 0 or more")


def check_mask(x: Tensor, mask: Any, axis: int) -> None:
    check_tensor("mask", mask)
    if mask.dtype != torch.bool:
        raise TypeError(f"mask has dtype {mask.dtype}, expected bool, True where x is valid")
    if mask.shape != x.shape[: axis + 1]:
        raise ValueError(
            f"mask has shape {tuple(mask.shape)}, expected x's shape up to norm_axis, {tuple(x.shape[: axis + 1])}"
        )
    if mask.device != x.device:
        raise ValueError(f"mask is on {mask.device}, expected x's device {x.device}")


def check_padding(value: Any) -> float:
    """The value as a float. Comparisons rather than math.isnan and float(): torch.compile makes it a symbol."""
    if isinstance(value, bool) or not isinstance(value, float | int | numbers.Real):
        raise TypeError(f"padding_value is {value!r}, expected a number or None")
    if value != value:
        raise ValueError("padding_value is nan, which equals nothing: expected a number; a mask can mark NaN")
    if isinstance(value, int) and abs(value) >= 2**1023:
        raise ValueError(f"padding_value is an int of {value.bit_length()} bits, expected one that a float can hold")
    return value * 1.0
