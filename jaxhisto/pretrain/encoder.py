"""A run's newest checkpoint as files that need no checkpoint library.

RUN/encoder.safetensors holds encoder and head with all that a user must know to feed them,
RUN/golden.safetensors eight synthetic tiles and the features that JAX gives them.
"""

from __future__ import annotations

import ctypes
import json
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxhisto import weights
from jaxhisto.checkpoints import open_checkpoints
from jaxhisto.config import ModelConfig, PretrainConfig, from_json
from jaxhisto.distributed import make_mesh
from jaxhisto.errors import ExportError
from jaxhisto.golden import golden_tiles
from jaxhisto.models import simclr
from jaxhisto.pretrain.step import make_embed

Tree = dict[str, Any]


def write_encoder(
    run: str | Path, licence: str = "", stains: tuple[str, ...] | None = None
) -> tuple[Path, Path]:
    """Writes both files from the newest checkpoint of a run.

    Args:
      run: folder of `jaxhisto pretrain`.
      licence: of the weights, where decided.
      stains: of the tiles, where known.

    Returns:
      (RUN/encoder.safetensors, RUN/golden.safetensors).

    Raises:
      ExportError: no run folder, or no checkpoint in it.
    """
    run = Path(run)
    config, data, state = newest(run)
    give_back_memory()
    params, stats = state["params"], state["batch_stats"]
    span = data["mpp_range"]
    metadata = weights.describe(
        config,
        step=int(state["step"]),
        data_hash=data["hash"],
        mpp_range=span and (span[0], span[1]),
        stains=stains,
        licence=licence,
    )
    encoder, goldens = run / "encoder.safetensors", run / "golden.safetensors"
    digest = weights.write_encoder(encoder, params, stats, metadata)
    write_golden(goldens, config.model, config.tile_px, params, stats, digest)
    del state, params, stats
    give_back_memory()
    return encoder, goldens


def give_back_memory() -> None:
    """Hands freed memory to the system, where the C library does not do it by itself.

    glibc keeps the buffers through which a checkpoint was read, one and a half times the
    weights, and the conversion that follows would come on top.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)


def write_golden(
    path: Path, model: ModelConfig, tile_px: int, params: Tree, batch_stats: Tree, digest: str
) -> None:
    """Writes eight synthetic tiles and the features that this encoder gives them.

    Args:
      path: the file.
      model: architecture, mean and std.
      tile_px: side of the tiles.
      params, batch_stats: the weights; the projection may be absent.
      digest: SHA-256 of the encoder file with these weights.
    """
    tiles = golden_tiles(tile_px)
    images = jnp.asarray(tiles, jnp.float32) / 255
    with jax.default_matmul_precision("float32"):
        features = make_embed(model)(params, batch_stats, images)
    weights.write_golden(path, tiles, np.asarray(features), digest)


def newest(run: Path) -> tuple[PretrainConfig, Tree, Tree]:
    """(config, data.json, {step, params, batch_stats}) of the newest sound checkpoint of a run.

    Raises:
      ExportError: no run folder, or no checkpoint in it.
      RunError: no sound checkpoint, or one of another architecture.
    """
    if not (run / "config.json").is_file() or not (run / "data.json").is_file():
        raise ExportError(
            f"{run}: no run folder (config.json is missing); name one that "
            "`jaxhisto pretrain --out` wrote."
        )
    config = from_json(PretrainConfig, (run / "config.json").read_text())
    data = json.loads((run / "data.json").read_text())
    none_yet = ExportError(
        f"{run}: has no checkpoint yet; let `jaxhisto pretrain` reach its first one "
        f"(--checkpoint-every {config.checkpoint_every})."
    )
    if not (run / "checkpoints").is_dir():
        raise none_yet
    mesh = make_mesh(1)
    with jax.set_mesh(mesh), open_checkpoints(run, config.keep, write=False) as checkpoints:
        found = checkpoints.restore(_weights_of(config, mesh))
        if found is None:
            raise none_yet
        return config, data, found[1]


def _weights_of(config: PretrainConfig, mesh: Mesh) -> Tree:
    """The shapes of a checkpoint's weights; the optimizer's state, twice as much, stays there."""
    _, params, stats = simclr.structure(config.model.name, config.model.projection)
    whole = {"step": np.zeros((), np.int32), "params": params, "batch_stats": stats}
    everywhere = NamedSharding(mesh, P())
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=everywhere), whole
    )
