"""The density gate (the JEPA tokenizer, arXiv 2512.07168), forward and backward.

Over one chunk of length n, with d = x - mean, var biased and centred, std = sqrt(max(var, 1e-6)) and for each of K
Gaussians sigma_k = softplus(log_sigma_k) + 1e-3, width_k = std·sigma_k + 1e-8, z_k = (d - mean_offset_k)/width_k:

    N_k = exp(-z_k²/2)/(sqrt(2π)·sigma_k·K)      weights = Σ_k N_k      y = x·weights (+ x)

    t_k = (grad_y·x + grad_weights)·N_k      q_k = -t_k·z_k/width_k      Q = Σ_k q_k
    dx = grad_y·weights + Q - Σ Q/n - [var >= 1e-6]·(d/std)·Σ Σ_k q_k·z_k·sigma_k/n (+ grad_y)
    d_mean_offset_k = -Σ q_k      d_log_sigma_k = -(Σ q_k·z_k·std + Σ t_k/sigma_k)·sigmoid(log_sigma_k)

A chunk that fits on chip is read once. A longer one is streamed: `stats.py`, and in the backward pass `_sums`, walk it
first, then the same `_forward` and `_backward` take its blocks one by one.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from daam.kernels import launch
from daam.kernels.passes import Backward, Forward
from daam.kernels.stats import find_stats
from daam.kernels.tile import (
    at_of,
    chunk_numbers,
    deviation,
    first_tile,
    gradients,
    read_tile,
    store_partials,
    sum_partials,
    sum_to_one,
    write_dx,
    write_outputs,
)

# --- Kernels ------------------------------------------------------------------------------------
# x, mask, y, … are `layout.Strided` or None, extent is `call.Extent`. The statistics of streamed chunks are mean, rest,
# var and 1/n.


@triton.jit
def _softplus(x):
    """log(1 + exp(x)), x beyond 20. log(1 + t) loses t against 1: log(u)·t/(u - 1), u = 1 + t as rounded, does not."""
    t = tl.exp(tl.minimum(x, 20.0))
    u = 1.0 + t
    return tl.where(x > 20, x, tl.where(u == 1, t, tl.log(u) * (t / tl.where(u == 1, 1.0, u - 1.0))))


@triton.jit
def _gaussians(mean_offsets, log_sigma, head, K: tl.constexpr, ACC: tl.constexpr):
    """mean_offset, sigma and log2 of 1/(sqrt(2π)·sigma·K) of every Gaussian of a head, [1, 1] each."""
    gaussians = ()
    for k in tl.static_range(K):
        one = tl.zeros([1, 1], tl.int32) + k
        offset = tl.load(mean_offsets.data + head * mean_offsets.strides[0] + one * mean_offsets.strides[1]).to(ACC)
        sigma = tl.load(log_sigma.data + head * log_sigma.strides[0] + one * log_sigma.strides[1]).to(ACC)
        sigma = _softplus(sigma) + 1e-3
        gaussians = gaussians + ((offset, sigma, -1.3257480647361593 - tl.log2(sigma * K)),)
    return gaussians


@triton.jit
def _part(d, gaussian, std):
    """z, its factor 1/width, and N of one Gaussian."""
    offset, sigma, log = gaussian
    narrow = 1.0 / (std * sigma + 1e-8)
    z = (d - offset) * narrow
    return z, narrow, tl.exp2(log - z * z * 0.7213475204444817)


@triton.jit
def _deviation(x, valid, mask, stats, extent, at, head, ACC: tl.constexpr):
    """x - mean, std, 1/std where the variance is above its floor and 0 below, and 1/n."""
    d, variance, share = deviation(x, valid, mask, None, stats, extent, at, head, None, False, ACC)
    std = tl.sqrt(tl.maximum(variance, 1e-6))
    return d, std, tl.where(variance >= 1e-6, 1.0 / std, 0.0), share


@triton.jit
def _forward(
    x, mean_offsets, log_sigma, mask, stats, y, weights, extent,
    RESIDUAL: tl.constexpr, ACC: tl.constexpr, INDEX: tl.constexpr, K: tl.constexpr,
    BLOCK_CHUNK: tl.constexpr, BLOCK_INNER: tl.constexpr,
):  # fmt: skip
    head, first, step, row = first_tile(extent, BLOCK_CHUNK)
    gaussians = _gaussians(mean_offsets, log_sigma, head, K, ACC)
    for tile in range(first, extent.tiles, step):
        at, inside, valid, raw, xv = read_tile(x, mask, tile, head, row, extent, ACC, INDEX, BLOCK_CHUNK, BLOCK_INNER)
        d, std, _slope, _share = _deviation(xv, valid, mask, stats, extent, at, head, ACC)
        w = tl.zeros([BLOCK_CHUNK, BLOCK_INNER], ACC)
        for k in tl.static_range(K):
            _z, _narrow, part = _part(d, gaussians[k], std)
            w += part
        w = tl.where(valid, w, 0.0)
        write_outputs(y, weights, xv, raw, w, None, extent, at, inside, RESIDUAL)


@triton.jit
def _products(d, h, raw, std, gaussians, totals, K: tl.constexpr, TOTALS: tl.constexpr):
    """grad_y·weights + Q, and over each column Σ Q and Σ Σ_k q_k·z_k·sigma_k; with TOTALS each Gaussian's Σ q and
    Σ (q·z·std + t/sigma), added to totals.
    """
    grad = tl.zeros_like(d)
    sum_q = tl.zeros_like(std)
    sum_qzs = sum_q
    new = ()
    for k in tl.static_range(K):
        z, narrow, part = _part(d, gaussians[k], std)
        sigma = gaussians[k][1]
        t = h * part
        q = -t * z * narrow
        grad += raw * part + q
        each_q, each_qz = tl.sum(q, 0)[None, :], tl.sum(q * z, 0)[None, :]
        sum_q += each_q
        sum_qzs += each_qz * sigma
        if TOTALS:
            of_sigma = each_qz * std + tl.sum(t, 0)[None, :] / sigma
            new = new + (totals[2 * k] + sum_to_one(each_q), totals[2 * k + 1] + sum_to_one(of_sigma))
    return grad, sum_q, sum_qzs, new


@triton.jit
def _zeros(count: tl.constexpr, ACC: tl.constexpr):
    zeros = ()
    for _ in tl.static_range(count):
        zeros = zeros + (tl.zeros([1, 1], ACC),)
    return zeros


@triton.jit
def _sums(
    x, grad_y, grad_weights, mean_offsets, log_sigma, mask, stats, sums, partials, extent,
    ACC: tl.constexpr, INDEX: tl.constexpr, K: tl.constexpr, BLOCK_CHUNK: tl.constexpr, BLOCK_INNER: tl.constexpr,
):  # fmt: skip
    """Σ Q/n and [var >= 1e-6]·Σ Σ_k q_k·z_k·sigma_k/(std·n) of every chunk of one tile's columns."""
    head, tile = tl.program_id(1).to(tl.int64), tl.program_id(0)
    gaussians = _gaussians(mean_offsets, log_sigma, head, K, ACC)
    sum_q = tl.zeros([1, BLOCK_INNER], ACC)
    sum_qzs = sum_q
    totals = _zeros(2 * K, ACC)
    for row in range(0, extent.chunk, BLOCK_CHUNK):
        at, inside, valid, _raw, xv = read_tile(x, mask, tile, head, row, extent, ACC, INDEX, BLOCK_CHUNK, BLOCK_INNER)
        d, std, _slope, _share = _deviation(xv, valid, mask, stats, extent, at, head, ACC)
        h, raw = gradients(xv, grad_y, grad_weights, None, extent, at, inside, valid, ACC)
        _grad, q, qzs, added = _products(d, h, raw, std, gaussians, totals, K, partials is not None)
        sum_q += q
        sum_qzs += qzs
        if partials is not None:
            totals = added
    at = at_of(tile, head, 0, extent, INDEX, BLOCK_CHUNK, BLOCK_INNER)
    at_mean, step, ok = chunk_numbers(stats, extent, at, head)
    variance, share = tl.load(at_mean + 2 * step, ok, 0.0), tl.load(at_mean + 3 * step, ok, 0.0)
    slope = tl.where(variance >= 1e-6, share / tl.sqrt(tl.maximum(variance, 1e-6)), 0.0)
    at_q, step, ok = chunk_numbers(sums, extent, at, head)
    tl.store(at_q, sum_q * share, ok)
    tl.store(at_q + step, sum_qzs * slope, ok)
    if partials is not None:
        store_partials(partials, totals, head)


