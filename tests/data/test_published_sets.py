"""The eight sets of the paper's App. C.1, each as a small tree in the form it is published in."""

from __future__ import annotations

import csv
from pathlib import Path

import cv2
import numpy as np
import openslide
import pytest
import tifffile
from made_images import encoded, noise
from PIL import Image
from skimage.measure import points_in_poly

from jaxhisto.data.bach_slides import divide_slides, read_outlines
from jaxhisto.data.digestpath import case
from jaxhisto.data.gleason import core_grade
from jaxhisto.data.polygons import fill_polygon
from jaxhisto.data.splits import task_split
from jaxhisto.data.tasks import PARTS, open_task
from jaxhisto.downstream_config import TaskConfig
from jaxhisto.errors import ConfigError, StoreError


def put(path: Path, image: np.ndarray, **options) -> Path:
    """Writes an image in the format of its suffix."""
    kind = {".tif": "TIFF", ".png": "PNG", ".jpg": "JPEG"}[path.suffix]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(encoded(image, kind, **options))
    return path


def put_rows(path: Path, rows) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        csv.writer(file).writerows(rows)
    return path


def opened(layout: str, folder: Path, **options):
    return open_task(TaskConfig(layout=layout, data=str(folder), **options))


@pytest.fixture
def bach(tmp_path):
    """ICIAR2018_BACH_Challenge/Photos as unpacked, four images a class."""
    photos = tmp_path / "ICIAR2018_BACH_Challenge" / "Photos"
    rows = []
    for label, short in (("Benign", "b"), ("InSitu", "is"), ("Invasive", "iv"), ("Normal", "n")):
        for i in range(1, 5):
            put(photos / label / f"{short}{i:03}.tif", noise(12, 16, i))
            rows.append((f"{short}{i:03}.tif", label))
        (photos / label / "Thumbs.db").write_bytes(b"left by the scanner's computer")
    put_rows(photos / "microscopy_ground_truth.csv", rows)
    return tmp_path


def test_bach(bach):
    task = opened("bach", bach)
    assert task.classes == ("Normal", "Benign", "InSitu", "Invasive")
    assert np.bincount(task.labels).tolist() == [4, 4, 4, 4]
    label = dict(zip(task.names, task.labels, strict=True))
    assert (label["Normal/n001.tif"], label["InSitu/is004.tif"]) == (0, 2)
    assert task.groups is None
    assert task.notes == ("published with 400 images, 16 here",)
    split = task_split(task, TaskConfig())
    assert [len(split.part(p)) for p in PARTS] == [8, 4, 4]
    assert opened("bach", bach / "ICIAR2018_BACH_Challenge" / "Photos").names == task.names
    assert opened("bach", bach, classes=("Normal", "Invasive")).classes == ("Normal", "Invasive")


def test_bach_whose_table_contradicts_the_folders(bach):
    photos = bach / "ICIAR2018_BACH_Challenge" / "Photos"
    table = photos / "microscopy_ground_truth.csv"
    text = table.read_text()
    table.write_text(text.replace("b002.tif,Benign", "b002.tif,Normal"))
    with pytest.raises(StoreError, match=r"calls b002\.tif Normal, but it lies in Benign"):
        opened("bach", bach)
    table.write_text(text + "b002.tif,Benign\n")
    with pytest.raises(StoreError, match=r"line 17 lists b002\.tif a second time"):
        opened("bach", bach)
    table.write_text(text.replace("b002.tif", "b009.tif"))
    notes = opened("bach", bach).notes
    assert any("1 rows without image: b009.tif" in note for note in notes)
    assert any("1 images are not in microscopy_ground_truth.csv: b002.tif" in n for n in notes)
    table.unlink()
    assert "the folders alone say the class" in opened("bach", bach).notes[-1]


