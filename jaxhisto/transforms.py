"""What the augmentation is made of: weights that resize and blur, operations on colour.

Weights are for one axis at a time, for many views at once: arguments are (N, V). Colour
operations take a view as its three planes, RGB in 0..1, and work on planes of any shape;
their factors are scalars or have the planes' rank.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

Planes = tuple[jax.Array, jax.Array, jax.Array]


class Cut(NamedTuple):
    """Part of one axis of each tile that becomes the side of a view."""

    start: jax.Array
    """(N, V) int32, px."""
    length: jax.Array
    """(N, V) int32, px."""
    flip: jax.Array
    """(N, V) bool: from the end to the start."""


class Taps(NamedTuple):
    """The pixels of an axis that make up each pixel of a view."""

    pixel: jax.Array
    """(..., taps, side) int32."""
    weight: jax.Array
    """(..., taps, side) float32, of sum 1 over the taps."""


def resize_matrix(cut: Cut, size: int, side: int) -> jax.Array:
    """(N, V, side, size): resamples the cut of `size` pixels to `side`."""
    cut = Cut(*(a[..., None, None] for a in cut))
    centre, scale = centres(cut, _iota((1, 1, side, 1), 2), side)
    return _triangle(cut, centre, scale, _iota((1, 1, 1, size), 3), axis=-1)


def resize_taps(cut: Cut, size: int, side: int) -> Taps:
    """`resize_matrix` without its zeros."""
    taps = math.ceil(2 * max(1.0, size / side))
    cut = Cut(*(a[..., None, None] for a in cut))
    centre, scale = centres(cut, _iota((1, 1, 1, side), 3), side)
    first = jnp.floor(centre - jnp.maximum(scale, 1.0) - 0.5) + 1.0
    pixel = first + _iota((1, 1, taps, 1), 2)
    weight = _triangle(cut, centre, scale, pixel, axis=-2)
    return Taps(jnp.clip(pixel, 0, size - 1).astype(jnp.int32), weight)


def centres(cut: Cut, place: jax.Array, side: int) -> tuple[jax.Array, jax.Array]:
    """Where pixel `place` of the view lies in the tile, px, and how many pixels make one."""
    scale = cut.length.astype(jnp.float32) / side
    place = jnp.where(cut.flip, side - 1 - place, place)
    return cut.start.astype(jnp.float32) + (place + 0.5) * scale, scale


def _triangle(
    cut: Cut, centre: jax.Array, scale: jax.Array, pixel: jax.Array, axis: int
) -> jax.Array:
    """Weights of `pixel` for `centre`: bilinear with antialias, as torchvision's resize.

    A triangle as wide as a pixel of the coarser grid, cut off at the ends of the crop and
    normalised along `axis`; so nothing outside the crop counts.
    """
    weight = jnp.maximum(1.0 - jnp.abs(centre - pixel - 0.5) / jnp.maximum(scale, 1.0), 0.0)
    start = cut.start.astype(jnp.float32)
    inside = (pixel >= start) & (pixel < start + cut.length.astype(jnp.float32))
    weight = jnp.where(inside, weight, 0.0)
    return weight / weight.sum(axis, keepdims=True)


def blur_radius(side: int) -> int:
    """Taps on either side of a pixel: the kernel is a tenth of the side (paper)."""
    return int(0.1 * side / 2)


def blur_matrix(sigma: jax.Array, side: int) -> jax.Array:
    """(N, V, side, side): blurs one axis; the identity where sigma is 0."""
    to, source = _iota((1, 1, side, side), 2), _iota((1, 1, side, side), 3)
    sigma = sigma[..., None, None]
    # A pixel is met up to three times: itself, mirrored in the first and in the last pixel.
    last = side - 1
    met = (
        (to - source, source >= 0),
        (to + source, source > 0),
        (2 * last - to - source, source < last),
    )
    weight = jnp.zeros((), jnp.float32)
    for distance, there in met:
        within = there & (jnp.abs(distance) <= blur_radius(side))
        weight = weight + jnp.where(within, _gauss(distance, sigma), 0.0)
    return weight / weight.sum(-1, keepdims=True)


def blur_weights(sigma: jax.Array, side: int) -> jax.Array:
    """(N, V, taps): Gaussian of `sigma` (N, V) px; only the middle one where sigma is 0."""
    radius = blur_radius(side)
    weight = _gauss(_iota((1, 1, 2 * radius + 1), 2) - radius, sigma[..., None])
    return weight / weight.sum(-1, keepdims=True)


def brightness(rgb: Planes, factor: jax.Array) -> Planes:
    """Multiplied by `factor`."""
    red, green, blue = (_unit(factor * plane) for plane in rgb)
    return red, green, blue


def contrast(rgb: Planes, factor: jax.Array) -> Planes:
    """Distance to the mean luma of the one image `rgb` (y, x) multiplied by `factor`."""
    return affine(rgb, factor, jnp.zeros(()), (1.0 - factor) * mean_luma(rgb))


def saturation(rgb: Planes, factor: jax.Array) -> Planes:
    """Distance to each pixel's luma multiplied by `factor`; 0 is grey."""
    return affine(rgb, factor, 1.0 - factor, jnp.zeros(()))


