"""Hugging Face's encoders, tiny and random, from a folder to features: what would be wrong without a word, and errors.

Right values are averages of `output_hidden_states`, or of what the layers themselves give, of each example alone.
"""

import json
import os
import shutil

import numpy as np
import pytest
import torch

os.environ["HF_HUB_OFFLINE"] = "1"  # read when transformers is imported: nothing here downloads
pytest.importorskip("safetensors")
pytest.importorskip("tqdm")
pytest.importorskip("transformers")
pytest.importorskip("PIL")
pytest.importorskip("soundfile")
pytest.importorskip("soxr")

import soundfile
import transformers
from helpers import close
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers, processors

import daam
from daam.recipes import features
from daam.recipes.cache import read_cache
from daam.recipes.encoders import EncoderError, load_encoder

SIZES = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 37}
WORDS = ["the", "rain", "snow", "wind", "and", "bread", "soup", "cheese", "is", "cold", "warm", "today"]
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
TEXTS = [
    ("rain", "weather"), ("the soup is warm and the bread is cold", "food"), ("snow and wind today", "weather"),
    ("cheese", "food"), ("the wind is cold today and the rain is warm", "weather"), ("bread and cheese", "food"),
]  # fmt: skip


@pytest.fixture(autouse=True)
def seed():
    """Seed the generator, and run on one thread: on tensors this small several threads wait for each other."""
    threads = torch.get_num_threads()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def save_tokenizer(folder, **options):
    """Save a tokenizer of whole words to a folder, and return it."""
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(SPECIAL + WORDS)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        "[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names | options)
    fast.save_pretrained(folder)
    return fast


