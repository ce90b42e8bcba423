"""A frozen encoder, its layers averaged as they come, and a decoder on them."""

import copy
import gc
import weakref

import pytest
import torch
from helpers import close, within
from torch import nn

import daam


class Layer(nn.Module):
    def __init__(self, features, as_tuple):
        super().__init__()
        self.linear, self.drop, self.as_tuple = nn.Linear(features, features), nn.Dropout(0.5), as_tuple

    def forward(self, x):
        y = self.drop(torch.tanh(self.linear(x)))
        return (y, "more") if self.as_tuple else y


class Encoder(nn.Module):
    def __init__(self, layers=4, features=16, as_tuple=False):
        super().__init__()
        self.embed = nn.Embedding(30, features)
        self.layers = nn.ModuleList(Layer(features, as_tuple) for _ in range(layers))

    def forward(self, ids, attention_mask=None):
        return self.hidden(ids)[-1]

    def hidden(self, ids):
        found = [self.embed(ids)]
        for layer in self.layers:
            out = layer(found[-1])
            found.append(out[0] if layer.as_tuple else out)
        return found[1:]


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.mark.parametrize("as_tuple", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_layers_are_averaged(as_tuple, masked):
    encoder, ids = Encoder(as_tuple=as_tuple), torch.randint(30, (3, 7))
    mask = (torch.arange(7) < torch.tensor([[7], [4], [1]])).long() if masked else None
    pooling = daam.LayerPooling(encoder)
    found = pooling(ids, attention_mask=mask)
    hidden = torch.stack(encoder.hidden(ids), 1)
    lengths = [7, 4, 1] if masked else [7, 7, 7]
    expected = torch.stack([h[:, :n].mean(1) for h, n in zip(hidden, lengths, strict=True)])
    close(found, expected, "averages")
    assert found.shape == (3, 4, 16) and not found.requires_grad
    assert not any(layer._forward_hooks for layer in encoder.layers), "hooks stay behind"


def test_padding_does_not_count_not_even_nan():
    encoder, ids = Encoder(), torch.randint(1, 30, (2, 5))
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]], dtype=torch.bool)
    expected = daam.LayerPooling(encoder)(ids, attention_mask=mask)
    with torch.no_grad():
        encoder.embed.weight[0] = float("nan")
    found = daam.LayerPooling(encoder)(torch.where(mask, ids, 0), attention_mask=mask)
    close(found, expected, "averages")


def test_half_precision_is_averaged_in_fp32():
    encoder = Encoder().to(torch.bfloat16)
    ids = torch.randint(30, (2, 300))
    expected = torch.stack([h.double().mean(1) for h in encoder.eval().hidden(ids)], 1)
    found = daam.LayerPooling(encoder)(ids)
    assert found.dtype == torch.float32
    close(found.double(), expected, "averages", (1e-5, 1e-6))


def test_no_layer_outlives_the_next_one():
    """Check that only averages of the layers' outputs are kept: never (batch, layers, positions, features)."""
    encoder, alive = Encoder(layers=6), []

    class Watch(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, x):
            y = self.inner(x)
            self.count = sum(reference() is not None for reference in alive)
            alive.append(weakref.ref(y))
            return y

    encoder.layers = nn.ModuleList(Watch(layer) for layer in encoder.layers)

    def forward(ids):
        x = encoder.embed(ids)
        for layer in encoder.layers:
            x = layer(x)
        return x

    encoder.forward = forward
    daam.LayerPooling(encoder)(torch.randint(30, (2, 9)))
    gc.collect()
    assert max(layer.count for layer in encoder.layers) <= 1


def test_frozen_and_eval_whatever_train_says():
    encoder = Encoder()
    model = daam.DensityAdaptiveTransformer(encoder, daam.DATDecoder(4, 16, 3, num_heads=2, conv_channels=4))
    model.train()
    assert model.decoder.training and not any(m.training for m in encoder.modules())
    ids, labels = torch.randint(30, (6, 5)), torch.randint(3, (6,))
    assert torch.equal(model(ids).features, model(ids).features), "dropout is on"
    state = copy.deepcopy(encoder.state_dict())
    parameters = model.trainable_parameters()
    assert {id(p) for p in parameters} == {id(p) for p in model.decoder.parameters()}
    optimizer = torch.optim.AdamW(parameters, lr=1e-2)
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        loss = model(ids, labels=labels).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    within(losses[-1], 0.5 * losses[0], "loss")
    assert all(torch.equal(t, state[name]) for name, t in encoder.state_dict().items())


