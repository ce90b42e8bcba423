"""Outputs and gradients of calls that hypothesis draws against float64 autograd of the formula."""

import math

import pytest
import torch
from drawn import (
    GAUSSIANS,
    LENGTHS,
    LONGER,
    REGIMES,
    SEEDS,
    SIZES,
    Call,
    calls,
    cases,
    find_limit,
    on_backends,
    regime,
    sized,
)
from helpers import (
    ALGORITHMS,
    SHARED,
    VIEWS,
    attend,
    bound,
    find_scales,
    inputs,
    oracle,
    recorded_launches,
    run,
    strided,
    within,
)
from hypothesis import strategies as st

import daam

DRAWS = 8  # of which eager's worst error is the measure of fp32, fp16 and bf16, as of `helpers.bound`
DTYPES = torch.float16, torch.bfloat16, torch.float32


def reorder(t: torch.Tensor) -> torch.Tensor:
    """Return a copy of a tensor with gaps between its elements, and its dimensions in the other order in memory."""
    backwards = range(t.dim())[::-1]
    return t.permute(*backwards).repeat_interleave(2, -1)[..., ::2].permute(*backwards)


def draw_inputs(call: Call, dtype: torch.dtype, seed: int, device):
    """Return the inputs of a call, without the gradients that are not upstream; of odd seeds parameters and mask are
    not contiguous.
    """
    given = inputs(call.case, dtype, seed, device)
    if seed % 2:
        given.params = tuple(map(reorder, given.params))
        given.mask = None if given.mask is None else reorder(given.mask)
    if call.upstream == "y":
        given.grad_weights = None
    if call.upstream == "weights":
        given.grad_y = None
    return given


def difference(result: torch.Tensor, expected: torch.Tensor) -> float:
    assert result.shape == expected.shape
    return (result.cpu().double() - expected).abs().max().item()


def check_kernels(call: Call, names: list[str]) -> None:
    """Check that what a call launched is what its regime says, and no fallback."""
    algorithm = call.case.algorithm
    if call.regime in ("streamed", "strips"):
        assert "forward_streamed" in names and f"{algorithm}_forward" not in names
        assert f"{algorithm}_sums" in names and f"{algorithm}_backward" not in names
    elif call.regime == "whole":
        assert {"take_steps", "forward_streamed"} & set(names)
    else:
        assert {f"{algorithm}_forward", "forward_streamed"} & set(names)
        assert {f"{algorithm}_{word}" for word in ("backward", "sums")} & set(names)
    assert ("param_gradients" in names) == any(call.needs[1:])


def steps(t: torch.Tensor) -> list[int]:
    """Return the strides of dimensions that have more than one element: others mean nothing."""
    return [step for step, size in zip(t.stride(), t.shape, strict=True) if size > 1]


def run_call(call: Call, given, backend: str) -> dict[str, torch.Tensor]:
    """Return the results of a call, after a look at their dtypes, their memory, and which kernels ran."""
    with regime(call.regime) if backend == "triton" else recorded_launches(), recorded_launches() as names:
        results = run(call.case, given, backend, call.needs)
    if backend == "triton":
        check_kernels(call, names)
    needed = [name for name, need in zip(call.case.gradients, call.needs, strict=True) if need]
    assert list(results) == ["y", *["weights"] * call.case.weights, *needed]
    for name, t in results.items():
        assert t.dtype == (given.params[0] if name.startswith("d_") else given.x).dtype, name
        if call.case.layout not in SHARED and not name.startswith("d_"):
            assert steps(t) == steps(torch.empty_like(given.x)), name
    return results


def agree(call: Call, backend: str, device="cpu") -> None:
    """Compare a call in float64 with the formula."""
    given = draw_inputs(call, torch.float64, call.seed, device)
    expected = oracle(call.case, given)
    scales = find_scales(expected)
    for name, t in run_call(call, given, backend).items():
        within(difference(t, expected[name]) / scales[name], find_limit(call.case), name)


@sized(250, 5000)
def test_eager_agrees_with_float64(examine):
    examine(lambda call: agree(call, "eager"), calls("eager", lengths=LONGER))


@pytest.mark.kernel
@pytest.mark.parametrize("algorithm", ALGORITHMS)
@sized(4, 80)
def test_kernels_agree_with_float64(examine, algorithm, device):
    # of rows in fp64 no program takes all steps
    regimes = [name for name in REGIMES if name != "whole"]
    examine(
        lambda call: agree(call, "triton", device), calls("triton", regimes, algorithms=[algorithm], lengths=LONGER)
    )


def agree_as_eager(call: Call, dtype: torch.dtype, device="cpu") -> None:
    """Compare kernels with float64 by the rule of `helpers.bound`, of eager's worst of DRAWS draws."""
    draws = [draw_inputs(call, dtype, seed, device) for seed in range(DRAWS)]
    expected = [oracle(call.case, given) for given in draws]
    scales = {name: max(map(find_scales, expected), key=lambda each: each[name])[name] for name in expected[0]}
    eager = [run_call(call, given, "eager") for given in draws]
    k = call.seed % DRAWS
    for name, t in run_call(call, draws[k], "triton").items():
        worst = max(difference(e[name], x[name]) for e, x in zip(eager, expected, strict=True)) / scales[name]
        within(difference(t, expected[k][name]) / scales[name], bound(call.case, name, dtype, worst), name)


