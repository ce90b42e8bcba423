"""Layers of one launch (`kernels/layers.py`) against the same layers one by one, by the formula in float64."""

from dataclasses import dataclass, replace
from unittest import mock

import pytest
import torch
from helpers import EPS, SEEDS, Case, error, inputs, recorded_launches, within

pytest.importorskip("triton")

import daam
from daam.kernels import tiles
from daam.kernels.host import plan

FUSED = ["forward_layers", "backward_layers", "layer_gradients"]


@dataclass(frozen=True)
class Layers:
    """Hold a call of layers: the Gaussians of each, and what a case says of x, masks and padding."""

    case: Case
    gaussians: tuple[int, ...]
    residual: bool = True

    def __str__(self) -> str:
        return f"{self.case}-{'_'.join(map(str, self.gaussians))}" + ("" if self.residual else "-plain")


def layers(algorithm, shape, axis, heads, gaussians, residual=True, **options):
    return Layers(Case(shape, axis, heads, weights=False, algorithm=algorithm, **options), gaussians, residual)


CASES = [
    layers(algorithm, *args, **options)
    for algorithm in ("mixture", "stable")
    for args, options in [
        (((3, 43), 1, 4, (5, 5, 5)), {}),
        (((2, 37, 9), 1, 3, (4, 1, 2, 8)), {"mask": True}),
        (((2, 3, 20), 2, 2, (6, 7)), {"mask": True, "residual": False}),
        (((2, 5, 66), 2, 2, (2, 3)), {"padding": 1.5, "grads": "transposed"}),
        (((2, 30, 5), 1, 1, (4, 2)), {"padding": 0.0, "residual": False, "layout": "transposed"}),
        (((2, 9, 37), 1, 2, (1, 2, 3, 4, 8)), {"layout": "channels_last", "grads": "expanded"}),
        (((2, 12, 18), -1, 1, (3,) * 4), {"mask": True, "layout": "sliced", "grads": "sliced"}),
    ]
] + [
    layers("stable", (2, 130), 1, 2, (4, 2, 3), clamps=True, padding=0.0),
    layers("stable", (2, 30, 3), 1, 1, (2, 4), clamps=True, mask=True),
]


def draw(one, dtype, seed=0, device="cpu"):
    """Return the inputs of the case, and mean_offsets and c of every layer."""
    given = [
        inputs(replace(one.case, params=n), dtype, seed + 100 * layer, device) for layer, n in enumerate(one.gaussians)
    ]
    return given[0], [g.params[0] for g in given], [g.params[1] for g in given]


def attend(one, given, ps, qs, backend, recompute, dtype=None):
    """Return y, the weights and all gradients by name; dtype: another than that of the inputs."""

    def leaf(t):
        return t.detach().to(dtype or t.dtype).requires_grad_()

    x, ps, qs = leaf(given.x), [leaf(p) for p in ps], [leaf(q) for q in qs]
    y, weights = daam.density_block(
        x, ps, qs, norm_axis=one.case.axis, eps=one.case.eps_or_default, padding_value=one.case.padding,
        mask=given.mask, residual=one.residual, stable=one.case.algorithm == "stable", recompute=recompute,
        return_weights=True, backend=backend,
    )  # fmt: skip
    grads = torch.autograd.grad(y, (x, *ps, *qs), given.grad_y.to(y.dtype))
    names = ["dx", *(f"d_{name}{i}" for name in ("mean_offsets", "c") for i in range(len(ps)))]
    found = {"y": y} | {f"weights{i}": w for i, w in enumerate(weights)} | dict(zip(names, grads, strict=True))
    return {name: t.detach() for name, t in found.items()}


