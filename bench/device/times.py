"""Device time of every provider with a cold L2 cache, as bench.core measures it; and the copy's, by size."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from functools import lru_cache, partial

import torch

from bench import core
from bench.device import machine
from bench.device.cases import TIMED
from bench.device.session import Job, Session, append, describe_error
from bench.modules import FORMULA
from bench.providers import PROVIDERS
from bench.results import OWN, PASSES
from bench.workloads import Workload

COPIED = (3, 16, 100, 400, 2048)  # MiB
SECONDS = 0.3  # of all providers together, for one pass of a workload
LONGEST = 2048  # of a sequence whose standard attention is worth the time that its check takes
CASES = "times.jsonl"  # as `pytest bench --cases` writes it: bench.compare and bench.plot read it


def jobs(session: Session) -> list[Job]:
    """Return a job a workload; where nothing is launched it compiles what the passes and a call without them launch."""
    core.SECONDS["cuda"] = SECONDS
    run = prepare if session.compiling else time_workload
    return [Job(str(workload), partial(run, session, workload)) for workload in TIMED]


def time_workload(session: Session, workload: Workload) -> Iterator[dict]:
    """Yield which providers are timed, with their errors, and why others are not; then the times of every pass."""
    asked = {name: provider for name, provider in PROVIDERS.items() if provider.serves(workload)}
    absent = {name: provider.missing(core.DEVICE) for name, provider in asked.items()}
    for name in ("compile", "compile_formula"):
        if name in absent:
            absent[name] = absent[name] or machine.find_no_compiler()
    if workload.shape[workload.axis] > LONGEST and "multihead_attention" in absent:
        absent["multihead_attention"] = f"checking it takes long past {LONGEST} positions"
    names = tuple(name for name, reason in absent.items() if reason is None)
    found = core.candidates(workload, names)
    refused = {name: describe_error(error) for name, error in found.items() if isinstance(error, Exception)}
    errors = {name: candidate[1] for name, candidate in found.items() if name not in refused}
    not_timed = {name: reason for name, reason in absent.items() if reason} | refused
    yield {"ok": "triton" in errors and not set(OWN) & set(refused), "errors": errors, "not timed": not_timed}
    for pass_name in PASSES:
        if session.late:
            yield {"pass": pass_name, "skipped": "past the deadline"}
            return
        yield time_pass(session, workload, pass_name, names)


def time_pass(session: Session, workload: Workload, pass_name: str, names: tuple[str, ...]) -> dict:
    """Time one pass of the named providers; return their microseconds, and GB/s and share of the copy of ours."""
    timed = core.samples(workload, pass_name, names)
    figures = {name: core.figures(workload, pass_name, name, names) for name in timed}
    for name, case in figures.items():
        test = f"bench/test_speed.py::test_speed[{workload}-{pass_name}-{name}]"
        append(session.out / CASES, {"fullname": test, "extra_info": case})
    row = {"pass": pass_name, "us": {name: round(1e6 * case["seconds"]["p50"], 2) for name, case in figures.items()}}
    if "triton" in figures:
        row |= {key: figures["triton"][key] for key in ("gb_per_s", "percent_of_roof")}
    return row


def prepare(session: Session, workload: Workload) -> Iterator[dict]:
    """Compile what a workload launches, and yield one empty row. Nothing touches its tensors: they take no memory. What
    a module launches is compiled where it is timed: its other operations would compute.
    """
    if workload.whole:
        yield {"skipped": "a whole module"}
        return
    leaves, grad_y = empty_tensors(workload)
    call = workload.bind(leaves, "triton")
    torch.autograd.grad(call(), leaves, grad_y)
    with torch.no_grad():
        call()
    yield {}


def empty_tensors(workload: Workload) -> tuple[tuple[torch.Tensor, ...], torch.Tensor]:
    """Return (x and the parameters, grad_y) on the CPU, with whatever memory holds."""
    x, grad_y = (torch.empty(workload.shape, dtype=workload.x.dtype) for _ in range(2))
    params = (torch.empty(workload.params_shape) for _ in range(2))
    return tuple(t.requires_grad_() for t in (x, *params)), grad_y


def warm_jobs(session: Session) -> list[Job]:
    """Return the jobs that put what torch.compile makes of the workloads and of small calls into Inductor's cache."""
    from bench.device import calls

    return [*(Job(str(workload), partial(warm, workload)) for workload in TIMED), *calls.warm_jobs(session)]


def warm(workload: Workload) -> Iterator[dict]:
    """Compile what is timed compiled, and yield an empty row, or why there is no compiler."""
    # without the provider's reference in float64: processes share the memory
    if reason := machine.find_no_compiler():
        yield {"skipped": reason}
        return
    torch._dynamo.reset()  # else the second shape of a function is compiled for any size
    x, params, grad_y = workload.inputs(core.DEVICE)
    leaves = tuple(t.requires_grad_() for t in (x, *params))
    for backend in ("eager", FORMULA) if workload.whole else ("eager",):
        call = workload.bind(leaves, backend, partial(torch.compile, fullgraph=True))
        torch.autograd.grad(call(), leaves, grad_y)
    yield {}
    del x, params, grad_y, leaves, call
    torch.cuda.empty_cache()


def copy_jobs(session: Session) -> list[Job]:
    """Return a job a size whose copy is timed."""
    return [Job(f"copy-{mib} MiB", partial(time_copy, mib)) for mib in COPIED]


def time_copy(mib: int) -> Iterator[dict]:
    """Yield microseconds and GB/s of a copy of so many MiB."""
    source = torch.ones(mib * 2**18, device=core.DEVICE)
    target = torch.empty_like(source)
    seconds = median_seconds(core.Step(lambda: None, lambda _: target.copy_(source)))
    yield {"us": round(1e6 * seconds, 2), "gb_per_s": round(2 * source.nbytes / seconds / 1e9)}


def median_seconds(step: core.Step, rounds: int = 15) -> float:
    """Return the median of the seconds of one step in so many rounds, after three that warm up."""
    turn = _turn()
    return statistics.median([turn([step])[0] for _ in range(3 + rounds)][3:])


@lru_cache(maxsize=1)
def _turn() -> Callable[[list[core.Step]], list[float]]:
    return core.turns(core.DEVICE)
