"""Prediction and evaluation with finished runs: the probabilities of training, wherever run and encoder lie by then."""

import csv
import importlib.util
import json
import os
import shutil
import sys
import types
import weakref
from pathlib import Path

import pytest
import torch

os.environ["HF_HUB_OFFLINE"] = "1"  # read when transformers is imported: nothing here downloads
pytest.importorskip("transformers")
pytest.importorskip("peft")
pytest.importorskip("safetensors")
pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")
pytest.importorskip("PIL")

import transformers
from helpers import close
from PIL import Image
from safetensors.torch import load_file, save_file
from sklearn.metrics import accuracy_score, balanced_accuracy_score, f1_score

import daam
from daam.recipes import errors, evaluate, features, predict, train
from daam.recipes.cache import read_cache
from daam.recipes.examples import Example
from daam.recipes.extraction import load_encoder_of
from daam.recipes.runs import RunError
from daam.recipes.saved import load_model, read_finished

WORDS = {"food": ["bread", "soup", "cheese"], "weather": ["rain", "snow", "wind"]}
NAMES = sorted(WORDS)
ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.usefixtures("one_thread")


def write_table(path, rows):
    with path.open("w", newline="") as file:
        csv.writer(file).writerows(rows)
    return path


def read_table(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def probabilities_of(path):
    """Return the probabilities that a table holds, (examples, classes)."""
    return torch.tensor([[float(row[f"p({name})"]) for name in NAMES] for row in read_table(path)])


class Made:
    """Hold folders of an encoder, its cache of data, and of runs that are trained when they are asked for."""

    def __init__(self, folder):
        self.folder, self.data, self.encoder = folder, folder / "texts.csv", folder / "encoder"
        self.cache, self.runs = folder / "cache", {}

    def run(self, method, *options):
        """Return the folder of a run of a method."""
        key = "-".join([method, *options]).replace("-", "_")
        if key not in self.runs:
            self.runs[key] = self.folder / "runs" / key
            arguments = ["--method", method, "--output", self.runs[key], "--folds", 2, "--epochs", 6, "--rate", 1e-2,
                         "--batch", 8, "--conv-channels", 4, *options]  # fmt: skip
            if method.startswith("lora"):
                arguments += ["--data", self.data, "--encoder", self.encoder]
            train.main([*map(str, [self.cache, *arguments])])
        return self.runs[key]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Make a tiny random BERT and a cache of 24 texts, of lengths that need padding; runs draw no pictures."""
    made = Made(tmp_path_factory.mktemp("made"))
    rows = [["text", "label"]]
    for i in range(24):
        label = NAMES[i % 2]
        words = ["the", WORDS[label][i % 3], *["and", WORDS[label][(i + 1) % 3]] * (1 + i % 4)]
        rows.append([" ".join(words), label])
    write_table(made.data, rows)
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "and", *WORDS["weather"], *WORDS["food"]]
    made.encoder.mkdir()
    (made.encoder / "vocab.txt").write_text("\n".join(vocabulary))
    save_encoder(made.encoder, 0)
    transformers.BertTokenizer(str(made.encoder / "vocab.txt")).save_pretrained(made.encoder)
    patch = pytest.MonkeyPatch()
    for name in ("plot_curves", "plot_confusion"):
        patch.setattr("daam.recipes.training." + name, lambda *arguments: None)
    features.main([str(made.data), "--output", str(made.cache), "--encoder", str(made.encoder), "--batch", "4"])
    yield made
    patch.undo()


def save_encoder(folder, seed):
    torch.manual_seed(seed)
    config = transformers.BertConfig(vocab_size=13, hidden_size=16, num_hidden_layers=4, num_attention_heads=2,
                                     intermediate_size=32)  # fmt: skip
    transformers.BertModel(config).save_pretrained(folder)


def command(module, run, *arguments):
    module.main([*map(str, [run, *arguments])])


@pytest.fixture
def refused(capsys):
    """Run a recipe that ends with one line of error, and return the line."""

    def run(*arguments):
        capsys.readouterr()
        with pytest.raises(SystemExit) as stopped:
            command(*arguments)
        line = capsys.readouterr().err.splitlines()[-1]
        assert stopped.value.code == 2 and line.startswith("error: ")
        return line

    return run


RUNS = [
    ("daam",), ("mha_bn",), ("daam", "--layers", "2-3"), ("linear",), ("last", "--no-standardize"), ("weighted_sum",),
    ("attentive",), ("logistic",), ("logistic_last", "--layers", "1", "4"), ("lora+",),
]  # fmt: skip


@pytest.mark.parametrize("options", RUNS, ids=" ".join)
def test_predictions_are_those_of_training(options, made, tmp_path):
    """Check probabilities of the examples that tested against those that training gave them, and their mean."""
    run = made.run(*options)
    found = []
    for part in range(2):
        command(predict, run, "--data", made.data, "--part", part, "--output", tmp_path / "out.csv")
        found.append(probabilities_of(tmp_path / "out.csv"))
    tested = read_table(run / "predictions.csv")
    expected = probabilities_of(run / "predictions.csv")
    places = [(int(row["part"]), int(row["example"])) for row in tested]
    close(torch.stack([found[part][i] for part, i in places]), expected, "of training", (1e-4, 1e-5))
    assert expected.std() > 0.02, "the model has learned something"
    assert not torch.equal(*found)

    command(predict, run, "--data", made.data, "--output", tmp_path / "out.csv")
    mean, rows = probabilities_of(tmp_path / "out.csv"), read_table(tmp_path / "out.csv")
    close(mean, sum(found) / 2, "mean", (1e-6, 1e-7))
    assert [row["example"] for row in rows] == [str(i) for i in range(24)]
    assert [row["prediction"] for row in rows] == [NAMES[i] for i in mean.argmax(1)]
    assert list(rows[0]) == ["example", "prediction", "p(food)", "p(weather)"]


@pytest.mark.parametrize("options", RUNS, ids=" ".join)
def test_a_saved_model_is_complete(options, made):
    """Check that each is loaded with the names of its classes, and gives what training gave; LoRA without encoder."""
    run, cache = made.run(*options), read_cache(made.cache)
    path = run / "part-1.safetensors"
    model = load_model(run, 1)
    assert model.names == NAMES and not model.training
    if options[0].startswith("lora"):
        trained = {name for name, p in model.named_parameters() if p.requires_grad and "pooler" not in name}
        assert load_file(path).keys() == trained and all("lora_" in n or "classify" in n for n in trained)
        return
    layers = read_finished(run)["settings"]["layers"] or range(4)
    rows = [row for row in read_table(run / "predictions.csv") if row["part"] == "1"]
    x = cache.features[[int(row["example"]) for row in rows]][:, list(layers)]
    expected = torch.tensor([[float(row[f"p({name})"]) for name in NAMES] for row in rows])
    close(model(x).softmax(1).detach(), expected, "probabilities", (1e-5, 1e-6))
    if isinstance(model, daam.DATDecoder):
        assert daam.load_decoder(path).names == NAMES


@pytest.mark.parametrize("method", ["daam", "lora"])
def test_moved_run_and_encoder(method, made, tmp_path, refused):
    """Check that copies of both give the same probabilities to the bit when the originals are gone."""
    start, away = tmp_path / "start", tmp_path / "away"
    start.mkdir()
    shutil.copytree(made.encoder, start / "encoder")
    shutil.copy(made.data, start / "texts.csv")
    arguments = [start / "texts.csv", "--output", start / "cache", "--encoder", start / "encoder"]
    features.main([*map(str, arguments)])
    there = Made(start)
    run = there.run(method)
    new = write_table(tmp_path / "new.csv", [["text"], *[[" ".join(["rain"] * i + ["soup"])] for i in range(40)]])
    command(predict, run, "--data", new, "--output", tmp_path / "before.csv")

    shutil.copytree(run, away / "run")
    shutil.copytree(there.encoder, away / "weights")
    shutil.rmtree(start)
    arguments = ["--data", new, "--output", tmp_path / "after.csv"]
    assert "no encoder in" in refused(predict, away / "run", *arguments)
    command(predict, away / "run", *arguments, "--encoder", away / "weights")
    assert (tmp_path / "after.csv").read_bytes() == (tmp_path / "before.csv").read_bytes()
    save_encoder(away / "weights", 1)
    assert "its encoder_sha256 is" in refused(predict, away / "run", *arguments, "--encoder", away / "weights")


def test_what_is_told(made, tmp_path, capsys):
    run = made.run("linear")
    new = write_table(tmp_path / "new.csv", [["id", "review"], ["7", "rain " * 200], ["8", "the soup"], ["9", "bread"]])
    capsys.readouterr()
    command(predict, run, "--data", new, "--text", "review", "--output", tmp_path / "new" / "predictions.csv")
    printed = capsys.readouterr().out.splitlines()
    rows = read_table(tmp_path / "new" / "predictions.csv")
    counts = {name: sum(row["prediction"] == name for row in rows) for name in NAMES}
    told = ", ".join(f"{n} {name}" for name, n in sorted(counts.items(), key=lambda item: -item[1]) if n)
    assert printed == [
        f"model     linear of {run}, mean of 2 parts", f"examples  3 of {new}",
        "          1 are longer than 128 tokens: cut off there", f"predicted {told}",
        f"table     {(tmp_path / 'new' / 'predictions.csv').resolve()}",
    ]  # fmt: skip


def test_nine_digits_are_the_numbers_themselves(made, tmp_path):
    run = made.run("daam")
    examples = [Example("rain and soup", ""), Example("the cheese", "")]
    pooling, collate = load_encoder_of(read_cache(made.cache).about)
    found = predict.predict(run, examples, pooling, collate)
    new = write_table(tmp_path / "new.csv", [["text"], *[[example.source] for example in examples]])
    command(predict, run, "--data", new, "--output", tmp_path / "out.csv")
    assert torch.equal(probabilities_of(tmp_path / "out.csv"), found) and found.dtype == torch.float32
    close(found.sum(1), torch.ones(2), "sums")


def test_features_are_not_kept(made, monkeypatch):
    """Check that those of a batch are gone when the next but one is made."""
    alive = weakref.WeakSet()
    most = 0

    def iterate(pooling, collate, examples, about, batch):
        nonlocal most
        for start in range(0, len(examples), batch):
            x = torch.randn(batch, 4, 16)
            alive.add(x)
            most = max(most, len(alive))
            yield list(range(start, start + batch)), x

    monkeypatch.setattr(predict, "iterate_features", iterate)
    found = predict.predict(made.run("linear"), [Example("x", "")] * 400, None, None, batch=4)
    assert found.shape == (400, 2) and most <= 2


def test_images_without_labels(made, tmp_path, refused):
    config = transformers.ViTConfig(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
                                    image_size=16, patch_size=8)  # fmt: skip
    torch.manual_seed(0)
    transformers.ViTModel(config).save_pretrained(tmp_path / "vit")
    transformers.ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained(tmp_path / "vit")
    for i in range(12):
        name = tmp_path / "data" / ("dark" if i % 2 else "light") / f"{i}.png"
        name.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (16, 16), (20 + i, 20, 20) if i % 2 else (220 + i, 220, 220)).save(name)
    features.main([*map(str, [tmp_path / "data", "--output", tmp_path / "cache", "--encoder", tmp_path / "vit"])])
    options = ["--method", "linear", "--folds", "2", "--rate", "1e-2", "--epochs", "10"]
    train.main([*map(str, [tmp_path / "cache", "--output", tmp_path / "run", *options])])
    (tmp_path / "new" / "below").mkdir(parents=True)
    Image.new("RGB", (30, 20), (25, 20, 20)).save(tmp_path / "new" / "below" / "a.png")
    Image.new("RGB", (20, 30), (230, 220, 220)).save(tmp_path / "new" / "b.png")
    command(predict, tmp_path / "run", "--data", tmp_path / "new", "--output", tmp_path / "out.csv")
    found = {row["example"]: row["prediction"] for row in read_table(tmp_path / "out.csv")}
    assert found == {"below/a.png": "dark", "b.png": "light"}
    line = refused(predict, made.run("linear"), "--data", tmp_path / "new", "--output", tmp_path / "out.csv")
    assert "new holds vision, expected text, as " in line


def test_evaluation(made, tmp_path, capsys):
    run = made.run("daam")
    rows = [["body", "class"], *[[f"{word} and the {word}", name] for name in NAMES for word in WORDS[name]]]
    new = write_table(tmp_path / "new.csv", [*rows, ["the rain", "food"], ["wind", "food"]])
    capsys.readouterr()
    arguments = ["--data", new, "--text", "body", "--label", "class"]
    command(evaluate, run, *arguments, "--output", tmp_path / "scores")
    printed = capsys.readouterr().out
    table = read_table(tmp_path / "scores" / "predictions.csv")
    labels, predictions = ([row[key] for row in table] for key in ("label", "prediction"))
    assert labels == ["food"] * 3 + ["weather"] * 3 + ["food"] * 2
    expected = {
        "accuracy": accuracy_score(labels, predictions),
        "balanced_accuracy": balanced_accuracy_score(labels, predictions),
        "macro_f1": f1_score(labels, predictions, average="macro"),
    }
    scores = json.loads((tmp_path / "scores" / "scores.json").read_text())
    assert scores == {"method": "daam", "examples": 8, **{name: pytest.approx(v) for name, v in expected.items()}}
    assert f"accuracy          {expected['accuracy']:.4f}" in printed and "trained on" not in printed
    confusion = read_table(tmp_path / "scores" / "confusion.csv")
    for name, row in zip(NAMES, confusion, strict=True):
        for other in NAMES:
            assert int(row[other]) == list(zip(labels, predictions, strict=True)).count((name, other))
    assert [row["examples"] for row in read_table(tmp_path / "scores" / "classes.csv")] == ["5", "3"]
    assert (tmp_path / "scores" / "confusion.png").stat().st_size > 5000
    command(predict, run, "--data", new, "--text", "body", "--output", tmp_path / "out.csv")
    assert torch.equal(
        probabilities_of(tmp_path / "out.csv"), probabilities_of(tmp_path / "scores" / "predictions.csv")
    )


def test_evaluation_of_one_class_and_of_training_data(made, tmp_path, capsys):
    one = write_table(tmp_path / "one.csv", [["text", "label"], ["rain", "weather"], ["the snow", "weather"]])
    command(evaluate, made.run("linear"), "--data", one, "--output", tmp_path / "one")
    scores = json.loads((tmp_path / "one" / "scores.json").read_text())
    assert scores["accuracy"] == scores["balanced_accuracy"]
    capsys.readouterr()
    command(evaluate, made.run("linear"), "--data", made.data, "--output", tmp_path / "same", "--part", 0)
    line = capsys.readouterr().out.splitlines()[0]
    assert (
        line == f"{made.data} is the data that {made.run('linear')} was trained on: new examples will have lower scores"
    )


def test_evaluation_of_training_data_with_groups(made, tmp_path, capsys):
    """Check that the data is known without the column of groups, which evaluation does not read."""
    rows = [[*row.values(), f"speaker {i % 6}"] for i, row in enumerate(read_table(made.data))]
    grouped = write_table(tmp_path / "grouped.csv", [["text", "label", "who"], *rows])
    cache, run = tmp_path / "cache", tmp_path / "run"
    features.main([*map(str, [grouped, "--output", cache, "--encoder", made.encoder, "--groups", "who"])])
    options = ["--method", "linear", "--folds", 2, "--epochs", 1, "--rate", 1e-2, "--output", run]
    train.main([*map(str, [cache, *options])])
    for data in (grouped, made.data):
        capsys.readouterr()
        command(evaluate, run, "--data", data, "--output", tmp_path / "same")
        assert f"{data} is the data that {run} was trained on" in capsys.readouterr().out


@pytest.mark.parametrize("method", ["daam", "lora"])
def test_layers_and_dtypes_of_a_cache(method, made, tmp_path):
    """Check predictions of a run on some layers in half precision, the embeddings among them, and other columns."""
    rows = [list(row.values()) for row in read_table(made.data)]
    data = write_table(tmp_path / "other.csv", [["body", "topic"], *rows])
    cache, run = tmp_path / "cache", tmp_path / "run"
    chosen = ["--layers", "2-4", "--embeddings", "--dtype", "bf16", "--text", "body", "--label", "topic"]
    features.main([*map(str, [data, "--output", cache, "--encoder", made.encoder, *chosen])])
    options = ["--folds", 2, "--epochs", 2, "--rate", 1e-2, "--conv-channels", 4, "--output", run]
    options += ["--data", data, "--encoder", made.encoder] if method == "lora" else ["--layers", "0", "3-4"]
    train.main([*map(str, [cache, "--method", method, *options])])
    command(predict, run, "--data", data, "--part", 1, "--output", tmp_path / "out.csv")
    found, tested = probabilities_of(tmp_path / "out.csv"), read_table(run / "predictions.csv")
    places = [int(row["example"]) for row in tested if row["part"] == "1"]
    expected = probabilities_of(run / "predictions.csv")[[row["part"] == "1" for row in tested]]
    # features on either side of a rounding to bf16 are 2^-8 apart
    close(found[places], expected, "probabilities", (2e-3, 2e-3))
    if method == "daam":
        assert read_finished(run)["settings"]["layers"] == [0, 2, 3]


def test_evaluation_is_refused(made, tmp_path, refused):
    run = made.run("linear")
    new = write_table(tmp_path / "new.csv", [["text", "label"], ["rain", "weather"], ["a car", "traffic"]])
    line = refused(evaluate, run, "--data", new, "--output", tmp_path / "scores")
    assert "label 'traffic' of example 1 ('a car') is not among the classes: food, weather" in line
    assert not (tmp_path / "scores").exists()
    before = (run / "predictions.csv").read_bytes()
    for folder, reason in ((run, "is a run, expected another"), (made.cache, "is a cache"), (new, "is a file")):
        assert reason in refused(evaluate, run, "--data", made.data, "--output", folder)
    assert (run / "predictions.csv").read_bytes() == before


def test_prediction_is_refused(made, tmp_path, refused):
    run, new = made.run("linear"), write_table(tmp_path / "new.csv", [["text"], ["rain"]])
    for output, reason in ((run / "predictions.csv", "in the folder of the run"), (new, "is the data"),
                           (tmp_path, "is a folder, expected a file")):  # fmt: skip
        assert reason in refused(predict, run, "--data", new, "--output", output)
    assert new.read_text() == "text\nrain\n"
    rest = ["--data", new, "--output", tmp_path / "out.csv"]
    assert f"--part is 2, expected 0 to 1, those of {run}" in refused(predict, run, *rest, "--part", 2)
    assert "--part is -1, expected 0 to 1" in refused(predict, run, *rest, "--part", -1)
    assert "results.json does not exist: expected the folder of a run that" in refused(predict, tmp_path, *rest)
    assert not (tmp_path / "out.csv").exists()


def test_broken_runs(made, tmp_path):
    run, other = tmp_path / "run", made.run("linear")
    shutil.copytree(other, run)
    path, results = run / "part-1.safetensors", json.loads((run / "results.json").read_text())
    tensors, settings = load_file(path), {"method": "linear", "layers": 4, "features": 16, "classes": 2,
                                          "standardize": True, "names": NAMES}  # fmt: skip

    def replaced(tensors, **changes):
        save_file(tensors, path, metadata={"settings": json.dumps({**settings, **changes})})

    replaced(tensors)
    assert load_model(run, 1).names == NAMES
    broken = [
        (lambda: replaced(tensors, names=["a", "b"]), r"of another run: its names are \['a', 'b'\], expected \['food"),
        (lambda: replaced(tensors, layers=3), "of another run: its layers are 3, expected 4"),
        (lambda: replaced(tensors, classes=3), r"cannot be read \(RuntimeError\)"),
        (lambda: replaced(tensors, classes="2"), r"cannot be built \("),
        (lambda: replaced(tensors, classes=2.0, depth=1), r"cannot be built \("),
        (lambda: replaced({k: t for k, t in tensors.items() if "bias" not in k}), r"it differs by classify.bias"),
        (lambda: replaced({**tensors, "more": torch.zeros(1)}), r"it differs by more"),
        (lambda: save_file(tensors, path, metadata={"settings": "null"}), "is of an earlier version"),
        (lambda: path.write_bytes(path.read_bytes()[:99]), r"cannot be read \(SafetensorError\)"),
        (path.unlink, r"cannot be read \(FileNotFoundError\)"),
    ]
    for breaks, reason in broken:
        breaks()
        with pytest.raises(RunError, match=reason):
            load_model(run, 1)
    results["about"].pop("cache")
    (run / "results.json").write_text(json.dumps(results))
    load_model(run, 0)  # of features of one's own
    with pytest.raises(RunError, match="do not say which encoder"):
        predict.predict(run, [Example("rain", "")], None, None, parts=[0])


def test_names_are_saved_with_a_decoder(tmp_path):
    decoder, path = daam.DATDecoder(4, 16, 3, conv_channels=4), tmp_path / "decoder.safetensors"
    daam.save_decoder(decoder, path)
    assert daam.load_decoder(path).names is None
    daam.save_decoder(decoder, path, ("b", "c", "a"))
    loaded = daam.load_decoder(path)
    assert loaded.names == ["b", "c", "a"]
    daam.save_decoder(loaded, tmp_path / "again.safetensors")
    assert (tmp_path / "again.safetensors").read_bytes() == path.read_bytes()
    with pytest.raises(ValueError, match="names has 2 names, expected one for each of the decoder's 3 classes"):
        daam.save_decoder(decoder, path, ["a", "b"])
    # as earlier versions wrote it
    save_file(decoder.state_dict(), path, metadata={"settings": json.dumps(decoder.settings)})
    x = torch.randn(2, 4, 16)
    old = daam.load_decoder(path)
    assert old.names is None and torch.equal(old.eval()(x), decoder.eval()(x))
    daam.save_decoder(torch.nn.Linear(2, 2), path, ["a", "b"])
    with pytest.raises(ValueError, match="holds no settings of a DATDecoder"):
        daam.load_decoder(path)


def test_scripts(monkeypatch):
    """Check that each names a function, and that help names the command as it is run."""
    tomllib = pytest.importorskip("tomllib")
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    assert scripts.keys() == {f"daam-{n}" for n in ("features", "train", "compare", "explain", "predict", "evaluate")}
    for name, target in scripts.items():
        module, _, function = target.partition(":")
        assert module == name.replace("daam-", "daam.recipes.")
        assert callable(getattr(importlib.import_module(module), function))
    main = types.ModuleType("__main__")
    monkeypatch.setitem(sys.modules, "__main__", main)
    monkeypatch.setattr(sys, "argv", ["/usr/local/bin/daam-predict"])
    assert errors.Parser().prog == "daam-predict"
    main.__spec__ = importlib.util.spec_from_loader("daam.recipes.predict", None)
    assert errors.Parser().prog == "python -m daam.recipes.predict"
    main.__spec__ = importlib.util.spec_from_loader("bench.examples.__main__", None)
    assert errors.Parser().prog == "python -m bench.examples"
    assert errors.Parser(prog="mine").prog == "mine"
