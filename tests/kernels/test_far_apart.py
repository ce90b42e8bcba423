"""Places of a tensor so far apart that a product in 32 bits would be wrong, though no stride is that long."""

import pytest
import torch
from helpers import ALGORITHMS, Case, attend

pytest.importorskip("triton")

from far import spread_out

import daam

pytestmark = pytest.mark.kernel
STEP, ROWS, SIZE = 2**29, 9, 4096  # of fp16: a gigabyte from row to row, which is mapped, and hardly touched


def draw(device, *shape):
    """Return a random tensor of ROWS times a shape, whose rows are STEP elements apart."""
    x = torch.randn((ROWS, *shape), generator=torch.Generator().manual_seed(0))
    return spread_out(x.to(device, torch.float16), 0, STEP)


@pytest.mark.parametrize(
    ("algorithm", "shape", "axis"),
    [*((name, (2, 8), 1) for name in ALGORITHMS), ("density", (SIZE,), 1), ("density", (16,), 0)],
    ids=str,
)
def test_attention(algorithm, shape, axis, device):
    """Check rows of the outer dimension, a row a tile, and rows that are positions of a chunk."""
    far = draw(device, *shape)
    case = Case(far.shape, axis, params="one", weights=False, algorithm=algorithm)
    p, found = torch.ones(1, case.columns, device=device), []
    for x, backend in ((far, "triton"), (far.contiguous(), "eager")):
        leaf = x.detach().requires_grad_()
        y = attend(case, leaf, 0 * p, p, backend=backend)
        found.append((y.detach(), *torch.autograd.grad(y, leaf, torch.ones_like(y))))
    for result, wanted in zip(*found, strict=True):
        assert (result - wanted).abs().max() < 4e-3


def test_batches_of_the_fused_gate(device):
    far, module, found = draw(device, 2, 8), daam.DensityGate(2).to(device, torch.float16), []
    for x, backend in ((far, "triton"), (far.contiguous(), "eager")):
        module.backend = backend
        leaf = x.detach().requires_grad_()
        y, _gate = module(leaf)
        found.append((y.detach(), *torch.autograd.grad(y, leaf, torch.ones_like(y))))
    for result, wanted in zip(*found, strict=True):
        assert (result - wanted).abs().max() < 1e-2
