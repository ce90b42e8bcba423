"""Published checkpoints, which keep every head apart, and ours, which stack them."""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import ParametrizationList, is_parametrized

from daam.dtensors import are_dtensors

# modules of torch's around another one, that leave themselves out of a state dict: CheckpointWrapper, FSDP1
WRAPPERS = re.compile(r"\b(_checkpoint_wrapped_module|_fsdp_wrapped_module)\.")


def stack_heads(
    state_dict: dict[str, Tensor], prefix: str, stacked: dict[str, Tensor], lists: Sequence[str], error_msgs: list[str]
) -> None:
    """Replace `{prefix}{list}.{h}.{name}`, each (P,) or (1, P), by `{prefix}{name}` of shape (heads, P), in place.

    stacked holds the layer's parameters by name. What does not fit is reported as load_state_dict reports its own
    errors, and the keys stay, for it to name them.
    """
    heads, features = next(iter(stacked.values())).shape
    found = {}
    for head_list in (prefix + name for name in lists):
        pattern = re.compile(rf"{re.escape(head_list)}\.(0|[1-9][0-9]*)\.({'|'.join(stacked)})")
        if matches := {match[0]: match for key in state_dict if (match := pattern.fullmatch(key))}:
            found[head_list] = matches
    if len(found) > 1:
        error_msgs.append(f"{' and '.join(found)} are both in the state dict, expected one of them")
        return
    for head_list, matches in found.items():
        numbers = {int(match[1]) for match in matches.values()}
        found_shapes = {key: _shape_of(state_dict[key]) for key in matches}
        misfits = [key for key, shape in found_shapes.items() if shape not in ((features,), (1, features))]
        # set_model_state_dict adds the layer's own tensors for all keys that it does not know
        doubles = [prefix + name for name, p in stacked.items() if state_dict.get(prefix + name, p) is not p]
        if numbers != set(range(heads)):
            error_msgs.append(f"{head_list} has entries for heads {sorted(numbers)}, expected all of 0 to {heads - 1}")
        elif len(matches) != heads * len(stacked):
            names = [name for name in stacked if any(f"{head_list}.{h}.{name}" not in matches for h in numbers)]
            missing = [h for h in range(heads) if f"{head_list}.{h}.{names[0]}" not in matches]
            error_msgs.append(
                f"{head_list} has no {names[0]} for heads {missing}, expected {' and '.join(stacked)} of all"
            )
        elif misfits:
            key, shape = misfits[0], found_shapes[misfits[0]]
            came = f"is a {type(state_dict[key]).__name__}" if shape is None else f"has shape {shape}"
            error_msgs.append(f"{key} {came}, expected a Tensor of shape ({features},) or (1, {features})")
        elif doubles:
            error_msgs.append(f"{head_list} and {doubles[0]} are both in the state dict, expected one of them")
        else:
            for name in stacked:
                rows = [_gather(state_dict.pop(f"{head_list}.{h}.{name}")).reshape(features) for h in range(heads)]
                state_dict[prefix + name] = torch.stack(rows)


def _shape_of(t: object) -> tuple[int, ...] | None:
    """Return the shape of a tensor, None of anything else."""
    return tuple(t.shape) if isinstance(t, Tensor) else None


def unwrap(state_dict: dict[str, Tensor], prefix: str, wrapper: str, error_msgs: list[str]) -> None:
    """Replace `{prefix}{wrapper}.{key}` by `{prefix}{key}`, in place.

    Where both are there load_state_dict's errors say so, and all keys stay.
    """
    outer = f"{prefix}{wrapper}."
    keys = {key: prefix + key.removeprefix(outer) for key in state_dict if key.startswith(outer)}
    if doubles := [f"{outside} and {inside}" for outside, inside in keys.items() if inside in state_dict]:
        error_msgs.append(f"{doubles[0]} are both in the state dict, expected one of them")
        return
    for outside, inside in keys.items():
        state_dict[inside] = state_dict.pop(outside)


def unstack_heads(head_list: str, stacked: dict[str, Tensor], keep_dim: bool = False) -> dict[str, Tensor]:
    """Return `{head_list}.{h}.{name}` for every row of `{name}`, each (P,), or (1, P) if keep_dim."""
    heads = range(len(next(iter(stacked.values()))))
    return {f"{head_list}.{h}.{name}": p[h : h + 1] if keep_dim else p[h] for h in heads for name, p in stacked.items()}


def value_of(module: nn.Module, name: str) -> Tensor:
    """Return a parameter as the next forward pass takes it, detached: parametrised, pruned or under weight_norm."""
    value, hook = getattr(module, name), _hook_of(module, name)
    if hasattr(hook, "_tensor_name"):  # pruned, to which a mask that is no DTensor may belong
        original, mask = (getattr(module, f"{name}_{suffix}").detach() for suffix in ("orig", "mask"))
        value = mask.to(original.dtype) * _gather(original)
        return share_as(original, value) if are_dtensors(original) else value
    if hook is not None:
        before = value
        # what the attribute holds is of the forward pass before, and the hook's tensors may have learned since
        with torch.no_grad():
            hook(module, ())
        value = getattr(module, name)
        setattr(module, name, before)
    return value.detach()


