"""Errors against float64 of kernels, of the eager backend, compiled too, and of published code, where inputs are hard.

    python -m bench.numerics --output bench/history/numerics.json --plot bench/history/numerics.png
    python -m bench.numerics --check bench/history/numerics.json      # what the file says of our claims

One factor at a time leaves a base point: the mean of x, its spread, the length of the axis, c (the gate's sigma, less
its floor), the number of Gaussians; then some pairs. Offsets grow with the spread. The formula in float64 takes the
same rounded inputs. Errors are those of y, the weights and all gradients: the largest difference relative to the
largest value expected, or to the dtype's smallest normal number if that is larger. Elements whose exact value is past
the dtype's largest are left out, and so are results that are 0 to it, or that float64 itself rounds away (gradients of
parameters where a chunk is constant), and all where every weight is below the smallest normal number of fp32. null is
the error of a result that is not finite where the exact one is.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import importlib.util
import multiprocessing
import os
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from unittest import mock

import torch
from torch import Tensor

from bench.core import about
from bench.device.cases import ALGORITHMS, Case, Inputs, helpers
from bench.device.machine import emulation
from bench.numerics_claims import LIKE_X, find_faults, plot, point_of, read, tables, write
from bench.numerics_points import Point, points

EXTRA_EPS = 1e-8  # that the published density attention adds to its variance beside eps


def find_resolved(point: Point, given: Inputs, exact: dict[str, Tensor]) -> set[str]:
    """Return the names of the results that can be compared: those which another order of the same sums in float64
    changes by less than the last bit of fp32, and none where no weight is a normal number of fp32.
    """

    def reverse(t: Tensor) -> Tensor:
        return t.flip(0, 1)

    if exact["weights"].max() < torch.finfo(torch.float32).tiny:
        return set()
    like_x = {"x": given.x, "grad_y": given.grad_y, "grad_weights": given.grad_weights}
    reversed_back = helpers.oracle(point.case, replace(given, **{name: reverse(t) for name, t in like_x.items()}))
    reversed_back = {name: reverse(t) if t.shape == given.x.shape else t for name, t in reversed_back.items()}
    return {name for name, t in exact.items() if helpers.error(reversed_back[name], t) < helpers.EPS[torch.float32]}


def compare(result: Tensor, exact: Tensor) -> tuple[float, float] | None:
    """Return the largest difference, and the largest value expected, of what a result's dtype can hold; None where
    that is not finite.
    """
    limits = torch.finfo(result.dtype)
    held = exact.abs() <= limits.max
    result, exact = result.detach()[held], exact[held]
    if not result.isfinite().all():
        return None
    largest = exact.abs().max().item() if exact.numel() else 0.0
    return (result.double() - exact).abs().max().item() if exact.numel() else 0.0, largest


def measure(provider: str, point: Point) -> dict[str, float | None] | str:
    """Return a provider's errors at a point by the names of results, or else why there are none. Of several draws the
    worst; as in the tests, gradients of parameters are relative to the largest of all.
    """
    pairs = defaultdict(list)
    for seed in range(point.draws):
        given = point.inputs(seed)
        if not given.x.isfinite().all():
            return f"x is past the largest {point.dtype}"
        results, exact = PROVIDERS[provider].run(point.case, given), helpers.oracle(point.case, given)
        resolved = find_resolved(point, given, exact)
        for name, t in exact.items():
            limits, pair = torch.finfo(results[name].dtype), compare(results[name], t)
            if pair is None:
                pairs[name].append(None)
            elif name in resolved and pair[1] >= limits.tiny * limits.eps:
                pairs[name].append((pair[0], max(pair[1], limits.tiny)))
    return {name: worst(name, found) for name, found in pairs.items()}


def worst(name: str, pairs: Sequence[tuple[float, float] | None]) -> float | None:
    """Return the largest error of draws, of (difference, scale) each, None where one is not finite."""
    if None in pairs:
        return None
    largest = max(scale for _, scale in pairs)
    errors = [difference / (scale if name in LIKE_X else largest) for difference, scale in pairs]
    return float(f"{max(errors):.3g}")


def measure_all(provider: str, chosen: Sequence[Point]) -> list[dict[str, float | None] | str]:
    """Return what `measure` does of many points, in a process that has the provider's environment."""
    torch.set_num_threads(1)
    if os.environ.get("TRITON_INTERPRET") == "1":
        from conftest import hasten_interpreter  # the tests', which `bench.device.cases` has put on the path

        hasten_interpreter()
    with PROVIDERS[provider].context():
        return [measure(provider, point) for point in chosen]


def _compiled(case: Case, given: Inputs) -> dict[str, Tensor]:
    """Return the results of the eager backend, compiled."""
    leaves = given.leaves()
    out = _compile(case)(*leaves)
    found = torch.autograd.grad(out, leaves, [given.grad_y, given.grad_weights])
    return dict(zip(("y", "weights", *case.gradients), (*out, *found), strict=True))


@functools.lru_cache(maxsize=1)
def _compile(case: Case) -> Callable:
    """Return a case's function, compiled for its shape alone."""
    torch._dynamo.reset()
    return torch.compile(lambda *leaves: helpers.attend(case, *leaves, backend="eager"), fullgraph=True, dynamic=False)


