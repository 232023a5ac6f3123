"""Masks as files: class ids a pixel, or numbered instances; nothing is guessed from colours."""

from __future__ import annotations

import io
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from jaxhisto.data.images import FORMATS
from jaxhisto.data.named_images import read_bytes
from jaxhisto.errors import StoreError
from jaxhisto.special_files import no_pipe

LOSSY = (".jpg", ".jpeg")
IDS = ("1", "L", "P", "I;16", "I;16B", "I;16L", "I")  # Pillow's modes of one whole number a pixel
SAVE = "save it as one channel of class ids (PNG, 8 or 16 bits)"


@dataclass(frozen=True)
class MaskFiles:
    """A mask file an image.

    Fields:
      paths: of the masks, in the order of the images.
      classes: C, the number of classes.
      instances: pixels are numbers of instances; all of them are class 1.
    """

    paths: tuple[Path, ...]
    classes: int
    instances: bool = False

    def read(self, i: int) -> NDArray[np.uint8]:
        """Mask i, (h, w) uint8, each below C.

        Raises:
          StoreError: it cannot be read, is a colour picture or a JPEG of more than 0 and 255, or
            holds other numbers.
        """
        path = self.paths[i]
        ids = read_ids(path)
        found = np.flatnonzero(np.bincount(ids.reshape(-1))) if ids.min() >= 0 else np.unique(ids)
        if path.suffix.lower() in LOSSY and not np.isin(found, (0, 255)).all():
            raise StoreError(
                f"{path}: is a JPEG, which changes ids where they meet ({len(found):,} numbers, "
                f"such as {found[len(found) // 2]}); make it anew as PNG from what it was made of."
            )
        if self.instances:
            return (ids > 0).astype(np.uint8)
        if self.classes == 2 and np.isin(found, (0, 255)).all():
            return (ids > 0).astype(np.uint8)
        wrong = found[(found < 0) | (found >= self.classes)]
        if len(wrong):
            more = f" and {len(wrong) - 1:,} other ids" if len(wrong) > 1 else ""
            raise StoreError(
                f"{path}: has class id {wrong[0]}{more}, but there are {self.classes} classes "
                f"(0 to {self.classes - 1}); name all classes, or pass "
                "--task.masks-are instances if each object has a number of its own."
            )
        return ids.astype(np.uint8)

    def files(self) -> dict[str, Path]:
        """A file a mask, by its row and name."""
        return numbered(self.paths)

    def check(self, sizes: Sequence[tuple[int, int]], threads: int = 0) -> NDArray[np.int64]:
        """Reads all masks once, so that a bad one is found before anything is trained.

        Args:
          sizes: (h, w) of the images.

        Returns:
          (C,) int64, pixels of each class.

        Raises:
          StoreError: a mask of another size than its image, or one that `read` refuses.
        """

        def one(i: int) -> NDArray[np.int64]:
            mask = self.read(i)
            if mask.shape != tuple(sizes[i]):
                (h, w), (image_h, image_w) = mask.shape, sizes[i]
                raise StoreError(
                    f"{self.paths[i]}: is {w} x {h} px, but its image is {image_w} x {image_h}; "
                    "resize neither, find the mask that belongs to it."
                )
            return np.bincount(mask.reshape(-1), minlength=self.classes).astype(np.int64)

        with ThreadPoolExecutor(threads or os.cpu_count()) as pool:
            counts = np.stack(list(pool.map(one, range(len(self.paths)))))
        return np.asarray(counts.sum(axis=0))


def numbered(paths: Sequence[Path]) -> dict[str, Path]:
    """Files by their row and name, `12 a.png`: two folders may hold the same names."""
    return {f"{i} {path.name}": path for i, path in enumerate(paths)}


def read_ids(path: Path) -> NDArray[np.integer]:
    """The whole number of each pixel, (h, w) of the file's own type; of a palette its index.

    Raises:
      StoreError: no image, more than one number a pixel, or fractions.
    """
    data = read_bytes(path)
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            if image.mode in ("RGB", "RGBA", "LA"):
                return _grey(path, np.asarray(image))
            if image.mode not in IDS:
                raise StoreError(f"{path}: its pixels are {image.mode}; {SAVE}.")
            ids = np.asarray(image)
            return ids.astype(np.uint8) if ids.dtype == np.bool_ else ids
    except UnidentifiedImageError as error:
        raise StoreError(f"{path}: is no readable image; {SAVE}.") from error
    except (OSError, SyntaxError, ValueError, EOFError) as error:  # Pillow's, of damaged files
        raise StoreError(f"{path}: cannot be decoded ({error}); restore it.") from error


def image_size(path: Path) -> tuple[int, int]:
    """(h, w) that an image file's header states.

    Raises:
      StoreError: it is no image.
    """
    try:
        with Image.open(no_pipe(path), formats=FORMATS) as image:
            return image.height, image.width
    except (OSError, SyntaxError, ValueError, UnidentifiedImageError) as error:
        raise StoreError(f"{path}: is no readable image; remove it.") from error


def _grey(path: Path, pixels: NDArray[np.uint8]) -> NDArray[np.integer]:
    """Ids that were saved as grey RGB; colours say nothing about classes."""
    colour = pixels[..., :3] if pixels.shape[-1] > 2 else pixels[..., :1]
    if (colour != colour[..., :1]).any():
        raise StoreError(
            f"{path}: is a colour picture, of which nobody knows which colour is which class; "
            f"{SAVE}."
        )
    return np.asarray(colour[..., 0])
