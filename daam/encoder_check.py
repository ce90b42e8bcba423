"""Measure on examples what features of a frozen encoder depend on, instead of knowing it by the encoder's name.

A frozen encoder computes one function, and yet an example may get other features beside others than alone. Examples of
a batch are padded to the longest one, and padding reaches the others wherever something does not look at the mask:

- Positions that count from the end, or through padding, as where it stands on the left, or in relative positions.
- Convolutions over time, whose windows reach over an example's end: speech encoders, unless they are given zeros there
  and zeros are what they saw in training. Those that normalise a group of features over all positions (GroupNorm in the
  first layer of wav2vec 2.0's base models) change by the number of padded positions themselves.
- Fourier transforms over positions (FNet), poolings and downsamplings that round a length up, hashes or random features
  of all positions.
- Batch normalisation in training mode, which is why encoders are put in eval mode, and mixtures of experts with a
  capacity, which drop positions for those of others.
- An extractor that normalises a sound, or pads an image, by what stands beside it.

Then an accuracy would depend on the size of the batch, and on the order of the examples. What is left where nothing of
that happens is rounding: matrices of another size are added up in another order, 1e-6 standard deviations in fp32.
`check_encoder` tells the two apart, and `daam.recipes.features` takes batches accordingly: of any examples, of about
one length, so that little is padded; of equal lengths, where padding changes something; one at a time, where a batch
does. So features do not depend on the batch, as far as sixteen examples show what does.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from daam.checks import lacks_memory
from daam.pooling import LayerPooling

TRIED = 16  # examples
# how far calls may differ, in standard deviations: many times what the order of sums makes, a hundredth of padding's
AGREE = {torch.float64: 1e-8, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}


@dataclass(frozen=True)
class Findings:
    """Hold what was measured of an encoder.

    batches: which examples may share a batch: "any", those of "equal lengths", or none, "one at a time". padding: the
    largest difference between an example alone and beside the longest one, in standard deviations of the features;
    None where a batch of all failed, for the reason given. positions: of the shortest and of the longest example.
    examples: their number. equal: how many different ones have the features of another. shape: of what went in for an
    example, where all had the same: then nothing is known of others.
    """

    batches: Literal["any", "equal lengths", "one at a time"]
    padding: float | None
    positions: tuple[int, int]
    examples: int
    reason: str = ""
    equal: int = 0
    shape: tuple | None = None

    def __str__(self) -> str:
        low, high = self.positions
        remedy = "equal lengths share a batch" if self.batches == "equal lengths" else "one example at a time"
        summary = f"checked on {self.examples} examples of {low} to {high} positions: calls agree, masks fit, "
        if self.equal:
            summary += f"{self.equal} different ones have the features of another, "
        if self.padding is None:
            return f"{summary}a batch fails ({self.reason}): {remedy}"
        shown = f"beside others an example differs by {self.padding:.1g} standard deviations"
        return summary + (f"{shown} at most" if self.batches == "any" else f"{shown}: {remedy}")

    def as_dict(self) -> dict[str, Any]:
        """Return the findings as plain values, for JSON."""
        return asdict(self)


class NotFiniteError(ValueError):
    """Report that features of an example are NaN or infinite; place is its index."""

    def __init__(self, place: int):
        super().__init__(f"features of example {place} hold NaN or inf, expected numbers: look at it, and at the dtype")
        self.place = place


def check_encoder(
    pooling: LayerPooling, collate: Callable[[list], Mapping[str, Any]], examples: Sequence[Any]
) -> Findings:
    """Measure, on up to 16 examples, what their features depend on.

    Args:
        pooling: with the encoder. Where its batch_first is None and its layers give positions first, that is set.
        collate: from a list of examples to the keyword arguments of a call.
        examples: two different ones or more, in the order of their use.

    Raises:
        ValueError: two calls on one example differ; features are NaN or infinite; different examples have the same
            features; a mask does not end where the positions end.
    """
    examples = list(examples)[:TRIED]
    if len(examples) < 2:
        raise ValueError(f"{len(examples)} examples, expected two or more to compare")
    with torch.no_grad():
        inputs = [collate([example]) for example in examples]
        sizes = [sum(value.numel() for value in batch.values() if isinstance(value, Tensor)) for batch in inputs]
        order = sorted(range(len(examples)), key=lambda i: -sizes[i])
        results = {i: _call_alone(pooling, inputs[i], i) for i in order}
        averages, counts = zip(*(results[i] for i in range(len(examples))), strict=True)
        if len(layouts := {tuple(average.shape[1:]) for average in averages}) > 1:
            raise ValueError(
                f"examples have features of shapes {', '.join(map(str, sorted(layouts)))}, expected one: layers must "
                "give (batch, positions, features)"
            )
        features, lengths = torch.cat(averages), torch.cat(counts).tolist()
        scale = _deviations(features)
        agree = AGREE[pooling_dtype(pooling)]
        # the longest one was the first: an encoder that remembers what came since shows it
        longest = pooling(**collate([examples[order[0]]])).cpu()
        _check_repeats(longest, features[order[:1]], scale, agree)
        n_equal = _check_differ(examples, features, scale)

        def difference(places: list[int]) -> float:
            return _distance(pooling(**collate([examples[i] for i in places])).cpu(), features[places], scale)

        shapes = [input_shapes(batch) for batch in inputs]
        findings = _batches(difference, lengths, shapes, agree)
        if findings.batches != "any":
            # not for what calls remember or draw: once more, in another order, and one call later
            _call_alone(pooling, inputs[order[-1]], order[-1])
            for i in order[::-1]:
                _check_repeats(_call_alone(pooling, collate([examples[i]]), i)[0], features[i : i + 1], scale, agree)
        return replace(findings, equal=n_equal, shape=shapes[0] if len(set(shapes)) == 1 else None)


def input_shapes(batch: Mapping[str, Any]) -> tuple:
    """Return the shapes of what goes into an encoder for one example: those of equal shapes need no padding."""
    return tuple((name, tuple(value.shape)) for name, value in sorted(batch.items()) if isinstance(value, Tensor))


def pooling_dtype(pooling: LayerPooling) -> torch.dtype:
    """Return the coarsest floating dtype of an encoder's parameters, fp32 where it has none."""
    dtypes = {p.dtype for p in pooling.encoder.parameters() if p.dtype in AGREE}
    return max(dtypes, key=AGREE.__getitem__, default=torch.float32)