def save_model(folder, name, preparation=None, **changes):
    """Save a random model of tiny sizes to a folder, and return it. Its weights are large enough for positions to
    matter.
    """
    config = getattr(transformers, f"{name}Config")(**changes)
    model = getattr(transformers, f"{name}Model")(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(4)
        for name, buffer in model.named_buffers():
            if "running" in name:  # of batch normalisation, as training leaves them
                buffer.uniform_(0.5, 1.5)
    model.save_pretrained(folder)
    if preparation is not None:
        preparation.save_pretrained(folder)
    return model


def text_model(folder, name="Bert", tokenizer=True, **changes):
    if tokenizer:
        save_tokenizer(folder)
    return save_model(folder, name, **SIZES | {"vocab_size": len(SPECIAL + WORDS), "pad_token_id": 0} | changes)


SPEECH = {
    **SIZES, "conv_dim": (16, 16), "conv_kernel": (10, 8), "conv_stride": (5, 4), "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 2,
}  # fmt: skip


def speech_model(folder, name, **changes):
    extractor = transformers.Wav2Vec2FeatureExtractor(return_attention_mask=False)
    return save_model(folder, name, extractor, **SPEECH | changes)


@pytest.fixture
def texts(tmp_path):
    path = tmp_path / "texts.csv"
    path.write_text("text,label\n" + "".join(f"{text},{label}\n" for text, label in TEXTS))
    return path


@pytest.fixture
def sounds(tmp_path):
    """Write four sounds of two classes, and return their folder; files come back in the order of features."""
    noise, folder = np.random.default_rng(0), tmp_path / "sounds"
    for i, length in enumerate((4000, 2500, 3333, 700)):
        (folder / "ab"[i % 2]).mkdir(parents=True, exist_ok=True)
        soundfile.write(folder / "ab"[i % 2] / f"{i}.wav", noise.normal(0, 0.1, length), 16000)
    return folder


@pytest.fixture
def command(tmp_path, capsys):
    """Run the recipe; return the cache and what was printed, or the line of its error."""

    def run(data, encoder, *options, error=False, cache=None):
        cache = cache or tmp_path / "cache"
        arguments = [data, "--output", cache, "--encoder", encoder, *options]
        capsys.readouterr()
        if not error:
            features.main([*map(str, arguments)])
            return read_cache(cache), capsys.readouterr().out
        with pytest.raises(SystemExit) as stopped:
            features.main([*map(str, arguments)])
        line = capsys.readouterr().err.splitlines()[-1]
        assert stopped.value.code == 2 and line.startswith("error: ")
        return line

    return run


def shards(tmp_path):
    return sorted(path.name for path in (tmp_path / "cache").glob("*.safetensors"))


@torch.no_grad()
def layers_alone(model, layers, batches):
    """Return (examples, layers, features) by hooks of this file, over all positions of each example alone."""
    found = []
    for batch in batches:
        outputs = []

        def keep(layer, args, output, outputs=outputs):
            outputs.append(output if isinstance(output, torch.Tensor) else output[0])

        hooks = [layer.register_forward_hook(keep) for layer in layers]
        model(**batch)
        for hook in hooks:
            hook.remove()
        found.append(torch.stack([hidden[0].double().mean(0) for hidden in outputs]).float())
    return torch.stack(found)


def text_batches(folder, **options):
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    for text, _ in TEXTS:
        batch = tokenizer([text], return_tensors="pt")
        yield {key: value for key, value in batch.items() if key in ("input_ids", *options)} | options


def sound_batches(folder, paths):
    for path in sorted(paths.rglob("*.wav")):
        samples = torch.tensor(soundfile.read(path)[0], dtype=torch.float32)
        yield {"input_values": ((samples - samples.mean()) / (samples.var(correction=0) + 1e-7).sqrt())[None]}


# A1: tokenizers


@pytest.mark.parametrize("name", ["Bert", "Roberta", "XLMRoberta", "DebertaV2", "T5", "GPT2", "Albert", "Gemma"])
def test_a_folder_without_vocabulary(name, texts, command, tmp_path):
    changes = {"T5": {"d_model": 32, "num_layers": 2, "d_kv": 16, "num_heads": 2}, "Gemma": {"head_dim": 16}}
    model = tmp_path / "model"
    text_model(model, name, tokenizer=False, vocab_size=128, **changes.get(name, {}))
    line = command(texts, model, error=True)
    assert "vocabulary" in line or "tokenizer" in line or "no preprocessing of text" in line
    assert not (tmp_path / "cache").exists()


def test_a_tokenizer_of_another_encoder(texts, command, tmp_path):
    model = tmp_path / "model"
    text_model(model, vocab_size=3000)
    assert "the tokenizer has 17 tokens, 4 of them special, expected about the encoder's 3000" in command(
        texts, model, error=True
    )
    shutil.rmtree(model)
    text_model(model)
    texts.write_text("text,label\nun deux,a\nquatre cinq six,b\nsept,a\nonze douze,b\n")
    line = command(texts, model, error=True)
    assert "the tokenizer does not know 8 of 8 tokens of the 4 texts" in line
    assert not (tmp_path / "cache").exists()


def test_texts_that_are_unknown_in_part(texts, command, tmp_path):
    """Check that unknown words are counted in all of a sorted table, whose first texts tell nothing."""
    text_model(tmp_path / "model")
    with texts.open("a") as file:
        file.writelines(f"{'rain and ' * (i % 5 + 1)}{'wind ' * (i % 3)},weather\n" for i in range(12))
        file.write("雨,weather\n雪 雨,weather\n")
    _, printed = command(texts, tmp_path / "model")
    assert "2 of 20 texts are mostly of tokens that the tokenizer does not know" in printed


@pytest.mark.parametrize("special", [True, False])
def test_texts_without_tokens(special, texts, command, tmp_path):
    model = tmp_path / "model"
    text_model(model)
    if special:
        line = command(texts, model, "--max-length", 2, error=True)
        assert "max_length is 2, expected 3 or more: 2 tokens are special" in line
    else:
        tokenizer = json.loads((model / "tokenizer.json").read_text())
        normalizer = {"type": "Replace", "pattern": {"String": "rain"}, "content": ""}
        changed = {**tokenizer, "post_processor": None, "normalizer": normalizer}
        (model / "tokenizer.json").write_text(json.dumps(changed))
        assert "text 'rain' has no tokens, expected one or more" in command(texts, model, error=True)
    assert not (tmp_path / "cache").exists()


# A2, B3, C1 and what is made to work: text


FAMILIES = {
    "Bert": ({}, "encoder.layer"),
    "Albert": ({"embedding_size": 16}, None),
    "GPT2": ({"n_positions": 64}, "h"),
    "Llama": ({"num_key_value_heads": 1}, "layers"),
    "XLNet": ({"d_model": 32, "n_layer": 3, "n_head": 2, "d_inner": 37}, None),
    "Longformer": ({"attention_window": 8}, None),
}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("asks", [True, False], ids=["tokenizer asks for a mask", "does not"])
def test_texts(family, asks, texts, command, tmp_path):
    """Check that padding is left out, whatever the tokenizer says of masks."""
    model, (changes, layers) = tmp_path / "model", FAMILIES[family]
    encoder = text_model(model, family, **changes)
    if not asks:
        config = json.loads((model / "tokenizer_config.json").read_text())
        (model / "tokenizer_config.json").write_text(json.dumps({**config, "model_input_names": ["input_ids"]}))
    cache, printed = command(texts, model, "--batch", 4)
    assert "calls agree, masks fit" in printed and "beside others" in printed
    if layers is None:
        states = [encoder(**batch, output_hidden_states=True).hidden_states[1:] for batch in text_batches(model)]
        expected = torch.stack([torch.stack([h[0].mean(0) for h in text]) for text in states]).detach()
    else:
        expected = layers_alone(encoder, encoder.get_submodule(layers), text_batches(model))
    close(cache.features, expected, "features", (1e-5, 1e-5))
    assert cache.about["checked"]["batches"] == "any"


def test_as_many_examples_as_tokens(tmp_path):
    """Check that XLNet's layout, (positions, batch, features), is found where sizes do not tell it."""
    encoder = text_model(tmp_path, "XLNet", d_model=32, n_layer=3, n_head=2, d_inner=37)
    ids = torch.randint(5, 17, (4, 4))
    with torch.no_grad():
        states = [encoder(row[None], output_hidden_states=True).hidden_states[1:] for row in ids]
    expected = torch.stack([torch.stack([h[0].mean(0) for h in row]) for row in states])
    close(daam.LayerPooling(encoder)(ids), expected, "features", (1e-5, 1e-5))


@pytest.mark.parametrize("masked", [True, False])
def test_longformers_own_padding_does_not_count(masked, tmp_path):
    encoder = text_model(tmp_path, "Longformer", attention_window=8)
    ids = torch.randint(5, 17, (1, 5))
    with torch.no_grad():
        hidden = encoder(ids, output_hidden_states=True).hidden_states[1:]
    assert hidden[0].shape[1] == 5
    expected = torch.stack([h[0].mean(0) for h in hidden])[None]
    mask = {"attention_mask": torch.ones_like(ids)} if masked else {}
    close(daam.LayerPooling(encoder)(ids, **mask), expected, "features", (1e-5, 1e-5))


@pytest.mark.parametrize("name", ["T5", "Bart"])
def test_the_encoder_of_an_encoder_decoder(name, texts, command, tmp_path):
    sizes = {
        "T5": {"d_model": 32, "num_layers": 3, "d_kv": 16, "num_heads": 2, "d_ff": 37},
        "Bart": {"d_model": 32, "encoder_layers": 3, "encoder_attention_heads": 2, "decoder_layers": 1,
                 "decoder_attention_heads": 2, "encoder_ffn_dim": 37, "decoder_ffn_dim": 37},
    }[name]  # fmt: skip
    encoder = text_model(tmp_path / "model", name, **sizes).get_encoder()
    cache, _ = command(texts, tmp_path / "model")
    layers = encoder.block if name == "T5" else encoder.layers
    close(cache.features, layers_alone(encoder, layers, text_batches(tmp_path / "model")), "features", (2e-5, 2e-5))


def test_an_encoder_of_one_layer(texts, command, tmp_path):
    encoder = text_model(tmp_path / "model", num_hidden_layers=1)
    cache, _ = command(texts, tmp_path / "model")
    expected = layers_alone(encoder, encoder.encoder.layer, text_batches(tmp_path / "model"))
    close(cache.features, expected, "features", (1e-5, 1e-5))


def test_left_padding_of_decoders(tmp_path):
    """Check that a mask marks padding on either side."""
    encoder = text_model(tmp_path, "Llama", num_key_value_heads=1)
    ids, mask = torch.randint(5, 17, (2, 6)), torch.tensor([[1] * 6, [0, 0, 1, 1, 1, 1]])
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    found = daam.LayerPooling(encoder)(ids, attention_mask=mask, position_ids=positions)
    expected = layers_alone(encoder, encoder.layers, [{"input_ids": ids[:1]}, {"input_ids": ids[1:, 2:]}])
    close(found, expected, "features", (1e-5, 1e-5))


# A5: padding that shows


def test_fnet_mixes_padding(texts, command, tmp_path):
    encoder = text_model(tmp_path / "model", "FNet")
    cache, printed = command(texts, tmp_path / "model")
    expected = layers_alone(encoder, encoder.encoder.layer, text_batches(tmp_path / "model"))
    close(cache.features, expected, "features", (1e-5, 1e-5))
    assert "equal lengths share a batch" in printed and cache.about["checked"]["batches"] == "equal lengths"
    assert cache.about["checked"]["padding"] > 1e-2


LAYERS_NORM = {"feat_extract_norm": "layer", "do_stable_layer_norm": True}
SQUEEZED = {"feat_extract_norm": "layer", "squeeze_factor": 2}
FAMILIES_OF_SPEECH = {
    "Wav2Vec2": (LAYERS_NORM, "any"),
    "SEW": (SQUEEZED, None),
    "SEWD": (SQUEEZED, None),
    "Hubert": ({**LAYERS_NORM, "conv_pos_batch_norm": True}, "one at a time"),
    "Data2VecAudio": ({"conv_pos_kernel_size": 3}, "one at a time"),
    "WavLM": ({"feat_extract_norm": "group"}, "one at a time"),
    "Wav2Vec2Conformer": ({"feat_extract_norm": "layer"}, None),
}


@pytest.mark.filterwarnings("ignore:Support for mismatched key_padding_mask")  # transformers' own
@pytest.mark.parametrize("family", FAMILIES_OF_SPEECH)
def test_sounds(family, sounds, command, tmp_path):
    """Check that features are those of each sound alone: in a batch where it makes no difference, else one by one."""
    changes, batches = FAMILIES_OF_SPEECH[family]
    encoder = speech_model(tmp_path / "model", family, **changes)
    cache, printed = command(sounds, tmp_path / "model")
    layers = encoder.encoder.encoder.layer if family == "SEWD" else encoder.encoder.layers
    expected = layers_alone(encoder, layers, sound_batches(tmp_path / "model", sounds))
    close(cache.features, expected, "features", (1e-4, 1e-4))
    assert batches in (None, cache.about["checked"]["batches"])
    assert ("one example at a time" in printed) == (cache.about["checked"]["batches"] == "one at a time")


def test_lora_is_refused_where_padding_counts(texts, command, tmp_path):
    pytest.importorskip("peft")
    from daam.recipes.lora import lora_job
    from daam.recipes.runs import RunError, Settings

    model = tmp_path / "model"
    text_model(model, "FNet")
    cache, _ = command(texts, model)
    with pytest.raises(RunError, match=r"depend on the batch they stand in: LoRA would learn that \(checked on 6"):
        lora_job(texts, str(model), cache, Settings("lora"))
    text_model(model, "FNet")  # other weights
    with pytest.raises(EncoderError, match=r"encoder .*model: its encoder_sha256 is .*, expected the cache's"):
        lora_job(texts, str(model), cache, Settings("lora"))


# A4: frames


@pytest.mark.parametrize("family", ["SEW", "SEWD"])
def test_layers_on_means_of_frames(family, tmp_path):
    """Check that an example alone is the same in a batch where its frames are even in number; of odd ones SEW sees half
    a frame of padding, which is measured.
    """
    encoder = speech_model(tmp_path, family, **SQUEEZED)
    sound, mask = torch.randn(2, 2000), torch.ones(2, 2000, dtype=torch.long)
    mask[1, 1240:] = 0
    found = daam.LayerPooling(encoder)(sound * mask, attention_mask=mask)
    layers = encoder.encoder.encoder.layer if family == "SEWD" else encoder.encoder.layers
    expected = layers_alone(encoder, layers, [{"input_values": sound[:1]}, {"input_values": sound[1:, :1240]}])
    close(found, expected, "features", (2e-6, 2e-6))


# A6: random features


def test_weights_whose_names_do_not_fit(texts, command, tmp_path):
    from safetensors.torch import load_file, save_file

    model = tmp_path / "model"
    text_model(model)
    path = model / "model.safetensors"
    tensors = load_file(path)
    renamed = {name.replace("encoder.layer.1.", "encoder.block.1."): t for name, t in tensors.items()}
    save_file(renamed, path, metadata={"format": "pt"})
    line = command(texts, model, error=True)
    assert "its files lack 16 tensors of the encoder, encoder.layer.1." in line and "would be random" in line
    assert not (tmp_path / "cache").exists()
    # of what no layer sees, nothing is said
    kept = {name: t for name, t in tensors.items() if not name.startswith("pooler.")}
    assert len(kept) < len(tensors)
    save_file(kept, path, metadata={"format": "pt"})
    first, _ = command(texts, model)
    repeated, _ = command(texts, model)  # what is drawn at random does not tell one cache from another
    assert torch.equal(first.features, repeated.features)


def test_an_encoder_that_draws(command, tmp_path):
    """Check that ViTMAE, which leaves out patches at random whatever its mode, is refused."""
    processor = transformers.ViTImageProcessor(size={"height": 16, "width": 16})
    save_model(tmp_path / "model", "ViTMAE", processor, **SIZES, image_size=16, patch_size=4,
               decoder_hidden_size=16, decoder_num_attention_heads=2, decoder_num_hidden_layers=1)  # fmt: skip
    line = command(images(tmp_path), tmp_path / "model", error=True)
    assert "two calls on one example differ by" in line and "draws at random" in line
    assert not (tmp_path / "cache").exists()


# A7: identity


def test_a_cache_does_not_outlive_its_encoder(texts, command, tmp_path):
    model = tmp_path / "model"
    text_model(model)
    command(texts, model, "--shard", 2)
    command(texts, model, "--shard", 2)  # unchanged
    (tmp_path / "cache" / "00001.safetensors").unlink()
    torch.manual_seed(1)
    text_model(model)  # trained on, say
    line = command(texts, model, "--shard", 2, error=True)
    assert "cache.json is of another cache: its encoder_sha256 is" in line
    assert shards(tmp_path) == ["00000.safetensors", "00002.safetensors"]
    torch.manual_seed(0)
    text_model(model)
    command(texts, model, "--shard", 2)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "layer_norm_eps": 1e-3}))
    assert "its encoder_sha256 is" in command(texts, model, "--shard", 2, error=True)
    (model / "config.json").write_text(json.dumps(config))
    tokenizer = json.loads((model / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["rain"], vocabulary["snow"] = vocabulary["snow"], vocabulary["rain"]
    (model / "tokenizer.json").write_text(json.dumps(tokenizer))
    assert "its preparation_sha256 is" in command(texts, model, "--shard", 2, error=True)


def test_an_own_encoder_is_known_by_its_weights(tmp_path):
    from daam.recipes.data import Example

    def collate(texts):
        return {"x": torch.tensor([[[float(len(text))] * 4] * 3 for text in texts])}

    class Own(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = torch.nn.ModuleList(torch.nn.Linear(4, 4) for _ in range(2))

        def forward(self, x):
            return self.layers[1](self.layers[0](x))

    examples = [Example("a" * n, "ab"[n % 2]) for n in range(1, 5)]
    about = {"encoder": "own", "modality": "text"}
    encoder = Own()
    features.extract(daam.LayerPooling(encoder), collate, examples, tmp_path, about=about)
    with torch.no_grad():
        encoder.layers[0].bias += 1
    with pytest.raises(ValueError, match="of another cache: its encoder_sha256 is"):
        features.extract(daam.LayerPooling(encoder), collate, examples, tmp_path, about=about)


def test_a_cache_does_not_outlive_what_training_makes_of_its_encoder(texts, tmp_path):
    """Check that a cache is refused where the encoder has other weights, or other layers, than it was made with."""
    from daam.recipes.data import read_examples

    text_model(tmp_path / "model")
    pooling, collate = load_encoder(str(tmp_path / "model"), "text")
    examples, about = read_examples(texts)[1], {"encoder": "model", "modality": "text"}
    features.extract(pooling, collate, examples, tmp_path / "cache", about=about)
    compiled = daam.LayerPooling(torch.compile(pooling.encoder, backend="eager"))
    features.extract(compiled, collate, examples, tmp_path / "cache", about=about)
    names = "encoder.layer.1,encoder.layer.0,encoder.layer.2"
    with pytest.raises(ValueError, match="of another cache: its encoder_sha256 is"):
        reordered = daam.LayerPooling(pooling.encoder, names)
        features.extract(reordered, collate, examples, tmp_path / "cache", about=about)
    with torch.no_grad():
        pooling.encoder.encoder.layer[0].output.dense.weight.add_(0.1)
    with pytest.raises(ValueError, match="of another cache: its encoder_sha256 is"):
        features.extract(pooling, collate, examples, tmp_path / "cache", about=about)


@pytest.mark.filterwarnings("ignore:Support for mismatched key_padding_mask")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_with_a_tensor_missing(dtype, sounds, command, tmp_path):
    """Check a checkpoint that lacks a tensor which only pretraining needs, as published ones do."""
    from safetensors.torch import load_file, save_file

    speech_model(tmp_path / "model", "Wav2Vec2", **LAYERS_NORM)
    path = tmp_path / "model" / "model.safetensors"
    tensors = {name: t.to(dtype) for name, t in load_file(path).items() if name != "masked_spec_embed"}
    save_file(tensors, path, metadata={"format": "pt"})
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    (tmp_path / "model" / "config.json").write_text(json.dumps({**config, "dtype": str(dtype)[6:]}))
    cache, _ = command(sounds, tmp_path / "model")
    assert cache.features.isfinite().all()


def test_a_cache_inside_its_data(command, tmp_path):
    line = command(images(tmp_path), "model", error=True, cache=tmp_path / "images" / "cache")
    assert "images/cache is in" in line and "expected a folder of its own" in line


# B2, B16: errors in one line, notices


def test_weights_that_do_not_load(texts, command, tmp_path):
    model = tmp_path / "model"
    text_model(model)
    path = model / "model.safetensors"
    whole = path.read_bytes()
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 132\n"
    for content in (pointer, whole[:-100], b""):
        path.write_bytes(content)
        line = command(texts, model, error=True)
        assert "no encoder in" in line and str(model) in line
    path.unlink()
    assert "no encoder in" in command(texts, model, error=True)
    path.write_bytes(whole)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "hidden_size": 48, "num_attention_heads": 3}))
    assert "no encoder in" in command(texts, model, error=True)


