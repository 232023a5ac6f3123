"""Whole slides as a source of tiles, cut when they are read: the grid and the foreground of
`jaxhisto tile`, without its JPEGs."""

from __future__ import annotations

import hashlib
import json
import os
import re
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from jaxhisto.config import TileConfig
from jaxhisto.data.features import Place
from jaxhisto.errors import SlideError, StoreError
from jaxhisto.slides.choosing import choose_cells, no_tile, own_reason
from jaxhisto.slides.cutting import Job
from jaxhisto.slides.finding import find_slides
from jaxhisto.slides.reader import Pixels, RegionError, Scale, Slide
from jaxhisto.slides.report_parts import REASONS
from jaxhisto.slides.slide_files import content_hash

CUT_FLAGS = ("mpp", "tile-mpp", "foreground", "min-foreground", "pen")


@dataclass(frozen=True)
class Chosen:
    """The tiles of one slide.

    Fields:
      job: the slide.
      scale: how a tile is read.
      corners: (n, 2) int64, x and y of the top-left corners in level-0 px.
      sha256: of the file.
      lost: cells that cannot be read and are left out.
      notes: what `jaxhisto tile` says of the slide too: a pixel size that was passed over, a
        foreground rule or marker ink that does not fit.
    """

    job: Job
    scale: Scale
    corners: NDArray[np.int64]
    sha256: str
    lost: int
    notes: tuple[str, ...]


class SlidesSource:
    """The foreground tiles of slides, in the order of the slides' ids.

    Within a slide in the order of the grid, or as drawn where `max_tiles` says how many. Safe to
    use from several threads, each of which opens slides for itself.

    Attributes: as `data.sources.Source` has them; `dropped` holds slides that were left out, and
    how many cells of others; `notes` a line for what is to be known of those that are there.

    Raises:
      SlideError: no slide, or more than `failures_allowed` that cannot be read, have no pixel size
        or no foreground.
    """

    def __init__(self, config: TileConfig, threads: int = 0) -> None:
        jobs = find_slides(config)
        self.path = Path(config.slides[0])
        self._tile_px = config.tile_px
        with ThreadPoolExecutor(threads or os.cpu_count()) as pool:
            found = list(pool.map(_chosen_or_error, jobs))
        failed = [error for error in found if isinstance(error, SlideError)]
        self._slides = [chosen for chosen in found if isinstance(chosen, Chosen)]
        if failed and (len(failed) > config.failures_allowed or not self._slides):
            more = f" ({len(failed)} of {len(jobs)} slides cannot be used)" if failed[1:] else ""
            raise SlideError(
                f"{failed[0]}{more}; pass --failures-allowed {len(failed)} to go on without"
                if self._slides
                else f"{failed[0]}{more}"
            )
        self._ends = np.cumsum([len(chosen.corners) for chosen in self._slides])
        self._open = threading.local()
        self.canvas = (config.tile_px, config.tile_px)
        self.matched: set[str] = set()
        self.dropped = [
            (chosen.job.id, f"{chosen.lost} cells cannot be read")
            for chosen in self._slides
            if chosen.lost
        ]
        self.dropped += [
            (job.id, str(error).removeprefix(f"{job.path}: "))
            for job, error in zip(jobs, found, strict=True)
            if isinstance(error, SlideError)
        ]
        self.notes = [f"{c.job.id}: note: {note}" for c in self._slides for note in c.notes]
        content = [
            [c.job.id, c.sha256, c.scale.mpp, config.tile_px, c.corners.tolist()]
            for c in self._slides
        ]
        self.hash = hashlib.sha256(json.dumps(["jaxhisto-slides-1", *content]).encode()).hexdigest()

    def __len__(self) -> int:
        return int(self._ends[-1])

    def read(self, i: int, out: Pixels | None = None) -> Pixels:
        chosen, row = self._find(i)
        x, y = chosen.corners[row].tolist()
        try:
            return self._slide(chosen).read(x, y, self._tile_px, chosen.scale)
        except RegionError as error:
            raise StoreError(
                f"{chosen.job.path}: the tile at {x},{y} cannot be read ({error}); `jaxhisto tile` "
                "leaves such tiles out and counts them: cut a store and embed that."
            ) from error

    def size(self, i: int) -> tuple[int, int]:
        return self.canvas

    def name(self, i: int) -> str:
        chosen, row = self._find(i)
        x, y = chosen.corners[row].tolist()
        return f"{chosen.job.path}: tile at {x},{y}"

    def located(self, i: int, at: tuple[int, int] | None = None) -> Place:
        chosen, row = self._find(i)
        x, y = chosen.corners[row].tolist()
        return Place(
            f"{chosen.job.id}@{y},{x}", chosen.job.id, x, y, round(float(chosen.scale.side), 6)
        )

    def mpp_range(self) -> tuple[float, float] | None:
        sizes = [chosen.scale.mpp for chosen in self._slides]
        return min(sizes), max(sizes)

    def line(self) -> str:
        mpp = self.mpp_range()
        return (
            f"{self.path}: {len(self._slides):,} slides, {len(self):,} foreground tiles"
            f", {self._tile_px} px" + (f", {mpp[0]:.4g} to {mpp[1]:.4g} um/px" if mpp else "")
        )

    def _find(self, i: int) -> tuple[Chosen, int]:
        number = int(np.searchsorted(self._ends, i, "right"))
        return self._slides[number], i - (int(self._ends[number - 1]) if number else 0)

    def _slide(self, chosen: Chosen) -> Slide:
        """This thread's own open slide: a reader may serve one thread, and rows come in order."""
        held: tuple[str, Slide] | None = getattr(self._open, "held", None)
        if held is None or held[0] != chosen.job.id:
            if held is not None:
                held[1].__exit__(None, None, None)
            self._open.held = held = (chosen.job.id, Slide(chosen.job.path, chosen.job.given))
        return held[1]