@pytest.mark.kernel
@pytest.mark.parametrize("algorithm", ALGORITHMS)
@sized(1, 20)
def test_kernels_are_as_exact_as_eager(examine, algorithm, device):
    def prove(call, dtype):
        agree_as_eager(call, dtype, device)

    k = list(ALGORITHMS).index(algorithm) % len(DTYPES)  # the first example's
    # not of two positions, which whatever x are as far from their mean: gradients are what rounding leaves (stable
    # mixture, (4, 2), fp16: up to 2.5e-5 of the largest where eager has 3.4e-6)
    lengths = [n for n in LENGTHS if n > 2]
    drawn = calls("triton", tuple(REGIMES), algorithms=[algorithm], lengths=lengths)
    examine(prove, drawn, st.sampled_from(DTYPES[k:] + DTYPES[:k]))


# --- What fuses several steps -------------------------------------------------------------------------
@on_backends(30, 2)
def test_a_block_equals_its_layers(examine, backend, device):
    """Check `density_block`, which recomputes its layers and on kernels fuses them, against a call a layer."""

    def prove(case, gaussians, seed):
        draws = [inputs(case.but(params=n), seed=seed + 99 * i, device=device) for i, n in enumerate(gaussians)]
        given, n = draws[0], len(draws)
        results, names = [], []
        for fused in (True, False):
            leaves = [t.detach().requires_grad_() for t in (given.x, *(p for one in draws for p in one.params))]
            y, params = leaves[0], leaves[1:]
            if fused:
                options = {"norm_axis": case.axis, "eps": case.eps_or_default, "mask": given.mask}
                with recorded_launches() as names:
                    y = daam.density_block(
                        y, params[::2], params[1::2], residual=case.residual, padding_value=case.padding,
                        stable=case.algorithm == "stable", recompute=True, backend=backend, **options,
                    )  # fmt: skip
            else:
                for p, q in zip(params[::2], params[1::2], strict=True):
                    y = attend(case, y, p, q, given.mask, backend=backend)
            results.append((y, *torch.autograd.grad(y, leaves, given.grad_y)))
        assert backend == "eager" or names == ["forward_layers"] * math.ceil(n / 4)  # four in one launch
        scale = results[1][1].abs().max().item()  # of dx, as in `find_scales`
        for i, (found, expected) in enumerate(zip(*results, strict=True)):
            largest = max(expected.abs().max().item(), scale if i > 1 else 0) or 1.0
            within((found - expected).abs().max().item() / largest, 1e-10 * n, f"result {i}")

    drawn = cases(backend, ("mixture", "stable"), weights=False, clamps=False)
    examine(prove, drawn, st.lists(GAUSSIANS, min_size=2, max_size=4), SEEDS)


@on_backends(30, 2)
def test_the_gate_equals_its_pieces(examine, backend, device):
    """Check `DensityGate`, fused on kernels, against a convolution, `density_gate`'s weights and a product."""

    def prove(shape, layouts, gaussians, masked, seed):
        generator = torch.Generator().manual_seed(seed)
        (batch, channels, length), dtype = shape, torch.float64
        sizes = (shape, shape, (batch, 1, length))
        x, *grads = (strided(s, one, dtype, generator, device) for s, one in zip(sizes, layouts, strict=True))
        mask = (torch.rand(batch, length, generator=generator) > 0.3).to(device) if masked else None
        module = daam.DensityGate(channels, gaussians, backend=backend, dtype=dtype)
        for p in module.parameters():
            p.data = 0.5 * torch.randn(p.shape, generator=generator, dtype=dtype)
        leaves = [x.detach().requires_grad_(), *module.to(device).parameters()]
        with recorded_launches() as names:
            found = module(leaves[0], mask=mask)
            found += torch.autograd.grad(found, leaves, grads)
        assert backend == "eager" or {"gated_project", "gated_forward", "gated_backward"} <= set(names)
        valid = leaves[0] if mask is None else leaves[0].masked_fill(~mask.unsqueeze(1), 0)
        where = None if mask is None else mask.unsqueeze(1)
        offsets, log_sigma = module.gaa.mean_offsets, module.gaa.log_sigma
        weights = daam.density_gate(
            module.to_attn(valid), offsets, log_sigma, norm_axis=2, mask=where, return_weights=True, backend="eager"
        )[1]
        y = leaves[0] * (1 + module.alpha * weights)
        expected = (y, weights, *torch.autograd.grad((y, weights), leaves, grads))
        scale = expected[2].abs().max().item()
        for i, (result, wanted) in enumerate(zip(found, expected, strict=True)):
            # the mean takes the bias away: its gradient is what rounding leaves of 0
            largest = max(wanted.abs().max().item(), scale if i > 2 else 0) or 1.0
            within((result - wanted).abs().max().item() / largest, 1e-11, f"result {i}")

    shapes = st.tuples(st.sampled_from(SIZES[:3]), st.sampled_from(SIZES), st.sampled_from(LENGTHS))
    layouts = st.tuples(*[st.sampled_from(VIEWS)] * 3)
    examine(prove, shapes, layouts, st.integers(1, 5), st.booleans(), SEEDS)
