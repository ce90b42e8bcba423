"""Density adaptive attention (DAAM, arXiv 2401.11143) on Triton kernels, with an eager fallback."""

from daam.backend import backend_for, use_backend
from daam.checkpoints import to_published_state_dict
from daam.functional import density_attention, density_gate, mixture_attention
from daam.modules import (
    DensityAdaptiveAttention,
    DensityBlock,
    DensityGate,
    GaussianAdaptiveAttention,
    GaussianBlock,
    MultiHeadDAAM,
    MultiHeadDensityAdaptiveAttention,
    MultiHeadGaussianAdaptiveAttention,
)

__version__ = "0.1.0"

__all__ = [
    "DensityAdaptiveAttention",
    "DensityBlock",
    "DensityGate",
    "GaussianAdaptiveAttention",
    "GaussianBlock",
    "MultiHeadDAAM",
    "MultiHeadDensityAdaptiveAttention",
    "MultiHeadGaussianAdaptiveAttention",
    "backend_for",
    "density_attention",
    "density_gate",
    "mixture_attention",
    "to_published_state_dict",
    "use_backend",
]
