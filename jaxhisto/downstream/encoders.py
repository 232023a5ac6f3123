"""An encoder by name, as features are taken of it: weights, feeding, and a hash that tells it.

Beside what `torch_files.encoder_files` knows: `random:ARCH[:SEED]`, initial weights as a run
starts from, another project's file, imported on the way, and `handmade`, which has no weights.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxhisto import tensor_file, weights
from jaxhisto.config import ModelConfig
from jaxhisto.console import say
from jaxhisto.downstream import handmade
from jaxhisto.downstream_config import EmbedConfig
from jaxhisto.errors import ConfigError, ExportError
from jaxhisto.file_config import ImportConfig
from jaxhisto.models import resnet, simclr
from jaxhisto.pretrain.step import DTYPES, normalise
from jaxhisto.torch_files import encoder_files

RANDOM, HANDMADE = "random:", "handmade"
RANDOM_PX = 224

Tree = dict[str, Any]
Three = tuple[float, float, float]
Images = np.ndarray


@dataclass(frozen=True, eq=False)
class Encoder:
    """What turns tiles into features.

    Fields:
      name: as the user named it.
      arch: a key of `models.resnet.BLOCKS`, or `handmade`.
      sha256: of its file, or of its weights where it has none.
      mean, std: that it wants RGB in 0..1 normalised with.
      tile_px: side of the tiles that it was trained on; 0: any.
      mpp_range: their um/px, where known.
      params, batch_stats: its weights; empty for `handmade`.
      licence: of the weights, where its file says.
    """

    name: str
    arch: str
    sha256: str
    mean: Three
    std: Three
    tile_px: int
    mpp_range: tuple[float, float] | None = None
    params: Tree = field(default_factory=dict)
    batch_stats: Tree = field(default_factory=dict)
    licence: str = ""

    @property
    def depth(self) -> int:
        """10, 18, 34, 50 or 101; 0 for what is no ResNet."""
        return int(self.arch.removeprefix("resnet")) if self.params else 0

    def width(self, layer: int = 4) -> int:
        """Of the features that stage `layer` gives."""
        if not self.params:
            return handmade.WIDTH
        return resnet.feature_width(self.arch) >> (4 - layer)


def open_encoder(name: str, mean: Three | None = None, std: Three | None = None) -> Encoder:
    """The encoder of a name; see `EmbedConfig.encoder` for what names there are.

    Args:
      mean, std: where its file does not say.

    Raises:
      ConfigError: one of the two alone, or for an encoder that says them itself.
      ExportError: no such encoder, damaged, or nothing says how it wants to be fed.
    """
    if (mean is None) != (std is None):
        raise ConfigError("--mean and --std: give both, or none of them.")
    if name == HANDMADE:
        sha256 = hashlib.sha256(handmade.VERSION.encode()).hexdigest()
        return Encoder(name, HANDMADE, sha256, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0), 0)
    if name.startswith(RANDOM):
        return _random(name, mean, std)
    path = Path(name)
    if path.is_file() and not _is_ours(path):
        return _foreign(name, path, mean, std)
    if not path.exists() and (path.suffix or len(path.parts) > 1):  # names of the zoo have none
        raise ExportError(f"{name}: does not exist; check the path of the encoder.")
    file, _ = encoder_files(name)
    return _of_file(name, file, mean, std)


def make_features(
    encoder: Encoder, layer: int = 4, precision: str = "f32", mesh: Mesh | None = None
) -> Any:
    """The compiled function images (N, S, S, 3) uint8 -> features (N, d) float32.

    Running statistics, as an exported encoder is used. Call it with the mesh set and the images
    sharded over `data`; each row depends on its own image and place in its device's rows alone.

    Args:
      mesh: the weights are put on all of its devices; None: where JAX puts them.
    """
    if not encoder.params:
        return handmade.features
    graphdef = simclr.encoder_structure(encoder.arch, DTYPES[precision])
    model = ModelConfig(encoder.arch, mean=encoder.mean, std=encoder.std)  # type: ignore[arg-type]

    def features(params: Tree, batch_stats: Tree, images: jax.Array) -> jax.Array:
        inputs = normalise(images.astype(jnp.float32) / jnp.float32(255), model)
        return simclr.stage_features(graphdef, params, batch_stats, inputs, layer)

    trees = {"encoder": encoder.params["encoder"]}, {"encoder": encoder.batch_stats["encoder"]}
    if mesh is not None:
        trees = jax.device_put(trees, NamedSharding(mesh, P()))
    compiled = jax.jit(features)
    return lambda images: compiled(*trees, images)


def encoder_of(config: EmbedConfig) -> Encoder:
    """The encoder that a config names."""
    return open_encoder(config.encoder, config.mean, config.std)


def _random(name: str, mean: Three | None, std: Three | None) -> Encoder:
    arch, _, seed = name.removeprefix(RANDOM).partition(":")
    if arch not in resnet.BLOCKS or not (seed or "0").isdecimal():
        raise ExportError(
            f"{name}: is no random encoder; write random:ARCH or random:ARCH:SEED, with ARCH one "
            f"of {', '.join(resnet.BLOCKS)}."
        )
    params, stats = simclr.init(arch, ModelConfig.projection, int(seed or 0))
    digest = hashlib.sha256()
    tensors = weights.to_torch(params, stats, arch, 0)
    for key in sorted(tensors):
        digest.update(key.encode() + np.ascontiguousarray(tensors[key]).tobytes())
    default = ModelConfig()
    feeding = (mean, std) if mean and std else (default.mean, default.std)
    return Encoder(
        name, arch, digest.hexdigest(), *feeding, RANDOM_PX, params=params, batch_stats=stats
    )


def _foreign(name: str, path: Path, mean: Three | None, std: Three | None) -> Encoder:
    """Another project's file, through an import that nobody sees."""
    from jaxhisto.torch_files import import_file

    with tempfile.TemporaryDirectory(prefix="jaxhisto-") as folder:
        config = ImportConfig(str(path), folder, mean=mean, std=std, part="encoder")
        with _without_wrote():
            file = import_file(config)
        with path.open("rb") as opened:
            sha256 = hashlib.file_digest(opened, "sha256").hexdigest()
        return _of_file(name, file, None, None, sha256)


