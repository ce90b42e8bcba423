"""Masks, layouts and threads of `LayerPooling`, and what `check` measures, on encoders of a few lines.

Right values are averages that a loop takes over each example alone.
"""

import copy
import pickle
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from helpers import Wrapper, close
from torch import nn

import daam
from daam.encoder_check import TRIED, check_encoder

FEATURES = 16


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(FEATURES, FEATURES)

    def forward(self, x):
        return torch.tanh(self.linear(x))


class Encoder(nn.Module):
    """Embed tokens; every layer sees its own position alone, so that an example does not depend on its batch."""

    def __init__(self, layers=3):
        super().__init__()
        self.embed = nn.Embedding(30, FEATURES)
        self.layers = nn.ModuleList(Layer() for _ in range(layers))

    def forward(self, input_ids, attention_mask=None):
        x = self.embed(input_ids)
        for layer in self.layers:
            x = layer(x)
        return x


class PositionsFirst(Encoder):
    """Take (batch, positions), as XLNet does, and run layers on (positions, batch, features)."""

    def forward(self, input_ids, attention_mask=None):
        return super().forward(input_ids.T)


class MasklessEncoder(Encoder):
    def forward(self, input_ids):
        return super().forward(input_ids)


class OtherNames(Encoder):
    def forward(self, input_ids, head_mask=None, **kwargs):
        return super().forward(input_ids)


class Nameless(Encoder):
    def forward(self, *inputs):
        return super().forward(inputs[0])


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


IDS = torch.tensor([[3, 4, 5, 6, 7], [8, 9, 0, 0, 0], [1, 2, 3, 0, 0]])
MASK = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0], [1, 1, 1, 0, 0]])


def average_alone(encoder, ids=IDS, mask=MASK):
    """Return (batch, layers, features): each example without its padding, through layers that are called here."""
    found = []
    for row, valid in zip(ids, mask.bool(), strict=True):
        x, layers = encoder.embed(row[valid]), []
        for layer in encoder.layers:
            x = layer(x)
            layers.append(x.mean(0))
        found.append(torch.stack(layers))
    return torch.stack(found).detach()


# A2, A3, C2: which mask


def test_a_mask_is_found_wherever_it_stands():
    encoder = Encoder()
    pooling, expected = daam.LayerPooling(encoder), average_alone(encoder)
    close(pooling(IDS, attention_mask=MASK), expected, "by keyword")
    close(pooling(IDS, MASK), expected, "by position")
    close(pooling(input_ids=IDS, attention_mask=MASK.bool()), expected, "of bool")
    close(pooling(IDS, attention_mask=2 * MASK), expected, "of twos, like Longformer's")
    close(pooling(IDS, pooling_mask=MASK), expected, "for averages alone")
    assert not torch.allclose(pooling(IDS), expected, atol=1e-2), "padding makes a difference"
    close(pooling(IDS, MASK, pooling_mask="all"), pooling(IDS), "all positions")


def test_what_is_not_finite_where_nothing_is_valid_does_not_count():
    encoder = Encoder()
    encoder.embed.weight.data[0] = float("nan")  # of padding
    close(daam.LayerPooling(encoder)(IDS, attention_mask=MASK), average_alone(encoder), "averages")


def test_an_encoder_without_a_mask_is_pooled_with_one():
    encoder = MasklessEncoder()
    close(daam.LayerPooling(encoder)(input_ids=IDS, attention_mask=MASK), average_alone(encoder), "averages")
    with pytest.raises(TypeError, match="unexpected keyword argument 'nothing'"):
        daam.LayerPooling(encoder)(IDS, nothing=MASK)


@pytest.mark.parametrize("by_keyword", [False, True])
def test_a_batch_in_a_dict(by_keyword):
    class Dicts(Encoder):
        def forward(self, batch, attention_mask=None):
            return super().forward(batch["input_ids"])

    encoder, batch = Dicts(), {"input_ids": IDS, "attention_mask": MASK}
    pooling = daam.LayerPooling(encoder)
    with pytest.raises(ValueError, match=r"batch goes to the encoder.*by keyword, as in pooling\(\*\*batch"):
        pooling(batch=batch) if by_keyword else pooling(batch)
    close(pooling(batch, pooling_mask=MASK), average_alone(encoder), "with a mask for pooling")


