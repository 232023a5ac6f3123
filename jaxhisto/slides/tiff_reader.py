"""OME-TIFF, and TIFF that OpenSlide refuses, read by tifffile: a handle for `reader.Slide`.

OpenSlide wants tiles, and of OME it knows neither sub-images nor pixel size. Here a region
decodes the tiles or strips under it and no more. Taken is the largest image of the file, if it
is 8-bit RGB; its pyramid is what the file says (SubIFDs, or reduced pages after it). Anything
else is refused by what was found: which of 16 bits or of five stains would be the picture, only
its maker knows.
"""

from __future__ import annotations

import itertools
import logging
import math
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any
from xml.etree import ElementTree

import numpy as np
import tifffile
from numpy.typing import NDArray

from jaxhisto.data.images import jpeg_is_whole
from jaxhisto.errors import SlideError
from jaxhisto.slides.tile_codecs import is_rgb
from jaxhisto.slides.tile_sizes import can_be_told, stated_size

Pixels = NDArray[np.uint8]

BIGTIFF_STARTS = (b"II+\0", b"MM\0+")  # in either byte order
TIFF_STARTS = (b"II*\0", b"MM\0*", *BIGTIFF_STARTS)
MOST_SEGMENT = 512 << 20  # bytes of one decoded tile or strip; 13,000 px squared in one strip
CACHE = 256 << 20  # bytes of decoded tiles and strips kept: a row of 2048-px blocks 40,000 px wide
ROUNDED = 2  # px that a level's sides may be off, since writers round as they like
RAW_ROWS = 64  # rows read at a time of an image that lies in the file uncompressed, in one piece
CONVERT = "convert it (`vips tiffsave IN OUT --tile --pyramid`)"
RGB8 = "save it as 8-bit RGB, or leave it out"

NONE, OLD_JPEG, JPEG = 1, 6, 7  # TIFF compressions
APERIO_YCBCR = 33003
RGB, YCBCR = 2, 6  # TIFF photometric interpretations
ALPHA = ((1,), (2,))  # TIFF extra samples that are an alpha channel

# Units of OME's PhysicalSizeX, in um; mu is written as the micro sign or as the Greek letter.
UM = {
    "\u00b5m": 1.0, "\u03bcm": 1.0, "um": 1.0, "nm": 1e-3, "mm": 1e3, "cm": 1e4, "m": 1e6,
    "\u00c5": 1e-4, "in": 25400.0,
}  # fmt: skip
UNITS = {2: "inch", 3: "centimeter"}  # TIFF ResolutionUnit, in OpenSlide's words


class TiffRegionError(Exception):
    """Tiles or strips of a region that cannot be read; says why."""


