"""Splits of examples: by label, by groups, and as data says; and every message."""

import itertools
import json
import math
import random
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch

pytest.importorskip("sklearn")
pytest.importorskip("safetensors")

from daam.recipes.examples import TEST, TRAIN, VALIDATION
from daam.recipes.runs import RunError, Settings
from daam.recipes.splits import PREDEFINED, check_counts, find_equal, splits

HISTORY = Path(__file__).parents[2] / "bench" / "history"
LAYERS, FEATURES = 6, 16
QUICK = Settings("daam", folds=2)


SPLITTINGS = [{"folds": 2}, {"folds": 3}, {"folds": 5}, {"seeds": 3}]


def needed(folds=None, seeds=None):
    """Return the fewest examples of a class that can be split: parts that do not test it must train and validate."""
    if seeds:
        return 3
    return next(n for n in itertools.count(folds) if n - math.ceil(n / folds) >= 2)


def check_splits(found, labels, folds=None, seeds=None, groups=None):
    """Check that parts do not overlap and have all classes, that folds test every example once, and that groups stay
    together.
    """
    indices, classes = torch.arange(len(labels)), set(labels.tolist())
    for split in found:
        parts = [split.train, split.validation, split.test]
        assert torch.cat(parts).sort().values.equal(indices)
        assert all(set(labels[part].tolist()) == classes for part in parts)
        if groups is not None:
            owners = [set(groups[part].tolist()) for part in parts]
            assert sum(map(len, owners)) == len(set(groups.tolist())), "a group is in two parts"
    if folds:
        assert len(found) == folds and torch.cat([split.test for split in found]).sort().values.equal(indices)
    else:
        assert len(found) == seeds and not torch.equal(found[0].test, found[1].test)


def draw_labels(generator, least):
    """Draw shuffled labels of one to seven classes, some of as few examples as can be."""
    counts = [least + generator.choice([0, 0, 1, 2, 9, 40, 95]) for _ in range(generator.randint(1, 7))]
    labels = [label for label, count in enumerate(counts) for _ in range(count)]
    generator.shuffle(labels)
    return torch.tensor(labels)


@pytest.mark.parametrize("options", SPLITTINGS, ids=str)
def test_every_class_is_in_every_part(options):
    generator = random.Random(0)
    for _ in range(40):
        labels = draw_labels(generator, needed(**options))
        settings = replace(QUICK, **options)
        found = splits(labels, settings)
        check_splits(found, labels, **options)
        for split, repeated in zip(found, splits(labels, settings), strict=True):
            assert split.train.equal(repeated.train) and split.test.equal(repeated.test), "drawn anew"


@pytest.mark.parametrize("plan", SPLITTINGS, ids=str)
def test_equal_examples_stay_together(plan):
    generator = random.Random(1)
    for _ in range(20):
        labels = draw_labels(generator, needed(**plan))
        copies = torch.tensor([i for i in range(len(labels)) for _ in range(generator.choice([1, 1, 2, 7]))])
        copies = copies[torch.randperm(len(copies), generator=torch.Generator().manual_seed(0))]
        groups = torch.tensor([(copies == original).nonzero()[0].item() for original in copies])
        check_splits(splits(labels[copies], replace(QUICK, **plan), groups), labels[copies], **plan, groups=groups)


def test_classes_of_too_few_different_examples_are_split_by_example():
    """Check that examples of such classes are split singly, while equal examples of other classes stay together."""
    labels = torch.tensor([0] * 20 + [1] * 20)
    groups = torch.cat([torch.arange(10).repeat(2), torch.arange(20, 23).repeat(7)[:20]])
    found = splits(labels, QUICK, groups)
    check_splits(found, labels, folds=2)
    for split in found:
        parts = [set(groups[part[part < 20]].tolist()) for part in (split.train, split.validation, split.test)]
        assert sum(map(len, parts)) == 10


@pytest.mark.parametrize("options", SPLITTINGS, ids=str)
def test_fewer_examples_than_needed(options):
    """Check that the message says the number that is enough, in our words, and proposes folds that are possible."""
    least = needed(**options)
    labels = torch.tensor([0] * 30 + [1] * (least - 1))
    with pytest.raises(RunError) as refused:
        splits(labels, replace(QUICK, **options))
    message = str(refused.value)
    assert f"class 1 has {least - 1} examples, expected {least} or more to split by label: add examples" in message
    assert ("take --folds" in message) == ("folds" in options and least > 3)
    if "take --folds" in message:
        folds = int(message.rpartition(" ")[2])
        check_splits(splits(labels, replace(QUICK, folds=folds)), labels, folds=folds)


