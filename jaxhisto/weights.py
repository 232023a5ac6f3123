"""Flax trees to and from PyTorch names, strict both ways, and the safetensors file between.

One table, made from the model's own structure, says which tensor is which; both directions read
it, so that they cannot drift apart. A file holds torchvision's names in PyTorch's layout, and
the projection head as `fc.1` and `fc.3`. Needs no torch.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from jaxhisto import __version__, tensor_file
from jaxhisto.config import MonitorConfig, PretrainConfig
from jaxhisto.errors import ExportError
from jaxhisto.models import resnet, simclr
from jaxhisto.settings import to_json

Array = NDArray[Any]
Tree = dict[str, Any]

FORMAT = "jaxhisto-encoder-1"
GOLDEN_FORMAT = "jaxhisto-golden-1"
PREFIX = {"encoder": "", "projection": "fc."}
LEAF = {
    "kernel": "weight",
    "scale": "weight",
    "bias": "bias",
    "mean": "running_mean",
    "var": "running_var",
}
AXES = {4: (3, 2, 0, 1), 2: (1, 0)}
"""Our axes in PyTorch's order: HWIO to OIHW, (in, out) to (out, in); others stay."""


@dataclass(frozen=True)
class Entry:
    """One tensor: where it lies in our trees, and its shape there."""

    collection: str
    path: tuple[str, ...]
    shape: tuple[int, ...]

    @property
    def torch_shape(self) -> tuple[int, ...]:
        """The shape in PyTorch's layout."""
        return tuple(self.shape[axis] for axis in self.axes)

    @property
    def axes(self) -> tuple[int, ...]:
        """Our axes in PyTorch's order."""
        return AXES.get(len(self.shape), tuple(range(len(self.shape))))


def table(arch: str, projection: int = 128) -> dict[str, Entry]:
    """PyTorch name -> our tensor, for all of an architecture but `num_batches_tracked`.

    A `projection` of 0 stands for an encoder without a head.
    """
    _, params, stats = simclr.structure(arch, projection or 1)
    entries = entries_of(params, stats, PREFIX)
    return {n: e for n, e in entries.items() if projection or e.path[0] != "projection"}


def entries_of(params: Tree, batch_stats: Tree, prefix: Mapping[str, str]) -> dict[str, Entry]:
    """PyTorch name -> our tensor, for trees of shapes; see `torch_name` for `prefix`."""
    return {
        torch_name(path, prefix): Entry(collection, path, tuple(leaf.shape))
        for collection, tree in (("params", params), ("batch_stats", batch_stats))
        for path, leaf in _leaves(tree)
    }


def torch_name(path: tuple[str, ...], prefix: Mapping[str, str] = PREFIX) -> str:
    """`("encoder", "layer1", "0", "bn1", "mean")` -> `layer1.0.bn1.running_mean`.

    `prefix` is what stands in PyTorch for the first part of the path.
    """
    root, *inner, leaf = path
    return prefix[root] + ".".join([*inner, LEAF[leaf]])


def to_torch(params: Tree, batch_stats: Tree, arch: str, steps: int) -> dict[str, Array]:
    """Our trees as PyTorch's state dict: float32, and int64 `num_batches_tracked`.

    The arrays are transposed views where they can be: a second copy of the weights is never made.

    Args:
      params: nested dict of arrays, encoder and projection.
      batch_stats: nested dict of running statistics.
      arch: a key of `models.resnet.BLOCKS`.
      steps: training steps taken, which PyTorch's BatchNorm counts.

    Raises:
      ExportError: every tensor that is missing, left over or of another shape.
    """
    return named(table(arch, _projection_width(params)), params, batch_stats, arch, steps)


def named(
    entries: Mapping[str, Entry], params: Tree, batch_stats: Tree, what: str, steps: int
) -> dict[str, Array]:
    """Our trees under the names of `entries`, with counters; `what` is the network in errors.

    Raises:
      ExportError: every tensor that is missing, left over or of another shape.
    """
    ours = {
        (collection, path): np.asarray(leaf, np.float32)
        for collection, tree in (("params", params), ("batch_stats", batch_stats))
        for path, leaf in _leaves(tree)
    }
    expected = {(e.collection, e.path): e.shape for e in entries.values()}
    _check("the run's weights", what, {k: v.shape for k, v in ours.items()}, expected)
    tensors = {
        name: ours[entry.collection, entry.path].transpose(entry.axes)
        for name, entry in entries.items()
    }
    return tensors | {name: np.asarray(steps, np.int64) for name in _counters(entries)}


