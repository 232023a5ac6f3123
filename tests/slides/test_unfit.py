"""What OpenSlide opens and reads otherwise than it is meant: refused, or left alone."""

from __future__ import annotations

import imagecodecs
import numpy as np
import openslide
import pytest
import tifffile
from made_slides import half_tissue, painted, write_slide

from jaxhisto.errors import SlideError
from jaxhisto.slides.pixel_size import GivenPixelSize
from jaxhisto.slides.reader import Slide

GIVEN = GivenPixelSize(0.5)
APERIO = "Aperio Image Library v12.0.0\n|MPP = 0.5"
SIDE = 128
RGB = painted(SIDE, SIDE, (180, 100, 170))
OTHERS = {
    "16-bit RGB": (RGB.astype(np.uint16) * 257, "rgb"),
    "8-bit MINISBLACK": (RGB[..., 0], "minisblack"),
    "8-bit SEPARATED": (np.dstack([RGB, RGB[..., :1]]), "separated"),
    "8-bit CIELAB": (RGB, "cielab"),
}


@pytest.mark.parametrize("description", [None, APERIO], ids=["generic-tiff", "aperio"])
@pytest.mark.parametrize("found", OTHERS)
def test_other_pixels_are_refused_of_whichever_maker(tmp_path, description, found):
    image, kind = OTHERS[found]
    path = tmp_path / "a.tif"
    tifffile.imwrite(
        path, np.ascontiguousarray(image), photometric=kind, tile=(64, 64), metadata=None,
        description=description, compression="zlib",
    )  # fmt: skip
    with openslide.OpenSlide(path) as handle:  # it makes RGB of each
        handle.read_region((0, 0), 0, (64, 64))
    with pytest.raises(SlideError, match=rf"a\.tif: is not 8-bit RGB, it holds {found} pixels; "):
        Slide(path, GIVEN)


@pytest.mark.parametrize(
    ("tile", "tag", "value", "said"),
    [
        ((64, 64), "PhotometricInterpretation", 99, "holds 8-bit photometric 99 pixels; save"),
        (None, "ImageLength", 0, "an image without pixels"),
        (None, "ImageWidth", 0, "an image without pixels"),
    ],
)
def test_damaged_tags_are_one_sentence(tmp_path, tile, tag, value, said):
    path = tmp_path / "a.tif"
    tifffile.imwrite(path, RGB, photometric="rgb", tile=tile, compression="zlib", metadata=None)
    with tifffile.TiffFile(path, mode="r+") as tiff:
        tiff.pages[0].tags[tag].overwrite(value)
    with pytest.raises(SlideError, match=rf"a\.tif: .*{said}"):
        Slide(path, GIVEN)


def test_a_tiled_label_is_no_level(tmp_path):
    """OpenSlide lists it as one, and would show the label where the tissue is looked for."""
    image, path = half_tissue(1200, 800), tmp_path / "a.tif"
    with tifffile.TiffWriter(path) as tiff:
        how = {"tile": (64, 64), "photometric": "rgb", "compression": "zlib", "metadata": None}
        tiff.write(image, **how)
        tiff.write(image[::2, ::2], subfiletype=1, **how)
        tiff.write(painted(80, 100, (180, 100, 170)), subfiletype=1, **how)
    with openslide.OpenSlide(path) as handle:
        assert handle.level_dimensions[2] == (80, 100)
    with Slide(path, GIVEN) as slide:
        assert slide.notes[-1].startswith("80 x 100 px of it have another shape than the slide")
        assert slide.scale(10, 100.0).level == 1
        view = slide.overview(12)
    assert view.rgb.shape == (67, 100, 3)
    assert view.rgb[:, 55:].min() > 200 > view.rgb[:, :45, 1].max()


def test_long_and_narrow_levels_are_levels(tmp_path):
    """Rounded to a few pixels on their short side, they are far from any proportion."""
    path = write_slide(tmp_path / "a.tif", painted(19, 4001, (180, 100, 170)), levels=4)
    with Slide(path) as slide:
        assert (len(slide.downsamples), slide.notes) == (4, ())
        assert slide.scale(10, 100.0).level == 3


@pytest.mark.parametrize("level", [0, 1])
def test_a_tile_of_more_bytes_than_memory_ends_no_process(tmp_path, level):
    """GLib aborts where OpenSlide asks it for so much: at the read, or at the opening."""
    path = tmp_path / "a.tif"
    with tifffile.TiffWriter(path, bigtiff=True) as tiff:
        for i in range(2):
            tiff.write(
                painted(256 >> i, 256 >> i, (180, 100, 170)), photometric="rgb", tile=(64, 64),
                compression="jpeg", subfiletype=int(i > 0), metadata=None,
            )  # fmt: skip
    with Slide(path, GIVEN) as slide:
        slide.read(64, 64, 64, slide.scale(64, None))
    with tifffile.TiffFile(path, mode="r+") as tiff:
        tag = tiff.pages[level].tags["TileByteCounts"]
        tag.overwrite([tag.value[0], 1 << 63, *tag.value[2:]], dtype=16)
    with pytest.raises(SlideError, match=r"a\.tif: states a tile of 9,223,372,036,854,775,808 byt"):
        Slide(path, GIVEN)


def coded(transformed: bool) -> bytes:
    return imagecodecs.jpeg2k_encode(RGB, codecformat="j2k", mct=transformed, reversible=True)


@pytest.mark.parametrize("kind", ["aperio", "stripped", "transformed", "ome"])
def test_aperios_ycbcr_is_never_taken_for_rgb(tmp_path, kind):
    """33003 is YCbCr where Aperio wrote it, RGB where Bio-Formats did; stripped of its
    description, nobody knows."""
    path = tmp_path / ("a.ome.tif" if kind == "ome" else "a.tif")
    ome = {"ome": True} if kind == "ome" else {"metadata": None}
    if kind == "aperio":
        ome["description"] = APERIO
    tifffile.imwrite(
        path, iter([coded(kind == "transformed")]), shape=RGB.shape, dtype=np.uint8,
        tile=(SIDE, SIDE), photometric="rgb", compression=33003, **ome,
    )  # fmt: skip
    if kind == "stripped":
        with pytest.raises(SlideError, match=r"a\.tif: is packed as Aperio packs YCbCr"):
            Slide(path, GIVEN)
        return
    with Slide(path, GIVEN) as slide:
        got = slide.read(0, 0, SIDE, slide.scale(SIDE, None))
    assert np.array_equal(got, RGB) == (kind != "aperio")
