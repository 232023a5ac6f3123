"""One slide to one part of the store: grid, foreground, draw, read. Runs in a worker process.

Every cell of the grid is either kept or rejected for one of report's `REASONS`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from jaxhisto.config import TileConfig
from jaxhisto.data.store_writer import (
    Tile,
    encode_jpeg,
    slide_key,
    write_file,
    write_part,
    write_record,
)
from jaxhisto.errors import SlideError
from jaxhisto.slides.foreground import MASK_MPP, detect, foreground, shares
from jaxhisto.slides.pixel_size import GivenPixelSize
from jaxhisto.slides.reader import Flags, Overview, Pixels, RegionError, Scale, Slide, content_hash
from jaxhisto.slides.report import REASONS, fitted, slide_section

CONTACTS, CONTACT_PX = 24, 96  # tiles on the contact sheet, and their side
PICTURE_PX = 900  # longest side of the report's picture of the slide, about


@dataclass(frozen=True)
class Job:
    """One slide to cut.

    Args:
      path: of the file.
      id: name relative to the folder given.
      given: what the user says of pixel sizes.
      config: all settings of the run; `dataset` filled in.
      known: manifest entry of this slide if a whole part of it is there.
      others: further files of the same slide (a DICOM series).
    """

    path: Path
    id: str
    given: GivenPixelSize
    config: TileConfig
    known: dict[str, Any] | None = None
    others: tuple[Path, ...] = ()


@dataclass(frozen=True)
class Cut:
    """A finished slide: its manifest entry, and whether its part was there already."""

    record: dict[str, Any]
    reused: bool


@dataclass
class Draw:
    """What became of the cells of one slide; positions in level-0 pixels."""

    rejected: dict[str, int] = field(default_factory=lambda: dict.fromkeys(REASONS, 0))
    kept: list[tuple[int, int]] = field(default_factory=list)
    lost: list[tuple[int, int]] = field(default_factory=list)
    contacts: list[Pixels] = field(default_factory=list)


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


def cut_slide(job: Job) -> Cut:
    """Cuts one slide, or finds that it is cut already.

    Raises:
      SlideError: not readable, no pixel size, coarser than asked for, or no foreground tile.
      StoreError: the store cannot be written.
    """
    cv2.setNumThreads(1)  # the pool has a process a core
    sha256 = content_hash(job.path, job.others)
    with Slide(job.path, job.given) as slide:
        known = job.known
        if known and (known["sha256"], known["mpp"], known["mpp_source"]) == (
            sha256, slide.mpp, slide.mpp_source,
        ):  # fmt: skip
            return Cut(known, reused=True)
        return Cut(_cut(slide, job, sha256), reused=False)


def order(seed: int, slide: str, cells: int) -> NDArray[np.int64]:
    """The order in which a slide's cells are drawn: a permutation from (seed, slide id) alone.

    Sorted by one raw 64-bit number a cell, so that neither a newer numpy nor another foreground
    rule changes which of two cells comes first.
    """
    digest = hashlib.sha256(f"{seed}:{slide}".encode()).digest()
    keys = np.random.PCG64(int.from_bytes(digest[:16], "big")).random_raw(cells)
    return np.argsort(keys, kind="stable")


def _cut(slide: Slide, job: Job, sha256: str) -> dict[str, Any]:
    config = job.config
    scale = slide.scale(config.tile_px, config.tile_mpp)
    grid = Grid.over(slide.width, slide.height, scale.side)
    if not grid.xs or not grid.ys:
        raise SlideError(
            f"{slide.path}: {slide.width} x {slide.height} px is smaller than one tile of "
            f"{scale.side:.0f} px; pass a smaller --tile-px, or leave the slide out"
        )
    view = slide.overview(MASK_MPP / slide.mpp)
    mask = detect(view, config.foreground, slide.mpp * view.downsample, config.close_um)
    draw = Draw()
    draw.rejected["outside"] = grid.outside
    part = write_part(Path(config.out), job.id, _tiles(slide, job, scale, grid, view, mask, draw))
    if not part["tiles"]:
        raise SlideError(_nothing(slide, config, mask, grid, draw))
    record = {
        "id": job.id,
        "sha256": sha256,
        "width": slide.width,
        "height": slide.height,
        "mpp": slide.mpp,
        "mpp_source": slide.mpp_source,
        "notes": list(slide.notes),
        "tile_mpp": scale.mpp,
        "tiles": part["tiles"],
        "rejected": draw.rejected,
        "foreground_share": round(float(mask.mean()), 4),
        "part": {"bytes": part["bytes"], "sha256": part["sha256"]},
    }
    section = slide_section(
        record,
        _picture(slide, view),
        mask,
        view.downsample,
        scale.side,
        draw.kept,
        draw.lost,
        draw.contacts,
    )
    write_file(Path(config.out), Path(config.out) / "report" / f"{slide_key(job.id)}.html", section)
    write_record(Path(config.out), record)
    return record


def _tiles(
    slide: Slide, job: Job, scale: Scale, grid: Grid, view: Overview, mask: Flags, draw: Draw
) -> Iterator[Tile]:
    """Draws and reads: exactly min(max_tiles, readable foreground cells), counted in `draw`.

    Where the overview could not be read, the cell's own pixels decide.
    """
    config = job.config
    args = (view.downsample, grid.xs, grid.ys, scale.side)
    covered = shares(mask, *args).ravel() >= config.min_foreground - 1e-9
    unsure = shares(~view.known, *args).ravel() > 0
    cells = (
        order(config.seed, job.id, covered.size) if config.max_tiles else np.arange(covered.size)
    )
    cells = cells[(covered | unsure)[cells]]
    draw.rejected["background"] = covered.size - cells.size
    for rank, cell in enumerate(cells):
        if config.max_tiles and len(draw.kept) == config.max_tiles:
            draw.rejected["over_cap"] = cells.size - rank
            return
        x, y = grid.cell(int(cell))
        try:
            rgb = slide.read(x, y, config.tile_px, scale)
        except RegionError as error:
            draw.rejected[error.reason] += 1
            draw.lost.append((x, y))
            continue
        if unsure[cell] and own_share(rgb, scale.mpp, config) < config.min_foreground:
            draw.rejected["background"] += 1
            continue
        draw.kept.append((x, y))
        if len(draw.contacts) < CONTACTS:
            draw.contacts.append(_small(rgb, CONTACT_PX))
        jpeg = encode_jpeg(rgb, config.jpeg_quality, config.jpeg_subsampling)
        yield Tile(jpeg, job.id, config.dataset, x, y, scale.mpp, slide.mpp_source)


def _picture(slide: Slide, view: Overview) -> Pixels:
    """The slide for the report, about `PICTURE_PX` long; read again where the mask's is smaller."""
    rgb = view.rgb
    if max(rgb.shape) < PICTURE_PX:
        rgb = slide.overview(max(slide.width, slide.height) / PICTURE_PX).rgb
    return fitted(rgb, PICTURE_PX)


