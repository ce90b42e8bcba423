"""The density adaptive transformer of arXiv 2401.11143: a frozen encoder, its layers' outputs averaged over positions,
and a decoder that is trained on them.
"""

from __future__ import annotations

import contextlib
import inspect
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from daam.decoder import DATDecoder, focal_loss


@dataclass
class Output:
    """logits: (batch, classes). loss: a number, where labels were given. weights: of the densities, (batch, layers,
    features), where asked for. features: what the decoder saw, (batch, layers, features).
    """

    logits: Tensor
    features: Tensor
    loss: Tensor | None = None
    weights: Tensor | None = None


class LayerPooling(nn.Module):
    """A frozen encoder that gives the outputs of its layers, averaged over positions as they come.

    Args:
        encoder: a Hugging Face model, or any module that runs a list of layers; it is put in eval mode and stays there,
            and its parameters require no gradient. A layer's output is a tensor (batch, positions, features), or the
            first entry of a tuple.
        layers: the layers, as a name (`"encoder.layer"`) or a sequence of modules. Not needed where the encoder holds
            one `nn.ModuleList` of `config.num_hidden_layers` entries, or, without such a config, one of more than one.

    Raises:
        ValueError: the layers are not found, or not unique; the message names those there are.
    """

    def __init__(self, encoder: nn.Module, layers: str | list[nn.Module] | None = None):
        super().__init__()
        self.encoder = encoder.requires_grad_(False).eval()
        self._layers = _find_layers(encoder, layers)  # a plain list: the encoder has registered them

    @property
    def layers(self) -> list[nn.Module]:
        """The layers, in order."""
        return list(self._layers)

    @property
    def num_layers(self) -> int:
        return len(self._layers)

    def train(self, mode: bool = True) -> LayerPooling:
        """Leaves the encoder in eval mode: nothing of it learns."""
        super().train(mode)
        self.encoder.eval()
        return self

    @torch.no_grad()
    def forward(self, *inputs: Any, attention_mask: Tensor | None = None, **kwargs: Any) -> Tensor:
        """`average` without gradients."""
        return self.average(*inputs, attention_mask=attention_mask, **kwargs)

    def average(self, *inputs: Any, attention_mask: Tensor | None = None, **kwargs: Any) -> Tensor:
        """(batch, layers, features) in fp32, or fp64 for such an encoder: the mean of each layer's output over the
        positions that attention_mask, (batch, positions), says are valid, all without one. Everything goes to the
        encoder; its embeddings are not among the layers. Only sums are kept: no layer outlives the next one.

        Raises:
            ValueError: attention_mask fits no layer's positions, or a layer ran not once.
        """
        if attention_mask is not None:
            kwargs["attention_mask"] = attention_mask
        with _pooled(self._layers, self.encoder, attention_mask) as found:
            self.encoder(*inputs, **kwargs)
        if ran := [i for i, pooled in enumerate(found) if len(pooled) != 1]:
            raise ValueError(f"layers {ran} ran {[len(found[i]) for i in ran]} times in one call, expected once each")
        return torch.stack([pooled[0] for pooled in found], 1)


class DensityAdaptiveTransformer(nn.Module):
    """A frozen encoder and a DAT decoder on its layers (arXiv 2401.11143).

    Args:
        encoder, layers: see `LayerPooling`.
        decoder: a `DATDecoder`, or any module from (batch, layers, features) to (batch, classes).
        loss: of labels, "cross_entropy" or the paper's "focal" (gamma 2.5, alpha 0.25).
    """

    def __init__(
        self, encoder: nn.Module, decoder: nn.Module, *, layers: str | list[nn.Module] | None = None,
        loss: str = "cross_entropy",
    ):  # fmt: skip
        super().__init__()
        self.pooling, self.decoder = LayerPooling(encoder, layers), decoder
        if loss not in LOSSES:
            raise ValueError(f"loss is {loss!r}, expected one of {', '.join(map(repr, LOSSES))}")
        self.loss = loss
        settings = getattr(decoder, "settings", None)
        if settings is not None and settings["num_layers"] != self.pooling.num_layers:
            raise ValueError(
                f"the decoder has num_layers {settings['num_layers']}, expected the encoder's {self.pooling.num_layers}"
            )

    @property
    def encoder(self) -> nn.Module:
        return self.pooling.encoder

    def forward(
        self, *inputs: Any, attention_mask: Tensor | None = None, labels: Tensor | None = None,
        return_weights: bool = False, **kwargs: Any,
    ) -> Output:  # fmt: skip
        """inputs, attention_mask and kwargs go to the encoder; labels: (batch,) of integers; return_weights: also the
        densities' weights, where the decoder has some.
        """
        features = self.pooling(*inputs, attention_mask=attention_mask, **kwargs)
        if return_weights:
            logits, weights = self.decoder(features, return_weights=True)
        else:
            logits, weights = self.decoder(features), None
        loss = None if labels is None else LOSSES[self.loss](logits, labels)
        return Output(logits, features, loss, weights)

    def trainable_parameters(self) -> list[nn.Parameter]:
        """Those of the decoder that require a gradient."""
        return [p for p in self.decoder.parameters() if p.requires_grad]

    def save_decoder(self, path: str | Path) -> None:
        """The decoder as safetensors, with its settings. Needs safetensors."""
        save_decoder(self.decoder, path)

    def load_decoder(self, path: str | Path) -> None:
        """Tensors from safetensors into this decoder. Raises as `load_state_dict` does where they do not fit."""
        from safetensors.torch import load_file

        self.decoder.load_state_dict(load_file(path))


