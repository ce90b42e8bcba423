"""Measurement: what is wrong is not timed, providers take turns, statistics are what they say."""

import gc
import json
import subprocess
import sys
import weakref
from dataclasses import replace
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from helpers import within

from bench import core, providers
from bench.results import PASSES
from bench.workloads import Workload, workloads
from daam.kernels.algorithms import ALGORITHMS

ROOT = Path(__file__).parents[2]
SMALL = Workload("sweep", "mixture", (2, 12, 8), 1, 2, 3, dtype="float32")
NAMES = ("copy", "eager", "layer_norm", "multihead_attention", "published", "sdpa")


@pytest.mark.parametrize("count", [1, 2, 5, 100])
def test_summary(count):
    values = np.random.default_rng(count).exponential(size=count)
    found = core.summary(values)
    p20, p25, p50, p75, p80 = np.percentile(values, [20, 25, 50, 75, 80])
    expected = {"p20": p20, "p50": p50, "p80": p80, "iqr": p75 - p25}
    assert found == pytest.approx(expected, rel=1e-5)


def test_providers_take_turns():
    """Check that every round has every step once, and that each step is first in as many rounds as the others."""
    rounds = []

    def turn(steps):
        rounds.append([step.run(step.prepare()) for step in steps])
        return [float(len(rounds))] * len(steps)

    steps = {name: core.Step(lambda: None, lambda _, name=name: name) for name in "abc"}
    with mock.patch.object(core, "MOST_ROUNDS", 6):
        times = core.interleave(steps, turn)
    measured = rounds[2:]
    assert all(sorted(one) == list("abc") for one in measured) and len(measured) == 6
    assert [one[0] for one in measured] == list("abcabc")
    assert times == {name: [3.0, 4.0, 5.0, 6.0, 7.0, 8.0] for name in "abc"}


class Clock:
    """Stand for a clock that only a test moves: what it shows is the same on every machine."""

    seconds = 0.0

    def perf_counter(self):
        return self.seconds

    def advance(self, seconds):
        self.seconds += seconds


def test_a_turn_times_what_runs_and_not_what_prepares():
    clock = Clock()
    with mock.patch.object(core, "time", clock):
        times = core.turns("cpu")([core.Step(lambda: clock.advance(8), lambda _: clock.advance(2))] * 2)
    assert times == [2, 2]


@pytest.mark.parametrize("name", NAMES)
def test_every_provider_is_right(name):
    """Check standard attention, too: y and the gradient of everything it differentiates."""
    found = core.candidates(SMALL, NAMES)[name]
    assert not isinstance(found, Exception), found
    candidate, error = found
    within(error, 1e-5, name)
    assert len(candidate.expected) == 1 + len(candidate.leaves)
    assert candidate.backend == name


@pytest.mark.parametrize("wrong", ["y", "gradient", "nan"])
def test_what_is_wrong_is_not_timed(wrong):
    """Check that neither is what cannot be built, that the others are, and that nothing keeps the tensors of what
    failed.
    """

    def build(task):
        right = providers.PROVIDERS["eager"].build(task)
        if wrong == "gradient":
            expected = (*right.expected[:-1], 1.01 * right.expected[-1])
        else:
            expected = (right.expected[0] * (1.01 if wrong == "y" else float("nan")), *right.expected[1:])
        return providers.Candidate(right.forward, right.leaves, right.grad_y, expected, "eager")

    kept = []

    def broken(task):
        tensor = torch.empty(10)
        kept.append(weakref.ref(tensor))
        raise RuntimeError("not today")

    stand_ins = {"compile": providers.Provider(build), "published": providers.Provider(broken)}
    with mock.patch.dict(providers.PROVIDERS, stand_ins):
        found = core._candidates.__wrapped__(SMALL, ("compile", "eager", "published"))
    assert isinstance(found["compile"], core.WrongResultError)
    assert str(found["published"]) == "not today"
    gc.collect()
    assert kept[0]() is None
    assert isinstance(found["eager"], tuple)


def test_passes_do_what_they_say():
    candidate, _ = core.candidates(SMALL, NAMES)["eager"]
    done = []
    spy = mock.Mock(leaves=candidate.leaves)
    spy.forward.side_effect = lambda: done.append("forward")
    spy.backward.side_effect = lambda y: done.append("backward")
    timed = {}
    for pass_name in PASSES:
        step = core.step(spy, pass_name)
        state = step.prepare()
        done.clear()
        step.run(state)
        timed[pass_name] = "+".join(done)
    assert timed == {pass_name: pass_name for pass_name in PASSES}


def test_saved_bytes():
    """Check that the eager mixture keeps x and nothing else, and the published one twelve times as much and more."""
    found = core.candidates(SMALL, NAMES)
    saved = {
        name: core.saved_bytes(candidate.forward, candidate.leaves[candidate.inputs :])
        for name, (candidate, _) in found.items()
    }
    assert saved["eager"] == SMALL.x.nbytes
    assert saved["published"] > 12 * SMALL.x.nbytes
    assert saved["sdpa"] >= 4 * SMALL.x.nbytes, "q, k, v and the output"


