"""Tables, folders, pictures and sounds: what is read out of them, and every message."""

import csv
import json
import os
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("PIL")
pytest.importorskip("soundfile")
pytest.importorskip("soxr")

import soundfile
from PIL import Image, ImageCms

from daam.recipes.data import read_examples
from daam.recipes.errors import UserError
from daam.recipes.examples import (
    DataError,
    Example,
    class_names,
    digest_examples,
    encode_groups,
    encode_labels,
    encode_parts,
    find_duplicates,
    hash_examples,
)
from daam.recipes.media import import_extra, read_image, read_sound, sound_seconds

TEXTS = Path(__file__).parents[1] / "data/texts.csv"

# tables


def test_tables(tmp_path):
    modality, examples = read_examples(TEXTS)
    assert modality == "text" and len(examples) == 60 and class_names(examples) == ["food", "travel", "weather"]
    assert [sum(e.label == name for e in examples) for name in class_names(examples)] == [20, 20, 20]
    path = tmp_path / "texts.jsonl"
    rows = [{"text": e.source, "label": e.label} for e in examples]
    path.write_text("\n".join(json.dumps(row) for row in rows) + "\n\n", encoding="utf-8-sig")
    assert read_examples(path) == (modality, examples)
    path.write_text('{"text": "a", "label": 1}\n{"text": "b", "label": 0}')
    assert encode_labels(read_examples(path)[1], ["0", "1"]).tolist() == [1, 0]
    assert hash_examples(examples) != hash_examples(examples[::-1])
    assert issubclass(DataError, UserError)


