"""The search: the labelled images are kept, the pretraining tiles pass by once.

What is held in memory grows with the labelled side alone: a digest, a small picture and some
hundred keypoints an image. Of the pretraining side slides and names are counted, nothing else.
"""

from __future__ import annotations

import hashlib
import itertools
import os
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from typing import TypeVar

import cv2
import numpy as np
from numpy.typing import NDArray

from jaxhisto.data.sources import Source, Tiles
from jaxhisto.file_config import LeakageConfig
from jaxhisto.leakage import hashes, names
from jaxhisto.leakage.hamming import HammingIndex
from jaxhisto.leakage.parts import ASKED, INDEXED, Common, Keypoints, PartIndex, compared, keypoints
from jaxhisto.progress import Progress

T = TypeVar("T")
Place = tuple[int, int]
"""Number of a source in its side, row in it."""

KINDS = ("file", "pixels", "near", "part")
PARTNERS = 20
"""Pairs that are listed of one labelled image; all are counted."""
BLOCK = 512
SHARE = 0.01  # of a labelled image that must be seen again: less is no evidence


@dataclass(frozen=True)
class Pair:
    """A pretraining tile and a labelled image that show the same.

    Fields:
      kind: `file`, same bytes; `pixels`, same pixels; `near`, the whole image changed; `part`, a
        piece of it.
      distance: bits in which the hashes differ, of 63; of a part the keypoints', of 128.
      correlation: of the luminances.
      symmetry: number of the symmetry that takes the labelled image to the tile; of a part 0, or
        4 where it is mirrored.
      share: of the labelled image's area that was found, 0..1.
      matrix: of a part, pixels of the tile to those of the (mirrored) labelled image.
    """

    kind: str
    pretraining: Place
    labelled: Place
    distance: float = 0.0
    correlation: float = 1.0
    symmetry: int = 0
    share: float = 1.0
    matrix: NDArray[np.float64] | None = None


@dataclass
class Found:
    """What a search found.

    Fields:
      pairs: at most `PARTNERS` for each labelled image.
      counts: pairs of each (labelled source, kind), all of them.
      images: labelled images of each (labelled source, kind), in the first kind that applies.
      shared: for each labelled source, the slides, patients and names that both sides have.
      flat: images too flat to tell: of the pretraining side, of each labelled source.
    """

    pairs: list[Pair] = field(default_factory=list)
    counts: Counter[tuple[int, str]] = field(default_factory=Counter)
    images: Counter[tuple[int, str]] = field(default_factory=Counter)
    shared: list[list[names.Shared]] = field(default_factory=list)
    flat: tuple[int, list[int]] = (0, [])


@dataclass(frozen=True)
class Look:
    """What is kept of an image: digests of pixels and file, small picture, constant or not."""

    digest: bytes
    file: bytes | None
    small: NDArray[np.float32]
    constant: bool
    marks: tuple[Keypoints, Keypoints] | None = None
    common: Sequence[Common] = ()


