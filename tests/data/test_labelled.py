"""Labelled sets: what fits together is read, what does not is counted and named."""

from __future__ import annotations

import csv
from pathlib import Path

import cv2
import numpy as np
import pytest
from made_images import blobs, noise, write_pngs, write_store

from jaxhisto.config import DataConfig
from jaxhisto.data.labelled import centre_square, read_labelled
from jaxhisto.data.sources import open_tiles
from jaxhisto.errors import StoreError


def write_csv(path, rows, delimiter=","):
    with path.open("w", newline="") as file:
        writer = csv.writer(file, delimiter=delimiter)
        writer.writerows(rows)
    return path


HEADER = ("section", "file", "tissue_class")


@pytest.fixture
def folder(tmp_path):
    names = [f"{s}/{i}.png" for s in "abcd" for i in range(5)]
    return write_pngs(tmp_path / "images", {n: noise(8, 8, i) for i, n in enumerate(names)})


@pytest.fixture
def rows(folder):
    """Twenty rows, five a section, tumour and stroma in turn."""
    return [
        (s, f"{s}/{i}.png", ("tumour", "stroma")[i % 2])
        for s in ("a", "b", "c", "d")
        for i in range(5)
    ]


def read(folder, rows, tmp_path, header=HEADER, **options):
    table = write_csv(tmp_path / "labels.csv", [header, *rows])
    return read_labelled(folder, table, "tissue_class", **options)


def test_a_csv_file_with_groups(folder, rows, tmp_path):
    found = read(folder, rows[::-1], tmp_path, group="section")
    assert found.classes == ("stroma", "tumour")
    assert found.names == tuple(name for _, name, _ in rows[::-1])
    assert found.labels.tolist() == [int(c == "tumour") for _, _, c in rows[::-1]]
    assert found.groups == tuple(s for s, _, _ in rows[::-1])
    assert found.missing == found.unlabelled == ()
    assert "20 labelled images (stroma 8, tumour 12), 4 groups" in found.summary()
    np.testing.assert_array_equal(found.read(3), noise(8, 8, 16))  # the fourth from the end


def test_rows_without_image_and_images_without_row_are_counted_and_named(folder, rows, tmp_path):
    some = [*rows[2:], ("d", "d/9.png", "stroma"), ("a", "a/1.png", "")]
    found = read(folder, some, tmp_path)
    assert found.missing == ("d/9.png",)
    assert found.unlabelled == ("a/0.png", "a/1.png")  # no row; a row with an empty label
    assert len(found) == 18
    assert "1 row without their image: d/9.png" in found.summary()
    assert "2 images without a label: a/0.png, a/1.png" in found.summary()


def test_classes_asked_for_come_in_that_order_and_others_are_left_out(folder, rows, tmp_path):
    rows[0] = ("a", "a/0.png", "fold")
    found = read(folder, rows, tmp_path, classes=("tumour", "stroma"))
    assert found.classes == ("tumour", "stroma")
    assert (len(found), found.other) == (19, 1)
    with pytest.raises(StoreError, match="no image of class 'tumor'; there is tumour"):
        read(folder, rows, tmp_path, classes=("tumor", "stroma"))


def test_numbers_are_sorted_by_value(folder, rows, tmp_path):
    graded = [(s, n, str([2, 10][c == "stroma"])) for s, n, c in rows]
    assert read(folder, graded, tmp_path).classes == ("2", "10")


def test_a_folder_for_each_class(tmp_path):
    names = ["TUM/1.png", "TUM/deep/2.png", "STR/1.png", "loose.png"]
    folder = write_pngs(tmp_path, {n: noise(8, 8) for n in names})
    found = read_labelled(folder)
    assert found.names == ("STR/1.png", "TUM/1.png", "TUM/deep/2.png")
    assert (found.classes, found.labels.tolist()) == (("STR", "TUM"), [0, 1, 1])
    assert found.unlabelled == ("loose.png",)
    assert found.groups is None


def test_absolute_names_bom_and_tabs(folder, rows, tmp_path):
    whole = [HEADER, *((s, folder / n, c) for s, n, c in rows)]
    table = write_csv(tmp_path / "labels.tsv", whole, delimiter="\t")
    table.write_bytes(b"\xef\xbb\xbf" + table.read_bytes())
    assert len(read_labelled(folder, table, "tissue_class", "section")) == 20


