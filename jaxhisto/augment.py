"""The random views of a tile, made on the device (paper: App. C).

A view is crop -> turn and flip -> colour jitter -> grey -> blur, with parameters of its own
for each (row, view). There are two forms of the same arithmetic: batched products with small
matrices, which need no gather and run on matrix units, and sums over the few pixels that
count, which a CPU does sooner. No image leaves the device that holds its tile.

Every operation agrees with torchvision's at the same parameters within 2/255 in float32, also
where the device multiplies matrices in TF32 (10 bits of mantissa; pixels are exact in it);
geometry and blur with bfloat16 operands within 4/255. In between, a batch of views is
(N, V, y, 3, x), a single one (3, y, x), RGB in 0..1.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable
from functools import partial, reduce
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh
from jax.sharding import PartitionSpec as P
from jax.typing import DTypeLike

from jaxhisto.config import AugmentConfig
from jaxhisto.transforms import (
    Cut,
    Planes,
    Taps,
    affine,
    blur_matrix,
    blur_weights,
    brightness,
    contrast,
    hue,
    luma,
    mean_luma,
    resize_matrix,
    resize_taps,
    saturation,
)

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


class Slots(NamedTuple):
    """The colour operations of each view; (scale, grey, mean) are the factors of `affine`."""

    prefix: jax.Array
    """(N, V, 3, 4) float32: what comes before contrast, two slots each side of hue."""
    whole: jax.Array
    """(N, V, 3, 6) float32: all, three slots each side of hue."""
    hue: jax.Array
    """(N, V, 2) float32: shift of hue in the prefix and in the whole, turns."""
    grey: jax.Array
    """(N, V) bool: turned grey in the end."""


def two_views(
    key: jax.Array,
    tiles: jax.Array,
    sizes: jax.Array,
    side: int,
    config: AugmentConfig,
    dtype: DTypeLike = jnp.float32,
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


def apply_views(
    params: ViewParams,
    tiles: jax.Array,
    side: int,
    config: AugmentConfig,
    dtype: DTypeLike = jnp.float32,
) -> jax.Array:
    """Carries out `params` on `tiles` (N, H, W, 3) uint8: (N, V, side, side, 3) in 0..1.

    Of `config` only the shape of the work is used: what it switches off is not computed.
    Every device works on its own rows: nothing is sent.
    """
    work = partial(_local_views, side=side, config=config, dtype=dtype)
    mesh, rows = _row_sharding(tiles)
    if rows is not None:
        work = jax.shard_map(work, mesh=mesh, in_specs=(rows, rows), out_specs=rows)
    return work(params, tiles)


def _row_sharding(tiles: jax.Array) -> tuple[AbstractMesh, P | None]:
    """The mesh in use and how it splits the rows of `tiles`; None: not at all."""
    mesh = jax.sharding.get_abstract_mesh()
    typed = jax.typeof(tiles).sharding
    mesh = typed.mesh if mesh.empty else mesh
    if mesh.empty or mesh.manual_axes:
        return mesh, None
    if mesh.are_all_axes_explicit:
        return mesh, P(typed.spec[0])
    # Axes that XLA shards by itself are not in the type; the batch is split over all of them.
    return mesh, P(mesh.axis_names) if tiles.shape[0] % mesh.size == 0 else None


def _local_views(
    params: ViewParams, tiles: jax.Array, *, side: int, config: AugmentConfig, dtype: DTypeLike
) -> jax.Array:
    """`apply_views` on one device, in the form that is fast there."""
    return jax.lax.platform_dependent(
        params,
        tiles,
        cpu=partial(views_by_taps, side=side, config=config, dtype=dtype),
        default=partial(views_by_products, side=side, config=config, dtype=dtype),
    )


def views_by_products(
    params: ViewParams,
    tiles: jax.Array,
    side: int,
    config: AugmentConfig,
    dtype: DTypeLike = jnp.float32,
) -> jax.Array:
    """`apply_views` with matrices for crop and blur: no gather, and matrix units do the work.

    Elements of the matrices and images are of `dtype` in the products, sums are float32.
    """
    _, H, W, _ = tiles.shape
    rows, columns = _axes(params)
    matrices = (resize_matrix(rows, H, side), resize_matrix(columns, W, side))
    images = crop_resize(tiles, *(m.astype(dtype) for m in matrices))
    images = _recolour(images, colour_slots(params), config)
    if config.blur_probability > 0:
        images = blur(images, blur_matrix(params.sigma, side).astype(dtype))
    return turn(images, params.turns).astype(dtype)


def _recolour(images: jax.Array, slots: Slots, config: AugmentConfig) -> jax.Array:
    if config.jitter != "none" and config.jitter_probability > 0:
        images = jitter(images, slots)
    if config.grey_probability > 0:
        grey = luma(_planes(images))[..., None, :]
        images = jnp.where(slots.grey[..., None, None, None], grey, images)
    return images


def crop_resize(tiles: jax.Array, rows: jax.Array, columns: jax.Array) -> jax.Array:
    """Crops, resizes and flips `tiles` (N, H, W, 3) uint8 with two `resize_matrix`.

    Returns:
      (N, V, side, 3, side) float32 in 0..1; the transposition of an odd turn is left to `turn`.
    """
    N, H, W, _ = tiles.shape
    V, side = rows.shape[1:3]
    planes = jnp.transpose(tiles, (0, 1, 3, 2)).reshape(N, H, 3 * W).astype(rows.dtype)
    product = partial(jnp.einsum, preferred_element_type=jnp.float32)
    # All views in one product, whose right side is the tile, line after line.
    tall = product("nyh,nhk->nyk", rows.reshape(N, V * side, H), planes)
    tall = (tall / 255.0).astype(rows.dtype).reshape(N, V, side * 3, W)
    return product("nvkw,nvxw->nvkx", tall, columns).reshape(N, V, side, 3, side)


def _axes(params: ViewParams) -> tuple[Cut, Cut]:
    """The crop's rows and columns, with turns as flips."""
    odd = params.turns % 2 == 1
    # A turn is flips and, if odd, a transposition, which is left to the end. What then flips
    # the rows of the result has to flip the columns before it.
    flip_y = params.flip_y ^ ((params.turns == 1) | (params.turns == 2))
    flip_x = params.flip_x ^ ((params.turns == 2) | (params.turns == 3))
    top, left, height, width = jnp.moveaxis(params.crop, -1, 0)
    rows = Cut(top, height, jnp.where(odd, flip_x, flip_y))
    return rows, Cut(left, width, jnp.where(odd, flip_y, flip_x))


