"""Tensors of a file that nobody has read yet: name of the type, shape, and where the bytes are."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from jaxhisto_export.errors import ExportFileError

Array = NDArray[Any]

WIDTHS = {
    **{"float64": 8, "float32": 4, "float16": 2, "bfloat16": 2},
    **{"int64": 8, "int32": 4, "int16": 2, "int8": 1, "uint8": 1, "bool": 1},
    **{"uint16": 2, "uint32": 4, "uint64": 8, "complex32": 4, "complex64": 8, "complex128": 16},
    **{"float8_e4m3fn": 1, "float8_e5m2": 1, "float8_e4m3fnuz": 1, "float8_e5m2fnuz": 1},
    **{"float8_e8m0fnu": 1, "qint8": 1, "quint8": 1, "qint32": 4},
}
"""Bytes of an element."""

NOT_NUMPY = {name for name in WIDTHS if name.startswith(("float8", "qint", "quint", "complex32"))}

MAX_DIMENSIONS = 16
MAX_SIDE = 1 << 40


class Record:
    """A run of bytes in a file, whose checksum is compared once, when it is first read.

    Attributes:
      path: of the file.
      data: (bytes,) uint8, a view of the mapped file; None until its place is known.
      crc: CRC-32 of it, 0 where the file has none.
    """

    def __init__(self, path: Path, data: Array | None = None, crc: int = 0) -> None:
        self.path, self.data, self.crc = path, data, crc

    def checked(self) -> Array:
        """The bytes.

        Raises:
          ExportFileError: they do not have their checksum.
        """
        assert self.data is not None
        if self.crc and zlib.crc32(self.data.data) != self.crc:
            raise ExportFileError(
                f"{self.path}: its bytes do not have their checksum, copy or download it again."
            )
        self.crc = 0
        return self.data


class Storage:
    """`count` elements of type `dtype` in a record: what torch calls a typed storage."""

    def __init__(self, record: Record, dtype: str, count: int) -> None:
        self.record, self.dtype, self.count = record, dtype, count

    def as_type(self, dtype: str) -> Storage:
        """The same bytes, taken as elements of another type."""
        size = self.count * WIDTHS[self.dtype]
        return Storage(self.record, dtype, size // WIDTHS[dtype])


class LazyTensor:
    """A strided view of a storage.

    Attributes:
      shape: as torch has it.
      dtype: torch's name of the type, `float32`.
    """

    __slots__ = ("dtype", "offset", "shape", "storage", "strides")

    def __init__(
        self, storage: Storage, offset: Any, shape: Sequence[Any], strides: Sequence[Any]
    ) -> None:
        """Raises ValueError, a clause, for a tensor that does not lie within its storage."""
        if max(len(shape), len(strides)) > MAX_DIMENSIONS or len(shape) != len(strides):
            raise ValueError(f"a tensor of {len(shape)} dimensions and {len(strides)} strides")
        numbers = (offset, *shape, *strides)
        if not all(type(n) is int and 0 <= n < MAX_SIDE for n in numbers):
            raise ValueError("a tensor whose shape is not made of sizes")
        count = int(np.prod(shape, dtype=object))
        last = offset + sum((n - 1) * step for n, step in zip(shape, strides, strict=True))
        if count > storage.count or (count and last >= storage.count):
            raise ValueError(
                f"a tensor of {count} elements that lies outside its storage of {storage.count}"
            )
        self.storage, self.offset = storage, int(offset)
        self.shape, self.strides = tuple(shape), tuple(strides)
        self.dtype = storage.dtype

    def numpy(self) -> Array:
        """The tensor, a read-only view of the file; bfloat16 as a float32 copy.

        Raises:
          ExportFileError: bytes without their checksum, or a type that numpy has not.
        """
        record = self.storage.record
        if self.dtype in NOT_NUMPY:
            raise ExportFileError(f"{record.path}: holds {self.dtype}, save it as float32.")
        wide = self.dtype == "bfloat16"
        dtype = np.dtype("uint16" if wide else self.dtype).newbyteorder("<")
        if 0 in self.shape:
            return np.zeros(self.shape, np.float32 if wide else dtype)
        array: Array = np.ndarray(
            self.shape,
            dtype,
            buffer=record.checked().data,
            offset=self.offset * dtype.itemsize,
            strides=[step * dtype.itemsize for step in self.strides],
        )
        if wide:  # the upper half of a float32
            return (array.astype(np.uint32) << 16).view(np.float32)
        return array
