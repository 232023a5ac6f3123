"""Tasks in files of one's own: what fits together is read, what does not is one sentence."""

from __future__ import annotations

import csv

import numpy as np
import pytest
from made_images import encoded, noise, write_pngs
from PIL import Image

from jaxhisto.data.named_images import centre_mask
from jaxhisto.errors import ConfigError, StoreError
from jaxhisto.task_config import TaskConfig
from jaxhisto.tasks.masks import MaskFiles
from jaxhisto.tasks.splits import make_split, task_split
from jaxhisto.tasks.task import Task, Window, open_task


def write_csv(path, rows):
    with path.open("w", newline="") as file:
        csv.writer(file).writerows(rows)
    return str(path)


def write_masks(folder, masks):
    folder.mkdir(parents=True, exist_ok=True)
    for name, ids in masks.items():
        Image.fromarray(ids).save(folder / name)
    return folder


@pytest.fixture
def folder(tmp_path):
    """Twelve images of 12 x 16 px in three folders."""
    names = [f"{c}/{i}.png" for c in "abc" for i in range(4)]
    return write_pngs(
        tmp_path / "set" / "images", {n: noise(12, 16, i) for i, n in enumerate(names)}
    )


@pytest.fixture
def pair(tmp_path):
    """Four images with masks of three classes."""
    images = {f"{i}.png": noise(12, 16, i) for i in range(4)}
    masks = {f"{i}.png": noise(12, 16, i + 9)[..., 0] % 3 for i in range(4)}
    return write_pngs(tmp_path / "pair" / "images", images), write_masks(
        tmp_path / "pair" / "masks", masks
    )


def test_a_folder_a_class(folder):
    task = open_task(TaskConfig(data=str(folder), group_pattern=r"/(\d)\.png"))
    assert (task.kind, task.classes, len(task)) == ("classification", ("a", "b", "c"), 12)
    assert task.labels.tolist() == [0] * 4 + [1] * 4 + [2] * 4
    assert task.groups == tuple("0123" * 3)
    assert task.summary()[0] == "set: classification, 12 images (a 4, b 4, c 4), 4 groups"
    np.testing.assert_array_equal(task.images.read(5), noise(12, 16, 5))
    by_image = open_task(
        TaskConfig(data=str(folder), group_pattern=r"/(\d)\.png", split_by="image")
    )
    assert by_image.groups is None


def test_loading_takes_the_centre_square_and_averages_areas(folder):
    task = open_task(TaskConfig(data=str(folder)))
    loaded = task.load([7, 2], 4, threads=2)
    square = noise(12, 16, 7)[:, 2:14].astype(np.float64)
    blocks = square.reshape(4, 3, 4, 3, 3).mean(axis=(1, 3))
    np.testing.assert_allclose(loaded[0], blocks, atol=0.501)
    np.testing.assert_array_equal(task.load([2], 12)[0], noise(12, 16, 2)[:, 2:14])
    (folder / "b" / "3.png").write_bytes(b"broken")
    with pytest.raises(StoreError, match=r"b/3\.png: is no readable .*image"):
        task.load(np.arange(12), 4)


def test_labels_in_a_file(folder, tmp_path):
    rows = [("file", "grade", "patient")]
    rows += [(f"{c}/{i}.png", "hi" if i % 2 else "lo", f"p{i}") for c in "ab" for i in range(4)]
    rows += [("gone.png", "hi", "p9")]
    table = write_csv(tmp_path / "t.csv", rows)
    config = TaskConfig(data=str(folder), labels=table, label="grade", group="patient")
    task = open_task(config)
    assert (task.classes, len(task), len(set(task.groups))) == (("hi", "lo"), 8, 4)
    assert task.summary() == [
        "set grade: classification, 8 images (hi 4, lo 4), 4 groups",
        "  1 row without their image: gone.png",
        "  4 images without a label: c/0.png, c/1.png, c/2.png, c/3.png",
    ]
    split = task_split(task, TaskConfig(test=("p0", "p1"), validation_by_image=True))
    assert {task.groups[i] for i in split.test} == {"p0", "p1"}


