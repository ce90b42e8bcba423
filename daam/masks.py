"""Masks of the valid positions of an encoder's layers, out of what goes into the encoder."""

from __future__ import annotations

import dataclasses
import inspect
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

INPUTS = ("input_ids", "pixel_values", "input_values", "input_features")  # of texts, images, sounds
MASKS = ("attention_mask", "pixel_attention_mask")  # 1 where a position is valid
LENGTHS = ("_get_feat_extract_output_lengths", "_get_subsampling_output_length")  # of Hugging Face's speech encoders
NAMELESS = "an input by position"  # where an encoder's forward is (*args)
# in names of arguments that say which positions are valid
MASK_WORDS = "mask|pad|valid|bias"
LENGTH_WORDS = "len(s|gths?)?$|frames$|(n|num)_tokens$|^sizes$"
OTHERS = ("head_mask", "bool_masked_pos", "mask_time_indices", "decoder", "cross")  # such names say something else
_ANY = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)


def unwrap(encoder: nn.Module) -> nn.Module:
    """Return the module with a signature that torch.compile, DistributedDataParallel and the like wrap."""
    while True:
        if (child := encoder._modules.get("_orig_mod")) is None:
            child = encoder._modules.get("module")
            if child is None or any(p.kind not in _ANY for p in inspect.signature(encoder.forward).parameters.values()):
                return encoder
        encoder = child


def find_mask(
    named: dict[str, Any], attention_mask: Tensor | None, pooling_mask: Any, layers: str
) -> tuple[str, Tensor] | None:
    """Return the name and the tensor of the mask that says which positions are valid, or None where all are.

    Args:
        named: the encoder's arguments by name.
        attention_mask, pooling_mask: as `LayerPooling.average` has them.
        layers: name of the first layer in the encoder.

    Raises:
        ValueError: a mask is none, or which of the encoder's arguments says what is valid is not clear.
    """
    if pooling_mask is not None:
        all_valid = isinstance(pooling_mask, str) and pooling_mask == "all"
        return None if all_valid else _check_mask("pooling_mask", pooling_mask)
    named = {**named} if attention_mask is None else {**named, "attention_mask": attention_mask}
    if "decoder" in layers.split(".") and named.get("decoder_input_ids") is not None:
        mask = named.get("decoder_attention_mask")
        return None if mask is None else _check_mask("decoder_attention_mask", mask)
    given = [name for name in MASKS if named.get(name) is not None]
    towers = sum(named.get(name) is not None for name in INPUTS) > 1
    if len(given) > 1 or (given and towers and not any(part.startswith("text") for part in layers.split("."))):
        raise ValueError(
            f"{' and '.join(given)}: which positions of {layers or 'the layers'} are valid is not clear; pass "
            'pooling_mask=, (batch, positions), or "all"'
        )
    if given:
        return _check_mask(given[0], named[given[0]])
    doubtful = [name for name, value in named.items() if _is_doubtful(name, value)]
    counts = named[doubtful[0]] if len(doubtful) == 1 else None
    is_flat = isinstance(counts, Tensor) and counts.dim() == 1
    if is_flat and not counts.is_floating_point() and counts.dtype != torch.bool:
        positions = torch.arange(int(counts.max()), device=counts.device)
        return _check_mask(doubtful[0], positions < counts.unsqueeze(1))
    if doubtful:
        raise ValueError(
            f"{doubtful[0]} goes to the encoder, and which positions it leaves valid is not clear: pass inputs by "
            'keyword, as in pooling(**batch), or pooling_mask=, (batch, positions), 1 where valid, or "all"'
        )
    return None


def as_valid(
    mask: tuple[str, Tensor] | None, named: dict[str, Any], encoder: nn.Module, hidden: Tensor
) -> Tensor | None:
    """Return which positions of a layer's output (batch, positions, features) are valid, bool (batch, positions), or
    None for all.

    Raises:
        ValueError: the mask does not fit the positions.
    """
    batch, positions = hidden.shape[:2]
    if mask is None:
        tokens = next((t for n in ("input_ids", "inputs_embeds") if isinstance(t := named.get(n), Tensor)), None)
        if tokens is None or tokens.dim() < 2 or tokens.shape[1] >= positions or not _pads_inside(encoder):
            return None
        mask = ("input_ids", torch.ones(tokens.shape[:2], device=hidden.device))
    name, valid = mask[0], mask[1].to(hidden.device) > 0
    if valid.shape[0] == batch and valid.shape[1] != positions:
        if (frames := _frames(name, valid, encoder, positions)) is not None:
            valid = frames
        elif valid.shape[1] < positions and _pads_inside(encoder):  # on the right, up to a whole window
            valid = nn.functional.pad(valid, (0, positions - valid.shape[1]))
    if valid.shape != (batch, positions):
        raise ValueError(f"{name} has shape {tuple(valid.shape)}, expected {(batch, positions)}")
    return valid


