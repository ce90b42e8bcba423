"""LoRA and LoRA+ on an encoder, on the same examples and folds as the decoders."""

import csv
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

from daam.recipes import features, train
from daam.recipes.cache import read_cache
from daam.recipes.lora import lora_job, rates_plus
from daam.recipes.train import Settings

WORDS = {"weather": ["rain", "snow", "wind"], "food": ["bread", "soup", "cheese"]}
QUICK = Settings("lora", epochs=6, folds=2, rate=1e-2, batch=8)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """(texts, folder of a tiny random BERT, cache)"""
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


@pytest.mark.parametrize("method", ["lora", "lora+"])
def test_adapters_learn_and_the_encoder_does_not(method, made, tmp_path):
    data, encoder, cache = made
    settings = replace(QUICK, method=method, rate=1e-2 if method == "lora" else 2e-3)
    job = lora_job(data, encoder, cache, settings)
    built, build = [], job.build
    job.build = lambda: built.append(build()) or built[-1]
    model = job.build()
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trainable and all("lora_" in name or name.startswith("classify.") for name in trainable)
    frozen = {name: p.clone() for name, p in model.named_parameters() if name not in trainable}
    results = train.run(job, settings, tmp_path)
    assert results["accuracy"]["mean"] > 0.8
    assert results["trainable_parameters"] == sum(p.numel() for p in model.parameters() if p.requires_grad)
    trained = built[-1]
    assert trained is not model and not torch.equal(trained.classify.weight, model.classify.weight)
    assert all(torch.equal(p, frozen[name]) for name, p in trained.named_parameters() if name in frozen)
    assert any("lora_B" in name and p.any() for name, p in trained.named_parameters()), "adapters did learn"
    parts = train.splits(cache.labels, replace(QUICK, method="daam"))
    assert [one.test.tolist() for one in parts] == [part["test"] for part in results["parts"]], "a decoder's folds"


def test_an_untrained_adapter_changes_nothing(made):
    """The classifier sees the last layer's average, as the cache has it."""
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
    """The pooler is behind the layers, and of no use; what is left gets a gradient."""
    data, encoder, cache = made
    job = lora_job(data, encoder, cache, QUICK)
    model = job.build()
    names = {name for name, p in model.named_parameters() if p.requires_grad}
    assert names and not any("pooler" in name for name in names)
    model(**job.inputs(torch.arange(4))).square().sum().backward()
    assert all(p.grad is not None for name, p in model.named_parameters() if name in names)


def test_other_examples_than_the_caches(made, tmp_path):
    data, encoder, cache = made
    other = tmp_path / "other.csv"
    other.write_text(data.read_text().replace("soup", "bread"))
    with pytest.raises(train.RunError, match=r"other.csv through .* is not what the cache was made of: 24 examples"):
        lora_job(other, encoder, cache, QUICK)
