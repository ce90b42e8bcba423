"""The model of a launch's time: what it adds up, what more warps or a cache do; and our launches as it takes them."""

import dataclasses
import itertools
import math
import os
import sys
from unittest import mock

import pytest
import torch

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("interpreted kernels cannot be compiled", allow_module_level=True)

from bench import audit, model, modelled
from bench.aot import compile_for
from bench.configurations import Configuration
from bench.gpus import GPUS, READ_RUNS, WRITE_RUNS
from bench.machine_code import instructions
from bench.timeline import find_timeline
from bench.workloads import workloads

GPU = GPUS["h200"]
LOOP = """
        /*0000*/                   LDC R1, c[0x0][0x28] ;
.L_x_1:
        /*0010*/                   LDG.E.128 R4, desc[UR14][R2.64] ;
        /*0020*/                   MUFU.EX2 R8, R4 ;
        /*0030*/                   STG.E.64 desc[UR14][R2.64], R8 ;
        /*0040*/              @!P2 BRA `(.L_x_1) ;
        /*0050*/                   EXIT ;
"""
EXPONENTIALS = LOOP.replace("MUFU", "MUFU.EX2 R9, R4 ;\n        /*0020*/ " * 40 + "MUFU")
LAUNCH = model.Launched(
    instructions(LOOP), registers=64, shared=0, num_warps=4, programs=132 * 64, turns=8.0, read=2e9, written=1e9
)


def changed(**values):
    """Return LAUNCH with other values."""
    return dataclasses.replace(LAUNCH, **values)


# --- Times ------------------------------------------------------------------------------------------
@pytest.mark.parametrize("n", [1, 2, 3])
def test_times_add_up(n):
    """Check that equal times are √n of one for p = 2, that p = 1 adds them up, and that a long one hides others."""
    assert model.add_times((3.0,) * n, 2.0) == pytest.approx(3 * math.sqrt(n))
    assert model.add_times((3.0,) * n, 1.0) == pytest.approx(3 * n)
    assert model.add_times((3.0, *(1e-6,) * n), 2.0) == pytest.approx(3)


@pytest.mark.parametrize(
    ("read", "written", "name"), [(5, 0, "read"), (2, 1, "triad"), (1, 1, "copy"), (0, 1, "copy"), (0, 0, "read")]
)
def test_bandwidth(read, written, name):
    for gpu in GPUS.values():
        assert model.find_bandwidth(read, written, gpu) == pytest.approx(getattr(gpu, name))


def test_bandwidth_between_mixes():
    assert model.find_bandwidth(5, 1, GPU) == pytest.approx((GPU.read + GPU.triad) / 2)
    assert model.find_bandwidth(7, 5, GPU) == pytest.approx((GPU.triad + GPU.copy) / 2)


@pytest.mark.parametrize(("run", "known"), [(None, 128), (512, 128), (128, 128), (96, 64), (64, 64), (32, 32), (2, 32)])
def test_short_runs(run, known):
    loading, storing = changed(run=run, written=0.0), changed(run=run, read=0.0)
    assert model.find_memory_time(loading, GPU) == pytest.approx(2 / READ_RUNS[known] / GPU.read)
    assert model.find_memory_time(storing, GPU) == pytest.approx(1 / WRITE_RUNS[known] / GPU.copy)


def test_what_l2_holds():
    """Check that what fits L2 is read at its bandwidth and latency, and that of what does not a part is."""
    small = changed(read=3e7, cached=3e7, written=0.0)
    assert model.find_memory_time(small, GPU) == pytest.approx(3e7 / GPU.l2_read / 1e9)
    large = changed(cached=2e9, written=0.0)
    expected = GPU.l2 / GPU.l2_read + (2e9 - GPU.l2) / GPU.read
    assert model.find_memory_time(large, GPU) == pytest.approx(expected / 1e9)
    difference = model.estimate(changed(read=3e7), GPU).waiting - model.estimate(small, GPU).waiting
    lots = math.ceil(LAUNCH.programs / (132 * LAUNCH.resident / 4))
    assert difference == pytest.approx(lots * LAUNCH.turns * (GPU.latency - GPU.l2_latency) * 1e-9, rel=0.01)


