"""An axis that is spread over processes: results and gradients are those of all of it in one."""

import copy
import pickle

import pytest
import spread
import torch
import torch.distributed as dist
from helpers import ALGORITHMS, EPS, Case, attend, close, inputs, oracle, within

import daam
from daam.pieces import cut_heads

pytestmark = pytest.mark.usefixtures("one_thread")

CASES = [
    (case.but(algorithm=name), sizes)
    for name in ALGORITHMS
    for case, sizes in (
        (Case((3, 24, 5), 1), (7, 0, 17)),
        (Case((3, 24, 5), 1, heads=4, residual=True, layout="transposed"), (7, 12, 5)),  # one has a piece of two heads
        (Case((2, 3, 24), 2, heads=2, mask=True, grads="expanded"), (4, 15, 5)),
        (Case((24, 4), 0, heads=3, mask=True, weights=False), (8, 8, 8)),  # nothing is shared
        (Case((2, 25, 3), 1, heads=3 if name != "density" else 5, layout="sliced"), (20, 2, 3)),
    )
]
CASES += [
    (Case((2, 24, 3), 1, heads=2, padding=0.0, algorithm="mixture"), (5, 8, 11)),
    (Case((2, 24, 3), 1, heads=2, padding=0.0, algorithm="stable", clamps=True), (5, 8, 11)),
    (Case((2, 24, 3), 1, heads=1, eps=0.5, algorithm="mixture"), (5, 8, 11)),
    (Case((2, 24, 3), 1, heads=1, clamps=True, mask=True, algorithm="stable"), (5, 8, 11)),
    (Case((2, 3, 24), 2, heads=3, params="one"), (10, 8, 6)),
]
KERNEL_CASES = [
    *((Case((8, 2), 0, heads=2, algorithm=name), (5, 3)) for name in ("density", "mixture", "gate")),
    (Case((2, 600), 1, heads=1, mask=True, weights=False), (590, 10)),  # parameters vary along the axis: short strips
    (Case((8, 2), 0, heads=2, padding=0.0, algorithm="stable"), (5, 3)),
    (Case((520, 1), 0, algorithm="stable", weights=False, clamps=True), (519, 1)),  # two strips, and one
]
MORE_KERNEL_CASES = [
    *CASES,
    *((Case((3, 1400, 2), 1, mask=True, weights=False, algorithm=name), (1100, 300, 0)) for name in ALGORITHMS),
]


def check_all(rank, backend, cases):
    for case, sizes in cases:
        spread.check(rank, case, sizes, backend)


def test_pieces_of_three_processes(tmp_path):
    spread.run(3, tmp_path, check_all, "eager", CASES)


def check_on_kernels(rank):
    """Check pieces, a large mean, and a Gaussian so narrow that it is 0 everywhere, where weights are its ratios."""
    check_all(rank, "triton", KERNEL_CASES)
    large = Case((40, 2), 0, offset=1e5, weights=False)
    spread.check(rank, large, (25, 15), "triton", dtype=torch.float32, bound=1e-5)
    case = Case((520, 1), 0, params=1, eps=0.0, algorithm="mixture")
    given = inputs(case)
    given.params = tuple(torch.full_like(p, value) for p, value in zip(given.params, (3.7, 0.002), strict=True))
    spread.check(rank, case, (519, 1), "triton", bound=1e-8, given=given)


@pytest.mark.kernel
@pytest.mark.not_emulated("processes are forked")
def test_pieces_on_kernels(tmp_path, device):
    spread.run(2, tmp_path, check_on_kernels)


@pytest.mark.slow
@pytest.mark.kernel
@pytest.mark.not_emulated("processes are forked")
def test_more_pieces_on_kernels(tmp_path, device):
    spread.run(3, tmp_path, check_all, "triton", MORE_KERNEL_CASES)


def test_two_processes(tmp_path):
    """Check what needs a group and no more: each pair of processes takes seconds to start."""
    checks = (
        check_exchanges,
        check_other_sizes,
        check_half_precision,
        check_large_mean,
        check_frozen_inputs,
        check_mask_of_one,
        check_extreme_widths,
        check_errors,
        check_modules,
        check_compile,
    )
    spread.run(2, tmp_path, lambda rank: [check(rank) for check in checks])


