"""The modules: construction, initialisation, checkpoints, masks. Agreement with PyPI's: test_published.py."""

import copy
import math
import pickle

import pytest
import torch
from helpers import close
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
    close(layer(x), daam.density_attention(x, layer.mean_offset, layer.c, norm_axis=-1), "y")


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
    with pytest.raises(RuntimeError, match=r"daams\.0\.mean_offset has shape \(1, 5\), expected \(6,\) or \(1, 6\)"):
        daam.MultiHeadDAAM(6, 3).load_state_dict(published(randomised(5, 3)), strict=False)


def test_ragged_reshaped_and_doubled_checkpoints_are_errors():
    ragged = published(randomised(6, 3)) | {"daams.1.c": torch.ones(1, 5)}
    reshaped = {key: t.reshape(2, 3) for key, t in published(randomised(6, 3)).items()}
    doubled = published(randomised(6, 3)) | published(randomised(6, 3), "gcts")
    for checkpoint, message in (
        (ragged, r"daams\.1\.c has shape \(1, 5\)"),
        (reshaped, r"has shape \(2, 3\), expected \(6,\) or \(1, 6\)"),
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


X = torch.randn(2, 16, 9, generator=torch.Generator().manual_seed(0))


def test_published_signatures_and_aliases():
    """Positional as published, norm_axis first; the Gaussian names are the same classes."""
    assert daam.GaussianAdaptiveAttention is daam.DensityAdaptiveAttention
    assert daam.MultiHeadGaussianAdaptiveAttention is daam.MultiHeadDensityAdaptiveAttention
    assert daam.GaussianBlock is daam.DensityBlock
    one = daam.DensityAdaptiveAttention(1, 2, 3, 0.0, 0.5, 1e-6)
    assert (one.norm_axis, one.num_heads, one.num_gaussians, one.padding_value, one.eps) == (1, 2, 3, 0.0, 1e-6)
    assert (one.mean_offsets == 0.5).all() and one.c.shape == (3,)
    many = daam.MultiHeadDensityAdaptiveAttention(1, 2, 3, None, 1e-6)
    assert many.eps == 1e-6 and many.mean_offsets.shape == (2, 3) and (many.mean_offsets == 0).all()
    block = daam.DensityBlock([1, 2], [2, 3], [3, 4], 2, 0.0, 1e-6)
    assert [(layer.padding_value, layer.eps) for layer in block.layers] == [(0.0, 1e-6)] * 2
    assert repr(many) == (
        "MultiHeadDensityAdaptiveAttention(1, num_heads=2, num_gaussians=3, padding_value=None, eps=1e-06)"
    )


def test_eps_arrives():
    """In the published heads it does not."""
    layer = daam.MultiHeadDensityAdaptiveAttention(1, 2, 3, eps=1.0)
    expected = daam.mixture_attention(X, layer.mean_offsets, layer.c, eps=1.0)
    assert torch.equal(layer(X), expected)
    layer.eps = 1e-8
    assert not torch.equal(layer(X), expected)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: daam.DensityAdaptiveAttention("1", 1, 1, None), "norm_axis is '1', expected an int"),
        (lambda: daam.DensityAdaptiveAttention(1, 0, 1, None), "num_heads is 0, expected a positive int"),
        (lambda: daam.MultiHeadDensityAdaptiveAttention(1, 2, 1.5), "num_gaussians is 1.5, expected a positive int"),
        (lambda: daam.DensityBlock([1], [1, 1], [1], 1), "num_heads has 2 entries, expected num_layers, 1"),
        (lambda: daam.DensityGate(0), "in_ch is 0, expected a positive int"),
        (lambda: daam.DensityGate(4, 0), "num_gaussians is 0, expected a positive int"),
    ],
)
def test_errors_of_the_others(build, message):
    with pytest.raises(ValueError, match=message):
        build()


def test_mixture_masks():
    layer = daam.MultiHeadDensityAdaptiveAttention(1, 3, 2)
    mask = torch.rand(2, 16) > 0.3
    y, weights = layer(X, return_attention_details=True, mask=mask)
    z, w = daam.mixture_attention(X, layer.mean_offsets, layer.c, mask=mask, return_weights=True)
    assert torch.equal(y, z) and torch.equal(weights, w) and not weights.requires_grad
    with pytest.raises(TypeError):
        layer(X, False, mask)
    layer.padding_value = 0.0
    with pytest.raises(ValueError, match="both given"):
        layer(X, mask=mask)


def test_a_block_is_its_layers_with_residuals_and_takes_a_mask():
    block = daam.DensityBlock([1, 2, -1], [2, 3, 1], [3, 2, 1], 3)
    mask = torch.arange(16).expand(2, 16) < torch.tensor([[16], [9]])
    x = X
    for layer in block.layers:
        own = mask if layer.norm_axis == 1 else mask[..., None].expand(2, 16, 9)
        x = layer(x, mask=own) + x
    y, details = block(X, return_attention_details=True, mask=mask)
    close(y, x, "y")
    assert list(details) == ["layer_0", "layer_1", "layer_2"]
    assert all((t[~mask] == 0).all() and not t.requires_grad for t in details.values())
    hidden = X.masked_fill(~mask[..., None], float("nan"))
    assert torch.equal(block(hidden, mask=mask)[mask], y[mask])
    with pytest.raises(ValueError, match=r"mask has shape \(2, 15\)"):
        block(X, mask=mask[:, :15])
    with pytest.raises(ValueError, match=r"mask has shape \(2, 16, 9\)"):
        block(X, mask=mask[..., None].expand(2, 16, 9))


