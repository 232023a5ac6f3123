"""A slide's own tiles, decoded without OpenSlide: the same pixels in a fraction of the time.

Of the time in which OpenSlide reads a 256-px JPEG tile, libjpeg-turbo needs a fifth, and of that
of a JPEG 2000 tile, imagecodecs two thirds. So levels of Aperio and generic TIFF slides that are
plain grids of such tiles are read here; all else, and every region with something odd in it, is
left to OpenSlide, which has the last word on what can be read. That both see the same pixels is
not believed but looked at: a level is read here once its most detailed tile under the first
region has come out of both alike.
"""

from __future__ import annotations

import contextlib
import heapq
import logging
from collections import Counter, OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tifffile
from numpy.typing import NDArray

from jaxhisto.errors import SlideError
from jaxhisto.slides.tile_codecs import Codec, Jpeg, Jpeg2000

Pixels = NDArray[np.uint8]
Reference = Callable[[int, int, int, int, int], Pixels]  # level, x, y, width, height -> RGBA

VENDORS = ("aperio", "generic-tiff")  # whose levels are grids that start at (0, 0)
CACHE = 64 << 20  # bytes of decoded tiles kept: a row of 256-px ones on a slide 85,000 px wide
# Decoders that differ in how they upsample or convert colours agree on glass.
COLOURS = 40  # range of R - G and of B - G from which a tile can tell them apart
# Tiles that all make libjpeg warn would each be read twice by OpenSlide, and tried here between.
PATIENCE = 32  # regions of a level that fail before one is read, until it is given up
TRIED = 3  # tiles looked at, the most detailed of a level, before nothing of it is copied

JPEG, APERIO_RGB = 7, 33005  # TIFF compression: JPEG; JPEG 2000 of RGB
RGB, YCBCR = 2, 6  # photometric interpretations


