"""Writes an image as a small slide, for the demo and for the check of OpenSlide."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import cv2
import tifffile
from numpy.typing import NDArray

TILE_PX = 256


def write_pyramid(path: Path, image: NDArray[Any], levels: int = 2) -> None:
    """Writes a tiled TIFF without loss, each level half the side of the one before.

    Args:
      path: the file.
      image: (H, W, 3) uint8 RGB.
      levels: number of levels, level 0 included.
    """
    with tifffile.TiffWriter(path) as tiff:
        for level in range(levels):
            tiff.write(
                image,
                photometric="rgb",
                tile=(TILE_PX, TILE_PX),
                compression="deflate",
                subfiletype=int(level > 0),  # 1: a reduced image of another in the file
            )
            image = cv2.resize(image, None, fx=0.5, fy=0.5, interpolation=cv2.INTER_AREA)
