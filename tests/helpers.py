"""Cases of every algorithm, their oracle, and the rules by which results are judged."""

from __future__ import annotations

import contextlib
import json
import math
import os
from dataclasses import dataclass, replace
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import daam
from daam import reference
from daam.kernels import algorithms, launch, tiles

DATA = Path(__file__).parent / "data"
EPS = {torch.float16: 2**-11, torch.bfloat16: 2**-8, torch.float32: 2**-24, torch.float64: 2**-53}


class Algorithm:
    """Hold what tests ask of an algorithm: its record (`daam.kernels.algorithms`), its public function, call, and the
    module of its reference. kernels: the launches of a forward and a backward pass, chunks on chip and streamed.
    """

    def __init__(self, record: algorithms.Algorithm):
        self.record, self.params, self.draw = record, record.params, record.draw
        self.eps, self.features = record.eps, record.features
        self.call = getattr(daam, record.function)
        self.reference = getattr(reference, record.name)
        self.kernels = list(record.on_chip), list(record.streamed)

    def settings(self, case: Case) -> tuple:
        """Return what operators and the reference take between axis and residual."""
        return self.record.settings_of(feature_axis=case.feature_axis, eps=case.eps_or_default, padding=case.padding)


ALGORITHMS = {name: Algorithm(record) for name, record in algorithms.ALGORITHMS.items()}


@dataclass(frozen=True)
class Case:
    """Hold one call: shape and axis as a user sees them; layout and grads name strides, weights_grads those of the
    weights' gradient where they are others. params is P of density attention, "features" or "one", and num_gaussians of
    the others. clamps: draw what the stabilised mixture clamps, offsets and positions far from the others, and c past
    both limits.
    """

    shape: tuple[int, ...]
    axis: int
    heads: int = 1
    params: str | int = "features"
    layout: str = "contiguous"
    grads: str = "contiguous"
    weights_grads: str | None = None
    mask: bool = False
    residual: bool = False
    weights: bool = True
    offset: float = 0.5
    eps: float | None = None
    padding: float | None = None
    clamps: bool = False
    algorithm: str = "density"

    def __str__(self) -> str:
        flags = [name for name in ("mask", "residual", "padding", "clamps") if getattr(self, name) not in (False, None)]
        size = "x".join(map(str, self.shape))
        parts = (size, f"axis{self.axis}", f"heads{self.heads}", str(self.params), self.layout, self.grads, *flags)
        return f"{self.algorithm}-" + "-".join(parts) + ("" if self.weights else "-y_only")

    @property
    def spec(self) -> Algorithm:
        return ALGORITHMS[self.algorithm]

    @property
    def positive_axis(self) -> int:
        return self.axis % len(self.shape)

    @property
    def columns(self) -> int:
        """Return P, the number of columns of the parameters."""
        if not self.spec.features:
            return 3 if isinstance(self.params, str) else self.params
        last = self.positive_axis == len(self.shape) - 1
        return 1 if self.params == "one" else self.shape[-1] // (self.heads if last else 1)

    @property
    def feature_axis(self) -> int | None:
        return None if self.columns == 1 else len(self.shape) - 1

    @property
    def eps_or_default(self) -> float | None:
        return self.spec.eps if self.eps is None else self.eps

    @property
    def gradients(self) -> tuple[str, str, str]:
        return "dx", *(f"d_{name}" for name in self.spec.params)

    def but(self, **changes) -> Case:
        return replace(self, **changes)


LAYOUTS = ("contiguous", "transposed", "sliced", "channels_last")
GRADS = ("contiguous", "transposed", "expanded", "sliced")
SHARED = ("expanded", "windows", "diagonals")  # layouts in which elements share memory
VIEWS = (*LAYOUTS, "offset", "apart", *SHARED)  # all that there are


