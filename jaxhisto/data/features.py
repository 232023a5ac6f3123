"""Features of tiles in an HDF5 file, as pathology tools read them: written, resumed, read.

    features   (n, d) float32
    names      (n,) utf-8: slide@y,x of a slide's tile, else the image's name in its folder
    coords     (n, 2) int64: x, y of the top-left corner in level-0 px; in an image, px of it
    slides     (n,) utf-8: id of the slide, empty where a tile is of none
    spans      (n,) float64: side of the tile in level-0 px; of an image, its longer side
    contents   (n, 32) uint8: sha256 of the image's file, 0 of a slide's tile; not in every file

The attributes say what encoder, what data and what feeding: `encoder_sha256`, `data_hash`, `mean`,
`std`, `side` (px as fed), `arch`, `depth`, `layer`, `encoder`, `code_version`. Needs no JAX.
"""

from __future__ import annotations

import fcntl
import importlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from jaxhisto.errors import StoreError

FORMAT = "jaxhisto-features-1"
PARTIAL = ".partial"
IDENTITY, ROWS, LOCK = "identity.json", "rows", "lock"
AT_ONCE = 1 << 26  # bytes copied at a time
DIGEST = 32  # bytes of a sha256
SYNC_EVERY = 1 << 28  # bytes after which rows are put on the disk

Floats = NDArray[np.float32]


@dataclass(frozen=True)
class Place:
    """Where a tile comes from.

    Fields:
      name: unique in its source, the same wherever the source lies.
      slide: id of its slide, empty for an image.
      x, y: top-left corner in level-0 px of the slide, or px of the image.
      span: side in level-0 px; of an image, its longer side in px.
      sha256: of the image's file; empty for a slide's tile.
    """

    name: str
    slide: str
    x: int
    y: int
    span: float
    sha256: bytes = b""


class Features:
    """An open file of features; rows are read when asked for, so that millions cost no memory.

    Attributes:
      path: the file.
      names, slides: n texts each.
      coords: (n, 2) int64, x and y in level-0 px.
      spans: (n,) float64, side in level-0 px.
      contents: (n, 32) uint8, sha256 of images' files; None where the file does not say.
      attributes: what the file says of itself, by name.
    """

    def __init__(self, path: Path | str) -> None:
        """Opens a file.

        Raises:
          StoreError: h5py is missing, no such file, or not one of features.
        """
        self.path = Path(path)
        h5py = need_h5py(self.path)
        if not self.path.is_file():
            raise StoreError(
                f"{path}: does not exist; write it with `jaxhisto embed`.{_half(path)}"
            )
        try:
            self._file = h5py.File(self.path, "r")
            self._rows = self._file["features"]
            self.names: tuple[str, ...] = tuple(self._file["names"].asstr()[:].tolist())
            self.coords: NDArray[np.int64] = np.asarray(self._file["coords"][:], np.int64)
            self.slides: tuple[str, ...] = tuple(self._file["slides"].asstr()[:].tolist())
            self.spans: NDArray[np.float64] = np.asarray(self._file["spans"][:], np.float64)
            held = self._file.get("contents")
            self.contents = None if held is None else np.asarray(held[:], np.uint8)
            self.attributes: dict[str, Any] = {k: _plain(v) for k, v in self._file.attrs.items()}
        except (OSError, KeyError, AttributeError, RuntimeError) as error:
            raise StoreError(
                f"{path}: is no whole file of features ({error}); write it with `jaxhisto embed`."
            ) from error
        n = len(self._rows)
        told = (self.names, self.coords, self.slides, self.spans, self.contents)
        lengths = {len(column) for column in told if column is not None}
        if self.attributes.get("format") != FORMAT or lengths != {n} or self._rows.ndim != 2:
            raise StoreError(
                f"{path}: is not in the format {FORMAT}; write it again with `jaxhisto embed`."
            )

    def __len__(self) -> int:
        return len(self.names)

    @property
    def width(self) -> int:
        """d, the width of a row."""
        return int(self._rows.shape[1])

    @property
    def encoder_sha256(self) -> str:
        """Of the encoder that gave the rows."""
        return str(self.attributes["encoder_sha256"])

    @property
    def data_hash(self) -> str:
        """Of the tiles, `Tiles.hash`."""
        return str(self.attributes["data_hash"])

    def read(self, start: int, stop: int) -> Floats:
        """Rows start to stop, (stop - start, d) float32.

        Raises:
          StoreError: they cannot be read, or hold NaN or infinity.
        """
        try:
            rows = np.asarray(self._rows[start:stop], np.float32)
        except (OSError, RuntimeError) as error:
            raise StoreError(f"{self.path}: cannot be read ({error}); copy it again.") from error
        refuse_not_finite(rows, lambda i: self.names[start + i], str(self.path))
        return rows

    def blocks(self, rows: int = 65536) -> Iterator[Floats]:
        """All rows in their order, `rows` at a time."""
        for start in range(0, len(self), rows):
            yield self.read(start, min(start + rows, len(self)))

    def all(self) -> Floats:
        """(n, d) float32, in memory at once."""
        return self.read(0, len(self))

    def close(self) -> None:
        """Closes the file."""
        self._file.close()

    def __enter__(self) -> Features:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        self.close()


