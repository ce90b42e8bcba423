"""Training: the job of a decoder on cached features, and what runs any job part by part.

An interrupted run goes on where it stopped, epoch by epoch; on a CPU it ends with the same numbers.
"""

from __future__ import annotations

import math
import platform
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import daam
from daam.decoder import ATTENTIONS, DENSITIES, QUERY_HEADS
from daam.recipes import runs
from daam.recipes.cache import Cache, fingerprint
from daam.recipes.lock import exclusive
from daam.recipes.memory import saved_bytes
from daam.recipes.plots import plot_curves
from daam.recipes.progress import Progress
from daam.recipes.runs import Part, RunError, Settings, Split
from daam.recipes.splits import find_equal, splits
from daam.transformer import LOSSES

HEADS = (8, 6, 5, 4, 3, 2, 1)
METHODS = ("daam", "daamv2", *ATTENTIONS[1:], "linear", "lora", "lora+")


@dataclass
class Job:
    """Describe a model to train and its examples. rates: makes AdamW's groups of parameters of a model and a rate."""

    build: Callable[[], nn.Module]
    inputs: Callable[[Tensor], dict[str, Tensor]]  # makes of places of examples the arguments of the forward pass
    labels: Tensor  # (examples,)
    identity: str  # a hash of the examples
    rates: Callable[[nn.Module, float], list[dict]] = lambda model, rate: [{"params": trainable(model), "lr": rate}]
    groups: Tensor | None = None  # for every example the first that equals it, see `splits.find_equal`; None: none do