def test_masks_under_other_names():
    encoder = OtherNames()
    pooling, expected = daam.LayerPooling(encoder), average_alone(encoder)
    with pytest.raises(ValueError, match="mask goes to the encoder, and which positions it leaves valid is not clear"):
        pooling(IDS, mask=MASK)
    close(pooling(IDS, mask=1 - MASK, pooling_mask=MASK), expected, "a mask of padding, and one for pooling")
    close(pooling(IDS, lengths=MASK.sum(1)), expected, "lengths")
    with pytest.raises(ValueError, match=r"lengths has shape \(3, 4\), expected \(3, 5\)"):
        pooling(IDS, lengths=MASK.sum(1).clamp(max=4))
    close(pooling(IDS, head_mask=torch.ones(3, 5)), pooling(IDS), "a mask of something else")
    with pytest.raises(ValueError, match="an input by position, 1 goes to the encoder"):
        daam.LayerPooling(Nameless())(IDS, MASK)


LENGTHS = MASK.sum(1)


@pytest.mark.parametrize(
    "name", ["padding", "is_pad", "valid", "key_padding", "attn_bias", "AttentionMask", "src_mask"]
)
def test_masks_that_are_not_understood(name):
    with pytest.raises(ValueError, match=f"{name} goes to the encoder, and which positions it leaves valid"):
        daam.LayerPooling(OtherNames())(IDS, **{name: MASK.bool()})


@pytest.mark.parametrize("name", ["lengths", "ilens", "xs_lens", "seqlens", "n_tokens", "num_frames", "sizes"])
def test_lengths_by_other_names(name):
    encoder = OtherNames()
    close(daam.LayerPooling(encoder)(IDS, **{name: LENGTHS}), average_alone(encoder), "averages")
    for lengths in (LENGTHS / 5, LENGTHS.unsqueeze(1), LENGTHS.tolist()):
        with pytest.raises(ValueError, match=f"{name} goes to the encoder, and which positions it leaves valid"):
            daam.LayerPooling(encoder)(IDS, **{name: lengths})


def test_lengths_that_do_not_tell():
    with pytest.raises(ValueError, match="lengths has no valid position in example 1"):
        daam.LayerPooling(OtherNames())(IDS, lengths=torch.tensor([5, 0, 3]))
    with pytest.raises(ValueError, match="target_lengths goes to the encoder, and which positions"):
        daam.LayerPooling(OtherNames())(IDS, target_lengths=LENGTHS, input_lengths=LENGTHS)


def test_batches_in_containers():
    class Containers(Encoder):
        def forward(self, batch):
            return super().forward(batch[0] if isinstance(batch, tuple) else batch["ids"])

    class First(Encoder):
        def forward(self, batch):
            return super().forward(batch["ids"].T)

    encoder = Containers()
    for batch in ((IDS, MASK), {"ids": IDS, "padding": MASK}, {"ids": IDS, "lens": LENGTHS}):
        with pytest.raises(ValueError, match="batch goes to the encoder, and which positions it leaves valid"):
            daam.LayerPooling(encoder)(batch)
        close(daam.LayerPooling(encoder)(batch, pooling_mask=MASK), average_alone(encoder), "averages")
    with pytest.raises(ValueError, match=r"\(5, 3, 16\) for a batch of 3, expected \(3, positions, features\)"):
        daam.LayerPooling(First())({"ids": IDS})


