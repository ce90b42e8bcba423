"""Floating point as a GPU does it: products and sums rounded once, and approximations wrong by up to what NVIDIA says.

What an approximate instruction returns is known up to a bound only (PTX ISA, "Floating Point Instructions"). The error
here is drawn from the bits of the operand, uniform within the bound: the same number gives the same result, and a
kernel that needs more than the bound fails.
"""

from __future__ import annotations

import numpy as np

NOISE = 1.0  # of the documented bound; 0: as exact as fp32 is
SMALLEST = np.float32(2.0**-126)
ROUNDING = 2.0**-24  # of a result to fp32


def flush(x):
    """Return fp32 numbers with those too small for a full mantissa set to 0, of their sign (.ftz)."""
    return np.where(np.abs(x) < SMALLEST, np.copysign(np.float32(0), x), x)


def fma(a, b, c):
    """Return a·b + c, rounded once."""
    if a.dtype == np.float64:
        return _fma64(a, b, c)
    product, c = a.astype(np.float64) * b, np.asarray(c, np.float64)  # exact: 48 bits
    total = np.asarray(product + c)
    # Rounded to fp64 and then to fp32 it would be rounded twice, which shows only where fp64 stands halfway between
    # two numbers of fp32, the bits that fp32 drops being 1 followed by zeros.
    if not (total.view(np.int64) & np.int64(0x0FFFFFFF)).all():
        total = _to_odd(product, c, total)
    return total.astype(np.float32)


def _to_odd(a, b, total):
    """Return total = a + b with its last bit set wherever it was rounded: then halfway is where the sum is, too."""
    b_rounded = total - a
    error = (a - (total - b_rounded)) + (b - b_rounded)
    bits = total.view(np.int64)
    direction = np.where((error > 0) == (total > 0), np.int64(1), np.int64(-1))
    inexact = ((error > 0) | (error < 0)) & (bits & 1 == 0)
    return np.where(inexact, bits + direction, bits).view(np.float64)


def _fma64(a, b, c):
    """Return a·b + c in fp64, wrong by up to 2**-63 of the larger of the two terms before it is rounded."""
    return (np.asarray(a, np.longdouble) * b + c).astype(np.float64)


def _noise(*operands):
    """Return numbers in [-1, 1), times NOISE, that depend on the bits of the operands, fp32 each."""
    mixed = np.uint64(0)
    for operand in operands:
        mixed = (mixed * np.uint64(31)) ^ np.asarray(operand).view(np.uint32).astype(np.uint64)
    hashed = (mixed * np.uint64(0x9E3779B97F4A7C15)) >> np.uint64(40)
    return NOISE * (hashed.astype(np.float64) / 2.0**23 - 1.0)


def _wrong(y, error):
    """Return y·(1 + error) in fp32, the error being documented: rounding is a part of it."""
    return (y * (1.0 + error)).astype(np.float32)


def exp2(x):
    """Return 2**x, to 2**-22.5; of whole numbers exactly."""
    return _wrong(np.exp2(x.astype(np.float64)), np.where(x == np.rint(x), 0.0, (2.0**-22.5 - ROUNDING) * _noise(x)))


def log2(x):
    """Return log2(x), to 2**-22: absolute between 0.5 and 2, relative elsewhere."""
    y, error = np.log2(x.astype(np.float64)), (2.0**-22 - ROUNDING) * _noise(x)
    return np.where((x > 0.5) & (x < 2), (y + error).astype(np.float32), _wrong(y, error))


def rsqrt(x):
    """Return 1/sqrt(x), to 2**-22.9; in fp64, which is refined in software, to its last bit."""
    if x.dtype == np.float64:
        return (1 / np.sqrt(x.astype(np.longdouble))).astype(np.float64)
    return _wrong(1.0 / np.sqrt(x.astype(np.float64)), (2.0**-22.9 - ROUNDING) * _noise(x))


def sqrt(x):
    """Return sqrt(x) in fp32, to 2**-23."""
    return _wrong(np.sqrt(x.astype(np.float64)), (2.0**-23 - ROUNDING) * _noise(x))


def divide(a, b, units=2.0):
    """Return a/b in fp32, wrong by some units in the last place at most, half of one being the rounding (div.full,
    div.approx).
    """
    quotient = a.astype(np.float64) / b
    error = (units - 0.5) * np.abs(np.spacing(quotient.astype(np.float32))) * _noise(a, b)
    return np.where(np.isfinite(quotient), quotient + error, quotient).astype(np.float32)


def reciprocal(x):
    """Return 1/x in fp32, to one unit in the last place."""
    return divide(np.ones_like(x), x, units=1.0)


def upper_half(x):
    """Return fp64 numbers without the lower half of their bits: what approximations in fp64 start from."""
    return (np.asarray(x).view(np.uint64) & np.uint64(0xFFFFFFFF00000000)).view(np.float64)
