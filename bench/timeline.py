"""When one warp issues its instructions: in order, each once what it reads is there and its unit is free.

find_timeline(instructions(compiled.code), gpu, num_warps=4, latency=gpu.latency)

A warp of a kernel that waits for memory does most of its waiting alone, so that this tells how long a program takes and
how much of it memory is in flight. Branches are taken where nothing decides about them, or where they close the main
loop; another loop is gone through once.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

from bench.gpus import Gpu
from bench.machine_code import Instruction, find_labels, main_loop

_FP32 = {"FADD", "FMUL", "FFMA", "FADD2", "FMUL2", "FFMA2", "HFMA2", "HADD2", "HMUL2", "FHADD", "IMAD"}
_UNITS = {
    **dict.fromkeys(_FP32, "fp32"),
    **dict.fromkeys(("MUFU", "I2F", "F2I", "F2F"), "special"),
    **dict.fromkeys(("DADD", "DMUL", "DFMA", "DSETP"), "fp64"),
    **dict.fromkeys(("LDG", "STG"), "memory"),
    **dict.fromkeys(("LDS", "STS", "LDSM", "STSM"), "shared"),
    **dict.fromkeys(("LDC", "ULDC", "LDCU", "S2R", "S2UR"), "constant"),
    **dict.fromkeys(("BAR", "BRA", "EXIT", "BSSY", "BSYNC", "WARPSYNC"), "control"),
    "SHFL": "shuffle",
}
# Clocks from issue to result, by the sources that `gpus` names: 4 of arithmetic [ampere], and half a one that dependent
# instructions lose; 29 of shared memory [hopper]. Others are estimates, of what is published on Volta to Hopper
_LATENCY = {
    "fp32": 4.5, "integer": 4.5, "special": 20, "fp64": 8, "shared": 29, "shuffle": 24, "constant": 30, "control": 30,
}  # fmt: skip
# Results that a multiprocessor starts in a clock [guide]; half of a100's fp32, which `Gpu.fp32` says
RATES = {"integer": 64, "special": 16, "fp64": 64, "shared": 32, "shuffle": 32, "constant": 128, "control": 128}
SCHEDULERS = 4


@dataclass(frozen=True)
class Timeline:
    """Hold what one warp does, in clocks: up to the main loop (start), in a turn of it, after it (end); all of it is
    one turn where there is no loop. And of a turn: asked, bytes a thread loads before it uses the first of them; rounds
    of loads, of which one ends where a value of it is used; loaded and stored, bytes a thread; counts, instructions by
    unit; once, those of what stands outside the loop.
    """

    start: float
    turn: float
    end: float
    asked: int
    rounds: int
    loaded: int
    stored: int
    counts: Counter
    once: Counter


def unit_of(step: Instruction) -> str:
    """Return the unit that carries an instruction out."""
    return _UNITS.get(step.operation, "integer")


def find_timeline(code: list[Instruction], gpu: Gpu, num_warps: int, latency: float) -> Timeline:
    """Return the Timeline of a warp of a program of num_warps, whose main loop waits so many nanoseconds for a load.
    What is loaded before it is in L2: parameters, which all programs load.
    """
    loop = main_loop(code)
    first, last = loop or (0, len(code) - 1)
    before, turn = list(_follow(code, 0, first)), list(_follow(code, first, last + 1))
    after = list(_follow(code, last, len(code)))[1:]  # where what closes the loop leads, if not back
    latencies = [gpu.l2_latency * gpu.clock] * len(before) + [latency * gpu.clock] * (4 * len(turn) + len(after))
    clocks = list(_issue([*before, *4 * turn, *after], latencies, gpu, num_warps))
    places = [len(before) + n * len(turn) for n in range(5)]
    ends = [clocks[place - 1] if place else 0.0 for place in (*places, len(clocks))]
    if loop:  # the first turn waits for what stands before it
        per_turn = (ends[4] - ends[2]) / 2
        start, end = max(0.0, ends[2] - 2 * per_turn), ends[5] - ends[4]
    else:
        start, per_turn, end = 0.0, ends[1], 0.0
    rounds = _count_rounds(turn)
    return Timeline(
        start, per_turn, end, rounds[0] if rounds else 0, len(rounds),
        *(sum(step.bits for step in turn if step.bits and step.loads == loads) // 8 for loads in (True, False)),
        count(turn), count(before) + count(after) if loop else Counter(),
    )  # fmt: skip


def _follow(code: list[Instruction], place: int, end: int) -> Iterator[Instruction]:
    """Yield the instructions from a place on, up to an end: past branches about which something decides, and along
    others, but for jumps back, after which comes what an earlier branch leads to. What is called is left out.
    """
    labels = find_labels(code)
    while place < end:
        step = code[place]
        yield step
        place += 1
        if step.predicated or step.operation not in ("EXIT", "RET", "BRA"):
            continue
        target = labels.get(step.target, -1)
        if target < place:
            reached = (labels.get(earlier.target, -1) for earlier in code[:place] if step.operation == "BRA")
            target = min((one for one in reached if one >= place), default=end)
        place = target


def _issue(steps: list[Instruction], latencies: list[float], gpu: Gpu, num_warps: int) -> Iterator[float]:
    """Yield the clock at which each of some instructions is issued; latencies: in clocks, of each if it loads. A
    program's warps go from barrier to barrier together, and each of the four schedulers has its share of them.
    """
    clock, ready, free, each = 0.0, {}, {}, max(1.0, num_warps / SCHEDULERS)
    for step, of_memory in zip(steps, latencies, strict=True):
        unit = unit_of(step)
        wanted = (ready.get(register, 0.0) for register in (*step.reads, *step.writes))
        clock = max(clock + each, free.get(unit, 0.0), *wanted, 0.0)
        if step.operation == "BAR":
            clock += _LATENCY["control"]
        free[unit] = clock + each * occupied(step, gpu)
        latency = _LATENCY.get(unit, of_memory)
        ready.update(dict.fromkeys(step.writes, clock + latency))
        yield clock


def occupied(step: Instruction, gpu: Gpu) -> float:
    """Return the clocks for which an instruction of a warp occupies its unit of a scheduler."""
    unit = unit_of(step)
    if unit == "memory":
        return max(1.0, 32 * step.bits / 8 / gpu.l1)
    if unit in ("shared", "shuffle"):
        return 1.0  # one for all four schedulers: `model` counts it
    rate = gpu.fp32 if unit == "fp32" else RATES[unit]
    return 32 * SCHEDULERS / rate


def count(steps: list[Instruction]) -> Counter:
    """Return how many instructions each unit has to carry out, and under "all" how many there are."""
    return Counter(map(unit_of, steps)) + Counter(all=len(steps))


def _count_rounds(turn: list[Instruction]) -> list[int]:
    """Return the bytes a thread loads in every round of a loop's turn: a load that is issued once a value of a round
    has been used opens the next.
    """
    rounds: list[int] = []
    waiting: set[str] = set()  # registers with values of this round
    used = True
    for step in turn:
        if waiting & set(step.reads):
            used = True
        if step.bits and step.loads:
            if used:
                rounds, waiting, used = [*rounds, 0], set(), False
            rounds[-1] += step.bits // 8
            waiting |= set(step.writes)
        else:
            waiting -= set(step.writes)
    return rounds