def from_torch(
    tensors: Mapping[str, Array],
    arch: str,
    source: str = "state dict",
    projection: int | None = None,
) -> tuple[Tree, Tree]:
    """PyTorch's state dict as our (params, batch_stats), float32; `source` names it in errors.

    Args:
      tensors: under torchvision's names, the head as `fc.1`, `fc.3`.
      arch: a key of `models.resnet.BLOCKS`.
      source: what errors call it.
      projection: width of the head, 0 for an encoder without one; none: as found.

    Raises:
      ExportError: every tensor that is missing, left over or of another shape.
    """
    if projection is None:
        head = tensors.get("fc.3.weight")
        has_head = any(name.startswith("fc.") for name in tensors)
        projection = head.shape[0] if head is not None else 128 * has_head
    return trees_of(table(arch, projection), tensors, arch, source)


def trees_of(
    entries: Mapping[str, Entry], tensors: Mapping[str, Array], what: str, source: str
) -> tuple[Tree, Tree]:
    """Tensors under the names of `entries` as (params, batch_stats); the inverse of `named`.

    Raises:
      ExportError: every tensor that is missing, left over or of another shape.
    """
    expected: dict[str, tuple[int, ...]] = {n: e.torch_shape for n, e in entries.items()}
    expected |= dict.fromkeys(_counters(entries), ())
    _check(source, what, {n: t.shape for n, t in tensors.items()}, expected)
    trees: dict[str, Tree] = {"params": {}, "batch_stats": {}}
    for name, entry in entries.items():
        _put(trees[entry.collection], entry.path, _as_ours(tensors[name], entry))
    return trees["params"], trees["batch_stats"]


def describe(
    config: PretrainConfig,
    *,
    step: int,
    data_hash: str,
    manifest: str = "",
    mpp_range: tuple[float, float] | None = None,
    stains: tuple[str, ...] | None = None,
    licence: str = "",
) -> dict[str, str]:
    """The metadata of an encoder file: all that a user must know to feed it, and its origin.

    Args:
      config: the run's settings.
      step: steps taken.
      data_hash: hash of the tiles trained on.
      manifest: sha256 of the list that they were taken by, where there was one.
      mpp_range: smallest and largest um/px of these tiles, where known.
      stains: their stains, where known.
      licence: of the weights, where decided.
    """
    width = resnet.feature_width(config.model.name)
    return {
        "format": FORMAT,
        "arch": config.model.name,
        "feature_width": str(width),
        "projection_width": str(config.model.projection),
        "mean": json.dumps(list(config.model.mean)),
        "std": json.dumps(list(config.model.std)),
        "value_range": "[0.0, 1.0]",
        "channel_order": "RGB",
        "tile_px": str(config.tile_px),
        "mpp_range": json.dumps(mpp_range and list(mpp_range)),
        "stains": json.dumps(stains and list(stains)),
        "data_hash": data_hash,
        "step": str(step),
        "config": to_json(_without_places(config)),
        "code_version": __version__,
        "licence": licence,
        **({"manifest": manifest} if manifest else {}),
    }


def describe_imported(
    arch: str,
    projection: int,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    *,
    tile_px: int,
    mpp_range: tuple[float, float] | None,
    licence: str,
    source: Mapping[str, Any],
) -> dict[str, str]:
    """The metadata of an encoder that another project trained; what it hides stays open.

    Args:
      arch: a key of `models.resnet.BLOCKS`.
      projection: width of the head in the file, 0 without one.
      mean, std: (3,) each, as the encoder wants RGB in 0..1.
      tile_px: side of the tiles it was trained on.
      mpp_range: their um/px, where known.
      licence: of the weights, empty where unknown.
      source: what the file was: its name, SHA-256 and what it was recognised as.
    """
    return {
        "format": FORMAT,
        "arch": arch,
        "feature_width": str(resnet.feature_width(arch)),
        "projection_width": str(projection),
        "mean": json.dumps(list(mean)),
        "std": json.dumps(list(std)),
        "value_range": "[0.0, 1.0]",
        "channel_order": "RGB",
        "tile_px": str(tile_px),
        "mpp_range": json.dumps(mpp_range and list(mpp_range)),
        "stains": "null",
        "data_hash": "unknown",
        "step": "0",
        "config": "{}",
        "code_version": __version__,
        "licence": licence,
        "source": json.dumps(source),
    }


def _without_places(config: PretrainConfig) -> PretrainConfig:
    """The config without the user's folders: they are nobody's business, and no part of it."""
    names = tuple(Path(store).name for store in config.data.stores)
    init = Path(config.init).name
    data = replace(config.data, stores=names, manifest=Path(config.data.manifest).name)
    return replace(config, out="", init=init, data=data, monitor=MonitorConfig())


def write_encoder(
    path: Path | str, params: Tree, batch_stats: Tree, metadata: Mapping[str, str]
) -> str:
    """Writes encoder and head as safetensors; the file appears whole or not at all.

    Args:
      path: the file.
      params, batch_stats: trees of arrays.
      metadata: from `describe`; its `arch` and `step` are used here.

    Returns:
      SHA-256 of the file, which `write_golden` records.

    Raises:
      ExportError: tensors that do not fit `arch`, or a file that cannot be written.
    """
    tensors = to_torch(params, batch_stats, metadata["arch"], int(metadata["step"]))
    return tensor_file.write(Path(path), tensors, metadata)


