"""Launches of kernels that Triton compiled before: without its search, and of the kernel that it would find."""

import contextlib
from unittest import mock

import pytest
import torch
from helpers import ALGORITHMS, Case, attend, inputs, taking_rows_whole

from bench import host
from bench.stub_driver import UnavailableError, stub_driver
from daam.backend import interpreting
from daam.kernels import launch
from daam.kernels.algorithms import DENSITY
from daam.kernels.operands import Strided

BASE = Case((2, 12, 32), 1, heads=2, weights=False)
algorithms = pytest.mark.parametrize("algorithm", ALGORITHMS)


@pytest.fixture(autouse=True)
def launched():
    """Yield the launches that reach the CUDA driver, (function, grid) each; a function is one compiled kernel's."""
    pytest.importorskip("triton")
    if interpreting():
        pytest.skip("the interpreter compiles nothing")
    found = []
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(
                stub_driver(lambda function, *grid_and_more: found.append((function, grid_and_more[:3])))
            )
        except UnavailableError as why:
            pytest.skip(f"no launches without a stub of the driver: {why}")
        stack.enter_context(host.taking_any_tensor())
        yield found


@contextlib.contextmanager
def asked():
    """Yield the list of the names of the kernels that Triton is asked for, in order."""
    from triton.runtime import JITFunction

    names, original = [], JITFunction.run

    def run(self, *args, **meta):
        names.append(self.fn.__name__)
        return original(self, *args, **meta)

    with mock.patch.object(JITFunction, "run", run):
        yield names


def unaligned(t):
    """Return a copy of a tensor, one element past what is aligned to 16 bytes."""
    room = t.new_empty(t.numel() + 1)
    assert room.data_ptr() % 16 == 0
    return room[1:].view(t.shape).copy_(t)


def run(case, *, x=lambda t: t, params=lambda t: t, grad=lambda t: t, dtype=torch.bfloat16):
    """Run both passes of a case; x, params and grad change its tensors before."""
    given = inputs(case, dtype)
    leaves = [x(given.x), *map(params, given.params)]
    leaves = [t.detach().requires_grad_() for t in leaves]
    y = attend(case, *leaves, given.mask, backend="triton")
    torch.autograd.grad(y, leaves, grad(given.grad_y))


def transposed(p):
    return p.t().contiguous().t()


# One thing that is not as in BASE, what of run changes; whether other compiled kernels than those of BASE are launched
CHANGES = {
    "x unaligned": ({}, {"x": unaligned}, True),
    "parameters unaligned": ({}, {"params": unaligned}, True),
    "grad_y unaligned": ({}, {"grad": unaligned}, True),
    "x fp16": ({}, {"dtype": torch.float16}, True),
    "x fp64": ({}, {"dtype": torch.float64}, True),
    "parameters bf16": ({}, {"params": torch.Tensor.bfloat16}, True),
    "parameters of other strides": ({"heads": 3}, {"params": transposed}, True),
    "parameters expanded": ({}, {"params": lambda p: p[:1].expand(p.shape)}, False),
    "heads": ({"heads": 4}, {}, True),
    "one head": ({"heads": 1}, {}, True),
    "one more chunk": ({"shape": (3, 12, 32)}, {}, False),
    "one chunk": ({"shape": (1, 12, 32)}, {}, True),
    "sixteen chunks": ({"shape": (16, 12, 32)}, {}, False),
    "strides": ({"layout": "sliced"}, {}, True),
    "strides of grad_y": ({"grads": "expanded"}, {}, True),
    "a mask": ({"mask": True}, {}, True),
    "residual": ({"residual": True}, {}, True),
    "streamed": ({"shape": (2, 1032, 32)}, {}, True),
}
# parameters are in a tuple, the mixture's with an integer
OF_A_TUPLE = ("x unaligned", "parameters unaligned", "parameters bf16", "parameters of other strides")
OF_SETTINGS = {
    "eps": ("density", {"eps": 0.25}, False),
    "eps 0": ("density", {"eps": 0.0}, False),
    "eps 1": ("mixture", {"eps": 1.0}, False),
    "four gaussians": ("mixture", {"params": 4}, False),
    "sixteen gaussians": ("mixture", {"params": 16}, True),
    "one gaussian": ("gate", {"params": 1}, True),
    # as the bits of fp64 numbers the integers 0, 1, 16, 2, and one of 64 bits
    "padding 0": ("mixture", {"padding": 0.0}, True),
    "padding 1": ("mixture", {"padding": 5e-324}, True),
    "padding 16": ("mixture", {"padding": 8e-323}, True),
    "padding 2": ("mixture", {"padding": 1e-323}, False),
    "padding of 64 bits": ("mixture", {"padding": 1.0}, True),
}


