"""The kernels of every algorithm against float64, on a GPU or in the interpreter."""

import itertools
from unittest import mock

import pytest
import torch
from helpers import (
    ALGORITHMS,
    GOLDEN,
    GRADS,
    LAYOUTS,
    Case,
    attend,
    bound,
    check_golden,
    error,
    inputs,
    oracle,
    ran,
    recorded_launches,
    run,
    within,
    worst_errors,
)

from bench.aot import recording
from bench.modelled import launches
from daam.kernels import tiles
from daam.kernels.algorithms import count_tensors
from daam.kernels.host import plan
from daam.kernels.operands import axis_is_fastest, inner_dim, varies

pytestmark = pytest.mark.kernel
algorithms = pytest.mark.parametrize("algorithm", ALGORITHMS)
padded = pytest.mark.parametrize(
    "algorithm", [name for name, spec in ALGORITHMS.items() if "padding" in spec.record.settings]
)
# what the host does alike for all algorithms is tested of the last one in `make test-slow`
alike = pytest.mark.parametrize(
    "algorithm", [*list(ALGORITHMS)[:-1], pytest.param(list(ALGORITHMS)[-1], marks=pytest.mark.slow)]
)

# Every axis of every rank, all chunk lengths, features, heads, layouts, gradients and flags of the contract, each next
# to several of the others. Chunks beyond budgets.LONGEST_* (a quarter of that in float64) are streamed.
DENSITY = [
    Case((7, 21), 0),
    Case((8, 33), 0, heads=8, params="one", grads="expanded"),
    Case((150, 21), 0, heads=2, layout="transposed", grads="sliced", residual=True),
    Case((5, 1000), 1, layout="sliced", grads="transposed"),
    Case((3, 74), -1, heads=2, mask=True, grads="expanded"),
    Case((9, 3), 1, heads=1, residual=True, params="one"),
    Case((33, 24), -1, heads=8, layout="transposed", mask=True, residual=True),
    Case((2, 24, 33), 1, heads=8),
    Case((2, 40, 21), 1, heads=8, grads="transposed", mask=True),
    Case((3, 8, 33), 1, heads=8, params="one", mask=True, weights=False),
    Case((2, 13, 328), 1, residual=True, grads="expanded", weights=False),
    Case((2, 26, 21), 1, heads=2, layout="sliced", grads="sliced", mask=True),
    Case((2, 37, 1), 1, layout="transposed", grads="contiguous"),
    Case((3, 37, 21), 2, params="one", layout="transposed", residual=True),
    Case((13, 3, 21), 0, params="features", grads="transposed", mask=True, residual=True),
    Case((4, 5, 33), 0, heads=2, params="one", layout="sliced"),
    Case((2, 150, 9), 1, layout="transposed", mask=True, params="one"),
    Case((2, 300, 9), 1, heads=2, mask=True, residual=True),
    Case((2, 3, 5, 21), 2, layout="channels_last", grads="sliced"),
    Case((2, 6, 5, 4), 1, heads=2, layout="channels_last", grads="channels_last", mask=True),
    Case((2, 6, 5, 4), 1, heads=2, params="one", layout="contiguous", grads="transposed"),
    Case((2, 5, 4, 26), -1, heads=2, layout="channels_last", grads="expanded", residual=True),
    Case((3, 2, 5, 3, 5), 0, params="one", grads="sliced"),
    Case((2, 3, 5, 2, 21), 2, layout="transposed", grads="expanded", mask=True),
    Case((2, 3, 2, 2, 37), -1, params="features", layout="sliced", residual=True, mask=True),
    Case((2, 2, 3, 2, 3, 5), 3, layout="sliced", grads="expanded"),
    Case((2, 300, 5), 1, params="features", grads="expanded", weights=False),
    Case((1, 2500), 1, params="features", mask=True),
    Case((1, 5000), 1, heads=2, params="one", layout="sliced", residual=True),
    Case((2, 3, 2200), 2, params="features", grads="expanded"),
    Case((2, 24, 64), 1),
    Case((8, 8, 8), 1, layout="transposed"),
    Case((2, 24, 40), 1, heads=2),
    Case((5, 72), -1, params="one"),
    Case((5, 72), -1, heads=2, eps=0.0),
    Case((32, 512), -1, params="one"),
    Case((2, 128, 64), 1),
    Case((2, 131, 9), 1),
    Case((1, 4096), 1),
    Case((1, 5, 1), 1, params="one"),
    Case((1, 1), 0),
]

