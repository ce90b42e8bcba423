"""Calls as hypothesis draws them, of any algorithm, shape, layout and flags; small ones that run every regime."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from unittest import mock

import pytest
import torch
from helpers import ALGORITHMS, VIEWS, Case, Inputs, find_scales, run, within

pytest.importorskip("hypothesis")  # a GPU's machine may have none

from hypothesis import given, settings
from hypothesis import strategies as st

# The first of each is what the first example has, often the only one of a few: one that shows something.
LENGTHS = (5, 2, 3, 8, 13, 16, 24, 33, 1)  # positions of a chunk: few, odd, powers of two, and past one
LONGER = (*LENGTHS, 70, 131, 300)  # and such as take several blocks, or are streamed
SIZES = (3, 1, 2, 5, 9, 17, 33)  # of any other axis
# (elements, chunks) that a case has at most: the interpreter takes milliseconds for a program, of a chunk or several
LIMITS = {"eager": (2000, 2000), "triton": (200, 9)}
SEEDS = st.integers(0, 31)  # of the numbers of a case
GAUSSIANS = st.sampled_from((3, 1, 2, 4, 5))


def sized(quick: int, long: int):
    """Run a test with `examine`, which proves a property of so many examples: few that are always the same, or,
    marked long, many others.
    """

    def make(profile: str, examples: int) -> Callable:
        def examine(prove: Callable, *strategies: st.SearchStrategy, **named: st.SearchStrategy) -> None:
            settings(settings.get_profile(profile), max_examples=examples)(given(*strategies, **named)(prove))()

        return pytest.param(examine, id=profile, marks=[pytest.mark.long] if profile == "long" else [])

    return pytest.mark.parametrize("examine", [make("quick", quick), make("long", long)])


def on_backends(eager: int, kernels: int):
    """Run a test with (examine, backend): so many examples of each backend, and twelve times as many, long."""
    return pytest.mark.parametrize(
        ("examine", "backend"),
        [
            pytest.param(*each.values, backend, id=f"{backend}-{each.id}", marks=(*each.marks, *marks))
            for backend, examples, marks in (("eager", eager, ()), ("triton", kernels, (pytest.mark.kernel,)))
            for each in sized(examples, 12 * examples).args[1]
        ],
    )


@st.composite
def shapes(draw: Callable, heads: int, spec, lengths: Sequence[int], backend: str) -> tuple[tuple[int, ...], int]:
    """Draw (shape, axis) for heads of an algorithm, within the LIMITS of a backend or little above."""
    most, chunks = LIMITS[backend]
    rank = draw(st.integers(2, 5))
    axis = draw(st.integers(-rank, rank - 1))
    chunk = draw(st.sampled_from([n for n in lengths if n * heads <= most and n > spec.record.unbiased]))
    shape = [1] * rank
    # heads of density attention divide the axis, of others the last takes the remainder
    shape[axis] = heads * chunk + (0 if spec.features else draw(st.integers(0, heads - 1)))
    for d in reversed(range(rank)):
        if d != axis % rank:
            room = min(most // math.prod(shape), chunks // (heads * math.prod(shape) // shape[axis]))
            shape[d] = draw(st.sampled_from([n for n in SIZES if n <= max(1, room)]))
    return tuple(shape), axis


@st.composite
def cases(
    draw: Callable, backend: str, algorithms: Sequence[str] = tuple(ALGORITHMS), lengths: Sequence[int] = LENGTHS,
    **fixed: object,
) -> Case:  # fmt: skip
    """Draw a case of one of the algorithms, as large as a backend can have them; fixed: what is not drawn."""
    name = draw(st.sampled_from(tuple(algorithms)))
    spec, heads = ALGORITHMS[name], fixed.get("heads") or draw(st.sampled_from((2, 1, 3, 8)))
    shape, axis = draw(shapes(heads, spec, lengths, backend))

    def choose(field: str, *values: object) -> object:
        return fixed[field] if field in fixed else draw(st.sampled_from(values))

    mask = choose("mask", True, False)
    padding = None
    if "padding" in spec.record.settings and not mask:
        padding = choose("padding", None, 0.0, -1.5)
    layout = choose("layout", *VIEWS)
    # without eps a chunk has to hold two numbers that differ
    eps = (0.0,) if spec.record.unbiased and not mask and padding is None and layout != "expanded" else ()
    return Case(
        shape,
        axis,
        heads,
        params=choose("params", "features", "one") if spec.features else draw(GAUSSIANS),
        layout=layout,
        grads=choose("grads", *VIEWS),
        weights_grads=choose("weights_grads", *VIEWS),
        mask=mask,
        residual=choose("residual", False, True),
        weights=choose("weights", True, False),
        offset=choose("offset", 0.5, 0.0, 30.0),
        eps=None if spec.eps is None else choose("eps", None, 0.15, 1.0, *eps),
        padding=padding,
        clamps=name == "stable" and choose("clamps", False, True),
        algorithm=name,
    )


def moves_weights(case: Case) -> bool:
    """Tell whether a gradient of weights alone says anything of dx. In the mixtures, whose weights add up to 1, dx is
    what rounding leaves of 0 where that is the same in all of a chunk, and as good as 0 of two positions, whatever they
    are: weights then only know which is larger.
    """
    expanded = (case.weights_grads or case.grads) == "expanded"
    return case.weights and not expanded and case.shape[case.axis] // case.heads > 2


@dataclass(frozen=True)
class Call:
    """Hold a case, the seed of its numbers, which of x and both parameters need a gradient, which outputs have one
    ("both", "y" or "weights"), and the regime of kernels (REGIMES).
    """

    case: Case
    seed: int
    needs: tuple[bool, bool, bool]
    upstream: str
    regime: str


@st.composite
def calls(draw: Callable, backend: str, regimes: Sequence[str] = ("as it is",), **options: object) -> Call:
    """Draw a call; options: those of `cases`."""
    case = draw(cases(backend, **options))
    needs = draw(st.tuples(st.booleans(), st.booleans(), st.booleans()).filter(any))
    upstream = draw(st.sampled_from(("y", "both", "weights")[: 1 + case.weights + moves_weights(case)]))
    return Call(case, draw(SEEDS), needs, upstream, draw(st.sampled_from(tuple(regimes))))


def streaming(*_args: object, **_options: object) -> bool:
    """Take any chunk for too long to stay on chip, in place of `tiles.streams`."""
    return True


# What small tensors have to be taken for so that kernels do with them what they do with large ones.
STREAMED = {"streams": streaming}
REGIMES = {
    "as it is": {},
    "several tiles": {"MAX_PROGRAMS": 3, "FILL": 1},  # of one program
    "streamed": STREAMED,
    "strips": {**STREAMED, "STRIP_CONTIGUOUS": 1, "STRIP_STRIDED": 1, "STRIPS": 2},  # of one short tile each
    "whole": {**STREAMED, "STRIP_CONTIGUOUS": 1, "STRIPS": 2, "AT_WORK": 1},  # with all steps in one program
}


@contextlib.contextmanager
def regime(name: str) -> Iterator[None]:
    """Make kernels take small tensors as one of REGIMES says."""
    from daam.kernels import tiles  # needs Triton
    from daam.kernels.host import plan

    changes = dict(REGIMES[name])
    if "STRIPS" in changes:
        changes["_streamed"] = lambda *args: tiles.Tile(8, 1 if args[-1] else 16, 1, 2)
    with mock.patch.multiple(tiles, **changes) if changes else contextlib.nullcontext():
        plan.cache_clear()
        try:
            yield
        finally:
            plan.cache_clear()


# --- Results compared ---------------------------------------------------------------------------------
LIKE_X = "y", "weights", "dx"
ALONG_CHUNKS = ("as it is", "several tiles", "strips")


def run_in(name: str, case: Case, given: Inputs, backend: str) -> dict[str, torch.Tensor]:
    """Return the results of a case in a regime of the kernels."""
    with regime(name if backend == "triton" else "as it is"):
        return run(case, given, backend)


def find_limit(case: Case) -> float:
    """Return what results in float64 that sum in another order may differ by."""
    limit = 1e-11
    if case.layout == "expanded" and case.positive_axis % 2 == 0:
        # chunks of equal numbers: what rounds their mean is divided by the least standard deviation, 1e-3 of the gate,
        # sqrt(eps) of others
        limit = 1e-9
    # a c of 0.01, and u of 10, make log w 5e5 for a Gaussian: its last bit is 6e-11
    return max(limit, 1e-10 * case.columns) if case.clamps else limit


def agree(case: Case, found: dict, expected: dict, names=None) -> None:
    """Check that results differ by rounding alone."""
    scales = find_scales(expected)
    for name in names or expected:
        result, wanted = found[name].double(), expected[name].double()
        assert result.shape == wanted.shape, name
        if wanted.numel():
            within((result - wanted).abs().max().item() / scales[name], find_limit(case), name)


def same_bits(found: dict, expected: dict, names=LIKE_X) -> None:
    for name in expected.keys() & set(names):
        assert torch.equal(found[name], expected[name]), name


def change(given: Inputs, function) -> Inputs:
    """Return inputs with a function of x, and of both gradients, in their place."""
    x, grad_y, grad_weights = (None if t is None else function(t) for t in (given.x, given.grad_y, given.grad_weights))
    return Inputs(x, given.params, given.mask, grad_y, grad_weights)


def in_place(t: torch.Tensor, function) -> torch.Tensor:
    """Return a function of every element of t, in memory that is laid out as t's."""
    memory = function(t.as_strided((t.untyped_storage().nbytes() // t.itemsize,), (1,), 0))
    return memory.as_strided(t.shape, t.stride(), t.storage_offset())


def parameters_axis(case: Case) -> int | None:
    """Return the axis that parameters follow, None for none."""
    return case.feature_axis if case.spec.features else None
