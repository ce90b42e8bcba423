"""Read registers, which hold unsigned bits, as numbers of an instruction's type, and write numbers as bits again.

A value is an array with a number for every thread, or one number for all of them.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from typing import Any

import numpy as np
from emulator.ptx import UnsupportedError

UNSIGNED = {8: np.uint8, 16: np.uint16, 32: np.uint32, 64: np.uint64}
SIGNED = {8: np.int8, 16: np.int16, 32: np.int32, 64: np.int64}
FLOATS = {"f16": np.float16, "f32": np.float32, "f64": np.float64}
REGISTER_BITS = {"%rd": 64, "%rs": 16, "%fd": 64, "%f": 32, "%r": 32}
SPECIAL = ("%tid.x", "%ctaid.x", "%ctaid.y", "%ctaid.z", "%nctaid.x", "%nctaid.y", "%nctaid.z", "%ntid.x", "%laneid")
SHARED_MEMORY = "global_smem"  # where Triton's shared memory begins: at 0


@functools.cache
def bits_of(kind: str) -> int:
    """Return the number of bits of a type."""
    return 32 if kind.endswith("x2") else int(re.search(r"\d+$", kind)[0])


def is_float(kind: str) -> bool:
    """Tell whether numbers of a type are floating point."""
    return kind[0] == "f" or kind == "bf16"


def integer(kind: str) -> type:
    """Return numpy's type for integers, or bits, of a type."""
    return (SIGNED if kind[0] == "s" else UNSIGNED)[bits_of(kind)]


@functools.cache
def register_bits(name: str) -> int:
    """Return the width that a register is declared with, which its name tells."""
    return REGISTER_BITS[re.match(r"%[a-z]+", name)[0]]


def decoder(kind: str) -> Callable[[Any], Any]:
    """Return a function that makes numbers of a type out of bits; more bits than the type has are dropped."""
    if kind == "pred":
        return lambda bits: bits
    if kind == "bf16":
        return lambda bits: (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)
    if kind in FLOATS:
        return lambda bits, float_type=FLOATS[kind]: bits.view(float_type)
    unsigned, target = UNSIGNED[bits_of(kind)], integer(kind)

    def decode(bits):
        return (bits if bits.dtype == unsigned else bits.astype(unsigned)).view(target)

    return decode


def encoder(kind: str) -> Callable[[Any], Any]:
    """Return a function that makes bits out of numbers, rounded to the type if need be."""
    if kind == "pred":
        return np.asarray
    if kind == "bf16":
        return bf16_bits
    unsigned = UNSIGNED[bits_of(kind)]
    if kind in FLOATS:
        return lambda value, float_type=FLOATS[kind]: np.asarray(value, float_type).view(unsigned)

    def encode(value):
        value = np.asarray(value)
        return value.view(unsigned) if value.dtype.itemsize == unsigned().itemsize else value.astype(unsigned)

    return encode


def bf16_bits(value):
    """Return the bits of bf16 numbers: fp32 or fp64, rounded to nearest once, ties to even."""
    exact, value = np.asarray(value), np.asarray(value, np.float32)
    bits = value.view(np.uint32)
    if (
        exact.dtype == np.float64
    ):  # with the last bit of fp32 set where it is inexact, no tie comes of the first rounding
        correction = np.where(np.abs(value) < np.abs(exact), np.uint32(1), np.uint32(2**32 - 1))
        bits = np.where((value != exact) & np.isfinite(value) & (bits & np.uint32(1) == 0), bits + correction, bits)
    even = (bits >> np.uint32(16)) & np.uint32(1)
    rounded = ((bits + np.uint32(0x7FFF) + even) >> np.uint32(16)).astype(np.uint16)
    return np.where(np.isnan(value), np.uint16(0x7FFF), rounded)


def immediate(text: str, kind: str):
    """Return the bits of a number as it stands in PTX: decimal, 0x…, or 0f… and 0d… for the bits of a float."""
    if text[:2] in ("0f", "0F"):
        return np.uint32(int(text[2:], 16))
    if text[:2] in ("0d", "0D"):
        return np.uint64(int(text[2:], 16))
    try:
        value = int(text.rstrip("U"), 0)
    except ValueError:
        raise UnsupportedError(f"the operand {text}") from None
    if kind == "pred":
        return np.bool_(value)
    return UNSIGNED[bits_of(kind)](value & ((1 << bits_of(kind)) - 1))


def reader(operand: str, kind: str) -> Callable[[Any], Any]:
    """Return a function of the `machine.Threads` that reads an operand, a register or a number, as a type."""
    decode = decoder(kind)
    if operand in SPECIAL:
        return lambda threads: decode(threads.special[operand])
    if operand.startswith("%"):
        return lambda threads: decode(threads.registers[operand])
    if operand.startswith("!"):
        raise UnsupportedError(f"the operand {operand}")
    value = decode(np.asarray(immediate("0" if operand == SHARED_MEMORY else operand, kind)))
    return lambda threads: value