def _chosen_or_error(job: Job) -> Chosen | SlideError:
    try:
        return choose(job)
    except SlideError as error:
        return SlideError(_as_flags((str(error),))[0])


def _as_flags(texts: tuple[str, ...]) -> tuple[str, ...]:
    """With the flags of `jaxhisto tile` as the verb here has them."""
    flags = rf"--({'|'.join(CUT_FLAGS)})\b"
    return tuple(re.sub(flags, r"--cut.\1", text) for text in texts)


def choose(job: Job) -> Chosen:
    """The tiles of a slide that `jaxhisto tile` would keep.

    Where the overview could not be read, the cell's own pixels decide.

    Raises:
      SlideError: not readable, no pixel size, coarser than asked for, or no foreground tile.
    """
    config = job.config
    sha256 = content_hash(job.path, job.others)
    corners: list[tuple[int, int]] = []
    with Slide(job.path, job.given) as slide:
        choice = choose_cells(slide, job.id, config)
        notes = _as_flags((*slide.notes, *choice.notes))
        rejected = dict.fromkeys(REASONS, 0) | choice.rejected
        for cell in choice.cells.tolist():
            if config.max_tiles and len(corners) == config.max_tiles:
                break
            x, y = choice.grid.cell(cell)
            if choice.unsure[cell]:
                try:
                    rgb = slide.read(x, y, config.tile_px, choice.scale)
                except RegionError as error:
                    rejected[error.reason] += 1
                    continue
                if reason := own_reason(rgb, choice.scale.mpp, config):
                    rejected[reason] += 1
                    continue
            corners.append((x, y))
    if not corners:
        raise SlideError(no_tile(job.path, config, choice, rejected))
    lost = rejected["unreadable"] + rejected["transparent"]
    at = np.array(corners, np.int64).reshape(-1, 2)
    return Chosen(job, choice.scale, at, sha256, lost, notes)
