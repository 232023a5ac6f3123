"""BACH's slides: windows, outlines filled exactly, and slides divided 5/3/2."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import openslide
import pytest
import tifffile
from made_images import noise
from made_tasks import opened
from skimage.measure import points_in_poly

from jaxhisto.errors import StoreError
from jaxhisto.task_config import TaskConfig
from jaxhisto.tasks.bach_slides import divide_slides, read_outlines
from jaxhisto.tasks.polygons import fill_polygon
from jaxhisto.tasks.splits import task_split
from jaxhisto.tasks.task import PARTS, open_task

APERIO = "Aperio Image Library v11.0.37\r\n{w}x{h} [0,0 {w}x{h}] (256x256)|AppMag = 40|MPP = 0.4670"
REGION = """<Region Id="{id}" Type="0" Zoom="0.1" NegativeROA="0" Text="{text}"><Attributes>
{attribute}</Attributes><Vertices>{vertices}</Vertices></Region>"""


def put_slide(folder: Path, name: str, image: np.ndarray, outlines) -> None:
    """A slide and its XML file as BACH has them; an outline is (text, attribute, points)."""
    folder.mkdir(parents=True, exist_ok=True)
    h, w = image.shape[:2]
    with tifffile.TiffWriter(folder / f"{name}.svs") as tiff:
        tiff.write(
            image,
            tile=(256, 256),
            photometric="rgb",
            compression="zlib",
            metadata=None,
            description=APERIO.format(w=w, h=h),
        )
    regions = "".join(
        REGION.format(
            id=i,
            text=text,
            attribute=f'<Attribute Name="Description" Id="0" Value="{attribute}"/>'
            * bool(attribute),
            vertices="".join(f'<Vertex X="{x}" Y="{y}"/>' for x, y in points),
        )
        for i, (text, attribute, points) in enumerate(outlines, 1)
    )
    (folder / f"{name}.xml").write_text(
        '<Annotations MicronsPerPixel="0.467000"><Annotation Id="1" Name="" Type="4">'
        f"<Attributes/><Regions><RegionAttributeHeaders/>{regions}</Regions><Plots/>"
        "</Annotation></Annotations>"
    )


def box(left, top, right, bottom):
    return [(left, top), (right, top), (right, bottom), (left, bottom)]


BLOB = [(130, 20), (250, 60.4), (300, 150), (190, 240), (120.6, 180)]
BLOB_ROUNDED = [(250, 60), (300, 150), (190, 240), (121, 180)]  # after the first


@pytest.fixture(scope="module")
def bach_slides(tmp_path_factory):
    """Ten slides of 300 x 560 px: windows of 128, so 2 x 4 each."""
    folder = tmp_path_factory.mktemp("bach") / "ICIAR2018_BACH_Challenge" / "WSI"
    for i in range(1, 11):
        outlines = [
            ("", "Benign", box(0, 0, 99, 49)),
            ("Carcinoma in situ", "", box(40, 20, 59, 39)),
            ("", "Carcinoma invasive", BLOB),
        ]
        put_slide(folder, f"A{i:02}", noise(300, 560, i), outlines)
    return folder


def test_bach_slides_in_windows(bach_slides):
    task = opened("bach_segmentation", bach_slides.parent.parent, window=128)
    assert task.classes == ("Normal", "Benign", "InSitu", "Invasive")
    assert len(task) == 80
    assert task.names[:3] == ("A01.svs y0 x0", "A01.svs y0 x128", "A01.svs y0 x256")
    np.testing.assert_array_equal(task.images.read(8 + 5), noise(300, 560, 2)[128:256, 128:256])
    rows = [(7 * i) % 80 for i in range(80)]  # from slide to slide, by several threads
    for i, pixels in zip(rows, task.load(rows, 128, threads=4), strict=True):
        window = task.windows[i]
        slide = noise(300, 560, int(window.source[1:3]))
        cut = slide[window.y : window.y + 128, window.x : window.x + 128]
        np.testing.assert_array_equal(pixels, cut)
    mask = np.zeros((256, 512), np.uint8)
    for i, window in enumerate(task.windows[:8]):
        mask[window.y : window.y + 128, window.x : window.x + 128] = task.masks.read(i)
    np.testing.assert_array_equal(mask == 3, inside(mask.shape, [(130, 20), *BLOB_ROUNDED]))
    assert (mask == 2).sum() == 19 * 19
    assert (mask == 1).sum() == 99 * 49 - 19 * 19


def inside(shape, points):
    """scikit-image's answer for the centre of each pixel, of those on an edge just right of it."""
    rows, columns = np.mgrid[: shape[0], : shape[1]] + 0.5
    found = points_in_poly(np.stack([columns.reshape(-1) + 1e-6, rows.reshape(-1)], 1), points)
    return found.reshape(shape)