@pytest.mark.kernel
@pytest.mark.parametrize("one", CASES, ids=str)
def test_fused_layers_equal_layers_one_by_one(one, device):
    given, ps, qs = draw(one, torch.float64, device=device)
    with recorded_launches() as names:
        found = attend(one, given, ps, qs, "triton", recompute=True)
    n_runs = -(-len(ps) // 4)
    assert sorted(names) == sorted(FUSED * n_runs)
    for name, expected in attend(one, given, ps, qs, "eager", recompute=False).items():
        within(error(found[name].nan_to_num(7.0), expected.nan_to_num(7.0)), 1e-11, name)
        assert found[name].stride() == expected.stride() or not name.startswith(("y", "w")), name


@pytest.mark.kernel
@pytest.mark.parametrize("algorithm", ["mixture", "stable"])
def test_programs_that_take_several_tiles(algorithm, device):
    """Check sums for the parameters of programs that loop, where small tensors would have a program for every tile."""
    one = layers(algorithm, (80, 6), 1, 1, (2, 3), mask=True)
    given, ps, qs = draw(one, torch.float64, device=device)
    with mock.patch.multiple(tiles, MAX_PROGRAMS=2, FILL=1):
        plan.cache_clear()
        found = attend(one, given, ps, qs, "triton", recompute=True)
    plan.cache_clear()
    for name, expected in attend(one, given, ps, qs, "eager", recompute=False).items():
        within(error(found[name], expected), 1e-11, name)


@pytest.mark.kernel
@pytest.mark.parametrize(
    ("algorithm", "dtype"),
    [
        ("mixture", torch.float32),
        pytest.param("stable", torch.bfloat16, marks=pytest.mark.slow),
        pytest.param("mixture", torch.bfloat16, marks=pytest.mark.slow),
        pytest.param("stable", torch.float32, marks=pytest.mark.slow),
    ],
)
def test_errors_of_fused_layers(algorithm, dtype, device):
    """Check that they are at most those of layers one by one, which round between layers, by the rule of `bound`."""
    one = layers(algorithm, (2, 8, 10), 1, 2, (5, 2, 3))
    worst: dict[str, list[float]] = {}
    for seed in range(SEEDS):
        given, ps, qs = draw(one, dtype, seed, device)
        exact = attend(one, given, ps, qs, "eager", recompute=False, dtype=torch.float64)
        fused, plain = (attend(one, given, ps, qs, name, recompute=True) for name in ("triton", "eager"))
        for name, expected in exact.items():
            pair = worst.setdefault(name, [0.0, 0.0])
            pair[:] = (max(old, error(t[name], expected)) for old, t in zip(pair, (fused, plain), strict=True))
    for name, (fused, plain) in worst.items():
        eps = EPS[torch.float32 if name.startswith("d_") else dtype]
        if dtype == torch.bfloat16 and not name.startswith("d_"):
            eps *= 2  # the interpreter truncates
        within(fused, 2 * (plain + 2 * eps * (20**0.5 if name.startswith("d_") else 1)), name)


@pytest.mark.kernel
@pytest.mark.parametrize("algorithm", ["mixture", "stable"])
def test_gradients_that_nobody_needs(algorithm, device):
    """Check that frozen parameters, or an x that requires no grad, cost no launch and get None."""
    one = layers(algorithm, (2, 20, 3), 1, 2, (3, 2))
    given, ps, qs = draw(one, torch.float64, device=device)
    expected = attend(one, given, ps, qs, "eager", recompute=False)
    stable = algorithm == "stable"
    x = given.x.clone().requires_grad_()
    with recorded_launches() as names:
        daam.density_block(x, ps, qs, stable=stable, backend="triton").backward(given.grad_y)
    assert names == FUSED[:2]
    within(error(x.grad, expected["dx"]), 1e-11, "dx")
    leaf = qs[1].clone().requires_grad_()
    daam.density_block(given.x, ps, [qs[0], leaf], stable=stable, backend="triton").backward(given.grad_y)
    within(error(leaf.grad, expected["d_c1"]), 1e-11, "d_c1")
    with recorded_launches() as names, torch.no_grad():
        daam.density_block(x, ps, qs, stable=stable, backend="triton")
    assert names == FUSED[:1]


@pytest.mark.kernel
def test_gradients_of_weights_go_layer_by_layer(device):
    one = layers("mixture", (2, 20, 3), 1, 2, (3, 2))
    given, ps, qs = draw(one, torch.float64, device=device)
    results = {}
    for backend in ("triton", "eager"):
        leaves = [t.clone().requires_grad_() for t in (given.x, *ps, *qs)]
        x, params = leaves[0], leaves[1:]
        with recorded_launches() as names:
            _y, weights = daam.density_block(x, params[:2], params[2:], return_weights=True, backend=backend)
            results[backend] = torch.autograd.grad(weights[1].square().sum(), leaves)
        assert backend == "eager" or names == [
            "forward_layers", "mixture_forward", *["mixture_backward", "param_gradients"] * 2
        ]  # fmt: skip
    for found, expected in zip(*results.values(), strict=True):
        within(error(found, expected), 1e-11, "gradient")


@pytest.mark.kernel
@pytest.mark.parametrize("algorithm", ["mixture", "stable"])
def test_a_batch_equals_its_rows(algorithm, device):
    one = layers(algorithm, (5, 24, 6), 1, 3, (3, 2, 1))
    given, ps, qs = draw(one, torch.float32, device=device)
    stable = algorithm == "stable"
    whole = daam.density_block(given.x, ps, qs, stable=stable, backend="triton")
    rows = [daam.density_block(row, ps, qs, stable=stable, backend="triton") for row in given.x.split(1)]
    assert torch.equal(whole, torch.cat(rows))


@pytest.mark.kernel
def test_chunks_that_do_not_stay_on_chip_are_recomputed(device):
    """Check that what is asked for is done: x alone is saved, and layers run one by one, to the bit of today's."""
    x, ps = torch.randn(1, 4200, device=device), [torch.randn(1, 2, device=device) for _ in range(2)]
    qs = [torch.rand(1, 2, device=device) + 0.5 for _ in range(2)]
    results, name = [], "recomputed"
    for recompute in (True, None):
        leaves = [t.clone().requires_grad_() for t in (x, *ps, *qs)]
        params = leaves[1:]
        assert daam.fusion_for(leaves[0], params[:2], params[2:], recompute=recompute, backend="triton")[0] == name
        with recorded_launches() as names:
            y = daam.density_block(leaves[0], params[:2], params[2:], recompute=recompute, backend="triton")
            results.append((y, *torch.autograd.grad(y.sin().sum(), leaves)))
        name = "layers"
    assert "backward_layers" not in names
    for found, expected in zip(*results, strict=True):
        within(error(found, expected), 1e-5, "result")
