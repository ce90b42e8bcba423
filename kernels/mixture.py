"""Mixture of densities (arXiv 2401.11143, Algorithm 2, as gaussian-adaptive-attention 0.1.5 has it), both passes.

A head's product of Gaussians is one Gaussian, whose numbers are made in the prologue of every program:

    a = Σ 1/c_k²      m = Σ (o_k/c_k²)/a      v = Σ ((o_k - m)²/c_k²)/a      l = Σ log(sqrt(2π)·|c_k|)

Over one chunk of length n, with d = x - mean, e = d - m and inv_var = 1/(var + eps), var unbiased and centred:

    log g = -(a·inv_var/2)·(e² + v) - l      weights = exp(log g - max(log Σ g, log eps))      y = x·weights (+ x)

    h = (grad_y·x + grad_weights)·weights      free = [log Σ g >= log eps]
    k = h - free·weights·Σ h                   clamped = (1 - free)·Σ h
    dx = grad_y·weights - a·inv_var·(k·e - Σ k·e/n - d·inv_var·(Σ k·e² + clamped·v)/(n - 1)) (+ grad_y)

and per head, summed over all chunks, δ_k being o_k - m:

    ke = Σ inv_var·Σ k·e      kee = Σ inv_var·(Σ k·e² + clamped·v)      cr = Σ inv_var·clamped      cl = Σ clamped
    d_mean_offset_k = (ke - δ_k·cr)/c_k²      d_c_k = (kee - 2δ_k·ke + (δ_k² - v)·cr)/c_k³ - cl/c_k

e² is taken as s + (m - p)², s = (d - p)·(d - q), q = 2m - p, where the origin p is m or, if that is further off, four
standard deviations: so far out, e² would round away what tells the positions apart. Positions that hold the padding
value count as zeros in mean and variance, so dx has neither sum there, and pass x through.

A chunk that fits on chip is read once. A longer one is streamed (`streamed.py`): its statistics, then the least s and
the sum of weights relative to it, in the backward pass its sums, then outputs, each a walk over its strips.
"""

from __future__ import annotations

import math
import struct
from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import mixture_streamed, passes
from .algorithms import MIXTURE
from .blocks import add_products, inverse_count_less_one
from .host import Call
from .mixture_blocks import (
    Parameters,
    Settings,
    Sums,
    centre_unpadded,
    differentiate_padded,
    differentiate_x,
    find_excess,
    find_frame,
    load_gaussian,
    load_moments,
    measure,
    sum_head,
    weigh,
)
from .operands import Split, Strided, power_of_2, split_float
from .params import add_lists, store_partials, sum_partials, zero_blocks
from .tile import (
    columns_inside,
    load_blocks,
    load_gradients,
    next_tile,
    place_tile,
    start_walk,
    store_dx,
    store_outputs,
    store_padded_outputs,
    view_of,
)


@triton.jit
def mixture_forward(
    inputs, parameters, outputs, settings, extent, RESIDUAL: tl.constexpr, K: tl.constexpr, PLAN: tl.constexpr
):  # fmt: skip
    """Store y and the weights."""
    view = view_of(extent)
    walk = start_walk(view, False)
    gaussian = load_gaussian(parameters, walk.head, None, view, K, PLAN)
    index = walk.index
    for _ in range(walk.first_tile, view.n_tiles, walk.tile_step):
        tile = place_tile(inputs.mask, index, walk.head, walk.strip_row, view, PLAN)
        raw, x = load_blocks(inputs.x, inputs.mask, tile, view, RESIDUAL, PLAN)
        d, chunk, inv_var = centre_unpadded(x, tile, inputs.mask, settings, view, PLAN.ACC)
        frame = find_frame(gaussian, inv_var)
        _f, s = measure(d, chunk.mean_error, gaussian, frame, tile.valid)
        weights, _gaps, _min_s, _free = weigh(
            s, frame, gaussian, settings.log2_eps, tile.valid, chunk.inv_count, inputs.mask
        )  # fmt: skip
        if settings.padding is None:
            store_outputs(outputs, x, raw, weights, tile, view, RESIDUAL, PLAN)
        else:
            store_padded_outputs(outputs, x, raw, weights, settings.padding, tile, view, RESIDUAL, PLAN)
        index = next_tile(index, walk.index_step, view)


