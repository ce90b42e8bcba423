"""Calls of which one operand, an input or an output, spans more than 2**31 elements.

They run in a process of their own: an offset of 32 bits may leave the tensor, and take process or device along.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import mmap
import multiprocessing
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from unittest import mock

import torch
from helpers import Case, error, inputs, run
from torch import Tensor

import daam
from daam.kernels import gated, layers, passes

# Elements from one to the next; a multiple of 16, as strides of aligned rows are. It passes 2**32: between that and
# 2**31 the interpreter of Triton 3.9 takes integers for unsigned ones of 32 bits, and fails.
STEP = 2**32 + 16
OUTPUTS = ("y", "weights", "dx", "d_p", "d_q")  # in the order in which passes make them
LAYERS_OUTPUTS = ("y", "weights0", "weights1", "dx")
GATED_OUTPUTS = ("y", "weighed", "weights", "dx", "dp")
OF_GATE = ("grad_gate", "weighed", "weights", "dp")  # of one channel
# in fp16, which takes the least memory where it is real: two roundings of results near their largest value
BOUND = 2e-3


def spread_out(t: Tensor, dim: int, step: int = STEP) -> Tensor:
    """Return a copy of a tensor whose neighbours along a dimension stand so many elements apart. On a CPU its memory is
    mapped, and most of it never exists.
    """
    others = [size for d, size in enumerate(t.shape) if d != dim]
    strides = [math.prod(others[d:]) for d in range(1, len(others) + 1)]
    strides.insert(dim, step)
    count = (t.shape[dim] - 1) * step + math.prod(others)
    if t.device.type == "cpu":
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x4000  # MAP_NORESERVE, which mmap names from Python 3.13 on
        memory = torch.frombuffer(mmap.mmap(-1, count * t.element_size(), flags=flags), dtype=t.dtype)
    else:
        memory = torch.empty(count, dtype=t.dtype, device=t.device)
    return memory.as_strided(t.shape, strides).copy_(t)


@contextlib.contextmanager
def output_spread_out(name: str, dim: int, order: tuple[str, ...] = OUTPUTS) -> Iterator[None]:
    """Let one of the tensors that passes make for their results be spread out, by its name in their order."""
    original, names = passes.empty_like, itertools.chain(order, itertools.repeat(""))

    def make(t: Tensor, *dtype: torch.dtype) -> Tensor:
        empty = original(t, *dtype)
        return spread_out(empty, dim) if next(names) == name else empty

    with contextlib.ExitStack() as stack:
        for module in (passes, layers, gated):
            stack.enter_context(mock.patch.object(module, "empty_like", make))
        yield


def attend(case: Case, device: str, operand: str | None = None, dim: int = 0) -> dict[str, Tensor]:
    """Return the results of a case by name, one of whose operands is spread out along a dimension."""
    given = inputs(case, torch.float16, device=device)
    if operand in ("p", "q"):
        given.params = tuple(spread_out(t, dim) if n == operand else t for n, t in zip("pq", given.params, strict=True))
    elif operand in ("x", "mask", "grad_y", "grad_weights"):
        given = replace(given, **{operand: spread_out(getattr(given, operand), dim)})
    with output_spread_out(operand, dim):
        return run(case, given, "triton")


def attend_layers(device: str, operand: str | None = None, dim: int = 0) -> dict[str, Tensor]:
    """Return the results of two layers of the mixture in one launch."""
    generator = torch.Generator().manual_seed(0)
    x, grad_y = (torch.randn(3, 6, 10, generator=generator).to(device, torch.float16) for _ in range(2))
    mask = (torch.rand(3, 6, generator=generator) > 0.3).to(device)
    params = [torch.rand(2, 2, generator=generator).add(0.3).to(device) for _ in range(4)]
    tensors = {"x": x, "mask": mask, "grad_y": grad_y, **dict(zip(("p", "p1", "q", "q1"), params, strict=True))}
    if operand in tensors:
        tensors[operand] = spread_out(tensors[operand], dim)
    x, mask, grad_y, *params = tensors.values()
    leaves = [t.requires_grad_() for t in (x, *params)]
    with output_spread_out(operand, dim, LAYERS_OUTPUTS):
        y, weights = daam.density_block(
            x, params[:2], params[2:], mask=mask, recompute=True, return_weights=True, backend="triton"
        )
        grads = torch.autograd.grad(y, leaves, grad_y)
    return {str(i): t for i, t in enumerate((y, *weights, *grads))}


def gate(device: str, operand: str | None = None, dim: int = 0) -> dict[str, Tensor]:
    """Return the results of the fused gate."""
    generator = torch.Generator().manual_seed(0)
    module = daam.DensityGate(6, 2, backend="triton")
    for p in module.parameters():
        p.data = torch.rand(p.shape, generator=generator)
    shapes = {"x": (3, 6, 10), "grad_y": (3, 6, 10), "grad_gate": (3, 1, 10)}
    tensors = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    tensors = {name: t.to(device, torch.float16) for name, t in tensors.items()}
    tensors["mask"] = (torch.rand(3, 10, generator=generator) > 0.3).to(device)
    if operand in tensors:
        tensors[operand] = spread_out(tensors[operand], dim)
    module.to(device, torch.float16)
    module.gaa.float()
    with output_spread_out(operand, dim, GATED_OUTPUTS):
        y, found = module(tensors["x"].requires_grad_(), mask=tensors["mask"])
        leaves = [tensors["x"], *(p for name, p in module.named_parameters() if name != "to_attn.bias")]  # 0 of that
        grads = torch.autograd.grad([y, found], leaves, [tensors["grad_y"], tensors["grad_gate"]])
    return {str(i): t for i, t in enumerate((y, found, *grads))}


def calls(name: str, quick: bool) -> Iterator[tuple]:
    """Yield (function, its first arguments, an operand, the dimension it is spread out along) of an algorithm, "layers"
    or "gated". quick: of density attention x along each dimension and other operands along the first, of the others x
    along the axis; of chunks on chip.
    """
    full = {"x": (1, 0, 2), "grad_y": (0, 1, 2), "mask": (0, 1)}
    every = full | dict.fromkeys(("grad_weights", "y", "weights", "dx"), (0, 1, 2))
    every |= {"p": (0, 1), "q": (0, 1), "d_p": (0,), "d_q": (0,)}  # kernels take entries of gradients for neighbours
    if name == "layers":
        found = [(attend_layers, (), full | {"p": (0, 1), "q1": (0, 1)} | dict.fromkeys(LAYERS_OUTPUTS, (0, 1, 2)))]
    elif name == "gated":
        found = [(gate, (), full | {"y": (0, 1, 2), "dx": (0, 1, 2)} | dict.fromkeys(OF_GATE, (0, 2)))]
    else:
        on_chip = Case((3, 6, 10), 1, 2, params="features", mask=True, residual=True, algorithm=name)
        streamed = Case((2, 600, 2), 1, params="features", mask=True, algorithm=name)
        first = {operand: (0,) for operand in every if operand not in ("p", "q", "d_p", "d_q")}
        found = [(attend, (on_chip,), every), (attend, (streamed,), first)]  # along the axis it were terabytes
    if quick:
        quickly = {operand: dims if operand == "x" else dims[:1] for operand, dims in every.items()}
        found = [(attend, (on_chip,), quickly if name == "density" else {"x": (1,)})]
    for function, args, operands in found:
        for operand, dims in operands.items():
            yield from ((function, args, operand, dim) for dim in dims)


def check_here(path: Path, device: str, names: list[str], quick: bool) -> None:
    """Check every call that `calls` yields of some names; what fails is written to a file."""
    sys.stderr = path.open("w", buffering=1)
    torch.use_deterministic_algorithms(False)  # which would fill memory that is not to exist
    expected = {}
    every = [(name, *call) for name in names for call in calls(name, quick)]
    for name, function, args, operand, dim in every:
        if (function, args) not in expected:
            expected[function, args] = function(*args, device)
        for key, t in function(*args, device, operand, dim).items():
            found = error(t, expected[function, args][key])
            assert found < BOUND, f"{name}, {operand} spread out along {dim}: error {found} of {key}"


def check(path: Path, device: torch.device, names: list[str], quick: bool = False) -> None:
    """Check calls in a process of their own, forked where no GPU forbids it, and assert that it ends well."""
    context = multiprocessing.get_context("fork" if device.type == "cpu" else "spawn")
    process = context.Process(target=check_here, args=(path, str(device), names, quick))
    process.start()
    process.join()
    assert process.exitcode == 0, f"exit status {process.exitcode}\n{path.read_text()[-2000:]}"
