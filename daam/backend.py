"""Which backend a call runs on: auto, triton or eager, and why.

The argument `backend` decides first, then `use_backend`, then the environment variable DAAM_BACKEND; the latter two
stand in for "auto" alone. "auto" takes Triton for tensors on a GPU that Triton's active driver drives and eager for all
others.
"triton" where it cannot run is an error that says why. With TRITON_INTERPRET=1 set before Triton is imported, "triton"
also runs on CPU tensors, in its interpreter.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import importlib.util
import os
import sys
import threading
import warnings
from collections.abc import Iterator
from typing import Literal

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from daam.checks import check_choice

Backend = Literal["auto", "triton", "eager"]
BACKENDS = ("auto", "triton", "eager")

try:
    _TRITON_INSTALLED = importlib.util.find_spec("triton") is not None
except (ImportError, ValueError):  # an import hook may refuse it
    _TRITON_INSTALLED = False

# Not a ContextVar: Dynamo cannot trace one, and fullgraph is part of the contract.
_context = threading.local()


def backend_for(x: Tensor, backend: Backend = "auto") -> tuple[Literal["triton", "eager"], str]:
    """Return the backend that a call on x runs on, and the reason.

    Args:
        x: the tensor that would be passed; only its device matters.
        backend: "auto", "triton" or "eager", as passed to the call.

    Returns:
        ("triton" or "eager", reason), the reason in words.

    Raises:
        ValueError: the backend, or DAAM_BACKEND, is none of the three.
        RuntimeError: "triton" is asked for and cannot run on x; the message says why.
    """
    name, source = _find_request(backend)
    problem = None if name == "eager" else find_problem(x)
    if name == "triton" and problem is not None:
        raise RuntimeError(f'backend "triton", requested by {source}, cannot run: {problem}')
    if name != "auto":
        return name, f"requested by {source}"
    if problem is None and (x.is_cuda or x.is_xpu):
        return "triton", f"x is on {x.device}, which Triton drives"
    if not x.is_cpu and (x.is_cuda or x.is_xpu) and not torch.compiler.is_compiling():
        _warn_once(problem)
    return "eager", problem or f"x is on {x.device.type}"


@contextlib.contextmanager
def use_backend(backend: Backend) -> Iterator[None]:
    """Make every call of this thread that leaves `backend` at "auto" use this one: `with daam.use_backend("eager"): …`.

    Backward passes run on their forward pass's backend, wherever called. Blocks nest; "auto" lets the device decide.

    Raises:
        ValueError: the backend is none of auto, triton, eager.
    """
    check_choice("backend", backend, BACKENDS)
    previous = getattr(_context, "backend", None)
    _context.backend = backend
    try:
        yield
    finally:
        _context.backend = previous


def interpreting() -> bool:
    """Tell whether kernels run in Triton's interpreter, on CPU tensors."""
    if "triton.language" in sys.modules:
        # what counts is the environment when Triton was imported: its own library is interpreted from then on, or not
        return type(sys.modules["triton.language"].sum).__name__ == "InterpretedFunction"
    return _TRITON_INSTALLED and os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "on", "y", "yes")


def _find_request(backend: str) -> tuple[str, str]:
    check_choice("backend", backend, BACKENDS)
    if backend != "auto":
        return backend, "the argument backend"
    if (context := getattr(_context, "backend", None)) is not None:
        return context, "daam.use_backend"
    if environment := os.environ.get("DAAM_BACKEND"):
        check_choice("the environment variable DAAM_BACKEND", environment, BACKENDS)
        return environment, "the environment variable DAAM_BACKEND"
    return "auto", "default"


def find_problem(x: Tensor) -> str | None:
    """Return why Triton cannot run on x, in words; None where it can."""
    if not _TRITON_INSTALLED:
        return "Triton is not installed (pip install 'daam-triton[triton]')"
    if x.is_cuda or x.is_xpu:  # NVIDIA's and AMD's GPUs, or Intel's
        # A fake tensor has no device to ask about, and a tracer may not open a driver: the launch itself would tell.
        fake = torch.compiler.is_compiling() or isinstance(x, FakeTensor)
        return None if fake else _driver_problem("cuda" if x.is_cuda else "xpu")
    if x.is_meta:
        return None
    if x.device.type == "cpu" and interpreting():
        return None if torch.compiler.is_compiling() else _interpreter_problem()
    return f"x is on {x.device.type}, which Triton does not drive (TRITON_INTERPRET=1 runs kernels on CPU tensors)"


@functools.cache
def _driver_problem(device: str) -> str | None:
    """Return why Triton's active driver does not drive devices of a type, in words; None where it does. The answer is
    kept: opening a driver is slow.
    """
    try:
        import triton

        driver = triton.runtime.driver.active
        driver.get_current_target()
        driven = driver.get_active_torch_device().type
    except Exception as error:  # no driver, no compiler, no libcuda, no headers: each fails in a way of its own
        return f"Triton finds no driver it can use: {type(error).__name__}: {error}"
    return None if driven == device else f"x is on {device}, and Triton's driver is for {driven}"


@functools.cache
def _interpreter_problem() -> str | None:
    """Return why Triton's interpreter cannot run kernels, in words; None where it can. Before 3.7 it makes an index of
    an array of one element, which NumPy refuses since 2.4.
    """
    import triton

    numpy = importlib.metadata.version("numpy")
    if _release(triton.__version__) >= (3, 7) or _release(numpy) < (2, 4):
        return None
    found = f"Triton {triton.__version__} does not run with NumPy {numpy}"
    return f"the interpreter of {found}: it needs Triton 3.7, or NumPy below 2.4"


def _release(version: str) -> tuple[int, int]:
    major, minor, *_others = version.split(".")
    return int(major), int(minor)


@functools.cache
def _warn_once(problem: str) -> None:
    warnings.warn(f"density attention runs on the eager backend on a GPU: {problem}", stacklevel=4)
