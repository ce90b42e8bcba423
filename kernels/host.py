"""What a pass does on the host, whatever the algorithm: a plan, made once a layout, and a `Call`, which launches."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
import triton.language as tl
from torch import Tensor

from . import launch, tiles
from .budgets import Budget
from .operands import Extent, Inputs, Layout, Strided, acc_dtype, encode, find_layout, varies
from .whole import take_steps


# --- Plans ----------------------------------------------------------------------------------------
class Constants(NamedTuple):
    """Hold what a kernel is compiled for (PLAN): blocks of a tile, its positions x columns, and how many; in how many
    of them, the last, positions may stand outside, and whether columns may; the unit of x's strides, and which of them
    is 1 (`operands.Extent`); the dtypes of arithmetic and of offsets in a tile; what parameters vary along; and the
    Gaussians of a head, for both mixtures the next power of two.
    """

    BLOCK_P: int
    BLOCK_C: int
    N_BLOCKS: int
    RAGGED_P: int
    RAGGED_C: bool
    UNIT: int
    FASTEST: int
    ACC: tl.dtype
    INDEX: tl.dtype
    VARIES: str
    K: int


class Numbers(NamedTuple):
    """Hold numbers of streamed chunks or None: statistics, the mixtures' scale of weights, the backward pass's sums."""

    stats: Strided
    scales: Strided | None = None
    sums: Strided | None = None


class Plan(NamedTuple):
    """Hold what a pass does, whatever its tensors hold: its extent, the same encoded, the programs a head that share
    its tiles; those where each leaves partial sums, and the groups of these that hold every parameter of a head once;
    the strides of its tensors as kernels take them; of streamed chunks the shape of their statistics, the strides of
    numbers of them, whether a forward pass keeps the statistics, and whether one program takes all steps of a chunk;
    the constants of kernels that take tiles, and of those that merge strips.
    """

    extent: Extent
    encoded: Extent
    programs: int
    sum_programs: int
    n_groups: int
    strides: tuple[tuple[int, ...] | None, ...]
    stats_shape: tuple[int, ...] | None
    stats_strides: tuple[int, ...] | None
    keeps_stats: bool
    whole: bool
    constants: dict[str, object]
    merge_constants: dict[str, object]


Spec = tuple[torch.Size, tuple[int, ...], torch.dtype]  # shape, strides and dtype of a tensor


@functools.lru_cache(maxsize=1024)
def plan(
    budget: Budget, gaussians: int, n_sums: int, axis: int, heads: int, feature_axis: int | None, weights: bool,
    *specs: Spec | None,
) -> Plan:  # fmt: skip
    """Return the plan of a pass on tensors of such specs: x, a mask or None, others, which have x's shape. gaussians:
    as kernels count them. n_sums: partial sums a group. weights: whether there are gradients of them. Kept: making it
    takes longer than a launch.
    """
    x, mask, *given = (spec and _make_meta(*spec) for spec in specs)
    others = [t if t is None else t.expand(x.shape) for t in (mask, *given)]
    stats_shape = tiles.stats_shape(budget, x, axis, heads, feature_axis, mask is not None)
    streamed = stats_shape is not None
    if streamed:
        others.append(torch.empty(stats_shape[1:], dtype=acc_dtype(x), device="meta"))
    layout, along = find_layout(x, others, axis, heads, feature_axis), varies(axis, feature_axis)
    tile = tiles.find_tile(budget, layout, streamed, along, x.dtype, mask is not None, weights)
    extent = _find_extent(layout, tile, tiles.find_strip(tile, layout, along) if streamed else None)
    strides, stats_strides = _find_strides(layout, streamed)
    if streamed:
        ragged = 0 if layout.chunk == layout.longest and layout.chunk % tile.length == 0 else tile.n_blocks
    else:
        ragged = tiles.count_ragged(layout, tile)
    constants = Constants(
        tile.rows, tile.columns, tile.n_blocks, ragged, layout.inner % tile.columns != 0, layout.unit,
        layout.fastest,
        tl.float64 if acc_dtype(x) == torch.float64 else tl.float32,
        tl.int32 if tiles.index_bits(layout, tile) == 32 else tl.int64, along, gaussians,
    )  # fmt: skip
    n_together = max(1, extent.n_blocks) if along == "inner" else 1  # tiles that hold every parameter of a head once
    n_strips = extent.n_strips or 1
    # few enough that n_sums fp32 numbers a parameter, written and read, cost under 3 % of the 6 bytes an element
    elements = {"inner": layout.chunk, "chunk": tile.columns, "nothing": tile.length * tile.columns}[along]
    each = -(-24 * n_sums // elements)
    programs, sum_programs = (
        n_strips * tiles.count_programs(extent.n_tiles, heads, tile.num_warps, n_together, n) for n in (1, each)
    )
    if streamed and along != "chunk":  # but for those that share their parameters, a program a strip
        programs = extent.n_tiles * n_strips
    merged = constants._replace(BLOCK_P=tiles.STRIPS, N_BLOCKS=1, RAGGED_P=0)
    moved = sum(t.element_size() for t in (x, *given) if t is not None)
    kernel_options = {"num_warps": tile.num_warps}
    registers = tiles.find_registers(budget, layout, along, x.dtype, mask is not None or weights)
    if capped := streamed and registers is not None:
        kernel_options["maxnreg"] = registers
    whole = capped and tiles.takes_whole(layout, moved)
    return Plan(
        extent, extent.encode(layout.unit, layout.fastest), programs, sum_programs,
        sum_programs // (n_strips * n_together), strides, stats_shape, stats_strides,
        streamed and tiles.worth_keeping(x, axis, heads), whole, {"PLAN": constants, **kernel_options},
        {"PLAN": merged, "num_warps": 4},
    )  # fmt: skip


def _make_meta(shape: torch.Size, strides: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Return a tensor without memory."""
    return torch.empty_strided(shape, strides, dtype=dtype, device="meta")


