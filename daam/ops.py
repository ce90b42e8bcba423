"""The Triton backend as PyTorch operators, and one autograd.Function per algorithm over either backend.

A backend is a forward and a backward function per algorithm. The eager one is plain PyTorch (`daam.reference`), so that
torch.compile fuses it; the Triton one is a pair of operators with fakes. In eager mode the Function is called directly.
While compiling, a CompositeImplicitAutograd operator whose body is that Function stands in for it: Dynamo inlines a
bare Function where it sees no input that requires grad, as under func.grad, and its gradient would be silently zero.
"""

from __future__ import annotations

import functools
import hashlib
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor
from torch.autograd import forward_ad

from daam import reference
from daam.backend import interpreting
from daam.kernels import launch, layout

_lib = torch.library.Library("daam", "DEF")

# AOTAutograd's cache knows the composite operators by name and arguments, not by what they do: without this argument an
# edited formula, or an edited fake, would be served from the cache of the old one.
_SOURCES = sorted(path for folder in (".", "kernels") for path in (Path(__file__).parent / folder).glob("*.py"))
_VERSION = hashlib.sha256(b"".join(path.read_bytes() for path in _SOURCES)).hexdigest()[:16]


def _transformed() -> bool:
    """Under vmap, grad, jvp, …: nothing may be changed in place there."""
    return torch._C._are_functorch_transforms_active()


def _forward_mode() -> bool:
    """Under forward-mode differentiation, which autograd.Function does not know."""
    return forward_ad._current_level >= 0


@functools.cache
def _density_kernels() -> ModuleType:
    from daam.kernels import density  # imports Triton

    return density


# --- Density attention ----------------------------------------------------------------------------

_INPUTS = "Tensor x, Tensor mean_offset, Tensor c, Tensor? mask"
_VIEW = "int axis, int feature_axis, float eps, bool residual"
# Outputs that were not asked for are empty: vmap's fallback takes a fixed number of tensors only.
_lib.define(
    f"density_forward({_INPUTS}, {_VIEW}, bool return_weights, bool save_stats)"
    " -> (Tensor y, Tensor weights, Tensor stats)"
)
_lib.define(
    f"density_backward(Tensor? grad_y, Tensor? grad_weights, {_INPUTS}, Tensor? stats, {_VIEW},"
    " bool need_x, bool need_params) -> (Tensor dx, Tensor d_mean_offset, Tensor d_c)"
)
_lib.define(f"density({_INPUTS}, {_VIEW}, bool return_weights, str backend, str version) -> (Tensor y, Tensor weights)")


def _density_forward_triton(*args):
    return _density_kernels().density_forward(*args)


def _density_backward_triton(*args):
    return _density_kernels().density_backward(*args)


def _density_forward_cpu(x, mean_offset, c, mask, axis, feature_axis, eps, residual, return_weights, save_stats):
    if interpreting():
        return _density_forward_triton(
            x, mean_offset, c, mask, axis, feature_axis, eps, residual, return_weights, save_stats
        )
    y, *weights = reference.density_forward(x, mean_offset, c, mask, axis, feature_axis, eps, residual, return_weights)
    return (
        y.contiguous(),
        weights[0].contiguous() if weights else x.new_empty(0),
        x.new_empty(0, dtype=reference.compute_dtype(x)),
    )


def _density_backward_cpu(
    grad_y, grad_weights, x, mean_offset, c, mask, stats, axis, feature_axis, eps, residual, need_x, need_params
):
    if interpreting():
        return _density_backward_triton(
            grad_y, grad_weights, x, mean_offset, c, mask, stats, axis, feature_axis, eps, residual, need_x, need_params
        )
    grads = reference.density_backward(
        grad_y, grad_weights, x, mean_offset, c, mask, axis, feature_axis, eps, residual, need_x, need_params
    )
    dx = grads.pop(0).contiguous() if need_x else x.new_empty(0)
    return dx, *(g.contiguous() for g in grads or (mean_offset.new_empty(0), c.new_empty(0)))


def _density_forward_fake(x, mean_offset, c, mask, axis, feature_axis, eps, residual, return_weights, save_stats):
    stats = None
    if save_stats and launch.worth_keeping(x, axis, c.shape[0]) and (x.device.type != "cpu" or interpreting()):
        stats = launch.stats_shape(x, axis, c.shape[0], feature_axis, layout.varies(c, axis, feature_axis))
    return (
        x.new_empty(x.shape),
        x.new_empty(x.shape if return_weights else 0),
        x.new_empty(0 if stats is None else stats, dtype=reference.compute_dtype(x)),
    )


