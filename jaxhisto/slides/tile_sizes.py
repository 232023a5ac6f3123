"""Width and height that a packed tile states of itself, told without decoding it.

A decoder makes room for what a tile states, which in damaged data is any number: 30 MB of a file
would take 12 GB of memory, and the machine. A packing whose tiles state a size that cannot be told
here is not decoded.
"""

from __future__ import annotations

import struct
from collections.abc import Callable

import tifffile

from jaxhisto.slides.tile_codecs import jpeg2000_size, jpeg_header

Size = tuple[int, int]

# TIFF compressions, by how their tiles start. Those that are no image codecs are bytes without a
# size of their own, of which tifffile takes as many as the TIFF's tile has.
JPEG = (6, 7, 33007)
JPEG2000 = (33003, 33004, 33005, 34712)
PNG = (34933,)
WEBP = (34927, 50001)
JPEG_XR = (22610, 34934)
JPEG_XL = (50002, 52546)
LERC = 34887  # to tifffile no image codec, and one that goes by its own header

WMPHOTO = b"WMPHOTO\0"
JXL_STREAM, JXL_BOX = b"\xff\x0a", b"\0\0\0\x0cJXL \r\n\x87\n"
RATIOS = {1: (1, 1), 2: (12, 10), 3: (4, 3), 4: (3, 2), 5: (16, 9), 6: (5, 4), 7: (2, 1)}
LENGTHS = (9, 13, 18, 30)  # bits of a side of a JPEG XL image


def can_be_told(compression: int) -> bool:
    """Whether tiles of a TIFF compression state no size of their own, or one that is told here."""
    images = {LERC, *tifffile.TIFF.IMAGE_COMPRESSIONS}
    return compression in READERS or compression not in images


def stated_size(compression: int, data: bytes) -> Size | None:
    """(width, height) in px that a tile of a TIFF states; None: tiles of its packing state none.

    Raises:
      ValueError: it is damaged before its size.
    """
    if compression not in READERS:
        return None
    try:
        size = READERS[compression](data)
    except (struct.error, IndexError):
        size = None
    if size is None:
        raise ValueError("it states no size")
    return size


def jpeg_size(data: bytes) -> Size:
    """Of the frame."""
    header = jpeg_header(data)
    return header.width, header.height


def png_size(data: bytes) -> Size | None:
    """Of the IHDR chunk, which comes first (PNG, 11.2.2)."""
    if data[:8] != b"\x89PNG\r\n\x1a\n" or data[12:16] != b"IHDR":
        return None
    width, height = struct.unpack_from(">II", data, 16)
    return width, height


def webp_size(data: bytes) -> Size | None:
    """Of the first chunk: lossy (RFC 6386, 9.1), lossless, or extended (RFC 9649, 2.7)."""
    if data[:4] != b"RIFF" or data[8:12] != b"WEBP":
        return None
    kind, body = data[12:16], data[20:30]
    if kind == b"VP8 " and body[3:6] == b"\x9d\x01\x2a":
        width, height = struct.unpack_from("<HH", body, 6)
        return width & 0x3FFF, height & 0x3FFF
    if kind == b"VP8L" and body[:1] == b"\x2f":
        bits = int.from_bytes(body[1:5], "little")
        return (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
    if kind == b"VP8X" and len(body) == 10:
        return int.from_bytes(body[4:7], "little") + 1, int.from_bytes(body[7:10], "little") + 1
    return None


def jpeg_xr_size(data: bytes) -> Size | None:
    """Of the codestream (ITU-T T.832, 8.3), which the decoder goes by, not of the file around."""
    at = data.find(WMPHOTO)
    if at < 0:
        return None
    short = data[at + 10] & 0x80
    width, height = struct.unpack_from(">HH" if short else ">II", data, at + 12)
    return width + 1, height + 1


def jpeg_xl_size(data: bytes) -> Size | None:
    """Of the codestream's SizeHeader (ISO/IEC 18181-1, D.2), alone or in boxes."""
    stream = _jxl_stream(data) if data.startswith(JXL_BOX) else data
    if not stream.startswith(JXL_STREAM):
        return None
    bits, at = int.from_bytes(stream[2:16], "little"), 0

    def take(count: int) -> int:
        nonlocal at
        at += count
        return bits >> (at - count) & ((1 << count) - 1)

    def side(small: int) -> int:
        return 8 * (take(5) + 1) if small else take(LENGTHS[take(2)]) + 1

    small = take(1)
    height = side(small)
    ratio = take(3)
    if not ratio:
        return side(small), height
    by, of = RATIOS[ratio]
    return height * by // of, height


def _jxl_stream(data: bytes) -> bytes:
    """The first bytes of the codestream in a JPEG XL file (ISO/IEC 18181-2)."""
    at = 0
    while at + 8 <= len(data):
        length, kind = struct.unpack_from(">I4s", data, at)
        head = 8
        if length == 1:
            (length,) = struct.unpack_from(">Q", data, at + 8)
            head = 16
        if kind in (b"jxlc", b"jxlp"):
            return data[at + head + (4 if kind == b"jxlp" else 0) :][:64]
        if length < head:  # up to the end, or damaged
            break
        at += length
    return b""


READERS: dict[int, Callable[[bytes], Size | None]] = {
    compression: told
    for kinds, told in (
        (JPEG, jpeg_size),
        (JPEG2000, jpeg2000_size),
        (PNG, png_size),
        (WEBP, webp_size),
        (JPEG_XR, jpeg_xr_size),
        (JPEG_XL, jpeg_xl_size),
    )
    for compression in kinds
}
