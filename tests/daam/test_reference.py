"""The specification, the published implementations, and the lean functions that run in its place."""

import math
from unittest import mock

import pytest
import torch
from helpers import ALGORITHMS, GOLDEN, Case, broadcast, check_golden, error, inputs, oracle, run, within

from daam.reference import chunks

algorithms = pytest.mark.parametrize("algorithm", ALGORITHMS)
DENSITY = [
    Case((7, 21), 0),
    Case((3, 24, 6), 1, heads=8, mask=True),
    Case((3, 24, 6), 1, heads=2, params="one", residual=True, grads="expanded"),
    Case((4, 3, 12), -1, heads=2, layout="transposed", mask=True, residual=True),
    Case((2, 6, 5, 4), 1, heads=2, layout="channels_last", grads="sliced"),
    Case((3, 2, 5, 3, 4), 2, layout="sliced", mask=True, weights=False),
    Case((2, 3, 8), -1, heads=4, params="one", grads="transposed", weights=False, residual=True),
]
OTHERS = [
    Case((7, 21), 0, params=1),
    Case((3, 25, 6), 1, heads=8, mask=True, params=8),
    Case((3, 24, 6), 1, heads=2, residual=True, grads="expanded"),
    Case((4, 3, 13), -1, heads=2, layout="transposed", mask=True, residual=True),
    Case((2, 7, 5, 4), 1, heads=2, layout="channels_last", grads="sliced"),
    Case((3, 2, 5, 3, 4), 2, layout="sliced", mask=True, weights=False),
]
MIXTURE = [
    Case((4, 13, 9), 1, heads=3, eps=0.15),
    Case((4, 33), 1, heads=2, eps=0.15, mask=True, residual=True),
    Case((3, 13, 9), 1, heads=2, padding=0.0, residual=True),
    Case((3, 33), 1, heads=2, padding=-1.5, eps=0.15, layout="sliced"),
    Case((3, 20, 5), 1, heads=3, eps=0.0, mask=True),
]
STABLE = [
    Case((4, 13, 9), 1, heads=3, clamps=True),
    Case((4, 33), 1, heads=2, clamps=True, mask=True, residual=True, layout="sliced"),
    Case((3, 13, 9), 1, heads=2, padding=0.0, residual=True),
    Case((3, 33), 1, heads=2, padding=-1.5, clamps=True),
    Case((3, 260), 1, params=1, clamps=True, eps=0.1),
]
CASES = [
    *DENSITY,
    *(case.but(algorithm=name) for name, spec in ALGORITHMS.items() if not spec.features for case in OTHERS),
    *(case.but(algorithm="mixture") for case in MIXTURE),
    *(case.but(algorithm="stable") for case in STABLE),
]


def arguments(case, given):
    """Return the arguments of a function of the reference that follow the gradients."""
    settings = (case.positive_axis, *case.spec.settings(case), case.residual)
    return given.x, *given.params, broadcast(given.mask, case), *settings


def precision(case):
    """Return the largest error of what agrees; the formula's log w is up to 5e5 where c is clamped to 0.01."""
    return 1e-11 if case.clamps else 1e-12


@pytest.fixture(params=["as it is", "not tiny"], autouse=True)
def size(request):
    """Run all on the path of a tiny x, which cases are, and on that of others."""
    with mock.patch.object(chunks, "TINY", chunks.TINY if request.param == "as it is" else 0):
        yield


@pytest.mark.parametrize("name", GOLDEN)
def test_published_cases(name):
    check_golden(name, "eager")


@pytest.mark.parametrize("sliced", [False, True])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_lean_functions_agree_with_the_specification(case, sliced):
    given = inputs(case)
    with mock.patch.object(chunks, "SLICE", 16 if sliced else 2**19):
        expected, result = oracle(case, given), run(case, given, "eager")
    assert result.keys() == expected.keys()
    for name in expected:
        within(error(result[name], expected[name]), precision(case), name)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_closed_form_agrees_with_autograd(case):
    given = inputs(case)
    expected = oracle(case, given)
    grads = case.spec.reference.gradient(given.grad_y, given.grad_weights, *arguments(case, given))
    for name, grad in zip(case.gradients, grads, strict=True):
        within(error(grad, expected[name]), precision(case), name)


