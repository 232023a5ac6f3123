"""What a run trains on: tile stores, image folders and files of images, one after the other.

`Tiles` gives random access to the mix and a hash of all that went in. Everything is checked on
opening, every image decoded once, so that a run does not end on a bad file hours later.
"""

from __future__ import annotations

import bisect
import hashlib
import itertools
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from jaxhisto.config import DataConfig
from jaxhisto.console import counted
from jaxhisto.data import file_kinds
from jaxhisto.data.features import Place
from jaxhisto.data.folder_source import FolderSource
from jaxhisto.data.image_source import matches
from jaxhisto.data.images import ImageError, decode_jpeg
from jaxhisto.data.store import TileStore, dataset_of, is_store
from jaxhisto.errors import StoreError


def open_tiles(config: DataConfig) -> Tiles:
    """Opens the mix, in the order of `config.stores` or of a manifest, and checks all of it.

    Raises:
      StoreError: a store or folder that is missing, empty, damaged, given twice or unreadable in
        part; an `exclude` pattern that matches nothing, and would let a test section in.
    """
    if not config.stores:
        raise StoreError("no data: nothing is in --data.stores; name tile stores or image folders.")
    paths = [Path(text).expanduser() for text in config.stores]
    for path, earlier in itertools.combinations(reversed(paths), 2):
        # Not Path.resolve: Python 3.11's raises on a link that leads to itself.
        if os.path.realpath(path) == os.path.realpath(earlier):
            raise StoreError(f"{path}: is listed twice in --data.stores; remove one of them.")
    if config.manifest:
        from jaxhisto.data.listed import open_listed  # which imports this module

        return open_listed(config, paths)
    sources = [open_source(path, config) for path in paths]
    for pattern in config.exclude:
        if not any(pattern in source.matched for source in sources):
            raise StoreError(
                f"{paths[0]}: exclude pattern {pattern!r} matches nothing here"
                f"{f' or in the {len(paths) - 1} other sources' if len(paths) > 1 else ''}; "
                "correct it or leave it out."
            )
    return Tiles(sources, config)


def open_for(config: DataConfig, flags: Mapping[str, str]) -> Tiles:
    """`open_tiles` for a verb that has other flags than `pretrain`; refusals name those.

    Args:
      config: what to open.
      flags: what stands there in the place of `--data.NAME`, by NAME.

    Raises:
      StoreError: as `open_tiles`.
    """
    try:
        return open_tiles(config)
    except StoreError as error:
        text = str(error)
        for name, ours in flags.items():
            text = text.replace(f"--data.{name}", ours)
        raise StoreError(text) from error


