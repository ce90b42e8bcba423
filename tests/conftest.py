"""Where kernel tests run, and a net under all tests.

A test that asks for `device` runs on a GPU with `--device cuda`, else on the CPU: with TRITON_INTERPRET=1 in Triton's
interpreter, with `--device emulated` as it is compiled for a GPU (`emulator`).
`--shard 0/2` runs every second test, `--shard 1/2` the others: processes share the tests of one command.
"""

import contextlib
import dataclasses
import importlib.util
import os
import tempfile
import types

import pytest
import torch

# Kernel tests whose tensors need no device: launches are recorded, of tensors on meta.
WITHOUT_DEVICE = {"test_a_batch_has_the_tiles_of_its_rows"}

EMULATED = pytest.StashKey()


def pytest_addoption(parser):
    parser.addoption("--device", default="cpu", choices=("cpu", "cuda", "emulated"), help="where kernel tests run")
    parser.addoption("--shard", default="0/1", help="k/n: of every n tests the kth, counted from 0")


def pytest_configure(config):
    # Inductor keeps code by its graph, and compiles what another ATEN_CPU_CAPABILITY made for this one.
    cache = tempfile.TemporaryDirectory(prefix="daam-inductor-", ignore_cleanup_errors=True)
    config.add_cleanup(cache.cleanup)
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = cache.name
    # Autograd counts GPUs once: later, where tensors pretend to be on one, it would start threads, and forbid to fork.
    torch.ones(1, requires_grad=True).sum().backward()
    device = config.getoption("--device")
    if device != "cpu" and os.environ.get("TRITON_INTERPRET"):
        raise pytest.UsageError(f"--device {device}: unset TRITON_INTERPRET")
    if device == "cuda" and not torch.cuda.is_available():
        raise pytest.UsageError("--device cuda: torch finds no GPU")
    if device == "emulated":
        emulate(config)
    if device == "cuda":  # `poisoned_memory` asks for deterministic algorithms, which not all of torch's have
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        config.addinivalue_line("filterwarnings", "ignore:.*deterministic:UserWarning")
    if os.environ.get("TRITON_INTERPRET") == "1" and importlib.util.find_spec("triton"):
        mend_interpreter()
        hasten_interpreter()
    if importlib.util.find_spec("hypothesis"):  # a GPU's machine may have none
        register_profiles()


def register_profiles():
    """Register how hypothesis draws: "quick" the same examples every time, "long" others, with a line to repeat one."""
    from hypothesis import HealthCheck, settings

    common = {"deadline": None, "database": None, "suppress_health_check": [HealthCheck.too_slow]}
    settings.register_profile("quick", derandomize=True, **common)
    settings.register_profile("long", derandomize=False, print_blob=True, **common)
    settings.load_profile("quick")


def mend_interpreter():
    """Give Triton 3.6's interpreter what later ones have: minima that drop NaN, as GPUs do, maxima too, and bf16."""
    import numpy as np
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder as Builder

    if hasattr(Builder, "get_bf16"):
        return
    Builder.create_minnumf = lambda self, a, b: self.binary_op(a, b, np.fmin)
    Builder.create_maxnumf = lambda self, a, b: self.binary_op(a, b, np.fmax)
    Builder.get_bf16 = lambda self, value: self.create_fp_trunc(self.get_fp32(value), tl.bfloat16)


def hasten_interpreter():
    """Spare the interpreter what it does again and again to no effect: more than half of its time."""
    from triton.runtime import interpreter

    inside = ("interpreter_builder", "_get_np_dtype", "_patch_lang", "_LangPatchScope")
    if not all(hasattr(interpreter, name) for name in inside):
        return  # another Triton's: slower, and as right
    # sums and products of integers in int64, for an assertion that it drops unless it debugs
    options = dataclasses.replace(interpreter.interpreter_builder.options, sanitize_overflow=False)
    interpreter.interpreter_builder.options = options
    # a table of all of NumPy's dtypes for every one that is asked for
    find, known = interpreter._get_np_dtype, {}

    def find_once(dtype):
        if dtype.name not in known:
            known[dtype.name] = find(dtype)
        return known[dtype.name]

    interpreter._get_np_dtype = find_once
    patch_once_a_launch(interpreter)


def patch_once_a_launch(interpreter):
    """Let the interpreter patch Triton's language once a launch, and not for every function that a kernel calls.

    Functions of Triton's own library know the language as `core`: hence both.
    """
    from triton.language import core

    patch, launching = interpreter._patch_lang, []

    def patch_once(_fn):
        if launching:
            return interpreter._LangPatchScope()  # of nothing
        scope = patch(types.SimpleNamespace(__globals__={"tl": interpreter.tl, "core": core}))
        launching.append(scope)
        restore = scope.restore
        scope.restore = lambda: (launching.clear(), restore())
        return scope

    interpreter._patch_lang = patch_once


def emulate(config):
    """Run kernels on an emulated GPU from now on, and until pytest ends."""
    from emulator import driver

    from bench.host import taking_any_tensor
    from bench.stub_driver import UnavailableError

    stack = contextlib.ExitStack()
    try:
        config.stash[EMULATED] = stack.enter_context(driver.emulation())
    except UnavailableError as error:
        raise pytest.UsageError(f"--device emulated: {error}") from error
    stack.enter_context(taking_any_tensor())
    config.add_cleanup(stack.close)


@pytest.hookimpl(trylast=True)  # after -m and -k have chosen
def pytest_collection_modifyitems(config, items):
    device, interpreter = config.getoption("--device"), os.environ.get("TRITON_INTERPRET") == "1"
    for item in items:
        anywhere = "device" not in item.fixturenames and item.originalname not in WITHOUT_DEVICE
        if anywhere and item.get_closest_marker("kernel"):
            raise pytest.UsageError(
                f"{item.nodeid} is marked kernel and does not ask for `device`: no GPU could run it"
            )
        if reason := skipped(item, device, interpreter):
            item.add_marker(pytest.mark.skip(reason=reason))
    k, n = map(int, config.getoption("--shard").split("/"))
    config.hook.pytest_deselected(items=[item for i, item in enumerate(items) if i % n != k])
    items[:] = items[k::n]


def skipped(item, device, interpreter):
    """Return the reason why a test cannot run here, None where it can."""
    marks = {mark.name: mark for mark in item.iter_markers()}
    if device == "emulated":
        if "not_emulated" in marks:
            return f"not emulated: {marks['not_emulated'].args[0]}"
        return None if marks.keys() & {"kernel", "emulated"} else "needs no --device emulated"
    if "emulated" in marks:
        return "needs --device emulated"
    if "not_interpreted" in marks and interpreter:
        return f"not interpreted: {marks['not_interpreted'].args[0]}"
    if "gpu" in marks and device != "cuda":
        return "needs --device cuda"
    if "kernel" in marks and device == "cpu" and not interpreter:
        return "kernels need TRITON_INTERPRET=1, --device emulated or --device cuda"
    return None


@pytest.fixture
def device(request):
    name = request.config.getoption("--device")
    return torch.device("cpu" if name == "emulated" else name)


@pytest.fixture
def emulated(request):
    """Yield the emulated GPU (`emulator.driver.Device`)."""
    return request.config.stash[EMULATED]


@pytest.fixture(scope="module")
def one_thread():
    """Run a file on one thread: small models gain nothing from more, and lose much to them on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def seeded():
    """Let a test draw the same numbers whichever tests ran before it."""
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def poisoned_memory():
    """Fill what torch.empty gives with NaN: an element that nobody writes shows."""
    previous = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.empty(8).isnan().all()
    yield
    torch.use_deterministic_algorithms(previous)
