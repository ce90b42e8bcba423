"""Every shipped configuration compiles for every target, fits its registers and keeps wide loads, without a GPU."""

import itertools
import os
import re
from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("interpreted kernels cannot be compiled", allow_module_level=True)

from helpers import ALGORITHMS

from bench.aot import TARGETS, compile_for
from bench.configurations import (
    CONFIGURATIONS,
    DTYPES,
    GAUSSIANS,
    LAYERED,
    ONE_A_REGIME,
    OTHERS,
    Configuration,
    GatedConfiguration,
)
from bench.modelled import find_steps, launches
from daam.kernels.algorithms import count_tensors
from daam.kernels.budgets import LONGEST_CONTIGUOUS
from daam.kernels.whole import take_steps


def seldom(*values):
    """Return parameters of a test that `make test-slow` runs, and `make test` does not."""
    return pytest.param(*values, marks=pytest.mark.audit)


def often(names):
    """Return algorithms as parameters, the stabilised mixture seldom: it takes as long to compile as all others."""
    return [seldom(name) if name == "stable" else name for name in names]


def check(target, configuration):
    if isinstance(configuration, GatedConfiguration):
        check_gated(target, configuration)
        return
    recorded = configuration.launches()
    assert sum("forward" in step.name for launch in recorded for step in find_steps(launch)) == 1
    for launch in recorded:
        compiled = compile_for(target, launch)
        if TARGETS[target].backend == "cuda":  # a wavefront of gfx942 has 64 lanes: other tiles would suit it better
            held = compiled.registers * 32 * launch.meta["num_warps"]
            assert held <= 65536, f"{configuration}/{launch.name}: no multiprocessor could hold it"
            # pairs of fp32 that sm_100 adds at once take registers, and tiles that spill nothing issue 15 % more
            spared = 64 if target == "sm_100" and "backward" in launch.name and configuration.order == "columns" else 0
            if "backward" in launch.name and (configuration.along, configuration.chunk) == ("chunk", 200):
                spared = 32 * configuration.full  # parameters of every position, a mask and weights, and ragged rows
            if configuration.order == "rows" and not launch.name.endswith(("_forward", "_backward")):
                spared = 16  # read again once a strip, so that a multiprocessor holds four programs
            assert compiled.stack <= spared, (
                f"{configuration}/{launch.name} spills {compiled.stack} bytes of {compiled.registers} registers"
            )
            if launch.kernel is take_steps or count_tensors(launch.name):
                # 128 bits, or all of a block that a thread has
                constants = launch.meta["PLAN"]
                block = constants.BLOCK_P * constants.BLOCK_C // (32 * launch.meta["num_warps"])
                narrow = configuration.order == "rows" and configuration.chunk % 64
                widest = min(128, 8 * DTYPES[configuration.dtype].itemsize * block)
                assert compiled.load_bits >= widest or narrow, f"{configuration}/{launch.name}"


def check_gated(target, configuration):
    """Check that the fused gate's kernels spill nothing, and load 128 bits where times that divide by 8 are fastest."""
    recorded = configuration.launches()
    assert [one.name for one in recorded] == [f"gated_{name}" for name in ("project", "forward", "sums", "backward")]
    for launch in recorded:
        compiled = compile_for(target, launch)
        assert compiled.stack == 0 and compiled.registers * 32 * launch.meta["num_warps"] <= 65536, launch.name
        unit = launch.meta["PLAN"].UNIT
        assert compiled.load_bits >= min(128, 8 * DTYPES[configuration.dtype].itemsize * unit), launch.name


def test_every_algorithm_is_audited():
    assert LAYERED == ["mixture", "stable"]
    assert {configuration.algorithm for configuration in CONFIGURATIONS} == set(ALGORITHMS)
    assert set(OTHERS) == {name for name, spec in ALGORITHMS.items() if not spec.features}


@pytest.mark.parametrize("configuration", ONE_A_REGIME, ids=str)
def test_sm_90(configuration):
    check("sm_90", configuration)


ON_CHIP = [one for one in ONE_A_REGIME if isinstance(one, Configuration) and one.chunk <= 1024 and one.layers == 1]


def is_slow(configuration):
    """Tell whether it takes as long to compile as all others: Gaussians one after the other, over columns of 64."""
    return configuration.algorithm in ("gate", "stable") and configuration.chunk == 64


@pytest.mark.parametrize("configuration", [seldom(one) if is_slow(one) else one for one in ON_CHIP], ids=str)
def test_sm_90_in_full(configuration):
    """Add what takes registers: a mask, weights, their gradient, a residual."""
    check("sm_90", replace(configuration, full=True))


@pytest.mark.parametrize("n", [2 * LONGEST_CONTIGUOUS, 7500])
def test_the_longest_rows_on_chip_fit(n):
    """Check rows of the mixture that take eight warps, with weights, their gradient and a residual, and no mask."""
    x, p = torch.empty(64, n, dtype=torch.bfloat16, device="meta"), torch.empty(1, GAUSSIANS, device="meta")
    forward, backward, _sums = launches("mixture", x, p, None, 1, None, True)
    assert [one.name for one in (forward, backward)] == ["mixture_forward", "mixture_backward"]
    assert all(compile_for("sm_90", one).stack == 0 and one.meta["num_warps"] == 8 for one in (forward, backward))


