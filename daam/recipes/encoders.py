"""Frozen encoders of Hugging Face for texts, images and speech, with what turns examples into their input."""

from __future__ import annotations

import hashlib
import importlib.util
import inspect
import json
import tempfile
from collections.abc import Callable, Collection, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from daam.checks import lacks_memory
from daam.masks import LENGTHS, unwrap
from daam.pooling import LayerPooling
from daam.recipes.data import DataError
from daam.recipes.errors import UserError
from daam.recipes.media import import_extra, read_image, read_sound, sound_seconds

MAX_LENGTH, MAX_SECONDS = 128, 30.0  # of a text in tokens, of a sound; what is longer is cut off
FIRST = 16  # texts, in which few tokens may be unknown
NO_LIMIT = 2**31  # of positions
PROVENANCE = ("_name_or_path", "name_or_path", "transformers_version", "dtype")  # not what an encoder is
# where models of several modalities hold the encoder of one
PARTS = {
    "text": ("text_model", "language_model", "text_encoder"),
    "vision": ("vision_model", "vision_tower", "visual", "image_model", "vision_encoder"),
    "speech": ("audio_model", "audio_tower", "audio_encoder", "speech_encoder"),
}
SAMPLES = {
    "text": "a few words",
    "vision": np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8),
    "speech": np.random.default_rng(0).normal(0, 0.1, 16000).astype(np.float32),
}


class EncoderError(UserError):
    """Tell that an encoder is not there, or not one for the data; the message says which, and what was expected."""


@dataclass
class Collate:
    """Turn a list of sources, texts or paths, into a batch for an encoder: `pooling(**collate(sources))`.

    read: makes of a source what prepare takes a list of. names: the encoder's arguments; what else is prepared is left
    out, the mask aside. device, dtype: the batch's. random: names of the encoder's tensors that its files do not hold.
    sha256: the preparation's. limit: the longest example, in a unit, that is not cut. cut: the sources that were cut.
    check: takes all sources, raises where they do not fit, and returns what is to be told of them, or "".
    """

    read: Callable[[Any], Any]
    prepare: Callable[[list], dict[str, Tensor]]
    names: frozenset[str]
    device: str | torch.device
    dtype: torch.dtype
    limit: float | None = None
    unit: str = ""
    cut: set = field(default_factory=set)
    random: frozenset[str] = frozenset()
    sha256: str = ""
    check: Callable[[Sequence], str] = lambda sources: ""

    def __call__(self, sources: list) -> dict[str, Tensor]:
        """Return the batch of some sources; raise a `DataError` where one cannot be used."""
        return self.batch([self.read(source) for source in sources])

    def batch(self, examples: list) -> dict[str, Tensor]:
        """Return the batch of some examples, each as `read` gives it."""
        batch = self.prepare(examples)
        # numbers take the dtype of the encoder, indices and masks keep theirs
        return {
            name: value.to(self.device, self.dtype if value.is_floating_point() else value.dtype)
            for name, value in batch.items()
            if name in self.names or name == "attention_mask"
        }


def load_encoder(
    name: str, modality: str, layers: str | None = None, device: str | torch.device = "cpu",
    max_length: int | None = None, max_seconds: float = MAX_SECONDS,
) -> tuple[LayerPooling, Collate]:  # fmt: skip
    """Load a frozen encoder, and what makes batches for it: `pooling(**collate(sources))` is (batch, layers, features).

    Args:
        name: of a folder, of a model of the hub, or of an installed package that has one in its folder `model`. Of a
            model with a decoder the encoder is taken, of one for several modalities the part for this one.
        modality: "text", "vision" or "speech".
        layers: name of the list of layers, where it is not clear; see `LayerPooling`.
        max_length: of a text in tokens; what is longer is cut off. None: 128. Where the encoder takes fewer, these
            are taken, and a line is printed where more were asked for.
        max_seconds: of a sound; what is longer is cut off.

    Texts and sounds of different lengths are padded, with a mask, whether or not the encoder takes one.

    Raises:
        EncoderError: no such model; weights that do not load, or leave some of the encoder at random; no preprocessing
            for the modality, or another encoder's; layers that are not clear.
        ImportError: transformers is not installed, or Pillow, soundfile or soxr.
    """
    transformers = import_extra("transformers")
    if modality not in PREPARATIONS:
        raise EncoderError(f"modality is {modality!r}, expected one of {', '.join(map(repr, PREPARATIONS))}")
    folder = find_model(name)
    model, info = _load(transformers, "AutoModel", folder, name, "encoder", output_loading_info=True)
    missing = sorted(info["missing_keys"])  # tensors that its files do not hold: they are drawn at random
    encoder = _part(model, missing, modality)
    prefix = next(f"{path}." if path else "" for path, module in model.named_modules() if module is encoder)
    if layers is not None:  # as they are called in the whole model, or in the part
        layers = ",".join(layer.strip().removeprefix(prefix) for layer in layers.split(","))
    kind, prepare = PREPARATIONS[modality]
    processor = _load(transformers, kind, folder, name, f"preprocessing of {modality}")
    try:
        pooling = LayerPooling(encoder, layers)
        collate = prepare(processor, encoder, max_length if modality == "text" else max_seconds)
    except ValueError as error:
        raise EncoderError(f"{name}: {error}") from None
    collate.random = frozenset(key.removeprefix(prefix) for key in missing)
    collate.sha256 = _hash_saved(processor)
    _check_complete(model, missing, lambda: pooling(**collate.batch([SAMPLES[modality]])), name)
    collate.device = device
    return pooling.to(device), collate