def test_splits_are_those_of_the_committed_comparison():
    """Check that splits are what they always were where all examples differ and no class is rare."""
    digits = torch.tensor(pytest.importorskip("sklearn.datasets").load_digits().target)
    labels = digits[digits >= 5] - 5
    rows = json.loads((HISTORY / "digits-cpu" / "comparison.json").read_text())
    found = splits(labels, replace(QUICK, seeds=3), torch.arange(len(labels)))
    for row in rows:
        assert [part["test"] for part in row["parts"]] == [split.test.tolist() for split in found]
        assert [part["validation"] for part in row["parts"]] == [split.validation.tolist() for split in found]


def test_equal_examples_are_found():
    """Check that examples equal up to rounding are found, as the same text in another batch comes out."""
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(60, LAYERS, FEATURES, generator=generator)
    expected = torch.arange(60)
    for copy, original in ((7, 3), (20, 3), (59, 40)):
        features[copy] = features[original] * (1 + 1e-6 * torch.randn(LAYERS, FEATURES, generator=generator))
        expected[copy] = original
    features[50] = features[1] * (1 + 1e-3)  # more than rounding
    assert find_equal(features).equal(expected)
    features[10], features[30] = 3e38, features[10]
    assert find_equal(features)[[7, 20, 59]].tolist() == [3, 3, 40]
    for same in (torch.zeros(5, 2, 3), torch.full((5, 2, 3), 0.1)):
        assert find_equal(same).tolist() == [0] * 5
    assert find_equal(torch.ones(1, 2, 3)).tolist() == [0] and not len(find_equal(torch.ones(0, 2, 3)))


def test_many_classes():
    """Check that as many examples validate as there are classes."""
    labels = torch.arange(80) % 16
    for split in splits(labels, QUICK):
        assert sorted(labels[split.validation].tolist()) == list(range(16))


# groups


def draw_groups(generator, classes):
    """Draw labels of some classes and groups, (examples,): speakers who say a word or several, once or often."""
    labels, groups = [], []
    for group in range(generator.randint(4 * classes, 30 * classes)):
        words = generator.choice([[group % classes], range(classes), generator.choices(range(classes), k=2)])
        for label in words:
            count = generator.choice([1, 1, 2, 5, 20])
            labels += [label] * count
            groups += [group] * count
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(generator.randint(0, 999)))
    return torch.tensor(labels)[order], torch.tensor(groups)[order] * 7 + 3


def check_groups_apart(found, labels, groups, folds=None, seeds=None):
    """Check that parts do not overlap, no group is in two, every class trains, no part is empty, and folds test every
    example once.
    """
    places = torch.arange(len(labels))
    for split in found:
        parts = [split.train, split.validation, split.test]
        assert torch.cat(parts).sort().values.equal(places) and all(map(len, parts))
        owners = [set(groups[part].tolist()) for part in parts]
        assert sum(map(len, owners)) == len(set(groups.tolist())), "a group is in two parts"
        assert set(labels[split.train].tolist()) == set(labels.tolist())
    if folds:
        assert len(found) == folds and torch.cat([split.test for split in found]).sort().values.equal(places)
    else:
        assert len(found) == seeds


@pytest.mark.parametrize("plan", SPLITTINGS, ids=str)
def test_groups_are_on_one_side(plan):
    generator = random.Random(2)
    for _ in range(8):
        labels, groups = draw_groups(generator, generator.randint(2, 5))
        settings = replace(QUICK, **plan)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            found = splits(labels, settings, None, groups)
        check_groups_apart(found, labels, groups, **plan)
        for split, again in zip(found, splits(labels, settings, None, groups), strict=True):
            assert split.train.equal(again.train) and split.test.equal(again.test), "drawn anew"