# --- Waiting and units ------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("registers", "shared", "num_warps", "warps"),
    [
        *((32, 0, 4, 64), (64, 0, 4, 32), (65, 0, 4, 28), (255, 0, 1, 8), (32, 0, 1, 32), (32, 100 * 1024, 4, 8)),
        *((114, 0, 1, 16), (192, 0, 1, 8), (149, 0, 2, 12), (79, 0, 4, 24), (184, 0, 4, 8)),
    ],
)
def test_resident_warps(registers, shared, num_warps, warps):
    """Include those whose share of 64 warps a profiler told on an H200 (`bench/history`)."""
    assert model.resident_warps(registers, shared, num_warps) == warps


def test_waiting():
    """Check that half as many resident warps wait twice as long, and that programs which all fit wait as one does."""
    whole, half = (model.estimate(changed(registers=registers), GPU) for registers in (64, 128))
    assert half.waiting == pytest.approx(2 * whole.waiting) and half.memory == whole.memory
    together = 132 * LAUNCH.resident // 4
    one, all_that_fit, more = (model.estimate(changed(programs=n), GPU) for n in (1, together, together + 1))
    assert one.waiting == all_that_fit.waiting == more.waiting / 2
    found = find_timeline(LAUNCH.code, GPU, 4, GPU.latency)
    assert one.waiting == pytest.approx((found.start + 8 * found.turn + found.end) / GPU.clock / 1e9)


def test_units():
    """Check the clocks of units: a load, an exponential, a store and a branch a turn, and the rest once."""
    units, clocks = model.estimate(LAUNCH, GPU).units, LAUNCH.programs * 4 / 132 / GPU.clock / 1e9
    assert units["issue"] == pytest.approx((8 * 4 + 2) / 4 * clocks)
    assert units["special"] == pytest.approx(8 * 2 * clocks)
    assert units["fp32"] == units["shuffle"] == 0


@pytest.mark.parametrize(
    ("values", "limit"),
    [
        ({"read": 2e12}, "memory"),
        ({"programs": 1}, "waiting"),
        ({"code": instructions(EXPONENTIALS)}, "special"),
        ({"code": instructions(EXPONENTIALS.replace("MUFU.EX2 R9, R4", "DADD R10, R4, R6"))}, "fp64"),
    ],
)
def test_limit(values, limit):
    found = model.estimate(changed(**{"read": 1.0, "written": 0.0, "registers": 32} | values), GPU)
    assert found.limit == limit and found.seconds >= max(found.waiting, found.memory, *found.units.values())


@pytest.mark.parametrize("gpu", GPUS.values(), ids=GPUS)
def test_fewer_registers_never_slow_down(gpu):
    """Check, too, that the same launch takes the same time twice."""
    for programs in (1, 131, 2000, 132 * 64, 100_000):
        launches = [changed(programs=programs, registers=registers) for registers in range(16, 256, 8)]
        seconds = [model.estimate(one, gpu).seconds for one in launches]
        assert seconds == sorted(seconds)
        assert seconds == [model.estimate(one, gpu).seconds for one in launches]


def test_launches_add_up():
    assert model.add_launches([1e-6], GPU) == pytest.approx(1e-6 * (1 + GPU.launch))
    assert model.add_launches([1e-6, 2e-6, 3e-6], GPU) == pytest.approx(1e-6 * (6 + GPU.launch + 2 * GPU.next))


# --- Our launches -----------------------------------------------------------------------------------
def passes(shape, axis=1, feature_axis=None, heads=1, algorithm="density", full=False):
    """Return the launches of passes over x of a shape, in bf16."""
    x = torch.empty(shape, dtype=torch.bfloat16, device="meta")
    n_params = 1 if feature_axis is None else shape[feature_axis] // (heads if feature_axis == axis else 1)
    p = torch.empty(heads, n_params, device="meta")
    return modelled.record_passes(algorithm, x, p, None, axis, feature_axis, full)


