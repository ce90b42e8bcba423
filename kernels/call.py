"""What the launches of one call share: the view of its tensors, the tile, and the arguments that follow from them."""

from __future__ import annotations

import functools
from types import SimpleNamespace
from typing import NamedTuple

import torch
import triton.language as tl
from torch import Tensor

from daam.kernels import launch
from daam.kernels.layout import Extent, Part, Strided, acc_dtype, parts, varies, view


class PartPlan(NamedTuple):
    """What a call on one part of x does, whatever its tensors hold: the part, whether that is all of x, what parameters
    vary along, tile, extent, the strides of its tensors as kernels take them, constants, and those of kernels that take
    tiles.
    """

    part: Part
    whole: bool
    along: str
    tile: launch.Tile
    extent: Extent
    strides: tuple[tuple[int, ...] | None, ...]
    constants: dict[str, object]
    tile_constants: dict[str, object]


class Plan(NamedTuple):
    """What a pass does: a plan for every part of x, none where that is empty, the shape of the statistics of streamed
    chunks, None where these stay on chip, and whether a forward pass keeps them.
    """

    parts: tuple[PartPlan, ...]
    stats_shape: tuple[int, ...] | None
    keeps_stats: bool


Spec = tuple[torch.Size, tuple[int, ...], torch.dtype]  # shape, strides and dtype of a tensor


@functools.lru_cache(maxsize=1024)
def plan(
    tiles: launch.Tiles, axis: int, heads: int, feature_axis: int | None, weights: bool, *specs: Spec | None
) -> Plan:
    """The plan of a pass on tensors of such specs: x, a mask or None, others, which have x's shape. weights: whether
    there are gradients of them. Kept, since making it takes longer than a launch.
    """
    x, *others = (spec and torch.empty_strided(*spec[:2], dtype=spec[2], device="meta") for spec in specs)
    tensors = [x, *(t if t is None else t.expand(x.shape) for t in others)]
    stats_shape, stats = launch.stats_shape(tiles, x, axis, heads, feature_axis), None
    if stats_shape is not None:
        stats = torch.empty(stats_shape[1:], dtype=acc_dtype(x), device="meta")
    found = parts(x.shape[axis], heads) if x.numel() else ()
    return Plan(
        tuple(_plan_part(tiles, part, axis, feature_axis, weights, tensors, stats) for part in found),
        stats_shape, stats is not None and launch.worth_keeping(x, axis, heads),
    )  # fmt: skip


