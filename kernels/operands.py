"""Any tensors, an axis and heads -> outer dimensions, axis and one inner dimension, without a copy.

A kernel sees every tensor of a call as (outer…, axis, inner): heads cut the axis into chunks, the inner dimension is
the other side of a tile, and the outer dimensions are decoded from one number. Dimensions that merge in every tensor of
the call are merged, so that common layouts have one outer dimension or none. Sizes and strides reach the kernel as
tuples, so there may be any number of them.
"""

from __future__ import annotations

import ctypes
import functools
import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

# Rows of these lengths have kernels of their own, whose accesses are of 8 elements; those of other rows up to SHORT are
# of one, which costs some 18 % more instructions: aligned or not would be two kernels for every tile.
ALIGNED = frozenset((16, 32, 64, 128, 200, 256, 384, 512, 768, 1024, 1536, 2048))
SHORT = 2048


class Strided(NamedTuple):
    """Hold a tensor as kernels take it: its data and its strides in elements, of numbers and sums encoded, axis first,
    then inner, then outer from the fastest. No strides: those of x. One less: none along the inner dimension, the same
    for all of it. (Not None, which Triton 3.6 does not return inside a tuple.)
    """

    data: Tensor
    strides: tuple[int, ...]


class Inputs(NamedTuple):
    """Hold the tensors of x's shape that a pass reads, None for those there are not, and a padding value's bits."""

    x: Strided
    mask: Strided | None
    grad_y: Strided | None
    grad_weights: Strided | None
    padding: int | None


class Outputs(NamedTuple):
    """Hold the tensors that a forward pass writes; weights are None where not asked for."""

    y: Strided
    weights: Strided | None


