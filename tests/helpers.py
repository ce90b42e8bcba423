"""Cases of every algorithm, their oracle, and the rule by which results are judged."""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from unittest import mock

import numpy as np
import torch
from torch import Tensor

import daam
from bench import workloads
from daam import reference
from daam.kernels import launch

DATA = Path(__file__).parent / "data"
EPS = {torch.float16: 2**-11, torch.bfloat16: 2**-8, torch.float32: 2**-24, torch.float64: 2**-53}


@dataclass(frozen=True)
class Algorithm:
    """One row of the test matrix.

    call: the public function. reference: its module there. params: names of its parameters. draw: their values from two
    random tensors, standard normal and uniform. eps: the default, None where it has none. settings: what operators and
    the reference take between axis and residual. features: whether parameters may follow x's last axis. kernels: the
    launches of a forward and a backward pass, chunks on chip and streamed.
    """

    call: Callable
    reference: ModuleType
    params: tuple[str, str]
    draw: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
    settings: Callable[[Case], tuple]
    eps: float | None
    features: bool
    kernels: tuple[list[str], list[str]]


ALGORITHMS = {
    "density": Algorithm(
        daam.density_attention,
        reference.density,
        ("mean_offset", "c"),
        workloads.ALGORITHMS["density"].draw,
        lambda case: (case.feature_axis, case.eps_or_default),
        eps=1e-5,
        features=True,
        kernels=(
            ["_forward", "_backward", "_chain"],
            ["_stats", "_merge", "_forward", "_sums", "_backward", "_chain"],
        ),
    ),
    "mixture": Algorithm(
        daam.mixture_attention,
        reference.mixture,
        ("mean_offsets", "c"),
        workloads.ALGORITHMS["mixture"].draw,
        lambda case: (case.eps_or_default, case.padding),
        eps=1e-8,
        features=False,
        kernels=(
            ["_forward", "_backward", "_chain"],
            ["_stats", "_merge", "_scales", "_merge_scales", "_forward", "_sums", "_merge_sums", "_backward", "_chain"],
        ),
    ),
    "gate": Algorithm(
        daam.density_gate,
        reference.gate,
        ("mean_offsets", "log_sigma"),
        workloads.ALGORITHMS["gate"].draw,
        lambda case: (),
        eps=None,
        features=False,
        kernels=(
            ["_forward", "_backward", "_chain"],
            ["_stats", "_merge", "_forward", "_sums", "_backward", "_chain"],
        ),
    ),
}


@dataclass(frozen=True)
class Case:
    """One call: shape and axis as a user sees them; layout and grads name strides. params is P of density attention,
    "features" or "one", and num_gaussians of the others.
    """

    shape: tuple[int, ...]
    axis: int
    heads: int = 1
    params: str | int = "features"
    layout: str = "contiguous"
    grads: str = "contiguous"
    mask: bool = False
    residual: bool = False
    weights: bool = True
    offset: float = 0.5
    eps: float | None = None
    padding: float | None = None
    algorithm: str = "density"

    def __str__(self) -> str:
        flags = [name for name in ("mask", "residual", "padding") if getattr(self, name) not in (False, None)]
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
        """Of the parameters."""
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


def strided(shape, layout, dtype, generator, device="cpu", offset=0.0) -> Tensor:
    """A random tensor of a shape whose memory is laid out in one of LAYOUTS or GRADS."""

    def base(sizes) -> Tensor:  # drawn on the CPU in fp32, so that every device and dtype sees the same numbers
        return (torch.randn(sizes, generator=generator) + offset).to(device, dtype)

    if layout == "expanded":
        return base([1 if d % 2 == 0 else size for d, size in enumerate(shape)]).expand(shape)
    if layout == "sliced":
        return base([2 * size + 1 for size in shape])[tuple(slice(1, 1 + 2 * size, 2) for size in shape)]
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
    grad_y: Tensor
    grad_weights: Tensor | None

    def leaves(self) -> list[Tensor]:
        """x and the parameters, each requiring grad."""
        return [t.detach().requires_grad_() for t in (self.x, *self.params)]


