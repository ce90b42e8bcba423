"""The byte model against what kernels access in the interpreter, address by address."""

import contextlib
from collections import Counter
from unittest import mock

import pytest
import torch

from bench.byte_model import kernel_bytes, least_bytes
from bench.modules import ModuleWorkload
from bench.results import PASSES
from bench.workloads import Workload
from daam.kernels.operands import find_longest

WORKLOADS = [
    Workload("rows", "density", (3, 74), 1, 2, dtype="bfloat16"),
    Workload("rows, streamed", "density", (2, 4100), 1, 1, dtype="float32"),
    Workload("columns", "density", (2, 24, 33), 1, 8, dtype="float32"),
    Workload("columns, streamed", "density", (1, 300, 21), 1, 1, dtype="bfloat16"),
    Workload("columns", "mixture", (2, 25, 33), 1, 8, 4, dtype="float32"),
    Workload("columns, streamed", "mixture", (1, 601, 9), 1, 2, 4, dtype="bfloat16"),
    Workload("channels", "mixture", (2, 12, 5, 4), 1, 4, 3, dtype="float32"),
    Workload("rows", "gate", (3, 75), 1, 1, 4, dtype="bfloat16"),
    Workload("rows, streamed", "gate", (2, 4100), 1, 1, 1, dtype="float32"),
    Workload("rows, streamed backward", "gate", (2, 1500), 1, 1, 16, dtype="float32"),
    Workload("columns, streamed backward", "gate", (1, 200, 9), 1, 1, 4, dtype="float32"),
]


@contextlib.contextmanager
def accesses():
    """Count, in what is given, how often each address of an element is loaded or stored by kernels."""
    from triton.runtime import interpreter

    builder, counted = interpreter.interpreter_builder, Counter()

    def counting(original, mask_of):
        def access(ptrs, *args):
            counted.update(ptrs.data[mask_of(args).data].ravel().tolist())
            return original(ptrs, *args)

        return access

    masks = {"create_masked_load": lambda args: args[0], "create_masked_store": lambda args: args[1]}
    patches = [
        mock.patch.object(builder, name, counting(getattr(builder, name), mask_of)) for name, mask_of in masks.items()
    ]
    with patches[0], patches[1]:
        yield counted


def elements(t: torch.Tensor) -> set[int]:
    """Return the addresses of a contiguous tensor's elements."""
    return set(range(t.data_ptr(), t.data_ptr() + t.nbytes, t.element_size()))


