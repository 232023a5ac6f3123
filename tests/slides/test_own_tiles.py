"""A slide's own tiles, JPEG here: OpenSlide's pixels, or none."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
from collections.abc import Iterable
from pathlib import Path

import cv2
import numpy as np
import openslide
import pytest
import tifffile
from made_slides import GLASS, half_tissue, painted, write_slide
from PIL import Image

from jaxhisto.config import TileConfig
from jaxhisto.data.store import UNFINISHED, TileStore
from jaxhisto.data.store_writer import StoreWriter, Tile, slide_key
from jaxhisto.errors import StoreError
from jaxhisto.slides import cutting, own_tiles, tile_codecs
from jaxhisto.slides.cutting import Job, cut_slide
from jaxhisto.slides.pixel_size import GivenPixelSize
from jaxhisto.slides.reader import RegionError, Slide
from jaxhisto.slides.tiling import tile

COLOURS = [("ycbcr", (1, 1)), ("ycbcr", (2, 1)), ("ycbcr", (2, 2)), ("rgb", (1, 1))]


def detailed(width: int, height: int, seed: int = 0) -> np.ndarray:
    """Tissue-like: pink and glass with spots of all colours."""
    spots = np.random.default_rng(seed).integers(0, 256, (height // 8 + 1, width // 8 + 1, 3))
    spots = cv2.resize(spots.astype(np.uint8), (width, height), interpolation=cv2.INTER_CUBIC)
    return (half_tissue(width, height, seed) * 0.7 + spots * 0.3).astype(np.uint8)


def write_jpeg_slide(
    path: Path,
    image: np.ndarray,
    colours: tuple[str, tuple[int, int]] = ("ycbcr", (2, 2)),
    levels: int = 1,
    side: int = 256,
) -> Path:
    """A tiled TIFF of JPEG tiles at 0.5 um/px, each level half of the one before."""
    photometric, subsampling = colours
    with tifffile.TiffWriter(path) as tiff:
        for level in range(levels):
            tiff.write(
                image, tile=(side, side), photometric=photometric, compression="jpeg",
                subsampling=subsampling, metadata=None, subfiletype=int(level > 0),
                resolution=(2e4, 2e4), resolutionunit="CENTIMETER",
            )  # fmt: skip
            image = cv2.resize(image, None, fx=0.5, fy=0.5, interpolation=cv2.INTER_AREA)
    return path


def place(path: Path, index: int, page: int = 0) -> tuple[int, int]:
    """Where a tile lies in the file: offset and length."""
    with tifffile.TiffFile(path) as tiff:
        return tiff.pages[page].dataoffsets[index], tiff.pages[page].databytecounts[index]


def theirs(path: Path, x: int, y: int, level: int, width: int, height: int) -> np.ndarray:
    with openslide.OpenSlide(path) as handle:
        return np.asarray(handle.read_region((x, y), level, (width, height)).convert("RGB"))


@pytest.mark.parametrize("colours", COLOURS)
def test_made_slides_are_read_as_openslide_reads_them(tmp_path, colours):
    path = write_jpeg_slide(tmp_path / "a.tif", detailed(1112, 776), colours, levels=2)
    with Slide(path) as slide:
        for level, x, y, width, height in [
            (0, 0, 0, 224, 224), (0, 300, 200, 512, 512), (0, 256, 256, 256, 256),
            (0, 1000, 700, 112, 76), (1, 0, 0, 556, 388), (1, 200, 100, 64, 64),
        ]:  # fmt: skip
            got = slide.own.region(level, x, y, width, height)
            assert got is not None
            np.testing.assert_array_equal(got, theirs(path, x, y, level, width, height))


@pytest.mark.parametrize("name", ["CMU-1-Small-Region.svs", "her2st_C2_pyramid.tiff"])
def test_real_slides_are_read_as_openslide_reads_them(shared_data, name):
    path = shared_data / "wsi" / name
    rng = np.random.default_rng(0)
    with Slide(path) as slide:
        for _ in range(8):
            x = int(rng.integers(0, slide.width - 300))
            y = int(rng.integers(0, slide.height - 300))
            got = slide.own.region(0, x, y, 300, 300)
            assert got is not None
            np.testing.assert_array_equal(got, theirs(path, x, y, 0, 300, 300))


def test_beyond_the_edge_and_between_pixels_openslide_reads(tmp_path):
    path = write_jpeg_slide(tmp_path / "a.tif", detailed(600, 500), levels=2)
    with Slide(path) as slide:
        assert slide.own.region(0, 500, 0, 100, 100) is not None
        assert slide.own.region(0, 501, 0, 100, 100) is None
        assert slide.own.region(0, 0, 401, 100, 100) is None
        assert slide.own.region(1, 2, 0, 100, 100) is not None
        assert slide.own.region(1, 1, 0, 100, 100) is None
        with pytest.raises(RegionError, match="holds no pixels"):
            slide.read(501, 0, 100, slide.scale(100, None))


@pytest.mark.parametrize("damage", ["flip", "fill", "cut"])
def test_of_damaged_tiles_openslide_decides(tmp_path, damage):
    path = write_jpeg_slide(tmp_path / "a.tif", detailed(768, 512))
    offset, count = place(path, 4)
    data = bytearray(path.read_bytes())
    if damage == "flip":
        data[offset + count // 2] ^= 0x5A
    elif damage == "fill":
        data[offset + count // 2 : offset + count - 2] = b"\xff" * (count - 2 - count // 2)
    else:
        data[offset + count // 2 : offset + count] = bytes(count - count // 2)
    path.write_bytes(data)
    with Slide(path) as slide:
        scale = slide.scale(256, None)
        for x, y in [(256, 256), (255, 200), (0, 0), (512, 256), (256, 0)]:
            try:
                expected = theirs(path, x, y, 0, 256, 256)
            except openslide.OpenSlideError:
                assert damage == "fill"
                with pytest.raises(RegionError) as caught:
                    slide.read(x, y, 256, scale)
                assert caught.value.reason == "unreadable"
            else:
                np.testing.assert_array_equal(slide.read(x, y, 256, scale), expected)
        if damage != "flip":  # of a changed byte the decoder need not see anything
            assert slide.own.region(0, 256, 256, 256, 256) is None
        assert slide.own.region(0, 0, 0, 256, 256) is not None


def test_a_level_that_never_decodes_is_given_up(tmp_path, monkeypatch):
    """Each region would be read twice by OpenSlide, and fail here between, to the slide's end."""

    def warns(*_: object, **__: object) -> np.ndarray:
        tried.append(1)
        raise ValueError("extraneous bytes")

    path, tried = write_jpeg_slide(tmp_path / "a.tif", detailed(512, 512)), []
    monkeypatch.setattr(tile_codecs.simplejpeg, "decode_jpeg", warns)
    with Slide(path) as slide:
        scale = slide.scale(50, None)
        for i in range(50):
            got = slide.read(5 * i, 7 * i, 50, scale)
    np.testing.assert_array_equal(got, theirs(path, 245, 343, 0, 50, 50))
    assert len(tried) == own_tiles.PATIENCE