def _density_backward_fake(
    grad_y, grad_weights, x, mean_offset, c, mask, stats, axis, feature_axis, eps, residual, need_x, need_params
):
    return x.new_empty(x.shape if need_x else 0), *(
        p.new_empty(p.shape if need_params else 0) for p in (mean_offset, c)
    )


_lib.impl("density_forward", _density_forward_triton, "CUDA")
_lib.impl("density_backward", _density_backward_triton, "CUDA")
_lib.impl("density_forward", _density_forward_cpu, "CPU")
_lib.impl("density_backward", _density_backward_cpu, "CPU")
torch.library.register_fake("daam::density_forward", _density_forward_fake, lib=_lib)
torch.library.register_fake("daam::density_backward", _density_backward_fake, lib=_lib)
_density_forward_op = torch.ops.daam.density_forward.default
_density_backward_op = torch.ops.daam.density_backward.default


class Density(torch.autograd.Function):
    """y, then the weights if asked for, then statistics for the backward pass if the backend keeps any."""

    generate_vmap_rule = True

    @classmethod
    def apply(cls, *args):
        if _transformed():
            return super().apply(*args)
        # Function.apply binds its arguments to a signature, which takes longer than everything else on the host
        return super(torch.autograd.Function, cls).apply(*args)

    @staticmethod
    def forward(x, mean_offset, c, mask, axis, feature_axis, eps, residual, return_weights, save_stats, backend):
        args = (x, mean_offset, c, mask, axis, feature_axis, eps, residual)
        if backend == "triton":
            y, weights, stats = _density_forward_op(*args, return_weights, save_stats)
            return (y, *([weights] if return_weights else []), *([stats] if stats.numel() else []))
        if _transformed():
            return reference.density(*args)[: 1 + return_weights]
        return tuple(reference.density_forward(*args, return_weights))

    @staticmethod
    def setup_context(ctx, inputs, outputs):
        x, mean_offset, c, mask, *ctx.view, ctx.return_weights, _, ctx.backend = inputs
        stats = outputs[1 + ctx.return_weights :]
        ctx.mark_non_differentiable(*stats)
        ctx.save_for_backward(x, mean_offset, c, mask, *stats)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx, grad_y, *others):
        x, mean_offset, c, mask, *stats = ctx.saved_tensors
        grad_weights = others[0] if ctx.return_weights else None
        need_x, *need_params = ctx.needs_input_grad[:3]
        args = (x, mean_offset, c, mask)
        if grad_y is None and grad_weights is None:
            grads = (None, None, None)
        elif torch.is_grad_enabled() or _transformed():
            # under create_graph: the closed form in differentiable operations, exact to any order
            grads = reference.density_grad(grad_y, grad_weights, *args, *ctx.view)
        elif ctx.backend == "triton":
            grads = _density_backward_op(
                grad_y, grad_weights, *args, stats[0] if stats else None, *ctx.view, need_x, any(need_params)
            )
        else:
            grads = reference.density_backward(grad_y, grad_weights, *args, *ctx.view, need_x, any(need_params))
            grads = (*([] if need_x else [None]), *grads, *([] if any(need_params) else [None, None]))
        return *(g if need else None for g, need in zip(grads, ctx.needs_input_grad, strict=False)), *([None] * 8)


def density(
    x: Tensor, mean_offset: Tensor, c: Tensor, mask: Tensor | None, axis: int, feature_axis: int, eps: float,
    residual: bool, return_weights: bool, backend: str,
) -> tuple[Tensor, ...]:  # fmt: skip
    """(y,) or (y, weights) of density attention, differentiable, on either backend, in eager mode and compiled."""
    args = (x, mean_offset, c, mask, axis, feature_axis, eps, residual, return_weights, backend)
    if torch.compiler.is_compiling():
        return torch.ops.daam.density.default(*args, _VERSION)[: 1 + return_weights]
    return _density(*args)


def _density(x, mean_offset, c, mask, axis, feature_axis, eps, residual, return_weights, backend):
    args = (x, mean_offset, c, mask, axis, feature_axis, eps, residual)
    if _forward_mode():
        return reference.density(*args)[: 1 + return_weights]
    save_stats = torch.is_grad_enabled() and (x.requires_grad or mean_offset.requires_grad or c.requires_grad)
    return Density.apply(*args, return_weights, save_stats, backend)[: 1 + return_weights]


def _density_traced(x, mean_offset, c, mask, axis, feature_axis, eps, residual, return_weights, backend, version):
    args = (x, mean_offset, c, mask, axis, feature_axis, eps, residual)
    if _transformed() or _forward_mode():
        return reference.density(*args)
    y, *weights = _density(*args, return_weights, backend)
    return y, weights[0] if weights else x.new_empty(0)


_lib.impl("density", _density_traced, "CompositeImplicitAutograd")
