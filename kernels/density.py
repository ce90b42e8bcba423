"""Density attention (arXiv 2401.11143, Algorithm 1), forward and backward.

Over the n valid positions of a chunk, e = x - mean - mean_offset and inv_var = 1/(var + eps), var biased and centred:

    weights = exp(-e²·inv_var/(2c))          y = x·weights (+ x)

    h = grad_y·x + grad_weights      he = h·weights·e·inv_var/c
    dx = grad_y·weights - he + (Σ he + inv_var·(x - mean)·Σ he·e)/n (+ grad_y)
    d_mean_offset = Σ he      d_c = Σ he·e/(2c)

What is in brackets comes with a residual. Sums are over the chunk in dx, and over all that shares the parameter in the
last line: each program leaves partial sums, and `params.param_gradients` adds them up. Where parameters do not vary
along the chunk, the sums of a streamed chunk serve as partial sums.

A chunk that fits on chip is read once: statistics, sums and output come from the same registers. A longer one is
streamed (`streamed.py`): its statistics, in the backward pass its sums, then outputs, each a walk over its strips.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from . import passes
from .algorithms import DENSITY
from .blocks import HALF_LOG2_E, add_blocks, add_products, centre, find_h, invert_variance, multiply_rounded
from .host import Call, Numbers
from .operands import Split, Strided, split_float, strided_of
from .params import add_totals, load_entries, load_param, store_totals, zero_totals
from .streamed import find_stats, merge_sums, store_strip_numbers
from .tile import load_blocks, load_gradients, load_numbers, store_dx, store_outputs
from .walk import columns_inside, locate, next_tile, place_tile, start_walk, view_of


class Gaussian(NamedTuple):
    """Hold mean_offset and 1/c of every block, in shapes that broadcast against it."""

    mean_offset: list
    inv_c: list


class Sums(NamedTuple):
    """Hold what dx takes from a whole chunk, in shapes that broadcast against [1, BLOCK_C]."""

    factor: tl.tensor  # he/bare_he, see `find_factor`
    mean_bare_he: tl.tensor  # Σ bare_he/n
    slope: tl.tensor  # inv_var·Σ he·e/n


class Chunk(NamedTuple):
    """Hold what tiles of a streamed chunk share: numbers [1, BLOCK_C], the Gaussian, and Sums in the backward pass."""

    mean_error: tl.tensor
    inv_var: tl.tensor
    gaussian: Gaussian
    sums: Sums | list


class Parameters(NamedTuple):
    """Hold the parameters (heads, P) as kernels take them."""

    mean_offset: Strided
    c: Strided


# --- One block ------------------------------------------------------------------------------------
@triton.jit
def weigh(centred, mean_error, gaussian, inv_var, valid):
    """Return (e, weights) of every block by one exp2 an element; x - mean is centred - mean_error."""
    e, weights = [], []
    for i in tl.static_range(len(centred)):
        deviation = centred[i] - (gaussian.mean_offset[i] + mean_error)
        exponent = deviation * deviation * (gaussian.inv_c[i] * -HALF_LOG2_E * inv_var)
        e, weights = e + [deviation], weights + [tl.where(valid[i], tl.exp2(exponent), 0.0)]
    return e, weights


@triton.jit
def load_gaussian(parameters, head, position, view, PLAN: tl.constexpr):
    """Return the Gaussian of a program's first tile. All its tiles have the same: where parameters vary along the chunk
    a strip is one tile, and where they vary across columns a program keeps to the same columns (`tiles.py`).
    """
    mean_offset = load_param(parameters.mean_offset, 0.0, head, position, view, PLAN)
    c = load_param(parameters.c, 1.0, head, position, view, PLAN)
    return Gaussian(mean_offset, [1.0 / block for block in c])


@triton.jit
def find_factor(gaussian, inv_var, PLAN: tl.constexpr):
    """Return what bare_he is to be multiplied by to give he: inv_var/c, or 1 where c varies along the chunk."""
    return tl.full([1, 1], 1.0, inv_var.dtype) if PLAN.VARIES == "chunk" else gaussian.inv_c[0] * inv_var


@triton.jit
def find_bare_he(h, weights, e, gaussian, inv_var, PLAN: tl.constexpr):
    """Return he of every block without its factor, rounded once: where all are alike it is exactly its mean."""
    bare_he = []
    for i in tl.static_range(PLAN.N_BLOCKS):
        if PLAN.VARIES == "chunk":
            bare_he = bare_he + [multiply_rounded(h[i] * weights[i] * e[i], gaussian.inv_c[i] * inv_var)]
        else:
            bare_he = bare_he + [multiply_rounded(h[i] * weights[i], e[i])]
    return bare_he


@triton.jit
def differentiate_x(gradients, weights, centred, mean_error, bare_he, sums):
    """Return dx of every block without the residual's part; what is not valid is left out when it is stored. The factor
    comes after the difference: it may be large where that is tiny.
    """
    constant, grad = sums.slope * mean_error, []
    for i in tl.static_range(len(bare_he)):
        # slope·(x - mean) from what is centred: in slope·x less a constant large means would cancel
        direct = gradients.y[i] * weights[i] + (sums.slope * centred[i] - constant)
        grad = grad + [direct + sums.factor * (sums.mean_bare_he - bare_he[i])]
    return grad


# --- Chunks on chip -------------------------------------------------------------------------------
@triton.jit
def density_forward(inputs, parameters, outputs, eps, extent, RESIDUAL: tl.constexpr, PLAN: tl.constexpr):
    """Store y and the weights."""
    view = view_of(extent, PLAN)
    walk = start_walk(extent, view, BACKWARDS=False)
    first = locate(walk.index, walk.head, walk.strip_row, view, PLAN)
    gaussian = load_gaussian(parameters, walk.head, first, view, PLAN)
    index = walk.index
    for _ in range(walk.first_tile, view.n_tiles, walk.tile_step):
        tile = place_tile(inputs.mask, index, walk, walk.strip_row, view, PLAN.RAGGED_P, PLAN)
        raw, x = load_blocks(inputs.x, inputs.mask, tile, view, RESIDUAL, PLAN)
        centred = centre(x, tile, inputs.mask, walk.length, PLAN.ACC)
        inv_var = invert_variance(centred.squares, centred.inv_count, centred.inv_count, inputs.mask, eps)
        _e, weights = weigh(centred.blocks, centred.mean_error, gaussian, inv_var, tile.valid)
        store_outputs(outputs, x, raw, weights, None, tile, view, RESIDUAL, PLAN)
        index = next_tile(index, walk.index_step, view)


@triton.jit
def density_backward(inputs, parameters, dx, partials, eps, extent, RESIDUAL: tl.constexpr, PLAN: tl.constexpr):
    """Store dx, and this program's sums of he and he·e for every parameter."""
    view = view_of(extent, PLAN)
    walk = start_walk(extent, view, BACKWARDS=False)
    first = locate(walk.index, walk.head, walk.strip_row, view, PLAN)
    gaussian = load_gaussian(parameters, walk.head, first, view, PLAN)
    totals = zero_totals(PLAN)
    index = walk.index
    for _ in range(walk.first_tile, view.n_tiles, walk.tile_step):
        # the forward pass again
        tile = place_tile(inputs.mask, index, walk, walk.strip_row, view, PLAN.RAGGED_P, PLAN)
        _raw, x = load_blocks(inputs.x, inputs.mask, tile, view, False, PLAN)
        gradients = load_gradients(inputs, tile, view, RESIDUAL, PLAN)
        centred = centre(x, tile, inputs.mask, walk.length, PLAN.ACC)
        inv_var = invert_variance(centred.squares, centred.inv_count, centred.inv_count, inputs.mask, eps)
        if PLAN.VARIES == "chunk":  # sums over columns follow: outside, inv_var is infinite at eps 0, and 0·inf is NaN
            inv_var = tl.where(columns_inside(tile.position, view), inv_var, 0.0)
        e, weights = weigh(centred.blocks, centred.mean_error, gaussian, inv_var, tile.valid)
        # what reaches the weights, and its sums over the chunk
        bare_he = find_bare_he(find_h(gradients, x, None), weights, e, gaussian, inv_var, PLAN)
        factor = find_factor(gaussian, inv_var, PLAN)
        sum_bare_he = tl.sum(add_blocks(bare_he), 0)[None, :]
        sum_he, sum_hee = sum_bare_he * factor, tl.sum(add_products(bare_he, e), 0)[None, :] * factor
        if dx is not None:
            sums = Sums(factor, centred.inv_count * sum_bare_he, centred.inv_count * inv_var * sum_hee)
            grad = differentiate_x(gradients, weights, centred.blocks, centred.mean_error, bare_he, sums)
            store_dx(dx, grad, gradients.raw, tile, view, RESIDUAL, PLAN)
        if partials is not None:
            # of blocks where parameters vary along the chunk, else of columns
            totals = add_totals(totals, bare_he, e, sum_he, sum_hee, columns_inside(tile.position, view), PLAN)
        index = next_tile(index, walk.index_step, view)
    if partials is not None:
        store_totals(partials, totals, walk, first, view, PLAN)


