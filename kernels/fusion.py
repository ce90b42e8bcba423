"""Which layers run as one launch (`layers.py`): what decides is x's shape, strides and dtype, and how many they are."""

from __future__ import annotations

from torch import Tensor

from . import tiles
from .budgets import MOST_LAYERS, layers_backward, layers_forward
from .operands import axis_is_fastest, find_longest, inner_dim

# By the model of an H200 (`bench/model.py`), forward and backward pass together: the fewer layers share a launch, the
# more of their instructions overlap. Launches count up to FEW elements; beyond, two layers pay, and more where a warp
# holds a chunk without a barrier; not so in half precision past MANY, where the bytes that are saved are few.
FEW, MANY = 2**19, 2**21
WARP = 256  # positions of a chunk along the fastest dimension that one warp holds, of three layers or four


def count_fitting(x: Tensor, axis: int, heads: int, masked: bool, n_layers: int, backward: bool = False) -> int:
    """Return of how many layers, of so many, a pass on x is one launch: 1 where chunks do not stay on chip."""
    budget = layers_backward if backward else layers_forward
    fitting = (
        n
        for n in range(min(n_layers, MOST_LAYERS), 1, -1)
        if not tiles.streams(budget(n), x, axis, heads, None, masked)
    )
    return next(fitting, 1)


def count_together(x: Tensor, axis: int, heads: int) -> int:
    """Return of how many layers a launch is expected to be faster than one by one, where they are differentiated."""
    n = x.numel()
    if n <= FEW:
        return MOST_LAYERS
    if x.element_size() < 4 and n > MANY:
        return 1
    contiguous = axis_is_fastest(x, axis, inner_dim(x, axis, None))
    return MOST_LAYERS if contiguous and find_longest(x.shape[axis], heads) <= WARP else 2
