"""Large images and their masks in square windows that neither overlap nor reach over an edge.

The grid starts at the upper left corner; what is left at the right and lower edge and is no whole
window is not used, so that each pixel is scored at most once.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from threading import Lock

import numpy as np
from numpy.typing import NDArray

from jaxhisto.data.named_images import Images
from jaxhisto.errors import StoreError
from jaxhisto.tasks.task import Masks, Window

KEPT = 2  # decoded images kept: windows are mostly read one after the other


def grid(
    names: Sequence[str], sizes: Sequence[tuple[int, int]], side: int
) -> tuple[tuple[Window, ...], float]:
    """The windows of these images, row by row, and the share of pixels outside of all.

    Args:
      sizes: (h, w) of each image, px.

    Raises:
      StoreError: images smaller than a window.
    """
    small = [n for n, (h, w) in zip(names, sizes, strict=True) if min(h, w) < side]
    if small:
        raise StoreError(
            f"{small[0]}: is smaller than a window of {side} px ({len(small):,} images are); pass "
            "a smaller --task.window."
        )
    windows = tuple(
        Window(name, y, x)
        for name, (h, w) in zip(names, sizes, strict=True)
        for y in range(0, h - side + 1, side)
        for x in range(0, w - side + 1, side)
    )
    pixels = sum(h * w for h, w in sizes)
    return windows, 1 - len(windows) * side * side / pixels


def window_name(window: Window) -> str:
    """What a window is called in splits and reports."""
    return f"{window.source} y{window.y} x{window.x}"


@dataclass(frozen=True, eq=False)
class _Cuts:
    """Windows cut from what `whole` gives by the source's row; the newest sources are kept."""

    windows: tuple[Window, ...]
    rows: dict[str, int]
    side: int
    kept: OrderedDict[str, NDArray[np.uint8]] = field(default_factory=OrderedDict, repr=False)
    lock: Lock = field(default_factory=Lock, repr=False)

    def cut(self, i: int, whole: Callable[[int], NDArray[np.uint8]]) -> NDArray[np.uint8]:
        window = self.windows[i]
        with self.lock:
            pixels = self.kept.get(window.source)
        if pixels is None:
            pixels = whole(self.rows[window.source])
            with self.lock:
                self.kept[window.source] = pixels
                while len(self.kept) > KEPT:
                    self.kept.popitem(last=False)
        y, x = window.y, window.x
        return np.ascontiguousarray(pixels[y : y + self.side, x : x + self.side])


class WindowedImages:
    """Windows of image files as images of their own."""

    def __init__(self, images: Images, windows: tuple[Window, ...], side: int) -> None:
        self.names = tuple(window_name(w) for w in windows)
        self._images = images
        self._cuts = _Cuts(windows, {n: i for i, n in enumerate(images.names)}, side)

    def __len__(self) -> int:
        return len(self.names)

    def read(self, i: int) -> NDArray[np.uint8]:
        """Window i, (side, side, 3) uint8 RGB; StoreError as the image's."""
        return self._cuts.cut(i, self._images.read)

    def files(self) -> Mapping[str, Path]:
        """Of the whole images."""
        return self._images.files()


class WindowedMasks:
    """The same windows of the masks."""

    def __init__(
        self, masks: Masks, names: Sequence[str], windows: tuple[Window, ...], side: int
    ) -> None:
        self._masks = masks
        self._cuts = _Cuts(windows, {n: i for i, n in enumerate(names)}, side)

    def read(self, i: int) -> NDArray[np.uint8]:
        """Window i, (side, side) uint8 class ids; StoreError as the mask's."""
        return self._cuts.cut(i, self._masks.read)

    def files(self) -> Mapping[str, Path]:
        """Of the whole masks."""
        return self._masks.files()