@triton.jit
def mixture_backward(
    inputs, parameters, dx, partials, settings, extent, RESIDUAL: tl.constexpr, K: tl.constexpr, PLAN: tl.constexpr
):  # fmt: skip
    """Store dx, and this program's sums ke, kee, cr and cl."""
    view = view_of(extent)
    walk = start_walk(view, False)
    gaussian = load_gaussian(parameters, walk.head, None, view, K, PLAN)
    totals = zero_blocks(4, 1, 1, PLAN.ACC)
    index = walk.index
    for _ in range(walk.first_tile, view.n_tiles, walk.tile_step):
        # the forward pass again
        tile = place_tile(inputs.mask, index, walk.head, walk.strip_row, view, PLAN)
        _raw, x = load_blocks(inputs.x, inputs.mask, tile, view, False, PLAN)
        d, chunk, inv_var = centre_unpadded(x, tile, inputs.mask, settings, view, PLAN.ACC)
        frame, inv_count = find_frame(gaussian, inv_var), chunk.inv_count
        f, s = measure(d, chunk.mean_error, gaussian, frame, tile.valid)
        weights, gaps, min_s, free = weigh(s, frame, gaussian, settings.log2_eps, tile.valid, inv_count, inputs.mask)
        # what reaches the weights, and its sums over the chunk
        gradients = load_gradients(inputs, tile, view, RESIDUAL, PLAN)
        h = differentiate_padded(gradients, x, settings.padding)
        sum_h = tl.sum(add_products(h, weights), 0)[None, :]
        free_h, clamped = free * sum_h, (1.0 - free) * sum_h
        k = find_excess(h, weights, free_h)
        ke = tl.sum(add_products(k, f), 0)[None, :] + clamped * (frame.origin - gaussian.m)
        kee = clamped * (min_s + frame.offset_cost) - tl.sum(add_products(k, gaps), 0)[None, :]
        if dx is not None:
            sums = Sums(free_h, ke * inv_count, kee * inv_var * inverse_count_less_one(inv_count))
            grad = differentiate_x(
                gradients, x, d, chunk.mean_error, h, k, weights, sums, gaussian, inv_var, settings.padding
            )  # fmt: skip
            store_dx(dx, grad, gradients.raw, tile, view, RESIDUAL, PLAN)
        if partials is not None:
            more = sum_head(ke, kee, clamped, inv_var, columns_inside(tile.position, view) & (inv_count > 0))
            totals = add_lists(totals, more)
        index = next_tile(index, walk.index_step, view)
    if partials is not None:
        store_partials(partials, totals, walk.head)


@triton.jit
def mixture_param_gradients(
    partials, n_groups, parameters, d_mean_offsets, d_c, K: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """Store the gradients of one head's parameters: partial sums added in fixed order and fp64; 1/c³ overflows fp32."""
    head, ks = tl.program_id(1).to(tl.int64), tl.arange(0, K)
    mean_offsets, c = parameters.mean_offsets, parameters.c
    ke, kee = sum_partials(partials, n_groups, 0, head, BLOCK), sum_partials(partials, n_groups, 1, head, BLOCK)
    cr, cl = sum_partials(partials, n_groups, 2, head, BLOCK), sum_partials(partials, n_groups, 3, head, BLOCK)
    _scale, inside, _a, m, v = load_moments(parameters, head, K, tl.float64)
    offset = tl.load(mean_offsets.data + head * mean_offsets.strides[0] + ks * mean_offsets.strides[1], inside, 0.0)
    scale = tl.load(c.data + head * c.strides[0] + ks * c.strides[1], inside, 1.0).to(tl.float64)
    offset = offset.to(tl.float64) - m
    offset_gradient = (ke - offset * cr) / scale / scale
    c_gradient = (kee - 2.0 * offset * ke + (offset * offset - v) * cr) / scale / scale / scale - cl / scale
    pointers = d_mean_offsets.data + head * d_mean_offsets.strides[0] + ks
    tl.store(pointers, offset_gradient.to(d_mean_offsets.data.dtype.element_ty), inside)
    pointers = d_c.data + head * d_c.strides[0] + ks
    tl.store(pointers, c_gradient.to(d_c.data.dtype.element_ty), inside)


# --- On the host ----------------------------------------------------------------------------------


def _collect(
    call: Call, mean_offsets: Tensor, c: Tensor, eps: float, padding: float | None
) -> tuple[Parameters, Settings]:  # fmt: skip
    """Return the parameters and the settings as kernels take them."""
    log2_eps = split_float(math.log2(eps)) if eps > 0 else Split(-math.inf, 0.0)
    bits = None if padding is None else _find_bits(padding, call.inputs.x.data.dtype)
    parameters = Parameters(call.of_heads(mean_offsets), call.of_heads(c), c.shape[1])
    return parameters, Settings(bits, split_float(eps), log2_eps)


def _find_bits(padding: float, dtype: torch.dtype) -> int:
    """Return the padding value, rounded to x's dtype, as the bits of an fp64 number."""
    (bits,) = struct.unpack("<q", struct.pack("<d", torch.tensor(padding, dtype=dtype).item()))
    return bits


def _launch_param_gradients(
    call: Call, partials: Strided, parameters: Parameters, d_mean_offsets: Strided, d_c: Strided
) -> None:
    """Launch what turns partial sums into gradients of the parameters."""
    args = (partials, parameters, d_mean_offsets, d_c)
    call.launch_sums(mixture_param_gradients, 1, *args, K=power_of_2(parameters.n), BLOCK=1024)


KERNELS = passes.Kernels(
    MIXTURE,
    _collect,
    constants=lambda n_params: {"K": power_of_2(n_params)},
    n_sums=lambda _n_params: 4,
    find_numbers=mixture_streamed.find_numbers,
    sum_chunks=mixture_streamed.sum_chunks,
    launch_param_gradients=_launch_param_gradients,
    forward=mixture_forward,
    backward=mixture_backward,
    prepare=load_gaussian,
    open_chunk=mixture_streamed.open_chunk,
    weigh_chunk=mixture_streamed.weigh_chunk,
    open_sums=mixture_streamed.open_sums,
    differentiate=mixture_streamed.differentiate_tile,
)
forward, backward = partial(passes.forward, KERNELS), partial(passes.backward, KERNELS)
