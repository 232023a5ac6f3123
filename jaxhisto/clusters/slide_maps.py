"""Slides painted with the clusters of their tiles, and one cluster alone (paper: Fig. 6)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from jaxhisto.clusters.sheets import INK, MARGIN, PAPER, QUIET, Colour, draw_bar, fit, font

Pixels = NDArray[np.uint8]
LONGEST = 900  # side of a panel, px
LEGEND = 14  # clusters that a legend names
FRAME = 2  # px around what is highlighted
VIVID: Colour = (0, 160, 255)
FEW: tuple[Colour, ...] = (
    (31, 119, 180), (255, 127, 14), (44, 160, 44), (214, 39, 40), (148, 103, 189),
    (140, 86, 75), (227, 119, 194), (188, 189, 34), (23, 190, 207), (60, 60, 60),
    (255, 215, 0), (0, 100, 0), (0, 0, 160), (255, 105, 97), (0, 255, 170),
    (128, 0, 64), (170, 200, 255), (200, 90, 0), (120, 160, 90), (160, 0, 200),
)  # fmt: skip


@dataclass(frozen=True)
class Base:
    """What is painted on.

    Fields:
      rgb: (h, w, 3) uint8.
      left, top: its corner in level-0 px.
      scale: level-0 px a pixel.
      mpp: um/px at level 0, or none.
      kind: what it is, in words.
    """

    rgb: Pixels
    left: float
    top: float
    scale: float
    mpp: float | None
    kind: str


def colours(centres: NDArray[np.float32]) -> list[Colour]:
    """A colour a cluster: up to 20 that are told apart, beyond that alike for alike clusters.

    Of more than 20 the first three principal components of the centres, by rank, are lightness
    and the two colour axes of Lab.
    """
    k = len(centres)
    if k <= len(FEW):
        return list(FEW[:k])
    x = centres.astype(np.float64) - centres.mean(0)
    axes = np.linalg.svd(x, full_matrices=False)[2][:3]
    # A singular vector's sign is arbitrary: the largest entry is made positive.
    axes *= np.sign(axes[np.arange(len(axes)), np.abs(axes).argmax(1)])[:, None]
    ranks = np.zeros((k, 3))
    ranks[:, : len(axes)] = (x @ axes.T).argsort(0, kind="stable").argsort(0, kind="stable")
    ranks = ranks / (k - 1) - 0.5
    lab = np.stack([58 + 34 * ranks[:, 2], 130 * ranks[:, 0], 130 * ranks[:, 1]], 1)
    rgb = cv2.cvtColor(lab.astype(np.float32)[None], cv2.COLOR_Lab2RGB)[0]
    return [(int(r), int(g), int(b)) for r, g, b in np.clip(255 * rgb, 0, 255)]


def mosaic(
    coords: NDArray[np.int64], spans: NDArray[np.float64], tiles: Sequence[Pixels | None],
    mpp: float | None,
) -> Base:  # fmt: skip
    """A base put together from the tiles themselves, where the slide is not there.

    Args:
      coords: (m, 2) corners in level-0 px.
      spans: (m,) sides.
      tiles: of each its picture, or none.
    """
    left, top = coords.min(0)
    extent = (coords + spans[:, None]).max(0) - (left, top)
    scale = max(float(extent.max()) / LONGEST, 1e-9)
    rgb = np.full((*np.ceil(extent[::-1] / scale).astype(int) + 1, 3), 246, np.uint8)
    for (x, y), span, tile in zip(coords, spans, tiles, strict=True):
        a, b = _corner(x - left, y - top, scale), _corner(x - left + span, y - top + span, scale)
        size = max(1, b[0] - a[0]), max(1, b[1] - a[1])
        if tile is None:
            rgb[a[1] : b[1], a[0] : b[0]] = 225
        else:
            small = cv2.resize(tile, size, interpolation=cv2.INTER_AREA)
            rgb[a[1] : a[1] + size[1], a[0] : a[0] + size[0]] = small
    return Base(rgb, float(left), float(top), scale, mpp, "mosaic of the tiles")


def draw(
    path: Path, title: str, line: str, base: Base,
    coords: NDArray[np.int64], spans: NDArray[np.float64], labels: NDArray[np.int32],
    palette: Sequence[Colour], highlight: Sequence[int] = (),
) -> Path:  # fmt: skip
    """The slide, the slide painted, and with `highlight` those clusters alone.

    Args:
      path: the PNG to write.
      title, line: above the panels.
      base: the slide.
      coords, spans, labels: (m, 2), (m,), (m,) of its tiles.
      palette: a colour a cluster.
      highlight: clusters of the third panel.
    """
    panels = [base.rgb, painted(base, coords, spans, labels, palette)]
    names = [base.kind, f"{len(np.unique(labels))} clusters"]
    if highlight:
        panels.append(highlighted(base, coords, spans, labels, highlight))
        count = int(np.isin(labels, list(highlight)).sum())
        chosen = ", ".join(map(str, highlight))
        names.append(f"cluster {chosen}: {count:,} of {len(labels):,} tiles")
    h, w = base.rgb.shape[:2]
    seen, counts = np.unique(labels, return_counts=True)
    order = np.argsort(-counts, kind="stable")
    size = (max(2 * MARGIN + len(panels) * (w + MARGIN) - MARGIN, 900), h + 2 * MARGIN + 146)
    sheet = Image.new("RGB", size, PAPER)
    pen = ImageDraw.Draw(sheet)
    pen.text((MARGIN, MARGIN - 6), title, INK, font=font(22))
    pen.text((MARGIN, MARGIN + 24), fit(line, size[0] - 2 * MARGIN, font(14)), QUIET, font=font(14))
    for n, (panel, name) in enumerate(zip(panels, names, strict=True)):
        x, y = MARGIN + n * (w + MARGIN), MARGIN + 72
        pen.text((x, y - 20), fit(name, w, font(14)), INK, font=font(14))
        sheet.paste(Image.fromarray(panel), (x, y))
        pen.rectangle((x - 1, y - 1, x + w, y + h), outline=(210, 210, 215))
        if n == 0 and base.mpp:
            draw_bar(pen, x + 12, y + h - 12, base.mpp * base.scale, 0.2 * w, 13)
    x, y = float(MARGIN), MARGIN + 72 + h + 14
    for at in order[:LEGEND]:
        text = f"{seen[at]}: {counts[at]:,}"
        wide = 24 + font(14).getlength(text) + 18
        if x + wide > size[0] - MARGIN:
            x, y = float(MARGIN), y + 22
        pen.rectangle((x, y + 2, x + 15, y + 17), fill=palette[seen[at]])
        pen.text((x + 22, y), text, INK, font=font(14))
        x += wide
    if len(seen) > LEGEND:
        pen.text((x, y), f"and {len(seen) - LEGEND:,} more", QUIET, font=font(14))
    sheet.save(path, optimize=True)
    return path


def painted(
    base: Base, coords: NDArray[np.int64], spans: NDArray[np.float64],
    labels: NDArray[np.int32], palette: Sequence[Colour],
) -> Pixels:  # fmt: skip
    """The base with each tile in its cluster's colour, half transparent."""
    cover, there = base.rgb.copy(), np.zeros(base.rgb.shape[:2], bool)
    for (x0, y0, x1, y1), label in zip(_boxes(base, coords, spans), labels, strict=True):
        cover[y0:y1, x0:x1] = palette[label]
        there[y0:y1, x0:x1] = True
    mixed = (0.42 * base.rgb + 0.58 * cover).astype(np.uint8)
    return np.where(there[..., None], mixed, base.rgb)


