"""Importance factor, layer contribution, and the average they are made from."""

import pytest
import torch
from helpers import close

import daam


def test_importance_factor():
    weights = torch.tensor([[0.2, 0.4], [0.6, 1.0]])
    close(daam.importance_factor(weights), torch.tensor([[0.0, 0.25], [0.5, 1.0]]), "importance")
    random = torch.rand(24, 1024, dtype=torch.bfloat16)
    found = daam.importance_factor(random)
    assert found.dtype == torch.float32 and found.aminmax() == (0, 1)
    assert torch.equal(found.flatten().argsort(stable=True), random.flatten().argsort(stable=True)), "order is kept"


def test_weights_are_relative_within_a_head():
    """Check what the docstring of importance_factor says a map shows: what a layer weighs depends on its own head's."""
    x = torch.randn(4, 6, 16, dtype=torch.float64)
    layer = daam.MultiHeadDAAM(num_features=16, num_heads=2, eps=0, dtype=torch.float64)
    weights = layer(x, return_weights=True)[1]
    changed = x.clone()
    changed[:, 0] += 3
    moved = layer(changed, return_weights=True)[1] != weights
    assert moved[:, :3].any((0, 2)).all() and not moved[:, 3:].any(), "the other head's layers moved"
    close(layer(10 * x + 5, return_weights=True)[1], weights, "weights at another scale")


def test_a_constant_map_is_zero():
    assert torch.equal(daam.importance_factor(torch.full((3, 4), 0.7)), torch.zeros(3, 4))


def test_layer_contribution():
    weights = torch.tensor([[1.0, 1.0], [2.0, 4.0]])
    close(daam.layer_contribution(weights), torch.tensor([25.0, 75.0]), "percent")
    close(daam.layer_contribution(torch.zeros(4, 2)), torch.full((4,), 25.0), "percent")
    with pytest.raises(ValueError, match=r"shape \(3,\), expected \(layers, features\)"):
        daam.layer_contribution(torch.ones(3))


@pytest.mark.parametrize("bad", [torch.empty(0, 3), torch.tensor([1.0, float("nan")])], ids=["empty", "nan"])
def test_not_a_map(bad):
    with pytest.raises(ValueError, match="empty or not finite"):
        daam.importance_factor(bad)


def test_weight_map():
    """Check that the average is that of all examples, whatever their batches, and that no batch is kept."""
    batches = [torch.rand(n, 3, 5).requires_grad_() for n in (4, 1, 7)]
    found = daam.WeightMap()
    for batch in batches:
        found.update(batch)
    close(found.mean(), torch.cat(batches).mean(0), "average")
    assert not found.mean().requires_grad and found.count == 12
    with pytest.raises(ValueError, match=r"shape \(2, 5\), expected \(3, 5\)"):
        found.update(torch.rand(4, 2, 5))
    with pytest.raises(ValueError, match="no weights were added"):
        daam.WeightMap().mean()