def test_groups_that_differ_in_case_alone_are_told(folder, tmp_path):
    rows = [(f"{c}/{i}.png", c, f"{p}{i}") for c, p in ("ap", "bP") for i in range(4)]
    table = write_csv(tmp_path / "t.csv", [("file", "grade", "patient"), *rows])
    config = TaskConfig(data=str(folder), labels=table, label="grade", group="patient")
    told = "groups that differ in case alone are taken for two: P0 and p0, P1 and p1, P2 and p2"
    assert told in open_task(config).notes[-1]


def test_numbers_in_a_file(folder, tmp_path):
    rows = [("file", "share"), *((f"{c}/{i}.png", i / 8) for c in "ab" for i in range(4))]
    rows += [("c/0.png", ""), ("gone.png", 1)]
    table = write_csv(tmp_path / "t.csv", rows)
    task = open_task(TaskConfig(data=str(folder), labels=table, target="share", target_scale=100))
    assert task.kind == "regression"
    assert task.targets.dtype == np.float64
    assert task.values.tolist() == [0, 12.5, 25, 37.5] * 2
    assert task.classes == ()
    assert task.summary() == [
        "set share: regression, 8 images (targets 0 to 37.5, mean 18.75)",
        "  1 row without their image: gone.png",
        "  4 images without a target: c/0.png, c/1.png, c/2.png, c/3.png",
    ]
    with pytest.raises(TypeError, match="regression task: it has no labels"):
        task.labels  # noqa: B018


@pytest.mark.parametrize("cell", ["high", "nan", "inf", "0,5", "1_0"])
def test_targets_that_are_no_numbers_are_named(folder, tmp_path, cell):
    rows = [("file", "share"), ("a/0.png", 0.5), ("a/1.png", cell), ("a/2.png", 1)]
    table = write_csv(tmp_path / "t.csv", rows)
    message = rf"t\.csv: no number in 1 cell of share \(a/1\.png has '{cell}'\); mend it"
    with pytest.raises(StoreError, match=message):
        open_task(TaskConfig(data=str(folder), labels=table, target="share"))


def test_masks_of_class_ids(pair):
    images, masks = pair
    config = TaskConfig(data=str(images), masks=str(masks), classes=("x", "y", "z"))
    task = open_task(config)
    assert (task.kind, task.classes, len(task)) == ("segmentation", ("x", "y", "z"), 4)
    for i in range(4):
        mask = task.masks.read(i)
        assert mask.dtype == np.uint8
        np.testing.assert_array_equal(mask, noise(12, 16, i + 9)[..., 0] % 3)
    shares = [np.mean([task.masks.read(i) == c for i in range(4)]) for c in range(3)]
    assert task.notes == (
        "pixels: " + ", ".join(f"{c} {s:.1%}" for c, s in zip("xyz", shares, strict=True)),
    )
    np.testing.assert_array_equal(task.load_masks([2], 12)[0], task.masks.read(2)[:, 2:14])


@pytest.mark.parametrize("side", [5, 7, 12, 31])
def test_resized_masks_take_the_class_under_the_centre(side):
    """Pillow's NEAREST samples pixel centres as well."""
    mask = np.random.default_rng(0).integers(0, 5, (20, 13), np.uint8)
    square = Image.fromarray(mask[3:16])
    expected = np.asarray(square.resize((side, side), Image.Resampling.NEAREST))
    np.testing.assert_array_equal(centre_mask(mask, side), expected)