def test_mixture_checkpoints_that_do_not_fit():
    layer = daam.MultiHeadDensityAdaptiveAttention(1, 2, 3)
    theirs = daam.to_published_state_dict(layer)
    assert {name: t.shape for name, t in theirs.items()} == {
        f"attention_heads.{h}.{name}": (3,) for h in range(2) for name in ("mean_offsets", "c")
    }
    with pytest.raises(RuntimeError, match=r"attention_heads has entries for heads \[0\], expected all of 0 to 1"):
        layer.load_state_dict({key: t for key, t in theirs.items() if ".0." in key})
    with pytest.raises(RuntimeError, match=r"has shape \(3,\), expected \(4,\) or \(1, 4\)"):
        daam.MultiHeadDensityAdaptiveAttention(1, 2, 4).load_state_dict(theirs)


def test_gate():
    gate = daam.DensityGate(9, 3)
    assert {name: tuple(p.shape) for name, p in gate.named_parameters()} == {
        "alpha": (),
        "to_attn.weight": (1, 9, 1),
        "to_attn.bias": (1,),
        "gaa.mean_offsets": (3,),
        "gaa.log_sigma": (3,),
    }
    assert gate.alpha == 0.05 and (gate.gaa.mean_offsets == 0).all()
    close(gate.gaa.log_sigma.exp(), torch.full((3,), 0.5), "sigma")
    x = X.transpose(1, 2)
    y, weights = gate(x)
    expected = daam.density_gate(gate.to_attn(x), gate.gaa.mean_offsets, gate.gaa.log_sigma, return_weights=True)[1]
    assert torch.equal(weights, expected) and weights.shape == (2, 1, 16)
    close(y, x * (1 + 0.05 * weights), "y")
    (y.sum() + weights.sum()).backward()
    assert all(p.grad.abs().sum() > 0 for p in gate.parameters())
    single, _ = gate(x[0])
    close(single, y[0], "y without a batch")


def test_gate_masks():
    """NaN where the mask is False reaches no result and no gradient of a parameter."""
    gate, mask = daam.DensityGate(9), torch.arange(16).expand(2, 16) < torch.tensor([[16], [9]])
    x = X.transpose(1, 2)
    grads = []
    for value in (0.0, float("nan")):
        hidden = x.masked_fill(~mask[:, None], value).requires_grad_()
        y, weights = gate(hidden, mask=mask)
        valid = y[mask[:, None].expand_as(y)]
        grads.append((valid, weights, *torch.autograd.grad(valid.square().sum(), (hidden, *gate.parameters()))))
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))
    assert (weights[~mask[:, None]] == 0).all()
    alone, _ = gate(x[1:, :, :9])
    close(gate(x, mask=mask)[0][1:, :, :9], alone, "y under a mask")
    assert torch.equal(gate(x, mask=mask)[0][1, :, 9:], x[1, :, 9:])
    with pytest.raises(ValueError, match=r"mask has shape \(2, 1, 16\), expected x's shape up to norm_axis, \(2, 16\)"):
        gate(x, mask=mask[:, None])
    with pytest.raises(TypeError, match=r"mask has dtype torch.int64"):
        gate(x, mask=mask.long())


@pytest.mark.parametrize(
    "build",
    [
        lambda: daam.MultiHeadDensityAdaptiveAttention(1, 2, 3),
        lambda: daam.DensityAdaptiveAttention(1, 1, 3, None),
        lambda: daam.DensityBlock([1, 2], [2, 3], [3, 4], 2),
        lambda: daam.DensityGate(16),
    ],
)
def test_the_others_copy_pickle_and_compile(build):
    def call(module):
        y = module(X)
        return y[0] if isinstance(y, tuple) else y

    layer = build()
    y = call(layer)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(call(other), y)
    close(call(torch.compile(layer, fullgraph=True, backend="aot_eager")), y, "y compiled")


def test_a_gate_from_the_meta_device():
    with torch.device("meta"):
        gate = daam.DensityGate(9, 3)
    gate = gate.to_empty(device="cpu")
    for module in gate.modules():
        module.reset_parameters()
    assert gate.alpha == 0.05 and (gate.gaa.log_sigma == math.log(0.5)).all() and (gate.gaa.mean_offsets == 0).all()
    assert "num_gaussians=3" in repr(gate) and "cap=0.2" in repr(gate)


@pytest.mark.parametrize(
    ("error", "message", "x", "mask"),
    [
        (TypeError, "x is a list, expected a Tensor", [1.0], None),
        (ValueError, r"x has shape \(2, 16, 9\), expected \(batch, 9, length\)", X, None),
        (ValueError, r"x has shape \(16,\), expected \(batch, 9, length\)", X[0, :, 0], None),
        (TypeError, "mask is a list, expected a Tensor", X.transpose(1, 2), [True]),
        (
            ValueError,
            "mask is on meta, expected x's device cpu",
            X.transpose(1, 2),
            torch.ones(2, 16).bool().to("meta"),
        ),
    ],
)
def test_errors_of_a_gate_s_input(error, message, x, mask):
    with pytest.raises(error, match=message):
        daam.DensityGate(9)(x, mask=mask)


@pytest.mark.parametrize(
    ("error", "message", "x", "mask"),
    [
        (TypeError, "x is a list, expected a Tensor", [1.0], None),
        (ValueError, "x has rank 0", torch.tensor(1.0), None),
        (ValueError, "x has rank 0", torch.tensor(1.0), torch.tensor(True)),
        (TypeError, "mask is a list, expected a Tensor", X, [True]),
    ],
)
def test_errors_of_a_block_s_input(error, message, x, mask):
    with pytest.raises(error, match=message):
        daam.DensityBlock([1], [1], [1], 1)(x, mask=mask)
