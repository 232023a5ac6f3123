"""Splits and label fractions: nothing in two parts, no group torn, the same from any row order."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace

import numpy as np
import pytest
from made_tasks import Nameless, made_task, named, shuffled

from jaxhisto.errors import ConfigError, StoreError
from jaxhisto.task_config import TaskConfig
from jaxhisto.tasks.grouping import divide_groups
from jaxhisto.tasks.splits import (
    PERCENTS,
    by_image,
    checked_split,
    fraction,
    make_split,
    read_split,
    task_split,
    write_split,
)
from jaxhisto.tasks.task import PARTS, Task

SPLIT_OF_20 = "d413bb2b88ae"
SPLIT_OF_GROUPS = "d1c4409eb3f1"


@pytest.fixture(scope="module")
def plain():
    """A hundred images: 60, 33 and 7 of a class."""
    return made_task([0] * 60 + [1] * 33 + [2] * 7)


@pytest.fixture(scope="module")
def grouped():
    """Forty patients with 3 to 12 images each, of a class or of both."""
    groups = [f"p{p:02}" for p in range(40) for _ in range(3 + 7 * p % 10)]
    labels = [(int(g[1:]) + i % 5 // 4) % 2 for i, g in enumerate(groups)]
    return made_task(labels, groups)


def whole(task, split):
    """The three parts, once they are seen to be disjoint and complete."""
    parts = [split.part(p) for p in PARTS]
    together = np.concatenate(parts)
    assert sorted(together.tolist()) == list(range(len(task)))
    assert all((np.diff(p) > 0).all() and p.dtype == np.int64 for p in parts)
    return parts


def test_images_are_divided_by_class(plain):
    parts = whole(plain, make_split(plain, 0))
    assert [len(p) for p in parts] == [50, 25, 25]
    for part, share in zip(parts, (0.5, 0.25, 0.25), strict=True):
        counts = np.bincount(plain.labels[part], minlength=3)
        np.testing.assert_array_less(np.abs(counts - share * np.array([60, 33, 7])), 1.01)


@pytest.mark.parametrize("made", ["plain", "grouped"])
def test_the_order_of_rows_changes_nothing_and_the_seed_does(made, request):
    task = request.getfixturevalue(made)
    other = shuffled(task)
    split, same = make_split(task, 3), make_split(other, 3)
    assert split.sha256 == same.sha256
    for part in PARTS:
        assert named(task, split.part(part)) == named(other, same.part(part))
    assert len({make_split(task, seed).sha256 for seed in range(8)}) == 8


def test_a_split_is_the_same_on_every_machine(grouped):
    """Pinned: a change of this hash would silently change everybody's test sets."""
    assert make_split(made_task([0, 1] * 10), 0).sha256.startswith(SPLIT_OF_20)
    assert make_split(grouped, 0).sha256.startswith(SPLIT_OF_GROUPS)


def test_the_order_of_the_classes_changes_nothing(plain):
    other = replace(plain, targets=2 - plain.labels, classes=plain.classes[::-1])
    assert make_split(plain, 1).sha256 == make_split(other, 1).sha256
    split = make_split(plain, 1)
    ours, theirs = (fraction(task, split, 20, 0, 0).tolist() for task in (plain, other))
    assert ours == theirs


def test_groups_stay_whole_and_shares_are_met(grouped):
    n = len(grouped)
    largest = max(np.unique(grouped.groups, return_counts=True)[1])
    for seed in range(20):
        parts = whole(grouped, make_split(grouped, seed))
        held = [{grouped.groups[i] for i in part} for part in parts]
        assert sum(len(groups) for groups in held) == len(set().union(*held)) == 40
        for part, share in zip(parts, (0.5, 0.25, 0.25), strict=True):
            assert abs(len(part) - share * n) <= max(0.02 * n, largest / 2)
            of_one = grouped.labels[part].mean()
            assert abs(of_one - grouped.labels.mean()) < 0.15


def test_every_part_gets_a_class_that_few_groups_have():
    groups = [f"g{g:02}" for g in range(30) for _ in range(4)]
    labels = [int(g in ("g04", "g11", "g23")) for g in groups]
    task = made_task(labels, groups)
    for seed in range(5):
        for part in whole(task, make_split(task, seed)):
            assert task.labels[part].sum() == 4


UNEVEN = (
    {"g0": (16, 17), "g3": (0, 16), "g4": (7, 4), "g5": (34, 0)},
    {"g0": (0, 22), "g1": (25, 1), "g2": (7, 0), "g3": (16, 0), "g4": (13, 1)},
    {"g0": (16, 0), "g1": (0, 1), "g2": (2, 0), "g3": (1, 6), "g4": (1, 26)},
)