def test_masks_in_every_form_that_says_class_ids(tmp_path):
    ids = np.array([[0, 1, 1], [0, 0, 1]], np.uint8)
    palette = Image.fromarray(ids, "L").convert("P")
    palette.putdata(ids.reshape(-1).tolist())
    palette.putpalette([255, 255, 255, 0, 80, 0])
    forms = {
        "grey.png": Image.fromarray(ids),
        "binary.png": Image.fromarray(ids * 255),
        "deep.png": Image.fromarray(ids.astype(np.uint16)),
        "palette.png": palette,
        "bits.png": Image.fromarray(ids * 255).convert("1"),
        "rgb.png": Image.fromarray(np.repeat(ids[..., None] * 255, 3, 2)),
        "grey.tif": Image.fromarray(ids.astype(np.uint16)),
    }
    for name, image in forms.items():
        image.save(tmp_path / name)
        np.testing.assert_array_equal(MaskFiles((tmp_path / name,), 2).read(0), ids, err_msg=name)


def test_jpeg_masks_are_taken_where_they_are_exact_alone(tmp_path):
    half = np.full((16, 16), 255, np.uint8) * (np.arange(16) > 7)
    Image.fromarray(half).save(tmp_path / "exact.jpg", quality=100)
    Image.fromarray(np.roll(half, 3, 1)).save(tmp_path / "rings.jpg", quality=60)
    for instances in (False, True):
        assert MaskFiles((tmp_path / "exact.jpg",), 2, instances).read(0).mean() == 0.5
        with pytest.raises(StoreError, match=r"rings\.jpg: is a JPEG, which changes ids where"):
            MaskFiles((tmp_path / "rings.jpg",), 2, instances).read(0)


def test_numbered_instances_become_foreground(tmp_path):
    ids = np.arange(12, dtype=np.uint16).reshape(3, 4) * 300
    images = write_pngs(tmp_path / "images", {"1.png": noise(3, 4)})
    masks = write_masks(tmp_path / "masks", {"1.png": ids})
    config = {"data": str(images), "masks": str(masks)}
    task = open_task(TaskConfig(**config, masks_are="instances"))
    np.testing.assert_array_equal(task.masks.read(0), ids > 0)
    with pytest.raises(
        StoreError, match=r"class id 300 and 10 other ids, .*--task.masks-are instances"
    ):
        open_task(TaskConfig(**config))


