"""The verbs cluster, retrieve and sheet, through the command line."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from pathlib import Path

import h5py
import numpy as np
import pytest
import tifffile
from made_features import planted, write_features
from PIL import Image
from refusals import refusal

from jaxhisto.clusters.cluster import pick, tried
from jaxhisto.clusters.kmeans import Held
from jaxhisto.clusters.pictures import Pictures
from jaxhisto.clusters.retrieve import nearest
from jaxhisto.clusters.sheets import bar_length
from jaxhisto.clusters.slide_maps import VIVID, Base, colours, highlighted
from jaxhisto.config import DataConfig
from jaxhisto.data.manifest import read_manifest
from jaxhisto.data.sources import open_tiles
from jaxhisto.errors import SlideError, StoreError
from jaxhisto.slides.reader import Slide

HUES = ((200, 60, 60), (60, 200, 60), (60, 60, 200))


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """60 images of three colours, named so that their order mixes the colours."""
    folder = tmp_path_factory.mktemp("data") / "tissue"
    folder.mkdir()
    for i in range(60):
        noise = np.random.default_rng(i).integers(-20, 20, (32, 32, 3))
        pixels = np.clip(np.array(HUES[i % 3]) + noise, 0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{i:02d}.png")
    return folder


@pytest.fixture(scope="module")
def features(images, tmp_path_factory):
    """Mean colours of them, on one slide of 10 x 6 tiles by their coordinates."""
    tiles = open_tiles(DataConfig(stores=(str(images),)))
    rows = np.stack([tiles.read(i).mean((0, 1)) for i in range(60)])
    coords = np.array([(32 * (i % 10), 32 * (i // 10)) for i in range(60)])
    names = [tiles.located(i).name for i in range(60)]
    path = tmp_path_factory.mktemp("features") / "f.h5"
    return write_features(path, rows, names, tiles.hash, ["s.svs"] * 60, coords)


def test_clusters_are_the_colours_and_every_file_is_there(jaxhisto, images, features, tmp_path):
    out = tmp_path / "C"
    asked = ("cluster", features, "--k", 2, 3, 5, 8, "--show.tiles", images, "--show.mpp", 0.5)
    code, said, err = jaxhisto(*asked, "--highlight", 1, "--pick", 7, "--out", out)
    assert code == 0, err
    assert "60 rows in 3 clusters (the elbow of 4 values of k)" in said
    assert said.splitlines()[-1].startswith("next: jaxhisto pretrain --data.manifest")
    pictures = {"clusters.png", "random.png", "curve.png", "map-s.svs.png"}
    files = {"clusters.json", "centres.npy", "assignments.h5", "picked.jsonl"}
    assert {p.name for p in out.iterdir()} == pictures | files
    record = json.loads((out / "clusters.json").read_text())
    assert record["k"] == record["elbow"] == 3
    assert sorted(record["sizes"]) == [20, 20, 20]
    assert record["identity"]["encoder_sha256"] == "e" * 64
    with h5py.File(out / "assignments.h5") as file:
        labels = file["cluster"][:]
        assert file["names"].asstr()[0] == "00.png"
    assert all(len(set(labels[i::3])) == 1 for i in range(3))
    assert np.load(out / "centres.npy").shape == (3, 3)
    # The list is one that a run takes: seven images, of the three clusters in turn.
    listed = open_tiles(DataConfig(stores=(str(images),), manifest=str(out / "picked.jsonl")))
    picked = [int(listed.located(i).name[:2]) for i in range(len(listed))]
    assert len(picked) == 7
    assert sorted(np.bincount([i % 3 for i in picked]).tolist()) == [2, 2, 3]
    # The same again is refused; with --force the clusters are kept, and other pictures made.
    code, _, err = jaxhisto(*asked, "--out", out)
    assert code == 2
    assert err.strip() == (
        f"jaxhisto cluster: --out {out}: holds clusters; pass --force to replace them."
    )
    code, said, err = jaxhisto(*asked, "--shown", 1, "--maps", 0, "--force", "--out", out)
    assert code == 0, err
    assert "the clusters of these features are kept" in said
    assert not (out / "map-s.svs.png").exists()
    assert not list(tmp_path.glob(".*"))


def test_the_map_shows_each_tile_in_its_clusters_colour(jaxhisto, images, features, tmp_path):
    code, _, err = jaxhisto(
        "cluster", features, "--k", 3, "--show.tiles", images, "--out", tmp_path / "C"
    )
    assert code == 0, err
    sheet = np.asarray(Image.open(tmp_path / "C/map-s.svs.png").convert("RGB")).astype(int)
    with h5py.File(tmp_path / "C/assignments.h5") as file:
        labels = file["cluster"][:]
    palette, side = np.array(colours(np.zeros((3, 3), np.float32))), 90
    left, top = 24 + 901 + 24, 24 + 72  # of the second panel: its size is 901 x 541
    for i in (0, 1, 2, 37, 59):
        x, y = left + side * (i % 10) + side // 2, top + side * (i // 10) + side // 2
        seen = sheet[y - 9 : y + 9, x - 9 : x + 9].mean((0, 1))
        expected = 0.42 * np.array(HUES[i % 3]) + 0.58 * palette[labels[i]]
        np.testing.assert_allclose(seen, expected, atol=12)


def test_highlighted_tiles_show_what_they_hold_however_small(jaxhisto):
    """Of 4-px tiles on a large slide the frame lies around, not on them."""
    rgb = np.random.default_rng(0).integers(0, 255, (60, 60, 3), np.uint8)
    base = Base(rgb, 0.0, 0.0, 2.0, None, "")
    coords = np.array([[40, 40], [48, 40], [100, 8]])
    out = highlighted(base, coords, np.full(3, 8.0), np.array([1, 1, 0], np.int32), [1])
    np.testing.assert_array_equal(out[20:24, 20:28], rgb[20:24, 20:28])
    ring = np.ones((8, 12), bool)
    ring[2:6, 2:10] = False
    assert (out[18:26, 18:30][ring] == VIVID).all()
    assert (out == VIVID).all(-1).sum() == ring.sum()
    elsewhere = out[4:8, 50:54].astype(int)  # the other cluster's tile: pale and grey
    assert (elsewhere.max(-1) == elsewhere.min(-1)).all()


@pytest.mark.parametrize(
    ("flags", "code", "sentence"),
    [
        (("--k", 61), 2, "has 60 rows; ask for at most as many clusters"),
        (("--k", 3, "--highlight", 3), 2, "--highlight 3: there are clusters 0 to 2"),
        (("--k", 3, "--pick-from", 1), 2, "--pick-from: nothing is picked; pass --pick"),
        (("--k", 3, "--pick", 5, "--pick-from", 9), 2, "--pick-from 9: there are clusters 0 to 2"),
    ],
)
def test_settings_that_do_not_fit(jaxhisto, images, features, tmp_path, flags, code, sentence):
    out = tmp_path / "C"
    result = jaxhisto("cluster", features, *flags, "--show.tiles", images, "--out", out)
    assert sentence in refusal(result, code)
    assert not list(tmp_path.iterdir())


def test_a_pick_without_images_is_refused(jaxhisto, features, tmp_path):
    result = jaxhisto("cluster", features, "--k", 3, "--pick", 5, "--out", tmp_path / "C")
    assert "--pick: needs the stores or image folders" in refusal(result, 2)


def test_a_row_that_is_not_finite_is_named(jaxhisto, tmp_path):
    path = write_features(tmp_path / "f.h5", planted(20, 4, 2), [f"t{i}" for i in range(20)])
    with h5py.File(path, "r+") as file:
        file["features"][13, 2] = np.nan
    result = jaxhisto("cluster", path, "--k", 2, "--out", tmp_path / "C")
    assert "t13" in refusal(result)


@pytest.mark.parametrize(("rows", "said"), [(0, "has 0 rows"), (1, "has 1 row,")])
def test_too_few_rows_are_told_as_such(jaxhisto, tmp_path, rows, said):
    path = write_features(tmp_path / "f.h5", planted(2, 4, 2), ["a", "b"])
    with h5py.File(path, "r+") as file:
        for name in ("features", "names", "slides", "coords", "spans"):
            held = file[name][:rows]
            del file[name]
            file[name] = held
    assert said in refusal(jaxhisto("cluster", path, "--k", 1, "--out", tmp_path / "C"))


def test_few_rows_without_a_k(jaxhisto, tmp_path):
    path = write_features(tmp_path / "f.h5", planted(9, 4, 2), [f"t{i}" for i in range(9)])
    code, said, err = jaxhisto("cluster", path, "--out", tmp_path / "C")
    assert code == 0, err
    assert "9 rows in 1 cluster (so few rows have no elbow), 0.0% of the variance" in said


def test_an_image_that_cannot_be_read_any_more_does_not_cost_the_clusters(
    jaxhisto, images, features, tmp_path, monkeypatch
):
    def broken(self, row, side):
        raise StoreError("07.png: cannot be decoded; restore it.")

    asked = ("cluster", features, "--k", 3, "--show.tiles", images, "--out", tmp_path / "C")
    with monkeypatch.context() as patch:
        patch.setattr(Pictures, "read", broken)
        assert "07.png: cannot be decoded; restore it. The clusters are in" in refusal(
            jaxhisto(*asked)
        )
    assert sorted(json.loads((tmp_path / "C/clusters.json").read_text())["sizes"]) == [20] * 3
    code, said, err = jaxhisto(*asked, "--force")
    assert code == 0, err
    assert "the clusters of these features are kept" in said
    assert (tmp_path / "C/clusters.png").is_file()


def test_a_slide_that_cannot_be_opened_is_told_and_painted_from_what_there_is(
    jaxhisto, features, tmp_path
):
    (tmp_path / "s.svs").write_bytes(b"II*\0" + bytes(range(256)))
    out = tmp_path / "C"
    code, _, err = jaxhisto(
        "cluster", features, "--k", 3, "--show.slides", tmp_path / "s.svs", "--out", out
    )
    assert code == 0, err
    assert err.count("s.svs: ") == 1
    assert "its tiles are drawn as missing" in err
    assert (out / "map-s.svs.png").is_file()
    assert json.loads((out / "clusters.json").read_text())["pictures_missing"] == 60


def test_a_slide_that_goes_while_it_is_painted_costs_only_its_pictures(
    jaxhisto, features, tmp_path, monkeypatch
):
    def gone(slide: Slide, *_: object) -> None:
        raise SlideError(f"{slide.path}: cannot be read (Stale file handle); check the path")

    monkeypatch.setattr(Slide, "read", gone)
    image = np.full((512, 512, 3), 180, np.uint8)
    tifffile.imwrite(tmp_path / "s.svs", image, tile=(256, 256), photometric="rgb")
    out = tmp_path / "C"
    code, _, err = jaxhisto(
        "cluster", features, "--k", 3, "--show.slides", tmp_path / "s.svs", "--show.mpp", 0.5,
        "--out", out,
    )  # fmt: skip
    assert code == 0, err
    assert err.count("check the path; its tiles are drawn as missing") == 1
    assert (out / "map-s.svs.png").is_file()
    assert json.loads((out / "clusters.json").read_text())["pictures_missing"] == 60


def test_a_folder_without_a_name_is_refused(jaxhisto, features, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "--out .: the folder is replaced" in refusal(
        jaxhisto("cluster", features, "--k", 3, "--out", "."), 2
    )


def test_clusters_that_another_process_wrote_meanwhile_stay(
    jaxhisto, features, tmp_path, monkeypatch
):
    def meanwhile(*args):
        (tmp_path / "C").mkdir()
        (tmp_path / "C/clusters.json").write_text("theirs")

    monkeypatch.setattr("jaxhisto.clusters.cluster_pictures.draw_all", meanwhile)
    result = jaxhisto("cluster", features, "--k", 3, "--out", tmp_path / "C")
    assert "another process has written clusters there meanwhile" in refusal(result)
    assert (tmp_path / "C/clusters.json").read_text() == "theirs"
    assert not list(tmp_path.glob(".*"))


def test_what_a_kill_left_is_cleared_and_two_at_once_are_refused(jaxhisto, features, tmp_path):
    left = tmp_path / ".C.partial"
    left.mkdir()
    (left / "centres.npy").write_bytes(b"half")
    asked = ("cluster", features, "--k", 3, "--maps", 0, "--out", tmp_path / "C")
    with (left / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert "another `jaxhisto cluster` is at work there" in refusal(jaxhisto(*asked))
    code, _, err = jaxhisto(*asked)
    assert code == 0, err
    assert {p.name for p in tmp_path.iterdir()} == {"C"}
    assert {p.name for p in (tmp_path / "C").iterdir()} == {
        "clusters.json", "centres.npy", "assignments.h5"
    }  # fmt: skip


def test_constant_features_are_refused(jaxhisto, tmp_path):
    path = write_features(tmp_path / "f.h5", np.full((9, 4), 0.3), [f"t{i}" for i in range(9)])
    result = jaxhisto("cluster", path, "--k", 2, "--out", tmp_path / "C")
    assert "all 9 rows of features are the same" in refusal(result)


def test_other_tiles_are_refused_or_matched_by_name(jaxhisto, images, features, tmp_path):
    fewer = tmp_path / "tissue"
    fewer.mkdir()
    for i in range(0, 60, 2):
        (fewer / f"{i:02d}.png").write_bytes((images / f"{i:02d}.png").read_bytes())
    asked = ("cluster", features, "--k", 3, "--show.tiles", fewer, "--out", tmp_path / "C")
    line = refusal(jaxhisto(*asked))
    assert "is of data" in line
    assert "--show.partial" in line
    code, said, err = jaxhisto(*asked, "--show.partial", "--pick", 12)
    assert code == 0, err
    assert "30 of 60 tiles have no picture: 01.png, 03.png, 05.png, 07.png, 09.png and 25" in said
    assert json.loads((tmp_path / "C/clusters.json").read_text())["pictures_missing"] == 30
    assert 0 < len(read_manifest(tmp_path / "C/picked.jsonl")) < 12
    assert "more are not in --show.tiles" in said


def test_a_folder_of_something_else_is_never_replaced(jaxhisto, features, tmp_path):
    (tmp_path / "C").mkdir()
    (tmp_path / "C/thesis.tex").write_text("years of work")
    result = jaxhisto("cluster", features, "--k", 3, "--force", "--out", tmp_path / "C")
    assert "holds something else" in refusal(result, 2)
    assert (tmp_path / "C/thesis.tex").read_text() == "years of work"


def test_retrieval_finds_the_colour(jaxhisto, images, features, tmp_path):
    out = tmp_path / "near.png"
    asked = ("retrieve", features, "--query", "04.png", "--show.tiles", images, "--out", out)
    assert jaxhisto(*asked, "--count", 6)[0] == 0
    rows = out.with_suffix(".csv").read_text().splitlines()
    assert rows[0] == "query,rank,name,cosine"
    assert all(int(row.split(",")[2][:2]) % 3 == 1 for row in rows[1:])
    assert len({row.split(",")[2] for row in rows[1:]} - {"04.png"}) == 6
    with Image.open(out) as sheet:
        assert sheet.width > 7 * 128
    assert "pass --force" in refusal(jaxhisto(*asked), 2)
    out.unlink()
    assert "would replace" in refusal(jaxhisto(*asked), 2)
    result = jaxhisto("retrieve", features, "--query", "4.png", "--out", tmp_path / "n.png")
    assert "--query 4.png: no row" in refusal(result, 2)
    result = jaxhisto("retrieve", features, "--query", "--out", tmp_path / "n.png")
    assert "--query names no tile" in refusal(result, 2)
    result = jaxhisto("retrieve", features, "--query", "04.png", "--out", tmp_path / "n.jpg")
    assert "ends in .png" in refusal(result, 2)


def test_the_sheet_of_datasets_has_a_row_of_each(jaxhisto, images, tmp_path):
    out = tmp_path / "many.png"
    code, said, err = jaxhisto("sheet", f"liver={images}", "--per-dataset", 5, "--out", out)
    assert code == 0, err
    assert "5 tiles of 1 dataset" in said
    sheet = np.asarray(Image.open(out).convert("RGB")).astype(int)
    # Five tiles, each of one of the three colours.
    row = sheet[24 * 2 + 50 + 26 + 64 - 10 : 24 * 2 + 50 + 26 + 64 + 10]
    for n in range(5):
        x = 24 + 6 + n * 134 + 64
        seen = row[:, x - 9 : x + 9].mean((0, 1))
        assert min(np.abs(seen - hue).max() for hue in HUES) < 12
    assert not list(tmp_path.glob(".*"))


def test_a_pick_goes_round_the_clusters_nearest_first():
    labels = np.array([0, 0, 0, 0, 1, 1, 2, 0], np.int32)
    distances = np.array([3, 1, 2, 9, 5, 4, 0, 1], np.float32)
    assert pick(labels, distances, 5) == [1, 5, 6, 7, 4]
    assert pick(labels, distances, 99) == [1, 5, 6, 7, 4, 2, 0, 3]
    assert pick(labels, distances, 3, [1, 2]) == [5, 6, 4]


def test_nearest_equals_a_plain_sort(monkeypatch):
    rows = np.random.default_rng(0).standard_normal((500, 8)).astype(np.float32)
    monkeypatch.setattr("jaxhisto.clusters.kmeans.CHUNK", 4 * 8 * 64)
    found, cosines = nearest(Held(rows), rows[:3], 7)
    unit = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    exact = unit[:3] @ unit.T
    np.testing.assert_array_equal(found, np.argsort(-exact, axis=1)[:, :7])
    np.testing.assert_allclose(cosines, -np.sort(-exact, axis=1)[:, :7], atol=1e-6)


def test_small_things():
    assert tried(1_400_000) == tuple(range(1000, 10001, 1000))
    assert tried(1000) == tuple(range(5, 51, 5))
    assert tried(3) == (1,)
    assert [bar_length(0.5, 50), bar_length(1, 9.9), bar_length(2, 60)] == [20, 5, 100]
    many = colours(np.random.default_rng(0).standard_normal((300, 8)).astype(np.float32))
    assert len(set(many)) > 290


def test_a_sheet_of_images_whose_names_are_no_utf8(jaxhisto, images, tmp_path):
    """A ZIP of Windows leaves them; nothing of a sheet depends on how they are written."""
    folder = Path(shutil.copytree(images, tmp_path / "images"))
    for path in sorted(folder.rglob("*.png")):
        os.rename(path, os.fsencode(path.parent) + b"/gr\xfc " + os.fsencode(path.name))
    code, said, err = jaxhisto("sheet", folder, "--out", tmp_path / "s.png")
    assert (code, "1 dataset" in said) == (0, True), err