def test_a_slide_with_missing_tiles_is_left_to_openslide(tmp_path):
    path = write_jpeg_slide(tmp_path / "a.tif", detailed(768, 512))
    with tifffile.TiffFile(path, mode="r+") as tiff:
        counts = list(tiff.pages[0].databytecounts)
        counts[4] = 0
        tiff.pages[0].tags["TileByteCounts"].overwrite(counts)
    with Slide(path) as slide:
        assert slide.own.region(0, 0, 0, 256, 256) is None


def test_other_kinds_are_left_to_openslide(tmp_path):
    path = tmp_path / "a.tif"
    tifffile.imwrite(
        path, detailed(512, 512), tile=(256, 256), photometric="rgb", compression="zlib",
        resolution=(2e4, 2e4), resolutionunit="CENTIMETER", metadata=None,
    )  # fmt: skip
    with Slide(path, GivenPixelSize(0.25, "flag")) as slide:
        assert slide.own.region(0, 0, 0, 64, 64) is None


def test_a_decoder_of_other_pixels_is_found_out(tmp_path, monkeypatch):
    path = write_jpeg_slide(tmp_path / "a.tif", detailed(768, 512))
    decode = tile_codecs.simplejpeg.decode_jpeg
    monkeypatch.setattr(
        tile_codecs.simplejpeg, "decode_jpeg", lambda *a, **k: decode(*a, **k, fastupsample=True)
    )
    with Slide(path) as slide:
        got = slide.read(100, 100, 224, slide.scale(224, None))
        assert slide.own.region(0, 100, 100, 224, 224) is None
    np.testing.assert_array_equal(got, theirs(path, 100, 100, 0, 224, 224))


