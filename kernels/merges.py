"""Numbers of pieces of chunks as one piece's, in fp64 and PyTorch: of strips, and of what several processes hold."""

from __future__ import annotations

import torch
from torch import Tensor


def merge_moments(pieces: Tensor) -> Tensor:
    """Return mean, mean_error, Σ (x - mean)² and n of pieces together, (4, chunks), from (pieces, 4, chunks)."""
    mean, mean_error, squares, n = pieces.to(torch.float64).unbind(1)
    mean, count = torch.where(n > 0, mean + mean_error, 0), n.sum(0)
    whole = (n * mean).sum(0) / count.clamp(min=1)
    squares = (squares + n * torch.where(n > 0, mean - whole, 0).square()).sum(0)
    rounded = whole.to(pieces.dtype)
    return torch.stack([t.to(pieces.dtype) for t in (rounded, whole - rounded, squares, count)])


def add_up(pieces: Tensor) -> Tensor:
    """Return the sums over pieces, in order."""
    return pieces.to(torch.float64).sum(0).to(pieces.dtype)
