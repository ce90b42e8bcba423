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

    rows: the axis is the fastest dimension; columns: the inner dimension is.
    """

    rows: tuple[tuple[int, Tile], ...]
    columns: tuple[tuple[int, Tile], ...]
    streamed_rows: Tile
    streamed_columns: Tile


LONGEST_ROW, LONGEST_COLUMN = 4096, 256  # longest resident chunks: rows of 8192 spill backward


def _tiles(
    row_elements: int, column_elements: int, columns: int = 2048, longest_row: int = LONGEST_ROW,
    longest_column: int = LONGEST_COLUMN, shared: int | None = None,
) -> Tiles:  # fmt: skip
    """Tiles by the elements a warp holds, 32 of them for each element a thread holds.

    Rows: one warp a row while it can hold it, since a short row spread over more costs a barrier a sum; up to 32 short
    rows share a program, which then holds `shared` elements. Columns: `columns` elements a program, in no fewer than 16
    columns, so that accesses stay whole sectors, and no more than 512.
    """
    powers = [2**k for k in range(longest_row.bit_length())]
    width = {n: min(512, max(16, columns // n)) for n in powers}
    return Tiles(
        rows=tuple(
            (n, Tile(n, min(32, max(1, (shared or row_elements) // n)), max(1, n // row_elements))) for n in powers
        ),
        columns=tuple(
            (n, Tile(n, width[n], min(8, max(2, n * width[n] // column_elements))))
            for n in powers
            if n <= longest_column
        ),
        streamed_rows=Tile(4 * row_elements, 1, 4),
        streamed_columns=Tile(32, column_elements // 8, 4),
    )


# What is alive at once decides: beyond 32 elements a thread forward, half of it with a mask, and 16 or 8 backward,
# registers spill.
FORWARD = _tiles(row_elements=1024, column_elements=512)
# 32 elements a thread of rows that share a program spill with fp32, mask and weights
FORWARD_MIXTURE = _tiles(row_elements=1024, column_elements=512, shared=512)
BACKWARD = _tiles(row_elements=512, column_elements=256)


@functools.cache
def gate_forward(gaussians: int) -> Tiles:
    """As the others for up to four Gaussians; half as much for up to eight, and a quarter for more: then the longest
    chunks spill some 50 bytes.
    """
    parts = min(4, 1 << max(0, (gaussians - 1).bit_length() - 2))
    return _tiles(1024 // parts, 512 // parts, columns=2048 // parts, shared=512 // parts)


@functools.cache
def gate_backward(gaussians: int) -> Tiles:
    """The gate's backward pass keeps every Gaussian's numbers alive: half as much as the others for up to four, and
    half again for every doubling. Longer chunks are streamed rather than spilled.
    """
    parts = 1 << max(0, (gaussians - 1).bit_length() - 2)
    return _tiles(*(max(32, n // parts) for n in (256, 128, 1024, 2048, 64)))


MAX_PROGRAMS = 4096  # per head; beyond that programs take several tiles and load their parameters once
FILL = 264  # programs that keep a large GPU (132 multiprocessors) busy
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


def tile_for(tiles: Tiles, view: View, streamed: bool, along: str, dtype: torch.dtype) -> Tile:
    """The tile of a call, from those of its pass.

    Parameters that follow the inner dimension shrink it to their number; otherwise a batch may be part of it and
    nothing does. Threads hold a quarter in fp64, where a value and all made of it take two registers, and half where
    strides keep accesses narrow, since then every element has an address of its own.
    """
    parts = (4 if dtype == torch.float64 else 1) * (1 if view.aligned else 2)
    if streamed:
        rows, columns = tiles.streamed_rows, tiles.streamed_columns
        tile = (
            replace(rows, chunk=rows.chunk // parts)
            if view.by_axis
            else replace(columns, inner=max(1, columns.inner // parts))
        )
    else:
        tile = next(tile for longest, tile in (tiles.rows if view.by_axis else tiles.columns) if view.chunk <= longest)
        # fewer columns, or more warps for the one there is
        warps = min(16, tile.num_warps * max(1, parts // tile.inner))
        tile = replace(tile, inner=max(1, tile.inner // parts), num_warps=warps)
    return replace(tile, inner=min(tile.inner, 1 << (view.inner - 1).bit_length())) if along == "inner" else tile


def programs(tiles: int, heads: int, multiple: int = 1, tiles_each: int = 1) -> int:
    """Programs a head for a number of tiles: about tiles_each tiles each where that still fills the GPU, and a multiple
    of `multiple`.
    """
    each = max(1, min(tiles_each, tiles * heads // FILL), -(-tiles // MAX_PROGRAMS))
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
