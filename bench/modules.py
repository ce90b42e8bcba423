"""Workloads that are whole modules: our gate, our block of layers, and a transformer block that has our layer in it.

modules("cuda")     # on a GPU; "cpu": small versions of the same
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

import daam
from bench.formulas import PlainDAAM, PlainGate, PlainMixture, PlainStable
from bench.workloads import STABLE, Workload, typed

FORMULA = "formula"  # in place of a backend: plain torch operations
HEAD = 64  # features of a head of the transformer's attention, at most


@dataclass(frozen=True)
class ModuleWorkload(Workload):
    """Describe a whole module on x of a shape: layers of an algorithm, one after the other, and what is around them."""

    layers: int = 1
    whole = True

    def __str__(self) -> str:
        return super().__str__().replace(f"gaussians{self.gaussians}", f"gaussians{self.gaussians}-layers{self.layers}")

    @property
    def in_model(self) -> bool:
        """Tell whether our layer is one of a model."""
        return self.family == "model"

    @property
    def params_bytes(self) -> int:
        """Return the bytes of all parameters."""
        return sum(p.nbytes for p in self.build().parameters())

    @property
    def moved(self) -> dict[str, int]:
        """Return how many tensors of x's size each pass must move. Of layers whose chunks coincide: as many as of one.
        A gate needs a sum over x's channels, and backward one of grad_y·x, before it can weigh x.
        """
        return {"forward": 3, "backward": 5} if self.algorithm == "gate" else super().moved

    def build(self, backend: str = "eager") -> nn.Module:
        """Return the module in x's dtype on a backend of ours, or of FORMULA."""
        plain = backend == FORMULA
        how = {"backend": "auto" if plain else backend}
        if self.algorithm == "gate":
            module = (PlainGate if plain else daam.DensityGate)(self.shape[1], self.gaussians, **how)
            module.to_attn.bias.requires_grad_(False)  # the mean takes it away: its gradient is 0, but for rounding
            return module.to(self.x.dtype)
        if self.algorithm == "density":
            one = PlainDAAM if plain else daam.MultiHeadDAAM
            module = one(self.shape[-1], self.heads, norm_axis=self.axis, residual=True, **how)
        else:
            sizes = self.axis, self.heads, self.gaussians
            stable = self.algorithm == STABLE
            block = daam.StableDensityBlock if stable else daam.DensityBlock
            module = block(*([n] * self.layers for n in sizes), self.layers, **how)
            if plain:
                one = PlainStable if stable else PlainMixture
                module.layers = nn.ModuleList(one(*sizes) for _ in range(self.layers))
        return TransformerBlock(self.shape[-1], module).to(self.x.dtype) if self.in_model else module

    def inputs(self, device: str) -> tuple[Tensor, tuple[Tensor, ...], Tensor]:
        """Return x, the module's parameters, and grad_y on a device: random, the same at every call."""
        x, _, grad_y = super().inputs(device)
        torch.manual_seed(0)
        module = self.build()
        for one in module.modules():
            found = [getattr(one, name, None) for name in self.record.params]
            if None not in found:
                drawn = self.record.draw(torch.randn_like(found[0]), torch.rand_like(found[0]))
                for p, value in zip(found, drawn, strict=True):
                    p.data = value
        return x, tuple(_learned(module.to(device)).values()), grad_y

    def compute_reference(self, x: Tensor, *params: Tensor) -> Tensor:
        """Return y as it should be, where x and the parameters are fp64: by the formula."""
        module = self.build(FORMULA).to(x)
        return _first(torch.func.functional_call(module, dict(zip(_learned(module), params, strict=True)), x))

    def bind(
        self, leaves: tuple[Tensor, ...], backend: str, wrap: Callable[[Callable], Callable] = lambda call: call
    ) -> Callable[[], Tensor]:
        """Return a function that returns y of leaves, x and the parameters, on a backend; wrap: as torch.compile does,
        what is called with x.
        """
        x, *params = leaves
        module = self.build(backend).to(x.device)
        for name, p in zip(_learned(module), params, strict=True):
            path, _, last = name.rpartition(".")
            setattr(module.get_submodule(path), last, p)
        call = wrap(lambda x: _first(module(x)))
        return lambda: call(x)


def _learned(module: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters that require grad, by name."""
    return {name: p for name, p in module.named_parameters() if p.requires_grad}


def _first(results: Tensor | tuple[Tensor, ...]) -> Tensor:
    """Return y of what a module returns."""
    return results[0] if isinstance(results, tuple) else results


class TransformerBlock(nn.Module):
    """Attend, weigh the hidden states by a layer of ours, and transform them, each beside what comes in."""

    def __init__(self, width: int, layer: nn.Module):
        super().__init__()
        self.norm, self.project, self.merge = nn.LayerNorm(width), nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.layer = layer
        self.transform = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Return hidden states like x, (batch, positions, width)."""
        heads = (
            t.unflatten(-1, (-1, min(HEAD, t.shape[-1]))).transpose(1, 2)
            for t in self.project(self.norm(x)).chunk(3, -1)
        )
        x = x + self.merge(scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2))
        x = self.layer(x)
        return x + self.transform(x)


# gate-module: of the authors' tokenizer, at its strides, in fp32 as they train it, and in a fork's bf16. block: of the
# published package, three layers as its README shows, and of an implicit model; stable: its authors' later dialect.
_GPU = [
    *(
        ModuleWorkload("gate-module", "gate", shape, 2, 1, 4, "float32")
        for shape in ((32, 512, 1125), (8, 128, 45_000), (8, 256, 5625), (32, 512, 225))
    ),
    ModuleWorkload("gate-module", "gate", (32, 256, 5625), 2, 1, 4),
    ModuleWorkload("block", "mixture", (10, 128), 1, 4, 5, layers=3),
    ModuleWorkload("block", "mixture", (4096, 1024), 1, 4, 5, layers=3),
    ModuleWorkload("block", "mixture", (16_384, 256), 1, 1, 16, layers=4),
    *(ModuleWorkload("block", "mixture", (rows, 1024), 1, 4, 5, "float32", layers=3) for rows in (64, 4096)),
    ModuleWorkload("block", STABLE, (64, 1024), 1, 4, 4, "float32", layers=3),
    ModuleWorkload("model", "density", (8, 1024, 768), 1, 8),
    ModuleWorkload("model", "mixture", (8, 1024, 768), 1, 8, 4),
]
_CPU = [
    ModuleWorkload("gate-module", "gate", (2, 128, 1125), 2, 1, 4, "float32"),
    ModuleWorkload("block", "mixture", (10, 128), 1, 4, 5, layers=3),
    ModuleWorkload("block", STABLE, (10, 128), 1, 4, 4, layers=3),
    ModuleWorkload("model", "density", (4, 128, 128), 1, 8),
    ModuleWorkload("model", "mixture", (4, 128, 128), 1, 8, 4),
]


def modules(device: str) -> list[ModuleWorkload]:
    """Return the modules of a device: in bf16 on a GPU, but for those of a dtype of their own, in fp32 on a CPU."""
    return [typed(one, "float32") for one in _CPU] if device == "cpu" else _GPU
