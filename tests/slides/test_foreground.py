"""Detectors against their definitions in scikit-image and numpy, and on real images."""

from __future__ import annotations

import colorsys

import numpy as np
import pytest
from made_slides import BROWN, GLASS, PINK, painted
from PIL import Image
from skimage.color import rgb2hed
from skimage.filters import threshold_otsu
from skimage.morphology import closing, disk

from jaxhisto.slides.foreground import (
    OD_THRESHOLD,
    OTSU_FLOOR,
    ciga2022,
    closed,
    detect,
    foreground,
    optical_density,
    otsu,
    shares,
)
from jaxhisto.slides.reader import Overview


def colours(n: int = 4000) -> np.ndarray:
    """(1, n, 3) uint8, all over the cube."""
    return np.random.default_rng(0).integers(0, 256, (1, n, 3)).astype(np.uint8)


def test_ciga2022_is_violet_to_pink_in_degrees():
    """Against colorsys: hue 255..331.5 degrees, away from the bounds' rounding."""
    rgb = colours()
    hsv = np.array([colorsys.rgb_to_hsv(*(p / 255)) for p in rgb[0]])
    degrees, saturation, value = hsv[:, 0] * 360, hsv[:, 1], hsv[:, 2]
    oracle = (degrees > 255) & (degrees < 331.5)
    oracle &= (saturation > 0.1) & (value > 0.5) & (value < 0.9)
    clear = (np.abs(degrees - 255) > 2) & (np.abs(degrees - 331.5) > 2)
    clear &= np.abs(saturation - 0.1) > 0.01

    assert oracle.sum() > 100
    np.testing.assert_array_equal(ciga2022(rgb)[0][clear], oracle[clear])


@pytest.mark.parametrize("radius", [1, 2.5, 6])
def test_the_close_is_a_close_with_a_disc(radius):
    mask = np.random.default_rng(1).random((60, 80)) < 0.06
    room = np.pad(mask, 12)
    y, x = np.mgrid[-int(radius) : int(radius) + 1, -int(radius) : int(radius) + 1]
    oracle = closing(room.astype(np.uint8), x**2 + y**2 <= radius**2)[12:-12, 12:-12]

    np.testing.assert_array_equal(closed(mask, radius), oracle.astype(bool))
    if radius == 6:
        assert np.array_equal(x**2 + y**2 <= radius**2, disk(6))
    assert closed(mask, 0) is mask


def test_otsu_is_otsu_on_saturation():
    rgb = np.concatenate([painted(64, 64, PINK), painted(64, 64, GLASS, 1)], axis=1)
    top, low = rgb.max(-1).astype(float), rgb.min(-1)
    saturation = np.rint(255 * (top - low) / top)
    oracle = saturation > threshold_otsu(saturation.astype(np.uint8))

    assert np.mean(otsu(rgb) != oracle) < 0.001


def test_otsu_finds_nothing_on_glass():
    assert OTSU_FLOOR > 0
    assert otsu(painted(64, 64, GLASS)).sum() == 0


def test_od_is_haematoxylin_plus_eosin():
    """Against scikit-image's rgb2hed, which scales by log10 of its smallest value, 1e-6."""
    rgb = colours().clip(1)
    hed = rgb2hed(rgb) * 6  # our decadic density
    unit = np.linalg.norm([[0.65, 0.70, 0.29], [0.07, 0.99, 0.11], [0.27, 0.57, 0.78]], axis=1)
    amounts = np.maximum(hed * unit, 0)[..., :2].sum(-1)
    clear = np.abs(amounts - OD_THRESHOLD) > 0.02

    np.testing.assert_array_equal(optical_density(rgb)[clear], amounts[clear] > OD_THRESHOLD)


def test_the_paper_rule_drops_brown_and_otsu_takes_it():
    brown = np.concatenate([painted(64, 64, BROWN), painted(64, 64, GLASS)], axis=1)

    assert not foreground(brown, "ciga2022", 8.0, 100.0).any()
    assert foreground(brown, "otsu", 8.0, 100.0)[:, :64].all()


@pytest.mark.parametrize("detector", ["ciga2022", "otsu", "od"])
def test_real_tissue_beats_real_glass(shared_data, detector):
    def median(kind: str) -> float:
        shares = []
        for path in sorted((shared_data / "tissue_qc" / kind).glob("*.png")):
            rgba = np.asarray(Image.open(path).convert("RGBA").reduce(8))
            rgb = np.ascontiguousarray(rgba[..., :3])
            view = Overview(rgb, rgba[..., 3] == 255, rgba[..., 3] == 255, 8.0)
            shares.append(detect(view, detector, 8.0, 100.0).mean())
        return float(np.median(shares))

    assert median("tissue") > 0.4
    assert median("no_tissue") < 0.1


def test_shares_are_exact_areas():
    """Against counting at level 0, where every mask pixel is a block of pixels."""
    mask = np.random.default_rng(2).random((12, 17)) < 0.5
    level_0 = np.kron(mask, np.ones((5, 5)))
    xs, ys, side = [0, 13, 26, 39, 61], [3, 21, 36], 24
    oracle = [[level_0[y : y + side, x : x + side].mean() for x in xs] for y in ys]

    np.testing.assert_allclose(shares(mask, 5.0, xs, ys, side), oracle, atol=1e-12)


def test_what_is_not_there_is_not_foreground():
    there = np.zeros((8, 8), bool)
    view = Overview(painted(8, 8, PINK), there, ~there, 16.0)

    assert not detect(view, "ciga2022", 8.0, 0.0).any()