def test_a_decoders_own_mask():
    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.encoder, self.decoder = MasklessEncoder(), MasklessEncoder()

        def forward(self, input_ids, decoder_input_ids, attention_mask=None, decoder_attention_mask=None):
            self.encoder(input_ids)
            self.decoder(decoder_input_ids)

    model, mask = Both(), MASK.flip(0)
    call = {"input_ids": IDS, "attention_mask": MASK, "decoder_input_ids": IDS, "decoder_attention_mask": mask}
    close(daam.LayerPooling(model, "encoder.layers")(**call), average_alone(model.encoder), "encoder")
    close(daam.LayerPooling(model, "decoder.layers")(**call), average_alone(model.decoder, IDS, mask), "decoder")


def test_two_towers_share_no_mask():
    class Towers(nn.Module):
        def __init__(self):
            super().__init__()
            self.text_model, self.vision_model = MasklessEncoder(), MasklessEncoder()

        def forward(self, input_ids, pixel_values, attention_mask=None):
            self.text_model(input_ids)
            self.vision_model(pixel_values)

    encoder, patches = Towers(), IDS + 1  # as many patches as tokens
    call = {"input_ids": IDS, "pixel_values": patches, "attention_mask": MASK}
    text, vision = (daam.LayerPooling(encoder, f"{part}_model.layers") for part in ("text", "vision"))
    close(text(**call), average_alone(encoder.text_model), "the text")
    with pytest.raises(ValueError, match=r"attention_mask: which positions of vision_model.layers.0 are valid"):
        vision(**call)
    expected = average_alone(encoder.vision_model, patches, torch.ones_like(MASK))
    close(vision(**call, pooling_mask="all"), expected, "the picture")


def test_pixel_attention_mask():
    class Patches(Encoder):
        def forward(self, pixel_values, pixel_attention_mask):
            return super().forward(pixel_values)

    encoder = Patches()
    found = daam.LayerPooling(encoder)(pixel_values=IDS, pixel_attention_mask=MASK)
    close(found, average_alone(encoder), "averages")


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (torch.ones(3, 4), r"attention_mask has shape \(3, 4\), expected \(3, 5\)"),
        (torch.ones(2, 5), r"attention_mask has shape \(2, 5\), expected \(3, 5\)"),
        (torch.ones(3, 1, 5, 5), r"attention_mask has shape \(3, 1, 5, 5\), expected a tensor \(batch, positions\)"),
        (torch.zeros(3, 5), "attention_mask has no valid position in example 0 of the batch"),
        (MASK - 1.0, "attention_mask has negative values, expected 1 where valid"),
        ([1, 2], "attention_mask has a list, expected a tensor"),
    ],
)
def test_masks_that_are_none(mask, message):
    with pytest.raises(ValueError, match=message):
        daam.LayerPooling(Encoder())(IDS, attention_mask=mask)


# B3: encoders that pad inside


def test_what_an_encoder_pads_inside_does_not_count():
    class Windows(Encoder):
        def _pad_to_window_size(self, ids):
            return nn.functional.pad(ids, (0, -ids.shape[1] % 8), value=29)

        def forward(self, input_ids, attention_mask=None):
            return super().forward(self._pad_to_window_size(input_ids))

    encoder = Windows()
    close(daam.LayerPooling(encoder)(IDS, MASK), average_alone(encoder), "with a mask")
    everything = torch.ones_like(MASK)
    close(daam.LayerPooling(encoder)(IDS), average_alone(encoder, IDS, everything), "without one")


# A4: frames


class Frames(Encoder):
    """Make frames of four samples; layers run on means of `squeeze` frames, as SEW's do."""

    def __init__(self, squeeze=2, claimed=2):
        super().__init__()
        self.squeeze, self.config = squeeze, type("Config", (), {"squeeze_factor": claimed, "num_hidden_layers": 3})()

    def _get_feat_extract_output_lengths(self, lengths):
        return lengths // 4

    def forward(self, input_values, attention_mask=None):
        frames = input_values.unfold(1, 4 * self.squeeze, 4 * self.squeeze).mean(-1)
        x = self.embed.weight[0] * frames.unsqueeze(-1)
        for layer in self.layers:
            x = layer(x)


