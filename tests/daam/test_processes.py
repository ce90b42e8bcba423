"""Training in several processes: parts are shared, and what comes out is what one process gives."""

import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")
pytest.importorskip("safetensors")

import forked
from helpers import timeless

from daam.recipes import compare, fitting, lock, processes, train, training
from daam.recipes.cache import read_cache
from daam.recipes.errors import UserError
from daam.recipes.runs import Settings
from daam.recipes.training import cached_job
from daam.recipes.writer import Writer

ROOT = Path(__file__).parents[2]
QUICK = Settings("linear", epochs=2, folds=3, rates=(1e-2,), batch=8)
OPTIONS = ["--folds", "4", "--epochs", "3", "--rate", "0.01", "--conv-channels", "4"]
LAUNCH = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m"]

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Return the folder of a cache of two classes."""
    folder = tmp_path_factory.mktemp("made") / "cache"
    labels = torch.arange(48) % 2
    features = torch.randn(48, 4, 8, generator=torch.Generator().manual_seed(0)) + labels[:, None, None]
    about = {"encoder": "made up", "source": "nowhere", "names": ["a", "b"]}
    writer = Writer(folder, {"examples": 48, "shard": 48, "layers": 4, "features": 8, **about})
    writer.write(0, features, labels)
    return folder


@pytest.fixture
def job(folder):
    return cached_job(read_cache(folder), QUICK)


def content(folder):
    """Return the files of runs by their path in a folder: numbers without seconds, and bytes of tables and decoders."""
    found = {path: timeless(json.loads(path.read_text())) for path in folder.rglob("*.json")}
    found |= {path: path.read_bytes() for pattern in ("*.csv", "*.safetensors") for path in folder.rglob(pattern)}
    found |= {path: path.stat().st_size > 0 for path in folder.rglob("*.png")}
    found = {str(path.relative_to(folder)): value for path, value in found.items()}
    found.pop("table.csv", None)  # has seconds; comparison.json has its numbers
    return found


class EndError(Exception):
    """Stand for the end of a process that others wait for."""


def play(monkeypatch, number, size, waits):
    """Let this process be one of several that ends after so many waits."""
    left = list(range(waits))

    def wait():
        if not left:
            raise EndError
        left.pop()

    monkeypatch.setattr(processes, "rank", lambda: number)
    monkeypatch.setattr(processes, "count", lambda: size)
    monkeypatch.setattr(processes, "wait", wait)


def test_parts_are_shared(job, tmp_path, monkeypatch):
    """Check which process writes what: the first claims the folder, locks it and sums up, each trains its own parts."""
    expected = training.run(job, QUICK, tmp_path / "one")
    folder = tmp_path / "two"
    with monkeypatch.context() as patch, pytest.raises(EndError):
        play(patch, 0, 2, waits=1)
        training.run(job, QUICK, folder)
    assert {path.name for path in folder.glob("*.json")} == {"run.json", "part-0.json", "part-2.json"}
    with monkeypatch.context() as patch, pytest.raises(EndError), lock.exclusive(folder):
        play(patch, 1, 2, waits=1)
        training.run(job, QUICK, folder)  # relies on the lock of the first one
    assert {path.name for path in folder.glob("part-*.json")} == {"part-0.json", "part-1.json", "part-2.json"}
    assert not (folder / "results.json").exists()
    monkeypatch.setattr(fitting, "_train_epoch", None)  # nothing is trained twice
    play(monkeypatch, 0, 2, waits=3)
    training.run(job, QUICK, folder)
    assert content(folder) == content(tmp_path / "one")
    play(monkeypatch, 1, 2, waits=0)
    found = training.run(job, QUICK, folder)
    assert [part["losses"] for part in found["parts"]] == [part["losses"] for part in expected["parts"]]


def test_other_processes_read_what_the_first_one_wrote(job, tmp_path, monkeypatch):
    """Check a process that has no part, and waits until the first one has written the results."""
    made = training.run(job, QUICK, tmp_path / "made")
    waits, run = [], tmp_path / "run"

    def wait():
        waits.append((run / "results.json").exists())
        if len(waits) == 3:
            (tmp_path / "made").rename(run)

    run.mkdir()
    play(monkeypatch, 7, 8, waits=3)
    monkeypatch.setattr(processes, "wait", wait)
    assert training.run(job, QUICK, run) == made and waits == [False, False, False]


@pytest.mark.parametrize(
    ("device", "message"),
    [("cuda:0", "--device is cuda:0, expected cuda: each process takes a GPU of its own"),
     ("cuda", "--nproc-per-node is 4 or more, but torch finds 1 GPUs, expected one for each")],
)  # fmt: skip
def test_each_process_has_its_gpu(device, message, monkeypatch):
    for name in (*processes.TORCHRUN, "WORLD_SIZE"):
        monkeypatch.setenv(name, "3")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(UserError, match=f"^{message}$"), processes.joined(device):
        pass
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    assert processes._gpu_of("cuda") == "cuda:3"


@pytest.mark.parametrize("size", ["", "1", None])
def test_one_process_joins_nothing(size, monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    if size is not None:
        monkeypatch.setenv("WORLD_SIZE", size)
    with processes.joined("cuda") as device:
        assert (device, processes.rank(), processes.count()) == ("cuda", 0, 1)
        assert processes.share(range(3)) == range(3)
        processes.wait()


def launch_and_kill(target, folder, pattern, outputs):
    """Run a function in two processes, which are killed when folder has a file of a pattern."""
    both, until = forked.start([target] * 2, outputs), time.monotonic() + 200
    while not list(folder.glob(pattern)) and time.monotonic() < until:
        time.sleep(0.001)
    for process in both:
        process.kill()
    forked.finish(both)
    assert list(folder.glob(pattern)), [path.read_text() for path in outputs]


def test_two_processes_give_what_one_gives(folder, tmp_path):
    """Check two processes that are killed in the second method, and go on, as two and as one."""
    arguments = [str(folder), "--methods", "last", "daam", *OPTIONS, "--output"]
    one, two, alone = (tmp_path / name for name in ("one", "two", "alone"))
    outputs = [tmp_path / "first", tmp_path / "second"]
    compare.main([*arguments, str(one)])
    both = partial(compare.main, [*arguments, str(two)])
    launch_and_kill(both, two, "daam/part-*.json", outputs)
    assert (two / "last" / "results.json").exists() and not (two / "daam" / "results.json").exists()
    shutil.copytree(two, alone)
    status = forked.finish(forked.start([both] * 2, outputs))
    printed = [path.read_text() for path in outputs]
    assert status == [0, 0], printed
    compare.main([*arguments, str(alone)])
    assert content(two) == content(alone) == content(one)
    assert not list(two.rglob(lock.NAME))
    rows = ("method", "last", "daam")
    assert [[text.count(f"\n| {name} |") for name in rows] for text in printed] == [[2, 2, 2], [0, 0, 0]]
    trained = [line.partition(":")[0] for text in printed for line in text.splitlines() if " part-" in line]
    assert trained and len(set(trained)) == len(trained), "trained once"


def broken_run(folder, output):
    """Make a run of which the second process alone reads a broken file; return the arguments that go on with it."""
    settings = replace(QUICK, folds=4)
    training.run(cached_job(read_cache(folder), settings), settings, output)
    (output / "results.json").unlink()
    (output / "part-1.json").write_text("")
    options = ["--method", "linear", "--folds", "4", "--epochs", "2", "--rate", "0.01", "--batch", "8"]
    return [str(folder), *options, "--output", str(output)]


def check_one_error(lines):
    """Check that what processes printed is one error of a recipe, and no traceback of ours."""
    (line,) = [line for line in lines if line.startswith("error: ")]
    assert "part-1.json is broken" in line
    assert not any("recipes" in line for line in lines if line.strip().startswith("File"))


def test_an_error_of_one_process_ends_all(folder, tmp_path):
    """Check that the first process does not wait for the one that has failed."""
    target, outputs = (
        partial(train.main, broken_run(folder, tmp_path / "run")),
        [tmp_path / "first", tmp_path / "second"],
    )
    status = forked.finish(forked.start([target] * 2, outputs))
    assert 0 not in status and None not in status
    check_one_error([line for path in outputs for line in path.read_text().splitlines()])


@pytest.mark.slow
def test_torchrun(folder, tmp_path):
    """Check both cases as they are typed."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    arguments = [str(folder), "--methods", "last", "daam", *OPTIONS, "--output"]
    compare.main([*arguments, str(tmp_path / "one")])
    command = [sys.executable, *LAUNCH, "daam.recipes.compare", *arguments, str(tmp_path / "two")]
    subprocess.run(command, env=environment, check=True, timeout=300)
    assert content(tmp_path / "two") == content(tmp_path / "one")
    command = [sys.executable, *LAUNCH, "daam.recipes.train", *broken_run(folder, tmp_path / "run")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode != 0 and not done.stdout
    check_one_error(done.stderr.splitlines())
