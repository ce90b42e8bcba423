"""Which layers and features a trained decoder uses: importance factor, layer contribution, learned Gaussians.

    python -m daam.recipes.explain runs/daam CACHE --output explained [--ablate 3]

Weights are averaged over the test examples of every part, each by the decoder that has not seen them. --ablate trains
the method again on so many layers of the highest importance, and on as many of the lowest.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import daam
from daam.decoder import DENSITIES
from daam.recipes.cache import Cache, read_cache
from daam.recipes.plots import describe, plot_gaussians, plot_importance
from daam.recipes.train import RunError, Settings, cached_job, run


def read_run(folder: Path) -> dict[str, Any]:
    """The results of a finished run."""
    path = folder / "results.json"
    if not path.exists():
        raise RunError(f"{path} does not exist: finish the run with daam.recipes.train first")
    results = json.loads(path.read_text())
    if results["method"] not in (*DENSITIES, "daamv2"):
        raise RunError(f"{folder} is a run of {results['method']!r}, which has no densities: expected daam, daamv2, "
                       "mixture or gqdaam")  # fmt: skip
    return results


def settings_of(results: dict[str, Any]) -> Settings:
    return Settings(**{**results["settings"], "layers": tuple(results["settings"]["layers"])})


@torch.no_grad()
def average_weights(folder: Path, results: dict[str, Any], cache: Cache) -> daam.WeightMap:
    """The weights, (layers, features), of the test examples of all parts."""
    found, batch = daam.WeightMap(), cached_job(cache, settings_of(results)).batch
    for i, part in enumerate(results["parts"]):
        decoder = daam.load_decoder(folder / f"part-{i}.safetensors").eval()
        for places in torch.tensor(part["test"]).split(64):
            found.update(decoder(*batch(places), return_weights=True)[1])
    return found


def ablate(results: dict[str, Any], cache: Cache, contribution: Tensor, count: int, output: Path) -> dict[str, Any]:
    """Train on the layers that contribute most, and on those that contribute least."""
    if not 1 <= count < len(contribution):
        raise RunError(f"--ablate is {count}, expected 1 to {len(contribution) - 1} of the {len(contribution)} layers")
    order, found = contribution.argsort(descending=True, stable=True), {}
    for name, chosen in (("highest", order[:count]), ("lowest", order[-count:])):
        layers = tuple(sorted(chosen.tolist()))
        settings = replace(settings_of(results), layers=layers)
        done = run(cached_job(cache, settings), settings, output / name, about=results["about"])
        found[name] = {"layers": [layer + 1 for layer in layers], "accuracy": done["accuracy"]}
    return found


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("run", type=Path, help="folder of daam.recipes.train, of a method with densities")
    parser.add_argument("cache", type=Path, help="the features it was trained on")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--ablate", type=int, metavar="LAYERS", help="train on so many layers, highest against lowest")
    args = parser.parse_args(argv)
    try:
        results, cache = read_run(args.run), read_cache(args.cache)
        report = explain(args.run, results, cache, args.output)
        if args.ablate is not None:
            contribution = torch.tensor(report["layer_contribution"])
            report["ablation"] = ablate(results, cache, contribution, args.ablate, args.output / "ablation")
    except ValueError as error:
        parser.error(str(error))
    (args.output / "importance.json").write_text(json.dumps(report, indent=1) + "\n")
    for layer, percent in enumerate(report["layer_contribution"], 1):
        print(f"layer {layer:3}: {percent:5.1f} % of all weights")
    for name, one in report.get("ablation", {}).items():
        accuracy = one["accuracy"]
        print(f"{name} layers {one['layers']}: test accuracy {accuracy['mean']:.3f} ± {accuracy['std']:.3f}")
    print(args.output.resolve())


def explain(folder: Path, results: dict[str, Any], cache: Cache, output: Path) -> dict[str, Any]:
    """Draw the pictures and return the numbers."""
    weights = average_weights(folder, results, cache)
    importance, contribution = (of(weights.mean()) for of in (daam.importance_factor, daam.layer_contribution))
    decoder = daam.load_decoder(folder / "part-0.safetensors")
    heads = decoder.settings["num_heads"]
    about = f"{results['method']}, mean over {weights.count} test examples\n{describe(results)}"
    plot_importance(importance.numpy(), contribution.numpy(), heads, about, output / "importance.png")
    offset, c = gaussians(decoder)
    plot_gaussians(
        offset.numpy(), c.numpy(), f"{results['method']}, part 0\n{describe(results)}", output / "gaussians.png"
    )
    top = importance.flatten().topk(min(10, importance.numel()))
    features = importance.shape[1]
    return {
        "layer_contribution": contribution.tolist(),
        "importance_per_layer": importance.mean(1).tolist(),
        "most_important": [
            {"layer": place // features + 1, "feature": place % features, "importance": value}
            for value, place in zip(top.values.tolist(), top.indices.tolist(), strict=True)
        ],
        "mean_offset": {"min": offset.min().item(), "max": offset.max().item()},
        "scaled_variance": {"min": c.min().item(), "max": c.max().item()},
    }


def gaussians(decoder: daam.DATDecoder) -> tuple[Tensor, Tensor]:
    """Mean offsets and scaled variances of a decoder's heads, (heads, P) each; the mixture's c counts squared."""
    if isinstance(decoder.daam, daam.DensityBlock):
        (layer,) = decoder.daam.layers
        return layer.mean_offsets.detach(), layer.c.detach().square()
    return decoder.daam.mean_offset.detach(), decoder.daam.c.detach()


if __name__ == "__main__":
    main()