def highlighted(
    base: Base, coords: NDArray[np.int64], spans: NDArray[np.float64],
    labels: NDArray[np.int32], chosen: Sequence[int],
) -> Pixels:  # fmt: skip
    """The base pale and grey, the chosen clusters' tiles in their own colours, a frame around.

    The frame lies outside of them: on a large slide a tile is as small as its line is wide.
    """
    grey = cv2.cvtColor(base.rgb, cv2.COLOR_RGB2GRAY)
    out = np.repeat((110 + 0.57 * grey).astype(np.uint8)[..., None], 3, 2)
    boxes = [
        box
        for box, label in zip(_boxes(base, coords, spans), labels, strict=True)
        if label in chosen
    ]
    there = np.zeros(base.rgb.shape[:2], np.uint8)
    for x0, y0, x1, y1 in boxes:
        there[y0:y1, x0:x1] = 1
    near = cv2.dilate(there, np.ones((2 * FRAME + 1, 2 * FRAME + 1), np.uint8))
    out[near > there] = VIVID
    return np.where(there[..., None] > 0, base.rgb, out)


def _boxes(
    base: Base, coords: NDArray[np.int64], spans: NDArray[np.float64]
) -> list[tuple[int, int, int, int]]:
    """Left, top, right and lower edge of each tile on the base."""
    boxes = []
    for (x, y), span in zip(coords, spans, strict=True):
        a = _corner(x - base.left, y - base.top, base.scale)
        b = _corner(x + span - base.left, y + span - base.top, base.scale)
        boxes.append((*a, max(a[0] + 1, b[0]), max(a[1] + 1, b[1])))
    return boxes


def _corner(x: float, y: float, scale: float) -> tuple[int, int]:
    return round(x / scale), round(y / scale)
