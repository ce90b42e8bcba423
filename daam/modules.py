"""The layers as torch modules, with the published names and checkpoints."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.fx import Proxy

from daam import gated
from daam.backend import Backend, backend_for
from daam.checkpoints import Published, share_as
from daam.checks import check_dtype, check_eps, check_mask, check_positive, check_tensor
from daam.dtensors import are_dtensors
from daam.functional import density_attention, density_gate, mixture_attention
from daam.leaf import call_leaf
from daam.ops import _forward_mode, _transformed
from daam.pieces import AxisPieces, Group, pieces_of

INITIAL_ALPHA = 0.05  # of a gate


class MultiHeadDAAM(Published):
    """Weigh x by density attention with heads (DAAMv1 has 8, DAAMv2 one), learnable mean offset and scaled variance.

    Args:
        num_features: size of x's last axis.
        num_heads: contiguous chunks that norm_axis is cut into; they must divide it. Several heads cut a padded axis
            with its padding: give every batch one padded length, or use one head.
        norm_axis: the axis that is normalised; -1 where it is the last one, since the parameters' shape depends on it.
        c: initial value of every c; mean_offset begins at 0. A Gaussian has c > 0: nothing keeps training from crossing
            0, beyond which weights grow with distance, but a parametrisation of five lines does, with which published
            checkpoints load as before: see "A c above 0" in daam/MIGRATING.md.
        eps: added to the variance.
        residual: return x·weights + x.
        backend: "auto", "triton" or "eager"; see `daam.backend_for`.
        group: processes that norm_axis is spread over, see `daam.density_attention`.
        device, dtype: of the parameters.

    Parameters mean_offset and c have shape (num_heads, num_features), or (num_heads, num_features // num_heads) where
    norm_axis is -1. Checkpoints of the published code (`daams.{h}.c`, `daams.{h}.mean_offset`, also `gcts.{h}.…`, each
    (1, num_features)) load as they are; `daam.to_published_state_dict` gives them back.

    Raises:
        ValueError: num_features or num_heads does not fit; forward's errors are those of `daam.density_attention`.
    """

    mean_offset: Tensor
    c: Tensor
    group: AxisPieces | None = None  # of what was pickled before there were groups
    _published_parameters = ("mean_offset", "c")
    _published_lists = ("daams", "gcts")
    _published_keep_dim = True

    def __init__(
        self, num_features: int, num_heads: int = 8, *, norm_axis: int = 1, c: float = 2.0, eps: float = 1e-5,
        residual: bool = False, backend: Backend = "auto", group: Group = None,
        device: torch.device | str | None = None, dtype: torch.dtype | None = None,
    ):  # fmt: skip
        super().__init__()
        if num_features < 1 or num_heads < 1:
            raise ValueError(f"num_features is {num_features} and num_heads is {num_heads}, expected 1 or more of both")
        if norm_axis == -1 and num_features % num_heads:
            raise ValueError(
                f"num_heads is {num_heads}, expected a divisor of num_features ({num_features}) where norm_axis is -1"
            )
        self.num_features, self.num_heads, self.norm_axis = num_features, num_heads, norm_axis
        self.initial_c, self.eps, self.residual, self.backend = c, eps, residual, backend
        self.group = pieces_of(group)
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
        """Return y, or (y, weights), each like x, of `daam.density_attention`.

        mask: bool, x.shape[:norm_axis + 1], True where x is valid.
        """
        if isinstance(x, Proxy):
            return call_leaf(self, x, x, mask, return_weights)
        check_tensor("x", x)
        if x.dim() > 1 and x.shape[-1] != self.num_features:
            raise ValueError(
                f"x has {x.shape[-1]} features (shape {tuple(x.shape)}), expected num_features {self.num_features}"
            )
        return density_attention(
            x, self.mean_offset, self.c, norm_axis=self.norm_axis, eps=self.eps, mask=mask, residual=self.residual,
            return_weights=return_weights, backend=self.backend, group=self.group,
        )  # fmt: skip

    def extra_repr(self) -> str:
        return (
            f"{self.num_features}, num_heads={self.num_heads}, norm_axis={self.norm_axis}, c={self.initial_c}, "
            f"eps={self.eps}, residual={self.residual}, backend={self.backend!r}{describe_group(self.group)}"
        )


def describe_group(group: AxisPieces | None) -> str:
    """Return the end of what a module shows of itself."""
    return "" if group is None else f", group={group}"


def reset(module: nn.Module) -> None:
    """Reset a module by its `reset_parameters`, or, where it only holds others, these, in order."""
    if hasattr(module, "reset_parameters"):
        module.reset_parameters()
    else:
        for child in module.children():
            reset(child)


class Mixture(Published):
    """Weigh x by a mixture of densities with parameters mean_offsets and c of shape (*heads, num_gaussians).

    A class says by which function, and draws c in `reset_widths`.
    """

    mean_offsets: Tensor
    c: Tensor
    group: AxisPieces | None = None
    _published_parameters = ("mean_offsets", "c")
    _attend = staticmethod(mixture_attention)
    stable = False

    def __init__(
        self, heads: tuple[int, ...], norm_axis: int, num_heads: int, num_gaussians: int, padding_value: float | None,
        mean_offset_init: float, eps: float, backend: Backend, group: Group, device: torch.device | str | None,
        dtype: torch.dtype | None,
    ):  # fmt: skip
        super().__init__()
        if isinstance(norm_axis, bool) or not isinstance(norm_axis, int):
            raise ValueError(f"norm_axis is {norm_axis!r}, expected an int")
        check_positive(num_heads=num_heads, num_gaussians=num_gaussians)
        check_eps(eps)
        self.norm_axis, self.num_heads, self.num_gaussians = norm_axis, num_heads, num_gaussians
        self.padding_value, self.mean_offset_init, self.eps = padding_value, mean_offset_init, eps
        self.backend, self.group = backend, pieces_of(group)
        self.mean_offsets = nn.Parameter(torch.empty(*heads, num_gaussians, device=device, dtype=dtype))
        self.c = nn.Parameter(torch.empty(*heads, num_gaussians, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Fill both parameters with initial values; of DTensors, each process its share of what the first one draws."""
        nn.init.constant_(self.mean_offsets, self.mean_offset_init)
        with torch.no_grad():
            c = torch.empty(self.c.shape, device=self.c.device, dtype=self.c.dtype) if are_dtensors(self.c) else self.c
            for head in c.view(-1, self.num_gaussians):  # head by head: the published numbers for a seed
                self.reset_widths(head)
            if are_dtensors(self.c) and not c.is_meta:
                self.c.copy_(share_as(self.c, c, source=0))

    @staticmethod
    def reset_widths(c: Tensor) -> None:
        """Fill the c of a head, (num_gaussians,), with its initial values."""
        nn.init.normal_(c)

    def forward(
        self, x: Tensor, return_attention_details: bool = False, *, mask: Tensor | None = None, residual: bool = False
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Return y, or (y, weights), each like x; weights are detached as published, unlike the function's.

        mask: bool, x.shape[:norm_axis + 1], True where x is valid, not with padding_value. residual: add x to y.
        """
        if isinstance(x, Proxy):
            return call_leaf(self, x, x, return_attention_details, mask=mask, residual=residual)
        mean_offsets, c = (p.reshape(-1, self.num_gaussians) for p in (self.mean_offsets, self.c))
        out = self._attend(
            x, mean_offsets, c, norm_axis=self.norm_axis, eps=self.eps, padding_value=self.padding_value, mask=mask,
            residual=residual, return_weights=return_attention_details, backend=self.backend, group=self.group,
        )  # fmt: skip
        return (out[0], out[1].detach()) if return_attention_details else out

    def extra_repr(self) -> str:
        return (
            f"{self.norm_axis}, num_heads={self.num_heads}, num_gaussians={self.num_gaussians}, "
            f"padding_value={self.padding_value}, eps={self.eps}, backend={self.backend!r}{describe_group(self.group)}"
        )


class DensityAdaptiveAttention(Mixture):
    """Weigh x by one head of a mixture of densities (arXiv 2401.11143, Algorithm 2), with the published signature.

    Args:
        norm_axis: the axis that is normalised, of two positions or more.
        num_heads: kept as published; the module is one head whatever it is.
        num_gaussians: Gaussians whose product makes the weights.
        padding_value: positions of x equal to it count as zeros in mean and variance and pass x through; None for none.
        mean_offset_init: initial value of mean_offsets, which the published code takes and ignores.
        eps: added to the variance, and the least sum that weights are divided by.
        backend: "auto", "triton" or "eager"; see `daam.backend_for`.
        group: processes that norm_axis is spread over, see `daam.density_attention`.
        device, dtype: of the parameters.

    Parameters mean_offsets and c (standard normal) have shape (num_gaussians,).

    Raises:
        ValueError: norm_axis is no int, num_heads or num_gaussians no positive int, eps not finite or negative;
            forward's: see `mixture_attention`.
    """

    def __init__(
        self, norm_axis: int, num_heads: int, num_gaussians: int, padding_value: float | None,
        mean_offset_init: float = 0, eps: float = 1e-8, *, backend: Backend = "auto", group: Group = None,
        device: torch.device | str | None = None, dtype: torch.dtype | None = None,
    ):  # fmt: skip
        super().__init__(
            (), norm_axis, num_heads, num_gaussians, padding_value, mean_offset_init, eps, backend, group, device, dtype
        )


class MultiHeadDensityAdaptiveAttention(Mixture):
    """Weigh x by a mixture of densities with heads (arXiv 2401.11143, Algorithm 2), with the published signature.

    Args:
        norm_axis: the axis that is normalised.
        num_heads: contiguous chunks that norm_axis is cut into, of two positions or more; the last takes the remainder.
        num_gaussians: Gaussians whose product makes a head's weights.
        padding_value: positions of x equal to it count as zeros in mean and variance and pass x through; None for none.
        eps: added to the variance, and the least sum that weights are divided by. Published heads always use 1e-8.
        backend: "auto", "triton" or "eager"; see `daam.backend_for`.
        group: processes that norm_axis is spread over, see `daam.density_attention`.
        device, dtype: of the parameters.

    Parameters mean_offsets (0) and c (standard normal) are (num_heads, num_gaussians). Published checkpoints, whose
    `attention_heads.{h}.mean_offsets` and `….c` are (num_gaussians,), load; `daam.to_published_state_dict` gives them.

    Raises:
        ValueError: norm_axis is no int, num_heads or num_gaussians no positive int, eps not finite or negative;
            forward's: see `mixture_attention`.
    """

    _published_lists = ("attention_heads",)

    def __init__(
        self, norm_axis: int, num_heads: int, num_gaussians: int, padding_value: float | None = None,
        eps: float = 1e-8, *, backend: Backend = "auto", group: Group = None, device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):  # fmt: skip
        heads, place = (num_heads,), (backend, group, device, dtype)
        super().__init__(heads, norm_axis, num_heads, num_gaussians, padding_value, 0, eps, *place)


class DensityGate(Published):
    """Gate a sequence by the density of one of its projections (the JEPA tokenizer, arXiv 2512.07168):
    x·(1 + alpha·weights), where the weights are `daam.density_gate`'s of a 1x1 convolution of x, over the last axis.

    Args:
        in_ch: channels of x.
        num_gaussians: Gaussians whose mean makes the weights.
        cap: kept as published, where nothing uses it.
        backend: "auto", "triton" or "eager"; see `daam.backend_for`.
        group: processes that the length is spread over, see `daam.density_attention`.
        device, dtype: of the parameters.

    Parameters, under their published names: to_attn.weight, to_attn.bias, alpha (0.05), gaa.mean_offsets (0),
    gaa.log_sigma (log 0.5), the last two of shape (num_gaussians,). alpha is (1,), which FSDP can shard; a published
    one, (), loads, and `daam.to_published_state_dict` gives it.

    On the Triton backend the convolution, the weights and the product are fused: x moves three times forward and five
    times backward, of any strides, and the projection is not rounded to x's dtype. Beside x the backward pass keeps two
    numbers a position. Where to_attn or gaa has hooks, or is replaced, it is called; `fusion_for` tells.

    Raises:
        ValueError: in_ch or num_gaussians is no positive int.
    """

    group: AxisPieces | None = None
    _published_parameters = _published_scalars = ("alpha",)
    _published_layers = ("to_attn",)

    def __init__(
        self, in_ch: int, num_gaussians: int = 4, cap: float = 0.2, *, backend: Backend = "auto", group: Group = None,
        device: torch.device | str | None = None, dtype: torch.dtype | None = None,
    ):  # fmt: skip
        super().__init__()
        check_positive(in_ch=in_ch, num_gaussians=num_gaussians)
        self.cap, self.backend, self.group = cap, backend, pieces_of(group)
        self.to_attn = nn.Conv1d(in_ch, 1, 1, device=device, dtype=dtype)
        self.gaa = _Gaussians(num_gaussians, device, dtype)
        self.alpha = nn.Parameter(torch.full((1,), INITIAL_ALPHA, device=device, dtype=dtype))

    def reset_parameters(self) -> None:
        """Reset alpha, the convolution and the Gaussians."""
        for module in (self.to_attn, self.gaa):
            reset(module)
        nn.init.constant_(self.alpha, INITIAL_ALPHA)

    def forward(self, x: Tensor, *, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return (y, gate) of shapes (batch, in_ch, length) and (batch, 1, length); x may be without a batch.

        x: of the convolution's dtype, or under autocast. mask: bool, (batch, length), True where x is valid:
        elsewhere the gate is 0 and y is x.
        """
        if isinstance(x, Proxy):
            return call_leaf(self, x, x, mask=mask)
        check_tensor("x", x)
        check_dtype(x, self.to_attn.weight, "to_attn")
        channels = self.to_attn.in_channels
        if x.dim() not in (2, 3) or x.shape[-2] != channels:
            raise ValueError(f"x has shape {tuple(x.shape)}, expected (batch, {channels}, length) or without batch")
        if mask is not None:
            check_mask(x.select(-2, 0), mask, x.dim() - 2)
        if self.fusion_for(x, mask)[0] == "fused":
            return gated.gate_channels(x, *self._inputs().values(), mask, gated.find_dtype(x))
        spread = {} if self.group is None else {"group": self.group}  # one that replaces gaa need not know it
        if mask is None:
            gate = self.gaa(self.to_attn(x), backend=self.backend, **spread)
            return x * (1 + self._factor() * gate), gate
        mask = mask.unsqueeze(-2)
        valid = x.masked_fill(~mask, 0)  # what stands elsewhere would reach the gradients of the convolution and alpha
        gate = self.gaa(self.to_attn(valid), mask, self.backend, **spread)
        return torch.where(mask, valid * (1 + self._factor() * gate), x), gate

    def _factor(self) -> Tensor:
        """Return alpha without a dimension, which would promote a gate of another dtype."""
        return self.alpha.squeeze(0)

    def fusion_for(self, x: Tensor, mask: Tensor | None = None) -> tuple[str, str]:
        """Return ("fused" or "formula", reason), the reason in words: whether a call on x launches the fused kernels
        or takes the convolution, the weights and the product one after the other. The mask never matters.

        Raises:
            TypeError: x is no dense tensor.
            ValueError, RuntimeError: as `daam.backend_for` does.
        """
        check_tensor("x", x)
        backend, reason = backend_for(x, self.backend)
        if backend != "triton":
            return "formula", f"the backend is eager: {reason}"
        if self.group is not None:
            return "formula", "the length is spread over processes"
        if not torch.compiler.is_compiling() and (_transformed() or _forward_mode()):
            return "formula", "a transform, such as vmap or jvp, composes its parts"
        problem = gated.find_override({"to_attn": (self.to_attn, nn.Conv1d), "gaa": (self.gaa, _Gaussians)})
        problem = problem or gated.find_obstacle(x, self.to_attn, self._inputs())
        return ("fused", reason) if problem is None else ("formula", problem)

    def _inputs(self) -> dict[str, Tensor | None]:
        """Return the parameters of a call, by the names of `gated`."""
        conv, gaa = self.to_attn, self.gaa
        parameters = {"alpha": self.alpha, "mean_offsets": gaa.mean_offsets, "log_sigma": gaa.log_sigma}
        return {"weight": conv.weight, "bias": conv.bias, **parameters}

    def extra_repr(self) -> str:
        return f"cap={self.cap}, backend={self.backend!r}{describe_group(self.group)}"


class _Gaussians(Published):
    """Hold the parameters of a `DensityGate`'s weights, under the published name of their module."""

    _published_parameters = ("mean_offsets", "log_sigma")

    def __init__(self, num_gaussians: int, device: torch.device | str | None, dtype: torch.dtype | None):
        super().__init__()
        self.mean_offsets = nn.Parameter(torch.empty(num_gaussians, device=device, dtype=dtype))
        self.log_sigma = nn.Parameter(torch.empty(num_gaussians, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.mean_offsets)
        nn.init.constant_(self.log_sigma, math.log(0.5))

    def forward(
        self, x: Tensor, mask: Tensor | None = None, backend: Backend = "auto", group: Group = None
    ) -> Tensor:  # fmt: skip
        given = {"mask": mask, "return_weights": True, "backend": backend, "group": group}
        return density_gate(x, self.mean_offsets, self.log_sigma, **given)[1]

    def extra_repr(self) -> str:
        return f"num_gaussians={len(self.mean_offsets)}"


GaussianAdaptiveAttention = DensityAdaptiveAttention
MultiHeadGaussianAdaptiveAttention = MultiHeadDensityAdaptiveAttention
