"""The density gate (the JEPA tokenizer, arXiv 2512.07168), forward and backward.

Over one chunk of length n, with d = x - mean, var biased and centred, std = sqrt(max(var, 1e-6)) and for each of K
Gaussians sigma_k = softplus(log_sigma_k) + 1e-3, width_k = std·sigma_k + 1e-8, z_k = (d - mean_offset_k)/width_k:

    N_k = exp(-z_k²/2)/(sqrt(2π)·sigma_k·K)      weights = Σ_k N_k      y = x·weights (+ x)

    t_k = (grad_y·x + grad_weights)·N_k      q_k = -t_k·z_k/width_k      q = Σ_k q_k
    dx = grad_y·weights + q - Σ q/n - [var >= 1e-6]·(d/std)·Σ Σ_k q_k·z_k·sigma_k/n (+ grad_y)
    d_mean_offset_k = -Σ q_k      d_log_sigma_k = -(Σ q_k·z_k·std + Σ t_k/sigma_k)·sigmoid(log_sigma_k)

A chunk that fits on chip is read once. A longer one is streamed (`streamed.py`): its statistics, in the backward pass
its sums, then outputs, each a walk over its strips; var takes the place of 1/(var + eps) among its numbers.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from . import passes
from .algorithms import GATE
from .blocks import add_blocks, centre, differentiate_weights, where_nonempty
from .gate_blocks import (
    Gaussians,
    Parameters,
    Scales,
    add_tile_products,
    differentiate_x,
    find_q,
    find_std,
    load_gaussians,
    scale_gaussians,
    sum_chunks,
    weigh,
)
from .host import Backward, Call, Numbers
from .operands import Strided
from .params import add_lists, store_partials, sum_partials, zero_blocks
from .streamed import find_stats, merge_sums, store_strip_numbers
from .tile import (
    columns_inside,
    load_blocks,
    load_gradients,
    load_numbers,
    locate,
    next_tile,
    place_tile,
    start_walk,
    store_dx,
    store_outputs,
    view_of,
)


class Chunk(NamedTuple):
    """Hold what the tiles of a streamed chunk share."""

    scales: Scales
    gaussians: Gaussians


class ChunkSums(NamedTuple):
    """Hold what dx takes from the sums over a streamed chunk: dx = grad_y·weights + q - (common + slope·d)."""

    chunk: Chunk
    common: tl.tensor
    slope: tl.tensor


# --- Chunks on chip -------------------------------------------------------------------------------


@triton.jit
def gate_forward(
    inputs, parameters, outputs, _settings, extent, RESIDUAL: tl.constexpr, K: tl.constexpr, PLAN: tl.constexpr
):
    """Store y and the weights."""
    view = view_of(extent)
    walk = start_walk(view, False)
    gaussians = load_gaussians(parameters, walk.head, None, view, K, PLAN)
    index = walk.index
    for _ in range(walk.first_tile, view.n_tiles, walk.tile_step):
        tile = place_tile(inputs.mask, index, walk.head, walk.strip_row, view, PLAN)
        raw, x = load_blocks(inputs.x, inputs.mask, tile, view, RESIDUAL, PLAN)
        chunk = centre(x, tile, inputs.mask, view, PLAN.ACC)
        variance = where_nonempty(chunk.squares * chunk.inv_count, chunk.inv_count, inputs.mask, 0.0)
        std, _inv_std = find_std(variance)
        scales = scale_gaussians(gaussians, chunk.mean_error, std, K)
        weights, _slopes = weigh(chunk.blocks, scales, gaussians, tile.valid, K)
        store_outputs(outputs, x, raw, weights, tile, view, RESIDUAL, PLAN)
        index = next_tile(index, walk.index_step, view)


@triton.jit
def gate_backward(
    inputs, parameters, dx, partials, _settings, extent, RESIDUAL: tl.constexpr, K: tl.constexpr, PLAN: tl.constexpr
):  # fmt: skip
    """Store dx, and this program's sums of q and q·z·std + t/sigma for every Gaussian."""
    view = view_of(extent)
    walk = start_walk(view, False)
    gaussians = load_gaussians(parameters, walk.head, None, view, K, PLAN)
    totals = zero_blocks(2 * K, 1, 1, PLAN.ACC)
    index = walk.index
    for _ in range(walk.first_tile, view.n_tiles, walk.tile_step):
        tile = place_tile(inputs.mask, index, walk.head, walk.strip_row, view, PLAN)
        _raw, x = load_blocks(inputs.x, inputs.mask, tile, view, False, PLAN)
        chunk = centre(x, tile, inputs.mask, view, PLAN.ACC)
        variance = where_nonempty(chunk.squares * chunk.inv_count, chunk.inv_count, inputs.mask, 0.0)
        std, inv_std = find_std(variance)
        scales = scale_gaussians(gaussians, chunk.mean_error, std, K)
        # what reaches the weights, and its sums over the chunk
        gradients = load_gradients(inputs, tile, view, RESIDUAL, PLAN)
        h = differentiate_weights(gradients, x)
        products = zero_blocks(3 * K, PLAN.BLOCK_P, PLAN.BLOCK_C, PLAN.ACC)
        products = add_tile_products(products, chunk.blocks, h, scales, gaussians, K)
        weights, slopes = weigh(chunk.blocks, scales, gaussians, tile.valid, K)
        q = find_q(h, slopes)
        sum_qzs, more = sum_chunks(products, scales, gaussians, std, columns_inside(tile.position, view), K)
        if dx is not None:
            slope = inv_std * (chunk.inv_count * sum_qzs)
            common = chunk.inv_count * tl.sum(add_blocks(q), 0)[None, :] - slope * chunk.mean_error
            grad = differentiate_x(gradients, chunk.blocks, weights, q, common, slope)
            store_dx(dx, grad, gradients.raw, tile, view, RESIDUAL, PLAN)
        if partials is not None:
            totals = add_lists(totals, more)
        index = next_tile(index, walk.index_step, view)
    if partials is not None:
        store_partials(partials, totals, walk.head)


