"""Hand-made features of a tile: colour and local binary patterns, the row to beat in a table.

Histograms, means and deviations of red, green, blue, haematoxylin and eosin; uniform,
rotation-invariant local binary patterns (Ojala, Pietikainen, Maenpaa 2002) of 8, 16 and 24 points
at 1, 2 and 3 px of the grey image. No weights, no training.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import cv2
import numpy as np
from numpy.typing import NDArray

from jaxhisto.data.loader import cores

VERSION = "jaxhisto-handmade-1"
BINS = 4  # finer ones tell the section's staining, and cost on another section
CHANNELS = 5
PATTERNS = ((8, 1), (16, 2), (24, 3))
WIDTH = CHANNELS * (BINS + 2) + sum(points + 2 for points, _ in PATTERNS)
STAINS = np.array([[0.650, 0.704, 0.286], [0.072, 0.990, 0.105], [0.268, 0.570, 0.776]])
"""Optical densities of haematoxylin, eosin and DAB (Ruifrok & Johnston 2001)."""

Pixels = NDArray[np.uint8]


def features(images: Pixels) -> NDArray[np.float32]:
    """(n, S, S, 3) uint8 RGB to (n, 84) float32; S of at least 8."""
    with ThreadPoolExecutor(cores()) as pool:
        return np.stack(list(pool.map(_of_one, images)))


def lbp_codes(grey: NDArray[np.float64], points: int, radius: float) -> NDArray[np.int64]:
    """Uniform, rotation-invariant patterns of the pixels whose circle lies in the image.

    The number of neighbours not darker than the pixel, of patterns with at most two changes
    around the circle; points + 1 of all others. Between pixels neighbours are interpolated.

    Args:
      grey: (h, w).
      points: on the circle.
      radius: of it, px.

    Returns:
      (h - 2 m, w - 2 m) with m = ceil(radius), 0..points + 1.
    """
    margin = int(np.ceil(radius))
    h, w = grey.shape[0] - 2 * margin, grey.shape[1] - 2 * margin
    centre = grey[margin : margin + h, margin : margin + w]
    angles = 2 * np.pi * np.arange(points) / points
    # Rounded, so that a point that lies on a pixel is that pixel.
    rows, columns = np.round(-radius * np.sin(angles), 5), np.round(radius * np.cos(angles), 5)
    bits = np.empty((points, h, w), bool)
    for i, (row, column) in enumerate(zip(rows, columns, strict=True)):
        # Interpolating equal values may give one a rounding error less.
        bits[i] = _shifted(grey, margin, row, column, h, w) >= centre - 1e-9
    changes = (bits != np.roll(bits, 1, axis=0)).sum(0)
    return np.where(changes <= 2, bits.sum(0), points + 1)


def _shifted(
    grey: NDArray[np.float64], margin: int, row: float, column: float, h: int, w: int
) -> NDArray[np.float64]:
    """The image (row, column) further, bilinear."""
    top, left = int(np.floor(row)), int(np.floor(column))
    down, right = row - top, column - left

    def at(y: int, x: int) -> NDArray[np.float64]:
        y, x = margin + y, margin + x
        return grey[y : y + h, x : x + w]

    below, beside = top + (down > 0), left + (right > 0)
    upper = (1 - right) * at(top, left) + right * at(top, beside)
    lower = (1 - right) * at(below, left) + right * at(below, beside)
    return np.asarray((1 - down) * upper + down * lower)


def _of_one(image: Pixels) -> NDArray[np.float32]:
    parts: list[NDArray[np.float64]] = []
    for channel in _channels(image):  # each in 0..1
        counts, _ = np.histogram(channel, BINS, (0.0, 1.0))
        parts += [counts / channel.size, np.array([channel.mean(), channel.std()])]
    grey = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY).astype(np.float64)
    for points, radius in PATTERNS:
        codes = lbp_codes(grey, points, radius)
        parts.append(np.bincount(codes.ravel(), minlength=points + 2) / codes.size)
    return np.concatenate(parts).astype(np.float32)


def _channels(image: Pixels) -> list[NDArray[np.float64]]:
    """Red, green, blue, haematoxylin and eosin, each (h, w) in 0..1."""
    rgb = image.astype(np.float64) / 255
    unit = STAINS / np.linalg.norm(STAINS, axis=1, keepdims=True)
    density = -np.log10((image + 1.0) / 256) @ np.linalg.inv(unit)
    # 2 is a stain that lets through a hundredth of the light.
    amounts = np.clip(density[..., :2] / 2, 0, 1)
    return [np.ascontiguousarray(c) for a in (rgb, amounts) for c in np.moveaxis(a, -1, 0)]
