"""Records of a training run, and the files of its folder: run.json, part-{i}.json or .pt, results.json."""

from __future__ import annotations

import io
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from daam.recipes.cache import write_whole
from daam.recipes.errors import UserError

RESULTS = {"method": str, "accuracy": dict, "trainable_parameters": int, "seconds_per_epoch": float, "memory": dict,
           "settings": dict, "examples": str, "parts": list, "about": dict}  # fmt: skip
STATE = {"model", "optimizer", "schedule", "part", "best"}


class RunError(UserError):
    """Tell why a run cannot start or go on: the folder is another's, a class has too few examples, sizes do not fit."""


@dataclass(frozen=True)
class Settings:
    """Hold what a run's numbers depend on, beside the examples."""

    method: str
    epochs: int = 35
    batch: int = 8
    rate: float = 1e-4
    weight_decay: float = 1e-2
    loss: str = "focal"
    folds: int = 5
    seeds: int | None = None  # where given: so many random splits instead of folds
    stop_after: int = 15  # epochs without a better one
    layers: tuple[int, ...] = ()  # where not empty: the layers that are used, counted from 0


@dataclass(frozen=True)
class Split:
    """Hold the places of the examples that train, validate and test, (places,) of int64 each."""

    train: Tensor
    validation: Tensor
    test: Tensor


@dataclass
class Part:
    """Hold what one fold or seed gave: numbers, lists with a number for each epoch, and places of examples."""

    accuracy: float = 0.0  # on test, of the best epoch
    best_epoch: int = -1
    losses: list[float] = field(default_factory=list)  # of training
    accuracies: list[float] = field(default_factory=list)  # of validation
    validation_losses: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    memory: int = 0  # bytes of training: the peak on a GPU, elsewhere what a forward pass saves for its backward pass
    validation: list[int] = field(default_factory=list)  # places of examples
    test: list[int] = field(default_factory=list)  # places of examples


def check_output(output: Path) -> None:
    """Raise a RunError where an --output is a file, or the folder of a cache."""
    if output.exists() and not output.is_dir():
        raise RunError(f"--output {output} is a file, expected a folder")
    if (output / "cache.json").exists():
        raise RunError(f"--output {output} is a cache, expected another folder: its files would be taken for features")


def claim(output: Path, identity: dict[str, Any]) -> None:
    """Write what a folder's run is into run.json; raise a RunError where that says that the run is another one."""
    path, new = output / "run.json", json.loads(json.dumps(identity))  # as it will be read: JSON has no tuples
    if not path.exists():
        write_json(path, new)
        return
    old = read_json(path)
    if not isinstance(old, dict):
        raise RunError(_broken(path, "no settings"))
    keys = dict.fromkeys([*new, *old])
    keys.pop("device", None)  # earlier versions noted it
    if differ := [f"{key} {old.get(key)} and {new.get(key)}" for key in keys if old.get(key) != new.get(key)]:
        raise RunError(f"{output} holds another run, choose another folder: {', '.join(differ)}")


def read_results(folder: Path, splits: list[Split] | None = None) -> dict[str, Any]:
    """Return a finished run's results; raise a RunError where they are broken, or their parts not those of splits."""
    path = folder / "results.json"
    results = read_json(path)
    if not isinstance(results, dict) or "method" not in results:
        raise RunError(f"{path} holds no results of daam.recipes.train")
    wrong = [key for key, kind in RESULTS.items() if not isinstance(results.get(key), kind)]
    wrong = wrong or [name for name, right in _details(results).items() if not right]
    if wrong or (splits is not None and len(splits) != len(results["parts"])):
        raise RunError(_broken(path, ", ".join(wrong or ["parts"])))
    for i, part in enumerate(results["parts"]):
        read_part(part, None if splits is None else splits[i], path)
    return results


def _details(results: dict[str, Any]) -> dict[str, bool]:
    """Return whether the entries of some results are complete, by the name of each that has entries itself."""
    accuracy, memory, layers = results["accuracy"], results["memory"], results["settings"].get("layers")
    fields = Settings.__dataclass_fields__.keys()
    return {
        "accuracy": _are_numbers([accuracy.get("mean"), accuracy.get("std")]),
        "memory": _are_numbers([memory.get("bytes")]) and isinstance(memory.get("what"), str),
        "settings": results["settings"].keys() == fields and isinstance(layers, list) and _are_places(layers),
        "parts": bool(results["parts"]),
    }


def read_part(data: Any, split: Split | None, path: Path) -> Part:
    """Return the part that a file at path holds as data; raise a RunError where it is none, or of another split."""
    try:
        part = Part(**data)
        numbers = [part.accuracy, part.best_epoch, part.memory]
        numbers += part.losses + part.accuracies + part.validation_losses + part.seconds
        right = _are_numbers(numbers) and _are_places(part.validation + part.test)
    except TypeError:
        right = False
    if not right:
        raise RunError(_broken(path, "a part"))
    if split is not None and (part.validation, part.test) != (split.validation.tolist(), split.test.tolist()):
        raise RunError(f"{path} is of other splits of the examples, an earlier version's: choose another folder")
    return part


def _are_numbers(values: list[Any]) -> bool:
    return all(isinstance(value, (int, float)) for value in values)


def _are_places(values: list[Any]) -> bool:
    return all(isinstance(value, int) and value >= 0 for value in values)


def _broken(path: Path, reason: object) -> str:
    return f"{path} is broken ({reason}), or of another version: delete it and run again"


def write_json(path: Path, data: Any) -> None:
    """Write data as JSON into a file as a whole, or not at all."""
    write_whole(path, (json.dumps(data, indent=1) + "\n").encode())


def read_json(path: Path) -> Any:
    """Return what a file of JSON holds; raise a RunError where it is none."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise RunError(_broken(path, error)) from None


def save_state(path: Path, state: dict[str, Any]) -> None:
    """Write a checkpoint into a file as a whole, or not at all."""
    data = io.BytesIO()
    torch.save(state, data)
    write_whole(path, data.getvalue())


def load_state(path: Path, device: str) -> dict[str, Any]:
    """Return the checkpoint that a file holds, on a device; raise a RunError where it is broken."""
    try:
        state = torch.load(path, map_location=device)
    except Exception as error:  # zip, pickle and end of file each fail in a way of their own
        raise RunError(_broken(path, type(error).__name__)) from None
    if not isinstance(state, dict) or not state.keys() >= STATE:
        raise RunError(_broken(path, "no checkpoint"))
    return state
