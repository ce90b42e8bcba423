"""The recipe runs end to end, and its figures are what they say."""

import json

import pytest
import torch

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")

from daam.recipes import digits


def test_digits(tmp_path, capsys):
    out = tmp_path / "out"
    arguments = ["--output", str(out), "--seeds", "2", "--epochs", "2", "--encoder-epochs", "1", "--backend", "eager"]
    threads = torch.get_num_threads()
    digits.main(arguments)
    torch.set_num_threads(threads)
    printed = capsys.readouterr().out
    assert {path.name for path in out.iterdir()} == {"learning-curves.png", "gate.png", "results.json"}
    report = json.loads((out / "results.json").read_text())
    assert report["backend"] == "eager" and report["torch"] == torch.__version__ and "CPU" in report["device"]
    results = report["results"]
    assert [r["name"] for r in results] == list(digits.decoders("eager"))
    for result in results:
        assert result["name"] in printed
        assert [len(curve) for curve in result["curves"]] == [2, 2]
        assert all(0 < accuracy <= 1 for curve in result["curves"] for accuracy in curve)
    assert str(out) in printed


def test_bytes_saved_counts_each_tensor_once_and_no_parameter():
    x = torch.randn(10, digits.LAYERS, digits.FEATURES)
    assert digits.bytes_saved(digits.LinearProbe(0), x) == x.nbytes
    assert digits.bytes_saved(digits.DAAMDecoder("eager"), x) == 2 * x.nbytes


def test_chunks_of_at_least_three_layers():
    assert digits.LAYERS >= 8 and digits.LAYERS % digits.HEADS == 0 and digits.LAYERS // digits.HEADS >= 3


def test_pooled_layers_is_every_layer_and_trains_nothing():
    encoder, images = digits.Encoder(), torch.rand(3, 8, 8)
    x = digits.pooled_layers(encoder, images)
    assert x.shape == (3, digits.LAYERS, digits.FEATURES) and not x.requires_grad
    torch.testing.assert_close(x[:, -1], encoder(images)[-1].mean(1))
