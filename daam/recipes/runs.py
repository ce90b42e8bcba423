"""Records of a training run, and the files of its folder: run.json, part-{i}.json or .pt, results.json."""

from __future__ import annotations

import io
import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from daam.recipes.cache import write_whole
from daam.recipes.errors import UserError

RESULTS = {"method": str, "accuracy": dict, "balanced_accuracy": dict, "macro_f1": dict, "chance": float,
           "trainable_parameters": int,
           "seconds": float, "memory": dict, "names": list, "settings": dict, "examples": str, "parts": list,
           "about": dict}  # fmt: skip
SCORES = ("accuracy", "balanced_accuracy", "macro_f1")  # of a part, and of a run as mean and std
MADE = ("results.json", "part-*.json", "part-*.pt", "part-*.safetensors")  # what training makes, beside pictures
# of arXiv 2401.11143; where these differ from the defaults, the paper's methods train less
PAPER = {"epochs": 35, "batch": 8, "rates": (1e-4,), "loss": "focal", "stop_after": 15, "choose_by": "accuracy",
         "standardize": False, "conv_channels": 512, "zero_start": False}  # fmt: skip


class RunError(UserError):
    """Tell why a run cannot start or go on: the folder is another's, a class has too few examples, sizes do not fit."""


@dataclass(frozen=True)
class Settings:
    """Hold what a run's numbers depend on, beside the examples."""

    method: str
    epochs: int = 100  # at most
    batch: int = 32
    rates: tuple[float, ...] = (1e-4, 1e-3, 1e-2)  # each is tried; the best one on validation is tested
    weight_decay: float = 1e-2
    loss: str = "cross_entropy"
    folds: int = 5
    seeds: int | None = None  # where given: so many random splits instead of folds
    stop_after: int = 10  # epochs without a better one
    choose_by: str = "loss"  # or "accuracy": what of validation chooses the epoch and the rate, then the other
    layers: tuple[int, ...] = ()  # where not empty: the layers that are used, counted from 0
    standardize: bool = True  # layers, by those of the training part
    conv_channels: int = 64  # of the decoders
    zero_start: bool = True  # classifiers start at 0
    class_weights: bool = False  # rare classes count as much as others, in the loss and on validation

    @classmethod
    def of(cls, results: dict[str, Any]) -> Settings:
        """Return the settings that a run's results were made with."""
        lists = {name: tuple(results["settings"][name]) for name in ("rates", "layers")}
        return cls(**{**results["settings"], **lists})


@dataclass(frozen=True, eq=False)  # so that functions can keep what they found out of one
class Split:
    """Hold the places of the examples that train, validate and test, (places,) of int64 each."""

    train: Tensor
    validation: Tensor
    test: Tensor


@dataclass
class Part:
    """Hold what one fold or seed gave: numbers, lists with a number for each epoch, and places of examples."""

    accuracy: float = 0.0  # on test, of the best epoch at the best rate
    balanced_accuracy: float = 0.0
    macro_f1: float = 0.0
    rate: float = 0.0  # the one that was chosen
    best_epoch: int = -1
    losses: list[float] = field(default_factory=list)  # of training, at this rate
    accuracies: list[float] = field(default_factory=list)  # of validation; balanced ones with class weights
    validation_losses: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    tried: list[dict[str, float]] = field(default_factory=list)  # a summary for every rate
    memory: int = 0  # bytes of training: the peak on a GPU, elsewhere what a forward pass saves for its backward pass
    parameters: int = 0  # that training changes
    train: int = 0  # number of examples that train
    validation: list[int] = field(default_factory=list)  # places of examples
    test: list[int] = field(default_factory=list)  # places of examples
    predictions: list[int] = field(default_factory=list)  # of test, the class of each
    probabilities: list[list[float]] = field(default_factory=list)  # (test, classes); in the part's own file alone
    warnings: list[str] = field(default_factory=list)


@dataclass
class Fit:
    """Hold how far training of a part is at one rate."""

    part: Part
    best: dict[str, Tensor] | None = None  # the model at its best epoch, if this rate may be chosen
    steps: dict[str, Any] | None = None  # states of model, optimizer and schedule, from which it can go on
    finite: bool = True  # the loss; where it is not, training has ended

    def has_ended(self, settings: Settings) -> bool:
        """Return whether more epochs would change nothing: for long none was better, or the loss is not finite."""
        return not self.finite or len(self.part.losses) - self.part.best_epoch > settings.stop_after


def check_output(output: Path) -> None:
    """Raise a RunError where an --output is a file, or the folder of a cache."""
    if output.exists() and not output.is_dir():
        raise RunError(f"--output {output} is a file, expected a folder")
    if (output / "cache.json").exists():
        raise RunError(f"--output {output} is a cache, expected another folder: its files would be taken for features")


def is_finished(output: Path, identity: dict[str, Any]) -> bool:
    """Return whether a folder holds the results of a run. identity: its settings, by name, and its examples.

    Raises a RunError where the folder holds another run, or the run trained for more epochs than it would now.
    """
    return _read_claim(output, identity) == _plain(identity) and (output / "results.json").exists()


