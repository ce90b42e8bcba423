"""DTensors: whatever their placements, results and gradients are those of whole tensors."""

import copy
import functools
import itertools
import re

import pytest
import spread
import torch
import torch.distributed as dist
from helpers import ALGORITHMS, close
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import parallelize_module

import daam
from daam.parallel import HeadParallel

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
    """Check placements of x on two dimensions of two processes, with parameters plain, replicated and sharded."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("a", "b"))
    kinds = (Replicate(), Shard(0), Shard(1), Shard(2))
    ways = itertools.cycle((None, (Replicate(), Shard(0)), (Shard(1), Replicate())))  # of parameters
    for (name, spec), pair in itertools.product(ALGORITHMS.items(), itertools.product(kinds, kinds)):
        masked, of_params = pair[0] == Shard(1) or pair == (Shard(0), Shard(0)), next(ways)
        x, params, mask, grad = arguments(name)
        given_x = distribute_tensor(x, mesh, pair).requires_grad_()
        given = [p.clone() if of_params is None else distribute_tensor(p, mesh, of_params) for p in params]
        given = [p.requires_grad_() for p in given]
        out = spec.call(given_x, *given, norm_axis=1, mask=mask if masked else None, return_weights=True)
        kept = pair if pair != (Shard(1), Shard(1)) else (Shard(1), Replicate())  # of the axis, one dimension
        assert all(t.placements == kept and t.shape == x.shape for t in out)
        upstream = [distribute_tensor(grad, mesh, [Replicate()] * 2)] * 2
        found = [*out, *torch.autograd.grad(out, (given_x, *given), upstream)]
        for i, (result, wanted) in enumerate(zip(found, whole(name, masked), strict=True)):
            result = result.full_tensor() if isinstance(result, DTensor) else result
            close(result, wanted, f"output {i} of {name}, x {pair}, parameters {of_params}", (1e-9, 1e-9))
    halves = DTensor.from_local(x / 2, mesh, [Partial(), Replicate()])
    close(spec.call(halves, *params, norm_axis=1).full_tensor(), spec.call(x, *params, norm_axis=1), "partial")
    check_uneven(mesh)
    check_modules(mesh)
    check_heads(mesh["a"])
    check_errors(mesh)


def check_uneven(mesh):
    """Check an axis that the processes do not divide, along the last axis, whose parameters vary along it."""
    for shape, axis, heads in (((3, 2, 9), 2, 3), ((3, 1, 5), 2, 1), ((5, 3), 0, 1)):
        x, p, q = torch.randn(shape), torch.randn(heads, shape[-1] // (heads if axis else 1)), torch.tensor(0.7)
        dist.broadcast(x, 0), dist.broadcast(p, 0)
        q = q.expand_as(p).contiguous()
        sharded = distribute_tensor(x, mesh, [Replicate(), Shard(axis)])
        y = daam.density_attention(sharded, p, q, norm_axis=axis)
        close(y.full_tensor(), daam.density_attention(x, p, q, norm_axis=axis), f"y of {shape}")


def check_modules(mesh):
    """Check modules on DTensors, whose layers would be fused on a GPU, and with parameters that FSDP2 shards."""
    torch.manual_seed(0)
    x = torch.randn(4, 6, 12)
    modules = (daam.MultiHeadDAAM(12, 2), daam.DensityBlock([1, 1], [2, 2], [2, 3], 2))
    for module, placement in itertools.product(modules, (Shard(0), Shard(1))):
        y = module(distribute_tensor(x, mesh["b"], [placement]))
        close(y.full_tensor(), module(x), type(module).__name__)
    module = copy.deepcopy(modules[0])
    module.forward = functools.partial(attend_within, module, mesh["b"])
    fully_shard(module, mesh=mesh["a"])
    module(x).square().sum().backward()
    modules[0](x).square().sum().backward()
    for p, q in zip(modules[0].parameters(), module.parameters(), strict=True):
        close(q.grad.full_tensor(), p.grad, "gradients under FSDP2", (1e-5, 1e-5))


def attend_within(module, mesh, x):
    """Return y of a module whose x is sharded along norm_axis within its forward."""
    x = DTensor.from_local(x, mesh, [Replicate()]).redistribute(placements=[Shard(1)])
    return type(module).forward(module, x).full_tensor()


def check_heads(mesh):
    """Check heads in tensor parallel: no numbers are exchanged where they divide evenly."""
    torch.manual_seed(0)
    x = torch.randn(2, 12, 6)
    for build in (
        lambda heads: daam.MultiHeadDAAM(6, heads),
        lambda heads: daam.MultiHeadDensityAdaptiveAttention(1, heads, 2),
        lambda heads: daam.StableMultiHeadDensityAttention(1, heads, 2),
    ):
        for heads, exchanges in ((4, 0), (3, 1)):  # of three heads, one is in both
            plain = build(heads)
            shared = parallelize_module(copy.deepcopy(plain), mesh, HeadParallel())
            assert all(p.to_local().shape[0] <= -(-heads // 2) for p in shared.parameters())
            with spread.counted() as found:
                y = shared(x)
            assert (len(found) > 0) == (exchanges > 0), (heads, len(found))
            close(y, plain(x), "y of heads in parallel")
            y.square().sum().backward()
            plain(x).square().sum().backward()
            for p, q in zip(plain.parameters(), shared.parameters(), strict=True):
                assert q.grad.placements == (Shard(0),)
                close(q.grad.full_tensor(), p.grad, "gradients of heads in parallel", (1e-5, 1e-5))
    local = parallelize_module(build(4), mesh, HeadParallel(output_layouts=Shard(1), use_local_output=False))
    assert local(x).placements == (Shard(1),)
    with pytest.raises(TypeError, match="module is a Linear, expected a MultiHeadDAAM or a mixture with heads"):
        parallelize_module(nn.Linear(2, 2), mesh, HeadParallel())
    with pytest.raises(TypeError, match="was called without x by position"):
        local(x=x)


def check_errors(mesh):
    x, p = torch.randn(2, 6, 4), torch.ones(1, 4)
    replicated = [Replicate(), Replicate()]
    given = distribute_tensor(x, mesh, replicated)
    with pytest.raises(TypeError, match="x is a plain Tensor and c a DTensor, expected both to be one"):
        daam.density_attention(x, p, distribute_tensor(p, mesh, replicated))
    with pytest.raises(ValueError, match="group is given beside a DTensor"):
        daam.density_attention(given, p, p, group=mesh["a"])
    with pytest.raises(ValueError, match=re.escape("mask has shape (2, 5), expected x's shape")):
        daam.density_attention(given, p, p, mask=torch.ones(2, 5, dtype=torch.bool))
    with pytest.raises(ValueError, match="group is a DeviceMesh of 2 dimensions, expected one"):
        daam.density_attention(x, p, p, group=mesh)


@pytest.mark.filterwarnings("ignore:FSDP2-wrapped module.*returned a view")  # as every DTensor made of a tensor is
def test_any_placements(tmp_path):
    """Check all in one run of four processes: it takes seconds to start one."""
    spread.run(4, tmp_path, check_placements)