@pytest.mark.parametrize(("name", "positions", "limit"), [("Bert", 12, 12), ("Roberta", 14, 13)])
def test_texts_longer_than_the_positions(name, positions, limit, texts, command, tmp_path):
    """Check that texts are cut where positions end: the first of RoBERTa's positions are padding's."""
    model = tmp_path / "model"
    encoder = text_model(model, name, max_position_embeddings=positions)
    with texts.open("a") as file:
        file.write("rain and snow and wind and rain and snow and wind and rain and snow and wind and rain,weather\n")
    cache, printed = command(texts, model)
    assert f"1 of these examples are longer than {limit} tokens: cut off there" in printed
    batches = [{k: v for k, v in b.items() if k == "input_ids"} for b in text_batches(model)]
    close(cache.features[:6], layers_alone(encoder, encoder.encoder.layer, batches), "features", (1e-5, 1e-5))
    for length in (limit, limit + 1, 128):  # what an encoder cannot take is told, and as many as it can are taken
        other, printed = command(texts, model, "--max-length", length, cache=tmp_path / str(length))
        told = f"max_length is {length}, but the encoder takes {limit} tokens: longer texts are cut off there\n"
        assert (told in printed) == (length > limit)
        assert torch.equal(other.features, cache.features) and other.about["max_length"] == limit


