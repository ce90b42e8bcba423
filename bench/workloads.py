"""Workloads of the benchmarks: the shapes of the paper and of its users, as data, and their random inputs.

workloads("cuda")     # on a GPU; "cpu": small versions of the same

Whole modules are in `modules.py`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, partial

import torch
from torch import Tensor

import daam
from daam.kernels.algorithms import ALGORITHMS, Algorithm

STABLE = "stable"  # the algorithm of the authors' own models


@dataclass(frozen=True)
class Workload:
    """Describe one algorithm on x of a shape, whose axis is cut by heads. family: the name of workloads that differ in
    size and dtype. Density attention has one Gaussian, whose parameters follow x's last axis. masked: whether a mask
    leaves out positions at the end of the axis, of each entry along the first dimension another number.
    """

    family: str
    algorithm: str
    shape: tuple[int, ...]
    axis: int
    heads: int
    gaussians: int = 1
    dtype: str = "bfloat16"
    masked: bool = False
    whole = False  # whether it is a whole module
    in_model = False  # whether it is a model around our layer, which is timed compiled, and not else

    def __str__(self) -> str:
        size = "x".join(map(str, self.shape))
        sizes = f"{size}-axis{self.axis}-heads{self.heads}-gaussians{self.gaussians}"
        return f"{self.family}-{self.algorithm}-{sizes}{'-masked' if self.masked else ''}-{self.dtype}"

    @property
    def x(self) -> Tensor:
        """Return x on the meta device, without memory."""
        return torch.empty(self.shape, dtype=getattr(torch, self.dtype), device="meta")

    @property
    def record(self) -> Algorithm:
        """Return what the algorithm is."""
        return ALGORITHMS[self.algorithm]

    @property
    def feature_axis(self) -> int | None:
        """Return the axis that parameters vary along; None where they follow none."""
        return len(self.shape) - 1 if self.record.features else None

    @property
    def params_shape(self) -> tuple[int, int]:
        """Return the shape of each parameter: (heads, features or Gaussians)."""
        if not self.record.features:
            return self.heads, self.gaussians
        return self.heads, self.shape[-1] // (self.heads if self.axis == self.feature_axis else 1)

    @property
    def params_bytes(self) -> int:
        """Return the bytes of all parameters, which are fp32."""
        return 2 * 4 * math.prod(self.params_shape)

    @property
    def moved(self) -> dict[str, int]:
        """Return how many tensors of x's size each pass must move."""
        return {"forward": 2, "backward": 3}

    def inputs(self, device: str) -> tuple[Tensor, tuple[Tensor, ...], Tensor]:
        """Return x, the two parameters in fp32, and grad_y on a device: random, the same at every call."""
        generator = torch.Generator(device).manual_seed(0)
        x, grad_y = (torch.randn(self.shape, generator=generator, device=device).to(self.x.dtype) for _ in range(2))
        normal = torch.randn(self.params_shape, generator=generator, device=device)
        uniform = torch.rand(self.params_shape, generator=generator, device=device)
        return x, self.record.draw(normal, uniform), grad_y

    def mask(self, device: torch.device | str) -> Tensor | None:
        """Return the mask on a device, of x's shape up to the axis; None where there is none. It is kept."""
        return _mask(self.shape[: self.axis + 1], device) if self.masked else None

    def call(self, x: Tensor, p: Tensor, q: Tensor, backend: str, mask: Tensor | None = None) -> Tensor:
        """Return y of the algorithm's public function on x with parameters p and q."""
        return getattr(daam, self.record.function)(x, p, q, norm_axis=self.axis, mask=mask, backend=backend)

    def compute_reference(self, x: Tensor, *params: Tensor) -> Tensor:
        """Return y as it should be, where x and the parameters are fp64."""
        return self.call(x, *params, backend="eager", mask=self.mask(x.device))

    def bind(
        self, leaves: tuple[Tensor, ...], backend: str, wrap: Callable[[Callable], Callable] = lambda call: call
    ) -> Callable[[], Tensor]:
        """Return a function that returns y of leaves, x and the parameters, on a backend; wrap: as torch.compile does,
        what is called with them.
        """
        call, mask = wrap(partial(self.call, backend=backend)), self.mask(leaves[0].device)
        return lambda: call(*leaves, mask=mask)


@cache
def _mask(shape: tuple[int, ...], device: torch.device | str) -> Tensor:
    """Return a mask of a shape: of n positions along the last dimension between n/2 and n - 1 are True."""
    length = shape[-1]
    valid = length // 2 + torch.arange(shape[0], device=device) * 7 % (length // 2)
    valid = valid.view(-1, *[1] * (len(shape) - 1))
    return (torch.arange(length, device=device) < valid).expand(shape).contiguous()