def claim(output: Path, identity: dict[str, Any]) -> None:
    """Write what a folder's run is into run.json; raise a RunError as `is_finished` does.

    The run may be there with fewer epochs: results that they gave are deleted, since their parts are about to change.
    """
    if _read_claim(output, identity) != _plain(identity):
        (output / "results.json").unlink(missing_ok=True)  # first: killed in between, it is an unfinished run
        write_json(output / "run.json", identity)


def _read_claim(output: Path, identity: dict[str, Any]) -> dict[str, Any] | None:
    """Return what run.json says of a run that training has begun, None of one that failed before it made anything;
    raise a RunError where it is another run than that of identity, or one of more epochs.
    """
    path, new = output / "run.json", _plain(identity)
    made = next((found.name for pattern in MADE for found in output.glob(pattern)), None)
    if made is None:
        return None
    if not path.exists():
        raise RunError(f"{output} holds {made} but no run.json: choose another folder")
    old = read_json(path)
    if not isinstance(old, dict) or not isinstance(old.get("epochs"), int):
        raise RunError(_broken(path, "no settings"))
    old.pop("device", None)  # earlier versions noted it
    differ = [key for key in dict.fromkeys([*new, *old]) if old.get(key) != new.get(key)]
    if differ == ["epochs"] and old["epochs"] > new["epochs"]:
        raise RunError(
            f"--epochs is {new['epochs']}, but the run in {output} was begun with --epochs {old['epochs']}: "
            f"give {old['epochs']} or more, or choose another folder"
        )
    if differ not in ([], ["epochs"]):
        told = ", ".join(f"{key} {old.get(key)} and {new.get(key)}" for key in differ)
        raise RunError(f"{output} holds another run, choose another folder: {told}")
    return old


def _plain(identity: dict[str, Any]) -> dict[str, Any]:
    return json.loads(json.dumps(identity))  # as it is read: JSON has no tuples


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
    for i, data in enumerate(results["parts"]):
        part = read_part(data, None if splits is None else splits[i], path)
        if max(part.predictions, default=0) >= len(results["names"]):
            raise RunError(_broken(path, "names"))
    return results


def _details(results: dict[str, Any]) -> dict[str, bool]:
    """Return whether the entries of some results are complete, by the name of each that has entries itself."""
    memory, layers, rates = results["memory"], results["settings"].get("layers"), results["settings"].get("rates")
    fields = Settings.__dataclass_fields__.keys()
    right = results["settings"].keys() == fields and isinstance(layers, list) and isinstance(rates, list)
    return {
        **{name: _are_numbers([results[name].get("mean"), results[name].get("std")]) for name in SCORES},
        "memory": _are_numbers([memory.get("bytes")]) and isinstance(memory.get("what"), str),
        "settings": right and _are_places(layers) and _are_numbers(rates),
        "names": all(isinstance(name, str) for name in results["names"]),
        "parts": bool(results["parts"]),
        "about": isinstance(results["about"].get("cache"), (dict, type(None))),
    }


def read_part(data: Any, split: Split | None, path: Path) -> Part:
    """Return the part that a file at path holds as data; raise a RunError where it is none, or of another split."""
    try:
        part = Part(**data)
        numbers = [part.accuracy, part.balanced_accuracy, part.macro_f1, part.rate, part.best_epoch, part.memory]
        numbers += part.losses + part.accuracies + part.validation_losses + part.seconds
        numbers += [tried[name] for tried in part.tried for name in ("rate", "epochs", "seconds")]
        places = [part.train, part.parameters, *part.validation, *part.test, *part.predictions]
        right = _are_numbers(numbers) and _are_places(places) and part.best_epoch < len(part.losses)
        right = right and _are_predictions(part) and all(isinstance(text, str) for text in part.warnings)
    except (TypeError, KeyError):
        right = False
    if not right:
        raise RunError(_broken(path, "a part"))
    if split is not None and (part.validation, part.test) != (split.validation.tolist(), split.test.tolist()):
        raise RunError(f"{path} is of other splits of the examples, an earlier version's: choose another folder")
    return part


def _are_predictions(part: Part) -> bool:
    """Tell whether a part has a prediction for every example that tests, and a probability of every class, or none."""
    found, count = part.probabilities, len(part.test)
    if len(part.predictions) not in (0, count) or len(found) not in (0, count):
        return False
    right = all(isinstance(row, list) and _are_numbers(row) and len(row) == len(found[0]) for row in found)
    return right and all(prediction < len(row) for prediction, row in zip(part.predictions, found, strict=False))


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


def save_fits(path: Path, fits: list[Fit]) -> None:
    """Write how far training is at the rates that have begun into a file as a whole, or not at all."""
    data = io.BytesIO()
    torch.save([{**vars(fit), "part": asdict(fit.part)} for fit in fits], data)
    write_whole(path, data.getvalue())


def load_fits(path: Path, split: Split, device: str) -> list[Fit]:
    """Return what `save_fits` wrote of a split, on a device; raise a RunError where the file is broken."""
    try:
        fits = [Fit(**fit) for fit in torch.load(path, map_location=device)]
    except Exception as error:  # zip, pickle, end of file and other fields each fail in a way of their own
        raise RunError(_broken(path, type(error).__name__)) from None
    if not fits:
        raise RunError(_broken(path, "no checkpoint"))
    for fit in fits:
        fit.part = read_part(fit.part, split, path)
    return fits