@pytest.mark.parametrize("counts", UNEVEN)
def test_few_uneven_groups_are_divided_nearly_as_well_as_can_be(counts):
    """The oracle tries all assignments."""

    def missing_and_distance(assignment):
        held = np.zeros((3, 2))
        for part, count in zip(assignment, counts.values(), strict=True):
            held[part] += count
        far = np.abs(held.sum(axis=1) - held.sum() * np.array([0.5, 0.25, 0.25])).max()
        return (held == 0).sum(), far

    best = min(map(missing_and_distance, itertools.product(range(3), repeat=len(counts))))
    largest = max(map(sum, counts.values()))
    for seed in range(10):
        placed = divide_groups(counts, (2, 1, 1), f"seed {seed}")
        missing, far = missing_and_distance([placed[g] for g in counts])
        assert missing == best[0]
        assert far <= max(best[1], largest / 2)


def test_test_groups_that_are_named(grouped):
    split = make_split(grouped, 0, test=("p01", "p02"))
    assert {grouped.groups[i] for i in split.test} == {"p01", "p02"}
    rest = len(grouped) - len(split.test)
    assert abs(len(split.train) / rest - 2 / 3) < 0.05
    with pytest.raises(StoreError, match=r"no group p99; there is p00, p01"):
        make_split(grouped, 0, test=("p99",))
    with pytest.raises(StoreError, match=r"p01 are named, but images have no group"):
        make_split(made_task([0, 1] * 9), 0, test=("p01",))


def test_too_few_groups_need_validation_by_image():
    task = made_task([0, 1] * 20, ["a"] * 20 + ["b"] * 20)
    with pytest.raises(StoreError, match=r"1 groups besides those to test on \(b\) cannot make 2"):
        make_split(task, 0, test=("b",))
    split = make_split(task, 0, test=("b",), validation_by_image=True)
    assert split.validation_by_image
    assert split.test.tolist() == list(range(20, 40))
    assert (len(split.train), len(split.validation)) == (13, 7)
    drawn = make_split(task, 0, validation_by_image=True)
    assert len({task.groups[i] for i in drawn.test}) == 1
    assert not {task.groups[i] for i in drawn.test} & {task.groups[i] for i in drawn.train}


def test_a_class_missing_in_a_part_is_refused():
    with pytest.raises(StoreError, match=r"the validation part has no image of c1; divide it"):
        checked_split(made_task([0, 1, 0, 1, 0]), np.array([0, 1]), np.array([2]), np.array([3, 4]))
    with pytest.raises(StoreError, match=r"part has no image of c1"):
        make_split(made_task([0] * 10 + [1] * 2), 0)
    with pytest.raises(StoreError, match=r"the test part has no image; add"):
        checked_split(made_task([0, 1, 0, 1]), np.arange(2), np.arange(2, 4), np.arange(0))


def test_files_come_back_from_any_order(grouped, tmp_path):
    split = make_split(grouped, 5)
    path = tmp_path / "deep" / "split.json"
    write_split(path, split, grouped, seed=5)
    other = shuffled(grouped)
    back = read_split(path, other)
    assert back.sha256 == split.sha256
    assert named(other, back.test) == named(grouped, split.test)
    assert [p.name for p in path.parent.iterdir()] == ["split.json"]
    content = json.loads(path.read_text())
    assert content["seed"] == 5
    assert content["test"] == sorted(named(grouped, split.test))
    assert task_split(other, TaskConfig(split=str(path))).sha256 == split.sha256
    with pytest.raises(ConfigError, match=r"--task\.split and --task\.test both"):
        task_split(other, TaskConfig(split=str(path), test=("p01",)))


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda c: c["test"].pop(), "do not have the hash it states"),
        (lambda c: c["test"].append(c["train"].pop()), "1 groups span parts.* in train and test"),
        (lambda c: c["test"].append(c["train"][0]), "in two parts of the split"),
        (lambda c: c["test"].append(c["test"][0]), "twice in test"),
        (lambda c: c["train"].append("other.png"), r"1 names are no image of made \(other.png\)"),
        (lambda c: c.pop("validation"), "its validation has to be a list"),
        (lambda c: c.update(format=2), "is a split of form 2, this version reads 1"),
    ],
)
def test_files_that_are_refused(grouped, tmp_path, change, match):
    path = tmp_path / "split.json"
    write_split(path, make_split(grouped, 0), grouped)
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    with pytest.raises(StoreError, match=match):
        read_split(path, grouped)


