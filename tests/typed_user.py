"""A user's script that type checkers accept, line by line, and that runs: tests/test_types.py does both.

Lines that a checker must refuse have a comment that ignores its error, and none may be there in vain.
"""

import torch
from torch import Tensor

import daam

x, p = torch.randn(2, 6, 4), torch.rand(3, 4) + 0.5
total: Tensor = daam.density_attention(x, p, p).sum()
y: Tensor = daam.density_attention(x, p, p, norm_axis=1, eps=1e-5, mask=None, residual=True, backend="eager")
y, weights = daam.density_attention(x, p, p, return_weights=True)
y = daam.mixture_attention(x, p, p, padding_value=0, return_weights=False) * weights
y, weights = daam.mixture_attention(x, p, p, return_weights=True)
y = daam.stable_mixture_attention(x, p, p, norm_axis=1).exp()
y, weights = daam.stable_mixture_attention(x, p, p, norm_axis=1, return_weights=True)
y = daam.density_gate(x, p, p, norm_axis=1).exp()
y, weights = daam.density_gate(x, p, p, norm_axis=1, return_weights=True)
y = daam.density_block(x, [p, p], [p, p], stable=True, recompute=False).exp()
y, of_layers = daam.density_block(x, [p, p], [p, p], return_weights=True)
names: tuple[Tensor, ...] = of_layers
y = daam.MultiHeadDAAM(4, 3, backend="eager")(x)
flag = bool(x.numel())
either = daam.density_attention(x, p, p, return_weights=flag)
y = either[0] if isinstance(either, tuple) else either
with daam.use_backend("eager"):
    backend, reason = daam.backend_for(x, "auto")
    y = daam.density_attention(x, p, p, backend=backend) + len(reason)


def refused() -> None:
    """Call what is an error, in vain if a checker lets it pass; nobody calls this."""
    daam.density_attention(x, p, p, return_weights=True).sum()  # type: ignore[attr-defined]
    daam.density_attention(x, p, p, backend="gpu")  # type: ignore[call-overload]
    daam.density_attention(x, p, p, padding_value=0)  # type: ignore[call-overload]
    daam.use_backend("gpu")  # type: ignore[arg-type]
    daam.MultiHeadDAAM(4, backend="gpu")  # type: ignore[arg-type]
    daam.DensityBlock([1], [2], [3], 1, backend="gpu")  # type: ignore[arg-type]
    daam.DATDecoder(3, 4, 2, backend="gpu")  # type: ignore[arg-type]
