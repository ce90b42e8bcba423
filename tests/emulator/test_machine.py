"""Threads, warps and programs together: memory, shuffles, branches, barriers, and what is an error."""

import numpy as np
import pytest
from emulator import machine
from emulator.memory import FaultError
from emulator.programs import execute
from emulator.ptx import UnsupportedError, parse

F32, U8, U32, U64 = np.float32, np.uint8, np.uint32, np.uint64
OWN = "mad.wide.u32 %rd9, %r0, 4, %rd0;"  # the address of the thread's own element of the first array
KEEP = f"{OWN} st.global.b32 [%rd9], %r2;"


def result(code: str, threads: int = 32, programs: int = 1, shared: int = 0) -> list[int]:
    """Return the number that each thread leaves in %r2."""
    out = np.zeros(threads * programs, U32)
    execute(f"{code}\n{KEEP}", out, threads=threads, programs=programs, shared=shared)
    return out.tolist()


@pytest.mark.parametrize(
    ("mode", "expected"),
    [
        ("bfly.b32 %r2, %r0, 1, 31", [i ^ 1 for i in range(64)]),
        ("idx.b32 %r2, %r0, 3, 31", [3] * 32 + [35] * 32),
        ("down.b32 %r2, %r0, 2, 31", [i + 2 if i % 32 < 30 else i for i in range(64)]),
        ("up.b32 %r2, %r0, 2, 0", [i - 2 if i % 32 > 1 else i for i in range(64)]),
    ],
)
def test_shuffles(mode, expected):
    assert result(f"shfl.sync.{mode}, -1;", threads=64) == expected


@pytest.mark.parametrize(("mode", "expected"), [("max", (-1, -33)), ("min", (-32, -64))])
def test_reductions_of_a_warp(mode, expected):
    found = result(f"not.b32 %r3, %r0; redux.sync.{mode}.s32 %r2, %r3, -1;", threads=64)
    assert found == [number % 2**32 for number in expected for _ in range(32)]


def test_a_branch_that_splits_a_warp():
    """Check that both ways are taken, and that threads meet again: the shuffle after them is of whole warps."""
    code = """
        and.b32 %r3, %r0, 1;
        setp.eq.s32 %p1, %r3, 0;
        @%p1 bra $even;
        mov.u32 %r2, 100;
        bra.uni $end;
    $even:
        mov.u32 %r2, 200;
    $end:
        shfl.sync.bfly.b32 %r2, %r2, 1, 31, -1;
    """
    assert result(code) == [200 if i % 2 else 100 for i in range(32)]


