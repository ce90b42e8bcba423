"""Every shipped configuration compiles for every target, fits its registers and keeps wide loads, without a GPU."""

import importlib
import itertools
import os
import re

import pytest
import torch

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("interpreted kernels cannot be compiled", allow_module_level=True)

from helpers import ALGORITHMS, Case

from bench.aot import TARGETS, compile_for, recording
from daam.kernels import launch

FEATURES = 1024


GAUSSIANS = 4


def launches_of(algorithm, x, p, mask, axis, feature_axis, full, padding=None):
    """Launches of a forward and a backward pass. full: with weights, their gradient and residual."""
    kernels, spec = importlib.import_module(f"daam.kernels.{algorithm}"), ALGORITHMS[algorithm]
    case = Case(x.shape, axis, padding=padding, algorithm=algorithm)
    settings = (feature_axis, 1e-5) if spec.features else spec.settings(case)
    args, how = (x, p, p, mask), (axis, *settings, full)
    with recording() as recorded:
        stats = kernels.forward(*args, *how, full, True)[2]
        kernels.backward(x, x if full else None, *args, stats, *how, True, True)
    return recorded


def launches(algorithm, order, along, chunk, dtype, full):
    """The same for a regime. full: with a mask too."""
    shape, axis, feature_axis = {
        ("rows", "chunk"): ((64, chunk), 1, 1),
        ("rows", "nothing"): ((64, chunk), 1, None),
        ("rows", "inner"): ((8, FEATURES, chunk), 2, 1),
        ("columns", "chunk"): ((8, chunk, FEATURES), 1, 1),
        ("columns", "nothing"): ((8, chunk, FEATURES), 1, None),
        ("columns", "inner"): ((8, chunk, FEATURES), 1, 2),
    }[order, along]
    x = torch.empty(shape, dtype=dtype, device="meta")
    nothing = 1 if ALGORITHMS[algorithm].features else GAUSSIANS
    columns = {"chunk": chunk, "nothing": nothing, "inner": FEATURES}[along]
    p = torch.empty(1, columns, device="meta")
    mask = torch.empty(shape, dtype=torch.bool, device="meta")[..., :1] if full else None
    return launches_of(algorithm, x, p, mask, axis, feature_axis, full)


ROWS = [2**k for k in range(1, launch.LONGEST_ROW.bit_length())] + [4 * launch.LONGEST_ROW]
COLUMNS = [2**k for k in range(launch.LONGEST_COLUMN.bit_length())] + [4 * launch.LONGEST_COLUMN]
OTHERS = [name for name, spec in ALGORITHMS.items() if not spec.features]
CONFIGURATIONS = [
    *itertools.product(["density"], ["rows"], ["chunk", "nothing"], ROWS),
    *itertools.product(["density"], ["columns"], ["inner", "nothing"], COLUMNS),
    *itertools.product(["density"], ["rows"], ["inner"], ROWS[::5] + ROWS[-1:]),
    *itertools.product(["density"], ["columns"], ["chunk"], COLUMNS[::4] + COLUMNS[-1:]),
    *itertools.product(OTHERS, ["rows"], ["nothing"], ROWS),
    *itertools.product(OTHERS, ["columns"], ["nothing"], COLUMNS),
]
ONE_A_REGIME = [
    ("density", "rows", "chunk", 1024),
    ("density", "rows", "chunk", ROWS[-1]),
    ("density", "columns", "inner", 4),
    ("density", "columns", "inner", 256),
    ("density", "columns", "inner", COLUMNS[-1]),
    *itertools.product(OTHERS, ["rows"], ["nothing"], [1024, ROWS[-1]]),
    *itertools.product(OTHERS, ["columns"], ["nothing"], [4, 64, COLUMNS[-1]]),
]
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, "fp64": torch.float64}


def check(target, algorithm, order, along, chunk, dtype, full):
    recorded = launches(algorithm, order, along, chunk, DTYPES[dtype], full)
    assert [one.name for one in recorded].count("_forward") == 1
    for one in recorded:
        compiled = compile_for(target, one)
        if TARGETS[target].backend == "cuda":  # a wavefront of gfx942 has 64 lanes: other tiles would suit it better
            assert compiled.registers * 32 * one.meta["num_warps"] <= 65536, "no multiprocessor could hold it"
            assert compiled.stack == 0, f"{one.name} spills {compiled.stack} bytes with {compiled.registers} registers"
            if one.name != "_chain":
                # the gate's backward pass, which computes more than it moves, has less in registers
                narrow = algorithm == "gate" and one.name != "_forward"
                widest = 128 if not narrow else 64 if DTYPES[dtype].itemsize <= 4 else 32
                assert compiled.load_bits >= widest or (order == "rows" and chunk < 64), one.name


