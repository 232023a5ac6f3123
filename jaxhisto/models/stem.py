"""The networks' first convolution, 7x7 with stride 2, in two forms with one and the same kernel.

Its image has three channels, few for units that multiply matrices. Space-to-depth puts each 2x2
block of pixels into twelve channels, and the kernel, padded to 8x8, becomes 4x4 with stride 1: the
same sums in another order (as in MLPerf's ResNet50 on TPUs). The parameter stays 7x7, so what is
saved and exported is the same in both forms.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

SIDE, STRIDE = 7, 2


def space_to_depth(
    x: jax.Array, kernel: jax.Array, precision: jax.lax.PrecisionLike = None
) -> jax.Array:
    """As `convolution.plain` with stride 2, but for rounding.

    Args:
      x: (N, H, W, C), H and W odd or even; N may be sharded, in an explicit mesh or inside
        `jax.shard_map`.
      kernel: (7, 7, C, D) of the same dtype, the same on all devices.
      precision: of the convolution.

    Returns:
      (N, ceil(H/2), ceil(W/2), D), sharded as `x`.
    """
    return jax.lax.conv_general_dilated(
        blocks(x),
        folded(kernel),
        (1, 1),
        # Pixel 2i + a - 3 under tap a is that of block i + (a + 1) // 2 - 2: two blocks before
        # the first, one after the last.
        ((2, 1), (2, 1)),
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        precision=precision,
    )


def blocks(x: jax.Array) -> jax.Array:
    """(N, H, W, C) to (N, ceil(H/2), ceil(W/2), 4C): channel (2p + q) C + c is pixel (p, q)'s c."""
    n, height, width, channels = x.shape
    # A row of zeros beyond an odd side is one of those that the convolution pads with.
    x = jnp.pad(x, ((0, 0), (0, height % STRIDE), (0, width % STRIDE), (0, 0)))
    high, wide = (size // STRIDE for size in x.shape[1:3])
    # One axis at a time: where N is sharded, a reshape that splits two has no rule.
    x = x.reshape(n, high, STRIDE, -1, channels).reshape(n, high, STRIDE, wide, STRIDE, channels)
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(n, high, wide, STRIDE * STRIDE * channels)


def folded(kernel: jax.Array) -> jax.Array:
    """(7, 7, C, D) to (4, 4, 4C, D), taps in the order of `blocks`; before the first is a 0."""
    channels, width = kernel.shape[2:]
    half = (SIDE + 1) // STRIDE
    taps = jnp.pad(kernel, ((1, 0), (1, 0), (0, 0), (0, 0)))
    taps = taps.reshape(half, STRIDE, half, STRIDE, channels, width).transpose(0, 2, 1, 3, 4, 5)
    return taps.reshape(half, half, STRIDE * STRIDE * channels, width)
