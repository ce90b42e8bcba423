"""Instructions that move data: between registers and memory, between threads of a warp, and barriers."""

from __future__ import annotations

import re

import numpy as np
from emulator.arithmetic import Step, registers_in
from emulator.memory import FaultError
from emulator.ptx import Instruction, UnsupportedError
from emulator.values import SHARED_MEMORY, SIGNED, UNSIGNED, bits_of, reader, register_bits

LANES = np.arange(32)


def _count(instruction: Instruction) -> int:
    """Return the number of values that a thread loads or stores."""
    return next((int(word[1:]) for word in instruction.modifiers if re.fullmatch(r"v\d", word)), 1)


def _address(operand: str) -> tuple[str, int]:
    """Return register and offset of [register + offset]."""
    found = re.fullmatch(r"\[\s*([%\w.]+)\s*(?:\+\s*(-?\d+))?\s*\]", operand)
    if found is None:
        raise UnsupportedError(f"the address {operand}")
    return found[1], int(found[2] or 0)


def _space(instruction: Instruction) -> str:
    """Return the memory that an instruction accesses: global, shared or param, named right after its opcode."""
    space = next(iter(instruction.modifiers), "")
    if space not in ("global", "shared", "param"):
        raise UnsupportedError(f"memory that is {space or 'not named'}")
    return space


def load(instruction: Instruction) -> Step:
    """Build ld: from global or shared memory, or a parameter of the launch."""
    space, kind = _space(instruction), instruction.kind
    names, count = registers_in(instruction.operands[0]), _count(instruction)
    if len(names) != count:
        raise UnsupportedError(f"{len(names)} registers for {count} numbers")
    base, offset = _address(instruction.operands[1])
    if space == "param":
        return _load_param(base, offset, names, kind)
    extend = [_extender(kind, name) for name in names]
    size = bits_of(kind) // 8

    def loads(threads) -> None:
        addresses = _addresses(threads, base, offset)
        if space == "global":
            found = threads.memory.load(addresses, size, count)
        else:
            found = threads.shared.load(addresses, size, count, *threads.owners())
        for name, widen, value in zip(names, extend, found, strict=True):
            threads.write_active(name, widen(value))

    return loads


def _load_param(name: str, offset: int, targets: list[str], kind: str) -> Step:
    if offset or len(targets) != 1:
        raise UnsupportedError("a part of a parameter")
    extend = _extender(kind, targets[0])
    number = UNSIGNED[bits_of(kind)]

    def loads(threads) -> None:
        value = threads.params[name] & (2 ** bits_of(kind) - 1)
        threads.write(targets[0], extend(np.asarray(number(value))))

    return loads


def _extender(kind: str, register: str):
    """Return a function that makes the bits of a register out of those of a number, which may be fewer."""
    if register == "_" or register_bits(register) == bits_of(kind):
        return lambda bits: bits
    wide = register_bits(register)
    if kind[0] == "s":
        return lambda bits: bits.view(SIGNED[bits_of(kind)]).astype(SIGNED[wide]).view(UNSIGNED[wide])
    return lambda bits: bits.astype(UNSIGNED[wide])


def _addresses(threads, base: str, offset: int) -> np.ndarray:
    """Return the addresses of the threads that take part."""
    start = np.uint32(0) if base == SHARED_MEMORY else threads.registers[base]
    return threads.active(np.asarray(start).astype(np.int64) + offset)


def store(instruction: Instruction) -> Step:
    """Build st: to global or shared memory."""
    space, kind, count = _space(instruction), instruction.kind, _count(instruction)
    names = registers_in(instruction.operands[1])
    if space == "param" or len(names) != count:
        raise UnsupportedError("a store to a parameter, or of another number of registers")
    base, offset = _address(instruction.operands[0])
    size = bits_of(kind) // 8
    reads = [reader(name, f"b{8 * size}") for name in names]

    def stores(threads) -> None:
        addresses = _addresses(threads, base, offset)
        values = [threads.active(read(threads)) for read in reads]
        memory = threads.memory if space == "global" else threads.shared
        memory.store(addresses, size, values, *threads.owners())

    return stores


def _matrices(instruction: Instruction, address: str, registers: str) -> tuple[list[str], str, int, bool]:
    """Return registers, base, offset and whether matrices are transposed, of ldmatrix or stmatrix."""
    names = registers_in(registers)
    if f"x{len(names)}" not in instruction.modifiers:
        raise UnsupportedError(f"{len(names)} registers for other matrices")
    return names, *_address(address), "trans" in instruction.modifiers


