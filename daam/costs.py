"""What operators of the Triton backend cost: floating-point operations for torch's FlopCounterMode, and bytes.

Importing this module registers the former; `import daam` does not, since torch.utils.flop_counter imports Triton.

    import daam.costs
    with torch.utils.flop_counter.FlopCounterMode() as counter: layer(x)

torch counts products of matrices, twice a multiply-add, and nothing else. Here an element of x counts what its formula
does with it: each sum, product, quotient, comparison and exponential is one operation. Numbers of a chunk, or of a
head, are not counted, nor are masks, residuals and gradients of the weights. On the eager backend a call is elementwise
operations of torch's, which it counts as 0.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from daam.block_ops import BLOCKS
from daam.kernels import tiles
from daam.kernels.algorithms import ALGORITHMS

STATISTICS = 4  # a sum for the mean, a difference from it, a square and a sum for the variance
# Operations an element beside those and the product with x: a fixed number, and one for each Gaussian. Of the
# stabilised mixture it is that of chunks where nothing is clamped: others do more, as their values say.
FORWARD = {"density": (4, 0), "mixture": (9, 0), "gate": (0, 7), "stable": (9, 0)}
BACKWARD = {"density": (15, 0), "mixture": (26, 0), "gate": (7, 14), "stable": (26, 0)}
PARAMETERS = {"density": (2, 0), "mixture": (0, 0), "gate": (0, 3), "stable": (0, 0)}  # more, where they are needed


def count_forward(name: str, n_gaussians: int) -> int:
    """Return the operations an element of x takes in a forward pass of an algorithm."""
    fixed, each = FORWARD[name]
    return STATISTICS + 1 + fixed + each * n_gaussians


def count_backward(name: str, n_gaussians: int, need_params: bool) -> int:
    """Return the operations an element of x takes in a backward pass, which finds the forward pass's numbers anew."""
    counts = (BACKWARD[name], PARAMETERS[name]) if need_params else (BACKWARD[name],)
    return STATISTICS + 1 + sum(fixed + each * n_gaussians for fixed, each in counts)


def count_bytes(name: str, args: Sequence) -> int:
    """Return the bytes that an operator moves: each tensor that it is given, or returns, once, and x and the gradients
    again where chunks do not stay on chip.

    name: "{algorithm}_forward" or "{algorithm}_backward". args: those of the operator, on any device, meta too.
    Statistics of chunks and partial sums of the parameters' gradients are left out: a few percent of a large x.
    """
    algorithm, _, which = name.rpartition("_")
    record, backward = ALGORITHMS[algorithm], which == "backward"
    x, p, q, mask = args[2:6] if backward else args[:4]
    axis, *settings = args[7 if backward else 4 :]
    feature_axis = record.find_setting("feature_axis", settings)
    tensors = [t for t in args if isinstance(t, Tensor)]
    first, second = settings[len(record.settings) + 1 :][:2]  # need_x and need_params, or return_weights
    tensors += [x] * first + [p, q] * second if backward else [x] * (1 + first)
    budget = (record.backward if backward else record.forward)(q.shape[1])
    streamed = tiles.streams(budget, x, axis, q.shape[0], feature_axis, mask is not None)
    return sum(t.nbytes for t in tensors) + streamed * record.reads_again[backward] * x.nbytes


def _register(name: str) -> None:
    """Register the counts of an algorithm's operators, and of its layers'."""

    @register_flop_formula(getattr(torch.ops.daam, f"{name}_forward"))
    def forward(x_shape, p_shape, *_args, **_out) -> int:
        return math.prod(x_shape) * count_forward(name, p_shape[1])

    @register_flop_formula(getattr(torch.ops.daam, f"{name}_backward"))
    def backward(_grad_y, _grad_weights, x_shape, p_shape, *args, **_out) -> int:
        return math.prod(x_shape) * count_backward(name, p_shape[1], args[-1])

    if name not in BLOCKS:
        return

    @register_flop_formula(getattr(torch.ops.daam, f"{name}_layers_forward"))
    def layers_forward(x_shape, p_shapes, *_args, **_out) -> int:
        return sum(forward(x_shape, p) for p in p_shapes)

    @register_flop_formula(getattr(torch.ops.daam, f"{name}_layers_backward"))
    def layers_backward(_grad_y, x_shape, p_shapes, *args, **_out) -> int:
        # each layer's x but the first is found anew
        anew = sum(math.prod(x_shape) * count_forward(name, p[1]) for p in p_shapes[:-1])
        return anew + sum(math.prod(x_shape) * count_backward(name, p[1], args[-1]) for p in p_shapes)


def _register_gated() -> None:
    """Register the counts of `DensityGate`'s operators: of x a projection and a product, of each position a gate."""

    @register_flop_formula(torch.ops.daam.gated_forward)
    def forward(x_shape, _weight, _bias, _alpha, offsets_shape, *args, **_out) -> int:
        positions = _count_positions(x_shape, args[2])
        return 3 * math.prod(x_shape) + positions * count_forward("gate", offsets_shape[0])

    @register_flop_formula(torch.ops.daam.gated_backward)
    def backward(_grad_y, _grad_gate, x_shape, _weight, _bias, _alpha, offsets_shape, *args, **_out) -> int:
        positions = _count_positions(x_shape, args[5])
        return 7 * math.prod(x_shape) + positions * count_backward("gate", offsets_shape[0], args[-1])


def _count_positions(x_shape: Sequence[int], channel_axis: int) -> int:
    """Return the positions of x, each of all channels."""
    return math.prod(size for d, size in enumerate(x_shape) if d != channel_axis)


for _name in ALGORITHMS:
    _register(_name)
_register_gated()
