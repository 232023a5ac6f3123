"""A run's newest checkpoint as files that need no checkpoint library.

RUN/encoder.safetensors holds encoder and head with all that a user must know to feed them,
RUN/golden.safetensors eight synthetic tiles and the features that JAX gives them.
"""

from __future__ import annotations

import ctypes
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxhisto import weights
from jaxhisto.checkpoints import open_checkpoints
from jaxhisto.config import ModelConfig, PretrainConfig
from jaxhisto.distributed import make_mesh
from jaxhisto.errors import ExportError
from jaxhisto.golden import COUNT, golden_tiles
from jaxhisto.models import simclr
from jaxhisto.pretrain.step import make_embed
from jaxhisto.settings import from_json

Tree = dict[str, Any]
Embed = Callable[[Tree, Tree, jax.Array], jax.Array]


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
    check_run(run)
    config = from_json(PretrainConfig, (run / "config.json").read_text())
    # Compiled before the weights are read: the compiler's memory and theirs are not held at once.
    embed = compiled_embed(config.model, config.tile_px)
    give_back_memory()
    config, data, state = newest(run)
    give_back_memory()
    params, stats = state["params"], state["batch_stats"]
    span = data["mpp_range"]
    metadata = weights.describe(
        config,
        step=int(state["step"]),
        data_hash=data["hash"],
        manifest=(data.get("manifest") or {}).get("sha256", ""),
        mpp_range=span and (span[0], span[1]),
        stains=stains,
        licence=licence,
    )
    encoder, goldens = run / "encoder.safetensors", run / "golden.safetensors"
    digest = weights.write_encoder(encoder, params, stats, metadata)
    del params["projection"]  # on disk now, and no part of the features
    write_golden(goldens, config.model, config.tile_px, params, stats, digest, embed)
    del state, params, stats, embed
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


def compiled_embed(model: ModelConfig, tile_px: int) -> Embed:
    """The encoder in evaluation mode, compiled for the golden tiles before there are weights."""
    _, params, stats = simclr.structure(model.name, model.projection)
    shapes = {"encoder": params["encoder"]}, {"encoder": stats["encoder"]}
    images = jax.ShapeDtypeStruct((COUNT, tile_px, tile_px, 3), jnp.float32)
    with jax.default_matmul_precision("float32"):
        return jax.jit(make_embed(model)).lower(*shapes, images).compile()


def write_golden(
    path: Path,
    model: ModelConfig,
    tile_px: int,
    params: Tree,
    batch_stats: Tree,
    digest: str,
    embed: Embed | None = None,
) -> None:
    """Writes eight synthetic tiles and the features that this encoder gives them.

    Args:
      path: the file.
      model: architecture, mean and std.
      tile_px: side of the tiles.
      params, batch_stats: the weights; the projection may be absent.
      digest: SHA-256 of the encoder file with these weights.
      embed: of `compiled_embed`; compiled here where absent.
    """
    embed = compiled_embed(model, tile_px) if embed is None else embed
    tiles = golden_tiles(tile_px)
    images = jnp.asarray(tiles, jnp.float32) / 255
    trees = {"encoder": params["encoder"]}, {"encoder": batch_stats["encoder"]}
    features = embed(*trees, images)
    weights.write_golden(path, tiles, np.asarray(features), digest)


def check_run(run: Path) -> None:
    """Refuses what is no run folder."""
    if not (run / "config.json").is_file() or not (run / "data.json").is_file():
        raise ExportError(
            f"{run}: no run folder (config.json is missing); name one that "
            "`jaxhisto pretrain --out` wrote."
        )


def newest(run: Path) -> tuple[PretrainConfig, Tree, Tree]:
    """(config, data.json, {step, params, batch_stats}) of the newest sound checkpoint of a run.

    Raises:
      ExportError: no run folder, or no checkpoint in it.
      RunError: no sound checkpoint, or one of another architecture.
    """
    check_run(run)
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
