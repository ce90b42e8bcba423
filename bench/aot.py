"""Compile kernels ahead of time, for GPUs that are not there, and read what the compiler made of them.

    with recording() as launches:
        density.forward(x_on_meta, …)
    compile_for("sm_90", launches[0]).stack

A recorded launch is compiled through Triton's own launch path with a driver that only names a target, so arguments are
specialised exactly as they would be on that GPU. Line information is left out: ptxas gives a few registers more or less
for it, so that a comment more would change what is read here. Not usable in a process with TRITON_INTERPRET=1:
interpreted functions cannot be compiled.
"""

from __future__ import annotations

import contextlib
import functools
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any
from unittest import mock

import torch
import triton
from triton import knobs
from triton.backends.compiler import GPUTarget

from bench.detours import skip_detours
from bench.machine_code import Instruction, instructions, read_cubin
from daam.kernels import launch

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}


@dataclass(frozen=True)
class Launch:
    """Hold a kernel and the arguments it was launched with; tensors among them may be on the meta device. grid: the
    programs, by dimension. options: of the compiler, beside num_warps, which meta has; None: those of this project.
    """

    kernel: Any
    args: tuple
    meta: dict
    grid: tuple[int, ...] = (1,)
    options: dict | None = None

    @property
    def name(self) -> str:
        """Return the name of the kernel's function."""
        return self.kernel.fn.__name__


@dataclass(frozen=True)
class Compiled:
    """Hold what a launch needs on a target: registers a thread, stack and shared memory in bytes; and its assembly.

    stack is what spilled: 0 of a kernel that fits. On AMD GPUs it is the private segment, and there is no cubin.
    """

    registers: int
    stack: int
    shared: int
    assembly: str
    cubin: bytes | None

    @functools.cached_property
    def code(self) -> str:
        """Return the machine code as text: SASS for NVIDIA GPUs, the assembly for others."""
        return self.assembly if self.cubin is None else read_cubin(self.cubin, "nvdisasm", "-c")

    @functools.cached_property
    def instructions(self) -> list[Instruction]:
        """Return the machine code's instructions, in order, as they run where nothing takes a detour."""
        return skip_detours(instructions(self.code))

    @property
    def load_bits(self) -> int:
        """Return the width in bits of the widest load from global memory; 0 where there is none."""
        widths = [32 * int(n) for n in re.findall(r"(?:global|buffer)_load_dwordx(\d)", self.assembly)]
        for vector, bits in re.findall(r"ld\.global(?:\.\w+::\w+)*(?:\.v(\d))?\.b(\d+)", self.assembly):
            widths.append(int(vector or 1) * int(bits))
        return max(widths, default=0)


class Offline:
    """Answer as a driver which target to compile for, and nothing else."""

    def __init__(self, name: str):
        self.name = name

    def get_current_target(self) -> GPUTarget:
        return TARGETS[self.name]

    def get_current_device(self) -> str:
        return self.name  # the key of Triton's table of compiled kernels: one a target

    def get_current_stream(self, device: str) -> int:
        return 0


@contextlib.contextmanager
def recording() -> Iterator[list[Launch]]:
    """Record launches in the list that is given, instead of running them, until the block ends."""
    launches: list[Launch] = []

    def record(kernel, grid, *args, device, **meta):
        launches.append(Launch(kernel, args, meta, grid))

    with mock.patch.object(launch, "launch", record):
        yield launches


@contextlib.contextmanager
def recording_triton() -> Iterator[list[Launch]]:
    """Record launches that go through Triton, kernel[grid](…), as `recording` does those of this project. When the
    block ends their tensors move to the meta device.
    """
    launches: list[Launch] = []

    def record(kernel, *args, grid, warmup, **meta):
        launches.append(Launch(kernel, args, meta, grid, {"enable_fp_fusion": True}))

    with mock.patch.object(triton.JITFunction, "run", record):
        yield launches
    launches[:] = [replace(one, args=tuple(map(_drop_memory, one.args))) for one in launches]


def _drop_memory(arg: Any) -> Any:
    """Return a tensor's like on the meta device, and anything else as it is."""
    if isinstance(arg, torch.Tensor):
        return torch.empty_strided(arg.shape, arg.stride(), dtype=arg.dtype, device="meta")
    return arg


def find_keywords(recorded: Launch, target: str) -> dict:
    """Return the constants and compiler options of a recorded launch, for the target of that name in TARGETS."""
    if recorded.options is not None:
        return recorded.meta | recorded.options
    return launch.find_keywords(recorded.meta, nvidia=TARGETS[target].backend == "cuda")


def compile_for(target: str, recorded: Launch) -> Compiled:
    """Compile a recorded launch for the target of that name in TARGETS, and return what the compiler made of it."""
    with mock.patch.object(triton.runtime.driver, "_active", Offline(target)), knobs.compilation.scope():
        knobs.compilation.disable_line_info = True
        kernel = recorded.kernel.warmup(*recorded.args, **find_keywords(recorded, target), grid=(1,))
    cubin = None
    if TARGETS[target].backend == "hip":
        assembly = kernel.asm["amdgcn"]
        registers = _number(r"\.vgpr_count:\s+(\d+)", assembly)
        stack = _number(r"\.private_segment_fixed_size:\s+(\d+)", assembly)
    else:
        assembly = kernel.asm["ptx"]
        cubin = kernel.asm["cubin"]
        usage = read_cubin(cubin, "cuobjdump", "-res-usage")
        registers, stack = _number(r"REG:(\d+)", usage), _number(r"STACK:(\d+)", usage)
    return Compiled(registers, stack, kernel.metadata.shared, assembly, cubin)


def _number(pattern: str, text: str) -> int:
    """Return the number that the first match of a pattern holds in its group."""
    return int(re.search(pattern, text)[1])
