"""UNet trees to and from the names of segmentation_models_pytorch, and unet.safetensors.

A file holds the keys of `smp.Unet(...).state_dict()` in PyTorch's layout, and says in its
metadata how it wants to be fed and what its classes are. Names, strictness and the file itself
are those of `weights.py`. Needs no torch.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from jaxhisto import __version__, tensor_file
from jaxhisto.errors import ExportError
from jaxhisto.golden import golden_tiles
from jaxhisto.models import resnet, unet
from jaxhisto.weights import Array, Entry, Tree, entries_of, named, trees_of

FORMAT = "jaxhisto-unet-1"
GOLDEN_FORMAT = "jaxhisto-unet-golden-1"
PREFIX = {part: f"{part}." for part in ("encoder", "decoder", "segmentation_head")}
GOLDEN_PX = 128
"""Largest side of a golden tile: 8 tiles of it have half a megabyte of logits a class."""


def table(arch: str, classes: int, skips: unet.Skips = "all") -> dict[str, Entry]:
    """smp's name -> our tensor, for all of a UNet but `num_batches_tracked`."""
    _, params, stats = unet.structure(arch, classes, skips)
    return entries_of(params, stats, PREFIX)


def to_torch(
    params: Tree, batch_stats: Tree, arch: str, steps: int, skips: unet.Skips = "all"
) -> dict[str, Array]:
    """Our trees as the state dict of `smp.Unet`: float32, and int64 `num_batches_tracked`.

    The arrays are transposed views where they can be: a second copy of the weights is never made.

    Args:
      params, batch_stats: trees of arrays, as `unet.init` has them.
      arch: of the encoder, a key of `models.resnet.BLOCKS`.
      steps: training steps taken, which PyTorch's BatchNorm counts.
      skips: of the network; with `none` no class of smp takes the result.

    Raises:
      ExportError: every tensor that is missing, left over or of another shape.
    """
    bias = params.get("segmentation_head", {}).get("0", {}).get("bias")
    classes = 1 if bias is None else int(bias.shape[0])
    entries = table(arch, classes, skips)
    return named(entries, params, batch_stats, _what(arch, classes), steps)


def from_torch(
    tensors: Mapping[str, Array],
    arch: str,
    source: str = "state dict",
    classes: int | None = None,
    skips: unet.Skips = "all",
) -> tuple[Tree, Tree]:
    """The state dict of `smp.Unet` as our (params, batch_stats), float32.

    Args:
      tensors: under smp's names.
      arch: of the encoder, a key of `models.resnet.BLOCKS`.
      source: what errors call it.
      classes: channels of the logits; none: as found.
      skips: of the network.

    Raises:
      ExportError: every tensor that is missing, left over or of another shape.
    """
    if classes is None:
        bias = tensors.get("segmentation_head.0.bias")
        classes = 1 if bias is None or bias.ndim != 1 else bias.shape[0]
    return trees_of(table(arch, classes, skips), tensors, _what(arch, classes), source)


def describe(
    arch: str,
    classes: int,
    class_names: Sequence[str] | None,
    *,
    mean: Sequence[float],
    std: Sequence[float],
    tile_px: int,
    mpp_range: Sequence[float] | None = None,
    stains: Sequence[str] | None = None,
    data_hash: str = "unknown",
    step: int = 0,
    config: str = "{}",
    licence: str = "",
    encoder_sha256: str | None = None,
    source: Mapping[str, str] | None = None,
) -> dict[str, str]:
    """The metadata of a UNet file: all that a user must know to feed it, and its origin.

    Args:
      arch: of the encoder, a key of `models.resnet.BLOCKS`.
      classes: channels of the logits.
      class_names: their names in that order, where known.
      mean, std: (3,) each, of RGB in 0..1.
      tile_px: side of the training tiles, a multiple of 32.
      mpp_range: smallest and largest um/px of these tiles, where known.
      stains: their stains, where known.
      data_hash: hash of the images and masks trained on.
      step: steps taken.
      config: the run's settings as JSON.
      licence: of the weights, where decided.
      encoder_sha256: of the encoder.safetensors that training began from; none: random weights,
        or not known.
      source: of a file that another project trained: name, SHA-256, what it was recognised as.

    Raises:
      ExportError: names that are not one for each class, or a side that no UNet takes.
    """
    _refuse_unfit(classes, class_names, tile_px)
    metadata = {
        "format": FORMAT,
        "architecture": "unet",
        "arch": arch,
        "classes": str(classes),
        "class_names": json.dumps(class_names and list(class_names)),
        "mean": json.dumps(list(mean)),
        "std": json.dumps(list(std)),
        "value_range": "[0.0, 1.0]",
        "channel_order": "RGB",
        "tile_px": str(tile_px),
        "mpp_range": json.dumps(mpp_range and list(mpp_range)),
        "stains": json.dumps(stains and list(stains)),
        "data_hash": data_hash,
        "step": str(step),
        "config": config,
        "code_version": __version__,
        "licence": licence,
        "encoder_sha256": json.dumps(encoder_sha256),
    }
    return metadata | ({"source": json.dumps(dict(source))} if source else {})


