"""LoRA and LoRA+ on the encoder itself, by Hugging Face peft: what decoders on frozen features are compared with."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor, nn

import daam
from daam.recipes.cache import Cache
from daam.recipes.data import encode_labels, hash_examples, read_examples
from daam.recipes.encoders import load_encoder
from daam.recipes.train import Job, RunError, Settings

RANK, ALPHA = 8, 16
B_RATE = 16  # LoRA+: the rate of the B matrices, in rates of the others (arXiv 2402.12354)


class LoRAClassifier(nn.Module):
    """An encoder with adapters on its linear layers; its last layer, averaged over positions, is classified."""

    def __init__(self, pooling: daam.LayerPooling, features: int, classes: int):
        super().__init__()
        try:
            from peft import LoraConfig, inject_adapter_in_model
        except ImportError as error:
            raise ImportError(f"{error}. The recipes need their extra: pip install 'daam-triton[recipes]'") from error
        self.pooling = pooling
        config = LoraConfig(r=RANK, lora_alpha=ALPHA, lora_dropout=0.0, target_modules="all-linear")
        inject_adapter_in_model(config, pooling.encoder)
        self.classify = nn.Linear(features, classes)

    def forward(self, **batch: Tensor) -> Tensor:
        return self.classify(self.pooling.average(**batch)[:, -1])


def lora_job(data: Path, encoder: str, cache: Cache, settings: Settings) -> Job:
    """The examples and labels of a cache, through the encoder it was made with."""
    modality, examples = read_examples(data)
    if hash_examples(examples) != cache.about["examples_sha256"] or encoder != cache.about["encoder"]:
        raise RunError(
            f"{data} through {encoder} is not what the cache was made of: {cache.about['examples']} examples of "
            f"{cache.about['source']} through {cache.about['encoder']}"
        )
    how = {key: cache.about[name] for key, name in (("layers", "layer_list"), ("max_length", "max_length"))
           if cache.about.get(name) is not None}  # fmt: skip

    def build() -> nn.Module:
        pooling, _ = load_encoder(encoder, modality, **how)
        return LoRAClassifier(pooling, cache.features.shape[2], len(cache.names))

    _, collate = load_encoder(encoder, modality, **how)
    sources, labels = [example.source for example in examples], encode_labels(examples, cache.names)
    return Job(
        build,
        lambda places: collate([sources[i] for i in places.tolist()]),
        labels,
        rates_plus if settings.method == "lora+" else Job.rates,
    )


def rates_plus(model: nn.Module, rate: float) -> list[dict]:
    """LoRA+'s groups of parameters."""
    fast = [p for name, p in model.named_parameters() if p.requires_grad and "lora_B" in name]
    slow = [p for name, p in model.named_parameters() if p.requires_grad and "lora_B" not in name]
    return [{"params": slow, "lr": rate}, {"params": fast, "lr": B_RATE * rate}]
