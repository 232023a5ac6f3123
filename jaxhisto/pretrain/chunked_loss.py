"""NT-Xent in linear memory: a log-sum-exp over chunks of columns, with its own gradient.

No device holds the 2N x 2N similarities. Each owns the anchors of its images and goes through
all views a chunk at a time; going back it computes each block again instead of keeping it, as
flash attention does (Dao et al. 2022). The similarity is symmetric, so with every anchor's
log-sum-exp at hand the gradient of a device's own rows needs nothing from the others:
du_i ~ sum_j (p_ij + p_ji) u_j, where p_ij is the softmax of row i. That is also one matrix
product a block where autodiff takes two, which pays for computing the block again.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

Metrics = dict[str, jax.Array]


def chunked_nt_xent(unit: jax.Array, temperature: float, chunk: int) -> tuple[jax.Array, Metrics]:
    """What `loss.nt_xent` returns, from rows of length 1, in memory linear in N.

    Args:
      unit: (2N, D) float32, the projections over their lengths, in the order image, view.
      temperature: tau, a Python number.
      chunk: columns at a time, at least 1; a device holds blocks of (own rows, chunk) float32.

    Returns:
      () float32, the loss, and the metrics. Only the loss has a gradient, by reverse mode and
      once; a cotangent of a metric is ignored.
    """
    return _nt_xent(_sharded(unit), temperature, chunk)


@partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _nt_xent(unit: jax.Array, temperature: float, chunk: int) -> tuple[jax.Array, Metrics]:
    return _forward(unit, temperature, chunk)[0]


class _Rows(NamedTuple):
    """What is known of each row, (rows,) float32: log-sum-exp = top / tau + log(total).

    The two parts are kept apart: their sum would round at 1/tau, and p_ij with it.
    """

    top: jax.Array  # largest cosine with another view
    total: jax.Array  # sum over the other views of exp((cosine - top) / tau)
    positive: jax.Array  # cosine with the other view of the same image


def _forward(unit: jax.Array, temperature: float, chunk: int) -> tuple[tuple, tuple]:
    n = unit.shape[0]
    index = _sharded(jnp.arange(n))
    everyone = everywhere(unit)  # the step's one all-gather of samples
    own = _on_own_rows(partial(_row_statistics, temperature=temperature, chunk=chunk), 2)(
        unit, index, everyone
    )
    # The second exchange, of (2N, 3) float32. It gives each device every log-sum-exp, which the
    # backward needs, and the same sums in the same order, which saves an all-reduce.
    rows = _Rows(*everywhere(jnp.stack(own, axis=1)).T)
    loss = ((rows.top - rows.positive) / temperature + jnp.log(rows.total)).mean()
    # The sum over all pairs is the square of the sum's length: no need of the pairs.
    pairs = (everyone.sum(0) ** 2).sum() - (everyone * everyone).sum() - rows.positive.sum()
    metrics = {
        "pos_sim": rows.positive.mean(),
        "neg_sim": pairs / max(float(n * (n - 2)), 1.0),  # no int32 at N = 65,536
        "accuracy": (rows.top <= rows.positive).astype(jnp.float32).mean(),
    }
    return (loss, metrics), (unit, own, everyone, rows)


def _backward(temperature: float, chunk: int, saved: tuple, cotangents: tuple) -> tuple[jax.Array]:
    unit, own, everyone, rows = saved
    n = unit.shape[0]
    gradient = _on_own_rows(partial(_row_gradient, temperature=temperature, chunk=chunk), 3)(
        unit, _sharded(jnp.arange(n)), own, everyone, rows
    )
    return (gradient * (cotangents[0] / (temperature * n)),)


_nt_xent.defvjp(_forward, _backward)


def everywhere(rows: jax.Array) -> jax.Array:
    """All rows on each device; where no mesh is set there is one."""
    return rows if jax.sharding.get_abstract_mesh().empty else jax.reshard(rows, P())


def _sharded(rows: jax.Array) -> jax.Array:
    """Rows sharded over `data`: nothing moves, as rows of views are so or on each device."""
    return rows if jax.sharding.get_abstract_mesh().empty else jax.reshard(rows, P("data"))


def _on_own_rows(function: Callable, sharded: int) -> Callable:
    """Runs a function on each device's rows.

    Its first `sharded` arguments and its result are sharded over `data`, the others whole.
    """
    if jax.sharding.get_abstract_mesh().empty:
        return function

    def run(*args: Any) -> Any:
        specs = (P("data"),) * sharded + (P(),) * (len(args) - sharded)
        return jax.shard_map(function, in_specs=specs, out_specs=P("data"))(*args)

    return run


def _row_statistics(
    own: jax.Array, index: jax.Array, everyone: jax.Array, *, temperature: float, chunk: int
) -> _Rows:
    """One pass over all columns for the rows `own`, which are rows `index` of `everyone`."""

    def add(so_far: _Rows, block: _Block) -> _Rows:
        others = jnp.where(block.hidden, -jnp.inf, block.similarity)
        top = jnp.maximum(so_far.top, others.max(1))
        total = so_far.total * jnp.exp((so_far.top - top) / temperature)
        total += jnp.exp((others - top[:, None]) / temperature).sum(1)
        # Read from the block, not from the two rows: a tie with a negative must stay a tie.
        positive = jnp.where(block.is_positive, block.similarity, 0.0).sum(1)
        return _Rows(top, total, so_far.positive + positive)

    zero = jnp.zeros_like(own[:, 0])
    # No cosine is as low as -2, and unlike -inf it has a difference with itself.
    return _over_blocks(add, _Rows(zero - 2.0, zero, zero), own, index, everyone, chunk)


def _row_gradient(
    unit: jax.Array,
    index: jax.Array,
    own: _Rows,
    everyone: jax.Array,
    rows: _Rows,
    *,
    temperature: float,
    chunk: int,
) -> jax.Array:
    """(R, D): 2N tau times the loss's gradient by the rows `unit`, wherever they stand."""

    def add(so_far: jax.Array, block: _Block) -> jax.Array:
        def probability(top: jax.Array, total: jax.Array) -> jax.Array:
            return jnp.exp((block.similarity - top) / temperature) * (1 / total)

        top, total = block.of(rows.top), block.of(rows.total)
        p_ij = probability(own.top[:, None], own.total[:, None])
        p_ji = probability(top[None, :], total[None, :])
        weights = jnp.where(block.hidden, 0.0, p_ij + p_ji) - jnp.where(block.is_positive, 2.0, 0.0)
        return so_far + jnp.matmul(weights, block.of(everyone), precision=PRECISION)

    return _over_blocks(add, jnp.zeros_like(unit), unit, index, everyone, chunk)


