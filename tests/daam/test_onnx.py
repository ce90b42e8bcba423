"""Decoders and transformers as ONNX: what onnxruntime computes is what torch does, for other batches too."""

import json
import sys

import numpy as np
import pytest
import torch

pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

import onnxruntime
from helpers import tiny_bert
from torch import nn

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
    constant = decoder.standardize.mean.reshape(-1, 1).expand(2, LAYERS, FEATURES)  # chunks without variance
    for x in (3 * torch.randn(1, LAYERS, FEATURES) + 2, 3 * torch.randn(7, LAYERS, FEATURES) + 2, constant):
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


class Layers(nn.Module):
    """Hold a layer of each algorithm that adds 1e-8, on one x and one mask."""

    def __init__(self):
        super().__init__()
        self.density = daam.MultiHeadDAAM(4, 2, eps=1e-8, backend="eager")
        self.coarse = daam.MultiHeadDAAM(4, 2, eps=1e-5, backend="eager")
        self.mixture = daam.MultiHeadDensityAdaptiveAttention(1, 2, 3, backend="eager")
        self.stable = daam.StableMultiHeadDensityAttention(1, 2, 3, backend="eager")

    def forward(self, x, mask):
        return torch.stack([layer(x, mask=mask) for layer in self.children()])


def test_chunks_without_variance(tmp_path):
    """Check layers that users export: constant chunks and those of one valid position are as in torch, and not NaN."""
    layers, x = Layers().eval(), torch.randn(2, 6, 4)
    mask = torch.tensor([[True, True, False, True, False, False], [True] * 6])  # one valid position in a head
    torch.onnx.export(layers, (x, mask), tmp_path / "layers.onnx", dynamo=True, verbose=False)
    run = session(tmp_path / "layers.onnx")
    for given in (x, torch.zeros_like(x), torch.full_like(x, 3), x[:, :1].expand_as(x)):
        with torch.no_grad():
            expected = layers(given, mask).numpy()
        (y,) = run.run(None, {"x": given.contiguous().numpy(), "mask": mask.numpy()})
        assert np.isfinite(expected).all()
        assert np.abs(y - expected).max() <= 1e-5 * np.abs(expected).max()


class Encoder(nn.Module):
    """Embed tokens, and let layers see all positions that a mask has."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(30, FEATURES)
        self.layers = nn.ModuleList(nn.Linear(FEATURES, FEATURES) for _ in range(3))

    def forward(self, input_ids, attention_mask):
        x = self.embed(input_ids)
        for layer in self.layers:
            x = torch.tanh(layer(x + (x * attention_mask.unsqueeze(-1)).sum(1, keepdim=True)))
        return x


def bert():
    return tiny_bert(FEATURES)


@pytest.mark.parametrize("build", [Encoder, pytest.param(bert, marks=pytest.mark.slow)])
def test_a_whole_transformer(build, tmp_path):
    decoder = daam.DATDecoder(3, FEATURES, 2, conv_channels=4)
    decoder.names = ["a", "b"]
    model = daam.DensityAdaptiveTransformer(build(), decoder)
    example = {"input_ids": torch.randint(30, (1, 5)), "attention_mask": torch.ones(1, 5, dtype=torch.long)}
    export_onnx(model.train(), tmp_path / "model.onnx", example)
    assert decoder.training and not any(layer._forward_hooks for layer in model.pooling.layers)
    run = session(tmp_path / "model.onnx")
    assert [(entry.name, entry.shape) for entry in run.get_inputs()] == [
        ("input_ids", ["batch", "positions"]), ("attention_mask", ["batch", "positions"])
    ]  # fmt: skip
    assert [(entry.name, entry.shape) for entry in run.get_outputs()] == [("logits", ["batch", 2])]
    assert json.loads(run.get_modelmeta().custom_metadata_map["names"]) == decoder.names
    for batch, positions in ((1, 5), (4, 4), (3, 16)):
        inputs = {
            "input_ids": torch.randint(30, (batch, positions)),
            "attention_mask": torch.ones(batch, positions).long(),
        }
        inputs["attention_mask"][0, 2:] = 0
        with torch.no_grad():
            expected = model.eval()(**inputs, pooling_mask=inputs["attention_mask"]).logits.numpy()
        (logits,) = run.run(None, {name: t.numpy() for name, t in inputs.items()})
        assert np.abs(logits - expected).max() < 1e-5 * np.abs(expected).max()


def test_errors(tmp_path, monkeypatch):
    with pytest.raises(TypeError, match="model is a Linear, expected a DATDecoder or a DensityAdaptiveTransformer"):
        export_onnx(torch.nn.Linear(2, 2), tmp_path / "decoder.onnx")
    decoder = daam.DATDecoder(3, FEATURES, 2, conv_channels=4)
    with pytest.raises(TypeError, match="example is given with a DATDecoder, whose input is known: expected None"):
        export_onnx(decoder, tmp_path / "decoder.onnx", {"x": torch.randn(2, 3, FEATURES)})
    with pytest.raises(TypeError, match=r"example is a NoneType, expected tensors by name, as in model\(\*\*example\)"):
        export_onnx(daam.DensityAdaptiveTransformer(Encoder(), decoder), tmp_path / "model.onnx")
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(ImportError, match=r"pip install 'daam-triton\[onnx\]'"):
        export_onnx(daam.DATDecoder(3, 12, 2, conv_channels=4), tmp_path / "decoder.onnx")
