"""Which cells of a slide become tiles: grid, foreground, marker ink, and the order of the draw."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

from jaxhisto.config import TileConfig
from jaxhisto.errors import SlideError
from jaxhisto.slides.fit import fit_note
from jaxhisto.slides.foreground import MASK_MPP, detect, foreground, shares
from jaxhisto.slides.pen import MOST, ink_note, pen_marks
from jaxhisto.slides.reader import Flags, Overview, Pixels, Scale, Slide


@dataclass(frozen=True)
class Grid:
    """Cells side by side from the slide's top-left corner; `outside` are cut by its edges."""

    xs: list[int]
    ys: list[int]
    outside: int

    @classmethod
    def over(cls, width: int, height: int, side: float) -> Grid:
        """All whole cells of `side` level-0 pixels on a slide of width x height."""
        nx, ny = int(width / side + 1e-9), int(height / side + 1e-9)
        cells = int(np.ceil(width / side - 1e-9)) * int(np.ceil(height / side - 1e-9))
        return cls(
            [int(i * side) for i in range(nx)], [int(i * side) for i in range(ny)], cells - nx * ny
        )

    def cell(self, index: int) -> tuple[int, int]:
        """Top-left corner of a cell, row by row."""
        return self.xs[index % len(self.xs)], self.ys[index // len(self.xs)]


@dataclass(frozen=True, eq=False)
class Choice:
    """The cells of a slide that may become tiles, and what was seen in choosing them.

    Fields:
      scale: how a tile is read.
      grid: all cells.
      view: the slide at the mask's pixel size.
      mask, ink: of `view`, where foreground and marker ink are.
      cells: (n,) int64, cells with enough foreground and no ink, in the order of the draw, or of
        the grid where all are taken; and those that are `unsure`.
      unsure: (cells of the grid,) bool: a part of it could not be read in `view`, so that its own
        pixels decide (`own_reason`).
      rejected: cells by reason: outside, background, pen.
      fit: a note where the foreground rule does not fit the stain; else empty.
    """

    scale: Scale
    grid: Grid
    view: Overview
    mask: Flags
    ink: Flags
    cells: NDArray[np.int64]
    unsure: Flags
    rejected: dict[str, int]
    fit: str

    @property
    def notes(self) -> tuple[str, ...]:
        """What a person should know of the mask: a stain or ink that the rules do not fit."""
        return tuple(filter(None, (self.fit, ink_note(self.ink, self.mask))))


def choose_cells(slide: Slide, slide_id: str, config: TileConfig) -> Choice:
    """Looks at a slide and chooses; reads the overview, no tile.

    Raises:
      SlideError: coarser than the tiles asked for, or smaller than one of them.
    """
    scale = slide.scale(config.tile_px, config.tile_mpp)
    grid = Grid.over(slide.width, slide.height, scale.side)
    if not grid.xs or not grid.ys:
        raise SlideError(
            f"{slide.path}: {slide.width} x {slide.height} px is smaller than one tile of "
            f"{scale.side:.0f} px; pass a smaller --tile-px, or leave the slide out"
        )
    view = slide.overview(MASK_MPP / slide.mpp)
    view_mpp = slide.mpp * view.downsample
    mask = detect(view, config.foreground, view_mpp, config.close_um)
    ink = pen_marks(view.rgb, config.pen, view_mpp)
    args = (view.downsample, grid.xs, grid.ys, scale.side)
    covered = shares(mask, *args).ravel() >= config.min_foreground - 1e-9
    unsure = shares(~view.known, *args).ravel() > 0
    # The whole mask once more, for the few slides that a pen was used on.
    inked = shares(ink, *args).ravel() >= MOST - 1e-9 if ink.any() else np.zeros_like(covered)
    cells = (
        order(config.seed, slide_id, covered.size) if config.max_tiles else np.arange(covered.size)
    )
    cells = cells[(covered | unsure)[cells]]
    rejected = {
        "outside": grid.outside,
        "background": covered.size - cells.size,
        "pen": int(inked[cells].sum()),
    }
    fit = fit_note(view, mask, config.foreground, view_mpp)
    cells = cells[~inked[cells]]
    return Choice(scale, grid, view, mask, ink, cells, unsure, rejected, fit)


def order(seed: int, slide: str, cells: int) -> NDArray[np.int64]:
    """The order in which a slide's cells are drawn: a permutation from (seed, slide id) alone.

    Sorted by one raw 64-bit number a cell, so that neither a newer numpy nor another foreground
    rule changes which of two cells comes first.
    """
    digest = hashlib.sha256(f"{seed}:{slide}".encode()).digest()
    keys = np.random.PCG64(int.from_bytes(digest[:16], "big")).random_raw(cells)
    return np.argsort(keys, kind="stable")


def own_reason(rgb: Pixels, mpp: float, config: TileConfig) -> str:
    """Why a tile seen alone, at the mask's pixel size, is not kept; empty where it is."""
    factor = max(1.0, MASK_MPP / mpp)
    view = small(rgb, max(1, round(rgb.shape[0] / factor)))
    side_mpp = mpp * rgb.shape[0] / view.shape[0]
    share = foreground(view, config.foreground, side_mpp, config.close_um).mean()
    if share < config.min_foreground:
        return "background"
    return "pen" if pen_marks(view, config.pen, side_mpp).mean() >= MOST else ""


def small(rgb: Pixels, side: int) -> Pixels:
    """A square picture reduced to `side` by area averaging."""
    return np.asarray(cv2.resize(rgb, (side, side), interpolation=cv2.INTER_AREA), np.uint8)


def no_tile(path: Path, config: TileConfig, choice: Choice, rejected: Mapping[str, int]) -> str:
    """Why a slide gave no tile, in one sentence.

    Args:
      path: of the slide.
      config: by which it was cut.
      choice: of its cells.
      rejected: cells by reason, in the end.
    """
    lost = rejected["unreadable"] + rejected["transparent"]
    cells, fit = choice.unsure.size, choice.fit
    if lost:
        return (
            f"{path}: no tile, since {lost} of {cells} cells cannot be read and the rest is "
            "background; copy the file again, or leave it out"
        )
    if rejected["pen"]:
        return (
            f"{path}: no tile, since {rejected['pen']} of {cells} cells have marker ink "
            "and the rest is background; pass --pen none if that is a stain, or leave it out"
        )
    if fit:
        return f"{path}: no tile of {cells} has enough foreground: {fit}, or leave it out"
    return (
        f"{path}: no foreground, none of {cells} tiles reaches {config.min_foreground:g} "
        f"under {config.foreground} ({choice.mask.mean():.1%} of the slide is foreground); try "
        "another --foreground (ciga2022, otsu, od) or a lower --min-foreground, or leave it out"
    )
