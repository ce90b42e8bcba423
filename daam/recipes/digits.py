"""Density attention over the layers of a frozen encoder, on scikit-learn's handwritten digits.

A small transformer encoder learns the digits 0-4 and is frozen. The mean-pooled hidden states of all its layers,
(images, layers, features), then feed decoders that learn the digits 5-9: density attention over the layers, beside two
linear probes and standard attention.

    python -m daam.recipes.digits --output demo-output

Written to be copied: replace `load_digits` and `Encoder` by your data and your encoder, and keep `pooled_layers` and
`DAAMDecoder`.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

try:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split
    from tqdm import tqdm
except ImportError as error:
    raise ImportError(f"{error}. The recipes need their extra: pip install 'daam-triton[recipes]'") from error

import daam

LAYERS, FEATURES, HEADS, CLASSES = 12, 64, 4, 5  # 4 heads over 12 layers: chunks of 3


class Encoder(nn.Module):
    """A pre-norm transformer over the 16 patches of 2 x 2 pixels of an image: all layers' hidden states."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(4, FEATURES)
        self.position = nn.Parameter(0.02 * torch.randn(16, FEATURES))
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(FEATURES, 4, 2 * FEATURES, dropout=0.0, batch_first=True, norm_first=True)
            for _ in range(LAYERS)
        )

    def forward(self, images: Tensor) -> list[Tensor]:
        patches = images.reshape(-1, 4, 2, 4, 2).transpose(2, 3).reshape(-1, 16, 4)
        hidden = [self.embed(patches) + self.position]
        for layer in self.layers:
            hidden.append(layer(hidden[-1]))
        return hidden[1:]


def pooled_layers(encoder: nn.Module, images: Tensor) -> Tensor:
    """(images, layers, features): the hidden states of a frozen encoder, averaged over positions layer by layer."""
    encoder.eval()
    with torch.no_grad():
        return torch.stack([hidden.mean(1) for hidden in encoder(images)], dim=1)


