"""The um/px ladder: which statement is taken, and what is refused."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest

from jaxhisto.errors import SlideError
from jaxhisto.slides.pixel_size import GivenPixelSize, pixel_size

MPP = {"openslide.mpp-x": "0.25", "openslide.mpp-y": "0.2501"}
TIFF = {"tiff.ResolutionUnit": "inch", "tiff.XResolution": "50800", "tiff.YResolution": "50800"}
PRINTED = TIFF | {"tiff.XResolution": "72", "tiff.YResolution": "72"}


@pytest.mark.parametrize(
    ("properties", "given", "mpp", "source"),
    [
        (MPP | TIFF, GivenPixelSize(1.0), 0.25005, "openslide.mpp"),
        ({"aperio.MPP": "0,2520"}, GivenPixelSize(1.0), 0.252, "aperio.MPP"),
        (TIFF, GivenPixelSize(1.0), 0.5, "tiff-resolution"),
        (MPP | {"openslide.vendor": "generic-tiff"}, GivenPixelSize(), 0.25005, "tiff-resolution"),
        ({"openslide.objective-power": "40"}, GivenPixelSize(1.0), 0.25, "objective-power"),
        ({}, GivenPixelSize(0.3), 0.3, "flag"),
        ({}, GivenPixelSize(0.3, "assumed"), 0.3, "assumed"),
        # implausible statements are passed over
        ({"openslide.mpp-x": "0", "openslide.mpp-y": "0"}, GivenPixelSize(0.3), 0.3, "flag"),
        ({"openslide.mpp-x": "1000", "openslide.mpp-y": "1000"}, GivenPixelSize(0.3), 0.3, "flag"),
        ({"openslide.mpp-x": "0.25", "openslide.mpp-y": "0.5"}, GivenPixelSize(0.3), 0.3, "flag"),
        ({"openslide.mpp-x": "nan"} | TIFF, GivenPixelSize(), 0.5, "tiff-resolution"),
        # 72 dpi is a printer's figure, not a microscope's
        (PRINTED, GivenPixelSize(0.3), 0.3, "flag"),
        # 300 dpi is 85 um/px: plausible for a scanner's word, not for a TIFF tag
        (
            {"openslide.vendor": "generic-tiff", "openslide.mpp-x": "84.7"},
            GivenPixelSize(0.3),
            0.3,
            "flag",
        ),
    ],
)
def test_the_first_plausible_rung_is_taken(properties, given, mpp, source):
    size = pixel_size(Path("a.svs"), properties, given)

    assert size.mpp == pytest.approx(mpp)
    assert size.source == source


def test_what_is_passed_over_is_told():
    size = pixel_size(Path("a.svs"), {"openslide.mpp-x": "1000"}, GivenPixelSize(0.3))

    assert size.notes == ("openslide.mpp states 1000 x 1000 um/px, which is not plausible",)


def test_a_list_names_slides_and_beats_the_flag(tmp_path):
    (tmp_path / "mpp.csv").write_text("slide,mpp\nsub/a.svs,0.4\nb.svs,0.5\n")
    given = GivenPixelSize(1.0, folders=(tmp_path / "sub", tmp_path))

    assert pixel_size(tmp_path / "sub" / "a.svs", {}, given).mpp == 0.4
    assert pixel_size(tmp_path / "sub" / "b.svs", {}, given).source == "mpp.csv"
    assert pixel_size(tmp_path / "sub" / "c.svs", {}, given).source == "flag"


def test_the_files_own_word_beats_the_list_and_says_so(tmp_path):
    (tmp_path / "mpp.csv").write_text("slide,mpp\na.svs,0.4\n")
    size = pixel_size(tmp_path / "a.svs", MPP, GivenPixelSize(folders=(tmp_path,)))

    assert size.source == "openslide.mpp"
    assert size.notes == ("mpp.csv says 0.4 um/px; the file's own 0.25005 was taken",)


def test_no_pixel_size_is_refused_with_the_remedy():
    with pytest.raises(SlideError, match=r"a\.svs: .*pass --mpp 0\.25.*mpp\.csv"):
        pixel_size(Path("a.svs"), {}, GivenPixelSize())


@pytest.mark.parametrize("text", ["slide,mpp\na.svs,0\n", "slide,mpp\na.svs,\n", "a.svs;0.5\n"])
def test_a_bad_list_is_refused(tmp_path, text):
    (tmp_path / "mpp.csv").write_text(text)

    with pytest.raises(SlideError, match=r"mpp\.csv"):
        pixel_size(tmp_path / "a.svs", {}, GivenPixelSize(1.0, folders=(tmp_path,)))


def test_a_long_list_is_read_once_until_it_changes(tmp_path, monkeypatch):
    """A quarter of a second for each of 25 thousand slides would be two hours."""
    table = tmp_path / "mpp.csv"
    table.write_text("slide,mpp\na.svs,0.5\nb.svs,0.25\n", encoding="utf-8")
    given, read = GivenPixelSize(folders=(tmp_path,)), []
    reader = csv.DictReader
    monkeypatch.setattr(csv, "DictReader", lambda file: read.append(1) or reader(file))

    def sizes() -> list[float]:
        return [pixel_size(tmp_path / name, {}, given).mpp for name in ("a.svs", "b.svs")]

    assert (sizes(), len(read)) == ([0.5, 0.25], 1)
    table.write_text("slide,mpp\na.svs,0.5\nb.svs,0.125\n", encoding="utf-8")
    assert (sizes(), len(read)) == ([0.5, 0.125], 2)
