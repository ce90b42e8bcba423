"""Layers and features that a trained decoder uses: importance factor, layer contribution, learned Gaussians.

Weights are averaged over the validation examples of every part, each by the decoder of that part. --ablate trains the
method again on so many layers of the highest contribution, and on as many of the lowest: compare the two with each
other, since they were chosen on examples that test elsewhere.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import daam
from daam.decoder import DENSITIES
from daam.recipes.arguments import positive
from daam.recipes.cache import Cache, fingerprint, read_cache
from daam.recipes.errors import Parser, guarded
from daam.recipes.lock import exclusive
from daam.recipes.plots import accuracy_of, describe, plot_gaussians, plot_importance
from daam.recipes.runs import RunError, Settings, check_output, read_results, write_json
from daam.recipes.training import cached_job, run

EXAMPLE = """example:
  python -m daam.recipes.explain comparison/daam cache --output explained --ablate 3"""


def read_run(folder: Path, cache: Cache) -> dict[str, Any]:
    """Return the results of a finished run on a cache; raise a RunError where it is of another, or has no densities."""
    if not (folder / "results.json").exists():
        raise RunError(f"{folder / 'results.json'} does not exist: finish the run with daam.recipes.train first")
    results = read_results(folder)
    if results["method"] not in (*DENSITIES, "daamv2"):
        raise RunError(f"{folder} is a run of {results['method']!r}, which has no densities: expected daam, daamv2, "
                       "mixture or gqdaam")  # fmt: skip
    if results["examples"] != fingerprint(cache):
        about = results["about"].get("cache")
        about = about if isinstance(about, dict) else {}
        raise RunError(f"{folder} was trained on another cache, expected that of {about.get('source', 'its data')} "
                       f"through {about.get('encoder', 'its encoder')}")  # fmt: skip
    return results


def settings_of(results: dict[str, Any]) -> Settings:
    """Return the settings that a run's results were trained with."""
    return Settings(**{**results["settings"], "layers": tuple(results["settings"]["layers"])})


def load_part(folder: Path, i: int, results: dict[str, Any], cache: Cache) -> daam.DATDecoder:
    """Return the trained decoder of part i; raise a RunError where its file is not there, broken, or of another run."""
    path = folder / f"part-{i}.safetensors"
    try:
        decoder = daam.load_decoder(path).eval()
    except Exception as error:  # no file, no safetensors, no settings, other tensors: each fails in a way of its own
        raise RunError(f"{path} cannot be read ({type(error).__name__}): run daam.recipes.train again") from None
    sizes = decoder.settings["num_layers"], decoder.settings["num_features"]
    expected = len(results["settings"]["layers"]) or cache.features.shape[1], cache.features.shape[2]
    if sizes != expected or decoder.settings["attention"] not in DENSITIES:
        raise RunError(f"{path} is of another run: layers and features are {sizes}, expected {expected}, or it has no "
                       "densities")  # fmt: skip
    return decoder


@torch.no_grad()
def average_weights(folder: Path, results: dict[str, Any], cache: Cache) -> daam.WeightMap:
    """Return the mean weights of the validation examples of all parts as a map; its mean() is (layers, features)."""
    found, inputs = daam.WeightMap(), cached_job(cache, settings_of(results)).inputs
    for i, part in enumerate(results["parts"]):
        decoder = load_part(folder, i, results, cache)
        for places in torch.tensor(part["validation"]).split(64):
            found.update(decoder(**inputs(places), return_weights=True)[1])
    return found