def test_headers_with_blanks_and_other_columns(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text(",text , label,more,\n0,a,x,,\n1, b,y\n")
    assert read_examples(path)[1] == [Example("a", "x"), Example(" b", "y")]


TABLES = [
    ("a.csv", "", "the file is empty$"),
    ("a.csv", b"\xef\xbb\xbf\r\n\n", "the file is empty$"),
    ("a.jsonl", "", "the file is empty$"),
    ("a.csv", "\ntext,label\na,b\n", "has no column text and no column label; it has: ; choose with --text and --lab"),
    ("a.csv", "text,class\na,b\n", "has no column label; it has: text, class; choose with --label$"),
    ("a.csv", "title;class\na;b\n", "has no column text and no column label; it has: title, class; choose with --t"),
    ("a.csv", "text,label\na,b\nc, \n", "line 3: the label is empty"),
    ("a.csv", "text,label\na\n", "line 2: the label is empty"),
    ("a.csv", 'text,label\na,b\n"",b\n', "line 3: the text is empty"),
    ("a.csv", "text,label\nwell, no,b\n", 'line 2: more than 2 columns; put a text with commas into "quotes"'),
    ("a.csv", 'text,label\n"a,b\n', "line 2: broken CSV"),
    ("a.csv", "text,label\na,x\nb,x\n", "2 examples of 1 classes, expected 2 or more classes$"),
    ("a.csv", "text,label\n", "0 examples of 0 classes"),
    ("a.csv", "text,label,text\na,x,1\nb,y,2\n", "has the column text twice; it has: text, label, text"),
    ("a.csv", "label,text,id, label ,id\nx,a,1,y,2\n", "has the column label and the column id twice"),
    ("a.csv", "text;label\na;x;\n", 'line 2: more than 2 columns; put a text with semicolons into "quotes"'),
    ("a.tsv", "text\tlabel\na\tx\t\n", 'line 2: more than 2 columns; put a text with tabs into "quotes"'),
    ("a.tsv", 'text\tlabel\n"a" b\tx\n', "line 2: broken CSV"),
    ("a.tsv", 'text\tlabel\n"a\tx\nb\ty\nc"\tz\nd\ty\n', 'line 4: a cell holds tabs and ends of lines, expected "'),
    ("a.csv", b"text,label\n\xff,x\n", "not in UTF-8"),
    ("a.csv", "text,label\na,x\nb,y\n".encode("utf-16"), "not in UTF-8"),
    ("a.csv", "text,label\na,x\nb,y\n".encode("utf-16-le"), "not in UTF-8 .it holds NUL"),
    ("a.csv", "text,label\na\0,x\nb,y\n", "not in UTF-8 .it holds NUL"),
    ("a.jsonl", '{"text": "a", "label": "b"}\n\n{"text": \n', "line 3: broken JSON"),
    ("a.jsonl", '{"text": "a", "kind": "b"}\n', "line 1: no label; it has: text, kind; choose with --label$"),
    ("a.jsonl", '{"class": "b"}\n', "line 1: no text and no label; it has: class; choose with --text and --label$"),
    ("a.jsonl", "[1]\n", 'line 1: expected an object, {"text": ..., "label": ...}$'),
    ("a.jsonl", '{"text": null, "label": "b"}\n', "line 1: the text is None, expected a string$"),
    ("a.jsonl", '{"text": "a", "label": " "}\n', "line 1: the label is empty"),
    ("a.jsonl", '{"text": "a", "label": "b", "text": "c"}\n', "line 1: broken JSON .text twice in an object"),
    ("a.jsonl", '{"text": "a", "label": true}\n', "line 1: the label is True, expected a string or a whole number"),
    ("a.jsonl", '{"text": "a", "label": 1.0}\n', "line 1: the label is 1.0, expected a string or a whole number"),
    ("a.jsonl", '{"text": "a", "label": "b", "score": NaN}\n', "line 1: broken JSON .NaN is no number of JSON"),
    ("a.jsonl", '{"text": "\\ud800", "label": "b"}\n', "line 1: the text is not in Unicode"),
    ("a.jsonl", '{"text": ' + "[" * 100_000, "line 1: broken JSON .*recursion"),
    ("a.jsonl", '{"text": "a", "label": ' + "1" * 9999 + "}\n", "line 1: broken JSON"),
    ("a.txt", "a", r"expected a \.csv, \.tsv or \.jsonl file, or a folder with one subfolder for each class"),
]


@pytest.mark.parametrize("name, content, message", TABLES, ids=range(len(TABLES)))
def test_broken_tables(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(DataError, match=f"{name}.*{message}"):
        read_examples(tmp_path / name)


DELIMITED = [  # a header, a row, and its text, which holds what elsewhere stands between columns
    ("text,label", "a; b|c,x", "a; b|c"),
    ("text;label", "a, b|c;x", "a, b|c"),
    ("text|label", "a, b; c|x", "a, b; c"),
    ("text\tlabel", "a, b; c|d\tx", "a, b; c|d"),
    ('"text";"label"', '"a; b";"x"', "a; b"),
    ("\ufefftext ; label;more", "a, b;x;1", "a, b"),
    ("n,o;text;label", "1;a, b;x", "a, b"),
]


@pytest.mark.parametrize(("header", "row", "text"), DELIMITED)
def test_delimiters_that_the_header_shows(header, row, text, tmp_path):
    for name in ("a.csv", "a.tsv"):
        (tmp_path / name).write_text(f"{header}\n{row}\n{row.replace('x', 'y')}\n", encoding="utf-8")
        assert read_examples(tmp_path / name) == ("text", [Example(text, "x"), Example(text, "y")])


def test_quoted_cells_of_tsv(tmp_path):
    path, texts = tmp_path / "a.tsv", ["two\nlines", "a\ttab", 'a "word"', 'wo"rd']
    with path.open("w", newline="") as file:
        csv.writer(file, delimiter="\t").writerows([("text", "label"), *zip(texts, "xyxy", strict=True)])
    assert [example.source for example in read_examples(path)[1]] == texts


def test_columns_of_other_names(tmp_path):
    """Check that columns called text and label are others where they are not asked for."""
    names = ("label", "title", "stars", "who", "text")
    rows = [("0", "good", 5, "ann", "n"), ("0", "bad", 1, "bob", "n")]
    path = tmp_path / "a.csv"
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([names, *rows])
    table = tmp_path / "a.jsonl"
    table.write_text("\n".join(json.dumps(dict(zip(names, row, strict=True))) for row in rows))
    for file in (path, table):
        found = read_examples(file, text="title", label="stars", groups="who")
        assert found == ("text", [Example("good", "5", "ann"), Example("bad", "1", "bob")])
        _, found = read_examples(file, text="title", label="stars", groups="label")
        assert [(e.label, e.group) for e in found] == [("5", "0"), ("1", "0")]
        with pytest.raises(DataError, match=r"no (column )?name; it has: label, title, .*; choose with --text$"):
            read_examples(file, text="name", label="stars")
    path.write_text("title,stars\ngood, \n")
    with pytest.raises(DataError, match=r"line 2: the stars is empty$"):
        read_examples(path, text="title", label="stars")
    for options, message in {
        ("stars", "stars"): "--text and --label are both 'stars', expected two columns$",
        ("", "stars"): "--text is '', expected the name of a column$",
        ("title", ""): "--label is '', expected the name of a column$",
    }.items():
        with pytest.raises(DataError, match=message):
            read_examples(path, text=options[0], label=options[1])
    with pytest.raises(DataError, match=r"--groups is 'stars', expected a column beside title and stars$"):
        read_examples(path, text="title", label="stars", groups="stars")
    for options, name in (({"text": "title"}, "text"), ({"label": "stars"}, "label")):
        with pytest.raises(DataError, match=f"--{name} is '{options[name]}', but .* is no table: expected nothing"):
            read_examples(tmp_path, **options)


def test_long_texts_in_csv(tmp_path):
    text, path = "word " * 40_000, tmp_path / "a.csv"
    path.write_text(f"text,label\n{text},x\nb,y\n")
    limit = csv.field_size_limit()
    assert len(text) > limit and read_examples(path)[1] == [Example(text, "x"), Example("b", "y")]
    assert csv.field_size_limit() == limit
    path.write_text(f"text,label\n{text},x,\n")
    with pytest.raises(DataError, match="more than 2 columns"):
        read_examples(path)
    assert csv.field_size_limit() == limit


def test_unknown_label():
    examples = [Example("fine", "a"), Example("so long " * 20, "c")]
    with pytest.raises(DataError, match=r"label 'c' of example 1 \('so long .{49}\.\.\.'\) is not among .*: a, b$"):
        encode_labels(examples, ["a", "b"])


def test_hashes_and_duplicates(tmp_path):
    touch(*(tmp_path / name for name in ("1.png", "2.png")))
    (tmp_path / "3.png").write_bytes(b"y")
    examples = [Example(tmp_path / f"{i}.png", label) for i, label in enumerate("abb", 1)]
    examples += [Example(text, label) for text, label in (("x", "a"), (" x\n", "b"), ("X", "a"), ("x", "a"))]
    digests = digest_examples(examples)
    assert digests[0] == digests[1] == digests[3] == "2d711642b726b04401627ca9fbac32f5c8530fb1903cc4db02258717921a4881"
    # of caches that were made before there were digests
    assert hash_examples(examples[:4]) == "fd556ad195d3ea8f2f6925854500546cab99e6b3cb4837f87712738922a54b88"
    assert hash_examples(iter(examples)) == hash_examples(examples, digests)
    assert find_duplicates(examples) == find_duplicates(iter(examples), digests) == [[0, 1], [3, 4, 6]]
    conflicts = [group for group in find_duplicates(examples) if len({examples[i].label for i in group}) > 1]
    assert conflicts == [[0, 1], [3, 4, 6]] and find_duplicates(examples[2:4]) == []
    for example in examples[:3]:
        example.source.unlink()
    assert find_duplicates(examples, digests) == [[0, 1], [3, 4, 6]]


# groups and parts

SPEAKERS = "text,label,speaker,part\na,x, ann ,train\nb,y,7,TRAIN\nc,x,bob,DEV\nd,y,cat,test\n"


def test_groups_and_parts_of_tables(tmp_path, capsys):
    path = tmp_path / "a.csv"
    path.write_text(SPEAKERS)
    _, examples = read_examples(path, groups="speaker", split="part")
    expected = [("ann", "train"), ("7", "train"), ("bob", "validation"), ("cat", "test")]
    assert [(e.group, e.split) for e in examples] == expected
    assert encode_groups(examples).tolist() == [1, 0, 2, 3] and encode_parts(examples).tolist() == [0, 0, 1, 2]
    names = ("text", "label", "speaker", "part")
    rows = [(e.source, e.label, int(e.group) if e.group == "7" else e.group, e.split) for e in examples]
    table = tmp_path / "a.jsonl"
    table.write_text("\n".join(json.dumps(dict(zip(names, row, strict=True))) for row in rows))
    assert read_examples(table, groups="speaker", split="part")[1] == examples
    plain = read_examples(path)[1]
    assert plain == [Example(e.source, e.label) for e in examples]
    assert encode_groups(plain) is None and encode_parts(plain) is None
    found = [read_examples(path, **options)[1] for options in ({"groups": "speaker"}, {"split": "part"})]
    assert len({hash_examples(e) for e in (examples, plain, *found)}) == 4
    other = [Example("a", "x", split="train"), Example("b", "y", split="test")]
    assert hash_examples(other) != hash_examples([Example("a", "x", "train"), Example("b", "y", "test")])
    assert hash_examples(plain) == "b8bef63d0127bee924168b991e4cd747e0e2d524b619a43d808c1f9765bcedfe"
    assert not capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        ("train eval", "train test"),
        ("TRAINING Evaluation dev", "train test validation"),
        ("train eval test", "train validation test"),
        ("train evaluation testing", "train validation test"),
        ("train valid test", "train validation test"),
        ("train development test", "train validation test"),
    ],
)
def test_words_of_parts(words, parts, tmp_path):
    path = tmp_path / "a.csv"
    rows = [f"{label},{label}{i},{word}" for i, word in enumerate(words.split()) for label in "xy"]
    path.write_text("\n".join(["label,text,split", *rows]))
    assert [e.split for e in read_examples(path, split="split")[1]] == [p for p in parts.split() for _ in "xy"]
    touch(*(tmp_path / "data" / word / name / f"{word}.png" for word in words.split() for name in "xy"))
    found = {e.source.parts[-3]: e.split for e in read_examples(tmp_path / "data")[1]}
    assert found == dict(zip(words.split(), parts.split(), strict=True))


