"""The host's time is that of a call that launches nothing, all of it; compare judges it, plots leave it out."""

import copy
import itertools
import json
import pkgutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from unittest import mock

import pytest
import torch
from helpers import ALGORITHMS, recorded_launches

import daam
from bench import compare, core, host, plot
from bench.providers import PROVIDERS, Task
from bench.results import read
from daam.backend import interpreting

ROOT = Path(__file__).parents[2]
workloads = pytest.mark.parametrize("workload", host.WORKLOADS, ids=lambda one: one.algorithm)
few_rounds = mock.patch.multiple(host, WARM_UP=2, ROUNDS=9)


@pytest.fixture(autouse=True)
def compiled():
    pytest.importorskip("triton")
    if interpreting():
        pytest.skip("the benchmark does not run in Triton's interpreter")


def test_every_algorithm_is_measured():
    assert [one.algorithm for one in host.WORKLOADS] == list(ALGORITHMS)


@workloads
def test_a_pass_launches_its_kernels(workload):
    """Each of them once, on the way that users' calls take, with x requiring grad; and none is run."""
    with host.launching_nothing(), recorded_launches() as names:
        candidate = PROVIDERS["triton"].build(Task(workload, "cpu"))
        done = []
        for which in host.PASSES:
            one = core.step(candidate, which)
            state = one.prepare()
            names.clear()
            one.run(state)
            done += names
    assert done == ALGORITHMS[workload.algorithm].kernels[0]
    assert candidate.leaves[0].requires_grad and candidate.backend == "triton"


@pytest.mark.parametrize(
    ("stage", "passes"),
    [
        ("daam.functional.check_x", {"forward"}),
        ("daam.functional.backend_for", {"forward"}),
        ("daam.ops.Attention.setup_context", {"forward"}),
        ("daam.kernels.density.forward", {"forward"}),
        ("daam.ops.Attention.backward", {"backward"}),
        ("daam.kernels.density.backward", {"backward"}),
        ("daam.kernels.launch.launch", {"forward", "backward"}),
    ],
)
def test_every_stage_counts_in_its_pass(stage, passes):
    """The clock, which stands still but in this stage, shows it there and not in the other pass, nor in the copy."""
    original, seconds = pkgutil.resolve_name(stage), 0

    @staticmethod
    def counted(*args, **options):
        nonlocal seconds
        seconds += 1
        return original(*args, **options)

    clock = mock.Mock(perf_counter=lambda: seconds)
    with few_rounds, mock.patch(stage, counted), mock.patch.object(core, "time", clock):
        for which in host.PASSES:
            own, beside = host.samples(host.WORKLOADS[0], which)
            assert (min(own) > 0) == (max(own) > 0) == (which in passes), f"{which}: {own}"
            assert max(beside) == 0


def test_the_stub_is_taken_back():
    from triton.runtime import JITFunction

    before = JITFunction.run
    with host.launching_nothing():
        assert daam.backend_for(torch.empty(1), "triton")[0] == "triton" and JITFunction.run is not before
    assert JITFunction.run is before
    with pytest.raises(RuntimeError, match="cannot run"):
        daam.backend_for(torch.empty(1), "triton")


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """What the benchmark writes, out of a process of its own."""
    path = tmp_path_factory.mktemp("host") / "results.json"
    command = ["pytest", "bench/test_host.py", "--benchmark-only", f"--benchmark-json={path}"]
    began = time.monotonic()
    subprocess.run([sys.executable, "-m", *command], cwd=ROOT, capture_output=True, check=True)
    return {**json.loads(path.read_text()), "wall_seconds": time.monotonic() - began}


def test_figures(results):
    cases = [one["extra_info"] for one in results["benchmarks"]]
    assert {(one["algorithm"], one["pass"]) for one in cases} == set(itertools.product(ALGORITHMS, host.PASSES))
    for one, case in zip(results["benchmarks"], cases, strict=True):
        assert one["stats"]["rounds"] == host.ROUNDS
        assert one["stats"]["median"] == pytest.approx(case["seconds"]["p50"], rel=1e-5)
        assert case["seconds"]["p50"] > 0 and case["of_copy"]["p50"] > 1
    # half of the rounds took the median or more, all within the run
    assert sum(case["seconds"]["p50"] for case in cases) * host.ROUNDS / 2 < results["wall_seconds"]


@pytest.mark.parametrize(("slower", "code"), [(1.2, 0), (1.3, 1)])
def test_a_slower_host_fails(slower, code, results, tmp_path, capsys):
    """Of one pass of one algorithm, past the limit of a CPU."""
    new, paths = copy.deepcopy(results), [tmp_path / "base.json", tmp_path / "new.json"]
    info = new["benchmarks"][0]["extra_info"]
    for key in ("seconds", "of_copy"):
        info[key] = {name: slower * value for name, value in info[key].items()}
    for path, data in zip(paths, (results, new), strict=True):
        path.write_text(json.dumps(data))
    assert compare.main([*map(str, paths), "--plot", str(tmp_path / "plot.png")]) == code
    failed = [line.split()[0] for line in capsys.readouterr().out.splitlines() if line.endswith("FAILED")]
    assert failed == [info["workload"] + "-" + info["pass"]] * code


def test_plots_leave_it_out(results):
    """Those of a run that begins with the host's cases are those of a run without them."""
    run = read(sorted(Path(plot.__file__).parent.glob("history/*cpu*/20*.json"))[-1])
    without = replace(run, rows={name: one for name, one in run.rows.items() if one["family"] != "host"})
    rows = {one["fullname"]: one["extra_info"] for one in results["benchmarks"]}
    for draw in (plot.latency, plot.throughput, plot.memory, plot.speedup):
        drawn, expected = draw(replace(run, rows=rows | without.rows)), draw(without)
        assert drawn.get_suptitle() == expected.get_suptitle()
        for axes, others in zip(drawn.axes, expected.axes, strict=True):
            assert [len(axes.get_lines()), len(axes.patches)] == [len(others.get_lines()), len(others.patches)]
        assert draw(replace(run, rows=rows)) is None
