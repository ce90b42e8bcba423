"""Where results are finite because the mathematics is, on both backends: what fp32 could overflow, or divide by 0."""

import pytest
import torch
from helpers import ALGORITHMS, Case, error, inputs, oracle, run, within

BACKENDS = ["eager", pytest.param("triton", marks=pytest.mark.kernel)]
algorithms = pytest.mark.parametrize("algorithm", ALGORITHMS)
backends = pytest.mark.parametrize("backend", BACKENDS)
BF16, FP32 = (
    pytest.param(dtype, marks=pytest.mark.not_interpreted("fp16, which overflows, shows more"))
    for dtype in (torch.bfloat16, torch.float32)
)
SHAPES = [(2, 6, 5), (3, 12), (2, 260, 3)]


def finite(case, given, backend):
    result = run(case, given, backend)
    for name, t in result.items():
        assert t.isfinite().all(), (str(case), name)
    return result


@algorithms
@backends
@pytest.mark.parametrize("dtype", [torch.float16, BF16, FP32, torch.float64], ids=str)
def test_constant_chunks(dtype, backend, algorithm, device):
    """Check constant chunks, where the published code gives NaN in fp16, since 1e-8 is 0 there."""
    for shape in SHAPES:
        for value in (0.0, 3.0, 100.0 if dtype == torch.float16 else 1e4):
            case = Case(shape, 1, heads=2, algorithm=algorithm)
            given = inputs(case, dtype, device=device)
            given.x = torch.full_like(given.x, value)
            finite(case, given, backend)


@algorithms
@backends
@pytest.mark.parametrize("offset", [1e4, -1e4])
def test_offsets_of_1e4(offset, backend, algorithm, device):
    """Check offsets so large that exp underflows: the mixture, whose weights are relative, tells positions apart."""
    for shape in SHAPES:
        params = "features" if ALGORITHMS[algorithm].features else 1
        case = Case(shape, 1, heads=2, algorithm=algorithm, params=params)
        given = inputs(case, torch.float32, device=device)
        given.params = (torch.full_like(given.params[0], offset), given.params[1])
        result, expected = finite(case, given, backend), oracle(case, given)
        for name in ("y", "weights"):
            within(error(result[name], expected[name]), 1e-5, f"{name} of {case}")


@backends
@pytest.mark.parametrize("ratio", [1.0, 20.0, 300.0, -300.0])
def test_a_mixture_far_from_its_chunk_is_accurate(ratio, backend, device):
    """Check that offsets of many standard deviations, without the clamp, give weights as accurate as the positions'
    distances.
    """
    for shape in SHAPES:
        case = Case(shape, 1, eps=0.0, algorithm="mixture")
        given = inputs(case, torch.float32, device=device)
        given.params = (torch.full_like(given.params[0], ratio), given.params[1] * abs(ratio) ** 0.5)
        result, expected = finite(case, given, backend), oracle(case, given)
        for name in ("y", "weights", "dx"):
            within(error(result[name], expected[name]), 1e-5, f"{name} of {case}")


@backends
@pytest.mark.parametrize("offset", [7.0, -7.0])
def test_a_mixture_far_from_its_chunk_under_the_clamp(offset, backend, device):
    """Check results and gradients of wide Gaussians beyond four standard deviations, whose sum is below eps."""
    for shape in ((2, 9, 3), (1, 140, 2)):
        case = Case(shape, 1, eps=0.15, algorithm="mixture")
        given = inputs(case, device=device)
        given.params = given.params[0] + offset, 6 + given.params[1].abs()
        result, expected = finite(case, given, backend), oracle(case, given)
        assert expected["weights"].sum(1).max() < 0.9
        for name, t in expected.items():
            within(error(result[name], t), 1e-11, f"{name} of {case}")


@backends
@pytest.mark.parametrize("ratio", [1.0, 8.0, 20.0, 300.0, 1e30])
def test_a_stable_mixture_far_from_its_chunk_is_accurate(ratio, backend, device):
    """Check offsets about as far as is clamped, where some positions of a chunk are, and further off, where all are."""
    for shape in SHAPES:
        case = Case(shape, 1, params=3, algorithm="stable")
        given = inputs(case, torch.float32, device=device)
        given.params = (given.params[0].sign() * ratio, given.params[1])
        result, expected = finite(case, given, backend), oracle(case, given)
        for name, most in (("y", 1e-5), ("weights", 1e-5), ("dx", 5e-5)):
            within(error(result[name], expected[name]), most, f"{name} of {case}")


