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

import math
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from typing import Literal

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

LITTLE_WORK = 100_000_000
"""Products of a convolution on one device below which a fast form's longer compilation is not
worth its speed; a step of 64 views of 96 px has above 600 million in each 3x3 convolution."""

Forms = Literal["auto", "plain", "fast"]

_forms: ContextVar[Forms] = ContextVar("forms of convolutions", default="auto")


@contextmanager
def convolutions(forms: Forms) -> Iterator[None]:
    """Chooses the forms of what is traced inside; what was traced before keeps its own.

    Args:
      forms: `plain`, XLA's own in all places, fallback and oracle of the others; `fast`, the others
        for little work and on any platform too; `auto`, where they are faster.
    """
    token = _forms.set(forms)
    try:
        yield
    finally:
        _forms.reset(token)


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

    The other forms have a gradient rule of their own, so that on a CPU `jax.jvp`, `jax.jacfwd` and
    forward-over-reverse (Hessian products) raise a TypeError; inside `convolutions("plain")` they
    work.

    Returns:
      (N, ceil(H/stride), ceil(W/stride), D), sharded as `x`.
    """
    if not (fast and x.size and _may_be_fast(x)):  # an empty batch has nothing to cut in chunks
        return plain(x, kernel, stride, precision)
    sharding = jax.typeof(x).sharding
    axis = sharding.spec[0]
    if axis is None:
        return _convolution(stride, x, _own(kernel, x))
    if sharding.mesh.size == 1:  # nothing is split, and no sum over devices has to be taken
        y = _convolution(stride, jax.reshard(x, P(None, None, None, None)), kernel)
        return jax.reshard(y, P(axis, None, None, None))

    def of_these_rows(x: jax.Array, kernel: jax.Array) -> jax.Array:
        return _convolution(stride, x, _own(kernel, x))

    rows = P(axis)
    return jax.shard_map(of_these_rows, in_specs=(rows, P()), out_specs=rows)(x, kernel)


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


def _may_be_fast(x: jax.Array) -> bool:
    forms = _forms.get()
    if forms == "plain" or x.dtype != jnp.float32:
        return False
    # The platform is asked once, while tracing: all forms are right on all platforms, so that one
    # that is compiled for another than the default device is slower at worst.
    return forms == "fast" or jax.default_backend() == "cpu"


def _own(kernel: jax.Array, x: jax.Array) -> jax.Array:
    """The kernel as each device's own copy where the rows are, so that its slope is summed.

    Without this the gradient's rule, which sees the rows of one device, would have to know
    whether to sum.
    """
    spread, held = _varying(x), _varying(kernel)
    if spread is None or held is None:
        return kernel + nothing(x)
    missing = tuple(spread - held)
    return jax.lax.pcast(kernel, missing, to="varying") if missing else kernel


def _varying(a: jax.Array) -> frozenset[str] | None:
    """The axes along which an array may differ between devices; None where JAX does not say."""
    kind = jax.typeof(a)
    if (axes := getattr(kind, "vma", None)) is not None:
        return frozenset(axes)
    manual = getattr(kind, "manual_axis_type", None) or getattr(kind, "mat", None)  # JAX 0.11.2
    return None if manual is None else frozenset(manual.varying)


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
    own = partial(plain, stride=stride, precision=jax.lax.Precision.HIGHEST)
    # Where nobody asks for the slope in the image (the stem), XLA leaves it out.
    _, pull = jax.vjp(own, x, kernel)
    of_image, of_kernel = pull(slope)
    if side > 1 and _has_little_work(x, kernel, stride):
        return of_image, of_kernel
    return of_image, products.kernel_gradient(x, slope, side, stride)


_convolution.defvjp(_forward, _backward)


def _form(x: jax.Array, kernel: jax.Array, stride: int) -> str:
    """Of the result and the slope in the image: `taps`, `winograd` or `plain`."""
    if kernel.shape[0] != 3 or stride != 1 or _has_little_work(x, kernel, stride):
        return "plain"
    if max(x.shape[1:3]) <= TAPS_MAP:
        return "taps"
    return "winograd" if min(kernel.shape[2:]) >= WINOGRAD_WIDTH else "plain"


def _has_little_work(x: jax.Array, kernel: jax.Array, stride: int) -> bool:
    work = math.prod(x.shape[:3]) / stride**2 * kernel.size
    return work < LITTLE_WORK and _forms.get() != "fast"
