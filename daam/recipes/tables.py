"""Rows of tables of texts: CSV, with commas or what else its header shows, and JSONL."""

from __future__ import annotations

import csv
import json
import threading
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NoReturn

from daam.recipes.examples import DataError

DELIMITERS = {",": "commas", ";": "semicolons", "\t": "tabs", "|": "bars"}  # of columns, in words
# What JSON may hold in the column that an option names.
TEXT, NAME = ((str,), "a string"), ((str, int), "a string or a whole number")
TYPES = {"--text": TEXT, "--label": NAME, "--groups": NAME, "--split": TEXT}
LONGEST_CELL = 2**31 - 1  # characters of a cell of CSV: the most that csv takes on every system
CELL_LIMIT = threading.Lock()  # csv knows one limit for the process


def read_rows(path: Path, columns: dict[str, str]) -> list[tuple[int, dict]]:
    """Return the rows of a table, each with the number of its line; the columns that are asked for have a value in all.

    Args:
        path: a file whose suffix is one of READERS, in UTF-8.
        columns: those that are needed, each with the option that names it, of TYPES.

    Raises:
        DataError: the file is empty, or not in UTF-8; a column is missing or there twice; a row is broken, its value
            in a column is empty, not in Unicode or of another type.
    """
    lines = list(_lines(path))
    if not any(map(str.strip, lines)):
        raise DataError(f"{path}: the file is empty")
    rows = list(READERS[path.suffix.lower()](path, lines, columns))
    for line, row in rows:
        for column in columns:
            value = str(row[column])
            if not value.strip():
                raise DataError(f"{path}, line {line}: the {column} is empty")
            try:
                value.encode()
            except UnicodeEncodeError as error:  # JSON can say half of a pair of UTF-16
                raise DataError(f"{path}, line {line}: the {column} is not in Unicode ({error})") from None
    return rows


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


def _read_csv(path: Path, lines: list[str], columns: dict[str, str]) -> list[tuple[int, dict]]:
    rows = []
    with CELL_LIMIT:
        before = csv.field_size_limit(LONGEST_CELL)
        try:
            delimiter = _delimiter(lines[0], columns)
            reader = csv.DictReader(lines, delimiter=delimiter, restval="", strict=True)
            reader.fieldnames = _header(path, reader.fieldnames or [], columns)
            for row in reader:
                if None in row:
                    raise DataError(
                        f"{path}, line {reader.line_num}: more than {len(reader.fieldnames)} columns; "
                        f'put a text with {DELIMITERS[delimiter]} into "quotes"'
                    )
                # whoever writes tabs often leaves quotes as they are: one that nobody closed takes in the next rows
                if delimiter == "\t" and any("\t" in value and "\n" in value for value in row.values()):
                    raise DataError(
                        f'{path}, line {reader.line_num}: a cell holds tabs and ends of lines, expected " at the '
                        'beginning of a cell at its end too, and "" for one inside'
                    )
                rows.append((reader.line_num, row))
        except csv.Error as error:
            # of the last row that was read: a quote that nobody closed runs to the end of the file
            raise DataError(f"{path}, line {reader.line_num + 1}: broken CSV ({error})") from None
        finally:
            csv.field_size_limit(before)
    return rows


def _delimiter(head: str, columns: Iterable[str]) -> str:
    """Return the first of DELIMITERS with which a header has all columns, or else the one that it has most of."""
    for delimiter in DELIMITERS:
        if {name.strip() for name in next(csv.reader([head], delimiter=delimiter))}.issuperset(columns):
            return delimiter
    return max(DELIMITERS, key=head.count)


def _header(path: Path, names: list[str], columns: dict[str, str]) -> list[str]:
    names = [name.strip() for name in names]
    found = [name for name in names if name]
    if twice := [name for name, count in Counter(found).items() if count > 1]:
        raise DataError(f"{path} has the column {' and the column '.join(twice)} twice; it has: {', '.join(found)}")
    if missing := [name for name in columns if name not in found]:
        raise DataError(f"{path} has no column {_tell_missing(missing, ' and no column ', found, columns)}")
    return names


def _tell_missing(missing: list[str], between: str, found: Iterable[str], columns: dict[str, str]) -> str:
    """Return in words which columns are missing, which there are, and the options that choose among them."""
    options = " and ".join(columns[name] for name in missing)
    return f"{between.join(missing)}; it has: {', '.join(found)}; choose with {options}"


def _read_jsonl(path: Path, lines: list[str], columns: dict[str, str]) -> Iterator[tuple[int, dict]]:
    for line, text in enumerate(lines, 1):
        if not text.strip():
            continue
        try:
            row = json.loads(text, object_pairs_hook=_unique, parse_constant=_refuse_constant)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{path}, line {line}: broken JSON ({error})") from None
        if not isinstance(row, dict):
            keys = ", ".join(f'"{column}": ...' for column in columns)
            raise DataError(f"{path}, line {line}: expected an object, {{{keys}}}")
        if missing := [name for name in columns if name not in row]:
            raise DataError(f"{path}, line {line}: no {_tell_missing(missing, ' and no ', row, columns)}")
        for column, option in columns.items():
            types, expected = TYPES[option]
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


READERS = {".csv": _read_csv, ".tsv": _read_csv, ".jsonl": _read_jsonl}
