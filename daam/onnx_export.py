"""The DAT decoder as ONNX, for programs without torch."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import torch

from daam.decoder import DATDecoder


def export_onnx(decoder: DATDecoder, path: str | Path) -> None:
    """Write a decoder, standardisation included, into a file as ONNX, in eval mode and fp32, whatever its own are.

    Its input is x, (batch, layers, features) of float, for any batch; its output is logits, (batch, classes). Names of
    the classes, where the decoder has some (see `daam.save_decoder`), are metadata: a list in JSON under "names".

    Raises:
        TypeError: decoder is no `DATDecoder`. ImportError: the extra is not installed: pip install 'daam-triton[onnx]'.
    """
    if not isinstance(decoder, DATDecoder):
        raise TypeError(f"decoder is a {type(decoder).__name__}, expected a DATDecoder")
    try:
        import onnxscript  # noqa: F401 (torch's exporter needs it)
    except ImportError as error:
        raise ImportError(f"{error}. ONNX needs its extra: pip install 'daam-triton[onnx]'") from error
    plain = copy.deepcopy(decoder).cpu().float().eval()
    for module in plain.modules():
        if hasattr(module, "backend"):
            module.backend = "eager"  # in operators that ONNX has
    # of two examples: the exporter takes one for a batch that is always one
    x = torch.zeros(2, decoder.settings["num_layers"], decoder.settings["num_features"])
    program = torch.onnx.export(
        plain, (x,), dynamo=True, input_names=["x"], output_names=["logits"],
        dynamic_shapes={"x": {0: torch.export.Dim("batch")}}, verbose=False,
    )  # fmt: skip
    if (names := getattr(decoder, "names", None)) is not None:
        program.model.metadata_props["names"] = json.dumps(names)
    program.save(path)
