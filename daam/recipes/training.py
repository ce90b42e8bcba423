"""Training runs: the job of a method on cached features, and what runs any job part by part in a folder.

An interrupted run goes on where it stopped, epoch by epoch, and so does a finished one with more epochs: on a CPU both
end with the numbers of a run that was not interrupted.
"""

from __future__ import annotations

import contextlib
import math
import platform
from dataclasses import asdict, replace
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import daam
from daam.recipes import processes, runs
from daam.recipes.cache import Cache, choose_layers, fingerprint
from daam.recipes.fitting import fit_part
from daam.recipes.jobs import Job
from daam.recipes.lock import exclusive
from daam.recipes.logistic import fit_logistic
from daam.recipes.methods import LOGISTIC, decoder_for
from daam.recipes.plots import plot_confusion, plot_curves
from daam.recipes.runs import SCORES, Part, Settings, Split
from daam.recipes.scores import confusion, pooled, write_scores
from daam.recipes.splits import equal_in, splits
from daam.transformer import read_settings


def cached_job(cache: Cache, settings: Settings, device: str = "cpu") -> Job:
    """Return the job of a method on cached features of settings.layers, or all. Those in memory go to the device at
    once, those on disk batch by batch.
    """
    features = choose_layers(cache.features, settings.layers)
    if isinstance(features, Tensor):  # those on disk are more than memory should hold
        features = features.to(device)

    def build() -> nn.Module:
        options = {name: getattr(settings, name) for name in ("standardize", "conv_channels", "zero_start")}
        return decoder_for(settings.method, *features.shape[1:], len(cache.names), **options)

    def inputs(places: Tensor) -> dict[str, Tensor]:
        return {"x": features[places.to(features.device)]}

    # by all layers: methods that see some of them train on the same parts
    return Job(build, inputs, cache.labels, cache.names, fingerprint(cache), features=features, equal=equal_in(cache),
               groups=cache.groups, parts=cache.parts)  # fmt: skip


def run(job: Job, settings: Settings, output: Path, device: str = "cpu", about: dict[str, Any] | None = None) -> dict:
    """Train every part of a job, or what is left of them, in the folder output; write the results and return them, as
    results.json holds them. A finished run is returned as it is; with more epochs than it had it goes on.

    Of processes that `processes.joined` joined each trains its share of the parts; all return the results.

    Raises:
        RunError: the folder holds something else, or more epochs; a file of it is broken; there are too few examples;
            the loss is not finite. UserError: another process trains in the folder.
    """
    all_splits = splits(job.labels, settings, job.equal, job.groups, job.parts)
    runs.check_output(output)
    # not the device and its threads: they are how a run was made, not what it is
    identity = {**asdict(settings), "examples": job.identity}
    if runs.is_finished(output, identity) and all(_has_model(output / f"part-{i}") for i in range(len(all_splits))):
        return runs.read_results(output, all_splits)
    job.build()  # what cannot be built does not claim the folder
    first = processes.rank() == 0
    with exclusive(output):
        if first:
            runs.claim(output, identity)
        processes.wait()
        for i in processes.share(range(len(all_splits))):
            _finish_part(job, all_splits[i], settings, output, i, device)
        processes.wait()
        if first:
            _write_results(job, settings, all_splits, output, device, about or {})
        processes.wait()
    return runs.read_results(output, all_splits)


def _finish_part(job: Job, split: Split, settings: Settings, output: Path, i: int, device: str) -> None:
    """Train what is left of part i, and write what the part gave."""
    stem = output / f"part-{i}"
    path = stem.with_suffix(".json")
    part = runs.read_part(runs.read_json(path), split, path) if path.exists() else None
    if part is None or not part.probabilities or _needs_more(part, settings) or not _has_model(stem):
        part = (fit_logistic if settings.method in LOGISTIC else fit_part)(job, split, settings, stem, i, device)
        runs.write_json(path, asdict(part))
    if not _needs_more(part, replace(settings, epochs=math.inf)):
        stem.with_suffix(".pt").unlink(missing_ok=True)  # also where the process died before it could


def _has_model(stem: Path) -> bool:
    """Return whether the model of a part is there, and says what it is, as those of earlier versions do not."""
    try:
        return "names" in read_settings(stem.with_suffix(".safetensors"))
    except Exception:  # no file, no safetensors, no settings: each fails in a way of its own
        return False


def _needs_more(part: Part, settings: Settings) -> bool:
    """Return whether a part that is trained would be another one with the epochs of settings."""
    if settings.method in LOGISTIC:  # takes no epochs
        return False
    return any(not tried.get("ended") and tried["epochs"] < settings.epochs for tried in part.tried)


def _write_results(
    job: Job, settings: Settings, all_splits: list[Split], output: Path, device: str, about: dict[str, Any]
) -> None:
    """Write scores, pictures and results of a job whose parts are trained."""
    paths = [output / f"part-{i}.json" for i in range(len(all_splits))]
    parts = [runs.read_part(runs.read_json(path), split, path) for path, split in zip(paths, all_splits, strict=True)]
    write_scores(output, job.labels.tolist(), job.names, parts)
    results = _results(job, settings, parts, device, about)
    plot_curves(results, output / "learning-curves.png")
    plot_confusion(results, confusion(*pooled(job.labels.tolist(), parts), len(job.names)), output / "confusion.png")
    runs.write_json(output / "results.json", results)  # last: a run with results is finished, and has its pictures


def _results(job: Job, settings: Settings, parts: list[Part], device: str, about: dict[str, Any]) -> dict[str, Any]:
    """Return what results.json says of a job whose parts are trained."""
    scores = {name: np.array([getattr(part, name) for part in parts]) for name in SCORES}
    counts = [job.labels[part.test].bincount().max().item() / len(part.test) for part in parts]
    on_gpu = torch.device(device).type == "cuda"
    what = "peak" if on_gpu else "saved for backward in a step"
    return {
        "method": settings.method,
        **{name: {"mean": float(values.mean()), "std": float(values.std())} for name, values in scores.items()},
        "chance": float(np.mean(counts)),  # who says the most frequent class of every test part
        "trainable_parameters": parts[0].parameters,
        "seconds": float(np.median([sum(tried["seconds"] for tried in part.tried) for part in parts])),
        "memory": {"bytes": parts[0].memory, "what": "peak of the fit" if settings.method in LOGISTIC else what},
        "names": job.names,
        "settings": asdict(settings),
        "examples": job.identity,
        # their probabilities stand in predictions.csv
        "parts": [asdict(replace(part, probabilities=[])) for part in parts],
        "about": {**about, "device": device_name(device), "daam": daam.__version__, **_versions()},
    }


def _versions() -> dict[str, str]:
    """Return the versions of what computes features and trains on them, where it is installed."""
    found = {"torch": torch.__version__}
    with contextlib.suppress(metadata.PackageNotFoundError):
        found["transformers"] = metadata.version("transformers")
    return found


def device_name(device: str) -> str:
    """Return a device in words: a GPU's name, or a CPU's architecture and threads."""
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.machine()} CPU, {torch.get_num_threads()} threads"
