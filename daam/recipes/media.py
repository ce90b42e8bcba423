"""Pictures as a viewer shows them, and sounds at an encoder's sampling rate, out of files."""

from __future__ import annotations

import importlib
import io
import os
import shutil
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from daam.recipes.data import DataError
from daam.recipes.errors import extra

if TYPE_CHECKING:
    from PIL.Image import Image

BLOCK = 2**18  # samples of all channels in memory at a time, whatever the length of the file
ENDLESS_BYTES = 0x7FFFF000  # who writes WAV to a pipe cannot know its length, and promises 2 or 4 GiB, less a header
ENDLESS_FRAMES = 2**63 - 1  # what libsndfile says where a file does not tell its length
SLACK = 1152  # samples of a frame of MP3: by so much a decoder may cut the ends of a whole file
OGG_PAGE = 27 + 255 + 255 * 255  # the longest page of an Ogg file: a header, 255 lengths, 255 segments of 255 bytes
# Tags of TIFF: its pages' kind (bit 0: a smaller version, bit 2: a mask), and how samples are to be understood.
PAGE_KIND, BITS, PHOTOMETRIC = 254, 258, 262
# Pillow scales samples of PNG to 8 bits, but not the colour that is transparent.
KEY_SCALES = {"L;2": 85, "L;4": 17, "RGB;16B": 1 / 256}


def import_extra(name: str) -> Any:
    """Import a module that the recipes need, or say how to install it."""
    with extra():
        return importlib.import_module(name)


def read_image(path: str | Path) -> Image:
    """Return a picture in RGB: what a person sees who opens the file.

    It is turned as its EXIF orientation says, put on white where it is transparent, and converted to sRGB where it
    carries another colour profile. Grey of 16 bits is scaled by its full range: 0 to 65535 become 0 to 255. An
    animation gives its first frame.

    Raises:
        DataError: the file cannot be read to its end; is a TIFF of several pages, which may be several pictures; or
            holds numbers of which none is white: signed, of 32 bits, or floating point.
        ImportError: Pillow is not installed.
    """
    pillow = import_extra("PIL.Image")
    try:
        # by its name Pillow would map a plain TIFF into memory, and scramble it where it is to be turned
        with open(path, "rb") as stream, pillow.open(stream) as file:
            pages, profile, key_scale = _count_pages(file), file.info.get("icc_profile"), _key_scale(file)
            image = _upright(file)
            tags = getattr(file, "tag_v2", {})
    except MemoryError:
        raise
    except Exception as error:  # decoders meet broken files with exceptions of every kind
        raise _unreadable(path, "image", error) from None
    if pages > 1:
        raise DataError(f"{path}: a TIFF of {pages} pages, expected one: save each picture in a file of its own")
    # in mode I Pillow gives 16 bits of PNG, until version 11, and 32 bits or signed ones of TIFF
    if image.mode.startswith("I;16") or (image.mode == "I" and file.format == "PNG"):
        image = _scale_grey(image, tags)
    if image.mode in ("I", "F"):
        raise DataError(
            f"{path}: a {file.format} image of mode {image.mode}, expected 8 or 16 bits, unsigned: of signed numbers, "
            "32 bits and floating point none says what is white; scale them to 16 bits"
        )
    if key_scale and "transparency" in image.info:
        key = image.info["transparency"]
        scaled = tuple(int(value * key_scale) for value in key) if isinstance(key, tuple) else int(key * key_scale)
        image.info["transparency"] = scaled
    return _convert_profile(_flatten(image), profile)


