"""Marker ink: painted by Beer-Lambert, beside stains made by scikit-image, and on real images."""

from __future__ import annotations

import dataclasses
from typing import Any

import cv2
import numpy as np
import pytest
from made_slides import GLASS, PINK, half_tissue, painted, spoil, write_slide
from PIL import Image
from skimage.color import hed2rgb

from jaxhisto.config import TileConfig
from jaxhisto.data.store_writer import StoreWriter
from jaxhisto.errors import SlideError
from jaxhisto.slides.cutting import Job, cut_slide
from jaxhisto.slides.pen import ink_note, pen_marks
from jaxhisto.slides.pixel_size import GivenPixelSize

GREEN, BLUE, RED, BLACK = (40, 170, 140), (40, 80, 180), (214, 40, 60), (45, 45, 50)


def over(colour: tuple[int, int, int], beneath: np.ndarray) -> np.ndarray:
    """Ink lets through so much of each channel."""
    return np.rint(beneath * (np.array(colour) / 255)).astype(np.uint8)


def stains() -> np.ndarray:
    """(40, 40, 3) uint8 of H&E, and of haematoxylin and DAB, pale to dense."""
    rng = np.random.default_rng(0)
    amounts = rng.uniform(0, 0.12, (40, 40, 3))  # scikit-image divides by log10(1e-6)
    amounts[:20, :, 2] = amounts[20:, :, 1] = 0
    return np.rint(255 * hed2rgb(amounts)).astype(np.uint8)


@pytest.mark.parametrize(
    ("colour", "pen"), [(GREEN, "green_blue"), (BLUE, "green_blue"), (RED, "all"), (BLACK, "all")]
)
def test_a_stroke_on_glass_is_ink_and_what_is_beside_it_is_not(colour, pen):
    image = painted(64, 64, GLASS)
    image[20:40] = over(colour, image[20:40])
    ink = pen_marks(image, pen, 8.0)

    assert ink[20:40].all()
    assert not ink[:20].any() | ink[40:].any()
    if pen == "all":
        assert not pen_marks(image, "green_blue", 8.0).any()
    assert not pen_marks(image, "none", 8.0).any()


def test_no_mixture_of_the_stains_is_ink():
    image = stains()

    assert image.min() < 60  # dense ones are among them
    assert not pen_marks(image, "all", 8.0).any()


def test_specks_narrower_than_a_stroke_are_none():
    image = painted(64, 64, GLASS)
    image[10:12, 10:12] = image[:, 40] = GREEN

    assert not pen_marks(image, "green_blue", 8.0).any()
    assert pen_marks(image, "green_blue", 32.0).sum() == 4 + 64  # too coarse to tell


def test_rows_are_taken_as_one_picture():
    """More rows than are taken at a time, against all at once by the definition."""
    image = np.random.default_rng(1).integers(0, 256, (600, 50, 3)).astype(np.uint8)
    red, green, blue = np.moveaxis(-np.log10(np.maximum(image, 1) / 255), -1, 0)
    oracle = (red > 1.4 * green) & (np.maximum(np.maximum(red, green), blue) > 0.2)

    assert np.mean(pen_marks(image, "green_blue", 100.0) != oracle) < 1e-3


def reduced(path, factor: int) -> np.ndarray:
    image = np.asarray(Image.open(path).convert("RGB"))
    return cv2.resize(image, None, fx=1 / factor, fy=1 / factor, interpolation=cv2.INTER_AREA)


def test_real_pens_are_seen_and_real_tissue_is_none(shared_data):
    qc = shared_data / "tissue_qc"
    seen = {p.stem: pen_marks(reduced(p, 16), "all", 8.0).mean() for p in qc.glob("pen_mark/*")}

    assert seen["no-tissue-green-pen"] > 0.6
    assert seen["medium-nuclei-score-green-pen-level1"] > 0.25
    assert seen["very-low-nuclei-score-red-pen-level1"] > 0.25
    for path in [*qc.glob("tissue/*"), *qc.glob("no_tissue/*")]:
        assert not pen_marks(reduced(path, 16), "all", 8.0).any()
    for path in sorted((shared_data / "her2st_spots" / "images").iterdir())[::20]:
        assert not pen_marks(reduced(path, 12), "green_blue", 8.0).any()


