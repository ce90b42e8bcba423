"""Attention along an axis that is spread over processes, each of which has a contiguous piece (context parallel).

Heads that are all in one process are attended as ever. Of a shared head each process finds numbers of its piece, all
exchange them, and each goes on with those of the whole: one exchange forward and one backward for density attention and
the gate, two for the mixtures (one backward on the Triton backend). All shared heads are in one exchange, which every
process of the group takes part in, whatever it holds.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from daam.kernels.operands import acc_dtype
from daam.ops import OPERATORS, Operators, _batched, _forward_mode, _transformed
from daam.pieces import AxisPieces, Cut, Share, cut_heads, find_sizes, gather, gather_checked, rank_in
from daam.reference import sharded as eager


def attend(
    algorithm: str, x: Tensor, params: Sequence[Tensor], mask: Tensor | None, axis: int, settings: Sequence[Any],
    residual: bool, return_weights: bool, backend: str, pieces: AxisPieces, check: Callable[[int], None],
) -> tuple[Tensor, ...]:  # fmt: skip
    """Return (y,) or (y, weights) of this process's piece, contiguous.

    mask: broadcasts against x. settings: the algorithm's. check: raises where an axis of so many positions, in all
    processes, does not fit the parameters.

    Raises:
        NotImplementedError: under a transform of functions, or forward-mode differentiation.
        ValueError: x has another size than pieces say, or check raises it.
    """
    if torch.compiler.is_compiling():  # a graph would hold sizes that processes tell each other
        run = torch.compiler.disable(attend, reason="daam's sharded axis exchanges numbers between processes")
        return run(algorithm, x, params, mask, axis, settings, residual, return_weights, backend, pieces, check)
    if _transformed() or _forward_mode():
        raise NotImplementedError("group: a sharded axis has no vmap, func.grad or forward-mode differentiation")
    if not _count_chunks(x, axis):
        backend = "eager"  # nothing to launch a kernel on, here and in all other processes
    call = _Call(
        OPERATORS[algorithm], axis, tuple(settings), residual, return_weights, backend, pieces, check, len(params[0])
    )
    return ShardedAttention.apply(x, *params, mask, call)


@dataclass(slots=True, eq=False)
class _Call:
    """Hold what is no tensor in a call, and from its forward pass on the sizes of all pieces and this one's heads."""

    operators: Operators
    axis: int
    settings: tuple[Any, ...]
    residual: bool
    return_weights: bool
    backend: str
    pieces: AxisPieces
    check: Callable[[int], None]
    heads: int
    cut: Cut | None = None

    @property
    def how(self) -> tuple[Any, ...]:
        """Return what operators take behind the tensors: axis, settings and residual."""
        return self.axis, *self.settings, self.residual

    def kind(self, x: Tensor) -> tuple[Any, ...]:
        """Return what tells calls of several layers apart, the same in all processes."""
        others = (*x.shape[: self.axis], *x.shape[self.axis + 1 :])
        return self.operators.algorithm.name, self.axis, others, x.dtype, self.settings, self.heads

    def arithmetic(self) -> ModuleType:
        """Return what has `counts`, `forward` and `backward` of shared heads on the call's backend."""
        return importlib.import_module(".kernels.sharded", __package__) if self.backend == "triton" else eager

    def module(self) -> ModuleType:
        """Return the algorithm's own module on the call's backend."""
        return self.operators.kernels if self.backend == "triton" else self.operators.eager

    def cut_tensors(self, part: Share, *tensors: Tensor | None) -> tuple[Tensor | None, ...]:
        """Return a part of tensors like x, or of a mask."""
        return tuple(None if t is None else _narrow(t, self.axis, part.start, part.length) for t in tensors)

    def cut_params(self, part: Share, *params: Tensor) -> list[Tensor]:
        """Return a part's parameters: its heads, and where they vary along a shared one those of its positions."""
        params = [_narrow(t, 0, part.head, part.heads) for t in params]
        along = self.operators.algorithm.find_setting("feature_axis", self.settings) == self.axis
        if part.slot is None or not along:
            return params
        return [_narrow(t, 1, part.offset, part.length) for t in params]

    def run(self, parts: dict[Share, Iterator], counts: Sequence[int], x: Tensor, checked: bool) -> dict | None:
        """Return what the generators of shared heads return, by part, after an exchange for each count of numbers; None
        where pieces turn out to have other sizes, if it is checked.
        """
        chunks = _count_chunks(x, self.axis)
        given = {part: next(generator) for part, generator in parts.items()}
        results: dict[Share, Any] = {}
        for n in counts:
            numbers = torch.zeros(
                self.cut.n_slots, n, chunks, dtype=self.arithmetic().DTYPE or acc_dtype(x), device=x.device
            )
            for part, found in given.items():
                numbers[part.slot, : len(found)] = found  # of fewer strips than others have
            if checked:
                everyone, checked = gather_checked(self.pieces, self.kind(x), numbers, x.shape[self.axis]), False
                if everyone is None:
                    return None
            elif self.cut.n_slots:
                everyone = gather(self.pieces.group, numbers)
            given = {}
            for part, generator in parts.items():
                try:
                    given[part] = generator.send(torch.stack([everyone[place] for place in part.places]))
                except StopIteration as end:
                    results[part] = end.value
            if not self.cut.n_slots:
                break
        return results