def read_sound(path: str | Path, rate: int, seconds: float | None = None) -> np.ndarray:
    """Return (samples,) in float32 of a sound of any format that libsndfile reads: WAV, FLAC, Ogg, MP3, AIFF and more.

    Channels are averaged, and another sampling rate is converted. Neither the length of the file nor its channels
    matter for memory, only the samples that are returned.

    Args:
        rate: of the samples that are returned, in Hz.
        seconds: of the sound at most, from its beginning; the rest is not decoded.

    Raises:
        DataError: the file cannot be read to its end, or holds no samples, NaN or infinity.
        ImportError: soundfile or soxr is not installed.
    """
    soxr = import_extra("soxr")
    with _open_sound(path) as file:
        parts, nothing = _read_blocks(path, file, seconds), np.zeros(0, np.float32)
        if file.samplerate != rate:
            convert = soxr.ResampleStream(file.samplerate, rate, 1, dtype="float32", quality="HQ").resample_chunk
            parts = [*map(convert, parts), convert(nothing, last=True)]
        samples = np.concatenate([nothing, *parts])
    if not len(samples):
        raise DataError(f"{path}: no samples, expected one or more")
    return samples


def sound_seconds(path: str | Path) -> float:
    """Return a sound's seconds by its header, else by decoding it; raise a DataError where it cannot be read."""
    with _open_sound(path) as file:
        if file.frames < ENDLESS_FRAMES:
            return file.frames / file.samplerate
        return sum(map(len, _read_blocks(path, file))) / file.samplerate


def _count_pages(file: Any) -> int:
    if file.format != "TIFF":
        return 1
    every = import_extra("PIL.ImageSequence").Iterator(file)
    pages = sum(not page.tag_v2.get(PAGE_KIND, 0) & 0b101 for page in every)
    file.seek(0)
    return pages


def _key_scale(file: Any) -> float | None:
    return KEY_SCALES.get(str(file.tile[0][3])) if file.format == "PNG" and file.tile else None


def _upright(file: Any) -> Image:
    file.load()
    try:
        return import_extra("PIL.ImageOps").exif_transpose(file)
    except Exception:  # of broken EXIF data, with which viewers show a picture as it lies
        return file.copy()


