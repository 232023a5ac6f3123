"""A slide's own JPEG 2000 tiles: OpenSlide's pixels, or none."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import cv2
import imagecodecs
import numpy as np
import openslide
import pytest
import tifffile
from test_own_tiles import cut, detailed, place, theirs

from jaxhisto.slides import tile_codecs
from jaxhisto.slides.pixel_size import GivenPixelSize
from jaxhisto.slides.reader import RegionError, Slide

APERIO = "Aperio Image Library v12.0.0\n|MPP = 0.5"
SIDE = 256
KINDS = {"RGB": 33005, "YCbCr": 33003}  # TIFF compression


def coded(image: np.ndarray) -> Iterator[bytes]:
    """The tiles of an image, row by row, as Aperio codes them: lossy, padded at the edges."""
    for y in range(0, image.shape[0], SIDE):
        for x in range(0, image.shape[1], SIDE):
            tile = np.zeros((SIDE, SIDE, 3), np.uint8)
            piece = image[y : y + SIDE, x : x + SIDE]
            tile[: piece.shape[0], : piece.shape[1]] = piece
            yield imagecodecs.jpeg2k_encode(
                tile, level=60, codecformat="j2k", mct=True, reversible=False
            )


def write_jpeg2000_slide(path: Path, image: np.ndarray, levels: int = 1, kind: str = "RGB") -> Path:
    """An Aperio slide of JPEG 2000 tiles at 0.5 um/px, each level half of the one before."""
    with tifffile.TiffWriter(path) as tiff:
        for _ in range(levels):
            tiff.write(
                coded(image), shape=image.shape, dtype=np.uint8, tile=(SIDE, SIDE),
                photometric="rgb", compression=KINDS[kind], metadata=None, description=APERIO,
            )  # fmt: skip
            image = cv2.resize(image, None, fx=0.5, fy=0.5, interpolation=cv2.INTER_AREA)
    return path


def test_made_slides_are_read_as_openslide_reads_them(tmp_path):
    path = write_jpeg2000_slide(tmp_path / "a.svs", detailed(1112, 776), levels=2)
    with Slide(path) as slide:
        for level, x, y, width, height in [
            (0, 300, 200, 512, 512), (0, 1000, 700, 112, 76), (1, 0, 0, 556, 388),
            (1, 200, 100, 64, 64),
        ]:  # fmt: skip
            got = slide.own.region(level, x, y, width, height)
            assert got is not None
            np.testing.assert_array_equal(got, theirs(path, x, y, level, width, height))


def test_a_real_slide_is_read_as_openslide_reads_it(shared_data):
    path = shared_data / "wsi" / "TCGA-CR-7395-01A-01-TS1.svs"
    rng = np.random.default_rng(0)
    with Slide(path, GivenPixelSize(0.25)) as slide:
        for _ in range(8):
            x = int(rng.integers(0, slide.width - 300))
            y = int(rng.integers(0, slide.height - 300))
            got = slide.own.region(0, x, y, 300, 300)
            assert got is not None
            np.testing.assert_array_equal(got, theirs(path, x, y, 0, 300, 300))


def test_a_level_between_the_pixels_of_level_0_comes_as_it_lies_in_the_file(tmp_path):
    """OpenSlide interpolates it, but for its first tile; tifffile does not."""
    path = write_jpeg2000_slide(tmp_path / "a.svs", detailed(1111, 777), levels=2)
    with tifffile.TiffFile(path) as tiff:
        whole = tiff.pages[1].asarray()
    with Slide(path) as slide:
        assert not slide.downsamples[1].is_integer()
        assert slide.own.region(1, 300, 301, 100, 100) is None
        np.testing.assert_array_equal(slide.own.area(1, 0, 0, 556, 388), whole)
        np.testing.assert_array_equal(slide.own.area(1, 301, 77, 200, 300), whole[77:377, 301:501])
        view = slide.overview(2.0)
    np.testing.assert_array_equal(view.rgb, whole)


def test_a_real_level_comes_as_it_lies_in_the_file(shared_data):
    path = shared_data / "wsi" / "TCGA-CR-7395-01A-01-TS1.svs"
    with tifffile.TiffFile(path) as tiff:
        whole = tiff.pages[2].asarray()
    with Slide(path, GivenPixelSize(0.25)) as slide:
        np.testing.assert_array_equal(slide.overview(2.0).rgb, whole)


def damaged(data: bytearray, offset: int, count: int, damage: str) -> None:
    if damage == "huge":  # states an image of 4 billion pixels a side
        data[offset + 8 : offset + 16] = b"\xff" * 8
    elif damage == "coding":  # other code blocks than the level's first tile
        at = data.index(b"\xff\x52", offset)
        data[at + 10] ^= 1
    elif damage == "half":
        data[offset + count // 2 : offset + count] = bytes(count - count // 2)
    else:
        data[offset : offset + count] = bytes(count)


@pytest.mark.parametrize("damage", ["huge", "coding", "half", "gone"])
def test_of_damaged_tiles_openslide_decides(tmp_path, damage):
    path = write_jpeg2000_slide(tmp_path / "a.svs", detailed(768, 512))
    offset, count = place(path, 4)
    data = bytearray(path.read_bytes())
    damaged(data, offset, count, damage)
    path.write_bytes(data)
    refused = 0
    with Slide(path) as slide:
        scale = slide.scale(256, None)
        for x, y in [(256, 256), (255, 200), (0, 0), (512, 256), (256, 0)]:
            try:
                expected = theirs(path, x, y, 0, 256, 256)
            except openslide.OpenSlideError:
                refused += 1
                with pytest.raises(RegionError) as caught:
                    slide.read(x, y, 256, scale)
                assert caught.value.reason == "unreadable"
            else:
                np.testing.assert_array_equal(slide.read(x, y, 256, scale), expected)
        if damage != "half":
            assert slide.own.region(0, 256, 256, 256, 256) is None
        assert slide.own.region(0, 0, 0, 256, 256) is not None
    assert refused == (0 if damage == "half" else 2)


@pytest.mark.skipif(sys.platform != "linux", reason="the largest size of a process is Linux's")
def test_a_size_that_is_not_true_allocates_nothing(tmp_path):
    """OpenJPEG would make room for 60,000 x 60,000 pixels, 43 GB."""
    path = write_jpeg2000_slide(tmp_path / "a.svs", detailed(768, 512))
    offset, _ = place(path, 0)
    data = bytearray(path.read_bytes())
    data[offset + 8 : offset + 16] = (60_000).to_bytes(4, "big") * 2
    data[offset + 24 : offset + 32] = (60_000).to_bytes(4, "big") * 2
    path.write_bytes(data)
    program = (
        "import sys\n"
        "from pathlib import Path\n"
        "from jaxhisto.slides.reader import Slide\n"
        "with Slide(Path(sys.argv[1])) as slide:\n"
        "    assert slide.own.region(0, 0, 0, 256, 256) is None\n"
        "    assert slide.own.region(0, 256, 256, 256, 256) is None\n"
        "print(Path('/proc/self/status').read_text().split('VmHWM:')[1].split()[0])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, path], capture_output=True, text=True, check=True
    )
    assert int(done.stdout) < 1 << 20  # KiB


def test_ycbcr_is_left_to_openslide(tmp_path):
    path = write_jpeg2000_slide(tmp_path / "a.svs", detailed(512, 512), kind="YCbCr")
    with Slide(path) as slide:
        assert slide.own.region(0, 0, 0, 256, 256) is None
        got = slide.read(10, 10, 300, slide.scale(300, None))
    np.testing.assert_array_equal(got, theirs(path, 10, 10, 0, 300, 300))


def test_a_decoder_of_other_pixels_is_found_out(tmp_path, monkeypatch):
    path = write_jpeg2000_slide(tmp_path / "a.svs", detailed(768, 512), levels=2)
    decode = imagecodecs.jpeg2k_decode
    monkeypatch.setattr(
        tile_codecs.imagecodecs, "jpeg2k_decode", lambda *a, **k: decode(*a, **k) ^ 1
    )
    with Slide(path) as slide:
        got = slide.read(100, 100, 224, slide.scale(224, None))
        assert slide.own.region(0, 100, 100, 224, 224) is None
    np.testing.assert_array_equal(got, theirs(path, 100, 100, 0, 224, 224))


def test_a_store_is_the_same_without_it(tmp_path, monkeypatch):
    path = write_jpeg2000_slide(tmp_path / "a.svs", detailed(1500, 1100), levels=2)
    with_it = cut(path, tmp_path / "with", foreground="od")
    monkeypatch.setattr(tile_codecs, "imagecodecs", None)
    with Slide(path) as slide:
        assert slide.own.region(0, 0, 0, 256, 256) is None
    assert cut(path, tmp_path / "without", foreground="od") == with_it
