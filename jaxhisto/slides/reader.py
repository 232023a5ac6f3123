"""Open a slide and read tiles of it at a stated pixel size.

OpenSlide reads it; OME-TIFF, and a TIFF that OpenSlide refuses, are left to `tiff_reader`, whose
handle answers as OpenSlide's does; JPEG and JPEG 2000 tiles are decoded by `own_tiles` where that
gives the same pixels sooner. Pixels are RGB, uint8, as the file holds them. OpenSlide returns
RGBA: it leaves what a file does not hold transparent (regions a scanner skipped, and all beyond
the edge). A tile with any such pixel is refused as `transparent`, one that cannot be decoded as
`unreadable`; neither is ever painted.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Literal

import cv2
import numpy as np
import openslide
from numpy.typing import NDArray
from PIL import Image

from jaxhisto.errors import SlideError
from jaxhisto.slides.opening import open_handle
from jaxhisto.slides.own_tiles import OwnTiles
from jaxhisto.slides.pixel_size import GivenPixelSize, pixel_size
from jaxhisto.slides.tiff_reader import TiffRegionError, alike

Pixels = NDArray[np.uint8]
Flags = NDArray[np.bool_]
Area = tuple[int, int, int, int]  # left, top, width, height

SUFFIXES = (
    ".svs", ".tif", ".tiff", ".tf8", ".btf", ".dcm", ".ndpi", ".vms", ".vmu", ".scn", ".mrxs",
    ".svslide", ".bif",
)  # fmt: skip
SAME_MPP = 0.02  # a level this near to the um/px asked for is taken as it is (0.2525 for 0.25)
SMALLEST = 128  # side to which a block that cannot be read is split, px
MOST_SPLITS = 500  # after these, blocks are given up whole: each split reopens the file four times
MOST_OVERVIEW = 1 << 30  # bytes of a reduced slide; one of 250,000 px squared takes 0.3 GB
SEAM = 252  # alpha, of 255, from which a pixel is wholly there: OpenSlide's rounding loses 2
BLOCK = 2048  # side of the blocks in which a level is read, px: 16 MiB of RGBA


class RegionError(SlideError):
    """One region that cannot be had; `reason` is what the tile is counted under."""

    def __init__(
        self, message: str, reason: Literal["unreadable", "transparent"] = "unreadable"
    ) -> None:
        super().__init__(message)
        self.reason = reason


@dataclass(frozen=True)
class Scale:
    """How tiles of one pixel size are read from one slide.

    Args:
      level: the level read from, the coarsest that is not coarser than asked for.
      mpp: um/px of the tile that results.
      level_side: side of the tile in pixels of that level.
      side: side of the tile in level-0 pixels.
    """

    level: int
    mpp: float
    level_side: float
    side: float


@dataclass(frozen=True)
class Overview:
    """The whole slide, reduced.

    Args:
      rgb: (h, w, 3), what is not there composed on white.
      there: (h, w), False where the file holds no pixels or they cannot be read.
      known: (h, w), False where the file's pixels cannot be read.
      downsample: level-0 pixels a pixel, on either axis.
    """

    rgb: Pixels
    there: Flags
    known: Flags
    downsample: float


class Slide:
    """An open slide with a known pixel size.

    Attributes:
      path: of the file.
      mpp: um/px at level 0, `mpp_source` its rung of the ladder, `notes` what was passed over.
      width, height: at level 0, px.
      downsamples: of the levels, finest first; the first is 1.

    Raises:
      SlideError: not a slide, damaged, or without a pixel size.
    """

    def __init__(self, path: Path, given: GivenPixelSize | None = None) -> None:
        self.path = path
        self._handle, self._dead = open_handle(path), False
        try:
            size = pixel_size(path, self._handle.properties, given or GivenPixelSize())
        except SlideError:
            self._handle.close()
            raise
        self.mpp, self.mpp_source = size.mpp, size.source
        self.notes = (*getattr(self._handle, "notes", ()), *size.notes)
        if self._handle.properties.get("dicom.ImageType[3]") == "RESAMPLED":
            self.notes += (
                "its finest level says that it was resampled from a finer one, of which no file of "
                "the series is here or can be opened",
            )
        self.width, self.height = self._handle.dimensions
        self.downsamples: tuple[float, ...] = tuple(self._handle.level_downsamples)
        self._level_sizes: tuple[tuple[int, int], ...] = tuple(self._handle.level_dimensions)
        self._levels: Sequence[int] = range(len(self.downsamples))
        if self._handle.properties.get("openslide.vendor") == "generic-tiff":
            self._leave_out_labels()
        self._own: OwnTiles | None = None

    def __enter__(self) -> Slide:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        if not self._dead:
            self._handle.close()
        if self._own:
            self._own.close()

    @property
    def own(self) -> OwnTiles:
        """What can be read by the slide's own tiles."""
        if self._own is None:  # not before: a slide that is cut already is opened all the same
            self._own = OwnTiles(
                self.path,
                self._handle.properties,
                self._level_sizes,
                self.downsamples,
                self._by_handle,
            )
        return self._own

    def scale(self, tile_px: int, mpp: float | None) -> Scale:
        """Chooses the level for tiles of `tile_px` pixels at `mpp`; None: level 0 as it is.

        Raises:
          SlideError: the slide is coarser than asked for; pixels are not made up.
        """
        if mpp is None:
            return Scale(0, self.mpp, tile_px, tile_px)
        most = mpp * (1 + SAME_MPP)
        fits = [i for i in self._levels if self.mpp * self.downsamples[i] <= most]
        if not fits:
            raise SlideError(
                f"{self.path}: has {self.mpp:.4g} um/px at best ({self.mpp_source}), coarser than "
                f"the {mpp:g} asked for; pass --tile-mpp {self.mpp:.4g} or more, or leave it out"
            )
        level = max(fits, key=lambda i: self.downsamples[i])
        downsample = self.downsamples[level]
        if abs(self.mpp * downsample / mpp - 1) <= SAME_MPP:
            return Scale(level, self.mpp * downsample, tile_px, tile_px * downsample)
        side = tile_px * mpp / self.mpp
        return Scale(level, mpp, side / downsample, side)

    def read(self, x: int, y: int, tile_px: int, scale: Scale) -> Pixels:
        """Reads one tile: (tile_px, tile_px, 3) at `scale.mpp`, top-left at level-0 (x, y).

        Between levels the next finer one is read and resized once (bicubic, antialiased).

        Raises:
          RegionError: the region cannot be decoded, or part of it is not in the file.
          SlideError: the file cannot be opened any more.
        """
        downsample = self.downsamples[scale.level]
        left, top, start_x, start_y = self._start(x, y, scale.level)
        if scale.level_side == tile_px:
            return self._opaque(scale.level, start_x, start_y, tile_px, tile_px)
        box_x, box_y = max(0.0, (x - start_x) / downsample), max(0.0, (y - start_y) / downsample)
        level_width, level_height = self._level_sizes[scale.level]
        width = min(math.ceil(box_x + scale.level_side - 1e-6), level_width - left)
        height = min(math.ceil(box_y + scale.level_side - 1e-6), level_height - top)
        region = self._opaque(scale.level, start_x, start_y, width, height)
        box = (
            box_x,
            box_y,
            min(box_x + scale.level_side, width),
            min(box_y + scale.level_side, height),
        )
        image = Image.fromarray(region).resize((tile_px, tile_px), Image.Resampling.BICUBIC, box)
        return np.asarray(image)

    def copied(self, x: int, y: int, tile_px: int, scale: Scale) -> bytes | None:
        """The tile that `read` gives, as the JPEG that lies in the slide; None if none does."""
        if scale.level_side != tile_px or self.own.refusal(scale.level, tile_px):
            return None
        return self.own.copied(scale.level, *self._start(x, y, scale.level)[2:], tile_px)

    def overview(self, downsample: float) -> Overview:
        """The slide at about `downsample` level-0 pixels a pixel.

        Takes the level nearest to that; one that is finer by a half or more is reduced by a whole
        factor with area averaging, block by block, so that a slide without a pyramid fits in
        memory. What cannot be read, in blocks of about `SMALLEST` pixels, is left out and not
        `known`.

        Raises:
          SlideError: it would not fit in `MOST_OVERVIEW`; nothing is allocated before.
        """
        level = min(
            self._levels,
            key=lambda i: abs(math.log(self.downsamples[i] / max(downsample, 1.0))),
        )
        factor = max(1, round(downsample / self.downsamples[level]))
        width, height = self._level_sizes[level]
        shape = (math.ceil(height / factor), math.ceil(width / factor))
        if (size := shape[0] * shape[1] * 5) > MOST_OVERVIEW:  # three colours, two flags
            raise SlideError(
                f"{self.path}: states {self.width} x {self.height} px of {self.mpp:g} um, too "
                f"large: an overview of it takes {size / 2**30:.1f} GiB; check both, or leave it "
                "out"
            )
        rgb = np.full((*shape, 3), 255, np.uint8)
        there, known = np.zeros(shape, bool), np.ones(shape, bool)
        blocks = list(_blocks((0, 0, width, height), max(1, BLOCK // factor) * factor))
        splits = MOST_SPLITS
        while blocks:
            x, y, w, h = blocks.pop()
            rows = slice(y // factor, math.ceil((y + h) / factor))
            columns = slice(x // factor, math.ceil((x + w) / factor))
            try:
                block = self._area(level, x, y, w, h)
            except RegionError:
                half = max(w, h) // 2 // factor * factor
                if half >= max(factor, SMALLEST) and splits:
                    blocks += _blocks((x, y, w, h), half)
                    splits -= 1
                known[rows, columns] = False
                continue
            known[rows, columns] = True
            rgb[rows, columns], there[rows, columns] = _reduced(block, factor)
        return Overview(rgb, there, known, self.downsamples[level] * factor)

    def level_size(self, level: int) -> tuple[int, int]:
        """Width and height of a level, px."""
        return self._level_sizes[level]

    def area(self, level: int, left: int, top: int, width: int, height: int) -> Pixels:
        """(height, width, 4) RGBA of a level, in that level's pixels; alpha 0: not in the file.

        Raises:
          RegionError: it cannot be decoded.
        """
        pixels = self._area(level, left, top, width, height)
        if pixels.shape[2] == 4:
            return pixels
        return np.asarray(cv2.cvtColor(pixels, cv2.COLOR_RGB2RGBA), np.uint8)

    def _leave_out_labels(self) -> None:
        """To OpenSlide, all that calls itself reduced is a level of a generic TIFF."""
        sizes = self._level_sizes
        self._levels = [i for i in self._levels if alike(sizes[0], sizes[i])]
        self.notes += tuple(
            f"{w} x {h} px of it have another shape than the slide, and are not read as a level"
            for i, (w, h) in enumerate(sizes)
            if i not in self._levels
        )

    def _start(self, x: int, y: int, level: int) -> tuple[int, int, int, int]:
        """The level's pixel at level-0 (x, y) and where that begins, in level-0 pixels."""
        # OpenSlide interpolates between level pixels unless it starts on one.
        downsample = self.downsamples[level]
        left, top = int(x / downsample + 1e-6), int(y / downsample + 1e-6)
        return left, top, round(left * downsample), round(top * downsample)

    def _opaque(self, level: int, x: int, y: int, width: int, height: int) -> Pixels:
        region = self._region(level, x, y, width, height)
        if region.shape[2] == 3:
            return region
        if region[..., 3].min() < 255:
            raise RegionError(
                f"{self.path}: the file holds no pixels at ({x}, {y}), level {level}", "transparent"
            )
        return np.asarray(cv2.cvtColor(region, cv2.COLOR_RGBA2RGB), np.uint8)

    def _area(self, level: int, left: int, top: int, width: int, height: int) -> Pixels:
        """As `area`, or (height, width, 3) RGB where all of it is in the file."""
        decoded = self.own.area(level, left, top, width, height)
        if decoded is not None:
            return decoded
        ratio = self.downsamples[level]
        return self._by_handle(level, round(left * ratio), round(top * ratio), width, height)

    def _region(self, level: int, x: int, y: int, width: int, height: int) -> Pixels:
        """(height, width, 3) RGB or 4, RGBA; x, y in level-0 pixels, the size in the level's."""
        decoded = self.own.region(level, x, y, width, height)
        return self._by_handle(level, x, y, width, height) if decoded is None else decoded

    def _by_handle(self, level: int, x: int, y: int, width: int, height: int) -> Pixels:
        """As `_region`, RGBA, by OpenSlide or tifffile."""
        if self._dead:
            self._revive()
        try:
            region = np.array(self._handle.read_region((x, y), level, (width, height)))
        except TiffRegionError as error:
            raise RegionError(
                f"{self.path}: cannot be read at ({x}, {y}), level {level} ({error})", "unreadable"
            ) from error
        except openslide.OpenSlideError as error:
            # After an error OpenSlide answers nothing but this error: the handle is dead.
            self._handle.close()
            self._dead = True
            self._revive()
            raise RegionError(
                f"{self.path}: cannot be read at ({x}, {y}), level {level} ({error})", "unreadable"
            ) from error
        alpha = region[..., 3]
        # Where it interpolates, the two tiles that meet in a pixel add up to a little less than
        # one: a seam and no gap, for which a tenth of the tiles of such a level would be refused.
        alpha[alpha >= SEAM] = 255
        return region

    def _revive(self) -> None:
        """Opens the file anew; a SlideError, at every further read too, where it is gone."""
        self._handle, self._dead = open_handle(self.path), False


def _blocks(area: Area, side: int) -> Iterator[Area]:
    left, top, width, height = area
    for y in range(0, height, side):
        for x in range(0, width, side):
            yield left + x, top + y, min(side, width - x), min(side, height - y)


def _reduced(block: Pixels, factor: int) -> tuple[Pixels, Flags]:
    """RGB on white and the flag `there` (at least half opaque), both reduced by `factor`."""
    if block.shape[2] == 4 and block[..., 3].min() < 255:
        alpha = block[..., 3]
        weight = alpha[..., None].astype(np.float32) / 255
        rgb = np.rint(block[..., :3] * weight + 255 * (1 - weight)).astype(np.uint8)
        block = np.dstack([rgb, alpha])
    down, right = -block.shape[0] % factor, -block.shape[1] % factor
    if down or right:
        replicated = cv2.copyMakeBorder(block, 0, down, 0, right, cv2.BORDER_REPLICATE)
        block = np.asarray(replicated, np.uint8)
    if factor > 1:
        size = (block.shape[1] // factor, block.shape[0] // factor)
        block = np.asarray(cv2.resize(block, size, interpolation=cv2.INTER_AREA), np.uint8)
    there = block[..., 3] >= 128 if block.shape[2] == 4 else np.ones(block.shape[:2], bool)
    return np.asarray(block[..., :3], np.uint8), there
