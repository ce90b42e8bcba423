"""State dicts that are broken in ways that hypothesis chooses: loaded as they are, or an error that says why.

`torch.nn.Module.load_state_dict` loads what fits, and raises then: a parameter is as it was, or all that was given.
"""

import re
from functools import partial

import pytest
import torch
from drawn import sized
from hypothesis import strategies as st
from torch import nn

import daam
from daam.decoder import DENSITIES

pytestmark = pytest.mark.usefixtures("one_thread")


DECODER = {"num_heads": 2, "num_gaussians": 2, "conv_channels": 2}
MODULES = {
    "density": partial(daam.MultiHeadDAAM, 4, 2),
    "one head": partial(daam.MultiHeadDAAM, 4, 1),
    "mixture of one": partial(daam.DensityAdaptiveAttention, 1, 1, 3, None),
    "mixture": partial(daam.MultiHeadDensityAdaptiveAttention, 1, 2, 3),
    "stable": partial(daam.StableMultiHeadDensityAttention, 1, 2, 3),
    "block": partial(daam.DensityBlock, [1, 1], [2, 2], [3, 4], 2),
    "stable block": partial(daam.StableDensityBlock, [1, 1], [2, 2], [3, 4], 2),
    "gate": partial(daam.DensityGate, 6, 3),
    **{f"decoder, {name}": partial(daam.DATDecoder, 6, 16, 3, attention=name, **DECODER) for name in DENSITIES},
}
RESPELLED = {  # how published code spells the first of each, too
    "density": ("daams.", "gcts."),
    "one head": ("daams.", "gcts."),
    "stable": ("heads.", "attention_heads."),
    "stable block": (".heads.", ".attention_heads."),
}
WRAPPED = ("stable", "stable block")  # that published code may keep under `gaatn.`


def made(name, prefix, value):
    """Return a module with random parameters, inside a model where there is a prefix."""
    module = MODULES[name]()
    for t in module.state_dict().values():
        if t.is_floating_point():
            t.copy_(torch.rand(t.shape, generator=torch.Generator().manual_seed(value)) * 4 - 2)
    return nn.Sequential(nn.Identity(), module) if prefix else module


def plain_key(name, key):
    """Return a published key as `daam.to_published_state_dict` spells it."""
    key = key.replace("gaatn.", "", 1) if name in WRAPPED else key
    first, other = RESPELLED.get(name, ("", ""))
    return key.replace(other, first, 1) if other else key


def spell(draw, name, module):
    """Return a module's state dict in one of the ways of spelling it."""
    prefix = "1." if isinstance(module, nn.Sequential) else ""
    ways = ["own", "published", *(["other"] if name in RESPELLED else []), *(["wrapped"] if name in WRAPPED else [])]
    way = draw(st.sampled_from(ways))
    found = module.state_dict() if way == "own" else daam.to_published_state_dict(module)
    found = {key: t.clone() for key, t in found.items()}
    if way == "other":
        found = {key.replace(*RESPELLED[name], 1): t for key, t in found.items()}
    if way == "wrapped":
        found = {f"{prefix}gaatn.{key.removeprefix(prefix)}": t for key, t in found.items()}
    return found


def of_other_shape(t):
    return st.sampled_from([t[..., None], torch.stack([t, t, t]), t.new_zeros(0), torch.cat([t.flatten()] * 2)])


NO_TENSORS = st.sampled_from([None, 1.5, "c", [1.0, 2.0], {"c": 1.0}])
DTYPES = st.sampled_from([torch.float16, torch.bfloat16, torch.float64, torch.int64, torch.bool])


def change(draw, state, donor):
    """Replace an entry of a state dict, in place, and return the keys that this is about."""
    key = draw(st.sampled_from(sorted(state)))
    if not isinstance(state[key], torch.Tensor):
        return [key]
    kind = draw(st.sampled_from(["drop", "foreign", "shape", "type", "dtype", "double", "number"]))
    if kind == "drop":
        del state[key]
    elif kind == "foreign":
        owner, _, name = key.rpartition(".")
        key = f"{owner}{'.' if owner else ''}{draw(st.sampled_from(['none', '9.' + name, name + '.0', '0']))}"
        state.setdefault(key, torch.ones(3))
    elif kind == "shape":
        state[key] = draw(of_other_shape(state[key]))
    elif kind == "type":
        state[key] = draw(NO_TENSORS)
    elif kind == "dtype":
        state[key] = state[key].to(draw(DTYPES))
    elif kind == "double":
        key = draw(st.sampled_from(sorted(donor)))
        state[key] = donor[key]
    else:
        before, key = key, ".".join(f"0{part}" if part.isdigit() else part for part in key.split("."))
        state[key] = state.pop(before)
        return [before, key]
    return [key]