def test_a_column_split_that_is_not_used_is_told(tmp_path, capsys):
    path = tmp_path / "a.csv"
    for column, values, told in [
        ("split", "train test", True), ("Split", "Train eval", True), ("split", "train dev", False),
        ("split", "train 7", False), ("part", "train test", False),
    ]:  # fmt: skip
        first, second = values.split()
        path.write_text(f"text,label,{column}\na,x,{first}\nb,y,{first}\nc,y,{second}\n")
        assert all(e.split == "" for e in read_examples(path)[1])
        line = f"the column {column} of {path} is not used: its parts are kept with --split {column}\n"
        assert capsys.readouterr().out == (line if told else "")
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a", "label": 1}\n{"text": "b", "label": 0, "split": "test"}')
    read_examples(path)
    assert not capsys.readouterr().out


WORDS = "expected one of train, training, validation, valid, val, dev, development, test, testing, eval, evaluation"
BROKEN_COLUMNS = [
    ({"groups": "who"}, SPEAKERS, "has no column who; it has: text, label, speaker, part; choose with --groups$"),
    ({"groups": "who", "split": "s"}, SPEAKERS, "has no column who and no column s; it has: text"),
    ({"groups": "speaker"}, SPEAKERS.replace("bob", " "), "line 4: the speaker is empty$"),
    ({"split": "part"}, SPEAKERS.replace("DEV", ""), "line 4: the part is empty$"),
    ({"split": "part"}, SPEAKERS.replace("DEV", "trian"), f"line 4: the part is 'trian', {WORDS}$"),
    ({"split": "part"}, SPEAKERS.replace("test", "train"), "no test examples, all are of train, validation: expected "
     "train and test$"),
    ({"split": "part"}, SPEAKERS.replace("TRAIN", "dev"), "no train examples of class 'y', expected some of each "
     "class$"),
    ({"split": "part"}, SPEAKERS.replace("TRAIN", "val"), "column part: 'dev' and 'val' are words for one part, "
     "validation: expected one of them$"),
    ({"groups": "speaker", "split": "part"}, SPEAKERS.replace("cat", "ann"), "1 groups are in two parts or more, 'ann':"
     " expected each in one of train, validation, test$"),
    ({"groups": "label"}, SPEAKERS, "--groups is 'label', expected a column beside text and label$"),
    ({"split": ""}, SPEAKERS, "--split is '', expected a column beside text and label$"),
    ({"groups": "part", "split": "part"}, SPEAKERS, "--groups and --split are both 'part', expected two columns$"),
]  # fmt: skip
BROKEN_KEYS = [
    ({"groups": "who"}, {}, "line 1: no who; it has: text, label; choose with --groups$"),
    ({"split": "part"}, {}, "line 1: no part; it has: text, label; choose with --split$"),
    ({"groups": "who"}, {"who": 1.5}, "line 1: the who is 1.5, expected a string or a whole number$"),
    ({"groups": "who"}, {"who": True}, "line 1: the who is True, expected a string or a whole number$"),
    ({"groups": "who"}, {"who": "\ud800"}, "line 1: the who is not in Unicode"),
    ({"split": "part"}, {"part": 1}, "line 1: the part is 1, expected a string$"),
    ({"split": "part"}, {"part": "unlabelled"}, f"line 1: the part is 'unlabelled', {WORDS}$"),
]


@pytest.mark.parametrize(("options", "content", "message"), BROKEN_COLUMNS, ids=range(len(BROKEN_COLUMNS)))
def test_broken_groups_and_parts(options, content, message, tmp_path):
    path = tmp_path / "a.csv"
    path.write_text(content)
    with pytest.raises(DataError, match=message) as error:
        read_examples(path, **options)
    assert str(path) in str(error.value) or "--" in message


@pytest.mark.parametrize(("options", "row", "message"), BROKEN_KEYS, ids=range(len(BROKEN_KEYS)))
def test_broken_groups_and_parts_of_jsonl(options, row, message, tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"text": "a", "label": "x", **row}))
    with pytest.raises(DataError, match=rf"a\.jsonl, {message}"):
        read_examples(path, **options)


def test_examples_of_which_some_have_a_group():
    examples = [Example("a", "x", "ann", "train"), Example("b", "y", "", "")]
    for encode, name in ((encode_groups, "group"), (encode_parts, "split")):
        with pytest.raises(DataError, match=rf"^example 1 \('b'\) has no {name}, expected one for each example or for"):
            encode(examples)
    with pytest.raises(DataError, match=r"^the split of example 0 \('a'\) is 'dev', expected one of train, validation"):
        encode_parts([Example("a", "x", split="dev")])


# folders


def touch(*paths):
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x")


