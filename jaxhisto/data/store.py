"""The tile store, read: a folder of ArrayRecord shards, many slides in each, under a manifest.

    STORE/manifest.json                                     what is in it, with a hash; written last
    STORE/NAME-train-DIGEST.array_record-00000-of-00003     the tiles of some slides, slide by slide
    STORE/dataset_info.json, features.json                  make it a TFDS dataset
    STORE/report.html, report/                              for people
    STORE/stamps.json                                       tells `jaxhisto tile` unchanged slides
    STORE/unfinished/                                       only while `jaxhisto tile` is at work

`tfds.builder_from_directory(STORE).as_data_source(split="train")` reads the same folder. A folder
without manifest.json is not a store, whatever else is in it. The manifest lists the shards (file,
tiles, bytes, sha256) and the slides; a slide's entry says which shard it is in, from which row on,
how many tiles it has, and under `part` the sums of its tiles as they were cut. The first format had
one file a slide, named under `part`; it is still read.
"""

from __future__ import annotations

import bisect
import hashlib
import itertools
import json
import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from jaxhisto.errors import StoreError

T = TypeVar("T")

MANIFEST = "manifest.json"
UNFINISHED = "unfinished"
FORMAT, FIRST_FORMAT = "jaxhisto-tiles-2", "jaxhisto-tiles-1"
OPEN_SHARDS = 256  # readers kept open: each holds a file descriptor, of which a process has 1024


