"""Kernels that are compiled before the calls that need them: the same kernels, and all of them."""

import contextlib
import importlib
import os
from unittest import mock

import pytest
import torch
from torch import nn

import daam
from daam.backend import find_problem

pytest.importorskip("triton")
interpreted = os.environ.get("TRITON_INTERPRET") == "1"
compiled = pytest.mark.skipif(interpreted, reason="interpreted kernels cannot be compiled")

MODULE = importlib.import_module("daam.warmup")  # daam.warmup is the function


def lengths_mask(x, axis=1):
    return torch.arange(x.shape[axis]).expand(x.shape[: axis + 1]) < 2


def gaussians(heads, n=3):
    return torch.randn(heads, n, requires_grad=True)


class Encoder(nn.Module):
    """Attend, among layers of other kinds."""

    def __init__(self):
        super().__init__()
        self.project, self.attend = nn.Linear(8, 6), daam.MultiHeadDAAM(6, 2)
        self.norm, self.drop = nn.BatchNorm1d(6), nn.Dropout(0.5)

    def forward(self, x):
        columns_first = self.drop(self.project(x)).transpose(1, 2).contiguous().transpose(1, 2)
        return {"y": self.norm(self.attend(columns_first).mean(1))}


DENSITY, MIXTURE, GATE = daam.density_attention, daam.mixture_attention, daam.density_gate
OFFSETS, WIDTHS = torch.zeros(2, 8, requires_grad=True), torch.ones(2, 8, requires_grad=True)
FROZEN = {"mean_offset": OFFSETS.detach(), "c": WIDTHS.detach()}
CASES = {  # what is called, shapes of x, and what else a call takes
    "density": (DENSITY, [(3, 12, 8), (3, 24, 8), (1, 600, 8)], {"mean_offset": OFFSETS, "c": WIDTHS}),
    "density, weights and mask": (
        DENSITY,
        [(2, 4, 8), (2, 600, 8)],
        {"mean_offset": OFFSETS, "c": WIDTHS, "mask": lengths_mask, "return_weights": True, "residual": True},
    ),
    "density, frozen": (DENSITY, [(3, 12, 8)], FROZEN),
    "density, parameters of other strides": (
        DENSITY,
        [(3, 12, 8)],
        {"mean_offset": torch.zeros(3, 8, 2)[1].t(), "c": torch.ones(1, 8).expand(2, 8), "backend": "triton"},
    ),
    "mixture, uneven heads": (
        MIXTURE,
        [(3, 4, 11), (1, 2, 17001)],
        {"mean_offsets": gaussians(2), "c": gaussians(2), "norm_axis": -1},
    ),
    "mixture, padding": (
        MIXTURE,
        [(3, 12, 5)],
        {"mean_offsets": gaussians(1), "c": gaussians(1), "norm_axis": 1, "padding_value": 0.0, "return_weights": True},
    ),
    "gate, uneven heads": (
        GATE,
        [(3, 4, 11), (1, 3, 4500)],
        {"mean_offsets": gaussians(2), "log_sigma": gaussians(2), "mask": lambda x: lengths_mask(x, 2)},
    ),
    "MultiHeadDAAM": (daam.MultiHeadDAAM(8, 4), [(2, 8, 8), (2, 16, 8)], {}),
    "MultiHeadDAAM over features": (daam.MultiHeadDAAM(16, 2, norm_axis=-1), [(2, 5, 16), (16,) * 2], {}),
    "DensityBlock": (
        daam.DensityBlock([1, -1], [2, 3], [4, 4], 2),
        [(2, 7, 8)],
        {"return_attention_details": True, "mask": torch.ones(2, 7, dtype=torch.bool)},
    ),
    "StableMultiHeadDensityAttention": (daam.StableMultiHeadDensityAttention(-1, 4, 4), [(3, 11), (1, 2, 17_001)], {}),
    "DensityGate": (daam.DensityGate(6), [(2, 6, 40), (6, 2100)], {}),
    "DensityGate, mask": (daam.DensityGate(6), [(2, 6, 41)], {"mask": lambda x: x[:, 0] > 0}),
    "layers of other kinds": (Encoder(), [(4, 6, 8), (16, 16, 8)], {}),
}


@pytest.fixture
def triton():
    """Let tensors of the CPU take the Triton backend."""
    from bench import host

    with host.taking_any_tensor(), daam.use_backend("triton"):
        yield


@pytest.fixture
def recorded(monkeypatch):
    """Yield the launches that `warmup` would compile."""
    from bench.aot import Launch

    launches = []

    def record(found, device, workers):
        launches.extend(Launch(one.kernel, one.args, one.keywords, options={}) for one in found)
        return len(found), 0

    monkeypatch.setattr(MODULE, "_compile", record)
    return launches


def train(called, shape, dtype, arguments, input_grad=True):
    """Make a step on real tensors."""
    x = torch.ones(shape, dtype=dtype, requires_grad=input_grad)
    arguments = {name: value(x) if callable(value) else value for name, value in arguments.items()}
    outputs = called(x, **arguments)
    tensors = [t for t in MODULE._find_tensors(outputs) if t.requires_grad]
    for some in (tensors[:1], tensors) if tensors else ():
        torch.autograd.backward(some, [torch.empty_like(t) for t in some], retain_graph=True)


@compiled
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_kernels_are_those_of_a_step(name, autocast, triton, recorded):
    """Check that kernels are exactly those of steps on real tensors, with autocast and without."""
    from bench.aot import recording
    from bench.variants import find_variants

    called, shapes, arguments = CASES[name]
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        done = daam.warmup(called, shapes, [torch.float32], **arguments)
        with recording() as launches:
            for shape in shapes:
                train(called, shape, torch.float32, arguments)
    assert done.kernels and done.reason is None
    assert find_variants(recorded) == find_variants(launches)