@triton.jit
def gate_param_gradients(partials, n_groups, log_sigma, d_mean_offsets, d_log_sigma, BLOCK: tl.constexpr):
    """Store the gradients of one Gaussian's parameters: partial sums added in fixed order and fp64."""
    head, k = tl.program_id(1).to(tl.int64), tl.program_id(0)
    offset_gradient = -sum_partials(partials, n_groups, 2 * k, head, BLOCK)
    sigma_gradient = -sum_partials(partials, n_groups, 2 * k + 1, head, BLOCK)
    x = tl.load(log_sigma.data + head * log_sigma.strides[0] + k * log_sigma.strides[1]).to(tl.float64)
    pointer = d_mean_offsets.data + head * d_mean_offsets.strides[0] + k
    tl.store(pointer, offset_gradient.to(d_mean_offsets.data.dtype.element_ty))
    pointer = d_log_sigma.data + head * d_log_sigma.strides[0] + k
    tl.store(pointer, (sigma_gradient / (1.0 + tl.exp(-x))).to(d_log_sigma.data.dtype.element_ty))


# --- Streamed chunks (`streamed.py`) --------------------------------------------------------------


@triton.jit
def open_chunk(gaussians, numbers, head, position, view, K: tl.constexpr, _PLAN: tl.constexpr):
    """Return (mean, chunk) for the forward pass."""
    mean, mean_error, variance = load_numbers(numbers.stats, head, position, view, 3)
    std, _inv_std = find_std(variance)
    return mean, Chunk(scale_gaussians(gaussians, mean_error, std, K), gaussians)


@triton.jit
def weigh_chunk(centred, chunk, valid, K: tl.constexpr):
    """Return the weights of every block."""
    weights, _slopes = weigh(centred, chunk.scales, chunk.gaussians, valid, K)
    return weights


