"""Methods that are compared with decoders, the statistics that features are standardised by, and warnings."""

import copy
import json
import math
from dataclasses import replace

import pytest
import torch
from torch import nn

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")
pytest.importorskip("safetensors")

from helpers import close
from safetensors.torch import load_file

import daam
from daam.recipes import compare, fitting, train, training
from daam.recipes.cache import Cache
from daam.recipes.fitting import class_weights, fit_part, untrained
from daam.recipes.jobs import Work
from daam.recipes.methods import ABOUT, METHODS, PROBES, decoder_for
from daam.recipes.runs import PAPER, RunError, Settings
from daam.recipes.splits import splits
from daam.recipes.training import cached_job
from daam.recipes.warn import dead_channels, find_warnings
from daam.standardize import Standardize

LAYERS, FEATURES = 6, 16
QUICK = Settings("daam", epochs=10, folds=2, rates=(3e-3, 3e-2), batch=8, stop_after=15, conv_channels=8)


pytestmark = pytest.mark.usefixtures("one_thread")


def made_up(scale=1.0, count=60):
    """Return a cache of three classes that many features of two layers tell apart."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(count) % 3
    features = torch.randn(count, LAYERS, FEATURES, generator=generator)
    for label in range(3):
        features[labels == label, 2::3, 5 * label : 5 * label + 5] += 2
    return Cache(scale * features, labels, ["a", "b", "c"], {"encoder": "made up", "source": "nowhere"})


def job_and_split(settings, cache):
    job = cached_job(cache, settings)
    return job, splits(job.labels, settings, job.equal)[0]


def test_standardised_layers():
    torch.manual_seed(0)
    x = 5 * torch.randn(50, 3, 7) + torch.tensor([100.0, 0.0, -3.0])[:, None]
    x[:, 2] = 0.1  # constant, up to rounding
    module = Standardize(3)
    assert torch.equal(module(x), x)
    module.fit(x)
    y = module(x)
    close(y[:, :2].mean((0, 2)), torch.zeros(2), "means")
    close(y[:, :2].std((0, 2), correction=0), torch.ones(2), "standard deviations")
    assert y[:, 2].abs().max() < 1e-6
    assert not list(module.parameters()) and set(module.state_dict()) == {"mean", "std"}
    for bad in (x[:, :2], x[0], x[:0]):
        with pytest.raises(ValueError, match=r"x has shape .*, expected \(examples, 3, features\)"):
            module.fit(bad)
    x[3, 1, 2] = math.nan
    with pytest.raises(ValueError, match="x has features that are not finite, in layer 1 of 0 to 2"):
        module.fit(x)


def test_a_decoder_keeps_its_statistics(tmp_path):
    x = 7 * torch.randn(9, 6, 16) + 3
    decoder = daam.DATDecoder(6, 16, 3, conv_channels=4, standardize=True).eval()
    plain = daam.DATDecoder(6, 16, 3, conv_channels=4).eval()
    plain.load_state_dict({name: t for name, t in decoder.state_dict().items() if "standardize" not in name})
    decoder.standardize.fit(x)
    close(decoder(x), plain((x - x.mean((0, 2), keepdim=True)) / x.std((0, 2), correction=0, keepdim=True)), "scores")
    daam.save_decoder(decoder, tmp_path / "decoder.safetensors")
    assert torch.equal(daam.load_decoder(tmp_path / "decoder.safetensors").eval()(x), decoder(x))
    decoder.reset_parameters()
    assert torch.equal(decoder.standardize(x), x)


def test_probes_are_their_formulas():
    torch.manual_seed(0)
    x = torch.randn(5, LAYERS, FEATURES)
    models = {name: kind(LAYERS, FEATURES, 3, False) for name, kind in PROBES.items()}
    for model in models.values():
        assert torch.equal(model(x), torch.zeros(5, 3)), "starts at 0"
        for p in model.parameters():
            nn.init.normal_(p, std=0.3)
    weight, bias = models["linear"].classify.weight, models["linear"].classify.bias
    close(models["linear"](x), x.flatten(1) @ weight.T + bias, "linear")
    close(models["last"](x), models["last"].classify(x[:, -1]), "last")
    summed = sum(w * x[:, i] for i, w in enumerate(models["weighted_sum"].layer_scores.softmax(0)))
    close(models["weighted_sum"](x), models["weighted_sum"].classify(summed), "weighted sum")
    model = models["attentive"]
    w = model.score(x).squeeze(-1).softmax(1)[..., None]
    mean = (w * x).sum(1)
    std = (w * (x - mean[:, None]) ** 2).sum(1).clamp(min=1e-6).sqrt()
    close(model(x), model.classify(torch.cat([mean, std], 1)), "attentive")
    same = x[:, :1].expand(-1, LAYERS, -1).clone().requires_grad_()
    model(same).sum().backward()
    assert same.grad.isfinite().all()


def test_methods_are_listed_and_built():
    for method in METHODS:
        if not method.startswith("lora"):
            assert decoder_for(method, LAYERS, FEATURES, 3, conv_channels=2)(
                torch.randn(2, LAYERS, FEATURES)
            ).shape == (2, 3)
        assert f"  {method} " in train.METHODS_HELP and ABOUT[method]
    assert {"weighted_sum", "attentive", "last", "logistic", "linear", "daam", "mha"} <= set(METHODS)


@pytest.mark.parametrize("names", [["a", "b"], ["a", "none", "b"]], ids=["two classes", "one without examples"])
@pytest.mark.parametrize("method", ["logistic", "logistic_last"])
def test_logistic_regression_is_scikit_learns(method, names, tmp_path):
    from sklearn.linear_model import LogisticRegression

    cache = made_up()
    keep = cache.labels != 2
    labels = cache.labels[keep] * (len(names) - 1)
    cache = Cache(cache.features[keep], labels, names, {})
    settings = replace(QUICK, method=method)
    results = training.run(cached_job(cache, settings), settings, tmp_path)
    part = results["parts"][0]
    test = torch.tensor(part["test"])
    train_places = torch.tensor(sorted(set(range(len(labels))) - set(part["test"]) - set(part["validation"])))
    x = cache.features
    x = (x - x[train_places].mean((0, 2), keepdim=True)) / x[train_places].std((0, 2), correction=0, keepdim=True)
    x = x[:, -1] if method == "logistic_last" else x.flatten(1)
    model = LogisticRegression(C=part["rate"], max_iter=1000).fit(x[train_places], labels[train_places])
    assert model.predict(x[test]).tolist() == part["predictions"]
    lines = (tmp_path / "predictions.csv").read_text().splitlines()
    found = torch.tensor([[float(v) for v in line.split(",")[4:]] for line in lines[1 : len(test) + 1]])
    expected = torch.from_numpy(model.predict_proba(x[test])).float()
    close(found[:, [0, -1]], expected, "probabilities", (0, 2e-5))
    inputs = FEATURES if method == "logistic_last" else LAYERS * FEATURES
    assert results["trainable_parameters"] == (inputs + 1) * len(names)
    assert results["memory"]["what"] == "peak of the fit"


def test_a_rate_that_diverges_later_is_told(tmp_path, monkeypatch):
    """Check that what it gave before stands, and that the warning says when it ended."""
    original, calls = fitting._loss, []

    def broken(model, places, work):
        calls.append(model.training)
        loss, scores = original(model, places, work)
        return (loss * math.inf if sum(calls) == 8 else loss), scores

    monkeypatch.setattr(fitting, "_loss", broken)
    settings = replace(QUICK, method="last", rates=(1e-2,), epochs=5)
    part = training.run(cached_job(made_up(), settings), settings, tmp_path)["parts"][0]
    assert 1 <= len(part["losses"]) < 5
    epoch = len(part["losses"]) + 1
    assert f"at a rate of 0.01 the loss is not finite from epoch {epoch} on" in part["warnings"]


def best_logistic(x, labels, split):
    """Return the test accuracy of scikit-learn's logistic regression on (examples, numbers), of all strengths the best
    on validation.
    """
    from sklearn.linear_model import LogisticRegression

    found = []
    for strength in (1e-2, 1e-1, 1.0, 10.0):
        model = LogisticRegression(C=strength, max_iter=2000).fit(x[split.train], labels[split.train])
        found.append((model.score(x[split.validation], labels[split.validation]),
                      model.score(x[split.test], labels[split.test])))  # fmt: skip
    return max(found)[1]


@pytest.mark.parametrize(
    "method", ["linear", *(pytest.param(m, marks=pytest.mark.slow) for m in ("last", "weighted_sum"))]
)
def test_probes_are_as_good_as_logistic_regression(method, tmp_path):
    """Check on real images, whose eight rows stand for layers, that probes lose a point at most to scikit-learn's
    logistic regression on the same numbers and parts: all rows, the last one, and the rows' learned sum.
    """
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    features, labels = torch.tensor(images, dtype=torch.float32).view(-1, 8, 8), torch.tensor(labels)
    cache = Cache(features, labels, list("0123456789"), {})
    settings = Settings(method, folds=2, epochs=50, stop_after=5, rates=(1e-2,))
    results = training.run(cached_job(cache, settings), settings, tmp_path)
    expected = []
    for i, split in enumerate(splits(labels, settings, cached_job(cache, settings).equal)):
        model = decoder_for(method, 8, 8, 10, standardize=True)
        model.load_state_dict(load_file(tmp_path / f"part-{i}.safetensors"))
        expected.append(best_logistic(model.pool(model.standardize(features)).detach(), labels, split))
    assert results["accuracy"]["mean"] > sum(expected) / 2 - 0.01


@pytest.mark.parametrize(
    "method",
    ["daam", "linear", *(pytest.param(m, marks=pytest.mark.slow) for m in ("mixture", "mha", "last", "weighted_sum"))],
)
def test_features_far_from_unit_scale(method, tmp_path):
    """Check that methods learn from features of a standard deviation of 0.015, at which they stayed at chance, and that
    without standardisation the scale is warned of.
    """
    cache, settings = made_up(0.015), replace(QUICK, method=method)
    results = training.run(cached_job(cache, settings), settings, tmp_path / "standardised")
    assert results["accuracy"]["mean"] > 0.6
    assert not any("far from 1" in text for part in results["parts"] for text in part["warnings"])
    settings = replace(settings, standardize=False, epochs=1, rates=(1e-4,))
    results = training.run(cached_job(cache, settings), settings, tmp_path / "raw")
    assert any("6 of 6 layers have features with a standard deviation of 0.0" in text and "take --standardize" in text
               for text in results["parts"][0]["warnings"])  # fmt: skip


def test_dead_channels_are_warned_of(capsys):
    cache, settings = made_up(), replace(QUICK, epochs=1)
    job, split = job_and_split(settings, cache)
    work, part = Work(job, split, settings, "cpu"), fitting.Part(best_epoch=-1)
    decoder = untrained(job, split, 0, "cpu")
    assert not find_warnings(decoder, part, work)
    with torch.no_grad():
        decoder.conv2.bias[:4] = -100
        decoder.conv1.bias[0] = -100
    dead = dead_channels(decoder, work)
    assert dead["conv2"].tolist() == [True] * 4 + [False] * 2 and dead["conv1"].tolist() == [True] + [False] * 7
    (line,) = find_warnings(decoder, part, work)
    assert line.startswith("4 of 6 channels of conv2 are dead, no training example passes them")
    assert f"warning: daam: {line}" in capsys.readouterr().err.splitlines()
    assert not decoder.conv1._forward_hooks, "hooks go"


def test_training_that_was_cut_short_is_warned_of(tmp_path):
    settings = replace(QUICK, epochs=2, rates=(1e-3,))
    results = training.run(cached_job(made_up(), settings), settings, tmp_path)
    assert "the best epoch is the last of 2: more --epochs may do better" in results["parts"][0]["warnings"]
    assert "Warning, daam, part 0, 1: the best epoch is the last of 2" in compare.table([results])
    settings = replace(QUICK, epochs=60, stop_after=3, rates=(3e-2,))
    part = training.run(cached_job(made_up(), settings), settings, tmp_path / "long")["parts"][0]
    assert len(part["losses"]) == part["best_epoch"] + 1 + 3 < 60, "goes on after the best epoch"
    assert not any("best epoch" in text for text in part["warnings"])


def test_a_rate_that_diverges_is_left_out(tmp_path):
    settings = replace(QUICK, method="linear", rates=(1e30, 1e-2))
    part = training.run(cached_job(made_up(), settings), settings, tmp_path)["parts"][0]
    assert part["rate"] == 1e-2 and part["accuracy"] > 0.5
    assert "at a rate of 1e+30 the loss is not finite from epoch 1 on" in part["warnings"]
    assert "accuracy" not in part["tried"][0] and part["tried"][1]["epochs"] == len(part["losses"])


def test_validation_chooses_the_rate_and_test_does_not(tmp_path, monkeypatch):
    """Check that labels of the test part change nothing but its scores."""
    cache, settings = made_up(), replace(QUICK, rates=(1e-4, 1e-2, 3e-2))
    job, split = job_and_split(settings, cache)
    part = fit_part(job, split, settings, tmp_path / "part-0", 0, "cpu")
    wrong = copy.copy(job)
    wrong.labels = job.labels.clone()
    wrong.labels[split.test] = (wrong.labels[split.test] + 1) % 3
    other = fit_part(wrong, split, settings, tmp_path / "part-1", 0, "cpu")
    assert other.predictions == part.predictions and other.rate == part.rate and other.accuracy < part.accuracy
    losses = [tried["loss"] for tried in part.tried]
    assert settings.rates[losses.index(min(losses))] == part.rate
    by_accuracy = replace(settings, choose_by="accuracy")
    found = fit_part(job, split, by_accuracy, tmp_path / "part-2", 0, "cpu")
    assert max(t["accuracy"] for t in found.tried) == found.accuracies[found.best_epoch] == max(found.accuracies)


def test_statistics_are_those_of_training_alone():
    cache = made_up()
    cache.features[:, 0] += torch.arange(60)[:, None]
    job, split = job_and_split(QUICK, cache)
    model = untrained(job, split, 0, "cpu")
    close(model.standardize.mean[0, 0], cache.features[split.train, 0].mean(), "mean")
    assert abs(model.standardize.mean[0, 0] - cache.features[:, 0].mean()) > 0.01


@pytest.mark.slow
def test_class_weights(tmp_path):
    """Check the weights, that the loss and validation have them, and that a rare class gains by them."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.tensor([0] * 270 + [1] * 30)
    features = torch.randn(300, 2, 8, generator=generator)
    features[labels == 1] += 0.8
    cache = Cache(features, labels, ["often", "rare", "never"], {})
    settings = replace(QUICK, method="last", class_weights=True, rates=(1e-2,), epochs=30)
    job, split = job_and_split(settings, cache)
    counts = labels[split.train].bincount(minlength=3)
    weights = class_weights(job, split, settings)
    close(weights[:2], len(split.train) / (2 * counts[:2]), "weights")
    assert class_weights(job, split, replace(settings, class_weights=False)) is None
    scores = torch.randn(6, 3, generator=generator)
    target = torch.tensor([0, 1, 0, 0, 1, 0])
    work = Work(job, split, replace(settings, loss="focal"), "cpu", weights)
    focal = torch.stack([daam.focal_loss(scores[i : i + 1], target[i : i + 1]) for i in range(6)])
    expected = (focal * weights[target]).sum() / weights[target].sum()
    close(fitting.loss_of(scores, target, work), expected, "focal loss")
    found = {}
    for on in (False, True):
        results = training.run(cached_job(cache, s := replace(settings, class_weights=on)), s, tmp_path / str(on))
        found[on] = results["balanced_accuracy"]["mean"]
    assert found[True] > found[False] + 0.02
    s = replace(settings, method="logistic_last")
    assert training.run(cached_job(cache, s), s, tmp_path / "logistic")["balanced_accuracy"]["mean"] > found[False]