def read_features(path: Path | str) -> Features:
    """Opens a file of features; see `Features`."""
    return Features(path)


class FeatureWriter:
    """Writes a file of features, going on where an earlier, killed process was.

    Until all rows are there they lie in OUT.partial: rows one after the other in a plain file, of
    which a kill leaves the whole ones sound, where a half-written HDF5 file may not open again.

    Attributes:
      done: rows that are there; a whole number of blocks.
    """

    def __init__(
        self, out: Path | str, identity: Mapping[str, Any], width: int, block: int
    ) -> None:
        """Opens OUT.partial, or makes it.

        Args:
          out: the file to come.
          identity: what makes two files the same: encoder, data, feeding. JSON values.
          width: d of a row.
          block: rows that are computed together; what is there of a half one is cut off, so that
            a row never depends on where the process was killed.

        Raises:
          StoreError: h5py is missing, another process writes it, rows of another identity are
            there, or it cannot be written.
        """
        self.out, self._block = Path(out), block
        self._h5py = need_h5py(self.out)
        self.partial = self.out.with_name(self.out.name + PARTIAL)
        self._dtype = np.dtype([("features", "<f4", (width,)), ("coords", "<i8", (2,))])
        try:
            self.partial.mkdir(parents=True, exist_ok=True)
            self._lock = (self.partial / LOCK).open("w")
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            self._lock.close()
            raise StoreError(
                f"{self.out}: another `jaxhisto embed` is writing it; wait for that one."
            ) from error
        except OSError as error:
            raise unwritable(self.partial, error) from error
        try:
            self._begin(json.loads(json.dumps({**identity, "width": width})))
        except OSError as error:
            self._lock.close()
            raise unwritable(self.partial, error) from error
        except StoreError:
            self._lock.close()
            raise

    def _begin(self, identity: dict[str, Any]) -> None:
        file = self.partial / IDENTITY
        if file.is_file():
            try:
                theirs = json.loads(file.read_text())
            except ValueError:
                theirs = {}
            if theirs and theirs != identity:
                keys = [k for k in {**theirs, **identity} if theirs.get(k) != identity.get(k)]
                raise StoreError(
                    f"{self.partial}: was begun with another {', '.join(keys)}; give another "
                    "--out, or --force to begin anew."
                )
        temporary = file.with_suffix(".new")
        temporary.write_text(json.dumps(identity, indent=1))
        os.replace(temporary, file)
        self._file = (self.partial / ROWS).open("ab")
        whole = self._file.tell() // self._dtype.itemsize
        self.done = whole - whole % self._block
        self._file.truncate(self.done * self._dtype.itemsize)
        self._unsynced = 0

    def append(
        self, features: Floats, coords: NDArray[np.int64], name: Callable[[int], str]
    ) -> None:
        """Adds rows at the end.

        Args:
          features: (m, d).
          coords: (m, 2).
          name: of row i of these, for a refusal.

        Raises:
          StoreError: NaN or infinity in them, or it cannot be written.
        """
        refuse_not_finite(features, name, "the encoder")
        rows = np.empty(len(features), self._dtype)
        rows["features"], rows["coords"] = features, coords
        try:
            self._file.write(rows.tobytes())
            self._file.flush()
            self._unsynced += rows.nbytes
            if self._unsynced > SYNC_EVERY:
                os.fsync(self._file.fileno())
                self._unsynced = 0
        except OSError as error:
            raise unwritable(self.partial, error) from error
        self.done += len(rows)

    def coords(self, start: int, stop: int) -> NDArray[np.int64]:
        """(stop - start, 2), of rows that are there."""
        return np.ascontiguousarray(self._read(start, stop)["coords"])

    def finish(
        self,
        names: Sequence[str],
        slides: Sequence[str],
        spans: NDArray[np.float64],
        attributes: Mapping[str, Any],
        contents: Sequence[bytes] = (),
    ) -> None:
        """Makes OUT of the rows, whole or not at all, and removes OUT.partial.

        Args:
          names, slides, spans: a row's each, see the top of this file.
          attributes: what the file says of itself.
          contents: sha256 of images' files, empty for tiles of slides; left out where all are.

        Raises:
          StoreError: it cannot be written.
        """
        if not len(names) == len(slides) == len(spans) == self.done:
            raise ValueError(f"{self.done} rows, but {len(names)} names")
        temporary = self.partial / "finished.h5"
        try:
            width = self._dtype["features"].shape[0]
            write_hdf5(self._h5py, temporary, width, self._rows, names, slides, spans, attributes,
                       contents)  # fmt: skip
            os.replace(temporary, self.out)
        except OSError as error:
            raise unwritable(self.out, error) from error
        self.close()
        shutil.rmtree(self.partial, ignore_errors=True)

    def close(self) -> None:
        """Leaves OUT.partial as it is, for the next start."""
        self._file.close()
        self._lock.close()

    def __enter__(self) -> FeatureWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        self.close()

    def _rows(self, at: NDArray[np.int64]) -> tuple[Floats, NDArray[np.int64]]:
        held = self._read(int(at[0]), int(at[-1]) + 1)
        return held["features"], held["coords"]

    def _read(self, start: int, stop: int) -> NDArray[Any]:
        size = self._dtype.itemsize
        return np.fromfile(self.partial / ROWS, self._dtype, stop - start, offset=start * size)