@triton.jit
def gate_sums(inputs, parameters, numbers, strips, partials, extent, K: tl.constexpr, PLAN: tl.constexpr):
    """Store Σ q and Σ Σ_k q_k·z_k·sigma_k of a strip of each chunk of one tile's columns, and the program's totals."""
    view = view_of(extent)
    walk = start_walk(view, True)
    gaussians = load_gaussians(parameters, walk.head, None, view, K, PLAN)
    position = locate(walk.index, walk.head, walk.strip_row, view, PLAN)
    mean, mean_error, variance = load_numbers(numbers.stats, walk.head, position, view, 3)
    std, _inv_std = find_std(variance)
    scales = scale_gaussians(gaussians, mean_error, std, K)
    products = zero_blocks(3 * K, PLAN.BLOCK_P, PLAN.BLOCK_C, PLAN.ACC)
    total_q = tl.zeros([PLAN.BLOCK_P, PLAN.BLOCK_C], PLAN.ACC)
    end = tl.minimum(walk.strip_row + view.strip, view.chunk)
    for row in range(walk.strip_row, end, PLAN.BLOCK_P * PLAN.N_BLOCKS):
        tile = place_tile(inputs.mask, walk.index, walk.head, row, view, PLAN)
        _raw, x = load_blocks(inputs.x, inputs.mask, tile, view, False, PLAN)
        h = differentiate_weights(load_gradients(inputs, tile, view, False, PLAN), x)
        d = [block - mean for block in x]
        _weights, slopes = weigh(d, scales, gaussians, tile.valid, K)
        total_q += add_blocks(find_q(h, slopes))
        products = add_tile_products(products, d, h, scales, gaussians, K)
    sum_qzs, totals = sum_chunks(products, scales, gaussians, std, columns_inside(position, view), K)
    store_strip_numbers(strips, walk, position, view, [tl.sum(total_q, 0)[None, :], sum_qzs])
    if partials is not None:
        store_partials(partials, totals, walk.head)


@triton.jit
def open_sums(gaussians, numbers, head, position, view, K: tl.constexpr, _PLAN: tl.constexpr):
    """Return (mean, chunk) for the backward pass."""
    mean, mean_error, variance, inv_count = load_numbers(numbers.stats, head, position, view, 4)
    sum_q, sum_qzs = load_numbers(numbers.sums, head, position, view, 2)
    std, inv_std = find_std(variance)
    slope = inv_std * (inv_count * sum_qzs)
    chunk = Chunk(scale_gaussians(gaussians, mean_error, std, K), gaussians)
    return mean, ChunkSums(chunk, inv_count * sum_q - slope * mean_error, slope)


@triton.jit
def differentiate_tile(
    x, centred, sums, inputs, tile, view, _padding, RAW: tl.constexpr, K: tl.constexpr, PLAN: tl.constexpr
):  # fmt: skip
    """Return (dx, grad_y as it came) of every block, and nothing for totals."""
    gradients = load_gradients(inputs, tile, view, RAW, PLAN)
    weights, slopes = weigh(centred, sums.chunk.scales, sums.chunk.gaussians, tile.valid, K)
    q = find_q(differentiate_weights(gradients, x), slopes)
    return differentiate_x(gradients, centred, weights, q, sums.common, sums.slope), gradients.raw, [], []


# --- On the host ----------------------------------------------------------------------------------


def _collect(call: Call, mean_offsets: Tensor, log_sigma: Tensor) -> tuple[Parameters, None]:
    """Return the parameters as kernels take them; there are no settings."""
    return Parameters(call.of_heads(mean_offsets), call.of_heads(log_sigma)), None


def _sum_chunks(
    run: Backward, call: Call, parameters: Parameters, _settings: None, numbers: Numbers
) -> tuple[Strided, Strided | None]:  # fmt: skip
    """Return the sums of streamed chunks, and every program's totals for the parameters if these are needed."""
    strips, partials = call.of_strips(2), run.partials(call, 2 * run.n_params, call.programs)
    call.launch(gate_sums, call.programs, call.inputs, parameters, numbers, strips, partials, K=run.n_params)
    return merge_sums(call, strips, 2), partials


def _launch_param_gradients(
    call: Call, partials: Strided, parameters: Parameters, d_mean_offsets: Strided, d_log_sigma: Strided
) -> None:
    """Launch what turns partial sums into gradients of the parameters."""
    args = (partials, parameters.log_sigma, d_mean_offsets, d_log_sigma)
    call.launch_sums(gate_param_gradients, d_log_sigma.data.shape[1], *args, BLOCK=1024)


KERNELS = passes.Kernels(
    GATE,
    _collect,
    constants=lambda n_params: {"K": n_params},
    n_sums=lambda n_params: 2 * n_params,
    find_numbers=lambda call, _parameters, _settings, numbers: find_stats(call, numbers.stats, None),
    sum_chunks=_sum_chunks,
    launch_param_gradients=_launch_param_gradients,
    forward=gate_forward,
    backward=gate_backward,
    prepare=load_gaussians,
    open_chunk=open_chunk,
    weigh_chunk=weigh_chunk,
    open_sums=open_sums,
    differentiate=differentiate_tile,
)
forward, backward = partial(passes.forward, KERNELS), partial(passes.backward, KERNELS)