LOSSES = {"cross_entropy": nn.functional.cross_entropy, "focal": focal_loss}


def save_decoder(decoder: nn.Module, path: str | Path) -> None:
    """A decoder as safetensors, with the arguments that built it as metadata. Needs safetensors."""
    from safetensors.torch import save_file

    tensors = {name: t.contiguous() for name, t in decoder.state_dict().items()}
    save_file(tensors, path, metadata={"settings": json.dumps(getattr(decoder, "settings", None))})


def load_decoder(path: str | Path, **changes: Any) -> DATDecoder:
    """The `DATDecoder` that `save_decoder` wrote; changes are arguments that replace those it was built with."""
    from safetensors import safe_open
    from safetensors.torch import load_file

    with safe_open(path, framework="pt") as file:
        settings = json.loads((file.metadata() or {}).get("settings", "null"))
    if settings is None:
        raise ValueError(f"{path} holds no settings of a DATDecoder")
    decoder = DATDecoder(**settings | changes)
    decoder.load_state_dict(load_file(path))
    return decoder


@contextlib.contextmanager
def _pooled(layers: list[nn.Module], encoder: nn.Module, mask: Tensor | None) -> Iterator[list[list[Tensor]]]:
    """For each layer the averages of what it gave in the block."""
    found: list[list[Tensor]] = [[] for _ in layers]

    def keep(own: list[Tensor]):
        def hook(module, args, output):
            own.append(_average(output if isinstance(output, Tensor) else output[0], encoder, mask))

        return hook

    handles = [layer.register_forward_hook(keep(own)) for layer, own in zip(layers, found, strict=True)]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def _average(hidden: Tensor, encoder: nn.Module, mask: Tensor | None) -> Tensor:
    """(batch, positions, features) averaged over valid positions, as (batch, features)."""
    hidden = hidden.to(torch.promote_types(hidden.dtype, torch.float32))
    if mask is None:
        return hidden.mean(1)
    if mask.shape != hidden.shape[:2] and hasattr(encoder, "_get_feature_vector_attention_mask"):
        # speech encoders of Hugging Face: the mask is of samples, positions are of frames; adapters come after layers
        frames_of = encoder._get_feature_vector_attention_mask
        has_adapter = "add_adapter" in inspect.signature(frames_of).parameters
        mask = frames_of(hidden.shape[1], mask, **({"add_adapter": False} if has_adapter else {}))
    if mask.shape != hidden.shape[:2]:
        raise ValueError(f"attention_mask has shape {tuple(mask.shape)}, expected {tuple(hidden.shape[:2])}")
    weights = mask.to(hidden).unsqueeze(-1)
    # what stands at invalid positions, NaN included, does not count
    total = torch.where(weights > 0, hidden, 0).sum(1)
    return total / weights.sum(1).clamp(min=1)


def _find_layers(encoder: nn.Module, layers: str | list[nn.Module] | None) -> list[nn.Module]:
    if isinstance(layers, str):
        try:
            layers = encoder.get_submodule(layers)
        except AttributeError as error:
            raise ValueError(f"layers: {error}") from None
    if layers is not None:
        return list(layers)
    lists = {name: m for name, m in encoder.named_modules() if isinstance(m, nn.ModuleList) and len(m) > 1}
    wanted = getattr(getattr(encoder, "config", None), "num_hidden_layers", None)
    fitting = {name: m for name, m in lists.items() if wanted in (None, len(m))}
    if len(fitting) != 1:
        names = ", ".join(f"{name!r} ({len(m)})" for name, m in lists.items()) or "none"
        raise ValueError(f"layers of the encoder are not clear, pass layers=: its module lists are {names}")
    return list(next(iter(fitting.values())))
