"""Compaction: the parts of many slides as few shards, their records copied byte for byte.

Which slides share a shard is a function of the slides alone, and mostly of near ones: a slide
that comes, goes or is cut again changes its own shard and rarely another.

Disk: a shard is written while the parts in it still lie there, and they go when it is whole. The
first finish of a store thus needs one shard more than its parts, `SHARD_BYTES` at most (or the
largest slide). A finished store that is extended stays whole until its successor is, so the shards
that change are there twice: in the worst case the store's own size.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxhisto.data.durable import settle, temporary_name, writing
from jaxhisto.data.store import file_hash

SHARD_BYTES = 512 * 2**20  # 25 thousand slides of 100 tiles, some 100 GB, are about 300 files
READ_BYTES = 4 * 2**20  # held in memory at a time, about

Entry = dict[str, Any]
"""A slide's manifest entry."""


class Damaged(Exception):
    """Records are not what was cut; the message is the fact, `file` where they were read."""

    def __init__(self, file: Path, fact: str) -> None:
        super().__init__(fact)
        self.file = file


@dataclass(frozen=True)
class Rows:
    """Where a slide's records lie: those from `start` on of an ArrayRecord file."""

    file: Path
    start: int


class RecordSum:
    """sha256 over records, each after its length (8 bytes, little endian): a slide's content,
    wherever its records lie."""

    def __init__(self) -> None:
        self._sum = hashlib.sha256()

    def add(self, record: bytes) -> None:
        self._sum.update(len(record).to_bytes(8, "little"))
        self._sum.update(record)

    def hexdigest(self) -> str:
        return self._sum.hexdigest()


def plan(slides: Sequence[Entry]) -> list[list[Entry]]:
    """The slides of each shard, in the order given; no slide is split.

    From a quarter of `SHARD_BYTES` on, a shard ends after a slide with a chance that grows with the
    slide's bytes and is drawn from its id: so the ends lie at the same slides again after a change
    elsewhere. At `SHARD_BYTES` it ends in any case.
    """
    shards: list[list[Entry]] = []
    size, ended = 0, True
    for slide in slides:
        own = slide["part"]["bytes"]
        if ended or size + own > SHARD_BYTES:
            shards.append([])
            size = 0
        shards[-1].append(slide)
        size += own
        ended = size >= SHARD_BYTES // 4 and _draw(slide["id"]) * (SHARD_BYTES // 2) < own
    return shards


def _draw(slide: str) -> float:
    """In [0, 1), from the slide's id."""
    return int.from_bytes(hashlib.sha256(f"shard:{slide}".encode()).digest()[:6], "big") / 2**48


def shard_key(slides: Sequence[Entry]) -> str:
    """A name for what a shard holds: which slides, in which order, each as it was cut."""
    text = json.dumps([[s["id"], s["part"]["sha256"]] for s in slides])
    return hashlib.sha256(text.encode()).hexdigest()[:20]


def write_shard(
    store: Path, file: Path, slides: Sequence[Entry], rows: Callable[[Entry], Rows]
) -> Entry:
    """Copies the records of some slides into one file, whole or not at all.

    Args:
      store: whose shard it is, for messages.
      file: to write.
      slides: their entries; `part.records`, where it is there, is what the records must sum to.
      rows: where a slide's records lie.

    Returns:
      {bytes, sha256, records}, the last the sum of each slide's records.

    Raises:
      Damaged: records that cannot be read or are not what was cut.
      StoreError: the file cannot be written.
    """
    from array_record.python.array_record_module import ArrayRecordWriter

    temporary = temporary_name(file)
    sums: list[str] = []
    try:
        with writing(store):
            # One record a group, as in the parts; a JPEG does not shrink, and trying takes most of
            # the time.
            writer: Any = ArrayRecordWriter(str(temporary), "group_size:1,uncompressed")
        for slide in slides:
            place, own = rows(slide), RecordSum()
            for record in _records(place, slide):
                own.add(record)
                with writing(store):
                    writer.write(record)
            sums.append(own.hexdigest())
            if slide["part"].get("records", sums[-1]) != sums[-1]:
                raise Damaged(place.file, f"the tiles of {slide['id']} are not those that were cut")
        with writing(store):
            writer.close()
            written = {"bytes": temporary.stat().st_size, "sha256": file_hash(temporary)}
            settle(temporary, file)
        return {**written, "records": sums}
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def _records(place: Rows, slide: Entry) -> Iterator[bytes]:
    """A slide's records in their order, about `READ_BYTES` of them at a time."""
    from array_record.python.array_record_module import ArrayRecordReader

    step = max(1, READ_BYTES * slide["tiles"] // max(1, slide["part"]["bytes"]))
    end = place.start + slide["tiles"]
    try:
        # Without its own threads and read-ahead, which are 16 MB a thread and file.
        reader = ArrayRecordReader(str(place.file), "readahead_buffer_size:0,max_parallelism:0")
        try:
            for start in range(place.start, end, step):
                yield from reader.read(start, min(end, start + step))
        finally:
            reader.close()
    except (RuntimeError, ValueError, IndexError, OSError) as error:
        raise Damaged(place.file, f"the tiles of {slide['id']} cannot be read ({error})") from error
