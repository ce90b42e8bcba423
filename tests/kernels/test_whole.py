"""One program that takes all steps of a pass over its streamed chunks (`kernels/whole.py`), and when it does."""

from unittest import mock

import pytest
import torch
from helpers import ALGORITHMS, Case, inputs, recorded_launches, run, taking_rows_whole

pytest.importorskip("triton")

from bench.modelled import find_steps, record_passes
from bench.variants import find_variants
from daam.kernels import host, streamed

BF16, FP32 = torch.bfloat16, torch.float32
CASES = [
    (Case((2, 16_500), 1, params="one", weights=False), FP32),
    (Case((1, 16_500, 3), 1, layout="transposed", residual=True, weights=False), BF16),  # parameters across columns
    (Case((2, 33_001), 1, 2, weights=False, padding=0.0, algorithm="mixture"), FP32),
    (Case((2, 10_001), 1, weights=False, padding=0.0, algorithm="mixture"), BF16),  # statistics are found anew
    (Case((2, 32_769), 1, 2, weights=False, algorithm="gate"), BF16),  # the second strip of the first head is empty
    (Case((2, 8_300), 1, weights=False, padding=0.0, clamps=True, algorithm="stable"), FP32),
]


@pytest.mark.kernel
@pytest.mark.parametrize(("case", "dtype"), CASES, ids=str)
def test_bits_are_those_of_a_launch_a_step(case, dtype, device):
    given = inputs(case, dtype, device=device)
    with recorded_launches() as names:
        expected = run(case, given, "triton")
    assert any("streamed" in name for name in names) and "take_steps" not in names
    with taking_rows_whole(), recorded_launches() as names:
        found = run(case, given, "triton")
    forward = f"{case.algorithm}_forward" if case.shape[1] <= 10_001 else "take_steps"  # on chip
    assert names == [forward, "take_steps", "param_gradients"]
    for name, t in expected.items():
        assert torch.equal(found[name], t), name


@pytest.mark.kernel
@pytest.mark.not_emulated("the interpreter counts barriers")
def test_a_barrier_follows_each_step(device):
    """Check that no program begins a step before all its threads have stored what the one before makes."""
    from triton.runtime import interpreter

    if device.type != "cpu":
        pytest.skip("only the interpreter counts")
    case, dtype = CASES[0]
    with taking_rows_whole(), mock.patch.object(interpreter.interpreter_builder, "create_barrier") as barrier:
        run(case, inputs(case, dtype), "triton")
    assert barrier.call_count == case.shape[0] * (3 + 3)  # statistics, their merge, outputs; sums, their merge, dx


def record(shape, algorithm="density", dtype=BF16, heads=1, feature_axis=None, mask=False, full=False, gaussians=4):
    """Return the launches of both passes over axis 1 of a tensor of a shape."""
    x, columns = torch.empty(shape, dtype=dtype, device="meta"), gaussians
    if algorithm == "density":
        columns = 1 if feature_axis is None else x.shape[feature_axis] // heads
    p, mask = torch.empty(heads, columns, device="meta"), x.bool() if mask else None
    return record_passes(algorithm, x, p, mask, 1, feature_axis, full)


def names(launches):
    return [one.name for one in launches]


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_many_long_rows_are_one_launch(algorithm):
    """Check rows of 20,000 in bf16: forward one launch, backward two, as many as rows on chip take."""
    made = record((2048, 20_000), algorithm)
    assert names(made["forward"]) == ["take_steps"]
    assert names(made["backward"]) == ["take_steps", "param_gradients"]
    steps = [one.name for launches in made.values() for launch in launches for one in find_steps(launch)]
    assert [name for name in steps if name != "merge_strip_sums"] == list(ALGORITHMS[algorithm].record.streamed)


@pytest.mark.parametrize(
    ("shape", "options", "forward", "backward"),
    [
        ((1056, 20_000), {}, True, True),
        ((264, 80_000), {"heads": 4}, True, True),
        ((1055, 20_000), {}, False, False),  # two chunks for each of 528 programs at work
        ((2048, 37_800), {}, True, False),  # x and y are 151 kB a row, with grad_y 227: more than L2 keeps of 528
        ((2048, 37_900), {}, False, False),
        ((2048, 25_200), {}, True, True),
        ((2048, 18_900), {"dtype": torch.float32}, True, False),
        ((2048, 19_000), {"dtype": torch.float32}, False, False),
        ((2048, 20_000), {"full": True}, True, False),  # a gradient of the weights takes registers
        ((2048, 5000), {"mask": True}, False, False),  # so does a mask
        ((2048, 5000), {"dtype": torch.float64}, False, False),
        ((2048, 20_000), {"feature_axis": 1}, False, False),  # parameters vary along the row
        ((8, 600, 4096), {}, False, False),  # columns
        ((4096, 7500), {}, None, None),  # on chip
    ],
    ids=str,
)
def test_what_is_taken_whole(shape, options, forward, backward):
    made = record(shape, **options)
    for name, whole in (("forward", forward), ("backward", backward)):
        first = made[name][0].name
        assert (first == "take_steps") == bool(whole), name
        assert (first == f"density_{name}") == (whole is None), name


def test_many_gaussians_of_the_gate_are_not():
    for gaussians, whole in ((8, True), (9, False)):
        made = record((2048, 20_000), "gate", gaussians=gaussians)
        assert (names(made["backward"])[0] == "take_steps") == whole


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_steps_are_called_as_they_are_launched(algorithm):
    """Check that constants, which are passed by place here and else by name, stand in the order of the kernel's."""
    steps = []
    with mock.patch.object(host.Call, "launch_steps", lambda call, _name: steps.extend(call.steps)):
        record((2048, 20_000), algorithm)
    assert len(steps) >= 5
    for one in steps:
        following = one.kernel.arg_names[len(one.args) :]
        assert following == ["extent", *one.constants, "PLAN"], one.kernel


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_a_step_that_changes_is_compiled_anew(algorithm):
    """Check that compiled kernels are kept by the sources of all functions: Triton looks at the names of those in a
    tuple, and would take what it compiled on disk before the change.
    """
    (launch, *_) = record((2048, 20_000), algorithm)["forward"]
    functions = {*launch.meta["KERNELS"], *(one for ones in launch.meta["CONSTANTS"] for one in ones if callable(one))}
    assert len(functions) >= 6 and all(function.cache_key in launch.meta["SOURCES"] for function in functions)
    host.find_sources.cache_clear()
    with mock.patch.object(streamed.strip_stats, "hash", "changed"):
        (changed, *_) = record((2048, 20_000), algorithm)["forward"]
    host.find_sources.cache_clear()
    assert "changed" in changed.meta["SOURCES"]
    keys = [set().union(*find_variants([one]).values()) for one in (launch, changed)]
    assert keys[0].isdisjoint(keys[1])
