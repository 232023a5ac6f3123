"""The networks' convolution, and what computes it: XLA's own, or forms that a CPU is faster at.

On a CPU, in float32 and in training, three directions have each their own form:

| kernel | result | slope in the image | slope in the kernel |
|---|---|---|---|
| 3x3, stride 1, map above 3 x 3 | Winograd | Winograd | Winograd |
| 3x3, stride 1, smaller map | by taps | by taps | by taps |
| any other | XLA's | XLA's | patches times slope |

Everywhere else, on accelerators too, XLA's own convolution and its gradients are taken.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from jaxhisto.models import products, winograd
from jaxhisto.models.chunks import nothing

Pair = tuple[jax.Array, jax.Array]

SMALL_MAP = 2
"""Side of a map up to which XLA's own is a matrix product of patches: its CPU compiler has a
naive loop there, 2 GFLOP/s where the product makes 100; accelerators see no such maps, the last
of a 96-px tile is 3 x 3."""

TAPS_MAP = 3
"""Side of a map up to which leaving the padding out saves more than Winograd's squares do."""

WINOGRAD_WIDTH = 32
"""Channels, in and out, from which Winograd's products are large enough to be fast."""

_plain: ContextVar[bool] = ContextVar("plain convolutions", default=False)


@contextmanager
def plain_convolutions() -> Iterator[None]:
    """XLA's own convolutions in what is traced inside: the fallback and oracle of the fast forms.

    What was traced before keeps its form: make (`jax.jit`) and call a function inside.
    """
    token = _plain.set(True)
    try:
        yield
    finally:
        _plain.reset(token)


def convolve(
    x: jax.Array,
    kernel: jax.Array,
    stride: int,
    precision: jax.lax.PrecisionLike = None,
    *,
    fast: bool = True,
) -> jax.Array:
    """Convolves images, padded by k // 2 on each side as in PyTorch.

    Args:
      x: (N, H, W, C); N may be sharded, in an explicit mesh or inside `jax.shard_map`.
      kernel: (k, k, C, D) of the same dtype, the same on all devices.
      stride: in both directions.
      precision: of XLA's own form; the others are of the highest.
      fast: whether another form may be taken than XLA's own. Each is as near to the exact
        result, but not the same to the last digits.

    Returns:
      (N, ceil(H/stride), ceil(W/stride), D), sharded as `x`.
    """
    if not (fast and _has_fast_form(x)):
        return plain(x, kernel, stride, precision)
    rows = P(jax.typeof(x).sharding.spec[0])
    here = partial(_of_these_rows, stride)
    if rows == P(None):
        return here(x, kernel)
    return jax.shard_map(here, in_specs=(rows, P()), out_specs=rows)(x, kernel)


def plain(
    x: jax.Array, kernel: jax.Array, stride: int, precision: jax.lax.PrecisionLike
) -> jax.Array:
    """XLA's own convolution, or on the smallest maps a product of patches."""
    side = kernel.shape[0]
    sides = [(size - 1) // stride + 1 for size in x.shape[1:3]]
    if side > 1 and max(sides) <= SMALL_MAP:
        return products.convolve_by_patches(x, kernel, stride, precision)
    return jax.lax.conv_general_dilated(
        x,
        kernel,
        (stride, stride),
        # Never "SAME": XLA pads a strided convolution on the far side first, PyTorch evenly.
        ((side // 2, side // 2),) * 2,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        precision=precision,
    )


def _has_fast_form(x: jax.Array) -> bool:
    # The platform is asked once, while tracing: all forms are right on all platforms, so that one
    # that is compiled for another than the default device is slower at worst.
    return not _plain.get() and x.dtype == jnp.float32 and jax.default_backend() == "cpu"


def _of_these_rows(stride: int, x: jax.Array, kernel: jax.Array) -> jax.Array:
    # The slope in the kernel is of these rows alone. Adding what varies with them makes the kernel
    # vary between devices, so that its slope is summed over them.
    return _convolution(stride, x, kernel + nothing(x))


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _convolution(stride: int, x: jax.Array, kernel: jax.Array) -> jax.Array:
    form = _form(x, kernel, stride)
    if form == "taps":
        return products.convolve_by_taps(x, kernel)
    if form == "winograd":
        return winograd.convolve(x, kernel)
    return plain(x, kernel, stride, jax.lax.Precision.HIGHEST)


def _forward(stride: int, x: jax.Array, kernel: jax.Array) -> tuple[jax.Array, Pair]:
    return _convolution(stride, x, kernel), (x, kernel)


def _backward(stride: int, kept: Pair, slope: jax.Array) -> Pair:
    x, kernel = kept
    side = kernel.shape[0]
    form = _form(x, kernel, stride)
    if form == "taps":
        of_image = products.image_gradient_by_taps(kernel, slope)
        return of_image, products.kernel_gradient_by_taps(x, slope, side)
    if form == "winograd":
        return winograd.image_gradient(kernel, slope), winograd.kernel_gradient(x, slope)
    # Linear in the image; where nobody asks for its slope (the stem), it is not computed.
    pull = jax.linear_transpose(lambda x: plain(x, kernel, stride, jax.lax.Precision.HIGHEST), x)
    (of_image,) = pull(slope)
    return of_image, products.kernel_gradient(x, slope, side, stride)


_convolution.defvjp(_forward, _backward)


def _form(x: jax.Array, kernel: jax.Array, stride: int) -> str:
    """`taps`, `winograd` or `plain`."""
    if kernel.shape[0] != 3 or stride != 1:
        return "plain"
    if max(x.shape[1:3]) <= TAPS_MAP:
        return "taps"
    return "winograd" if min(kernel.shape[2:]) >= WINOGRAD_WIDTH else "plain"
