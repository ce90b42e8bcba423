"""Training, comparison and explanation on features: every method, resumed runs, tables and pictures."""

import json
import math
import multiprocessing
import shutil
import types
from dataclasses import replace

import pytest
import torch

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")
pytest.importorskip("safetensors")

from helpers import close, within
from safetensors.torch import load_file

import daam
from daam.recipes import compare, explain, fitting, lock, plots, train, training
from daam.recipes.cache import Cache
from daam.recipes.errors import UserError
from daam.recipes.logistic import STRENGTHS
from daam.recipes.methods import LOGISTIC, LORA, METHODS, decoder_for, heads_of
from daam.recipes.runs import PAPER, RunError, Settings
from daam.recipes.training import cached_job

LAYERS, FEATURES = 6, 16
QUICK = Settings("daam", epochs=3, folds=2, rates=(3e-3,), batch=8, stop_after=15, conv_channels=8)


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def cache():
    """Return a cache of three classes that only the third layer tells apart."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(60) % 3
    features = torch.randn(60, LAYERS, FEATURES, generator=generator)
    features[torch.arange(60), 2, labels] += 6
    about = {"encoder": "made up", "source": "nowhere"}
    return Cache(features, labels, ["a", "b", "c"], about)


@pytest.fixture
def command(cache, monkeypatch):
    """Run a recipe on the cache of this file, whatever folder it is given."""
    for module in (train, compare, explain):
        monkeypatch.setattr(module, "read_cache", lambda path: cache)

    def run(module, *arguments):
        module.main([*map(str, arguments)])

    return run


@pytest.fixture
def refused(command, capsys):
    """Run a recipe that ends with one line of error, and return the line."""

    def run(module, *arguments):
        with pytest.raises(SystemExit) as stopped:
            command(module, *arguments)
        (line,) = capsys.readouterr().err.splitlines()
        assert stopped.value.code == 2 and line.startswith("error: ")
        return line

    return run


@pytest.fixture(scope="module")
def finished(cache, tmp_path_factory):
    """Return the folder of a finished run, to be copied."""
    folder = tmp_path_factory.mktemp("finished")
    training.run(cached_job(cache, QUICK), QUICK, folder)
    return folder


def test_the_papers_settings():
    settings = Settings("daam", **PAPER)
    assert (settings.epochs, settings.batch, settings.rates, settings.loss) == (35, 8, (1e-4,), "focal")
    assert (settings.folds, settings.standardize, settings.conv_channels, settings.zero_start) == (5, False, 512, False)


@pytest.mark.parametrize(
    ("layers", "method", "heads"),
    [(24, "daam", 8), (24, "daamv2", 1), (6, "daam", 2), (12, "mixture", 4), (4, "daam", 1), (40, "gqdaam", 8)],
)
def test_heads(layers, method, heads):
    assert heads_of(method, layers) == heads
    if method != "daamv2":
        assert daam.DATDecoder(layers, 16, 3, attention=method, conv_channels=2).settings["num_heads"] == heads


def test_a_run_keeps_equal_examples_together(cache, tmp_path):
    double = Cache(cache.features[:30].repeat(2, 1, 1), cache.labels[:30].repeat(2), cache.names, {})
    settings = replace(QUICK, method="linear", epochs=1, layers=(1,))
    part = training.run(cached_job(double, settings), settings, tmp_path)["parts"][0]
    assert sorted({i % 30 for i in part["test"]} | {i % 30 + 30 for i in part["test"]}) == part["test"]


@pytest.mark.parametrize(
    ("copies", "line"),
    [
        ([], ""),
        ([(10, 1), (11, 3), (12, 2)], "3 of 60 examples equal an earlier one, and are in one part with it; 2 are "
         "labelled otherwise than the first that they equal"),
        ([(i, i % 9) for i in range(9, 60)], "51 of 60 examples equal an earlier one, and are in one part with it, but "
         "for 51 of 'a', 'b', 'c': these have too few different examples, and can train on the one that tests"),
    ],
    ids=["none", "some", "many"],
)  # fmt: skip
def test_equal_examples_are_told(copies, line, cache, command, tmp_path, capsys, monkeypatch):
    features = cache.features.clone()
    for copy, original in copies:
        features[copy] = features[original]
    monkeypatch.setattr(train, "read_cache", lambda path: replace(cache, features=features))
    options = ["--folds", 5, "--epochs", 1, "--method", "linear", "--batch", 60]
    command(train, "cache", "--output", tmp_path, *options)
    printed = capsys.readouterr().out.splitlines()
    assert [text for text in printed if "examples equal" in text] == ([line] if line else [])


@pytest.fixture(scope="module")
def plain():
    """Return a cache of three classes that many features of two layers tell apart, the last one of them."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(60) % 3
    features = torch.randn(60, LAYERS, FEATURES, generator=generator)
    for label in range(3):
        features[labels == label, 2::3, 5 * label : 5 * label + 5] += 2
    return Cache(features, labels, ["a", "b", "c"], {"encoder": "made up", "source": "nowhere"})