def same_kernels(launched, base, changed):
    """Run base and changed in turns, and each twice, with what is kept and without: whether all launches are the same,
    and whether base and changed launch other compiled kernels.
    """
    turns = (base, base, changed, base, changed, changed)
    found = {}
    for keeps in (True, False):
        launch.kept.clear()
        found[keeps] = []
        for turn in turns:
            if not keeps:
                launch.kept.clear()
            launched.clear()
            turn()
            found[keeps].append(list(launched))
    first, last = ({function for function, _grid in found[False][i]} for i in (0, 2))
    return found[True] == found[False], first != last


@pytest.mark.parametrize(
    ("algorithm", "change"),
    [*(("density", change) for change in CHANGES), *(("mixture", change) for change in OF_A_TUPLE)],
)
def test_one_change_launches_what_triton_would(algorithm, change, launched):
    case_changes, run_changes, expected = CHANGES[change]
    base = BASE.but(algorithm=algorithm)
    same, differ = same_kernels(launched, lambda: run(base), lambda: run(base.but(**case_changes), **run_changes))
    assert same
    assert differ == expected


@pytest.mark.parametrize("change", OF_SETTINGS)
def test_another_setting_launches_what_triton_would(change, launched):
    algorithm, changes, expected = OF_SETTINGS[change]
    dtype = torch.float64 if "padding" in changes else torch.bfloat16
    base = BASE.but(algorithm=algorithm, padding=1e-322 if "padding" in changes else None)  # of the integer 20
    same, differ = same_kernels(launched, lambda: run(base, dtype=dtype), lambda: run(base.but(**changes), dtype=dtype))
    assert same
    assert differ == expected


@algorithms
@pytest.mark.parametrize("n", [12, 1032])
def test_triton_is_asked_once(n, algorithm, launched):
    """Check that the second run of every kernel of both passes asks Triton for nothing, chunks on chip and streamed."""
    case = BASE.but(algorithm=algorithm, shape=(2, n, 32))
    with asked() as names:
        run(case)
        assert names and set(names) >= set(ALGORITHMS[algorithm].kernels[n > 500])
        names.clear()
        first, launched[:] = list(launched), []
        run(case)
    assert not names and launched == first


def test_triton_is_asked_once_for_steps_of_one_launch(launched):
    case = Case((2, 16_500), 1, params="one", weights=False)
    with taking_rows_whole(), asked() as names:
        run(case)
        assert set(names) == {"take_steps", "param_gradients"}
        names.clear()
        first, launched[:] = list(launched), []
        run(case)
    assert not names and launched == first and len(first) == 3


@pytest.mark.parametrize(
    "changed",
    [unaligned(torch.ones(2)), torch.ones(2).double(), None, 1.0, 1, 16, True, (torch.ones(2),), (1,), ((1,), 1)],
    ids=str,
)
@pytest.mark.parametrize("inside", [False, True])
def test_arguments_that_triton_tells_apart(inside, changed):
    """Check that arguments of which Triton compiles different kernels have different keys, alone and in a tuple."""
    told = (torch.ones(2), None, 1.0, 1, 16, True, (torch.ones(2),), (1,), ((1,), 1), Strided(torch.ones(2), (1,)))
    wrap = (lambda arg: ((arg,),)) if inside else (lambda arg: (arg,))
    same = [arg for arg in told if launch.traits(wrap(arg)) == launch.traits(wrap(changed))]
    assert [repr(arg) for arg in same] == [repr(changed)] * (not isinstance(changed, torch.Tensor))


def test_floats_and_the_numbers_in_tensors_are_not_told_apart():
    assert launch.traits((1.0, torch.ones(2))) == launch.traits((2.5, torch.zeros(2)))


def test_a_kept_launch_has_its_own_grid(launched):
    x, original = torch.ones(2, 12, 32), launch.launch

    def on_grids(kernel, grid, *args, **meta):
        for size in ((1, 2), (2, 2), (1, 2), (2, 2)):
            original(kernel, size, *args, **meta)

    with mock.patch.object(launch, "launch", on_grids):
        attend(BASE, x, x[0, :2], x[0, :2], backend="triton")
    assert [grid for _function, grid in launched] == [(1, 2, 1), (2, 2, 1), (1, 2, 1), (2, 2, 1)]


