"""A list of tiles as a file, and a run's data taken by it; files and pixels are the oracles."""

from __future__ import annotations

import hashlib
import json
import tracemalloc
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from made_images import blobs, noise, write_pngs, write_store

from jaxhisto.config import DataConfig
from jaxhisto.data import listed as listed_module
from jaxhisto.data.cache import HostCache
from jaxhisto.data.images import decode_jpeg
from jaxhisto.data.labelled import read_labelled
from jaxhisto.data.listed import manifest_of
from jaxhisto.data.loader import batches
from jaxhisto.data.manifest import Entry, Manifest, read_manifest, write_manifest
from jaxhisto.data.sampling import sample
from jaxhisto.data.sources import StoreSource, Tiles, open_tiles
from jaxhisto.data.store import TileStore
from jaxhisto.errors import StoreError
from jaxhisto.file_config import SampleConfig


def tiles(n: int, seed: int) -> list[np.ndarray]:
    return [blobs(16, 100 * seed + i) for i in range(n)]


@pytest.fixture
def data(tmp_path: Path) -> dict[str, Path]:
    big = {"big.png": noise(50, 21), "x/a.png": noise(9, 9, 1), "b.png": noise(12, 12, 2)}
    return {
        "one": write_store(tmp_path / "one", {"a": tiles(6, 1), "b": tiles(6, 2)}, 0.5, "ONE"),
        "two": write_store(tmp_path / "two", {"a": tiles(6, 3)}, 0.25, "TWO"),
        "pictures": write_pngs(tmp_path / "pictures", big),
    }


@pytest.fixture
def listed(data: dict[str, Path], tmp_path: Path) -> Path:
    """Half of each dataset."""
    out = tmp_path / "list.jsonl"
    sources = tuple(map(str, data.values()))
    config = SampleConfig(sources, str(out), percent=50.0, minimum=0)
    write_manifest(out, sample(config).manifest)
    return out


def opened(manifest: Path, *paths: Path, **settings: object) -> Tiles:
    stores = tuple(map(str, paths))
    return open_tiles(replace(DataConfig(stores, str(manifest), threads=2), **settings))


def test_the_hash_is_that_of_the_header_and_the_lines(listed: Path) -> None:
    first, _, body = listed.read_bytes().partition(b"\n")
    header = json.loads(first)
    stated = header.pop("sha256")
    canonical = json.dumps(header, sort_keys=True, separators=(",", ":")).encode()
    assert hashlib.sha256(canonical + b"\n" + body).hexdigest() == stated
    manifest = read_manifest(listed)
    assert manifest.hash == stated
    assert (header["tiles"], len(manifest)) == (11, 11)  # 6 of 12, 3 of 6, 2 of 3 (1.5)
    assert manifest.text().encode() == listed.read_bytes()


def edit_row(text: str) -> str:
    return text.replace('"rows": [', '"rows": [99, ', 1)


def edit_header(text: str) -> str:
    return text.replace('"seed": 0', '"seed": 1', 1)


def cut_off(text: str) -> str:
    return "".join(text.splitlines(keepends=True)[:-1])


@pytest.mark.parametrize("edit", [edit_row, edit_header, cut_off])
def test_an_edited_list_is_refused(listed: Path, edit: Callable[[str], str]) -> None:
    text = listed.read_text()
    assert edit(text) != text
    listed.write_text(edit(text))
    with pytest.raises(StoreError, match="does not match its own sha256, it was edited or cut off"):
        read_manifest(listed)


@pytest.mark.parametrize("text", ["", "a,b\n", '{"format": "other"}\n', "[1]\n", "\xff"])
def test_another_file_is_no_list(tmp_path: Path, text: str) -> None:
    (tmp_path / "l").write_bytes(text.encode("latin-1"))
    with pytest.raises(StoreError, match="l: is not a jaxhisto-manifest-1 list of tiles"):
        read_manifest(tmp_path / "l")
    with pytest.raises(StoreError, match=r"gone: cannot be read as a manifest \(No such file"):
        read_manifest(tmp_path / "gone")


@pytest.mark.parametrize(
    "entries",
    [
        [Entry("D", "a", 0.5, "0", (1, 1))],
        [Entry("D", "a", 0.5, "0", (1,)), Entry("D", "a", 0.5, "0", (2,))],
        [Entry("D", "a.png", None, "0", None)] * 2,
    ],
)
def test_a_tile_twice_is_refused(tmp_path: Path, entries: list[Entry]) -> None:
    write_manifest(tmp_path / "l", Manifest({}, 0, [], [], entries))
    with pytest.raises(StoreError, match="lists tiles twice, of 1 slides, the first a"):
        read_manifest(tmp_path / "l")


def test_an_empty_list_is_refused(tmp_path: Path) -> None:
    write_manifest(tmp_path / "l", Manifest({}, 0, [], [], []))
    with pytest.raises(StoreError, match="lists no tile"):
        read_manifest(tmp_path / "l")


