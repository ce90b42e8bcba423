"""Published checkpoints, which keep every head apart, and ours, which stack them."""

from __future__ import annotations

import re
from collections.abc import Sequence

import torch
from torch import Tensor, nn


def stack_heads(
    state_dict: dict[str, Tensor], prefix: str, stacked: dict[str, Tensor], lists: Sequence[str], error_msgs: list[str]
) -> None:
    """Replace `{prefix}{list}.{h}.{name}`, each (P,) or (1, P), by `{prefix}{name}` of shape (heads, P), in place.

    stacked holds the layer's parameters by name. What does not fit is reported as load_state_dict reports its own
    errors, and the keys stay, for it to name them.
    """
    names = "|".join(stacked)
    for head_list in lists:
        pattern = re.compile(rf"{re.escape(prefix)}{head_list}\.(\d+)\.({names})")
        found = {key: match for key in state_dict if (match := pattern.fullmatch(key))}
        if not found:
            continue
        heads, features = next(iter(stacked.values())).shape
        numbers = {int(match[1]) for match in found.values()}
        if numbers != set(range(heads)) or len(found) != heads * len(stacked):
            error_msgs.append(
                f"{prefix}{head_list} has entries for heads {sorted(numbers)}, expected all of 0 to {heads - 1}"
            )
        elif wrong := [k for k in found if tuple(state_dict[k].shape) not in ((features,), (1, features))]:
            error_msgs.append(
                f"{wrong[0]} has shape {tuple(state_dict[wrong[0]].shape)}, expected ({features},) or (1, {features})"
            )
        elif taken := [prefix + name for name in stacked if prefix + name in state_dict]:
            error_msgs.append(f"{prefix}{head_list} and {taken[0]} are both in the state dict, expected one of them")
        else:
            for name in stacked:
                rows = [state_dict.pop(f"{prefix}{head_list}.{h}.{name}").reshape(features) for h in range(heads)]
                state_dict[prefix + name] = torch.stack(rows)


def unstack_heads(head_list: str, stacked: dict[str, Tensor], keep_dim: bool = False) -> dict[str, Tensor]:
    """`{head_list}.{h}.{name}` for every row of `{name}`, detached, each (P,), or (1, P) if keep_dim."""
    heads = range(len(next(iter(stacked.values()))))
    return {
        f"{head_list}.{h}.{name}": p.detach()[h : h + 1] if keep_dim else p.detach()[h]
        for h in heads
        for name, p in stacked.items()
    }


def to_published_state_dict(module: nn.Module) -> dict[str, Tensor]:
    """The state dict of a module, or of a model that holds some, with the layers of this package under their published
    names.

    Returns:
        A dict of detached tensors that share memory with the module's, as state_dict's do. Entries of other modules are
        as they were.
    """
    state_dict = dict(module.state_dict())
    for name, layer in module.named_modules(remove_duplicate=False):
        # asked of the type: wrappers pass attributes of the module they wrap on
        if hasattr(type(layer), "published_state_dict"):
            published, own = layer.published_state_dict()
            prefix = f"{name}." if name else ""
            for key in own:
                del state_dict[prefix + key]
            state_dict.update({prefix + key: t for key, t in published.items()})
    return state_dict
