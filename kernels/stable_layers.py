"""Layers of the stabilised mixture (`layers.py`): what a layer is there, by the functions of `stable_on_chip.py`."""

import triton
import triton.language as tl

from .layers import Layers
from .stable import KERNELS
from .stable_on_chip import differentiate_on_chip, keep_totals, weigh_on_chip, zero_totals
from .tile import Gradients


@triton.jit
def differentiate_layer(x, grad_y, totals, product, padding, tile, mask, _settings, length, view, PLAN: tl.constexpr):
    """Return (dx of every block but for the residual's part, the totals with those of this tile)."""
    return differentiate_on_chip(
        x, Gradients([], grad_y, []), totals, product, padding, tile, mask, length, view, PLAN
    )  # fmt: skip


LAYERS = Layers(KERNELS, weigh_on_chip, differentiate_layer, zero_totals, keep_totals)
forward, backward = LAYERS.forward, LAYERS.backward
