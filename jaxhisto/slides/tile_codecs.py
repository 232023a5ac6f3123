"""Decoders of the tiles that lie in a slide: JPEG by simplejpeg, JPEG 2000 by imagecodecs.

simplejpeg is taken since it alone says so where libjpeg warns: OpenCV and Pillow paint on over
damaged data, some of which OpenSlide refuses. imagecodecs' OpenJPEG takes two thirds of the time
of OpenSlide's and a half of Pillow's. A codec whose package is missing cannot be made.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
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

SOS = 0xDA
FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}  # SOF0 to SOF15 but DHT, JPG, DAC

MOST_COMPONENTS, MOST_TILES = 4, 4096  # of a JPEG 2000 image; OpenJPEG takes 10 KB a tile
SOC, SIZ, COM, SOT = b"\xff\x4f", b"\xff\x51", b"\xff\x64", b"\xff\x90"
COD = b"\xff\x52\x00"  # and the first byte of its length


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


@dataclass(frozen=True)
class JpegHeader:
    """What a JPEG says before its first scan.

    Fields:
      bits, height, width, components: of its frame; components of `bits` bits.
      jfif: it has a JFIF header, which says YCbCr.
      adobe: the transform of its Adobe header, 0 for RGB; None without one.
      size: bytes up to the first scan's marker, that included.
    """

    bits: int
    height: int
    width: int
    components: int
    jfif: bool
    adobe: int | None
    size: int


class Jpeg:
    """JPEG tiles.

    Args:
      rgb: they hold RGB, not YCbCr.
      tables: what they share, between the start and the end of a JPEG.
      width, height: of a tile, px.

    Raises:
      ValueError: simplejpeg is not installed.
    """

    def __init__(self, rgb: bool, tables: bytes, width: int, height: int) -> None:
        if simplejpeg is None:
            raise ValueError("simplejpeg is not installed")
        self.kind = f"{'RGB' if rgb else 'YCbCr'} in JPEG"
        self._rgb, self._tables = rgb, tables
        self._frame = (8, height, width, 3)
        self._passed = b""  # the header of the last tile that was taken: most tiles have the same

    def decode(self, data: bytes) -> Pixels:
        """(h, w, 3) RGB; ValueError where libjpeg has as much as a warning."""
        pixels: Pixels = simplejpeg.decode_jpeg(self.whole(data), "RGB", strict=True)
        return pixels

    def whole(self, data: bytes) -> bytes:
        """A tile as a file of its own: start, kind of colours, tables, what the slide holds.

        ValueError where it is no tile of this level: OpenSlide refuses other components, and
        takes the colours to be what the TIFF says, where libjpeg goes by the tile's own headers.
        """
        if not self._passed or not data.startswith(self._passed):
            self._check(data)
        if self._rgb or not _is_jfif(data, 2):
            return b"".join((SOI, ADOBE_RGB if self._rgb else JFIF, self._tables, data[2:]))
        end = 4 + int.from_bytes(data[4:6], "big")
        return b"".join((data[:end], self._tables, data[end:]))

    def _check(self, data: bytes) -> None:
        header = jpeg_header(data)
        # A decoder makes room for what the frame states, which in a damaged tile is any number.
        if (header.bits, header.height, header.width, header.components) != self._frame:
            raise ValueError("not three components of the tile's size")
        if self._rgb and (header.jfif or header.adobe):
            raise ValueError("RGB with a header that makes YCbCr of it")
        self._passed = data[: header.size]


def jpeg_header(data: bytes) -> JpegHeader:
    """What a JPEG states before its first scan (ITU-T T.81, B.2); ValueError: it is none."""
    if not data.startswith(SOI):
        raise ValueError("not a JPEG")
    frame: tuple[int, ...] = ()
    jfif, adobe, at = False, None, 2
    while True:
        while data[at : at + 2] == b"\xff\xff":  # a marker may be filled up
            at += 1
        length = int.from_bytes(data[at + 2 : at + 4], "big")
        if data[at : at + 1] != b"\xff" or length < 2 or at + 2 + length > len(data):
            raise ValueError("a JPEG header without end")
        marker, body = data[at + 1], at + 4
        if marker == SOS:
            break
        if marker in FRAMES:
            if frame or length < 8:
                raise ValueError("a JPEG with a damaged frame")
            frame = struct.unpack_from(">BHHB", data, body)
        jfif |= _is_jfif(data, at)
        if marker == 0xEE and length >= 14 and data.startswith(b"Adobe", body):
            adobe = data[body + 11]
        at += 2 + length
    if not frame:
        raise ValueError("a JPEG without a frame")
    bits, height, width, components = frame
    return JpegHeader(bits, height, width, components, jfif, adobe, at + 2)


def _is_jfif(data: bytes, at: int) -> bool:
    """Whether a JFIF header, which libjpeg goes by, is there."""
    long_enough = int.from_bytes(data[at + 2 : at + 4], "big") >= 16
    return long_enough and data.startswith(APP0, at) and data.startswith(b"JFIF\0", at + 4)


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


def jpeg2000_size(data: bytes) -> tuple[int, int] | None:
    """Width and height that a JPEG 2000 codestream, in a JP2 file or alone, states.

    None where it states none, more components than an image's, or more tiles within it than
    anyone writes: a decoder makes room for these too.
    """
    at = data.find(SOC + SIZ)
    if at < 0 or len(data) < at + 42:
        return None
    right, bottom, left, top, across, down, _, _, components = struct.unpack_from(
        ">8IH", data, at + 8
    )
    if min(across, down) < 1 or components > MOST_COMPONENTS:
        return None
    if -(-right // across) * -(-bottom // down) > MOST_TILES:
        return None
    return right - left, bottom - top


def is_rgb(data: bytes) -> bool:
    """Whether a JPEG 2000 codestream has its components transformed, which is done to RGB alone."""
    at = data.find(COD, max(0, data.find(SOC + SIZ)))
    return at >= 0 and data[at + 8 : at + 9] == b"\x01"


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
