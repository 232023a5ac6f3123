"""A UNet as the supervised loop wants it: cross-entropy a pixel, and matrices that count pixels."""

from __future__ import annotations

from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np

from jaxhisto.config import ModelConfig
from jaxhisto.downstream.encoders import Encoder
from jaxhisto.downstream.learner import Learner, Tree
from jaxhisto.downstream.pixel_scores import IGNORED, scores
from jaxhisto.models import unet
from jaxhisto.pretrain.step import DTYPES, normalise


def unet_learner(
    encoder: Encoder, classes: int, seed: int, *, freeze: bool = False, precision: str = "f32"
) -> Learner:
    """A UNet on this encoder, its decoder drawn from the seed.

    Args:
      encoder: weights to start from, and how they want to be fed.
      classes: C.
      seed: of the decoder.
      freeze: the encoder's weights are `fixed`, and in evaluation mode.
      precision: of the convolutions in training; validation is in float32.

    Returns:
      A learner whose outcomes are (N, C, C) int32 matrices of true by predicted class, and whose
      score is macro F1.
    """
    params, stats = unet.init(encoder.arch, classes, seed)
    params["encoder"] = encoder.params["encoder"]
    stats["encoder"] = encoder.batch_stats["encoder"]
    fixed: Tree = {}
    if freeze:
        fixed = {"params": _take(params, "encoder"), "stats": _take(stats, "encoder")}
    train, _, _ = unet.structure(encoder.arch, classes, dtype=DTYPES[precision])
    judge, _, _ = unet.structure(encoder.arch, classes)
    model = feeding(encoder)

    def loss_of(
        params: Tree, stats: Tree, fixed: Tree, images: jax.Array, masks: jax.Array
    ) -> tuple[jax.Array, Tree]:
        whole, running = params | fixed.get("params", {}), stats | fixed.get("stats", {})
        x = normalise(images, model)
        logits, after = unet.apply(train, whole, running, x, train=True, frozen=freeze)
        return pixel_losses(logits, masks), {name: after[name] for name in stats}

    def outcome_of(
        params: Tree, stats: Tree, fixed: Tree, images: jax.Array, masks: jax.Array
    ) -> jax.Array:
        whole, running = params | fixed.get("params", {}), stats | fixed.get("stats", {})
        logits, _ = unet.apply(judge, whole, running, normalise(images, model), train=False)
        return count_pixels(logits, masks)

    return Learner(params, stats, loss_of, outcome_of, score, fixed, masks=True)


def feeding(encoder: Encoder) -> ModelConfig:
    """Mean and deviation of an encoder, as `normalise` takes them."""
    return ModelConfig(cast(Any, encoder.arch), mean=encoder.mean, std=encoder.std)


def pixel_losses(logits: jax.Array, masks: jax.Array) -> jax.Array:
    """(N,) cross-entropy, the mean over an image's pixels that count; 0 where none does.

    Args:
      logits: (N, H, W, C) float32.
      masks: (N, H, W) class ids; `IGNORED` ones do not count.
    """
    likely = jax.nn.log_softmax(logits)
    losses = -jnp.sum(likely * _one_hot(masks, logits.shape[-1]), -1)
    counted = jnp.sum((masks != IGNORED).astype(jnp.float32), (1, 2))
    return jnp.sum(losses, (1, 2)) / jnp.maximum(counted, 1.0)


def count_pixels(logits: jax.Array, masks: jax.Array) -> jax.Array:
    """(N, C, C) int32: each image's pixels by true (row) and predicted class (column)."""
    N, H, W, C = logits.shape
    truth = _one_hot(masks, C).reshape(N, H * W, C)
    found = _one_hot(jnp.argmax(logits, -1), C).reshape(N, H * W, C)
    # Ones and zeros: exact in any precision, and their sums are in float32 up to 2^24.
    counts = jnp.einsum("npt,npf->ntf", truth, found, preferred_element_type=jnp.float32)
    return counts.astype(jnp.int32)


def score(counts: Any) -> dict[str, float]:
    """The scores of all pixels together; `score` is the macro F1."""
    found = scores(np.asarray(counts, np.int64).sum(0))
    return {"score": found["macro_f1"], **found}


def _one_hot(ids: jax.Array, classes: int) -> jax.Array:
    numbers = jnp.arange(classes, dtype=jnp.int32)
    return (ids.astype(jnp.int32)[..., None] == numbers[None, None, None]).astype(jnp.float32)


def _take(tree: Tree, name: str) -> Tree:
    return {name: tree.pop(name)}