@pytest.fixture
def options(monkeypatch):
    """Return the settings that options of the command line give."""

    def parse(*arguments):
        parser = train.Parser()
        train.add_settings(parser)
        return train.settings_from(parser.parse_args(["cache", "--output", "out", *arguments]), "daam")

    return parse


def test_options(options):
    assert options() == Settings("daam")
    assert options("--paper") == Settings("daam", **PAPER)
    assert options("--paper", "--rate", "1e-3", "--standardize") == Settings(
        "daam", **PAPER | {"rates": (1e-3,), "standardize": True}
    )
    assert options("--rate", "1e-3", "1e-2", "1e-3").rates == (1e-3, 1e-2)
    assert options("--no-standardize").standardize is False and options("--class-weights").class_weights
    assert options("--layers", "4-6", "1").layers == (0, 3, 4, 5)
    assert options("--conv-channels", "512", "--choose-by", "accuracy") == Settings(
        "daam", conv_channels=512, choose_by="accuracy"
    )


@pytest.mark.parametrize("text", ["6-4", "a", "-1", "1-", "1-b", "-"])
def test_layers_that_are_none(text, capsys):
    parser = train.Parser()
    train.add_settings(parser)
    with pytest.raises(SystemExit):
        parser.parse_args(["cache", "--output", "out", f"--layers={text}"])
    assert f"{text!r}, expected a layer from 1 on or a range like 4-6" in capsys.readouterr().err