@pytest.fixture
def breakhis(tmp_path):
    """BreaKHis_v1/histology_slides/breast: 4 patients a class, 4 magnifications, 2 images each."""
    breast = tmp_path / "BreaKHis_v1" / "histology_slides" / "breast"
    types = (
        ("benign", "B", "adenosis", "A"),
        ("malignant", "M", "ductal_carcinoma", "DC"),
        ("malignant", "M", "lobular_carcinoma", "LC"),
    )
    for label, letter, folder, kind in types:
        for patient in ("22549AB", "22549CD", "13412") if kind != "A" else ("1", "2", "3", "4"):
            for times in (40, 100, 200, 400):
                slide = f"SOB_{letter}_{kind}_14-{patient}"
                name = f"SOB_{letter}_{kind}-14-{patient}-{times}-001.png"
                put(breast / label / "SOB" / folder / slide / f"{times}X" / name, noise(8, 12))
    return tmp_path


def test_breakhis_keeps_patients_whole(breakhis):
    task = opened("breakhis", breakhis)
    assert task.classes == ("benign", "malignant")
    assert np.bincount(task.labels).tolist() == [16, 24]
    # 13412 lies under two types and is one patient
    patients = ("1", "2", "3", "4", "22549AB", "22549CD", "13412")
    assert set(task.groups) == {f"14-{patient}" for patient in patients}
    assert task.groups.count("14-13412") == 8
    split = task_split(task, TaskConfig())
    for part in PARTS:
        assert {task.groups[i] for i in split.part(part)}.isdisjoint(
            {task.groups[i] for other in PARTS if other != part for i in split.part(other)}
        )
    assert opened("breakhis", breakhis, split_by="image").groups is None
    next(breakhis.rglob("SOB_B_A-14-1-40-001.png")).rename(breakhis / "x.png")
    stray = next(breakhis.rglob("SOB_B_A-14-1-100-001.png"))
    stray.rename(stray.with_name("copy.png"))
    with pytest.raises(StoreError, match=r"copy\.png: its name does not tell the patient \(1 of"):
        opened("breakhis", breakhis)


NCT = ("ADI", "BACK", "DEB", "LYM", "MUC", "MUS", "NORM", "STR", "TUM")


@pytest.fixture
def nct(tmp_path):
    for label in NCT:
        for i in range(8):
            put(tmp_path / "NCT-CRC-HE-100K" / label / f"{label}-{i:04}.tif", noise(8, 8))
        for i in range(2):
            put(tmp_path / "CRC-VAL-HE-7K" / label / f"{label}-TCGA-{i:04}.tif", noise(8, 8))
    return tmp_path


def test_nct_is_tested_on_crc_val(nct):
    task = opened("nct_crc", nct)
    assert task.classes == NCT
    assert len(task) == 90
    split = task_split(task, TaskConfig(layout="nct_crc"))
    assert split is task.fixed
    assert [len(split.part(p)) for p in PARTS] == [54, 18, 18]
    assert {task.names[i].split("/")[0] for i in split.test} == {"CRC-VAL-HE-7K"}
    assert {task.names[i].split("/")[0] for i in split.train} == {"NCT-CRC-HE-100K"}
    assert np.bincount(task.labels[split.validation]).tolist() == [2] * 9
    assert opened("nct_crc", nct, split_seed=1).fixed.sha256 != split.sha256
    assert task.notes == (
        "NCT-CRC-HE-100K: published with 100,000 images, 72 here",
        "CRC-VAL-HE-7K: published with 7,180 images, 18 here",
    )
    assert task.load(split.test[:2], 8).shape == (2, 8, 8, 3)
    (nct / "CRC-VAL-HE-7K" / "TUM").rename(nct / "CRC-VAL-HE-7K" / "tumour")
    with pytest.raises(StoreError, match=r"no folder CRC-VAL-HE-7K with ADI, .*unpack the archive"):
        opened("nct_crc", nct)


