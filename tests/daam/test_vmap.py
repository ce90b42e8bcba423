"""Batching rules: under vmap an operator runs once for all samples, or twice where uneven heads have samples of their
own, and gives what a loop over samples gives; kernels to the bit, where samples are rows.
"""

import contextlib
import warnings
from unittest import mock

import pytest
import torch
from helpers import ALGORITHMS, Case, attend, broadcast, error, inputs, ran, recorded_launches, within
from torch.fx.experimental.proxy_tensor import make_fx

import daam
from daam.block_ops import BLOCKS
from daam.gated import GATED

N_SAMPLES = 3
BACKENDS = ["eager", pytest.param("triton", marks=pytest.mark.kernel)]
algorithms = pytest.mark.parametrize("algorithm", ALGORITHMS)
# rules are the same for all algorithms, but for uneven heads, which density has none of
KERNELS = [pytest.param(name, "triton", marks=pytest.mark.kernel) for name in ("density", "gate")]
ON_BACKENDS = [*((name, "eager") for name in ALGORITHMS), *KERNELS]


@contextlib.contextmanager
def counted_runs(algorithm, backend):
    """Yield a list that gets the name of each forward or backward pass that the backend runs."""
    if backend == "triton":
        with recorded_launches() as names:
            yield names
        return
    names, reference = [], ALGORITHMS[algorithm].reference
    with contextlib.ExitStack() as stack:
        for name in ("forward", "backward", "formula", "gradient"):
            function = getattr(reference, name)
            record = lambda *args, name=name, function=function: names.append(name) or function(*args)  # noqa: E731
            stack.enter_context(mock.patch.object(reference, name, record))
        yield names


def check_samples(call, dims, args, runs, n_runs):
    """Compare a mapped call with one call a sample, and the number of passes that it runs."""
    n_before = len(runs)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "There is a performance drop")
        found = torch.func.vmap(call, dims)(*args)
    passes = [name for name in runs[n_before:] if not name.endswith("_gradients")]
    assert len(passes) == n_runs, passes
    for i in range(0, N_SAMPLES, 2):
        one = call(*(t if d is None else t.select(d, i) for t, d in zip(args, dims, strict=True)))
        for k, (result, expected) in enumerate(zip(found, one, strict=True)):
            within(error(result[i], expected), 1e-12, f"result {k} of sample {i}")


def drawn(algorithm, device, heads=2):
    """Return a case of one sample, with uneven heads where the algorithm has them, and samples of all its operands."""
    shape = (2, 6 + (not ALGORITHMS[algorithm].features), 5)
    case = Case(shape, 1, heads=heads, mask=True, residual=True, algorithm=algorithm)
    draws = [inputs(case, torch.float64, seed, device) for seed in range(N_SAMPLES)]
    names = {"x": [g.x for g in draws], "p": [g.params[0] for g in draws], "q": [g.params[1] for g in draws]}
    names |= {"mask": [broadcast(g.mask, case) for g in draws], "grad": [g.grad_y for g in draws]}
    return case, {name: torch.stack(ts) for name, ts in names.items()}