# What people run, `(family, algorithm, …)`: authors: their models of speech, whose last of four heads takes the
# remainder. gates: of their tokenizer, and a fork's of 90,000 steps. layers: the paper's, of an encoder's 24 layers.
# gpt2: a study of GPT-2. channels: a UNet's. speech: 40 bands over time. routing: of 4 choices, where the host's time
# is all. slots: a model of beliefs, in a variable number of slots. sweep and last are of no one: they show what length
# does, in columns and in rows.
_GPU = [
    *(Workload("layers", name, (8, 24, 1024), 1, *sizes) for name, *sizes in (("density", 8), ("mixture", 4, 4))),
    *(Workload("layers", "density", (32, 40, 5120), 1, heads) for heads in (8, 1)),
    *(Workload("authors", STABLE, (32, *sizes), 2, 4, 4) for sizes in ((64, 30_000), (128, 3750), (256, 750))),
    Workload("authors", STABLE, (8, 128, 60_000), 2, 4, 4),
    *(Workload("gates", "gate", (32, 1, length), 2, 1, 4) for length in (90_000, 45_000, 5625, 1125, 225, 37)),
    *(Workload("gpt2", "mixture", (8, 1024, 768), 1, 8, gaussians) for gaussians in (20, 5)),
    Workload("channels", "mixture", (32, 256, 64, 64), 1, 1, 16),
    Workload("speech", "mixture", (32, 40, 1000), 1, 4, 16),
    Workload("routing", "mixture", (1, 4), 1, 1, 4, "float64"),
    Workload("slots", "gate", (64, 200, 256), 1, 1, 4, masked=True),
    *(Workload("sweep", "mixture", (8, 2**k, 768), 1, 8, 4) for k in range(7, 16)),
    *(Workload("last", "density", (2**26 // n, n), 1, 1) for n in (1024, 128, 512, 4096, 16384)),
    Workload("last", "mixture", (2**16, 1024), 1, 1, 4),
    Workload("last", "gate", (2**16, 1024), 1, 1, 4),
]
_CPU = [
    *(Workload("layers", name, (8, 24, 1024), 1, *sizes) for name, *sizes in (("density", 8), ("mixture", 4, 4))),
    *(Workload("authors", STABLE, sizes, 2, 4, 4) for sizes in ((1, 8, 30_000), (4, 64, 750))),
    Workload("gates", "gate", (32, 1, 5625), 2, 1, 4),
    Workload("gpt2", "mixture", (1, 1024, 128), 1, 8, 20),
    Workload("channels", "mixture", (2, 256, 32, 32), 1, 1, 16),
    Workload("speech", "mixture", (8, 40, 500), 1, 4, 16),
    Workload("routing", "mixture", (1, 4), 1, 1, 4, "float64"),
    Workload("slots", "gate", (4, 200, 256), 1, 1, 4, masked=True),
    *(Workload("sweep", "mixture", (1, 2**k, 128), 1, 4, 4) for k in (7, 9, 11, 12)),
    *(Workload("last", "density", (2**20 // n, n), 1, 1) for n in (1024, 16384)),
    Workload("last", "gate", (1024, 1024), 1, 1, 4),
]


# lengths of chunks that the authors' models have, of 24 layers by 8 heads or one, and of a gate, by algorithm: in rows
# that stay on chip and in longer ones, in columns that do and in longer ones
LENGTHS = {
    "contiguous": {"density": (187, 3750), "mixture": (187, 750, 937, 3750), "gate": (225, 1125)},
    "long rows": {"density": (7500, 16_384), "mixture": (7500, 15_000), "gate": (2250, 5625)},
    "strided": {"density": (3, 24), "mixture": (3, 24), "gate": (3, 24)},
    "long columns": {"density": (512,), "mixture": (512,), "gate": (256,)},
}


def chunks_of(name: str, regime: str, length: int) -> Workload:
    """Return a workload of 2^26 elements: rows of a length, or columns, 1024 of them side by side."""
    shape = (2**26 // length, length) if regime in ("contiguous", "long rows") else (2**16 // length, length, 1024)
    return Workload("lengths", name, shape, 1, 1, 1 if ALGORITHMS[name].features else 4)


def lengths() -> dict[Workload, str]:
    """Return the workloads of LENGTHS, with the regime of each."""
    return {
        chunks_of(name, regime, length): regime
        for regime, algorithms in LENGTHS.items()
        for name, found in algorithms.items()
        for length in found
    }


def workloads(device: str) -> list[Workload]:
    """Return the workloads of a device, those first that begin a family: in bf16 on a GPU, in fp32 on a CPU, but for
    those of a dtype of their own. Those that begin a family come in the other dtype too, on a CPU only the first.
    """
    own, other, shapes = ("float32", "bfloat16", _CPU) if device == "cpu" else ("bfloat16", "float32", _GPU)
    first = {one.family: one for one in reversed(shapes)}
    begins = [one for one in shapes if one is first[one.family]]
    others = [one for one in shapes if one is not first[one.family]]
    again = [one for one in (begins[:1] if device == "cpu" else begins) if one.dtype == Workload.dtype]
    return [*(typed(one, own) for one in (*begins, *others)), *(replace(one, dtype=other) for one in again)]


def typed(workload: Workload, dtype: str) -> Workload:
    """Return a workload in a dtype, or as it is where it has one of its own: another than the default."""
    return replace(workload, dtype=dtype) if workload.dtype == Workload.dtype else workload
