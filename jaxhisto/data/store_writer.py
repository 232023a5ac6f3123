"""The tile store, written: parts first, the manifest last.

Everything is written into STORE/unfinished under temporary names and renamed when whole; what a
stopped run leaves there is taken up by the next one, slide by slide. An existing store stays valid
until the moment its parts are renamed, and a stop in between is undone at the next start.
"""

from __future__ import annotations

import fcntl
import functools
import hashlib
import io
import json
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import cv2
import numpy as np
from numpy.typing import NDArray

from jaxhisto.data.store import (
    FORMAT,
    MANIFEST,
    UNFINISHED,
    check_part,
    file_hash,
    manifest_hash,
    read_manifest,
)
from jaxhisto.errors import StoreError

OLD, NEW, SETTINGS, LOCK = "manifest.old.json", "manifest.new.json", "settings.json", "lock"
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


def slide_key(slide: str) -> str:
    """A file name for a slide id, which may hold slashes and be of any length."""
    return hashlib.sha256(slide.encode()).hexdigest()[:20]


def write_part(store: Path, slide: str, tiles: Iterable[Tile]) -> dict[str, Any]:
    """Writes one slide's part into STORE/unfinished, whole or not at all.

    Returns:
      {bytes, sha256, tiles}; {tiles: 0} and no file when there was no tile.

    Raises:
      StoreError: the output cannot be written.
    """
    from array_record.python.array_record_module import ArrayRecordWriter

    final = store / UNFINISHED / f"{slide_key(slide)}.array_record"
    temporary = final.with_name(f"{final.name}.{os.getpid()}.tmp")
    count = 0
    writer: Any = None
    try:
        for tile in tiles:
            if writer is None:
                with writing(store):
                    # One record a group: a tile is read without its neighbours.
                    writer = ArrayRecordWriter(str(temporary), "group_size:1")
            with writing(store):
                writer.write(_serialised(tile))
            count += 1
        if writer is None:
            return {"tiles": 0}
        with writing(store):
            writer.close()
            part = {"bytes": temporary.stat().st_size, "sha256": file_hash(temporary)}
            os.replace(temporary, final)
        return {**part, "tiles": count}
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def write_file(store: Path, file: Path, text: str) -> None:
    """Writes text under a temporary name and renames it; StoreError if the disk refuses."""
    with writing(store):
        file.parent.mkdir(parents=True, exist_ok=True)
        temporary = file.with_name(f"{file.name}.{os.getpid()}.tmp")
        try:
            temporary.write_text(text, encoding="utf-8")
            os.replace(temporary, file)
        finally:
            temporary.unlink(missing_ok=True)


def write_record(store: Path, record: dict[str, Any]) -> None:
    """Marks a slide as finished: its manifest entry, beside its part."""
    file = store / UNFINISHED / f"{slide_key(record['id'])}.json"
    write_file(store, file, json.dumps(record, indent=1))


