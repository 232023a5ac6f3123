"""TIFFs that OpenSlide would read, but as other pixels than they are meant to be, or for hours."""

from __future__ import annotations

import logging
import math
from pathlib import Path
from typing import Any

import tifffile

from jaxhisto.errors import SlideError
from jaxhisto.slides.tiff_reader import MOST_SEGMENT, RGB, RGB8, YCBCR, too_large

VENDORS = ("generic-tiff", "aperio")  # whose first page is the finest level
TIFF_MOST = 1 << 32  # bytes of a tile that a TIFF which is no BigTIFF can state
PALETTE, PHOTOMETRIC = 3, 262  # a photometric interpretation, and their tag


def refuse_endless(path: Path) -> None:
    """SlideError where a BigTIFF states a tile of more bytes than it has, beyond what a TIFF can.

    OpenSlide asks for that memory, and ends the process where there is none.
    """
    logging.getLogger("tifffile").addHandler(logging.NullHandler())
    try:
        with tifffile.TiffFile(path) as file:
            pages: Any = file.pages
            counts = [max(page.databytecounts, default=0) for page in pages if page.is_tiled]
            size = int(file.filehandle.size)
    except Exception:  # fed with damaged tags, tifffile raises nearly anything
        return
    if (most := max(counts, default=0)) > max(size, TIFF_MOST):
        raise SlideError(
            f"{path}: states a tile of {most:,} bytes and has {size:,}; the file is damaged: copy "
            "it again, or leave it out"
        )


def refuse_unfit(path: Path) -> None:
    """SlideError where the first page is not RGB (grey, CMYK, Lab), has more than 8 bits, is larger
    than its tiles, or has tiles that no memory would hold.

    No word on what else it is: a file that tifffile cannot read is passed, OpenSlide could.
    """
    logging.getLogger("tifffile").addHandler(logging.NullHandler())
    try:
        with tifffile.TiffFile(path) as file:
            page: Any = file.pages.first
            bits, kind, there = page.bitspersample, page.photometric, len(page.dataoffsets)
            told = PHOTOMETRIC in page.tags or page.samplesperpixel < 3
            size = int(page.imagewidth), int(page.imagelength)
            piece = page.tile[::-1] if page.tile else size
            across, down = (-(-a // b) for a, b in zip(size, piece, strict=True))
    except Exception:  # fed with damaged tags, tifffile raises nearly anything
        return
    if bits > 8 or (told and kind not in (RGB, PALETTE, YCBCR)):
        # Of a number that has no name, tifffile.enumstr makes an error.
        found = f"{bits}-bit {getattr(kind, 'name', f'photometric {kind}')} pixels"
        raise SlideError(f"{path}: is not 8-bit RGB, it holds {found}; {RGB8}")
    if (whole := 4 * math.prod(piece)) > MOST_SEGMENT:
        packing = getattr(page.compression, "name", f"compression {page.compression}")
        raise SlideError(too_large(path, size, packing, whole))
    if across * down > there:  # each would be tried, and found missing, for hours
        raise SlideError(
            f"{path}: states {size[0]} x {size[1]} px, which is {across * down} tiles, and names "
            f"{there}; the file is damaged or cut off: copy it again, or leave it out"
        )
