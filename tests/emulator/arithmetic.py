"""Instructions that compute: from registers into a register, each thread for itself.

A builder takes an instruction and returns its step, a function of `machine.Threads` that executes it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
from emulator import floats
from emulator.ptx import Instruction, UnsupportedError
from emulator.values import FLOATS, UNSIGNED, bits_of, encoder, integer, is_float, reader

Step = Callable[[Any], None]
Builder = Callable[[Instruction], Step]
WIDER = {16: 32, 32: 64}


def step_of(instruction: Instruction, function: Callable, kinds: list[str], result: str) -> Step:
    """Return the step that writes function(operands), the operands being of these types, and the result of one."""
    target, *operands = instruction.operands
    if len(operands) != len(kinds):
        raise UnsupportedError(f"{len(operands)} operands, expected {len(kinds)}")
    encode = encoder(result)
    if len(kinds) == 1:
        read = reader(operands[0], kinds[0])
        return lambda threads: threads.write(target, encode(function(read(threads))))
    if len(kinds) == 2:
        first, second = map(reader, operands, kinds)
        return lambda threads: threads.write(target, encode(function(first(threads), second(threads))))
    reads = list(map(reader, operands, kinds))
    return lambda threads: threads.write(target, encode(function(*[read(threads) for read in reads])))


def elementwise(function: Callable, count: int) -> Builder:
    """Return the builder of instructions of a number of operands, all of the type of the result."""

    def build(instruction: Instruction) -> Step:
        kind = instruction.kind
        if kind.endswith("x2"):
            raise UnsupportedError(f"pairs of numbers, {kind}")
        chosen = _flushed(function) if "ftz" in instruction.modifiers else function
        return step_of(instruction, chosen, [kind] * count, kind)

    return build


def fused(instruction: Instruction) -> Step:
    """Build fma, which rounds once."""
    if instruction.kind not in ("f32", "f64"):
        raise UnsupportedError(f"fma of {instruction.kind}")
    return elementwise(floats.fma, 3)(instruction)


def _flushed(function: Callable) -> Callable:
    return lambda *operands: floats.flush(function(*map(floats.flush, operands)))


def approximate(function: Callable) -> Builder:
    """Return the builder of approximations in fp32; those in fp64 keep half of the bits, exact ones all."""

    def build(instruction: Instruction) -> Step:
        if instruction.kind == "f64" and "ftz" in instruction.modifiers:
            return step_of(instruction, lambda x: floats.upper_half(function(x)), ["f64"], "f64")
        return elementwise(function, 1)(instruction)

    return build


def divide(instruction: Instruction) -> Step:
    """Build div: of integers towards 0; of floats exact (.rn), or to 2 units in the last place."""
    if not is_float(instruction.kind):
        return elementwise(_quotient, 2)(instruction)
    exact = "rn" in instruction.modifiers
    return elementwise(np.divide if exact else floats.divide, 2)(instruction)


def _quotient(a, b):
    """Return a/b rounded towards 0. What a GPU makes of b = 0 is undefined."""
    if np.asarray(a).dtype.kind == "u":
        return a // np.maximum(b, 1)
    size = np.abs(a) // np.maximum(np.abs(b), 1)
    return np.where((a < 0) != (b < 0), -size, size)


def _remainder(a, b):
    return a - _quotient(a, b) * b


remainder = elementwise(_remainder, 2)


def reciprocal(instruction: Instruction) -> Step:
    """Build rcp: exact (.rn), to one unit in the last place, or of fp64 to half of its bits."""
    if "rn" in instruction.modifiers:
        return elementwise(lambda x: 1 / x, 1)(instruction)
    if instruction.kind == "f64":
        return step_of(instruction, lambda x: floats.upper_half(1 / x), ["f64"], "f64")
    return elementwise(floats.reciprocal, 1)(instruction)


def square_root(instruction: Instruction) -> Step:
    """Build sqrt: exact (.rn), or to 2**-23."""
    return elementwise(np.sqrt if "rn" in instruction.modifiers else floats.sqrt, 1)(instruction)


def multiply(instruction: Instruction) -> Step:
    """Build mul: the lower half of the product, its upper half or, twice as wide, all of it."""
    kind, bits = instruction.kind, bits_of(instruction.kind)
    if "wide" in instruction.modifiers:
        return step_of(instruction, _wide_product(kind), [kind] * 2, kind[0] + str(WIDER[bits]))
    if "hi" not in instruction.modifiers:
        return elementwise(np.multiply, 2)(instruction)
    if bits == 64:
        return step_of(instruction, _upper_of_128, [kind] * 2, kind)
    product = _wide_product(kind)
    return step_of(instruction, lambda a, b: (product(a, b) >> bits).astype(integer(kind)), [kind] * 2, kind)


def _wide_product(kind: str) -> Callable:
    wide = integer(kind[0] + str(WIDER[bits_of(kind)]))
    return lambda a, b: a.astype(wide) * b.astype(wide)


@functools.partial(np.frompyfunc, nin=2, nout=1)
def _upper_bits(a, b):
    return (int(a) * int(b) >> 64) & (2**64 - 1)


def _upper_of_128(a, b):
    return np.asarray(_upper_bits(a, b), dtype=object).astype(np.uint64)


def multiply_add(instruction: Instruction) -> Step:
    """Build mad of integers: a·b + c, the product wide or its lower half."""
    kind = instruction.kind
    if "wide" not in instruction.modifiers:
        return elementwise(lambda a, b, c: a * b + c, 3)(instruction)
    wide, product = kind[0] + str(WIDER[bits_of(kind)]), _wide_product(kind)
    return step_of(instruction, lambda a, b, c: product(a, b) + c, [kind, kind, wide], wide)


def extreme(ignoring: Callable, propagating: Callable) -> Builder:
    """Return the builder of min and max: of floats the number where one is NaN, or with .NaN that."""

    def build(instruction: Instruction) -> Step:
        ignores = is_float(instruction.kind) and "NaN" not in instruction.modifiers
        return elementwise(ignoring if ignores else propagating, 2)(instruction)

    return build


def shift(left: bool) -> Builder:
    """Return the builder of shl and shr: beyond the width nothing is left, or the sign."""

    def build(instruction: Instruction) -> Step:
        kind, bits = instruction.kind, bits_of(instruction.kind)
        number, signed = integer(kind), instruction.kind[0] == "s"

        def shifted(x, distance):
            clamped = np.minimum(distance, bits - 1).astype(number)
            moved = x << clamped if left else x >> clamped
            return moved if signed and not left else np.where(distance >= bits, number(0), moved)

        return step_of(instruction, shifted, [kind, "u32"], kind)

    return build


def funnel_shift(instruction: Instruction) -> Step:
    """Build shf: 32 bits of two registers side by side, shifted."""
    left, wraps = "l" in instruction.modifiers, "wrap" in instruction.modifiers

    def shifted(low, high, distance):
        distance = distance & np.uint64(31) if wraps else np.minimum(distance, np.uint64(32))
        joined = (high.astype(np.uint64) << np.uint64(32)) | low
        return ((joined << distance) >> np.uint64(32) if left else joined >> distance).astype(np.uint32)

    return step_of(instruction, shifted, ["u32", "u32", "u64"], "b32")


def extract_bits(instruction: Instruction) -> Step:
    """Build bfe: a number of bits from a position on, the last of them being the sign of a signed number."""
    kind, unit = instruction.kind, np.uint64(1)

    def extracted(x, position, count):
        mask = (unit << count) - unit
        bits = (x >> position) & mask
        if kind[0] == "s":
            negative = (bits >> (count - unit)) & unit
            bits = np.where(negative, bits | ~mask, bits)
        return bits.astype(UNSIGNED[bits_of(kind)])

    return step_of(instruction, extracted, ["u64"] * 3, "b" + kind[1:])


def insert_bits(instruction: Instruction) -> Step:
    """Build bfi: the second number, with the first number's lowest bits in a field of a given position and length."""
    unit = np.uint64(1)

    def inserted(x, into, position, count):
        mask = ((unit << count) - unit) << position
        return ((into & ~mask) | ((x << position) & mask)).astype(UNSIGNED[bits_of(instruction.kind)])

    return step_of(instruction, inserted, ["u64"] * 4, instruction.kind)


