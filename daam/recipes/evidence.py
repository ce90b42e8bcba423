"""Evidence for what a map of attention weights says of layers: the map of untrained decoders, what the place within a
head explains, what dropping a layer costs, the weights of a weighted sum, and whether these rank the layers alike.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import daam
from daam.recipes.cache import Cache, iterate_blocks
from daam.recipes.errors import extra
from daam.recipes.fitting import validate
from daam.recipes.jobs import Work
from daam.recipes.runs import Settings
from daam.recipes.training import cached_job, run

with extra():
    from safetensors.torch import load_file
    from scipy.stats import norm, rankdata, spearmanr

SAME = 0.9  # correlation of two maps above which they are told to be the same
LEVEL = 0.95  # of intervals
FEWEST = 4  # layers that an interval takes
COMPARED = (
    ("layer_contribution", "loss_increase"),
    ("layer_contribution", "weighted_sum"),
    ("loss_increase", "weighted_sum"),
    ("layer_contribution", "untrained_contribution"),
)


@dataclass
class Fitted:
    """Hold the decoder of one part, trained and as it was before, on the CPU, and what it was trained on."""

    work: Work
    trained: daam.DATDecoder
    untrained: daam.DATDecoder


# decoders are on the CPU here, whatever backend they were trained on
@daam.use_backend("eager")
@torch.no_grad()
def average_weights(decoders: Iterable[tuple[daam.DATDecoder, Work]]) -> daam.WeightMap:
    """Return the mean weights of the validation examples of all parts as a map; its mean() is (layers, features)."""
    found = daam.WeightMap()
    for decoder, work in decoders:
        decoder.eval()
        for places in work.split.validation.split(64):
            found.update(decoder(**work.job.inputs(places), return_weights=True)[1])
    return found


def compare_maps(trained: Tensor, untrained: Tensor) -> dict[str, Any]:
    """Return what the map of untrained decoders says of layers, and its correlations with that of trained ones over all
    layers and features, or None for these where a map is the same everywhere. Both maps are (layers, features).
    """
    flat = [weights.flatten().double().numpy() for weights in (trained, untrained)]
    constant = any(np.ptp(weights) == 0 for weights in flat)
    return {
        "untrained": {
            "layer_contribution": daam.layer_contribution(untrained).tolist(),
            "importance_per_layer": daam.importance_factor(untrained).mean(1).tolist(),
        },
        "correlation_with_untrained": None if constant else float(np.corrcoef(*flat)[0, 1]),
        "rank_correlation_with_untrained": None if constant else float(spearmanr(*flat).statistic),
    }


def explain_ranks(contribution: Sequence[float], heads: int) -> dict[str, float] | None:
    """Return the share of the variance of the layers' ranks by contribution, (layers,), that their place within the
    head explains (eta squared): "explained", and "by_chance" that of ranks at random, on average.

    None where that says nothing: a head has all layers, or one, or all layers contribute the same.
    """
    layers, places = len(contribution), len(contribution) // heads
    ranks = rankdata(contribution).reshape(heads, places)
    total = ranks.var()
    if not 1 < places < layers or total == 0:
        return None
    return {"explained": float(ranks.mean(0).var() / total), "by_chance": (places - 1) / (layers - 1)}


@daam.use_backend("eager")
def drop_layers(fits: Sequence[Fitted], layers: Sequence[int]) -> list[dict[str, float]]:
    """Return for each layer what it costs trained decoders to see its mean over the examples that train instead: by how
    much the loss on the validation examples increases and the accuracy drops, both averaged over parts.

    Loss and accuracy are those of validation in training, with the weights of the classes if there are some. What a
    head makes of its other layers changes with the layer that is dropped. layers: their numbers, for "layer".
    """
    costs = np.mean([_costs(fit) for fit in fits], axis=0).tolist()
    return [
        {"layer": layer, "loss_increase": loss, "accuracy_drop": accuracy}
        for layer, (loss, accuracy) in zip(layers, costs, strict=True)
    ]


def _costs(fit: Fitted) -> np.ndarray:
    """Return increase of the loss and drop of the accuracy of a part for every layer that is dropped, (layers, 2)."""
    work, features = fit.work, fit.work.job.features
    mean = sum(x.double().sum(0) for x in iterate_blocks(features, work.split.train)) / len(work.split.train)
    accuracy, loss = validate(fit.trained, work)
    found = []
    for layer in range(features.shape[1]):

        def inputs(places: Tensor, layer: int = layer) -> dict[str, Tensor]:
            x = features[places]  # a copy
            x[:, layer] = mean[layer]
            return {"x": x}

        without = validate(fit.trained, replace(work, job=replace(work.job, inputs=inputs)))
        found.append((without[1] - loss, accuracy - without[0]))
    return np.array(found)


def sum_layers(results: dict[str, Any], cache: Cache, output: Path) -> dict[str, Any]:
    """Train a weighted sum of the layers on the parts of a run with its other settings, in the folder output; return
    its "layer_weights", which sum to 1, averaged over parts, and its test "accuracy".
    """
    settings = replace(Settings.of(results), method="weighted_sum")
    done = run(cached_job(cache, settings), settings, output, about=results["about"])
    parts = [load_file(output / f"part-{i}.safetensors") for i in range(len(done["parts"]))]
    weights = [tensors["layer_scores"].double().softmax(0) for tensors in parts]
    return {"layer_weights": torch.stack(weights).mean(0).tolist(), "accuracy": done["accuracy"]}


def correlate_ranks(report: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the rank correlation of every pair of COMPARED, by what a report says of contributions, of "dropped" and
    of "weighted_sum".
    """
    measures = {
        "layer_contribution": report["layer_contribution"],
        "untrained_contribution": report["untrained"]["layer_contribution"],
        "loss_increase": [found["loss_increase"] for found in report["dropped"]],
        "weighted_sum": report["weighted_sum"]["layer_weights"],
    }
    return [{"between": list(pair), **rank_correlation(*(measures[name] for name in pair))} for pair in COMPARED]