@compiled
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("input_grad", [False, True])
def test_dtypes_and_frozen_inputs(dtype, input_grad, triton, recorded):
    from bench.aot import recording
    from bench.variants import find_variants

    called, shapes, arguments = CASES["density"]
    daam.warmup(called, shapes, [dtype], input_grad=input_grad, **arguments)
    with recording() as launches:
        for shape in shapes:
            train(called, shape, dtype, arguments, input_grad)
    assert find_variants(recorded) == find_variants(launches)


@compiled
def test_forward_passes_alone(triton, recorded):
    called, shapes, arguments = CASES["density"]
    daam.warmup(called, shapes, backward=False, **arguments)
    forward = {one.name for one in recorded}
    recorded.clear()
    with torch.no_grad():
        daam.warmup(called, shapes, **arguments)
    assert forward == {one.name for one in recorded} == {
        "density_forward", "strip_stats", "merge_strip_stats", "forward_streamed",
    }  # fmt: skip


@compiled
def test_calls_that_repeat_are_recorded_once(triton, recorded):
    layer = daam.DensityBlock([1] * 5, [2] * 5, [4] * 5, 5, recompute=False)
    daam.warmup(layer, [(2, 8, 4)] * 2)
    # the last layer's gradient is as contiguous as its output, and so are those that it gives
    assert [one.name for one in recorded] == ["mixture_forward", "mixture_backward", "param_gradients"]


@compiled
@pytest.mark.parametrize("block", [daam.DensityBlock, daam.StableDensityBlock])
def test_layers_of_a_launch_are_recorded(block, triton, recorded):
    daam.warmup(block([1] * 5, [2] * 5, [4] * 5, 5), [(2, 8, 4)])
    launched = ["forward_layers", "backward_layers", "layer_gradients"]
    assert sorted(one.name for one in recorded) == sorted(launched * 2)  # of two layers, and of three


@compiled
def test_a_module_and_random_numbers_are_left_alone(triton, recorded):
    encoder = Encoder()
    before, state = {name: t.clone() for name, t in encoder.state_dict().items()}, torch.get_rng_state()
    daam.warmup(encoder, [(4, 6, 8)])
    assert recorded and torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(t, before[name]) for name, t in encoder.state_dict().items())
    assert all(p.grad is None for p in encoder.parameters())


@compiled
def test_compiled_modules(triton, recorded):
    layer = daam.MultiHeadDAAM(8, 4)
    daam.warmup(torch.compile(layer), [(2, 8, 8)])
    assert [one.name for one in recorded] == ["density_forward", "density_backward", "param_gradients"]


@compiled
def test_a_step_compiles_nothing(triton):
    """Check that Triton finds all kernels of a step in memory, and launches them."""
    from triton import JITFunction

    from bench.stub_driver import UnavailableError, stub_driver
    from daam.kernels import density, params

    launched, p = [], torch.zeros(1, 32, requires_grad=True)
    arguments, shapes = {"mean_offset": p, "c": p}, [(2, 12, 32), (3, 12, 32)]
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(stub_driver(lambda function, *_: launched.append(function)))
        except UnavailableError as why:
            pytest.skip(f"no launches without a stub of the driver: {why}")
        for kernel in (density.density_forward, density.density_backward, params.param_gradients):
            kernel.device_caches.pop(0, None)  # what other tests compiled
        first = daam.warmup(DENSITY, shapes[:1], [torch.bfloat16], workers=2, **arguments)
        again = daam.warmup(DENSITY, shapes, [torch.bfloat16], **arguments)
        stack.enter_context(mock.patch.object(JITFunction, "_do_compile", None))  # what is called fails
        for shape in shapes:
            train(DENSITY, shape, torch.bfloat16, arguments)
    assert (first.kernels, first.compiled, first.workers, first.reason) == (3, 3, 2, None)
    assert (again.kernels, again.compiled) == (3, 0)
    assert len(launched) == 6 + 4 and len(set(launched)) == 3  # `train` differentiates twice


def test_nothing_is_compiled_where_triton_does_not_run():
    done = daam.warmup(daam.MultiHeadDAAM(8, 4), [(2, 8, 8)])
    problem = find_problem(torch.empty(0))
    assert (done.kernels, done.compiled) == (0, 0)
    assert done.reason == (problem or "calls launch none (x is on cpu)")
    assert str(done) == f"0 kernels: {done.reason}"


def test_calls_that_ask_for_another_backend(triton, recorded):
    layer = daam.MultiHeadDensityAdaptiveAttention(1, 2, 4, backend="eager")
    assert daam.warmup(layer, [(2, 8, 8)]).reason == "calls launch none (they ask for eager, or x is empty)"


@pytest.mark.skipif(not interpreted, reason="of the interpreter")
def test_the_interpreter_compiles_nothing():
    done = daam.warmup(daam.MultiHeadDAAM(8, 4, backend="triton"), [(2, 8, 8)])
    assert str(done) == "0 kernels: Triton's interpreter compiles nothing"


def test_text():
    assert str(MODULE.WarmedUp(12, 9, 8.24, 4)) == "12 kernels, 9 compiled in 8.2 s with 4 workers"
    assert str(MODULE.WarmedUp(1, 0, 0.04, 1)) == "1 kernel, 0 compiled in 0.0 s with 1 worker"


@compiled
def test_errors_of_a_call_are_its_own(triton):
    with pytest.raises(ValueError, match="x has 7 features"):
        daam.warmup(daam.MultiHeadDAAM(8, 4), [(2, 8, 7)])
