"""Triton's own CUDA driver and launchers over a libcuda that launches nothing, on tensors of the CPU.

Kernels are compiled for sm_90, whole, and every launch goes all its way on the host, down to the CUDA driver
(`libcuda.c`), which does nothing. Needs gcc, as Triton does for its launchers.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import importlib.util
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from daam.kernels import launch

SOURCE = Path(__file__).with_name("libcuda.c")
BUILD = Path(__file__).parents[1] / "build" / "libcuda"
CAPABILITY = (9, 0)
HOOK = ctypes.CFUNCTYPE(None, ctypes.c_uint64, *[ctypes.c_uint] * 5, ctypes.POINTER(ctypes.c_void_p))


class UnavailableError(RuntimeError):
    """Tell why there is no such driver here."""


def build() -> Path:
    """Return the folder of libcuda.so.1, compiled where it is not yet there.

    Raises:
        UnavailableError: there is no gcc, no Triton, or it does not compile.
    """
    triton = importlib.util.find_spec("triton")
    if triton is None:
        raise UnavailableError("Triton is not installed")
    if shutil.which("gcc") is None:
        raise UnavailableError("there is no gcc, which compiles libcuda.c, and launchers for Triton")
    include = Path(triton.origin).parent / "backends" / "nvidia" / "include"
    key = hashlib.sha256(SOURCE.read_bytes() + (include / "cuda.h").read_bytes()).hexdigest()[:16]
    library = BUILD / key / "libcuda.so.1"
    if library.exists():
        return library.parent
    library.parent.mkdir(parents=True, exist_ok=True)
    unfinished = library.with_suffix(f".{os.getpid()}")  # other processes may build, too
    command = ["gcc", "-shared", "-fPIC", "-O1", "-Wl,-soname,libcuda.so.1", f"-I{include}", SOURCE, "-o", unfinished]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise UnavailableError(f"gcc does not compile {SOURCE.name}: {done.stderr.strip()}")
    unfinished.rename(library)
    return library.parent


@contextlib.contextmanager
def stub_driver(hook: Callable[..., None] | None = None) -> Iterator[Any]:
    """Let Triton drive a GPU that is not there, whose tensors are those of the CPU, and give its driver.

    Args:
        hook: is called for every launch with the function's handle, which is one compiled kernel's, the three sizes of
            the grid, threads, bytes of shared memory, and an array of pointers to the arguments. None: nothing is.

    Raises:
        UnavailableError: as `build` does.
    """
    folder = build()
    # A torch for GPUs finds this library too, and would count its GPU: it counts once, and autograd could not fork then
    torch.cuda.is_available()
    with mock.patch.dict(os.environ, TRITON_LIBCUDA_PATH=str(folder)):
        # Triton looks for the library by its name, and finds this one, since it is loaded
        library = ctypes.CDLL(str(folder / "libcuda.so.1"), mode=ctypes.RTLD_GLOBAL)
        import triton
        from triton.backends.nvidia.driver import CudaDriver

        with mock.patch.object(torch.cuda, "get_device_capability", lambda _=None: CAPABILITY):
            driver = CudaDriver()
        driver.get_device_capability = lambda _=None: CAPABILITY
        driver.get_current_device = lambda: 0
        driver.get_current_stream = lambda _: 0
        driver.set_current_device = lambda _: None
        called = HOOK() if hook is None else HOOK(hook)
        library.set_launch_hook(called)
        try:
            with (
                mock.patch.object(triton.runtime.driver, "_active", driver),
                mock.patch.dict(launch.kept, clear=True),  # what was kept is another driver's
            ):
                yield driver
        finally:
            library.set_launch_hook(HOOK())
