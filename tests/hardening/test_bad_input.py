"""Bad input, by the table of `rows.py`.

Each row is called on the eager backend, those of ON_BACKENDS on Triton's too, and what can be compiled is; each leaves
its arguments and this package as they were. A `raise` of
SOURCES that no row meets fails a test.
"""

import ast
import contextlib
import os
import re
from pathlib import Path

import pytest
import torch
from hardening.rows import NO_TRITON, ON_BACKENDS, ROWS, arguments
from helpers import ALGORITHMS
from torch import Tensor, nn

import daam
from daam import backend as backends
from daam.backend import interpreting
from daam.kernels import launch

ROOT = Path(daam.__file__).parent
SOURCES = (
    "functional", "checks", "masks", "backend", "modules", "blocks", "gated", "block", "pieces", "sharded", "dtensors",
    "parallel", "decoder", "warmup", "importance",
)  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def group():
    """Make this process a group of one, which is known as "0"."""
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


pytestmark = pytest.mark.filterwarnings("ignore:.*(nested|Sparse|MaskedTensor|maskedtensor).*:UserWarning")


def tensors_of(value) -> list[Tensor]:
    """Return the tensors of arguments, and of modules among them."""
    if isinstance(value, nn.Module):
        return [*value.parameters(), *value.buffers()]
    if isinstance(value, dict):
        return tensors_of(list(value.values()))
    if isinstance(value, list | tuple):
        return [t for one in value for t in tensors_of(one)]
    return [value] if isinstance(value, Tensor) else []


def traits(t: Tensor) -> tuple:
    """Return what a call may not change of a tensor."""
    if type(t) is nn.parameter.UninitializedBuffer:
        return (t.dtype,)
    if t.is_nested or t.layout is not torch.strided or type(t) not in (Tensor, nn.Parameter):
        return t._version, t.requires_grad
    grad = None if not t.is_leaf or t.grad is None else (id(t.grad), t.grad._version, t.grad.tolist())
    if t.is_meta:
        return t._version, t.shape, t.stride()
    return t.tolist(), t.shape, t.stride(), t.data_ptr(), t._version, t.requires_grad, t.is_leaf, grad


def state() -> tuple:
    """Return what this package and torch keep between calls, that a refused call may not touch."""
    return (
        dict(vars(backends._context)), dict(vars(launch._recorder)), launch._interpreter.locked(), len(launch.kept),
        torch.is_grad_enabled(), torch.is_autocast_enabled("cpu"), os.environ.get("DAAM_BACKEND"),
        torch.get_default_dtype(), torch._C._are_functorch_transforms_active(),
    )  # fmt: skip


@contextlib.contextmanager
def untouched(call):
    """Check that arguments, and what is kept between calls, are as they were."""
    _function, args, options = call
    tensors, others = tensors_of(call), [a for a in (*args, *options.values()) if not isinstance(a, Tensor)]
    before = repr([*map(traits, tensors), others, state()])
    yield
    assert repr([*map(traits, tensors), others, state()]) == before


def refuse(row, algorithm, backend, device) -> Exception:
    """Call what is wrong, check its error, and return it."""
    call = row.call(algorithm, backend, device)
    function, args, options = call
    with untouched(call), pytest.raises(row.error) as caught:
        function(*args, **options)
    assert type(caught.value) is row.error
    assert expected(row, algorithm) in str(caught.value), str(caught.value)
    return caught.value


def expected(row, algorithm) -> str:
    """Return the words of a row's error, with the names of an algorithm's parameters."""
    p, q = ALGORITHMS[algorithm].params
    columns = "P" if ALGORITHMS[algorithm].features else "num_gaussians"
    return re.sub(r"\{(p|q|columns)\}", lambda m: {"p": p, "q": q, "columns": columns}[m[1]], row.words)


def right(algorithm, backend, device) -> list[list]:
    """Return what a right call gives, and its gradients, as numbers."""
    given = arguments(ALGORITHMS[algorithm], device)
    leaves = [given.pop(name) for name in ("x", "p", "q")]
    y = ALGORITHMS[algorithm].call(*leaves, **given, backend=backend)
    return [t.tolist() for t in (y, *torch.autograd.grad(y.sum(), leaves))]


