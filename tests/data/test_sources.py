"""Stores and folders opened as one; the files' own pixels and label tables are the oracles."""

from __future__ import annotations

import csv
import shutil
from dataclasses import replace
from pathlib import Path

import imageio.v3 as iio
import numpy as np
import pytest
from made_images import blobs, encoded, noise, write_pngs, write_raw_store, write_store

from jaxhisto.config import DataConfig
from jaxhisto.data.sources import Tiles, open_tiles
from jaxhisto.errors import StoreError


def opened(*paths: Path, **settings: object) -> Tiles:
    return open_tiles(replace(DataConfig(stores=tuple(map(str, paths)), threads=2), **settings))


def named(tiles: Tiles, folder: Path) -> list[str]:
    return [str(Path(tiles.names(i)).relative_to(folder)) for i in range(len(tiles))]


def test_a_folder_is_read_in_the_order_of_names(tmp_path: Path) -> None:
    images = {"b.png": noise(8, 9, 1), "a/z.PNG": noise(9, 8, 2), "a/y.png": noise(5, 5, 3)}
    folder = write_pngs(tmp_path / "images", images)
    (folder / "notes.txt").write_text("not an image")
    (folder / ".hidden.png").write_bytes(b"")
    tiles = opened(folder)
    assert named(tiles, folder) == ["a/y.png", "a/z.PNG", "b.png"]
    for i, name in enumerate(["a/y.png", "a/z.PNG", "b.png"]):
        assert np.array_equal(tiles.read(i), images[name])
        assert tiles.sizes(i) == images[name].shape[:2]
    assert tiles.canvas == (9, 9)
    assert tiles.mpp_range() is None
    assert np.array_equal(tiles.read(-1), images["b.png"])
    with pytest.raises(IndexError):
        tiles.read(3)


def test_long_images_are_cut_into_equal_cells_and_nothing_is_lost(tmp_path: Path) -> None:
    big = noise(50, 21)
    folder = write_pngs(tmp_path / "images", {"big.png": big, "small.png": noise(20, 20, 1)})
    tiles = opened(folder, max_side=20)
    assert len(tiles) == 3 * 2 + 1
    sizes = [tiles.sizes(i) for i in range(6)]
    assert {h for h, _ in sizes} == {16, 17}
    assert {w for _, w in sizes} == {10, 11}
    rows = [np.hstack([tiles.read(i), tiles.read(i + 1)]) for i in (0, 2, 4)]
    assert np.array_equal(np.vstack(rows), big)
    assert tiles.names(0).endswith("big.png@0,0")
    assert len({tiles.names(i) for i in range(7)}) == 7
    assert tiles.canvas == (20, 20)
    assert "2 images in 7 cells" in tiles.summary()


def test_exclude_matches_relative_and_bare_names(tmp_path: Path) -> None:
    names = ["C4_1.png", "C5_1.png", "x/C5_2.png", "x/C4_2.png", "y/C4_3.png"]
    folder = write_pngs(tmp_path / "images", {n: noise(4, 4, i) for i, n in enumerate(names)})
    assert named(opened(folder, exclude=("C5_*",)), folder) == [
        "C4_1.png",
        "x/C4_2.png",
        "y/C4_3.png",
    ]
    tiles = opened(folder, exclude=("x/*", "C5_?.png"))
    assert named(tiles, folder) == ["C4_1.png", "y/C4_3.png"]
    assert "2 images, 3 excluded" in tiles.summary()


def test_an_excluded_image_may_be_broken(tmp_path: Path) -> None:
    folder = write_pngs(tmp_path / "images", {"a.png": noise(4, 4)})
    (folder / "bad.png").write_bytes(b"")
    assert len(opened(folder, exclude=("bad*",))) == 1


def test_a_pattern_that_excludes_nothing_is_refused(tmp_path: Path) -> None:
    folder = write_pngs(tmp_path / "images", {"C5_1.png": noise(4, 4), "C4_1.png": noise(4, 4, 1)})
    with pytest.raises(StoreError, match=r"'C5-\*' matches nothing.*correct it"):
        opened(folder, exclude=("C5_*", "C5-*"))


