"""A run's newest checkpoint as files that need no checkpoint library.

RUN/encoder.safetensors holds encoder and head with all that a user must know to feed them,
RUN/golden.safetensors eight synthetic tiles and the features that JAX gives them.
"""

from __future__ import annotations

import json
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
from jaxhisto.golden import golden_tiles
from jaxhisto.heap import free_large_at_once, give_back_memory
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
    free_large_at_once()
    encoder, goldens = run / "encoder.safetensors", run / "golden.safetensors"
    config, digest = _write_weights(run, encoder, licence, stains)
    write_golden(goldens, encoder, config.model, config.tile_px, digest)
    return encoder, goldens


def _write_weights(
    run: Path, encoder: Path, licence: str, stains: tuple[str, ...] | None
) -> tuple[PretrainConfig, str]:
    """The run's config, and the SHA-256 of the file with its newest weights."""
    config, data, state = newest(run)
    give_back_memory()
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
    return config, weights.write_encoder(encoder, state["params"], state["batch_stats"], metadata)


def compiled_embed(model: ModelConfig, tile_px: int) -> Embed:
    """The encoder in evaluation mode, compiled for one golden tile before there are weights.

    One: the activations of eight of 224 px would take nearly as much memory as the weights.
    """
    _, params, stats = simclr.structure(model.name, model.projection)
    shapes = {"encoder": params["encoder"]}, {"encoder": stats["encoder"]}
    images = jax.ShapeDtypeStruct((1, tile_px, tile_px, 3), jnp.float32)
    with jax.default_matmul_precision("float32"):
        return jax.jit(make_embed(model)).lower(*shapes, images).compile()


def write_golden(path: Path, encoder: Path, model: ModelConfig, tile_px: int, digest: str) -> None:
    """Writes eight synthetic tiles and the features that an encoder gives them.

    The caller should hold no weights: the compiler needs as much memory as they do, so they are
    read after it has ended, tensor by tensor.

    Args:
      path: the file.
      encoder: encoder.safetensors, as `weights.write_encoder` wrote it.
      model: architecture, mean and std.
      tile_px: side of the tiles.
      digest: SHA-256 of `encoder`.
    """
    give_back_memory()
    embed = compiled_embed(model, tile_px)
    give_back_memory()
    tiles = golden_tiles(tile_px)
    trees = weights.stream_encoder(encoder, model.name, _on_device)
    give_back_memory()
    images = np.asarray(tiles, np.float32) / 255
    features = np.concatenate([np.asarray(embed(*trees, image[None])) for image in images])
    del trees, embed
    give_back_memory()
    weights.write_golden(path, tiles, features, digest)


def _on_device(array: np.ndarray) -> jax.Array:
    """Waits for the copy: else those of all tensors would be held until theirs is made."""
    return jax.device_put(array).block_until_ready()


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
