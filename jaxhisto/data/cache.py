"""Tiles decoded once: threads fill rows of memory, and batches come from there by index.

`HostCache` holds them in this process. Any row of a batch may be any tile, so each process of a
run holds all of them.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager

import numpy as np
from numpy.typing import NDArray

from jaxhisto.config import DataConfig
from jaxhisto.data.loader import cores, global_indices, process_rows
from jaxhisto.data.sources import Batch, Tiles
from jaxhisto.progress import Progress

Decode = Callable[[int, NDArray[np.uint8]], None]

PIECE_TILES = 1024  # tiles handed to the threads together: a future each, so not all of a million
SHOW_EVERY = 32  # tiles between two looks of the progress bar, which costs more than a small tile


class HostCache:
    """All tiles of a run, decoded, in this process's memory.

    Attributes:
      tiles: (T, H, W, 3) uint8 RGB, content at the top left, zeros elsewhere; H, W = canvas.
      sizes: (T, 2) int32, height and width of the content.
    """

    def __init__(self, tiles: Tiles, threads: int = 0, show: bool = True) -> None:
        """Decodes every tile once.

        Args:
          tiles: what to hold; it is not read again.
          threads: as `DataConfig.threads`.
          show: say on stderr how far it is.

        Raises:
          StoreError: a tile that cannot be read, which is named.
        """
        total, row_bytes = len(tiles), math.prod(tiles.canvas) * 3
        self.name = tiles.name
        flat = np.zeros((total, row_bytes), np.uint8)
        with decoder(tiles, threads, total, show) as decode:
            for first in range(0, total, PIECE_TILES):
                decode(first, flat[first : first + PIECE_TILES])
        self.tiles = flat.reshape(total, *tiles.canvas, 3)
        self.sizes = sizes_of(tiles)

    def batches(
        self,
        config: DataConfig,
        batch_size: int,
        seed: int,
        start_step: int,
        stop_step: int,
        process: int = 0,
        processes: int = 1,
    ) -> Generator[tuple[int, Batch], None, None]:
        """Yields what `loader.batches` yields for the same arguments, without reading anything.

        Rows are copied in a thread of their own, up to `config.prefetch` and at most two batches
        ahead. Closing the generator stops it.
        """
        total = len(self.sizes)
        rows = process_rows(self.name, total, batch_size, process, processes)

        def batch(step: int) -> Batch:
            index = global_indices(seed, step, total, batch_size)[rows.start : rows.stop]
            return Batch(index, self.tiles.take(index, axis=0), self.sizes[index])

        return _ahead(batch, range(start_step, stop_step), min(config.prefetch, 2))


def sizes_of(tiles: Tiles) -> NDArray[np.int32]:
    """(T, 2) int32: height and width of each tile, without reading it."""
    sizes = np.array([tiles.sizes(i) for i in range(len(tiles))], np.int32)
    return sizes.reshape(len(tiles), 2)


@contextmanager
def decoder(tiles: Tiles, threads: int, total: int, show: bool) -> Iterator[Decode]:
    """Yields decode(first, rows), which fills rows with the tiles from `first` on, in threads.

    `rows` are (b, at least H*W*3) uint8 zeros; each becomes its tile on the canvas, row-major.

    Args:
      tiles: what to decode.
      threads: how many; 0: one a core.
      total: tiles that will be decoded in all, for the progress that is shown on stderr.
      show: whether to show it.
    """
    canvas, row_bytes = (*tiles.canvas, 3), math.prod(tiles.canvas) * 3
    every = SHOW_EVERY * max(1, total // (10 * SHOW_EVERY))
    progress = Progress("decoding tiles", total, every=every) if show else None
    done, began = 0, time.perf_counter()

    def decode(first: int, rows: NDArray[np.uint8]) -> None:
        def one(k: int) -> None:
            tile = tiles.read(first + k)
            h, w = tile.shape[:2]
            rows[k, :row_bytes].reshape(canvas)[:h, :w] = tile

        nonlocal done
        for _ in pool.map(one, range(len(rows))):
            done += 1
            if progress and (done % SHOW_EVERY == 0 or done == total):
                speed = done / (time.perf_counter() - began)
                progress.update(done, f"{speed:.0f} tiles/s")

    with ThreadPoolExecutor(threads or cores(), "decode") as pool:
        try:
            yield decode
        finally:
            if progress:
                progress.close()


def _ahead(
    make: Callable[[int], Batch], steps: Iterable[int], depth: int
) -> Generator[tuple[int, Batch], None, None]:
    """(step, make(step)), of which `depth` are made ahead in a thread."""
    if not depth:
        yield from ((step, make(step)) for step in steps)
        return
    made: deque[tuple[int, Future[Batch]]] = deque()
    with ThreadPoolExecutor(1, "host-cache") as pool:
        for step in steps:
            made.append((step, pool.submit(make, step)))
            if len(made) > depth:
                first, batch = made.popleft()
                yield first, batch.result()
        while made:
            first, batch = made.popleft()
            yield first, batch.result()