def inputs(case: Case, dtype=torch.float64, seed: int = 0, device="cpu") -> Inputs:
    """Random inputs, parameters (fp32, or fp64 for fp64) and upstream gradients."""
    generator = torch.Generator().manual_seed(seed)
    shape = (case.heads, case.columns)
    mask = None
    if case.mask:
        mask = torch.rand(case.shape[: case.positive_axis + 1], generator=generator) > 0.3
        mask[(0,) * case.positive_axis][: case.shape[case.axis] // case.heads] = False  # a chunk of nothing
        mask = mask.to(device)
    x = strided(case.shape, case.layout, dtype, generator, device, case.offset)
    if case.padding is not None:
        x[(torch.rand(case.shape, generator=generator) < 0.2).to(device)] = case.padding
    normal, uniform = torch.randn(shape, generator=generator), torch.rand(shape, generator=generator)
    params = torch.float64 if dtype == torch.float64 else torch.float32
    return Inputs(
        x=x,
        params=tuple(p.to(device, params) for p in case.spec.draw(normal, uniform)),
        mask=mask,
        grad_y=strided(case.shape, case.grads, dtype, generator, device),
        grad_weights=strided(case.shape, case.grads, dtype, generator, device) if case.weights else None,
    )


def attend(case: Case, x: Tensor, p: Tensor, q: Tensor, mask: Tensor | None = None, **options):
    """The public function of a case's algorithm, with the case's arguments; options override them."""
    own = {"norm_axis": case.axis, "residual": case.residual, "return_weights": case.weights, "mask": mask}
    if case.spec.eps is not None:
        own["eps"] = case.eps_or_default
    if case.padding is not None:
        own["padding_value"] = case.padding
    return case.spec.call(x, p, q, **{**own, **options})


def run(case: Case, given: Inputs, backend: str) -> dict[str, Tensor]:
    """y, weights and the gradients of one backend, by name."""
    leaves = given.leaves()
    out = attend(case, *leaves, given.mask, backend=backend)
    outputs = dict(zip(("y", "weights"), out if case.weights else (out,), strict=False))
    grads = [given.grad_y, given.grad_weights][: len(outputs)]
    found = torch.autograd.grad(list(outputs.values()), leaves, grads)
    return outputs | dict(zip(case.gradients, found, strict=True))


def broadcast(mask: Tensor | None, case: Case) -> Tensor | None:
    """A mask as the reference takes it."""
    return None if mask is None else mask.reshape(*mask.shape, *[1] * (len(case.shape) - mask.dim()))


def oracle(case: Case, given: Inputs) -> dict[str, Tensor]:
    """The same by plain autograd through the formula, in float64."""
    leaves = [t.detach().cpu().double().requires_grad_() for t in (given.x, *given.params)]
    mask = None if given.mask is None else broadcast(given.mask.cpu(), case)
    how = (case.positive_axis, *case.spec.settings(case), case.residual)
    y, weights = case.spec.reference.formula(*leaves, mask, *how)
    loss = (y * given.grad_y.cpu().double()).sum()
    if case.weights:
        loss = loss + (weights * given.grad_weights.cpu().double()).sum()
    grads = torch.autograd.grad(loss, leaves)
    result = {"y": y, "weights": weights} if case.weights else {"y": y}
    return {k: v.detach() for k, v in result.items()} | dict(zip(case.gradients, grads, strict=True))


def error(result: Tensor, expected: Tensor) -> float:
    """max |difference| / max |expected|; NaN never passes a comparison."""
    if expected.numel() == 0:
        return 0.0
    scale = expected.abs().max().item() or 1.0
    return ((result.detach().cpu().double() - expected).abs().max() / scale).item()


def places_summed(case: Case, name: str) -> float:
    """Places that a gradient of a parameter sums over; 1 for everything else."""
    if not name.startswith("d_"):
        return 1
    positions = math.prod(case.shape) // case.heads
    return positions // (case.columns if case.spec.features else 1)


@contextlib.contextmanager
def recorded_launches():
    """The names of the kernels that run, in order: a fallback cannot pass for a kernel."""
    names: list[str] = []
    original = launch.launch

    def record(kernel, *args, **meta):
        names.append(kernel.fn.__name__)
        return original(kernel, *args, **meta)

    with mock.patch.object(launch, "launch", record):
        yield names


def golden(name: str) -> tuple[dict[str, Tensor], dict]:
    """Arrays and settings of a published case."""
    with np.load(DATA / f"{name}.npz") as file:
        meta = json.loads(str(file["meta"]))
        return {key: torch.from_numpy(file[key]) for key in file.files if key != "meta"}, meta


GOLDEN = tuple(
    sorted(path.stem for path in DATA.glob("*.npz") if path.stem not in ("block_three_layers", "jepa_channel_gate"))
)


def check_golden(name: str, backend: str, device="cpu") -> None:
    """A published case of one attention. paper_* have 1e-8 on the variance beside eps."""
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
    errors = {key: error(result, data[key].double()) for key, result in results.items()}
    assert max(errors.values()) < (1e-10 if y.dtype == torch.float64 else 1e-5), errors
