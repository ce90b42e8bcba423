"""Device time of kernels with other tiles: which numbers in kernels/tiles.py a GPU would choose."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from functools import lru_cache, partial
from unittest import mock

import torch

from bench import core
from bench.device.cases import TIMED
from bench.device.session import Job, Session
from bench.device.times import empty_tensors, median_seconds
from bench.modelled import find_steps, launches
from bench.workloads import Workload, lengths
from daam.kernels import budgets, host

STRIDED = ("strided", "strided_masked", "strided_full")
CONTIGUOUS = ("contiguous", "contiguous_full", "contiguous_most", "together")
# what is tried of `budgets.Budget`, by regime: elements a thread, and elements that it loads at once
TRIED = {
    "strided": [
        dict.fromkeys(STRIDED, n) | {"strided_least_vector": v, "strided_vector": 8}
        for n in (16, 24, 32, 48, 64, 96)
        for v in (2, 4, 8)
    ],
    "contiguous": [dict.fromkeys(CONTIGUOUS, n) | {"contiguous_vector": v} for n in (8, 16, 32, 64) for v in (4, 8)],
    "streamed": [{"streamed": n, "streamed_full": n, "streamed_vector": v} for n in (8, 16, 32) for v in (4, 8)],
    # on chip, also of chunks that are streamed else
    "long rows": [
        dict.fromkeys((*CONTIGUOUS, "long"), n)
        | {"contiguous_vector": v, "longest_contiguous": 32_768, "longest_along": 32_768}
        for n in (16, 32, 64)
        for v in (4, 8)
    ],
    "long columns": [
        dict.fromkeys(STRIDED, n) | {"strided_least_vector": v, "strided_vector": v, "longest_strided": 1024}
        for n in (32, 48, 64)
        for v in (2, 4, 8)
    ],
}
SWEPT = [
    *((TIMED[i], "strided") for i in (1, 4, 7, 9)),
    *((TIMED[i], "contiguous") for i in (3, 8, 5)),
    *((TIMED[i], "streamed") for i in (2, 11, 10)),
    *((replace(TIMED[i], dtype="float32"), "strided") for i in (1, 4, 7)),
    *((replace(TIMED[i], dtype="float32"), "contiguous") for i in (3, 8, 5)),
    *lengths().items(),
]
ROUNDS = 9


def jobs(session: Session) -> list[Job]:
    """Return a job a workload, pass and tile, the shipped one first: many settings make the same tile."""
    found: dict[tuple, Job] = {}
    for workload, regime in SWEPT:
        for settings in ({}, *TRIED[regime]):
            for which, tile in find_tiles(workload, settings).items():
                name = f"{workload}-{which}-{tile}" + ("" if settings else "-shipped")
                job = Job(name, partial(time_tile, session, workload, which, settings))
                found.setdefault((workload, which, tile), job)
    return list(found.values())


def find_tiles(workload: Workload, settings: dict) -> dict[str, str]:
    """Return the tile of each pass as text, chunk x blocks x inner and warps. Nothing is compiled for it."""
    x, p = workload.x, torch.empty(workload.params_shape, device="meta")
    with plan_with(settings):
        made = launches(workload.algorithm, x, p, None, workload.axis, workload.feature_axis, full=False)
    steps = [step for one in made for step in find_steps(one)]
    found = {which: one.meta for one in steps for which in ("forward", "backward") if which in one.name}
    words = "{PLAN.BLOCK_P}x{PLAN.N_BLOCKS}x{PLAN.BLOCK_C}, {num_warps} warps"
    return {which: words.format_map(constants) for which, constants in found.items()}


@contextlib.contextmanager
def plan_with(settings: dict) -> Iterator[None]:
    """Plan passes with other numbers in `budgets.Budget`, which are part of what plans are kept by."""
    build = host.Call.__init__

    def build_with(one: host.Call, budget: budgets.Budget, *args, **options) -> None:
        build(one, budget._replace(**settings), *args, **options)

    with mock.patch.object(host.Call, "__init__", build_with):
        yield


def time_tile(session: Session, workload: Workload, which: str, settings: dict) -> Iterator[dict]:
    """Yield microseconds of one pass with other settings; the other pass keeps its own."""
    leaves, grad_y = empty_tensors(workload) if session.compiling else draw_tensors(workload)
    forward = partial(workload.call, *leaves, backend="triton")
    y = forward() if which == "backward" else None

    def run(_) -> object:
        if which == "forward":
            with torch.no_grad():
                return forward()
        return torch.autograd.grad(y, leaves, grad_y, retain_graph=True)

    with plan_with(settings):
        if session.compiling:
            run(None)
            yield {}
        else:
            yield {"us": round(1e6 * median_seconds(core.Step(lambda: None, run), ROUNDS), 2), "settings": settings}


@lru_cache(maxsize=1)
def draw_tensors(workload: Workload) -> tuple[tuple[torch.Tensor, ...], torch.Tensor]:
    """Return (x and the parameters, grad_y) on the device; jobs of one workload follow each other."""
    x, params, grad_y = workload.inputs(core.DEVICE)
    return tuple(t.requires_grad_() for t in (x, *params)), grad_y
