"""The Triton backend as PyTorch operators, and one autograd.Function over all algorithms and both backends.

A backend is a module with a `forward` and a `backward` per algorithm. The eager one is plain PyTorch
(`daam.reference`), so that torch.compile fuses it; the Triton one (`daam.kernels`) is a pair of operators with fakes.
In eager mode the Function is called directly, and none where nothing requires grad. While compiling, a
CompositeImplicitAutograd operator whose body is that Function stands in for it: Dynamo inlines a bare Function where it
sees no input that requires grad, as under func.grad, and its gradient would be silently zero.

Under vmap the backend runs once for all samples (`batching.py`): operators, the Function and what stands in for it have
rules that make samples rows, or heads where they have parameters of their own. Gradients under a transform, as of
vmap(grad(…)), and double backward go by `gradient` of the reference, jvp and, while compiling, all under grad by
`formula`: differentiable operations, of all samples at once, on either backend.

A policy of selective checkpointing can name `torch.ops.daam.density_forward.default` on the Triton backend. On the
eager one a call is aten's operations, of which none is its own, and keeps nothing but its inputs for the backward pass:
leave it out of the region, or name what comes next. torch.jit.trace can save what it traced under torch.no_grad(): with
gradients an autograd.Function is in the graph, which torch.jit.save refuses.
"""

from __future__ import annotations

import functools
import hashlib
import importlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from daam.backend import interpreting

try:
    from daam.kernels import algorithms, tiles
except ModuleNotFoundError as error:
    if error.name != f"{__package__}.kernels":
        raise
    raise ImportError(
        "daam/kernels is a symbolic link, which this checkout holds as a file, as git on Windows makes it: install the "
        "package with `pip install .` or `pip install -e .`, or check it out again under `git -c core.symlinks=true`"
    ) from error
from daam.batching import pair, run_samples
from daam.kernels.operands import acc_dtype

# Of the operators: "daam", and of a copy of this package under another name, as of `hub.py`, one of its own.
NAMESPACE = __package__.replace(".", "_")
_lib = torch.library.Library(NAMESPACE, "DEF")

# AOTAutograd's cache knows the composite operators by name and arguments, not by what they do: without this argument an
# edited formula, or an edited fake, would be served from the cache of the old one.
_FOLDERS = (Path(__file__).parent, Path(__file__).parent / "reference", Path(tiles.__file__).parent)
_SOURCES = sorted(path for folder in _FOLDERS for path in folder.glob("*.py"))
_VERSION = hashlib.sha256(b"".join(path.read_bytes() for path in _SOURCES)).hexdigest()[:16]


def _transformed() -> bool:
    """Tell whether vmap, grad, jvp, … is active: nothing may be changed in place then."""
    return torch._C._are_functorch_transforms_active()


def _batched(*gradients: Tensor | None) -> bool:
    """Tell whether there are many gradients in one, of is_grads_batched."""
    plain = [t for t in gradients if type(t) is Tensor and t.layout is torch.strided]
    return not all(map(torch._C._has_storage, plain))


def _forward_mode() -> bool:
    """Tell whether forward-mode differentiation is active, which autograd.Function does not know."""
    return forward_ad._current_level >= 0


def register(op: str, triton: Callable, cpu: Callable, fake: Callable) -> None:
    """Register what an operator runs on devices that Triton drives, on the CPU, and on tensors without memory."""
    for key in ("CUDA", "XPU"):
        _lib.impl(op, triton, key)
    _lib.impl(op, cpu, "CPU")
    torch.library.register_fake(f"{NAMESPACE}::{op}", fake, lib=_lib)


def find_op(name: str) -> torch._ops.OpOverload:
    """Return an operator of this package."""
    return getattr(getattr(torch.ops, NAMESPACE), name).default


