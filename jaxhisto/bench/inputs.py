"""The stages that read tiles: reading + decoding alone, and training from a store."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax

from jaxhisto.bench.ours import Setup, cores
from jaxhisto.bench.record import OURS, Row
from jaxhisto.bench.runner import CannotRun, Runner, attempt
from jaxhisto.config import DataConfig
from jaxhisto.errors import ConfigError, RunError, StoreError

MADE, STORE, SYNTHETIC = "made", "store", "synthetic"
FOREVER = 1 << 24  # steps: more than a bench ever takes
AHEAD = {"none": DataConfig().prefetch + 1, "host": 3, "device": 0}
"""Batches that may lie ready when a turn begins: none of those counts."""


class Input:
    """What is read from.

    Attributes:
      tiles: as `open_tiles` gives them, or `MemoryTiles`.
      stores: where they lie; empty: in memory.
      kind: MADE, STORE or SYNTHETIC, which a row's `data` says.
    """

    def __init__(self, tiles: Any, stores: Sequence[str], kind: str) -> None:
        self.tiles, self.stores, self.kind = tiles, tuple(stores), kind

    def data(self, cache: str = "none") -> DataConfig:
        """The settings of reading it."""
        return DataConfig(stores=self.stores, cache=cache)  # type: ignore[arg-type]

    def settings(self) -> dict[str, Any]:
        """What a row says of it: no path, which is another on each machine."""
        found = {"data": self.kind, "tiles": len(self.tiles), "canvas": list(self.tiles.canvas)}
        if any((Path(store) / "manifest.json").is_file() for store in self.stores):
            from jaxhisto.data.images import jpeg_decoder

            found["decoder"] = jpeg_decoder()
        return found


def open_input(stores: Sequence[str], made: str, side: int, count: int) -> Input:
    """The stores given, else the made one, else as many tiles in memory.

    Raises:
      StoreError: a store that is missing, empty or damaged.
      ImportError: stores are given, and what reads them is not installed.
    """
    if stores or made:
        from jaxhisto.data.sources import open_tiles

        paths = tuple(stores) or (made,)
        return Input(open_tiles(DataConfig(stores=paths)), paths, STORE if stores else MADE)
    from jaxhisto.bench.made import MemoryTiles

    return Input(MemoryTiles(side, count), (), SYNTHETIC)


def read_runner(source: Input, tile_px: int, batch: int, steps: int) -> Runner | Row:
    """Batches in the host's memory, read and decoded anew; without a cache, as training has them.

    A row says why where there is nothing to read from, or less than a batch. `tile_px` is that of
    the views: what is read is of the store's own side.
    """
    settings = {"tile_px": tile_px, "batch": batch, "threads": cores(), "cache": "none"}
    settings |= source.settings()

    def make() -> Runner:
        import grain  # noqa: F401  # the loader imports it late, in its first batch

        from jaxhisto.data.loader import batches

        config = source.data()
        feed = batches(source.tiles, config, batch, 0, 0, FOREVER)

        def run() -> tuple[float, float]:
            return drained(feed, AHEAD["none"], steps, lambda item: None)

        return Runner("read", OURS, run, batch * steps, settings, close=feed.close)

    if not source.stores:
        return Row("read", OURS, settings, why="no store: array-record and TFDS write one")
    return refused_or(make, "read", settings, source)


def pipeline_runner(setup: Setup, source: Input, cache: str, steps: int) -> Runner | Row:
    """Training as `pretrain` does it: batches from a cache or a store, and steps on them.

    A row says why where the tiles do not fit into the cache, or are fewer than a batch.
    """
    settings = setup.settings | {"cache": cache} | source.settings()

    def make() -> Runner:
        if cache == "none":
            import grain  # noqa: F401  # as above

        from jaxhisto.pretrain.feed import open_feed
        from jaxhisto.pretrain.room import step_bytes

        config, mesh = replace(setup.config, data=source.data(cache)), setup.mesh
        state = setup.state()

        def taken() -> int:
            return step_bytes(setup.jitted, state, config, source.tiles, mesh)

        with jax.set_mesh(mesh):
            feed = open_feed(config, source.tiles, mesh, 0, FOREVER, taken)

        def run() -> tuple[float, float]:
            nonlocal state
            waiting: Any = None

            def train(item: Any) -> None:
                nonlocal state, waiting
                _, batch = item
                state, metrics = setup.step(batch.tiles, batch.sizes)(
                    state, batch.tiles, batch.sizes
                )
                # As the loop: a step's metrics are read when the next one is handed over.
                jax.block_until_ready(waiting)
                waiting = metrics

            with jax.set_mesh(mesh):
                done = lambda: jax.block_until_ready((state, waiting))  # noqa: E731
                return drained(feed, AHEAD[cache], steps, train, done)

        images = setup.point.batch * steps
        return Runner("pipeline", OURS, run, images, settings, close=feed.close)

    if cache == "none" and not source.stores:
        return Row("pipeline", OURS, settings, why="no store: array-record and TFDS write one")
    return refused_or(make, "pipeline", settings, source)


def beside_runner(setup: Setup, steps: int) -> Runner:
    """As many steps on tiles that are there, to take turns with `pipeline`."""
    state, (tiles, sizes) = setup.state(), setup.placed
    with jax.set_mesh(setup.mesh):
        compiled = setup.step(tiles, sizes)

    def run() -> None:
        nonlocal state
        with jax.set_mesh(setup.mesh):
            waiting: Any = None
            for _ in range(steps):
                state, metrics = compiled(state, tiles, sizes)
                jax.block_until_ready(waiting)
                waiting = metrics
            jax.block_until_ready((state, waiting))

    settings = setup.settings | {"beside": "pipeline"}
    return Runner("step", OURS, run, setup.point.batch * steps, settings)


def refused_or(
    make: Callable[[], Runner], stage: str, settings: dict[str, Any], source: Input
) -> Runner | Row:
    """A runner, or the row that says why tiles cannot be read at this setting."""

    def made() -> Runner:
        try:
            return make()
        except (StoreError, RunError, ConfigError) as error:
            why = str(error)
            for store in source.stores:  # a record is read elsewhere, where the path says nothing
                why = why.replace(store, Path(store).name)
            raise CannotRun(why) from error

    return attempt(made, stage, OURS, settings)


def drained(
    feed: Any,
    ahead: int,
    steps: int,
    use: Callable[[Any], None],
    wait: Callable[[], Any] = lambda: None,
) -> tuple[float, float]:
    """Seconds of `steps` items of a feed: by the clock, and those that cores worked.

    The `ahead` items that lie ready say nothing of how quickly they are made, and are dropped.
    """
    for _ in range(ahead):
        next(feed)
    start, worked = time.perf_counter(), time.process_time()
    for _ in range(steps):
        use(next(feed))
    wait()
    return time.perf_counter() - start, time.process_time() - worked
