"""The modules: construction, initialisation, checkpoints, masks. Agreement with PyPI's: test_published.py."""

import copy
import math
import pickle
from unittest import mock

import pytest
import torch
from helpers import close, recorded_launches
from torch import nn
from torch.nn.utils import parametrize, prune

import daam


def randomised(*args, **kwargs):
    layer = daam.MultiHeadDAAM(*args, **kwargs)
    for p in layer.parameters():
        nn.init.uniform_(p, 0.5, 1.5)
    return layer


def published(layer, heads="daams"):
    """Return the checkpoint that the published code would hold with these parameters."""
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
    state = model.state_dict()
    published_state = daam.to_published_state_dict(model)
    assert set(published_state) == {
        "0.weight",
        "0.bias",
        *(f"1.attention.daams.{h}.{n}" for h in range(3) for n in ("c", "mean_offset")),
    }
    assert published_state["1.attention.daams.2.c"].shape == (1, 6)
    fresh = nn.Sequential(nn.Linear(6, 6), nn.ModuleDict({"attention": daam.MultiHeadDAAM(6, 3)}))
    copied = dict(published_state)
    fresh.load_state_dict(published_state)
    assert published_state.keys() == copied.keys(), "the caller's dict was changed"
    for key, value in fresh.state_dict().items():
        assert torch.equal(value, state[key])
    assert daam.to_published_state_dict(randomised(6, 3)).keys() == published(randomised(6, 3)).keys()


def test_published_heads_are_in_the_order_of_their_numbers():
    """Check more than ten heads, whose keys are in another order as text."""
    source, target = randomised(6, 12), daam.MultiHeadDAAM(6, 12)
    target.load_state_dict(dict(sorted(published(source).items())))
    assert torch.equal(target.c, source.c) and torch.equal(target.mean_offset, source.mean_offset)
    assert all(torch.equal(t, published(source)[key]) for key, t in daam.to_published_state_dict(target).items())


@pytest.mark.parametrize("heads", [2, 4])
def test_a_checkpoint_of_other_heads_is_an_error_that_names_the_keys(heads):
    with pytest.raises(RuntimeError, match=r"(?s)Missing key.*Unexpected key.*daams\.0.*expected all of 0 to 2"):
        daam.MultiHeadDAAM(6, 3).load_state_dict(published(randomised(6, heads)))


def test_a_checkpoint_of_other_features_is_an_error():
    with pytest.raises(
        RuntimeError, match=r"daams\.0\.mean_offset has shape \(1, 5\), expected a Tensor of shape \(6,\) or \(1, 6\)"
    ):
        daam.MultiHeadDAAM(6, 3).load_state_dict(published(randomised(5, 3)), strict=False)


def test_ragged_reshaped_and_doubled_checkpoints_are_errors():
    ragged = published(randomised(6, 3)) | {"daams.1.c": torch.ones(1, 5)}
    reshaped = {key: t.reshape(2, 3) for key, t in published(randomised(6, 3)).items()}
    doubled = published(randomised(6, 3)) | published(randomised(6, 3), "gcts")
    for checkpoint, message in (
        (ragged, r"daams\.1\.c has shape \(1, 5\)"),
        (reshaped, r"has shape \(2, 3\), expected a Tensor of shape \(6,\) or \(1, 6\)"),
        (doubled, "daams and gcts are both"),
    ):
        with pytest.raises(RuntimeError, match=message):
            daam.MultiHeadDAAM(6, 3).load_state_dict(checkpoint)


def test_published_state_dict_of_wrapped_extended_and_tied_layers():
    class Extended(daam.MultiHeadDAAM):
        def __init__(self):
            super().__init__(6, 3)
            self.proj = nn.Linear(6, 6)
            self.inner = daam.MultiHeadDAAM(6, 2)

    state = daam.to_published_state_dict(Extended())
    assert {"proj.weight", "proj.bias", "daams.2.c", "inner.daams.1.c"} <= set(state) and "c" not in state
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
    for copied in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(copied(x), layer(x))
    assert daam.MultiHeadDAAM(6, 3, dtype=torch.bfloat16).c.dtype == torch.bfloat16


