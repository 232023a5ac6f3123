"""What a run trains on: tile stores and plain image folders, one after the other.

`Tiles` gives random access to the mix and a hash of all that went in. Everything is checked on
opening, every image decoded once, so that a run does not end on a bad file hours later.
"""

from __future__ import annotations

import bisect
import hashlib
import itertools
import json
import os
import sys
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from jaxhisto.config import DataConfig
from jaxhisto.data.images import SUFFIXES, ImageError, decode_image, decode_jpeg
from jaxhisto.data.store import MANIFEST, UNFINISHED, TileStore, is_store
from jaxhisto.errors import StoreError

T = TypeVar("T")
AT_ONCE = 4096  # files handed to the threads together: a future each, so not all of a million


def open_tiles(config: DataConfig) -> Tiles:
    """Opens the mix, in the order of `config.stores` or of a manifest, and checks all of it.

    Raises:
      StoreError: a store or folder that is missing, empty, damaged, given twice or unreadable in
        part; an `exclude` pattern that matches nothing, and would let a test section in.
    """
    if not config.stores:
        raise StoreError("no data: pass --data.stores with tile stores or image folders.")
    paths = [Path(text).expanduser() for text in config.stores]
    for path, earlier in itertools.combinations(reversed(paths), 2):
        if path.resolve() == earlier.resolve():
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

    def read(self, i: int) -> NDArray[np.uint8]:
        """Tile i, (h, w, 3) uint8 RGB.

        Raises:
          IndexError: i is not in [-len, len).
          StoreError: the tile cannot be read, or its file changed since it was opened.
        """
        source, row = self._find(i)
        return source.read(row)

    def sizes(self, i: int) -> tuple[int, int]:
        """Height and width of tile i, without reading it."""
        source, row = self._find(i)
        return source.size(row)

    def names(self, i: int) -> str:
        """Where tile i comes from: image file (with `@top,left` of a cell), or store and slide."""
        source, row = self._find(i)
        return source.name(row)

    def mpp_range(self) -> tuple[float, float] | None:
        """Smallest and largest um/px over the stores; None without one. Folders state none."""
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
    """One store or folder; `matched` holds the exclude patterns that left something out."""

    path: Path
    canvas: tuple[int, int]
    hash: str
    dropped: list[tuple[str, str]]
    matched: set[str]

    def __len__(self) -> int: ...
    def read(self, i: int) -> NDArray[np.uint8]: ...
    def size(self, i: int) -> tuple[int, int]: ...
    def name(self, i: int) -> str: ...
    def mpp_range(self) -> tuple[float, float] | None: ...
    def line(self) -> str: ...


class StoreSource:
    """The tiles of a store whose slides are not excluded."""

    def __init__(self, path: Path, config: DataConfig) -> None:
        self.path, self._store = path, TileStore(path)
        self._slides = self._store.slides()
        hits = {slide: _matches(slide, config.exclude) for slide in set(self._slides)}
        self.matched = set[str]().union(*hits.values())
        self._kept = [i for i, slide in enumerate(self._slides) if not hits[slide]]
        self.slides = {self._slides[i] for i in self._kept}
        if not self._kept:
            raise StoreError(
                f"{path}: no tile is left of {len(self._slides)}; take the store out of "
                "--data.stores or change --data.exclude."
            )
        self.canvas = (self._store.tile_px, self._store.tile_px)
        self.hash = self._store.hash
        self.dropped: list[tuple[str, str]] = []

    def __len__(self) -> int:
        return len(self._kept)

    def read(self, i: int) -> NDArray[np.uint8]:
        try:
            tile = decode_jpeg(self._store[self._kept[i]]["image"])
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

    def mpp_range(self) -> tuple[float, float] | None:
        cut = self._store.manifest["slides"]
        sizes = [slide["tile_mpp"] for slide in cut if slide["id"] in self.slides]
        return min(sizes), max(sizes)

    def line(self) -> str:
        left_out = len(self._slides) - len(self)
        mpp = self.mpp_range()
        return (
            f"{self.path}: store, {len(self):,} tiles of {len(self.slides)} slides"
            f", {self.canvas[0]} px"
            + (f", {mpp[0]:g} to {mpp[1]:g} um/px" if mpp else "")
            + (f", {left_out:,} tiles excluded" if left_out else "")
        )


