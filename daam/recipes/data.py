"""Labelled examples out of a CSV or JSONL file of texts, or a folder of images or sounds per class."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import os
import re
import threading
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor

from daam.recipes.errors import UserError

IMAGES = ("png", "jpg", "jpeg", "bmp", "gif", "webp", "tif", "tiff")
SOUNDS = ("wav", "flac", "ogg", "mp3", "aif", "aiff")
KINDS = {**dict.fromkeys(IMAGES, "vision"), **dict.fromkeys(SOUNDS, "speech")}
FILES = f"images ({', '.join(IMAGES)}) or sounds ({', '.join(SOUNDS)})"
# What systems put into folders; hidden files begin with a dot.
LITTER = ("thumbs.db", "ehthumbs.db", "desktop.ini", "icon\r", "__macosx", "@eadir")
# A word that a folder's name has if the folder is a part of a data set, and what may follow if that is its whole name.
PART = re.compile(r"(?<![a-z])(train|test|val|dev|eval)(ing|id|idation|uation|elopment)?(?=set|[^a-z]|$)", re.I)
PART_END = re.compile(r"[\W_]*(set|data|images|split)?[\W_\d]*", re.I)

COLUMNS = ("text", "label")
JSON_TYPES = (("text", (str,), "a string"), ("label", (str, int), "a string or a whole number"))
LONGEST_CELL = 2**31 - 1  # characters of a cell of CSV: the most that csv takes on every system
CELL_LIMIT = threading.Lock()  # csv knows one limit for the process


class DataError(UserError):
    """Tell that data cannot be used; the message says which file, line or example, and what was expected."""


@dataclass
class Example:
    """Hold a text or the path of a file, and the name of its class."""

    source: str | Path
    label: str

    def __str__(self) -> str:
        source = str(self.source)
        return repr(source if isinstance(self.source, Path) or len(source) < 60 else source[:57] + "...")


def read_examples(path: str | Path) -> tuple[str, list[Example]]:
    """Return the modality, "text", "vision" or "speech", and the examples: rows as they come, files sorted.

    Args:
        path: a .csv or .jsonl file in UTF-8 with columns text and label; or a folder with one subfolder for each
            class, which holds images or sounds, directly or in folders below. Links are followed, hidden files left
            out. A text in CSV has at most 2**31 - 1 characters.

    Raises:
        DataError: no such file, nothing in it, fewer than two classes, something that does not belong there, or folders
            that hold parts of a data set, as train and test, instead of classes.
    """
    path = Path(path)
    if path.is_dir():
        modality, examples = _read_folder(path)
    elif not path.exists():
        raise DataError(f"{path}: no such file or folder")
    elif path.suffix.lower() in READERS:
        modality, examples = "text", [_example(path, *row) for row in READERS[path.suffix.lower()](path)]
    else:
        raise DataError(f"{path}: expected a .csv or .jsonl file, or a folder with one subfolder for each class")
    if len(names := class_names(examples)) < 2:
        raise DataError(f"{path}: {len(examples)} examples of {len(names)} classes, expected two classes or more")
    return modality, examples


def class_names(examples: Iterable[Example]) -> list[str]:
    """Return the labels there are, sorted."""
    return sorted({example.label for example in examples})


def encode_labels(examples: list[Example], names: list[str]) -> Tensor:
    """Return (examples,) of int64: the index of each label among the names; raise a DataError where one is missing."""
    index = {name: i for i, name in enumerate(names)}
    for i, example in enumerate(examples):
        if example.label not in index:
            raise DataError(
                f"label {example.label!r} of example {i} ({example}) is not among the classes: {', '.join(names)}"
            )
    return torch.tensor([index[example.label] for example in examples], dtype=torch.int64)


def digest_examples(examples: Iterable[Example]) -> list[str]:
    """Return the SHA-256 of each text or file, labels aside, in hexadecimal; raise OSError where one is unreadable."""
    return [_digest(example.source) for example in examples]


def hash_examples(examples: Iterable[Example], digests: list[str] | None = None) -> str:
    """Return the SHA-256 of labels, texts and contents of files, in their order; where files lie does not matter.
    digests: what `digest_examples` returned; without them the files are read, with an OSError where one cannot be.
    """
    examples = list(examples)
    total = hashlib.sha256()
    for example, digest in zip(examples, digests or digest_examples(examples), strict=True):
        total.update(hashlib.sha256(example.label.encode()).digest())
        total.update(bytes.fromhex(digest))
    return total.hexdigest()


def find_duplicates(examples: Iterable[Example], digests: list[str] | None = None) -> list[list[int]]:
    """Return the places of examples with one content, a list for each content that there is twice or more often.

    Texts are the same if they differ in blanks at their ends only, files if their bytes are. Labels do not enter: a
    group of several labels is a conflict. For digests see `hash_examples`.
    """
    places = defaultdict(list)
    for i, example in enumerate(examples):
        if isinstance(example.source, str):
            key = "text", example.source.strip()
        else:
            key = "file", digests[i] if digests else _digest(example.source)
        places[key].append(i)
    return [group for group in places.values() if len(group) > 1]


def _digest(source: str | Path) -> str:
    total = hashlib.sha256()
    with io.BytesIO(source.encode()) if isinstance(source, str) else source.open("rb") as file:
        while block := file.read(2**20):
            total.update(block)
    return total.hexdigest()


def _example(path: Path, line: int, row: dict) -> Example:
    for column in COLUMNS:
        value = str(row[column])
        if not value.strip():
            raise DataError(f"{path}, line {line}: the {column} is empty")
        try:
            value.encode()
        except UnicodeEncodeError as error:  # JSON can say half of a pair of UTF-16
            raise DataError(f"{path}, line {line}: the {column} is not in Unicode ({error})") from None
    return Example(row["text"], str(row["label"]).strip())


def _lines(path: Path) -> Iterator[str]:
    """Yield the lines of a file in UTF-8, with or without the mark that spreadsheets put before it."""
    with path.open(encoding="utf-8-sig", newline="") as file:
        try:
            for line in file:
                if "\0" in line:
                    raise DataError(f"{path}: not in UTF-8 (it holds NUL, as UTF-16 does)")
                yield line
        except UnicodeDecodeError as error:
            raise DataError(f"{path}: not in UTF-8 ({error})") from None


def _read_csv(path: Path) -> list[tuple[int, dict]]:
    reader = csv.DictReader(_lines(path), restval="", strict=True)
    rows = []
    with CELL_LIMIT:
        before = csv.field_size_limit(LONGEST_CELL)
        try:
            reader.fieldnames = _header(path, reader.fieldnames or [])
            for row in reader:
                if None in row:
                    raise DataError(
                        f"{path}, line {reader.line_num}: more than {len(reader.fieldnames)} columns; "
                        'put a text with commas into "quotes"'
                    )
                rows.append((reader.line_num, row))
        except csv.Error as error:
            # of the last row that was read: a quote that nobody closed runs to the end of the file
            raise DataError(f"{path}, line {reader.line_num + 1}: broken CSV ({error})") from None
        finally:
            csv.field_size_limit(before)
    return rows


def _header(path: Path, names: list[str]) -> list[str]:
    names = [name.strip() for name in names]
    found = [name for name in names if name]
    if twice := [name for name, count in Counter(found).items() if count > 1]:
        raise DataError(f"{path} has the column {' and the column '.join(twice)} twice; it has: {', '.join(found)}")
    if missing := [name for name in COLUMNS if name not in found]:
        message = f"{path} has no column {' and no column '.join(missing)}; it has: {', '.join(found)}"
        if len(found) == 1 and (other := re.search(r"[;|\t]", found[0])):
            message += f" (expected columns with commas between them, not {other[0]!r})"
        raise DataError(message)
    return names


def _read_jsonl(path: Path) -> Iterator[tuple[int, dict]]:
    for line, text in enumerate(_lines(path), 1):
        if not text.strip():
            continue
        try:
            row = json.loads(text, object_pairs_hook=_unique, parse_constant=_refuse_constant)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{path}, line {line}: broken JSON ({error})") from None
        if not isinstance(row, dict):
            raise DataError(f'{path}, line {line}: expected an object, {{"text": ..., "label": ...}}')
        for column, types, expected in JSON_TYPES:
            if column not in row:
                raise DataError(f"{path}, line {line}: no {column}; it has: {', '.join(row)}")
            # by its exact type, since True and False are of int too
            if type(row[column]) not in types:
                raise DataError(f"{path}, line {line}: the {column} is {row[column]!r}, expected {expected}")
        yield line, row


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if twice := [key for key, count in Counter(key for key, _ in pairs).items() if count > 1]:
        raise ValueError(f"{' and '.join(twice)} twice in an object")
    return dict(pairs)


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number of JSON")


READERS = {".csv": _read_csv, ".jsonl": _read_jsonl}


def _read_folder(root: Path) -> tuple[str, list[Example]]:
    files = sorted(_walk(root, ()))
    folders = [f for f in sorted(root.iterdir()) if f.is_dir() and not _is_litter(f)]
    if not folders:
        raise DataError(f"{root}: expected one subfolder for each class, there is none")
    if loose := [file for file in files if file.parent == root and _kind(file)]:
        raise DataError(f"{loose[0]} is in no class: expected one subfolder for each class")
    files = [file for file in files if file.parent != root]  # without a README beside the classes
    _check_classes(root, files)
    first = {_kind(file): file for file in reversed(files)}
    if len(first) > 1 or None in first:
        raise DataError(f"{root}: expected only {FILES}, it holds {' and '.join(map(str, sorted(first.values())))}")
    examples = [Example(file, file.relative_to(root).parts[0]) for file in files]
    names = set(class_names(examples))
    if broken := [name for name in names if name.encode(errors="ignore").decode() != name]:
        raise DataError(f"{root}: the name of class {broken[0]!a} is not in UTF-8, expected one that is")
    if empty := [str(f) for f in folders if f.name not in names]:
        raise DataError(f"{', '.join(empty)}: no images or sounds, expected some for each class")
    return next(iter(first)), examples


def _walk(folder: Path, outer: tuple[str, ...]) -> Iterator[Path]:
    """Yield the files in a folder and below it, through links; outer are the real paths of the folders around it."""
    outer = (*outer, os.path.realpath(folder))
    for path in folder.iterdir():
        if _is_litter(path):
            continue
        if path.is_file():
            yield path
        elif not path.is_dir():
            problem = f"a link to {os.readlink(path)}, which does not exist" if path.is_symlink() else "no file"
            raise DataError(f"{path} is {problem}, expected a file or a folder")
        elif os.path.realpath(path) in outer:
            raise DataError(f"{path} is a link to {os.readlink(path)}, a folder that it is in itself")
        else:
            yield from _walk(path, outer)


def _check_classes(root: Path, files: list[Path]) -> None:
    """Raise a DataError where first-level folders are not the classes, but hold them."""
    files = [file for file in files if _kind(file)]
    paths = [file.relative_to(root).parts for file in files]
    names = dict.fromkeys(first for first, *_ in paths)  # of first-level folders
    with_files = {first for first, *rest in paths if len(rest) == 1}  # those that hold files themselves
    advice = "expected one subfolder for each class: give the path of one of them"
    parts = {name: part for name in names if (part := _part(name, name in with_files))}
    if len(set(parts.values())) > 1:
        raise DataError(f"{root} holds {', '.join(parts)}, which are parts of a data set and no classes; {advice}")
    if len(names) == 1:
        folder = Path(os.path.commonpath([file.parent for file in files]))
        if all(file.parent != folder for file in files):
            inner = _some({file.relative_to(folder).parts[0] for file in files})
            raise DataError(f"{root}: expected one subfolder for each class; give {folder}, which holds {inner}")
    nested = {(first, folder) for first, folder, *_ in paths if first not in with_files}
    counts = Counter(folder for _, folder in nested)
    if same := {folder for folder, count in counts.items() if count > 1}:
        holders = {name for name, folder in nested if folder in same}
        raise DataError(
            f"{root}: {_some(holders)} hold the same folders, {_some(same)}, as parts of a data set do; {advice}, or "
            "put the files of each class directly into its folder"
        )


def _part(name: str, has_files: bool) -> str | None:
    """Return the word, like "train", that names a folder as a part of a data set; of one with files it is the name."""
    match = PART.search(name)
    if match and has_files and (match.start() or not PART_END.fullmatch(name, match.end())):
        return None
    return match and match[1].lower()


def _some(names: Iterable[str]) -> str:
    names = sorted(names)
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


def _kind(file: Path) -> str | None:
    return KINDS.get(file.suffix.lower().removeprefix("."))


def _is_litter(path: Path) -> bool:
    return path.name.startswith(".") or path.name.lower() in LITTER
