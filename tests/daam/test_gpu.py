"""What only a GPU shows: compiled graphs, CUDA graphs, synchronisation, peak memory; `make gpu` runs it."""

import pytest
import torch
from helpers import ALGORITHMS, Case, attend, error, inputs, run, within
from torch._dynamo.utils import counters

from daam.kernels import tiles

pytestmark = pytest.mark.gpu

# chunks on chip and streamed, along the fastest dimension and along another
SHAPES = [((64, 24, 4096), 1, 8), ((8, 2048, 512), 1, 2), ((4096, 1024), -1, 1), ((64, 20000), -1, 1)]
CASES = [
    Case(shape, axis, heads, 4 if name != "density" else "features", algorithm=name)
    for name in ALGORITHMS
    for shape, axis, heads in SHAPES
]
cases = pytest.mark.parametrize("case", CASES, ids=str)


def given_on(device, case):
    return inputs(case, torch.bfloat16, device=device)


def results(case, given, attention):
    """Return y, weights and gradients of attention(x, p, q)."""
    leaves = given.leaves()
    outputs = attention(*leaves)
    return [*outputs, *torch.autograd.grad(outputs, leaves, [given.grad_y, given.grad_weights])]


@cases
@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_compiled(case, mode, device):
    """Check that a compiled graph calls the same kernels; with "reduce-overhead", calls after the second replay a CUDA
    graph.
    """
    torch._dynamo.reset()
    counters["inductor"].clear()

    def attention(x, p, q):
        return attend(case, x, p, q, backend="triton")

    compiled = torch.compile(attention, fullgraph=True, mode=mode)
    for seed in range(4):  # other numbers every time: a stale replay shows
        given = inputs(case, torch.bfloat16, seed=seed, device=device)
        torch.compiler.cudagraph_mark_step_begin()
        found = [t.clone() for t in results(case, given, compiled)]
        for result, wanted in zip(found, results(case, given, attention), strict=True):
            assert torch.equal(result, wanted)
    assert not counters["inductor"]["cudagraph_skips"]


@cases
def test_cuda_graph(case, device):
    """Check forward and backward captured by hand and replayed on other numbers."""
    given, later = given_on(device, case), inputs(case, torch.bfloat16, seed=1, device=device)
    leaves = given.leaves()

    def step():
        outputs = attend(case, *leaves, backend="triton")
        return [*outputs, *torch.autograd.grad(outputs, leaves, [given.grad_y, given.grad_weights])]

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()  # compiles
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        for static, fresh in zip(leaves, later.leaves(), strict=True):
            static.copy_(fresh)
        given.grad_y.copy_(later.grad_y)
        given.grad_weights.copy_(later.grad_weights)
    graph.replay()
    for found, wanted in zip(captured, run(case, later, "triton").values(), strict=True):
        assert torch.equal(found, wanted)


@cases
def test_nothing_waits_for_the_device(case, device):
    given = given_on(device, case)
    run(case, given, "triton")  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        run(case, given, "triton")
    finally:
        torch.cuda.set_sync_debug_mode("default")


@cases
def test_peak_memory(case, device):
    """Check that y and dx, a tenth of them for statistics, and partial sums of at most twice the programs that fit at
    once are all the memory.
    """
    case = case.but(weights=False)
    given = given_on(device, case)
    run(case, given, "triton")
    torch.cuda.synchronize()
    start = torch.cuda.memory_stats()["requested_bytes.all.current"]
    torch.cuda.reset_peak_memory_stats()
    found = run(case, given, "triton")
    torch.cuda.synchronize()
    outputs = sum(t.nbytes for t in found.values())
    rows = min(2 * tiles.FILL, given.x.numel() // given.x.shape[-1])
    partials = 2 * 4 * rows * (given.x.shape[-1] if case.feature_axis is not None else 4 * case.columns)
    peak = torch.cuda.memory_stats()["requested_bytes.all.peak"] - start
    assert peak <= 1.1 * outputs + partials + 2**20


@cases
def test_like_the_eager_backend(case, device):
    given = given_on(device, case)
    expected = run(case, given, "eager")
    for name, found in run(case, given, "triton").items():
        within(error(found, expected[name]), 2e-2, name)
