"""Launch configurations as data, and the one place that launches.

A configuration is a pure function of chunk length, strides, dtype and the number of parameters: same tensors, same
bits, on every machine and rank, and no autotuning. What a chunk is summed in never depends on the sizes of dimensions
that stand before it in memory, so that a contiguous batch equals its rows bit for bit.
"""

from __future__ import annotations

import ctypes
import functools
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from daam.kernels.layout import View, acc_dtype, axis_is_fastest, inner_dim, parts


@dataclass(frozen=True)
class Tile:
    """The block a program holds in registers: positions along the chunk, places along the inner dimension, and the
    warps it takes.
    """

    chunk: int
    inner: int
    num_warps: int


@dataclass(frozen=True)
class Tiles:
    """The tiles of one pass. Ladders of (longest chunk, resident tile), and the tiles of longer chunks, which are
    streamed.

    rows: the axis is the fastest dimension; columns: the inner dimension is, columns_full: and a mask or weights take
    registers too.
    """

    rows: tuple[tuple[int, Tile], ...]
    columns: tuple[tuple[int, Tile], ...]
    columns_full: tuple[tuple[int, Tile], ...]
    streamed_rows: Tile
    streamed_columns: Tile


LONGEST_ROW, LONGEST_COLUMN = 4096, 256  # longest resident chunks: rows of 8192 spill backward
Ladder = tuple[tuple[int, int], ...]


def _powers(longest: int) -> list[int]:
    return [2**k for k in range(longest.bit_length())]


