"""Heads that are spread over processes: passes over streamed chunks, whose strips are merged over all pieces.

A piece is streamed however short it is: what its strips find goes to all other pieces before it is merged, so that
each process merges the strips of the whole chunk, in one order. `forward` and `backward` are generators of one head, as
those of the eager backend are (`daam.reference.sharded`): they yield numbers of strips, (strips·n, chunks), and get
those of all pieces, with as many strips, what is absent 0.
"""

from __future__ import annotations

import functools
from collections.abc import Generator, Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from .algorithms import Algorithm
from .budgets import Budget
from .host import Call
from .merges import add_up, merge_moments
from .mixture_blocks import FAR
from .operands import encode
from .passes import (
    empty_like,
    launch_backward_streamed,
    launch_forward_streamed,
    launch_param_gradients,
    open_backward_call,
    open_call,
)
from .streamed import merge_strip_stats
from .tiles import STRIP_STRIDED

Exchange = Generator[Tensor, Tensor, Any]
DTYPE = None  # of what is exchanged: that of arithmetic


def counts(algorithm: Algorithm, longest: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return how many numbers of a chunk each exchange of a (forward, backward) pass has, by the longest piece."""
    n_strips = -(-longest // STRIP_STRIDED)  # no strip of the mixtures is shorter, whatever memory is like
    return ((4, 2 * n_strips) if algorithm.unbiased else (4,)), (algorithm.strip_sums,)


def forward(
    algorithm: Algorithm, module: ModuleType, x: Tensor, p: Tensor, q: Tensor, mask: Tensor | None, axis: int,
    settings: Sequence, residual: bool, return_weights: bool,
) -> Exchange:  # fmt: skip
    """Return y and the weights of a piece, contiguous, None if not asked for, and the statistics of whole chunks."""
    kernels = module.KERNELS
    y, weights = empty_like(x), empty_like(x) if return_weights else None
    budget = stream(algorithm.forward(q.shape[1]))
    call = open_call(kernels, budget, (x, mask, y, weights), q, axis, settings)
    call.exchanges = True
    launch_forward_streamed(kernels, call, *kernels.collect(call, p, q, *settings), residual)
    yield from _launch_steps(call, algorithm.unbiased)
    return y, weights, call.stats


def backward(
    algorithm: Algorithm, module: ModuleType, grad_y: Tensor | None, grad_weights: Tensor | None, x: Tensor, p: Tensor,
    q: Tensor, mask: Tensor | None, stats: Tensor, axis: int, settings: Sequence, residual: bool,
    first: bool,
) -> Exchange:  # fmt: skip
    """Return the gradients of a piece's x, and its part of those of p and q: where they come of numbers of whole chunks
    the first piece has all of them.
    """
    kernels = module.KERNELS
    dx, grads = empty_like(x), tuple(map(empty_like, (p, q)))
    budget, tensors = stream(algorithm.backward(q.shape[1])), (x, mask, grad_y, grad_weights, dx)
    call = open_backward_call(kernels, budget, tensors, q, axis, settings, stats, need_params=True)
    call.exchanges = True
    parameters, given = kernels.collect(call, p, q, *settings)
    sums, partials = launch_backward_streamed(kernels, call, parameters, given, residual)
    yield from _launch_steps(call, relative=False)
    of_whole = partials is None or kernels.merges_partials
    if partials is None:
        partials = kernels.add_up(call, sums)
    launch_param_gradients(kernels, call, partials, parameters, grads)
    return dx, *(grads if first or not of_whole else map(torch.zeros_like, grads))


@functools.cache
def stream(budget: Budget) -> Budget:
    """Return a budget under which every chunk is streamed, step by step."""
    longest = {name: 0 for name in Budget._fields if name.startswith("longest_")}
    return budget._replace(**longest, streamed_registers=None)


def _launch_steps(call: Call, relative: bool) -> Exchange:
    """Launch the steps of a call, those that merge strips on what all pieces have of them: of statistics and sums one
    strip, which is merged here, and where it is relative, as weights are that have no scale yet, all strips. relative:
    whether two numbers are the least of a place and a sum.
    """
    for step in call.steps:
        if not step.merges:
            call.run_step(step, call.plan.encoded)
            continue
        strips, *others = step.args
        n_strips, shape = call.extent.n_strips, strips.data.shape
        n = shape[0] // n_strips
        found = strips.data.reshape(n, n_strips, -1).transpose(0, 1)
        together = relative and n == 2
        if not together:
            found = (merge_moments if step.kernel is merge_strip_stats else add_up)(found).unsqueeze(0)
        found = yield found.flatten(0, 1)
        found = found.unflatten(1, (-1, n)).flatten(0, 1).transpose(0, 1).contiguous()  # (n, strips of all, chunks)
        if together:
            least, total = found
            least.masked_fill_(total == 0, FAR.value)  # of absent strips
        merged = call.of_chunks(found.reshape(-1, *shape[1:]))
        extent = call.plan.encoded._replace(n_strips=encode(found.shape[1]))
        call.run_step(step._replace(args=(merged, *others)), extent)
