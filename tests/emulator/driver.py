"""Triton's own CUDA driver and launchers over a libcuda that emulates what is launched, on tensors of the CPU.

Kernels are compiled for sm_90, whole, and launched as on a GPU; only then the emulator takes the PTX instead of the
machine code. What is made of the PTX by ptxas is not seen.
"""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from emulator.machine import executable
from emulator.memory import FaultError, Global
from emulator.values import bits_of

from bench.stub_driver import stub_driver


class Device:
    """Stand in for a GPU.

    launched: names of the kernels that have run, in order.
    """

    def __init__(self):
        self.launched: list[str] = []
        self.memory = Global([])
        self._texts: dict[int, Path] = {}
        self._error: BaseException | None = None

    def loaded(self, module: int, function: int, name: str, files: dict[str, str], key: str) -> None:
        """Keep the PTX of a kernel that Triton loads (knobs.runtime.kernel_load_end_hook)."""
        text = next((path for file, path in files.items() if file.endswith(".ptx")), None)
        if text is None:
            raise FileNotFoundError(f"{name}: Triton's cache has no .ptx of it, which is what is emulated")
        self._texts[function] = Path(text)

    def launching(self, launch: Callable[[], None], tensors: list[torch.Tensor]) -> None:
        """Call launch(), which may touch these tensors alone, and raise what goes wrong in it."""
        storages = [t.untyped_storage() for t in tensors]
        self.memory = Global(list({(s.data_ptr(), s.data_ptr() + s.nbytes()) for s in storages}))
        launch()
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def run(self, function: int, x: int, y: int, z: int, threads: int, shared: int, values) -> None:
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
    for argument in arguments:
        if isinstance(argument, torch.Tensor):
            yield argument
        elif isinstance(argument, tuple):
            yield from _tensors(argument)


@contextlib.contextmanager
def emulation() -> Iterator[Device]:
    """Let Triton drive an emulated GPU, whose tensors are those of the CPU.

    Raises:
        UnavailableError: there is no gcc, or no Triton (`bench.stub_driver`).
    """
    device = Device()
    with stub_driver(device.run) as driver:
        from triton import knobs

        real = driver.launcher_cls

        class Launcher(real):
            def __call__(self, *args):
                device.launching(lambda: real.__call__(self, *args), list(_tensors(args)))

        driver.launcher_cls = Launcher
        knobs.runtime.kernel_load_end_hook.add(device.loaded)
        try:
            yield device
        finally:
            knobs.runtime.kernel_load_end_hook.remove(device.loaded)
