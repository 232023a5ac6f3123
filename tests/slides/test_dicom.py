"""DICOM whole slides: pixels against the arrays and libjpeg, series and refusals by the verb."""

from __future__ import annotations

import io
import json
from pathlib import Path

import imagecodecs
import numpy as np
import pydicom
import pytest
from made_dicom import (
    LABEL,
    OVERVIEW,
    REDUCED,
    SPARSE,
    THUMBNAIL,
    new_series,
    tiles_of,
    write_ct,
    write_dicom,
)
from made_images import encoded
from made_slides import PINK, half_tissue, painted
from PIL import Image

from jaxhisto.cli import main
from jaxhisto.data.images import decode_jpeg
from jaxhisto.data.store import TileStore
from jaxhisto.errors import SlideError
from jaxhisto.slides.dicom import DicomHeader, dicom_header
from jaxhisto.slides.raster import SlideRaster
from jaxhisto.slides.reader import RegionError, Slide

JPEG, JPEG2000 = "1.2.840.10008.1.2.4.50", "1.2.840.10008.1.2.4.90"
JPEG_LS, HTJ2K, DEFLATED = (
    "1.2.840.10008.1.2.4.80",
    "1.2.840.10008.1.2.4.201",
    "1.2.840.10008.1.2.1.99",
)
IMPLICIT = "1.2.840.10008.1.2"


def jpeg(frame: np.ndarray) -> bytes:
    return encoded(frame, "JPEG", quality=90)


def lossless(frame: np.ndarray) -> bytes:
    return imagecodecs.jpeg2k_encode(frame, codecformat="j2k", reversible=True, mct=True)


JPEG_FRAMES = {"syntax": JPEG, "encode": jpeg, "photometric": "YBR_FULL_422"}


def write_series(folder: Path, name: str, image: np.ndarray, **how: object) -> Path:
    """Three levels at 0.25, 0.5 and 1 um/px, each a file that takes every other pixel, and what
    scanners put beside them."""
    folder.mkdir(parents=True, exist_ok=True)
    series = new_series(name)
    write_dicom(folder / f"{name}-a-thumbnail.dcm", image[::8, ::8], series, kind=THUMBNAIL)
    write_dicom(folder / f"{name}-b-label.dcm", painted(90, 60, PINK), series, kind=LABEL, side=96)
    write_dicom(
        folder / f"{name}-c-overview.dcm", painted(200, 90, PINK), series, kind=OVERVIEW, side=200
    )
    for level in (2, 1, 0):
        step = 2**level
        write_dicom(
            folder / f"{name}-level{level}.dcm", image[::step, ::step], series, mpp=0.25 * step,
            **({"kind": REDUCED} if level else {}), **how,
        )  # fmt: skip
    return folder / f"{name}-level0.dcm"


@pytest.mark.parametrize(
    "how",
    [
        {},
        {"organization": SPARSE},
        {"syntax": JPEG2000, "encode": lossless, "photometric": "YBR_RCT"},
    ],
    ids=["full", "sparse", "jpeg2000"],
)
def test_lossless_frames_come_back_as_written_on_every_level(tmp_path, how):
    image = half_tissue(512, 384)
    with Slide(write_series(tmp_path, "s", image, side=48, **how)) as slide:
        assert (slide.width, slide.height) == (512, 384)
        assert (slide.mpp, slide.mpp_source, slide.notes) == (0.25, "openslide.mpp", ())
        assert slide.downsamples == (1, 2, 4)
        for level, mpp in enumerate((0.25, 0.5, 1.0)):
            scale = slide.scale(48, mpp)
            assert scale.level == level
            reduced = image[:: 2**level, :: 2**level]
            tile = slide.read(40 * 2**level, 36 * 2**level, 48, scale)  # over four frames
            np.testing.assert_array_equal(tile, reduced[36:84, 40:88])
        corner = slide.area(0, 480, 344, 64, 80)

    np.testing.assert_array_equal(corner[:40, :32, :3], image[344:, 480:])
    assert corner[:40, :32, 3].min() == 255
    assert corner[40:].max() == corner[:, 32:].max() == 0  # the frames go on to the right


def test_no_tile_is_lost_where_frames_meet_between_pixels(tmp_path):
    """A level whose pixels begin between those of level 0 is interpolated, and its frames add up
    to a little less than one where they meet: that is no gap in the file."""
    image = painted(1001, 777, PINK)
    with Slide(write_series(tmp_path, "s", image, side=32)) as slide:
        assert not slide.downsamples[1].is_integer()
        scale = slide.scale(48, 0.5)
        for y in range(0, 777 - 100, 97):
            for x in range(0, 1001 - 100, 89):
                tile = slide.read(x, y, 48, scale).astype(int)
                written = image[y + 1 : y + 97 : 2, x + 1 : x + 97 : 2]
                assert np.abs(tile - written).max() <= 14  # of noise
        raster, there = SlideRaster(slide, 0.5).read(0, 300)

    assert there.all()
    assert np.abs(raster.astype(int) - PINK).max() <= 7


