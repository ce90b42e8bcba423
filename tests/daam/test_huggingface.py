"""The model of Hugging Face: saved and loaded to the bit, trained by the Trainer, in pipelines, made of runs."""

import csv
import json
import os
import shutil

import numpy as np
import pytest
import torch

os.environ["HF_HUB_OFFLINE"] = "1"  # read when transformers is imported: nothing here downloads
pytest.importorskip("transformers")
pytest.importorskip("accelerate")
pytest.importorskip("peft")
pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")
pytest.importorskip("PIL")
pytest.importorskip("soundfile")
pytest.importorskip("soxr")

import transformers
from helpers import close
from PIL import Image
from safetensors.torch import load_file, save_file

import daam
from daam.huggingface import DATConfig, DATForClassification
from daam.recipes import features, train
from daam.recipes.encoders import EncoderError
from daam.recipes.errors import UserError
from daam.recipes.runs import RunError

pytestmark = pytest.mark.usefixtures("one_thread")

WORDS = {"weather": ["rain", "snow", "wind"], "food": ["bread", "soup", "cheese"]}
VOCABULARY = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "and", *WORDS["weather"], *WORDS["food"]]
TEXTS = ["rain", "the soup and the bread", "snow and wind", "cheese and soup"]
SIZES = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 20}
DECODER = {"num_layers": 3, "num_features": 16, "conv_channels": 4, "standardize": True}
NAMES = {0: "food", 1: "mood", 2: "weather"}
LARGE = 4  # what random weights are multiplied by, for inputs to matter