def test_bad_images_are_refused_counted_and_listed(tmp_path: Path) -> None:
    folder = write_pngs(tmp_path / "images", {"a.png": noise(4, 4), "z.png": noise(4, 4, 1)})
    (folder / "empty.jpg").write_bytes(b"")
    (folder / "half.jpg").write_bytes(encoded(noise(64, 64), "JPEG")[:2000])
    with pytest.raises(StoreError) as error:
        opened(folder, failures_allowed=1)
    assert str(error.value) == (
        f"{folder}: 2 of 4 images cannot be used, the first, empty.jpg, is empty (0 bytes); remove "
        "it, or pass --data.failures-allowed 2 to go on without."
    )
    tiles = opened(folder, failures_allowed=2)
    assert named(tiles, folder) == ["a.png", "z.png"]
    assert [name for name, _ in tiles.dropped] == [
        str(folder / "empty.jpg"),
        str(folder / "half.jpg"),
    ]
    assert "2 dropped" in tiles.summary()
    assert f"dropped {folder / 'half.jpg'}: is cut short" in tiles.summary()


def test_stores_and_folders_mix_in_the_order_given(tmp_path: Path) -> None:
    slides = {"x/s1": [blobs(32, 1), blobs(32, 2)], "s2": [blobs(32, 3)]}
    store = write_store(tmp_path / "store", slides, mpp=0.25)
    other = write_store(tmp_path / "other", {"s3": [blobs(16, 4)]}, mpp=0.5)
    images = write_pngs(tmp_path / "images", {"a.png": noise(40, 8)})
    tiles = opened(store, images, other)
    expected = [*slides["x/s1"], *slides["s2"], noise(40, 8), blobs(16, 4)]
    assert len(tiles) == 5
    for i, pixels in enumerate(expected):
        assert tiles.read(i).shape == pixels.shape
        assert np.abs(tiles.read(i).astype(int) - pixels).mean() < 3
    assert tiles.canvas == (40, 32)
    assert tiles.mpp_range() == (0.25, 0.5)
    assert tiles.names(2) == f"{store}: tile 2 (slide s2)"
    assert "3 tiles of 2 slides, 32 px, 0.25 to 0.25 um/px" in tiles.summary()


def test_exclude_takes_slide_ids_of_a_store(tmp_path: Path) -> None:
    slides = {"x/s1": [blobs(16, 1)] * 2, "y/s1": [blobs(16, 2)], "s2": [blobs(16, 3)]}
    store = write_store(tmp_path / "store", slides)
    assert [opened(store, exclude=("s1",)).names(0), len(opened(store, exclude=("x/*",)))] == [
        f"{store}: tile 3 (slide s2)",
        2,
    ]
    with pytest.raises(StoreError, match="no tile is left of 4"):
        opened(store, exclude=("*",))


def test_a_stored_tile_that_is_no_image_is_named(tmp_path: Path) -> None:
    """The manifest vouches for the bytes; what they decode to is checked on reading."""
    good = encoded(blobs(16), "JPEG")
    store = write_raw_store(tmp_path / "store", {"s1": [good, good[:-40], b""]}, side=16)
    tiles = opened(store)
    assert tiles.read(0).shape == (16, 16, 3)
    for i in (1, 2):
        with pytest.raises(StoreError, match=rf"tile {i} \(slide s1\): is not a whole JPEG; cut"):
            tiles.read(i)
    wrong = write_raw_store(tmp_path / "wrong", {"s1": [encoded(blobs(32), "JPEG")]}, side=16)
    with pytest.raises(StoreError, match="32x32 px where the manifest says 16"):
        opened(wrong).read(0)


def test_an_edited_store_is_refused(tmp_path: Path) -> None:
    store = write_store(tmp_path / "store", {"s1": [blobs(16)]})
    manifest = store / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"tile_px": 16', '"tile_px": 17'))
    with pytest.raises(StoreError, match="does not match its own hash"):
        opened(store)