def turn(images: jax.Array, turns: jax.Array) -> jax.Array:
    """Transposes what is turned oddly and puts the channels last: (N, V, side, side, 3)."""
    odd = (turns % 2 == 1)[..., None, None, None]
    return jnp.where(odd, jnp.einsum("nvycx->nvxyc", images), jnp.einsum("nvycx->nvyxc", images))


def jitter(images: jax.Array, slots: Slots) -> jax.Array:
    """Brightness, contrast, saturation and hue, each once, in the order `slots` were made for.

    Hue splits the chain: what comes before it and after it are runs of `affine`. The mean
    that contrast needs is taken in a pass of its own, over the operations before contrast.
    """
    rgb = _planes(images)
    mean = jnp.zeros(slots.grey.shape)
    mean = mean_luma(_chain(rgb, slots.prefix, slots.hue[..., 0], mean))
    return jnp.stack(_chain(rgb, slots.whole, slots.hue[..., 1], mean), axis=-2)


def colour_slots(params: ViewParams) -> Slots:
    """Sorts the four operations of each view into slots around hue."""
    place, factors = params.place, params.factors
    early = place < place[..., CONTRAST, None]
    neutral = jnp.broadcast_to(jnp.array(NEUTRAL), factors.shape)
    prefix = jnp.where(early, factors, neutral)
    at_hue = place[..., HUE]

    def run(factors: jax.Array, before: range, after: range) -> jax.Array:
        slots = [_slot(slot, place, factors, slot < at_hue) for slot in before]
        slots += [_slot(slot, place, factors, slot > at_hue) for slot in after]
        return jnp.stack(slots, axis=-1)

    return Slots(
        prefix=run(prefix, range(2), range(1, 3)),
        whole=run(factors, range(3), range(1, 4)),
        hue=jnp.stack([prefix[..., HUE], factors[..., HUE]], axis=-1),
        grey=params.grey,
    )


