"""Image and mask go through the same geometry."""

from __future__ import annotations

import jax
import numpy as np

from jaxhisto.distributed import make_mesh, to_global
from jaxhisto.downstream.augmentation import apply_to_masks, augment_config, augmented
from jaxhisto.training_config import TrainingConfig
from jaxhisto.view_params import draw_views

SIDE, N = 16, 32
TURNS = TrainingConfig(jitter="none")


def squares() -> tuple[np.ndarray, np.ndarray]:
    """Images whose red channel is their mask."""
    images = np.random.default_rng(0).integers(0, 256, (N, SIDE, SIDE, 3), np.uint8)
    return images, images[..., 0]


def seen(config: TrainingConfig, rows: np.ndarray, epoch: int = 0, devices: int = 4) -> tuple:
    images, masks = squares()
    mesh = make_mesh(devices)
    with jax.set_mesh(mesh):
        placed = to_global((rows.astype(np.int32), images, masks), mesh)
        found = jax.jit(augmented, static_argnums=0)(config, np.int32(epoch), *placed)
    return tuple(np.asarray(leaf) for leaf in found)


def test_turns_and_flips_are_the_masks_too() -> None:
    images, masks = seen(TURNS, np.arange(N))
    np.testing.assert_array_equal(np.rint(images[..., 0] * 255).astype(np.uint8), masks)
    # Each is one of the eight of the square's group, by NumPy; all eight come up.
    kinds = []
    for mask, plain in zip(masks, squares()[1], strict=True):
        all_eight = [np.rot90(m, k) for m in (plain, plain[:, ::-1]) for k in range(4)]
        kinds.append([np.array_equal(mask, one) for one in all_eight].index(True))
    assert set(kinds) == set(range(8))


def test_a_function_of_epoch_and_row() -> None:
    first = seen(TURNS, np.arange(N))[1]
    np.testing.assert_array_equal(first, seen(TURNS, np.arange(N), devices=1)[1])
    assert not np.array_equal(first, seen(TURNS, np.arange(N), epoch=1)[1])
    moved = seen(TURNS, np.arange(N) + 7)[1]
    assert not np.array_equal(first, moved)


def test_crops_take_the_pixel_under_the_centre() -> None:
    """Oracle: a loop in NumPy over the drawn box, flips and turns."""
    config = augment_config(TrainingConfig(crop_area=(0.2, 0.9)))
    sizes = np.full((N, 2), SIDE, np.int32)
    masks = squares()[1]

    def both(masks: jax.Array) -> tuple:
        params = draw_views(jax.random.key(3), jax.numpy.asarray(sizes), config, views=1)
        return params, apply_to_masks(params, masks)

    params, found = jax.tree.map(np.asarray, jax.jit(both)(masks))
    for i in range(N):
        top, left, height, width = params.crop[i, 0]
        at = (np.arange(SIDE) + 0.5) / SIDE
        box = masks[i][top : top + height, left : left + width]
        rows, columns = (at * height).astype(int), (at * width).astype(int)
        expected = np.rot90(box[np.ix_(rows, columns)], params.turns[i, 0])
        expected = expected[::-1] if params.flip_y[i, 0] else expected
        expected = expected[:, ::-1] if params.flip_x[i, 0] else expected
        differ = (found[i] != expected).mean()
        # A centre on the line between two pixels is rounded either way when it is flipped.
        on_line = max(np.isclose(at * n % 1, 0).mean() for n in (height, width))
        assert differ <= 2 * on_line, (i, differ)
