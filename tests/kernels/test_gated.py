"""The fused gate's kernels against float64 autograd of the formula, on a GPU or in the interpreter."""

import contextlib
import itertools
import math
import os
from collections import Counter
from dataclasses import dataclass
from unittest import mock

import numpy as np
import pytest
import torch
from helpers import EPS, error, recorded_launches, strided, within

import daam

pytest.importorskip("triton")
import triton.language as tl

from daam.kernels import gated, gated_tiles, launch
from daam.kernels.gated_tiles import find_call

NAMES = ("y", "gate", "dx", "alpha", "weight", "bias", "mean_offsets", "log_sigma")
FORWARD = ["gated_project", "gate_forward", "gated_forward"]
BACKWARD = ["gated_sums", "gate_backward", "param_gradients", "gated_backward"]


@dataclass(frozen=True)
class Case:
    """Hold a call: the shape of x, (batch, channels, length), how x and grad_y lie in memory, and whether it has a
    mask.
    """

    shape: tuple[int, int, int]
    layout: str = "contiguous"
    grads: str = "contiguous"
    mask: bool = False
    gaussians: int = 3

    def __str__(self) -> str:
        size = "x".join(map(str, self.shape))
        return f"{size}-{self.layout}-{self.grads}" + ("-mask" if self.mask else "")


def module_of(case, dtype, seed=0, device="cpu", backend="triton"):
    """Return a module with random parameters."""
    generator = torch.Generator().manual_seed(seed)
    module = daam.DensityGate(case.shape[1], case.gaussians, backend=backend)
    for p in module.parameters():
        p.data = 0.5 * torch.randn(p.shape, generator=generator)
    module.to(device, dtype)
    if dtype.itemsize == 2:
        module.gaa.float()  # the interpreter casts no fp64, as which sums of the gate's kernels arrive, to bf16
    return module


def inputs(case, dtype, seed=0, device="cpu"):
    """Return x, NaN where the mask is False, the mask, and gradients of y and the gate."""
    generator = torch.Generator().manual_seed(seed)
    batch, _channels, length = case.shape
    x, grad_y = (strided(case.shape, layout, dtype, generator, device) for layout in (case.layout, case.grads))
    grad_gate, mask = strided((batch, 1, length), case.grads, dtype, generator, device), None
    if case.mask:
        mask = (torch.rand(batch, length, generator=generator) > 0.3).to(device)
        mask[0] = False
        x[~mask[:, None].expand_as(x)] = float("nan")
    return x, mask, grad_y, grad_gate


def run(module, x, mask, grad_y, grad_gate):
    """Return results and gradients by name."""
    x = x.detach().requires_grad_()
    y, gate = module(x, mask=mask)
    found = torch.autograd.grad([y, gate], [x, *module.parameters()], [grad_y, grad_gate])
    return dict(zip(NAMES, (y, gate, *found), strict=True))


def agree(case, device, names=(*FORWARD, *BACKWARD)):
    """Compare with the formula in float64, on the device of the kernels, and see which of these ran."""
    given = inputs(case, torch.float64, device=device)
    with recorded_launches() as launched:
        results = run(module_of(case, torch.float64, device=device), *given)
    assert launched == list(names)
    for name, wanted in run(module_of(case, torch.float64, device=device, backend="eager"), *given).items():
        result = results[name]
        assert (result.dtype, result.shape) == (wanted.dtype, wanted.shape)
        assert torch.equal(result.isnan(), wanted.isnan()), name  # what x holds where it is not valid
        within(error(*(add_one(t, name) for t in (result.nan_to_num(), wanted.nan_to_num()))), 1e-11, name)


def add_one(t, name):
    """Return a gradient of the bias with another number beside it: the mean takes the bias away, so that it is what
    rounding leaves of 0, and measured by itself it is wrong.
    """
    return torch.cat([t, torch.ones_like(t)]) if name == "bias" else t


CASES = [
    Case((2, 9, 41)),
    Case((3, 9, 41), mask=True, grads="expanded"),
    Case((2, 9, 33), "channels_last", "sliced", mask=True),
    Case((2, 70, 37), "channels_last"),
    Case((2, 64, 96), "channels_last", "expanded", mask=True),  # dimensions that divide, and loads of two elements
    Case((2, 64, 96), mask=True, grads="transposed"),
    Case((3, 7, 50), "transposed", "contiguous"),
    Case((2, 5, 30), "sliced", "transposed", mask=True),
    Case((3, 4, 16), "apart", "apart"),  # loads of two elements, but for what is from batch to batch
    Case((2, 1, 50), grads="sliced"),
    Case((2, 5, 1), "transposed", gaussians=1),
]


