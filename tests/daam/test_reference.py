"""The specification, the published implementation, and the lean functions that run in its place."""

import pytest
import torch
from helpers import GOLDEN, Case, check_golden, error, inputs, oracle, run

from daam import reference

CASES = [
    Case((7, 21), 0),
    Case((3, 24, 6), 1, heads=8, mask=True),
    Case((3, 24, 6), 1, heads=2, params="one", residual=True, grads="expanded"),
    Case((4, 3, 12), -1, heads=2, layout="transposed", mask=True, residual=True),
    Case((2, 6, 5, 4), 1, heads=2, layout="channels_last", grads="sliced"),
    Case((3, 2, 5, 3, 4), 2, layout="sliced", mask=True, weights=False),
    Case((2, 3, 8), -1, heads=4, params="one", grads="transposed", weights=False, residual=True),
]


@pytest.mark.parametrize("name", GOLDEN)
def test_published_cases(name):
    check_golden(name, "eager")


@pytest.mark.parametrize("case", CASES, ids=str)
def test_lean_functions_agree_with_the_specification(case):
    given = inputs(case)
    expected, result = oracle(case, given), run(case, given, "eager")
    assert result.keys() == expected.keys()
    for name in expected:
        assert error(result[name], expected[name]) < 1e-12, name


@pytest.mark.parametrize("case", CASES, ids=str)
def test_closed_form_agrees_with_autograd(case):
    given = inputs(case)
    expected, axis = oracle(case, given), case.axis % len(case.shape)
    mask = None if given.mask is None else given.mask.reshape(*given.mask.shape, *[1] * (len(case.shape) - axis - 1))
    grads = reference.density_grad(
        given.grad_y, given.grad_weights, given.x, given.mean_offset, given.c, mask, axis, len(case.shape) - 1, 1e-5,
        case.residual,
    )  # fmt: skip
    for name, grad in zip(("dx", "d_mean_offset", "d_c"), grads, strict=True):
        assert error(grad, expected[name]) < 1e-12, name


@pytest.mark.parametrize("need_x", [False, True])
@pytest.mark.parametrize("need_params", [False, True])
@pytest.mark.parametrize("given_grads", [(True, True), (True, False), (False, True)])
def test_only_what_is_needed(need_x, need_params, given_grads):
    given = inputs(Case((2, 6, 5), 1, heads=2))
    grads = [g if wanted else None for g, wanted in zip((given.grad_y, given.grad_weights), given_grads, strict=True)]
    args = (*grads, given.x, given.mean_offset, given.c, None, 1, 2, 1e-5, True)
    full, lean = reference.density_grad(*args), reference.density_backward(*args, need_x, need_params)
    expected = [*full[: 1 * need_x], *full[1 : 1 + 2 * need_params]]
    assert len(lean) == len(expected)
    for ours, theirs in zip(lean, expected, strict=True):
        assert error(ours, theirs) < 1e-12


@pytest.mark.parametrize(
    ("shape", "axis", "feature_axis", "features"),
    [((2, 4, 3), 1, 2, 3), ((4, 3), 0, 1, 3), ((2, 6), 1, 1, 3), ((3, 2, 4), 2, 0, 3), ((2, 4, 3), 1, 2, 1)],
)
def test_gradcheck_and_gradgradcheck(shape, axis, feature_axis, features):
    """Both orders, of x and the parameters, through y and weights; the closed form is what double backward runs."""
    torch.manual_seed(0)
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    mean_offset = torch.randn(2, features, dtype=torch.float64, requires_grad=True)
    c = (torch.rand(2, features, dtype=torch.float64) + 0.5).requires_grad_()
    mask = torch.rand([size if d <= axis else 1 for d, size in enumerate(shape)]) > 0.2

    def attend(*args):
        return reference.density(*args, mask, axis, feature_axis, 1e-5, True)

    assert torch.autograd.gradcheck(attend, (x, mean_offset, c))
    assert torch.autograd.gradgradcheck(attend, (x, mean_offset, c))
    grads = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for _ in range(2)]

    def differentiate(*args):
        return reference.density_grad(*args, mask, axis, feature_axis, 1e-5, True)

    assert torch.autograd.gradcheck(differentiate, (*grads, x, mean_offset, c))


@pytest.mark.parametrize("mean", [1e2, 1e4])
def test_a_large_mean_costs_no_accuracy(mean):
    case = Case((2, 64, 5), 1, heads=2, offset=mean)
    given = inputs(case, torch.float32)
    expected, result = oracle(case, given), run(case, given, "eager")
    for name in expected:
        assert error(result[name], expected[name]) < 2e-5, name


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_a_constant_chunk_is_finite(dtype):
    """The published code gives NaN here in fp16."""
    case = Case((2, 6, 5), 1, heads=2)
    given = inputs(case, dtype)
    given.x = torch.full((2, 6, 5), 3.0, dtype=dtype)
    for name, t in run(case, given, "eager").items():
        assert t.isfinite().all(), name


def test_what_is_masked_reaches_nothing():
    case = Case((2, 6, 5), 1, heads=2, mask=True)
    given = inputs(case)
    clean = run(case, given, "eager")
    hidden = ~given.mask[..., None].expand(2, 6, 5)
    for name in ("x", "grad_y", "grad_weights"):
        setattr(given, name, getattr(given, name).masked_fill(hidden, float("nan")))
    for name, t in run(case, given, "eager").items():
        assert torch.equal(t, clean[name]), name
    assert all((clean[name][hidden] == 0).all() for name in ("y", "weights", "dx"))
