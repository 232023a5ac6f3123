"""The eight sets of the paper's App. C.1, each as a small tree in the form it is published in."""

from __future__ import annotations

import csv
from pathlib import Path

import cv2
import numpy as np
import pytest
from made_images import encoded, noise
from made_tasks import opened
from PIL import Image

from jaxhisto.errors import ConfigError, StoreError
from jaxhisto.task_config import TaskConfig
from jaxhisto.tasks.digestpath import case
from jaxhisto.tasks.gleason import core_grade
from jaxhisto.tasks.splits import task_split
from jaxhisto.tasks.task import PARTS, open_task


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
    assert any("1 row without image: b009.tif" in note for note in notes)
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
    for name in ("NCT-CRC-HE-100K", "CRC-VAL-HE-7K"):  # as Windows unpacks, into a folder each
        (nct / name).rename(nct / "whole")
        (nct / name).mkdir()
        (nct / "whole").rename(nct / name / name)
    (nct / "__MACOSX" / "CRC-VAL-HE-7K" / "CRC-VAL-HE-7K").mkdir(parents=True)
    for label in NCT:
        (nct / "__MACOSX" / "CRC-VAL-HE-7K" / label).mkdir()
    apart = opened("nct_crc", nct)
    assert apart.names[0] == "NCT-CRC-HE-100K/NCT-CRC-HE-100K/ADI/ADI-0000.tif"
    assert len(apart.fixed.test) == 18
    assert apart.load(apart.fixed.test[:2], 8).shape == (2, 8, 8, 3)
    (nct / "CRC-VAL-HE-7K" / "CRC-VAL-HE-7K").rename(nct / "whole")
    (nct / "CRC-VAL-HE-7K").rmdir()
    (nct / "whole").rename(nct / "CRC-VAL-HE-7K")
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
        (("1,2,0.9", "1,2,tumour"), r"no number in 1 cell of y \(train/1_2\.tif has 'tumour'\)"),
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
        "train_labels.csv: 1 row without image: 1_1.tif",
        "validation: 1 image without a score: 90_9.tif",
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
    with pytest.raises(ConfigError, match=r"--task.classes grade 2: no core of that class"):
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
    (one.parent / f"._{one.name}").write_bytes(b"as macOS adds it")
    assert not any("without their image" in note for note in opened("gleason2019", gleason).notes)
    (gleason / "Train Imgs" / "slide001_core003.jpg").unlink()
    put(gleason / "Train Imgs" / "slide004_core099.jpg", noise(20, 24))
    notes = opened("gleason2019", gleason).notes
    assert any("1 row without their image: slide001_core003" in note for note in notes)
    assert any("1 image without a label: slide004_core099.jpg" in note for note in notes)


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
    assert task.images.read(3).shape == (1024, 1024, 3)
    for i in (1, 3):
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
    assert f"1 mask without their image: {name}_mask.jpg" in notes
    assert "1 image without a mask: 2018_1_1-1_2019-01-01-lv1.jpg" in notes
    put(folder / f"{name}.jpg", noise(16, 16))
    with pytest.raises(StoreError, match=r"_mask\.jpg: is 900 x 700 px, but its image is 16 x 16"):
        opened("digestpath2019", digestpath)


def test_cases_in_digestpath_names():
    assert case("2019-05-08 00_06_24-lv1-1-2-3-4.jpg") == "2019-05-08 00_06_24"
    assert case("D20180_2019-05-14 15_43_51-lv1-1.jpg") == "D20180"


def test_a_scale_of_ones_own_is_refused_for_a_published_set(tmp_path):
    config = TaskConfig(data=str(tmp_path), layout="breastpathq", target_scale=100)
    with pytest.raises(ConfigError, match=r"--task.target-scale is for numbers of one's own"):
        open_task(config)
