"""Density attention (arXiv 2401.11143, Algorithm 1), forward and backward.

Over one chunk of length n, with e = x - mean - mean_offset and r2 = 1/(var + eps), var biased and centred:

    weights = exp(-e²·r2/(2c))          y = x·weights (+ x)

    he = (grad_y·x + grad_weights)·weights·e·r2/c
    dx = grad_y·weights - he + (Σ he + r2·(x - mean)·Σ he·e)/n (+ grad_y)
    d_mean_offset = Σ he      d_c = Σ he·e/(2c)

A chunk that fits on chip is read once: statistics, sums and output come from the same registers. A longer one is
streamed: `stats.py` (and `_sums` in the backward pass) walk it first, then the same `_forward` and `_backward` take its
blocks one by one. Gradients of the parameters go through one partial sum a program and a second sum in fixed order.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from daam.kernels.launch import split_float
from daam.kernels.passes import Backward, Forward
from daam.kernels.stats import find_stats
from daam.kernels.tile import (
    at_of,
    chunk_numbers,
    columns_inside,
    deviation,
    first_tile,
    gradients,
    load_param,
    read_tile,
    write_dx,
    write_outputs,
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
def _weights(d, offset, inverse_c, r2, valid):
    """e and exp(-e²·r2/(2c)), with log2(e) folded into the constant: one exp2 an element."""
    e = d - offset
    return e, tl.where(valid, tl.exp2(e * e * (-0.7213475204444817 * inverse_c * r2)), 0.0)


@triton.jit
def _forward(
    x, mean_offset, c, mask, stats, y, weights, eps, extent,
    VARIES: tl.constexpr, RESIDUAL: tl.constexpr, ACC: tl.constexpr, INDEX: tl.constexpr,
    BLOCK_CHUNK: tl.constexpr, BLOCK_INNER: tl.constexpr,
):  # fmt: skip
    head, first, step, row = first_tile(extent, BLOCK_CHUNK)
    own = at_of(first, head, row, extent, INDEX, BLOCK_CHUNK, BLOCK_INNER)
    offset, inverse_c = _params(mean_offset, c, head, row, own, extent, ACC, VARIES)
    for tile in range(first, extent.tiles, step):
        at, inside, valid, raw, xv = read_tile(x, mask, tile, head, row, extent, ACC, INDEX, BLOCK_CHUNK, BLOCK_INNER)
        d, r2, _share = deviation(xv, valid, mask, None, stats, extent, at, head, eps, False, ACC)
        _e, w = _weights(d, offset, inverse_c, r2, valid)
        write_outputs(y, weights, xv, raw, w, None, extent, at, inside, RESIDUAL)


@triton.jit
def _sums(
    x, grad_y, grad_weights, mean_offset, c, mask, stats, sums, extent,
    VARIES: tl.constexpr, ACC: tl.constexpr, INDEX: tl.constexpr, BLOCK_CHUNK: tl.constexpr, BLOCK_INNER: tl.constexpr,
):  # fmt: skip
    """Σ he and Σ he·e of every chunk of one tile's columns."""
    head, tile = tl.program_id(1).to(tl.int64), tl.program_id(0)
    sum_he = tl.zeros([BLOCK_CHUNK, BLOCK_INNER], ACC)
    sum_hee = sum_he
    for row in range(0, extent.chunk, BLOCK_CHUNK):
        at, inside, valid, _raw, xv = read_tile(x, mask, tile, head, row, extent, ACC, INDEX, BLOCK_CHUNK, BLOCK_INNER)
        offset, inverse_c = _params(mean_offset, c, head, row, at, extent, ACC, VARIES)
        d, r2, _share = deviation(xv, valid, mask, None, stats, extent, at, head, None, False, ACC)
        e, w = _weights(d, offset, inverse_c, r2, valid)
        h, _raw = gradients(xv, grad_y, grad_weights, None, extent, at, inside, valid, ACC)
        he = h * w * e * (inverse_c * r2)
        sum_he += he
        sum_hee += he * e
    at = at_of(tile, head, 0, extent, INDEX, BLOCK_CHUNK, BLOCK_INNER)
    at_he, step, ok = chunk_numbers(sums, extent, at, head)
    tl.store(at_he, tl.sum(sum_he, 0)[None, :], ok)
    tl.store(at_he + step, tl.sum(sum_hee, 0)[None, :], ok)


