"""What an encoder is judged on: images with classes, numbers or masks, and how they are divided.

`open_task` reads what a `TaskConfig` names; `splits` divides it. No pixels are kept: `read` and
`load` take them from the files each time.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, Protocol, cast

import numpy as np
from numpy.typing import NDArray

from jaxhisto.data.label_table import few, same_but_for_case
from jaxhisto.data.named_images import Images, centre_mask, load_squares
from jaxhisto.errors import ConfigError, StoreError
from jaxhisto.task_config import TaskConfig

Kind = Literal["classification", "regression", "segmentation"]
Rows = Sequence[int] | NDArray[np.int64]
OWN_FILES = ("labels", "label", "target", "masks", "group", "group_pattern")  # layout auto
PARTS = ("train", "validation", "test")


class Masks(Protocol):
    """The class ids of images, by row; `read` may be called from several threads at once."""

    def read(self, i: int) -> NDArray[np.uint8]:
        """(h, w) uint8 of image i's size, each below the number of classes."""

    def files(self) -> Mapping[str, Path]:
        """All that they are read from, by a name that stays when the folder is moved."""


@dataclass(frozen=True)
class Window:
    """Where an image of a task was cut from: px of `source`, of the upper left corner."""

    source: str
    y: int
    x: int


@dataclass(frozen=True, eq=False)
class Split:
    """The rows of a task in three parts, (n,) int64 each, ascending; nothing is in two.

    `sha256` is that of the names in each part: equal for equal splits, however rows are ordered.
    `validation_by_image` allows training and validation, never the test, to share groups.
    """

    train: NDArray[np.int64]
    validation: NDArray[np.int64]
    test: NDArray[np.int64]
    sha256: str
    validation_by_image: bool = False

    def part(self, name: str) -> NDArray[np.int64]:
        """One of `PARTS`."""
        return cast("NDArray[np.int64]", getattr(self, name))

    def summary(self) -> str:
        """A line: how many are in each part, and the hash."""
        parts = ", ".join(f"{len(self.part(p)):,} {p}" for p in PARTS)
        return f"split {self.sha256[:12]}: {parts}"


@dataclass(frozen=True, eq=False)
class Task:
    """A labelled set.

    Fields:
      name: of the set.
      kind: what is predicted of an image: a class, a number, or a class a pixel.
      images: n images, in the order of their labels.
      targets: (n,) int64 index into `classes`; (n,) float64; or the masks, by row.
      classes: C >= 2 class names, none of a regression task.
      groups: n group names (patient, slide, section, region), None where none is named.
      fixed: the set's own split, where it has one.
      windows: of what and from where each image is cut, None for whole images.
      notes: what was left out or decided in reading, a line each.
    """

    name: str
    kind: Kind
    images: Images
    targets: NDArray[np.int64] | NDArray[np.float64] | Masks
    classes: tuple[str, ...] = ()
    groups: tuple[str, ...] | None = None
    fixed: Split | None = None
    windows: tuple[Window, ...] | None = None
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        n = len(self.images)
        targets = n if self.kind == "segmentation" else len(self.values)
        if targets != n or any(x is not None and len(x) != n for x in (self.groups, self.windows)):
            raise ValueError(f"{self.name}: {n} images need as many targets, groups and windows")
        if len(set(self.names)) != n:
            raise ValueError(f"{self.name}: two images have the same name")

    def __len__(self) -> int:
        return len(self.images)

    @property
    def names(self) -> tuple[str, ...]:
        """A name each image, no two alike; what splits are written in."""
        return self.images.names

    @property
    def labels(self) -> NDArray[np.int64]:
        """(n,) int64, of a classification task."""
        if self.kind != "classification":
            raise TypeError(f"{self.name} is a {self.kind} task: it has no labels")
        return cast("NDArray[np.int64]", self.targets)

    @property
    def values(self) -> NDArray[np.int64] | NDArray[np.float64]:
        """(n,) int64 or float64, of a classification or regression task."""
        if self.kind == "segmentation":
            raise TypeError(f"{self.name} is a segmentation task: its targets are masks")
        return cast("NDArray[np.int64] | NDArray[np.float64]", self.targets)

    @property
    def masks(self) -> Masks:
        """The masks of a segmentation task."""
        if self.kind != "segmentation":
            raise TypeError(f"{self.name} is a {self.kind} task: it has no masks")
        return cast("Masks", self.targets)

    def with_split(self, split: Split) -> Task:
        """The same task with a split of its own."""
        return replace(self, fixed=split)

    def load(self, rows: Rows, side: int, threads: int = 0) -> NDArray[np.uint8]:
        """These images, (n, side, side, 3) uint8 RGB, in the order of `rows`.

        The largest square in the middle of each is resized to `side`: areas are averaged where it
        shrinks, bilinear where it grows. What lies beyond the square is not seen; no image is
        stretched.

        Raises:
          StoreError: some cannot be read; says how many and names the first.
        """
        return load_squares(self.images, rows, side, threads)

    def load_masks(self, rows: Rows, side: int, threads: int = 0) -> NDArray[np.uint8]:
        """The masks of these images, (n, side, side) uint8, cut and resized as `load` does.

        A pixel takes the class under its centre; none is mixed.

        Raises:
          StoreError: one cannot be read, or is not what a mask is.
        """
        masks = np.empty((len(rows), side, side), np.uint8)
        with ThreadPoolExecutor(threads or None) as pool:
            found = pool.map(lambda i: centre_mask(self.masks.read(int(i)), side), rows)
            for i, mask in enumerate(found):
                masks[i] = mask
        return masks

    def summary(self) -> list[str]:
        """What was read, a line in all, and what is to be known of it."""
        groups = f", {len(set(self.groups)):,} groups" if self.groups else ""
        if self.kind == "classification":
            counts = np.bincount(self.labels, minlength=len(self.classes)).tolist()
            pairs = zip(self.classes, counts, strict=True)
            what = f" ({', '.join(f'{c} {n:,}' for c, n in pairs)})"
        elif self.kind == "regression":
            v = self.values
            what = f" (targets {v.min():.4g} to {v.max():.4g}, mean {v.mean():.4g})"
        else:
            what = f" (pixels of {', '.join(self.classes)})"
        windows = ""
        if self.windows:
            sources = len({window.source for window in self.windows})
            windows = f" cut from {sources:,} images"
        head = f"{self.name}: {self.kind}, {len(self):,} images{windows}{what}{groups}"
        return [head, *(f"  {note}" for note in self.notes)]