@pytest.mark.parametrize("plan", SPLITTINGS, ids=str)
def test_groups_that_share_equal_examples_are_on_one_side(plan):
    """Check that neither a group nor an example and its copy, in another group, is on two sides."""
    generator = random.Random(3)
    for _ in range(6):
        labels, groups = draw_groups(generator, 3)
        equal = torch.arange(len(labels))
        for _ in range(4):
            first, copy = sorted(generator.sample(range(len(labels)), 2))
            equal[equal == equal[copy]] = equal[first].clone()
        found = splits(labels, replace(QUICK, **plan), equal, groups)
        check_groups_apart(found, labels, groups, **plan)
        for split in found:
            parts = [set(equal[part].tolist()) for part in (split.train, split.validation, split.test)]
            assert sum(map(len, parts)) == len(set(equal.tolist()))


def test_groups_are_stratified_and_sizes_are_as_promised():
    """Check shares of classes where groups are many: a fifth tests, a tenth of the rest validates."""
    labels = torch.arange(1200) % 3
    groups = torch.arange(1200) // 3 % 40  # each of all classes
    pure = torch.arange(1200) % 60  # each of one class
    for plan, test in (({"folds": 5}, 0.2), ({"folds": 2}, 0.5), ({"seeds": 3}, 0.2)):
        for found in (groups, pure):
            for split in splits(labels, replace(QUICK, **plan), None, found):
                for label in range(3):
                    counts = [(labels[part] == label).sum().item() / 400 for part in (split.test, split.validation)]
                    assert counts[0] == pytest.approx(test, abs=0.051)
                    assert counts[1] == pytest.approx((1 - test) / 10, abs=0.051)
    tests = [split.test.tolist() for split in splits(labels, replace(QUICK, seeds=5), None, pure)]
    assert len({tuple(test) for test in tests}) == 5


def test_few_groups_of_a_class():
    """Check that of three groups of each class one tests, one validates and one trains; of two one trains."""
    labels = torch.arange(60) % 2
    for split in splits(labels, replace(QUICK, seeds=4), None, torch.arange(60) % 6):
        assert all(set(labels[part].tolist()) == {0, 1} for part in (split.train, split.validation, split.test))
    for split in splits(labels, replace(QUICK, seeds=4), None, torch.arange(60) % 4):
        assert set(labels[split.train].tolist()) == {0, 1} and len(split.test) and len(split.validation)
    # a class of one group always trains where seeds draw
    labels, groups = torch.tensor([0] * 40 + [1] * 10), torch.cat([torch.arange(40) % 8, torch.full((10,), 9)])
    for split in splits(labels, replace(QUICK, seeds=4), None, groups):
        assert set(range(40, 50)) <= set(split.train.tolist())


def test_rare_classes_of_groups():
    """Check that a class of one group trains though much else speaks for its group, and that one of three groups is in
    all parts though two would be closer to a fifth.
    """
    labels = torch.cat([torch.arange(20).repeat(10), torch.tensor([20])])
    groups = torch.cat([torch.arange(10).repeat_interleave(20), torch.tensor([0])])
    check_groups_apart(splits(labels, replace(QUICK, seeds=10), None, groups), labels, groups, seeds=10)
    labels = torch.tensor([0] * 20 + [1] * 20)
    groups = torch.tensor([0, 1] + [2] * 18 + [i % 5 + 3 for i in range(20)])
    for split in splits(labels, replace(QUICK, seeds=6), None, groups):
        assert all(set(labels[part].tolist()) == {0, 1} for part in (split.train, split.validation, split.test))


def test_a_class_of_fewer_examples_than_folds():
    """Check that nothing warns of it, and that it is tested as often as it can be."""
    labels, groups = torch.tensor([0] * 40 + [1] * 3), torch.tensor([i % 8 for i in range(40)] + [8, 9, 10])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = splits(labels, replace(QUICK, folds=5), None, groups)
    check_groups_apart(found, labels, groups, folds=5)
    assert sum(1 in labels[split.test] for split in found) == 3


def test_half_of_the_examples_is_left_to_train():
    """Check that a class is rather not validated than by a group that has most of the examples."""
    units = [{0: 10, 1: 100}, {0: 10, 2: 1}, {1: 30}, {1: 30}]  # the second one has all of class 2
    rows = [(label, group) for group, counts in enumerate(units) for label in counts for _ in range(counts[label])]
    rows += [(0, 4), (1, 4), (2, 4)]
    labels, groups = torch.tensor(rows).T
    for split in splits(labels, replace(QUICK, seeds=5), None, groups, parts_of(181, 0, 3)):
        assert len(split.validation) == 30 and set(labels[split.validation].tolist()) == {1}


