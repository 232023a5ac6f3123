"""Convolutions and their gradients as plain matrix products, for a CPU.

All are padded as PyTorch pads (side // 2 on each side), images (N, H, W, C), kernels HWIO.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxhisto.models.chunks import nearest_divisor, nothing, sum_of_chunks

CHUNK_BYTES = 2 << 20
"""What the patches of one go take."""

SUMS_PER_CHUNK = 2
"""At least so many times the bytes of what all chunks share: it is read and written for each."""


def convolve_by_taps(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """At stride 1, pixel of the kernel by pixel, and what lies in the padding left out.

    Of the products on a 3 x 3 map the padding is 4 in 10.
    """
    return _by_taps(x, kernel, turned=False)


def image_gradient_by_taps(kernel: jax.Array, slope: jax.Array) -> jax.Array:
    """The slope in the image of `convolve_by_taps`."""
    return _by_taps(slope, kernel, turned=True)


def kernel_gradient_by_taps(x: jax.Array, slope: jax.Array, side: int) -> jax.Array:
    """The slope (side, side, C, D) in the kernel of `convolve_by_taps`."""
    x, slope = (a.transpose(1, 2, 0, 3) for a in (x, slope))
    height, width, _, C = x.shape

    def tap(i: int, j: int) -> jax.Array:
        (up, up_in), (left, left_in) = _overlap(i, side, height), _overlap(j, side, width)
        a, b = x[up_in, left_in], slope[up, left]
        if 0 in a.shape:
            return jnp.zeros((C, slope.shape[-1]), x.dtype) + nothing(x)
        return _dot(a.reshape(-1, C), b.reshape(-1, b.shape[-1]), 0, 0)

    return jnp.stack([jnp.stack([tap(i, j) for j in range(side)]) for i in range(side)])


def _by_taps(x: jax.Array, kernel: jax.Array, turned: bool) -> jax.Array:
    """`turned`: by the kernel turned by 180 degrees, from D channels to C."""
    x = x.transpose(1, 2, 0, 3)
    height, width, _, C = x.shape
    side = kernel.shape[0]
    total: jax.Array | None = None
    for i in range(side):
        for j in range(side):
            (up, up_in), (left, left_in) = _overlap(i, side, height), _overlap(j, side, width)
            a = x[up_in, left_in]
            if 0 in a.shape:
                continue
            w = kernel[side - 1 - i, side - 1 - j] if turned else kernel[i, j]
            y = _dot(a.reshape(-1, C), w, 1, 1 if turned else 0)
            y = y.reshape(*a.shape[:3], y.shape[-1])
            edges = [(s.start, n - s.stop, 0) for s, n in ((up, height), (left, width))]
            y = jax.lax.pad(y, jnp.zeros((), y.dtype), (*edges, (0, 0, 0), (0, 0, 0)))
            total = y if total is None else total + y
    assert total is not None
    return total.transpose(2, 0, 1, 3)


def _overlap(i: int, side: int, size: int) -> tuple[slice, slice]:
    """Where in the result, and where in the image, pixel i of a kernel meets a pixel."""
    shift = i - side // 2
    first, last = max(0, -shift), min(size, size - shift)
    return slice(first, max(first, last)), slice(first + shift, max(first, last) + shift)


def convolve_by_patches(
    x: jax.Array, kernel: jax.Array, stride: int, precision: jax.lax.PrecisionLike
) -> jax.Array:
    """(N, H, W, C) * (side, side, C, D) as one product of patches; its gradients are JAX's."""
    side, _, C, D = kernel.shape
    sides = ((x.shape[1] - 1) // stride + 1, (x.shape[2] - 1) // stride + 1)
    flat = kernel.reshape(side * side * C, D)
    return jnp.einsum("nhwc,cd->nhwd", _patches(x, side, stride, sides), flat, precision=precision)


def kernel_gradient(x: jax.Array, slope: jax.Array, side: int, stride: int) -> jax.Array:
    """The slope (side, side, C, D) in the kernel: patches, turned, times slope (N, h, w, D)."""
    if x.shape[-1] < 16 and side > 1:
        return _kernel_gradient_of_pixels(x, slope, side, stride)
    _, height, width, D = slope.shape
    C = x.shape[-1]

    def part(x: jax.Array, slope: jax.Array) -> jax.Array:
        a = _patches(x, side, stride, (height, width))
        return _dot(a.reshape(-1, side * side * C), slope.reshape(-1, D), 0, 0)

    chunk = max(CHUNK_BYTES, SUMS_PER_CHUNK * side * side * C * D * 4)
    rows = chunk / (height * width * side * side * C * 4)
    return sum_of_chunks(part, (x, slope), rows).reshape(side, side, C, D)


def _patches(x: jax.Array, side: int, stride: int, sides: tuple[int, int]) -> jax.Array:
    """(N, H, W, C) to (N, h, w, side * side * C), what the kernel sees of the image."""
    x = _padded(x, side, stride, sides)
    spans = [(size - 1) * stride + 1 for size in sides]
    return jnp.concatenate(
        [
            x[:, i : i + spans[0] : stride, j : j + spans[1] : stride]
            for i in range(side)
            for j in range(side)
        ],
        -1,
    )


def _padded(x: jax.Array, side: int, stride: int, sides: tuple[int, int]) -> jax.Array:
    """With all pixels that the kernel sees, and none that it does not."""
    lasts = [
        (size - 1) * stride + side - side // 2 - n
        for size, n in zip(sides, x.shape[1:3], strict=True)
    ]
    edges = [(side // 2, last, 0) for last in lasts]
    return jax.lax.pad(x, jnp.zeros((), x.dtype), ((0, 0, 0), *edges, (0, 0, 0)))


def _kernel_gradient_of_pixels(x: jax.Array, slope: jax.Array, side: int, stride: int) -> jax.Array:
    """As `kernel_gradient` where pixels are short: the patches are built channel by channel.

    Some rows of one image at a time. Pixels of one channel and one phase of the stride lie next
    to each other there, so that whole rows are copied.
    """
    N, height, width, D = slope.shape
    C = x.shape[-1]
    reach = (side - 1) // stride  # how far a patch goes within a phase
    tall, wide = height + reach, width + reach
    edges = [
        (side // 2, stride * n - side // 2 - m, 0)
        for n, m in zip((tall, wide), x.shape[1:3], strict=True)
    ]
    x = jax.lax.pad(x, jnp.zeros((), x.dtype), ((0, 0, 0), *edges, (0, 0, 0)))
    x = x.reshape(N, tall, stride, wide, stride, C).transpose(0, 2, 4, 5, 1, 3)
    rows = nearest_divisor(height, CHUNK_BYTES / 2 / (side * side * C * width * 4))
    blocks = height // rows

    def add(total: jax.Array, k: jax.Array) -> tuple[jax.Array, None]:
        n, top = k // blocks, k % blocks * rows
        some = jax.lax.dynamic_slice(
            x, (n, 0, 0, 0, top, 0), (1, stride, stride, C, rows + reach, wide)
        )[0]
        patches = jnp.stack(
            [
                some[i % stride, j % stride, :, i // stride :, j // stride :][:, :rows, :width]
                for i in range(side)
                for j in range(side)
            ]
        )
        b = jax.lax.dynamic_slice(slope, (n, top, 0, 0), (1, rows, width, D))
        return total + _dot(patches.reshape(side * side * C, -1), b.reshape(-1, D), 1, 0), None

    zeros = jnp.zeros((side * side * C, D), x.dtype) + nothing(x)
    total, _ = jax.lax.scan(add, zeros, jnp.arange(N * blocks, dtype=jnp.int32))
    return total.reshape(side, side, C, D)


def _dot(a: jax.Array, b: jax.Array, along_a: int, along_b: int) -> jax.Array:
    axes = (((along_a,), (along_b,)), ((), ()))
    return jax.lax.dot_general(a, b, axes, precision=jax.lax.Precision.HIGHEST)