@pytest.mark.parametrize(
    ("change", "options", "said"),
    [
        ({}, {"label": "tisue_class"}, "no column 'tisue_class'; did you mean 'tissue_class'"),
        ({}, {"label": ""}, "no label column is named; its columns are section, file"),
        ({}, {"file": "xyz"}, "no column 'xyz'; its columns are section, file, tissue_class"),
        ({}, {"group": "sectoin"}, "did you mean 'section'"),
        ({3: ("a", "a/4.png", "stroma")}, {}, "line 6 lists a/4.png a second time"),
        ({3: ("a", "a/3.png")}, {}, "line 5 does not have 3 cells"),
        ({3: ("a", "a/3.png", "stroma", "x")}, {}, "line 5 does not have 3 cells"),
        ({3: ("", "a/3.png", "stroma")}, {"group": "section"}, "line 5 has no section"),
        ({"header": ("section", "file", "file")}, {}, "two columns 'file'"),
        ({"mark": ";"}, {}, "its columns are parted by semicolons; save it with commas"),
        ({"mark": "\t"}, {}, r"parted by tabs; save it with commas, or with tabs as \.tsv"),
        ({"header": ()}, {}, "is empty; give a table with a header"),
    ],
)
def test_a_table_that_is_not_sound_is_refused(folder, rows, tmp_path, change, options, said):
    change, mark = dict(change), change.get("mark", ",")
    change.pop("mark", None)
    header = change.pop("header", HEADER)
    rows = rows if header else []
    for i, row in change.items():
        rows[i] = row
    table = write_csv(tmp_path / "labels.csv", [header, *rows], delimiter=mark)
    options = {"label": "tissue_class"} | options
    with pytest.raises(StoreError, match=said):
        read_labelled(folder, table, **options)


def test_sets_in_which_nothing_can_be_told_apart_are_refused(folder, rows, tmp_path):
    with pytest.raises(StoreError, match="all 20 images are tumour; a probe needs two classes"):
        read(folder, [(s, n, "tumour") for s, n, _ in rows], tmp_path)
    with pytest.raises(
        StoreError, match=r"none of its 20 names .* 'xa/0.png'; images are called 'a/0"
    ):
        read(folder, [(s, f"x{n}", c) for s, n, c in rows], tmp_path)
    with pytest.raises(StoreError, match="no image has a label"):
        read(folder, [(s, n, "") for s, n, _ in rows], tmp_path)
    accented = tmp_path / "accented"
    for group, name, label in rows:
        target = accented / label / f"\u00fc{group}{Path(name).name}"
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes((folder / name).read_bytes())
    apart = [(s, f"{c}/u\u0308{s}{Path(n).name}", c) for s, n, c in rows]
    with pytest.raises(StoreError, match="but for how accents are encoded"):
        read(accented, apart, tmp_path)
    with pytest.raises(StoreError, match="does not exist"):
        read_labelled(tmp_path / "nowhere")
    with pytest.raises(StoreError, match="cannot be read as CSV"):
        read_labelled(folder, tmp_path / "no.csv", "label")
    with pytest.raises(StoreError, match="no CSV file; name it"):
        read_labelled(folder, label="tissue_class")
    write_pngs(tmp_path / "one", {"TUM/1.png": noise(8, 8)})
    with pytest.raises(StoreError, match="put each class into a folder of its own"):
        read_labelled(tmp_path / "one")


def test_named_groups_are_tested_on_and_never_torn(folder, rows, tmp_path):
    found = read(folder, rows, tmp_path, group="section")
    train, test = found.split(("c",))
    assert test.tolist() == [10, 11, 12, 13, 14]
    assert sorted([*train, *test]) == list(range(20))
    train, test = found.split()  # half of the groups
    sides = [{found.groups[i] for i in side} for side in (train, test)]
    assert not sides[0] & sides[1]
    assert [len(side) for side in sides] == [2, 2]
    with pytest.raises(StoreError, match="no group 'C'; there is"):
        found.split(("C",))
    with pytest.raises(StoreError, match="leaves nothing to fit on"):
        found.split(("a", "b", "c", "d"))
    with pytest.raises(StoreError, match="no group column"):
        read(folder, rows, tmp_path).split(("a",))


def test_halves_by_image_keep_the_classes_and_do_not_hang_on_the_rest(folder, rows, tmp_path):
    found = read(folder, rows, tmp_path)
    train, test = found.split()
    assert np.bincount(found.labels[test]).tolist() == [4, 6]
    assert sorted([*train, *test]) == list(range(20))
    assert found.split(seed=1)[1].tolist() != test.tolist()
    other = read(folder, rows[::-1], tmp_path)
    assert {other.names[i] for i in other.split()[1]} == {found.names[i] for i in test}
    with pytest.raises(StoreError, match="leaves nothing to test on"):
        read(folder, [rows[0], rows[1]], tmp_path).split()