def own_share(rgb: Pixels, mpp: float, config: TileConfig) -> float:
    """Foreground share of a tile seen alone, at the mask's pixel size."""
    factor = max(1.0, MASK_MPP / mpp)
    small = _small(rgb, max(1, round(rgb.shape[0] / factor)))
    side_mpp = mpp * rgb.shape[0] / small.shape[0]
    return float(foreground(small, config.foreground, side_mpp, config.close_um).mean())


def _small(rgb: Pixels, side: int) -> Pixels:
    return np.asarray(cv2.resize(rgb, (side, side), interpolation=cv2.INTER_AREA), np.uint8)


def _nothing(slide: Slide, config: TileConfig, mask: Flags, grid: Grid, draw: Draw) -> str:
    """Why a slide gave no tile, in one sentence."""
    lost = draw.rejected["unreadable"] + draw.rejected["transparent"]
    cells = len(grid.xs) * len(grid.ys)
    if lost:
        return (
            f"{slide.path}: no tile, since {lost} of {cells} cells cannot be read and the rest is "
            "background; copy the file again, or leave it out"
        )
    return (
        f"{slide.path}: no foreground, none of {cells} tiles reaches {config.min_foreground:g} "
        f"under {config.foreground} ({mask.mean():.1%} of the slide is foreground); try another "
        "--foreground (ciga2022, otsu, od) or a lower --min-foreground, or leave it out"
    )
