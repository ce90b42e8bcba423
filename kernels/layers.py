"""Layers of one algorithm, one after the other, on chunks that stay on chip: x is read once, and y is written once.

Layers share their axis and their heads, so that a chunk of one is a chunk of all. With x_0 = x and y = x_L,

    x_l+1 = x_l·weights_l(x_l) (+ x_l)      weights_l as the algorithm's file says, of the layer's own parameters

Backward, x is read again, and the values of all layers are found anew: the gradient of x_l is the algorithm's dx of
that of x_l+1, from the last layer to the first, and each layer's parameters have sums of their own. Padding that is not
0 is twice itself after a layer with a residual, and padding no more.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import launch
from .budgets import Budget, layers_forward
from .host import Call
from .operands import Inputs, Outputs, Strided, encode, float_bits
from .params import store_gradient, sum_groups
from .passes import Kernels, empty_like
from .tile import float_of, load_blocks, load_gradients, store_blocks
from .walk import next_tile, place_tile, start_walk, view_of


@triton.jit
def gate_blocks(x, weights, padding, RESIDUAL: tl.constexpr):
    """Return what a layer makes of every block, of 0 where it is not valid: x·weights (+ x), for padding x (+ x)."""
    blocks = []
    for i in tl.static_range(len(x)):
        gated = x[i] * weights[i]
        if padding is not None:
            gated = tl.where(x[i] == padding, x[i], gated)
        blocks = blocks + [gated + x[i] if RESIDUAL else gated]
    return blocks


@triton.jit
def where_valid(blocks, tile, raw, RESIDUAL: tl.constexpr):
    """Return the blocks where they are valid; elsewhere a residual passes on what came, raw, and nothing else does."""
    found = []
    for i in tl.static_range(len(blocks)):
        found = found + [tl.where(tile.valid[i], blocks[i], raw[i] if RESIDUAL else 0.0)]
    return found


@triton.jit
def pass_back(dx, grad_y, tile, RESIDUAL: tl.constexpr):
    """Return the gradient of a layer's x from its dx and the gradient of its y, 0 of every block where not valid."""
    blocks = []
    for i in tl.static_range(len(dx)):
        block = tl.where(tile.valid[i], dx[i], 0.0)
        blocks = blocks + [block + grad_y[i] if RESIDUAL else block]
    return blocks


@triton.jit
def partials_of(partials, layer: tl.constexpr, N_SUMS: tl.constexpr):
    """Return where a layer's partial sums are, N_SUMS a group of programs."""
    distance = tl.cast(partials.strides[0] >> 1, tl.int64)
    return Strided(partials.data + distance * (layer * N_SUMS), partials.strides)


@triton.jit(repr=lambda call: f"{call.constants['NAME']}_forward_layers")
def forward_layers(
    inputs, parameters, outputs, settings, extent, PREPARE: tl.constexpr, WEIGH: tl.constexpr, NAME: tl.constexpr,
    RESIDUAL: tl.constexpr, PLAN: tl.constexpr,
):  # fmt: skip
    """Store y of all layers, and the weights of each; PREPARE makes something of a layer's parameters, WEIGH of x."""
    view = view_of(extent, PLAN)
    walk = start_walk(extent, view, BACKWARDS=False)
    prepared = [PREPARE(one, walk.head, None, view, PLAN) for one in parameters]
    padding = None if inputs.padding is None else float_of(inputs.padding, PLAN.ACC)
    index = walk.index
    for _ in range(walk.first_tile, view.n_tiles, walk.tile_step):
        tile = place_tile(inputs.mask, index, walk, walk.strip_row, view, PLAN.RAGGED_P, PLAN)
        raw, x = load_blocks(inputs.x, inputs.mask, tile, view, RESIDUAL, PLAN)
        for layer in tl.static_range(len(parameters)):
            weights = WEIGH(x, prepared[layer], padding, tile, inputs.mask, settings, walk.length, view, PLAN)
            if outputs.weights is not None:
                store_blocks(outputs.weights[layer], weights, tile, view, PLAN)
            x = gate_blocks(x, weights, padding, RESIDUAL)
        y = x if inputs.mask is None else where_valid(x, tile, raw, RESIDUAL)
        store_blocks(outputs.y, y, tile, view, PLAN)
        index = next_tile(index, walk.index_step, view)