def test_folders(tmp_path):
    root = tmp_path / "data"
    with pytest.raises(DataError, match="data: no such file or folder"):
        read_examples(root)
    touch(root / "README.md")
    with pytest.raises(DataError, match="expected one subfolder for each class, there is none"):
        read_examples(root)
    touch(root / "b/2.png", root / "b/10.JPG", root / "b/deep/1.bmp", root / ".git/x", root / "b/.DS_Store")
    with pytest.raises(DataError, match="3 examples of 1 classes"):
        read_examples(root)
    touch(root / "a/9.jpeg", root / "a/Thumbs.db", root / "b/deep/desktop.ini", root / "__MACOSX/a/9.jpeg")
    names = ["a/9.jpeg", "b/10.JPG", "b/2.png", "b/deep/1.bmp"]
    assert read_examples(root) == ("vision", [Example(root / name, name[0]) for name in names])
    (root / "c").mkdir()
    with pytest.raises(DataError, match=r"data/c: no images or sounds, expected some for each class"):
        read_examples(root)
    touch(root / "c/1.wav")
    with pytest.raises(DataError, match=r"only images \(png, .* or sounds \(wav, .*, it holds .*9\.jpeg and .*1\.wav"):
        read_examples(root)
    (root / "c/1.wav").rename(root / "c/1.doc")
    with pytest.raises(DataError, match=r"it holds .*9\.jpeg and .*1\.doc"):
        read_examples(root)
    touch(root / "1.png")
    with pytest.raises(DataError, match=r"1\.png is in no class"):
        read_examples(root)


def test_kinds_of_files(tmp_path):
    images, sounds = "gif webp avif tif TIFF bmp jfif", "wav flac ogg oga opus mp3 aiff AIF aifc"
    for modality, kinds in {"vision": images, "speech": sounds}.items():
        paths = [tmp_path / modality / "ab"[i % 2] / f"1.{kind}" for i, kind in enumerate(kinds.split())]
        touch(*paths)
        found = read_examples(tmp_path / modality)
        assert found[0] == modality and [e.source for e in found[1]] == sorted(paths)


LITTER = "Thumbs.db ehthumbs_vista.db .DS_Store ._1.png desktop.ini $RECYCLE.BIN/1.png lost+found/a.txt #recycle/1.wav"


@pytest.mark.parametrize("name", LITTER.split())
def test_what_systems_put_into_folders(name, tmp_path):
    """Check files and folders beside data, in the root, in a class and in a folder below."""
    files = [tmp_path / name for name in ("a/1.png", "a/deep/2.png", "b/3.png")]
    touch(*files, *(tmp_path / folder / name for folder in ("", "a", "a/deep", "b")))
    assert read_examples(tmp_path)[1] == [Example(file, file.relative_to(tmp_path).parts[0]) for file in files]


def test_links(tmp_path):
    root, store = tmp_path / "data", tmp_path / "store"
    touch(store / "cats/1.png", store / "dogs/deep/2.png", store / "3.png")
    root.mkdir()
    (root / "cat").symlink_to(store / "cats")  # a linked class, a linked folder in a class, a linked file
    (root / "dog").mkdir()
    (root / "dog/more").symlink_to(store / "dogs")
    (root / "dog/3.png").symlink_to(store / "3.png")
    names = ["cat/1.png", "dog/3.png", "dog/more/deep/2.png"]
    assert read_examples(root) == ("vision", [Example(root / name, name[:3]) for name in names])
    for link in (root / "dog/more/deep/loop", root / "dog/loop"):
        link.symlink_to(root / "dog")
        with pytest.raises(DataError, match=f"{link} is a link to {root}/dog, a folder that it is in itself"):
            read_examples(root)
        link.unlink()
    for link in (root / "dog/4.png", root / "bird"):
        link.symlink_to("nowhere")
        with pytest.raises(DataError, match=f"{link} is a link to nowhere, which does not exist"):
            read_examples(root)
        link.unlink()
    os.mkfifo(root / "cat/pipe.png")
    with pytest.raises(DataError, match=r"pipe\.png is no file, expected a file or a folder"):
        read_examples(root)


NESTED = [
    ("train/cat/1 train/dog/1 val/cat/1 val/dog/1", r"holds train, val, which are parts .* give the path of one of"),
    ("train/cat/1 train/dog/1 test/cat/1 more/1", r"holds test, train, which are parts .* expected one subfolder for "
     "each class, or the folders train, test and perhaps validation, nothing beside them, and classes in each"),
    ("Training/cat/1 Training/dog/1 test/2", r"test: expected one subfolder for each class, there is none$"),
    ("train/cat/1 train/dog/1 test/cat/1 test/2", r"test/2\.png is in no class: expected one subfolder for each c"),
    ("train/cat/1 train/dog/1 test/cat/1 2", r"data/2\.png is in no class: expected one subfolder for each class$"),
    ("train/cat/1 train/dog/1 test/cat/1 test/bird/2", "data: no train examples of class 'bird', expected some of ea"),
    ("train/cat/1 train/dog/1 test/cat/1 val/bird/2 val/cow/1", "no train examples of class 'bird', 'cow', expected"),
    ("train/cat/1 train/dog/1 test/cat/1 dev/cat/1 val/cat/1", "data: 'dev' and 'val' are words for one part, valid"),
    ("train/cat/1 test/cat/1", "2 examples of 1 classes"),
    ("train/cat/1 train/dog/1", "expected one subfolder for each class; give .*/data/train, which holds cat, dog$"),
    ("train/more/cat/1 train/more/dog/1 test/cat/1", "data/train: expected .*; give .*/data/train/more, which holds"),
    ("train/a/cat/1 train/b/cat/1 test/cat/1", "data/train: a, b hold the same folders, cat, as parts of a data set"),
    ("train/cat/1 train/dog/1 test/cat/1.wav", r"data: expected only images .*, it holds .*1\.wav and .*1\.png$"),
    ("train2017/1 val2017/2 README.txt", "holds train2017, val2017, which are parts"),
    ("my_train/cat/1 my_test/dog/1 more/1", "holds my_test, my_train, which are parts"),
    ("fold1/cat/1 fold1/dog/1 fold2/cat/2 fold3/bird/3", r"fold1, fold2 hold the same folders, cat, as parts of a .*"),
    ("cat/train/1 dog/train/2 cat/test/3", r"cat, dog hold the same folders, train, .*directly into its folder; if "
     "these folders are groups, like speakers, give --groups folder$"),
    ("data/cat/1 data/dog/2 notes.txt", r"for each class; give .*/data, which holds cat, dog$"),
    ("data/images/cat/1 data/images/dog/2", r"for each class; give .*/data/images, which holds cat, dog$"),
]  # fmt: skip


