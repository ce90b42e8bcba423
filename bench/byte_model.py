"""Bytes that a pass must move, for every provider alike, and bytes that our kernels move.

least_bytes is what GB/s and shares of the roof are counted in. Forward: x is read and y written. Backward: x and grad_y
are read and dx written. Parameters are read, and their gradients written, once. What an implementation reads twice or
writes in between is its own affair: it shows as fewer GB/s.
"""

from __future__ import annotations

from bench.workloads import Workload
from daam.kernels import launch


def least_bytes(workload: Workload, which: str) -> int:
    """Return the bytes that a pass must move; which: one of results.PASSES."""
    tensors = {"forward": (2, 2), "backward": (3, 4)}  # of x's size, of the parameters'
    return sum(_bytes(workload, *tensors[part]) for part in which.split("+"))


def kernel_bytes(workload: Workload, which: str) -> int:
    """Return the bytes that our kernels move in a pass, one of results.PASSES: chunks too long for the chip are read
    again. Statistics and partial sums of the parameters' gradients are left out: a few percent of a large x, as much as
    x for a small one.
    """
    moved = {"forward": _forward, "backward": _backward}
    return sum(moved[part](workload) for part in which.split("+"))


def _forward(workload: Workload) -> int:
    again = 0
    if _streams(launch.FORWARD, workload):  # for the statistics; the mixture also for the least distance and its sum
        again = 2 if workload.algorithm == "mixture" else 1
    return _bytes(workload, 2 + again, 2)


def _backward(workload: Workload) -> int:
    tiles = launch.gate_backward(workload.gaussians) if workload.algorithm == "gate" else launch.BACKWARD
    again = 0
    if _streams(tiles, workload):  # x and grad_y for the sums, and x for the statistics where none were kept
        kept = _streams(launch.FORWARD, workload) and launch.worth_keeping(workload.x, workload.axis, workload.heads)
        again = 2 if kept else 3
    return _bytes(workload, 3 + again, 4)


def _streams(tiles: launch.Tiles, workload: Workload) -> bool:
    return launch.streams(tiles, workload.x, workload.axis, workload.heads, workload.feature_axis)


def _bytes(workload: Workload, tensors: int, params: int) -> int:
    heads, columns = workload.params_shape
    return tensors * workload.x.nbytes + params * 4 * heads * columns
