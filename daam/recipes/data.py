"""Labelled examples out of a CSV or JSONL file of texts, or a folder of images or WAV files per class."""

from __future__ import annotations

import csv
import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

KINDS = {".png": "vision", ".jpg": "vision", ".jpeg": "vision", ".bmp": "vision", ".wav": "speech"}
COLUMNS = ("text", "label")


class DataError(ValueError):
    """Data cannot be used; the message says which file, line or example, and what was expected."""


@dataclass
class Example:
    """source: a text, or the path of a file. label: the name of its class."""

    source: str | Path
    label: str

    def __str__(self) -> str:
        source = str(self.source)
        return repr(source if isinstance(self.source, Path) or len(source) < 60 else source[:57] + "...")


def read_examples(path: str | Path) -> tuple[str, list[Example]]:
    """The modality, "text", "vision" or "speech", and the examples: rows as they come, files sorted.

    Args:
        path: a .csv or .jsonl file with columns text and label; or a folder with one subfolder for each class, which
            holds images (png, jpg, jpeg, bmp) or WAV files.

    Raises:
        DataError: no such file, nothing in it, fewer than two classes, or something that does not belong there.
    """
    path = Path(path)
    if path.is_dir():
        modality, examples = _folder(path)
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
    """The labels there are, sorted."""
    return sorted({example.label for example in examples})


def encode_labels(examples: list[Example], names: list[str]) -> Tensor:
    """(examples,) of int64: the index of each label among the names.

    Raises:
        DataError: a label is not among them.
    """
    index = {name: i for i, name in enumerate(names)}
    for i, example in enumerate(examples):
        if example.label not in index:
            raise DataError(
                f"label {example.label!r} of example {i} ({example}) is not among the classes: {', '.join(names)}"
            )
    return torch.tensor([index[example.label] for example in examples], dtype=torch.int64)


def hash_examples(examples: Iterable[Example]) -> str:
    """Of labels, texts and contents of files, in their order; where files lie does not matter.

    Raises:
        OSError: a file cannot be read.
    """
    total = hashlib.sha256()
    for example in examples:
        content = example.source.read_bytes() if isinstance(example.source, Path) else example.source.encode()
        for part in (example.label.encode(), content):
            total.update(hashlib.sha256(part).digest())
    return total.hexdigest()


def _example(path: Path, line: int, row: dict) -> Example:
    for column in COLUMNS:
        if not str(row[column]).strip():
            raise DataError(f"{path}, line {line}: the {column} is empty")
    return Example(row["text"], str(row["label"]).strip())


def _lines(path: Path) -> Iterator[str]:
    """Of a file in UTF-8, with or without the mark that spreadsheets put before it."""
    with path.open(encoding="utf-8-sig", newline="") as file:
        try:
            yield from file
        except UnicodeDecodeError as error:
            raise DataError(f"{path}: not in UTF-8 ({error})") from None


def _csv(path: Path) -> Iterator[tuple[int, dict]]:
    reader = csv.DictReader(_lines(path), restval="", strict=True)
    try:
        found = [name for name in reader.fieldnames or () if name]
        if missing := [name for name in COLUMNS if name not in found]:
            raise DataError(f"{path} has no column {' and no column '.join(missing)}; it has: {', '.join(found)}")
        for row in reader:
            if None in row:
                raise DataError(
                    f"{path}, line {reader.line_num}: more than {len(reader.fieldnames)} columns; "
                    'put a text with commas into "quotes"'
                )
            yield reader.line_num, row
    except csv.Error as error:
        # of the last row that was read: a quote that nobody closed runs to the end of the file
        raise DataError(f"{path}, line {reader.line_num + 1}: broken CSV ({error})") from None


def _jsonl(path: Path) -> Iterator[tuple[int, dict]]:
    for line, text in enumerate(_lines(path), 1):
        if not text.strip():
            continue
        try:
            row = json.loads(text)
        except json.JSONDecodeError as error:
            raise DataError(f"{path}, line {line}: broken JSON ({error})") from None
        if not isinstance(row, dict):
            raise DataError(f'{path}, line {line}: expected an object, {{"text": ..., "label": ...}}')
        for column, types in zip(COLUMNS, (str, (str, int)), strict=True):
            if column not in row:
                raise DataError(f"{path}, line {line}: no {column}; it has: {', '.join(row)}")
            if not isinstance(row[column], types):
                raise DataError(f"{path}, line {line}: the {column} is {row[column]!r}, expected a string")
        yield line, row


READERS = {".csv": _csv, ".jsonl": _jsonl}


def _folder(root: Path) -> tuple[str, list[Example]]:
    files = [f for f in sorted(root.rglob("*")) if f.is_file() and not _hidden(f.relative_to(root))]
    folders = [f for f in sorted(root.iterdir()) if f.is_dir() and not _hidden(f.relative_to(root))]
    if not folders:
        raise DataError(f"{root}: expected one subfolder for each class, there is none")
    first: dict[str, Path] = {}
    for file in files:
        if file.parent == root and file.suffix.lower() not in KINDS:
            continue  # a README beside the classes
        if file.parent == root:
            raise DataError(f"{file} is in no class: expected one subfolder for each class")
        first.setdefault(KINDS.get(file.suffix.lower(), "other"), file)
    if len(first) > 1 or "other" in first:
        kinds = "images (png, jpg, jpeg, bmp) or WAV files"
        raise DataError(f"{root}: expected only {kinds}, it holds {' and '.join(str(f) for f in first.values())}")
    examples = [Example(file, file.relative_to(root).parts[0]) for file in files if file.parent != root]
    if empty := [str(f) for f in folders if f.name not in class_names(examples)]:
        raise DataError(f"{', '.join(empty)}: no images or WAV files, expected some for each class")
    return next(iter(first)), examples


def _hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)