def test_lymph_keeps_cases_whole(tmp_path):
    for label in ("CLL", "FL", "MCL"):
        for case_number in (588, 1374, 3344, 3362):
            for section in ("-R1", "-R2") if case_number == 588 else ("",):
                for i in (1, 12):
                    name = f"sj-05-{case_number}-{label}{section}_{i:03}.tif"
                    put(tmp_path / "lymphoma" / label / name, noise(8, 8))
    task = opened("lymph", tmp_path)
    assert task.classes == ("CLL", "FL", "MCL")
    assert np.bincount(task.labels).tolist() == [10, 10, 10]
    assert task.groups.count("sj-05-588-FL") == 4
    assert len(set(task.groups)) == 12
    assert task_split(task, TaskConfig()).test.size


@pytest.fixture
def breastpathq(tmp_path):
    """Both archives as unpacked; the validation scores come with the test patches."""
    data = tmp_path / "breastpathq" / "datasets"
    scores = {}
    for part, slides, table in (
        ("train", range(1, 5), data / "train_labels.csv"),
        ("validation", range(90, 92), tmp_path / "breastpathq-test" / "val_labels.csv"),
    ):
        rows = [("slide", "rid", "y")]
        for slide in slides:
            for rid in range(1, 4):
                put(data / part / f"{slide}_{rid}.tif", noise(16, 16))
                rows.append((slide, rid, (slide * 7 + rid) % 10 / 10))
                scores[f"{part}/{slide}_{rid}.tif"] = rows[-1][2]
        put_rows(table, rows)
    put(data / "cells" / "1_Region 1_crop.tif", noise(16, 16))
    put(tmp_path / "breastpathq-test" / "test_patches" / "99_1.tif", noise(16, 16))
    return tmp_path, scores


def test_breastpathq_is_one_set_in_percent(breastpathq):
    folder, scores = breastpathq
    task = opened("breastpathq", folder)
    assert task.kind == "regression"
    found = dict(zip(task.names, task.values, strict=True))
    assert found == pytest.approx({name: 100 * y for name, y in scores.items()})
    assert set(task.groups) == {"1", "2", "3", "4", "90", "91"}
    assert task.notes == ("published with 2,579 images, 18 here",)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (("1,2,0.9", "1,2,tumour"), r"1 cells of y are no numbers \(train/1_2\.tif has 'tumour'\)"),
        (("1,2,0.9", "1,2,90"), r"1 cellularities are not in 0\.\.1 \(train/1_2\.tif\)"),
        (("1,2,0.9", "1,1,0.9"), r"line 3 lists 1_1\.tif a second time"),
        (("1,2,0.9", "1,2"), r"line 3 is cut short"),
        (("slide,rid,y", "slide,rid,p"), r"no column 'y'; its columns are slide, rid, p"),
    ],
)
def test_breastpathq_tables_that_are_refused(breastpathq, change, match):
    folder, _ = breastpathq
    table = folder / "breastpathq" / "datasets" / "train_labels.csv"
    assert change[0] in table.read_text()
    table.write_text(table.read_text().replace(*change))
    with pytest.raises(StoreError, match=match):
        opened("breastpathq", folder)


def test_breastpathq_lists_what_does_not_fit(breastpathq):
    folder, _ = breastpathq
    (folder / "breastpathq/datasets/train/1_1.tif").unlink()
    put(folder / "breastpathq/datasets/validation/90_9.tif", noise(16, 16))
    assert opened("breastpathq", folder).notes[1:] == (
        "train_labels.csv: 1 rows without image: 1_1.tif",
        "validation: 1 images without a score: 90_9.tif",
    )
    put_rows(folder / "copy" / "val_labels.csv", [("slide", "rid", "y")])
    with pytest.raises(StoreError, match=r"val_labels\.csv could both be meant"):
        opened("breastpathq", folder)
    (folder / "copy" / "val_labels.csv").unlink()
    (folder / "breastpathq-test/val_labels.csv").unlink()
    with pytest.raises(StoreError, match=r"no val_labels\.csv in here; unpack the archive"):
        opened("breastpathq", folder)


