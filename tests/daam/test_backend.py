"""Which backend is chosen, by whom, and what is said about it."""

import threading
import warnings
from unittest import mock

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import daam
from daam import backend as module

X = torch.randn(2, 6, 4)
P = torch.ones(3, 4)


@pytest.fixture(autouse=True)
def clean(monkeypatch):
    monkeypatch.delenv("DAAM_BACKEND", raising=False)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    for cached in (module._driver_problem, module._interpreter_problem, module._warn_once):
        cached.cache_clear()
    yield
    for cached in (module._driver_problem, module._interpreter_problem, module._warn_once):
        cached.cache_clear()


@pytest.fixture
def cuda():
    """Return a fake tensor that says it is on a GPU, and does not look fake here."""
    with FakeTensorMode():
        x = torch.empty(2, 6, 4, device="cuda")
    with mock.patch.object(module, "FakeTensor", type(None)):
        yield x


def test_auto_on_the_cpu_is_eager_without_a_word():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert daam.backend_for(X) == (
            "eager",
            "x is on cpu, which Triton does not drive (TRITON_INTERPRET=1 runs kernels on CPU tensors)",
        )


def test_triton_where_it_cannot_run_says_why():
    with pytest.raises(RuntimeError, match='"triton", requested by the argument backend, cannot run: x is on cpu'):
        daam.density_attention(X, P, P, backend="triton")


def test_precedence(monkeypatch):
    monkeypatch.setattr(module, "find_problem", lambda x: None)  # so that triton can be chosen; nothing is launched
    monkeypatch.setenv("DAAM_BACKEND", "triton")
    assert daam.backend_for(X) == ("triton", "requested by the environment variable DAAM_BACKEND")
    with daam.use_backend("eager"):
        assert daam.backend_for(X) == ("eager", "requested by daam.use_backend")
        with daam.use_backend("triton"):
            assert daam.backend_for(X)[0] == "triton"
            assert daam.backend_for(X, "eager") == ("eager", "requested by the argument backend")
        with daam.use_backend("auto"):
            assert daam.backend_for(X)[0] == "eager", "auto: by device again, whatever the environment says"
        assert daam.backend_for(X)[0] == "eager"
    assert daam.backend_for(X)[0] == "triton"


def test_the_context_is_one_thread_s():
    seen = []
    with daam.use_backend("eager"):
        thread = threading.Thread(target=lambda: seen.append(daam.backend_for(X)[1]))
        thread.start()
        thread.join()
    assert seen == [daam.backend_for(X)[1]]


def test_the_context_is_left_on_an_error():
    with pytest.raises(KeyError), daam.use_backend("eager"):
        raise KeyError
    assert "use_backend" not in daam.backend_for(X)[1]


def test_unknown_backends(monkeypatch):
    with pytest.raises(ValueError, match="backend is 'gpu', expected one of"), daam.use_backend("gpu"):
        pass
    monkeypatch.setenv("DAAM_BACKEND", "fast")
    with pytest.raises(ValueError, match="the environment variable DAAM_BACKEND is 'fast'"):
        daam.backend_for(X)


def test_a_gpu_without_a_driver_falls_back_with_one_warning(cuda):
    pytest.importorskip("triton")
    if torch.cuda.is_available():
        pytest.skip("this machine has a driver")
    with pytest.warns(UserWarning, match="eager backend on a GPU: Triton finds no driver"):
        assert daam.backend_for(cuda)[0] == "eager"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert daam.backend_for(cuda)[0] == "eager"
    with pytest.raises(RuntimeError, match="cannot run: Triton finds no driver"):
        daam.backend_for(cuda, "triton")


def test_a_gpu_without_triton_falls_back_with_one_warning(cuda, monkeypatch):
    monkeypatch.setattr(module, "_TRITON_INSTALLED", False)
    with pytest.warns(UserWarning, match="Triton is not installed"):
        assert daam.backend_for(cuda) == ("eager", "Triton is not installed (pip install 'daam-triton[triton]')")


@pytest.mark.parametrize(
    "error",
    [RuntimeError("0 active drivers"), AssertionError("libcuda.so"), FileNotFoundError("ldconfig"), ImportError("so")],
)
def test_however_a_driver_fails_auto_falls_back_with_the_reason(cuda, monkeypatch, error):
    triton = pytest.importorskip("triton")

    class Broken:
        @property
        def active(self):
            raise error

    monkeypatch.setattr(triton.runtime, "driver", Broken())
    with pytest.warns(UserWarning, match=f"Triton finds no driver it can use: {type(error).__name__}: {error}"):
        assert daam.backend_for(cuda)[0] == "eager"
    with pytest.raises(RuntimeError, match=f"cannot run: .*{error}"):
        daam.backend_for(cuda, "triton")


