"""Heads that are spread over processes: what each finds of its piece, and what it makes of all pieces' numbers.

`forward` and `backward` are generators of one shared head. They yield the numbers of this piece, (n, chunks), and are
sent those of all pieces, (pieces, n, chunks), in rank order: between the two there is one exchange for all heads. An
algorithm's own functions are those that its `formula` is made of. Numbers that a forward pass yields:

    mean, mean_error, Σ (x - mean)², n        then, of both mixtures, the largest log w and Σ exp(log w - largest)

The backward pass differentiates the formula with these numbers as inputs. What their gradients sum to over all pieces
(of both mixtures first that of Σ exp) goes back to every position by way of the mean, d/n, and of the squares,
2·d·(x - mean).
"""

from __future__ import annotations

import math
from collections.abc import Generator, Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from daam.kernels.algorithms import Algorithm
from daam.kernels.merges import add_up, merge_moments
from daam.reference.chunks import Chunks

Exchange = Generator[Tensor, Tensor, Any]
DTYPE = torch.float64  # of arithmetic, and of what is exchanged: the formula has none of the care of the closed forms
PIECE = 4  # numbers of the first exchange of a forward pass


def counts(algorithm: Algorithm, _longest: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return how many numbers of a chunk each exchange of a (forward, backward) pass has, whatever the longest piece
    is.
    """
    return ((PIECE, 2), (1, 2)) if algorithm.unbiased else ((PIECE,), (2,))


def forward(
    algorithm: Algorithm, module: ModuleType, x: Tensor, p: Tensor, q: Tensor, mask: Tensor | None, axis: int,
    settings: Sequence, residual: bool, return_weights: bool,
) -> Exchange:  # fmt: skip
    """Return y and the weights of a piece, None if not asked for, and the numbers of whole chunks that the backward
    pass takes, (n, chunks).

    module: of the algorithm's formula. x, mask: this piece's. p, q: of the head, (1, P).
    """
    piece = _Piece(algorithm, x.to(DTYPE), mask, axis, settings, x.dtype)
    p, q = p.to(DTYPE), q.to(DTYPE)
    numbers = merge_moments((yield piece.find_moments()))
    d, squares = piece.centre(numbers)
    if algorithm.unbiased:
        log_w = module.log_weights(piece.chunks, d, squares, p, q, *piece.settings)
        found = torch.stack([t.flatten() for t in module.sum_exponentials(piece.chunks, log_w)])
        numbers = torch.cat((numbers, _merge_exponentials((yield found))))
        weights = module.normalise(piece.chunks, log_w, *map(piece.shape, numbers[PIECE:]), *piece.settings)
    else:
        weights = module.weigh(piece.chunks, d, squares, p, q, *piece.settings)
    y = piece.chunks.weigh_x(weights, residual).to(x.dtype)
    return y, piece.chunks.merge(weights).to(x.dtype) if return_weights else None, numbers


def backward(
    algorithm: Algorithm, module: ModuleType, grad_y: Tensor | None, grad_weights: Tensor | None, x: Tensor, p: Tensor,
    q: Tensor, mask: Tensor | None, numbers: Tensor, axis: int, settings: Sequence, residual: bool, _first: bool,
) -> Exchange:  # fmt: skip
    """Return the gradients of a piece's x, and of p and q by way of this piece alone: theirs add up over pieces."""
    with torch.enable_grad():
        leaves = [t.detach().to(DTYPE).requires_grad_() for t in (x, p, q)]
        piece = _Piece(algorithm, leaves[0], mask, axis, settings, x.dtype)
        shift = numbers[0].new_zeros(numbers[0].shape).requires_grad_()
        squares = numbers[2].clone().requires_grad_()
        d = piece.chunks.valid(piece.centre(numbers)[0] - piece.shape(shift))
        args = (piece.chunks, d, piece.shape(squares), *leaves[1:])
        outputs, total = [], None
        if algorithm.unbiased:
            log_w, total = module.log_weights(*args, *piece.settings), numbers[PIECE + 1].clone().requires_grad_()
            largest = piece.shape(numbers[PIECE])
            weights = module.normalise(piece.chunks, log_w, largest, piece.shape(total), *piece.settings)
            exponentials = piece.chunks.sum(piece.chunks.valid((log_w - largest).exp())).flatten()
            outputs.append(exponentials)
        else:
            weights = module.weigh(*args, *piece.settings)
        y, weights = piece.chunks.weigh_x(weights, residual), piece.chunks.merge(weights)
        outputs += [t for t, g in ((y, grad_y), (weights, grad_weights)) if g is not None]
    grads = [g.to(DTYPE) for g in (grad_y, grad_weights) if g is not None]
    if total is not None:
        (d_total,) = torch.autograd.grad(outputs[1:], total, grads, retain_graph=True)
        grads = [add_up((yield d_total.unsqueeze(0)))[0], *grads]
    *found, d_mean, d_squares = torch.autograd.grad(outputs, (*leaves, shift, squares), grads)
    d_mean, d_squares = add_up((yield torch.stack((d_mean, d_squares))))
    dx = found[0] + piece.spread(d.detach(), d_mean, d_squares)
    return dx.to(x.dtype), *found[1:]


class _Piece:
    """Hold a piece of a shared head as `Chunks`, whose n is that of all pieces once these have been told.

    settings: those of the algorithm's own functions, without padding, which is compared as dtype, x's own, rounds it.
    """

    def __init__(
        self, algorithm: Algorithm, x: Tensor, mask: Tensor | None, axis: int, settings: Sequence, dtype: torch.dtype
    ):
        named = dict(zip(algorithm.settings, settings, strict=True))
        padding = named.pop("padding", None)
        if padding is not None and math.isfinite(padding):
            padding = torch.tensor(padding, dtype=dtype).item()
        self.settings = tuple(named.values())
        self.chunks = Chunks(x, 1, mask, axis, padding, algorithm.zeroes_padding)

    def shape(self, numbers: Tensor) -> Tensor:
        """Return a number of each chunk, (chunks,), as it broadcasts against the chunks."""
        shape = list(self.chunks.x.shape)
        shape[self.chunks.dim] = 1
        return numbers.reshape(shape)

    def find_moments(self) -> Tensor:
        """Return mean, mean_error, Σ (x - mean)² and n of this piece of every chunk, (4, chunks)."""
        chunks = self.chunks
        mean = chunks.mean(chunks.stats_x)
        d = chunks.valid(chunks.stats_x - mean)
        mean_error = chunks.mean(d)
        squares = (chunks.sum(d * d) - chunks.count * mean_error * mean_error).clamp(min=0)
        n = torch.zeros_like(mean) + (chunks.count - chunks.empty)  # 1 - 1 where there is none
        return torch.stack([t.flatten() for t in (mean, mean_error, squares, n)])

    def centre(self, numbers: Tensor) -> tuple[Tensor, Tensor]:
        """Return x - mean, 0 where x is not valid, and Σ (x - mean)², by the numbers of all pieces, which count now."""
        chunks = self.chunks
        mean, mean_error, squares, n = map(self.shape, numbers[:PIECE])
        # under no mask here, too: other pieces may have one
        chunks.count, chunks.empty = n.clamp(min=1), (n == 0).to(chunks.dtype)
        return chunks.valid(chunks.x - mean - mean_error), squares

    def spread(self, d: Tensor, d_mean: Tensor, d_squares: Tensor) -> Tensor:
        """Return what gradients of a chunk's mean and squares are to its positions, like x. d: x - mean."""
        chunks = self.chunks
        dx = self.shape(d_mean) / chunks.count + 2 * self.shape(d_squares) * d
        if chunks.stats_x is not chunks.x:  # padding counts as zeros, whatever it is
            dx = dx.masked_fill(chunks.padded, 0)
        return chunks.merge(chunks.valid(dx)).detach()


def _merge_exponentials(pieces: Tensor) -> Tensor:
    """Return the largest log w and Σ exp(log w - largest) of whole chunks, from those of their pieces."""
    largest, total = pieces.unbind(1)
    whole = torch.where(total > 0, largest, -math.inf).amax(0)
    whole = torch.where(whole.isinf(), largest.amax(0), whole)  # where no piece has any
    total = torch.where(total == 0, 0, total * (largest - whole).exp()).sum(0)
    return torch.stack((whole, total))
