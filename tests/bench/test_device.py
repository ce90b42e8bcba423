"""The plan for a GPU fits its minutes, loses nothing, and says what is missing; a few of its cases run emulated."""

import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from unittest import mock

import helpers
import pytest
import torch

from bench import core, providers, results
from bench.device import (
    bits,
    calls,
    cases,
    correct,
    counters,
    machine,
    plan,
    prepare,
    sanitizer,
    session,
    summary,
    sweep,
    times,
)
from bench.device.part import PARTS, jobs
from bench.device.session import Job, Session, read, run_jobs
from bench.workloads import Workload
from daam.kernels import tiles

ROOT = Path(__file__).parents[2]
EMULATED = ("density-2x3x256", "mixture-24x4-", "gate-7x50")
no_gpu = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"} | {"CUDA_VISIBLE_DEVICES": ""}

needs_gcc = pytest.mark.skipif(shutil.which("gcc") is None, reason="no gcc: Triton compiles no launcher")


@pytest.fixture
def cpu_session(tmp_path):
    return Session("first", tmp_path, "cpu", began=time.time())


def test_minutes_add_up():
    """Check that a call and its machine's start end in time, whatever its parts do, both calls within ten minutes."""
    calls = ["first", "second"]
    assert sum(plan.latest_end(call) + plan.START for call in calls) <= plan.BUDGET
    assert sum(map(plan.latest_end, calls)) <= 600 and plan.latest_end("first") <= 300
    assert "13.0 at most" in plan.format_plan(calls)
    for call, steps in plan.PLAN.items():
        began = 0
        for step in steps:
            for part in step:
                assert began + part.expected <= part.deadline < part.limit, (call, part)
            assert sum(part.processes for part in step) <= 16
            began += max(part.expected for part in step)
        limits = [max(part.limit for part in step) for step in steps]
        assert limits == sorted(limits) and plan.latest_end(call) == limits[-1]


def test_every_part_is_known():
    parts = {part.name for steps in plan.PLAN.values() for step in steps for part in step}
    assert parts - {"tests"} == set(PARTS) - {"profile", "sanitized"}
    assert set(prepare.COMPILED) < set(PARTS)


@pytest.mark.parametrize("command", ["python", "make"])
def test_a_machine_without_a_gpu(command, tmp_path):
    """Check that one line says what is missing, and that nothing is begun."""
    if shutil.which(command := {"python": sys.executable}.get(command, command)) is None:
        pytest.skip("no make")
    out = tmp_path / "out"
    words = ["-m", "bench.device", "first", f"--out={out}"] if command == sys.executable else ["gpu", f"OUT={out}"]
    words += [f"PYTHON={sys.executable}"] * (command == "make")
    done = subprocess.run([command, *words], cwd=ROOT, env=no_gpu, capture_output=True, text=True, check=False)
    # a make that another one runs, as this test's may be, also says which directory it enters
    said, printed = (
        [line for line in text.splitlines() if not line.startswith("make")] for text in (done.stderr, done.stdout)
    )
    assert done.returncode == 2 and not out.exists()
    assert len(said) == 1 and "finds no GPU" in said[0] and not printed, done


def test_a_machine_without_triton():
    with mock.patch("importlib.util.find_spec", lambda name: None if name == "triton" else name):
        assert machine.find_missing() == f"{sys.executable} has no triton"


def test_lines_are_written_as_cases_end(cpu_session):
    """Check that each is in the file before the next begins; one that fails says why, keeps what it had found, and
    stops none.
    """
    seen = []

    def good():
        seen.append(len(read(cpu_session.out)))
        yield {"ok": True}

    def bad():
        yield {"half": 1}
        raise RuntimeError("not today")

    run_jobs(cpu_session, "correct", [Job("one", good), Job("two", bad), Job("three", good)])
    rows = read(cpu_session.out)
    assert seen == [0, 3] and [row["case"] for row in rows] == ["one", "two", "two", "three"]
    assert [row.get("ok") for row in rows] == [True, None, False, True]
    assert rows[2]["error"] == "RuntimeError: not today" and "bad" in rows[2]["trace"]
    assert "4 cases" not in (said := summary.summarize(cpu_session, "correct", 3, 5)) and "3 cases, 1 wrong" in said
    assert "WRONG two: RuntimeError: not today" in said