@contextmanager
def writing(store: Path) -> Iterator[None]:
    """Turns what the disk refuses into a StoreError with a remedy."""
    try:
        yield
    except (OSError, RuntimeError) as error:  # ArrayRecord reports a full disk as RuntimeError
        why = error.strerror if isinstance(error, OSError) else str(error).split(";")[0]
        raise StoreError(
            f"{store}: cannot be written ({why}); free space or rights there and run the same "
            "command again, or choose another --out"
        ) from error


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
            self._recover()
            if (self.path / MANIFEST).is_file():
                self.manifest = read_manifest(self.path)
            self._refuse_other_settings()
            write_file(self.path, self.work / SETTINGS, json.dumps(self.settings, indent=1))
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
        """The manifest entry of a slide whose part is whole, from this store or a stopped run."""
        record = _read_json(self.work / f"{slide_key(slide)}.json")
        if record and self._whole(self.work / f"{slide_key(slide)}.array_record", record):
            return record
        entry = next(
            (s for s in (self.manifest or {"slides": []})["slides"] if s["id"] == slide), None
        )
        return entry if entry and self._whole(self.path / entry["part"]["file"], entry) else None

    def finish(
        self,
        records: list[dict[str, Any]],
        facts: dict[str, Any],
        report: Callable[[dict[str, Any]], str],
    ) -> dict[str, Any]:
        """Makes the folder a store of exactly these slides.

        Args:
          records: manifest entries in the order of the parts.
          facts: what else the manifest says (dataset, tile_px, failures, code_version).
          report: manifest -> report.html.

        Returns:
          The manifest written.
        """
        name = tfds_name(facts["dataset"])
        entries = [
            {
                **r,
                "part": {
                    **r["part"],
                    "file": f"{name}-train.array_record-{i:05d}-of-{len(records):05d}",
                },
            }
            for i, r in enumerate(records)
        ]
        manifest = {"format": FORMAT, **facts, "settings": self.settings}
        manifest |= {"tiles": sum(e["tiles"] for e in entries), "slides": entries}
        manifest["hash"] = manifest_hash(manifest)
        nothing_new = not any(self.work.glob("*.array_record"))
        if nothing_new and self.manifest and manifest["hash"] == self.manifest["hash"]:
            return manifest
        write_file(self.path, self.work / NEW, json.dumps(manifest, indent=1))
        with writing(self.path):
            self._retire()
            for entry in entries:
                os.replace(self._staged(entry), self.path / entry["part"]["file"])
            _write_tfds_metadata(self.path, name, entries)
        write_file(self.path, self.path / "report.html", report(manifest))
        with writing(self.path):
            os.replace(self.work / NEW, self.path / MANIFEST)
        self._drop_stale(entries)
        self.manifest = manifest
        return manifest

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
        theirs = self.manifest["settings"] if self.manifest else _read_json(self.work / SETTINGS)
        if not theirs or theirs == self.settings or not (self.manifest or started):
            return
        keys = sorted(theirs.keys() | self.settings.keys())
        differ = [
            f"{k} {theirs.get(k)} there, {self.settings.get(k)} now"
            for k in keys
            if theirs.get(k) != self.settings.get(k)
        ]
        raise StoreError(
            f"{self.path}: holds tiles cut with other settings ({'; '.join(differ)}); give another "
            "--out, or delete the folder to cut all slides again"
        )

    def _recover(self) -> None:
        """Undoes a `finish` that was stopped between its renames."""
        if (self.work / OLD).is_file():
            self._unmake(self.work / OLD)
        elif (self.work / NEW).is_file() and not (self.path / MANIFEST).is_file():
            self._unmake(self.work / NEW)
        (self.work / NEW).unlink(missing_ok=True)
        for stale in self.work.glob("*.tmp"):
            stale.unlink(missing_ok=True)

    def _retire(self) -> None:
        """Takes the present store apart: from here until the new manifest there is none."""
        if (self.path / MANIFEST).is_file():
            os.replace(self.path / MANIFEST, self.work / OLD)
            self._unmake(self.work / OLD)

    def _unmake(self, manifest: Path) -> None:
        """Moves the parts a manifest names back to `unfinished`, unless newer ones are there."""
        for entry in (_read_json(manifest) or {"slides": []})["slides"]:
            final, staged = self.path / entry["part"]["file"], self._staged(entry)
            if final.is_file() and not staged.is_file():
                os.replace(final, staged)
                write_record(self.path, entry)
            final.unlink(missing_ok=True)
        manifest.unlink()

    def _staged(self, entry: dict[str, Any]) -> Path:
        return self.work / f"{slide_key(entry['id'])}.array_record"

    @staticmethod
    def _whole(file: Path, record: dict[str, Any]) -> bool:
        try:
            check_part(file, record["part"])
        except StoreError:
            return False
        return True

    def _drop_stale(self, entries: list[dict[str, Any]]) -> None:
        keep = {slide_key(entry["id"]) for entry in entries}
        for fragment in (self.path / "report").glob("*.html"):
            # Other names are those of the datasets' pages.
            if re.fullmatch(r"[0-9a-f]{20}", fragment.stem) and fragment.stem not in keep:
                fragment.unlink(missing_ok=True)
        for part in self.work.iterdir():
            if part.name != LOCK:
                part.unlink(missing_ok=True)

    def _leave(self) -> None:
        """Lets go; leaves no trace where nothing was begun."""
        begun = any(self.work.glob("*.array_record")) or (self.work / NEW).exists()
        if not begun:
            shutil.rmtree(self.work, ignore_errors=True)
            if self.manifest is None:
                shutil.rmtree(self.path / "report", ignore_errors=True)
            if self._made:
                with suppress(OSError):  # not empty: it has become a store
                    self.path.rmdir()
        if self._lock:
            self._lock.close()


def tfds_name(dataset: str) -> str:
    """A dataset name as TFDS allows it: letters, digits, underscores, a letter first."""
    name = re.sub(r"\W+", "_", dataset, flags=re.ASCII).strip("_").lower()
    return name if re.match(r"[a-z]", name) else f"tiles_{name}".rstrip("_")


@functools.cache
def _tfds() -> tuple[Any, Any]:
    """The features of a store and their serialiser; importing TFDS takes half a second."""
    import tensorflow_datasets as tfds
    from tensorflow_datasets.core import example_serializer

    features = tfds.features.FeaturesDict(
        {
            "image": tfds.features.Image(shape=(None, None, 3), encoding_format="jpeg"),
            "slide": tfds.features.Text(),
            "dataset": tfds.features.Text(),
            "x": np.int64,
            "y": np.int64,
            "mpp": np.float32,
            "mpp_source": tfds.features.Text(),
        }
    )
    return features, example_serializer.ExampleSerializer(features.get_serialized_info())


def _serialised(tile: Tile) -> bytes:
    features, serializer = _tfds()
    # TFDS stores the bytes of a file object as they are; from an array it would need TensorFlow.
    example = features.encode_example({**vars(tile), "image": io.BytesIO(tile.image)})
    # Deterministic: a protobuf map has another order in each process, and so would the part's hash.
    return bytes(serializer.get_tf_example(example).SerializeToString(deterministic=True))


def _write_tfds_metadata(path: Path, name: str, entries: list[dict[str, Any]]) -> None:
    import tensorflow_datasets as tfds

    for stale in ("dataset_info.json", "features.json"):
        (path / stale).unlink(missing_ok=True)
    split = tfds.core.SplitInfo(
        name="train",
        shard_lengths=[entry["tiles"] for entry in entries],
        num_bytes=sum(entry["part"]["bytes"] for entry in entries),
        filename_template=tfds.core.ShardedFileTemplate(
            dataset_name=name, data_dir=path, split="train", filetype_suffix="array_record"
        ),
    )
    # check_data would read through TensorFlow.
    tfds.folder_dataset.write_metadata(
        data_dir=str(path), features=_tfds()[0], split_infos=[split], check_data=False,
        description=f"Tiles of {len(entries)} slides, written by jaxhisto.",
    )  # fmt: skip


def _read_json(file: Path) -> dict[str, Any] | None:
    """The object in a file, or None where there is none or it was cut off."""
    try:
        value = json.loads(file.read_bytes())
    except (OSError, ValueError):
        return None
    return value if isinstance(value, dict) else None
