"""Examples out of a table of texts, or a folder of images or sounds: labelled ones, and those to be predicted."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from daam.recipes.examples import WORDS, DataError, Example, class_names, encode_parts, name_parts
from daam.recipes.folders import FILES, modality_of, read_files, read_folder
from daam.recipes.tables import READERS, read_rows


def read_examples(
    path: str | Path, *, groups: str | None = None, split: str | None = None, text: str = "text", label: str = "label",
    least_classes: int = 2,
) -> tuple[str, list[Example]]:  # fmt: skip
    """Return the modality, "text", "vision" or "speech", and the examples: rows as they come, files sorted.

    A line is printed where a table has a column named split, of words for parts, that is not asked for.

    Args:
        path: a .csv, .tsv or .jsonl file in UTF-8 with columns of texts and labels; or a folder with one subfolder for
            each class, which holds images or sounds, directly or in folders below. Columns of a .csv or .tsv have
            commas, semicolons, tabs or bars between them, as its header shows, and a text at most 2**31 - 1 characters;
            a cell may stand in quotes. Links are followed, hidden files and those that systems make left out. A folder
            that holds train and test, perhaps validation, and nothing else is a predefined split: it has the classes in
            each of these, all of them in train.
        groups: the column that names the group of each row, like its speaker: a string, in JSONL or a whole number. For
            a folder "folder": the folder below a class is the group of what is in it, in all classes that have one of
            its name.
        split: the column that names the part of each row: train or training; validation, valid, val, dev or
            development; test or testing; in any case. "eval" and "evaluation" are test where no other word for it is
            there, else validation.
        text: the column of texts, of a table.
        label: the column of labels, of a table: strings, in JSONL or whole numbers.
        least_classes: as many classes there must be; 1 suffices to score what is trained already.

    Raises:
        DataError: no such file, nothing in it, too few classes, something that does not belong there; folders that hold
            parts of a data set instead of classes, other than the above; no such column, an empty value in it, a word
            for no part; a class that does not train; a group in two parts.
    """
    path = Path(path)
    _check_columns(path, text, label, groups, split)
    if path.is_dir():
        modality, examples = read_folder(path, groups is not None)
    elif not path.exists():
        raise DataError(f"{path}: no such file or folder")
    elif path.suffix.lower() in READERS:
        modality, examples = "text", _read_table(path, text, label, groups, split)
    else:
        raise DataError(f"{path}: expected a .csv, .tsv or .jsonl file, or a folder with one subfolder for each class")
    if len(names := class_names(examples)) < least_classes:
        raise DataError(
            f"{path}: {len(examples)} examples of {len(names)} classes, expected {least_classes} or more classes"
        )
    try:
        encode_parts(examples)
    except DataError as error:
        raise DataError(f"{path}: {error}") from None
    return modality, examples


def read_unlabelled(path: str | Path, *, text: str = "text") -> tuple[str, list[Example]]:
    """Return the modality, "text", "vision" or "speech", and examples whose label is "": rows as they come, files
    sorted.

    Args:
        path: a table as `read_examples` takes it, of whose columns one holds texts, and others do not matter; a folder
            that holds images or sounds at any depth; or an image or a sound.
        text: the column of texts, of a table.

    Raises:
        DataError: no such file, nothing in it, something that does not belong there; no such column, or a text that is
            empty.
    """
    path = Path(path)
    _check_columns(path, text)
    if path.is_dir() or (path.exists() and modality_of(path)):
        return read_files(path)
    if not path.exists():
        raise DataError(f"{path}: no such file or folder")
    if path.suffix.lower() not in READERS:
        raise DataError(f"{path}: expected a .csv, .tsv or .jsonl file, or a folder or one of {FILES}")
    examples = [Example(row[text], "") for _, row in read_rows(path, {text: "--text"})]
    if not examples:
        raise DataError(f"{path}: no rows, expected one or more")
    return "text", examples


def name_sources(path: str | Path, examples: list[Example]) -> list[str]:
    """Return what each example that was read out of a path is called in a table of results: a file by its path below
    the folder, with / on all systems, or by its name where path is this file; a row of a table by its number, counted
    from 0. Bytes of a file's name that are not in UTF-8 are spelled like \\udce9, so that all can be written.
    """
    path = Path(path)
    root = path if path.is_dir() else path.parent
    names = [
        str(i) if isinstance(example.source, str) else example.source.relative_to(root).as_posix()
        for i, example in enumerate(examples)
    ]
    return [name.encode(errors="backslashreplace").decode() for name in names]


def _check_columns(
    path: Path, text: str, label: str | None = None, groups: str | None = None, split: str | None = None
) -> None:
    """Raise a DataError where the columns that are asked for cannot be what they are asked for."""
    if path.is_dir() or modality_of(path):
        for option, column, default in (("--text", text, "text"), ("--label", label, "label")):
            if column not in (None, default):
                raise DataError(f"{option} is {column!r}, but {path} is no table: expected nothing, it has no columns")
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
    for option, column in {"--text": text, "--label": label}.items():
        if column == "":
            raise DataError(f"{option} is '', expected the name of a column")
    if text == label:
        raise DataError(f"--text and --label are both {text!r}, expected two columns")
    for option, column in {"--groups": groups, "--split": split}.items():
        if column is not None and column in ("", text, label):
            raise DataError(f"{option} is {column!r}, expected a column beside {text} and {label}")
    if groups is not None and groups == split:
        raise DataError(f"--groups and --split are both {groups!r}, expected two columns")


def _read_table(path: Path, text: str, label: str, groups: str | None, split: str | None) -> list[Example]:
    options = {text: "--text", label: "--label", groups: "--groups", split: "--split"}
    rows = read_rows(path, {column: option for column, option in options.items() if column is not None})
    examples = [
        Example(
            row[text], str(row[label]).strip(), group=str(row[groups]).strip() if groups else "",
            split=_read_part(path, line, row, split) if split else "",
        )
        for line, row in rows
    ]  # fmt: skip
    if split is None:
        _tell_split(path, [row for _, row in rows])
        return examples
    try:
        parts = name_parts({example.split for example in examples})
    except DataError as error:
        raise DataError(f"{path}, column {split}: {error}") from None
    return [replace(example, split=parts[example.split]) for example in examples]


def _read_part(path: Path, line: int, row: dict, column: str) -> str:
    """Return the word for a part, of WORDS, that a row has in a column."""
    part = row[column].strip().lower()
    if part not in WORDS:
        raise DataError(f"{path}, line {line}: the {column} is {row[column]!r}, expected one of {', '.join(WORDS)}")
    return part


def _tell_split(path: Path, rows: list[dict]) -> None:
    """Print a line where a table has a column named split whose values name parts, those that train and test too."""
    for column in dict.fromkeys(key for row in rows[:1] for key in row if key.strip().lower() == "split"):
        parts = {WORDS.get(str(row.get(column)).strip().lower()) for row in rows}
        if None not in parts and "train" in parts and parts & {"test", "eval"}:
            print(f"the column {column} of {path} is not used: its parts are kept with --split {column}")