def values_of(model):
    """Return all that a model holds, by own and by published names."""
    values = {key: t.detach().clone() for key, t in model.state_dict().items()}
    return values, values | {key: t.clone() for key, t in daam.to_published_state_dict(model).items()}


def same(held, wanted):
    """Tell whether an entry holds what was given, rounded to its dtype; a head may be given with a dimension or
    without.
    """
    return isinstance(wanted, torch.Tensor) and torch.equal(held.flatten(), wanted.to(held.dtype).flatten())


def wanted(name, model, state):
    """Return what a state dict says of each own entry of a model, by its own name, of those that it tells whole."""
    given = {plain_key(name, key): t for key, t in state.items()}
    published, found = daam.to_published_state_dict(model), {}
    for key in model.state_dict():
        owner, _, last = key.rpartition(".")
        heads = [p for p in published if p.startswith(owner) and re.fullmatch(rf"\.?\w+\.\d+\.{last}", p[len(owner) :])]
        if key in given:
            found[key] = given[key]
        elif heads and all(isinstance(given.get(p), torch.Tensor) for p in heads):
            found[key] = torch.cat([given[p].flatten() for p in heads])
    return found


def check_loaded(name, model, state, before, found, strict):
    """Check that all that was given was loaded or told, and all else told and left as it was."""
    values, held = values_of(model)
    for key, t in state.items():
        known = plain_key(name, key)
        assert same(held[known], t) if known in held else {key, known} & set(found.unexpected_keys), key
    told = wanted(name, model, state)
    for key in values:
        assert key in told or (key in found.missing_keys and torch.equal(values[key], before[key])), key
    assert not strict or not (found.missing_keys or found.unexpected_keys)


def check_refused(name, model, state, before, changed, error):
    """Check that an error names one of the keys that it is about, their list or what they are stacked into, and that no
    parameter was loaded by halves.
    """
    assert type(error) is RuntimeError, repr(error)
    changed = [spelled for key in changed for spelled in (key, plain_key(name, key))]
    lists = [re.sub(r"\.\d+\.\w+$", "", key) for key in changed]
    stacked = [re.sub(r"\w+\.\d+\.(\w+)$", r"\1", key) for key in changed]
    names = {*changed, *lists, *stacked}
    assert any(re.search(rf"\b{re.escape(key)}\b", str(error)) for key in names), (changed, str(error))
    told = wanted(name, model, state)
    for key, t in model.state_dict().items():
        assert torch.equal(t, before[key]) or (key in told and same(t, told[key])), key


@sized(25, 1500)
@pytest.mark.parametrize("name", MODULES)
def test_state_dicts(name, examine):
    """Load state dicts, own and published, with changes: what has none loads, and all else loads exactly, or is an
    error.
    """

    def check(data):
        prefix = data.draw(st.sampled_from(["", "1."]))
        model, donor = made(name, prefix, 1), made(name, prefix, 2)
        before, state = values_of(model)[0], spell(data.draw, name, donor)
        spelled = values_of(made(name, prefix, 3))[1]
        changed = [
            key for _ in range(data.draw(st.integers(0, 3))) if state for key in change(data.draw, state, spelled)
        ]
        strict, assign = data.draw(st.booleans()), data.draw(st.booleans())
        given, keys = dict(state), list(state)
        try:
            found = model.load_state_dict(state, strict=strict, assign=assign)
        except Exception as error:
            assert changed, error
            check_refused(name, model, state, before, changed, error)
        else:
            check_loaded(name, model, state, before, found, strict)
        assert list(state) == keys and all(state[key] is given[key] for key in keys)

    examine(check, data=st.data())