@pytest.mark.parametrize("squeeze", [1, 2])
def test_frames_are_counted_as_layers_have_them(squeeze):
    pooling = daam.LayerPooling(Frames(squeeze, squeeze))
    sounds = [torch.randn(1, n) for n in (80, 41, 17)]
    padded = torch.cat([nn.functional.pad(sound, (0, 80 - sound.shape[1])) for sound in sounds])
    mask = (torch.arange(80) < torch.tensor([[80], [41], [17]])).long()
    expected = torch.cat([pooling(sound, attention_mask=torch.ones_like(sound)) for sound in sounds])
    close(pooling(padded, attention_mask=mask), expected, "frames", (1e-6, 1e-6))
    frames = torch.arange(41 // (4 * squeeze))
    x = (
        pooling.encoder.embed.weight[0]
        * torch.stack([sounds[1][0, 4 * squeeze * i :][: 4 * squeeze].mean() for i in frames])[:, None]
    )
    first = pooling.encoder.layers[0](x).mean(0)
    close(expected[1, 0], first.detach(), "frames of one", (1e-6, 1e-6))


def test_frames_that_do_not_end_with_the_positions():
    with pytest.raises(ValueError, match="attention_mask of 80 entries makes 20 frames, and layers have 10 positions"):
        daam.LayerPooling(Frames(2, 1))(torch.randn(2, 80), attention_mask=torch.ones(2, 80))
    left = torch.ones(2, 80)
    left[0, :20] = 0
    with pytest.raises(ValueError, match="attention_mask has valid samples behind others, expected padding on the rig"):
        daam.LayerPooling(Frames())(torch.randn(2, 80), attention_mask=left)


# C1: layouts


def test_positions_first():
    encoder = PositionsFirst()
    expected = average_alone(encoder)
    close(daam.LayerPooling(encoder, batch_first=False)(IDS, MASK), expected, "said to be")
    with pytest.raises(ValueError, match=r"\(5, 3, 16\) for a batch of 3, expected \(3, positions, features\): pass"):
        daam.LayerPooling(encoder)(IDS, MASK)
    # as many examples as tokens: sizes do not tell
    ids, mask = IDS[:, :3], torch.ones(3, 3)
    for batch_first in (None, False):
        found = daam.LayerPooling(encoder, batch_first=batch_first)(ids)
        close(found, average_alone(encoder, ids, mask), f"batch_first={batch_first}")
    plain = Encoder()
    close(daam.LayerPooling(plain)(ids, mask), average_alone(plain, ids, mask), "the batch first")


def test_torchs_transformer_encoder():
    """Check its default layout, positions first, in what goes in too."""

    def build(batch_first):
        layer = nn.TransformerEncoderLayer(FEATURES, 2, 32, dropout=0.0, batch_first=batch_first)
        return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()

    first, batched = build(False), build(True)
    batched.load_state_dict(first.state_dict())
    x = torch.randn(3, 5, FEATURES)
    with pytest.raises(ValueError, match=r"batch_first is None, but the layers hold nn\.MultiheadAttention"):
        daam.LayerPooling(first)
    expected = []
    with torch.no_grad():
        for row, valid in zip(x, MASK.bool(), strict=True):
            hidden, layers = row[valid][None], []
            for layer in batched.layers:
                hidden = layer(hidden)
                layers.append(hidden[0].mean(0))
            expected.append(torch.stack(layers))
    expected, padding = torch.stack(expected), ~MASK.bool()
    found = daam.LayerPooling(first, batch_first=False)(
        x.transpose(0, 1), src_key_padding_mask=padding, pooling_mask=MASK
    )
    close(found, expected, "positions first", (1e-5, 1e-5))
    found = daam.LayerPooling(batched)(x, src_key_padding_mask=padding, pooling_mask=MASK)
    close(found, expected, "batch first, nested inside", (1e-5, 1e-5))
    with pytest.raises(ValueError, match="src_key_padding_mask goes to the encoder, and which positions"):
        daam.LayerPooling(batched)(x, src_key_padding_mask=padding)


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((2, 4, 4, FEATURES), r"shape \(2, 4, 4, 16\), expected \(batch, positions, features\)"),
        ((1, 8, FEATURES), r"shape \(1, 8, 16\) for a batch of 2, expected \(2, positions, features\)"),
        ((8, 4, FEATURES), r"shape \(8, 4, 16\) for a batch of 2"),
    ],
    ids=["a grid", "two images in a row", "windows"],
)
def test_other_layouts(shape, message):
    class Reshaped(Encoder):
        def forward(self, pixel_values):
            for layer in self.layers:
                layer(pixel_values.new_zeros(shape))

    with pytest.raises(ValueError, match=message):
        daam.LayerPooling(Reshaped())(torch.zeros(2, 3, 8, 8))