# The same for parameters that are numbers of a head, and chunks of unequal length: the last takes the remainder.
OTHERS = [
    Case((7, 21), 0),
    Case((17, 33), 0, heads=8, grads="expanded", params=5),
    Case((151, 21), 0, heads=2, layout="transposed", grads="sliced", residual=True),
    Case((5, 1000), 1, layout="sliced", grads="transposed"),
    Case((3, 75), -1, heads=2, mask=True, grads="expanded", params=1),
    Case((9, 3), 1, residual=True, params=8),
    Case((2, 25, 33), 1, heads=8),
    Case((2, 13, 72), 1, heads=4, residual=True, grads="expanded", weights=False),
    Case((2, 27, 21), 1, heads=2, layout="sliced", grads="sliced", mask=True),
    Case((2, 37, 1), 1, layout="transposed"),
    Case((3, 37, 21), 2, layout="transposed", residual=True, params=2),
    Case((13, 3, 21), 0, grads="transposed", mask=True, residual=True),
    Case((2, 201, 9), 1, heads=2, mask=True, residual=True),
    Case((2, 131, 9), 1, heads=2, grads="sliced"),
    Case((2, 3, 5, 21), 2, layout="channels_last", grads="sliced"),
    Case((2, 7, 5, 4), 1, heads=2, layout="channels_last", grads="channels_last", mask=True),
    Case((2, 5, 4, 27), -1, heads=2, layout="channels_last", grads="expanded", residual=True),
    Case((3, 2, 5, 3, 5), 0, grads="sliced"),
    Case((2, 2, 3, 2, 3, 5), 3, layout="sliced", grads="expanded"),
    Case((1, 2500), 1, mask=True),
    Case((1, 3071), 1, heads=3, layout="sliced", residual=True),
    Case((1025, 3), 0, heads=2, mask=True),  # all heads but the last have an empty strip
    Case((2043, 3), 0, heads=4),  # which would begin behind their end
    Case((8, 40), 1, heads=3, layout="expanded"),  # strides 0 and 1, in units of 8 neither way
    Case((64, 13), 0, layout="expanded"),
    Case((2, 3, 2200), 2, grads="expanded"),
    Case((2, 24, 64), 1),
    Case((32, 256), -1),
    Case((2, 24, 40), 1, heads=2),
    Case((5, 72), -1),
    Case((2, 128, 64), 1),
    Case((1, 4096), 1),
]
# Sums of the weights on both sides of their clamp, positions that hold the padding value, and both.
MIXTURE = [
    Case((4, 13, 9), 1, heads=3, eps=0.15),
    Case((4, 33), 1, heads=2, eps=0.15, mask=True, residual=True),
    Case((3, 200, 5), 1, eps=1.0, grads="expanded"),
    Case((3, 13, 9), 1, heads=2, padding=0.0, residual=True),
    Case((3, 33), 1, heads=2, padding=-1.5, eps=0.15, layout="sliced"),
    Case((2, 200, 5), 1, padding=0.0, weights=False),
    Case((2, 2200), 1, padding=0.0, eps=0.3, residual=True),
    Case((3, 200, 5), 1, heads=3, eps=0.0, mask=True),
]
# Chunks of which some clamp, next to others in a tile, and padding; and what else takes every path.
STABLE = [
    Case((2, 25, 33), 1, heads=8, clamps=True),
    Case((4, 33), 1, heads=2, clamps=True, mask=True, residual=True, layout="sliced"),
    Case((5, 72), -1, params=8, clamps=True),
    Case((3, 13, 9), 1, heads=2, padding=0.0, residual=True),
    Case((3, 33), 1, heads=2, padding=-1.5, clamps=True, params=1),
    Case((2, 50, 9), 1, clamps=True, mask=True),
    Case((2, 200, 5), 1, padding=0.0, clamps=True, weights=False),
    Case((2, 2200), 1, padding=0.0, clamps=True, eps=0.1, residual=True),
    Case((2, 201, 9), 1, heads=2, clamps=True, mask=True, grads="expanded"),
    *(
        c
        for c in OTHERS
        if c.shape
        in ((9, 3), (2, 2, 3, 2, 3, 5), (1, 2500), (2, 24, 64), (32, 256), (2, 24, 40), (2, 128, 64), (1, 4096))
    ),
]
CASES = [
    *DENSITY,
    *(case.but(algorithm=name) for name in ("mixture", "gate") for case in OTHERS),
    *(case.but(algorithm="mixture") for case in MIXTURE),
    *(case.but(algorithm="stable") for case in STABLE),
]


