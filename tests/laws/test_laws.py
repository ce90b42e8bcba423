"""Laws that hold of any call: what may be permuted, shifted, scaled, cut or fused, and which bits stay the same."""

import math

import torch
from drawn import LENGTHS, REGIMES, SEEDS, cases, moves_weights, on_backends, regime
from helpers import EPS, VIEWS, Case, Inputs, inputs, run, within
from hypothesis import strategies as st

LIKE_X = "y", "weights", "dx"
DENSE = ("contiguous", "offset", "sliced")  # whose first dimension is the outermost in memory
ALONG_CHUNKS = ("as it is", "several tiles", "strips")
MIXTURES = "mixture", "stable"


def run_in(name: str, case: Case, given: Inputs, backend: str) -> dict[str, torch.Tensor]:
    """Return the results of a case in a regime of the kernels."""
    with regime(name if backend == "triton" else "as it is"):
        return run(case, given, backend)


def find_limit(case: Case) -> float:
    """Return what results in float64 that sum in another order may differ by: see `test_properties.agree`."""
    return 1e-10 * case.columns if case.clamps else 1e-11


def agree(case: Case, found: dict, expected: dict, names=None) -> None:
    """Check that results differ by rounding alone: relative to the largest, gradients of parameters also to dx."""
    scale = expected["dx"].abs().max().item() if "dx" in expected else 0.0
    for name in names or expected:
        result, wanted = found[name].double(), expected[name].double()
        assert result.shape == wanted.shape, name
        if wanted.numel():
            largest = max(wanted.abs().max().item(), scale if name.startswith("d_") else 0.0) or 1.0
            within((result - wanted).abs().max().item() / largest, find_limit(case), name)


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
    """Draw cases with an axis behind the normalised one."""
    return cases(backend, **options).filter(lambda case: case.positive_axis < len(case.shape) - 1)


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
        same_bits(found, expected | {"y": expected["y"] * factor, q: expected[q] * factor}, (*LIKE_X, p, q))

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
        if min(std, std * factor) < 1e-3:
            return
        share = 1e-8 / (std * sigma) * max(1.0, 1 / factor)
        within((found - expected).abs().max().item(), 0.3 / sigma * share + 1e-13, "weights")

    drawn = cases(backend, algorithms=["gate"], weights=True, mask=False, layout="offset", lengths=LENGTHS[:-1])
    examine(prove, drawn, SEEDS, st.sampled_from(ALONG_CHUNKS), st.sampled_from((0.01, 0.37, 7.0, 1e4)))


# --- Masks, rows and heads ----------------------------------------------------------------------------
@on_backends(30, 2)
def test_masked_equals_unpadded(examine, backend, device):
    """Check that one head's results with NaN behind the axis, under a mask, are those without; parameters of positions
    are padded too, and have gradients of 0 there.
    """

    def prove(case, seed, name, n):
        given, axis = inputs(case, seed=seed, device=device), case.positive_axis
        length = case.shape[axis]

        def pad(t, dim=axis):
            return torch.cat([t, t.new_full((*t.shape[:dim], n, *t.shape[dim + 1 :]), math.nan)], dim)

        padded = change(given, pad)
        if parameters_axis(case) == axis:
            padded.params = tuple(torch.cat([p, p[:, :1].expand(-1, n)], 1) for p in given.params)
        shape = padded.x.shape
        padded.mask = (torch.arange(length + n, device=device) < length).expand(shape[: axis + 1])
        found = run_in(name, case.but(shape=tuple(shape), mask=True), padded, backend)
        expected = run_in(name, case, given, backend)
        behind = {k: t.narrow(axis if k in LIKE_X else 1, length, n) for k, t in found.items() if k in LIKE_X}
        if parameters_axis(case) == axis:
            behind |= {k: found[k][:, length:] for k in case.gradients[1:]}
            found |= {k: found[k][:, :length] for k in case.gradients[1:]}
        found |= {k: found[k].narrow(axis, 0, length) for k in expected if k in LIKE_X}
        agree(case, found, expected)
        assert all((t == 0).all() for t in behind.values())

    drawn = cases(backend, heads=1, mask=False, padding=None, residual=False)
    examine(prove, drawn, SEEDS, st.sampled_from(ALONG_CHUNKS), st.integers(1, 9))