# layers: shared ones, a single one, stages, direct calls


def test_a_layer_that_runs_repeatedly():
    encoder = Encoder(1)

    def forward(input_ids, attention_mask=None):
        x = encoder.embed(input_ids)
        for _ in range(3):
            x = encoder.layers[0](x)

    encoder.forward = forward
    expected = average_alone(type("E", (), {"embed": encoder.embed, "layers": [encoder.layers[0]] * 3}))
    close(daam.LayerPooling(encoder, [encoder.layers[0]] * 3)(IDS, MASK), expected, "averages")
    with pytest.raises(ValueError, match=r"layers \[0\] ran \[3\] times in one call, expected \[1\]"):
        daam.LayerPooling(encoder, list(encoder.layers))(IDS, MASK)


def test_an_encoder_of_one_layer():
    encoder = Encoder(1)
    with pytest.raises(ValueError, match=r"pass layers=: its module lists are 'layers' \(1\)"):
        daam.LayerPooling(encoder)
    encoder.config = type("Config", (), {"num_hidden_layers": 1})()
    close(daam.LayerPooling(encoder)(IDS, MASK), average_alone(encoder), "averages")


def test_layers_whose_forward_is_called_directly():
    class Direct(Encoder):
        def forward(self, input_ids, attention_mask=None):
            x = self.embed(input_ids)
            for layer in self.layers:
                x = layer.forward(x)

    encoder = Direct()
    close(daam.LayerPooling(encoder)(IDS, MASK), average_alone(encoder), "averages")
    close(daam.LayerPooling(encoder)(IDS[:, :3]), average_alone(encoder, IDS[:, :3], torch.ones(3, 3)), "a square")
    assert all("forward" not in layer.__dict__ for layer in encoder.layers), "stand-ins stay behind"


def test_stages_of_several_widths():
    class Stages(nn.Module):
        def __init__(self):
            super().__init__()
            self.stages = nn.ModuleList(
                nn.ModuleDict({"blocks": nn.ModuleList(nn.Linear(w, w) for _ in range(2)), "up": nn.Linear(w, 2 * w)})
                for w in (4, 8)
            )

        def forward(self, x):
            for stage in self.stages:
                for block in stage["blocks"]:
                    x = block(x)
                x = stage["up"](x)

    encoder, x = Stages(), torch.randn(2, 5, 4)
    with pytest.raises(
        ValueError, match=r"layers have 4, 8 features, expected one width: name the layers of one stage"
    ):
        daam.LayerPooling(encoder, "stages.0.blocks, stages.1.blocks")(x)
    first = encoder.stages[0]["blocks"]
    expected = torch.stack([first[0](x).mean(1), first[1](first[0](x)).mean(1)], 1).detach()
    close(daam.LayerPooling(encoder, "stages.0.blocks")(x), expected, "a stage")
    close(daam.LayerPooling(encoder, "stages.0.blocks.0,stages.0.blocks.1")(x), expected, "by names")


def test_a_layer_that_gives_no_tensor():
    class Dicts(Layer):
        def forward(self, x):
            return {"feature_map": super().forward(x)}

    class Calls(Encoder):
        def forward(self, input_ids):
            self.layers[0](self.embed(input_ids))

    encoder = Calls(2)
    encoder.layers[0] = Dicts()
    with pytest.raises(ValueError, match="a Dicts gives a dict, expected a tensor"):
        daam.LayerPooling(encoder)(IDS)