LARGE = [0] * 20 + [1] * 20
FEW_GROUPS = [  # labels, groups, plan, equal, message
    (LARGE, [i % 4 for i in range(40)], {"folds": 5}, {}, "there are 4 groups, .* expected 5 or more, of which no two "
     "parts of a split share one: add groups or leave --groups out or take --folds 4$"),
    (LARGE, [i % 2 for i in range(40)], {"folds": 2}, {}, "there are 2 groups, .* expected 3 or more, .*groups out$"),
    (LARGE, [i % 2 for i in range(40)], {"seeds": 2}, {}, "there are 2 groups, .* expected 3 or more"),
    (LARGE, [i % 8 for i in range(40)], {"folds": 5}, {0: 1, 2: 3, 4: 5, 6: 7}, "there are 4 groups, those that share "
     "equal examples counted as one, expected 5 or more"),
    ([0] * 30 + [1] * 10, [i % 6 for i in range(30)] + [9] * 10, {"folds": 3}, {}, "class 1 would be missing from "
     "training: its examples are of 1 group, expected 2 or more, since each tests once: add groups or leave the class "
     "out or take --seeds$"),
    ([0, 1] * 4, range(8), {"folds": 5}, {}, "no class has more than 4 examples, expected 5 or more of one: add "
     "examples or take --folds 4$"),
    ([0, 1] * 10, [0, 1, 2, 3] * 5, {"folds": 2}, {}, "class 0 would be missing from training: its examples are of 2 "
     "groups, expected more, so that one can validate or test: add groups or leave the class out$"),
    ([0] * 30 + [1] * 2, [*[i % 3 for i in range(30)], 3, 3], {"folds": 2}, {}, "class 1 would be missing from "),
]  # fmt: skip


@pytest.mark.parametrize(("labels", "groups", "plan", "equal", "message"), FEW_GROUPS, ids=range(len(FEW_GROUPS)))
def test_too_few_groups(labels, groups, plan, equal, message):
    places = torch.arange(len(labels))
    for copy, original in equal.items():
        places[original] = places[copy]
    with pytest.raises(RunError, match=f"^{message}"):
        splits(torch.tensor(labels), replace(QUICK, **plan), places, torch.tensor([*groups]))


def test_a_class_whose_groups_are_counted_by_name():
    labels, groups = torch.tensor([0] * 30 + [1] * 10), torch.tensor([i % 6 for i in range(30)] + [9] * 10)
    with pytest.raises(RunError, match=r"^class 'dog' would be missing from training"):
        check_counts(labels, QUICK, ["cat", "dog"], groups)
    with pytest.raises(RunError, match=r"^groups has shape \(39,\), expected that of labels, \(40,\)$"):
        check_counts(labels, QUICK, None, groups[1:])
    check_counts(labels, replace(QUICK, seeds=2), None, groups)


# parts that data says


def parts_of(train, validation, test):
    return torch.tensor([TRAIN] * train + [VALIDATION] * validation + [TEST] * test)


@pytest.mark.parametrize("seeds", [None, 2])
def test_predefined_parts_are_kept(seeds):
    parts = parts_of(30, 10, 20)[torch.randperm(60, generator=torch.Generator().manual_seed(0))]
    labels, equal = torch.arange(60) % 3, torch.zeros(60, dtype=torch.int64)  # all equal, whatever that says
    found = splits(labels, replace(QUICK, folds=1, seeds=seeds), equal, None, parts)
    assert len(found) == (seeds or PREDEFINED) and PREDEFINED == 3
    for split in found:
        for part, places in zip((TRAIN, VALIDATION, TEST), (split.train, split.validation, split.test), strict=True):
            assert places.equal((parts == part).nonzero().flatten())


