"""3x3 convolutions at stride 1 by Winograd's F(2x2, 3x3), and the gradient of their kernel.

Each 2x2 square of the result takes 16 products of a channel pair where the definition takes 36
(Lavin and Gray 2015, arXiv 1509.09308): the squares' 4x4 surroundings are transformed by B, the
kernel by G, multiplied frequency by frequency as 16 matrix products over the channels, and
transformed back by A. B and A hold 0, 1 and -1 alone and G halves, so that in float32 the result
is as near to the exact one as that of the definition; larger squares would save more and are not.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from jaxhisto.models.chunks import in_chunks, sum_of_chunks

Row = tuple[float, ...]

B: tuple[Row, ...] = ((1, 0, -1, 0), (0, 1, 1, 0), (0, -1, 1, 0), (0, 1, 0, -1))
G: tuple[Row, ...] = ((1, 0, 0), (0.5, 0.5, 0.5), (0.5, -0.5, 0.5), (0, 0, 1))
A: tuple[Row, ...] = ((1, 1, 1, 0), (0, 1, -1, -1))

CHUNK_BYTES = 2 << 20
"""What the transformed images of one go take: in a core's nearest caches, not in memory."""

SUMS_PER_CHUNK = 2
"""At least so many times the bytes of what all chunks share: it is read and written for each."""


def convolve(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """(N, H, W, C) * (3, 3, C, D) to (N, H, W, D), one pixel of padding on each side."""
    return _convolve(x, _transformed(list(kernel)), turned=False)


def image_gradient(kernel: jax.Array, slope: jax.Array) -> jax.Array:
    """The slope (N, H, W, C) in the image, from that in the result (N, H, W, D)."""
    # The convolution of the slope by the kernel turned by 180 degrees, C and D exchanged.
    return _convolve(slope, _transformed(list(kernel[::-1, ::-1])), turned=True)


def kernel_gradient(x: jax.Array, slope: jax.Array) -> jax.Array:
    """The slope (3, 3, C, D) in the kernel, from the image and the slope (N, H, W, D)."""
    C, D = x.shape[-1], slope.shape[-1]

    def part(x: jax.Array, slope: jax.Array) -> jax.Array:
        v, m = _surroundings(x), _squares(slope)
        return _product(v.reshape(16, -1, C), m.reshape(16, -1, D), 1, 1)

    chunk = max(CHUNK_BYTES, SUMS_PER_CHUNK * 16 * C * D * 4)
    u = sum_of_chunks(part, (x, slope), chunk / _transformed_bytes(x, max(C, D)))
    u = u.reshape(4, 4, C, D)
    back = tuple(zip(*G, strict=True))
    u = _made(_combined(back, list(u)))
    return _made(_combined(back, [u[:, i] for i in range(4)]))


def _convolve(x: jax.Array, u: jax.Array, turned: bool) -> jax.Array:
    """By a transformed kernel (16, C, D); `turned`: from D channels to C."""
    C, D = u.shape[1:] if not turned else u.shape[:0:-1]
    height, width = x.shape[1:3]

    def part(x: jax.Array) -> jax.Array:
        v = _surroundings(x)
        m = _product(v.reshape(16, -1, C), u, 2, 2 if turned else 1)
        return _back(m.reshape(*v.shape[:-1], D))[:, :height, :width]

    chunk = max(CHUNK_BYTES, SUMS_PER_CHUNK * 4 * C * D * 4)
    return in_chunks(part, (x,), chunk / _transformed_bytes(x, max(C, D)))


def _transformed(rows: Sequence[jax.Array]) -> jax.Array:
    """The three rows (3, C, D) of a kernel to (16, C, D), by G in both directions."""
    w = _made(_combined(G, rows))
    return _made(_combined(G, [w[:, i] for i in range(3)])).reshape(16, *w.shape[2:])


def _transformed_bytes(x: jax.Array, channels: int) -> int:
    """Of one image of x."""
    height, width = (-(-size // 2) for size in x.shape[1:3])
    return 16 * height * width * channels * x.dtype.itemsize


def _product(a: jax.Array, b: jax.Array, along_a: int, along_b: int) -> jax.Array:
    """16 matrix products, over axis `along_a` and `along_b` (1 or 2)."""
    axes = (((along_a,), (along_b,)), ((0,), (0,)))
    return jax.lax.dot_general(a, b, axes, precision=jax.lax.Precision.HIGHEST)


def _surroundings(x: jax.Array) -> jax.Array:
    """(N, H, W, C) to (4, 4, N, ceil(H/2), ceil(W/2), C), by B in both directions."""
    high, wide = (-(-size // 2) * 2 for size in x.shape[1:3])
    edges = ((0, 0, 0), (1, high + 1 - x.shape[1], 0), (1, wide + 1 - x.shape[2], 0), (0, 0, 0))
    x = _made(jax.lax.pad(x, jnp.zeros((), x.dtype), edges))
    x = _made(_combined(B, [x[:, i : i + high : 2] for i in range(4)]))
    return _made(_combined(B, [x[:, :, :, i : i + wide : 2] for i in range(4)]))


def _squares(slope: jax.Array) -> jax.Array:
    """(N, H, W, D) to (4, 4, N, ceil(H/2), ceil(W/2), D), by the transpose of A."""
    high, wide = (size % 2 for size in slope.shape[1:3])
    if high or wide:
        edges = ((0, 0, 0), (0, high, 0), (0, wide, 0), (0, 0, 0))
        slope = jax.lax.pad(slope, jnp.zeros((), slope.dtype), edges)
    turned = tuple(zip(*A, strict=True))
    slope = _made(_combined(turned, [slope[:, i::2] for i in range(2)]))
    return _made(_combined(turned, [slope[:, :, :, i::2] for i in range(2)]))


def _back(m: jax.Array) -> jax.Array:
    """(4, 4, N, h, w, D) to (N, 2h, 2w, D), by A in both directions."""
    m = _made(m)
    m = _made(_combined(A, list(m)))
    m = _made(_combined(A, [m[:, i] for i in range(4)]))
    _, _, N, height, width, D = m.shape
    return m.transpose(2, 3, 0, 4, 1, 5).reshape(N, 2 * height, 2 * width, D)


def _combined(matrix: Sequence[Row], parts: Sequence[jax.Array]) -> jax.Array:
    """The sums of `parts`, weighted by the matrix's rows, on a new first axis."""
    return jnp.stack([_weighted(row, parts) for row in matrix])


def _weighted(row: Row, parts: Sequence[jax.Array]) -> jax.Array:
    terms = [(c, p) for c, p in zip(row, parts, strict=True) if c]
    total = None
    for c, p in sorted(terms, key=lambda term: -term[0]):
        if total is None:
            total = p if c == 1 else p * jnp.asarray(c, p.dtype)
        elif abs(c) == 1:
            total = total + p if c > 0 else total - p
        else:
            total = total + p * jnp.asarray(c, p.dtype)
    assert total is not None
    return total


def _made(x: jax.Array) -> jax.Array:
    return jax.lax.optimization_barrier(x)