def cut(tmp_path, name: str, path, **changes: object) -> dict[str, Any]:
    """The manifest entry of a slide, cut in this process."""
    config = TileConfig((str(path),), str(tmp_path / name), "d", tile_px=64, max_tiles=0)
    config = dataclasses.replace(config, **{"foreground": "otsu", **changes})
    with StoreWriter(tmp_path / name, {}):
        return cut_slide(Job(path, path.name, GivenPixelSize(), config)).record


def marked() -> np.ndarray:
    """64 x 8 cells of 64 px, the left half tissue; ink over four rows and a quarter of the next."""
    image = half_tissue(4096, 512)
    image[:272] = over(GREEN, image[:272])
    return image


def test_tiles_with_ink_are_counted_under_their_own_reason(tmp_path):
    path = write_slide(tmp_path / "a.tif", marked(), levels=5)
    guarded = cut(tmp_path, "guarded", path)
    free = cut(tmp_path, "free", path, pen="none")

    assert guarded["rejected"]["pen"] == 64 * 4 + 32  # ink on glass is foreground to otsu
    assert guarded["tiles"] == 32 * 3
    assert guarded["tiles"] + sum(guarded["rejected"].values()) == 64 * 8
    assert (free["rejected"]["pen"], free["tiles"]) == (0, 64 * 4 + 32 * 4)
    capped = cut(tmp_path, "capped", path, max_tiles=10)
    assert (capped["tiles"], capped["rejected"]["over_cap"]) == (10, 32 * 3 - 10)
    assert "foreground with marker ink on it" in next(
        (tmp_path / "guarded" / "report").glob("*.html")
    ).read_text(encoding="utf-8")


def test_the_papers_rule_closes_over_a_stroke_which_the_guard_takes_out(tmp_path):
    """A stroke of 128 um, narrower than the close's disc."""
    image = painted(2048, 1024, PINK)
    image[384:640] = over(GREEN, image[384:640])
    path = write_slide(tmp_path / "a.tif", image, levels=5)
    slides = [
        cut(tmp_path, pen, path, foreground="ciga2022", pen=pen) for pen in ("none", "green_blue")
    ]

    # Beyond the slide's edge is background: there the close leaves the stroke open, two cells
    # a side.
    assert [s["rejected"]["pen"] for s in slides] == [0, 4 * 32 - 4]
    assert [s["tiles"] for s in slides] == [16 * 32 - 4, 12 * 32]


def test_where_the_overview_is_spoilt_the_tiles_own_pixels_show_the_ink(tmp_path):
    image = painted(4096, 512, PINK)
    image[:256] = over(GREEN, image[:256])
    path = spoil(write_slide(tmp_path / "a.tif", image, levels=5), 0, page=4)
    slide = cut(tmp_path, "s", path, foreground="od")

    assert slide["rejected"]["pen"] == 64 * 4


def test_a_stain_that_looks_like_ink_is_named_as_such(tmp_path):
    image = painted(1024, 1024, GLASS)
    image[:, :512] = over(BLUE, image[:, :512])
    image[:128, 512:] = painted(512, 128, PINK)
    (note,) = cut(tmp_path, "s", write_slide(tmp_path / "a.tif", image))["notes"]

    assert note.endswith("looks like marker ink; if it is a stain, pass --pen none")
    assert not ink_note(np.zeros((4, 4), bool), np.zeros((4, 4), bool))
    image[:128, 512:] = GLASS
    with pytest.raises(SlideError, match=r"128 of 256 cells have marker ink.*--pen none"):
        cut(tmp_path, "t", write_slide(tmp_path / "b.tif", image))
