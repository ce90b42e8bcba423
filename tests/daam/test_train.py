"""Training, comparison and explanation on features: every method, resumed runs, tables and pictures."""

import json
from dataclasses import replace

import pytest
import torch

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")
pytest.importorskip("safetensors")

from helpers import close, within

import daam
from daam.recipes import compare, explain, train
from daam.recipes.cache import Cache
from daam.recipes.train import METHODS, Settings, cached_job, decoder_for, heads_for, splits

LAYERS, FEATURES = 6, 16
QUICK = Settings("daam", epochs=3, folds=2, rate=3e-3, stop_after=15)


@pytest.fixture(scope="module")
def cache():
    """Three classes that only the third layer tells apart."""
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


def test_the_papers_settings_are_the_defaults():
    one = Settings("daam")
    assert (one.epochs, one.batch, one.rate, one.loss, one.folds) == (35, 8, 1e-4, "focal", 5)


@pytest.mark.parametrize(
    ("layers", "method", "heads"),
    [(24, "daam", 8), (24, "daamv2", 1), (6, "daam", 2), (12, "mixture", 4), (4, "daam", 1), (40, "gqdaam", 8)],
)
def test_heads(layers, method, heads):
    assert heads_for(layers, method) == heads


@pytest.mark.parametrize("folds", [{"folds": 4}, {"seeds": 3}], ids=str)
def test_splits(cache, folds):
    """Parts do not overlap, classes are in all of them, folds test every example once."""
    found = splits(cache.labels, replace(QUICK, **folds))
    for one in found:
        parts = [one.train, one.validation, one.test]
        assert torch.cat(parts).sort().values.equal(torch.arange(60))
        assert all(len(set(cache.labels[part].tolist())) == 3 for part in parts)
    if "folds" in folds:
        assert torch.cat([one.test for one in found]).sort().values.equal(torch.arange(60))
    else:
        assert len(found) == 3 and not torch.equal(found[0].test, found[1].test)


@pytest.mark.parametrize("method", [method for method in METHODS if not method.startswith("lora")])
def test_methods(method, cache, tmp_path):
    """Each learns what is plain to see, and its results say what they are."""
    settings = replace(QUICK, method=method, epochs=8, rate=3e-2 if method == "linear" else 3e-3)
    results = train.run(cached_job(cache, settings), settings, tmp_path)
    assert results["accuracy"]["mean"] > 0.6 > 1 / 3
    decoder = decoder_for(method, LAYERS, FEATURES, 3)
    assert results["trainable_parameters"] == sum(p.numel() for p in decoder.parameters())
    assert len(results["parts"]) == 2 and results["memory"]["bytes"] > 0 and results["seconds_per_epoch"] > 0
    assert (tmp_path / "learning-curves.png").stat().st_size > 10_000
    assert not list(tmp_path.glob("*.pt")), "checkpoints of finished parts go"
    if method != "linear":
        part = results["parts"][0]
        best = daam.load_decoder(tmp_path / "part-0.safetensors").eval()
        test = torch.tensor(part["test"])
        assert (best(cache.features[test]).argmax(1) == cache.labels[test]).float().mean() == pytest.approx(
            part["accuracy"]
        )


def numbers(results):
    """All but times."""
    return [{key: value for key, value in part.items() if key != "seconds"} for part in results["parts"]]


