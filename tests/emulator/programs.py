"""Small programs of PTX for the tests of the emulator: arrays in, arrays out."""

from __future__ import annotations

import numpy as np
from emulator.machine import Executable
from emulator.memory import Global

REGISTERS = {1: "%rs", 2: "%rs", 4: "%r", 8: "%rd"}  # by bytes


def execute(code: str, *arrays: np.ndarray, threads: int = 32, programs: int = 1, shared: int = 0) -> None:
    """Run the code of a kernel on arrays, in place.

    %rd0, %rd1, … hold the arrays' addresses and %r0 the thread's number of all of the launch.
    """
    params = ", ".join(f".param .u64 .ptr .global .align 1 a{i}" for i in range(len(arrays)))
    loads = "\n".join(f"ld.param.b64 %rd{i}, [a{i}];" for i in range(len(arrays)))
    number = "mov.u32 %r0, %tid.x;\nmov.u32 %r1, %ctaid.x;\nmad.lo.s32 %r0, %r1, %ntid.x, %r0;"
    text = f".visible .entry kernel({params})\n.reqntid {threads}\n{{\n{loads}\n{number}\n{code}\n}}\n"
    memory = Global([(a.ctypes.data, a.ctypes.data + a.nbytes) for a in arrays])
    addresses = {f"a{i}": a.ctypes.data for i, a in enumerate(arrays)}
    Executable(text).run((programs, 1, 1), shared, addresses, memory)


def compute(instruction: str, dtype, *operands) -> np.ndarray:
    """Return the result of an instruction on operands, arrays of equal length, one element a thread."""
    operands = [np.asarray(array) for array in operands]
    count = len(operands[0])
    threads = -(-count // 32) * 32
    padded = [np.resize(array, threads) for array in operands]
    out = np.zeros(threads, dtype)
    lines, names = [], []
    for i, array in enumerate((out, *padded)):
        size = array.itemsize
        lines.append(f"mul.wide.u32 %rd9{i}, %r0, {size};\nadd.s64 %rd9{i}, %rd9{i}, %rd{i};")
        names.append(f"{REGISTERS[size]}5{i}")
        if i:
            lines.append(f"ld.global.b{8 * size} {names[-1]}, [%rd9{i}];")
    lines += [f"{instruction} {', '.join(names)};", f"st.global.b{8 * out.itemsize} [%rd90], {names[0]};"]
    execute("\n".join(lines), out, *padded, threads=threads)
    return out[:count]