def permute_bytes(instruction: Instruction) -> Step:
    """Build prmt: four bytes of two registers, chosen by a hex digit each; with its upper bit the sign of one."""

    def permuted(a, b, choice):
        joined, result = (b << np.uint64(32)) | a, np.uint64(0)
        for i in range(4):
            digit = (choice >> np.uint64(4 * i)) & np.uint64(15)
            byte = (joined >> ((digit & np.uint64(7)) * np.uint64(8))) & np.uint64(255)
            sign = np.where(byte & np.uint64(128), np.uint64(255), np.uint64(0))
            result = result | (np.where(digit & np.uint64(8), sign, byte) << np.uint64(8 * i))
        return result.astype(np.uint32)

    return step_of(instruction, permuted, ["u64"] * 3, "b32")


def count_bits(function: Callable[[int, int], int]) -> Builder:
    """Return the builder of popc and clz: function(number, its width)."""

    def build(instruction: Instruction) -> Step:
        kind = "u" + instruction.kind[1:]
        counted = np.frompyfunc(lambda x: function(int(x), bits_of(kind)), 1, 1)
        return step_of(instruction, lambda x: np.asarray(counted(x)).astype(np.uint32), [kind], "u32")

    return build


COMPARISONS = {
    "eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal,
    "lo": np.less, "ls": np.less_equal, "hi": np.greater, "hs": np.greater_equal,
}  # fmt: skip
LOGIC = {"and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor}


def compare(instruction: Instruction) -> Step:
    """Build setp, a comparison into a predicate: ordered ones are false of NaN, unordered ones (…u) true."""
    name, *combine = (word for word in instruction.modifiers if word != "ftz")
    function = _comparison(name, is_float(instruction.kind))
    if "ftz" in instruction.modifiers:
        function = functools.partial(lambda f, a, b: f(floats.flush(a), floats.flush(b)), function)
    if not combine:
        return step_of(instruction, function, [instruction.kind] * 2, "pred")
    logic = LOGIC[combine[0]]
    kinds = [instruction.kind, instruction.kind, "pred"]
    return step_of(instruction, lambda a, b, c: logic(function(a, b), c), kinds, "pred")


def _comparison(name: str, floating: bool) -> Callable:
    if not floating:
        return COMPARISONS[name]
    if name == "nan":
        return lambda a, b: np.isnan(a) | np.isnan(b)
    if name == "num":
        return lambda a, b: ~(np.isnan(a) | np.isnan(b))
    if name == "ne":
        return lambda a, b: (a < b) | (a > b)
    if name[:-1] in COMPARISONS:  # …u
        return lambda a, b: COMPARISONS[name[:-1]](a, b) | np.isnan(a) | np.isnan(b)
    return COMPARISONS[name]


def select(instruction: Instruction) -> Step:
    """Build selp: the first number where the predicate holds, else the second."""
    kinds = [instruction.kind, instruction.kind, "pred"]
    return step_of(instruction, lambda a, b, choice: np.where(choice, a, b), kinds, instruction.kind)


ROUNDINGS = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}


