"""The forward and the backward pass of any algorithm: which of its kernels are launched, on chip and streamed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import launch
from .algorithms import Algorithm
from .budgets import Budget
from .host import Call, Numbers
from .operands import Inputs, Outputs, Strided, encode, float_bits, power_of_2, strided_of
from .params import param_gradients
from .streamed import backward_streamed, forward_streamed


@dataclass(frozen=True)
class Kernels:
    """Hold the kernels of an algorithm, and what passes ask of it.

    gaussians(P) -> Gaussians of a head, as its kernels count them. n_sums(P) -> partial sums that a group of programs
        leaves of a head. n_entry_sums: those that make an entry of the gradients; sum_strides(stride) -> (stride from
        one of them to the next, from an entry's to the next entry's), where parameters follow no dimension.
    finish(totals, parameters, head, entries, inside, K) -> some entries of both gradients (`params.param_gradients`).
    collect(call, p, q, *settings) -> (parameters, settings) as kernels take them.
    find_numbers(call, parameters, settings) -> the numbers of streamed chunks that the forward pass needs.
    sum_chunks(call, parameters, settings, numbers) -> (sums of streamed chunks, partial sums or None).
        add_up(call, sums) -> the partial sums where sum_chunks has none. It follows the launch that writes sums.
    forward, backward: kernels of chunks on chip. prepare, open_chunk, weigh_chunk, differentiate: what
        `streamed.forward_streamed` and `backward_streamed` take. backward_streamed: a kernel of its own in place of
        that and differentiate, where totals for the parameters come last; sum_chunks then gives room for them.
    merges_partials: whether sum_chunks makes partial sums where it merges strips.
    """

    algorithm: Algorithm
    gaussians: Callable[[int], int]
    n_sums: Callable[[int], int]
    n_entry_sums: int
    sum_strides: Callable[[int], tuple[int, int]]
    collect: Callable[..., Any]
    find_numbers: Callable[[Call, Any, Any], Numbers]
    sum_chunks: Callable[[Call, Any, Any, Numbers], tuple[Strided, Strided | None]]
    finish: Callable
    forward: Callable
    backward: Callable
    prepare: Callable
    open_chunk: Callable
    weigh_chunk: Callable
    differentiate: Callable | None = None
    backward_streamed: Callable | None = None
    add_up: Callable[[Call, Strided], Strided] | None = None
    merges_partials: bool = False


def forward(
    kernels: Kernels, x: Tensor, p: Tensor, q: Tensor, mask: Tensor | None, axis: int, *settings_and_flags: object
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Return y, weights and statistics, contiguous; None where not asked for, and the statistics of chunks on chip.
    settings_and_flags: the algorithm's settings, residual, return_weights, save_stats.
    """
    *settings, residual, return_weights, save_stats = settings_and_flags
    y, weights = empty_like(x), empty_like(x) if return_weights else None
    # not whether weights are written: y is the same to the bit with and without them
    call = open_call(kernels, kernels.algorithm.forward(q.shape[1]), (x, mask, y, weights), q, axis, settings)
    if x.numel():
        parameters, given = kernels.collect(call, p, q, *settings)
        if call.streamed:
            launch_forward_streamed(kernels, call, parameters, given, residual)
            call.launch_steps(f"{kernels.algorithm.name}_forward")
        else:
            args = (call.inputs, parameters, call.outputs, given)
            call.launch(kernels.forward, call.programs, *args, RESIDUAL=residual)
    return y, weights, call.stats if save_stats and call.plan.keeps_stats else None


def open_call(
    kernels: Kernels, budget: Budget, tensors: tuple[Tensor | None, ...], q: Tensor, axis: int, settings: Sequence
) -> Call:
    """Return the call of a forward pass on x, a mask, y and weights."""
    (x, *_others), n = tensors, q.shape[1]
    feature_axis = kernels.algorithm.find_setting("feature_axis", settings)
    padding = float_bits(kernels.algorithm.find_setting("padding", settings), x.dtype)
    call = Call(budget, kernels.gaussians(n), kernels.n_sums(n), q.shape, axis, feature_axis, tensors)
    *inputs, y, weights = call.tensors
    call.inputs, call.outputs = Inputs(*inputs, None, None, padding), Outputs(y, weights)
    return call


def launch_forward_streamed(kernels: Kernels, call: Call, parameters: Any, settings: Any, residual: bool) -> None:
    """Launch the forward pass of streamed chunks."""
    args = (call.inputs, parameters, kernels.find_numbers(call, parameters, settings), call.outputs)
    functions = {"PREPARE": kernels.prepare, "OPEN": kernels.open_chunk, "WEIGH": kernels.weigh_chunk}
    name = kernels.algorithm.name
    call.launch(forward_streamed, call.programs, *args, **functions, NAME=name, RESIDUAL=residual)


