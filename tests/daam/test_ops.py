"""The operators and the autograd.Function in PyTorch: opcheck, compile, functorch, fakes, export, checkpointing.

Without a GPU the operators run kernels, interpreted or emulated (marked kernel), or their CPU implementation; both are
tested.
"""

from unittest import mock

import pytest
import torch
from helpers import ALGORITHMS, Case, attend, broadcast, close, error, inputs, ran, recorded_launches, run, within
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode

import daam
from daam import density_attention, ops
from daam.backend import interpreting
from daam.kernels import launch

KERNELS = interpreting()  # or emulated
BACKENDS = ["eager", pytest.param("triton", marks=pytest.mark.kernel)]
algorithms = pytest.mark.parametrize("algorithm", ALGORITHMS)
# Kernels are the same in all that PyTorch does around them; the interpreter takes up to half a minute for each.
not_interpreted = pytest.mark.not_interpreted("takes long, and shows no more of kernels than the others")
COMPILERS = ["aot_eager", pytest.param("inductor", marks=not_interpreted)]


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()


def leaves(shape=(2, 6, 5), heads=2, dtype=torch.float64, seed=0, device="cpu", algorithm="density"):
    """Return a case, with chunks of unequal length where the algorithm has them, and its leaves."""
    if not ALGORITHMS[algorithm].features:
        shape = (shape[0], shape[1] + 1, *shape[2:])
    case = Case(shape, 1, heads=heads, algorithm=algorithm)
    return case, inputs(case, dtype, seed, device).leaves()


def op_arguments(case, backward, device):
    dtype = torch.float64 if case.shape[1] > 100 else torch.float32  # 140 positions are streamed in float64
    given = inputs(case, dtype, device=device)
    tensors, call = (given.x, *given.params, broadcast(given.mask, case)), (1, *case.spec.settings(case), case.residual)
    if not backward:
        return (*tensors, *call, case.weights, True)
    return (given.grad_y, given.grad_weights, *tensors, None, *call, True, True)


@algorithms
@pytest.mark.parametrize("kernels", [False, pytest.param(True, marks=pytest.mark.kernel)])
@pytest.mark.parametrize(
    ("shape", "layout", "mask", "residual", "weights"),
    [
        ((2, 6, 5), "contiguous", False, False, False),
        pytest.param((2, 6, 5), "transposed", True, True, True, marks=not_interpreted),
        pytest.param((2, 140, 3), "contiguous", False, False, True, marks=not_interpreted),
        ((0, 6, 5), "contiguous", False, False, True),
    ],
)
def test_opcheck(shape, layout, mask, residual, weights, kernels, algorithm, device):
    if KERNELS and not kernels:
        pytest.skip("the operators of the CPU run the kernels in this process")
    if not (KERNELS or kernels or mask or weights):
        pytest.skip("the others show more")
    if algorithm == "stable" and not kernels and (mask or 0 in shape):
        pytest.skip("half a minute, for what the other combinations show")
    if algorithm != "stable" and not (KERNELS or kernels) and shape[1] > 100:
        pytest.skip("the eager operators are the same for all lengths")
    shape = shape if ALGORITHMS[algorithm].features else (shape[0], shape[1] + 1, shape[2])
    case = Case(shape, 1, 2, layout=layout, mask=mask, residual=residual, weights=weights, algorithm=algorithm)
    for name, backward in ((f"{algorithm}_forward", False), (f"{algorithm}_backward", True)):
        torch.library.opcheck(getattr(torch.ops.daam, name).default, op_arguments(case, backward, device))
    x, *args, _save_stats = op_arguments(case, False, device)
    args = (x.requires_grad_(), *args, "triton" if kernels else "eager", "0")
    torch.library.opcheck(getattr(torch.ops.daam, algorithm).default, args)


def with_everything(algorithm, backend):
    """Return a function of x, the parameters and a mask, to be compiled."""

    def plain(x, p, q, mask):
        y, weights = ALGORITHMS[algorithm].call(x, p, q, norm_axis=1, mask=mask, return_weights=True, backend=backend)
        return y.square().sum() + weights.sum()

    return plain


