"""Which way layers go: together as one launch a pass, one by one with x alone saved, or one by one as ever."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import Parameter

from daam.kernels.budgets import MOST_LAYERS
from daam.kernels.fusion import count_fitting, count_together
from daam.kernels.operands import find_longest
from daam.ops import _forward_mode, _transformed

WAYS = ("fused", "recomputed", "layers")


class Way(NamedTuple):
    """Hold how layers go: one of WAYS and the reason, of how many a run is at most, and which passes of one are one
    launch.
    """

    name: str
    reason: str
    most: int = 1
    forward: bool = False
    backward: bool = False


def cut_runs(n_layers: int, most: int) -> list[slice]:
    """Return runs of so many layers, at most so many each and as even as they can be."""
    n_runs = -(-n_layers // most)
    return [slice(n_layers * i // n_runs, n_layers * (i + 1) // n_runs) for i in range(n_runs)]


class Plan(NamedTuple):
    """Hold which way layers go and their runs, and whether all tensors are plain ones (`is_plain`)."""

    way: Way
    runs: list[slice]
    plain: bool = False


def plan_layers(
    x: Tensor, params: Sequence[Tensor], axis: int, heads: int, masked: bool, recompute: bool | None, backend: str
) -> Plan:
    """Return the plan of layers on a backend. params: two of each layer."""
    n_layers = len(params) // 2
    way = find_way(x, differentiates(x, params), axis, heads, masked, n_layers, recompute, backend)
    return Plan(way, cut_runs(n_layers, way.most))


def differentiates(x: Tensor, params: Sequence[Tensor]) -> bool:
    """Tell whether gradients are recorded."""
    return torch.is_grad_enabled() and (x.requires_grad or any(p.requires_grad for p in params))


def find_way(
    x: Tensor, differentiated: bool, axis: int, heads: int, masked: bool, n_layers: int, recompute: bool | None,
    backend: str,
) -> Way:  # fmt: skip
    """Return which way layers go on a backend."""
    if n_layers == 1:
        return Way("layers", "a single layer is one launch by itself")
    if _transformed() or _forward_mode():
        return Way("layers", "a transform of functions, or forward-mode differentiation, is active")
    most = count_fitting(x, axis, heads, masked, n_layers) if backend == "triton" else 1
    obstacle = f"the backend is {backend}" if backend != "triton" else _find_obstacle(x, axis, heads, most, "forward")
    if not differentiated:
        reason = "chunks stay on chip, and nothing is differentiated"
        return Way("layers", obstacle) if obstacle else Way("fused", reason, most, forward=True)
    if recompute is False:
        return Way("layers", "recompute is False")
    fitting = 1 if obstacle else count_fitting(x, axis, heads, masked, most, backward=True)
    lasting = obstacle or _find_obstacle(x, axis, heads, fitting, "backward")
    if lasting and not recompute:
        return Way("layers", lasting)
    if lasting:
        most = most if most > 1 else min(n_layers, MOST_LAYERS)
        return Way("recomputed", f"recompute is True, and {lasting}", most, forward=obstacle is None)
    most = fitting if recompute else min(fitting, count_together(x, axis, heads))
    if most == 1:
        return Way("layers", f"{x.numel()} elements of {x.dtype} are expected to take longer together")
    return Way("fused", f"chunks stay on chip in both passes of {most} layers", most, forward=True, backward=True)


def _find_obstacle(x: Tensor, axis: int, heads: int, most: int, name: str) -> str | None:
    """Return why layers are not one launch in a pass of that name, which takes so many; None where it takes several."""
    if most > 1:
        return None
    return f"chunks of {find_longest(x.shape[axis], heads)} positions do not stay on chip in the {name} pass"


# --- Tensors and threads that an operator would see as they are ------------------------------------
_BackendSelect, _ADInplaceOrView = torch._C.DispatchKey.BackendSelect, torch._C.DispatchKey.ADInplaceOrView
_THREAD = (torch._C.DispatchKeySet(_BackendSelect) | torch._C.DispatchKeySet(_ADInplaceOrView)).raw_repr()
_plain_keys: dict[str, int] = {}


def enters_plainly() -> bool:
    """Tell whether this thread is in no mode, transform or tracer, which add dispatch keys, and nothing profiles it, or
    compiles it: compiled autograd traces backward passes.
    """
    plain = torch._C._dispatch_tls_local_include_set().raw_repr() == _THREAD
    return plain and not (torch.compiler.is_compiling() or torch.autograd._profiler_enabled())


def is_plain(t: Tensor) -> bool:
    """Tell whether a tensor has no dispatch keys but those of its device: negated views, zero, batched and functional
    tensors do. False where the thread is not plain.
    """
    device_type = t.device.type
    if device_type not in _plain_keys:
        if not enters_plainly():
            return False
        _plain_keys[device_type] = torch._C._dispatch_keys(torch.empty(0, device=device_type)).raw_repr()
    return torch._C._dispatch_keys(t).raw_repr() == _plain_keys[device_type]


def is_plain_parameter(t: Tensor) -> bool:
    """Tell the same of a parameter, which is no transform's: by what takes a quarter of the time."""
    strided = type(t) in (Parameter, Tensor) and t.layout is torch.strided
    return strided and not (t.is_nested or t.is_neg() or t._is_zerotensor())
