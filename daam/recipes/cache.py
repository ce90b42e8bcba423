"""Features of a frozen encoder on disk: a folder of safetensors shards and a `cache.json` that says what they are.

`daam.recipes.writer` makes them; `examples.csv` beside them lists the examples.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from daam.recipes.errors import UserError, extra
from daam.recipes.examples import PARTS

with extra():
    from safetensors import SafetensorError, safe_open
    from safetensors.torch import save

SIZES = ("examples", "shard", "layers", "features")
KEYS = (*SIZES, "names")
EXTRA = {"groups": "groups", "parts": "split"}  # tensors of a shard that there are where cache.json has an entry
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}  # of features in shards
COLUMNS = ("text", "label")  # of a table of texts
IN_MEMORY = 2**28  # bytes of features in fp32 that are read into memory; of more each is read when it is asked for
BLOCK = 2**20  # numbers in memory at a time where all features are gone through
AGAIN = "delete it and run the command that made the cache again"


class CacheError(UserError):
    """Tell that a cache is incomplete, broken or of something else; the message says which file, and what to do."""


@dataclass(eq=False)  # so that functions can keep what they found out of one
class Cache:
    """Hold features of examples, in memory or on disk, their labels, the names of the classes, and what cache.json says
    about them; groups and parts where data has some.
    """

    features: Tensor | StoredFeatures  # (examples, layers, features) in fp32
    labels: Tensor  # (examples,) in int64
    names: list[str]
    about: dict  # encoder, modality, source, sizes, a hash of the examples
    groups: Tensor | None = None  # (examples,) in int64: a number for each group, like a speaker
    parts: Tensor | None = None  # (examples,) in int64: the place of each example's part among `examples.PARTS`

    @property
    def dtype(self) -> str:
        """Return the dtype of features on disk, one of DTYPES: they have its precision."""
        return self.about.get("dtype", "fp32")


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
    for key in SIZES:
        if type(about[key]) is not int or about[key] < 1:
            raise CacheError(f"{path}: {key} is {about[key]!r}, expected a positive int: make the cache anew")
    if not isinstance(about["names"], list) or not all(isinstance(name, str) for name in about["names"]):
        raise CacheError(f"{path}: names is {about['names']!r}, expected the classes: make the cache anew")
    for key in EXTRA.values():
        if not isinstance(about.get(key), (str, type(None))):
            raise CacheError(f"{path}: {key} is {about[key]!r}, expected a name or null: make the cache anew")
    checked = about.get("checked")
    if checked is not None and not (isinstance(checked, dict) and "batches" in checked):
        raise CacheError(f"{path}: checked is {checked!r}, expected what was found out, or null: make the cache anew")
    about = add_defaults(about)
    if about["dtype"] not in list(DTYPES):  # it may be a list, which no dict can look for
        raise CacheError(f"{path}: dtype is {about['dtype']!r}, expected one of {', '.join(DTYPES)}")
    return about


def add_defaults(about: dict) -> dict:
    """Return what cache.json says together with what that of an earlier version does not."""
    added = {"dtype": "fp32", "embeddings": False, "layer_numbers": list(range(1, 1 + about["layers"]))}
    if about.get("modality") == "text":
        added["columns"] = list(COLUMNS)
    found = {**added, **about}
    if isinstance(checked := found.get("checked"), dict) and checked["batches"] == "any" and "shape" not in checked:
        # not known: what was tried may have had one shape, which says nothing of padding
        found["checked"] = {**checked, "batches": "equal lengths"}
    return found


def read_cache(folder: str | Path) -> Cache:
    """Check all of a complete cache and return it. Raise a CacheError where there is none; shards are missing,
    truncated or changed; a shape or dtype is not what cache.json says; features are NaN or infinite.

    Features of more than IN_MEMORY bytes stay on disk: what is returned reads those that are asked for.
    """
    folder, about = Path(folder), read_about(folder)
    count = count_shards(about)
    present = sum(path_of(folder, index).exists() for index in range(count))
    if present < count:
        raise CacheError(f"{folder} holds {present} of {count} shards: run the command that made it again")
    wanted = _wanted(about, about["examples"])
    tensors = {name: torch.empty(shape, dtype=dtype) for name, (shape, dtype) in wanted.items() if name != "features"}
    stored = StoredFeatures(folder, about)
    features = torch.empty(stored.shape) if 4 * stored.shape.numel() <= IN_MEMORY else stored
    for index in range(count):
        rows, shard = rows_of(about, index), read_shard(folder, about, index)
        if isinstance(features, Tensor):
            features[rows.start : rows.stop] = shard["features"]
        for name, numbers in tensors.items():
            numbers[rows.start : rows.stop] = shard[name]
    return Cache(features=features, names=about["names"], about=about, **tensors)


class StoredFeatures:
    """Read features of examples, (examples, layers, features) in fp32, from the shards of a cache when they are asked
    for: features[places] are those of some examples, (places, layers, features), places a tensor of int64.

    layers: the places of those that are read, in order; None: all.
    """

    device = torch.device("cpu")

    def __init__(self, folder: Path, about: dict, layers: Sequence[int] | None = None):
        self._folder, self._about, self._layers = folder, about, None if layers is None else list(layers)
        self.shape = torch.Size([about["examples"], len(layers or range(about["layers"])), about["features"]])

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, places: Tensor) -> Tensor:
        found = torch.empty(len(places), *self.shape[1:])
        shards = places // self._about["shard"]
        for index in shards.unique().tolist():
            # opened anew each time: a cache may have more shards than a process may have open files
            with safe_open(path_of(self._folder, index), framework="pt") as file:
                rows = file.get_slice("features")
                for i in (shards == index).nonzero().flatten().tolist():
                    row = int(places[i]) - index * self._about["shard"]
                    found[i] = rows[row] if self._layers is None else rows[row][self._layers]
        return found

    def choose(self, layers: Sequence[int]) -> StoredFeatures:
        """Return the same features of some layers alone."""
        return StoredFeatures(self._folder, self._about, layers)


def choose_layers(features: Tensor | StoredFeatures, layers: Sequence[int]) -> Tensor | StoredFeatures:
    """Return features, (examples, layers, features), of some layers, or as they are where none are named."""
    if not layers:
        return features
    return features[:, list(layers)] if isinstance(features, Tensor) else features.choose(layers)


def iterate_blocks(features: Tensor | StoredFeatures, places: Tensor | None = None) -> Iterator[Tensor]:
    """Yield the features of the examples at some places, or of all, (examples, …), some examples at a time."""
    places = torch.arange(len(features)) if places is None else places
    most = max(1, BLOCK // max(1, features.shape[1:].numel()))
    yield from (features[block] for block in places.split(most))


def count_shards(about: dict) -> int:
    """Return how many shards the cache has that cache.json tells about."""
    return -(-about["examples"] // about["shard"])


def rows_of(about: dict, index: int) -> range:
    """Return the places of a shard's examples among all."""
    return range(about["examples"])[index * about["shard"] : (index + 1) * about["shard"]]


