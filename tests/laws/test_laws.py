"""Laws that hold of any call: what may be permuted, shifted and scaled, and which bits stay the same."""

import math

import torch
from drawn import (
    ALONG_CHUNKS,
    LENGTHS,
    LIKE_X,
    SEEDS,
    agree,
    cases,
    change,
    in_place,
    moves_weights,
    on_backends,
    parameters_axis,
    run_in,
    same_bits,
)  # fmt: skip
from helpers import Inputs, inputs, within
from hypothesis import assume
from hypothesis import strategies as st

MIXTURES = "mixture", "stable"


# --- Orders -----------------------------------------------------------------------------------------
@on_backends(40, 3)
def test_permuting_axes_commutes(examine, backend, device):
    """Check that a call on a view with axes in another order gives the same numbers."""

    def prove(case, seed, name, random):
        given, axis, rank = inputs(case, seed=seed, device=device), case.positive_axis, len(case.shape)
        order = list(range(rank))
        fixed = parameters_axis(case)  # stays last
        if case.mask:  # has no dimensions behind the axis
            outer, inner = order[:axis], [d for d in order[axis + 1 :] if d != fixed]
            random.shuffle(outer)
            random.shuffle(inner)
            order = [*outer, axis, *inner] + [fixed] * (fixed not in (None, axis))
        else:
            free = [d for d in order if d != fixed]
            random.shuffle(free)
            order = free + [d for d in order if d == fixed]
        moved = change(given, lambda t: t.permute(order))
        if case.mask:
            moved.mask = given.mask.permute([*order[:axis], axis])
        view = case.but(shape=tuple(case.shape[d] for d in order), axis=order.index(axis))
        found, expected = (run_in(name, c, g, backend) for c, g in ((view, moved), (case, given)))
        inverse = [order.index(d) for d in range(rank)]
        agree(case, {k: t.permute(inverse) if k in LIKE_X else t for k, t in found.items()}, expected)

    examine(prove, cases(backend), SEEDS, st.sampled_from(ALONG_CHUNKS), st.randoms(use_true_random=False))


@on_backends(40, 3)
def test_permuting_positions_commutes(examine, backend, device):
    """Check that positions of a chunk, with their parameters if they have any, and Gaussians have no order."""

    def prove(case, seed, name, random):
        given, axis = inputs(case, seed=seed, device=device), case.positive_axis
        size, index = case.shape[axis] // case.heads, []
        for head in range(case.heads):
            end = case.shape[axis] if head == case.heads - 1 else (head + 1) * size
            chunk = list(range(head * size, end))
            random.shuffle(chunk)
            index += chunk
        other = change(given, lambda t: t.index_select(axis, torch.tensor(index, device=t.device)))
        if case.mask:
            other.mask = given.mask[..., index]
        columns = torch.arange(case.columns).expand(case.heads, -1)
        if parameters_axis(case) == axis:
            columns = torch.tensor(index).reshape(case.heads, -1) % size
        elif not case.spec.features:
            columns = columns.flip(1)
        columns = columns.to(device)
        other.params = tuple(p.gather(1, columns) for p in given.params)
        found, expected = (run_in(name, case, g, backend) for g in (other, given))
        moved = {k: t[(slice(None),) * axis + (index,)] for k, t in expected.items() if k in LIKE_X}
        moved |= {k: t.gather(1, columns) for k, t in expected.items() if k not in LIKE_X}
        agree(case, found, moved)

    examine(prove, cases(backend), SEEDS, st.sampled_from(ALONG_CHUNKS), st.randoms(use_true_random=False))


@on_backends(20, 2)
def test_features_are_alone_with_their_parameters(examine, backend, device):
    """Check that features in another order, with their parameters, have the same numbers: on kernels the same bits."""

    def prove(case, seed, name, random):
        given, n = inputs(case, seed=seed, device=device), case.shape[-1]
        index = random.sample(range(n), n)
        other = change(given, lambda t: t[..., index])
        if parameters_axis(case) is not None:
            other.params = tuple(p[:, index] for p in given.params)
        found, expected = (run_in(name, case, g, backend) for g in (other, given))
        moved = {
            k: t[..., index] if k in LIKE_X or parameters_axis(case) is not None else t for k, t in expected.items()
        }
        agree(case, found, moved)
        if backend == "triton":
            same_bits(found, moved)

    examine(
        prove,
        behind(backend, layout="contiguous"),
        SEEDS,
        st.sampled_from(ALONG_CHUNKS),
        st.randoms(use_true_random=False),
    )


def behind(backend, **options):
    """Draw cases with features behind the normalised axis."""
    return cases(backend, **options).filter(
        lambda case: case.shape[-1] > 1 and case.positive_axis < len(case.shape) - 1
    )


