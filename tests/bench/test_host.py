"""The host's time is that of a call, all of it, with launches and without; compare judges it, plots leave it out."""

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
from bench import compare, core, host, plot, stub_driver
from bench.providers import PROVIDERS, Task
from bench.results import read, short
from daam.backend import interpreting
from daam.kernels import launch

ROOT = Path(__file__).parents[2]
workloads = pytest.mark.parametrize("workload", host.WORKLOADS, ids=lambda one: one.algorithm)
launchers = pytest.mark.parametrize("launcher", host.LAUNCHERS)
few_rounds = mock.patch.multiple(host, WARM_UP=2, ROUNDS=9)


@pytest.fixture(autouse=True)
def compiled():
    pytest.importorskip("triton")
    if interpreting():
        pytest.skip("the benchmark does not run in Triton's interpreter")
    try:
        stub_driver.build()
    except stub_driver.UnavailableError as why:
        pytest.skip(f"no launches without a stub of the driver: {why}")


def test_every_algorithm_is_measured():
    assert [workload.algorithm for workload in host.WORKLOADS] == list(ALGORITHMS)


@workloads
@launchers
def test_a_pass_launches_its_kernels(workload, launcher):
    """Check that each is launched once, on the way that users' calls take, with x requiring grad."""
    with host.LAUNCHERS[launcher](), recorded_launches() as names:
        candidate = PROVIDERS["triton"].build(Task(workload, "cpu"))
        done = []
        for pass_name in host.PASSES:
            step = core.step(candidate, pass_name)
            state = step.prepare()
            names.clear()
            step.run(state)
            done += names
    assert done == ALGORITHMS[workload.algorithm].kernels[0]
    assert candidate.leaves[0].requires_grad and candidate.backend == "triton"


@workloads
def test_launches_reach_the_driver_or_not(workload):
    """Check that all launches of a pass do by the launcher that says so, and none by the other."""
    reached = []
    with stub_driver.stub_driver(lambda *args: reached.append(args)), host.taking_any_tensor():
        candidate = PROVIDERS["triton"].build(Task(workload, "cpu"))
        candidate.backward(candidate.forward())
        assert len(reached) == len(ALGORITHMS[workload.algorithm].kernels[0])
        with host.launching_nothing():
            candidate.backward(candidate.forward())
        assert len(reached) == len(ALGORITHMS[workload.algorithm].kernels[0])
        candidate.forward()
        assert len(reached) == len(ALGORITHMS[workload.algorithm].kernels[0]) + 1


@launchers
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
def test_every_stage_counts_in_its_pass(stage, passes, launcher):
    """Check that a clock that stands still but in this stage shows it there, and not in the other pass, nor in the
    copy.
    """
    original, seconds = pkgutil.resolve_name(stage), 0

    @staticmethod
    def counted(*args, **options):
        nonlocal seconds
        seconds += 1
        return original(*args, **options)

    clock = mock.Mock(perf_counter=lambda: seconds)
    with few_rounds, mock.patch(stage, counted), mock.patch.object(core, "time", clock):
        for pass_name in host.PASSES:
            times, copy_times = host.samples(host.WORKLOADS[0], pass_name, launcher)
            assert (min(times) > 0) == (max(times) > 0) == (pass_name in passes), f"{pass_name}: {times}"
            assert max(copy_times) == 0


@launchers
def test_the_stub_is_taken_back(launcher):
    import triton

    before, kept, entries = triton.runtime.driver._active, launch.kept, dict(launch.kept)
    with host.LAUNCHERS[launcher]():
        assert daam.backend_for(torch.empty(1), "triton")[0] == "triton"
        x = torch.ones(2, 24, 8)
        daam.density_attention(x, x[0, :1], x[0, :1], backend="triton")
    assert triton.runtime.driver._active is before and launch.kept is kept and launch.kept == entries
    with pytest.raises(RuntimeError, match="cannot run"):
        daam.backend_for(torch.empty(1), "triton")


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """Return what the benchmark writes, from a process of its own."""
    path = tmp_path_factory.mktemp("host") / "results.json"
    command = ["pytest", "bench/test_host.py", "--benchmark-only", f"--benchmark-json={path}"]
    began = time.monotonic()
    subprocess.run([sys.executable, "-m", *command], cwd=ROOT, capture_output=True, check=True)
    return {**json.loads(path.read_text()), "wall_seconds": time.monotonic() - began}


@pytest.mark.slow
def test_figures(results):
    cases = [benchmark["extra_info"] for benchmark in results["benchmarks"]]
    expected = itertools.product(ALGORITHMS, host.PASSES, host.LAUNCHERS)
    assert sorted((case["algorithm"], case["pass"], case["launcher"]) for case in cases) == sorted(expected)
    for benchmark, case in zip(results["benchmarks"], cases, strict=True):
        assert benchmark["stats"]["rounds"] == host.ROUNDS
        assert benchmark["stats"]["median"] == pytest.approx(case["seconds"]["p50"], rel=1e-5)
        assert case["seconds"]["p50"] > 0 and case["of_copy"]["p50"] > 1
    # half of the rounds took the median or more, all within the run
    assert sum(case["seconds"]["p50"] for case in cases) * host.ROUNDS / 2 < results["wall_seconds"]


@pytest.mark.slow
@pytest.mark.parametrize(("slower", "code"), [(1.2, 0), (1.3, 1)])
def test_a_slower_host_fails(slower, code, results, tmp_path, capsys):
    """Check one pass of one algorithm, slower than the limit of a CPU or not."""
    new, paths = copy.deepcopy(results), [tmp_path / "base.json", tmp_path / "new.json"]
    info = new["benchmarks"][0]["extra_info"]
    for key in ("seconds", "of_copy"):
        info[key] = {name: slower * value for name, value in info[key].items()}
    for path, data in zip(paths, (results, new), strict=True):
        path.write_text(json.dumps(data))
    assert compare.main([*map(str, paths), "--plot", str(tmp_path / "plot.png")]) == code
    failed = [line.split()[0] for line in capsys.readouterr().out.splitlines() if line.endswith("FAILED")]
    assert failed == [short(new["benchmarks"][0]["fullname"])] * code


@pytest.mark.slow
def test_plots_leave_it_out(results):
    """Check that plots of a run that begins with the host's cases are those of a run without them."""
    run = read(sorted(Path(plot.__file__).parent.glob("history/*cpu*/20*.json"))[-1])
    device_run = replace(run, rows={name: case for name, case in run.rows.items() if case["family"] != "host"})
    rows = {case["fullname"]: case["extra_info"] for case in results["benchmarks"]}
    for draw in (plot.latency, plot.throughput, plot.memory, plot.speedup):
        drawn, expected = draw(replace(run, rows=rows | device_run.rows)), draw(device_run)
        assert drawn.get_suptitle() == expected.get_suptitle()
        for axes, others in zip(drawn.axes, expected.axes, strict=True):
            assert [len(axes.get_lines()), len(axes.patches)] == [len(others.get_lines()), len(others.patches)]
        assert draw(replace(run, rows=rows)) is None