@triton.jit
def _backward(
    x, grad_y, grad_weights, mean_offsets, log_sigma, mask, stats, sums, dx, partials, extent,
    RESIDUAL: tl.constexpr, ACC: tl.constexpr, INDEX: tl.constexpr, K: tl.constexpr,
    BLOCK_CHUNK: tl.constexpr, BLOCK_INNER: tl.constexpr,
):  # fmt: skip
    head, first, step, row = first_tile(extent, BLOCK_CHUNK)
    gaussians = _gaussians(mean_offsets, log_sigma, head, K, ACC)
    totals = _zeros(2 * K, ACC)
    for tile in range(first, extent.tiles, step):
        at, inside, valid, _raw, xv = read_tile(x, mask, tile, head, row, extent, ACC, INDEX, BLOCK_CHUNK, BLOCK_INNER)
        d, std, slope, share = _deviation(xv, valid, mask, stats, extent, at, head, ACC)
        h, raw = gradients(xv, grad_y, grad_weights, None, extent, at, inside, valid, ACC)
        grad, q, qzs, added = _products(d, h, raw, std, gaussians, totals, K, partials is not None)
        if partials is not None:
            totals = added
        if dx is not None:
            if sums is None:
                mean_q, slope = q * share, qzs * (share * slope)
            else:
                at_q, far, ok = chunk_numbers(sums, extent, at, head)
                mean_q, slope = tl.load(at_q, ok, 0.0), tl.load(at_q + far, ok, 0.0)
            write_dx(dx, grad - mean_q - d * slope, raw, extent, at, inside, valid, RESIDUAL)
    if partials is not None:
        store_partials(partials, totals, head)


