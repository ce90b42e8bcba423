"""Providers that are timed beside each other: our backends, torch.compile of the reference, the published package, of
modules the formula in plain torch operations and torch.compile of it, standard attention, and two yardsticks that only
move memory. Each comes with what its result must be.
"""

from __future__ import annotations

import functools
import importlib.util
import math
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

import daam
from bench.modules import FORMULA
from bench.workloads import Workload
from daam.backend import interpreting


@dataclass(frozen=True)
class Candidate:
    """Hold a provider on one workload: forward() makes y, which is differentiated with respect to leaves. expected: y
    and the gradients of the leaves as they should be. backend: what ran. inputs: how many leaves are no parameters.
    """

    forward: Callable[[], Tensor]
    leaves: tuple[Tensor, ...]
    grad_y: Tensor
    expected: tuple[Tensor, ...]
    backend: str
    inputs: int = 1

    def backward(self, y: Tensor) -> tuple[Tensor, ...]:
        """Return the gradients of the leaves."""
        return torch.autograd.grad(y, self.leaves, self.grad_y)


class Task:
    """Hold a workload's tensors: x and the parameters, which require grad, grad_y, and the reference's result."""

    def __init__(self, workload: Workload, device: str):
        torch.manual_seed(0)  # of modules that draw parameters
        torch._dynamo.reset()  # else the second shape of a function is compiled for any size
        self.workload, self.device = workload, device
        x, params, self.grad_y = workload.inputs(device)
        self.leaves = tuple(t.requires_grad_() for t in (x, *params))

    @property
    def x(self) -> Tensor:
        """Return the first leaf."""
        return self.leaves[0]

    @functools.cached_property
    def expected(self) -> tuple[Tensor, ...]:
        """Return y and the gradients of the leaves by the reference, in float64; computed once."""
        return reference(self.workload.compute_reference, self.leaves, self.grad_y)


@dataclass(frozen=True)
class Provider:
    """Describe what is timed: build makes the candidate of a task. missing: why it cannot run on a device, or None.
    serves: whether it has an answer to a workload. half: the largest error of its results in bf16, relative to the
    largest value expected; infinite where they are timed whatever it is, which stands beside their times.
    """

    build: Callable[[Task], Candidate]
    missing: Callable[[str], str | None] = lambda device: None
    serves: Callable[[Workload], bool] = lambda workload: True
    half: float = 2e-2


def reference(
    forward: Callable[..., Tensor], leaves: tuple[Tensor, ...], grad_y: Tensor, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, ...]:
    """Return y = forward(*leaves) and the gradients of the leaves, computed by autograd in dtype."""
    leaves = tuple(t.detach().to(dtype).requires_grad_() for t in leaves)
    y = forward(*leaves)
    return y.detach(), *torch.autograd.grad(y, leaves, grad_y.to(dtype))


def _ours(task: Task, backend: str, compiled: bool = False) -> Candidate:
    compiled = compiled or task.workload.in_model
    wrap = {"wrap": functools.partial(torch.compile, fullgraph=True)} if compiled else {}
    call = task.workload.bind(task.leaves, backend, **wrap)
    if backend != FORMULA:
        backend, _ = daam.backend_for(task.x, backend)
    name = f"{backend}, compiled" if compiled else backend
    return Candidate(call, task.leaves, task.grad_y, task.expected, name)


def _published(task: Task) -> Candidate:
    from gaussian_adaptive_attention import GaussianBlock, MultiHeadGaussianAdaptiveAttention

    workload, (x, *params) = task.workload, task.leaves
    sizes = (workload.axis, workload.heads, workload.gaussians)
    if workload.whole:
        module = GaussianBlock(*([n] * workload.layers for n in sizes), workload.layers)
        names = [f"layers.{layer}.{name}" for layer in range(workload.layers) for name in workload.record.params]
    else:
        module, names = MultiHeadGaussianAdaptiveAttention(*sizes), workload.record.params
    y, dx, *grads = task.expected
    leaves, expected = [x], [y, dx]
    ours = dict(zip(names, zip(params, grads, strict=True), strict=True))
    for name, p in module.to(task.device).named_parameters():
        path, head, last = re.fullmatch(r"(.*)attention_heads\.(\d+)\.(\w+)", name).groups()
        values, grad = (t[int(head)] for t in ours[path + last])
        p.data = values.detach().clone()
        leaves.append(p)
        expected.append(grad)
    return Candidate(lambda: module(x), tuple(leaves), task.grad_y, tuple(expected), "published")