def affine(rgb: Planes, scale: jax.Array, grey: jax.Array, offset: jax.Array) -> Planes:
    """scale * rgb + grey * luma + offset, clipped to 0..1.

    Brightness f is (f, 0, 0), contrast (f, 0, (1 - f) * mean luma), saturation (f, 1 - f, 0).
    """
    shared = grey * luma(rgb) + offset
    red, green, blue = (_unit(scale * plane + shared) for plane in rgb)
    return red, green, blue


def hue(rgb: Planes, shift: jax.Array) -> Planes:
    """Turns the hue by `shift`, a share of a full turn, as through HSV and back."""
    red, green, blue = rgb
    most = _larger(_larger(red, green), blue)
    chroma = most - _smaller(_smaller(red, green), blue)
    inverse = 1.0 / jnp.where(chroma == 0, 1.0, chroma)
    sextant = jnp.where(
        most == red,
        (green - blue) * inverse,
        jnp.where(most == green, 2.0 + (blue - red) * inverse, 4.0 + (red - green) * inverse),
    )
    sextant = sextant + 6.0 * shift

    def plane(opposite: float) -> jax.Array:
        away = sextant - opposite
        away = jnp.abs(away - 6.0 * jnp.round(away * (1 / 6)))  # sextants, 0..3
        return most - chroma * _unit(2.0 - away)

    return plane(3.0), plane(5.0), plane(1.0)


def luma(rgb: Planes) -> jax.Array:
    """Grey value of RGB planes, with torchvision's weights (ITU-R BT.601)."""
    red, green, blue = rgb
    return 0.2989 * red + 0.587 * green + 0.114 * blue


def mean_luma(rgb: Planes) -> jax.Array:
    """Mean of `luma` over the last two axes."""
    grey = luma(rgb)
    share = jnp.full(grey.shape[-2:], 1.0 / (grey.shape[-2] * grey.shape[-1]))
    # A product, since XLA's mean over all pixels is several times slower on a CPU.
    return jnp.einsum("...yx,yx->...", grey, share, precision=jax.lax.Precision.HIGHEST)


# jnp.maximum and jnp.clip also carry NaN through, at three times the instructions on a CPU.
def _larger(a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.where(a > b, a, b)


def _smaller(a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.where(a < b, a, b)


def _unit(a: jax.Array) -> jax.Array:
    """Clipped to 0..1."""
    return jnp.where(a > 0.0, jnp.where(a < 1.0, a, 1.0), 0.0)


def _gauss(distance: jax.Array, sigma: jax.Array) -> jax.Array:
    spread = jnp.where(sigma > 0, sigma, 1e-3)  # of 1e-3, all but the pixel itself is 0
    return jnp.exp(-0.5 * jnp.square(distance / spread))


def _iota(shape: tuple[int, ...], axis: int) -> jax.Array:
    return jax.lax.broadcasted_iota(jnp.float32, shape, axis)