@pytest.mark.parametrize(
    ("shape", "options", "forward", "backward"),
    [  # programs and turns of every kernel
        ((3, 5), {}, [(1, 1)], [(1, 1), (1, 1)]),  # one tile, larger than x
        ((8, 24, 37), {"feature_axis": 2}, [(16, 1)], [(16, 1), (3, 1)]),  # 37 columns in two blocks of 32
        ((16, 16, 40), {"heads": 3, "feature_axis": 2}, [(48, 1)], [(48, 1), (9, 1)]),
        ((2**16, 1024), {}, [(8192, 8)], [(8192, 8), (1, 1)]),
        ((4, 20_000), {}, [(8, 2.5), (4, 1), (8, 2.5)], [(8, 2.5), (4, 1), (8, 2.5), (1, 1)]),  # 4096 positions a tile
        ((8, 1000, 768), {}, [(96, 16), (48, 1), (96, 16)], [(96, 16), (48, 1), (96, 16), (1, 1)]),
    ],
)
def test_turns(shape, options, forward, backward):
    found = passes(shape, **options)
    for name, expected in (("forward", forward), ("backward", backward)):
        assert [(math.prod(one.grid), modelled.count_turns(one, [])) for one in found[name]] == expected


@pytest.mark.parametrize(("loads", "turns"), [(8, 5.5), (32, 1.375)])
def test_turns_of_partial_sums(loads, turns):
    """Check that 1366 groups are 11 tiles of 128, of 2 sums of 16 entries, of which 8 warps load two by 8 loads of
    128 bits; and that a loop which was unrolled takes as many at once.
    """
    recorded = Configuration("density", "rows", "chunk", 1024).passes()["backward"][-1]
    load = "        /*0010*/                   LDG.E.128 R4, desc[UR14][R2.64] ;\n"
    code = instructions(LOOP.replace(load, load * loads))
    assert recorded.args[0].data.shape[2] == 1366 and modelled.count_turns(recorded, code) == turns
    assert modelled.count_turns(recorded, instructions(LOOP.replace("BRA", "MOV"))) == 1


@pytest.mark.parametrize(
    ("shape", "options", "run"),
    [
        ((64, 1024), {}, 512),  # 32 lanes of 16 bytes
        ((64, 200), {}, 64),  # blocks of 32 positions
        ((64, 4), {}, 256),  # 32 rows follow each other
        ((8, 64, 1024), {}, 32),  # 16 columns
        ((8, 3, 1024), {}, 512),
        ((8, 24, 24), {"feature_axis": 2}, 48),  # no more columns than there are
        ((8, 24, 8), {}, 16),  # strides in units: of 8 as of 1
    ],
)
def test_run(shape, options, run):
    recorded = passes(shape, **options)["forward"][0]
    assert modelled.find_run(recorded, instructions(LOOP)) == run
    assert modelled.find_run(recorded, instructions(LOOP.replace("128", "U16"))) == min(run, 64)


def test_what_is_read_and_written():
    """Check tensors of x's size that kernels move, with weights and without, and that x's second reader finds it."""
    for full in (False, True):
        recorded = itertools.chain(*passes((512, 32768), full=full).values())
        moved = [modelled.count_moved(one) for one in recorded if modelled.count_tensors(one.name)]
        assert moved == [(1, 0), (1, 1 + full), (2 + full, 0), (2 + full, 1)]