class Labelled:
    """The labelled images, indexed."""

    def __init__(self, tiles: Tiles, config: LeakageConfig, threads: int) -> None:
        self.tiles, self._config = tiles, config
        self.places = [(s, r) for s, source in enumerate(tiles.sources) for r in range(len(source))]
        files = _file_digests(tiles)

        def look(place: Place) -> Look:
            image = tiles.sources[place[0]].read(place[1])
            light = hashes.grey(image)
            marks = None
            if config.parts:
                mirrored = hashes.turned(light, 4)
                marks = keypoints(light, INDEXED), keypoints(mirrored, INDEXED)
            return _look(image, light, _file_of(tiles, files, place), marks)

        looks = list(_passed(self.places, look, threads, "labelled images"))
        self.flat = [_is_flat(look, config) for look in looks]
        self.digests, self.files = defaultdict(list), defaultdict(list)
        for row, each in enumerate(looks):
            if not each.constant:
                self.digests[each.digest].append(row)
                self.files[each.file].append(row)
        self.smalls = np.stack([each.small for each in looks])
        codes = hashes.all_hashes(self.smalls)
        self._hashed = np.flatnonzero(~np.array(self.flat))
        self._index = HammingIndex(codes[self._hashed].ravel(), config.distance)
        self._parts = PartIndex([each.marks for each in looks if each.marks])
        self._light = lru_cache(maxsize=64)(self._read_light)

    def near(self, looks: Sequence[Look]) -> Iterator[tuple[int, int, int, int, float]]:
        """(tile, labelled row, symmetry, distance, r) of each whole image that looks alike."""
        alive = [n for n, look in enumerate(looks) if not _is_flat(look, self._config)]
        if not alive:
            return
        codes = hashes.hashes(np.stack([looks[n].small for n in alive]))
        best: dict[tuple[int, int], tuple[float, int, int]] = {}
        for query, code, distance in zip(*self._index.pairs(codes), strict=True):
            tile, row = alive[query], int(self._hashed[code // 8])
            symmetry = int(code % 8)
            turned = hashes.turned(self.smalls[row], symmetry)
            r = hashes.correlation(looks[tile].small, turned)
            if r >= self._config.correlation:
                found = (r, -int(distance), symmetry)
                best[tile, row] = max(best.get((tile, row), found), found)
        for (tile, row), (r, distance, symmetry) in sorted(best.items()):
            yield tile, row, symmetry, -distance, r

    def common(self, light: NDArray[np.uint8]) -> list[Common]:
        """The labelled images of which a piece is in this luminance, compared on pixels."""
        found = []
        for row, mirrored, matrix, distance in self._parts.candidates(keypoints(light, ASKED)):
            theirs = hashes.turned(self._light(row), 4 if mirrored else 0)
            r, share, deviation = compared(light, theirs, matrix)
            enough = r >= self._config.correlation and deviation >= self._config.flat
            if enough and share >= SHARE:
                found.append(Common(row, mirrored, matrix, r, share, distance))
        return found

    def _read_light(self, row: int) -> NDArray[np.uint8]:
        source, at = self.places[row]
        return hashes.grey(self.tiles.sources[source].read(at))


def search(pretraining: Tiles, against: Tiles, config: LeakageConfig) -> Found:
    """Compares every pretraining tile with every labelled image.

    Args:
      pretraining, against: both opened uncut; the second is held in memory, about 100 KB an image
        with `parts`, 5 KB without.

    Raises:
      StoreError: an image that cannot be read any more.
      ConfigError: a pattern that is no regular expression.
    """
    patterns = names.read_patterns(config.patient_pattern, config.slide_pattern)
    threads = config.threads or os.cpu_count() or 1
    with _one_thread_each():
        labelled = Labelled(against, config, threads)
        found = Found()
        ours = names.Groups()
        flat = _pass_by(pretraining, labelled, config, threads, found, ours, patterns)
    theirs = [_groups(source, patterns) for source in against.sources]
    found.shared = [names.shared(ours, groups) for groups in theirs]
    ends = itertools.accumulate((len(s) for s in against.sources), initial=0)
    found.flat = flat, [sum(labelled.flat[a:b]) for a, b in itertools.pairwise(ends)]
    return found


def _pass_by(
    pretraining: Tiles,
    labelled: Labelled,
    config: LeakageConfig,
    threads: int,
    found: Found,
    groups: names.Groups,
    patterns: names.Patterns,
) -> int:
    """Fills `found` and `groups`; returns how many tiles were too flat to tell."""
    files = _file_digests(pretraining)
    places = ((s, r) for s, source in enumerate(pretraining.sources) for r in range(len(source)))
    listed, first, flat = Counter[int](), dict[int, str](), 0

    def look(place: Place) -> Look:
        image = pretraining.sources[place[0]].read(place[1])
        light = hashes.grey(image)
        common = labelled.common(light) if config.parts else ()
        return _look(image, light, _file_of(pretraining, files, place), None, common)

    progress = Progress("pretraining tiles", len(pretraining), every=20_000)
    done = 0
    with ThreadPoolExecutor(threads) as pool:
        for block in iter(lambda: list(itertools.islice(places, BLOCK)), []):
            looks = list(pool.map(look, block))
            for at, each in zip(block, looks, strict=True):
                source = pretraining.sources[at[0]]
                groups.add(patterns.origin(source, at[1]), source.name(at[1]))
                flat += _is_flat(each, config)
            for row, pair in _pairs(block, looks, labelled):
                found.counts[pair.labelled[0], pair.kind] += 1
                first[row] = min(first.get(row, pair.kind), pair.kind, key=KINDS.index)
                if (listed := _count(listed, row))[row] <= PARTNERS:
                    found.pairs.append(pair)
            done += len(block)
            progress.update(done)
    progress.close()
    for row, kind in first.items():
        found.images[labelled.places[row][0], kind] += 1
    return flat


def _count(counter: Counter[int], row: int) -> Counter[int]:
    counter[row] += 1
    return counter


def _pairs(
    block: Sequence[Place], looks: Sequence[Look], labelled: Labelled
) -> Iterator[tuple[int, Pair]]:
    """(labelled row, pair) of a block; a pair comes once, as the first kind that applies."""
    seen: set[tuple[int, int]] = set()

    def once(tile: int, row: int, kind: str, **facts: object) -> Iterator[tuple[int, Pair]]:
        if (tile, row) not in seen:
            seen.add((tile, row))
            yield row, Pair(kind, block[tile], labelled.places[row], **facts)  # type: ignore[arg-type]

    for tile, look in enumerate(looks):
        for row in labelled.files[look.file] if look.file in labelled.files and look.file else ():
            yield from once(tile, row, "file")
        for row in labelled.digests.get(look.digest, ()):
            yield from once(tile, row, "pixels")
    for tile, row, symmetry, distance, r in labelled.near(looks):
        facts = {"distance": distance, "correlation": r, "symmetry": symmetry}
        yield from once(tile, row, "near", **facts)
    for tile, look in enumerate(looks):
        for piece in look.common:
            facts = {"distance": piece.distance, "correlation": piece.correlation}
            facts |= {"symmetry": 4 * piece.mirrored, "share": piece.share}
            yield from once(tile, piece.image, "part", matrix=piece.matrix, **facts)


def _look(
    image: NDArray[np.uint8],
    light: NDArray[np.uint8],
    file: bytes | None,
    marks: tuple[Keypoints, Keypoints] | None = None,
    common: Sequence[Common] = (),
) -> Look:
    digest = hashlib.sha256(repr(image.shape).encode())
    digest.update(image.tobytes())
    constant = bool(image.min() == image.max())
    return Look(digest.digest(), file, hashes.thumbnail(light), constant, marks, common)


def _is_flat(look: Look, config: LeakageConfig) -> bool:
    return float(look.small.std()) < config.flat


def _groups(source: Source, patterns: names.Patterns) -> names.Groups:
    groups = names.Groups()
    for row in range(len(source)):
        groups.add(patterns.origin(source, row), source.name(row))
    return groups


def _file_digests(tiles: Tiles) -> dict[str, bytes]:
    return {n: d for source in tiles.sources for n, d in names.file_digests(source).items()}


def _file_of(tiles: Tiles, files: dict[str, bytes], place: Place) -> bytes | None:
    return files.get(tiles.sources[place[0]].name(place[1])) if files else None


def _passed(
    items: Sequence[Place], work: Callable[[Place], T], threads: int, what: str
) -> Iterator[T]:
    progress = Progress(what, len(items), every=20_000)
    with ThreadPoolExecutor(threads) as pool:
        for start in range(0, len(items), BLOCK):
            yield from pool.map(work, items[start : start + BLOCK])
            progress.update(min(start + BLOCK, len(items)))
    progress.close()


@contextmanager
def _one_thread_each() -> Iterator[None]:
    """OpenCV's own threads would fight with ours."""
    before = cv2.getNumThreads()
    cv2.setNumThreads(1)
    try:
        yield
    finally:
        cv2.setNumThreads(before)