def test_glass_proves_nothing(tmp_path, monkeypatch):
    image = painted(768, 256, GLASS)
    image[:, 512:] = detailed(256, 256)
    path = write_jpeg_slide(tmp_path / "a.tif", image)
    codec = tile_codecs.simplejpeg
    decode = codec.decode_jpeg
    with Slide(path) as slide:
        assert slide.own.region(0, 0, 0, 256, 256) is not None
        monkeypatch.setattr(
            codec, "decode_jpeg", lambda *a, **k: decode(*a, **k, fastupsample=True)
        )
        assert slide.own.region(0, 512, 0, 256, 256) is None


def test_a_colour_tag_that_is_wrong_changes_nothing(tmp_path):
    for written, told in [("ycbcr", 2), ("rgb", 6)]:
        path = write_jpeg_slide(tmp_path / f"{written}.tif", detailed(512, 512), (written, (1, 1)))
        with tifffile.TiffFile(path, mode="r+") as tiff:
            tiff.pages[0].tags["PhotometricInterpretation"].overwrite(told)
        with Slide(path) as slide:
            got = slide.read(10, 10, 300, slide.scale(300, None))
        np.testing.assert_array_equal(got, theirs(path, 10, 10, 0, 300, 300))


def test_the_cache_is_bounded(tmp_path, monkeypatch):
    monkeypatch.setattr(own_tiles, "CACHE", 3 * 256 * 256 * 3)
    path = write_jpeg_slide(tmp_path / "a.tif", detailed(1024, 768))
    with Slide(path) as slide:
        got = slide.own.region(0, 0, 0, 1024, 768)
        assert len(slide.own._cache) == 3
    np.testing.assert_array_equal(got, theirs(path, 0, 0, 0, 1024, 768))


def settings(path: Path, out: Path, **changes: object) -> TileConfig:
    fixed = {"slides": (str(path),), "out": str(out), "dataset": "d", "tile_px": 100}
    return TileConfig(**{**fixed, "close_um": 0.0, **changes})


def cut(path: Path, out: Path, **changes: object) -> tuple[dict, str]:
    """The record of one slide, with its part's hash in it, and the hash of its report."""
    (out / UNFINISHED).mkdir(parents=True)
    record = cut_slide(
        Job(path, path.name, GivenPixelSize(), settings(path, out, **changes))
    ).record
    report = (out / "report" / f"{slide_key(path.name)}.html").read_bytes()
    return record, hashlib.sha256(report).hexdigest()


@pytest.mark.parametrize("changes", [{}, {"max_tiles": 20, "seed": 3}, {"tile_mpp": 1.3}])
def test_a_store_is_the_same_without_it(tmp_path, monkeypatch, changes):
    path = write_jpeg_slide(tmp_path / "a.tif", detailed(1500, 1100), levels=3)
    changes = {"foreground": "od", **changes}
    with_it = cut(path, tmp_path / "with", **changes)
    monkeypatch.setattr(tile_codecs, "simplejpeg", None)
    assert cut(path, tmp_path / "without", **changes) == with_it


def stored(out: Path) -> list[dict]:
    """The tiles of a store."""
    store = TileStore(out)
    return [store[i] for i in range(len(store))]