def save_encoder(folder, name="Bert", **sizes):
    """Save a tiny random encoder to a folder, and return it."""
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**SIZES, **sizes)
    model = getattr(transformers, f"{name}Model")(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(LARGE)
    model.save_pretrained(folder)
    return model


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    """Return the folder of a text encoder with its tokenizer, not to be changed."""
    folder = tmp_path_factory.mktemp("encoder")
    save_encoder(folder, vocab_size=len(VOCABULARY))
    (folder / "vocab.txt").write_text("\n".join(VOCABULARY))
    transformers.BertTokenizer(str(folder / "vocab.txt")).save_pretrained(folder)
    return folder


@pytest.fixture
def tokenizer(kept):
    return transformers.AutoTokenizer.from_pretrained(kept)


@pytest.fixture
def batch(tokenizer):
    return tokenizer(TEXTS, padding=True, return_tensors="pt")


def make(encoder, modality="text", **options):
    """Return a model whose decoder standardises by numbers that no other has."""
    options = {"decoder_config": DECODER, "id2label": NAMES} | options
    model = DATForClassification(DATConfig(str(encoder), modality, **options)).eval()
    if model.decoder.standardize is not None:
        model.decoder.standardize.fit(3 * torch.randn(8, *map(DECODER.get, ("num_layers", "num_features"))) + 1)
    return model


def saved(model, folder, **options):
    """Return a model that was saved and loaded again."""
    model.save_pretrained(folder)
    return DATForClassification.from_pretrained(folder, **options)


def equal(result, expected):
    assert result.dtype == expected.dtype and torch.equal(result, expected)


@pytest.mark.parametrize("include", [False, True])
def test_loads_what_it_saved(include, kept, batch, tmp_path):
    encoder, labels = shutil.copytree(kept, tmp_path / "encoder"), torch.tensor([2, 0, 2, 1])
    model = make(encoder, include_encoder=include, loss="focal")
    expected = model(**batch).logits
    loaded = saved(model, tmp_path / "saved")
    found = loaded(**batch, labels=labels)
    equal(found.logits, expected)
    equal(found.loss, daam.focal_loss(expected, labels))
    keys = load_file(tmp_path / "saved/model.safetensors").keys()
    assert {"decoder.standardize.mean", "decoder.fc.weight"} <= keys
    assert any(key.startswith("pooling.") for key in keys) == include
    config = json.loads((tmp_path / "saved/config.json").read_text())
    assert config["decoder_config"].items() >= {**DECODER, "num_heads": 1, "attention": "daam"}.items()
    assert config["id2label"] == {str(i): name for i, name in NAMES.items()} and config["loss"] == "focal"
    assert config["label2id"] == {name: i for i, name in NAMES.items()}
    assert not loaded.training and not any(p.requires_grad for p in loaded.encoder.parameters())
    assert all(p.requires_grad for p in loaded.decoder.parameters())
    shutil.rmtree(encoder)
    if include:
        equal(DATForClassification.from_pretrained(tmp_path / "saved")(**batch).logits, expected)
        return
    with pytest.raises(EncoderError, match="no encoder in"):
        DATForClassification.from_pretrained(tmp_path / "saved")
    moved = DATForClassification.from_pretrained(tmp_path / "saved", encoder_name=str(kept))
    equal(moved(**batch).logits, expected)
    module = transformers.AutoModel.from_pretrained(kept)
    equal(DATForClassification.from_pretrained(tmp_path / "saved", encoder=module)(**batch).logits, expected)


def test_another_encoder_of_the_name_is_told(kept, batch, tmp_path):
    encoder = shutil.copytree(kept, tmp_path / "encoder")
    model = make(encoder)
    model.save_pretrained(tmp_path / "saved")
    tensors = load_file(encoder / "model.safetensors")
    tensors["encoder.layer.1.output.dense.weight"] *= 2
    save_file(tensors, encoder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"has SHA-256 .*its weights, or its config, are not those that the decoder"):
        DATForClassification.from_pretrained(tmp_path / "saved")
    taken = DATForClassification.from_pretrained(tmp_path / "saved", encoder_sha256=None)
    before, after = model(**batch), taken(**batch)
    equal(after.features[:, 0], before.features[:, 0])
    assert not torch.allclose(after.features[:, 1], before.features[:, 1])


def test_auto_classes(kept, batch, tmp_path):
    model = make(kept)
    expected = model(**batch).logits
    model.save_pretrained(tmp_path)
    config = transformers.AutoConfig.from_pretrained(tmp_path)
    assert type(config) is DATConfig and config.id2label == NAMES
    for task in ("", "ForSequenceClassification", "ForImageClassification", "ForAudioClassification"):
        loaded = getattr(transformers, f"AutoModel{task}").from_pretrained(tmp_path)
        assert type(loaded) is DATForClassification
        equal(loaded(**batch).logits, expected)


def test_output(kept, batch):
    model = make(
        kept, chosen=[0, 2], embeddings=True, decoder_config={**DECODER, "num_layers": 2, "standardize": False}
    )
    result = model(**batch, return_weights=True)
    assert list(result.keys()) == ["logits", "weights", "features"] and result[0] is result.logits
    hidden = transformers.AutoModel.from_pretrained(kept)(**batch, output_hidden_states=True).hidden_states
    mask = batch["attention_mask"].unsqueeze(-1)
    means = torch.stack([(hidden[i] * mask).sum(1) / mask.sum(1) for i in (0, 2)], 1)
    close(result.features, means, "features", (1e-5, 1e-5))
    logits, weights = model.decoder(result.features, return_weights=True)
    equal(result.logits, logits)
    equal(result.weights, weights)


def test_trainer(kept, tokenizer, tmp_path):
    model, rate, labels = make(kept), 0.5, [2, 0, 2, 1]
    data = [{**tokenizer(text), "labels": y, "text": text} for text, y in zip(TEXTS, labels, strict=True)]
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path), max_steps=2, per_device_train_batch_size=2, gradient_accumulation_steps=2,
        optim="sgd", learning_rate=rate, lr_scheduler_type="constant", max_grad_norm=0, logging_steps=1, save_steps=1,
        report_to=[], use_cpu=True, disable_tqdm=True,
    )  # fmt: skip
    with torch.no_grad():
        x = torch.cat([model(**tokenizer(text, return_tensors="pt")).features for text in TEXTS])
    frozen = {name: p.clone() for name, p in model.encoder.named_parameters()}
    # both steps see all examples: what the Trainer accumulates is the gradient of their mean
    twin, losses = daam.DATDecoder(**DECODER, num_classes=3), []
    twin.load_state_dict(model.decoder.state_dict())
    for _ in range(2):
        loss = torch.nn.functional.cross_entropy(twin(x), torch.tensor(labels))
        gradients = torch.autograd.grad(loss, list(twin.parameters()))
        with torch.no_grad():
            for parameter, gradient in zip(twin.parameters(), gradients, strict=True):
                parameter -= rate * gradient
        losses.append(loss.detach())

    trainer = transformers.Trainer(model=model, args=arguments, train_dataset=data, processing_class=tokenizer)
    trainer.train()
    found = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    close(torch.tensor(found), torch.stack(losses), "losses", (1e-4, 1e-5))
    assert losses[1] < losses[0] - 0.01
    for (name, parameter), expected in zip(model.decoder.named_parameters(), twin.parameters(), strict=True):
        close(parameter, expected, name, (1e-4, 1e-5))
    assert model.decoder.training and not any(module.training for module in model.encoder.modules())
    assert all(torch.equal(p, frozen[name]) and p.grad is None for name, p in model.encoder.named_parameters())

    predictions = trainer.predict(data).predictions
    close(torch.tensor(predictions), twin(x), "predictions", (1e-4, 1e-4))
    for folder in ("checkpoint-1", "checkpoint-2"):
        assert not any(key.startswith("pooling.") for key in load_file(tmp_path / folder / "model.safetensors"))
    resumed = transformers.Trainer(model=make(kept), args=arguments, train_dataset=data, processing_class=tokenizer)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    for (name, parameter), expected in zip(resumed.model.decoder.named_parameters(), twin.parameters(), strict=True):
        close(parameter, expected, name, (1e-4, 1e-5))