def test_the_papers_settings_are_said_to_be_that(tmp_path):
    settings = Settings("linear", folds=2, **PAPER | {"epochs": 1})
    training.run(cached_job(made_up(), settings), settings, tmp_path)
    results = json.loads((tmp_path / "results.json").read_text())
    assert "of the paper" not in compare.table([results])
    results["settings"]["epochs"] = 35
    assert "Settings: of the paper; rates 0.0001, at most 35 epochs" in compare.table([results])


@pytest.mark.slow
def test_layers_of_a_comparison(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(compare, "read_cache", lambda path: made_up())
    common = ["cache", "--folds", "2", "--epochs", "1", "--rate", "1e-2", "--output", str(tmp_path)]
    compare.main([*common, "--layers", "2-3", "6", "--methods", "last", "linear", "logistic_last"])
    rows = json.loads((tmp_path / "comparison.json").read_text())
    assert [row["trainable_parameters"] for row in rows] == [3 * 16 + 3, 3 * 3 * 16 + 3, 3 * 16 + 3]
    with pytest.raises(SystemExit):
        compare.main([*common, "--layers", "5-7"])
    assert "--layers names layer 7, the cache has 1, 2, 3, 4, 5, 6" in capsys.readouterr().err


def test_layers_are_those_of_the_encoder(tmp_path):
    """Check that of a cache of some layers, the embeddings among them, each is named as the encoder has it."""
    cache = replace(made_up(), about={"layer_numbers": [0, 3, 4, 7, 8, 9]})
    assert train.layer_places([range(2, 4), range(-1, 0)], cache) == [[0, 1, 2]]
    assert train.layer_places([range(-1, 0), range(2, 4), range(6, 9)], cache) == [] == train.layer_places([], cache)
    with pytest.raises(RunError, match="--layers names layer 1, the cache has 0, 3, 4, 7, 8, 9"):
        train.layer_places([range(0, 3)], cache)


def test_rows_are_printed_as_methods_finish(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(compare, "read_cache", lambda path: made_up())
    printed, original = [], compare.train

    def spied(*arguments):
        printed.append(capsys.readouterr().out)
        return original(*arguments)

    monkeypatch.setattr(compare, "train", spied)
    arguments = ["cache", "--folds", "3", "--epochs", "2", "--output", str(tmp_path), "--methods", "last", "logistic"]
    compare.main(arguments)
    assert "| method | test accuracy |" in printed[0] and "| last |" not in printed[0]
    assert "| last | " in printed[1] and "| logistic | " in capsys.readouterr().out
    text, table = (tmp_path / "table.md").read_text(), (tmp_path / "table.csv").read_text().splitlines()
    assert "| the best |" in text and ("| no (p " in text or "| yes (p " in text)
    assert "saying the most frequent class gives 0.3" in text
    assert table[0].startswith("method,accuracy,accuracy std,balanced accuracy,macro F1,p of") and len(table) == 3
    for name in ("predictions.csv", "classes.csv", "confusion.csv", "confusion.png"):
        assert (tmp_path / "last" / name).stat().st_size
    assert len((tmp_path / "last" / "predictions.csv").read_text().splitlines()) == 61, "every example is tested once"


@pytest.mark.parametrize(("name", "line"), [
    ("groups", "2 of 60 examples equal an earlier one, and are in one part with it, with all of both groups"),
    ("parts", "2 of 60 examples equal an earlier one, 1 of them in another part of the data than it: parts stay as they"
     " are named"),
])  # fmt: skip
def test_groups_and_parts_of_the_data(name, line, tmp_path, monkeypatch, capsys):
    """Check that commands train on groups and parts that a cache has, and say what becomes of equal examples."""
    cache = made_up()
    cache.features[[31, 50]] = cache.features[[1, 20]]
    cache.labels[[31, 50]] = cache.labels[[1, 20]]
    values = torch.arange(60) % 6 if name == "groups" else torch.tensor([0] * 40 + [2] * 20)
    monkeypatch.setattr(train, "read_cache", lambda path: replace(cache, **{name: values}))
    arguments = ["cache", "--method", "last", "--epochs", "1", "--rate", "1e-2", "--output"]
    train.main([*arguments, str(tmp_path / "run")])
    assert line in capsys.readouterr().out.splitlines()
    parts = json.loads((tmp_path / "run" / "results.json").read_text())["parts"]
    if name == "groups":
        assert len(parts) == 5
        for part in parts:
            assert not set(values[part["test"]].tolist()) & set(values[part["validation"]].tolist())
    else:
        assert [part["test"] for part in parts] == [list(range(40, 60))] * 3
        results = json.loads((tmp_path / "run" / "results.json").read_text())
        text = compare.table([results, {**results, "accuracy": {"mean": 0.0, "std": 0.0}}])
        assert "| unknown |" in text and "3 repetitions, on the same test examples" in text, "no p value of one test"
        with pytest.raises(SystemExit):
            train.main([*arguments, str(tmp_path / "folds"), "--folds", "2"])
        assert "--folds is 2, but the data names the parts of its examples: take --seeds" in capsys.readouterr().err


def test_lora_sees_no_cached_layers(tmp_path, monkeypatch):
    arguments = ["cache", "--output", str(tmp_path / "out"), "--layers", "1", "--data", "texts.csv", "--encoder", "e"]
    parser = train.Parser()
    train.add_settings(parser)
    with pytest.raises(RunError, match="--layers chooses among cached features, expected none for --method lora"):
        train.check_methods(parser.parse_args(arguments), ["lora"], made_up())