def test_layers_that_are_none(texts, command, tmp_path):
    text_model(tmp_path / "model")
    line = command(texts, tmp_path / "model", "--layers", "nothing.here", error=True)
    assert "model: layers: BertModel has no attribute `nothing`" in line


def images(tmp_path, size=16):
    noise, folder = np.random.default_rng(0), tmp_path / "images"
    for i in range(5):
        (folder / "ab"[i % 2]).mkdir(parents=True, exist_ok=True)
        pixels = noise.integers(0, 256, (size, size, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / "ab"[i % 2] / f"{i}.png")
    return folder


def test_resnet_is_refused(command, tmp_path):
    """Check that stages that give (batch, channels, height, width), of several widths, are refused."""
    processor = transformers.ViTImageProcessor(size={"height": 32, "width": 32})
    save_model(tmp_path / "model", "ResNet", processor, embedding_size=8, hidden_sizes=[8, 16], depths=[1, 2],
               layer_type="basic")  # fmt: skip
    line = command(images(tmp_path), tmp_path / "model", error=True)
    assert "a layer's output has shape (1, 8, 8, 8), expected (batch, positions, features)" in line


TOWER = {"hidden_size": 32, "intermediate_size": 37, "num_hidden_layers": 3, "num_attention_heads": 2}
TEXT_TOWER = {
    **TOWER, "vocab_size": 17, "max_position_embeddings": 32, "eos_token_id": 3, "pad_token_id": 0, "bos_token_id": 2,
}  # fmt: skip


@pytest.mark.parametrize("name", ["CLIP", "Siglip"])
@pytest.mark.parametrize("modality", ["text", "vision"])
@pytest.mark.parametrize("named", [False, True])
def test_models_of_two_modalities(name, modality, named, texts, command, tmp_path):
    """Check that the part that the data needs is taken, and that its layers may be named as they are in the whole
    model.
    """
    model = tmp_path / "model"
    save_tokenizer(model, model_max_length=32)
    processor = transformers.CLIPImageProcessor(
        size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}, do_center_crop=True
    )
    whole = save_model(
        model, name, processor, text_config=TEXT_TOWER, vision_config={**TOWER, "image_size": 16, "patch_size": 4}
    )
    part = whole.text_model if modality == "text" else whole.vision_model
    options = ["--layers", f"{modality}_model.encoder.layers"] if named else []
    data = texts if modality == "text" else images(tmp_path)
    cache, _ = command(data, model, *options)
    if modality == "text":
        batches = text_batches(model)
    else:
        batches = (processor(Image.open(path), return_tensors="pt") for path in sorted(data.rglob("*.png")))
    close(cache.features, layers_alone(part, part.encoder.layers, batches), "features", (1e-4, 1e-4))


