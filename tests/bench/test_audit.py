"""The audit reads machine code: what counts as what, and figures of a kernel that can be counted by hand."""

import json
import os
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path
from unittest import mock

import pytest

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("interpreted kernels cannot be compiled", allow_module_level=True)

from bench import audit, compare
from bench.aot import compile_for
from bench.configurations import CONFIGURATIONS, ONE_A_REGIME, Configuration, GatedConfiguration
from bench.machine_code import instructions, main_loop
from bench.results import read

ROOT = Path(audit.__file__).parents[1]

NVIDIA = """
_kernel:
.text._kernel:
        /*0000*/                   LDC R1, c[0x0][0x28] ;
.L_x_1:
        /*0010*/              @!P0 LDG.E.128 R4, desc[UR14][R2.64] ;
        /*0020*/                   LDG.E.U16 R8, desc[UR14][R2.64] ;
.L_x_2:
        /*0030*/                   MUFU.EX2 R0, R4 ;
        /*0040*/                   NOP ;
        /*0050*/               @P1 BRA `(.L_x_2) ;
        /*0060*/                   STG.E.64 desc[UR14][R2.64], R4 ;
        /*0070*/              @!P2 BRA `(.L_x_1) ;
        /*0080*/                   EXIT ;
.L_x_3:
        /*0090*/                   BRA `(.L_x_3);
"""
AMD = """
kernel:
\ts_load_dwordx4 s[0:3], s[4:5], 0x0
.LBB0_1:                                ; =>This Inner Loop Header: Depth=1
\tglobal_load_dwordx4 v[0:3], v4, s[0:1]
\tglobal_load_ushort v5, v4, s[0:1]
\tv_exp_f32_e32 v0, v0
\tglobal_store_dwordx2 v4, v[0:1], s[2:3]
\ts_cbranch_scc1 .LBB0_1
\ts_endpgm
"""


@pytest.mark.parametrize(("text", "length", "extra"), [(NVIDIA, 6, 1), (AMD, 5, 0)], ids=["nvidia", "amd"])
def test_main_loop(text, length, extra):
    """Check that the main loop is the one that moves memory, with the one inside it, but without padding and what
    stands around it.
    """
    code = instructions(text)
    first, last = main_loop(code)
    loop = code[first : last + 1]
    assert len(loop) == length and len(code) > length
    assert [instruction.bits for instruction in loop if instruction.loads] == [128, 16]
    assert [instruction.bits for instruction in loop if instruction.bits and not instruction.loads] == [64]
    assert sum(instruction.special for instruction in loop) == 1
    assert sum(instruction.target is not None for instruction in loop) == 1 + extra


def test_code_without_a_loop():
    assert main_loop(instructions(NVIDIA.replace("BRA", "MOV"))) is None


@pytest.mark.parametrize("target", ["sm_90", "gfx942"])
def test_figures(target):
    """Check that x is loaded once and y stored once; backward x, grad_y and dx once each; an exponential an element."""
    configuration = Configuration("density", "rows", "nothing", 1024)
    found = dict(audit.audit(target, [configuration]))
    forward, backward = found[f"{configuration}/density_forward"], found[f"{configuration}/density_backward"]
    assert (forward.loads, forward.stores) == (backward.loads / 2, backward.stores) == (1.0, 1.0)
    assert 1 <= forward.special < 1.2 and 10 < forward.instructions < backward.instructions < 80
    bits = 128 if target == "sm_90" else 64  # 64 lanes share a block there
    assert (forward.load_bits, forward.store_bits, forward.stack) == (bits, bits, 0)
    assert (forward.share is None) == (target == "gfx942")


@pytest.mark.parametrize("target", ["sm_90", "gfx942"])
def test_figures_of_the_fused_gate(target):
    """Check that every kernel moves what it must of x, and beside it rows and columns, and takes no exponentials."""
    configuration = GatedConfiguration("channels", 128, 1125)
    found = dict(audit.audit(target, [configuration]))
    moved = {"project": (1, 0), "forward": (1, 1), "sums": (2, 0), "backward": (2, 1)}
    assert list(found) == [f"{configuration}/gated_{name}" for name in moved]
    bits = 128 if target == "sm_90" else 64  # 64 lanes share a block there
    for figures, (loads, stores) in zip(found.values(), moved.values(), strict=True):
        assert loads <= figures.loads < 1.7 * loads and stores <= figures.stores < 1.1 * stores + 0.01
        assert figures.stack == 0 and figures.special < 0.2 and figures.load_bits == bits


def test_figures_of_layers():
    """Check that layers together load x once, and that each adds instructions of its own."""
    found = [
        dict(audit.audit("sm_90", [Configuration("mixture", "rows", "nothing", 256, "fp32", layers=layers)]))
        for layers in (1, 2)
    ]
    for (_, single), (name, double) in zip(*(one.items() for one in found), strict=True):
        assert name.startswith("mixture-layers2-rows-nothing-256-fp32/") and name.endswith("_layers")
        assert (single.loads, single.stores) == (double.loads, double.stores)
        assert 1.5 * single.instructions < double.instructions < 3 * single.instructions


