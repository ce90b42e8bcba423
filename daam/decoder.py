"""The DAT decoder of arXiv 2401.11143: attention over the layers of an encoder, two convolutions, a classifier."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Proxy
from torch.nn.functional import relu, scaled_dot_product_attention

from daam.backend import Backend
from daam.blocks import DensityBlock
from daam.checkpoints import Published
from daam.checks import check_choice, check_dtype, check_tensor
from daam.leaf import call_leaf
from daam.modules import MultiHeadDAAM, reset
from daam.standardize import Standardize

ATTENTIONS = ("daam", "mixture", "gqdaam", "gqa", "mha", "mha_bn", "none")
DENSITIES, GROUPED = ("daam", "mixture", "gqdaam"), ("gqdaam", "gqa")
CLASSIFIER = ("conv1", "conv2", "fc")
WIDTH, QUERY_HEADS, KEY_VALUE_HEADS = 512, 8, 2  # of grouped-query attention, as in the paper
HEADS = (8, 6, 5, 4, 3, 2, 1)  # of the densities, the first that fits


class GroupedQueryAttention(nn.Module):
    """Attend with 8 query heads that share 2 heads of keys and values: (batch, length, 512) to the same."""

    def __init__(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.head = WIDTH // QUERY_HEADS
        linear = partial(nn.Linear, WIDTH, device=device, dtype=dtype)
        self.query = linear(WIDTH)
        self.key, self.value = (linear(KEY_VALUE_HEADS * self.head) for _ in range(2))
        self.out = linear(WIDTH)

    def reset_parameters(self) -> None:
        for layer in (self.query, self.key, self.value, self.out):
            layer.reset_parameters()

    def forward(self, x: Tensor) -> Tensor:
        projections = (self.query, self.key, self.value)
        q, k, v = (project(x).unflatten(-1, (-1, self.head)).transpose(1, 2) for project in projections)
        return self.out(scaled_dot_product_attention(q, k, v, enable_gqa=True).transpose(1, 2).flatten(2))


class StandardAttention(nn.MultiheadAttention):
    """Attend as an `nn.MultiheadAttention` of 8 heads whose modules' `reset_parameters` draw as construction does."""

    def __init__(
        self, num_features: int, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__(num_features, QUERY_HEADS, batch_first=True, device=device, dtype=dtype)
        _reset_as(OutputProjection, self.out_proj)

    def reset_parameters(self) -> None:
        """Draw the projection of queries, keys and values; the one of the output has a method of its own."""
        nn.init.xavier_uniform_(self.in_proj_weight)
        nn.init.zeros_(self.in_proj_bias)


class OutputProjection(nn.Linear):
    """Compute a Linear whose bias begins at 0."""

    def reset_parameters(self) -> None:
        """Draw the weight, and the bias too, for the random numbers that construction uses up."""
        super().reset_parameters()
        nn.init.zeros_(self.bias)


class _Xavier(nn.Module):
    """Make the weight of a layer Xavier-uniform."""

    def reset_parameters(self) -> None:
        """Draw the bias as the layer does, and the weight."""
        super().reset_parameters()
        nn.init.xavier_uniform_(self.weight)


class XavierConv2d(_Xavier, nn.Conv2d):
    """Compute a Conv2d whose weight is Xavier-uniform."""


class XavierLinear(_Xavier, nn.Linear):
    """Compute a Linear whose weight is Xavier-uniform."""


class DATDecoder(Published):
    """Decode the layers of an encoder: attention over them, two convolutions and a classifier (arXiv 2401.11143).

    The features of a layer after the attention form a grid (1024: 32 x 32; else the two factors nearest to a square),
    its layers are channels: Conv2d(num_layers, conv_channels, 3, padding=1), ReLU, Conv2d back, ReLU, Linear.

    Args:
        num_layers, num_features: sizes of the input, (batch, num_layers, num_features).
        num_classes: size of the output, (batch, num_classes).
        attention: "daam", density attention (Algorithm 1; with one head DAAMv2); "mixture", a `DensityBlock` of one
            layer (Algorithm 2, with the residual); "gqdaam", density attention, then Linear(num_features, 512) and
            grouped-query attention; "gqa", the same without density attention; "mha", standard attention of 8 heads;
            "mha_bn", with batch normalisation of every feature behind it; "none".
        num_heads: of the densities; must divide num_layers. None: as many as `heads_for` finds to fit, 8 of 24 layers.
            Leave each head three layers or more: one layer is its own mean (an error for the mixture), and of two each
            is one standard deviation from theirs.
        num_gaussians: of the mixture.
        conv_channels: between the convolutions.
        standardize: whether layers of x are standardised first, by the statistics that `decoder.standardize.fit(x)`
            takes of the x of training, (examples, num_layers, num_features); they are buffers, saved with the decoder.
        backend: of the densities, "auto", "triton" or "eager"; see `daam.backend_for`.
        device, dtype: of all parameters and statistics.

    Weights of convolutions and classifier are Xavier-uniform. Published checkpoints of the attention load as they are:
    `daam.daams.{h}.c`, or `daam.layers.0.attention_heads.{h}.c` of the mixture, as do its `conv1`, `conv2` and `fc`.
    From the meta device: `to_empty`, then `reset_parameters`, which draws what construction draws for a seed; resetting
    every module that can be reset draws from the same distributions.

    Raises:
        ValueError: a size is not positive, num_heads does not divide num_layers, or 8 heads the features; x has another
            shape.
    """

    _published_layers = CLASSIFIER

    def __init__(
        self, num_layers: int, num_features: int, num_classes: int, *, attention: str = "daam",
        num_heads: int | None = None, num_gaussians: int = 4, conv_channels: int = 512, standardize: bool = False,
        backend: Backend = "auto", device: torch.device | str | None = None, dtype: torch.dtype | None = None,
    ):  # fmt: skip
        super().__init__()
        if num_heads is None:
            num_heads = heads_for(num_layers)
        sizes = {
            "num_layers": num_layers, "num_features": num_features, "num_classes": num_classes, "num_heads": num_heads,
            "num_gaussians": num_gaussians, "conv_channels": conv_channels,
        }  # fmt: skip
        for name, size in sizes.items():
            if size < 1:
                raise ValueError(f"{name} is {size}, expected 1 or more")
        check_choice("attention", attention, ATTENTIONS)
        if attention in DENSITIES and num_layers % num_heads:
            raise ValueError(f"num_heads is {num_heads}, expected a divisor of num_layers, {num_layers}")
        if attention == "mixture" and num_layers == num_heads:
            raise ValueError(f"num_heads is {num_heads}, expected 2 or more of the {num_layers} layers for each")
        if attention.startswith("mha") and num_features % QUERY_HEADS:
            raise ValueError(f"num_features is {num_features}, expected a multiple of {QUERY_HEADS} for {attention!r}")
        self.settings = {**sizes, "attention": attention, "standardize": standardize}
        place = {"device": device, "dtype": dtype}
        self.standardize = Standardize(num_layers, **place) if standardize else None
        self.daam = _density(num_features, attention, num_heads, num_gaussians, {"backend": backend, **place})
        self.standard = _standard(num_features, attention, place)
        self.norm = nn.BatchNorm1d(num_features, **place) if attention == "mha_bn" else None
        self.grid = (QUERY_HEADS, WIDTH // QUERY_HEADS) if attention in GROUPED else grid(num_features)
        self.conv1 = _reset_as(XavierConv2d, nn.Conv2d(num_layers, conv_channels, 3, padding=1, **place))
        self.conv2 = _reset_as(XavierConv2d, nn.Conv2d(conv_channels, num_layers, 3, padding=1, **place))
        self.fc = _reset_as(XavierLinear, nn.Linear(num_layers * math.prod(self.grid), num_classes, **place))
        self._draw_weights()

    def reset_parameters(self) -> None:
        """Draw all parameters anew and clear the statistics of batch normalisation, those of its modules included."""
        projection = self.standard.out_proj if isinstance(self.standard, StandardAttention) else None
        for module in (self.standardize, self.daam, projection, self.standard, self.norm):
            if module is not None:
                reset(module)
        # as at construction: what torch draws of all three, and then the weights
        for module, kind in ((self.conv1, nn.Conv2d), (self.conv2, nn.Conv2d), (self.fc, nn.Linear)):
            kind.reset_parameters(module)
        self._draw_weights()

    def _draw_weights(self) -> None:
        """Draw the weights of the convolutions and the classifier."""
        for module in (self.conv1, self.conv2, self.fc):
            nn.init.xavier_uniform_(module.weight)

    def forward(self, x: Tensor, return_weights: bool = False) -> Tensor | tuple[Tensor, Tensor]:
        """Return scores of the classes, (batch, num_classes); with return_weights also the density's weights, like x.

        x: (batch, num_layers, num_features) of the parameters' dtype, or under autocast.
        """
        if isinstance(x, Proxy):
            return call_leaf(self, x, x, return_weights)
        check_tensor("x", x)
        expected = (self.settings["num_layers"], self.settings["num_features"])
        if x.dim() != 3 or x.shape[1:] != expected:
            raise ValueError(f"x has shape {tuple(x.shape)}, expected (batch, {expected[0]}, {expected[1]})")
        check_dtype(x, self.conv1.weight, "conv1")
        if return_weights and self.daam is None:
            raise ValueError(f"return_weights: attention {self.settings['attention']!r} has no densities")
        x = x if self.standardize is None else self.standardize(x)
        if not return_weights:
            return self._decode(x if self.daam is None else self.daam(x))
        if isinstance(self.daam, DensityBlock):
            x, details = self.daam(x, return_attention_details=True)
            return self._decode(x), details["layer_0"]
        x, weights = self.daam(x, return_weights=True)
        return self._decode(x), weights

    def _decode(self, x: Tensor) -> Tensor:
        """Return scores of x: by standard attention and normalisation, if any, convolutions and classifier."""
        if isinstance(self.standard, nn.MultiheadAttention):
            x = self.standard(x, x, x, need_weights=False)[0]
        elif self.standard is not None:
            x = self.standard(x)
        x = x if self.norm is None else self.norm(x.transpose(1, 2)).transpose(1, 2)
        x = relu(self.conv1(x.unflatten(-1, self.grid)))
        return self.fc(relu(self.conv2(x)).flatten(1))


def _density(features: int, attention: str, heads: int, gaussians: int, options: dict[str, Any]) -> nn.Module | None:
    if attention == "mixture":
        return DensityBlock([-2], [heads], [gaussians], 1, **options)
    return MultiHeadDAAM(features, heads, **options) if attention in DENSITIES else None


def _standard(features: int, attention: str, place: dict[str, Any]) -> nn.Module | None:
    if attention in GROUPED:
        return nn.Sequential(nn.Linear(features, WIDTH, **place), GroupedQueryAttention(**place))
    return StandardAttention(features, **place) if attention.startswith("mha") else None


def _reset_as(kind: type[nn.Module], module: nn.Module) -> nn.Module:
    """Give a layer a class that resets it otherwise than its own class does, without drawing it anew."""
    # decoders have drawn layer after layer, and then the Xavier weights, since before they could be reset
    module.__class__ = kind
    return module


def heads_for(layers: int) -> int:
    """Return the number of heads of densities over so many layers: the largest of HEADS that divides them and leaves
    each head three or more, as the paper's 8 of 24; 1 where none does.
    """
    # of two layers each is one standard deviation from their mean: density attention would weigh them alike
    return next((h for h in HEADS if layers % h == 0 and layers // h >= 3), 1)


def grid(features: int) -> tuple[int, int]:
    """Return the two factors of a number that are nearest to a square, the smaller one first."""
    smaller = next(a for a in range(math.isqrt(features), 0, -1) if features % a == 0)
    return smaller, features // smaller


def focal_loss(
    scores: Tensor, labels: Tensor, gamma: float = 2.5, alpha: float = 0.25, weight: Tensor | None = None
) -> Tensor:
    """Return alpha·(1 - p)^gamma·cross entropy, p the probability of the label, averaged over the batch (arXiv
    1708.02002). The defaults are those of arXiv 2401.11143. scores: (batch, classes); labels: (batch,) of integers;
    weight: of the classes, (classes,), for an average weighted as that of torch's cross_entropy.
    """
    check_tensor("scores", scores)
    check_tensor("labels", labels)
    cross_entropy = nn.functional.cross_entropy(scores, labels, reduction="none")
    # 1 - p, exact for p near 1; its gradient at p = 1 exists, since gamma is more than 1
    losses = alpha * (-torch.expm1(-cross_entropy)).pow(gamma) * cross_entropy
    return losses.mean() if weight is None else (losses * weight[labels]).sum() / weight[labels].sum()