def _scale_grey(image: Any, tags: dict) -> Image:
    white = 2 ** tags.get(BITS, (16,))[0] - 1
    values = np.asarray(image).astype(np.uint32)
    if tags.get(PHOTOMETRIC) == 0:
        values = white - values
    values[values == image.info.get("transparency")] = white
    return import_extra("PIL.Image").fromarray(((values * 255 + white // 2) // white).astype(np.uint8))


def _flatten(image: Any) -> Image:
    """Return an image on white where it was transparent, in RGB or CMYK."""
    if image.mode == "La":
        image = image.convert("LA")  # there is no direct way
    if image.has_transparency_data:
        pillow = import_extra("PIL.Image")
        image = pillow.alpha_composite(pillow.new("RGBA", image.size, "white"), image.convert("RGBA"))
    return image if image.mode == "CMYK" else image.convert("RGB")


def _convert_profile(image: Any, profile: bytes | None) -> Image:
    """Return an image in RGB, from the colours of its ICC profile converted to sRGB where there is a valid one."""
    if profile:
        cms = import_extra("PIL.ImageCms")
        # viewers leave out a profile that is broken, or of other channels than the image has
        with suppress(cms.PyCMSError, OSError):
            source = cms.ImageCmsProfile(io.BytesIO(profile))
            if "sRGB" not in cms.getProfileDescription(source):
                return cms.profileToProfile(image, source, cms.createProfile("sRGB"), outputMode="RGB")
    return image.convert("RGB")


@contextmanager
def _open_sound(path: str | Path) -> Iterator[Any]:
    """Open a sound whose file is complete; errors of the library become a DataError, inside the block too."""
    soundfile = import_extra("soundfile")
    try:
        with soundfile.SoundFile(str(path)) as file:
            _check_complete(path, file.format)
            # In a file libsndfile guesses the length of MP3 without a header of lengths, and decodes no further than
            # that, be it half of it. Out of a pipe it reads to the end.
            with soundfile.SoundFile(_open_pipe(path)) if file.format == "MP3" else file as sound:
                yield sound
    except (soundfile.SoundFileError, OSError) as error:
        raise _unreadable(path, "sound", error) from None


def _open_pipe(path: str | Path) -> int:
    """Return the descriptor of a pipe that gives the content of an MP3 file, less the tags before it."""
    end, start = os.pipe()

    def feed() -> None:
        with suppress(BrokenPipeError), open(path, "rb") as file, open(start, "wb") as pipe:
            # libsndfile does not look behind a picture of the album: a tag's length is four times 7 bits
            while (head := file.read(10))[:3] == b"ID3" and len(head) == 10:
                file.seek(sum(byte << shift for byte, shift in zip(head[6:], (21, 14, 7, 0), strict=True)), os.SEEK_CUR)
            pipe.write(head)
            shutil.copyfileobj(file, pipe)

    threading.Thread(target=feed, daemon=True).start()
    return end


def _read_blocks(path: str | Path, file: Any, seconds: float | None = None) -> Iterator[np.ndarray]:
    """Yield the mean of the channels, (samples,) in float32, block by block, of the first seconds or of all."""
    # else soundfile seeks after each block, which fails in FLAC of unknown length
    file.seekable = lambda: False
    left = file.frames if seconds is None else min(round(seconds * file.samplerate), file.frames)
    most, done = max(1, BLOCK // file.channels), 0
    while left > 0 and len(block := file.read(min(most, left), dtype="float32", always_2d=True)):
        if not (finite := np.isfinite(block).all(1)).all():
            index = int(finite.argmin())
            raise DataError(f"{path}: sample {done + index} is {block[index].sum()}, expected finite numbers")
        yield block.mean(1, dtype=np.float64).astype(np.float32)
        left, done = left - len(block), done + len(block)
    if SLACK < left < ENDLESS_FRAMES - done:
        raise DataError(f"{path}: the file is truncated, it ends after {done} of {done + left} samples")


def _check_complete(path: str | Path, kind: str) -> None:
    """Raise a DataError where a file is shorter than it promises: libsndfile then reads what is there."""
    with open(path, "rb") as file:
        present, promised = _ogg_bytes(file) if kind == "OGG" else _chunk_bytes(file)
    if present < promised < ENDLESS_BYTES:
        raise DataError(f"{path}: the file is truncated, it holds {present} bytes of sound of {promised}")


def _chunk_bytes(file: Any) -> tuple[int, int]:
    """Return how many bytes stand behind the header of the samples, and how many it promises: of WAV or AIFF."""
    size = file.seek(0, os.SEEK_END)
    file.seek(0)
    order = {b"RIFF": "<", b"RF64": "<", b"RIFX": ">", b"FORM": ">"}.get(file.read(12)[:4])
    while order and len(head := file.read(8)) == 8:
        name, length = struct.unpack(f"{order}4sI", head)
        if name in (b"data", b"SSND"):
            return size - file.tell(), length
        file.seek(length + length % 2, os.SEEK_CUR)
    return 0, 0


def _ogg_bytes(file: Any) -> tuple[int, int]:
    """Return how many bytes the last page of an Ogg file has, and how many its table promises."""
    size = file.seek(0, os.SEEK_END)
    file.seek(max(0, size - OGG_PAGE))
    tail = file.read()
    page = tail[max(0, tail.rfind(b"OggS")) :]
    lengths = page[26] if len(page) > 26 else 0
    return len(page), 27 + lengths + sum(page[27 : 27 + lengths])


def _unreadable(path: str | Path, kind: str, error: Exception) -> DataError:
    head = None
    with suppress(OSError), open(path, "rb") as file:
        head = file.read(32)
    if head == b"":
        return DataError(f"{path}: the file is empty")
    if head and head.startswith(b"version https://git-lfs"):
        return DataError(f"{path}: git-lfs keeps the file elsewhere, this only says where: run git lfs pull")
    reason = getattr(error, "error_string", error)
    if type(error).__name__ == "UnidentifiedImageError":
        reason = "its content is of no format that Pillow knows"
    return DataError(f"{path}: no {kind} that can be read ({reason})")
