"""The operators and the autograd.Function in PyTorch: opcheck, compile, functorch, fakes, export, checkpointing.

Without a GPU the operators run in Triton's interpreter (marked kernel) or on their CPU implementation; both are tested.
"""

import os
from unittest import mock

import pytest
import torch
from helpers import Case, error, inputs, recorded_launches, run
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode

import daam
from daam import density_attention, ops

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
BACKENDS = ["eager", pytest.param("triton", marks=pytest.mark.kernel)]


@pytest.fixture(autouse=True)
def fresh_compiler(monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_FORCE_DISABLE_CACHES", "1")
    torch._dynamo.reset()


def leaves(shape=(2, 6, 5), heads=2, dtype=torch.float64, seed=0, device="cpu"):
    given = inputs(Case(shape, 1, heads=heads), dtype, seed, device)
    return [t.detach().requires_grad_() for t in (given.x, given.mean_offset, given.c)], given


def op_arguments(shape, layout, mask, residual, weights, backward):
    case = Case(shape, 1, heads=2, layout=layout, mask=mask)
    given = inputs(case, torch.float64 if shape[1] == 300 else torch.float32)  # 300 positions are streamed either way
    mask = None if given.mask is None else given.mask[..., None]
    view = (1, 2, 1e-5, residual)
    tensors = (given.x, given.mean_offset, given.c, mask)
    if not backward:
        return (*tensors, *view, weights, True)
    return (given.grad_y, given.grad_weights if weights else None, *tensors, None, *view, True, True)


@pytest.mark.parametrize("interpreted", [False, pytest.param(True, marks=pytest.mark.kernel)])
@pytest.mark.parametrize(
    ("shape", "layout", "mask", "residual", "weights"),
    [
        ((2, 6, 5), "contiguous", False, False, False),
        ((2, 6, 5), "transposed", True, True, True),
        ((2, 300, 3), "contiguous", True, False, True),
        ((2, 300, 3), "transposed", False, False, False),
        ((0, 6, 5), "contiguous", False, False, True),
    ],
)
def test_opcheck(shape, layout, mask, residual, weights, interpreted):
    if interpreted != INTERPRETED:
        pytest.skip("the other process runs this one")
    for name, backward in (("density_forward", False), ("density_backward", True)):
        op = getattr(torch.ops.daam, name).default
        torch.library.opcheck(op, op_arguments(shape, layout, mask, residual, weights, backward))
    x, mean_offset, c, mask, *view, weights, _ = op_arguments(shape, layout, mask, residual, weights, False)
    args = (x.requires_grad_(), mean_offset, c, mask, *view, weights, "triton" if interpreted else "eager", "0")
    torch.library.opcheck(torch.ops.daam.density.default, args)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
@pytest.mark.parametrize("dynamic", [False, True])
def test_compile_fullgraph(backend, compiler, dynamic):
    """Forward and backward in one graph, static and dynamic, with mask and differentiable weights."""

    @torch.compile(fullgraph=True, dynamic=dynamic, backend=compiler)
    def attend(x, mean_offset, c, mask):
        y, weights = density_attention(x, mean_offset, c, mask=mask, return_weights=True, backend=backend)
        return y.square().sum() + weights.sum()

    def plain(x, mean_offset, c, mask):
        y, weights = density_attention(x, mean_offset, c, mask=mask, return_weights=True, backend=backend)
        return y.square().sum() + weights.sum()

    for batch in (2, 3) if dynamic else (2,):
        tensors, _ = leaves((batch, 6, 5), dtype=torch.float32)
        mask = torch.rand(batch, 6) > 0.3
        with recorded_launches() as names:
            compiled = torch.autograd.grad(attend(*tensors, mask), tensors)
        assert (backend == "triton") == ("_forward" in names and "_backward" in names)
        for ours, theirs in zip(compiled, torch.autograd.grad(plain(*tensors, mask), tensors), strict=True):
            assert error(ours, theirs.double()) < 1e-5


@pytest.mark.parametrize("backend", BACKENDS)
def test_dynamic_shapes_do_not_recompile(backend):
    counter = CompileCounterWithBackend("aot_eager")
    attend = torch.compile(
        lambda *args: density_attention(*args, backend=backend), fullgraph=True, dynamic=True, backend=counter
    )
    graphs = []
    for batch in (3, 4, 7, 9):
        tensors, _ = leaves((batch, 6, 5), dtype=torch.float32)
        attend(*tensors).sum().backward()
        graphs.append(counter.frame_count)
    assert graphs == graphs[:1] * 4


@pytest.mark.parametrize("backend", BACKENDS)
def test_compile_of_the_module_and_the_context(backend):
    layer = daam.MultiHeadDAAM(5, 2)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x = torch.randn(2, 6, 5)
    with daam.use_backend(backend), recorded_launches() as names:
        y = compiled(x)
    assert bool(names) == (backend == "triton")
    torch.testing.assert_close(y, layer(x))
    with daam.use_backend("eager"), recorded_launches() as names:
        compiled(x)
    assert not names, "the choice of the context was compiled in"


@pytest.mark.parametrize("backend", BACKENDS)
def test_double_backward_of_a_compiled_call_is_an_error(backend):
    (x, mean_offset, c), _ = leaves()
    y = torch.compile(density_attention, fullgraph=True, backend="aot_eager")(x, mean_offset, c, backend=backend)
    with pytest.raises(RuntimeError, match=r"double backward|create_graph"):
        (dx,) = torch.autograd.grad(y.sum(), x, create_graph=True)
        dx.square().sum().backward()


def loss(backend, x, mean_offset, c):
    y, weights = density_attention(x, mean_offset, c, return_weights=True, backend=backend)
    return y.square().sum() + weights.sum()


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
def test_functorch(backend, compiled):
    """func.grad, vmap, vmap of grad and jvp agree with plain autograd, compiled too."""
    tensors, _ = leaves()
    expected = torch.autograd.grad(loss(backend, *tensors), tensors)
    wrap = torch.compile(fullgraph=True, backend="aot_eager") if compiled else lambda f: f
    x, mean_offset, c = (t.detach() for t in tensors)

    grads = wrap(torch.func.grad(lambda *args: loss(backend, *args), (0, 1, 2)))(x, mean_offset, c)
    for ours, theirs in zip(grads, expected, strict=True):
        assert error(ours, theirs) < 1e-12

    def attend(x, mean_offset, c):
        return density_attention(x, mean_offset, c, norm_axis=0, backend=backend)

    y = wrap(torch.func.vmap(attend, (0, None, None)))(x, mean_offset, c)
    assert error(y, density_attention(x, mean_offset, c)) < 1e-12
    offsets = torch.stack([mean_offset, mean_offset + 0.1])
    y = wrap(torch.func.vmap(attend, (None, 0, None)))(x[0], offsets, c)
    assert error(y[1], attend(x[0], offsets[1], c)) < 1e-12

    def one(x, mean_offset, c):
        return loss(backend, x[None], mean_offset, c)

    each = wrap(torch.func.vmap(torch.func.grad(one, 2), (0, None, None)))(x, mean_offset, c)
    assert error(each.sum(0), expected[2]) < 1e-12

    tangent = torch.ones_like(x)
    _, jvp = wrap(lambda x: torch.func.jvp(lambda x: loss(backend, x, mean_offset, c), (x,), (tangent,)))(x)
    assert error(jvp, (expected[0] * tangent).sum()) < 1e-12


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("backend", BACKENDS)
def test_functorch_in_other_orders(backend):
    """Backward through vmap, second derivatives and masks under vmap."""
    (x, mean_offset, c), _ = leaves()
    mask = torch.rand(2, 6) > 0.3
    mapped = torch.func.vmap(
        lambda x, mask: density_attention(x, mean_offset, c, norm_axis=0, mask=mask, backend=backend)
    )
    grads = torch.autograd.grad(mapped(x, mask).square().sum(), (x, mean_offset, c))
    plain = density_attention(x, mean_offset, c, mask=mask).square().sum()
    for ours, theirs in zip(grads, torch.autograd.grad(plain, (x, mean_offset, c)), strict=True):
        assert error(ours, theirs) < 1e-12
    second = torch.func.grad(lambda c: torch.func.grad(lambda c: loss(backend, x, mean_offset, c))(c).square().sum())(c)
    (first,) = torch.autograd.grad(loss(backend, x, mean_offset, c), c, create_graph=True)
    assert error(second, torch.autograd.grad(first.square().sum(), c)[0]) < 1e-12


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradient_penalty_and_checkpointing(backend):
    (x, mean_offset, c), _ = leaves()

    def penalised(attend):
        y = attend(x, mean_offset, c)
        (dx,) = torch.autograd.grad(y.sum(), x, create_graph=True)
        return torch.autograd.grad(y.sum() + dx.square().sum(), (x, mean_offset, c))

    from daam import reference

    expected = penalised(lambda *args: reference.density(*args, None, 1, 2, 1e-5, False)[0])
    for ours, theirs in zip(penalised(lambda *args: density_attention(*args, backend=backend)), expected, strict=True):
        assert error(ours, theirs) < 1e-12
    plain = torch.autograd.grad(loss(backend, x, mean_offset, c), (x, c))
    again = torch.utils.checkpoint.checkpoint(
        lambda *args: loss(backend, *args), x, mean_offset, c, use_reentrant=False
    )
    for ours, theirs in zip(torch.autograd.grad(again, (x, c)), plain, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("backend", BACKENDS)
def test_x_changed_in_place_is_an_error(backend):
    (x, mean_offset, c), _ = leaves()
    x = x * 1
    y = density_attention(x, mean_offset, c, backend=backend)
    x.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_compile_of_a_transposed_streamed_input_and_in_place_use(backend, compiler):
    """Channels first seen as channels last, parameters along a dimension that stands before the chunk in memory."""
    tensors, _ = leaves((2, 3, 1100), heads=2)
    x, c = tensors[0].detach(), torch.rand(2, 3, dtype=torch.float64).requires_grad_()

    @torch.compile(fullgraph=True, backend=compiler)
    def attend(x, c):
        return density_attention(x.transpose(1, 2), 0 * c, c + 1, backend=backend).mul_(2)

    (ours,) = torch.autograd.grad(attend(x, c).square().sum(), c)
    plain = 2 * density_attention(x.transpose(1, 2), 0 * c, c + 1, backend="eager")
    assert error(ours, torch.autograd.grad(plain.square().sum(), c)[0]) < 1e-11


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("backend", BACKENDS)
def test_batched_gradients(backend):
    tensors, _ = leaves()
    y = density_attention(*tensors, backend=backend)
    rows = torch.randn(3, *y.shape, dtype=y.dtype)
    batched = torch.autograd.grad(y, tensors, rows, is_grads_batched=True, retain_graph=True)
    for i, row in enumerate(rows):
        for ours, theirs in zip(batched, torch.autograd.grad(y, tensors, row, retain_graph=True), strict=True):
            assert error(ours[i], theirs) < 1e-12


@pytest.mark.parametrize("shape", [(2, 6, 5), (2, 3000, 5)], ids=str)
def test_fake_cuda_tensors(shape):
    """Shapes, dtypes and strides without a GPU; long chunks say that they keep statistics."""
    with FakeTensorMode():
        x = torch.empty(shape, device="cuda", dtype=torch.bfloat16)
        p = torch.empty(2, 5, device="cuda")
        y, weights, stats = torch.ops.daam.density_forward(x, p, p, None, 1, 2, 1e-5, False, True, True)
        assert y.shape == weights.shape == x.shape and y.dtype == weights.dtype == torch.bfloat16
        assert stats.dtype == torch.float32 and stats.shape == ((4, 2, 2, 5) if shape[1] == 3000 else (0,))
        dx, d_mean_offset, d_c = torch.ops.daam.density_backward(
            y, None, x, p, p, None, None, 1, 2, 1e-5, False, True, True
        )
        assert dx.shape == x.shape and dx.dtype == x.dtype and dx.is_contiguous()
        assert d_c.shape == d_mean_offset.shape == p.shape and d_c.dtype == torch.float32
        assert density_attention(x, p, p).device.type == "cuda"


def test_meta_tensors():
    x, p = torch.empty(2, 6, 5, device="meta", requires_grad=True), torch.empty(2, 5, device="meta", requires_grad=True)
    for backend in ("auto", "eager"):
        y = density_attention(x, p, p, backend=backend)
        assert y.shape == x.shape and y.is_meta
        y.sum().backward()
        assert x.grad.shape == x.shape and p.grad.shape == p.shape


def test_export():
    (x, mean_offset, c), _ = leaves(dtype=torch.float32)

    class Attend(torch.nn.Module):
        def forward(self, x, mean_offset, c):
            return density_attention(x, mean_offset, c)

    args = (x.detach(), mean_offset.detach(), c.detach())
    program = torch.export.export(Attend(), args)
    torch.testing.assert_close(program.module()(*args), density_attention(*args))


def test_the_compile_cache_sees_a_change_of_the_source():
    """The composite operator's body is not part of the cache's key; the version among its arguments is."""
    assert {"ops.py", "reference.py", "launch.py", "layout.py"} <= {path.name for path in ops._SOURCES}
    seen = []

    def look(graph, _):
        seen.extend(node.args for node in graph.graph.nodes if node.target is torch.ops.daam.density.default)
        return graph

    (x, mean_offset, c), _ = leaves()
    with mock.patch.object(ops, "_VERSION", "edited"):
        torch.compile(density_attention, backend=look, fullgraph=True)(x, mean_offset, c)
    assert seen and seen[0][-1] == "edited"


def test_eager_saves_nothing_but_its_inputs():
    case = Case((4, 24, 33), 1, mask=True)
    given = inputs(case, torch.bfloat16)
    tensors, saved = [t.detach().requires_grad_() for t in (given.x, given.mean_offset, given.c)], []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        density_attention(*tensors, mask=given.mask, return_weights=True, backend="eager")
    known = {t.untyped_storage().data_ptr() for t in (*tensors, given.mask)}
    assert saved and all(t.untyped_storage().data_ptr() in known for t in saved)


@pytest.mark.parametrize("backend", BACKENDS)
def test_two_devices_in_one_process_launch_on_their_own(backend):
    """The device of a launch is that of the tensors, not the current one."""
    if backend == "eager":
        pytest.skip("launches nothing")
    from daam.kernels import launch

    entered, kernel = [], mock.MagicMock()
    device = mock.MagicMock(side_effect=lambda d: entered.append(d) or mock.MagicMock())
    with mock.patch.multiple(torch.cuda, current_device=lambda: 0, device=device):
        launch.launch(kernel, (1, 1), device=torch.device("cuda", 1), num_warps=4)
        launch.launch(kernel, (1, 1), device=torch.device("cuda", 0), num_warps=4)
    assert entered == [torch.device("cuda", 1)]
    assert kernel.__getitem__.call_count == 2


def test_results_agree_across_backends_for_run():
    """The helper of all kernel tests compares what it says it compares."""
    case = Case((2, 6, 5), 1, heads=2)
    given = inputs(case)
    result = run(case, given, "eager")
    assert set(result) == {"y", "weights", "dx", "d_mean_offset", "d_c"}
