"""Masks as pictures: class ids in a palette, and classes painted over the image, with a legend.

Rows are taken as they come, so that a slide's mask never lies in memory whole.
"""

from __future__ import annotations

import os
import struct
import zlib
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from jaxhisto.errors import RunError

Pixels = NDArray[np.uint8]

COLOURS = (
    (128, 128, 128), (0, 158, 115), (230, 159, 0), (0, 114, 178), (240, 228, 66), (213, 94, 0),
    (86, 180, 233), (0, 0, 0),
)  # fmt: skip
"""Of classes 0, 1, ...; Okabe and Ito's, told apart by the colour-blind, less the pink of H&E."""
LINE, SWATCH = 22, 14  # of the legend, px
PNG_START = b"\x89PNG\r\n\x1a\n"
LEAST_IDAT = 1 << 20


def colours(classes: int) -> Pixels:
    """(C, 3) uint8; after those of `COLOURS`, evenly spaced hues."""
    extra = max(classes - len(COLOURS), 0)
    hues = (np.arange(extra) * 137.508 / 2 % 180).astype(np.uint8)  # the golden angle
    hsv = np.stack([hues, np.full(extra, 200, np.uint8), np.full(extra, 200, np.uint8)], -1)
    more = cv2.cvtColor(hsv[None], cv2.COLOR_HSV2RGB)[0] if extra else np.zeros((0, 3), np.uint8)
    return np.concatenate([np.array(COLOURS, np.uint8), more])[:classes]


class MaskPNG:
    """Writes a PNG of class ids row by row; its palette shows the classes in `colours`.

    The file appears whole or not at all: under another name until `close`, which is always the
    same, so that what a kill left of it is not left for ever.
    """

    def __init__(self, path: Path, height: int, width: int, classes: int) -> None:
        self.path, self._half = path, path.with_name(f".{path.name}.half")
        self._rows, self._width = height, width
        self._squeeze, self._held = zlib.compressobj(6), bytearray()
        try:
            self._file = self._half.open("wb")
            self._file.write(PNG_START)
            # 8 bits, palette, deflate, no filter but each row's own, not interlaced
            self._chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 3, 0, 0, 0))
            palette = np.zeros((256, 3), np.uint8)
            palette[:classes] = colours(classes)
            self._chunk(b"PLTE", palette.tobytes())
        except OSError as error:
            raise _cannot_write(path, error) from error

    def write(self, ids: Pixels) -> None:
        """(h, width) uint8, the next rows."""
        lines = np.zeros((len(ids), self._width + 1), np.uint8)  # before each row: no filter
        lines[:, 1:] = ids
        self._rows -= len(ids)
        self._held += self._squeeze.compress(lines.tobytes())
        if len(self._held) >= LEAST_IDAT:
            self._data()

    def close(self) -> None:
        """Ends the file, once all rows are written."""
        if self._rows:
            raise ValueError(f"{self.path}: {self._rows} rows are missing")
        self._held += self._squeeze.flush()
        try:
            self._data()
            self._chunk(b"IEND", b"")
            self._file.close()
            os.replace(self._half, self.path)
        except OSError as error:
            raise _cannot_write(self.path, error) from error

    def __enter__(self) -> MaskPNG:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            if kind is None:
                self.close()
        finally:
            self._file.close()
            self._half.unlink(missing_ok=True)

    def _data(self) -> None:
        try:
            self._chunk(b"IDAT", bytes(self._held))
        except OSError as error:
            raise _cannot_write(self.path, error) from error
        self._held.clear()

    def _chunk(self, kind: bytes, data: bytes) -> None:
        self._file.write(struct.pack(">I", len(data)) + kind + data)
        self._file.write(struct.pack(">I", zlib.crc32(kind + data)))


