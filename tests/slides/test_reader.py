"""Reading: pixels against the arrays that were written, plain OpenSlide, and scikit-image."""

from __future__ import annotations

import hashlib

import cv2
import numpy as np
import openslide
import pytest
from made_slides import GLASS, PINK, half_tissue, painted, spoil, write_slide
from skimage.transform import resize

from jaxhisto.errors import SlideError
from jaxhisto.slides.pixel_size import GivenPixelSize
from jaxhisto.slides.reader import RegionError, Slide
from jaxhisto.slides.slide_files import content_hash

READABLE = {
    "CMU-1-Small-Region.svs": (2220, 2967, 0.499),
    "TCGA-CR-7395-01A-01-TS1.svs": (4443, 3567, 0.25),
    "camelyon16_lowres_tiledfull.dcm": (1152, 700, 28.9685),
    "her2st_C2_pyramid.tiff": (9216, 9728, 0.6881),
}


@pytest.mark.parametrize("name", READABLE)
def test_real_slides_read_as_openslide_reads_them(shared_data, name):
    width, height, mpp = READABLE[name]
    path = shared_data / "wsi" / name
    with Slide(path, GivenPixelSize(0.25)) as slide, openslide.OpenSlide(path) as plain:
        assert (slide.width, slide.height) == (width, height)
        assert slide.mpp == pytest.approx(mpp, rel=1e-4)
        x, y = width // 2, height // 2
        tile = slide.read(x, y, 224, slide.scale(224, None))
        np.testing.assert_array_equal(
            tile, np.asarray(plain.read_region((x, y), 0, (224, 224)))[..., :3]
        )


def test_level_0_is_read_as_written(tmp_path):
    image = half_tissue(700, 600)
    with Slide(write_slide(tmp_path / "a.tif", image)) as slide:
        tile = slide.read(123, 45, 96, slide.scale(96, None))

    np.testing.assert_array_equal(tile, image[45:141, 123:219])


def test_a_level_near_the_size_asked_for_is_not_resampled(tmp_path):
    image = half_tissue(1024, 1024)
    path = write_slide(tmp_path / "a.tif", image, mpp=0.2525, levels=3)
    with Slide(path) as slide, openslide.OpenSlide(path) as plain:
        scale = slide.scale(64, 0.5)
        tile = slide.read(200, 400, 64, scale)
        level = np.asarray(plain.read_region((200, 400), 1, (64, 64)))[..., :3]

    assert (scale.level, scale.mpp, scale.side) == (1, pytest.approx(0.505), 128)
    np.testing.assert_array_equal(tile, level)


@pytest.mark.parametrize(("mpp", "level"), [(0.4, 0), (0.7, 1), (1.37, 2)])
def test_between_levels_the_next_finer_one_is_resized_once(tmp_path, mpp, level):
    """Against scikit-image's antialiased resize of the same area of the array."""
    rng = np.random.default_rng(0)
    # Smooth content: filters differ in what they do to noise, not in where they look.
    image = cv2.resize(rng.random((16, 16, 3)), (1024, 1024), interpolation=cv2.INTER_CUBIC)
    image = (image * 255).clip(0, 255).astype(np.uint8)
    with Slide(write_slide(tmp_path / "a.tif", image, mpp=0.25, levels=3)) as slide:
        scale = slide.scale(64, mpp)
        assert scale.level == level
        assert scale.mpp == mpp
        x, y, side = 160, 320, round(scale.side)
        tile = slide.read(x, y, 64, scale).astype(float)

    area = image[y : y + side, x : x + side]
    oracle = resize(area, (64, 64), anti_aliasing=True, preserve_range=True)
    assert np.abs(tile - oracle).mean() < 1
    shifted = resize(
        image[y : y + side, x + 8 : x + 8 + side], (64, 64), anti_aliasing=True, preserve_range=True
    )
    assert np.abs(tile - shifted).mean() > 3