def test_a_text_mask_is_not_laid_on_patches(tmp_path):
    """Check a text with as many tokens as there are patches and a class token."""
    whole = save_model(
        tmp_path, "CLIP", text_config=TEXT_TOWER, vision_config={**TOWER, "image_size": 8, "patch_size": 4}
    )
    ids, pixels, mask = torch.randint(5, 17, (2, 5)), torch.randn(2, 3, 8, 8), torch.tensor([[1] * 5, [1, 1, 1, 0, 0]])
    call = {"input_ids": ids, "pixel_values": pixels, "attention_mask": mask}
    pooling = daam.LayerPooling(whole, "vision_model.encoder.layers")
    with pytest.raises(ValueError, match=r"which positions of vision_model\.encoder\.layers\.0 are valid is not clear"):
        pooling(**call)
    vision = whole.vision_model
    expected = layers_alone(vision, vision.encoder.layers, [{"pixel_values": image[None]} for image in pixels])
    close(pooling(**call, pooling_mask="all"), expected, "patches", (1e-5, 1e-5))
    text_model = whole.text_model
    expected = layers_alone(text_model, text_model.encoder.layers, [{"input_ids": ids[:1]}, {"input_ids": ids[1:, :3]}])
    close(daam.LayerPooling(whole, "text_model.encoder.layers")(**call), expected, "tokens", (1e-5, 1e-5))