class Tiles:
    """Random access to the tiles of all sources; safe to use from several threads.

    Attributes:
      canvas: (H, W) that holds any tile, pixels.
      hash: sha256 over the stores' hashes, the images' names and contents, the patterns and the
        cut; the same data at another place has the same hash.
      dropped: (name, reason) of each unreadable image that was left out.
      name: the sources in a few words, for messages.
    """

    def __init__(self, sources: list[Source], config: DataConfig) -> None:
        self.sources = sources
        self._ends = list(itertools.accumulate(len(source) for source in sources))
        canvases = [source.canvas for source in sources]
        self.canvas = (max(h for h, _ in canvases), max(w for _, w in canvases))
        rule = [list(config.exclude), config.max_side, [source.hash for source in sources]]
        self.hash = hashlib.sha256(json.dumps(["jaxhisto-mix-1", *rule]).encode()).hexdigest()
        self.dropped = [bad for source in sources for bad in source.dropped]
        others = f" and {len(sources) - 1} more" if len(sources) > 1 else ""
        self.name = f"{sources[0].path}{others}"

    def __len__(self) -> int:
        return self._ends[-1]

    def read(self, i: int, out: NDArray[np.uint8] | None = None) -> NDArray[np.uint8]:
        """Tile i, (h, w, 3) uint8 RGB.

        Args:
          out: (H, W, 3) uint8, contiguous; a tile of this size may be decoded into it, and is then
            it. It is as it was where another array comes back.

        Raises:
          IndexError: i is not in [-len, len).
          StoreError: the tile cannot be read, or its file changed since it was opened.
        """
        source, row = self._find(i)
        return source.read(row, out)

    def sizes(self, i: int) -> tuple[int, int]:
        """Height and width of tile i, without reading it."""
        source, row = self._find(i)
        return source.size(row)

    def names(self, i: int) -> str:
        """Where tile i comes from: image file (with `@top,left` of a cell), or store and slide."""
        source, row = self._find(i)
        return source.name(row)

    def located(self, i: int, at: tuple[int, int] | None = None) -> Place:
        """Where tile i lies in its slide or image, under a name without the user's folders.

        Args:
          i: position, as in `read`.
          at: its x and y where they are known already; spares a store's record.

        Raises:
          IndexError, StoreError: as `read`.
        """
        source, row = self._find(i)
        place = source.located(row, at)
        # Two folders may hold the same names.
        more = len(self.sources) > 1
        return replace(place, name=f"{source.path.name}/{place.name}") if more else place

    def origin(self, i: int) -> tuple[Source, int]:
        """The store, folder or file that tile i is from, and its row there."""
        source, row = self._find(i)
        return source.at(row) if isinstance(source, Chosen) else (source, row)

    def origins(self) -> list[Source]:
        """All stores, folders and files, those behind a manifest too."""
        return [
            one
            for source in self.sources
            for one in (source.sources if isinstance(source, Chosen) else [source])
        ]

    def mpp_range(self) -> tuple[float, float] | None:
        """Smallest and largest um/px over the stores; None without one. Few other sources
        state any."""
        known = [mpp for source in self.sources if (mpp := source.mpp_range())]
        return (min(a for a, _ in known), max(b for _, b in known)) if known else None

    def summary(self) -> str:
        """What was opened: a line in all, a line a source, a line a dropped image."""
        h, w = self.canvas
        lines = [f"{len(self):,} tiles on a canvas of {h} x {w} px, data {self.hash[:12]}"]
        lines += [f"  {source.line()}" for source in self.sources]
        lines += [f"  dropped {name}: {reason}" for name, reason in self.dropped]
        return "\n".join(lines)

    def _find(self, i: int) -> tuple[Source, int]:
        index = range(len(self))[i]
        at = bisect.bisect_right(self._ends, index)
        return self.sources[at], index - (self._ends[at - 1] if at else 0)


@dataclass(frozen=True)
class Batch:
    """Tiles of one step, or this process's rows of them.

    Fields:
      index: (n,) int64, position of each tile in `Tiles`.
      tiles: (n, H, W, 3) uint8 RGB, content at the top left, zeros elsewhere; H, W = canvas.
      sizes: (n, 2) int32, height and width of the content.
    """

    index: NDArray[np.int64]
    tiles: NDArray[np.uint8]
    sizes: NDArray[np.int32]


class Source(Protocol):
    """One store, folder or file; `matched` holds the exclude patterns that left something out."""

    path: Path
    canvas: tuple[int, int]
    hash: str
    dropped: list[tuple[str, str]]
    matched: set[str]

    def __len__(self) -> int: ...
    def read(self, i: int, out: NDArray[np.uint8] | None = None) -> NDArray[np.uint8]:
        """As `Tiles.read`; most sources make no use of `out`."""
        ...

    def size(self, i: int) -> tuple[int, int]: ...
    def name(self, i: int) -> str: ...
    def located(self, i: int, at: tuple[int, int] | None = None) -> Place: ...
    def mpp_range(self) -> tuple[float, float] | None: ...
    def line(self) -> str: ...