def path_of(folder: Path, index: int) -> Path:
    """Return where a shard stands in a cache's folder."""
    return folder / f"{index:05}.safetensors"


def write_whole(path: Path, data: bytes) -> None:
    """Write data into a file as a whole or not at all, whenever the process dies; the next attempt begins anew."""
    part = path.with_name(path.name + ".part")
    with part.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())  # or a crash of the machine could leave the name with nothing behind it
    os.replace(part, path)


@lru_cache(maxsize=1)  # features are read whole for it
def fingerprint(cache: Cache) -> str:
    """Return the SHA-256 of what a training run depends on: features, labels and the names of the classes, and groups
    and parts where there are some.
    """
    total = hashlib.sha256()
    for block in iterate_blocks(cache.features):
        total.update(block.contiguous().numpy())
    total.update(cache.labels.contiguous().numpy())
    text = json.dumps(cache.names) + total.hexdigest()
    for name in EXTRA:
        if (tensor := getattr(cache, name)) is not None:
            text += name + _digest({name: tensor})
    return hashlib.sha256(text.encode()).hexdigest()


def _digest(tensors: dict[str, Tensor]) -> str:
    """Return the SHA-256 of the bytes of tensors, since safetensors does not see that numbers of a file changed."""
    total = hashlib.sha256()
    for name in sorted(tensors):
        total.update(tensors[name].contiguous().view(torch.uint8).numpy())
    return total.hexdigest()


def _wanted(about: dict, rows: int) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Return the shape and the dtype of each tensor of a cache, or of a shard, with so many rows."""
    numbers = ["labels", *(name for name, key in EXTRA.items() if about.get(key) is not None)]
    features = (rows, about["layers"], about["features"])
    return {"features": (features, DTYPES[about["dtype"]]), **dict.fromkeys(numbers, ((rows,), torch.int64))}


def write_shard(folder: Path, about: dict, index: int, tensors: dict[str, Tensor]) -> None:
    """Write a shard as a whole or not at all; raise a CacheError where its tensors are not what cache.json says."""
    path = path_of(folder, index)
    _check(path, about, index, tensors)
    write_whole(path, save(tensors, metadata={"sha256": _digest(tensors)}))


def read_shard(folder: Path, about: dict, index: int) -> dict[str, Tensor]:
    """Return the tensors of a shard; raise a CacheError where it is broken, or not what cache.json says."""
    path = path_of(folder, index)
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
    rows = rows_of(about, index)
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