@triton.jit
def finish_gradients(totals, parameters, head, entries, inside, _K: tl.constexpr):
    """Return the gradients of some entries of both parameters from Σ he and Σ he·e."""
    total_he, total_hee = totals
    c = load_entries(parameters.c, head, entries, inside, 1.0)
    return total_he, total_hee / (2.0 * c)


# --- Streamed chunks (`streamed.py`) --------------------------------------------------------------
@triton.jit
def open_chunk(gaussian, numbers, head, position, view, PLAN: tl.constexpr):
    """Return (mean, chunk); its sums are [] where numbers have none yet."""
    mean, mean_error, inv_var, inv_count = load_numbers(numbers.stats, head, position, view, 4)
    sums = []
    if numbers.sums is not None:
        _sum_he, sum_hee, sum_bare_he = load_numbers(numbers.sums, head, position, view, 3)
        factor = find_factor(gaussian, inv_var, PLAN)
        sums = Sums(factor, inv_count * sum_bare_he, inv_count * inv_var * sum_hee)
    return mean, Chunk(mean_error, inv_var, gaussian, sums)


@triton.jit
def weigh_chunk(x, mean, chunk, _padding, valid):
    """Return the weights of every block."""
    _e, weights = weigh([block - mean for block in x], chunk.mean_error, chunk.gaussian, chunk.inv_var, valid)
    return weights


