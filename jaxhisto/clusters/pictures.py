"""The pictures behind rows of features: from stores and images, or from the slides themselves."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

from jaxhisto.config import DataConfig, TileConfig
from jaxhisto.console import warn
from jaxhisto.data.features import Features
from jaxhisto.data.picked import Origins
from jaxhisto.data.sources import Tiles, open_for
from jaxhisto.downstream_config import PicturesConfig
from jaxhisto.errors import ConfigError, SlideError, StoreError
from jaxhisto.slides.cutting import Job
from jaxhisto.slides.finding import find_slides
from jaxhisto.slides.reader import RegionError, Slide

Pixels = NDArray[np.uint8]
NAMED = 5  # missing tiles that a line names


@dataclass(frozen=True)
class Picture:
    """A tile for the eye.

    Fields:
      rgb: (side, side, 3) uint8, the middle square; none where there is no picture.
      um: side in um; none where nobody says.
    """

    rgb: Pixels | None
    um: float | None


class Pictures:
    """Pictures of the rows of a file of features.

    Attributes:
      tiles: the opened mix, or none.
      at: (n,) int64, position of each row in it, -1 where it is not there.
      missing: names of rows of which no picture can be had, as far as is known by now.
      jobs: each slide that was given and can be opened, by id.
      given: whether any pictures were.
    """

    def __init__(self, features: Features, config: PicturesConfig) -> None:
        """Opens what was given.

        Raises:
          StoreError, SlideError: it cannot be opened; it is other data than the features are of
            and `partial` is off.
        """
        self._features, self._mpp = features, config.mpp
        self.at = np.full(len(features), -1, np.int64)
        self.tiles: Tiles | None = None
        self.jobs: dict[str, Job] = {}
        if config.slides:
            # Whatever they are cut to, the slides' ids and pixel sizes are the same.
            cut = TileConfig(config.slides, "", mpp=config.mpp)
            self.jobs = {job.id: job for job in find_slides(cut)}
        if config.tiles:
            data = DataConfig(
                stores=config.tiles,
                manifest=config.manifest,
                exclude=config.exclude,
                max_side=config.max_side,
                failures_allowed=config.failures_allowed,
                threads=config.threads,
            )
            self.tiles = open_for(data, {"stores": "--show.tiles", "": "--show."})
            self._match(config.partial)
        self.given = bool(config.tiles or config.slides)
        self.missing = self._missing()
        self._origins = Origins(self.tiles) if self.tiles else None
        self._open: tuple[str, Slide] | None = None

    def note(self) -> str:
        """Of how many rows there is no picture, in words; empty where all are there."""
        if not self.given:
            return "no pictures were given (--show.tiles, --show.slides)"
        if not self.missing:
            return ""
        more = f" and {len(self.missing) - NAMED:,} more" if len(self.missing) > NAMED else ""
        names = ", ".join(self.missing[:NAMED]) + more
        return f"{len(self.missing):,} of {len(self.at):,} tiles have no picture: {names}"

    def read(self, row: int, side: int) -> Picture:
        """The picture of a row, `side` pixels wide."""
        place = self._features.coords[row], float(self._features.spans[row])
        if self.at[row] >= 0 and self.tiles is not None and self._origins is not None:
            image = self.tiles.read(int(self.at[row]))
            mpp = self._mpp
            with suppress(StoreError):  # of other kinds of sources nobody knows
                mpp = self._origins.entry(int(self.at[row])).mpp or mpp
            um = mpp * min(image.shape[:2]) if mpp else None
            return Picture(square(image, side), um)
        slide = self._slide(self._features.slides[row])
        if slide is None:
            return Picture(None, None)
        (x, y), span = place
        try:
            # The coarsest level that is as fine as the cell: a tile is read in a millisecond.
            scale = slide.scale(side, max(slide.mpp, span * slide.mpp / side))
            rgb = slide.read(int(x), int(y), side, scale)
        except RegionError:
            return Picture(None, None)
        except SlideError as error:
            self._give_up(self._features.slides[row], error)
            return Picture(None, None)
        return Picture(rgb, scale.mpp * side)

    def slide(self, name: str) -> Slide | None:
        """An open slide, until the next one is asked for; none where there is none to open."""
        return self._slide(name)

    def origins(self) -> Origins:
        """What manifests call the tiles.

        Raises:
          ConfigError: no stores or images were given.
        """
        if self._origins is None:
            raise ConfigError("--pick: needs the stores or image folders in --show.tiles.")
        return self._origins

    def close(self) -> None:
        """Closes what is open."""
        if self._open is not None:
            self._open[1].__exit__(None, None, None)
            self._open = None

    def _slide(self, name: str) -> Slide | None:
        if name not in self.jobs:
            return None
        if self._open is None or self._open[0] != name:
            self.close()
            job = self.jobs[name]
            try:
                self._open = name, Slide(job.path, job.given)
            except SlideError as error:
                self._give_up(name, error)
                return None
        return self._open[1]

    def _give_up(self, name: str, error: SlideError) -> None:
        """Goes on without a slide, one of many: hours of clustering are not given up for it."""
        warn(f"{error}; its tiles are drawn as missing")
        self.close()
        del self.jobs[name]
        self.missing = self._missing()

    def _missing(self) -> list[str]:
        slides = np.array([slide in self.jobs for slide in self._features.slides], bool)
        return [self._features.names[i] for i in np.flatnonzero((self.at < 0) & ~slides)]

    def _match(self, partial: bool) -> None:
        tiles, features = self.tiles, self._features
        assert tiles is not None
        if tiles.hash == features.data_hash and len(tiles) == len(features):
            self.at = np.arange(len(features))
            return
        if not partial:
            raise StoreError(
                f"{features.path}: is of data {features.data_hash[:12]} ({len(features):,} rows), "
                f"and --show.tiles holds data {tiles.hash[:12]} ({len(tiles):,} tiles); give the "
                "tiles that were embedded, or --show.partial to go by their names."
            )
        names: dict[str, int] = {}
        for i in range(len(tiles)):
            names.setdefault(tiles.located(i).name, i)
        self.at = np.array([names.get(name, -1) for name in features.names], np.int64)
        if (self.at < 0).all():
            raise StoreError(
                f"{features.path}: none of its {len(features):,} names (the first, "
                f"{features.names[0]}) is in --show.tiles; give the tiles that were embedded."
            )


def square(image: Pixels, side: int) -> Pixels:
    """The middle square of an image, resized."""
    h, w = image.shape[:2]
    s = min(h, w)
    cut = image[(h - s) // 2 : (h - s) // 2 + s, (w - s) // 2 : (w - s) // 2 + s]
    how = cv2.INTER_AREA if s >= side else cv2.INTER_CUBIC
    return np.asarray(cv2.resize(np.ascontiguousarray(cut), (side, side), interpolation=how))


def short(name: str, most: int = 40) -> str:
    """The end of a name, which tells tiles apart."""
    last = Path(name).name if "@" not in name else name
    return last if len(last) <= most else "..." + last[3 - most :]


def rows_named(features: Features, wanted: Sequence[str]) -> list[int]:
    """The row of each name; the last part of a path will do where one row alone has it.

    Raises:
      ConfigError: no row, or several, with the nearest names.
    """
    import difflib

    exact = {name: i for i, name in enumerate(features.names)}
    found = []
    for text in wanted:
        if text in exact:
            found.append(exact[text])
            continue
        ends = [i for i, name in enumerate(features.names) if name.rpartition("/")[2] == text]
        if len(ends) != 1:
            fact = f"{len(ends)} rows" if ends else "no row"
            have = "have" if ends else "has"
            near = difflib.get_close_matches(text, features.names[:20000], 1) or features.names[:1]
            raise ConfigError(
                f"--query {text}: {fact} of {features.path} {have} that name; names are like "
                f"{near[0]}."
            )
        found += ends
    return found