def test_pixels_that_are_padding(tmp_path):
    """Check that SigLIP2, which takes pictures of several sizes, has its mask of patches used."""
    model = save_model(tmp_path, "Siglip2Vision", **TOWER, patch_size=4, num_patches=16)
    pixels, shapes = torch.randn(2, 16, 48), torch.tensor([[4, 4], [2, 3]])
    mask = torch.tensor([[1] * 16, [1] * 6 + [0] * 10])
    call = {"pixel_values": pixels, "pixel_attention_mask": mask, "spatial_shapes": shapes}
    layers = "encoder.layers" if hasattr(model, "encoder") else "vision_model.encoder.layers"
    found = daam.LayerPooling(model, layers)(**call)
    batches = [
        {
            "pixel_values": pixels[i, None, :n],
            "pixel_attention_mask": mask[i, None, :n],
            "spatial_shapes": shapes[i, None],
        }
        for i, n in enumerate((16, 6))
    ]
    close(found, layers_alone(model, model.get_submodule(layers), batches), "patches", (1e-4, 1e-4))


def test_long_sounds_are_cut_and_counted(command, tmp_path):
    noise, folder = np.random.default_rng(0), tmp_path / "long"
    for i, seconds in enumerate((0.5, 2.0, 1.0, 0.25)):
        (folder / "ab"[i % 2]).mkdir(parents=True, exist_ok=True)
        soundfile.write(folder / "ab"[i % 2] / f"{i}.flac", noise.normal(0, 0.1, int(8000 * seconds)), 8000)
    encoder = speech_model(tmp_path / "model", "Wav2Vec2", **LAYERS_NORM)
    cache, printed = command(folder, tmp_path / "model", "--max-seconds", 0.6)
    assert "2 of these examples are longer than 0.6 seconds: cut off there" in printed
    _, collate = load_encoder(str(tmp_path / "model"), "speech", max_seconds=0.6)
    assert collate([folder / "b" / "1.flac"])["input_values"].shape == (1, 9600), "resampled to 16 kHz"
    assert cache.features.shape == (4, 3, 32) and encoder.config.hidden_size == 32