# B6, C3: threads, compiled and wrapped encoders, copies


def test_one_encoder_in_several_threads():
    encoder = Encoder()
    poolings = [daam.LayerPooling(encoder), daam.LayerPooling(encoder, "layers")]
    batches = [torch.randint(30, (3, n)) for n in range(1, 9)] * 10
    expected = [average_alone(encoder, ids, torch.ones_like(ids)) for ids in batches]
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda i: poolings[i % 2](batches[i]), range(len(batches))))
    for result, wanted in zip(found, expected, strict=True):
        close(result, wanted, "averages")


def compiled(encoder):
    return torch.compile(encoder, backend="eager")


def compiled_in_place(encoder):
    encoder.compile(backend="eager")
    return encoder


def compiled_inside(encoder):
    encoder.layers[1] = torch.compile(encoder.layers[1], backend="eager")
    return encoder


def wrapped_compiled(encoder):
    return Wrapper(compiled(encoder))


@pytest.mark.parametrize("wrap", [compiled, compiled_in_place, compiled_inside, Wrapper, wrapped_compiled])
@pytest.mark.parametrize("frames", [False, True])
def test_compiled_and_wrapped(wrap, frames):
    encoder = Frames() if frames else Encoder()
    x, mask = (torch.randn(3, 80), torch.ones(3, 80)) if frames else (IDS, MASK)
    if frames:
        mask[1, 50:] = 0
    plain = daam.LayerPooling(encoder)(x, attention_mask=mask)
    wrapped = wrap(encoder)
    wrapped(x, attention_mask=mask)  # compiled before it is pooled
    pooling = daam.LayerPooling(wrapped)
    for _ in range(3):
        close(pooling(x, attention_mask=mask), plain, "averages")
    close(pooling(x, mask), plain, "by position")


def test_a_compiled_model():
    """Check that the encoder runs as it is, and the decoder compiled."""
    model = daam.DensityAdaptiveTransformer(Encoder(), daam.DATDecoder(3, FEATURES, 2, num_heads=1, conv_channels=4))
    labels = torch.tensor([0, 1, 0])
    expected = model(IDS, attention_mask=MASK, labels=labels)
    fast = torch.compile(model, backend="eager")
    for _ in range(2):
        out = fast(IDS, attention_mask=MASK, labels=labels)
        close(out.logits, expected.logits, "logits")
        close(out.features, average_alone(model.encoder), "features")


def test_copies():
    pooling = daam.LayerPooling(Encoder())
    expected = pooling(IDS, MASK)
    for copied in (copy.deepcopy(pooling), pickle.loads(pickle.dumps(pooling))):
        close(copied(IDS, MASK), expected, "averages")
        assert copied.layers[0] is copied.encoder.layers[0] and copied.layers[0] is not pooling.layers[0]


# B7, B8: outputs, dtypes


def test_outputs_are_read_as_dicts_tuples_and_attributes():
    model = daam.DensityAdaptiveTransformer(Encoder(), daam.DATDecoder(3, FEATURES, 2, num_heads=1, conv_channels=4))
    out = model(IDS, attention_mask=MASK)
    assert list(out) == ["logits", "features"] and out.loss is None and out.weights is None
    out = model(input_ids=IDS, attention_mask=MASK, labels=torch.tensor([0, 1, 0]), return_weights=True)
    assert list(out) == ["loss", "logits", "weights", "features"]
    assert out[0] is out.loss is out["loss"] and out[1:] == (out.logits, out.weights, out.features)
    assert isinstance(out, dict) and out.to_tuple()[1] is out.logits
    restored = pickle.loads(pickle.dumps(out))
    assert type(restored) is type(out) and torch.equal(restored.logits, out.logits)
    with pytest.raises(AttributeError, match="an Output has no 'hidden'; it has: loss, logits, weights, features"):
        out.hidden  # noqa: B018


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_a_model_in_another_dtype(dtype):
    model = daam.DensityAdaptiveTransformer(Encoder(), daam.DATDecoder(3, FEATURES, 2, num_heads=1, conv_channels=4))
    expected = model(IDS, attention_mask=MASK).logits.double()
    model.to(dtype)
    out = model(IDS, attention_mask=MASK, labels=torch.tensor([0, 1, 0]))
    assert out.logits.dtype == dtype
    close(out.logits.double(), expected, "logits", (5e-2, 5e-2))
    out.loss.backward()
    assert all(p.grad.isfinite().all() for p in model.trainable_parameters())