@triton.jit(repr=lambda call: f"{call.constants['NAME']}_backward_layers")
def backward_layers(
    inputs, parameters, dx, partials, settings, extent, PREPARE: tl.constexpr, WEIGH: tl.constexpr,
    DIFFERENTIATE: tl.constexpr, ZERO: tl.constexpr, KEEP: tl.constexpr, N_SUMS: tl.constexpr, NAME: tl.constexpr,
    RESIDUAL: tl.constexpr, PLAN: tl.constexpr,
):  # fmt: skip
    """Store dx, and this program's totals for the parameters of every layer. ZERO gives those of none, DIFFERENTIATE
    (dx of a layer, its totals with this tile's), and KEEP stores them.
    """
    view = view_of(extent, PLAN)
    walk = start_walk(extent, view, BACKWARDS=False)
    N: tl.constexpr = len(parameters)
    prepared = [PREPARE(one, walk.head, None, view, PLAN) for one in parameters]
    totals = [ZERO(PLAN) for _ in parameters]
    padding = None if inputs.padding is None else float_of(inputs.padding, PLAN.ACC)
    index = walk.index
    for _ in range(walk.first_tile, view.n_tiles, walk.tile_step):
        tile = place_tile(inputs.mask, index, walk, walk.strip_row, view, PLAN.RAGGED_P, PLAN)
        _raw, x = load_blocks(inputs.x, inputs.mask, tile, view, False, PLAN)
        gradients = load_gradients(inputs, tile, view, RESIDUAL, PLAN)
        xs, grad, more = [x], gradients.y, []
        for layer in tl.static_range(N - 1):
            weights = WEIGH(xs[layer], prepared[layer], padding, tile, inputs.mask, settings, walk.length, view, PLAN)
            xs = xs + [gate_blocks(xs[layer], weights, padding, RESIDUAL)]
        for i in tl.static_range(N):  # from the last layer
            block_dx, total = DIFFERENTIATE(
                xs[N - 1 - i], grad, totals[N - 1 - i], prepared[N - 1 - i], padding, tile, inputs.mask, settings,
                walk.length, view, PLAN,
            )  # fmt: skip
            grad, more = pass_back(block_dx, grad, tile, RESIDUAL), [total] + more
        if dx is not None:
            store_blocks(dx, where_valid(grad, tile, gradients.raw, RESIDUAL), tile, view, PLAN)
        totals = more
        index = next_tile(index, walk.index_step, view)
    if partials is not None:
        for layer in tl.static_range(N):
            KEEP(partials_of(partials, layer, N_SUMS), totals[layer], prepared[layer], walk, PLAN)