def agree(compiled, batch, algorithm, backend, device):
    """Compare gradients of a compiled `with_everything` with those of a plain one, and see which backend ran."""
    plain = with_everything(algorithm, backend)
    case, tensors = leaves((batch, 6, 5), dtype=torch.float32, device=device, algorithm=algorithm)
    mask = (torch.rand(case.shape[:2]) > 0.3).to(device)
    with recorded_launches() as names:
        grads = torch.autograd.grad(compiled(*tensors, mask), tensors)
    assert (backend == "triton") == (ran(names, "forward") and ran(names, "backward"))
    expected = torch.autograd.grad(plain(*tensors, mask), tensors)
    for name, result, wanted in zip(case.gradients, grads, expected, strict=True):
        within(error(result, wanted), 1e-5, name)


CALLS = [
    ("aot_eager", "eager"),
    pytest.param("aot_eager", "triton", marks=pytest.mark.kernel),
    pytest.param("inductor", "eager", marks=pytest.mark.slow),
    pytest.param("inductor", "triton", marks=[pytest.mark.kernel, not_interpreted]),
]


@algorithms
@pytest.mark.parametrize(("compiler", "backend"), CALLS)
def test_compile_fullgraph(compiler, backend, algorithm, device):
    """Check forward and backward in one graph, with mask and differentiable weights."""
    compiled = torch.compile(with_everything(algorithm, backend), fullgraph=True, backend=compiler)
    agree(compiled, 2, algorithm, backend, device)


@not_interpreted
def test_inductor_compiles_the_formula(device):
    """Check one algorithm: a quarter of a minute each, the others are slow tests."""
    compiled = torch.compile(with_everything("density", "eager"), fullgraph=True)
    agree(compiled, 2, "density", "eager", device)


@algorithms
@pytest.mark.parametrize(("compiler", "backend"), CALLS)
def test_dynamic_shapes_do_not_recompile(compiler, backend, algorithm, device):
    if algorithm != "density" and (compiler == "inductor" or backend == "eager"):
        pytest.skip("half a minute each, for what the other combinations show")
    counter = CompileCounterWithBackend(compiler)
    compiled = torch.compile(with_everything(algorithm, backend), fullgraph=True, dynamic=True, backend=counter)
    graphs = []
    for batch in (4, 6, 9):  # of no other dimension's size: equal sizes are taken for one
        agree(compiled, batch, algorithm, backend, device)
        graphs.append(counter.frame_count)
    assert graphs == graphs[:1] * 3


@pytest.mark.parametrize("backend", BACKENDS)
def test_compile_of_the_module_and_the_context(backend, device):
    layer = daam.MultiHeadDAAM(5, 2).to(device)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x = torch.randn(2, 6, 5).to(device)
    with daam.use_backend(backend), recorded_launches() as names:
        y = compiled(x)
    assert bool(names) == (backend == "triton")
    close(y, layer(x), "y")
    with daam.use_backend("eager"), recorded_launches() as names:
        compiled(x)
    assert not names, "the choice of the context was compiled in"


@algorithms
@pytest.mark.parametrize("backend", BACKENDS)
def test_double_backward_of_a_compiled_call_is_an_error(backend, algorithm, device):
    _, (x, p, q) = leaves(device=device, algorithm=algorithm)
    y = torch.compile(ALGORITHMS[algorithm].call, fullgraph=True, backend="aot_eager")(
        x, p, q, norm_axis=1, backend=backend
    )
    with pytest.raises(RuntimeError, match=r"double backward|create_graph"):
        (dx,) = torch.autograd.grad(y.sum(), x, create_graph=True)
        dx.square().sum().backward()


