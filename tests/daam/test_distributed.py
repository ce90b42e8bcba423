"""Two processes over gloo: DistributedDataParallel, FSDP of all kinds, and the DTensors of SUPPORT.md."""

import re
from pathlib import Path

import pytest
import sharded_parameters
import spread
import torch
from helpers import close
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import daam

pytestmark = pytest.mark.usefixtures("one_thread")

SUPPORT = Path(daam.__file__).with_name("SUPPORT.md")
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


def documented_call():
    """Check that what SUPPORT.md shows of DTensors gives the results and gradients of one process."""
    (code,) = re.findall(r"```python\n(from torch\.distributed.*?)```", SUPPORT.read_text(), re.DOTALL)
    plain = [data(), *((torch.rand(2, 8, generator=torch.Generator().manual_seed(seed)) + 0.5) for seed in (2, 3))]
    given = [t.clone().requires_grad_() for t in plain]
    names = {"daam": daam, "mesh": init_device_mesh("cpu", (WORLD,))}
    names |= dict(zip(("x", "mean_offset", "c"), given, strict=True))
    exec(code, names)
    names["y"].square().sum().backward()
    y = daam.density_attention(*(plain := [t.requires_grad_() for t in plain]))
    y.square().sum().backward()
    close(names["y"].full_tensor(), y, "y as documented", TOLERANCES)
    for name, result, wanted in zip(("mean_offset", "c"), given[1:], plain[1:], strict=True):
        close(result.grad, wanted.grad, f"d_{name} as documented", TOLERANCES)


def check(rank):
    documented_call()
    wanted = expected()
    for setup in (ddp, fsdp):
        grads = setup(rank)
        assert grads.keys() == wanted.keys(), setup
        for name, grad in wanted.items():
            close(grads[name], grad, f"{name} of {setup.__name__}", TOLERANCES)
    sharded_parameters.check(rank)


# torch's own: of random numbers on CPUs, and of what its checkpoints still call
@pytest.mark.filterwarnings("ignore:DTensor random operators may not")
@pytest.mark.filterwarnings("ignore:.?_get_pg_default_device", "ignore:Multiple backends are registered")
def test_two_processes(tmp_path):
    """Check all in one pair of processes: each takes seconds to start."""
    spread.run(WORLD, tmp_path, check)
