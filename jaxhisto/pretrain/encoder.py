"""A run's newest checkpoint as files that need no checkpoint library.

RUN/encoder.safetensors holds encoder and head with all that a user must know to feed them,
RUN/golden.safetensors eight synthetic tiles and the features that JAX gives them.
"""

from __future__ import annotations

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from jaxhisto import weights
from jaxhisto.checkpoints import open_checkpoints
from jaxhisto.config import PretrainConfig, from_json
from jaxhisto.distributed import make_mesh
from jaxhisto.errors import ExportError
from jaxhisto.golden import golden_tiles
from jaxhisto.pretrain.run import schedule_length
from jaxhisto.pretrain.step import TrainState, init_state, make_embed


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
    golden = golden_tiles(config.tile_px)
    images = jnp.asarray(golden, jnp.float32) / 255
    with jax.default_matmul_precision("float32"):
        features = make_embed(config.model)(state.params, state.batch_stats, images)
    span = data["mpp_range"]
    metadata = weights.describe(
        config,
        step=int(state.step),
        data_hash=data["hash"],
        mpp_range=span and (span[0], span[1]),
        stains=stains,
        licence=licence,
    )
    encoder, goldens = run / "encoder.safetensors", run / "golden.safetensors"
    digest = weights.write_encoder(encoder, state.params, state.batch_stats, metadata)
    weights.write_golden(goldens, golden, np.asarray(features), digest)
    return encoder, goldens


def newest(run: Path) -> tuple[PretrainConfig, dict, TrainState]:
    """(config, data.json, state) of the newest checkpoint of a run.

    Raises:
      ExportError: no run folder, or no checkpoint in it.
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
        if checkpoints.latest_step is None:
            raise none_yet
        steps, steps_per_epoch = schedule_length(config, data["tiles"])
        state = checkpoints.restore(init_state(config, steps, steps_per_epoch, mesh))
    return config, data, state