def _call_alone(pooling: LayerPooling, batch: Mapping[str, Any], place: int) -> tuple[Tensor, Tensor]:
    """Return one example's features (1, layers, features), and the number of its valid positions, (1,)."""
    try:
        features, count = pooling.average_and_count(**batch)
    except ValueError:
        if pooling.batch_first is not None:
            raise
        # one example alone has a first dimension of 1, unless positions come first
        pooling.batch_first = False
        try:
            features, count = pooling.average_and_count(**batch)
        except ValueError:
            features = ()
        if len(features) != 1:
            pooling.batch_first = None
            raise
    features = features.cpu()
    if not features.isfinite().all():
        raise NotFiniteError(place)
    return features, count.cpu()


def _deviations(features: Tensor) -> Tensor:
    """Return the standard deviation of each layer's features, (layers,), by their median distance from the median."""
    # so that single features that are large everywhere do not count
    values = features.transpose(0, 1).flatten(1)
    distances = (values - values.median(1, keepdim=True).values).abs()
    deviations = 1.4826 * distances.median(1).values
    return torch.where(deviations > 0, deviations, values.std(1)).clamp(min=torch.finfo(features.dtype).tiny)


def _check_repeats(repeated: Tensor, features: Tensor, scale: Tensor, agree: float) -> None:
    if (distance := _distance(repeated, features, scale)) > agree:
        raise ValueError(
            f"two calls on one example differ by {distance:.2g} standard deviations: the encoder, or what prepares its "
            "input, draws at random, or remembers other calls"
        )


def _check_differ(examples: list, features: Tensor, scale: Tensor) -> int:
    """Return the number of different examples that have the features of an earlier one; raise where most do."""
    different = [i for i, example in enumerate(examples) if not any(_are_equal(example, e) for e in examples[:i])]
    distinct: list[int] = []
    for i in different:
        if all(_distance(features[i : i + 1], features[j : j + 1], scale) > 1e-6 for j in distinct):
            distinct.append(i)
    if len(different) > 1 and len(distinct) <= len(different) // 2:
        raise ValueError(
            f"{len(different)} different examples have {len(distinct)} different features, expected as many: what "
            "prepares them loses what tells them apart, like a tokenizer that is not the encoder's, or a cut too early"
        )
    return len(different) - len(distinct)


def _are_equal(a: Any, b: Any) -> bool:
    try:
        if isinstance(a, Path) and isinstance(b, Path):
            return a.read_bytes() == b.read_bytes()
        return bool(a == b)
    except (RuntimeError, ValueError):  # tensors and arrays
        return False


def _batches(
    difference: Callable[[list[int]], float], lengths: list[int], shapes: list[tuple], agree: float
) -> Findings:
    """Find which examples may share a batch: all, those of equal lengths, or none."""
    span, everything = (min(lengths), max(lengths)), list(range(len(lengths)))
    reason, padding = "", None
    try:
        padding = difference(everything)
    except Exception as error:  # an encoder that takes one example at a time fails in a way of its own
        if lacks_memory(error):  # of so many at a time
            padding = difference([lengths.index(span[0]), lengths.index(span[1])])
        reason = " ".join(str(error).split())[:160]
    if padding is not None and padding <= agree:
        return Findings("any", padding, span, len(lengths))
    groups = [[i for i in everything if shapes[i] == shape] for shape in dict.fromkeys(shapes)]
    groups = [group for group in groups if 1 < len(group) < len(everything)]
    try:
        share_batches = bool(groups) and all(difference(group) <= agree for group in groups)
    except Exception:  # as above; what lacks memory goes one at a time
        share_batches = False
    return Findings("equal lengths" if share_batches else "one at a time", padding, span, len(lengths), reason)


def _distance(a: Tensor, b: Tensor, scale: Tensor) -> float:
    """Return the largest difference of two (examples, layers, features) in units of scale, (layers,); inf for NaN."""
    distance = ((a - b).abs().amax((0, 2)) / scale).max().item()
    return distance if distance == distance else float("inf")
