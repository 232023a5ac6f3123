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
from jaxhisto.view_params import (
    BRIGHTNESS,
    CONTRAST,
    HUE,
    NEUTRAL,
    SATURATION,
    ViewParams,
    draw_views,
)


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
    rows: jax.Array | None = None,
) -> jax.Array:
    """Two random views of each tile.

    Args:
      key: of this step; the parameters of row r, view v depend on (key, r, v) alone.
      tiles: (N, H, W, 3) uint8 RGB, content at the top left; N may be sharded.
      sizes: (N, 2) int32, height and width of the content; what lies outside is never read.
      side: of a view, px.
      config: strengths and probabilities.
      dtype: of the views.
      rows: (N,) int32, the numbers r of these tiles; none: 0 to N - 1, a whole batch.

    Returns:
      (N, 2, side, side, 3), RGB in 0..1, sharded as `tiles`.
    """
    params = draw_views(key, sizes, config, rows=rows)
    return apply_views(params, tiles, side, config, dtype)


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
    rows, columns = cuts(params)
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


def cuts(params: ViewParams) -> tuple[Cut, Cut]:
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
    rows, columns = cuts(params)
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