def test_a_file_made_by_hand_needs_no_hash_and_may_leave_images_out(tmp_path):
    task = made_task([0, 1] * 4)
    parts = {p: list(task.names[i * 2 : i * 2 + 2]) for i, p in enumerate(PARTS)}
    (tmp_path / "s.json").write_text(json.dumps(parts))
    split = read_split(tmp_path / "s.json", task)
    assert [split.part(p).tolist() for p in PARTS] == [[0, 1], [2, 3], [4, 5]]
    for text in ("[]", "{", '{"train": 3}'):
        (tmp_path / "s.json").write_text(text)
        with pytest.raises(StoreError, match=r"s\.json: "):
            read_split(tmp_path / "s.json", task)


def test_a_torn_validation_survives_the_file_but_a_torn_test_never(tmp_path):
    task = made_task([0, 1] * 20, ["a"] * 20 + ["b"] * 20)
    split = make_split(task, 0, test=("b",), validation_by_image=True)
    write_split(tmp_path / "s.json", split, task)
    assert read_split(tmp_path / "s.json", task).validation_by_image
    content = json.loads((tmp_path / "s.json").read_text())
    content["train"].append(content["test"].pop())
    (tmp_path / "s.json").write_text(json.dumps(content))
    with pytest.raises(StoreError, match=r"groups span parts of the split \(b in train and test"):
        read_split(tmp_path / "s.json", task)


def test_fractions_are_nested_and_keep_the_classes(plain):
    split = make_split(plain, 0)
    share = np.bincount(plain.labels[split.train], minlength=3) / len(split.train)
    for repeat in range(5):
        before: set[int] = set()
        for percent in PERCENTS:
            rows = fraction(plain, split, percent, repeat, 0)
            counts = np.bincount(plain.labels[rows], minlength=3)
            assert len(rows) == max(3, round(len(split.train) * percent / 100))
            assert counts.min() >= 1
            assert np.abs(counts - share * len(rows)).max() <= 1.5
            assert before <= set(rows.tolist()) <= set(split.train.tolist())
            before = set(rows.tolist())
        assert rows.tolist() == split.train.tolist()
    drawn = {tuple(fraction(plain, split, 20, r, s)) for r in range(5) for s in range(2)}
    assert len(drawn) == 10


@pytest.mark.parametrize("by", ["group", "image"])
def test_fractions_do_not_depend_on_the_order_of_rows(grouped, by):
    other = shuffled(grouped)
    split, same = make_split(grouped, 0), make_split(other, 0)
    for percent in PERCENTS:
        ours = named(grouped, fraction(grouped, split, percent, 1, 2, by=by))
        assert ours == named(other, fraction(other, same, percent, 1, 2, by=by))


def test_fractions_by_group_take_few_groups_and_by_image_many(grouped):
    split = make_split(grouped, 0)

    def groups(rows):
        return [grouped.groups[i] for i in rows]

    few = groups(fraction(grouped, split, 20, 0, 0))
    many = groups(fraction(grouped, split, 20, 0, 0, by="image"))
    assert len(few) == len(many)
    assert len(set(few)) < len(set(many)) / 2
    all_of = {g: groups(split.train).count(g) for g in set(few)}
    torn = [g for g in set(few) if few.count(g) < all_of[g]]
    assert len(torn) <= 2  # the last one, and the first image of a class that was not there yet


def test_regression_and_segmentation_are_divided_without_classes():
    names = tuple(f"{i}.png" for i in range(40))
    task = Task("numbers", "regression", Nameless(names), np.linspace(0, 1, 40))
    split = make_split(task, 0)
    assert [len(p) for p in whole(task, split)] == [20, 10, 10]
    assert len(fraction(task, split, 5, 0, 0)) == 1
    with pytest.raises(ValueError, match="0 percent"):
        fraction(task, split, 0, 0, 0)


def test_nct_is_divided_as_the_paper_says():
    """75,000 and 25,000 of the published class counts of NCT-CRC-HE-100K."""
    counts = (10407, 10566, 11512, 11557, 8896, 13536, 8763, 10446, 14317)
    task = made_task(np.repeat(np.arange(9), counts).tolist())
    train, validation = by_image(task, task.labels, np.arange(len(task)), (3, 1), 0)
    assert (len(train), len(validation)) == (75_000, 25_000)
    expected = np.array(counts) / 4
    assert np.abs(np.bincount(task.labels[validation]) - expected).max() < 1


@pytest.mark.parametrize("shares", [(0.5, 0.5, 0.0), (0.5, 0.25, 0.2)])
def test_shares_that_are_none(plain, shares):
    with pytest.raises(ValueError, match="add up to 1"):
        make_split(plain, 0, shares)
