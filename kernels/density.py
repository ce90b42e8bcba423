"""Density attention (arXiv 2401.11143, Algorithm 1), forward and backward.

Over one chunk of length n, with e = x - mean - mean_offset and r2 = 1/(var + eps), var biased and centred:

    weights = exp(-e²·r2/(2c))          y = x·weights (+ x)

    he = (grad_y·x + grad_weights)·weights·e·r2/c
    dx = grad_y·weights - he + (Σ he + r2·(x - mean)·Σ he·e)/n (+ grad_y)
    d_mean_offset = Σ he      d_c = Σ he·e/(2c)

A chunk that fits on chip is read once: statistics, sums and output come from the same registers. A longer one is
streamed: `_stats` (and `_sums` in the backward pass) walk it first, then the same `_forward` and `_backward` take its
blocks one by one. Gradients of the parameters go through one partial sum a program and a second sum in fixed order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from daam.kernels.call import Call
from daam.kernels.launch import BACKWARD, FORWARD, split_float, stats_shape, worth_keeping
from daam.kernels.layout import Strided, acc_dtype, varies
from daam.kernels.tile import (
    centre,
    chunk_numbers,
    columns_inside,
    inside_of,
    inverse_count,
    inverse_spread,
    load,
    load_param,
    place_of,
    ranges,
    share_of,
    store,
    valid_in,
)

# --- Kernels ------------------------------------------------------------------------------------
# x, mask, y, … are `layout.Strided` or None, extent is `call.Extent`. A program of `_forward` and `_backward` takes the
# tiles first, first + step, … of its head, and of each the block `row` along the chunk. One set of parameters serves
# all of them: where parameters vary along the inner dimension, step is a multiple of the blocks along it.


@triton.jit
def _params(mean_offset, c, head, row, at, extent, ACC: tl.constexpr, VARIES: tl.constexpr):
    """mean_offset and 1/c for the tile that begins at `row` of its chunk."""
    offset = load_param(mean_offset, head, row, at, extent, 0.0, ACC, VARIES)
    return offset, 1.0 / load_param(c, head, row, at, extent, 1.0, ACC, VARIES)


@triton.jit
def _deviation(x, valid, mask, stats, extent, at, head, eps, ACC: tl.constexpr):
    """x - mean, r2 and 1/n: from the tile, which then holds whole chunks, or from what `_stats` left."""
    if stats is None:
        part = share_of(valid, mask, extent, at, ACC)
        d, _rest = centre(x, valid, tl.sum(x, 0) * part, part)
        return d, inverse_spread(tl.sum(d * d, 0), part, eps)[None, :], part[None, :]
    else:
        at_mean, step, ok = chunk_numbers(stats, extent, at, head)
        d = (x - tl.load(at_mean, ok, 0.0)) - tl.load(at_mean + step, ok, 0.0)
        return d, tl.load(at_mean + 2 * step, ok, 0.0), tl.load(at_mean + 3 * step, ok, 0.0)


@triton.jit
def _weights(d, offset, inverse_c, r2, valid):
    """e and exp(-e²·r2/(2c)), with log2(e) folded into the constant: one exp2 an element."""
    e = d - offset
    return e, tl.where(valid, tl.exp2(e * e * (-0.7213475204444817 * inverse_c * r2)), 0.0)


@triton.jit
def _products(x, grad_y, grad_weights, sizes, at, inside, valid, e, w, inverse_c, r2, ACC: tl.constexpr):
    """he, and grad_y as it came (0 where there is none)."""
    if grad_y is None:
        raw = x * 0.0
        h = tl.where(valid, load(grad_weights, sizes, at, inside, ACC), 0.0)
    else:
        raw = load(grad_y, sizes, at, inside, ACC)
        h = tl.where(valid, raw, 0.0) * x
        if grad_weights is not None:
            h += tl.where(valid, load(grad_weights, sizes, at, inside, ACC), 0.0)
    return h * w * e * (inverse_c * r2), raw


@triton.jit
def _forward(
    x, mean_offset, c, mask, stats, y, weights, eps, extent,
    VARIES: tl.constexpr, RESIDUAL: tl.constexpr, ACC: tl.constexpr, INDEX: tl.constexpr,
    BLOCK_CHUNK: tl.constexpr, BLOCK_INNER: tl.constexpr,
):  # fmt: skip
    head, program = tl.program_id(1).to(tl.int64), tl.program_id(0).to(tl.int64)
    first, row = program // extent.row_blocks, program % extent.row_blocks * BLOCK_CHUNK
    rows, cols = ranges(INDEX, BLOCK_CHUNK, BLOCK_INNER)
    place, col = place_of(first, extent, BLOCK_INNER)
    offset, inverse_c = _params(mean_offset, c, head, row, (place, row, col, rows, cols), extent, ACC, VARIES)
    for tile in range(first, extent.tiles, tl.num_programs(0) // extent.row_blocks):
        place, col = place_of(tile, extent, BLOCK_INNER)
        at = (place, head * extent.chunk + row, col, rows, cols)
        inside = inside_of(extent, row, at)
        valid = valid_in(mask, extent.sizes, at, inside)
        raw = load(x, extent.sizes, at, inside, ACC)
        xv = tl.where(valid, raw, 0.0)
        d, r2, _part = _deviation(xv, valid, mask, stats, extent, at, head, eps, ACC)
        _e, w = _weights(d, offset, inverse_c, r2, valid)
        out = xv * w
        if RESIDUAL:
            out += raw
        store(y, extent.sizes, at, inside, out)
        if weights is not None:
            store(weights, extent.sizes, at, inside, w)


@triton.jit
def _stats(
    x, mask, stats, eps, extent,
    ACC: tl.constexpr, INDEX: tl.constexpr, BLOCK_CHUNK: tl.constexpr, BLOCK_INNER: tl.constexpr,
):  # fmt: skip
    """mean, rest, r2 and 1/n of every chunk of one tile's columns: blocks merged in order by Chan's formula.

    All blocks measure from one mean, that of the first that holds a valid position: differences stay small where the
    mean is large.
    """
    head = tl.program_id(1).to(tl.int64)
    rows, cols = ranges(INDEX, BLOCK_CHUNK, BLOCK_INNER)
    place, col = place_of(tl.program_id(0), extent, BLOCK_INNER)
    mean = tl.zeros([BLOCK_INNER], ACC)
    rest, square, n = mean, mean, mean
    for start in range(0, extent.chunk, BLOCK_CHUNK):
        row = tl.cast(start, tl.int64)
        at = (place, head * extent.chunk + row, col, rows, cols)
        inside = inside_of(extent, row, at)
        valid = valid_in(mask, extent.sizes, at, inside)
        xv = tl.where(valid, load(x, extent.sizes, at, inside, ACC), 0.0)
        n_block = tl.sum(valid.to(ACC), 0)
        # selected before it is used: a product that enters several sums may be fused into some of them and not others
        mean = tl.where(n == 0, tl.sum(xv, 0) * inverse_count(n_block), mean)
        d, rest_block = centre(xv, valid, mean, inverse_count(n_block))
        apart = rest_block - rest
        n_before, n = n, n + n_block
        square += tl.sum(d * d, 0) + apart * apart * n_before * n_block * inverse_count(n)
        rest += apart * n_block * inverse_count(n)
    at_mean, step, ok = chunk_numbers(stats, extent, (place, head, col, rows, cols), head)
    tl.store(at_mean, mean[None, :], ok)
    tl.store(at_mean + step, rest[None, :], ok)
    tl.store(at_mean + 2 * step, inverse_spread(square, inverse_count(n), eps)[None, :], ok)
    tl.store(at_mean + 3 * step, inverse_count(n)[None, :], ok)


@triton.jit
def _sums(
    x, grad_y, grad_weights, mean_offset, c, mask, stats, sums, extent,
    VARIES: tl.constexpr, ACC: tl.constexpr, INDEX: tl.constexpr, BLOCK_CHUNK: tl.constexpr, BLOCK_INNER: tl.constexpr,
):  # fmt: skip
    """Σ he and Σ he·e of every chunk of one tile's columns."""
    head = tl.program_id(1).to(tl.int64)
    rows, cols = ranges(INDEX, BLOCK_CHUNK, BLOCK_INNER)
    place, col = place_of(tl.program_id(0), extent, BLOCK_INNER)
    sum_he = tl.zeros([BLOCK_CHUNK, BLOCK_INNER], ACC)
    sum_hee = sum_he
    for start in range(0, extent.chunk, BLOCK_CHUNK):
        row = tl.cast(start, tl.int64)
        at = (place, head * extent.chunk + row, col, rows, cols)
        inside = inside_of(extent, row, at)
        offset, inverse_c = _params(mean_offset, c, head, row, at, extent, ACC, VARIES)
        valid = valid_in(mask, extent.sizes, at, inside)
        xv = tl.where(valid, load(x, extent.sizes, at, inside, ACC), 0.0)
        d, r2, _part = _deviation(xv, valid, mask, stats, extent, at, head, None, ACC)
        e, w = _weights(d, offset, inverse_c, r2, valid)
        he, _raw = _products(xv, grad_y, grad_weights, extent.sizes, at, inside, valid, e, w, inverse_c, r2, ACC)
        sum_he += he
        sum_hee += he * e
    at_he, step, ok = chunk_numbers(sums, extent, (place, head, col, rows, cols), head)
    tl.store(at_he, tl.sum(sum_he, 0)[None, :], ok)
    tl.store(at_he + step, tl.sum(sum_hee, 0)[None, :], ok)


