"""The random views of a tile, made on the device (paper: App. C).

A view is crop -> turn and flip -> colour jitter -> grey -> blur, with parameters of its own
for each (row, view). Cropping, resizing, turning and blurring are products with small
matrices, one for each axis of each view, so that nothing is gathered, and no image leaves
the device that holds its tile.

Planes are kept apart: between the functions a batch of views is `(N, V, y, 3, x)`, RGB in
0..1. Values agree with torchvision's at the same parameters within 2/255 in float32, also
where the device multiplies matrices in TF32 (10 bits); with bfloat16 (8 bits) within 4/255.
"""

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


def two_views(
    key: jax.Array,
    tiles: jax.Array,
    sizes: jax.Array,
    side: int,
    config: AugmentConfig,
    dtype: jnp.dtype = jnp.float32,
) -> jax.Array:
    """Two random views of each tile.

    Args:
      key: of this step; the parameters of row r, view v depend on (key, r, v) alone.
      tiles: (N, H, W, 3) uint8 RGB, content at the top left; N may be sharded.
      sizes: (N, 2) int32, height and width of the content; what lies outside is never read.
      side: of a view, px.
      config: strengths and probabilities.
      dtype: of the views.

    Returns:
      (N, 2, side, side, 3), RGB in 0..1, sharded as `tiles`.
    """
    return apply_views(draw_views(key, sizes, config), tiles, side, config, dtype)


def draw_views(
    key: jax.Array, sizes: jax.Array, config: AugmentConfig, views: int = 2
) -> ViewParams:
    """Parameters of `views` views of each row of `sizes` (N, 2)."""
    # Adding a row of `sizes` gives the indices its sharding; `split(key, N)` would not have it.
    rows = jnp.arange(sizes.shape[0], dtype=jnp.int32) + jnp.zeros_like(sizes[:, 0])

    def one(row: jax.Array, size: jax.Array, view: jax.Array) -> ViewParams:
        return draw_view(jax.random.fold_in(jax.random.fold_in(key, row), view), size, config)

    each_view = jax.vmap(one, in_axes=(None, None, 0))
    each_row = jax.vmap(each_view, in_axes=(0, 0, None))
    return each_row(rows, sizes, jnp.arange(views, dtype=jnp.int32))


def draw_view(key: jax.Array, size: jax.Array, config: AugmentConfig) -> ViewParams:
    """Parameters of one view of a tile of `size` (2,): leaves without the leading (N, V)."""
    crop_key, turn_key, flip_key, jitter_key, order_key, grey_key, blur_key = (
        jax.random.fold_in(key, i) for i in range(7)
    )
    flips = jax.random.bernoulli(flip_key, 0.5, (2,)) & config.flips
    jittered, *draws = jax.random.uniform(jitter_key, (5,))
    blurred, blur = jax.random.uniform(blur_key, (2,))
    least, most = config.blur_sigma
    neutral = jnp.array([1.0, 1.0, 1.0, 0.0])
    low, high = (jnp.array(bounds) for bounds in zip(*_ranges(config), strict=True))
    factors = low + jnp.stack(draws) * (high - low)
    return ViewParams(
        crop=draw_crop(crop_key, size, config.crop_area, config.crop_ratio),
        turns=jax.random.randint(turn_key, (), 0, 4) * int(config.rot90),
        flip_y=flips[0],
        flip_x=flips[1],
        place=_permutation(order_key, 4),
        factors=jnp.where(jittered < config.jitter_probability, factors, neutral),
        grey=jax.random.uniform(grey_key) < config.grey_probability,
        sigma=jnp.where(blurred < config.blur_probability, least + blur * (most - least), 0.0),
    )