def filled(*areas, shape=(20, 20)):
    """A map of rectangles: (value, rows, columns), over unmapped."""
    ids = np.zeros(shape, np.uint8)
    for value, rows, columns in areas:
        ids[rows, columns] = value
    return ids


ALL, LEFT = slice(0, 20), slice(0, 10)


@pytest.mark.parametrize(
    ("maps", "grade"),
    [
        ([filled((1, ALL, ALL))], 1),
        ([filled((1, ALL, ALL), (4, slice(0, 1), slice(0, 19)))], 1),  # 19 of 400: under 5 %
        ([filled((1, ALL, ALL), (4, slice(0, 1), ALL))], 4),  # 20 of 400
        ([filled((3, ALL, LEFT), (5, ALL, slice(10, 20)))], 5),  # equal areas: the higher
        ([filled((6, ALL, ALL), (3, slice(0, 2), ALL))], 3),  # 6 is a slip for benign
        ([filled((1, ALL, ALL)), filled((4, ALL, ALL)), filled((4, ALL, ALL))], 4),  # majority
        ([filled((3, ALL, ALL)), filled((4, ALL, ALL))], 4),  # two that disagree: the higher
        ([filled((1, ALL, ALL)), filled((1, ALL, ALL)), filled((5, ALL, ALL))], 1),
    ],
)
def test_the_grade_of_a_core(maps, grade):
    assert core_grade(maps) == grade


@pytest.fixture
def gleason(tmp_path):
    for slide in range(1, 5):
        for core, grade in ((3, 1), (10, 3), (11, 4), (12, 5)):
            name = f"slide{slide:03}_core{core:03}"
            put(tmp_path / "Train Imgs" / f"{name}.jpg", noise(20, 24))
            for expert in range(1, 7 if core == 10 else 4):  # not everyone mapped every core
                ids = filled((1, ALL, slice(0, 24)), (grade, slice(0, 8), ALL), shape=(20, 24))
                if expert == 2:
                    ids[:] = 1
                put(tmp_path / f"Maps{expert}_T" / f"{name}_classimg_nonconvex.png", ids)
    put(tmp_path / "Test" / "Test imgs" / "slide009_core001.jpg", noise(20, 24))
    return tmp_path


def test_gleason_takes_the_class_from_the_maps(gleason):
    task = opened("gleason2019", gleason)
    assert task.classes == ("benign", "grade 3", "grade 4", "grade 5")
    label = dict(zip(task.names, task.labels, strict=True))
    assert [label[f"slide002_core{c:03}.jpg"] for c in (3, 10, 11, 12)] == [0, 1, 2, 3]
    assert set(task.groups) == {"slide001", "slide002", "slide003", "slide004"}
    assert "class: majority of the maps" in task.notes[1]
    assert task_split(task, TaskConfig()).test.size == 4
    two = opened("gleason2019", gleason, classes=("grade 3", "grade 4"))
    assert (two.classes, len(two)) == (("grade 3", "grade 4"), 8)
    with pytest.raises(ConfigError, match=r"--classes grade 2: no core of that class"):
        opened("gleason2019", gleason, classes=("benign", "grade 2"))


def test_gleason_maps_that_are_refused(gleason):
    one = gleason / "Maps1_T" / "slide001_core003_classimg_nonconvex.png"
    good = one.read_bytes()
    put(one, np.ones((20, 20), np.uint8))
    with pytest.raises(StoreError, match=r"is 20 x 20 px, but its core is 24 x 20"):
        opened("gleason2019", gleason)
    put(one, noise(20, 24))
    with pytest.raises(StoreError, match=r"is a colour picture"):
        opened("gleason2019", gleason)
    one.write_bytes(good)
    (gleason / "Train Imgs" / "slide001_core003.jpg").unlink()
    put(gleason / "Train Imgs" / "slide004_core099.jpg", noise(20, 24))
    notes = opened("gleason2019", gleason).notes
    assert any("1 rows without their image: slide001_core003" in note for note in notes)
    assert any("1 images without a label: slide004_core099.jpg" in note for note in notes)


