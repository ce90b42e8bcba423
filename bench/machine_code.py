"""Machine code of compiled kernels, for NVIDIA and AMD GPUs: its instructions, and its main loop.

main_loop(instructions(compiled.code))

Of NVIDIA's also which registers an instruction reads and writes: general ones (R), those that all threads share (UR),
and predicates (P, UP). Where an operand may be a pair it is taken for one: what then waits for a register
too many waits for one that was written together with it.
"""

from __future__ import annotations

import itertools
import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

import triton

_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
_WIDTHS = {"U8": 8, "S8": 8, "U16": 16, "S16": 16, "64": 64, "128": 128}
_REGISTER = re.compile(r"(?<![\w.])(U?R\d+|U?P\d)(?!\w)(\.64)?")
_PREDICATE = re.compile(r"!?U?P[\dT]")
# what has no result: its operands are read
_STORES = ("STG", "STS", "STL", "STSM")
_WITHOUT_RESULT = (*_STORES, "RED", "BAR", "BRA", "EXIT", "CALL", "RET", "WARPSYNC", "BSYNC", "BSSY")
_OF_MEMORY = (*_STORES, "LDG", "LDS", "LDL", "LDSM", "LDC", "LDCU", "ULDC")
_OF_PAIRS = ("DADD", "DMUL", "DFMA", "DSETP", "FADD2", "FMUL2", "FFMA2")
_AMD_WIDTHS = {"dword": 32, "ubyte": 8, "sbyte": 8, "byte": 8, "ushort": 16, "sshort": 16, "short": 16}


@dataclass(frozen=True)
class Instruction:
    """Hold one instruction of a warp: its name with modifiers, the labels before it, the label it may jump to, whether
    a predicate decides about it, and the registers that it reads and writes (NVIDIA).
    """

    name: str
    labels: tuple[str, ...] = ()
    target: str | None = None
    predicated: bool = False
    reads: tuple[str, ...] = ()
    writes: tuple[str, ...] = ()

    @property
    def operation(self) -> str:
        """Return its name without modifiers."""
        return self.name.partition(".")[0]

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
        nvidia = re.fullmatch(r"\s*/\*[0-9a-f]+\*/\s+(?:@!?(U?P\w+)\s+)?([A-Z][\w.]*)(.*?);?\s*", line)
        amd = re.fullmatch(r"\t()([sv]_\w+|global_\w+|buffer_\w+|flat_\w+|ds_\w+)(.*)", line)
        if match := nvidia or amd:
            predicate, name, rest = match.groups()
            jump = re.search(r"(\.L\w+)", rest) if name.startswith(("BRA", "CALL", "s_cbranch", "s_branch")) else None
            if name not in ("NOP", "s_nop"):
                reads, writes = _registers(name, rest, predicate) if nvidia else ((), ())
                target = jump[1] if jump else None
                decided = bool(predicate or (jump and reads) or name.startswith(("s_cbranch", "BRA.DIV")))
                found.append(Instruction(name, labels, target, decided, reads, writes))
                labels = ()
    return found


def _registers(name: str, operands: str, predicate: str | None) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the registers that an instruction of NVIDIA's (reads, writes): results come first among its operands.
    Where a predicate decides, what is written is read too, since it may stay as it was.
    """
    parts, operation = [part.strip() for part in operands.split(",")], name.partition(".")[0]
    width, results = _count_registers(name), _count_results(operation, parts)
    reads, writes = [predicate] if predicate else [], []
    for place, part in enumerate(parts):
        for register, pair in _REGISTER.findall(part):
            if place < results:
                writes += _span(register, width)
            else:
                stored = operation in _STORES and place + 1 == len(parts)
                addend = "WIDE" in name and place + 1 == len(parts)
                reads += _span(register, width if stored else 2 if pair or addend or operation in _OF_PAIRS else 1)
    return tuple(reads + writes if predicate else reads), tuple(writes)


def _count_results(operation: str, parts: list[str]) -> int:
    """Return how many of an instruction's operands are results: a register and up to two predicates, or a predicate and
    another one or a register.
    """
    if operation in _WITHOUT_RESULT or not parts[0]:
        return 0
    if _PREDICATE.fullmatch(parts[0]):
        return 1 if operation == "FCHK" else 2
    predicates = itertools.takewhile(_PREDICATE.fullmatch, parts[1:3])
    found = 1 + sum(not part.startswith("!") for part in predicates)
    return found if found < len(parts) else 1  # what selects by a predicate ends with it


def _count_registers(name: str) -> int:
    """Return how many registers stand behind an operand of as many bits as the name tells."""
    operation, *modifiers = name.split(".")
    if operation in _OF_MEMORY:
        return 4 if {"128", "4"} & set(modifiers) else 2 if {"64", "2"} & set(modifiers) else 1
    if operation in ("F2F", "I2F"):  # what it makes stands before what it makes that of
        return 2 if modifiers[:1] == ["F64"] else 1
    pair = operation in _OF_PAIRS or {"WIDE", "64"} & set(modifiers) or (operation == "CS2R" and "32" not in modifiers)
    return 2 if pair else 1


def _span(register: str, count: int) -> list[str]:
    """Return a register and those after it; a predicate stands alone."""
    kind, number = register.rstrip("0123456789"), int(register.lstrip("URP"))
    return [f"{kind}{number + i}" for i in range(count if kind.endswith("R") else 1)]


def find_labels(code: list[Instruction]) -> dict[str, int]:
    """Return the place of every label."""
    return {label: i for i, step in enumerate(code) for label in step.labels}


def main_loop(code: list[Instruction]) -> tuple[int, int] | None:
    """Return the places of the first and last instruction of the longest innermost loop that loads from global memory;
    None where none does.
    """
    places = find_labels(code)
    # (first, last) place of each loop, which an instruction ends that jumps back
    loops = {(places[step.target], i) for i, step in enumerate(code) if places.get(step.target, i) < i}
    loading = [(a, b) for a, b in loops if any(step.loads for step in code[a : b + 1])]
    inner = [(a, b) for a, b in loading if not any((c, d) != (a, b) and a <= c and d <= b for c, d in loading)]
    return max(inner, key=lambda loop: loop[1] - loop[0], default=None)


def find_turn(code: list[Instruction]) -> list[Instruction]:
    """Return the instructions of the main loop; all of them where there is none."""
    first, last = main_loop(code) or (0, len(code) - 1)
    return code[first : last + 1]
