"""Curves that agree and curves that do not; and the network's own, at length."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest

from jaxhisto.bench import curves
from jaxhisto.config import ModelConfig, PretrainConfig
from jaxhisto.models.convolution import convolutions

CONFIG = PretrainConfig(
    out="", batch_size=16, tile_px=32, precision="f32", model=ModelConfig(name="resnet10")
)


def test_distances_by_hand():
    plain = np.full(40, 2.0)
    other, control = plain.copy(), plain.copy()
    other[:4] += [0.0, -0.3, 0.1, 0.0]
    other[curves.FIRST] += 9.0  # beyond the first steps, before the last quarter
    other[-10:] += [0.2, -0.2] * 5
    control[-10:] += 0.1
    control[0] -= 0.05
    found = curves.agreement(plain, other, control)
    assert (found.first, found.control_first) == pytest.approx((0.3, 0.05))
    assert (found.last, found.control_last) == pytest.approx((0.2, 0.1))
    assert (found.mean, found.control_mean, found.size) == pytest.approx((0.0, 0.1, 2.0))


def test_the_control_moves_weights_by_a_rounding():
    import jax

    weights = jax.numpy.asarray(np.random.default_rng(0).normal(size=1000), np.float32)
    moved = np.asarray(curves.moved(weights, np.random.default_rng(1)))
    away = np.abs(moved / np.asarray(weights) - 1)
    assert 0 < away.max() <= 4 * curves.ROUNDING
    assert (away > 0).mean() > 0.9


def test_tiles_are_all_others():
    tiles = curves.made_tiles(64, 32).astype(float)
    flat = tiles.reshape(64, -1)
    nearest = min(np.abs(flat[i] - flat[j]).mean() for i in range(64) for j in range(i))
    assert nearest > 10


@pytest.mark.slow
def test_the_fast_step_trains_as_the_plain_one(tmp_path):
    """The fast form stays as near to the plain one as that does to itself from weights that are
    rounded otherwise: 100 steps; benchmarks/loss_curves.py takes 200."""
    forms = {form: partial(convolutions, form) for form in ("plain", "fast")}
    found = curves.loss_curves(CONFIG, 100, forms)
    near = curves.agreement(found["plain"], found["fast"], found[curves.CONTROL])
    assert near.first < 1e-4
    assert near.last < 3 * near.control_last
    assert abs(near.mean) < 0.02 * near.size
    assert found["plain"][-25:].mean() < found["plain"][:25].mean() - 0.1  # it learns
    assert curves.draw(found, tmp_path / "curves.png").stat().st_size > 10_000