def test_an_encoder_that_looks_at_its_first_window_only(command, tmp_path):
    """Check that sounds longer than AST's spectrograms, which have a fixed length, are reported."""
    noise, folder = np.random.default_rng(0), tmp_path / "long"
    for i, seconds in enumerate((0.5, 2.0, 0.3)):
        (folder / "ab"[i % 2]).mkdir(parents=True, exist_ok=True)
        soundfile.write(folder / "ab"[i % 2] / f"{i}.wav", noise.normal(0, 0.1, int(16000 * seconds)), 16000)
    pytest.importorskip("scipy")
    extractor = transformers.ASTFeatureExtractor(max_length=100, num_mel_bins=16)
    save_model(tmp_path / "model", "AST", extractor, **SIZES, patch_size=8, max_length=100, num_mel_bins=16)
    _, printed = command(folder, tmp_path / "model")
    assert "1 of these examples are longer than 1.015 seconds: cut off there" in printed


@pytest.mark.parametrize("rate", [0, "16000"])
def test_preparation_without_a_rate(rate, sounds, command, tmp_path):
    speech_model(tmp_path / "model", "Wav2Vec2", **LAYERS_NORM)
    path = tmp_path / "model" / "preprocessor_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "sampling_rate": rate}))
    assert f"sampling_rate of its preprocessing is {rate!r}" in command(sounds, tmp_path / "model", error=True)


