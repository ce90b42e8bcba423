"""Density attention (arXiv 2401.11143, Algorithm 1), forward and backward.

Over one chunk of length n, with e = x - mean - mean_offset and r2 = 1/(var + eps), var biased and centred:

    weights = exp(-e²·r2/(2c))          y = x·weights (+ x)

    he = (grad_y·x + grad_weights)·weights·e·r2/c
    dx = grad_y·weights - he + (Σ he + r2·(x - mean)·Σ he·e)/n (+ grad_y)
    d_mean_offset = Σ he      d_c = Σ he·e/(2c)

A chunk that fits on chip is read once: statistics, sums and output come from the same registers. A longer one is
streamed: `stats.py` (and `_sums` in the backward pass) walk its strips first, then the same `_forward` and `_backward`
take them again, last strip first. Gradients of the parameters go through one partial sum a program, or the sums of
streamed chunks where these are sums over the same positions, and `_chain`, which adds them in fixed order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from daam.kernels.launch import power_of_2, split_float
from daam.kernels.layout import Strided
from daam.kernels.passes import Backward, Forward
from daam.kernels.stats import add_strips, find_stats, store_strip
from daam.kernels.tile import (
    added,
    along_chunk,
    at_of,
    chunk_of,
    columns_inside,
    deviation,
    first_tile,
    gradients,
    less,
    load_numbers,
    load_param,
    next_tile,
    of_weights,
    products,
    read_tile,
    rounded_product,
    sum_to_one,
    write_dx,
    write_outputs,
)

# --- Kernels ------------------------------------------------------------------------------------
# x, mask, y, … are `layout.Strided` or None, extent is `layout.Extent`. A program takes the tiles first, first + step,
# … of its head, and of each the strip that begins at `start` of the chunk: all of it where it fits on chip. One set of
# parameters serves all of them: where they vary along the inner dimension, step is a multiple of the blocks along it,
# and where they vary along the chunk, a strip is one tile.


@triton.jit
def _params(mean_offset, c, head, row, at, extent, ACC: tl.constexpr, VARIES: tl.constexpr, PARTS: tl.constexpr):
    """mean_offset and 1/c for the blocks of the tile that begins at `row` of its chunk."""
    offset = load_param(mean_offset, head, row, at, extent, 0.0, ACC, VARIES, PARTS)
    c = load_param(c, head, row, at, extent, 1.0, ACC, VARIES, PARTS)
    inverse = ()
    for i in tl.static_range(PARTS):
        inverse = inverse + (1.0 / c[i],)
    return offset, inverse


@triton.jit
def _weights(d, rest, params, r2, valid):
    """e and exp(-e²·r2/(2c)) of every block, with log2(e) folded into the constant: one exp2 an element."""
    e, w = (), ()
    for i in tl.static_range(len(d)):
        of_block = d[i] - (params[0][i] + rest)
        e = e + (of_block,)
        exponent = of_block * of_block * (-0.7213475204444817 * params[1][i] * r2)
        w = w + (tl.where(valid[i], tl.exp2(exponent), 0.0),)
    return e, w


@triton.jit
def _forward(
    x, mean_offset, c, mask, stats, y, weights, eps, extent,
    VARIES: tl.constexpr, RESIDUAL: tl.constexpr, ACC: tl.constexpr, INDEX: tl.constexpr,
    BLOCK_CHUNK: tl.constexpr, BLOCK_INNER: tl.constexpr, PARTS: tl.constexpr, RAGGED: tl.constexpr,
):  # fmt: skip
    head, start, first, step, spot, apart = first_tile(extent, stats is not None)
    own = at_of(spot, head, start, extent, INDEX, BLOCK_CHUNK, BLOCK_INNER)
    params = _params(mean_offset, c, head, start, own, extent, ACC, VARIES, PARTS)
    for _tile in range(first, extent.tiles, step):
        if stats is None:
            at, inside, valid, raw, xv = read_tile(
                x, mask, spot, head, start, extent, RESIDUAL, ACC, INDEX, BLOCK_CHUNK, BLOCK_INNER, PARTS, RAGGED
            )
            d, rest, r2, _share = deviation(xv, valid, mask, None, extent, eps, False, ACC)
            _e, w = _weights(d, rest, params, r2, valid)
            write_outputs(y, weights, xv, raw, w, None, extent, at, inside, RESIDUAL)
        else:
            own = at_of(spot, head, start, extent, INDEX, BLOCK_CHUNK, BLOCK_INNER)
            mean, rest, r2 = load_numbers(stats, extent, own, head, 3)
            for row in range(start, tl.minimum(start + extent.strip, extent.chunk), BLOCK_CHUNK * PARTS):
                at, inside, valid, raw, xv = read_tile(
                    x, mask, spot, head, row, extent, RESIDUAL, ACC, INDEX, BLOCK_CHUNK, BLOCK_INNER, PARTS, RAGGED
                )
                _e, w = _weights(less(xv, mean), rest, params, r2, valid)
                write_outputs(y, weights, xv, raw, w, None, extent, at, inside, RESIDUAL)
        spot = next_tile(spot, apart, extent)


@triton.jit
def _factor(params, r2, VARIES: tl.constexpr):
    """r2/c, which he lacks where one parameter serves all blocks: the sums can have it later. Else 1."""
    return tl.full([1, 1], 1.0, r2.dtype) if VARIES == "chunk" else params[1][0] * r2


@triton.jit
def _products(h, w, e, params, r2, VARIES: tl.constexpr):
    """he of every block, less `_factor`. Each is rounded once for all its uses: in a chunk whose he are all alike, they
    and their mean cancel to nothing.
    """
    he = ()
    for i in tl.static_range(len(e)):
        if VARIES == "chunk":
            he = he + (rounded_product(h[i] * w[i] * e[i], params[1][i] * r2),)
        else:
            he = he + (rounded_product(h[i] * w[i], e[i]),)
    return he


@triton.jit
def _input_grad(grad_y, w, d, rest, he, factor, mean_he, slope):
    """dx without the residual's part; he and its mean lack `factor`, which is large where what they leave is small."""
    slope_rest, grad = slope * rest, ()
    for i in tl.static_range(len(he)):
        # from x - mean, not as k1·x + k0: large means would cancel
        own_part = grad_y[i] * w[i] + (slope * d[i] - slope_rest)
        grad = grad + (own_part + factor * (mean_he - he[i]),)
    return grad


