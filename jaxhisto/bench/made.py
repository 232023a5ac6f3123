"""Tiles to measure on where nobody gave any: a store of made JPEGs, or pixels in memory."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from jaxhisto.bench.ours import pixels

MADE, MOST = 512, 8192
"""Tiles of a made store at least, so that no batch is another's copy, and at most."""


def made_store(path: Path, side: int = 224, count: int = MADE) -> Path:
    """A store of spots under a fine grain, whose JPEGs take about the bytes of stained tiles.

    Raises:
      ImportError: what writes stores is not installed.
    """
    import cv2

    from jaxhisto.data.store_writer import StoreWriter, Tile, encode_jpeg, write_part, write_record

    rng = np.random.default_rng(0)

    def tile(i: int) -> Tile:
        spots = cv2.resize(rng.integers(0, 256, (side // 8, side // 8, 3), np.uint8), (side, side))
        made = np.clip(spots + rng.normal(0, 8, (side, side, 3)), 0, 255).astype(np.uint8)
        return Tile(encode_jpeg(made, 95, "4:4:4"), "made", "made", 0, i, 0.5, "flag")

    with StoreWriter(path, {}) as writer:
        part = write_part(path, "made", map(tile, range(count)))
        entry = {"bytes": part["bytes"], "sha256": part["sha256"]}
        record = {"id": "made", "tile_mpp": 0.5, "tiles": part["tiles"], "part": entry}
        write_record(path, record)
        facts = {"dataset": "made", "tile_px": side, "failures": [], "code_version": "0"}
        writer.finish([record], facts, lambda manifest: "<html></html>")
    return path


class MemoryTiles:
    """Random access to pixels in memory, as `Tiles`: for machines without what reads stores."""

    def __init__(self, side: int, count: int = MADE) -> None:
        self._tiles = pixels(count, side)
        self.canvas, self.name = (side, side), "tiles in memory"

    def __len__(self) -> int:
        return len(self._tiles)

    def read(self, i: int, out: NDArray[np.uint8] | None = None) -> NDArray[np.uint8]:
        """Tile i, (S, S, 3) uint8, not to be written to."""
        tile: NDArray[np.uint8] = self._tiles[i]
        return tile

    def sizes(self, i: int) -> tuple[int, int]:
        """Height and width of tile i."""
        return self.canvas