def _halves(threads, base: str, offset: int, matrix: int, transposed: bool) -> list[np.ndarray]:
    """Return the addresses of the two halves of every thread's part of a matrix of 8 x 8 numbers of 16 bits.

    Its rows begin where eight threads of the warp say; a thread has two neighbours of a row, of a column transposed.
    """
    threads.need_whole_warps("a matrix")
    rows = _addresses(threads, base, offset).reshape(-1, 32)[:, 8 * matrix : 8 * matrix + 8]
    if (rows % 16).any():
        raise FaultError("a row of a matrix at an address that is not a multiple of 16 bytes")
    first, second = LANES // 4, 2 * (LANES % 4)
    if transposed:
        return [(rows[:, second + half] + 2 * first).ravel() for half in (0, 1)]
    return [(rows[:, first] + 2 * (second + half)).ravel() for half in (0, 1)]


def load_matrix(instruction: Instruction) -> Step:
    """Build ldmatrix: matrices of 8 x 8 numbers of 16 bits, spread over the threads of a warp."""
    names, base, offset, transposed = _matrices(instruction, instruction.operands[1], instruction.operands[0])

    def loads(threads) -> None:
        for matrix, name in enumerate(names):
            low, high = (
                threads.shared.load(addresses, 2, 1, *threads.owners())[0].astype(np.uint32)
                for addresses in _halves(threads, base, offset, matrix, transposed)
            )
            threads.write_active(name, low | (high << np.uint32(16)))

    return loads


def store_matrix(instruction: Instruction) -> Step:
    """Build stmatrix, the inverse of ldmatrix."""
    names, base, offset, transposed = _matrices(instruction, *instruction.operands)
    reads = [reader(name, "b32") for name in names]

    def stores(threads) -> None:
        for matrix, read in enumerate(reads):
            pairs = threads.active(read(threads))
            halves = (pairs & np.uint32(0xFFFF), pairs >> np.uint32(16))
            for addresses, half in zip(_halves(threads, base, offset, matrix, transposed), halves, strict=True):
                threads.shared.store(addresses, 2, [half.astype(np.uint16)], *threads.owners())

    return stores


SOURCES = {
    "bfly": lambda lane, distance: lane ^ distance,
    "idx": lambda lane, distance: distance & 31,
    "down": lambda lane, distance: np.where(lane + distance > 31, lane, lane + distance),
    "up": lambda lane, distance: np.where(lane - distance < 0, lane, lane - distance),
}


def shuffle(instruction: Instruction) -> Step:
    """Build shfl.sync: each thread gets another one's number, of the whole warp."""
    target, value, distance, clamp, members = instruction.operands
    mode = instruction.modifiers[1]
    if "|" in target or int(clamp, 0) != (0 if mode == "up" else 31) or int(members, 0) not in (-1, 2**32 - 1):
        raise UnsupportedError("a shuffle of a part of a warp")
    read, read_by, source = reader(value, "b32"), reader(distance, "u32"), SOURCES[mode]

    def shuffles(threads) -> None:
        threads.need_whole_warps("a shuffle")
        numbers = threads.spread(read(threads)).reshape(-1, 32)
        lanes = source(LANES, threads.spread(read_by(threads)).astype(np.int64).reshape(-1, 32))
        threads.write(target, np.take_along_axis(numbers, lanes, 1).ravel())

    return shuffles


def reduce(instruction: Instruction) -> Step:
    """Build redux.sync: each thread gets the largest, or the least, of the whole warp's numbers."""
    target, value, members = instruction.operands
    read, read_members = reader(value, instruction.kind), reader(members, "u32")
    extreme = {"max": np.max, "min": np.min}[instruction.modifiers[1]]

    def reduces(threads) -> None:
        threads.need_whole_warps("a reduction")
        if (np.asarray(read_members(threads)) != 2**32 - 1).any():
            raise UnsupportedError("a reduction of a part of a warp")
        numbers = threads.spread(read(threads)).reshape(-1, 32)
        threads.write(target, np.repeat(extreme(numbers, 1), 32))

    return reduces


def barrier(instruction: Instruction) -> Step:
    """Build bar.sync of all threads of a program, and bar.warp.sync, which they need not count here."""
    if instruction.modifiers[0] == "warp":
        return lambda threads: threads.need_whole_warps("a barrier of a warp")
    if instruction.operands != ("0",):
        raise UnsupportedError("a barrier of a part of a program")
    return lambda threads: threads.shared.wait(threads.need_whole_programs("a barrier"))


def fence(instruction: Instruction) -> Step:
    """Build fence and membar: here everybody sees what is stored at once."""
    return lambda threads: None