def check_scores(found, logits):
    expected = dict(zip(NAMES.values(), logits[0].softmax(-1).tolist(), strict=True))
    assert {entry["label"]: entry["score"] for entry in found} == pytest.approx(expected, abs=1e-6)
    assert found[0]["label"] == max(expected, key=expected.get)


def test_pipeline_of_texts(kept, tokenizer, tmp_path):
    model = saved(make(kept), tmp_path)
    classify = transformers.pipeline("text-classification", model=model, tokenizer=tokenizer, top_k=None)
    for text, found in zip(TEXTS, classify(TEXTS), strict=True):
        check_scores(found, model(**tokenizer(text, return_tensors="pt")).logits)


def other_modality(modality, folder):
    """Save an encoder of a modality to a folder; return an example, its preparation, and what that makes of it."""
    noise = np.random.default_rng(0)
    if modality == "vision":
        save_encoder(folder, "ViT", image_size=16, patch_size=8)
        prepare = transformers.ViTImageProcessor(size={"height": 16, "width": 16})
        example, options = Image.fromarray(noise.integers(0, 256, (20, 24, 3), dtype=np.uint8)), {}
    else:
        sizes = {"conv_dim": (8, 8), "conv_kernel": (10, 8), "conv_stride": (5, 4), "num_feat_extract_layers": 2}
        save_encoder(folder, "Wav2Vec2", **sizes, num_conv_pos_embeddings=16, num_conv_pos_embedding_groups=2)
        prepare = transformers.Wav2Vec2FeatureExtractor(return_attention_mask=False)
        example, options = noise.normal(0, 0.1, 2000).astype(np.float32), {"sampling_rate": 16000}
    prepare.save_pretrained(folder)
    return example, prepare, prepare(example, return_tensors="pt", **options)


@pytest.mark.parametrize("modality", ["vision", "speech"])
@pytest.mark.parametrize("include", [False, True])
def test_images_and_speech(modality, include, tmp_path):
    example, prepare, batch = other_modality(modality, tmp_path / "encoder")
    model = make(tmp_path / "encoder", modality, include_encoder=include)
    expected = model(**batch).logits
    loaded = saved(model, tmp_path / "saved")
    equal(loaded(**batch).logits, expected)
    task, role = {"vision": ("image", "image_processor"), "speech": ("audio", "feature_extractor")}[modality]
    classify = transformers.pipeline(f"{task}-classification", model=loaded, **{role: prepare})
    check_scores(classify(example), expected)
    assert loaded.main_input_name in batch
    lower = loaded.bfloat16()(**batch)  # of an input in fp32
    assert lower.logits.dtype == lower.features.dtype == torch.bfloat16 and lower.logits.isfinite().all()
    equal(lower.logits, loaded(**{name: t.bfloat16() for name, t in batch.items()}).logits)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("include", [False, True])