def strided(shape, layout, dtype, generator, device="cpu", offset=0.0) -> Tensor:
    """Draw a random tensor of a shape and dtype, whose memory is laid out in one of VIEWS."""

    def base(sizes) -> Tensor:  # drawn on the CPU in fp32, so that every device and dtype sees the same numbers
        return (torch.randn(sizes, generator=generator) + offset).to(device, dtype)

    if layout == "expanded":
        return base([1 if d % 2 == 0 else size for d, size in enumerate(shape)]).expand(shape)
    if layout == "sliced":
        return base([2 * size + 1 for size in shape])[tuple(slice(1, 1 + 2 * size, 2) for size in shape)]
    if layout == "offset":  # no load of several elements is aligned
        return base([3 + math.prod(shape)])[3:].view(shape)
    if layout == "apart":  # an element more from one outer place to the next: nor is one behind the first
        return base([shape[0], 1 + math.prod(shape[1:])])[:, :-1].unflatten(1, shape[1:])
    if layout in ("windows", "diagonals"):
        strides = [1] * len(shape)
        if layout == "windows":  # each begins in the middle of the one before
            for d in reversed(range(len(shape) - 1)):
                strides[d] = -(-strides[d + 1] * shape[d + 1] // 2) or 1
        last = sum((size - 1) * step for size, step in zip(shape, strides, strict=True))
        return base([last + 1]).as_strided(shape, strides)
    order = list(range(len(shape)))
    if layout == "transposed":
        order = order[::-1]
    elif layout == "channels_last":
        order = [0, *order[2:], 1]
    return base([shape[d] for d in order]).permute([order.index(d) for d in range(len(shape))])


@dataclass
class Inputs:
    x: Tensor
    params: tuple[Tensor, Tensor]
    mask: Tensor | None
    grad_y: Tensor | None
    grad_weights: Tensor | None

    def leaves(self, needs: tuple[bool, ...] = (True, True, True)) -> list[Tensor]:
        """Return x and the parameters, each requiring grad where it is needed."""
        return [t.detach().requires_grad_(need) for t, need in zip((self.x, *self.params), needs, strict=True)]

    def pair(self, outputs: dict[str, Tensor]) -> list[tuple[Tensor, Tensor]]:
        """Return outputs, given by name, with their gradients: those that have any."""
        grads = {"y": self.grad_y, "weights": self.grad_weights}
        return [(t, grads[name]) for name, t in outputs.items() if grads[name] is not None]


def inputs(case: Case, dtype=torch.float64, seed: int = 0, device="cpu") -> Inputs:
    """Draw inputs, parameters (fp32, or fp64 for fp64) and upstream gradients of a case."""
    generator = torch.Generator().manual_seed(seed)
    shape = (case.heads, case.columns)
    mask = None
    if case.mask:
        mask = torch.rand(case.shape[: case.positive_axis + 1], generator=generator) > 0.3
        mask[(0,) * case.positive_axis][: case.shape[case.axis] // case.heads] = False  # a chunk of nothing
        mask = mask.to(device)
    x = strided(case.shape, case.layout, dtype, generator, device, case.offset)
    # elements that share memory are written there
    written = x.as_strided((x.untyped_storage().nbytes() // x.itemsize,), (1,), 0) if case.layout in SHARED else x
    if case.padding is not None:
        written[(torch.rand(written.shape, generator=generator) < 0.2).to(device)] = case.padding
    normal, uniform = torch.randn(shape, generator=generator), torch.rand(shape, generator=generator)
    p, q = case.spec.draw(normal, uniform)
    if case.clamps:
        written[(torch.rand(written.shape, generator=generator) < 0.02).to(device)] *= 50
        p, q[-1, -1] = 30 * p, 20
        if case.heads > 1:  # not of all: it leaves one position all weight
            q[0, 0] = 0.005
    params = torch.float64 if dtype == torch.float64 else torch.float32
    return Inputs(
        x=x,
        params=(p.to(device, params), q.to(device, params)),
        mask=mask,
        grad_y=strided(case.shape, case.grads, dtype, generator, device),
        grad_weights=strided(case.shape, case.weights_grads or case.grads, dtype, generator, device)
        if case.weights
        else None,
    )


def attend(case: Case, x: Tensor, p: Tensor, q: Tensor, mask: Tensor | None = None, **options):
    """Call the public function of a case's algorithm with the case's arguments; options override them."""
    arguments = {"norm_axis": case.axis, "residual": case.residual, "return_weights": case.weights, "mask": mask}
    if case.spec.eps is not None:
        arguments["eps"] = case.eps_or_default
    if case.padding is not None:
        arguments["padding_value"] = case.padding
    return case.spec.call(x, p, q, **{**arguments, **options})


def run(
    case: Case, given: Inputs, backend: str, needs: tuple[bool, ...] = (True, True, True), **options: object
) -> dict[str, Tensor]:
    """Return y, weights and the gradients that are needed of one backend, by name; options override arguments."""
    leaves = given.leaves(needs)
    out = attend(case, *leaves, given.mask, backend=backend, **options)
    outputs = dict(zip(("y", "weights"), out if case.weights else (out,), strict=False))
    names, needed = zip(*((n, t) for n, t in zip(case.gradients, leaves, strict=True) if t.requires_grad), strict=True)
    pairs = given.pair(outputs)
    found = torch.autograd.grad([t for t, _ in pairs], needed, [g for _, g in pairs])
    return outputs | dict(zip(names, found, strict=True))


@contextlib.contextmanager
def taking_rows_whole():
    """Take a few streamed rows for so many that one program takes all steps of its own (`kernels/whole.py`)."""
    from daam.kernels.host import plan  # needs Triton

    with mock.patch.object(tiles, "AT_WORK", 1):
        plan.cache_clear()
        try:
            yield
        finally:
            plan.cache_clear()


def broadcast(mask: Tensor | None, case: Case) -> Tensor | None:
    """Return a mask as the reference takes it, with as many dimensions as x; None for None."""
    return None if mask is None else mask.reshape(*mask.shape, *[1] * (len(case.shape) - mask.dim()))


def oracle(case: Case, given: Inputs, device: torch.device | str = "cpu") -> dict[str, Tensor]:
    """Return the results and gradients of a case by plain autograd through the formula, in float64 on a device, by
    name, as tensors on the CPU.
    """

    def exact(t: Tensor) -> Tensor:
        return t.detach().to(device, torch.float64)

    leaves = [exact(t).requires_grad_() for t in (given.x, *given.params)]
    mask = None if given.mask is None else broadcast(given.mask.to(device), case)
    settings = (case.positive_axis, *case.spec.settings(case), case.residual)
    y, weights = case.spec.reference.formula(*leaves, mask, *settings)
    found = {"y": y, "weights": weights} if case.weights else {"y": y}
    pairs = given.pair(found)
    grads = torch.autograd.grad([t for t, _ in pairs], leaves, [exact(g) for _, g in pairs])
    found |= dict(zip(case.gradients, grads, strict=True))
    return {name: t.detach().cpu() for name, t in found.items()}


def error(result: Tensor, expected: Tensor) -> float:
    """Return max |difference| / max |expected| of two tensors of one shape; NaN where the result holds NaN."""
    assert result.shape == expected.shape, (result.shape, expected.shape)
    if expected.numel() == 0:
        return 0.0
    expected = expected.detach().cpu().double()
    scale = expected.abs().max().item() or 1.0
    return ((result.detach().cpu().double() - expected).abs().max() / scale).item()


def within(error: float, bound: float, name: str) -> None:
    """Assert that an error is below its bound, which NaN never is, nor a bound that is none; name is the result's.

    Where DAAM_MARGINS names a file, a line of JSON is added to it first: tests/margins.py tells which came closest.
    """
    fraction = error / bound if error >= 0 and 0 < bound < math.inf else math.inf
    if path := os.environ.get("DAAM_MARGINS"):
        test = os.environ.get("PYTEST_CURRENT_TEST", "").rpartition(" (")[0]
        line = {"test": test, "what": name, "error": error, "bound": bound, "share": fraction}
        with open(path, "a") as file:
            file.write(json.dumps(line) + "\n")
    assert fraction < 1, f"{name}: error {error:.3g}, expected below {bound:.3g}"


# (relative, absolute), as torch.testing has them: what is computed by another route differs in its last few bits
TOLERANCES = {torch.bfloat16: (1.6e-2, 1e-5), torch.float32: (1.3e-6, 1e-5), torch.float64: (1e-7, 1e-7)}


def timeless(data):
    """Return the results of a run, as JSON holds them, without seconds."""
    if isinstance(data, dict):
        return {key: timeless(value) for key, value in data.items() if key != "seconds"}
    return [timeless(value) for value in data] if isinstance(data, list) else data


def close(result: Tensor, expected: Tensor, name: str, tolerances: tuple[float, float] | None = None) -> None:
    """Assert that shape and dtype are the expected ones and every element differs by less than the tolerances allow.

    tolerances: (relative, absolute), added up for each element; its dtype's TOLERANCES by default.
    """
    assert (result.shape, result.dtype) == (expected.shape, expected.dtype), name
    relative, absolute = tolerances or TOLERANCES[expected.dtype]
    result, expected = result.detach().cpu().double(), expected.detach().cpu().double()
    shares = (result - expected).abs() / (absolute + relative * expected.abs())
    within(shares.max().item() if shares.numel() else 0.0, 1.0, name)


# --- The rule by which fp32, fp16 and bf16 are judged: bound(worst of SEEDS draws of eager's errors)

# Which error a few elements of one seed have is chance: it may be half of what the same code has on the next seed, and
# the bound with it. The worst of eight seeds, and of all elements, moves little.
SEEDS = 8


def find_scales(expected: dict[str, Tensor]) -> dict[str, float]:
    """Return what errors of results are relative to, by name: their largest expected value. A gradient of a parameter
    is a sum over all places of what is as large as dx, and may be what rounding leaves of 0.
    """
    scales = {name: t.abs().max().item() if t.numel() else 0.0 for name, t in expected.items()}
    dx = scales.get("dx", 0.0)
    return {name: (max(n, dx) if name.startswith("d_") else n) or 1.0 for name, n in scales.items()}


def worst_errors(case: Case, dtype: torch.dtype, device: torch.device) -> dict[str, tuple[float, float]]:
    """Return the worst errors of SEEDS draws, by name: of the kernels, and of the eager backend. NaN wins.

    An error is a difference relative to the largest expected value: of the draw for y, weights and dx, and of all draws
    for gradients of parameters. These are few numbers, each a sum over all places, and may all be near 0 in one draw:
    relative to what is left there an error in the last bit of c counted 139 times in d_c of one draw of eight, and
    which of two backends was worse there was chance (2e-5 and 4e-6 on one CPU, 1e-5 and 2e-5 in another dtype).
    """
    differences: dict[tuple[str, str], list[float]] = {}
    largest: dict[str, list[float]] = {}
    for seed in range(SEEDS):
        given = inputs(case, dtype, seed, device)
        expected = oracle(case, given)
        results = {backend: run(case, given, backend) for backend in ("triton", "eager")}
        for name, exact in expected.items():
            scale = exact.abs().max().item() or 1.0
            largest.setdefault(name, []).append(scale)
            for backend, result in results.items():
                differences.setdefault((name, backend), []).append(error(result[name], exact) * scale)
    found = {}
    for name, scales in largest.items():
        scale = torch.tensor(scales, dtype=torch.float64)
        if name.startswith("d_"):
            scale = scale.max()
        kernels, eager = (torch.tensor(differences[name, backend]) / scale for backend in ("triton", "eager"))
        found[name] = kernels.max().item(), eager.max().item()  # torch's max is NaN where there is one
    return found


def places_summed(case: Case) -> int:
    """Return the number of places that a gradient of a parameter sums over."""
    return math.prod(case.shape) // (case.heads * (case.columns if case.spec.features else 1))


def bound(case: Case, name: str, dtype: torch.dtype, eager_error: float, draws: int = SEEDS) -> float:
    """Return the largest error that a kernel may have, the worst of `draws` draws, where eager's worst is eager_error.

    It is 2·(eager_error + 2·eps·M). The eager backend is the measure since it has the same inputs, rounds at the same
    places (to the dtype of the result, at its end) and what it computes in between in fp32 suffers from the same
    cancellation; so a hard case has a large bound and an easy one a small one.
    """
    parameter = name.startswith("d_")
    # A result is rounded once to its dtype: x's for y, weights and dx; fp32 for gradients of parameters, whatever x is.
    eps = EPS[torch.float32 if parameter and dtype != torch.float64 else dtype]
    if os.environ.get("TRITON_INTERPRET") == "1" and dtype == torch.bfloat16 and not parameter:
        eps *= 2  # the interpreter truncates where devices round to nearest: a whole last place, not half of one
    # A sum of n terms in the order of a tree rounds them log2(n) times, as often up as down: M = sqrt(log2(n)), of the
    # largest sum of several draws. In a single draw sums are what n terms leave that cancel: there M = sqrt(n). Sums
    # along a chunk are in eager's error already.
    n = max(2, places_summed(case))
    roundings = 1 if not parameter else n if draws == 1 else math.log2(n)
    # Two roundings beside eager's: luck may leave eager exact (a single term, a power of two), and no kernel can be
    # held to less than the rounding of its result and of one intermediate value.
    floor = 2 * eps * roundings**0.5
    # Another order of the same operations has errors of the same size, not the same errors: of two draws' maxima the
    # larger is seldom twice the other, while what is worth finding (a lost digit, a missing centre) costs far more.
    return 2 * (eager_error + floor)


@contextlib.contextmanager
def recorded_launches():
    """Yield the list of the names of the kernels that run, in order: a fallback cannot pass for a kernel."""
    names: list[str] = []
    original = launch.launch

    def record(kernel, *args, **meta):
        names.append(kernel.fn.__name__)
        return original(kernel, *args, **meta)

    with mock.patch.object(launch, "launch", record):
        yield names


def ran(names: list[str], word: str) -> bool:
    """Tell whether a kernel with a word in its name is among those that ran."""
    return any(word in name for name in names)


def golden(name: str) -> tuple[dict[str, Tensor], dict]:
    """Return the arrays, by name, and the settings of a published case."""
    with np.load(DATA / f"{name}.npz") as file:
        meta = json.loads(str(file["meta"]))
        return {key: torch.from_numpy(file[key]) for key in file.files if key != "meta"}, meta


GOLDEN = tuple(
    sorted(path.stem for path in DATA.glob("*.npz") if path.stem not in ("block_three_layers", "jepa_channel_gate"))
)


def check_golden(name: str, backend: str, device="cpu") -> None:
    """Check a backend against a published case of one attention. paper_* have 1e-8 on the variance beside eps."""
    data, meta = golden(name)
    algorithm = {"paper": "density", "mixture": "mixture", "jepa": "gate"}[name.partition("_")[0]]
    names = ALGORITHMS[algorithm].params
    leaves = [data[key].to(device).requires_grad_() for key in ("x", *names)]
    options = {"norm_axis": meta["norm_axis"], "return_weights": True, "backend": backend}
    if algorithm == "density":
        options["eps"] = meta["eps"] + meta["extra_var_eps"]
    elif algorithm == "mixture":
        options |= {"eps": meta["eps"], "padding_value": meta["padding_value"]}
    y, weights = ALGORITHMS[algorithm].call(*leaves, **options)
    y.backward(data["grad_out"].to(device))
    results = {"y": y, "weights": weights} | dict(
        zip([f"grad_{key}" for key in ("x", *names)], (t.grad for t in leaves), strict=True)
    )
    for key, result in results.items():
        within(error(result, data[key]), 1e-10 if y.dtype == torch.float64 else 1e-5, key)


def tiny_bert(features: int):
    """Return a BertModel of three layers with weights of chance; skip the test where there is no transformers."""
    import pytest  # here: a GPU's machine, which needs the rest, may have none

    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=30, hidden_size=features, num_hidden_layers=3, num_attention_heads=2, intermediate_size=32,
        max_position_embeddings=16,
    )  # fmt: skip
    return transformers.BertModel(config)


class Counting(TorchDispatchMode):
    """Count the operations that run."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += 1
        return function(*args, **(kwargs or {}))


class Wrapper(torch.nn.Module):
    """Hold a module as DistributedDataParallel does."""

    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, *inputs, **kwargs):
        return self.module(*inputs, **kwargs)
