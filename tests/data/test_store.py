"""The store: TFDS reads it, and damage is seen."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import cv2
import numpy as np
import pytest
import tensorflow_datasets as tfds
from made_stores import image, write
from PIL import Image

from jaxhisto.data import compaction
from jaxhisto.data.store import TileStore, is_store, manifest_hash
from jaxhisto.data.store_writer import (
    encode_jpeg,
    tfds_name,
)
from jaxhisto.errors import StoreError


def test_tfds_reads_the_store(tmp_path):
    write(tmp_path / "s", a=3, b=2)
    source = tfds.builder_from_directory(tmp_path / "s").as_data_source(split="train")
    store = TileStore(tmp_path / "s")

    assert len(source) == len(store) == 5
    for i in range(5):
        theirs, ours = source[i], store[i]
        assert theirs["slide"].decode() == ours["slide"] == ("a" if i < 3 else "b")
        assert (theirs["x"], theirs["y"]) == (ours["x"], ours["y"])
        assert store.image(i) == ours["image"]
        assert theirs["mpp"] == np.float32(0.499)
        assert ours["mpp"] == 0.499
        assert theirs["mpp_source"].decode() == ours["mpp_source"] == "flag"
        assert theirs["dataset"].decode() == ours["dataset"] == "My set"
        pixels = cv2.imdecode(np.frombuffer(ours["image"], np.uint8), cv2.IMREAD_COLOR_RGB)
        np.testing.assert_array_equal(theirs["image"], pixels)
        assert np.abs(pixels.astype(int) - image(i if i < 3 else i - 3)).mean() < 3


def test_the_manifest_alone_answers_for_slides_and_sizes(tmp_path):
    write(tmp_path / "s", a=3, b=2)
    store = TileStore(tmp_path / "s")

    assert store.slides() == ["a", "a", "a", "b", "b"]
    assert store.mpp_range() == (0.499, 0.499)
    assert (store.tile_px, store.dataset, store.path) == (24, "My set", tmp_path / "s")
    assert store[-1]["y"] == 1
    with pytest.raises(IndexError):
        store[5]


def test_threads_and_copies_read_the_same(tmp_path):
    write(tmp_path / "s", a=40, b=40)
    store = TileStore(tmp_path / "s")
    alone = [store[i]["image"] for i in range(80)]
    copy = pickle.loads(pickle.dumps(store))
    order = np.random.default_rng(0).integers(0, 80, 2000).tolist()
    with ThreadPoolExecutor(8) as threads:
        for read in (store, copy):
            images = list(threads.map(lambda i, read=read: read[i]["image"], order))
            assert images == [alone[i] for i in order]


def test_few_open_files_serve_many_shards(tmp_path, monkeypatch):
    monkeypatch.setattr("jaxhisto.data.store.OPEN_SHARDS", 2)
    monkeypatch.setattr(compaction, "SHARD_BYTES", 1)
    write(tmp_path / "s", **{f"s{i}": 2 for i in range(6)})
    store = TileStore(tmp_path / "s")
    before = len(os.listdir("/proc/self/fd"))

    assert [store[i]["slide"] for i in range(12)] == store.slides()
    assert len(os.listdir("/proc/self/fd")) <= before + 3


@pytest.mark.parametrize("subsampling", ["4:4:4", "4:2:2", "4:2:0"])
def test_jpegs_are_rgb_and_subsampled_as_asked(tmp_path, subsampling):
    file = tmp_path / "tile.jpg"
    file.write_bytes(encode_jpeg(image(0), 90, subsampling))
    with Image.open(file) as read:
        layers = [layer[1:3] for layer in read.layer]
        pixels = np.asarray(read)

    assert layers[0] == {"4:4:4": (1, 1), "4:2:2": (2, 1), "4:2:0": (2, 2)}[subsampling]
    assert layers[1] == (1, 1)
    assert pixels[12, 0, 0] > 150 > 50 > pixels[12, 0, 2]
    assert len(encode_jpeg(image(0), 50, subsampling)) < file.stat().st_size


def test_an_edited_manifest_is_refused(tmp_path):
    write(tmp_path / "s", a=3)
    file = tmp_path / "s" / "manifest.json"
    manifest = json.loads(file.read_text())
    manifest["slides"][0]["tile_mpp"] = 0.25
    file.write_text(json.dumps(manifest))

    with pytest.raises(StoreError, match=r"manifest\.json: does not match its own hash"):
        TileStore(tmp_path / "s")
    with pytest.raises(StoreError, match="does not match its own hash"):
        write(tmp_path / "s", a=3)
    file.write_text("{")
    with pytest.raises(StoreError, match=r"manifest\.json: cannot be read"):
        TileStore(tmp_path / "s")


def test_a_damaged_or_missing_shard_is_refused(tmp_path):
    manifest = write(tmp_path / "s", a=3)
    part = tmp_path / "s" / manifest["shards"][0]["file"]
    data = bytearray(part.read_bytes())
    data[len(data) // 2] ^= 1
    part.write_bytes(data)
    with pytest.raises(StoreError, match=f"{part.name}: is damaged"):
        TileStore(tmp_path / "s")

    part.unlink()
    with pytest.raises(StoreError, match=f"{part.name}: is missing"):
        TileStore(tmp_path / "s", verify=False)


def test_a_record_that_cannot_be_read_names_its_shard(tmp_path):
    manifest = write(tmp_path / "s", a=3)
    part = tmp_path / "s" / manifest["shards"][0]["file"]
    part.write_bytes(b"\xff" * part.stat().st_size)

    with pytest.raises(StoreError, match=f"{part.name}: tile 0 cannot be read"):
        TileStore(tmp_path / "s", verify=False)[0]
    with pytest.raises(StoreError, match=f"{part.name}: tile 0 cannot be read"):
        TileStore(tmp_path / "s", verify=False).image(0)


@pytest.mark.parametrize("was_read", [False, True])
@pytest.mark.parametrize("change", ["replaced", "edited", "removed"])
def test_a_shard_that_changed_since_opening_is_refused_by_name(
    tmp_path, monkeypatch, change, was_read
):
    """Also where the new shard is a sound one, which no checksum of its own would tell."""
    monkeypatch.setattr(compaction, "SHARD_BYTES", 1)
    manifest = write(tmp_path / "s", a=3, b=2)
    other = write(tmp_path / "t", a=4)
    part = tmp_path / "s" / manifest["shards"][0]["file"]
    theirs = tmp_path / "t" / other["shards"][0]["file"]
    store = TileStore(tmp_path / "s")
    if was_read:
        assert store[0]["slide"] == "a"
    if change == "replaced":
        os.replace(theirs, part)
    elif change == "edited":
        part.write_bytes(theirs.read_bytes())
    else:
        part.unlink()
    with pytest.raises(StoreError, match=rf"{part.name}: (changed|tile 0 cannot be read)"):
        store[0]
    with pytest.raises(StoreError, match=rf"{part.name}: (changed|tile 0 cannot be read)"):
        store.image(0)
    assert store[3]["slide"] == "b"  # the others are as they were


def test_what_is_not_a_store_is_said(tmp_path):
    assert not is_store(tmp_path)
    with pytest.raises(StoreError, match="no tile store here"):
        TileStore(tmp_path)
    (tmp_path / "unfinished").mkdir()
    with pytest.raises(StoreError, match="tiling was stopped"):
        TileStore(tmp_path)


def test_the_hash_is_of_canonical_json():
    """Restated: sorted keys, no spaces, ASCII, without `hash`."""
    import hashlib

    text = '{"a":[1,0.5],"b":"\\u00b5"}'
    assert manifest_hash({"b": "µ", "hash": "x", "a": [1, 0.5]}) == (
        hashlib.sha256(text.encode()).hexdigest()
    )


@pytest.mark.parametrize(
    ("name", "valid"),
    [("My set", "my_set"), ("2024 batch", "tiles_2024_batch"), ("µ", "tiles"), ("a-b", "a_b")],
)
def test_names_become_what_tfds_allows(name, valid):
    assert tfds_name(name) == valid
    assert tfds.core.naming.is_valid_dataset_name(valid)


def test_importing_the_store_imports_neither_tensorflow_nor_jax():
    code = "import sys, jaxhisto.data.store; print(sorted({'jax','tensorflow'} & set(sys.modules)))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)

    assert run.stdout.strip() == "[]"
