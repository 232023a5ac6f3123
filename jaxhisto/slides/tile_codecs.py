"""Decoders of the tiles that lie in a slide: JPEG by simplejpeg, JPEG 2000 by imagecodecs.

simplejpeg is taken since it alone says so where libjpeg warns: OpenCV and Pillow paint on over
damaged data, some of which OpenSlide refuses. imagecodecs' OpenJPEG takes two thirds of the time
of OpenSlide's and a half of Pillow's. A codec whose package is missing cannot be made.
"""

from __future__ import annotations

import struct
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

try:
    import simplejpeg
except ImportError:
    simplejpeg = None
try:
    import imagecodecs
except ImportError:
    imagecodecs = None  # type: ignore[assignment]

Pixels = NDArray[np.uint8]

SOI, APP0 = b"\xff\xd8", b"\xff\xe0"
# Who finds neither guesses the colours from the components' numbers.
JFIF = APP0 + struct.pack(">H5sHBHHBB", 16, b"JFIF", 0x0101, 0, 1, 1, 0, 0)  # says YCbCr
ADOBE_RGB = b"\xff\xee" + struct.pack(">H5sHHHB", 14, b"Adobe", 100, 0, 0, 0)

SOC, SIZ, COM, SOT = b"\xff\x4f", b"\xff\x51", b"\xff\x64", b"\xff\x90"


class Codec(Protocol):
    """Decodes the tiles of one level.

    Attributes:
      kind: the same for levels that are decoded in the same way.
    """

    kind: str

    def decode(self, data: bytes) -> Pixels:
        """(h, w, 3) RGB of the bytes of one tile; ValueError where they are damaged in any way."""

    def whole(self, data: bytes) -> bytes:
        """One tile as a JPEG file of its own; ValueError where there is none."""


class Jpeg:
    """JPEG tiles.

    Args:
      rgb: they hold RGB, not YCbCr.
      tables: what they share, between the start and the end of a JPEG.

    Raises:
      ValueError: simplejpeg is not installed.
    """

    def __init__(self, rgb: bool, tables: bytes) -> None:
        if simplejpeg is None:
            raise ValueError("simplejpeg is not installed")
        self.kind = f"{'RGB' if rgb else 'YCbCr'} in JPEG"
        self._rgb, self._tables = rgb, tables

    def decode(self, data: bytes) -> Pixels:
        """(h, w, 3) RGB; ValueError where libjpeg has as much as a warning."""
        pixels: Pixels = simplejpeg.decode_jpeg(self.whole(data), "RGB", strict=True)
        return pixels

    def whole(self, data: bytes) -> bytes:
        """A tile as a file of its own: start, kind of colours, tables, what the slide holds."""
        if not data.startswith(SOI):
            raise ValueError("not a JPEG")
        if not data.startswith(APP0, 2):
            return b"".join((SOI, ADOBE_RGB if self._rgb else JFIF, self._tables, data[2:]))
        if self._rgb:  # a JFIF header makes YCbCr of it
            raise ValueError("RGB with a JFIF header")
        end = 4 + int.from_bytes(data[4:6], "big")
        return b"".join((data[:end], self._tables, data[end:]))


class Jpeg2000:
    """JPEG 2000 tiles of 8-bit RGB, all coded alike.

    Args:
      first: the bytes of one of them, whose header the others must have.
      width, height: of a tile, px.

    Raises:
      ValueError: `first` is no such tile, or imagecodecs is not installed.
    """

    kind = "RGB in JPEG 2000"

    def __init__(self, first: bytes, width: int, height: int) -> None:
        if imagecodecs is None:
            raise ValueError("imagecodecs is not installed")
        self._header = _coding(first)
        # Image and only tile from (0, 0), 3 components of 8 bits, none subsampled. A decoder
        # allocates what these numbers ask for, which in a damaged tile is any number.
        size = (
            struct.pack(">8IH", width, height, 0, 0, width, height, 0, 0, 3) + b"\x07\x01\x01" * 3
        )
        if self._header[:2] != SIZ or self._header[6 : 6 + len(size)] != size:
            raise ValueError("not 8-bit RGB of the tile's size")

    def decode(self, data: bytes) -> Pixels:
        """(h, w, 3) RGB; ValueError where OpenJPEG gives up or the header is another."""
        if _coding(data) != self._header:
            raise ValueError("coded otherwise than the level's first tile")
        try:
            pixels: Pixels = imagecodecs.jpeg2k_decode(data, numthreads=1)
        except imagecodecs.Jpeg2kError as error:
            raise ValueError(str(error)) from error
        return pixels

    def whole(self, data: bytes) -> bytes:
        """No tile is a JPEG."""
        raise ValueError("JPEG 2000, not JPEG")


def _coding(data: bytes) -> bytes:
    """The main header of a JPEG 2000 codestream without its comments (ISO 15444-1, A.4)."""
    if not data.startswith(SOC):
        raise ValueError("not a JPEG 2000 codestream")
    kept, at = [], 2
    while (marker := data[at : at + 2]) != SOT:
        length = int.from_bytes(data[at + 2 : at + 4], "big")
        if len(marker) < 2 or length < 2:
            raise ValueError("a JPEG 2000 header without end")
        if marker != COM:
            kept.append(data[at : at + 2 + length])
        at += 2 + length
    return b"".join(kept)