@on_backends(30, 2)
def test_chunks_under_a_mask_equal_their_valid_positions(examine, backend, device):
    """Check of several heads that a chunk has the numbers that its valid positions have in a call of their own."""

    def prove(case, seed, name, places):
        given, axis = inputs(case, seed=seed, device=device), case.positive_axis
        whole = run_in(name, case, given, backend)
        size = case.shape[axis] // case.heads
        for share in places:  # of all chunks, a number below 1
            place = [int(share * n) for n in case.shape]
            head = min(place[axis] // size, case.heads - 1)
            end = case.shape[axis] if head == case.heads - 1 else (head + 1) * size
            chunk = torch.zeros(case.shape[axis], dtype=torch.bool)
            chunk[head * size : end] = True
            valid = torch.nonzero(chunk & given.mask[tuple(place[:axis])].cpu())[:, 0].to(device)
            if len(valid) <= case.spec.record.unbiased:
                continue

            def cut(t, valid=valid, place=place):
                for d, at in enumerate(place):
                    t = t.index_select(d, valid) if d == axis else t.narrow(d, at, 1)
                return t

            columns = slice(None)
            if parameters_axis(case) is not None:
                columns = valid - head * size if parameters_axis(case) == axis else slice(place[-1], place[-1] + 1)
            alone = change(given, cut)
            alone.params, alone.mask = tuple(p[head : head + 1, columns] for p in given.params), None
            params = "one" if alone.params[0].shape[1] == 1 and case.spec.features else case.params
            single = case.but(shape=tuple(alone.x.shape), heads=1, mask=False, params=params)
            found = {k: cut(whole[k]) for k in LIKE_X if k in whole}
            agree(case, found, run_in(name, single, alone, backend), found)

    places = st.lists(st.sampled_from((0.0, 0.3, 0.5, 0.7, 0.99)), min_size=1, max_size=2)
    examine(prove, cases(backend, mask=True, padding=None), SEEDS, st.sampled_from(ALONG_CHUNKS), places)


def with_rows(backend, **options):
    """Draw cases of several rows, none of which is the axis, with the batch outermost in memory."""
    layouts = {layout: cases(backend, layout=layout, **options) for layout in DENSE}
    return st.one_of(*layouts.values()).filter(lambda case: case.positive_axis > 0 and case.shape[0] > 1)


@on_backends(40, 4)
def test_a_batch_equals_its_rows(examine, backend, device):
    """Check that rows alone have the numbers they have in a batch: on kernels the same bits. The eager backend's sums
    and functions of vectors round the ends of a tensor otherwise than its middle, and a tiny x is centred otherwise.
    """

    def prove(case, dtype, seed, name, share):
        given, i = inputs(case, dtype, seed, device), int(share * case.shape[0])
        row = change(given, lambda t: t[i : i + 1])
        row.mask = None if given.mask is None else given.mask[i : i + 1]
        whole = run_in(name, case, given, backend)
        alone = run_in(name, case.but(shape=(1, *case.shape[1:])), row, backend)
        whole = {k: t[i : i + 1] for k, t in whole.items() if k in LIKE_X}
        if backend == "triton":
            same_bits(alone, whole, whole)
        elif dtype == torch.float64:
            agree(case, alone, whole, whole)

    dtypes = {"triton": (torch.float32, torch.bfloat16), "eager": (torch.float64,)}[backend]
    shares = st.sampled_from((0.0, 0.5, 0.99))
    examine(
        prove, with_rows(backend), st.sampled_from(dtypes), SEEDS, st.sampled_from((*ALONG_CHUNKS, "whole")), shares
    )


@on_backends(40, 3)
def test_heads_are_independent(examine, backend, device):
    """Check that other numbers of one head, in x, the gradients and its parameters, change no bit of another head."""

    def prove(case, seed, name, share):
        given = change(inputs(case, torch.float32, seed, device), torch.clone)
        axis = case.positive_axis
        head, size = int(share * case.heads), case.shape[axis] // case.heads
        start = head * size
        n = case.shape[axis] - start if head == case.heads - 1 else size

        def disturb(t):
            t = t.clone()
            t.narrow(axis, start, n).mul_(-3).add_(40)
            return t

        other = change(given, disturb)
        other.params = tuple(
            p.index_add(0, torch.tensor([head], device=device), p[:1].abs() + 0.5) for p in given.params
        )
        results = [run_in(name, case, g, backend) for g in (given, other)]
        for k in results[0]:
            found, expected = (
                torch.cat([t.narrow(d, 0, a), t.narrow(d, a + m, t.shape[d] - a - m)], d)
                for t in (r[k] for r in results)
                for d, a, m in [(axis, start, n) if k in LIKE_X else (0, head, 1)]
            )
            assert torch.equal(found, expected), k

    drawn = st.one_of(*(cases(backend, heads=heads) for heads in (2, 3, 8))).filter(
        lambda case: case.layout in VIEWS[:5]
    )
    shares = st.sampled_from((0.0, 0.5, 0.99))
    examine(prove, drawn, SEEDS, st.sampled_from((*ALONG_CHUNKS, "whole")), shares)


@on_backends(40, 3)
def test_a_residual_adds_x_within_one_rounding(examine, backend, device):
    """Check that y is rounded once: within half a unit in the last place of y + x, and as much of the y without, which
    is rounded too. Weights and gradients of parameters keep their bits, and dx differs by grad_y.
    """

    def prove(case, dtype, seed, name):
        given = inputs(case, dtype, seed, device)
        plain, added = (run_in(name, case.but(residual=flag), given, backend) for flag in (False, True))
        # the interpreter truncates to bf16: a whole last place
        eps = EPS[dtype] * (2 if dtype == torch.bfloat16 else 1)
        for k, t in (("y", given.x), ("dx", given.grad_y)):
            without, found = plain[k].double(), added[k].double()
            bound = eps * (found.abs() + without.abs()) * 1.01 + EPS[torch.float32] * (k == "dx") * t.abs().max()
            assert ((found - (without + t.double())).abs() <= bound).all(), k
        same_bits(added, plain, [k for k in plain if k not in ("y", "dx")])

    examine(
        prove,
        cases(backend),
        st.sampled_from((torch.float64, torch.float32, torch.bfloat16)),
        SEEDS,
        st.sampled_from(tuple(REGIMES)),
    )