def draw_crop(
    key: jax.Array, size: jax.Array, area: tuple[float, float], ratio: tuple[float, float]
) -> jax.Array:
    """Box (4,) int32 inside `size` (2,), as torchvision's RandomResizedCrop draws it.

    Ten boxes are drawn at once and the first that fits is taken, which is the same
    distribution as torchvision's loop; if none fits, the largest middle box whose ratio is
    allowed, likewise.
    """
    height, width = size.astype(jnp.float32)
    area_key, ratio_key, place_key = (jax.random.fold_in(key, i) for i in range(3))
    areas = height * width * jax.random.uniform(area_key, (TRIES,), minval=area[0], maxval=area[1])
    low, high = jnp.log(jnp.array(ratio))
    ratios = jnp.exp(jax.random.uniform(ratio_key, (TRIES,), minval=low, maxval=high))
    heights, widths = jnp.round(jnp.sqrt(areas / ratios)), jnp.round(jnp.sqrt(areas * ratios))
    fits = (heights > 0) & (heights <= height) & (widths > 0) & (widths <= width)
    first = fits & (jnp.cumsum(fits) == 1)
    whole = jnp.stack(
        [
            jnp.minimum(height, jnp.round(width / ratio[0])),
            jnp.minimum(width, jnp.round(height * ratio[1])),
        ]
    )
    drawn = jnp.stack([jnp.where(first, heights, 0.0).sum(), jnp.where(first, widths, 0.0).sum()])
    box = jnp.where(fits.any(), drawn, whole)
    room = jnp.stack([height, width]) - box
    share = jnp.where(fits.any(), jax.random.uniform(place_key, (2,)), 0.5)
    # floor(u * (room + 1)) is uniform over 0..room; u * (room + 1) may round up to room + 1.
    corner = jnp.minimum(jnp.floor(share * (room + 1.0)), room)
    return jnp.concatenate([corner, box]).astype(jnp.int32)


def apply_views(
    params: ViewParams,
    tiles: jax.Array,
    side: int,
    config: AugmentConfig,
    dtype: jnp.dtype = jnp.float32,
) -> jax.Array:
    """Carries out `params` on `tiles` (N, H, W, 3) uint8: (N, V, side, side, 3) in 0..1.

    Of `config` only the shape of the work is used: what it switches off is not computed.
    """
    images = crop_resize(tiles, params, side)
    if config.jitter != "none" and config.jitter_probability > 0:
        images = jitter(images, params.place, params.factors)
    if config.grey_probability > 0:
        images = greyscale(images, params.grey)
    if config.blur_probability > 0:
        images = blur(images, params.sigma)
    return turn(images, params.turns).astype(dtype)


def crop_resize(tiles: jax.Array, params: ViewParams, side: int) -> jax.Array:
    """Crops, resizes (bilinear, antialias) and flips; all of `turn` but the transposition.

    Returns:
      (N, V, side, 3, side) float32 in 0..1.
    """
    N, H, W, _ = tiles.shape
    V = params.turns.shape[1]
    odd = params.turns % 2 == 1
    # A turn is flips and, if odd, a transposition, which is left to the end. What then flips
    # the rows of the result has to flip the columns before it.
    flip_y = params.flip_y ^ ((params.turns == 1) | (params.turns == 2))
    flip_x = params.flip_x ^ ((params.turns == 2) | (params.turns == 3))
    flip_rows, flip_columns = jnp.where(odd, flip_x, flip_y), jnp.where(odd, flip_y, flip_x)
    top, left, height, width = jnp.moveaxis(params.crop, -1, 0)
    rows = resize_matrix(top, height, flip_rows, H, side)
    columns = resize_matrix(left, width, flip_columns, W, side) / 255.0
    planes = jnp.transpose(tiles, (0, 1, 3, 2)).reshape(N, H, 3 * W).astype(jnp.float32)
    # Both views in one product, whose right side is the tile as it lies in memory.
    tall = jnp.matmul(rows.reshape(N, V * side, H), planes).reshape(N, V, side * 3, W)
    return jnp.einsum("nvkw,nvxw->nvkx", tall, columns).reshape(N, V, side, 3, side)


