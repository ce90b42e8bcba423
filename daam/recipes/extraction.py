"""Features of examples through a frozen encoder: what a cache is made of, and what a prediction starts from."""

from __future__ import annotations

import shutil
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

import daam
from daam.checks import lacks_memory
from daam.encoder_check import TRIED, Findings, NotFiniteError, input_shapes
from daam.pooling import LayerPooling
from daam.recipes import processes
from daam.recipes.cache import DTYPES, CacheError, add_defaults, first_not_finite
from daam.recipes.encoders import NO_LIMIT, Collate, EncoderError, identify, load_encoder, positions_of
from daam.recipes.errors import UserError
from daam.recipes.examples import (
    Example,
    class_names,
    digest_examples,
    encode_groups,
    encode_labels,
    encode_parts,
    find_duplicates,
    hash_contents,
    hash_examples,
)
from daam.recipes.lock import exclusive
from daam.recipes.progress import Progress
from daam.recipes.writer import Writer

PACKAGE = Path(daam.__file__).parent


def load_encoder_of(about: dict, encoder: str | None = None, device: str = "cpu") -> tuple[LayerPooling, Collate]:
    """Load the encoder of a cache, and what makes its batches, as cache.json tells about it; see `load_encoder`.

    encoder: where it is, if not where it was. Raises an EncoderError where it, or its preparation, is another one.
    """
    about = add_defaults(about)
    name = about["encoder"] if encoder is None else encoder
    names = {"layers": "layer_list", "max_length": "max_length", "max_seconds": "max_seconds"}
    options = {key: about[entry] for key, entry in names.items() if about.get(entry) is not None}
    pooling, collate = load_encoder(name, about["modality"], device=device, **options)
    for key, sha256 in identify(pooling, collate).items():
        if about.get(key) != sha256:
            raise EncoderError(f"encoder {name}: its {key} is {sha256}, expected the cache's {about.get(key)}")
    pooling.embeddings = about["embeddings"]
    if about.get("checked") is not None:
        pooling.batch_first = about["checked"].get("batch_first")
    return pooling, collate


