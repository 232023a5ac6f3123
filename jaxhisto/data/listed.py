"""Exactly the tiles of a manifest, found in stores and folders by content, in the list's order."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from jaxhisto.config import MANY, DataConfig
from jaxhisto.data.features import Place
from jaxhisto.data.image_source import ImageSource
from jaxhisto.data.manifest import Entry, Manifest, read_manifest
from jaxhisto.data.sources import Source, StoreSource, Tiles, open_source
from jaxhisto.data.store import read_manifest as read_store_manifest
from jaxhisto.errors import StoreError


def open_listed(config: DataConfig, paths: Sequence[Path]) -> Tiles:
    """Opens the stores and folders, and takes of them what `config.manifest` lists.

    The order of the tiles is the list's, whatever the order of the paths. An image of a folder
    stands for all its cells, as without a list.

    Raises:
      StoreError: an unreadable or edited manifest, exclude patterns beside it, a store or folder
        that is damaged, or tiles that are in none of them, counted and the first ones named.
    """
    manifest = read_manifest(Path(config.manifest).expanduser())
    if config.exclude:
        raise StoreError(
            f"{config.manifest}: says exactly what is trained on, and --data.exclude would change "
            "it; draw a list without those tiles, with `jaxhisto sample --exclude`."
        )
    # What is unreadable and not listed is of no concern; what is listed counts as missing below.
    lenient = replace(config, failures_allowed=MANY)
    sources = [open_source(path, lenient) for path in paths]
    return Tiles([Listed(manifest, Path(config.manifest), sources)], config)


class Listed:
    """A `Source` of the tiles that a manifest lists.

    Attributes:
      manifest: hash and tiles (images of a folder count once) of the list, for records.
      hash: the manifest's: it holds the sha256 of all that is read.
      digests: sha256 of the image files among them.
      sources: the stores and folders that the tiles were found in.
      slides: ids of the slides that its tiles are of.
    """

    def __init__(self, manifest: Manifest, path: Path, sources: Sequence[Source]) -> None:
        self.path, self.sources, self._list = path, sources, manifest
        self.hash = manifest.hash
        self.manifest = {"sha256": self.hash, "tiles": len(manifest)}
        self.dropped: list[tuple[str, str]] = []
        self.matched: set[str] = set()
        places = _Places(sources)
        self._refuse_missing(places)
        found = [place for entry, row in manifest.tiles() for place in places.of(entry, row)]
        self._at = np.array(found, np.int64).reshape(-1, 2)
        sizes = {self.size(i) for i in range(len(self))}
        self.canvas = (max(h for h, _ in sizes), max(w for _, w in sizes))
        self.slides = {entry.slide for entry in manifest.entries if entry.rows is not None}
        self.digests = {bytes.fromhex(e.sha256) for e in manifest.entries if e.rows is None}

    def __len__(self) -> int:
        return len(self._at)

    def read(self, i: int, out: NDArray[np.uint8] | None = None) -> NDArray[np.uint8]:
        source, row = self.at(i)
        return source.read(row, out)

    def size(self, i: int) -> tuple[int, int]:
        source, row = self.at(i)
        return source.size(row)

    def name(self, i: int) -> str:
        source, row = self.at(i)
        return source.name(row)

    def located(self, i: int, at: tuple[int, int] | None = None) -> Place:
        source, row = self.at(i)
        return source.located(row, at)

    def first_cells(self) -> list[int]:
        """Of each tile of the list its position here; of an image in cells, its first one's."""
        places = _Places(self.sources)
        counts = [len(places.of(entry, row)) for entry, row in self._list.tiles()]
        return [0, *np.cumsum(counts[:-1]).tolist()]

    def mpp_range(self) -> tuple[float, float] | None:
        known = {entry.mpp for entry in self._list.entries if entry.mpp is not None}
        return (min(known), max(known)) if known else None

    def line(self) -> str:
        datasets = {entry.dataset for entry in self._list.entries}
        return (
            f"{self.path}: manifest {self.hash[:12]}, {len(self._list):,} tiles of "
            f"{len(datasets)} datasets, seed {self._list.seed}"
        )

    def at(self, i: int) -> tuple[Source, int]:
        """The source that holds tile i, and the tile's row there."""
        source, row = self._at[i].tolist()
        return self.sources[source], row

    def _refuse_missing(self, places: _Places) -> None:
        missing = [(e, row) for e, row in self._list.tiles() if not places.of(e, row)]
        if missing:
            names = ", ".join(entry.where(row) for entry, row in missing[:3])
            raise StoreError(
                f"{self.path}: {len(missing):,} of its {len(self._list):,} tiles are not in "
                f"--data.stores as they were when it was drawn, the first: {names}; add the "
                "stores and folders that hold them, or draw again with `jaxhisto sample`."
            )


def manifest_of(tiles: Tiles) -> dict[str, Any] | None:
    """`sha256` and `tiles` of the manifest that these were taken by, or none."""
    return next((s.manifest for s in tiles.sources if isinstance(s, Listed)), None)


class _Places:
    """Where tiles lie, by content; of sources that hold the same one, the first.

    A part of a store is one entry, not one for each tile: 25 thousand slides of 100 tiles took 0.8
    GB.
    """

    def __init__(self, sources: Sequence[Source]) -> None:
        self._parts: dict[str, tuple[int, int, int]] = {}  # source, first row, tiles
        self._images: dict[tuple[str, str], list[tuple[int, int]]] = {}
        for number, source in enumerate(sources):
            if isinstance(source, StoreSource):
                start = 0
                for slide in read_store_manifest(source.path)["slides"]:
                    place = number, start, slide["tiles"]
                    self._parts.setdefault(slide["part"]["sha256"], place)
                    start += slide["tiles"]
            elif isinstance(source, ImageSource):
                own: dict[tuple[str, str], list[tuple[int, int]]] = defaultdict(list)
                for row, image in enumerate(source.image_of):
                    own[image.sha256.hex(), image.name].append((number, row))
                self._images = own | self._images

    def of(self, entry: Entry, row: int | None) -> Sequence[tuple[int, int]]:
        """(source, row there) of a tile, of an image its cells; none where no source holds it."""
        if row is None:
            return self._images.get((entry.sha256, entry.slide), ())
        number, start, tiles = self._parts.get(entry.sha256, (0, 0, 0))
        return [(number, start + row)] if 0 <= row < tiles else ()
