"""Hamamatsu NDPI, as far as OpenSlide looks at it: no scanner wrote these.

A level is one JPEG with restart markers, whose places a tag lists; the directories' offsets have 64
bits in a file that says it is plain TIFF, which tifffile does not write.
"""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
from made_images import encoded

SHORT, LONG, RATIONAL, SIGNED, FLOAT, TEXT = 3, 4, 5, 9, 11, 2
Tag = tuple[int, int, bytes]  # type, count, value


def level_jpeg(image: np.ndarray) -> bytes:
    """What a level's pixels are packed as: restart markers after every 64 px."""
    how = {"quality": 95, "subsampling": 0, "restart_marker_blocks": 8}
    return encoded(np.ascontiguousarray(image), "JPEG", **how)


def write_ndpi(path: Path, image: np.ndarray, mpp: float) -> Path:
    """Two levels, the second of every fourth pixel; sides are multiples of 256."""
    out = bytearray(b"II*\0" + bytes(8))
    link = 4  # where the offset of the next directory stands

    def put(data: bytes) -> bytes:
        """Where it then lies."""
        out.extend(bytes(-len(out) % 8))
        place = struct.pack("<I", len(out))
        out.extend(data)
        return place

    for step in (1, 4):
        page = image[::step, ::step]
        jpeg = level_jpeg(page)
        starts = _restarts(jpeg)
        per_cm = put(struct.pack("<II", round(1e6 / mpp / step), 100))
        tags: dict[int, Tag] = {
            256: _long(page.shape[1]),
            257: _long(page.shape[0]),
            258: (SHORT, 3, put(struct.pack("<HHH", 8, 8, 8))),
            259: (SHORT, 1, struct.pack("<H", 7)),
            262: (SHORT, 1, struct.pack("<H", 6)),
            271: (TEXT, 10, put(b"Hamamatsu\0")),
            272: (TEXT, 11, put(b"NanoZoomer\0")),
            273: (LONG, 1, put(jpeg)),
            277: (SHORT, 1, struct.pack("<H", 3)),
            278: _long(page.shape[0]),
            279: _long(len(jpeg)),
            282: (RATIONAL, 1, per_cm),
            283: (RATIONAL, 1, per_cm),
            296: (SHORT, 1, struct.pack("<H", 3)),
            65420: _long(1),  # it is NDPI
            65421: (FLOAT, 1, struct.pack("<f", 20 / step)),  # magnification; below 0: the macro
            65422: (SIGNED, 1, bytes(4)),
            65423: (SIGNED, 1, bytes(4)),
            65424: (SIGNED, 1, bytes(4)),  # focal plane
            65426: (LONG, len(starts), put(struct.pack(f"<{len(starts)}I", *starts))),
        }
        rows = b"".join(
            struct.pack("<HHI", tag, kind, count) + value.ljust(4, b"\0")
            for tag, (kind, count, value) in sorted(tags.items())
        )
        (place,) = struct.unpack("<I", put(struct.pack("<H", len(tags)) + rows))
        struct.pack_into("<Q", out, link, place)
        link = len(out)
        out.extend(bytes(8 + 4 * len(tags)))  # the next one, and the values' upper halves
    path.write_bytes(out)
    return path


def _long(value: int) -> Tag:
    return LONG, 1, struct.pack("<I", value)


def _restarts(jpeg: bytes) -> list[int]:
    """Where each piece of the scan begins, behind its marker."""
    scan = jpeg.index(b"\xff\xda")
    starts = [scan + 2 + int.from_bytes(jpeg[scan + 2 : scan + 4], "big")]
    for at in range(starts[0], len(jpeg) - 1):
        if jpeg[at] == 0xFF and 0xD0 <= jpeg[at + 1] <= 0xD7:
            starts.append(at + 2)
    return starts