@dataclass(frozen=True)
class _Level:
    """One image of the pyramid: its page, and the pieces in which it lies in the file, in px."""

    page: Any
    width: int
    height: int
    piece_width: int
    piece_height: int
    planes: int
    raw: bool

    @property
    def pieces(self) -> tuple[int, int]:
        """Across and down."""
        return -(-self.width // self.piece_width), -(-self.height // self.piece_height)


class TiffHandle:
    """An open TIFF; the part of `openslide.OpenSlide` that a slide is read by. For one thread.

    Attributes:
      properties: `ome.PhysicalSizeX` and `Y` in um, and the resolution tags in OpenSlide's words.
      dimensions, level_dimensions: (width, height), px.
      level_downsamples: of the levels, finest first.
      notes: what of the file is not read.

    Raises:
      SlideError: damaged, not 8-bit RGB, packed in a way that is not installed, or in one piece
        too large to decode.
    """

    def __init__(self, path: Path) -> None:
        # tifffile logs what it finds odd; what matters of it is raised here, as one sentence.
        logging.getLogger("tifffile").addHandler(logging.NullHandler())
        self.path = path
        self._cache: OrderedDict[tuple[int, int], Pixels | None] = OrderedDict()
        self._cached = 0
        try:
            self._file = tifffile.TiffFile(path)
        except Exception as error:  # fed with damaged tags, tifffile raises nearly anything
            raise SlideError(_damaged(path, error)) from error
        try:
            self._levels, self.notes = _pyramid(path, self._file)
            self.properties = _properties(self._file, self._levels[0])
        except SlideError:
            self.close()
            raise
        except Exception as error:
            self.close()
            raise SlideError(_damaged(path, error)) from error
        self.level_dimensions = tuple((level.width, level.height) for level in self._levels)
        self.dimensions = self.level_dimensions[0]
        width, height = self.dimensions
        self.level_downsamples = tuple(
            (width / w + height / h) / 2 for w, h in self.level_dimensions
        )

    def __enter__(self) -> TiffHandle:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Closes the file and lets go of what was decoded."""
        self._file.close()
        self._cache.clear()

    def read_region(self, location: tuple[int, int], level: int, size: tuple[int, int]) -> Pixels:
        """As OpenSlide's: (h, w, 4) uint8 RGBA, clear where the file holds no pixels.

        Args:
          location: (x, y) in level-0 pixels.
          level: index into `level_dimensions`.
          size: (w, h) in pixels of the level.

        Raises:
          TiffRegionError: a tile or strip of it is damaged.
        """
        at, downsample = self._levels[level], self.level_downsamples[level]
        left, top = round(location[0] / downsample), round(location[1] / downsample)
        right, bottom = min(left + size[0], at.width), min(top + size[1], at.height)
        x0, y0 = max(left, 0), max(top, 0)
        out = np.zeros((size[1], size[0], 4), np.uint8)
        if x0 >= right or y0 >= bottom:
            return out
        rows = range(y0 // at.piece_height, (bottom - 1) // at.piece_height + 1)
        columns = range(x0 // at.piece_width, (right - 1) // at.piece_width + 1)
        for row, column in itertools.product(rows, columns):
            piece = self._piece(level, row * at.pieces[0] + column)
            if piece is None:
                continue
            y, x = row * at.piece_height, column * at.piece_width
            y1, x1 = max(y, y0), max(x, x0)
            part = piece[y1 - y : bottom - y, x1 - x : right - x]
            to = out[y1 - top : y1 - top + part.shape[0], x1 - left : x1 - left + part.shape[1]]
            to[..., : part.shape[2]] = part
            if part.shape[2] == 3:
                to[..., 3] = 255
        return out

    def _piece(self, level: int, index: int) -> Pixels | None:
        """A decoded tile or strip, (h, w, 3 or 4); None where the file has left it out."""
        key = level, index
        if key in self._cache:
            self._cache.move_to_end(key)
            return self._cache[key]
        at = self._levels[level]
        try:
            piece = self._raw_rows(at, index) if at.raw else self._decoded(at, index)
        except MemoryError:
            raise
        except Exception as error:  # the decoders' own, of many kinds
            raise TiffRegionError(str(error) or type(error).__name__) from error
        self._cache[key] = piece
        self._cached += 0 if piece is None else piece.nbytes
        while self._cached > CACHE and len(self._cache) > 1:
            _, old = self._cache.popitem(last=False)
            self._cached -= 0 if old is None else old.nbytes
        return piece

    def _decoded(self, at: _Level, index: int) -> Pixels | None:
        page, across_down = at.page, at.pieces[0] * at.pieces[1]
        planes = []
        for plane in range(at.planes):
            number = plane * across_down + index
            offset, count = page.dataoffsets[number], page.databytecounts[number]
            if not offset or not count:
                return None
            data = self._bytes(offset, count)
            _refuse_misfit(at, data)
            tables = {"jpegtables": page.jpegtables} if page.compression in (OLD_JPEG, JPEG) else {}
            pixels = page.decode(data, number, **tables)[0]
            if pixels is None:
                return None
            planes.append(pixels[0])
        return np.asarray(np.concatenate(planes, axis=-1) if at.planes > 1 else planes[0], np.uint8)

    def _raw_rows(self, at: _Level, index: int) -> Pixels:
        samples = at.page.samplesperpixel
        first = index * at.piece_height
        rows, row_bytes = min(at.piece_height, at.height - first), at.width * samples
        data = self._bytes(at.page.dataoffsets[0] + first * row_bytes, rows * row_bytes)
        return np.frombuffer(data, np.uint8).reshape(rows, at.width, samples)

    def _bytes(self, offset: int, count: int) -> bytes:
        if offset + count > self._file.filehandle.size:  # to read it makes room for it first
            raise TiffRegionError("the file ends before it")
        self._file.filehandle.seek(offset)
        data: bytes = self._file.filehandle.read(count)
        if len(data) < count:
            raise TiffRegionError("the file ends before it")
        return data


def alike(size: tuple[int, int], level: tuple[int, int]) -> bool:
    """Whether a reduced image, px, has the whole one's shape; else it is a label or cropped."""
    longer, shorter = (0, 1) if size[0] >= size[1] else (1, 0)
    return abs(level[shorter] - size[shorter] * level[longer] / size[longer]) <= ROUNDED


def _refuse_misfit(at: _Level, data: bytes) -> None:
    """TiffRegionError where a tile or strip is cut, or states more pixels than it may have.

    A decoder makes room for what is stated: in damaged data, tens of gigabytes.
    """
    if at.page.compression == JPEG and not jpeg_is_whole(data):
        raise TiffRegionError("a JPEG without its end")
    size = stated_size(at.page.compression, data)
    if size and (size[0] > at.piece_width or size[1] > at.piece_height):
        raise TiffRegionError(f"it states {size[0]} x {size[1]} px")


def _pyramid(path: Path, file: tifffile.TiffFile) -> tuple[list[_Level], tuple[str, ...]]:
    """The levels of the largest image, finest first, and a note where others are left out."""
    if not file.series:
        raise SlideError(_damaged(path, "it holds no image"))

    def area(series: Any) -> int:
        return int(series.keyframe.imagewidth) * int(series.keyframe.imagelength)

    largest = max(file.series, key=area)  # the first, where several are the same
    if found := _not_rgb8(largest):
        raise SlideError(f"{path}: is not 8-bit RGB, it holds {found}; {RGB8}")
    page = largest.pages[0]
    if not file.is_ome and _may_be_ycbcr(file, largest.keyframe):
        raise SlideError(
            f"{path}: is packed as Aperio packs YCbCr (JPEG 2000, 33003) and does not say that it "
            f"is Aperio's, so that its colours are not known; {RGB8}"
        )
    if page is None or page.parent is not file:
        raise SlideError(
            f"{path}: is a part of an OME-TIFF in several files; save it as one file, or leave it "
            "out"
        )
    levels = [_level(path, page.aspage())]
    first = levels[0]
    for further in largest.levels[1:]:
        page = further.pages[0]
        if page is None or page.parent is not file or _not_rgb8(further):
            continue
        level = _level(path, page.aspage())
        if level.width < levels[-1].width and alike(
            (first.width, first.height), (level.width, level.height)
        ):
            levels.append(level)
    others = [s for s in file.series if s is not largest and 4 * area(s) >= area(largest)]
    note = f"holds {len(others)} further images of a like size, which are not cut"
    return levels, (note,) if others else ()


def _may_be_ycbcr(file: tifffile.TiffFile, page: Any) -> bool:
    """Whether the tag is Aperio's for YCbCr, which others use for RGB, and nothing says RGB."""
    if page.compression != APERIO_YCBCR:
        return False
    file.filehandle.seek(page.dataoffsets[0])
    return not is_rgb(file.filehandle.read(min(page.databytecounts[0], 1 << 16)))


def _not_rgb8(series: Any) -> str:
    """What the image is where it is not RGB of 8 bits, for a message; empty where it is."""
    page = series.keyframe
    shape = " x ".join(map(str, series.shape))
    if page.dtype != np.uint8 or page.bitspersample != 8:
        return f"{series.dtype or f'{page.bitspersample}-bit'} pixels ({series.axes} {shape})"
    if series.axes not in ("YXS", "SYX"):
        return f"{series.axes} {shape}, which is not one RGB plane (channels, stack or time?)"
    jpeg = page.photometric == YCBCR and page.compression in (OLD_JPEG, JPEG)
    if page.photometric != RGB and not jpeg:
        return f"{tifffile.enumstr(page.photometric)} pixels ({series.axes} {shape})"
    samples = page.samplesperpixel
    if samples != 3 and (samples, tuple(page.extrasamples)) not in [(4, a) for a in ALPHA]:
        return f"{samples} samples a pixel ({series.axes} {shape})"
    return ""


def _level(path: Path, page: Any) -> _Level:
    """The page as pieces, checked for whether those can be decoded."""
    width, height = int(page.imagewidth), int(page.imagelength)
    planes = int(page.samplesperpixel) if page.planarconfig == 2 else 1
    raw = (
        page.compression == NONE
        and planes == 1
        and page.fillorder == 1
        and page.predictor == 1
        and not page.is_tiled
        and page.is_contiguous
    )
    if page.is_tiled:
        piece = int(page.tilewidth), int(page.tilelength)
    else:
        piece = width, RAW_ROWS if raw else min(int(page.rowsperstrip), height)
    if min(width, height, *piece) < 1:
        raise SlideError(_damaged(path, "an image without pixels"))
    level = _Level(page, width, height, *piece, planes, bool(raw))
    kind = tifffile.enumstr(page.compression)
    if page.compression != NONE:
        try:
            tifffile.TIFF.DECOMPRESSORS[page.compression]
        except KeyError as error:
            raise SlideError(
                f"{path}: is packed with {kind}, which needs imagecodecs; install it with "
                "`pip install imagecodecs`"
            ) from error
    if not can_be_told(page.compression):
        raise SlideError(
            f"{path}: is packed with {kind}, in which a damaged tile could ask for any amount of "
            f"memory; {CONVERT}"
        )
    pieces = level.pieces[0] * level.pieces[1] * planes
    if min(len(page.dataoffsets), len(page.databytecounts)) < (1 if raw else pieces):
        raise SlideError(_damaged(path, f"{pieces} tiles or strips, and fewer places of them"))
    size = math.prod(piece) * int(page.samplesperpixel)
    if size > MOST_SEGMENT:
        raise SlideError(too_large(path, (width, height), kind, size))
    return level


def too_large(path: Path, size: tuple[int, int], kind: str, piece: int) -> str:
    """The sentence on pieces of so many bytes."""
    return (
        f"{path}: {size[0]} x {size[1]} px packed ({kind}) in pieces of {piece / 2**30:.1f} GiB, "
        f"too large to decode for a tile; {CONVERT}"
    )


def _properties(file: tifffile.TiffFile, level: _Level) -> dict[str, str]:
    """What the file says of its pixel size, under the names that the ladder looks for."""
    found = _ome_sizes(file.ome_metadata, level) if file.is_ome else {}
    tags = level.page.tags
    unit = UNITS.get(int(tags.valueof("ResolutionUnit", 2)), "")
    for name in ("XResolution", "YResolution"):
        value = tags.valueof(name)
        if unit and value is not None and len(value) == 2 and value[1]:
            found[f"tiff.{name}"] = repr(value[0] / value[1])
            found["tiff.ResolutionUnit"] = unit
    return found


def _ome_sizes(xml: str | None, level: _Level) -> dict[str, str]:
    """PhysicalSizeX and Y in um, of the first image in the OME-XML that has the level's size."""
    try:
        root = ElementTree.fromstring(xml or "")
    except ElementTree.ParseError:
        return {}
    size = str(level.width), str(level.height)
    for pixels in (e for e in root.iter() if e.tag.rpartition("}")[2] == "Pixels"):
        if (pixels.get("SizeX"), pixels.get("SizeY")) != size:
            continue
        found = {}
        for axis in "XY":
            name = f"PhysicalSize{axis}"
            factor = UM.get(pixels.get(f"{name}Unit", "um"))
            try:
                value = float(pixels.get(name, ""))
            except ValueError:
                continue
            if factor is not None:  # `pixel` and `reference frame` are no lengths
                found[f"ome.{name}"] = repr(value * factor)
        return found
    return {}


def _damaged(path: Path, error: object) -> str:
    return (
        f"{path}: neither OpenSlide nor tifffile reads it ({error}); the file is damaged or cut "
        "off: copy it again, or leave it out"
    )