def loss(case, backend, x, p, q):
    y, weights = attend(case, x, p, q, backend=backend)
    return y.square().sum() + weights.sum()


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=not_interpreted)])
@pytest.mark.parametrize("backend", BACKENDS)
@algorithms
def test_functorch(backend, compiled, algorithm, device):
    """Check that func.grad, vmap, vmap of grad and jvp agree with plain autograd, compiled too."""
    if compiled and backend == "eager" and algorithm != "density":
        pytest.skip("the same autograd.Function for all; kernels have them")
    case, tensors = leaves(device=device, algorithm=algorithm)
    expected = torch.autograd.grad(loss(case, backend, *tensors), tensors)
    wrap = torch.compile(fullgraph=True, backend="aot_eager") if compiled else lambda f: f
    x, p, q = (t.detach() for t in tensors)
    one_case = case.but(axis=0, weights=False)

    grads = wrap(torch.func.grad(lambda *args: loss(case, backend, *args), (0, 1, 2)))(x, p, q)
    for name, result, wanted in zip(case.gradients, grads, expected, strict=True):
        within(error(result, wanted), 1e-12, name)

    def call(x, p, q):
        return attend(one_case, x, p, q, backend=backend)

    y = wrap(torch.func.vmap(call, (0, None, None)))(x, p, q)
    within(error(y, attend(case, x, p, q)[0]), 1e-12, "y, x mapped")
    offsets = torch.stack([p, p + 0.1])
    y = wrap(torch.func.vmap(call, (None, 0, None)))(x[0], offsets, q)
    within(error(y[1], call(x[0], offsets[1], q)), 1e-12, "y, offsets mapped")

    def example_loss(x, p, q):
        return loss(case, backend, x[None], p, q)

    vmapped = wrap(torch.func.vmap(torch.func.grad(example_loss, 2), (0, None, None)))(x, p, q)
    within(error(vmapped.sum(0), expected[2]), 1e-12, "gradients mapped")

    tangent = torch.ones_like(x)
    _, jvp = wrap(lambda x: torch.func.jvp(lambda x: loss(case, backend, x, p, q), (x,), (tangent,)))(x)
    within(error(jvp, (expected[0] * tangent).sum()), 1e-12, "jvp")


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("backend", BACKENDS)
@algorithms
def test_functorch_in_other_orders(backend, algorithm, device):
    """Check backward through vmap, second derivatives and masks under vmap."""
    case, (x, p, q) = leaves(device=device, algorithm=algorithm)
    mask = (torch.rand(case.shape[:2]) > 0.3).to(device)
    one_case = case.but(axis=0, weights=False)
    mapped = torch.func.vmap(lambda x, mask: attend(one_case, x, p, q, mask, backend=backend))
    grads = torch.autograd.grad(mapped(x, mask).square().sum(), (x, p, q))
    plain = attend(case, x, p, q, mask)[0].square().sum()
    for name, result, wanted in zip(case.gradients, grads, torch.autograd.grad(plain, (x, p, q)), strict=True):
        within(error(result, wanted), 1e-12, name)
    second = torch.func.grad(lambda q: torch.func.grad(lambda q: loss(case, backend, x, p, q))(q).square().sum())(q)
    (first,) = torch.autograd.grad(loss(case, backend, x, p, q), q, create_graph=True)
    within(error(second, torch.autograd.grad(first.square().sum(), q)[0]), 1e-12, "second derivative")


@algorithms
@pytest.mark.parametrize("backend", BACKENDS)
def test_gradient_penalty_and_checkpointing(backend, algorithm, device):
    case, (x, p, q) = leaves(device=device, algorithm=algorithm)

    def penalised(call):
        y = call(x, p, q)
        (dx,) = torch.autograd.grad(y.sum(), x, create_graph=True)
        return torch.autograd.grad(y.sum() + dx.square().sum(), (x, p, q))

    settings = (1, *case.spec.settings(case), False)
    expected = penalised(lambda *args: case.spec.reference.formula(*args, None, *settings)[0])
    found = penalised(lambda *args: attend(case, *args, backend=backend)[0])
    for name, result, wanted in zip(case.gradients, found, expected, strict=True):
        within(error(result, wanted), 1e-11, name)
    plain = torch.autograd.grad(loss(case, backend, x, p, q), (x, q))
    penalty = torch.utils.checkpoint.checkpoint(lambda *args: loss(case, backend, *args), x, p, q, use_reentrant=False)
    for result, wanted in zip(torch.autograd.grad(penalty, (x, q)), plain, strict=True):
        assert torch.equal(result, wanted)


@algorithms
@pytest.mark.parametrize("backend", BACKENDS)
def test_x_changed_in_place_is_an_error(backend, algorithm, device):
    case, (x, p, q) = leaves(device=device, algorithm=algorithm)
    x = x * 1
    y, _ = attend(case, x, p, q, backend=backend)
    x.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("compiler", COMPILERS)
