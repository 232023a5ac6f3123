"""Slides that would mislead, hang or use up memory: each is one sentence, and costs only itself."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import pytest
import tifffile
from cohort import APERIO, WHOLE, write
from made_slides import PINK, painted, spoil, write_slide

from jaxhisto.config import TileConfig
from jaxhisto.data.store import TileStore
from jaxhisto.errors import SlideError
from jaxhisto.slides import cutting, reader, tiling
from jaxhisto.slides.cutting import cut_slide
from jaxhisto.slides.finding import find_slides
from jaxhisto.slides.pixel_size import GivenPixelSize
from jaxhisto.slides.reader import RegionError, Slide


def config(slides: Path, out: Path) -> TileConfig:
    return TileConfig(slides=(str(slides),), out=str(out), dataset="d", tile_px=64, processes=1)


def stating(path: Path, page: int = 0, **tags: int) -> Path:
    """The file with other numbers in its header."""
    with tifffile.TiffFile(path, mode="r+") as tiff:
        for tag, value in tags.items():
            tiff.pages[page].tags[tag].overwrite(value)
    return path


def test_a_slide_removed_while_running_costs_only_itself(tmp_path, monkeypatch):
    """After it was found, and between its hash and its pixels."""
    for name in ("a", "b"):
        write_slide(tmp_path / "in" / f"{name}.tif", painted(128, 128, PINK))
    settings = config(tmp_path / "in", tmp_path / "s")

    def find_and_lose(asked):
        jobs = find_slides(asked)
        (tmp_path / "in" / "b.tif").unlink()
        return jobs

    with monkeypatch.context() as patched:
        patched.setattr(tiling, "find_slides", find_and_lose)
        result = tiling.tile(settings)
    said = "cannot be read (No such file or directory); check the path"
    assert [f.reason for f in result.failures] == [f"b.tif: {said}"]
    assert set(TileStore(tmp_path / "s").slides()) == {"a.tif"}

    (job,) = find_slides(settings)
    monkeypatch.setattr(cutting, "content_hash", lambda path, _: path.unlink())
    with pytest.raises(SlideError, match=r"a\.tif: cannot be read \(No such file"):
        cut_slide(job)


def test_mirax_without_its_folder_says_what_is_missing(tmp_path):
    path = tmp_path / "a.mrxs"
    path.write_bytes(b"\xff\xd8\xff\xe0")
    with pytest.raises(SlideError, match=r"a\.mrxs: its folder a, .* is missing beside it; copy"):
        Slide(path)
    (tmp_path / "a").mkdir()
    with pytest.raises(SlideError, match=r"a\.mrxs: OpenSlide does not read this file"):
        Slide(path)


def test_a_tiff_larger_than_its_tiles_is_refused_at_once(tmp_path):
    path = stating(write(tmp_path / "a.tif", WHOLE, 0), ImageWidth=90_000, ImageLength=70_000)
    begun = time.monotonic()
    with pytest.raises(SlideError, match="90000 x 70000 px, which is 96448 tiles, and names 9; "):
        Slide(path)
    assert time.monotonic() - begun < 1


def test_a_tile_larger_than_memory_is_refused_before_it_is_decoded(tmp_path):
    side = 65_536
    path = write(tmp_path / "a.tif", WHOLE, 0, tile=(1024, 1024))
    stating(path, ImageWidth=side, ImageLength=side, TileWidth=side, TileLength=side)
    with pytest.raises(SlideError, match=r"65536 x 65536 px .*of 16\.0 GiB, too large.*vips tiffs"):
        Slide(path)


def test_an_overview_larger_than_memory_is_refused_before_it_is_made(tmp_path, monkeypatch):
    """0.13 megapixels take 0.6 MB at the size of level 0; the limit stands in for a machine's."""
    path = write_slide(tmp_path / "a.tif", painted(400, 320, PINK), mpp=None)
    monkeypatch.setattr(reader, "MOST_OVERVIEW", 600_000)
    with Slide(path, GivenPixelSize(100.0)) as slide:
        assert slide.overview(2).rgb.shape == (160, 200, 3)
        monkeypatch.setattr(np, "full", None)
        with pytest.raises(SlideError, match=r"a\.tif: states 400 x 320 px of 100 um, too large"):
            slide.overview(1)


@pytest.mark.parametrize("vendor", ["aperio", "ome"])
def test_a_huge_or_damaged_label_is_not_looked_at(tmp_path, vendor):
    """To load it would take 10 GB of memory (Aperio), or fail (OME): it is never decoded."""
    image = painted(512, 512, PINK)
    how = {"photometric": "rgb", "tile": (256, 256), "compression": "zlib"}
    label = {"photometric": "rgb", "compression": "zlib", "rowsperstrip": 64}
    path = tmp_path / "a.tif"
    if vendor == "aperio":
        with tifffile.TiffWriter(path) as tiff:
            tiff.write(
                image, metadata=None, description=APERIO.format(512, 512),
                **how | {"compression": "jpeg"},
            )  # fmt: skip
            tiff.write(painted(64, 64, PINK), metadata=None, subfiletype=1,
                       description="Aperio Image Library v1\r\nlabel 64x64", **label)  # fmt: skip
        stating(path, 1, ImageWidth=60_000, ImageLength=60_000, RowsPerStrip=60_000)
    else:
        with tifffile.TiffWriter(path, ome=True) as tiff:
            tiff.write(image, metadata={"axes": "YXS", "PhysicalSizeX": 0.5}, **how)
            tiff.write(painted(64, 64, PINK), **label)
        spoil(path, 0, page=1)
    result = tiling.tile(config(path, tmp_path / "s"))

    assert result.failures == ()
    assert result.manifest["slides"][0]["tiles"] == 64


def test_packings_that_openslide_does_not_know_are_read_by_tifffile(tmp_path):
    image = painted(300, 200, PINK)
    path = tmp_path / "a.tif"
    tifffile.imwrite(path, image, photometric="rgb", tile=(64, 64), compression="zstd")
    with Slide(path, GivenPixelSize(0.5)) as slide:
        tile = slide.read(100, 70, 64, slide.scale(64, None))
    np.testing.assert_array_equal(tile, image[70:134, 100:164])


def test_a_slide_that_is_damaged_in_part_is_told(tmp_path):
    path = spoil(write(tmp_path / "a.tif", WHOLE, 0), 0)
    result = tiling.tile(config(path, tmp_path / "s"))

    assert result.manifest["slides"][0]["notes"] == [
        "9 cells cannot be read: the file is damaged or cut off there"
    ]
    assert "a.tif: note: 9 cells cannot be read" in "\n".join(result.summary())


def test_jpeg2000_that_does_not_decode_costs_the_region(tmp_path):
    path = write(
        tmp_path / "a.svs", WHOLE, 0, compression="aperio_jp2000_rgb", compressionargs=None,
        description=APERIO.format(WHOLE.width, WHOLE.height),
    )  # fmt: skip
    spoil(path, 0)
    with Slide(path) as slide:
        scale = slide.scale(64, None)
        with pytest.raises(RegionError) as caught:
            slide.read(64, 64, 64, scale)
        after = slide.read(256, 64, 64, scale)
    assert caught.value.reason == "unreadable"
    assert abs(after.astype(int) - PINK).max() < 20