def test_an_unfinished_store_is_no_folder_of_images(tmp_path: Path) -> None:
    """Its report holds pictures of slides, which must not be taken for tiles."""
    stopped = tmp_path / "stopped"
    write_pngs(stopped / "report", {"thumbnail.png": noise(8, 8)})
    write_pngs(stopped / "unfinished", {})
    (stopped / "unfinished").mkdir()
    (stopped / "unfinished" / "abc.array_record").write_bytes(b"part")
    with pytest.raises(StoreError, match="tiling was stopped"):
        opened(stopped)
    store = write_store(tmp_path / "above" / "store", {"s1": [blobs(16)]})
    write_pngs(store / "report", {"thumbnail.png": noise(8, 8)})
    with pytest.raises(StoreError, match="tile store inside an image folder"):
        opened(tmp_path / "above")
    (store / "manifest.json").unlink()
    with pytest.raises(StoreError, match=r"without its manifest\.json"):
        opened(store)


def test_folders_without_anything_are_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    images = write_pngs(tmp_path / "images", {"a.png": noise(4, 4)})
    with pytest.raises(StoreError, match=r"empty: no images .* and no tile store"):
        opened(tmp_path / "empty")
    with pytest.raises(StoreError, match="does not exist"):
        opened(tmp_path / "absent")
    with pytest.raises(StoreError, match="is not a folder"):
        opened(images / "a.png")
    with pytest.raises(StoreError, match="no image is left of 1"):
        opened(images, exclude=("*",))
    with pytest.raises(StoreError, match="listed twice"):
        opened(images, tmp_path / "images" / ".." / "images")
    with pytest.raises(StoreError, match=r"nothing is in --data\.stores; name"):
        opened()


def test_linked_folders_are_followed_once(tmp_path: Path) -> None:
    images = write_pngs(tmp_path / "images", {"a.png": noise(4, 4)})
    elsewhere = write_pngs(tmp_path / "elsewhere", {"b.png": noise(4, 4, 1)})
    (images / "link").symlink_to(elsewhere)
    (images / "loop").symlink_to(images)
    assert named(opened(images), images) == ["a.png", "link/b.png"]


def test_the_hash_is_of_the_data_and_not_of_its_place(tmp_path: Path) -> None:
    images = {"a.png": noise(30, 4), "b.png": noise(4, 4, 1)}
    folder = write_pngs(tmp_path / "images", images)
    moved = shutil.copytree(folder, tmp_path / "moved")
    store = write_store(tmp_path / "store", {"s1": [blobs(16)]})
    mix = opened(folder, store)
    assert opened(moved, store).hash == mix.hash
    others = [
        opened(folder),
        opened(store, folder),
        opened(folder, store, exclude=("b.png",)),
        opened(folder, store, max_side=10),
    ]
    (moved / "b.png").write_bytes(encoded(noise(4, 4, 2)))
    others.append(opened(moved, store))
    assert len({mix.hash, *(tiles.hash for tiles in others)}) == 6


def test_an_image_that_changed_or_went_since_opening_is_named(tmp_path: Path) -> None:
    folder = write_pngs(tmp_path / "images", {"a.png": noise(4, 4), "b.png": noise(4, 4, 1)})
    tiles = opened(folder)
    (folder / "a.png").write_bytes(encoded(noise(4, 4, 2)))
    (folder / "b.png").unlink()
    with pytest.raises(StoreError, match=r"a\.png: changed since the run opened it"):
        tiles.read(0)
    with pytest.raises(StoreError, match=r"b\.png: cannot be read any more"):
        tiles.read(1)


def test_her2st_without_its_test_section(shared_data: Path) -> None:
    with (shared_data / "her2st_spots" / "labels.csv").open() as table:
        rows = list(csv.DictReader(table))
    tiles = opened(shared_data / "her2st_spots" / "images", exclude=("C5_*",))
    kept = [Path(tiles.names(i)).name for i in range(len(tiles))]
    assert len(kept) == sum(row["section"] != "C5" for row in rows) > 500
    assert not any(name.startswith("C5") for name in kept)
    assert tiles.canvas == (256, 256)


def test_real_folders_mix(shared_data: Path) -> None:
    tiles = opened(shared_data / "dsb2018_stained" / "images", shared_data / "nct_crc_mini")
    files = [Path(tiles.names(i)) for i in range(len(tiles))]
    assert len(files) == 45 + 19
    assert tiles.canvas == (256, 320)
    for i in (0, 44, *(i for i, f in enumerate(files) if f.suffix == ".tif")):
        assert np.array_equal(tiles.read(i), iio.imread(files[i])[..., :3])
