"""The golden tiles: always the same, and stained as H&E is."""

from __future__ import annotations

import hashlib

import cv2
import numpy as np
import pytest

from jaxhisto.golden import golden_tiles


def test_shape_and_type() -> None:
    tiles = golden_tiles(48)
    assert tiles.shape == (8, 48, 48, 3)
    assert tiles.dtype == np.uint8


def test_bytes_never_change() -> None:
    """Stored features belong to these tiles: another byte is another golden file."""
    digest = hashlib.sha256(golden_tiles(64).tobytes()).hexdigest()
    assert digest == "9e9a399b282ad41be1ade42a3684e756a20c7661b87839618c415564138c1df8"


def test_tiles_differ_from_each_other() -> None:
    tiles = golden_tiles(64).astype(float)
    for i in range(8):
        for j in range(i):
            assert np.abs(tiles[i] - tiles[j]).mean() > 5


def test_stained_violet_to_pink_on_a_bright_ground() -> None:
    """By OpenCV's hue: 255..345 degrees wherever there is stain, as in H&E."""
    for tile in golden_tiles(96):
        hsv = cv2.cvtColor(tile, cv2.COLOR_RGB2HSV).astype(float)
        stained = hsv[..., 1] > 0.15 * 255
        hue = 2 * hsv[..., 0][stained]
        assert stained.any()
        assert np.mean((hue > 240) & (hue < 345)) > 0.95
        assert tile.std() > 10


@pytest.mark.parametrize("side", [1, 7, 96])
def test_any_side(side: int) -> None:
    assert golden_tiles(side).shape == (8, side, side, 3)


def test_no_side_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one pixel"):
        golden_tiles(0)
