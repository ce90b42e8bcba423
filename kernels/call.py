"""What the launches of one call share: the view of its tensors, the tile, and the arguments that follow from them."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from daam.kernels import launch
from daam.kernels.layout import Strided, acc_dtype, varies, view


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
    """A call on x and on others that have its dimensions.

    operands: x and the others as kernels take them. of_chunks is a tensor of some numbers a chunk, (numbers, …, heads,
    …), or None: all such tensors of the call have its shape but for the numbers, and are contiguous.
    """

    def __init__(
        self, tiles: launch.Tiles, x: Tensor, others: list[Tensor | None], of_chunks: Tensor | None, param: Tensor,
        axis: int, feature_axis: int,
    ):  # fmt: skip
        heads = param.shape[0]
        self.along = varies(param, axis, feature_axis)
        numbers = None if of_chunks is None else of_chunks[0]
        self.view = view(x, [*others, numbers], axis, heads, feature_axis, self.along)
        *self.operands, self._numbers = self.view.operands
        self.device, self.heads = x.device, heads
        self.tile = launch.tile_for(
            tiles, self.view, launch.streams(x, axis, heads, self.view.by_axis), self.along, x.dtype
        )
        self.acc = tl.float64 if acc_dtype(x) == torch.float64 else tl.float32
        blocks = triton.cdiv(self.view.inner, self.tile.inner)
        self.extent = Extent(
            self.view.sizes, self.view.places * blocks, blocks, triton.cdiv(self.view.chunk, self.tile.chunk),
            self.view.chunk, self.view.inner,
        )  # fmt: skip

    def of_chunks(self, t: Tensor | None) -> Strided | None:
        """A tensor of some numbers a chunk: the operand of the first, with the distance of the next as last stride."""
        return None if t is None else Strided(t, (*self._numbers.strides, t.stride(0)))

    def programs(self, tiles_each: int = 1) -> int:
        """Programs a head that share its tiles. One program's tiles all have the same parameters."""
        return launch.programs(
            self.extent.tiles, self.heads, self.extent.blocks if self.along == "inner" else 1, tiles_each
        )

    def groups(self, programs: int) -> int:
        """Groups of programs that together hold every parameter of a head once."""
        return programs // self.extent.blocks if self.along == "inner" else programs

    @property
    def tiles_per_partial(self) -> int:
        """Tiles to sum over so that a partial sum, 8 bytes a parameter, costs under 3 % of the 6 bytes an element."""
        elements = {"inner": self.view.chunk, "chunk": self.tile.inner, "nothing": self.tile.chunk * self.tile.inner}
        return triton.cdiv(48, elements[self.along])

    def launch(self, kernel, programs: int, *args, **meta) -> None:
        """Launch on a grid (programs, heads) with the call's extent and constants."""
        launch.launch(
            kernel, (programs, self.heads), *args, self.extent, device=self.device, num_warps=self.tile.num_warps,
            ACC=self.acc, INDEX=tl.int32 if launch.index_bits(self.view, self.tile) == 32 else tl.int64,
            BLOCK_CHUNK=self.tile.chunk, BLOCK_INNER=self.tile.inner, **meta,
        )  # fmt: skip
