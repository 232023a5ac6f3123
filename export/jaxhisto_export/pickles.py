"""Read a PyTorch checkpoint without torch and without running its pickle.

Two formats: a zip archive whose records lie uncompressed (PyTorch 1.6 and later), and five
pickles followed by the storages (before). Tensors come as views of the mapped file.
"""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxhisto_export.errors import ExportFileError
from jaxhisto_export.lazy_tensors import WIDTHS, Array, LazyTensor, Record, Storage
from jaxhisto_export.pickle_machine import Mapped, Stub, run_pickle, shown

__all__ = ["LazyTensor", "Mapped", "Stub", "map_file", "read_checkpoint", "shown"]

MAX_PICKLE = 32 << 20  # bytes; that of a ResNet101 with Adam's state takes 0.16 MB

LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
LEGACY_VERSION = 1001

NO_CHECKPOINTS: tuple[tuple[int, bytes, str], ...] = (
    (257, b"ustar", "a tar archive, as PyTorch wrote before 0.2: unpack it, or save it again"),
    (0, b"\x1f\x8b", "compressed with gzip: unpack it first"),
    (0, b"\x89HDF", "an HDF5 file of Keras or TensorFlow: give a PyTorch file"),
    (0, b"version https://git-lfs", "a Git LFS pointer: fetch the file itself with `git lfs pull`"),
    (0, b"<!DOCTYPE", "a web page: download the file itself"),
    (0, b"<html", "a web page: download the file itself"),
)
"""Offset, bytes there, and what such a file is, with the remedy."""

_STORAGE_CLASSES = {
    **{"FloatStorage": "float32", "DoubleStorage": "float64", "HalfStorage": "float16"},
    **{"BFloat16Storage": "bfloat16", "LongStorage": "int64", "IntStorage": "int32"},
    **{"ShortStorage": "int16", "CharStorage": "int8", "ByteStorage": "uint8"},
    **{"BoolStorage": "bool", "UntypedStorage": "uint8", "_UntypedStorage": "uint8"},
    **{"ComplexFloatStorage": "complex64", "ComplexDoubleStorage": "complex128"},
    **{"QInt8Storage": "qint8", "QUInt8Storage": "quint8", "QInt32Storage": "qint32"},
}


class _Span(NamedTuple):
    """A record of a zip archive."""

    start: int
    size: int
    crc: int


def read_checkpoint(path: Path) -> Any:
    """What torch.save put into a file: containers, numbers, text, `LazyTensor`, `Stub`.

    Nothing that the file asks for is imported or called: what is no tensor and no plain
    container is a `Stub` that holds its name. Takes about a second at most, and memory of a
    few times the pickle (at most 32 MiB) whatever the file claims; tensors stay in the file.

    Raises:
      ExportFileError: no such file, none of torch.save, damaged, TorchScript, big-endian, or
        compressed.
    """
    data = map_file(path)
    for offset, magic, what in NO_CHECKPOINTS:
        if bytes(data[offset : offset + len(magic)]) == magic:
            raise ExportFileError(f"{path}: is {what}.")
    try:
        return _read_zip(path, data) if bytes(data[:4]) == b"PK\3\4" else _read_legacy(path, data)
    except ExportFileError:
        raise
    except Exception as error:  # a damaged file runs into whatever it runs into
        raise ExportFileError(
            f"{path}: not a whole PyTorch checkpoint ({_clause(error)}), copy or download it again."
        ) from error


def map_file(path: Path) -> Array:
    """(bytes,) uint8, read-only, of a file that is not empty.

    Raises:
      ExportFileError: there is no such file, it is empty, or it cannot be opened.
    """
    try:
        if not path.is_file():
            raise ExportFileError(f"{path}: there is no such file, name another.")
        if path.stat().st_size == 0:
            raise ExportFileError(f"{path}: is empty, copy or download it again.")
        return np.asarray(np.memmap(path, np.uint8, mode="r"))
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "not a regular file"
        raise ExportFileError(f"{path}: cannot be read ({reason}), see to it.") from error


def _clause(error: Exception) -> str:
    """What is wrong, in one line; Python's own words say nothing about a file."""
    return shown(str(error)) if type(error) is ValueError else "damaged"


# Tensors


