"""Static audit of the kernels: what the compiler makes of every shipped configuration, without a GPU.

    python -m bench.audit [--targets sm_90 …] [--dtypes bf16 fp32] [--output audit.json]

Per kernel: registers a thread, stack (what spilled) and shared memory in bytes, widest load and store in bits, warps
that a multiprocessor can hold (NVIDIA); and of the main loop, an element of x: elements loaded and stored, instructions
and special-function operations. For sm_90 the modelled share of an H200's memory roof, of the bytes the kernel must
move: a multiprocessor issues four instructions and starts sixteen special functions a clock, and the slowest of issue,
special functions and memory decides (stalls, and masks or weights, are not modelled).
Configurations: bf16 and fp32, aligned, 4 Gaussians, 1024 columns; other dtypes and --full on demand.

The same compiler gives the same figures.
bench/history/audit keeps those of the code as it is, a file a target, and the tests compare with them exactly.
"""

from __future__ import annotations

import argparse
import importlib
import itertools
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
import triton

from bench.aot import TARGETS, Compiled, Launch, compile_for, recording
from bench.machine_code import instructions, main_loop
from daam.kernels.algorithms import ALGORITHMS, count_tensors
from daam.kernels.tiles import LONGEST_CONTIGUOUS, LONGEST_STRIDED

FEATURES = 1024
GAUSSIANS = 4
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, "fp64": torch.float64}
AUDITED = ["bf16", "fp32"]  # unless told
# an H200, per element a thread handles: picoseconds of an issue slot, a special function, a byte of memory
ISSUE, SPECIAL, BYTE = 0.0299, 0.239, 0.2325


@dataclass(frozen=True)
class Configuration:
    """Describe a forward and a backward pass of one regime.

    order: "rows" where the axis is the fastest dimension, "columns" where another one is. along: what parameters vary
    along, "chunk", "inner" or "nothing". full: with mask, weights, their gradient and residual.
    """

    algorithm: str
    order: str
    along: str
    chunk: int
    dtype: str = "bf16"
    full: bool = False

    def __str__(self) -> str:
        parts = (self.algorithm, self.order, self.along, self.chunk, self.dtype, *(["full"] if self.full else []))
        return "-".join(map(str, parts))

    def launches(self) -> list[Launch]:
        """Return the launches of a forward and a backward pass, with gradients of everything."""
        shape, axis = ((64, self.chunk), 1) if self.order == "rows" else ((8, self.chunk, FEATURES), 1)
        if (self.order, self.along) == ("rows", "inner"):
            shape, axis = (8, FEATURES, self.chunk), 2
        feature_axis = {"chunk": axis, "inner": 3 - axis, "nothing": None}[self.along]
        x = torch.empty(shape, dtype=DTYPES[self.dtype], device="meta")
        columns = {"chunk": self.chunk, "inner": FEATURES, "nothing": 1 if self.algorithm == "density" else GAUSSIANS}
        p = torch.empty(1, columns[self.along], device="meta")
        mask = torch.empty(shape, dtype=torch.bool, device="meta")[..., :1] if self.full else None
        return launches(self.algorithm, x, p, mask, axis, feature_axis, self.full)


def launches(
    algorithm: str, x: torch.Tensor, p: torch.Tensor, mask: torch.Tensor | None, axis: int, feature_axis: int | None,
    full: bool, padding: float | None = None,
) -> list[Launch]:  # fmt: skip
    """Return the launches of a forward and a backward pass of an algorithm, x and p on the meta device. full: with
    weights, their gradient and residual.
    """
    kernels = importlib.import_module(f"daam.kernels.{algorithm}")
    settings = ALGORITHMS[algorithm].settings_of(feature_axis, None, padding)
    args, how = (x, p, p, mask), (axis, *settings, full)
    with recording() as recorded:
        stats = kernels.forward(*args, *how, full, True)[2]
        kernels.backward(x, x if full else None, *args, stats, *how, True, True)
    return recorded


# chunk lengths: of models, powers of two and others, the longest on chip, and streamed ones
ROWS = [4, 16, 64, 200, 512, 768, 1024, LONGEST_CONTIGUOUS, 4 * LONGEST_CONTIGUOUS]
COLUMNS = [1, 3, 6, 12, 24, 37, 64, 128, LONGEST_STRIDED, 32 * LONGEST_STRIDED]
OTHERS = [name for name in ALGORITHMS if name != "density"]
CONFIGURATIONS = [
    Configuration(*one)
    for one in (
        *itertools.product(["density"], ["rows"], ["chunk", "nothing"], ROWS),
        *itertools.product(["density"], ["columns"], ["inner", "nothing"], COLUMNS),
        *itertools.product(["density"], ["rows"], ["inner"], [ROWS[1], ROWS[6], ROWS[-1]]),
        *itertools.product(["density"], ["columns"], ["chunk"], [COLUMNS[1], COLUMNS[6], COLUMNS[-1]]),
        *itertools.product(OTHERS, ["rows"], ["nothing"], ROWS),
        *itertools.product(OTHERS, ["columns"], ["nothing"], COLUMNS),
    )
]
ONE_A_REGIME = [
    Configuration("density", "rows", "chunk", 1024),
    Configuration("density", "rows", "chunk", ROWS[-1]),
    *(Configuration("density", "columns", "inner", chunk) for chunk in (3, 256, COLUMNS[-1])),
    *(Configuration(name, "rows", "nothing", chunk) for name in OTHERS for chunk in (1024, ROWS[-1])),
    *(Configuration(name, "columns", "nothing", chunk) for name in OTHERS for chunk in (3, 64, COLUMNS[-1])),
]


