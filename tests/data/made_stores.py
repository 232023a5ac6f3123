"""Small stores, written part by part as tiling does."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from jaxhisto.data.store_writer import (
    StoreWriter,
    Tile,
    encode_jpeg,
    write_part,
    write_record,
)

FACTS = {"code_version": "0", "dataset": "My set", "tile_px": 24, "failures": []}


def image(seed: int) -> np.ndarray:
    """(24, 24, 3) uint8, red to the left and blue to the right, so that order shows."""
    ramp = np.linspace(0, 200, 24)[None].repeat(24, 0)
    return np.stack([200 - ramp, np.full((24, 24), seed % 200), ramp], -1).astype(np.uint8)


def add(store: Path, slide: str, n: int) -> dict:
    """Writes a slide's part and record, as tiling does."""
    tiles = (
        Tile(encode_jpeg(image(i), 95, "4:4:4"), slide, "My set", 10 * i, i, 0.499, "flag")
        for i in range(n)
    )
    part = write_part(store, slide, tiles)
    record = {"id": slide, "tiles": n, "tile_mpp": 0.499}
    record["part"] = {k: part[k] for k in ("bytes", "sha256", "records")}
    write_record(store, record)
    return record


def write(store: Path, **slides: int) -> dict:
    with StoreWriter(store, {"seed": 0}) as writer:
        records = [add(store, slide, n) for slide, n in slides.items()]
        return writer.finish(records, FACTS, lambda manifest: "<html>")
