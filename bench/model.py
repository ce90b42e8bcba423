"""How long a kernel takes on a GPU, from its machine code: a model of kernels that move memory and wait for it.

    launch = Launched(code, registers, shared, num_warps, programs, turns, read, written)
    estimate(launch, GPUS["h200"]).seconds

One warp's way through the machine code (`bench/timeline.py`) says how long a program takes that stands alone. As many
programs as registers, shared memory and warps allow stand on a multiprocessor, one lot after the other:

    waiting = lots·(start + turns·turn + end)/clock

That is BW(f) = bytes in flight/latency of those published laws whose latency is that of a kernel that only moves
memory: here it is the kernel's own, with its rounds of loads, shuffles, barriers and arithmetic. Beside it stand memory
(what is read and written, at the bandwidth of such a mix, less where accesses are short; what L2 keeps at L2's) and the
units of a multiprocessor, the slowest of issue, fp32, fp64, integer, special functions, and shuffles with shared
memory:

    seconds = (waiting^p + memory^p + units^p)^(1/p)

p, the sharpness, comes from streams, as the law's does. A pass is the sum of its launches.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace

from bench.gpus import READ_RUNS, WRITE_RUNS, Gpu
from bench.machine_code import Instruction
from bench.timeline import RATES, SCHEDULERS, Timeline, find_timeline


@dataclass(frozen=True)
class Launched:
    """Describe a launch. registers: a thread. shared: bytes a program. programs: in all. turns: of the main loop, in
    one program. read, written: bytes in memory; cached: of those read, bytes that L2 may still hold. again: whether it
    surely does, since the same programs have just read them. run: bytes side by side in an access of a warp to columns,
    None where accesses adjoin.
    """

    code: list[Instruction]
    registers: int
    shared: int
    num_warps: int
    programs: int
    turns: float
    read: float
    written: float
    cached: float = 0.0
    run: int | None = None
    again: bool = False

    @property
    def resident(self) -> int:
        """Return how many of its warps a multiprocessor holds."""
        return resident_warps(self.registers, self.shared, self.num_warps)

    def cached_share(self, gpu: Gpu) -> float:
        """Return which part of what is read L2 still holds."""
        kept = self.cached if self.again else min(self.cached, gpu.l2)
        return kept / self.read if self.read else 0.0


@dataclass(frozen=True)
class Estimate:
    """Hold seconds that a launch takes, what they are made of: waiting, memory, and the busiest unit; and the timeline
    of one of its warps.
    """

    seconds: float
    waiting: float
    memory: float
    units: Mapping[str, float]
    timeline: Timeline

    @property
    def limit(self) -> str:
        """Return what takes longest: "waiting", "memory" or the name of a unit."""
        parts = {"waiting": self.waiting, "memory": self.memory, **self.units}
        return max(parts, key=parts.__getitem__)


def resident_warps(registers: int, shared: int, num_warps: int) -> int:
    """Return how many warps, in whole programs of so many, a multiprocessor holds at once: NVIDIA's have 16,384
    registers in each of four parts, 227 KB of shared memory and room for 64 warps. registers: a thread. shared: bytes a
    program.
    """
    by_registers = SCHEDULERS * (16_384 // (-(-registers // 8) * 8 * 32)) // num_warps
    by_memory = 227 * 1024 // (shared + 1024)
    return num_warps * min(by_registers, by_memory, 32, 64 // num_warps)


def estimate(launch: Launched, gpu: Gpu) -> Estimate:
    """Return the Estimate of a launch, without what launching takes; raise a ValueError where no program of it fits."""
    if not launch.resident:
        needs = f"{launch.num_warps} warps of {launch.registers} registers a thread and {launch.shared} bytes"
        raise ValueError(f"launch needs {needs} a program, expected what a multiprocessor holds")
    cached = launch.cached_share(gpu)
    latency = cached * gpu.l2_latency + (1 - cached) * gpu.latency
    timeline = find_timeline(launch.code, gpu, launch.num_warps, latency)
    waiting = count_lots(launch, gpu) * count_clocks(timeline, launch) / gpu.clock / 1e9
    counts = Counter({unit: launch.turns * n for unit, n in timeline.counts.items()}) + timeline.once
    warps = launch.programs * launch.num_warps / gpu.multiprocessors
    units = {unit: warps * n / gpu.clock / 1e9 for unit, n in find_busy(counts, gpu).items()}
    memory = find_memory_time(launch, gpu)
    seconds = add_times((waiting, memory, max(units.values())), gpu.sharpness)
    return Estimate(seconds, waiting, memory, units, timeline)


def estimate_steps(whole: Launched, steps: list[Launched], gpu: Gpu) -> Estimate:
    """Return the Estimate of a launch whose programs take the turns of all programs of others, which are its steps. Its
    own registers, shared memory and programs count, and the machine code of its steps.
    """
    parts = [estimate(step, gpu) for step in steps]
    turns = [step.programs / whole.programs for step in steps]
    clocks = sum(count_clocks(part.timeline, step) * n for part, step, n in zip(parts, steps, turns, strict=True))
    waiting = count_lots(whole, gpu) * clocks / gpu.clock / 1e9
    units = {unit: sum(part.units[unit] for part in parts) for unit in parts[0].units}
    read, cached = (sum(getattr(step, name) for step in steps) for name in ("read", "cached"))
    memory = find_memory_time(replace(whole, read=read, cached=cached, again=True), gpu)
    seconds = add_times((waiting, memory, max(units.values())), gpu.sharpness)
    longest = max(parts, key=lambda part: part.seconds)
    return Estimate(seconds, waiting, memory, units, longest.timeline)


def count_clocks(timeline: Timeline, launch: Launched) -> float:
    """Return how many clocks one program takes that stands alone."""
    return timeline.start + launch.turns * timeline.turn + timeline.end


def count_lots(launch: Launched, gpu: Gpu) -> int:
    """Return how many lots of programs stand on the GPU, one after the other."""
    return math.ceil(launch.programs / (gpu.multiprocessors * launch.resident // launch.num_warps))


def find_busy(counts: Mapping[str, float], gpu: Gpu) -> dict[str, float]:
    """Return the clocks for which one warp's instructions keep each unit of a multiprocessor from others."""
    return {
        "issue": counts["all"] / SCHEDULERS,
        "fp32": counts["fp32"] * 32 / gpu.fp32,
        **{unit: counts[unit] * 32 / RATES[unit] for unit in ("fp64", "integer", "special")},
        "shuffle": sum(counts[unit] * 32 / RATES[unit] for unit in ("shuffle", "shared")),
    }