def _dtype_of(stub: Any) -> str:
    """torch's name of a type, from the storage class or the dtype that a pickle names."""
    if not isinstance(stub, Stub):
        raise ValueError("a storage without a type")
    if not (stub.module == "torch" or stub.module.startswith("torch.")):
        raise ValueError(f"a storage of type {stub.path}")
    name = _STORAGE_CLASSES.get(stub.name, stub.name)
    if name not in WIDTHS:
        raise ValueError(f"a storage of type {stub.path}")
    return name


def _storage_of(value: Any) -> Storage:
    if not isinstance(value, Storage):
        raise ValueError("a tensor without a storage")
    return value


def _tensor(args: tuple[Any, ...]) -> LazyTensor:
    """(storage, offset, size, stride, ...)"""
    storage, offset, shape, strides = args[:4]
    return LazyTensor(_storage_of(storage), offset, shape, strides)


def _tensor_of_type(args: tuple[Any, ...]) -> LazyTensor:
    """(storage, offset, size, stride, requires_grad, hooks, dtype, ...)"""
    storage, offset, shape, strides = args[:4]
    return LazyTensor(_storage_of(storage).as_type(_dtype_of(args[6])), offset, shape, strides)


def _first(args: tuple[Any, ...]) -> Any:
    return args[0]


_PLAIN_BUILDERS: dict[str, Callable[[tuple[Any, ...]], Any]] = {
    "torch._utils._rebuild_tensor": _tensor,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_tensor_v3": _tensor_of_type,
    "torch._utils._rebuild_qtensor": _tensor,  # its type says that it is quantised
    "torch._utils._rebuild_parameter": _first,
    "torch._utils._rebuild_parameter_with_state": _first,
    "torch.Size": _first,
}


def _subclass(args: tuple[Any, ...]) -> Any:
    """(builder, class, arguments, state): a tensor with attributes, or of a class of its own."""
    function, arguments = args[0], args[2]
    name = f"{function.module}.{function.name}" if isinstance(function, Stub) else ""
    builder = _PLAIN_BUILDERS.get(name)
    if builder is None or not isinstance(arguments, tuple):
        return Stub("torch._tensor", "_rebuild_from_type", args)
    return builder(arguments)


_BUILDERS = _PLAIN_BUILDERS | {
    "torch._tensor._rebuild_from_type": _subclass,
    "torch._tensor._rebuild_from_type_v2": _subclass,
}


# The zip format


def _read_zip(path: Path, data: Array) -> Any:
    spans = _central_directory(data)
    pickles = [name for name in spans if name.endswith("/data.pkl") and name.count("/") == 1]
    if len(pickles) != 1:
        raise ExportFileError(
            f"{path}: is a zip archive, but none that torch.save wrote, give the checkpoint itself."
        )
    root = pickles[0].removesuffix("data.pkl")
    if root + "constants.pkl" in spans:
        raise ExportFileError(
            f"{path}: is a TorchScript archive, save the state_dict() of the model instead."
        )
    order = spans.get(root + "byteorder")
    if order and bytes(data[order.start : order.start + order.size]) != b"little":
        raise ExportFileError(f"{path}: is big-endian, save it on a little-endian machine.")
    records: dict[str, Record] = {}

    def storage(identity: tuple[Any, ...]) -> Storage:
        dtype, key, count = _identity(identity)
        span = spans.get(f"{root}data/{key}")
        if span is None:
            raise ValueError(f"the record of storage {shown(key)} is missing")
        if count * WIDTHS[dtype] > span.size:
            raise ValueError(f"the record of storage {shown(key)} is too short")
        if key not in records:
            records[key] = Record(path, data[span.start : span.start + span.size], span.crc)
        return Storage(records[key], dtype, count)

    span = spans[pickles[0]]
    if span.size > MAX_PICKLE:
        raise ValueError(f"a pickle of {span.size} bytes")
    program = bytes(data[span.start : span.start + span.size])
    if span.crc and zlib.crc32(program) != span.crc:
        raise ValueError("the pickle does not have its checksum")
    return run_pickle(io.BytesIO(program), _BUILDERS, storage)


def _identity(identity: tuple[Any, ...]) -> tuple[str, str, int]:
    """Type, key and number of elements of ("storage", class, key, location, count, ...)."""
    if len(identity) < 5 or identity[0] != "storage":
        raise ValueError("the pickle refers to what is no storage")
    _, kind, key, _, count = identity[:5]
    if not isinstance(key, str) or type(count) is not int or count < 0:
        raise ValueError("a storage without a key or a size")
    if len(identity) > 5 and identity[5] is not None:
        raise ValueError("a storage that is a part of another, as before PyTorch 0.4")
    return _dtype_of(kind), key, count


