"""Kernels touch their tensors alone, read nothing that nobody wrote, and reach as far as tensors may."""

import far
import pytest
import spread
import torch
from emulator.sample import LIMIT, SAMPLE, worst
from guards import guarding
from helpers import ALGORITHMS, Case, error, inputs, oracle, run, taking_rows_whole, within

pytest.importorskip("triton")
import triton
import triton.language as tl

import daam
from daam.kernels import launch
from daam.kernels.operands import strided_of

kernel = pytest.mark.kernel
long = pytest.mark.long


# --- What torch.empty gives -----------------------------------------------------------------------
EMPTY = {
    "empty": lambda t: torch.empty(t.shape, dtype=t.dtype),
    "empty_like": torch.empty_like,
    "empty_strided": lambda t: torch.empty_strided(t.shape, t.stride(), dtype=t.dtype),
    "new_empty": lambda t: t.new_empty(t.shape),
    "new_empty_strided": lambda t: t.new_empty_strided(t.shape, t.stride()),
    "resize_": lambda t: t.new_empty(0).resize_(t.shape),
}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("function", EMPTY)
def test_unwritten_memory_is_nan(function, dtype):
    """Check what the fixture of all tests does, in every way and dtype in which memory is taken."""
    assert EMPTY[function](torch.zeros(3, 5, dtype=dtype)).isnan().all()


# --- Among canaries -------------------------------------------------------------------------------
FAULTS = {
    "loads beside": "a load of what nobody has written",
    "loads between": "a load of what nobody has written",
    "loads unwritten": "a load of what nobody has written",
    "stores beside": "faulty writes beside a tensor, or between its elements",
    "stores before": "faulty writes beside a tensor, or between its elements",
    "stores between": "faulty writes beside a tensor, or between its elements",
    "changes x": "faulty changes what had been written",
    "changes mask": "faulty changes a torch.bool",
}


@triton.jit
def faulty(x, mask, y, n, FAULT: tl.constexpr):  # noqa: N803, as Triton code does
    """Store what is valid of x, whose n elements stand at every second place, in y, which is like it."""
    places = tl.arange(0, 16)
    loaded, inside = x.data + 2 * places, places < n
    stored = inside
    if FAULT == "loads beside":
        inside = places <= n
    elif FAULT == "loads between":
        loaded += places == 3
    elif FAULT == "loads unwritten":
        loaded = y.data + 2 * places
    elif FAULT == "stores beside":
        stored = places <= n
    valid = tl.load(mask.data + places, places < n, 0) != 0
    values = tl.where(valid, tl.load(loaded, inside, 0.0), 0.0)
    tl.store(y.data + 2 * places, values, stored)
    if FAULT == "stores before":
        tl.store(y.data - 1 + tl.arange(0, 1), tl.zeros([1], tl.float32))
    elif FAULT == "stores between":
        tl.store(y.data + 1 + tl.arange(0, 1), tl.zeros([1], tl.float32))
    elif FAULT == "changes x":
        tl.store(x.data + tl.arange(0, 1), tl.zeros([1], tl.float32))
    elif FAULT == "changes mask":
        tl.store(mask.data + tl.arange(0, 1), tl.zeros([1], tl.int1))


@kernel
@pytest.mark.not_emulated("the emulator itself notices some")
@pytest.mark.parametrize("fault", ["none", *FAULTS])
def test_faults_are_noticed(fault, device):
    if device.type != "cpu" and fault.startswith("loads"):
        pytest.skip("only the interpreter looks at loads")
    x, y = torch.arange(1.0, 27.0, device=device)[::2], torch.empty(26, device=device)[::2]
    mask = torch.ones(13, dtype=torch.bool, device=device)
    args = (*map(strided_of, (x, mask, y)), 13)
    if fault == "none":
        with guarding() as names:
            launch.launch(faulty, (1, 1), *args, device=device, FAULT=fault, num_warps=1)
        assert torch.equal(x, y) and names == ["faulty"]
        return
    with guarding(), pytest.raises(Exception, match=FAULTS[fault]):
        launch.launch(faulty, (1, 1), *args, device=device, FAULT=fault, num_warps=1)


