"""Labelled sets that a user names: an image folder with a CSV file, or a folder for each class.

What does not fit together is counted and listed, never guessed: a row without its image, an
image without a label. A set in which nothing can be told apart (one class) is refused.
"""

from __future__ import annotations

import difflib
import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from jaxhisto.console import counted
from jaxhisto.data.folder_source import image_names
from jaxhisto.data.image_source import ImageSource
from jaxhisto.data.label_table import few, is_nothing, label_rows, same_but_for_case, strangers
from jaxhisto.data.listed import Listed
from jaxhisto.data.named_images import NamedImages, centre_square, load_squares
from jaxhisto.data.sources import StoreSource, Tiles
from jaxhisto.errors import StoreError

__all__ = ["Labelled", "centre_square", "few", "label_rows", "read_labelled", "strangers"]


@dataclass(frozen=True, eq=False)
class Labelled:
    """Images with a class each, in the order of the CSV file, or of their names.

    Fields:
      folder: what the names are relative to.
      names: n names, with / between parts.
      labels: (n,) int64, index into `classes`.
      classes: C >= 2 class names; each has an image (unless a subset was taken).
      groups: n group names (patient, slide, section), None where no column was named.
      missing: names in the CSV file that are no image of the folder.
      unlabelled: images of the folder that have no label.
      other: rows of classes that were not asked for.
    """

    folder: Path
    names: tuple[str, ...]
    labels: NDArray[np.int64]
    classes: tuple[str, ...]
    groups: tuple[str, ...] | None = None
    missing: tuple[str, ...] = ()
    unlabelled: tuple[str, ...] = ()
    other: int = 0

    def __len__(self) -> int:
        return len(self.names)

    def summary(self) -> str:
        """What was read: a line in all, then what does not fit together."""
        counts = np.bincount(self.labels, minlength=len(self.classes)).tolist()
        classes = ", ".join(f"{c} {n:,}" for c, n in zip(self.classes, counts, strict=True))
        groups = f", {len(set(self.groups)):,} groups" if self.groups else ""
        lines = [f"{self.folder}: {len(self):,} labelled images ({classes}){groups}"]
        if self.other:
            lines.append(f"  {self.other:,} rows of other classes left out")
        if self.missing:
            rows = counted(len(self.missing), "row")
            lines.append(f"  {rows} without their image: {few(self.missing)}")
        if self.unlabelled:
            images = counted(len(self.unlabelled), "image")
            lines.append(f"  {images} without a label: {few(self.unlabelled)}")
        return "\n".join(lines)

    def subset(self, rows: NDArray[np.int64]) -> Labelled:
        """The same set with these rows only, in ascending order; the classes stay."""
        rows = np.sort(rows)
        return replace(
            self,
            names=tuple(self.names[i] for i in rows),
            labels=self.labels[rows],
            groups=None if self.groups is None else tuple(self.groups[i] for i in rows),
        )

    def sample(self, limit: int, seed: int = 0) -> Labelled:
        """At most `limit` images (0: all), a function of (seed, names) alone."""
        if not limit or limit >= len(self):
            return self
        return self.subset(np.array(drawn_order(self.names, range(len(self)), seed)[:limit]))

    def split(
        self, test: Sequence[str] = (), seed: int = 0
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Rows to fit on and rows to test on, ascending; nothing is in both.

        Groups are never torn: the groups in `test` are tested on, or half of all groups, drawn.
        Without groups half of each class is drawn (the odd one is fitted on). The draw depends
        on (seed, names), not on the order of the rows or what else is in the set.

        Raises:
          StoreError: a test group that does not exist, or a side left with fewer than two
            classes.
        """
        if self.groups is not None:
            held_out = self._test_groups(test, seed)
            chosen = np.array([g in held_out for g in self.groups], bool)
        elif test:
            raise StoreError(
                f"{self.folder}: test groups {few(test)} are named, but no group column; name it."
            )
        else:
            chosen = np.zeros(len(self), bool)
            for c in range(len(self.classes)):
                drawn = drawn_order(self.names, np.flatnonzero(self.labels == c).tolist(), seed)
                chosen[drawn[: len(drawn) // 2]] = True
        for side, rows in (("fit on", ~chosen), ("test on", chosen)):
            found = np.unique(self.labels[rows])
            if len(found) < 2:
                what = f"class {self.classes[found[0]]} alone" if len(found) else "nothing"
                raise StoreError(
                    f"{self.folder}: the split leaves {what} to {side}; name other test groups or "
                    "label more images."
                )
        return np.flatnonzero(~chosen), np.flatnonzero(chosen)

    def read(self, i: int) -> NDArray[np.uint8]:
        """Image i as stored, (h, w, 3) uint8 RGB.

        Raises:
          StoreError: it cannot be read or decoded.
        """
        return NamedImages(self.folder, self.names).read(i)

    def load(self, side: int, threads: int = 0) -> NDArray[np.uint8]:
        """All images as (n, side, side, 3) uint8 RGB: centre square, resized.

        Args:
          side: pixels.
          threads: that read and decode; 0: one a core.

        Raises:
          StoreError: some cannot be read; says how many and names the first.
        """
        return load_squares(NamedImages(self.folder, self.names), range(len(self)), side, threads)

    def digests(self, threads: int = 0) -> list[bytes]:
        """The sha256 of each image's file.

        Raises:
          StoreError: a file cannot be read.
        """
        return NamedImages(self.folder, self.names).digests(threads)

    def leakage(self, tiles: Tiles, digests: Sequence[bytes]) -> list[str]:
        """In what way these images are trained on as well: a clause each, none when they are not.

        An image counts where its file's bytes are those of a file in `tiles`. A store holds no
        files: there a group counts that is one of its slides, by id with or without suffix. The
        same pixels in another file format are not found.
        """
        files = {im.sha256 for s in tiles.sources if isinstance(s, ImageSource) for im in s.images}
        files |= {digest for s in tiles.sources if isinstance(s, Listed) for digest in s.digests}
        clauses = []
        same = [n for n, digest in zip(self.names, digests, strict=True) if digest in files]
        if same:
            clauses.append(
                f"{len(same):,} of {len(self):,} images are in the training data ({few(same)})"
            )
        stored = (s for s in tiles.sources if isinstance(s, (StoreSource, Listed)))
        slides = {id for s in stored for id in s.slides}
        stems = slides | {slide.rpartition(".")[0] for slide in slides}
        shared = sorted(set(self.groups or ()) & stems)
        if shared:
            clauses.append(f"{len(shared)} groups are slides of the training data ({few(shared)})")
        return clauses

    def _test_groups(self, test: Sequence[str], seed: int) -> set[str]:
        groups = sorted(set(self.groups or ()))
        for name in test:
            if name not in groups:
                near = difflib.get_close_matches(name, groups, 1) or groups
                raise StoreError(f"{self.folder}: no group {name!r}; there is {few(near)}.")
        if test:
            return set(test)
        drawn = drawn_order(groups, range(len(groups)), seed)[: len(groups) // 2]
        return {groups[i] for i in drawn}


def read_labelled(
    folder: str | Path,
    labels: str | Path = "",
    label: str = "",
    group: str = "",
    *,
    file: str = "file",
    classes: Sequence[str] = (),
) -> Labelled:
    """Reads a labelled set, without its pixels.

    Args:
      folder: of the images. Without `labels` each folder in it is a class: `CLASS/*.png`.
      labels: CSV file with a header (tab-separated where it ends in .tsv).
      label, group: names of columns; a group is a patient, slide or section.
      file: column of image names relative to `folder`.
      classes: the classes wanted, in this order; others are left out. Empty: all, sorted.

    Raises:
      StoreError: no images, no such file or column (with a suggestion), an image listed twice,
        a row that is cut short, or fewer than two classes.
    """
    folder = Path(folder).expanduser()
    if not folder.is_dir():
        fact = "is not a folder" if folder.exists() else "does not exist"
        raise StoreError(f"{folder}: {fact}; name the folder of the labelled images.")
    images = image_names(folder)
    if labels:
        table = Path(labels).expanduser()
        rows = label_rows(table, folder, file, label, group)
    elif label or group:
        raise StoreError(
            f"{folder}: a column {label or group!r} is named, but no CSV file; name it too."
        )
    else:
        table = folder
        rows = {n: (n.partition("/")[0] if "/" in n else "", "") for n in images}
    return _joined(folder, table, images, rows, classes, bool(group))


def _joined(
    folder: Path,
    table: Path,
    images: Sequence[str],
    rows: dict[str, tuple[str, str]],
    classes: Sequence[str],
    grouped: bool,
) -> Labelled:
    """The images that have a label, and what is left over on either side."""
    there = set(images)
    labelled = {name: row for name, row in rows.items() if name in there and row[0]}
    found = sorted({label for label, _ in labelled.values()}, key=_natural)
    for name in classes:
        if name not in found:
            near = difflib.get_close_matches(name, found, 1) or found
            raise StoreError(f"{table}: no image of class {name!r}; there is {few(near)}.")
    kept = list(classes) or found
    if not classes:
        _refuse_doubtful(table, [label for label, _ in labelled.values()], table != folder)
    names = [name for name, row in labelled.items() if row[0] in kept]
    if rows and not there.intersection(rows):
        raise StoreError(strangers(table, folder, list(rows), images))
    if len(kept) < 2:
        what = f"all {len(names)} images are {kept[0]}" if kept else "no image has a label"
        remedy = "put each class into a folder of its own" if table == folder else "name another"
        column = "" if table == folder else " column or file"
        raise StoreError(f"{table}: {what}; a probe needs two classes, {remedy}{column}.")
    return Labelled(
        folder,
        tuple(names),
        np.array([kept.index(labelled[name][0]) for name in names], np.int64),
        tuple(kept),
        tuple(labelled[name][1] for name in names) if grouped else None,
        missing=tuple(name for name in rows if name not in there),
        unlabelled=tuple(name for name in images if not rows.get(name, ("", ""))[0]),
        other=len(labelled) - len(names),
    )


def _refuse_doubtful(table: Path, labels: Sequence[str], of_table: bool) -> None:
    """Refuses classes that a person would not call two, or not one."""
    nothing = [label for label in labels if of_table and is_nothing(label)]
    if nothing:
        raise StoreError(
            f"{table}: {counted(len(nothing), 'image')} of class {nothing[0]!r}, as programs write "
            "a cell without value; empty these cells, or name the classes that are meant."
        )
    alike = same_but_for_case(labels)
    if alike:
        raise StoreError(
            f"{table}: {' and '.join(alike[0])} are two classes that differ in case alone; write "
            "them in one way, or name the classes that are meant."
        )


def _natural(name: str) -> tuple[bool, int, str]:
    """Whole numbers by value, before words."""
    number = name.isascii() and name.isdigit()
    return not number, int(name) if number else 0, name


def drawn_order(names: Sequence[str], rows: Iterable[int], seed: int) -> list[int]:
    """The rows in an order drawn from the seed and each one's own name."""

    def key(i: int) -> bytes:
        return hashlib.blake2b(f"jaxhisto split {seed} {names[i]}".encode()).digest()

    return sorted(rows, key=key)
