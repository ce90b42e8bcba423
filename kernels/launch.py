"""The one launch, its compiler options, and the compiled kernels that are kept for the next one like it."""

from __future__ import annotations

import contextlib
import functools
import inspect
import threading
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .operands import Extent, Split, Strided

MAX_HEADS = 65_535  # heads are grid axis 1


@functools.cache
def _knobs():
    from triton import knobs  # here: tests import this module where there is no Triton

    return knobs


def find_keywords(constants: dict[str, object], nvidia: bool) -> dict[str, object]:
    """Return constants as Triton takes them, with a launch's compiler options: FP fusion is pinned, since Triton 3.10
    changes its default and with it the last bits, and registers to what so many warps can have, or fewer where
    constants say so: left alone, ptxas would spill some bytes to reach some occupancy.
    """
    keywords = {"enable_fp_fusion": True, "maxnreg": min(255, 2048 // constants["num_warps"])}
    keywords |= {name: _wrap(value) for name, value in constants.items()}
    if not nvidia:
        del keywords["maxnreg"]
    return keywords


def _wrap(value: object) -> object:
    """Return a constant as Triton takes it: of tuples (`host.Constants`) it takes no plain values."""
    from triton.language import constexpr

    if not isinstance(value, tuple):
        return value
    wrapped = (_wrap(one) if isinstance(one, tuple) else constexpr(one) for one in value)
    return type(value)(*wrapped) if hasattr(value, "_fields") else tuple(wrapped)


class Launch(NamedTuple):
    """Hold a kernel and what it is launched with: its arguments, and constants and compiler options by name."""

    kernel: Any
    args: tuple
    keywords: dict[str, object]


_recorder = threading.local()
# The interpreter keeps a launch's state in one place for all threads: the program, its grid, Triton's patched language.
_interpreter = threading.Lock()


@contextlib.contextmanager
def recording() -> Iterator[list[Launch]]:
    """Record what this thread launches on the meta device, where nothing can run, until the block ends."""
    _recorder.launches = launches = []
    try:
        yield launches
    finally:
        del _recorder.launches


# Launches of compiled kernels and the constants that end their arguments, by all that Triton compiles a kernel for
kept: dict[tuple, tuple[Callable[..., None], list]] = {}
MOST_KEPT = 4096


def launch(kernel, grid: tuple[int, int], *args, device: torch.device, **constants) -> None:
    """Launch on the device of the tensors, which need not be the current one. grid is (programs, heads)."""
    if device.type == "cuda" and device.index != torch.cuda.current_device():
        with torch.cuda.device(device):
            _launch(kernel, grid, args, device, constants)
    elif device.type == "xpu" and device.index != torch.xpu.current_device():
        with torch.xpu.device(device):
            _launch(kernel, grid, args, device, constants)
    else:
        _launch(kernel, grid, args, device, constants)


def _launch(kernel, grid: tuple[int, int], args: tuple, device: torch.device, constants: dict[str, object]) -> None:
    """Launch what Triton compiled for such arguments, and ask it where there is none.

    Triton finds the compiled kernel anew at every launch, which takes three times as long as to launch it. The key is
    what Triton compiles for: arguments (`traits`), constants, device, and whether the process debugs. Instrumented
    code, a hook of the compiler and hooks of a kernel are left to Triton; hooks of launches are called by what is kept.
    Triton also looks whether global variables that a kernel reads have changed, which ours never do.
    """
    knobs = _knobs()
    key = (kernel.fn, grid, device, knobs.runtime.debug, *constants, *constants.values(), *traits(args))
    found = kept.get(key)
    if knobs.compilation.instrumentation_mode or knobs.runtime.add_stages_inspection_hook or kernel.pre_run_hooks:
        _launch_anew(None, kernel, grid, args, device, constants)
    elif found is None:
        _launch_anew(key, kernel, grid, args, device, constants)
    else:
        run, last = found
        run(*args, *last)


def traits(args: tuple, found: list | None = None) -> list:
    """Return what Triton compiles a kernel for, of each argument: the dtype of a tensor, and whether its data begin at
    a multiple of 16 bytes, which strides do not tell; that a float is one; of an integer whether it is 1 or a multiple
    of 16, for which its value stands. The same of what tuples hold; strides and `Extent` hold integers and None,
    `Split` floats. found: a list to append to.
    """
    found = [] if found is None else found
    for arg in args:
        kind = type(arg)
        if arg is None:
            found.append(None)
        elif kind is Strided:
            data, strides = arg
            found += (data.dtype, data.data_ptr() % 16 == 0, strides)
        elif kind is Extent:
            found.append(arg)
        elif kind is float or kind is Split:
            found.append(kind)
        elif isinstance(arg, tuple):
            found += (kind, len(arg))
            traits(arg, found)
        elif isinstance(arg, Tensor):
            found += (arg.dtype, arg.data_ptr() % 16 == 0)
        else:
            found += (kind, arg)
    return found


def _launch_anew(
    key: tuple | None, kernel, grid: tuple[int, int], args: tuple, device: torch.device, constants: dict[str, object]
) -> None:
    """Launch through Triton, and keep what it compiled under a key, if there is one; on the meta device record it."""
    from triton.compiler import CompiledKernel

    if grid[1] > MAX_HEADS:
        raise ValueError(f'num_heads is {grid[1]}, the backend "triton" takes at most {MAX_HEADS}')
    nvidia = not (torch.version.hip or torch.version.xpu)
    keywords = find_keywords(constants, nvidia)
    if device.type == "meta":
        _recorder.launches.append(Launch(kernel, args, keywords))
        return
    with _interpreter if type(kernel).__name__ == "InterpretedFunction" else contextlib.nullcontext():
        compiled = kernel[grid](*args, **keywords)
    if key is None or not nvidia or not isinstance(compiled, CompiledKernel):
        return  # on AMD GPUs Triton also looks at the size of memory; the interpreter compiles nothing
    if len(kept) >= MOST_KEPT:
        kept.clear()
    names = list(inspect.signature(kernel.fn).parameters)
    kept[key] = compiled[(*grid, 1)], [keywords[name] for name in names[len(args) :]]
