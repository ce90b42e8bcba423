"""Fitting a model on one part of the examples: at each rate, epoch by epoch, until validation gets no better."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor, nn

import daam
from daam.recipes import runs
from daam.recipes.jobs import Job, Work, trainable
from daam.recipes.memory import saved_bytes
from daam.recipes.progress import Progress
from daam.recipes.runs import Fit, Part, RunError, Settings, Split
from daam.recipes.scores import score
from daam.recipes.warn import find_warnings
from daam.standardize import Standardize
from daam.transformer import LOSSES

SAVE_EVERY = 5.0  # seconds between two checkpoints: a disk may take longer for one than a small model for an epoch


def fit_part(job: Job, split: Split, settings: Settings, stem: Path, seed: int, device: str) -> Part:
    """Train at every rate, test what was best on validation, and return what it gave.

    stem begins the names of the checkpoint and of the decoder that is saved; seed draws the parameters, the same for
    each rate. The checkpoint that is left is what rates whose epochs were over can go on from. Raises a RunError where
    the loss is finite at no rate.
    """
    work = Work(job, split, settings, device, class_weights(job, split, settings))
    checkpoint = stem.with_suffix(".pt")
    fits = runs.load_fits(checkpoint, split, device) if checkpoint.exists() else []
    for i, rate in enumerate(settings.rates):
        if i == len(fits):
            fits.append(Fit(_begin(rate, work)))
        fit = fits[i]
        if fit.has_ended(settings) or len(fit.part.losses) >= settings.epochs:
            continue
        _fit_at(fit, work, seed, checkpoint, lambda: runs.save_fits(checkpoint, fits))
        if fit.has_ended(settings):
            fit.steps = None
        best = _choose(fits, settings)
        for other in fits:
            if other is not best and other.has_ended(settings):
                other.best = None  # others get better at most: it will not be chosen
        if best.best is not None:  # what made nothing does not keep the folder from others
            runs.save_fits(checkpoint, fits)
    chosen = _choose(fits, settings)
    part = replace(chosen.part, tried=[_summary(fit, settings) for fit in fits])
    if chosen.best is None:
        raise RunError(f"the training loss is not finite in epoch 1, at no rate: {_advice(work)}")
    model = untrained(job, split, seed, device)
    model.load_state_dict(chosen.best, strict=False)
    test_part(model, part, work)
    daam.save_decoder(model, stem.with_suffix(".safetensors"), job.names)
    return part


def untrained(job: Job, split: Split, seed: int, device: str) -> nn.Module:
    """Return a part's model before it trains: its parameters drawn, features standardised by examples that train."""
    torch.manual_seed(seed)
    model = job.build().to(device)
    if job.features is not None and getattr(model, "standardize", None) is not None:
        model.standardize.load_state_dict(_statistics(job, split))
    return model


@lru_cache(maxsize=1)  # features are read whole for it
def _statistics(job: Job, split: Split) -> dict[str, Tensor]:
    """Return the state of a `daam.standardize.Standardize` that knows the examples of a split that train."""
    fitted = Standardize(job.features.shape[1])
    fitted.fit(job.features, split.train.to(job.features.device))
    return fitted.state_dict()


def test_part(model: nn.Module, part: Part, work: Work) -> None:
    """Add to a part what its model makes of the test examples, and what there is to warn of."""
    test = work.split.test
    scores = predict(model, test, work)
    part.predictions, part.probabilities = scores.argmax(1).tolist(), scores.softmax(1).tolist()
    for name, value in score(work.job.labels[test].tolist(), part.predictions).items():
        setattr(part, name, value)
    part.parameters = sum(p.numel() for p in trainable(model))
    part.warnings += find_warnings(model, part, work)


def class_weights(job: Job, split: Split, settings: Settings) -> Tensor | None:
    """Return weights of the classes, (classes,), that give each as much weight as others in training, or None."""
    if not settings.class_weights:
        return None
    counts = job.labels[split.train].bincount(minlength=len(job.names))
    return len(split.train) / (counts.count_nonzero() * counts.clamp(min=1)).float()


