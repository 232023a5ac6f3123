"""Images in HDF5 files, CSV lists and TFDS sets, against the arrays they were written from."""

from __future__ import annotations

import io
import os
import shutil
import struct
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np
import pytest
import tensorflow_datasets as tfds
from made_images import encoded, noise, write_pngs

from jaxhisto.config import DataConfig
from jaxhisto.data.sources import Tiles, open_tiles
from jaxhisto.errors import StoreError

IMAGES = {
    "b.png": noise(8, 9, 1),
    "sub/größe 厚.png": noise(50, 21, 2),
    "sub/deep/C5_1.png": noise(12, 12, 3),
    "sub/a.png": noise(7, 5, 4),
}


def opened(*paths: Path | str, **settings: object) -> Tiles:
    return open_tiles(replace(DataConfig(stores=tuple(map(str, paths)), threads=2), **settings))


def bmp(height: int, width: int, value: int) -> bytes:
    """Written by hand, so that its bytes are no encoder's."""
    row = bytes([value, value + 1, value + 2]) * width
    body = (row + b"\0" * (-len(row) % 4)) * height
    header = struct.pack("<IiiHHIIiiII", 40, width, height, 1, 24, 0, len(body), 2835, 2835, 0, 0)
    return b"BM" + struct.pack("<IHHI", 54 + len(body), 0, 0, 54) + header + body


def test_the_hash_of_a_folder_is_pinned(tmp_path: Path) -> None:
    """A run that began before these kinds were added must go on with its folders."""
    (tmp_path / "sub").mkdir()
    (tmp_path / "b.bmp").write_bytes(bmp(5, 7, 10))
    (tmp_path / "sub" / "a.bmp").write_bytes(bmp(40, 3, 90))
    tiles = opened(tmp_path, max_side=32)
    assert (
        tiles.sources[0].hash == "6b634f4e7a3593b35daa4713d22dd33d826ab4b3137d8372ca64879e692d7c4c"
    )
    assert tiles.hash == "27465596b59476eabe879792f2726c652e665235848e2571858bfdefe1f5ae0a"


def test_a_list_names_images_and_what_they_are(tmp_path: Path) -> None:
    write_pngs(tmp_path / "images", IMAGES)
    table = tmp_path / "list.csv"
    table.write_text(
        "slide,path,mpp,dataset,extra\n"
        "s1,images/sub/größe 厚.png,0.5,d1,x\n"
        "s2,images/b.png,0.25,d1,\"a,b\"\n"
        "s3, images/sub/a.png ,,d2,\n",
        encoding="utf-8-sig",
    )  # fmt: skip
    tiles = opened(table)
    for i, name in enumerate(["sub/größe 厚.png", "b.png", "sub/a.png"]):
        np.testing.assert_array_equal(tiles.read(i), IMAGES[name])
        assert tiles.names(i) == str(tmp_path / "images" / name)
    assert tiles.mpp_range() == (0.25, 0.5)
    assert "list, 3 images, 0.25 to 0.5 um/px" in tiles.summary()
    assert [len(opened(table, exclude=(p,))) for p in ("s1", "d1", "images/sub/*", "b.png")] == [
        2,
        1,
        1,
        2,
    ]
    moved = shutil.copytree(tmp_path, tmp_path.parent / f"{tmp_path.name} moved")
    assert opened(moved / "list.csv").hash == tiles.hash


def test_missing_files_of_a_list_are_counted(tmp_path: Path) -> None:
    write_pngs(tmp_path, {"a.png": noise(4, 4)})
    table = tmp_path / "list.csv"
    table.write_text("file\na.png\ngone.png\n.\n")
    with pytest.raises(
        StoreError, match=r"2 of 3 .* first, gone\.png, cannot be read \(No such file"
    ):
        opened(table, failures_allowed=1)
    tiles = opened(table, failures_allowed=2)
    assert [name for name, _ in tiles.dropped] == [str(tmp_path / "gone.png"), str(tmp_path)]