class ShardedAttention(torch.autograd.Function):
    """Return y of this process's piece, and the weights if asked for."""

    @staticmethod
    def forward(ctx, x, p, q, mask, call):
        found = None
        while found is None:
            sizes = find_sizes(call.pieces, call.kind(x), x, call.axis, call.check)
            call.cut = cut_heads(sizes, rank := rank_in(call.pieces.group), call.heads)
            fits = sizes[rank] == x.shape[call.axis]
            found = _attend_shared(call, x, p, q, mask, call.cut.parts if fits else ())
        results = {part: (y, weights) for part, (y, weights, _numbers) in found.items()}
        for part in call.cut.parts:
            if part.slot is None:
                results[part] = _attend_whole(call, part, x, p, q, mask)
        ctx.call, ctx.shared = call, tuple(found)
        ctx.save_for_backward(x, p, q, mask, *(numbers for *_, numbers in found.values()))
        ctx.set_materialize_grads(False)
        columns = list(zip(*(results[part] for part in call.cut.parts), strict=True)) or [(), ()]
        return tuple(_join(call, x, ts) for ts in columns[: 1 + call.return_weights])

    @staticmethod
    def backward(ctx, grad_y, grad_weights=None):
        if torch.is_grad_enabled():
            raise RuntimeError("a sharded axis is differentiated once: create_graph=True is not supported with group")
        if _transformed() or _batched(grad_y, grad_weights):
            raise NotImplementedError(
                "group: gradients of a sharded axis are taken one by one, not by is_grads_batched"
            )
        if grad_y is None and grad_weights is None:
            return (None,) * 5
        (x, p, q, mask, *kept), call = ctx.saved_tensors, ctx.call
        numbers = dict(zip(ctx.shared, kept, strict=True))
        results = _differentiate_shared(call, grad_y, grad_weights, x, p, q, mask, numbers)
        need_x, *needs = ctx.needs_input_grad[:3]
        grads = [torch.zeros_like(t) if need else None for t, need in zip((p, q), needs, strict=True)]
        for part in call.cut.parts:
            if part.slot is None:
                flags = need_x, any(needs)
                results[part] = _differentiate_whole(call, part, grad_y, grad_weights, x, p, q, mask, flags)
            for whole, found in zip(grads, results[part][1:], strict=True):
                if whole is not None:
                    call.cut_params(part, whole)[0].copy_(found)
        dx = _join(call, x, [results[part][0] for part in call.cut.parts]) if need_x else None
        return dx, *grads, None, None


def _attend_shared(call: _Call, x, p, q, mask, parts: Sequence[Share]) -> dict[Share, tuple] | None:
    """Return (y, weights, numbers for the backward pass) of each shared head; None where sizes were others."""
    arithmetic, algorithm = call.arithmetic(), call.operators.algorithm
    generators = {
        part: arithmetic.forward(
            algorithm, call.module(), *call.cut_tensors(part, x), *call.cut_params(part, p, q),
            *call.cut_tensors(part, mask), call.axis, call.settings, call.residual,
            call.return_weights,
        )
        for part in parts if part.slot is not None
    }  # fmt: skip
    counts = arithmetic.counts(algorithm, call.cut.longest)[0]
    return call.run(generators, counts, x, checked=call.pieces.sizes is None)


def _differentiate_shared(call: _Call, grad_y, grad_weights, x, p, q, mask, numbers: dict[Share, Tensor]) -> dict:
    """Return the gradients of x, p and q of each shared head, theirs by way of this process's piece."""
    arithmetic, algorithm = call.arithmetic(), call.operators.algorithm
    generators = {
        part: arithmetic.backward(
            algorithm, call.module(), *call.cut_tensors(part, grad_y, grad_weights, x), *call.cut_params(part, p, q),
            *call.cut_tensors(part, mask), kept, call.axis, call.settings, call.residual,
            part.offset == 0,
        )
        for part, kept in numbers.items()
    }  # fmt: skip
    return call.run(generators, arithmetic.counts(algorithm, call.cut.longest)[1], x, checked=False)


def _attend_whole(call: _Call, part: Share, x, p, q, mask) -> tuple[Tensor, Tensor | None]:
    """Return (y, weights) of heads that are all here."""
    tensors = (*call.cut_tensors(part, x), *call.cut_params(part, p, q), *call.cut_tensors(part, mask))
    return call.operators.run(*tensors, call.how, call.return_weights, call.backend)


def _differentiate_whole(
    call: _Call, part: Share, grad_y, grad_weights, x, p, q, mask, needs: tuple[bool, bool]
) -> tuple[Tensor | None, ...]:
    """Return the gradients of x, p and q of heads that are all here; None of those not needed."""
    tensors = (*call.cut_tensors(part, grad_y, grad_weights, x), *call.cut_params(part, p, q))
    tensors += call.cut_tensors(part, mask)
    return call.operators.differentiate(*tensors, call.how, *needs, call.backend)


def _join(call: _Call, x: Tensor, ts: Sequence[Tensor]) -> Tensor:
    """Return what parts have, in order, as one contiguous tensor of x's shape and dtype."""
    if len(ts) == 1:
        return ts[0].to(x.dtype).contiguous()
    joined = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    for part, t in zip(call.cut.parts, ts, strict=True):
        _narrow(joined, call.axis, part.start, part.length).copy_(t)
    return joined


def _narrow(t: Tensor, dim: int, start: int, length: int) -> Tensor:
    """Return so much of a dimension, the tensor itself where that is all."""
    return t if length == t.shape[dim] else t.narrow(dim, start, length)


def _count_chunks(x: Tensor, axis: int) -> int:
    """Return the chunks that a head has, one at each place of all other axes."""
    return x.shape[:axis].numel() * x.shape[axis + 1 :].numel()
