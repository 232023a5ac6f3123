"""What a UNet is trained and validated on."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest

from jaxhisto.downstream.crops import look_at, training_part, validation_part
from jaxhisto.downstream.pixel_scores import IGNORED
from jaxhisto.errors import StoreError
from jaxhisto.tasks.task import Task

SIZES = ((70, 90), (40, 32), (20, 100), (64, 64))
ROWS = np.arange(len(SIZES))


@dataclass
class Held:
    names: tuple[str, ...]
    pixels: list[np.ndarray]

    def __len__(self) -> int:
        return len(self.pixels)

    def read(self, i: int) -> np.ndarray:
        return self.pixels[i]


def made() -> Task:
    """Images whose red channel is their mask, so that what belongs together is seen."""
    rng = np.random.default_rng(0)
    masks = [rng.integers(0, 3, size, np.uint8) for size in SIZES]
    images = [np.dstack([m, *rng.integers(0, 256, (2, *m.shape), np.uint8)]) for m in masks]
    names = tuple(f"{h}x{w}" for h, w in SIZES)
    return Task("made", "segmentation", Held(names, images), Held(names, masks), ("a", "b", "c"))


def test_crops_are_pieces_of_image_and_mask_alike() -> None:
    task = made()
    part = training_part(task, ROWS, 32, crops=3, seed=1, threads=1)
    assert part.rows.tolist() == list(range(12))
    images, masks = part.load(part.rows, 0)
    assert images.shape == (12, 32, 32, 3)
    counted = masks != IGNORED
    np.testing.assert_array_equal(images[..., 0][counted], masks[counted])
    assert counted.reshape(12, -1).sum(1).tolist() == [1024] * 6 + [20 * 32] * 3 + [1024] * 3
    # Somewhere else in each epoch, for each crop; a function of (seed, epoch, row).
    again = training_part(task, ROWS, 32, 3, 1).load(part.rows[::-1], 0)
    np.testing.assert_array_equal(again[0][::-1], images)
    for other in (part.load(part.rows, 1), training_part(task, ROWS, 32, 3, 2).load(part.rows, 0)):
        assert (other[0] != images).any((1, 2, 3))[:3].all()
    assert len(np.unique(images[:3].reshape(3, -1), axis=0)) == 3
    assert part.name(7) == "20x100"


def test_validation_counts_each_pixel_once() -> None:
    task = made()
    part = validation_part(task, ROWS, SIZES, 32)
    images, masks = part.load(part.rows, 0)
    assert images.shape[1:] == (32, 32, 3)
    counted = masks != IGNORED
    np.testing.assert_array_equal(images[..., 0][counted], masks[counted])
    seen = np.bincount(masks[counted], minlength=3)
    np.testing.assert_array_equal(seen, look_at(task, ROWS).counts.sum(0))
    assert seen.sum() == sum(h * w for h, w in SIZES)


def test_looking_finds_what_does_not_fit() -> None:
    task = made()
    looked = look_at(task, ROWS)
    assert looked.sizes == SIZES
    for row, counts in enumerate(looked.counts):
        np.testing.assert_array_equal(
            counts, np.bincount(task.masks.read(row).ravel(), minlength=3)
        )
    task.images.pixels[2] = task.images.pixels[2][:, :-1]  # type: ignore[attr-defined]
    with pytest.raises(StoreError, match=r"20x100: is 99 x 20 px, but its mask is 100 x 20"):
        look_at(task, ROWS)
    other = made()
    other.masks.pixels[1][3, 3] = 7  # type: ignore[attr-defined]
    assert look_at(made(), ROWS[:2]).sha256 != look_at(made(), ROWS[1::-1]).sha256
    with pytest.raises(StoreError, match="class id 7, but there are 3"):
        look_at(other, ROWS)
