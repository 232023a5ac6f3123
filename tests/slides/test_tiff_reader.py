"""TIFFs that OpenSlide refuses: pixels against the arrays that tifffile was given to write."""

from __future__ import annotations

import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import openslide
import pytest
import tifffile
from made_slides import PINK, half_tissue, painted, spoil

from jaxhisto.config import TileConfig
from jaxhisto.data.store import TileStore
from jaxhisto.errors import SlideError
from jaxhisto.slides import reader, tiff_reader
from jaxhisto.slides.pixel_size import GivenPixelSize
from jaxhisto.slides.reader import RegionError, Slide
from jaxhisto.slides.tiff_reader import TiffHandle
from jaxhisto.slides.tiling import tile

GIVEN = GivenPixelSize(0.5)
REDUCED = {"subfiletype": 1, "tile": (64, 64), "photometric": "rgb", "compression": "zlib"}


def halved(image: np.ndarray) -> np.ndarray:
    h, w = image.shape[0] // 2 * 2, image.shape[1] // 2 * 2
    return np.rint(image[:h, :w].reshape(h // 2, 2, w // 2, 2, -1).mean(axis=(1, 3))).astype("u1")


def write_ome(path: Path, image: np.ndarray, levels: int = 1, **metadata: object) -> Path:
    """A BigTIFF with OME-XML, the levels below the first as SubIFDs, as Bio-Formats has them."""
    with tifffile.TiffWriter(path, bigtiff=True, ome=True) as tiff:
        tiff.write(
            image, subifds=levels - 1, tile=(64, 64), photometric="rgb", compression="zlib",
            metadata={"axes": "YXS", **metadata},
        )  # fmt: skip
        for _ in range(levels - 1):
            image = halved(image)
            tiff.write(image, **REDUCED)
    return path


def noise(height: int, width: int, channels: int = 3) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, channels), np.uint8)