@pytest.mark.parametrize("seed", range(6))
def test_polygons_that_cross_themselves_and_the_edges(seed):
    points = np.random.default_rng(seed).integers(-30, 90, (9, 2))
    mask = np.zeros((50, 60), np.uint8)
    fill_polygon(mask, points, 7)
    np.testing.assert_array_equal(mask == 7, inside(mask.shape, points))
    assert 0 < (mask == 7).mean() < 1
    fill_polygon(mask, points + 500, 9)
    assert not (mask == 9).any()


def test_bach_slides_are_divided_five_three_two(bach_slides):
    task = opened("bach_segmentation", bach_slides, window=128)
    split = task_split(task, TaskConfig())
    assert split is task.fixed
    held = [{task.groups[i] for i in split.part(p)} for p in PARTS]
    assert [len(h) for h in held] == [5, 3, 2]
    assert len(set.union(*held)) == 10
    other = opened("bach_segmentation", bach_slides, window=128, split_seed=1)
    assert other.fixed.sha256 != split.sha256
    named = TaskConfig(
        layout="bach_segmentation", data=str(bach_slides), window=128, test=("A03.svs",)
    )
    assert {task.groups[i] for i in task_split(open_task(named), named).test} == {"A03.svs"}
    annotated = opened("bach_segmentation", bach_slides, window=128, windows="annotated")
    assert all(annotated.masks.read(i).any() for i in range(len(annotated)))
    touched = [task.names[i] for i in range(80) if task.masks.read(i).any()]
    assert list(annotated.names) == touched
    assert f"{80 - len(touched)} windows without annotation left out" in annotated.notes


def test_slides_are_drawn_until_every_part_has_every_class():
    labels = {f"A{i:02}.svs": {3} | ({1, 2} if i in (2, 5, 8) else set()) for i in range(1, 11)}
    for seed in range(4):
        parts = divide_slides(labels, seed)
        assert [len(p) for p in parts] == [5, 3, 2]
        assert all(set().union(*(labels[s] for s in part)) == {1, 2, 3} for part in parts)
    assert [len(p) for p in divide_slides({"a": {1}, "b": {1}, "c": {1}}, 0)] == [1, 1, 1]
    with pytest.raises(StoreError, match=r"2 slides .* cannot make three parts"):
        divide_slides({"a": {1}, "b": {1}}, 0)


def test_windows_of_a_real_slide(shared_data, tmp_path):
    (tmp_path / "A01.svs").symlink_to(shared_data / "wsi" / "CMU-1-Small-Region.svs")
    put_slide(
        tmp_path / "made", "A01", noise(256, 256), [("Benign", "", box(900, 900, 1500, 1100))]
    )
    (tmp_path / "made" / "A01.xml").rename(tmp_path / "A01.xml")
    (tmp_path / "made" / "A01.svs").unlink()
    task = opened("bach_segmentation", tmp_path, test=("A01.svs",))
    assert len(task) == 2 * 2  # 2220 x 2967 px
    pixels = task.images.read(1)
    with openslide.OpenSlide(tmp_path / "A01.svs") as slide:
        region = np.asarray(slide.read_region((1000, 0), 0, (1100, 1100)))
    np.testing.assert_array_equal(pixels, region[:1024, 24 : 24 + 1024, :3])
    assert sum(int(task.masks.read(i).sum()) for i in range(4)) == 600 * 200
    assert int(task.masks.read(3).sum()) == (1500 - 1024) * (1100 - 1024)


