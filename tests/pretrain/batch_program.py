"""One process of a pod: what is in the global batches, as digests (run by test_processes.py)."""

from __future__ import annotations

import hashlib
import json
import sys
from dataclasses import replace

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import PartitionSpec as P

from jaxhisto.config import DataConfig, PretrainConfig
from jaxhisto.data.loader import batches
from jaxhisto.data.sources import open_tiles
from jaxhisto.distributed import join, leave, make_mesh, to_global
from jaxhisto.flags import parse
from jaxhisto.launch import find
from jaxhisto.view_params import draw_views

N, STEPS = 8, 5


def digest(*arrays: np.ndarray) -> str:
    """SHA-256 over arrays, shapes and types."""
    hashed = hashlib.sha256()
    for array in arrays:
        hashed.update(f"{array.shape} {array.dtype}".encode() + np.ascontiguousarray(array).data)
    return hashed.hexdigest()


def digests(config: PretrainConfig) -> list[list[str]]:
    """(indices, tiles and sizes, drawn augmentations) of each step's global batch."""
    mesh = make_mesh()
    feed = batches(
        open_tiles(config.data), replace(config.data, threads=1), N, config.seed, 0, STEPS,
        process=jax.process_index(), processes=jax.process_count(),
    )  # fmt: skip

    @jax.jit
    def drawn(step: jax.Array, sizes: jax.Array):
        key = jax.random.fold_in(jax.random.key(config.seed), step)
        draw = jax.sharding.auto_axes(lambda key, sizes: draw_views(key, sizes, config.augment))
        return draw(key, sizes, out_sharding=P("data"))

    def whole(tree):
        parts = [multihost_utils.process_allgather(leaf, tiled=True) for leaf in tree]
        return [np.asarray(part) for part in parts]

    found = []
    with jax.set_mesh(mesh):
        for step, batch in feed:
            tiles, sizes = to_global((batch.tiles, batch.sizes), mesh)
            views = drawn(np.int32(step), sizes)
            index = whole([batch.index.astype(np.int32)])
            found.append([digest(*index), digest(*whole([tiles, sizes])), digest(*whole(views))])
    return found


def main() -> None:
    config = parse(PretrainConfig, sys.argv[1:], "batches")
    launch = find(config.distributed, {})
    if launch is not None:
        join(launch)
    print(json.dumps(digests(replace(config, data=DataConfig(stores=config.data.stores)))))
    if launch is not None:
        leave()


if __name__ == "__main__":
    main()
