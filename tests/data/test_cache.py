"""Decoded tiles in memory: the batches read from disk, and a made-up /proc, are the oracles."""

from __future__ import annotations

import threading
from pathlib import Path

import numpy as np
import pytest
from made_images import blobs, noise, write_pngs, write_store

from jaxhisto.config import DataConfig
from jaxhisto.data import cache as cache_module
from jaxhisto.data.cache import HostCache, decoder
from jaxhisto.data.loader import batches
from jaxhisto.data.memory import available_bytes
from jaxhisto.data.sources import Tiles, open_tiles
from jaxhisto.errors import ConfigError, StoreError

READERS = DataConfig(threads=2, prefetch=2)
IMAGES, STORED = 19, 4


@pytest.fixture(scope="module")
def tiles(tmp_path_factory: pytest.TempPathFactory) -> Tiles:
    """Images of several sizes, and a store: 23 tiles, an epoch of 2 batches of 10."""
    root = tmp_path_factory.mktemp("cache")
    images = {f"{i:02}.png": noise(6 + i % 5, 6 + i % 3, i) for i in range(IMAGES)}
    folder = write_pngs(root / "images", images)
    pixels = [blobs(12, seed) for seed in range(STORED)]
    store = write_store(root / "store", {"s1": pixels[:3], "s2": pixels[3:]})
    return open_tiles(DataConfig(stores=(str(folder), str(store))))


@pytest.fixture(scope="module")
def cache(tiles: Tiles) -> HostCache:
    return HostCache(tiles, threads=3, show=False)


def assert_equal(ours, theirs) -> None:
    ours, theirs = list(ours), list(theirs)
    assert [step for step, _ in ours] == [step for step, _ in theirs]
    for (_, a), (_, b) in zip(ours, theirs, strict=True):
        for field in ("index", "tiles", "sizes"):
            x, y = getattr(a, field), getattr(b, field)
            assert x.dtype == y.dtype
            assert np.array_equal(x, y)


def test_the_cache_holds_every_tile(tiles: Tiles, cache: HostCache) -> None:
    assert cache.tiles.shape == (23, 12, 12, 3)
    assert (cache.tiles.dtype, cache.sizes.dtype) == (np.uint8, np.int32)
    for i in range(len(tiles)):
        expected = np.zeros((12, 12, 3), np.uint8)
        tile = tiles.read(i)
        expected[: tile.shape[0], : tile.shape[1]] = tile
        assert np.array_equal(cache.tiles[i], expected)
        assert cache.sizes[i].tolist() == list(tile.shape[:2])


@pytest.mark.parametrize("prefetch", [0, 1, 4])
def test_batches_are_those_from_disk_over_epochs_and_after_a_resume(
    tiles: Tiles, cache: HostCache, prefetch: int
) -> None:
    config = DataConfig(prefetch=prefetch)
    for start, stop in ((0, 7), (3, 6), (6, 6)):
        assert_equal(
            cache.batches(config, 10, 1, start, stop), batches(tiles, READERS, 10, 1, start, stop)
        )


def test_a_process_gets_its_own_rows(tiles: Tiles, cache: HostCache) -> None:
    for process in range(2):
        share = {"process": process, "processes": 2}
        assert_equal(
            cache.batches(READERS, 20, 2, 0, 3, **share),
            batches(tiles, READERS, 20, 2, 0, 3, **share),
        )


def test_batches_that_cannot_be_are_refused_at_once(cache: HostCache) -> None:
    with pytest.raises(StoreError, match=r"23 tiles cannot fill a batch of 24"):
        cache.batches(READERS, 24, 0, 0, 1)
    with pytest.raises(ConfigError, match="does not divide among 2 processes"):
        cache.batches(READERS, 7, 0, 0, 1, processes=2)


def test_closing_early_ends_the_thread(cache: HostCache) -> None:
    def working() -> bool:
        return any(thread.name.startswith("host-cache") for thread in threading.enumerate())

    feed = cache.batches(READERS, 8, 0, 0, 10_000)
    next(feed)
    assert working()
    feed.close()
    assert not working()


