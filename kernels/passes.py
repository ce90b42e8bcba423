"""The forward and the backward pass of any algorithm: which of its kernels are launched, on chip and streamed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from .algorithms import Algorithm
from .host import Backward, Call, Forward, Numbers
from .operands import Strided
from .streamed import backward_streamed, forward_streamed


@dataclass(frozen=True)
class Kernels:
    """Hold the kernels of an algorithm, and what passes ask of it.

    collect(call, p, q, *settings) -> (parameters, settings) as kernels take them; a padding value is the field padding
        of these. constants(P) -> constants that its kernels take. n_sums(P) -> partial sums of a group.
    find_numbers(call, parameters, settings, numbers): fill the numbers of streamed chunks that a pass needs.
    sum_chunks(run, call, parameters, settings, numbers) -> (sums of streamed chunks, partial sums or None).
    launch_param_gradients(call, partials, parameters, d_p, d_q): turn partial sums into gradients.
    forward, backward: kernels of chunks on chip. prepare, open_chunk, weigh_chunk, open_sums, differentiate: what
        `streamed.forward_streamed` and `backward_streamed` take.
    """

    algorithm: Algorithm
    collect: Callable[..., Any]
    constants: Callable[[int], dict[str, int]]
    n_sums: Callable[[int], int]
    find_numbers: Callable[[Call, Any, Any, Numbers], None]
    sum_chunks: Callable[[Backward, Call, Any, Any, Numbers], tuple[Strided, Strided | None]]
    launch_param_gradients: Callable[..., None]
    forward: Callable
    backward: Callable
    prepare: Callable
    open_chunk: Callable
    weigh_chunk: Callable
    open_sums: Callable
    differentiate: Callable

    def streamed_constants(self, n_params: int) -> dict[str, object]:
        """Return the constants of a streamed pass but for its own functions."""
        return {"K": 1, "NAME": self.algorithm.name, "PREPARE": self.prepare} | self.constants(n_params)


def forward(
    kernels: Kernels, x: Tensor, p: Tensor, q: Tensor, mask: Tensor | None, axis: int, *settings_and_flags: object
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Return y, weights and statistics, contiguous; None where not asked for, and the statistics of chunks on chip.

    settings_and_flags: the algorithm's settings, residual, return_weights, save_stats.
    """
    *settings, residual, return_weights, save_stats = settings_and_flags
    run = Forward(kernels.algorithm, x, mask, q.shape, axis, return_weights, kernels.algorithm.feature_axis(*settings))
    for call in run.calls():
        parameters, given = kernels.collect(call, p, q, *settings)
        if call.streamed:
            scales = call.of_strips(1, strips=1) if kernels.algorithm.scales else None
            numbers = Numbers(call.of_chunks(run.stats), scales)
            kernels.find_numbers(call, parameters, given, numbers)
            padding, constants = getattr(given, "padding", None), kernels.streamed_constants(q.shape[1])
            call.launch(
                forward_streamed, call.programs, call.inputs, parameters, padding, numbers, call.outputs,
                OPEN=kernels.open_chunk, WEIGH=kernels.weigh_chunk, RESIDUAL=residual, **constants,
            )  # fmt: skip
        else:
            constants = kernels.constants(q.shape[1])
            args = (call.inputs, parameters, call.outputs, given)
            call.launch(kernels.forward, call.programs, *args, RESIDUAL=residual, **constants)
    return run.results(save_stats)


def backward(
    kernels: Kernels, grad_y: Tensor | None, grad_weights: Tensor | None, x: Tensor, p: Tensor, q: Tensor,
    mask: Tensor | None, stats: Tensor | None, axis: int, *settings_and_flags: object,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    """Return the gradients of x, p and q, contiguous; None where not needed. stats are found where None.

    settings_and_flags: the algorithm's settings, residual, need_x, need_params.
    """
    *settings, residual, need_x, need_params = settings_and_flags
    feature_axis, n_params = kernels.algorithm.feature_axis(*settings), q.shape[1]
    run = Backward(
        kernels.algorithm, x, mask, grad_y, grad_weights, stats, q.shape, axis, need_x, need_params, feature_axis
    )  # fmt: skip
    grads, n_sums = run.param_grads(p, q), kernels.n_sums(n_params)
    for call in run.calls():
        parameters, given = kernels.collect(call, p, q, *settings)
        if call.streamed:
            partials = _backward_streamed(kernels, run, call, parameters, given, residual, n_params)
        else:
            programs = call.programs_of_sums(n_sums) if need_params else call.programs
            partials = run.partials(call, n_sums, call.groups(programs))
            args = (call.inputs, parameters, call.dx, partials, given)
            if need_x or need_params:
                call.launch(kernels.backward, programs, *args, RESIDUAL=residual, **kernels.constants(n_params))
        if need_params:
            kernels.launch_param_gradients(call, partials, parameters, *map(call.of_heads, grads))
    return run.dx, *grads


def _backward_streamed(
    kernels: Kernels, run: Backward, call: Call, parameters: Any, given: Any, residual: bool, n_params: int
) -> Strided | None:
    """Launch the backward pass of streamed chunks and return the partial sums of parameters, None where not needed.

    They come from the sums of chunks, but where parameters vary along the chunk.
    """
    stats = call.of_chunks(run.stats)
    if run.lacks_stats:
        kernels.find_numbers(call, parameters, given, Numbers(stats))
    sums, partials = kernels.sum_chunks(run, call, parameters, given, Numbers(stats))
    programs, row_partials = call.programs, None
    if call.along == "chunk" and run.need_params:
        n_sums = kernels.n_sums(n_params)
        programs = call.programs_of_sums(n_sums)
        partials = row_partials = run.partials(call, n_sums, call.groups(programs))
    if run.dx is not None or row_partials is not None:
        padding, numbers = getattr(given, "padding", None), Numbers(stats, sums=sums)
        call.launch(
            backward_streamed, programs, call.inputs, parameters, padding, numbers, call.dx, row_partials,
            OPEN=kernels.open_sums, DIFFERENTIATE=kernels.differentiate, RESIDUAL=residual,
            **kernels.streamed_constants(n_params),
        )  # fmt: skip
    return partials