@pytest.mark.parametrize(
    ("text", "why"),
    [
        (b"name;label\na.png;1\n", r"no column of paths \(path, .* but name;label; name it"),
        (b"", "but none; name it so"),
        (b"path\n", "lists no image"),
        (b"path,mpp\na.png,coarse\n", "row 2: 'coarse' is no um/px"),
        (b"path,mpp\na.png,0\n", "row 2: '0' is no um/px"),
        (b"path\na.png\na.png\n", r"row 3: lists a\.png a second time"),
        (b"slide,path\ns1\n", "row 2: has no path"),
        ("path\ngrö.png\n".encode("latin-1"), r"cannot be read \(.*codec.*; save it as UTF-8"),
        ("path\na.png\n".encode("utf-16"), "cannot be read .*; save it as UTF-8"),
        (b'path\n"' + b"x" * 200_000, "cannot be read .*field larger"),
    ],
)  # fmt: skip
def test_lists_that_are_refused(tmp_path: Path, text: bytes, why: str) -> None:
    (tmp_path / "list.csv").write_bytes(text)
    with pytest.raises(StoreError, match=rf"list\.csv.*{why}"):
        opened(tmp_path / "list.csv")


@pytest.mark.parametrize("layout", [{}, {"chunks": (4, 6, 5, 3), "compression": "gzip"}])
@pytest.mark.parametrize("name", ["x", "imgs"])
def test_patches_of_an_hdf5_file(tmp_path: Path, name: str, layout: dict) -> None:
    patches = np.stack([noise(12, 10, i) for i in range(30)])
    path = tmp_path / "train.h5"
    with h5py.File(path, "w") as file:
        file.create_dataset(name, data=patches, **layout)
        file["coords"] = np.zeros((30, 2))
    tiles = opened(path)
    assert (len(tiles), tiles.canvas) == (30, (12, 10))
    assert tiles.names(7) == f"{path}/{name}/7"
    order = np.random.default_rng(0).integers(0, 30, 500).tolist()
    with ThreadPoolExecutor(8) as pool:
        for i, pixels in zip(order, pool.map(tiles.read, order), strict=True):
            assert np.array_equal(pixels, patches[i])
    other = tmp_path / "other.h5"
    with h5py.File(other, "w", userblock_size=1024) as file:
        file[name] = patches
    assert opened(other).hash == tiles.hash  # the patches are the data, not how they are packed
    with h5py.File(other, "r+") as file:
        file[name][3, 0, 0, 0] ^= 1
    assert opened(other).hash != tiles.hash
    assert len(opened(path, exclude=(f"{name}/1*",))) == 19


def test_hdf5_files_that_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.h5"
    for key, data, why in [
        ("x", np.zeros((2, 4, 4, 3), np.float32), r"x \(2, 4, 4, 3\) float32"),
        ("x", np.zeros((2, 4, 4, 1), np.uint8), r"x \(2, 4, 4, 1\) uint8"),
        ("x", np.zeros((2, 3, 4, 4), np.uint16), "uint16"),
        ("imgs", np.zeros((0, 4, 4, 3), np.uint8), r"imgs \(0, 4, 4, 3\)"),
        ("features", np.zeros((2, 4)), r"features \(2, 4\) float64; write the patches so"),
        ("x/y", np.zeros(2), r"x \(a group\)"),
    ]:
        with h5py.File(path, "w") as file:
            file[key] = data
        with pytest.raises(StoreError, match=rf"a\.h5: needs a dataset x or imgs .*{why}"):
            opened(path)
    with h5py.File(path, "w") as file:
        file["x"] = np.zeros((9, 32, 32, 3), np.uint8)
    path.write_bytes(path.read_bytes()[:9000])
    with pytest.raises(StoreError, match=r"a\.h5: is no whole HDF5 file .*copy it again"):
        opened(path)


def test_without_h5py_the_remedy_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["x"] = np.zeros((1, 4, 4, 3), np.uint8)
    monkeypatch.setitem(sys.modules, "h5py", None)
    with pytest.raises(
        StoreError, match=r"needs h5py; install it with `pip install 'jaxhisto\[hdf5\]'`"
    ):
        opened(tmp_path / "a.h5")


