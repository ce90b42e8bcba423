"""Try the recipes on tiny random encoders of many Hugging Face families and write down which work, and how.

    python -m bench.encoders --output ENCODERS.md [--only BERT ViT]

Each family of `bench.tiny_encoders` is made from its configuration, saved with a tokenizer or a processor of its kind,
loaded as a user's folder is, and compared with an average over positions that shares no code with this project. Next
to the table comes a file of the same name in JSON, with versions and all measured differences.
"""

from __future__ import annotations

import argparse
import copy
import inspect
import json
import os
import tempfile
import time
import warnings
import wave
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # read when transformers is imported: nothing here downloads

import numpy as np
import tokenizers
import torch
import transformers
from PIL import Image
from torch import Tensor, nn

from bench.tiny_encoders import ENTRIES, SIZES, TOKENS, Entry
from daam.pooling import LayerPooling
from daam.recipes.encoders import load_encoder

TEXTS = [
    "rain",
    "the sun is out again",
    "we took the night train to the sea",
    "bread , salt , oil and a slow fire : that is all the soup needs",
    "snow is on the road and no train will go over the hill to the town today",
    "a cold sea",
    "a long way",
    "at night the road to the old town was cold and long , so we took the train that goes along the sea , and there we "
    "had bread and soup by the fire until the sun was out again and the wind over the hill was slow",
]
SIZES_OF_IMAGES = [(32, 32), (48, 32), (32, 64), (37, 51), (32, 32), (90, 40)]
SAMPLES = [2600, 4000, 9000, 16000, 4000, 3300]
MAX_LENGTH = 128
TOLERANCE = 1e-5  # absolute, and of a layer's standard deviation

LEGEND = """# Encoders that were tried

Tiny random ones of Hugging Face, by family, read as `daam.recipes.features` reads a folder. Made by `python -m
bench.encoders --output bench/history/encoders.md`; what was measured stands in encoders.json.

- works: features equal an average over valid positions that shares no code with this project, to 1e-5 of 1 and of a
  layer's standard deviation, alone and in a batch.
- equal lengths, one at a time: they do so in such batches, and differ in others; `features` measures that and goes so.
- beside others: what `features` measures before it starts, the largest difference between an example alone and beside
  the longest one, in standard deviations; from 1e-4 on examples of equal lengths share a batch, or none do.
  `daam.encoder_check` says where it comes from.
- with layers=…: the option that it takes; of hierarchical encoders the layers of one stage.
- not: with the error that a user sees."""

Sources = list[Any]


# examples


def make_sources(folder: Path) -> dict[str, Sources]:
    """Write images and sounds into a folder and return the sources of each modality."""
    random = np.random.default_rng(0)
    images, sounds = [], []
    for i, size in enumerate(SIZES_OF_IMAGES):
        images.append(folder / f"{i}.png")
        Image.fromarray(random.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)).save(images[-1])
    for i, count in enumerate(SAMPLES):
        sounds.append(folder / f"{i}.wav")
        with wave.open(str(sounds[-1]), "wb") as file:
            file.setparams((1, 2, 16000, 0, "NONE", ""))
            file.writeframes(random.normal(0, 3000 / (1 + i), count).astype("<i2").tobytes())
    return {"text": TEXTS, "vision": images, "speech": sounds}


# folders


def build(entry: Entry, modality: str, folder: Path) -> nn.Module:
    """Save a random encoder and its preprocessing into a folder, and return the encoder."""
    model = getattr(transformers, entry.model)
    config = model.config_class
    tokenizer, ids = None, {}
    if modality == "text":
        tokenizer = make_tokenizer(entry.prepare)
        ids = {f"{name}_id": getattr(tokenizer, f"{name}_id") for name in ("pad_token", "bos_token", "eos_token")}
        ids["vocab_size"] = len(tokenizer)
    torch.manual_seed(0)
    encoder = model(_configure(config, ids, entry.config)).eval()
    _randomise(encoder)
    encoder.save_pretrained(folder)
    if tokenizer is None:
        kind, options = entry.prepare
        tokenizer = getattr(transformers, kind)(**options)
    tokenizer.save_pretrained(folder)
    return encoder


