"""The manifest of a draw: a frozen, hashed list of the tiles that a run shall train on.

JSON Lines. The first line says how the list came about and holds the sha256 of everything else;
each further line is a slide of a store with the rows drawn of it, or an image of a folder:

    {"format": "jaxhisto-manifest-1", "sha256": ..., "tiles": ..., "seed": ..., "rule": {...},
     "sources": [{"kind", "dataset", "hash", "tiles"}, ...],
     "datasets": [{"name", "organ", "stain", "available", "asked", "taken", "why"}, ...]}
    {"dataset": "TCGA-BRCA", "slide": "a.svs", "mpp": 0.25, "sha256": ..., "rows": [3, 17]}
    {"dataset": "glas", "slide": "testA_1.bmp", "mpp": null, "sha256": ..., "rows": null}

JSON Lines and not CSV: counts and rule need structure, and a line a slide keeps 400 thousand tiles
in a few megabytes. A tile is known by content: a row of the part (sha256) that holds its slide, or
the sha256 of its image file. No path is in here, so stores may move and the list stays the same.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxhisto.errors import StoreError
from jaxhisto.runlog import write_atomically
from jaxhisto.special_files import no_pipe

FORMAT = "jaxhisto-manifest-1"
FIELDS = ("dataset", "slide", "mpp", "sha256", "rows")
HEADER_MOST = 1 << 24  # bytes of a first line: far beyond what thousands of datasets take
AGAIN = "draw again with `jaxhisto sample`"


@dataclass(frozen=True, slots=True)
class Entry:
    """The tiles drawn of one slide, or one image of a folder.

    Fields:
      dataset: its name.
      slide: id in the store, or the image's name relative to its folder, / between parts.
      mpp: um/px of the tiles; none where an image folder states none.
      sha256: hex, of the store's part that holds the slide's tiles, or of the image file.
      rows: places in that part, from 0, ascending; none: the whole image.
    """

    dataset: str
    slide: str
    mpp: float | None
    sha256: str
    rows: tuple[int, ...] | None

    @property
    def tiles(self) -> int:
        """How many tiles it stands for; an image counts once."""
        return 1 if self.rows is None else len(self.rows)

    def where(self, row: int | None) -> str:
        """One of its tiles, for messages."""
        of = "" if row is None else f"tile {row} of "
        return f"{of}{self.slide} ({self.dataset})"


@dataclass(frozen=True)
class Manifest:
    """A list of tiles and how it was drawn.

    Fields:
      rule: the settings of the draw.
      seed: of the draw.
      sources: what it was drawn from: `kind` (store, folder), `dataset`, `hash`, `tiles`.
      datasets: `name`, `organ`, `stain`, `available`, `asked`, `taken` and `why` of each.
      entries: the list, in the order in which a run numbers the tiles.
    """

    rule: Mapping[str, Any]
    seed: int
    sources: Sequence[Mapping[str, Any]]
    datasets: Sequence[Mapping[str, Any]]
    entries: Sequence[Entry]

    def __len__(self) -> int:
        return sum(entry.tiles for entry in self.entries)

    def tiles(self) -> Iterator[tuple[Entry, int | None]]:
        """Each tile as its entry and its row there (none for an image), in the list's order."""
        for entry in self.entries:
            for row in (None,) if entry.rows is None else entry.rows:
                yield entry, row

    @property
    def hash(self) -> str:
        """sha256 (hex) over the whole content: equal for equal lists drawn by equal rules."""
        return self._rendered()[0]

    def text(self) -> str:
        """The file: ASCII, one JSON object a line."""
        digest, header, lines = self._rendered()
        first = json.dumps({"format": FORMAT, "sha256": digest, **header})
        return "".join(f"{line}\n" for line in (first, *lines))

    def _rendered(self) -> tuple[str, dict[str, Any], list[str]]:
        header = {
            "tiles": len(self),
            "seed": self.seed,
            "rule": dict(self.rule),
            "sources": [dict(source) for source in self.sources],
            "datasets": [dict(dataset) for dataset in self.datasets],
        }
        lines = [json.dumps({name: getattr(e, name) for name in FIELDS}) for e in self.entries]
        body = "".join(f"{line}\n" for line in lines)
        return _digest({"format": FORMAT, **header}, body.encode()), header, lines


