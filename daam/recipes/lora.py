"""LoRA and LoRA+ on the encoder itself, by Hugging Face peft: what decoders on frozen features are compared with."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

import daam
from daam.recipes.cache import Cache, fingerprint
from daam.recipes.data import encode_labels, hash_examples, read_examples
from daam.recipes.encoders import load_encoder, padding_shows
from daam.recipes.train import Job, RunError, Settings, trainable

RANK, ALPHA = 8, 16
B_RATE = 16  # LoRA+: the rate of the B matrices, in rates of the others (arXiv 2402.12354)


class LoRAClassifier(nn.Module):
    """An encoder with adapters on the linear modules of its layers; its last layer, averaged over positions, is
    classified.
    """

    def __init__(self, pooling: daam.LayerPooling, features: int, classes: int):
        super().__init__()
        try:
            from peft import LoraConfig, inject_adapter_in_model
        except ImportError as error:
            raise ImportError(f"{error}. The recipes need their extra: pip install 'daam-triton[recipes]'") from error
        self.pooling = pooling
        inside = {id(module) for layer in pooling.layers for module in layer.modules()}
        linear = [n for n, m in pooling.encoder.named_modules() if isinstance(m, nn.Linear) and id(m) in inside]
        config = LoraConfig(r=RANK, lora_alpha=ALPHA, lora_dropout=0.0, target_modules=linear)
        inject_adapter_in_model(config, pooling.encoder)
        self.classify = nn.Linear(features, classes)

    def forward(self, **batch: Tensor) -> Tensor:
        return self.classify(self.pooling.average(**batch)[:, -1])

    def freeze_unused(self, inputs: dict[str, Tensor]) -> None:
        """Adapters that a module bypasses, as WavLM's attention does, learn nothing: they are no trainable
        parameters.
        """
        self(**inputs).sum().backward()
        for p in trainable(self):
            p.requires_grad_(p.grad is not None)
            p.grad = None


def lora_job(data: Path, encoder: str, cache: Cache, settings: Settings) -> Job:
    """The examples and labels of a cache, through the encoder it was made with."""
    modality, examples = read_examples(data)
    about = cache.about
    if hash_examples(examples) != about["examples_sha256"] or encoder != about["encoder"]:
        raise RunError(
            f"{data} through {encoder} is not what the cache was made of: {about['examples']} examples of "
            f"{about['source']} through {about['encoder']}"
        )
    names = {"layers": "layer_list", "max_length": "max_length"}
    how = {key: about[name] for key, name in names.items() if about.get(name) is not None}
    sources, labels = [example.source for example in examples], encode_labels(examples, cache.names)
    pooling, collate = load_encoder(encoder, modality, **how)
    if padding_shows(pooling.encoder):
        raise RunError(f"features of {encoder} depend on what a batch is padded with: LoRA would learn that")

    def inputs(places: Tensor) -> dict[str, Tensor]:
        return collate([sources[i] for i in places.tolist()])

    return Job(
        _builder(encoder, modality, how, cache, inputs),
        inputs,
        labels,
        fingerprint(cache),
        rates_plus if settings.method == "lora+" else Job.rates,
    )


def _builder(encoder: str, modality: str, how: dict, cache: Cache, inputs: Callable) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        pooling, _ = load_encoder(encoder, modality, **how)
        model = LoRAClassifier(pooling, cache.features.shape[2], len(cache.names))
        model.freeze_unused(inputs(torch.arange(1)))
        return model

    return build


def rates_plus(model: nn.Module, rate: float) -> list[dict]:
    """LoRA+'s groups of parameters."""
    fast = [p for name, p in model.named_parameters() if p.requires_grad and "lora_B" in name]
    slow = [p for name, p in model.named_parameters() if p.requires_grad and "lora_B" not in name]
    return [{"params": slow, "lr": rate}, {"params": fast, "lr": B_RATE * rate}]
