"""Sheets of tiles for people: boxes of labelled tiles under a title, with a scale bar."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from jaxhisto.clusters.pictures import Picture

CELL = 128  # side of a tile on a sheet, px
GAP = 6
MARGIN = 24
WIDTH = 1700  # of a sheet, about, px
PAPER, INK, QUIET, EMPTY = (255, 255, 255), (28, 28, 34), (112, 112, 122), (236, 236, 240)
Colour = tuple[int, int, int]


@dataclass(frozen=True)
class Cell:
    """A tile on a sheet, the line under it, and whether it is framed."""

    picture: Picture
    text: str = ""
    framed: bool = False


@dataclass(frozen=True)
class Box:
    """Tiles that belong together: a heading (bold, then quiet), a colour, and the tiles."""

    title: str
    about: str
    colour: Colour
    cells: Sequence[Cell] = field(default_factory=tuple)


def sheet(
    boxes: Sequence[Box], path: Path | str, title: str, lines: Sequence[str], across: int = 0
) -> Path:
    """Draws boxes side by side.

    Args:
      boxes: each as wide as the longest.
      path: the PNG to write.
      title: of the sheet.
      lines: under the title.
      across: boxes beside each other; 0: as many as fit.
    """
    count = max((len(box.cells) for box in boxes), default=1)
    width = count * (CELL + GAP) - GAP + 2 * GAP
    captions = any(cell.text for box in boxes for cell in box.cells)
    titled = any(box.title for box in boxes)
    height = (24 if titled else 0) + CELL + (18 if captions else 0) + 2 * GAP
    across = across or max(1, min(len(boxes), (WIDTH - 2 * MARGIN) // (width + MARGIN)))
    down = math.ceil(len(boxes) / across)
    lines = [part for line in lines for part in _wrapped(line, across * (width + MARGIN))]
    head = 2 * MARGIN + 30 + 20 * len(lines)
    size = (
        max(2 * MARGIN + across * (width + MARGIN) - MARGIN, 640),
        head + down * (height + 14) + MARGIN,
    )
    image = Image.new("RGB", size, PAPER)
    pen = ImageDraw.Draw(image)
    _heading(pen, title, lines)
    for n, box in enumerate(boxes):
        x = MARGIN + n % across * (width + MARGIN)
        y = head + n // across * (height + 14)
        _box(image, pen, box, x, y, width, height)
    image.save(path, optimize=True)
    return Path(path)


def bar_length(um_per_px: float, most: float) -> float:
    """The longest of 1, 2, 5 times a power of ten um that is at most `most` px long."""
    limit = most * um_per_px
    power = 10.0 ** math.floor(math.log10(limit))
    return max(step * power for step in (1, 2, 5) if step * power <= limit * (1 + 1e-9))


def draw_bar(pen: Any, x: float, y: float, um_per_px: float, most: float, size: int = 11) -> None:
    """A scale bar with its length, its lower left corner at (x, y): black on a white ground."""
    um = bar_length(um_per_px, most)
    # "um": Pillow's font has no Greek.
    label = f"{um / 1000:g} mm" if um >= 1000 else f"{um:g} um"
    long, face = um / um_per_px, font(size)
    wide = max(long, pen.textlength(label, font=face))
    pen.rectangle((x - 4, y - size - 12, x + wide + 4, y + 4), fill=PAPER)
    pen.rectangle((x, y - 4, x + long, y), fill=INK)
    pen.text((x, y - size - 9), label, INK, font=face)


@cache
def font(size: int) -> Any:
    """The font that comes with Pillow, in px."""
    return ImageFont.load_default(size=size)


def fit(text: str, width: float, face: Any) -> str:
    """The text, its beginning left out where it is longer than `width` px."""
    if face.getlength(text) <= width:
        return text
    while text and face.getlength(f"...{text}") > width:
        text = text[1:]
    return f"...{text}"


def curve(
    path: Path | str, ks: Sequence[int], explained: Sequence[float], elbow: int | None
) -> Path:
    """Explained variance over k, with the elbow and the chord it is farthest from (needs `plots`).

    Args:
      path: the PNG to write.
      ks, explained: ascending k, shares 0..1.
      elbow: the k taken, or none.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    percent = [100 * value for value in explained]
    axes.plot([ks[0], ks[-1]], [percent[0], percent[-1]], ":", color="0.6", label="chord")
    axes.plot(ks, percent, "-o", color="#1f5fa8", markersize=5)
    if elbow is not None:
        at = percent[list(ks).index(elbow)]
        axes.axvline(elbow, color="#d1495b", linewidth=1)
        axes.plot([elbow], [at], "o", color="#d1495b", markersize=10)
        axes.annotate(
            f"elbow: k = {elbow:,}\n{at:.1f} % explained",
            (elbow, at), xytext=(12, -34), textcoords="offset points", color="#d1495b",
        )  # fmt: skip
    axes.set(xlabel="clusters k", ylabel="explained variance, %")
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.legend(frameon=False, loc="lower right")
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130)
    return Path(path)


def _heading(pen: Any, title: str, lines: Sequence[str]) -> None:
    pen.text((MARGIN, MARGIN - 4), title, INK, font=font(22))
    for n, line in enumerate(lines):
        pen.text((MARGIN, MARGIN + 30 + 20 * n), line, QUIET, font=font(14))


def _box(image: Image.Image, pen: Any, box: Box, x: int, y: int, width: int, height: int) -> None:
    pen.rounded_rectangle(
        (x, y, x + width, y + height), radius=6, outline=box.colour, width=3, fill=PAPER
    )
    if box.title:
        bold = font(15)
        title = fit(box.title, width - 24, bold)
        pen.rectangle((x + GAP + 2, y + 8, x + GAP + 14, y + 20), fill=box.colour)
        pen.text((x + GAP + 20, y + 5), title, INK, font=bold)
        after = x + GAP + 28 + bold.getlength(title)
        pen.text(
            (after, y + 7), fit(box.about, x + width - after - 8, font(13)), QUIET, font=font(13)
        )
    for n, cell in enumerate(box.cells):
        left, top = x + GAP + n * (CELL + GAP), y + (26 if box.title else GAP)
        # One bar serves the tiles after it, as long as they are of its scale.
        bar = n == 0 or cell.picture.um != box.cells[n - 1].picture.um
        _tile(image, pen, cell, left, top, bar)


def _tile(image: Image.Image, pen: Any, cell: Cell, x: int, y: int, bar: bool) -> None:
    rgb, um = cell.picture.rgb, cell.picture.um
    if rgb is None:
        pen.rectangle((x, y, x + CELL - 1, y + CELL - 1), fill=EMPTY)
        pen.line((x, y, x + CELL - 1, y + CELL - 1), fill=QUIET)
        pen.text((x + CELL / 2, y + CELL / 2), "no picture", QUIET, font=font(13), anchor="mm")
    else:
        image.paste(Image.fromarray(np.ascontiguousarray(rgb)), (x, y))
        if bar and um:
            draw_bar(pen, x + 7, y + CELL - 7, um / CELL, 0.42 * CELL)
    if cell.framed:
        pen.rectangle((x, y, x + CELL - 1, y + CELL - 1), outline=(240, 190, 0), width=4)
    pen.text((x + 1, y + CELL + 3), fit(cell.text, CELL, font(12)), QUIET, font=font(12))


def _wrapped(text: str, width: float) -> list[str]:
    words, lines = text.split(" "), [""]
    for word in words:
        longer = f"{lines[-1]} {word}".strip()
        if lines[-1] and font(14).getlength(longer) > max(width, 580):
            lines.append(word)
        else:
            lines[-1] = longer
    return lines
