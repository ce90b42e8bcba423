"""Two processes over gloo: DistributedDataParallel, FSDP2, and DTensors under local_map."""

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

import daam

WORLD = 2


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
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    net = fully_shard(model(), mesh=init_device_mesh("cpu", (WORLD,)))
    net(data().chunk(WORLD)[rank]).square().mean().backward()
    return {name: p.grad.full_tensor() for name, p in net.named_parameters()}


def local_map(rank):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor
    from torch.distributed.tensor.experimental import local_map

    net, mesh = model(), init_device_mesh("cpu", (WORLD,))
    x = distribute_tensor(data(), mesh, [Shard(0)])
    run = local_map(net, out_placements=[Shard(0)], in_placements=([Shard(0)],), device_mesh=mesh)
    y = run(x).redistribute(placements=[Replicate()]).to_local()
    assert torch.allclose(y, net(data()), atol=1e-6)
    return expected()


def worker(rank, store, setup):
    dist.init_process_group("gloo", store=dist.FileStore(store, WORLD), rank=rank, world_size=WORLD)
    try:
        grads, wanted = setup(rank), expected()
        assert grads.keys() == wanted.keys()
        for name, grad in wanted.items():
            assert torch.allclose(grads[name], grad, atol=1e-6), name
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("setup", [ddp, fsdp, local_map], ids=lambda f: f.__name__)
def test_two_processes(setup, tmp_path):
    mp.start_processes(worker, (str(tmp_path / "store"), setup), nprocs=WORLD, start_method="fork")
