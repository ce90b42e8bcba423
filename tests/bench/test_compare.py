"""Tests that what is worse fails: times past their limits, any counted figure; what cannot be compared is told."""

import copy
import json
import os
import sys
from dataclasses import replace
from unittest import mock

import pytest

from bench import compare
from bench.results import read

CASE = {
    "provider": "eager", "pass": "forward", "workload": "w", "bytes": 100, "saved_bytes": 10,
    "seconds": {"p20": 0.9, "p50": 1.0, "p80": 1.1, "iqr": 0.1}, "device": "x86_64 CPU", "commit": "c",
    "of_copy": {"p20": 9.0, "p50": 10.0, "p80": 11.0, "iqr": 0.1},
    "versions": {"torch": "2", "triton": "3"},
}  # fmt: skip
FIGURES = {
    "registers": 120, "stack": 0, "shared": 0, "warps": 16, "load_bits": 128, "store_bits": 128, "loads": 1.0,
    "stores": 1.0, "instructions": 20.0, "special": 1.0, "share": 1.0,
}  # fmt: skip


def speed(**changes):
    """Return a result of two cases and two yardsticks. changes: of the first case. slower: the factor of its times;
    machine, copy: factors of all cases' times, and of the copy that took turns with the first.
    """
    factor, machine_factor, copy_factor = changes.pop("slower", 1), changes.pop("machine", 1), changes.pop("copy", 1)
    info = copy.deepcopy(CASE) | changes
    info["of_copy"]["p50"] *= factor / copy_factor
    cases = {"a": info, "b": CASE, **{f"layer_norm{i}": CASE | {"provider": "layer_norm"} for i in range(2)}}
    for name, case in cases.items():
        times = {key: value * machine_factor * (factor if name == "a" else 1) for key, value in CASE["seconds"].items()}
        cases[name] = case | {"device": info["device"], "seconds": times}
    return {"benchmarks": [{"fullname": f"t[{name}]", "extra_info": case} for name, case in cases.items()]}


def gpu(**changes):
    """Return the same as `speed` on a GPU, which has peak_bytes for saved_bytes."""
    data = speed(device="H200", **{"peak_bytes": 10} | changes)
    for case in data["benchmarks"]:
        case["extra_info"].setdefault("peak_bytes", 10)
        case["extra_info"].pop("saved_bytes")
    return data


def audited(**changes):
    return {"triton": "3.9.0", "targets": {"sm_90": {"a/_forward": FIGURES | changes, "b/_forward": FIGURES}}}


def run(tmp_path, base, new, *options):
    """Return the exit code of the command for two results."""
    paths = [tmp_path / "base.json", tmp_path / "new.json"]
    for path, data in zip(paths, (base, new), strict=True):
        path.write_text(json.dumps(data))
    plot = tmp_path / "regression.png"
    code = compare.main([*map(str, paths), "--plot", str(plot), *options])
    assert plot.exists() == (code != 2)
    return code