def _slot(slot: int, place: jax.Array, factors: jax.Array, used: jax.Array) -> jax.Array:
    """(N, V, 3): factors of `affine` for what stands in `slot`, if `used`, else of nothing."""

    def stands(operation: int) -> jax.Array:
        return used & (place[..., operation] == slot)

    scale = jnp.ones(used.shape)
    for operation in (BRIGHTNESS, CONTRAST, SATURATION):
        scale = jnp.where(stands(operation), factors[..., operation], scale)
    grey = jnp.where(stands(SATURATION), 1.0 - scale, 0.0)
    mean = jnp.where(stands(CONTRAST), 1.0 - scale, 0.0)
    return jnp.stack([scale, grey, mean], axis=-1)


def _chain(rgb: Planes, slots: jax.Array, shift: jax.Array, mean: jax.Array) -> Planes:
    """Half of `slots` (N, V, 3, n) as `affine`, then hue, then the other half."""
    count = slots.shape[-1]
    for i in range(count):
        if i == count // 2:
            rgb = hue(rgb, shift[..., None, None])
        scale, grey, offset = (slots[..., k, i] for k in range(3))
        factors = (scale, grey, offset * mean)
        rgb = affine(rgb, *(a[..., None, None] for a in factors))
    return rgb


def blur(images: jax.Array, matrix: jax.Array) -> jax.Array:
    """Blurs with `blur_matrix`: taps 2*int(0.1*side/2)+1, edges reflected."""
    N, V, side = images.shape[:3]
    product = partial(jnp.einsum, preferred_element_type=jnp.float32)
    lines = images.reshape(N, V, side, 3 * side).astype(matrix.dtype)
    tall = product("nvyi,nvik->nvyk", matrix, lines).reshape(N, V, side * 3, side)
    return product("nvki,nvxi->nvkx", tall.astype(matrix.dtype), matrix).reshape(images.shape)


def _planes(images: jax.Array) -> Planes:
    return images[..., 0, :], images[..., 1, :], images[..., 2, :]


def views_by_taps(
    params: ViewParams,
    tiles: jax.Array,
    side: int,
    config: AugmentConfig,
    dtype: DTypeLike = jnp.float32,
) -> jax.Array:
    """`apply_views` as sums over the few pixels that count, one view after the other.

    On a CPU this is several times faster: products with zero are saved, the branches of a
    view that is not jittered or blurred are not taken, and an image stays in the cache.
    """
    _, H, W, _ = tiles.shape
    rows, columns = _axes(params)
    # Weights are made before the loop: inside, XLA would compute them anew for each pixel.
    weights = (
        resize_taps(rows, H, side),
        resize_taps(columns, W, side),
        blur_weights(params.sigma, side),
    )
    view = partial(_view_by_taps, side=side, config=config)

    def row(inputs: tuple) -> jax.Array:
        tile, of_views = inputs
        planes = jnp.transpose(tile, (2, 0, 1))
        return jax.lax.map(lambda of_view: view(planes, *of_view).astype(dtype), of_views)

    return jax.lax.map(row, (tiles, (params, *weights)))


