"""What a call costs the host, which a GPU waits for where tensors are small: everything but the launches themselves.

Forward is the public function on the Triton backend, x and the parameters requiring grad: checks, choice of the
backend, operator, autograd, memory for the outputs, the arguments of every launch, and freeing all that again. Backward
is torch.autograd.grad of its y. Not in them is Triton's own part of a launch (`JITFunction.run`: it specialises
arguments, finds the kernel and calls the driver), which does nothing here.

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
from bench.workloads import ALGORITHMS, Workload
from daam import backend, ops

WORKLOADS = [Workload("host", name, (2, 24, 128), 1, 8, 1 if name == "density" else 4) for name in ALGORITHMS]
PASSES = ("forward", "backward")
WARM_UP, ROUNDS = 500, 2000


@contextlib.contextmanager
def taking_cpu_tensors() -> Iterator[None]:
    """Let the Triton backend take tensors on the CPU, as it does where kernels are interpreted."""
    with (
        mock.patch.object(backend, "interpreting", lambda: True),
        mock.patch.object(ops, "interpreting", lambda: True),
    ):
        yield


@contextlib.contextmanager
def launching_nothing() -> Iterator[None]:
    """Let the Triton backend take tensors on any device and launch nothing: outputs hold what memory held."""
    from triton.runtime import JITFunction

    with taking_cpu_tensors(), mock.patch.object(JITFunction, "run", lambda *args, **meta: None):
        yield


def samples(workload: Workload, which: str) -> tuple[list[float], list[float]]:
    """Seconds of a pass on the host, and of the call that copies x, which takes turns with it."""
    turn = core.turns("cpu")  # the wall clock's, whatever the device
    with launching_nothing():
        task = Task(workload, core.DEVICE)
        steps = [core.step(PROVIDERS[name].build(task), which) for name in ("triton", "copy")]
        rounds = [turn(steps) for _ in range(WARM_UP + ROUNDS)][WARM_UP:]
    own, copy = map(list, zip(*rounds, strict=True))
    return own, copy


def figures(workload: Workload, which: str, own: list[float], copy: list[float]) -> dict[str, Any]:
    """What a benchmark tells beside its times, as JSON takes it."""
    return {**core.described(workload, which, "triton", "triton, launching nothing"), **core.timed(own, copy)}