def take_values(
    module: nn.Module, names: Sequence[str], state_dict: dict[str, Tensor], prefix: str, error_msgs: list[str]
) -> None:
    """Replace the value of a parametrised parameter by the originals that give it, in place.

    A checkpoint with values is one of a layer that is not parametrised or pruned. A mask of pruning stays as it is.
    What cannot be replaced is reported as load_state_dict reports its own errors, and its key stays.
    """
    for name in names:
        if prefix + name in state_dict and (problem := _take_value(module, name, state_dict, prefix)):
            error_msgs.append(f"{prefix}{name} {problem}")


def _take_value(module: nn.Module, name: str, state_dict: dict[str, Tensor], prefix: str) -> str | None:
    """Replace the value of a parameter if it is computed, and return why not, where it cannot be, in words."""
    key, hook = prefix + name, _hook_of(module, name)
    pruned = hasattr(hook, "_tensor_name")
    if hook is not None and not pruned:
        return (
            f"is a value, but {name} is computed by {type(hook).__name__} before every forward pass: take that off "
            "(torch.nn.utils.remove_weight_norm, remove_spectral_norm), load, and put it on again"
        )
    if not pruned and not is_parametrized(module, name):
        return None
    originals = f"{key}_orig" if pruned else f"{prefix}parametrizations.{name}.original"
    for entry, t in state_dict.items():
        if entry.startswith(originals) and t is not _find(module, entry.removeprefix(prefix)):
            return f"and {entry} are both in the state dict, expected one of them"
    try:
        value = _gather(state_dict[key])
        tensors = {"": value} if pruned else _originals_of(module, name, value)
    except Exception as error:  # parametrisations are users' code, and raise what they like
        return f"cannot be loaded into a parametrised {name}: {error}"
    del state_dict[key]
    state_dict.update({originals + suffix: t for suffix, t in tensors.items()})
    if pruned:
        state_dict.setdefault(f"{key}_mask", getattr(module, f"{name}_mask"))
    return None


def share_values(module: nn.Module, names: Sequence[str], state_dict: dict[str, Tensor], prefix: str) -> None:
    """Replace whole tensors, which every process has, by DTensors where the parameters are such, in place."""
    for name in names:
        for entry in _entries_of(state_dict, prefix + name):
            own = _find(module, entry.removeprefix(prefix))
            if are_dtensors(own) and state_dict[entry].shape == own.shape:
                state_dict[entry] = share_as(own, state_dict[entry])


def share_as(like: Tensor, t: Tensor, source: int | None = None) -> Tensor:
    """Return a DTensor with the placements of another one. t: a DTensor, or all of it, in every process; source: the
    process of the mesh whose t it is, which sends the others their shares.
    """
    from torch.distributed.tensor import distribute_tensor  # takes long to import

    if are_dtensors(t):
        return t.redistribute(like.device_mesh, like.placements)
    return distribute_tensor(t, like.device_mesh, like.placements, src_data_rank=source)


def _gather(t: Tensor) -> Tensor:
    """Return all of a DTensor, in every process; of others t."""
    return t.full_tensor() if are_dtensors(t) else t


def _replicate(t: Tensor) -> Tensor:
    """Return a DTensor that every process has all of; of others t."""
    if not are_dtensors(t):
        return t
    from torch.distributed.tensor import Replicate

    return t.redistribute(placements=[Replicate()] * t.device_mesh.ndim)


def _find(module: nn.Module, path: str) -> Tensor | None:
    """Return a parameter or buffer by its key in the module's state dict, None where there is none."""
    try:
        return operator.attrgetter(path)(module)
    except AttributeError:
        return None


def _hook_of(module: nn.Module, name: str) -> Callable | None:
    """Return the hook of torch.nn.utils.prune, weight_norm or spectral_norm that computes a parameter."""
    hooks = () if name in module._parameters else module._forward_pre_hooks.values()
    # pruning has the one attribute, both norms have the other
    return next((h for h in hooks if name in (getattr(h, "_tensor_name", None), getattr(h, "name", None))), None)


def _entries_of(state_dict: dict[str, Tensor], key: str) -> list[str]:
    """Return the keys under which a state dict holds a parameter: its own, or those of what it is computed from."""
    if key in state_dict:
        return [key]
    owner, dot, name = key.rpartition(".")
    computed = {key + suffix for suffix in ("_orig", "_mask", "_g", "_v", "_u")}  # of pruning and of both norms
    parametrised = f"{owner}{dot}parametrizations.{name}."
    return [entry for entry in state_dict if entry in computed or entry.startswith(parametrised)]