X = torch.randn(2, 16, 9, generator=torch.Generator().manual_seed(0))


def test_published_signatures_and_aliases():
    """Check that arguments are positional as published, norm_axis first, and that the Gaussian names are the same
    classes.
    """
    assert daam.GaussianAdaptiveAttention is daam.DensityAdaptiveAttention
    assert daam.MultiHeadGaussianAdaptiveAttention is daam.MultiHeadDensityAdaptiveAttention
    assert daam.GaussianBlock is daam.DensityBlock
    head = daam.DensityAdaptiveAttention(1, 2, 3, 0.0, 0.5, 1e-6)
    assert (head.norm_axis, head.num_heads, head.num_gaussians, head.padding_value, head.eps) == (1, 2, 3, 0.0, 1e-6)
    assert (head.mean_offsets == 0.5).all() and head.c.shape == (3,)
    heads = daam.MultiHeadDensityAdaptiveAttention(1, 2, 3, None, 1e-6)
    assert heads.eps == 1e-6 and heads.mean_offsets.shape == (2, 3) and (heads.mean_offsets == 0).all()
    block = daam.DensityBlock([1, 2], [2, 3], [3, 4], 2, 0.0, 1e-6)
    assert [(layer.padding_value, layer.eps) for layer in block.layers] == [(0.0, 1e-6)] * 2
    assert repr(heads) == (
        "MultiHeadDensityAdaptiveAttention(1, num_heads=2, num_gaussians=3, padding_value=None, eps=1e-06, "
        "backend='auto')"
    )


def test_eps_arrives():
    """Check that eps reaches the heads, which the published ones ignore."""
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
        (lambda: daam.StableMultiHeadDensityAttention(1, 2, 0), "num_gaussians is 0, expected a positive int"),
        (lambda: daam.StableDensityBlock([1], [1], [1, 1], 1), "num_gaussians has 2 entries, expected num_layers, 1"),
        (lambda: daam.DensityGate(0), "in_ch is 0, expected a positive int"),
        (lambda: daam.DensityGate(4, 0), "num_gaussians is 0, expected a positive int"),
    ],
)
def test_errors_of_the_others(build, message):
    with pytest.raises(ValueError, match=message):
        build()


# Every module that calls a function, built for a backend, and the number of its calls.
BUILDS = {
    "MultiHeadDAAM": (lambda backend: daam.MultiHeadDAAM(9, 2, backend=backend), 1),
    "DensityAdaptiveAttention": (lambda backend: daam.DensityAdaptiveAttention(1, 1, 3, None, backend=backend), 1),
    "MultiHead": (lambda backend: daam.MultiHeadDensityAdaptiveAttention(1, 2, 3, backend=backend), 1),
    "DensityBlock": (lambda backend: daam.DensityBlock([1, 2], [2, 3], [3, 4], 2, backend=backend), 2),
    "DensityGate": (lambda backend: daam.DensityGate(16, backend=backend), 1),
    "Stable": (lambda backend: daam.StableMultiHeadDensityAttention(1, 2, 3, backend=backend), 1),
    "StableDensityBlock": (lambda backend: daam.StableDensityBlock([1, 2], [2, 3], [3, 4], 2, backend=backend), 2),
}
builds = pytest.mark.parametrize("build", BUILDS)


@builds
@pytest.mark.parametrize("masked", [False, True])
def test_the_backend_arrives(build, masked):
    """Check that the backend reaches every call of the functions, also against `use_backend`, which stands in for
    "auto" alone.
    """
    make, calls = BUILDS[build]
    mask = torch.ones(2, 9 if build == "DensityGate" else 16, dtype=torch.bool) if masked else None
    for backend in ("eager", "auto"):
        with mock.patch("daam.functional.backend_for", return_value=("eager", "")) as asked:
            make(backend)(X, mask=mask)
        assert [call.args[1] for call in asked.call_args_list] == [backend] * calls
    with daam.use_backend("triton"):
        make("eager")(X, mask=mask)
    with pytest.raises(ValueError, match="backend is 'cuda', expected one of"):
        make("cuda")(X, mask=mask)
    assert "backend='eager'" in repr(make("eager"))