def test_exactly_the_listed_tiles_in_the_lists_order(listed: Path, data: dict[str, Path]) -> None:
    mix = opened(listed, *data.values(), max_side=20)
    expected = []
    for entry, row in read_manifest(listed).tiles():
        if row is None:
            cells = {"big.png": 6, "x/a.png": 1, "b.png": 1}[entry.slide]
            expected += [(entry.slide, None)] * cells
            continue
        store = TileStore(data[entry.dataset.lower()])
        at = store.slides().index(entry.slide) + row
        expected.append((entry.slide, decode_jpeg(store[at]["image"])))
    assert len(mix) == len(expected)
    for i, (slide, pixels) in enumerate(expected):
        assert slide in mix.names(i)
        assert mix.sizes(i) == mix.read(i).shape[:2]
        if pixels is not None:
            np.testing.assert_array_equal(mix.read(i), pixels)
    assert mix.canvas == tuple(np.max([mix.sizes(i) for i in range(len(mix))], axis=0))
    assert mix.mpp_range() == (0.25, 0.5)
    assert manifest_of(mix) == {"sha256": read_manifest(listed).hash, "tiles": 11}
    assert "11 tiles of 3 datasets, seed 0" in mix.summary()


def test_the_order_is_the_lists_alone(listed: Path, data: dict[str, Path], tmp_path: Path) -> None:
    mix = opened(listed, *data.values())
    pixels = [mix.read(i) for i in range(len(mix))]
    for name, path in data.items():  # elsewhere, under other names, in another order
        path.rename(tmp_path / f"moved_{name}")
    again = opened(listed, *(tmp_path / f"moved_{name}" for name in reversed(data)))
    assert again.hash == mix.hash
    assert len(again) == len(pixels)
    for i, tile in enumerate(pixels):
        np.testing.assert_array_equal(again.read(i), tile)
    cached = next(HostCache(again, 1, show=False).batches(DataConfig(), 8, 0, 0, 1))[1]
    read = next(batches(again, DataConfig(threads=1), 8, 0, 0, 1))[1]
    np.testing.assert_array_equal(cached.tiles, read.tiles)
    np.testing.assert_array_equal(cached.index, read.index)


def test_a_store_that_grew_still_serves(listed: Path, data: dict[str, Path], tmp_path) -> None:
    before = opened(listed, *data.values())
    more = {"0": tiles(3, 9), "a": tiles(6, 1), "b": tiles(6, 2)}
    grown = write_store(tmp_path / "grown", more, 0.5, "ONE")
    (data["pictures"] / "unlisted.png").write_bytes(b"not an image")
    after = opened(listed, grown, data["two"], data["pictures"])
    assert after.hash == before.hash
    for i in range(len(before)):
        np.testing.assert_array_equal(after.read(i), before.read(i))


def test_missing_tiles_are_counted_and_named(listed: Path, data: dict[str, Path]) -> None:
    with pytest.raises(StoreError) as refused:
        opened(listed, data["one"], data["pictures"])
    rows = next(e.rows for e in read_manifest(listed).entries if e.dataset == "TWO")
    assert "3 of its 11 tiles are not in --data.stores" in str(refused.value)
    assert f"the first: tile {rows[0]} of a (TWO), tile {rows[1]} of a (TWO)" in str(refused.value)
    image = next(e.slide for e in read_manifest(listed).entries if e.rows is None)
    (data["pictures"] / image).write_bytes(b"changed")
    with pytest.raises(StoreError, match=rf"1 of its 11 tiles .* the first: {image} \(pictures\)"):
        opened(listed, *data.values())


def test_a_list_and_patterns_are_refused_together(listed: Path, data: dict[str, Path]) -> None:
    with pytest.raises(StoreError, match=r"--data\.exclude would change it; draw a list without"):
        opened(listed, *data.values(), exclude=("a",))


def test_only_listed_images_count_as_seen(listed: Path, data: dict[str, Path], tmp_path) -> None:
    """A probe's images that lie in the same folder, and are not listed, are not trained on."""
    names = sorted(e.slide for e in read_manifest(listed).entries if e.rows is None)
    table = tmp_path / "labels.csv"
    table.write_text("file,cls,slide\nbig.png,p,a.svs\nx/a.png,q,a\nb.png,p,c\n")
    probe = read_labelled(data["pictures"], table, "cls", group="slide")
    clauses = probe.leakage(opened(listed, *data.values()), probe.digests())
    assert len(names) == 2
    assert clauses[0].startswith("2 of 3 images are in the training data (")
    assert all(name in clauses[0] for name in names)
    assert clauses[1] == "1 groups are slides of the training data (a)"


def test_a_cohorts_places_take_little_memory(monkeypatch):
    """25 thousand slides of 100 tiles: an entry for each of their tiles takes 0.8 GB."""
    slides = [{"part": {"sha256": f"{i:064x}"}, "tiles": 100} for i in range(25_000)]
    store = object.__new__(StoreSource)
    store.path = Path("cohort")
    monkeypatch.setattr(listed_module, "read_store_manifest", lambda _: {"slides": slides})
    tracemalloc.start()
    try:
        places = listed_module._Places([store])
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 20e6
    last = Entry("d", "s", 0.5, f"{24_999:064x}", (0, 99))
    assert places.of(last, 99) == [(0, 2_499_999)]
    assert not places.of(last, 100)