def test_streamed_pass():
    """Check that x of 32 MB is in L2 when it is read again, and that sums of strips are, from the first."""
    recorded = passes((512, 32768))["forward"]
    estimates = dict(modelled.estimate(recorded, GPU))
    size = 2 * 512 * 32768
    assert list(estimates) == ["strip_stats", "merge_strip_stats", "forward_streamed"]
    assert estimates["strip_stats"].memory == pytest.approx(size / GPU.read / 1e9)
    assert estimates["forward_streamed"].memory == pytest.approx(size / GPU.l2_read / 1e9 + size / GPU.copy / 1e9)
    strips = recorded[1].args[0].data.nbytes
    assert estimates["merge_strip_stats"].memory == pytest.approx(strips / GPU.l2_read / 1e9)
    found = modelled.model_pass(recorded, 2 * size, GPU)
    assert found.us == pytest.approx(1e6 * sum(one.seconds for one in estimates.values()) + GPU.launch + 2 * GPU.next)
    assert found.limit == max(estimates.values(), key=lambda one: one.seconds).limit and 0 < found.share < 1


@pytest.mark.slow
def test_steps_of_one_launch():
    """Check that memory reads x once, and L2 again; that units do what those of the steps do; and that a program waits
    for L2 where it reads x again, less than for memory.
    """
    (recorded,) = passes((1056, 32768))["forward"]
    ((_name, found),) = modelled.estimate([recorded], GPU)
    size = 2 * 1056 * 32768
    assert found.memory == pytest.approx(2 * size / GPU.copy / 1e9 + size / GPU.l2_read / 1e9, rel=1e-3)
    steps = [modelled.launched(one, compile_for(GPU.target, one)) for one in modelled.find_steps(recorded)]
    assert [one.programs for one in steps] == [2112, 1056, 2112]
    apart = [model.estimate(one, GPU) for one in steps]
    for unit, seconds in found.units.items():
        assert seconds == pytest.approx(sum(one.units[unit] for one in apart))
    whole = modelled.take(recorded, compile_for(GPU.target, recorded), [], 0, 0.0, 0.0)
    slower = model.estimate_steps(whole, steps, GPU)
    assert whole.resident == 16 and found.waiting < slower.waiting
    fewer = dataclasses.replace(whole, registers=255)  # two programs a multiprocessor, and not four: four lots, not two
    assert model.estimate_steps(fewer, steps, GPU).waiting == pytest.approx(2 * slower.waiting)


def test_heads_of_unequal_length():
    """Check that they are one launch, which reads and writes all of x."""
    ((_name, found),) = modelled.estimate(passes((64, 3 * 128 + 1), heads=3)["forward"], GPU)
    assert found.memory == pytest.approx(2 * 2 * 64 * 385 / GPU.copy / 1e9)


@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100"])
def test_figures_of_waiting(target):
    """Check what can be counted by hand: a thread loads its share of 24 positions of some columns, and stores it."""
    recorded = Configuration("density", "columns", "nothing", 24).launches()[0]
    plan, threads = recorded.meta["PLAN"], 32 * recorded.meta["num_warps"]
    size = 2 * 24 * plan.BLOCK_C // threads
    found = audit.figures(target, recorded, compile_for(target, recorded))
    assert (found.asked, found.rounds, found.stored) == (size, 1, size)
    assert found.in_flight == found.warps * 32 * 2 * size and found.run == 2 * plan.BLOCK_C
    assert 0 < found.share <= 1.1


def test_command(capsys):
    """Check that --gpu prints what is modelled of configurations and of workloads."""
    configuration, workload = Configuration("gate", "columns", "nothing", 6), next(iter(workloads("cuda")))
    with (
        mock.patch.object(sys, "argv", ["audit", "--gpu", "h200", "--dtypes", "bf16"]),
        mock.patch.object(audit, "CONFIGURATIONS", [configuration]),
        mock.patch.object(audit, "workloads", lambda _device: [workload]),
        mock.patch.object(audit, "lengths", dict),
        mock.patch.object(audit, "modules", lambda _device: []),
    ):
        audit.main()
    title, *lines = capsys.readouterr().out.splitlines()
    assert title.startswith(GPU.name) and [line.split()[0] for line in lines] == [str(configuration), str(workload)]
    assert all(len(line.split()) == 7 for line in lines)
