"""The demo runs end to end, and its figures are what they say; importing a recipe changes nothing."""

import contextlib
import io
import json
import subprocess
import sys

import pytest
import torch

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")
pytest.importorskip("safetensors")

from helpers import close

import daam
from daam.recipes import digits, features, logistic, training
from daam.recipes.cache import Cache
from daam.recipes.data import Example
from daam.recipes.lock import exclusive
from daam.recipes.runs import Settings


@pytest.mark.slow
def test_digits(tmp_path, capsys, monkeypatch):
    out = tmp_path / "out"
    monkeypatch.setattr(digits, "RATES", (1e-3,))
    monkeypatch.setattr(logistic, "STRENGTHS", (1e-3,))
    arguments = ["--output", str(out), "--seeds", "2", "--epochs", "1", "--encoder-epochs", "1", "--backend", "eager"]
    threads = torch.get_num_threads()
    try:
        digits.main(arguments)
        digits.main(arguments)  # over what is there
    finally:
        torch.set_num_threads(threads)
    printed = capsys.readouterr().out
    names = {"comparison.json", "comparison.png", "gaussians.png", "importance.json", "importance.png", "table.csv"}
    names |= {"table.md"}
    assert {path.name for path in out.iterdir()} == names | {"digits-runs"}
    rows = json.loads((out / "comparison.json").read_text())
    assert [row["method"] for row in rows] == list(digits.METHODS)
    for row in rows:
        about = row["about"]
        assert about["backend"] == "eager" and about["torch"] == torch.__version__ and "CPU" in about["device"]
        assert len(row["parts"]) == 2 and 0 < row["accuracy"]["mean"] <= 1
        assert f"| {row['method']} |" in printed
    total, head = rows[3]["trainable_parameters"], rows[4]["trainable_parameters"]
    assert (head, total) == (64 * 5 + 5, 12 * 64 * 5 + 5)
    assert str(out) in printed


def test_the_demos_encoder_is_pooled_like_any_other():
    encoder, images = digits.Encoder(), torch.rand(3, 8, 8)
    x = daam.LayerPooling(encoder)(images)
    assert x.shape == (3, digits.LAYERS, digits.FEATURES) and not x.requires_grad
    close(x[:, -1], encoder(images).mean(1), "averages")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--backend", "triton"], 'backend "triton", requested by'),
        (["--seeds", "5000"], "'5000', expected 1000 or less"),
        (["--epochs", "0"], "'0', expected a whole number of 1 or more"),
    ],
    ids=str,
)
def test_errors_of_the_demo_are_one_line(arguments, message, tmp_path, capsys):
    if "triton" in arguments and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(SystemExit) as stopped:
        digits.main(["--output", str(tmp_path / "out"), *arguments])
    (line,) = capsys.readouterr().err.splitlines()
    assert stopped.value.code == 2 and line.startswith("error: ") and message in line
    assert not (tmp_path / "out").exists()


def test_two_demos_in_one_folder_and_a_folder_of_a_cache(tmp_path, capsys, monkeypatch):
    """Check that both are refused before they lose what they have."""
    (tmp_path / "digits-runs").mkdir()
    (tmp_path / "digits-runs" / "kept").write_text("")
    with exclusive(tmp_path), pytest.raises(SystemExit):
        digits.main(["--output", str(tmp_path)])
    assert "another process works in" in capsys.readouterr().err
    (tmp_path / "cache.json").write_text("{}")
    with pytest.raises(SystemExit):
        digits.main(["--output", str(tmp_path)])
    assert "is a cache, expected another folder" in capsys.readouterr().err
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(SystemExit):
        digits.main(["--output", str(tmp_path)])
    assert "WORLD_SIZE is 2" in capsys.readouterr().err and (tmp_path / "digits-runs" / "kept").exists()


class Pooled(torch.nn.Module):
    """Give random features of an example, (batch, 4, 6), that depend on its number alone."""

    def forward(self, numbers):
        return torch.stack([torch.randn(4, 6, generator=torch.Generator().manual_seed(n)) for n in numbers.tolist()])


def encode(folder):
    digits.train_encoder(torch.rand(64, 8, 8), torch.arange(64) % 5, 2)


def extract(folder):
    examples = [Example(f"{i}", "ab"[i % 2]) for i in range(24)]
    about = {"encoder": "made up", "modality": "text"}

    def collate(texts):
        return {"numbers": torch.tensor([int(text) for text in texts])}

    features.extract(Pooled(), collate, examples, folder, about=about, batch=2, shard=6)


def train(folder):
    x = torch.randn(24, 4, 6, generator=torch.Generator().manual_seed(0))
    settings = Settings("linear", epochs=6, folds=2, rates=(1e-4, 1e-2))
    training.run(training.cached_job(Cache(x, torch.arange(24) % 2, ["a", "b"], {}), settings), settings, folder)


@pytest.mark.parametrize(("work", "bars"), [(encode, 1), (extract, 1), (train, 4)])
def test_a_file_gets_a_line_of_progress_for_each_bar(work, bars, tmp_path):
    path = tmp_path / "stderr.txt"
    with path.open("w", newline="") as file, contextlib.redirect_stderr(file):
        work(tmp_path / "file")
    text = path.read_bytes().decode()
    lines = [line for line in text.splitlines() if not line.startswith("warning: ")]
    assert len(lines) == bars and "\r" not in text
    assert all("100%" in line for line in lines)
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    with contextlib.redirect_stderr(terminal):
        work(tmp_path / "terminal")
    assert terminal.getvalue().count("\r") > bars


IMPORT_ALL = """
import importlib, pkgutil, sys
import matplotlib
import torch

matplotlib.use("svg")  # a notebook's, say
before = torch.get_num_threads(), torch.get_default_dtype(), torch.initial_seed()
import daam.recipes

names = [module.name for module in pkgutil.iter_modules(daam.recipes.__path__)]
for name in names:
    importlib.import_module(f"daam.recipes.{name}")
from pathlib import Path
from daam.recipes.plots import plot_importance

plot_importance(torch.rand(4, 8).numpy(), torch.rand(4, 8).numpy(), [1, 2, 3, 4], 2, "about", Path(sys.argv[1]))
assert matplotlib.rcParams["backend"] == "svg" and matplotlib.get_backend() == "svg", matplotlib.get_backend()
assert "matplotlib.pyplot" not in sys.modules
assert before == (torch.get_num_threads(), torch.get_default_dtype(), torch.initial_seed())
print(*names)
"""


@pytest.mark.slow
def test_importing_recipes_leaves_matplotlib_alone(tmp_path):
    """Check that neither importing recipes nor drawing changes matplotlib's settings."""
    done = subprocess.run(
        [sys.executable, "-c", IMPORT_ALL, str(tmp_path / "importance.png")], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert {"train", "compare", "explain", "digits", "lora", "features"} <= set(done.stdout.split())
    assert (tmp_path / "importance.png").exists()
