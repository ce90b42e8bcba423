"""The stabilised mixture as torch modules, with the published names and checkpoints."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor, nn

from daam.backend import Backend
from daam.blocks import MixtureBlock
from daam.functional import stable_mixture_attention
from daam.modules import Mixture
from daam.pieces import Group


class StableMultiHeadDensityAttention(Mixture):
    """Weigh x by the stabilised mixture of densities with heads (arXiv 2602.09040), with the published signature.

    Args:
        norm_axis: the axis that is normalised.
        num_heads: contiguous chunks that norm_axis is cut into, of two positions or more; the last takes the remainder.
        num_gaussians: Gaussians whose product makes a head's weights.
        eps: added to the variance, and to the square of c.
        padding_value: positions of x equal to it have no weight and pass x through, but count in mean and variance;
            None for none.
        backend: "auto", "triton" or "eager"; see `daam.backend_for`.
        group: processes that norm_axis is spread over, see `daam.density_attention`.
        device, dtype: of the parameters.

    Parameters mean_offsets (0) and c (exp of a standard normal) are (num_heads, num_gaussians). Published checkpoints,
    whose `heads.{h}.mean_offsets` and `….c`, also `attention_heads.{h}.…`, and either under `gaatn.`, are
    (num_gaussians,), load; `daam.to_published_state_dict` gives the first.

    Raises:
        ValueError: norm_axis is no int, num_heads or num_gaussians no positive int, eps not finite or negative;
            forward's: see `daam.stable_mixture_attention`.
    """

    _published_lists = ("heads", "attention_heads")
    _published_wrapper = "gaatn"
    _attend = staticmethod(stable_mixture_attention)
    stable = True

    def __init__(
        self, norm_axis: int, num_heads: int, num_gaussians: int, eps: float = 1e-8,
        padding_value: float | None = None, *, backend: Backend = "auto", group: Group = None,
        device: torch.device | str | None = None, dtype: torch.dtype | None = None,
    ):  # fmt: skip
        heads, place = (num_heads,), (backend, group, device, dtype)
        super().__init__(heads, norm_axis, num_heads, num_gaussians, padding_value, 0, eps, *place)

    @staticmethod
    def reset_widths(c: Tensor) -> None:
        nn.init.normal_(c).exp_()


class StableDensityBlock(MixtureBlock):
    """Weigh x by layers of multi-head stabilised mixtures of densities, with the published signature.

    Args:
        norm_axes, num_heads, num_gaussians: of each layer.
        num_layers: their number.
        residual: each layer gives layer(x) + x.
        eps, padding_value, backend, group, device, dtype: of all layers, see `StableMultiHeadDensityAttention`.
        recompute: save x alone for the backward pass, see `DensityBlock`.

    Published checkpoints load, whose `layers.{l}.` is followed by a layer's keys, and under `gaatn.` too.

    Raises:
        TypeError: norm_axes, num_heads or num_gaussians is no list.
        ValueError: a length is not num_layers, or a layer's arguments do not fit.
    """

    _published_wrapper = "gaatn"

    def __init__(
        self, norm_axes: Sequence[int], num_heads: Sequence[int], num_gaussians: Sequence[int], num_layers: int,
        eps: float = 1e-8, residual: bool = True, padding_value: float | None = None, *, backend: Backend = "auto",
        recompute: bool | None = None, group: Group = None, device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):  # fmt: skip
        layer = partial(
            StableMultiHeadDensityAttention, eps=eps, padding_value=padding_value, backend=backend, group=group,
            device=device, dtype=dtype,
        )  # fmt: skip
        super().__init__(layer, norm_axes, num_heads, num_gaussians, num_layers, residual, recompute)