def test_a_line_that_is_cut_off(cpu_session):
    run_jobs(cpu_session, "bits", [Job("one", lambda: [{"ok": True}])])
    with (cpu_session.out / session.RESULTS).open("a") as file:
        file.write('{"call": "fi{"call": "first"}\n{"call": "first", "part"')
    assert [row["case"] for row in read(cpu_session.out)] == ["one"]


def test_an_earlier_call_of_the_same_name_is_not_counted(cpu_session):
    run_jobs(replace(cpu_session, began=1.0), "bits", [Job("old", lambda: [{"ok": False}])])
    assert summary.rows_of(cpu_session) == [] and len(read(cpu_session.out)) == 1


def test_nothing_begins_past_the_deadline(cpu_session):
    ran = []
    job = Job("slow", lambda: ran.append("slow") or time.sleep(0.3) or [{}])
    run_jobs(replace(cpu_session, until=time.time() + 0.1), "time", [job, job, job])
    assert ran == ["slow"]
    assert [row.get("skipped") for row in read(cpu_session.out)] == [None, *2 * ["past the deadline"]]


def test_shares_and_names(cpu_session):
    """Check that processes share the jobs, each once, and that --only chooses among them."""
    made = [Job(name, lambda: [{}]) for name in ("aa", "ab", "bb", "ba", "ac")]
    for k in range(2):
        run_jobs(replace(cpu_session, shard=(k, 2), only="^a"), "bits", made)
    assert [row["case"] for row in read(cpu_session.out)] == ["aa", "ac", "ab"]


DYING = """
import os, sys
from pathlib import Path
from unittest import mock
from bench.device import session
from bench.device.session import Job, Session, run_jobs

def fail(how):
    yield {"begun": True}
    how()

def lose():
    raise RuntimeError("illegal memory access")

def well():
    yield {"ok": True}

jobs = [Job("0", well), Job("1", well), Job("2", lambda: fail(os.abort)), Job("3", well), Job("4", lambda: fail(lose)),
        Job("5", well), Job("6", well)]
first, out, progress = int(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3])
mine = Session("first", out, "cuda", shard=(first, 2), progress=progress)
with mock.patch.object(session, "context_is_lost", lambda: True):
    run_jobs(mine, "correct", jobs)
"""


def running(script):
    """Let every process of a part run a script, which is told its first job, the results' folder and its progress."""

    def command(shard, part):
        return [sys.executable, "-c", script, str(shard.shard[0]), str(shard.out), str(shard.progress)]

    return mock.patch.object(plan, "command", command)


def test_a_process_that_dies_is_followed_by_another(cpu_session):
    """Check that it goes on after the case it died of, by a signal or a lost context, and that each is written once."""
    with running(DYING):
        plan.run_part(cpu_session, plan.Part("correct", 0, 300, 300, 2))
    rows = sorted((row["i"], row.get("ok")) for row in read(cpu_session.out) if "begun" not in row)
    assert rows == [(0, True), (1, True), (2, False), (3, True), (4, False), (5, True), (6, True)]
    errors = {row["case"]: row["error"] for row in read(cpu_session.out) if row.get("ok") is False}
    assert "died, exit status -6" in errors["2"] and "illegal memory access" in errors["4"]


HANGING = """
import sys, time
from pathlib import Path
from bench.device.session import Job, Session, run_jobs

first, out, progress = int(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3])
well, hang = lambda: [{"ok": True}], lambda: time.sleep(60)
jobs = [Job(name, hang if name == "1" else well) for name in "01234"]
run_jobs(Session("first", out, shard=(first, 1), progress=progress), "time", jobs)
"""


def test_what_a_kernel_that_hangs_keeps_from_running_is_named(cpu_session):
    with running(HANGING):
        plan.run_part(cpu_session, plan.Part("time", 0, 0, 4))
    passed, hung, *left = read(cpu_session.out)
    assert passed["ok"] and hung["case"] == "1" and hung["error"] == "the process of share 0 ended at its limit"
    assert [row["case"] for row in left] == ["2", "3", "4"] and all("not reached" in row["skipped"] for row in left)