@pytest.mark.parametrize("method", [method for method in METHODS if method not in LORA])
def test_methods(method, plain, tmp_path):
    """Check that each method learns what is plain to see, and that its results say what they are."""
    settings = replace(QUICK, method=method, epochs=8, rates=(3e-3, 3e-2))
    results = training.run(cached_job(plain, settings), settings, tmp_path)
    assert results["accuracy"]["mean"] > 0.6 > 1 / 3 == pytest.approx(results["chance"])
    for name in ("balanced_accuracy", "macro_f1"):
        assert results[name]["mean"] == pytest.approx(results["accuracy"]["mean"], abs=0.1)
    model = decoder_for(method, LAYERS, FEATURES, 3, standardize=True, conv_channels=8)
    assert results["trainable_parameters"] == sum(p.numel() for p in model.parameters())
    assert len(results["parts"]) == 2 and results["memory"]["bytes"] > 0 and results["seconds"] > 0
    assert (tmp_path / "learning-curves.png").stat().st_size > 10_000
    assert (tmp_path / "confusion.png").stat().st_size > 5_000
    assert len(list(tmp_path.glob("*.pt"))) == (0 if method in LOGISTIC else 2), "those that more epochs go on from"
    path, part = tmp_path / "part-0.safetensors", results["parts"][0]
    if isinstance(model, daam.DATDecoder):
        model = daam.load_decoder(path)
    else:
        model.load_state_dict(load_file(path))
    test = torch.tensor(part["test"])
    assert model.eval()(plain.features[test]).argmax(1).tolist() == part["predictions"]
    train = sorted(set(range(60)) - set(part["test"]) - set(part["validation"]))
    close(model.standardize.mean, plain.features[train].mean((0, 2))[:, None], "means of the training part")
    assert [tried["rate"] for tried in part["tried"]] == (
        list(STRENGTHS) if method in LOGISTIC else list(settings.rates)
    )
    best = max(part["tried"], key=lambda tried: (tried["accuracy"], -tried["loss"]))
    assert part["rate"] == best["rate"] and part["accuracies"][part["best_epoch"]] == best["accuracy"]


def numbers(results):
    """Return the results of a run without its times."""
    found = [{key: value for key, value in part.items() if key != "seconds"} for part in results["parts"]]
    return [part | {"tried": [tried | {"seconds": 0} for tried in part["tried"]]} for part in found]


