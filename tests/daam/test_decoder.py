"""The DAT decoder: the paper's parameter counts, its layout, every attention."""

from unittest import mock

import pytest
import torch
from helpers import close, ran, recorded_launches
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.functional import cross_entropy
from torch.nn.utils import prune

import daam
from daam.decoder import ATTENTIONS, DENSITIES, GroupedQueryAttention, grid


def count(module):
    return sum(p.numel() for p in module.parameters())


def test_the_papers_parameter_counts():
    assert count(daam.DATDecoder(24, 1024, 4)) == 336_412
    assert count(daam.DATDecoder(24, 1024, 4, num_heads=1)) == 322_076
    for layers, features, expected in ((24, 1024, 238_104), (40, 5120, 451_112)):
        decoder = daam.DATDecoder(layers, features, 4)
        assert count(decoder) - count(decoder.fc) == expected
    sizes = {(24, 1024, 8): 16_384, (24, 1024, 1): 2_048, (40, 5120, 8): 81_920, (40, 5120, 1): 10_240}
    for (layers, features, heads), expected in sizes.items():
        assert count(daam.DATDecoder(layers, features, 4, num_heads=heads).daam) == expected


@pytest.mark.parametrize(
    ("features", "expected"), [(1024, (32, 32)), (5120, (64, 80)), (384, (16, 24)), (7, (1, 7)), (1, (1, 1))]
)
def test_grid(features, expected):
    assert grid(features) == expected


