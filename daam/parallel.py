"""Tensor parallelism over heads, for `torch.distributed.tensor.parallel.parallelize_module`."""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.distributed.tensor import (
    DeviceMesh,
    DTensor,
    Placement,
    Replicate,
    Shard,
    distribute_module,
    distribute_tensor,
)
from torch.distributed.tensor.parallel import ParallelStyle

from daam.modules import Mixture, MultiHeadDAAM


class HeadParallel(ParallelStyle):
    """Share the heads of a `MultiHeadDAAM`, or of a multi-head mixture, among the processes of a mesh.

    Each has the parameters of its heads, DTensors with Shard(0), and the positions of these heads: where heads, and the
    processes heads, divide norm_axis evenly nothing is exchanged but x and y, as their layouts ask for.

    Args:
        input_layouts: placement of x, where it comes as a plain tensor; a plain mask is the whole one.
        output_layouts: placement that y, and the weights, are to have.
        use_local_output: return what this process has of them, as a plain tensor; else DTensors.

    Raises:
        TypeError: the module that it is applied to has no heads.
    """

    def __init__(
        self, *, input_layouts: Placement | None = None, output_layouts: Placement | None = None,
        use_local_output: bool = True,
    ):  # fmt: skip
        self.input_layout, self.output_layout = input_layouts or Replicate(), output_layouts or Replicate()
        self.use_local_output = use_local_output

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        if not isinstance(module, MultiHeadDAAM | Mixture) or module.c.dim() != 2:
            raise TypeError(
                f"module is a {type(module).__name__}, expected a MultiHeadDAAM or a mixture with heads, such as "
                "MultiHeadDensityAdaptiveAttention"
            )
        return distribute_module(
            module, device_mesh, _shard_heads, partial(_prepare, self.input_layout),
            partial(_finish, self.output_layout, self.use_local_output),
        )  # fmt: skip


def _shard_heads(_name: str, module: nn.Module, mesh: DeviceMesh) -> None:
    """Make a module's parameters DTensors that are sharded along their heads."""
    for name, parameter in module.named_parameters(recurse=False):
        sharded = nn.Parameter(distribute_tensor(parameter, mesh, [Shard(0)]), parameter.requires_grad)
        module.register_parameter(name, sharded)


def _prepare(layout: Placement, module: nn.Module, inputs: tuple[Any, ...], mesh: DeviceMesh) -> tuple[Any, ...]:
    """Return a call's inputs with x sharded along norm_axis."""
    if not inputs:
        raise TypeError(f"a {type(module).__name__} with parallel heads was called without x by position: module(x, …)")
    x, *others = inputs
    if not isinstance(x, DTensor):
        x = DTensor.from_local(x, mesh, [layout], run_check=False)
    return x.redistribute(placements=[Shard(module.norm_axis % x.dim())]), *others


def _finish(layout: Placement, local: bool, _module: nn.Module, outputs: Any, _mesh: DeviceMesh) -> Any:
    """Return a call's outputs with a layout, as plain tensors if they are to be local."""

    def place(t: Tensor) -> Tensor:
        t = t.redistribute(placements=[layout])
        return t.to_local() if local else t

    return tuple(map(place, outputs)) if isinstance(outputs, tuple) else place(outputs)
