"""Compile Triton kernels before the calls that need them.

A call is run on fake tensors, which have a device and no memory: autocast, layers around ours and the backward pass do
what they would do, and a dispatch mode notes which of our operators are called on what. Their host code then runs on
the meta device, where launches are recorded, and Triton compiles these in several threads.
"""

from __future__ import annotations

import contextlib
import os
import sys
import time
import types
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from daam import backend as backends
from daam import gated, ops
from daam.block_ops import BLOCKS
from daam.checks import check_floating
from daam.kernels import launch

MOST_WORKERS = 16  # the part of a compilation that is Python runs in one thread at a time


class WarmedUp(NamedTuple):
    """Hold what `warmup` did: the kernels that the calls launch, those of them that were not in memory, the seconds it
    took, the threads that compiled, and where there are no kernels the reason.
    """

    kernels: int
    compiled: int
    seconds: float
    workers: int
    reason: str | None = None

    def __str__(self) -> str:
        kernels = "1 kernel" if self.kernels == 1 else f"{self.kernels} kernels"
        if self.reason is not None:
            return f"{kernels}: {self.reason}"
        workers = "1 worker" if self.workers == 1 else f"{self.workers} workers"
        return f"{kernels}, {self.compiled} compiled in {self.seconds:.1f} s with {workers}"


def warmup(
    module_or_function: Callable, shapes: Sequence[Sequence[int]], dtypes: Sequence[torch.dtype] = (torch.float32,), *,
    device: torch.device | str | None = None, backward: bool = True, input_grad: bool = True,
    workers: int | None = None, **arguments: Any,
) -> WarmedUp:  # fmt: skip
    """Compile the Triton kernels that calls will launch, so that a training loop whose lengths change does not wait for
    them: `print(daam.warmup(layer, [(8, n, 768) for n in lengths], [torch.bfloat16]))`.

    Calls are traced, without memory on a GPU and without a launch, under the caller's `torch.autocast`,
    `torch.no_grad` and `daam.use_backend`. Kernels depend on strides: x is taken as contiguous, gradients of outputs as
    contiguous as the outputs are, and the data of both as aligned to 16 bytes. A kernel of other strides is compiled
    when it is launched. Of long rows they depend on how many there are, too: give the batch sizes that will run.

    Args:
        module_or_function: a module, whose layers may be any, or a function such as `daam.density_attention`. It is
            called with x and the arguments, once for every shape and dtype.
        shapes: those of x.
        dtypes: those of x.
        device: where the calls will run; the device of the module's parameters, or of the tensors among the arguments.
        backward: compile backward passes too: of the first output that requires grad, and of all together.
        input_grad: whether x requires grad, as it does behind other layers, and not behind frozen ones.
        workers: threads that compile; a thread a core, up to 16.
        arguments: all else that a call takes, by name. Of a tensor only its shape, strides, dtype and requires_grad
            matter. A Python function is called with x, and gives an argument that depends on its shape:
            `mask=lambda x: x.new_ones(x.shape[:2], dtype=torch.bool)`.

    Returns:
        (kernels, compiled, seconds, workers, reason), a named tuple: how many kernels the calls launch, and how many of
        them this process had not yet compiled, or loaded from Triton's cache on disk. Where there are none, as where
        Triton does not drive the device, reason says why. As text it is "12 kernels, 9 compiled in 8.2 s with 4
        workers".

    Raises:
        TypeError: an argument has the wrong type, or a dtype is none of fp16, bf16, fp32, fp64.
        ValueError: shapes, dtypes or workers are empty, negative or 0, or there is no tensor to tell the device.
        Exception: whatever a call raises on such an x, and the compiler on a kernel.
    """
    start = time.perf_counter()
    shapes, dtypes = _check_sequence("shapes", shapes), _check_sequence("dtypes", dtypes)
    for i, shape in enumerate(shapes):
        _check_shape(i, shape)
    for i, dtype in enumerate(dtypes):
        _check_dtype(i, dtype)
    workers, device = _check_workers(workers), _find_device(module_or_function, device, arguments)
    probe = torch.empty(0, device=device)
    launches, reason = [], backends.find_problem(probe)
    if reason is None:
        calls: dict[_Call, None] = {}
        for shape in shapes:
            for dtype in dtypes:
                calls |= _trace(module_or_function, tuple(shape), dtype, device, backward, input_grad, arguments)
        launches = _record(calls)
        if not launches:
            chosen, why = backends.backend_for(probe)
            reason = f"calls launch none ({why if chosen == 'eager' else 'they ask for eager, or x is empty'})"
    kernels, compiled = 0, 0
    if launches:
        from triton import JITFunction

        if isinstance(launches[0].kernel, JITFunction):
            kernels, compiled = _compile(launches, device, workers)
        else:
            reason = "Triton's interpreter compiles nothing"
    return WarmedUp(kernels, compiled, time.perf_counter() - start, workers, reason)


