"""Splits of examples into those that train, validate and test: stratified by label, equal ones in one part."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from daam.recipes.errors import extra
from daam.recipes.runs import RunError, Settings, Split

with extra():
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components
    from sklearn.model_selection import StratifiedKFold, train_test_split

EQUAL = 1e-5  # distance in norms of an example: the same text is 5e-7 apart in other batches, others of its words 0.15
DIRECTIONS = 4  # two equal examples are neighbours along one of them, whatever lies between along another
REACH = 6  # a projection on a direction of unit variance is apart by six standard deviations of a distance at most


def splits(labels: Tensor, settings: Settings, groups: Tensor | None = None) -> list[Split]:
    """Return a split for each fold or seed, stratified by labels, (examples,). A tenth of what does not test validates,
    one example of each class at least.

    Every class is in all three parts of each split. Examples of one group, see `find_equal`, are in one part, but for
    those of a class that has too few different ones. Raises a RunError where a class has too few examples.
    """
    check_counts(labels, settings)
    folds, seeds, places = settings.folds, settings.seeds, torch.arange(len(labels))
    groups = places if groups is None else keep_together(labels, groups, folds, seeds)
    first, unit = np.unique(groups.numpy(), return_inverse=True)
    y = labels.numpy()[first]  # of units, which are split as examples are: where all differ, they are the examples
    tests = _random_tests(y, seeds) if seeds else StratifiedKFold(folds, shuffle=True, random_state=0).split(y, y)
    found = []
    for rest, test in tests:
        train, validation = _hold_out(rest, y, max(len(rest) // 10, len(np.unique(y))), seed=0, spare=1)
        parts = (np.flatnonzero(np.isin(unit, part)) for part in (train, validation, test))
        found.append(Split(*map(torch.from_numpy, parts)))
    return found


def check_counts(labels: Tensor, settings: Settings, names: list[str] | None = None) -> None:
    """Raise a RunError where there are too few examples of a class to split them. names: of the classes, to be told."""
    if not len(labels):
        raise RunError("there are no examples, expected some of each class")
    if not settings.seeds and settings.folds < 2:
        raise RunError(f"--folds is {settings.folds}, expected 2 or more")
    least = needed(settings.folds, settings.seeds)
    fewest, label = min((count, label) for label, count in enumerate(labels.bincount().tolist()) if count)
    if fewest < least:
        ways = ["add examples", "leave the class out"]
        if fewest >= 3 and not settings.seeds:  # as many folds as examples do
            ways.append(f"take --folds {fewest}")
        raise RunError(
            f"class {repr(names[label]) if names else label} has {fewest} examples, expected {least} or more to split "
            f"by label: {' or '.join(ways)}"
        )


def needed(folds: int, seeds: int | None) -> int:
    """Return how many examples of a class it takes for each part of each split to have one."""
    if seeds:
        return 3
    # two folds test half of a class each, and the other half must be two examples, to train and to validate on
    return 4 if folds == 2 else folds


def find_equal(features: Tensor) -> Tensor:
    """Return for every example the place of the first one with its features: (examples, …) to (examples,) in int64.

    Features count as equal that differ by no more than an encoder's rounding does. To compare all pairs would take too
    long. Projections of equal examples on a random direction are nearly the same, so neighbours in their order are
    compared alone; others that lie between two equal examples along one direction do so hardly along all of them.
    """
    rows = features.flatten(1)
    limits = EQUAL * rows.norm(dim=1).double()  # of the distance to an equal example
    directions = torch.randn(rows.shape[1], DIRECTIONS, generator=torch.Generator().manual_seed(0)).double()
    # some rows at a time: all of them in double precision may have no room
    projections = torch.cat([block.double() @ directions for block in rows.split(1024)])
    pairs = torch.cat([_equal_neighbours(rows, limits, projection) for projection in projections.T], 1)
    return _first_connected(pairs, len(rows))


def _first_connected(pairs: Tensor, count: int) -> Tensor:
    """Return for each of count places the first one that pairs, (2, pairs), connect it with, also over others."""
    edges = (np.ones(pairs.shape[1]), tuple(pairs.numpy()))
    _, component = connected_components(coo_array(edges, shape=(count, count)), directed=False)
    _, first = np.unique(component, return_index=True)  # components are numbered from 0
    return torch.from_numpy(first[component])


def _equal_neighbours(rows: Tensor, limits: Tensor, projection: Tensor) -> Tensor:
    """Return the pairs of places, (2, pairs), of equal rows that are neighbours by a projection, (rows,)."""
    values, order = projection.sort()
    places = (values.diff() <= REACH * limits[order[1:]]).nonzero().flatten()
    pairs = torch.stack([order[places], order[places + 1]])
    distances = torch.cat([(rows[first] - rows[second]).norm(dim=1) for first, second in pairs.split(1024, 1)])
    return pairs[:, (distances <= limits[pairs[1]]) & distances.isfinite()]


def keep_together(labels: Tensor, groups: Tensor, folds: int, seeds: int | None) -> Tensor:
    """Return groups, (examples,), in which each example of a class with too few different ones is a group itself."""
    first = groups.unique()
    different = labels[first].bincount(minlength=int(labels.max()) + 1)
    return torch.where(different[labels] < needed(folds, seeds), torch.arange(len(labels)), groups)


def _random_tests(y: np.ndarray, seeds: int):
    places, size = np.arange(len(y)), max(len(y) // 5, len(np.unique(y)))
    return (_hold_out(places, y, size, seed, spare=2) for seed in range(seeds))


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