def bits(tensors):
    """Return a copy of the bits of tensors; None of None."""
    return [None if t is None else t.detach().contiguous().view(torch.uint8).clone() for t in tensors]


def check(case, device, dtype=torch.float64, bound=1e-11):
    """Check both passes among canaries, that they give what float64 has, and that no bit of their inputs changes."""
    given = inputs(case, dtype, device=device)
    tensors = (given.x, *given.params, given.mask, given.grad_y, given.grad_weights)
    before = bits(tensors)
    with guarding() as names:
        found = run(case, given, "triton")
    assert all(old is None or torch.equal(old, new) for old, new in zip(before, bits(tensors), strict=True))
    for name, expected in oracle(case, given).items():
        within(error(found[name], expected), bound, f"{name} of {case}")
    return names


# of every algorithm, columns and rows, on chip and streamed: gaps between elements, uneven heads, masks, and sizes that
# no tile divides
CASES = [
    Case((2, 27, 21), 1, 2, mask=True, residual=True, layout="sliced", grads="expanded"),
    Case((3, 43), 1, 2, mask=True, residual=True, grads="sliced"),
    Case((1, 301, 3), 1, 2, mask=True, grads="transposed", layout="sliced"),
    Case((1, 2200), 1, residual=True, layout="transposed"),
]


def fit(case, name):
    """Return a case of an algorithm; where its heads must have equal chunks, without the remainder."""
    batch, size, *inner = case.shape
    return case.but(algorithm=name, shape=(batch, size - size % case.heads * ALGORITHMS[name].features, *inner))


@kernel
@pytest.mark.parametrize("case", [fit(case, name) for case in CASES for name in ALGORITHMS], ids=str)
def test_kernels_touch_their_tensors_alone(case, device):
    assert set(case.spec.kernels[case.shape[1] > 290]) <= set(check(case, device))


@kernel
@long
@pytest.mark.parametrize(("case", "dtype"), SAMPLE, ids=str)
def test_more_kernels_touch_their_tensors_alone(case, dtype, device):
    """Check cases of every kernel and regime, where programs take several tiles, and chunks have several strips."""
    if device.type != "cpu":
        pytest.skip("the sample's tensors are the CPU's")
    with guarding() as names:
        assert worst(case, dtype) <= LIMIT
    assert names


@kernel
@long
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_one_program_that_takes_all_steps_touches_its_tensors_alone(algorithm, device):
    length = 8_300 if algorithm == "gate" else 16_500
    with taking_rows_whole():
        case = Case((2, length), 1, params="one", weights=False, algorithm=algorithm)
        assert "take_steps" in check(case, device, torch.float32, bound=1e-5)


def compare(call, device):
    """Check call(backend), which returns named inputs and results, among canaries against the eager backend."""
    with guarding() as names:
        tensors, found = call("triton")
    wanted_tensors, expected = call("eager")
    for name, t in found.items():
        within(error(t, expected[name]), 1e-11, name)
    assert all(torch.equal(t, wanted_tensors[name]) for name, t in tensors.items())  # the same were drawn
    return names


