"""Models of a finished run: what training saved, whichever method it was, built and loaded again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from daam.checks import lacks_memory
from daam.decoder import DATDecoder
from daam.pooling import LayerPooling
from daam.recipes.cache import COLUMNS
from daam.recipes.errors import extra
from daam.recipes.extraction import load_encoder_of
from daam.recipes.lora import LoRAClassifier
from daam.recipes.methods import LORA, decoder_for
from daam.recipes.runs import RunError, read_results
from daam.transformer import read_settings

with extra():
    from safetensors.torch import load_file

AGAIN = "run daam.recipes.train again"


def read_finished(folder: str | Path) -> dict[str, Any]:
    """Return the results of a finished run, as results.json holds them; raise a RunError where there are none, or they
    are broken.
    """
    path = Path(folder) / "results.json"
    if not path.exists():
        raise RunError(
            f"{path} does not exist: expected the folder of a run that daam.recipes.train has finished, or of a method "
            "in a comparison"
        )
    return read_results(Path(folder))


def cache_of(results: dict[str, Any]) -> dict[str, Any]:
    """Return what the results of a run say of its cache: encoder, preparation, sizes; see `extraction.load_encoder_of`.
    Raise a RunError where they say nothing, as those of a run on features of one's own.
    """
    about = results["about"].get("cache")
    keys = ("encoder", "modality", "layers", "features")
    if not isinstance(about, dict) or any(about.get(key) is None for key in keys):
        raise RunError(
            "the results do not say which encoder the features came from: expected a run on a cache that "
            "daam.recipes.features made"
        )
    return about


def columns_of(results: dict[str, Any], text: str | None, label: str | None = None) -> tuple[str, str]:
    """Return the columns of texts and labels: as given, else as in the table that a run trained on."""
    columns = cache_of(results).get("columns", COLUMNS)
    return columns[0] if text is None else text, columns[1] if label is None else label


def load_model(run: str | Path, part: int, pooling: LayerPooling | None = None) -> nn.Module:
    """Return the model that a run trained on a part, counted from 0, in eval mode: scores of the classes, (batch,
    classes), of x, (batch, layers, features) in fp32, the layers that the run used. Its attribute names are the names
    of the classes. A model of LoRA takes a batch instead, by name, as the collate of `load_encoder_of` makes it.

    pooling: for LoRA, the encoder, into which adapters are put; None: it is loaded from where it was.

    Raises:
        RunError: the run is not finished, it has no such part, or its file is missing, broken, of another run or of an
            earlier version. EncoderError: see `load_encoder_of`.
    """
    results = read_finished(run)
    settings = _read_settings(Path(run), part, results)
    names, method = settings.pop("names"), settings.pop("method", None)
    path = _path(Path(run), part)
    if method in LORA and pooling is None:
        pooling = load_encoder_of(cache_of(results))[0]
    try:
        model = _build(method, settings, pooling)
    except (TypeError, ValueError, RuntimeError) as error:  # settings of another version, or no settings at all
        if lacks_memory(error):
            raise
        raise RunError(f"{path} cannot be built ({error}): {AGAIN}") from None
    model.names = names
    _load(model, path)
    return model.eval()


def _build(method: str | None, settings: dict[str, Any], pooling: LayerPooling | None) -> nn.Module:
    """Return the model of a method, None that of density attention, with new parameters."""
    if method in LORA:
        return LoRAClassifier(pooling, **settings)
    return DATDecoder(**settings) if method is None else decoder_for(method, **settings)


def load_part(model: nn.Module, run: str | Path, part: int) -> None:
    """Load what a run trained on a part into a model that `load_model` built for another part of it, and raise a
    RunError as that does.
    """
    _read_settings(Path(run), part, read_finished(run))
    _load(model, _path(Path(run), part))


def _path(run: Path, part: int) -> Path:
    return run / f"part-{part}.safetensors"


def _read_settings(run: Path, part: int, results: dict[str, Any]) -> dict[str, Any]:
    """Return what builds the model of a part; raise a RunError where its file is not one of this run's."""
    path, count = _path(run, part), len(results["parts"])
    if not 0 <= part < count:
        raise RunError(f"--part is {part}, expected 0 to {count - 1}, those of {run}")
    try:
        settings = read_settings(path)
    except Exception as error:  # no file, no safetensors, no JSON: each fails in a way of its own
        raise RunError(f"{path} cannot be read ({type(error).__name__}): {AGAIN}") from None
    if "names" not in settings:
        raise RunError(f"{path} is of an earlier version, it does not name the classes: {AGAIN}")
    about, layers = results["about"].get("cache") or {}, results["settings"]["layers"]
    expected = {"names": results["names"], "layers": len(layers) or about.get("layers"),
                "features": about.get("features")}  # fmt: skip
    for key, value in expected.items():
        found = settings.get(key, settings.get(f"num_{key}"))
        if None not in (found, value) and found != value:
            raise RunError(f"{path} is of another run: its {key} are {found}, expected {value}")
    return settings


def _load(model: nn.Module, path: Path) -> None:
    """Load the tensors of a file into a model; raise a RunError where they are not its own."""
    try:
        tensors = load_file(path)
        model.load_state_dict(tensors, strict=False)
    except Exception as error:  # a truncated file, tensors of other sizes
        raise RunError(f"{path} cannot be read ({type(error).__name__}): {AGAIN}") from None
    # adapters that a module bypasses are not trained, and do nothing
    wanted = {name for name in model.state_dict() if name in tensors or "lora_" not in name}
    if differ := wanted ^ tensors.keys():
        raise RunError(f"{path} is of another model: it differs by {', '.join(sorted(differ)[:3])}: {AGAIN}")
