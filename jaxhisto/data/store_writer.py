"""The tile store, written: parts first, then shards, the manifest last.

Everything is written into STORE/unfinished under temporary names and renamed when whole; what a
stopped run leaves there is taken up by the next one, slide by slide. An existing store stays valid
until its successor is whole and takes over with one rename, that of the manifest.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import cv2
import numpy as np
from numpy.typing import NDArray

from jaxhisto.data.compaction import RecordSum, plan
from jaxhisto.data.durable import settle, sync, temporary_name, write_file, writing
from jaxhisto.data.held import (
    STAMPS,
    Held,
    Shard,
    bare,
    part_file,
    place,
    read_json,
    record_file,
    slide_key,
    staged_shard,
)
from jaxhisto.data.store import (
    FORMAT,
    MANIFEST,
    UNFINISHED,
    file_hash,
    grouped,
    manifest_hash,
    read_manifest,
    shards_of,
)
from jaxhisto.data.tfds_format import METADATA, serialised, shard_file, tfds_name, write_metadata
from jaxhisto.errors import StoreError

__all__ = [
    "StoreWriter", "Tile", "encode_jpeg", "slide_key", "tfds_name", "write_file", "write_part",
    "write_record",
]  # fmt: skip

NEW, SETTINGS, LOCK = "manifest.new.json", "settings.json", "lock"
SAMPLING = {
    "4:4:4": cv2.IMWRITE_JPEG_SAMPLING_FACTOR_444,
    "4:2:2": cv2.IMWRITE_JPEG_SAMPLING_FACTOR_422,
    "4:2:0": cv2.IMWRITE_JPEG_SAMPLING_FACTOR_420,
}


@dataclass(frozen=True)
class Tile:
    """One record: JPEG bytes, origin in level-0 pixels of the slide, um/px of this image."""

    image: bytes
    slide: str
    dataset: str
    x: int
    y: int
    mpp: float
    mpp_source: str


def encode_jpeg(rgb: NDArray[np.uint8], quality: int, subsampling: str) -> bytes:
    """(h, w, 3) uint8 RGB as JPEG; quality 1..100, subsampling `4:4:4`, `4:2:2` or `4:2:0`."""
    options = [cv2.IMWRITE_JPEG_QUALITY, quality]
    options += [cv2.IMWRITE_JPEG_SAMPLING_FACTOR, SAMPLING[subsampling]]
    # OpenCV takes BGR and stores what the file format calls RGB.
    return cv2.imencode(".jpg", cv2.cvtColor(rgb, cv2.COLOR_RGB2BGR), options)[1].tobytes()


def write_part(store: Path, slide: str, tiles: Iterable[Tile]) -> dict[str, Any]:
    """Writes one slide's part into STORE/unfinished, whole or not at all.

    Returns:
      {bytes, sha256, records, tiles}, of which sha256 is the file's and records the `RecordSum`;
      {tiles: 0} and no file when there was no tile.

    Raises:
      StoreError: the output cannot be written.
    """
    from array_record.python.array_record_module import ArrayRecordWriter

    final = part_file(store, slide)
    temporary = temporary_name(final)
    count, total = 0, RecordSum()
    writer: Any = None
    try:
        for tile in tiles:
            if writer is None:
                with writing(store):
                    # One record a group: a tile is read without its neighbours. JPEG is packed.
                    writer = ArrayRecordWriter(str(temporary), "group_size:1,uncompressed")
            record = serialised(vars(tile))
            total.add(record)
            with writing(store):
                writer.write(record)
            count += 1
        if writer is None:
            return {"tiles": 0}
        with writing(store):
            writer.close()
            part = {"bytes": temporary.stat().st_size, "sha256": file_hash(temporary)}
            sync(temporary)
            os.replace(temporary, final)  # `write_record` makes the name durable, with its own
        return {**part, "records": total.hexdigest(), "tiles": count}
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def write_record(store: Path, record: dict[str, Any]) -> None:
    """Marks a slide as finished: its manifest entry, beside its part."""
    write_file(store, record_file(store, record["id"]), json.dumps(record, indent=1))


class StoreWriter:
    """One run's hold on a store's folder.

    Args:
      path: folder of the store, made if absent.
      settings: what must be equal for tiles to be in one store (JSON values).

    Raises:
      StoreError: the folder holds other things, tiles of other settings, an edited manifest, is
        being written by another run, or cannot be written.
    """

    def __init__(self, path: Path, settings: dict[str, Any]) -> None:
        self.path = path
        self.settings = settings
        self.work = path / UNFINISHED
        self.manifest: dict[str, Any] | None = None
        self._made = False
        self._lock: IO[str] | None = None

    def __enter__(self) -> StoreWriter:
        self._refuse_foreign()
        with writing(self.path):
            self._made = not self.path.exists()
            self.work.mkdir(parents=True, exist_ok=True)
            self._lock = (self.work / LOCK).open("w")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            self._lock.close()
            raise StoreError(f"{self.path}: another run is writing it; wait for it") from error
        try:
            if (self.path / MANIFEST).is_file():
                self.manifest = read_manifest(self.path)
            self._recover()
            self._refuse_other_settings()
            write_file(self.path, self.work / SETTINGS, json.dumps(self.settings, indent=1))
            self._held = Held(self.path, self.manifest)
        except BaseException:
            self._leave()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        self._leave()

    def finished(self, slide: str) -> dict[str, Any] | None:
        """The manifest entry of a slide whose tiles are whole, from this store or a stopped run,
        with the `stamp` of its file where that is known."""
        held = self._held
        for entry, stamp in (
            (record := held.record(slide), (record or {}).get("stamp")),
            (held.listed.get(slide), held.stamps.get(slide)),
        ):
            if entry and held.rows(entry):
                return bare(entry) | ({"stamp": stamp} if stamp else {})
        return None

    def stored_bytes(self) -> int:
        """Size of the finished store's tiles; 0 where there is none."""
        return sum(shard["bytes"] for shard in shards_of(self.manifest)) if self.manifest else 0

    def finish(
        self,
        records: list[dict[str, Any]],
        facts: dict[str, Any],
        report: Callable[[dict[str, Any]], str],
    ) -> dict[str, Any]:
        """Makes the folder a store of exactly these slides; a stop at any moment leaves the old
        store valid, or the new one, and every finished slide.

        Args:
          records: manifest entries in the order of the tiles; a `stamp` is kept beside them.
          facts: what else the manifest says (dataset, tile_px, failures, code_version).
          report: manifest -> report.html.

        Returns:
          The manifest written.
        """
        groups = plan([bare(record) for record in records])
        shards = [self._held.shard(group) for group in groups]
        name = tfds_name(facts["dataset"])
        # Other content has other names: the old shards stay where they are until the new ones are
        # a store, and whoever has them open reads on.
        digest = hashlib.sha256("".join(shard.sha256 for shard in shards).encode()).hexdigest()[:12]
        manifest = {"format": FORMAT, **facts, "settings": self.settings}
        manifest |= {
            "tiles": sum(shard.tiles for shard in shards),
            "shards": [
                {
                    "file": shard_file(name, digest, i, len(shards)),
                    "tiles": shard.tiles,
                    "bytes": shard.bytes,
                    "sha256": shard.sha256,
                }
                for i, shard in enumerate(shards)
            ],
            "slides": [e for i, shard in enumerate(shards) for e in shard.entries(groups[i], i)],
        }
        manifest["hash"] = manifest_hash(manifest)
        mended = any(shard.file.parent == self.work for shard in shards)
        if mended or not self.manifest or manifest["hash"] != self.manifest["hash"]:
            self._switch(manifest, shards, (name, digest), report)
            self.manifest = manifest
        stamps = {record["id"]: record["stamp"] for record in records if "stamp" in record}
        if stamps != self._held.stamps:
            write_file(self.path, self.path / STAMPS, json.dumps(stamps, indent=1))
        self._drop_stale()
        return manifest

    def _switch(
        self,
        manifest: dict[str, Any],
        shards: list[Shard],
        names: tuple[str, str],
        report: Callable[[dict[str, Any]], str],
    ) -> None:
        """Puts the new shards beside the old ones, then the new manifest in the old one's place."""
        write_file(self.path, self.work / NEW, json.dumps(manifest, indent=1))
        with writing(self.path):
            for shard, said in zip(shards, manifest["shards"], strict=True):
                place(shard.file, self.path / said["file"])
            metadata = self.work / "tfds"
            shutil.rmtree(metadata, ignore_errors=True)
            metadata.mkdir()
            write_metadata(metadata, *names, manifest["shards"], len(manifest["slides"]))
            for file in METADATA:
                settle(metadata / file, self.path / file)
        write_file(self.path, self.path / "report.html", report(manifest))
        with writing(self.path):
            os.replace(self.work / NEW, self.path / MANIFEST)
            sync(self.path)

    def _refuse_foreign(self) -> None:
        try:
            inside = [p.name for p in self.path.iterdir()] if self.path.is_dir() else []
        except OSError as error:
            raise StoreError(f"{self.path}: cannot be read ({error.strerror}); check it") from error
        if self.path.exists() and not self.path.is_dir():
            raise StoreError(f"{self.path}: is a file; give --out the name of a folder")
        if inside and MANIFEST not in inside and UNFINISHED not in inside:
            raise StoreError(
                f"{self.path}: holds other files ({min(inside)}); give --out a new or empty folder"
            )

    def _refuse_other_settings(self) -> None:
        started = any(self.work.glob("*.array_record"))
        theirs = self.manifest["settings"] if self.manifest else read_json(self.work / SETTINGS)
        if not theirs or theirs == self.settings or not (self.manifest or started):
            return
        keys = sorted(theirs.keys() | self.settings.keys())
        differ = [
            f"--{k.replace('_', '-')} {theirs.get(k)} there, {self.settings.get(k)} now"
            for k in keys
            if theirs.get(k) != self.settings.get(k)
        ]
        raise StoreError(
            f"{self.path}: holds tiles cut with other settings ({'; '.join(differ)}); give those "
            "again, another --out, or delete the folder to cut all slides again"
        )

    def _recover(self) -> None:
        """Undoes a `finish` that was stopped before its manifest, tidies up after one that was
        stopped behind it."""
        new = read_json(self.work / NEW)
        ours = {shard["file"] for shard in shards_of(self.manifest)} if self.manifest else set()
        for group, said in grouped(new) if new else ():
            file, staged = self.path / said["file"], staged_shard(self.path, group)
            if said["file"] in ours or not file.is_file():
                continue
            if staged.with_suffix(".json").is_file() and not staged.is_file():
                os.replace(file, staged)
            else:
                file.unlink()
        (self.work / NEW).unlink(missing_ok=True)
        for stale in self.work.glob("*.tmp"):
            stale.unlink(missing_ok=True)
        if self.manifest:
            self._drop_shards()

    def _drop_shards(self) -> None:
        """Deletes the shards of the store that was here before."""
        ours = {shard["file"] for shard in shards_of(self.manifest)} if self.manifest else set()
        for file in self.path.glob("*-train*.array_record-*-of-*"):
            if file.name not in ours:
                file.unlink(missing_ok=True)

    def _drop_stale(self) -> None:
        keep = {slide_key(entry["id"]) for entry in (self.manifest or {"slides": []})["slides"]}
        for fragment in (self.path / "report").glob("*.html"):
            # Other names are those of the datasets' pages.
            if re.fullmatch(r"[0-9a-f]{20}", fragment.stem) and fragment.stem not in keep:
                fragment.unlink(missing_ok=True)
        self._drop_shards()
        # What is known of a slide goes after its tiles, which it tells whole from half-written.
        for part in sorted(self.work.iterdir(), key=lambda p: p.suffix == ".json"):
            if part.is_dir():
                shutil.rmtree(part, ignore_errors=True)
            elif part.name != LOCK:
                part.unlink(missing_ok=True)

    def _leave(self) -> None:
        """Lets go; leaves no trace where nothing was begun."""
        try:
            begun = any(self.work.glob("*.array_record")) or (self.work / NEW).exists()
            if not begun:
                shutil.rmtree(self.work, ignore_errors=True)
                if self.manifest is None:
                    shutil.rmtree(self.path / "report", ignore_errors=True)
                if self._made:
                    with suppress(OSError):  # not empty: it has become a store
                        self.path.rmdir()
        finally:
            if self._lock:
                self._lock.close()