def extract(
    pooling: nn.Module, collate: Callable[[list], dict[str, Tensor]], examples: list[Example], folder: str | Path, *,
    about: dict, names: list[str] | None = None, batch: int = 32, shard: int = 256, dtype: str = "fp32",
    layers: Sequence[int] | None = None, titles: list[str] | None = None,
) -> dict:  # fmt: skip
    """Write the features of all examples into a cache, keep what is there already, and return what cache.json says.

    Examples of about one length share a batch. What features of a `daam.LayerPooling` depend on is measured first, on
    16 examples, and printed in a line: where they depend on the batch, examples go one at a time, or with those of
    equal lengths.

    Args:
        pooling: a `daam.LayerPooling`; `pooling(**collate(sources))` is (batch, layers, features).
        collate: makes keyword arguments of a list of sources, texts or paths.
        examples: their groups and parts go into the cache where they have some.
        about: what else tells this cache from others, at least encoder and modality; "source" alone may change.
            "groups" and "split" name what groups and parts come from.
        names: the names of the classes; None: the labels that examples have.
        batch: examples in a call of the encoder, at most.
        shard: examples in a file; a killed run has to compute fewer of them again.
        dtype: of features in files, "fp32", "fp16" or "bf16".
        layers: numbers of the layers that are kept, from 1 on; None: all. A pooling with embeddings has them before.
        titles: what examples are called in examples.csv; None: by their places, or the paths of their files.

    Raises:
        CacheError: the folder holds another cache; features are NaN or infinite, of the wrong shape, or more than the
            disk has room for; there are no such layers.
        DataError: a label is not among the names; some examples have a group or a part and others none; parts that
            cannot be used, see `daam.recipes.examples.encode_parts`.
        EncoderError: calls on one example differ; different examples have the same features; an example does not fit.
    """
    names = class_names(examples) if names is None else names
    labels, groups, parts = encode_labels(examples, names), encode_groups(examples), encode_parts(examples)
    hashed = Progress(examples, desc="hash of the examples", unit="examples", delay=2, leave=False, disable=None)
    digests = digest_examples(hashed)
    _tell_duplicates(examples, digests)
    identity = identify(pooling, collate)  # before it runs: some keep what they computed
    findings = check(pooling, collate, examples, about)
    about = {**about, "embeddings": getattr(pooling, "embeddings", False)}
    count, features = _run(pooling, collate, examples, [0], None).shape[1:]
    about["layer_numbers"] = _layer_numbers(layers, count, about["embeddings"])
    sizes = {"examples": len(examples), "shard": shard, "layers": len(about["layer_numbers"]), "features": features}
    about = {**about, **identity, **sizes, "names": names, "examples_sha256": hash_examples(examples, digests)}
    about["contents_sha256"] = hash_contents(examples, digests)
    about["dtype"], about["checked"] = dtype, None
    if findings is not None:
        about["checked"] = {**findings.as_dict(), "batch_first": pooling.batch_first}
    about["groups"] = None if groups is None else about.get("groups") or "group"
    about["split"] = None if parts is None else about.get("split") or "split"
    titles = titles or [str(e.source) if isinstance(e.source, Path) else str(i) for i, e in enumerate(examples)]
    listed = [(title, e.label, sha256) for title, e, sha256 in zip(titles, examples, digests, strict=True)]
    # of several processes the first holds the folder for all
    with exclusive(Path(folder)):
        writer = Writer(folder, about, listed)
        _check_room(writer)
        missing = processes.share(writer.missing)
        done = len(examples) - sum(len(writer.rows(index)) for index in writer.missing)
        total = done + sum(len(writer.rows(index)) for index in missing)  # of several processes each has its own
        with Progress(total=total, initial=done, desc="features", unit="examples") as bar:
            for index in missing:
                rows = writer.rows(index)
                found = _shard(pooling, collate, examples, rows, writer, batch, bar)
                numbers = (t if t is None else t[rows.start : rows.stop] for t in (labels, groups, parts))
                writer.write(index, found, *numbers)
        writer.finish()
    return writer.about


def _layer_numbers(layers: Sequence[int] | None, count: int, embeddings: bool) -> list[int]:
    """Return the numbers of the layers that are kept of count, in order: 0 are the embeddings, where there are some."""
    present = range(count) if embeddings else range(1, count + 1)
    if outside := sorted(set(layers or ()) - set(present[embeddings:])):
        raise CacheError(f"--layers names layer {outside[0]}, expected 1 to {present[-1]}, those of the encoder")
    return [i for i in present if not layers or i in layers or i == 0]


def _check_room(writer: Writer) -> None:
    """Print how large what is missing of a cache will be; raise a CacheError where the disk has less room."""
    about, rows = writer.about, sum(len(writer.rows(index)) for index in writer.missing)
    size = rows * about["layers"] * about["features"] * DTYPES[about["dtype"]].itemsize
    free = shutil.disk_usage(writer.folder).free
    text = f"{rows} x {about['layers']} x {about['features']} features in {about['dtype']}: {size / 1e6:.3g} MB"
    if size > free:
        raise CacheError(
            f"{text}, and {writer.folder} has room for {free / 1e6:.3g} MB: take another folder, fewer --layers or "
            "--dtype bf16"
        )
    if rows:
        print(f"{text}, of {free / 1e6:.3g} MB free")


