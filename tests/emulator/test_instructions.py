"""Instructions, one at a time, against known answers."""

from fractions import Fraction

import numpy as np
import pytest
import torch
from emulator import floats
from emulator.memory import FaultError
from emulator.programs import compute, execute
from emulator.ptx import UnsupportedError

F32, F64, U16, U32, S32, U64, S64 = np.float32, np.float64, np.uint16, np.uint32, np.int32, np.uint64, np.int64
INF, NAN = np.inf, np.nan


@pytest.mark.parametrize(
    ("instruction", "dtype", "operands", "expected"),
    [
        ("add.s32", S32, [[2**31 - 1, -5], [1, 3]], [-(2**31), -2]),
        ("sub.s64", S64, [[0, 2**40], [1, 1]], [-1, 2**40 - 1]),
        ("mul.lo.s32", S32, [[70_000, -3], [70_000, 4]], [605_032_704, -12]),
        ("mul.hi.u32", U32, [[2**31, 5], [4, 5]], [2, 0]),
        ("mul.hi.s32", S32, [[-(2**31), 5], [4, 5]], [-2, 0]),
        ("mul.hi.u64", U64, [[2**63, 7], [6, 7]], [3, 0]),
        ("mul.wide.s32", S64, [np.array([-(2**31), 3], S32), np.array([2, 3], S32)], [-(2**32), 9]),
        ("mul.wide.u32", U64, [np.array([2**32 - 1], U32), np.array([2**32 - 1], U32)], [(2**32 - 1) ** 2]),
        ("mad.lo.s32", S32, [[3, -3], [4, 4], [5, 5]], [17, -7]),
        ("mad.wide.s32", S64, [np.array([-3], S32), np.array([2**30], S32), np.array([1], S64)], [1 - 3 * 2**30]),
        ("div.s32", S32, [[7, -7, 7, -7], [2, 2, -2, -2]], [3, -3, -3, 3]),
        ("rem.s32", S32, [[7, -7, 7, -7], [2, 2, -2, -2]], [1, -1, 1, -1]),
        ("div.u32", U32, [[2**32 - 1], [2]], [2**31 - 1]),
        ("min.s32", S32, [[-1, 4], [1, 2]], [-1, 2]),
        ("max.u32", U32, [[2**32 - 1, 4], [1, 5]], [2**32 - 1, 5]),
        ("neg.s32", S32, [[5, -6]], [-5, 6]),
        ("and.b32", U32, [[12], [10]], [8]),
        ("or.b32", U32, [[12], [10]], [14]),
        ("xor.b32", U32, [[12], [10]], [6]),
        ("not.b32", U32, [[1]], [2**32 - 2]),
        ("shl.b32", U32, [[1, 1, 3], np.array([31, 32, 1], U32)], [2**31, 0, 6]),
        ("shr.u32", U32, [[2**31, 2**31], np.array([31, 40], U32)], [1, 0]),
        ("shr.s32", S32, [[-8, -8], np.array([1, 40], S32)], [-4, -1]),
        ("shf.l.wrap.b32", U32, [[0x80000000], [1], [1]], [3]),
        ("shf.r.clamp.b32", U32, [[4], [1], [1]], [0x80000002]),
        ("bfe.u32", U32, [[0xABCD], [4], [8]], [0xBC]),
        ("bfe.s32", S32, [[0xF0], [4], [4]], [-1]),
        ("bfi.b32", U32, [[0xF], [0], [4], [4]], [0xF0]),
        ("prmt.b32", U32, [[0x33221180], [0x77665544], [0x7408]], [0x774480FF]),
        ("clz.b32", U32, [[1, 0, 2**31]], [31, 32, 0]),
        ("popc.b32", U32, [[0xFF, 0]], [8, 0]),
    ],
    ids=lambda operand: operand if isinstance(operand, str) else "",
)  # fmt: skip
def test_integers(instruction, dtype, operands, expected):
    given = [operand if isinstance(operand, np.ndarray) else np.array(operand, dtype) for operand in operands]
    assert compute(instruction, dtype, *given).tolist() == expected


