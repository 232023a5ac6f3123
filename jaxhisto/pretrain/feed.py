"""The batches of a run on its devices: read from disk, or from tiles decoded at the start.

Whichever it is, a step's batch is the same, byte for byte.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from dataclasses import dataclass

import jax
import numpy as np
from jax.sharding import Mesh

from jaxhisto.config import PretrainConfig
from jaxhisto.data.cache import HostCache
from jaxhisto.data.loader import batches, global_indices, process_rows
from jaxhisto.data.sources import Batch, Tiles
from jaxhisto.distributed import is_main, to_global
from jaxhisto.pretrain.device_cache import DeviceCache
from jaxhisto.pretrain.room import check_device, check_host


@dataclass(frozen=True)
class PlacedBatch:
    """The global batch of a step, on the devices.

    Fields:
      index: (n,) int64 on the host, position in `Tiles` of each of this process's rows.
      tiles: (N, H, W, 3) uint8 RGB, content at the top left, zeros elsewhere, sharded over `data`.
      sizes: (N, 2) int32, height and width of the content, likewise.
    """

    index: np.ndarray
    tiles: jax.Array
    sizes: jax.Array


Feed = Generator[tuple[int, PlacedBatch], None, None]


def open_feed(
    config: PretrainConfig,
    tiles: Tiles,
    mesh: Mesh,
    start: int,
    stop: int,
    step_bytes: Callable[[], int],
) -> Feed:
    """(step, batch) for start <= step < stop. With a cache, all tiles are decoded in here.

    Args:
      config: the run's settings; `data.cache` says where from.
      tiles: what is trained on.
      mesh: from `make_mesh`, and set.
      start, stop: steps.
      step_bytes: what a training step takes on each device; asked where tiles are to be cached.

    Raises:
      RunError: tiles that do not fit.
      StoreError: a tile that cannot be read: here with a cache, while iterating without.
    """
    rows = (config.batch_size, config.seed, start, stop, jax.process_index(), jax.process_count())
    if start >= stop:  # nothing to train, so nothing to decode
        return _none()
    if config.data.cache == "device":
        check_device(config, tiles, mesh, step_bytes)
        return _from_devices(DeviceCache(tiles, mesh, config.data.threads), *rows)
    if config.data.cache == "host":
        check_host(config, tiles, mesh, step_bytes)
        cache = HostCache(tiles, config.data.threads, show=is_main())
        return _from_host(cache.batches(config.data, *rows), mesh)
    return _from_host(batches(tiles, config.data, *rows), mesh)


def _none() -> Feed:
    yield from ()


def _from_host(feed: Generator[tuple[int, Batch], None, None], mesh: Mesh) -> Feed:
    try:
        for step, batch in feed:
            yield step, PlacedBatch(batch.index, *to_global((batch.tiles, batch.sizes), mesh))
    finally:
        feed.close()


def _from_devices(
    cache: DeviceCache,
    batch_size: int,
    seed: int,
    start: int,
    stop: int,
    process: int,
    processes: int,
) -> Feed:
    total = cache.layout.tiles
    own = process_rows("the cache", total, batch_size, process, processes)
    for step in range(start, stop):
        index = global_indices(seed, step, total, batch_size)
        yield step, PlacedBatch(index[own.start : own.stop], *cache.batch(index))
