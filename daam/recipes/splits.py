"""Splits of examples into those that train, validate and test: stratified by label, equal ones in one part; by groups,
or as data says, where it does.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from daam.recipes.cache import Cache, StoredFeatures, iterate_blocks
from daam.recipes.errors import extra
from daam.recipes.examples import PARTS, TEST, TRAIN, VALIDATION
from daam.recipes.grouped import check_groups, hold_out_groups, name_of, places_of, split_groups
from daam.recipes.runs import RunError, Settings, Split

with extra():
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components
    from sklearn.model_selection import StratifiedKFold, train_test_split

PREDEFINED = 3  # runs on a predefined split, where --seeds gives no number of them
# distance in norms of an example, by the dtype on disk: the same text is 5e-7 apart in other batches, and further where
# some of its features are rounded to one side and to the other; other texts of its words are 0.15 apart
EQUAL = {"fp32": 1e-5, "fp16": 1e-3, "bf16": 1e-3}
DIRECTIONS = 4  # two equal examples are neighbours along one of them, whatever lies between along another
REACH = 6  # a projection on a direction of unit variance is apart by six standard deviations of a distance at most


def splits(
    labels: Tensor, settings: Settings, equal: Tensor | None = None, groups: Tensor | None = None,
    parts: Tensor | None = None,
) -> list[Split]:  # fmt: skip
    """Return a split for each fold or seed, stratified by labels, (examples,). A tenth of what does not test validates,
    one example of each class at least.

    Every class is in all three parts of each split. Examples that are equal, by `find_equal`'s equal, (examples,), are
    in one part, but for those of a class that has too few different ones.

    Given groups, (examples,), a number for each, whole groups are split, see `daam.recipes.grouped.split_groups`. Given
    parts, (examples,), of `examples.TRAIN`, `VALIDATION` and `TEST`, there is a split for each seed, or PREDEFINED of
    them, with these parts, whatever examples are equal; without a validation part a tenth of those that train
    validates, another one for each seed.

    Raises a RunError where a class has too few examples, or too few groups; see `check_counts`.
    """
    check_counts(labels, settings, groups=groups, parts=parts)
    if parts is not None:
        count = settings.seeds or PREDEFINED
        return [_predefined(labels, parts, equal, groups, seed) for seed in range(count)]
    if groups is not None:
        return split_groups(labels, settings, _joined(groups, equal))
    folds, seeds, places = settings.folds, settings.seeds, torch.arange(len(labels))
    units = places if equal is None else keep_together(labels, equal, folds, seeds)
    first, unit = np.unique(units.numpy(), return_inverse=True)
    y = labels.numpy()[first]  # of units, which are split as examples are: where all differ, they are the examples
    tests = _random_tests(y, seeds) if seeds else StratifiedKFold(folds, shuffle=True, random_state=0).split(y, y)
    found = []
    for rest, test in tests:
        train, validation = _hold_out_tenth(rest, y, seed=0)
        found.append(Split(*(places_of(unit, part) for part in (train, validation, test))))
    return found


def _predefined(labels: Tensor, parts: Tensor, equal: Tensor | None, groups: Tensor | None, seed: int) -> Split:
    """Return a split with the parts that are given; where none validates, the seed draws examples that do."""
    train, validation, test = ((parts == part).nonzero().flatten() for part in (TRAIN, VALIDATION, TEST))
    if len(validation):
        return Split(train, validation, test)
    y, inside = labels[train], None if equal is None else _first_places(equal[train])
    if groups is not None:
        left, drawn = hold_out_groups(y, _joined(groups[train], inside), seed)
    else:
        units = torch.arange(len(y)) if inside is None else _kept(y, inside, 2)
        first, unit = np.unique(units.numpy(), return_inverse=True)
        of_units = y.numpy()[first]
        found = _hold_out_tenth(np.arange(len(first)), of_units, seed)
        left, drawn = (places_of(unit, part) for part in found)
    return Split(train[left], train[drawn], test)


def _first_places(codes: Tensor) -> Tensor:
    """Return for each code, (examples,), the first place that has it, in int64."""
    _, first, code = np.unique(codes.numpy(), return_index=True, return_inverse=True)
    return torch.from_numpy(first[code])


def _joined(groups: Tensor, equal: Tensor | None) -> Tensor:
    """Return groups, (examples,), of which those that share equal examples are one: the first place of each."""
    codes = [_first_places(groups)] if equal is None else [_first_places(groups), _first_places(equal)]
    pairs = torch.cat([torch.stack([torch.arange(len(groups)), first]) for first in codes], 1)
    return _first_connected(pairs, len(groups))


def check_counts(
    labels: Tensor, settings: Settings, names: list[str] | None = None, groups: Tensor | None = None,
    parts: Tensor | None = None,
) -> None:  # fmt: skip
    """Raise a RunError where there are too few examples of a class, or too few groups, to split them, or a class or a
    group is in parts, (examples,), that do not suit. names: of the classes, to be told.
    """
    if not len(labels):
        raise RunError("there are no examples, expected some of each class")
    for name, found in {"groups": groups, "parts": parts}.items():
        if found is not None and found.shape != labels.shape:
            raise RunError(f"{name} has shape {tuple(found.shape)}, expected that of labels, {tuple(labels.shape)}")
    if parts is not None:
        return _check_parts(labels, parts, groups, names)
    if not settings.seeds and settings.folds < 2:
        raise RunError(f"--folds is {settings.folds}, expected 2 or more")
    if groups is not None:
        return check_groups(labels, settings, groups, names)
    least = needed(settings.folds, settings.seeds)
    fewest, label = min((count, label) for label, count in enumerate(labels.bincount().tolist()) if count)
    if fewest < least:
        ways = ["add examples", "leave the class out"]
        if fewest >= 3 and not settings.seeds:  # as many folds as examples do
            ways.append(f"take --folds {fewest}")
        raise RunError(
            f"class {name_of(label, names)} has {fewest} examples, expected {least} or more to split by label: "
            f"{' or '.join(ways)}"
        )


def _check_parts(labels: Tensor, parts: Tensor, groups: Tensor | None, names: list[str] | None) -> None:
    if wrong := sorted(set(parts.tolist()) - {TRAIN, VALIDATION, TEST}):
        raise RunError(f"parts holds {wrong[0]}, expected {TRAIN}, {VALIDATION} or {TEST}")
    counts = torch.stack([labels[parts == part].bincount(minlength=int(labels.max()) + 1) for part in range(3)])
    if missing := [PARTS[part] for part in (TRAIN, TEST) if not counts[part].any()]:
        raise RunError(f"no {' and no '.join(missing)} examples in the parts of the data, expected some of both")
    for label in range(counts.shape[1]):
        trained, others = int(counts[TRAIN, label]), int(counts[[VALIDATION, TEST], label].sum())
        if others and not trained:
            raise RunError(
                f"class {name_of(label, names)} has {others} examples that validate or test and none to train on, "
                "expected 1 or more"
            )
        if trained == 1 and groups is None and not counts[VALIDATION].any():
            raise RunError(
                f"class {name_of(label, names)} has 1 training example, expected 2 or more, of which one validates: "
                "add examples, or a validation part to the data"
            )
    if groups is None:
        return
    owners = torch.stack([torch.isin(groups.unique(), groups[parts == part]) for part in range(3)])
    if several := int((owners.sum(0) > 1).sum()):
        raise RunError(
            f"{several} groups are in two parts or more, expected each in one of train, validation and test: give "
            "--groups or --split, not both, or mend the data"
        )


def needed(folds: int, seeds: int | None) -> int:
    """Return how many examples of a class it takes for each part of each split to have one."""
    if seeds:
        return 3
    # two folds test half of a class each, and the other half must be two examples, to train and to validate on
    return 4 if folds == 2 else folds


@lru_cache(maxsize=1)  # features are read whole for it
def equal_in(cache: Cache) -> Tensor:
    """Return what `find_equal` says of a cache."""
    return find_equal(cache.features, cache.dtype)


def find_equal(features: Tensor | StoredFeatures, dtype: str = "fp32") -> Tensor:
    """Return for every example the place of the first one with its features: (examples, …) to (examples,) in int64.
    dtype: of features on disk, to which they were rounded.

    Features count as equal that differ by no more than an encoder's rounding does. To compare all pairs would take too
    long. Projections of equal examples on a random direction are nearly the same, so neighbours in their order are
    compared alone; others that lie between two equal examples along one direction do so hardly along all of them.
    """
    size = features.shape[1:].numel()
    directions = torch.randn(size, DIRECTIONS, generator=torch.Generator().manual_seed(0)).double()
    # made beforehand: small results between large blocks would keep their memory from being used again
    limits = torch.empty(len(features), dtype=torch.float64)  # of the distance to an equal example
    projections, start = torch.empty(len(features), DIRECTIONS, dtype=torch.float64), 0
    for block in iterate_blocks(features):  # all of them in double precision may have no room
        rows, places = block.flatten(1), slice(start, start + len(block))
        limits[places] = EQUAL[dtype] * rows.norm(dim=1)
        projections[places] = rows.double() @ directions
        start += len(block)
    pairs = [_equal_neighbours(features, limits, projection) for projection in projections.T]
    return _first_connected(torch.cat(pairs, 1), len(features))


def _first_connected(pairs: Tensor, count: int) -> Tensor:
    """Return for each of count places the first one that pairs, (2, pairs), connect it with, also over others."""
    edges = (np.ones(pairs.shape[1]), tuple(pairs.numpy()))
    _, component = connected_components(coo_array(edges, shape=(count, count)), directed=False)
    _, first = np.unique(component, return_index=True)  # components are numbered from 0
    return torch.from_numpy(first[component])


def _equal_neighbours(features: Tensor | StoredFeatures, limits: Tensor, projection: Tensor) -> Tensor:
    """Return the pairs of places, (2, pairs), of equal examples that are neighbours by a projection, (examples,)."""
    values, order = projection.sort()
    places = (values.diff() <= REACH * limits[order[1:]]).nonzero().flatten()
    pairs = torch.stack([order[places], order[places + 1]])
    both = zip(*(iterate_blocks(features, side) for side in pairs), strict=True)
    distances = torch.cat([(first - second).flatten(1).norm(dim=1) for first, second in both])
    return pairs[:, (distances <= limits[pairs[1]]) & distances.isfinite()]


def keep_together(labels: Tensor, equal: Tensor, folds: int, seeds: int | None) -> Tensor:
    """Return equal, (examples,), in which each example of a class with too few different ones equals itself alone."""
    return _kept(labels, equal, needed(folds, seeds))


def _kept(labels: Tensor, equal: Tensor, least: int) -> Tensor:
    """Return equal, (examples,), in which an example of a class with less than least different ones is on its own."""
    first = equal.unique()
    different = labels[first].bincount(minlength=int(labels.max()) + 1)
    return torch.where(different[labels] < least, torch.arange(len(labels)), equal)


def _random_tests(y: np.ndarray, seeds: int):
    places, size = np.arange(len(y)), max(len(y) // 5, len(np.unique(y)))
    return (_hold_out(places, y, size, seed, spare=2) for seed in range(seeds))


def _hold_out_tenth(places: np.ndarray, y: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray]:
    return _hold_out(places, y, max(len(places) // 10, len(np.unique(y))), seed, spare=1)


def _hold_out(places: np.ndarray, y: np.ndarray, size: int, seed: int, spare: int) -> tuple[np.ndarray, np.ndarray]:
    """Return (rest, drawn): places cut in two at random. About size of them are drawn, so that of every class in y at
    least one is drawn, and at least spare are left.
    """
    rest, drawn = train_test_split(places, test_size=size, random_state=seed, stratify=y[places])
    for label in np.unique(y[places]):
        # scikit-learn rounds a rare class down to none
        rest, drawn = _move(rest, drawn, y, label, 1)
        drawn, rest = _move(drawn, rest, y, label, spare)
    return rest, drawn


def _move(source: np.ndarray, target: np.ndarray, y: np.ndarray, label: int, count: int):
    """Move examples of a class from source to target until the target has count of it; return both."""
    missing = count - np.count_nonzero(y[target] == label)
    if missing <= 0:
        return source, target
    moved = source[y[source] == label][:missing]
    return source[~np.isin(source, moved)], np.concatenate([target, moved])
