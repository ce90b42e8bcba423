"""Cases that are tried on a GPU, most important first: those of the tests' matrix, and the workloads that are timed."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable

import torch

from bench.device.session import ROOT
from bench.modules import ModuleWorkload
from bench.workloads import STABLE, Workload
from daam.kernels import tiles

sys.path.append(str(ROOT / "tests"))  # the cases, their inputs and the rule are the tests'

import helpers
from helpers import ALGORITHMS, Case, Inputs

BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
Typed = tuple[Case, torch.dtype]


def case(name: str, *args, params: int = 4, **options) -> Case:
    """Return a case of an algorithm whose parameters follow x's last axis, or else of so many Gaussians."""
    algorithm = ALGORITHMS[name]
    return Case(*args, params="features" if algorithm.features else params, algorithm=name, **options)


def correct_cases() -> list[Typed]:
    """Return all cases: shipped shapes first, then every regime, then layouts and odd sizes, then large ones."""
    return list(dict.fromkeys([*_shipped(), *_regimes(), *_odd(), *_large()]))


def _shipped() -> list[Typed]:
    """Return what the paper and the modules run: layers, sequence, last axis, channels, steps."""
    found = []
    for name in ALGORITHMS:
        y_only = [((2, 1024, 768), 1, 8), ((1, 4096, 128), 1, 1), ((8, 20000), -1, 1)]
        found += [(case(name, shape, 1, 8), dtype) for shape in [(4, 24, 1024)] for dtype in (BF16, FP32)]
        found += [(case(name, (2, 24, 1024), 1, 1), BF16)]
        found += [(case(name, (64, 1024), -1, 1), dtype) for dtype in (BF16, FP32)]
        found += [(case(name, *sizes, weights=False), BF16) for sizes in y_only]
    found += [(case("mixture", (2, 64, 16, 16), 1, 4, params=3), BF16), (case("gate", (2, 8, 24000), 2, 1), BF16)]
    found += [(case("density", (4, 40, 512), 1, 8), BF16)]
    return found + [(case("density", (2, 24, 1024), 1, 8, mask=True, residual=True), BF16)]


def _regimes() -> list[Typed]:
    """Return chunks along the fastest dimension and along another one, on chip and streamed, as the audit has them."""
    found = []
    for name, spec in ALGORITHMS.items():
        found += [(case(name, (24, n), 1, 1), BF16) for n in (4, 16, 64, 200, 512, 768, 4096, 8000)]
        for n in (1, 3, 6, 12, 37, 64, 128, 256, 8192):
            if n > 1 or not spec.record.unbiased:
                found.append((case(name, (2, n, 64 if n > 256 else 256), 1, 1, weights=n <= 256), BF16))
        found += [(case(name, (24, n), 1, 1), FP32) for n in (64, 512, 4096, 7500, 20000)]
        found += [(case(name, (2, n, 256), 1, 1), FP32) for n in (3, 24, 64, 256, 600)]
        found += [(case(name, (2, n, 256), 1, 1, mask=True, residual=True), BF16) for n in (24, 128, 700)]
        found += [(case(name, (16, n), 1, 1, mask=True, residual=True), BF16) for n in (64, 1024, 9000)]
    found += [(Case((24, n), 1, 1, "one"), BF16) for n in (64, 1024, 15000, 20000)]
    return found + [(Case((2, n, 256), 1, 1, "one"), BF16) for n in (3, 24, 256, 2000)]


def _odd() -> list[Typed]:
    """Return sizes that nothing divides, strides, other dtypes, numbers of Gaussians, padding."""
    found = []
    for name in ALGORITHMS:
        found += [(case(name, (3, 37, 1000), 1, 1), dtype) for dtype in (BF16, FP32)]
        found += [(case(name, (5, 1001), 1, 1), BF16), (case(name, (3, 600, 21), 1, 2), BF16)]
        found += [(case(name, (2, 200, 1032), 1, 1), BF16)]
        for layout, grads in (("transposed", "expanded"), ("sliced", "transposed"), ("channels_last", "sliced")):
            found += [(case(name, (2, 24, 9, 40), 1, 2, layout=layout, grads=grads, mask=True), BF16)]
        found += [(case(name, (2, 300, 21), 1, 2, mask=True, residual=True), FP64)]
        found += [(case(name, (7, 50), 1, 2), dtype) for dtype in (FP64, FP16)]
        found += [(case(name, (2, 260, 9), 1, 1, offset=30.0), FP32)]
    found += [(case(name, (4, 64), 1, 2, params=n), BF16) for n in (1, 3, 8, 16) for name in ("mixture", "gate")]
    mixture = [
        (case("mixture", (3, 33), 1, 2, params=3, padding=-1.5, eps=0.15, layout="sliced"), FP32),
        (case("mixture", (2, 1100), 1, 1, params=3, padding=0.0, eps=0.3, residual=True), BF16),
        (case("mixture", (3, 200, 5), 1, 3, params=3, mask=True, eps=0.0), FP32),
    ]
    return found + mixture


