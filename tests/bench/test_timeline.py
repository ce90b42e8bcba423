"""Timelines of one warp: what instructions read and write, when they are issued, and kernels with known answers."""

import dataclasses
import os

import pytest
import torch

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("interpreted kernels cannot be compiled", allow_module_level=True)

import triton
import triton.language as tl

from bench.aot import Launch, compile_for
from bench.gpus import GPUS
from bench.machine_code import instructions
from bench.timeline import find_timeline, occupied, unit_of

GPU = GPUS["h200"]
LATENCY = GPU.latency * GPU.clock  # clocks of a load


def assemble(*lines: str) -> list:
    """Return instructions of SASS, a line each; labels end with a colon."""
    return instructions("\n".join(line if line.endswith(":") else f" /*0000*/ {line} ;" for line in lines))


def timeline(code, num_warps=1):
    return find_timeline(code, GPU, num_warps, GPU.latency)


# --- Registers --------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("line", "reads", "writes"),
    [
        ("LDG.E.128 R4, desc[UR14][R2.64+0x10]", "UR14 R2 R3", "R4 R5 R6 R7"),
        ("LDG.E.U16 R8, [R2.64]", "R2 R3", "R8"),
        ("STG.E.64 desc[UR14][R2.64], R4", "UR14 R2 R3 R4 R5", ""),
        ("LDS.128 R16, [R7+UR4]", "R7 UR4", "R16 R17 R18 R19"),
        ("LDSM.16.M88.2 R48, [R16]", "R16", "R48 R49"),
        ("STSM.16.M88.4 [R15], R44", "R15 R44 R45 R46 R47", ""),
        ("LDCU.128 UR16, c[0x0][0x380]", "", "UR16 UR17 UR18 UR19"),
        ("LDC.64 R28, c[0x0][R3+0x210]", "R3", "R28 R29"),
        ("IMAD.WIDE.U32 R4, R106.reuse, 0x100, R26", "R106 R26 R27", "R4 R5"),
        ("UIMAD.WIDE UR4, UR6, UR5, URZ", "UR6 UR5", "UR4 UR5"),
        ("IADD3 R4, P0, PT, -R2, R3, RZ", "R2 R3", "R4 P0"),
        ("IADD3.X R8, PT, PT, R7, R9, R2, P0, !P2", "R7 R9 R2 P0 P2", "R8"),
        ("LEA.HI.X R9, R2, R23, R4, 0x2, P1", "R2 R23 R4 P1", "R9"),
        ("ISETP.LT.AND.EX P0, PT, R91, UR3, !P6, P0", "R91 UR3 P6 P0", "P0"),
        ("DSETP.MAX.AND P2, P1, |R60|, 1, PT", "R60 R61", "P2 P1"),
        ("FCHK P0, R2, R3", "R2 R3", "P0"),
        ("LOP3.LUT P0, R10, R17, 0x40, RZ, 0xc0, !PT", "R17", "P0 R10"),
        ("PLOP3.LUT P1, PT, P2, UP0, PT, 0x80, 0x0", "P2 UP0", "P1"),
        ("SHFL.BFLY P1, R32, R16, 0x2, 0x1f", "R16", "P1 R32"),
        ("SEL R13, R4, -R13, !P0", "R4 R13 P0", "R13"),
        ("VOTE.ANY R2, PT, P0", "P0", "R2"),
        ("VIMNMX R7, PT, PT, R7, 0x46a, PT", "R7", "R7"),
        ("FFMA2 R52, -R12.F32, R56.reuse.F32x2.HI_LO, 1", "R12 R13 R56 R57", "R52 R53"),
        ("CS2R R36, SRZ", "", "R36 R37"),
        ("CS2R.32 R36, SR_CLOCKLO", "", "R36"),
        ("F2F.F64.F32 R48, R14", "R14", "R48 R49"),
        ("F2F.F32.F64 R16, R18", "R18", "R16"),
        ("R2UR UR26, R7", "R7", "UR26"),
        ("@!P1 FADD R1, R2, R3", "P1 R2 R3 R1", "R1"),
        ("BRA.U !UP0, `(.L_x_0)", "UP0", ""),
        ("BAR.SYNC.DEFER_BLOCKING 0x0", "", ""),
    ],
)
def test_registers(line, reads, writes):
    (step,) = assemble(line)
    assert (" ".join(step.reads), " ".join(step.writes)) == (reads, writes)


def test_branches_that_something_decides_about():
    code = assemble("BRA `(.L_x_0)", "BRA P2, `(.L_x_0)", "@P0 BRA `(.L_x_0)", "BRA.U !UP0, `(.L_x_0)", "EXIT")
    assert [step.predicated for step in code] == [False, True, True, True, False]


