"""What a forward pass keeps for its backward pass, counted."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor


def saved_bytes(forward: Callable[[], object], parameters: Iterable[Tensor]) -> int:
    """Return the bytes that autograd keeps for the backward pass of forward(): each storage once, no parameters."""
    own = {p.untyped_storage().data_ptr() for p in parameters}
    kept = {}

    def pack(t: Tensor) -> Tensor:
        if t.untyped_storage().data_ptr() not in own:
            kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        outputs = forward()
    del outputs
    return sum(kept.values())