@pytest.mark.parametrize(
    ("instruction", "operands", "expected"),
    [
        ("add.f32", [[1, INF, -0.0], [2.0**-24, -INF, -0.0]], [1, NAN, -0.0]),
        ("sub.rn.f32", [[1.5], [0.25]], [1.25]),
        ("mul.f32", [[3e38, 1e-30], [10, 1e-15]], [INF, np.float32(1e-30) * np.float32(1e-15)]),
        ("mul.ftz.f32", [[1e-30, -1e-30], [1e-15, 1e-15]], [0, -0.0]),
        ("neg.f32", [[0, 2]], [-0.0, -2]),
        ("abs.ftz.f32", [[-1e-40, -2]], [0, 2]),
        ("max.f32", [[NAN, 1], [2, NAN]], [2, 1]),
        ("max.NaN.f32", [[NAN, 1], [2, 3]], [NAN, 3]),
        ("min.f32", [[NAN, 1], [2, 3]], [2, 1]),
        ("div.rn.f32", [[1, 1, 0], [3, 0, 0]], [np.float32(1) / np.float32(3), INF, NAN]),
        ("rcp.rn.f32", [[4, 0]], [0.25, INF]),
        ("sqrt.rn.f32", [[2, -1]], [np.sqrt(np.float32(2)), NAN]),
    ],
)
def test_floats(instruction, operands, expected):
    found = compute(instruction, F32, *(np.array(operand, F32) for operand in operands))
    assert np.array_equal(found, np.array(expected, F32), equal_nan=True)
    assert np.array_equal(np.signbit(found), np.signbit(np.array(expected, F32))) or np.isnan(found).any()


def is_nearest(value, exact) -> bool:
    """Tell whether a number of fp32 is the one nearest to a fraction, the even one of two."""
    errors = [abs(Fraction(float(near)) - exact) for near in np.nextafter(value, np.array([-INF, INF], F32))]
    error = abs(Fraction(float(value)) - exact)
    return error < min(errors) or (error == min(errors) and int(value.view(U32)) % 2 == 0)


def test_fma_rounds_once():
    """Check that fma rounds once, also where fp64 rounds to halfway between two numbers of fp32, and for tiny ones."""
    random = np.random.default_rng(0)
    k = F32(2.0**-10)
    halfway = F32(1 + k), F32(1 - k + k * k)  # their product is 1 + 2**-30
    scales = F32(2.0**-24) * np.array([1, -1, 1, 3], F32)
    a = np.concatenate([halfway[0] * scales, random.normal(size=400), 2.0**-75 * random.normal(size=64)]).astype(F32)
    b = np.concatenate([[halfway[1]] * 4, random.normal(size=400), 2.0**-73 * random.normal(size=64)]).astype(F32)
    c = np.concatenate([[1, -1, -1, 1], random.normal(size=400), 2.0**-148 * np.ones(64)]).astype(F32)
    found = compute("fma.rn.f32", F32, a, b, c)
    exact = [Fraction(float(x)) * Fraction(float(y)) + Fraction(float(z)) for x, y, z in zip(a, b, c, strict=True)]
    assert all(map(is_nearest, found, exact))
    twice = (a.astype(F64) * b + c).astype(F32)
    assert (found != twice).any(), "the cases need it"
    assert (found != a * b + c).any()


def test_fma_of_fp64_keeps_the_product():
    a = np.array([1 + 2.0**-30], F64)
    assert compute("fma.rn.f64", F64, a, a, -np.array([1 + 2.0**-29], F64)) == [2.0**-60]


@pytest.mark.parametrize(
    ("instruction", "exact", "bound"),
    [
        ("ex2.approx.ftz.f32", np.exp2, 2.0**-22.5),
        ("lg2.approx.f32", np.log2, 2.0**-22),
        ("rsqrt.approx.f32", lambda x: x**-0.5, 2.0**-22.9),
        ("rcp.approx.f32", lambda x: 1 / x, 2.0**-23),
        ("sqrt.approx.f32", np.sqrt, 2.0**-23),
    ],
)
def test_approximations_are_wrong_within_their_bounds(instruction, exact, bound):
    x = np.random.default_rng(1).uniform(0.01, 9, 4096).astype(F32)
    found, expected = compute(instruction, F32, x), exact(x.astype(F64))
    scale = np.where((x > 0.5) & (x < 2), 1, abs(expected)) if "lg2" in instruction else abs(expected)
    error = abs(found - expected) / scale
    assert 0.9 * bound < error.max() <= bound
    assert (found == compute(instruction, F32, x)).all(), "and the same every time"


