"""Layers of one algorithm, each on what the one before makes of x: both passes, whatever a layer is.

    x_0 = x      x_{l+1}, weights_l = run(x_l, p_l, q_l)      y = x_L

Nothing but x is kept for the backward pass, which finds the layers' values anew, from the first layer to the last, and
differentiates from the last to the first.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

Run = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor | None]]
Differentiate = Callable[..., tuple[Tensor | None, ...]]


def run_layers(run: Run, x: Tensor, ps: Sequence[Tensor], qs: Sequence[Tensor]) -> tuple[Tensor, list[Tensor | None]]:
    """Return y and the weights of each layer, as run gives them."""
    weights = []
    for p, q in zip(ps, qs, strict=True):
        x, found = run(x, p, q)
        weights.append(found)
    return x, weights


def differentiate_layers(
    run: Run, differentiate: Differentiate, grad_y: Tensor | None, grad_weights: Sequence[Tensor | None], x: Tensor,
    ps: Sequence[Tensor], qs: Sequence[Tensor], need_x: bool,
) -> tuple[Tensor | None, list[Tensor | None], list[Tensor | None]]:  # fmt: skip
    """Return the gradients of x, of ps and of qs, each of a dtype of its own; None of what nothing reaches.

    differentiate(grad_y, grad_weights, x_l, p, q, need_x) -> the gradients of x_l, p and q, None where not needed.
    """
    xs = [x]
    for p, q in zip(ps[:-1], qs[:-1], strict=True):
        xs.append(run(xs[-1], p, q)[0])
    grad, d_ps, d_qs = grad_y, [], []
    for layer in reversed(range(len(ps))):
        dp = dq = None
        if grad is not None or grad_weights[layer] is not None:
            like = xs[layer]
            needed = need_x or layer > 0
            grad, dp, dq = differentiate(grad, grad_weights[layer], like, ps[layer], qs[layer], needed)
            grad = None if grad is None else grad.to(like.dtype)
        d_ps.insert(0, dp)
        d_qs.insert(0, dq)
    return grad, d_ps, d_qs
