"""Work on some images at a time, so that what is made in between stays in a core's cache."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp


def in_chunks(
    part: Callable[..., jax.Array], arrays: Sequence[jax.Array], rows: float
) -> jax.Array:
    """`part` of about `rows` consecutive rows at a time, the results behind one another.

    Args:
      part: (r, ...) of each array to (r, ...), each row for itself.
      arrays: (N, ...) each, the whole of them on one device.
      rows: as many as N has divisors for, the nearest as a ratio.
    """
    n, some = arrays[0].shape[0], nearest_divisor(arrays[0].shape[0], rows)
    if some == n:
        return part(*arrays)
    out = jax.lax.map(lambda cut: part(*cut), _cut(arrays, some))
    return out.reshape(n, *out.shape[2:])


def sum_of_chunks(
    part: Callable[..., jax.Array], arrays: Sequence[jax.Array], rows: float
) -> jax.Array:
    """As `in_chunks`, for a `part` whose results are to be added up: of all rows, their sum."""
    n, some = arrays[0].shape[0], nearest_divisor(arrays[0].shape[0], rows)
    if some == n:
        return part(*arrays)
    cut = _cut(arrays, some)
    shape = jax.eval_shape(part, *(array[0] for array in cut))
    zeros = jnp.zeros(shape.shape, shape.dtype) + nothing(arrays[0])
    total, _ = jax.lax.scan(lambda total, some: (total + part(*some), None), zeros, cut)
    return total


def nothing(x: jax.Array) -> jax.Array:
    """() 0 that varies between devices, inside `jax.shard_map`, where `x` does."""
    return x.ravel()[:0].sum()


def nearest_divisor(n: int, wanted: float) -> int:
    """The divisor of n whose ratio to `wanted` is nearest to 1."""
    divisors = [d for d in range(1, n + 1) if n % d == 0]
    return min(divisors, key=lambda d: max(d / wanted, wanted / d))


def _cut(arrays: Sequence[jax.Array], rows: int) -> tuple[jax.Array, ...]:
    return tuple(a.reshape(a.shape[0] // rows, rows, *a.shape[1:]) for a in arrays)