def test_jpeg_frames_are_what_libjpeg_makes_of_them(tmp_path):
    image = half_tissue(256, 192)
    path = write_dicom(tmp_path / "a.dcm", image, new_series("j"), **JPEG_FRAMES)
    with Slide(path) as slide:
        for i, frame in enumerate(tiles_of(image, 64)):
            tile = slide.area(0, i % 4 * 64, i // 4 * 64, 64, 64)
            oracle = np.asarray(Image.open(io.BytesIO(jpeg(frame))))
            np.testing.assert_array_equal(tile[..., :3], oracle)


def test_frames_that_a_sparse_file_leaves_out_are_not_there(tmp_path):
    image = half_tissue(256, 192)
    path = write_dicom(
        tmp_path / "a.dcm",
        image,
        new_series("s"),
        (0.5, 0.504),
        organization=SPARSE,
        left_out={1, 6},
    )
    with Slide(path) as slide:
        assert slide.mpp == pytest.approx(0.502)
        scale = slide.scale(64, None)
        np.testing.assert_array_equal(slide.read(0, 0, 64, scale), image[:64, :64])
        for x, y in [(64, 0), (128, 64), (100, 40)]:
            with pytest.raises(RegionError) as caught:
                slide.read(x, y, 64, scale)
            assert caught.value.reason == "transparent"


def spoil_frame(path: Path, frame: bytes) -> None:
    data = path.read_bytes()
    assert data.count(frame) == 1
    path.write_bytes(data.replace(frame, b"\xff\xd8" + b"\0" * (len(frame) - 2)))


@pytest.fixture(scope="module")
def cut(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict, int]:
    """A folder of good and bad series, cut by the verb: the store, its manifest, the exit code."""
    root = tmp_path_factory.mktemp("dicom")
    slides = root / "slides"
    write_series(slides / "both", "one", half_tissue(512, 384))
    write_series(slides / "both", "two", half_tissue(256, 384, 5), organization=SPARSE)
    write_ct(slides / "both" / "ct.dcm")
    write_series(slides / "gap", "gap", half_tissue(512, 384)).with_name("gap-level1.dcm").unlink()
    write_series(slides / "top", "top", half_tissue(512, 384)).unlink()
    spoilt = write_series(slides / "spoilt", "spoilt", half_tissue(512, 384), **JPEG_FRAMES)
    spoil_frame(spoilt, jpeg(tiles_of(half_tissue(512, 384), 64)[9]))
    ended = write_series(slides / "ended", "ended", half_tissue(512, 384))
    ended.write_bytes(ended.read_bytes()[:900])
    write_series(slides / "ls", "ls", half_tissue(512, 384), syntax=JPEG_LS,
                 encode=imagecodecs.jpegls_encode)  # fmt: skip
    for beside in (slides / "ls").glob("ls-[abc]-*"):
        beside.unlink()
    # Its frames are no HTJ2K: nothing gets so far as to look at them.
    write_dicom(slides / "ht.dcm", half_tissue(64, 64), new_series("ht"), syntax=HTJ2K, encode=jpeg)
    code = main([
        "tile", str(slides), "--out", str(root / "s"), "--tile-px", "32", "--processes", "1",
        "--failures-allowed", "4", "--dataset", "d",
    ])  # fmt: skip
    return root / "s", json.loads((root / "s" / "manifest.json").read_text()), code


def test_a_series_is_one_slide_and_what_lies_beside_it_none(cut):
    _, manifest, code = cut
    found = {s["id"]: (s["tiles"], s["mpp"], s["mpp_source"]) for s in manifest["slides"]}
    source = "openslide.mpp"

    assert code == 0
    assert found == {
        "both/one-a-thumbnail.dcm": (8 * 12, 0.25, source),  # the left half, 32-px cells
        "both/two-a-thumbnail.dcm": (4 * 12, 0.25, source),
        "gap/gap-a-thumbnail.dcm": (8 * 12, 0.25, source),
        "spoilt/spoilt-a-thumbnail.dcm": (8 * 12 - 4, 0.25, source),
        "ended/ended-a-thumbnail.dcm": (4 * 6, 0.5, source),
        "top/top-a-thumbnail.dcm": (4 * 6, 0.5, source),
    }


def test_what_a_series_lacks_is_told(cut):
    _, manifest, _ = cut
    notes = {s["id"].partition("/")[0]: s["notes"] for s in manifest["slides"]}

    assert not notes["both"]
    assert not notes["gap"]  # the levels that are there do
    assert notes["spoilt"] == ["4 cells cannot be read: the file is damaged or cut off there"]
    for name in ("top", "ended"):
        (note,) = notes[name]
        assert note.startswith("its finest level says that it was resampled from a finer one")


def test_each_file_or_series_that_cannot_be_read_is_one_failure_with_its_remedy(cut):
    _, manifest, _ = cut
    said = {f["slide"]: f["reason"] for f in manifest["failures"]}

    assert sorted(said) == ["both/ct.dcm", "ended/ended-level0.dcm", "ht.dcm", "ls/ls-level0.dcm"]
    other = "is DICOM, but no whole slide: its SOP class is 1.2.840.10008.5.1.4.1.1.2 (CT); leave"
    assert other in said["both/ct.dcm"]
    assert "the file is damaged or cut off: copy it again" in said["ended/ended-level0.dcm"]
    for name, packing in {"ht.dcm": "HTJ2K", "ls/ls-level0.dcm": "JPEG-LS"}.items():
        assert f"is packed as {packing} (DICOM transfer syntax 1.2.840.10008.1.2.4." in said[name]
        assert said[name].endswith("write it anew as JPEG, JPEG 2000 or uncompressed with explicit "
                                   "VR, or leave it out")  # fmt: skip


def test_the_tiles_are_those_of_level_0(cut):
    store, image = TileStore(cut[0]), half_tissue(512, 384)
    mine = [tile for tile in store if tile["slide"].startswith("both/one")]
    assert len({(tile["x"], tile["y"]) for tile in mine}) == 96
    for tile in mine:
        written = image[tile["y"] : tile["y"] + 32, tile["x"] : tile["x"] + 32]
        assert np.abs(decode_jpeg(tile["image"]).astype(int) - written).mean() < 6


def test_the_header_tells_series_and_packing_where_openslide_does_not(tmp_path):
    image, series = half_tissue(64, 64), new_series("h")
    for syntax in (IMPLICIT, JPEG):
        path = write_dicom(tmp_path / "a.dcm", image, series, syntax=syntax,
                           encode=jpeg if syntax == JPEG else None)  # fmt: skip
        assert dicom_header(path) == DicomHeader("1.2.840.10008.5.1.4.1.1.77.1.6", syntax, series)
    whole = path.read_bytes()
    for end in range(0, 900, 31):  # wherever it is cut, no error and no other series
        path.write_bytes(whole[:end])
        header = dicom_header(path)
        assert header is None or series.startswith(header.series)
    path.write_bytes(b"II*\0" * 50)
    assert dicom_header(path) is None


def test_a_frame_that_no_memory_holds_is_refused_before_it_is_decoded(tmp_path):
    path = write_dicom(tmp_path / "a.dcm", half_tissue(64, 64), new_series("l"), **JPEG_FRAMES)
    data = pydicom.dcmread(path)
    data.Rows = data.Columns = 65_000
    data.save_as(path)
    with pytest.raises(SlideError, match=r"\(dicom\) in pieces of 15\.7 GiB, too large"):
        Slide(path)


def test_slides_that_openslide_does_not_read_are_not_called_damaged(tmp_path):
    def refusal(path: Path, **changed: object) -> str:
        data = pydicom.dcmread(path)
        for name, value in changed.items():
            setattr(data, name, value)
        data.save_as(path)
        with pytest.raises(SlideError) as caught:
            Slide(path)
        assert "damaged" not in str(caught.value)
        return str(caught.value)

    image = half_tissue(64, 64)

    def one(name: str, **how: object) -> Path:
        (tmp_path / name).mkdir()
        return write_dicom(tmp_path / name / "a.dcm", image, new_series(name), **how)

    said = refusal(one("label", kind=LABEL))
    assert "a.dcm: is the label, overview or thumbnail of a DICOM series, of whose levels" in said
    assert "8-bit RGB and one focal plane" in refusal(one("z"), TotalPixelMatrixFocalPlanes=3)
    grey = {"SamplesPerPixel": 1, "PhotometricInterpretation": "MONOCHROME2"}
    assert "8-bit RGB and one focal plane" in refusal(one("grey"), **grey, PixelData=bytes(4096))
    twice = one("twice")
    write_dicom(twice.with_name("b.dcm"), image, new_series("twice"))
    assert "its series holds two images of one size" in refusal(twice)