@pytest.mark.kernel
@builds
def test_the_backend_runs(build, device):
    layer, x = BUILDS[build][0]("triton").to(device), X.to(device)
    with recorded_launches() as names:
        layer(x)
    weighed = [name for name in names if "forward" in name and not name.startswith("gated_")]
    assert len(weighed) == BUILDS[build][1]


def test_the_backend_is_a_keyword():
    """Check that backend is no positional argument: positions are the published ones."""
    for build in (
        lambda: daam.DensityAdaptiveAttention(1, 1, 3, None, 0, 1e-8, "eager"),
        lambda: daam.MultiHeadDensityAdaptiveAttention(1, 1, 3, None, 1e-8, "eager"),
        lambda: daam.DensityBlock([1], [1], [3], 1, None, 1e-8, "eager"),
        lambda: daam.DensityGate(4, 4, 0.2, "eager"),
        lambda: daam.StableMultiHeadDensityAttention(1, 1, 3, 1e-8, None, "eager"),
        lambda: daam.StableDensityBlock([1], [1], [3], 1, 1e-8, True, None, "eager"),
    ):
        with pytest.raises(TypeError, match="positional argument"):
            build()


@builds
@pytest.mark.filterwarnings("ignore:.*(nested|Sparse).*:UserWarning")
def test_tensors_that_are_not_dense_are_named(build):
    layer = BUILDS[build][0]("auto")
    rows = [X[0], X[1, :9]]
    for kind, t in {
        "a sparse_coo tensor": X.to_sparse(),
        "a mkldnn tensor": X.to_mkldnn(),
        "a nested \\(strided\\) tensor": torch.nested.nested_tensor(rows),
        "a nested \\(jagged\\) tensor": torch.nested.nested_tensor(rows, layout=torch.jagged),
    }.items():
        with pytest.raises(TypeError, match=f"^x is {kind}, expected a dense one"):
            layer(t)
        if "mkldnn" not in kind:
            with pytest.raises(TypeError, match=f"^mask is {kind}, expected a dense one"):
                layer(X, mask=t.bool() if "nested" in kind else (X > 0).to_sparse())


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
        layer_mask = mask if layer.norm_axis == 1 else mask[..., None].expand(2, 16, 9)
        x = layer(x, mask=layer_mask) + x
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
    state = daam.to_published_state_dict(layer)
    assert {name: t.shape for name, t in state.items()} == {
        f"attention_heads.{h}.{name}": (3,) for h in range(2) for name in ("mean_offsets", "c")
    }
    with pytest.raises(RuntimeError, match=r"attention_heads has entries for heads \[0\], expected all of 0 to 1"):
        layer.load_state_dict({key: t for key, t in state.items() if ".0." in key})
    with pytest.raises(RuntimeError, match=r"has shape \(3,\), expected a Tensor of shape \(4,\) or \(1, 4\)"):
        daam.MultiHeadDensityAdaptiveAttention(1, 2, 4).load_state_dict(state)


