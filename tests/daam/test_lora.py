"""LoRA and LoRA+ on an encoder, on the same examples and folds as the decoders."""

import csv
import os
import random
import shutil
from dataclasses import replace

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("peft")
pytest.importorskip("safetensors")
pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")

import transformers
from helpers import close

from daam.recipes import features, train, training
from daam.recipes.cache import read_cache
from daam.recipes.encoders import EncoderError
from daam.recipes.lora import lora_job, rates_plus
from daam.recipes.runs import RunError, Settings
from daam.recipes.splits import find_equal, splits

WORDS = {"weather": ["rain", "snow", "wind"], "food": ["bread", "soup", "cheese"]}
QUICK = Settings("lora", epochs=6, folds=2, rates=(1e-2,), batch=8, loss="focal", choose_by="accuracy")


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Return (path of texts, folder of a tiny random BERT, cache)."""
    folder = tmp_path_factory.mktemp("lora")
    data, encoder = folder / "texts.csv", folder / "encoder"
    with data.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["text", "label"])
        for i in range(24):
            label = sorted(WORDS)[i % 2]
            writer.writerow([" ".join(["the", WORDS[label][i % 3], "and", WORDS[label][(i + 1) % 3]]), label])
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "and", *WORDS["weather"], *WORDS["food"]]
    encoder.mkdir()
    (encoder / "vocab.txt").write_text("\n".join(vocabulary))
    torch.manual_seed(0)
    config = transformers.BertConfig(vocab_size=len(vocabulary), hidden_size=16, num_hidden_layers=3,
                                     num_attention_heads=2, intermediate_size=32)  # fmt: skip
    transformers.BertModel(config).save_pretrained(encoder)
    transformers.BertTokenizer(str(encoder / "vocab.txt")).save_pretrained(encoder)
    features.main([str(data), "--output", str(folder / "cache"), "--encoder", str(encoder)])
    return data, str(encoder), read_cache(folder / "cache")


def made_again(made, folder, change, batch=32):
    """Return (path of texts, folder of another encoder for them, cache): change makes it of the first one."""
    data, first, _ = made
    change(transformers.AutoModel.from_pretrained(first)).save_pretrained(folder / "encoder")
    transformers.AutoTokenizer.from_pretrained(first).save_pretrained(folder / "encoder")
    arguments = ["--output", folder / "cache", "--encoder", folder / "encoder", "--batch", batch]
    features.main([str(data), *map(str, arguments)])
    return data, str(folder / "encoder"), read_cache(folder / "cache")


@pytest.mark.parametrize("method", ["lora", "lora+"])
def test_adapters_learn_and_the_encoder_does_not(method, made, tmp_path):
    data, encoder, cache = made
    settings = replace(QUICK, method=method, rates=(1e-2 if method == "lora" else 2e-3,))
    job = lora_job(data, encoder, cache, settings)
    built, build = [], job.build
    job.build = lambda: built.append(build()) or built[-1]
    model = job.build()
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trainable and all("lora_" in name or name.startswith("classify.") for name in trainable)
    frozen = {name: p.clone() for name, p in model.named_parameters() if name not in trainable}
    results = training.run(job, settings, tmp_path)
    assert results["accuracy"]["mean"] > 0.8
    assert results["trainable_parameters"] == sum(p.numel() for p in model.parameters() if p.requires_grad)
    trained = built[-1]
    assert trained is not model and not torch.equal(trained.classify.weight, model.classify.weight)
    assert all(torch.equal(p, frozen[name]) for name, p in trained.named_parameters() if name in frozen)
    assert any("lora_B" in name and p.any() for name, p in trained.named_parameters()), "adapters did learn"
    parts = splits(cache.labels, replace(QUICK, method="daam"))
    assert [split.test.tolist() for split in parts] == [part["test"] for part in results["parts"]], "a decoder's folds"


def test_an_untrained_adapter_changes_nothing(made):
    """Check that the classifier sees the last layer's average, as the cache has it."""
    data, encoder, cache = made
    job = lora_job(data, encoder, cache, QUICK)
    model = job.build().eval()
    places = torch.arange(5)
    expected = model.classify(cache.features[places, -1])
    close(model(**job.inputs(places)), expected, "scores", (1e-4, 1e-5))


def test_lora_plus_trains_b_faster(made):
    data, encoder, cache = made
    model = lora_job(data, encoder, cache, QUICK).build()
    slow, fast = rates_plus(model, 1e-4)
    assert (slow["lr"], fast["lr"]) == (1e-4, pytest.approx(16e-4))
    names = {id(p): name for name, p in model.named_parameters()}
    assert all("lora_B" in names[id(p)] for p in fast["params"])
    assert not any("lora_B" in names[id(p)] for p in slow["params"])


