"""Safetensors files of numpy arrays: read, and written whole or not at all. Needs no torch."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from jaxhisto.errors import ExportError
from jaxhisto.special_files import no_pipe

Array = NDArray[Any]

DTYPE_NAMES = {"float32": "F32", "int64": "I64", "uint8": "U8"}
_DTYPES = {short: name for name, short in DTYPE_NAMES.items()}


def read(path: Path) -> tuple[dict[str, Array], dict[str, str]]:
    """Tensors and string metadata of a safetensors file.

    Raises:
      ExportError: no such file, or no whole safetensors file.
    """
    try:
        with safe_open(no_pipe(path), framework="numpy") as file:
            return {k: file.get_tensor(k) for k in file.keys()}, file.metadata() or {}  # noqa: SIM118 safe_open is no mapping
    except (OSError, SafetensorError) as error:
        raise ExportError(
            f"{path}: not a readable safetensors file ({error}); "
            "write it again with `jaxhisto export`."
        ) from error


def each(path: Path) -> Iterator[tuple[str, Array]]:
    """The tensors of a file that `write` wrote, one in memory at a time, in the file's order.

    The library maps the whole file into memory, whose pages stay beside what is made of them.
    """
    with open(path, "rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        header.pop("__metadata__", None)
        for name, about in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
            dtype = np.dtype(_DTYPES[about["dtype"]])
            tensor = np.fromfile(file, dtype, math.prod(about["shape"]))
            yield name, tensor.reshape(about["shape"])


def write(path: Path, tensors: Mapping[str, Array], metadata: Mapping[str, str]) -> str:
    """Writes a safetensors file, whole or not at all; returns its SHA-256.

    The library's writer holds every tensor twice more in memory and orders the metadata by
    chance; this one streams tensor after tensor, and equal content gives equal bytes.

    Raises:
      ExportError: a file that cannot be written.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    digest = hashlib.sha256()
    try:
        with open(temporary, "wb") as file:
            for piece in _safetensors(tensors, metadata):
                file.write(piece)
                digest.update(piece)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise ExportError(
            f"{path}: cannot be written ({error.strerror}); free space or choose another folder."
        ) from error
    return digest.hexdigest()


def _safetensors(
    tensors: Mapping[str, Array], metadata: Mapping[str, str]
) -> Iterator[bytes | memoryview]:
    """The bytes of a safetensors file: length, JSON header, tensors, widest types first."""
    order = sorted(tensors, key=lambda name: (-tensors[name].itemsize, name))
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    at = 0
    for name in order:
        tensor = tensors[name]
        header[name] = {
            "dtype": DTYPE_NAMES[tensor.dtype.name],
            "shape": list(tensor.shape),
            "data_offsets": [at, at + tensor.nbytes],
        }
        at += tensor.nbytes
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)  # so that the data is aligned
    yield len(text).to_bytes(8, "little") + text
    for name in order:
        yield np.ascontiguousarray(tensors[name]).reshape(-1).view(np.uint8).data
