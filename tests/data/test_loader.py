"""The order is a function of (seed, step, row); plain counting and the files are the oracles."""

from __future__ import annotations

import gc
import subprocess
import sys
import threading
import time
from collections import Counter
from itertools import pairwise
from pathlib import Path

import jax
import numpy as np
import pytest
from made_images import blobs, noise, write_pngs, write_store

from jaxhisto.config import DataConfig
from jaxhisto.data.loader import _Canvases, batches, global_indices
from jaxhisto.data.sources import Tiles, open_tiles
from jaxhisto.errors import ConfigError, StoreError

IMAGES = 23
READERS = DataConfig(threads=2, prefetch=2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    images = {f"{i:02}.png": noise(6 + i % 5, 6 + i % 3, i) for i in range(IMAGES)}
    return write_pngs(tmp_path_factory.mktemp("loader") / "images", images)


@pytest.fixture(scope="module")
def tiles(folder: Path) -> Tiles:
    return open_tiles(DataConfig(stores=(str(folder),)))


def workers() -> int:
    return sum("grain" in thread.name for thread in threading.enumerate())


def settled(count: int) -> bool:
    """Whether the loader's threads come down to a count within a few seconds."""
    gc.collect()
    deadline = time.monotonic() + 30
    while workers() > count and time.monotonic() < deadline:
        time.sleep(0.01)
    return workers() <= count


@pytest.mark.parametrize(("n_tiles", "batch_size"), [(1, 1), (2, 1), (24, 8), (64, 16), (727, 727)])
def test_an_epoch_holds_every_tile_once(n_tiles: int, batch_size: int) -> None:
    steps = n_tiles // batch_size
    for epoch in range(3):
        seen = [
            global_indices(5, epoch * steps + k, n_tiles, batch_size).tolist() for k in range(steps)
        ]
        assert sorted(i for batch in seen for i in batch) == list(range(n_tiles))


def test_the_remainder_is_left_out_and_changes() -> None:
    left_out = []
    for epoch in range(200):
        taken = np.concatenate([global_indices(0, epoch * 3 + k, 23, 7) for k in range(3)])
        assert len(set(taken.tolist())) == 21
        left_out.append(frozenset(range(23)) - set(taken.tolist()))
    assert set().union(*left_out) == set(range(23))


def test_tiles_are_spread_evenly_over_places() -> None:
    """Each tile falls on each place equally often: chi-square within five deviations."""
    count = Counter()
    epochs, n = 1500, 12
    for epoch in range(epochs):
        count.update(enumerate(global_indices(1, epoch, n, n).tolist()))
    expected = epochs / n
    chi = sum((count[place, i] - expected) ** 2 / expected for place in range(n) for i in range(n))
    freedom = (n - 1) ** 2
    assert abs(chi - freedom) < 5 * np.sqrt(2 * freedom)


def test_the_seed_alone_decides_the_order() -> None:
    first = global_indices(3, 10, 500, 64)
    assert first.dtype == np.int64
    assert np.array_equal(first, global_indices(3, 10, 500, 64))
    others = [global_indices(4, 10, 500, 64), global_indices(3, 11, 500, 64)]
    others += [global_indices(3, 10 + 7, 500, 64)]  # the same place one epoch later
    assert not any(np.array_equal(first, other) for other in others)


def test_the_order_outlives_releases() -> None:
    """A resumed run must see the order it was started with: these numbers may never change."""
    small, large = global_indices(0, 0, 100, 8), global_indices(7, 123_456, 1_000_003, 8)
    assert small.tolist() == [91, 93, 67, 94, 83, 31, 43, 34]
    assert large.tolist() == [434732, 2212, 359985, 414419, 806235, 416321, 853019, 272638]


def test_batches_hold_the_tiles_they_name(tiles: Tiles) -> None:
    for step, batch in batches(tiles, READERS, 10, seed=1, start_step=0, stop_step=5):
        assert np.array_equal(batch.index, global_indices(1, step, IMAGES, 10))
        assert batch.tiles.shape == (10, *tiles.canvas, 3)
        assert (batch.tiles.dtype, batch.sizes.dtype) == (np.uint8, np.int32)
        for row, i in enumerate(batch.index):
            expected = np.zeros((*tiles.canvas, 3), np.uint8)
            h, w = 6 + i % 5, 6 + i % 3
            expected[:h, :w] = noise(h, w, i)
            assert np.array_equal(batch.tiles[row], expected)
            assert batch.sizes[row].tolist() == [h, w]


@pytest.mark.parametrize("processes", [2, 4])
def test_processes_share_one_global_batch(tiles: Tiles, processes: int) -> None:
    whole = list(batches(tiles, READERS, 20, 2, 0, 3))
    shares = [
        list(batches(tiles, READERS, 20, 2, 0, 3, process=p, processes=processes))
        for p in range(processes)
    ]
    for (step, batch), *parts in zip(whole, *shares, strict=True):
        assert [s for s, _ in parts] == [step] * processes
        for field in ("index", "tiles", "sizes"):
            joined = np.concatenate([getattr(part, field) for _, part in parts])
            assert np.array_equal(joined, getattr(batch, field))


def test_starting_late_is_skipping(tiles: Tiles) -> None:
    whole = list(batches(tiles, READERS, 9, 0, 0, 8))
    late = list(batches(tiles, READERS, 9, 0, 5, 8))
    assert [step for step, _ in late] == [5, 6, 7]
    for (_, a), (_, b) in zip(whole[5:], late, strict=True):
        assert np.array_equal(a.index, b.index)
        assert np.array_equal(a.tiles, b.tiles)
    assert list(batches(tiles, READERS, 9, 0, 8, 8)) == []


@pytest.mark.parametrize(("threads", "prefetch"), [(0, 4), (1, 1), (5, 3), (2, 0)])
def test_threads_and_prefetch_change_nothing(tiles: Tiles, threads: int, prefetch: int) -> None:
    config = DataConfig(threads=threads, prefetch=prefetch)
    ours = [batch.tiles for _, batch in batches(tiles, config, 17, 0, 0, 3)]
    theirs = [batch.tiles for _, batch in batches(tiles, READERS, 17, 0, 0, 3)]
    assert np.array_equal(ours, theirs)


def test_stores_and_folders_come_in_one_batch(tmp_path: Path, folder: Path) -> None:
    pixels = [blobs(12, seed) for seed in range(4)]
    store = write_store(tmp_path / "store", {"s1": pixels[:3], "s2": pixels[3:]})
    mix = open_tiles(DataConfig(stores=(str(folder), str(store))))
    ((_, batch),) = batches(mix, READERS, IMAGES + 4, 0, 0, 1)
    assert batch.tiles.shape[1:] == (12, 12, 3)
    for k, expected in enumerate(pixels):
        (row,) = np.flatnonzero(batch.index == IMAGES + k)
        assert np.abs(batch.tiles[row].astype(int) - expected).mean() < 3


def test_a_batch_lasts_and_is_nobody_elses(tmp_path: Path) -> None:
    """Tiles are decoded to their places in the batch, whose memory no later one may take."""
    pixels = [blobs(12, seed) for seed in range(20)]
    alone = open_tiles(DataConfig(stores=(str(write_store(tmp_path / "store", {"s": pixels})),)))
    assert alone.canvas == (12, 12)
    kept = []
    for _, batch in batches(alone, READERS, 18, 0, 0, 6):
        kept.append((batch, batch.tiles.copy()))
    for batch, then in kept:
        assert np.array_equal(batch.tiles, then)
        assert np.array_equal(batch.tiles, [alone.read(i) for i in batch.index.tolist()])
    assert not any(np.shares_memory(a.tiles, b.tiles) for (a, _), (b, _) in pairwise(kept))


@pytest.mark.parametrize("held", ["batch", "tiles", "row", "view of a view", "nothing"])
def test_memory_is_taken_again_when_nothing_refers_to_it(tiles: Tiles, held: str) -> None:
    feed = batches(tiles, DataConfig(threads=1, prefetch=0), 10, 0, 0, 40)
    _, batch = next(feed)
    keep = {
        "batch": batch, "tiles": batch.tiles, "row": batch.tiles[3],
        "view of a view": batch.tiles[2:8][1].view(np.int8)[..., ::-1], "nothing": None,
    }[held]  # fmt: skip
    then = None if held == "nothing" else np.array(getattr(keep, "tiles", keep))
    first = batch.tiles.ctypes.data
    del batch
    later = set()
    for step, batch in feed:
        later.add(batch.tiles.ctypes.data)
        for row, i in enumerate(batch.index):  # and nothing is left of what was there
            h, w = 6 + i % 5, 6 + i % 3
            assert np.array_equal(batch.tiles[row, :h, :w], noise(h, w, i)), step
            assert not batch.tiles[row, h:].any()
            assert not batch.tiles[row, :, w:].any()
    assert len(later) <= 5
    if held == "nothing":
        assert first in later
    else:
        assert first not in later
        assert np.array_equal(getattr(keep, "tiles", keep), then)


@pytest.mark.parametrize("side", [64, 67])
def test_memory_that_jax_still_reads_is_not_taken(side: int) -> None:
    """On a CPU an array on a device may be the batch's own memory."""
    canvases, kept = _Canvases((8, side, side, 3)), []
    for k in range(6):
        memory = canvases.take()
        memory[:] = k
        kept.append((k, jax.device_put(memory), jax.device_put(memory[2:5])))
        del memory
        canvases.take()[:] = 99
    for k, whole, part in kept:
        assert (np.asarray(whole) == k).all()
        assert (np.asarray(part) == k).all()


def test_a_batch_larger_than_the_data_is_refused_at_once(tiles: Tiles) -> None:
    with pytest.raises(StoreError, match=r"23 tiles cannot fill a batch of 24.*--batch-size 23"):
        batches(tiles, READERS, 24, 0, 0, 1)
    with pytest.raises(ConfigError, match="does not divide among 2 processes"):
        batches(tiles, READERS, 7, 0, 0, 1, processes=2)


@pytest.mark.parametrize("prefetch", [0, 2])
def test_a_failing_read_reaches_the_consumer(tmp_path: Path, prefetch: int) -> None:
    folder = write_pngs(tmp_path / "images", {f"{i}.png": noise(5, 5, i) for i in range(12)})
    broken = open_tiles(DataConfig(stores=(str(folder),)))
    (folder / "7.png").unlink()
    before = workers()
    with pytest.raises(StoreError, match=r"7\.png: cannot be read any more"):
        list(batches(broken, DataConfig(threads=2, prefetch=prefetch), 4, 0, 0, 3))
    assert settled(before)


def test_stopping_early_leaves_no_threads(tiles: Tiles) -> None:
    before = workers()
    feed = batches(tiles, READERS, 8, 0, 0, 10_000)
    next(feed)
    assert workers() > before
    feed.close()
    assert settled(before)
    for step, _ in batches(tiles, READERS, 8, 0, 0, 10_000):
        if step == 2:
            break
    assert settled(before)


def test_a_process_that_fails_in_its_loop_ends(folder: Path) -> None:
    """An error while batches are being decoded ahead ends the process and does not hang it."""
    script = (
        "from jaxhisto.config import DataConfig\n"
        "from jaxhisto.data.loader import batches\n"
        "from jaxhisto.data.sources import open_tiles\n"
        f"tiles = open_tiles(DataConfig(stores=({str(folder)!r},)))\n"
        "feed = batches(tiles, DataConfig(threads=2), 8, 0, 0, 10**6)\n"
        "for step, batch in feed:\n"
        "    raise KeyboardInterrupt('as if by Ctrl-C')\n"
    )
    ended = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=240, check=False
    )
    assert "as if by Ctrl-C" in ended.stderr
    assert ended.returncode != 0
