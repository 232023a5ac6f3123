"""3DHISTECH MIRAX, as far as OpenSlide looks at it: no scanner wrote these.

An index file beside a folder: `Slidedat.ini`, `Index.dat` that says where each camera image lies,
and `Data0000.dat` with them, here as PNG. Images that were not taken are not listed.
"""

from __future__ import annotations

import struct
from collections.abc import Collection
from pathlib import Path

import numpy as np
from made_images import encoded

SIDE, VERSION, NAME = 128, b"01.02", b"made"


def write_mirax(
    path: Path,
    image: np.ndarray,
    mpp: float,
    at: tuple[int, int],
    across_down: tuple[int, int],
    left_out: Collection[tuple[int, int]] = (),
) -> Path:
    """Two levels; a camera image is 128 px squared and does not overlap the next.

    Args:
      image: sides are multiples of 256 px.
      at: (column, row) of its first camera image, even numbers.
      across_down: camera images of the whole slide.
      left_out: (column, row) of the second level's images that are not there, nor the four of the
        first level that each was made of.
    """
    folder = path.with_suffix("")
    folder.mkdir(parents=True)
    path.write_bytes(b"\xff\xd8\xff\xe0")  # a picture of the slide, of which nobody reads more
    data, pages = bytearray(), []
    for step in (1, 2):
        entries = b""
        page = image[::step, ::step]
        for y in range(0, page.shape[0], SIDE):
            for x in range(0, page.shape[1], SIDE):
                column, row = at[0] + x // SIDE * step, at[1] + y // SIDE * step
                if (column // 2, row // 2) in left_out:
                    continue
                png = encoded(np.ascontiguousarray(page[y : y + SIDE, x : x + SIDE]))
                number = row * across_down[0] + column
                entries += struct.pack("<4i", number, len(data), len(png), 0)
                data += png
        pages.append(entries)
    (folder / "Data0000.dat").write_bytes(data)
    (folder / "Index.dat").write_bytes(_index(pages))
    levels = "".join(
        f"[LEVEL_{i}]\nOVERLAP_X=0\nOVERLAP_Y=0\nMICROMETER_PER_PIXEL_X={mpp * 2**i}\n"
        f"MICROMETER_PER_PIXEL_Y={mpp * 2**i}\nIMAGE_FILL_COLOR_BGR=16777215\nIMAGE_FORMAT=PNG\n"
        f"DIGITIZER_WIDTH={SIDE}\nDIGITIZER_HEIGHT={SIDE}\nIMAGE_CONCAT_FACTOR={i}\n"
        for i in range(2)
    )
    (folder / "Slidedat.ini").write_text(
        f"[GENERAL]\nSLIDE_VERSION=01.02\nSLIDE_ID={NAME.decode()}\n"
        f"IMAGENUMBER_X={across_down[0]}\nIMAGENUMBER_Y={across_down[1]}\n"
        "OBJECTIVE_MAGNIFICATION=20\nCameraImageDivisionsPerSide=1\n"
        "[HIERARCHICAL]\nHIER_COUNT=1\nHIER_0_NAME=Slide zoom level\nHIER_0_COUNT=2\n"
        "HIER_0_VAL_0=ZoomLevel_0\nHIER_0_VAL_0_SECTION=LEVEL_0\nHIER_0_VAL_1=ZoomLevel_1\n"
        "HIER_0_VAL_1_SECTION=LEVEL_1\nNONHIER_COUNT=0\nINDEXFILE=Index.dat\n"
        f"[DATAFILE]\nFILE_COUNT=1\nFILE_0=Data0000.dat\n{levels}"
    )
    return path


def _index(pages: list[bytes]) -> bytes:
    """Behind version and name the root, then a list a level, then the lists' only pages."""
    root = len(VERSION + NAME)
    lists = root + 8
    heads = lists + 4 * len(pages)
    out = VERSION + NAME + struct.pack("<2i", lists, 0)
    out += b"".join(struct.pack("<i", heads + 8 * i) for i in range(len(pages)))
    at = heads + 8 * len(pages)
    bodies = b""
    for entries in pages:
        out += struct.pack("<2i", 0, at + len(bodies))
        bodies += struct.pack("<2i", len(entries) // 16, 0) + entries
    return out + bodies