@pytest.mark.kernel
@pytest.mark.parametrize("case", CASES, ids=str)
def test_results_and_gradients(case, device):
    agree(case, device)


@pytest.mark.kernel
@pytest.mark.slow
@pytest.mark.parametrize("mask", [False, True])
@pytest.mark.parametrize("grads", ["contiguous", "transposed", "expanded", "sliced"])
@pytest.mark.parametrize("layout", ["contiguous", "transposed", "sliced", "channels_last"])
@pytest.mark.parametrize("shape", [(2, 6, 300), (1, 300, 24), (3, 17, 128), (2, 128, 17)], ids=str)
def test_all_layouts(shape, layout, grads, mask, device):
    agree(Case(shape, layout, grads, mask), device)


@pytest.mark.kernel
def test_a_gate_that_is_streamed(device):
    """Check a length that stays on chip in neither pass, of float64; the backward pass has the statistics."""
    forward = ["gated_project", "strip_stats", "merge_strip_stats", "forward_streamed", "gated_forward"]
    backward = ["gated_sums", "gate_sums", "backward_streamed", "param_gradients", "gated_backward"]
    agree(Case((1, 2, 4100)), device, (*forward, *backward))


@pytest.mark.kernel
def test_several_strips_of_several_rows(device):
    """Check strips of one tile, which are as long as they are large: sums of each have a row of their own."""
    case = Case((3, 2, 300))
    find_call.cache_clear()
    with mock.patch.multiple(gated_tiles, STRIP=1, STRIP_TIMES=1):
        call = find_call("gradients", torch.float64, torch.Size(case.shape), (600, 300, 1))
        assert call.sizes.n_strips > 1
        agree(case, device)
    find_call.cache_clear()


@pytest.mark.kernel
def test_alpha_under_autocast(device):
    """Check that the gradient of alpha is that of the gate before it is rounded to x's dtype. The convolution takes one
    channel as it is, which no dtype rounds.
    """
    case = Case((2, 9, 60))
    given = inputs(case, torch.bfloat16, device=device)
    module, exact = (module_of(case, torch.float32, device=device, backend=name) for name in ("triton", "eager"))
    for one in (module, exact):
        one.to_attn.weight.data = torch.eye(9, device=device)[:1, :, None]
        one.to_attn.bias.data.zero_()
    with torch.autocast(device.type, torch.bfloat16):
        found = run(module, *given)["alpha"]
    expected = run(exact.double(), *(t if t is None else t.double() for t in given))["alpha"]
    within(error(found, expected), 1e-4, "alpha")  # a sum that cancels; of the rounded gate it is 5e-2 off


@pytest.mark.kernel
@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, pytest.param(torch.float16, marks=pytest.mark.slow)], ids=str
)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_precision(layout, dtype, device):
    """Check that errors are at most 2·(eager's error + 2·eps·M), as `helpers.bound` has it, of the worst of four draws.
    Gradients of the convolution and alpha are rounded to x's dtype, as these are.
    """
    case, worst, largest = Case((2, 9, 60), layout), {}, Counter()
    for seed in range(4):
        given = inputs(case, dtype, seed, device)
        exact = module_of(case, dtype, seed, device, "eager").double()
        exact = run(exact, *(t if t is None else t.double() for t in given))
        for backend in ("triton", "eager"):
            for name, result in run(module_of(case, dtype, seed, device, backend), *given).items():
                largest[name] = max(largest[name], exact[name].abs().max().item())
                difference = (result.double() - exact[name]).abs().max().item()
                worst[name, backend] = max(worst.get((name, backend), 0.0), difference)
    for name in NAMES:
        if name == "bias":
            continue  # 0 but for rounding
        roundings = 1 if name in NAMES[:3] else math.log2(case.shape[0] * case.shape[2])
        eps = EPS[dtype] * (2 if dtype == torch.bfloat16 and os.environ.get("TRITON_INTERPRET") == "1" else 1)
        kernels, eager = (worst[name, backend] / largest[name] for backend in ("triton", "eager"))
        within(kernels, 2 * (eager + 2 * eps * roundings**0.5), name)


@pytest.mark.kernel
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_a_batch_equals_its_rows(layout, device):
    case = Case((3, 12, 70), layout)
    module = module_of(case, torch.float32, device=device)
    x, _mask, grad_y, grad_gate = inputs(case, torch.float32, device=device)
    together = run(module, x, None, grad_y, grad_gate)
    row = run(module, x[1:2], None, grad_y[1:2], grad_gate[1:2])
    for name in NAMES[:3]:
        assert torch.equal(row[name], together[name][1:2]), name
    single, _gate = module(x[1])
    assert torch.equal(single, together["y"][1])