def find_model(name: str) -> str:
    """Return the folder `model` in the installed package of a name, which is not imported, or else the name itself."""
    module = name.replace("-", "_")
    if not Path(name).is_dir() and module.isidentifier():
        with suppress(ImportError, ValueError):  # of modules that are no packages, like __main__
            spec = importlib.util.find_spec(module)
            for folder in (spec and spec.submodule_search_locations) or ():
                if (Path(folder) / "model" / "config.json").exists():
                    return str(Path(folder) / "model")
    return name


def identify(pooling: nn.Module, collate: Callable) -> dict[str, str]:
    """Return the SHA-256 of the encoder and of the preparation, by name, as they are now; of none that is not known."""
    random = collate.random if isinstance(collate, Collate) else ()
    found = {"encoder_sha256": hash_encoder(pooling, random)} if isinstance(pooling, nn.Module) else {}
    return found | ({"preparation_sha256": collate.sha256} if isinstance(collate, Collate) else {})


def hash_encoder(pooling: nn.Module, random: Collection[str] = ()) -> str:
    """Return the SHA-256 of an encoder: config, tensors but those drawn at random, layers a `LayerPooling` averages."""
    encoder, total = unwrap(pooling.encoder if isinstance(pooling, LayerPooling) else pooling), hashlib.sha256()
    if hasattr(config := getattr(encoder, "config", None), "to_dict"):
        settings = {k: v for k, v in config.to_dict().items() if k not in PROVENANCE}
        total.update(json.dumps(settings, sort_keys=True, default=str).encode())
    tensors = {**dict(encoder.named_buffers()), **encoder.state_dict()}
    for key in sorted(tensors.keys() - set(random)):
        value = tensors[key]
        total.update(key.replace("_orig_mod.", "").encode())  # of parts that are compiled
        if isinstance(value, Tensor) and value.layout is torch.strided and not value.is_quantized:
            total.update(f"{value.dtype} {tuple(value.shape)}".encode())
            total.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
        else:
            total.update(repr(value).encode())
    if isinstance(pooling, LayerPooling):
        names = {module: name for name, module in encoder.named_modules()}
        total.update(repr([names.get(layer, "").replace("_orig_mod.", "") for layer in pooling.layers]).encode())
    return total.hexdigest()


def _hash_saved(processor: Any) -> str:
    """Return the SHA-256 of the files in which a tokenizer or a processor saves itself."""
    total = hashlib.sha256()
    with tempfile.TemporaryDirectory() as folder:
        processor.save_pretrained(folder)
        for path in sorted(Path(folder).rglob("*.*")):
            content = path.read_bytes()
            if path.suffix == ".json" and isinstance(data := json.loads(content), dict):
                content = json.dumps({k: v for k, v in data.items() if k not in PROVENANCE}, sort_keys=True).encode()
            total.update(path.name.encode() + hashlib.sha256(content).digest())
    return total.hexdigest()


def _load(transformers: Any, kind: str, folder: str, name: str, needed: str, **options: Any) -> Any:
    try:
        return getattr(transformers, kind).from_pretrained(folder, **options)
    except Exception as error:  # a file of another kind, a truncated one, other shapes: each fails in a way of its own
        if isinstance(error, ImportError) or lacks_memory(error):
            raise
        reason = str(error).strip().partition("\n")[0][:160]  # some list every model there is
        raise EncoderError(
            f"no {needed} in {name!r}: expected a folder, a model of the hub, or an installed package with one in its "
            f"folder model ({type(error).__name__}: {reason})"
        ) from None


