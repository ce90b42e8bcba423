"""Cases of density attention, their oracle, and the rule by which results are judged."""

from __future__ import annotations

import contextlib
import math
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from torch import Tensor

import daam
from daam import reference
from daam.kernels import launch

DATA = Path(__file__).parent / "data"
EPS = {torch.float16: 2**-11, torch.bfloat16: 2**-8, torch.float32: 2**-24, torch.float64: 2**-53}


@dataclass(frozen=True)
class Case:
    """One call: shape and axis as a user sees them; layout and grads name strides, params is P: "features" or "one"."""

    shape: tuple[int, ...]
    axis: int
    heads: int = 1
    params: str = "features"
    layout: str = "contiguous"
    grads: str = "contiguous"
    mask: bool = False
    residual: bool = False
    weights: bool = True
    offset: float = 0.5

    def __str__(self) -> str:
        flags = [name for name in ("mask", "residual") if getattr(self, name)]
        size = "x".join(map(str, self.shape))
        parts = (size, f"axis{self.axis}", f"heads{self.heads}", self.params, self.layout, self.grads, *flags)
        return "-".join(parts) + ("" if self.weights else "-y_only")


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
    mean_offset: Tensor
    c: Tensor
    mask: Tensor | None
    grad_y: Tensor
    grad_weights: Tensor | None


def inputs(case: Case, dtype=torch.float64, seed: int = 0, device="cpu") -> Inputs:
    """Random inputs, parameters (fp32, or fp64 for fp64) and upstream gradients."""
    generator = torch.Generator().manual_seed(seed)
    axis, last = case.axis % len(case.shape), len(case.shape) - 1
    features = case.shape[-1] // (case.heads if axis == last else 1)
    shape = (case.heads, features if case.params == "features" else 1)
    params = torch.float64 if dtype == torch.float64 else torch.float32
    mask = None
    if case.mask:
        mask = torch.rand(case.shape[: axis + 1], generator=generator) > 0.3
        first = (0,) * axis
        mask[first][: case.shape[axis] // case.heads] = False  # a chunk of nothing
        mask = mask.to(device)
    return Inputs(
        x=strided(case.shape, case.layout, dtype, generator, device, case.offset),
        mean_offset=(0.3 * torch.randn(shape, generator=generator)).to(device, params),
        c=(0.5 + torch.rand(shape, generator=generator)).to(device, params),
        mask=mask,
        grad_y=strided(case.shape, case.grads, dtype, generator, device),
        grad_weights=strided(case.shape, case.grads, dtype, generator, device) if case.weights else None,
    )


def run(case: Case, given: Inputs, backend: str, eps: float = 1e-5) -> dict[str, Tensor]:
    """y, weights and the gradients of one backend, by name."""
    x, mean_offset, c = (t.detach().requires_grad_() for t in (given.x, given.mean_offset, given.c))
    out = daam.density_attention(
        x, mean_offset, c, norm_axis=case.axis, eps=eps, mask=given.mask, residual=case.residual,
        return_weights=case.weights, backend=backend,
    )  # fmt: skip
    outputs = dict(zip(("y", "weights"), out if case.weights else (out,), strict=False))
    grads = [given.grad_y, given.grad_weights][: len(outputs)]
    names = ("dx", "d_mean_offset", "d_c")
    return outputs | dict(
        zip(names, torch.autograd.grad(list(outputs.values()), (x, mean_offset, c), grads), strict=True)
    )


def oracle(case: Case, given: Inputs, eps: float = 1e-5) -> dict[str, Tensor]:
    """The same by plain autograd through the formula, in float64."""
    x, mean_offset, c = (t.detach().cpu().double().requires_grad_() for t in (given.x, given.mean_offset, given.c))
    axis = case.axis % x.dim()
    mask = None if given.mask is None else given.mask.cpu().reshape(*given.mask.shape, *[1] * (x.dim() - axis - 1))
    y, weights = reference.density(x, mean_offset, c, mask, axis, x.dim() - 1, eps, case.residual)
    loss = (y * given.grad_y.cpu().double()).sum()
    if case.weights:
        loss = loss + (weights * given.grad_weights.cpu().double()).sum()
    grads = torch.autograd.grad(loss, (x, mean_offset, c))
    result = {"y": y, "weights": weights} if case.weights else {"y": y}
    return {k: v.detach() for k, v in result.items()} | dict(zip(("dx", "d_mean_offset", "d_c"), grads, strict=True))


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
    if case.params == "one":
        return positions
    last = case.axis % len(case.shape) == len(case.shape) - 1
    return positions // (case.shape[-1] // case.heads if last else case.shape[-1])


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


def golden(name: str) -> dict[str, Tensor]:
    with np.load(DATA / f"{name}.npz") as file:
        return {key: torch.from_numpy(file[key]) for key in file.files if key != "meta"}


GOLDEN = ("paper_layers24_heads1", "paper_layers24_heads8", "paper_layers40_heads8", "paper_shifted")


def check_golden(name: str, backend: str, device="cpu") -> None:
    """A published case, with the 1e-8 that the published code adds to the variance beside eps."""
    data = golden(name)
    x, mean_offset, c = (data[key].to(device).requires_grad_() for key in ("x", "mean_offset", "c"))
    y, weights = daam.density_attention(x, mean_offset, c, eps=1e-5 + 1e-8, return_weights=True, backend=backend)
    y.backward(data["grad_out"].to(device))
    results = {"y": y, "weights": weights, "grad_x": x.grad, "grad_mean_offset": mean_offset.grad, "grad_c": c.grad}
    errors = {key: error(result, data[key]) for key, result in results.items()}
    assert max(errors.values()) < 1e-10, errors
