"""Opens a file as a slide, by OpenSlide or by tifffile, or says why it is none."""

from __future__ import annotations

import os
from pathlib import Path

import openslide

from jaxhisto.errors import SlideError
from jaxhisto.slides.dicom import MAGIC, PREAMBLE, dicom_header
from jaxhisto.slides.tiff_reader import (
    BIGTIFF_STARTS,
    MOST_SEGMENT,
    TIFF_STARTS,
    TiffHandle,
    too_large,
)
from jaxhisto.slides.unfit import VENDORS, refuse_endless, refuse_unfit
from jaxhisto.special_files import no_pipe, special_kind

OME = "<OME "  # in the description of an OME-TIFF
DICOM_HEAD = PREAMBLE + len(MAGIC)
OTHER_DICOM = (" != ", "Couldn't read PlanarConfiguration")  # in OpenSlide's error: grey, a stack
UNPACKED = "Unsupported TIFF compression"  # in OpenSlide's error; tifffile knows more of them


def dicom_series(path: Path) -> tuple[str, bool]:
    """The series a DICOM file belongs to, "" where there is none, and whether it can be opened.

    The files of a series that can are one slide to OpenSlide, which leaves out the others.
    """
    try:
        with open_handle(path) as handle:
            return str(handle.properties.get("dicom.SeriesInstanceUID", "")), True
    except SlideError:
        header = dicom_header(path)
        return header.series if header else "", False


def open_handle(path: Path) -> openslide.OpenSlide | TiffHandle:
    """OpenSlide's handle, or tifffile's in its place.

    Raises:
      SlideError: not a slide, damaged, or not 8-bit RGB.
    """
    try:
        if no_pipe(path).stat().st_size == 0:
            raise SlideError(f"{path}: is empty (0 bytes); copy it again, or remove it")
        with path.open("rb") as file:  # OpenSlide does not tell a file that it may not read
            head = file.read(DICOM_HEAD)
        start = head[:4]
        if start in BIGTIFF_STARTS:
            refuse_endless(path)
        if head.endswith(MAGIC):
            _refuse_pipe_beside(path)
        handle = openslide.OpenSlide(path)
    except openslide.OpenSlideUnsupportedFormatError as error:
        if start in TIFF_STARTS:
            return TiffHandle(path)
        _refuse_lone_index(path)
        _refuse_dicom(path)
        raise SlideError(
            f"{path}: OpenSlide does not read this file; convert it to a tiled TIFF "
            "(`vips tiffsave IN OUT --tile --pyramid`), or leave it out"
        ) from error
    except openslide.OpenSlideError as error:
        if UNPACKED in str(error) and start in TIFF_STARTS:
            return TiffHandle(path)
        _refuse_lone_index(path)
        _refuse_dicom(path, str(error))
        raise SlideError(
            f"{path}: OpenSlide cannot open it ({error}); the file is damaged or cut off: copy it "
            "again, or leave it out"
        ) from error
    except OSError as error:
        raise SlideError(f"{path}: cannot be read ({error.strerror}); check the path") from error
    if OME in handle.properties.get("openslide.comment", ""):
        handle.close()  # to OpenSlide a plain TIFF: without its pyramid, pixel size and channels
        return TiffHandle(path)
    try:
        if handle.properties.get("openslide.vendor") in VENDORS:
            refuse_unfit(path)  # OpenSlide would make 8-bit RGB of grey and deep pixels, unasked
        _refuse_large_tiles(path, handle)
    except SlideError:
        handle.close()
        raise
    return handle


def _refuse_large_tiles(path: Path, handle: openslide.OpenSlide) -> None:
    """SlideError where one tile, of which OpenSlide decodes no part, would take gigabytes."""
    told = handle.properties
    for level, size in enumerate(handle.level_dimensions):
        named = f"openslide.level[{level}].tile-"
        tile = 4 * int(told.get(named + "width", 0)) * int(told.get(named + "height", 0))
        if tile > MOST_SEGMENT:
            raise SlideError(too_large(path, size, told.get("openslide.vendor", ""), tile))


def _refuse_lone_index(path: Path) -> None:
    """SlideError for a MIRAX index without the folder that holds its pixels."""
    folder = path.with_suffix("")
    if path.suffix.lower() == ".mrxs" and not folder.is_dir():
        raise SlideError(
            f"{path}: its folder {folder.name}, which holds the pixels, is missing beside it; copy "
            "that too, or leave the slide out"
        )


def _refuse_pipe_beside(path: Path) -> None:
    """SlideError where OpenSlide would wait for ever: it opens all files in a DICOM's folder."""
    with os.scandir(path.parent) as entries:
        for entry in entries:
            if not entry.is_dir() and (kind := special_kind(entry.path)):
                raise SlideError(
                    f"{path}: beside it lies {entry.name}, {kind}, on which OpenSlide would wait "
                    "for ever (it opens all files in the folder of a DICOM slide); take that away"
                )


def _refuse_dicom(path: Path, said: str = "") -> None:
    """SlideError for DICOM that is no slide, or a kind of slide that OpenSlide does not read.

    Args:
      said: OpenSlide's error, where it took the file for a slide.
    """
    if (header := dicom_header(path)) is None:
        return
    why = header.refusal()
    if not why and "No pyramid levels" in said:
        why = (
            "is the label, overview or thumbnail of a DICOM series, of whose levels no file is in "
            "this folder; copy those too, or leave it out"
        )
    elif not why and "unexpected image" in said:
        why = (
            f"its series holds two images of one size ({said}), such as two focal planes; put each "
            "into a folder of its own"
        )
    elif not why and any(text in said for text in OTHER_DICOM):
        why = (
            "is a DICOM slide, of which OpenSlide reads those of 8-bit RGB and one focal plane "
            f"alone ({said}); write it anew so, or leave it out"
        )
    if why:
        raise SlideError(f"{path}: {why}")
