"""Host time of a call, which a GPU waits for where tensors are small, without its launches and with them.

Forward is the public function on the Triton backend, x and the parameters requiring grad: checks, choice of the
backend, autograd, memory for the outputs, the arguments of every launch, and freeing all that again. Backward is
torch.autograd.grad of its y. Of the two launchers "nothing" stops where a compiled kernel is found, so that what is
left is this package's and PyTorch's; "driver" goes on through Triton's launcher to the call of the CUDA driver. On a
GPU that is the real one, which queues the launch and does not wait for it; without one it is a stub that does nothing
(`stub_driver.py`), so that what libcuda takes, a few microseconds a launch, is not counted.

No GPU is needed: on a CPU the backend is told that kernels are interpreted, the one case in which it takes CPU tensors,
and nothing is. There memory is malloc's, and autograd stays in the calling thread. x is small, so that copying it takes
no time to speak of; what the host does depends on no size.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

from bench import core
from bench.providers import PROVIDERS, Task
from bench.stub_driver import stub_driver
from bench.workloads import Workload
from daam import backend, ops
from daam.kernels import launch
from daam.kernels.algorithms import ALGORITHMS

WORKLOADS = [Workload("host", name, (2, 24, 128), 1, 8, 1 if one.features else 4) for name, one in ALGORITHMS.items()]
PASSES = ("forward", "backward")
WARM_UP, ROUNDS = 500, 2000


class _Found(dict):
    """Hold kept launches, for every key one that does nothing."""

    def get(self, key: tuple) -> tuple:
        return lambda *args: None, ()


@contextlib.contextmanager
def launching_nothing() -> Iterator[None]:
    """Let the Triton backend take tensors on any device and launch nothing: outputs hold what memory held."""
    with taking_any_tensor(), mock.patch.object(launch, "kept", _Found()):
        yield


@contextlib.contextmanager
def launching() -> Iterator[None]:
    """Launch on a GPU, or without one through Triton's launcher into a driver that does nothing.

    Raises:
        UnavailableError: there is no GPU, and the stub cannot be built; the message says why.
    """
    if core.DEVICE == "cuda":
        yield
        return
    with taking_any_tensor(), stub_driver():
        yield


@contextlib.contextmanager
def taking_any_tensor() -> Iterator[None]:
    """Let the Triton backend take tensors on any device."""
    with mock.patch.object(backend, "interpreting", lambda: True), mock.patch.object(ops, "interpreting", lambda: True):
        yield


LAUNCHERS = {"nothing": launching_nothing, "driver": launching}


def samples(workload: Workload, pass_name: str, launcher: str) -> tuple[list[float], list[float]]:
    """Return the seconds of a pass on the host, and of a copy of x that takes turns with it, a number a round."""
    turn = core.turns("cpu")  # the wall clock's, whatever the device
    with LAUNCHERS[launcher]():
        task = Task(workload, core.DEVICE)
        steps = [core.step(PROVIDERS[name].build(task), pass_name) for name in ("triton", "copy")]
        rounds = [turn(steps) for _ in range(WARM_UP + ROUNDS)][WARM_UP:]
    seconds, copy = map(list, zip(*rounds, strict=True))
    return seconds, copy


def figures(
    workload: Workload, pass_name: str, launcher: str, seconds: list[float], copy: list[float]
) -> dict[str, Any]:
    """Return what a benchmark tells about a pass, as JSON takes it: what ran, the launcher, and its times."""
    driver = "launching" if core.DEVICE == "cuda" else "launching into a stub"
    launches = {"nothing": "launching nothing", "driver": driver}
    described = core.described(workload, pass_name, "triton", f"triton, {launches[launcher]}")
    return {**described, "launcher": launcher, **core.timed(seconds, copy)}
