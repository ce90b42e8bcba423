"""Layers of the mixture of densities (`layers.py`): what a layer is there, by the functions of `mixture.py`."""

import triton
import triton.language as tl

from .layers import Layers
from .mixture import KERNELS, differentiate_on_chip, weigh_on_chip
from .mixture_blocks import sum_head
from .params import add_lists, store_partials, zero_blocks
from .tile import Gradients
from .walk import columns_inside


@triton.jit
def zero_totals(PLAN: tl.constexpr):
    """Return zeros for ke, kee, cr and cl of a layer."""
    return zero_blocks(4, 1, 1, PLAN.ACC)


@triton.jit
def differentiate_layer(x, grad_y, totals, gaussian, padding, tile, mask, settings, length, view, PLAN: tl.constexpr):
    """Return (dx of every block but for the residual's part, the totals with those of this tile)."""
    grad, ke, kee, clamped, inv_var, inv_count = differentiate_on_chip(
        x, Gradients([], grad_y, []), gaussian, padding, tile, mask, settings, length, PLAN
    )  # fmt: skip
    inside = columns_inside(tile.position, view) & (inv_count > 0)
    return grad, add_lists(totals, sum_head(ke, kee, clamped, inv_var, inside))


@triton.jit
def keep_totals(partials, totals, _gaussian, walk, _PLAN: tl.constexpr):
    """Store the totals of a layer."""
    store_partials(partials, totals, walk.head, walk.program)


LAYERS = Layers(KERNELS, weigh_on_chip, differentiate_layer, zero_totals, keep_totals)
forward, backward = LAYERS.forward, LAYERS.backward