# --- Shifts and scales --------------------------------------------------------------------------------
@on_backends(40, 3)
def test_shifting_x_leaves_weights_unchanged(examine, backend, device):
    """Check weights, and all gradients of them, of x and x + a, which is exact: x has few bits. Padding is shifted too,
    and no padding of the mixture, whose statistics count it as zeros.
    """

    def prove(case, seed, name, shift):
        given = inputs(case, seed=seed, device=device)
        given.grad_y, given.x = None, in_place(given.x, lambda t: (t * 64).round() / 64)
        shifted = change(given, lambda t: t)
        shifted.x = in_place(given.x, lambda t: t + shift)
        other = case.but(padding=None if case.padding is None else case.padding + shift)
        found, expected = run_in(name, other, shifted, backend), run_in(name, case, given, backend)
        agree(case, found, expected, [k for k in expected if k != "y"])

    shifts = cases(backend, weights=True).filter(lambda case: case.padding is None or case.algorithm == "stable")
    drawn = shifts.filter(moves_weights)
    examine(prove, drawn, SEEDS, st.sampled_from(ALONG_CHUNKS), st.sampled_from((1.0, -30.5, 4096.0)))


@on_backends(60, 4)
def test_scaling_x_and_offsets_leaves_weights_unchanged(examine, backend, device):
    """Check that x and offsets times a power of two, or its negative, leave the bits of weights, and those of y scale.
    So it is of density attention with eps times its square; of both mixtures without eps, since theirs is also added
    to what does not scale; and of the gate, which has floors, with a factor of -1 alone.
    """

    def prove(case, seed, name, factor):
        factor = math.copysign(1.0, factor) if case.algorithm == "gate" else factor
        case = case.but(eps=0.0 if case.algorithm in MIXTURES else case.eps)
        given = inputs(case, torch.float32, seed, device)
        x, grad_weights = (in_place(t, lambda t: t * factor) for t in (given.x, given.grad_weights))
        params = given.params[0] * factor, given.params[1]
        scaled = Inputs(x, params, given.mask, given.grad_y, grad_weights)
        eps = case.eps_or_default
        found = run_in(name, case.but(eps=None if eps is None else eps * factor**2), scaled, backend)
        expected = run_in(name, case, given, backend)
        p, q = case.gradients[1:]
        expected |= {"y": expected["y"] * factor, q: expected[q] * factor}
        # a subnormal weight is off by 1e-45, and times 1e8 in a gradient: this shows in the bits of small results
        found, expected = ({k: t.masked_fill(t.abs() < 1e-25, 0) for k, t in one.items()} for one in (found, expected))
        same_bits(found, expected, (*LIKE_X, p, q))

    # without eps a chunk has to hold two numbers that differ
    drawn = cases(backend, weights=True, padding=None).filter(
        lambda case: case.algorithm not in MIXTURES or not (case.mask or case.layout == "expanded")
    )
    factors = st.sampled_from((0.125, -0.5, -1.0, 4.0, -32.0))
    examine(prove, drawn, SEEDS, st.sampled_from((*ALONG_CHUNKS, "whole")), factors)


@on_backends(20, 2)
def test_scaling_the_gate_is_exact_but_for_its_floors(examine, backend, device):
    """Check that weights of x and offsets times s differ by what 1e-8 adds to a width: z gets smaller by a share of
    floor/width, and exp(-z²/2)/(sqrt(2π)·sigma) changes by less than 0.3/sigma times that share. The variance is not
    below its own floor.
    """

    def prove(case, seed, name, factor):
        given = inputs(case, seed=seed, device=device)
        offsets, log_sigma = given.params
        scaled = Inputs(given.x * factor, (offsets * factor, log_sigma), None, given.grad_y, given.grad_weights)
        found, expected = (run_in(name, case, g, backend)["weights"] for g in (scaled, given))
        sigma = torch.nn.functional.softplus(log_sigma).min().item()
        size = case.shape[case.axis] // case.heads
        chunks = [t for t in given.x.movedim(case.axis, 0).split(size) if len(t) == size]
        std = min(t.std(0, correction=0).min().item() for t in chunks)
        assume(min(std, std * factor) >= 1e-3)
        share = 1e-8 / (std * sigma) * max(1.0, 1 / factor)
        within((found - expected).abs().max().item(), 0.3 / sigma * share + 1e-13, "weights")

    drawn = cases(backend, algorithms=["gate"], weights=True, mask=False, layout="offset", lengths=LENGTHS[:-1])
    examine(prove, drawn, SEEDS, st.sampled_from(ALONG_CHUNKS), st.sampled_from((0.01, 0.37, 7.0, 1e4)))