@pytest.mark.parametrize("method", ["daam", "mha_bn"])
@pytest.mark.parametrize("stops", [9, 28, 45], ids=["in the second epoch", "at the second rate", "in the second part"])
def test_an_interrupted_run_ends_with_the_same_numbers(stops, method, cache, tmp_path, monkeypatch):
    """Check that a resumed run restores running statistics of batch normalisation, the optimizer and the best epoch. An
    epoch has 4 batches and a validation; the first call at a rate counts saved bytes.
    """
    settings = replace(QUICK, method=method, rates=(3e-3, 1e-3))
    job = cached_job(cache, settings)
    expected = training.run(job, settings, tmp_path / "undisturbed")
    original, calls = fitting._loss, []

    def interrupted(*args):
        calls.append(args)
        if len(calls) == stops:
            raise KeyboardInterrupt
        return original(*args)

    monkeypatch.setattr(fitting, "_loss", interrupted)
    monkeypatch.setattr(fitting, "SAVE_EVERY", 0)
    with pytest.raises(KeyboardInterrupt):
        training.run(job, settings, tmp_path / "run")
    monkeypatch.setattr(fitting, "_loss", original)
    assert list((tmp_path / "run").glob("*.pt"))
    assert numbers(training.run(job, settings, tmp_path / "run")) == numbers(expected)
    finished = (tmp_path / "run" / "part-0.safetensors").read_bytes()
    assert finished == (tmp_path / "undisturbed" / "part-0.safetensors").read_bytes()


def test_stops_early(cache, tmp_path):
    """Check that a run without anything to learn ends after stop_after epochs, and tests the best one."""
    settings = replace(QUICK, epochs=40, stop_after=2, rates=(0.0,))
    part = training.run(cached_job(cache, settings), settings, tmp_path)["parts"][0]
    assert (part["best_epoch"], len(part["losses"])) == (0, 3)


def test_of_equal_accuracies_the_lower_loss_is_tested(cache, tmp_path):
    """Check that of equal accuracies the lowest loss decides: on few examples many epochs get all right, and the first
    of them is hardly trained.
    """
    settings = replace(QUICK, epochs=12, choose_by="accuracy")
    for part in training.run(cached_job(cache, settings), settings, tmp_path)["parts"]:
        pairs = list(zip(part["accuracies"], [-loss for loss in part["validation_losses"]], strict=True))
        assert pairs[part["best_epoch"]] == max(pairs)
        assert part["best_epoch"] > part["accuracies"].index(max(part["accuracies"]))


