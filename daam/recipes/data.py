"""Labelled examples out of a CSV or JSONL file of texts, or a folder of images or sounds per class."""

from __future__ import annotations

import csv
import json
import re
import threading
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

from daam.recipes.examples import WORDS, DataError, Example, class_names, encode_parts, name_parts
from daam.recipes.folders import read_folder

COLUMNS = ("text", "label")
TEXT, NAME = ((str,), "a string"), ((str, int), "a string or a whole number")  # types of JSON
LONGEST_CELL = 2**31 - 1  # characters of a cell of CSV: the most that csv takes on every system
CELL_LIMIT = threading.Lock()  # csv knows one limit for the process


def read_examples(
    path: str | Path, *, groups: str | None = None, split: str | None = None
) -> tuple[str, list[Example]]:
    """Return the modality, "text", "vision" or "speech", and the examples: rows as they come, files sorted.

    A line is printed where a table has a column named split, of words for parts, that is not asked for.

    Args:
        path: a .csv or .jsonl file in UTF-8 with columns text and label; or a folder with one subfolder for each
            class, which holds images or sounds, directly or in folders below. Links are followed, hidden files left
            out. A text in CSV has at most 2**31 - 1 characters. A folder that holds train and test, perhaps validation,
            and nothing else is a predefined split: it has the classes in each of these, all of them in train.
        groups: the column that names the group of each row, like its speaker: a string, in JSONL or a whole number. For
            a folder "folder": the folder below a class is the group of what is in it, in all classes that have one of
            its name.
        split: the column that names the part of each row: train or training; validation, valid, val, dev or
            development; test or testing; in any case. "eval" and "evaluation" are test where no other word for it is
            there, else validation.

    Raises:
        DataError: no such file, nothing in it, fewer than two classes, something that does not belong there; folders
            that hold parts of a data set instead of classes, other than the above; no such column, an empty value in
            it, a word for no part; a class that does not train; a group in two parts.
    """
    path = Path(path)
    _check_columns(path, groups, split)
    if path.is_dir():
        modality, examples = read_folder(path, groups is not None)
    elif not path.exists():
        raise DataError(f"{path}: no such file or folder")
    elif path.suffix.lower() in READERS:
        modality, examples = "text", _read_table(path, groups, split)
    else:
        raise DataError(f"{path}: expected a .csv or .jsonl file, or a folder with one subfolder for each class")
    if len(names := class_names(examples)) < 2:
        raise DataError(f"{path}: {len(examples)} examples of {len(names)} classes, expected two classes or more")
    try:
        encode_parts(examples)
    except DataError as error:
        raise DataError(f"{path}: {error}") from None
    return modality, examples


def _check_columns(path: Path, groups: str | None, split: str | None) -> None:
    """Raise a DataError where columns that are asked for cannot be those of groups and parts."""
    if path.is_dir():
        if groups not in (None, "folder"):
            raise DataError(
                f"--groups is {groups!r}, but {path} is a folder: expected 'folder', where each class holds a folder "
                "for each group, or nothing"
            )
        if split is not None:
            raise DataError(
                f"--split is {split!r}, but {path} is a folder: expected nothing, its folders train, validation and "
                "test are its parts"
            )
    for option, column in {"--groups": groups, "--split": split}.items():
        if column in ("", *COLUMNS):
            raise DataError(f"{option} is {column!r}, expected a column beside {' and '.join(COLUMNS)}")
    if groups is not None and groups == split:
        raise DataError(f"--groups and --split are both {groups!r}, expected two columns")


def _read_table(path: Path, groups: str | None, split: str | None) -> list[Example]:
    columns = {"text": TEXT, "label": NAME}
    columns |= {column: kind for column, kind in ((groups, NAME), (split, TEXT)) if column is not None}
    rows = list(READERS[path.suffix.lower()](path, columns))
    examples = [_example(path, line, row, groups, split) for line, row in rows]
    if split is None:
        _tell_split(path, [row for _, row in rows])
        return examples
    try:
        parts = name_parts({example.split for example in examples})
    except DataError as error:
        raise DataError(f"{path}, column {split}: {error}") from None
    return [replace(example, split=parts[example.split]) for example in examples]


def _tell_split(path: Path, rows: list[dict]) -> None:
    """Print a line where a table has a column named split whose values name parts, those that train and test too."""
    for column in dict.fromkeys(key for row in rows[:1] for key in row if key.strip().lower() == "split"):
        parts = {WORDS.get(str(row.get(column)).strip().lower()) for row in rows}
        if None not in parts and "train" in parts and parts & {"test", "eval"}:
            print(f"the column {column} of {path} is not used: its parts are kept with --split {column}")


def _example(path: Path, line: int, row: dict, groups: str | None, split: str | None) -> Example:
    for column in (*COLUMNS, *filter(None, (groups, split))):
        value = str(row[column])
        if not value.strip():
            raise DataError(f"{path}, line {line}: the {column} is empty")
        try:
            value.encode()
        except UnicodeEncodeError as error:  # JSON can say half of a pair of UTF-16
            raise DataError(f"{path}, line {line}: the {column} is not in Unicode ({error})") from None
    part = str(row[split]).strip().lower() if split else ""
    if split and part not in WORDS:
        raise DataError(f"{path}, line {line}: the {split} is {row[split]!r}, expected one of {', '.join(WORDS)}")
    group = str(row[groups]).strip() if groups else ""
    return Example(row["text"], str(row["label"]).strip(), group, part)


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


def _read_csv(path: Path, columns: Iterable[str]) -> list[tuple[int, dict]]:
    reader = csv.DictReader(_lines(path), restval="", strict=True)
    rows = []
    with CELL_LIMIT:
        before = csv.field_size_limit(LONGEST_CELL)
        try:
            reader.fieldnames = _header(path, reader.fieldnames or [], columns)
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


def _header(path: Path, names: list[str], columns: Iterable[str]) -> list[str]:
    names = [name.strip() for name in names]
    found = [name for name in names if name]
    if twice := [name for name, count in Counter(found).items() if count > 1]:
        raise DataError(f"{path} has the column {' and the column '.join(twice)} twice; it has: {', '.join(found)}")
    if missing := [name for name in columns if name not in found]:
        message = f"{path} has no column {' and no column '.join(missing)}; it has: {', '.join(found)}"
        if len(found) == 1 and (other := re.search(r"[;|\t]", found[0])):
            message += f" (expected columns with commas between them, not {other[0]!r})"
        raise DataError(message)
    return names


def _read_jsonl(path: Path, columns: dict[str, tuple[tuple[type, ...], str]]) -> Iterator[tuple[int, dict]]:
    for line, text in enumerate(_lines(path), 1):
        if not text.strip():
            continue
        try:
            row = json.loads(text, object_pairs_hook=_unique, parse_constant=_refuse_constant)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{path}, line {line}: broken JSON ({error})") from None
        if not isinstance(row, dict):
            raise DataError(f'{path}, line {line}: expected an object, {{"text": ..., "label": ...}}')
        for column, (types, expected) in columns.items():
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
