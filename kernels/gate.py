"""The density gate (the JEPA tokenizer, arXiv 2512.07168), forward and backward.

Over one chunk of length n, with d = x - mean, var biased and centred, std = sqrt(max(var, 1e-6)) and for each of K
Gaussians sigma_k = softplus(log_sigma_k) + 1e-3, width_k = std·sigma_k + 1e-8, z_k = (d - mean_offset_k)/width_k:

    N_k = exp(-z_k²/2)/(sqrt(2π)·sigma_k·K)      weights = Σ_k N_k      y = x·weights (+ x)

    t_k = (grad_y·x + grad_weights)·N_k      q_k = -t_k·z_k/width_k      Q = Σ_k q_k
    dx = grad_y·weights + Q - Σ Q/n - [var >= 1e-6]·(d/std)·Σ Σ_k q_k·z_k·sigma_k/n (+ grad_y)
    d_mean_offset_k = -Σ q_k      d_log_sigma_k = -(Σ q_k·z_k·std + Σ t_k/sigma_k)·sigmoid(log_sigma_k)

A chunk that fits on chip is read once. A longer one is streamed: `stats.py`, and in the backward pass `_sums`, walk its
strips first, then the same `_forward` and `_backward` take them again.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from daam.kernels import launch
from daam.kernels.passes import Backward, Forward
from daam.kernels.stats import add_strips, find_stats, store_strip
from daam.kernels.tile import (
    added,
    along_chunk,
    at_of,
    columns_inside,
    deviation,
    first_tile,
    gradients,
    less,
    load_numbers,
    next_tile,
    of_weights,
    only,
    read_tile,
    store_partials,
    sum_partials,
    sum_to_one,
    write_dx,
    write_outputs,
)

# --- Kernels ------------------------------------------------------------------------------------
# x, mask, y, … are `layout.Strided` or None, extent is `layout.Extent`. The statistics of streamed chunks are mean,
# rest, var and 1/n.


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
def _std(variance):
    """std, and 1/std where the variance is above its floor, 0 below."""
    floor = tl.full([1, 1], 1e-6, variance.dtype)  # tl.maximum takes a plain literal as fp32 (Triton 3.6)
    floored = tl.maximum(variance, floor, propagate_nan=tl.PropagateNan.ALL)
    inverse = tl.rsqrt(floored)
    return floored * inverse, tl.where(variance >= floor, inverse, 0.0)


@triton.jit
def _of_columns(gaussians, rest, std, K: tl.constexpr):
    """Of every Gaussian a and b, so that sqrt(log2(e)/2)·z = a·d - b, x - mean being d - rest."""
    factors = ()
    for k in tl.static_range(K):
        root = tl.rsqrt(std * gaussians[k][1] + 1e-8)  # squared, 1/width: a division takes eight instructions
        narrow = 0.8493218002880191 * (root * root)
        factors = factors + ((narrow, (rest + gaussians[k][0]) * narrow),)
    return factors


@triton.jit
def _part(d, factors, gaussian):
    """z as scaled by `_of_columns`, and N, of one block and one Gaussian."""
    z = factors[0] * d - factors[1]
    return z, tl.exp2(gaussian[2] - z * z)


@triton.jit
def _weights(d, factors, gaussians, valid, K: tl.constexpr):
    """Weights of every block, and Σ_k N_k·z_k/width_k as scaled by `_of_columns`."""
    weights, slopes = (), ()
    for i in tl.static_range(len(d)):
        z, w = _part(d[i], factors[0], gaussians[0])
        slope = w * z * factors[0][0]
        for k in tl.static_range(1, K):
            z, part = _part(d[i], factors[k], gaussians[k])
            w += part
            slope += part * z * factors[k][0]
        weights, slopes = weights + (w,), slopes + (slope,)
    return only(valid, weights), slopes


@triton.jit
def _qs(h, slopes):
    """Q of every block. 1/0.8493218002880191² is 1.3862943611198906."""
    q = ()
    for i in tl.static_range(len(h)):
        q = q + (-1.3862943611198906 * h[i] * slopes[i],)
    return q


@triton.jit
def _forward(
    x, mean_offsets, log_sigma, mask, stats, y, weights, extent,
    RESIDUAL: tl.constexpr, ACC: tl.constexpr, INDEX: tl.constexpr, K: tl.constexpr,
    BLOCK_CHUNK: tl.constexpr, BLOCK_INNER: tl.constexpr, PARTS: tl.constexpr, RAGGED: tl.constexpr,
):  # fmt: skip
    head, start, first, step, spot, apart = first_tile(extent, stats is not None)
    gaussians = _gaussians(mean_offsets, log_sigma, head, K, ACC)
    for _tile in range(first, extent.tiles, step):
        if stats is None:
            at, inside, valid, raw, xv = read_tile(
                x, mask, spot, head, start, extent, RESIDUAL, ACC, INDEX, BLOCK_CHUNK, BLOCK_INNER, PARTS, RAGGED
            )
            d, rest, variance, _share = deviation(xv, valid, mask, None, extent, None, False, ACC)
            std, _slope = _std(variance)
            w, _slopes = _weights(d, _of_columns(gaussians, rest, std, K), gaussians, valid, K)
            write_outputs(y, weights, xv, raw, w, None, extent, at, inside, RESIDUAL)
        else:
            own = at_of(spot, head, start, extent, INDEX, BLOCK_CHUNK, BLOCK_INNER)
            mean, rest, variance = load_numbers(stats, extent, own, head, 3)
            std, _slope = _std(variance)
            factors = _of_columns(gaussians, rest, std, K)
            for row in range(start, tl.minimum(start + extent.strip, extent.chunk), BLOCK_CHUNK * PARTS):
                at, inside, valid, raw, xv = read_tile(
                    x, mask, spot, head, row, extent, RESIDUAL, ACC, INDEX, BLOCK_CHUNK, BLOCK_INNER, PARTS, RAGGED
                )
                w, _slopes = _weights(less(xv, mean), factors, gaussians, valid, K)
                write_outputs(y, weights, xv, raw, w, None, extent, at, inside, RESIDUAL)
        spot = next_tile(spot, apart, extent)


@triton.jit
def _zeros(ACC: tl.constexpr, BLOCK_CHUNK: tl.constexpr, BLOCK_INNER: tl.constexpr, COUNT: tl.constexpr):
    zeros = ()
    for _ in tl.static_range(COUNT):
        zeros = zeros + (tl.zeros([BLOCK_CHUNK, BLOCK_INNER], ACC),)
    return zeros


@triton.jit
def _add_products(sums, d, h, factors, gaussians, K: tl.constexpr):
    """Σ t·z, Σ t·z² and Σ t of every Gaussian, z as scaled, with those of one more tile: of every place in a block by
    itself.
    """
    more = ()
    for k in tl.static_range(K):
        tz, tzz, all_t = sums[3 * k], sums[3 * k + 1], sums[3 * k + 2]
        for i in tl.static_range(len(d)):
            z, part = _part(d[i], factors[k], gaussians[k])
            t = h[i] * part
            tz += t * z
            tzz += t * z * z
            all_t += t
        more = more + (tz, tzz, all_t)
    return more


@triton.jit
def _chunk_sums(sums, factors, gaussians, std, ok, K: tl.constexpr):
    """Σ Σ_k q_k·z_k·sigma_k of each column, and what its tile adds to every Gaussian's Σ q and
    Σ (q·z·std + t/sigma), [1, 1] each.
    """
    sum_qzs = tl.zeros_like(std)
    totals = ()
    for k in tl.static_range(K):
        sigma = gaussians[k][1]
        # of z as it is: 1/0.8493218002880191 is 1.1774100225154747, and its square 1.3862943611198906
        of_q = -1.3862943611198906 * along_chunk(sums[3 * k]) * factors[k][0]
        of_qz = -1.3862943611198906 * 1.1774100225154747 * along_chunk(sums[3 * k + 1]) * factors[k][0]
        sum_qzs += of_qz * sigma
        of_sigma = of_qz * std + along_chunk(sums[3 * k + 2]) / sigma
        totals = totals + (sum_to_one(tl.where(ok, of_q, 0.0)), sum_to_one(tl.where(ok, of_sigma, 0.0)))
    return sum_qzs, totals


@triton.jit
def _gradient(gradient, d, w, q, common, slope):
    """dx of every block. The mean of Q, in common, is that of the same numbers: where all are alike nothing is left."""
    grad = ()
    for i in tl.static_range(len(d)):
        grad = grad + (gradient[1][i] * w[i] + (q[i] - (common + slope * d[i])),)
    return grad


@triton.jit
def _sums(
    x, grad_y, grad_weights, mean_offsets, log_sigma, mask, stats, sums, partials, extent,
    ACC: tl.constexpr, INDEX: tl.constexpr, K: tl.constexpr,
    BLOCK_CHUNK: tl.constexpr, BLOCK_INNER: tl.constexpr, PARTS: tl.constexpr, RAGGED: tl.constexpr,
):  # fmt: skip
    """Σ Q and Σ Σ_k q_k·z_k·sigma_k of every chunk's strip of one tile's columns."""
    head, start, _first, _step, spot, _apart = first_tile(extent, True)
    gaussians = _gaussians(mean_offsets, log_sigma, head, K, ACC)
    own = at_of(spot, head, start, extent, INDEX, BLOCK_CHUNK, BLOCK_INNER)
    mean, rest, variance = load_numbers(stats, extent, own, head, 3)
    std, _slope = _std(variance)
    factors = _of_columns(gaussians, rest, std, K)
    products = _zeros(ACC, BLOCK_CHUNK, BLOCK_INNER, 3 * K)
    all_q = tl.zeros([BLOCK_CHUNK, BLOCK_INNER], ACC)
    for row in range(start, tl.minimum(start + extent.strip, extent.chunk), BLOCK_CHUNK * PARTS):
        at, inside, valid, _raw, xv = read_tile(
            x, mask, spot, head, row, extent, False, ACC, INDEX, BLOCK_CHUNK, BLOCK_INNER, PARTS, RAGGED
        )
        h = of_weights(gradients(grad_y, grad_weights, mask, extent, at, inside, valid, False, ACC), xv, None)
        d = less(xv, mean)
        _w, slopes = _weights(d, factors, gaussians, valid, K)
        all_q += added(_qs(h, slopes))
        products = _add_products(products, d, h, factors, gaussians, K)
    sum_qzs, totals = _chunk_sums(products, factors, gaussians, std, columns_inside(extent, own), K)
    store_strip(sums, extent, own, head, start, (along_chunk(all_q), sum_qzs))
    if partials is not None:
        store_partials(partials, totals, head)


@triton.jit
def _backward(
    x, grad_y, grad_weights, mean_offsets, log_sigma, mask, stats, sums, dx, partials, extent,
    RESIDUAL: tl.constexpr, ACC: tl.constexpr, INDEX: tl.constexpr, K: tl.constexpr,
    BLOCK_CHUNK: tl.constexpr, BLOCK_INNER: tl.constexpr, PARTS: tl.constexpr, RAGGED: tl.constexpr,
):  # fmt: skip
    head, start, first, step, spot, apart = first_tile(extent, stats is not None)
    gaussians = _gaussians(mean_offsets, log_sigma, head, K, ACC)
    totals = _zeros(ACC, 1, 1, 2 * K)
    for _tile in range(first, extent.tiles, step):
        if stats is None:
            at, inside, valid, _raw, xv = read_tile(
                x, mask, spot, head, start, extent, False, ACC, INDEX, BLOCK_CHUNK, BLOCK_INNER, PARTS, RAGGED
            )
            d, rest, variance, share = deviation(xv, valid, mask, None, extent, None, False, ACC)
            std, slope = _std(variance)
            factors = _of_columns(gaussians, rest, std, K)
            gradient = gradients(grad_y, grad_weights, mask, extent, at, inside, valid, RESIDUAL, ACC)
            h = of_weights(gradient, xv, None)
            products = _zeros(ACC, BLOCK_CHUNK, BLOCK_INNER, 3 * K)
            products = _add_products(products, d, h, factors, gaussians, K)
            w, slopes = _weights(d, factors, gaussians, valid, K)
            q = _qs(h, slopes)
            sum_qzs, more = _chunk_sums(products, factors, gaussians, std, columns_inside(extent, at), K)
            if dx is not None:
                slope *= share * sum_qzs
                common = share * along_chunk(added(q)) - slope * rest
                write_dx(
                    dx, _gradient(gradient, d, w, q, common, slope), gradient[0], extent, at, inside, valid, RESIDUAL
                )
            if partials is not None:
                both = ()
                for i in tl.static_range(2 * K):
                    both = both + (totals[i] + more[i],)
                totals = both
        else:
            own = at_of(spot, head, start, extent, INDEX, BLOCK_CHUNK, BLOCK_INNER)
            mean, rest, variance, share = load_numbers(stats, extent, own, head, 4)
            sum_q, sum_qzs = load_numbers(sums, extent, own, head, 2)
            std, slope = _std(variance)
            factors = _of_columns(gaussians, rest, std, K)
            slope *= share * sum_qzs
            common = share * sum_q - slope * rest
            for row in range(start, tl.minimum(start + extent.strip, extent.chunk), BLOCK_CHUNK * PARTS):
                at, inside, valid, _raw, xv = read_tile(
                    x, mask, spot, head, row, extent, False, ACC, INDEX, BLOCK_CHUNK, BLOCK_INNER, PARTS, RAGGED
                )
                gradient = gradients(grad_y, grad_weights, mask, extent, at, inside, valid, RESIDUAL, ACC)
                d = less(xv, mean)
                w, slopes = _weights(d, factors, gaussians, valid, K)
                q = _qs(of_weights(gradient, xv, None), slopes)
                grad = _gradient(gradient, d, w, q, common, slope)
                write_dx(dx, grad, gradient[0], extent, at, inside, valid, RESIDUAL)
        spot = next_tile(spot, apart, extent)
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
        sums, partials, groups = None, None, call.programs
        if call.streamed:
            strips, partials = call.of_strips(2), run.partials(call, 2 * gaussians, groups)
            call.launch(_sums, groups, *inputs, strips, partials, K=gaussians)
            sums = add_strips(call, strips, 2)
        elif need_params:
            groups = call.programs_of_sums(2 * gaussians)
            partials = run.partials(call, 2 * gaussians, groups)
        if need_x or not call.streamed:
            programs, of_backward = (call.programs, None) if call.streamed else (groups, partials)
            call.launch(_backward, programs, *inputs, sums, of.dx, of_backward, RESIDUAL=residual, K=gaussians)
        if need_params:
            call.launch_sums(_chain, gaussians, partials, groups, params[1], *map(call.of_heads, grads), BLOCK=1024)
    return run.dx, *grads
