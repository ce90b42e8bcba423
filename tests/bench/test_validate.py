"""What holds the model against clocks: rows are chosen, forced into their tiles and judged right, and all committed."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("interpreted kernels cannot be compiled", allow_module_level=True)

import torch
import triton

from bench import aot, norms, validate
from bench.gpus import GPUS
from bench.modelled import record_passes
from bench.validate import Row

ROOT = Path(validate.__file__).parents[1]
H200 = GPUS["h200"]
COPY = next(case for case in validate.read("streams") if case["case"] == "stream-copy")
TILE = "last-gate-65536x1024-axis1-heads1-gaussians4-bfloat16-forward-128x8x2, 1 warps"


@pytest.fixture(scope="module", params=["model", "model-triton-3.6.0"])
def committed(request):
    return json.loads((ROOT / "bench" / "history" / f"{request.param}.json").read_text())


def groups_of(committed):
    return [group for group in committed if group != "triton"]


@pytest.fixture(scope="module")
def same_compiler(committed):
    if committed["triton"] != triton.__version__:
        pytest.skip(f"committed figures are of triton {committed['triton']}, here is {triton.__version__}")
    return {case["case"]: case for group in groups_of(committed) for case in committed[group]["cases"]}


def test_errors():
    """Check that errors are relative to the clock, and that what spills counts in no median."""
    slow, fast = Row("", "", "h200", 10.0, 12.0), Row("", "", "h200", 10.0, 6.0)
    assert (round(slow.error, 6), round(fast.error, 6)) == (0.2, -0.4)
    spilled = Row("", "", "h200", 10.0, 1.0, spills=8)
    assert validate.summarise([slow, fast, spilled]) == {"rows": 3, "median": 0.3, "worst": 0.4}


def test_a_stream(same_compiler):
    """Check what a copy moves, how long its loop is, and its row."""
    (row,) = validate.stream_rows(H200, [COPY])
    assert validate.describe(row) == same_compiler["stream-copy"] and abs(row.error) < 0.15
    launch = validate.launch_stream(validate.Stream())
    assert launch.read == launch.written == 2**28
    assert launch.turns * launch.programs * 32 * 64 == 2**28  # bytes a thread and warp


def test_liger(same_compiler):
    pytest.importorskip("liger_kernel")
    (case,) = (case for case in validate.read("norms") if (case["kind"], case["m"]) == ("layer", 8192))
    forward, backward = validate.liger_rows([case])
    assert [validate.describe(row) for row in (forward, backward)] == [
        same_compiler[r.case] for r in (forward, backward)
    ]
    zeroed, kernel, *_sums = norms.liger("rms", 1000, 4096, GPUS["b200"])["backward"]
    assert zeroed.recorded is None and zeroed.written == 1000 * 4096 * 2
    assert kernel.recorded.grid == (148,) and kernel.rows == 7  # of the GPU that is modelled
    assert kernel.recorded.args[0].device.type == "meta"


def test_without_liger():
    with (
        mock.patch.dict(sys.modules, {"liger_kernel.ops.rms_norm": None}),
        pytest.raises(ImportError, match=r"pip install 'daam-triton\[bench\]'"),
    ):
        norms.import_liger("rms")


@pytest.mark.parametrize("make", [norms.layer_norm, norms.softmax])
def test_own_norms_compile(make):
    steps, moved = make(512, 4096, H200), 512 * 4096 * 2
    assert norms.count_spills(steps, H200) == 0 and 3 < norms.estimate(steps, H200) < 30
    assert (steps[0].read, steps[0].written) == (moved, moved)


def test_a_tile_is_forced():
    (case,) = (case for case in validate.read("tiles") if case["case"] == TILE)
    row = validate.tile_row(**case)
    assert (row.group, row.us, row.spills) == ("ours, one warp", case["us"], 0) and abs(row.error) < 0.25
    x, p = torch.empty(64, 1024, dtype=torch.bfloat16, device="meta"), torch.empty(1, 4, device="meta")
    found = []
    for tile in (validate.tiles.Tile(128, 2, 1, 8), validate.tiles.Tile(64, 1, 1, 2)):
        with validate.planning(tile):
            found.append(record_passes("gate", x, p, None, 1, None, full=False)["forward"])
    (on_chip,), streamed = found
    plan = on_chip.meta["PLAN"]
    assert (on_chip.name, plan.BLOCK_P, plan.N_BLOCKS, plan.BLOCK_C) == ("gate_forward", 128, 8, 2)
    assert [one.name for one in streamed] == ["strip_stats", "merge_strip_stats", "forward_streamed"]


def test_options_of_other_kernels_are_their_own():
    with aot.recording_triton() as made:
        norms.softmax_forward[(1,)](torch.empty(2, 8), torch.empty(2, 8), 2, 8, BLOCK=8, num_warps=2)
    (one,) = made
    assert (one.grid, one.meta) == ((1,), {"BLOCK": 8, "num_warps": 2}) and "maxnreg" not in one.options
    assert one.args[0].device.type == "meta"


def test_every_row_is_committed(committed):
    cases = {group: [case["case"] for case in committed[group]["cases"]] for group in groups_of(committed)}
    with_tiles = validate.OURS[0] in cases
    assert tuple(cases) == validate.OTHERS + (validate.OURS if with_tiles else ())
    assert with_tiles == (committed["triton"] == "3.6.0"), "the Triton that compiled what was timed"
    assert cases["streams"] == [case["case"] for case in validate.read("streams")]
    assert len(cases["liger forward"]) == len(cases["liger backward"]) == len(validate.read("norms"))
    assert len(cases["published forward"]) + len(cases["published backward"]) == len(validate.PUBLISHED)
    if not with_tiles:
        return
    tiles = {name for group in validate.OURS for name in cases[group]}
    measured = [case["case"] for case in validate.read("tiles")]
    assert {name for name in measured if name.endswith("shipped")} < tiles <= set(measured)
    passes = [{re.sub("ward-.*", "", name) for name in names} for names in (tiles, measured)]
    assert passes[0] == passes[1]


def test_committed_summaries(committed):
    for group in groups_of(committed):
        found = [
            Row(group, c["case"], c["gpu"], c["us"], c["modelled"], c.get("spills", 0))
            for c in committed[group]["cases"]
        ]
        summary = validate.summarise(found)
        assert summary["rows"] == committed[group]["rows"]
        assert abs(summary["median"] - committed[group]["median"]) < 0.004
        assert abs(summary["worst"] - committed[group]["worst"]) < 0.004


def test_make_audit_compares_the_model():
    done = subprocess.run(["make", "-n", "audit"], cwd=ROOT, capture_output=True, text=True, check=True)
    assert "diff bench/history/model.json build/audit/model.json" in done.stdout
