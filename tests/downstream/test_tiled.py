"""Windows, blended, against the whole image at once."""

from __future__ import annotations

from dataclasses import dataclass, field

import jax
import numpy as np
import pytest
from scipy import ndimage

from jaxhisto.distributed import make_mesh
from jaxhisto.downstream.tiled import (
    ImageRaster,
    Windows,
    origins,
    predict_bands,
    predict_image,
    weights,
    windows_of,
)
from jaxhisto.downstream.unet_predict import make_predict
from jaxhisto.errors import ConfigError
from jaxhisto.models import unet

REACH = 20


def blurred(windows: np.ndarray) -> np.ndarray:
    """A network of a known reach, which pads with zeros as a convolution does."""
    kernel = np.random.default_rng(0).random(2 * REACH + 1)
    kernel /= kernel.sum()
    found = windows[..., 0] / 255.0
    for axis in (1, 2):
        found = ndimage.convolve1d(found, kernel, axis, mode="constant")
    share = found
    return np.stack([share, 1 - share], -1).astype(np.float32)


def even(windows: np.ndarray) -> np.ndarray:
    """A network that knows nothing."""
    return np.full((*windows.shape[:3], 3), 1 / 3, np.float32)


def noise(height: int, width: int) -> np.ndarray:
    return np.random.default_rng(height).integers(0, 256, (height, width, 3), np.uint8)


def together(image: np.ndarray, windows: Windows, batch: int = 3) -> np.ndarray:
    bands = list(predict_bands(ImageRaster(image), blurred, 2, windows, batch))
    np.testing.assert_array_equal(np.concatenate([band.rgb for band in bands]), image)
    assert [band.y for band in bands] == np.cumsum([0, *(len(b.rgb) for b in bands)])[:-1].tolist()
    return np.concatenate([band.probabilities for band in bands])


@pytest.mark.parametrize("size", [(150, 237), (96, 300), (33, 31), (5, 200), (128, 128)])
def test_equals_the_whole_image_where_margins_are_as_wide_as_the_network_sees(
    size: tuple[int, int],
) -> None:
    image = noise(*size)
    down, right = (-n % 32 for n in size)
    padded = np.pad(image, ((0, down), (0, right), (0, 0)), "symmetric")
    whole = blurred(padded[None])[0, : size[0], : size[1]]
    np.testing.assert_allclose(together(image, Windows(96, 64, REACH)), whole, atol=1e-6)
    # The test can fail: with no margin, what the windows' edges see shows.
    if max(size) > 128:
        assert np.abs(together(image, Windows(96, 32, 0)) - whole).max() > 1e-3


@pytest.mark.parametrize("length", [32, 64, 96, 128, 160, 416, 1024])
@pytest.mark.parametrize(("side", "overlap", "margin"), [(64, 32, 8), (96, 64, 32), (32, 0, 0)])
def test_weights_add_up_to_one(length: int, side: int, overlap: int, margin: int) -> None:
    windows = Windows(side, overlap, margin)
    at = origins(length, windows)
    high = min(side, length)
    total = np.zeros(length)
    for start, weight in zip(at, weights(at, high, length, margin), strict=True):
        assert start % 32 == 0
        total[start : start + high] += weight
        inside = weight[:margin] if start else weight[:0]
        assert not inside.any()
    np.testing.assert_allclose(total, 1, atol=1e-6)


@dataclass
class Recorded:
    """A raster that notes what is read."""

    pixels: np.ndarray
    asked: list[tuple[int, int]] = field(default_factory=list)

    @property
    def height(self) -> int:
        return len(self.pixels)

    @property
    def width(self) -> int:
        return self.pixels.shape[1]

    def rows(self, start: int, stop: int) -> np.ndarray:
        self.asked.append((start, stop))
        return self.pixels[start:stop]


def test_each_row_is_read_once_and_no_more_than_a_window_ahead() -> None:
    raster, windows = Recorded(noise(333, 70)), Windows(64, 32, 4)
    for band in predict_bands(raster, even, 3, windows):
        assert raster.asked[-1][1] - band.y <= windows.side
    assert [a for a, _ in raster.asked[1:]] == [b for _, b in raster.asked[:-1]]
    assert (raster.asked[0][0], raster.asked[-1][1]) == (0, 333)


def test_equal_probabilities_are_the_lower_class() -> None:
    assert not predict_image(noise(40, 50), even, 3, windows_of(64)).any()


@pytest.mark.parametrize(
    ("side", "overlap", "margin"), [(100, 32, 0), (96, 40, 0), (96, 96, 0), (96, 32, 17)]
)
def test_windows_that_leave_gaps_are_refused(side: int, overlap: int, margin: int) -> None:
    with pytest.raises(ConfigError, match=r"multiple of 32|do not cover"):
        Windows(side, overlap, margin)


@pytest.mark.parametrize("side", [32, 64, 96, 224, 256, 1024])
def test_the_defaults_cover(side: int) -> None:
    windows_of(side)


@pytest.mark.slow
def test_a_unet_in_windows_is_the_unet_on_the_whole_image() -> None:
    """A resnet10 UNet sees 193 px at most: 161 by its kernels, 32 by its strides."""
    params, stats = unet.init("resnet10", 2, seed=0)
    # Sharp probabilities: of a random head all are near a half.
    params["segmentation_head"]["0"]["kernel"] *= 30
    image = noise(64, 640)
    network = make_predict("resnet10", 2, params, stats, (0.5,) * 3, (0.2,) * 3, make_mesh(1))
    whole = network(image[None])[0]
    assert whole.std() > 0.05
    bands = predict_bands(ImageRaster(image), network, 2, Windows(448, 416, 193), batch=1)
    np.testing.assert_allclose(
        np.concatenate([band.probabilities for band in bands]), whole, atol=2e-5
    )
    with jax.default_matmul_precision("float32"):
        narrow = predict_bands(ImageRaster(image), network, 2, Windows(96, 32, 0), batch=1)
        found = np.concatenate([band.probabilities for band in narrow])
    assert np.abs(found - whole).max() > 1e-3  # the test can fail