def convert(instruction: Instruction) -> Step:
    """Build cvt: numbers of one type to another; two fp32 to a pair of halves."""
    result, source = instruction.kinds
    if result.endswith("x2"):
        half, target = encoder(result[:-2]), instruction.operands[0]
        upper, lower = (reader(operand, source) for operand in instruction.operands[1:])
        return lambda threads: threads.write(
            target, (half(upper(threads)).astype(np.uint32) << np.uint32(16)) | half(lower(threads)).astype(np.uint32)
        )
    rounding = next((ROUNDINGS[word] for word in instruction.modifiers if word in ROUNDINGS), None)
    return step_of(instruction, _conversion(source, result, rounding), [source], result)


def _conversion(source: str, result: str, rounding: Callable | None) -> Callable:
    if is_float(result):
        if not is_float(source) and result not in ("f32", "f64"):
            raise UnsupportedError("a conversion that would be rounded twice")
        return rounding or (lambda x: x if is_float(source) else x.astype(FLOATS[result]))
    number = integer(result)
    if not is_float(source):
        return lambda x: x.astype(number)
    if rounding is None:
        raise UnsupportedError("a conversion to an integer that does not say how it rounds")
    smallest, largest = np.iinfo(number).min, np.iinfo(number).max

    def to_integer(x):
        whole = rounding(np.nan_to_num(x.astype(np.float64), nan=0.0))
        inside = np.clip(whole, float(smallest), np.nextafter(float(largest) + 1, 0))
        return np.where(whole >= float(largest) + 1, number(largest), inside.astype(number))

    return to_integer


def bits_of_half(word: int, bits: int) -> Callable:
    """Return a function that extracts the word-th part, of a number of bits, of a register."""
    number = UNSIGNED[bits]
    return lambda x: (x >> x.dtype.type(word * bits)).astype(number)


def move(instruction: Instruction) -> Step:
    """Build mov: a register, or its parts from registers (packing), or to registers (unpacking)."""
    kind = instruction.kind if instruction.kind == "pred" else f"b{bits_of(instruction.kind)}"
    target, source = instruction.operands
    if target.startswith("{"):
        names = registers_in(target)
        read, width = reader(source, kind), bits_of(kind) // len(names)
        parts = [(name, bits_of_half(i, width)) for i, name in enumerate(names)]

        def unpack(threads) -> None:
            whole = np.asarray(read(threads))
            for name, part in parts:
                threads.write(name, part(whole))

        return unpack
    if source.startswith("{"):
        names, whole = registers_in(source), UNSIGNED[bits_of(kind)]
        width = bits_of(kind) // len(names)
        reads = [reader(name, f"b{width}") for name in names]

        def pack(threads) -> None:
            for name in names:  # the compiler fills up with one that nothing writes: NaN, should anything use it
                threads.registers.setdefault(name, UNSIGNED[width](2**width - 1))
            parts = (np.asarray(read(threads)).astype(whole) << whole(i * width) for i, read in enumerate(reads))
            threads.write(target, functools.reduce(np.bitwise_or, parts))

        return pack
    read, encode = reader(source, kind), encoder(kind)
    return lambda threads: threads.write(target, encode(read(threads)))


def registers_in(operand: str) -> list[str]:
    """Return the names in {…}, or the one name there is."""
    return [name.strip() for name in operand.strip("{} ").split(",")]