def _part(model: nn.Module, missing: list[str], modality: str) -> nn.Module:
    """Return the encoder of a modality: a part of the model, its encoder without the decoder, or the model itself."""
    # encoders that were saved alone are loaded into the whole model, with a decoder at random
    has_decoder = model.config.is_encoder_decoder or any(name.startswith("decoder.") for name in missing)
    if getattr(model.config, "sub_configs", None) or has_decoder:
        part = next((p for p in PARTS[modality] if isinstance(getattr(model, p, None), nn.Module)), None)
        if part is not None:
            return getattr(model, part)
    return model.get_encoder() if has_decoder else model


def _check_complete(model: nn.Module, missing: list[str], run: Callable[[], Tensor], name: str) -> None:
    """Raise an EncoderError where tensors that the files do not hold reach the features, as NaN in them shows."""
    state = model.state_dict(keep_vars=True)
    random = {key: state[key].data for key in missing if key in state and state[key].is_floating_point()}
    kept = {key: tensor.clone() for key, tensor in random.items()}
    if not kept:
        return
    try:
        for tensor in random.values():
            tensor.fill_(float("nan"))
        reached = not run().isfinite().all()
    except Exception as error:  # an encoder's own
        if lacks_memory(error):
            raise
        raise EncoderError(
            f"{name}: its files lack {', '.join(missing[:3])} …, and it fails on a sample ({type(error).__name__}: "
            f"{error})"
        ) from error
    finally:
        for key, tensor in random.items():
            tensor.copy_(kept[key])
    if reached:
        raise EncoderError(
            f"{name}: its files lack {len(missing)} tensors of the encoder, {', '.join(missing[:3])} …; features would "
            "be random"
        )


def _collate(read: Callable, prepare: Callable, encoder: nn.Module, **options: Any) -> Collate:
    names = frozenset(inspect.signature(encoder.forward).parameters)
    dtype = next((p.dtype for p in encoder.parameters() if p.is_floating_point()), torch.float32)
    return Collate(read, prepare, names, "cpu", dtype, **options)


def _text(tokenizer: Any, encoder: nn.Module, max_length: int | None) -> Collate:
    rows = _check_vocabulary(tokenizer, encoder)
    least = tokenizer.num_special_tokens_to_add() + 1
    if not isinstance(tokenizer.model_max_length, int | float) or tokenizer.model_max_length < least:
        raise EncoderError(
            f"model_max_length of its tokenizer is {tokenizer.model_max_length!r}, expected {least} or more"
        )
    limit = int(min(tokenizer.model_max_length, positions_of(encoder)))
    if max_length is not None and max_length > limit:
        print(f"max_length is {max_length}, but the encoder takes {limit} tokens: longer texts are cut off there")
    max_length = min(MAX_LENGTH if max_length is None else max_length, limit)
    if max_length < least:
        raise EncoderError(f"max_length is {max_length}, expected {least} or more: {least - 1} tokens are special")
    if tokenizer.pad_token is None:  # of decoder-only models; the mask hides it
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
    tokenizer.padding_side = "right"  # positions count from the left
    cut: set = set()

    def prepare(texts: list[str]) -> dict[str, Tensor]:
        # a token is of a byte at least, so that short texts need no second look
        if long := [text for text in texts if len(text.encode()) + 8 > max_length and text not in cut]:
            lengths = map(len, tokenizer(long, truncation=False, verbose=False)["input_ids"])
            cut.update(text for text, length in zip(long, lengths, strict=True) if length > max_length)
        batch = tokenizer(
            texts, padding=True, truncation=True, max_length=max_length, return_attention_mask=True, return_tensors="pt"
        )
        if empty := (batch["attention_mask"].sum(1) == 0).nonzero().flatten().tolist():
            raise DataError(f"text {texts[empty[0]]!r} has no tokens, expected one or more")
        if rows is not None and (highest := int(batch["input_ids"].max())) >= rows:
            raise EncoderError(f"the tokenizer gives token {highest}, expected one of the encoder's {rows}")
        return dict(batch)

    def check(texts: Sequence[str]) -> str:
        found = tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"]
        tokens, unknown = sum(map(len, found)), sum(ids.count(tokenizer.unk_token_id) for ids in found)
        mostly = sum(2 * ids.count(tokenizer.unk_token_id) >= max(1, len(ids)) for ids in found)
        if mostly == 0:
            return ""
        if 2 * unknown >= tokens or all(2 * ids.count(tokenizer.unk_token_id) >= len(ids) for ids in found[:FIRST]):
            raise EncoderError(
                f"the tokenizer does not know {unknown} of {tokens} tokens of the {len(texts)} texts, expected few: it "
                "is not the encoder's, its vocabulary files are missing, or the texts are in another script"
            )
        return f"{mostly} of {len(texts)} texts are mostly of tokens that the tokenizer does not know"

    return _collate(str, prepare, encoder, limit=max_length, unit="tokens", cut=cut, check=check)


