"""A trained UNet, compiled to give the probabilities of windows."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from jaxhisto import unet_weights
from jaxhisto.config import ModelConfig
from jaxhisto.distributed import to_global
from jaxhisto.downstream.tiled import Predict
from jaxhisto.errors import ExportError
from jaxhisto.models import unet
from jaxhisto.pretrain.step import normalise, replicate

Tree = dict[str, Any]
UNET = "unet.safetensors"


@dataclass(frozen=True, eq=False)
class TrainedUNet:
    """A UNet file.

    Fields:
      path: of the file, `sha256` its hash.
      arch: of the encoder.
      class_names: C names.
      mean, std: that it wants RGB in 0..1 normalised with.
      tile_px: side of its training crops.
      mpp_range: their um/px, where known.
      params, batch_stats: its weights.
    """

    path: Path
    sha256: str
    arch: str
    class_names: tuple[str, ...]
    mean: Sequence[float]
    std: Sequence[float]
    tile_px: int
    mpp_range: tuple[float, float] | None
    params: Tree
    batch_stats: Tree


def open_unet(name: str | Path) -> TrainedUNet:
    """The UNet of a run folder or a file.

    Raises:
      ExportError: none there, or not a UNet of ours.
    """
    path = Path(name)
    if path.is_dir():
        path = path / UNET
        if not path.is_file():
            raise ExportError(
                f"{path}: is not there; let `jaxhisto segment` end its run, or name a "
                "unet.safetensors."
            )
    params, stats, metadata = unet_weights.read_unet(path)
    missing = [key for key in ("mean", "std") if not metadata.get(key)]
    if missing:
        raise ExportError(
            f"{path}: does not say how it wants to be fed ({', '.join(missing)}); import the "
            "original again with --mean and --std."
        )
    count = int(metadata["classes"])
    names = json.loads(metadata.get("class_names", "null"))
    span = json.loads(metadata.get("mpp_range", "null"))
    return TrainedUNet(
        path,
        _sha256(path),
        metadata["arch"],
        tuple(names or (f"class {i}" for i in range(count))),
        json.loads(metadata["mean"]),
        json.loads(metadata["std"]),
        int(metadata["tile_px"]),
        span and (float(span[0]), float(span[1])),
        params,
        stats,
    )


def make_predict(
    arch: str,
    classes: int,
    params: Tree,
    batch_stats: Tree,
    mean: Sequence[float],
    std: Sequence[float],
    mesh: Mesh,
) -> Predict:
    """The network in evaluation mode and float32, over the devices of a mesh.

    Returns:
      (m, h, w, 3) uint8 -> (m, h, w, C) float32 probabilities; m must divide among the devices.
    """
    graphdef, _, _ = unet.structure(arch, classes)
    model = ModelConfig(cast(Any, arch), mean=cast(Any, tuple(mean)), std=cast(Any, tuple(std)))

    @jax.jit
    def probabilities(params: Tree, stats: Tree, windows: jax.Array) -> jax.Array:
        x = normalise(windows.astype(jnp.float32) / jnp.float32(255), model)
        logits, _ = unet.apply(graphdef, params, stats, x, train=False)
        return jax.reshard(jax.nn.softmax(logits), P())

    with jax.set_mesh(mesh):
        placed = replicate((params, batch_stats), mesh)

    def predict(windows: np.ndarray) -> np.ndarray:
        with jax.set_mesh(mesh), jax.default_matmul_precision("float32"):
            return np.asarray(probabilities(*placed, to_global(windows, mesh)))

    return predict


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