# --- When instructions are issued -------------------------------------------------------------------
CHAIN, APART = "FADD R1, R1, R2", "FADD R{}, R2, R3"


@pytest.mark.parametrize(
    ("lines", "clocks"),
    [
        ([CHAIN] * 11, 1 + 10 * 4.5),
        ([APART.format(10 + i) for i in range(11)], 11),
        ([f"MUFU.EX2 R{10 + i}, R2" for i in range(11)], 1 + 10 * 8),
        (["FADD R2, R3, R4", "FADD R2, R3, R5"], 1 + 4.5),  # what is written twice
        (["LDG.E R1, [R2.64]", CHAIN], 1 + LATENCY),
        (["LDG.E R1, [R2.64]", "@P0 MOV R1, R3"], 1 + LATENCY),
        (["LDG.E R1, [R2.64]", "STG.E [R4.64], R6", APART.format(1)], 1 + LATENCY),
        (["ISETP.GE.AND P0, PT, R2, R3, PT", "@P0 FADD R1, R2, R3"], 1 + 4.5),
        (["FADD R1, R2, R3", "BAR.SYNC 0x0", APART.format(4)], 2 + 30 + 1),
        (["FADD R1, R2, R3", "BRA `(.L_x_0)", *[APART.format(4)] * 9, ".L_x_0:", APART.format(5)], 3),
        (["FADD R1, R2, R3", "@P0 BRA `(.L_x_0)", APART.format(4), ".L_x_0:", APART.format(5)], 4),
        (["FADD R1, R2, R3", "EXIT", *[CHAIN] * 9], 2),
    ],
)
def test_clocks(lines, clocks):
    found = timeline(assemble(*lines))
    assert (found.start, found.turn, found.end) == (0, pytest.approx(clocks), 0)


def test_warps_of_a_program_share_schedulers():
    """Check that instructions of 8 warps, two a scheduler, take twice as long, and that what waits does not."""
    apart, waiting = assemble(*(APART.format(10 + i) for i in range(10))), assemble("LDG.E R1, [R2.64]", CHAIN)
    assert timeline(apart, 8).turn == 2 * timeline(apart, 4).turn == 2 * timeline(apart, 1).turn
    assert timeline(waiting, 8).turn == timeline(waiting).turn + 1


def test_units():
    """Check that an A100 starts half as many operations, and what moves eight times as many bytes takes as long."""
    add, exponential = assemble(CHAIN, "MUFU.EX2 R1, R2")
    wide, narrow = assemble("LDG.E.128 R4, [R2.64]", "LDG.E.U16 R4, [R2.64]")
    assert (occupied(add, GPU), occupied(add, GPUS["a100"])) == (1, 2)
    assert occupied(wide, GPU) == 8 * occupied(narrow, GPU) == 32 * 16 / GPU.l1
    assert occupied(exponential, GPU) == 8
    assert [unit_of(step) for step in assemble("FHADD.BF16 R1, R2, R3", "LDSM.16.M88 R9, [R5]")] == ["fp32", "shared"]


LOOP = [
    "LDG.E R9, [R2.64]", "FADD R9, R9, R9", ".L_x_1:", "LDG.E.64 R4, [R2.64]", "FADD R5, R4, R9",
    "STG.E [R6.64], R5", "@P0 BRA `(.L_x_1)", "FADD R5, R5, R5", "EXIT", "FADD R1, R2, R3",
]  # fmt: skip


def test_loop():
    """Check that what is loaded before the loop comes from L2, and that a turn waits for memory."""
    found = timeline(assemble(*LOOP))
    assert found.start == pytest.approx(GPU.l2_latency * GPU.clock, abs=10)
    assert found.turn == pytest.approx(LATENCY, abs=20) and 0 < found.end < 10
    assert (found.asked, found.rounds, found.loaded, found.stored) == (8, 1, 8, 4)
    assert (found.counts["all"], found.once["all"], found.counts["memory"]) == (4, 4, 2)


@pytest.mark.parametrize("closing", [["@P0 EXIT", "BRA `(.L_x_1)"], ["@!P0 BRA `(.L_x_2)", "BRA `(.L_x_1)"]])
def test_loop_that_is_left_before_its_end(closing):
    """Check that what follows is gone through where something leads there: not what is only called."""
    body, rest = LOOP[:6], [".L_x_2:", "FADD R5, R5, R5", "EXIT"]
    slow = ["RET.REL.NODEC R22 `(kernel)", *[CHAIN] * 99]
    found = timeline(assemble(*body, *closing, *slow, *rest))
    assert found.once["all"] == (2 if closing[0] == "@P0 EXIT" else 4)
    assert found.counts["all"] == 5