def test_a_finished_run_is_left_alone(finished, cache, tmp_path):
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    expected = json.loads((finished / "results.json").read_text())
    times = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    assert training.run(cached_job(cache, QUICK), QUICK, tmp_path) == expected
    assert {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == times


def test_a_run_does_not_depend_on_its_device(finished, cache, tmp_path, monkeypatch):
    """Check that neither device nor threads are part of a run's settings, which earlier versions noted both."""
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    about = json.loads((tmp_path / "run.json").read_text())
    assert not {"device", "threads"} & about.keys()
    (tmp_path / "run.json").write_text(json.dumps({**about, "device": "another"}))
    monkeypatch.setattr(training, "device_name", lambda device: "a third")
    results = training.run(cached_job(cache, QUICK), QUICK, tmp_path)
    assert results == json.loads((finished / "results.json").read_text())
    (tmp_path / "results.json").unlink()
    assert training.run(cached_job(cache, QUICK), QUICK, tmp_path)["about"]["device"] == "a third"
    with pytest.raises(RunError, match=r"another run, choose another folder: batch 8 and 4$"):
        training.run(cached_job(cache, QUICK), replace(QUICK, batch=4), tmp_path)


@pytest.mark.parametrize("changes", ["settings", "features"])
def test_a_folder_of_another_run(changes, finished, cache, tmp_path):
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    settings = replace(QUICK, epochs=4, batch=4) if changes == "settings" else QUICK
    features = cache.features if changes == "settings" else cache.features.flip(0)
    message = {"settings": "epochs 3 and 4, batch 8 and 4", "features": "examples .* and "}[changes]
    with pytest.raises(RunError, match=f"another run, choose another folder: {message}"):
        training.run(cached_job(replace(cache, features=features), settings), settings, tmp_path)


def test_a_start_that_fails_leaves_the_folder_free(cache, tmp_path):
    wrong = replace(QUICK, folds=1)
    with pytest.raises(RunError, match="--folds is 1, expected 2 or more"):
        training.run(cached_job(cache, wrong), wrong, tmp_path)
    training.run(cached_job(cache, QUICK), QUICK, tmp_path)


@pytest.mark.parametrize(
    ("settings", "advice"),
    [
        ({"rates": (1e30,)}, "choose a lower --rate"),
        ({"rates": (1.0,), "weight_decay": 1e30}, "choose a lower --weight-decay"),
    ],
    ids=str,
)
def test_a_loss_that_is_not_finite(settings, advice, cache, tmp_path):
    settings = replace(QUICK, **settings)
    with pytest.raises(RunError, match=rf"training loss is not finite in epoch 1, at no rate: {advice}$"):
        training.run(cached_job(cache, settings), settings, tmp_path)


@pytest.mark.parametrize("place", ["loss", "gradients"])
def test_a_loss_that_no_rate_makes_finite(place, cache, tmp_path):
    """Check an example that overflows the model, forward or backward alone, whatever the model learns."""

    class Overflow(torch.autograd.Function):
        @staticmethod
        def forward(x, wrong):
            return x + torch.where(wrong & (place == "loss"), math.inf, 0.0)

        @staticmethod
        def setup_context(ctx, inputs, output):
            ctx.wrong = inputs[1]

        @staticmethod
        def backward(ctx, gradient):
            return torch.where(ctx.wrong, math.nan, gradient), None

    class Model(torch.nn.Linear):
        def forward(self, x):
            return Overflow.apply(super().forward(x.flatten(1)), x[:, 0, :1] == cache.features[17, 0, 0])

    job = cached_job(cache, QUICK)
    job.build = lambda: Model(LAYERS * FEATURES, 3)
    with pytest.raises(RunError, match=r"untrained model .* No --rate helps: look at these examples.*float32"):
        training.run(job, QUICK, tmp_path)


@pytest.mark.parametrize("name", ["part-0.json", "part-1.pt", "run.json"])
def test_broken_files_are_named(name, finished, cache, tmp_path):
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    for done in ("results.json", "part-1.json"):
        (tmp_path / done).unlink()
    (tmp_path / name).write_text("")
    with pytest.raises(RunError, match=rf"{name} is broken \(.*\), or of another version: delete it"):
        training.run(cached_job(cache, QUICK), QUICK, tmp_path)


@pytest.mark.parametrize("name", ["part-0.json", "part-1.pt", "run.json", "results.json"])
@pytest.mark.parametrize("content", [None, [], {}, {"accuracy": "1"}, {"validation": [0.5]}, b"\xff"], ids=str)
def test_files_of_something_else_are_named(content, name, finished, cache, tmp_path):
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    if name == "part-1.pt":
        (tmp_path / "part-1.json").unlink()
        torch.save(content, tmp_path / name)
    elif isinstance(content, bytes):
        (tmp_path / name).write_bytes(content)
    else:
        (tmp_path / name).write_text(json.dumps(content))
    if name != "results.json":
        (tmp_path / "results.json").unlink()
    with pytest.raises(RunError, match=f"{name} (is broken|holds no results|is of other splits)|another run"):
        training.run(cached_job(cache, QUICK), QUICK, tmp_path)


PREDICTIONS = [
    {"probabilities": None}, {"probabilities": [None]}, {"probabilities": "x"}, {"probabilities": [[0.5, 0.5]]},
    {"predictions": [0]}, {"predictions": None}, {"warnings": [1]},
]  # fmt: skip


@pytest.mark.parametrize("change", PREDICTIONS, ids=str)
def test_predictions_that_do_not_fit_are_named(change, finished, cache, tmp_path):
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    (tmp_path / "results.json").unlink()
    path = tmp_path / "part-0.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(RunError, match=r"part-0\.json is broken \(a part\)"):
        training.run(cached_job(cache, QUICK), QUICK, tmp_path)


def test_a_part_without_probabilities_is_trained_again(finished, cache, tmp_path):
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    expected = json.loads((tmp_path / "results.json").read_text())["accuracy"]
    (tmp_path / "results.json").unlink()
    path = tmp_path / "part-0.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"probabilities": []}))
    assert training.run(cached_job(cache, QUICK), QUICK, tmp_path)["accuracy"] == expected


@pytest.mark.parametrize("change", [{"names": ["a"]}, {"about": {"cache": 1}}], ids=str)
def test_results_that_do_not_fit_are_named(change, finished, cache, tmp_path):
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    path = tmp_path / "results.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(RunError, match=rf"results\.json is broken \({next(iter(change))}\)"):
        training.run(cached_job(cache, QUICK), QUICK, tmp_path)


@pytest.mark.parametrize("name", ["part-0.json", "results.json"])
def test_parts_of_other_splits(name, finished, cache, tmp_path):
    """Check that a run with an earlier version's splits is refused: two methods would not be compared on the same
    parts.
    """
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    data = json.loads((tmp_path / name).read_text())
    part = data["parts"][0] if name == "results.json" else data
    part["test"], part["validation"] = part["test"][1:] + part["validation"][:1], part["validation"][1:]
    (tmp_path / name).write_text(json.dumps(data))
    if name == "part-0.json":
        (tmp_path / "results.json").unlink()
    with pytest.raises(RunError, match=f"{name} is of other splits of the examples"):
        training.run(cached_job(cache, QUICK), QUICK, tmp_path)


def test_too_few_examples(tmp_path):
    small = Cache(torch.randn(4, LAYERS, FEATURES), torch.tensor([0, 0, 0, 1]), ["a", "b"], {})
    with pytest.raises(RunError, match="class 1 has 1 examples, expected 4 or more to split by label"):
        training.run(cached_job(small, QUICK), QUICK, tmp_path)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--method", "lora"], "give --data and --encoder"),
        (["--folds", "50"], "has 20 examples, expected 50 or more"),
        (["--folds", "1"], "--folds is 1, expected 2"),
        (["--epochs", "0"], "'0', expected a whole number of 1 or more"),
        (["--batch", "-4"], "'-4', expected a whole number of 1 or more"),
        (["--rate", "nan"], "'nan', expected a number of 0 or more"),
        (["--rate", "-1"], "'-1', expected a number of 0 or more"),
        (["--device", "nonsense"], "'nonsense', expected cpu, cuda or cuda:1"),
        (["--device", "meta"], "'meta', but torch finds no such device"),
        (["--seeds", "5000000"], "'5000000', expected 1000 or less"),
        (["--batch", "1" + "0" * 30], "expected 1000000000 or less"),
        (["--folds", "two"], "'two', expected a whole number of 1 or more"),
        (["--method", "nonsense"], "invalid choice: 'nonsense'"),
        (["--method", "lora", "--data", "nowhere.csv", "--encoder", "nowhere"], "nowhere.csv"),
    ],
)
def test_errors_are_one_line(arguments, message, refused, tmp_path):
    assert message in refused(train, "cache", "--output", tmp_path, *arguments)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("module", [train, compare, explain], ids=lambda module: module.__name__)