@kernel
@pytest.mark.parametrize("stable", [False, pytest.param(True, marks=long)])
@pytest.mark.parametrize("shape", [(2, 19, 5), pytest.param((3, 43), marks=long)], ids=str)
def test_layers_touch_their_tensors_alone(shape, stable, device):
    def call(backend):
        generator = torch.Generator().manual_seed(0)

        def draw(*size):
            return torch.rand(size, generator=generator, dtype=torch.float64).to(device)

        x, grad_y, mask = draw(*(2 * n for n in shape))[tuple(slice(0, 2 * n, 2) for n in shape)], draw(*shape), None
        mask = draw(*shape[:2]) > 0.3
        params = [draw(2, n) - 0.5 for n in (2, 3)] + [draw(2, n) + 0.5 for n in (2, 3)]
        leaves = [t.requires_grad_() for t in (x, *params)]
        y, weights = daam.density_block(
            x, params[:2], params[2:], mask=mask, stable=stable, recompute=True, return_weights=True, backend=backend
        )
        results = (y, *weights, *torch.autograd.grad(y, leaves, grad_y))
        inputs = {str(i): t.detach() for i, t in enumerate((*leaves, grad_y, mask))}
        return inputs, {f"result {i}": t.detach() for i, t in enumerate(results)}

    assert compare(call, device) == ["forward_layers", "backward_layers", "layer_gradients"]


@kernel
@pytest.mark.parametrize("order", [(0, 1, 2), (0, 2, 1)], ids=["times", "channels"])
def test_the_fused_gate_touches_its_tensors_alone(order, device):
    def call(backend):
        generator = torch.Generator().manual_seed(0)

        def draw(*size):
            return torch.randn(size, generator=generator, dtype=torch.float64).to(device)

        module = daam.DensityGate(9, 3, backend=backend).to(device, torch.float64)
        for p in module.parameters():
            p.data = draw(*p.shape)
        sizes = [(2, 18, 82)[dim] for dim in order]
        x, grad_y = (draw(*sizes)[:, ::2, ::2].permute(order) for _ in ("x", "grad_y"))
        mask, grad_gate = draw(2, 41) > -0.5, draw(2, 1, 82)[..., ::2]
        y, gate = module(x.requires_grad_(), mask=mask)
        named = {"x": x, **dict(module.named_parameters())}
        grads = torch.autograd.grad([y, gate], list(named.values()), [grad_y, grad_gate])
        results = {"y": y, "gate": gate} | {f"gradient of {name}": t for name, t in zip(named, grads, strict=True)}
        bias = "gradient of to_attn.bias"
        results[bias] = results[bias] + 1  # of what rounding leaves of 0
        inputs = {**named, "grad_y": grad_y, "grad_gate": grad_gate, "mask": mask}
        return (*({name: t.detach() for name, t in found.items()} for found in (inputs, results)),)

    names = compare(call, device)
    assert {"gated_project", "gated_forward", "gated_sums", "gated_backward"} <= set(names)


def check_pieces(rank, cases):
    """Check passes of a piece of an axis among canaries, in a process that holds it."""
    for case, sizes in cases:
        with guarding() as names:
            spread.check(rank, case, sizes, "triton")
        assert "merge_strip_stats" in names


PIECES = [(Case((3, 9), 1, params="one", mask=True, algorithm=name), (5, 4)) for name in ALGORITHMS]


@kernel
@pytest.mark.not_emulated("processes are forked")
@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("pieces", [PIECES[1:2], pytest.param(PIECES, marks=long)], ids=["one", "all"])
def test_passes_over_pieces_touch_their_tensors_alone(pieces, tmp_path, device):
    if device.type != "cpu":
        pytest.skip("processes are forked")
    spread.run(2, tmp_path, check_pieces, pieces)


# --- Past 2**31 elements ----------------------------------------------------------------------------
@kernel
@pytest.mark.not_emulated("a process of its own; tests/emulator/test_sample.py has such a view")
@pytest.mark.usefixtures("one_thread")
def test_offsets_beyond_32_bits(tmp_path, device):
    far.check(tmp_path / "said", device, list(ALGORITHMS), quick=True)


@kernel
@long
@pytest.mark.not_emulated("a process of its own")
@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("name", [*ALGORITHMS, "layers", "gated"])
def test_offsets_beyond_32_bits_of_every_operand(name, tmp_path, device):
    far.check(tmp_path / "said", device, [name])