def test_a_kernel_that_hangs_costs_no_other_case(cpu_session):
    """Check that where others wait, the process is ended before the part's limit, and one goes on behind the case."""
    with running(HANGING), mock.patch.object(plan, "PATIENCE", 0.2):
        plan.run_part(replace(cpu_session, device="cuda"), plan.Part("time", 0, 120, 120))
    before, hung, *after = read(cpu_session.out)
    assert all(row["ok"] for row in (before, *after)) and [row["case"] for row in (before, *after)] == list("0234")
    assert hung["case"] == "1" and "was at it for 0.2 s" in hung["error"]


def test_a_last_job_may_take_its_time(tmp_path):
    progress = tmp_path / "progress"
    with mock.patch.object(plan, "PATIENCE", -1):
        assert not plan.is_stuck(progress)
        for left, stuck in (([[8, "last"]], False), ([[7, "one"], [8, "last"]], True)):
            progress.write_text(json.dumps(left))
            assert plan.is_stuck(progress) == stuck


def test_a_full_memory_is_no_wrong_result(cpu_session):
    def fill():
        raise torch.OutOfMemoryError("tried to allocate")
        yield

    run_jobs(cpu_session, "correct", [Job("large", fill), Job("small", lambda: [{"ok": True}])])
    full, passed = read(cpu_session.out)
    assert "tried to allocate" in full["skipped"] and "ok" not in full and passed["ok"]


@pytest.mark.parametrize("text", ["", "[[0, "])
def test_progress_that_cannot_be_read(text, cpu_session):
    script = f"import os, sys; open(sys.argv[1], 'w').write({text!r}); os.abort()"
    with mock.patch.object(plan, "command", lambda shard, part: [sys.executable, "-c", script, str(shard.progress)]):
        plan.run_part(cpu_session, plan.Part("time", 0, 300, 300))
    (row,) = read(cpu_session.out)
    assert row["case"] is None and "exit status -6" in row["error"]


def run_with(cpu_session, parts):
    """Run a call, with functions of the session in place of its parts; return whether all is well."""
    steps = tuple((plan.Part(name, 0, 9, 9),) for name in parts)
    with (
        mock.patch.dict(plan.PLAN, first=steps),
        mock.patch.object(plan, "run_part", lambda session, part: parts[part.name](session)),
    ):
        return plan.run_call(cpu_session)


def test_a_part_that_fails_stops_no_other(cpu_session):
    found = run_with(cpu_session, {"correct": lambda _: 1 / 0, "time": lambda session: session.write("time", ok=True)})
    failed, passed = read(cpu_session.out)
    assert not found and passed["ok"] and failed["part"] == "correct" and "ZeroDivisionError" in failed["error"]


def test_names_choose_what_is_timed_alone(cpu_session):
    seen, cpu_session = {}, replace(cpu_session, only="of that name")

    def write(name, session):
        seen[name] = session.only
        session.write(name, ok=True)

    assert run_with(cpu_session, {name: partial(write, name) for name in ("correct", "time", "sweep")})
    assert seen == {"correct": "", "time": "of that name", "sweep": "of that name"}


def test_a_call_that_runs_nothing_is_not_well(cpu_session):
    assert not run_with(cpu_session, {"time": lambda session: None})


def test_a_process_that_cannot_start_is_not_tried_again(cpu_session):
    with mock.patch.object(plan, "command", lambda shard, part: [sys.executable, "-c", "import nothing_of_that_name"]):
        plan.run_part(cpu_session, plan.Part("correct", 0, 300, 300))
    (row,) = read(cpu_session.out)
    assert row["ok"] is False and "exit status 1" in row["error"]
    assert "nothing_of_that_name" in (cpu_session.out / "log.txt").read_text()


def test_what_does_not_end_is_ended(cpu_session):
    """Check that what it has started ends too, and that a line says so."""
    sleep = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'import time; time.sleep(60)'])"
    began = time.monotonic()
    with mock.patch.object(plan, "command", lambda shard, part: [sys.executable, "-c", sleep]):
        plan.run_part(cpu_session, plan.Part("time", 0, 0, 2))
    assert time.monotonic() - began < 20
    assert read(cpu_session.out)[0]["error"] == "the process of share 0 ended at its limit"


def test_commands_of_processes(cpu_session):
    """Check that a part's process understands the command that starts it."""
    shard = replace(cpu_session, device="none", shard=(3, 60), only="nothing of that name")
    subprocess.run(plan.command(shard, "info"), cwd=ROOT, env=no_gpu, check=True)
    assert read(cpu_session.out) == []


