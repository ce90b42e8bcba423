"""Warnings of a trained model that its accuracy does not show: dead channels, odd features, training cut short."""

from __future__ import annotations

import sys

import torch
from torch import Tensor, nn

import daam
from daam.recipes.jobs import Work
from daam.recipes.methods import LOGISTIC
from daam.recipes.runs import Part
from daam.standardize import Standardize

DEAD_SHARE = 0.25  # of a convolution's channels: some of 512 die in any training
UNIT = (0.1, 10.0)  # standard deviations that rates suit which suit 1


def find_warnings(model: nn.Module, part: Part, work: Work) -> list[str]:
    """Return what there is to tell of a model that was trained on a part, each in a line, and print it."""
    found = [*_of_training(part, work), *_of_features(model, work), *_of_channels(model, work)]
    for line in found:
        print(f"warning: {work.settings.method}: {line}", file=sys.stderr)
    return found


def _of_training(part: Part, work: Work) -> list[str]:
    """Tell of training that ended with its best epoch, and of rates at which it did not end well."""
    found = []
    if part.best_epoch + 1 == work.settings.epochs and work.settings.method not in LOGISTIC:
        found.append(f"the best epoch is the last of {work.settings.epochs}: more --epochs may do better")
    for tried in part.tried:
        if not tried.get("finite", True):
            found.append(f"at a rate of {tried['rate']:g} the loss is not finite from epoch {tried['epochs'] + 1} on")
    return found


def _of_features(model: nn.Module, work: Work) -> list[str]:
    """Tell of layers far from unit scale, where features are not standardised."""
    features = work.job.features
    if features is None or getattr(model, "standardize", None) is not None:
        return []
    statistics = Standardize(features.shape[1])
    statistics.fit(features)
    scales = statistics.std.flatten().tolist()
    far = [scale for scale in scales if not UNIT[0] <= scale <= UNIT[1]]
    if not far:
        return []
    return [
        f"{len(far)} of {len(scales)} layers have features with a standard deviation of {min(far):.3g} to "
        f"{max(far):.3g}, far from 1: take --standardize"
    ]


def _of_channels(model: nn.Module, work: Work) -> list[str]:
    """Tell of convolutions of which many channels are dead: no example that trains passes the ReLU behind them."""
    if not isinstance(model, daam.DATDecoder):
        return []
    found = []
    for name, dead in dead_channels(model, work).items():
        if (count := int(dead.sum())) >= max(1, DEAD_SHARE * len(dead)):
            advice = "a lower --rate" + ("" if model.standardize is not None else ", or --standardize")
            found.append(
                f"{count} of {len(dead)} channels of {name} are dead, no training example passes them: take {advice}"
            )
    return found


@torch.no_grad()
def dead_channels(model: daam.DATDecoder, work: Work) -> dict[str, Tensor]:
    """Return for both convolutions of a decoder which channels are 0 behind their ReLU in all of training."""
    largest: dict[str, Tensor] = {}

    def note(name: str):
        def hook(module: nn.Module, inputs: tuple, output: Tensor) -> None:
            peak = output.amax((0, 2, 3)).float()
            largest[name] = torch.maximum(largest.get(name, peak), peak)

        return hook

    hooks = [getattr(model, name).register_forward_hook(note(name)) for name in ("conv1", "conv2")]
    model.eval()
    try:
        for batch in work.split.train.split(64):
            model(**{name: t.to(work.device) for name, t in work.job.inputs(batch).items()})
    finally:
        for hook in hooks:
            hook.remove()
    return {name: (peak <= 0).cpu() for name, peak in largest.items()}