# --- Arguments ------------------------------------------------------------------------------------
def _check_sequence(name: str, found: Any) -> Sequence:
    if isinstance(found, (str, Tensor)) or not isinstance(found, Sequence):
        raise TypeError(f"{name} is {found!r}, expected a list of {name}")
    if not found:
        raise ValueError(f"{name} is empty, expected one or more")
    return found


def _check_shape(i: int, shape: Any) -> None:
    if not isinstance(shape, Sequence) or any(isinstance(n, bool) or not isinstance(n, int) for n in shape):
        raise TypeError(f"shapes[{i}] is {shape!r}, expected the sizes of x, ints")
    if any(n < 0 for n in shape):
        raise ValueError(f"shapes[{i}] is {tuple(shape)}, expected no negative size")


def _check_dtype(i: int, dtype: Any) -> None:
    if not isinstance(dtype, torch.dtype):
        raise TypeError(f"dtypes[{i}] is {dtype!r}, expected a torch.dtype")
    check_floating({f"x of dtypes[{i}]": torch.empty(0, dtype=dtype, device="meta")})


def _check_workers(workers: Any) -> int:
    """Return how many threads compile: as many as are asked for, or a thread a core."""
    if workers is None:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        return min(cores, MOST_WORKERS)
    if isinstance(workers, bool) or not isinstance(workers, int):
        raise TypeError(f"workers is {workers!r}, expected an int or None")
    if workers < 1:
        raise ValueError(f"workers is {workers}, expected 1 or more")
    return workers


def _find_device(called: Any, device: Any, arguments: dict[str, Any]) -> torch.device:
    """Return the device that calls will run on, with its index."""
    if not callable(called):
        raise TypeError(f"module_or_function is a {type(called).__name__}, expected a module or a function")
    if device is None:
        tensors = [*called.parameters(), *called.buffers()] if isinstance(called, nn.Module) else []
        tensors += [value for value in arguments.values() if isinstance(value, Tensor)]
        device = next((t.device for t in tensors if not t.is_meta), None)
        if device is None:
            raise ValueError("device is None and no tensor tells it, expected the device that calls will run on")
    device = torch.device(device)
    if device.type == "meta":
        raise ValueError("device is meta, expected the device that calls will run on")
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    return device


# --- Calls of operators ---------------------------------------------------------------------------
class _Spec(NamedTuple):
    """Hold what a kernel is compiled for of a tensor."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    offset: int
    room: int

    @classmethod
    def describe(cls, t: Tensor) -> _Spec:
        """Return the spec of a tensor; room: the elements of its memory, of which the first has the offset 0."""
        room = t.untyped_storage().nbytes() // t.element_size()
        return cls(t.dtype, tuple(t.shape), t.stride(), t.storage_offset(), room)

    def make(self, device: torch.device | str) -> Tensor:
        """Return such a tensor, whose data begin where they do from what is aligned."""
        room = torch.empty(self.room, dtype=self.dtype, device=device)
        return room.as_strided(self.shape, self.strides, self.offset)


_Call = tuple[Any, tuple]  # an operator, and its arguments, a spec for each tensor


def _describe(arg: Any) -> Any:
    """Return an argument as calls are known by: a spec for a tensor, and a tuple for a list."""
    if isinstance(arg, (list, tuple)):
        return tuple(map(_describe, arg))
    return _Spec.describe(arg) if isinstance(arg, Tensor) else arg


def _make(arg: Any) -> Any:
    """Return what was described on the meta device."""
    if isinstance(arg, _Spec):
        return arg.make("meta")
    return [_make(one) for one in arg] if isinstance(arg, tuple) else arg


class _Noting(TorchDispatchMode):
    """Note calls of this package's operators."""

    def __init__(self):
        super().__init__()
        self.calls: dict[_Call, None] = {}  # in order

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "daam":
            self.calls[func, tuple(map(_describe, args))] = None
        return func(*args, **(kwargs or {}))


