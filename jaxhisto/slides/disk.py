"""What a store will need on its disk, before the first slide is cut."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from jaxhisto.config import TileConfig
from jaxhisto.console import counted, warn
from jaxhisto.data import compaction
from jaxhisto.data.held import part_file
from jaxhisto.data.store import UNFINISHED
from jaxhisto.errors import StoreError
from jaxhisto.slides import pool
from jaxhisto.slides.cutting import Cut, Job, cut_slide

SECTION_BYTES = 250_000  # a slide's report, about
PART_BYTES = 2**17  # an ArrayRecord file is no smaller
MOST_A_PIXEL = 3  # bytes: a JPEG of a tile is no larger than its pixels
MOST_A_BYTE = 100  # nor are a slide's tiles a hundred times its file
INDEX_FILES = (".mrxs", ".vms", ".vmu")  # their pixels lie in other files
SAMPLE, SAMPLE_TILES, SAMPLE_SECONDS = 12, 16, 120.0


@dataclass(frozen=True)
class Need:
    """Bytes that cutting some slides takes, and how that is known: `at most`, or `about`."""

    bytes: float
    how: str
    detail: str = ""


def check_disk(jobs: Sequence[Job], config: TileConfig, there: int, processes: int) -> None:
    """Prints what is needed beside what is free, and refuses what clearly does not fit.

    A bound from the counts and the sizes of the files answers where even that fits, and costs one
    look at the folder a slide. Else a few slides, spread over the list, are cut to the first tiles.

    Args:
      jobs: all slides; those that are cut already need nothing.
      config: of the run.
      there: bytes of the finished store, of which compaction may need a part once more.
      processes: that may run at the same time.

    Raises:
      StoreError: it does not fit and `config.check_disk` is on.
    """
    todo = [job for job in jobs if job.known is None]
    if not todo:
        return
    free = shutil.disk_usage(_existing(Path(config.out).absolute())).free
    rewritten = min(there, 2 * compaction.SHARD_BYTES * len(todo))
    need = _bound(todo, config)
    if _total(need, todo, rewritten) > free:
        need = _sampled(todo, config, processes) or need
    total = _total(need, todo, rewritten)
    what = f"{need.how} {_size(total)} for {counted(len(todo), 'slide')}{need.detail}"
    warn(f"disk: {what}; {_size(free)} are free at {config.out}")
    if need.how == "about" and total > free and config.check_disk:
        raise StoreError(
            f"{config.out}: {what} will not fit where {_size(free)} are free; free space, choose "
            "another --out, lower --max-tiles or --jpeg-quality, or pass --no-check-disk to cut "
            "until the disk is full"
        )


def _total(need: Need, todo: Sequence[Job], rewritten: int) -> float:
    """With the reports, and with what compaction takes for a while."""
    room = max(min(need.bytes, compaction.SHARD_BYTES), rewritten)
    return need.bytes + SECTION_BYTES * len(todo) + room


def _bound(todo: Sequence[Job], config: TileConfig) -> Need:
    by_file = sum(MOST_A_BYTE * _file_bytes(job) for job in todo) + PART_BYTES * len(todo)
    most = (config.max_tiles * config.tile_px**2 * MOST_A_PIXEL + PART_BYTES) * len(todo)
    return Need(min(by_file, most) if config.max_tiles else by_file, "at most")


def _file_bytes(job: Job) -> float:
    if job.path.suffix.lower() in INDEX_FILES:
        return float("inf")
    try:
        return sum(path.stat().st_size for path in (job.path, *job.others))
    except OSError:  # it fails later, by name
        return 0


def _sampled(todo: Sequence[Job], config: TileConfig, processes: int) -> Need | None:
    """An estimate from a few slides, each cut to its first tiles in a folder that is thrown away;
    None where none of them gives a tile."""
    count = min(SAMPLE, len(todo))
    some = [todo[(2 * i + 1) * len(todo) // (2 * count)] for i in range(count)]
    most = min(config.max_tiles or SAMPLE_TILES, SAMPLE_TILES)
    with tempfile.TemporaryDirectory(prefix="jaxhisto-") as folder:
        (Path(folder) / UNFINISHED).mkdir()
        jobs = [replace(j, config=replace(j.config, out=folder, max_tiles=most)) for j in some]
        limit = min(config.slide_timeout, SAMPLE_SECONDS)
        answers = pool.run(cut_slide, jobs, processes, limit, attempts=1)
        cuts = [answer.value for answer in answers if answer.value]
        sizes = [_tile_bytes(part_file(Path(folder), cut.record["id"])) for cut in cuts]
    if not cuts:
        return None
    tiles = [_tiles(cut, config) for cut in cuts]
    parts = (max(n * size, PART_BYTES) for n, size in zip(tiles, sizes, strict=True))
    each = sum(parts) / len(cuts)
    detail = (
        f" (from {len(cuts)} of them: {sum(tiles) / len(cuts):,.0f} tiles a slide of "
        f"{sum(sizes) / len(cuts) / 1e3:.3g} kB)"
    )
    return Need(each * len(todo), "about", detail)


def _tile_bytes(part: Path) -> float:
    """Mean size of the records in a part."""
    from array_record.python.array_record_module import ArrayRecordReader

    reader = ArrayRecordReader(str(part))
    records = reader.read_all()
    reader.close()
    return sum(len(record) for record in records) / len(records)


def _tiles(cut: Cut, config: TileConfig) -> int:
    """What a slide gives in all, of which the sample took the first."""
    foreground = cut.record["tiles"] + cut.record["rejected"]["over_cap"]
    return int(min(foreground, config.max_tiles or foreground))


def _existing(folder: Path) -> Path:
    """The folder, or what is there of it."""
    while not os.path.isdir(folder) and folder != folder.parent:
        folder = folder.parent
    return folder


def _size(count: float) -> str:
    if count == float("inf"):
        return "an unknown size"
    return f"{count / 1e9:.3g} GB" if count >= 1e9 else f"{count / 1e6:.3g} MB"
