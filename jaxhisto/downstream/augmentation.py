"""What training does to an image and its mask: one geometry for both, colours for the image.

The arithmetic is `augment`'s, with one view an image; a mask takes the class under the centre of
each pixel of the view, none is mixed.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from jaxhisto.augment import apply_views, cuts
from jaxhisto.config import AugmentConfig
from jaxhisto.training_config import TrainingConfig
from jaxhisto.transforms import Cut, centres
from jaxhisto.view_params import ViewParams, draw_views


def augment_config(config: TrainingConfig) -> AugmentConfig:
    """The settings of `augment` that stand for these: no grey, no blur."""
    whole = config.crop_area == (1.0, 1.0)
    return AugmentConfig(
        crop_area=config.crop_area,
        crop_ratio=(1.0, 1.0) if whole else AugmentConfig().crop_ratio,
        rot90=config.rot90,
        flips=config.flips,
        jitter=config.jitter,
        jitter_probability=config.jitter_probability,
        grey_probability=0.0,
        blur_probability=0.0,
    )


def augmented(
    config: TrainingConfig,
    epoch: jax.Array,
    rows: jax.Array,
    images: jax.Array,
    masks: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array | None]:
    """Images as training sees them in an epoch: a function of (seed, epoch, row, image).

    Args:
      config: seed and strengths.
      epoch: () int32.
      rows: (N,) int32, what tells one image from another.
      images: (N, S, S, 3) uint8 RGB, N sharded over `data`.
      masks: (N, S, S) integers, of the images' sharding, or none.

    Returns:
      (N, S, S, 3) float32 in 0..1; the masks after the same geometry.
    """
    key = jax.random.fold_in(jax.random.key(config.seed), epoch)
    settings, side = augment_config(config), images.shape[1]

    def views(key: jax.Array, rows: jax.Array, images: jax.Array) -> jax.Array:
        params = _drawn(key, rows, side, settings)
        return apply_views(params, images, side, settings)[:, 0]

    def regions(key: jax.Array, rows: jax.Array, masks: jax.Array) -> jax.Array:
        return apply_to_masks(_drawn(key, rows, side, settings), masks)

    # The compiler may place what lies inside: each row is its own, so nothing has to move.
    seen = jax.sharding.auto_axes(views)(key, rows, images, out_sharding=P("data"))
    if masks is None:
        return seen, None
    return seen, jax.sharding.auto_axes(regions)(key, rows, masks, out_sharding=P("data"))


def _drawn(key: jax.Array, rows: jax.Array, side: int, settings: AugmentConfig) -> ViewParams:
    sizes = jnp.full((rows.shape[0], 2), side, jnp.int32)
    return draw_views(key, sizes, settings, views=1, rows=rows)


def apply_to_masks(params: ViewParams, masks: jax.Array) -> jax.Array:
    """The geometry of the first view of `params` on (N, S, S) masks, nearest pixel."""
    side = masks.shape[1]
    rows, columns = (_nearest(cut, side) for cut in cuts(params))
    tall = jnp.take_along_axis(masks, rows[:, :, None], axis=1)
    seen = jnp.take_along_axis(tall, columns[:, None, :], axis=2)
    odd = (params.turns[:, 0] % 2 == 1)[:, None, None]
    return jnp.where(odd, seen.transpose(0, 2, 1), seen)


def _nearest(cut: Cut, side: int) -> jax.Array:
    """(N, S) int32: the pixel of the mask under the centre of each of the view's."""
    place = jnp.arange(side, dtype=jnp.float32)[None, None]
    centre, _ = centres(Cut(*(leaf[..., None] for leaf in cut)), place, side)
    # A centre between two pixels of a crop lies in both; rounding may take the last one out.
    return jnp.clip(jnp.floor(centre[:, 0]).astype(jnp.int32), 0, side - 1)
