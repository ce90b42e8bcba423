"""What a pass does on the host, whatever the algorithm: its plan, made once a layout, outputs, statistics, sums, and a
`Call` for every part of the axis, which launches.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import NamedTuple

import torch
import triton.language as tl
from torch import Tensor

from . import launch, tiles
from .algorithms import Algorithm
from .operands import Extent, Inputs, Layout, Outputs, Part, Strided, acc_dtype, find_layout, parts, power_of_2, varies

# --- Plans ----------------------------------------------------------------------------------------


class Constants(NamedTuple):
    """Hold what a kernel is compiled for (PLAN): blocks of a tile, its positions x columns, and how many; whether
    positions, or columns, of a tile may stand outside; the dtypes of arithmetic and of offsets in a tile; and what
    parameters vary along.
    """

    BLOCK_P: int
    BLOCK_C: int
    N_BLOCKS: int
    RAGGED_P: bool
    RAGGED_C: bool
    ACC: tl.dtype
    INDEX: tl.dtype
    VARIES: str


class Numbers(NamedTuple):
    """Hold the numbers of streamed chunks as kernels take them, None where a pass has none: statistics, the mixture's
    scale of the weights, and sums for the backward pass.
    """

    stats: Strided
    scales: Strided | None = None
    sums: Strided | None = None


class PartPlan(NamedTuple):
    """Hold what a call on one part of x does, whatever its tensors hold: the part, whether that is all of x, what
    parameters vary along, tile, extent, the strides of its tensors as kernels take them, those of numbers of its
    chunks, and the constants of kernels that take tiles, and of those that merge strips.
    """

    part: Part
    whole: bool
    along: str
    tile: tiles.Tile
    extent: Extent
    strides: tuple[tuple[int, ...] | None, ...]
    stats_strides: tuple[int, ...] | None
    constants: dict[str, object]
    merge_constants: dict[str, object]


class Plan(NamedTuple):
    """Hold what a pass does: a plan for every part of x, none where that is empty, the shape of the statistics of
    streamed chunks, None where these stay on chip, and whether a forward pass keeps them.
    """

    parts: tuple[PartPlan, ...]
    stats_shape: tuple[int, ...] | None
    keeps_stats: bool


Spec = tuple[torch.Size, tuple[int, ...], torch.dtype]  # shape, strides and dtype of a tensor


@functools.lru_cache(maxsize=1024)
def plan(
    budget: tiles.Budget, axis: int, heads: int, feature_axis: int | None, weights: bool, *specs: Spec | None
) -> Plan:
    """Return the plan of a pass on tensors of such specs: x, a mask or None, others, which have x's shape. weights:
    whether there are gradients of them. Kept, since making it takes longer than a launch.
    """
    x, *others = (spec and _make_meta(*spec) for spec in specs)
    tensors = [x, *(t if t is None else t.expand(x.shape) for t in others)]
    stats_shape, stats = tiles.stats_shape(budget, x, axis, heads, feature_axis), None
    if stats_shape is not None:
        stats = torch.empty(stats_shape[1:], dtype=acc_dtype(x), device="meta")
    found = parts(x.shape[axis], heads) if x.numel() else ()
    return Plan(
        tuple(_plan_part(budget, part, axis, feature_axis, weights, tensors, stats) for part in found),
        stats_shape, stats is not None and tiles.worth_keeping(x, axis, heads),
    )  # fmt: skip


def _make_meta(shape: torch.Size, strides: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Return a tensor without memory."""
    return torch.empty_strided(shape, strides, dtype=dtype, device="meta")