def test_whole_model_in_other_dtypes(dtype, include, kept, batch, tmp_path):
    model = make(kept, include_encoder=include)
    expected = model(**batch).logits
    model.to(dtype)
    found = model(**batch, labels=torch.tensor([2, 0, 2, 1]))
    assert found.loss.dtype == dtype
    close(found.logits.float(), expected, "logits", (0.05, 0.05))
    loaded = saved(model, tmp_path)
    assert loaded.dtype == dtype and {p.dtype for p in loaded.parameters()} == {dtype}
    equal(loaded(**batch).logits, found.logits)
    wide = DATForClassification.from_pretrained(tmp_path, dtype=torch.float32)
    assert {p.dtype for p in wide.parameters()} == {torch.float32}


@pytest.mark.parametrize(("encoder", "decoder"), [(torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16)])
@pytest.mark.parametrize("include", [False, True])
def test_encoder_and_decoder_keep_dtypes_of_their_own(encoder, decoder, include, kept, batch, tmp_path):
    model = make(kept, include_encoder=include)
    model.encoder.to(encoder)
    model.decoder.to(decoder)
    expected = model(**batch).logits
    loaded = saved(model, tmp_path)
    assert {p.dtype for p in loaded.encoder.parameters()} == {encoder}
    assert {p.dtype for p in loaded.decoder.parameters()} == {decoder}
    equal(loaded(**batch).logits, expected)


class Embedder(torch.nn.Module):
    """Embed tokens, and add a linear map of them three times: an encoder of one's own."""

    def __init__(self):
        super().__init__()
        self.embed = torch.nn.Embedding(len(VOCABULARY), 16)
        self.blocks = torch.nn.ModuleList(torch.nn.Linear(16, 16) for _ in range(3))

    def forward(self, input_ids):
        hidden = self.embed(input_ids)
        for block in self.blocks:
            hidden = hidden + block(hidden)


def test_encoder_of_ones_own(batch, tmp_path):
    encoder = Embedder()
    model = DATForClassification(DATConfig(decoder_config=DECODER, id2label=NAMES), encoder).eval()
    assert "token_type_ids" in batch  # which this encoder does not take
    expected = model(**batch)
    close(
        expected.features, daam.LayerPooling(encoder)(batch["input_ids"], attention_mask=batch["attention_mask"]), "x"
    )
    equal(saved(model, tmp_path, encoder=encoder)(**batch).logits, expected.logits)
    with pytest.raises(UserError, match="encoder_name of the config is None, expected a name or a path"):
        DATForClassification.from_pretrained(tmp_path)


def test_tensors_that_a_file_lacks_are_drawn(kept, tmp_path):
    model = make(kept)
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    lacking = {"decoder.fc.weight", "decoder.conv1.weight", "decoder.conv1.bias"}
    rest = {name: t for name, t in tensors.items() if name not in lacking}
    save_file(rest, tmp_path / "model.safetensors", metadata={"format": "pt"})
    loaded, info = DATForClassification.from_pretrained(tmp_path, output_loading_info=True)
    assert info["missing_keys"] == lacking
    assert all(torch.equal(loaded.state_dict()[name], t) for name, t in rest.items())
    weight = loaded.decoder.fc.weight
    assert 0.9 < weight.abs().max() / (6 / sum(weight.shape)) ** 0.5 <= 1  # Xavier's bound
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    more = DATForClassification.from_pretrained(tmp_path, num_labels=5, ignore_mismatched_sizes=True)
    assert more.decoder.fc.out_features == more.config.num_labels == 5
    assert torch.equal(more.decoder.conv1.weight, model.decoder.conv1.weight)


@pytest.mark.parametrize(("name", "problem"), [
    ("T5", "it is a T5Stack, and its config gives a T5Model"), ("own", "it is no model of Hugging Face"),
])  # fmt: skip
def test_encoders_that_cannot_be_included(name, problem):
    if name == "T5":
        sizes = {"d_model": 16, "d_kv": 8, "d_ff": 20, "num_layers": 3, "num_heads": 2, "vocab_size": 20}
        encoder = transformers.T5Model(transformers.T5Config(**sizes)).get_encoder()
    else:
        encoder = Embedder()
    with pytest.raises(UserError, match=f"cannot be included: {problem}"):
        DATForClassification(DATConfig(decoder_config=DECODER, include_encoder=True), encoder)