def _plan_part(
    tiles: launch.Tiles, part: Part, axis: int, feature_axis: int | None, weights: bool,
    tensors: list[Tensor | None], stats: Tensor | None,
) -> PartPlan:  # fmt: skip
    """The plan of a call. stats: one number of every streamed chunk."""
    x, mask, *others = (t if t is None else part.positions_of(t, axis) for t in tensors)
    if stats is not None:
        others.append(part.heads_of(stats, axis))
    streamed, length = stats is not None, tensors[0].shape[axis]
    seen = view(x, [mask, *others], axis, part.heads, feature_axis, length)
    along = varies(axis, feature_axis)
    of_x, of_mask = seen.operands[0].strides, seen.operands[1] and seen.operands[1].strides
    one_mask = of_mask is not None and of_mask[1] == 0  # for all of the inner dimension
    tile = launch.tile_for(tiles, seen, streamed, along, x.dtype, mask is not None, weights)
    fast = 0 if seen.by_axis else 1
    eighths = seen.unit == 8 and all(step % 8 == 0 for i, step in enumerate(of_x) if i != fast)
    chunk_eighths, inner_eighths = (
        size // 8 if eighths and fast == i else None for i, size in enumerate((seen.chunk, seen.inner))
    )
    blocks = -(-seen.inner // tile.inner)
    strip = launch.strip_of(tile, seen, along) if streamed else seen.chunk
    extent = Extent(
        seen.sizes, tuple(step // 8 if eighths and i != fast else step for i, step in enumerate(of_x)),
        seen.places * blocks, blocks, -(-seen.chunk // strip), strip, seen.chunk, seen.inner,
        chunk_eighths, inner_eighths,
    )  # fmt: skip
    strides = [t and (() if t.strides == of_x else t.strides) for t in seen.operands]
    if streamed:
        strides[-1] = seen.operands[-1].strides
    if one_mask:
        strides[1] = (of_mask[0], *of_mask[2:])
    constants = {
        "ACC": tl.float64 if acc_dtype(x) == torch.float64 else tl.float32,
        "INDEX": tl.int32 if launch.index_bits(seen, tile) == 32 else tl.int64,
        "num_warps": tile.num_warps, "BLOCK_CHUNK": tile.chunk, "BLOCK_INNER": tile.inner,
    }  # fmt: skip
    ragged = (seen.chunk % tile.length != 0, seen.inner % tile.inner != 0)
    of_tiles = constants | {"PARTS": tile.parts, "RAGGED": ragged}
    return PartPlan(part, part.length == length, along, tile, extent, tuple(strides), constants, of_tiles)


class Call:
    """A call on one part of x, whose heads have equal length.

    of: the tensors that were given by name, x and others of its shape, as kernels take them. stats: a tensor of some
    numbers a chunk, (numbers, …, heads, …), or None: all such tensors of the call have its shape but for the numbers,
    and are contiguous. streamed: whether there are stats, the chunks being too long for the chip.
    """

    def __init__(self, plan: PartPlan, axis: int, stats: Tensor | None, tensors: dict[str, Tensor | None]):
        self.plan, self.axis, self.stats, self.streamed = plan, axis, stats, stats is not None
        self.part, self.along, self.extent, self.device = plan.part, plan.along, plan.extent, tensors["x"].device
        if not plan.whole:
            tensors = {name: t if t is None else plan.part.positions_of(t, axis) for name, t in tensors.items()}
        self.of = SimpleNamespace(
            **{
                name: None if t is None else Strided(t, strides)
                for (name, t), strides in zip(tensors.items(), plan.strides, strict=False)
            }
        )

    def of_chunks(self, t: Tensor | None) -> Strided | None:
        """The part's share of a tensor of some numbers a chunk: the operand of the first, with the distance of the next
        as last stride; None where chunks stay on chip.
        """
        if t is None or not self.streamed:
            return None
        return Strided(self.part.heads_of(t, self.axis + 1), (*self.plan.strides[-1], t.stride(0)))

    def of_strips(self, numbers: int, strips: int | None = None) -> Strided:
        """Room for so many numbers of every strip of every streamed chunk, or of so many strips."""
        count = numbers * (self.extent.strips if strips is None else strips)
        return self.of_chunks(self.stats.new_empty((count, *self.stats.shape[1:])))

    def of_heads(self, param: Tensor) -> Strided:
        """The part's rows of a parameter."""
        return Strided(self.part.heads_of(param, 0), param.stride())

    @property
    def programs(self) -> int:
        """Programs a head that share its tiles: of streamed chunks one to each strip of a tile, but for those that
        share their parameters.
        """
        if self.streamed and self.along != "chunk":
            return self.extent.tiles * self.extent.strips
        return self._programs(1) * self.extent.strips

    def programs_of_sums(self, numbers: int) -> int:
        """Programs a head where each leaves so many partial sums a parameter: few enough that these fp32 numbers,
        written and read, cost under 3 % of the 6 bytes an element.
        """
        tile = self.plan.tile
        elements = {"inner": self.extent.chunk, "chunk": tile.inner, "nothing": tile.length * tile.inner}
        return self._programs(-(-24 * numbers // elements[self.along])) * self.extent.strips

    def groups(self, programs: int) -> int:
        """Groups of programs that together hold every parameter of a head once."""
        return programs // (self.extent.strips * (self.extent.blocks if self.along == "inner" else 1))

    def _programs(self, tiles_each: int) -> int:
        """One program's tiles all have the same parameters."""
        multiple = self.extent.blocks if self.along == "inner" else 1
        return launch.programs(self.extent.tiles, self.part.heads, self.plan.tile.num_warps, multiple, tiles_each)

    def launch(self, kernel, programs: int, *args, **meta) -> None:
        """Launch on a grid (programs, heads) with the call's extent and constants."""
        constants = self.plan.tile_constants
        launch.launch(
            kernel, (programs, self.part.heads), *args, self.extent, device=self.device, **constants, **meta
        )  # fmt: skip

    def launch_merge(self, kernel, *args, **meta) -> None:
        """Launch what makes numbers of chunks from those of their strips: a program a tile of chunks."""
        grid, strips = (self.extent.tiles, self.part.heads), launch.power_of_2(self.extent.strips)
        meta |= self.plan.constants | {"BLOCK_CHUNK": min(launch.STRIPS, strips), "num_warps": 4}
        launch.launch(kernel, grid, *args, self.extent, device=self.device, **meta)

    def launch_sums(self, kernel, programs: int, *args, **meta) -> None:
        """Launch what turns partial sums into gradients of parameters, on a grid (programs, heads)."""
        launch.launch(kernel, (programs, self.part.heads), *args, device=self.device, num_warps=4, **meta)