@pytest.fixture
def digestpath(tmp_path):
    folder = tmp_path / "Colonoscopy_tissue_segment_dataset" / "tissue-train-pos-v1"
    for i, (name, shape) in enumerate(
        (
            ("2018_64982_1-3_2019-02-25 21_57_36-lv1-21183-10192-6169-5810", (2048, 2048)),
            ("2018_64982_1-1_2019-02-25 21_57_36-lv1-2118-1019-616-581", (1300, 1500)),
            ("D201808141_2019-05-14 15_43_51-lv1-12543-25431-5025-5022", (700, 900)),
            ("18-09926B_2019-05-08 00_06_24-lv1-34606-9194-6206-5900", (1024, 1024)),
        )
    ):
        image = cv2.resize(noise(8, 8, i), shape[::-1], interpolation=cv2.INTER_NEAREST)
        mask = np.zeros(shape, np.uint8)
        mask[shape[0] // 4 : shape[0] // 2, : shape[1] // 2] = 255
        put(folder / f"{name}.jpg", image, quality=95)
        put(folder / f"{name}_mask.jpg", mask, quality=75)
    put(folder.parent / "tissue-train-neg" / "2018_11111_1-1_2019-02-25-lv1-1.jpg", noise(64, 64))
    return tmp_path


def test_digestpath_is_resized_to_1024(digestpath):
    task = opened("digestpath2019", digestpath)
    assert (task.kind, task.classes, len(task)) == ("segmentation", ("benign", "malignant"), 4)
    assert sorted(set(task.groups)) == ["18-09926B", "2018_64982", "D201808141"]
    for i in (1, 3):
        assert task.images.read(i).shape == (1024, 1024, 3)
        mask = task.masks.read(i)
        expected = np.zeros((1024, 1024), np.uint8)
        expected[256:512, :512] = 1
        assert mask.shape == (1024, 1024)
        assert np.abs(mask.astype(int) - expected).mean() < 0.002  # JPEG's edges, odd sizes
    folder = digestpath / "Colonoscopy_tissue_segment_dataset" / "tissue-train-pos-v1"
    large = next(i for i, n in enumerate(task.names) if n.startswith("2018_64982_1-3"))
    whole = np.asarray(Image.open(folder / task.names[large])).astype(np.float64)
    blocks = whole.reshape(1024, 2, 1024, 2, 3).mean(axis=(1, 3))
    np.testing.assert_allclose(task.images.read(large), blocks, atol=0.51)


def test_digestpath_masks_that_do_not_fit(digestpath):
    folder = digestpath / "Colonoscopy_tissue_segment_dataset" / "tissue-train-pos-v1"
    name = "D201808141_2019-05-14 15_43_51-lv1-12543-25431-5025-5022"
    (folder / f"{name}.jpg").unlink()
    put(folder / "2018_1_1-1_2019-01-01-lv1.jpg", noise(16, 16))
    notes = opened("digestpath2019", folder).notes
    assert f"1 masks without their image: {name}_mask.jpg" in notes
    assert "1 images without a mask: 2018_1_1-1_2019-01-01-lv1.jpg" in notes
    put(folder / f"{name}.jpg", noise(16, 16))
    with pytest.raises(StoreError, match=r"_mask\.jpg: is 900 x 700 px, but its image is 16 x 16"):
        opened("digestpath2019", digestpath)


def test_cases_in_digestpath_names():
    assert case("2019-05-08 00_06_24-lv1-1-2-3-4.jpg") == "2019-05-08 00_06_24"
    assert case("D20180_2019-05-14 15_43_51-lv1-1.jpg") == "D20180"


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
        (("Benign", "", [(0, 0), (9, 9)]), "region 1 has 2 corners"),
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
