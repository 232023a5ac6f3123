"""What all processes of a run must hold alike before the run folder is made."""

from __future__ import annotations

import hashlib
from typing import Any

import jax
import numpy as np

from jaxhisto.config import PretrainConfig
from jaxhisto.data.sources import Tiles
from jaxhisto.runlog import run_record

Tree = dict[str, Any]


def must_be_equal(
    config: PretrainConfig, tiles: Tiles, begin: tuple[Tree, Tree] | None
) -> dict[str, dict[str, Any]]:
    """Settings, versions, data and starting weights, for `distributed.agree`."""
    devices = jax.local_devices()
    return run_record(config) | {
        "data": {"data hash": tiles.hash, "tiles": len(tiles)},
        "weights": {"starting weights": digest(begin)},
        "devices": {"device": devices[0].device_kind, "devices a process": len(devices)},
    }


def digest(tree: Any) -> str:
    """SHA-256 over all arrays of a tree and their names."""
    hashed = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        hashed.update(f"{jax.tree_util.keystr(path)} {np.shape(leaf)}".encode())
        hashed.update(np.ascontiguousarray(leaf).tobytes())
    return hashed.hexdigest()
