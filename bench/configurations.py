"""Configurations of the kernels that the audit reads: what they are called on, and the launches that makes.

Single layers, layers that share a launch, and the gate with its projection and product, each in the regimes that its
kernels have, of 2^26 elements of x.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch

from bench.aot import Launch
from bench.modelled import moves_channels, record_gated, record_layers, record_passes
from daam.kernels.algorithms import ALGORITHMS
from daam.kernels.budgets import LONGEST_CONTIGUOUS, LONGEST_STRIDED

FEATURES = 1024
GAUSSIANS = 4
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, "fp64": torch.float64}
ELEMENTS = 2**26  # of x


@dataclass(frozen=True)
class Configuration:
    """Describe a forward and a backward pass of one regime.

    order: "rows" where the axis is the fastest dimension, "columns" where another one is. along: what parameters vary
    along, "chunk", "inner" or "nothing". full: with mask, weights, their gradient and residual. layers: of one launch;
    several have a residual, as published, and with full a mask and weights.
    """

    algorithm: str
    order: str
    along: str
    chunk: int
    dtype: str = "bf16"
    full: bool = False
    layers: int = 1

    def __str__(self) -> str:
        name = self.algorithm if self.layers == 1 else f"{self.algorithm}-layers{self.layers}"
        parts = (name, self.order, self.along, self.chunk, self.dtype, *(["full"] if self.full else []))
        return "-".join(map(str, parts))

    def passes(self) -> dict[str, list[Launch]]:
        """Return the launches of a forward and a backward pass, with gradients of everything."""
        shape, axis = (ELEMENTS // self.chunk, self.chunk), 1
        if self.order == "columns":
            shape = (ELEMENTS // (self.chunk * FEATURES), self.chunk, FEATURES)
        elif self.along == "inner":
            shape, axis = (ELEMENTS // (self.chunk * FEATURES), FEATURES, self.chunk), 2
        feature_axis = {"chunk": axis, "inner": 3 - axis, "nothing": None}[self.along]
        x = torch.empty(shape, dtype=DTYPES[self.dtype], device="meta")
        columns = {"chunk": self.chunk, "inner": FEATURES, "nothing": 1 if self.algorithm == "density" else GAUSSIANS}
        p = torch.empty(1, columns[self.along], device="meta")
        mask = torch.empty(shape, dtype=torch.bool, device="meta")[..., :1] if self.full else None
        if self.layers > 1:
            return record_layers(self.algorithm, self.layers, x, p, mask, axis, self.full)
        return record_passes(self.algorithm, x, p, mask, axis, feature_axis, self.full)

    def launches(self) -> list[Launch]:
        """Return the launches of both passes."""
        return list(itertools.chain(*self.passes().values()))


@dataclass(frozen=True)
class GatedConfiguration:
    """Describe a forward and a backward pass of the gate with its projection and product on x (batch, channels, times).
    order: the fastest dimension, "times" or "channels". full: with mask, and a gradient of the gate.
    """

    order: str
    channels: int
    times: int
    dtype: str = "bf16"
    full: bool = False
    algorithm = "gate"

    def __str__(self) -> str:
        parts = ("gated", self.order, self.channels, self.times, self.dtype, *(["full"] if self.full else []))
        return "-".join(map(str, parts))

    def passes(self) -> dict[str, list[Launch]]:
        """Return the launches of a forward and a backward pass, with gradients of everything."""
        batch = ELEMENTS // (self.channels * self.times)
        x = torch.empty(batch, self.times, self.channels, dtype=DTYPES[self.dtype], device="meta").mT
        if self.order == "times":
            x = x.contiguous()
        return record_gated(x, GAUSSIANS, self.full)

    def launches(self) -> list[Launch]:
        """Return the launches of both passes that move x; those of its weights are the gate's, on a channel of it."""
        return [one for one in itertools.chain(*self.passes().values()) if moves_channels(one)]


# chunk lengths: of models, powers of two and others, the longest on chip, and streamed ones
ROWS = [4, 16, 64, 200, 512, 768, 1024, LONGEST_CONTIGUOUS, 8 * LONGEST_CONTIGUOUS]
UNEVEN = [750, 937, 3750, 7500, 15_000]  # rows of the authors' models
COLUMNS = [1, 3, 6, 12, 24, 37, 64, 128, LONGEST_STRIDED, 32 * LONGEST_STRIDED]
OTHERS = [name for name in ALGORITHMS if name != "density"]
LAYERED = [name for name, record in ALGORITHMS.items() if record.layers_backward]
LAYERS = [  # order, chunk and how many share a launch: of blocks that people have, in heads or whole
    *(("rows", 256, layers) for layers in (2, 3, 4)),
    *(("rows", 1024, layers) for layers in (2, 3)),
    ("columns", 12, 3),
    ("columns", 24, 2),
]
# of the authors' tokenizer: its first and second strides, and a later one whose channels are fastest
GATES = [("times", 128, 45_000), ("times", 128, 5625), ("channels", 128, 1125)]
CONFIGURATIONS = [
    Configuration(*one) if isinstance(one, tuple) else one
    for one in (
        *itertools.product(["density"], ["rows"], ["chunk", "nothing"], ROWS),
        *itertools.product(["density"], ["columns"], ["inner", "nothing"], COLUMNS),
        *itertools.product(["density"], ["rows"], ["inner"], [ROWS[1], ROWS[6], ROWS[-1]]),
        *itertools.product(["density"], ["columns"], ["chunk"], [COLUMNS[1], COLUMNS[6], COLUMNS[-1]]),
        *itertools.product(OTHERS, ["rows"], ["nothing"], ROWS),
        *itertools.product(ALGORITHMS, ["rows"], ["nothing"], UNEVEN),
        Configuration("density", "rows", "chunk", UNEVEN[3]),
        *itertools.product(OTHERS, ["columns"], ["nothing"], COLUMNS),
        *(
            Configuration(name, order, "nothing", chunk, layers=layers)
            for name in LAYERED
            for order, chunk, layers in LAYERS
        ),
        *(GatedConfiguration(*sizes) for sizes in GATES),
    )
]
ONE_A_REGIME = [
    Configuration("density", "rows", "chunk", 1024),
    Configuration("density", "rows", "chunk", ROWS[-1]),
    *(Configuration("density", "columns", "inner", chunk) for chunk in (3, 256, COLUMNS[-1])),
    *(Configuration(name, "rows", "nothing", 1024) for name in OTHERS),
    *(Configuration(name, "columns", "nothing", chunk) for name in OTHERS for chunk in (3, 64)),
    Configuration("mixture", "rows", "nothing", 256, layers=2),
    GatedConfiguration("times", 128, 5625),
    # the stabilised mixture's passes over strips take as long to compile as all others', whose frame they share
    Configuration("mixture", "rows", "nothing", ROWS[-1]),  # forward in one launch, backward a launch a step
    *(Configuration(name, "columns", "nothing", COLUMNS[-1]) for name in ("mixture", "gate")),
]
