"""NT-Xent, the contrastive loss of SimCLR, and what it says about the embedding."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxhisto.pretrain.chunked_loss import PRECISION, Metrics, chunked_nt_xent, everywhere

EPSILON = 1e-12


def nt_xent(z: jax.Array, temperature: float, chunk: int = 0) -> tuple[jax.Array, Metrics]:
    """NT-Xent over the global batch (Chen et al. 2020, eq. 1), on cosine similarity.

    Args:
      z: (N, 2, D) float32, the two projections of each image, of any length; N may be sharded.
      temperature: tau, unitless; the paper's best value is 0.1 (Table C.6).
      chunk: 0 holds the (2N, 2N) similarities on each device; else so many columns of them at
        a time, of the device's own rows: the same to float32's rounding, in linear memory.

    Returns:
      () float32, mean over the 2N anchors, each against 2N - 1 others; and the metrics
      `pos_sim` and `neg_sim` (mean cosine of positives and of negatives, -1..1) and
      `accuracy` (share of anchors whose nearest other view is their positive, 0..1).
    """
    if chunk:
        return chunked_nt_xent(unit_rows(z), temperature, chunk)
    # The step's one all-gather, and its only exchange of samples.
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
        "neg_sim": negatives / max(float(n * (n - 2)), 1.0),  # no int32 at N = 65,536
        "accuracy": (others.max(1) <= positive).astype(jnp.float32).mean(),
    }
    return loss, jax.tree.map(jax.lax.stop_gradient, metrics)


def cosines(z: jax.Array) -> jax.Array:
    """(N, 2, D) to (2N, 2N) cosine similarities, rows in the order image, view."""
    unit = unit_rows(z)
    return jnp.matmul(unit, unit.T, precision=PRECISION)


def unit_rows(z: jax.Array) -> jax.Array:
    """(N, 2, D) to (2N, D) rows of length 1, in the order image, view; a zero one stays zero."""
    z = z.reshape(-1, z.shape[-1])
    # sqrt has no gradient at 0; the maximum keeps a zero vector at length 0.
    length = jnp.sqrt(jnp.maximum((z * z).sum(1, keepdims=True), EPSILON**2))
    return z / length