@pytest.fixture
def small():
    """Give a workload that four providers serve on a CPU, and free what is kept of it."""
    yield Workload("sweep", "mixture", (2, 12, 8), 1, 2, 3, dtype="float32")
    core._candidates.cache_clear()


def test_times(cpu_session, small):
    """Check that absent peers are named, and others timed, with their errors, in a file that compare and plot read."""
    absent = {"compile", "multihead_attention"}
    chosen = {name: provider for name, provider in providers.PROVIDERS.items() if name not in absent}
    no_peer = mock.patch("importlib.util.find_spec", return_value=None)
    with no_peer, mock.patch.object(times, "PROVIDERS", chosen), mock.patch.dict(core.SECONDS, cpu=0.01):
        run_jobs(cpu_session, "time", [Job(str(small), partial(times.time_workload, cpu_session, small))])
    built, *passes = read(cpu_session.out)
    assert built["ok"] is False and built["not timed"]["published"] == "gaussian-adaptive-attention is not installed"
    assert "triton" in built["not timed"] and built["errors"]["eager"] < 1e-5
    assert [row["pass"] for row in passes] == list(results.PASSES)
    for row in passes:
        assert set(row["us"]) == {"eager", "sdpa", "layer_norm", "copy"} and min(row["us"].values()) > 0
    assert len(results.read(cpu_session.out / times.CASES).rows) == 3 * 4
    assert "copy" in summary.summarize(cpu_session, "time", 1, 1)


def test_times_stop_at_the_deadline(cpu_session, small):
    chosen = {name: providers.PROVIDERS[name] for name in ("eager", "copy")}
    with mock.patch.object(times, "PROVIDERS", chosen):
        found = list(times.time_workload(replace(cpu_session, until=0), small))
    assert found[1:] == [{"pass": "forward", "skipped": "past the deadline"}]


def check_providers(cpu_session, workload, *absent, **changed):
    """Return the row of who is timed of our two backends and torch.compile, triton in place of which eager runs."""
    eager = providers.PROVIDERS["eager"]
    chosen = {"triton": eager, "eager": eager, "compile": replace(eager, missing=lambda device: None)} | changed
    chosen = {name: provider for name, provider in chosen.items() if name not in absent}
    with mock.patch.dict(providers.PROVIDERS, chosen), mock.patch.object(times, "PROVIDERS", chosen):
        core._candidates.cache_clear()
        return next(iter(times.time_workload(cpu_session, workload)))


@pytest.mark.parametrize("name", ["triton", "eager", "compile"])
def test_a_result_of_ours_that_is_wrong_is_said(name, cpu_session, small):
    wrong = replace(providers.PROVIDERS["eager"], build=lambda task: 1 / 0)
    assert check_providers(cpu_session, small)["ok"] is True
    built = check_providers(cpu_session, small, **{name: wrong})
    assert built["ok"] is False and "ZeroDivisionError" in built["not timed"][name]


def test_a_backend_of_ours_that_is_absent_is_wrong(cpu_session, small):
    assert check_providers(cpu_session, small, "triton")["ok"] is False


def test_a_compiler_that_is_absent_is_not_wrong(cpu_session, small, monkeypatch):
    """Check that whatever needs it says so: times, warming up, and the host's times."""
    monkeypatch.delenv("CC", raising=False)
    with mock.patch("shutil.which", return_value=None):
        built = check_providers(cpu_session, small)
        rows = [*times.warm(small), *calls.measure(cpu_session, small, "compile")]
    assert built["ok"] is True and "no gcc" in built["not timed"]["compile"]
    assert len(rows) == 2 and all("no gcc" in row["skipped"] for row in rows)


def test_host_times():
    host, whole = calls.time_calls(lambda: time.sleep(1e-4))
    assert 100 <= host <= whole < 1e5