@pytest.mark.parametrize(
    ("base", "new", "code", "verdict"),
    [
        (speed(), speed(), 0, None),
        (speed(), speed(slower=1.24), 0, "worse"),
        (speed(), speed(slower=1.26), 1, "FAILED"),
        (speed(slower=1.4), speed(), 0, "better"),
        # the whole machine is slower; a copy is faster, or slower, than others of its run
        (speed(), speed(machine=2), 0, None),
        (speed(), speed(machine=2, slower=1.3), 1, "FAILED"),
        (speed(), speed(copy=0.5), 0, None),
        (speed(), speed(slower=2, copy=0.5), 1, "FAILED"),
        (speed(), speed(slower=2, provider="published"), 0, "worse"),
        (speed(), speed(saved_bytes=11), 1, "FAILED"),
        (speed(), speed(bytes=101), 1, "FAILED"),
        (speed(), speed(saved_bytes=9), 0, "better"),
        (gpu(), gpu(slower=1.04), 0, None),
        (gpu(), gpu(slower=1.06), 1, "FAILED"),
        # an IQR of 3 % of the median: noise may explain 9 %; a new run that is erratic does not excuse itself
        (gpu(of_copy={"p20": 9, "p50": 10, "p80": 11, "iqr": 0.3}), gpu(slower=1.08), 0, "worse"),
        (gpu(of_copy={"p20": 9, "p50": 10, "p80": 11, "iqr": 0.3}), gpu(slower=1.1), 1, "FAILED"),
        (gpu(), gpu(of_copy={"p20": 9, "p50": 12, "p80": 15, "iqr": 3.0}), 1, "FAILED"),
        (gpu(), gpu(peak_bytes=11), 1, "FAILED"),
        (audited(), audited(), 0, None),
        (audited(), audited(instructions=20.01), 1, "FAILED"),
        (audited(), audited(stack=8), 1, "FAILED"),
        (audited(), audited(loads=1.1), 1, "FAILED"),
        (audited(), audited(special=1.5), 1, "FAILED"),
        (audited(), audited(load_bits=64), 1, "FAILED"),
        (audited(), audited(registers=128), 0, "worse"),
        (audited(), audited(registers=129), 1, "FAILED"),
        (audited(), audited(shared=4), 1, "FAILED"),
        (audited(), audited(warps=8), 1, "FAILED"),
        (audited(warps=32), audited(warps=16), 0, "worse"),
        (audited(), audited(instructions=19.0), 0, "better"),
    ],
)
def test_verdict(base, new, code, verdict, tmp_path, capsys):
    assert run(tmp_path, base, new) == code
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith(("a ", "sm_90/a"))]
    assert [line.split()[-1] for line in lines] == ([verdict] if verdict else [])


@pytest.mark.parametrize(
    ("base", "new", "reason"),
    [
        (speed(), audited(), "the other of the audit"),
        (speed(), gpu(), "devices differ"),
        (audited(), audited() | {"triton": "3.6.0"}, "compilers differ: triton 3.9.0 and 3.6.0"),
        (audited(), {"triton": "3.9.0", "targets": {"sm_80": {"a/_forward": FIGURES}}}, "no case is in both"),
        (speed(), {"benchmarks": []}, "holds no cases"),
        (speed(), ["nonsense"], "holds no cases"),
    ],
)
def test_nothing_to_compare(base, new, reason, tmp_path, capsys):
    assert run(tmp_path, base, new) == 2
    assert reason in capsys.readouterr().err


NAN, INF = float("nan"), float("inf")
TIMES = {"p20": 0.9, "p50": 1.0, "p80": 1.1, "iqr": 0.1}


def times(value):
    return dict.fromkeys(TIMES, value)


def broken(data, **figures):
    """Return a result with other figures in its first case."""
    data["benchmarks"][0]["extra_info"] |= figures
    return data


@pytest.mark.parametrize("side", ["base", "new", "both"])
@pytest.mark.parametrize(
    ("figures", "figure"),
    [
        *(({"seconds": times(value)}, "seconds.p50") for value in (NAN, INF, -1.0, 0.0, 0, "1.0", None, True, 10**400)),
        *(({"of_copy": times(value)}, "of_copy.p50") for value in (NAN, INF, -1.0, 0.0)),
        *(({"of_copy": TIMES | {"iqr": value}}, "of_copy.iqr") for value in (NAN, INF, -0.1, "0.1")),
        ({"seconds": 1.0}, "seconds is 1.0"),
        ({"of_copy": [9.0, 10.0]}, "of_copy is [9.0, 10.0]"),
        ({"of_copy": None}, "of_copy is None"),
        ({"seconds": {"p20": 1.0}}, "seconds.p50 is missing"),
        *(({"bytes": value}, "bytes") for value in (NAN, INF, -1, [100], "100", None)),
        ({"error": NAN}, "error"),
        ({"device": "H200", "of_copy": times(NAN)}, "of_copy.p50"),
        ({"device": "H200", "peak_bytes": INF}, "peak_bytes"),
        ({"provider": "published", "seconds": times(NAN)}, "seconds.p50"),
    ],
)
def test_what_is_no_time_fails(figures, figure, side, tmp_path, capsys):
    make = gpu if "device" in figures else speed
    sides = {name: broken(make(), **figures) if side in (name, "both") else make() for name in ("base", "new")}
    unusable(tmp_path, capsys, *sides.values(), side, figure)