# HIGHEST: an accelerator's default would round the logits, divided by tau, at 1e-2.
PRECISION = jax.lax.Precision.HIGHEST


class _Block(NamedTuple):
    """Cosines of a device's rows with a chunk of columns, and what to make of them."""

    similarity: jax.Array  # (R, C) float32
    hidden: jax.Array  # (R, C) bool: not another view, or counted in an earlier block
    is_positive: jax.Array  # (R, C) bool, never of what an earlier block counted
    of: Callable[[jax.Array], jax.Array]  # what belongs to these columns of an array of all rows


def _over_blocks(
    add: Callable[[Any, _Block], Any],
    start: Any,
    own: jax.Array,
    index: jax.Array,
    everyone: jax.Array,
    chunk: int,
) -> Any:
    """Folds `add` over the blocks of `chunk` columns, one after the other."""
    n = everyone.shape[0]
    width = min(chunk, n)

    def step(so_far: Any, k: jax.Array) -> tuple[Any, None]:
        # Where the width does not divide n the last block begins early, and hides what it shares
        # with the one before it: no copy of all rows for a padding.
        first = jnp.minimum(k * width, n - width)
        of = partial(jax.lax.dynamic_slice_in_dim, start_index=first, slice_size=width)
        column = (first + jnp.arange(width))[None, :]
        row, seen = index[:, None], column < k * width
        # The views of an image are neighbours: the positive of r is r with its last bit flipped.
        block = _Block(
            similarity=jnp.matmul(own, of(everyone).T, precision=PRECISION),
            hidden=(column == row) | seen,
            is_positive=(column == row ^ 1) & ~seen,
            of=of,
        )
        return add(so_far, block), None

    return jax.lax.scan(step, start, jnp.arange(-(-n // width)))[0]