def on_other_targets():
    """Yield pairs: of the three of an algorithm one a target, another one for every algorithm."""
    targets = ["sm_80", "sm_100", "gfx942"]
    for i, algorithm in enumerate(ALGORITHMS):
        configurations = [configuration for configuration in ON_CHIP if configuration.algorithm == algorithm]
        for one, target in zip(configurations, targets[i:] + targets[:i], strict=True):
            yield seldom(one, target) if is_slow(one) else (one, target)


@pytest.mark.parametrize(("configuration", "target"), list(on_other_targets()), ids=str)
def test_other_targets(configuration, target):
    check(target, configuration)


@pytest.mark.audit
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("configuration", CONFIGURATIONS, ids=str)
def test_every_configuration(target, configuration):
    for dtype, full in itertools.product(DTYPES, (False, True)):
        check(target, replace(configuration, dtype=dtype, full=full))


@pytest.mark.parametrize("algorithm", often(ALGORITHMS))
@pytest.mark.parametrize("full", [seldom(False), True])
@pytest.mark.parametrize("shape", [(5, 37, 1000), seldom((2, 200, 1032)), seldom((3, 600, 21)), (5, 1001)], ids=str)
def test_sizes_that_are_no_power_of_two(shape, full, algorithm):
    """Check what users have: accesses are narrow, and still nothing spills."""
    x = torch.empty(shape, dtype=torch.bfloat16, device="meta")
    p = torch.empty(1, shape[-1] if ALGORITHMS[algorithm].features else GAUSSIANS, device="meta")
    for launch in launches(algorithm, x, p, None, 1, len(shape) - 1, full):
        compiled = compile_for("sm_90", launch)
        assert compiled.stack == 0 and compiled.registers * 32 * launch.meta["num_warps"] <= 65536, launch.name


ROWS, COLUMNS, STREAMED = (64, 1024), (8, 64, 1024), (8, 1000, 1024)


@pytest.mark.parametrize("shape", [seldom(ROWS), COLUMNS, seldom(STREAMED)], ids=str)
def test_padding_values(shape):
    x = torch.empty(shape, dtype=torch.bfloat16, device="meta")
    p = torch.empty(1, GAUSSIANS, device="meta")
    for launch in launches("mixture", x, p, None, 1, None, True, padding=0.0):
        assert compile_for("sm_90", launch).stack == 0, launch.name


OFTEN = [(16, ROWS)]
SELDOM = [seldom(*one) for one in itertools.product((1, 3, 8, 16), (ROWS, COLUMNS, STREAMED)) if one not in OFTEN]


@pytest.mark.parametrize("algorithm", often(OTHERS))
@pytest.mark.parametrize(("gaussians", "shape"), OFTEN + SELDOM)
def test_other_numbers_of_gaussians(gaussians, shape, algorithm):
    x = torch.empty(shape, dtype=torch.bfloat16, device="meta")
    p = torch.empty(2, gaussians, device="meta")
    for launch in launches(algorithm, x, p, None, 1, None, True):
        assert compile_for("sm_90", launch).stack == 0, launch.name


def test_a_spill_is_seen():
    """Check that the figure that other tests hold at 0 is not 0 where a tile is too large."""
    launch, *_ = Configuration("density", "columns", "inner", 256, "fp32", True).launches()
    launch.meta.update(PLAN=launch.meta["PLAN"]._replace(BLOCK_C=256), num_warps=4)
    assert compile_for("sm_90", launch).stack > 0


def test_the_mixture_compares_what_it_subtracts():
    """Check that the exponent is (least s - s)·precision with s as it was compared: fused into the difference, the
    product s would leave a rounding error there, which a narrow Gaussian's precision turns into inf. The interpreter
    fuses nothing.
    """
    x, p = torch.empty(64, 1024, dtype=torch.bfloat16, device="meta"), torch.empty(1, GAUSSIANS, device="meta")
    for launch in launches("mixture", x, p, None, 1, None, False):
        if not count_tensors(launch.name):
            continue
        code = re.findall(r"\t(\w+)[\w.]*\s+(%\w+), ([^;]+);", compile_for("sm_90", launch).assembly)
        made = {result: (op, operands.split(", ")) for op, result, operands in code}

        def parts(register, op, made=made):
            found, operands = made.get(register, ("", []))
            return operands if found == op else []

        exponents = [operands for op, _, operands in code if op == "ex2"]
        differences = [d for e in exponents for factor in parts(e, "mul") for d in [parts(factor, "sub")] if d]
        constants = launch.meta["PLAN"]
        tile = constants.N_BLOCKS * constants.BLOCK_P * constants.BLOCK_C
        elements = tile // (32 * launch.meta["num_warps"])
        assert len(differences) == elements, launch.name
        assert all(parts(subtracted, "fma") for _, subtracted in differences), launch.name