def make_tokenizer(kind: Any) -> Any:
    """Return a tokenizer of a kind of `TOKENS`, of a vocabulary file, or of a class; all know the words of `TEXTS`."""
    if isinstance(kind, tuple):
        options = dict(kind[1])
        if "Qwen2" in kind[0]:  # bytes
            alphabet = [*sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()), "<|endoftext|>"]
            options = {"vocab": {token: i for i, token in enumerate(alphabet)}, "merges": []}
        return getattr(transformers, kind[0])(model_max_length=MAX_LENGTH, **options)
    specials, template, names = TOKENS["bert" if kind == "vocab.txt" else kind]
    words = [*specials.values(), *sorted({word for text in TEXTS for word in text.split()})]
    vocabulary = {word: i for i, word in enumerate(words)}
    if kind == "vocab.txt":
        return transformers.BertTokenizer(vocab=vocabulary, model_max_length=MAX_LENGTH)
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token=specials["unk_token"]))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    backend.post_processor = tokenizers.processors.TemplateProcessing(
        single=template, special_tokens=[(word, vocabulary[word]) for word in specials.values()]
    )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, model_input_names=list(names), model_max_length=MAX_LENGTH, **specials
    )


def _configure(kind: Any, ids: dict[str, int], changes: dict[str, Any]) -> Any:
    """Return a configuration of tiny sizes; of `SIZES` and of the tokenizer's ids it gets what it knows."""
    known = set(getattr(kind, "__dataclass_fields__", ())) | set(kind.attribute_map)
    values = {k: v for k, v in changes.items() if not isinstance(v, dict)}
    taken = {kind.attribute_map.get(k, k) for k in values}
    sizes = {k: v for k, v in (SIZES | ids).items() if k in known and kind.attribute_map.get(k, k) not in taken}
    parts = {k: _configure(kind.sub_configs[k], ids, v).to_dict() for k, v in changes.items() if isinstance(v, dict)}
    return kind(**sizes | values | parts)


def _randomise(encoder: nn.Module) -> None:
    """Draw weights so wide that positions and layers matter: as small as usual, they would hide faults."""
    with torch.no_grad():
        for name, p in encoder.named_parameters():
            if not p.is_floating_point():
                continue
            if p.dim() < 2:
                p.add_(0.1 * torch.randn_like(p))
            elif p.shape[0] == 1 or "embed" in name:
                p.normal_(0, 0.5)
            else:
                p.normal_(0, (p.shape[0] / p.numel()) ** 0.5)


# independent average


def expected(entry: Entry, modality: str, folder: Path, sources: Sources) -> Tensor:
    """Return (examples, layers, features) in double precision: averages over valid positions of each example alone.

    The average is of `output_hidden_states`, or of what layers gave to hooks of this function, as the entry says.
    """
    encoder = find_part(transformers.AutoModel.from_pretrained(folder).eval(), entry.part)
    taken = inspect.signature(encoder.forward).parameters
    prepare = preprocessing(modality, folder)
    rows = []
    for source in sources:
        batch = prepare([source])
        inputs = {name: value for name, value in batch.items() if name in taken and name not in entry.without}
        # some switch to another kind of attention after a short example, for good
        outputs = _outputs(copy.deepcopy(encoder), inputs, entry.hooks)
        layers = [_mean(output, entry, batch) for output in outputs]
        if len(widths := sorted({len(layer) for layer in layers})) > 1:
            raise ValueError(f"layers differ in width: {', '.join(map(str, widths))}")
        rows.append(torch.stack(layers))
    return torch.stack(rows)


def find_part(model: nn.Module, path: str) -> nn.Module:
    """Return a submodule, or what a method without arguments returns, of a model."""
    for step in filter(None, path.split(".")):
        model = getattr(model, step.removesuffix("()"))() if step.endswith("()") else getattr(model, step)
    return model


def preprocessing(modality: str, folder: Path) -> Any:
    """Return a function from sources to a batch, padded and with a mask where there are lengths."""
    if modality == "text":
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
        return lambda texts: tokenizer(texts, padding=True, truncation=True, max_length=MAX_LENGTH, return_tensors="pt")
    if modality == "vision":
        processor = transformers.AutoImageProcessor.from_pretrained(folder)
        return lambda paths: processor([Image.open(path).convert("RGB") for path in paths], return_tensors="pt")
    extractor = transformers.AutoFeatureExtractor.from_pretrained(folder)
    # those of Whisper's kind take windows of one length only
    padding = "max_length" if isinstance(extractor, transformers.WhisperFeatureExtractor) else True
    return lambda paths: extractor(
        [_samples(path) for path in paths], sampling_rate=16000, padding=padding, return_attention_mask=True,
        return_tensors="pt",
    )  # fmt: skip


