"""Small files of features whose rows are known."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from jaxhisto.data.features import FeatureWriter


def write_features(
    path: Path,
    rows: np.ndarray,
    names: Sequence[str],
    data_hash: str = "0" * 64,
    slides: Sequence[str] = (),
    coords: np.ndarray | None = None,
    span: float = 32.0,
) -> Path:
    """A file as `jaxhisto embed` writes it."""
    rows = np.asarray(rows, np.float32)
    attributes = {"encoder_sha256": "e" * 64, "data_hash": data_hash, "mean": [0.5] * 3}
    attributes |= {"std": [0.5] * 3, "side": 32}
    at = np.zeros((len(rows), 2), np.int64) if coords is None else coords
    with FeatureWriter(path, attributes, rows.shape[1], len(rows)) as writer:
        writer.append(rows, at, lambda i: names[i])
        slides = slides or [""] * len(rows)
        writer.finish(names, slides, np.full(len(rows), span), attributes)
    return path


def planted(n: int, width: int, groups: int, seed: int = 0, apart: float = 12.0) -> np.ndarray:
    """(n, width) float32 around `groups` <= width equally distant centres, shuffled; each
    has as many rows."""
    random = np.random.default_rng(seed)
    centres = apart * np.linalg.qr(random.standard_normal((width, width)))[0][:groups]
    rows = centres[np.arange(n) % groups] + random.standard_normal((n, width))
    return random.permutation(rows).astype(np.float32)