@pytest.mark.parametrize("side", ["base", "new", "both"])
@pytest.mark.parametrize(
    ("figure", "value"),
    [
        *(("instructions", value) for value in (NAN, INF, -1.0, "20", None, [20.0])),
        *((name, NAN) for name in ("registers", "load_bits", "stack", "share", "warps")),
        ("warps", "16"),
    ],
)
def test_what_is_no_count_fails(figure, value, side, tmp_path, capsys):
    sides = [audited(**{figure: value} if side in (name, "both") else {}) for name in ("base", "new")]
    unusable(tmp_path, capsys, *sides, side, figure)


def unusable(tmp_path, capsys, base, new, side, figure):
    """Check that a line names the case, the file and the figure, and that nothing else of the case is compared."""
    with mock.patch.object(compare.plot, "regression", lambda changes, title, path: path.touch()):  # takes long
        assert run(tmp_path, base, new) == 1
    out = capsys.readouterr().out
    lines = [line for line in out.splitlines() if line.startswith(("a ", "sm_90/a"))]
    for name in ("base", "new") if side == "both" else (side,):
        (line,) = [line for line in lines if f"unusable     in {tmp_path / name}.json" in line]
        assert figure in line and line.endswith("FAILED")
    assert len(lines) == 1 + (side == "both") and " 0 failed" not in out


def test_every_figure_may_be_none(tmp_path, capsys):
    """Check a result whose figures are all none: there is nothing left to compare, and no yardstick."""
    data = speed()
    for case in data["benchmarks"]:
        case["extra_info"]["seconds"] = times(NAN)
    assert run(tmp_path, data, data) == 1
    assert "4 cases, 8 figures: 8 failed" in capsys.readouterr().out


def test_a_case_of_the_new_run_alone_is_looked_at(tmp_path, capsys):
    new = speed()
    new["benchmarks"].append({"fullname": "t[more]", "extra_info": CASE | {"seconds": times(NAN)}})
    assert run(tmp_path, speed(), new) == 1 and "more" in capsys.readouterr().out
    assert run(tmp_path, speed(), new, "--subset") == 1


def test_a_figure_that_the_audit_lacks_fails(tmp_path):
    new = audited()
    del new["targets"]["sm_90"]["a/_forward"]["special"]
    assert run(tmp_path, audited(), new) == run(tmp_path, new, audited()) == 1
    assert run(tmp_path, audited(warps=None), audited(warps=None)) == 0
    assert run(tmp_path, audited(), audited(warps=None)) == 1


@pytest.mark.parametrize(
    "data",
    [
        {"benchmarks": 3},
        {"benchmarks": [{"extra_info": {"of_copy": 1}}]},
        {"benchmarks": [{"fullname": 3, "extra_info": CASE}]},
        {"benchmarks": [{"fullname": "a", "extra_info": 3}]},
        {"benchmarks": [{"fullname": "a", "extra_info": "of_copy"}]},
        {"targets": 3, "triton": "3.9.0"},
        {"targets": {"sm_90": 3}, "triton": "3.9.0"},
        {"targets": {"sm_90": {}}},
        3,
    ],
)
def test_json_of_another_shape_is_named(data, tmp_path, capsys):
    assert run(tmp_path, data, data) == 2
    assert f"{tmp_path / 'base.json'} holds no cases" in capsys.readouterr().err