def check_exchanges(rank):
    """Check how many exchanges there are, and of how many numbers: of shared heads alone, 8 bytes each."""
    for name, exchanges, numbers in (("density", 1, 4), ("gate", 1, 4), ("mixture", 2, 4), ("stable", 2, 4)):
        case, sizes = Case((3, 24, 5), 1, heads=3, algorithm=name), (12, 12)
        given = inputs(case, torch.float64)
        leaves = [t.requires_grad_() for t in (spread.piece(given.x, 1, sizes, rank), *given.params)]
        with spread.counted() as forward:
            y, _weights = attend(case, *leaves, group=daam.AxisPieces(dist.group.WORLD, sizes))
        with spread.counted() as backward:
            y.sum().backward()
        assert len(forward) == len(backward) == exchanges, name
        assert forward[0] == numbers * 3 * 5  # of the one head that is in both
    with spread.counted() as found:  # none where heads are whole
        attend(
            case.but(heads=2), leaves[0], *(p[:2] for p in leaves[1:]), group=daam.AxisPieces(dist.group.WORLD, sizes)
        )
    assert not found


def check_other_sizes(rank):
    """Check that processes tell each other the sizes of pieces, and notice where one of them has another."""
    group, case = dist.group.WORLD, Case((3, 24, 5), 1, heads=4)
    counts = []
    other = torch.randn(2, (3, 4)[rank], 5)
    for sizes in ((12, 12), (12, 12), (13, 11), (13, 11), (24, 0)):
        with spread.counted() as found:
            spread.check(rank, case, sizes, group=group)
        daam.density_attention(other, torch.ones(1, 5), torch.ones(1, 5), group=group)  # of another length, between
        counts.append(len(found))
    # sizes are asked for once; then they come with the numbers, which are of no use where they are new
    assert counts == [2, 1, 3, 2, 2], counts
    with pytest.raises(ValueError, match="num_heads is 5, expected a divisor of the 24 positions of norm_axis 1"):
        daam.density_attention(torch.randn(3, (13, 11)[rank], 5), torch.ones(5, 5), torch.ones(5, 5), group=group)


def check_half_precision(rank):
    for dtype in (torch.float32, torch.bfloat16):
        for name in ALGORITHMS:
            spread.check(
                rank, Case((2, 40, 6), 1, heads=2, algorithm=name), (25, 15), dtype=dtype, bound=16 * EPS[dtype]
            )


def check_large_mean(rank):
    """Check that means of 1e5 cost no more digits than they do in one process."""
    for name in ALGORITHMS:
        case = Case((2, 40, 6), 1, offset=1e5, weights=False, algorithm=name)
        spread.check(rank, case, (25, 15), dtype=torch.float32, bound=1e-5)


def check_frozen_inputs(rank):
    case, sizes = Case((2, 12, 4), 1), (5, 7)
    given = inputs(case, torch.float64)
    group, x = daam.AxisPieces(dist.group.WORLD, sizes), spread.piece(given.x, 1, sizes, rank)
    p, q = given.params
    q.requires_grad_()
    y, weights = attend(case, x, p, q, group=group)
    (y.sum() + weights.sum()).backward()
    d_q, q.grad = q.grad.clone(), None
    dist.all_reduce(d_q)
    y, weights = attend(case, given.x, p, q)
    (y.sum() + weights.sum()).backward()
    torch.testing.assert_close(d_q, q.grad)
    with torch.no_grad():
        assert not attend(case, x, p, q, group=group)[0].requires_grad


