"""Masks and overlays as another library reads them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from jaxhisto.downstream import painting
from jaxhisto.downstream.painting import MaskPNG, Overlay, colours, painted, with_legend
from jaxhisto.errors import RunError


def test_a_mask_is_read_back_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(painting, "LEAST_IDAT", 64)  # several chunks
    ids = np.random.default_rng(0).integers(0, 256, (301, 777), np.uint8)
    with MaskPNG(tmp_path / "a.png", *ids.shape, classes=3) as mask:
        for start in range(0, 301, 50):
            mask.write(ids[start : start + 50])
    with Image.open(tmp_path / "a.png") as image:
        image.load()
        assert image.mode == "P"
        np.testing.assert_array_equal(np.asarray(image), ids)
        palette = np.reshape(image.getpalette()[:9], (3, 3))
    np.testing.assert_array_equal(palette, colours(3))
    assert (tmp_path / "a.png").read_bytes().count(b"IDAT") > 2
    assert [p.name for p in tmp_path.iterdir()] == ["a.png"]


def test_a_mask_that_was_not_ended_is_not_there(tmp_path: Path) -> None:
    mask = MaskPNG(tmp_path / "a.png", 10, 10, 2)
    with pytest.raises(KeyError), mask:
        raise KeyError
    with pytest.raises(ValueError, match="5 rows"), MaskPNG(tmp_path / "b.png", 10, 10, 2) as mask:
        mask.write(np.ones((5, 10), np.uint8))
    assert not list(tmp_path.iterdir())


def test_a_folder_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="cannot be written"):
        MaskPNG(tmp_path / "none" / "a.png", 1, 1, 2)


@pytest.mark.parametrize("step", [7, 30, 200])
def test_an_overlay_is_the_same_in_whatever_bands_it_comes(step: int) -> None:
    rng = np.random.default_rng(0)
    rgb, ids = rng.integers(0, 256, (200, 90, 3), np.uint8), rng.integers(0, 3, (200, 90), np.uint8)
    overlay = Overlay(200, 90, 3, longest=70, opacity=0.5)  # a third of the side
    for start in range(0, 200, step):
        overlay.write(rgb[start : start + step], ids[start : start + step])
    picture = overlay.picture()
    assert picture.shape == (67, 30, 3)
    means = rgb[:198].reshape(66, 3, 30, 3, 3).mean((1, 3))
    middles = ids[1:198:3, 1::3]
    around = np.pad(middles, 1, "edge")
    inner = np.ones(middles.shape, bool)
    for y, x in ((0, 1), (2, 1), (1, 0), (1, 2)):
        inner &= around[y : y + 66, x : x + 30] == middles
    share = np.where(inner, 0.5, 1.0) * (middles > 0)
    expected = means + share[..., None] * (colours(3)[middles] - means)
    np.testing.assert_allclose(picture[:65], expected[:65], atol=1.5)


def test_class_0_and_what_is_nowhere_are_not_painted() -> None:
    rgb = np.full((1, 3, 3), 200, np.uint8)
    shown = painted(rgb, np.array([[0, 1, 255]], np.uint8), 2, opacity=1)
    np.testing.assert_array_equal(shown[0, [0, 2]], rgb[0, [0, 2]])
    np.testing.assert_array_equal(shown[0, 1], colours(2)[1])


def test_a_colour_a_class() -> None:
    assert len(np.unique(colours(40), axis=0)) == 40
    np.testing.assert_array_equal(colours(40)[:5], colours(5))


def test_a_legend_shows_each_class_under_the_picture() -> None:
    picture = np.full((10, 20, 3), 7, np.uint8)
    shown = with_legend(picture, ["background", "nuclei"], [0.75, 0.25])
    np.testing.assert_array_equal(shown[:10, :20], picture)
    below = shown[10:].reshape(-1, 3)
    assert (below == colours(2)[1]).all(-1).sum() > 50
    assert not (below == colours(2)[0]).all(-1).any()  # not painted, so not in a colour