def test_what_happens_to_the_files_later_does_not_matter(tmp_path: Path) -> None:
    folder = write_pngs(tmp_path / "images", {f"{i}.png": noise(5, 5, i) for i in range(6)})
    opened = open_tiles(DataConfig(stores=(str(folder),)))
    cache = HostCache(opened, show=False)
    before = [batch.tiles for _, batch in batches(opened, READERS, 6, 0, 0, 2)]
    for path in folder.iterdir():
        path.unlink()
    assert np.array_equal([batch.tiles for _, batch in cache.batches(READERS, 6, 0, 0, 2)], before)


def test_a_tile_that_cannot_be_read_is_named_at_the_start(tmp_path: Path) -> None:
    folder = write_pngs(tmp_path / "images", {f"{i}.png": noise(5, 5, i) for i in range(12)})
    opened = open_tiles(DataConfig(stores=(str(folder),)))
    (folder / "7.png").unlink()
    with pytest.raises(StoreError, match=r"7\.png: cannot be read any more"):
        HostCache(opened, show=False)


def test_progress_counts_the_tiles_and_says_how_fast(
    tiles: Tiles, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cache_module, "PIECE_TILES", 5)
    HostCache(tiles, threads=2)
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("decoding tiles 23/23")
    assert "tiles/s" in last
    HostCache(tiles, threads=2, show=False)
    assert capsys.readouterr().err == ""


def test_rows_wider_than_a_tile_keep_their_ends(tiles: Tiles, cache: HostCache) -> None:
    rows = np.zeros((4, 12 * 12 * 3 + 5), np.uint8)
    with decoder(tiles, 2, 4, show=False) as decode:
        decode(19, rows)
    assert np.array_equal(rows[:, :-5].reshape(4, 12, 12, 3), cache.tiles[19:])
    assert not rows[:, -5:].any()


def made_root(root: Path, group: str, files: dict[str, str]) -> Path:
    """A machine with 8 GB available, its process in a control group."""
    files = {
        "proc/meminfo": "MemTotal: 16000000 kB\nMemAvailable: 8000000 kB\n",
        "proc/self/cgroup": group,
    } | files
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


def test_memory_is_what_the_machine_has(tmp_path: Path) -> None:
    root = made_root(tmp_path, "0::/\n", {"sys/fs/cgroup/memory.max": "max\n"})
    assert available_bytes(root) == 8_000_000 * 1024


def test_memory_is_what_the_container_or_its_parent_has_left(tmp_path: Path) -> None:
    groups = {
        "sys/fs/cgroup/job/step/memory.max": "5000000000\n",
        "sys/fs/cgroup/job/step/memory.current": "1000000000\n",
        "sys/fs/cgroup/job/step/memory.stat": "anon 1\ninactive_file 300000000\n",
        "sys/fs/cgroup/job/memory.max": "7000000000\n",
        "sys/fs/cgroup/job/memory.current": "4000000000\n",
    }
    root = made_root(tmp_path, "0::/job/step\n", groups)
    assert available_bytes(root) == 3_000_000_000
    (root / "sys/fs/cgroup/job/memory.max").write_text("max\n")
    assert available_bytes(root) == 4_300_000_000


def test_memory_of_the_older_control_groups(tmp_path: Path) -> None:
    groups = {
        "sys/fs/cgroup/memory/docker/memory.limit_in_bytes": "2000000000\n",
        "sys/fs/cgroup/memory/docker/memory.usage_in_bytes": "500000000\n",
        "sys/fs/cgroup/memory/docker/memory.stat": "total_inactive_file 100\n",
    }
    root = made_root(tmp_path, "4:memory,cpu:/docker\n3:cpuset:/docker\n", groups)
    assert available_bytes(root) == 1_500_000_100


def test_memory_here_is_some_and_no_more_than_installed() -> None:
    found = available_bytes()
    assert found is not None
    assert 1 << 26 < found <= 1 << 50
