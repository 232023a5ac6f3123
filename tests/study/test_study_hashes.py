"""What makes a task, and its features, other ones: contents of images and masks, and feeding."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

import numpy as np
import pytest
from made_sets import tissue, write_images

from jaxhisto.study import hashes
from jaxhisto.study.cells import Entry, Ready
from jaxhisto.study.plan import FeatureCache
from jaxhisto.task_config import TaskConfig
from jaxhisto.tasks.task import Split, open_task


@pytest.fixture
def masked(tmp_path) -> TaskConfig:
    """Eight images with masks, to be cut into windows."""
    rng = np.random.default_rng(0)
    write_images(tmp_path / "images", {f"{i}.png": x for i, x in enumerate(tissue(8, 3))})
    masks = {f"{i}.png": rng.integers(0, 2, (32, 32)).astype(np.uint8) for i in range(8)}
    write_images(tmp_path / "masks", masks)
    return TaskConfig(data=str(tmp_path / "images"), masks=str(tmp_path / "masks"), window=16)


def hashed(config: TaskConfig, memory: Path) -> tuple[str, str]:
    return hashes.task_hashes(open_task(config), config, memory / "t.v2")


def test_a_file_is_read_again_only_where_it_changed(tmp_path, monkeypatch):
    write_images(tmp_path / "images", {f"{i}.png": x for i, x in enumerate(tissue(3, 1))})
    files = {f"{i}.png": tmp_path / "images" / f"{i}.png" for i in range(3)}
    first = hashes.content_hash(files, tmp_path / "m.json")
    monkeypatch.setattr(hashes, "digest", lambda path: pytest.fail(str(path)))
    assert hashes.content_hash(files, tmp_path / "m.json") == first
    monkeypatch.undo()
    (tmp_path / "m.json").write_text('{"0.png": 3, "1.png": [1]}')  # of another program
    assert hashes.content_hash(files, tmp_path / "m.json") == first
    files["1.png"].write_bytes(b"something else")
    assert hashes.content_hash(files, tmp_path / "m.json") != first


def test_a_changed_mask_is_another_task_of_the_same_images(masked, tmp_path):
    first = hashed(masked, tmp_path)
    assert hashed(masked, tmp_path) == first
    mask = Path(masked.masks) / "3.png"
    pixels = np.zeros((32, 32), np.uint8)
    pixels[0, 0] = 1
    write_images(mask.parent, {mask.name: pixels})
    second = hashed(masked, tmp_path)
    assert second[0] == first[0]
    assert second[1] != first[1]


def test_an_image_that_is_cut_into_windows_counts_by_its_contents(masked, tmp_path):
    first = hashed(masked, tmp_path)
    write_images(Path(masked.data), {"3.png": tissue(1, 77)[0]})
    assert not set(hashed(masked, tmp_path)) & set(first)


def test_windows_of_other_sides_are_other_tasks(masked, tmp_path):
    """One window an image, at the same corner, of 20 and of 24 px: their names are the same."""
    found = [hashed(dataclasses.replace(masked, window=side), tmp_path) for side in (20, 24)]
    assert found[0][0] == found[1][0]
    assert found[0][1] != found[1][1]


def test_a_moved_folder_is_the_same_task(masked, tmp_path):
    first = hashed(masked, tmp_path)
    for name in ("images", "masks"):
        os.rename(tmp_path / name, tmp_path / f"moved-{name}")
    moved = dataclasses.replace(
        masked, data=str(tmp_path / "moved-images"), masks=str(tmp_path / "moved-masks")
    )
    assert hashed(moved, tmp_path) == first


def test_an_encoder_that_is_fed_otherwise_has_features_of_its_own(tmp_path):
    """Mean and deviation are no part of a foreign file, nor of its hash."""
    write_images(tmp_path / "images/a", {f"{i}.png": x for i, x in enumerate(tissue(4, 1))})
    write_images(tmp_path / "images/b", {f"{i}.png": x for i, x in enumerate(tissue(4, 2))})
    config = TaskConfig(data=str(tmp_path / "images"), side=32)
    rows = np.arange(8)
    ready = Ready("t", config, open_task(config), Split(rows, rows, rows, "s"), "d" * 64, "h" * 64)
    plain = Entry("r", 0, "random:resnet10:0", None, None, "", "resnet10")
    from jaxhisto.downstream.encoders import open_encoder

    plain = dataclasses.replace(plain, sha256=open_encoder(plain.name).sha256)
    fed = dataclasses.replace(plain, mean=(0.5, 0.5, 0.5), std=(0.1, 0.1, 0.1))
    cache = FeatureCache(tmp_path / "out", 4, 1, 1)
    first, second = cache(plain, ready), cache(fed, ready)
    assert not np.allclose(first, second)
    np.testing.assert_array_equal(FeatureCache(tmp_path / "new", 4, 1, 1)(fed, ready), second)
    np.testing.assert_array_equal(FeatureCache(tmp_path / "out", 4, 1, 1)(plain, ready), first)
