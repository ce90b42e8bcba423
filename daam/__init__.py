"""Density adaptive attention (DAAM, arXiv 2401.11143) on Triton kernels, with an eager fallback."""

from daam.backend import backend_for, use_backend
from daam.block import density_block, fusion_for
from daam.blocks import DensityBlock, GaussianBlock
from daam.checkpoints import to_published_state_dict
from daam.decoder import DATDecoder, focal_loss
from daam.functional import density_attention, density_gate, mixture_attention, stable_mixture_attention
from daam.importance import WeightMap, importance_factor, layer_contribution
from daam.modules import (
    DensityAdaptiveAttention,
    DensityGate,
    GaussianAdaptiveAttention,
    MultiHeadDAAM,
    MultiHeadDensityAdaptiveAttention,
    MultiHeadGaussianAdaptiveAttention,
)
from daam.onnx_export import export_onnx
from daam.pieces import AxisPieces
from daam.pooling import LayerPooling
from daam.stable import StableDensityBlock, StableMultiHeadDensityAttention
from daam.transformer import DensityAdaptiveTransformer, load_decoder, save_decoder
from daam.warmup import warmup

__version__ = "0.1.0"

__all__ = [
    "AxisPieces",
    "DATDecoder",
    "DensityAdaptiveAttention",
    "DensityAdaptiveTransformer",
    "DensityBlock",
    "DensityGate",
    "GaussianAdaptiveAttention",
    "GaussianBlock",
    "LayerPooling",
    "MultiHeadDAAM",
    "MultiHeadDensityAdaptiveAttention",
    "MultiHeadGaussianAdaptiveAttention",
    "StableDensityBlock",
    "StableMultiHeadDensityAttention",
    "WeightMap",
    "backend_for",
    "density_attention",
    "density_block",
    "density_gate",
    "export_onnx",
    "focal_loss",
    "fusion_for",
    "importance_factor",
    "layer_contribution",
    "load_decoder",
    "mixture_attention",
    "save_decoder",
    "stable_mixture_attention",
    "to_published_state_dict",
    "use_backend",
    "warmup",
]
