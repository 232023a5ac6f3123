"""Foreground detectors: which pixels of a slide are stained tissue.

All take (h, w, 3) uint8 RGB, meant for about `MASK_MPP` um/px, and return (h, w) bool.

- `ciga2022` (paper, App. B): 0.65 > hue > 0.5, saturation > 0.1, 0.9 > value > 0.5 in OpenCV's
  8-bit units divided by 255, that is hue 255 to 332 degrees, violet to pink. Then a
  morphological close. It is made for H&E: alone it drops half of bluish H&E and most DAB, and
  the close fills in what lies between.
- `otsu`: saturation above Otsu's threshold. Any stain; needs some glass on the slide.
- `od`: haematoxylin plus eosin, in optical density (Ruifrok and Johnston 2001), above a fixed
  threshold. Brown (DAB) alone does not count.

docs/foreground.md compares them.
"""

from __future__ import annotations

from collections.abc import Sequence

import cv2
import numpy as np
from numpy.typing import NDArray

from jaxhisto.slides.reader import Flags, Overview, Pixels

MASK_MPP = 8.0
# Otsu halves the noise of a slide that is all glass; glass stays below this saturation of 255.
OTSU_FLOOR = 13
OD_THRESHOLD = 0.15
# Optical density of haematoxylin, eosin and DAB in red, green and blue (Ruifrok and Johnston).
STAINS = np.array([[0.65, 0.70, 0.29], [0.07, 0.99, 0.11], [0.27, 0.57, 0.78]])


def foreground(rgb: Pixels, detector: str, mpp: float, close_um: float) -> Flags:
    """The mask of one detector.

    Args:
      rgb: (h, w, 3) uint8.
      detector: `ciga2022`, `otsu` or `od`.
      mpp: um/px of `rgb`.
      close_um: radius of ciga2022's close in um; 0 for none.
    """
    if detector == "ciga2022":
        return closed(ciga2022(rgb), close_um / mpp)
    return {"otsu": otsu, "od": optical_density}[detector](rgb)


def ciga2022(rgb: Pixels) -> Flags:
    """The paper's colour rule, without the close."""
    hue, saturation, value = cv2.split(cv2.cvtColor(rgb, cv2.COLOR_RGB2HSV))
    return np.asarray(
        (hue > 0.5 * 255)
        & (hue < 0.65 * 255)
        & (saturation > 0.1 * 255)
        & (value > 0.5 * 255)
        & (value < 0.9 * 255)
    )


def closed(mask: Flags, radius: float) -> Flags:
    """Morphological close with a disc of `radius` pixels; beyond the edge is background."""
    if radius < 1 or not mask.any():
        return mask
    # Room for the disc on all sides, or the close would fill the corners of the slide.
    room = int(radius) + 1
    grown = _distance_to(np.pad(mask, room)) <= radius
    closed = _distance_to(~grown) > radius
    return np.asarray(closed[room:-room, room:-room])


def otsu(rgb: Pixels) -> Flags:
    """Saturation above Otsu's threshold, but never below `OTSU_FLOOR` of 255."""
    saturation = cv2.split(cv2.cvtColor(rgb, cv2.COLOR_RGB2HSV))[1]
    threshold, _ = cv2.threshold(saturation, 0, 255, cv2.THRESH_BINARY + cv2.THRESH_OTSU)
    return np.asarray(saturation > max(threshold, OTSU_FLOOR))


def optical_density(rgb: Pixels) -> Flags:
    """Haematoxylin + eosin above `OD_THRESHOLD` (decadic optical density)."""
    density = -np.log10(np.maximum(rgb.astype(np.float32), 1) / 255)
    vectors = STAINS / np.linalg.norm(STAINS, axis=1, keepdims=True)
    amounts = np.maximum(density @ np.linalg.inv(vectors).astype(np.float32), 0)
    return np.asarray(amounts[..., 0] + amounts[..., 1] > OD_THRESHOLD)


def detect(view: Overview, detector: str, mpp: float, close_um: float) -> Flags:
    """The mask of an overview of `mpp` um/px; what is not there is never foreground."""
    return foreground(view.rgb, detector, mpp, close_um) & view.there


def shares(
    mask: Flags, downsample: float, xs: Sequence[int], ys: Sequence[int], side: float
) -> NDArray[np.float64]:
    """The share of each cell of a grid that the mask covers, by exact area.

    Args:
      mask: (h, w), each pixel `downsample` level-0 pixels wide.
      xs, ys: left and top edges of the cells in level-0 pixels.
      side: of the cells, level-0 pixels.

    Returns:
      (len(ys), len(xs)), 0..1.
    """
    rows = _overlap(ys, side, downsample, mask.shape[0])
    columns = _overlap(xs, side, downsample, mask.shape[1])
    # In bands: a whole glass slide's mask has 30 megapixels, as float64 a quarter of a gigabyte.
    bands = (mask[top : top + 256].astype(np.float64) for top in range(0, len(mask), 256))
    return np.asarray(rows @ np.concatenate([band @ columns.T for band in bands]))


def _overlap(
    starts: Sequence[int], side: float, downsample: float, size: int
) -> NDArray[np.float64]:
    """(cells, size): how much of each cell lies in each mask pixel, each row summing to 1."""
    low = np.asarray(starts, np.float64)[:, None] / downsample
    edges = np.arange(size)[None]
    inside = np.clip(np.minimum(low + side / downsample, edges + 1) - np.maximum(low, edges), 0, 1)
    total = inside.sum(axis=1, keepdims=True)
    return np.asarray(np.divide(inside, total, out=np.zeros_like(inside), where=total > 0))


def _distance_to(mask: Flags) -> NDArray[np.float32]:
    """Distance of each pixel to the nearest True one, in pixels."""
    return np.asarray(
        cv2.distanceTransform((~mask).astype(np.uint8), cv2.DIST_L2, cv2.DIST_MASK_PRECISE)
    )
