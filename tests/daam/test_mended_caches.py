"""Caches known by what is in them: data that was mended, dtypes, layers, room on disk, features larger than memory."""

import csv
import os
import re
import shutil
import signal
import subprocess
import sys
from collections import namedtuple
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import nn

os.environ["HF_HUB_OFFLINE"] = "1"  # read when transformers is imported: nothing here downloads
pytest.importorskip("safetensors")
pytest.importorskip("tqdm")
pytest.importorskip("transformers")
pytest.importorskip("sklearn")

import forked
from helpers import close

import daam
from daam.recipes import cache as caches
from daam.recipes import extraction, processes
from daam.recipes.cache import CacheError, choose_layers, fingerprint, iterate_blocks, read_cache
from daam.recipes.data import Example
from daam.recipes.extraction import extract, iterate_features
from daam.recipes.fitting import fit_part
from daam.recipes.logistic import fit_logistic
from daam.recipes.runs import Settings
from daam.recipes.splits import find_equal, splits
from daam.recipes.training import cached_job
from daam.recipes.writer import Writer

ABOUT = {"encoder": "counting", "modality": "text"}
EXAMPLES = [Example(f"{'a' * (i % 9 + 1)} {i}", "xy"[i % 2]) for i in range(40)]


class Counting(nn.Module):
    """Compute three linear layers, and note how many examples came."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Linear(6, 6) for _ in range(3))
        self.seen = []

    def forward(self, hidden):
        self.seen.append(len(hidden))
        for layer in self.layers:
            hidden = layer(hidden)


def collate(texts):
    numbers = torch.tensor([float(text.split()[-1]) for text in texts])
    return {"hidden": torch.cos(numbers[:, None, None] * torch.arange(1.0, 7)).expand(-1, 2, 6)}


@pytest.fixture
def counting():
    return daam.LayerPooling(Counting())


def fill(pooling, folder, examples=EXAMPLES, **options):
    """Make a cache; return it, and how many examples went through the encoder beside those that are tried first."""
    pooling.encoder.seen.clear()
    extract(pooling, collate, examples, folder, about=ABOUT, **{"shard": 8, "batch": 4} | options)
    seen = sum(pooling.encoder.seen)
    pooling.encoder.seen.clear()
    extraction.check(pooling, collate, examples, ABOUT)
    return read_cache(folder), seen - sum(pooling.encoder.seen) - 1  # one tells sizes


def changes():
    mended = [*EXAMPLES[:5], Example("mended 99", "x"), *EXAMPLES[6:]]
    relabelled = [replace(EXAMPLES[0], label="z"), *EXAMPLES[1:]]
    return {
        "mended": (mended, 1), "taken away": (EXAMPLES[1:], 0), "added": ([Example("new 77", "y"), *EXAMPLES], 1),
        "relabelled": (relabelled, 0), "turned": (EXAMPLES[::-1], 0),
    }  # fmt: skip


@pytest.mark.parametrize(("examples", "computed"), changes().values(), ids=changes())
def test_mended_data_keeps_what_is_done(examples, computed, counting, tmp_path, capsys):
    """Check that of other data what is new alone goes through the encoder, and that the cache is that of all of it."""
    fill(counting, tmp_path / "cache")
    found, seen = fill(counting, tmp_path / "cache", examples)
    assert seen == computed
    told = f"of {tmp_path / 'cache'} are among these {len(examples)}: their features are kept"
    assert told in capsys.readouterr().out
    expected, _ = fill(counting, tmp_path / "anew", examples)
    close(found.features, expected.features, "features", (1e-6, 1e-6))
    assert found.labels.equal(expected.labels) and found.about["examples_sha256"] == expected.about["examples_sha256"]
    files = ({path.name for path in folder.iterdir()} for folder in (tmp_path / "cache", tmp_path / "anew"))
    assert next(files) == next(files)
    with (tmp_path / "cache/examples.csv").open(newline="") as file:
        assert [row["label"] for row in csv.DictReader(file)] == [example.label for example in examples]


def test_other_shards_keep_features(counting, tmp_path):
    first, _ = fill(counting, tmp_path / "cache")
    second, seen = fill(counting, tmp_path / "cache", shard=16)
    assert seen == 0 and second.features.equal(first.features) and second.about["shard"] == 16


def test_a_broken_file_in_the_middle(counting, tmp_path):
    """Check that a cache that ended at a broken example goes on when that is mended, or left out."""
    broken = [*EXAMPLES[:20], Example("broken x", "x"), *EXAMPLES[21:]]  # float("x") fails
    for name, mended in {"mended": EXAMPLES, "left out": [*EXAMPLES[:20], *EXAMPLES[21:]]}.items():
        with pytest.raises(daam.recipes.encoders.EncoderError, match="could not convert string to float: 'x'"):
            fill(counting, tmp_path / name, broken)
        assert len(list((tmp_path / name).glob("*.safetensors"))) == 2
        cache, seen = fill(counting, tmp_path / name, mended)
        assert len(cache.labels) == len(mended) and seen == len(mended) - 16


class KilledError(Exception):
    """Stand for the end of a process."""


def kill_at(monkeypatch, count):
    """Let a process die when it has put so many files into their places."""
    real, calls = os.replace, []

    def replace(*args):
        calls.append(args)
        if len(calls) > count:
            raise KilledError
        real(*args)

    monkeypatch.setattr(os, "replace", replace)


@pytest.mark.parametrize("count", range(14))
def test_killed_while_mended(count, counting, tmp_path, monkeypatch):
    """Check that nothing is lost, nor computed again, wherever a process dies: whether it goes on with the mended data,
    with that of before, or with other data still.
    """
    folder, mended = tmp_path / "cache", changes()["mended"][0]
    fill(counting, folder)
    with monkeypatch.context() as patch, pytest.raises(KilledError):
        kill_at(patch, count)  # 2 copies, 5 moves, 2 new files, 5 shards
        fill(counting, folder, mended)
    twice = [*mended[:20], Example("mended 98", "x"), *mended[21:]]
    computed = 0 if count > 9 else 1  # the first shard of the mended data has what is new in it
    for name, (examples, expected) in {
        "mended": (mended, computed), "before": (EXAMPLES, 0), "twice": (twice, 1 + computed),
    }.items():  # fmt: skip
        shutil.copytree(folder, tmp_path / name)
        cache, seen = fill(counting, tmp_path / name, examples)
        assert seen == expected, name
        assert len(cache.labels) == 40 and not list((tmp_path / name).glob("before-*"))


def test_killed_and_gone_on_with_another_encoder(counting, tmp_path, monkeypatch):
    """Check that what another encoder made is not taken, though no cache.json says what the folder was."""
    fill(counting, tmp_path / "cache")
    with monkeypatch.context() as patch, pytest.raises(KilledError):
        kill_at(patch, 7)
        fill(counting, tmp_path / "cache", changes()["mended"][0])
    assert not (tmp_path / "cache/cache.json").exists()
    for parameter in counting.encoder.parameters():
        parameter.data.mul_(2)
    cache, seen = fill(counting, tmp_path / "cache")
    assert seen == 40 and cache.features.equal(fill(counting, tmp_path / "anew")[0].features)


def test_a_cache_without_a_list_gets_one(counting, tmp_path):
    """Check that one of an earlier version can be mended after it was made again."""
    fill(counting, tmp_path)
    (tmp_path / "examples.csv").unlink()
    with pytest.raises(CacheError, match="its examples is 40, expected 39"):
        fill(counting, tmp_path, EXAMPLES[1:])
    assert fill(counting, tmp_path)[1] == 0 == fill(counting, tmp_path, EXAMPLES[1:])[1]


def test_dtypes_and_room(counting, tmp_path, monkeypatch, capsys):
    exact, _ = fill(counting, tmp_path / "fp32")
    for dtype, kind, precision in (("bf16", torch.bfloat16, 2**-8), ("fp16", torch.float16, 2**-11)):
        cache, _ = fill(counting, tmp_path / dtype, dtype=dtype)
        assert f"40 x 3 x 6 features in {dtype}: 0.00144 MB, of " in capsys.readouterr().out
        assert cache.features.dtype == torch.float32 and cache.features.equal(exact.features.to(kind).float())
        assert (cache.features - exact.features).abs().max() <= precision * exact.features.abs().max()
        (shard,) = (tmp_path / dtype).glob("00000.safetensors")
        assert 2 * (8 * 3 * 6) < shard.stat().st_size < 4 * (8 * 3 * 6) + 500
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage(10**6, 10**6, 2000))
    with pytest.raises(CacheError, match=r"in fp32: 0.00288 MB, and .* has room for 0.002 MB: take"):
        fill(counting, tmp_path / "full")
    assert not list((tmp_path / "full").glob("*.safetensors"))
    monkeypatch.undo()
    assert fill(counting, tmp_path / "full", dtype="bf16")[1] == 40  # as the error says: it claimed nothing


def test_fp16_that_overflows(counting, tmp_path):
    for parameter in counting.encoder.parameters():
        parameter.data.mul_(100)
    with pytest.raises(CacheError, match=r"of example 0 .* reach .*, which fp16 does not hold: take --dtype bf16"):
        fill(counting, tmp_path, dtype="fp16")
    fill(counting, tmp_path, dtype="bf16")


def test_layers_and_embeddings(counting, tmp_path):
    everything, _ = fill(counting, tmp_path / "all")
    assert everything.about["layer_numbers"] == [1, 2, 3]
    some, _ = fill(counting, tmp_path / "some", layers=[3, 1])
    assert some.features.equal(everything.features[:, [0, 2]]) and some.about["layer_numbers"] == [1, 3]
    counting.embeddings = True
    embedded, _ = fill(counting, tmp_path / "embedded", layers=[2])
    assert embedded.about["layer_numbers"] == [0, 2]
    assert embedded.features[:, 1].equal(everything.features[:, 1])
    inputs = collate([example.source for example in EXAMPLES])["hidden"]
    close(embedded.features[:, 0], inputs[:, 0], "embeddings", (1e-6, 1e-6))
    found = torch.empty_like(embedded.features)
    for places, features in iterate_features(counting, collate, EXAMPLES, embedded.about):
        found[places] = features
    close(found, embedded.features, "features", (1e-6, 1e-6))
    with pytest.raises(CacheError, match="--layers names layer 4, expected 1 to 3, those of the encoder"):
        fill(counting, tmp_path / "none", layers=[4])


def test_examples_of_one_length_share_a_batch(counting, tmp_path, monkeypatch):
    batches = []
    real = extraction._run
    monkeypatch.setattr(extraction, "_run", lambda *args: batches.append(args[3]) or real(*args))
    fill(counting, tmp_path / "cache", shard=40)
    lengths = [[len(EXAMPLES[i].source) for i in places] for places in batches if len(places) == 4]
    assert len(lengths) == 10 and sum(max(found) - min(found) for found in lengths) <= 9
    assert sorted(i for places in batches[1:] for i in places) == list(range(40))


# features larger than memory


@pytest.fixture
def both(counting, tmp_path, monkeypatch):
    """Return one cache in memory and on disk."""
    examples = [*EXAMPLES, Example("again 0", "x")]  # equal features, another text
    held, _ = fill(counting, tmp_path / "cache", examples)
    monkeypatch.setattr(caches, "IN_MEMORY", 100)
    monkeypatch.setattr(caches, "BLOCK", 100)
    return held, read_cache(tmp_path / "cache")


def test_features_on_disk_are_those_in_memory(both):
    held, stored = both
    assert isinstance(stored.features, caches.StoredFeatures) and stored.features.shape == held.features.shape
    places = torch.tensor([3, 40, 7, 8, 8, 0])
    assert stored.features[places].equal(held.features[places])
    assert choose_layers(stored.features, [2, 0])[places].equal(held.features[places][:, [2, 0]])
    assert torch.cat(list(iterate_blocks(stored.features))).equal(held.features)
    assert fingerprint(stored) == fingerprint(held)
    assert find_equal(stored.features).equal(find_equal(held.features)) and find_equal(held.features)[40] == 0


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("options", [{}, {"layers": (0, 2)}, {"standardize": False}, {"method": "logistic"}], ids=str)
def test_training_on_features_on_disk(options, both, tmp_path):
    settings = Settings(**{"method": "none", "epochs": 2, "rates": (1e-3,), "conv_channels": 4} | options)
    fit, fits = fit_logistic if settings.method == "logistic" else fit_part, []
    for cache in both:
        job = cached_job(cache, settings)
        split = splits(job.labels, settings, job.equal)[0]
        part = fit(job, split, settings, tmp_path / f"part-{len(fits)}", 0, "cpu")
        fits.append((part.losses, part.accuracies, part.predictions, part.probabilities))
    assert fits[0] == fits[1]


@pytest.mark.slow
@pytest.mark.parametrize("method", ["last", "daam"])
def test_memory_of_training(method, tmp_path):
    """Check that training on 1.2 GB of features takes less than 1 GB of memory, the libraries' half included."""
    shape, generator = (512, 12, 768), torch.Generator().manual_seed(0)
    about = {"examples": 64 * 512, "shard": 512, "layers": 12, "features": 768, "names": ["a", "b"]}
    made = Writer(tmp_path / "cache", about)
    for index in made.missing:
        made.write(index, torch.randn(shape, generator=generator), torch.arange(512) % 2)
    options = [
        "--method",
        method,
        "--seeds",
        "1",
        "--epochs",
        "1",
        "--rate",
        "0.001",
        "--output",
        str(tmp_path / "run"),
    ]
    code = (
        "import sys; from daam.recipes import train; train.main(sys.argv[1:]); print(open('/proc/self/status').read())"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "cache"), *options]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    (peak,) = re.findall(r"VmHWM:\s+(\d+) kB", done.stdout)
    assert int(peak) < 1e6


