"""Modules that torch.fx's symbolic traces record as one call, as they do torch's own."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn
from torch.fx import Proxy


def find_proxy(values: Iterable[Any]) -> Proxy | None:
    """Return the first of some values that a tracer of torch.fx put in a tensor's place, None where there is none."""
    return next((value for value in values if isinstance(value, Proxy)), None)


def call_leaf(module: nn.Module, proxy: Proxy, *args: Any, **kwargs: Any) -> Any:
    """Return the proxy of a module's call on args and kwargs, one of which is the proxy of a tracer.

    Raises:
        TypeError: the module is what is traced, of which no call can be recorded, or has hooks, which would run in the
            trace and again in the call.
    """
    # torch takes modules of its own namespace for leaves, and would trace the checks of ours, which read values
    kind = type(module).__name__
    if module is getattr(proxy.tracer, "root", None):
        raise TypeError(f"a {kind} is one node to torch.fx, expected a model that holds it: nn.Sequential(module)")
    pre_hooks = (hook for hook in module._forward_pre_hooks.values() if not hasattr(hook, "_tensor_name"))  # of pruning
    if any((*module._forward_hooks.values(), *pre_hooks)):
        raise TypeError(
            f"a {kind} has hooks, which torch.fx would run twice: remove them, or trace with a Tracer whose "
            "is_leaf_module takes it"
        )
    return proxy.tracer.create_proxy("call_module", proxy.tracer.path_of_module(module), args, kwargs)
