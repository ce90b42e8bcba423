"""The fused gate in PyTorch: which calls it takes, dtypes, memory, operators, compile, functorch, fakes."""

import contextlib

import pytest
import torch
from helpers import golden, ran, recorded_launches, within
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode

import daam
from bench.formulas import PlainGate
from bench.host import taking_any_tensor
from daam.backend import interpreting
from daam.reference import gated as reference

kernel = pytest.mark.kernel
OPERATORS = torch.ops.daam


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()


def module_of(dtype=torch.float64, backend="triton", device="cpu", channels=6, gaussians=3):
    """Return a module with random parameters."""
    generator = torch.Generator().manual_seed(0)
    module = daam.DensityGate(channels, gaussians, backend=backend)
    for p in module.parameters():
        p.data = 0.5 * torch.randn(p.shape, generator=generator)
    return module.to(device, dtype)


def loss(module, x, mask=None):
    y, gate = module(x, mask=mask)
    return y.square().sum() + gate.sum()


def gradients(module, x, mask=None):
    """Return the gradients of x and the parameters."""
    x = x.detach().requires_grad_()
    return torch.autograd.grad(loss(module, x, mask), [x, *module.parameters()])


def alike(found, expected, bound=1e-11):
    for i, (result, wanted) in enumerate(zip(found, expected, strict=True)):
        assert (result.shape, result.dtype) == (wanted.shape, wanted.dtype)
        within((result - wanted).abs().max().item() / max(1.0, wanted.abs().max().item()), bound, f"gradient {i}")


# --- Which calls ----------------------------------------------------------------------------------
@kernel
def test_which_calls_are_fused(device):
    x = torch.randn(2, 6, 20, dtype=torch.float64).to(device)
    module = module_of(device=device)
    assert module.fusion_for(x) == ("fused", "requested by the argument backend")
    assert module.fusion_for(x, x[:, 0] > 0)[0] == "fused"
    assert module.fusion_for(x[:, 0, 0]) == ("formula", "x has shape (2,)")  # which forward refuses
    assert module.fusion_for(x[..., :0]) == ("formula", "x has shape (2, 6, 0)")
    assert module_of(backend="eager").fusion_for(x) == (
        "formula", "the backend is eager: requested by the argument backend"
    )  # fmt: skip
    with daam.use_backend("eager"):
        assert module_of(backend="auto").fusion_for(x)[0] == "formula"
    with torch.autograd.forward_ad.dual_level():
        assert module.fusion_for(x)[0] == "formula"


def replace(module, name, build):
    setattr(module, name, build(getattr(module, name)))


def scaled(module):
    module.forward = lambda x: type(module).forward(module, x) * 2
    return module


def wide(_module):
    return nn.Conv1d(6, 1, 3, padding=1)


REPLACED = {
    "to_attn has hooks": lambda m: m.to_attn.register_forward_hook(lambda _m, _x, y: 2 * y),
    "gaa has hooks": lambda m: m.gaa.register_forward_pre_hook(lambda _m, x: (2 * x[0], *x[1:])),
    "to_attn is a Sequential": lambda m: replace(m, "to_attn", nn.Sequential),
    "to_attn is a ParametrizedConv1d": lambda m: nn.utils.parametrizations.weight_norm(m.to_attn),
    "to_attn.forward is replaced": lambda m: replace(m, "to_attn", scaled),
    "bias is a NoneType, no plain Tensor": lambda m: replace(m, "to_attn", lambda _m: nn.Conv1d(6, 1, 1, bias=False)),
    "to_attn has stride (1,) and padding (1,)": lambda m: replace(
        m, "to_attn", lambda _m: nn.Conv1d(6, 1, 3, padding=1)
    ),
}


@kernel
@pytest.mark.parametrize("reason", REPLACED)
def test_what_is_hooked_or_replaced_is_called(reason, device):
    x = torch.randn(2, 6, 20).to(device)
    found = []
    for backend in ("triton", "eager"):
        module = module_of(torch.float32, backend, "cpu")
        torch.manual_seed(0)
        REPLACED[reason](module)
        if isinstance(module.to_attn, nn.Sequential):  # whose channels `forward` asks for
            module.to_attn.in_channels, module.to_attn.weight = 6, module.to_attn[0].weight
        module.to(device)
        with recorded_launches() as names:
            found.append(module(x))
        assert not ran(names, "gated_")
        assert module.fusion_for(x)[0] == "formula"
        if backend == "triton":
            assert module.fusion_for(x)[1] == reason
    alike(*found, 1e-5)