def test_division_is_wrong_by_two_units():
    random = np.random.default_rng(2)
    a, b = (random.uniform(0.1, 9, 4096).astype(F32) for _ in range(2))
    found, expected = compute("div.full.f32", F32, a, b), a.astype(F64) / b
    units = abs(found - expected) / np.spacing(expected.astype(F32))
    assert 1.8 < units.max() <= 2


def test_approximations_of_special_numbers():
    assert compute("ex2.approx.ftz.f32", F32, np.array([-INF, INF, 3, -200], F32)).tolist() == [0, INF, 8, 0]
    assert compute("rcp.approx.f32", F32, np.array([INF, 0], F32)).tolist() == [0, INF]
    assert np.isnan(compute("rsqrt.approx.f32", F32, np.array([-1], F32)))


def test_noise_can_be_left_out(monkeypatch):
    x = np.random.default_rng(3).uniform(0.1, 9, 64).astype(F32)
    monkeypatch.setattr(floats, "NOISE", 0.0)
    assert (compute("ex2.approx.ftz.f32", F32, x) == np.exp2(x.astype(F64)).astype(F32)).all()


def test_bf16_is_rounded_to_nearest_even():
    ties = np.array([0x3F808000, 0x3F818000, 0x3F808001, 0x3F807FFF, 0x7F7FFFFF, 0x80000001], U32).view(F32)
    x = np.concatenate([ties, np.random.default_rng(4).normal(size=500).astype(F32), np.array([INF, -INF], F32)])
    expected = torch.from_numpy(x).bfloat16().view(torch.int16).numpy().view(U16)
    assert (compute("cvt.rn.bf16.f32", U16, x) == expected).all()
    assert compute("cvt.rn.bf16.f32", U16, np.array([NAN], F32)) == [0x7FFF]
    wide = np.array([1 + 2.0**-8, 1 + 2.0**-8 + 2.0**-40, -1 - 2.0**-8 - 2.0**-40, 1 + 3 * 2.0**-8 - 2.0**-40], F64)
    assert compute("cvt.rn.bf16.f64", U16, wide).tolist() == [0x3F80, 0x3F81, 0xBF81, 0x3F81]
    restored = compute("cvt.f32.bf16", F32, expected)
    assert (restored == torch.from_numpy(expected.view(np.int16)).view(torch.bfloat16).float().numpy()).all()
    pairs = compute("cvt.rn.bf16x2.f32", U32, x, x[::-1].copy())
    assert (pairs == (expected.astype(U32) << 16 | expected[::-1])).all()


@pytest.mark.parametrize(
    ("instruction", "dtype", "operand", "expected"),
    [
        ("cvt.rn.f16.f32", np.float16, np.array([1 + 2.0**-11, 1 + 3 * 2.0**-11, 7e4], F32), [1, 1 + 2.0**-9, INF]),
        ("cvt.f64.f32", F64, np.array([0.1], F32), [float(F32(0.1))]),
        ("cvt.rn.f32.f64", F32, np.array([1 + 2.0**-24, 1 + 3 * 2.0**-24], F64), [1, 1 + 2.0**-22]),
        ("cvt.rn.f32.s32", F32, np.array([-3, 2**24 + 1], S32), [-3, 2**24]),
        ("cvt.rn.f64.u32", F64, np.array([2**32 - 1], U32), [2**32 - 1]),
        ("cvt.rzi.s32.f32", S32, np.array([-2.7, 2.7, 1e10, -1e10, NAN], F32), [-2, 2, 2**31 - 1, -(2**31), 0]),
        ("cvt.rni.s32.f32", S32, np.array([2.5, 3.5], F32), [2, 4]),
        ("cvt.rzi.u64.f32", U64, np.array([2.0**63, -1, INF], F32), [2**63, 0, 2**64 - 1]),
        ("cvt.rmi.f32.f32", F32, np.array([-1.5], F32), [-2]),
        ("cvt.s64.s32", S64, np.array([-1], S32), [-1]),
        ("cvt.u64.u32", U64, np.array([2**32 - 1], U32), [2**32 - 1]),
        ("cvt.u32.u64", U32, np.array([2**40 + 5], U64), [5]),
        ("cvt.s32.s16", S32, np.array([-2], np.int16), [-2]),
    ],
)
def test_conversions(instruction, dtype, operand, expected):
    assert compute(instruction, dtype, operand).tolist() == expected


