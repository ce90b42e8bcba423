"""Logistic regression by scikit-learn on cached features: what a decoder has to beat."""

from __future__ import annotations

import time
import tracemalloc
import warnings
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

import daam
from daam.recipes.cache import iterate_blocks
from daam.recipes.errors import extra
from daam.recipes.fitting import class_weights, loss_of, predict, score_of, test_part, untrained, validate
from daam.recipes.jobs import Job, Work
from daam.recipes.methods import Probe
from daam.recipes.runs import Part, Settings, Split

with extra():
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression

STRENGTHS = (1e-3, 1e-2, 1e-1, 1.0, 10.0)  # C, inverse regularisation, of which validation chooses one
MOST_STEPS = 1000


def fit_logistic(job: Job, split: Split, settings: Settings, stem: Path, seed: int, device: str) -> Part:
    """Find weights at each of STRENGTHS, test what was best on validation, and return what it gave, as
    `fitting.fit_part` does. They are weights of a `Probe`, which is tested and saved as if it had been trained.
    """
    work = Work(job, split, settings, "cpu", class_weights(job, split, settings))
    part = Part(train=len(split.train), validation=split.validation.tolist(), test=split.test.tolist())
    model = untrained(job, split, seed, "cpu")
    chosen = None
    tracemalloc.start()
    x, labels = _pool(model, job, split), job.labels[split.train]
    for strength in STRENGTHS:
        start = time.perf_counter()
        converged = _fit(model, x, labels, settings, strength)
        accuracy, loss = validate(model, work)
        seconds = time.perf_counter() - start
        part.tried.append({"rate": strength, "epochs": 1, "seconds": seconds, "accuracy": accuracy, "loss": loss})
        training = loss_of(predict(model, split.train, work), labels, work).item()
        told = [] if converged else [f"the fit at C = {strength:g} has not converged after {MOST_STEPS} steps"]
        now = replace(part, rate=strength, best_epoch=0, losses=[training], accuracies=[accuracy],
                      validation_losses=[loss], seconds=[seconds], warnings=told)  # fmt: skip
        if chosen is None or score_of(now, settings) > score_of(chosen, settings):
            chosen, best = now, {name: t.clone() for name, t in model.state_dict().items()}
    chosen.memory = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    model.load_state_dict(best)
    test_part(model, chosen, work)
    daam.save_decoder(model, stem.with_suffix(".safetensors"), job.names)
    return chosen


@torch.no_grad()
def _pool(model: Probe, job: Job, split: Split) -> Tensor:
    """Return what a probe classifies of the examples that train, (examples, numbers)."""
    blocks = (x.cpu() for x in iterate_blocks(job.features, split.train))
    return torch.cat([model.pool(x if model.standardize is None else model.standardize(x)) for x in blocks])


@torch.no_grad()
def _fit(model: Probe, x: Tensor, labels: Tensor, settings: Settings, strength: float) -> bool:
    """Give a probe the weights that scikit-learn finds for x, (examples, numbers), and return whether it converged."""
    balanced = "balanced" if settings.class_weights else None
    classifier = LogisticRegression(C=strength, max_iter=MOST_STEPS, class_weight=balanced)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always", ConvergenceWarning)
        classifier.fit(x.numpy(), labels.numpy())
    coefficients, bias = (torch.from_numpy(a).float() for a in (classifier.coef_, classifier.intercept_))
    if len(coefficients) == 1:  # of two classes scikit-learn has the second one's alone
        coefficients, bias = (torch.cat([torch.zeros_like(t), t]) for t in (coefficients, bias))
    model.classify.weight.zero_()
    model.classify.bias.fill_(-1e9)  # of classes that no example has
    present = torch.from_numpy(classifier.classes_)
    model.classify.weight[present], model.classify.bias[present] = coefficients, bias
    return not told