@kernel
def test_hooks_of_all_modules(device):
    x, module = torch.randn(2, 6, 20).to(device), module_of(torch.float32, device=device)
    called = []
    handle = nn.modules.module.register_module_forward_hook(lambda module, _x, _y: called.append(module))
    with contextlib.ExitStack() as stack:
        stack.callback(handle.remove)
        module(x)
        assert module.fusion_for(x) == ("formula", "all modules have hooks")
    assert called == [module.to_attn, module.gaa, module]


@pytest.mark.parametrize("mask", [None, torch.arange(16).expand(2, 16) < torch.tensor([[16], [9]])], ids=str)
def test_eager_is_the_formula_to_the_bit(mask):
    x, module = torch.randn(2, 6, 16), module_of(torch.float32, "auto")
    y, gate = module(x, mask=mask)
    valid = x if mask is None else x.masked_fill(~mask[:, None], 0)
    valid_gate = module.gaa(module.to_attn(valid), None if mask is None else mask[:, None])
    expected = valid * (1 + module.alpha * valid_gate)
    expected = expected if mask is None else torch.where(mask[:, None], expected, x)
    assert torch.equal(gate, valid_gate) and torch.equal(y, expected)


# --- Outputs --------------------------------------------------------------------------------------
HALVES = torch.float16, torch.bfloat16