def heads_for(layers: int, method: str) -> int:
    """Return the number of heads of a method on so many layers: the largest of HEADS that divides them and leaves each
    head three or more, as the paper's 8 of 24; 1 where none does, and for DAAMv2.
    """
    if method == "daamv2":
        return 1
    # of two layers each is one standard deviation from their mean: density attention would weigh them alike
    return next((h for h in HEADS if layers % h == 0 and layers // h >= 3), 1)


def check_sizes(method: str, layers: int, features: int) -> None:
    """Raise a RunError where a method cannot work on so many layers and features."""
    # a single layer is its own mean, and with it a batch of one example has a single value to normalise
    if layers < 2 and method in (*DENSITIES, "daamv2", "mha_bn"):
        raise RunError(f"--method {method} compares layers with each other: expected 2 or more, there is {layers}")
    if features % QUERY_HEADS and method in ("mha", "mha_bn"):
        raise RunError(
            f"--method {method} shares the features among {QUERY_HEADS} heads: expected a multiple of {QUERY_HEADS}, "
            f"the encoder has {features}"
        )


def decoder_for(method: str, layers: int, features: int, classes: int) -> nn.Module:
    """Return a decoder by the name of its method: x of (batch, layers, features) to (batch, classes)."""
    if method == "linear":
        return _Linear(layers * features, classes)
    check_sizes(method, layers, features)
    attention = "daam" if method == "daamv2" else method
    heads = heads_for(layers, method) if attention in DENSITIES else 1
    return daam.DATDecoder(layers, features, classes, attention=attention, num_heads=heads)


class _Linear(nn.Linear):
    """Classify by a linear map of all layers, (batch, layers, features)."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.flatten(1))


def cached_job(cache: Cache, settings: Settings, device: str = "cpu") -> Job:
    """Return the job of a decoder on cached features, which go to the device at once, of settings.layers or all."""
    features = (cache.features[:, list(settings.layers)] if settings.layers else cache.features).to(device)

    def build() -> nn.Module:
        return decoder_for(settings.method, *features.shape[1:], len(cache.names))

    def inputs(places: Tensor) -> dict[str, Tensor]:
        return {"x": features[places.to(device)]}

    # by all layers: methods that see some of them train on the same parts
    return Job(build, inputs, cache.labels, fingerprint(cache), groups=find_equal(cache.features))


def run(job: Job, settings: Settings, output: Path, device: str = "cpu", about: dict[str, Any] | None = None) -> dict:
    """Train every part of a job, or what is left of them, in the folder output; write and return the results, as
    results.json holds them. A finished run is returned as it is.

    Raises:
        RunError: the folder holds something else, a file of it is broken, there are too few examples, the loss is not
            finite. UserError: another process trains in the folder.
    """
    all_splits = splits(job.labels, settings, job.groups)
    runs.check_output(output)
    # not the device and its threads: they are how a run was made, not what it is
    identity = {**asdict(settings), "examples": job.identity}
    if (output / "results.json").exists():
        runs.claim(output, identity)
        return runs.read_results(output, all_splits)
    model = job.build()  # what cannot be built does not claim the folder
    with exclusive(output):
        runs.claim(output, identity)
        parts = [_finish_part(job, split, settings, output, i, device) for i, split in enumerate(all_splits)]
        results = _results(job, settings, model, parts, device, about or {})
        runs.write_json(output / "results.json", results)
    plot_curves(results, output / "learning-curves.png")
    return results


def _finish_part(job: Job, split: Split, settings: Settings, output: Path, i: int, device: str) -> Part:
    """Train what is left of part i, and return what the part gave."""
    stem = output / f"part-{i}"
    done = stem.with_suffix(".json")
    if not done.exists():
        torch.manual_seed(i)
        runs.write_json(done, asdict(train_part(job.build().to(device), job, split, settings, stem, device)))
    stem.with_suffix(".pt").unlink(missing_ok=True)  # also where the process died before it could
    return runs.read_part(runs.read_json(done), split, done)


def _results(
    job: Job, settings: Settings, model: nn.Module, parts: list[Part], device: str, about: dict[str, Any]
) -> dict[str, Any]:
    """Return what results.json says of a job whose parts are trained."""
    accuracy = torch.tensor([part.accuracy for part in parts], dtype=torch.float64)
    on_gpu = torch.device(device).type == "cuda"
    return {
        "method": settings.method,
        "accuracy": {"mean": accuracy.mean().item(), "std": accuracy.std(correction=0).item()},
        "trainable_parameters": sum(p.numel() for p in trainable(model)),
        "seconds_per_epoch": float(np.median([s for part in parts for s in part.seconds])),
        "memory": {"bytes": parts[0].memory, "what": "peak" if on_gpu else "saved for backward in a step"},
        "settings": asdict(settings),
        "examples": job.identity,
        "parts": [asdict(part) for part in parts],
        "about": {**about, "device": device_name(device), "torch": torch.__version__, "daam": daam.__version__},
    }


def train_part(model: nn.Module, job: Job, split: Split, settings: Settings, stem: Path, device: str) -> Part:
    """Train on one split and return what it gave; stem begins the names of the checkpoint and of the best decoder."""
    optimizer = torch.optim.AdamW(job.rates(model, settings.rate), weight_decay=settings.weight_decay)
    schedule = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, "max", factor=0.1, patience=10)
    part, best = Part(validation=split.validation.tolist(), test=split.test.tolist()), None
    checkpoint = stem.with_suffix(".pt")
    if checkpoint.exists():
        state = runs.load_state(checkpoint, device)
        model.load_state_dict(state["model"], strict=False)
        optimizer.load_state_dict(state["optimizer"])
        schedule.load_state_dict(state["schedule"])
        part, best = runs.read_part(state["part"], split, checkpoint), state["best"]
    else:
        model.eval()  # running statistics stay as they are
        first = split.train[: settings.batch]
        part.memory = saved_bytes(lambda: _loss(model, job, first, settings, device), model.parameters())
    epochs = range(len(part.losses), settings.epochs)
    bar = Progress(epochs, desc=f"{settings.method} {stem.name}", initial=epochs.start, total=epochs.stop)
    for epoch in bar:
        if epoch - part.best_epoch > settings.stop_after:
            break
        _train_epoch(model, job, split, settings, optimizer, epoch, part, device)
        schedule.step(part.accuracies[-1])
        if part.best_epoch < 0 or _score(part, epoch) > _score(part, part.best_epoch):
            part.best_epoch = epoch
            best = {name: t.clone() for name, t in _trained_state(model).items()}
        bar.set_postfix(loss=f"{part.losses[-1]:.4f}", accuracy=f"{part.accuracies[-1]:.3f}")
        state = {"model": _trained_state(model), "optimizer": optimizer.state_dict(), "schedule": schedule.state_dict()}
        runs.save_state(checkpoint, {**state, "part": asdict(part), "best": best})
    model.load_state_dict(best, strict=False)
    part.accuracy, _ = evaluate(model, job, split.test, settings, device)
    if isinstance(model, daam.DATDecoder):
        daam.save_decoder(model, stem.with_suffix(".safetensors"))
    return part


def _train_epoch(
    model: nn.Module, job: Job, split: Split, settings: Settings, optimizer: torch.optim.Optimizer, epoch: int,
    part: Part, device: str,
) -> None:  # fmt: skip
    """Train on the examples of a split once, in an order that only the epoch decides, and add what it gave to part."""
    on_gpu = torch.device(device).type == "cuda"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats(device)
    start, total = time.perf_counter(), torch.zeros((), device=device)
    model.train()
    torch.manual_seed(epoch)  # of dropout, so that a resumed run draws the same
    order = split.train[torch.randperm(len(split.train), generator=torch.Generator().manual_seed(epoch))]
    for batch in order.split(settings.batch):
        optimizer.zero_grad()
        loss, _ = _loss(model, job, batch, settings, device)
        loss.backward()
        optimizer.step()
        total += loss.detach() * len(batch)
    part.losses.append(total.item() / len(order))
    if not math.isfinite(part.losses[-1]):
        advice = _advice(job, split, settings, device)
        raise RunError(f"the training loss is {part.losses[-1]} in epoch {epoch + 1}: {advice}")
    accuracy, loss = evaluate(model, job, split.validation, settings, device)
    part.accuracies.append(accuracy)
    part.validation_losses.append(loss)
    part.seconds.append(time.perf_counter() - start)
    if on_gpu:
        part.memory = max(part.memory, torch.cuda.max_memory_allocated(device))


def _advice(job: Job, split: Split, settings: Settings, device: str) -> str:
    """Return in words what to do about a loss that is not finite: take a lower rate, or look at the examples."""
    model = job.build().to(device)
    for batch in split.train.split(settings.batch):
        loss, _ = _loss(model, job, batch, settings, device)
        gradients = torch.autograd.grad(loss, trainable(model), allow_unused=True)
        if not all(t.isfinite().all() for t in (loss, *gradients) if t is not None):
            places = f"between {batch[0]} and {batch[-1]}" if len(batch) > 1 else f"{batch[0]}"
            dtypes = ", ".join(sorted({str(p.dtype).removeprefix("torch.") for p in model.parameters()}))
            return (
                f"an untrained model has no finite loss or gradients either, of examples {places}. No --rate helps: "
                f"look at these examples, and at the range of numbers in the model's {dtypes}"
            )
    # a step multiplies weights by 1 less this product
    decay = settings.weight_decay > 1 and settings.rate * settings.weight_decay > 1
    return f"choose a lower {'--weight-decay' if decay else '--rate'}"


def _score(part: Part, epoch: int) -> tuple[float, float]:
    """Return the score of an epoch: its accuracy, then its loss, since of few examples many epochs get all right."""
    return part.accuracies[epoch], -part.validation_losses[epoch]


def _loss(model: nn.Module, job: Job, places: Tensor, settings: Settings, device: str) -> tuple[Tensor, Tensor]:
    """Return the loss of the examples at some places, a scalar, and the scores of the classes, (places, classes)."""
    with _autocast(device):
        scores = model(**{name: t.to(device) for name, t in job.inputs(places).items()})
    return LOSSES[settings.loss](scores.float(), job.labels[places].to(device)), scores


@torch.no_grad()
def evaluate(model: nn.Module, job: Job, places: Tensor, settings: Settings, device: str) -> tuple[float, float]:
    """Return accuracy and mean loss of a model on the examples at some places."""
    model.eval()
    right = total = 0.0
    for batch in places.split(64):
        loss, scores = _loss(model, job, batch, settings, device)
        right += (scores.argmax(1).cpu() == job.labels[batch]).sum().item()
        total += loss.item() * len(batch)
    return right / len(places), total / len(places)


def _autocast(device: str):
    """Return a context in which models compute in bf16, on a GPU that has it; elsewhere it does nothing."""
    kind = torch.device(device).type
    enabled = kind == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.autocast(kind, torch.bfloat16, enabled=enabled)


def trainable(model: nn.Module) -> list[nn.Parameter]:
    """Return the parameters of a model that training changes."""
    return [p for p in model.parameters() if p.requires_grad]


def _trained_state(model: nn.Module) -> dict[str, Tensor]:
    """Return what training changes of a model's state, by name: all but frozen parameters."""
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    return {name: t for name, t in model.state_dict().items() if name not in frozen}


def device_name(device: str) -> str:
    """Return a device in words: a GPU's name, or a CPU's architecture and threads."""
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.machine()} CPU, {torch.get_num_threads()} threads"
