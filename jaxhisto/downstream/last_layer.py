"""Last-layer training on frozen features, as the paper does it (sec. 4.2): one compiled scan.

Adam with weight decay as an L2 term of the gradient (PyTorch's `Adam(weight_decay=)`), batches of
128, 100 epochs, and of these the one with the best validation score.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxhisto.models.initial import as_torchvision

BETA1, BETA2, EPSILON = 0.9, 0.999, 1e-8  # PyTorch's defaults

Tree = dict[str, Any]


@dataclass(frozen=True)
class Training:
    """Settings of a training: see `ProbeConfig`."""

    epochs: int = 100
    batch: int = 128
    rate: float = 1e-3
    weight_decay: float = 1e-5
    seed: int = 0


@dataclass(frozen=True)
class Trained:
    """The chosen layer.

    Fields:
      weights: (d, C) float32; bias: (C,).
      epoch: at whose end it was chosen, from 1.
      scores: the validation score at the end of each epoch, higher is better.
    """

    weights: np.ndarray
    bias: np.ndarray
    epoch: int
    scores: list[float]

    def __call__(self, x: np.ndarray) -> np.ndarray:
        """(n, d) to (n, C) float64."""
        product = np.asarray(x, np.float64) @ self.weights.astype(np.float64)
        return np.asarray(product + self.bias)


def train(
    x: np.ndarray,
    y: np.ndarray,
    outputs: int,
    score: Callable[[Callable[[np.ndarray], np.ndarray]], float],
    settings: Training,
) -> Trained:
    """Trains a linear layer and keeps the epoch that scores best; of equals the first.

    Args:
      x: (n, d) features.
      y: (n,) int labels, trained by cross-entropy; or (n, outputs) floats, by the squared error.
      outputs: C.
      score: of a function (m, d) -> (m, C), on the validation rows.

    Returns:
      The layer, a function of the arguments alone. Fewer rows than a batch are one batch.
    """
    rng = np.random.default_rng(settings.seed)
    start = as_torchvision(_shapes(x.shape[1], outputs), rng)
    order, mask = batch_order(len(x), settings, rng)
    labels = jnp.asarray(y, jnp.int32 if y.ndim == 1 else jnp.float32)
    layers = _epochs(
        start, jnp.asarray(x, jnp.float32), labels, order, mask,
        jnp.float32(settings.rate), jnp.float32(settings.weight_decay),
    )  # fmt: skip
    kernels, biases = (np.asarray(layers[name]) for name in ("kernel", "bias"))
    candidates = [
        Trained(w, b, epoch, [])
        for epoch, (w, b) in enumerate(zip(kernels, biases, strict=True), 1)
    ]
    scores = [score(layer) for layer in candidates]
    best = candidates[int(np.argmax(scores))]
    return Trained(best.weights, best.bias, best.epoch, scores)


def batch_order(
    n: int, settings: Training, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Rows of each batch (epochs, batches, B) int32, and 1 where a row counts, float32.

    Each epoch is a permutation; its last batch is smaller where n does not divide, filled up with
    rows that do not count.
    """
    size = min(settings.batch, n)
    batches = -(-n // size)
    order = np.zeros((settings.epochs, batches * size), np.int32)
    for epoch in range(settings.epochs):
        order[epoch, :n] = rng.permutation(n)
    mask = (np.arange(batches * size) < n).astype(np.float32)
    return order.reshape(-1, batches, size), mask.reshape(batches, size)


@jax.jit
def _epochs(
    layer: Tree,
    x: jax.Array,
    y: jax.Array,
    order: jax.Array,
    mask: jax.Array,
    rate: jax.Array,
    decay: jax.Array,
) -> Tree:
    """The layer after each epoch, stacked."""
    zeros = jax.tree.map(jnp.zeros_like, layer)

    def step(state: Any, batch: Any) -> tuple[Any, None]:
        layer, first, second, count = state
        rows, counts = batch
        grads = jax.grad(_loss)(layer, x[rows], y[rows], counts)
        grads = jax.tree.map(lambda g, w: g + decay * w, grads, layer)
        count = count + jnp.float32(1)
        first = jax.tree.map(lambda m, g: BETA1 * m + (1 - BETA1) * g, first, grads)
        second = jax.tree.map(lambda v, g: BETA2 * v + (1 - BETA2) * g * g, second, grads)
        low = 1 - jnp.float32(BETA1) ** count
        high = jnp.sqrt(1 - jnp.float32(BETA2) ** count)
        layer = jax.tree.map(
            lambda w, m, v: w - rate / low * m / (jnp.sqrt(v) / high + EPSILON),
            layer, first, second,
        )  # fmt: skip
        return (layer, first, second, count), None

    def epoch(state: Any, rows: jax.Array) -> tuple[Any, Tree]:
        state, _ = jax.lax.scan(step, state, (rows, mask))
        return state, state[0]

    return jax.lax.scan(epoch, (layer, zeros, zeros, jnp.float32(0)), order)[1]


def _loss(layer: Tree, x: jax.Array, y: jax.Array, counts: jax.Array) -> jax.Array:
    """Mean over the rows that count: cross-entropy of labels, squared error of numbers."""
    product = jnp.matmul(x, layer["kernel"], precision=jax.lax.Precision.HIGHEST)
    out = product + layer["bias"][None]
    if y.ndim == 1:
        chosen = jnp.take_along_axis(out, y[:, None], axis=1)[:, 0]
        each = jax.nn.logsumexp(out, axis=1) - chosen
    else:
        each = ((out - y) ** 2).mean(1)
    return (each * counts).sum() / counts.sum()


def _shapes(width: int, outputs: int) -> Tree:
    return {
        "kernel": jax.ShapeDtypeStruct((width, outputs), np.float32),
        "bias": jax.ShapeDtypeStruct((outputs,), np.float32),
    }
