"""Measurement: results are checked before anything is timed, and providers take turns.

On a GPU a turn is the device's time between events, after a read that fills the L2 cache with what nobody uses and a
wait in which the host launches ahead; on a CPU it is the wall clock's, with whatever the caches hold.
"""

from __future__ import annotations

import contextlib
import functools
import math
import os
import platform
import statistics
import subprocess
import time
import weakref
from collections.abc import Callable, Iterable, MutableMapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import daam
from bench.byte_model import kernel_bytes, least_bytes
from bench.providers import PROVIDERS, Candidate, Task
from bench.workloads import Workload
from daam.recipes.memory import saved_bytes

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SECONDS = {"cpu": 3.0, "cuda": 0.5}  # that providers together take for one pass of a workload
LEAST_ROUNDS, MOST_ROUNDS = 7, 100


@dataclass(frozen=True)
class Step:
    """Hold one turn, run(prepare()), of which run is timed."""

    prepare: Callable[[], Any]
    run: Callable[[Any], object]


def step(candidate: Candidate, pass_name: str) -> Step:
    """Return the step of a provider's pass; one that has nothing to differentiate does the same in every pass."""
    if pass_name == "forward" or not candidate.leaves:
        return Step(lambda: None, lambda _: candidate.forward())
    if pass_name == "backward":
        return Step(candidate.forward, candidate.backward)
    return Step(lambda: None, lambda _: candidate.backward(candidate.forward()))


def error(candidate: Candidate) -> float:
    """Return the largest difference from what is expected, relative to the largest value expected, over y and every
    gradient; NaN where anything is NaN, which is under no tolerance.
    """
    y = candidate.forward()
    results = [y, *(candidate.backward(y) if candidate.leaves else ())]
    errors = [
        ((result.detach() - expected).abs().max() / expected.abs().max().clamp(min=1e-30)).item()
        for result, expected in zip(results, candidate.expected, strict=True)
    ]
    return max(errors, key=lambda difference: math.inf if math.isnan(difference) else difference)


class WrongResultError(AssertionError):
    """Tell that a provider's result is not the reference's."""


def checked(name: str, candidate: Candidate, workload: Workload) -> float:
    """Return the error of a provider's result; raise a WrongResultError where it is too large."""
    difference = error(candidate)
    tolerance = PROVIDERS[name].half if workload.dtype == "bfloat16" else 1e-4
    if not difference <= tolerance:
        raise WrongResultError(f"{name}: error {difference:.1e} against the reference, at most {tolerance:.0e}")
    return difference


@functools.lru_cache(maxsize=1)
def _candidates(workload: Workload, names: tuple[str, ...]) -> dict[str, tuple[Candidate, float] | Exception]:
    task, found = Task(workload, DEVICE), {}
    for name in names:
        try:
            candidate = PROVIDERS[name].build(task)
            found[name] = candidate, checked(name, candidate, workload)
        except Exception as problem:  # out of memory, no compiler, a package's own: the others are timed all the same
            found[name] = problem.with_traceback(None)  # whose frames would keep tensors alive
    return found


_in_memory: set[Workload] = set()  # the workload whose candidates are kept; none at first


def candidates(workload: Workload, names: tuple[str, ...]) -> dict[str, tuple[Candidate, float] | Exception]:
    """Return the candidates by name, each with the error of its result, or else the exception that says why it is not
    timed. Those of one workload are kept.
    """
    if workload not in _in_memory:
        # before those of another are built: both may have no room
        _candidates.cache_clear()
        _in_memory.clear()
        _in_memory.add(workload)
    return _candidates(workload, names)


@functools.lru_cache(maxsize=1)
def samples(workload: Workload, pass_name: str, names: tuple[str, ...]) -> dict[str, list[float]]:
    """Return the seconds of every provider that is right, a number a round: the nth of each is from the same moment.
    Check once more what was timed.
    """
    right = {name: found[0] for name, found in candidates(workload, names).items() if not isinstance(found, Exception)}
    times = interleave({name: step(candidate, pass_name) for name, candidate in right.items()}, turns(DEVICE))
    for name, candidate in right.items():
        checked(name, candidate, workload)
    return times


def interleave(steps: dict[str, Step], turn: Callable[[list[Step]], list[float]]) -> dict[str, list[float]]:
    """Return the seconds of steps that take turns, by name, in rounds that begin with another step each time. Two
    rounds warm up, and tell how many there will be. turn: what times a round.
    """
    names = list(steps)
    turn(list(steps.values()))
    start = time.perf_counter()
    turn(list(steps.values()))
    rounds = int(SECONDS[DEVICE] / (time.perf_counter() - start))
    times: dict[str, list[float]] = {name: [] for name in names}
    for first in range(min(MOST_ROUNDS, max(LEAST_ROUNDS, rounds))):
        order = [names[(first + i) % len(names)] for i in range(len(names))]
        for name, seconds in zip(order, turn([steps[name] for name in order]), strict=True):
            times[name].append(seconds)
    return times


def turns(device: str) -> Callable[[list[Step]], list[float]]:
    """Return a function that times one round of steps on a device: it takes the steps and returns their seconds."""
    return _turns_cpu if device == "cpu" else functools.partial(_turns_cuda, _flush_buffer())


def _turns_cpu(steps: list[Step]) -> list[float]:
    """Return the seconds that each step takes by the wall clock."""
    times = []
    for step in steps:
        state = step.prepare()
        start = time.perf_counter()
        step.run(state)
        times.append(time.perf_counter() - start)
    return times