def check(case: Case, device) -> None:
    given = inputs(case, device=device)
    expected = oracle(case, given)
    with recorded_launches() as names:
        result = run(case, given, "triton")
    assert {f"{case.algorithm}_forward", "forward_streamed"} & set(names)
    assert {f"{case.algorithm}_{word}" for word in ("backward", "sums")} & set(names)
    assert result.keys() == expected.keys()
    for name in expected:
        within(error(result[name], expected[name]), 1e-11, f"{name} of {case}")


@pytest.mark.parametrize("case", CASES, ids=str)
def test_agrees_with_float64(case, device):
    check(case, device)


@pytest.mark.parametrize(
    "case",
    [
        *(c for c in DENSITY if c.shape in ((2, 24, 33), (33, 24), (2, 300, 9), (2, 3, 2200), (8, 33))),
        *(c for c in CASES if c.shape in ((2, 25, 33), (17, 33), (2, 201, 9), (2, 3, 2200))),
    ],
    ids=str,
)
def test_agrees_where_programs_take_several_tiles(case, device):
    """Check programs that loop and share partial sums, where small tensors would have a program for every tile."""
    with mock.patch.multiple(tiles, MAX_PROGRAMS=3, FILL=1):
        plan.cache_clear()  # of plans that other tests made of the same tensors
        check(case, device)
    plan.cache_clear()


def test_more_partial_sums_than_are_added_at_once(device):
    """Check parameters whose gradients are sums over more programs than `param_gradients` adds at once, 128."""
    with mock.patch.object(tiles, "FILL", 2**30):
        plan.cache_clear()
        check(Case((132, 2, 16), 1, weights=False), device)
    plan.cache_clear()


def transposed(p):
    return p.t().contiguous().t()


@algorithms
def test_parameters_of_other_strides(algorithm, device):
    """Check parameters that lie in memory otherwise than each other, or are the same for all heads."""
    case = Case((2, 12, 5), 1, heads=3, algorithm=algorithm)
    for change_p, change_q in ((transposed, torch.clone), (lambda p: p[:1].expand(p.shape), transposed)):
        given = inputs(case, device=device)
        p, q = given.params
        given.params = change_p(p), change_q(q)
        expected, result = oracle(case, given), run(case, given, "triton")
        for name in expected:
            within(error(result[name], expected[name]), 1e-11, name)


@padded
@pytest.mark.parametrize("shape", [(2, 9, 3), (1, 140, 2)], ids=str)
def test_padding_that_is_not_0(shape, algorithm, device):
    """Check chunks on chip and streamed, the first of nothing but padding."""
    case = Case(shape, 1, padding=-1.5, eps=0.1, algorithm=algorithm)
    given = inputs(case, device=device)
    given.x[0, :, 0] = -1.5
    expected, result = oracle(case, given), run(case, given, "triton")
    for name in expected:
        within(error(result[name], expected[name]), 1e-11, name)


@padded
def test_the_padding_value_is_rounded_to_x(algorithm, device):
    case = Case((2, 9), 1, padding=0.1, algorithm=algorithm)
    given = inputs(case, torch.float16, device=device)
    assert 0.0 < ((given.x - 0.1).abs() < 1e-3).float().mean() < 1.0
    found, expected = (run(case, given, backend) for backend in ("triton", "eager"))
    for name, wanted in expected.items():
        within(error(found[name], wanted), 1e-2, name)


STREAMED = [
    Case((2, 300, 9), 1, heads=2, mask=True, residual=True),
    Case((2, 300, 5), 1, params="features", grads="expanded", weights=False),
    Case((2, 2200, 3), 1, heads=2, params="features", layout="transposed"),
    Case((1, 5000), 1, heads=2, params="one", layout="sliced", residual=True),
    Case((1, 2500), 1, params="features", mask=True),
    *(
        case.but(algorithm=name)
        for name, spec in ALGORITHMS.items()
        if not spec.features
        for case in (Case((2, 131, 9), 1, heads=2, grads="sliced"), Case((1, 2500), 1, mask=True))
    ),
    Case((3, 200, 5), 1, eps=1.0, grads="expanded", algorithm="mixture"),
    Case((2, 2200), 1, padding=0.0, eps=0.3, residual=True, algorithm="mixture"),
    Case((2, 2200), 1, padding=0.0, clamps=True, eps=0.1, algorithm="stable"),
    Case((3, 200, 5), 1, heads=2, mask=True, clamps=True, algorithm="stable"),
]