def _view_by_taps(
    planes: jax.Array,
    params: ViewParams,
    rows: Taps,
    columns: Taps,
    blur_weight: jax.Array,
    *,
    side: int,
    config: AugmentConfig,
) -> jax.Array:
    """One view (side, side, 3) of the tile `planes` (3, H, W); leaves without (N, V)."""
    image = crop_resize_taps(planes, rows, columns)
    if config.jitter != "none" and config.jitter_probability > 0:
        neutral = (params.factors == jnp.array(NEUTRAL)).all()
        image = _unless(neutral, partial(jitter_in_order, params=params), image)
    if config.grey_probability > 0:
        image = _unless(~params.grey, _all_luma, image)
    if config.blur_probability > 0:
        image = _unless(params.sigma == 0, partial(blur_taps, weight=blur_weight), image)
    return jnp.where(params.turns % 2 == 1, image.transpose(2, 1, 0), image.transpose(1, 2, 0))


def _unless(skip: jax.Array, work: Callable[[jax.Array], jax.Array], image: jax.Array) -> jax.Array:
    return jax.lax.cond(skip, lambda image: image, work, image)


def crop_resize_taps(planes: jax.Array, rows: Taps, columns: Taps) -> jax.Array:
    """`crop_resize` of one view with two `resize_taps`: (3, side, side)."""
    lines = (planes.at[:, y].get(mode="promise_in_bounds") for y in rows.pixel)
    tall = _total(
        weight[None, :, None] * line.astype(jnp.float32)
        for weight, line in zip(rows.weight, lines, strict=True)
    )

    def widen(plane: jax.Array) -> jax.Array:
        return _total(
            weight[None] * plane.at[:, x].get(mode="promise_in_bounds")
            for x, weight in zip(columns.pixel, columns.weight / 255.0, strict=True)
        )

    return jax.lax.map(widen, tall)


def jitter_in_order(image: jax.Array, params: ViewParams) -> jax.Array:
    """`jitter` of one view (3, side, side), operation after operation."""
    operations = (brightness, contrast, saturation, hue)

    def step(place: int | jax.Array, rgb: Planes) -> Planes:
        operation = jnp.argmax(params.place == place)
        return jax.lax.switch(operation, operations, rgb, params.factors[operation])

    return jnp.stack(jax.lax.fori_loop(0, 4, step, (image[0], image[1], image[2])))


def _all_luma(image: jax.Array) -> jax.Array:
    return jnp.broadcast_to(luma((image[0], image[1], image[2]))[None], image.shape)


def blur_taps(image: jax.Array, weight: jax.Array) -> jax.Array:
    """`blur` of one view (3, side, side) with `blur_weights`, as sums of shifted planes."""
    side, radius = image.shape[-1], weight.shape[0] // 2
    for axis in (1, 2):
        pad = [(radius, radius) if i == axis else (0, 0) for i in range(3)]
        soften = partial(_weighted_shifts, weight=weight, side=side, axis=axis - 1)
        # A loop over the planes: XLA would fuse across and pad anew for each of the taps.
        image = jax.lax.map(soften, jnp.pad(image, pad, mode="reflect"))
    return image


def _weighted_shifts(plane: jax.Array, weight: jax.Array, side: int, axis: int) -> jax.Array:
    return _total(
        weight[i] * jax.lax.slice_in_dim(plane, i, i + side, axis=axis)
        for i in range(weight.shape[0])
    )


def _total(terms: Iterable[jax.Array]) -> jax.Array:
    return reduce(operator.add, terms)


def _ranks(draws: jax.Array) -> jax.Array:
    """Rank of each draw: a random permutation without a sort."""
    index = jnp.arange(draws.shape[0], dtype=jnp.int32)
    one, other = draws[:, None], draws[None]
    tie = (one == other) & (index[:, None] > index[None])
    return ((one > other) | tie).sum(1).astype(jnp.int32)


def _ranges(config: AugmentConfig) -> list[tuple[float, float]]:
    *strengths, shift = JITTER[config.jitter]
    return [(max(0.0, 1.0 - s), 1.0 + s) for s in strengths] + [(-shift, shift)]