def test_windows_of_images_and_masks(pair):
    images, masks = pair
    config = TaskConfig(
        data=str(images), masks=str(masks), classes=("x", "y", "z"), window=6, split_seed=1
    )
    task = open_task(config)
    assert len(task) == 4 * 4  # 2 x 2 of 12 x 16: four columns of pixels are left
    assert task.windows[3] == Window("0.png", 6, 6)
    assert task.names[3] == "0.png y6 x6"
    np.testing.assert_array_equal(task.images.read(3), noise(12, 16, 0)[6:12, 6:12])
    np.testing.assert_array_equal(task.masks.read(14), (noise(12, 16, 12)[..., 0] % 3)[6:12, :6])
    rows = [(5 * i) % 16 for i in range(16)]
    cuts = [noise(12, 16, i // 4)[6 * (i // 2 % 2) :, 6 * (i % 2) :][:6, :6] for i in rows]
    np.testing.assert_array_equal(task.load(rows, 6, threads=4), cuts)
    assert "25.0% of the pixels, at edges, in no window" in task.summary()[-1]
    assert "16 images cut from 4 images" in task.summary()[0]
    split = make_split(task, 0)
    tested = {task.windows[i].source for i in split.test}
    assert not tested & {task.windows[i].source for i in split.train}
    with pytest.raises(StoreError, match=r"0\.png: is smaller than a window of 13 px \(4 images"):
        open_task(
            TaskConfig(data=str(images), masks=str(masks), classes=("x", "y", "z"), window=13)
        )


def spoil_size(images, masks):
    write_masks(masks, {"2.png": np.zeros((16, 12), np.uint8)})


def spoil_range(images, masks):
    write_masks(masks, {"2.png": np.full((12, 16), 3, np.uint8)})


def spoil_colour(images, masks):
    write_pngs(masks, {"2.png": noise(12, 16)})


def spoil_bytes(images, masks):
    (masks / "2.png").write_bytes(encoded(noise(12, 16))[:200])


def spoil_twice(images, masks):
    write_masks(masks, {"2.tif": np.zeros((12, 16), np.uint8)})


def spoil_all(images, masks):
    write_masks(masks, {f"{i}.png": np.zeros((12, 16), np.uint8) for i in range(4)})


def spoil_names(images, masks):
    for i in range(4):
        (masks / f"{i}.png").rename(masks / f"mask{i}.png")


@pytest.mark.parametrize(
    ("spoil", "match"),
    [
        (spoil_size, r"2\.png: is 12 x 16 px, but its image is 16 x 12; resize neither"),
        (spoil_range, r"2\.png: has class id 3, but there are 3 classes \(0 to 2\)"),
        (spoil_colour, r"2\.png: is a colour picture, of which nobody knows which colour"),
        (spoil_bytes, r"2\.png: cannot be decoded|2\.png: is no readable image"),
        (spoil_twice, r"2\.png and 2\.tif are masks of one image; keep one"),
        (spoil_all, r"all pixels are x; check the masks"),
        (spoil_names, r"no mask has the name of an image"),
    ],
)
def test_masks_that_are_refused(pair, spoil, match):
    images, masks = pair
    spoil(images, masks)
    with pytest.raises(StoreError, match=match):
        open_task(TaskConfig(data=str(images), masks=str(masks), classes=("x", "y", "z")))


def test_masks_and_images_without_the_other_are_listed(pair):
    images, masks = pair
    (images / "1.png").unlink()
    (masks / "3.png").unlink()
    task = open_task(TaskConfig(data=str(images), masks=str(masks), classes=("x", "y", "z")))
    assert task.names == ("0.png", "2.png")
    assert task.notes[1:] == (
        "1 mask without their image: 1.png",
        "1 image without a mask: 3.png",
    )


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"data": ""}, StoreError, "no images are named"),
        ({"data": "nowhere"}, StoreError, "nowhere: does not exist"),
        ({"data": "{empty}"}, StoreError, "no images .* in here"),
        ({"data": "{images}", "label": "x", "target": "y"}, ConfigError, "two tasks; name one"),
        ({"data": "{images}", "target": "y"}, ConfigError, "name its CSV file by --task.labels"),
        ({"data": "{images}", "group_pattern": "(x"}, ConfigError, "-pattern '.x': .*mend"),
        ({"data": "{images}", "group_pattern": "x"}, ConfigError, r"put \( \) around"),
        ({"data": "{images}", "group_pattern": "a/(.)"}, StoreError, r"no group of 8 images \(b/0"),
        ({"data": "{images}", "group": "p", "group_pattern": "(.)"}, ConfigError, "both say what"),
        ({"data": "{images}", "classes": ("a", "a")}, ConfigError, "names a twice; name each"),
        ({"data": "{images}", "window": 8}, ConfigError, "--task.window cuts images with masks"),
        ({"data": "{images}/a"}, StoreError, "no image has a label|all 4 images"),
        ({"data": "{images}", "masks": "{images}", "classes": ("one",)}, ConfigError, "names 1;"),
        (
            {"data": "{images}", "layout": "bach", "label": "x"},
            ConfigError,
            "--task.label is for files",
        ),
    ],
)
def test_settings_that_are_refused(folder, tmp_path, options, error, match):
    (tmp_path / "empty").mkdir()
    paths = {"images": str(folder), "empty": str(tmp_path / "empty")}
    filled = {k: v.format(**paths) if isinstance(v, str) else v for k, v in options.items()}
    with pytest.raises(error, match=match):
        open_task(TaskConfig(**filled))


