"""Workloads of the benchmarks: the shapes of the paper and of its users, as data, and their random inputs.

workloads("cuda")     # on a GPU; "cpu": small versions of the same
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

import daam
from daam.kernels.algorithms import ALGORITHMS, Algorithm


@dataclass(frozen=True)
class Workload:
    """Describe one algorithm on x of a shape, whose axis is cut by heads. family: the name of workloads that differ in
    size and dtype. Density attention has one Gaussian, whose parameters follow x's last axis.
    """

    family: str
    algorithm: str
    shape: tuple[int, ...]
    axis: int
    heads: int
    gaussians: int = 1
    dtype: str = "bfloat16"

    def __str__(self) -> str:
        size = "x".join(map(str, self.shape))
        sizes = f"{size}-axis{self.axis}-heads{self.heads}-gaussians{self.gaussians}"
        return f"{self.family}-{self.algorithm}-{sizes}-{self.dtype}"

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

    def inputs(self, device: str) -> tuple[Tensor, tuple[Tensor, Tensor], Tensor]:
        """Return x, the two parameters in fp32, and grad_y on a device: random, the same at every call."""
        generator = torch.Generator(device).manual_seed(0)
        x, grad_y = (torch.randn(self.shape, generator=generator, device=device).to(self.x.dtype) for _ in range(2))
        normal = torch.randn(self.params_shape, generator=generator, device=device)
        uniform = torch.rand(self.params_shape, generator=generator, device=device)
        return x, self.record.draw(normal, uniform), grad_y

    def call(self, x: Tensor, p: Tensor, q: Tensor, backend: str) -> Tensor:
        """Return y of the algorithm's public function on x with parameters p and q."""
        return getattr(daam, self.record.function)(x, p, q, norm_axis=self.axis, backend=backend)


_GPU = [
    *(Workload("layers", "density", (32, *sizes), 1, heads) for sizes in ((24, 1024), (40, 5120)) for heads in (8, 1)),
    *(Workload("sequence", "density", (8, length, 768), 1, 8) for length in (1024, 8192, 32768)),
    Workload("sequence", "mixture", (8, 1024, 768), 1, 8, 1),
    *(Workload("sweep", "mixture", (8, 2**k, 768), 1, 8, 4) for k in range(7, 16)),
    *(Workload("last", "density", (2**26 // n, n), 1, 1) for n in (128, 512, 1024, 4096, 16384)),
    Workload("last", "mixture", (2**16, 1024), 1, 1, 4),
    Workload("last", "gate", (2**16, 1024), 1, 1, 4),
    Workload("layers", "mixture", (32, 24, 1024), 1, 8, 4),
    Workload("channels", "mixture", (32, 256, 64, 64), 1, 4, 3),
    Workload("steps", "gate", (8, 256, 24000), 2, 1, 4),
]
_CPU = [
    *(Workload("layers", "density", (32, 24, 1024), 1, heads) for heads in (8, 1)),
    Workload("layers", "density", (4, 40, 5120), 1, 8),
    Workload("sequence", "density", (8, 1024, 768), 1, 8),
    *(Workload("sequence", "mixture", (8, 1024, 768), 1, 8, gaussians) for gaussians in (4, 1)),
    *(Workload("sweep", "mixture", (1, 2**k, 128), 1, 4, 4) for k in (7, 9, 11, 12)),
    *(Workload("last", "density", (2**20 // n, n), 1, 1) for n in (128, 1024, 16384)),
    Workload("last", "mixture", (1024, 1024), 1, 1, 4),
    Workload("last", "gate", (1024, 1024), 1, 1, 4),
    Workload("channels", "mixture", (2, 256, 32, 32), 1, 4, 3),
    Workload("steps", "gate", (2, 16, 24000), 2, 1, 4),
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
    """Return the workloads of a device, those first that begin a family: in bf16 on a GPU, in fp32 on a CPU. Those that
    begin a family come in the other dtype too, on a CPU only the first of them.
    """
    own, other, shapes = ("float32", "bfloat16", _CPU) if device == "cpu" else ("bfloat16", "float32", _GPU)
    first = {one.family: one for one in reversed(shapes)}
    begins = [one for one in shapes if one is first[one.family]]
    others = [one for one in shapes if one is not first[one.family]]
    again = begins[:1] if device == "cpu" else begins
    return [*(replace(one, dtype=own) for one in (*begins, *others)), *(replace(one, dtype=other) for one in again)]