def test_a_loop_that_ends_at_different_times():
    code = """
        mov.u32 %r2, 0;
        mov.u32 %r3, 0;
    $loop:
        setp.ge.u32 %p1, %r3, %r0;
        @%p1 bra $end;
        add.s32 %r3, %r3, 1;
        add.s32 %r2, %r2, %r3;
        bra.uni $loop;
    $end:
    """
    assert result(code, threads=64, programs=3) == [i * (i + 1) // 2 for i in range(192)]


def test_threads_that_have_returned_stay_away():
    code = f"setp.gt.u32 %p1, %r0, 7; @%p1 ret; mov.u32 %r2, 1; {KEEP} mov.u32 %r2, 2;"
    assert result(code) == [2] * 8 + [0] * 24


def test_predicated_instructions():
    code = """
        setp.lt.u32 %p1, %r0, 4;
        mov.u32 %r2, 5;
        @%p1 mov.u32 %r2, 6;
        @!%p1 add.s32 %r2, %r2, 2;
    """
    assert result(code) == [6] * 4 + [7] * 28


def test_what_no_thread_wrote_is_nan():
    """Check a register that a predicate left out, and shared memory."""
    register = result("setp.lt.u32 %p1, %r0, 4; @%p1 mov.u32 %r2, 0;")
    assert register == [0] * 4 + [2**32 - 1] * 28
    shared = result("ld.shared.b32 %r2, [global_smem];", shared=16)
    assert np.isnan(np.array(shared, U32).view(F32)).all()


@pytest.mark.parametrize("at_once", [64, 1 << 15])
def test_programs_run_in_batches(at_once, monkeypatch):
    """Check that each program has shared memory of its own, and a number along three dimensions."""
    monkeypatch.setattr(machine, "AT_ONCE", at_once)
    code = """
        mov.u32 %r3, %tid.x;
        shl.b32 %r4, %r3, 2;
        st.shared.b32 [%r4], %r1;
        bar.sync 0;
        xor.b32 %r4, %r4, 128;
        ld.shared.b32 %r2, [%r4];
    """
    assert result(code, threads=64, programs=5, shared=256) == [i // 64 for i in range(320)]


def test_program_numbers():
    text = """.visible .entry numbers(.param .u64 .ptr .global .align 1 a) .reqntid 32
    {
        ld.param.b64 %rd0, [a];
        mov.u32 %r1, %ctaid.x; mov.u32 %r2, %ctaid.y; mov.u32 %r3, %ctaid.z;
        mad.lo.s32 %r4, %r3, %nctaid.y, %r2;
        mad.lo.s32 %r4, %r4, %nctaid.x, %r1;
        mad.lo.s32 %r5, %r3, 10, %r2;
        mad.lo.s32 %r5, %r5, 10, %r1;
        mad.wide.u32 %rd1, %r4, 4, %rd0;
        st.global.b32 [%rd1], %r5;
        ret;
    }"""
    out = np.zeros(24, U32)
    memory = machine.Global([(out.ctypes.data, out.ctypes.data + out.nbytes)])
    machine.Executable(text).run((2, 3, 4), 0, {"a": out.ctypes.data}, memory)
    assert out.tolist() == [100 * z + 10 * y + x for z in range(4) for y in range(3) for x in range(2)]


def test_vectors_and_narrow_numbers():
    source, out = np.arange(256, dtype=U8), np.zeros(64, U32)
    code = """
        mad.wide.u32 %rd2, %r0, 8, %rd1;
        ld.global.v2.b32 {%r2, %r3}, [%rd2];
        ld.global.s8 %r4, [%rd2+7];
        xor.b32 %r3, %r3, %r4;
        mad.wide.u32 %rd3, %r0, 8, %rd0;
        st.global.v2.b32 [%rd3], {%r2, %r3};
    """
    execute(code, out, source)
    halves = source.view(U32).reshape(32, 2)
    signs = source.view(np.int8)[7::8].astype(np.int32).view(U32)
    assert (out.reshape(32, 2) == np.stack([halves[:, 0], halves[:, 1] ^ signs], 1)).all()


def test_matrices_are_spread_over_a_warp():
    """Check that stmatrix and ldmatrix are each other's inverse; transposed, each finds the other dimension's
    neighbours.
    """
    code = """
        shl.b32 %r3, %r0, 4;
        and.b32 %r3, %r3, 127;
        shl.b32 %r4, %r0, 17;
        or.b32 %r4, %r4, 65536;
        mad.lo.s32 %r4, %r0, 2, %r4;
        stmatrix.sync.aligned.m8n8.x1.shared.b16 [%r3], {%r4};
        bar.sync 0;
        ldmatrix.sync.aligned.m8n8.x1.OPTION.b16 {%r2}, [%r3];
    """
    numbers = [2 * i | (2 * i + 1) << 16 for i in range(32)]
    assert result(code.replace("OPTION", "shared"), shared=128) == numbers
    matrix = np.arange(64).reshape(8, 8).T.ravel()
    assert result(code.replace("OPTION", "trans.shared"), shared=128) == [
        int(matrix[2 * i] | matrix[2 * i + 1] << 16) for i in range(32)
    ]


SHARED = "mov.u32 %r3, %tid.x; shl.b32 %r4, %r3, 2; xor.b32 %r5, %r4, 128;"  # own place, and one of the other warp
SAME = "mov.u32 %r6, 0;"


@pytest.mark.parametrize(
    ("code", "race"),
    [
        ("st.shared.b32 [%r4], %r3; ld.shared.b32 %r2, [%r5];", "reads shared memory that warp . wrote"),
        ("st.shared.b32 [%r4], %r3; bar.sync 0; ld.shared.b32 %r2, [%r5];", None),
        ("st.shared.b32 [%r4], %r3; bar.warp.sync -1; ld.shared.b32 %r2, [%r5];", "reads"),
        ("st.shared.b32 [%r4], %r3; ld.shared.b32 %r2, [%r4];", None),
        ("ld.shared.b32 %r2, [%r5]; st.shared.b32 [%r4], %r3;", "writes shared memory that warp . read"),
        ("ld.shared.b32 %r2, [%r5]; bar.sync 0; st.shared.b32 [%r4], %r3;", None),
        ("ld.shared.b32 %r2, [%r6]; st.shared.b32 [%r6], %r6;", "writes shared memory that several warps read"),
        ("st.shared.b32 [%r4], %r3; st.shared.b32 [%r5], %r3;", "writes shared memory that warp . wrote"),
        ("st.shared.b32 [%r6], %r3;", "store different values"),
        ("st.shared.b32 [%r6], %r6;", None),
        ("st.shared.b32 [%r6], %r6; ld.shared.b32 %r2, [%r6];", "reads shared memory that several warps wrote"),
        ("st.shared.b8 [%r3], %r6; xor.b32 %r7, %r3, 1; ld.shared.b8 %r2, [%r7];", None),
        ("st.shared.b8 [%r3], %r6; xor.b32 %r7, %r3, 32; ld.shared.b8 %r2, [%r7];", "reads"),
    ],
)
def test_races(code, race):
    """Check that an access of two warps, one of them a write, without a barrier between is an error."""
    code = f"mov.u32 %r2, 0; {SAME} {SHARED} {code}"
    if race is None:
        result(code, threads=64, shared=256)
        return
    with pytest.raises(FaultError, match=f"kernel: (st|ld).shared.*a race: .*{race}"):
        result(code, threads=64, shared=256)


def test_a_barrier_in_every_turn_of_a_loop():
    """Check that one barrier a turn is too few where a turn both writes and reads: the next one's writes may come
    early.
    """
    loop = """
        mov.u32 %r7, 0;
    $loop:
        st.shared.b32 [%r4], %r7;
        bar.sync 0;
        ld.shared.b32 %r2, [%r5];
        SECOND
        add.s32 %r7, %r7, 1;
        setp.lt.s32 %p1, %r7, 3;
        @%p1 bra $loop;
    """
    assert result(SHARED + loop.replace("SECOND", "bar.sync 0;"), threads=64, shared=256) == [2] * 64
    with pytest.raises(FaultError, match=r"a race: warp . writes shared memory that warp . read"):
        result(SHARED + loop.replace("SECOND", ""), threads=64, shared=256)


def test_different_values_at_one_global_address():
    with pytest.raises(FaultError, match="a race: two warps store different values"):
        execute("st.global.b32 [%rd0], %r0;", np.zeros(1, U32), threads=64)
    execute("mov.u32 %r2, 3; st.global.b32 [%rd0], %r2;", np.zeros(1, U32), threads=64)
    execute("st.global.b32 [%rd0], %r0;", np.zeros(1, U32))  # of one warp, any of them may stay


@pytest.mark.parametrize(
    ("code", "message"),
    [
        (f"{OWN} ld.global.b32 %r2, [%rd9+4];", "a load of 1 threads outside every tensor"),
        (f"{OWN} st.global.b32 [%rd9+-4], %r0;", "a store of 1 threads outside every tensor"),
        ("mov.u64 %rd9, 8; ld.global.b32 %r2, [%rd9];", "a load of 32 threads outside every tensor"),
        ("ld.global.b32 %r2, [%rd0+2];", "not a multiple of 4 bytes"),
        ("ld.global.v4.b32 {%r2, %r3, %r4, %r5}, [%rd0+8];", "not a multiple of 16 bytes"),
        ("ld.shared.b32 %r2, [global_smem+16];", "outside the 16 bytes of shared memory"),
        ("ld.shared.b32 %r2, [global_smem+1];", "not a multiple of 4 bytes"),
        ("trap;", "a trap"),
        ("mov.u32 %r2, %r77;", "KeyError: '%r77'"),
    ],
)
def test_faults_name_kernel_and_instruction(code, message):
    around = np.zeros(72, U32)  # other memory on both sides, which is no tensor
    out = around[16 - around.ctypes.data % 16 // 4 :][:32]
    name = code.split(";")[-2].strip().split()[0].replace(".", r"\.")
    with pytest.raises(FaultError, match=f"kernel: {name}.*{message}"):
        execute(code, out)


@pytest.mark.parametrize("threads", [32, 64])
def test_a_barrier_that_not_all_reach(threads):
    """Check half of a warp, and one warp of two, at a barrier that others wait at in vain."""
    code = f"setp.lt.u32 %p1, %r0, {threads // 2}; @%p1 bra $end; bar.sync 0;\n$end:\nret;"
    with pytest.raises(FaultError, match=r"kernel: bar\.sync 0: threads wait for others that never come"):
        execute(code, np.zeros(1, U32), threads=threads)
    with pytest.raises(FaultError, match="a barrier without some threads of a program"):
        execute(f"setp.lt.u32 %p1, %r0, {threads // 2}; @%p1 bar.sync 0;", np.zeros(1, U32), threads=threads)


def test_a_shuffle_in_a_part_of_a_warp():
    with pytest.raises(FaultError, match="a shuffle without some threads of a warp"):
        result("setp.lt.u32 %p1, %r0, 8; mov.u32 %r2, 0; @%p1 shfl.sync.bfly.b32 %r2, %r0, 1, 31, -1;")


def test_the_line_of_the_kernel_is_named():
    code = ".loc 1 7 3 // rows.py:7:3\nld.global.b32 %r2, [%rd0+4096];"
    with pytest.raises(FaultError, match=r"kernel: ld\.global\.b32 %r2, \[%rd0\+4096\] \(rows\.py:7\): "):
        execute(code, np.zeros(1, U32))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (".visible .func f() { ret; }", "0 kernels"),
        (".entry f() { ret; }", "how many threads"),
        (".entry f(.param .align 64 .b8 map[128]) .reqntid 32 { ret; }", "the parameter"),
        (".entry f() .reqntid 32 { bra $nowhere; }", "no such label"),
    ],
)
def test_modules_that_are_not_understood(text, message):
    with pytest.raises(UnsupportedError, match=message):
        parse(text)


def test_instructions_are_counted():
    start = machine.Executable.executed
    result("mov.u32 %r2, 0;")
    assert machine.Executable.executed - start == 7