@pytest.mark.parametrize(
    ("outline", "match"),
    [
        (("", "Necrosis", box(0, 0, 9, 9)), "region 1 is called 'necrosis'"),
        (("Benign", "Carcinoma in situ", box(0, 0, 9, 9)), "region 1 is called 'benign carcinoma"),
        (("Benign", "", [("", 0), (9, 9), (3, 3)]), "region 1 has a vertex without X and Y"),
    ],
)
def test_outlines_that_are_refused(tmp_path, outline, match):
    put_slide(tmp_path, "A01", noise(256, 256), [outline])
    with pytest.raises(StoreError, match=match):
        read_outlines(tmp_path / "A01.xml")
    (tmp_path / "A01.xml").write_text("<Annotations>")
    with pytest.raises(StoreError, match="cannot be read as XML"):
        read_outlines(tmp_path / "A01.xml")


def test_regions_that_enclose_nothing_are_told(tmp_path):
    slips = [("", "", [(0, 0), (9, 9)]), ("Benign", "", [(3, 3)]), ("Benign", "", box(0, 0, 9, 9))]
    put_slide(tmp_path, "A01", noise(20, 20), slips)
    left_out: list[str] = []
    assert len(read_outlines(tmp_path / "A01.xml", left_out)) == 1
    assert left_out == ["A01.xml region 1", "A01.xml region 2"]
    text = (tmp_path / "A01.xml").read_text()
    (tmp_path / "A01.xml").write_text(text.replace('Id="3" Type="0"', 'Id="3" Type="4"'))
    assert read_outlines(tmp_path / "A01.xml") == []  # a ruler
    (tmp_path / "A01.xml").write_text(text.replace('Id="1" Type="0"', 'Id="1" Type="2"'))
    with pytest.raises(StoreError, match="region 1 is an ellipse"):
        read_outlines(tmp_path / "A01.xml")
    for i in range(1, 4):
        outlines = [("Benign", "", box(0, 0, 9, 9)), ("", "", [(1, 1)])]
        put_slide(tmp_path / "set", f"A{i:02}", noise(20, 20), outlines)
    notes = opened("bach_segmentation", tmp_path / "set", window=16).notes
    assert "3 regions that enclose nothing: A01.xml region 2, A02.xml region 2, A03.xml" in notes[2]


def test_slides_that_are_refused(tmp_path):
    for i in (1, 2, 3):
        put_slide(tmp_path, f"A0{i}", noise(256, 256), [("Benign", "", box(0, 0, 99, 99))])
    assert len(opened("bach_segmentation", tmp_path, window=256)) == 3
    with pytest.raises(StoreError, match=r"A01\.svs: is smaller than a window of 1024 px"):
        opened("bach_segmentation", tmp_path)
    (tmp_path / "A02.svs").write_bytes(b"no slide")
    with pytest.raises(StoreError, match=r"A02\.svs: is no slide that OpenSlide reads"):
        opened("bach_segmentation", tmp_path, window=256)
    (tmp_path / "A02.xml").unlink()
    with pytest.raises(StoreError, match=r"1 slides have no XML file beside them \(A02\.svs\)"):
        opened("bach_segmentation", tmp_path, window=256)
    (tmp_path / "empty").mkdir()
    with pytest.raises(StoreError, match=r"no slides A01\.svs to A10\.svs in here"):
        opened("bach_segmentation", tmp_path / "empty")
    with pytest.raises(StoreError, match="nowhere: does not exist"):
        opened("bach_segmentation", tmp_path / "nowhere")
