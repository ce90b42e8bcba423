"""Explanation of trained decoders: maps beside untrained ones, dropped layers, rank correlations, what is printed."""

import itertools
import json
import math
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")
pytest.importorskip("safetensors")

from helpers import close

import daam
from daam.recipes import evidence, explain, plots, training
from daam.recipes.cache import Cache
from daam.recipes.methods import decoder_for
from daam.recipes.runs import PAPER, Settings
from daam.recipes.training import cached_job

LAYERS, FEATURES = 6, 16
QUICK = Settings("daam", epochs=3, folds=2, rates=(3e-3,), stop_after=15)


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def cache():
    """Return a cache of three classes that only the third layer tells apart, by five features each."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(60) % 3
    features = torch.randn(60, LAYERS, FEATURES, generator=generator)
    features[:, 2, :15] += 6 * torch.eye(3)[labels].repeat_interleave(5, 1)
    return Cache(features, labels, ["a", "b", "c"], {"encoder": "made up", "source": "nowhere"})


@pytest.fixture
def command(cache, monkeypatch):
    """Explain a run on the cache of this file, and return the report."""
    monkeypatch.setattr(explain, "read_cache", lambda path: cache)

    def run(folder, output, *arguments):
        explain.main([*map(str, (folder, "cache", "--output", output, *arguments))])
        return json.loads((output / "importance.json").read_text())

    return run


@pytest.fixture
def refused(command, capsys):
    """Explain a run that ends with one line of error, and return the line."""

    def run(*arguments):
        capsys.readouterr()  # of what trained before
        with pytest.raises(SystemExit) as stopped:
            command(*arguments)
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


@pytest.fixture(autouse=True)
def figures(monkeypatch):
    """Return the figures that are saved, by the names of their files, which are empty: to draw them takes a second."""
    found = {}

    def keep(self, path, dpi):
        found[path.name] = self
        path.touch()

    monkeypatch.setattr(plots.Figure, "savefig", keep)
    monkeypatch.setattr(training, "plot_curves", lambda *arguments: None)  # another file's
    monkeypatch.setattr(training, "plot_confusion", lambda *arguments: None)
    return found


def files_of(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def drawn_anew(settings, cache, part, seed):
    """Return the decoder of a part before training: drawn, and standardised by the examples that train."""
    torch.manual_seed(seed)
    decoder = cached_job(cache, settings).build().eval()
    decoder.standardize.fit(cache.features[trains_in(part)])
    return decoder


def trains_in(part):
    """Return which of the 60 examples neither validate nor test, (60,)."""
    trains = torch.ones(60, dtype=torch.bool)
    trains[part["validation"] + part["test"]] = False
    return trains


def mean_map(decoders, features, parts):
    maps = [
        decoder(features[part["validation"]], return_weights=True)[1].detach()
        for decoder, part in zip(decoders, parts, strict=True)
    ]
    return torch.cat(maps).mean(0)


def ranks(values):
    """Return the ranks of values that all differ."""
    return values.flatten().argsort().argsort().double()


@pytest.mark.parametrize("method", ["daam", "mixture", "gqdaam"])
def test_explain(method, command, cache, tmp_path, capsys):
    run, out = tmp_path / "run", tmp_path / "out"
    settings = replace(QUICK, method=method, epochs=1 if method == "gqdaam" else 3)
    parts = training.run(cached_job(cache, settings), settings, run)["parts"]
    before = files_of(run)
    report = command(run, out)
    assert files_of(run) == before, "the run was changed"

    decoders = [daam.load_decoder(run / f"part-{i}.safetensors").eval() for i in range(2)]
    trained = mean_map(decoders, cache.features, parts)
    expected, importance = daam.layer_contribution(trained), daam.importance_factor(trained)
    close(torch.tensor(report["layer_contribution"]), expected, "percent")
    first = report["most_important"][0]
    assert first["importance"] == 1 and importance[first["layer"] - 1, first["feature"]] == pytest.approx(1)

    starts = [drawn_anew(settings, cache, part, i) for i, part in enumerate(parts)]
    start = mean_map(starts, cache.features, parts)
    found = report["untrained"]
    close(torch.tensor(found["layer_contribution"]), daam.layer_contribution(start), "percent, untrained")
    close(torch.tensor(found["importance_per_layer"]), daam.importance_factor(start).mean(1), "importance, untrained")
    both = torch.stack([trained.flatten(), start.flatten()]).double()
    assert report["correlation_with_untrained"] == pytest.approx(both.corrcoef()[0, 1].item())
    both = torch.stack([ranks(trained), ranks(start)])
    assert report["rank_correlation_with_untrained"] == pytest.approx(both.corrcoef()[0, 1].item(), abs=1e-4)

    assert {path.name for path in out.glob("*.png")} == {"importance.png", "gaussians.png"}
    *_, judgement, folder = capsys.readouterr().out.splitlines()
    assert judgement == report["judgement"] and folder == str(out)


def test_pictures_can_be_drawn(finished, cache, figures, tmp_path):
    results = json.loads((finished / "results.json").read_text())
    explain.explain(finished, results, cache, tmp_path)
    for name in ("importance.png", "gaussians.png"):
        figures[name].canvas.print_png(tmp_path / name)
        assert (tmp_path / name).stat().st_size > 10_000


def test_ablation(finished, command, tmp_path, capsys):
    report = command(finished, tmp_path / "out", "--ablate", 2)
    order = torch.tensor(report["layer_contribution"]).argsort(descending=True) + 1
    lines = capsys.readouterr().out.splitlines()
    for name, chosen in (("highest", order[:2]), ("lowest", order[-2:])):
        layers = sorted(chosen.tolist())
        done = json.loads((tmp_path / "out" / "ablation" / name / "results.json").read_text())
        assert done["settings"]["layers"] == [layer - 1 for layer in layers]
        assert report["ablation"][name] == {"layers": layers, "accuracy": done["accuracy"]}
        assert any(line.startswith(f"{name} layers {layers}: test accuracy 0.") for line in lines)


@pytest.mark.parametrize("standardize", [True, False])
@pytest.mark.parametrize("class_weights", [True, False])
def test_dropped_layers(standardize, class_weights, cache, tmp_path):
    """Check loss and accuracy without a layer, as training measures them, against the same by hand."""
    labels = torch.where(torch.arange(60) < 30, 0, cache.labels)  # of three classes, one is frequent
    cache = replace(cache, features=cache.features + 3, labels=labels)
    settings = replace(QUICK, standardize=standardize, class_weights=class_weights)
    results = training.run(cached_job(cache, settings), settings, tmp_path)
    fits = explain.load_fits(tmp_path, results, cache)
    increases, drops = torch.zeros(LAYERS), torch.zeros(LAYERS)
    for i, part in enumerate(results["parts"]):
        decoder = daam.load_decoder(tmp_path / f"part-{i}.safetensors").eval()
        validation, trains = torch.tensor(part["validation"]), trains_in(part)
        weight = 1 / labels[trains].bincount().float() if class_weights else torch.ones(3)

        def measure(x, decoder=decoder, y=labels[validation], weight=weight):
            with torch.no_grad():
                scores = decoder(x)
            right = (scores.argmax(1) == y).float()
            recalls = torch.stack([right[y == label].mean() for label in range(3)])
            return cross_entropy(scores, y, weight=weight), recalls.mean() if class_weights else right.mean()

        loss, accuracy = measure(cache.features[validation])
        for layer in range(LAYERS):
            x = cache.features[validation].clone()
            x[:, layer] = cache.features[trains].mean(0)[layer]
            without = measure(x)
            increases[layer] += (without[0] - loss) / 2
            drops[layer] += (accuracy - without[1]) / 2
    found = evidence.drop_layers(fits, range(1, LAYERS + 1))
    assert [entry["layer"] for entry in found] == list(range(1, LAYERS + 1))
    close(torch.tensor([entry["loss_increase"] for entry in found]), increases, "loss", (1e-4, 1e-5))
    close(torch.tensor([entry["accuracy_drop"] for entry in found]), drops, "accuracy", (0, 1e-5))
    assert increases.abs().min() > 1e-5, "no layer matters"


@pytest.fixture(scope="module")
def known(cache, tmp_path_factory):
    """Return the folder of a run that learned the classes, from the third layer, since only that one has them."""
    folder = tmp_path_factory.mktemp("known")
    settings = replace(QUICK, epochs=8)
    training.run(cached_job(cache, settings), settings, folder)
    return folder


def test_what_is_known_of_layers(known, command, tmp_path, capsys):
    """Check that dropping the only layer that tells classes apart costs most, and that a weighted sum takes it."""
    report = command(known, tmp_path / "out")
    losses = [entry["loss_increase"] for entry in report["dropped"]]
    drops = [entry["accuracy_drop"] for entry in report["dropped"]]
    weights = report["weighted_sum"]["layer_weights"]
    assert np.argmax(losses) == np.argmax(drops) == np.argmax(weights) == 2
    assert drops[2] > 0.4 and losses[2] > 5 * max(losses[:2] + losses[3:])
    assert sum(weights) == pytest.approx(1) and weights[2] > 1 / LAYERS
    done = json.loads((tmp_path / "out" / "weighted_sum" / "results.json").read_text())
    run = json.loads((known / "results.json").read_text())
    assert done["accuracy"] == report["weighted_sum"]["accuracy"]
    assert done["settings"] == {**run["settings"], "method": "weighted_sum"}
    assert [part["test"] for part in done["parts"]] == [part["test"] for part in run["parts"]], "other parts"

    lines = capsys.readouterr().out.splitlines()
    row = lines[4].split()
    assert row == ["3", f"{report['layer_contribution'][2]:.1f}", f"{report['untrained']['layer_contribution'][2]:.1f}",
                   f"{losses[2]:+.4f}", f"{-drops[2]:+.4f}", f"{weights[2]:.3f}"]  # fmt: skip
    measures = {"layer_contribution": report["layer_contribution"], "loss_increase": losses, "weighted_sum": weights,
                "untrained_contribution": report["untrained"]["layer_contribution"]}  # fmt: skip
    pairs = [("layer_contribution", "loss_increase"), ("layer_contribution", "weighted_sum"),
             ("loss_increase", "weighted_sum"), ("layer_contribution", "untrained_contribution")]  # fmt: skip
    assert [tuple(entry["between"]) for entry in report["rank_correlations"]] == pairs
    for entry, line in zip(report["rank_correlations"], lines[10:14], strict=True):
        first, second = (ranks(torch.tensor(measures[name])) for name in entry["between"])
        rho = 1 - 6 * (first - second).square().sum().item() / (LAYERS**3 - LAYERS)
        assert entry["rho"] == pytest.approx(rho) and -1 < entry["low"] <= rho <= entry["high"] <= 1
        assert line.endswith(f"{rho:6.2f}   {entry['low']:.2f} to {entry['high']:.2f}")


def test_the_map_is_that_of_an_untrained_decoder(command, cache, figures, tmp_path, capsys):
    """Check that a map that owes nothing to training is told in a sentence and drawn beside its difference to the map
    before training: with the paper's settings the two correlate by 0.97 and more.
    """
    settings = Settings("daam", folds=2, **{**PAPER, "epochs": 2})
    training.run(cached_job(cache, settings), settings, tmp_path / "run")
    report = command(tmp_path / "run", tmp_path / "out")
    assert report["correlation_with_untrained"] > 0.967
    told = f"is that of an untrained one (correlation {report['correlation_with_untrained']:.2f}): it shows the archi"
    assert told in report["judgement"] and report["judgement"] in capsys.readouterr().out.splitlines()

    images = [axes.images[0] for axes in figures["importance.png"].axes[:3]]
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    fits = explain.load_fits(tmp_path / "run", results, cache)
    trained, start = (
        evidence.average_weights((getattr(fit, name), fit.work) for fit in fits).mean()
        for name in ("trained", "untrained")
    )
    difference = (trained - start) / (trained.max() - trained.min())
    expected = (daam.importance_factor(trained), daam.importance_factor(start), difference)
    for image, values in zip(images, expected, strict=True):
        close(torch.as_tensor(image.get_array().data), values, "map")
    assert [image.get_clim() for image in images[:2]] == [(0, 1)] * 2, "different scales"
    low, high = images[2].get_clim()
    assert -low == high == pytest.approx(difference.abs().max().item()) and high > 0
    bars = [bar.get_width() for bar in figures["importance.png"].axes[3].patches]
    assert bars == pytest.approx(report["layer_contribution"] + report["untrained"]["layer_contribution"])


@pytest.mark.parametrize("method", ["daam", "mixture"])
def test_gaussians_are_drawn_beside_their_start(method, cache, figures, tmp_path):
    settings = replace(QUICK, method=method, epochs=1)
    results = training.run(cached_job(cache, settings), settings, tmp_path)
    explain.explain(tmp_path, results, cache, tmp_path)
    curves, offsets, _ = figures["gaussians.png"].axes
    drawn = [line for line in curves.lines if len(line.get_xdata())]  # learned, start, learned, …
    dashed = drawn[1::2]
    start = drawn_anew(settings, cache, results["parts"][0], 0)
    z, (offset, c) = torch.linspace(-4, 4, 161), explain.gaussians(start).values()
    for learned, line, mean_offset, scale in zip(drawn[::2], dashed, offset, c, strict=True):
        gates = (-(z[:, None] - mean_offset).square() / (2 * scale)).exp().mean(1)
        close(torch.tensor(line.get_ydata()).float(), gates, "start", (1e-4, 1e-5))
        assert line.get_linestyle() == "--" and line.get_linewidth() < learned.get_linewidth()
        assert np.abs(line.get_ydata() - learned.get_ydata()).max() > 1e-6, "nothing was learned"
    assert len(dashed) == 2 and offsets.get_xticks().tolist() == [1, 2]
    assert {text.get_text() for text in offsets.get_legend().get_texts()} == {"learned", "before training"}


def test_the_place_within_the_head_explains_an_untrained_decoder():
    """Check that with heads of three layers, apart by the same step, the middle one contributes most whatever the data
    are, and that the place within the head explains all of that ranking.
    """
    decoder = daam.DATDecoder(LAYERS, FEATURES, 3, num_heads=2, conv_channels=4)
    start, step = torch.randn(2, 1, 1, FEATURES, dtype=torch.float64).mul(8).round()
    x = start + step * torch.tensor([-1, 0, 1, -1, 0, 1])[:, None]
    weights = decoder(x.float(), return_weights=True)[1].detach()[0]
    contribution = daam.layer_contribution(weights)
    assert contribution.argsort(descending=True)[:2].sort().values.tolist() == [1, 4]
    contribution = contribution.double().mul(1e4).round().tolist()  # ties are ties, whatever the order of sums
    assert evidence.explain_ranks(contribution, 2) == {"explained": pytest.approx(1), "by_chance": 0.4}
    assert evidence.explain_ranks([1, 2, 3, 4, 5, 6], 2)["explained"] == pytest.approx(8 / 35)


def test_what_place_explains_by_chance():
    found = [evidence.explain_ranks(order, 2) for order in itertools.permutations([1, 2, 3, 5, 8, 9])]
    average = sum(entry["explained"] for entry in found) / len(found)
    assert all(entry["by_chance"] == pytest.approx(average) for entry in found)


@pytest.mark.parametrize(
    ("contribution", "heads"), [([1, 2, 3, 4], 1), ([2, 2, 2, 2], 2), ([1, 2, 3, 4], 4)], ids=["head", "equal", "layer"]
)
def test_nothing_to_tell_of_places(contribution, heads):
    assert evidence.explain_ranks(contribution, heads) is None


def test_one_head_is_told(command, cache, tmp_path, capsys):
    settings = replace(QUICK, method="daamv2", epochs=1)
    training.run(cached_job(cache, settings), settings, tmp_path / "run")
    assert command(tmp_path / "run", tmp_path / "out")["place_in_head"] is None
    assert "explains is unknown: with one head, it is the layer itself" in capsys.readouterr().out


def test_interval_of_a_rank_correlation():
    """Compare with values by hand: rho is 1 - 6·6/210, z is ln(64/6)/2, its standard error sqrt(1.34327/3)."""
    found = evidence.rank_correlation([1, 2, 3, 4, 5, 6], [20, 10, 40, 30, 60, 50])
    assert [*found.values()] == pytest.approx([0.828571, -0.127245, 0.986490], abs=2e-5)
    opposite = evidence.rank_correlation([1, 2, 3, 4, 5, 6], [-20, -10, -40, -30, -60, -50])
    assert [opposite["rho"], opposite["high"], opposite["low"]] == pytest.approx([-value for value in found.values()])
    # no interval has no width: that of 1 is the one of a neighbouring pair the other way, rho 1 - 12/210, up to 1
    z = math.atanh(198 / 210) - 1.959964 * math.sqrt((1 + (198 / 210) ** 2 / 2) / 3)
    perfect = evidence.rank_correlation(range(6), range(6))
    assert perfect == {"rho": pytest.approx(1), "low": pytest.approx(math.tanh(z), abs=1e-5), "high": pytest.approx(1)}
    assert evidence.rank_correlation([1, 2, 3], [1, 2, 3]) == {"rho": pytest.approx(1), "low": None, "high": None}
    assert set(evidence.rank_correlation([1, 1, 1, 1], [1, 2, 3, 4]).values()) == {None}


def report_with(correlation, rho, low, high):
    between = ["layer_contribution", "loss_increase"]
    entry = {"between": between, "rho": rho, "low": low, "high": high}
    return {"correlation_with_untrained": correlation, "layers": [1, 2, 3, 4, 5, 6], "rank_correlations": [entry]}


@pytest.mark.parametrize(
    ("numbers", "sentence"),
    [
        ((0.97, 0.9, 0.5, 1.0), "is that of an untrained one (correlation 0.97)"),
        ((None, 0.9, 0.5, 1.0), "it shows nothing"),
        ((0.4, 0.9, 0.5, 1.0), "contribute more cost more when they are dropped (rank correlation 0.90, 0.50 to 1.00)"),
        ((0.4, -0.9, -1.0, -0.5), "contribute more cost less when they are dropped"),
        ((0.4, 0.3, -0.5, 0.8), "6 layers do not tell whether those that contribute more cost more when dropped"),
        ((-0.95, 1.0, None, None), "too few layers to tell"),
    ],
)
def test_judgement(numbers, sentence):
    judgement = evidence.judge(report_with(*numbers))
    assert sentence in judgement and judgement.endswith(".") and judgement.count(". ") == 0


def test_two_layers_are_explained(command, cache, tmp_path):
    """Check that what two layers cannot tell is null, and no NaN."""
    settings = replace(QUICK, layers=(1, 2), epochs=1)
    training.run(cached_job(cache, settings), settings, tmp_path / "run")
    report = command(tmp_path / "run", tmp_path / "out")
    assert "NaN" not in (tmp_path / "out" / "importance.json").read_text()
    assert all(entry["low"] is None for entry in report["rank_correlations"])


def test_the_backend_of_a_run_does_not_matter(finished, cache, tmp_path):
    """Check that decoders are explained on the CPU also inside a block that asks for kernels, as the demo has it."""
    results = json.loads((finished / "results.json").read_text())
    with daam.use_backend("triton"):
        fits = explain.load_fits(finished, results, cache)
        explain.draw(fits, results, tmp_path)
        evidence.drop_layers(fits, range(LAYERS))


def test_layers_keep_their_numbers(command, cache, tmp_path, capsys):
    settings = replace(QUICK, layers=(1, 2, 4))
    training.run(cached_job(cache, settings), settings, tmp_path / "run")
    report = command(tmp_path / "run", tmp_path)
    assert report["layers"] == [2, 3, 5] and {entry["layer"] for entry in report["most_important"]} <= {2, 3, 5}
    assert [entry["layer"] for entry in report["dropped"]] == [2, 3, 5]
    assert "too few layers, expected 4" in capsys.readouterr().out


@pytest.mark.parametrize("count", [1, 4])
def test_ablations_that_do_not_fit(count, refused, finished, tmp_path):
    line = refused(finished, tmp_path / "out", "--ablate", count)
    assert f"--ablate is {count}, expected 2 to 3, half of the 6 layers" in line


def test_what_cannot_be_explained(refused, tmp_path, cache):
    assert "finish the run" in refused(tmp_path, tmp_path)
    (tmp_path / "results.json").write_text("{}")
    assert "holds no results" in refused(tmp_path, tmp_path)
    (tmp_path / "results.json").unlink()
    settings = replace(QUICK, method="linear", epochs=1)
    training.run(cached_job(cache, settings), settings, tmp_path)
    assert "'linear', which has no densities" in refused(tmp_path, tmp_path)
    changed = replace(cache, features=cache.features + 1)
    settings = replace(QUICK, epochs=1)
    training.run(cached_job(changed, settings), settings, tmp_path / "other")
    assert "was trained on another cache" in refused(tmp_path / "other", tmp_path / "other")


@pytest.mark.parametrize(
    "change",
    [
        "",
        "{",
        "[1]",
        '"text"',
        *({"drop": key} for key in ("accuracy", "settings", "examples", "parts", "about", "memory")),
        {"settings": {}},
        {"settings": {"method": "daam", "nonsense": 1}},
        {"parts": []},
        {"parts": [{}, {"nonsense": 1}]},
        {"parts": "none"},
        {"method": ["daam"]},
        {"about": None},
    ],
    ids=str,
)
def test_results_that_are_broken(change, finished, refused, tmp_path):
    shutil.copytree(finished, tmp_path / "run")
    path = tmp_path / "run" / "results.json"
    data = json.loads(path.read_text())
    if isinstance(change, dict):
        data.pop(change.get("drop"), None)
        change = json.dumps({**data, **{key: value for key, value in change.items() if key != "drop"}})
    path.write_text(change)
    line = refused(tmp_path / "run", tmp_path / "out")
    assert str(path) in line and ("is broken" in line or "holds no results" in line)
    assert not (tmp_path / "out").exists()


def test_results_of_other_splits(finished, refused, tmp_path):
    shutil.copytree(finished, tmp_path / "run")
    path = tmp_path / "run" / "results.json"
    data = json.loads(path.read_text())
    data["parts"].reverse()
    path.write_text(json.dumps(data))
    assert "is of other splits of the examples" in refused(tmp_path / "run", tmp_path / "out")


@pytest.mark.parametrize("content", ["missing", "broken", "of other sizes", "of another method"])
def test_decoders_that_are_broken(content, finished, refused, tmp_path):
    shutil.copytree(finished, tmp_path / "run")
    path = tmp_path / "run" / "part-1.safetensors"
    path.unlink()
    if content == "broken":
        path.write_text("{}")
    elif content != "missing":
        method, layers = ("mha", LAYERS) if content == "of another method" else ("daam", LAYERS + 1)
        daam.save_decoder(decoder_for(method, layers, FEATURES, 3), path)
    assert str(path) in refused(tmp_path / "run", tmp_path / "out")


def test_a_weighted_sum_that_is_broken_is_trained_again(finished, command, tmp_path):
    command(finished, tmp_path / "out")
    path, report = tmp_path / "out" / "weighted_sum" / "part-0.safetensors", tmp_path / "out" / "importance.json"
    whole, expected = path.read_bytes(), report.read_bytes()
    path.write_text("{}")
    command(finished, tmp_path / "out")
    assert path.read_bytes() == whole and report.read_bytes() == expected