def test_output_that_is_no_folder_for_results(module, finished, refused, tmp_path):
    (tmp_path / "taken").write_text("")
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "cache.json").write_text("{}")
    inputs = [finished, "cache"] if module is explain else ["cache"]
    assert "taken is a file, expected a folder" in refused(module, *inputs, "--output", tmp_path / "taken")
    assert "cache is a cache, expected another folder" in refused(module, *inputs, "--output", tmp_path / "cache")
    assert [path.name for path in (tmp_path / "cache").iterdir()] == ["cache.json"]


@pytest.mark.parametrize("module", [train, compare, explain], ids=lambda module: module.__name__)
def test_several_processes_are_refused(module, finished, refused, tmp_path, monkeypatch):
    """Check that several processes are refused where a recipe shares nothing, or torchrun did not start them."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    inputs = [finished, "cache"] if module is explain else ["cache"]
    message = "WORLD_SIZE is 2, expected 1" if module is explain else "start several processes with torchrun"
    assert message in refused(module, *inputs, "--output", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_bugs_show_their_traceback(command, finished, tmp_path, monkeypatch):
    def broken(*args):
        raise ValueError("a bug")

    monkeypatch.setattr(train, "run", broken)
    monkeypatch.setattr(explain, "explain", broken)
    for module, inputs in ((train, ["cache"]), (compare, ["cache"]), (explain, [finished, "cache"])):
        with pytest.raises(ValueError, match="a bug"):
            command(module, *inputs, "--output", tmp_path)


@pytest.fixture
def holder():
    """Return a function from a folder to a process that holds its lock."""
    context, processes = multiprocessing.get_context("fork"), []

    def hold(folder):
        held, end = context.Event(), context.Event()
        processes.append(context.Process(target=_hold, args=(folder, held, end)))
        processes[-1].start()
        assert held.wait(60)
        return types.SimpleNamespace(process=processes[-1], end=end)

    yield hold
    for process in processes:
        process.kill()
        process.join()


def _hold(folder, held, end):
    with lock.exclusive(folder):
        held.set()
        end.wait(60)


@pytest.mark.skipif(lock.fcntl is None, reason="files are not locked here")
@pytest.mark.parametrize("ends", ["by itself", "killed"])
def test_one_process_at_a_time_works_in_a_folder(ends, holder, cache, tmp_path):
    folder, settings = tmp_path / "run", replace(QUICK, method="linear", epochs=1)
    owner = holder(folder)
    with pytest.raises(UserError, match=r"another process works in .*run: wait for its end, or choose another folder"):
        training.run(cached_job(cache, settings), settings, folder)
    assert [path.name for path in folder.iterdir()] == [lock.NAME]
    owner.process.kill() if ends == "killed" else owner.end.set()
    owner.process.join()
    training.run(cached_job(cache, settings), settings, folder)
    assert not (folder / lock.NAME).exists()


@pytest.mark.skipif(lock.fcntl is None, reason="files are not locked here")
def test_a_lock_that_was_deleted_while_it_was_taken(tmp_path, monkeypatch):
    """Check a lock that the process holding it deletes: what is locked then is another file than the next process
    finds.
    """
    original, calls = lock.fcntl.flock, []

    def flock(file, operation):
        calls.append(operation)
        if len(calls) == 1:
            (tmp_path / lock.NAME).unlink()
        original(file, operation)

    monkeypatch.setattr(lock.fcntl, "flock", flock)
    with lock.exclusive(tmp_path):
        assert len(calls) == 2
        with pytest.raises(UserError), lock.exclusive(tmp_path):
            pass
        assert (tmp_path / lock.NAME).exists(), "who is refused leaves the lock"


def test_file_systems_without_locks(tmp_path, monkeypatch):
    def flock(file, operation):
        raise OSError("no locks available")

    if lock.fcntl is not None:
        monkeypatch.setattr(lock.fcntl, "flock", flock)
        with lock.exclusive(tmp_path), lock.exclusive(tmp_path):
            pass
    monkeypatch.setattr(lock, "fcntl", None)
    with lock.exclusive(tmp_path), lock.exclusive(tmp_path):
        pass


@pytest.mark.parametrize("layers", [1, 2, 3])
@pytest.mark.parametrize("features", [12, 16])
def test_sizes_that_a_method_cannot_work_on(layers, features, cache, refused, tmp_path, monkeypatch):
    """Check that impossible sizes are refused before anything is trained, and that a step works on all others, also of
    one example.
    """
    small = replace(cache, features=cache.features[:, :layers, :features])
    monkeypatch.setattr(compare, "read_cache", lambda path: small)
    for method in METHODS[:-2]:
        compares_layers = method in ("daam", "daamv2", "mixture", "gqdaam", "mha_bn")
        if (layers == 1 and compares_layers) or (features == 12 and method.startswith("mha")):
            line = refused(compare, "cache", "--methods", "linear", method, "--output", tmp_path / "out")
            assert f"--method {method} " in line and "expected" in line and not (tmp_path / "out").exists()
            with pytest.raises(RunError):
                decoder_for(method, layers, features, 3)
        else:
            decoder_for(method, layers, features, 3).train()(torch.randn(1, layers, features)).sum().backward()


def test_compare_checks_before_it_trains(refused, tmp_path):
    assert "give --data and --encoder" in refused(
        compare, "cache", "--methods", "linear", "lora", "--output", tmp_path / "out"
    )
    nowhere = ["--data", tmp_path / "nowhere.csv", "--encoder", "nowhere"]
    assert "nowhere.csv" in refused(
        compare, "cache", "--methods", "linear", "lora", "--output", tmp_path / "out", *nowhere
    )
    assert not (tmp_path / "out").exists()


def test_errors_name_the_class(cache, refused, tmp_path):
    line = refused(train, "cache", "--output", tmp_path / "out", "--folds", 21)
    assert "class 'a' has 20 examples, expected 21 or more" in line and line.endswith("take --folds 20")


def test_a_class_without_examples_is_named(cache, command, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(train, "read_cache", lambda path: replace(cache, names=["a", "b", "c", "d"]))
    command(train, "cache", "--output", tmp_path, "--folds", 2, "--epochs", 1, "--method", "linear")
    assert "class 'd' has no examples" in capsys.readouterr().out


def test_train_prints_heads_and_accuracy(command, tmp_path, capsys):
    command(train, "cache", "--output", tmp_path, "--folds", 2, "--epochs", 2)
    out = capsys.readouterr().out
    assert "daam: 2 heads on 6 layers" in out and "daam: test accuracy 0." in out


def test_compare(command, tmp_path, capsys):
    methods = ["daam", "daamv2", "linear"]
    options = ["--output", tmp_path, "--folds", 2, "--epochs", 2, "--rate", 3e-3]
    command(compare, "cache", "--methods", *methods, *options)
    rows = json.loads((tmp_path / "comparison.json").read_text())
    assert [row["method"] for row in rows] == methods
    assert [part["test"] for part in rows[0]["parts"]] == [part["test"] for part in rows[2]["parts"]], "same folds"
    lines = (tmp_path / "table.md").read_text().splitlines()
    lines = lines[: lines.index("")]
    assert len(lines) == 5 and all(any(f"| {name} |" in line for line in lines) for name in methods)
    accuracies = [float(line.split("|")[2].split("±")[0]) for line in lines[2:]]
    assert accuracies == sorted(accuracies, reverse=True)
    assert (tmp_path / "comparison.png").stat().st_size > 10_000
    assert lines[2] in capsys.readouterr().out
    time = (tmp_path / "daam" / "part-0.json").stat().st_mtime_ns
    command(compare, "cache", "--methods", *methods, "mixture", *options)
    assert (tmp_path / "daam" / "part-0.json").stat().st_mtime_ns == time, "trained again"


NAMES = ["prices_$5_to_$10.csv", "$x_{$.csv", "a^b_{c}%d#e&f\\g~.csv", "$\\frac{$", "价格.csv", "$$", "<b>&amp;"]


def results_named(name):
    part = {"losses": [3.0, 1.0], "accuracies": [0.5, 0.6], "best_epoch": 1}
    about = {"cache": {"encoder": name, "source": name}, "device": name, "torch": "2"}
    return {"method": name, "parts": [part], "accuracy": {"mean": 0.5, "std": 0.1}, "about": about,
            "trainable_parameters": 10, "chance": 0.3, "settings": {"loss": "focal"}}  # fmt: skip


def test_names_are_drawn_as_they_are(tmp_path, monkeypatch, recwarn, capsys):
    """Check that mathematics is for the axes alone, and LaTeX for none, whatever a user's style says."""
    import matplotlib
    from matplotlib.mathtext import MathTextParser

    original, read = MathTextParser.parse, []

    def parse(self, text, *args, **kwargs):
        read.append(text)
        return original(self, text, *args, **kwargs)

    monkeypatch.setattr(MathTextParser, "parse", parse)
    map_ = torch.rand(4, 8).numpy()
    with matplotlib.rc_context({"text.usetex": True}):
        for i, name in enumerate(NAMES):
            plots.plot_comparison([results_named(name), results_named("other")], tmp_path / f"comparison-{i}.png")
        name = " ".join(NAMES)
        plots.plot_curves(results_named(name), tmp_path / "curves.png")
        plots.plot_importance(map_, map_, [1, 2, 3, 4], 2, name, tmp_path / "importance.png")
        plots.plot_gaussians((map_[:2], map_[2:]), (map_[:2], map_[2:]), name, tmp_path / "gaussians.png")
    assert len(list(tmp_path.glob("*.png"))) == len(NAMES) + 3
    assert read and all("mathdefault" in text for text in read), "names were read as mathematics"
    assert not recwarn.list and not capsys.readouterr().err