@pytest.mark.parametrize("row", ROWS, ids=str)
def test_errors(row):
    """Check the eager backend, and that a right call after the wrong one gives the numbers of one before."""
    for algorithm in row.algorithms:
        before = right(algorithm, "eager", "cpu")
        refuse(row, algorithm, "eager", "cpu")
        assert right(algorithm, "eager", "cpu") == before


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("each", [False, pytest.param(True, marks=pytest.mark.long)], ids=["once", "each"])
@pytest.mark.kernel
def test_errors_of_kernels(algorithm, each, device):
    """Check the Triton backend, with a right call after all wrong ones; each: after each of them."""
    before = right(algorithm, "triton", device)
    for row in (row for row in ON_BACKENDS if algorithm in row.algorithms):
        refuse(row, algorithm, "triton", device)
        assert not each or right(algorithm, "triton", device) == before, str(row)
    assert right(algorithm, "triton", device) == before


@pytest.mark.skipif(interpreting(), reason="the interpreter takes tensors of the CPU")
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_triton_without_a_gpu(algorithm):
    refuse(NO_TRITON, algorithm, "triton", "cpu")


def messages(error) -> str:
    """Return the text of an error and of those it came of; Dynamo shows what was raised as Python would."""
    text = []
    while error is not None:
        text.append(str(error))
        error = error.__cause__ or error.__context__
    return "\n".join(text).replace("\\", "")


COMPILED = [row for row in ROWS if row.compiled is not None]
FEW = [(row, row.algorithms[i % len(row.algorithms)]) for i, row in enumerate(COMPILED[::3])]
ALL = [(row, algorithm) for row in COMPILED for algorithm in row.algorithms]
SHARES = [
    pytest.param(FEW, "eager", [True], id="few"),
    pytest.param(ALL, "eager", [True, False], id="all", marks=pytest.mark.long),
    pytest.param(ALL, "triton", [True, False], id="all-triton", marks=[pytest.mark.long, pytest.mark.kernel]),
]


def refuse_compiled(row, algorithm, backend, device, fullgraph):
    """Call what is wrong, compiled, and check its error: under fullgraph that is Dynamo's, which tells ours."""
    call = row.call(algorithm, backend, device)
    function, args, options = call
    torch._dynamo.reset()
    compiled = torch.compile(lambda: function(*args, **options), backend="eager", fullgraph=fullgraph)
    with untouched(call), pytest.raises(RuntimeError if fullgraph else row.error) as caught:
        compiled()
    words = [expected(row, algorithm)]
    if fullgraph:
        words = [row.compiled] if row.compiled else [*words, f"{row.error.__name__}("]
    assert all(word in messages(caught.value) for word in words), (str(row), messages(caught.value))


@pytest.mark.parametrize(("rows", "backend", "graphs"), SHARES)
def test_errors_of_compiled_calls(rows, backend, graphs, device):
    """Check that under fullgraph, where Dynamo raises an error of its own, this has the type and the message of ours;
    and that without it the error is ours.
    """
    for fullgraph in graphs:
        for row, algorithm in rows:
            refuse_compiled(row, algorithm, backend, device, fullgraph)


def raises(path: Path) -> dict[tuple[Path, int], tuple[str, int, str]]:
    """Return what a file raises, by its path and each line of the statement: name, first line, text of the message."""
    found = {}
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Raise) and node.exc is not None:
            text = "".join(c.value for c in ast.walk(node.exc) if isinstance(c, ast.Constant) and type(c.value) is str)
            found |= {(path, line): (path.name, node.lineno, text) for line in range(node.lineno, node.end_lineno + 1)}
    return found


def origin(error: Exception) -> tuple[Path, int]:
    """Return the file and the line that an error was raised at."""
    last = error.__traceback__
    while last.tb_next is not None:
        last = last.tb_next
    return Path(last.tb_frame.f_code.co_filename), last.tb_lineno


@pytest.mark.skipif(interpreting(), reason="one row is of Triton without a GPU")
def test_every_error_has_a_row():
    """Check that each `raise` of SOURCES is met by a row."""
    statements = {}
    for name in SOURCES:
        statements |= raises(ROOT / f"{name}.py")
    met = {statements.get(origin(refuse(row, row.algorithms[0], "eager", "cpu"))) for row in (*ROWS, NO_TRITON)}
    assert set(statements.values()) - met == set()