# several processes


@pytest.mark.usefixtures("one_thread")
def test_two_processes_make_the_cache_of_one(counting, tmp_path):
    """Check that shards are the same bytes, also where one process is killed and two others go on."""
    one, folder = tmp_path / "one", tmp_path / "two"

    def killed(texts):
        if texts[0].endswith(" 28") or texts[0].endswith(" 33"):  # in the fourth of five shards, or the fifth
            os.kill(os.getpid(), signal.SIGKILL)
        return collate(texts)

    def make(collate):
        with processes.joined("cpu"):
            extract(counting, collate, EXAMPLES, folder, about=ABOUT, shard=8, batch=1)

    extract(counting, collate, EXAMPLES, one, about=ABOUT, shard=8, batch=1)
    codes = forked.finish(forked.start([partial(make, killed)] * 2))
    present = {path.name for path in folder.glob("*.safetensors")}
    assert -signal.SIGKILL in codes and 0 < len(present) < 5
    times = {name: (folder / name).stat().st_mtime_ns for name in present}
    assert forked.finish(forked.start([partial(make, collate)] * 2)) == [0, 0]
    assert {name: (folder / name).stat().st_mtime_ns for name in present} == times
    files = ({path.name: path.read_bytes() for path in made.iterdir()} for made in (one, folder))
    assert next(files) == next(files)