@triton.jit(repr=lambda call: f"{call.constants['NAME']}_layer_gradients")
def layer_gradients(
    partials, n_groups, parameters, gradients, N_SUMS: tl.constexpr, N: tl.constexpr, EACH: tl.constexpr,
    K: tl.constexpr, FINISH: tl.constexpr, NAME: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Store the gradients of one Gaussian of a layer and a head, as `params.param_gradients` does: program layer·K + k
    has N of the layer's N_SUMS partial sums, from EACH·k on. gradients: pointers, of one parameter, then the other.
    """
    head, layer, k = tl.program_id(1).to(tl.int64), tl.program_id(0) // K, tl.program_id(0) % K
    distance, head_stride = [tl.cast(stride >> 1, tl.int64) for stride in partials.strides[:2]]
    entries = k + tl.arange(0, 1)
    start = partials.data + head * head_stride + (layer * N_SUMS + entries[None, :] * EACH) * distance
    totals = sum_groups(start, distance, 1, n_groups >> 1, entries < K, N, BLOCK, 1)
    for i in tl.static_range(len(parameters)):
        if layer == i:
            p_ptr, q_ptr = gradients[i], gradients[len(parameters) + i]
            inside, places = entries < parameters[i].n, head * parameters[i].n + entries
            p_gradient, q_gradient = FINISH(totals, parameters[i], head, entries, inside, K)
            store_gradient(p_ptr + places, p_gradient, inside)
            store_gradient(q_ptr + places, q_gradient, inside)


# --- On the host ----------------------------------------------------------------------------------
@dataclass(frozen=True)
class Layers:
    """Hold what layers of an algorithm are made of, beside what a single one is.

    weigh, differentiate, zero, keep: what `forward_layers` and `backward_layers` take, where `Kernels.prepare` gives
    what a layer's parameters come to.
    """

    kernels: Kernels
    weigh: Callable
    differentiate: Callable
    zero: Callable
    keep: Callable

    def forward(
        self, x: Tensor, ps: Sequence[Tensor], qs: Sequence[Tensor], mask: Tensor | None, axis: int, *how: object
    ) -> tuple[Tensor, list[Tensor]]:
        """Return y, and the weights of each layer, contiguous; none of these where not asked for. ps, qs: a parameter
        of each layer. how: the algorithm's settings, residual, return_weights.
        """
        *settings, residual, return_weights = how
        y, weights = empty_like(x), [empty_like(x) for _ in ps if return_weights]
        if not x.numel():
            return y, weights
        budget, algorithm = layers_forward(len(ps)), self.kernels.algorithm
        call, parameters, given = self._open(budget, ps, qs, axis, settings, (x, mask, y, *weights))
        *inputs, call_y = call.tensors[:3]
        call.inputs = Inputs(*inputs, None, None, float_bits(algorithm.find_setting("padding", settings), x.dtype))
        outputs = Outputs(call_y, tuple(call.tensors[3:]) or None)
        call.launch(
            forward_layers, call.programs, call.inputs, parameters, outputs, given, PREPARE=self.kernels.prepare,
            WEIGH=self.weigh, NAME=algorithm.name, RESIDUAL=residual,
        )  # fmt: skip
        return y, weights

    def backward(
        self, grad_y: Tensor, x: Tensor, ps: Sequence[Tensor], qs: Sequence[Tensor], mask: Tensor | None, axis: int,
        *how: object,
    ) -> tuple[Tensor | None, list[Tensor]]:  # fmt: skip
        """Return the gradient of x, and those of ps and qs in one list, contiguous; None and an empty list where not
        needed. how: the algorithm's settings, residual, need_x, need_params.
        """
        *settings, residual, need_x, need_params = how
        algorithm, dx = self.kernels.algorithm, empty_like(x) if need_x else None
        if not x.numel():
            return dx, [t.new_zeros(t.shape) for t in (*ps, *qs) if need_params]
        gradients = [t.new_empty(t.shape) for t in (*ps, *qs)] if need_params else []
        if not (need_x or need_params):
            return dx, gradients
        budget = algorithm.layers_backward(len(ps))
        call, parameters, given = self._open(budget, ps, qs, axis, settings, (x, mask, grad_y, dx), need_params)
        *inputs, call_dx = call.tensors
        call.inputs = Inputs(*inputs, None, float_bits(algorithm.find_setting("padding", settings), x.dtype))
        n_sums = self.kernels.n_sums(max(q.shape[1] for q in qs))
        partials = call.partials(len(ps) * n_sums, call.plan.n_groups)
        call.launch(
            backward_layers, call.plan.sum_programs if need_params else call.programs, call.inputs, parameters,
            call_dx, partials, given, PREPARE=self.kernels.prepare, WEIGH=self.weigh, DIFFERENTIATE=self.differentiate,
            ZERO=self.zero, KEEP=self.keep, N_SUMS=n_sums, NAME=algorithm.name, RESIDUAL=residual,
        )  # fmt: skip
        if need_params:
            self._launch_gradients(call, partials, parameters, gradients, n_sums)
        return dx, gradients

    def _open(
        self, budget: Budget, ps: Sequence[Tensor], qs: Sequence[Tensor], axis: int, settings: Sequence,
        tensors: tuple[Tensor | None, ...], need_params: bool = False,
    ) -> tuple[Call, tuple, Any]:  # fmt: skip
        """Return a call, every layer's parameters and the settings, as kernels take them."""
        heads, n = next(iter(qs)).shape[0], max([q.shape[1] for q in qs])
        n_sums = len(ps) * self.kernels.n_sums(n)
        call = Call(
            budget, self.kernels.gaussians(n), n_sums, torch.Size((heads, n)), axis, None, tensors,
            need_params=need_params,
        )  # fmt: skip
        if call.streamed:
            raise RuntimeError("x lies in memory otherwise than when its layers were planned: chunks leave the chip")
        found = [self.kernels.collect(call, p, q, *settings) for p, q in zip(ps, qs, strict=True)]
        parameters, (given, *_) = zip(*found, strict=True)
        return call, parameters, given

    def _launch_gradients(
        self, call: Call, partials: Strided, parameters: tuple, gradients: list[Tensor], n_sums: int
    ) -> None:
        """Launch what turns the partial sums of all layers into gradients."""
        n_layers, (stride, head_stride, *_) = len(parameters), partials.data.stride()
        _sum_stride, entry_stride = self.kernels.sum_strides(1)
        K = call.plan.constants["PLAN"].K
        launch.launch(
            layer_gradients, (n_layers * K, call.heads),
            Strided(partials.data, (encode(stride), encode(head_stride))), encode(partials.data.shape[2]), parameters,
            tuple(gradients), device=partials.data.device, N_SUMS=n_sums, N=self.kernels.n_entry_sums,
            EACH=entry_stride, K=K, FINISH=self.kernels.finish, NAME=self.kernels.algorithm.name, BLOCK=2048,
            num_warps=8,
        )  # fmt: skip