@dataclass(frozen=True)
class Level:
    """One level: its size and its tiles', px; where they lie in the file; how they are coded."""

    width: int
    height: int
    tile_width: int
    tile_height: int
    offsets: Sequence[int]
    counts: Sequence[int]
    codec: Codec

    @property
    def across(self) -> int:
        """Tiles in a row."""
        return -(-self.width // self.tile_width)


class OwnTiles:
    """The levels of one slide that can be read by their own tiles. For one thread.

    Args:
      path: of the slide.
      properties: OpenSlide's.
      sizes: (width, height) of its levels, px.
      downsamples: of its levels.
      reference: reads by OpenSlide; a SlideError where that fails.
    """

    def __init__(
        self,
        path: Path,
        properties: Mapping[str, str],
        sizes: Sequence[tuple[int, int]],
        downsamples: Sequence[float],
        reference: Reference,
    ) -> None:
        self._downsamples, self._reference = downsamples, reference
        self._file: tifffile.TiffFile | None = None
        self._levels: dict[int, Level] = {}
        self._proven: set[int] = set()
        self._tried: set[int] = set()
        self._failed = Counter[int]()
        self._cache: OrderedDict[tuple[int, int], Pixels] = OrderedDict()
        self._cached = 0
        if properties.get("openslide.vendor") not in VENDORS:
            return
        logging.getLogger("tifffile").addHandler(logging.NullHandler())
        try:
            self._file = tifffile.TiffFile(path)
            self._levels = _levels(self._file, properties, sizes)
        except Exception:  # fed with damaged tags, tifffile raises nearly anything
            self._levels.clear()
        if not self._levels:
            self.close()

    def close(self) -> None:
        """Closes the file; nothing is read here any more."""
        if self._file is not None:
            self._file.close()
        self._levels.clear()
        self._cache.clear()

    def region(self, level: int, x: int, y: int, width: int, height: int) -> Pixels | None:
        """(height, width, 3) RGB as OpenSlide reads it, or None: let OpenSlide read it.

        Args:
          level: index of the level.
          x, y: level-0 pixels.
          width, height: pixels of the level.
        """
        left, top = x / self._downsamples[level], y / self._downsamples[level]
        if not (left.is_integer() and top.is_integer()):  # there OpenSlide interpolates
            return None
        return self.area(level, int(left), int(top), width, height)

    def area(self, level: int, left: int, top: int, width: int, height: int) -> Pixels | None:
        """(height, width, 3) RGB as it lies in the level, all in its pixels, or None.

        Where the level's pixels begin between those of level 0, OpenSlide cannot be asked for
        just these, and gives an interpolation.
        """
        at = self._levels.get(level)
        # Beyond the edge OpenSlide is transparent.
        if at is None or min(left, top) < 0 or left + width > at.width or top + height > at.height:
            return None
        columns = range(left // at.tile_width, (left + width - 1) // at.tile_width + 1)
        rows = range(top // at.tile_height, (top + height - 1) // at.tile_height + 1)
        indices = [row * at.across + column for row in rows for column in columns]
        try:
            if level not in self._proven and not self._trusted(level, at, indices):
                del self._levels[level]
                return None
            return self._pasted(level, at, indices, (left, top, width, height))
        except (ValueError, OSError, SlideError):
            self._failed[level] += level not in self._proven
            if self._failed[level] >= PATIENCE:
                del self._levels[level]
            return None

    def refusal(self, level: int, side: int) -> str:
        """Why no square of this side can be copied from the level; empty where some can."""
        at = self._levels.get(level)
        if at is None or not isinstance(at.codec, Jpeg):
            return "it has no JPEG tiles that can be copied"
        if (at.tile_width, at.tile_height) != (side, side):
            return f"its JPEG tiles are {at.tile_width} x {at.tile_height} px"
        if level not in self._proven and level not in self._tried:
            self._tried.add(level)
            for index in heapq.nlargest(TRIED, range(len(at.counts)), at.counts.__getitem__):
                with contextlib.suppress(ValueError, OSError, SlideError):
                    self._same(level, at, [index])
        proven = level in self._proven
        return "" if proven else "its JPEG tiles are not seen to be what OpenSlide reads"

    def copied(self, level: int, x: int, y: int, side: int) -> bytes | None:
        """The tile that is exactly this square, undecoded: a JPEG file of its own, RGB or YCbCr.

        Args:
          level: of which `refusal` says nothing.
          x, y: level-0 pixels.
          side: pixels of the level.

        Returns:
          The slide's bytes with the tables and the kind of colours put in; None where the square
          is no such tile, is cut by the edge, or where the tile is damaged.
        """
        at = self._levels.get(level)
        left, top = x / self._downsamples[level], y / self._downsamples[level]
        if at is None or left % side or top % side:
            return None
        if left + side > at.width or top + side > at.height:
            return None
        index = int(top) // side * at.across + int(left) // side
        try:
            self._tile(level, at, index)  # what is stored has been decoded without a warning
            return at.codec.whole(self._bytes(at, index))
        except (ValueError, OSError):
            return None

    def _trusted(self, level: int, at: Level, indices: Sequence[int]) -> bool:
        """Whether OpenSlide reads what is decoded here, as far as these tiles can tell."""
        if self._downsamples[level].is_integer():
            return self._same(level, at, indices)
        # OpenSlide reads the first tile alone of such a level without interpolating. That says
        # where the level lies; what its decoder makes of colours, a level 0 of the same kind says.
        finest = self._levels.get(0)
        if finest is None or finest.codec.kind != at.codec.kind or not self._same(level, at, [0]):
            return False
        if 0 not in self._proven:
            self._same(0, finest, range(len(finest.counts)))
        if 0 in self._proven:
            self._proven.add(level)
        return 0 in self._proven

    def _same(self, level: int, at: Level, indices: Sequence[int]) -> bool:
        """Whether OpenSlide reads the most detailed of these tiles as it is decoded here."""
        index = max(indices, key=at.counts.__getitem__)
        column, row = index % at.across * at.tile_width, index // at.across * at.tile_height
        width, height = min(at.tile_width, at.width - column), min(at.tile_height, at.height - row)
        downsample = self._downsamples[level]
        theirs = self._reference(
            level, round(column * downsample), round(row * downsample), width, height
        )
        ours = self._tile(level, at, index)[:height, :width]
        if theirs[..., 3].min() < 255 or not np.array_equal(ours, theirs[..., :3]):
            return False
        red, green, blue = (ours[..., i].astype(np.int16) for i in range(3))
        if min(np.ptp(red - green), np.ptp(blue - green)) >= COLOURS:
            self._proven.add(level)
        return True

    def _pasted(
        self, level: int, at: Level, indices: Sequence[int], box: tuple[int, int, int, int]
    ) -> Pixels:
        left, top, width, height = box
        out = np.empty((height, width, 3), np.uint8)
        for index in indices:
            x, y = index % at.across * at.tile_width, index // at.across * at.tile_height
            x1, y1 = max(x, left), max(y, top)
            x2, y2 = min(x + at.tile_width, left + width), min(y + at.tile_height, top + height)
            tile = self._tile(level, at, index)
            out[y1 - top : y2 - top, x1 - left : x2 - left] = tile[y1 - y : y2 - y, x1 - x : x2 - x]
        return out

    def _tile(self, level: int, at: Level, index: int) -> Pixels:
        """One decoded tile, (h, w, 3) RGB; ValueError where it is damaged in any way."""
        key = level, index
        if key in self._cache:
            self._cache.move_to_end(key)
            return self._cache[key]
        tile = at.codec.decode(self._bytes(at, index))
        if tile.shape != (at.tile_height, at.tile_width, 3):
            raise ValueError(f"a tile of shape {tile.shape}")
        self._cache[key] = tile
        self._cached += tile.nbytes
        while self._cached > CACHE:
            self._cached -= self._cache.popitem(last=False)[1].nbytes
        return tile

    def _bytes(self, at: Level, index: int) -> bytes:
        """One tile as it lies in the file."""
        if self._file is None:
            raise ValueError("the slide is closed")
        return _read(self._file, at.offsets[index], at.counts[index])


def _levels(
    file: tifffile.TiffFile, properties: Mapping[str, str], sizes: Sequence[tuple[int, int]]
) -> dict[int, Level]:
    """The levels that are tiles of 8-bit RGB, each of one page alone, which can be decoded here."""
    every: Any = file.pages
    pages = [page for page in every if page.is_tiled]
    if any(not min(page.databytecounts, default=0) for page in pages):
        # What Aperio leaves out, here and where the levels above it show it, OpenSlide draws
        # from a finer level.
        return {}
    found = {}
    for level, size in enumerate(sizes):
        named = f"openslide.level[{level}].tile-"
        width, height = (int(properties.get(named + side, 0)) for side in ("width", "height"))
        alike = [
            page
            for page in pages
            if (page.imagewidth, page.imagelength) == size
            and (page.tilewidth, page.tilelength) == (width, height)
        ]
        if len(alike) != 1 or (codec := _codec(file, alike[0])) is None:
            continue
        page = alike[0]
        at = Level(
            width=size[0],
            height=size[1],
            tile_width=width,
            tile_height=height,
            offsets=page.dataoffsets,
            counts=page.databytecounts,
            codec=codec,
        )
        if len(at.offsets) == len(at.counts) == at.across * -(-at.height // at.tile_height):
            found[level] = at
    return found


def _codec(file: tifffile.TiffFile, page: Any) -> Codec | None:
    """What decodes the tiles of a page; None: they are not 8-bit RGB, or nothing here does."""
    tags = page.tags
    if (
        page.photometric not in (RGB, YCBCR)
        or (page.samplesperpixel, page.bitspersample, page.planarconfig) != (3, 8, 1)
        or int(tags.valueof("ImageDepth", 1)) != 1
        or int(tags.valueof("Orientation", 1)) != 1
    ):
        return None
    with contextlib.suppress(ValueError):
        if page.compression == JPEG:
            # A JPEG without image: what lies between its start and its end.
            tables = bytes(page.jpegtables or b"")[2:-2]
            return Jpeg(page.photometric == RGB, tables, page.tilewidth, page.tilelength)
        if page.compression == APERIO_RGB:
            first = _read(file, page.dataoffsets[0], page.databytecounts[0])
            return Jpeg2000(first, page.tilewidth, page.tilelength)
    return None


def _read(file: tifffile.TiffFile, offset: int, count: int) -> bytes:
    """The bytes of one tile; ValueError where the file does not hold them all."""
    if not count:
        raise ValueError("no bytes of a tile")
    if offset + count > file.filehandle.size:  # to read it makes room for it first
        raise ValueError("the file is cut off")
    file.filehandle.seek(offset)
    data: bytes = file.filehandle.read(count)
    if len(data) < count:
        raise ValueError("the file is cut off")
    return data