def _plan_part(
    budget: tiles.Budget, part: Part, axis: int, feature_axis: int | None, weights: bool,
    tensors: list[Tensor | None], stats: Tensor | None,
) -> PartPlan:  # fmt: skip
    """Return the plan of a call. stats: one number of every streamed chunk."""
    whole, *_ = tensors
    x, mask, *others = (t if t is None else part.positions_of(t, axis) for t in tensors)
    streamed, length = stats is not None, whole.shape[axis]
    if streamed:
        others.append(part.heads_of(stats, axis))
    layout, along = find_layout(x, [mask, *others], axis, part.heads, feature_axis, length), varies(axis, feature_axis)
    tile = tiles.find_tile(budget, layout, streamed, along, x.dtype, mask is not None, weights)
    extent = _find_extent(layout, tile, tiles.find_strip(tile, layout, along) if streamed else layout.chunk)
    x_strides, mask_strides, *others = (t and t.strides for t in layout.operands)
    stats_strides = others.pop() if streamed else None
    if mask is not None:
        down, across, *outer = mask_strides
        mask_strides = (down, *outer) if across == 0 else mask_strides  # one mask for all of the inner dimension
    strides = [() if found == x_strides else found for found in (x_strides, mask_strides, *others)]
    constants = Constants(
        tile.rows, tile.columns, tile.n_blocks, layout.chunk % tile.length != 0, layout.inner % tile.columns != 0,
        tl.float64 if acc_dtype(x) == torch.float64 else tl.float32,
        tl.int32 if tiles.index_bits(layout, tile) == 32 else tl.int64, along,
    )  # fmt: skip
    merged = constants._replace(BLOCK_P=min(tiles.STRIPS, power_of_2(extent.n_strips)), N_BLOCKS=1)
    return PartPlan(
        part, part.length == length, along, tile, extent, tuple(strides), stats_strides,
        {"PLAN": constants, "num_warps": tile.num_warps}, {"PLAN": merged, "num_warps": 4},
    )  # fmt: skip


