"""Which tiles a user means: stores, images, or whole slides that are cut as they are read."""

from __future__ import annotations

import dataclasses
import os
from collections import deque
from collections.abc import Callable, Generator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from jaxhisto.config import DataConfig, TileConfig
from jaxhisto.console import warn
from jaxhisto.data import images
from jaxhisto.data.loader import cores
from jaxhisto.data.named_images import centre_square
from jaxhisto.data.sources import Tiles, open_for
from jaxhisto.data.store import is_store
from jaxhisto.data.tfds_source import PREFIX
from jaxhisto.downstream_config import EmbedConfig
from jaxhisto.errors import ConfigError
from jaxhisto.slides import reader
from jaxhisto.slides.slide_source import SlidesSource

T = TypeVar("T")

FLAGS = {
    "stores": "the tiles given",
    "failures-allowed": "--failures-allowed",
    "exclude": "--exclude",
}
NOTES = 20  # lines that are said of slides
Block = tuple[NDArray[np.uint8], NDArray[np.int64]]


def open_inputs(config: EmbedConfig, side: int) -> Tiles:
    """The tiles of a config; those of whole slides are cut `side` px wide.

    Raises:
      StoreError: as `open_tiles`; SlideError: as `SlidesSource`.
      ConfigError: slides beside tiles, or a folder of both.
    """
    kinds = {path: _kind(path, config.kind) for path in config.tiles}
    data = DataConfig(
        stores=config.tiles,
        manifest=config.manifest,
        exclude=config.exclude,
        max_side=config.max_side,
        failures_allowed=config.failures_allowed,
        threads=config.threads,
        prefetch=config.prefetch,
    )
    if "slides" not in kinds.values():
        return open_for(data, FLAGS)
    if "tiles" in kinds.values():
        slide, tile = (next(p for p in kinds if kinds[p] == k) for k in ("slides", "tiles"))
        raise ConfigError(f"{slide} is a whole slide and {tile} is not; embed them into two files.")
    if config.exclude or config.manifest:
        raise ConfigError(
            f"--{'exclude' if config.exclude else 'manifest'}: is for stores and images, and "
            f"{config.tiles[0]} is a whole slide; name the slides that you want."
        )
    cut = TileConfig(
        config.tiles, "", tile_px=side, failures_allowed=config.failures_allowed,
        **dataclasses.asdict(config.cut),
    )  # fmt: skip
    source = SlidesSource(cut, config.threads)
    for note in source.notes[:NOTES]:
        warn(note)
    if len(source.notes) > NOTES:
        warn(f"and {len(source.notes) - NOTES:,} more notes; `jaxhisto tile` writes all of them")
    return Tiles([source], data)


def read_blocks(
    tiles: Tiles, start: int, stop: int, rows: int, side: int, threads: int = 0, ahead: int = 2
) -> Generator[Block, None, None]:
    """Blocks of `rows` tiles from start to stop, read in threads, `ahead` of them in advance.

    Yields:
      (images (m, side, side, 3) uint8: the middle square resized; coords (m, 2) int64), m = rows
      but for the last block.

    Raises:
      StoreError: while iterating, a tile that cannot be read.
    """

    def one(i: int) -> tuple[NDArray[np.uint8], tuple[int, int]]:
        place = tiles.located(i)
        return centre_square(tiles.read(i), side), (place.x, place.y)

    found = in_threads(one, start, stop, rows, threads, ahead)
    try:
        for block in found:
            yield np.stack([image for image, _ in block]), np.array([at for _, at in block])
    finally:
        found.close()


def in_threads(
    read: Callable[[int], T], start: int, stop: int, rows: int, threads: int = 0, ahead: int = 2
) -> Generator[list[T], None, None]:
    """`read(i)` of start to stop in order, in lists of `rows`, `ahead` of these in advance."""
    pool = ThreadPoolExecutor(threads or cores())
    waiting: deque[list[Future[T]]] = deque()
    try:
        for first in range(start, stop, rows):
            waiting.append([pool.submit(read, i) for i in range(first, min(first + rows, stop))])
            if len(waiting) > ahead:
                yield [future.result() for future in waiting.popleft()]
        while waiting:
            yield [future.result() for future in waiting.popleft()]
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _kind(path: str, said: str) -> str:
    """`tiles` or `slides`."""
    if said != "auto":
        return said
    if path.startswith(PREFIX) or is_store(path) or not os.path.exists(path):
        return "tiles"
    if os.path.isfile(path):
        return "slides" if path.lower().endswith(reader.SUFFIXES) else "tiles"
    names = [n.lower() for _, _, files in os.walk(path) for n in files if not n.startswith(".")]
    shared = tuple(s for s in reader.SUFFIXES if s in images.SUFFIXES)
    slides = [n for n in names if n.endswith(reader.SUFFIXES) and not n.endswith(shared)]
    plain = [n for n in names if n.endswith(images.SUFFIXES) and not n.endswith(shared)]
    # A MIRAX slide keeps its data in a folder beside it, whose files bear no image's suffix.
    if slides and plain:
        raise ConfigError(
            f"{path}: holds whole slides ({Path(slides[0]).name}) and images "
            f"({Path(plain[0]).name}); pass --kind slides or --kind tiles."
        )
    return "slides" if slides else "tiles"
