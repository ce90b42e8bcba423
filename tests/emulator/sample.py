"""A few small cases that run every kernel of every regime, and the limits that their results keep to."""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Iterator
from unittest import mock

import torch
from helpers import ALGORITHMS, SEEDS, Case, bound, error, inputs, oracle, run

from bench.aot import recording
from bench.host import taking_any_tensor
from daam.kernels import tiles
from daam.kernels.host import plan

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
ORDERS, STREAMED = ("columns", "rows"), (False, True)
# (case, dtype) by (order, streamed): with a mask, a residual and several heads, and without; of rows on chip the
# second takes several warps. Nothing divides a tile.
CASES = {
    ("columns", False): ((Case((2, 26, 21), 1, 2, mask=True, residual=True), BF16), (Case((5, 13, 41), 1), FP32)),
    ("columns", True): ((Case((2, 600, 5), 1, 2, mask=True, residual=True), BF16), (Case((1, 290, 21), 1), FP32)),
    ("rows", False): ((Case((5, 150), 1, 2, mask=True, residual=True), BF16), (Case((6, 1500), 1), FP32)),
    ("rows", True): ((Case((2, 4200), 1, mask=True, residual=True), BF16), (Case((1, 16_500), 1, weights=False), FP32)),
}  # fmt: skip
IN_FP16 = (Case((7, 50), 1, 2), FP16), (Case((4, 13, 9), 1), FP16)
SAMPLE = [
    (case.but(algorithm=name, params="one" if dtype == BF16 and spec.features else case.params), dtype)
    for name, spec in ALGORITHMS.items()
    for case, dtype in itertools.chain(*CASES.values(), IN_FP16)
]
LIMIT = 2.0  # of what the rule allows, since it does not count what approximate instructions may be wrong by


@contextlib.contextmanager
def crowded() -> Iterator[None]:
    """Make small tensors do what large ones do: programs take several tiles, streamed chunks have strips of one tile,
    and three strips are merged at a time.
    """
    with mock.patch.multiple(tiles, MAX_PROGRAMS=2, FILL=1, STRIP_CONTIGUOUS=1, STRIP_STRIDED=1, STRIPS=4):
        plan.cache_clear()
        yield
    plan.cache_clear()


def regimes(case: Case, dtype: torch.dtype) -> set[tuple[str, str, bool, str]]:
    """Return the kernels that a case runs: (algorithm, order, whether its chunks are streamed, kernel) each."""
    order = "columns" if len(case.shape) == 3 else "rows"
    with crowded(), taking_any_tensor(), recording() as launches:
        run(case, inputs(case, dtype), "triton")
    names = {call.name for call in launches}
    return {(case.algorithm, order, "strip_stats" in names, name) for name in names}


def worst(case: Case, dtype: torch.dtype) -> float:
    """Return the largest error of a case against float64, of what the rule allows a single draw."""
    given = inputs(case, dtype)
    expected = oracle(case, given)
    with crowded():
        result, eager = run(case, given, "triton"), run(case, given, "eager")
    assert result.keys() == expected.keys()
    found = []
    for name, exact in expected.items():
        allowed = bound(case, name, dtype, error(eager[name], exact), draws=1)
        found.append(error(result[name], exact) / allowed)
    return max(math.inf if math.isnan(ratio) else ratio for ratio in found)


def narrow_errors(shape: tuple[int, ...]) -> list[float]:
    """Return errors in fp32 of the mixture's y, weights and dx where its Gaussians are so narrow that only the position
    next to their centre has a weight. A product that is fused in one use and not in another makes them anything.
    """
    case = Case(shape, 1, algorithm="mixture", eps=0.0)
    given = inputs(case, FP32)
    given.params = torch.full_like(given.params[0], 0.1), torch.full_like(given.params[1], 1e-8)
    expected, result = oracle(case, given), run(case, given, "triton")
    return [error(result[name], expected[name]) for name in ("y", "weights", "dx")]


def constant_error(shape: tuple[int, ...], params: str) -> float:
    """Return the largest error in fp32 of density attention's dx, of what the rule allows, where every chunk is
    constant and all its positions have one gradient: what reaches x by mean and variance is the difference of equal
    numbers, each a hundred times what is left.
    """
    case, found = Case(shape, 1, params=params), []
    for seed in range(SEEDS):
        given = inputs(case, FP32, seed)
        given.params = 4e-3 * given.params[0], given.params[1]
        for name in ("x", "grad_y", "grad_weights"):
            setattr(given, name, getattr(given, name)[:, :1].expand(shape).contiguous())
        wanted = oracle(case, given)["dx"]
        found.append([error(run(case, given, backend)["dx"], wanted) for backend in ("triton", "eager")])
    kernels, eager = torch.tensor(found, dtype=torch.float64).amax(0).tolist()  # NaN wins
    return kernels / bound(case, "dx", FP32, eager)
