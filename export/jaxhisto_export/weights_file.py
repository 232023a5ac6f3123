"""Read a weights file of any of our layouts, and say what is wrong with its tensors.

A checkpoint is untrusted input: it is read with `weights_only=True`, which runs no pickle.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from torch import Tensor

from jaxhisto_export import onnx_graph, timm_folder
from jaxhisto_export.architecture import (
    COUNT_SUFFIX,
    UNET_ENCODER,
    UNET_HEAD,
    Architecture,
    Shapes,
    closest,
)
from jaxhisto_export.errors import ExportFileError
from jaxhisto_export.provenance import Provenance, parse

WITH_HEAD = ("published", "dsmil")
FLAT = ("torchvision", "dsmil", "smp", "smp-unet")  # PyTorch files: the state dict itself
UNORDERED = ("encoder", "unet", "timm", "onnx")  # formats that keep no order of the tensors
UNETS = ("unet", "smp-unet")  # with a decoder: unet.safetensors, and what layout smp makes of it

PREFIX = "model.resnet."  # of every key in the published layout
CLASSES = 1000  # of the zero `fc` that some loaders insist on
PROJECTION = 128  # width of the head where a file does not say (paper)
SHOWN = 4  # names listed before "and n more"


@dataclass(frozen=True)
class WeightsFile:
    """What was in a file, before anything about it is believed."""

    path: Path  # the file with the weights, also where a folder was asked for
    layout: str  # encoder or unet (of a run or an import), `layouts.Layout`, or smp-unet
    tensors: dict[str, Tensor]  # on the CPU, under the file's own keys, in the file's order
    # or, where its format keeps none, in torchvision's
    provenance: Provenance  # empty where the file has none

    @property
    def architecture(self) -> Architecture:
        """By the names of the tensors, not by what the metadata claims."""
        return closest(self.backbone())

    @property
    def classes(self) -> int:
        """Of a UNet, by what the metadata claims, else by the tensors; 0 for an encoder."""
        if self.layout not in UNETS:
            return 0
        said, head = self.provenance.get("classes"), self.tensors.get(UNET_HEAD)
        if isinstance(said, int) and said > 0:
            return said
        return head.shape[0] if head is not None and head.ndim else 1

    @property
    def own_sha256(self) -> str:
        """The field by which golden tiles and exports name the file they were made of."""
        return "unet_sha256" if self.layout in UNETS else "encoder_sha256"

    @property
    def golden_path(self) -> Path:
        """Where the golden tiles of this file lie: under its own name, or for a whole folder."""
        own, shared = golden_beside(self.path), self.path.with_name("golden.safetensors")
        if self.layout in UNETS:  # the shared one is of the encoder
            return own
        by_default = shared if self.layout in ("encoder", "timm") else own
        return next((path for path in (own, shared) if path.is_file()), by_default)

    def backbone(self) -> dict[str, Tensor]:
        """The ResNet's tensors under torchvision's names, without any head or decoder."""
        if self.layout in UNETS:
            own = {k: v for k, v in self.tensors.items() if k.startswith(UNET_ENCODER)}
            return {name.removeprefix(UNET_ENCODER): tensor for name, tensor in own.items()}
        plain = {name.removeprefix(PREFIX): tensor for name, tensor in self.tensors.items()}
        return {k: v for k, v in plain.items() if not k.startswith("fc.")}


def golden_beside(path: Path) -> Path:
    """FILE.golden.safetensors."""
    return path.with_name(path.name + ".golden.safetensors")


def sidecar_beside(path: Path) -> Path:
    """FILE.json, the readable copy of the provenance."""
    return path.with_name(path.name + ".json")


def read_weights(path: Path) -> WeightsFile:
    """Reads an encoder.safetensors, or a file or folder in any layout.

    Raises:
      ExportFileError: no such file, not a checkpoint, truncated, or not only tensors.
    """
    if path.is_dir() and (path / timm_folder.WEIGHTS).is_file():
        path = path / timm_folder.WEIGHTS
    if not path.is_file():
        raise ExportFileError(f"{path}: there is no such file, give a file that was exported.")
    if path.suffix == ".safetensors":
        tensors, metadata = read_safetensors(path)
        provenance = parse(metadata)
        said = _said_layout(provenance)
        layout = said if said == "timm" else "unet" if _is_unet(tensors) else "encoder"
    elif path.suffix == ".onnx":
        arrays, metadata = onnx_graph.read_onnx(path)
        tensors = {name: _tensor(path, name, array) for name, array in arrays.items()}
        provenance, layout = parse(metadata), "onnx"
    else:
        return _from_checkpoint(path, _load_checkpoint(path))
    return WeightsFile(path, layout, _in_order(tensors), provenance)


def read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors (mapped, not copied: read while the file is) and string metadata of the file."""
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
            return tensors, dict(file.metadata() or {})
    except (SafetensorError, OSError) as error:
        raise ExportFileError(
            f"{path}: not a whole safetensors file ({_first_line(error)}), write it again."
        ) from error


def _tensor(path: Path, name: str, array: NDArray[Any]) -> Tensor:
    try:
        return torch.from_numpy(array.copy())
    except TypeError as error:
        raise ExportFileError(
            f"{path}: `{name}` is of type {array.dtype}, export it again."
        ) from error


