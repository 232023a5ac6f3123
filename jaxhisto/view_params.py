"""What is done to each view, drawn from (key, row, view) alone (paper: App. C)."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxhisto.config import AugmentConfig

# Brightness, contrast, saturation, hue (paper: App. C).
JITTER = {
    "none": (0.0, 0.0, 0.0, 0.0),
    "light": (0.4, 0.4, 0.4, 0.2),
    "medium": (0.8, 0.8, 0.8, 0.2),
    "heavy": (0.8, 0.8, 0.8, 0.4),
}
BRIGHTNESS, CONTRAST, SATURATION, HUE = range(4)
NEUTRAL = (1.0, 1.0, 1.0, 0.0)
TRIES = 10  # as torchvision's RandomResizedCrop, which then takes the middle of the tile


class ViewParams(NamedTuple):
    """What is done to each view; every leaf starts with (N, V)."""

    crop: jax.Array
    """(N, V, 4) int32: top, left, height, width in pixels of the canvas."""
    turns: jax.Array
    """(N, V) int32: quarter turns counter-clockwise, 0..3, after the crop."""
    flip_y: jax.Array
    """(N, V) bool: turned upside down, after the turns."""
    flip_x: jax.Array
    """(N, V) bool: mirrored left to right, after the turns."""
    place: jax.Array
    """(N, V, 4) int32: place in 0..3 of brightness, contrast, saturation, hue in the order."""
    factors: jax.Array
    """(N, V, 4) float32: of the four; (1, 1, 1, 0) leaves a view as it is. Hue in turns."""
    grey: jax.Array
    """(N, V) bool: turned grey after the jitter."""
    sigma: jax.Array
    """(N, V) float32: of the blur in pixels of the view; 0: none."""


def draw_views(
    key: jax.Array,
    sizes: jax.Array,
    config: AugmentConfig,
    views: int = 2,
    rows: jax.Array | None = None,
) -> ViewParams:
    """Parameters of `views` views of each row of `sizes` (N, 2).

    `rows` (N,) int32 are their numbers in the global batch, where these are only some of it.
    """
    if rows is None:
        # Adding a row of `sizes` gives the indices its sharding; `split(key, N)` would not.
        rows = jnp.arange(sizes.shape[0], dtype=jnp.int32) + jnp.zeros_like(sizes[:, 0])

    def one(row: jax.Array, size: jax.Array, view: jax.Array) -> ViewParams:
        return draw_view(jax.random.fold_in(jax.random.fold_in(key, row), view), size, config)

    each_view = jax.vmap(one, in_axes=(None, None, 0))
    each_row = jax.vmap(each_view, in_axes=(0, 0, None))
    return each_row(rows, sizes, jnp.arange(views, dtype=jnp.int32))


def draw_view(key: jax.Array, size: jax.Array, config: AugmentConfig) -> ViewParams:
    """Parameters of one view of a tile of `size` (2,): leaves without the leading (N, V)."""
    # One draw, cut into pieces: a call each would make the program a good deal longer.
    draws = jax.random.uniform(key, (2 * TRIES + 17,))
    crop, rest = jnp.split(draws, [2 * TRIES + 2])
    turn, flips, jittered, factors, order, grey, blurred, sigma = jnp.split(
        rest, [1, 3, 4, 8, 12, 13, 14]
    )
    low, high = (jnp.array(bounds) for bounds in zip(*_ranges(config), strict=True))
    least, most = config.blur_sigma
    flips = (flips < 0.5) & config.flips
    return ViewParams(
        crop=draw_crop(crop, size, config.crop_area, config.crop_ratio),
        turns=jnp.floor(4.0 * turn[0]).astype(jnp.int32) * int(config.rot90),
        flip_y=flips[0],
        flip_x=flips[1],
        place=_ranks(order),
        factors=jnp.where(
            jittered < config.jitter_probability, low + factors * (high - low), jnp.array(NEUTRAL)
        ),
        grey=grey[0] < config.grey_probability,
        sigma=jnp.where(
            blurred[0] < config.blur_probability, least + sigma[0] * (most - least), 0.0
        ),
    )


def draw_crop(
    draws: jax.Array, size: jax.Array, area: tuple[float, float], ratio: tuple[float, float]
) -> jax.Array:
    """Box (4,) int32 inside `size` (2,), as torchvision's RandomResizedCrop draws it.

    Ten boxes are drawn at once and the first that fits is taken, which is the same
    distribution as torchvision's loop; if none fits, the largest middle box whose ratio is
    allowed, likewise. `draws` are 2 * TRIES + 2 uniform numbers in 0..1.
    """
    height, width = size.astype(jnp.float32)
    areas, ratios, corner = jnp.split(draws, [TRIES, 2 * TRIES])
    areas = height * width * (area[0] + areas * (area[1] - area[0]))
    low, high = jnp.log(jnp.array(ratio))
    ratios = jnp.exp(low + ratios * (high - low))
    heights, widths = jnp.round(jnp.sqrt(areas / ratios)), jnp.round(jnp.sqrt(areas * ratios))
    fits = (heights > 0) & (heights <= height) & (widths > 0) & (widths <= width)
    first = fits & (jnp.cumsum(fits) == 1)
    drawn = jnp.stack([jnp.where(first, heights, 0.0).sum(), jnp.where(first, widths, 0.0).sum()])
    most = jnp.stack([jnp.round(width / ratio[0]), jnp.round(height * ratio[1])])
    whole = jnp.minimum(jnp.stack([height, width]), most)
    box = jnp.where(fits.any(), drawn, whole)
    room = jnp.stack([height, width]) - box
    # floor(u * (room + 1)) is uniform over 0..room; u * (room + 1) may round up to room + 1.
    corner = jnp.where(fits.any(), jnp.floor(corner * (room + 1.0)), jnp.floor(room / 2.0))
    return jnp.concatenate([jnp.minimum(corner, room), box]).astype(jnp.int32)


def _ranks(draws: jax.Array) -> jax.Array:
    """Rank of each draw: a random permutation without a sort."""
    index = jnp.arange(draws.shape[0], dtype=jnp.int32)
    one, other = draws[:, None], draws[None]
    tie = (one == other) & (index[:, None] > index[None])
    return ((one > other) | tie).sum(1).astype(jnp.int32)


def _ranges(config: AugmentConfig) -> list[tuple[float, float]]:
    *strengths, shift = JITTER[config.jitter]
    return [(max(0.0, 1.0 - s), 1.0 + s) for s in strengths] + [(-shift, shift)]
