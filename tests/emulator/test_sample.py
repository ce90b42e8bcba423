"""Every kernel of every regime, compiled and emulated, and wrong ones that this finds."""

import copy
import importlib.util
import mmap
import re
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch
from helpers import ALGORITHMS, Case, attend, error, inputs, recorded_launches, run, taking_rows_whole

pytest.importorskip("triton")

from emulator import driver
from emulator.machine import Executable, executable
from emulator.memory import FaultError
from emulator.sample import (
    BF16,
    CASES,
    FP32,
    LIMIT,
    ORDERS,
    SAMPLE,
    STREAMED,
    constant_error,
    crowded,
    narrow_errors,
    regimes,
    worst,
)

import daam
import daam.kernels
from daam.kernels import launch, mixture

KERNELS = Path(daam.kernels.__file__).parent
ROWS, COLUMNS = CASES["rows", False], CASES["columns", False]
algorithms = pytest.mark.parametrize("algorithm", ALGORITHMS)
sample = pytest.mark.parametrize(("case", "dtype"), SAMPLE, ids=str)
TOGETHER = ["forward_layers", "backward_layers", "layer_gradients"]
WHOLE = (32, 64)  # fills its tiles: the compiler fuses no product that a select follows
BARRIER = re.compile(r"bar\.sync\s+0;")
STORED_BY_SOME = re.compile(r"@!?%p\d+\s+(?=st\.global)")


# --- what the sample covers: nothing is launched ---


def test_the_sample_misses_no_kernel_of_a_regime():
    taken = set().union(*(regimes(case, dtype) for case, dtype in SAMPLE))
    for name, spec in ALGORITHMS.items():
        for order in ORDERS:
            for streamed in STREAMED:
                missing = {(name, order, streamed, kernel) for kernel in spec.kernels[streamed]} - taken
                assert not missing, missing
    sources = "".join(file.read_text() for file in KERNELS.glob("*.py"))
    launched = set(re.findall(r"\.launch\w*\(\s*(\w+),", sources)) - {"kernel"}
    known = {kernel for spec in ALGORITHMS.values() for kernels in spec.kernels for kernel in kernels}
    others = {"take_steps", *TOGETHER}  # of the tests of what is fused
    assert {kernel for *_, kernel in taken} == known | {"merge_strip_sums"} >= launched - others


def test_the_sample_has_both_dtypes_and_a_mask_everywhere():
    for cases in CASES.values():
        assert {dtype for _, dtype in cases} == {BF16, FP32} and {case.mask for case, _ in cases} == {True, False}


# --- compiled and emulated ---


@pytest.mark.emulated
@sample
def test_agrees_with_float64(case, dtype):
    assert worst(case, dtype) <= LIMIT


@pytest.mark.emulated
@pytest.mark.parametrize(
    ("stable", "shape", "masked"),
    [(False, (5, 150), True), (True, (5, 150), True), (False, (2, 26, 21), False), (False, (2, 1100), False)],
)
def test_layers_together(stable, shape, masked):
    """Check three layers of several Gaussians, over rows of one warp and several, and columns."""
    x, grad_y = torch.randn(shape), torch.randn(shape)
    params = [0.3 * torch.randn(2, n) for n in (1, 3, 4)] + [0.5 + torch.rand(2, n) for n in (1, 3, 4)]
    mask = torch.rand(shape[:2]) > 0.3 if masked else None
    results = {}
    for backend, dtype in (("triton", torch.float32), ("eager", torch.float64)):
        leaves = [t.to(dtype).requires_grad_() for t in (x, *params)]
        with crowded(), recorded_launches() as names:
            y = daam.density_block(
                leaves[0], leaves[1:4], leaves[4:], mask=mask, stable=stable, recompute=True, backend=backend
            )
            results[backend] = (y, *torch.autograd.grad(y, leaves, grad_y.to(dtype)))
        assert backend == "eager" or names == TOGETHER
    for found, expected in zip(*results.values(), strict=True):
        assert error(found, expected) < 1e-5


