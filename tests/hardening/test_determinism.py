"""The same inputs give the same bits: again, in another process, in another order, in PyTorch's deterministic mode."""

import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import digests
import pytest
import torch
from digests import CALLS, ROWS
from helpers import ALGORITHMS, Case, attend, error, inputs, oracle, within

pytest.importorskip("triton")

FOLDER = Path(__file__).parents[1]
kernel, long = pytest.mark.kernel, pytest.mark.long
in_order = pytest.mark.not_interpreted("one program after another, in the same order")
LONG_ROWS = {
    f"long rows of {name}": functools.partial(digests.attend, Case((3, 8300), 1, algorithm=name)) for name in ALGORITHMS
}


# --- Again --------------------------------------------------------------------------------------------
@pytest.mark.parametrize("backend", ["eager", pytest.param("triton", marks=[kernel, in_order])])
@pytest.mark.parametrize("call", (CALLS | LONG_ROWS).values(), ids=CALLS | LONG_ROWS)
def test_repeats_are_the_same_bits(call, backend, device):
    first, second = call(backend, device), call(backend, device)
    for name, t in first.items():
        assert torch.equal(t, second[name]), name


# --- In another process -------------------------------------------------------------------------------
def run_apart(seed, device, word):
    """Run a process that prints the digests of calls with a word in their names, with a seed for Python's hashes."""
    command = [sys.executable, FOLDER / "digests.py", device, torch.get_num_threads(), word, "eager", "triton"]
    environment = os.environ | {"PYTHONHASHSEED": seed}
    return subprocess.Popen(list(map(str, command)), env=environment, stdout=subprocess.PIPE, text=True)


@kernel
@pytest.mark.not_emulated("a process of its own")
@pytest.mark.parametrize(
    ("word", "seeds"), [("5x40", ["1"]), pytest.param("", ["0", "1", "random"], marks=long)], ids=["rows", "all"]
)
def test_other_processes_find_the_same_bits(word, seeds, device):
    """Compare with other interpreters, whose sets have other orders, on both backends."""
    processes = [run_apart(seed, device, word) for seed in seeds]
    expected = digests.digests(["eager", "triton"], device, word)
    assert len(expected) == 2 * sum(word in name for name in CALLS) > 0
    for process in processes:
        said, _ = process.communicate()
        assert process.returncode == 0
        found = json.loads(said)
        assert not {name for name, text in expected.items() if found[name] != text}


# --- In another order ---------------------------------------------------------------------------------
QUICK = {name for name in CALLS if "5x40" in name}


def permute(name, backend, device):
    """Yield (name, result, what it should be, how much it differs) where the rows of a batch are in another order."""
    plain = CALLS[name](backend, device)
    order = torch.randperm(len(plain["y"]), generator=torch.Generator().manual_seed(1))
    assert order.tolist() != sorted(order.tolist())
    permuted = CALLS[name](backend, device, order)
    for key, t in plain.items():
        expected = t[order.to(t.device)] if key in ROWS else t
        scale = max(1.0, expected.abs().max().item())  # of the gate's bias rounding leaves nearly 0
        yield key, permuted[key], expected, (permuted[key] - expected).abs().max().item() / scale


@kernel
@pytest.mark.parametrize("name", [name if name in QUICK else pytest.param(name, marks=long) for name in CALLS])
def test_the_order_of_rows_changes_no_bit(name, device):
    """Check y, weights and dx. Gradients of parameters are sums over rows, which are rounded in another order."""
    for key, found, expected, difference in permute(name, "triton", device):
        assert key not in ROWS or torch.equal(found, expected), key
        within(difference, 1e-5, key)


@pytest.mark.parametrize("name", CALLS)
def test_the_order_of_rows_changes_the_reference_by_rounding_alone(name):
    """Check the eager backend, whose bits depend on where a row stands: PyTorch computes most elements many at a time,
    and what is left one by one, by other instructions.
    """
    for key, _found, _expected, difference in permute(name, "eager", "cpu"):
        within(difference, 1e-5, key)


# --- In deterministic mode ------------------------------------------------------------------------------
@pytest.fixture
def strict():
    """Let PyTorch raise an error where what it is asked for has no deterministic algorithm."""
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    with pytest.raises(RuntimeError, match="does not have a deterministic implementation"):
        torch.zeros(2).put_(torch.tensor([0]), torch.ones(1))


@pytest.mark.usefixtures("strict")
@pytest.mark.parametrize(
    ("name", "backend"),
    [*((name, "eager") for name in CALLS), *(pytest.param(name, "triton", marks=(kernel, long)) for name in CALLS)],
)
def test_deterministic_mode(name, backend, device):
    for key, t in CALLS[name](backend, device).items():
        assert t.isfinite().all(), key


@pytest.mark.usefixtures("strict")
@pytest.mark.parametrize("compiler", ["aot_eager", pytest.param("inductor", marks=long)])
@pytest.mark.parametrize("backend", ["eager", pytest.param("triton", marks=(kernel, long))])
@pytest.mark.parametrize(
    "algorithm", [name if name == "density" else pytest.param(name, marks=long) for name in ALGORITHMS]
)
def test_deterministic_mode_compiled(algorithm, backend, compiler, device):
    """Check that compiled passes are right, and give the same bits again."""
    torch._dynamo.reset()
    case = Case((4, 6, 5), 1, weights=False, algorithm=algorithm)
    given, results = inputs(case, torch.float32, device=device), []
    compiled = torch.compile(functools.partial(attend, case, backend=backend), backend=compiler, fullgraph=True)
    for _ in range(2):
        leaves = given.leaves()
        y = compiled(*leaves)
        results.append((y.detach(), *torch.autograd.grad(y, leaves, given.grad_y)))
    for name, first, second, expected in zip(
        ("y", *case.gradients), *results, oracle(case, given).values(), strict=True
    ):
        assert torch.equal(first, second), name
        within(error(first, expected), 1e-5, name)
