"""Static audit of the kernels: what the compiler makes of every shipped configuration, without a GPU.

    python -m bench.audit [--targets sm_90 …] [--dtypes bf16 fp32] [--output audit.json]
    python -m bench.audit --gpu h200

Per kernel: registers a thread, stack (what spilled) and shared memory in bytes, widest load and store in bits, warps
that a multiprocessor can hold (NVIDIA); and of the main loop, an element of x: elements loaded and stored, instructions
and special-function operations. Of NVIDIA's also what waiting depends on: bytes that a thread asks for before it uses
the first of them (asked), rounds of loads that wait for each other, bytes that a thread stores in the end (stored),
bytes side by side in an access of a warp (run), and bytes in flight on a multiprocessor: what all its warps ask for
first, and store. And the share of a copy's bandwidth that `bench/model.py` gives the kernel: on an A100, an H200 and a
B200.

Configurations: bf16 and fp32, aligned, 2^26 elements, 4 Gaussians, 1024 columns; other dtypes and --full on demand.
With --gpu, instead: what the model makes of both passes of each, of the workloads of the benchmarks, and of chunks as
long as the authors' models have; and of whole modules (`bench/recorded.py`).

The same compiler gives the same figures.
bench/history/audit keeps those of the code as it is, a file a target, and the tests compare with them exactly.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import triton

from bench import model, modelled
from bench.aot import TARGETS, Compiled, Launch, compile_for
from bench.configurations import CONFIGURATIONS, DTYPES, ELEMENTS, Configuration, GatedConfiguration
from bench.gpus import GPUS, Gpu
from bench.machine_code import find_turn
from bench.modelled import (
    Modelled,
    count_elements,
    count_moved,
    find_run,
    find_steps,
    launched,
    model_pass,
    model_workload,
    x_of,
)
from bench.modules import ModuleWorkload, modules
from bench.recorded import bound_formula, model_module
from bench.workloads import lengths, workloads
from daam.kernels.algorithms import count_tensors
from daam.kernels.whole import take_steps

AUDITED = ["bf16", "fp32"]  # unless told
MODELLED = {GPUS[name].target: GPUS[name] for name in ("a100", "h200", "b200")}


@dataclass(frozen=True)
class Figures:
    """Hold what one kernel of a configuration needs on a target, in the units that the module names; None for what is
    counted on NVIDIA's only.
    """

    registers: int
    stack: int
    shared: int
    warps: int | None
    load_bits: int
    store_bits: int
    loads: float
    stores: float
    instructions: float
    special: float
    asked: int | None
    rounds: int | None
    stored: int | None
    run: int | None
    in_flight: int | None
    share: float | None


def figures(target: str, recorded: Launch, compiled: Compiled) -> Figures:
    """Return the figures of a launch that was compiled for a target."""
    code = compiled.instructions
    turn, threads = find_turn(code), TARGETS[target].warp_size * recorded.meta["num_warps"]
    elements = count_elements(recorded, code) / threads
    itemsize = x_of(recorded).itemsize
    loads, stores = ([one.bits for one in turn if one.bits and one.loads == wanted] for wanted in (True, False))
    moved = [sum(bits) / 8 / itemsize / elements for bits in (loads, stores)]
    return Figures(
        registers=compiled.registers,
        stack=compiled.stack,
        shared=compiled.shared,
        load_bits=max((one.bits for one in code if one.loads), default=0),
        store_bits=max((one.bits for one in code if one.bits and not one.loads), default=0),
        loads=round(moved[0], 3),
        stores=round(moved[1], 3),
        instructions=round(len(turn) / elements, 2),
        special=round(sum(one.special for one in turn) / elements, 3),
        **_count_waiting(recorded, compiled, MODELLED.get(target)),
    )


def _count_waiting(recorded: Launch, compiled: Compiled, gpu: Gpu | None) -> dict[str, int | float | None]:
    """Return the figures of what a kernel waits for on a GPU, and of its share of a copy."""
    if gpu is None:
        return dict.fromkeys(("warps", "asked", "rounds", "stored", "run", "in_flight", "share"))
    launch = launched(recorded, compiled)
    estimate = model.estimate(launch, gpu)
    timeline = estimate.timeline
    copied = (launch.read + launch.written) / gpu.copy / 1e9
    return {
        "warps": launch.resident,
        "asked": timeline.asked,
        "rounds": timeline.rounds,
        "stored": timeline.stored,
        "run": find_run(recorded, launch.code),
        "in_flight": 32 * launch.resident * (timeline.asked + timeline.stored),
        "share": round(copied / estimate.seconds, 3),
    }


def audit(target: str, configurations: list[Configuration | GatedConfiguration]) -> Iterator[tuple[str, Figures]]:
    """Yield (the configuration's and the kernel's name, the figures) of every kernel of some configurations."""
    for configuration in configurations:
        for recorded in configuration.launches():
            for name, found in audit_launch(target, recorded):
                yield f"{configuration}/{name}", found


def audit_launch(target: str, recorded: Launch) -> Iterator[tuple[str, Figures]]:
    """Yield (name, figures) of a launch, but for what sums partial sums. Of one that takes the steps of others: of each
    of these, as if it were launched, then of all.
    """
    compiled, found = compile_for(target, recorded), []
    if recorded.kernel is not take_steps:
        if count_tensors(recorded.name):
            yield recorded.name, figures(target, recorded, compiled)
        return
    for step in find_steps(recorded):
        if count_tensors(step.name):
            found.append(figures(target, step, compile_for(target, step)))
            yield step.name, found[-1]
    yield f"{recorded.meta['NAME']}_whole", _add_steps(target, recorded, compiled, found)


def _add_steps(target: str, recorded: Launch, compiled: Compiled, steps: list[Figures]) -> Figures:
    """Return the figures of a launch that takes steps: what it needs is its own, what it does is theirs in all."""
    names = ("loads", "stores", "instructions", "special")
    done = {name: round(sum(getattr(step, name) for step in steps), 3) for name in names}
    widest = {name: max(getattr(step, name) for step in steps) for name in ("load_bits", "store_bits")}
    waits = _count_waiting(recorded, compiled, None)
    if (gpu := MODELLED.get(target)) is not None:
        ((_name, estimate),) = modelled.estimate([recorded], gpu)
        launches = [step for step in find_steps(recorded) if count_tensors(step.name)]
        moved = [count_moved(step) for step in launches]
        tensors = max(read for read, _ in moved) + sum(written for _, written in moved)
        copied = tensors * x_of(launches[0]).nbytes / gpu.copy / 1e9
        warps = model.resident_warps(compiled.registers, compiled.shared, recorded.meta["num_warps"])
        waits |= {"warps": warps, "share": round(copied / estimate.seconds, 3)}
    return Figures(compiled.registers, compiled.stack, compiled.shared, **widest, **done, **waits)


def print_model(gpu: Gpu, configurations: list[Configuration | GatedConfiguration]) -> None:
    """Print what the model makes of the passes of configurations, and of the workloads, on a GPU."""
    print(f"{gpu.name}: microseconds, share of a copy, what takes longest; forward, then backward")
    for one in configurations:
        moved = 2 * ELEMENTS * DTYPES[one.dtype].itemsize
        least = {"forward": moved, "backward": 3 * moved / 2}
        print(f"{one!s:64}", *(_text(model_pass(made, least[name], gpu)) for name, made in one.passes().items()))
    for workload in (*workloads("cuda"), *lengths()):
        print(f"{workload!s:64}", *map(_text, model_workload(workload, gpu).values()), flush=True)
    for workload in modules("cuda"):
        if not workload.in_model:
            _print_module(workload, gpu)


def _print_module(workload: ModuleWorkload, gpu: Gpu) -> None:
    """Print what the model makes of a module, of a block fused and layer by layer, and the least that any fusion of its
    formula takes: a bound, and nothing that was measured.
    """
    if workload.layers > 1:
        ways = {"fused": model_module(workload, gpu, recompute=True)}
        ways["layer by layer"] = model_module(workload, gpu, recompute=False)
    else:
        ways = {"": model_module(workload, gpu)}
    ways["formula, at least"] = bound_formula(workload, gpu)
    for way, passes in ways.items():
        print(f"{f'{workload} {way}':88}", *map(_text, passes.values()), flush=True)


def _text(one: Modelled) -> str:
    """Return a modelled pass as text."""
    return f"{one.us:9.1f} {one.share:6.2f} {one.limit:9}"


def main() -> None:
    """Run the command line: print the figures, and write them as JSON where --output says."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--targets", nargs="+", choices=TARGETS, default=list(TARGETS))
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=AUDITED)
    parser.add_argument("--full", action="store_true", help="with mask, weights, their gradient and residual")
    parser.add_argument("--gpu", choices=GPUS, help="print what the model makes of every configuration on it")
    parser.add_argument("--output", type=Path, help="write the figures as JSON")
    args = parser.parse_args()
    chosen = [replace(one, dtype=dtype, full=args.full) for dtype in args.dtypes for one in CONFIGURATIONS]
    if args.gpu:
        if args.full or args.output:
            parser.error("--gpu prints what is modelled without masks and weights: neither --full nor --output")
        print_model(GPUS[args.gpu], chosen)
        return
    names = list(Figures.__dataclass_fields__)
    found: dict[str, dict[str, dict]] = {}
    for target in args.targets:
        print(f"{target:48}", *(f"{name[:9]:>9}" for name in names))
        found[target] = {}
        for name, one in audit(target, chosen):
            found[target][name] = asdict(one)
            print(f"{name:48}", *(f"{'' if value is None else value:>9}" for value in asdict(one).values()), flush=True)
    if args.output:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps({"triton": triton.__version__, "targets": found})
        args.output.write_text(text.replace("}, ", "},\n") + "\n")  # a line a kernel


if __name__ == "__main__":
    main()
