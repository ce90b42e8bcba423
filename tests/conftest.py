"""Where kernel tests run, and a net under all tests.

A test that asks for `device` runs on a GPU with `--device cuda`, else on the CPU, where it needs TRITON_INTERPRET=1.
"""

import os

import pytest
import torch


def pytest_addoption(parser):
    parser.addoption("--device", default="cpu", choices=("cpu", "cuda"), help="where kernel tests run")


def pytest_configure(config):
    if config.getoption("--device") == "cuda":
        if not torch.cuda.is_available():
            raise pytest.UsageError("--device cuda: torch finds no GPU")
        if os.environ.get("TRITON_INTERPRET") == "1":
            raise pytest.UsageError("--device cuda: unset TRITON_INTERPRET")


def pytest_collection_modifyitems(config, items):
    if config.getoption("--device") == "cuda" or os.environ.get("TRITON_INTERPRET") == "1":
        return
    skip = pytest.mark.skip(reason="kernels need TRITON_INTERPRET=1, or --device cuda")
    for item in items:
        if "kernel" in item.keywords:
            item.add_marker(skip)


@pytest.fixture
def device(request):
    return torch.device(request.config.getoption("--device"))


@pytest.fixture(autouse=True)
def poisoned_memory():
    """Fill what torch.empty gives with NaN: an element that nobody writes shows."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.empty(8).isnan().all()
    yield
    torch.use_deterministic_algorithms(before)