@pytest.mark.parametrize(("error", "ok", "past"), [(0, True, False), (1e-6, True, True), (1e-2, False, True)])
def test_the_rule(error, ok, past, cpu_session):
    """Check that an error past the bound is flagged, and that one past four times the bound is wrong."""
    case = helpers.Case((4, 64), 1, 1)

    def run(case, inputs, backend):
        found = helpers_run(case, inputs, "eager")
        return {name: t * (1 + error * (backend == "triton")) for name, t in found.items()}

    helpers_run = helpers.run
    with mock.patch.object(helpers, "run", run):
        (row,) = correct.judge(cpu_session, case, torch.float32)
    assert row["ok"] == ok, row
    assert row["past the bound"] == past, row
    assert set(row["errors [ours, eager]"]) == {"y", "weights", "dx", "d_mean_offset", "d_c"}


def test_nan_is_wrong(cpu_session):
    case, helpers_run = helpers.Case((4, 64), 1, 1), helpers.run

    def run(case, inputs, backend):
        return {name: t * float("nan") for name, t in helpers_run(case, inputs, "eager").items()}

    with mock.patch.object(helpers, "run", run):
        (row,) = correct.judge(cpu_session, case, torch.float32)
    assert row["ok"] is False and row["past the bound"]


def test_what_differs_by_a_bit():
    found = {"y": torch.tensor([1.0, 2.0]), "dx": torch.tensor([1.0, 1.0])}
    wanted = {"y": torch.tensor([1.0, 2.0]), "dx": torch.tensor([1.0, 1.0 + 2**-23])}
    assert bits.find_differences(found, wanted) == {"dx": pytest.approx(2**-23, rel=1e-6)}


def test_long_rows_are_compared_with_a_launch_a_step():
    """Check that a step that computes something else shows, and that both ways are taken."""
    pytest.importorskip("triton")
    case, taken = bits.case("density", (2, 40), 1, 1), []

    def run(_case, _inputs, _backend):
        taken.append(tiles.AT_WORK)
        return {"y": torch.tensor([float(len(taken))])}

    with mock.patch.object(helpers, "run", run):
        assert bits.compare_steps(case, None) == {"y": 1.0}
    assert taken == [528, 1] and tiles.AT_WORK == 528


def test_jobs_have_names_of_their_own(cpu_session):
    for part in PARTS:
        if part != "info":
            names = [job.name for job in jobs(part, replace(cpu_session, device="none"))]
            assert names and len(set(names)) == len(names), part


def test_representative_cases():
    """Check that they are of every algorithm, in both orders, on chip and streamed, in both widths, and among all
    cases.
    """
    chosen = cases.representative()
    assert set(chosen) < set(cases.correct_cases()) and len(chosen) < 65
    for name in helpers.ALGORITHMS:
        assert {dtype for case, dtype in chosen if case.algorithm == name} >= {torch.bfloat16, torch.float32}
        assert {any(f in str(case) for f in ("9000", "20000")) for case, _ in chosen if case.algorithm == name} == {
            True,
            False,
        }
    assert not any(cases.is_large(case) for case, _ in chosen)


def test_large_inputs_are_those_of_the_case():
    case = cases.case("gate", (2**12, 1025), 1, 1, weights=False)
    found = cases.draw_inputs(case, torch.bfloat16, "cpu")
    assert found.x.shape == found.grad_y.shape == case.shape and found.x.dtype == torch.bfloat16
    assert [p.shape for p in found.params] == [(1, 4)] * 2 and found.grad_weights is None


def test_counters(tmp_path, cpu_session):
    """Check that metrics are read from a file as Nsight Compute writes it, and that it is told where that is absent."""
    columns = ["ID", "Kernel Name", "Section Name", "Metric Name", "Metric Unit", "Metric Value", "Rule Name"]
    lines = [columns, ["0", "_forward", "x", "DRAM Throughput", "%", "91.5"], ["0", "_forward", "x", "Other", "%", "1"]]
    path = tmp_path / "ncu.csv"
    text = "\n".join(",".join(f'"{word}"' for word in line) for line in lines)
    path.write_text("==PROF== Profiling\n" + text + '\n"cut o')
    (row,) = counters.read_metrics(path)
    assert row == {"kernel": "_forward", "metric": "DRAM Throughput", "unit": "%", "value": "91.5"}
    with mock.patch("shutil.which", return_value=None):
        assert list(counters.count(cpu_session)) == [{"skipped": "ncu is not installed"}]


NCU = """#!{python}
import sys
print('==PROF==', *sys.argv, '"ID","Kernel Name","Metric Name","Metric Unit","Metric Value"', {lines!r}, sep='\\n')
sys.exit({status})
"""