@kernel
@pytest.mark.parametrize("dtype", [*HALVES, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("cast", [None, *HALVES], ids=str)
def test_dtypes(dtype, cast, device):
    """Check the dtypes of outputs and gradients against the formula's, parameters of another dtype and autocast too."""
    for given in {dtype, torch.bfloat16, torch.float32}:
        found = []
        for backend in ("triton", "eager"):
            module, x = module_of(dtype, backend, device), torch.randn(2, 6, 20).to(device, given).requires_grad_()
            module.gaa.float()
            module.alpha.data = module.alpha.data.double()
            try:
                with torch.autocast(device.type, cast, enabled=cast is not None):
                    outputs = module(x)
                    assert (module.fusion_for(x)[0] == "fused") == (backend == "triton")
            except TypeError as error:
                found.append(str(error))
                continue
            grads = torch.autograd.grad(outputs, [x, *module.parameters()], [torch.ones_like(t) for t in outputs])
            found.append([t.dtype for t in (*outputs, *grads)])
        assert found[0] == found[1], given


@kernel
def test_the_published_module(device):
    """Check results and gradients against the published formula, in float64, of a published case's inputs."""
    data, _ = golden("jepa_channel_gate")
    found = []
    for build in (lambda: daam.DensityGate(8, backend="triton"), lambda: PlainGate(8)):
        module = build()
        names = {"to_attn.weight": "conv_weight", "to_attn.bias": "conv_bias", "alpha": "alpha"}
        names |= {f"gaa.{name}": name for name in ("mean_offsets", "log_sigma")}
        module.load_state_dict({entry: data[key] for entry, key in names.items()})
        module, x = module.double().to(device), data["x"].double().to(device).requires_grad_()
        y, gate = module(x)
        found.append(
            (y, gate, *torch.autograd.grad(y, [x, *module.parameters()], data["grad_out"].double().to(device)))
        )
    alike(*found, 1e-9)


@kernel
@pytest.mark.parametrize("order", [(0, 1, 2), (0, 2, 1), (2, 1, 0), (1, 0, 2)], ids=str)
def test_memory_order(order, device):
    """Check that y and dx lie in memory as x does, and contiguous where x is expanded."""
    shape, module = (3, 6, 20), module_of(torch.float32, device=device)
    x = torch.randn([shape[i] for i in order]).to(device).permute([order.index(i) for i in range(3)]).requires_grad_()
    y, gate = module(x)
    (dx,) = torch.autograd.grad(y.sum() + gate.sum(), x)
    assert y.stride() == dx.stride() == x.stride()
    y, _gate = module(torch.randn(1, 6, 20).to(device).expand(3, 6, 20))
    assert y.is_contiguous()


@kernel
def test_a_sign_that_is_not_in_memory(device):
    x, module = torch.randn(2, 6, 20).to(device), module_of(torch.float32, device=device)
    y, _gate = module(torch.complex(x, -x).conj().imag)
    within((y - module(x)[0]).abs().max().item(), 1e-5, "y")


@pytest.mark.parametrize("mask", [None, torch.ones(2, 20, dtype=torch.bool)], ids=["", "mask"])
def test_fake_cuda_tensors(mask):
    """Check the operators' fakes without a GPU, and that a length that is streamed keeps statistics."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        weights = [torch.empty(n, device="cuda") for n in ((1, 6, 1), 1, (), 4, 4)]
        for length in (20, 20_000):
            x = torch.empty(2, 6, length, device="cuda", dtype=torch.bfloat16)
            mask = None if mask is None else torch.empty(2, length, device="cuda", dtype=torch.bool)
            y, gate, p, gates, stats = OPERATORS.gated_forward(x, *weights, mask, 1, 2, torch.bfloat16, True)
            assert (y.shape, y.dtype, gate.shape, gate.dtype) == (x.shape, x.dtype, (2, 1, length), x.dtype)
            assert p.shape == gates.shape == (2, length) and p.dtype == gates.dtype == torch.float32
            assert stats.shape == ((4, 2, 1, 1) if length == 20_000 else (0,))
            grads = OPERATORS.gated_backward(y, None, x, *weights, mask, p, gates, stats, 1, 2, *[True] * 4, False)
            expected = [*(t.shape for t in (x, *weights[:3])), (0,), (0,)]
            assert [g.shape for g in grads] == expected and grads[0].dtype == x.dtype


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_saved_bytes(dtype):
    """Check on fake tensors that little beside x is kept for the backward pass."""
    saved, module = [], daam.DensityGate(128, backend="triton")
    with taking_any_tensor(), FakeTensorMode(allow_non_fake_inputs=True):
        x = torch.empty(8, 128, 5625, dtype=dtype, requires_grad=True)
        params = {name: torch.empty(p.shape, dtype=dtype, requires_grad=True) for name, p in module.named_parameters()}
        with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
            y, gate = torch.func.functional_call(module, params, (x,))
        assert (y.shape, y.dtype, gate.shape, gate.dtype) == (x.shape, dtype, (8, 1, 5625), dtype)
        y.sum().backward()
        assert x.grad.stride() == x.stride()
        assert all((p.grad.shape, p.grad.dtype) == (p.shape, dtype) for p in params.values())
    kept = sum({t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in saved}.values())
    assert x.nbytes <= kept <= 1.15 * x.nbytes
    assert sum(t.shape == x.shape for t in saved) == 1


# --- Twice, transformed, compiled -----------------------------------------------------------------
def formula_inputs(mask, grad=True):
    module, x = module_of(), torch.randn(2, 6, 10, dtype=torch.float64)
    tensors = (x, module.to_attn.weight, module.to_attn.bias, module.alpha, *module.gaa.parameters())
    tensors = [t.detach().requires_grad_(grad) for t in tensors]
    return tensors, (torch.rand(2, 10) > 0.3 if mask else None)


@pytest.mark.parametrize("mask", [False, True])
def test_the_closed_form(mask):
    """Check the gradients that double backward differentiates against autograd's, and their own."""
    tensors, valid = formula_inputs(mask)
    outputs = reference.formula(*tensors, valid, 1, 2, torch.float64)
    upstream = [torch.randn_like(t) for t in outputs]
    expected = torch.autograd.grad(outputs, tensors, upstream, retain_graph=True)
    alike(reference.gradient(*upstream, *tensors, valid, 1, 2), expected)
    for i in range(2):
        some = [t if k == i else None for k, t in enumerate(upstream)]
        wanted = torch.autograd.grad(outputs[i], tensors, upstream[i], retain_graph=True, materialize_grads=True)
        alike(reference.gradient(*some, *tensors, valid, 1, 2), wanted)


@kernel
@pytest.mark.parametrize("mask", [False, True])
def test_twice(mask, device):
    """Check a penalty on gradients against the formula's."""
    x = torch.randn(2, 6, 20, dtype=torch.float64).to(device)
    valid, found = (torch.rand(2, 20) > 0.3).to(device) if mask else None, []
    for backend in ("triton", "eager"):
        module, leaf = module_of(backend=backend, device=device), x.clone().requires_grad_()
        inputs = [leaf, *module.parameters()]
        total = loss(module, leaf, valid)
        first = torch.autograd.grad(total, inputs, create_graph=True)
        found.append(torch.autograd.grad(total + sum(g.square().sum() for g in first), inputs))
    alike(*found)


@kernel
@pytest.mark.slow
def test_gradgradcheck(device):
    module = module_of(device=device, channels=2, gaussians=2)
    x = torch.randn(1, 2, 5, dtype=torch.float64).to(device).requires_grad_()
    mask = torch.tensor([[True, True, False, True, True]]).to(device)
    call = (lambda x, *_params: module(x, mask=mask)), (x, *module.parameters())
    assert torch.autograd.gradcheck(*call) and torch.autograd.gradgradcheck(*call)


@kernel
@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_functorch(device):
    x, module = torch.randn(2, 6, 20, dtype=torch.float64).to(device), module_of(device=device)
    expected = gradients(module, x)
    params = dict(module.named_parameters())

    def call(params, x):
        return loss(lambda x, mask: torch.func.functional_call(module, params, (x,), {"mask": mask}), x)

    grads = torch.func.grad(call)(params, x)
    alike(grads.values(), expected[1:])
    each = torch.func.vmap(torch.func.grad(call), (None, 0))(params, x)
    alike([g.sum(0) for g in each.values()], expected[1:])
    _y, jvp = torch.func.jvp(lambda x: call(params, x), (x,), (torch.ones_like(x),))
    alike([jvp], [expected[0].sum()])
    leaf = x.clone().requires_grad_()
    y, _gate = module(leaf)
    rows = torch.randn(2, *y.shape, dtype=y.dtype).to(device)
    batched = torch.autograd.grad(y, leaf, rows, is_grads_batched=True, retain_graph=True)[0]
    alike(batched, [torch.autograd.grad(y, leaf, row, retain_graph=True)[0] for row in rows])


@kernel
@pytest.mark.slow
def test_functorch_compiled(device):
    x, module = torch.randn(2, 6, 20, dtype=torch.float64).to(device), module_of(device=device)
    mapped = torch.func.vmap(torch.func.grad(lambda x: loss(module, x)))
    alike([torch.compile(mapped, fullgraph=True, backend="aot_eager")(x)], gradients(module, x)[:1])


@kernel
def test_compile_fullgraph(device):
    """Check one graph for both passes, with a mask and under autocast, and one for all lengths of a batch."""
    counter = CompileCounterWithBackend("aot_eager")
    module, expected = (module_of(torch.float32, backend, device) for backend in ("triton", "eager"))
    compiled = torch.compile(module, fullgraph=True, dynamic=True, backend=counter)
    for length in (20, 23, 31):
        x, mask = torch.randn(4, 6, length).to(device), (torch.rand(4, length) > 0.3).to(device)
        with recorded_launches() as names:
            found = gradients(compiled, x, mask)
        alike(found, gradients(expected, x, mask), 1e-4)
        assert ran(names, "gated_project") and ran(names, "gated_backward")
    assert counter.frame_count == 1

    @torch.compile(fullgraph=True, backend="aot_eager")
    def cast(x):
        with torch.autocast(device.type, torch.bfloat16):
            return module(x)

    y, gate = cast(x.mT.contiguous().mT)
    assert (y.dtype, gate.dtype) == (torch.float32, torch.bfloat16)


@kernel
def test_the_hooked_module_compiles(device):
    module, x = module_of(torch.float32, device=device), torch.randn(2, 6, 20).to(device)
    module.to_attn.register_forward_hook(lambda _m, _x, y: 2 * y)
    alike(torch.compile(module, fullgraph=True, backend="aot_eager")(x), module(x), 1e-5)


@pytest.mark.parametrize("kernels", [False, pytest.param(True, marks=kernel)])
@pytest.mark.parametrize("gate_dtype", [torch.float32, torch.bfloat16], ids=str)
def test_opcheck(gate_dtype, kernels, device):
    if interpreting() != kernels:
        pytest.skip("the operators of the CPU run the kernels in this process, or they do not")
    if kernels and gate_dtype == torch.bfloat16:
        pytest.skip("the operators of the CPU show it")
    masked = gate_dtype == torch.float32
    module, x = module_of(torch.float32, device=device), torch.randn(2, 6, 20).to(device)
    mask = (torch.rand(2, 20) > 0.3).to(device) if masked else None
    parameters = (module.to_attn.weight, module.to_attn.bias, module.alpha, *module.gaa.parameters())
    inputs = (x, *(p.detach() for p in parameters), mask)
    call = (*inputs, 1, 2, gate_dtype)
    torch.library.opcheck(OPERATORS.gated_forward.default, (*call, True))
    y, gate, p, gates, _stats = OPERATORS.gated_forward(*call, True)
    gates = gates if gates.numel() else gate.squeeze(1)
    for grad_y, grad_gate, needs in ((y, gate, (True,) * 5), (None, gate, (False, True, False, False, True))):
        args = (grad_y, grad_gate, *inputs, p, gates, None, 1, 2, *needs)
        torch.library.opcheck(OPERATORS.gated_backward.default, args)
    torch.library.opcheck(OPERATORS.gated.default, (x.requires_grad_(), *call[1:], "0"))


@kernel
def test_a_gate_that_is_changed_in_place_is_an_error(device):
    module = module_of(torch.float32, device=device)
    y, gate = module(torch.randn(2, 6, 20).to(device).requires_grad_())
    gate.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()