def check_mask_of_one(rank):
    """Check a mask that the other process does not pass, since all it has is valid; and examples that are none."""
    sizes, x = (6, 6), torch.randn(2, 12, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    mask = (torch.arange(12) < 9).expand(2, 12)
    group, mine = daam.AxisPieces(dist.group.WORLD, sizes), None if rank == 0 else spread.piece(mask, 1, sizes, rank)
    for name, spec in ALGORITHMS.items():
        case = Case((2, 12, 3), 1, algorithm=name)
        params = inputs(case, torch.float64).params
        part = spec.call(spread.piece(x, 1, sizes, rank), *params, norm_axis=1, mask=mine, group=group)
        close(part, spread.piece(spec.call(x, *params, norm_axis=1, mask=mask), 1, sizes, rank), f"y of {name}")
        assert spec.call(torch.empty(0, 6, 3), *params, norm_axis=1, group=group).shape == (0, 6, 3)


def check_extreme_widths(rank):
    """Check narrow Gaussians far from the mean in fp32: as accurate as in one process."""
    for name, c in (("mixture", 0.05), ("stable", 0.01), ("density", 0.01)):
        case, sizes = Case((2, 40, 6), 1, weights=False, offset=1e3, algorithm=name), (25, 15)
        given = inputs(case, torch.float32)
        given.params[1].fill_(c)
        expected = oracle(case, given)
        found = spread.attend_pieces(rank, case, given, sizes, "eager", daam.AxisPieces(dist.group.WORLD, sizes))
        for key, result in found.items():
            wanted, scale = expected[key], expected[key].abs().max().item() or 1.0
            wanted = wanted if key in case.gradients[1:] else spread.piece(wanted, 1, sizes, rank)
            within((result.double() - wanted).abs().max().item() / scale, 1e-6, f"{key} of {name}")


def check_errors(rank):
    case, sizes = Case((2, 12, 4), 1, weights=False), (5, 7)
    given = inputs(case, torch.float64)
    group, x = daam.AxisPieces(dist.group.WORLD, sizes), spread.piece(given.x, 1, sizes, rank).requires_grad_()
    with pytest.raises(ValueError, match=f"x has {sizes[rank] + 1} positions"):
        attend(case, torch.cat((x, x[:, :1]), 1), *given.params, group=group)
    with pytest.raises(TypeError, match="group is a int, expected a ProcessGroup"):
        attend(case, x, *given.params, group=3)
    for wrong in ((12,), (13, -1)):
        with pytest.raises(ValueError, match="expected 2 numbers, 0 or more, one a process"):
            daam.AxisPieces(dist.group.WORLD, wrong)
    y = attend(case, x, *given.params, group=group)
    with pytest.raises(RuntimeError, match="a sharded axis is differentiated once"):
        torch.autograd.grad(y.sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match="a sharded axis has no vmap"):
        torch.func.grad(lambda x: attend(case, x, *given.params, group=group).sum())(x.detach())
    assert pickle.loads(pickle.dumps(group)) == group == daam.AxisPieces(group.group, sizes)


def check_modules(rank):
    """Check every module with a group against the same without one, in one process; copies of it too."""
    group, sizes = dist.group.WORLD, (5, 8)
    x = torch.randn(2, 13, 6, generator=torch.Generator().manual_seed(3))
    modules = {
        "density": lambda **options: daam.MultiHeadDAAM(6, 1, **options),
        "one head": lambda **options: daam.DensityAdaptiveAttention(1, 1, 3, None, **options),
        "mixture": lambda **options: daam.MultiHeadDensityAdaptiveAttention(1, 3, 2, **options),
        "stable": lambda **options: daam.StableMultiHeadDensityAttention(1, 2, 2, **options),
        "block": lambda **options: daam.DensityBlock([1, 1, 2], [2, 2, 1], [2, 3, 1], 3, **options),
        "stable block": lambda **options: daam.StableDensityBlock([1, 1], [2, 2], [2, 3], 2, **options),
    }
    for name, build in modules.items():
        torch.manual_seed(0)
        plain, spread_out = build(), build(group=None if name == "block" else group)
        if name == "block":  # the axis of its last layer is here
            spread_out.layers[0].group = spread_out.layers[1].group = daam.AxisPieces(group)
        spread_out.load_state_dict(plain.state_dict())
        spread_out = copy.deepcopy(spread_out)
        assert repr(daam.AxisPieces(group)) in repr(spread_out)
        check_module(rank, name, plain, spread_out, x, 1, sizes)
    plain, spread_out = daam.DensityGate(2), daam.DensityGate(2, group=group)
    spread_out.load_state_dict(plain.state_dict())
    check_module(rank, "gate", plain, spread_out, x[:, :2].transpose(1, 2).repeat(1, 1, 7)[:, :2, :13], 2, sizes)
    assert spread_out.fusion_for(x[:, :2])[0] == "formula"
    with pytest.raises(ValueError, match="expected one axis for all layers"):
        daam.DensityBlock([1, 2], [1, 1], [2, 2], 2, group=group)


def check_module(rank, name, plain, spread_out, x, axis, sizes):
    """Check y and gradients of a module whose axis is spread out."""
    whole = plain(x := x.clone().requires_grad_())
    part = spread_out(mine := spread.piece(x.detach(), axis, sizes, rank).clone().requires_grad_())
    whole, part = (out[0] if isinstance(out, tuple) else out for out in (whole, part))
    close(part, spread.piece(whole, axis, sizes, rank), f"y of {name}")
    whole.square().sum().backward()
    part.square().sum().backward()
    close(mine.grad, spread.piece(x.grad, axis, sizes, rank), f"dx of {name}", (1e-5, 1e-5))
    for (key, p), q in zip(plain.named_parameters(), spread_out.parameters(), strict=True):
        dist.all_reduce(q.grad)
        close(q.grad, p.grad, f"d_{key} of {name}", (1e-4, 1e-4))


def check_compile(rank):
    """Check that a compiled call breaks the graph, and is an error that says so where it must not."""
    case, sizes = Case((2, 12, 4), 1, weights=False), (5, 7)
    given = inputs(case, torch.float64)
    group, x = daam.AxisPieces(dist.group.WORLD, sizes), spread.piece(given.x, 1, sizes, rank)

    def twice(x, p, q):
        return attend(case, 2 * x, p, q, group=group) * 2

    compiled = torch.compile(twice, backend="eager")
    torch.testing.assert_close(compiled(x, *given.params), twice(x, *given.params))
    torch._dynamo.reset()  # which would take what was compiled in parts
    with pytest.raises(Exception, match="daam's sharded axis exchanges numbers between processes"):
        torch.compile(twice, backend="eager", fullgraph=True)(x, *given.params)


def test_cuts_hold_every_position_once():
    for sizes in ((7, 0, 17), (1, 1, 1), (0, 0, 5), (10, 2, 13), (10, 13), (24,)):
        for heads in range(1, min(sum(sizes), 6) + 1):
            cuts = [cut_heads(sizes, rank, heads) for rank in range(len(sizes))]
            for size, cut in zip(sizes, cuts, strict=True):
                assert [part.start for part in cut.parts] == [
                    sum(p.length for p in cut.parts[:i]) for i in range(len(cut.parts))
                ]
                assert sum(part.length for part in cut.parts) == size
            shared = {part.head: part for cut in cuts for part in cut.parts if part.slot is not None}
            for part in shared.values():
                pieces = [p for cut in cuts for p in cut.parts if p.slot is not None and p.head == part.head]
                assert [p.offset for p in pieces] == [sum(p.length for p in pieces[:i]) for i in range(len(pieces))]
                assert sum(p.length for p in pieces) == part.total and {p.places for p in pieces} == {part.places}
            whole = [
                head for cut in cuts for p in cut.parts if p.slot is None for head in range(p.head, p.head + p.heads)
            ]
            assert sorted([*whole, *shared]) == list(range(heads))
            for part in (p for cut in cuts for p in cut.parts if p.slot is None):  # cut by an algorithm as the whole is
                wanted = lengths_of_heads(sum(sizes), heads)[part.head : part.head + part.heads]
                assert lengths_of_heads(part.length, part.heads) == wanted


def lengths_of_heads(size, heads):
    """Return how many positions of an axis each head has: as many, and the last one the remainder too."""
    return [size // heads] * (heads - 1) + [size // heads + size % heads]