def _samples(path: Path) -> np.ndarray:
    with wave.open(str(path), "rb") as file:
        return np.frombuffer(file.readframes(file.getnframes()), "<i2").astype(np.float32) / 2**15


@torch.no_grad()
def _outputs(encoder: nn.Module, batch: Any, hooks: str) -> list[Tensor]:
    """Return what each layer gives for a batch of one."""
    given: list[Tensor] = []
    kept = [
        layer.register_forward_hook(lambda _, __, out: given.append(out if isinstance(out, Tensor) else out[0]))
        for layer in (encoder.get_submodule(hooks) if hooks else ())
    ]
    states = encoder(**batch, **({} if hooks else {"output_hidden_states": True}))
    for handle in kept:
        handle.remove()
    return given if hooks else list(states.hidden_states[1:])


def _mean(output: Tensor, entry: Entry, batch: Any) -> Tensor:
    """Return the average of a batch of one over its valid positions, (features,)."""
    output = output.double().movedim(entry.layout.index("f"), -1).flatten(0, -2)
    if entry.valid:
        mask = next(v for k, v in batch.items() if k.endswith("attention_mask"))[0, :: entry.valid]
        output = output[: len(mask)][mask.bool()]
    return output.mean(0)


# verdict


def verdict(entry: Entry, modality: str, folder: Path, sources: Sources) -> dict[str, Any]:
    """Return how an encoder in a folder can be read with the recipes: a verdict, a reason, and what was measured.

    Ways are tried in turn until one gives the averages of examples alone: without options, with the entry's `layers`,
    and a pooling of the part that the entry names. Then examples together are compared with the same averages.
    """
    want = expected(entry, modality, folder, sources)
    found: dict[str, Any] = {"layers": want.shape[1], "features": want.shape[2]}
    for way, load in _ways(entry, modality, folder).items():
        try:
            measured = _measure(load, sources, want)
        except Exception as error:  # any kind: the table names it
            measured = {"reason": _one_line(error)}
        found.setdefault("tried", {})[way] = measured
        if measured.get("alone", np.inf) <= 1:
            batches = _batches(measured)
            if {"works": "any"}.get(batches, batches) != measured["check"]:
                found["reason"] = f"the check says: {measured['check']}"
            return found | {"verdict": ": ".join(filter(None, (way, batches)))}
    last = list(found["tried"].values())[-1]
    return found | {"verdict": "not", "reason": last.get("reason") or f"alone {last['alone_sd']:.1g} sd off"}


def _ways(entry: Entry, modality: str, folder: Path) -> dict[str, Callable[[], tuple[nn.Module, Callable]]]:
    """Return ways to load a pooling and its collate function from a folder, by what the table calls them."""
    ways: dict[str, Callable] = {"": lambda: load_encoder(str(folder), modality)}
    if entry.layers:
        ways[f"with layers={entry.layers}"] = lambda: load_encoder(str(folder), modality, entry.layers)
    if entry.part:

        def load_part() -> tuple[nn.Module, Callable]:
            part = find_part(transformers.AutoModel.from_pretrained(folder), entry.part)
            return LayerPooling(part, entry.hooks or None), preprocessing(modality, folder)

        ways[f"as {entry.part}"] = load_part
    return ways


def _measure(load: Callable, sources: Sources, want: Tensor) -> dict[str, Any]:
    """Return differences from the averages: in multiples of what rounding explains, and in standard deviations."""
    pooling, collate = load()
    findings = pooling.check(collate, sources)  # first: it also finds out where positions come first
    std = want.std((0, 2), keepdim=True)

    def compare(name: str, features: Tensor, averages: Tensor) -> dict[str, float]:
        difference = (features.double() - averages).abs()
        multiple = (difference / (TOLERANCE * (1 + std))).max().item()
        return {name: multiple, f"{name}_sd": (difference / std).max().item()}

    alone = torch.cat([pooling(**collate([source])) for source in sources])
    if alone.shape != want.shape:
        shapes = f"{tuple(alone.shape)}, expected {tuple(want.shape)}"
        raise ValueError(f"{len(sources)} examples alone have features {shapes}")
    checked = {"check": findings.batches, "padding": findings.padding}
    measured: dict[str, Any] = {**checked, **compare("alone", alone, want)}
    for name, rows in {"together": range(len(sources)), "equal": _equal(sources)}.items():
        try:
            features = pooling(**collate([sources[i] for i in rows]))
        except Exception as error:  # fails on several at a time: said in the table
            measured[f"{name}_reason"] = _one_line(error)
        else:
            measured |= compare(name, features, want[list(rows)])
    return measured