@pytest.mark.parametrize("case", STREAMED, ids=str)
def test_agrees_where_chunks_have_several_strips(case, device):
    """Check chunks of many strips of one tile that are merged three at a time, many times."""
    with mock.patch.multiple(tiles, STRIP_CONTIGUOUS=1, STRIP_STRIDED=1, STRIPS=4):
        plan.cache_clear()
        check(case, device)
    plan.cache_clear()


def paths_of(case, device):
    """Yield what decides which code of a kernel runs, of every launch of a case: (algorithm, order, kernel, regime,
    fact).
    """
    given = inputs(case, device=device)
    inner = inner_dim(given.x, case.positive_axis, case.feature_axis)
    order = "rows" if axis_is_fastest(given.x, case.positive_axis, inner) else "columns"
    direction = varies(case.positive_axis, case.feature_axis)
    with recording() as launches:
        run(case, given, "triton")
    for call in launches:
        if not count_tensors(call.name):
            continue
        extent, constants = call.args[-1], call.meta["PLAN"]
        streamed = extent.n_strips is not None
        for fact in (
            f"parameters along {direction}", "masked" if case.mask else "not masked",
            "several blocks" if constants.N_BLOCKS > 1 else "one block",
            "ragged rows" if constants.RAGGED_P else "whole rows",
            "ragged columns" if constants.RAGGED_C else "whole columns",
            f"units of {constants.UNIT}",
        ):  # fmt: skip
            yield case.algorithm, order, call.name, "streamed" if streamed else "resident", fact


def test_every_path_is_taken(device):
    """Check that the cases compared with float64 run the code of every regime."""
    taken = {path for case in CASES for path in paths_of(case, device)}
    resident_facts = ("one block", "ragged columns", "units of 8", "units of 1")
    facts = ("masked", "not masked", "ragged rows", "whole rows", "several blocks", "whole columns")
    missing = []
    for name, spec in ALGORITHMS.items():
        for order in ("rows", "columns"):
            for streamed in (False, True):
                regime, wanted = ("streamed", facts) if streamed else ("resident", (*facts, *resident_facts))
                missing += [
                    (name, order, kernel, regime, fact)
                    for kernel in spec.kernels[streamed]
                    if count_tensors(kernel)
                    for fact in wanted
                    if (name, order, kernel, regime, fact) not in taken
                ]
    assert not missing, "\n".join(map(str, missing))


