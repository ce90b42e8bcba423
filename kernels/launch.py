"""Launch configurations as data, and the one place that launches.

A configuration is a pure function of chunk length, strides, dtype and the number of parameters: same tensors, same
bits, on every machine and rank, and no autotuning. What a chunk is summed in never depends on the sizes of dimensions
that stand before it in memory, so that a contiguous batch equals its rows bit for bit.

Three regimes, by how x lies in memory and how long a chunk is:

- columns, the inner dimension being the fastest (layers, channels): a thread has a few neighbouring columns and as much
  of their chunk as it holds, since what one thread adds costs no shuffle; the rest of the chunk is other lanes of its
  warp, and only a chunk too long for 16 columns of one warp other warps.
- rows, the axis being the fastest: a warp has a row of up to 1024, or several short ones; longer ones more warps.
- streamed, chunks too long for both: read again, strip by strip, so that few long chunks still fill a GPU.

What decides within these is how many elements a thread can hold before registers spill (`Tiles`).
"""

from __future__ import annotations

import ctypes
import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from daam.kernels.layout import Extent, Strided, View, acc_dtype, axis_is_fastest, inner_dim, parts


@dataclass(frozen=True)
class Tile:
    """What a program holds in registers: so many blocks, one below the other, of positions along the chunk x places
    along the inner dimension, and the warps it takes.
    """

    chunk: int
    inner: int
    num_warps: int
    parts: int = 1

    @property
    def length(self) -> int:
        """Positions along the chunk."""
        return self.chunk * self.parts


LONGEST_ROW, LONGEST_COLUMN = 4096, 256


@dataclass(frozen=True)
class Tiles:
    """What one pass can hold without spilling, which depends on what is alive at once: elements a thread, those of them
    that it loads at once (8 are 128 bits of bf16), and the longest chunks that stay on chip.

    rows: where the axis is the fastest dimension; with a mask or weights, or parameters for every position; with both.
    columns: where the inner dimension is; with a mask, or where blocks do not divide the chunk; with weights, or
    parameters for every position, or of fp32. streamed: of chunks that do not stay.
    """

    rows: tuple[int, int, int]
    columns: tuple[int, int, int]
    streamed: int
    row_vector: int = 8
    column_vectors: tuple[int, int] = (8, 8)
    streamed_vector: int = 8
    longest_row: int = LONGEST_ROW
    longest_column: int = LONGEST_COLUMN


# Rows: 32 elements a thread are a row of 1024. Columns: 48 are 24 layers two columns at a time, or, as here, 12 or 6
# blocks of them 64 or 128 bits wide. The mixture adds along a chunk five times where density attention does three, so
# that narrower loads pay for themselves: lanes that share a chunk shuffle for every sum.
FORWARD = Tiles((32, 32, 32), (48, 48, 24), 32)
FORWARD_MIXTURE = replace(FORWARD, columns=(48, 32, 24), column_vectors=(4, 8))
# Backward x, grad_y and the weights are alive at once; so are k and s in the mixture.
BACKWARD = Tiles((32, 16, 16), (48, 32, 16), 16, row_vector=4, column_vectors=(4, 8))
BACKWARD_MIXTURE = Tiles((16, 16, 16), (24, 24, 16), 16, column_vectors=(2, 8))


