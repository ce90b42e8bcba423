"""The DAT decoder, or the whole transformer, as ONNX, for programs without torch."""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from daam.decoder import DATDecoder
from daam.transformer import DensityAdaptiveTransformer


def export_onnx(
    model: DATDecoder | DensityAdaptiveTransformer, path: str | Path, example: Mapping[str, Tensor] | None = None
) -> None:
    """Write a decoder, standardisation included, or a transformer, encoder included, into a file as ONNX, in eval mode
    and fp32, whatever its own are. Its output is logits, (batch, classes), for any batch.

    Args:
        model: of a decoder the input is x, (batch, layers, features) of float; of a transformer the inputs are those of
            the example, under their names. Names of the classes, where the decoder has some (see `daam.save_decoder`),
            are metadata: a list in JSON under "names".
        path: of the file.
        example: inputs of a transformer by name, as in model(**example), with the batch in front; pooling_mask may be
            one of them. Of those of two dimensions the second one, positions, may have any size that the encoder takes,
            all others are as in the example. Values of masks are not looked at: an example without a valid position
            has NaN for logits.

    Raises:
        TypeError: model is neither, or example no mapping of tensors, or given with a decoder.
        ImportError: the extra is not installed: pip install 'daam-triton[onnx]'.
        torch.onnx.errors.OnnxExporterError: the exporter cannot take the encoder.
    """
    if not isinstance(model, DATDecoder | DensityAdaptiveTransformer):
        raise TypeError(f"model is a {type(model).__name__}, expected a DATDecoder or a DensityAdaptiveTransformer")
    is_decoder = isinstance(model, DATDecoder)
    _check_example(example, is_decoder)
    try:
        import onnxscript  # noqa: F401 (torch's exporter needs it)
    except ImportError as error:
        raise ImportError(f"{error}. ONNX needs its extra: pip install 'daam-triton[onnx]'") from error
    plain = copy.deepcopy(model).cpu().float().eval()
    for module in plain.modules():
        if hasattr(module, "backend"):
            module.backend = "eager"  # in operators that ONNX has
    # of two examples: the exporter takes one for a batch that is always one
    if is_decoder:
        example = {"x": torch.zeros(2, model.settings["num_layers"], model.settings["num_features"])}
    else:
        example = {name: _repeat(t.cpu()) for name, t in example.items()}
    sizes = _name_sizes(example)
    with warnings.catch_warnings():  # of several inputs with a batch, one alone names it
        warnings.filterwarnings("ignore", message="# The axis name")
        program = torch.onnx.export(
            _Logits(plain, list(example)).eval(), tuple(example.values()), dynamo=True, input_names=list(example),
            output_names=["logits"], dynamic_shapes=(tuple(sizes),), verbose=False,
        )  # fmt: skip
    if (names := getattr(model if is_decoder else model.decoder, "names", None)) is not None:
        program.model.metadata_props["names"] = json.dumps(names)
    program.save(path)


class _Logits(nn.Module):
    """Return the logits of a model alone, from inputs by position, which have these names."""

    def __init__(self, model: DATDecoder | DensityAdaptiveTransformer, names: list[str]):
        super().__init__()
        self.model, self.names = model, names

    def forward(self, *inputs: Tensor) -> Tensor:
        found = self.model(**dict(zip(self.names, inputs, strict=True)))
        return found if isinstance(found, Tensor) else found.logits


def _check_example(example: Mapping[str, Tensor] | None, is_decoder: bool) -> None:
    if is_decoder:
        if example is not None:
            raise TypeError("example is given with a DATDecoder, whose input is known: expected None")
    elif not isinstance(example, Mapping) or not example or not all(isinstance(t, Tensor) for t in example.values()):
        raise TypeError(f"example is a {type(example).__name__}, expected tensors by name, as in model(**example)")


def _name_sizes(example: Mapping[str, Tensor]) -> list[dict[int, str]]:
    """Return names of those sizes of each input that may differ from the example's; equal ones share a name."""
    positions = next((t.shape[1] for t in example.values() if t.dim() == 2), None)
    sizes = []
    for name, t in example.items():
        second = "positions" if t.dim() == 2 and t.shape[1] == positions else f"{name}_positions"
        sizes.append({0: "batch", 1: second} if t.dim() == 2 else {0: "batch"})
    return sizes


def _repeat(t: Tensor) -> Tensor:
    """Return two examples where there is one."""
    t = t.float() if t.is_floating_point() else t
    return torch.cat([t, t]) if t.shape[0] == 1 else t
