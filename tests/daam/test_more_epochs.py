"""Runs known by content: a failed start claims nothing, and more epochs go on to the numbers of a run that had them."""

import json
import shutil
from dataclasses import replace

import pytest
import torch

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")
pytest.importorskip("safetensors")

from helpers import timeless
from safetensors.torch import load_file, save_file

from daam.recipes import compare, fitting, train, training
from daam.recipes.cache import Cache
from daam.recipes.runs import RunError, Settings
from daam.recipes.training import cached_job

# at the first rate epochs are over; at the second one nothing gets better, and it ends; at the third one it diverges
RATES = (1e-3, 0.0, 1e30)
QUICK = Settings("daam", epochs=6, folds=2, rates=RATES, batch=8, stop_after=2, conv_channels=4)
FEWER = replace(QUICK, epochs=3)

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module", autouse=True)
def pictures():
    """Draw no pictures, which takes longer than to train, but write how many epochs they show; return their names."""

    def draw(*args):
        results, *_, path = args
        path.write_text(str(results["settings"]["epochs"]))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "plot_curves", draw)
        patch.setattr(training, "plot_confusion", draw)
        yield "learning-curves.png", "confusion.png"


@pytest.fixture(scope="module")
def cache():
    """Return a cache of three classes that one layer tells apart."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(48) % 3
    features = torch.randn(48, 4, 8, generator=generator)
    features[torch.arange(48), 2, labels] += 2
    return Cache(features, labels, ["a", "b", "c"], {"encoder": "made up", "source": "nowhere"})


def start(cache, settings, folder):
    return training.run(cached_job(cache, settings), settings, folder)


@pytest.fixture(scope="module")
def undisturbed(cache, pictures, tmp_path_factory):
    """Return the folder of a run that had all epochs from the start."""
    folder = tmp_path_factory.mktemp("undisturbed")
    start(cache, QUICK, folder)
    return folder


def content(folder):
    """Return the files of a run by name: its numbers without seconds, and bytes of tables and decoders."""
    found = {path.name: timeless(json.loads(path.read_text())) for path in folder.glob("*.json")}
    for pattern in ("*.csv", "*.safetensors", "*.png"):
        found |= {path.name: path.read_bytes() for path in folder.glob(pattern)}
    return found


def interrupt(monkeypatch, epochs):
    """Let training end with a KeyboardInterrupt in the epoch after so many; return what undoes it."""
    original, calls = fitting._train_epoch, []

    def interrupted(*args):
        calls.append(args)
        if len(calls) > epochs:
            raise KeyboardInterrupt
        return original(*args)

    monkeypatch.setattr(fitting, "_train_epoch", interrupted)
    monkeypatch.setattr(fitting, "SAVE_EVERY", 0)
    return lambda: monkeypatch.setattr(fitting, "_train_epoch", original)


def test_the_rates_of_this_file(undisturbed):
    """Check that these tests see what they are for: rates that end in each way, and another choice with more epochs."""
    for i in range(2):
        tried = json.loads((undisturbed / f"part-{i}.json").read_text())["tried"]
        assert [(t["finite"], t["ended"]) for t in tried] == [(True, False), (True, True), (False, True)]
        assert tried[0]["epochs"] == QUICK.epochs and tried[1]["epochs"] <= FEWER.epochs


def test_more_epochs(undisturbed, cache, tmp_path, monkeypatch):
    """Check that a finished run goes on from where its epochs were over: it trains no other epoch again."""
    fewer = start(cache, FEWER, tmp_path)
    original, trained = fitting._train_epoch, []

    def counted(model, work, optimizer, epoch, part):
        trained.append((part.rate, epoch))
        return original(model, work, optimizer, epoch, part)

    monkeypatch.setattr(fitting, "_train_epoch", counted)
    results = start(cache, QUICK, tmp_path)
    assert trained == 2 * [(RATES[0], epoch) for epoch in range(FEWER.epochs, QUICK.epochs)]
    assert content(tmp_path) == content(undisturbed) and results == json.loads((tmp_path / "results.json").read_text())
    assert [part["losses"] for part in results["parts"]] != [part["losses"] for part in fewer["parts"]]
    assert start(cache, QUICK, tmp_path) == results and len(trained) == 6, "finished"


def test_checkpoints_that_more_epochs_need(undisturbed, cache, tmp_path):
    """Check that states are kept of rates whose epochs were over alone, and no file where there is none."""
    fits = torch.load(undisturbed / "part-0.pt")
    assert [fit["steps"] is not None for fit in fits] == [True, False, False]
    assert [fit["best"] is not None for fit in fits] == [True, False, False], "of rates that may be chosen"
    ended = replace(QUICK, rates=RATES[1:])
    first = start(cache, ended, tmp_path)
    assert not list(tmp_path.glob("*.pt"))
    more = start(cache, replace(ended, epochs=50), tmp_path)
    assert more["parts"] == first["parts"] and more["settings"]["epochs"] == 50


@pytest.mark.parametrize("lost", [False, True], ids=["kept", "lost"])
def test_more_epochs_may_choose_another_rate(lost, cache, tmp_path):
    """Check a slow rate that is better than a fast one with more epochs alone, and a run whose checkpoints are gone, as
    an earlier version deleted them.
    """
    quick = replace(QUICK, method="linear", rates=(3e-3, 0.3), epochs=6, stop_after=3)
    more = replace(quick, epochs=40)
    first = start(cache, quick, tmp_path / "run")
    for path in (tmp_path / "run").glob("*.pt"):
        path.unlink() if lost else None
    second = start(cache, more, tmp_path / "run")
    start(cache, more, tmp_path / "undisturbed")
    assert content(tmp_path / "run") == content(tmp_path / "undisturbed")
    assert [part["rate"] for part in first["parts"]] == [0.3, 0.3]
    assert [part["rate"] for part in second["parts"]] == [3e-3, 0.3]
    assert not first["parts"][0]["tried"][0]["ended"] and first["parts"][0]["tried"][1]["ended"]


@pytest.mark.parametrize("epochs", [2, 8], ids=["at the first rate", "in the second part"])
def test_an_interrupted_run_goes_on_with_more_epochs(epochs, undisturbed, cache, tmp_path, monkeypatch):
    again = interrupt(monkeypatch, epochs)
    with pytest.raises(KeyboardInterrupt):
        start(cache, FEWER, tmp_path)
    again()
    start(cache, QUICK, tmp_path)
    assert content(tmp_path) == content(undisturbed)


@pytest.mark.parametrize("epochs", [0, 4], ids=["at once", "in the second part"])
def test_going_on_can_be_interrupted(epochs, undisturbed, cache, tmp_path, monkeypatch):
    """Check a run that is killed while it goes on: it is unfinished, and started again ends with the same numbers."""
    start(cache, FEWER, tmp_path)
    again = interrupt(monkeypatch, epochs)
    with pytest.raises(KeyboardInterrupt):
        start(cache, QUICK, tmp_path)
    again()
    assert not (tmp_path / "results.json").exists(), "results of fewer epochs beside decoders of more"
    with pytest.raises(RunError, match="--epochs is 3"):
        start(cache, FEWER, tmp_path)
    start(cache, QUICK, tmp_path)
    assert content(tmp_path) == content(undisturbed)


def test_fewer_epochs_are_refused(undisturbed, cache):
    before = content(undisturbed)
    message = "--epochs is 3, but the run in .* was begun with --epochs 6: give 6 or more, or choose another folder"
    with pytest.raises(RunError, match=f"^{message}$"):
        start(cache, FEWER, undisturbed)
    with pytest.raises(RunError, match=r"another run, choose another folder: epochs 6 and 10, batch 8 and 4$"):
        start(cache, replace(QUICK, epochs=10, batch=4), undisturbed)
    assert content(undisturbed) == before


def test_logistic_regression_takes_no_epochs(cache, tmp_path, monkeypatch):
    quick = replace(QUICK, method="logistic_last", epochs=1)
    first = start(cache, quick, tmp_path)
    monkeypatch.setattr(training, "fit_logistic", None)
    second = start(cache, replace(quick, epochs=2), tmp_path)
    assert second["parts"] == first["parts"] and second["settings"]["epochs"] == 2


@pytest.mark.parametrize("cause", ["interrupted", "diverged", "killed"])
def test_a_start_that_made_nothing_claims_nothing(cause, undisturbed, cache, tmp_path, monkeypatch):
    other = replace(QUICK, batch=4, epochs=20)
    if cause == "interrupted":
        again = interrupt(monkeypatch, 0)
        with pytest.raises(KeyboardInterrupt):
            start(cache, other, tmp_path)
        again()
    elif cause == "diverged":
        with pytest.raises(RunError, match="not finite in epoch 1, at no rate"):
            start(cache, replace(other, rates=(1e30, 1e31)), tmp_path)
    else:  # while it wrote
        (tmp_path / "run.json").write_text("{")
        (tmp_path / "part-0.pt.part").write_text("")
    start(cache, QUICK, tmp_path)
    assert content(tmp_path) == content(undisturbed)


def test_files_without_a_claim_are_refused(cache, tmp_path):
    start(cache, FEWER, tmp_path)
    (tmp_path / "run.json").unlink()
    with pytest.raises(RunError, match=r"holds results\.json but no run\.json: choose another folder"):
        start(cache, replace(FEWER, batch=4), tmp_path)


def test_a_crash_leaves_no_results_without_pictures(undisturbed, pictures, cache, tmp_path, monkeypatch):
    """Check a process that dies while it draws: the next one draws again."""

    def killed(*args):
        raise KeyboardInterrupt

    for name in ("plot_confusion", "plot_curves"):
        with monkeypatch.context() as patch:
            patch.setattr(training, name, killed)
            with pytest.raises(KeyboardInterrupt):
                start(cache, QUICK, tmp_path)
    start(cache, QUICK, tmp_path)
    assert content(tmp_path) == content(undisturbed) and content(tmp_path).keys() > {*pictures}


def test_compare_goes_on(cache, tmp_path, monkeypatch):
    monkeypatch.setattr(compare, "read_cache", lambda path: cache)
    monkeypatch.setattr(compare, "plot_comparison", lambda rows, path: None)
    tables = {}
    for folder, epochs in (("run", 2), ("run", 5), ("undisturbed", 5)):
        options = ["--output", tmp_path / folder, "--folds", 2, "--epochs", epochs, "--rate", 1e-2]
        compare.main([*map(str, ["cache", "--methods", "linear", "last", *options])])
        rows = json.loads((tmp_path / folder / "comparison.json").read_text())
        tables[folder, epochs] = [(row["accuracy"], row["settings"]["epochs"]) for row in rows]
    assert tables["run", 5] == tables["undisturbed", 5] != tables["run", 2]
    assert "at most 5 epochs" in (tmp_path / "run" / "table.md").read_text()


@pytest.mark.parametrize(
    "options",
    [["--rate", "0.010", "1e-3", "1e-2"], ["--rate", "1e-3", "0.01", "--layers", "3-4", "1-2"],
     ["--rate", "1e-3", "0.01", "--folds", "2", "--loss", "cross_entropy", "--device", "cpu:0"]],
    ids=["order", "all layers", "defaults"],
)  # fmt: skip
def test_spelling_changes_no_run(options, cache, tmp_path, monkeypatch):
    """Check that run.json says settings and examples alone, however options are spelled and ordered."""
    monkeypatch.setattr(train, "read_cache", lambda path: cache)
    expected = replace(Settings("linear"), epochs=1, folds=2, rates=(1e-3, 1e-2))
    folder = tmp_path / "run"
    folds = [] if "--folds" in options else ["--folds", "2"]
    train.main(["cache", "--output", str(folder), "--method", "linear", "--epochs", "1", *options, *folds])
    times = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    monkeypatch.chdir(tmp_path)
    same = ["--folds", "2", "--epochs", "1", "--rate", "0.001", "0.01"]
    train.main(["elsewhere", "--method", "linear", "--output", "run", *same])
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == times, "another run, or trained again"
    start(cache, expected, folder)
    found = json.loads((folder / "run.json").read_text())
    assert found.keys() == {*Settings.__dataclass_fields__, "examples"} and str(tmp_path) not in json.dumps(found)


def test_a_model_that_is_gone_is_trained_again(cache, undisturbed, tmp_path):
    """Check a model that is not there, and one of an earlier version, which does not name its classes."""
    folder = tmp_path / "run"
    shutil.copytree(undisturbed, folder)
    (folder / "part-0.safetensors").unlink()
    tensors = load_file(folder / "part-1.safetensors")
    save_file(tensors, folder / "part-1.safetensors")
    start(cache, QUICK, folder)
    assert content(folder) == content(undisturbed)