@pytest.mark.parametrize("names, message", NESTED, ids=range(len(NESTED)))
def test_folders_that_are_no_classes(tmp_path, names, message):
    touch(*(tmp_path / "data" / (name if "." in name else name + ".png") for name in names.split()))
    with pytest.raises(DataError, match=message):
        read_examples(tmp_path / "data")


@pytest.mark.parametrize("names", [("train", "validation", "test"), ("Training", "TEST")], ids=str)
def test_folders_that_are_parts(names, tmp_path):
    for name in names:
        touch(tmp_path / name / "cat/deep/1.png", tmp_path / name / "dog/2.png", tmp_path / name / "README.md")
    touch(tmp_path / "LICENSE", tmp_path / ".git/x", tmp_path / names[0] / "bird/3.png")
    modality, examples = read_examples(tmp_path)
    words = {"training": "train"}
    expected = [(name, words.get(name.lower(), name.lower())) for name in sorted(names)]
    found = [(e.source.relative_to(tmp_path).as_posix(), e.label, e.split, e.group) for e in examples]
    wanted = [
        (f"{name}/{file}", file.split("/")[0], part, "")
        for name, part in expected
        for file in ("bird/3.png", "cat/deep/1.png", "dog/2.png")
        if name == names[0] or file[0] != "b"
    ]
    assert modality == "vision" and found == wanted
    (tmp_path / names[1] / "cow").mkdir()
    with pytest.raises(DataError, match=f"{names[1]}/cow: no images or sounds, expected some for each class"):
        read_examples(tmp_path)


def test_folders_that_are_groups(tmp_path):
    root = tmp_path / "data"
    touch(root / "happy/ann/1.wav", root / "happy/bob/deep/2.wav", root / "sad/ann/3.wav")
    examples = read_examples(root, groups="folder")[1]
    assert [(e.label, e.group, e.split) for e in examples] == [
        ("happy", "ann", ""), ("happy", "bob", ""), ("sad", "ann", "")
    ]  # fmt: skip
    assert encode_groups(examples).tolist() == [0, 1, 0]
    with pytest.raises(DataError, match=r"happy, sad hold the same folders, ann, .* give --groups folder$"):
        read_examples(root)
    for part, group in (("train", "cat"), ("test", "dan")):
        touch(
            tmp_path / "parts" / part / "happy" / group / "1.wav", tmp_path / "parts" / part / "sad" / group / "2.wav"
        )
    examples = read_examples(tmp_path / "parts", groups="folder")[1]
    assert sorted({(e.split, e.group) for e in examples}) == [("test", "dan"), ("train", "cat")]
    touch(tmp_path / "parts/test/sad/cat/9.wav")
    with pytest.raises(
        DataError, match="parts: 1 groups are in two parts or more, 'cat': expected each in one of train"
    ):
        read_examples(tmp_path / "parts", groups="folder")
    touch(root / "sad/4.wav")
    with pytest.raises(
        DataError, match=r"sad/4\.wav is in no group: with --groups folder expected a folder for each gro"
    ):
        read_examples(root, groups="folder")
    touch(tmp_path / "inner/cat/train/1.wav", tmp_path / "inner/dog/test/1.wav")
    with pytest.raises(DataError, match="inner: classes hold test, train, which are parts of a data set and no groups"):
        read_examples(tmp_path / "inner", groups="folder")
    with pytest.raises(
        DataError, match=r"--groups is 'speaker', but .* is a folder: expected 'folder', where each class"
    ):
        read_examples(root, groups="speaker")
    with pytest.raises(
        DataError, match=r"--split is 'part', but .* is a folder: expected nothing, its folders train, va"
    ):
        read_examples(root, split="part")
    with pytest.raises(DataError, match=r"has no column folder; it has: text, label; choose with --groups$"):
        read_examples(TEXTS, groups="folder")


CLASSES = ["train/1 car/1 bus/1", "s1/2020/1 s2/2021/1", "a/deep/1 a/2 b/deep/1 b/2", "latest/a/1 trainer/b/1"]


@pytest.mark.parametrize("names", CLASSES)
def test_folders_that_are_classes(tmp_path, names):
    touch(*(tmp_path / f"{name}.png" for name in names.split()))
    assert {e.label for e in read_examples(tmp_path)[1]} == {name.split("/")[0] for name in names.split()}


# pictures


def pixels(path):
    image = read_image(path)
    assert image.mode == "RGB"
    return np.asarray(image).astype(int)


def write_png(path, depth, kind, row, width, *chunks):
    """Write a picture of one row, without Pillow."""
    head = struct.pack(">IIBBBBB", width, 1, depth, kind, 0, 0, 0)
    body = [(b"IHDR", head), *chunks, (b"IDAT", zlib.compress(b"\0" + row)), (b"IEND", b"")]
    parts = [struct.pack(">I", len(d)) + n + d + struct.pack(">I", zlib.crc32(n + d)) for n, d in body]
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(parts))


def write_tiff(path, order, bits, row, width, photometric=1, sample_format=1, channels=1, extra=None):
    """Write a picture of one row, without Pillow."""
    tags = {256: [width], 257: [1], 258: [bits] * channels, 259: [1], 262: [photometric], 273: [200], 277: [channels]}
    tags |= {278: [1], 279: [len(row)], 339: [sample_format] * channels} | ({} if extra is None else {338: [extra]})
    data = {"<": b"II*\0", ">": b"MM\0*"}[order] + struct.pack(order + "IH", 8, len(tags))
    for tag, values in sorted(tags.items()):
        data += struct.pack(order + "HHI4s", tag, 3, len(values), struct.pack(f"{order}{len(values)}H", *values))
    path.write_bytes(data.ljust(200, b"\0") + row)


# what 0, 1000, a half, one less and all of 16 bits become: value / 257, to the nearest
DEEP = {0: 0, 1000: 4, 32768: 128, 65534: 255, 65535: 255}