def test_tables_that_are_refused(folder, tmp_path):
    def opened(rows, **options):
        table = write_csv(tmp_path / "t.csv", [("file", "y", "p"), *rows])
        return open_task(TaskConfig(data=str(folder), labels=table, **options))

    twice = [("a/0.png", 1, "p"), ("a/0.png", 2, "p")]
    with pytest.raises(StoreError, match=r"line 3 lists a/0\.png a second time"):
        opened(twice, target="y")
    with pytest.raises(StoreError, match=r"line 3 lists a/0\.png a second time"):
        opened(twice, label="y")
    with pytest.raises(StoreError, match="all 2 images are 1; a probe needs two classes"):
        opened([("a/0.png", 1, "p"), ("a/1.png", 1, "p")], label="y")
    with pytest.raises(StoreError, match="all targets are 1; name another column"):
        opened([("a/0.png", 1, "p"), ("a/1.png", 1, "p")], target="y")
    with pytest.raises(StoreError, match=r"no column 'z'"):
        opened([("a/0.png", 1, "p")], target="z")
    half = np.repeat([[0, 1]], 12, 0).repeat(8, 1).astype(np.uint8)
    masks = tmp_path / "masks"
    for c in "abc":
        write_masks(masks / c, {f"{i}.png": half for i in range(4)})
    with pytest.raises(StoreError, match=r"no p of 11 images \(a/1\.png"):
        opened([("a/0.png", 1, "p")], masks=str(masks), group="p")


def test_a_task_whose_parts_do_not_fit_is_a_bug(folder):
    task = open_task(TaskConfig(data=str(folder)))
    with pytest.raises(ValueError, match="12 images need as many"):
        Task("x", "classification", task.images, task.labels[:3], task.classes)
    with pytest.raises(ValueError, match="12 images need as many"):
        Task("x", "classification", task.images, task.labels, task.classes, ("g",))


def test_her2st_by_section(shared_data):
    data = shared_data / "her2st_spots"
    common = {"data": str(data / "images"), "labels": str(data / "labels.csv"), "group": "section"}
    config = TaskConfig(
        **common, label="coarse_class", classes=("immune_stroma", "cancer"), test=("C5",)
    )
    task = open_task(config)
    with (data / "labels.csv").open() as text:
        rows = list(csv.DictReader(text))
    assert len(task) == sum(r["coarse_class"] in config.classes for r in rows)
    split = task_split(task, config)
    assert {task.groups[i] for i in split.test} == {"C5"}
    assert len({task.groups[i] for i in split.train}) == 2
    epithelial = open_task(TaskConfig(**common, target="Epithelial", target_scale=100))
    expected = {r["file"]: 100 * float(r["Epithelial"]) for r in rows}
    assert dict(zip(epithelial.names, epithelial.values, strict=True)) == pytest.approx(expected)
    assert task.load([0, 5], 64).shape == (2, 64, 64, 3)


def test_bcss_by_region(shared_data):
    data = shared_data / "bcss_tumor"
    config = TaskConfig(
        data=str(data / "images"),
        labels=str(data / "labels.csv"),
        masks=str(data / "masks"),
        classes=("other", "tumor"),
        group="region",
        test=("1015",),
        validation_by_image=True,
    )
    task = open_task(config)
    with (data / "labels.csv").open() as text:
        fractions = {r["file"]: float(r["tumor_fraction"]) for r in csv.DictReader(text)}
    for i in range(0, len(task), 40):
        assert task.masks.read(i).mean() == pytest.approx(fractions[task.names[i]], abs=1e-4)
    split = task_split(task, config)
    assert {task.groups[i] for i in split.test} == {"1015"}
    assert {task.groups[i] for i in split.train} == {"1008"}


def test_dsb2018_by_mosaic(shared_data):
    data = shared_data / "dsb2018_stained"
    config = TaskConfig(
        data=str(data / "images"),
        labels=str(data / "labels.csv"),
        masks=str(data / "masks"),
        masks_are="instances",
        group="mosaic_group",
    )
    task = open_task(config)
    with (data / "labels.csv").open() as text:
        area = {r["file"]: float(r["nuclear_area_fraction"]) for r in csv.DictReader(text)}
    for i in range(0, len(task), 10):
        assert task.masks.read(i).mean() == pytest.approx(area[task.names[i]], abs=1e-4)
