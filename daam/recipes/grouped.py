"""Splits by whole groups, like speakers: no group is in two of the parts that train, validate and test."""

from __future__ import annotations

import warnings

import numpy as np
import torch
from torch import Tensor

from daam.recipes.errors import extra
from daam.recipes.runs import RunError, Settings, Split

with extra():
    from sklearn.model_selection import StratifiedGroupKFold

LEAST = 3  # groups: to train, to validate and to test
ADVICE = "add groups or leave the class out"
TEST_SHARE, VALIDATION_SHARE = 0.2, 0.1


def split_groups(labels: Tensor, settings: Settings, groups: Tensor) -> list[Split]:
    """Return a split for each fold or seed of examples with labels and groups, (examples,) of int64: whole groups,
    stratified by label as well as they allow.

    Folds test every example once; a seed draws groups with about a fifth of the examples to test. Groups with about a
    tenth of the others validate, one at least. Every class trains in each split. Where its groups are too few, it may
    be missing from those that validate or test. Raises a RunError where there are too few groups, of all or of a class.
    """
    check_groups(labels, settings, groups)
    _, unit = np.unique(groups.numpy(), return_inverse=True)
    counts = _count(unit, labels)
    found = []
    for rest, test in _tests(labels, unit, counts, settings):
        train, validation = _draw(rest, counts, VALIDATION_SHARE, seed=0, spare=1)
        found.append(Split(*(places_of(unit, part) for part in (train, validation, test))))
    return found


def hold_out_groups(labels: Tensor, groups: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    """Return the places of examples that train, and of those that validate: groups with about a tenth, at random by the
    seed, so that every class trains. labels, groups: (examples,) of int64. Raises a RunError where that cannot be.
    """
    _, unit = np.unique(groups.numpy(), return_inverse=True)
    counts = _count(unit, labels)
    train, validation = _draw(np.arange(len(counts)), counts, VALIDATION_SHARE, seed, spare=1)
    return places_of(unit, train), places_of(unit, validation)


def check_groups(labels: Tensor, settings: Settings, groups: Tensor, names: list[str] | None = None) -> None:
    """Raise a RunError where there are too few groups, (examples,), of all or of a class. names: of the classes."""
    count = len(groups.unique())
    least = LEAST if settings.seeds else max(LEAST, settings.folds)
    if count < least:
        ways = ["add groups", "leave --groups out"]
        if count >= LEAST:
            ways.append(f"take --folds {count}")
        raise RunError(
            f"there are {count} groups, those that share equal examples counted as one, expected {least} or more, of "
            f"which no two parts of a split share one: {' or '.join(ways)}"
        )
    if settings.seeds:
        return
    if (largest := int(labels.bincount().max())) < settings.folds:
        raise RunError(
            f"no class has more than {largest} examples, expected {settings.folds} or more of one: add examples or "
            f"take {f'--folds {largest}' if largest > 1 else '--seeds'}"
        )
    for label in labels.unique().tolist():
        if len(groups[labels == label].unique()) == 1:
            raise RunError(_lost(label, 1, f"2 or more, since each tests once: {ADVICE} or take --seeds", names))


def name_of(label: int, names: list[str] | None) -> str:
    """Return a class in words: its name, or its number where there are no names."""
    return repr(names[label]) if names else str(label)


def places_of(unit: np.ndarray, units: np.ndarray) -> Tensor:
    """Return the places of examples, sorted, in int64: those whose unit, (examples,), is one of the units."""
    return torch.from_numpy(np.flatnonzero(np.isin(unit, units)))


def _lost(label: int, count: int, expected: str, names: list[str] | None = None) -> str:
    groups = "group" if count == 1 else "groups"
    return (
        f"class {name_of(label, names)} would be missing from training: its examples are of {count} {groups}, expected "
        f"{expected}"
    )


def _count(unit: np.ndarray, labels: Tensor) -> np.ndarray:
    """Return the number of examples that each unit has of each class, (units, classes)."""
    counts = np.zeros((unit.max() + 1, int(labels.max()) + 1), dtype=np.int64)
    np.add.at(counts, (unit, labels.numpy()), 1)
    return counts


def _tests(labels: Tensor, unit: np.ndarray, counts: np.ndarray, settings: Settings):
    """Yield (rest, test) for each fold or seed: units of both."""
    units = np.arange(len(counts))
    if settings.seeds:
        yield from (_draw(units, counts, TEST_SHARE, seed, spare=2) for seed in range(settings.seeds))
        return
    folds = StratifiedGroupKFold(settings.folds, shuffle=True, random_state=0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of classes with few examples, which are checked here
        found = [np.unique(unit[test]) for _, test in folds.split(unit, labels.numpy(), unit)]
    for test in found:
        rest = np.setdiff1d(units, test)
        trained = counts[rest].sum(0)
        if not len(test):
            raise RunError(f"a fold of --folds {settings.folds} has no group to test: take fewer folds")
        if lost := np.flatnonzero((trained == 0) & (counts.sum(0) > 0)).tolist():
            groups = np.count_nonzero(counts[:, lost[0]])
            expected = f"more, since these test in one fold: {ADVICE} or take other --folds or --seeds"
            raise RunError(_lost(lost[0], groups, expected))
        yield rest, test


def _draw(units: np.ndarray, counts: np.ndarray, share: float, seed: int, spare: int) -> tuple[np.ndarray, np.ndarray]:
    """Return (rest, drawn): units, with counts of classes, (all units, classes), cut in two at random by the seed.

    Drawn are units, in random order, as long as each brings the examples that are drawn closer to a share of each class
    and of all; then units of classes that are drawn from none, as long as spare units of each of their classes and half
    of the examples are left. One at least is drawn; of every class one is left. Raises a RunError where that cannot be.
    """
    totals = counts[units].sum(0)
    present = totals > 0
    owners = (counts[units] > 0).sum(0)  # units of each class that are left
    # a class of few units rather has one less that is left than none that is drawn
    least = np.clip(owners - 1, 1, spare)
    found = np.zeros_like(totals)
    order = np.random.RandomState(seed).permutation(units)  # whose numbers no version of NumPy changes
    drawn: list[int] = []

    def distance(unit: int | None = None) -> float:
        sums = found if unit is None else found + counts[unit]
        shares = sums[present] / totals[present]
        return float(np.square(shares - share).mean() + (sums.sum() / totals.sum() - share) ** 2)

    def leaves(unit: int, left: np.ndarray | int) -> bool:
        return bool((owners - (counts[unit] > 0) >= left)[counts[unit] > 0].all())

    def take(unit: int) -> None:
        nonlocal found, owners
        drawn.append(unit)
        found, owners = found + counts[unit], owners - (counts[unit] > 0)

    for unit in order:
        if leaves(unit, least) and distance(unit) < distance():
            take(unit)
    for label in np.flatnonzero(present):
        if not found[label]:
            able = [unit for unit in order if counts[unit, label] and leaves(unit, spare)]
            able = [unit for unit in able if 2 * (found + counts[unit]).sum() <= totals.sum()]
            if able:
                take(min(able, key=distance))
    if not drawn:
        if not (able := [unit for unit in order if leaves(unit, 1)]):
            label = min(np.flatnonzero(present).tolist(), key=lambda label: owners[label])
            expected = f"more, so that one can validate or test: {ADVICE}"
            raise RunError(_lost(label, np.count_nonzero(counts[:, label]), expected))
        take(min(able, key=distance))
    return np.setdiff1d(units, drawn), np.array(drawn)