class Extent(NamedTuple):
    """Hold what kernels know of a call: outer sizes, x's strides, tiles of all outer places, blocks of columns along
    the inner dimension, strips that a chunk is cut into and tiles of each (None where a tile holds whole chunks),
    positions of a chunk, of the last head's, which takes the remainder (None where it is the only one), size of the
    inner dimension; program: whose turn it is where one plays others (`whole.py`), else None.
    """

    sizes: tuple[int, ...]
    strides: tuple[int, ...]
    n_tiles: int
    n_blocks: int
    n_strips: int | None
    strip: int | None
    chunk: int
    longest: int | None
    inner: int
    program: int | None = None

    def encode(self, unit: int, fastest: int) -> Extent:
        """Return the same as kernels take it (`walk.view_of`): Triton compiles a kernel for integers that are 1, and
        for multiples of 16. What kernels are compiled for is the unit of which strides, and the length of what has
        stride 1, are multiples, and which stride that is, of the axis (0), the inner dimension (1) or neither (-1).
        """
        unit_p, unit_c = unit if fastest == 0 else 1, unit if fastest == 1 else 1
        numbers = (self.n_tiles, self.n_blocks, self.n_strips, self.strip)
        lengths = (self.chunk // unit_p, self.longest and self.longest // unit_p, self.inner // unit_c)
        codes = (None if n is None else encode(n) for n in (*numbers, *lengths))
        strides = (1 if i == fastest else encode(stride // unit) for i, stride in enumerate(self.strides))
        return Extent(tuple(map(encode, self.sizes)), tuple(strides), *codes)

    def decode(self, unit: int, fastest: int) -> Extent:
        """Return what was encoded, as `walk.view_of` does in kernels."""
        strides = tuple(1 if i == fastest else code // 2 * unit for i, code in enumerate(self.strides))
        unit_p, unit_c = unit if fastest == 0 else 1, unit if fastest == 1 else 1
        numbers = (self.n_tiles, self.n_blocks, self.n_strips, self.strip, self.chunk, self.longest, self.inner)
        units = (1, 1, 1, 1, unit_p, unit_p, unit_c)
        plain = (code and code // 2 * one for code, one in zip(numbers, units, strict=True))
        return Extent(tuple(code // 2 for code in self.sizes), strides, *plain)


def encode(n: int) -> int:
    """Return a number as kernels are not compiled for its value: 2n + 1 is no multiple of 16, and 1 only of 0."""
    return 2 * n + 1


class Split(NamedTuple):
    """Hold a float as two fp32 values that add up to it."""

    high: float
    low: float


@dataclass(frozen=True)
class Layout:
    """Hold what all tensors of one call look like to a kernel.

    sizes: of the outer dimensions, the fastest first. heads: that the axis is cut into. chunk: positions of one head
        along the axis. longest: of the last one, which takes the remainder. length: of the whole axis. inner: size of
        the inner dimension.
    contiguous: whether neighbours along the axis stand closer in memory than neighbours along the inner dimension; else
        chunks are strided.
    operands: the tensors of the call, in the order given.
    """

    sizes: tuple[int, ...]
    heads: int
    chunk: int
    longest: int
    length: int
    inner: int
    contiguous: bool
    operands: tuple[Strided | None, ...]

    @property
    def places(self) -> int:
        """Return how many places the outer dimensions have."""
        return math.prod(self.sizes)

    @property
    def fastest(self) -> int:
        """Return which stride of x is 1: 0 for the axis, 1 for the inner dimension, -1 where neither is."""
        down, across, *_ = self.operands[0].strides
        return 0 if down == 1 else 1 if across == 1 else -1

    @functools.cached_property
    def unit(self) -> int:
        """Return 8, or 4, where tensors like x can be moved so many elements at a time, else 1: one stride is 1, others
        are multiples of it, and so is the length of what that one walks along. The length of whole rows, too, which is
        a stride that a single row does not show: a batch has the tiles of its rows. 4 of long rows only.
        """
        x = self.operands[0].data
        alike = (t for t in self.operands if t is not None and (t.data.dtype, t.data.shape) == (x.dtype, x.shape))
        strides = [t.strides for t in alike]
        if any(s.count(1) > 1 or 1 in s[2:] for s in strides):
            return 1
        steps = {step for s in strides for step in s if step != 1}
        # an expanded x may have stride 0 on the other side
        if self.contiguous or self.fastest == 0:
            steps |= {self.chunk, self.length}
        if not self.contiguous or self.fastest == 1:
            steps |= {self.inner}
        units = (8,)
        if self.contiguous and self.longest > SHORT:
            units = (8, 4)
        elif self.contiguous and not (self.chunk == self.longest and self.chunk in ALIGNED):
            units = ()
        fits = max(steps) < 2**31  # multiplied by the unit in 32 bits
        return next((unit for unit in units if fits and not any(step % unit for step in steps)), 1)


def strided_of(t: Tensor) -> Strided:
    """Return a tensor with strides of its own, for kernels that know its dimensions."""
    return Strided(t, t.stride())


def find_longest(size: int, heads: int) -> int:
    """Return the positions of the last head's chunk: size // heads, as the others have, and the remainder."""
    return size // heads + size % heads


def varies(axis: int, feature_axis: int | None) -> str:
    """Return what parameters that follow a dimension of x vary along, beside heads: "nothing", "chunk" or "inner"."""
    if feature_axis is None:
        return "nothing"
    return "chunk" if feature_axis == axis else "inner"


def inner_dim(x: Tensor, axis: int, feature_axis: int | None) -> int | None:
    """Return the dimension of x that becomes the inner one: that of the parameters, else the fastest; None where only
    the axis is left. Dimensions of size 1 have strides that mean nothing: they are left out everywhere.
    """
    if varies(axis, feature_axis) == "inner":
        return feature_axis
    others = [d for d in reversed(range(x.dim())) if d != axis and x.shape[d] != 1]
    return min(others, key=x.stride, default=None)


def axis_is_fastest(x: Tensor, axis: int, inner: int | None) -> bool:
    """Tell whether neighbours along the axis stand closer in memory than neighbours along the inner dimension."""
    return inner is None or x.stride(axis) < x.stride(inner)


def acc_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype all arithmetic on x runs in, on either backend: fp64 for fp64, fp32 for everything else."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


@functools.lru_cache
def split_float(value: float) -> Split:
    """Return a float as a Split: Triton passes floats as fp32, which is too little for fp64 arithmetic."""
    high = ctypes.c_float(value).value
    return Split(high, value - high)


def float_bits(value: float | None, dtype: torch.dtype) -> int | None:
    """Return a float, rounded to a dtype, as the bits of an fp64 number; None of None."""
    if value is None:
        return None
    (bits,) = struct.unpack("<q", struct.pack("<d", torch.tensor(value, dtype=dtype).item()))
    return bits


def power_of_2(n: int) -> int:
    """Return the least power of two that is not less."""
    return 1 << max(0, n - 1).bit_length()


class _Group(NamedTuple):
    """Hold dimensions of x that merge in every tensor: their size, their stride in each, whether one is the inner."""

    size: int
    strides: tuple[int, ...]
    is_inner: bool


def find_layout(
    x: Tensor, others: Sequence[Tensor | None], axis: int, heads: int, feature_axis: int | None = None
) -> Layout:
    """Return the layout of a call on x and others like it (stride 0: broadcast)."""
    inner, keep = inner_dim(x, axis, feature_axis), varies(axis, feature_axis) == "inner"
    tensors = [t for t in (x, *others) if t is not None]
    groups: list[_Group] = []  # slowest first
    for dim, size in enumerate(x.shape):
        if dim == axis or size == 1:
            continue
        group = _Group(size, tuple(t.stride(dim) for t in tensors), dim == inner)
        merges = bool(groups) and all(a == b * size for a, b in zip(groups[-1].strides, group.strides, strict=True))
        if merges and not (keep and (group.is_inner or groups[-1].is_inner)):
            last = groups.pop()
            group = _Group(last.size * size, group.strides, group.is_inner or last.is_inner)
        groups.append(group)
    columns = next((group for group in groups if group.is_inner), _Group(1, (0,) * len(tensors), True))
    outer = [group for group in reversed(groups) if not group.is_inner]
    strided = iter(
        Strided(t, (t.stride(axis), columns.strides[i], *(group.strides[i] for group in outer)))
        for i, t in enumerate(tensors)
    )
    return Layout(
        sizes=tuple(group.size for group in outer),
        heads=heads,
        chunk=x.shape[axis] // heads,
        longest=find_longest(x.shape[axis], heads),
        length=x.shape[axis],
        inner=columns.size,
        contiguous=axis_is_fastest(x, axis, inner),
        operands=tuple(None if t is None else next(strided) for t in (x, *others)),
    )
