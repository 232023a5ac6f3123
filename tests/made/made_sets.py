"""Small sets and encoders that tests of features and probes share."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from PIL import Image

from jaxhisto import weights
from jaxhisto.config import ModelConfig, PretrainConfig
from jaxhisto.data.store_writer import StoreWriter, Tile, encode_jpeg, write_part, write_record
from jaxhisto.models import simclr

MEAN, STD = (0.7, 0.55, 0.68), (0.2, 0.25, 0.18)
SIDE = 32


def tissue(count: int, seed: int, colour: int = 150) -> np.ndarray:
    """(count, 32, 32, 3) uint8, smooth."""
    rng = np.random.default_rng(seed)
    low = rng.integers(0, 256, (count, 4, 4, 3), np.uint8)
    smooth = [np.asarray(Image.fromarray(x).resize((SIDE, SIDE))) for x in low]
    return np.clip(np.stack(smooth) * 0.4 + colour * 0.6, 0, 255).astype(np.uint8)


def write_images(folder: Path, images: Mapping[str, np.ndarray]) -> Path:
    """PNG files by name."""
    for name, pixels in images.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(folder / name)
    return folder


def write_store(path: Path, slides: Mapping[str, np.ndarray]) -> Path:
    """A store at half the slides' resolution: tile i of a slide lies at x = 64 i, y = 128."""
    with StoreWriter(path, {}) as writer:
        records = []
        for slide, images in slides.items():
            tiles = [
                Tile(encode_jpeg(image, 95, "4:4:4"), slide, "made", 64 * i, 128, 0.5, "flag")
                for i, image in enumerate(images)
            ]
            part = write_part(path, slide, tiles)
            entry = {"bytes": part["bytes"], "sha256": part["sha256"]}
            record = {"id": slide, "mpp": 0.25, "tile_mpp": 0.5, "tiles": part["tiles"]}
            records.append({**record, "part": entry})
            write_record(path, records[-1])
        facts = {"dataset": "made", "tile_px": SIDE, "failures": [], "code_version": "0"}
        writer.finish(records, facts, lambda manifest: "<html></html>")
    return path


def write_encoder(path: Path, seed: int = 5, without: tuple[str, ...] = ()) -> Path:
    """A resnet10 whose running statistics are no 0 and 1; `without` names metadata to leave out."""
    rng = np.random.default_rng(seed)
    params, stats = simclr.init("resnet10", 128, seed)

    def spread(tree: dict) -> dict:
        return {
            k: spread(v) if isinstance(v, dict)
            else rng.uniform(0.5, 1.5, v.shape).astype(np.float32) - np.float32(k == "mean")
            for k, v in tree.items()
        }  # fmt: skip

    model = ModelConfig("resnet10", mean=MEAN, std=STD)
    config = PretrainConfig(out="run", tile_px=SIDE, model=model)
    metadata = weights.describe(config, step=7, data_hash="abc", mpp_range=(0.5, 0.5))
    path.parent.mkdir(parents=True, exist_ok=True)
    metadata = {k: v for k, v in metadata.items() if k not in without}
    weights.write_encoder(path, params, spread(stats), metadata)
    return path


def read_json(path: Path) -> dict:
    """What a JSON file holds."""
    return json.loads(path.read_text())