def test_compile_of_a_transposed_streamed_input_and_in_place_use(backend, compiler, device):
    """Check channels first seen as channels last, with parameters along a dimension that stands before the chunk in
    memory.
    """
    _, tensors = leaves((2, 3, 1100), heads=2, device=device)
    x, c = tensors[0].detach(), torch.rand(2, 3, dtype=torch.float64).to(device).requires_grad_()

    @torch.compile(fullgraph=True, backend=compiler)
    def attend(x, c):
        return density_attention(x.transpose(1, 2), 0 * c, c + 1, backend=backend).mul_(2)

    (grad,) = torch.autograd.grad(attend(x, c).square().sum(), c)
    plain = 2 * density_attention(x.transpose(1, 2), 0 * c, c + 1, backend="eager")
    within(error(grad, torch.autograd.grad(plain.square().sum(), c)[0]), 1e-11, "d_c")


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("backend", BACKENDS)
@algorithms
def test_batched_gradients(backend, algorithm, device):
    case, tensors = leaves(device=device, algorithm=algorithm)
    y, _ = attend(case, *tensors, backend=backend)
    rows = torch.randn(3, *y.shape, dtype=y.dtype).to(device)
    batched = torch.autograd.grad(y, tensors, rows, is_grads_batched=True, retain_graph=True)
    for i, row in enumerate(rows):
        expected = torch.autograd.grad(y, tensors, row, retain_graph=True)
        for name, result, wanted in zip(case.gradients, batched, expected, strict=True):
            within(error(result[i], wanted), 1e-12, f"{name} of row {i}")


@algorithms
@pytest.mark.parametrize("shape", [(2, 6, 5), (2, 3000, 5)], ids=str)
def test_fake_cuda_tensors(shape, algorithm):
    """Check shapes, dtypes and strides without a GPU, and that long chunks keep statistics."""
    case = Case(shape, 1, heads=2, algorithm=algorithm)
    settings = (1, *case.spec.settings(case), False)
    forward, backward = (getattr(torch.ops.daam, f"{algorithm}_{name}") for name in ("forward", "backward"))
    with FakeTensorMode():
        x = torch.empty(shape, device="cuda", dtype=torch.bfloat16)
        p = torch.empty(2, case.columns, device="cuda")
        y, weights, stats = forward(x, p, p, None, *settings, True, True)
        assert y.shape == weights.shape == x.shape and y.dtype == weights.dtype == torch.bfloat16
        assert stats.dtype == torch.float32 and stats.shape == ((4, 2, 2, 5) if shape[1] == 3000 else (0,))
        dx, *grads = backward(y, None, x, p, p, None, None, *settings, True, True)
        assert dx.shape == x.shape and dx.dtype == x.dtype and dx.is_contiguous()
        assert all(g.shape == p.shape and g.dtype == torch.float32 for g in grads)
        assert attend(case, x, p, p)[0].device.type == "cuda"


@algorithms
def test_meta_tensors(algorithm):
    case = Case((2, 6, 5), 1, heads=2, algorithm=algorithm)
    x = torch.empty(2, 6, 5, device="meta", requires_grad=True)
    p = torch.empty(2, case.columns, device="meta", requires_grad=True)
    for backend in ("auto", "eager"):
        y, _ = attend(case, x, p, p, backend=backend)
        assert y.shape == x.shape and y.is_meta
        y.sum().backward()
        assert x.grad.shape == x.shape and p.grad.shape == p.shape


@algorithms
def test_export(algorithm):
    case, tensors = leaves(dtype=torch.float32, algorithm=algorithm)

    class Attend(torch.nn.Module):
        def forward(self, x, p, q):
            return attend(case, x, p, q)[0]

    args = tuple(t.detach() for t in tensors)
    program = torch.export.export(Attend(), args)
    close(program.module()(*args), attend(case, *args)[0], "y exported")


def test_the_compile_cache_sees_a_change_of_the_source():
    """Check that the version is among the operator's arguments, since its body is not part of the cache's key."""
    found = {"/".join(path.parts[-2:]) for path in ops._SOURCES}
    assert {"daam/ops.py", "reference/chunks.py", "reference/gate.py", "kernels/launch.py"} <= found
    seen = []

    def look(graph, _):
        seen.extend(node.args for node in graph.graph.nodes if node.target is torch.ops.daam.density.default)
        return graph

    _, (x, mean_offset, c) = leaves()
    with mock.patch.object(ops, "_VERSION", "edited"):
        torch.compile(density_attention, backend=look, fullgraph=True)(x, mean_offset, c)
    assert seen and seen[0][-1] == "edited"


