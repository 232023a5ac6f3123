"""A whole slide as one image of a stated pixel size, read by rows."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from jaxhisto.slides.reader import (
    BLOCK,
    MOST_SPLITS,
    SMALLEST,
    Flags,
    Pixels,
    RegionError,
    Slide,
)

SUPPORT = 2  # of a bicubic resampling, in pixels of the coarser grid


class SlideRaster:
    """The pixels of a slide at `mpp`, of which no more is held than is asked for.

    What the file does not hold is white; what of it cannot be read is white too, counted in
    `unreadable`, and neither is `there`.

    Args:
      slide: open for as long as this is used.
      mpp: um/px.

    Raises:
      SlideError: the slide is coarser than `mpp`; pixels are not made up.
    """

    def __init__(self, slide: Slide, mpp: float) -> None:
        self._slide = slide
        self._scale = slide.scale(1, mpp)
        step = self._scale.side  # level-0 px a pixel
        self.mpp = self._scale.mpp
        self.height, self.width = int(slide.height / step), int(slide.width / step)
        if self._scale.level_side == 1:  # a level's size is rounded as its writer liked
            level_width, level_height = slide.level_size(self._scale.level)
            self.height, self.width = min(self.height, level_height), min(self.width, level_width)
        self.unreadable, self._splits = 0, MOST_SPLITS
        self._first, self._there = 0, np.zeros((0, self.width), bool)

    def rows(self, start: int, stop: int) -> Pixels:
        """(stop - start, width, 3) uint8 RGB; rows are asked for from top to bottom."""
        rgb, there = self.read(start, stop)
        self._there = np.concatenate([self._there, there])
        return rgb

    def there(self, start: int, stop: int) -> Flags:
        """Which pixels of rows that `rows` gave are in the file, (stop - start, width).

        Rows before `start` are forgotten.
        """
        self._there = self._there[start - self._first :]
        self._first = start
        return self._there[: stop - start]

    def read(self, start: int, stop: int) -> tuple[Pixels, Flags]:
        """Rows as RGB (h, width, 3) and which of them are there (h, width)."""
        side = max(1, int(BLOCK / self._scale.level_side))
        blocks = [
            self._block(y, min(y + side, stop), x, min(x + side, self.width))
            for y in range(start, stop, side)
            for x in range(0, self.width, side)
        ]
        wide = -(-self.width // side)
        lines = [blocks[i : i + wide] for i in range(0, len(blocks), wide)]
        rgb = np.concatenate([np.concatenate([b[0] for b in line], 1) for line in lines])
        there = np.concatenate([np.concatenate([b[1] for b in line], 1) for line in lines])
        return rgb, there

    def _block(self, top: int, bottom: int, left: int, right: int) -> tuple[Pixels, Flags]:
        high, wide = bottom - top, right - left
        try:
            rgba = self._resampled(top, bottom, left, right)
        except RegionError:
            # So that one tile that is damaged costs no whole block; each try reopens the file.
            least = SMALLEST / self._scale.level_side
            if max(high, wide) >= 2 * least and self._splits:
                self._splits -= 1
                return self._split(top, bottom, left, right)
            self.unreadable += high * wide
            return np.full((high, wide, 3), 255, np.uint8), np.zeros((high, wide), bool)
        alpha = rgba[..., 3]
        rgb = rgba[..., :3]
        if alpha.min() < 255:
            rgb = np.where(alpha[..., None] < 255, np.uint8(255), rgb)
        return np.ascontiguousarray(rgb), alpha == 255

    def _split(self, top: int, bottom: int, left: int, right: int) -> tuple[Pixels, Flags]:
        """A block by its halves, across its longer side."""
        if bottom - top >= right - left:
            middle, axis = (top + bottom) // 2, 0
            boxes = [(top, middle, left, right), (middle, bottom, left, right)]
        else:
            middle, axis = (left + right) // 2, 1
            boxes = [(top, bottom, left, middle), (top, bottom, middle, right)]
        halves = [self._block(*box) for box in boxes]
        rgb, there = (np.concatenate(part, axis) for part in zip(*halves, strict=True))
        return rgb, there

    def _resampled(self, top: int, bottom: int, left: int, right: int) -> NDArray[np.uint8]:
        """(h, w, 4): read from the level with what the resampling needs around, resized once."""
        factor, level = self._scale.level_side, self._scale.level
        if factor == 1:
            return self._slide.area(level, left, top, right - left, bottom - top)
        reach = math.ceil(SUPPORT * factor) + 1
        level_width, level_height = self._slide.level_size(level)
        x0, y0 = max(int(left * factor) - reach, 0), max(int(top * factor) - reach, 0)
        x1 = min(math.ceil(right * factor) + reach, level_width)
        y1 = min(math.ceil(bottom * factor) + reach, level_height)
        region = self._slide.area(level, x0, y0, x1 - x0, y1 - y0)
        box = (
            left * factor - x0,
            top * factor - y0,
            min(right * factor - x0, x1 - x0),
            min(bottom * factor - y0, y1 - y0),
        )
        size = (right - left, bottom - top)
        # Colour and alpha apart: Pillow would weigh the colours of RGBA by alpha.
        rgb = Image.fromarray(region[..., :3]).resize(size, Image.Resampling.BICUBIC, box)
        alpha = Image.fromarray(region[..., 3]).resize(size, Image.Resampling.BICUBIC, box)
        return np.dstack([np.asarray(rgb), np.asarray(alpha)])