@torch.no_grad()
def _originals_of(module: nn.Module, name: str, value: Tensor) -> dict[str, Tensor]:
    """Return {suffix: original} that give a parametrised parameter this value; raise ValueError where none do."""
    chain, current = module.parametrizations[name], getattr(module, name)
    if value.shape != current.shape:
        raise ValueError(f"it has shape {tuple(value.shape)}, expected {tuple(current.shape)}")
    value = value if current.is_meta else value.to(current)
    original = value
    for step in reversed(chain):
        if not hasattr(step, "right_inverse"):
            raise ValueError(
                f"{type(step).__name__} has no right_inverse, which would say what gives a value: add one, or load "
                "before torch.nn.utils.parametrize.register_parametrization"
            )
        original = step.right_inverse(original)
    tensors = {"": original} if chain.is_tensor else {str(i): t for i, t in enumerate(original)}
    _check_inverse(chain, tensors, value)
    return tensors


def _check_inverse(chain: ParametrizationList, tensors: dict[str, Tensor], value: Tensor) -> None:
    """Raise ValueError where originals do not give the value back: softplus, say, has no negative values."""
    first_step, *later_steps = chain
    result = first_step(*tensors.values())
    for step in later_steps:
        result = step(result)
    precision = max(1e-3, 8 * torch.finfo(value.dtype).eps)
    mismatches = ~torch.isclose(result, value, rtol=precision, atol=precision * 1e-3)
    if not value.is_meta and mismatches.any():
        steps = " of ".join(type(step).__name__ for step in reversed(chain))
        raise ValueError(
            f"{steps} gives {result[mismatches][0]:.6g} where it holds {value[mismatches][0]:.6g}, a value out of reach"
        )


class Published(nn.Module):
    """Load parameters from published checkpoints too, and give them under their published names.

    A class says which: names of its own parameters, of those whose one number is published without a dimension, of its
    layers with weight and bias, and of the lists under which published code keeps the parameters head by head, the one
    to give first, each (P,), or (1, P) to keep a dimension; and of the attribute under which published code may keep
    all of it.
    """

    _published_parameters: tuple[str, ...] = ()
    _published_scalars: tuple[str, ...] = ()
    _published_layers: tuple[str, ...] = ()
    _published_lists: tuple[str, ...] = ()
    _published_keep_dim = False
    _published_wrapper: str | None = None

    def _load_from_state_dict(self, state_dict, prefix, metadata, strict, missing, unexpected, error_msgs):
        if hasattr(self, "reshard"):  # of FSDP2, which does so too late: parameters may be whole since a forward pass
            self.reshard()
        if self._published_wrapper is not None and self._published_wrapper not in self._modules:
            unwrap(state_dict, prefix, self._published_wrapper, error_msgs)
        if self._published_lists:
            stacked = {name: getattr(self, name) for name in self._published_parameters}
            stack_heads(state_dict, prefix, stacked, self._published_lists, error_msgs)
        for key in (prefix + name for name in self._published_scalars):
            if isinstance(state_dict.get(key), Tensor) and not state_dict[key].dim():
                state_dict[key] = state_dict[key].reshape(1)
        groups = {prefix: (self, self._published_parameters)}
        groups |= {f"{prefix}{name}.": (getattr(self, name), ("weight", "bias")) for name in self._published_layers}
        for start, (module, names) in groups.items():
            take_values(module, names, state_dict, start, error_msgs)
            share_values(module, names, state_dict, start)
        super()._load_from_state_dict(state_dict, prefix, metadata, strict, missing, unexpected, error_msgs)

    def published_state_dict(self) -> tuple[dict[str, Tensor], tuple[str, ...]]:
        """Return the parameters under their published names, and the names of the entries that they stand for."""
        values = {name: _replicate(value_of(self, name)) for name in self._published_parameters}
        values |= {name: values[name].reshape(()) for name in self._published_scalars if values[name].numel() == 1}
        for name in self._published_layers:
            layer = getattr(self, name)
            if isinstance(layer, nn.Conv1d | nn.Conv2d | nn.Linear):  # one that somebody wrapped has other entries
                values |= {f"{name}.{parameter}": value_of(layer, parameter) for parameter in ("weight", "bias")}
        if not self._published_lists:
            return values, tuple(values)
        return unstack_heads(self._published_lists[0], values, self._published_keep_dim), tuple(values)


def to_published_state_dict(module: nn.Module) -> dict[str, Tensor]:
    """Return the state dict of a module, or of a model that holds some, with this package's layers as published.

    Returns:
        Detached tensors that share memory with the module's, as state_dict's do, but for values of parameters that are
        parametrised, pruned or under weight_norm, as the next forward pass takes them. Other modules' entries stay.
        After `fully_shard` they are DTensors, of parameters head by head with all of each in every process.
    """
    state_dict = dict(module.state_dict())
    for name, layer in module.named_modules(remove_duplicate=False):
        # asked of the type: wrappers pass attributes of the module they wrap on
        if hasattr(type(layer), "published_state_dict"):
            published, names = layer.published_state_dict()
            prefix = WRAPPERS.sub("", f"{name}." if name else "")
            for key in names:
                for entry in _entries_of(state_dict, prefix + key):
                    del state_dict[entry]
            state_dict.update({prefix + key: t for key, t in published.items()})
    return state_dict
