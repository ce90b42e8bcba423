"""Writing a cache shard by shard: what an earlier run completed stays, also where some examples have changed since."""

from __future__ import annotations

import csv
import io
import json
import os
import shutil
from collections import defaultdict
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from torch import Tensor

from daam.recipes import processes
from daam.recipes.cache import (
    DTYPES,
    CacheError,
    add_defaults,
    count_shards,
    read_about,
    read_shard,
    rows_of,
    write_shard,
    write_whole,
)

LIST = "examples.csv"
COLUMNS = ("example", "name", "label", "sha256")
# what cache.json says of examples, and how things are spelled: all else tells what a feature of an example is
OF_EXAMPLES = {"examples", "shard", "names", "examples_sha256", "groups", "split", "columns", "source", "checked"}
OF_SPELLING = {"encoder", "layer_list"}  # an encoder with a hash is known by it
# the same data may lie elsewhere; what is measured has the order of sums in it; the last is not in all versions
UNTOLD = {"source", "checked", "contents_sha256"}
SET_ASIDE = "before-"  # begins the names of folders with shards of other examples, of which some are needed


class Writer:
    """Write a cache shard by shard; the shards that an earlier run completed stay as they are.

    Where the folder holds a cache of other examples through the same encoder, and at least half of those are among the
    new ones, as after a file was mended, added or taken away, features are taken from it: `taken` gives them. Processes
    of `daam.recipes.processes` write into one cache, each its share of what is missing.

    Args:
        folder: the cache's, made where there is none.
        about: the content of cache.json: examples, shard (examples of each file but the last), layers, features, names
            of the classes, dtype of features in files; groups and split, a name for what they come from, where examples
            have groups and parts; and whatever else tells this cache from others.
        listed: name, label and SHA-256 of every example, for examples.csv.

    `missing` are the indices of the shards to be written, broken ones included. `about` is what cache.json says.

    Raises:
        CacheError: the folder holds a cache of something else.
    """

    def __init__(self, folder: str | Path, about: dict, listed: Sequence[tuple[str, str, str]] = ()):
        self.folder, self._digests = Path(folder), [sha256 for *_, sha256 in listed]
        if processes.rank() == 0:
            about = json.loads(json.dumps(about, default=str))  # as it will be read: paths and tuples are none in JSON
            self._claim(add_defaults(about), listed)
        processes.wait()
        self.about = read_about(self.folder)
        self._earlier = self._list_earlier()
        self.missing = [index for index in range(count_shards(self.about)) if not self._complete(index)]
        processes.wait()  # before one writes what another would not find missing

    def _claim(self, about: dict, listed: Sequence[tuple[str, str, str]]) -> None:
        """Make the folder that of a cache, if it is not, and list the examples."""
        self.folder.mkdir(parents=True, exist_ok=True)
        path, shards = self.folder / "cache.json", sorted(self.folder.glob("*.safetensors"))
        if path.exists() and (shards or self._asides()):  # else it is of a start that failed, and claims nothing
            self._check_same(path, read_about(self.folder), about)
        elif shards:
            raise CacheError(f"{self.folder} holds {shards[0].name} but no cache.json: choose another folder")
        else:
            path.unlink(missing_ok=True)
        if listed and (not path.exists() or not (self.folder / LIST).exists()):
            write_whole(self.folder / LIST, _table(listed))
        if not path.exists():
            write_whole(path, (json.dumps(about, indent=1, ensure_ascii=False) + "\n").encode())

    def _check_same(self, path: Path, old: dict, new: dict) -> None:
        """Compare with the cache that is there: set it aside where examples alone have changed, and not too many."""
        if not (differ := _differences(old, new)):
            return
        known = set(_read_list(self.folder))
        kept = known & set(self._digests)
        if set(differ) <= OF_EXAMPLES and 2 * len(kept) >= len(known) > 0:
            told = f"{len(kept)} of {len(known)} examples of {self.folder} are among these {len(self._digests)}: their "
            gone = len(known) - len(kept)
            print(f"{told}features are kept" + (f", those of the other {gone} are deleted" if gone else ""))
            return self._set_aside(old)
        key = next((key for key in differ if key not in OF_EXAMPLES), differ[0])
        raise CacheError(
            f"{path} is of another cache: its {key} is {old.get(key)!r}, expected {new.get(key)!r}. Choose another "
            "folder, or delete this one"
        )

    def _set_aside(self, old: dict) -> None:
        """Move the files of a cache into a folder in it; killed on the way, it is done again."""
        aside = self.folder / f"{SET_ASIDE}{str(old.get('examples_sha256'))[:12]}-{old['shard']}"
        aside.mkdir(exist_ok=True)
        for name in (LIST, "cache.json"):  # first: what was moved before a kill is found again
            write_whole(aside / name, (self.folder / name).read_bytes())
        for path in sorted(self.folder.glob("*.safetensors")):
            os.replace(path, aside / path.name)
        (self.folder / "cache.json").unlink()

    def _asides(self) -> list[Path]:
        return sorted(self.folder.glob(f"{SET_ASIDE}*"))

    def _list_earlier(self) -> dict[str, list[tuple[Path, dict, int]]]:
        """Return for the SHA-256 of every example that was set aside where it may be: folder, cache.json, place."""
        found = defaultdict(list)
        for aside in self._asides():
            with suppress(CacheError):  # of a run that was killed before all was there
                about = read_about(aside)
                if set(_differences(about, self.about)) <= OF_EXAMPLES:  # not what another encoder made
                    for i, sha256 in enumerate(_read_list(aside)):
                        found[sha256].append((aside, about, i))
        return found

    def _complete(self, index: int) -> bool:
        try:
            read_shard(self.folder, self.about, index)
        except CacheError:
            return False
        return True

    def rows(self, index: int) -> range:
        """Return the places of a shard's examples among all."""
        return rows_of(self.about, index)

    def taken(self, index: int) -> dict[int, Tensor]:
        """Return the features, (layers, features), of those examples of a shard that an earlier cache has, by place."""
        places, abouts = defaultdict(list), {}
        for place in self.rows(index) if self._earlier else ():
            for aside, about, row in self._earlier.get(self._digests[place], ()):
                abouts[aside] = about
                places[aside, row // about["shard"]].append((place, row % about["shard"]))
        found = {}
        for (aside, shard), pairs in places.items():
            with suppress(CacheError):  # of a shard that is not there, or broken
                features = read_shard(aside, abouts[aside], shard)["features"]
                found |= {place: features[row] for place, row in pairs}
        return found

    def write(
        self, index: int, features: Tensor, labels: Tensor, groups: Tensor | None = None, parts: Tensor | None = None
    ) -> None:
        """Write shard index, as a whole or not at all: features (rows, layers, features), in fp32 or the cache's dtype;
        labels, and where `about` names their source groups and parts, (rows,) in int64. Raise a CacheError where one is
        missing or too many, a shape or dtype is wrong, features are NaN or infinite, labels are of no class, parts are
        none.
        """
        features = features.to(DTYPES[self.about["dtype"]])
        given = {"features": features, "labels": labels, "groups": groups, "parts": parts}
        write_shard(self.folder, self.about, index, {n: t.contiguous() for n, t in given.items() if t is not None})

    def finish(self) -> None:
        """Leave nothing of what was set aside, when all processes have written their shards."""
        processes.wait()
        if processes.rank() == 0:
            for aside in self._asides():
                shutil.rmtree(aside)


def _differences(old: dict, new: dict) -> list[str]:
    """Return the entries in which two caches differ, sorted, but for where things are and how they are spelled."""
    differ = [key for key in sorted((old.keys() | new.keys()) - UNTOLD) if old.get(key) != new.get(key)]
    if "encoder_sha256" in old.keys() & new.keys():
        differ = [key for key in differ if key not in OF_SPELLING]
    return differ


def _table(listed: Sequence[tuple[str, str, str]]) -> bytes:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([COLUMNS, *([i, *row] for i, row in enumerate(listed))])
    return text.getvalue().encode(errors="backslashreplace")  # names of files may be no Unicode


def _read_list(folder: Path) -> list[str]:
    """Return the SHA-256 of each example of a cache, in order; none where an earlier version made it."""
    try:
        with (folder / LIST).open(encoding="utf-8", newline="") as file:
            return [row["sha256"] for row in csv.DictReader(file)]
    except (OSError, KeyError, ValueError, csv.Error):
        return []