def open_task(config: TaskConfig) -> Task:
    """The task that these settings name.

    Raises:
      ConfigError: settings that contradict each other.
      StoreError: what they name is not there, or not as it should be.
    """
    if not config.data:
        raise StoreError("no images are named; pass the folder of the task with --task.data.")
    twice = [name for name in config.classes if config.classes.count(name) > 1]
    if twice:
        raise ConfigError(f"--task.classes names {twice[0]} twice; name each class once.")
    if config.layout == "auto":
        from jaxhisto.tasks.task_files import open_files  # the readers build on this module

        task = open_files(config)
    else:
        from jaxhisto.tasks.published_sets import READERS

        for name in OWN_FILES:
            if getattr(config, name):
                raise ConfigError(
                    f"--task.{name.replace('_', '-')} is for files of one's own; drop it, "
                    f"{config.layout} has a form of its own."
                )
        if config.target_scale != 1:
            raise ConfigError(
                f"--task.target-scale is for numbers of one's own; drop it, those of "
                f"{config.layout} have the paper's unit."
            )
        task = READERS[config.layout](config)
    _refuse_unwritable(config.data, task.names)
    if config.split_by == "image":
        return replace(task, groups=None)
    alike = same_but_for_case(task.groups or ())
    if alike:
        pairs = few([" and ".join(names) for names in alike])
        note = f"groups that differ in case alone are taken for two: {pairs}"
        task = replace(task, notes=(*task.notes, note))
    return task


def _refuse_unwritable(folder: str, names: Sequence[str]) -> None:
    """Refuses names that are no UTF-8, as of archives with umlauts: no split can be written."""
    bad = [name for name in names if not name.isascii() and _has_surrogates(name)]
    if bad:
        shown = few([os.fsencode(name).decode("utf-8", "backslashreplace") for name in bad])
        raise StoreError(
            f"{folder}: {len(bad):,} file names are not written in UTF-8 ({shown}); rename them, "
            "for instance by `convmv -f latin1 -t utf8 -r --notest`."
        )


def _has_surrogates(name: str) -> bool:
    """Whether a name holds what stands for bytes that are no UTF-8 (PEP 383)."""
    return any("\udc80" <= letter <= "\udcff" for letter in name)