def test_missing_providers_say_why():
    missing = {name: provider.missing for name, provider in providers.PROVIDERS.items()}
    assert "cpu" in missing["triton"]("cpu")
    assert missing["eager"]("cpu") is missing["copy"]("cpu") is None
    with mock.patch("shutil.which", return_value=None):
        assert "C++ compiler" in missing["compile"]("cpu")
        assert missing["compile"]("cuda") is None
    with mock.patch("importlib.util.find_spec", return_value=None):
        assert missing["published"]("cpu") == "gaussian-adaptive-attention is not installed"


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_workloads(device):
    """Check that names are unique, and that every family of the GPU's has a small version on the CPU."""
    found = workloads(device)
    assert len(set(map(str, found))) == len(found)
    assert {workload.family for workload in found} == {workload.family for workload in workloads("cpu")}
    assert {workload.algorithm for workload in found} == set(ALGORITHMS)
    assert {workload.dtype for workload in found} == {"bfloat16", "float32", "float64"}


@pytest.mark.parametrize("git", [FileNotFoundError("git"), subprocess.CompletedProcess([], 128, stdout="")])
def test_commit_without_git(git):
    """Check that a machine without git, or a copy without its repository, still tells device and versions."""
    core.about.cache_clear()
    with mock.patch.object(subprocess, "run", side_effect=[git]):
        found = core.about()
    core.about.cache_clear()
    assert found["commit"] == "unknown" and found["versions"]["torch"] == torch.__version__


def test_the_published_package_is_timed_whatever_its_error():
    """Check an error of half of the largest value, as in bf16 on chunks of 3; what is no number is still refused."""
    workload = replace(SMALL, shape=(8, 6, 64), dtype="bfloat16")
    candidate = mock.Mock()
    with mock.patch.object(core, "error", return_value=0.5):
        assert core.checked("published", candidate, workload) == 0.5
        with pytest.raises(core.WrongResultError):
            core.checked("triton", candidate, workload)
    with mock.patch.object(core, "error", return_value=float("nan")), pytest.raises(core.WrongResultError):
        core.checked("published", candidate, workload)


@pytest.mark.slow
def test_the_suite(tmp_path):
    """Check that a run writes what compare and plot read, names what it skipped, and adds lines of JSON as it goes."""
    results, cases = tmp_path / "results.json", tmp_path / "cases.jsonl"
    chosen = "sweep-mixture-1x128x128 and not compile and not multihead"
    command = ["pytest", "bench", "--benchmark-only", "-rs", "-k", chosen]
    files = [f"--benchmark-json={results}", f"--cases={cases}"]
    done = subprocess.run(
        [sys.executable, "-m", *command, *files], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert "triton: backend" in done.stdout
    benchmarks = json.loads(results.read_text())["benchmarks"]
    lines = [json.loads(line) for line in cases.read_text().splitlines()]
    assert {case["fullname"]: case["extra_info"] for case in benchmarks} == {
        case["fullname"]: case["extra_info"] for case in lines
    }
    names = {(case["extra_info"]["pass"], case["extra_info"]["provider"]) for case in benchmarks}
    assert names == {(a, b) for a in PASSES for b in ("eager", "published", "sdpa", "layer_norm", "copy")}
    for case in benchmarks:
        info = case["extra_info"]
        assert case["stats"]["median"] == pytest.approx(info["seconds"]["p50"], rel=1e-5), (
            "the times of the table are the same"
        )
        assert info["gb_per_s"] == pytest.approx(info["bytes"] / info["seconds"]["p50"] / 1e9, rel=1e-5)
        assert info["percent_of_roof"] > 0 and info["saved_bytes"] >= 0
        within(info["error"], 1e-4, info["provider"])
        assert info["backend"] == info["provider"] and info["versions"]["torch"] == torch.__version__
        assert info["commit"] and "CPU" in info["device"]
        if info["provider"] == "copy":
            assert info["percent_of_roof"] == pytest.approx(100) and info["of_copy"]["p50"] == 1


def test_a_turn_on_a_gpu():
    """Check that the cache is emptied by reading, which leaves nothing to write back, and that the device waits twice
    the host's last time before the first event; between the events is what runs, and nothing else.
    """
    done, events, clock = [], [], Clock()

    class Event:
        def __init__(self, enable_timing):
            events.append(self)

        def record(self):
            done.append(f"record {events.index(self)}")

        def elapsed_time(self, end):
            return 10.0 * (events.index(self) + 1)

    def run(state):
        done.append(f"run {state}")
        clock.advance(3e-3)

    flush = mock.Mock(spec=["sum"], sum=lambda: done.append("flush"))
    steps = [core.Step(lambda name=name: done.append(f"prepare {name}") or name, run) for name in "ab"]
    slept = []
    fakes = {"Event": Event, "_sleep": lambda cycles: done.append("sleep") or slept.append(cycles)}
    fakes["synchronize"] = lambda: done.append("synchronize")
    with mock.patch.multiple(torch.cuda, **fakes), mock.patch.object(core, "time", clock):
        first = core._turns_cuda(flush, steps)
        second = core._turns_cuda(flush, steps)
    turn = ["prepare {}", "flush", "sleep", "record {}", "run {}", "record {}"]
    orders = [[line.format(fill) for line, fill in zip(turn, ("a", "", "", 0, "a", 1), strict=True)],
              [line.format(fill) for line, fill in zip(turn, ("b", "", "", 2, "b", 3), strict=True)]]  # fmt: skip
    assert done[:13] == [*orders[0], *orders[1], "synchronize"]
    assert first == [0.01, 0.03] and second == [0.05, 0.07]
    assert slept == pytest.approx([2e-3 * core.CYCLES] * 2 + [6e-3 * core.CYCLES] * 2)
    del steps
    gc.collect()
    assert not core.HOST_SECONDS, "a step's tensors are kept"
