"""The stem's max-pool, with a gradient that needs little memory and no scatter."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx


@jax.custom_vjp
def max_pool(x: jax.Array) -> jax.Array:
    """3x3 maximum at stride 2 with one pixel of padding on each side, as torchvision's stem.

    (N, H, W, C) to (N, ceil(H/2), ceil(W/2), C). Where several pixels of a window are the
    largest, the first in reading order gets the gradient, as in PyTorch.

    The gradient is a rule of its own, which JAX cannot differentiate forwards: `jax.jvp`,
    `jax.jacfwd` and forward-over-reverse raise a TypeError, inside `convolutions("plain")` too;
    `nnx.max_pool` with these windows is what they take.
    """
    return nnx.max_pool(x, (3, 3), strides=(2, 2), padding=((1, 1), (1, 1)))


def _forward(x: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    y = max_pool(x)
    return y, (x, y)


def _backward(kept: tuple[jax.Array, jax.Array], slope: jax.Array) -> tuple[jax.Array]:
    """Each window's slope to its first largest pixel, one place of the window at a time.

    XLA's own gradient (select-and-scatter) is expanded on CPU and GPU into four int32 indices a
    pixel and a scatter: more memory than any block takes.
    """
    x, y = kept
    height, width = x.shape[1:3]
    tall, wide = 2 * y.shape[1] + 1, 2 * y.shape[2] + 1  # what the windows cover
    low, zero = jnp.array(-jnp.inf, x.dtype), jnp.array(0, slope.dtype)
    edges = ((0, 0, 0), (1, tall - height - 1, 0), (1, wide - width - 1, 0), (0, 0, 0))
    padded = jax.lax.pad(x, low, edges)
    total = free = None
    for i in range(3):
        for j in range(3):
            largest = padded[:, i : i + tall - 2 : 2, j : j + wide - 2 : 2] == y
            first = largest if free is None else largest & free
            free = ~largest if free is None else free & ~largest
            spread = ((0, 0, 0), (i, 2 - i, 1), (j, 2 - j, 1), (0, 0, 0))
            part = jax.lax.pad(jnp.where(first, slope, zero), zero, spread)
            total = part if total is None else total + part
    assert total is not None
    return (total[:, 1 : 1 + height, 1 : 1 + width],)


max_pool.defvjp(_forward, _backward)
