"""Methods that are compared: the paper's decoders, and classifiers of an encoder's layers that the field knows."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import daam
from daam.decoder import DENSITIES, QUERY_HEADS, heads_for
from daam.recipes.runs import RunError
from daam.standardize import Standardize

COMPARES_LAYERS = (*DENSITIES, "daamv2")
LOGISTIC, LORA = ("logistic", "logistic_last"), ("lora", "lora+")
# named by what each does with the layers; those of PROBES stand below, the others are a decoder's attentions
ABOUT = {
    "daam": "density attention over the layers, then two convolutions (Algorithm 1)",
    "daamv2": "the same with one head",
    "mixture": "the same with a mixture of densities (Algorithm 2)",
    "gqdaam": "density attention, then grouped-query attention",
    "gqa": "grouped-query attention alone",
    "mha": "standard attention in the place of densities",
    "mha_bn": "the same with batch normalisation behind it",
    "none": "the convolutions alone",
    "linear": "a linear classifier of all layers",
    "last": "a linear classifier of the last layer",
    "weighted_sum": "a linear classifier of layers added with softmax weights, as SUPERB's",
    "attentive": "a linear classifier of the mean and spread of layers, weighted by attention to their content",
    "logistic": "scikit-learn's logistic regression on all layers",
    "logistic_last": "the same on the last layer",
    "lora": "low-rank adapters in the encoder, and a linear classifier of its last layer",
    "lora+": "the same with faster B matrices",
}
METHODS = tuple(ABOUT)


class Probe(nn.Module):
    """Classify the layers of an encoder, (batch, layers, features), standardised where asked for, without a decoder.

    A subclass says in `pool` what becomes of the layers, and in `count` how many numbers that leaves.
    """

    def __init__(self, layers: int, features: int, classes: int, standardize: bool):
        super().__init__()
        self.standardize = Standardize(layers) if standardize else None
        self.classify = nn.Linear(self.count(layers, features), classes)
        start_at_zero(self.classify)

    @staticmethod
    def count(layers: int, features: int) -> int:
        """Return how many numbers of an example are classified."""
        return features

    def pool(self, x: Tensor) -> Tensor:
        """Return what is classified of x, (batch, layers, features): (batch, numbers)."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        return self.classify(self.pool(x if self.standardize is None else self.standardize(x)))


class Linear(Probe):
    """Classify all layers at once."""

    @staticmethod
    def count(layers: int, features: int) -> int:
        return layers * features

    def pool(self, x: Tensor) -> Tensor:
        return x.flatten(1)


class Last(Probe):
    """Classify the last layer."""

    def pool(self, x: Tensor) -> Tensor:
        return x[:, -1]


class WeightedSum(Probe):
    """Classify a sum of the layers with weights that are learned, the same for all examples (SUPERB, s3prl)."""

    def __init__(self, layers: int, features: int, classes: int, standardize: bool):
        super().__init__(layers, features, classes, standardize)
        self.layer_scores = nn.Parameter(torch.zeros(layers))

    def layer_weights(self) -> Tensor:
        """Return the weights of the layers, (layers,), which sum to 1."""
        return self.layer_scores.softmax(0)

    def pool(self, x: Tensor) -> Tensor:
        return torch.einsum("blf,l->bf", x, self.layer_weights())


class Attentive(Probe):
    """Classify mean and standard deviation over the layers, weighted by what is in them: attentive statistics pooling
    (arXiv 1803.10963), which speaker recognition has over time, with 128 hidden units.
    """

    HIDDEN = 128

    def __init__(self, layers: int, features: int, classes: int, standardize: bool):
        super().__init__(layers, features, classes, standardize)
        self.score = nn.Sequential(nn.Linear(features, self.HIDDEN), nn.Tanh(), nn.Linear(self.HIDDEN, 1))

    @staticmethod
    def count(layers: int, features: int) -> int:
        return 2 * features

    def pool(self, x: Tensor) -> Tensor:
        weights = self.score(x).softmax(1)
        mean = (weights * x).sum(1)
        # of layers that agree it is 0, where the root has no gradient
        var = (weights * (x - mean[:, None]).square()).sum(1).clamp(min=1e-6)
        return torch.cat([mean, var.sqrt()], 1)


PROBES = {
    "linear": Linear, "last": Last, "weighted_sum": WeightedSum, "attentive": Attentive, "logistic": Linear,
    "logistic_last": Last,
}  # fmt: skip


def heads_of(method: str, layers: int) -> int:
    """Return the number of heads of a method's densities on so many layers: of DAAMv2 1, else what `heads_for` says."""
    return 1 if method == "daamv2" else heads_for(layers)


def check_sizes(method: str, layers: int, features: int) -> None:
    """Raise a RunError where a method cannot work on so many layers and features."""
    # a single layer is its own mean, and with it a batch of one example has a single value to normalise
    if layers < 2 and method in (*COMPARES_LAYERS, "mha_bn"):
        raise RunError(f"--method {method} compares layers with each other: expected 2 or more, there is {layers}")
    if features % QUERY_HEADS and method in ("mha", "mha_bn"):
        raise RunError(
            f"--method {method} shares the features among {QUERY_HEADS} heads: expected a multiple of {QUERY_HEADS}, "
            f"the encoder has {features}"
        )


def decoder_for(
    method: str, layers: int, features: int, classes: int, *, standardize: bool = False, conv_channels: int = 512,
    zero_start: bool = False,
) -> nn.Module:  # fmt: skip
    """Return the model of a method that trains on features: x of (batch, layers, features) to (batch, classes).

    standardize, conv_channels: see `DATDecoder`. zero_start: let its classifier start at 0, as that of a `Probe` does.
    """
    check_sizes(method, layers, features)
    if method in PROBES:
        probe = PROBES[method](layers, features, classes, standardize)
        # what builds it again, in the file that it is saved to
        sizes = {"layers": layers, "features": features, "classes": classes}
        probe.settings = {"method": method, **sizes, "standardize": standardize}
        return probe
    attention = "daam" if method == "daamv2" else method
    decoder = daam.DATDecoder(
        layers, features, classes, attention=attention, num_heads=heads_of(method, layers),
        conv_channels=conv_channels, standardize=standardize,
    )  # fmt: skip
    if zero_start:
        start_at_zero(decoder.fc)
    return decoder


def start_at_zero(classifier: nn.Linear) -> None:
    """Let a classifier start as logistic regression does: of few examples a random start costs it accuracy."""
    nn.init.zeros_(classifier.weight)
    nn.init.zeros_(classifier.bias)
