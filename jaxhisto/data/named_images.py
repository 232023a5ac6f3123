"""Image files below a folder, read by row."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import cv2
import numpy as np
from numpy.typing import NDArray

from jaxhisto.data.images import ImageError, decode_image
from jaxhisto.errors import StoreError
from jaxhisto.special_files import no_pipe


class Images(Protocol):
    """Images by row; `read` may be called from several threads at once."""

    @property
    def names(self) -> tuple[str, ...]:
        """A name each, no two alike."""

    def __len__(self) -> int: ...

    def read(self, i: int) -> NDArray[np.uint8]:
        """Image i, (h, w, 3) uint8 RGB; StoreError where it cannot be had."""

    def files(self) -> Mapping[str, Path]:
        """All that pixels are read from, by a name that stays when the folder is moved."""


@dataclass(frozen=True)
class NamedImages:
    """The image files `names` (with / between parts) below `folder`."""

    folder: Path
    names: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.names)

    def read(self, i: int) -> NDArray[np.uint8]:
        """Image i as stored, (h, w, 3) uint8 RGB.

        Raises:
          StoreError: it cannot be read or decoded.
        """
        path = self.folder / self.names[i]
        try:
            return decode_image(read_bytes(path))
        except ImageError as error:
            raise StoreError(f"{path}: {error}.") from error

    def files(self) -> dict[str, Path]:
        """A file an image, by its name."""
        return {name: self.folder / name for name in self.names}

    def digests(self, threads: int = 0) -> list[bytes]:
        """The sha256 of each image's file.

        Args:
          threads: that read; 0: one a core.

        Raises:
          StoreError: a file cannot be read.
        """

        def one(name: str) -> bytes:
            return hashlib.sha256(read_bytes(self.folder / name)).digest()

        with ThreadPoolExecutor(threads or os.cpu_count()) as pool:
            return list(pool.map(one, self.names))


def read_bytes(path: Path) -> bytes:
    """What a file holds; StoreError where it cannot be read."""
    try:
        return no_pipe(path).read_bytes()
    except OSError as error:
        raise StoreError(f"{path}: cannot be read ({error.strerror}); restore it.") from error


def load_squares(
    images: Images, rows: Sequence[int] | NDArray[np.int64], side: int, threads: int = 0
) -> NDArray[np.uint8]:
    """These images as (n, side, side, 3) uint8 RGB: centre square, resized.

    Args:
      side: pixels.
      threads: that read and decode; 0: one a core.

    Raises:
      StoreError: some cannot be read; says how many and names the first.
    """

    def one(i: int) -> NDArray[np.uint8] | StoreError:
        try:
            return centre_square(images.read(int(i)), side)
        except StoreError as error:
            return error

    squares = np.empty((len(rows), side, side, 3), np.uint8)
    bad = []
    with ThreadPoolExecutor(threads or os.cpu_count()) as pool:
        for i, found in enumerate(pool.map(one, rows)):
            if isinstance(found, StoreError):
                bad.append(found)
            else:
                squares[i] = found
    if bad:
        more = f" ({len(bad)} of {len(rows)} images cannot be used)" if len(bad) > 1 else ""
        raise StoreError(f"{bad[0]}{more}")
    return squares


def centre_square(image: NDArray[np.uint8], side: int) -> NDArray[np.uint8]:
    """The largest square in the middle of (h, w, 3) uint8, resized to (side, side, 3).

    Shrinking averages areas, so that nothing aliases; an image of that size comes back as it is.
    """
    square = _middle(image)
    least = square.shape[0]
    if least == side:
        return square
    kind = cv2.INTER_AREA if least > side else cv2.INTER_LINEAR
    return np.asarray(cv2.resize(square, (side, side), interpolation=kind), np.uint8)


def centre_mask(mask: NDArray[np.uint8], side: int) -> NDArray[np.uint8]:
    """As `centre_square` of (h, w) class ids; the id under each pixel's centre is taken."""
    square = _middle(mask)
    least = square.shape[0]
    at = ((2 * np.arange(side) + 1) * least) // (2 * side)
    return np.ascontiguousarray(square[np.ix_(at, at)])


def _middle(image: NDArray[np.uint8]) -> NDArray[np.uint8]:
    h, w = image.shape[:2]
    least = min(h, w)
    top, left = (h - least) // 2, (w - least) // 2
    return image[top : top + least, left : left + least]