def _begin(rate: float, work: Work) -> Part:
    """Return a part that has trained for no epoch at a rate."""
    split = work.split
    return Part(rate=rate, train=len(split.train), validation=split.validation.tolist(), test=split.test.tolist())


def _choose(fits: list[Fit], settings: Settings) -> Fit:
    """Return the best of some fits on validation, the first of equal ones."""
    return max(fits, key=lambda fit: score_of(fit.part, settings))


def _fit_at(fit: Fit, work: Work, seed: int, checkpoint: Path, save: Callable[[], None]) -> None:
    """Train at one rate, from where it is, until its epochs are over or more would change nothing; call save now and
    then. What changes is fit.
    """
    settings, part = work.settings, fit.part
    model = untrained(work.job, work.split, seed, work.device)
    optimizer = torch.optim.AdamW(work.job.rates(model, part.rate), weight_decay=settings.weight_decay)
    # of the paper; where training ends after ten epochs without a better one it does nothing
    schedule = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, "max", threshold_mode="abs", patience=10)
    if fit.steps is not None:
        model.load_state_dict(fit.steps["model"], strict=False)
        optimizer.load_state_dict(fit.steps["optimizer"])
        schedule.load_state_dict(fit.steps["schedule"])
    else:
        model.eval()  # running statistics stay as they are
        first = work.split.train[: settings.batch]
        part.memory = saved_bytes(lambda: _loss(model, first, work), model.parameters())

    def keep_steps() -> None:
        steps = {"optimizer": optimizer.state_dict(), "schedule": schedule.state_dict()}
        fit.steps = {"model": _trained_state(model), **steps}

    epochs, saved = range(len(part.losses), settings.epochs), time.monotonic()
    name = f"{settings.method} {checkpoint.stem} at {part.rate:g}"
    bar = Progress(epochs, desc=name, initial=epochs.start, total=epochs.stop)
    for epoch in bar:
        if fit.has_ended(settings):
            break
        if not _train_epoch(model, work, optimizer, epoch, part):
            fit.finite = False
            break
        schedule.step(score_of(part, settings, epoch)[0])
        if score_of(part, settings, epoch) > score_of(part, settings):
            part.best_epoch = epoch
            fit.best = {name: t.clone() for name, t in _trained_state(model).items()}
        bar.set_postfix(loss=f"{part.losses[-1]:.4f}", accuracy=f"{part.accuracies[-1]:.3f}")
        if time.monotonic() - saved >= SAVE_EVERY:
            keep_steps()
            save()
            saved = time.monotonic()
    keep_steps()


def _train_epoch(model: nn.Module, work: Work, optimizer: torch.optim.Optimizer, epoch: int, part: Part) -> bool:
    """Train on the examples of a split once, in an order that only the epoch decides, and add what it gave to part;
    return whether the loss is finite, without which nothing is added.
    """
    split, device = work.split, work.device
    on_gpu = torch.device(device).type == "cuda"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats(device)
    start, total = time.perf_counter(), torch.zeros((), device=device)
    model.train()
    torch.manual_seed(epoch)  # of dropout, so that a resumed run draws the same
    order = split.train[torch.randperm(len(split.train), generator=torch.Generator().manual_seed(epoch))]
    for batch in order.split(work.settings.batch):
        optimizer.zero_grad()
        loss, _ = _loss(model, batch, work)
        loss.backward()
        optimizer.step()
        total += loss.detach() * len(batch)
    mean = total.item() / len(order)
    if not math.isfinite(mean):
        return False
    part.losses.append(mean)
    accuracy, loss = validate(model, work)
    part.accuracies.append(accuracy)
    part.validation_losses.append(loss)
    part.seconds.append(time.perf_counter() - start)
    if on_gpu:
        part.memory = max(part.memory, torch.cuda.max_memory_allocated(device))
    return True