def _large() -> list[Typed]:
    """Return programs of several tiles. No larger: a dozen processes hold float64 copies of one each."""
    shapes = (((512, 24, 1024), 1, 8), ((2**13, 1024), 1, 1), ((8, 2048, 768), 1, 1))
    found = [(case(name, *sizes, weights=False), BF16) for name in ALGORITHMS for sizes in shapes]
    return [*found, (case("gate", (8, 64, 24000), 2, 1, weights=False), BF16)]


def is_large(case: Case) -> bool:
    """Tell whether x has more elements than inputs are drawn of on the host."""
    return math.prod(case.shape) > 2**22


def representative() -> list[Typed]:
    """Return the cases that are emulated, in the order of all: of each algorithm the first, which is the paper's shape,
    and of each regime, width and mask the smallest.
    """
    smallest: dict[tuple, Typed] = {}
    for case, dtype in correct_cases():
        by_row = case.positive_axis == len(case.shape) - 1
        x = torch.empty(case.shape, dtype=dtype, device="meta")
        forward = case.spec.record.forward(4)
        streamed = tiles.streams(forward, x, case.positive_axis, case.heads, case.feature_axis, case.mask)
        key = (case.algorithm, by_row, streamed, dtype.itemsize, case.mask)
        if key not in smallest or math.prod(case.shape) < math.prod(smallest[key][0].shape):
            smallest[key] = case, dtype
    first = {case.algorithm: (case, dtype) for case, dtype in reversed(correct_cases())}
    chosen = {*first.values(), *smallest.values()}
    return [typed for typed in correct_cases() if typed in chosen]


def bit_cases() -> list[Typed]:
    """Return cases of every regime whose results must not change by a bit."""
    shapes = (((3, 24, 1024), 1, 8), ((3, 1024), 1, 1), ((3, 600, 64), 1, 1), ((3, 9000), 1, 1), ((3, 24, 40), 1, 1))
    return [(case(name, *sizes), dtype) for name in ALGORITHMS for dtype in (BF16, FP32) for sizes in shapes]


def draw_inputs(case: Case, dtype: torch.dtype, device: str) -> Inputs:
    """Return the inputs of a case: the tests', or, where x is large, random ones that are drawn on the device."""
    if not is_large(case):
        return helpers.inputs(case, dtype, device=device)
    generator = torch.Generator(device).manual_seed(0)

    def draw(shape: tuple[int, ...], distribution: Callable = torch.randn) -> torch.Tensor:
        return distribution(shape, generator=generator, device=device)

    params = case.heads, case.columns
    x, grad_y = ((draw(case.shape) + offset).to(dtype) for offset in (case.offset, 0))
    return Inputs(x, tuple(case.spec.draw(draw(params), draw(params, torch.rand))), None, grad_y, None)


TIMED = [
    Workload("layers", "density", (32, 24, 1024), 1, 8),
    Workload("layers", "density", (2048, 24, 1024), 1, 8),
    Workload("sequence", "density", (8, 8192, 768), 1, 8),
    Workload("last", "density", (2**16, 1024), 1, 1),
    Workload("layers", "mixture", (2048, 24, 1024), 1, 8, 4),
    Workload("last", "gate", (2**16, 1024), 1, 1, 4),
    Workload("gpt2", "mixture", (8, 1024, 768), 1, 8, 20),
    Workload("layers", "gate", (2048, 24, 1024), 1, 8, 4),
    Workload("last", "mixture", (2**16, 1024), 1, 1, 4),
    Workload("channels", "mixture", (32, 256, 64, 64), 1, 4, 3),
    Workload("steps", "gate", (8, 256, 24000), 2, 1, 4),
    Workload("sweep", "mixture", (8, 8192, 768), 1, 8, 4),
    ModuleWorkload("model", "density", (8, 1024, 768), 1, 8),
    Workload("layers", "density", (2048, 24, 1024), 1, 8, dtype="float32"),
    Workload("authors", STABLE, (32, 64, 30_000), 2, 4, 4),
    Workload("last", "density", (2**14, 4096), 1, 1),
    Workload("last", "density", (2**12, 16384), 1, 1),
    ModuleWorkload("gate-module", "gate", (32, 512, 1125), 2, 1, 4, "float32"),
    Workload("authors", STABLE, (32, 256, 750), 2, 4, 4),
    ModuleWorkload("block", "mixture", (4096, 1024), 1, 4, 5, layers=3),
]
PROFILED = [TIMED[i] for i in (0, 1, 2, 3, 4, 5, 8, 9, 10)]  # a regime and an algorithm each
