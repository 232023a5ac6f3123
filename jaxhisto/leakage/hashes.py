"""What an image looks like, in 63 bits that survive re-encoding, recolouring and rescaling.

The luminance shrunk to 32 x 32, its discrete cosine transform, and of the 8 x 8 lowest
frequencies the signs, without the constant one (as Zauner 2010, but for the threshold: zero and
not the median, so that brightness and contrast drop out and a flip turns signs alone). Written
here in numpy: `imagehash` gives one image's hash at a time and would bring SciPy and PyWavelets.
"""

from __future__ import annotations

from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

SIDE = 32
LOW = 8
BITS = LOW * LOW - 1
SYMMETRIES = (
    "as it is",
    "turned 90",
    "turned 180",
    "turned 270",
    "mirrored",
    "mirrored, turned 90",
    "mirrored, turned 180",
    "mirrored, turned 270",
)
"""The eight of a square by number: mirrored left to right from 4 on, then turned
counter-clockwise."""


def turned(image: NDArray[Any], symmetry: int) -> NDArray[Any]:
    """The image (..., h, w) or (h, w, 3) uint8 under one of the eight symmetries."""
    axes = (0, 1) if image.ndim == 3 and image.shape[2] == 3 else (-2, -1)
    flipped = np.flip(image, axes[1]) if symmetry >= 4 else image
    return np.ascontiguousarray(np.rot90(flipped, symmetry % 4, axes))


def grey(image: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Luminance (Rec. 601) of (h, w, 3) RGB, (h, w) uint8."""
    return np.asarray(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY), np.uint8)


def thumbnail(luminance: NDArray[np.uint8]) -> NDArray[np.float32]:
    """(h, w) shrunk to (32, 32) float32, 0..255, whatever its proportions; areas are averaged."""
    small = cv2.resize(luminance.astype(np.float32), (SIDE, SIDE), interpolation=cv2.INTER_AREA)
    return np.asarray(small, np.float32)


def hashes(thumbnails: NDArray[np.float32]) -> NDArray[np.uint64]:
    """(n, 32, 32) -> (n,) uint64, of which the lowest 63 bits are used."""
    low = _COSINES @ thumbnails.astype(np.float64) @ _COSINES.T
    signs = low.reshape(-1, LOW * LOW)[:, 1:] > 0
    return np.asarray(signs @ (np.uint64(1) << np.arange(BITS, dtype=np.uint64)), np.uint64)


def all_hashes(thumbnails: NDArray[np.float32]) -> NDArray[np.uint64]:
    """(n, 32, 32) -> (n, 8) uint64: the hash under each symmetry."""
    return np.stack([hashes(turned(thumbnails, k)) for k in range(8)], axis=1)


def correlation(a: NDArray[Any], b: NDArray[Any]) -> float:
    """Pearson's r of two arrays of one shape; 0 where one is constant."""
    x, y = a.astype(np.float64) - np.mean(a), b.astype(np.float64) - np.mean(b)
    norm = float(np.sqrt((x * x).sum() * (y * y).sum()))
    return float((x * y).sum()) / norm if norm > 0 else 0.0


def _cosines() -> NDArray[np.float64]:
    """(8, 32): the lowest rows of the orthonormal DCT-II, but for the scale of the first."""
    k, x = np.arange(LOW)[:, None], np.arange(SIDE)[None]
    return np.asarray(np.cos(np.pi * k * (2 * x + 1) / (2 * SIDE)), np.float64)


_COSINES = _cosines()