def explain(folder: Path, results: dict[str, Any], cache: Cache, output: Path) -> dict[str, Any]:
    """Write importance.json, importance.png and gaussians.png; return what the first says.

    Layers count from 1, features from 0.
    """
    weights = average_weights(folder, results, cache)
    importance, contribution = daam.importance_factor(weights.mean()), daam.layer_contribution(weights.mean())
    decoder = load_part(folder, 0, results, cache)
    layers = [layer + 1 for layer in settings_of(results).layers or range(len(contribution))]
    offset, c = gaussians(decoder)
    top = importance.flatten().topk(min(10, importance.numel()))
    features = importance.shape[1]
    report = {
        "layers": layers,
        "layer_contribution": contribution.tolist(),
        "importance_per_layer": importance.mean(1).tolist(),
        "most_important": [
            {"layer": layers[place // features], "feature": place % features, "importance": value}
            for value, place in zip(top.values.tolist(), top.indices.tolist(), strict=True)
        ],
        "mean_offset": {"min": offset.min().item(), "max": offset.max().item()},
        "scaled_variance": {"min": c.min().item(), "max": c.max().item()},
    }
    write_json(output / "importance.json", report)
    about = f"{results['method']}, mean over {weights.count} validation examples\n{describe(results)}"
    heads = decoder.settings["num_heads"]
    plot_importance(importance.numpy(), contribution.numpy(), layers, heads, about, output / "importance.png")
    about = f"{results['method']}, part 0\n{describe(results)}"
    plot_gaussians(offset.numpy(), c.numpy(), about, output / "gaussians.png")
    return report


def gaussians(decoder: daam.DATDecoder) -> tuple[Tensor, Tensor]:
    """Return mean offsets and scaled variances of a decoder's heads, (heads, P) each; for the mixture these are c²."""
    if isinstance(decoder.daam, daam.DensityBlock):
        (layer,) = decoder.daam.layers
        return layer.mean_offsets.detach(), layer.c.detach().square()
    return decoder.daam.mean_offset.detach(), decoder.daam.c.detach()


def ablate(results: dict[str, Any], cache: Cache, contribution: Tensor, count: int, output: Path) -> dict[str, Any]:
    """Train a run's method on the count layers of "highest" contribution, and of "lowest"; return what both gave."""
    order, found = contribution.argsort(descending=True, stable=True), {}
    used = settings_of(results).layers or range(len(contribution))
    for name, chosen in (("highest", order[:count]), ("lowest", order[-count:])):
        layers = tuple(sorted(used[i] for i in chosen.tolist()))
        settings = replace(settings_of(results), layers=layers)
        done = run(cached_job(cache, settings), settings, output / name, about=results["about"])
        found[name] = {"layers": [layer + 1 for layer in layers], "accuracy": done["accuracy"]}
    return found


@guarded
def main(argv: list[str] | None = None) -> None:
    """Run the command line: explain a finished run."""
    parser = Parser(description=__doc__, epilog=EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="folder of daam.recipes.train, of a method with densities")
    parser.add_argument("cache", type=Path, help="the features it was trained on")
    parser.add_argument("--output", type=Path, required=True, help="folder of the pictures and importance.json")
    parser.add_argument("--ablate", type=positive, metavar="LAYERS", help="train on so many, highest against lowest")
    args = parser.parse_args(argv)
    cache = read_cache(args.cache)
    results = read_run(args.run, cache)
    layers = len(results["settings"]["layers"]) or cache.features.shape[1]
    if args.ablate is not None and not 2 <= args.ablate <= layers // 2:
        raise RunError(f"--ablate is {args.ablate}, expected 2 to {layers // 2}, half of the {layers} layers")
    check_output(args.output)
    with exclusive(args.output):
        _explain(args, results, cache)
    print(args.output.resolve())


def _explain(args: argparse.Namespace, results: dict[str, Any], cache: Cache) -> None:
    """Write and print the report on a run, and with --ablate what an ablation gives."""
    report = explain(args.run, results, cache, args.output)
    for layer, percent in zip(report["layers"], report["layer_contribution"], strict=True):
        print(f"layer {layer:3}: {percent:5.1f} % of all weights")
    if args.ablate is not None:
        contribution = torch.tensor(report["layer_contribution"])
        report["ablation"] = ablate(results, cache, contribution, args.ablate, args.output / "ablation")
        write_json(args.output / "importance.json", report)
    for name, trained in report.get("ablation", {}).items():
        print(f"{name} layers {trained['layers']}: test accuracy {accuracy_of(trained)}")


if __name__ == "__main__":
    main()