def count_with(monkeypatch, cpu_session, lines, status):
    """Return the rows of counters where ncu prints some lines and leaves with a status."""
    program = cpu_session.out / "bin" / "ncu"
    program.parent.mkdir(exist_ok=True)
    program.write_text(NCU.format(python=sys.executable, lines=lines, status=status))
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(program.parent))
    return list(counters.count(cpu_session))


def test_counters_of_a_call(cpu_session, monkeypatch):
    """Check that they are its own, whatever an earlier call left; that what is profiled ends before ncu is ended, which
    then has its tables to print; and that another status is wrong.
    """
    cpu_session = replace(cpu_session, until=time.time() + 60)
    line = '"0","{}","DRAM Throughput","%","91.5"'
    assert len(count_with(monkeypatch, cpu_session, line.format("_forward"), 0)) == 2
    row, end = count_with(monkeypatch, cpu_session, line.format("_backward"), 0)
    assert row["kernel"] == "_backward" and end == {"ok": True, "status": 0}
    (until,) = (word for word in (cpu_session.out / "ncu.csv").read_text().split() if word.startswith("--until="))
    assert float(until.removeprefix("--until=")) == cpu_session.until - counters.TABLES
    run_jobs(cpu_session, "counters", [Job("ncu", lambda: count_with(monkeypatch, cpu_session, "no table", 9))])
    assert "WRONG ncu: {'status': 9}" in summary.summarize(cpu_session, "counters", 1, 1)


def test_counters_that_may_not_be_read(cpu_session, monkeypatch):
    """Check that they are skipped, in ncu's words."""
    reason = "==ERROR== ERR_NVGPUCTRPERM - The user does not have permission to access NVIDIA GPU Performance Counters"
    run_jobs(cpu_session, "counters", [Job("ncu", lambda: count_with(monkeypatch, cpu_session, reason, 1))])
    said = summary.summarize(cpu_session, "counters", 1, 1)
    assert "0 wrong, 1 skipped" in said and f"skipped 1: {reason}" in said


SANITIZER = """#!{python}
import sys
print("========= COMPUTE-SANITIZER", *sys.argv[1:], sep="\\n")
print({said!r})
sys.exit({status})
"""
RACE = "========= Error: Race reported between Write access at density_forward and Read access at density_forward"
REPORTS = [  # what the tool says, its exit status, and whether that is well
    ("========= ERROR SUMMARY: 0 errors", 0, True),
    ("========= ERROR SUMMARY: 1 error", 9, False),
    ("========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)", 0, True),
    (f"{RACE}\n========= RACECHECK SUMMARY: 1 hazard displayed (0 errors, 1 warning)", 0, False),
    ("========= ERROR SUMMARY: 0 errors", 1, False),  # the case itself failed
    ("========= Error: Target application terminated before first instrumented API call", 0, False),
]


@pytest.mark.parametrize(("said", "status", "well"), REPORTS)
def test_what_a_sanitizer_says(said, status, well, cpu_session, monkeypatch):
    """Check a case under a tool in place of NVIDIA's: how it is called, what of its words is kept, and the verdict."""
    folder = cpu_session.out / "cuda" / "compute-sanitizer"
    folder.mkdir(parents=True)
    (folder / "compute-sanitizer").write_text(SANITIZER.format(python=sys.executable, said=said, status=status))
    (folder / "compute-sanitizer").chmod(0o755)
    monkeypatch.setenv("CUDA_HOME", str(folder.parent))
    cpu_session = replace(cpu_session, until=time.time() + 60)
    run_jobs(cpu_session, "sanitizer", [Job("case", lambda: sanitizer.sanitize(cpu_session, "racecheck", "gate(1)"))])
    (row,) = read(cpu_session.out)
    assert (row["ok"], row["status"]) == (well, status)
    assert bool(row["summary"]) == ("SUMMARY" in said) and row["summary"] in said
    assert well or said.splitlines()[0] in row["error"]
    given = (cpu_session.out / "racecheck-gate(1).txt").read_text().splitlines()
    assert given[1:5] == ["--tool", "racecheck", "--target-processes", "all"] and "sanitized" in given
    assert r"--only=^gate\(1\)$" in given


