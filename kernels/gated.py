"""The density gate with what is around it (the JEPA tokenizer, arXiv 2512.07168), forward and backward.

For x (batch, channels, times), a 1x1 convolution to one channel and the weights of `gate.py` over the times, at every
channel c and time t, with T a strip of times:

    p_t = Σ_c weight_c·x_ct + bias      gate = weights of p      y_ct = x_ct·(1 + alpha·gate_t)

    s_t = Σ_c grad_y_ct·x_ct      d_alpha = Σ s_t·gate_t
    h_t = alpha·s_t + grad_gate_t reaches the gate, whose backward pass makes dp_t and its parameters' gradients of it
    dx_ct = grad_y_ct·(1 + alpha·gate_t) + weight_c·dp_t      d_weight_c = Σ dp_t·x_ct      d_bias = Σ dp_t

Where a mask is False nothing but y = x, and dx = grad_y, sees x. x is moved three times forward and five backward:
`gated_project` reads it, `gated_forward` reads it and writes y; `gated_sums` reads x and grad_y, `gated_backward` both
again and writes dx. p, gate, h and dp are (batch, times), of one channel. Sums go over a program's registers, then over
programs in fixed order and fp64.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import gate, launch
from .blocks import add_blocks
from .gated_blocks import (
    decode,
    find_place,
    first_place,
    load_blocks,
    load_columns,
    load_rows,
    load_valid,
    move_tile,
    open_tile,
    store_blocks,
    store_rows,
)
from .gated_tiles import Call, find_call, new_numbers, strided_like, strided_rows
from .operands import Strided, strided_of
from .params import add_lists, zero_blocks
from .passes import empty_like


# --- One tile -------------------------------------------------------------------------------------
@triton.jit
def add_products(totals, a, b):
    """Return totals + a·b of every block; b may be columns or rows, which blocks share."""
    found = []
    for i in tl.static_range(len(totals)):
        found = found + [totals[i] + a[i] * b[i % len(b)]]
    return found


@triton.jit
def sum_channels(totals, PLAN: tl.constexpr):
    """Return the sums of blocks over channels, rows."""
    if PLAN.N_T == 1:
        return [tl.sum(add_blocks(totals), 0)[None, :]]
    else:
        return [tl.sum(total, 0)[None, :] for total in totals]


@triton.jit
def find_factors(gates, alpha, tile, PLAN: tl.constexpr):
    """Return 1 + alpha·gate, rows, 1 where not valid: there y is x, whatever alpha is."""
    factors = []
    for i in tl.static_range(PLAN.N_T):
        factors = factors + [tl.where(tile.valid[i], gates[i] * alpha + 1.0, 1.0)]
    return factors


@triton.jit
def add_times(totals, blocks, dp):
    """Return totals + dp·x, blocks of some channels, from those of a tile."""
    found = []
    for i in tl.static_range(len(totals)):
        total = totals[i]
        for k in tl.static_range(len(dp)):
            total += blocks[k * len(totals) + i] * dp[k]
        found = found + [total]
    return found


@triton.jit
def differentiate_x(blocks, factors, weights, dp, valid):
    """Return dx of every block from blocks of grad_y, which it is where not valid; [] for a grad_y of 0."""
    found = []
    for i in tl.static_range(len(weights) * len(dp)):
        grad = tl.where(valid[i % len(dp)], weights[i % len(weights)] * dp[i % len(dp)], 0.0)
        if len(blocks) > 0:
            grad += blocks[i] * factors[i % len(factors)]
        found = found + [grad]
    return found


# --- Sums over channels ---------------------------------------------------------------------------
@triton.jit
def gated_project(x, mask, weight, bias, p, sizes, PLAN: tl.constexpr):
    """Store p of some times, (batch, times); where the mask is False it is the bias."""
    sizes = decode(sizes, PLAN)
    tile = open_tile(first_place(sizes, PLAN), mask, sizes, PLAN)
    totals = zero_blocks(PLAN.N_C * PLAN.N_T, PLAN.BLOCK_C, PLAN.BLOCK_T, PLAN.ACC)
    for channel in range(0, sizes.channels, PLAN.BLOCK_C * PLAN.N_C):
        moved = move_tile(tile, channel, sizes, PLAN)
        blocks = load_valid(x, mask, moved, sizes, PLAN)
        totals = add_products(totals, blocks, load_columns(weight, moved, PLAN))
    constant = tl.load(bias).to(PLAN.ACC)
    store_rows(p, [row + constant for row in sum_channels(totals, PLAN)], tile, sizes, PLAN)


@triton.jit
def gated_sums(x, grad_y, mask, gates, grad_gate, alpha, h, partials, sizes, PLAN: tl.constexpr):
    """Store h = alpha·s + grad_gate of some times, (batch, times), and this program's Σ s·gate."""
    sizes = decode(sizes, PLAN)
    tile = open_tile(first_place(sizes, PLAN), mask, sizes, PLAN)
    totals = zero_blocks(PLAN.N_C * PLAN.N_T, PLAN.BLOCK_C, PLAN.BLOCK_T, PLAN.ACC)
    for channel in range(0, sizes.channels, PLAN.BLOCK_C * PLAN.N_C):
        moved = move_tile(tile, channel, sizes, PLAN)
        blocks = load_valid(x, mask, moved, sizes, PLAN)
        totals = add_products(totals, blocks, load_valid(grad_y, mask, moved, sizes, PLAN))
    sums = sum_channels(totals, PLAN)
    if h is not None:
        factor = tl.load(alpha).to(PLAN.ACC)
        rows = [row * factor for row in sums]
        if grad_gate is not None:
            rows = add_lists(rows, load_rows(grad_gate, tile, sizes, PLAN))
        store_rows(h, rows, tile, sizes, PLAN)
    if partials is not None:
        weights, total = load_rows(gates, tile, sizes, PLAN), tl.zeros([1], PLAN.ACC)
        for i in tl.static_range(PLAN.N_T):
            total += tl.sum(sums[i] * weights[i], 1)
        tl.store(partials + tl.program_id(0) + tl.arange(0, 1), total)