def seen_twice(workload: Workload) -> dict[str, int]:
    """Return the bytes of x in each pass that statistics of streamed chunks read again at once, from the cache: of each
    strip the first tile, unless parameters vary along the chunk.
    """
    from bench.modelled import record_passes

    p, found = torch.empty(workload.params_shape, device="meta"), {"forward": 0, "backward": 0}
    x, axis = workload.x, workload.axis
    made = record_passes(workload.algorithm, x, p, None, axis, workload.feature_axis, full=False)
    for name, launches in made.items():
        for one in launches:
            plan = one.meta.get("PLAN")
            if one.name != "strip_stats" or plan.VARIES == "chunk":
                continue
            tile, strips = plan.BLOCK_P * plan.N_BLOCKS, one.args[-1].n_strips // 2
            assert strips == 1, "none of these chunks is cut"
            size, heads = x.shape[axis], workload.heads
            lengths = [size // heads] * (heads - 1) + [find_longest(size, heads)]
            columns = x.numel() // x.shape[axis]
            found[name] += x.element_size() * columns * sum(min(tile, length) for length in lengths)
    return found


@pytest.mark.kernel
@pytest.mark.not_emulated("the interpreter counts accesses")
@pytest.mark.parametrize("workload", WORKLOADS, ids=str)
def test_bytes(workload, device):
    """Check that every element of x and of the results is accessed as often as the model of the kernels says; once
    each, and the parameters once, are the least bytes.
    """
    if device.type != "cpu":
        pytest.skip("only the interpreter counts")
    x, params, grad_y = workload.inputs("cpu")
    leaves = [t.requires_grad_() for t in (x, *params)]
    with accesses() as forward:
        y = workload.call(*leaves, backend="triton")
    with accesses() as backward:
        dx, *grads = torch.autograd.grad(y, leaves, grad_y)
    passes = {"forward": (forward, (x, y), params), "backward": (backward, (x, grad_y, dx), (*params, *grads))}
    moved, least, twice = Counter(), Counter(), seen_twice(workload)
    for pass_name, (counted, large, small) in passes.items():
        addresses = set().union(*map(elements, large))
        params_bytes = sum(t.nbytes for t in small)
        accessed = x.element_size() * sum(counted[address] for address in addresses)
        moved[pass_name] = accessed - twice[pass_name] + params_bytes
        least[pass_name] = x.element_size() * sum(counted[address] > 0 for address in addresses) + params_bytes
        assert set().union(*map(elements, params)) <= set(counted), "every parameter is read"
    for pass_name in PASSES:
        assert kernel_bytes(workload, pass_name) == sum(moved[part] for part in pass_name.split("+"))
        assert least_bytes(workload, pass_name) == sum(least[part] for part in pass_name.split("+"))


MODULES = [
    ModuleWorkload("block", "mixture", (3, 96), 1, 4, 5, "float32", layers=3),
    ModuleWorkload("block", "stable", (2, 12, 9), 1, 2, 4, "float32", layers=2),
    ModuleWorkload("gate-module", "gate", (2, 5, 37), 2, 1, 4, "float32"),
]


@pytest.mark.kernel
@pytest.mark.not_emulated("the interpreter counts accesses")
@pytest.mark.parametrize("workload", MODULES, ids=str)
def test_bytes_of_modules(workload, device):
    """Check that every element of x and of the results of a whole module is accessed as often as the model says."""
    if device.type != "cpu":
        pytest.skip("only the interpreter counts")
    x, params, grad_y = workload.inputs("cpu")
    leaves = [t.requires_grad_() for t in (x, *params)]
    call = workload.bind(leaves, "triton")
    with accesses() as forward:
        y = call()
    with accesses() as backward:
        dx, *_grads = torch.autograd.grad(y, leaves, grad_y)
    for name, counted, large in (("forward", forward, (x, y)), ("backward", backward, (x, grad_y, dx))):
        accessed = sum(counted[address] for one in large for address in elements(one)) * x.element_size()
        small = {"forward": 1, "backward": 2}[name] * workload.params_bytes
        assert kernel_bytes(workload, name) == accessed + small == least_bytes(workload, name)


def test_bytes_by_hand():
    """Check shapes of which x is 1.5 MiB and 96 MiB in bf16, with parameters in fp32, against sums written here."""
    workload = Workload("layers", "density", (32, 24, 1024), 1, 8)
    x, params = 32 * 24 * 1024 * 2, 2 * 8 * 1024 * 4
    assert [least_bytes(workload, pass_name) for pass_name in PASSES] == [
        2 * x + params,
        3 * x + 2 * params,
        5 * x + 3 * params,
    ]
    assert kernel_bytes(workload, "forward+backward") == 5 * x + 3 * params
    long = Workload("sequence", "mixture", (8, 8192, 768), 1, 8, 4)
    x, params = 8 * 8192 * 768 * 2, 2 * 8 * 4 * 4
    assert kernel_bytes(long, "forward") == 4 * x + params
    assert kernel_bytes(long, "backward") == 5 * x + 2 * params


@pytest.mark.parametrize("algorithm", ["mixture", "gate", "stable"])
def test_rows_that_are_taken_whole(algorithm):
    """Check that memory moves what a pass must where L2 holds a row until it is read again, else more."""
    for n, once in ((20_000, True), (40_000, False)):
        workload = Workload("rows", algorithm, (2048, n), 1, 1, 4)
        for name in ("forward", "backward"):
            assert (kernel_bytes(workload, name) == least_bytes(workload, name)) == once