def find_memory_time(launch: Launched, gpu: Gpu) -> float:
    """Return the seconds that memory takes for what is read and written, and L2 for what it still holds."""
    cached = launch.cached_share(gpu) * launch.read
    read, written = launch.read - cached, launch.written
    run = min(max(READ_RUNS), max(min(READ_RUNS), launch.run or max(READ_RUNS)))
    shorter = max(length for length in READ_RUNS if length <= run)
    moved = read / READ_RUNS[shorter] + written / WRITE_RUNS[shorter]
    return moved / find_bandwidth(read, written, gpu) / 1e9 + cached / gpu.l2_read / 1e9


def find_bandwidth(read: float, written: float, gpu: Gpu) -> float:
    """Return the GB/s of a mix of reads and writes: between reads only, two reads a write, and a copy."""
    share = min(0.5, written / (read + written)) if written else 0.0
    if share <= 1 / 3:
        return gpu.read + (gpu.triad - gpu.read) * 3 * share
    return gpu.triad + (gpu.copy - gpu.triad) * 6 * (share - 1 / 3)


def add_times(times: tuple[float, ...], sharpness: float) -> float:
    """Return how long something takes whose parts run beside each other, but not quite: (Σ t^p)^(1/p)."""
    longest = max(times)
    return longest * sum((time / longest) ** sharpness for time in times) ** (1 / sharpness)


def add_launches(seconds: list[float], gpu: Gpu) -> float:
    """Return what a pass takes of launches that follow each other."""
    return sum(seconds) + 1e-6 * (gpu.launch + gpu.next * (len(seconds) - 1))