def _of_file(
    name: str, file: Path, mean: Three | None, std: Three | None, sha256: str = ""
) -> Encoder:
    if not sha256:
        with file.open("rb") as opened:
            sha256 = hashlib.file_digest(opened, "sha256").hexdigest()
    params, stats, metadata = weights.read_encoder(file)
    said = metadata.get("mean"), metadata.get("std")
    if said[0] is None or said[1] is None:
        if mean is None or std is None:
            raise ExportError(
                f"{file}: does not say how it wants to be fed (mean and std are missing); give "
                "--mean and --std, such as --mean 0.485 0.456 0.406 --std 0.229 0.224 0.225 "
                "(ImageNet's)."
            )
    else:
        own = _three(said[0]), _three(said[1])
        if mean is not None and (mean, std) != own:
            raise ConfigError(
                f"--mean and --std: {file} wants mean {list(own[0])} and std {list(own[1])}; leave "
                "them out."
            )
        mean, std = own
    span = json.loads(metadata.get("mpp_range", "null"))
    return Encoder(
        name,
        metadata["arch"],
        sha256,
        mean,
        std,
        int(metadata.get("tile_px", "0")),
        span and (span[0], span[1]),
        params,
        stats,
        metadata.get("licence", ""),
    )


def _is_ours(path: Path) -> bool:
    """Whether a file is an encoder.safetensors, or something of ours that is refused as such."""
    if path.suffix != ".safetensors":
        return False
    _, metadata = tensor_file.read(path)
    return metadata.get("format", "").startswith("jaxhisto-")


@contextlib.contextmanager
def _without_wrote() -> Iterator[None]:
    """Passes on what is said, but for the files written, which are gone soon."""
    held = io.StringIO()
    with contextlib.redirect_stdout(held):
        yield
    for line in held.getvalue().splitlines():
        if not line.startswith("wrote "):
            say(line)


def _three(text: str) -> Three:
    red, green, blue = json.loads(text)
    return float(red), float(green), float(blue)
