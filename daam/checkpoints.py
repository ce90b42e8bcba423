"""Published checkpoints, which keep every head apart, and ours, which stack them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn


def stack_heads(
    state_dict: dict[str, Tensor], prefix: str, num_heads: int, lists: Sequence[str], names: Sequence[str]
) -> None:
    """Replace `{prefix}{list}.{h}.{name}`, each (P,) or (1, P), by `{prefix}{name}` of shape (num_heads, P), in place.

    A checkpoint that is not complete for exactly num_heads heads is left as it is, for load_state_dict to name what is
    missing.
    """
    for head_list in lists:
        keys = {name: [f"{prefix}{head_list}.{h}.{name}" for h in range(num_heads)] for name in names}
        if f"{prefix}{head_list}.{num_heads}.{names[0]}" in state_dict:
            continue
        if all(key in state_dict for of_name in keys.values() for key in of_name):
            for name, of_name in keys.items():
                state_dict[prefix + name] = torch.stack([state_dict.pop(key).reshape(-1) for key in of_name])


def to_published_state_dict(module: nn.Module) -> dict[str, Tensor]:
    """The state dict of a module, or of a model that holds some, with the layers of this package under their published
    names.

    Returns:
        A dict of detached tensors that share memory with the module's, as state_dict's do. Entries of other modules are
        as they were.
    """
    state_dict = dict(module.state_dict())
    for name, layer in module.named_modules():
        if hasattr(layer, "published_state_dict"):
            prefix = f"{name}." if name else ""
            for key in layer.state_dict(prefix=prefix):
                del state_dict[key]
            state_dict.update(layer.published_state_dict(prefix))
    return state_dict