LAYOUTS = {
    "strips": {"rowsperstrip": 7, "compression": "zlib"},
    "predicted": {"rowsperstrip": 16, "compression": "lzw", "predictor": True},
    "one strip": {"rowsperstrip": 201, "compression": "zlib"},
    "raw": {"compression": None},
    "planes": {"planarconfig": "separate", "tile": (64, 64), "compression": "zlib"},
    "plane strips": {"planarconfig": "separate", "rowsperstrip": 50},
    "big-endian BigTIFF": {"rowsperstrip": 9, "compression": "zstd"},
    "lossless JPEG2000": {"tile": (64, 64), "compression": "jpeg2000"},
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_reads_as_it_was_written(tmp_path, layout, monkeypatch):
    monkeypatch.setattr(reader, "open_handle", TiffHandle)  # OpenSlide takes some of them
    image = noise(201, 301)
    path, planar = tmp_path / "a.tif", "planarconfig" in LAYOUTS[layout]
    with tifffile.TiffWriter(
        path, bigtiff="Big" in layout, byteorder=">" if "Big" in layout else "<"
    ) as t:
        t.write(np.moveaxis(image, 2, 0) if planar else image, photometric="rgb", **LAYOUTS[layout])
    with Slide(path, GIVEN) as slide:
        assert (slide.width, slide.height) == (301, 201)
        scale = slide.scale(64, None)
        for x, y in [(0, 0), (237, 137), (60, 63), (1, 130)]:
            np.testing.assert_array_equal(
                slide.read(x, y, 64, scale), image[y : y + 64, x : x + 64]
            )
        with pytest.raises(RegionError) as caught:
            slide.read(250, 0, 64, scale)
        assert caught.value.reason == "transparent"
        view = slide.overview(1)
    np.testing.assert_array_equal(view.rgb, image)
    assert view.there.all()


def test_the_pyramid_of_an_ome_tiff_is_read(tmp_path):
    image = noise(500, 700)
    path = write_ome(tmp_path / "a.ome.tif", image, 3, PhysicalSizeX=250, PhysicalSizeXUnit="nm",
                     PhysicalSizeY=0.25)  # fmt: skip
    assert openslide.OpenSlide(path).level_count == 1  # what OpenSlide alone would give
    with Slide(path) as slide:
        assert (slide.mpp, slide.mpp_source) == (0.25, "ome.PhysicalSize")
        assert slide.downsamples == pytest.approx((1, 2, 4))
        for level, mpp in enumerate((0.25, 0.5, 1.0)):
            scale = slide.scale(48, mpp)
            assert scale.level == level
            x, y = 64, 128
            expected = image[y : y + 48 * 2**level, x : x + 48 * 2**level]
            for _ in range(level):
                expected = halved(expected)
            np.testing.assert_array_equal(slide.read(x, y, 48, scale), expected)


def test_reduced_pages_after_the_first_are_levels_too(tmp_path):
    image, path = noise(300, 400), tmp_path / "a.tif"
    with tifffile.TiffWriter(path) as tiff:
        tiff.write(image, photometric="rgb", rowsperstrip=16, compression="zlib")
        tiff.write(halved(image), photometric="rgb", rowsperstrip=16, subfiletype=1)
    with Slide(path, GIVEN) as slide:
        assert slide.downsamples == (1, 2)
        tile_ = slide.read(40, 60, 64, slide.scale(64, 1.0))
    np.testing.assert_array_equal(tile_, halved(image)[30:94, 20:84])


def test_jpeg_tiles_decode_as_tifffile_decodes_them(tmp_path):
    path = tmp_path / "a.ome.tif"
    tifffile.imwrite(path, half_tissue(400, 300), ome=True, tile=(128, 128), photometric="rgb",
                     compression="jpeg")  # fmt: skip
    with Slide(path, GIVEN) as slide:
        tile_ = slide.read(90, 70, 200, slide.scale(200, None))
    np.testing.assert_array_equal(tile_, tifffile.imread(path)[70:270, 90:290])


def test_only_the_pieces_under_a_region_are_decoded(tmp_path, monkeypatch):
    path = write_ome(tmp_path / "a.ome.tif", noise(640, 640))
    decoded = []
    real = tiff_reader.TiffHandle._decoded
    monkeypatch.setattr(
        tiff_reader.TiffHandle,
        "_decoded",
        lambda self, at, i: (decoded.append(i), real(self, at, i))[1],
    )
    with Slide(path, GIVEN) as slide:
        assert decoded == []
        slide.read(64, 64, 65, slide.scale(65, None))
        assert decoded == [11, 12, 21, 22]
        slide.read(64, 64, 60, slide.scale(60, None))
        assert len(decoded) == 4


def test_memory_stays_at_the_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(tiff_reader, "CACHE", 64 * 64 * 3 * 5)
    image = noise(640, 640)
    with Slide(write_ome(tmp_path / "a.ome.tif", image), GIVEN) as slide:
        np.testing.assert_array_equal(slide.overview(1).rgb, image)
        kept = list(slide._handle._cache.values())
        assert sum(p.nbytes for p in kept) == slide._handle._cached == tiff_reader.CACHE


@pytest.mark.parametrize(
    ("sizes", "mpp", "source"),
    [
        ({"PhysicalSizeX": 0.25, "PhysicalSizeY": 0.251}, 0.2505, "ome.PhysicalSize"),
        ({"PhysicalSizeX": 2.5e-4, "PhysicalSizeXUnit": "mm"}, 0.25, "ome.PhysicalSize"),
        ({"PhysicalSizeX": 0.25, "PhysicalSizeXUnit": "pixel"}, 0.7, "flag"),
        ({"PhysicalSizeX": 0.25, "PhysicalSizeY": 0.5}, 0.7, "flag"),
        ({"PhysicalSizeX": 0.0, "PhysicalSizeY": 0.0}, 0.7, "flag"),
        ({"PhysicalSizeX": 1000, "PhysicalSizeY": 1000}, 0.7, "flag"),
        ({}, 0.7, "flag"),
    ],
)
def test_the_ladder_holds_for_ome(tmp_path, sizes, mpp, source):
    path = write_ome(tmp_path / "a.ome.tif", noise(64, 64), **sizes)
    with Slide(path, GivenPixelSize(0.7)) as slide:
        assert (slide.mpp, slide.mpp_source) == (pytest.approx(mpp), source)
        implausible = bool(sizes) and source == "flag" and "PhysicalSizeXUnit" not in sizes
        assert ["ome.PhysicalSize states" in note for note in slide.notes] == [True] * implausible
    if source == "flag":
        with pytest.raises(SlideError, match=r"a\.ome\.tif: the file has no usable pixel size"):
            Slide(path)


def test_resolution_tags_are_the_rung_below(tmp_path):
    for unit, per in [("CENTIMETER", 1e4), ("INCH", 25400)]:
        path = tmp_path / f"{unit}.tif"
        tifffile.imwrite(path, noise(64, 64), photometric="rgb", rowsperstrip=8,
                         resolution=(per / 0.5, per / 0.5), resolutionunit=unit)  # fmt: skip
        with Slide(path) as slide:
            assert (slide.mpp, slide.mpp_source) == (pytest.approx(0.5), "tiff-resolution")
    tifffile.imwrite(
        path, noise(64, 64), photometric="rgb", resolution=(300, 300), resolutionunit="INCH"
    )
    with pytest.raises(
        SlideError, match=r"no usable pixel size .*84.6667 um/px, which is not plaus"
    ):
        Slide(path)


REFUSED = {
    "uint16 pixels": (noise(64, 64).astype("u2"), {"photometric": "rgb"}),
    "CYX 5 x 64 x 64": (np.moveaxis(noise(64, 64, 5), 2, 0), {"axes": "CYX"}),
    "CYX 3 x 64 x 64": (np.moveaxis(noise(64, 64), 2, 0), {"axes": "CYX"}),
    "ZYXS 2 x 64 x 64 x 3": (np.stack([noise(64, 64)] * 2), {"photometric": "rgb", "axes": "ZYXS"}),
    "YX 64 x 64": (noise(64, 64)[..., 0], {}),
    "float32 pixels": (noise(64, 64).astype("f4"), {"photometric": "rgb"}),
}


@pytest.mark.parametrize("found", REFUSED)
def test_what_is_not_8_bit_rgb_is_refused_by_name(tmp_path, found):
    image, how = REFUSED[found]
    how = {"photometric": "minisblack", **how}
    axes = {"metadata": {"axes": how.pop("axes")}} if "axes" in how else {}
    tifffile.imwrite(tmp_path / "a.ome.tif", image, ome=True, **how, **axes)
    with pytest.raises(
        SlideError, match=rf"a\.ome\.tif: is not 8-bit RGB.*{found}.*; save it as 8-b"
    ):
        Slide(tmp_path / "a.ome.tif", GIVEN)


@pytest.mark.parametrize("found", ["16-bit RGB", "8-bit MINISBLACK"])
def test_openslide_is_not_let_to_make_rgb_of_other_pixels(tmp_path, found):
    image = noise(64, 64).astype("u2") if "16" in found else noise(64, 64)[..., 0]
    kind = found.partition(" ")[2].lower()
    tifffile.imwrite(tmp_path / "a.tif", image, photometric=kind, tile=(64, 64), metadata=None)
    assert openslide.OpenSlide.detect_format(tmp_path / "a.tif") == "generic-tiff"
    with pytest.raises(SlideError, match=rf"not 8-bit RGB, it holds {found} pixels; save"):
        Slide(tmp_path / "a.tif", GIVEN)


def test_alpha_is_kept_and_clear_tiles_are_not_there(tmp_path):
    image = noise(128, 128, 4)
    image[..., 3] = 255
    image[:, 64:, 3] = 0
    tifffile.imwrite(tmp_path / "a.tif", image, photometric="rgb", extrasamples=["unassalpha"])
    with Slide(tmp_path / "a.tif", GIVEN) as slide:
        scale = slide.scale(64, None)
        np.testing.assert_array_equal(slide.read(0, 0, 64, scale), image[:64, :64, :3])
        with pytest.raises(RegionError) as caught:
            slide.read(64, 0, 64, scale)
    assert caught.value.reason == "transparent"


def test_one_piece_too_large_for_memory_is_refused_with_the_remedy(tmp_path):
    path = tmp_path / "a.tif"
    tifffile.imwrite(path, noise(64, 64), photometric="rgb", rowsperstrip=64, compression="zlib")
    with tifffile.TiffFile(path, mode="r+") as tiff:  # a header as a 40,000 px scan would have it
        for tag in ("ImageWidth", "ImageLength", "RowsPerStrip"):
            tiff.pages[0].tags[tag].overwrite(40000)
    with pytest.raises(
        SlideError, match=r"a\.tif: 40000 x 40000 px packed .* 4\.5 GiB.*vips tiffsave"
    ):
        Slide(path, GIVEN)


def test_damage_costs_a_region_and_a_broken_header_the_file(tmp_path):
    image = painted(768, 256, PINK)
    path = tmp_path / "a.ome.tif"
    tifffile.imwrite(path, image, ome=True, tile=(256, 256), photometric="rgb", compression="zlib")
    with Slide(spoil(path, 1), GIVEN) as slide:
        scale = slide.scale(32, None)
        with pytest.raises(
            RegionError, match=r"a\.ome\.tif: cannot be read at \(270, 0\)"
        ) as caught:
            slide.read(270, 0, 32, scale)
        assert caught.value.reason == "unreadable"
        np.testing.assert_array_equal(slide.read(530, 0, 32, scale), image[:32, 530:562])
        known = slide.overview(1).known
        assert known[:, :192].all()  # blocks are split to 192 px here
        assert not known[:, 256:512].any()
    whole = tmp_path / "b.tif"
    tifffile.imwrite(whole, image, photometric="rgb")
    whole.write_bytes(whole.read_bytes()[:-5000])
    with Slide(whole, GIVEN) as slide, pytest.raises(RegionError, match="the file ends before it"):
        slide.read(0, 224, 32, slide.scale(32, None))
    for cut in (4, 8, 60, 150):
        (tmp_path / "c.tif").write_bytes(path.read_bytes()[:cut])
        with pytest.raises(SlideError, match=r"c\.tif: "):
            Slide(tmp_path / "c.tif", GIVEN)


def test_a_cut_jpeg_tile_is_not_painted_grey(tmp_path):
    path = tmp_path / "a.ome.tif"
    tifffile.imwrite(path, half_tissue(128, 64), ome=True, tile=(64, 64), photometric="rgb",
                     compression="jpeg")  # fmt: skip
    with tifffile.TiffFile(path) as tiff:
        end = tiff.pages[0].dataoffsets[0] + tiff.pages[0].databytecounts[0]
    data = bytearray(path.read_bytes())
    data[end - 40 : end] = bytes(40)
    path.write_bytes(data)
    with Slide(path, GIVEN) as slide, pytest.raises(RegionError, match="a JPEG without its end"):
        slide.read(0, 0, 64, slide.scale(64, None))


def test_a_further_image_is_told(tmp_path):
    with tifffile.TiffWriter(tmp_path / "a.ome.tif", ome=True) as tiff:
        tiff.write(noise(40, 40), photometric="rgb")
        tiff.write(noise(200, 200), photometric="rgb")
        tiff.write(noise(180, 150), photometric="rgb")
    with Slide(tmp_path / "a.ome.tif", GIVEN) as slide:
        assert (slide.width, slide.height) == (200, 200)
        assert slide.notes == ("holds 1 further images of a like size, which are not cut",)


def test_random_header_damage_is_always_one_sentence(tmp_path):
    path = write_ome(tmp_path / "a.ome.tif", noise(130, 130), 2, PhysicalSizeX=0.5)
    whole, rng = path.read_bytes(), np.random.default_rng(1)
    ifd = struct.unpack_from("<Q", whole, 8)[0]
    said = []
    for _ in range(300):
        data = bytearray(whole)
        for at in ifd + rng.integers(0, 450, 3):
            data[at] = rng.integers(256)
        path.write_bytes(data)
        try:
            with Slide(path, GIVEN) as slide:
                slide.read(0, 0, 32, slide.scale(32, None))
        except SlideError as error:
            said.append(str(error))
    assert len(said) > 50
    assert all(text.startswith(f"{path}: ") for text in said)


def test_without_imagecodecs_the_remedy_is_told(tmp_path):
    path = tmp_path / "a.ome.tif"
    tifffile.imwrite(
        path, noise(64, 64), ome=True, tile=(64, 64), photometric="rgb", compression="jpeg"
    )
    script = (
        "import sys; sys.modules['imagecodecs'] = None\n"
        "from pathlib import Path; from jaxhisto.slides.reader import Slide\n"
        f"Slide(Path({str(path)!r}))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert "is packed with JPEG, which needs imagecodecs; install it with `pip inst" in done.stderr


def test_tile_cuts_the_real_ome_tiff(tmp_path, shared_data):
    path = shared_data / "wsi" / "OS-1-detail.ome.tif"
    result = tile(
        TileConfig(slides=(str(path),), out=str(tmp_path / "store"), tile_px=256, max_tiles=0,
                   jpeg_quality=100, min_foreground=0.1, processes=1)
    )  # fmt: skip
    assert result.exit_code == 0
    record = result.manifest["slides"][0]
    assert (record["mpp"], record["mpp_source"]) == (
        pytest.approx(0.2271, abs=1e-4),
        "ome.PhysicalSize",
    )
    assert record["tiles"] + sum(record["rejected"].values()) == 25
    store, image = TileStore(tmp_path / "store"), tifffile.imread(path)
    assert len(store) > 10
    from jaxhisto.data.images import decode_jpeg

    for item in (store[i] for i in range(len(store))):
        x, y = item["x"], item["y"]
        cut = image[y : y + 256, x : x + 256].astype(int)
        assert np.abs(decode_jpeg(item["image"]) - cut).mean() < 4
