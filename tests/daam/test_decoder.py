"""The DAT decoder: the paper's parameter counts, its layout, every attention."""

import pytest
import torch
from helpers import close
from torch import nn
from torch.nn.functional import cross_entropy

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
    """The decoder as the issue's text has it, out of the same parameters."""
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
            own, shared = slice(64 * h, 64 * h + 64), slice(64 * (h // 4), 64 * (h // 4) + 64)
            scores = torch.softmax(q[..., own] @ k[..., shared].transpose(1, 2) / 8, -1)
            heads.append(scores @ v[..., shared])
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
        again, found = decoder(x, return_weights=True)
        close(again, scores, "scores with weights")
        close(found, weights, "weights")
    else:
        with pytest.raises(ValueError, match="has no densities"):
            decoder(x, return_weights=True)
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


def test_published_checkpoints_of_the_attention():
    """Density attention keeps `daams.{h}`, the mixture's model is the published one, name for name."""
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


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_heads": 5}, "num_heads is 5, expected a divisor of num_layers, 24"),
        ({"num_heads": 5, "attention": "mixture"}, "num_heads is 5, expected a divisor"),
        ({"num_heads": 24, "attention": "mixture"}, "expected 2 or more of the 24 layers for each"),
        ({"attention": "daamv2"}, "attention is 'daamv2', expected one of 'daam', 'mixture'"),
        ({"num_classes": 0}, "num_classes is 0, expected 1 or more"),
        ({"attention": "mha", "num_features": 30}, "num_features is 30, expected a multiple of 8 for 'mha'"),
    ],
)
def test_what_does_not_fit(changes, message):
    sizes = {"num_layers": 24, "num_features": 32, "num_classes": 4}
    with pytest.raises(ValueError, match=message):
        daam.DATDecoder(**sizes | changes)


def test_shape_of_x():
    with pytest.raises(ValueError, match=r"x has shape \(2, 5, 16\), expected \(batch, 6, 16\)"):
        daam.DATDecoder(6, 16, 3, num_heads=2)(torch.randn(2, 5, 16))


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
