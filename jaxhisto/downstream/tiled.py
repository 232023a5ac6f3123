"""A UNet over an image of any size: windows that overlap, blended, in bands of rows.

A window's weight along an axis is 0 in its margin and sin^2 between the margins, and flat where
the image itself ends; the weights of all windows at a pixel add up to 1. Windows begin at
multiples of 32 px, where the network's strides begin in the whole image too: with a margin as
wide as the network sees, what comes out is what it gives on the whole image at once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from jaxhisto.errors import ConfigError
from jaxhisto.models.unet import STRIDE

Floats = NDArray[np.float32]
Pixels = NDArray[np.uint8]
Predict = Callable[[Pixels], Floats]
"""(m, h, w, 3) uint8 windows -> (m, h, w, C) probabilities; h and w multiples of 32."""


@dataclass(frozen=True)
class Windows:
    """How an image is covered; px, all multiples of 32 but for the margin.

    Fields:
      side: of a window; along a shorter axis of an image, that axis.
      overlap: of neighbouring windows.
      margin: edge of a window that does not count inside the image.

    Raises:
      ConfigError: no multiples of 32, or windows that leave gaps.
    """

    side: int
    overlap: int
    margin: int

    def __post_init__(self) -> None:
        for name, value in (("window", self.side), ("overlap", self.overlap)):
            if value % STRIDE:
                raise ConfigError(
                    f"--{name}-px {value}: is no multiple of {STRIDE}, which a UNet's windows must "
                    "begin and end at."
                )
        if not self.side - self.overlap > 0 or self.overlap < 2 * self.margin:
            raise ConfigError(
                f"windows of {self.side} px that overlap by {self.overlap} and do not count in a "
                f"margin of {self.margin} px do not cover an image; overlap them by less than a "
                "window and by two margins at least."
            )


def windows_of(side: int, overlap: int | None = None, margin: int | None = None) -> Windows:
    """Windows with the defaults: half of one overlaps, an eighth is margin, less where needed."""
    if overlap is None:
        overlap = side // 2 // STRIDE * STRIDE
    return Windows(side, overlap, min(side // 8, overlap // 2) if margin is None else margin)


class Raster(Protocol):
    """An image that is read by rows."""

    @property
    def height(self) -> int:
        """Rows, px."""

    @property
    def width(self) -> int:
        """Columns, px."""

    def rows(self, start: int, stop: int) -> Pixels:
        """(stop - start, width, 3) uint8 RGB."""


@dataclass(frozen=True)
class ImageRaster:
    """An image in memory, (h, w, 3) uint8 RGB."""

    pixels: Pixels

    @property
    def height(self) -> int:
        return int(self.pixels.shape[0])

    @property
    def width(self) -> int:
        return int(self.pixels.shape[1])

    def rows(self, start: int, stop: int) -> Pixels:
        return self.pixels[start:stop]


@dataclass(frozen=True)
class Band:
    """Rows of an image that are done: `y` is the first one.

    Fields:
      rgb: (h, width, 3) uint8.
      probabilities: (h, width, C) float32 that add up to 1.
    """

    y: int
    rgb: Pixels
    probabilities: Floats


def predict_bands(
    raster: Raster, predict: Predict, classes: int, windows: Windows, batch: int = 8
) -> Iterator[Band]:
    """Runs a network over an image, from top to bottom.

    Memory: the rows of one window, with C float32 probabilities a pixel; not the whole image.

    Args:
      raster: at least one pixel.
      predict: the network.
      classes: C.
      windows: how the image is covered.
      batch: windows that `predict` is given at a time, always as many.
    """
    padded_h, padded_w = (_up(length) for length in (raster.height, raster.width))
    high, wide = min(windows.side, padded_h), min(windows.side, padded_w)
    ys, xs = (origins(n, windows) for n in (padded_h, padded_w))
    weights_y, weights_x = (
        weights(at, side, n, windows.margin)
        for at, side, n in ((ys, high, padded_h), (xs, wide, padded_w))
    )
    sums = np.zeros((high, padded_w, classes), np.float32)
    strip = np.zeros((0, padded_w, 3), np.uint8)
    for j, y in enumerate(ys):
        strip = _next_strip(raster, strip, y, high, padded_w)
        cut = (strip[:, x : x + wide] for x in xs)
        for i, found in enumerate(_predicted(predict, list(cut), batch)):
            weight = weights_y[j][:, None, None] * weights_x[i][None, :, None]
            sums[:, xs[i] : xs[i] + wide] += found * weight
        done = (ys[j + 1] if j + 1 < len(ys) else padded_h) - y
        shown = min(done, raster.height - y)
        yield Band(y, strip[:shown, : raster.width], sums[:shown, : raster.width].copy())
        strip = strip[done:]
        sums = np.concatenate([sums[done:], np.zeros((done, padded_w, classes), np.float32)])


def predict_image(
    pixels: Pixels, predict: Predict, classes: int, windows: Windows, batch: int = 8
) -> Pixels:
    """Class ids (h, w) uint8 of an image (h, w, 3) in memory; equal probabilities: the lower id."""
    bands = predict_bands(ImageRaster(pixels), predict, classes, windows, batch)
    return np.concatenate([band.probabilities.argmax(-1).astype(np.uint8) for band in bands])


def origins(length: int, windows: Windows) -> list[int]:
    """Where windows begin along an axis of `length` px, a multiple of 32."""
    last = max(length - windows.side, 0)
    return [*range(0, last, windows.side - windows.overlap), last]


def weights(at: list[int], side: int, length: int, margin: int) -> Floats:
    """(n, side) float32: the weight of each window along an axis; they add up to 1 everywhere."""
    inner = np.arange(side) - margin + 0.5
    # An axis of the image may be shorter than two margins: then it is one window, and flat.
    ramp = np.sin(np.pi * np.clip(inner / max(side - 2 * margin, 1), 0, 1)) ** 2
    ramp[(inner < 0) | (inner > side - 2 * margin)] = 0
    middle = side // 2
    each = np.tile(ramp, (len(at), 1))
    for i, start in enumerate(at):  # the image's end is no edge of a window
        if start == 0:
            each[i, :middle] = 1
        if start + side == length:
            each[i, middle:] = 1
    total = np.zeros(length)
    for start, weight in zip(at, each, strict=True):
        total[start : start + side] += weight
    shares = [w / total[start : start + side] for start, w in zip(at, each, strict=True)]
    return np.array(shares, np.float32)


def _up(length: int) -> int:
    return -(-length // STRIDE) * STRIDE


def _next_strip(raster: Raster, kept: Pixels, y: int, high: int, wide: int) -> Pixels:
    """Rows y to y + high, mirrored where the image ends; `kept` are the first of them."""
    begin = y + len(kept)
    fresh = raster.rows(begin, min(y + high, raster.height))
    fresh = np.pad(fresh, ((0, 0), (0, wide - raster.width), (0, 0)), "symmetric")
    strip = np.concatenate([kept, fresh])
    return np.pad(strip, ((0, high - len(strip)), (0, 0), (0, 0)), "symmetric")


def _predicted(predict: Predict, cut: list[Pixels], batch: int) -> Iterator[Floats]:
    for start in range(0, len(cut), batch):
        some = cut[start : start + batch]
        filled = [*some, *[some[-1]] * (batch - len(some))]  # of one shape: compiled once
        yield from predict(np.stack(filled))[: len(some)]