@pytest.mark.parametrize(
    ("lines", "asked", "rounds"),
    [
        (["LDG.E.128 R4, [R2.64]", "LDG.E.128 R8, [R2.64]", "FADD R1, R4, R8"], 32, 1),
        (["LDG.E.128 R4, [R2.64]", "FADD R1, R7, R7", "LDG.E.128 R8, [R2.64]"], 16, 2),
        (["LDG.E.64 R4, [R2.64]", "LDG.E R6, [R4.64]"], 8, 2),
        (["LDG.E R4, [R2.64]", "MOV R4, RZ", "FADD R4, R4, R4", "LDG.E R6, [R2.64]"], 8, 1),  # another value by then
        (["FADD R4, R4, R4"], 0, 0),
    ],
)
def test_rounds(lines, asked, rounds):
    found = timeline(assemble(*lines))
    assert (found.asked, found.rounds) == (asked, rounds)


# --- Kernels with known answers ---------------------------------------------------------------------
@triton.jit
def copy(x, y, _z):
    places = tl.arange(0, 256)
    tl.store(y + places, tl.load(x + places))


@triton.jit
def add(x, y, z):
    places = tl.arange(0, 256)
    tl.store(z + places, tl.load(x + places) + tl.load(y + places))


@triton.jit
def add_where_positive(x, y, z):
    places = tl.arange(0, 256)
    first = tl.load(x + places)
    tl.store(z + places, first + tl.load(y + places, tl.sum(first.to(tl.float32), 0) > 0, 0))


@triton.jit
def gather(x, y, z):
    places = tl.arange(0, 32)
    tl.store(z + places, tl.load(x + tl.load(y + places).to(tl.int64)))


@triton.jit
def sum_turns(x, n, z):
    places, total = tl.arange(0, 256), tl.zeros([256], tl.float32)
    for i in range(n):
        total += tl.exp2(tl.load(x + i * 256 + places).to(tl.float32))
    tl.store(z + places, total.to(tl.float16))


def compiled(kernel, second=torch.float16, target="sm_90", num_warps=1):
    x, z = (torch.empty(2**20, dtype=torch.float16, device="meta") for _ in range(2))
    y = torch.empty(2**20, dtype=second, device="meta") if isinstance(second, torch.dtype) else second
    return instructions(compile_for(target, Launch(kernel, (x, y, z), {"num_warps": num_warps})).code)


@pytest.mark.parametrize(
    ("kernel", "second", "target", "asked", "rounds", "loaded", "stored"),
    [
        *((copy, torch.float16, target, 16, 1, 16, 16) for target in ("sm_80", "sm_90", "sm_100")),
        (add, torch.float16, "sm_90", 32, 1, 32, 16),
        *((add_where_positive, torch.float16, target, 16, 2, 32, 16) for target in ("sm_80", "sm_90", "sm_100")),
        (gather, torch.int32, "sm_90", 4, 2, 6, 2),
    ],
)
def test_kernels(kernel, second, target, asked, rounds, loaded, stored):
    code = compiled(kernel, second, target)
    found = timeline(code)
    assert (found.asked, found.rounds, found.loaded, found.stored) == (asked, rounds, loaded, stored)
    assert rounds * LATENCY < found.turn < rounds * LATENCY + 600
    faster = find_timeline(code, GPU, 1, GPU.latency - 100)
    assert found.turn - faster.turn == pytest.approx(rounds * 100 * GPU.clock)


def test_kernel_with_a_loop():
    """Check that a turn, however often it was unrolled, is that of one tile a turn."""
    found = timeline(compiled(sum_turns, 1000))
    tiles, rest = divmod(found.loaded, 16)
    assert tiles >= 1 and rest == 0 and found.stored == 0
    assert found.counts["special"] == 8 * tiles and 8 * 8 * tiles < found.turn < tiles * (LATENCY + 200)


def test_more_warps_meet_at_barriers():
    """Check that a sum over four warps takes the barriers that a sum in one warp does not: other instructions
    may fill half of each one's 29 cycles, as they do with Triton 3.6.
    """
    alone, together = (compiled(add_where_positive, num_warps=num_warps) for num_warps in (1, 4))
    barriers = [sum(step.operation == "BAR" for step in code) for code in (alone, together)]
    assert barriers[0] == 0 < barriers[1]
    without = [step if step.operation != "BAR" else dataclasses.replace(step, name="MOV") for step in together]
    assert timeline(together, 4).turn > timeline(without, 4).turn + 29 / 2 * barriers[1]
