"""Arithmetic on blocks, without a load or a store: sums, reciprocals, and chunks with their mean taken away.

Over the valid positions of a chunk, n of them, with 1/n, reciprocals and products rounded as said at each:

    mean = Σ x/n      centred = x - mean      mean_error = Σ centred/n      squares = Σ centred² - n·mean_error²

A large mean is rounded by as much as small deviations measure: what it was short of is mean_error.
"""

from typing import NamedTuple

import triton
import triton.language as tl

# constants stand on the right of a product, where the interpreter of Triton 3.9 takes them
HALF_LOG2_E = tl.constexpr(0.7213475204444817)  # log2(e)/2, so that exp2(-z²·HALF_LOG2_E) = exp(-z²/2)
LOG2_SQRT_2PI = tl.constexpr(1.3257480647361593)


class Centred(NamedTuple):
    """Hold x - mean of every block, 0 where not valid; [1, BLOCK_C] mean, its error, Σ (x - mean - error)² and 1/n."""

    blocks: list
    mean: tl.tensor
    mean_error: tl.tensor
    squares: tl.tensor
    inv_count: tl.tensor


@triton.jit
def add_blocks(blocks):
    """Return the sum of all blocks."""
    total = blocks[0]
    for i in tl.static_range(1, len(blocks)):
        total += blocks[i]
    return total


@triton.jit
def multiply_rounded(a, b):
    """Return a·b, rounded once wherever it is used. The compiler may fuse a plain product, unrounded, into one sum and
    not into another: what should cancel then leaves a rounding error, and lanes, or launches of other sizes, differ in
    the last bit. Adding 0 it may not leave out, since that makes 0 of -0.
    """
    return tl.fma(a, b, 0.0)


@triton.jit
def add_products(a, b):
    """Return the sum of a·b over all blocks."""
    total = tl.fma(a[0], b[0], 0.0)  # rounded, as in `multiply_rounded`
    for i in tl.static_range(1, len(a)):
        total = tl.fma(a[i], b[i], total)
    return total


@triton.jit
def inverse_count(n):
    """Return 1/n, right to its last bit, and 0 for columns with no valid position: an error of it is one of a chunk."""
    divisor, nonempty = tl.maximum(n, 1.0), n > 0
    inverse = 1.0 / divisor
    return tl.where(nonempty, tl.fma(inverse, tl.fma(-divisor, inverse, 1.0), inverse), 0.0)  # a step of Newton's


@triton.jit
def inverse_count_less_one(inv_count):
    """Return 1/(n - 1) from 1/n; 0 where n is 0 or 1."""
    many = inv_count < 0.75
    return tl.where(many, inv_count / (1.0 - tl.where(many, inv_count, 0.0)), 0.0)


@triton.jit
def reciprocal(x):
    """Return 1/x of positive x, right to its last bit, 0 of inf, inf of 0; a division is longer and approximate."""
    root = tl.rsqrt(x)
    square = root * root
    inverse = tl.fma(square, tl.fma(-x, square, 1.0), square)  # a step of Newton's
    return tl.where(inverse > 0, inverse, square)


@triton.jit
def softplus(x):
    """Return log(1 + exp(x)), x beyond 20: log(u)·t/(u - 1), u = 1 + t as rounded, does not lose t against 1."""
    t = tl.exp(tl.minimum(x, 20.0))
    u = 1.0 + t
    return tl.where(x > 20, x, tl.where(u == 1, t, tl.log(u) * (t / tl.where(u == 1, 1.0, u - 1.0))))


@triton.jit
def invert_variance(squares, inv_divisor, inv_count, mask, eps):
    """Return 1/(var + eps), var = squares·inv_divisor, eps a `Split`; 0 for columns where nothing is valid."""
    inv_var = reciprocal(squares * inv_divisor + (tl.cast(eps.high, squares.dtype) + eps.low))
    return inv_var if mask is None else tl.where(inv_count > 0, inv_var, 0.0)


@triton.jit
def where_nonempty(values, inv_count, mask, default):
    """Return values, and the default for columns with no valid position: none of theirs reaches a result."""
    return values if mask is None else tl.where(inv_count > 0, values, default)


@triton.jit
def centre(x, tile, mask, length, ACC: tl.constexpr):
    """Return the Centred chunks, of some length, of a tile that holds whole ones; x is 0 where it is not valid."""
    count = tl.zeros([1, 1], ACC) + length
    if mask is not None:
        count = tl.sum(add_blocks([valid.to(ACC) for valid in tile.valid]), 0)[None, :]
    inv_count = inverse_count(count)
    mean = tl.sum(add_blocks(x), 0)[None, :] * inv_count
    differences, centred = [block - mean for block in x], []
    for i in tl.static_range(len(x)):  # 0 - mean at a masked place would enter the sums
        centred = centred + [tl.where(tile.valid[i], differences[i], 0.0)]
    total = tl.sum(add_blocks(centred), 0)[None, :]
    mean_error = total * inv_count
    squares = tl.sum(add_products(centred, centred), 0)[None, :] - total * mean_error
    squares = tl.maximum(squares, 0.0, propagate_nan=tl.PropagateNan.ALL)
    return Centred(centred, mean, mean_error, squares, inv_count)


@triton.jit
def find_h(gradients, x, padding):
    """Return h of every block, what reaches its weights: grad_y·x + grad_weights; padding has none of the first."""
    blocks = []
    for i in tl.static_range(len(x)):
        h = gradients.y[i] * x[i] if padding is None else tl.where(x[i] == padding, 0.0, gradients.y[i] * x[i])
        blocks = blocks + [h if len(gradients.weights) == 0 else h + gradients.weights[i]]
    return blocks
