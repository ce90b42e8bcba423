"""The demo runs end to end, and its figures are what they say."""

import json

import pytest
import torch

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")
pytest.importorskip("safetensors")

from helpers import close

import daam
from daam.recipes import digits


def test_digits(tmp_path, capsys):
    out = tmp_path / "out"
    arguments = ["--output", str(out), "--seeds", "2", "--epochs", "2", "--encoder-epochs", "1", "--backend", "eager"]
    threads = torch.get_num_threads()
    try:
        digits.main(arguments)
        digits.main(arguments)  # over what is there
    finally:
        torch.set_num_threads(threads)
    printed = capsys.readouterr().out
    names = {"comparison.json", "comparison.png", "gaussians.png", "importance.json", "importance.png", "table.md"}
    assert {path.name for path in out.iterdir()} == names | {"digits-runs"}
    rows = json.loads((out / "comparison.json").read_text())
    assert [row["method"] for row in rows] == list(digits.DECODERS)
    for row in rows:
        about = row["about"]
        assert about["backend"] == "eager" and about["torch"] == torch.__version__ and "CPU" in about["device"]
        assert [len(part["losses"]) for part in row["parts"]] == [2, 2] and 0 < row["accuracy"]["mean"] <= 1
        assert f"| {row['method']} |" in printed
    last, every = rows[3]["trainable_parameters"], rows[2]["trainable_parameters"]
    assert (last, every) == (64 * 5 + 5, 12 * 64 * 5 + 5)
    assert str(out) in printed


def test_the_demos_encoder_is_pooled_like_any_other():
    encoder, images = digits.Encoder(), torch.rand(3, 8, 8)
    x = daam.LayerPooling(encoder)(images)
    assert x.shape == (3, digits.LAYERS, digits.FEATURES) and not x.requires_grad
    close(x[:, -1], encoder(images).mean(1), "averages")