@pytest.mark.parametrize("padding", [None, 0.0])
@pytest.mark.parametrize("eps", [1e-8, 0.15, 1.0])
def test_both_sides_of_the_clamp_are_tested(eps, padding):
    """Check that the cases above hold chunks whose weights sum to 1, to less, and both."""
    case = Case((4, 13, 9), 1, heads=3, eps=eps, padding=padding, algorithm="mixture")
    weights = run(case, inputs(case), "eager")["weights"]
    free = torch.cat([weights[:, i : i + n].sum(1) > 1 - 1e-9 for i, n in ((0, 4), (4, 4), (8, 5))])
    low, high = {1e-8: (0.95, 1.0), 0.15: (0.05, 0.95), 1.0: (0.0, 0.0)}[eps]
    assert low <= free.double().mean() <= high


@algorithms
@pytest.mark.parametrize("need_x", [False, True])
@pytest.mark.parametrize("need_params", [False, True])
@pytest.mark.parametrize("given_grads", [(True, True), (True, False), (False, True)])
def test_only_what_is_needed(need_x, need_params, given_grads, algorithm):
    case = Case((2, 6, 5), 1, heads=2, residual=True, algorithm=algorithm)
    given = inputs(case)
    grads = [g if wanted else None for g, wanted in zip((given.grad_y, given.grad_weights), given_grads, strict=True)]
    args = (*grads, *arguments(case, given))
    full, lean = case.spec.reference.gradient(*args), case.spec.reference.backward(*args, need_x, need_params)
    assert [g is not None for g in lean] == [need_x, need_params, need_params]
    for name, result, exact in zip(case.gradients, lean, full, strict=True):
        if result is not None:
            within(error(result, exact), 1e-12, name)


@pytest.mark.parametrize(
    ("shape", "axis", "feature_axis", "features"),
    [((2, 4, 3), 1, 2, 3), ((4, 3), 0, 1, 3), ((2, 6), 1, 1, 3), ((3, 2, 4), 2, 0, 3), ((2, 4, 3), 1, None, 1)],
)
def test_gradcheck_and_gradgradcheck_of_density(shape, axis, feature_axis, features):
    settings = (feature_axis, 1e-5)
    check_gradients(ALGORITHMS["density"], shape, axis, features, settings, torch.rand(2, features) + 0.5)


@pytest.mark.parametrize("eps", [1e-8, 0.1])
@pytest.mark.parametrize(("shape", "axis"), [((2, 5, 2), 1), ((5, 2), 0), ((2, 9), 1)])
def test_gradcheck_and_gradgradcheck_of_mixture(shape, axis, eps):
    for padding in (None, 0.0):
        q = torch.rand(2, 3) + 0.5
        check_gradients(ALGORITHMS["mixture"], shape, axis, 3, (eps, padding), q, mask=padding is None)


@pytest.mark.parametrize(
    ("shape", "axis", "far", "padding"), [((2, 5, 2), 1, 12, None), ((5, 2), 0, 1, None), ((2, 9), 1, 12, 0.0)]
)
def test_gradcheck_and_gradgradcheck_of_stable(shape, axis, far, padding):
    """Check what clamps too, since it is far."""
    q = torch.tensor([[0.6, 0.8, 12.0], [1.5, 0.7, 1.1]])
    check_gradients(ALGORITHMS["stable"], shape, axis, 3, (1e-8, padding), q, mask=padding is None, far=far)


@pytest.mark.parametrize(("shape", "axis"), [((2, 7, 3), 1), ((5, 2), 0), ((2, 9), 1)])
def test_gradcheck_and_gradgradcheck_of_gate(shape, axis):
    check_gradients(ALGORITHMS["gate"], shape, axis, 3, (), torch.randn(2, 3))


