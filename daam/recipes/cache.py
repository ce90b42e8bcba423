"""Features of a frozen encoder on disk: a folder of safetensors shards and a `cache.json` that says what they are."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from daam.recipes.errors import UserError, extra
from daam.recipes.examples import PARTS

with extra():
    from safetensors import SafetensorError, safe_open
    from safetensors.torch import save

KEYS = ("examples", "shard", "layers", "features", "names")
EXTRA = {"groups": "groups", "parts": "split"}  # tensors of a shard that there are where cache.json has an entry
AGAIN = "delete it and run the command that made the cache again"


class CacheError(UserError):
    """Tell that a cache is incomplete, broken or of something else; the message says which file, and what to do."""


@dataclass
class Cache:
    """Hold features of examples, their labels, the names of the classes, and what cache.json says about them; groups
    and parts where data has some.
    """

    features: Tensor  # (examples, layers, features) in fp32
    labels: Tensor  # (examples,) in int64
    names: list[str]
    about: dict  # encoder, modality, source, sizes, a hash of the examples
    groups: Tensor | None = None  # (examples,) in int64: a number for each group, like a speaker
    parts: Tensor | None = None  # (examples,) in int64: the place of each example's part among `examples.PARTS`


def read_about(folder: str | Path) -> dict:
    """Return what cache.json says, of a cache complete or not; raise a CacheError where it is missing or no cache's."""
    path = Path(folder) / "cache.json"
    try:
        about = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise CacheError(f"{path} does not exist: make a cache with python -m daam.recipes.features") from None
    except (ValueError, RecursionError) as error:
        raise CacheError(f"{path} is no JSON ({error}): delete the folder and make the cache anew") from None
    if missing := [key for key in KEYS if not isinstance(about, dict) or key not in about]:
        raise CacheError(
            f"{path} lacks {', '.join(missing)}, expected a cache's {', '.join(KEYS)}: make the cache anew"
        )
    if not isinstance(about["names"], list) or not all(isinstance(name, str) for name in about["names"]):
        raise CacheError(f"{path}: names is {about['names']!r}, expected the classes: make the cache anew")
    for key in EXTRA.values():
        if not isinstance(about.get(key), (str, type(None))):
            raise CacheError(f"{path}: {key} is {about[key]!r}, expected a name or null: make the cache anew")
    return about


def read_cache(folder: str | Path) -> Cache:
    """Read all of a complete cache into memory and return it. Raise a CacheError where there is none; shards are
    missing, truncated or changed; a shape or dtype is not what cache.json says; features are NaN or infinite.
    """
    folder, about = Path(folder), read_about(folder)
    count = _shards(about)
    present = sum(_path(folder, index).exists() for index in range(count))
    if present < count:
        raise CacheError(f"{folder} holds {present} of {count} shards: run the command that made it again")
    wanted = _wanted(about, about["examples"])
    tensors = {name: torch.empty(shape, dtype=dtype) for name, (shape, dtype) in wanted.items()}
    for index in range(count):
        rows = _rows(about, index)
        for name, rows_of_it in _read_shard(folder, about, index).items():
            tensors[name][rows.start : rows.stop] = rows_of_it
    return Cache(names=about["names"], about=about, **tensors)


class Writer:
    """Write a cache shard by shard; the shards that an earlier run completed stay as they are.

    Args:
        folder: the cache's, made where there is none.
        about: the content of cache.json: examples, shard (examples of each file but the last), layers, features, names
            of the classes; groups and split, a name for what they come from, where examples have groups and parts; and
            whatever else tells this cache from others.

    `missing` are the indices of the shards to be written, broken ones included. `about` is what cache.json says.

    Raises:
        CacheError: the folder holds a cache of something else.
    """

    def __init__(self, folder: str | Path, about: dict):
        about = json.loads(json.dumps(about, default=str))  # as it will be read: paths and tuples are none in JSON
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / "cache.json"
        if not path.exists():
            if shards := sorted(self.folder.glob("*.safetensors")):
                raise CacheError(f"{self.folder} holds {shards[0].name} but no cache.json: choose another folder")
            write_whole(path, (json.dumps(about, indent=1, ensure_ascii=False) + "\n").encode())
        self.about = read_about(self.folder)
        # the same data may lie elsewhere by now, and differences of the order of sums are measured anew
        for key in sorted((self.about.keys() | about.keys()) - {"source", "checked"}):
            if self.about.get(key) != about.get(key):
                raise CacheError(
                    f"{path} is of another cache: its {key} is {self.about.get(key)!r}, expected {about.get(key)!r}. "
                    "Choose another folder, or delete this one"
                )
        self.missing = [index for index in range(_shards(about)) if not self._complete(index)]

    def _complete(self, index: int) -> bool:
        try:
            _read_shard(self.folder, self.about, index)
        except CacheError:
            return False
        return True

    def rows(self, index: int) -> range:
        """Return the places of a shard's examples among all."""
        return _rows(self.about, index)

    def write(
        self, index: int, features: Tensor, labels: Tensor, groups: Tensor | None = None, parts: Tensor | None = None
    ) -> None:
        """Write shard index, as a whole or not at all: features (rows, layers, features) in fp32; labels, and where
        `about` names their source groups and parts, (rows,) in int64. Raise a CacheError where one is missing or too
        many, a shape or dtype is wrong, features are NaN or infinite, labels are of no class, parts are none.
        """
        path = _path(self.folder, index)
        given = {"features": features, "labels": labels, "groups": groups, "parts": parts}
        tensors = {name: t.contiguous() for name, t in given.items() if t is not None}
        _check(path, self.about, index, tensors)
        write_whole(path, save(tensors, metadata={"sha256": _digest(tensors)}))