def test_a_machine_without_a_sanitizer(cpu_session, monkeypatch):
    for name in ("CUDA_HOME", "CUDA_PATH"):
        monkeypatch.delenv(name, raising=False)
    with mock.patch("shutil.which", return_value=None):
        (row,) = sanitizer.sanitize(cpu_session, "memcheck", "case")
    assert row == {"skipped": "compute-sanitizer is neither on PATH nor beside CUDA"}


def test_a_sanitized_case_that_is_ended():
    row = sanitizer.read_report("", None)
    assert not row["ok"] and row["status"] == "ended at its limit" and row["error"] == "it printed nothing"


def test_sanitized_calls_are_of_every_kernel(cpu_session):
    """Check that what each launches, of compiled kernels on no GPU, is all that is launched anywhere."""
    pytest.importorskip("triton")
    from bench.host import taking_any_tensor

    found = set()
    with taking_any_tensor(), mock.patch.object(helpers.launch, "launch", lambda *args, **options: None):
        for call in sanitizer.find_calls().values():
            with helpers.recorded_launches() as launches:
                call("cpu")
            found |= set(launches)
    known = {kernel for spec in helpers.ALGORITHMS.values() for kernels in spec.kernels for kernel in kernels}
    assert found >= known | {"take_steps", "forward_layers", "backward_layers", "layer_gradients", "gated_project"}
    assert found >= {"gated_sums", "gated_forward", "gated_backward"}


LAUNCHING = """
from bench.device import cases, session
from bench.host import taking_any_tensor
from bench.stub_driver import stub_driver

kernels, one = session.count_kernels(), cases.case("density", (2, 3, 256), 1, 1)
with stub_driver(), taking_any_tensor():
    cases.helpers.run(one, cases.draw_inputs(one, cases.BF16, "cpu"), "triton")
print(*kernels.values())
"""


def launch_kernels(folder):
    """Launch the kernels of one case, on no GPU, in a process of its own and with a folder of Triton's; return how many
    it compiled and how many it found there.
    """
    environment = no_gpu | {"TRITON_CACHE_DIR": str(folder)}
    command = [sys.executable, "-c", LAUNCHING]
    return subprocess.check_output(command, cwd=ROOT, env=environment, text=True).split()


@pytest.mark.slow
@needs_gcc
def test_kernels_are_taken_along(tmp_path, monkeypatch):
    """Check that Triton finds what is packed on another machine: without what it does not need, where the first folder
    is gone, and where there are kernels already.
    """
    pytest.importorskip("triton")
    compiled, unpacked = tmp_path / "made", tmp_path / "there"
    assert launch_kernels(compiled) == ["3", "0"]
    monkeypatch.setattr(machine, "CACHE", tmp_path / "cache.tar.xz")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(unpacked))
    assert "compiled here" in machine.unpack() and not unpacked.exists()
    prepare.pack(compiled)
    shutil.rmtree(compiled)
    (unpacked / "another").mkdir(parents=True)
    assert "unpacked 3 kernels" in machine.unpack()
    assert {path.suffix for path in unpacked.rglob("*.*")} == {".cubin", ".json", ".so"}
    assert launch_kernels(unpacked) == ["0", "3"]
    assert "unpacked already" in machine.unpack()


def test_other_tiles_are_planned_for_as_long_as_they_are_tried():
    """Check that what is tried changes the tile of its pass, and that the shipped one is back afterwards."""
    pytest.importorskip("triton")
    for workload, regime in sweep.SWEPT:
        shipped = sweep.find_tiles(workload, {})
        assert set(shipped) == {"forward", "backward"}
        assert any(sweep.find_tiles(workload, settings) != shipped for settings in sweep.TRIED[regime])
        assert sweep.find_tiles(workload, {}) == shipped


def test_dry_run(capsys):
    """Check that all parts that launch kernels are compiled, correctness is emulated, and a failure in any fails the
    run.
    """
    ran = []
    for wrong, code in ((None, 0), (("sweep", "none"), 1), (("correct", "emulated"), 1)):
        ran.clear()

        def run(name, call, device, only, wrong=wrong):
            ran.append((name, device))
            return (name, device) != wrong

        with mock.patch.multiple(prepare, run=run, start=lambda: None):
            assert prepare.dry(["first", "second"], "") == code
        assert ran == [*((name, "none") for name in prepare.COMPILED), ("correct", "emulated")]
    said = capsys.readouterr().out
    assert plan.format_plan(["first", "second"]) in said
    assert f"{len(cases.representative())} of {len(cases.correct_cases())} cases" in said


