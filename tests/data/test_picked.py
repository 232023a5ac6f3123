"""Tiles of a mix under the names that a manifest has for them."""

from __future__ import annotations

from pathlib import Path

import pytest
from made_images import encoded, noise, write_raw_store

import jaxhisto.data.picked as picked
from jaxhisto.config import DataConfig
from jaxhisto.data.manifest import Entry, write_manifest
from jaxhisto.data.sampling import sample
from jaxhisto.data.sources import Tiles, open_tiles
from jaxhisto.data.store import read_manifest
from jaxhisto.file_config import SampleConfig

SLIDES = {"breast/a.svs": 3, "breast/x/b.svs": 2, "colon/c.svs": 4}


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store of two datasets, and one slide more that the mix leaves out."""
    images = {s: [encoded(noise(16, 16, i)) for i in range(n)] for s, n in SLIDES.items()}
    images["left/out.svs"] = [encoded(noise(16, 16, 9))]
    path = tmp_path_factory.mktemp("data") / "tiles"
    return write_raw_store(path, images, 16, by_folder=True)


@pytest.fixture
def mix(store: Path) -> Tiles:
    return open_tiles(DataConfig(stores=(str(store),), exclude=("left/*",)))


def test_a_tile_of_a_store_of_many_datasets_is_of_its_slides_own(store: Path, mix: Tiles) -> None:
    slides = {slide["id"]: slide for slide in read_manifest(store)["slides"]}
    origins = picked.Origins(mix)
    expected = [
        Entry(id.split("/")[0], id, 0.5, slides[id]["part"]["sha256"], (row,))
        for id, n in SLIDES.items()
        for row in range(n)
    ]
    assert [origins.entry(i) for i in range(len(mix))] == expected


def test_a_list_of_picked_tiles_says_what_a_drawn_one_says(
    store: Path, mix: Tiles, tmp_path: Path
) -> None:
    found = picked.Origins(mix).manifest([8, 0, 4, 2], {"verb": "cluster"}, 0)
    rows = [(e.dataset, e.slide, e.rows) for e in found.entries]
    assert rows == [
        ("breast", "breast/a.svs", (0, 2)),
        ("breast", "breast/x/b.svs", (1,)),
        ("colon", "colon/c.svs", (3,)),
    ]
    counts = [(d["name"], d["available"], d["taken"]) for d in found.datasets]
    assert counts == [("breast", 5, 3), ("colon", 4, 1)]
    config = SampleConfig(sources=(str(store),), out="l.jsonl", per_dataset=1, exclude=("left/*",))
    assert found.sources == sample(config).manifest.sources
    write_manifest(str(tmp_path / "l.jsonl"), found)
    listed = open_tiles(DataConfig(stores=(str(store),), manifest=str(tmp_path / "l.jsonl")))
    assert [listed.located(i).name for i in range(4)] == [
        "breast/a.svs@0,0", "breast/a.svs@2,0", "breast/x/b.svs@1,0", "colon/c.svs@3,0",
    ]  # fmt: skip


def test_a_stores_manifest_is_read_once(mix: Tiles, monkeypatch: pytest.MonkeyPatch) -> None:
    reads: list[Path] = []

    def counted(path: Path) -> dict:
        reads.append(path)
        return read_manifest(path)

    monkeypatch.setattr(picked, "read_manifest", counted)
    picked.Origins(mix).manifest(range(len(mix)), {}, 0)
    assert len(reads) == 1