@pytest.mark.parametrize("order", "<>")
def test_grey_of_16_bits(tmp_path, order):
    values, expected = list(DEEP), [[v] * 3 for v in DEEP.values()]
    row = struct.pack(order + "5H", *values)
    write_tiff(tmp_path / "a.tif", order, 16, row, 5)
    assert pixels(tmp_path / "a.tif")[0].tolist() == expected
    write_png(tmp_path / "a.png", 16, 0, struct.pack(">5H", *values), 5)
    assert pixels(tmp_path / "a.png")[0].tolist() == expected
    write_png(tmp_path / "a.png", 16, 0, struct.pack(">5H", *values), 5, (b"tRNS", struct.pack(">H", 1000)))
    assert pixels(tmp_path / "a.png")[0, :, 0].tolist() == [0, 255, 128, 255, 255]
    if order == "<":  # of which Pillow says nothing: 0 is white, and 12 bits
        write_tiff(tmp_path / "a.tif", order, 16, row, 5, photometric=0)
        assert pixels(tmp_path / "a.tif")[0, :, 0].tolist() == [255, 251, 127, 0, 0]
        write_tiff(tmp_path / "a.tif", order, 12, bytes([0xFF, 0xF8, 0x00]), 2)
        assert pixels(tmp_path / "a.tif")[0, :, 0].tolist() == [255, 128]


def test_numbers_of_which_none_is_white(tmp_path):
    path = tmp_path / "a.tif"
    for array, mode in {np.float32: "F", np.int32: "I"}.items():
        Image.fromarray(np.ones((2, 2), array)).save(path)
        with pytest.raises(DataError, match=rf"a\.tif: a TIFF image of mode {mode}, expected 8 or 16 bits"):
            read_image(path)
    write_tiff(path, "<", 16, struct.pack("<2h", -5, 5), 2, sample_format=2)
    with pytest.raises(DataError, match=r"a\.tif: a TIFF image of mode I, expected 8 or 16 bits"):
        read_image(path)


# how a stored picture is turned, by its orientation (EXIF 2.32, table 6)
TURNS = [
    lambda a: a, lambda a: a[:, ::-1], lambda a: a[::-1, ::-1], lambda a: a[::-1],
    lambda a: a.T, lambda a: a[::-1].T, lambda a: a[::-1, ::-1].T, lambda a: a[:, ::-1].T,
]  # fmt: skip


@pytest.mark.parametrize("kind", ["jpg", "png", "tif", "webp"])
def test_orientation(tmp_path, kind):
    stored, path = np.kron([[0, 50, 100], [150, 200, 250]], np.ones((16, 16))).astype(np.uint8), tmp_path / f"a.{kind}"
    images = [Image.fromarray(stored)]
    if kind in ("png", "tif"):
        images.append(Image.fromarray(stored.astype(np.uint16) * 257))
    for orientation, turn in enumerate(TURNS, 1):
        exif = Image.Exif()
        exif[0x0112] = orientation
        for image in images:
            image.save(path, exif=exif, quality=100)
            found = pixels(path)[..., 0]
            assert found.shape == turn(stored).shape and np.abs(found - turn(stored)).max() <= 3


def test_broken_exif_is_left_out(tmp_path):
    write_png(tmp_path / "a.png", 8, 0, b"\x09\x63", 2, (b"eXIf", b"garbage!"))
    assert pixels(tmp_path / "a.png")[0].tolist() == [[9] * 3, [99] * 3]


RED_GREEN = (b"PLTE", bytes([255, 0, 0, 0, 255, 0]))
PNGS = {  # depth, kind, row, chunks: two pixels
    "RGBA": (8, 6, [255, 0, 0, 0, 0, 100, 200, 128], [], [[255] * 3, [127, 177, 227]]),
    "LA": (8, 4, [0, 0, 100, 51], [], [[255] * 3, [224] * 3]),
    "LA16": (16, 4, [100, 0, 0, 0, 100, 0, 255, 255], [], [[255] * 3, [100] * 3]),
    "P": (8, 3, [0, 1], [RED_GREEN], [[255, 0, 0], [0, 255, 0]]),
    "P, one alpha": (8, 3, [0, 1], [RED_GREEN, (b"tRNS", b"\0")], [[255] * 3, [0, 255, 0]]),
    "P, alphas": (8, 3, [0, 1], [RED_GREEN, (b"tRNS", b"\xff\x33")], [[255, 0, 0], [204, 255, 204]]),
    "RGB, key": (8, 2, [1, 2, 3, 4, 5, 6], [(b"tRNS", bytes([0, 1, 0, 2, 0, 3]))], [[255] * 3, [4, 5, 6]]),
    "RGB16, key": (16, 2, [1, 9, 2, 9, 3, 9] * 2, [(b"tRNS", bytes([1, 9, 2, 9, 3, 9]))], [[255] * 3] * 2),
    "L, key": (8, 0, [7, 8], [(b"tRNS", b"\0\7")], [[255] * 3, [8] * 3]),
    "4 bits, key": (4, 0, [0x52], [(b"tRNS", b"\0\5")], [[255] * 3, [34] * 3]),
    "2 bits, key": (2, 0, [0b01100000], [(b"tRNS", b"\0\1")], [[255] * 3, [170] * 3]),
    "1 bit, key": (1, 0, [0b01000000], [(b"tRNS", b"\0\0")], [[255] * 3] * 2),
}


@pytest.mark.parametrize("case", PNGS.values(), ids=PNGS)
def test_transparency_is_white(tmp_path, case):
    depth, kind, row, chunks, expected = case
    write_png(tmp_path / "a.png", depth, kind, bytes(row), 2, *chunks)
    assert np.abs(pixels(tmp_path / "a.png")[0] - expected).max() <= 1


def test_premultiplied_transparency(tmp_path):
    write_tiff(tmp_path / "a.tif", "<", 8, bytes([0, 0, 60, 128]), 2, channels=2, extra=1)
    assert np.abs(pixels(tmp_path / "a.tif")[0] - [[255] * 3, [60 + 127] * 3]).max() <= 1


COLOURS = np.array([[255, 0, 0], [0, 128, 0], [10, 20, 200], [255, 255, 255], [0, 0, 0]])
MODES = {"RGB": "bmp gif png", "RGBA": "webp tif", "P": "png gif", "CMYK": "jfif tif", "YCbCr": "jpg tif"}


@pytest.mark.parametrize("mode", MODES)
def test_colours(tmp_path, mode):
    image = Image.fromarray(np.kron(COLOURS[:, None], np.ones((16, 16, 1))).astype(np.uint8))
    for kind in MODES[mode].split():
        stored = image.quantize(5) if mode == "P" else image.convert(mode)
        stored.save(tmp_path / f"a.{kind}", quality=100)
        found = pixels(tmp_path / f"a.{kind}")[8::16, 8]
        assert found.shape == (5, 3) and np.abs(found - COLOURS).max() <= 4, kind


