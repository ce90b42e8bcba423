"""Whole modules are timed against formulas that are right, move what one counts by hand, and are no fusion barrier."""

import re
from unittest import mock

import pytest
import torch
from helpers import within
from torch import nn
from torch._inductor import async_compile
from torch._inductor.utils import run_and_get_code

from bench import core, providers
from bench.byte_model import least_bytes
from bench.modules import FORMULA, ModuleWorkload, modules
from bench.results import PASSES
from bench.workloads import workloads

GATE = ModuleWorkload("gate-module", "gate", (2, 5, 37), 2, 1, 4, "float32")
BLOCK = ModuleWorkload("block", "mixture", (3, 24), 1, 4, 5, "float32", layers=3)
MODEL = ModuleWorkload("model", "density", (2, 96, 64), 1, 8, 1, "float32")
MIXED = ModuleWorkload("model", "mixture", (2, 96, 64), 1, 8, 4, "float32")
ALL = [*workloads("cuda"), *workloads("cpu"), *modules("cuda"), *modules("cpu")]


@pytest.mark.parametrize("workload", ALL, ids=str)
def test_workloads_are_valid(workload):
    """Check on the meta device, without memory, that both passes take the shapes, and that their bytes are counted."""
    x, grad_y = workload.x.requires_grad_(), workload.x
    if workload.whole:
        params = [nn.Parameter(p.to("meta")) for p in workload.build().parameters() if p.requires_grad]
    else:
        params = [torch.empty(workload.params_shape, device="meta", requires_grad=True) for _ in range(2)]
    y = workload.bind((x, *params), "eager")()
    assert y.shape == x.shape and y.dtype == x.dtype and y.is_meta
    grads = torch.autograd.grad(y, (x, *params), grad_y)
    assert [g.shape for g in grads] == [x.shape, *(p.shape for p in params)]
    assert least_bytes(workload, "forward+backward") > 5 * x.nbytes


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_modules(device):
    """Check that names are unique, beside those of the workloads, and that every family has a small version."""
    names = list(map(str, (*workloads(device), *modules(device))))
    assert len(set(names)) == len(names)
    assert {one.family for one in modules(device)} == {one.family for one in modules("cpu")}


@pytest.mark.parametrize("workload", [GATE, BLOCK, MODEL, MIXED], ids=str)
def test_what_is_timed_is_right(workload):
    """Check every provider that does not compile, and the formula of a model without its compiler, against float64."""
    task = providers.Task(workload, "cpu")
    names = [name for name, one in providers.PROVIDERS.items() if one.serves(workload)]
    served = {GATE: {"eager", "formula"}, BLOCK: {"eager", "formula", "published"}}.get(workload, set())
    assert set(names) - {"layer_norm", "copy"} == {"triton", "compile", "compile_formula"} | served
    calls = {backend: workload.bind(task.leaves, backend) for backend in ("eager", FORMULA)}
    candidates = {name: providers.PROVIDERS[name].build(task) for name in sorted(served)} or {
        name: providers.Candidate(call, task.leaves, task.grad_y, task.expected, name) for name, call in calls.items()
    }
    for name, candidate in candidates.items():
        # the published code adds up what ours does not: 1.2e-5 under torch 2.11
        within(core.error(candidate), 1e-4 if name == "published" else 1e-5, name)
    changed = [1.01 * one for one in task.expected]
    for i in range(len(changed)):
        expected = (*task.expected[:i], changed[i], *task.expected[i + 1 :])
        wrong = providers.Candidate(calls["eager"], task.leaves, task.grad_y, expected, "eager")
        assert core.error(wrong) > 5e-3, "no result is left out, and none is 0"


def test_bytes_by_hand():
    """Check floors in units of x, of parameters in fp32: of a gate 3 and 5, of three layers as of one."""
    x, params = 2 * 5 * 37 * 4, 4 * (5 + 1 + 1 + 2 * 4)
    assert [least_bytes(GATE, which) for which in PASSES] == [3 * x + params, 5 * x + 2 * params, 8 * x + 3 * params]
    x, params = 3 * 24 * 4, 4 * 3 * 2 * 4 * 5
    assert [least_bytes(BLOCK, which) for which in PASSES] == [2 * x + params, 3 * x + 2 * params, 5 * x + 3 * params]


def compile_without_running(workload, name):
    """Return the texts that Inductor makes of a provider's passes, whose C++ is neither compiled nor run."""
    candidate = providers.PROVIDERS[name].build(providers.Task(workload, "cpu"))
    compiler = mock.patch.object(async_compile.AsyncCompile, "cpp_pybinding", lambda *args: lambda *args: None)
    with compiler, torch._inductor.config.patch(force_disable_caches=True):
        return run_and_get_code(lambda: candidate.backward(candidate.forward()))[1]


@pytest.mark.slow
@pytest.mark.parametrize("workload", [MODEL, MIXED], ids=str)
def test_our_layer_is_no_fusion_barrier(workload):
    """Check that a model around ours is compiled to two graphs of as many kernels, and calls of libraries, as around
    the formula.
    """
    if reason := providers.PROVIDERS["compile"].missing("cpu"):
        pytest.skip(reason)
    ours, formula = (
        [*map(count_calls, compile_without_running(workload, name))] for name in ("compile", "compile_formula")
    )
    assert len(ours) == len(formula) == 2
    for own, other in zip(ours, formula, strict=True):
        assert own["kernels"] <= other["kernels"] and own["calls"] == other["calls"] and own["kernels"] > 1


def count_calls(code):
    """Return how many kernels of its own generated code launches, and how many operators of libraries it calls."""
    return {
        "kernels": len(re.findall(r"^ *cpp_fused\w*\(", code, re.M)),
        "calls": len(re.findall(r"extern_kernels\.|torch\.ops\.(?:aten|mkldnn|daam)", code)),
    }