def test_only_what_learns_is_counted(made):
    """Check that the pooler, behind the layers and of no use, is left out, and that all that counts gets a gradient."""
    data, encoder, cache = made
    job = lora_job(data, encoder, cache, QUICK)
    model = job.build()
    names = {name for name, p in model.named_parameters() if p.requires_grad}
    assert names and not any("pooler" in name for name in names)
    model(**job.inputs(torch.arange(4))).square().sum().backward()
    assert all(p.grad is not None for name, p in model.named_parameters() if name in names)


def test_other_examples_than_the_caches(made, tmp_path):
    data, encoder, cache = made
    table = tmp_path / "other.csv"
    table.write_text(data.read_text().replace("soup", "bread"))
    with pytest.raises(RunError, match=r"other.csv through .* is not what the cache was made of: 24 examples"):
        lora_job(table, encoder, cache, QUICK)


@pytest.mark.parametrize(("dtype", "method"), [(torch.float16, "lora"), (torch.bfloat16, "lora+")], ids=str)
def test_encoders_in_half_precision(dtype, method, made, tmp_path):
    """Check that their adapters are in fp32, as those that peft makes itself, and learn as well as those of an fp32
    encoder; in fp16 all would be NaN, in bf16 a third of A would stay where it is.
    """
    data, encoder, cache = made_again(made, tmp_path, lambda model: model.to(dtype))
    settings = replace(QUICK, method=method, rates=(1e-2 if method == "lora" else 2e-3,), weight_decay=0.0)
    job = lora_job(data, encoder, cache, settings)
    built, build = [], job.build
    job.build = lambda: built.append(build()) or built[-1]
    untrained = job.build().eval()
    places = torch.arange(5)
    expected = untrained.classify(cache.features[places, -1])
    close(untrained(**job.inputs(places)), expected, "scores", (1e-2, 1e-2))
    torch.manual_seed(1)  # of the last part's model
    start = {name: p.clone() for name, p in build().named_parameters()}

    results = training.run(job, settings, tmp_path / "run")
    assert results["accuracy"]["mean"] > 0.8
    for part in results["parts"]:
        losses = torch.tensor(part["losses"])
        assert losses.isfinite().all() and losses[-1] < 0.7 * losses[0]
    for name, p in built[-1].named_parameters():
        if p.requires_grad:
            assert p.dtype == torch.float32 and p.isfinite().all()
            assert (p != start[name]).float().mean() > 0.99, f"{name} moved"
        else:
            assert p.dtype == dtype and p.equal(start[name])


def test_an_encoder_is_the_same_however_its_folder_is_spelled(made, tmp_path):
    """Check that an encoder is known by the files in its folder."""
    data, encoder, cache = made
    (tmp_path / "link").symlink_to(encoder)
    shutil.copytree(encoder, tmp_path / "moved")
    for spelling in (os.path.relpath(encoder), encoder + "/", tmp_path / "link", tmp_path / "moved"):
        lora_job(data, str(spelling), cache, QUICK)

    def change_a_number(model):
        model.encoder.layer[1].output.dense.bias.data[0] += 1e-3
        return model

    _, changed, _ = made_again(made, tmp_path, change_a_number)
    with pytest.raises(EncoderError, match=r"encoder: its encoder_sha256 is .*, expected the cache's"):
        lora_job(data, changed, cache, QUICK)


def test_layers_without_linear_modules(made, tmp_path, capsys):
    """Check GPT-2, which has convolutions of length 1 instead."""
    config = transformers.GPT2Config(vocab_size=13, n_embd=16, n_layer=3, n_head=2, n_positions=64)
    data, encoder, _ = made_again(made, tmp_path, lambda model: transformers.GPT2Model(config))
    capsys.readouterr()
    options = ["--method", "lora", "--data", data, "--encoder", encoder, "--output", tmp_path / "run"]
    with pytest.raises(SystemExit) as stopped:
        train.main([*map(str, [tmp_path / "cache", *options])])
    line = capsys.readouterr().err.splitlines()[-1]
    assert stopped.value.code == 2 and line.startswith("error: ") and "have no linear modules" in line
    assert not (tmp_path / "run").exists()


def test_the_same_text_in_other_batches_is_found(made, tmp_path):
    """Check that a text is in one part, though it comes out a little different where it is padded otherwise."""
    data, generator = tmp_path / "texts.csv", random.Random(0)
    words = [*WORDS["weather"], *WORDS["food"], "the", "and"]
    texts = [" ".join(generator.choices(words, k=generator.randint(1, 12))) for _ in range(40)]
    texts += generator.sample(texts, 20)
    with data.open("w", newline="") as file:
        csv.writer(file).writerows([("text", "label"), *((text, str(i % 2)) for i, text in enumerate(texts))])
    _, _, cache = made_again((data, *made[1:]), tmp_path, lambda model: model, batch=7)
    expected = [texts.index(text) for text in texts]
    assert len(set(expected)) < 41 and find_equal(cache.features).tolist() == expected
    for split in splits(cache.labels, QUICK, find_equal(cache.features)):
        parts = [{texts[i] for i in part} for part in (split.train, split.validation, split.test)]
        assert sum(map(len, parts)) == len(set(texts))
