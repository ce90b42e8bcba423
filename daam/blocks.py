"""Blocks of layers as torch modules, with the published names and checkpoints."""

from __future__ import annotations

from collections.abc import Callable, Sequence, Sized
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Proxy
from torch.nn.modules.module import _has_any_global_hook

from daam.backend import Backend
from daam.block import density_block, fusion_for
from daam.checkpoints import Published
from daam.checks import check_recompute, check_tensor, has_hooks
from daam.leaf import call_leaf
from daam.modules import Mixture, MultiHeadDensityAdaptiveAttention, reset
from daam.pieces import Group
from daam.ways import WAYS


class MixtureBlock(Published):
    """Weigh x by layers of multi-head mixtures of densities: modules of `layer(norm_axis, num_heads, num_gaussians)`.

    residual: each layer gives layer(x) + x. recompute: as `daam.density_block` has it.
    """

    def __init__(
        self, layer: Callable[[int, int, int], Mixture], norm_axes: Sequence[int], num_heads: Sequence[int],
        num_gaussians: Sequence[int], num_layers: int, residual: bool, recompute: bool | None,
    ):  # fmt: skip
        super().__init__()
        for name, given in {"norm_axes": norm_axes, "num_heads": num_heads, "num_gaussians": num_gaussians}.items():
            if not isinstance(given, Sized):
                raise TypeError(f"{name} is {given!r}, expected a list of num_layers, {num_layers}, ints")
            if len(given) != num_layers:
                raise ValueError(f"{name} has {len(given)} entries, expected num_layers, {num_layers}")
        check_recompute(recompute)
        self.residual, self.recompute = residual, recompute
        self.layers = nn.ModuleList(map(layer, norm_axes, num_heads, num_gaussians))
        if len(set(norm_axes)) > 1 and any(one.group is not None for one in self.layers):
            raise ValueError(
                f"group is given and norm_axes is {list(norm_axes)}, expected one axis for all layers: set the group "
                "of each layer whose axis is spread out, as in block.layers[0].group = group"
            )

    def reset_parameters(self) -> None:
        reset(self.layers)

    def forward(
        self, x: Tensor, return_attention_details: bool = False, *, mask: Tensor | None = None
    ) -> Tensor | tuple[Tensor, dict[str, Tensor]]:
        """Return y, or (y, {"layer_0": weights, …}), each like x, the weights detached as published.

        mask: bool, of x's shape up to the first normalised axis at most, True where x is valid, along all further axes.
        """
        if isinstance(x, Proxy):
            return call_leaf(self, x, x, return_attention_details, mask=mask)
        check_tensor("x", x)
        if mask is not None:
            check_tensor("mask", mask)
        weights: list[Tensor] = []
        for run in self._find_runs(x):
            axis = run[0].norm_axis
            run_mask = _expand_mask(mask, x, axis)
            if len(run) == 1:  # by itself, with its hooks
                out = run[0](x, return_attention_details, mask=run_mask, residual=self.residual)
                x, found = (out[0], out[1:]) if return_attention_details else (out, ())
            else:
                out = density_block(x, **self._describe(run), mask=run_mask, return_weights=return_attention_details)
                x, found = out if return_attention_details else (out, ())
            weights += found
        if not return_attention_details:
            return x
        return x, {f"layer_{i}": one.detach() for i, one in enumerate(weights)}

    def fusion_for(self, x: Tensor, *, mask: Tensor | None = None) -> tuple[str, str]:
        """Return which way a call goes, "fused", "recomputed" or "layers", and the reason, as `daam.fusion_for` does.

        Where layers differ in axis or heads, have hooks, or are no layers of ours, each goes by itself: the way is that
        of those which are fused least, and the reason names all.
        """
        check_tensor("x", x)
        if mask is not None:
            check_tensor("mask", mask)
        ways = [] if len(self.layers) else [("layers", "there is no layer")]
        for run in self._find_runs(x):
            described = self._describe(run)
            for name in ("residual", "eps", "padding_value", "stable"):
                del described[name]
            ways.append(fusion_for(x, **described, mask=_expand_mask(mask, x, run[0].norm_axis)))
        name = max((name for name, _ in ways), key=WAYS.index)
        return name, "; ".join(dict.fromkeys(reason for _, reason in ways))

    def _find_runs(self, x: Tensor) -> list[list[Mixture]]:
        """Return the layers, those together which a function may take at once."""
        runs: list[list[Mixture]] = []
        last, hooked = None, _has_any_global_hook()
        for layer in self.layers:
            key = None if hooked else _find_key(layer, x.dim())
            if key is None or key != last:
                runs.append([])
            runs[-1].append(layer)
            last = key
        return runs

    def _describe(self, run: list[Mixture]) -> dict[str, Any]:
        """Return the arguments of `density_block` for some layers that are alike."""
        first = run[0]
        # where they are found by name a module looks among its parameters last
        mean_offsets, c = ([layer._parameters.get(name) for layer in run] for name in ("mean_offsets", "c"))
        if any(p is None for p in (*mean_offsets, *c)):  # parametrised
            mean_offsets, c = [layer.mean_offsets for layer in run], [layer.c for layer in run]
        return {
            "mean_offsets": mean_offsets, "c": c,
            "norm_axis": first.norm_axis, "eps": first.eps, "padding_value": first.padding_value,
            "residual": self.residual, "stable": first.stable, "recompute": self.recompute, "backend": first.backend,
            "group": first.group,
        }  # fmt: skip

    def extra_repr(self) -> str:
        recompute = "" if self.recompute is None else f", recompute={self.recompute}"
        return f"residual={self.residual}{recompute}"


