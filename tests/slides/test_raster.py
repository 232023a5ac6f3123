"""A slide read by rows against the image that was written."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import tifffile
from made_slides import spoil
from PIL import Image

from jaxhisto.errors import SlideError
from jaxhisto.slides import raster as module
from jaxhisto.slides.pixel_size import GivenPixelSize
from jaxhisto.slides.raster import SlideRaster
from jaxhisto.slides.reader import RegionError, Slide

SIZE = (300, 410)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, np.ndarray]:
    """A slide of one level at 0.25 um/px, smooth, and its pixels."""
    rng = np.random.default_rng(0)
    low = Image.fromarray(rng.integers(0, 256, (30, 41, 3), np.uint8))
    image = np.asarray(low.resize((SIZE[1], SIZE[0]), Image.Resampling.BICUBIC))
    path = tmp_path_factory.mktemp("raster") / "slide.tif"
    tifffile.imwrite(path, image, tile=(64, 64), photometric="rgb", compression="deflate")
    return path, image


def test_slides_of_jpeg_tiles_are_read_too(shared_data: Path) -> None:
    """They come without alpha from the decoder of the slide's own tiles."""
    path = shared_data / "wsi" / "CMU-1-Small-Region.svs"
    with Slide(path) as slide:
        scale = slide.scale(200, None)
        raster = SlideRaster(slide, slide.mpp)
        np.testing.assert_array_equal(
            rows(raster, 500)[300:500, 700:900], slide.read(700, 300, 200, scale)
        )
        reduced = SlideRaster(slide, 2.0)
        pixels = rows(reduced, 100)
        assert reduced.unreadable == 0
    assert pixels.shape == (reduced.height, reduced.width, 3)


def rows(raster: SlideRaster, step: int) -> np.ndarray:
    return np.concatenate(
        [raster.rows(y, min(y + step, raster.height)) for y in range(0, raster.height, step)]
    )


def test_at_a_level_its_pixels_come_as_they_are(
    made: tuple[Path, np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "BLOCK", 128)
    with Slide(made[0], GivenPixelSize(0.25)) as slide:
        raster = SlideRaster(slide, 0.25)
        np.testing.assert_array_equal(rows(raster, 70), made[1])
        assert raster.there(200, 300).all()
        assert raster.unreadable == 0


@pytest.mark.parametrize("block", [64, 4096])
def test_between_levels_it_is_the_whole_image_resized_at_once(
    made: tuple[Path, np.ndarray], block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the blocks: a seam would show."""
    monkeypatch.setattr(module, "BLOCK", block)
    mpp = 0.6
    with Slide(made[0], GivenPixelSize(0.25)) as slide:
        raster = SlideRaster(slide, mpp)
        assert (raster.height, raster.width) == (125, 170)
        found = rows(raster, 33)
    box = (0, 0, 170 * mpp / 0.25, 125 * mpp / 0.25)
    whole = Image.fromarray(made[1]).resize((170, 125), Image.Resampling.BICUBIC, box)
    np.testing.assert_allclose(found.astype(int), np.asarray(whole).astype(int), atol=1)


def test_what_cannot_be_read_is_white_and_counted(
    made: tuple[Path, np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "BLOCK", 100)
    with Slide(made[0], GivenPixelSize(0.25)) as slide:
        read = slide.area

        def broken(level: int, left: int, top: int, width: int, height: int) -> np.ndarray:
            if left == 100 and top == 0:
                raise RegionError("no")
            region = read(level, left, top, width, height).copy()
            region[..., 3][region[..., 0] < 60] = 0  # not in the file
            return region

        monkeypatch.setattr(slide, "area", broken)
        raster = SlideRaster(slide, 0.25)
        rgb, there = raster.read(0, 100)
    missing = made[1][:100, :, 0] < 60
    missing[:, 100:200] = True
    np.testing.assert_array_equal(there, ~missing)
    assert (rgb[missing] == 255).all()
    np.testing.assert_array_equal(rgb[~missing], made[1][:100][~missing])
    assert raster.unreadable == 100 * 100


@pytest.mark.parametrize("mpp", [0.25, 0.6])
def test_a_damaged_tile_costs_its_surroundings_and_no_block(
    made: tuple[Path, np.ndarray], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mpp: float
) -> None:
    """By the resampling a block that is read reaches some pixels into its neighbours."""
    monkeypatch.setattr(module, "SMALLEST", 16)
    path = tmp_path / "damaged.tif"
    path.write_bytes(made[0].read_bytes())
    spoil(path, 9)  # the third of the second row: 128..192, 64..128
    with Slide(made[0], GivenPixelSize(0.25)) as slide:
        whole = rows(SlideRaster(slide, mpp), 999)
    with Slide(path, GivenPixelSize(0.25)) as slide:
        raster = SlideRaster(slide, mpp)
        rgb, there = raster.read(0, raster.height)
    step = mpp / 0.25
    far = np.ones(there.shape, bool)
    far[max(0, int((64 - 48) / step)) : int((128 + 48) / step),
        int((128 - 48) / step) : int((192 + 48) / step)] = False  # fmt: skip
    assert there[far].all()
    np.testing.assert_allclose(rgb[there].astype(int), whole[there].astype(int), atol=1)
    inner = there[int(66 / step) : int(126 / step), int(130 / step) : int(190 / step)]
    assert not inner.any()
    assert raster.unreadable == (~there).sum()


def test_pixels_are_not_made_up(made: tuple[Path, np.ndarray]) -> None:
    with (
        Slide(made[0], GivenPixelSize(0.25)) as slide,
        pytest.raises(SlideError, match="coarser than"),
    ):
        SlideRaster(slide, 0.1)