def published_density(x: Tensor, mean_offset: Tensor, c: Tensor, axis: int, eps: float) -> tuple[Tensor, Tensor]:
    """Return (y, weights) of one head of density attention as its authors compute it."""
    mean = x.mean(axis, keepdim=True)
    var = (x.square().mean(axis, keepdim=True) - mean.square()).abs() + EXTRA_EPS
    z = (x - (mean + mean_offset)) / torch.sqrt(var + eps)
    weights = torch.exp(-z.square() / (2 * c))
    return x * weights, weights


def _published(case: Case, given: Inputs) -> dict[str, Tensor]:
    """Return the results of published code, in x's dtype and parameters of fp32."""
    leaves = given.leaves()
    x, *params = leaves
    if case.algorithm == "density":
        y, weights = published_density(*leaves, case.axis, case.eps_or_default - EXTRA_EPS)
    else:
        from gaussian_adaptive_attention import MultiHeadGaussianAdaptiveAttention

        module = MultiHeadGaussianAdaptiveAttention(case.axis, 1, case.columns)
        state = {f"attention_heads.0.{name}": p[0] for name, p in zip(case.spec.params, params, strict=True)}
        y, weights = torch.func.functional_call(module, state, (x, True))
    found = torch.autograd.grad(y, leaves, given.grad_y.to(y.dtype))
    # what promotes to fp32 is rounded as ours is
    return dict(zip(("y", "weights", *case.gradients), (y.to(x), weights.to(x), *found), strict=True))


@dataclass(frozen=True)
class Provider:
    """Describe whose errors are measured: run(case, inputs) returns results by name; serves tells at which points."""

    run: Callable[[Case, Inputs], dict[str, Tensor]]
    serves: Callable[[Point], bool] = lambda point: True
    environment: dict[str, str] = field(default_factory=lambda: {"TRITON_INTERPRET": "0"})
    context: Callable[[], contextlib.AbstractContextManager] = contextlib.nullcontext


def _is_base(point: Point) -> bool:
    """Tell whether a point has the base's shape: another takes seconds to compile."""
    base = Point(point.algorithm, point.dtype)
    return point.case.shape == base.case.shape and (point.gaussians == 4 or ALGORITHMS[point.algorithm].features)


def _is_published(point: Point) -> bool:
    """Tell whether there is published code that can be installed, or is short enough to stand here."""
    package = importlib.util.find_spec("gaussian_adaptive_attention") is not None
    return point.algorithm == "density" or (point.algorithm == "mixture" and package)


PROVIDERS = {
    "eager": Provider(functools.partial(helpers.run, backend="eager")),
    "compile": Provider(_compiled, _is_base),
    "published": Provider(_published, _is_published),
    "interpreted": Provider(
        functools.partial(helpers.run, backend="triton"), environment={"TRITON_INTERPRET": "1"}
    ),
    "emulated": Provider(
        functools.partial(helpers.run, backend="triton"), _is_base, context=lambda: emulation(launching=True)
    ),
}  # fmt: skip


def study(providers: Sequence[str], chosen: Sequence[Point]) -> list[dict]:
    """Return a record a point: what it is, and the errors of every provider by the names of results."""
    records = {point: {**asdict(point), "errors": {}} for point in chosen}
    for name in providers:
        served, start = [point for point in chosen if PROVIDERS[name].serves(point)], time.perf_counter()
        spawn = multiprocessing.get_context("spawn")
        with mock.patch.dict(os.environ, PROVIDERS[name].environment), ProcessPoolExecutor(1, spawn) as pool:
            results = pool.submit(measure_all, name, served).result()
        print(f"{name}: {len(served)} points, {time.perf_counter() - start:.0f} s", file=sys.stderr, flush=True)
        for point, result in zip(served, results, strict=True):
            if isinstance(result, str):
                records[point]["skipped"] = result
            else:
                records[point]["errors"][name] = result
    return list(records.values())


def draw_again(providers: Sequence[str], records: Sequence[dict]) -> list[dict]:
    """Return records with the worst of several draws where one draw has a fault: which error it has is chance."""
    doubtful = [point_of(record) for record in records if find_faults([record], known={})]
    repeated = study(providers, [replace(point, draws=helpers.SEEDS) for point in doubtful])
    found = dict(zip(doubtful, repeated, strict=True))
    return [found.get(point_of(record), record) for record in records]


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, or read, and tell what holds; return 1 where a claim does not."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.numerics", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", choices=PROVIDERS, default=list(PROVIDERS), help="providers")
    parser.add_argument("--output", type=Path, help="file of what is measured: a line a point")
    parser.add_argument("--check", type=Path, help="file to read instead of measuring")
    parser.add_argument("--plot", type=Path, help="picture of errors in fp32 against every factor")
    options = parser.parse_args(arguments)
    records = read(options.check) if options.check else draw_again(options.only, study(options.only, points()))
    if options.output:
        write(options.output, records, about()["versions"])
    if options.plot:
        plot(records).savefig(options.plot, dpi=80)
    faults = find_faults(records)
    print(tables(records), *faults, sep="\n")
    n_known = len(find_faults(records, known={})) - len(faults)
    print(f"{len(records)} points: {len(faults)} claims do not hold, and {n_known} that are known not to")
    return int(bool(faults))


if __name__ == "__main__":
    sys.exit(main())
