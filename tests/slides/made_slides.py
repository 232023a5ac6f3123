"""Slides written by tifffile, for tests: generic pyramidal TIFF, lossless."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import tifffile

PINK = (180, 100, 170)  # hue 307 degrees, 153 in OpenCV's units: ciga2022 takes it
BROWN = (150, 100, 60)
GLASS = (242, 242, 242)


def painted(width: int, height: int, colour: tuple[int, int, int], seed: int = 0) -> np.ndarray:
    """(height, width, 3) uint8 of one colour with a little noise."""
    noise = np.random.default_rng(seed).integers(-6, 7, (height, width, 3))
    return (np.array(colour) + noise).clip(0, 255).astype(np.uint8)


def half_tissue(width: int, height: int, seed: int = 0) -> np.ndarray:
    """Pink in the left half, glass in the right."""
    image = painted(width, height, GLASS, seed)
    image[:, : width // 2] = painted(width // 2, height, PINK, seed + 1)
    return image


def write_slide(
    path: Path,
    image: np.ndarray,
    mpp: float | tuple[float, float] | None = 0.5,
    levels: int = 1,
    unit: str = "CENTIMETER",
) -> Path:
    """A tiled TIFF that OpenSlide reads; each further level averages 2 x 2 pixels."""
    path.parent.mkdir(parents=True, exist_ok=True)
    x, y = mpp if isinstance(mpp, tuple) else (mpp, mpp)
    options = {} if x is None else {"resolution": (1e4 / x, 1e4 / y), "resolutionunit": unit}
    with tifffile.TiffWriter(path) as tiff:
        for level in range(levels):
            tiff.write(
                image,
                tile=(256, 256),
                photometric="rgb",
                compression="zlib",
                metadata=None,
                subfiletype=int(level > 0),
                **options,
            )
            options = {}
            h, w = image.shape[0] // 2, image.shape[1] // 2
            blocks = image[: 2 * h, : 2 * w].reshape(h, 2, w, 2, 3)
            image = np.rint(blocks.mean(axis=(1, 3))).astype(np.uint8)
    return path


def spoil(path: Path, *blocks: int, page: int = 0) -> Path:
    """Overwrites the bytes of some 256-px blocks, so that they cannot be decoded."""
    with tifffile.TiffFile(path) as tiff:
        places = [
            (tiff.pages[page].dataoffsets[i], tiff.pages[page].databytecounts[i]) for i in blocks
        ]
    data = bytearray(path.read_bytes())
    for offset, count in places:
        data[offset : offset + count] = b"\xff" * count
    path.write_bytes(data)
    return path
