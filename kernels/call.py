"""What the launches of one call share: the view of its tensors, the tile, and the arguments that follow from them."""

from __future__ import annotations

from types import SimpleNamespace
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from daam.kernels import launch
from daam.kernels.layout import Part, Strided, acc_dtype, varies, view


class Extent(NamedTuple):
    """What kernels know of the view: outer sizes, tiles of all of them, tiles of one outer place, blocks along a chunk
    (1 where a tile holds whole chunks), positions of a chunk, size of the inner dimension.
    """

    sizes: tuple[int, ...]
    tiles: int
    blocks: int
    row_blocks: int
    chunk: int
    inner: int


class Call:
    """A call on one part of x, whose heads have equal length.

    of: the tensors that were given by name, x and others of its shape, as kernels take them. stats: a tensor of some
    numbers a chunk, (numbers, …, heads, …), or None: all such tensors of the call have its shape but for the numbers,
    and are contiguous. streamed: whether there are stats, the chunks being too long for the chip.
    """

    def __init__(
        self, tiles: launch.Tiles, part: Part, axis: int, feature_axis: int | None, stats: Tensor | None, x: Tensor,
        **others: Tensor | None,
    ):  # fmt: skip
        x, *tensors = (None if t is None else part.positions_of(t, axis) for t in (x, *others.values()))
        self.part, self.axis, self.device, self.streamed = part, axis, x.device, stats is not None
        self.along = varies(axis, feature_axis)
        numbers = None if stats is None else part.heads_of(stats[0], axis)
        self.view = view(x, [*tensors, numbers], axis, part.heads, feature_axis)
        *operands, self._numbers = self.view.operands
        self.of = SimpleNamespace(**dict(zip(("x", *others), operands, strict=True)))
        full = any(others.get(name) is not None for name in ("mask", "weights", "grad_weights"))
        self.tile = launch.tile_for(tiles, self.view, self.streamed, self.along, x.dtype, full)
        self.acc = tl.float64 if acc_dtype(x) == torch.float64 else tl.float32
        blocks = triton.cdiv(self.view.inner, self.tile.inner)
        self.extent = Extent(
            self.view.sizes, self.view.places * blocks, blocks, triton.cdiv(self.view.chunk, self.tile.chunk),
            self.view.chunk, self.view.inner,
        )  # fmt: skip

    def of_chunks(self, t: Tensor | None) -> Strided | None:
        """The part's share of a tensor of some numbers a chunk: the operand of the first, with the distance of the next
        as last stride; None where chunks stay on chip.
        """
        if t is None or not self.streamed:
            return None
        return Strided(self.part.heads_of(t, self.axis + 1), (*self._numbers.strides, t.stride(0)))

    def of_heads(self, param: Tensor) -> Strided:
        """The part's rows of a parameter."""
        return Strided(self.part.heads_of(param, 0), param.stride())

    @property
    def programs(self) -> int:
        """Programs a head that share its tiles, one to each block along the chunk."""
        return self._programs(1) * self.extent.row_blocks

    def programs_of_sums(self, numbers: int) -> int:
        """Programs a head where each leaves so many partial sums a parameter: few enough that these fp32 numbers,
        written and read, cost under 3 % of the 6 bytes an element.
        """
        elements = {"inner": self.view.chunk, "chunk": self.tile.inner, "nothing": self.tile.chunk * self.tile.inner}
        return self._programs(triton.cdiv(24 * numbers, elements[self.along])) * self.extent.row_blocks

    def groups(self, programs: int) -> int:
        """Groups of programs that together hold every parameter of a head once."""
        return programs // (self.extent.row_blocks * (self.extent.blocks if self.along == "inner" else 1))

    def _programs(self, tiles_each: int) -> int:
        """One program's tiles all have the same parameters."""
        multiple = self.extent.blocks if self.along == "inner" else 1
        return launch.programs(self.extent.tiles, self.part.heads, self.tile.num_warps, multiple, tiles_each)

    def launch(self, kernel, programs: int, *args, **meta) -> None:
        """Launch on a grid (programs, heads) with the call's extent and constants."""
        launch.launch(
            kernel, (programs, self.part.heads), *args, self.extent, device=self.device, num_warps=self.tile.num_warps,
            ACC=self.acc, INDEX=tl.int32 if launch.index_bits(self.view, self.tile) == 32 else tl.int64,
            BLOCK_CHUNK=self.tile.chunk, BLOCK_INNER=self.tile.inner, **meta,
        )  # fmt: skip

    def launch_sums(self, kernel, programs: int, *args, **meta) -> None:
        """Launch what turns partial sums into gradients of parameters, on a grid (programs, heads)."""
        grid = (programs, self.part.heads)
        launch.launch(kernel, grid, *args, device=self.device, num_warps=4, BLOCK=1024, **meta)
