"""What is known of PTX, opcode by opcode: the one table, and the step that an instruction becomes."""

from __future__ import annotations

import numpy as np
from emulator import arithmetic, floats, movement
from emulator.arithmetic import Step, approximate, elementwise, extreme, fused
from emulator.ptx import Instruction, UnsupportedError

CACHE_HINTS = (
    "weak relaxed volatile ca cg cs cta gpu sys L1::evict_last L1::evict_first L1::evict_normal L1::evict_unchanged "
    "L1::no_allocate L2::128B L2::256B"
)
COMPARISONS = "eq ne lt le gt ge lo ls hi hs equ neu ltu leu gtu geu num nan and or xor ftz"

# opcode: (builder, the words after it that it knows, apart from types)
TABLE = {
    "abs": (elementwise(np.abs, 1), "ftz"),
    "add": (elementwise(np.add, 2), "rn ftz"),
    "and": (elementwise(np.bitwise_and, 2), ""),
    "bar": (movement.barrier, "sync warp"),
    "bfe": (arithmetic.extract_bits, ""),
    "bfi": (arithmetic.insert_bits, ""),
    "clz": (arithmetic.count_bits(lambda x, bits: bits - x.bit_length()), ""),
    "cvt": (arithmetic.convert, "rn rni rzi rmi rpi"),
    "cvta": (arithmetic.move, "to global shared"),
    "div": (arithmetic.divide, "rn full approx ftz"),
    "ex2": (approximate(floats.exp2), "approx ftz"),
    "fence": (movement.fence, "sc acq_rel cta gpu sys"),
    "fma": (fused, "rn ftz"),
    "ld": (movement.load, f"global shared param v2 v4 v8 {CACHE_HINTS}"),
    "ldmatrix": (movement.load_matrix, "sync aligned m8n8 x1 x2 x4 trans shared"),
    "lg2": (approximate(floats.log2), "approx ftz"),
    "mad": (arithmetic.multiply_add, "lo wide"),
    "max": (extreme(np.fmax, np.maximum), "NaN ftz"),
    "membar": (movement.fence, "cta gl sys"),
    "min": (extreme(np.fmin, np.minimum), "NaN ftz"),
    "mov": (arithmetic.move, ""),
    "mul": (arithmetic.multiply, "lo hi wide rn ftz"),
    "neg": (elementwise(np.negative, 1), "ftz"),
    "not": (elementwise(np.invert, 1), ""),
    "or": (elementwise(np.bitwise_or, 2), ""),
    "popc": (arithmetic.count_bits(lambda x, bits: x.bit_count()), ""),
    "prmt": (arithmetic.permute_bytes, ""),
    "rcp": (arithmetic.reciprocal, "rn approx ftz"),
    "redux": (movement.reduce, "sync max min"),
    "rem": (arithmetic.remainder, ""),
    "rsqrt": (approximate(floats.rsqrt), "approx ftz"),
    "selp": (arithmetic.select, ""),
    "setp": (arithmetic.compare, COMPARISONS),
    "shf": (arithmetic.funnel_shift, "l r wrap clamp"),
    "shfl": (movement.shuffle, "sync bfly idx down up"),
    "shl": (arithmetic.shift(left=True), ""),
    "shr": (arithmetic.shift(left=False), ""),
    "sqrt": (arithmetic.square_root, "rn approx ftz"),
    "st": (movement.store, f"global shared v2 v4 v8 {CACHE_HINTS}"),
    "stmatrix": (movement.store_matrix, "sync aligned m8n8 x1 x2 x4 trans shared"),
    "sub": (elementwise(np.subtract, 2), "rn ftz"),
    "xor": (elementwise(np.bitwise_xor, 2), ""),
}


def step(instruction: Instruction) -> Step:
    """Return a function that executes an instruction for the threads whose predicate holds.

    Raises:
        UnsupportedError: it is not known, or not this way; the message names it.
    """
    builder, known = TABLE.get(instruction.opcode, (None, ""))
    unknown = [word for word in instruction.modifiers if word not in known.split()]
    if builder is None or unknown:
        raise UnsupportedError(
            f"{instruction}: the emulator does not know .{'.'.join(unknown)} of {instruction.opcode}"
        )
    try:
        execute = builder(instruction)
    except (UnsupportedError, ValueError, KeyError) as error:
        raise UnsupportedError(f"{instruction}: the emulator does not know {error}") from error
    return execute if instruction.predicate is None else _guarded(execute, instruction)


def _guarded(execute: Step, instruction: Instruction) -> Step:
    """Return the step for the threads whose predicate holds; where it does for none, nothing happens."""

    def executes(threads) -> None:
        mask = threads.mask
        chosen = threads.holds(instruction) & (True if mask is None else mask)
        if chosen.all():
            execute(threads)
        elif chosen.any():
            threads.mask = chosen
            execute(threads)
            threads.mask = mask

    return executes