@triton.jit
def _chain(partials, groups, log_sigma, d_mean_offsets, d_log_sigma, BLOCK: tl.constexpr):
    """Gradients of one Gaussian's parameters from the partial sums, in fixed order and fp64."""
    head, k = tl.program_id(1).to(tl.int64), tl.program_id(0)
    of_offset = -sum_partials(partials, groups, 2 * k, head, BLOCK)
    of_sigma = -sum_partials(partials, groups, 2 * k + 1, head, BLOCK)
    x = tl.load(log_sigma.data + head * log_sigma.strides[0] + k * log_sigma.strides[1]).to(tl.float64)
    out = d_mean_offsets.data + head * d_mean_offsets.strides[0] + k
    tl.store(out, of_offset.to(d_mean_offsets.data.dtype.element_ty))
    out = d_log_sigma.data + head * d_log_sigma.strides[0] + k
    tl.store(out, (of_sigma / (1.0 + tl.exp(-x))).to(d_log_sigma.data.dtype.element_ty))


# --- Launchers ----------------------------------------------------------------------------------


def forward(
    x: Tensor, mean_offsets: Tensor, log_sigma: Tensor, mask: Tensor | None, axis: int, residual: bool,
    return_weights: bool, save_stats: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:  # fmt: skip
    """y, weights and statistics, contiguous; None where not asked for, and the statistics of chunks on chip."""
    heads, gaussians = log_sigma.shape
    run = Forward(x, mask, heads, axis, return_weights, tiles=launch.gate_forward(gaussians))
    for call in run.calls():
        of, stats = call.of, call.of_chunks(run.stats)
        if call.streamed:
            find_stats(call, stats, None)
        call.launch(
            _forward, call.programs, of.x, call.of_heads(mean_offsets), call.of_heads(log_sigma), of.mask, stats, of.y,
            of.weights, RESIDUAL=residual, K=gaussians,
        )  # fmt: skip
    return run.outputs(save_stats)


def backward(
    grad_y: Tensor | None, grad_weights: Tensor | None, x: Tensor, mean_offsets: Tensor, log_sigma: Tensor,
    mask: Tensor | None, stats: Tensor | None, axis: int, residual: bool, need_x: bool, need_params: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    """Gradients of x and both parameters, contiguous; None where not needed. stats are recomputed where None."""
    heads, gaussians = log_sigma.shape
    tiles = launch.gate_backward(gaussians)
    run = Backward(x, mask, grad_y, grad_weights, stats, heads, axis, need_x, need_params, tiles=tiles)
    grads = run.param_grads(mean_offsets, log_sigma)
    for call in run.calls():
        of, stats = call.of, call.of_chunks(run.stats)
        if run.lacks_stats:
            find_stats(call, stats, None)
        params = call.of_heads(mean_offsets), call.of_heads(log_sigma)
        inputs = (of.x, of.grad_y, of.grad_weights, *params, of.mask, stats)
        partials, groups = run.launch(
            call, _sums, _backward, inputs, (), sums=2, partials=2 * gaussians, residual=residual, K=gaussians
        )
        if need_params:
            call.launch_sums(_chain, gaussians, partials, groups, params[1], *map(call.of_heads, grads))
    return run.dx, *grads