# A5, A6: what is measured


def collate(texts):
    length = max(map(len, texts))
    ids = torch.tensor([[ord(c) % 29 + 1 for c in text] + [0] * (length - len(text)) for text in texts])
    return {"input_ids": ids, "attention_mask": (ids > 0).long()}


TEXTS = ["abcde", "fg", "hijklmnop", "qr", "stu", "vwx"]


def checked(encoder, texts=TEXTS, collate=collate):
    return daam.LayerPooling(encoder).check(collate, texts)


def test_an_encoder_that_depends_on_nothing():
    findings = checked(Encoder())
    assert findings.batches == "any" and findings.padding < 1e-5 and findings.positions == (2, 9)
    assert str(findings).startswith("checked on 6 examples of 2 to 9 positions: calls agree, masks fit, beside others")


class Mixes(Encoder):
    """Run layers whose every position sees all others of its example, padding too."""

    def forward(self, input_ids, attention_mask=None):
        x = self.embed(input_ids)
        for layer in self.layers:
            x = layer(x) + x.mean(1, keepdim=True)


class MixesExamples(Encoder):
    def forward(self, input_ids, attention_mask=None):
        x = self.embed(input_ids)
        for layer in self.layers:
            x = layer(x) + 0.1 * x.mean((0, 1))


class OneAtATime(Encoder):
    def forward(self, input_ids, attention_mask=None):
        if len(input_ids) > 1:
            raise TypeError("one image, please")
        return super().forward(input_ids)


def test_padding_that_counts():
    findings = checked(Mixes())
    assert findings.batches == "equal lengths" and findings.padding > 1e-2
    assert str(findings).endswith("standard deviations: equal lengths share a batch")
    findings = checked(Mixes(), ["a", "bc", "def"])
    assert findings.batches == "one at a time", "no two have equal lengths: nothing says that these may share a batch"


def test_a_feature_that_is_large_everywhere_hides_nothing():
    encoder = Mixes().to(torch.bfloat16)
    with torch.no_grad():
        encoder.embed.weight[:, 0] = 300
    assert checked(encoder).batches != "any"


