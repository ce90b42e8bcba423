"""Layers of one algorithm as one call: operators of the Triton backend, and an autograd.Function that keeps x alone.

What is said of a single layer in `ops.py` holds here: a pair of operators with fakes, a composite one that stands in
for the Function while compiling, and double backward through formulas. Parameters are lists, one of each a layer.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from daam import ops
from daam.batching import Operand, pair, run_samples
from daam.kernels import algorithms
from daam.ops import _VERSION, OPERATORS, Operators, _batched, _forward_mode, _lib, _or_empty, _transformed
from daam.reference.layers import differentiate_layers, run_layers
from daam.ways import Plan, enters_plainly, is_plain, plan_layers


class BlockOperators:
    """Define and call `{name}_layers_forward`, `{name}_layers_backward` and the composite `{name}_layers`.

    An instance is called with (x, ps, qs, mask, how, recompute, return_weights, backend, plan), how being axis, the
    algorithm's settings and residual, and plan what `ways.plan_layers` gives, None while compiling; it returns y and
    the weights of each layer, if they are asked for.
    """

    def __init__(self, layer: Operators):
        self.layer, self.algorithm, name, (p, q) = layer, layer.algorithm, layer.algorithm.name, layer.algorithm.params
        inputs = f"Tensor x, Tensor[] {p}, Tensor[] {q}, Tensor? mask"
        how = f"int axis,{''.join(f' {kind} {one},' for one, kind in self.algorithm.settings.items())} bool residual"
        _lib.define(f"{name}_layers_forward({inputs}, {how}, bool return_weights) -> (Tensor y, Tensor[] weights)")
        _lib.define(
            f"{name}_layers_backward(Tensor grad_y, {inputs}, {how}, bool need_x, bool need_params)"
            " -> (Tensor dx, Tensor[] gradients)"
        )
        _lib.define(
            f"{name}_layers({inputs}, {how}, bool? recompute, bool return_weights, str backend, str version)"
            " -> Tensor[] y_and_weights"
        )
        for op in ("forward", "backward"):
            runs = (getattr(self, f"_{op}_{where}") for where in ("triton", "cpu", "fake"))
            ops.register(f"{name}_layers_{op}", *runs)
        _lib.impl(f"{name}_layers", self._traced, "CompositeImplicitAutograd")
        for suffix in ("_forward", "_backward", ""):
            rule = getattr(self, f"{suffix or '_traced'}_samples")
            torch.library.register_vmap(f"{ops.NAMESPACE}::{name}_layers{suffix}", rule, lib=_lib)
        self.forward_op, self.backward_op, self.op = (
            ops.find_op(f"{name}_layers{suffix}") for suffix in ("_forward", "_backward", "")
        )

    def __call__(
        self, x: Tensor, ps: Sequence[Tensor], qs: Sequence[Tensor], mask: Tensor | None, how: tuple[Any, ...],
        recompute: bool | None, return_weights: bool, backend: str, plan: Plan | None,
    ) -> list[Tensor]:  # fmt: skip
        if plan is None:
            return self.op(x, list(ps), list(qs), mask, *how, recompute, return_weights, backend, _VERSION)
        return self._attend(x, ps, qs, mask, how, return_weights, backend, *plan)

    def _attend(self, x, ps, qs, mask, how, return_weights, backend, way, runs, plain) -> list[Tensor]:
        weights: list[Tensor] = []
        for run in runs:
            p, q = ps[run], qs[run]
            if len(p) > 1:
                call = _Call(self, how, return_weights, backend, way.forward, way.backward, plain)
                x, *found = Layers.apply(x, mask, call, *p, *q)
            else:
                x, *found = self.layer._attend(x, *p, *q, mask, how, return_weights, backend)
            weights += found
        return [x, *weights]

    def _traced(self, x, ps, qs, mask, *args):
        *how, recompute, return_weights, backend, _version = args
        if _transformed() or _forward_mode():
            y, weights = run_layers(functools.partial(self.run_formula, mask, how), x, ps, qs)
            return [y, *(weights if return_weights else [])]
        axis, *_others = how
        (heads, _n), *_shapes = (q.shape for q in qs)
        plan = plan_layers(x, (*ps, *qs), axis, heads, mask is not None, recompute, backend)
        return self._attend(x, ps, qs, mask, tuple(how), return_weights, backend, *plan)

    def _run_samples(self, run, info, in_dims, x, ps, qs, mask, axis):
        """Return `batching.run_samples` of run(x, ps, qs, mask, axis) -> [y, *weights]."""
        x, *params, mask = pair((x, *ps, *qs, mask), (in_dims[0], *in_dims[1], *in_dims[2], in_dims[3]))
        n = len(ps)

        def call(like_x, params, mask, axes):
            return run(*like_x, params[:n], params[n:], mask, axes[0]), ()

        return run_samples(call, info.batch_size, [x], params, mask, (axis, None))[0]

    def _forward_samples(self, info, in_dims, x, ps, qs, mask, axis, *args):
        def run(*given):
            y, weights = self.forward_op(*given, *args)
            return y, *weights

        y, *weights = self._run_samples(run, info, in_dims, x, ps, qs, mask, axis)
        return (y, weights), (0, [0] * len(weights))

    def _traced_samples(self, info, in_dims, x, ps, qs, mask, axis, *args):
        found = self._run_samples(lambda *given: self.op(*given, *args), info, in_dims, x, ps, qs, mask, axis)
        return list(found), [0] * len(found)

    def _backward_samples(self, info, in_dims, grad_y, x, ps, qs, mask, axis, *args):
        *_how, need_x, need_params = args
        grad_dim, x_dim, p_dims, q_dims, mask_dim, *_ = in_dims
        params, n = pair((*ps, *qs), (*p_dims, *q_dims)), len(ps)

        def call(like_x, params, mask, axes):
            dx, grads = self.backward_op(like_x[1], like_x[0], params[:n], params[n:], mask, axes[0], *args)
            return [dx] if need_x else [], grads

        like_x, mask = [Operand(x, x_dim), Operand(grad_y, grad_dim)], Operand(mask, mask_dim)
        dx, grads = run_samples(call, info.batch_size, like_x, params, mask, (axis, None), as_heads=need_params)
        return (*(dx or [x.new_empty(0)]), list(grads)), (0 if need_x else None, [0] * len(grads))

    def run_formula(self, mask, how, x, p, q):
        """Return (y, weights) of a layer by its formula."""
        return self.layer.eager.formula(x, p, q, mask, *how)

    @functools.cached_property
    def kernels(self) -> ModuleType:
        return importlib.import_module(f".kernels.{self.algorithm.name}_layers", __package__)  # imports Triton

    def _forward_triton(self, x, *args):
        return self.kernels.forward(x, *args)

    def _backward_triton(self, grad_y, x, *args):
        dx, gradients = self.kernels.backward(grad_y, x, *args)
        return _or_empty(dx, x), gradients

    def _forward_cpu(self, x, ps, qs, mask, *args):
        if ops.interpreting():
            return self._forward_triton(x, ps, qs, mask, *args)
        *how, return_weights = args

        def run(x, p, q):
            y, weights = self.layer.eager.forward(x, p, q, mask, *how, return_weights)
            return y.contiguous(), weights

        y, weights = run_layers(run, x, ps, qs)
        return y, [t.contiguous() for t in weights if return_weights]

    def _backward_cpu(self, grad_y, x, ps, qs, mask, *args):
        if ops.interpreting():
            return self._backward_triton(grad_y, x, ps, qs, mask, *args)
        *how, need_x, need_params = args
        eager = self.layer.eager
        run = lambda x, p, q: eager.forward(x, p, q, mask, *how, False)  # noqa: E731
        differentiate = lambda *given: eager.backward(*given[:-1], mask, *how, given[-1], need_params)  # noqa: E731
        dx, *grads = differentiate_layers(run, differentiate, grad_y, [None] * len(ps), x, ps, qs, need_x)
        pairs = zip((*grads[0], *grads[1]), (*ps, *qs), strict=True)
        return _or_empty(dx, x).contiguous(), [g.to(t.dtype).contiguous() for g, t in pairs if need_params]

    def _forward_fake(self, x, ps, qs, mask, *args):
        return x.new_empty(x.shape), [x.new_empty(x.shape) for _ in ps if args[-1]]

    def _backward_fake(self, grad_y, x, ps, qs, mask, *args):
        *_how, need_x, need_params = args
        return x.new_empty(x.shape if need_x else 0), [t.new_empty(t.shape) for t in (*ps, *qs) if need_params]


@dataclass(slots=True, eq=False)
class _Call:
    """Hold what is no tensor in a call. how: axis, the algorithm's settings and residual. plain: whether kernels may be
    called without their operator, if nothing has entered the thread: to hand it lists takes a tenth of a call.
    """

    operators: BlockOperators
    how: tuple[Any, ...]
    return_weights: bool
    backend: str
    fused_forward: bool
    fused_backward: bool
    plain: bool

    def run(self, x, p, q, mask, return_weights=False):
        """Return (y, weights or None) of one layer, without autograd."""
        return self.operators.layer.run(x, p, q, mask, self.how, return_weights, self.backend)

    def differentiate(self, mask, need_params, grad_y, grad_weights, x, p, q, need_x):
        """Return the gradients of one layer's x, p and q; None where not needed."""
        args = (grad_y, grad_weights, x, p, q, mask)
        return self.operators.layer.differentiate(*args, self.how, need_x, need_params, self.backend)


