"""Five classes of Debian's `dataset-fashion-mnist`, through a transformer that learned the other five here."""

from __future__ import annotations

import gzip
from collections import Counter
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from bench.examples.packages import unpack_debian
from daam import LayerPooling
from daam.recipes import features
from daam.recipes.cache import write_whole
from daam.recipes.data import read_examples
from daam.recipes.media import read_image
from daam.recipes.progress import Progress

CLOTHES = ("t-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot")
KNOWN = 5  # of them the encoder learns, decoders the others
LAYERS, WIDTH, PATCH, SIDE = 12, 64, 4, 28
TOKENS = (SIDE // PATCH) ** 2
# Of a class. Each of the encoder's is seen once: two minutes of a core that nothing else uses.
ENCODER_IMAGES, TRAIN_IMAGES, TEST_IMAGES = 5000, 250, 200


class ImageEncoder(nn.Module):
    """Encode images, (batch, 28, 28), by a pre-norm transformer over their 49 patches of 4 x 4 pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(PATCH**2, WIDTH)
        self.position = nn.Parameter(0.02 * torch.randn(TOKENS, WIDTH))
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(WIDTH, 4, 2 * WIDTH, dropout=0.0, batch_first=True, norm_first=True)
            for _ in range(LAYERS)
        )
        self.head = nn.Linear(WIDTH, KNOWN)

    def forward(self, images: Tensor) -> Tensor:
        """Return the last layer's hidden states, (batch, 49, WIDTH)."""
        patches = images.unfold(1, PATCH, PATCH).unfold(2, PATCH, PATCH).reshape(-1, TOKENS, PATCH**2)
        hidden = self.embed(patches) + self.position
        for layer in self.layers:
            hidden = layer(hidden)
        return hidden

    def classify(self, images: Tensor) -> Tensor:
        """Return logits of the classes that the encoder learns, (batch, KNOWN)."""
        return self.head(self(images).mean(1))


def make_cache(folder: Path, packages: Path) -> None:
    """Make the cache of the five classes that the encoder does not know."""
    content, package = unpack_debian("dataset-fashion-mnist", packages)
    train, test = (read_idx(content / "usr/share/datasets/fashion-mnist", part) for part in ("train", "t10k"))
    encoder = trained_encoder(folder / "encoder.safetensors", train)
    with torch.no_grad():
        images, labels = first_of_each(*test, TEST_IMAGES, range(KNOWN))
        accuracy = (encoder.classify(images).argmax(1) == labels).float().mean()
    print(f"encoder   {accuracy:.3f} of {len(images)} test images of its five classes are right")
    for part, arrays, count in (("train", train, TRAIN_IMAGES), ("test", test, TEST_IMAGES)):
        write_images(folder / "images" / part, *first_of_each(*arrays, count, range(KNOWN, len(CLOTHES))))
    modality, examples = read_examples(folder / "images")
    about = {"encoder": "a transformer that learned five other classes", "modality": modality, "source": package}
    pooling = LayerPooling(encoder, encoder.layers, batch_first=True)
    features.extract(pooling, collate_images, examples, folder / "cache", about=about)


def read_idx(folder: Path, part: str) -> tuple[Tensor, Tensor]:
    """Return the images of a part, (examples, 28, 28) between 0 and 1, and their classes, (examples,)."""
    images = np.frombuffer(gzip.decompress((folder / f"{part}-images-idx3-ubyte.gz").read_bytes()), np.uint8, offset=16)
    labels = np.frombuffer(gzip.decompress((folder / f"{part}-labels-idx1-ubyte.gz").read_bytes()), np.uint8, offset=8)
    return torch.from_numpy(images.reshape(-1, SIDE, SIDE) / np.float32(255)), torch.from_numpy(labels.astype(np.int64))


def first_of_each(images: Tensor, labels: Tensor, count: int, classes: range) -> tuple[Tensor, Tensor]:
    """Return the first images of each of some classes, and their labels."""
    places = torch.cat([(labels == i).nonzero().flatten()[:count] for i in classes])
    return images[places], labels[places]


def trained_encoder(path: Path, train: tuple[Tensor, Tensor]) -> ImageEncoder:
    """Return the encoder whose weights are in a file, after training it where there is no such file."""
    torch.manual_seed(0)
    encoder = ImageEncoder()
    if not path.exists():
        train_encoder(encoder, *first_of_each(*train, ENCODER_IMAGES, range(KNOWN)))
        write_whole(path, safetensors.torch.save(encoder.state_dict()))
    encoder.load_state_dict(safetensors.torch.load_file(path))
    return encoder.eval()


def train_encoder(encoder: ImageEncoder, images: Tensor, labels: Tensor) -> None:
    """Train an encoder to tell the classes apart that it is to know."""
    batches = torch.randperm(len(images)).split(64)
    optimizer = torch.optim.AdamW(encoder.parameters(), weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=len(batches))
    for batch in Progress(batches, desc="encoder on five classes", unit="steps"):
        optimizer.zero_grad()
        cross_entropy(encoder.classify(images[batch]), labels[batch]).backward()
        nn.utils.clip_grad_norm_(encoder.parameters(), 1.0)
        optimizer.step()
        schedule.step()


def write_images(folder: Path, images: Tensor, labels: Tensor) -> None:
    """Write images as PNG into a folder for each class, numbered within it."""
    counts = Counter()
    for image, label in zip((255 * images).round().byte().numpy(), labels.tolist(), strict=True):
        path = folder / CLOTHES[label] / f"{counts[label]:03}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path)
        counts[label] += 1


def collate_images(paths: list[Path]) -> dict[str, Tensor]:
    """Return the encoder's arguments for images in files."""
    arrays = [np.asarray(read_image(path).convert("L"), np.float32) / 255 for path in paths]
    return {"images": torch.from_numpy(np.stack(arrays))}