class Overlay:
    """An image with its classes painted over it, shrunk by a whole factor; class 0 is not painted.

    Args:
      height, width: of the image.
      classes: C.
      longest: side of the picture at most, px.
      opacity: of the paint, 0..1.
    """

    def __init__(
        self, height: int, width: int, classes: int, longest: int = 2048, opacity: float = 0.4
    ) -> None:
        self._factor = -(-max(height, width) // longest)
        self._classes, self._opacity = classes, opacity
        self._rgb: Pixels = np.zeros((0, width, 3), np.uint8)
        self._ids: Pixels = np.zeros((0, width), np.uint8)
        self._done: list[tuple[Pixels, Pixels]] = []

    def write(self, rgb: Pixels, ids: Pixels) -> None:
        """The next rows: (h, width, 3) and (h, width) uint8."""
        self._rgb = np.concatenate([self._rgb, rgb])
        self._ids = np.concatenate([self._ids, ids])
        whole = len(self._ids) // self._factor * self._factor
        if whole:
            self._shrink(whole)

    def picture(self) -> Pixels:
        """(h, w, 3) uint8, of all rows so far."""
        if len(self._ids):
            self._shrink(len(self._ids))
        rgb, ids = (np.concatenate(parts) for parts in zip(*self._done, strict=True))
        return painted(rgb, ids, self._classes, self._opacity)

    def _shrink(self, rows: int) -> None:
        rgb, ids = self._rgb[:rows], self._ids[:rows]
        self._rgb, self._ids = self._rgb[rows:], self._ids[rows:]
        if self._factor > 1:
            high, wide = (-(-length // self._factor) for length in ids.shape)
            rgb = np.asarray(cv2.resize(rgb, (wide, high), interpolation=cv2.INTER_AREA), np.uint8)
            at = [
                np.minimum(np.arange(n) * self._factor + self._factor // 2, length - 1)
                for n, length in ((high, rows), (wide, ids.shape[1]))
            ]
            ids = ids[np.ix_(*at)]
        self._done.append((rgb, ids))


def painted(rgb: Pixels, ids: Pixels, classes: int, opacity: float = 0.4) -> Pixels:
    """(h, w, 3) uint8 with the colours of its classes (h, w) laid over it, their borders in full.

    Class 0 and what is nowhere (255) are left as they are.
    """
    shown = (ids > 0) & (ids < classes)
    paint = colours(classes)[np.minimum(ids, classes - 1)]
    share = np.where(shown & borders(ids), 1.0, opacity)[..., None]
    mixed = np.rint(rgb * (1 - share) + paint * share).astype(np.uint8)
    return np.where(shown[..., None], mixed, rgb)


def borders(ids: Pixels) -> NDArray[np.bool_]:
    """(h, w): pixels with another class above, below, left or right of them."""
    edge = np.zeros(ids.shape, bool)
    down, right = ids[1:] != ids[:-1], ids[:, 1:] != ids[:, :-1]
    edge[1:] |= down
    edge[:-1] |= down
    edge[:, 1:] |= right
    edge[:, :-1] |= right
    return edge


def with_legend(picture: Pixels, names: Sequence[str], shares: Sequence[float]) -> Pixels:
    """The picture with a line a class below it: its colour, its name, its share of the pixels."""
    font = ImageFont.load_default()
    texts = [f"{n}  {s:.1%}" for n, s in zip(names, shares, strict=True)]
    texts[0] += "  (not painted)"
    needed = LINE + SWATCH + max(int(font.getlength(text)) for text in texts) + LINE
    height, width = picture.shape[:2]
    sheet = np.full((height + LINE * len(texts) + LINE // 2, max(width, needed), 3), 255, np.uint8)
    sheet[:height, :width] = picture
    image = Image.fromarray(sheet)
    draw = ImageDraw.Draw(image)
    for i, (text, colour) in enumerate(zip(texts, colours(len(names)).tolist(), strict=True)):
        top = height + LINE // 4 + LINE * i + (LINE - SWATCH) // 2
        box = (SWATCH // 2, top, SWATCH // 2 + SWATCH, top + SWATCH)
        draw.rectangle(box, fill=tuple(colour) if i else None, outline=(0, 0, 0))
        draw.text((LINE + SWATCH // 2, top + 1), text, fill=(0, 0, 0), font=font)
    return np.asarray(image)


def write_png(path: Path, picture: Pixels) -> None:
    """An RGB picture as a PNG, whole or not at all."""
    half = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        Image.fromarray(picture).save(half, format="PNG")
        os.replace(half, path)
    except OSError as error:
        raise _cannot_write(path, error) from error
    finally:
        half.unlink(missing_ok=True)


def _cannot_write(path: Path, error: OSError) -> RunError:
    return RunError(
        f"{path}: cannot be written ({error.strerror}); make room, or mend permissions."
    )