def _find_extent(layout: Layout, tile: tiles.Tile, strip: int) -> Extent:
    """Return the extent of a call, in eighths where tensors like x are aligned to 8 elements and not to 16."""
    strides = layout.operands[0].strides
    fastest = 0 if layout.contiguous else 1
    eighths = layout.unit == 8 and all(step % 8 == 0 for i, step in enumerate(strides) if i != fastest)
    if eighths:
        strides = tuple(step if i == fastest else step // 8 for i, step in enumerate(strides))
    n_blocks = -(-layout.inner // tile.columns)
    return Extent(
        layout.sizes, strides, layout.places * n_blocks, n_blocks, -(-layout.chunk // strip), strip,
        layout.chunk, layout.inner,
        layout.chunk // 8 if eighths and layout.contiguous else None,
        layout.inner // 8 if eighths and not layout.contiguous else None,
    )  # fmt: skip


# --- Calls ----------------------------------------------------------------------------------------


class Call:
    """Hold a call on one part of x, whose heads have equal length.

    inputs, outputs, dx: the tensors of x's shape, as kernels take them. stats: a tensor of some numbers a chunk,
    (numbers, …, heads, …), or None: all such tensors of the call have its shape but for the numbers, and are
    contiguous. streamed: whether there are stats, the chunks being too long for the chip.
    """

    inputs: Inputs
    outputs: Outputs
    dx: Strided | None

    def __init__(self, plan: PartPlan, axis: int, stats: Tensor | None, device: torch.device):
        self.plan, self.axis, self.stats, self.streamed = plan, axis, stats, stats is not None
        self.part, self.along, self.extent, self.device = plan.part, plan.along, plan.extent, device

    def of_positions(self, tensors: tuple[Tensor | None, ...]) -> list[Strided | None]:
        """Return the part's share of tensors of x's shape, in the order of the plan."""
        if not self.plan.whole:
            tensors = [t if t is None else self.part.positions_of(t, self.axis) for t in tensors]
        return [None if t is None else Strided(t, s) for t, s in zip(tensors, self.plan.strides, strict=True)]

    def of_chunks(self, t: Tensor) -> Strided:
        """Return the part's share of a tensor of some numbers a chunk, with the distance of the next number as last
        stride.
        """
        return Strided(self.part.heads_of(t, self.axis + 1), (*self.plan.stats_strides, t.stride(0)))

    def of_strips(self, n: int, strips: int | None = None) -> Strided:
        """Return room for n numbers of every strip of every streamed chunk, or of so many strips."""
        count = n * (self.extent.n_strips if strips is None else strips)
        return self.of_chunks(self.stats.new_empty((count, *self.stats.shape[1:])))

    def of_heads(self, param: Tensor) -> Strided:
        """Return the part's rows of a parameter."""
        return Strided(self.part.heads_of(param, 0), param.stride())

    @property
    def programs(self) -> int:
        """Return the programs a head that share its tiles: of streamed chunks one to each strip of a tile, but for
        those that share their parameters.
        """
        if self.streamed and self.along != "chunk":
            return self.extent.n_tiles * self.extent.n_strips
        return self._count_programs(1) * self.extent.n_strips

    def programs_of_sums(self, n: int) -> int:
        """Return the programs a head where each leaves n partial sums a parameter: few enough that these fp32 numbers,
        written and read, cost under 3 % of the 6 bytes an element.
        """
        tile = self.plan.tile
        elements = {"inner": self.extent.chunk, "chunk": tile.columns, "nothing": tile.length * tile.columns}
        return self._count_programs(-(-24 * n // elements[self.along])) * self.extent.n_strips

    def groups(self, programs: int) -> int:
        """Return the groups of programs that together hold every parameter of a head once."""
        return programs // (self.extent.n_strips * (self.extent.n_blocks if self.along == "inner" else 1))

    def _count_programs(self, tiles_each: int) -> int:
        """Return the programs a head, whose tiles all have the same parameters."""
        multiple = self.extent.n_blocks if self.along == "inner" else 1
        return tiles.count_programs(
            self.extent.n_tiles, self.part.heads, self.plan.tile.num_warps, multiple, tiles_each
        )  # fmt: skip

    def launch(self, kernel, programs: int, *args, **constants) -> None:
        """Launch on a grid (programs, heads) with the call's extent and constants."""
        grid = (programs, self.part.heads)
        launch.launch(kernel, grid, *args, self.extent, device=self.device, **constants, **self.plan.constants)

    def launch_merge(self, kernel, *args, **constants) -> None:
        """Launch what makes numbers of chunks from those of their strips: a program a tile of chunks."""
        grid = (self.extent.n_tiles, self.part.heads)
        launch.launch(kernel, grid, *args, self.extent, device=self.device, **constants, **self.plan.merge_constants)

    def launch_sums(self, kernel, programs: int, partials: Strided, *args, **constants) -> None:
        """Launch what turns partial sums into gradients of parameters, on a grid (programs, heads)."""
        grid, n_groups = (programs, self.part.heads), partials.data.shape[2]
        launch.launch(kernel, grid, partials, n_groups, *args, device=self.device, num_warps=4, **constants)


# --- Passes ---------------------------------------------------------------------------------------


class _Pass:
    """Hold a pass on x and others of its shape, which follow it and a mask, or None, that broadcasts against x. stats:
    statistics of its chunks, None where these stay on chip.
    """

    def __init__(
        self, budget: tiles.Budget, heads: int, axis: int, feature_axis: int | None, weights: bool,
        stats: Tensor | None, x: Tensor, mask: Tensor | None, *others: Tensor | None,
    ):  # fmt: skip
        self.x, self.axis, self.feature_axis = x, axis, feature_axis
        self.tensors = (x, mask, *others)
        specs = [None if t is None else (t.shape, t.stride(), t.dtype) for t in self.tensors]
        self.plan = plan(budget, axis, heads, feature_axis, weights, *specs)
        if self.plan.stats_shape is None:
            stats = None
        elif stats is None:
            stats = x.new_empty(self.plan.stats_shape, dtype=acc_dtype(x))
        self.stats = stats

    def _calls(self) -> Iterator[tuple[Call, list[Strided | None]]]:
        """Yield a call for every part of the axis, one or two, and its tensors; none where x is empty."""
        x, mask, *others = self.tensors
        if len(self.plan.parts) > 1 and mask is not None:
            mask = mask.expand(x.shape)
        for part in self.plan.parts:
            call = Call(part, self.axis, self.stats, x.device)
            yield call, call.of_positions((x, mask, *others))


class Forward(_Pass):
    """Hold a forward pass. y, weights: contiguous; weights are None where not asked for. shape: of the parameters."""

    def __init__(
        self, algorithm: Algorithm, x: Tensor, mask: Tensor | None, shape: torch.Size, axis: int, return_weights: bool,
        feature_axis: int | None = None,
    ):  # fmt: skip
        heads, n_params = shape
        self.y, self.weights = _empty_like(x), _empty_like(x) if return_weights else None
        # not whether weights are written: y is the same to the bit with and without them
        budget = algorithm.forward(n_params)
        super().__init__(budget, heads, axis, feature_axis, False, None, x, mask, self.y, self.weights)

    def calls(self) -> Iterator[Call]:
        """Yield a call for every part of the axis."""
        for call, (x, mask, y, weights) in self._calls():
            call.inputs, call.outputs = Inputs(x, mask), Outputs(y, weights)
            yield call

    def results(self, save_stats: bool) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Return y, weights, and stats where they are worth keeping."""
        return self.y, self.weights, self.stats if save_stats and self.plan.keeps_stats else None


class Backward(_Pass):
    """Hold a backward pass, whose stats are those of the forward pass, or None where it kept none. shape: of the
    parameters.

    dx: contiguous, None where not needed. need_params: whether gradients of the parameters are needed. lacks_stats:
    whether chunks are streamed and their statistics are still to be found.
    """

    def __init__(
        self, algorithm: Algorithm, x: Tensor, mask: Tensor | None, grad_y: Tensor | None, grad_weights: Tensor | None,
        stats: Tensor | None, shape: torch.Size, axis: int, need_x: bool, need_params: bool,
        feature_axis: int | None = None,
    ):  # fmt: skip
        heads, self.n_params = shape
        self.need_params, self.dx = need_params, _empty_like(x) if need_x else None
        budget, weights = algorithm.backward(self.n_params), grad_weights is not None
        tensors = (x, mask, grad_y, grad_weights, self.dx)
        super().__init__(budget, heads, axis, feature_axis, weights, stats, *tensors)
        self.lacks_stats = stats is None and self.stats is not None

    def calls(self) -> Iterator[Call]:
        """Yield a call for every part of the axis."""
        for call, (*inputs, dx) in self._calls():
            call.inputs, call.dx = Inputs(*inputs), dx
            yield call

    def partials(self, call: Call, n: int, groups: int) -> Strided | None:
        """Return room for n sums of every parameter from each group of programs, (n, heads, groups, P), P being 1 but
        where parameters follow a dimension of x.
        """
        if not self.need_params:
            return None
        n_params = self.n_params if self.feature_axis is not None else 1
        t = self.x.new_empty((n, call.part.heads, groups, n_params), dtype=acc_dtype(self.x))
        return Strided(t, t.stride())

    def param_grads(self, *params: Tensor) -> tuple[Tensor | None, ...]:
        """Return room for the parameters' gradients, zeros where x is empty and nothing will be written."""
        if not self.need_params:
            return (None,) * len(params)
        if not self.plan.parts:
            return tuple(p.new_zeros(p.shape) for p in params)
        return tuple(map(_empty_like, params))


def _empty_like(t: Tensor) -> Tensor:
    """Return room for as much, contiguous."""
    return torch.empty_like(t, memory_format=torch.contiguous_format)