def _trace(
    called: Callable, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, backward: bool,
    input_grad: bool, arguments: dict[str, Any],
) -> dict[_Call, None]:  # fmt: skip
    """Return the operators' calls in a call, and its backward pass, on fake tensors."""

    def fake(t: Tensor) -> Tensor:
        made = _Spec.describe(t).make(device)
        return made.requires_grad_() if t.requires_grad else made

    noting = _Noting()
    with contextlib.ExitStack() as stack:
        if "torch._dynamo" in sys.modules:  # what is compiled calls the same operators
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        stack.enter_context(torch.autograd.set_multithreading_enabled(False))  # modes are a thread's
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        x = torch.empty(shape, dtype=dtype, device=device, requires_grad=input_grad)
        given = {}
        for name, value in arguments.items():
            value = value(x) if isinstance(value, types.FunctionType) else value
            given[name] = fake(value) if isinstance(value, Tensor) else value
        stack.enter_context(noting)
        if isinstance(called, nn.Module):
            tensors = {**dict(called.named_parameters()), **dict(called.named_buffers())}
            replaced = {name: fake(t) for name, t in tensors.items()}
            outputs = torch.func.functional_call(called, replaced, (x,), given)
        else:
            outputs = called(x, **given)
        if backward:
            _differentiate([t for t in _find_tensors(outputs) if t.requires_grad])
    return noting.calls


def _find_tensors(outputs: Any) -> Iterator[Tensor]:
    """Yield the tensors in tuples, lists and values of dictionaries."""
    if isinstance(outputs, Tensor):
        yield outputs
    elif isinstance(outputs, (tuple, list, dict)):
        for value in outputs.values() if isinstance(outputs, dict) else outputs:
            yield from _find_tensors(value)


def _differentiate(outputs: list[Tensor]) -> None:
    """Run the backward pass of the first output, and that of all."""
    for some in (outputs[:1], outputs)[: len(outputs)]:
        torch.autograd.backward(some, [torch.empty_like(t) for t in some], retain_graph=True)


# --- Kernels --------------------------------------------------------------------------------------
def _record(calls: dict[_Call, None]) -> list[launch.Launch]:
    """Return the launches of operators' calls."""
    families = (*ops.OPERATORS.values(), *BLOCKS.values(), gated.GATED)
    passes = {one.forward_op: (one, "forward") for one in families}
    passes |= {one.backward_op: (one, "backward") for one in families}
    with launch.recording() as launches, torch.no_grad():
        for op, args in calls:
            operators, name = passes[op]
            run = getattr(operators.kernels, name)
            run(*map(_make, args))
    return launches


def _compile(launches: list[launch.Launch], device: torch.device, workers: int) -> tuple[int, int]:
    """Compile and load what launches need; return how many kernels that are, and how many of them were not there."""
    from triton import AsyncCompileMode, FutureKernel

    def load(kernel) -> None:
        with _current(device):
            kernel.run  # noqa: B018  a property that loads it, and compiles what launches it

    with ThreadPoolExecutor(workers) as pool, _current(device):
        with AsyncCompileMode(pool):
            found = [one.kernel.warmup(*one.args, grid=(1,), **one.keywords) for one in launches]
        kernels = {id(kernel): kernel for kernel in found}.values()
        compiled = [isinstance(kernel, FutureKernel) for kernel in kernels]
        ready = [kernel.result() if isinstance(kernel, FutureKernel) else kernel for kernel in kernels]
        list(pool.map(load, ready))
    return len(ready), sum(compiled)


def _current(device: torch.device) -> contextlib.AbstractContextManager:
    """Make a GPU the current one, which Triton compiles for."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()
