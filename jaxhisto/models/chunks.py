"""Work on some images at a time, so that what is made in between stays in a core's cache."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

FAR = 4.0
"""From so many times more or fewer rows than were wanted, rows of zeros are put behind instead."""


def in_chunks(
    part: Callable[..., jax.Array], arrays: Sequence[jax.Array], rows: float
) -> jax.Array:
    """`part` of about `rows` consecutive rows at a time, the results behind one another.

    Args:
      part: (r, ...) of each array to (r, ...), each row for itself.
      arrays: (N, ...) each, the whole of them on one device.
      rows: see `rows_of_chunk`.
    """
    n = arrays[0].shape[0]
    some = rows_of_chunk(n, rows)
    if some == n:
        return part(*arrays)
    out = jax.lax.map(lambda cut: part(*cut), _cut(arrays, some))
    return out.reshape(-1, *out.shape[2:])[:n]


def sum_of_chunks(
    part: Callable[..., jax.Array], arrays: Sequence[jax.Array], rows: float
) -> jax.Array:
    """As `in_chunks`, for a `part` whose results are to be added up: of all rows, their sum.

    Rows of zeros must add nothing to it.
    """
    n = arrays[0].shape[0]
    some = rows_of_chunk(n, rows)
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


def rows_of_chunk(n: int, wanted: float) -> int:
    """Rows of each chunk of n: a divisor, or where none is near (2 x a prime), about `wanted`."""
    some = nearest_divisor(n, wanted)
    if max(some / wanted, wanted / some) < FAR or wanted >= n:
        return some
    return math.ceil(n / math.ceil(n / wanted))


def nearest_divisor(n: int, wanted: float) -> int:
    """The divisor of n whose ratio to `wanted` is nearest to 1."""
    divisors = [d for d in range(1, n + 1) if n % d == 0]
    return min(divisors, key=lambda d: max(d / wanted, wanted / d))


def _cut(arrays: Sequence[jax.Array], rows: int) -> tuple[jax.Array, ...]:
    """(N, ...) to (chunks, rows, ...), with rows of zeros behind where N is no multiple."""
    missing = -arrays[0].shape[0] % rows
    if missing:
        arrays = [
            jax.lax.pad(a, jnp.zeros((), a.dtype), ((0, missing, 0), *[(0, 0, 0)] * (a.ndim - 1)))
            for a in arrays
        ]
    return tuple(a.reshape(a.shape[0] // rows, rows, *a.shape[1:]) for a in arrays)
