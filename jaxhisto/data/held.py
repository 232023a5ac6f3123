"""What a store's folder holds of each slide: its part, a shard of a stopped compaction, the store.

    STORE/unfinished/KEY.array_record         the part of a slide, KEY.json its manifest entry
    STORE/unfinished/shard-KEY.array_record   a shard of the next store, shard-KEY.json its slides

The .json is written last and says that the other is whole. A slide's entry stays until the store
is finished; its part goes when a shard has its tiles.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxhisto.data.compaction import Damaged, Entry, Rows, shard_key, write_shard
from jaxhisto.data.durable import settle, sync, write_file, writing
from jaxhisto.data.store import UNFINISHED, check_part, grouped
from jaxhisto.errors import StoreError

STAMPS = "stamps.json"


@dataclass(frozen=True)
class Shard:
    """A whole file of slides, one after the other.

    Args:
      file: in STORE/unfinished, or in the finished store.
      bytes, sha256: of the file.
      tiles: in it.
      records: the `RecordSum` of each slide.
    """

    file: Path
    bytes: int
    sha256: str
    tiles: int
    records: tuple[str, ...]

    def entries(self, slides: Sequence[Entry], number: int) -> Iterator[Entry]:
        """The manifest entries of its slides: with the shard's number and the first row in it."""
        row = 0
        for slide, records in zip(slides, self.records, strict=True):
            part = {**slide["part"], "records": records}
            yield {**slide, "part": part, "shard": number, "row": row}
            row += slide["tiles"]


class Held:
    """Finds the tiles of slides in a store's folder, and makes shards of them.

    Args:
      path: of the store.
      manifest: of the finished store that is there, if one is.

    Attributes:
      listed: the finished store's entry of each slide id.
      stamps: of the files that those were cut of, in a file beside the manifest: the time of change
        is no content, and the same slides elsewhere make the same store.
    """

    def __init__(self, path: Path, manifest: dict[str, Any] | None) -> None:
        self.path, self.work = path, path / UNFINISHED
        self.listed: dict[str, Entry] = {}
        self._rows: dict[tuple[str, str], Rows] = {}
        self._shards: dict[str, Shard] = {}
        self._sound: dict[Path, bool] = {}
        self.stamps: dict[str, str] = read_json(path / STAMPS) or {}
        for slides, said in grouped(manifest) if manifest else ():
            self.listed |= {slide["id"]: slide for slide in slides}
            self._take(slides, said, path / said["file"])
        for file in self.work.glob("shard-*.json"):
            staged = read_json(file)
            if staged:
                self._take(staged["slides"], staged, file.with_suffix(".array_record"))

    def record(self, slide: str) -> Entry | None:
        """The entry of a slide that was cut since the store was finished."""
        return read_json(record_file(self.path, slide))

    def rows(self, slide: Entry) -> Rows | None:
        """Where a slide's tiles lie, once the file is what was written; None: nowhere."""
        part = part_file(self.path, slide["id"])
        if self._is_sound(part, slide["part"]):
            self._rows[_tiles(slide)] = Rows(part, 0)
            return self._rows[_tiles(slide)]
        found = self._rows.get(_tiles(slide))
        return found if found and self._sound.get(found.file) else None

    def shard(self, slides: Sequence[Entry]) -> Shard:
        """The shard of these slides: one that is there, or a new one in place of their parts.

        Raises:
          StoreError: it cannot be written, or tiles are gone or damaged.
        """
        key = shard_key(slides)
        if key not in self._shards:
            file = staged_shard(self.path, slides)
            try:
                written = write_shard(self.path, file, slides, self._known_rows)
            except Damaged as error:
                if error.file.parent == self.work:  # or the next run would take it up again
                    error.file.unlink(missing_ok=True)
                raise StoreError(
                    f"{error.file}: {error}; run the same command again, and they are cut anew"
                ) from error
            said = {k: written[k] for k in ("bytes", "sha256")}
            listed = [
                {"id": s["id"], "tiles": s["tiles"], "part": {**s["part"], "records": records}}
                for s, records in zip(slides, written["records"], strict=True)
            ]
            text = json.dumps({**said, "slides": listed}, indent=1)
            write_file(self.path, file.with_suffix(".json"), text)
            self._sound[file] = True
            self._take(listed, said, file)
        for slide in slides:
            with writing(self.path):
                part_file(self.path, slide["id"]).unlink(missing_ok=True)
        return self._shards[key]

    def _take(self, slides: Sequence[Entry], said: dict[str, Any], file: Path) -> None:
        """Notes a shard, if it is whole."""
        if file not in self._sound:
            self._sound[file] = _is_whole(file, said)
        if not self._sound[file]:
            return
        row = 0
        for slide in slides:
            self._rows[_tiles(slide)] = Rows(file, slide.get("row", row))
            row += slide["tiles"]
        records = tuple(slide["part"].get("records", "") for slide in slides)
        if all(records):  # not in stores of the first format
            shard = Shard(file, said["bytes"], said["sha256"], row, records)
            self._shards[shard_key(slides)] = shard

    def _known_rows(self, slide: Entry) -> Rows:
        part = part_file(self.path, slide["id"])
        found = self._rows.get(_tiles(slide)) or (Rows(part, 0) if part.is_file() else None)
        if found is None:
            raise Damaged(part, f"the tiles of {slide['id']} are gone")
        return found

    def _is_sound(self, part: Path, said: dict[str, Any]) -> bool:
        return part.is_file() and _is_whole(part, said)


def place(shard: Path, file: Path) -> None:
    """Gives a shard its name in the store. One of the store that is still there keeps its other
    name too: as a second link, or a copy where the file system has no links."""
    if shard == file:
        return
    if shard.parent.name == UNFINISHED:
        os.replace(shard, file)
    elif not file.exists():
        try:
            os.link(shard, file)
        except OSError:
            copy = file.parent / UNFINISHED / f"{file.name}.tmp"
            shutil.copyfile(shard, copy)
            settle(copy, file)
    sync(file.parent)


def bare(entry: Entry) -> Entry:
    """A slide's entry without its place in a store, and without its file's stamp."""
    part = {k: v for k, v in entry["part"].items() if k != "file"}
    return {k: v for k, v in entry.items() if k not in ("shard", "row", "stamp")} | {"part": part}


def slide_key(slide: str) -> str:
    """A file name for a slide id, which may hold slashes and be of any length."""
    return hashlib.sha256(slide.encode()).hexdigest()[:20]


def part_file(store: Path, slide: str) -> Path:
    """Where a slide's part is while the store is unfinished."""
    return store / UNFINISHED / f"{slide_key(slide)}.array_record"


def record_file(store: Path, slide: str) -> Path:
    """Where a slide's entry is while the store is unfinished."""
    return store / UNFINISHED / f"{slide_key(slide)}.json"


def staged_shard(store: Path, slides: Sequence[Entry]) -> Path:
    """Where the shard of some slides is until the store is finished."""
    return store / UNFINISHED / f"shard-{shard_key(slides)}.array_record"


def read_json(file: Path) -> dict[str, Any] | None:
    """The object in a file, or None where there is none or it was cut off."""
    try:
        value = json.loads(file.read_bytes())
    except (OSError, ValueError):
        return None
    return value if isinstance(value, dict) else None


def _tiles(slide: Entry) -> tuple[str, str]:
    """Which slide, and as it was cut which time."""
    return slide["id"], slide["part"]["sha256"]


def _is_whole(file: Path, said: dict[str, Any]) -> bool:
    try:
        check_part(file, said)
    except StoreError:
        return False
    return True
