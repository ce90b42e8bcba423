"""How modules are made: device and dtype, resets, skip_init, torch.fx, names of one number."""

import inspect
import re
from pathlib import Path

import pytest
import torch
from helpers import close
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.fx import symbolic_trace
from torch.nn.utils import prune

import daam
from daam.decoder import ATTENTIONS, GroupedQueryAttention
from daam.standardize import Standardize

MIGRATING = Path(daam.__file__).with_name("MIGRATING.md")
DECODER = {"num_heads": 2, "num_gaussians": 2, "conv_channels": 2, "standardize": True}
MODULES = {  # a class and the arguments of one that takes (2, 6, 16)
    "MultiHeadDAAM": (daam.MultiHeadDAAM, (16, 2), {"c": 1.5}),
    "DensityAdaptiveAttention": (daam.DensityAdaptiveAttention, (1, 1, 3, None, 0.5), {}),
    "MultiHeadDensityAdaptiveAttention": (daam.MultiHeadDensityAdaptiveAttention, (1, 2, 3), {}),
    "StableMultiHeadDensityAttention": (daam.StableMultiHeadDensityAttention, (1, 2, 3), {}),
    "DensityBlock": (daam.DensityBlock, ([1, 2], [2, 3], [3, 4], 2), {}),
    "StableDensityBlock": (daam.StableDensityBlock, ([1, 2], [2, 3], [3, 4], 2), {}),
    "DensityGate": (daam.DensityGate, (6, 3), {}),
    **{name: (daam.DATDecoder, (6, 16, 3), {"attention": name, **DECODER}) for name in ATTENTIONS},
    "Standardize": (Standardize, (6,), {}),
    "GroupedQueryAttention": (GroupedQueryAttention, (), {}),
}
PUBLIC = [name for name, (kind, _args, _options) in MODULES.items() if hasattr(daam, kind.__name__)]
modules = pytest.mark.parametrize("name", MODULES)
public = pytest.mark.parametrize("name", PUBLIC)


def build(name, **options):
    kind, args, others = MODULES[name]
    return kind(*args, **others, **options)


def floating(module):
    return {key: t for key, t in module.state_dict().items() if t.is_floating_point()}


@modules
def test_every_module_has_a_device_and_a_dtype(name):
    """Check that both reach every parameter and buffer, and that they and backend, which reaches every layer, are
    keywords.
    """
    tensors = floating(build(name, device="meta", dtype=torch.float16))
    assert tensors and {(t.device.type, t.dtype) for t in tensors.values()} == {("meta", torch.float16)}
    if name in PUBLIC:
        kind = MODULES[name][0]
        parameters = inspect.signature(kind).parameters
        assert all(parameters[key].kind is parameters[key].KEYWORD_ONLY for key in ("backend", "device", "dtype"))
        layers = [m for m in build(name, backend="eager", dtype=torch.float64).modules() if hasattr(m, "backend")]
        assert {layer.backend for layer in layers} == ({"eager"} if layers else set())
        assert bool(layers) == (name not in ("gqa", "mha", "mha_bn", "none"))


@modules
def test_a_reset_is_what_construction_draws(name):
    """Check numbers for a seed, and how many are drawn, of skip_init and a reset of the whole; and that a reset of
    every module leaves nothing as it was, but draws constants where construction does.
    """
    torch.manual_seed(5)
    constructed, number = build(name).state_dict(), torch.rand(1)
    kind, args, options = MODULES[name]
    module = torch.nn.utils.skip_init(kind, *args, **options)
    for t in module.state_dict().values():
        t.fill_(77)
    torch.manual_seed(5)
    module.reset_parameters()
    assert torch.equal(torch.rand(1), number)
    for key, t in module.state_dict().items():
        assert torch.equal(t, constructed[key]), key
    for t in module.state_dict().values():
        t.fill_(77)
    for part in module.modules():
        if hasattr(part, "reset_parameters"):
            part.reset_parameters()
    for key, t in module.state_dict().items():
        constant = (constructed[key] == constructed[key].flatten()[0]).all() and t.numel() > 1
        assert torch.equal(t, constructed[key]) if constant else (t != 77).all(), key


