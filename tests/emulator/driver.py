"""Triton's own CUDA driver and launchers over a libcuda that emulates what is launched, on tensors of the CPU.

Kernels are compiled for sm_90, whole, and launched as on a GPU; only then the emulator takes the PTX instead of the
machine code. What is made of the PTX by ptxas is not seen.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import importlib.util
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import torch
from emulator.machine import executable
from emulator.memory import FaultError, Global
from emulator.values import bits_of

HERE = Path(__file__).parent
BUILD = HERE.parents[1] / "build" / "emulator"
CAPABILITY = (9, 0)
HOOK = ctypes.CFUNCTYPE(None, ctypes.c_uint64, *[ctypes.c_uint] * 5, ctypes.POINTER(ctypes.c_void_p))


class UnavailableError(RuntimeError):
    """Why nothing can be emulated here, in words."""


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
    source = HERE / "libcuda.c"
    key = hashlib.sha256(source.read_bytes() + (include / "cuda.h").read_bytes()).hexdigest()[:16]
    library = BUILD / key / "libcuda.so.1"
    if library.exists():
        return library.parent
    library.parent.mkdir(parents=True, exist_ok=True)
    unfinished = library.with_suffix(f".{os.getpid()}")  # other processes may build, too
    command = ["gcc", "-shared", "-fPIC", "-O1", "-Wl,-soname,libcuda.so.1", f"-I{include}", source, "-o", unfinished]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise UnavailableError(f"gcc does not compile {source.name}: {done.stderr.strip()}")
    unfinished.rename(library)
    return library.parent


class Device:
    """A GPU that is emulated.

    launched: names of the kernels that have run, in order.
    """

    def __init__(self, library: Path):
        self.launched: list[str] = []
        self.memory = Global([])
        self._texts: dict[int, Path] = {}
        self._error: BaseException | None = None
        self._hook = HOOK(self._launch)
        self._library = ctypes.CDLL(str(library / "libcuda.so.1"), mode=ctypes.RTLD_GLOBAL)
        self._library.set_launch_hook(self._hook)

    def loaded(self, module: int, function: int, name: str, files: dict[str, str], key: str) -> None:
        """Remember the PTX of a kernel that Triton loads (knobs.runtime.kernel_load_end_hook)."""
        self._texts[function] = Path(next(path for name, path in files.items() if name.endswith(".ptx")))

    def launching(self, launch, tensors: list[torch.Tensor]) -> None:
        """Call launch(), which may touch these tensors alone, and raise what goes wrong in it."""
        storages = [t.untyped_storage() for t in tensors]
        self.memory = Global(list({(s.data_ptr(), s.data_ptr() + s.nbytes()) for s in storages}))
        launch()
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def _launch(self, function: int, x: int, y: int, z: int, threads: int, shared: int, values) -> None:
        """Run a launch as libcuda is told it. An error cannot pass through C: `launching` raises it."""
        try:
            kernel = executable(self._texts[function].read_text())
            program = kernel.program
            if threads != program.threads:
                raise FaultError(f"{program.name}: launched with {threads} threads, compiled for {program.threads}")
            params = {
                name: int.from_bytes(ctypes.string_at(values[i], bits_of(kind) // 8), "little")
                for i, (name, kind) in enumerate(program.params)
            }
            kernel.run((x, y, z), shared, params, self.memory)
            self.launched.append(program.name)
        except BaseException as error:
            self._error = error


def _tensors(arguments) -> Iterator[torch.Tensor]:
    for one in arguments:
        if isinstance(one, torch.Tensor):
            yield one
        elif isinstance(one, tuple):
            yield from _tensors(one)


@contextlib.contextmanager
def emulation() -> Iterator[Device]:
    """Let Triton drive an emulated GPU, whose tensors are those of the CPU.

    Raises:
        UnavailableError: there is no gcc, or no Triton.
    """
    library = build()
    with mock.patch.dict(os.environ, TRITON_LIBCUDA_PATH=str(library)):
        device = Device(library)
        import triton
        from triton import knobs
        from triton.backends.nvidia.driver import CudaDriver, CudaLauncher

        class Launcher(CudaLauncher):
            def __call__(self, *args):
                device.launching(lambda: CudaLauncher.__call__(self, *args), list(_tensors(args)))

        with mock.patch.object(torch.cuda, "get_device_capability", lambda _=None: CAPABILITY):
            driver = CudaDriver()
        driver.launcher_cls = Launcher
        driver.get_device_capability = lambda _=None: CAPABILITY
        driver.get_current_device = lambda: 0
        driver.get_current_stream = lambda _: 0
        driver.set_current_device = lambda _: None
        knobs.runtime.kernel_load_end_hook.add(device.loaded)
        try:
            with mock.patch.object(triton.runtime.driver, "_active", driver):
                yield device
        finally:
            knobs.runtime.kernel_load_end_hook.remove(device.loaded)
