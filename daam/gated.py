"""The fused density gate as PyTorch operators, `DensityGate` on the Triton backend: x moves three times forward and
five backward.

As in `ops.py`: a pair of operators with fakes, one autograd.Function, and while compiling a composite operator in its
place. What is transformed, or differentiated twice, is `reference/gated.py`.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.parameter import Parameter

from daam import ops
from daam.batching import Operand, pair
from daam.checks import has_autocast, has_hooks
from daam.kernels import budgets, tiles
from daam.kernels.operands import acc_dtype
from daam.ops import _VERSION, _forward_mode, _lib, _or_empty, _transformed
from daam.reference import gated as reference

_PARAMETERS = ("weight", "bias", "alpha", "mean_offsets", "log_sigma")
_INPUTS = "Tensor x, " + "".join(f"Tensor {name}, " for name in _PARAMETERS) + "Tensor? mask"
_AXES = "int channel_axis, int time_axis"


def gate_channels(
    x: Tensor, weight: Tensor, bias: Tensor, alpha: Tensor, mean_offsets: Tensor, log_sigma: Tensor,
    mask: Tensor | None, gate_dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Return (y, gate) of shapes (batch, channels, length) and (batch, 1, length), or without a batch, as x is: y in
    x's memory order, in the dtype that x and the gate promote to. Parameters are `DensityGate`'s, checked by
    `find_obstacle`. mask: bool, (batch, length), True where x is valid.
    """
    single = x.dim() == 2
    if single:
        x, mask = x.unsqueeze(0), None if mask is None else mask.unsqueeze(0)
    params = (weight, bias, alpha, mean_offsets, log_sigma)
    if x.is_contiguous() or 0 in x.stride():  # the order of expanded dimensions means nothing
        y, gate = GATED(x, *params, mask, 1, 2, gate_dtype)
    else:
        order = sorted(range(3), key=x.stride, reverse=True)
        y, gate = GATED(x.permute(order), *params, mask, order.index(1), order.index(2), gate_dtype)
        y = y.permute([order.index(i) for i in range(3)])
    return (y.squeeze(0), gate.squeeze(0)) if single else (y, gate)


def find_override(modules: dict[str, tuple[nn.Module, type]]) -> str | None:
    """Return why modules must be called, by name, and of which type they are expected, in words: one is of another
    type or has hooks. None where kernels may do what they do.
    """
    if nn.modules.module._has_any_global_hook():
        return "all modules have hooks"
    for name, (module, expected) in modules.items():
        if type(module) is not expected:
            return f"{name} is a {type(module).__name__}"
        if has_hooks(module):
            return f"{name} has hooks"
        if "forward" in module.__dict__:
            return f"{name}.forward is replaced"
    return None


def find_obstacle(x: Tensor, conv: nn.Conv1d, params: dict[str, Tensor | None]) -> str | None:
    """Return why kernels cannot take x, the convolution and the parameters, by name, in words; None where they can:
    where the formula raises an error it is left to that.
    """
    if x.dim() not in (2, 3) or x.shape[-1] == 0:
        return f"x has shape {tuple(x.shape)}"
    if conv.stride != (1,) or conv.padding != (0,):
        return f"to_attn has stride {conv.stride} and padding {conv.padding}"
    for name, t in {"x": x, **params}.items():
        if type(t) not in (Tensor, Parameter) and not isinstance(t, FakeTensor):
            return f"{name} is a {type(t).__name__}, no plain Tensor"
        if not t.is_floating_point() or t.device != x.device:
            return f"{name} is a {t.dtype} on {t.device}, and x on {x.device}"
    shapes = {name: tuple(t.shape) for name, t in params.items()}
    shapes["alpha"] = shapes["alpha"] or (1,)  # of no dimension, as published
    channels, gaussians = x.shape[-2], shapes["mean_offsets"]
    expected = dict(zip(_PARAMETERS, ((1, channels, 1), (1,), (1,), gaussians, gaussians), strict=True))
    if shapes != expected or len(gaussians) != 1:
        return f"parameters have shapes {shapes}"
    if len({find_dtype(t) for t in (x, params["weight"], params["bias"])}) > 1:
        return "x, to_attn.weight and to_attn.bias differ in dtype"
    return None


