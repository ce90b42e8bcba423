"""Layers and features that a trained decoder weighs: importance factor, layer contribution, learned Gaussians; and how
much of it is due to training.

Weights are averaged over the validation examples of every part, each by the decoder of that part, and by the same
decoder before training. What each layer contributes is compared with what it costs to drop it (replace it by its mean)
and with the weights of a weighted sum of the layers, which is trained on the same parts. --ablate trains the method
again on so many layers of the highest contribution, and on as many of the lowest: compare the two with each other,
since they were chosen on examples that test elsewhere.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
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
from daam.recipes.evidence import (
    FEWEST,
    Fitted,
    average_weights,
    compare_maps,
    correlate_ranks,
    drop_layers,
    explain_ranks,
    judge,
    sum_layers,
)
from daam.recipes.fitting import class_weights, untrained
from daam.recipes.jobs import Work
from daam.recipes.lock import exclusive
from daam.recipes.plots import accuracy_of, describe, plot_gaussians, plot_importance
from daam.recipes.runs import RunError, Settings, check_output, read_results, write_json
from daam.recipes.splits import splits
from daam.recipes.training import cached_job, run

EXAMPLE = """example:
  python -m daam.recipes.explain comparison/daam cache --output explained --ablate 3"""
MEASURES = {
    "layer_contribution": "contribution",
    "untrained_contribution": "contribution, untrained",
    "loss_increase": "loss when dropped",
    "weighted_sum": "weight in a weighted sum",
}


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


def load_fits(folder: Path, results: dict[str, Any], cache: Cache) -> list[Fitted]:
    """Return the decoders of all parts of a run, trained and untrained; raise a RunError where a file of them is not
    there, broken, or of another run, or where the parts are not those that the cache's examples are split into.
    """
    settings = Settings.of(results)
    job, fits = cached_job(cache, settings), []
    found = splits(job.labels, settings, job.equal, job.groups, job.parts)
    read_results(folder, found)
    for i, split in enumerate(found):
        work = Work(job, split, settings, "cpu", class_weights(job, split, settings))
        fits.append(Fitted(work, load_part(folder, i, results, cache), untrained(job, split, i, "cpu").eval()))
    return fits


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


def explain(folder: Path, results: dict[str, Any], cache: Cache, output: Path) -> dict[str, Any]:
    """Write importance.json, importance.png and gaussians.png of a run; return what the first says: see `draw`, and
    `drop_layers` for "dropped". Layers count from 1 as the encoder has them, features from 0.
    """
    fits = load_fits(folder, results, cache)
    report = draw(fits, results, output)
    report["dropped"] = drop_layers(fits, report["layers"])
    write_json(output / "importance.json", report)
    return report


def number_layers(results: dict[str, Any], places: Sequence[int]) -> list[int]:
    """Return what an encoder's layers at some places of a cache are called: its numbers, 0 of the embeddings."""
    about = results["about"].get("cache")
    numbers = about.get("layer_numbers") if isinstance(about, dict) else None
    return [numbers[place] if numbers else place + 1 for place in places]


def draw(fits: Sequence[Fitted], results: dict[str, Any], output: Path) -> dict[str, Any]:
    """Draw the maps and the Gaussians of trained decoders beside untrained ones into importance.png and gaussians.png;
    return what there is to say of the maps.
    """
    trained = average_weights((fit.trained, fit.work) for fit in fits)
    start = average_weights((fit.untrained, fit.work) for fit in fits).mean()
    importance, contribution = daam.importance_factor(trained.mean()), daam.layer_contribution(trained.mean())
    first = fits[0]
    layers = number_layers(results, first.work.settings.layers or range(len(contribution)))
    heads = first.trained.settings["num_heads"]
    learned = gaussians(first.trained)
    report = {
        "layers": layers,
        "heads": heads,
        "layer_contribution": contribution.tolist(),
        "importance_per_layer": importance.mean(1).tolist(),
        "most_important": find_most(importance, layers),
        **{name: {"min": t.min().item(), "max": t.max().item()} for name, t in learned.items()},
        **compare_maps(trained.mean(), start),
        "place_in_head": explain_ranks(contribution.tolist(), heads),
    }
    about = f"{results['method']}, mean over {trained.count} validation examples\n{describe(results)}"
    plot_importance(trained.mean().numpy(), start.numpy(), layers, heads, about, output / "importance.png")
    about = f"{results['method']}, part 0\n{describe(results)}"
    curves = [tuple(t.numpy() for t in found.values()) for found in (learned, gaussians(first.untrained))]
    plot_gaussians(*curves, about, output / "gaussians.png")
    return report


