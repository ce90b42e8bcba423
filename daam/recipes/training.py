"""Training runs: the job of a method on cached features, and what runs any job part by part in a folder.

An interrupted run goes on where it stopped, epoch by epoch; on a CPU it ends with the same numbers.
"""

from __future__ import annotations

import platform
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import daam
from daam.recipes import runs
from daam.recipes.cache import Cache, fingerprint
from daam.recipes.fitting import fit_part
from daam.recipes.jobs import Job
from daam.recipes.lock import exclusive
from daam.recipes.logistic import fit_logistic
from daam.recipes.methods import LOGISTIC, decoder_for
from daam.recipes.plots import plot_confusion, plot_curves
from daam.recipes.runs import SCORES, Part, Settings, Split
from daam.recipes.scores import confusion, pooled, write_scores
from daam.recipes.splits import find_equal, splits


def cached_job(cache: Cache, settings: Settings, device: str = "cpu") -> Job:
    """Return the job of a method on cached features, which go to the device at once, of settings.layers or all."""
    features = (cache.features[:, list(settings.layers)] if settings.layers else cache.features).to(device)

    def build() -> nn.Module:
        options = {name: getattr(settings, name) for name in ("standardize", "conv_channels", "zero_start")}
        return decoder_for(settings.method, *features.shape[1:], len(cache.names), **options)

    def inputs(places: Tensor) -> dict[str, Tensor]:
        return {"x": features[places.to(device)]}

    # by all layers: methods that see some of them train on the same parts
    equal = find_equal(cache.features)
    return Job(build, inputs, cache.labels, cache.names, fingerprint(cache), features=features, equal=equal,
               groups=cache.groups, parts=cache.parts)  # fmt: skip


def run(job: Job, settings: Settings, output: Path, device: str = "cpu", about: dict[str, Any] | None = None) -> dict:
    """Train every part of a job, or what is left of them, in the folder output; write and return the results, as
    results.json holds them. A finished run is returned as it is.

    Raises:
        RunError: the folder holds something else, a file of it is broken, there are too few examples, the loss is not
            finite. UserError: another process trains in the folder.
    """
    all_splits = splits(job.labels, settings, job.equal, job.groups, job.parts)
    runs.check_output(output)
    # not the device and its threads: they are how a run was made, not what it is
    identity = {**asdict(settings), "examples": job.identity}
    if (output / "results.json").exists():
        runs.claim(output, identity)
        return runs.read_results(output, all_splits)
    job.build()  # what cannot be built does not claim the folder
    with exclusive(output):
        runs.claim(output, identity)
        parts = [_finish_part(job, split, settings, output, i, device) for i, split in enumerate(all_splits)]
        write_scores(output, job.labels.tolist(), job.names, parts)
        results = _results(job, settings, parts, device, about or {})
        runs.write_json(output / "results.json", results)
    plot_curves(results, output / "learning-curves.png")
    plot_confusion(results, confusion(*pooled(job.labels.tolist(), parts), len(job.names)), output / "confusion.png")
    return results


def _finish_part(job: Job, split: Split, settings: Settings, output: Path, i: int, device: str) -> Part:
    """Train what is left of part i, and return what the part gave."""
    stem = output / f"part-{i}"
    done = stem.with_suffix(".json")
    if not done.exists():
        fit = fit_logistic if settings.method in LOGISTIC else fit_part
        runs.write_json(done, asdict(fit(job, split, settings, stem, i, device)))
    stem.with_suffix(".pt").unlink(missing_ok=True)  # also where the process died before it could
    return runs.read_part(runs.read_json(done), split, done)


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
        "about": {**about, "device": device_name(device), "torch": torch.__version__, "daam": daam.__version__},
    }


def device_name(device: str) -> str:
    """Return a device in words: a GPU's name, or a CPU's architecture and threads."""
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.machine()} CPU, {torch.get_num_threads()} threads"
