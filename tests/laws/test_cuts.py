"""Laws that hold of any call cut into pieces: what a mask leaves, rows of a batch, heads, and a residual."""

import math

import torch
from drawn import (
    ALONG_CHUNKS,
    LIKE_X,
    REGIMES,
    SEEDS,
    agree,
    cases,
    change,
    on_backends,
    parameters_axis,
    run_in,
    same_bits,
)  # fmt: skip
from helpers import EPS, SHARED, inputs
from hypothesis import strategies as st

DENSE = ("contiguous", "offset", "sliced")  # whose first dimension is the outermost in memory


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

    compared = []

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
            compared.append(place)

    places = st.lists(st.sampled_from((0.7, 0.3, 0.5, 0.99, 0.0)), min_size=1, max_size=2)  # at 0 nothing is valid
    examine(prove, cases(backend, mask=True, padding=None), SEEDS, st.sampled_from(ALONG_CHUNKS), places)
    assert compared


def with_rows(backend, **options):
    """Draw cases of several rows, none of which is the axis, with the batch outermost in memory."""
    layouts = {layout: cases(backend, layout=layout, **options) for layout in DENSE}
    return st.one_of(*layouts.values()).filter(lambda case: case.positive_axis > 0 and case.shape[0] > 1)


@on_backends(40, 2)
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
        else:
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
        lambda case: case.layout not in SHARED
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
