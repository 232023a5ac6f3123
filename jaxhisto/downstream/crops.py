"""Square pieces of images with their masks, at the images' own scale: what a UNet is trained on.

Training takes crops at random places, which are functions of (seed, epoch, row); validation
takes a grid that counts each pixel once. Where an image is smaller than a crop it is mirrored,
and what is mirrored does not count.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from jaxhisto.data.loader import cores
from jaxhisto.downstream.batches import Batch, Part, Rows
from jaxhisto.downstream.pixel_scores import IGNORED
from jaxhisto.errors import StoreError
from jaxhisto.tasks.task import Task

Pixels = NDArray[np.uint8]


@dataclass(frozen=True)
class Looked:
    """What some images and their masks are.

    Fields:
      sizes: (h, w) of each.
      counts: (n, C) int64, pixels of each class in each.
      sha256: of all pixels and class ids, in the order of the rows.
    """

    sizes: tuple[tuple[int, int], ...]
    counts: NDArray[np.int64]
    sha256: str


def look_at(task: Task, rows: Rows, threads: int = 0) -> Looked:
    """Reads all of these images and masks once, so that a bad one is found before training.

    Raises:
      StoreError: one that cannot be read, of two sizes, or with other class ids than the task's.
    """
    classes = len(task.classes)

    def one(i: int) -> tuple[tuple[int, int], NDArray[np.int64], bytes]:
        image, mask = read_pair(task, i)
        found = np.bincount(mask.reshape(-1), minlength=classes)
        if len(found) > classes:
            raise StoreError(
                f"{task.names[i]}: its mask has class id {len(found) - 1}, but there are {classes} "
                "classes; name all of them."
            )
        digest = hashlib.sha256(image.tobytes())
        digest.update(mask.tobytes())
        return (mask.shape[0], mask.shape[1]), found, digest.digest()

    with ThreadPoolExecutor(threads or cores()) as pool:
        found = list(pool.map(one, rows.tolist()))
    whole = hashlib.sha256(b"".join(digest for _, _, digest in found)).hexdigest()
    return Looked(tuple(f[0] for f in found), np.stack([f[1] for f in found]), whole)


def training_part(
    task: Task, rows: Rows, side: int, crops: int, seed: int, threads: int = 0
) -> Part:
    """`crops` crops of each of these images in an epoch; row `i * crops + k` is one of image i."""

    def load(numbers: Rows, epoch: int) -> Batch:
        def one(number: int) -> tuple[Pixels, Pixels]:
            image, mask = read_pair(task, number // crops)
            rng = np.random.default_rng([seed, epoch, number])
            room = [max(length - side, 0) for length in mask.shape]
            y, x = (int(rng.integers(0, more + 1)) for more in room)
            return cut(image, mask, y, x, side)

        return _stacked(one, numbers, threads)

    numbers = (rows[:, None] * crops + np.arange(crops)[None]).reshape(-1)
    return Part(numbers, load, lambda number: task.names[number // crops])


def validation_part(
    task: Task, rows: Rows, sizes: Sequence[tuple[int, int]], side: int, threads: int = 0
) -> Part:
    """The pieces that cover these images, in which each pixel counts once.

    Args:
      sizes: (h, w) of the images `rows`.
    """
    pieces = [
        (int(row), y, x)
        for row, (h, w) in zip(rows, sizes, strict=True)
        for y in range(0, h, side)
        for x in range(0, w, side)
    ]

    def load(numbers: Rows, epoch: int) -> Batch:
        def one(number: int) -> tuple[Pixels, Pixels]:
            row, y, x = pieces[number]
            image, mask = read_pair(task, row)
            top, left = (
                max(min(at, n - side), 0) for at, n in zip((y, x), mask.shape, strict=True)
            )
            piece, truth = cut(image, mask, top, left, side)
            truth[: y - top] = IGNORED  # counted in the piece before
            truth[:, : x - left] = IGNORED
            return piece, truth

        return _stacked(one, numbers, threads)

    return Part(np.arange(len(pieces)), load, lambda number: task.names[pieces[number][0]])


def read_pair(task: Task, row: int) -> tuple[Pixels, Pixels]:
    """Image (h, w, 3) and mask (h, w) of a row.

    Raises:
      StoreError: one cannot be read, or they differ in size.
    """
    image, mask = task.images.read(row), task.masks.read(row)
    if image.shape[:2] != mask.shape:
        (h, w), (mask_h, mask_w) = image.shape[:2], mask.shape
        raise StoreError(
            f"{task.names[row]}: is {w} x {h} px, but its mask is {mask_w} x {mask_h}; resize "
            "neither, find the mask that belongs to it."
        )
    return image, mask


def cut(image: Pixels, mask: Pixels, y: int, x: int, side: int) -> tuple[Pixels, Pixels]:
    """(side, side, 3) and (side, side) from (y, x) on; mirrored where the image ends."""
    piece = image[y : y + side, x : x + side]
    truth = mask[y : y + side, x : x + side].copy()
    down, right = (side - length for length in truth.shape)
    if down or right:
        piece = np.pad(piece, ((0, down), (0, right), (0, 0)), "symmetric")
        truth = np.pad(truth, ((0, down), (0, right)), constant_values=IGNORED)
    return piece, truth


def _stacked(one: Callable[[int], tuple[Pixels, Pixels]], numbers: Rows, threads: int) -> Batch:
    with ThreadPoolExecutor(threads or cores()) as pool:
        images, masks = zip(*pool.map(one, numbers.tolist()), strict=True)
    return np.stack(images), np.stack(masks)