@functools.cache
def gate_forward(gaussians: int) -> Tiles:
    """As the others for up to four Gaussians; half as much for up to eight, and a quarter for more."""
    parts = min(4, 1 << max(0, (gaussians - 1).bit_length() - 2))
    rows, columns, full, streamed = (n // parts for n in (32, 32, 16, 16))
    return Tiles((rows, rows, rows), (columns, columns, full), streamed, column_vectors=(4, 8), streamed_vector=4)


@functools.cache
def gate_backward(gaussians: int) -> Tiles:
    """The gate's backward pass keeps every Gaussian's numbers alive: half as much as the others for up to four, and
    half again for every doubling. Longer chunks are streamed rather than spilled.
    """
    parts = 1 << max(0, (gaussians - 1).bit_length() - 2)
    rows, rows_full, columns, masked, streamed = (max(2, n // parts) for n in (16, 8, 24, 12, 8))
    longest = max(32, 2048 // parts), max(32, 128 // parts)
    return Tiles((rows, rows_full, rows_full), (columns, masked, rows_full), streamed, 4, (2, 4), 4, *longest)


def power_of_2(n: int) -> int:
    """The least power of two that is not less."""
    return 1 << max(0, n - 1).bit_length()


def power_below(n: int) -> int:
    """The largest power of two that is not greater, 1 of 0."""
    return 1 << max(0, n.bit_length() - 1)


def _row(chunk: int, elements: int, vector: int) -> Tile:
    """One warp a row while it can hold it: a row spread over more costs a barrier a sum. Blocks of as few positions as
    a warp loads at once, so that a row of 768 is three of them; up to 32 short rows share a program.
    """
    vector = min(vector, elements)
    num_warps = max(1, power_of_2(chunk) // (32 * elements))
    least = max(min(16, power_of_2(chunk)), power_of_2(-(-chunk * min(4, vector) // elements)))
    sizes = [n for n in (least << k for k in range(8)) if n <= max(least, 32 * vector * num_warps)]
    rows = min(sizes, key=lambda n: (-(-chunk // n) * n, -n))
    parts = -(-chunk // rows)
    inner = 32 * num_warps * elements // (rows * parts)
    return Tile(rows, min(32, power_below(inner)), num_warps, parts)


def _column(chunk: int, elements: int, least: int, most: int) -> Tile:
    """One warp a tile, whose threads load `most` elements at a time, or less, down to `least`, where that leaves a
    chunk to fewer lanes: sums over it need no barrier, and for the shortest ones no other thread. Columns no fewer than
    16, so that accesses stay whole sectors, with more warps where that takes them.
    """
    vector = min(most, elements, max(least, power_below(elements // chunk)))
    rows = power_of_2(-(-chunk * vector // elements))
    if rows == 1 and chunk * vector > 40:
        rows = 2  # twelve blocks of one row are too many addresses: a few bytes spill
    inner = max(16, 32 * vector // rows)
    return Tile(rows, inner, max(1, rows * inner // (32 * vector)), -(-chunk // rows))


def _streamed(elements: int, vector: int, by_axis: bool) -> Tile:
    """Blocks of four warps, of a row, or 16 rows of 64 columns of bf16."""
    vector = min(vector, elements)
    chunk, inner = (128 * vector, 1) if by_axis else (16, 8 * vector)
    return Tile(chunk, inner, 4, elements // vector)


STRIP_ROW, STRIP_COLUMN = 16_384, 512  # positions of a strip: its numbers are 16 bytes, 2 % of what it reads
STRIPS = 32  # merged at a time, in fp64: 64 of 64 columns spill


def strip_of(tile: Tile, view: View, along: str) -> int:
    """Positions that one program reads of a streamed chunk: a multiple of its tile's. One tile where parameters vary
    along the chunk, so that a program has the same for all its tiles.
    """
    if along == "chunk":
        return tile.length
    return -(-(STRIP_ROW if view.by_axis else STRIP_COLUMN) // tile.length) * tile.length


MAX_PROGRAMS = 4096  # per head; beyond that programs take several tiles and load their parameters once
FILL = 1056  # warps that keep a large GPU (132 multiprocessors) busy
MAX_HEADS = 65_535  # heads are grid axis 1


def streams(tiles: Tiles, x: Tensor, axis: int, heads: int, feature_axis: int | None = None) -> bool:
    """Whether chunks are too long to stay on chip between their statistics and their output: all of them where the
    longest, the last, is. Depends on nothing but x and the axis.
    """
    by_axis = axis_is_fastest(x, axis, inner_dim(x, axis, feature_axis))
    limit = tiles.longest_row if by_axis else tiles.longest_column
    last = parts(x.shape[axis], heads)[-1]
    return last.length // last.heads > (limit // 4 if x.dtype == torch.float64 else limit)


def stats_shape(
    tiles: Tiles, x: Tensor, axis: int, heads: int, feature_axis: int | None = None
) -> tuple[int, ...] | None:
    """Shape of the statistics of streamed chunks, four numbers each; None where chunks stay on chip."""
    if not streams(tiles, x, axis, heads, feature_axis):
        return None
    return (4, *x.shape[:axis], heads, *x.shape[axis + 1 :])


def worth_keeping(x: Tensor, axis: int, heads: int) -> bool:
    """Whether a forward pass keeps the statistics of streamed chunks: they save a pass over x, for 5 % of its bytes."""
    return 4 * acc_dtype(x).itemsize * 20 <= x.shape[axis] // heads * x.element_size()


def tile_for(
    tiles: Tiles, view: View, streamed: bool, along: str, dtype: torch.dtype, mask: bool = False, weights: bool = False
) -> Tile:  # fmt: skip
    """The tile of a call with a mask, or a gradient of weights, from what its pass can hold.

    Parameters that follow the inner dimension shrink it to their number; otherwise a batch may be part of it and
    nothing does. Threads hold a quarter in fp64, where a value and all made of it take two registers, and half where
    strides keep accesses narrow, since then every element has an address of its own; of columns that are streamed, or
    have a mask or weights, a quarter.
    """
    full = mask or weights
    narrow = 4 if (full or streamed) and not view.by_axis else 2
    parts = (4 if dtype == torch.float64 else 1) * (narrow if view.unit == 1 else 1)
    if streamed:
        elements = tiles.streamed
    elif view.by_axis:
        elements = tiles.rows[full + (along == "chunk")]
    else:
        # fp32 moves twice the bytes an element: it has instructions to spare, and more warps hide more latency
        elements = tiles.columns[2 if weights or dtype.itemsize > 2 or along == "chunk" else 1 if mask else 0]
    elements = max(1, elements // parts)
    row, streamed_vector, *column = (
        max(1, n // parts) for n in (tiles.row_vector, tiles.streamed_vector, *tiles.column_vectors)
    )
    if streamed:
        tile = _streamed(elements, streamed_vector, view.by_axis)
    elif view.by_axis:
        tile = _row(view.chunk, elements, row)
    else:
        tile = _column(view.chunk, elements, *column)
        if view.chunk % tile.chunk:
            tile = _column(view.chunk, min(elements, max(1, tiles.columns[1] // parts)), *column)
    if tile.num_warps > 16:  # fewer columns instead
        tile = replace(tile, inner=max(1, tile.inner * 16 // tile.num_warps), num_warps=16)
    return replace(tile, inner=min(tile.inner, power_of_2(view.inner))) if along == "inner" else tile


def programs(tiles: int, heads: int, num_warps: int, multiple: int = 1, tiles_each: int = 1) -> int:
    """Programs a head for a number of tiles: about tiles_each tiles each where that still fills the GPU, and a multiple
    of `multiple`.
    """
    each = max(1, min(tiles_each, tiles * heads * num_warps // FILL), -(-tiles // MAX_PROGRAMS))
    return min(tiles, -(-tiles // (each * multiple)) * multiple)


def index_bits(view: View, tile: Tile) -> int:
    """32, or 64 where an offset inside one tile can pass 2**31 - 1. Offsets of whole tiles are 64 bits wide always."""
    reach = max(
        (tile.length - 1) * t.strides[0] + (tile.inner - 1) * t.strides[1] for t in view.operands if t is not None
    )
    return 32 if reach < 2**31 else 64


def split_float(value: float) -> tuple[float, float]:
    """A float as two fp32 values that add up to it: Triton passes floats as fp32, which is too little for fp64
    arithmetic.
    """
    high = ctypes.c_float(value).value
    return high, value - high


@functools.cache
def _knobs():
    from triton import knobs

    return knobs


def _compiled_kernel() -> type:
    from triton.compiler import CompiledKernel

    return CompiledKernel


@functools.cache
def options(num_warps: int, nvidia: bool) -> dict[str, int | bool]:
    """Compiler options of a launch. FP fusion is pinned: Triton 3.10 changes its default, and with it the last bits.

    Registers are limited to what a program of so many warps can have: left alone, ptxas aims at some occupancy and
    spills a few bytes to reach it.
    """
    return {"enable_fp_fusion": True, **({"maxnreg": min(255, 2048 // num_warps)} if nvidia else {})}


# Launches of compiled kernels and the constants that end their arguments, by all that Triton compiles a kernel for
kept: dict[tuple, tuple[Callable[..., None], list]] = {}
MOST_KEPT = 4096


def launch(kernel, grid: tuple[int, int], *args, device: torch.device, **meta) -> None:
    """Launch on the device of the tensors, which need not be the current one. grid is (programs, heads)."""
    if device.type == "cuda" and device.index != torch.cuda.current_device():
        with torch.cuda.device(device):
            _launch(kernel, grid, args, device, meta)
    else:
        _launch(kernel, grid, args, device, meta)


def _launch(kernel, grid: tuple[int, int], args: tuple, device: torch.device, meta: dict[str, object]) -> None:
    """Launch what Triton compiled for such arguments, and ask it where there is none.

    Triton finds the compiled kernel anew at every launch, which takes three times as long as to launch it. The key is
    what Triton compiles for: arguments (`traits`), constants, device, and whether the process debugs. Instrumented
    code, a hook of the compiler and hooks of a kernel are left to Triton; hooks of launches are called by what is kept.
    Triton also looks whether global variables that a kernel reads have changed, which ours never do.
    """
    knobs = _knobs()
    key = (kernel.fn, grid, device, knobs.runtime.debug, *meta, *meta.values(), *traits(args))
    found = kept.get(key)
    if knobs.compilation.instrumentation_mode or knobs.runtime.add_stages_inspection_hook or kernel.pre_run_hooks:
        _launch_anew(None, kernel, grid, args, meta)
    elif found is None:
        _launch_anew(key, kernel, grid, args, meta)
    else:
        run, constants = found
        run(*args, *constants)


def traits(args: tuple) -> list:
    """What Triton compiles a kernel for, of each argument: the dtype of a tensor, and whether its data begin at a
    multiple of 16 bytes, which strides do not tell; that a float is one; of an integer whether it is 1 or a multiple
    of 16, for which its value stands. The same of what tuples hold; strides and `Extent` hold nothing but integers.
    """
    found = []
    for arg in args:
        kind = type(arg)
        if arg is None:
            found.append(None)
        elif kind is Strided:
            data = arg[0]
            found.append((data.dtype, data.data_ptr() % 16 == 0, arg[1]))
        elif kind is float:
            found.append(float)
        elif isinstance(arg, Tensor):
            found.append((arg.dtype, arg.data_ptr() % 16 == 0))
        elif isinstance(arg, tuple) and kind is not Extent:
            found.append((kind, *traits(arg)))
        else:
            found.append((kind, arg))
    return found


def _launch_anew(key: tuple | None, kernel, grid: tuple[int, int], args: tuple, meta: dict[str, object]) -> None:
    """Launch through Triton, and keep what it compiled under a key, if there is one."""
    if grid[1] > MAX_HEADS:
        raise ValueError(f'num_heads is {grid[1]}, the backend "triton" takes at most {MAX_HEADS}')
    compiled = kernel[grid](*args, **meta, **options(meta["num_warps"], nvidia=not torch.version.hip))
    if key is None or torch.version.hip or not isinstance(compiled, _compiled_kernel()):
        return  # on AMD GPUs Triton also looks at the size of memory; the interpreter compiles nothing
    if len(kept) >= MOST_KEPT:
        kept.clear()
    names = list(inspect.signature(kernel.fn).parameters)
    kept[key] = compiled[(*grid, 1)], [meta[name] for name in names[len(args) :]]
