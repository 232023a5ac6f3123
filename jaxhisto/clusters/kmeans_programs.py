"""The compiled programs of k-means: nearest centres, sums of clusters, mini-batches, seeds."""

from __future__ import annotations

import math
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from numpy.typing import NDArray

Floats = NDArray[np.float32]
Pair = tuple[jax.Array, jax.Array]
EXACT = jax.lax.Precision.HIGHEST  # TF32 would move rows between clusters

BLOCK = 1024  # rows of one product
BATCH = 4096  # rows of a mini-batch


def padded_k(k: int) -> int:
    """Centres of a compiled program for k: up to an eighth more, so that few k's need their own."""
    step = 1 << max(0, k.bit_length() - 4)
    return max(64, -(-k // step) * step)


class Stepper:
    """The compiled programs, and rows brought to the devices in one shape."""

    def __init__(self, mesh: Mesh, k: int, width: int) -> None:
        devices = mesh.devices.size
        self.rows = math.ceil(BATCH / (BLOCK * devices)) * BLOCK * devices
        self._whole = NamedSharding(mesh, P())
        self._k = np.int32(k)
        programs = _programs(mesh, padded_k(k))
        self._nearest, self._sums, self._step, self._add = programs

    def put(self, array: np.ndarray) -> jax.Array:
        """The array on every device."""
        return jax.device_put(array, self._whole)

    def padded(self, rows: Floats) -> jax.Array:
        """Up to `self.rows` rows, zeros below them, on every device."""
        if len(rows) < self.rows:
            full = np.zeros((self.rows, rows.shape[1]), np.float32)
            full[: len(rows)] = rows
            rows = full
        return self.put(rows)

    def nearest(self, rows: jax.Array, centres: jax.Array) -> Pair:
        """Labels and squared distances; see `_nearest`."""
        return self._nearest(rows, centres, self._k)

    def sums(self, rows: jax.Array, labels: jax.Array, held: int) -> Pair:
        """Sums and counts of the first `held` rows by label."""
        return self._sums(rows, labels, np.int32(held))

    def add(self, a: Pair, b: Pair) -> Pair:
        """Sum by sum."""
        return self._add(a, b)

    def step(
        self, centres: jax.Array, counts: jax.Array, rows: jax.Array, held: int, keep: float
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """A mini-batch; see `_step`."""
        return self._step(centres, counts, rows, self._k, np.int32(held), np.float32(keep))


@cache
def _programs(mesh: Mesh, size: int) -> tuple[Any, Any, Any, Any]:
    """`_nearest`, `_sums`, `_step` and an addition, compiled once for all k of one padded size."""
    # Atomic additions of a GPU's scatter come in any order; a product does not.
    scatter = mesh.devices.flat[0].platform == "cpu"
    return (
        jax.jit(partial(_nearest, mesh)),
        jax.jit(partial(_sums, size, scatter)),
        jax.jit(partial(_step, mesh, size, scatter)),
        jax.jit(lambda a, b: jax.tree.map(jnp.add, a, b)),
    )


def _nearest(mesh: Mesh, rows: jax.Array, centres: jax.Array, k: jax.Array) -> Pair:
    """Of (m, d) rows: (m,) int32 nearest of the first k centres, (m,) float32 squared distance."""

    def share(rows: jax.Array, centres: jax.Array, k: jax.Array) -> tuple[jax.Array, jax.Array]:
        number = jnp.arange(len(centres), dtype=jnp.int32)
        half = jnp.where(number < k, 0.5 * (centres * centres).sum(1), jnp.inf)

        def block(rows: jax.Array) -> tuple[jax.Array, jax.Array]:
            score = half[:, None] - jnp.matmul(centres, rows.T, precision=EXACT)
            least = score.min(0)
            # Two plain reductions: XLA's argmin costs as much as the product on a CPU.
            hits = jnp.where(score == least[None], number[:, None], jnp.int32(len(centres)))
            return hits.min(0), 2 * least + (rows * rows).sum(1)

        # A product's rounding depends on its shape: blocks of one size on any number of devices.
        labels, squares = jax.lax.map(block, rows.reshape(-1, BLOCK, rows.shape[1]))
        return labels.reshape(-1), squares.reshape(-1)

    split = jax.shard_map(share, mesh=mesh, in_specs=(P("data"), P(), P()), out_specs=P("data"))
    labels, squares = split(jax.reshard(rows, P("data")), centres, k)
    return jax.reshard(labels, P()), jnp.maximum(jax.reshard(squares, P()), 0.0)


def _sums(
    k: int, scatter: bool, rows: jax.Array, labels: jax.Array, held: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """(k, d) sum and (k,) float32 number of the first `held` rows of each label."""
    labels = jnp.where(jnp.arange(len(labels), dtype=jnp.int32) < held, labels, jnp.int32(k))
    counts = jnp.bincount(labels, length=k + 1)[:k].astype(jnp.float32)
    if scatter:
        return jax.ops.segment_sum(rows, labels, k + 1)[:k], counts
    member = jax.nn.one_hot(labels, k, dtype=jnp.float32)
    return jnp.matmul(member.T, rows, precision=EXACT), counts


def _step(
    mesh: Mesh,
    size: int,
    scatter: bool,
    centres: jax.Array,
    counts: jax.Array,
    rows: jax.Array,
    k: jax.Array,
    held: jax.Array,
    keep: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """A mini-batch: each centre moves to the weighted mean of the rows counted for it.

    Args:
      centres, counts: (size, d) and (size,) float32, of which the first k are centres.
      rows: (m, d), of which the first `held` count.
      keep: share of the earlier counts that still counts.
    """
    labels, squares = _nearest(mesh, rows, centres, k)
    sums, new = _sums(size, scatter, rows, labels, held)
    total = keep * counts + new
    moved = centres + (sums - new[:, None] * centres) / jnp.maximum(total, 1.0)[:, None]
    return moved, total, squares


@partial(jax.jit, static_argnums=(3, 4, 5))
def drawn(
    sample: jax.Array, key: jax.Array, rounds: jax.Array, most: int, each: int, draws: int
) -> jax.Array:
    """(most * each,) int32 rows of the sample, of which the first rounds * each are drawn."""
    s = len(sample)
    squares = (sample * sample).sum(1)

    def one_round(r: jax.Array, state: tuple[jax.Array, jax.Array]):
        chosen, distance = state
        noise = jax.random.gumbel(jax.random.fold_in(key, r), (draws, s))
        # The largest of log p + Gumbel noise are draws without replacement (Vieira 2014).
        found = jax.lax.top_k(jnp.log(distance)[None] + noise, each)[1]
        flat = found.reshape(-1)
        product = jnp.matmul(sample[flat], sample.T, precision=EXACT)
        near = squares[flat][:, None] + squares[None] - 2 * product
        near = jnp.maximum(near, 0.0).reshape(draws, each, s).min(1)
        # Before the first round all distances are one, for equal chances.
        left = jnp.where(r == 0, near, jnp.minimum(near, distance[None]))
        best = jnp.argmin(left.sum(1))
        chosen = jax.lax.dynamic_update_slice(chosen, found[best].astype(jnp.int32), (r * each,))
        return chosen, left[best]

    start = jnp.zeros(most * each, jnp.int32), jnp.ones(s, jnp.float32)
    chosen, _ = jax.lax.fori_loop(jnp.int32(0), rounds, one_round, start)
    return chosen