@triton.jit
def _backward(
    x, grad_y, grad_weights, mean_offset, c, mask, stats, sums, dx, partials, eps, extent,
    VARIES: tl.constexpr, RESIDUAL: tl.constexpr, ACC: tl.constexpr, INDEX: tl.constexpr,
    BLOCK_CHUNK: tl.constexpr, BLOCK_INNER: tl.constexpr,
):  # fmt: skip
    head, first, step, row = first_tile(extent, BLOCK_CHUNK)
    own = at_of(first, head, row, extent, INDEX, BLOCK_CHUNK, BLOCK_INNER)
    offset, inverse_c = _params(mean_offset, c, head, row, own, extent, ACC, VARIES)
    total_he = tl.zeros([BLOCK_CHUNK if VARIES == "chunk" else 1, BLOCK_INNER if VARIES == "inner" else 1], ACC)
    total_hee = total_he
    for tile in range(first, extent.tiles, step):
        at, inside, valid, _raw, xv = read_tile(x, mask, tile, head, row, extent, ACC, INDEX, BLOCK_CHUNK, BLOCK_INNER)
        d, r2, share = deviation(xv, valid, mask, None, stats, extent, at, head, eps, False, ACC)
        e, w = _weights(d, offset, inverse_c, r2, valid)
        h, raw = gradients(xv, grad_y, grad_weights, None, extent, at, inside, valid, ACC)
        he = h * w * e * (inverse_c * r2)
        if sums is None:
            sum_he, sum_hee = tl.sum(he, 0)[None, :], tl.sum(he * e, 0)[None, :]
        else:
            at_he, far, ok = chunk_numbers(sums, extent, at, head)
            sum_he, sum_hee = tl.load(at_he, ok, 0.0), tl.load(at_he + far, ok, 0.0)
        if dx is not None:
            # from x - mean, not as k1·x + k0: large means would cancel
            grad = raw * w + (share * (sum_he + r2 * sum_hee * d) - he)
            write_dx(dx, grad, raw, extent, at, inside, valid, RESIDUAL)
        if partials is not None:
            if VARIES == "chunk":
                total_he += tl.sum(he, 1)[:, None]
                total_hee += tl.sum(he * e, 1)[:, None]
            elif VARIES == "inner":
                total_he += sum_he
                total_hee += sum_hee
            else:
                total_he += tl.sum(sum_he, 1)[:, None]  # to one number before it is carried: see `sum_to_one`
                total_hee += tl.sum(sum_hee, 1)[:, None]
    if partials is not None:
        _store_partials(partials, total_he, total_hee, head, first, row, own, extent, VARIES)


@triton.jit
def _store_partials(partials, total_he, total_hee, head, first, row, own, extent, VARIES: tl.constexpr):
    """One program's sums in (2, head, group, P): a group of programs together holds every parameter of a head once."""
    _place, _row, col, rows, cols = own
    step, of_head, of_group, _one = partials.strides
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


def forward(
    x: Tensor, mean_offset: Tensor, c: Tensor, mask: Tensor | None, axis: int, feature_axis: int | None, eps: float,
    residual: bool, return_weights: bool, save_stats: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:  # fmt: skip
    """y, weights and statistics, contiguous; None where not asked for, and the statistics of chunks on chip."""
    run = Forward(x, mask, c.shape[0], axis, return_weights, feature_axis)
    for call in run.calls():
        of, stats, eps_parts = call.of, call.of_chunks(run.stats), split_float(eps)
        if call.streamed:
            find_stats(call, stats, eps_parts)
        call.launch(
            _forward, call.programs, of.x, call.of_heads(mean_offset), call.of_heads(c), of.mask, stats, of.y,
            of.weights, eps_parts, VARIES=call.along, RESIDUAL=residual,
        )  # fmt: skip
    return run.outputs(save_stats)


def backward(
    grad_y: Tensor | None, grad_weights: Tensor | None, x: Tensor, mean_offset: Tensor, c: Tensor, mask: Tensor | None,
    stats: Tensor | None, axis: int, feature_axis: int | None, eps: float, residual: bool, need_x: bool,
    need_params: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    """Gradients of x, mean_offset and c, contiguous; None where not needed. stats are recomputed where None."""
    run = Backward(x, mask, grad_y, grad_weights, stats, c.shape[0], axis, need_x, need_params, feature_axis)
    totals = None
    for call in run.calls():
        of, stats, eps_parts = call.of, call.of_chunks(run.stats), split_float(eps)
        if run.lacks_stats:
            find_stats(call, stats, eps_parts)
        inputs = (of.x, of.grad_y, of.grad_weights, call.of_heads(mean_offset), call.of_heads(c), of.mask, stats)
        sums = run.sums(call, 2)
        if call.streamed:
            call.launch(_sums, call.extent.tiles, *inputs, sums, VARIES=call.along)
        # the sums of streamed chunks are all there is to sum, but where parameters vary along the chunk
        direct = call.streamed and call.along != "chunk"
        programs = call.programs_of_sums(2) if need_params and not direct else call.programs
        partials = None if direct else run.partials(call, 2, call.groups(programs), c.shape[1])
        if need_x or partials is not None:
            call.launch(
                _backward, programs, *inputs, sums, of.dx, partials, eps_parts, VARIES=call.along, RESIDUAL=residual
            )
        if need_params:
            totals = _sum_to_params(sums.data, axis, feature_axis) if direct else partials.data.sum(2)
    if totals is None:
        return run.dx, *run.param_grads(mean_offset, c)
    return run.dx, totals[0].to(mean_offset.dtype), (totals[1] / (2 * c.to(totals.dtype))).to(c.dtype)


def _sum_to_params(sums: Tensor, axis: int, feature_axis: int | None) -> Tensor:
    """(2, …, heads, …) summed to (2, heads, P)."""
    kept = (0, axis + 1, 0 if feature_axis is None else feature_axis + 1)
    others = [d for d in range(sums.dim()) if d not in kept]
    totals = sums.sum(others) if others else sums  # sum([]) would sum everything
    if feature_axis is None:
        return totals.unsqueeze(-1)
    return totals.transpose(1, 2).contiguous() if feature_axis < axis else totals
