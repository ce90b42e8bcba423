"""Data without labels, what its examples are called, and labelled data of a single class."""

import json
import os
from pathlib import Path

import pytest

from daam.recipes.data import name_sources, read_examples, read_unlabelled
from daam.recipes.examples import DataError, Example, encode_labels


def touch(*paths):
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x")


# columns that are broken in labelled data, and do not matter here
TABLES = {
    "a.csv": "text,label,part\nrain, ,1\n snow,,\n",
    "b.csv": "label;text\nx;rain\ny; snow\n",
    "c.tsv": "text\nrain\n snow\n",
    "d.jsonl": '{"text": "rain", "label": null}\n\n{"text": " snow", "part": [1]}\n',
}


@pytest.mark.parametrize("name", TABLES)
def test_tables(name, tmp_path, capsys):
    path = tmp_path / name
    path.write_text(TABLES[name])
    found = read_unlabelled(path)
    assert found == ("text", [Example("rain", ""), Example(" snow", "")])
    assert name_sources(path, found[1]) == ["0", "1"]
    assert not capsys.readouterr().out


def test_columns_of_texts(tmp_path):
    rows = [{"text": "0", "label": "rain"}, {"text": "1", "label": "snow"}]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "a.csv").write_text("text,label\n0,rain\n1,snow\n")
    for name in ("a.csv", "a.jsonl"):
        assert [e.source for e in read_unlabelled(tmp_path / name, text="label")[1]] == ["rain", "snow"]
        with pytest.raises(DataError, match=r"no (column )?title; it has: text, label; choose with --text$"):
            read_unlabelled(tmp_path / name, text="title")
    with pytest.raises(DataError, match=r"^--text is '', expected the name of a column$"):
        read_unlabelled(tmp_path / "a.csv", text="")
    touch(tmp_path / "1.png")
    for path in (tmp_path, tmp_path / "1.png"):
        with pytest.raises(DataError, match=f"^--text is 'label', but {path} is no table: expected nothing, it has no"):
            read_unlabelled(path, text="label")


BROKEN = [
    ("a.csv", "", "a.csv: the file is empty$"),
    ("a.csv", "text\n", "a.csv: no rows, expected one or more$"),
    ("a.jsonl", "\n", "a.jsonl: the file is empty$"),
    ("a.csv", "text,label\nrain,\n ,x\n", "line 3: the text is empty$"),
    ("a.csv", "text\nrain, snow\n", 'line 2: more than 1 columns; put a text with commas into "quotes"$'),
    ("a.jsonl", '{"text": 1}', "line 1: the text is 1, expected a string$"),
    ("a.jsonl", "[]", 'line 1: expected an object, {"text": ...}$'),
    ("a.jsonl", '{"text": "\\ud800"}', "line 1: the text is not in Unicode"),
    (
        "a.txt",
        "rain",
        r"a.txt: expected a \.csv, \.tsv or \.jsonl file, or a folder or one of images \(png, .* or sounds ",
    ),
]


@pytest.mark.parametrize(("name", "content", "message"), BROKEN, ids=range(len(BROKEN)))
def test_broken_tables(name, content, message, tmp_path):
    (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=message):
        read_unlabelled(tmp_path / name)


FOLDERS = {  # files, and those of them that are examples
    "flat": ("10.PNG 2.jpg", "10.PNG 2.jpg"),
    "deep": ("1.wav a/2.wav a/b/c/3.flac", "1.wav a/2.wav a/b/c/3.flac"),
    "classes": ("a/1.png b/1.png README.md", "a/1.png b/1.png"),
    "parts": (
        "test/a/1.png train/a/1.png train/b/1.png train/labels.csv x.txt",
        "test/a/1.png train/a/1.png train/b/1.png",
    ),
    "one class": ("a/1.png a/deep/1.png", "a/1.png a/deep/1.png"),
    "litter": ("a/Thumbs.db a/.DS_Store a/1.png .git/1.png __MACOSX/1.png", "a/1.png"),
}


