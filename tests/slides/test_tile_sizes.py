"""Sizes that packed tiles state of themselves, against what the codecs were given; and bombs."""

from __future__ import annotations

import json
import subprocess
import sys
import zlib

import imagecodecs
import numpy as np
import pytest
import tifffile
from made_images import encoded
from made_slides import half_tissue

from jaxhisto.errors import SlideError
from jaxhisto.slides.pixel_size import GivenPixelSize
from jaxhisto.slides.reader import Slide
from jaxhisto.slides.tile_codecs import jpeg2000_size
from jaxhisto.slides.tile_sizes import (
    JPEG_XL,
    JPEG_XR,
    PNG,
    WEBP,
    jpeg_xl_size,
    jpeg_xr_size,
    png_size,
    stated_size,
    webp_size,
)

PACKINGS = {  # of tifffile, each without loss
    "webp": {"lossless": True},
    "jpegxl": {"lossless": True, "effort": 1},
    "jpegxr": {},
    "png": {},
}
CODINGS = [
    ("webp", {"lossless": True}, webp_size),
    ("webp", {"level": 60}, webp_size),
    ("jpegxl", {"effort": 1}, jpeg_xl_size),
    ("jpegxl", {"effort": 1, "usecontainer": True}, jpeg_xl_size),
    ("jpegxr", {}, jpeg_xr_size),
    ("png", {}, png_size),
    ("jpeg2k", {"codecformat": "j2k"}, jpeg2000_size),
]
# Of JPEG XL those that it states in bytes, as ratios, and in each length of number.
SIZES = [(1, 1), (8, 256), (256, 256), (240, 200), (300, 257), (800, 400), (1333, 1000), (9000, 3)]


@pytest.mark.parametrize(("codec", "how", "told"), CODINGS)
def test_the_size_is_that_of_the_image(codec, how, told):
    for width, height in SIZES:
        image = np.zeros((height, width, 3), np.uint8)
        data = getattr(imagecodecs, f"{codec}_encode")(image, **how)
        assert told(data) == (width, height)


def test_the_size_of_webp_with_transparency_is_that_of_its_canvas():
    data = encoded(np.full((70, 300, 4), 128, np.uint8), "WEBP", quality=60)
    assert data[12:16] == b"VP8X"
    assert webp_size(data) == (300, 70)


@pytest.mark.parametrize("compression", [WEBP[0], JPEG_XL[0], JPEG_XR[0], PNG[0], 34712, 7])
def test_what_is_damaged_before_its_size_is_an_error(compression):
    for data in (
        b"",
        b"\xff",
        b"RIFF0000WEBPVP8 ",
        b"\0\0\0\x0cJXL \r\n\x87\n\0\0\0\1jxlc",
        bytes(99),
    ):
        with pytest.raises(ValueError, match=r"no size|not a JPEG|without end"):
            stated_size(compression, data)


@pytest.mark.parametrize("packing", PACKINGS)
def test_packings_that_state_sizes_are_read_as_written(tmp_path, packing):
    image = half_tissue(400, 300)
    path = tmp_path / "a.tif"
    tifffile.imwrite(
        path, image, photometric="rgb", tile=(256, 256), compression=packing,
        compressionargs=PACKINGS[packing], metadata=None,
    )  # fmt: skip
    with Slide(path, GivenPixelSize(0.5)) as slide:
        tile = slide.read(100, 40, 256, slide.scale(256, None))
    np.testing.assert_array_equal(tile, image[40:296, 100:356])


def test_a_packing_whose_sizes_are_not_told_is_refused(tmp_path):
    path = tmp_path / "a.tif"
    tifffile.imwrite(
        path, half_tissue(256, 256), photometric="rgb", tile=(256, 256), compression="lerc"
    )
    with pytest.raises(SlideError, match=r"a\.tif: is packed with LERC, .* memory; convert"):
        Slide(path, GivenPixelSize(0.5))


def png_of_zeros(side: int) -> bytes:
    rows = zlib.compress(bytes((3 * side + 1) * side), 1)
    chunks = [
        (b"IHDR", side.to_bytes(4, "big") * 2 + b"\x08\x02\0\0\0"), (b"IDAT", rows), (b"IEND", b""),
    ]  # fmt: skip
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        len(body).to_bytes(4, "big") + kind + body + zlib.crc32(kind + body).to_bytes(4, "big")
        for kind, body in chunks
    )


READ = """
import json, resource, sys
from pathlib import Path
from jaxhisto.slides.pixel_size import GivenPixelSize
from jaxhisto.slides.reader import RegionError, Slide

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

said = {}
for path in map(Path, sys.argv[1:]):
    with Slide(path, GivenPixelSize(0.5)) as slide:
        scale = slide.scale(256, None)
        slide.read(0, 0, 256, scale)
        before = peak()
        try:
            slide.read(256, 0, 256, scale)
        except RegionError as error:
            said[path.stem] = [str(error), peak() - before]
print(json.dumps(said))
"""


def test_no_room_is_made_for_what_a_tile_states(tmp_path):
    """Each file has one tile of 2500 px squared, whole and valid: 19 MB for who decodes it."""
    side = 2500
    flat = np.full((side, side, 3), 200, np.uint8)
    bombs = {
        "webp": imagecodecs.webp_encode(flat, lossless=True, level=0),
        "jpegxl": imagecodecs.jpegxl_encode(flat, effort=1, lossless=True),
        "jpegxr": imagecodecs.jpegxr_encode(flat),
        "png": png_of_zeros(side),
    }
    good = np.full((256, 256, 3), 200, np.uint8)
    paths = []
    for name, bomb in bombs.items():
        tile = getattr(imagecodecs, f"{name}_encode")(good)
        paths.append(tmp_path / f"{name}.tif")
        tifffile.imwrite(
            paths[-1], iter([tile, bomb]), shape=(256, 512, 3), dtype=np.uint8, tile=(256, 256),
            photometric="rgb", compression=name, metadata=None,
        )  # fmt: skip
    line = [sys.executable, "-c", READ, *map(str, paths)]
    done = subprocess.run(line, capture_output=True, text=True, check=True, timeout=120)
    said = json.loads(done.stdout)

    assert said.keys() == bombs.keys()
    for sentence, grown in said.values():
        assert "(it states 2500 x 2500 px)" in sentence
        assert grown < 8 << 10  # KiB, of the 18,300 that the pixels alone take