def _scaled_dot_product_attention(task: Task) -> Candidate:
    leaves = tuple(_heads(torch.randn_like(task.x), task.workload.heads).requires_grad_() for _ in range(3))
    grad_y = _heads(task.grad_y, task.workload.heads)
    expected = reference(_attention, leaves, grad_y, _precise(task.x))
    return Candidate(lambda: functional.scaled_dot_product_attention(*leaves), leaves, grad_y, expected, "sdpa", 3)


def _multihead_attention(task: Task) -> Candidate:
    x, heads = task.x, task.workload.heads
    module = nn.MultiheadAttention(x.shape[-1], heads, batch_first=True, device=x.device, dtype=x.dtype)

    def formula(x: Tensor, weight: Tensor, bias: Tensor, weight_out: Tensor, bias_out: Tensor) -> Tensor:
        q, k, v = (_heads(t, heads) for t in functional.linear(x, weight, bias).chunk(3, -1))
        return functional.linear(_attention(q, k, v).transpose(1, 2).flatten(2), weight_out, bias_out)

    leaves = (x, module.in_proj_weight, module.in_proj_bias, module.out_proj.weight, module.out_proj.bias)
    expected = reference(formula, leaves, task.grad_y, _precise(x))
    return Candidate(
        lambda: module(x, x, x, need_weights=False)[0], leaves, task.grad_y, expected, "multihead_attention"
    )


def _heads(t: Tensor, heads: int) -> Tensor:
    """Return a view of t, (batch, length, width), as (batch, heads, length, width // heads)."""
    return t.unflatten(-1, (heads, -1)).transpose(1, 2)


def _attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Return softmax(q·kᵀ/√d)·v, computed some rows at a time: all scores of a long sequence have no room."""

    def rows(q: Tensor) -> Tensor:
        return torch.softmax(q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1]), -1) @ v

    block = max(1, 2**25 // k[..., 0].numel())
    return torch.cat([checkpoint(rows, part, use_reentrant=False) for part in q.split(block, -2)], -2)


def _precise(x: Tensor) -> torch.dtype:
    """Return the dtype that standard attention is checked in: its formula takes long in float64."""
    return torch.float64 if x.dtype == torch.float32 else torch.float32


def _layer_norm(task: Task) -> Candidate:
    def forward(x: Tensor) -> Tensor:
        return functional.layer_norm(x, x.shape[-1:])

    expected = reference(forward, (task.x,), task.grad_y)
    return Candidate(lambda: forward(task.x), (task.x,), task.grad_y, expected, "layer_norm")


def _copy(task: Task) -> Candidate:
    """Return the candidate that reads and writes x once, whatever the pass: the roof."""
    target = torch.empty_like(task.x, requires_grad=False)
    return Candidate(lambda: target.copy_(task.x.detach()), (), task.grad_y, (task.x.detach(),), "copy")


def _no_triton(device: str) -> str | None:
    if interpreting():
        return "Triton's interpreter is not timed"
    try:
        daam.backend_for(torch.empty(1, device=device), "triton")
    except RuntimeError as error:
        return str(error)
    return None


def _no_compiler(device: str) -> str | None:
    compilers = (os.environ.get("CXX") or "g++", "clang++")
    if device == "cpu" and not any(map(shutil.which, compilers)):
        return f"torch.compile needs a C++ compiler on a CPU: none of {', '.join(compilers)} found"
    return None


def _no_package(device: str) -> str | None:
    if importlib.util.find_spec("gaussian_adaptive_attention") is None:
        return "gaussian-adaptive-attention is not installed"
    return None


def _alone(workload: Workload) -> bool:
    """Tell whether a workload is no model."""
    return not workload.in_model


def _swept(workload: Workload) -> bool:
    """Tell whether standard attention is timed beside a workload."""
    return workload.family == "sweep"


PROVIDERS = {
    "triton": Provider(functools.partial(_ours, backend="triton"), _no_triton),
    "eager": Provider(functools.partial(_ours, backend="eager"), serves=_alone),
    "compile": Provider(functools.partial(_ours, backend="eager", compiled=True), _no_compiler),
    # these two compute in bf16 where x is: 0.5 on chunks of 3
    "published": Provider(
        _published, _no_package, lambda workload: workload.algorithm == "mixture" and _alone(workload), half=math.inf
    ),
    "formula": Provider(
        functools.partial(_ours, backend=FORMULA), serves=lambda workload: workload.whole and _alone(workload),
        half=math.inf,
    ),
    "compile_formula": Provider(
        functools.partial(_ours, backend=FORMULA, compiled=True), _no_compiler, lambda workload: workload.whole,
        half=math.inf,
    ),
    "sdpa": Provider(_scaled_dot_product_attention, serves=_swept),
    "multihead_attention": Provider(_multihead_attention, serves=_swept),
    "layer_norm": Provider(_layer_norm),
    "copy": Provider(_copy),
}  # fmt: skip
