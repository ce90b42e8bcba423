"""Our modules against the package gaussian-adaptive-attention, and its checkpoints both ways."""

import itertools

import pytest
import torch
from helpers import close, error, golden, within
from torch import nn

import daam

published = pytest.importorskip("gaussian_adaptive_attention")
BACKENDS = ["eager", pytest.param("triton", marks=pytest.mark.kernel)]


def pair(axis, heads, gaussians, padding=None, seed=0):
    """Return the published module and ours with the same random parameters, which went through their state_dict."""
    torch.manual_seed(seed)
    original = published.MultiHeadGaussianAdaptiveAttention(axis, heads, gaussians, padding).double()
    module = daam.MultiHeadGaussianAdaptiveAttention(axis, heads, gaussians, padding).double()
    for p in original.parameters():
        nn.init.uniform_(p, 0.4, 1.6)
    module.load_state_dict(original.state_dict())
    return original, module


def agree(original, module, x, backend, device="cpu"):
    """Check that outputs, details and all gradients of two modules agree. The published one stays on the CPU, as x
    does.
    """
    grad, module = torch.randn_like(x), module.to(device)
    leaves = [x.to(device, copy=True).requires_grad_(), x.clone().requires_grad_()]
    with daam.use_backend(backend):
        y, weights = module(leaves[0], return_attention_details=True)
        y.backward(grad.to(device))
        assert torch.equal(module(leaves[0]), y)
    z, details = original(leaves[1], return_attention_details=True)
    z.backward(grad)
    assert not weights.requires_grad
    within(error(y, z), 1e-9, "y")
    within(error(weights, details), 1e-9, "weights")
    within(error(leaves[0].grad, leaves[1].grad), 1e-9, "dx")
    for name in ("mean_offsets", "c"):
        expected = torch.stack([getattr(head, name).grad for head in original.attention_heads])
        within(error(getattr(module, name).grad, expected), 1e-9, f"d_{name}")


SHAPES = [((9, 14), 0), ((5, 33), -1), ((2, 23, 6), 1), ((3, 7, 17), 2), ((2, 16, 5, 3), 1), ((2, 3, 13, 4), -2)]
SHAPES += [((2, 3, 2, 11, 3), 3), ((2, 3, 2, 5, 9), -1)]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("padding", [None, 0.0, -1.25])
@pytest.mark.parametrize(("shape", "axis"), SHAPES, ids=str)
def test_random_modules_agree(shape, axis, padding, backend, device):
    torch.manual_seed(sum(shape))
    for gaussians, heads in [(1, 2), (3, 1), (8, 4)] if backend == "eager" else [(3, 2)]:
        if shape[axis] // heads < 2:
            continue
        x = torch.randn(shape, dtype=torch.float64)
        if padding is not None:
            x[torch.rand(shape) < 0.2] = padding
        agree(*pair(axis, heads, gaussians, padding, seed=gaussians), x, backend, device)


@pytest.mark.parametrize("gaussians", range(1, 9))
def test_every_number_of_gaussians(gaussians):
    agree(*pair(1, 3, gaussians), torch.randn(2, 20, 5, dtype=torch.float64), "eager")


@pytest.mark.parametrize("axis", [1, -1])
def test_one_head(axis):
    """Check the package's single head, with parameters of shape (num_gaussians,)."""
    original = published.GaussianAdaptiveAttention(axis, 1, 3, None).double()
    copied = daam.GaussianAdaptiveAttention(axis, 1, 3, None).double()
    nn.init.uniform_(original.mean_offsets)
    copied.load_state_dict(original.state_dict())
    original.load_state_dict(copied.state_dict())
    original.load_state_dict(daam.to_published_state_dict(copied))
    x = torch.randn(2, 9, 7, dtype=torch.float64)
    grads = []
    for module in (original, copied):
        leaf = x.clone().requires_grad_()
        y, weights = module(leaf, return_attention_details=True)
        y.square().sum().backward()
        grads.append((y, weights, leaf.grad, module.mean_offsets.grad, module.c.grad))
    for name, a, b in zip(("y", "weights", "dx", "d_mean_offsets", "d_c"), *grads, strict=True):
        within(error(b, a), 1e-9, name)


def test_blocks_agree_and_state_dicts_travel_both_ways():
    sizes = ([1, 2, -1], [2, 3, 4], [2, 3, 1], 3)
    torch.manual_seed(0)
    original = published.GaussianBlock(*sizes).double()
    module = daam.GaussianBlock(*sizes).double()
    module.load_state_dict(original.state_dict())
    restored = published.GaussianBlock(*sizes).double()
    restored.load_state_dict(daam.to_published_state_dict(module))
    for (name, p), q in zip(original.named_parameters(), restored.parameters(), strict=True):
        assert torch.equal(p, q), name
    x = torch.randn(2, 16, 9, dtype=torch.float64)
    y, details = module(x, return_attention_details=True)
    z, expected = original(x, return_attention_details=True)
    within(error(y, z), 1e-9, "y")
    assert details.keys() == expected.keys()
    for name in expected:
        within(error(details[name], expected[name]), 1e-9, name)
    assert torch.equal(module(x), y)