class DAAMDecoder(nn.Module):
    """Density attention over the layers, then a linear classifier on all of them."""

    def __init__(self, backend: str = "auto") -> None:
        super().__init__()
        self.attention = daam.MultiHeadDAAM(FEATURES, HEADS, backend=backend)
        self.classify = nn.Linear(LAYERS * FEATURES, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.classify(self.attention(x).flatten(1))


class MHADecoder(nn.Module):
    """Standard attention over the layers, then the same classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(FEATURES, HEADS, batch_first=True)
        self.classify = nn.Linear(LAYERS * FEATURES, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.classify(self.attention(x, x, x, need_weights=False)[0].flatten(1))


class LinearProbe(nn.Module):
    """A linear classifier on some of the layers."""

    def __init__(self, first: int) -> None:
        super().__init__()
        self.first = first
        self.classify = nn.Linear((LAYERS - first) * FEATURES, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.classify(x[:, self.first :].flatten(1))


def decoders(backend: str) -> dict[str, Callable[[], nn.Module]]:
    return {
        "density attention": lambda: DAAMDecoder(backend),
        "nn.MultiheadAttention": MHADecoder,
        "linear, all layers": lambda: LinearProbe(0),
        "linear, last layer": lambda: LinearProbe(LAYERS - 1),
    }


@dataclass
class Result:
    """One decoder: test accuracy per seed and epoch, trainable parameters, seconds a run, bytes its forward pass saves
    for backward.
    """

    name: str
    curves: list[list[float]]
    parameters: int
    seconds: float
    saved_bytes: int

    @property
    def accuracies(self) -> list[float]:
        return [curve[-1] for curve in self.curves]


def train(model: nn.Module, x: Tensor, labels: Tensor, epochs: int, batch: int, loss_of: Callable) -> Iterator[int]:
    """AdamW with a cosine schedule; yields after every epoch."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    for epoch in range(epochs):
        model.train()
        for indices in torch.randperm(len(x), device=x.device).split(batch):
            optimizer.zero_grad()
            loss_of(model, x[indices], labels[indices]).backward()
            optimizer.step()
        schedule.step()
        yield epoch


def train_encoder(images: Tensor, labels: Tensor, epochs: int) -> Encoder:
    """An encoder that has learned the given digits: its last layer, pooled, under a linear classifier that is thrown
    away.
    """
    model = nn.ModuleDict({"encoder": Encoder(), "classify": nn.Linear(FEATURES, CLASSES)}).to(images.device)

    def loss_of(model: nn.ModuleDict, images: Tensor, labels: Tensor) -> Tensor:
        return cross_entropy(model["classify"](model["encoder"](images)[-1].mean(1)), labels)

    for _ in tqdm(train(model, images, labels, epochs, 64, loss_of), total=epochs, desc="encoder on digits 0-4"):
        pass
    return model["encoder"].requires_grad_(False)


def bytes_saved(model: nn.Module, x: Tensor) -> int:
    """Bytes that a forward pass keeps for its backward pass: each tensor once, parameters not counted."""
    parameters = {p.data_ptr() for p in model.parameters()}
    saved: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        if t.data_ptr() not in parameters:
            saved[t.data_ptr()] = t.nbytes
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        model(x).sum()
    return sum(saved.values())


def evaluate(
    name: str, build: Callable, x: Tensor, labels: Tensor, seeds: int, epochs: int
) -> tuple[Result, nn.Module, Tensor]:
    """Train one decoder on several splits and initialisations; the last one comes back too, and the features it saw."""
    curves, started = [], time.perf_counter()
    for seed in tqdm(range(seeds), desc=name):
        torch.manual_seed(seed)
        train_at, test_at = (
            torch.tensor(part, device=x.device)
            for part in train_test_split(range(len(x)), test_size=0.5, random_state=seed, stratify=labels.cpu())
        )
        # every decoder sees the same features, standardised by the training half
        std, mean = torch.std_mean(x[train_at], dim=0)
        features = (x - mean) / (std + 1e-6)
        model, curve = build().to(x.device), []
        for _ in train(model, features[train_at], labels[train_at], epochs, 64, lambda m, a, b: cross_entropy(m(a), b)):
            model.eval()
            with torch.no_grad():
                curve.append((model(features[test_at]).argmax(1) == labels[test_at]).float().mean().item())
        curves.append(curve)
    seconds = (time.perf_counter() - started) / seeds
    parameters = sum(p.numel() for p in model.parameters())
    return Result(name, curves, parameters, seconds, bytes_saved(model, features[:64].clone())), model, features


def print_table(results: list[Result], batch: int = 64) -> None:
    header = ("decoder", "test accuracy", "trainable parameters", "seconds", f"bytes saved, batch {batch}")
    rows = []
    for r in results:
        accuracy = np.array(r.accuracies)
        rows.append(
            (
                r.name,
                f"{accuracy.mean():.3f} ± {accuracy.std():.3f}",
                f"{r.parameters:,}",
                f"{r.seconds:.1f}",
                f"{r.saved_bytes:,}",
            )
        )
    widths = [max(len(row[i]) for row in (header, *rows)) for i in range(len(header))]
    for row in (header, *rows):
        print(
            "  ".join(
                cell.ljust(width) if i == 0 else cell.rjust(width)
                for i, (cell, width) in enumerate(zip(row, widths, strict=True))
            )
        )


def plot_curves(results: list[Result], path: Path) -> None:
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    for r in results:
        curves = np.array(r.curves)
        epochs = range(1, curves.shape[1] + 1)
        axes.plot(epochs, curves.mean(0), label=r.name)
        axes.fill_between(epochs, curves.min(0), curves.max(0), alpha=0.2)
    axes.set(
        xlabel="epoch", ylabel="test accuracy, digits 5-9", title=f"Mean and range over {len(results[0].curves)} seeds"
    )
    axes.set_ylim(top=1.0)
    axes.legend(loc="lower right")
    figure.savefig(path, dpi=150)
    plt.close(figure)


def plot_gate(weights: np.ndarray, path: Path) -> None:
    """The weights of density attention, averaged over images: (layers, features), and their mean per layer."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained", width_ratios=(3, 1), sharey=True)
    image = left.imshow(weights, aspect="auto", origin="lower", cmap="viridis", extent=(0, FEATURES, 0.5, LAYERS + 0.5))
    left.set(xlabel="feature", ylabel="encoder layer", title="Mean gate")
    figure.colorbar(image, ax=left)
    right.barh(range(1, LAYERS + 1), weights.mean(1))
    right.set(xlabel="mean gate", title="Mean gate per layer", xlim=(0, 1))
    for layer in range(LAYERS // HEADS, LAYERS, LAYERS // HEADS):
        for axes in (left, right):
            axes.axhline(layer + 0.5, color="white" if axes is left else "grey", linewidth=1)  # where one head ends
    figure.savefig(path, dpi=150)
    plt.close(figure)


def positive(text: str) -> int:
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text}, expected 1 or more")
    return int(text)


def device_name(device: str) -> str:
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.machine()} CPU, {torch.get_num_threads()} threads"


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--device", default="cpu", help='where to train; "cuda" uses the kernels')
    parser.add_argument("--backend", default="auto", choices=("auto", "triton", "eager"))
    parser.add_argument(
        "--output", type=Path, default=Path("demo-output"), help="folder for the pictures and results.json"
    )
    parser.add_argument("--seeds", type=positive, default=3)
    parser.add_argument("--epochs", type=positive, default=60, help="of every decoder")
    parser.add_argument("--encoder-epochs", type=positive, default=24)
    args = parser.parse_args(argv)
    if torch.device(args.device).type == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch finds no GPU")
    torch.set_num_threads(1)  # tensors this small gain little from more, and lose much to them on a busy machine

    torch.manual_seed(0)
    data = load_digits()
    images = torch.tensor(data.images, dtype=torch.float32, device=args.device) / 16
    labels = torch.tensor(data.target, device=args.device)
    backend, reason = daam.backend_for(images, args.backend)
    print(f"density attention runs on the {backend} backend: {reason}")

    encoder = train_encoder(images[labels < 5], labels[labels < 5], args.encoder_epochs)
    x, digits = pooled_layers(encoder, images[labels >= 5]), labels[labels >= 5] - 5

    results = []
    for name, build in decoders(args.backend).items():
        result, model, features = evaluate(name, build, x, digits, args.seeds, args.epochs)
        results.append(result)
        if isinstance(model, DAAMDecoder):
            with torch.no_grad():
                weights = model.attention(features, return_weights=True)[1].mean(0).cpu().numpy()

    args.output.mkdir(parents=True, exist_ok=True)
    plot_curves(results, args.output / "learning-curves.png")
    plot_gate(weights, args.output / "gate.png")
    run = {"device": device_name(args.device), "backend": backend, "torch": torch.__version__, "daam": daam.__version__}
    report = {**run, "encoder_epochs": args.encoder_epochs, "results": [asdict(r) for r in results]}
    (args.output / "results.json").write_text(json.dumps(report, indent=1) + "\n")
    print(f"\nDigits 5-9 on a frozen encoder of digits 0-4, {LAYERS} layers x {FEATURES} features, {args.seeds} seeds")
    print_table(results)
    print(f"\nPictures and results: {args.output.resolve()}")


if __name__ == "__main__":
    main()
