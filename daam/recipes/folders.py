"""Images or sounds in a folder: one subfolder for each class, in the folder itself or in its train and test parts."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from daam.recipes.examples import WORDS, DataError, Example, name_parts, some

IMAGES = ("png", "jpg", "jpeg", "jfif", "bmp", "gif", "webp", "avif", "tif", "tiff")
SOUNDS = ("wav", "flac", "ogg", "oga", "opus", "mp3", "aif", "aiff", "aifc")
KINDS = {**dict.fromkeys(IMAGES, "vision"), **dict.fromkeys(SOUNDS, "speech")}
FILES = f"images ({', '.join(IMAGES)}) or sounds ({', '.join(SOUNDS)})"
# What systems put into folders; hidden files begin with a dot.
LITTER = (
    *("thumbs.db", "thumbs.db:encryptable", "ehthumbs.db", "ehthumbs_vista.db", "desktop.ini", "$recycle.bin"),
    *("system volume information", "icon\r", "__macosx", "@eadir", "#recycle", "lost+found"),
)
# A word that a folder's name has if the folder is a part of a data set, and what may follow if that is its whole name.
PART = re.compile(r"(?<![a-z])(train|test|val|dev|eval)(ing|id|idation|uation|elopment)?(?=set|[^a-z]|$)", re.I)
PART_END = re.compile(r"[\W_]*(set|data|images|split)?[\W_\d]*", re.I)
ADVICE = "expected one subfolder for each class"


def read_folder(root: Path, grouped: bool) -> tuple[str, list[Example]]:
    """Return the modality, "vision" or "speech", and the examples in a folder, sorted by part and by path: see
    `data.read_examples`. grouped: the folder below each class is the group. Raise a DataError where something does not
    belong there.
    """
    files = sorted(_walk(root, ()))
    parts = {root / name: part for name, part in _find_parts(root).items()} or {root: ""}
    for folder in dict.fromkeys((root, *parts)):
        if not _subfolders(folder):
            raise DataError(f"{folder}: {ADVICE}, there is none")
        if loose := [file for file in files if file.parent == folder and modality_of(file)]:
            raise DataError(f"{loose[0]} is in no class: {ADVICE}")
    files = [file for file in files if file.parent not in (root, *parts)]  # without a README beside the classes
    for folder, part in parts.items():
        inside = [file for file in files if file.is_relative_to(folder) and modality_of(file)]
        if part in ("", "train"):  # others may lack classes
            _check_classes(folder, inside, grouped)
        if grouped:
            _check_groups(folder, inside)
    modality = _only_modality(root, files)
    examples = [
        _example(file, folder, part, grouped)
        for folder, part in parts.items()
        for file in files
        if file.is_relative_to(folder)
    ]
    _check_names(root, examples)
    for folder, part in parts.items():
        names = {example.label for example in examples if example.split == part}
        if empty := [str(f) for f in _subfolders(folder) if f.name not in names]:
            raise DataError(f"{', '.join(empty)}: no images or sounds, expected some for each class")
    return modality, examples


def read_files(path: Path) -> tuple[str, list[Example]]:
    """Return the modality, "vision" or "speech", and an example without a label for each image or sound in a folder, at
    any depth, sorted by path; path may be one of these itself. Raise a DataError where there is none, or something
    else.
    """
    files = sorted(_walk(path, ())) if path.is_dir() else [path]
    found = [file for file in files if modality_of(file)]
    # what stands beside folders of images or sounds, like a README, is no data
    around = {folder for file in found for folder in file.parent.parents} - {file.parent for file in found}
    if not (files := [file for file in files if file.parent not in around]):
        raise DataError(f"{path}: no images or sounds, expected some")
    return _only_modality(path, files), [Example(file, "") for file in files]


def _only_modality(root: Path, files: list[Path]) -> str:
    """Return the modality of all files; raise a DataError where they are not of one, or some of none."""
    first = {modality_of(file): file for file in reversed(files)}
    if len(first) > 1 or None in first:
        raise DataError(f"{root}: expected only {FILES}, it holds {' and '.join(map(str, sorted(first.values())))}")
    return next(iter(first))


def _example(file: Path, folder: Path, part: str, grouped: bool) -> Example:
    label, group, *_ = file.relative_to(folder).parts
    return Example(file, label, group=group if grouped else "", split=part)


def _check_names(root: Path, examples: list[Example]) -> None:
    """Raise a DataError where the name of a class or a group is not in UTF-8."""
    for kind, names in {"class": {e.label for e in examples}, "group": {e.group for e in examples}}.items():
        if broken := [name for name in sorted(names) if name.encode(errors="ignore").decode() != name]:
            raise DataError(f"{root}: the name of {kind} {broken[0]!a} is not in UTF-8, expected one that is")


def _subfolders(folder: Path) -> list[Path]:
    return [path for path in sorted(folder.iterdir()) if path.is_dir() and not _is_litter(path)]


def _find_parts(root: Path) -> dict[str, str]:
    """Return for each subfolder its part, of PARTS, where they are those of a predefined split and nothing else."""
    names = [folder.name for folder in _subfolders(root)]
    if not all(name.lower() in WORDS for name in names):
        return {}
    try:
        parts = name_parts(names)
    except DataError as error:
        raise DataError(f"{root}: {error}") from None
    return parts if {"train", "test"} <= set(parts.values()) else {}


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


def _check_classes(root: Path, files: list[Path], grouped: bool) -> None:
    """Raise a DataError where first-level folders are not the classes, but hold them. files: images and sounds."""
    paths = [file.relative_to(root).parts for file in files]
    names = dict.fromkeys(first for first, *_ in paths)  # of first-level folders
    with_files = {first for first, *rest in paths if len(rest) == 1}  # those that hold files themselves
    parts = {name: part for name in names if (part := _part(name, name in with_files))}
    if len(set(parts.values())) > 1:
        raise DataError(
            f"{root} holds {', '.join(parts)}, which are parts of a data set and no classes; {ADVICE}, or the folders "
            "train, test and perhaps validation, nothing beside them, and classes in each: give the path of one of them"
        )
    if len(names) == 1:
        folder = Path(os.path.commonpath([file.parent for file in files]))
        if all(file.parent != folder for file in files) and not (grouped and folder.parent == root):
            inner = some({file.relative_to(folder).parts[0] for file in files})
            raise DataError(f"{root}: {ADVICE}; give {folder}, which holds {inner}")
    nested = {(first, folder) for first, folder, *_ in paths if first not in with_files}
    counts = Counter(folder for _, folder in nested)
    same = {folder for folder, count in counts.items() if count > 1}
    if same and not grouped:
        holders = {name for name, folder in nested if folder in same}
        raise DataError(
            f"{root}: {some(holders)} hold the same folders, {some(same)}, as parts of a data set do; {ADVICE}: give "
            "the path of one of them, or put the files of each class directly into its folder; if these folders are "
            "groups, like speakers, give --groups folder"
        )


def _check_groups(root: Path, files: list[Path]) -> None:
    """Raise a DataError where folders below the classes are not the groups. files: images and sounds."""
    paths = [file.relative_to(root).parts for file in files]
    if direct := [file for file, path in zip(files, paths, strict=True) if len(path) == 2]:
        raise DataError(
            f"{direct[0]} is in no group: with --groups folder expected a folder for each group in each class"
        )
    names = sorted({group for _, group, *_ in paths})
    parts = {name: part for name in names if (part := _part(name, True))}
    if len(set(parts.values())) > 1:
        raise DataError(
            f"{root}: classes hold {', '.join(parts)}, which are parts of a data set and no groups: expected these "
            "folders around the classes, not in them"
        )


def _part(name: str, has_files: bool) -> str | None:
    """Return the word, like "train", that names a folder as a part of a data set; of one with files it is the name."""
    match = PART.search(name)
    if match and has_files and (match.start() or not PART_END.fullmatch(name, match.end())):
        return None
    return match and match[1].lower()


def modality_of(file: Path) -> str | None:
    """Return "vision" or "speech", as the ending of a file's name says; None for all others."""
    return KINDS.get(file.suffix.lower().removeprefix("."))


def _is_litter(path: Path) -> bool:
    return path.name.startswith(".") or path.name.lower() in LITTER