@pytest.fixture(scope="module")
def committed():
    run = read(ROOT / "bench" / "history" / "audit" / "sm_90.json")
    if run.versions["triton"] != audit.triton.__version__:
        pytest.skip(f"committed figures are of triton {run.versions['triton']}, here is {audit.triton.__version__}")
    return run


EVERY = {replace(one, dtype=dtype) for one in CONFIGURATIONS for dtype in audit.AUDITED}
SELDOM = sorted(EVERY.difference(ONE_A_REGIME), key=str)


@pytest.mark.parametrize(
    "configuration", [*ONE_A_REGIME, *(pytest.param(seldom, marks=pytest.mark.audit) for seldom in SELDOM)], ids=str
)
def test_sm_90_is_as_committed(configuration, committed):
    """Check that nothing became worse; and that what became better is committed, lest it become worse unseen."""
    rows = {f"sm_90/{name}": asdict(figures) for name, figures in audit.audit("sm_90", [configuration])}
    changes = compare.compare(committed, replace(committed, rows=rows), whole=False)
    assert not [change for change in changes if change.failed]
    known = {name: figures for name, figures in committed.rows.items() if name.split("/")[1] == str(configuration)}
    assert rows == known, "out of date: python -m bench.audit --targets sm_90 --output bench/history/audit/sm_90.json"


def test_every_configuration_is_committed(committed):
    names = {name.split("/")[1] for name in committed.rows}
    assert names == set(map(str, EVERY))


@pytest.mark.parametrize("target", ["sm_80", "sm_90"])
def test_nothing_that_is_committed_spills(target):
    """Include what `make test` does not compile. Rows that are streamed keep 16 bytes on the stack at most, which are
    read again once a strip: without, a multiprocessor would hold three programs and not four. On sm_80 the stabilised
    mixture's backward pass over columns may keep 40: smaller tiles issue a fifth more.
    """
    rows, most = read(ROOT / "bench" / "history" / "audit" / f"{target}.json").rows, {}
    for name in rows:
        most[name] = 16 if "-rows-" in name and not name.endswith(("_forward", "_backward")) else 0
        if name.startswith("sm_80/stable-columns-") and name.endswith("/stable_backward"):
            most[name] = 40
    assert rows and not [name for name, figures in rows.items() if figures["stack"] > most[name]]


@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100"])
def test_all_of_x_is_loaded_in_what_is_committed(target):
    """Check that the loop whose figures are given is the one that reads x, on every target that is modelled."""
    rows = read(ROOT / "bench" / "history" / "audit" / f"{target}.json").rows
    assert rows and not [name for name, figures in rows.items() if figures["loads"] < 0.99]


def test_the_same_twice():
    configuration = Configuration("gate", "columns", "nothing", 6)
    assert dict(audit.audit("sm_90", [configuration])) == dict(audit.audit("sm_90", [configuration]))


def test_a_worse_kernel_has_worse_figures():
    """Check that a row over too many warps issues more, and that a tile too large spills and holds fewer warps."""
    recorded = Configuration("density", "rows", "nothing", 1024).launches()[0]
    good = audit.figures("sm_90", recorded, compile_for("sm_90", recorded))
    recorded.meta.update(num_warps=8)
    assert audit.figures("sm_90", recorded, compile_for("sm_90", recorded)).instructions > 1.5 * good.instructions
    recorded = Configuration("density", "columns", "inner", 256, "fp32", True).launches()[0]
    recorded.meta.update(PLAN=recorded.meta["PLAN"]._replace(BLOCK_C=256), num_warps=4)
    bad = audit.figures("sm_90", recorded, compile_for("sm_90", recorded))
    assert bad.stack > 0 and bad.warps == 8


def test_command(tmp_path, capsys):
    output = tmp_path / "audit.json"
    arguments = ["audit", "--targets", "sm_90", "--dtypes", "bf16", "--output", str(output)]
    with (
        mock.patch.object(sys, "argv", arguments),
        mock.patch.object(audit, "CONFIGURATIONS", [Configuration("mixture", "rows", "nothing", 64)]),
    ):
        audit.main()
    found = json.loads(output.read_text())["targets"]["sm_90"]
    assert list(found) == [f"mixture-rows-nothing-64-bf16/{name}" for name in ("mixture_forward", "mixture_backward")]
    printed = capsys.readouterr().out
    assert all(name in printed for name in found) and "registers" in printed


def test_make_audit_compares_every_target():
    done = subprocess.run(["make", "-n", "audit"], cwd=ROOT, capture_output=True, text=True, check=True)
    for target in audit.TARGETS:
        assert f"bench.compare bench/history/audit/{target}.json build/audit/{target}.json" in done.stdout