def _shards(about: dict) -> int:
    return -(-about["examples"] // about["shard"])


def _rows(about: dict, index: int) -> range:
    return range(about["examples"])[index * about["shard"] : (index + 1) * about["shard"]]


def _path(folder: Path, index: int) -> Path:
    return folder / f"{index:05}.safetensors"


def write_whole(path: Path, data: bytes) -> None:
    """Write data into a file as a whole or not at all, whenever the process dies; the next attempt begins anew."""
    part = path.with_name(path.name + ".part")
    with part.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())  # or a crash of the machine could leave the name with nothing behind it
    os.replace(part, path)


def fingerprint(cache: Cache) -> str:
    """Return the SHA-256 of what a training run depends on: features, labels and the names of the classes, and groups
    and parts where there are some.
    """
    names = json.dumps(cache.names)
    text = names + _digest({"features": cache.features, "labels": cache.labels})
    for name in EXTRA:
        if (tensor := getattr(cache, name)) is not None:
            text += name + _digest({name: tensor})
    return hashlib.sha256(text.encode()).hexdigest()


def _digest(tensors: dict[str, Tensor]) -> str:
    """Return the SHA-256 of the bytes of tensors, since safetensors does not see that numbers of a file changed."""
    total = hashlib.sha256()
    for name in sorted(tensors):
        total.update(tensors[name].contiguous().numpy())
    return total.hexdigest()


def _wanted(about: dict, rows: int) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Return the shape and the dtype of each tensor of a cache, or of a shard, with so many rows."""
    numbers = ["labels", *(name for name, key in EXTRA.items() if about.get(key) is not None)]
    features = (rows, about["layers"], about["features"])
    return {"features": (features, torch.float32), **dict.fromkeys(numbers, ((rows,), torch.int64))}


def _read_shard(folder: Path, about: dict, index: int) -> dict[str, Tensor]:
    path = _path(folder, index)
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no dict)
            sha256 = (file.metadata() or {}).get("sha256")
    except (SafetensorError, OSError) as error:
        raise CacheError(f"{path} is truncated or broken ({error}): {AGAIN}") from None
    _check(path, about, index, tensors)
    if _digest(tensors) != sha256:
        raise CacheError(f"{path} is broken, its numbers are not those that were written: {AGAIN}")
    return tensors


def _check(path: Path, about: dict, index: int, tensors: dict[str, Tensor]) -> None:
    rows = _rows(about, index)
    wanted = _wanted(about, len(rows))
    found = {name: (tuple(t.shape), t.dtype) for name, t in tensors.items()}
    if found != wanted:
        raise CacheError(f"{path} has {_shown(found)}, expected {_shown(wanted)}: {AGAIN}")
    if (row := first_not_finite(tensors["features"])) is not None:
        raise CacheError(f"{path}: features of example {rows[row]} hold NaN or inf, expected numbers: {AGAIN}")
    for name, count in {"labels": len(about["names"]), "groups": about["examples"], "parts": len(PARTS)}.items():
        numbers = tensors.get(name, torch.empty(0))
        if ((numbers < 0) | (numbers >= count)).any():
            raise CacheError(
                f"{path} has {name} {numbers.min()} to {numbers.max()}, expected 0 to {count - 1}: {AGAIN}"
            )


def _shown(tensors: dict[str, tuple[tuple[int, ...], torch.dtype]]) -> str:
    return ", ".join(f"{name} {shape} in {str(dtype)[6:]}" for name, (shape, dtype) in sorted(tensors.items()))


def first_not_finite(features: Tensor) -> int | None:
    """Return the first row of features, (rows, …), that holds NaN or infinity; None where all are finite."""
    rows = (~features.isfinite().flatten(1).all(1)).nonzero()
    return rows[0].item() if len(rows) else None