def composed(decoder, x):
    """Return (scores, weights) of the decoder as the paper describes it, out of the same parameters."""
    attention, weights = decoder.settings["attention"], None
    if attention == "mixture":
        (layer,) = decoder.daam.layers
        y, weights = daam.mixture_attention(x, layer.mean_offsets, layer.c, return_weights=True, backend="eager")
        x = x + y
    elif attention in DENSITIES:
        p = decoder.daam
        x, weights = daam.density_attention(x, p.mean_offset, p.c, return_weights=True, backend="eager")
    if attention in ("gqa", "gqdaam"):
        linear, grouped = decoder.standard
        x = linear(x)
        q, k, v = (project(x) for project in (grouped.query, grouped.key, grouped.value))
        heads = []
        for h in range(8):  # four query heads share one of keys and values
            query, key = slice(64 * h, 64 * h + 64), slice(64 * (h // 4), 64 * (h // 4) + 64)
            scores = torch.softmax(q[..., query] @ k[..., key].transpose(1, 2) / 8, -1)
            heads.append(scores @ v[..., key])
        x = grouped.out(torch.cat(heads, -1))
    elif attention.startswith("mha"):
        x, _ = decoder.standard(x, x, x)
    if attention == "mha_bn":
        std, mean = torch.std_mean(x, (0, 1), correction=0)
        x = (x - mean) / (std**2 + 1e-5).sqrt()
    x = x.reshape(*x.shape[:2], *decoder.grid)
    return decoder.fc(torch.relu(decoder.conv2(torch.relu(decoder.conv1(x)))).flatten(1)), weights


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_attentions(attention):
    torch.manual_seed(0)
    decoder = daam.DATDecoder(6, 48, 3, attention=attention, num_heads=3, num_gaussians=2, conv_channels=8)
    for p in decoder.daam.parameters() if decoder.daam is not None else ():
        nn.init.uniform_(p, 0.5, 1.5)
    x = torch.randn(5, 6, 48, requires_grad=True)
    scores = decoder(x)
    expected, weights = composed(decoder, x)
    close(scores, expected, "scores")
    if attention in DENSITIES:
        repeated, found = decoder(x, return_weights=True)
        close(repeated, scores, "scores with weights")
        close(found, weights, "weights")
    scores.square().sum().backward()
    # scores do not depend on a constant that is added to all of a softmax's inputs
    idle = {name for name, _ in decoder.named_parameters() if name.endswith("key.bias")}
    assert all(p.grad.abs().sum() > 0 for name, p in decoder.named_parameters() if name not in idle)
    assert x.grad.abs().sum() > 0
    grids = {"gqa": (8, 64), "gqdaam": (8, 64)}
    assert decoder.grid == grids.get(attention, (6, 8))


def test_grouped_queries_share_keys_and_values():
    attention = GroupedQueryAttention()
    assert count(attention) == 2 * (512 * 512 + 512) + 2 * (512 * 128 + 128)


def test_initialisation():
    decoder = daam.DATDecoder(24, 64, 4, attention="none")
    for module, fans in ((decoder.conv1, 9 * (24 + 512)), (decoder.conv2, 9 * (512 + 24)), (decoder.fc, 24 * 64 + 4)):
        bound = (6 / fans) ** 0.5
        assert 0.95 * bound < module.weight.abs().max() <= bound


def expected_std(decoder, name, p):
    """Return (standard deviation of a parameter's distribution, None), or (0, the constant) where it is constant."""
    module, leaf = decoder.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2]
    if name.startswith("daam."):
        if leaf in ("mean_offset", "mean_offsets"):
            return 0, 0
        return (1, None) if isinstance(decoder.daam, daam.DensityBlock) else (0, 2)
    if name.startswith("norm."):
        return 0, float(leaf in ("weight", "running_var"))
    if leaf == "in_proj_bias" or name == "standard.out_proj.bias":
        return 0, 0
    xavier = name in ("conv1.weight", "conv2.weight", "fc.weight", "standard.in_proj_weight")
    fan_in, fan_out = nn.init._calculate_fan_in_and_fan_out(p if leaf == "in_proj_weight" else module.weight)
    # uniform distributions: Xavier's, and the one of torch's layers
    bound = (6 / (fan_in + fan_out)) ** 0.5 if xavier else fan_in**-0.5
    return bound / 3**0.5, None


RESETS = {
    "alone": lambda decoder: decoder.reset_parameters(),
    "every module": lambda decoder: [m.reset_parameters() for m in decoder.modules() if hasattr(m, "reset_parameters")],
    "apply": lambda decoder: decoder.apply(lambda m: m.reset_parameters() if hasattr(m, "reset_parameters") else None),
    "construction": lambda decoder: None,
}


@pytest.mark.parametrize("reset", RESETS)
@pytest.mark.parametrize("attention", ATTENTIONS)
def test_a_decoder_from_the_meta_device(attention, reset):
    """Check that every parameter and buffer has its distribution, whichever of torch's ways initialises it."""
    sizes = {"num_layers": 12, "num_features": 64, "num_classes": 10}
    options = {"attention": attention, "num_heads": 6, "num_gaussians": 64, "conv_channels": 48}
    if reset == "construction":
        decoder = daam.DATDecoder(**sizes, **options)
    else:
        with torch.device("meta"):
            decoder = daam.DATDecoder(**sizes, **options)
        assert all(t.is_meta for t in decoder.state_dict().values())
        decoder = decoder.to_empty(device="cpu")
        for t in decoder.state_dict().values():
            t.fill_(77)
    torch.manual_seed(0)
    RESETS[reset](decoder)
    for name, t in decoder.state_dict().items():
        if name == "norm.num_batches_tracked":
            assert t == 0
            continue
        std, constant = expected_std(decoder, name, t)
        if constant is not None:
            assert (t == constant).all(), name
        else:
            assert t.abs().max() <= (std * 3**0.5 * 1.0001 if std != 1 else 9), name
            # of n draws: uniform ones' is off by 0.45/sqrt(n), normal ones' by 0.71/sqrt(n)
            assert abs(t.std().item() / std - 1) < 4 * 0.71 / (len(t.flatten()) - 1) ** 0.5, name


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_a_reset_draws_what_construction_draws(attention):
    """Check that both draw the same numbers for a seed, as before there was a reset: published results have seeds."""
    sizes = {"num_layers": 6, "num_features": 16, "num_classes": 3}
    options = {"attention": attention, "num_heads": 3, "num_gaussians": 2, "conv_channels": 4}
    torch.manual_seed(5)
    constructed, number = daam.DATDecoder(**sizes, **options).state_dict(), torch.rand(1)
    with torch.device("meta"):
        decoder = daam.DATDecoder(**sizes, **options)
    decoder = decoder.to_empty(device="cpu")
    torch.manual_seed(5)
    decoder.reset_parameters()
    assert torch.equal(torch.rand(1), number)
    with FakeTensorMode():
        daam.DATDecoder(**sizes, **options).reset_parameters()
    for name, t in decoder.state_dict().items():
        assert torch.equal(t, constructed[name]), name
    torch.manual_seed(5)
    if attention.startswith("mha"):
        nn.MultiheadAttention(16, 8)
    elif attention == "mixture":
        daam.DensityBlock([-2], [3], [2], 1)
    elif attention.startswith("gq"):
        nn.Linear(16, 512), GroupedQueryAttention()
    inputs = 6 * decoder.grid[0] * decoder.grid[1] if attention.startswith("gq") else 6 * 16
    layers = nn.Conv2d(6, 4, 3, padding=1), nn.Conv2d(4, 6, 3, padding=1), nn.Linear(inputs, 3)
    for layer, name in zip(layers, ("conv1", "conv2", "fc"), strict=True):
        nn.init.xavier_uniform_(layer.weight)
        assert torch.equal(constructed[f"{name}.weight"], layer.weight), name
        assert torch.equal(constructed[f"{name}.bias"], layer.bias), name


@pytest.mark.parametrize("attention", DENSITIES)
@pytest.mark.parametrize("weights", [False, True])
def test_the_backend_reaches_the_densities(attention, weights):
    sizes = {"attention": attention, "num_heads": 2, "num_gaussians": 2, "conv_channels": 2}
    for backend in ("eager", "auto"):
        decoder = daam.DATDecoder(6, 16, 3, **sizes, backend=backend)
        with mock.patch("daam.functional.backend_for", return_value=("eager", "")) as asked:
            decoder(torch.randn(2, 6, 16), return_weights=weights)
        (call,) = asked.call_args_list
        assert call.args[1] == backend
    with pytest.raises(ValueError, match="backend is 'cuda', expected one of"):
        daam.DATDecoder(6, 16, 3, **sizes, backend="cuda")(torch.randn(2, 6, 16))


@pytest.mark.kernel
@pytest.mark.parametrize("attention", DENSITIES)
def test_the_kernels_run_in_the_decoder(attention, device):
    decoder = daam.DATDecoder(
        6, 16, 3, attention=attention, num_heads=2, num_gaussians=2, conv_channels=2, backend="triton"
    ).to(device)
    with recorded_launches() as names:
        decoder(torch.randn(2, 6, 16, device=device))
    assert ran(names, "forward")


def test_every_size_arrives():
    """Check that each size that is passed reaches its layer."""
    decoder = daam.DATDecoder(6, 16, 5, attention="mixture", num_heads=2, num_gaussians=7, conv_channels=9)
    assert decoder.daam.layers[0].c.shape == (2, 7) and decoder.daam.layers[0].norm_axis == -2
    assert decoder.conv1.weight.shape == (9, 6, 3, 3) and decoder.fc.weight.shape == (5, 96)
    assert daam.DATDecoder(6, 16, 5, attention="gqdaam", num_heads=3).daam.c.shape == (3, 16)


@pytest.mark.parametrize("attention", ["daam", "mha", "gqa"])
def test_x_of_another_dtype_or_kind_is_named(attention):
    decoder = daam.DATDecoder(6, 16, 3, attention=attention, num_heads=2, conv_channels=2)
    x = torch.randn(2, 6, 16)
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        for given, wanted in ((dtype, torch.float32), (torch.float32, dtype)):
            with pytest.raises(TypeError, match=f"x has dtype {given}, expected {wanted}, the dtype of conv1's weight"):
                decoder.to(wanted)(x.to(given))
    decoder.float()
    with torch.autocast("cpu", torch.bfloat16):
        assert decoder(x.bfloat16()).dtype == torch.bfloat16
    assert decoder.bfloat16()(x.bfloat16()).dtype == torch.bfloat16


def test_a_decoder_with_a_wrapped_layer_is_published_without_it():
    decoder = daam.DATDecoder(6, 16, 3, num_heads=2, conv_channels=2)
    prune.random_unstructured(decoder.conv1, "weight", 0.5)
    decoder.fc = nn.Sequential(decoder.fc)
    published = daam.to_published_state_dict(decoder)
    assert {"conv1.weight", "conv1.bias", "fc.0.weight", "daam.daams.1.c"} <= set(published)
    assert not any("_mask" in key or "_orig" in key for key in published) and "fc.weight" not in published
    assert torch.equal(published["conv1.weight"], decoder.conv1.weight)


def test_published_checkpoints_of_the_attention():
    """Check that density attention keeps `daams.{h}`, and that the mixture's model is the published one by name."""
    decoder = daam.DATDecoder(6, 16, 3, num_heads=2, conv_channels=4)
    state = decoder.state_dict()
    published = {k: v for k, v in state.items() if not k.startswith("daam.")}
    wanted = {name: torch.rand(2, 16) for name in ("mean_offset", "c")}
    published |= {f"daam.daams.{h}.{name}": t[h : h + 1] for name, t in wanted.items() for h in range(2)}
    decoder.load_state_dict(published)
    assert all(torch.equal(getattr(decoder.daam, name), t) for name, t in wanted.items())

    mixture = daam.DATDecoder(6, 16, 3, attention="mixture", num_heads=2, num_gaussians=4, conv_channels=4)
    names = {"conv1.weight", "conv1.bias", "conv2.weight", "conv2.bias", "fc.weight", "fc.bias"}
    names |= {f"daam.layers.0.attention_heads.{h}.{name}" for h in range(2) for name in ("mean_offsets", "c")}
    published = daam.to_published_state_dict(mixture)
    assert set(published) == names
    mixture.load_state_dict(published)


def test_focal_loss():
    torch.manual_seed(0)
    scores = torch.randn(7, 4, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(4, (7,))
    p = torch.softmax(scores, 1)[torch.arange(7), labels]
    close(daam.focal_loss(scores, labels), (0.25 * (1 - p) ** 2.5 * -p.log()).mean(), "focal loss")
    close(daam.focal_loss(scores, labels, gamma=0, alpha=1), cross_entropy(scores, labels), "cross entropy")
    certain = torch.tensor([[200.0, 0.0]], requires_grad=True)
    (gradient,) = torch.autograd.grad(daam.focal_loss(certain, torch.tensor([0])), certain)
    assert gradient.isfinite().all()