def _check_vocabulary(tokenizer: Any, encoder: nn.Module) -> int | None:
    """Return how many tokens an encoder knows, if it says so; raise an EncoderError where the tokenizer is far off."""
    try:
        rows = encoder.get_input_embeddings().num_embeddings
    except (AttributeError, NotImplementedError):
        rows = getattr(getattr(encoder, "config", None), "vocab_size", None)
    tokens = len(tokenizer)
    words = tokens - len(tokenizer.all_special_ids)
    if words < 1 or (rows and (words <= rows / 10 or not rows / 2 <= tokens <= 2 * rows)):
        raise EncoderError(
            f"the tokenizer has {tokens} tokens, {tokens - words} of them special, expected about the encoder's "
            f"{rows}: its vocabulary files are missing, or those of another encoder"
        )
    return rows


def positions_of(encoder: nn.Module) -> int:
    """Return how many positions an encoder has, `NO_LIMIT` where there is no table of them."""
    limit = getattr(getattr(encoder, "config", None), "max_position_embeddings", None)
    for name, module in encoder.named_modules():
        if name.endswith("position_embeddings") and isinstance(module, nn.Embedding) and module.padding_idx is not None:
            return module.num_embeddings - module.padding_idx - 1  # RoBERTa's begin behind that of padding
    return limit if isinstance(limit, int) and limit > 0 else NO_LIMIT


def _vision(processor: Any, encoder: nn.Module, unused: float) -> Collate:
    return _collate(read_image, lambda images: dict(processor(images, return_tensors="pt")), encoder)


def _speech(extractor: Any, encoder: nn.Module, max_seconds: float) -> Collate:
    rate, cut = getattr(extractor, "sampling_rate", None), set()
    if not isinstance(rate, int) or rate < 1:
        raise EncoderError(f"the sampling_rate of its preprocessing is {rate!r}, expected a number of Hz")
    limit = min(max_seconds, _window(extractor) / rate)
    owner = next((m for m in encoder.modules() if hasattr(type(m), LENGTHS[0])), None)
    # those that pad in a way of their own, like Whisper's to 30 seconds, have its name as their default
    option = inspect.signature(type(extractor).__call__).parameters.get("padding")
    padding = {} if option is None or isinstance(option.default, str) else {"padding": True}

    def read(path: Path) -> np.ndarray:
        samples = read_sound(path, rate, limit)
        if len(samples) >= int(limit * rate) and sound_seconds(path) > limit:
            cut.add(path)
        if owner is not None and "input_values" in names and _frames(owner, len(samples)) < 1:
            raise DataError(f"{path}: {len(samples)} samples are too few for one frame of the encoder")
        return samples

    def prepare(sounds: list[np.ndarray]) -> dict[str, Tensor]:
        return dict(extractor(sounds, sampling_rate=rate, return_attention_mask=True, return_tensors="pt", **padding))

    names = inspect.signature(encoder.forward).parameters
    return _collate(read, prepare, encoder, limit=limit, unit="seconds", cut=cut)


def _window(extractor: Any) -> float:
    """Return how many samples an extractor looks at, infinity for all: longer ones it cuts silently, or at random."""
    for name in ("n_samples", "nb_max_samples"):  # Whisper, CLAP
        if isinstance(samples := getattr(extractor, name, None), int):
            return samples
    if hasattr(extractor, "num_mel_bins") and isinstance(frames := getattr(extractor, "max_length", None), int):
        return (0.01 * (frames - 1) + 0.025) * extractor.sampling_rate  # AST's of 25 ms, each 10 ms after the last
    return float("inf")


def _frames(owner: nn.Module, samples: int) -> int:
    found = getattr(owner, LENGTHS[0])(torch.tensor([samples]))
    return int(found[0] if isinstance(found, tuple) else found)


PREPARATIONS = {
    "text": ("AutoTokenizer", _text),
    "vision": ("AutoImageProcessor", _vision),
    "speech": ("AutoFeatureExtractor", _speech),
}