def _rows(elements: int, shared: int | None = None, longest: int = LONGEST_ROW) -> tuple[tuple[int, Tile], ...]:
    """One warp a row while it can hold it, with so many elements, 32 for each that a thread holds: a short row spread
    over more costs a barrier a sum. Up to 32 short rows share a program, which then holds `shared` elements.
    """
    each = shared or elements
    return tuple((n, Tile(n, min(32, max(1, each // n)), max(1, n // elements))) for n in _powers(longest))


def _columns(held: Ladder) -> tuple[tuple[int, Tile], ...]:
    """One warp a tile, of as many columns as its threads can hold, by a ladder of (longest chunk, elements a thread):
    sums over a chunk then need no barrier, and for the shortest ones no other thread. No fewer than 16 columns, so that
    accesses stay whole sectors, with more warps where that takes them, and no more than 512.
    """
    found = []
    for n in _powers(held[-1][0]):
        elements = 32 * next(each for longest, each in held if n <= longest)
        inner = min(512, max(16, elements // n))
        found.append((n, Tile(n, inner, max(1, n * inner // elements))))
    return tuple(found)


# What is alive at once decides how many elements a thread can hold before registers spill: 32 forward; 32 backward too
# where columns have neither mask nor weights, else 16; 16 backward in rows, and in the mixture. Streamed tiles are
# longer than wide: one program walks a chunk.
FORWARD = Tiles(_rows(1024), _columns(((256, 32),)), _columns(((256, 32),)), Tile(4096, 1, 4), Tile(32, 64, 4))
# 32 elements a thread of rows that share a program spill with fp32, mask and weights
FORWARD_MIXTURE = replace(FORWARD, rows=_rows(1024, shared=512))
BACKWARD = Tiles(
    _rows(512), _columns(((128, 32), (256, 16))), _columns(((256, 16),)), Tile(2048, 1, 4), Tile(32, 32, 4)
)
BACKWARD_MIXTURE = replace(BACKWARD, columns=BACKWARD.columns_full)


@functools.cache
def gate_forward(gaussians: int) -> Tiles:
    """As the others for up to four Gaussians; half as much for up to eight, and a quarter for more: then the longest
    chunks spill some 50 bytes.
    """
    parts = min(4, 1 << max(0, (gaussians - 1).bit_length() - 2))
    lean, full = (_columns(((256, each // parts),)) for each in (32, 16))
    return Tiles(_rows(1024 // parts, 512 // parts), lean, full, Tile(4096 // parts, 1, 4), Tile(32, 64 // parts, 4))


@functools.cache
def gate_backward(gaussians: int) -> Tiles:
    """The gate's backward pass keeps every Gaussian's numbers alive: half as much as the others for up to four, and
    half again for every doubling. Longer chunks are streamed rather than spilled.
    """
    parts = 1 << max(0, (gaussians - 1).bit_length() - 2)
    longest, few = max(32, 64 // parts), max(2, 4 // parts)
    return Tiles(
        _rows(max(32, 256 // parts), longest=max(32, 2048 // parts)),
        _columns(((min(16, longest), max(2, 8 // parts)), (longest, few))),
        _columns(((longest, few),)),
        Tile(4 * max(32, 256 // parts), 1, 4),
        Tile(32, max(4, 16 // parts), 4),
    )


MAX_PROGRAMS = 4096  # per head; beyond that programs take several tiles and load their parameters once
FILL = 1056  # warps that keep a large GPU (132 multiprocessors) busy
MAX_HEADS = 65_535  # heads are grid axis 1


def streams(tiles: Tiles, x: Tensor, axis: int, heads: int, feature_axis: int | None = None) -> bool:
    """Whether chunks are too long to stay on chip between their statistics and their output: all of them where the
    longest, the last, is. Depends on nothing but x and the axis.
    """
    by_axis = axis_is_fastest(x, axis, inner_dim(x, axis, feature_axis))
    limit, _ = (tiles.rows if by_axis else tiles.columns)[-1]
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


def tile_for(tiles: Tiles, view: View, streamed: bool, along: str, dtype: torch.dtype, full: bool = False) -> Tile:
    """The tile of a call, from those of its pass. full: there is a mask, or weights.

    Parameters that follow the inner dimension shrink it to their number; otherwise a batch may be part of it and
    nothing does. Threads hold a quarter in fp64, where a value and all made of it take two registers, and half where
    strides keep accesses narrow, since then every element has an address of its own; of columns with a mask or weights
    a quarter.
    """
    narrow = 4 if full and not view.by_axis else 2
    parts = (4 if dtype == torch.float64 else 1) * (1 if view.aligned else narrow)
    if streamed:
        rows, columns = tiles.streamed_rows, tiles.streamed_columns
        tile = (
            replace(rows, chunk=rows.chunk // parts)
            if view.by_axis
            else replace(columns, inner=max(1, columns.inner // parts))
        )
    else:
        # fp32 moves twice the bytes an element: it has instructions to spare, and more warps hide more latency
        columns = tiles.columns_full if full or dtype.itemsize > 2 else tiles.columns
        ladder = tiles.rows if view.by_axis else columns
        tile = next(tile for longest, tile in ladder if view.chunk <= longest)
        # fewer columns, or more warps for the one there is
        warps = min(16, tile.num_warps * max(1, parts // tile.inner))
        tile = replace(tile, inner=max(1, tile.inner // parts), num_warps=warps)
    return replace(tile, inner=min(tile.inner, 1 << (view.inner - 1).bit_length())) if along == "inner" else tile


def programs(tiles: int, heads: int, num_warps: int, multiple: int = 1, tiles_each: int = 1) -> int:
    """Programs a head for a number of tiles: about tiles_each tiles each where that still fills the GPU, and a multiple
    of `multiple`.
    """
    each = max(1, min(tiles_each, tiles * heads * num_warps // FILL), -(-tiles // MAX_PROGRAMS))
    return min(tiles, -(-tiles // (each * multiple)) * multiple)


def index_bits(view: View, tile: Tile) -> int:
    """32, or 64 where an offset inside one tile can pass 2**31 - 1. Offsets of whole tiles are 64 bits wide always."""
    reach = max(
        (tile.chunk - 1) * t.strides[0] + (tile.inner - 1) * t.strides[1] for t in view.operands if t is not None
    )
    return 32 if reach < 2**31 else 64


def split_float(value: float) -> tuple[float, float]:
    """A float as two fp32 values that add up to it: Triton passes floats as fp32, which is too little for fp64
    arithmetic.
    """
    high = ctypes.c_float(value).value
    return high, value - high


def options(num_warps: int, nvidia: bool) -> dict[str, int | bool]:
    """Compiler options of a launch. FP fusion is pinned: Triton 3.10 changes its default, and with it the last bits.

    Registers are limited to what a program of so many warps can have: left alone, ptxas aims at some occupancy and
    spills a few bytes to reach it.
    """
    return {"enable_fp_fusion": True, **({"maxnreg": min(255, 2048 // num_warps)} if nvidia else {})}


def launch(kernel, grid: tuple[int, int], *args, device: torch.device, **meta) -> None:
    """Launch on the device of the tensors, which need not be the current one. grid is (programs, heads)."""
    if grid[1] > MAX_HEADS:
        raise ValueError(f'num_heads is {grid[1]}, the backend "triton" takes at most {MAX_HEADS}')
    meta |= options(meta["num_warps"], nvidia=not torch.version.hip)
    if device.type == "cuda" and device.index != torch.cuda.current_device():
        with torch.cuda.device(device):
            kernel[grid](*args, **meta)
    else:
        kernel[grid](*args, **meta)