def _turns_cuda(flush: Tensor, steps: list[Step]) -> list[float]:
    """Return the seconds that each step takes on the GPU, with a cold cache; flush: what is read to empty it."""
    events = []
    for step in steps:
        state = step.prepare()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        # a write would leave lines that what is timed must write back first: some 15 us of a cache of 50 MB
        flush.sum()
        # the device waits twice as long as the host took to launch last time, or gaps between kernels would be timed
        torch.cuda._sleep(int(min(2 * HOST_SECONDS.get(step, 1e-3), 0.01) * CYCLES))
        start.record()
        began = time.perf_counter()
        step.run(state)
        HOST_SECONDS[step] = time.perf_counter() - began
        end.record()
        events.append((start, end))
    torch.cuda.synchronize()
    return [start.elapsed_time(end) / 1e3 for start, end in events]


# what a step's launches took on the host; a step that is gone takes its tensors along
HOST_SECONDS: MutableMapping[Step, float] = weakref.WeakKeyDictionary()
CYCLES = 2e9  # of a GPU, a second


@functools.cache
def _flush_buffer() -> Tensor:
    """Return a tensor that is read to empty the L2 cache: of four times its size, and of 256 MB at least."""
    size = max(2**28, 4 * torch.cuda.get_device_properties(DEVICE).L2_cache_size)
    return torch.zeros(size // 4, device=DEVICE)


def peak_bytes(step: Step) -> int:
    """Return the bytes that the timed part of a turn asks for at most, on a GPU."""
    state = step.prepare()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_stats()["requested_bytes.all.current"]
    step.run(state)
    torch.cuda.synchronize()
    return torch.cuda.memory_stats()["requested_bytes.all.peak"] - before


def summary(values: Iterable[float]) -> dict[str, float]:
    """Return three percentiles of values, interpolated, and iqr, the range between their quartiles."""
    values = list(values)
    if len(values) == 1:
        values *= 2
    p20, p50, p80 = (statistics.quantiles(values, n=10, method="inclusive")[i] for i in (1, 4, 7))
    quarter, _, three = statistics.quantiles(values, n=4, method="inclusive")
    found = {"p20": p20, "p50": p50, "p80": p80, "iqr": three - quarter}
    return {name: rounded(value) for name, value in found.items()}


def rounded(value: float) -> float:
    """Return a value of six digits: more say nothing, and runs are kept."""
    return float(f"{value:.6g}")


def figures(workload: Workload, pass_name: str, name: str, names: tuple[str, ...]) -> dict[str, Any]:
    """Return what a benchmark tells about a provider's pass, as JSON takes it: what ran, error, times and memory."""
    candidate, difference = candidates(workload, names)[name]
    times = samples(workload, pass_name, names)
    if "copy" not in times:
        raise WrongResultError(f"the copy is not right: {candidates(workload, names)['copy']}")
    seconds, copy = times[name], times["copy"]
    duration = timed(seconds, copy)
    median = duration["seconds"]["p50"]
    moved = least_bytes(workload, pass_name) if name != "copy" else 2 * workload.x.nbytes
    roof = 2 * workload.x.nbytes / summary(copy)["p50"]
    if DEVICE == "cpu":
        memory = {"saved_bytes": saved_bytes(candidate.forward, candidate.leaves[candidate.inputs :])}
    else:
        memory = {"peak_bytes": peak_bytes(step(candidate, pass_name))}
    if candidate.backend == "triton" and not workload.in_model:
        memory["kernel_bytes"] = kernel_bytes(workload, pass_name)
    return {
        **described(workload, pass_name, name, candidate.backend),
        "error": rounded(difference),
        **duration,
        "bytes": moved,
        "gb_per_s": rounded(moved / median / 1e9),
        "percent_of_roof": rounded(100 * moved / median / roof),
        **memory,
    }


def described(workload: Workload, pass_name: str, name: str, backend: str) -> dict[str, Any]:
    """Return what was timed, and on what, by name."""
    return {
        "workload": str(workload),
        "family": workload.family,
        "algorithm": workload.algorithm,
        "shape": workload.shape,
        "axis": workload.axis,
        "heads": workload.heads,
        "gaussians": workload.gaussians,
        "dtype": workload.dtype,
        "pass": pass_name,
        "provider": name,
        "backend": backend,
        **about(),
    }


def timed(seconds: list[float], copy: list[float]) -> dict[str, dict[str, float]]:
    """Return summaries of seconds, and of their multiples of the copy's, which took turns."""
    return {"seconds": summary(seconds), "of_copy": summary(a / b for a, b in zip(seconds, copy, strict=True))}


@functools.cache
def about() -> dict[str, Any]:
    """Return device, versions and commit; where git tells none, that is what DAAM_COMMIT says, or "unknown"."""
    if DEVICE == "cuda":
        device = torch.cuda.get_device_name()
    else:
        instructions = torch.backends.cpu.get_cpu_capability()
        device = f"{platform.machine()} CPU, {instructions}, {torch.get_num_threads()} threads"
    versions = {"torch": torch.__version__, "daam": daam.__version__, "python": platform.python_version()}
    try:
        import triton

        versions["triton"] = triton.__version__
    except ImportError:
        pass
    return {"device": device, "versions": versions, "commit": _commit()}


def _commit() -> str:
    command = ["git", "describe", "--always", "--dirty", "--abbrev=10"]
    described = ""
    with contextlib.suppress(FileNotFoundError):
        described = subprocess.run(
            command, cwd=Path(__file__).parent, capture_output=True, text=True, check=False
        ).stdout.strip()
    return described or os.environ.get("DAAM_COMMIT", "unknown")


class Replay:
    """Stand for pytest-benchmark's timer: time passes only by the durations that were measured."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        """Return the seconds that have passed."""
        return self.now

    def pass_by(self, seconds: float) -> None:
        """Let seconds pass."""
        self.now += seconds