@pytest.mark.parametrize(("dtype", "full"), [("bf16", False), ("bf16", True), ("fp32", False)])
@pytest.mark.parametrize(("algorithm", "order", "along", "chunk"), CONFIGURATIONS)
def test_sm_90(algorithm, order, along, chunk, dtype, full):
    check("sm_90", algorithm, order, along, chunk, dtype, full)


@pytest.mark.parametrize("target", ["sm_80", "sm_100", "gfx942"])
@pytest.mark.parametrize(("algorithm", "order", "along", "chunk"), ONE_A_REGIME)
def test_one_configuration_a_regime(target, algorithm, order, along, chunk):
    check(target, algorithm, order, along, chunk, "bf16", False)


@pytest.mark.audit
@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(("algorithm", "order", "along", "chunk"), CONFIGURATIONS)
def test_every_configuration(target, algorithm, order, along, chunk, dtype, full):
    check(target, algorithm, order, along, chunk, dtype, full)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("shape", [(5, 37, 1000), (2, 200, 1032), (3, 600, 21), (5, 1001)], ids=str)
def test_sizes_that_are_no_power_of_two(shape, full, algorithm):
    """What users have: narrow accesses, and still nothing spills."""
    x = torch.empty(shape, dtype=torch.bfloat16, device="meta")
    p = torch.empty(1, shape[-1] if ALGORITHMS[algorithm].features else GAUSSIANS, device="meta")
    for one in launches_of(algorithm, x, p, None, 1, len(shape) - 1, full):
        compiled = compile_for("sm_90", one)
        assert compiled.stack == 0 and compiled.registers * 32 * one.meta["num_warps"] <= 65536, one.name


@pytest.mark.parametrize("shape", [(64, 1024), (8, 64, 1024), (8, 1000, 1024)], ids=str)
def test_padding_values(shape):
    x = torch.empty(shape, dtype=torch.bfloat16, device="meta")
    p = torch.empty(1, GAUSSIANS, device="meta")
    for one in launches_of("mixture", x, p, None, 1, None, True, padding=0.0):
        assert compile_for("sm_90", one).stack == 0, one.name


@pytest.mark.parametrize("algorithm", OTHERS)
@pytest.mark.parametrize("gaussians", [1, 3, 8, 16])
def test_other_numbers_of_gaussians(gaussians, algorithm):
    for shape in ((64, 1024), (8, 32, 1024), (8, 1000, 1024)):
        x = torch.empty(shape, dtype=torch.bfloat16, device="meta")
        p = torch.empty(2, gaussians, device="meta")
        for one in launches_of(algorithm, x, p, None, 1, None, True):
            assert compile_for("sm_90", one).stack == 0, (one.name, shape)


def test_a_spill_is_seen():
    """The figure that the other tests hold at 0 is not 0 where a tile is too large."""
    (one, _) = launches("density", "columns", "inner", 256, torch.float32, True)
    one.meta.update(BLOCK_INNER=256, num_warps=4)
    assert compile_for("sm_90", one).stack > 0


def test_the_mixture_compares_what_it_subtracts():
    """The exponent is (least s - s)·precision with s as it was compared: fused into the difference, the product s would
    leave a rounding error there, which a narrow Gaussian's precision turns into inf. The interpreter fuses nothing.
    """
    x, p = torch.empty(64, 1024, dtype=torch.bfloat16, device="meta"), torch.empty(1, GAUSSIANS, device="meta")
    for one in launches_of("mixture", x, p, None, 1, None, False):
        if one.name == "_chain":
            continue
        code = re.findall(r"\t(\w+)[\w.]*\s+(%\w+), ([^;]+);", compile_for("sm_90", one).assembly)
        made = {result: (op, operands.split(", ")) for op, result, operands in code}

        def parts(register, op, made=made):
            found, operands = made.get(register, ("", []))
            return operands if found == op else []

        exponents = [operands for op, _, operands in code if op == "ex2"]
        differences = [d for e in exponents for factor in parts(e, "mul") for d in [parts(factor, "sub")] if d]
        elements = one.meta["BLOCK_CHUNK"] * one.meta["BLOCK_INNER"] // (32 * one.meta["num_warps"])
        assert len(differences) == elements, one.name
        assert all(parts(subtracted, "selp") for _, subtracted in differences), one.name
