"""Vowels of syllables in Debian's `klettres-data`, through Resemblyzer's three LSTM layers, which tell voices apart.

Each language has recordings of its own, so parts hold whole languages.
"""

from __future__ import annotations

import random
import re
import shutil
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from bench.examples.packages import unpack_debian, unpack_wheel
from daam import LayerPooling
from daam.recipes import features
from daam.recipes.data import read_examples
from daam.recipes.media import read_sound

# Languages whose files are named by what is spoken, in letters that are read alike. Others number them; English and
# French do not write their vowels as they sound, and names in Hungarian lack the accents.
LANGUAGES = ("de", "es", "it", "lt", "ml", "nds", "pt_BR", "ru", "tn", "uk")
# One vowel, once: diphthongs, and double letters for long vowels, do not fit. y is a consonant beside a vowel, as in
# "lya" and "noy", and elsewhere a vowel that is none of the five.
SYLLABLE = re.compile(r"[b-df-hj-np-tv-xz]*y?([aeiou])y?[b-df-hj-np-tv-xz]*")
# Of the names of letters only those that end in their vowel: others are names of signs, like "hard".
LETTER = re.compile(r"[b-df-hj-np-tv-xz]*y?([aeiou])")
SYLLABLES = 16  # of a vowel and a language at most, so that nobody speaks most of them
RATE, HOP, WINDOW, BANDS, UNITS = 16000, 160, 400, 40, 256  # of the encoder; 10 and 25 ms
LOUDNESS = 10 ** (-30 / 20)  # root mean square that quieter sounds are raised to


class VoiceEncoder(nn.Module):
    """Run Resemblyzer's LSTM over mel spectrograms, (batch, frames, 40), layer by layer.

    Its layers are one nn.LSTM of three layers there. What that adds after them, to embed a voice, is left out.
    """

    def __init__(self, weights: dict[str, Tensor]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.LSTM(size, UNITS, batch_first=True) for size in (BANDS, UNITS, UNITS))
        for i, layer in enumerate(self.layers):
            layer.load_state_dict({name: weights[f"lstm.{name[:-1]}{i}"] for name in layer.state_dict()})

    def forward(self, frames: Tensor) -> Tensor:
        """Return the last layer's hidden states, (batch, frames, 256)."""
        hidden = frames
        for layer in self.layers:
            hidden, _ = layer(hidden)
        return hidden


def make_cache(folder: Path, packages: Path) -> None:
    """Make the cache of vowels in spoken syllables."""
    content, package = unpack_debian("klettres-data", packages)
    wheel, encoder_package = unpack_wheel("Resemblyzer", "0.1.4", packages)
    copy_syllables(content / "usr/share/klettres", folder / "sounds")
    weights = torch.load(wheel / "resemblyzer/pretrained.pt", map_location="cpu", weights_only=True)["model_state"]
    encoder = VoiceEncoder(weights)
    modality, examples = read_examples(folder / "sounds", groups="folder")
    about = {"encoder": encoder_package, "modality": modality, "source": package, "groups": "folder"}
    pooling = LayerPooling(encoder, encoder.layers, batch_first=True)
    features.extract(pooling, collate_sounds, examples, folder / "cache", about=about)


def copy_syllables(root: Path, folder: Path) -> None:
    """Copy a sample of the spoken syllables into folder/{vowel}/{language}/."""
    for language in LANGUAGES:
        found: dict[str, list[Path]] = {}
        for kind, pattern in (("syllab", SYLLABLE), ("alpha", LETTER)):
            for path in sorted((root / language / kind).glob("*.ogg")):
                if match := pattern.fullmatch(path.stem):
                    found.setdefault(match[1], []).append(path)
        for vowel, paths in found.items():
            (folder / vowel / language).mkdir(parents=True, exist_ok=True)
            for path in random.Random(0).sample(paths, min(SYLLABLES, len(paths))):
                # some syllables are names of letters too
                shutil.copyfile(path, folder / vowel / language / f"{path.parent.name}-{path.name}")


def collate_sounds(paths: list[Path]) -> dict[str, Tensor]:
    """Return the encoder's arguments for sounds in files, and which of their frames are none of the padding."""
    spectrograms = [spectrogram(torch.from_numpy(read_sound(path, RATE))) for path in paths]
    lengths = torch.tensor([len(frames) for frames in spectrograms])
    mask = torch.arange(int(lengths.max())) < lengths[:, None]
    return {"frames": pad_sequence(spectrograms, batch_first=True), "pooling_mask": mask}


def spectrogram(samples: Tensor) -> Tensor:
    """Return the mel spectrogram, (frames, 40), of (samples,), as Resemblyzer makes it: of powers, no logarithms."""
    samples = samples * max(1.0, LOUDNESS / max(samples.square().mean().sqrt().item(), 1e-6))
    spectrum = torch.stft(samples, WINDOW, HOP, window=torch.hann_window(WINDOW), return_complex=True)
    return spectrum.abs().square().T @ mel_filters().T


def mel_filters() -> Tensor:
    """Return Slaney's filters, (bands, frequencies): triangles of area 1 over Hz, between bands that are equally far
    apart in mel.
    """
    # mel: 3 for each 200 Hz up to 1000 Hz, from where on 27 more are a factor of 6.4
    bends, factor = 15.0, np.log(6.4) / 27
    mels = np.linspace(0, bends + np.log(RATE / 2 / 1000) / factor, BANDS + 2)
    edges = np.where(mels < bends, mels * 200 / 3, 1000 * np.exp(factor * (mels - bends)))[:, None]
    frequencies = np.linspace(0, RATE / 2, WINDOW // 2 + 1)
    rising = (frequencies - edges[:-2]) / (edges[1:-1] - edges[:-2])
    falling = (edges[2:] - frequencies) / (edges[2:] - edges[1:-1])
    filters = np.maximum(0, np.minimum(rising, falling)) * 2 / (edges[2:] - edges[:-2])
    return torch.from_numpy(filters.astype(np.float32))