def _in_order(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Torchvision's order, then the others by name: the format keeps none."""
    backbone = [name for name in closest(tensors).backbone() if name in tensors]
    return {name: tensors[name] for name in [*backbone, *sorted(tensors.keys() - set(backbone))]}


def _said_layout(provenance: Provenance) -> str:
    """The layout in the format `jaxhisto-LAYOUT-1`; empty where there is none."""
    found = re.fullmatch(r"jaxhisto-(.+)-1", str(provenance.get("format", "")))
    return found[1] if found else ""


def _is_unet(names: Iterable[str]) -> bool:
    """Whether there is a part of a decoder: its absence otherwise must not make an encoder."""
    return any(name.startswith(("decoder.blocks.", "segmentation_head.")) for name in names)


def _load_checkpoint(path: Path) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged zip or pickle raises whatever it runs into
        raise ExportFileError(
            f"{path}: not a whole PyTorch checkpoint of tensors alone ({_first_line(error)}), "
            "export or copy it again."
        ) from error


def _from_checkpoint(path: Path, content: Any) -> WeightsFile:
    state = content.get("state_dict", content) if isinstance(content, dict) else None
    if not state or not isinstance(state, dict):
        raise ExportFileError(f"{path}: holds no state dict, export it again.")
    if not all(isinstance(k, str) and isinstance(v, Tensor) for k, v in state.items()):
        raise ExportFileError(
            f"{path}: its state dict holds other things than named tensors, export it again."
        )
    if state is content:
        own = getattr(state, "_metadata", None)
        provenance = _primitives(own.get("jaxhisto") if isinstance(own, dict) else None)
        return WeightsFile(path, _flat_layout(state, provenance), dict(state), provenance)
    return WeightsFile(path, "published", dict(state), _primitives(content))


def _flat_layout(state: dict[str, Tensor], provenance: Provenance) -> str:
    """As the file says; by its head where it says nothing."""
    said = _said_layout(provenance)
    if said in FLAT:
        return said
    if _is_unet(state):
        return "smp-unet"
    return "dsmil" if "fc.1.weight" in state else "torchvision"


def _primitives(provenance: Any) -> Provenance:
    """What was written beside the tensors; anything but a dict counts as nothing."""
    if not isinstance(provenance, dict):
        return {}
    return {str(key): value for key, value in provenance.items() if key != "state_dict"}


def expected_shapes(file: WeightsFile) -> Shapes:
    """Keys and shapes that this layout has for this architecture, in the layout's order."""
    architecture = file.architecture
    if file.layout in UNETS:
        return architecture.unet(file.classes)
    shapes = architecture.backbone()
    if file.layout == "torchvision" and "fc.weight" in file.tensors:
        width = architecture.feature_width
        said = file.provenance.get("classes", CLASSES)
        classes = said if isinstance(said, int) else CLASSES
        return shapes | {"fc.weight": (classes, width), "fc.bias": (classes,)}
    if file.layout not in ("encoder", *WITH_HEAD):
        return shapes
    projection = file.provenance.get("projection_width")
    if projection == 0 and file.layout == "encoder":
        return shapes
    wide = projection if isinstance(projection, int) and projection > 0 else PROJECTION
    shapes |= architecture.head(wide)
    if file.layout != "published":
        return shapes
    return {PREFIX + name: shape for name, shape in shapes.items()}


def tensor_problems(file: WeightsFile) -> list[str]:
    """Everything wrong with keys, order, shapes, types and values; one sentence each."""
    wrapped = [name for name in file.tensors if name.startswith("module.")]
    if wrapped:
        return [
            f"{len(wrapped)} keys start with `module.` (torch.nn.DataParallel's prefix), which "
            "most loaders skip in silence"
        ]
    expected = expected_shapes(file)
    found = _key_problems(list(file.tensors), list(expected), file.layout)
    for name in [name for name in expected if name in file.tensors]:
        found += _tensor_problem(name, file.tensors[name], expected[name])
    claimed = file.provenance.get("arch", file.architecture.name)
    if claimed != file.architecture.name:
        found.append(f"the metadata says {claimed}, the tensors are a {file.architecture.name}")
    return found


def _key_problems(names: list[str], expected: list[str], layout: str) -> list[str]:
    missing = [name for name in expected if name not in names]
    extra = [name for name in names if name not in expected]
    found = []
    if missing:
        found.append(f"{len(missing)} of {len(expected)} keys missing: {_listed(missing)}")
    if extra:
        found.append(f"{len(extra)} keys that do not belong there: {_listed(extra)}")
    if not found and layout not in UNORDERED and names != expected:
        first = next(a for a, b in zip(names, expected, strict=True) if a != b)
        whose = "smp" if layout in UNETS else "torchvision"
        found.append(f"the keys are not in {whose}'s order, from `{first}` on")
    return found


def _tensor_problem(name: str, tensor: Tensor, shape: tuple[int, ...]) -> list[str]:
    wanted = torch.int64 if name.endswith(COUNT_SUFFIX) else torch.float32
    found = []
    if tuple(tensor.shape) != shape:
        found.append(f"`{name}` has shape {tuple(tensor.shape)}, not {shape}")
    if tensor.dtype != wanted:
        found.append(f"`{name}` is {tensor.dtype}, not {wanted}")
    if not bool(torch.isfinite(tensor).all()):
        found.append(f"`{name}` holds NaN or infinity")
    return found


def tensors_sha256(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over name, type, shape and bytes of each tensor, in the mapping's order."""
    digest = hashlib.sha256()
    for name, tensor in tensors.items():
        header = [name, str(tensor.dtype), list(tensor.shape)]
        digest.update(json.dumps(header).encode())
        digest.update(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def file_sha256(path: Path) -> str:
    """SHA-256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def one_sentence(problems: list[str]) -> str:
    """The first problems as one clause, with the number of those left out."""
    more = f"; and {len(problems) - SHOWN} more" if len(problems) > SHOWN else ""
    return "; ".join(problems[:SHOWN]) + more


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(f"`{name}`" for name in names[:SHOWN]) + more


def _first_line(error: BaseException) -> str:
    """The first sentence of a library's message, which may run over a screen."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0].split(". ")[0].rstrip(".")[:160]