@backends
def test_a_variance_below_the_floor_of_the_gate(backend, device):
    """Check chunks of a standard deviation of 1e-4, which the floor of 1e-3 stands in for: it has no gradient."""
    for shape in SHAPES:
        case = Case(shape, 1, heads=2, algorithm="gate", offset=0.0)
        given = inputs(case, device=device)
        given.x *= 1e-4
        result, expected = finite(case, given, backend), oracle(case, given)
        for name, wanted in expected.items():
            within(error(result[name], wanted), 1e-10, f"{name} of {case}")


@backends
@pytest.mark.parametrize("c", [-1e30, -1.0, 0.0, 0.01, 10.0, 1e30])
def test_a_stable_mixture_of_every_c(c, backend, device):
    """Check c past both of its limits, and at them, and a position that clamps beside others that do not."""
    for shape in SHAPES:
        case = Case(shape, 1, heads=2, algorithm="stable")
        given = inputs(case, torch.float32, device=device)
        given.params = (given.params[0] * 0 + 0.1, torch.full_like(given.params[1], c))
        given.x[0, 0] = 1e4
        result, expected = finite(case, given, backend), oracle(case, given)
        for name in ("y", "weights"):
            within(error(result[name], expected[name]), 1e-3 if c < 1 else 1e-5, f"{name} of {case}")


@backends
def test_a_position_that_clamps_for_the_offsets_alone(backend, device):
    """Check one within ten standard deviations of the mean, and further from a Gaussian that is within four."""
    case = Case((1, 300), 1, params=2, algorithm="stable")
    given = inputs(case, device=device)
    given.x[0, 7], given.params = 11.0, (given.params[0] - 3, given.params[1] + 2)
    result, expected = finite(case, given, backend), oracle(case, given)
    u = (given.x - given.x.mean()) / given.x.std()
    assert u.abs().max() < 10 < (u - given.params[0].min() / given.x.std()).abs().max()
    for name, t in expected.items():
        within(error(result[name], t), 1e-11, name)


@backends
@pytest.mark.parametrize("limit", [0.01, 10.0])
def test_gradients_of_a_stable_mixture_at_a_limit_of_c(limit, backend, device):
    """Check that a c which is a limit is not clamped: it has the gradient of one that is within. Positions are nearly
    one standard deviation from the mean, all of them, so that a narrow Gaussian has more than one.
    """
    case = Case((2, 10, 3), 1, params=1, algorithm="stable")
    given = inputs(case, device=device)
    given.x[:, ::2], given.x[:, 1::2] = 1 + 1e-4 * given.x[:, ::2], -1 + 1e-4 * given.x[:, 1::2]
    given.params = 0 * given.params[0], torch.full_like(given.params[1], limit)
    result, expected = finite(case, given, backend), oracle(case, given)
    assert expected["d_c"].abs().min() > 0
    within(error(result["d_c"], expected["d_c"]), 1e-9, "d_c")


@algorithms
@backends
def test_a_variance_of_1e_8(backend, algorithm, device):
    for shape in SHAPES:
        case = Case(shape, 1, heads=2, algorithm=algorithm, offset=0.0)
        given = inputs(case, torch.float32, device=device)
        given.x = given.x * 1e-4
        given.params = (given.params[0] * 1e-4, given.params[1])
        result, expected = finite(case, given, backend), oracle(case, given)
        for name in ("y", "weights", "dx"):
            within(error(result[name], expected[name]), 1e-4, f"{name} of {case}")


