"""Frozen encoders of Hugging Face for texts, images and speech, with what turns examples into their input."""

from __future__ import annotations

import importlib.util
import wave
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from daam.recipes.data import DataError
from daam.transformer import LayerPooling

Collate = Callable[[list], dict[str, Tensor]]


class EncoderError(ValueError):
    """An encoder is not there, or not one for the data; the message says which, and what was expected."""


def load_encoder(
    name: str, modality: str, layers: str | None = None, device: str | torch.device = "cpu", max_length: int = 128
) -> tuple[LayerPooling, Collate]:
    """A frozen encoder, and a function from a list of sources (texts or paths) to a batch for it: `pooling(**batch)`
    is (batch, layers, features).

    Args:
        name: of a folder, of a model of the hub, or of an installed package that has one in its folder `model`.
        modality: "text", "vision" or "speech".
        layers: name of the list of layers, where it is not clear; see `LayerPooling`.
        max_length: of a text in tokens; what is longer is cut off.

    Texts and sounds of different lengths are padded, with an attention mask. The batch raises a `DataError` for a file
    that cannot be read or has another sampling rate than the encoder.

    Raises:
        EncoderError: no such model, no preprocessing for the modality, or its layers are not clear.
        ImportError: transformers is not installed, or Pillow for images.
    """
    transformers = _transformers()
    if modality not in COLLATES:
        raise EncoderError(f"modality is {modality!r}, expected one of {', '.join(map(repr, COLLATES))}")
    folder = find_model(name)
    encoder = _load(transformers.AutoModel, folder, name, "encoder")
    if encoder.config.is_encoder_decoder:
        raise EncoderError(f"{name} has a decoder too: give its encoder to daam.recipes.features.extract")
    processor, prepare = COLLATES[modality]
    processor = _load(getattr(transformers, processor), folder, name, f"preprocessing of {modality}")
    try:
        inputs = prepare(processor, encoder, max_length)
        pooling = LayerPooling(encoder, layers).to(device)
    except ValueError as error:
        raise EncoderError(f"{name}: {error}") from None

    def collate(sources: list) -> dict[str, Tensor]:
        batch = inputs(sources)
        # numbers take the dtype of the encoder, indices and masks keep theirs
        return {k: v.to(device, encoder.dtype if v.is_floating_point() else v.dtype) for k, v in batch.items()}

    return pooling, collate


def find_model(name: str) -> str:
    """The folder of a model: name itself, or `model` in the package of that name; else name, for the hub. The package
    is not imported.
    """
    module = name.replace("-", "_")
    if not Path(name).is_dir() and module.isidentifier() and (spec := importlib.util.find_spec(module)):
        for folder in spec.submodule_search_locations or ():
            if (Path(folder) / "model" / "config.json").exists():
                return str(Path(folder) / "model")
    return name


def padding_shows(encoder: nn.Module) -> bool:
    """Whether an encoder's features depend on what a batch is padded with, mask or not: speech encoders that normalise
    over time before the mask applies (WavLM base, wav2vec 2.0 base).
    """
    return getattr(getattr(encoder, "config", None), "feat_extract_norm", None) == "group"


def read_wav(path: str | Path) -> tuple[np.ndarray, int]:
    """The samples of a WAV file, averaged over channels, in fp32 between -1 and 1, and the sampling rate in Hz.

    Raises:
        DataError: no WAV file, not PCM of 8, 16 or 32 bits, truncated, or empty.
    """
    try:
        with wave.open(str(path), "rb") as file:
            _, width, rate, frames = file.getparams()[:4]
            channels, data = file.getnchannels(), file.readframes(frames)
    except (wave.Error, EOFError) as error:
        raise DataError(
            f"{path}: no WAV file that can be read, expected PCM ({error or 'it ends too early'})"
        ) from None
    if width not in PCM:
        raise DataError(f"{path}: {8 * width} bits a sample, expected 8, 16 or 32")
    if not frames or len(data) != frames * channels * width:
        raise DataError(f"{path}: {len(data)} bytes of sound, expected {frames * channels * width} and more than 0")
    dtype, zero, scale = PCM[width]
    samples = (np.frombuffer(data, dtype).astype(np.float64) - zero) / scale
    return samples.reshape(-1, channels).mean(1).astype(np.float32), rate


PCM = {1: ("u1", 128, 128), 2: ("<i2", 0, 2**15), 4: ("<i4", 0, 2**31)}


def _transformers() -> Any:
    try:
        import transformers
    except ImportError as error:
        raise ImportError(f"{error}. The recipes need their extra: pip install 'daam-triton[recipes]'") from error
    return transformers


def _load(kind: Any, folder: str, name: str, what: str) -> Any:
    try:
        return kind.from_pretrained(folder)
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).strip().partition("\n")[0][:160]  # some list every model there is
        raise EncoderError(
            f"no {what} in {name!r}: expected a folder, a model of the hub, or an installed package with one in its "
            f"folder model ({reason})"
        ) from None


def _text(tokenizer: Any, encoder: nn.Module, max_length: int) -> Collate:
    if max_length > tokenizer.model_max_length:
        raise EncoderError(f"max_length is {max_length}, expected at most the encoder's {tokenizer.model_max_length}")
    if tokenizer.pad_token is None:  # of decoder-only models; the mask hides it
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.padding_side = "right"  # positions count from the left

    def inputs(texts: list[str]) -> dict[str, Tensor]:
        return tokenizer(texts, padding=True, truncation=True, max_length=max_length, return_tensors="pt")

    return inputs


def _vision(processor: Any, encoder: nn.Module, max_length: int) -> Collate:
    try:
        from PIL import Image
    except ImportError as error:
        raise ImportError(f"{error}. The recipes need their extra: pip install 'daam-triton[recipes]'") from error

    def read(path: Path) -> Any:
        try:
            with Image.open(path) as image:
                return image.convert("RGB")
        except (OSError, SyntaxError, Image.DecompressionBombError) as error:
            raise DataError(f"{path}: no image that can be read ({error})") from None

    return lambda paths: processor([read(path) for path in paths], return_tensors="pt")


def _speech(extractor: Any, encoder: nn.Module, max_length: int) -> Collate:
    frames = getattr(encoder, "_get_feat_extract_output_lengths", None)

    def read(path: Path) -> np.ndarray:
        samples, rate = read_wav(path)
        if rate != extractor.sampling_rate:
            raise DataError(f"{path}: {rate} samples a second, expected the encoder's {extractor.sampling_rate}")
        if frames is not None and frames(torch.tensor(len(samples))) < 1:
            raise DataError(f"{path}: {len(samples)} samples are too few for one frame of the encoder")
        return samples

    def inputs(paths: list[Path]) -> dict[str, Tensor]:
        return extractor(
            [read(path) for path in paths], sampling_rate=extractor.sampling_rate, padding=True,
            return_attention_mask=True, return_tensors="pt",
        )  # fmt: skip

    return inputs


COLLATES = {
    "text": ("AutoTokenizer", _text),
    "vision": ("AutoImageProcessor", _vision),
    "speech": ("AutoFeatureExtractor", _speech),
}
