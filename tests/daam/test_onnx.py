"""Decoders as ONNX: what onnxruntime computes is what torch does, for every attention and other batches."""

import json
import sys

import numpy as np
import pytest
import torch

pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

import onnxruntime

import daam
from daam.decoder import ATTENTIONS
from daam.onnx_export import export_onnx

pytestmark = pytest.mark.usefixtures("one_thread")

LAYERS, FEATURES = 6, 32
QUICK = ("gqdaam", "mixture", "mha_bn")  # with all kinds of layers among them; seconds each


def trained(attention):
    """Return a decoder, in eval mode, in which no number has the value that it starts with."""
    decoder = daam.DATDecoder(LAYERS, FEATURES, 3, attention=attention, conv_channels=8, standardize=True)
    x = 3 * torch.randn(40, LAYERS, FEATURES) + torch.arange(LAYERS)[:, None]
    decoder.standardize.fit(x)
    with torch.no_grad():
        for parameter in decoder.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
        decoder(x)  # statistics of batch normalisation
    return decoder.eval()


def session(path):
    return onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])


@pytest.mark.parametrize(
    "attention", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in ATTENTIONS]
)
def test_onnxruntime_computes_what_torch_does(attention, tmp_path):
    decoder, path = trained(attention), tmp_path / "decoder.onnx"
    decoder.names = ["a", "b", "ß"]
    before = {name: t.clone() for name, t in decoder.state_dict().items()}
    for module in decoder.modules():
        if hasattr(module, "backend"):
            module.backend = "triton"  # ONNX has no such operators
    export_onnx(decoder.train(), path)
    assert decoder.training and all(torch.equal(t, before[name]) for name, t in decoder.state_dict().items())
    for module in decoder.eval().modules():
        if hasattr(module, "backend"):
            assert module.backend == "triton"
            module.backend = "eager"
    run = session(path)
    assert [(entry.name, entry.shape, entry.type) for entry in run.get_inputs()] == [
        ("x", ["batch", LAYERS, FEATURES], "tensor(float)")
    ]
    assert [(entry.name, entry.shape) for entry in run.get_outputs()] == [("logits", ["batch", 3])]
    assert json.loads(run.get_modelmeta().custom_metadata_map["names"]) == decoder.names
    for batch in (1, 7):
        x = 3 * torch.randn(batch, LAYERS, FEATURES) + 2
        with torch.no_grad():
            expected = decoder(x).numpy()
        (logits,) = run.run(["logits"], {"x": x.numpy()})
        assert logits.shape == expected.shape and logits.dtype == np.float32
        assert np.abs(logits - expected).max() < 1e-5 * np.abs(expected).max()


def test_half_precision_becomes_fp32(tmp_path):
    decoder = daam.DATDecoder(3, 12, 2, attention="none", conv_channels=4).to(torch.bfloat16)
    export_onnx(decoder, tmp_path / "decoder.onnx")
    x = torch.randn(4, 3, 12)
    run = session(tmp_path / "decoder.onnx")
    (logits,) = run.run(["logits"], {"x": x.numpy()})
    with torch.no_grad():
        expected = decoder.float()(x).numpy()
    assert np.abs(logits - expected).max() < 1e-5 * np.abs(expected).max()
    assert "names" not in run.get_modelmeta().custom_metadata_map


def test_errors(tmp_path, monkeypatch):
    with pytest.raises(TypeError, match="decoder is a Linear, expected a DATDecoder"):
        export_onnx(torch.nn.Linear(2, 2), tmp_path / "decoder.onnx")
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(ImportError, match=r"pip install 'daam-triton\[onnx\]'"):
        export_onnx(daam.DATDecoder(3, 12, 2, conv_channels=4), tmp_path / "decoder.onnx")