def find_dtype(t: Tensor) -> torch.dtype:
    """Return the dtype that a convolution takes a floating tensor in: autocast's, which leaves fp64 alone."""
    device = t.device.type
    if t.dtype == torch.float64 or not has_autocast(device):
        return t.dtype
    return torch.get_autocast_dtype(device)


class Operators:
    """Define and call the operators `gated_forward`, `gated_backward` and the composite `gated`.

    An instance is called with x, (batch, channels, times) in memory order, the parameters, a mask (batch, times), both
    axes and the gate's dtype, and returns (y, gate), differentiable.
    """

    def __init__(self):
        _lib.define(
            f"gated_forward({_INPUTS}, {_AXES}, ScalarType gate_dtype, bool save_stats)"
            " -> (Tensor y, Tensor gate, Tensor p, Tensor gates, Tensor stats)"
        )
        needs = "".join(f", bool need_{name}" for name in ("x", "weight", "bias", "alpha", "params"))
        grads = "".join(f", Tensor d_{name}" for name in _PARAMETERS)
        _lib.define(
            f"gated_backward(Tensor? grad_y, Tensor? grad_gate, {_INPUTS}, Tensor p, Tensor gates, Tensor? stats,"
            f" {_AXES}{needs}) -> (Tensor dx{grads})"
        )
        _lib.define(f"gated({_INPUTS}, {_AXES}, ScalarType gate_dtype, str version) -> (Tensor y, Tensor gate)")
        for op in ("forward", "backward"):
            ops.register(f"gated_{op}", *(getattr(self, f"_{op}_{where}") for where in ("triton", "cpu", "fake")))
        _lib.impl("gated", self._traced, "CompositeImplicitAutograd")
        for suffix in ("_forward", "_backward", ""):
            _lib.impl(f"gated{suffix}", getattr(self, f"{suffix or '_traced'}_vmapped"), "FuncTorchBatched")
        self.forward_op, self.backward_op, self.op = (
            ops.find_op(f"gated{suffix}") for suffix in ("_forward", "_backward", "")
        )

    def __call__(self, *args) -> tuple[Tensor, Tensor]:
        if torch.compiler.is_compiling():
            return self.op(*args, _VERSION)
        return self._gate(*args)

    def _gate(self, *args) -> tuple[Tensor, Tensor]:
        *tensors, mask, channel_axis, time_axis, gate_dtype = args
        save_stats = torch.is_grad_enabled() and any(t.requires_grad for t in tensors)
        call = _Call(self, (channel_axis, time_axis), gate_dtype, save_stats)
        return Gating.apply(*tensors, mask, call)[:2]

    def _traced(self, *args):
        *args, _version = args
        return reference.formula(*args) if _transformed() or _forward_mode() else self._gate(*args)

    def _forward_vmapped(self, *args):
        if not _any_batched(args[1:6]):
            return _call_rule(_fold_forward, self.forward_op, *args)
        y, gate = reference.formula(*args[:-1])
        empty = gate.new_empty(0, dtype=acc_dtype(args[0]))
        return y, gate, empty, empty, empty  # unused: parameters of samples are differentiated by the formula

    def _traced_vmapped(self, *args):
        return reference.formula(*args[:-1]) if _any_batched(args[1:6]) else _call_rule(_fold_forward, self.op, *args)

    def _backward_vmapped(self, *args):
        _need_x, *need_params = args[14:]
        if any(need_params) or _any_batched(args[3:8]):
            return self._differentiate(*args)
        return _call_rule(_fold_backward, self.backward_op, *args)

    @functools.cached_property
    def kernels(self) -> ModuleType:
        return importlib.import_module(".kernels.gated", __package__)  # imports Triton

    def _forward_triton(self, x, *args):
        y, gate, *others = self.kernels.forward(x, *args)
        return y, gate, *(x.new_empty(0, dtype=acc_dtype(x)) if t is None else t for t in others)

    def _backward_triton(self, *args):
        return tuple(map(_or_empty, self.kernels.backward(*args), args[2:8]))

    def _forward_cpu(self, x, *args):
        if ops.interpreting():
            return self._forward_triton(x, *args)
        *args, _save_stats = args
        y, gate = reference.formula(x, *args)
        acc, empty = acc_dtype(x), x.new_empty(0, dtype=acc_dtype(x))
        gates = gate.squeeze(1)  # unused: `_backward_cpu` has the formula
        return y.contiguous(), gate, torch.zeros_like(gates, dtype=acc), _copy_unless(gates, acc), empty

    def _backward_cpu(self, grad_y, grad_gate, *args):
        if ops.interpreting():
            return self._backward_triton(grad_y, grad_gate, *args)
        return self._differentiate(grad_y, grad_gate, *args)

    def _differentiate(self, grad_y, grad_gate, *args):
        """Return what the backward operator does, by the formula."""
        inputs, axes, needs = args[:7], args[10:12], args[12:]
        grads = reference.gradient(grad_y, grad_gate, *inputs, *axes)
        needs = (*needs, needs[-1])
        found = (g if need else None for g, need in zip(grads, needs, strict=True))
        return tuple(_or_empty(g, t).to(t.dtype).contiguous() for g, t in zip(found, inputs, strict=False))

    def _forward_fake(self, x, *args):
        *_params, mask, channel_axis, time_axis, gate_dtype, save_stats = args
        batch, times, acc = x.shape[3 - channel_axis - time_axis], x.shape[time_axis], acc_dtype(x)
        p, stats = x.new_empty((batch, times), dtype=acc), None
        gates = p.new_empty(0 if gate_dtype == acc else (batch, times))
        line = p.unsqueeze(1)
        if save_stats and tiles.worth_keeping(line, 2, 1) and (x.device.type != "cpu" or ops.interpreting()):
            stats = tiles.stats_shape(budgets.gate_forward(1), line, 2, 1, None, mask is not None)
        y = x.new_empty(x.shape, dtype=torch.promote_types(x.dtype, gate_dtype))
        return y, x.new_empty((batch, 1, times), dtype=gate_dtype), p, gates, p.new_empty(stats or 0)

    def _backward_fake(self, _grad_y, _grad_gate, *args):
        inputs, needs = args[:6], args[12:]
        needs = (*needs, needs[-1])
        return tuple(like.new_empty(like.shape if need else 0) for like, need in zip(inputs, needs, strict=True))


