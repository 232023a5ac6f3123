"""What is in a file of weights, told apart by its first bytes and not by its name.

PyTorch checkpoints, safetensors, a folder as timm writes it, and ONNX files of this project.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from jaxhisto_export.errors import ExportFileError
from jaxhisto_export.lazy_tensors import Array, LazyTensor, Record, Storage
from jaxhisto_export.pickles import Mapped, map_file, read_checkpoint, shown
from jaxhisto_export.provenance import Provenance, parse

FOLDER_FILES = ("model.safetensors", "pytorch_model.bin")

SAFETENSORS_TYPES = {
    **{"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"},
    **{"I64": "int64", "I32": "int32", "I16": "int16", "I8": "int8", "U8": "uint8"},
    **{"BOOL": "bool", "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2"},
}

MAX_METADATA = 20_000  # values in what a file says about itself
MAX_METADATA_DEPTH = 20


@dataclass
class Content:
    """What was in a file, before a ResNet is looked for in it."""

    path: Path
    content: Any
    provenance: Provenance
    config: Mapping[str, Any] = field(default_factory=dict)  # config.json of a folder
    kind: str = ""


def read_content(path: Path) -> Content:
    """By the first bytes; a folder by the names in it."""
    try:
        if path.is_dir():
            return _read_folder(path)
        if path.name in FOLDER_FILES and path.with_name("config.json").is_file():
            return _read_folder(path.parent, path.name)
    except OSError as error:
        raise ExportFileError(f"{path}: cannot be read ({error.strerror}), see to it.") from error
    data = map_file(path)
    start = bytes(data[:16])
    if start[8:9] == b"{" and int.from_bytes(start[:8], "little") <= len(data):
        return _read_safetensors(path, data)
    if start[:1] == b"\x08":  # ir_version, the first field of an ONNX file
        return _read_onnx(path)
    if path.suffix == ".safetensors":
        raise ExportFileError(f"{path}: not a safetensors file, copy or download it again.")
    content = read_checkpoint(path)
    return Content(path, content, _provenance_in(path, content), kind=_kind(content))


def _read_folder(folder: Path, name: str = "") -> Content:
    """The weights of a folder, with what its config.json says."""
    for file in [name] if name else FOLDER_FILES:
        if (folder / file).is_file() and (folder / "config.json").is_file():
            break
    else:
        raise ExportFileError(
            f"{folder}: holds no model.safetensors with a config.json, give such a folder, or "
            "a file."
        )
    path, about = folder / file, folder / "config.json"
    if path.suffix == ".safetensors":
        content = _read_safetensors(path, map_file(path))
    else:
        content = Content(path, read_checkpoint(path), {})
    try:
        config = json.loads(about.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ExportFileError(f"{about}: is no JSON, copy or download it again.") from error
    if not isinstance(config, dict):
        raise ExportFileError(f"{about}: holds no settings, copy or download it again.")
    content.config = config
    named = config.get("architecture")
    content.kind = f"timm {shown(named)}" if isinstance(named, str) else "folder with config.json"
    return content


def _read_safetensors(path: Path, data: Array) -> Content:
    """Views of the file, once the library has found it whole."""
    try:
        with safe_open(path, framework="numpy") as file:
            metadata = dict(file.metadata() or {})
    except (SafetensorError, OSError) as error:
        raise ExportFileError(
            f"{path}: not a whole safetensors file ({shown(str(error))}), copy or download it "
            "again."
        ) from error
    length = int.from_bytes(bytes(data[:8]), "little")
    header = json.loads(bytes(data[8 : 8 + length]))
    header.pop("__metadata__", None)
    try:
        tensors = {name: _view(path, entry, data[8 + length :]) for name, entry in header.items()}
    except ValueError as error:
        raise ExportFileError(f"{path}: holds {error}, save it as float32.") from error
    return Content(path, tensors, _ours(parse(metadata)), kind="safetensors file")


def _view(path: Path, entry: Mapping[str, Any], data: Array) -> LazyTensor:
    """One tensor of a safetensors file whose header was found valid."""
    if entry["dtype"] not in SAFETENSORS_TYPES:
        raise ValueError(f"tensors of type {shown(str(entry['dtype']))}")
    begin, end = entry["data_offsets"]
    return _lazy(path, data[begin:end], SAFETENSORS_TYPES[entry["dtype"]], tuple(entry["shape"]))


def _lazy(path: Path, data: Array, dtype: str, shape: tuple[int, ...]) -> LazyTensor:
    """`data` (bytes,) as a contiguous tensor."""
    count = int(np.prod(shape, dtype=object))
    strides = [int(np.prod(shape[axis + 1 :], dtype=object)) for axis in range(len(shape))]
    return LazyTensor(Storage(Record(path, data), dtype, count), 0, shape, strides)


def _read_onnx(path: Path) -> Content:
    from jaxhisto_export.onnx_graph import read_onnx

    arrays, metadata = read_onnx(path)
    provenance = _ours(parse(metadata))
    if not provenance:
        raise ExportFileError(
            f"{path}: is an ONNX file of another project, give its PyTorch file instead."
        )
    tensors = {}
    for name, array in arrays.items():
        flat = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
        tensors[name] = _lazy(path, flat, array.dtype.name, array.shape)
    return Content(path, tensors, provenance, kind="ONNX file")


def _kind(content: Any) -> str:
    """Of a checkpoint, by the keys beside its tensors."""
    keys = content.keys() if isinstance(content, dict) else ()
    if "pytorch-lightning_version" in keys:
        return "Lightning file"
    if "classy_state_dict" in keys:
        return "VISSL training file"
    return "PyTorch file"


# What the file says about itself


def _ours(fields: Provenance) -> Provenance:
    """The fields, if they are of this project."""
    form = fields.get("format")
    return fields if isinstance(form, str) and form.startswith("jaxhisto-") else {}


def _provenance_in(path: Path, content: Any) -> Provenance:
    """Of a checkpoint: beside the state dict, or in its `_metadata`; plain values alone."""
    fields: Any = None
    if isinstance(content, Mapped) and isinstance(content.state, dict):
        metadata = content.state.get("_metadata")
        fields = metadata.get("jaxhisto") if isinstance(metadata, dict) else None
    elif isinstance(content, dict) and "state_dict" in content:
        fields = {key: value for key, value in content.items() if key != "state_dict"}
    if not isinstance(fields, dict) or not _ours(fields):
        return {}
    budget = [MAX_METADATA]
    try:
        return {
            str(key): _plain(value, MAX_METADATA_DEPTH, budget) for key, value in fields.items()
        }
    except ValueError as error:
        raise ExportFileError(f"{path}: its metadata {error}, export it again.") from error


def _plain(value: Any, depth: int, budget: list[int]) -> Any:
    """A copy of JSON values alone: what a pickle holds may contain itself."""
    budget[0] -= 1
    if depth == 0 or budget[0] < 0:
        raise ValueError("is nested too deep or too long")
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, (list, tuple)):
        return [_plain(item, depth - 1, budget) for item in value]
    if isinstance(value, dict):
        return {str(key): _plain(item, depth - 1, budget) for key, item in value.items()}
    raise ValueError("holds what is no plain value")