@pytest.mark.parametrize(
    ("comparison", "expected"),
    [
        ("eq", "0100"),
        ("ne", "1000"),
        ("lt", "1000"),
        ("geu", "0111"),
        ("neu", "1011"),
        ("nan", "0011"),
        ("num", "1100"),
    ],
)
def test_comparisons_of_floats(comparison, expected):
    a, b = np.array([1, 2, NAN, 1], F32), np.array([2, 2, 1, NAN], F32)
    out = np.zeros(32, U32)
    code = f"""
        mul.wide.u32 %rd3, %r0, 4;
        add.s64 %rd4, %rd3, %rd1;
        add.s64 %rd5, %rd3, %rd2;
        add.s64 %rd6, %rd3, %rd0;
        ld.global.b32 %r2, [%rd4];
        ld.global.b32 %r3, [%rd5];
        setp.{comparison}.f32 %p1, %r2, %r3;
        selp.b32 %r4, 1, 0, %p1;
        st.global.b32 [%rd6], %r4;
    """
    execute(code, out, np.resize(a, 32), np.resize(b, 32))
    assert "".join(map(str, out[:4])) == expected


def test_predicates_are_combined():
    out = np.zeros(32, U32)
    code = """
        setp.lt.s32 %p1, %r0, 8;
        setp.ge.and.s32 %p2, %r0, 4, %p1;
        not.pred %p3, %p2;
        and.pred %p4, %p1, %p3;
        selp.b32 %r2, 1, 2, %p2;
        selp.b32 %r2, 3, %r2, %p4;
        mad.wide.u32 %rd1, %r0, 4, %rd0;
        st.global.b32 [%rd1], %r2;
    """
    execute(code, out)
    assert out.tolist() == [3] * 4 + [1] * 4 + [2] * 24


def test_registers_are_packed_and_unpacked():
    out = np.zeros(32, U64)
    code = """
        mov.b64 %rd1, {%r0, 7};
        mov.b64 {%r2, %r3}, %rd1;
        mov.b64 {_, %r4}, %rd1;
        mov.b32 {%rs1, %rs2}, %r2;
        mov.b32 %r5, {%rs2, %rs1};
        add.s32 %r6, %r3, %r4;
        mov.b64 %rd2, {%r5, %r6};
        mad.wide.u32 %rd3, %r0, 8, %rd0;
        st.global.b64 [%rd3], %rd2;
    """
    execute(code, out)
    assert out.tolist() == [i << 16 | 14 << 32 for i in range(32)]


def test_a_half_that_nobody_writes_is_nan():
    out = np.zeros(32, U32)
    code = """
        mov.b32 {%rs1, %rs2}, %r0;
        mov.b32 %r5, {%rs1, %rs3};
        mad.wide.u32 %rd3, %r0, 4, %rd0;
        st.global.b32 [%rd3], %r5;
    """
    execute(code, out)
    assert out.tolist() == [i | 0xFFFF << 16 for i in range(32)]


@pytest.mark.parametrize(
    ("instruction", "message"),
    [
        ("sin.approx.f32 %r2, %r3", "sin"),
        ("add.sat.s32 %r2, %r3, %r4", r"add\.sat"),
        ("fma.rz.f32 %r2, %r3, %r4, %r5", r"fma\.rz"),
        ("atom.global.add.u32 %r2, [%rd0], 1", "atom"),
        ("bar.sync 1, 64", r"bar\.sync"),
        ("shfl.sync.bfly.b32 %r2, %r3, 1, 15, -1", "shfl"),
        ("cvt.rn.bf16.s32 %rs1, %r0", "rounded twice"),
        ("add.f16x2 %r2, %r3, %r4", "pairs of numbers, f16x2"),
        ("mul.bf16x2 %r2, %r3, %r4", "pairs of numbers, bf16x2"),
        ("fma.rn.bf16 %rs1, %rs2, %rs3, %rs4", "fma of bf16"),
        ("ld.volatile.global.b32 %r2, [%rd0]", "memory that is volatile"),
        ("ld.b32 %r2, [%rd0]", "memory that is not named"),
    ],
)
def test_what_is_not_known_is_named(instruction, message):
    with pytest.raises(UnsupportedError, match=message):
        execute(instruction + ";", np.zeros(1, U32))


def test_a_register_that_nobody_knows_is_named():
    with pytest.raises(FaultError, match="clock"):
        execute("mov.b32 %r2, %clock;", np.zeros(1, U32))