# --- What is written ------------------------------------------------------------------------------
@triton.jit
def gated_forward(x, mask, gates, alpha, y, sizes, PLAN: tl.constexpr):
    """Store y of one tile."""
    sizes = decode(sizes, PLAN)
    tile = open_tile(first_place(sizes, PLAN), mask, sizes, PLAN)
    blocks = load_blocks(x, tile, tile.time_masks, sizes, PLAN)
    factors = find_factors(load_rows(gates, tile, sizes, PLAN), tl.load(alpha).to(PLAN.ACC), tile, PLAN)
    outputs = []
    for i in tl.static_range(len(blocks)):
        outputs = outputs + [blocks[i] * factors[i % len(factors)]]
    store_blocks(y, outputs, tile, sizes, PLAN)


@triton.jit
def gated_backward(x, grad_y, mask, gates, dp, weight, alpha, dx, partials, sizes, PLAN: tl.constexpr):
    """Store dx of a strip of some channels, and its sums of dp·x for them, (batch·strips, channels). x is None where
    only dx is wanted, grad_y where it is 0.
    """
    sizes = decode(sizes, PLAN)
    first = first_place(sizes, PLAN)
    start = open_tile(first, None, sizes, PLAN)
    weights, factor = load_columns(weight, start, PLAN), tl.load(alpha).to(PLAN.ACC)
    totals = zero_blocks(PLAN.N_C, PLAN.BLOCK_C, PLAN.BLOCK_T, PLAN.ACC)
    end = tl.minimum(first.time + PLAN.BLOCK_T * PLAN.N_T * PLAN.STRIP, sizes.times)
    for time in range(first.time, end, PLAN.BLOCK_T * PLAN.N_T):
        tile = open_tile(find_place(first.batch, first.channel, time, PLAN), mask, sizes, PLAN)
        dp_rows, blocks, factors = load_rows(dp, tile, sizes, PLAN), [], []
        if partials is not None:
            totals = add_times(totals, load_valid(x, mask, tile, sizes, PLAN), dp_rows)
        if dx is not None:
            if grad_y is not None:
                blocks = load_blocks(grad_y, tile, tile.time_masks, sizes, PLAN)
                factors = find_factors(load_rows(gates, tile, sizes, PLAN), factor, tile, PLAN)
            grad = differentiate_x(blocks, factors, weights, dp_rows, tile.valid)
            store_blocks(dx, grad, tile, sizes, PLAN)
    if partials is not None:
        program = tl.program_id(0)
        row = program // (sizes.n_strips * sizes.n_groups) * sizes.n_strips + program % sizes.n_strips
        place = row.to(tl.int64) * sizes.channels + first.channel
        for i in tl.static_range(PLAN.N_C):
            pointers = partials + place + (i * PLAN.BLOCK_C + first.channels)
            tl.store(pointers, tl.sum(totals[i], 1)[:, None], start.channel_masks[i])