@triton.jit
def _sums(
    x, grad_y, grad_weights, mean_offset, c, mask, stats, sums, extent,
    VARIES: tl.constexpr, ACC: tl.constexpr, INDEX: tl.constexpr,
    BLOCK_CHUNK: tl.constexpr, BLOCK_INNER: tl.constexpr, PARTS: tl.constexpr, RAGGED: tl.constexpr,
):  # fmt: skip
    """Σ he and Σ he·e of every chunk's strip of one tile's columns, and Σ he without its `_factor`."""
    head, start, first, step, spot, apart = first_tile(extent, True)
    own = at_of(spot, head, start, extent, INDEX, BLOCK_CHUNK, BLOCK_INNER)
    params = _params(mean_offset, c, head, start, own, extent, ACC, VARIES, PARTS)
    for _tile in range(first, extent.tiles, step):
        own = at_of(spot, head, start, extent, INDEX, BLOCK_CHUNK, BLOCK_INNER)
        mean, rest, r2 = load_numbers(stats, extent, own, head, 3)
        sum_he = tl.zeros([BLOCK_CHUNK, BLOCK_INNER], ACC)
        sum_hee = sum_he
        for row in range(start, tl.minimum(start + extent.strip, extent.chunk), BLOCK_CHUNK * PARTS):
            at, inside, valid, _raw, xv = read_tile(
                x, mask, spot, head, row, extent, False, ACC, INDEX, BLOCK_CHUNK, BLOCK_INNER, PARTS, RAGGED
            )
            e, w = _weights(less(xv, mean), rest, params, r2, valid)
            h = of_weights(gradients(grad_y, grad_weights, mask, extent, at, inside, valid, False, ACC), xv, None)
            he = _products(h, w, e, params, r2, VARIES)
            sum_he += added(he)
            sum_hee += products(he, e)
        factor = _factor(params, r2, VARIES)
        all_he = along_chunk(sum_he)
        numbers = (all_he * factor, along_chunk(sum_hee) * factor, all_he)
        store_strip(sums, extent, own, head, start, numbers)
        spot = next_tile(spot, apart, extent)