class Layers(torch.autograd.Function):
    """Return y of all layers, then the weights of each if asked for. Of x's size x alone is saved."""

    @classmethod
    def apply(cls, *args):
        # Function.apply binds its arguments to a signature, which takes longer than everything else on the host
        return super(torch.autograd.Function, cls).apply(*args)

    @staticmethod
    def forward(x, mask, call, *params):
        n, operators = len(params) // 2, call.operators
        if call.backend == "triton" and call.fused_forward:
            run = operators.kernels.forward if call.plain and enters_plainly() else operators.forward_op
            y, weights = run(x, params[:n], params[n:], mask, *call.how, call.return_weights)
            return (y, *weights)
        y, weights = run_layers(
            lambda x, p, q: call.run(x, p, q, mask, call.return_weights), x, params[:n], params[n:]
        )  # fmt: skip
        return (y, *weights) if call.return_weights else (y,)

    @staticmethod
    def setup_context(ctx, inputs, outputs):
        x, mask, ctx.call, *params = inputs
        ctx.save_for_backward(x, mask, *params)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx, grad_y, *grad_weights):
        x, mask, *params = ctx.saved_tensors
        call, (need_x, _mask, _call, *needs) = ctx.call, ctx.needs_input_grad
        n, operators, how = len(params) // 2, call.operators, call.how
        ps, qs, grad_weights = params[:n], params[n:], grad_weights or (None,) * n
        given = any(g is not None for g in grad_weights)
        if grad_y is None and not given:
            return (None,) * (3 + 2 * n)
        plain = call.plain and not given and type(x) is type(grad_y) is Tensor
        plain = plain and enters_plainly() and is_plain(grad_y)
        if torch.is_grad_enabled() or _transformed() or (not plain and _batched(grad_y, *grad_weights)):
            # under create_graph: closed forms in differentiable operations, exact to any order
            eager = operators.layer.eager
            dx, *grads = differentiate_layers(
                functools.partial(operators.run_formula, mask, how),
                lambda *given: eager.gradient(*given[:-1], mask, *how), grad_y, grad_weights, x, ps, qs, need_x,
            )  # fmt: skip
            found = (*grads[0], *grads[1])
        elif call.backend == "triton" and call.fused_backward and not given:
            run = operators.kernels.backward if plain else operators.backward_op
            dx, found = run(grad_y, x, ps, qs, mask, *how, need_x, any(needs))
            found = found or [None] * (2 * n)
        else:
            dx, *grads = differentiate_layers(
                lambda x, p, q: call.run(x, p, q, mask), functools.partial(call.differentiate, mask, any(needs)),
                grad_y, grad_weights, x, ps, qs, need_x,
            )  # fmt: skip
            found = (*grads[0], *grads[1])
        each = zip(found, params, needs, strict=True)
        return (
            dx if need_x else None, None, None,
            *(None if not need or g is None else g if g.dtype == t.dtype else g.to(t.dtype) for g, t, need in each),
        )  # fmt: skip


BLOCKS = {
    name: BlockOperators(OPERATORS[name])
    for name, algorithm in algorithms.ALGORITHMS.items()
    if algorithm.layers_backward
}
