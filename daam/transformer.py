"""The density adaptive transformer, arXiv 2401.11143: a decoder on a frozen encoder's layers, each averaged."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from torch import Tensor, nn
from torch.utils import _pytree as pytree

from daam.checks import check_choice
from daam.decoder import DATDecoder, focal_loss
from daam.pooling import LayerPooling

LOSSES = {"cross_entropy": nn.functional.cross_entropy, "focal": focal_loss}


class Output(dict):
    """Hold the results of a `DensityAdaptiveTransformer`: a dict of those there are, whose entries are attributes too,
    and which slices as a tuple does, as outputs of Hugging Face do.

    loss: a number, where labels were given. logits: (batch, classes). weights: of the densities, (batch, layers,
    features), where asked for. features: what the decoder saw, (batch, layers, features).
    """

    NAMES = ("loss", "logits", "weights", "features")

    def __init__(self, **entries: Tensor | None):
        super().__init__({name: entries[name] for name in self.NAMES if entries.get(name) is not None})

    def __getattr__(self, name: str) -> Tensor | None:
        if name not in self.NAMES:
            raise AttributeError(f"an Output has no {name!r}; it has: {', '.join(self.NAMES)}")
        return self.get(name)

    def __getitem__(self, key: str | int | slice) -> Any:
        return super().__getitem__(key) if isinstance(key, str) else self.to_tuple()[key]

    def __reduce__(self) -> tuple:
        return _output, (dict(self),)

    def to_tuple(self) -> tuple[Tensor, ...]:
        """Return the entries there are, in order."""
        return tuple(self.values())


def _output(entries: dict[str, Tensor]) -> Output:
    return Output(**entries)


# so that torch.export, vmap and the like see the tensors in it, as they do in outputs of Hugging Face
pytree.register_pytree_node(
    Output,
    lambda output: (list(output.values()), list(output)),
    lambda values, names: Output(**dict(zip(names, values, strict=True))),
    serialized_type_name="daam.transformer.Output",
    flatten_with_keys_fn=lambda output: ([(pytree.MappingKey(k), v) for k, v in output.items()], list(output)),
)


class DensityAdaptiveTransformer(nn.Module):
    """Classify with a frozen encoder and a DAT decoder on its layers (arXiv 2401.11143).

    Args:
        encoder, layers, batch_first: see `LayerPooling`.
        decoder: a `DATDecoder`, or any module from (batch, layers, features) to (batch, classes).
        loss: of labels, "cross_entropy" or the paper's "focal" (gamma 2.5, alpha 0.25).
    """

    accepts_loss_kwargs = False  # tells the Trainer of transformers that the loss is a mean, which it has to divide

    def __init__(
        self, encoder: nn.Module, decoder: nn.Module, *, layers: str | Sequence[nn.Module] | None = None,
        loss: str = "cross_entropy", batch_first: bool | None = None,
    ):  # fmt: skip
        super().__init__()
        self.pooling, self.decoder = LayerPooling(encoder, layers, batch_first), decoder
        check_choice("loss", loss, LOSSES)
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
        self, *inputs: Any, input_ids: Tensor | None = None, attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None, pixel_values: Tensor | None = None,
        pixel_attention_mask: Tensor | None = None, input_values: Tensor | None = None,
        input_features: Tensor | None = None, pooling_mask: Tensor | Literal["all"] | None = None,
        labels: Tensor | None = None, return_weights: bool = False, **kwargs: Any,
    ) -> Output:  # fmt: skip
        """Classify a batch, with features in the dtype of the decoder's parameters.

        Args:
            labels: (batch,) of integers, for a loss.
            return_weights: also the densities' weights, where the decoder has some.
            inputs and all others: see `LayerPooling.average`. Those of Hugging Face's encoders have names here, since
                its Trainer drops columns that a signature does not name.
        """
        named = {
            "input_ids": input_ids, "token_type_ids": token_type_ids, "pixel_values": pixel_values,
            "pixel_attention_mask": pixel_attention_mask, "input_values": input_values,
            "input_features": input_features,
        }  # fmt: skip
        kwargs |= {name: value for name, value in named.items() if value is not None}
        features = self.pooling(*inputs, attention_mask=attention_mask, pooling_mask=pooling_mask, **kwargs)
        features = features.to(next((p.dtype for p in self.decoder.parameters()), features.dtype))
        return Output(**classify(self.decoder, features, self.loss, labels, return_weights))

    def trainable_parameters(self) -> list[nn.Parameter]:
        """Return the parameters of the decoder that require a gradient."""
        return [p for p in self.decoder.parameters() if p.requires_grad]

    def save_decoder(self, path: str | Path, names: Sequence[str] | None = None) -> None:
        """Save the decoder as safetensors, with its settings and the names of the classes: see `daam.save_decoder`."""
        save_decoder(self.decoder, path, names)

    def load_decoder(self, path: str | Path) -> None:
        """Load tensors from safetensors into this decoder. Raises as `load_state_dict` does where they do not fit."""
        from safetensors.torch import load_file

        self.decoder.load_state_dict(load_file(path))


def classify(
    decoder: nn.Module, features: Tensor, loss: str, labels: Tensor | None, return_weights: bool
) -> dict[str, Tensor | None]:
    """Return the entries of an `Output` by name, of features (batch, layers, features). loss: one of LOSSES."""
    found = decoder(features, return_weights=True) if return_weights else (decoder(features), None)
    value = None if labels is None else LOSSES[loss](found[0], labels)
    return {"loss": value, "logits": found[0], "weights": found[1], "features": features}


def save_decoder(decoder: nn.Module, path: str | Path, names: Sequence[str] | None = None) -> None:
    """Save a decoder as safetensors, with the arguments that built it, its `settings`, and the names of the classes as
    metadata. Needs safetensors.

    names: one for each class, in order; None: those that the decoder has as `names`, as `load_decoder` leaves them
        there, or none. Raises a ValueError where they are not as many as the decoder's classes.
    """
    from safetensors.torch import save_file

    settings, names = getattr(decoder, "settings", None), getattr(decoder, "names", None) if names is None else names
    if names is not None:
        if len(names) != (classes := (settings or {}).get("num_classes", len(names))):
            raise ValueError(f"names has {len(names)} names, expected one for each of the decoder's {classes} classes")
        settings = {**(settings or {}), "names": list(names)}
    tensors = {name: t.contiguous() for name, t in decoder.state_dict().items()}
    # one entry: safetensors writes several in an order of chance, and a file would not be the same twice
    save_file(tensors, path, metadata={"settings": json.dumps(settings)})


def read_settings(path: str | Path) -> dict[str, Any]:
    """Return the settings that `save_decoder` wrote into a file, with "names" of the classes where it was given some;
    empty where the decoder had none.
    """
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        return json.loads((file.metadata() or {}).get("settings", "null")) or {}


def load_decoder(path: str | Path, **changes: Any) -> DATDecoder:
    """Return the `DATDecoder` that `save_decoder` wrote; changes are arguments that replace those it was built with.
    Its attribute `names` is a list of the names of the classes, None in a file without them.
    """
    from safetensors.torch import load_file

    settings = read_settings(path)
    names = settings.pop("names", None)
    if "num_layers" not in settings:
        raise ValueError(f"{path} holds no settings of a DATDecoder")
    decoder = DATDecoder(**settings | changes)
    decoder.load_state_dict(load_file(path))
    decoder.names = names
    return decoder