def write_manifest(path: Path | str, manifest: Manifest) -> str:
    """Writes the list, whole or not at all; one that is there already is never replaced.

    Returns:
      The manifest's sha256.

    Raises:
      StoreError: a file of that name holds something else.
    """
    path, text = Path(path), manifest.text()
    if path.exists():
        if not path.is_file() or path.read_bytes() != text.encode():
            raise StoreError(
                f"{path}: is there and is not the list that this command draws; give another "
                "--out, or delete it if no run needs it."
            )
        return manifest.hash
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, text)
    return manifest.hash


def is_manifest(path: Path | str) -> bool:
    """True for a file that says it is such a list; reading it verifies that."""
    try:
        with no_pipe(Path(path)).open("rb") as file:
            start = file.readline(HEADER_MOST)
    except OSError:
        return False
    if not start.startswith(b"{"):
        return False
    header = _object(start)
    return str((header or {}).get("format", "")).startswith(FORMAT.rstrip("0123456789"))


def read_manifest(path: Path | str) -> Manifest:
    """Reads a list, its sha256 verified.

    Raises:
      StoreError: no such file, not a manifest, edited since it was drawn, empty, or a tile twice.
    """
    path = Path(path)
    try:
        first, _, body = no_pipe(path).read_bytes().partition(b"\n")
    except OSError as error:
        raise StoreError(
            f"{path}: cannot be read as a manifest ({error.strerror}); check --data.manifest, or "
            f"{AGAIN}."
        ) from error
    header = _object(first)
    if header is None or header.get("format") != FORMAT:
        raise StoreError(f"{path}: is not a {FORMAT} list of tiles; {AGAIN}.")
    stated = header.pop("sha256", None)
    if stated != _digest(header, body):
        raise StoreError(
            f"{path}: does not match its own sha256, it was edited or cut off after it was drawn; "
            f"restore the file, or {AGAIN}."
        )
    entries = [_entry(path, n, line) for n, line in enumerate(body.splitlines(), 2)]
    if not any(entry.tiles for entry in entries):
        raise StoreError(f"{path}: lists no tile; {AGAIN}.")
    _refuse_twice(path, entries)
    try:
        about = {name: header[name] for name in ("rule", "seed", "sources", "datasets")}
    except KeyError as error:
        raise StoreError(f"{path}: its first line lacks {error}; {AGAIN}.") from error
    return Manifest(entries=entries, **about)


def _digest(header: Mapping[str, Any], body: bytes) -> str:
    """sha256 of the header as canonical JSON (sorted keys, no spaces) and the lines below it."""
    canonical = json.dumps(header, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode() + b"\n" + body).hexdigest()


def _object(line: bytes) -> dict[str, Any] | None:
    try:
        value = json.loads(line)
    except ValueError:
        return None
    return value if isinstance(value, dict) else None


def _entry(path: Path, number: int, line: bytes) -> Entry:
    fields = _object(line)
    if fields is None or fields.keys() != set(FIELDS):
        raise StoreError(f"{path}: line {number} is no entry ({', '.join(FIELDS)}); {AGAIN}.")
    rows = fields.pop("rows")
    return Entry(rows=None if rows is None else tuple(rows), **fields)


def _refuse_twice(path: Path, entries: Sequence[Entry]) -> None:
    """One slide on two lines, or one row twice, would weigh a tile double."""
    places = Counter((e.dataset, e.slide, e.mpp, e.sha256) for e in entries)
    twice = [place[1] for place, count in places.items() if count > 1]
    twice += [e.slide for e in entries if e.rows is not None and len(set(e.rows)) < len(e.rows)]
    if twice:
        raise StoreError(
            f"{path}: lists tiles twice, of {len(twice)} slides, the first {twice[0]}; {AGAIN}."
        )