def test_initialisation_is_the_published_one():
    """Check that the same seed gives the same numbers."""
    for gaussians in (1, 4, 40):
        torch.manual_seed(0)
        original = published.MultiHeadGaussianAdaptiveAttention(1, 8, gaussians)
        torch.manual_seed(0)
        state = daam.to_published_state_dict(daam.MultiHeadGaussianAdaptiveAttention(1, 8, gaussians))
        assert all(torch.equal(state[name], p) for name, p in original.state_dict().items())


@pytest.mark.parametrize("backend", BACKENDS)
def test_golden_block(backend, device):
    data, meta = golden("block_three_layers")
    params = {key.removeprefix("param__"): t for key, t in data.items() if key.startswith("param__")}
    block = daam.DensityBlock(meta["norm_axes"], meta["num_heads"], meta["num_gaussians"], 3).double().to(device)
    block.load_state_dict(params)
    x = data["x"].to(device).requires_grad_()
    with daam.use_backend(backend):
        y, details = block(x, return_attention_details=True)
        y.backward(data["grad_out"].to(device))
    results = {"y": y, "grad_x": x.grad} | {f"weights__{name}": t for name, t in details.items()}
    for name, result in results.items():
        within(error(result, data[name]), 1e-10, name)


@pytest.mark.parametrize("backend", BACKENDS)
def test_golden_gate(backend, device):
    data, _ = golden("jepa_channel_gate")
    gate = daam.DensityGate(8).to(device)
    names = {"to_attn.weight": "conv_weight", "to_attn.bias": "conv_bias", "alpha": "alpha"}
    names |= {f"gaa.{name}": name for name in ("mean_offsets", "log_sigma")}
    gate.load_state_dict({entry: data[key] for entry, key in names.items()})
    x = data["x"].to(device).requires_grad_()
    with daam.use_backend(backend):
        y, weights = gate(x)
        y.backward(data["grad_out"].to(device))
    grads = {f"grad_{key}": gate.get_parameter(entry).grad for entry, key in names.items() if entry != "to_attn.bias"}
    grads["grad_alpha"] = grads["grad_alpha"].squeeze(0)  # no dimension is published, FSDP needs one
    for name, result in {"y": y, "gate": weights, "grad_x": x.grad, **grads}.items():
        within(error(result, data[name]), 1e-5, name)


@pytest.mark.parametrize(
    ("c", "outcome"), [([1e12] * 4 + [1e-12] * 4, 0.0), ([1e-12] * 4, float("nan"))], ids=["underflow", "overflow"]
)
def test_where_the_package_underflows_we_do_not(c, outcome):
    """Check that a constant chunk has equal weights, though the product of its Gaussians underflows on the way."""
    x = torch.full((1, 7, 2), 0.5)
    module = published.MultiHeadGaussianAdaptiveAttention(1, 1, len(c))
    module.attention_heads[0].c.data = torch.tensor(c)
    _, details = module(x, return_attention_details=True)
    torch.testing.assert_close(details, torch.full_like(x, outcome), rtol=0, atol=0, equal_nan=True)
    copied = daam.MultiHeadGaussianAdaptiveAttention(1, 1, len(c))
    copied.load_state_dict(module.state_dict())
    _, details = copied(x, return_attention_details=True)
    close(details, torch.full_like(x, 1 / 7), "weights")


def test_every_combination_of_padding_and_heads_in_one_sweep():
    """Check random shapes, as hypothesis would draw them."""
    generator = torch.Generator().manual_seed(1)

    def draw(low, high):
        return int(torch.randint(low, high + 1, (), generator=generator))

    for trial, padding in itertools.product(range(30), (None, 0.0)):
        shape = [draw(1, 6) for _ in range(draw(2, 5))]
        axis = draw(0, len(shape) - 1)
        heads = draw(1, 5)
        shape[axis] = draw(2 * heads, 2 * heads + 9)
        x = torch.randn(shape, generator=generator, dtype=torch.float64)
        if padding is not None:
            x[torch.rand(shape, generator=generator) < 0.2] = padding
        axis = axis - len(shape) if trial % 2 else axis
        agree(*pair(axis, heads, draw(1, 8), padding, seed=trial), x, "eager")