@triton.jit
def _backward(
    x, grad_y, grad_weights, mean_offset, c, mask, stats, sums, dx, partials, eps, extent,
    VARIES: tl.constexpr, RESIDUAL: tl.constexpr, ACC: tl.constexpr, INDEX: tl.constexpr,
    BLOCK_CHUNK: tl.constexpr, BLOCK_INNER: tl.constexpr, PARTS: tl.constexpr, RAGGED: tl.constexpr,
):  # fmt: skip
    head, start, first, step, spot, apart = first_tile(extent, stats is not None)
    own = at_of(spot, head, start, extent, INDEX, BLOCK_CHUNK, BLOCK_INNER)
    params = _params(mean_offset, c, head, start, own, extent, ACC, VARIES, PARTS)
    totals = _zeros(VARIES, ACC, BLOCK_CHUNK, BLOCK_INNER, PARTS)
    for _tile in range(first, extent.tiles, step):
        if stats is None:
            at, inside, valid, _raw, xv = read_tile(
                x, mask, spot, head, start, extent, False, ACC, INDEX, BLOCK_CHUNK, BLOCK_INNER, PARTS, RAGGED
            )
            d, rest, r2, share = deviation(xv, valid, mask, None, extent, eps, False, ACC)
            if VARIES == "chunk":  # sums over columns: r2 is infinite outside where eps is 0
                r2 = tl.where(columns_inside(extent, at), r2, 0.0)
            e, w = _weights(d, rest, params, r2, valid)
            gradient = gradients(grad_y, grad_weights, mask, extent, at, inside, valid, RESIDUAL, ACC)
            he = _products(of_weights(gradient, xv, None), w, e, params, r2, VARIES)
            factor = _factor(params, r2, VARIES)
            all_he = along_chunk(added(he))
            sum_he, sum_hee = all_he * factor, along_chunk(products(he, e)) * factor
            if dx is not None:
                grad = _input_grad(gradient[1], w, d, rest, he, factor, share * all_he, share * r2 * sum_hee)
                write_dx(dx, grad, gradient[0], extent, at, inside, valid, RESIDUAL)
            if partials is not None:
                totals = _add_to(totals, he, e, sum_he, sum_hee, extent, at, VARIES)
        else:
            own = at_of(spot, head, start, extent, INDEX, BLOCK_CHUNK, BLOCK_INNER)
            mean, rest, r2, share = load_numbers(stats, extent, own, head, 4)
            sum_he, sum_hee, all_he = load_numbers(sums, extent, own, head, 3)
            factor, mean_he, slope = _factor(params, r2, VARIES), share * all_he, share * r2 * sum_hee
            for row in range(start, tl.minimum(start + extent.strip, extent.chunk), BLOCK_CHUNK * PARTS):
                at, inside, valid, _raw, xv = read_tile(
                    x, mask, spot, head, row, extent, False, ACC, INDEX, BLOCK_CHUNK, BLOCK_INNER, PARTS, RAGGED
                )
                d = less(xv, mean)
                e, w = _weights(d, rest, params, r2, valid)
                gradient = gradients(grad_y, grad_weights, mask, extent, at, inside, valid, RESIDUAL, ACC)
                he = _products(of_weights(gradient, xv, None), w, e, params, r2, VARIES)
                if dx is not None:
                    grad = _input_grad(gradient[1], w, d, rest, he, factor, mean_he, slope)
                    write_dx(dx, grad, gradient[0], extent, at, inside, valid, RESIDUAL)
                if partials is not None:
                    totals = _add_to(totals, he, e, sum_he, sum_hee, extent, at, VARIES)
        spot = next_tile(spot, apart, extent)
    if partials is not None:
        _store_partials(partials, totals, head, first, start, own, extent, VARIES)


@triton.jit
def _zeros(
    VARIES: tl.constexpr, ACC: tl.constexpr, BLOCK_CHUNK: tl.constexpr, BLOCK_INNER: tl.constexpr, PARTS: tl.constexpr
):  # fmt: skip
    """Σ he and Σ he·e for every parameter of a tile: [BLOCK_CHUNK, 1] for each of its blocks, [1, BLOCK_INNER] or one
    number.
    """
    zero = tl.zeros([BLOCK_CHUNK if VARIES == "chunk" else 1, BLOCK_INNER if VARIES == "inner" else 1], ACC)
    zeros = ()
    for _ in tl.static_range(2 * PARTS if VARIES == "chunk" else 2):
        zeros = zeros + (zero,)
    return zeros


@triton.jit
def _add_to(totals, he, e, sum_he, sum_hee, extent, at, VARIES: tl.constexpr):
    """The sums with those of one more tile."""
    if VARIES == "chunk":
        more = ()
        for i in tl.static_range(len(he)):
            more = more + (totals[2 * i] + tl.sum(he[i], 1)[:, None],)
            more = more + (totals[2 * i + 1] + tl.sum(he[i] * e[i], 1)[:, None],)
        return more
    elif VARIES == "inner":
        return totals[0] + sum_he, totals[1] + sum_hee
    else:
        ok = columns_inside(extent, at)
        return (
            totals[0] + sum_to_one(tl.where(ok, sum_he, 0.0)), totals[1] + sum_to_one(tl.where(ok, sum_hee, 0.0))
        )  # fmt: skip


