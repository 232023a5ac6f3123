"""Files as OpenSlide knows those of six makers: what they state, and pixels as they went in."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import openslide
import pytest
import tifffile
from made_images import encoded
from made_mirax import write_mirax
from made_ndpi import level_jpeg, write_ndpi
from made_slides import half_tissue
from made_vendors import TILE, write_leica, write_philips, write_trestle, write_ventana
from PIL import Image

from jaxhisto.config import TileConfig
from jaxhisto.slides.reader import RegionError, Slide
from jaxhisto.slides.slide_source import SlidesSource

MPP, WIDTH, HEIGHT = 0.5, 1024, 768
AT, GLASS = (1280, 2560), (6500, 13000)  # of Leica's: where the scanned area lies in how much glass


def leica(path: Path, image: np.ndarray, mpp: float) -> Path:
    return write_leica(path, image, mpp, AT, GLASS)


MADE: dict[str, tuple[Callable[..., Path], str, int, tuple[int, int]]] = {
    "trestle": (write_trestle, ".tif", 2, (0, 0)),
    "leica": (leica, ".scn", 4, AT),
    "philips": (write_philips, ".tiff", 2, (0, 0)),
    "ventana": (write_ventana, ".bif", 2, (0, 0)),
}


def tissue(path: Path) -> tuple[set[tuple[int, int]], list[tuple[str, str]]]:
    """The corners of the foreground tiles, 64 px, and what was left out."""
    source = SlidesSource(TileConfig(slides=(str(path),), out="", dataset="d", tile_px=64), 1)
    places = [source.located(i) for i in range(len(source))]
    return {(place.x, place.y) for place in places}, source.dropped


@pytest.fixture(scope="module", params=MADE)
def made(request, tmp_path_factory) -> tuple[str, Path, np.ndarray, int, tuple[int, int]]:
    """(vendor, file, the image in it, the second level's factor, where the image begins)."""
    write, suffix, factor, at = MADE[request.param]
    image = half_tissue(WIDTH, HEIGHT)
    path = write(tmp_path_factory.mktemp(request.param) / f"a{suffix}", image, MPP)
    with openslide.OpenSlide(path) as plain:
        assert plain.properties["openslide.vendor"] == request.param
    return request.param, path, image, factor, at


def test_pixel_size_levels_and_pixels_are_those_that_went_in(made):
    vendor, path, image, factor, (left, top) = made
    with Slide(path) as slide:
        assert (slide.mpp, slide.mpp_source) == (pytest.approx(MPP), "openslide.mpp")
        assert (slide.width, slide.height) == (GLASS if vendor == "leica" else (WIDTH, HEIGHT))
        assert slide.downsamples == pytest.approx((1, factor))
        for level, step in enumerate((1, factor)):
            scale = slide.scale(64, MPP * step)
            assert scale.level == level
            tile = slide.read(left + 80 * step, top + 100 * step, 64, scale)
            written = image[100 * step : 164 * step : step, 80 * step : 144 * step : step]
            np.testing.assert_array_equal(tile, written)


def test_the_tiles_are_those_of_the_scanned_tissue(made):
    """The left half of the image is pink; of Leica's glass around it nothing was scanned."""
    _, path, _, _, (left, top) = made
    corners, dropped = tissue(path)
    assert corners == {
        (x, y)
        for x in range(left, left + WIDTH // 2, 64)
        for y in range(top, top + HEIGHT, 64)
    }  # fmt: skip
    assert not dropped


def test_what_lies_around_a_scanned_area_is_not_there(tmp_path):
    image = half_tissue(WIDTH, HEIGHT)
    path = leica(tmp_path / "a.scn", image, MPP)
    with Slide(path) as slide, openslide.OpenSlide(path) as plain:
        bounds = [int(plain.properties[f"openslide.bounds-{k}"]) for k in ("x", "y", "width")]
        assert bounds == [*AT, WIDTH]
        scale = slide.scale(64, None)
        for x, y in [(0, 0), (AT[0] - 1, AT[1]), (AT[0] + WIDTH - 63, AT[1]), (6400, 12900)]:
            with pytest.raises(RegionError) as caught:
                slide.read(x, y, 64, scale)
            assert caught.value.reason == "transparent"
        there = slide.overview(32).there
    rows, columns = np.nonzero(there)
    assert (rows.min(), rows.max() + 1) == (AT[1] // 32, (AT[1] + HEIGHT) // 32)
    assert (columns.min(), columns.max() + 1) == (AT[0] // 32, (AT[0] + WIDTH) // 32)


def test_an_empty_philips_tile_is_not_there_and_costs_only_itself(tmp_path):
    """Philips leaves out tiles in which it saw no tissue: no place, no bytes."""
    image = half_tissue(WIDTH, HEIGHT)
    path = write_philips(tmp_path / "a.tiff", image, MPP)
    with tifffile.TiffFile(path, mode="r+") as tiff:
        for tag in ("TileOffsets", "TileByteCounts"):
            values = list(tiff.pages[0].tags[tag].value)
            values[5] = 0
            tiff.pages[0].tags[tag].overwrite(values)
    with Slide(path) as slide:
        scale = slide.scale(TILE, None)
        with pytest.raises(RegionError) as caught:
            slide.read(TILE, TILE, TILE, scale)
        assert caught.value.reason == "transparent"
        tile = slide.read(0, TILE, TILE, scale)
    np.testing.assert_array_equal(tile, image[TILE : 2 * TILE, :TILE])


def test_ndpi_levels_are_what_libjpeg_makes_of_the_two_in_the_file(tmp_path):
    """Between the file's levels OpenSlide has libjpeg scale while it decodes, as Pillow does."""
    image = half_tissue(WIDTH, HEIGHT)
    path = write_ndpi(tmp_path / "a.ndpi", image, MPP)
    with openslide.OpenSlide(path) as plain:
        assert plain.properties["openslide.vendor"] == "hamamatsu"
    with Slide(path) as slide:
        assert (slide.mpp, slide.mpp_source) == (MPP, "openslide.mpp")
        assert slide.downsamples[:4] == (1, 2, 4, 8)
        for level, step, scaled in [(0, 1, 1), (1, 1, 2), (2, 4, 1), (3, 4, 2)]:
            oracle = Image.open(io.BytesIO(level_jpeg(image[::step, ::step])))
            oracle.draft("RGB", (oracle.width // scaled, oracle.height // scaled))
            scale = slide.scale(64, MPP * step * scaled)
            assert scale.level == level
            tile = slide.read(40 * step * scaled, 24 * step * scaled, 64, scale)
            np.testing.assert_array_equal(tile, np.asarray(oracle)[24:88, 40:104])
    corners, dropped = tissue(path)
    assert corners == {(x, y) for x in range(0, WIDTH // 2, 64) for y in range(0, HEIGHT, 64)}
    assert not dropped


def test_mirax_is_read_within_its_bounds_and_without_what_was_not_taken(tmp_path):
    """Camera images of 128 px, from (4, 6) on in a slide of 20 x 30; a block of four is missing."""
    image, left, top = half_tissue(WIDTH, HEIGHT), 4 * 128, 6 * 128
    path = write_mirax(tmp_path / "a.mrxs", image, MPP, (4, 6), (20, 30), left_out={(3, 4)})
    gap = {(x, y) for x in range(768, 1024, 64) for y in range(1024, 1280, 64)}
    with openslide.OpenSlide(path) as plain:
        told = plain.properties
        assert told["openslide.vendor"] == "mirax"
        assert [int(told[f"openslide.bounds-{k}"]) for k in ("x", "y", "width", "height")] == [
            left, top, WIDTH, HEIGHT,
        ]  # fmt: skip
    with Slide(path) as slide:
        assert (slide.mpp, slide.mpp_source) == (MPP, "openslide.mpp")
        assert (slide.width, slide.height, slide.downsamples) == (2560, 3840, (1, 2))
        for level, step in enumerate((1, 2)):
            scale = slide.scale(96, MPP * step)
            assert scale.level == level
            tile = slide.read(left + 20 * step, top + 10 * step, 96, scale)
            written = image[10 * step : 106 * step : step, 20 * step : 116 * step : step]
            np.testing.assert_array_equal(tile, written)
            for x, y in [(0, 0), (left - 64, top), *gap]:
                with pytest.raises(RegionError) as caught:
                    slide.read(x, y, 96, scale)
                assert caught.value.reason == "transparent"
    whole = {
        (x, y) for x in range(left, left + WIDTH // 2, 64) for y in range(top, top + HEIGHT, 64)
    }
    corners, dropped = tissue(path)
    assert corners == whole - gap
    assert not dropped


def test_a_mirax_image_that_is_damaged_costs_only_itself(tmp_path):
    image = half_tissue(512, 512)
    path = write_mirax(tmp_path / "a.mrxs", image, MPP, (0, 0), (4, 4))
    data = tmp_path / "a" / "Data0000.dat"
    first = encoded(np.ascontiguousarray(image[:128, :128]))
    data.write_bytes(data.read_bytes().replace(first, bytes(len(first))))
    with Slide(path) as slide:
        scale = slide.scale(128, None)
        with pytest.raises(RegionError) as caught:
            slide.read(0, 0, 128, scale)
        assert caught.value.reason == "unreadable"
        np.testing.assert_array_equal(slide.read(128, 0, 128, scale), image[:128, 128:256])