def test_each_device_has_its_own(launched):
    """Check that every device has kernels of its own: a compiled kernel is loaded on one device."""
    import triton

    x, active = torch.ones(2, 12, 32), triton.runtime.driver.active
    args, original = [], launch.launch

    def on_both(*given, device, **meta):
        args.append((given, meta))
        for index in (0, 1, 0, 1):
            with (
                mock.patch.object(active, "get_current_device", lambda index=index: index),
                mock.patch.object(torch.cuda, "current_device", lambda index=index: index),
            ):
                original(*given, device=torch.device("cuda", index), **meta)

    with mock.patch.object(launch, "launch", on_both):
        attend(BASE, x, x[0, :2], x[0, :2], backend="triton")
    (a, _), (b, _), *repeated = launched
    assert a != b and [function for function, _ in repeated] == [a, b]


def test_profilers_see_every_launch():
    from triton import knobs

    seen = []

    def enter(metadata):
        seen.append(metadata.get()["name"])

    def leave(metadata):
        seen.append("done")

    knobs.runtime.launch_enter_hook.add(enter)
    knobs.runtime.launch_exit_hook.add(leave)
    try:
        run(BASE)
        first = list(seen)
        seen.clear()
        with asked() as names:
            run(BASE)
    finally:
        knobs.runtime.launch_enter_hook.remove(enter)
        knobs.runtime.launch_exit_hook.remove(leave)
    shown = ["density_forward", "density_backward", "density_param_gradients"]
    assert not names and seen == first == [word for name in shown for word in (name, "done")]


@pytest.mark.parametrize(
    ("group", "knob", "value"),
    [
        ("runtime", "debug", True),
        ("compilation", "instrumentation_mode", "mode"),
        ("runtime", "add_stages_inspection_hook", lambda *_: ("", "")),
    ],
)
def test_triton_is_asked_again_where_its_settings_change(group, knob, value, launched):
    from triton import knobs
    from triton.runtime import JITFunction

    run(BASE)
    names = []
    with (
        mock.patch.object(getattr(knobs, group), knob, value),
        mock.patch.object(JITFunction, "run", lambda self, *args, **meta: names.append(self.fn.__name__)),
    ):
        run(BASE)
    launched.clear()
    with asked() as repeated:
        run(BASE)
    assert names == list(DENSITY.on_chip) and not repeated and len(launched) == 3


def test_hooks_of_a_kernel_are_called():
    from daam.kernels import density

    calls = []
    run(BASE)
    density.density_forward.add_pre_run_hook(lambda *args, **meta: calls.append(meta["num_warps"]))
    try:
        run(BASE)
        run(BASE)
    finally:
        density.density_forward.pre_run_hooks.clear()
    assert len(calls) == 2


def test_what_is_kept_is_bounded():
    with mock.patch.object(launch, "MOST_KEPT", 4):
        for batch in range(1, 6):
            run(BASE.but(shape=(batch, 12, 32)))
            assert 0 < len(launch.kept) <= 4


def test_on_amd_gpus_nothing_is_kept(launched):
    """Check that nothing is kept on AMD GPUs, where Triton compiles for the size of a tensor's memory, too."""
    with mock.patch.object(torch.version, "hip", "6.4"):
        run(BASE)
    assert launched and not launch.kept


def test_on_intel_gpus_a_launch_has_no_option_of_nvidia_s():
    """Check what a launch on a GPU that is not the current one takes where torch is built for Intel's."""
    kernel, device = mock.MagicMock(), torch.device("xpu", 0)
    xpu = mock.patch.multiple(torch.xpu, current_device=lambda: 1, device=mock.MagicMock())
    with mock.patch.object(torch.version, "xpu", "20250302"), xpu:
        launch.launch(kernel, (1, 1), device=device, num_warps=4)
        torch.xpu.device.assert_called_once_with(device)
    kernel.__getitem__.return_value.assert_called_once_with(enable_fp_fusion=True, num_warps=4)
    assert not launch.kept


def test_what_was_not_compiled_is_not_kept():
    """Check that None is not kept: an interpreted kernel, or one that a hook of Triton's keeps from being compiled."""
    kernel = mock.MagicMock()
    kernel.__getitem__.return_value.return_value = None
    for _ in range(2):
        launch.launch(kernel, (1, 1), device=torch.device("cpu"), num_warps=1)
    assert kernel.__getitem__.return_value.call_count == 2 and not launch.kept