def test_shades(tmp_path):
    for mode, values in {"1": [0, 255], "L": [0, 77, 255]}.items():
        image = Image.new(mode, (len(values), 1))
        image.putdata(values)
        for kind in ("png", "bmp", "tif", "gif"):
            image.save(tmp_path / f"a.{kind}")
            assert pixels(tmp_path / f"a.{kind}")[0].tolist() == [[value] * 3 for value in values]
    # lightness 50.2 reflects (66.2 / 116) ** 3 of the light, which is 119.4 in sRGB
    Image.frombytes("LAB", (1, 1), bytes([128, 0, 0])).save(tmp_path / "lab.tif")
    assert np.abs(pixels(tmp_path / "lab.tif") - 119.4).max() <= 1.5


def test_colour_profiles(tmp_path):
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    # its red and green exchanged, under another name
    profile = srgb.replace(b"rXYZ", b"....").replace(b"gXYZ", b"rXYZ").replace(b"....", b"gXYZ")
    profile = profile.replace("sRGB".encode("utf-16-be"), "mine".encode("utf-16-be"))
    path, red = tmp_path / "a.png", Image.new("RGB", (1, 1), (255, 0, 0))
    for content, image, expected in (
        (profile, red, [0, 255, 0]), (srgb, red, [255, 0, 0]), (b"broken", red, [255, 0, 0]),
        (profile, red.convert("L"), [76] * 3), (profile, red.convert("P"), [0, 255, 0]),
    ):  # fmt: skip
        image.save(path, icc_profile=content)
        assert np.abs(pixels(path)[0, 0] - expected).max() <= 1


