"""Polygons filled exactly, so that windows of one image fit together.

cv2.fillPoly also colours the pixels that an edge runs through, and clips edges at the canvas to
other slopes: windows cut from one polygon then differ from the whole by two pixels.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def fill_polygon(mask: NDArray[np.uint8], points: NDArray[np.integer], label: int) -> None:
    """Sets the pixels whose centre is inside a polygon, by the even-odd rule.

    Pixel (row y, column x) has its centre at (x + 0.5, y + 0.5). All is whole numbers: where the
    polygon lies relative to the mask changes nothing. A centre on an edge belongs to what is right
    of it, so that of two polygons that share an edge one has it.

    Args:
      mask: (h, w), changed in place.
      points: (n, 2) corners as (x, y), also outside of the mask.
      label: what is written.
    """
    h, w = mask.shape
    corners = points.astype(np.int64)
    left, top = np.clip(corners.min(axis=0), 0, (w, h))
    right, bottom = np.clip(corners.max(axis=0), 0, (w, h))
    part = mask[top:bottom, left:right]  # the rest is outside
    if part.size:
        part[_inside(corners - (left, top), *part.shape)] = label


def _inside(corners: NDArray[np.int64], h: int, w: int) -> NDArray[np.bool_]:
    """(h, w), whether a ray from the left edge to the pixel's centre crosses an odd number."""
    ends = np.stack([corners, np.roll(corners, -1, axis=0)])
    ends = np.where(
        ends[0, :, 1] <= ends[1, :, 1], ends.transpose(2, 0, 1), ends[::-1].transpose(2, 0, 1)
    )
    (x0, x1), (y0, y1) = ends
    first, last = np.clip(y0, 0, h), np.clip(y1, 0, h)
    count = last - first  # rows whose centres an edge spans; none of a level one
    edge = np.repeat(np.arange(len(x0)), count)
    row = np.arange(len(edge)) - np.repeat(np.cumsum(count) - count, count) + first[edge]
    dx, dy = (x1 - x0)[edge], (y1 - y0)[edge]
    # The first column whose centre is at or right of the edge, rounded up: -(-a // b).
    column = x0[edge] - (dy - (2 * row + 1 - 2 * y0[edge]) * dx) // (2 * dy)
    crossings = np.bincount(row * (w + 1) + np.clip(column, 0, w), minlength=h * (w + 1))
    odd: NDArray[np.bool_] = np.cumsum(crossings.reshape(h, w + 1), axis=1)[:, :w] % 2 == 1
    return odd
