"""DTensors: whatever their placements, results and gradients are those of whole tensors."""

import itertools

import pytest
import spread
import torch
from helpers import ALGORITHMS, close

pytestmark = pytest.mark.usefixtures("one_thread")

SHAPE, HEADS = (4, 12, 6), 3


def arguments(name):
    """Return x, parameters, a mask and a gradient of y, the same in all processes."""
    generator = torch.Generator().manual_seed(1)
    spec = ALGORITHMS[name]
    shape = (HEADS, SHAPE[-1] if spec.features else 2)
    x, grad = (torch.randn(SHAPE, generator=generator, dtype=torch.float64) for _ in range(2))
    normal, uniform = torch.randn(shape, generator=generator), torch.rand(shape, generator=generator)
    mask = torch.rand(SHAPE[:2], generator=generator) > 0.3
    return x, [t.double() for t in spec.draw(normal, uniform)], mask, grad


def whole(name, masked):
    x, params, mask, grad = arguments(name)
    leaves = [t.requires_grad_() for t in (x, *params)]
    y, weights = ALGORITHMS[name].call(*leaves, norm_axis=1, mask=mask if masked else None, return_weights=True)
    return [y, weights, *torch.autograd.grad((y, weights), leaves, (grad, grad))]


def check_placements(rank):
    """Check all placements of x on two dimensions of two processes, with parameters plain, replicated and sharded."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Partial, Replicate, Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("a", "b"))
    kinds = (Replicate(), Shard(0), Shard(1), Shard(2))
    for (name, spec), pair in itertools.product(ALGORITHMS.items(), itertools.product(kinds, kinds)):
        masked = pair[0] == Shard(1) or pair == (Shard(0), Shard(0))
        expected = whole(name, masked)
        x, params, mask, grad = arguments(name)
        for param_pair in (None, (Replicate(), Shard(0)), (Shard(1), Replicate())):
            if param_pair is not None and pair[0] == pair[1]:
                continue
            given_x = distribute_tensor(x, mesh, pair).requires_grad_()
            given = [p.clone() if param_pair is None else distribute_tensor(p, mesh, param_pair) for p in params]
            given = [p.requires_grad_() for p in given]
            out = spec.call(given_x, *given, norm_axis=1, mask=mask if masked else None, return_weights=True)
            assert all(t.placements == (pair if pair != (Shard(1),) * 2 else (Shard(1), Replicate())) for t in out)
            upstream = [distribute_tensor(grad, mesh, [Replicate()] * 2)] * 2
            found = [*out, *torch.autograd.grad(out, (given_x, *given), upstream)]
            for i, (result, wanted) in enumerate(zip(found, expected, strict=True)):
                result = result.full_tensor() if hasattr(result, "full_tensor") else result
                close(result, wanted, f"output {i} of {name}, x {pair}, parameters {param_pair}", (1e-9, 1e-9))
    partial = distribute_tensor(x, mesh, [Replicate()] * 2).redistribute(placements=[Replicate(), Replicate()])
    halves = type(partial).from_local(x / 2, mesh, [Partial(), Replicate()])
    close(spec.call(halves, *params, norm_axis=1).full_tensor(), spec.call(x, *params, norm_axis=1), "partial")


def test_any_placements(tmp_path):
    spread.run(4, tmp_path, check_placements)