@pytest.mark.emulated
@pytest.mark.parametrize("layout", [(0, 1, 2), (0, 2, 1)], ids=["times", "channels"])
def test_a_gate_together(layout):
    """Check the gate with its projection and product, times and channels fastest in memory, with a mask."""
    gate, x = daam.DensityGate(21, 3, backend="triton"), torch.randn(2, 21, 150).permute(layout)
    x = x.contiguous().permute(layout)
    mask, results = torch.rand(2, 150) > 0.2, {}
    for backend, dtype in (("triton", torch.float32), ("eager", torch.float64)):
        module = copy.deepcopy(gate).to(dtype)
        module.backend = backend
        leaf = x.to(dtype).requires_grad_()
        with recorded_launches() as names:
            y, weights = module(leaf, mask=mask)
            loss = y.sin().sum() + weights.cos().sum()
            results[backend] = (y, weights, *torch.autograd.grad(loss, [leaf, *module.parameters()]))
        assert backend == "eager" or {"gated_project", "gated_forward", "gated_sums", "gated_backward"} <= set(names)
    scale = max(t.abs().max().item() for t in results["eager"][2:])
    for found, expected in zip(*results.values(), strict=True):  # the bias has no gradient but what is left of a sum
        assert (found.double() - expected).abs().max() < 1e-5 * max(1.0, scale)


@pytest.mark.emulated
@pytest.mark.parametrize("shape", [WHOLE, (2, 16, 64), (1, 290, 21), (2, 5000)], ids=str)
def test_a_narrow_gaussian(shape):
    assert all(error < 1e-5 for error in narrow_errors(shape))


@pytest.mark.emulated
@pytest.mark.parametrize(
    ("shape", "params"),
    [
        ((2, 1, 256), "features"),
        ((2, 4, 256), "features"),
        ((64, 4), "one"),
        ((8, 1024), "one"),
        ((1, 600, 21), "features"),
        ((1, 17_000), "one"),
    ],
)
def test_a_constant_chunk(shape, params):
    """Check sums of which next to nothing is left: they are exact, since a product is rounded alike in all its uses."""
    assert constant_error(shape, params) < 1


@pytest.mark.emulated
def test_a_constant_chunk_of_many_strips():
    with crowded():
        assert constant_error((1, 600, 21), "features") < 1


@pytest.mark.emulated
@pytest.mark.parametrize(
    "algorithm",
    [name if name in ("density", "stable") else pytest.param(name, marks=pytest.mark.slow) for name in ALGORITHMS],
)
def test_one_program_takes_all_steps_to_the_bit(algorithm, emulated):
    """Check rows whose steps are one launch, of whole tiles and a short one: compiled together they are rounded as they
    are apart.
    """
    case = Case((2, 8_300 if algorithm == "gate" else 16_500), 1, params="one", weights=False, algorithm=algorithm)
    given = inputs(case, FP32)
    expected = run(case, given, "triton")
    with taking_rows_whole():
        found = run(case, given, "triton")
    names = [f"{algorithm}_forward_whole", f"{algorithm}_backward_whole", f"{algorithm}_param_gradients"]
    assert emulated.launched[-3:] == names
    for name, t in expected.items():
        assert torch.equal(found[name], t), name


@pytest.mark.emulated
@algorithms
def test_every_launch_is_emulated(algorithm, emulated):
    case = ROWS[1][0].but(algorithm=algorithm)
    launches, executed = len(emulated.launched), Executable.executed
    with recorded_launches() as names, crowded():
        run(case, inputs(case, FP32), "triton")
    shown = [name.replace("param_gradients", f"{algorithm}_param_gradients") for name in names]  # as profilers see it
    assert shown == emulated.launched[launches:] and names
    assert Executable.executed - executed > 100 * len(names)
    with recorded_launches() as names:
        run(case, inputs(case, FP32), "eager")
    assert not names


@pytest.mark.emulated
@algorithms
def test_offsets_beyond_32_bits(algorithm):
    """Check a view that spans more than 2**31 elements: memory that is mapped, and never touched but for 48 of them."""
    memory = torch.frombuffer(mmap.mmap(-1, 2 * (2 * (2**30 + 16) + 16)), dtype=torch.float16)
    x = memory.as_strided((3, 16), (2**30 + 16, 1))
    x.copy_(torch.randn(3, 16, generator=torch.Generator().manual_seed(0)))
    for axis in (0, 1):
        case = Case((3, 16), axis, params="one", weights=False, algorithm=algorithm)
        p, leaf = torch.ones(1, case.columns), x.detach().requires_grad_()
        found = []
        for backend in ("triton", "eager"):
            y = attend(case, leaf, 0 * p, p, backend=backend)
            found.append((y.detach(), *torch.autograd.grad(y, leaf, torch.ones_like(y))))
        assert all((result - wanted).abs().max() < 2e-3 for result, wanted in zip(*found, strict=True))


