"""What operators cost, as FlopCounterMode counts them, and what a policy of selective checkpointing can name."""

import functools

import pytest
import torch
from helpers import ALGORITHMS, Case, attend, inputs, recorded_launches
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts
from torch.utils.flop_counter import FlopCounterMode

import daam
from daam import costs

OPS = torch.ops.daam


def count(call):
    """Return the operations that are counted in a call, by the names of operators."""
    with FlopCounterMode(display=False) as counter:
        call()
    return {str(op).rpartition(".")[2]: n for op, n in counter.get_flop_counts().get("Global", {}).items()}


@pytest.mark.parametrize(
    ("algorithm", "forward", "backward"),
    [("density", 9, 22), ("mixture", 14, 31), ("gate", 26, 63), ("stable", 14, 31)],
)
def test_operations_and_bytes(algorithm, forward, backward):
    """Check both of three Gaussians, or of parameters that follow features, and chunks that do not stay on chip."""
    spec = ALGORITHMS[algorithm]
    for n, again in ((6, (0, 0)), (100_000, spec.record.reads_again)):
        case = Case((2, n, 5), 1, heads=2, algorithm=algorithm)
        x = torch.empty(case.shape, dtype=torch.bfloat16, device="meta")
        p, how = torch.empty(2, case.columns, device="meta"), (1, *spec.settings(case), False)
        given = (x, p, p, None, *how, True, False), (x, None, x, p, p, None, None, *how, True, True)
        names = f"{algorithm}_forward", f"{algorithm}_backward"
        found = count(lambda: [getattr(OPS, name)(*args) for name, args in zip(names, given, strict=True)])  # noqa: B023
        assert found == dict(zip(names, (forward * x.numel(), backward * x.numel()), strict=True))
        assert costs.count_bytes(names[0], given[0]) == (3 + again[0]) * x.nbytes + 2 * p.nbytes
        assert costs.count_bytes(names[1], given[1]) == (3 + again[1]) * x.nbytes + 4 * p.nbytes


def test_operations_of_layers_and_of_the_fused_gate():
    x, p = torch.empty(2, 6, 5, device="meta"), torch.empty(1, 3, device="meta")
    found = count(lambda: OPS.mixture_layers_forward(x, [p] * 4, [p] * 4, None, 1, 1e-8, None, False, False))
    found |= count(lambda: OPS.mixture_layers_backward(x, x, [p] * 4, [p] * 4, None, 1, 1e-8, None, False, True, True))
    assert found == {"mixture_layers_forward": 4 * 14 * 60, "mixture_layers_backward": (3 * 14 + 4 * 31) * 60}
    one, line = p.new_empty(()), p[0]
    given = (x, p.new_empty(1, 6, 1), p.new_empty(1), one, line, line, None)
    numbers = x.new_empty(2, 5)
    found = count(lambda: OPS.gated_forward(*given, 1, 2, torch.float32, False))
    found |= count(lambda: OPS.gated_backward(x, None, *given, numbers, numbers, None, 1, 2, *[True] * 5))
    assert found == {"gated_forward": 3 * 60 + 26 * 10, "gated_backward": 7 * 60 + 63 * 10}


@pytest.mark.kernel
def test_operations_of_calls(device):
    """Check a function on both backends, and compiled."""
    case = Case((2, 6, 5), 1, heads=2, weights=False)
    leaves = inputs(case, torch.float32, device=device).leaves()

    def call(backend):
        attend(case, *leaves, backend=backend).sum().backward()

    expected = {"density_forward": 9 * 60, "density_backward": 22 * 60}
    assert count(functools.partial(call, "triton")) == expected
    assert count(functools.partial(call, "eager")) == {}
    graphs = []

    def look(graph, _inputs):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(lambda x, p, q: attend(case, x, p, q, backend="triton"), backend=look, fullgraph=True)
    compiled(*leaves)
    assert count(lambda: graphs[0](*leaves)[0].sum().backward()) == expected


@pytest.mark.kernel
@pytest.mark.parametrize("saved", [True, False])
def test_selective_checkpointing(saved, device):
    """Check that a policy that names the operator saves what it returns, and another one has it run again."""
    case = Case((2, 6, 5), 1, heads=2, weights=False)
    leaves = inputs(case, torch.float32, device=device).leaves()

    def choose(_context, op, *_args, **_kwargs):
        named = saved and op is OPS.density_forward.default
        return CheckpointPolicy.MUST_SAVE if named else CheckpointPolicy.PREFER_RECOMPUTE

    def call(*leaves):
        return daam.density_attention(*leaves, backend="triton").sin().sum()

    contexts = functools.partial(create_selective_checkpoint_contexts, choose)
    with recorded_launches() as names:
        found = torch.autograd.grad(checkpoint(call, *leaves, use_reentrant=False, context_fn=contexts), leaves)
    assert names.count("density_forward") == (1 if saved else 2)
    for result, expected in zip(found, torch.autograd.grad(call(*leaves), leaves), strict=True):
        assert torch.equal(result, expected)