@dataclass(frozen=True, slots=True)
class _Checked:
    """An image file as it was found on opening; `reason` is empty for a good one."""

    name: str
    sha256: bytes = b""
    height: int = 0
    width: int = 0
    reason: str = ""
    remedy: str = ""


class FolderSource:
    """The images below a folder, in the order of their names; long ones in cells.

    An image is decoded for each of its cells, so folders of slides belong in `jaxhisto tile`.
    `image_of` has the image of each.
    """

    def __init__(self, path: Path, config: DataConfig) -> None:
        self.path = path
        names = image_names(path)
        hits = {name: _matches(name, config.exclude) for name in names}
        self.matched = set[str]().union(*hits.values())
        wanted = [name for name in names if not hits[name]]
        self._excluded = len(names) - len(wanted)
        checked = _checked(path, wanted, config.threads)
        bad = [image for image in checked if image.reason]
        if len(bad) > config.failures_allowed:
            raise StoreError(
                f"{path}: {len(bad)} of {len(checked)} images cannot be used, the first, "
                f"{bad[0].name}, {bad[0].reason}; {bad[0].remedy}, or pass "
                f"--data.failures-allowed {len(bad)} to go on without."
            )
        self.images = [image for image in checked if not image.reason]
        if not self.images:
            raise StoreError(
                f"{path}: no image is left of {len(names)} ({self._excluded} excluded, {len(bad)} "
                "unreadable); take the folder out of --data.stores or change --data.exclude."
            )
        self._cells = [  # image, top, left, height, width
            (n, top, left, h, w)
            for n, image in enumerate(self.images)
            for top, h in _cuts(image.height, config.max_side)
            for left, w in _cuts(image.width, config.max_side)
        ]
        self.image_of = [self.images[cell[0]] for cell in self._cells]
        self.canvas = (max(cell[3] for cell in self._cells), max(cell[4] for cell in self._cells))
        self.dropped = [(str(path / image.name), image.reason) for image in bad]
        content = [[image.name, image.sha256.hex()] for image in self.images]
        self.hash = hashlib.sha256(json.dumps(content).encode()).hexdigest()

    def __len__(self) -> int:
        return len(self._cells)

    def read(self, i: int) -> NDArray[np.uint8]:
        n, top, left, h, w = self._cells[i]
        file = self.path / self.images[n].name
        try:
            data = file.read_bytes()
            if hashlib.sha256(data).digest() != self.images[n].sha256:
                raise ImageError("changed since the run opened it", "restore it or start a new run")
            return decode_image(data)[top : top + h, left : left + w]
        except OSError as error:
            raise StoreError(
                f"{file}: cannot be read any more ({error.strerror}); restore it."
            ) from error
        except ImageError as error:
            raise StoreError(f"{file}: {error}.") from error

    def size(self, i: int) -> tuple[int, int]:
        return self._cells[i][3], self._cells[i][4]

    def name(self, i: int) -> str:
        n, top, left, h, w = self._cells[i]
        image = self.images[n]
        cell = "" if (h, w) == (image.height, image.width) else f"@{top},{left}"
        return f"{self.path / image.name}{cell}"

    def mpp_range(self) -> None:
        return None

    def line(self) -> str:
        cells = "" if len(self) == len(self.images) else f" in {len(self):,} cells"
        return (
            f"{self.path}: folder, {len(self.images):,} images{cells}"
            + (f", {self._excluded:,} excluded" if self._excluded else "")
            + (f", {len(self.dropped):,} dropped" if self.dropped else "")
        )


def open_source(path: Path, config: DataConfig) -> Source:
    """The store or folder at a path, checked whole."""
    if not path.is_dir():
        fact = "is not a folder" if path.exists() else "does not exist"
        raise StoreError(f"{path}: {fact}; pass a tile store or a folder of images.")
    return StoreSource(path, config) if is_store(path) else FolderSource(path, config)