@algorithms
@backends
def test_a_spread_far_below_the_mean(backend, algorithm, device):
    """Check that what a mean of 1e5 is short of, as much as a tenth of the spread, is no part of the variance."""
    # eager has another path past 8192 elements; kernels stream 300 positions
    for shape in ((2, 21, 5), (2, 4200) if backend == "eager" else (1, 300, 2)):
        case = Case(shape, 1, algorithm=algorithm, offset=0.0)
        given = inputs(case, torch.float32, device=device)
        given.x, given.params = 1e5 + 0.03 * given.x, (0.03 * given.params[0], given.params[1])
        result, expected = finite(case, given, backend), oracle(case, given)
        for name in ("y", "weights", "dx"):
            within(error(result[name], expected[name]), 1e-5, f"{name} of {case}")


@backends
@pytest.mark.parametrize("scale", [1e-2, 1e-4, 1e-8, 1e-18, 1e-30])
def test_a_mixture_of_c_near_0(scale, backend, device):
    """Check that all weight is on the position nearest to the centre, also where 1/c² overflows float32, at 1e-20."""
    for shape in SHAPES:
        case = Case(shape, 1, heads=2, algorithm="mixture", weights=False)
        given = inputs(case, torch.float32, device=device)
        given.params = (given.params[0] * 0 + 0.1, torch.full_like(given.params[1], scale))
        y = run(case, given, backend)["y"]
        assert y.isfinite().all()
        if scale < 1e-3:
            within(error(y, oracle(case, given)["y"]), 1e-5, f"y of {case}")
        if scale > 1e-12:
            finite(case, given, backend)


@backends
@pytest.mark.parametrize("c", [1e-2, 1e-4, -1.0])
def test_density_of_c_near_0_and_negative(c, backend, device):
    """Check that c near 0 closes everything but the centre, and that with c below 0 weights grow with the distance, as
    published.
    """
    for shape in SHAPES:
        case = Case(shape, 1, heads=2, params="one", algorithm="density")
        given = inputs(case, torch.float32, device=device)
        given.params = (given.params[0] * 0, torch.full_like(given.params[1], c))
        result, expected = finite(case, given, backend), oracle(case, given)
        within(error(result["y"], expected["y"]), 1e-3 if c > 0 else 1e-4, f"y of {case}")


@backends
@pytest.mark.parametrize("log_sigma", [-90.0, -16.0, 0.0, 19.0, 30.0, 90.0])
def test_a_gate_of_every_width(log_sigma, backend, device):
    """Check softplus from its floor to where it is the identity."""
    for shape in SHAPES:
        case = Case(shape, 1, heads=2, algorithm="gate")
        given = inputs(case, torch.float32, device=device)
        given.params = (given.params[0], torch.full_like(given.params[1], log_sigma))
        result, expected = finite(case, given, backend), oracle(case, given)
        tolerance = 1e-2 if log_sigma < -1 else 1e-5  # Gaussians 1e-3 wide
        for name in ("y", "weights"):
            within(error(result[name], expected[name]), tolerance, f"{name} of {case}")


@algorithms
@backends
def test_one_valid_position(backend, algorithm, device):
    """Check that the variance of one position is 0, unbiased too, and its gradient that of a constant chunk."""
    for shape in SHAPES:
        case = Case(shape, 1, heads=2, algorithm=algorithm)
        given = inputs(case, device=device)
        given.mask = torch.zeros(shape[:2], dtype=torch.bool, device=device)
        given.mask[:, 1] = True
        result, expected = finite(case, given, backend), oracle(case, given)
        for name, t in expected.items():
            within(error(result[name], t), 1e-11, f"{name} of {case}")


@algorithms
@backends
def test_eps_0_and_chunks_of_nothing(backend, algorithm, device):
    """Check that chunks without a valid position give zeros, never NaN, in results and gradients, whatever eps is, and
    so do the rims of tiles.
    """
    for shape, heads, mask in (((3, 5), 1, False), ((3, 6), 1, False), ((3, 6, 5), 2, True), ((2, 80, 3), 1, True)):
        case = Case(
            shape,
            1,
            heads,
            "features" if shape == (3, 6) else "one",
            mask=mask,
            eps=None if ALGORITHMS[algorithm].eps is None else 0.0,
            algorithm=algorithm,
        )
        given = inputs(case, device=device)
        result, expected = finite(case, given, backend), oracle(case, given)
        for name, t in expected.items():
            within(error(result[name], t), 1e-10, f"{name} of {case}")
