"""Image files and tile stores for tests, each with the pixels it was made of."""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from PIL import Image

from jaxhisto.data.store_writer import StoreWriter, Tile, encode_jpeg, write_part, write_record


def noise(height: int, width: int, seed: int = 0) -> np.ndarray:
    """(height, width, 3) uint8 noise: no two pixels, channels or images alike."""
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def blobs(side: int, seed: int = 0) -> np.ndarray:
    """(side, side, 3) uint8, smooth and coloured: what a JPEG keeps to a few grey levels."""
    small = Image.fromarray(noise(4, 4, seed))
    return np.asarray(small.resize((side, side), Image.Resampling.BICUBIC))


def encoded(image: Image.Image | np.ndarray, kind: str = "PNG", **options: object) -> bytes:
    """The bytes of an image file."""
    picture = Image.fromarray(image) if isinstance(image, np.ndarray) else image
    out = io.BytesIO()
    picture.save(out, kind, **options)
    return out.getvalue()


def write_pngs(folder: Path, images: Mapping[str, np.ndarray]) -> Path:
    """Writes each image, lossless, under its name; folders are made."""
    for name, pixels in images.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(encoded(pixels))
    return folder


def write_store(
    path: Path, slides: Mapping[str, list[np.ndarray]], mpp: float = 0.5, dataset: str = "made"
) -> Path:
    """A finished store of square tiles, one part a slide, as `jaxhisto tile` leaves it."""
    side = next(iter(slides.values()))[0].shape[0]
    return write_raw_store(
        path,
        {slide: [encode_jpeg(t, 95, "4:4:4") for t in tiles] for slide, tiles in slides.items()},
        side,
        mpp,
        dataset,
    )


def write_raw_store(
    path: Path,
    slides: Mapping[str, list[bytes]],
    side: int,
    mpp: float = 0.5,
    dataset: str = "made",
    by_folder: bool = False,
) -> Path:
    """As `write_store`, of bytes that need not be images; each slide of the dataset that its first
    folder names where `by_folder`."""
    with StoreWriter(path, {}) as writer:
        records = []
        for slide, images in slides.items():
            own = slide.split("/")[0] if by_folder else dataset
            tiles = [Tile(image, slide, own, 0, i, mpp, "flag") for i, image in enumerate(images)]
            part = write_part(path, slide, tiles)
            entry = {"bytes": part["bytes"], "sha256": part["sha256"]}
            records.append({"id": slide, "tile_mpp": mpp, "tiles": part["tiles"], "part": entry})
            records[-1] |= {"dataset": own} if by_folder else {}
            write_record(path, records[-1])
        facts = {"dataset": dataset, "tile_px": side, "failures": [], "code_version": "0"}
        writer.finish(records, facts, lambda manifest: "<html></html>")
    return path