@pytest.mark.parametrize("method", ["daam", "mha_bn"])
@pytest.mark.parametrize("stops", [9, 25], ids=["in the second epoch", "in the second part"])
def test_an_interrupted_run_ends_with_the_same_numbers(stops, method, cache, tmp_path, monkeypatch):
    """Running statistics of batch normalisation, the optimizer and the best epoch included. An epoch has 4 batches and
    a validation; the first call counts saved bytes.
    """
    settings = replace(QUICK, method=method)
    job = cached_job(cache, settings)
    expected = train.run(job, settings, tmp_path / "undisturbed")
    original, calls = train._loss, []

    def interrupted(*args):
        calls.append(args)
        if len(calls) == stops:
            raise KeyboardInterrupt
        return original(*args)

    monkeypatch.setattr(train, "_loss", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train.run(job, settings, tmp_path / "run")
    monkeypatch.setattr(train, "_loss", original)
    assert list((tmp_path / "run").glob("*.pt"))
    assert numbers(train.run(job, settings, tmp_path / "run")) == numbers(expected)
    finished = (tmp_path / "run" / "part-0.safetensors").read_bytes()
    assert finished == (tmp_path / "undisturbed" / "part-0.safetensors").read_bytes()


def test_stops_early(cache, tmp_path):
    """A run without anything to learn ends after stop_after epochs, and tests the best one."""
    settings = replace(QUICK, epochs=40, stop_after=2, rate=0.0)
    part = train.run(cached_job(cache, settings), settings, tmp_path)["parts"][0]
    assert (part["best_epoch"], len(part["losses"])) == (0, 3)


def test_of_equal_accuracies_the_lower_loss_is_tested(cache, tmp_path):
    """Of few examples many epochs get all right: the first of them is hardly trained."""
    settings = replace(QUICK, epochs=12)
    for part in train.run(cached_job(cache, settings), settings, tmp_path)["parts"]:
        scores = list(zip(part["accuracies"], [-loss for loss in part["validation_losses"]], strict=True))
        assert scores[part["best_epoch"]] == max(scores)
        assert part["best_epoch"] > part["accuracies"].index(max(part["accuracies"]))


def test_a_finished_run_is_left_alone(cache, tmp_path):
    expected = train.run(cached_job(cache, QUICK), QUICK, tmp_path)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    assert train.run(cached_job(cache, QUICK), QUICK, tmp_path) == json.loads(json.dumps(expected))
    assert {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize("other", ["settings", "features"])
def test_a_folder_of_another_run(other, cache, tmp_path):
    train.run(cached_job(cache, QUICK), QUICK, tmp_path)
    settings = replace(QUICK, epochs=4) if other == "settings" else QUICK
    features = cache.features if other == "settings" else cache.features.flip(0)
    message = {"settings": "epochs 3 and 4", "features": "examples .* and "}[other]
    with pytest.raises(train.RunError, match=f"another run, choose another folder: {message}"):
        train.run(cached_job(replace(cache, features=features), settings), settings, tmp_path)


def test_a_start_that_fails_leaves_the_folder_free(cache, tmp_path):
    wrong = replace(QUICK, folds=1)
    with pytest.raises(train.RunError, match="--folds is 1, expected 2 or more"):
        train.run(cached_job(cache, wrong), wrong, tmp_path)
    train.run(cached_job(cache, QUICK), QUICK, tmp_path)


def test_a_loss_that_is_not_finite(cache, tmp_path):
    settings = replace(QUICK, rate=1e30)
    with pytest.raises(train.RunError, match=r"training loss is (nan|inf) in epoch .*: choose a lower --rate"):
        train.run(cached_job(cache, settings), settings, tmp_path)


@pytest.mark.parametrize("name", ["part-0.json", "part-1.pt", "run.json"])
def test_broken_files_are_named(name, cache, tmp_path):
    train.run(cached_job(cache, QUICK), QUICK, tmp_path)
    for done in ("results.json", "part-1.json"):
        (tmp_path / done).unlink()
    (tmp_path / name).write_text("")
    with pytest.raises(train.RunError, match=f"{name} is broken .*: delete it and run again"):
        train.run(cached_job(cache, QUICK), QUICK, tmp_path)


def test_many_classes(tmp_path):
    """As many examples validate as there are classes."""
    labels = torch.arange(80) % 16
    many = Cache(torch.randn(80, LAYERS, FEATURES), labels, [str(i) for i in range(16)], {})
    settings = replace(QUICK, method="linear", epochs=1)
    part = train.run(cached_job(many, settings), settings, tmp_path)["parts"][0]
    assert sorted(labels[part["validation"]].tolist()) == list(range(16))


def test_too_few_examples(tmp_path):
    few = Cache(torch.randn(4, LAYERS, FEATURES), torch.tensor([0, 0, 0, 1]), ["a", "b"], {})
    with pytest.raises(train.RunError, match="class 1 has 1 examples, expected 3 or more to split by label"):
        train.run(cached_job(few, QUICK), QUICK, tmp_path)


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
    ],
)
def test_errors_are_one_line(arguments, message, command, tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        command(train, "cache", "--output", tmp_path, *arguments)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def test_output_that_is_a_file(command, tmp_path, capsys):
    (tmp_path / "taken").write_text("")
    with pytest.raises(SystemExit):
        command(train, "cache", "--output", tmp_path / "taken", "--folds", 2)
    assert "taken" in capsys.readouterr().err


def test_compare_checks_before_it_trains(command, tmp_path, capsys):
    with pytest.raises(SystemExit):
        command(compare, "cache", "--methods", "linear", "lora", "--output", tmp_path / "out")
    assert "give --data and --encoder" in capsys.readouterr().err and not (tmp_path / "out").exists()


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
    assert len(lines) == 5 and all(any(f"| {name} |" in line for line in lines) for name in methods)
    accuracies = [float(line.split("|")[2].split("±")[0]) for line in lines[2:]]
    assert accuracies == sorted(accuracies, reverse=True)
    assert (tmp_path / "comparison.png").stat().st_size > 10_000
    assert lines[2] in capsys.readouterr().out
    before = (tmp_path / "daam" / "part-0.json").stat().st_mtime_ns
    command(compare, "cache", "--methods", *methods, "mixture", *options)
    assert (tmp_path / "daam" / "part-0.json").stat().st_mtime_ns == before, "trained again"


@pytest.mark.parametrize("method", ["daam", "mixture", "gqdaam"])
def test_explain(method, command, cache, tmp_path, capsys):
    run, out = tmp_path / "run", tmp_path / "out"
    settings = replace(QUICK, method=method)
    results = train.run(cached_job(cache, settings), settings, run)
    command(explain, run, "cache", "--output", out, "--ablate", 2)
    report = json.loads((out / "importance.json").read_text())
    total, count = torch.zeros(LAYERS, FEATURES), 0
    for i, part in enumerate(results["parts"]):
        assert not set(part["validation"]) & set(part["test"])
        decoder = daam.load_decoder(run / f"part-{i}.safetensors").eval()
        total += decoder(cache.features[part["validation"]], return_weights=True)[1].detach().sum(0)
        count += len(part["validation"])
    expected = daam.layer_contribution(total / count)
    close(torch.tensor(report["layer_contribution"]), expected, "percent")
    importance = daam.importance_factor(total / count)
    first = report["most_important"][0]
    assert first["importance"] == 1 and importance[first["layer"] - 1, first["feature"]] == pytest.approx(1)
    order = expected.argsort(descending=True) + 1
    assert report["ablation"]["highest"]["layers"] == sorted(order[:2].tolist())
    assert report["ablation"]["lowest"]["layers"] == sorted(order[-2:].tolist())
    assert {path.name for path in out.glob("*.png")} == {"importance.png", "gaussians.png"}
    assert "highest layers" in capsys.readouterr().out


def test_layers_keep_their_numbers(command, cache, tmp_path):
    settings = replace(QUICK, layers=(1, 2, 4))
    train.run(cached_job(cache, settings), settings, tmp_path / "run")
    command(explain, tmp_path / "run", "cache", "--output", tmp_path)
    report = json.loads((tmp_path / "importance.json").read_text())
    assert report["layers"] == [2, 3, 5] and {one["layer"] for one in report["most_important"]} <= {2, 3, 5}


@pytest.mark.parametrize("count", [1, 4])
def test_ablations_that_do_not_fit(count, command, cache, tmp_path, capsys):
    train.run(cached_job(cache, QUICK), QUICK, tmp_path)
    with pytest.raises(SystemExit):
        command(explain, tmp_path, "cache", "--output", tmp_path / "out", "--ablate", count)
    assert f"--ablate is {count}, expected 2 to 3, half of the 6 layers" in capsys.readouterr().err


def test_what_cannot_be_explained(command, tmp_path, capsys, cache, monkeypatch):
    def refused():
        with pytest.raises(SystemExit):
            command(explain, tmp_path, "cache", "--output", tmp_path)
        return capsys.readouterr().err

    assert "finish the run" in refused()
    (tmp_path / "results.json").write_text("{}")
    assert "holds no results" in refused()
    (tmp_path / "results.json").unlink()
    settings = replace(QUICK, method="linear", epochs=1)
    train.run(cached_job(cache, settings), settings, tmp_path)
    assert "'linear', which has no densities" in refused()
    other = replace(cache, features=cache.features + 1)
    settings = replace(QUICK, epochs=1)
    train.run(cached_job(other, settings), settings, tmp_path / "other")
    tmp_path = tmp_path / "other"
    assert "was trained on another cache" in refused()


@pytest.mark.kernel
def test_kernels_train_as_the_eager_backend_does(device):
    """The same loss curve, step by step."""
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
    for step, (ours, theirs) in enumerate(zip(curves["triton"], curves["eager"], strict=True)):
        within(abs(ours - theirs), 1e-4 * theirs, f"loss of step {step}")