def _shard(
    pooling: nn.Module, collate: Callable, examples: list[Example], rows: range, writer: Writer, batch: int,
    bar: Progress,
) -> Tensor:  # fmt: skip
    """Return the features of the examples of a shard, those of earlier runs where there are some."""
    about, taken = writer.about, writer.taken(rows.start // writer.about["shard"])
    found = torch.empty(len(rows), about["layers"], about["features"])
    for place, features in taken.items():
        found[place - rows.start] = features
    bar.update(len(taken))
    # batches end with their shard: the same ones come again when a run goes on
    left = [place for place in rows if place not in taken]
    for places, features in _iterate(pooling, collate, examples, left, about, batch):
        found[[i - rows.start for i in places]] = features
        bar.update(len(places))
    return found


def iterate_features(
    pooling: nn.Module, collate: Callable, examples: list[Example], about: dict, batch: int = 32
) -> Iterator[tuple[list[int], Tensor]]:
    """Yield places of examples and their features, (places, layers, features) in fp32, as a cache holds them that
    cache.json tells about. Examples go into batches in which none depends on the others, as was measured for the cache.
    Raises what `extract` does.
    """
    about = add_defaults(about)
    for start in range(0, len(examples), 256):
        yield from _iterate(pooling, collate, examples, range(len(examples))[start : start + 256], about, batch)


def _iterate(
    pooling: nn.Module, collate: Callable, examples: list[Example], rows: Sequence[int], about: dict, batch: int
) -> Iterator[tuple[list[int], Tensor]]:
    """Yield places among some rows of the examples, and their features."""
    chosen = [number - (not about["embeddings"]) for number in about["layer_numbers"]]
    for places in _batches(rows, examples, collate, batch, about.get("checked")):
        features = _run(pooling, collate, examples, places, about.get("checked"))[:, chosen]
        rounded = features.to(DTYPES[about["dtype"]]).float()
        if (row := first_not_finite(rounded)) is not None:
            raise CacheError(
                f"features of example {places[row]} ({examples[places[row]]}) reach {features[row].abs().max():.3g}, "
                f"which {about['dtype']} does not hold: take --dtype bf16 or fp32, and another folder"
            )
        yield places, rounded


def _tell_duplicates(examples: list[Example], digests: list[str]) -> None:
    """Print how many examples are copies of others, how many contents have several labels, or are in several parts."""
    if same := find_duplicates(examples, digests):
        copies = sum(len(places) - 1 for places in same)
        several = sum(len({examples[i].label for i in places}) > 1 for places in same)
        also = f", and {several} have several labels" if several else ""
        print(f"{len(same)} examples occur more than once, {copies} are copies{also}")
        if across := sum(len({examples[i].split for i in places}) > 1 for places in same):
            print(f"{across} of them are in two parts or more, as train and test: they stay there")


def check(pooling: nn.Module, collate: Callable, examples: list[Example], about: dict) -> Findings | None:
    """Measure on the first examples what features depend on, print and return it; None without a `daam.LayerPooling`.

    Raises:
        CacheError: features are NaN or infinite.
        EncoderError: see `daam.encoder_check.check_encoder`; about["encoder"] is named.
    """
    if not isinstance(pooling, LayerPooling) or len(examples) < 2:
        return None
    tried = _tried(examples)
    try:
        if isinstance(collate, Collate) and (note := collate.check([example.source for example in examples])):
            print(note)
        findings = pooling.check(collate, [example.source for example in tried])
    except EncoderError as error:
        raise EncoderError(f"{about.get('encoder')}: {error}") from None
    except NotFiniteError as error:
        raise _not_finite(examples.index(tried[error.place]), examples) from None
    except Exception as error:
        raise _explained(error, pooling, f"{about.get('encoder')}, first examples") from error
    print(findings)
    return findings


def _tried(examples: list[Example]) -> list[Example]:
    """Return some examples, 16 or all: the shortest and the longest of all, which may come late, and the first."""
    ends = [min(examples, key=_size), max(examples, key=_size)]
    first = [example for example in examples[:TRIED] if example not in ends]
    return [*ends, *first][:TRIED]


def _size(example: Example) -> int:
    """Return how long an example is, near enough: characters of a text, bytes of a file."""
    return len(example.source) if isinstance(example.source, str) else example.source.stat().st_size


def _batches(
    rows: Sequence[int], examples: list[Example], collate: Callable, batch: int, checked: dict | None
) -> list[list[int]]:
    """Cut the places of some examples into batches in which no example's features depend on the others. checked: what
    was measured of the encoder, see `daam.encoder_check.Findings`.
    """
    mode = "any" if checked is None else checked["batches"]
    if mode == "one at a time":
        return [[i] for i in rows]
    groups: dict[tuple, list[int]] = {}
    for i in sorted(rows, key=lambda i: _size(examples[i])):  # those of about one length need little padding
        shapes = input_shapes(collate([examples[i].source])) if mode == "equal lengths" and batch > 1 else ()
        groups.setdefault(shapes, []).append(i)
    return [group[start : start + batch] for group in groups.values() for start in range(0, len(group), batch)]


def _run(
    pooling: nn.Module, collate: Callable, examples: list[Example], places: list[int], checked: dict | None
) -> Tensor:  # fmt: skip
    """Return the features of the examples at some places, (places, layers, features) in fp32 on the CPU."""
    named = f"examples {min(places)} to {max(places)}"
    try:
        with torch.no_grad():
            features = _call(pooling, collate, [examples[i].source for i in places], checked).float().cpu()
    except Exception as error:
        raise _explained(error, pooling, f"{named} ({examples[places[0]]})") from error
    if features.dim() != 3 or len(features) != len(places):
        raise CacheError(
            f"{named}: the encoder gave shape {tuple(features.shape)}, expected ({len(places)}, layers, features)"
        )
    if (row := first_not_finite(features)) is not None:
        raise _not_finite(places[row], examples)
    return features


def _call(pooling: nn.Module, collate: Callable, sources: list, checked: dict | None) -> Tensor:
    """Return the features of some sources. Where all that were tried had one shape, nothing is known of padding: those
    of this shape share a batch, others go alone.
    """
    if len(sources) == 1 or checked is None or checked.get("shape") is None:
        return pooling(**collate(sources))
    alone = [collate([source]) for source in sources]
    wanted = [[name, list(shape)] for name, shape in checked["shape"]]
    alike = [i for i, inputs in enumerate(alone) if [[n, list(shape)] for n, shape in input_shapes(inputs)] == wanted]
    found = {i: pooling(**inputs) for i, inputs in enumerate(alone) if i not in alike}
    if alike:
        together = {name: torch.cat([alone[i][name] for i in alike]) for name in alone[alike[0]]}
        found |= dict(zip(alike, pooling(**together).split(1), strict=True))
    return torch.cat([found[i] for i in range(len(sources))])


def _not_finite(place: int, examples: list[Example]) -> CacheError:
    return CacheError(
        f"features of example {place} ({examples[place]}) hold NaN or inf, expected numbers: look at this example and "
        "at the encoder's dtype"
    )


def _explained(error: Exception, pooling: nn.Module, named: str) -> Exception:
    """Return an error as an `EncoderError` where a user can mend it: what does not fit, and what fails in an encoder,
    which is no code of ours. Return bugs, and a lack of memory, as they are. named: the examples, in words.
    """
    if isinstance(error, UserError) or lacks_memory(error):
        return error
    if isinstance(error, ValueError):
        return EncoderError(f"{named}: {error}")
    if Path(traceback.extract_tb(error.__traceback__)[-1].filename).is_relative_to(PACKAGE):
        return error
    limit = positions_of(pooling.encoder) if isinstance(pooling, LayerPooling) else NO_LIMIT
    if limit < NO_LIMIT and "index out of range" in str(error):
        return EncoderError(f"{named}: more positions than the encoder's {limit}: take a lower --max-length")
    return EncoderError(f"{named}: the encoder fails ({type(error).__name__}: {error})")