def test_an_empty_variable_is_no_variable(monkeypatch):
    monkeypatch.setenv("DAAM_BACKEND", "")
    assert daam.backend_for(X)[0] == "eager"


def test_a_gpu_with_a_driver_takes_triton(cuda):
    with mock.patch.object(module, "_driver_problem", return_value=None):
        assert daam.backend_for(cuda) == ("triton", "x is on cuda:0, which Triton drives")


@pytest.mark.parametrize("driven", ["cuda", "xpu"])
def test_the_driver_says_which_gpus_it_drives(cuda, monkeypatch, driven):
    """Check it on GPUs of two makers: each runs on Triton where the active driver is its own, and on eager with a
    warning that names both where it is the other's.
    """
    triton = pytest.importorskip("triton")
    active = mock.Mock(**{"get_active_torch_device.return_value": torch.device(driven, 0)})
    monkeypatch.setattr(triton.runtime, "driver", mock.Mock(active=active))
    with FakeTensorMode():
        xpu = torch.empty(2, 6, 4, device="xpu")
    mine, other = (cuda, xpu) if driven == "cuda" else (xpu, cuda)
    assert daam.backend_for(mine) == ("triton", f"x is on {mine.device}, which Triton drives")
    problem = f"x is on {other.device.type}, and Triton's driver is for {driven}"
    with pytest.warns(UserWarning, match=f"eager backend on a GPU: {problem}"):
        assert daam.backend_for(other) == ("eager", problem)
    with pytest.raises(RuntimeError, match=f"cannot run: {problem}"):
        daam.backend_for(other, "triton")


def test_fake_and_meta_tensors_never_open_a_driver(monkeypatch):
    monkeypatch.setattr(module, "_TRITON_INSTALLED", True)
    with mock.patch.object(module, "_driver_problem", side_effect=AssertionError("opened a driver")):
        with FakeTensorMode():
            assert daam.backend_for(torch.empty(2, 3, device="cuda"))[0] == "triton"
        assert daam.backend_for(torch.empty(2, 3, device="meta")) == ("eager", "x is on meta")
        assert daam.backend_for(torch.empty(2, 3, device="meta"), "triton")[0] == "triton"


def test_an_interpreter_that_numpy_is_too_new_for_says_so(monkeypatch):
    """Check it for versions of both: Triton 3.6, of torch 2.11, with NumPy 2.4 failed at the first loop of a kernel."""
    triton = pytest.importorskip("triton")
    monkeypatch.setattr(module, "interpreting", lambda: True)

    def ask(of_triton, of_numpy):
        module._interpreter_problem.cache_clear()
        monkeypatch.setattr(triton, "__version__", of_triton)
        monkeypatch.setattr(module.importlib.metadata, "version", {"numpy": of_numpy}.get)
        return daam.backend_for(X, "triton")[0]

    for versions in (("3.6.0", "2.3.5"), ("3.7.0", "2.4.6"), ("3.10.0+git", "3.0.0")):
        assert ask(*versions) == "triton"
    expected = (
        r"interpreter of Triton 3\.6\.0 does not run with NumPy 2\.4\.6: it needs Triton 3\.7, or NumPy below 2\.4"
    )
    with pytest.raises(RuntimeError, match=expected):
        ask("3.6.0", "2.4.6")
    assert daam.backend_for(X)[0] == "eager"


def test_operators_run_on_intel_gpus_too():
    with FakeTensorMode():
        x, p = (torch.empty(shape, device="xpu") for shape in ((2, 6, 4), (3, 4)))
        y = daam.density_attention(x, p, p)
        assert y.device == x.device and y.shape == x.shape
    for op in ("density_forward", "mixture_layers_backward", "gated_forward"):
        keys = [key for key in ("CUDA", "XPU") if torch._C._dispatch_has_kernel_for_dispatch_key(f"daam::{op}", key)]
        assert keys == ["CUDA", "XPU"]


def test_backward_runs_on_the_backend_of_forward():
    x = X.clone().requires_grad_()
    with daam.use_backend("eager"):
        y = daam.density_attention(x, P, P)
    with (
        mock.patch.object(module, "backend_for", side_effect=AssertionError("asked again")),
        daam.use_backend("triton"),
    ):
        y.sum().backward()
    assert x.grad.isfinite().all()