@pytest.mark.parametrize(("algorithm", "backend"), ON_BACKENDS)
def test_operators_run_once(backend, algorithm, device):
    """Check forward, backward and composite operators whose samples are rows, and heads, in any dimension."""
    case, ts = drawn(algorithm, device)
    x, p, q, mask, grad = (ts[name] for name in ("x", "p", "q", "mask", "grad"))
    how = (1, *case.spec.settings(case), True)
    forward, backward, composite = (getattr(torch.ops.daam, algorithm + end) for end in ("_forward", "_backward", ""))
    pieces = 1 if case.spec.features else 2  # of heads, where samples are heads

    def run(x, p, q, mask):
        return forward(x, p, q, mask, *how, True, False)[:2]

    def run_composite(x, p, q, mask):
        return composite(x, p, q, mask, *how, True, backend, "0")

    def differentiate(x, p, mask, grad):
        return backward(grad, 0.5 * grad, x, p, q[0], mask, None, *how, True, True)

    def differentiate_x(x, grad):
        return backward(grad, None, x, p[0], q[0], mask[0], None, *how, True, False)[:1]

    with counted_runs(algorithm, backend) as runs:
        check_samples(run, (2, None, None, 1), (x.movedim(0, 2), p[0], q[0], mask.movedim(0, 1)), runs, 1)
        check_samples(run, (None, 1, 0, None), (x[0], p.movedim(0, 1), q, mask[0]), runs, pieces)
        check_samples(run_composite, (0, None, None, None), (x, p[0], q[0], mask[0]), runs, 1)
        check_samples(differentiate, (0, None, 0, 3), (x, p[0], mask, grad.movedim(0, 3)), runs, pieces)
        check_samples(differentiate_x, (None, 0), (x[0], grad), runs, 1)
        rows = torch.func.vmap(run, (0, None, None, 0))(x, p[0], q[0], mask)
        alone = run(x[1], p[0], q[0], mask[1])
    if backend == "triton":
        assert all(torch.equal(row[1], one) for row, one in zip(rows, alone, strict=True))


@pytest.mark.parametrize(("algorithm", "backend"), ON_BACKENDS[:5])
def test_functions_run_once(backend, algorithm, device):
    """Check that the forward pass is the backend's, one of all samples, and gradients are those of each sample, of
    samples inside samples too.
    """
    case, ts = drawn(algorithm, device)
    case, x, (p, q) = case.but(mask=False, weights=False), ts["x"], (ts["p"][0], ts["q"][0])

    def loss(params, x):
        return attend(case, x, *params, backend=backend).square().sum()

    with counted_runs(algorithm, backend) as runs:
        y = torch.func.vmap(torch.func.vmap(lambda x: attend(case, x, p, q, backend=backend)))(torch.stack([x, 2 * x]))
        assert len(runs) == 1 and ran(runs, "forward")
    within(error(y[1, 2], attend(case, 2 * x[2], p, q, backend=backend)), 1e-12, "y")
    with counted_runs(algorithm, backend) as runs:
        grads = torch.func.vmap(torch.func.grad(loss), (None, 0))((p, q), x)
        assert runs == [f"{algorithm}_forward"] if backend == "triton" else runs == ["forward", "gradient"]
    leaves = [t.detach().requires_grad_() for t in (p, q)]
    for i in range(N_SAMPLES):
        expected = torch.autograd.grad(loss(leaves, x[i]), leaves)
        for name, result, wanted in zip(case.gradients[1:], grads, expected, strict=True):
            within(error(result[i], wanted), 1e-11, f"{name} of sample {i}")


def count_nodes(call, shape):
    """Return how many nodes the graph of a call has that is mapped over 2, 8 and 32 samples, x of a shape each."""
    xs = [torch.randn(n, *shape) for n in (2, 8, 32)]
    return [len(make_fx(torch.func.vmap(call))(x).graph.nodes) for x in xs]


@algorithms
def test_graphs_do_not_grow_with_samples(algorithm):
    """Check the composite operators, which stand for calls while compiling: of functions, blocks and gates."""
    p, shape, ops = torch.ones(2, 5 if algorithm == "density" else 3), (6, 5), torch.ops.daam
    settings = ALGORITHMS[algorithm].record.settings_of(1, None, None)
    how = (None, 0, *settings, False)
    calls = [(lambda x: getattr(ops, algorithm)(x, p, p, *how, False, "eager", "0"), shape)]
    if algorithm == "mixture":
        calls.append((lambda x: ops.mixture_layers(x, [p, p], [p, p], *how, None, True, "eager", "0"), shape))
    if algorithm == "gate":
        numbers = torch.ones(1, 6, 1), torch.ones(1), torch.tensor(1.0), p[0], p[0], None, 1, 2, torch.float32
        calls.append((lambda x: ops.gated(x, *numbers, "0"), (2, 6, 5)))
    counts = [count_nodes(*call) for call in calls]
    assert all(len(set(count)) == 1 and count[0] > 5 for count in counts), counts