@pytest.mark.parametrize("colours", COLOURS)
def test_passthrough_keeps_the_slides_own_jpegs(tmp_path, colours):
    """What any decoder makes of a stored tile is what OpenSlide reads there."""
    path = write_jpeg_slide(tmp_path / "a.tif", detailed(1112, 776), colours, side=128)
    record, _ = cut(path, tmp_path / "out", tile_px=128, foreground="od", passthrough=True)
    assert record["tiles"] >= 10
    assert record["notes"] == [
        f"passthrough: {record['tiles']} of {record['tiles']} tiles are the slide's own JPEGs"
    ]
    with StoreWriter(tmp_path / "out", {}) as writer:
        writer.finish([record], {"dataset": "d", "tile_px": 128}, lambda _: "")
    raw = path.read_bytes()
    for kept in stored(tmp_path / "out"):
        x, y, data = int(kept["x"]), int(kept["y"]), kept["image"]
        expected = theirs(path, x, y, 0, 128, 128)
        by_opencv = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)
        np.testing.assert_array_equal(by_opencv[..., ::-1], expected)
        with Image.open(io.BytesIO(data)) as image:
            np.testing.assert_array_equal(np.asarray(image.convert("RGB")), expected)
        offset, count = place(path, y // 128 * 9 + x // 128)
        assert data.endswith(raw[offset + count - 1000 : offset + count])


def test_passthrough_of_real_slides_is_what_openslide_reads(shared_data, tmp_path):
    """Shared tables and RGB (Aperio), JFIF and YCbCr 4:2:0 (generic)."""
    for name, side in [("CMU-1-Small-Region.svs", 240), ("her2st_C2_pyramid.tiff", 256)]:
        path, count = shared_data / "wsi" / name, 0
        with Slide(path) as slide, openslide.OpenSlide(path) as plain:
            scale = slide.scale(side, None)
            for x in range(0, slide.width - side + 1, 3 * side):
                for y in range(0, slide.height - side + 1, 3 * side):
                    data = slide.copied(x, y, side, scale)
                    assert data is not None
                    got = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)[..., ::-1]
                    want = plain.read_region((x, y), 0, (side, side)).convert("RGB")
                    np.testing.assert_array_equal(got, np.asarray(want))
                    count += 1
        assert count >= 12


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"tile_px": 100}, "its JPEG tiles are 256 x 256 px"),
        ({"tile_px": 256, "tile_mpp": 0.7}, "they are resized from another um/px"),
    ],
)
def test_what_does_not_line_up_is_encoded_and_said(tmp_path, changes, why):
    path = write_jpeg_slide(tmp_path / "a.tif", detailed(1112, 776))
    changes = {"foreground": "od", **changes}
    plain, _ = cut(path, tmp_path / "plain", **changes)
    record, _ = cut(path, tmp_path / "out", passthrough=True, **changes)
    assert record.pop("notes") == [f"passthrough: all tiles are encoded anew, since {why}"]
    assert plain.pop("notes") == []
    assert record == plain


def test_a_damaged_tile_is_not_passed_through(tmp_path):
    path = write_jpeg_slide(tmp_path / "a.tif", detailed(768, 512))
    offset, count = place(path, 4)
    data = bytearray(path.read_bytes())
    data[offset + count // 2 : offset + count] = bytes(count - count // 2)
    path.write_bytes(data)
    with Slide(path) as slide:
        scale = slide.scale(256, None)
        assert slide.copied(0, 0, 256, scale) is not None
        assert slide.copied(256, 256, 256, scale) is None
        assert slide.copied(10, 0, 256, scale) is None


def test_passthrough_is_a_setting_of_the_store(tmp_path):
    path = write_jpeg_slide(tmp_path / "a.tif", detailed(768, 512))
    out = tmp_path / "store"
    plain = dataclasses.replace(settings(path, out, foreground="od"), processes=1)
    assert "passthrough" not in tile(plain).manifest["settings"]
    with pytest.raises(StoreError, match="passthrough None there, True now"):
        tile(dataclasses.replace(plain, passthrough=True))


@pytest.mark.parametrize(
    ("cap", "digest"),
    [
        (0, "ee1f8a45dbc8c743469b1389f2d93932e4aae05336cfab01e84c0a72af5a4b9d"),
        (30, "1687eb25d46b2386431005948bb2f1bea1a302c9905c62d41648e6cb5b0cd741"),
    ],
)
def test_which_tiles_in_which_order_is_settled(tmp_path, monkeypatch, cap, digest):
    """From the code before tiles were decoded here: pixels, places, order and counts.

    A store that was begun then is completed now. Lossless, and hashed before it is encoded, so
    that no version of a codec matters.
    """

    def hashed(store: Path, slide: str, tiles: Iterable[Tile]) -> dict[str, object]:
        sums, count = hashlib.sha256(), 0
        for each in tiles:
            sums.update(repr(dataclasses.astuple(each)).encode())
            count += 1
        return {"tiles": count, "bytes": 0, "sha256": sums.hexdigest(), "records": ""}

    monkeypatch.setattr(cutting, "encode_jpeg", lambda rgb, *_: rgb.tobytes())
    monkeypatch.setattr(cutting, "write_part", hashed)
    path = write_slide(tmp_path / "a.tif", half_tissue(1500, 1100), levels=2)
    record, _ = cut(path, tmp_path / "out", max_tiles=cap)
    assert record["rejected"].pop("pen") == 0  # not counted then, nor the sum of the records
    del record["part"]["records"]
    kept = {k: record[k] for k in ("tiles", "rejected", "foreground_share", "part")}
    assert hashlib.sha256(json.dumps(kept).encode()).hexdigest() == digest
