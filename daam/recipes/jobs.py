"""What is trained: a model and its examples, and the work on one part of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor, nn

from daam.recipes.cache import StoredFeatures
from daam.recipes.runs import Settings, Split


def trainable(model: nn.Module) -> list[nn.Parameter]:
    """Return the parameters of a model that training changes."""
    return [p for p in model.parameters() if p.requires_grad]


@dataclass(eq=False)  # so that functions can keep what they found out of one
class Job:
    """Describe a model to train and its examples. rates: makes AdamW's groups of parameters of a model and a rate."""

    build: Callable[[], nn.Module]
    inputs: Callable[[Tensor], dict[str, Tensor]]  # makes of places of examples the arguments of the forward pass
    labels: Tensor  # (examples,)
    names: list[str]  # of the classes
    identity: str  # a hash of the examples
    rates: Callable[[nn.Module, float], list[dict]] = lambda model, rate: [{"params": trainable(model), "lr": rate}]
    features: Tensor | StoredFeatures | None = None  # (examples, layers, features), where inputs are taken from them
    equal: Tensor | None = None  # for every example the first that equals it, see `splits.find_equal`; None: none do
    groups: Tensor | None = None  # of examples that must not be on two sides, (examples,); None: there are none
    parts: Tensor | None = None  # the part that each example belongs to, (examples,), where data says so


@dataclass
class Work:
    """Hold what every step of a part needs. weight: of the classes in the loss, (classes,), or None."""

    job: Job
    split: Split
    settings: Settings
    device: str
    weight: Tensor | None = None