def test_a_case_that_is_a_number_fails(tmp_path, capsys):
    data = audited()
    data["targets"]["sm_90"]["a/_forward"] = 3
    assert run(tmp_path, data, data) == 1 and "the case is 3" in capsys.readouterr().out
    assert run(tmp_path, data, {**data, "targets": {"sm_90": {"b/_forward": FIGURES}}}) == 1


def test_unreadable_file(tmp_path, capsys):
    assert compare.main([str(tmp_path / "none.json")] * 2) == 2
    assert "cannot be read" in capsys.readouterr().err


def test_cases_are_aligned_by_name(tmp_path, capsys):
    """Check that cases are not aligned by place, and that what only one side has is named."""
    base, new = speed(), speed(slower=1.5)
    new["benchmarks"].reverse()
    assert run(tmp_path, base, new) == 1
    (failed,) = [line for line in capsys.readouterr().out.splitlines() if line.endswith("FAILED")]
    assert failed.startswith("a ") and "+50.0 %" in failed


@pytest.mark.parametrize("gone", ["a case", "a foreign case", "a figure", "a kernel"])
def test_what_is_missing_fails_if_it_is_ours(gone, tmp_path, capsys):
    base, new = (audited(), audited()) if gone == "a kernel" else (speed(), speed())
    if gone == "a kernel":
        del new["targets"]["sm_90"]["b/_forward"]
    elif gone == "a figure":
        del new["benchmarks"][0]["extra_info"]["saved_bytes"]
    else:
        provider = "compile" if gone == "a case" else "published"
        base["benchmarks"].append({"fullname": "t[gone]", "extra_info": CASE | {"provider": provider}})
    assert run(tmp_path, base, new) == (gone != "a foreign case")
    if gone != "a figure":
        assert run(tmp_path, base, new, "--subset") == 0


def test_lines_of_cases_are_read(tmp_path):
    path = tmp_path / "cases.jsonl"
    path.write_text("\n".join(json.dumps(case) for case in speed()["benchmarks"]))
    rows = read(path).rows
    assert list(rows) == ["t[a]", "t[b]", "t[layer_norm0]", "t[layer_norm1]"] and rows["t[a]"] == CASE


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="interpreted kernels cannot be compiled")
@pytest.mark.parametrize("fault", ["slowed", "spilled"])
def test_a_worse_configuration_is_caught(fault, tmp_path, capsys):
    """Check a row over eight warps, which issues more, and a tile of four times the columns, which spills."""
    pytest.importorskip("triton")
    from bench import audit
    from daam.kernels import tiles
    from daam.kernels.host import plan

    chosen = {
        "slowed": audit.Configuration("density", "rows", "nothing", 1024, "fp32"),
        "spilled": audit.Configuration("density", "columns", "inner", 64, "fp32"),
    }[fault]
    changes = {"slowed": {"num_warps": 8}, "spilled": {"columns": 256}}[fault]
    original = tiles.find_tile

    def write(path):
        arguments = ["audit", "--targets", "sm_90", "--dtypes", "fp32", "--output", str(path)]
        with mock.patch.object(sys, "argv", arguments), mock.patch.object(audit, "CONFIGURATIONS", [chosen]):
            audit.main()

    base, new = tmp_path / "base.json", tmp_path / "new.json"
    write(base)
    with mock.patch.object(tiles, "find_tile", lambda *args: replace(original(*args), **changes)):
        plan.cache_clear()  # plans keep their tiles
        write(new)
    plan.cache_clear()
    capsys.readouterr()
    assert compare.main([str(base), str(new), "--plot", str(tmp_path / "plot.png")]) == 1
    failed = [tuple(line.split()[:2]) for line in capsys.readouterr().out.splitlines() if line.endswith("FAILED")]
    assert (f"sm_90/{chosen}/density_backward", {"slowed": "instructions", "spilled": "stack"}[fault]) in failed