@triton.jit
def density_sums(inputs, parameters, numbers, strips, extent, PLAN: tl.constexpr):
    """Store Σ he, Σ he·e and Σ bare_he of a strip of each chunk."""
    view = view_of(extent, PLAN)
    walk = start_walk(extent, view, BACKWARDS=True)
    first = locate(walk.index, walk.head, walk.strip_row, view, PLAN)
    gaussian = load_gaussian(parameters, walk.head, first, view, PLAN)
    index = walk.index
    for _ in range(walk.first_tile, view.n_tiles, walk.tile_step):
        position = locate(index, walk.head, walk.strip_row, view, PLAN)
        mean, chunk = open_chunk(gaussian, numbers, walk.head, position, view, PLAN)
        total_bare_he = tl.zeros([PLAN.BLOCK_P, PLAN.BLOCK_C], PLAN.ACC)
        total_bare_hee = total_bare_he
        for row in range(walk.strip_row, walk.strip_end, PLAN.BLOCK_P * PLAN.N_BLOCKS):
            tile = place_tile(inputs.mask, index, walk, row, view, PLAN.RAGGED_P, PLAN)
            _raw, x = load_blocks(inputs.x, inputs.mask, tile, view, False, PLAN)
            e, weights = weigh([block - mean for block in x], chunk.mean_error, gaussian, chunk.inv_var, tile.valid)
            h = find_h(load_gradients(inputs, tile, view, False, PLAN), x, None)
            bare_he = find_bare_he(h, weights, e, gaussian, chunk.inv_var, PLAN)
            total_bare_he += add_blocks(bare_he)
            total_bare_hee += add_products(bare_he, e)
        factor = find_factor(gaussian, chunk.inv_var, PLAN)
        sum_bare_he = tl.sum(total_bare_he, 0)[None, :]
        sums = [sum_bare_he * factor, tl.sum(total_bare_hee, 0)[None, :] * factor, sum_bare_he]
        store_strip_numbers(strips, walk, position, view, sums)
        index = next_tile(index, walk.index_step, view)