def test_layers_that_give_features_first():
    class Convolutions(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList(nn.Conv1d(FEATURES, FEATURES, 1) for _ in range(2))
            self.embed = nn.Embedding(30, FEATURES)

        def forward(self, input_ids):
            x = self.embed(input_ids).transpose(1, 2)
            for layer in self.layers:
                x = layer(x)

    def unmasked(texts):
        return {"input_ids": collate(texts)["input_ids"]}

    with pytest.raises(ValueError, match=r"examples have features of shapes \(2, 2\), \(2, 3\), \(2, 5\), \(2, 9\)"):
        checked(Convolutions(), collate=unmasked)


def test_batches_that_count():
    findings = checked(MixesExamples())
    assert findings.batches == "one at a time" and str(findings).endswith(": one example at a time")
    findings = checked(OneAtATime())
    assert findings.batches == "one at a time" and findings.padding is None
    assert "a batch fails (one image, please): one example at a time" in str(findings)


def test_patches_of_an_image_are_no_positions_first():
    """Check that MobileViT's (batch·4, patches, features) is not taken for positions first."""

    class Patches(Encoder):
        def forward(self, pixel_values):
            x = pixel_values.reshape(-1, 4, FEATURES)
            for layer in self.layers:
                x = layer(x)

    pooling = daam.LayerPooling(Patches())
    with pytest.raises(ValueError, match=r"shape \(5, 4, 16\) for a batch of 1, expected \(1, positions, features\)"):
        pooling.check(lambda images: {"pixel_values": torch.stack(images)}, [torch.randn(5, 64) for _ in range(3)])
    assert pooling.batch_first is None


def test_layers_that_give_positions_first_are_found():
    pooling = daam.LayerPooling(PositionsFirst())
    assert pooling.check(collate, TEXTS).batches == "any" and pooling.batch_first is False
    batch = collate(TEXTS)
    close(pooling(**batch), average_alone(pooling.encoder, batch["input_ids"], batch["attention_mask"]), "averages")


class Draws(Encoder):
    def forward(self, input_ids, attention_mask=None):
        return super().forward(torch.where(torch.rand(input_ids.shape) < 0.3, 0, input_ids))


class Remembers(Encoder):
    """Embed as BigBird, which for good takes another attention once an example is short."""

    short = False

    def forward(self, input_ids, attention_mask=None):
        self.short |= input_ids.shape[1] < 3
        return super().forward(input_ids // 2 if self.short else input_ids)


class DrawsForShort(Encoder):
    def forward(self, input_ids, attention_mask=None):
        if input_ids.shape[1] < 4:
            input_ids = torch.where(torch.rand(input_ids.shape) < 0.3, 0, input_ids)
        return super().forward(input_ids)


class Alternates(Encoder):
    calls = 0

    def forward(self, input_ids, attention_mask=None):
        self.calls += 1
        return super().forward(input_ids // 2 if self.calls % 2 else input_ids)


def constant(texts):
    return {"input_ids": torch.ones(len(texts), 3, dtype=torch.long)}


@pytest.mark.parametrize(
    ("encoder", "texts", "collate", "message"),
    [
        (
            Draws(),
            TEXTS,
            collate,
            "two calls on one example differ by .* the encoder, or what prepares its input, draws",
        ),
        (
            Remembers(),
            TEXTS,
            collate,
            "two calls on one example differ by .* draws at random, or remembers other calls",
        ),
        (DrawsForShort(), TEXTS, collate, "two calls on one example differ by"),
        (Alternates(), TEXTS, collate, "two calls on one example differ by"),
        (Encoder(), TEXTS, constant, "6 different examples have 1 different features, expected as many"),
        (Frames(2, 1), [torch.ones(80), torch.zeros(80)], None, "80 entries makes 20 frames, and layers have 10"),
        (Encoder(), ["abc"], collate, "1 examples, expected two or more to compare"),
    ],
)
def test_what_no_batch_mends(encoder, texts, collate, message):
    if collate is None:

        def collate(sounds):
            return {"input_values": torch.stack(sounds), "attention_mask": torch.ones(len(sounds), 80)}

    with pytest.raises(ValueError, match=message):
        checked(encoder, texts, collate)


def test_features_that_are_not_finite():
    encoder = Encoder()
    with torch.no_grad():
        encoder.embed.weight[ord("h") % 29 + 1] = float("inf")
        encoder.layers[0].linear.weight.abs_()
        encoder.layers[0].forward = encoder.layers[0].linear.forward
    with pytest.raises(ValueError, match="features of example 2 hold NaN or inf"):
        checked(encoder)


def test_equal_examples_may_have_equal_features():
    assert checked(Encoder(), ["abc"] * 3 + ["de"]).batches == "any"


def test_the_first_examples_are_tried():
    seen = []

    def watch(texts):
        seen.extend(texts)
        return collate(texts)

    check_encoder(daam.LayerPooling(Encoder()), watch, [f"{'abcdefgh'[i % 8]}{i}" for i in range(40)])
    assert set(seen) == {f"{'abcdefgh'[i % 8]}{i}" for i in range(TRIED)}