def test_pages_and_frames(tmp_path):
    first, second = (Image.new("L", (4, 4), value) for value in (50, 200))
    for kind in ("gif", "webp", "png"):
        first.save(tmp_path / f"a.{kind}", save_all=True, append_images=[second])
        assert (pixels(tmp_path / f"a.{kind}") == 50).all()
    path = tmp_path / "a.tif"
    first.save(path, save_all=True, append_images=[second])
    with pytest.raises(DataError, match=r"a\.tif: a TIFF of 2 pages, expected one"):
        read_image(path)
    smaller = second.copy()
    smaller.encoderinfo = {"tiffinfo": {254: 1}}  # of the first page
    first.save(path, save_all=True, append_images=[smaller])
    assert (pixels(path) == 50).all()


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data", "ignore:Truncated File Read")  # Pillow's own
def test_broken_images(tmp_path, monkeypatch):
    noise = np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8)
    for kind in ("png", "jpg", "bmp", "gif", "webp", "tif"):
        path = tmp_path / f"a.{kind}"
        Image.fromarray(noise).save(path)
        whole = path.read_bytes()
        for part in (whole[: len(whole) // 2], whole[:20], b"\x89PNG nothing"):
            path.write_bytes(part)
            with pytest.raises(DataError, match=rf"a\.{kind}: no image that can be read \("):
                read_image(path)
        path.write_bytes(b"")
        with pytest.raises(DataError, match=rf"a\.{kind}: the file is empty$"):
            read_image(path)
        path.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
        with pytest.raises(DataError, match=rf"a\.{kind}: git-lfs keeps the file elsewhere.*: run git lfs pull"):
            read_image(path)
        path.write_bytes(whole)
        with monkeypatch.context() as patch, pytest.raises(DataError, match=r"no image .*decompression bomb"):
            patch.setattr(Image, "MAX_IMAGE_PIXELS", 900)
            read_image(path)
    with pytest.raises(DataError, match=r"nowhere\.png: no image that can be read"):
        read_image(tmp_path / "nowhere.png")


# sounds


def write_wav(path, samples, code, bits, rate=16000, channels=1, guid=None, promised=None):
    """Write a WAV file, without a library; with a GUID in WAVE_FORMAT_EXTENSIBLE."""
    width = bits // 8 * channels
    head = struct.pack("<HHIIHH", 0xFFFE if guid else code, channels, rate, rate * width, width, bits)
    if guid:
        head += struct.pack("<HHIH", 22, bits, 0, code) + bytes.fromhex("000000001000800000aa00389b71")
    size = len(samples) if promised is None else promised
    body = b"WAVEfmt " + struct.pack("<I", len(head)) + head + b"LIST" + struct.pack("<I", 3) + b"odd\0"
    path.write_bytes(b"RIFF" + struct.pack("<I", 0) + body + b"data" + struct.pack("<I", size) + samples)


WAVS = {  # -1, 0 and a half
    "8": (1, 8, bytes([0, 128, 192])),
    "16": (1, 16, struct.pack("<3h", -(2**15), 0, 2**14)),
    "24": (1, 24, bytes([0, 0, 0x80, 0, 0, 0, 0, 0, 0x40])),
    "32": (1, 32, struct.pack("<3i", -(2**31), 0, 2**30)),
    "float": (3, 32, struct.pack("<3f", -1, 0, 0.5)),
    "double": (3, 64, struct.pack("<3d", -1, 0, 0.5)),
}


@pytest.mark.parametrize("guid", [False, True], ids=["plain", "extensible"])
@pytest.mark.parametrize("code, bits, samples", WAVS.values(), ids=WAVS)
def test_wav(tmp_path, code, bits, samples, guid):
    path = tmp_path / "a.wav"
    write_wav(path, samples, code, bits, 8000, guid=guid)
    found = read_sound(path, 8000)
    assert found.tolist() == [-1, 0, 0.5] and found.dtype == np.float32 and sound_seconds(path) == 3 / 8000


def test_channels_are_averaged(tmp_path):
    write_wav(tmp_path / "a.wav", struct.pack("<4h", 2**14, 0, -(2**15), 2**14), 1, 16, channels=2)
    assert read_sound(tmp_path / "a.wav", 16000).tolist() == [0.25, -0.25]


KINDS = {
    "flac": {},
    "ogg": {},
    "mp3": {},
    "aiff": {},
    "wav": {"format": "WAVEX"},
    "aif": {"format": "AIFF", "subtype": "FLOAT"},
    "aifc": {"format": "AIFF", "subtype": "DOUBLE"},
    "oga": {"format": "OGG", "subtype": "VORBIS"},
}


def tone(rate, seconds, channels=1):
    wave = 0.5 * np.sin(2 * np.pi * 440 * np.arange(int(rate * seconds)) / rate)
    return np.stack([wave * 1.5, wave * 0.5][:channels], 1) if channels > 1 else wave


@pytest.mark.parametrize("kind", KINDS)
def test_kinds_and_rates(tmp_path, kind):
    path = tmp_path / f"a.{kind}"
    soundfile.write(path, tone(44100, 1.5, 2), 44100, **KINDS[kind])
    assert sound_seconds(path) == 1.5
    for rate in (44100, 16000, 48000):
        found, expected = read_sound(path, rate), tone(rate, 1.5)
        assert found.dtype == np.float32 and found.shape == expected.shape
        # the ends ring, codecs are not exact
        inner = slice(rate // 10, -rate // 10)
        assert np.abs(found - expected)[inner].max() < (1e-2 if kind in ("ogg", "oga", "mp3") else 1e-3)
    assert len(read_sound(path, 16000, seconds=0.25)) == 4000
    assert len(read_sound(path, 16000, seconds=9)) == 24000


def test_what_comes_later_is_not_decoded(tmp_path):
    samples = np.zeros(300_000, np.float32)
    samples[200_000] = np.nan
    soundfile.write(tmp_path / "a.wav", samples, 16000, subtype="FLOAT")
    assert len(read_sound(tmp_path / "a.wav", 16000, seconds=12)) == 192_000
    with pytest.raises(DataError, match=r"a\.wav: sample 200000 is nan, expected finite numbers"):
        read_sound(tmp_path / "a.wav", 16000)
    samples[200_000] = -np.inf
    soundfile.write(tmp_path / "a.wav", samples, 16000, subtype="FLOAT")
    with pytest.raises(DataError, match=r"a\.wav: sample 200000 is -inf, expected finite numbers"):
        read_sound(tmp_path / "a.wav", 8000)


def test_unknown_lengths(tmp_path):
    """Check headers without a length, as programs leave them that write to a pipe."""
    path, samples = tmp_path / "a.wav", struct.pack("<500h", *range(500))
    for promised in (0xFFFFFFFF, 0x7FFFFFFF, 0x7FFFF000):
        write_wav(path, samples, 1, 16, promised=promised)
        assert len(read_sound(path, 16000)) == 500 and sound_seconds(path) == 500 / 16000
    soundfile.write(tmp_path / "a.flac", tone(16000, 5), 16000)
    data = bytearray((tmp_path / "a.flac").read_bytes())
    data[21:26] = [data[21] & 0xF0, 0, 0, 0, 0]  # STREAMINFO's 36 bits of total samples
    (tmp_path / "a.flac").write_bytes(data)
    assert len(read_sound(tmp_path / "a.flac", 16000)) == 80000 and sound_seconds(tmp_path / "a.flac") == 5


@pytest.mark.filterwarnings("error")
def test_mp3_without_a_header_of_lengths(tmp_path):
    """Check a file whose length a decoder would guess by its first frames, and stop in its middle."""
    rate, path = 22050, tmp_path / "a.mp3"
    noise = np.random.default_rng(0).normal(0, 0.1, 10 * rate)
    noise[5 * rate :] *= 1e-4
    soundfile.write(path, noise, rate, bitrate_mode="VARIABLE", compression_level=0.1)
    data = path.read_bytes()
    assert b"Xing" in data[:40] and len(read_sound(path, rate)) == 10 * rate
    bitrate = (0, 8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160)[data[2] >> 4] * 1000
    path.write_bytes(data[72 * bitrate // rate + (data[2] >> 1 & 1) :])
    assert soundfile.info(path).frames < 6 * rate
    assert 0 <= len(read_sound(path, rate)) - 10 * rate < 3 * 576 and abs(sound_seconds(path) - 10) < 0.1
    assert len(read_sound(path, rate, seconds=8)) == 8 * rate
    album = b"ID3\3\0\0" + bytes([0, 15, 0, 0]) + bytes(15 << 14)  # a picture of 240 KB
    path.write_bytes(album + album + data)
    assert len(read_sound(path, rate)) == 10 * rate


@pytest.mark.parametrize("kind", [*KINDS, "opus"])
def test_truncated_sounds(tmp_path, kind):
    path = tmp_path / f"a.{kind}"
    noise = np.random.default_rng(0).normal(0, 0.1, 48000)
    soundfile.write(path, noise, 48000, **({"format": "OGG", "subtype": "OPUS"} if kind == "opus" else KINDS[kind]))
    whole = path.read_bytes()
    assert len(read_sound(path, 48000)) == 48000
    for fraction in (0.99, 0.5, 0.02):
        path.write_bytes(whole[: int(len(whole) * fraction)])
        with pytest.raises(DataError, match=rf"a\.{kind}: (the file is truncated|no sound that can be read)"):
            read_sound(path, 48000)


def test_broken_sounds(tmp_path):
    path = tmp_path / "a.wav"
    write_wav(path, b"", 1, 16)
    with pytest.raises(DataError, match=r"a\.wav: no samples, expected one or more"):
        read_sound(path, 16000)
    write_wav(path, bytes(180), 1, 16, promised=200)
    for read in (lambda path: read_sound(path, 16000), sound_seconds):
        with pytest.raises(DataError, match=r"a\.wav: the file is truncated, it holds 180 bytes of sound of 200"):
            read(path)
    for data, message in {
        b"": "the file is empty$", b"RIFFnot a wave file": "no sound that can be read .*ormat",
        b"version https://git-lfs.github.com/spec/v1": "git-lfs keeps .* run git lfs pull",
    }.items():  # fmt: skip
        path.write_bytes(data)
        with pytest.raises(DataError, match=rf"a\.wav: {message}"):
            read_sound(path, 16000)
    with pytest.raises(DataError, match=r"nowhere\.wav: no sound that can be read"):
        read_sound(tmp_path / "nowhere.wav", 16000)


def test_missing_extras():
    with pytest.raises(ImportError, match=r"The recipes need their extra: pip install 'daam-triton\[recipes\]'"):
        import_extra("no_such_module")


@pytest.mark.skipif(os.name != "posix", reason="other systems have names in Unicode")
def test_classes_whose_names_are_no_unicode(tmp_path):
    for name in (b"a", b"caf\xe9"):
        folder = os.path.join(os.fsencode(tmp_path), name)
        try:
            os.mkdir(folder)
        except OSError:
            pytest.skip("the file system has names in Unicode")
        Path(os.fsdecode(folder), "1.png").write_bytes(b"x")
    with pytest.raises(DataError, match=r"the name of class 'caf\\udce9' is not in UTF-8, expected one that is"):
        read_examples(tmp_path)