NEEDS = [  # which inputs require grad, whether there are gradients of y and the gate, and what the backward pass runs
    ((), (True, True), None),
    (("x",), (True, True), ["gated_sums", "gate_backward", "gated_backward"]),
    (("alpha", "weight"), (False, True), ["gate_backward", "gated_backward"]),
    (("alpha",), (True, False), ["gated_sums"]),
    (("weight",), (False, True), ["gate_backward", "gated_backward"]),
    (("bias", "log_sigma"), (True, False), ["gated_sums", "gate_backward", "param_gradients"]),
    (("mean_offsets", "log_sigma"), (True, False), ["gated_sums", "gate_backward", "param_gradients"]),
    (("log_sigma",), (False, True), ["gate_backward", "param_gradients"]),
]


@pytest.mark.kernel
@pytest.mark.parametrize(("needed", "used", "names"), NEEDS)
def test_what_is_not_needed(needed, used, names, device):
    """Check that frozen inputs launch nothing for themselves and have no gradient, and the others the same."""
    case = Case((2, 5, 40))
    x, _mask, grad_y, grad_gate = inputs(case, torch.float64, device=device)
    found = {}
    for backend in ("triton", "eager"):
        module = module_of(case, torch.float64, device=device, backend=backend)
        leaves = {"x": x.clone()} | {name.rpartition(".")[2]: p for name, p in module.named_parameters()}
        for name, leaf in leaves.items():
            leaf.requires_grad_(name in needed)
        outputs = module(leaves["x"])
        assert outputs[0].requires_grad == bool(needed)
        if not needed:
            return
        pairs = [pair for pair, use in zip(zip(outputs, (grad_y, grad_gate), strict=True), used, strict=True) if use]
        with recorded_launches() as launched:
            torch.autograd.backward(*map(list, zip(*pairs, strict=True)))
        assert launched == (names if backend == "triton" else launched)
        found[backend] = {name: leaf.grad for name, leaf in leaves.items()}
    for name, wanted in found["eager"].items():
        result = found["triton"][name]
        if name in needed and wanted is not None:
            within((result - wanted).abs().max().item(), 1e-11, name)
        assert name in needed or result is None


@pytest.mark.kernel
@pytest.mark.parametrize("shape", [(0, 5, 40), (0, 5, 1)], ids=str)
def test_an_empty_batch(shape, device):
    case = Case(shape)
    results = run(module_of(case, torch.float32, device=device), *inputs(case, torch.float32, device=device))
    assert results["y"].shape == results["dx"].shape == shape and results["gate"].shape == (0, 1, shape[2])
    assert all((results[name] == 0).all() for name in NAMES[3:])


@contextlib.contextmanager
def accesses():
    """Record the addresses of all elements that kernels load and store, in the list that is given."""
    from triton.runtime import interpreter

    builder, collected = interpreter.interpreter_builder, []

    def collecting(original, mask_of):
        def access(ptrs, *args):
            collected.append(ptrs.data[mask_of(args).data].ravel())
            return original(ptrs, *args)

        return access

    load = collecting(builder.create_masked_load, lambda args: args[0])
    store = collecting(builder.create_masked_store, lambda args: args[1])
    with (
        mock.patch.object(builder, "create_masked_load", load),
        mock.patch.object(builder, "create_masked_store", store),
    ):
        yield collected


def count_accesses(collected, t):
    """Return how often elements of a dense tensor were accessed, a set of one number where all were alike."""
    addresses = np.concatenate(collected).astype(np.int64) - t.data_ptr()
    places = addresses[(addresses >= 0) & (addresses < t.nbytes)] // t.element_size()
    return set(np.bincount(places, minlength=t.numel()).tolist())