def _equal(sources: Sources) -> tuple[int, int]:
    """Return two examples of the same length."""
    sizes = [len(s) if isinstance(s, str) else s.stat().st_size for s in sources]
    return next((i, j) for j, size in enumerate(sizes) for i in range(j) if sizes[i] == size)


def _batches(measured: dict[str, Any]) -> str:
    if measured.get("together", np.inf) <= 1:
        return "works"
    return "equal lengths" if measured.get("equal", np.inf) <= 1 else "one at a time"


def _one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:200]


# command


def run(entry: Entry, modality: str, sources: Sources) -> dict[str, Any]:
    """Return a row of the table; what raises ends this row only."""
    row = {"family": entry.name, "modality": modality, "model": entry.model, "note": entry.note}
    row["average"] = f"hooks on {entry.hooks}" if entry.hooks else "hidden states"
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        try:
            build(entry, modality, Path(folder))
        except Exception as error:  # any kind: the table names it
            return row | {"verdict": "not built", "reason": _one_line(error)}
        try:
            row |= verdict(entry, modality, Path(folder), sources)
        except Exception as error:  # of the independent average
            row |= {"verdict": "not", "reason": _one_line(error)}
    for result in (row, *row.get("tried", {}).values()):
        if "reason" in result:
            result["reason"] = result["reason"].replace(f"{folder}: ", "")
    return row | {"seconds": round(time.perf_counter() - start, 2)}


def _beside(row: dict[str, Any]) -> str:
    """Return in words what the check measured of examples in one batch, in the way that a row's verdict is about."""
    measured = list(row.get("tried", {}).values())[-1:]
    if not measured or "check" not in measured[0] or row["verdict"] == "not":
        return ""
    padding = measured[0]["padding"]
    return "a batch fails" if padding is None else f"{padding:.0e}"


def write(rows: list[dict[str, Any]], path: Path) -> None:
    """Write the table, and beside it all that was measured as JSON."""
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    path.with_suffix(".json").write_text(json.dumps({"versions": versions, "rows": rows}, indent=1) + "\n")
    lines = [
        LEGEND,
        "",
        "| family | modality | model | layers x features | verdict | beside others | notes |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        size = f"{row['layers']} x {row['features']}" if "layers" in row else ""
        notes = "; ".join(filter(None, (row.get("reason"), row["note"]))).replace("|", "\\|")
        cells = (row["family"], row["modality"], row["model"], size, row["verdict"], _beside(row), notes)
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["", ", ".join(f"{name} {version}" for name, version in versions.items())]
    path.write_text("\n".join(lines) + "\n")


def main(argv: list[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="python -m bench.encoders", description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--output", required=True, type=Path, metavar="FILE.md", help="the table; JSON comes next to it"
    )
    parser.add_argument("--only", nargs="+", metavar="NAME", help="families by their name in the table")
    args = parser.parse_args(argv)
    names = {entry.name for entries in ENTRIES.values() for entry in entries}
    if unknown := set(args.only or ()) - names:
        parser.error(f"no such family: {', '.join(sorted(unknown))}; there are {', '.join(sorted(names))}")
    torch.set_num_threads(1)  # the encoders are too small for more
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    warnings.filterwarnings("ignore", module="(torch|transformers)")
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        sources = make_sources(Path(folder))
        for modality, entries in ENTRIES.items():
            for entry in entries:
                if args.only is None or entry.name in args.only:
                    rows.append(run(entry, modality, sources[modality]))
                    print(f"{entry.name:30} {rows[-1]['verdict']:20} {rows[-1].get('reason', '')}", flush=True)
    write(rows, args.output)


if __name__ == "__main__":
    main()