def check_gradients(spec, shape, axis, columns, settings, q, mask=True, far=1):
    """Check first and second derivatives for x and the parameters, through y and weights; the closed form is what
    double backward runs. far: size of the offsets.
    """
    torch.manual_seed(0)
    x = torch.randn(shape, dtype=torch.float64)
    if not mask:
        x[(0, *(0 for _ in shape[1:]))] = 0.0  # holds the padding value, and numerical derivatives would leave it
    x.requires_grad_(mask)
    p, q = (far * torch.randn(2, columns, dtype=torch.float64)).requires_grad_(), q.double().requires_grad_()
    valid = torch.rand([size if d <= axis else 1 for d, size in enumerate(shape)]) > 0.2 if mask else None
    options = (valid, axis, *settings, True)

    def attend(*args):
        return spec.reference.formula(*args, *options)

    assert torch.autograd.gradcheck(attend, (x, p, q))
    assert torch.autograd.gradgradcheck(attend, (x, p, q), fast_mode=True)
    grads = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for _ in range(2)]

    def differentiate(*args):
        return spec.reference.gradient(*args, *options)

    assert torch.autograd.gradcheck(differentiate, (*grads, x, p, q))


@algorithms
@pytest.mark.parametrize("mean", [1e2, 1e4])
def test_a_large_mean_costs_no_accuracy(mean, algorithm):
    case = Case((2, 64, 5), 1, heads=2, offset=mean, algorithm=algorithm)
    given = inputs(case, torch.float32)
    expected, result = oracle(case, given), run(case, given, "eager")
    for name in expected:
        within(error(result[name], expected[name]), 2e-5, name)


@algorithms
def test_what_is_masked_reaches_nothing(algorithm):
    case = Case((2, 6, 5), 1, heads=2, mask=True, algorithm=algorithm)
    given = inputs(case)
    clean = run(case, given, "eager")
    hidden = ~given.mask[..., None].expand(2, 6, 5)
    for name in ("x", "grad_y", "grad_weights"):
        setattr(given, name, getattr(given, name).masked_fill(hidden, float("nan")))
    for name, t in run(case, given, "eager").items():
        assert torch.equal(t, clean[name]), name
    assert all((clean[name][hidden] == 0).all() for name in ("y", "weights", "dx"))


def test_the_mixture_is_the_product_of_its_gaussians():
    """Compare the formula with the definition in float64, where nothing underflows."""
    case = Case((2, 9, 3), 1, params=4, algorithm="mixture", eps=1e-3)
    given = inputs(case)
    x, (offsets, c) = given.x, given.params
    z = (x[..., None] - x.mean(1, keepdim=True)[..., None] - offsets[0]) / (x.var(1, keepdim=True) + 1e-3).sqrt()[
        ..., None
    ]
    product = (torch.exp(-(z**2) / (2 * c[0] ** 2)) / torch.sqrt(2 * math.pi * c[0] ** 2)).prod(-1)
    expected = product / product.sum(1, keepdim=True).clamp(min=1e-3)
    within(error(run(case, given, "eager")["weights"], expected), 1e-13, "weights")


@pytest.mark.parametrize(("size", "heads"), [(24, 8), (23, 4), (15, 8), (7, 1), (5, 5), (0, 1)])
def test_parts(size, heads):
    """Check that parts hold every position and head once, in order, and that the last head takes the remainder."""
    pieces = chunks.parts(size, heads)
    assert [p.start for p in pieces] == [0, (heads - 1) * (size // heads)][: len(pieces)]
    assert sum(p.length for p in pieces) == size and sum(p.heads for p in pieces) == heads
    assert all(p.length % p.heads == 0 for p in pieces) and len(pieces) == (1 if size % heads == 0 else 2)
    assert pieces[-1].length // pieces[-1].heads == size - (heads - 1) * (size // heads)
    x = torch.arange(2 * size).reshape(2, size)
    assert torch.equal(torch.cat([p.positions_of(x, 1) for p in pieces], 1), x)
    params = torch.arange(heads)
    assert torch.equal(torch.cat([p.heads_of(params, 0) for p in pieces]), params)