def test_a_sample_is_smaller_and_the_same_each_time(folder, rows, tmp_path):
    found = read(folder, rows, tmp_path, group="section")
    some = found.sample(7)
    assert len(some) == len(some.labels) == len(some.groups) == 7
    assert some.names == found.sample(7).names
    assert set(some.names) <= set(found.sample(9).names)
    by_name = dict(zip(found.names, found.labels, strict=True))
    assert all(by_name[n] == y for n, y in zip(some.names, some.labels, strict=True))
    assert found.sample(0) is found.sample(20) is found


def test_images_are_cut_to_their_centre_and_resized():
    image = blobs(40)
    np.testing.assert_array_equal(centre_square(image, 40), image)
    wide = np.concatenate([np.zeros((40, 10, 3), np.uint8), image, image[:, :10]], axis=1)
    np.testing.assert_array_equal(centre_square(wide, 40), image)
    halves = image.reshape(20, 2, 20, 2, 3).mean((1, 3))
    assert abs(centre_square(image, 20) - halves).max() <= 0.5
    larger = cv2.resize(image, (64, 64), interpolation=cv2.INTER_LINEAR)
    np.testing.assert_array_equal(centre_square(image, 64), larger)


def test_loading_says_how_many_images_are_bad(folder, rows, tmp_path):
    found = read(folder, rows, tmp_path)
    images = found.load(8)
    assert (images.shape, images.dtype) == ((20, 8, 8, 3), np.uint8)
    np.testing.assert_array_equal(images[4], noise(8, 8, 4))
    (folder / "a/1.png").write_bytes(b"no image")
    with pytest.raises(StoreError, match=r"a/1.png: is no readable"):
        found.load(8)
    (folder / "a/2.png").unlink()
    with pytest.raises(StoreError, match=r"a/1.png.*2 of 20 images cannot be used"):
        found.load(8)
    with pytest.raises(StoreError, match=r"a/2.png: cannot be read"):
        found.digests()


def test_leakage_is_found_by_content_in_folders_and_by_slide_in_stores(folder, rows, tmp_path):
    found = read(folder, rows, tmp_path, group="section")
    # seeds 3 and 4 are a/3.png and a/4.png, here under other names; c/0.png is excluded
    training = {"x.png": noise(8, 8, 3), "y/z.png": noise(8, 8, 4), "w.png": noise(8, 8, 10)}
    other = write_pngs(tmp_path / "training", {**training, "mine.png": noise(8, 8, 99)})
    store = write_store(tmp_path / "store", {"b.svs": [blobs(16)] * 2, "q.svs": [blobs(16)]})
    config = DataConfig(stores=(str(other), str(store)), exclude=("w.png",))
    clauses = found.leakage(open_tiles(config), found.digests())
    assert clauses == [
        "2 of 20 images are in the training data (a/3.png, a/4.png)",
        "1 groups are slides of the training data (b)",
    ]
    clean = DataConfig(stores=(str(store),), exclude=("b.svs",))
    assert found.leakage(open_tiles(clean), found.digests()) == []


def test_cells_without_value_are_no_class(folder, rows, tmp_path):
    rows[0], rows[1] = ("a", "a/0.png", "nan"), ("a", "a/1.png", "NA")
    with pytest.raises(StoreError, match="2 images of class 'nan', as programs write a cell with"):
        read(folder, rows, tmp_path)
    assert read(folder, rows, tmp_path, classes=("stroma", "tumour")).other == 2
    assert "NA" in read(folder, rows, tmp_path, classes=("NA", "tumour")).classes
    rows[0] = rows[1] = ("a", "a/1.png", "")
    rows[2] = ("a", "a/2.png", "none")
    assert "none" in read(folder, rows[1:], tmp_path).classes  # a grade


def test_classes_that_differ_in_case_alone_are_refused(folder, rows, tmp_path):
    rows[0] = ("a", "a/0.png", "Tumour")
    with pytest.raises(StoreError, match="Tumour and tumour are two classes that differ in case"):
        read(folder, rows, tmp_path)
    assert read(folder, rows, tmp_path, classes=("stroma", "tumour")).other == 1
    names = [f"{c}/{i}.png" for c in ("TUM", "tum", "STR") for i in range(2)]
    made = write_pngs(tmp_path / "classes", {n: noise(8, 8) for n in names})
    with pytest.raises(StoreError, match="TUM and tum are two classes"):
        read_labelled(made)
