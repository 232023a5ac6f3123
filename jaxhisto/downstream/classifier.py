"""An encoder with a linear layer on it, as a `Learner`: what is trained, and by what it is judged.

Classes are learnt by cross-entropy, numbers by the squared error of standardised targets.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
from numpy.typing import NDArray
from scipy.special import softmax

from jaxhisto.config import ModelConfig
from jaxhisto.downstream.encoders import Encoder
from jaxhisto.downstream.learner import Learner, Tree
from jaxhisto.models import resnet, simclr
from jaxhisto.models.initial import as_torchvision
from jaxhisto.pretrain.step import DTYPES, normalise
from jaxhisto.probes import macro_f1

Freeze = Literal["none", "bn", "encoder"]
Features = Callable[[Tree, Tree, jax.Array], tuple[jax.Array, Tree]]


@dataclass(frozen=True)
class Targets:
    """What is predicted.

    Fields:
      classes: how many; 0 of a regression.
      mean, deviation: of a regression's training targets, in their unit.
    """

    classes: int
    mean: float = 0.0
    deviation: float = 1.0

    @property
    def outputs(self) -> int:
        """Of the linear layer."""
        return self.classes or 1

    def scaled(self, values: NDArray[Any]) -> NDArray[Any]:
        """As the layer is trained on: labels int32, or standardised targets float32; (n,)."""
        if self.classes:
            return values.astype(np.int32)
        return ((values - self.mean) / self.deviation).astype(np.float32)

    def predictions(self, outputs: NDArray[np.float32]) -> NDArray[np.float64]:
        """Outputs (n, C) as probabilities (n, C), or as numbers (n,) in the targets' unit."""
        wide = np.asarray(outputs, np.float64)
        if self.classes:
            return np.asarray(softmax(wide, axis=1))
        return wide[:, 0] * self.deviation + self.mean


def targets_of(values: NDArray[Any], classes: int) -> Targets:
    """By the training images' labels, or targets (n,); equal targets get deviation 1."""
    if classes:
        return Targets(classes)
    return Targets(0, float(values.mean()), float(values.std()) or 1.0)


def learner_of(
    encoder: Encoder, targets: Targets, freeze: Freeze, precision: str, seed: int
) -> Learner:
    """The encoder's weights, a new last layer, and what to do with them.

    The layer is drawn as torch.nn.Linear's, from the seed; `probe` draws the same one.

    Args:
      encoder: with weights.
      targets: what the outputs stand for.
      freeze: see `FinetuneConfig`.
      precision: `f32` or `bf16`, of the convolutions in training; they are float32 in evaluation.
      seed: of the new layer.
    """
    params: Tree = {"head": new_head(encoder.width(), targets.outputs, seed)}
    weights: Tree = {"encoder": encoder.params["encoder"]}
    stats: Tree = {"encoder": encoder.batch_stats["encoder"]}
    fixed: Tree = {}
    if freeze == "encoder":
        # Apart from `params`: no gradient of them is taken, and no optimizer state kept.
        fixed, stats = {"params": weights, "stats": stats}, {}
    else:
        params |= weights
    train, evaluate = _features(encoder, freeze, precision)

    def feed(params: Tree, stats: Tree, fixed: Tree) -> tuple[Tree, Tree]:
        return (fixed["params"], fixed["stats"]) if freeze == "encoder" else (params, stats)

    def loss_of(
        params: Tree, stats: Tree, fixed: Tree, images: jax.Array, wanted: jax.Array
    ) -> tuple[jax.Array, Tree]:
        found, after = train(*feed(params, stats, fixed), images)
        losses = losses_of(linear(params["head"], found), wanted)
        return losses, stats if freeze == "encoder" else after

    def outcome_of(
        params: Tree, stats: Tree, fixed: Tree, images: jax.Array, wanted: jax.Array
    ) -> dict[str, jax.Array]:
        found, _ = evaluate(*feed(params, stats, fixed), images)
        outputs = linear(params["head"], found)
        return {"outputs": outputs, "targets": wanted, "losses": losses_of(outputs, wanted)}

    def score(found: dict[str, NDArray[Any]]) -> dict[str, float]:
        return validation_score(found, targets)

    return Learner(params, stats, loss_of, outcome_of, score, fixed)


def new_head(width: int, outputs: int, seed: int) -> Tree:
    """A linear layer {kernel (d, C), bias (C,)}, float32."""
    shapes = {
        "kernel": jax.ShapeDtypeStruct((width, outputs), np.float32),
        "bias": jax.ShapeDtypeStruct((outputs,), np.float32),
    }
    return as_torchvision(shapes, np.random.default_rng(seed))


def linear(head: Tree, features: jax.Array) -> jax.Array:
    """(N, d) to (N, C), float32 on accelerators too."""
    product = jnp.matmul(features, head["kernel"], precision=jax.lax.Precision.HIGHEST)
    return product + head["bias"][None]


def losses_of(outputs: jax.Array, wanted: jax.Array) -> jax.Array:
    """(N, C) outputs and (N,) -> (N,): cross-entropy of int32 labels, squared error of float32."""
    if jnp.issubdtype(wanted.dtype, jnp.integer):
        return optax.softmax_cross_entropy_with_integer_labels(outputs, wanted)
    return (outputs[:, 0] - wanted) ** 2


def validation_score(found: dict[str, NDArray[Any]], targets: Targets) -> dict[str, float]:
    """The paper's: macro F1, or the mean absolute error, of which less is more."""
    loss = float(found["losses"].mean(dtype=np.float64))
    outputs = found["outputs"]
    if not np.isfinite(outputs).all():  # of which the largest would be taken for a class
        return {"score": float("nan"), "loss": loss}
    if targets.classes:
        f1 = macro_f1(found["targets"], outputs)
        right = float((outputs.argmax(1) == found["targets"]).mean())
        return {"score": f1, "macro_f1": f1, "accuracy": right, "loss": loss}
    errors = np.abs(outputs[:, 0].astype(np.float64) - found["targets"])
    mae = float(errors.mean() * targets.deviation)
    return {"score": -mae, "mae": mae, "loss": loss}


def trained_encoder(encoder: Encoder, params: Tree, batch_stats: Tree) -> tuple[Tree, Tree]:
    """(params, batch_stats) of the encoder after training: a frozen one's are what they were."""
    if "encoder" in params:
        return {"encoder": params["encoder"]}, {"encoder": batch_stats["encoder"]}
    return {"encoder": encoder.params["encoder"]}, {"encoder": encoder.batch_stats["encoder"]}


def _features(encoder: Encoder, freeze: Freeze, precision: str) -> tuple[Features, Features]:
    """Images in 0..1 to features (N, d) float32 and the statistics: in training, in evaluation."""
    assert encoder.arch in resnet.BLOCKS
    model = ModelConfig(encoder.arch, mean=encoder.mean, std=encoder.std)  # type: ignore[arg-type]
    lean, exact = (simclr.encoder_structure(encoder.arch, DTYPES[p]) for p in (precision, "f32"))

    def evaluate(params: Tree, stats: Tree, images: jax.Array) -> tuple[jax.Array, Tree]:
        return simclr.features(exact, params, stats, normalise(images, model)), stats

    def kept(params: Tree, stats: Tree, images: jax.Array) -> tuple[jax.Array, Tree]:
        return simclr.features(lean, params, stats, normalise(images, model)), stats

    def train(params: Tree, stats: Tree, images: jax.Array) -> tuple[jax.Array, Tree]:
        return simclr.trained_features(lean, params, stats, normalise(images, model))

    return (train if freeze == "none" else kept), evaluate