def test_reset_widths_are_the_published_numbers():
    """Check the order in which heads are drawn: PyTorch's normal_ gives other numbers for 16 or more at once."""
    torch.manual_seed(0)
    heads = [torch.randn(5) for _ in range(4)]
    torch.manual_seed(0)
    module = daam.MultiHeadDensityAdaptiveAttention(1, 4, 5)
    assert torch.equal(module.c, torch.stack(heads))


# --- One number -----------------------------------------------------------------------------------
@pytest.mark.parametrize("assign", [False, True])
def test_a_gates_factor_loads_with_and_without_a_dimension(assign):
    """Check a whole model: published files, and ours of before, hold an alpha of no dimension."""
    model = nn.Sequential(nn.Linear(4, 4), daam.DensityGate(6, 3))
    for shape in ((), (1,)):
        state = {key: t.clone() for key, t in model.state_dict().items()} | {"1.alpha": torch.full(shape, 0.75)}
        model.load_state_dict(state, assign=assign)
        assert state["1.alpha"].shape == shape
        alpha = model[1].alpha
        assert isinstance(alpha, nn.Parameter) and alpha.shape == (1,) and alpha == 0.75
        published = daam.to_published_state_dict(model)
        assert published["1.alpha"].shape == () and published["1.alpha"] == 0.75
        with torch.no_grad():
            alpha.zero_()