def _matches(name: str, patterns: Iterable[str]) -> set[str]:
    """The patterns that match a relative name, or its last part."""
    last = name.rpartition("/")[2]
    return {p for p in patterns if fnmatchcase(name, p) or fnmatchcase(last, p)}


def image_names(folder: Path) -> list[str]:
    """Names of the images below a folder, sorted, with / between parts; dot files are not seen.

    A tile store in there, whole or not, is refused: its report holds pictures, which are no tiles.
    """
    names, seen = [], set()
    for root, dirs, files in os.walk(folder, onerror=_cannot_list, followlinks=True):
        real = os.path.realpath(root)
        if real in seen:  # a link back to where the walk has been
            dirs.clear()
            continue
        seen.add(real)
        dirs[:] = sorted(d for d in dirs if not d.startswith("."))
        if UNFINISHED in dirs and _is_tiling(Path(root, UNFINISHED)):
            raise StoreError(f"{root}: tiling was stopped; run the same `jaxhisto tile` again.")
        if any(".array_record" in name for name in files):
            raise StoreError(
                f"{root}: is a tile store inside an image folder, or one without its {MANIFEST}; "
                "list finished stores by their own path."
            )
        inside = Path(root).relative_to(folder)
        names += [(inside / f).as_posix() for f in files if _is_image(f)]
    if not names:
        raise StoreError(
            f"{folder}: no images ({', '.join(s[1:] for s in SUFFIXES)}) and no tile store in "
            "here; check the path, and cut slides with `jaxhisto tile`."
        )
    return sorted(names)


def _is_tiling(folder: Path) -> bool:
    return (folder / "settings.json").exists() or any(folder.glob("*.array_record"))


def _is_image(file: str) -> bool:
    return file.lower().endswith(SUFFIXES) and not file.startswith(".")


def _cannot_list(error: OSError) -> None:
    raise StoreError(f"{error.filename}: cannot be listed ({error.strerror}); check permissions.")


def _checked(folder: Path, names: list[str], threads: int) -> list[_Checked]:
    """Reads and decodes every image once."""
    Image.init()  # loads all decoders; left to the threads they would race for it

    def check(name: str) -> _Checked:
        try:
            data = (folder / name).read_bytes()
            h, w = decode_image(data, checksums=True).shape[:2]
        except ImageError as error:
            return _Checked(name, reason=error.fact, remedy=error.remedy)
        except OSError as error:
            return _Checked(name, reason=f"cannot be read ({error.strerror})", remedy="remove it")
        return _Checked(name, hashlib.sha256(data).digest(), h, w)

    with ThreadPoolExecutor(threads or os.cpu_count()) as pool:
        blocks = (names[i : i + AT_ONCE] for i in range(0, len(names), AT_ONCE))
        images = itertools.chain.from_iterable(pool.map(check, block) for block in blocks)
        return list(_reported(images, len(names), f"{folder}: checking images"))


def _reported(items: Iterable[T], total: int, label: str) -> Iterator[T]:
    """Passes items on; says on stderr how far it is once it takes longer than two seconds."""
    terminal = sys.stderr.isatty()
    pause, due = (0.5 if terminal else 10.0), time.monotonic() + 2.0
    told = False
    for done, item in enumerate(items, 1):
        yield item
        if (now := time.monotonic()) >= due or (told and done == total):
            end = "\r" if terminal and done < total else "\n"
            print(f"{label} {done:,}/{total:,}", end=end, file=sys.stderr, flush=True)
            told, due = True, now + pause


def _cuts(length: int, longest: int) -> list[tuple[int, int]]:
    """(start, size) of the fewest pieces of a side, equal to 1 px, none above `longest`."""
    count = -(-length // longest)
    edges = [length * k // count for k in range(count + 1)]
    return [(a, b - a) for a, b in itertools.pairwise(edges)]