class Operators:
    """Define and call the operators of an algorithm: `{name}_forward`, `{name}_backward` and the composite `{name}`.

    An instance is called with (x, p, q, mask, axis, *settings, residual, return_weights, backend) and returns (y,) or
    (y, weights), differentiable, on either backend, in eager mode and compiled.
    """

    def __init__(self, algorithm: algorithms.Algorithm):
        self.algorithm, name, (p, q) = algorithm, algorithm.name, algorithm.params
        self.eager: ModuleType = importlib.import_module(f".reference.{name}", __package__)
        inputs = f"Tensor x, Tensor {p}, Tensor {q}, Tensor? mask"
        settings = "".join(f" {kind} {setting}," for setting, kind in algorithm.settings.items())
        how = f"int axis,{settings} bool residual"
        # Outputs that were not asked for are empty: vmap's fallback takes a fixed number of tensors only.
        _lib.define(
            f"{name}_forward({inputs}, {how}, bool return_weights, bool save_stats)"
            " -> (Tensor y, Tensor weights, Tensor stats)"
        )
        _lib.define(
            f"{name}_backward(Tensor? grad_y, Tensor? grad_weights, {inputs}, Tensor? stats, {how}, bool need_x,"
            f" bool need_params) -> (Tensor dx, Tensor d_{p}, Tensor d_{q})"
        )
        _lib.define(
            f"{name}({inputs}, {how}, bool return_weights, str backend, str version) -> (Tensor y, Tensor weights)"
        )
        for op in ("forward", "backward"):
            register(f"{name}_{op}", *(getattr(self, f"_{op}_{where}") for where in ("triton", "cpu", "fake")))
        _lib.impl(name, self._traced, "CompositeImplicitAutograd")
        for suffix in ("_forward", "_backward", ""):
            rule = getattr(self, f"{suffix or '_traced'}_samples")
            torch.library.register_vmap(f"{NAMESPACE}::{name}{suffix}", rule, lib=_lib)
        self.forward_op, self.backward_op, self.op = (
            find_op(name + suffix) for suffix in ("_forward", "_backward", "")
        )

    def __call__(self, x, p, q, mask, axis, *settings_residual_weights_backend) -> tuple[Tensor, ...]:
        *how, return_weights, backend = settings_residual_weights_backend
        if torch.compiler.is_compiling():
            return self.op(x, p, q, mask, axis, *how, return_weights, backend, _VERSION)[: 1 + return_weights]
        return self._attend(x, p, q, mask, (axis, *how), return_weights, backend)

    def _attend(self, x, p, q, mask, how, return_weights, backend) -> tuple[Tensor, ...]:
        if _forward_mode():
            return self.eager.formula(x, p, q, mask, *how)[: 1 + return_weights]
        save_stats = torch.is_grad_enabled() and (x.requires_grad or p.requires_grad or q.requires_grad)
        if not (save_stats or _transformed()):  # without the Function, which takes longer than a tiny x
            return self.run(x, p, q, mask, how, return_weights, backend)[: 1 + return_weights]
        call = _Call(self, how, return_weights, save_stats, backend)
        return Attention.apply(x, p, q, mask, call)[: 1 + return_weights]

    def run(self, x, p, q, mask, how, return_weights, backend) -> tuple[Tensor, Tensor | None]:
        """Return y and the weights, None if not asked for, without autograd. how: as `_Call` has it."""
        if backend != "triton":
            return self.eager.forward(x, p, q, mask, *how, return_weights)
        y, weights, _stats = self.forward_op(x, p, q, mask, *how, return_weights, False)
        return y, weights if return_weights else None

    def differentiate(self, grad_y, grad_weights, x, p, q, mask, how, need_x, need_params, backend):
        """Return the gradients of x, p and q, None where not needed, without autograd and kept statistics."""
        args = (grad_y, grad_weights, x, p, q, mask)
        if backend != "triton":
            return self.eager.backward(*args, *how, need_x, need_params)
        found = self.backward_op(*args, None, *how, need_x, need_params)
        return tuple(g if need else None for g, need in zip(found, (need_x, need_params, need_params), strict=True))

    def _traced(self, x, p, q, mask, *args):
        *how, return_weights, backend, _version = args
        if _transformed() or _forward_mode():
            return self.eager.formula(x, p, q, mask, *how)
        y, *weights = self._attend(x, p, q, mask, tuple(how), return_weights, backend)
        return y, weights[0] if weights else x.new_empty(0)

    def run_samples(self, call, info, in_dims, x, p, q, mask, axis, settings) -> tuple[tuple[Tensor, ...], tuple]:
        """Return (outputs, their dimensions of samples) of call(x, p, q, mask, axis, *settings), y or (y, weights)."""
        x, p, q, mask = pair((x, p, q, mask), in_dims[:4])

        def run(like_x, params, mask, axes):
            return call(*like_x, *params, mask, axes[0], *self._follow(settings, axes[1])), ()

        axes = axis, self.algorithm.find_setting("feature_axis", settings)
        outputs, _ = run_samples(run, info.batch_size, [x], [p, q], mask, axes)
        return tuple(outputs), (0,) * len(outputs)

    def _follow(self, settings, feature_axis):
        """Return settings with a feature_axis, if the algorithm has one."""
        names = self.algorithm.settings
        return [feature_axis if name == "feature_axis" else one for name, one in zip(names, settings, strict=True)]

    def _forward_samples(self, info, in_dims, x, p, q, mask, axis, *args):
        *settings, residual, return_weights, _save_stats = args  # statistics would be those of other chunks

        def call(*given):
            return self.forward_op(*given, residual, return_weights, False)[: 1 + return_weights]

        outputs, _dims = self.run_samples(call, info, in_dims, x, p, q, mask, axis, settings)
        y, weights = outputs if return_weights else (*outputs, x.new_empty(0))
        return (y, weights, x.new_empty(0, dtype=acc_dtype(x))), (0, 0 if return_weights else None, None)

    def _traced_samples(self, info, in_dims, x, p, q, mask, axis, *args):
        *settings, residual, return_weights, backend, version = args

        def call(*given):
            return self.op(*given, residual, return_weights, backend, version)[: 1 + return_weights]

        outputs, dims = self.run_samples(call, info, in_dims, x, p, q, mask, axis, settings)
        return (outputs, dims) if return_weights else ((*outputs, x.new_empty(0)), (*dims, None))

    def _backward_samples(self, info, in_dims, grad_y, grad_weights, x, p, q, mask, _stats, axis, *args):
        *settings, residual, need_x, need_params = args
        grad_y, grad_weights, *operands, mask = pair((grad_y, grad_weights, x, p, q, mask), in_dims[:6])

        def run(like_x, params, mask, axes):
            given = (*like_x[1:], like_x[0], *params, mask, None, axes[0], *self._follow(settings, axes[1]))
            dx, *grads = self.backward_op(*given, residual, need_x, need_params)
            return [dx] if need_x else [], grads if need_params else []

        axes = axis, self.algorithm.find_setting("feature_axis", settings)
        like_x = [operands[0], grad_y, grad_weights]
        dx, grads = run_samples(run, info.batch_size, like_x, operands[1:], mask, axes, as_heads=need_params)
        empty, dims = (x.new_empty(0),), (0 if need_x else None, *[0 if need_params else None] * 2)
        return (*(dx or empty), *(grads or (p.new_empty(0), q.new_empty(0)))), dims

    @functools.cached_property
    def kernels(self) -> ModuleType:
        return importlib.import_module(f".kernels.{self.algorithm.name}", __package__)  # imports Triton

    def _forward_triton(self, x, *args):
        y, weights, stats = self.kernels.forward(x, *args)
        return y, _or_empty(weights, x), x.new_empty(0, dtype=acc_dtype(x)) if stats is None else stats

    def _backward_triton(self, grad_y, grad_weights, x, p, q, *args):
        dx, dp, dq = self.kernels.backward(grad_y, grad_weights, x, p, q, *args)
        return _or_empty(dx, x), _or_empty(dp, p), _or_empty(dq, q)

    def _forward_cpu(self, x, *args):
        if interpreting():
            return self._forward_triton(x, *args)
        y, weights = self.eager.forward(x, *args[:-1])  # without save_stats: it keeps none
        return y.contiguous(), _or_empty(weights, x).contiguous(), x.new_empty(0, dtype=acc_dtype(x))

    def _backward_cpu(self, grad_y, grad_weights, x, p, q, mask, stats, *args):
        if interpreting():
            return self._backward_triton(grad_y, grad_weights, x, p, q, mask, stats, *args)
        grads = self.eager.backward(grad_y, grad_weights, x, p, q, mask, *args)
        return tuple(_or_empty(g, t).to(t.dtype).contiguous() for g, t in zip(grads, (x, p, q), strict=True))

    def _forward_fake(self, x, p, q, mask, axis, *args):
        *settings, _residual, return_weights, save_stats = args
        stats = None
        if save_stats and tiles.worth_keeping(x, axis, q.shape[0]) and (x.device.type != "cpu" or interpreting()):
            # which chunks are streamed does not depend on the number of parameters, which may be symbolic
            budget, feature_axis = self.algorithm.forward(1), self.algorithm.find_setting("feature_axis", settings)
            stats = tiles.stats_shape(budget, x, axis, q.shape[0], feature_axis, mask is not None)
        weights = x.new_empty(x.shape if return_weights else 0)
        return x.new_empty(x.shape), weights, x.new_empty(stats or 0, dtype=acc_dtype(x))

    def _backward_fake(self, grad_y, grad_weights, x, p, q, mask, stats, *args):
        *_how, need_x, need_params = args
        needs = ((x, need_x), (p, need_params), (q, need_params))
        return tuple(like.new_empty(like.shape if need else 0) for like, need in needs)


