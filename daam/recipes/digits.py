"""Density attention over the layers of a frozen encoder, on scikit-learn's handwritten digits.

A small transformer encoder learns the digits 0-4 and is frozen. The mean-pooled hidden states of all its layers,
(images, layers, features), then feed what learns the digits 5-9: density attention and standard attention over the
layers, a weighted sum of them, and logistic regression on the last one and on all. All of it is what the other recipes
do; for data and an encoder of your own start with daam.recipes.features.

    python -m daam.recipes.digits --output demo-output
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import daam
from daam.recipes.arguments import device, positive, seeds
from daam.recipes.cache import Cache
from daam.recipes.compare import write_comparison
from daam.recipes.errors import Parser, UserError, extra, guarded
from daam.recipes.explain import explain
from daam.recipes.lock import exclusive
from daam.recipes.progress import Progress
from daam.recipes.runs import Settings, check_output
from daam.recipes.training import cached_job, run

with extra():
    from sklearn.datasets import load_digits

LAYERS, FEATURES = 12, 64
METHODS = ("daam", "mha", "weighted_sum", "logistic", "logistic_last")
RATES = (1e-3, 1e-2)


class Encoder(nn.Module):
    """Encode images, (batch, 8, 8), by a pre-norm transformer over their 16 patches of 2 x 2 pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(4, FEATURES)
        self.position = nn.Parameter(0.02 * torch.randn(16, FEATURES))
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(FEATURES, 4, 2 * FEATURES, dropout=0.0, batch_first=True, norm_first=True)
            for _ in range(LAYERS)
        )

    def forward(self, images: Tensor) -> Tensor:
        """Return the last layer's hidden states, (batch, 16, FEATURES), of images, (batch, 8, 8)."""
        patches = images.reshape(-1, 4, 2, 4, 2).transpose(2, 3).reshape(-1, 16, 4)
        hidden = self.embed(patches) + self.position
        for layer in self.layers:
            hidden = layer(hidden)
        return hidden


def train_encoder(images: Tensor, labels: Tensor, epochs: int) -> Encoder:
    """Return an encoder that learned the digits 0-4 from images, (examples, 8, 8), and labels, (examples,)."""
    encoder, classify = Encoder().to(images.device), nn.Linear(FEATURES, 5).to(images.device)
    optimizer = torch.optim.AdamW([*encoder.parameters(), *classify.parameters()], lr=3e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    for _ in Progress(range(epochs), desc="encoder on digits 0-4"):
        for batch in torch.randperm(len(images), device=images.device).split(64):
            optimizer.zero_grad()
            cross_entropy(classify(encoder(images[batch]).mean(1)), labels[batch]).backward()
            optimizer.step()
        schedule.step()
    return encoder


@guarded
def main(argv: list[str] | None = None) -> None:
    """Run the command line: the demo, from the training of its encoder to its pictures."""
    parser = Parser(description=__doc__.partition("\n")[0])
    parser.add_argument("--device", type=device, default="cpu", help='where to train; "cuda" uses the kernels')
    parser.add_argument("--backend", default="auto", choices=("auto", "triton", "eager"))
    parser.add_argument("--output", type=Path, default=Path("demo-output"), help="folder for pictures and results")
    parser.add_argument("--seeds", type=seeds, default=3)
    parser.add_argument("--epochs", type=positive, default=20, help="of every decoder")
    parser.add_argument("--encoder-epochs", type=positive, default=24)
    args = parser.parse_args(argv)
    check_output(args.output)
    try:
        backend, reason = daam.backend_for(torch.empty(1, device=args.device), args.backend)
    except (RuntimeError, ValueError) as error:  # ValueError: DAAM_BACKEND names none
        raise UserError(str(error)) from None
    print(f"density attention runs on the {backend} backend: {reason}")
    torch.set_num_threads(1)  # tensors this small gain little from more, and lose much to them on a busy machine
    with exclusive(args.output):
        _compare(args, backend)
    print(f"Pictures and results: {args.output.resolve()}")


def _make_cache(args: argparse.Namespace) -> Cache:
    """Train an encoder on the digits 0-4, and return its features of the digits 5-9."""
    torch.manual_seed(0)
    data = load_digits()
    images = torch.tensor(data.images, dtype=torch.float32, device=args.device) / 16
    labels = torch.tensor(data.target, device=args.device)
    pooling = daam.LayerPooling(train_encoder(images[labels < 5], labels[labels < 5], args.encoder_epochs))
    about = {"encoder": "a transformer that knows the digits 0-4", "source": "scikit-learn's digits 5-9"}
    return Cache(pooling(images[labels >= 5]).cpu(), labels[labels >= 5].cpu() - 5, list("56789"), about)


def _compare(args: argparse.Namespace, backend: str) -> None:
    """Train all decoders, explain the first one, and write and print the comparison."""
    cache, rows, runs = _make_cache(args), [], args.output / "digits-runs"
    shutil.rmtree(runs, ignore_errors=True)  # a demo begins anew, where a run goes on
    with daam.use_backend(backend):
        for method in METHODS:
            settings = Settings(method, seeds=args.seeds, epochs=args.epochs, rates=RATES)
            job = cached_job(cache, settings, args.device)
            rows.append(run(job, settings, runs / method, args.device, {"cache": cache.about, "backend": backend}))
        explain(runs / "daam", rows[0], cache, args.output)
    print(f"\nDigits 5-9 on a frozen encoder of digits 0-4, {LAYERS} layers x {FEATURES} features, {args.seeds} seeds")
    print(f"{write_comparison(rows, args.output)}\n")


if __name__ == "__main__":
    main()