@triton.jit
def _backward(
    x, grad_y, grad_weights, mean_offset, c, mask, stats, sums, dx, partials, eps, extent,
    VARIES: tl.constexpr, RESIDUAL: tl.constexpr, ACC: tl.constexpr, INDEX: tl.constexpr,
    BLOCK_CHUNK: tl.constexpr, BLOCK_INNER: tl.constexpr,
):  # fmt: skip
    head, program = tl.program_id(1).to(tl.int64), tl.program_id(0).to(tl.int64)
    first, row = program // extent.row_blocks, program % extent.row_blocks * BLOCK_CHUNK
    rows, cols = ranges(INDEX, BLOCK_CHUNK, BLOCK_INNER)
    place, col = place_of(first, extent, BLOCK_INNER)
    own = (place, row, col, rows, cols)
    offset, inverse_c = _params(mean_offset, c, head, row, own, extent, ACC, VARIES)
    total_he = tl.zeros([BLOCK_CHUNK if VARIES == "chunk" else 1, BLOCK_INNER if VARIES == "inner" else 1], ACC)
    total_hee = total_he
    for tile in range(first, extent.tiles, tl.num_programs(0) // extent.row_blocks):
        place, col = place_of(tile, extent, BLOCK_INNER)
        at = (place, head * extent.chunk + row, col, rows, cols)
        inside = inside_of(extent, row, at)
        valid = valid_in(mask, extent.sizes, at, inside)
        xv = tl.where(valid, load(x, extent.sizes, at, inside, ACC), 0.0)
        d, r2, part = _deviation(xv, valid, mask, stats, extent, at, head, eps, ACC)
        e, w = _weights(d, offset, inverse_c, r2, valid)
        he, raw = _products(xv, grad_y, grad_weights, extent.sizes, at, inside, valid, e, w, inverse_c, r2, ACC)
        if sums is None:
            sum_he, sum_hee = tl.sum(he, 0)[None, :], tl.sum(he * e, 0)[None, :]
        else:
            at_he, step, ok = chunk_numbers(sums, extent, at, head)
            sum_he, sum_hee = tl.load(at_he, ok, 0.0), tl.load(at_he + step, ok, 0.0)
        if dx is not None:
            # from x - mean, not as k1·x + k0: large means would cancel
            grad = part * (sum_he + r2 * sum_hee * d) - he
            if grad_y is not None:
                grad += raw * w
            grad = tl.where(valid, grad, 0.0)
            if RESIDUAL and grad_y is not None:
                grad += raw
            store(dx, extent.sizes, at, inside, grad)
        if partials is not None:
            if VARIES == "chunk":
                total_he += tl.sum(he, 1)[:, None]
                total_hee += tl.sum(he * e, 1)[:, None]
            elif VARIES == "inner":
                total_he += sum_he
                total_hee += sum_hee
            else:
                # summed over the columns here: carried through the loop as a row, they crash LLVM's vectoriser (Triton
                # 3.9, short rows)
                total_he += tl.sum(sum_he, 1)[:, None]
                total_hee += tl.sum(sum_hee, 1)[:, None]
    if partials is not None:
        _store_partials(partials, total_he, total_hee, head, first, row, own, extent, VARIES)


@triton.jit
def _store_partials(partials, total_he, total_hee, head, first, row, own, extent, VARIES: tl.constexpr):
    """One program's sums in (2, group, head, P): a group of programs together holds every parameter of a head once."""
    _place, _row, col, rows, cols = own
    step, of_group, of_head = partials.strides
    data = partials.data + head * of_head
    if VARIES == "chunk":
        data += first * of_group + (row + rows)[:, None]
        ok = (row + rows < extent.chunk)[:, None]
    elif VARIES == "inner":
        data += first // extent.blocks * of_group + (col + cols)[None, :]
        ok = columns_inside(extent, own)[None, :]
    else:
        data += first * of_group + tl.zeros([1, 1], tl.int32)
        ok = tl.full([1, 1], True, tl.int1)
    tl.store(data, total_he, ok)
    tl.store(data + step, total_hee, ok)


# --- Launchers ----------------------------------------------------------------------------------


def density_forward(
    x: Tensor, mean_offset: Tensor, c: Tensor, mask: Tensor | None, axis: int, feature_axis: int, eps: float,
    residual: bool, return_weights: bool, save_stats: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """y, weights and statistics, contiguous; empty where not asked for, and the statistics of chunks on chip."""
    y = x.new_empty(x.shape)
    weights = x.new_empty(x.shape) if return_weights else None
    stats = _new_stats(x, c, axis, feature_axis)
    if x.numel() > 0:
        mask = None if mask is None else mask.expand(x.shape)
        call = Call(FORWARD, x, [mask, y, weights], stats, c, axis, feature_axis)
        of_x, of_mask, of_y, of_weights = call.operands
        of_stats = call.of_chunks(stats)
        if stats is not None:
            call.launch(_stats, call.extent.tiles, of_x, of_mask, of_stats, split_float(eps))
        call.launch(
            _forward, call.programs() * call.extent.row_blocks, of_x, _param(mean_offset), _param(c), of_mask, of_stats,
            of_y, of_weights, split_float(eps), VARIES=call.along, RESIDUAL=residual,
        )  # fmt: skip
    return (
        y,
        _or_empty(weights, x.dtype, x),
        _or_empty(stats if save_stats and worth_keeping(x, axis, c.shape[0]) else None, acc_dtype(x), x),
    )


def density_backward(
    grad_y: Tensor | None, grad_weights: Tensor | None, x: Tensor, mean_offset: Tensor, c: Tensor, mask: Tensor | None,
    stats: Tensor | None, axis: int, feature_axis: int, eps: float, residual: bool, need_x: bool, need_params: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of x, mean_offset and c, contiguous; empty where not needed. stats are recomputed where None."""
    dx = x.new_empty(x.shape) if need_x else None
    if x.numel() > 0:
        saved, stats = stats, _new_stats(x, c, axis, feature_axis) if stats is None else stats
        mask = None if mask is None else mask.expand(x.shape)
        call = Call(BACKWARD, x, [mask, grad_y, grad_weights, dx], stats, c, axis, feature_axis)
        of_x, of_mask, of_grad_y, of_grad_weights, of_dx = call.operands
        inputs = (of_x, of_grad_y, of_grad_weights, _param(mean_offset), _param(c), of_mask, call.of_chunks(stats))
        totals = sums = None
        if stats is not None:
            if saved is None:
                call.launch(_stats, call.extent.tiles, of_x, of_mask, call.of_chunks(stats), split_float(eps))
            sums = torch.empty_like(stats[:2])
            call.launch(_sums, call.extent.tiles, *inputs, call.of_chunks(sums), VARIES=call.along)
            if need_params and call.along != "chunk":
                totals = _sum_to_params(sums, axis, feature_axis, call.along)
        partials, programs = None, call.programs()
        if need_params and totals is None:
            programs = call.programs(call.tiles_per_partial)
            partials = x.new_empty((2, call.groups(programs), *c.shape), dtype=acc_dtype(x))
        if need_x or partials is not None:
            call.launch(
                _backward, programs * call.extent.row_blocks, *inputs, call.of_chunks(sums), of_dx,
                None if partials is None else Strided(partials, partials.stride()[:3]), split_float(eps),
                VARIES=call.along, RESIDUAL=residual,
            )  # fmt: skip
        if partials is not None:
            totals = partials.sum(1)
    elif need_params:
        totals = x.new_zeros((2, *c.shape), dtype=acc_dtype(x))
    d_mean_offset = totals[0].to(mean_offset.dtype) if need_params else None
    d_c = (totals[1] / (2 * c.to(acc_dtype(x)))).to(c.dtype) if need_params else None
    return _or_empty(dx, x.dtype, x), _or_empty(d_mean_offset, mean_offset.dtype, x), _or_empty(d_c, c.dtype, x)


def _param(p: Tensor) -> Strided:
    return Strided(p, p.stride())


def _or_empty(t: Tensor | None, dtype: torch.dtype, x: Tensor) -> Tensor:
    return x.new_empty(0, dtype=dtype) if t is None else t


def _new_stats(x: Tensor, c: Tensor, axis: int, feature_axis: int) -> Tensor | None:
    shape = stats_shape(x, axis, c.shape[0], feature_axis, varies(c, axis, feature_axis))
    return None if shape is None else x.new_empty(shape, dtype=acc_dtype(x))


def _sum_to_params(sums: Tensor, axis: int, feature_axis: int, along: str) -> Tensor:
    """(2, …, heads, …) summed to (2, heads, P)."""
    kept = (0, axis + 1, feature_axis + 1 if along == "inner" else 0)
    others = [d for d in range(sums.dim()) if d not in kept]
    totals = sums.sum(others) if others else sums  # sum([]) would sum everything
    if along == "nothing":
        return totals.unsqueeze(-1)
    return totals.transpose(1, 2).contiguous() if feature_axis < axis else totals
