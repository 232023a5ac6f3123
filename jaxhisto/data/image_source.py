"""Images by name, wherever they lie: checked once, hashed, long ones cut into cells.

A kind of source says which names it holds and how to get one of them; all that a run is promised
of its data (what is refused, dropped, excluded, and by what hash it is known) is here.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from jaxhisto.config import DataConfig
from jaxhisto.data.features import Place
from jaxhisto.data.images import SUFFIXES, ImageError, decode_image
from jaxhisto.errors import StoreError

T = TypeVar("T")
Pixels = NDArray[np.uint8]

AT_ONCE = 4096  # images handed to the threads together: a future each, so not all of a million


@dataclass(frozen=True, slots=True)
class Checked:
    """An image as it was found on opening; `reason` is empty for a good one.

    Fields:
      sha256: of the file's bytes; of shape and pixels where there is no file (`Stored`).
    """

    name: str
    sha256: bytes = b""
    height: int = 0
    width: int = 0
    reason: str = ""
    remedy: str = ""


class ImageSource:
    """Images in the order of `names`; one with a side above `max_side` in cells, others whole.

    A cell is (image, top, left, height, width), and `image_of` has the image of each. An image is
    decoded for each of its cells, so slides belong in `jaxhisto tile`. Two sources with the same
    names and contents have the same hash, whatever their kind and place. Safe to use from several
    threads if `load` is.

    Raises:
      StoreError: more unusable images than `failures_allowed`, or none left.
    """

    kind = "source"

    def __init__(self, path: Path, names: Sequence[str], config: DataConfig) -> None:
        self.path, self._max_side = path, config.max_side
        hits = {name: self.excluded_by(name, config.exclude) for name in names}
        self.matched = set[str]().union(*hits.values())
        wanted = [name for name in names if not hits[name]]
        self._excluded = len(names) - len(wanted)
        checked = self._checked(wanted, config.threads)
        bad = [image for image in checked if image.reason]
        if len(bad) > config.failures_allowed:
            raise StoreError(
                f"{path}: {len(bad)} of {len(checked)} images cannot be used, the first, "
                f"{readable(bad[0].name)}, {bad[0].reason}; {bad[0].remedy}, or pass "
                f"--data.failures-allowed {len(bad)} to go on without."
            )
        self.images = [image for image in checked if not image.reason]
        if not self.images:
            raise StoreError(
                f"{path}: no image is left of {len(names)} ({self._excluded} excluded, {len(bad)} "
                f"unreadable); take the {self.kind} out of --data.stores or change --data.exclude."
            )
        self._cells = [
            (n, top, left, h, w)
            for n, image in enumerate(self.images)
            for top, h in _cuts(image.height, config.max_side)
            for left, w in _cuts(image.width, config.max_side)
        ]
        self.image_of = [self.images[cell[0]] for cell in self._cells]
        self.canvas = (max(cell[3] for cell in self._cells), max(cell[4] for cell in self._cells))
        self.dropped = [(self._place(image.name), image.reason) for image in bad]
        content = [[image.name, image.sha256.hex()] for image in self.images]
        self.hash = hashlib.sha256(json.dumps(content).encode()).hexdigest()

    def load(self, name: str) -> bytes | Pixels:
        """The encoded image; or its pixels, (h, w, 3) uint8 RGB, where it is stored as those.

        Raises:
          OSError, ImageError: cannot be had.
        """
        raise NotImplementedError

    def place(self, name: str) -> str:
        """What a message calls the image."""
        return f"{self.path}/{name}"

    def excluded_by(self, name: str, patterns: Iterable[str]) -> set[str]:
        """The patterns that leave the image out."""
        return matches(name, patterns)

    def mpp_range(self) -> tuple[float, float] | None:
        return None

    def __len__(self) -> int:
        return len(self._cells)

    def read(self, i: int, out: Pixels | None = None) -> Pixels:
        n, top, left, h, w = self._cells[i]
        image = self.images[n]
        try:
            data = self.load(image.name)
            if _digest(data) != image.sha256:
                raise ImageError("changed since the run opened it", "restore it or start a new run")
            return _decoded(data)[top : top + h, left : left + w]
        except OSError as error:
            raise StoreError(
                f"{self._place(image.name)}: cannot be read any more ({error.strerror or error}); "
                "restore it."
            ) from error
        except ImageError as error:
            raise StoreError(f"{self._place(image.name)}: {error}.") from error

    def size(self, i: int) -> tuple[int, int]:
        return self._cells[i][3], self._cells[i][4]

    def name(self, i: int) -> str:
        n, top, left, h, w = self._cells[i]
        image = self.images[n]
        cell = "" if (h, w) == (image.height, image.width) else f"@{top},{left}"
        return f"{self._place(image.name)}{cell}"

    def located(self, i: int, at: tuple[int, int] | None = None) -> Place:
        n, top, left, h, w = self._cells[i]
        image = self.images[n]
        cell = "" if (h, w) == (image.height, image.width) else f"@{top},{left}"
        name, span = f"{readable(image.name)}{cell}", float(max(h, w))
        return Place(name, "", left, top, span, image.sha256)

    def line(self) -> str:
        cells = "" if len(self) == len(self.images) else f" in {len(self):,} cells"
        mpp = self.mpp_range()
        return (
            f"{self.path}: {self.kind}, {len(self.images):,} images{cells}"
            + (f", {self._excluded:,} excluded" if self._excluded else "")
            + (f", {len(self.dropped):,} dropped" if self.dropped else "")
            + (f", {mpp[0]:g} to {mpp[1]:g} um/px" if mpp else "")
            + f"; sides above {self._max_side} px cut, smaller images whole"
        )

    def _place(self, name: str) -> str:
        return readable(self.place(name))

    def _checked(self, names: Sequence[str], threads: int) -> list[Checked]:
        """Reads and decodes every image once."""
        Image.init()  # loads all decoders; left to the threads they would race for it

        def check(name: str) -> Checked:
            try:
                data = self.load(name)
                h, w = _decoded(data, checksums=True).shape[:2]
            except ImageError as error:
                return Checked(name, reason=error.fact, remedy=error.remedy)
            except OSError as error:
                reason = f"cannot be read ({error.strerror or error})"
                return Checked(name, reason=reason, remedy="remove it")
            return Checked(name, _digest(data), h, w)

        with ThreadPoolExecutor(threads or os.cpu_count()) as pool:
            blocks = (names[i : i + AT_ONCE] for i in range(0, len(names), AT_ONCE))
            images = itertools.chain.from_iterable(pool.map(check, block) for block in blocks)
            return list(_reported(images, len(names), f"{self.path}: checking images"))


def matches(name: str, patterns: Iterable[str]) -> set[str]:
    """The patterns that match a relative name, or its last part."""
    last = name.rpartition("/")[2]
    return {p for p in patterns if fnmatchcase(name, p) or fnmatchcase(last, p)}


def is_image(file: str) -> bool:
    """Whether a file's name is an image's; those that start with a dot are not seen."""
    return file.lower().endswith(SUFFIXES) and not file.startswith(".")


def readable(name: str) -> str:
    """The name as it can be printed: file systems allow bytes that are no text."""
    return name.encode(errors="backslashreplace").decode()


def _decoded(data: bytes | Pixels, checksums: bool = False) -> Pixels:
    return decode_image(data, checksums) if isinstance(data, bytes) else data


def _digest(data: bytes | Pixels) -> bytes:
    if isinstance(data, bytes):
        return hashlib.sha256(data).digest()
    return hashlib.sha256(f"{data.shape}".encode() + data.tobytes()).digest()


def _reported(items: Iterable[T], total: int, label: str) -> Iterator[T]:
    """Passes items on; says on stderr how far it is once it takes longer than two seconds."""
    terminal = sys.stderr.isatty()
    pause, due = (0.5 if terminal else 10.0), time.monotonic() + 2.0
    told = False
    for done, item in enumerate(items, 1):
        yield item
        if (now := time.monotonic()) >= due or (told and done == total):
            end = "\r" if terminal and done < total else "\n"
            print(f"{label} {done:,}/{total:,}", end=end, file=sys.stderr, flush=True)
            told, due = True, now + pause


def _cuts(length: int, longest: int) -> list[tuple[int, int]]:
    """(start, size) of the fewest pieces of a side, equal to 1 px, none above `longest`."""
    count = -(-length // longest)
    edges = [length * k // count for k in range(count + 1)]
    return [(a, b - a) for a, b in itertools.pairwise(edges)]
