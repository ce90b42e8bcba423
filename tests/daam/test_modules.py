"""MultiHeadDAAM: construction, initialisation, published checkpoints."""

import copy
import pickle

import pytest
import torch
from torch import nn

import daam


def randomised(*args, **kwargs):
    layer = daam.MultiHeadDAAM(*args, **kwargs)
    for p in layer.parameters():
        nn.init.uniform_(p, 0.5, 1.5)
    return layer


def published(layer, heads="daams"):
    """The checkpoint that the published code would hold with these parameters."""
    return {
        f"{heads}.{h}.{name}": getattr(layer, name).detach()[h : h + 1].clone()
        for h in range(layer.num_heads)
        for name in ("mean_offset", "c")
    }


def test_defaults_and_repr():
    layer = daam.MultiHeadDAAM(16)
    assert layer.mean_offset.shape == layer.c.shape == (8, 16)
    assert (layer.mean_offset == 0).all() and (layer.c == 2).all()
    assert (
        repr(layer) == "MultiHeadDAAM(16, num_heads=8, norm_axis=1, c=2.0, eps=1e-05, residual=False, backend='auto')"
    )
    assert sum(p.numel() for p in daam.MultiHeadDAAM(1024).parameters()) == 16_384


def test_last_axis():
    layer = randomised(12, 4, norm_axis=-1)
    assert layer.c.shape == (4, 3)
    x = torch.randn(2, 5, 12)
    torch.testing.assert_close(layer(x), daam.density_attention(x, layer.mean_offset, layer.c, norm_axis=-1))


def test_forward_passes_everything_on():
    layer = randomised(4, 2, eps=1e-3, residual=True, norm_axis=2)
    x, mask = torch.randn(2, 3, 6, 4), torch.rand(2, 3, 6) > 0.3
    y, weights = layer(x, mask, return_weights=True)
    z, w = daam.density_attention(
        x, layer.mean_offset, layer.c, norm_axis=2, eps=1e-3, mask=mask, residual=True, return_weights=True
    )
    assert torch.equal(y, z) and torch.equal(weights, w)


def test_a_wrong_number_of_features_is_named():
    with pytest.raises(ValueError, match=r"x has 5 features \(shape \(2, 6, 5\)\), expected num_features 4"):
        daam.MultiHeadDAAM(4, 2)(torch.randn(2, 6, 5))
    with pytest.raises(ValueError, match="since norm_axis 1 is the last axis, which heads cut"):
        daam.MultiHeadDAAM(4, 2)(torch.randn(2, 4))


@pytest.mark.parametrize(
    ("args", "message"),
    [((0,), "num_features is 0"), ((4, 0), "num_heads is 0"), ((10, 4), "expected a divisor of num_features")],
)
def test_errors(args, message):
    with pytest.raises(ValueError, match=message):
        daam.MultiHeadDAAM(*args, norm_axis=-1)


@pytest.mark.parametrize("heads", ["daams", "gcts"])
def test_published_checkpoints_load(heads):
    source, target = randomised(6, 3), daam.MultiHeadDAAM(6, 3)
    target.load_state_dict(published(source, heads))
    assert torch.equal(target.c, source.c) and torch.equal(target.mean_offset, source.mean_offset)


def test_published_checkpoints_load_inside_a_model_and_come_back():
    model = nn.Sequential(nn.Linear(6, 6), nn.ModuleDict({"attention": randomised(6, 3)}))
    ours = model.state_dict()
    theirs = daam.to_published_state_dict(model)
    assert set(theirs) == {
        "0.weight",
        "0.bias",
        *(f"1.attention.daams.{h}.{n}" for h in range(3) for n in ("c", "mean_offset")),
    }
    assert theirs["1.attention.daams.2.c"].shape == (1, 6)
    fresh = nn.Sequential(nn.Linear(6, 6), nn.ModuleDict({"attention": daam.MultiHeadDAAM(6, 3)}))
    before = dict(theirs)
    fresh.load_state_dict(theirs)
    assert theirs.keys() == before.keys(), "the caller's dict was changed"
    for key, value in fresh.state_dict().items():
        assert torch.equal(value, ours[key])
    assert daam.to_published_state_dict(randomised(6, 3)).keys() == published(randomised(6, 3)).keys()


@pytest.mark.parametrize("heads", [2, 4])
def test_a_checkpoint_of_other_heads_is_an_error_that_names_the_keys(heads):
    with pytest.raises(RuntimeError, match=r"(?s)Missing key.*Unexpected key.*daams\.0.*expected all of 0 to 2"):
        daam.MultiHeadDAAM(6, 3).load_state_dict(published(randomised(6, heads)))


def test_a_checkpoint_of_other_features_is_an_error():
    with pytest.raises(RuntimeError, match=r"daams\.0\.mean_offset has shape \(1, 5\), expected \(1, 6\)"):
        daam.MultiHeadDAAM(6, 3).load_state_dict(published(randomised(5, 3)), strict=False)


def test_ragged_reshaped_and_doubled_checkpoints_are_errors():
    ragged = published(randomised(6, 3)) | {"daams.1.c": torch.ones(1, 5)}
    reshaped = {key: t.reshape(2, 3) for key, t in published(randomised(6, 3)).items()}
    doubled = published(randomised(6, 3)) | published(randomised(6, 3), "gcts")
    for checkpoint, message in (
        (ragged, r"daams\.1\.c has shape \(1, 5\)"),
        (reshaped, r"has shape \(2, 3\), expected \(1, 6\)"),
        (doubled, "gcts and mean_offset are both"),
    ):
        with pytest.raises(RuntimeError, match=message):
            daam.MultiHeadDAAM(6, 3).load_state_dict(checkpoint)


def test_published_state_dict_of_wrapped_extended_and_tied_layers():
    class Extended(daam.MultiHeadDAAM):
        def __init__(self):
            super().__init__(6, 3)
            self.proj = nn.Linear(6, 6)
            self.inner = daam.MultiHeadDAAM(6, 2)

    theirs = daam.to_published_state_dict(Extended())
    assert {"proj.weight", "proj.bias", "daams.2.c", "inner.daams.1.c"} <= set(theirs) and "c" not in theirs
    compiled = daam.to_published_state_dict(torch.compile(randomised(6, 3)))
    assert set(compiled) == {f"_orig_mod.{key}" for key in published(randomised(6, 3))}
    layer = randomised(6, 3)
    tied = daam.to_published_state_dict(nn.ModuleDict({"a": layer, "b": layer}))
    assert set(tied) == {f"{name}.{key}" for name in "ab" for key in published(layer)}


def test_meta_device_copies_and_pickles():
    with torch.device("meta"):
        layer = daam.MultiHeadDAAM(6, 3, c=1.5)
    layer = layer.to_empty(device="cpu")
    layer.reset_parameters()
    assert (layer.c == 1.5).all() and (layer.mean_offset == 0).all()
    x = torch.randn(2, 6, 6)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(other(x), layer(x))
    assert daam.MultiHeadDAAM(6, 3, dtype=torch.bfloat16).c.dtype == torch.bfloat16