def _central_directory(data: Array) -> dict[str, _Span]:
    """Name to place of each record; all are uncompressed and within the file.

    Read here because its size is bounded (65,534 records, 4 GiB), which that of a zip library
    is not.
    """
    tail = bytes(data[-(22 + 65535) :])
    at = tail.rfind(b"PK\5\6")
    if at < 0 or len(tail) < at + 22:
        raise ValueError("the end of the archive is missing")
    entries, size, start = struct.unpack_from("<HII", tail, at + 10)
    if entries == 0xFFFF or 0xFFFFFFFF in (size, start):
        raise ValueError("an archive of more than 4 GiB or 65534 records")
    if start + size > len(data) or size > MAX_PICKLE:
        raise ValueError("the directory of the archive is damaged")
    table = bytes(data[start : start + size])
    spans: dict[str, _Span] = {}
    at = 0
    for _ in range(entries):
        name, span, at = _directory_entry(data, table, at)
        if name in spans:
            raise ValueError(f"two records named {shown(name)}")
        spans[name] = span
    return spans


def _directory_entry(data: Array, table: bytes, at: int) -> tuple[str, _Span, int]:
    """Name and place of the record whose entry is at `at`, and where the next entry is."""
    signature, flags, method, crc, packed, size, name_length, extra, comment, header = (
        struct.unpack_from("<4s4xHH4xIIIHHH8xI", table, at)
    )
    end = at + 46 + name_length
    if signature != b"PK\1\2" or end > len(table):
        raise ValueError("the directory of the archive is damaged")
    name = table[at + 46 : end].decode("utf-8", "replace")
    if flags & 1 or method != 0 or packed != size:
        raise ValueError(f"record {shown(name)} is compressed or encrypted")
    local = bytes(data[header : header + 30])
    if len(local) < 30 or local[:4] != b"PK\3\4":
        raise ValueError(f"record {shown(name)} is not where the archive says")
    start = header + 30 + sum(struct.unpack_from("<HH", local, 26))
    if start + size > len(data):
        raise ValueError(f"record {shown(name)} ends behind the file")
    return name, _Span(start, size, crc), end + extra + comment


# The format before PyTorch 1.6


def _read_legacy(path: Path, data: Array) -> Any:
    stream = io.BytesIO(bytes(data[:MAX_PICKLE]))
    if data[0] != 0x80 or run_pickle(stream) != LEGACY_MAGIC:
        raise ValueError("torch.save did not write it")
    version, system = run_pickle(stream), run_pickle(stream)
    if version != LEGACY_VERSION:
        raise ValueError("an unknown version of the format")
    if not isinstance(system, dict) or system.get("little_endian") is not True:
        raise ExportFileError(f"{path}: is big-endian, save it on a little-endian machine.")
    storages: dict[str, list[Storage]] = {}

    def storage(identity: tuple[Any, ...]) -> Any:
        if len(identity) > 1 and identity[0] == "module":  # class of a pickled network
            return identity[1]
        dtype, key, count = _identity(identity)
        known = storages.setdefault(key, [])
        record = known[0].record if known else Record(path)
        known.append(Storage(record, dtype, count))
        return known[-1]

    content = run_pickle(stream, _BUILDERS, storage)
    keys = run_pickle(stream)
    _place(storages, keys, data, stream.tell())
    return content


def _place(storages: dict[str, list[Storage]], keys: Any, data: Array, at: int) -> None:
    """Finds the bytes of each storage: an int64 count, then the elements, in the keys' order."""
    if not isinstance(keys, list):
        raise ValueError("the list of storages is missing")
    for key in keys:
        known = storages.get(key) if isinstance(key, str) else None
        if not known or known[0].record.data is not None:
            raise ValueError("a storage that no tensor uses, or one that is there twice")
        header = bytes(data[at : at + 8])
        count = int.from_bytes(header, "little")
        size = count * WIDTHS[known[0].dtype]
        if len(header) < 8 or at + 8 + size > len(data):
            raise ValueError(f"the file ends within storage {shown(key)}")
        if any(s.count != count or s.dtype != known[0].dtype for s in known):
            raise ValueError(f"storage {shown(key)} has another size than its tensors say")
        known[0].record.data = data[at + 8 : at + 8 + size]
        at += 8 + size
    if any(known[0].record.data is None for known in storages.values()):
        raise ValueError("a storage is missing")