@triton.jit
def _store_partials(partials, totals, head, first, row, own, extent, VARIES: tl.constexpr):
    """One program's sums in (2, head, group, P): a group of programs together holds every parameter of a head once."""
    col, rows, cols = own[2], own[3], own[4]
    step, of_head, of_group, _one = partials.strides
    data = partials.data + head * of_head
    for i in tl.static_range(len(totals) // 2):
        if VARIES == "chunk":
            places = (row + i * rows.shape[0] + rows)[:, None]
            at, ok = data + first * of_group + places, places < chunk_of(extent)
        elif VARIES == "inner":
            at = data + first // extent.blocks * of_group + (col + cols)[None, :]
            ok = columns_inside(extent, own)
        else:
            at, ok = data + first * of_group + tl.zeros([1, 1], tl.int32), tl.full([1, 1], True, tl.int1)
        tl.store(at, totals[2 * i], ok)
        tl.store(at + step, totals[2 * i + 1], ok)


@triton.jit
def _chain(
    partials, groups, c, d_mean_offset, d_c, features,
    BLOCK: tl.constexpr, BLOCK_FEATURES: tl.constexpr,
):  # fmt: skip
    """Gradients of one head's parameters from the partial sums, in fixed order and fp64."""
    head = tl.program_id(1).to(tl.int64)
    cols = tl.program_id(0).to(tl.int64) * BLOCK_FEATURES + tl.arange(0, BLOCK_FEATURES)
    step, of_head, of_group, _one = partials.strides
    data, inside = partials.data + head * of_head + cols[None, :], cols < features
    total_he = tl.zeros([BLOCK, BLOCK_FEATURES], tl.float64)
    total_hee = total_he
    for first in range(0, groups, BLOCK):
        rows = tl.cast(first, tl.int64) + tl.arange(0, BLOCK)[:, None]
        ok = inside[None, :] & (rows < groups)
        total_he += tl.load(data + rows * of_group, ok, 0.0).to(tl.float64)
        total_hee += tl.load(data + step + rows * of_group, ok, 0.0).to(tl.float64)
    divisor = tl.load(c.data + head * c.strides[0] + cols * c.strides[1], inside, 1.0).to(tl.float64)
    at = head * features + cols
    tl.store(d_mean_offset + at, tl.sum(total_he, 0).to(d_mean_offset.dtype.element_ty), inside)
    tl.store(d_c + at, (tl.sum(total_hee, 0) / (2.0 * divisor)).to(d_c.dtype.element_ty), inside)


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
    grads = run.param_grads(mean_offset, c)
    for call in run.calls():
        of, stats, eps_parts = call.of, call.of_chunks(run.stats), split_float(eps)
        if run.lacks_stats:
            find_stats(call, stats, eps_parts)
        inputs = (of.x, of.grad_y, of.grad_weights, call.of_heads(mean_offset), call.of_heads(c), of.mask, stats)
        sums = None
        if call.streamed:
            strips = call.of_strips(3)
            call.launch(_sums, call.programs, *inputs, strips, VARIES=call.along)
            sums = add_strips(call, strips, 3)
        # the sums of streamed chunks are all there is to sum, but where parameters vary along the chunk
        direct = call.streamed and call.along != "chunk"
        programs = call.programs_of_sums(2) if need_params and not direct else call.programs
        partials = None if direct else run.partials(call, 2, call.groups(programs), c.shape[1])
        if need_x or partials is not None:
            call.launch(
                _backward, programs, *inputs, sums, of.dx, partials, eps_parts, VARIES=call.along, RESIDUAL=residual
            )
        if need_params:
            partials = _as_partials(sums.data[:2], axis, feature_axis) if direct else partials
            features = c.shape[1]
            block = min(128, power_of_2(features))
            args = (partials, partials.data.shape[2], call.of_heads(c), *grads, features)
            blocks = -(-features // block)
            call.launch_sums(_chain, blocks, *args, BLOCK=1024 // block, BLOCK_FEATURES=block)
    return run.dx, *grads


def _as_partials(sums: Tensor, axis: int, feature_axis: int | None) -> Strided:
    """Sums of chunks, (2, …, heads, …), as partial sums (2, heads, 1, P)."""
    kept = (0, axis + 1, 0 if feature_axis is None else feature_axis + 1)
    others = [d for d in range(sums.dim()) if d not in kept]
    totals = sums.sum(others, dtype=torch.float64) if others else sums  # sum([]) would sum everything
    if feature_axis is None:
        totals = totals.unsqueeze(-1)
    elif feature_axis < axis:
        totals = totals.transpose(1, 2)
    totals = totals.unsqueeze(2).contiguous()
    return Strided(totals, totals.stride())