def write_hdf5(
    h5py: Any,
    path: Path,
    width: int,
    read: Callable[[NDArray[np.int64]], tuple[Floats, NDArray[np.int64]]],
    names: Sequence[str],
    slides: Sequence[str],
    spans: NDArray[np.float64],
    attributes: Mapping[str, Any],
    contents: Sequence[bytes] = (),
) -> None:
    """The HDF5 file of rows that `read` gives by position; on the disk when it returns."""
    text = h5py.string_dtype("utf-8")
    n, step = len(names), max(1, AT_ONCE // (4 * width))
    with h5py.File(path, "w", track_order=True) as file:
        features = file.create_dataset("features", (n, width), "<f4")
        coords = file.create_dataset("coords", (n, 2), "<i8")
        for at in range(0, n, step):
            stop = min(at + step, n)
            features[at:stop], coords[at:stop] = read(np.arange(at, stop))
        if len(spans) and (spans == spans[0]).all():
            coords.attrs["patch_size_level0"] = spans[0]  # as CLAM's successors name it
        file.create_dataset("names", data=np.array(names, object), dtype=text)
        file.create_dataset("slides", data=np.array(slides, object), dtype=text)
        file.create_dataset("spans", data=np.asarray(spans, np.float64))
        if any(contents):
            digests = b"".join(digest or bytes(DIGEST) for digest in contents)
            file["contents"] = np.frombuffer(digests, np.uint8).reshape(n, DIGEST)
        for key, value in {"format": FORMAT, **attributes}.items():
            file.attrs[key] = value
    with path.open("rb") as written:
        os.fsync(written.fileno())


def refuse_not_finite(rows: Floats, name: Callable[[int], str], where: str) -> None:
    """Raises StoreError with the name of the first row that holds NaN or infinity."""
    bad = np.flatnonzero(~np.isfinite(rows).all(axis=1))
    if len(bad):
        raise StoreError(
            f"{name(int(bad[0]))}: {where} gives features that are not finite numbers "
            f"({len(bad)} of {len(rows)} tiles); the weights are damaged, take another encoder."
        )


def need_h5py(path: Path) -> Any:
    try:
        return importlib.import_module("h5py")
    except ImportError as error:
        raise StoreError(
            f"{path}: is an HDF5 file, which needs h5py; install it with "
            "`pip install 'jaxhisto[hdf5]'`."
        ) from error


def _plain(value: Any) -> Any:
    return value.tolist() if isinstance(value, np.ndarray | np.generic) else value


def _half(path: Path | str) -> str:
    if Path(f"{path}{PARTIAL}").is_dir():
        return f" {path}{PARTIAL} holds a part of it: the same `jaxhisto embed` line goes on."
    return ""


def unwritable(path: Path, error: OSError) -> StoreError:
    return StoreError(
        f"{path}: cannot be written ({error.strerror or error}); free some space or choose "
        "another --out."
    )
