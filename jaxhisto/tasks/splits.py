"""How a task is divided: training, validation and test parts, and fractions of the labels.

Everything drawn is a function of the seed and of names: of an image's name, or of a group's. The
order of the rows, the platform and the number of threads change nothing.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from jaxhisto.data.labelled import few
from jaxhisto.errors import ConfigError, StoreError
from jaxhisto.runlog import write_atomically
from jaxhisto.special_files import no_pipe
from jaxhisto.task_config import TaskConfig
from jaxhisto.tasks.grouping import divide_groups
from jaxhisto.tasks.task import PARTS, Split, Task

SHARES = (0.5, 0.25, 0.25)  # of training, validation and test (paper, App. C.1)
PERCENTS = (5, 10, 20, 50, 100)  # of the training labels (paper, Figs. 3 and 4)
WHOLE = 10**6  # shares are counted in millionths: whole numbers add up alike on every machine
FORMAT = 1


def task_split(task: Task, config: TaskConfig) -> Split:
    """The split that these settings ask for: a file's, the set's own, or one that is drawn.

    Raises:
      StoreError, ConfigError: as `read_split` and `make_split`.
    """
    if config.split:
        if config.test:
            raise ConfigError(
                "--task.split and --task.test both say what is tested on; name one of them."
            )
        return read_split(config.split, task)
    if task.fixed is not None and not config.test:
        return task.fixed
    return make_split(
        task,
        config.split_seed,
        test=config.test,
        validation_by_image=config.validation_by_image,
    )


def make_split(
    task: Task,
    seed: int,
    shares: tuple[float, float, float] = SHARES,
    *,
    test: Sequence[str] = (),
    validation_by_image: bool = False,
) -> Split:
    """Draws three parts.

    Where the task has groups, none is torn: they are drawn so that the shares of images, and those
    of each class, are met as nearly as the draw finds (`grouping.divide_groups`). Without groups
    images are drawn, of a classification task the shares of each class.

    Args:
      shares: of training, validation and test; they add up to 1.
      test: groups to test on. The others are divided in the proportion of their shares.
      validation_by_image: of the groups that are not tested on, draw the validation images one by
        one; they then share groups with those trained on.

    Raises:
      StoreError: too few images or groups, an unknown test group, or a class that would be
        missing in a part.
    """
    whole = tuple(round(share * WHOLE) for share in shares)
    if len(whole) != 3 or sum(whole) != WHOLE or min(whole) <= 0:
        raise ValueError(f"shares {shares} must be three above 0 that add up to 1")
    labels = task.labels if task.kind == "classification" else np.zeros(len(task), np.int64)
    everything = np.arange(len(task))
    if task.groups is None:
        if test:
            raise StoreError(
                f"{task.name}: test groups {few(test)} are named, but images have no group; name "
                "--task.group or --task.group-pattern."
            )
        parts = by_image(task, labels, everything, whole, seed)
    else:
        parts = _by_group(task, labels, whole, seed, test, validation_by_image)
    return checked_split(task, *parts, validation_by_image=validation_by_image)


def checked_split(
    task: Task,
    train: NDArray[np.int64],
    validation: NDArray[np.int64],
    test: NDArray[np.int64],
    *,
    validation_by_image: bool = False,
) -> Split:
    """These rows as a split, once it is one that can be trained, chosen and tested on.

    Raises:
      StoreError: a part is empty or lacks a class, a row is in two, or a group spans two parts
        (where `validation_by_image`, training and validation may share groups).
    """
    rows = dict(zip(PARTS, (train, validation, test), strict=True))
    together = np.concatenate(list(rows.values()))
    if len(np.unique(together)) != len(together):
        values, counts = np.unique(together, return_counts=True)
        twice = [task.names[i] for i in values[counts > 1]]
        raise StoreError(f"{task.name}: {few(twice)}: in two parts of the split; keep one of them.")
    for part, of in rows.items():
        if not len(of):
            raise StoreError(f"{task.name}: the {part} part has no image; add images or groups.")
        if task.kind == "classification":
            there = set(task.labels[of].tolist())
            absent = [c for i, c in enumerate(task.classes) if i not in there]
            if absent:
                raise StoreError(
                    f"{task.name}: the {part} part has no image of {few(absent)}; divide it "
                    "otherwise (another --task.split-seed or --task.test), add images, or leave "
                    "the class out with --task.classes."
                )
    _refuse_torn(task, rows, validation_by_image)
    return Split(
        np.sort(train).astype(np.int64),
        np.sort(validation).astype(np.int64),
        np.sort(test).astype(np.int64),
        _sha256(task, rows),
        validation_by_image,
    )


def write_split(path: str | Path, split: Split, task: Task, **facts: Any) -> None:
    """Writes a split as JSON: the names in each part, sorted, their sha256, and `facts`.

    The file appears whole or not at all.

    Raises:
      OSError: it cannot be written.
    """
    content = {
        "format": FORMAT,
        "task": task.name,
        "sha256": split.sha256,
        "validation_by_image": split.validation_by_image,
        **facts,
        **{part: _names(task, split.part(part)) for part in PARTS},
    }
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, json.dumps(content, indent=1, ensure_ascii=False) + "\n")


def read_split(path: str | Path, task: Task) -> Split:
    """The split in a file of `write_split`, or in one of the same form made by hand.

    A file made by hand may leave the hash out. Images in none of the parts are left out.

    Raises:
      StoreError: not such a file, changed since it was written, names that are no image of the
        task, groups that span parts, or parts that `checked_split` refuses.
    """
    path = Path(path).expanduser()
    content = _content(path)
    row = {name: i for i, name in enumerate(task.names)}
    unknown = [n for part in PARTS for n in content[part] if n not in row]
    if unknown:
        raise StoreError(
            f"{path}: {len(unknown):,} names are no image of {task.name} ({few(unknown)}); use the "
            "data that the split was made for."
        )
    rows = [np.array([row[n] for n in content[part]], np.int64) for part in PARTS]
    try:
        split = checked_split(
            task, *rows, validation_by_image=bool(content.get("validation_by_image", False))
        )
    except StoreError as error:
        raise StoreError(f"{path}: {error}") from error
    if content.get("sha256", split.sha256) != split.sha256:
        raise StoreError(
            f"{path}: its names do not have the hash it states: it was changed; restore it, or "
            'remove the line "sha256" if that was meant.'
        )
    return split


def fraction(
    task: Task,
    split: Split,
    percent: float,
    repeat: int,
    seed: int,
    by: Literal["group", "image"] = "group",
) -> NDArray[np.int64]:
    """So many percent of the training rows, ascending (n,) int64.

    For one (repeat, seed) the rows are put in one order, of which each percentage takes the
    start: smaller fractions lie in larger ones. The order begins with an image of each class, so
    that at least one is always there, and keeps the shares of the classes.

    Where the task has groups, `by` says what is scarce. `group`: the order goes group after group
    in a drawn order, so that few labels mean few patients; the last one is taken in part.
    `image`: groups are ignored, every patient gives some. 100 % are the same rows either way.

    Args:
      percent: above 0, at most 100, of the number of training rows, rounded.
      repeat: number of the repeat; each is another draw.
    """
    if not 0 < percent <= 100:
        raise ValueError(f"{percent} percent of the labels is not above 0 and at most 100")
    rows = split.train
    labels = task.labels if task.kind == "classification" else np.zeros(len(task), np.int64)
    key = f"fraction {seed} {repeat}"
    blocks = [rows]
    if task.groups is not None and by == "group":
        groups = [task.groups[i] for i in rows]
        blocks = [
            rows[[g == name for g in groups]]
            for name in sorted(set(groups), key=lambda g: _key(key, g))
        ]
    order = [i for block in blocks for i in _mixed(task, labels, block, key)]
    leading = {int(labels[i]): i for i in reversed(order)}  # the first of each class
    first = set(leading.values())
    order = sorted(first) + [i for i in order if i not in first]
    taken = max(len(first), round(len(rows) * percent / 100))
    return np.sort(np.array(order[:taken], np.int64))


def by_image(
    task: Task,
    labels: NDArray[np.int64],
    rows: NDArray[np.int64],
    shares: Sequence[int],
    seed: int,
) -> list[NDArray[np.int64]]:
    """Rows in as many parts as shares (whole numbers), ascending; of each class these shares."""
    parts: list[list[int]] = [[] for _ in shares]
    owed = [0] * len(shares)  # millionths of an image, over the classes so far
    # By name, not by number: in which order the classes were asked for changes nothing.
    for c in sorted(np.unique(labels[rows]).tolist(), key=lambda c: task.classes[c : c + 1]):
        drawn = _drawn(task.names, rows[labels[rows] == c].tolist(), f"split {seed}")
        for p, share in enumerate(shares):
            owed[p] += share * len(drawn)
        takes = _rounded(owed, sum(shares), len(drawn))
        start = 0
        for p, n in enumerate(takes):
            parts[p] += drawn[start : start + n]
            owed[p] -= n * sum(shares)
            start += n
    return [np.array(sorted(part), np.int64) for part in parts]


def _rounded(owed: Sequence[int], whole: int, n: int) -> list[int]:
    """n in whole numbers nearest to `owed` / `whole`; each part gets one where n allows."""
    least = 1 if n >= len(owed) else 0
    takes = [max(least, o // whole) for o in owed]
    while sum(takes) < n:
        p = max(range(len(owed)), key=lambda p: (owed[p] - takes[p] * whole, -p))
        takes[p] += 1
    while sum(takes) > n:
        able = [p for p in range(len(owed)) if takes[p] > least]
        p = min(able, key=lambda p: (owed[p] - takes[p] * whole, p))
        takes[p] -= 1
    return takes


def _by_group(
    task: Task,
    labels: NDArray[np.int64],
    shares: tuple[int, ...],
    seed: int,
    test: Sequence[str],
    validation_by_image: bool,
) -> list[NDArray[np.int64]]:
    assert task.groups is not None
    groups = np.array(task.groups)
    counts = {
        str(g): np.bincount(labels[groups == g], minlength=max(1, len(task.classes))).tolist()
        for g in np.unique(groups)
    }
    unknown = [g for g in test if g not in counts]
    if unknown:
        raise StoreError(
            f"{task.name}: no group {few(unknown)}; there is {few(sorted(counts))}; mend "
            "--task.test."
        )
    wanted = {"train": shares[0], "validation": shares[1], "test": shares[2]}
    if validation_by_image:
        wanted = {"train": shares[0] + shares[1], "test": shares[2]}
    if test:
        del wanted["test"]
    free = {g: c for g, c in counts.items() if g not in test}
    if len(free) < len(wanted):
        also = f" besides those to test on ({few(sorted(test))})" if test else ""
        remedy = (
            "divide it by image"
            if validation_by_image
            else "pass --task.validation-by-image, which keeps the test clean"
        )
        raise StoreError(
            f"{task.name}: {len(free)} groups{also} cannot make {len(wanted)} parts "
            f"({', '.join(wanted)}); {remedy}, or name a finer group."
        )
    placed = divide_groups(free, tuple(wanted.values()), f"jaxhisto groups {seed}")
    part_of = {g: list(wanted)[p] for g, p in placed.items()} | dict.fromkeys(test, "test")
    found = np.array([part_of[g] for g in task.groups])
    rows = {part: np.flatnonzero(found == part) for part in PARTS}
    if validation_by_image:
        rows["train"], rows["validation"] = by_image(task, labels, rows["train"], shares[:2], seed)
    return [rows[part] for part in PARTS]


def _mixed(task: Task, labels: NDArray[np.int64], rows: NDArray[np.int64], key: str) -> list[int]:
    """Rows in a drawn order of which each start holds the classes in their proportion."""
    places = []
    for c in np.unique(labels[rows]).tolist():
        drawn = _drawn(task.names, rows[labels[rows] == c].tolist(), key)
        # The middles of equal steps: exact as fractions of whole numbers, alike everywhere.
        places += [((2 * k + 1) / (2 * len(drawn)), _key(key, task.names[i]), i)
                   for k, i in enumerate(drawn)]  # fmt: skip
    return [i for _, _, i in sorted(places)]


def _drawn(names: Sequence[str], rows: Sequence[int], key: str) -> list[int]:
    return sorted(rows, key=lambda i: _key(key, names[i]))


def _key(key: str, name: str) -> bytes:
    return hashlib.blake2b(f"jaxhisto {key} {name}".encode()).digest()


def _refuse_torn(task: Task, rows: Mapping[str, NDArray[np.int64]], torn_validation: bool) -> None:
    if task.groups is None:
        return
    parts: dict[str, set[str]] = {}
    for part, of in rows.items():
        for i in of.tolist():
            parts.setdefault(task.groups[i], set()).add(part)
    allowed = {"train", "validation"} if torn_validation else set()
    torn = sorted(g for g, where in parts.items() if len(where) > 1 and not where <= allowed)
    if torn:
        named = [f"{g} in {' and '.join(p for p in PARTS if p in parts[g])}" for g in torn]
        raise StoreError(
            f"{task.name}: {len(torn):,} groups span parts of the split ({few(named)}); what is "
            "learnt of a patient would be tested on that patient: put each into one part."
        )


def _names(task: Task, rows: NDArray[np.int64]) -> list[str]:
    return sorted(task.names[i] for i in rows)


def _sha256(task: Task, rows: Mapping[str, NDArray[np.int64]]) -> str:
    text = json.dumps([_names(task, rows[part]) for part in PARTS], ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()


def _content(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(no_pipe(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise StoreError(f"{path}: cannot be read as a split ({error}); check it.") from error
    if not isinstance(content, dict):
        raise StoreError(f"{path}: is no split: it has to hold {', '.join(PARTS)}.")
    if content.get("format", FORMAT) != FORMAT:
        raise StoreError(
            f"{path}: is a split of form {content['format']}, this version reads {FORMAT}; "
            "install a newer one."
        )
    for part in PARTS:
        names = content.get(part)
        if not isinstance(names, list) or not all(isinstance(n, str) for n in names):
            raise StoreError(f"{path}: its {part} has to be a list of image names; add it.")
        if len(set(names)) != len(names):
            twice = sorted({n for n in names if names.count(n) > 1})
            raise StoreError(f"{path}: lists {few(twice)} twice in {part}; keep one.")
    return content