class TileStore:
    """Random access to a finished store; safe to use from several threads.

    Attributes:
      path: the folder.
      manifest: the whole manifest.
      hash: its hash; two stores with the same one hold the same bytes.
      tile_px: side of the tiles in pixels.
      dataset: name of the dataset, or of the whole where each slide has its own (`dataset_of`).
    """

    def __init__(self, path: Path | str, verify: bool = True) -> None:
        """Opens a store.

        Args:
          path: the folder.
          verify: check size and sha256 of every shard; False checks the sizes only.

        Raises:
          StoreError: not a store, unfinished, edited, or a shard is missing or damaged.
        """
        self.path = Path(path)
        self.manifest = read_manifest(self.path)
        self.hash: str = self.manifest["hash"]
        self.tile_px: int = self.manifest["tile_px"]
        self.dataset: str = self.manifest["dataset"]
        self._slides: list[dict[str, Any]] = self.manifest["slides"]
        self._ends = list(itertools.accumulate(slide["tiles"] for slide in self._slides))
        shards = shards_of(self.manifest)
        self._files = [self.path / shard["file"] for shard in shards]
        first = self.manifest["format"] == FIRST_FORMAT
        self._places = [
            (i, 0) if first else (s["shard"], s["row"]) for i, s in enumerate(self._slides)
        ]
        # Taken before the sums: what is edited meanwhile is seen at the first read.
        self._seen = [_identity(file) for file in self._files]
        for file, shard in zip(self._files, shards, strict=True):
            check_part(file, shard, deep=verify)
        self._reset()

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __getitem__(self, i: int) -> dict[str, Any]:
        """The features of tile i: image (JPEG bytes), slide, dataset, x, y, mpp, mpp_source.

        Raises:
          IndexError: i is not in [-len, len).
          StoreError: the record cannot be read, or its shard changed since the store was opened.
        """
        slide, tile = self._read(i, _decoded)
        # The record holds it as float32; the manifest as it was stated.
        return {**tile, "mpp": slide["tile_mpp"]}

    def image(self, i: int) -> bytes:
        """The JPEG of tile i alone.

        Raises:
          IndexError, StoreError: as `self[i]`.
        """
        return self._read(i, _image)[1]

    def _read(self, i: int, parse: Callable[[bytes], T]) -> tuple[dict[str, Any], T]:
        """The manifest's entry of tile i's slide, and what `parse` makes of its record."""
        index = range(len(self))[i]
        at = bisect.bisect_right(self._ends, index)
        slide, (shard, start) = self._slides[at], self._places[at]
        row = start + index - self._ends[at] + slide["tiles"]
        try:
            tile = parse(self._reader(shard).read([row])[0])
        except (RuntimeError, ValueError, IndexError, KeyError) as error:
            raise StoreError(
                f"{self._files[shard]}: tile {row} cannot be read ({error}); cut the slides again "
                "into a new store"
            ) from error
        # After reading: a change before it is seen too. Two microseconds beside decoding.
        if _identity(self._files[shard]) != self._seen[shard]:
            raise StoreError(
                f"{self._files[shard]}: changed or vanished since the run opened it (tile {row}); "
                "put the file back as it was, or start a new run"
            )
        return slide, tile

    def slides(self) -> list[str]:
        """The slide id of each tile index, from the manifest."""
        return [slide["id"] for slide in self._slides for _ in range(slide["tiles"])]

    def mpp_range(self) -> tuple[float, float] | None:
        """Smallest and largest um/px of the tiles, or None for a store without tiles."""
        sizes = [slide["tile_mpp"] for slide in self._slides]
        return (min(sizes), max(sizes)) if sizes else None

    def __getstate__(self) -> dict[str, Any]:
        """Open readers stay behind when the store is sent to another process."""
        return {k: v for k, v in vars(self).items() if k not in ("_lock", "_readers")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._reset()

    def _reset(self) -> None:
        self._lock = threading.Lock()
        self._readers: OrderedDict[int, Any] = OrderedDict()

    def _reader(self, shard: int) -> Any:
        """The shard's reader, opened on first use; the longest unused one is let go."""
        from array_record.python.array_record_module import ArrayRecordReader

        with self._lock:
            if shard not in self._readers:
                # For single records: without threads and read-ahead of its own.
                self._readers[shard] = ArrayRecordReader(
                    str(self._files[shard]), "readahead_buffer_size:0,max_parallelism:0"
                )
            self._readers.move_to_end(shard)
            if len(self._readers) > OPEN_SHARDS:
                self._readers.popitem(last=False)
            return self._readers[shard]


def dataset_of(manifest: Mapping[str, Any], slide: Mapping[str, Any]) -> str:
    """The dataset of a slide by its manifest entry: its own, or the whole store's."""
    return str(slide.get("dataset") or manifest["dataset"])


def is_store(path: Path | str) -> bool:
    """True for a folder that says it is a finished tile store; opening it verifies that."""
    return (Path(path) / MANIFEST).is_file()


def read_manifest(path: Path) -> dict[str, Any]:
    """The manifest of a store, its hash verified.

    Raises:
      StoreError: no manifest, not one of ours, or changed since it was written.
    """
    file = path / MANIFEST
    if not file.is_file():
        if (path / UNFINISHED).is_dir():
            raise StoreError(f"{path}: tiling was stopped; run the same `jaxhisto tile` again")
        raise StoreError(f"{path}: no tile store here ({MANIFEST} is missing); check the path")
    try:
        manifest = json.loads(file.read_bytes())
    except (OSError, ValueError) as error:
        raise StoreError(f"{file}: cannot be read ({error}); cut the slides again") from error
    if not isinstance(manifest, dict) or manifest.get("format") not in (FORMAT, FIRST_FORMAT):
        raise StoreError(f"{file}: is not a {FORMAT} manifest; cut the slides with this version")
    if manifest.get("hash") != manifest_hash(manifest):
        raise StoreError(
            f"{file}: does not match its own hash, it was edited after tiling; restore the file, "
            "or cut the slides again into a new store"
        )
    return manifest


def manifest_hash(manifest: dict[str, Any]) -> str:
    """sha256 of the manifest as canonical JSON (sorted keys, no spaces) without its `hash`."""
    rest = {key: value for key, value in manifest.items() if key != "hash"}
    text = json.dumps(rest, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()


def shards_of(manifest: dict[str, Any]) -> list[dict[str, Any]]:
    """{file, tiles, bytes, sha256} of each ArrayRecord file of a store, of either format."""
    if manifest["format"] == FIRST_FORMAT:
        return [{**slide["part"], "tiles": slide["tiles"]} for slide in manifest["slides"]]
    return list(manifest["shards"])


def grouped(manifest: dict[str, Any]) -> list[tuple[list[dict[str, Any]], dict[str, Any]]]:
    """The slides of each shard, in their order in it, and what the manifest says of the shard."""
    shards = shards_of(manifest)
    groups: list[list[dict[str, Any]]] = [[] for _ in shards]
    for i, slide in enumerate(manifest["slides"]):
        groups[slide.get("shard", i)].append(slide)
    return list(zip(groups, shards, strict=True))


def check_part(file: Path, part: dict[str, Any], deep: bool = True) -> None:
    """Compares a part or shard with its entry: size, and sha256 where `deep`.

    Raises:
      StoreError: it differs, or is not there.
    """
    if not file.is_file():
        raise StoreError(f"{file}: is missing; restore it, or cut the slides again")
    if file.stat().st_size != part["bytes"] or (deep and file_hash(file) != part["sha256"]):
        raise StoreError(
            f"{file}: is damaged (size or sha256 differ from the manifest); restore it, or cut the "
            "slides again into a new store"
        )


def _identity(file: Path) -> tuple[int, ...] | None:
    """What changes when a file is edited or replaced; None where there is none."""
    try:
        found = file.stat()
    except OSError:
        return None
    return found.st_ino, found.st_size, found.st_mtime_ns


def file_hash(file: Path) -> str:
    """sha256 of a file's bytes."""
    try:
        with file.open("rb") as opened:
            return hashlib.file_digest(opened, "sha256").hexdigest()
    except OSError as error:
        raise StoreError(f"{file}: cannot be read ({error.strerror}); check the disk") from error


def _features(record: bytes) -> Any:
    from tensorflow_datasets.proto import tf_example_pb2

    return tf_example_pb2.Example.FromString(record).features.feature


def _image(record: bytes) -> bytes:
    return bytes(_features(record)["image"].bytes_list.value[0])


def _decoded(record: bytes) -> dict[str, Any]:
    """A serialised example as Python values; the image stays encoded.

    Parsed here and not by TFDS, which would decode the image on the way.
    """
    feature = _features(record)

    def text(name: str) -> str:
        return str(feature[name].bytes_list.value[0].decode())

    return {
        "image": feature["image"].bytes_list.value[0],
        "slide": text("slide"),
        "dataset": text("dataset"),
        "x": int(feature["x"].int64_list.value[0]),
        "y": int(feature["y"].int64_list.value[0]),
        "mpp_source": text("mpp_source"),
    }