def test_a_gates_factor_does_not_promote():
    """Check that a gate of bf16, under autocast, stays one, as with an alpha of no dimension."""
    gate, x = daam.DensityGate(6, 3), torch.randn(2, 6, 16, dtype=torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        y, weights = gate(x)
    assert y.dtype == weights.dtype == torch.bfloat16
    gate.alpha.data = gate.alpha.data.reshape(())  # as a gate has it that was pickled before, without a group
    del gate.__dict__["group"]
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(gate(x)[0], y)


# --- Names ----------------------------------------------------------------------------------------
@pytest.mark.parametrize("missing", ["mean_offset", "c"])
def test_what_is_missing_of_published_heads_is_named(missing):
    state = daam.to_published_state_dict(daam.MultiHeadDAAM(6, 3))
    without = {key: t for key, t in state.items() if not key.endswith(missing)}
    message = rf"daams has no {missing} for heads \[0, 1, 2\], expected mean_offset and c of all"
    with pytest.raises(RuntimeError, match=message):
        daam.MultiHeadDAAM(6, 3).load_state_dict(without)
    del state[f"daams.1.{missing}"]
    with pytest.raises(RuntimeError, match=rf"daams has no {missing} for heads \[1\], expected"):
        daam.MultiHeadDAAM(6, 3).load_state_dict(state)


def test_heads_that_are_no_heads_are_named():
    """Check that what is no tensor, and a number that nobody writes so, is an error like load_state_dict's own."""
    module = daam.MultiHeadDAAM(6, 3)
    state = daam.to_published_state_dict(module)
    for wrong, came in (([1.0], "is a list"), (None, "is a NoneType"), (torch.ones(5), r"has shape \(5,\)")):
        with pytest.raises(RuntimeError, match=rf"daams\.1\.c {came}, expected a Tensor of shape \(6,\) or \(1, 6\)"):
            module.load_state_dict(state | {"daams.1.c": wrong})
    state["daams.01.c"] = state.pop("daams.1.c")
    with pytest.raises(RuntimeError, match=r'Unexpected key.*"daams\.01\.c"'):
        module.load_state_dict(state)


def test_a_checkpointed_layer_is_published_under_its_name():
    plain = nn.Sequential(daam.MultiHeadDAAM(6, 3), daam.DensityGate(6, 2))
    expected = daam.to_published_state_dict(plain)
    wrapped = nn.Sequential(*map(checkpoint_wrapper, plain))
    found = daam.to_published_state_dict(wrapped)
    assert found.keys() == expected.keys() and all(torch.equal(found[key], t) for key, t in expected.items())
    wrapped.load_state_dict(expected)


def test_c_stays_positive_as_migrating_says():
    """Check its code: a published checkpoint loads, comes back, and steps that lead below 0 do not."""
    checkpoint = {
        key: t.uniform_(0.01, 60) for key, t in daam.to_published_state_dict(daam.MultiHeadDAAM(6, 3)).items()
    }
    (code,) = re.findall(r"```python\n(import torch.*?)```", MIGRATING.read_text(), re.DOTALL)
    exec(code, names := {})
    layer = names["layer"]
    close(layer.c, torch.full((3, 6), 2.0), "c when it is registered")
    layer.load_state_dict(checkpoint)
    for key, t in daam.to_published_state_dict(layer).items():
        close(t, checkpoint[key], key, (1e-4, 1e-4))
    layer(torch.randn(2, 6, 6)).sum().backward()
    optimizer = torch.optim.SGD(layer.parameters(), lr=1.0)
    layer.parametrizations.c.original.grad.fill_(90)
    optimizer.step()
    assert (layer.c > 0).all() and (layer.parametrizations.c.original < -20).all()


# --- torch.fx -------------------------------------------------------------------------------------
@public
def test_a_trace_has_a_leaf(name):
    """Check that a model that torch.fx traces calls the module, with all its arguments, and gives its numbers."""
    module, x, mask = build(name), torch.randn(2, 6, 16), torch.rand(2, 6) > 0.3
    taken = inspect.signature(module.forward).parameters.keys()
    details = taken & {"return_weights", "return_attention_details"}
    options = dict.fromkeys(details if name not in ("gqa", "mha", "mha_bn", "none") else (), True)
    masked = "mask" in taken and name != "DensityGate"  # whose mask has the length of x's last axis

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear, self.inner = nn.Linear(16, 16), nn.Sequential(module)

        def forward(self, x, mask):
            x = self.linear(x)
            return self.inner(x), self.inner[0](x, **options, **({"mask": mask} if masked else {}))

    model = Model().eval()
    traced = symbolic_trace(model)
    assert [n.target for n in traced.graph.nodes if n.op == "call_module"] == ["linear", "inner.0", "inner.0"]
    found, expected = (torch.utils._pytree.tree_leaves(run(x, mask)) for run in (traced, model))
    assert len(found) == len(expected) >= 2 + len(options)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_a_trace_of_a_transformer():
    class Encoder(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(4))

        def forward(self, x, attention_mask=None):
            for layer in self.layers:
                x = layer(x)
            return x

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            decoder = daam.DATDecoder(4, 8, 3, num_heads=1, conv_channels=2)
            self.dat = daam.DensityAdaptiveTransformer(Encoder(), decoder, batch_first=True)

        def forward(self, x, mask):
            return self.dat(x, attention_mask=mask).logits

    model = Model()
    traced = symbolic_trace(model)
    assert [n.target for n in traced.graph.nodes if n.op == "call_module"] == ["dat.pooling", "dat.decoder"]
    x, mask = torch.randn(2, 6, 8), (torch.arange(6) < torch.tensor([[6], [4]])).long()
    assert torch.equal(traced(x, mask), model(x, mask))


def test_what_cannot_be_a_leaf_is_named():
    layer = daam.MultiHeadDAAM(16, 2)
    with pytest.raises(TypeError, match=r"a MultiHeadDAAM is one node to torch\.fx, expected a model that holds it"):
        symbolic_trace(layer)
    layer.register_forward_hook(lambda _module, _x, y: 2 * y)
    with pytest.raises(TypeError, match=r"a MultiHeadDAAM has hooks, which torch\.fx would run twice"):
        symbolic_trace(nn.Sequential(layer))
    pruned, x = prune.random_unstructured(daam.MultiHeadDAAM(16, 2), "mean_offset", 0.5), torch.randn(2, 6, 16)
    assert torch.equal(symbolic_trace(nn.Sequential(pruned))(x), pruned(x))