def test_outputs():
    decoder = daam.DATDecoder(4, 16, 3, num_heads=2, conv_channels=4)
    ids, labels = torch.randint(30, (6, 5)), torch.randint(3, (6,))
    model = daam.DensityAdaptiveTransformer(Encoder(), decoder, loss="focal")
    out = model(ids, labels=labels, return_weights=True)
    close(out.loss, daam.focal_loss(out.logits, labels), "focal loss")
    logits, weights = decoder(out.features, return_weights=True)
    assert torch.equal(out.logits, logits) and torch.equal(out.weights, weights)
    plain = daam.DensityAdaptiveTransformer(model.encoder, decoder)(ids, labels=labels)
    close(plain.loss, nn.functional.cross_entropy(logits, labels), "cross entropy")
    assert plain.weights is None and model(ids).loss is None


@pytest.mark.parametrize("attention", daam.decoder.ATTENTIONS)
def test_save_and_load(attention, tmp_path):
    pytest.importorskip("safetensors")
    decoder = daam.DATDecoder(4, 16, 3, attention=attention, num_heads=2, conv_channels=4).eval()
    path = tmp_path / "decoder.safetensors"
    encoder = Encoder()
    daam.DensityAdaptiveTransformer(encoder, decoder).save_decoder(path)
    x = torch.randn(5, 4, 16)
    assert torch.equal(daam.load_decoder(path).eval()(x), decoder(x))
    restored = daam.DATDecoder(4, 16, 3, attention=attention, num_heads=2, conv_channels=4).eval()
    daam.DensityAdaptiveTransformer(encoder, restored).load_decoder(path)
    assert torch.equal(restored(x), decoder(x))
    with pytest.raises(RuntimeError, match="size mismatch"):
        daam.load_decoder(path, num_classes=4)


def test_layers_are_named_or_found():
    encoder = nn.ModuleDict({"a": Encoder(3), "b": Encoder(5)})
    with pytest.raises(ValueError, match=r"module lists are 'a.layers' \(3\), 'b.layers' \(5\)"):
        daam.LayerPooling(encoder)
    assert daam.LayerPooling(encoder, "b.layers").num_layers == 5
    assert daam.LayerPooling(encoder, list(encoder["a"].layers)).num_layers == 3
    encoder.config = type("Config", (), {"num_hidden_layers": 3})
    assert daam.LayerPooling(encoder).num_layers == 3
    with pytest.raises(ValueError, match=r"layers: .*nothing"):
        daam.LayerPooling(encoder, "a.nothing")
    with pytest.raises(ValueError, match="module lists are none"):
        daam.LayerPooling(nn.Linear(2, 2))


def test_what_does_not_fit():
    encoder = Encoder()
    with pytest.raises(ValueError, match="num_layers 6, expected the encoder's 4"):
        daam.DensityAdaptiveTransformer(encoder, daam.DATDecoder(6, 16, 3, num_heads=2))
    with pytest.raises(ValueError, match="loss is 'hinge', expected one of 'cross_entropy', 'focal'"):
        daam.DensityAdaptiveTransformer(encoder, nn.Flatten(), loss="hinge")
    with pytest.raises(ValueError, match=r"attention_mask has shape \(2, 4\), expected \(2, 5\)"):
        daam.LayerPooling(encoder)(torch.randint(30, (2, 5)), attention_mask=torch.ones(2, 4))
    unused = [*encoder.layers, nn.Identity()]
    with pytest.raises(ValueError, match=r"layers \[4\] ran \[0\] times in one call, expected \[1\]"):
        daam.LayerPooling(encoder, unused)(torch.randint(30, (2, 5)))
