"""Places of a tensor so far apart that a product in 32 bits would be wrong, though no stride is that long."""

import mmap

import pytest
import torch
from helpers import ALGORITHMS, Case, attend

pytest.importorskip("triton")

import daam

pytestmark = pytest.mark.kernel
STEP, ROWS = 2**29, 9  # of fp16, a gigabyte each: memory that is mapped, and never touched but for a few pages


@pytest.fixture
def far(device):
    """Yield a tensor (9, 2, 8) whose rows are STEP elements apart."""
    size = (ROWS - 1) * STEP + 16
    with torch.device(device):
        memory = (
            torch.frombuffer(mmap.mmap(-1, 2 * size), dtype=torch.float16)
            if device.type == "cpu"
            else torch.empty(size, dtype=torch.float16)
        )
    x = memory.as_strided((ROWS, 2, 8), (STEP, 8, 1))
    return x.copy_(torch.randn(x.shape, generator=torch.Generator().manual_seed(0)))


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_outer_places(algorithm, far, device):
    case = Case(far.shape, 1, params="one", weights=False, algorithm=algorithm)
    p, found = torch.ones(1, case.columns, device=device), []
    for x, backend in ((far, "triton"), (far.contiguous(), "eager")):
        leaf = x.detach().requires_grad_()
        y = attend(case, leaf, 0 * p, p, backend=backend)
        found.append((y.detach(), *torch.autograd.grad(y, leaf, torch.ones_like(y))))
    for result, wanted in zip(*found, strict=True):
        assert (result - wanted).abs().max() < 2e-3


def test_batches_of_the_fused_gate(far, device):
    module, found = daam.DensityGate(2).to(device, torch.float16), []
    for x, backend in ((far, "triton"), (far.contiguous(), "eager")):
        module.backend = backend
        leaf = x.detach().requires_grad_()
        y, _gate = module(leaf)
        found.append((y.detach(), *torch.autograd.grad(y, leaf, torch.ones_like(y))))
    for result, wanted in zip(*found, strict=True):
        assert (result - wanted).abs().max() < 1e-2