# --- On the host ----------------------------------------------------------------------------------
def _launch(kernel, call: Call, x: Tensor, *args) -> None:
    """Launch a kernel on its arguments, which sizes follow."""
    launch.launch(kernel, (call.programs, 1), *args, call.sizes, device=x.device, **call.constants)


def _find_call(kind: str, x: Tensor, *others: Strided | None) -> Call:
    """Return the call of a kernel of a kind (`gated_tiles.find_call`) on x and others of its shape, where there are."""
    return find_call(kind, x.dtype, x.shape, x.stride(), *(t.strides for t in others if t is not None))


def _order(t: Tensor | None, channel_axis: int, time_axis: int) -> Tensor | None:
    """Return a tensor as (batch, channels, times), a view; None of None."""
    if t is None or (channel_axis, time_axis) == (1, 2):
        return t
    return t.permute(3 - channel_axis - time_axis, channel_axis, time_axis)


def _gate_arguments(p: Tensor, mean_offsets: Tensor, log_sigma: Tensor, mask: Tensor | None) -> tuple:
    """Return p and a mask, (batch, times), and parameters (K,) as `gate` takes them."""
    mask = None if mask is None else mask.unsqueeze(1)
    return p.unsqueeze(1), mean_offsets.unsqueeze(0), log_sigma.unsqueeze(0), mask


