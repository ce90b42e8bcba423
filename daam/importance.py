"""Which layers and features mattered: the importance factor of arXiv 2401.11143."""

from __future__ import annotations

import torch
from torch import Tensor


def importance_factor(weights: Tensor) -> Tensor:
    """Return (w - min) / (max - min) over the whole map; zeros where all its values are the same.

    It shows how densities, at their learned offsets and widths, weigh each layer and feature relative to the others of
    its head. It does not show that a layer matters for the answer: the map of an untrained decoder is often nearly
    the same, so compare with that and with what dropping a layer costs (`daam.recipes.explain` does both).

    Args:
        weights: a map of attention weights, (layers, features) say, averaged over a validation set; see `WeightMap`.

    Returns:
        A tensor like weights, fp32 or fp64, between 0 and 1.

    Raises:
        ValueError: weights is empty, or not finite.
    """
    weights = _check_weights(weights)
    low, high = weights.aminmax()
    return (weights - low) / torch.where(high > low, high - low, 1)  # a constant map: 0/1


def layer_contribution(weights: Tensor) -> Tensor:
    """Return the percentage of a map's weights (layers, features) in each layer, (layers,); equal where all are 0."""
    weights = _check_weights(weights)
    if weights.dim() != 2:
        raise ValueError(f"weights has shape {tuple(weights.shape)}, expected (layers, features)")
    total = weights.sum()
    shares = weights.sum(1) / torch.where(total == 0, 1, total)
    return 100 * torch.where(total == 0, torch.full_like(shares, 1 / len(shares)), shares)


class WeightMap:
    """Average attention weights over a data set, keeping no map but their sum.

    for x in validation:
        weights.update(decoder(x, return_weights=True)[1])
    daam.importance_factor(weights.mean())
    """

    def __init__(self) -> None:
        self.count, self._sum = 0, None

    def update(self, weights: Tensor) -> None:
        """Add a batch of maps, (batch, …). Raises ValueError where they have another shape than those before."""
        total = weights.detach().sum(0, dtype=torch.float64)
        if self._sum is not None and total.shape != self._sum.shape:
            raise ValueError(f"weights has maps of shape {tuple(total.shape)}, expected {tuple(self._sum.shape)}")
        self._sum = total if self._sum is None else self._sum + total
        self.count += len(weights)

    def mean(self) -> Tensor:
        """Return the average map, fp32. Raises ValueError where nothing was added."""
        if not self.count:
            raise ValueError("no weights were added, expected one batch or more")
        return (self._sum / self.count).float()


def _check_weights(weights: Tensor) -> Tensor:
    if not weights.numel() or not weights.isfinite().all():
        raise ValueError(f"weights of shape {tuple(weights.shape)} are empty or not finite")
    return weights.detach().to(torch.promote_types(weights.dtype, torch.float32))