def _check_mask(name: str, mask: Any) -> tuple[str, Tensor]:
    if not isinstance(mask, Tensor) or mask.dim() != 2:
        came = f"shape {tuple(mask.shape)}" if isinstance(mask, Tensor) else f"a {type(mask).__name__}"
        remedy = "" if name == "pooling_mask" else "; pass what is valid as pooling_mask="
        raise ValueError(f"{name} has {came}, expected a tensor (batch, positions), 1 where valid{remedy}")
    if torch.compiler.is_compiling():  # what is compiled or exported has no values to look at
        return name, mask
    if mask.is_floating_point() and (mask < 0).any():
        raise ValueError(f"{name} has negative values, expected 1 where valid and 0 elsewhere")
    if empty := (~(mask > 0).any(1)).nonzero().flatten().tolist():
        raise ValueError(f"{name} has no valid position in example {empty[0]} of the batch, expected one or more")
    return name, mask


def _is_doubtful(name: str, value: Any) -> bool:
    """Tell whether an argument seems to say which positions are valid."""
    if isinstance(value, Mapping | tuple) or dataclasses.is_dataclass(value):
        return sum(isinstance(item, Tensor) for item in parts_of(value)) > 1
    if name.startswith(NAMELESS):
        return not name.endswith(", 0") and isinstance(value, Tensor | list)
    if any(word in name for word in OTHERS):
        return False
    if isinstance(value, Tensor) and value.dim() > 1 and re.search(MASK_WORDS, name, re.IGNORECASE):
        return True
    is_flat = value.dim() == 1 or value.shape[1:].numel() == 1 if isinstance(value, Tensor) else isinstance(value, list)
    return is_flat and re.search(LENGTH_WORDS, name, re.IGNORECASE) is not None


def parts_of(value: Any) -> list[Any]:
    """Return the values that a mapping, a tuple or an object holds, as a list."""
    if isinstance(value, Mapping):
        return list(value.values())
    return list(value) if isinstance(value, tuple) else list(vars(value).values())


def _frames(name: str, valid: Tensor, encoder: nn.Module, positions: int) -> Tensor | None:
    """Return a mask of valid frames, (batch, positions), by one of samples; None where the encoder does not say."""
    methods = ((m, getattr(m, n)) for m in encoder.modules() for n in LENGTHS if hasattr(type(m), n))
    owner, count = next(methods, (None, None))
    if owner is None:
        return None
    # adapters come after the layers; those of SEW run on means of several frames
    options = {"add_adapter": False} if "add_adapter" in inspect.signature(count).parameters else {}
    squeeze = getattr(getattr(owner, "config", None), "squeeze_factor", 1)
    if torch.compiler.is_compiling():  # what is compiled or exported has no values to look at
        counts = count(valid.sum(1), **options)
        lengths = (counts[0] if isinstance(counts, tuple) else counts) // squeeze
        return torch.arange(positions, device=valid.device) < lengths.clamp(min=1).unsqueeze(1)

    def frames(length: int) -> int:
        counts = count(torch.tensor(length), **options)
        return int(counts[0] if isinstance(counts, tuple) else counts) // squeeze

    if (total := frames(valid.shape[1])) != positions:
        raise ValueError(
            f"{name} of {valid.shape[1]} entries makes {total} frames, and layers have {positions} positions: pass "
            "what is valid as pooling_mask="
        )
    if (valid[:, 1:] & ~valid[:, :-1]).any():
        raise ValueError(f"{name} has valid samples behind others, expected padding on the right alone")
    lengths = torch.tensor([max(1, frames(length)) for length in valid.sum(1).tolist()], device=valid.device)
    return torch.arange(positions, device=valid.device) < lengths.unsqueeze(1)


def _pads_inside(encoder: nn.Module) -> bool:
    """Tell whether an encoder pads its input to whole windows, as Longformer, LED, BigBird and Reformer do."""
    return any(name.startswith("_pad_to_") for m in encoder.modules() for name in dir(type(m)))
