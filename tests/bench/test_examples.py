"""The comparison on real data: what it makes of packages, and that documents show the results that are committed."""

import csv
import re
import wave
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("sklearn")
pytest.importorskip("soundfile")
pytest.importorskip("soxr")

from bench.examples import __main__ as examples
from bench.examples import packages, speech, text, vision
from daam.recipes.data import read_examples

ROOT = Path(__file__).parents[2]
HISTORY = ROOT / "bench" / "history" / "examples"


def test_fortunes(tmp_path):
    """Check that authors and underlining go, and texts that are too short, long, repeated, or of two topics."""
    common = "A text that stands in two topics."
    for topic in text.TOPICS:
        entries = [
            f"The first text of {topic},\non two lines.",
            "_\bA second text of " + topic + ".\n\t\t-- A. Author, 1990",
            "Short.",
        ]
        entries += [entries[0], "x" * 401] + ([common] if topic in ("art", "law") else [])
        (tmp_path / topic).write_text("\n%\n".join(entries) + "\n%\n")
    rows = text.read_fortunes(tmp_path)
    assert sorted(rows) == sorted(
        row
        for topic in text.TOPICS
        for row in ((f"The first text of {topic}, on two lines.", topic), (f"A second text of {topic}.", topic))
    )


def test_images(tmp_path):
    images = torch.rand(30, 28, 28, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(30) % 10
    for part, count in (("train", 2), ("test", 1)):
        vision.write_images(tmp_path / part, *vision.first_of_each(images, labels, count, range(5, 10)))
    modality, found = read_examples(tmp_path)
    assert modality == "vision" and len(found) == 15
    assert [example.split for example in found].count("test") == 5
    assert {example.label for example in found} == set(vision.CLOTHES[5:])
    (path,) = [e.source for e in found if e.label == "sandal" and e.split == "test"]
    close = vision.collate_images([path])["images"][0] - images[5]
    assert close.abs().max() <= 0.5 / 255 + 1e-6
    encoder = vision.ImageEncoder()
    assert encoder(images[:2]).shape == (2, 49, 64)
    images[0, 4:8, 8:12] = 0
    changed = encoder.embed(images.unfold(1, 4, 4).unfold(2, 4, 4).reshape(-1, 49, 16))[0, 9]
    assert torch.equal(changed, encoder.embed.bias), "patches are 4 x 4 neighbours"


def test_syllables(tmp_path):
    names = {"es/syllab": ["ba", "lya", "bien", "por"], "es/alpha": ["be", "efe"], "de/syllab": ["auf", "fisch"]}
    for folder, stems in names.items():
        (tmp_path / "data" / folder).mkdir(parents=True)
        for stem in stems:
            (tmp_path / "data" / folder / f"{stem}.ogg").touch()
    speech.copy_syllables(tmp_path / "data", tmp_path / "sounds")
    found = {str(path.relative_to(tmp_path / "sounds")) for path in (tmp_path / "sounds").rglob("*.ogg")}
    assert found == {
        "a/es/syllab-ba.ogg",
        "a/es/syllab-lya.ogg",
        "o/es/syllab-por.ogg",
        "e/es/alpha-be.ogg",
        "i/de/syllab-fisch.ogg",
    }
    _, read = read_examples(tmp_path / "sounds", groups="folder")
    assert {(example.label, example.group) for example in read} >= {("a", "es"), ("i", "de")}


def test_mel_filters_are_slaneys():
    """Check that filters have areas of 1 where they are wide, and centres that go up to the highest band."""
    filters = speech.mel_filters()
    assert filters.shape == (40, 201) and (filters >= 0).all()
    areas = filters.sum(1) * speech.RATE / speech.WINDOW
    assert (areas[20:] - 1).abs().max() < 0.03
    centres = filters.argmax(1) * speech.RATE / speech.WINDOW
    assert centres[0] == 80 and centres[-1] == 7400 and (centres.diff() >= 0).all()


def test_padding_changes_no_features(tmp_path):
    torch.manual_seed(0)
    weights = {}
    for i, size in enumerate((40, 256, 256)):
        for name, t in torch.nn.LSTM(size, 256).state_dict().items():
            weights[f"lstm.{name[:-1]}{i}"] = t
    for i, seconds in enumerate((0.3, 0.7)):
        with wave.open(str(tmp_path / f"{i}.wav"), "wb") as file:
            file.setparams((1, 2, 16000, 0, "NONE", ""))
            samples = np.random.default_rng(i).normal(0, 3000, int(16000 * seconds)).astype(np.int16)
            file.writeframes(samples.tobytes())
    encoder = speech.VoiceEncoder(weights)
    pooling = examples_pooling(encoder)
    paths = [tmp_path / "0.wav", tmp_path / "1.wav"]
    together = pooling(**speech.collate_sounds(paths))
    alone = torch.cat([pooling(**speech.collate_sounds([path])) for path in paths])
    assert together.shape == (2, 3, 256) and (together - alone).abs().max() < 1e-5


def examples_pooling(encoder):
    from daam import LayerPooling

    return LayerPooling(encoder, encoder.layers, batch_first=True)


def test_packages_that_cannot_be_had_are_named(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("PATH", str(tmp_path))
    examples.main(["text", "speech", "--output", str(tmp_path / "out")])
    printed = capsys.readouterr().out
    for name, package in (("text", "fortunes"), ("speech", "klettres-data")):
        assert re.search(rf"^{name} is left out, its package cannot be had: {package}: ", printed, re.M)
    assert "No example ran: a package of each could not be had." in printed
    with pytest.raises(SystemExit):
        examples.main(["music"])
    with pytest.raises(packages.MissingError, match=r"^nothing: false"):
        monkeypatch.undo()
        packages._call("nothing", ["false"], tmp_path)


@pytest.mark.parametrize("name", examples.EXAMPLES)
def test_committed_results_are_whole(name):
    """Check that results that are committed have all methods, three parts or more, and one table."""
    with (HISTORY / name / "table.csv").open() as file:
        rows = {row["method"]: row for row in csv.DictReader(file)}
    assert {"daam", "daamv2", "mixture", "gqdaam", "mha", "none", "linear", "last", "weighted_sum", "logistic"} <= set(
        rows
    )
    assert all(int(row["parts"]) >= 3 for row in rows.values())
    accuracy = {method: float(row["accuracy"]) for method, row in rows.items()}
    for method, value in accuracy.items():
        assert f"| {method} | {value:.3f} ± " in (HISTORY / name / "table.md").read_text()
    for picture in ("comparison.png", "importance.png"):
        assert (HISTORY / name / picture).stat().st_size > 10_000


def test_readme_shows_committed_results():
    """Check every number of README's table of examples against the table that is committed."""
    lines = [line for line in (ROOT / "README.md").read_text().splitlines() if line.startswith("| ")]
    (head,) = [i for i, line in enumerate(lines) if line.startswith("| test accuracy |")]
    columns = [cell.strip() for cell in lines[head].strip("|").split("|")][1:]
    found = [
        line for line in lines[head + 1 : head + 6] if line.split("|")[1].strip().split(",")[0] in examples.EXAMPLES
    ]
    assert len(found) == len(examples.EXAMPLES)
    for line in found:
        name, *cells = (cell.strip() for cell in line.strip("|").split("|"))
        with (HISTORY / name.split(",")[0] / "table.csv").open() as file:
            accuracy = {row["method"]: f"{float(row['accuracy']):.3f}" for row in csv.DictReader(file)}
        assert [accuracy[column] for column in columns] == [cell.strip("*") for cell in cells]
