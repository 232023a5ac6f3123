"""NT-Xent, the contrastive loss of SimCLR, and what it says about the embedding."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

EPSILON = 1e-12


def nt_xent(z: jax.Array, temperature: float) -> tuple[jax.Array, dict[str, jax.Array]]:
    """NT-Xent over the global batch (Chen et al. 2020, eq. 1), on cosine similarity.

    Args:
      z: (N, 2, D) float32, the two projections of each image, of any length; N may be sharded.
      temperature: tau, unitless; the paper's best value is 0.1 (Table C.6).

    Returns:
      () float32, mean over the 2N anchors, each against 2N - 1 others; and the metrics
      `pos_sim` and `neg_sim` (mean cosine of positives and of negatives, -1..1) and
      `accuracy` (share of anchors whose nearest other view is their positive, 0..1).
    """
    similarity = cosines(everywhere(z))
    n = similarity.shape[0]
    rows = jnp.arange(n)
    is_self = jnp.eye(n, dtype=bool)
    # The views of an image are neighbours, 2i and 2i + 1, so the positive of r is r with its
    # last bit flipped.
    is_positive = rows[None, :] == (rows ^ 1)[:, None]
    others = jnp.where(is_self, -jnp.inf, similarity)
    positive = jnp.where(is_positive, similarity, 0.0).sum(1)
    loss = (jax.nn.logsumexp(others / temperature, axis=1) - positive / temperature).mean()

    negatives = jnp.where(is_self | is_positive, 0.0, similarity).sum()
    metrics = {
        "pos_sim": positive.mean(),
        "neg_sim": negatives / max(n * (n - 2), 1),
        "accuracy": (others.max(1) <= positive).astype(jnp.float32).mean(),
    }
    return loss, jax.tree.map(jax.lax.stop_gradient, metrics)


def everywhere(z: jax.Array) -> jax.Array:
    """All of z on each device: the step's one all-gather, and its only exchange of samples."""
    return z if jax.sharding.get_abstract_mesh().empty else jax.reshard(z, P())


def cosines(z: jax.Array) -> jax.Array:
    """(N, 2, D) to (2N, 2N) cosine similarities, rows in the order image, view."""
    z = z.reshape(-1, z.shape[-1])
    # sqrt has no gradient at 0; the maximum keeps a zero vector at length 0.
    length = jnp.sqrt(jnp.maximum((z * z).sum(1, keepdims=True), EPSILON**2))
    unit = z / length
    # HIGHEST: an accelerator's default would round the logits, divided by tau, at 1e-2.
    return jnp.matmul(unit, unit.T, precision=jax.lax.Precision.HIGHEST)