def forward(
    x: Tensor, weight: Tensor, bias: Tensor, alpha: Tensor, mean_offsets: Tensor, log_sigma: Tensor,
    mask: Tensor | None, channel_axis: int, time_axis: int, gate_dtype: torch.dtype, save_stats: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:  # fmt: skip
    """Return (y, gate, p, weights, stats) of x with its dimensions in memory order: y contiguous, in the dtype that x
    and the gate promote to; the gate (batch, 1, times); for the backward pass p and, where the gate is rounded, its
    weights in the dtype of arithmetic, (batch, times), and statistics of streamed chunks where worth keeping.
    """
    y = empty_like(x, torch.promote_types(x.dtype, gate_dtype))
    x, y_view = (_order(t, channel_axis, time_axis) for t in (x, y))
    batch, channels, times = x.shape
    p = new_numbers(x, batch, times)
    if not x.numel():
        return y, x.new_empty((batch, 1, times), dtype=gate_dtype), p, None, None
    mask_rows = strided_rows(mask)
    call = _find_call("project", x)
    _launch(
        gated_project, call, x, strided_like(x, x), mask_rows, strided_of(weight.reshape(channels)), bias,
        strided_rows(p),
    )  # fmt: skip
    arguments = _gate_arguments(p, mean_offsets, log_sigma, mask)
    _weighed, weights, stats = gate.forward(*arguments, 2, False, True, save_stats)
    outputs = strided_like(y_view, x)
    call = _find_call("outputs", x, outputs)
    gates = weights.squeeze(1)
    _launch(gated_forward, call, x, strided_like(x, x), mask_rows, strided_rows(gates), alpha, outputs)
    if gate_dtype == weights.dtype:
        return y, weights, p, None, stats
    return y, weights.to(gate_dtype), p, gates, stats


def backward(
    grad_y: Tensor | None, grad_gate: Tensor | None, x: Tensor, weight: Tensor, bias: Tensor, alpha: Tensor,
    mean_offsets: Tensor, log_sigma: Tensor, mask: Tensor | None, p: Tensor, gates: Tensor, stats: Tensor | None,
    channel_axis: int, time_axis: int, need_x: bool, need_weight: bool, need_bias: bool, need_alpha: bool,
    need_params: bool,
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """Return the gradients of x, contiguous, weight, bias, alpha, mean_offsets and log_sigma; None where not needed.
    gates: the weights in the dtype of arithmetic, (batch, times), as p. Of both gradients one may be None.
    """
    dx = empty_like(x) if need_x else None
    x, dx_view, grad_y = (_order(t, channel_axis, time_axis) for t in (x, dx, grad_y))
    if not x.numel():
        needs = zip((weight, bias, alpha), (need_weight, need_bias, need_alpha), strict=True)
        parameters = (t.new_zeros(t.shape) if need_params else None for t in (mean_offsets, log_sigma))
        return dx, *(t.new_zeros(t.shape) if need else None for t, need in needs), *parameters
    grad_rows = strided_like(grad_y, x)
    mask_rows, gate_rows = strided_rows(mask), strided_rows(gates)
    need_p = need_x or need_weight or need_bias
    h, d_alpha = grad_gate, alpha.new_zeros(alpha.shape) if need_alpha else None
    if grad_rows is not None and (need_p or need_alpha or need_params):
        h = new_numbers(x, x.shape[0], 1, x.shape[2]) if need_p or need_params else None
        call = _find_call("sums", x, grad_rows)
        partials = new_numbers(x, call.programs) if need_alpha else None
        given = None if grad_gate is None or h is None else strided_rows(grad_gate.squeeze(1))
        _launch(
            gated_sums, call, x, strided_like(x, x), grad_rows, mask_rows, gate_rows, given, alpha,
            None if h is None else strided_rows(h.squeeze(1)), partials,
        )  # fmt: skip
        if need_alpha:
            d_alpha = _add_up(partials, alpha)
    dp = d_weight = d_bias = d_offsets = d_sigma = None
    if h is not None and (need_p or need_params):
        arguments = _gate_arguments(p, mean_offsets, log_sigma, mask)
        dp, *grads = gate.backward(None, h, *arguments, stats, 2, False, need_p, need_params)
        d_offsets, d_sigma = (t if t is None else t.squeeze(0) for t in grads)
    if need_x or need_weight:
        d_weight = _launch_backward(
            x, grad_rows if need_x else None, mask_rows, gate_rows, dp.squeeze(1), weight, alpha, dx_view, need_weight
        )
    if need_bias:
        d_bias = _add_up(dp.reshape(-1), bias)
    return dx, d_weight, d_bias, d_alpha, d_offsets, d_sigma


def _launch_backward(
    x: Tensor, grad_y: Strided | None, mask: Strided | None, gates: Strided, dp: Tensor, weight: Tensor, alpha: Tensor,
    dx: Tensor | None, need_weight: bool,
) -> Tensor | None:  # fmt: skip
    """Fill dx, if there is one, and return the gradient of the convolution's weight if it is needed."""
    given, dx = strided_like(x, x) if need_weight else None, strided_like(dx, x)
    call = _find_call("gradients", x, given, grad_y, dx)
    partials = new_numbers(x, call.n_sums, x.shape[1]) if need_weight else None
    _launch(
        gated_backward, call, x, given, grad_y, mask, gates, strided_rows(dp), strided_of(weight.reshape(x.shape[1])),
        alpha, dx, partials,
    )  # fmt: skip
    return _add_up(partials, weight) if need_weight else None


def _add_up(partials: Tensor, like: Tensor) -> Tensor:
    """Return the sum of partial sums over programs, in fp64, as the gradient of a parameter."""
    return partials.sum(0, dtype=torch.float64).to(like.dtype).reshape(like.shape)