TESTS = """
import pytest
def test_good(): pass
def test_bad(): assert 1 == 2
@pytest.mark.skip(reason="not here")
def test_skipped(): pass
"""


@pytest.mark.parametrize("until", [float("inf"), 0])
def test_the_projects_own_tests_are_written_too(until, cpu_session):
    """Check that there is a line a test: its outcome and, where it failed, why; past the deadline, that."""
    (cpu_session.out / "test_some.py").write_text(TESTS)
    (cpu_session.out / "test_unknown.py").write_text("import nothing_of_that_name")
    options = ["-p", "bench.device.project_tests", f"--out={cpu_session.out}", "--call=second", f"--until={until}"]
    options += [
        "--continue-on-collection-errors",
        f"--rootdir={cpu_session.out}",
        "-c",
        os.devnull,
        str(cpu_session.out),
    ]
    subprocess.run([sys.executable, "-m", "pytest", "-q", *options], cwd=ROOT, capture_output=True, check=False)
    rows = {row["case"].partition("::")[2]: row for row in read(cpu_session.out)}
    unknown = rows.pop("")
    assert unknown["ok"] is False and "nothing_of_that_name" in unknown["error"]
    if not until:
        assert {row["skipped"] for row in rows.values()} == {"past the deadline"} and len(rows) == 3
        return
    assert rows["test_good"]["ok"] is True and rows["test_bad"]["ok"] is False
    assert "assert 1 == 2" in rows["test_bad"]["error"] and rows["test_skipped"]["skipped"] == "not here"


SHARED = """
from bench.device import session
session.context_is_lost = lambda: True

def pytest_addoption(parser):
    parser.addoption("--device")
    parser.addoption("--shard")

def pytest_collection_modifyitems(config, items):
    k, n = map(int, config.getoption("--shard").split("/"))
    items[:] = items[k::n]
"""
FATAL = """
import os
def test_0(): pass
def test_1(): os.abort()
def test_2(): pass
def test_3(): assert 1 == 2
def test_4(): pass
def test_5(): os.abort()
"""


def test_the_projects_tests_go_on_after_one_that_a_process_dies_of(cpu_session):
    """Check ends by a signal, also of the last one, and by a lost context; each test is written once."""
    cpu_session = replace(cpu_session, device="cuda")
    (cpu_session.out / "conftest.py").write_text(SHARED)
    (cpu_session.out / "test_some.py").write_text(FATAL)
    tests = (f"--rootdir={cpu_session.out}", "-c", os.devnull, str(cpu_session.out))
    with mock.patch.multiple(plan, TESTS=tests, CHOSEN=""):
        plan.run_part(cpu_session, plan.Part("tests", 0, 300, 300))
    rows = {row["case"].partition("::")[2]: row for row in read(cpu_session.out)}
    assert len(read(cpu_session.out)) == 6, read(cpu_session.out)
    assert [rows[f"test_{i}"]["ok"] for i in range(6)] == [True, False, True, False, True, False]
    assert all("exit status -6" in rows[name]["error"] for name in ("test_1", "test_5"))


@pytest.fixture(scope="module")
def rows_emulated(tmp_path_factory):
    """Return the rows of three cases, compiled for sm_90 and emulated in a process of its own."""
    pytest.importorskip("triton")
    out = tmp_path_factory.mktemp("emulated")
    only = "--only=" + "|".join(EMULATED)
    words = ["-m", "bench.device.part", "correct", "--device=emulated", f"--out={out}", only]
    subprocess.run([sys.executable, *words], cwd=ROOT, env=no_gpu, check=True)
    return read(out)


@needs_gcc
def test_emulated_cases_are_right(rows_emulated):
    assert len(rows_emulated) >= len(EMULATED)
    for row in rows_emulated:
        assert row["ok"] is True and row["share"] <= 1, row
        assert row["launches"] == helpers.ALGORITHMS[row["case"].partition("-")[0]].kernels[0]
        assert row["compiled"] + row["cached"] >= 1
    assert json.dumps(rows_emulated)
