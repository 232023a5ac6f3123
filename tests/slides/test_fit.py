"""Does the detector fit: on painted stains, and what a user is told of it."""

from __future__ import annotations

import numpy as np
import pytest
from made_slides import BROWN, GLASS, PINK, painted, write_slide

from jaxhisto.config import TileConfig
from jaxhisto.errors import SlideError
from jaxhisto.slides.fit import fit_note
from jaxhisto.slides.foreground import foreground
from jaxhisto.slides.reader import Overview
from jaxhisto.slides.tiling import tile

BLUISH, GREY, GREEN_INK, RED_INK = (95, 110, 165), (150, 150, 150), (40, 170, 140), (214, 40, 60)


def view(*colours: tuple[int, int, int]) -> Overview:
    """Glass with a patch of 60 x 60 px of each colour."""
    rgb = painted(80 * len(colours) + 20, 100, GLASS)
    for n, colour in enumerate(colours):
        rgb[20:80, 20 + 80 * n : 80 + 80 * n] = painted(60, 60, colour, n)
    there = np.ones(rgb.shape[:2], bool)
    return Overview(rgb, there, there, 16.0)


def note(overview: Overview, detector: str = "ciga2022") -> str:
    return fit_note(overview, foreground(overview.rgb, detector, 8.0, 100.0), detector, 8.0)


def test_pink_fits():
    assert note(view(PINK)) == ""
    assert note(view(PINK), "od") == note(view(PINK), "otsu") == ""


@pytest.mark.parametrize(
    ("colour", "said"),
    [
        (BLUISH, "0% of what od calls tissue (bluish stain); try --foreground od"),
        (BROWN, "0% of what otsu calls tissue (brown); try --foreground otsu"),
        (GREY, "0% of what od calls tissue (grey); try --foreground od"),
    ],
)
def test_what_the_paper_rule_leaves_out_is_said_with_the_detector_that_takes_it(colour, said):
    assert note(view(colour)) == f"ciga2022 keeps {said}"
    # Half of it pink: half is kept.
    assert note(view(colour, PINK)).startswith("ciga2022 keeps 50% of what")
    assert note(view(colour, *[PINK] * 9)) == ""


def test_od_is_told_of_brown_and_otsu_of_grey():
    assert note(view(BROWN), "od") == (
        "od keeps 0% of what otsu calls tissue (brown); try --foreground otsu"
    )
    said = note(view(GREY), "otsu")
    assert said.startswith("otsu keeps")
    assert said.endswith("of what od calls tissue (grey); try --foreground od")


def test_ink_dirt_and_what_is_not_in_the_file_are_no_tissue():
    assert note(view(PINK, GREEN_INK)) == note(view(PINK, RED_INK)) == note(view()) == ""
    speck = view()
    speck.rgb[:2, :2] = BLUISH  # 4 of 2000 pixels
    assert note(speck) == ""
    speck.rgb[:2, :4] = BLUISH
    assert note(speck).endswith("try --foreground od")
    absent = view(PINK, BLUISH)
    absent.there[:, 90:] = False
    assert note(absent) == ""


def test_a_large_overview_is_judged_alike():
    small = view(BLUISH, PINK)
    rgb = np.kron(small.rgb, np.ones((12, 12, 1), np.uint8))
    there = np.ones(rgb.shape[:2], bool)
    large = Overview(rgb, there, there, 16.0)
    mask = foreground(rgb, "ciga2022", 8.0, 100.0)

    assert fit_note(large, mask, "ciga2022", 8.0).startswith("ciga2022 keeps 50% of what od")


def test_the_user_is_told_once_a_slide_and_where_there_is_no_tile(tmp_path):
    both = painted(1024, 512, PINK)
    both[:, 512:] = painted(512, 512, BLUISH)
    write_slide(tmp_path / "in" / "both.tif", both)
    write_slide(tmp_path / "in" / "pink.tif", painted(512, 512, PINK))
    config = TileConfig((str(tmp_path / "in"),), str(tmp_path / "s"), tile_px=64, processes=1)
    result = tile(config)

    (said,) = [line for line in result.summary() if "note:" in line]
    assert said == (
        "both.tif: note: ciga2022 keeps 50% of what od calls tissue (bluish stain); "
        "try --foreground od"
    )
    assert said.partition("note: ")[2] in (tmp_path / "s" / "report.html").read_text()

    write_slide(tmp_path / "blue" / "b.tif", painted(512, 512, BLUISH))
    config = TileConfig((str(tmp_path / "blue"),), str(tmp_path / "t"), tile_px=64, processes=1)
    with pytest.raises(
        SlideError, match=r"ciga2022 keeps 0% of what od .* try --foreground od, or"
    ):
        tile(config)