@pytest.mark.kernel
@pytest.mark.not_emulated("the interpreter counts accesses")
@pytest.mark.parametrize("shape", [(2, 64, 129), pytest.param((2, 128, 1125), marks=pytest.mark.slow)], ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_transfers(layout, shape, device):
    """Check that every element of x is read twice and one of y written, then x and grad_y read twice and dx written."""
    if device.type != "cpu":
        pytest.skip("only the interpreter counts")
    case = Case(shape, layout)
    module, (x, _mask, _grad_y, _grad_gate) = module_of(case, torch.float32), inputs(case, torch.float32)
    x, grad_y = x.requires_grad_(), torch.randn_like(x)
    with accesses() as collected:
        y, _gate = module(x)
    assert [count_accesses(collected, t) for t in (x, y)] == [{2}, {1}]
    with accesses() as collected:
        dx, *_others = torch.autograd.grad(y, [x, *module.parameters()], grad_y)
    assert [count_accesses(collected, t) for t in (x, grad_y, dx)] == [{2}, {2}, {1}]


# --- On the host, and compiled --------------------------------------------------------------------
X = {"contiguous": lambda *shape: torch.empty(shape, device="meta")}
X["channels_last"] = lambda batch, channels, length: torch.empty(batch, length, channels, device="meta").mT


@pytest.mark.parametrize("kind", ["project", "outputs", "sums", "gradients"])
@pytest.mark.parametrize("layout", X)
@pytest.mark.parametrize("size", [(128, 5625), (9, 41), (512, 1024), (1, 7), (7, 1)], ids=str)
def test_a_batch_has_the_plan_of_its_rows(size, layout, kind):
    one, many = (X[layout](batch, *size) for batch in (1, 6))
    for dtype in (torch.bfloat16, torch.float32, torch.float64):
        calls = [find_call(kind, dtype, x.shape, x.stride()) for x in (one, many, many[3:4])]
        assert calls[0].constants == calls[1].constants == calls[2].constants
        plan = calls[0].constants["PLAN"]
        channels = 1 if kind in ("project", "sums") else -(-size[0] // (plan.BLOCK_C * plan.N_C))
        strips = -(-size[1] // (plan.BLOCK_T * plan.N_T * plan.STRIP))
        assert [call.programs for call in calls] == [n * channels * strips for n in (1, 6, 1)]


def test_offsets_past_32_bits():
    shape = torch.Size((2, 3, 40))
    near, far = (find_call("project", torch.float32, shape, (120, step, 1)).constants["PLAN"] for step in (40, 2**31))
    assert (tl.int32, 4) == (near.INDEX, near.UNIT) and (tl.int64, 1) == (far.INDEX, far.UNIT)
    other = find_call("sums", torch.float32, shape, (120, 40, 1), (2**33, 2**32, 1)).constants["PLAN"]
    assert (tl.int64, 4) == (other.INDEX, other.UNIT)


def test_offsets_of_a_gradient_past_32_bits():
    """Check that kernels know how far apart elements of grad_y are, where those of x are near."""
    x = torch.empty(2, 3, 40, device="meta")
    far = torch.empty(1, device="meta").as_strided(x.shape, (2**33, 2**32, 1))
    weight, number, gaussians, p = (torch.empty(shape, device="meta") for shape in ((1, 3, 1), (1,), (4,), (2, 40)))
    parameters = weight, number, number, gaussians, gaussians
    for grad_y, bits in ((x, tl.int32), (far, tl.int64)):
        with launch.recording() as launches:
            gated.backward(grad_y, None, x, *parameters, None, p, p, None, 1, 2, *[True] * 5)
        plans = [one.keywords["PLAN"] for one in launches if one.kernel in (gated.gated_sums, gated.gated_backward)]
        assert [plan.INDEX.value for plan in plans] == [bits] * 2


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="interpreted kernels cannot be compiled")
@pytest.mark.parametrize(
    ("target", "layout", "dtype", "length"),
    [
        ("sm_90", "contiguous", torch.bfloat16, 1024),
        ("sm_80", "channels_last", torch.float32, 1125),
        *(
            pytest.param(*each, marks=pytest.mark.audit)
            for each in itertools.product(
                ("sm_80", "sm_90", "sm_100"), X, (torch.bfloat16, torch.float32, torch.float64), (1024, 5625)
            )
        ),
    ],
)
@pytest.mark.parametrize("masked", [False, True])
def test_what_is_compiled(target, layout, dtype, length, masked):
    """Check that kernels spill nothing, and load as much at once as strides allow."""
    from bench.aot import compile_for, recording

    x = X[layout](8, 128, length).to(dtype)
    weight, bias, alpha, gaussians = (torch.empty(n, device="meta", dtype=dtype) for n in ((1, 128, 1), 1, (), 4))
    mask = torch.empty(8, length, dtype=torch.bool, device="meta") if masked else None
    order = (0, 1, 2) if layout == "contiguous" else (0, 2, 1)
    inputs, axes = (x.permute(order), weight, bias, alpha, gaussians, gaussians, mask), order[1:]
    with recording() as launches:
        y, gate, p, gates, stats = gated.forward(*inputs, *axes, dtype, True)
        gates = gate.squeeze(1) if gates is None else gates
        gated.backward(y, gate, *inputs, p, gates, stats, *axes, *[True] * 5)
    launches = [one for one in launches if one.name.startswith("gated_")]
    assert len(launches) == 4
    for one in launches:
        compiled = compile_for(target, one)
        assert compiled.stack == 0, f"{one.name} spills {compiled.stack} bytes"
        assert compiled.load_bits == 128 or (layout, length) == ("contiguous", 5625), one.name
