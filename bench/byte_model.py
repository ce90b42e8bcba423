"""Bytes that a pass must move, for every provider alike, and bytes that our kernels move.

least_bytes is what GB/s and shares of the roof are counted in. Forward: x is read and y written. Backward: x and grad_y
are read and dx written. Parameters are read, and their gradients written, once. What an implementation reads twice or
writes in between is its own affair: it shows as fewer GB/s. A module says itself how often it must move x; a mask, of a
byte a position of no further axis, is left out.
"""

from __future__ import annotations

from collections.abc import Callable

from bench.workloads import Workload
from daam.kernels import budgets, fusion, tiles
from daam.kernels.budgets import MOST_LAYERS
from daam.kernels.operands import find_layout, varies


def least_bytes(workload: Workload, which: str) -> int:
    """Return the bytes that a pass must move; which: one of results.PASSES."""
    return sum(_bytes(workload, workload.moved[part], part) for part in which.split("+"))


def kernel_bytes(workload: Workload, which: str) -> int:
    """Return the bytes that our kernels move in a pass, one of results.PASSES: chunks too long for the chip are read
    again, from memory unless L2 still holds them (`tiles.takes_whole`). Statistics and partial sums of the parameters'
    gradients are left out: a few percent of a large x, as much as x for a small one; so are a gate's numbers of a
    position. Of a model our layer alone would count: there is no such figure.
    """
    count = _count_in_module if workload.whole else _count_in_pass
    return sum(_bytes(workload, count(workload, part), part) for part in which.split("+"))


def _count_in_module(workload: Workload, part: str) -> int:
    """Return how many tensors of x's size a module moves in a pass: a gate is fused, a block says itself whether."""
    if workload.algorithm == "gate":
        return workload.moved[part]
    way, _reason = workload.build("triton").to("meta").fusion_for(workload.x)
    if way != "fused":
        return workload.layers * _count_in_pass(workload, part)
    together = min(MOST_LAYERS, fusion.count_together(workload.x, workload.axis, workload.heads))
    return -(-workload.layers // together) * workload.moved[part]


def _count_in_pass(workload: Workload, part: str) -> int:
    """Return how many tensors of x's size an algorithm moves in a pass."""
    return {"forward": _count_forward, "backward": _count_backward}[part](workload)


def _count_forward(workload: Workload) -> int:
    """Return the tensors of a forward pass."""
    more, _ = workload.record.reads_again if _reads_again(workload.record.forward, workload, 2) else (0, 0)
    return 2 + more


def _count_backward(workload: Workload) -> int:
    """Return the tensors of a backward pass, which finds statistics anew where the forward pass has kept none."""
    record, more = workload.record, 0
    if _reads_again(record.backward, workload, 3):
        kept = _streams(record.forward, workload) and tiles.worth_keeping(workload.x, workload.axis, workload.heads)
        more = record.reads_again[1] + (0 if kept else record.reads_again[0])
    return 3 + more


def _streams(budget: Callable[[int], budgets.Budget], workload: Workload) -> bool:
    """Tell whether a pass streams its chunks."""
    found = budget(workload.params_shape[1])
    return tiles.streams(found, workload.x, workload.axis, workload.heads, workload.feature_axis, workload.masked)


def _reads_again(budget: Callable[[int], budgets.Budget], workload: Workload, tensors: int) -> bool:
    """Tell whether a pass that moves so many tensors of x's size reads chunks from memory again: where it streams them,
    and no program takes all steps of its own.
    """
    if not _streams(budget, workload):
        return False
    x, along = workload.x, varies(workload.axis, workload.feature_axis)
    layout = find_layout(x, [], workload.axis, workload.heads, workload.feature_axis)
    found = budget(workload.params_shape[1])
    capped = tiles.find_registers(found, layout, along, x.dtype, workload.masked) is not None
    return not (capped and tiles.takes_whole(layout, tensors * x.element_size()))


def _bytes(workload: Workload, tensors: int, part: str) -> int:
    """Return the bytes of tensors of x's size and of the parameters, with their gradients in a backward part."""
    return tensors * workload.x.nbytes + {"forward": 1, "backward": 2}[part] * workload.params_bytes