# --- Under vmap: samples that share all parameters are rows of the batch, others take the formula ---------
def _any_batched(tensors: Sequence[Tensor]) -> bool:
    """Tell whether any of the tensors has samples that vmap runs over."""
    return any(torch._C._functorch.is_batchedtensor(t) for t in tensors)


def _call_rule(rule, op, *args):
    """Call an operator by a rule for vmap, as those that `torch.library.register_vmap` takes, with op before."""
    from torch._functorch.autograd_function import custom_function_call_vmap_helper
    from torch._functorch.pyfunctorch import retrieve_current_functorch_interpreter

    interpreter = retrieve_current_functorch_interpreter()
    return custom_function_call_vmap_helper(interpreter, functools.partial(rule, op), op, *args)


def _fold(operand: Operand, n_samples: int, batch_axis: int) -> Tensor | None:
    """Return a tensor with the samples of all rows in its batch."""
    t = operand.lead(n_samples)
    return None if t is None else t.movedim(0, batch_axis).flatten(batch_axis, batch_axis + 1)


def _unfold(t: Tensor, n_samples: int, batch_axis: int) -> Tensor:
    return t.unflatten(batch_axis, (n_samples, t.shape[batch_axis] // n_samples))


def _fold_forward(op, info, in_dims, x, *args):
    *params, mask, channel_axis, time_axis, gate_dtype, last = args
    n_samples, axis, last = info.batch_size, 3 - channel_axis - time_axis, False if last is True else last
    x, mask = _fold(Operand(x, in_dims[0]), n_samples, axis), _fold(Operand(mask, in_dims[6]), n_samples, 0)
    y, *others = op(x, *params, mask, channel_axis, time_axis, gate_dtype, last)
    # a gate, and numbers of positions, have a batch first; what is not kept is empty
    dims = [None if t.dim() == 1 else 0 for t in others]
    pairs = zip(others, dims, strict=True)
    return (_unfold(y, n_samples, axis), *(t if d is None else _unfold(t, n_samples, 0) for t, d in pairs)), (
        axis,
        *dims,
    )


def _fold_backward(op, info, in_dims, *args):
    grad_y, grad_gate, x, *params, mask, p, gates, _stats = pair(args[:12], in_dims[:12])
    (channel_axis, time_axis, *needs), n_samples = args[12:], info.batch_size
    axis = 3 - channel_axis - time_axis
    like_x = [_fold(one, n_samples, axis) for one in (grad_y, x)]
    grad_gate, mask, p = (_fold(one, n_samples, 0) for one in (grad_gate, mask, p))
    gates = gates.tensor if gates.dim is None else _fold(gates, n_samples, 0)
    inputs = (like_x[0], grad_gate, like_x[1], *(one.tensor for one in params), mask, p, gates, None)
    dx, *grads = op(*inputs, channel_axis, time_axis, *needs)
    dim = axis if needs[0] else None
    return (dx if dim is None else _unfold(dx, n_samples, axis), *grads), (dim, *[None] * len(grads))


def _copy_unless(gates: Tensor, dtype: torch.dtype) -> Tensor:
    """Return numbers in another dtype; none where they have it already."""
    return gates.new_empty(0) if gates.dtype == dtype else gates.to(dtype)


@dataclass(slots=True, eq=False)
class _Call:
    """Hold what is no tensor in a call; axes: of channels and times."""

    operators: Operators
    axes: tuple[int, int]
    gate_dtype: torch.dtype
    save_stats: bool


class Gating(torch.autograd.Function):
    """Return y and the gate, then what the backward pass needs of them."""

    @classmethod
    def apply(cls, *args):
        # Function.apply binds its arguments to a signature, which takes longer than everything else on the host
        return super(torch.autograd.Function, cls).apply(*args)

    @staticmethod
    def forward(*args):
        *tensors, call = args
        return call.operators.forward_op(*tensors, *call.axes, call.gate_dtype, call.save_stats)

    @staticmethod
    def setup_context(ctx, inputs, outputs):
        *tensors, ctx.call = inputs
        _y, gate, p, gates, stats = outputs
        x, weight, bias, _alpha, *gaussians = ctx.needs_input_grad[:6]
        constant = () if x or weight or bias or any(gaussians) else (gate,)
        ctx.mark_non_differentiable(p, gates, stats, *constant)
        ctx.save_for_backward(*tensors, gate if gate.dtype == p.dtype else gates, p, stats)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx, grad_y, grad_gate, *_others):
        *inputs, gates, p, stats = ctx.saved_tensors
        call, needs = ctx.call, ctx.needs_input_grad[:6]
        if grad_y is None and grad_gate is None:
            return (None,) * 8
        if torch.is_grad_enabled() or _transformed():
            # under create_graph: the closed form in differentiable operations, exact to any order
            grads = reference.gradient(grad_y, grad_gate, *inputs, *call.axes)
        else:
            gates, stats = gates.reshape(p.shape), stats if stats.numel() else None
            flags = (*needs[:4], needs[4] or needs[5])
            grads = call.operators.backward_op(grad_y, grad_gate, *inputs, p, gates, stats, *call.axes, *flags)
        each = zip(grads, inputs, needs, strict=False)  # all inputs but the mask
        return *(g.to(like.dtype) if need else None for g, like, need in each), None, None


GATED = Operators()