def _or_empty(t: Tensor | None, like: Tensor) -> Tensor:
    return like.new_empty(0) if t is None else t


@dataclass(slots=True, eq=False)  # not frozen: that takes twice as long to make
class _Call:
    """Hold what is no tensor in a call. how: axis, the algorithm's settings and residual."""

    operators: Operators
    how: tuple[Any, ...]
    return_weights: bool
    save_stats: bool
    backend: str


class Attention(torch.autograd.Function):
    """Return y, then the weights if asked for, then statistics for the backward pass if the backend keeps any."""

    @classmethod
    def apply(cls, *args):
        if _transformed():
            return super().apply(*args)
        # Function.apply binds its arguments to a signature, which takes longer than everything else on the host
        return super(torch.autograd.Function, cls).apply(*args)

    @staticmethod
    def forward(x, p, q, mask, call):
        operators, args = call.operators, (x, p, q, mask, *call.how)
        if call.backend == "triton":
            y, weights, stats = operators.forward_op(*args, call.return_weights, call.save_stats)
            outputs = (y, weights) if call.return_weights else (y,)
            return (*outputs, stats) if stats.numel() else outputs
        return operators.eager.forward(*args, call.return_weights)[: 1 + call.return_weights]

    @staticmethod
    def vmap(info, in_dims, x, p, q, mask, call):
        operators, (axis, *settings, residual) = call.operators, call.how

        def attend(x, p, q, mask, *axis_and_settings):
            return operators._attend(x, p, q, mask, (*axis_and_settings, residual), call.return_weights, call.backend)

        return operators.run_samples(attend, info, in_dims, x, p, q, mask, axis, settings)

    @staticmethod
    def setup_context(ctx, inputs, outputs):
        *tensors, ctx.call = inputs
        stats = outputs[1 + ctx.call.return_weights :]
        ctx.mark_non_differentiable(*stats)
        ctx.save_for_backward(*tensors, *stats)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx, grad_y, *others):
        x, p, q, mask, *stats = ctx.saved_tensors
        call, needs = ctx.call, ctx.needs_input_grad[:3]
        operators, need_x, need_params = call.operators, needs[0], needs[1] or needs[2]
        inputs = (grad_y, others[0] if call.return_weights else None, x, p, q, mask)
        if inputs[0] is None and inputs[1] is None:
            return (None,) * 5
        if torch.is_grad_enabled() or _transformed():
            # under create_graph: the closed form in differentiable operations, exact to any order
            grads = operators.eager.gradient(*inputs, *call.how)
        elif call.backend == "triton":
            dx, dp, dq = operators.backward_op(*inputs, stats[0] if stats else None, *call.how, need_x, need_params)
            return dx if need_x else None, dp if needs[1] else None, dq if needs[2] else None, None, None
        else:
            grads = operators.eager.backward(*inputs, *call.how, need_x, need_params)
        each = zip(grads, (x, p, q), needs, strict=True)
        return *(g.to(like.dtype) if need else None for g, like, need in each), None, None


OPERATORS = {name: Operators(algorithm) for name, algorithm in algorithms.ALGORITHMS.items()}