PARAMS = [(name, p) for name, spec in ALGORITHMS.items() for p in (("features", "one") if spec.features else (4,))]
FULL = [
    Case(shape, axis, heads, params, algorithm=algorithm)
    for (shape, axis), heads, (algorithm, params) in itertools.product(
        [((16, 21), 0), ((5, 1000), 1), ((3, 40, 33), 1), ((2, 296, 21), 1), ((2, 16, 5, 6), 1),
         ((2, 3, 5, 2, 72), -1), ((1, 4992), 1)],
        (1, 2, 8), PARAMS,
    )
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("case", FULL, ids=str)
def test_agrees_with_float64_in_every_combination(case, device):
    for layout, grads, mask, residual in itertools.product(LAYOUTS, GRADS, (False, True), (False, True)):
        check(case.but(layout=layout, grads=grads, mask=mask, residual=residual), device)


# Several parameters each: the one sum of a single parameter can be near 0, and its relative error anything.
RULE = [
    Case((4, 6, 21), 1, heads=2, mask=True, residual=True),
    Case((6, 48), 1, heads=8, params="one"),
    Case((2, 300, 9), 1, offset=30.0),
    Case((6, 50), 1, heads=8, algorithm="mixture", eps=0.1),
    *(
        Case(shape, 1, **more, algorithm=name)
        for name, spec in ALGORITHMS.items()
        if not spec.features
        for shape, more in (((4, 13, 9), {"heads": 3, "mask": True, "residual": True}), ((2, 260, 5), {"offset": 30.0}))
    ),
]


# The interpreter truncates to bf16: emulation has them as they are rounded.
seldom = pytest.mark.not_interpreted("kernels differ from fp32's in loads and stores, which the emulated sample has")
INTERPRETED = [case for case in RULE if case.shape[1] >= 260 and case.algorithm in ("density", "mixture")]
RULED = [
    pytest.param(
        case,
        dtype,
        marks=() if dtype == torch.float32 or (dtype == torch.bfloat16 and case in INTERPRETED) else seldom,
        id=f"{case}-{dtype}",
    )
    for case, dtype in itertools.product(RULE, (torch.float32, torch.float16, torch.bfloat16))
]


@pytest.mark.parametrize(("case", "dtype"), RULED)
def test_errors_are_those_of_eager(case, dtype, device):
    """Check that errors are within helpers.bound, which has the reason of every constant."""
    for name, (kernels, eager) in worst_errors(case, dtype, device).items():
        within(kernels, bound(case, name, dtype, eager), name)


@pytest.mark.parametrize("name", GOLDEN)
def test_published_cases(name, device):
    check_golden(name, "triton", device)


@algorithms
@pytest.mark.parametrize(
    ("shape", "axis", "streamed"),
    [((2, 24, 33), 1, False), ((3, 1000), 1, False), ((2, 300, 5), 1, True), ((2, 20_000), 1, True)],
)
def test_path(shape, axis, streamed, algorithm, device):
    """Check which kernels a regime takes: short and long chunks, axis or features fastest."""
    case = Case(shape, axis, algorithm=algorithm)
    with recorded_launches() as names:
        run(case, inputs(case, torch.float32, device=device), "triton")
    # density's parameters along the chunk are those of one tile, whose strips' sums are added
    assert [name for name in names if name != "merge_strip_sums"] == case.spec.kernels[streamed]


def test_chunks_that_only_the_backward_pass_streams(device):
    """Check that the gate's backward pass, which holds less on chip, finds the statistics of such chunks itself. Where
    the last chunk is so long that the forward pass streams it, it streams all.
    """
    for shape, heads, expected in (
        ((2, 600), 1, ["gate_forward", "strip_stats"]),
        ((1, 3071), 3, ["strip_stats", "forward_streamed"]),
    ):
        case = Case(shape, 1, heads=heads, algorithm="gate")
        with recorded_launches() as names:
            run(case, inputs(case, device=device), "triton")
        assert [name for name in dict.fromkeys(names) if name != "merge_strip_stats"][:2] == expected
        assert names.count("strip_stats") == 1
        check(case, device)


@alike
@pytest.mark.parametrize("needs", list(itertools.product([False, True], repeat=3))[1:], ids=str)
@pytest.mark.parametrize("shape", [(2, 6, 5), (2, 300, 5)], ids=str)
def test_frozen_inputs(shape, needs, algorithm, device):
    """Check all combinations of requires_grad: None for frozen inputs, the same numbers for others, no idle work."""
    case = Case(shape, 1, heads=2, algorithm=algorithm)
    given = inputs(case, device=device)
    expected = oracle(case, given)
    tensors = [t.detach().requires_grad_(need) for t, need in zip((given.x, *given.params), needs, strict=True)]
    with recorded_launches() as names:
        y, weights = attend(case, *tensors, backend="triton")
        torch.autograd.backward([y, weights], [given.grad_y, given.grad_weights])
    for t, need, name in zip(tensors, needs, case.gradients, strict=True):
        assert (t.grad is not None) == need
        if need:
            within(error(t.grad, expected[name]), 1e-11, name)
    streamed = shape[1] == 300
    own = f"{algorithm}_backward_streamed" in case.spec.record.streamed  # which sums for the parameters, too
    backward = f"{algorithm}_" * (own or not streamed) + "backward" + "_streamed" * streamed
    assert (backward in names) == (needs[0] or own or not streamed), "sums are enough for parameters of streamed chunks"
    assert ran(names, "param_gradients") == any(needs[1:])


@algorithms
@pytest.mark.parametrize("shape", [(2, 300, 5), (1, 4200)], ids=str)
def test_parameters_alone_of_streamed_chunks(shape, algorithm, device):
    case = Case(shape, 1, heads=2, params="features" if len(shape) == 2 else "one", weights=False, algorithm=algorithm)
    given = inputs(case, device=device)
    expected, leaves = oracle(case, given), [p.detach().requires_grad_() for p in given.params]
    found = torch.autograd.grad(attend(case, given.x, *leaves, backend="triton"), leaves, given.grad_y)
    for name, t in zip(case.gradients[1:], found, strict=True):
        within(error(t, expected[name]), 1e-11, name)


@algorithms
def test_gradcheck(algorithm, device):
    """Compare gradients of the kernels themselves, and of their double backward, with numerical derivatives."""
    case = Case((2, 5, 2), 1, heads=1 if ALGORITHMS[algorithm].features else 2, residual=True, algorithm=algorithm)
    given = inputs(case, device=device)
    mask = torch.tensor([[True, True, False, True, True], [True] * 5], device=device)

    def call(*args):
        return attend(case, *args, mask, backend="triton")

    assert torch.autograd.gradcheck(call, given.leaves(), fast_mode=True)
    assert torch.autograd.gradgradcheck(call, given.leaves(), fast_mode=True)


@alike
def test_double_backward_drops_nothing(algorithm, device):
    """Check a gradient penalty on a loss linear in y, where once_differentiable would drop the second order."""
    case = Case((2, 6, 3), 1, heads=2, weights=False, algorithm=algorithm)
    given = inputs(case, device=device)
    grads = []
    for backend in ("triton", "eager"):
        leaves = given.leaves()
        y = attend(case, *leaves, backend=backend)
        (dx,) = torch.autograd.grad(y.sum(), leaves[0], create_graph=True)
        grads.append(torch.autograd.grad(y.sum() + dx.square().sum(), leaves))
    for name, result, wanted in zip(case.gradients, *grads, strict=True):
        within(error(result, wanted), 1e-11, name)


@algorithms
@pytest.mark.parametrize("case", [Case((3, 24, 9), 1, heads=8), Case((5, 40), -1), Case((2, 300, 9), 1)], ids=str)
def test_a_batch_equals_its_rows_bit_for_bit(case, algorithm, device):
    case = case.but(algorithm=algorithm)
    given = inputs(case, torch.float32, device=device)
    whole = run(case, given, "triton")
    for i in range(case.shape[0]):
        single = case.but(shape=(1, *case.shape[1:]))
        part = type(given)(
            given.x[i : i + 1], given.params, None, given.grad_y[i : i + 1], given.grad_weights[i : i + 1]
        )
        row = run(single, part, "triton")
        for name in ("y", "weights", "dx"):
            assert torch.equal(row[name], whole[name][i : i + 1]), name


@algorithms
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("shape", [(24, 40), (20_000,), (20_003,), (96,), (600, 40)], ids=str)
def test_a_batch_has_the_tiles_of_its_rows(shape, dtype, algorithm):
    """Check that a chunk is summed alike alone and in a batch, long rows and heads of unequal length included."""
    spec, found = ALGORITHMS[algorithm], set()
    heads = 4 if not spec.features or shape[0] % 4 == 0 else 1
    for batch in (1, 2, 7):
        x = torch.empty(batch, *shape, dtype=dtype, device="meta")
        p = torch.empty(heads, 1 if spec.features else 3, device="meta")
        made = launches(algorithm, x, p, None, 1, None, False)
        found.add(str([(call.name, call.meta, call.args[-1].strip) for call in made if count_tensors(call.name)]))
    assert len(found) == 1, found


@pytest.mark.parametrize("shape", [(4, 8, 8), (24, 40)], ids=str)
@pytest.mark.parametrize("dim", [0, -1])
@alike
def test_x_that_is_expanded(shape, dim, algorithm, device):
    """Check strides of 0 in x itself, along a batch or the features: a stride of 1 may be any dimension's."""
    if dim == -1 and len(shape) == 2:
        pytest.skip("the axis is the last dimension")
    case = Case(shape, 1, params="one", algorithm=algorithm)
    given = inputs(case, device=device)
    given.x = given.x.narrow(dim, 0, 1).contiguous().expand(shape)
    expected, result = oracle(case, given), run(case, given, "triton")
    for name in expected:
        within(error(result[name], expected[name]), 1e-11, name)


@pytest.mark.parametrize("shape", [(3, 9, 5), (3, 300, 5)], ids=str)
@pytest.mark.parametrize("padded", [{"mask": True}, {"padding": 0.0}], ids=["mask", "padding"])
def test_a_nan_beside_padding_leaves_equal_weights(shape, padded, device):
    """Check that in the stabilised mixture what is padding has as much as the rest, as published."""
    case = Case(shape, 1, algorithm="stable", **padded)
    given = inputs(case, torch.float32, device=device)
    given.x[1, 2] = float("nan")
    found, expected = (run(case, given, backend)["weights"] for backend in ("triton", "eager"))
    within(error(found, expected), 1e-6, "weights")
    assert case.mask or (found[1] - 1 / shape[1]).abs().max() < 1e-6


@algorithms
@pytest.mark.parametrize("shape", [(2, 6, 5), (2, 300, 5), (4, 12)], ids=str)
def test_nan_and_inf_stay_in_their_chunk(shape, algorithm, device):
    case = Case(shape, 1, heads=2, params="one", weights=False, algorithm=algorithm)
    given = inputs(case, torch.float32, device=device)
    clean = run(case, given, "triton")
    half = shape[1] // 2
    for bad in (float("nan"), float("inf")):
        given.x = given.x.clone()
        given.x[(0, 1) if len(shape) == 2 else (0, 1, 2)] = bad
        result = run(case, given, "triton")
        reach = (0, slice(0, half)) if len(shape) == 2 else (0, slice(0, half), 2)
        for name in ("y", "dx"):
            # of the stabilised mixture such a chunk has equal weights
            assert result[name][reach].isnan().all() or (algorithm, name) == ("stable", "y"), name
            unaffected = torch.ones(shape, dtype=torch.bool)
            unaffected[reach] = False
            assert torch.equal(result[name].cpu()[unaffected], clean[name].cpu()[unaffected]), name
        within(error(result["y"].nan_to_num(), run(case, given, "eager")["y"].nan_to_num()), 1e-6, "y")


@algorithms
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("shape", [(2, 6, 5), (2, 301, 5), (3, 13)], ids=str)
def test_what_is_masked_reaches_nothing(shape, residual, algorithm, device):
    """Check that NaN in x and in both gradients at masked positions changes no result; there y is 0 or x, dx is 0 or
    grad_y.
    """
    shape = (*shape[:1], shape[1] // 2 * 2, *shape[2:]) if ALGORITHMS[algorithm].features else shape
    case = Case(shape, 1, heads=2, mask=True, residual=residual, algorithm=algorithm)
    given = inputs(case, torch.float32, device=device)
    clean = run(case, given, "triton")
    hidden = ~given.mask.reshape(*given.mask.shape, *[1] * (len(shape) - 2)).expand(shape)
    for name in ("x", "grad_y", "grad_weights"):
        setattr(given, name, getattr(given, name).masked_fill(hidden, float("nan")))
    result = run(case, given, "triton")
    for name in clean:
        if name in ("y", "dx") and residual:
            assert result[name][hidden].isnan().all()
            assert torch.equal(result[name][~hidden], clean[name][~hidden])
        else:
            assert torch.equal(result[name], clean[name]), name
    assert (clean["weights"][hidden] == 0).all()
    if not residual:
        assert (clean["y"][hidden] == 0).all() and (clean["dx"][hidden] == 0).all()


@alike
@pytest.mark.parametrize("length", [24, 300])
def test_padding_under_a_mask_changes_nothing(length, algorithm, device):
    case = Case((2, length, 5), 1, weights=False, algorithm=algorithm)
    given = inputs(case, device=device)
    y = attend(case, given.x, *given.params, backend="triton")
    padded = torch.cat([given.x, torch.full((2, 9, 5), 7.0, dtype=torch.float64, device=device)], 1)
    mask = torch.arange(length + 9, device=device).expand(2, -1) < length
    z = attend(case, padded, *given.params, mask, backend="triton")
    within(error(z[:, :length], y), 1e-13, "y")


@alike
@pytest.mark.parametrize("shape", [(0, 6, 5), (2, 6, 0), (0, 300, 5), (2, 0, 6)], ids=str)
def test_empty(shape, algorithm, device):
    axis = 2 if shape[1] == 0 else 1
    case = Case(shape, axis, params="one", heads=2, algorithm=algorithm)
    given = inputs(case, torch.float32, device=device)
    with recorded_launches() as names:
        result = run(case, given, "triton")
    assert not names
    assert result["y"].shape == result["dx"].shape == torch.Size(shape)
    assert all((result[name] == 0).all() and result[name].shape == (2, case.columns) for name in case.gradients[1:])


@alike
def test_what_autograd_kept_may_lie_in_memory_otherwise(algorithm, device):
    """Check copies of what was saved, as save_on_cpu makes: chunks of an expanded x are streamed, a copy's are not."""
    case = Case((4, 8, 600), 2, heads=1, algorithm=algorithm)
    given = inputs(case, device=device)
    given.x = given.x[:, :1].contiguous().expand(case.shape)
    expected = oracle(case, given)
    with torch.autograd.graph.saved_tensors_hooks(torch.clone, torch.clone):
        result = run(case, given, "triton")
    for name in expected:
        within(error(result[name], expected[name]), 1e-11, name)


@alike
@pytest.mark.parametrize("backend", ["triton", "eager"])
@pytest.mark.parametrize(
    ("shape", "dtype"),
    [
        ((4, 24, 33), torch.bfloat16),
        ((2, 600, 9), torch.bfloat16),
        ((1, 9000), torch.float32),
        ((2, 70, 9), torch.float64),
        ((2, 90, 9), torch.float64),
    ],
)
def test_saved_for_backward(shape, dtype, backend, algorithm, device):
    """Check that, beyond x, the parameters and the mask, fp32 statistics of at most 5 % of x's bytes and at most four a
    chunk are saved, and nothing without gradients.
    """
    case = Case(shape, 1, mask=True, algorithm=algorithm)
    given = inputs(case, dtype, device=device)
    saved = []

    def call(*tensors):
        with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
            attend(case, *tensors, given.mask, backend=backend)

    call(given.x, *given.params)
    assert not saved
    call(*given.leaves())
    known = {t.untyped_storage().data_ptr() for t in (given.x, *given.params, given.mask)}
    extra = [t for t in saved if t.untyped_storage().data_ptr() not in known]
    assert all(t.dtype == (dtype if dtype == torch.float64 else torch.float32) for t in extra)
    assert sum(t.nbytes for t in extra) <= 0.05 * given.x.nbytes
    assert sum(t.numel() for t in extra) <= 4 * given.x.numel() // shape[1]
    assert bool(extra) == (backend == "triton" and shape not in ((4, 24, 33), (2, 70, 9)))


@algorithms
@pytest.mark.parametrize("mean", [1e2, 1e4])
def test_a_large_mean_costs_no_accuracy(mean, algorithm, device):
    """Check that fp32 results on chunks far from 0 are as good as x itself, since the mean is in two parts."""
    for shape in ((2, 24, 5), (3, 1000), (2, 600, 5)):
        case = Case(shape, 1, offset=mean, algorithm=algorithm)
        given = inputs(case, torch.float32, device=device)
        expected, result = oracle(case, given), run(case, given, "triton")
        for name in ("weights", "y", *case.gradients):
            # the few numbers of a head are sums over all places, whose terms cancel
            cancel = 10 if name.startswith("d_") and not case.spec.features else 1
            within(error(result[name], expected[name]), 2e-5 * cancel, f"{name} of {case}")


@alike
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_dtypes_and_autocast(dtype, algorithm, device):
    """Check that y, weights and dx have x's dtype, gradients of parameters theirs, and that autocast changes no bit."""
    case = Case((2, 6, 5), 1, heads=2, algorithm=algorithm)
    given = inputs(case, dtype, device=device)
    plain = run(case, given, "triton")
    with torch.autocast(device.type, torch.bfloat16):
        cast = run(case, given, "triton")
    for name, t in plain.items():
        assert t.dtype == (given.params[0].dtype if name.startswith("d_") else dtype), name
        assert torch.equal(t, cast[name]), name
    p, q = given.params
    q = q.to(torch.bfloat16).requires_grad_()
    attend(case, given.x, p, q, backend="triton")[0].sum().backward()
    assert q.grad.dtype == torch.bfloat16 and q.grad.stride() == q.stride()


@alike
@pytest.mark.parametrize("layout", LAYOUTS)
def test_memory_order_is_kept(layout, algorithm, device):
    case = Case((2, 6, 5, 4), 1, layout=layout, algorithm=algorithm)
    given = inputs(case, device=device)
    result = run(case, given, "triton")
    like = torch.empty_like(given.x)
    for name in ("y", "weights", "dx"):
        assert result[name].stride() == like.stride(), name


@alike
def test_the_reference_is_what_runs_where_triton_is_asked_for_and_absent(algorithm, device):
    """Check that "eager" launches no kernel and that "triton" runs without the reference."""
    case = Case((2, 24, 33), 1, heads=8, algorithm=algorithm)
    given = inputs(case, torch.float32, device=device)
    with recorded_launches() as names:
        run(case, given, "eager")
    assert not names
    with mock.patch.object(case.spec.reference, "forward", side_effect=AssertionError("the reference ran")):
        run(case, given, "triton")