def test_compiled_graphs_do_not_grow_with_samples():
    """Check what Dynamo and AOTAutograd make of the public function, which were 65 nodes of 2 and 935 of 32 samples."""
    nodes, p = [], torch.ones(2, 5)

    def look(graph, _inputs):
        nodes.append(sum(node.target is torch.ops.daam.density.default for node in graph.graph.nodes))
        return graph

    for n in (2, 32):
        torch._dynamo.reset()
        call = torch.func.vmap(lambda x: daam.density_attention(x, p, p, norm_axis=0))
        x = torch.randn(n, 6, 5)
        y = torch.compile(call, fullgraph=True, backend=look, dynamic=False)(x)
        within(error(y, call(x)), 1e-6, "y")
    assert nodes == [1, 1]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("algorithm", ["mixture"])
def test_layers_run_once(backend, algorithm, device):
    case, ts = drawn(algorithm, device)
    x, p, q, mask, grad = (ts[name] for name in ("x", "p", "q", "mask", "grad"))
    operators, how = BLOCKS[algorithm], (1, *case.spec.settings(case), True)
    kernels = backend == "triton"

    def run(x, p, mask):
        y, weights = operators.forward_op(x, [p, q[1]], [q[0], q[1]], mask, *how, True)
        return y, *weights

    def differentiate(x, p, grad):
        dx, grads = operators.backward_op(grad, x, [p, p], [q[0], q[1]], mask[0], *how, True, True)
        return dx, *grads

    def run_composite(x, p):
        return operators.op(x, [p, p], [q[0], q[0]], None, *how, None, True, backend, "0")

    with counted_runs(algorithm, backend) as runs:  # two layers are two passes on the eager backend, or one kernel
        passes = 1 if kernels else 2
        check_samples(run, (0, None, 0), (x, p[0], mask), runs, passes)
        check_samples(run, (0, 0, None), (x, p, mask[0]), runs, 2 * passes)
        check_samples(differentiate, (0, None, 0), (x, p[0], grad), runs, 2 if kernels else 6)
        check_samples(run_composite, (0, None), (x, p[0]), runs, passes)


@pytest.mark.parametrize("order", [(1, 2), (2, 1)], ids=["times_last", "channels_last"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_gated_runs_once(backend, order, device):
    """Check samples that share parameters, which run once, and those that do not, which the formula takes."""
    torch.manual_seed(0)
    draw = lambda *shape: torch.randn(N_SAMPLES, *shape, dtype=torch.float64).to(device)  # noqa: E731
    x, grad = (draw(2, 3, 7) if order == (1, 2) else draw(2, 7, 3) for _ in range(2))
    params, mask = [draw(1, 3, 1), draw(1), draw(), draw(2), draw(2)], draw(2, 7) > -0.5
    shared, how = [t[0] for t in params], (*order, torch.float64)

    def run(x, mask, *params):
        return GATED.forward_op(x, *params, mask, *how, True)[:2]

    def differentiate(x, grad, mask, p, gates, *params, flags=(True,) * 5):
        found = GATED.backward_op(grad, 0.5 * p.unsqueeze(1), x, *params, mask, p, gates, None, *order, *flags)
        return found[:2] + found[3:]  # without that of the bias, which is 0 but for its rounding

    def differentiate_x(*tensors):
        return differentiate(*tensors, *shared, flags=(True, *[False] * 4))[:1]

    kernels = backend == "triton"
    with recorded_launches() as launches:
        check_samples(run, (0, 0, *[None] * 5), (x, mask, *shared), launches, 3 if kernels else 0)
        check_samples(run, (0, None, *[0] * 5), (x, mask[0], *params), launches, 0)
        _, gate, p, _, _ = GATED.forward_op(x.flatten(0, 1), *shared, mask.flatten(0, 1), *how, False)
        saved = (x, grad, mask, *(t.reshape(N_SAMPLES, 2, 7) for t in (p, gate)))
        check_samples(differentiate, (*[0] * 5, *[None] * 5), (*saved, *shared), launches, 0)
        check_samples(differentiate_x, (0,) * 5, saved, launches, 3 if kernels else 0)