def _summary(fit: Fit, settings: Settings) -> dict[str, float]:
    """Return what is told of a rate: epochs, seconds, whether the loss was finite and training has ended, or would go
    on with more epochs; and, where there is one, the best score on validation.
    """
    part, best = fit.part, fit.part.best_epoch
    found = {"rate": part.rate, "epochs": len(part.losses), "seconds": sum(part.seconds), "finite": fit.finite}
    found["ended"] = fit.has_ended(settings)
    if best >= 0:
        found |= {"accuracy": part.accuracies[best], "loss": part.validation_losses[best]}
    return found


def score_of(part: Part, settings: Settings, epoch: int | None = None) -> tuple[float, float]:
    """Return how good an epoch was on validation, or the best one so far, by what chooses first; more is better."""
    epoch = part.best_epoch if epoch is None else epoch
    if epoch < 0:
        return -math.inf, -math.inf
    loss = part.validation_losses[epoch]
    found = -loss if math.isfinite(loss) else -math.inf, part.accuracies[epoch]
    # of few examples many epochs get all right: then the loss decides
    return found if settings.choose_by == "loss" else found[::-1]


def _advice(work: Work) -> str:
    """Return in words what to do about a loss that is not finite: take a lower rate, or look at the examples."""
    model, settings = untrained(work.job, work.split, 0, work.device), work.settings
    for batch in work.split.train.split(settings.batch):
        loss, _ = _loss(model, batch, work)
        gradients = torch.autograd.grad(loss, trainable(model), allow_unused=True)
        if not all(t.isfinite().all() for t in (loss, *gradients) if t is not None):
            places = f"between {batch[0]} and {batch[-1]}" if len(batch) > 1 else f"{batch[0]}"
            dtypes = ", ".join(sorted({str(p.dtype).removeprefix("torch.") for p in model.parameters()}))
            return (
                f"an untrained model has no finite loss or gradients either, of examples {places}. No --rate helps: "
                f"look at these examples, and at the range of numbers in the model's {dtypes}"
            )
    # a step multiplies weights by 1 less this product
    decay = settings.weight_decay > 1 and max(settings.rates) * settings.weight_decay > 1
    return f"choose a lower {'--weight-decay' if decay else '--rate'}"


def _loss(model: nn.Module, places: Tensor, work: Work) -> tuple[Tensor, Tensor]:
    """Return the loss of the examples at some places, a scalar, and the scores of the classes, (places, classes)."""
    job, device = work.job, work.device
    with autocast(device):
        scores = model(**{name: t.to(device) for name, t in job.inputs(places).items()}).float()
    return loss_of(scores, job.labels[places].to(device), work), scores


def loss_of(scores: Tensor, labels: Tensor, work: Work) -> Tensor:
    """Return the loss of scores, (examples, classes), a scalar, with the weights of the classes if there are some."""
    weight = None if work.weight is None else work.weight.to(scores.device)
    return LOSSES[work.settings.loss](scores, labels, weight=weight)


@torch.no_grad()
def predict(model: nn.Module, places: Tensor, work: Work) -> Tensor:
    """Return the scores of the classes, (places, classes) on the CPU, of the examples at some places."""
    model.eval()
    return torch.cat([_loss(model, batch, work)[1].cpu() for batch in places.split(64)])


def validate(model: nn.Module, work: Work) -> tuple[float, float]:
    """Return accuracy and loss of a model on validation; with class weights the accuracy is the balanced one."""
    places = work.split.validation
    scores, labels = predict(model, places, work), work.job.labels[places]
    found = score(labels.tolist(), scores.argmax(1).tolist())
    return found["accuracy" if work.weight is None else "balanced_accuracy"], loss_of(scores, labels, work).item()


def autocast(device: str):
    """Return a context in which models compute in bf16, on a GPU that has it; elsewhere it does nothing."""
    kind = torch.device(device).type
    enabled = kind == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.autocast(kind, torch.bfloat16, enabled=enabled)


def _trained_state(model: nn.Module) -> dict[str, Tensor]:
    """Return what training changes of a model's state, by name: all but frozen parameters."""
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    return {name: t for name, t in model.state_dict().items() if name not in frozen}
