"""Which layers run as one launch (`layers.py`): what decides is x's shape, strides and dtype, and how many they are."""

from __future__ import annotations

from torch import Tensor

from . import budgets, tiles

# Elements of a half precision x from which layers that are differentiated run one by one unless memory counts: their
# instructions take longer than the bytes they save
MOST_HALF = 2**21


def find_obstacle(x: Tensor, axis: int, heads: int, masked: bool, n_layers: int, backward: bool = False) -> str | None:
    """Return why a pass of layers on x is not one launch, in words; None where it is."""
    budget = (budgets.layers_backward if backward else budgets.layers_forward)(n_layers)
    if tiles.streams(budget, x, axis, heads, None, masked):
        name = "backward" if backward else "forward"
        return (
            f"chunks of {x.shape[axis] // heads} positions do not stay on chip in the {name} pass of {n_layers} layers"
        )
    return None


def find_cost(x: Tensor) -> str | None:
    """Return why layers that are differentiated are not expected to be faster as one launch; None where they are."""
    if x.element_size() < 4 and x.numel() >= MOST_HALF:
        return f"the backward pass of {x.numel()} elements of {x.dtype} is expected to be faster layer by layer"
    return None