class DensityBlock(MixtureBlock):
    """Weigh x by layers of multi-head mixtures of densities, x = layer(x) + x each, with the published signature.

    Args:
        norm_axes, num_heads, num_gaussians: of each layer.
        num_layers: their number.
        padding_value, eps, backend, group, device, dtype: of all layers, see `MultiHeadDensityAdaptiveAttention`.
        recompute: save x alone for the backward pass, see `daam.density_block`, which runs of layers of one axis and
            as many heads are; None: where that is expected to be faster.

    Raises:
        TypeError: norm_axes, num_heads or num_gaussians is no list.
        ValueError: a length is not num_layers, or a layer's arguments do not fit.
    """

    def __init__(
        self, norm_axes: Sequence[int], num_heads: Sequence[int], num_gaussians: Sequence[int], num_layers: int,
        padding_value: float | None = None, eps: float = 1e-8, *, backend: Backend = "auto",
        recompute: bool | None = None, group: Group = None, device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):  # fmt: skip
        layer = partial(
            MultiHeadDensityAdaptiveAttention, padding_value=padding_value, eps=eps, backend=backend, group=group,
            device=device, dtype=dtype,
        )  # fmt: skip
        super().__init__(layer, norm_axes, num_heads, num_gaussians, num_layers, True, recompute)


GaussianBlock = DensityBlock


def _find_key(layer: nn.Module, rank: int) -> tuple[Any, ...] | None:
    """Return what layers share that one function may take at once; None of one that must be called itself, since it is
    no layer of ours, compiled by itself, or a call of it does more.
    """
    if not isinstance(layer, Mixture) or type(layer).forward is not Mixture.forward or "forward" in layer.__dict__:
        return None
    if has_hooks(layer) or layer._compiled_call_impl is not None or not -rank <= layer.norm_axis < rank:
        return None
    return (
        layer.norm_axis % rank,
        layer.num_heads,
        layer.eps,
        layer.padding_value,
        layer.backend,
        layer.stable,
        layer.group,
    )


def _expand_mask(mask: Tensor | None, x: Tensor, norm_axis: int) -> Tensor | None:
    """Return a mask of x's first dimensions expanded up to norm_axis; as it came if it does not fit, for an error."""
    if mask is None or x.dim() == 0 or mask.shape != x.shape[: mask.dim()]:
        return mask
    rank = max(mask.dim(), norm_axis % x.dim() + 1)
    return mask.reshape(*mask.shape, *[1] * (rank - mask.dim())).expand(x.shape[:rank])