def find_most(importance: Tensor, layers: Sequence[int]) -> list[dict[str, Any]]:
    """Return the ten entries of an importance factor, (layers, features), that are highest. layers: their numbers."""
    top, features = importance.flatten().topk(min(10, importance.numel())), importance.shape[1]
    return [
        {"layer": layers[place // features], "feature": place % features, "importance": value}
        for value, place in zip(top.values.tolist(), top.indices.tolist(), strict=True)
    ]


def gaussians(decoder: daam.DATDecoder) -> dict[str, Tensor]:
    """Return mean_offset and scaled_variance of a decoder's heads, (heads, P) each; the latter is the mixture's c²."""
    if isinstance(decoder.daam, daam.DensityBlock):
        (layer,) = decoder.daam.layers
        return {"mean_offset": layer.mean_offsets.detach(), "scaled_variance": layer.c.detach().square()}
    return {"mean_offset": decoder.daam.mean_offset.detach(), "scaled_variance": decoder.daam.c.detach()}


def ablate(results: dict[str, Any], cache: Cache, contribution: Tensor, count: int, output: Path) -> dict[str, Any]:
    """Train a run's method on the count layers of "highest" contribution, and of "lowest"; return what both gave."""
    order, found = contribution.argsort(descending=True, stable=True), {}
    used = Settings.of(results).layers or range(len(contribution))
    for name, chosen in (("highest", order[:count]), ("lowest", order[-count:])):
        layers = tuple(sorted(used[i] for i in chosen.tolist()))
        settings = replace(Settings.of(results), layers=layers)
        done = run(cached_job(cache, settings), settings, output / name, about=results["about"])
        found[name] = {"layers": number_layers(results, layers), "accuracy": done["accuracy"]}
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
    report["weighted_sum"] = sum_layers(results, cache, args.output / "weighted_sum")
    report["rank_correlations"] = correlate_ranks(report)
    if args.ablate is not None:
        contribution = torch.tensor(report["layer_contribution"])
        report["ablation"] = ablate(results, cache, contribution, args.ablate, args.output / "ablation")
    report["judgement"] = judge(report)
    write_json(args.output / "importance.json", report)
    print("\n".join([*layer_lines(report), "", *correlation_lines(report), "", *sentences(report)]))


def layer_lines(report: dict[str, Any]) -> list[str]:
    """Return a table of the layers as lines: percent of all weights, trained and untrained, what it costs to drop each,
    and its weight in a weighted sum.
    """
    lines = [
        "          percent of weights        when dropped    weight in a",
        "layer    trained untrained      loss  accuracy   weighted sum",
    ]
    columns = (report["layer_contribution"], report["untrained"]["layer_contribution"], report["dropped"],
               report["weighted_sum"]["layer_weights"])  # fmt: skip
    for contribution, start, dropped, weight in zip(*columns, strict=True):
        # 0 has no sign
        loss, accuracy = (round(value, 4) + 0.0 for value in (dropped["loss_increase"], -dropped["accuracy_drop"]))
        lines.append(
            f"{dropped['layer']:5}{contribution:10.1f}{start:10.1f}{loss:+10.4f}{accuracy:+10.4f}{weight:14.3f}"
        )
    return lines


def correlation_lines(report: dict[str, Any]) -> list[str]:
    """Return a table of the rank correlations of a report as lines, with their intervals."""
    count = len(report["layers"])
    lines = [f"{f'rank correlation over {count} layers':50}{'rho':>6}   95 % interval"]
    for found in report["rank_correlations"]:
        first, second = (MEASURES[name] for name in found["between"])
        rho = "none" if found["rho"] is None else f"{found['rho']:.2f}"
        interval = "all the same" if found["rho"] is None else f"too few layers, expected {FEWEST}"
        if found["low"] is not None:
            interval = f"{found['low']:.2f} to {found['high']:.2f}"
        lines.append(f"{f'{first} and {second}':50}{rho:>6}   {interval}")
    return lines


def sentences(report: dict[str, Any]) -> list[str]:
    """Return what a report says in words as lines: what the place within the head explains, what an ablation gave, and
    the judgement at the end.
    """
    place, lines = report["place_in_head"], []
    if place is None:
        alone = report["heads"] == 1
        reason = "with one head, it is the layer itself" if alone else "all layers contribute the same"
        lines.append(f"How much of the ranking of layers the place within the head explains is unknown: {reason}.")
    else:
        explained, chance = (f"{100 * place[name]:.0f} %" for name in ("explained", "by_chance"))
        lines.append(
            f"The place within the head explains {explained} of the ranking of layers by contribution; chance would "
            f"explain {chance}."
        )
    for name, trained in report.get("ablation", {}).items():
        lines.append(f"{name} layers {trained['layers']}: test accuracy {accuracy_of(trained)}")
    return [*lines, report["judgement"]]


if __name__ == "__main__":
    main()