def read_encoder(path: Path | str) -> tuple[Tree, Tree, dict[str, str]]:
    """Reads (params, batch_stats, metadata) of a file that `write_encoder` wrote.

    Raises:
      ExportError: no such file, not an encoder of ours, or tensors that do not fit its `arch`.
    """
    tensors, metadata = tensor_file.read(Path(path))
    if metadata.get("format") != FORMAT or metadata.get("arch") not in resnet.BLOCKS:
        remedy = "write the file with `jaxhisto export`"
        if metadata.get("architecture") == "unet":
            remedy = f"`jaxhisto import {path} --part encoder --out DIR` takes the encoder out"
        raise ExportError(
            f"{path}: format {metadata.get('format')!r}, architecture {metadata.get('arch')!r}, "
            f"where {FORMAT!r} is needed; {remedy}."
        )
    width = metadata.get("projection_width", "")
    projection = int(width) if width.isdecimal() else None
    params, batch_stats = from_torch(tensors, metadata["arch"], str(path), projection)
    return params, batch_stats, metadata


def stream_encoder(path: Path | str, arch: str, put: Callable[[Array], Any]) -> tuple[Tree, Tree]:
    """The encoder, without its head, of a file that was just written: (params, batch_stats).

    One tensor after the other is read and handed to `put`, so that the weights are in memory
    once, in the form that `put` gives them.
    """
    entries = table(arch, 0)
    trees: dict[str, Tree] = {"params": {}, "batch_stats": {}}
    for name, tensor in tensor_file.each(Path(path)):
        if name in entries:
            entry = entries[name]
            _put(trees[entry.collection], entry.path, put(_as_ours(tensor, entry)))
    return trees["params"], trees["batch_stats"]


def write_golden(path: Path | str, tiles: Array, features: Array, encoder_sha256: str) -> None:
    """Writes tiles and the features JAX gives them, by which an export is verified.

    Args:
      path: the file; it appears whole or not at all.
      tiles: (8, S, S, 3) uint8 RGB.
      features: (8, d) float32, of (tile/255 - mean)/std in evaluation mode.
      encoder_sha256: of the encoder file that gave them.
    """
    tensors: dict[str, Array] = {
        "tiles": np.ascontiguousarray(tiles, np.uint8),
        "features": np.ascontiguousarray(features, np.float32),
    }
    metadata = {"format": GOLDEN_FORMAT, "encoder_sha256": encoder_sha256}
    tensor_file.write(Path(path), tensors, metadata)


def _leaves(tree: Tree, path: tuple[str, ...] = ()) -> list[tuple[tuple[str, ...], Any]]:
    found: list[tuple[tuple[str, ...], Any]] = []
    for name, value in tree.items():
        here = (*path, name)
        found += _leaves(value, here) if isinstance(value, dict) else [(here, value)]
    return found


def _as_ours(tensor: Array, entry: Entry) -> Array:
    back = tensor.astype(np.float32, copy=False).transpose(np.argsort(entry.axes))
    return np.array(back, order="C")  # never the caller's own memory


def _put(tree: Tree, path: tuple[str, ...], value: Array) -> None:
    for name in path[:-1]:
        tree = tree.setdefault(name, {})
    tree[path[-1]] = value


def _counters(entries: Mapping[str, Entry]) -> list[str]:
    """The `num_batches_tracked` that stands beside each `running_mean`."""
    tail = "running_mean"
    return [n.removesuffix(tail) + "num_batches_tracked" for n in entries if n.endswith(tail)]


def _projection_width(params: Tree) -> int:
    if "projection" not in params:
        return 0
    last = params["projection"].get("3", {}).get("kernel")
    return 128 if last is None else int(last.shape[-1])


def _check(
    source: str,
    what: str,
    found: Mapping[Any, tuple[int, ...]],
    expected: Mapping[Any, tuple[int, ...]],
) -> None:
    """Raises ExportError with all differences between two tables of shapes."""
    wrong = [f"{_dotted(k)} missing" for k in expected if k not in found]
    wrong += [f"{_dotted(k)} unexpected" for k in found if k not in expected]
    wrong += [
        f"{_dotted(k)} is {tuple(found[k])}, not {shape}"
        for k, shape in expected.items()
        if k in found and tuple(found[k]) != shape
    ]
    if wrong:
        raise ExportError(
            f"{source}: {len(wrong)} tensors do not fit {what} ({'; '.join(wrong)}); "
            "name the architecture the weights were made with."
        )


def _dotted(key: Any) -> str:
    return key if isinstance(key, str) else ".".join([key[0], *key[1]])
