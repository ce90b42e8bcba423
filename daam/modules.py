"""The layers as torch modules, with the published names and checkpoints."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from daam.checkpoints import stack_heads
from daam.functional import density_attention


class MultiHeadDAAM(nn.Module):
    """Multi-head density attention (DAAMv1 has 8 heads, DAAMv2 one) with learnable mean offset and scaled variance.

    Args:
        num_features: size of x's last axis.
        num_heads: contiguous chunks that norm_axis is cut into; they must divide it. Several heads cut a padded axis
            with its padding: give every batch one padded length, or use one head.
        norm_axis: the axis that is normalised; -1 where it is the last one, since the parameters' shape depends on it.
        c: initial value of every c; mean_offset begins at 0. A Gaussian has c > 0: nothing keeps training from crossing
            0, beyond which weights grow with distance.
        eps: added to the variance.
        residual: return x·weights + x.
        backend: "auto", "triton" or "eager"; see `daam.backend_for`.
        device, dtype: of the parameters.

    Parameters mean_offset and c have shape (num_heads, num_features), or (num_heads, num_features // num_heads) where
    norm_axis is -1. Checkpoints of the published code (`daams.{h}.c`, `daams.{h}.mean_offset`, also `gcts.{h}.…`, each
    (1, num_features)) load as they are; `daam.to_published_state_dict` gives them back.

    Raises:
        ValueError: num_features or num_heads does not fit; forward's errors are those of `daam.density_attention`.
    """

    mean_offset: Tensor
    c: Tensor

    def __init__(
        self,
        num_features: int,
        num_heads: int = 8,
        *,
        norm_axis: int = 1,
        c: float = 2.0,
        eps: float = 1e-5,
        residual: bool = False,
        backend: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        if num_features < 1 or num_heads < 1:
            raise ValueError(f"num_features is {num_features} and num_heads is {num_heads}, expected 1 or more of both")
        if norm_axis == -1 and num_features % num_heads:
            raise ValueError(
                f"num_heads is {num_heads}, expected a divisor of num_features ({num_features}) where norm_axis is -1"
            )
        self.num_features, self.num_heads, self.norm_axis = num_features, num_heads, norm_axis
        self.initial_c, self.eps, self.residual, self.backend = c, eps, residual, backend
        shape = (num_heads, num_features // num_heads if norm_axis == -1 else num_features)
        self.mean_offset = nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
        self.c = nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.mean_offset)
        nn.init.constant_(self.c, self.initial_c)

    def forward(
        self, x: Tensor, mask: Tensor | None = None, return_weights: bool = False
    ) -> Tensor | tuple[Tensor, Tensor]:
        """y, or (y, weights), each like x. mask: bool, x.shape[:norm_axis + 1], True where x is valid. See
        `daam.density_attention`.
        """
        if isinstance(x, Tensor) and x.dim() > 1 and x.shape[-1] != self.num_features:
            raise ValueError(
                f"x has {x.shape[-1]} features (shape {tuple(x.shape)}), expected num_features {self.num_features}"
            )
        return density_attention(
            x, self.mean_offset, self.c, norm_axis=self.norm_axis, eps=self.eps, mask=mask, residual=self.residual,
            return_weights=return_weights, backend=self.backend,
        )  # fmt: skip

    def extra_repr(self) -> str:
        return (
            f"{self.num_features}, num_heads={self.num_heads}, norm_axis={self.norm_axis}, c={self.initial_c}, "
            f"eps={self.eps}, residual={self.residual}, backend={self.backend!r}"
        )

    def _load_from_state_dict(self, state_dict, prefix, metadata, strict, missing, unexpected, error_msgs):
        stacked = {"mean_offset": self.mean_offset, "c": self.c}
        stack_heads(state_dict, prefix, stacked, ("daams", "gcts"), error_msgs)
        super()._load_from_state_dict(state_dict, prefix, metadata, strict, missing, unexpected, error_msgs)

    def published_state_dict(self) -> tuple[dict[str, Tensor], tuple[str, ...]]:
        """`daams.{h}.mean_offset` and `daams.{h}.c`, each (1, P), and the names of the parameters they stand for."""
        own = {"mean_offset": self.mean_offset, "c": self.c}
        heads = range(self.num_heads)
        return {f"daams.{h}.{name}": p[h : h + 1].detach() for h in heads for name, p in own.items()}, tuple(own)
