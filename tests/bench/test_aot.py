"""Every shipped configuration compiles for every target, fits its registers and keeps wide loads, without a GPU."""

import itertools
import os

import pytest
import torch

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("interpreted kernels cannot be compiled", allow_module_level=True)

from bench.aot import TARGETS, compile_for, recording
from daam.kernels import density, launch

FEATURES = 1024


def launches(order, along, chunk, dtype, full):
    """Launches of a forward and a backward pass. full: with mask, weights, their gradient and residual."""
    shape, axis, feature_axis = {
        ("rows", "chunk"): ((64, chunk), 1, 1),
        ("rows", "nothing"): ((64, chunk), 1, 1),
        ("rows", "inner"): ((8, FEATURES, chunk), 2, 1),
        ("columns", "chunk"): ((8, chunk, FEATURES), 1, 1),
        ("columns", "nothing"): ((8, chunk, FEATURES), 1, 2),
        ("columns", "inner"): ((8, chunk, FEATURES), 1, 2),
    }[order, along]
    x = torch.empty(shape, dtype=dtype, device="meta")
    mean_offset = torch.empty(1, {"chunk": chunk, "nothing": 1, "inner": FEATURES}[along], device="meta")
    mask = torch.empty(shape, dtype=torch.bool, device="meta")[..., :1] if full else None
    args = (x, mean_offset, mean_offset, mask)
    view = (axis, feature_axis, 1e-5, full)
    with recording() as recorded:
        stats = density.density_forward(*args, *view, full, True)[2]
        density.density_backward(x, x if full else None, *args, stats if stats.numel() else None, *view, True, True)
    return recorded


ROWS = [2**k for k in range(1, launch.LONGEST_ROW.bit_length())] + [4 * launch.LONGEST_ROW]
COLUMNS = [2**k for k in range(launch.LONGEST_COLUMN.bit_length())] + [4 * launch.LONGEST_COLUMN]
CONFIGURATIONS = [
    *itertools.product(["rows"], ["chunk", "nothing"], ROWS),
    *itertools.product(["columns"], ["inner", "nothing"], COLUMNS),
    *itertools.product(["rows"], ["inner"], ROWS[::5] + ROWS[-1:]),
    *itertools.product(["columns"], ["chunk"], COLUMNS[::4] + COLUMNS[-1:]),
]
ONE_A_REGIME = [
    ("rows", "chunk", 1024),
    ("rows", "chunk", ROWS[-1]),
    ("columns", "inner", 4),
    ("columns", "inner", 256),
    ("columns", "inner", COLUMNS[-1]),
]
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, "fp64": torch.float64}


def check(target, order, along, chunk, dtype, full):
    recorded = launches(order, along, chunk, DTYPES[dtype], full)
    longest = launch.LONGEST_ROW if order == "rows" else launch.LONGEST_COLUMN
    assert len(recorded) == (4 if chunk > (longest // 4 if dtype == "fp64" else longest) else 2)
    for one in recorded:
        compiled = compile_for(target, one)
        if TARGETS[target].backend == "cuda":  # a wavefront of gfx942 has 64 lanes: other tiles would suit it better
            assert compiled.registers * 32 * one.meta["num_warps"] <= 65536, "no multiprocessor could hold it"
            assert compiled.stack == 0, f"{one.name} spills {compiled.stack} bytes with {compiled.registers} registers"
            assert compiled.load_bits == 128 or (order == "rows" and chunk < 64), one.name


@pytest.mark.parametrize(("dtype", "full"), [("bf16", False), ("bf16", True), ("fp32", False)])
@pytest.mark.parametrize(("order", "along", "chunk"), CONFIGURATIONS)
def test_sm_90(order, along, chunk, dtype, full):
    check("sm_90", order, along, chunk, dtype, full)


@pytest.mark.parametrize("target", ["sm_80", "sm_100", "gfx942"])
@pytest.mark.parametrize(("order", "along", "chunk"), ONE_A_REGIME)
def test_one_configuration_a_regime(target, order, along, chunk):
    check(target, order, along, chunk, "bf16", False)


@pytest.mark.audit
@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(("order", "along", "chunk"), CONFIGURATIONS)
def test_every_configuration(target, order, along, chunk, dtype, full):
    check(target, order, along, chunk, dtype, full)


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize(
    "shape",
    [(5, 37, 1000), (2, 200, 1032), (3, 600, 21), (5, 1001)],
    ids=str,
)
def test_sizes_that_are_no_power_of_two(shape, full):
    """What users have: narrow accesses, and still nothing spills."""
    x = torch.empty(shape, dtype=torch.bfloat16, device="meta")
    c = torch.empty(1, shape[-1], device="meta")
    view = (1, len(shape) - 1, 1e-5, full)
    with recording() as recorded:
        density.density_forward(x, c, c, None, *view, full, False)
        density.density_backward(x, x if full else None, x, c, c, None, None, *view, True, True)
    for one in recorded:
        compiled = compile_for("sm_90", one)
        assert compiled.stack == 0 and compiled.registers * 32 * one.meta["num_warps"] <= 65536, one.name


def test_a_spill_is_seen():
    """The figure that the other tests hold at 0 is not 0 where a tile is too large."""
    (one, _) = launches("columns", "inner", 256, torch.float32, True)
    one.meta.update(BLOCK_INNER=256, num_warps=4)
    assert compile_for("sm_90", one).stack > 0
