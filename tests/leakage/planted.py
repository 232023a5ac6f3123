"""Tissue-like pictures, and copies of them changed in one way, for tests without real images."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Mapping
from pathlib import Path

import cv2
import numpy as np
from PIL import Image

from jaxhisto.data.store_writer import StoreWriter, Tile, encode_jpeg, write_part, write_record

BENCHMARK = Path(__file__).resolve().parents[2] / "benchmarks" / "leakage.py"


def changes() -> dict:
    """The changes that benchmarks/leakage.py plants, by name."""
    spec = importlib.util.spec_from_file_location("leakage_benchmark", BENCHMARK)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module.CHANGES


def tissue(height: int, width: int, seed: int) -> np.ndarray:
    """(height, width, 3) uint8: nuclei of varied size on uneven stroma."""
    rng = np.random.default_rng(seed)
    coarse = rng.normal(0, 1, (height // 16 + 1, width // 16 + 1)).astype(np.float32)
    stroma = cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC)
    image = np.array([222, 160, 200]) + stroma[..., None] * np.array([14, 22, 10])
    image = np.clip(image, 0, 255).astype(np.uint8)
    for _ in range(height * width // 500):
        centre = tuple(int(v) for v in rng.integers(0, (width, height)))
        axes = tuple(int(v) for v in rng.integers(3, 9, 2))
        shade = tuple(int(v) for v in rng.integers((70, 40, 110), (130, 90, 170)))
        cv2.ellipse(image, centre, axes, float(rng.integers(0, 180)), 0, 360, shade, -1)
    return cv2.GaussianBlur(image, (0, 0), 0.8)


def save(folder: Path, images: Mapping[str, np.ndarray], **options: object) -> Path:
    """Writes each image under its name; folders are made, the suffix says how it is encoded."""
    for name, pixels in images.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.ascontiguousarray(pixels)).save(folder / name, **options)
    return folder


def write_store(path, slides):
    """A finished store of 128 px tiles, one part a slide."""
    with StoreWriter(path, {}) as writer:
        records = []
        for slide, tiles in slides.items():
            jpegs = [encode_jpeg(np.ascontiguousarray(t), 95, "4:4:4") for t in tiles]
            listed = [Tile(j, slide, "made", 0, i, 0.5, "flag") for i, j in enumerate(jpegs)]
            part = write_part(path, slide, listed)
            entry = {"bytes": part["bytes"], "sha256": part["sha256"]}
            records.append({"id": slide, "tile_mpp": 0.5, "tiles": part["tiles"], "part": entry})
            write_record(path, records[-1])
        facts = {"dataset": "made", "tile_px": 128, "failures": [], "code_version": "0"}
        writer.finish(records, facts, lambda manifest: "<html></html>")
    return path