@dataclass(frozen=True)
class Figures:
    """Hold what one kernel of a configuration needs on a target, in the units that the module names."""

    registers: int
    stack: int
    shared: int
    warps: int | None
    load_bits: int
    store_bits: int
    loads: float
    stores: float
    instructions: float
    special: float
    roof: float | None


def figures(target: str, recorded: Launch, compiled: Compiled) -> Figures:
    """Return the figures of a launch that was compiled for a target. In one turn the main loop handles the elements of
    the tile that are inside the chunk.
    """
    code = instructions(compiled.code)
    loop, extent = main_loop(code), recorded.args[-1]
    plan, num_warps = recorded.meta["PLAN"], recorded.meta["num_warps"]
    rows = min(extent.chunk, plan.BLOCK_P * plan.N_BLOCKS)
    elements = rows * plan.BLOCK_C / (TARGETS[target].warp_size * num_warps)
    itemsize = recorded.args[0].x.data.itemsize
    reads, writes = count_tensors(recorded.name)
    loads, stores = ([one.bits for one in loop if one.bits and one.loads == wanted] for wanted in (True, False))
    if extent.chunk > rows:  # streamed: LLVM may have unrolled the loop
        elements *= max(1, int(sum(loads) / 8 / itemsize / elements / reads))
    moved = [sum(bits) / 8 / itemsize / elements for bits in (loads, stores)]
    issued, special = len(loop) / elements, sum(one.special for one in loop) / elements
    memory = (reads + writes) * itemsize * BYTE
    return Figures(
        registers=compiled.registers,
        stack=compiled.stack,
        shared=compiled.shared,
        warps=resident_warps(compiled.registers, compiled.shared, num_warps) if compiled.cubin else None,
        load_bits=max((one.bits for one in code if one.loads), default=0),
        store_bits=max((one.bits for one in code if one.bits and not one.loads), default=0),
        loads=round(moved[0], 3),
        stores=round(moved[1], 3),
        instructions=round(issued, 2),
        special=round(special, 3),
        roof=round(memory / max(memory, issued * ISSUE, special * SPECIAL), 3) if target == "sm_90" else None,
    )


def resident_warps(registers: int, shared: int, num_warps: int) -> int:
    """Return how many warps, in whole programs of so many, a multiprocessor holds at once: NVIDIA's have 65,536
    registers, 227 KB of shared memory and room for 64 warps. registers: a thread. shared: bytes a program.
    """
    by_registers = 65_536 // (-(-registers // 8) * 8 * 32 * num_warps)
    by_memory = 227 * 1024 // (shared + 1024)
    return num_warps * min(by_registers, by_memory, 32, 64 // num_warps)


def audit(target: str, configurations: list[Configuration]) -> Iterator[tuple[str, Figures]]:
    """Yield (the configuration's and the kernel's name, the figures) of every kernel of some configurations."""
    for configuration in configurations:
        for recorded in configuration.launches():
            if count_tensors(recorded.name):  # all but what sums partial sums
                yield f"{configuration}/{recorded.name}", figures(target, recorded, compile_for(target, recorded))


def main() -> None:
    """Run the command line: print the figures, and write them as JSON where --output says."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--targets", nargs="+", choices=TARGETS, default=list(TARGETS))
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=AUDITED)
    parser.add_argument("--full", action="store_true", help="with mask, weights, their gradient and residual")
    parser.add_argument("--output", type=Path, help="write the figures as JSON")
    args = parser.parse_args()
    chosen = [replace(one, dtype=dtype, full=args.full) for dtype in args.dtypes for one in CONFIGURATIONS]
    names = list(Figures.__dataclass_fields__)
    found: dict[str, dict[str, dict]] = {}
    for target in args.targets:
        print(f"{target:48}", *(f"{name[:9]:>9}" for name in names))
        found[target] = {}
        for name, one in audit(target, chosen):
            found[target][name] = asdict(one)
            print(f"{name:48}", *(f"{'' if value is None else value:>9}" for value in asdict(one).values()), flush=True)
    if args.output:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps({"triton": triton.__version__, "targets": found})
        args.output.write_text(text.replace("}, ", "},\n") + "\n")  # a line a kernel


if __name__ == "__main__":
    main()
