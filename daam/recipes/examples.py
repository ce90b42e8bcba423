"""Labelled examples: their classes, groups and parts as numbers, what tells them apart, and copies among them."""

from __future__ import annotations

import hashlib
import io
import json
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from daam.recipes.errors import UserError

PARTS = ("train", "validation", "test")  # of a predefined split; an example's code is the place of its part
TRAIN, VALIDATION, TEST = range(len(PARTS))
SPELLINGS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev", "development"),
    "test": ("test", "testing"),
    "eval": ("eval", "evaluation"),  # see `name_parts`
}
WORDS = {word: part for part, words in SPELLINGS.items() for word in words}


class DataError(UserError):
    """Tell that data cannot be used; the message says which file, line or example, and what was expected."""


@dataclass
class Example:
    """Hold a text or the path of a file, the name of its class, and where data says so that of its group and part."""

    source: str | Path
    label: str
    group: str = ""  # like a speaker: examples of one are on one side of a split; "" for all examples: no groups
    split: str = ""  # of PARTS; "" for all examples: no predefined split

    def __str__(self) -> str:
        source = str(self.source)
        return repr(source if isinstance(self.source, Path) or len(source) < 60 else source[:57] + "...")


def name_parts(words: Iterable[str]) -> dict[str, str]:
    """Return for every word, of WORDS in any case, which of PARTS it says. "eval" and "evaluation" are the test part
    where no other word is, else the validation part. Raise a DataError where two words say one part.
    """
    found = {word: WORDS[word.lower()] for word in sorted(words)}
    either = "validation" if "test" in found.values() else "test"
    found = {word: either if part == "eval" else part for word, part in found.items()}
    for part in PARTS:
        if len(same := [word for word in found if found[word] == part]) > 1:
            raise DataError(f"{' and '.join(map(repr, same))} are words for one part, {part}: expected one of them")
    return found


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


def encode_groups(examples: list[Example]) -> Tensor | None:
    """Return (examples,) of int64: the index of each group among all, sorted; None where no example has one. Raise a
    DataError where some examples have one and others none.
    """
    if (found := _of_all(examples, "group")) is None:
        return None
    index = {name: i for i, name in enumerate(sorted(set(found)))}
    return torch.tensor([index[name] for name in found], dtype=torch.int64)


def encode_parts(examples: list[Example]) -> Tensor | None:
    """Return (examples,) of int64: TRAIN, VALIDATION or TEST; None where no example has a part.

    Raises:
        DataError: some examples have a part and others none; a part is none of PARTS; nothing is to train or to test
            on; examples of a class validate or test, and none trains; a group is in two parts.
    """
    if (found := _of_all(examples, "split")) is None:
        return None
    for i, part in enumerate(found):
        if part not in PARTS:
            raise DataError(f"the split of example {i} ({examples[i]}) is {part!r}, expected one of {', '.join(PARTS)}")
    if missing := [part for part in ("train", "test") if part not in found]:
        present = ", ".join(part for part in PARTS if part in found)
        raise DataError(f"no {' and no '.join(missing)} examples, all are of {present}: expected train and test")
    trained = {example.label for example in examples if example.split == "train"}
    if lacking := sorted({example.label for example in examples} - trained):
        raise DataError(f"no train examples of class {some(map(repr, lacking))}, expected some of each class")
    if twice := _in_two_parts(examples):
        raise DataError(
            f"{len(twice)} groups are in two parts or more, {some(map(repr, twice))}: expected each in one of "
            f"{', '.join(PARTS)}"
        )
    return torch.tensor([PARTS.index(part) for part in found], dtype=torch.int64)


def _of_all(examples: list[Example], name: str) -> list[str] | None:
    """Return a field of all examples; None where it is empty for all, a DataError where it is for some."""
    values = [getattr(example, name) for example in examples]
    if any(values) and not all(values):
        i = values.index("")
        raise DataError(f"example {i} ({examples[i]}) has no {name}, expected one for each example or for none")
    return values if any(values) else None


def _in_two_parts(examples: list[Example]) -> list[str]:
    parts = defaultdict(set)
    for example in examples:
        parts[example.group].add(example.split)
    return sorted(group for group, found in parts.items() if group and len(found) > 1)


def some(names: Iterable[str]) -> str:
    """Return names in words, sorted, of more than four the first four and the number of the others."""
    names = sorted(names)
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


def digest_examples(examples: Iterable[Example]) -> list[str]:
    """Return the SHA-256 of each text or file, labels aside, in hexadecimal; raise OSError where one is unreadable."""
    return [_digest(example.source) for example in examples]


def hash_examples(examples: Iterable[Example], digests: list[str] | None = None) -> str:
    """Return the SHA-256 of labels, texts and contents of files, in their order, and of groups and parts where there
    are some; where files lie does not matter. digests: what `digest_examples` returned; without them the files are
    read, with an OSError where one cannot be.
    """
    examples = list(examples)
    total = hashlib.sha256()
    for example, digest in zip(examples, digests or digest_examples(examples), strict=True):
        total.update(hashlib.sha256(example.label.encode()).digest())
        total.update(bytes.fromhex(digest))
    if any(example.group or example.split for example in examples):
        total.update(json.dumps([(example.group, example.split) for example in examples]).encode())
    return total.hexdigest()


def hash_contents(examples: Iterable[Example], digests: list[str] | None = None) -> str:
    """Return what `hash_examples` does of the same examples without groups and parts."""
    return hash_examples([replace(example, group="", split="") for example in examples], digests)


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