@algorithms
def test_eager_saves_nothing_but_its_inputs(algorithm):
    case = Case((4, 24, 33), 1, mask=True, algorithm=algorithm)
    given, saved = inputs(case, torch.bfloat16), []
    tensors = given.leaves()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        attend(case, *tensors, given.mask, backend="eager")
    known = {t.untyped_storage().data_ptr() for t in (*tensors, given.mask)}
    assert saved and all(t.untyped_storage().data_ptr() in known for t in saved)


def test_two_devices_in_one_process_launch_on_their_own():
    """Check that a launch is on the device of the tensors, not on the current one."""
    entered, kernel = [], mock.MagicMock()
    device = mock.MagicMock(side_effect=lambda d: entered.append(d) or mock.MagicMock())
    with mock.patch.multiple(torch.cuda, current_device=lambda: 0, device=device):
        launch.launch(kernel, (1, 1), device=torch.device("cuda", 1), num_warps=4)
        launch.launch(kernel, (1, 1), device=torch.device("cuda", 0), num_warps=4)
    assert entered == [torch.device("cuda", 1)]
    assert kernel.__getitem__.call_count == 2


@pytest.mark.parametrize("dynamic", [None, pytest.param(True, marks=pytest.mark.slow)])
def test_compile_with_padding_values(dynamic):
    """Check two values: the second makes the first a symbol of the graph."""
    x = torch.randn(2, 9, 4)
    p = torch.ones(2, 3)
    attend = torch.compile(daam.mixture_attention, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for value in (0.0, 1.0, -2.5):
        x[:, 3:5] = value
        expected = daam.mixture_attention(x, p, p, padding_value=value)
        close(attend(x, p, p, padding_value=value), expected, f"y, padding {value}")


@pytest.mark.kernel
@algorithms
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_what_is_traced_computes(algorithm, device):
    """Check torch.jit.trace, which makes tensors of sizes: plans of launches cannot be made of those, so that it sees
    operators.
    """
    case = Case((2, 24, 9), 1, weights=False, algorithm=algorithm)
    given, later = (inputs(case, torch.float32, seed, device) for seed in (0, 1))

    def call(x):
        return attend(case, x, *given.params, backend="triton")

    with torch.no_grad():
        traced = torch.jit.trace(call, given.x)
        assert torch.equal(traced(later.x), call(later.x))


@algorithms
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_what_is_traced_without_gradients_is_saved(algorithm, tmp_path):
    """Check that no autograd.Function is in a graph traced under no_grad, which torch.jit.save would refuse, nor a
    batch size.
    """
    for heads in (1, 3):
        case, tensors = leaves(heads=heads, dtype=torch.float32, algorithm=algorithm)
        _, *params = (t.detach() for t in tensors)
        attend = lambda x, case=case, params=params: case.spec.call(x, *params, norm_axis=1)  # noqa: E731
        x, more = torch.randn(case.shape), torch.randn(5, *case.shape[1:])
        with torch.no_grad():
            torch.jit.trace(attend, x).save(str(tmp_path / "traced.pt"))
        close(torch.jit.load(tmp_path / "traced.pt")(more), attend(more), "y of another batch")


@pytest.mark.kernel
@algorithms
def test_a_sign_that_is_not_in_memory(algorithm, device):
    """Check the imaginary part of a conjugate, whose memory is negated when it is read; so may gradients be."""
    case = Case((2, 24, 9), 1, weights=False, algorithm=algorithm)
    given = inputs(case, torch.float32, device=device)
    expected = run(case, given, "triton")
    for name in ("x", "grad_y"):
        value = getattr(given, name)
        setattr(given, name, torch.complex(value, -value).conj().imag)
        assert getattr(given, name).is_neg()
    # elements are next to their real parts now: other strides, and other sums
    for name, found in run(case, given, "triton").items():
        within(error(found, expected[name].cpu().double()), 1e-6, name)