def backward(
    kernels: Kernels, grad_y: Tensor | None, grad_weights: Tensor | None, x: Tensor, p: Tensor, q: Tensor,
    mask: Tensor | None, stats: Tensor | None, axis: int, *settings_and_flags: object,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    """Return the gradients of x, p and q, contiguous; None where not needed. stats are found where None.
    settings_and_flags: the algorithm's settings, residual, need_x, need_params.
    """
    *settings, residual, need_x, need_params = settings_and_flags
    dx, grads = empty_like(x) if need_x else None, (None, None)
    if need_params:  # zeros where x is empty and nothing will be written
        grads = tuple(empty_like(t) if x.numel() else t.new_zeros(t.shape) for t in (p, q))
    if not x.numel():
        return dx, *grads
    budget, tensors = kernels.algorithm.backward(q.shape[1]), (x, mask, grad_y, grad_weights, dx)
    call = open_backward_call(kernels, budget, tensors, q, axis, settings, stats, need_params)
    parameters, given = kernels.collect(call, p, q, *settings)
    partials, n_sums = None, kernels.n_sums(call.n_params)
    if call.streamed:
        sums, partials = launch_backward_streamed(kernels, call, parameters, given, residual)
        call.launch_steps(f"{kernels.algorithm.name}_backward")
        if need_params and partials is None:
            partials = kernels.add_up(call, sums)
    elif need_x or need_params:
        programs = call.plan.sum_programs if need_params else call.programs
        partials = call.partials(n_sums, call.plan.n_groups)
        args = (call.inputs, parameters, call.outputs, partials, given)
        call.launch(kernels.backward, programs, *args, RESIDUAL=residual)
    if need_params:
        launch_param_gradients(kernels, call, partials, parameters, grads)
    return dx, *grads


def open_backward_call(
    kernels: Kernels, budget: Budget, tensors: tuple[Tensor | None, ...], q: Tensor, axis: int, settings: Sequence,
    stats: Tensor | None, need_params: bool,
) -> Call:  # fmt: skip
    """Return the call of a backward pass on x, a mask, grad_y, grad_weights and dx, which is its outputs."""
    (x, _mask, _grad_y, grad_weights, _dx), n = tensors, q.shape[1]
    feature_axis, weights = kernels.algorithm.find_setting("feature_axis", settings), grad_weights is not None
    padding = float_bits(kernels.algorithm.find_setting("padding", settings), x.dtype)
    call = Call(
        budget, kernels.gaussians(n), kernels.n_sums(n), q.shape, axis, feature_axis, tensors, weights, stats,
        need_params,
    )  # fmt: skip
    *inputs, call.outputs = call.tensors
    call.inputs = Inputs(*inputs, padding)
    return call


def launch_backward_streamed(
    kernels: Kernels, call: Call, parameters: Any, settings: Any, residual: bool
) -> tuple[Strided, Strided | None]:
    """Launch the backward pass of streamed chunks; return their sums, and the partial sums of parameters, None where
    not needed. They come from the sums, too, but where parameters vary along the chunk, or the last kernel is one's
    own: None where `add_up` makes them when all is launched.
    """
    if call.lacks_stats:
        kernels.find_numbers(call, parameters, settings)  # fills call.stats; what else it finds is for a forward pass
    numbers, dx = Numbers(call.of_chunks(call.stats)), call.outputs
    sums, partials = kernels.sum_chunks(call, parameters, settings, numbers)
    programs, row_partials = call.programs, None
    if call.along == "chunk" and call.need_params:
        n_sums = kernels.n_sums(call.n_params)
        programs, partials = call.plan.sum_programs, call.partials(n_sums, call.plan.n_groups)
        row_partials = partials
    kernel, constants = kernels.backward_streamed, {}
    if kernel is None:
        functions = {"PREPARE": kernels.prepare, "OPEN": kernels.open_chunk, "DIFFERENTIATE": kernels.differentiate}
        kernel, constants = backward_streamed, functions | {"NAME": kernels.algorithm.name}
    else:
        row_partials = partials
    if dx is not None or row_partials is not None:
        args = (call.inputs, parameters, numbers._replace(sums=sums), dx, row_partials)
        call.launch(kernel, programs, *args, **constants, RESIDUAL=residual)
    return sums, partials


def launch_param_gradients(
    kernels: Kernels, call: Call, partials: Strided, parameters: Any, grads: tuple[Tensor, Tensor]
) -> None:
    """Launch what turns partial sums into gradients, of up to 16 neighbours a program where they follow features."""
    n_params, entries = call.n_params, 1
    stride, head_stride, group_stride, entry_stride = partials.data.stride()
    if call.feature_axis is not None:
        entries = min(16, power_of_2(n_params))
    else:
        stride, entry_stride = kernels.sum_strides(stride)
    strides = tuple(map(encode, (stride, head_stride, group_stride, entry_stride)))
    launch.launch(
        param_gradients, (-(-n_params // entries), call.heads), Strided(partials.data, strides),
        encode(partials.data.shape[2]), parameters,
        *map(strided_of, grads), encode(n_params), device=partials.data.device, N=kernels.n_entry_sums,
        K=kernels.gaussians(n_params), FINISH=kernels.finish, NAME=kernels.algorithm.name, BLOCK=2048 // entries,
        ENTRIES=entries, num_warps=8,
    )  # fmt: skip


def empty_like(t: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Return room for as much, contiguous, in the same dtype or another."""
    return torch.empty_like(t, dtype=dtype, memory_format=torch.contiguous_format)