@runtime_checkable
class Chosen(Protocol):
    """A source of tiles that a list names, which other sources hold."""

    sources: Sequence[Source]

    def at(self, i: int) -> tuple[Source, int]:
        """The source that holds tile i, and the tile's row there."""


class StoreSource:
    """The tiles of a store whose slides are not excluded."""

    def __init__(self, path: Path, config: DataConfig) -> None:
        self.path, self._store = path, TileStore(path)
        self._slides = self._store.slides()
        hits = {slide: matches(slide, config.exclude) for slide in set(self._slides)}
        self.matched = set[str]().union(*hits.values())
        self._kept = [i for i, slide in enumerate(self._slides) if not hits[slide]]
        self.slides = {self._slides[i] for i in self._kept}
        if not self._kept:
            raise StoreError(
                f"{path}: no tile is left of {len(self._slides)}; take the store out of "
                "--data.stores or change --data.exclude."
            )
        self.canvas = (self._store.tile_px, self._store.tile_px)
        # A store that says no um/px of level 0 was cut there. Rounded: a ratio of two nearly equal
        # figures, times 224 px, need not be 224.
        self._spans = {
            slide["id"]: round(
                self._store.tile_px * slide["tile_mpp"] / slide.get("mpp", slide["tile_mpp"]), 6
            )
            for slide in self._store.manifest["slides"]
        }
        self.hash = self._store.hash
        self.dropped: list[tuple[str, str]] = []

    def __len__(self) -> int:
        return len(self._kept)

    def read(self, i: int, out: NDArray[np.uint8] | None = None) -> NDArray[np.uint8]:
        if out is not None and out.shape[:2] != self.canvas:
            out = None
        try:
            tile = decode_jpeg(self._store.image(self._kept[i]), out)
        except ImageError as error:
            raise StoreError(f"{self.name(i)}: {error}.") from error
        if tile.shape[:2] != self.canvas:
            raise StoreError(
                f"{self.name(i)}: is {tile.shape[1]}x{tile.shape[0]} px where the manifest says "
                f"{self.canvas[0]}; cut the slides again."
            )
        return tile

    def size(self, i: int) -> tuple[int, int]:
        return self.canvas

    def name(self, i: int) -> str:
        return f"{self.path}: tile {self._kept[i]} (slide {self._slides[self._kept[i]]})"

    def row_in_store(self, i: int) -> int:
        """The row of tile i among all of the store, excluded ones too."""
        return self._kept[i]

    def located(self, i: int, at: tuple[int, int] | None = None) -> Place:
        slide = self._slides[self._kept[i]]
        if at is None:
            record = self._store[self._kept[i]]
            at = record["x"], record["y"]
        return Place(f"{slide}@{at[1]},{at[0]}", slide, *at, self._spans[slide])

    def mpp_range(self) -> tuple[float, float] | None:
        cut = self._store.manifest["slides"]
        sizes = [slide["tile_mpp"] for slide in cut if slide["id"] in self.slides]
        return min(sizes), max(sizes)

    def line(self) -> str:
        left_out = len(self._slides) - len(self)
        mpp = self.mpp_range()
        manifest = self._store.manifest
        datasets = {dataset_of(manifest, s) for s in manifest["slides"] if s["id"] in self.slides}
        return (
            f"{self.path}: store, {counted(len(self), 'tile')} of "
            f"{counted(len(self.slides), 'slide')}"
            + (f" of {len(datasets)} datasets" if len(datasets) > 1 else "")
            + f", {self.canvas[0]} px"
            + (f", {mpp[0]:g} to {mpp[1]:g} um/px" if mpp else "")
            + (f", {left_out:,} tiles excluded" if left_out else "")
        )


def open_source(path: Path, config: DataConfig) -> Source:
    """The store, folder or file at a path, checked whole."""
    # Not Path.is_dir: it raises on a name too long for the file system.
    if os.path.isdir(path):
        return StoreSource(path, config) if is_store(path) else FolderSource(path, config)
    return file_kinds.opened(path, config)
