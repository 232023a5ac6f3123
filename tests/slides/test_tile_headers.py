"""Tiles whose own headers say otherwise than the slide: OpenSlide decides, and no room is made."""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path

import imagecodecs
import numpy as np
import openslide
import pytest
import tifffile
from test_own_tiles import detailed, place, theirs, write_jpeg_slide

from jaxhisto.slides import own_tiles, tile_codecs
from jaxhisto.slides.pixel_size import GivenPixelSize
from jaxhisto.slides.reader import RegionError, Slide

SIDE, DAMAGED = 128, 4
SOF0, SIZ = b"\xff\xc0", b"\xff\x51"
JFIF = b"\xff\xe0\x00\x10JFIF\0\1\1\0\0\1\0\1\0\0"
JFXX = b"\xff\xe0\x00\x08JFXX\0\x10"
COMMENT = b"\xff\xfe\x00\x04ab"


def adobe(transform: int) -> bytes:
    return b"\xff\xee\x00\x0eAdobe\0\x64\0\0\0\0" + bytes([transform])


def bare(jpeg: bytes) -> bytes:
    """A JPEG without APPn headers, from its tables on."""
    at = 2
    while 0xE0 <= jpeg[at + 1] <= 0xEF:
        at += 2 + int.from_bytes(jpeg[at + 2 : at + 4], "big")
    return jpeg[at:]


def write_tiles(path: Path, rgb: bool, headers: list[bytes], grey: int = -1) -> Path:
    """A row of JPEG tiles, each with other headers; of one component where it is `grey`."""
    image = detailed(SIDE * len(headers), SIDE)

    def coded():
        for i, header in enumerate(headers):
            tile = np.ascontiguousarray(image[:, i * SIDE : (i + 1) * SIDE])
            kind = "RGB" if rgb else "YCbCr"
            colours = {"colorspace": "RGB", "outcolorspace": kind, "subsampling": "444"}
            if i == grey:
                tile, colours = tile[..., 0].copy(), {}
            yield b"\xff\xd8" + header + bare(imagecodecs.jpeg8_encode(tile, 90, **colours))

    tifffile.imwrite(
        path, coded(), shape=image.shape, dtype=np.uint8, tile=(SIDE, SIDE), compression=7,
        photometric="rgb", metadata=None, resolution=(2e4, 2e4), resolutionunit="CENTIMETER",
    )  # fmt: skip
    with tifffile.TiffFile(path, mode="r+") as tiff:
        tiff.pages[0].tags["PhotometricInterpretation"].overwrite(2 if rgb else 6)
    return path


def damage(path: Path, change: Callable[[bytearray, int], None]) -> Path:
    data = bytearray(path.read_bytes())
    change(data, place(path, DAMAGED)[0])
    path.write_bytes(data)
    return path


@pytest.mark.parametrize("rgb", [True, False])
def test_headers_of_single_tiles_change_no_colour(tmp_path, rgb):
    headers = [b"", adobe(0), adobe(1), COMMENT + JFIF, JFXX, JFIF + adobe(0), JFIF, b"\xff"]
    path = write_tiles(tmp_path / "a.tif", rgb, headers)
    taken = []
    with Slide(path) as slide:
        for i, _ in enumerate(headers):
            got = slide.own.region(0, i * SIDE, 0, SIDE, SIDE)
            taken += [] if got is None else [i]
            if got is not None:
                np.testing.assert_array_equal(got, theirs(path, i * SIDE, 0, 0, SIDE, SIDE))
    assert taken == ([0, 1, 4, 7] if rgb else list(range(8)))


def test_a_grey_tile_among_colours_is_refused_as_openslide_refuses_it(tmp_path):
    path = write_tiles(tmp_path / "a.tif", False, [b"", b"", b""], grey=1)
    with pytest.raises(openslide.OpenSlideError):
        theirs(path, SIDE, 0, 0, SIDE, SIDE)
    with Slide(path) as slide:
        slide.read(0, 0, SIDE, slide.scale(SIDE, None))
        assert slide.own.region(0, 0, 0, SIDE, SIDE) is not None
        with pytest.raises(RegionError):
            slide.read(SIDE, 0, SIDE, slide.scale(SIDE, None))


def test_no_room_is_made_for_what_a_damaged_frame_states(tmp_path, monkeypatch):
    """libjpeg would fill 65,500 x 65,500 px, 12 GB, in minutes."""

    def grown(data: bytearray, offset: int) -> None:
        at = data.index(SOF0, offset)
        data[at + 5 : at + 9] = struct.pack(">HH", 300, 300)

    path = damage(write_jpeg_slide(tmp_path / "a.tif", detailed(768, 512)), grown)
    decode, decoded = tile_codecs.simplejpeg.decode_jpeg, []

    def watched(data, *args, **options):
        decoded.append(tile_codecs.simplejpeg.decode_jpeg_header(data)[:2])
        return decode(data, *args, **options)

    monkeypatch.setattr(tile_codecs.simplejpeg, "decode_jpeg", watched)
    with Slide(path) as slide:
        scale = slide.scale(256, None)
        slide.read(0, 0, 256, scale)
        with pytest.raises(RegionError):
            slide.read(256, 256, 256, scale)
    assert set(decoded) == {(256, 256)}


@pytest.mark.parametrize(("compression", "marker"), [("jpeg", SOF0), ("jpeg2000", SIZ)])
def test_tifffile_is_kept_from_it_too(tmp_path, compression, marker):
    path = tmp_path / "a.ome.tif"
    with tifffile.TiffWriter(path, ome=True) as tiff:
        tiff.write(detailed(768, 512), tile=(256, 256), photometric="rgb", compression=compression)

    def grown(data: bytearray, offset: int) -> None:
        at = data.index(marker, offset)
        if compression == "jpeg":
            data[at + 5 : at + 9] = struct.pack(">HH", 300, 300)
        else:
            data[at + 6 : at + 14] = struct.pack(">II", 300, 300)

    damage(path, grown)
    with Slide(path, GivenPixelSize(0.5)) as slide:
        scale = slide.scale(256, None)
        slide.read(0, 0, 256, scale)
        with pytest.raises(RegionError, match="it states 300 x 300 px"):
            slide.read(256, 256, 256, scale)


def test_more_bytes_than_the_file_has_are_not_made_room_for(tmp_path):
    path = write_jpeg_slide(tmp_path / "a.tif", detailed(256, 256))
    with tifffile.TiffFile(path) as tiff:
        for offset, count in [(0, 1 << 62), (1 << 63, 10), (tiff.filehandle.size - 5, 6)]:
            with pytest.raises(ValueError, match="cut off"):
                own_tiles._read(tiff, offset, count)