def test_errors_name_the_encoder(texts, command, tmp_path):
    with pytest.raises(EncoderError, match="no encoder in 'no-such-model': expected a folder, a model of the hub, or"):
        load_encoder("no-such-model", "text")
    with pytest.raises(EncoderError, match="no encoder in '__main__'"):
        load_encoder("__main__", "text")
    (tmp_path / "empty").mkdir()
    assert "no encoder in" in command(texts, tmp_path / "empty", error=True)


def test_an_encoder_that_fails_and_a_bug_of_ours(texts, command, tmp_path, monkeypatch):
    text_model(tmp_path / "model")

    def fails(self, *args, **kwargs):
        return torch.zeros(2) + torch.zeros(3)

    with monkeypatch.context() as patch:
        patch.setattr(transformers.BertModel, "forward", fails)
        line = command(texts, tmp_path / "model", error=True)
        assert "the encoder fails (" in line and "must match the size of tensor b" in line
    monkeypatch.setattr("daam.pooling._first_tensor", lambda layer, output: None)
    with pytest.raises(AttributeError, match="'NoneType' object has no attribute"):
        command(texts, tmp_path / "model")


# B7: Hugging Face's Trainer


def test_trainer(texts, tmp_path):
    pytest.importorskip("accelerate")
    text_model(tmp_path / "model")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "model")
    encoder = transformers.AutoModel.from_pretrained(tmp_path / "model")
    decoder = daam.DATDecoder(3, 32, 2, num_heads=1, conv_channels=4)
    model = daam.DensityAdaptiveTransformer(encoder, decoder)
    rows = [{**tokenizer(text), "labels": int(label == "food"), "text": text} for text, label in TEXTS]
    arguments = transformers.TrainingArguments(
        tmp_path / "run", max_steps=2, per_device_train_batch_size=3, report_to=[], use_cpu=True, disable_tqdm=True,
        label_names=["labels"],
    )  # fmt: skip
    trainer = transformers.Trainer(
        model, arguments, train_dataset=rows, eval_dataset=rows,
        data_collator=transformers.DataCollatorWithPadding(tokenizer),
    )  # fmt: skip
    initial = {name: p.clone() for name, p in model.named_parameters()}
    trainer.train()
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, initial[name])}
    assert changed and all(name.startswith("decoder.") for name in changed)
    predictions = trainer.predict(rows)
    batch = tokenizer([text for text, _ in TEXTS], padding=True, return_tensors="pt")
    expected = model.eval()(**batch).logits
    close(torch.tensor(predictions.predictions[0]), expected.detach(), "logits", (1e-4, 1e-4))


# C3


@pytest.mark.filterwarnings("ignore:Support for mismatched key_padding_mask")
def test_a_compiled_speech_encoder(tmp_path):
    encoder = speech_model(tmp_path, "Wav2Vec2", **LAYERS_NORM)
    sound, mask = torch.randn(2, 2000), torch.ones(2, 2000, dtype=torch.long)
    mask[1, 1200:] = 0
    expected = daam.LayerPooling(encoder)(sound, attention_mask=mask)
    compiled = torch.compile(encoder, backend="eager")
    close(daam.LayerPooling(compiled)(sound, attention_mask=mask), expected, "features", (1e-5, 1e-5))
