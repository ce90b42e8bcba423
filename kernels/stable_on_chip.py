"""Whole chunks of the stabilised mixture, by the formulas of `stable.py`: their weights, and what their sums give."""

import triton
import triton.language as tl

from .blocks import add_blocks, add_products, find_h, inverse_count_less_one
from .mixture_blocks import Sums
from .params import add_lists, sum_columns, zero_blocks
from .stable_blocks import (
    add_clamped,
    centre_chunks,
    differentiate_x,
    find_frame,
    find_he,
    hide_padding,
    measure,
    multiply,
    pass_directly,
    store_parameter_totals,
    weigh,
)
from .walk import columns_inside


@triton.jit
def weigh_on_chip(x, product, padding, tile, mask, _settings, length, view, PLAN: tl.constexpr):
    """Return the weights of every block of a tile that holds whole chunks."""
    centred, inv_var, reach = centre_chunks(x, tile, mask, product.parameters, length, view, PLAN)
    frame, shown = find_frame(product, centred.mean_error, inv_var, reach), hide_padding(x, tile.valid, padding)
    _f, s, _q = measure(centred.blocks, centred.mean_error, product, frame, shown)
    weights, _equal = weigh(s, frame, shown, tile.valid, centred.inv_count, mask, padding)
    return weights


@triton.jit
def zero_totals(PLAN: tl.constexpr):
    """Return zeros for Σ he·f and Σ he·q of columns that clamp nowhere, and [1, K] for sums of those that do."""
    return zero_blocks(2, 1, 1, PLAN.ACC) + zero_blocks(2, 1, PLAN.K, PLAN.ACC)


@triton.jit
def differentiate_on_chip(x, gradients, totals, product, padding, tile, mask, length, view, PLAN: tl.constexpr):
    """Return (dx of every block but for the residual's part, the totals with those of this tile), of whole chunks."""
    # the forward pass again
    centred, inv_var, reach = centre_chunks(x, tile, mask, product.parameters, length, view, PLAN)
    d, mean_error, inv_count = centred.blocks, centred.mean_error, centred.inv_count
    frame, shown = find_frame(product, mean_error, inv_var, reach), hide_padding(x, tile.valid, padding)
    f, s, _q = measure(d, mean_error, product, frame, shown)
    weights, equal = weigh(s, frame, shown, tile.valid, inv_count, mask, padding)
    h = find_h(gradients, x, padding)  # what reaches the weights, and its sums
    sum_h = tl.sum(add_products(h, weights), 0)[None, :]
    he = find_he(h, weights, sum_h, frame, equal, padding)
    direct, hef = pass_directly(gradients, x, weights, padding), multiply(he, f)
    sum_hef, heq = tl.sum(add_blocks(hef), 0)[None, :], tl.sum(add_products(hef, f), 0)[None, :]
    inside = columns_inside(tile.position, view) & (inv_count > 0)
    unclamped = inside & ~frame.clamps
    free = add_lists(totals[:2], [sum_columns(sum_hef, unclamped), sum_columns(heq, unclamped)])
    clamped = totals[2:]
    if frame.any_clamps:
        heq, clamped = add_clamped(clamped, heq, d, mean_error, he, product, frame, inside)
    sums = Sums(sum_h, sum_hef * inv_count, heq * inv_var * inverse_count_less_one(inv_count))
    return differentiate_x(direct, d, mean_error, hef, sums), free + clamped


@triton.jit
def keep_totals(partials, totals, product, walk, PLAN: tl.constexpr):
    """Store the totals of a program."""
    store_parameter_totals(partials, zero_blocks(1, 1, 1, PLAN.ACC) + totals[:2], totals[2:], product, walk.program)
