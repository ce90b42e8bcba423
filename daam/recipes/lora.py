"""LoRA and LoRA+ on the encoder itself, by Hugging Face peft: what decoders on frozen features are compared with."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import daam
from daam.recipes.cache import COLUMNS, Cache, fingerprint
from daam.recipes.data import read_examples
from daam.recipes.errors import extra
from daam.recipes.examples import encode_labels, hash_examples
from daam.recipes.extraction import check, load_encoder_of
from daam.recipes.jobs import Job, trainable
from daam.recipes.runs import RunError, Settings
from daam.recipes.splits import equal_in

RANK, ALPHA = 8, 16
B_RATE = 16  # LoRA+: the rate of the B matrices, in rates of the others (arXiv 2402.12354)


class LoRAClassifier(nn.Module):
    """Classify an encoder's last layer, averaged over positions; put adapters into the linear modules of its layers.

    Its state holds what training changes alone, adapters and classifier: the encoder has files of its own.
    """

    def __init__(self, pooling: daam.LayerPooling, features: int, classes: int, rank: int = RANK, alpha: int = ALPHA):
        super().__init__()
        self.settings = {"method": "lora", "features": features, "classes": classes, "rank": rank, "alpha": alpha}
        with extra():
            from peft import LoraConfig
            from peft.functional import cast_adapter_dtype, inject_adapter_in_model
        self.pooling = pooling
        config = LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=0.0, target_modules=linear_modules(pooling))
        inject_adapter_in_model(config, pooling.encoder)
        # injected in the encoder's dtype: in half precision small steps are lost, and AdamW's division is 0 / 0
        cast_adapter_dtype(pooling.encoder, "default")
        self.classify = nn.Linear(features, classes, dtype=torch.float32)

    def forward(self, **batch: Tensor) -> Tensor:
        """Return the scores of the classes, (batch, classes), of a batch as the encoder takes it."""
        last = self.pooling.average(**batch)[:, -1]
        return self.classify(last.to(self.classify.weight.dtype))

    def state_dict(self, *args: Any, **options: Any) -> dict[str, Tensor]:
        """Return the tensors that training changes, by name."""
        trained = {name for name, p in self.named_parameters() if p.requires_grad}
        return {name: t for name, t in super().state_dict(*args, **options).items() if name in trained}

    def freeze_unused(self, inputs: dict[str, Tensor]) -> None:
        """Freeze adapters that get no gradient from a batch: a module bypasses them, as WavLM's attention does. They
        learn nothing, and do not count as trainable.
        """
        self(**inputs).sum().backward()
        for p in trainable(self):
            p.requires_grad_(p.grad is not None)
            p.grad = None


def linear_modules(pooling: daam.LayerPooling) -> list[str]:
    """Return the names of the linear modules in an encoder's layers."""
    inside = {id(module) for layer in pooling.layers for module in layer.modules()}
    modules = pooling.encoder.named_modules()
    return [name for name, module in modules if isinstance(module, nn.Linear) and id(module) in inside]


def lora_job(data: Path, encoder: str, cache: Cache, settings: Settings) -> Job:
    """Return the job that trains adapters on the encoder and the examples that a cache was made with. Raise a RunError
    where they are others, where features depend on the batch, or where layers have no linear modules; an EncoderError
    where the encoder is another.
    """
    about = cache.about
    # parts of a folder are folders in it, whatever the cache calls them
    split = None if Path(data).is_dir() else about.get("split")
    text, label = about.get("columns", COLUMNS)
    _, examples = read_examples(data, groups=about.get("groups"), split=split, text=text, label=label)
    if hash_examples(examples) != about.get("examples_sha256"):
        raise RunError(
            f"--data {data} through --encoder {encoder} is not what the cache was made of: {len(cache.labels)} "
            f"examples of {about.get('source')} through {about.get('encoder')}"
        )
    sources, labels = [example.source for example in examples], encode_labels(examples, cache.names)
    pooling, collate = load_encoder_of(about, encoder)
    findings = check(pooling, collate, examples, about)
    if findings is not None and findings.batches != "any":
        raise RunError(f"features of {encoder} depend on the batch they stand in: LoRA would learn that ({findings})")
    if not linear_modules(pooling):
        raise RunError(f"the layers of {encoder} have no linear modules, which --method {settings.method} adapts")

    def inputs(places: Tensor) -> dict[str, Tensor]:
        return collate([sources[i] for i in places.tolist()])

    build = partial(_build, encoder, cache, inputs, pooling.batch_first)
    rates = rates_plus if settings.method == "lora+" else Job.rates
    return Job(
        build, inputs, labels, cache.names, fingerprint(cache), rates, equal=equal_in(cache),
        groups=cache.groups, parts=cache.parts,
    )  # fmt: skip


def _build(encoder: str, cache: Cache, inputs: Callable, batch_first: bool | None) -> LoRAClassifier:
    pooling, _ = load_encoder_of(cache.about, encoder)
    pooling.batch_first = batch_first
    model = LoRAClassifier(pooling, cache.features.shape[2], len(cache.names))
    model.freeze_unused(inputs(torch.arange(1)))
    return model


def rates_plus(model: nn.Module, rate: float) -> list[dict]:
    """Return the trainable parameters in groups for AdamW, as LoRA+ has them: those of the B matrices learn faster."""
    fast = [p for name, p in model.named_parameters() if p.requires_grad and "lora_B" in name]
    slow = [p for name, p in model.named_parameters() if p.requires_grad and "lora_B" not in name]
    return [{"params": slow, "lr": rate}, {"params": fast, "lr": B_RATE * rate}]