def _refuse_unfit(classes: int, class_names: Sequence[str] | None, tile_px: int) -> None:
    if class_names is not None and len(class_names) != classes:
        raise ExportError(
            f"class names {list(class_names)}: are {len(class_names)} for {classes} classes; give "
            "one for each class."
        )
    if tile_px < 1 or tile_px % unet.STRIDE:
        raise ExportError(
            f"tile side {tile_px} px: is no multiple of {unet.STRIDE}, as a UNet needs it; give "
            "the side of its training tiles."
        )


def write_unet(
    path: Path | str, params: Tree, batch_stats: Tree, metadata: Mapping[str, str]
) -> str:
    """Writes a UNet with all skips as safetensors; the file appears whole or not at all.

    Args:
      path: the file.
      params, batch_stats: trees of arrays.
      metadata: from `describe`; its `arch`, `classes` and `step` are used here.

    Returns:
      SHA-256 of the file, which `write_golden` records.

    Raises:
      ExportError: tensors that do not fit the metadata, or a file that cannot be written.
    """
    arch, classes = metadata["arch"], int(metadata["classes"])
    entries = table(arch, classes)
    steps = int(metadata["step"])
    tensors = named(entries, params, batch_stats, _what(arch, classes), steps)
    return tensor_file.write(Path(path), tensors, metadata)


def read_unet(path: Path | str) -> tuple[Tree, Tree, dict[str, str]]:
    """Reads (params, batch_stats, metadata) of a file that `write_unet` wrote.

    Raises:
      ExportError: no such file, not a UNet of ours, or tensors that do not fit its metadata.
    """
    tensors, metadata = tensor_file.read(Path(path))
    arch, classes = metadata.get("arch", ""), metadata.get("classes", "")
    if metadata.get("format") != FORMAT or arch not in resnet.BLOCKS or not classes.isdecimal():
        raise ExportError(
            f"{path}: format {metadata.get('format')!r}, architecture {arch!r}, classes "
            f"{classes!r}, where {FORMAT!r} is needed; give a unet.safetensors."
        )
    params, batch_stats = from_torch(tensors, arch, str(path), int(classes))
    return params, batch_stats, metadata


def write_golden(
    path: Path | str,
    params: Tree,
    batch_stats: Tree,
    metadata: Mapping[str, str],
    unet_sha256: str,
) -> None:
    """Writes eight synthetic tiles and the logits JAX gives them, to verify an export by.

    `tiles` are (8, S, S, 3) uint8 RGB, `logits` (8, classes, S, S) float32 of (tile/255 - mean)
    / std in evaluation mode; S is the training tiles' side, at most GOLDEN_PX.

    Args:
      path: the file; it appears whole or not at all.
      params, batch_stats: the weights.
      metadata: from `describe`.
      unet_sha256: of the file with these weights.
    """
    tiles = golden_tiles(min(int(metadata["tile_px"]), GOLDEN_PX))
    mean, std = (np.asarray(json.loads(metadata[k]), np.float32) for k in ("mean", "std"))
    images = (tiles.astype(np.float32) / np.float32(255) - mean) / std
    graphdef, _, _ = unet.structure(metadata["arch"], int(metadata["classes"]))

    @jax.jit
    def logits_of(params: Tree, batch_stats: Tree, images: jax.Array) -> jax.Array:
        logits, _ = unet.apply(graphdef, params, batch_stats, images, train=False)
        return logits.transpose(0, 3, 1, 2)

    with jax.default_matmul_precision("float32"):
        logits = np.asarray(logits_of(params, batch_stats, jnp.asarray(images)))
    tensors: dict[str, Array] = {"tiles": tiles, "logits": np.ascontiguousarray(logits)}
    golden = {"format": GOLDEN_FORMAT, "unet_sha256": unet_sha256}
    tensor_file.write(Path(path), tensors, golden)


def _what(arch: str, classes: int) -> str:
    return f"a UNet of {arch} with {classes} classes"