def test_errors_of_a_config(kept, tmp_path):
    with pytest.raises(UserError, match="num_classes 3, expected the number of labels, 2"):
        DATConfig(decoder_config={"num_classes": 3}, id2label={0: "a", 1: "b"})
    assert DATConfig(decoder_config={"num_classes": 3}).num_labels == 3
    with pytest.raises(UserError, match="expected num_features in it"):
        DATForClassification(DATConfig(decoder_config={"num_layers": 3}))
    with pytest.raises(UserError, match="encoder_name of the config is None, expected a name or a path"):
        DATForClassification(DATConfig(decoder_config=DECODER))
    with pytest.raises(UserError, match="num_layers 3, expected 2"):
        make(kept, chosen=[0, 1])
    with pytest.raises(ValueError, match="loss"):
        make(kept, loss="hinge")


@pytest.fixture(scope="module")
def run(kept, tmp_path_factory):
    """Return a folder with a run on some layers and the embeddings, in a cache in bf16, and its texts, in order."""
    folder = tmp_path_factory.mktemp("run")
    texts = []
    with (folder / "texts.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["text", "label"])
        for i in range(24):
            label = sorted(WORDS)[i % 2]
            texts.append(" ".join(["the", WORDS[label][i // 2 % 3], "and", WORDS[label][(i // 6) % 3]]))
            writer.writerow([texts[-1], label])
    options = ["--embeddings", "--dtype", "bf16", "--layers", "1", "3", "--max-length", "9"]
    features.main([str(folder / "texts.csv"), "--output", str(folder / "cache"), "--encoder", str(kept), *options])
    options = ["--layers", "1", "3", "--folds", "2", "--epochs", "2", "--rate", "0.01", "--conv-channels", "4"]
    train.main([str(folder / "cache"), "--output", str(folder / "run"), "--loss", "focal", *options])
    return folder / "run", texts


@pytest.mark.parametrize("part", [0, 1])
def test_from_run(part, run, tokenizer, tmp_path):
    folder, texts = run
    model = DATForClassification.from_run(folder, part)
    trained = json.loads((folder / f"part-{part}.json").read_text())
    batch = tokenizer([texts[i] for i in trained["test"]], padding=True, return_tensors="pt")
    logits = saved(model, tmp_path)(**batch).logits
    close(logits.softmax(-1), torch.tensor(trained["probabilities"]), "probabilities", (1e-5, 1e-5))
    assert logits.argmax(-1).tolist() == trained["predictions"]
    config = model.config
    assert config.id2label == {0: "food", 1: "weather"} and config.loss == "focal" and config.limit == 9
    assert config.chosen == [1, 3] and config.rounding == "bfloat16"


def test_from_run_with_another_encoder(run, kept, tokenizer, tmp_path):
    folder, texts = run
    batch = tokenizer(texts, padding=True, return_tensors="pt")
    expected = DATForClassification.from_run(folder)(**batch).logits
    moved = shutil.copytree(kept, tmp_path / "moved")
    for encoder in (str(moved), transformers.AutoModel.from_pretrained(moved)):
        equal(DATForClassification.from_run(folder, encoder=encoder)(**batch).logits, expected)
    included = saved(DATForClassification.from_run(folder, include_encoder=True), tmp_path / "saved")
    assert included.config.include_encoder
    equal(included(**batch).logits, expected)


def test_errors_of_a_run(run, tmp_path):
    folder = shutil.copytree(run[0], tmp_path / "run")
    with pytest.raises(RunError, match="expected 0 to 1"):
        DATForClassification.from_run(folder, 2)
    results = json.loads((folder / "results.json").read_text())
    for method in ("linear", "lora", "logistic"):
        (folder / "results.json").write_text(json.dumps({**results, "method": method}))
        with pytest.raises(RunError, match=f"a run of {method!r}, expected one with a DATDecoder: daam, .*daamv2"):
            DATForClassification.from_run(folder)
    (folder / "results.json").write_text(json.dumps({**results, "about": {}}))
    with pytest.raises(RunError, match="which encoder"):
        DATForClassification.from_run(folder)
    (folder / "results.json").unlink()
    with pytest.raises(RunError, match="does not exist"):
        DATForClassification.from_run(folder)