def test_a_tenth_of_a_predefined_training_part_validates():
    labels, parts = torch.arange(260) % 4, parts_of(200, 0, 60).flip(0)
    equal = torch.arange(260)
    equal[65] = 61  # of one class
    equal[100] = 2  # across the parts
    found = splits(labels, replace(QUICK, seeds=20), equal, None, parts)
    for split in found:
        assert split.test.equal(torch.arange(60))
        assert torch.cat([split.train, split.validation]).sort().values.equal(torch.arange(60, 260))
        assert 18 <= len(split.validation) <= 22 and set(labels[split.validation].tolist()) == {0, 1, 2, 3}
        assert (61 in split.validation) == (65 in split.validation)
    assert len({tuple(split.validation.tolist()) for split in found}) == 20
    fewest = splits(torch.tensor([0, 0, 1, 1, 0, 1]), QUICK, None, None, parts_of(4, 0, 2))
    assert all(len(split.train) == len(split.validation) == 2 for split in fewest)
    copies = splits(torch.tensor([0, 0, 1, 1, 0, 1]), QUICK, torch.tensor([0, 0, 2, 3, 0, 5]), None, parts_of(4, 0, 2))
    assert all(len(split.train) == len(split.validation) == 2 for split in copies), "a class of one different example"


def test_predefined_parts_with_groups():
    labels, parts = torch.arange(260) % 4, parts_of(200, 0, 60).flip(0)
    groups = torch.cat([torch.arange(60) // 5 + 100, torch.arange(200) // 5])
    found = splits(labels, replace(QUICK, seeds=4), None, groups, parts)
    for split in found:
        assert split.test.equal(torch.arange(60)) and 15 <= len(split.validation) <= 25
        assert torch.cat([split.train, split.validation]).sort().values.equal(torch.arange(60, 260))
        assert not set(groups[split.train].tolist()) & set(groups[split.validation].tolist())
    assert len({tuple(split.validation.tolist()) for split in found}) == 4
    groups[[50, 51, 55]] = torch.tensor([3, 3, 7])
    with pytest.raises(
        RunError, match=r"^2 groups are in two parts or more, expected each in one of train, validation"
    ):
        splits(labels, QUICK, None, groups, parts)


def test_equal_examples_join_groups_of_a_predefined_training_part():
    labels, parts = torch.arange(70) % 2, parts_of(60, 0, 10)
    groups, equal = torch.cat([torch.arange(60) // 6, torch.full((10,), 99)]), torch.arange(70)
    equal[6] = 0  # in the first two groups
    for split in splits(labels, replace(QUICK, seeds=20), equal, groups, parts):
        assert (0 in split.train) == (6 in split.train)


BROKEN_PARTS = [
    ([0, 0, 1, 1], [0, 0, 0, 0], None, "no test examples in the parts of the data, expected some of both$"),
    ([0, 0, 1, 1], [1, 1, 1, 1], None, "no train and no test examples"),
    ([0, 0, 1, 1], [0, 3, 2, 2], None, "parts holds 3, expected 0, 1 or 2$"),
    ([0, 0, 1, 1], [0, 0, 1, 2], None, "class 'b' has 2 examples that validate or test and none to train on, expected"),
    ([0, 0, 1, 1], [0, 0, 0, 2], None, "class 'b' has 1 training example, expected 2 or more, of which one validates"),
    ([0, 0, 1, 1], [0, 1, 0, 2], [7, 7, 8, 9], "1 groups are in two parts or more"),
]


@pytest.mark.parametrize(("labels", "parts", "groups", "message"), BROKEN_PARTS, ids=range(len(BROKEN_PARTS)))
def test_parts_that_do_not_suit(labels, parts, groups, message):
    labels, parts = torch.tensor(labels), torch.tensor(parts)
    groups = None if groups is None else torch.tensor(groups)
    with pytest.raises(RunError, match=f"^{message}"):
        check_counts(labels, QUICK, ["a", "b"], groups, parts)
    with pytest.raises(RunError, match=f"^{message}".replace("'b'", "1")):
        splits(labels, QUICK, None, groups, parts)


def test_a_predefined_training_part_of_one_group():
    labels, groups = torch.tensor([0, 0, 1, 1, 0, 1]), torch.tensor([0, 0, 0, 0, 1, 1])
    with pytest.raises(
        RunError, match=r"^class 0 would be missing from training: its examples are of 1 group, expected"
    ):
        splits(labels, QUICK, None, groups, parts_of(4, 0, 2))
