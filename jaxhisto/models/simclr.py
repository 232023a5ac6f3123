"""SimCLR: encoder and projection head d -> d -> 128 (Chen et al. 2020), as published in 2020.

The model is used functionally: `structure` gives its static part and the shapes of its two
trees, `apply` runs it. Trees are plain nested dicts of arrays; only here do they meet NNX.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from jaxhisto.models.initial import initial
from jaxhisto.models.resnet import Numbered, StemForm, build_resnet, feature_width

Tree = dict[str, Any]

VIEWS = 2  # rows that an image has in a batch, next to each other


class SimCLR(nnx.Module):
    """Encoder, and the head whose output the loss compares."""

    def __init__(
        self,
        name: str,
        projection: int,
        dtype: DTypeLike = jnp.float32,
        group: int = 0,
        remat: bool = False,
        stem: StemForm = "plain",
    ):
        width = feature_width(name)
        self.encoder = build_resnet(name, dtype, group, remat, stem)
        # 1 and 3, as in the published checkpoints: fc.0 and fc.2 have no parameters.
        self.projection = Numbered({1: _linear(width, width), 3: _linear(width, projection)})

    def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
        """(N, H, W, 3) normalised RGB to (N, projection) float32, not yet of unit length."""
        return self.head(self.encoder(x, train=train))

    def head(self, features: jax.Array) -> jax.Array:
        """(N, d) features to (N, projection) float32."""
        hidden, out = self.projection.in_order()
        return out(nnx.relu(hidden(features)))


def structure(
    name: str,
    projection: int = 128,
    dtype: DTypeLike = jnp.float32,
    *,
    bn_group: int = 0,
    remat: bool = False,
    stem: StemForm = "plain",
) -> tuple[nnx.GraphDef, Tree, Tree]:
    """The static part of the model and the shapes of (params, batch_stats), without memory.

    Args:
      name, projection: architecture and width of z.
      dtype: of the convolutions.
      bn_group: consecutive images whose views BatchNorm normalises together; 0: all.
      remat: keep the inputs of the residual blocks alone and compute the rest again.
      stem: form of the first convolution in training; the trees are the same in both.
    """
    model = nnx.eval_shape(lambda: SimCLR(name, projection, dtype, VIEWS * bn_group, remat, stem))
    graphdef, *trees = nnx.split(model, nnx.Param, nnx.BatchStat)
    params, stats = trees
    return graphdef, nnx.to_pure_dict(params), nnx.to_pure_dict(stats)


def init(name: str, projection: int, seed: int) -> tuple[Tree, Tree]:
    """Initial (params, batch_stats) on the host, as torchvision draws them."""
    _, params, stats = structure(name, projection)
    return initial(params, seed), initial(stats, seed)


def project(
    graphdef: nnx.GraphDef, params: Tree, batch_stats: Tree, x: jax.Array, *, train: bool
) -> tuple[jax.Array, Tree]:
    """Runs encoder and head: (N, H, W, 3) to (N, 128), and the BatchNorm statistics after it."""
    model = _merge(graphdef, params, batch_stats)
    z = model(x, train=train)
    return z, nnx.to_pure_dict(nnx.state(model, nnx.BatchStat))


def features_and_z(
    graphdef: nnx.GraphDef, params: Tree, batch_stats: Tree, x: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Runs encoder and head on running statistics: (N, H, W, 3) to (N, d) and (N, 128) float32."""
    model = _merge(graphdef, params, batch_stats)
    found = model.encoder(x)
    return found, model.head(found)


def encoder_structure(name: str, dtype: DTypeLike = jnp.float32) -> nnx.GraphDef:
    """The static part of the encoder alone, which `features` runs."""
    encoder = nnx.eval_shape(lambda: build_resnet(name, dtype))
    return nnx.split(encoder, nnx.Param, nnx.BatchStat)[0]


def features(graphdef: nnx.GraphDef, params: Tree, batch_stats: Tree, x: jax.Array) -> jax.Array:
    """Runs the encoder on its running statistics: (N, H, W, 3) to (N, d) float32.

    `graphdef` is of `encoder_structure`; the trees may lack the projection, as imported ones do.
    """
    return _merge(graphdef, params["encoder"], batch_stats["encoder"])(x)


def trained_features(
    graphdef: nnx.GraphDef, params: Tree, batch_stats: Tree, x: jax.Array
) -> tuple[jax.Array, Tree]:
    """As `features`, BatchNorm by the batch (training mode), and the batch_stats after it."""
    encoder = _merge(graphdef, params["encoder"], batch_stats["encoder"])
    found = encoder(x, train=True)
    return found, {"encoder": nnx.to_pure_dict(nnx.state(encoder, nnx.BatchStat))}


def stage_features(
    graphdef: nnx.GraphDef, params: Tree, batch_stats: Tree, x: jax.Array, stage: int
) -> jax.Array:
    """As `features`, of the map that stage 1, 2, 3 or 4 gives: (N, H, W, 3) to (N, width)."""
    maps = _merge(graphdef, params["encoder"], batch_stats["encoder"]).maps(x)
    return maps[stage].astype(jnp.float32).mean((1, 2))


def _merge(graphdef: nnx.GraphDef, params: Tree, batch_stats: Tree) -> Any:
    # copy=True: without it BatchNorm's update under `grad` raises TraceContextError.
    return nnx.merge(graphdef, nnx.State(params), nnx.State(batch_stats), copy=True)


def _linear(width_in: int, width: int) -> nnx.Linear:
    return nnx.Linear(
        width_in,
        width,
        kernel_init=nnx.initializers.zeros_init(),
        precision=jax.lax.Precision.HIGHEST,  # as float32 as the logits it feeds
        rngs=nnx.Rngs(0),
    )