def rank_correlation(first: Sequence[float], second: Sequence[float]) -> dict[str, float | None]:
    """Return Spearman's "rho" of two measures of the same layers, None where one is the same for all, and the "low" and
    "high" end of its 95 % interval: Fisher's z with the standard error of Bonett and Wright (2000), None for both of
    fewer than four layers.
    """
    n = len(first)
    if n < 2 or np.ptp(first) == 0 or np.ptp(second) == 0:
        return {"rho": None, "low": None, "high": None}
    rho = float(spearmanr(first, second).statistic)
    if n < FEWEST:
        return {"rho": rho, "low": None, "high": None}
    # at 1 and -1 an interval would have no width: take it at the nearest value that so many ranks can have
    perfect = abs(rho) > 1 - 1e-9
    near = math.copysign(1 - 12 / (n**3 - n), rho) if perfect else rho
    z, reach = math.atanh(near), norm.ppf((1 + LEVEL) / 2) * math.sqrt((1 + near**2 / 2) / (n - 3))
    low, high = math.tanh(z - reach), math.tanh(z + reach)
    return {"rho": rho, "low": min(low, rho), "high": max(high, rho)}


def judge(report: dict[str, Any]) -> str:
    """Return in one sentence what the map of a report shows: by its correlation with that of untrained decoders and,
    where it has changed, by whether what a layer contributes ranks the layers as what dropping it costs.
    """
    correlation = report["correlation_with_untrained"]
    if correlation is None:
        return "A map is the same everywhere, of trained or of untrained decoders: it shows nothing."
    if correlation > SAME:
        return (
            f"The map of the trained decoder is that of an untrained one (correlation {correlation:.2f}): it shows the "
            "architecture and the encoder's features, not what training made of them."
        )
    found = next(entry for entry in report["rank_correlations"] if entry["between"] == list(COMPARED[0]))
    text = f"Training changed the map (correlation with that of an untrained decoder {correlation:.2f})"
    if found["low"] is None:
        return f"{text}, and there are too few layers to tell whether it shows what they are worth."
    rank = f"rank correlation {_with_interval(found)}"
    if found["low"] > 0:
        return f"{text}, and layers that contribute more cost more when they are dropped ({rank})."
    if found["high"] < 0:
        return f"{text}, but layers that contribute more cost less when they are dropped ({rank})."
    count = len(report["layers"])
    return f"{text}, but {count} layers do not tell whether those that contribute more cost more when dropped ({rank})."


def _with_interval(found: dict[str, Any]) -> str:
    return "{rho:.2f}, {low:.2f} to {high:.2f}".format(**found)