def _find_strides(layout: Layout, streamed: bool) -> tuple[tuple, tuple[int, ...] | None]:
    """Return the strides of a call's tensors as kernels take them, and those of the numbers of streamed chunks."""
    x_strides, mask_strides, *others = (t and t.strides for t in layout.operands)
    stats_strides = tuple(map(encode, others.pop())) if streamed else None
    if mask_strides is not None:
        down, across, *outer = mask_strides
        mask_strides = (down, *outer) if across == 0 else mask_strides  # one mask for all of the inner dimension
    found = (x_strides, mask_strides, *others)
    return tuple(() if strides == x_strides else strides for strides in found), stats_strides


def _find_extent(layout: Layout, tile: tiles.Tile, strip: int | None) -> Extent:
    """Return the extent of a call. strip: tiles of a strip, None where a tile holds whole chunks."""
    n_blocks = -(-layout.inner // tile.columns)
    return Extent(
        layout.sizes, layout.operands[0].strides, layout.places * n_blocks, n_blocks,
        strip and -(-layout.longest // (strip * tile.length)), strip, layout.chunk,
        layout.longest if layout.heads > 1 else None, layout.inner,
    )  # fmt: skip


# --- Calls ----------------------------------------------------------------------------------------
class Step(NamedTuple):
    """Hold a kernel that a pass launches, programs of a head, its arguments but the extent, its constants but the plan,
    in its own order, and whether it merges strips.
    """

    kernel: Any
    programs: int
    args: tuple
    constants: dict[str, object]
    merges: bool


@functools.cache
def find_sources(constants: tuple) -> str:
    """Return what tells apart functions of one name, of all in nested tuples; "" of interpreted ones."""
    nested = (one if isinstance(one, tuple) else (one,) for one in constants)
    return "".join(getattr(one, "cache_key", "") for ones in nested for one in ones)


class Call:
    """Hold a pass with a budget, so many Gaussians as kernels count them, and n_sums partial sums a group.

    shape: of the parameters, (heads, P). axis, feature_axis: the dimensions of x that are normalised, and that
    parameters follow, if they do. tensors: x, a mask that broadcasts against it, others of x's
    shape; None for those there are not; then strided, as kernels take them. weights: whether there is a gradient of the
    weights. need_params: whether gradients of the parameters are needed. stats: statistics of streamed chunks, or room
    for them where None came, as lacks_stats tells. None, whatever came, where chunks stay on chip: a copy of x that
    autograd kept may lie in memory otherwise than x did. exchanges: whether steps are kept, for `sharded.py`.
    """

    inputs: Inputs
    outputs: Any  # of a forward pass y and weights, of a backward pass dx
    exchanges = False

    def __init__(
        self, budget: Budget, gaussians: int, n_sums: int, shape: torch.Size, axis: int, feature_axis: int | None,
        tensors: tuple[Tensor | None, ...], weights: bool = False, stats: Tensor | None = None,
        need_params: bool = False,
    ):  # fmt: skip
        (self.heads, self.n_params), (self.x, *_) = shape, tensors
        self.axis, self.feature_axis, self.need_params = axis, feature_axis, need_params
        specs = [None if t is None else (t.shape, t.stride(), t.dtype) for t in tensors]
        self.plan = found = plan(budget, gaussians, n_sums, axis, self.heads, feature_axis, weights, *specs)
        self.extent, self.programs, self.along = found.extent, found.programs, found.constants["PLAN"].VARIES
        self.streamed = found.stats_shape is not None
        self.steps: list[Step] = []
        self.stats = stats if self.streamed else None
        self.lacks_stats = self.streamed and stats is None
        if self.lacks_stats:
            self.stats = self.x.new_empty(found.stats_shape, dtype=acc_dtype(self.x))
        pairs = zip(tensors, found.strides, strict=True)
        self.tensors = [None if t is None else Strided(t, strides) for t, strides in pairs]

    def of_chunks(self, t: Tensor) -> Strided:
        """Return numbers (number, …, heads, …) of chunks; the last stride is the next number's distance."""
        return Strided(t, (*self.plan.stats_strides, encode(t.stride(0))))

    def of_strips(self, n: int, strips: int | None = None) -> Strided:
        """Return room for n numbers of every strip of every streamed chunk, or of so many strips."""
        count = n * (self.extent.n_strips if strips is None else strips)
        return self.of_chunks(self.stats.new_empty((count, *self.stats.shape[1:])))

    def partials(self, n: int, groups: int) -> Strided | None:
        """Return room for n sums of every parameter from each group of programs, (n, heads, groups, P), P being 1 but
        where parameters follow a dimension of x; None where gradients of them are not needed.
        """
        if not self.need_params:
            return None
        n_params = 1 if self.feature_axis is None else self.n_params
        t = self.x.new_empty((n, self.heads, groups, n_params), dtype=acc_dtype(self.x))
        distance, head_stride, group_stride, stride = t.stride()
        group_stride = 1 if self.feature_axis is None else encode(group_stride)
        return Strided(t, (encode(distance), encode(head_stride), group_stride, stride))

    def launch(self, kernel, programs: int, *args, **constants) -> None:
        """Launch on a grid (programs, heads), with the constants of kernels that take tiles."""
        self._take(Step(kernel, programs, args, constants, merges=False))

    def launch_merge(self, kernel, *args, **constants) -> None:
        """Launch what makes numbers of chunks from those of their strips: a program a tile of chunks."""
        self._take(Step(kernel, self.extent.n_tiles, args, constants, merges=True))

    def _take(self, step: Step) -> None:
        """Launch a step, or keep it: where one program takes them all, and where processes exchange numbers between."""
        if self.plan.whole or self.exchanges:
            self.steps.append(step)
        else:
            self.run_step(step, self.plan.encoded)

    def run_step(self, step: Step, extent: Extent) -> None:
        """Launch a step by itself. extent: the plan's, encoded, or one of other strips."""
        constants = step.constants | (self.plan.merge_constants if step.merges else self.plan.constants)
        grid = (step.programs, self.heads)
        launch.launch(step.kernel, grid, *step.args, extent, device=self.x.device, **constants)

    def launch_steps(self, name: str) -> None:
        """Launch the steps that were kept, if any, as one kernel."""
        if not self.steps:
            return
        kernels, _programs, args, constants, merges = zip(*self.steps, strict=True)
        constants = tuple(tuple(one.values()) for one in constants)
        launch.launch(
            take_steps, (self.extent.n_tiles, self.heads), args, self.plan.encoded, device=self.x.device,
            KERNELS=kernels, CONSTANTS=constants, MERGES=merges, NAME=name,
            MERGED=self.plan.merge_constants["PLAN"], SOURCES=find_sources((*kernels, *constants)),
            **self.plan.constants,
        )  # fmt: skip
        self.steps.clear()
