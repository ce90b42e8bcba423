"""Machine code of compiled kernels, for NVIDIA and AMD GPUs: its instructions, and its main loop.

main_loop(instructions(compiled))
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

import triton

_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
_WIDTHS = {"U8": 8, "S8": 8, "U16": 16, "S16": 16, "64": 64, "128": 128}
_AMD_WIDTHS = {"dword": 32, "ubyte": 8, "sbyte": 8, "byte": 8, "ushort": 16, "sshort": 16, "short": 16}


@dataclass(frozen=True)
class Instruction:
    """Hold one instruction of a warp: its name with modifiers, the labels before it, and the label it may jump to."""

    name: str
    labels: tuple[str, ...] = ()
    target: str | None = None

    @property
    def bits(self) -> int:
        """Return the width in bits, a thread, of a load or store of global memory; 0 of everything else."""
        parts = self.name.split(".")
        if parts[0] in ("LDG", "STG"):
            return next((_WIDTHS[part] for part in parts if part in _WIDTHS), 32)
        if found := re.fullmatch(r"(?:global|buffer|flat)_(?:load|store)_(\w+?)(?:_d16(?:_hi)?)?", self.name):
            unit, _, count = found[1].partition("x")
            return _AMD_WIDTHS.get(unit, 32) * int(count or 1)
        return 0

    @property
    def loads(self) -> bool:
        """Tell whether it loads from global memory."""
        return self.bits > 0 and (self.name.startswith("LDG") or "_load_" in self.name)

    @property
    def special(self) -> bool:
        """Tell whether it takes the special-function unit: reciprocals, roots, exponentials, logarithms."""
        return self.name.startswith("MUFU") or bool(re.match(r"v_(rcp|rsq|sqrt|exp|log)_", self.name))


def read_cubin(cubin: bytes, tool: str, option: str) -> str:
    """Return what a tool of Triton's prints about a cubin: nvdisasm -c its code, cuobjdump -res-usage its needs."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        done = subprocess.run([_TOOLS / tool, option, file.name], check=True, capture_output=True, text=True)
    return done.stdout


def instructions(text: str) -> list[Instruction]:
    """Return the instructions in order, from a disassembly of either vendor."""
    found, labels = [], ()
    for line in text.splitlines():
        if label := re.fullmatch(r"(\.L\w+):(?:\s*[;/].*)?", line.strip()):
            labels = (*labels, label[1])
            continue
        nvidia = re.fullmatch(r"\s*/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)(.*)", line)
        amd = re.fullmatch(r"\t([sv]_\w+|global_\w+|buffer_\w+|flat_\w+|ds_\w+)(.*)", line)
        if match := nvidia or amd:
            jump = re.search(r"(\.L\w+)", match[2]) if match[1].startswith(("BRA", "s_cbranch", "s_branch")) else None
            if match[1] not in ("NOP", "s_nop"):
                found.append(Instruction(match[1], labels, jump[1] if jump else None))
                labels = ()
    return found


def main_loop(code: list[Instruction]) -> list[Instruction]:
    """Return the longest of the innermost loops that move global memory; all of the code where none does."""
    places = {label: i for i, step in enumerate(code) for label in step.labels}
    # (first, last) place of each loop, which an instruction ends that jumps back
    loops = {(places[step.target], i) for i, step in enumerate(code) if places.get(step.target, i) < i}
    moving = [(a, b) for a, b in loops if any(step.bits for step in code[a : b + 1])]
    inner = [(a, b) for a, b in moving if not any((c, d) != (a, b) and a <= c and d <= b for c, d in moving)]
    a, b = max(inner, key=lambda loop: loop[1] - loop[0], default=(0, len(code) - 1))
    return code[a : b + 1]
