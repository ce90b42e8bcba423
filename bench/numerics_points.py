"""The points of `bench.numerics`: inputs that are hard in one way each, or in two."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch.nn.functional import softplus

from bench.device.cases import ALGORITHMS, Case, Inputs, case, helpers

DTYPES = {name: getattr(torch, name) for name in ("float32", "bfloat16", "float16")}
SCALES = (1e-6, 1e-4, 1e-2, 1.0, 1e2, 1e4, 1e6)
FACTORS = {
    "mean": (0.0, 1.0, 10.0, 100.0, 1e3, 1e4, 1e5, 1e6),
    "spread": SCALES,
    "length": (2, 3, 16, 100, 1000, 8192, 16_385, 131_072),
    "c": (1e-3, 1e-2, 0.02, 0.1, 1.0, 10.0, 100.0, 1e3),
    "gaussians": (1, 2, 4, 8, 16),
}
PAIRS = {
    "mean x spread": [(m, s) for m in (1e2, 1e4, 1e6) for s in (1e-6, 1e-2, 1e2, 1e6) if (m, s) != (1e2, 1e2)],
    "c x length": [(c, n) for c in (1e-3, 1e3) for n in (2, 1000, 16_385)],
}
STRIDED = (200, 600)  # lengths of an axis that is not the fastest dimension in memory, on chip and streamed


@dataclass(frozen=True)
class Point:
    """Hold what is hard about an input, and which factor it varies. The axis is the fastest dimension of (rows, length)
    where length is varied, else the middle one of (rows, length, 8), which density attention's parameters follow not.
    """

    algorithm: str
    dtype: str
    factor: str = "base"
    mean: float = 0.0
    spread: float = 1.0
    length: int = 32
    c: float = 1.0
    gaussians: int = 4
    draws: int = 1

    @property
    def case(self) -> Case:
        """Return the tests' case of this shape."""
        if self.factor == "strided length":
            shape = (1, self.length, 3)
        elif "length" in self.factor:
            shape = (max(1, 64 // self.length), self.length)
        else:
            shape = (2, self.length, 8)
        last = len(shape) == 2
        one = case(self.algorithm, shape, 1, params=self.gaussians, offset=0.0)
        return one.but(params="one") if last and one.spec.features else one

    def inputs(self, seed: int = 0) -> Inputs:
        """Return x, fp32 parameters and grad_y, random; the weights have a gradient of 0, published ones none."""
        given, dtype = helpers.inputs(self.case, seed=seed), DTYPES[self.dtype]
        given.x = (self.mean + self.spread * given.x).to(dtype)
        p, q = given.params
        if ALGORITHMS[self.algorithm].params[1] == "log_sigma":
            q = torch.log(torch.expm1(self.c * softplus(q)))
            q = torch.where(q.isinf(), self.c, q)
        else:
            q = self.c * q
        given.params = (self.spread * p).float(), q.float()
        given.grad_y = given.grad_y.to(dtype)
        given.grad_weights = torch.zeros_like(given.grad_y)
        return given


def points() -> list[Point]:
    """Return all points, in the order in which as few shapes as possible follow each other."""
    found = []
    for name, spec in ALGORITHMS.items():
        for dtype in DTYPES:
            base = Point(name, dtype, gaussians=1 if spec.features else 4)
            varied = {key: values for key, values in FACTORS.items() if not (spec.features and key == "gaussians")}
            found += [replace(base, factor=key, **{key: value}) for key, values in varied.items() for value in values]
            for key, values in PAIRS.items():
                names = key.split(" x ")
                found += [replace(base, factor=key, **dict(zip(names, pair, strict=True))) for pair in values]
            found += [replace(base, factor="strided length", length=n) for n in STRIDED]
    return sorted(found, key=lambda point: (point.algorithm, point.dtype, point.length, point.gaussians))