def resize_matrix(
    start: jax.Array, length: jax.Array, flip: jax.Array, size: int, side: int
) -> jax.Array:
    """(..., side, size): resamples pixels start..start+length of `size` to `side`.

    Bilinear with antialias: a triangle as wide as a pixel of the coarser grid, cut off at
    the ends of the crop and normalised (torchvision's resize with antialias=True).
    """
    start, length = (a.astype(jnp.float32)[..., None, None] for a in (start, length))
    place = jax.lax.broadcasted_iota(jnp.float32, (1,) * flip.ndim + (side, 1), flip.ndim)
    place = jnp.where(flip[..., None, None], side - 1 - place, place)
    pixel = jax.lax.broadcasted_iota(jnp.float32, (1,) * flip.ndim + (1, size), flip.ndim + 1)
    scale = length / side
    distance = start + (place + 0.5) * scale - (pixel + 0.5)
    weight = jnp.maximum(1.0 - jnp.abs(distance) / jnp.maximum(scale, 1.0), 0.0)
    weight = jnp.where((pixel >= start) & (pixel < start + length), weight, 0.0)
    return weight / weight.sum(-1, keepdims=True)


def turn(images: jax.Array, turns: jax.Array) -> jax.Array:
    """Transposes what is turned oddly and puts the channels last: (N, V, side, side, 3)."""
    odd = (turns % 2 == 1)[..., None, None, None]
    return jnp.where(odd, jnp.einsum("nvycx->nvxyc", images), jnp.einsum("nvycx->nvyxc", images))


def jitter(images: jax.Array, place: jax.Array, factors: jax.Array) -> jax.Array:
    """Brightness, contrast, saturation and hue, each once, in the order of `place` (N, V, 4).

    Hue splits the chain: what comes before it and after it are runs of `affine`. The mean
    that contrast needs is taken in a pass of its own, over the operations before contrast.
    """
    rgb = tuple(images[..., c, :] for c in range(3))
    before = place < place[..., CONTRAST, None]
    unchanged = jnp.zeros(place.shape[:2], images.dtype)
    mean = luma(_chain(rgb, place, _neutral_unless(before, factors), unchanged)).mean((-2, -1))
    return jnp.stack(_chain(rgb, place, factors, mean), axis=-2)


def greyscale(images: jax.Array, grey: jax.Array) -> jax.Array:
    """Luma in all three channels where `grey` (N, V)."""
    value = luma(tuple(images[..., c, :] for c in range(3)))[..., None, :]
    return jnp.where(grey[..., None, None, None], value, images)


def blur(images: jax.Array, sigma: jax.Array) -> jax.Array:
    """Gaussian of `sigma` (N, V) px, taps 2*int(0.1*side/2)+1, edges reflected."""
    matrix = blur_matrix(sigma, images.shape[-1])
    N, V, side = images.shape[:3]
    tall = jnp.einsum("nvyi,nvik->nvyk", matrix, images.reshape(N, V, side, 3 * side))
    wide = jnp.einsum("nvki,nvxi->nvkx", tall.reshape(N, V, side * 3, side), matrix)
    return wide.reshape(images.shape)


def blur_matrix(sigma: jax.Array, side: int) -> jax.Array:
    """(..., side, side): blurs one axis; the identity where sigma is 0."""
    radius = int(0.1 * side / 2)
    sigma = sigma[..., None, None]
    to = jax.lax.broadcasted_iota(jnp.int32, (1,) * (sigma.ndim - 2) + (side, side), sigma.ndim - 2)
    source = jax.lax.broadcasted_iota(jnp.int32, to.shape, sigma.ndim - 1)
    # A pixel is met up to three times: itself, mirrored in the first and in the last pixel.
    seen = (to - source, to + source, 2 * (side - 1) - to - source)
    edge = (source >= 0, source > 0, source < side - 1)
    weight = sum(
        jnp.where(e & (abs(d) <= radius), _gauss(d, sigma), 0.0)
        for d, e in zip(seen, edge, strict=True)
    )
    return weight / weight.sum(-1, keepdims=True)


