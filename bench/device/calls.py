"""Wall time of small calls, one after the other: until the host is done with them, and until the device is."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional

from bench.device import machine
from bench.device.session import Job, Session, describe_error
from bench.workloads import Workload

SMALL = [
    Workload("host", "density", (32, 24, 1024), 1, 8),
    Workload("host", "mixture", (32, 24, 1024), 1, 8, 4),
    Workload("host", "density", (8, 1024, 768), 1, 1),
    Workload("host", "gate", (32, 24, 1024), 1, 8, 4),
    Workload("host", "mixture", (8, 1024, 768), 1, 8, 4),
]
COMPILED = SMALL[:2]  # also through torch.compile, which takes seconds
CALLS, ROUNDS, WARM_UP = 60, 5, 30

Calls = dict[str, Callable[[], Tensor]]


def jobs(session: Session) -> list[Job]:
    """Return a job a workload and provider."""
    return [
        Job(f"{workload}-{name}", partial(measure, session, workload, name))
        for workload in SMALL
        for name in ("triton", "compile", "compile of triton", "eager", "layer_norm")
        if not name.startswith("compile") or (workload in COMPILED and session.device == "cuda")
    ]


def warm_jobs(session: Session) -> list[Job]:
    """Return jobs that only compile."""
    return [
        Job(f"{workload}-{name}", partial(measure, session, workload, name, once=True))
        for workload in COMPILED
        for name in ("compile", "compile of triton")
    ]


def measure(session: Session, workload: Workload, name: str, once: bool = False) -> Iterator[dict]:
    """Yield microseconds [host, until the device is done] of a call without grad, of one with, and of both passes."""
    if name.startswith("compile") and (reason := machine.find_no_compiler()):
        yield {"skipped": reason}
        return
    x, params, grad_y = workload.inputs(session.tensors)
    leaves = tuple(t.requires_grad_() for t in (x, *params))
    call = partial(build_provider(workload, name), *leaves)
    differentiated = leaves[:1] if name == "layer_norm" else leaves

    def both() -> tuple[Tensor, ...]:
        return torch.autograd.grad(call(), differentiated, grad_y)

    seconds = call_once if once or session.compiling else time_calls
    with torch.no_grad():
        found = {"forward, no grad": seconds(call)}
    found |= {"forward": seconds(call), "forward+backward": seconds(both)}
    yield {"us [host, all]": found}
    if session.device == "cuda" and not once and name in ("triton", "eager"):
        yield {"us [host, all]": {"graph of forward+backward": time_graph(both)}}


def build_provider(workload: Workload, name: str) -> Callable[..., Tensor]:
    """Return what is called with x and the parameters."""
    if name == "layer_norm":
        return lambda x, *params: functional.layer_norm(x, x.shape[-1:])
    if not name.startswith("compile"):
        return partial(workload.call, backend=name)
    torch._dynamo.reset()  # else the second shape of a function is compiled for any size
    backend = "triton" if name.endswith("triton") else "eager"
    return torch.compile(partial(workload.call, backend=backend), fullgraph=True)


def time_graph(both: Callable) -> list[float] | str:
    """Return the times of a captured call; an error, in words, where it cannot be captured."""
    try:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            both()
    except RuntimeError as error:
        return describe_error(error)
    return time_calls(graph.replay)


def call_once(call: Callable) -> None:
    """Call without timing it."""
    call()


def time_calls(call: Callable) -> list[float]:
    """Return microseconds of a call, the best of some rounds: [until the host is done, until the device is]."""
    wait = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    for _ in range(WARM_UP):
        call()
    wait()
    best = [math.inf, math.inf]
    for _ in range(ROUNDS):
        start = time.perf_counter()
        for _ in range(CALLS):
            call()
        done = time.perf_counter() - start
        wait()
        best = [min(best[0], done), min(best[1], time.perf_counter() - start)]
    return [round(1e6 * seconds / CALLS, 1) for seconds in best]
