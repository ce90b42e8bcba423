"""Where kernel tests run, and a net under all tests.

A test that asks for `device` runs on a GPU with `--device cuda`, else on the CPU, where it needs TRITON_INTERPRET=1.
`--shard 0/2` runs every second test, `--shard 1/2` the others: processes share the tests of one command.
"""

import os

import pytest
import torch

# Kernel tests whose tensors need no device: launches are recorded, of tensors on meta.
WITHOUT_DEVICE = {"test_a_batch_has_the_tiles_of_its_rows"}


def pytest_addoption(parser):
    parser.addoption("--device", default="cpu", choices=("cpu", "cuda"), help="where kernel tests run")
    parser.addoption("--shard", default="0/1", help="k/n: of every n tests the kth, counted from 0")


def pytest_configure(config):
    if config.getoption("--device") == "cuda":
        if not torch.cuda.is_available():
            raise pytest.UsageError("--device cuda: torch finds no GPU")
        if os.environ.get("TRITON_INTERPRET") == "1":
            raise pytest.UsageError("--device cuda: unset TRITON_INTERPRET")


@pytest.hookimpl(trylast=True)  # after -m and -k have chosen
def pytest_collection_modifyitems(config, items):
    gpu, interpreter = config.getoption("--device") == "cuda", os.environ.get("TRITON_INTERPRET") == "1"
    skipped = {"kernel": not gpu and not interpreter, "gpu": not gpu}
    reasons = {"kernel": "kernels need TRITON_INTERPRET=1, or --device cuda", "gpu": "needs --device cuda"}
    for item in items:
        anywhere = "device" not in item.fixturenames and item.originalname not in WITHOUT_DEVICE
        if anywhere and item.get_closest_marker("kernel"):
            raise pytest.UsageError(
                f"{item.nodeid} is marked kernel and does not ask for `device`: no GPU could run it"
            )
        for name in skipped:
            if skipped[name] and item.get_closest_marker(name):
                item.add_marker(pytest.mark.skip(reason=reasons[name]))
    k, n = map(int, config.getoption("--shard").split("/"))
    config.hook.pytest_deselected(items=[item for i, item in enumerate(items) if i % n != k])
    items[:] = items[k::n]


@pytest.fixture
def device(request):
    return torch.device(request.config.getoption("--device"))


@pytest.fixture(autouse=True)
def seeded():
    """Let a test draw the same numbers whichever tests ran before it."""
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def poisoned_memory():
    """Fill what torch.empty gives with NaN: an element that nobody writes shows."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.empty(8).isnan().all()
    yield
    torch.use_deterministic_algorithms(before)