# --- wrong kernels ---


def kernel_of(text: str) -> str:
    """Return the name of the kernel of a PTX module."""
    return re.search(r"\.entry\s+(\w+)", text)[1]


class Change:
    """Leave something out of the PTX of one kernel, by its number, or all of it."""

    def __init__(self, pattern: re.Pattern, kernel: str, number: int | None):
        self.pattern, self.kernel, self.number, self.left_out = pattern, kernel, number, 0

    def __call__(self, text: str) -> Executable:
        found = list(self.pattern.finditer(text)) if kernel_of(text) == self.kernel else []
        chosen = found if self.number is None else found[self.number : self.number + 1]
        for match in reversed(chosen):
            text = text[: match.start()] + text[match.end() :]
        self.left_out += len(chosen)
        return executable(text)


def is_noticed(case: Case, dtype: torch.dtype) -> bool:
    """Tell whether the sample's test of a case would fail."""
    try:
        return worst(case, dtype) > LIMIT
    except FaultError:
        return True


@pytest.mark.emulated
@pytest.mark.parametrize("direction", ["forward", "backward"])
@algorithms
def test_each_barrier_that_is_left_out_is_noticed(algorithm, direction):
    """Leave out each barrier of rows of several warps, where programs take several, and check that it is noticed."""
    case, dtype = ROWS[1]
    case, kernel, number = case.but(algorithm=algorithm, clamps=algorithm == "stable"), f"{algorithm}_{direction}", 0
    given = inputs(case, dtype)
    while True:
        change = Change(BARRIER, kernel, number)
        with mock.patch.object(driver, "executable", change), crowded():
            try:
                run(case, given, "triton")
                problem = ""
            except FaultError as error:
                problem = str(error)
        if not change.left_out:
            break
        assert f"{kernel}: " in problem and "a race" in problem, f"without barrier {number}"
        number += 1
    assert number >= 6


@pytest.mark.emulated
@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize(("case", "dtype"), [ROWS[0], COLUMNS[1]], ids=str)
@algorithms
def test_stores_without_their_masks_are_noticed(algorithm, case, dtype, direction):
    """Leave out the predicates of stores, so that threads outside store too, and check that it is noticed."""
    change = Change(STORED_BY_SOME, f"{algorithm}_{direction}", None)
    with mock.patch.object(driver, "executable", change):
        assert is_noticed(case.but(algorithm=algorithm), dtype)
    assert change.left_out


@pytest.mark.emulated
@pytest.mark.parametrize("side", ["RAGGED_P", "RAGGED_C"])
@algorithms
def test_a_tile_that_is_taken_for_whole_is_noticed(algorithm, side):
    """Check a constant that wrongly says that no rows, or no columns, of a tile stand outside."""
    original = launch.launch

    def wrong(kernel, grid, *args, **meta):
        if "PLAN" in meta:
            meta["PLAN"] = meta["PLAN"]._replace(**{side: False})
        return original(kernel, grid, *args, **meta)

    case, dtype = COLUMNS[1]
    with mock.patch.object(launch, "launch", wrong):
        assert is_noticed(case.but(algorithm=algorithm), dtype)


@pytest.mark.emulated
def test_a_product_that_is_fused_is_noticed(tmp_path):
    """Leave out the 0 that keeps the mixture's distance from being fused with its difference, and check that it is
    noticed.
    """
    product, modules = "multiply_rounded(distance, d[i] - far)", {}
    for name in ("mixture_blocks", "mixture"):
        source = (KERNELS / f"{name}.py").read_text().replace(".mixture_blocks import", ".fused_mixture_blocks import")
        assert source.count(product) == (name == "mixture_blocks")
        file = tmp_path / f"fused_{name}.py"
        file.write_text(source.replace(product, "distance * (d[i] - far)"))
        spec = importlib.util.spec_from_file_location(f"daam.kernels.{file.stem}", file)
        modules[spec.name] = importlib.util.module_from_spec(spec)
        with mock.patch.dict(sys.modules, modules):
            spec.loader.exec_module(modules[spec.name])
    fused = modules["daam.kernels.fused_mixture"]
    with mock.patch.multiple(mixture, forward=fused.forward, backward=fused.backward):
        assert not all(error < 1e-5 for error in narrow_errors(WHOLE))