@pytest.mark.parametrize(("files", "names"), FOLDERS.values(), ids=FOLDERS)
@pytest.mark.parametrize("relative", [False, True])
def test_folders(files, names, relative, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    root = Path("data" if relative else tmp_path / "data")
    touch(*(root / file for file in files.split()))
    modality, examples = read_unlabelled(str(root))
    assert modality == ("speech" if "wav" in files else "vision")
    assert examples == [Example(root / name, "") for name in names.split()]
    assert name_sources(f"{root}/", examples) == names.split()
    monkeypatch.chdir(root)
    assert name_sources(".", read_unlabelled(".")[1]) == names.split()


def test_single_files(tmp_path, monkeypatch):
    for name, modality in {"a.WEBP": "vision", "b.opus": "speech"}.items():
        touch(path := tmp_path / "data" / name)
        assert read_unlabelled(path) == (modality, [Example(path, "")])
        assert name_sources(path, [Example(path, "")]) == [name]
    monkeypatch.chdir(tmp_path / "data")
    assert name_sources("b.opus", read_unlabelled("b.opus")[1]) == ["b.opus"]


BROKEN_FOLDERS = [
    ("", "data: no images or sounds, expected some$"),
    ("notes.txt", r"data: expected only images .*, it holds .*notes\.txt$"),
    ("1.png a/2.wav", r"data: expected only images \(png, .* it holds .*data/1\.png and .*a/2\.wav$"),
    ("1.png 2.heic", r"data: expected only images .* it holds .*1\.png and .*2\.heic$"),
    ("a/1.png b/2.heic", r"data: expected only images .* it holds .*1\.png and .*2\.heic$"),
    ("1.png a/notes.txt", r"data: expected only images .* it holds .*1\.png and .*notes\.txt$"),
]


@pytest.mark.parametrize(("files", "message"), BROKEN_FOLDERS)
def test_broken_folders(files, message, tmp_path):
    root = tmp_path / "data"
    root.mkdir()
    touch(*(root / file for file in files.split()))
    with pytest.raises(DataError, match=message):
        read_unlabelled(root)


def test_files_that_are_not_there(tmp_path):
    for name in ("nowhere", "nowhere.csv", "nowhere.png"):
        with pytest.raises(DataError, match=f"{name}: no such file or folder$"):
            read_unlabelled(tmp_path / name)
    touch(tmp_path / "1.png")
    (tmp_path / "2.png").symlink_to("nowhere")
    with pytest.raises(DataError, match=r"2\.png is a link to nowhere, which does not exist"):
        read_unlabelled(tmp_path)


@pytest.mark.skipif(os.name != "posix", reason="other systems have names in Unicode")
def test_names_of_files_can_be_written(tmp_path):
    for name in (b"caf\xe9.png", "café.png".encode()):
        try:
            os.close(os.open(os.path.join(os.fsencode(tmp_path), name), os.O_CREAT))
        except OSError:
            pytest.skip("the file system has names in Unicode")
    names = name_sources(tmp_path, read_unlabelled(tmp_path)[1])
    assert sorted(names) == [r"caf\udce9.png", "café.png"]
    (tmp_path / "names").write_text("\n".join(names), encoding="utf-8")


def test_labelled_data_of_one_class(tmp_path):
    """Check data to score a trained run on: one class may be all there is, and an unknown one is told."""
    (tmp_path / "a.csv").write_text("text,label\nrain,weather\nsnow,weather\n")
    touch(tmp_path / "data/cat/1.png", tmp_path / "data/cat/2.png")
    for path, label in ((tmp_path / "a.csv", "weather"), (tmp_path / "data", "cat")):
        _, examples = read_examples(path, least_classes=1)
        assert [example.label for example in examples] == [label] * 2
        with pytest.raises(DataError, match=r"2 examples of 1 classes, expected 2 or more classes$"):
            read_examples(path)
        assert encode_labels(examples, ["a", label]).tolist() == [1, 1]
        with pytest.raises(DataError, match=rf"^label '{label}' of example 0 .* is not among the classes: a, b$"):
            encode_labels(examples, ["a", "b"])
    (tmp_path / "a.csv").write_text("text,label\n")
    with pytest.raises(DataError, match=r"a\.csv: 0 examples of 0 classes, expected 1 or more classes$"):
        read_examples(tmp_path / "a.csv", least_classes=1)