def test_finer_than_the_slide_is_refused(tmp_path):
    with (
        Slide(write_slide(tmp_path / "a.tif", half_tissue(300, 300))) as slide,
        pytest.raises(SlideError, match=r"a\.tif: has 0\.5 um/px at best .* pass --tile-mpp 0\.5"),
    ):
        slide.scale(64, 0.25)


def test_a_region_that_cannot_be_decoded_costs_only_itself(tmp_path):
    image = painted(768, 256, PINK)
    with Slide(spoil(write_slide(tmp_path / "a.tif", image), 1)) as slide:
        scale = slide.scale(64, None)
        with pytest.raises(RegionError) as caught:
            slide.read(230, 0, 64, scale)
        after = slide.read(512, 0, 64, scale)

    assert caught.value.reason == "unreadable"
    np.testing.assert_array_equal(after, image[:64, 512:576])


def test_a_slide_that_is_gone_is_told_as_such_at_every_read(tmp_path):
    path = spoil(write_slide(tmp_path / "a.tif", painted(512, 256, PINK)), 1)
    with Slide(path) as slide:
        scale = slide.scale(64, None)
        path.unlink()
        for x in (256, 256, 0):
            with pytest.raises(SlideError, match=r"a\.tif: cannot be read \(No such") as caught:
                slide.read(x, 0, 64, scale)
            assert not isinstance(caught.value, RegionError)


def test_transparent_pixels_are_not_there(tmp_path):
    path = write_slide(tmp_path / "a.tif", painted(300, 300, PINK))
    with Slide(path) as slide, pytest.raises(RegionError) as caught:
        slide.read(270, 0, 64, slide.scale(64, None))

    assert caught.value.reason == "transparent"


def test_an_overview_averages_areas_and_knows_what_it_could_not_read(tmp_path):
    image = half_tissue(1024, 512)
    path = write_slide(tmp_path / "a.tif", image)
    with Slide(path) as slide:
        view = slide.overview(16)
    oracle = image.reshape(32, 16, 64, 16, 3).mean(axis=(1, 3))
    assert np.abs(view.rgb - oracle).max() <= 0.51
    assert view.there.all()
    assert view.known.all()

    with Slide(spoil(path, 5)) as slide:  # second row, second column of 256-px blocks
        spoilt = slide.overview(16)
    lost = np.zeros((32, 64), bool)
    lost[16:, 16:32] = True
    np.testing.assert_array_equal(spoilt.known, ~lost)
    np.testing.assert_array_equal(spoilt.rgb[~lost], view.rgb[~lost])


@pytest.mark.parametrize("factor", [3, 7, 11])
def test_an_overview_covers_sizes_that_do_not_divide(tmp_path, factor):
    image = painted(517, 301, GLASS)
    with Slide(write_slide(tmp_path / "a.tif", image)) as slide:
        view = slide.overview(factor)

    assert view.rgb.shape[:2] == (-(-301 // factor), -(-517 // factor))
    assert view.rgb.min() > 230


def test_damaged_files_are_refused_by_name(tmp_path, shared_data):
    empty = tmp_path / "empty.svs"
    empty.touch()
    text = tmp_path / "text.svs"
    text.write_text("no slide")
    cut = tmp_path / "cut.svs"
    whole = (shared_data / "wsi" / "CMU-1-Small-Region.svs").read_bytes()
    cut.write_bytes(whole[: len(whole) // 2])

    for path, why in [(empty, "is empty"), (text, "does not read"), (cut, "OpenSlide")]:
        with pytest.raises(SlideError, match=rf"{path.name}: .*{why}.*leave|{why}.*remove"):
            Slide(path)
    with pytest.raises(SlideError, match=r"gone\.svs: cannot be read"):
        Slide(tmp_path / "gone.svs")


def test_the_content_hash_is_sha256_and_covers_companions(tmp_path):
    slide = tmp_path / "a.svs"
    slide.write_bytes(b"one")
    assert content_hash(slide) == hashlib.sha256(b"one").hexdigest()

    other = tmp_path / "b.dcm"
    other.write_bytes(b"two")
    before = content_hash(slide, (other,))
    other.write_bytes(b"three")
    assert len({content_hash(slide), before, content_hash(slide, (other,))}) == 3
