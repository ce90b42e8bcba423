"""Every plot comes out of result files alone, of a CPU and of a GPU."""

import json
import os
from pathlib import Path

import pytest

from bench import plot
from bench.results import PASSES, history, read

HISTORY = Path(plot.__file__).parent / "history"
RUN = sorted(path for path in HISTORY.glob("*cpu*/20*.json"))[-1]
NAMES = {"latency", "throughput", "memory", "speedup", "history"}
TARGETS = {"audit-sm_80", "audit-sm_90", "audit-sm_100", "audit-gfx942"}


def gpu_results(folder: Path) -> Path:
    """Write the committed run as if a GPU had made it, case by case, and return the file: eager's figures as those of
    Triton, peaks of memory.
    """
    path = folder / "cases.jsonl"
    with path.open("w") as file:
        for name, info in read(RUN).rows.items():
            info |= {"device": "NVIDIA H200"}
            if "saved_bytes" in info:  # the host's cases have no memory
                info["peak_bytes"] = info.pop("saved_bytes")
            print(json.dumps({"fullname": name, "extra_info": info}), file=file)
            if info["provider"] == "eager":
                info |= {"provider": "triton", "backend": "triton"}
                print(json.dumps({"fullname": name + "triton", "extra_info": info}), file=file)
    return path


@pytest.mark.slow
@pytest.mark.parametrize("device", ["cpu", "gpu"])
def test_every_plot(device, tmp_path, capsys):
    results = RUN if device == "cpu" else gpu_results(tmp_path)
    assert plot.main([str(results), "--output", str(tmp_path / "plots")]) == 0
    written = {path.stem: path for path in (tmp_path / "plots").glob("*.png")}
    assert set(written) == NAMES | TARGETS
    assert all(path.stat().st_size > 10_000 for path in written.values())
    assert capsys.readouterr().err == ""


def test_what_is_drawn(tmp_path):
    """Check that lines are the medians, that the roof is among them, and that titles say device and versions."""
    run = read(RUN)
    figure = plot.latency(run)
    assert run.title in figure.get_suptitle() and "torch" in run.title and "CPU" in run.title
    found = plot.curves(run.rows.values())
    assert len(figure.axes) == len(found) * len(PASSES)
    axes = figure.axes[0]
    cases = [case for case in next(iter(found.values())) if case["pass"] == "forward"]
    for line in axes.get_lines():
        drawn = sorted((c for c in cases if c["provider"] == line.get_label()), key=lambda case: case["shape"])
        assert list(line.get_ydata()) == [1e3 * case["seconds"]["p50"] for case in drawn]
    labels = [line.get_label() for line in axes.get_lines()]
    assert {"eager", "compile", "published", "sdpa", "multihead_attention", "layer_norm", "copy"} == set(labels)


def test_speedup_is_against_the_fastest_other(tmp_path):
    run = read(gpu_results(tmp_path))
    figure = plot.speedup(run)
    assert "triton: times as fast" in figure.get_suptitle()
    for pass_name, axes in zip(PASSES, figure.axes, strict=True):
        cases = [case for case in run.rows.values() if case["pass"] == pass_name and case["family"] != "host"]
        workloads = list(dict.fromkeys(case["workload"] for case in cases))
        for bar, workload in zip(axes.patches, workloads, strict=True):
            times = {case["provider"]: case["seconds"]["p50"] for case in cases if case["workload"] == workload}
            seconds = times.pop("triton")
            others = min(time for name, time in times.items() if name not in ("copy", "layer_norm"))
            assert bar.get_width() == pytest.approx(others / seconds)


def test_history_is_dated_and_of_the_device():
    run = read(RUN)
    paths = history(HISTORY, run.device)
    assert RUN in paths and paths == sorted(paths)
    figure = plot.over_time([("2026-01-01", run), ("2026-02-01", run)])
    for line in figure.axes[0].get_lines():
        assert list(line.get_xdata()) == ["2026-01-01", "2026-02-01"] and list(line.get_ydata()) == [1, 1]


def test_nothing_to_plot(tmp_path, capsys):
    path = tmp_path / "results.json"
    path.write_text("{}")
    assert plot.main([str(path)]) == 2
    assert "holds no cases" in capsys.readouterr().err


def test_plots_need_no_torch():
    """Check that files are enough to draw them, wherever these came from."""
    import subprocess
    import sys

    code = "import sys; sys.modules['torch'] = None; import bench.plot, bench.compare"
    environment = {**os.environ, "PYTHONPATH": str(HISTORY.parents[1])}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment)