@pytest.mark.parametrize(("name", "side"), [("patch_camelyon", 96), ("colorectal_histology", 150)])
def test_tfds_sets_by_name(name: str, side: int) -> None:
    with tfds.testing.mock_data(num_examples=5):
        tiles = opened(f"tfds:{name}")
        expected = [e["image"] for e in tfds.data_source(name, split="train")]
        assert opened(f"tfds:{name}:train").hash == tiles.hash
        assert (len(tiles), tiles.canvas) == (5, (side, side))
        for i, image in enumerate(expected):
            np.testing.assert_array_equal(tiles.read(i), image)
        assert tiles.names(3) == f"tfds:{name}/3"
        assert "TFDS set, 5 images" in tiles.summary()
        assert len(opened(f"tfds:{name}", max_side=side // 2)) == 20


def test_tfds_sets_on_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A set that TFDS itself has written, found by name in TFDS_DATA_DIR's place."""
    images = [noise(9, 7, i) for i in range(6)]

    class MadeSet(tfds.core.GeneratorBasedBuilder):
        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            image = tfds.features.Image(shape=(None, None, 3), encoding_format="png")
            features = tfds.features.FeaturesDict({"image": image})
            return self.dataset_info_from_configs(features=features, disable_shuffling=True)

        def _split_generators(self, dl_manager):
            return {"train": self._generate_examples(0, 4), "test": self._generate_examples(4, 6)}

        def _generate_examples(self, start, stop):
            for i in range(start, stop):
                yield i, {"image": io.BytesIO(encoded(images[i]))}

    monkeypatch.setattr(tfds.core.constants, "DATA_DIR", str(tmp_path))
    monkeypatch.setattr(MadeSet, "pkg_dir_path", tmp_path, raising=False)
    with pytest.raises(StoreError, match=rf"made_set: is not in {tmp_path}.*`tfds build made_set"):
        opened("tfds:made_set")
    MadeSet(file_format="array_record").download_and_prepare()
    for name, part in [("made_set", images[:4]), ("made_set:test", images[4:]),
                       ("made_set:1.0.0:train[1:3]", images[1:3])]:  # fmt: skip
        tiles = opened(f"tfds:{name}")
        assert len(tiles) == len(part)
        for i, image in enumerate(part):
            np.testing.assert_array_equal(tiles.read(i), image)
    with pytest.raises(StoreError, match="tfds:made_set:val: has no split 'val'; there is"):
        opened("tfds:made_set:val")


def test_tfds_sets_that_are_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(
        StoreError, match=r"patch_camelyon: is not in .*`tfds build patch_camelyon --file"
    ):
        opened("tfds:patch_camelyon")
    with pytest.raises(StoreError, match=r"no such dataset .*do you mean tfds:patch_camelyon\?"):
        opened("tfds:patch_camelion")
    with pytest.raises(StoreError, match=r"no feature `image` but .*text"):
        opened("tfds:imdb_reviews")
    with pytest.raises(StoreError, match="is no tfds:NAME or"):
        opened("tfds:")


def test_hard_paths_of_folders_and_archives(tmp_path: Path) -> None:
    """Links onto themselves, dangling ones, names that are no text, and long ones."""
    folder = write_pngs(tmp_path / "images", {"/".join(["größe" * 10] * 4) + "/a.png": noise(4, 4)})
    (folder / "loop.png").symlink_to("loop.png")
    (folder / "gone.png").symlink_to("nowhere")
    (folder / "again").symlink_to(folder)
    with open(os.fsencode(folder) + b"/\xff.png", "wb") as file:
        file.write(b"no image")
    tiles = opened(folder, failures_allowed=3)
    assert len(tiles) == 1
    tiles.summary().encode()  # can be printed
    assert {name.rpartition("/")[2]: reason for name, reason in tiles.dropped} == {
        "gone.png": "cannot be read (No such file or directory)",
        "loop.png": "cannot be read (Too many levels of symbolic links)",
        "\\udcff.png": "is no readable JPEG, PNG, TIFF, BMP, WEBP image",
    }
    (tmp_path / "self").symlink_to("self")
    with pytest.raises(StoreError, match="self: does not exist"):
        opened(tmp_path / "self", tmp_path / "nowhere")
    with pytest.raises(StoreError, match="xxx: "):
        opened(tmp_path / ("x" * 300))