def luma(rgb: tuple[jax.Array, jax.Array, jax.Array]) -> jax.Array:
    """Grey value of RGB planes, with torchvision's weights (ITU-R BT.601)."""
    red, green, blue = rgb
    return 0.2989 * red + 0.587 * green + 0.114 * blue


def affine(rgb, scale, grey, offset):
    """clip(scale * rgb + grey * luma + offset) to 0..1; the three factors are (N, V).

    Brightness f is (f, 0, 0), saturation (f, 1 - f, 0), contrast (f, 0, (1 - f) * mean luma).
    """
    scale, grey, offset = (a[..., None, None] for a in (scale, grey, offset))
    shared = grey * luma(rgb) + offset
    return tuple(jnp.clip(scale * plane + shared, 0.0, 1.0) for plane in rgb)


def hue(rgb, shift):
    """Turns the hue by `shift` (N, V) of a full turn, as through HSV and back."""
    red, green, blue = rgb
    most = jnp.maximum(jnp.maximum(red, green), blue)
    chroma = most - jnp.minimum(jnp.minimum(red, green), blue)
    inverse = 1.0 / jnp.where(chroma == 0, 1.0, chroma)
    sextant = jnp.where(
        most == red,
        (green - blue) * inverse,
        jnp.where(most == green, 2.0 + (blue - red) * inverse, 4.0 + (red - green) * inverse),
    )
    sextant = sextant + 6.0 * shift[..., None, None]

    def plane(offset: float) -> jax.Array:
        k = sextant + offset
        k = k - 6.0 * jnp.floor(k / 6.0)
        return most - chroma * jnp.clip(jnp.minimum(k, 4.0 - k), 0.0, 1.0)

    return plane(5.0), plane(3.0), plane(1.0)


def _chain(rgb, place, factors, mean):
    """The four operations in order, `affine` in the slots before and after hue."""
    at_hue = place[..., HUE]
    for slot in range(3):
        rgb = affine(rgb, *_slot(slot, place, factors, mean, slot < at_hue))
    rgb = hue(rgb, factors[..., HUE])
    for slot in range(1, 4):
        rgb = affine(rgb, *_slot(slot, place, factors, mean, slot > at_hue))
    return rgb


def _slot(slot, place, factors, mean, used):
    """Factors of `affine` for what stands in `slot`; those of the identity unless `used`."""

    def stands(operation: int) -> jax.Array:
        return used & (place[..., operation] == slot)

    scale = jnp.ones_like(mean)
    for operation in (BRIGHTNESS, CONTRAST, SATURATION):
        scale = jnp.where(stands(operation), factors[..., operation], scale)
    grey = jnp.where(stands(SATURATION), 1.0 - scale, 0.0)
    offset = jnp.where(stands(CONTRAST), (1.0 - scale) * mean, 0.0)
    return scale, grey, offset


def _neutral_unless(used: jax.Array, factors: jax.Array) -> jax.Array:
    return jnp.where(
        used, factors, jnp.broadcast_to(jnp.array([1.0, 1.0, 1.0, 0.0]), factors.shape)
    )


def _gauss(distance: jax.Array, sigma: jax.Array) -> jax.Array:
    spread = jnp.where(sigma > 0, sigma, 1e-3)  # of 1e-3, all but the pixel itself is 0
    return jnp.exp(-0.5 * jnp.square(distance.astype(jnp.float32) / spread))


def _permutation(key: jax.Array, n: int) -> jax.Array:
    """Rank of each of n draws: a random permutation without a sort."""
    draw = jax.random.uniform(key, (n,))
    index = jnp.arange(n, dtype=jnp.int32)
    tie = (draw[:, None] == draw[None]) & (index[:, None] > index[None])
    return ((draw[:, None] > draw[None]) | tie).sum(1).astype(jnp.int32)


def _ranges(config: AugmentConfig) -> list[tuple[float, float]]:
    *strengths, shift = JITTER[config.jitter]
    return [(max(0.0, 1.0 - s), 1.0 + s) for s in strengths] + [(-shift, shift)]