def test_gate():
    gate = daam.DensityGate(9, 3)
    assert {name: tuple(p.shape) for name, p in gate.named_parameters()} == {
        "alpha": (1,),
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


HALVES = [torch.float16, torch.bfloat16]


@pytest.mark.parametrize("gate_dtype", [*HALVES, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("dtype", [*HALVES, torch.float32, torch.float64], ids=str)
def test_a_gate_of_another_dtype_than_x_is_named(dtype, gate_dtype):
    gate, x = daam.DensityGate(9).to(gate_dtype), X.transpose(1, 2).to(dtype)
    if dtype == gate_dtype:
        y, weights = gate(x)
        assert y.dtype == weights.dtype == dtype
        return
    message = f"x has dtype {dtype}, expected {gate_dtype}, the dtype of to_attn's weight: cast x or the module"
    for mask in (None, torch.ones(2, 16, dtype=torch.bool)):
        with pytest.raises(TypeError, match=message):
            gate(x, mask=mask)
    with torch.autocast("cpu", torch.bfloat16):
        if torch.float64 in (dtype, gate_dtype):  # which autocast leaves alone
            with pytest.raises(TypeError, match=message):
                gate(x)
        else:
            y, weights = gate(x)
            expected = daam.DensityGate(9)
            expected.load_state_dict(gate.state_dict())
            close(y.float(), expected.to(torch.bfloat16)(x.bfloat16())[0].float(), "y", (2e-2, 1e-2))
            assert weights.dtype == torch.bfloat16


def test_a_gate_under_autocast_compiles():
    gate, x = daam.DensityGate(9), X.transpose(1, 2).bfloat16()

    def call(x):
        with torch.autocast("cpu", torch.bfloat16):
            return gate(x)[0]

    close(torch.compile(call, fullgraph=True, backend="aot_eager")(x), call(x), "y compiled")


def test_gate_masks():
    """Check that NaN where the mask is False reaches no result and no gradient of a parameter."""
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
    expected, _ = gate(x[1:, :, :9])
    close(gate(x, mask=mask)[0][1:, :, :9], expected, "y under a mask")
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
        lambda: daam.StableDensityBlock([1, 2], [2, 3], [3, 4], 2),
    ],
)
def test_the_others_copy_pickle_and_compile(build):
    def call(module):
        y = module(X)
        return y[0] if isinstance(y, tuple) else y

    layer = build()
    y = call(layer)
    for copied in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(call(copied), y)
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


class Positive(nn.Module):
    """Compute softplus, which people keep c positive with."""

    def forward(self, original):
        return nn.functional.softplus(original)

    def right_inverse(self, value):
        return torch.log(torch.expm1(value))


class OneWay(nn.Module):
    """Compute softplus without a way back."""

    def forward(self, original):
        return nn.functional.softplus(original)


class Plus(nn.Module):
    """Add a tensor of its own, before or after another step."""

    def __init__(self):
        super().__init__()
        self.register_buffer("step", torch.tensor(1.0))

    def forward(self, original):
        return original + self.step

    def right_inverse(self, value):
        return value - self.step


# Every kind of module with published names: (build, the submodule and parameter that is parametrised, its published
# name in a head or for all of them)
PUBLISHED = {
    "daam": (lambda: daam.MultiHeadDAAM(6, 3), "", "c", "daams.{h}.c"),
    "offset": (lambda: daam.MultiHeadDAAM(6, 3, norm_axis=-1), "", "mean_offset", "daams.{h}.mean_offset"),
    "mixture": (lambda: daam.MultiHeadDensityAdaptiveAttention(1, 3, 2), "", "c", "attention_heads.{h}.c"),
    "one head": (lambda: daam.DensityAdaptiveAttention(1, 1, 3, None), "", "c", "c"),
    "block": (
        lambda: daam.DensityBlock([1, 2], [2, 3], [3, 4], 2), "layers.1", "c", "layers.1.attention_heads.{h}.c"
    ),
    "stable": (lambda: daam.StableMultiHeadDensityAttention(1, 3, 2), "", "c", "heads.{h}.c"),
    "stable block": (
        lambda: daam.StableDensityBlock([1, 2], [2, 3], [3, 4], 2), "layers.1", "c", "layers.1.heads.{h}.c"
    ),
    "gate": (lambda: daam.DensityGate(6), "gaa", "log_sigma", "gaa.log_sigma"),
    "gate's alpha": (lambda: daam.DensityGate(6), "", "alpha", "alpha"),
    "gate's convolution": (lambda: daam.DensityGate(6), "to_attn", "weight", "to_attn.weight"),
    "decoder": (lambda: daam.DATDecoder(6, 4, 2, num_heads=3, conv_channels=2), "daam", "c", "daam.daams.{h}.c"),
    "classifier": (lambda: daam.DATDecoder(6, 4, 2, num_heads=3, conv_channels=2), "fc", "weight", "fc.weight"),
}  # fmt: skip
published_kinds = pytest.mark.parametrize("kind", PUBLISHED)


def drawn(kind, inside):
    """Return a module with parameters from 0.5 to 1.5, alone or in a model, the submodule that holds the parameter, its
    name, and a function that gives its rows as a published checkpoint has them.
    """
    build, place, name, key = PUBLISHED[kind]
    model = nn.Sequential(nn.Linear(2, 2), nn.ModuleDict({"layer": build()})) if inside else build()
    prefix = "1.layer" if inside else ""
    for p in model.parameters():
        nn.init.uniform_(p, 0.5, 1.5)
    owner = model.get_submodule(".".join(part for part in (prefix, place) if part))
    key = f"{prefix}.{key}" if inside else key

    def rows(value):
        if "{h}" not in key:
            return {key: value.reshape(()) if name == "alpha" else value}
        keep = slice(None) if "daams" in key else 0  # (1, P) there, (P,) here
        return {key.format(h=h): value[h : h + 1][keep] for h in range(len(value))}

    return model, owner, name, rows


@published_kinds
@pytest.mark.parametrize("inside", [False, True])
def test_a_parametrised_layer_has_its_values_published(kind, inside):
    """Check that a layer is published as if it had never been parametrised, but for what a parametrisation may add."""
    model, owner, name, rows = drawn(kind, inside)
    plain = daam.to_published_state_dict(model)
    original = getattr(owner, name).detach().clone()
    parametrize.register_parametrization(owner, name, OneWay())
    parametrize.register_parametrization(owner, name, Plus())
    found = daam.to_published_state_dict(model)
    assert found.keys() == plain.keys() and not any(t.requires_grad for t in found.values())
    wanted = rows(torch.log(1 + torch.exp(original)) + 1)
    assert wanted.keys() <= found.keys()
    for key, value in found.items():
        close(value, wanted.get(key, plain[key]), key)


@published_kinds
@pytest.mark.parametrize("inside", [False, True])
def test_a_published_checkpoint_loads_into_a_parametrised_layer(kind, inside):
    checkpoint = daam.to_published_state_dict(drawn(kind, inside)[0])
    target, owner, name, rows = drawn(kind, inside)
    parametrize.register_parametrization(owner, name, Plus())
    parametrize.register_parametrization(owner, name, Positive())
    step = f".parametrizations.{name}.0.step"  # a tensor that no published checkpoint has
    keys = [key for key in target.state_dict() if f".{key}".endswith(step)]
    assert len(keys) == 1
    target.load_state_dict({**checkpoint, keys[0]: torch.tensor(1.0)})
    state = daam.to_published_state_dict(target)
    assert state.keys() == checkpoint.keys()
    for key, value in state.items():
        close(value, checkpoint[key], key)
    original = owner.parametrizations[name].original
    for key, value in rows(nn.functional.softplus(original.detach() + 1)).items():
        close(value, checkpoint[key], f"{key} from its original")


@published_kinds
def test_a_parametrisation_that_has_no_way_back_is_named(kind):
    model, owner, name, _ = drawn(kind, True)
    checkpoint = daam.to_published_state_dict(model)
    parametrize.register_parametrization(owner, name, OneWay())
    original = owner.parametrizations[name].original.clone()
    for strict in (True, False):
        with pytest.raises(RuntimeError, match=f"loaded into a parametrised {name}: OneWay has no right_inverse"):
            model.load_state_dict(checkpoint, strict=strict)
    assert torch.equal(owner.parametrizations[name].original, original)


def test_a_value_out_of_reach_of_a_parametrisation_is_named():
    """Check that values below 0, as the published mixture's c, are refused under softplus, which would silently make
    them NaN.
    """
    layer = daam.MultiHeadDensityAdaptiveAttention(1, 2, 3)
    checkpoint = {key: t.clone() for key, t in daam.to_published_state_dict(layer).items()}
    checkpoint["attention_heads.1.c"][2] = -1.5
    nn.init.ones_(layer.c)
    parametrize.register_parametrization(layer, "c", Positive())
    with pytest.raises(RuntimeError, match=r"Positive gives nan where it holds -\d.*, a value out of reach"):
        layer.load_state_dict(checkpoint)
    assert layer.c.isfinite().all()
    with pytest.raises(RuntimeError, match=r"it has shape \(2, 4\), expected \(2, 3\)"):
        layer.load_state_dict({"mean_offsets": torch.ones(2, 3), "c": torch.ones(2, 4)})
    with pytest.raises(RuntimeError, match=r"c and parametrizations\.c\.original are both in the state dict"):
        layer.load_state_dict({**layer.state_dict(), "c": torch.ones(2, 3)}, strict=False)


@published_kinds
def test_a_pruned_layer_has_its_values_published(kind):
    """Check that the values of the next forward pass are published, whatever the previous one took, and that a
    checkpoint loads beside the mask, which stays.
    """
    model, owner, name, rows = drawn(kind, True)
    plain = daam.to_published_state_dict(model)
    original = getattr(owner, name).detach().clone()
    shape, plain = original.shape, {key: t.clone() for key, t in plain.items()}
    mask = (torch.arange(shape.numel()) % 2 == 0).float().reshape(shape)
    prune.custom_from_mask(owner, name, mask)
    with torch.no_grad():
        getattr(owner, f"{name}_orig").mul_(3)  # learned since
    found, wanted = daam.to_published_state_dict(model), rows(getattr(owner, f"{name}_orig").detach() * mask)
    assert found.keys() == plain.keys()
    for key, value in found.items():
        assert torch.equal(value, wanted.get(key, plain[key])), key
    model.load_state_dict(plain)
    assert torch.equal(getattr(owner, f"{name}_mask"), mask)
    found, wanted = daam.to_published_state_dict(model), rows(original * mask)
    assert all(torch.equal(value, wanted.get(key, plain[key])) for key, value in found.items())
    with pytest.raises(RuntimeError, match="are both in the state dict"):
        model.load_state_dict({**model.state_dict(), **{key: t.clone() for key, t in plain.items()}}, strict=False)
    prune.remove(owner, name)
    model.load_state_dict(plain)


@pytest.mark.parametrize("new", [False, True])
@pytest.mark.filterwarnings("ignore:.*torch.nn.utils.weight_norm.*is deprecated:FutureWarning")
@pytest.mark.parametrize("kind", ["daam", "mixture", "block", "gate's convolution"])
def test_a_layer_under_weight_norm_has_its_values_published(kind, new):
    """Check direction and length of each row, under both weight norms of torch."""
    model, owner, name, rows = drawn(kind, True)
    plain = daam.to_published_state_dict(model)
    weight_norm = nn.utils.parametrizations.weight_norm if new else nn.utils.weight_norm
    weight_norm(owner, name)
    with torch.no_grad():
        length = owner.parametrizations[name].original0 if new else getattr(owner, f"{name}_g")
        length.mul_(3)
    found = daam.to_published_state_dict(model)
    assert found.keys() == plain.keys()
    tripled = [key for key, value in found.items() if not torch.equal(value, plain[key])]
    assert tripled and set(tripled) == set(rows(getattr(owner, name)))
    for key in tripled:
        close(found[key], 3 * plain[key], key)
    if new:
        model.load_state_dict(plain)
        for key, value in daam.to_published_state_dict(model).items():
            close(value, plain[key], key)
    else:
        with pytest.raises(RuntimeError, match="is computed by WeightNorm before every forward pass"):
            model.load_state_dict(plain)
