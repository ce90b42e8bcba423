"""Calls on DTensors: each process attends to what it holds, and results are DTensors with x's placements.

Where x is sharded along the normalised axis that axis is spread over the processes of that dimension of the mesh
(`sharded.py`); all other shards are attended to as they are. Parameters may be plain tensors, the same in all
processes, or DTensors with any placements.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.parameter import Parameter

from daam.checks import check_floating, check_mask, check_x
from daam.pieces import AxisPieces


def are_dtensors(*tensors: Tensor | None) -> bool:
    """Tell whether one of some tensors is a DTensor."""
    for t in tensors:  # noqa: SIM110 (asked in each call, of plain tensors too: any() takes twice as long)
        if type(t) is not Tensor and type(t) is not Parameter and hasattr(t, "device_mesh"):
            return True
    return False


def attend_shards(
    function: Callable, x: Tensor, params: dict[str, Tensor], mask: Tensor | None, norm_axis: int, varies: bool,
    group: object, **options: Any,
) -> Tensor | tuple[Tensor, Tensor]:  # fmt: skip
    """Return what a public function does, of DTensors. varies: whether parameters may follow x's last axis.

    Raises:
        TypeError: x is no DTensor, but a parameter or the mask is. ValueError: group is given; what function raises.
    """
    from torch.distributed.tensor import DTensor, Replicate, Shard  # slow, and done where there is a DTensor

    if not isinstance(x, DTensor):
        named = next(name for name, t in {**params, "mask": mask}.items() if are_dtensors(t))
        raise TypeError(
            f"x is a plain Tensor and {named} a DTensor, expected both to be one: "
            "torch.distributed.tensor.DTensor.from_local says what x is a shard of"
        )
    if group is not None:
        raise ValueError("group is given beside a DTensor, expected None: the DTensor's mesh says who has which piece")
    axis = check_x(x, norm_axis)
    check_floating(params)
    if mask is not None:
        check_mask(x, mask, axis)
    mesh, placements = x.device_mesh, _keep_shards(x.placements, axis)
    x = x.redistribute(placements=placements)
    along = next((dim for dim, one in enumerate(placements) if one == Shard(axis)), None)
    features = Shard(x.dim() - 1) if varies and next(iter(params.values())).shape[-1] != 1 else None
    whole = along is not None and _holds_whole_heads(x, list(params.values()), axis, along)
    wanted = [
        Shard(1) if one == features != Shard(axis) else Shard(0) if whole and dim == along else Replicate()
        for dim, one in enumerate(placements)
    ]
    local = [_localise(p, mesh, wanted, placements) for p in params.values()]
    if mask is not None:
        mask = _as_dtensor(mask, mesh)
        kept = [one if isinstance(one, Shard) and one.dim < mask.dim() else Replicate() for one in placements]
        mask = mask.redistribute(placements=kept).to_local()
    if along is not None and not whole:
        options["group"] = _pieces(x, axis, along)
    found = function(x.to_local(grad_placements=placements), *local, norm_axis=axis, mask=mask, **options)
    outputs = [_globalise(t, x, placements) for t in (found if isinstance(found, tuple) else (found,))]
    return tuple(outputs) if isinstance(found, tuple) else outputs[0]


def _keep_shards(placements: Sequence, axis: int) -> list:
    """Return the placements of x that a call can work on: plain shards, of the axis on one dimension of the mesh."""
    from torch.distributed.tensor import Replicate, Shard

    kept = []
    for one in placements:
        doubled = one == Shard(axis) and one in kept
        kept.append(one if type(one) is Shard and not doubled else Replicate())
    return kept


def _holds_whole_heads(x: Tensor, params: list[Tensor], axis: int, along: int) -> bool:
    """Tell whether every process has all of some heads along the axis, and their parameters."""
    from torch.distributed.tensor import Shard

    size, heads, n = x.shape[axis], params[0].shape[0], x.device_mesh.size(along)
    sharded = all(are_dtensors(p) and p.device_mesh == x.device_mesh for p in params)
    sharded = sharded and all(p.placements[along] == Shard(0) for p in params)
    return sharded and heads % n == 0 and size % heads == 0


def _as_dtensor(t: Tensor, mesh: Any) -> Tensor:
    """Return a tensor as a DTensor on a mesh, one on another mesh or none being the same in all processes of it."""
    from torch.distributed.tensor import DTensor, Replicate

    if are_dtensors(t) and t.device_mesh == mesh:
        return t
    t = t.full_tensor() if are_dtensors(t) else t
    return DTensor.from_local(t, mesh, [Replicate()] * mesh.ndim, run_check=False)


def _localise(p: Tensor, mesh: Any, wanted: Sequence, placements: Sequence) -> Tensor:
    """Return what a process has of a parameter with the placements that are wanted of it, x having some: where it is
    the same in all, and x is not, what each finds of its gradient is a part of a sum.
    """
    from torch.distributed.tensor import Partial, Replicate

    pairs = zip(wanted, placements, strict=True)
    grads = [Partial() if one == Replicate() and of_x != Replicate() else one for one, of_x in pairs]
    return _as_dtensor(p, mesh).redistribute(placements=wanted).to_local(grad_placements=grads)


def _pieces(x: Tensor, axis: int, along: int) -> AxisPieces:
    """Return the pieces of an axis that a DTensor is sharded along: as torch.chunk cuts them."""
    n, size = x.device_mesh.size(along), x.shape[axis]
    each = -(-size // n)
    sizes = tuple(max(0, min(each, size - each * rank)) for rank in range(n))
    return AxisPieces(x.device_mesh.get_group(along), sizes)


def _globalise(t: Tensor, x: Tensor, placements: Sequence) -> Tensor:
    """Return a result of x's shape as a DTensor."""
    from torch.distributed.tensor import DTensor

    strides = torch.empty(x.shape, device="meta").stride() if t.is_contiguous() else x.stride()
    return DTensor.from_local(t, x.device_mesh, placements, run_check=False, shape=x.shape, stride=strides)