@pytest.mark.parametrize("name", ["\udcff.csv", "a\0b", "\x1b[1m", "\r\n"], ids=ascii)
def test_names_that_are_no_text(name, tmp_path, capsys):
    """Check that such names are drawn, or that their picture is reported missing."""
    plots.plot_comparison([results_named(name)], tmp_path / "comparison.png")
    told = capsys.readouterr().err.splitlines()
    assert (tmp_path / "comparison.png").exists() != bool(told) and len(told) <= 1


def test_a_picture_that_fails_ends_nothing(cache, command, tmp_path, capsys, monkeypatch):
    def broken(*args, **kwargs):
        raise ValueError("no such\nfont")

    monkeypatch.setattr(plots.Figure, "savefig", broken)
    options = ["--folds", 2, "--epochs", 1, "--output", tmp_path / "out"]
    command(compare, "cache", "--methods", "linear", "daam", *options)
    out, err = capsys.readouterr()
    told = [line for line in err.splitlines() if line.startswith("no picture")]
    drawn = ("learning-curves.png", "confusion.png")
    pictures = [f"{method}/{name}" for method in ("linear", "daam") for name in drawn] + ["comparison.png"]
    assert told == [f"no picture {tmp_path / 'out' / name}: ValueError no such font" for name in pictures]
    for name in ("linear/results.json", "daam/results.json", "table.md", "comparison.json"):
        assert (tmp_path / "out" / name).stat().st_size
    assert "| linear |" in out
    command(explain, tmp_path / "out" / "daam", "cache", "--output", tmp_path / "explained")
    assert (tmp_path / "explained" / "importance.json").stat().st_size


@pytest.mark.kernel
def test_kernels_train_as_the_eager_backend_does(device):
    """Compare the loss curves of both backends, step by step."""
    torch.manual_seed(0)
    x, labels = torch.randn(12, 4, 8).to(device), torch.arange(12).to(device) % 3
    curves = {}
    for backend in ("eager", "triton"):
        torch.manual_seed(1)
        decoder = daam.DATDecoder(4, 8, 3, num_heads=2, conv_channels=4, backend=backend).to(device)
        optimizer = torch.optim.AdamW(decoder.parameters(), lr=1e-2)
        curves[backend] = []
        for _ in range(8):
            optimizer.zero_grad()
            loss = daam.focal_loss(decoder(x), labels)
            loss.backward()
            optimizer.step()
            curves[backend].append(loss.item())
    assert curves["eager"][-1] < curves["eager"][0]
    for step, (result, wanted) in enumerate(zip(curves["triton"], curves["eager"], strict=True)):
        within(abs(result - wanted), 1e-4 * wanted, f"loss of step {step}")