@triton.jit
def differentiate_tile(x, mean, chunk, inputs, _padding, tile, view, RAW: tl.constexpr, PLAN: tl.constexpr):
    """Return (dx without the residual's part, grad_y as it came, bare_he, e) of every block. bare_he is he where it is
    asked for: where parameters vary along the chunk. Padding is the mixture's.
    """
    centred = [block - mean for block in x]
    e, weights = weigh(centred, chunk.mean_error, chunk.gaussian, chunk.inv_var, tile.valid)
    gradients = load_gradients(inputs, tile, view, RAW, PLAN)
    bare_he = find_bare_he(find_h(gradients, x, None), weights, e, chunk.gaussian, chunk.inv_var, PLAN)
    grad = differentiate_x(gradients, weights, centred, chunk.mean_error, bare_he, chunk.sums)
    return grad, gradients.raw, bare_he, e


# --- On the host ----------------------------------------------------------------------------------
def _sum_chunks(call: Call, parameters: Parameters, _eps: Split, numbers: Numbers) -> tuple[Strided, None]:
    """Return sums of streamed chunks, and no partial sums: `_add_up` makes them."""
    strips = call.of_strips(3)
    call.launch(density_sums, call.programs, call.inputs, parameters, numbers, strips)
    return merge_sums(call, strips, 3), None


def _add_up(call: Call, sums: Strided) -> Strided:
    """Return partials out of sums of chunks whose parameters do not vary along them."""
    # (2, …, heads, …) of Σ he and Σ he·e -> (2, heads, 1, P), as one program would leave them
    axis, feature_axis, chunks = call.axis, call.feature_axis, sums.data[:2]
    kept = (0, axis + 1, 0 if feature_axis is None else feature_axis + 1)
    others = [d for d in range(chunks.dim()) if d not in kept]
    totals = chunks.sum(others, dtype=torch.float64) if others else chunks  # sum([]) would sum everything
    if feature_axis is None:
        totals = totals.unsqueeze(-1)
    elif feature_axis < axis:
        totals = totals.transpose(1, 2)
    return strided_of(totals.unsqueeze(2).contiguous())


KERNELS = passes.Kernels(
    DENSITY,
    gaussians=lambda _n_params: 1,
    n_sums=lambda _n_params: 2,
    n_entry_sums=2,
    sum_strides=lambda stride: (stride, 1),
    collect=lambda call, p, q, _axis, eps: (Parameters(strided_of(p), strided_of(q)), split_float(eps)),
    find_numbers=lambda call, _parameters, eps: Numbers(find_stats(call, eps)),
    sum_chunks=_sum_chunks,
    finish=finish_gradients,
    forward=density_forward,
    backward=density_backward,
    prepare=load_gaussian,
    open_chunk=open_chunk,
    weigh_chunk=weigh_chunk,
    differentiate=differentiate_tile,
    add_up=_add_up,
)
forward, backward = partial(passes.forward, KERNELS), partial(passes.backward, KERNELS)
