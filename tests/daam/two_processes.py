"""One of two processes of test_distributed.py: `python two_processes.py RANK STORE`."""

import re
import sys
from pathlib import Path

import sharded_parameters
import torch
import torch.distributed as dist
from helpers import close
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.distributed.tensor.experimental import local_map

import daam

README = Path(__file__).parents[2] / "README.md"
WORLD = 2
TOLERANCES = (1e-5, 1e-6)  # a sum over examples is two sums here


def model():
    torch.manual_seed(0)
    return nn.Sequential(daam.MultiHeadDAAM(8, 2), nn.Linear(8, 8), daam.MultiHeadDAAM(8, 1))


def data():
    return torch.randn(2 * WORLD, 6, 8, generator=torch.Generator().manual_seed(1))


def expected():
    net = model()
    net(data()).square().mean().backward()
    return {name: p.grad for name, p in net.named_parameters()}


def ddp(rank):
    net = nn.parallel.DistributedDataParallel(model())
    net(data().chunk(WORLD)[rank]).square().mean().backward()
    return {name.removeprefix("module."): p.grad for name, p in net.named_parameters()}


def fsdp(rank):
    net = fully_shard(model(), mesh=init_device_mesh("cpu", (WORLD,)))
    net(data().chunk(WORLD)[rank]).square().mean().backward()
    return {name: p.grad.full_tensor() for name, p in net.named_parameters()}


def sharded_x(rank):
    net, mesh = model(), init_device_mesh("cpu", (WORLD,))
    x = distribute_tensor(data(), mesh, [Shard(0)])
    run = local_map(net, out_placements=[Shard(0)], in_placements=([Shard(0)],), device_mesh=mesh)
    y = run(x).redistribute(placements=[Replicate()])
    y.square().mean().backward()
    grads = {name: p.grad for name, p in net.named_parameters()}
    for grad in grads.values():
        dist.all_reduce(grad)
    close(y.to_local(), net(data()), "y", TOLERANCES)
    return grads


def readme_s_call():
    """Check that what README says of DTensors, as it stands there, gives the gradients of one process; so for the other
    algorithms.
    """
    (code,) = re.findall(r"```python\n(from torch\.distributed.*?)```", README.read_text(), re.DOTALL)
    mesh = init_device_mesh("cpu", (WORLD,))
    p, q = (torch.rand(2, 8, generator=torch.Generator().manual_seed(seed)) + 0.5 for seed in (2, 3))
    for name in ("density_attention", "mixture_attention", "density_gate"):
        plain = [t.clone().requires_grad_() for t in (data(), p, q)]
        y = getattr(daam, name)(*plain)
        y.square().sum().backward()
        pairs = ((data(), Shard(0)), (p, Replicate()), (q, Replicate()))
        given = [distribute_tensor(t, mesh, [placement]).requires_grad_() for t, placement in pairs]
        names = {"daam": daam, "mesh": mesh} | dict(zip(("x", "mean_offset", "c"), given, strict=True))
        exec(code.replace("daam.density_attention", f"daam.{name}"), names)
        names["y"].square().sum().backward()
        close(names["y"].full_tensor(), y, f"y of {name}", TOLERANCES)
        for result, wanted in zip(given, plain, strict=True):
            close(result.grad.full_tensor(), wanted.grad, f"gradients of {name}", TOLERANCES)


def main(rank, store):
    rank = int(rank)
    dist.init_process_group("gloo", store=dist.FileStore(store, WORLD), rank=rank, world_size=WORLD)
    readme_s_call()
    wanted = expected()
    for setup in (ddp, fsdp, sharded_x):
        grads = setup(rank)
        assert grads.keys() == wanted.keys(), setup
        for name, grad in wanted.items():
            close(grads[name], grad, f"{name} of {setup.__name__}", TOLERANCES)
    sharded_parameters.check(rank)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
