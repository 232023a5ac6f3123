"""Layout timm: a folder with model.safetensors and config.json, as timm and model hubs read it.

`timm.create_model("local-dir:DIR", pretrained=True)` takes all it needs from the two files; the
provenance is the string metadata of the one and the key `jaxhisto` of the other, which timm
ignores.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from jaxhisto_export.architecture import ARCHITECTURES, Architecture
from jaxhisto_export.errors import ExportFileError
from jaxhisto_export.provenance import Provenance, to_strings

WEIGHTS, CONFIG, GOLDEN = "model.safetensors", "config.json", "golden.safetensors"
COMPANIONS = frozenset({WEIGHTS, CONFIG, GOLDEN, "README.md", "loss.png"})
"""What a folder of ours may hold: these, and the model card with its picture."""

KEY = "jaxhisto"  # of config.json
LARGEST_CONFIG = 1 << 20  # bytes
DTYPE_NAMES = {torch.float32: "F32", torch.int64: "I64"}


def config(provenance: Provenance) -> dict[str, Any]:
    """config.json: what timm wants to know, and the provenance.

    timm normalises values of 0..1, so mean and std are converted where the encoder wants
    another range.

    Raises:
      ExportFileError: an encoder that wants BGR, which timm cannot be told.
    """
    if provenance["channel_order"] != "RGB":
        raise ExportFileError(
            f"{provenance['arch']}: wants {provenance['channel_order']}, and timm feeds RGB and "
            "cannot be told otherwise; take layout torchvision."
        )
    architecture = ARCHITECTURES[provenance["arch"]]
    low, high = provenance["value_range"]
    name, arguments = _timm_name(architecture)
    feeding: dict[str, Any] = {
        "input_size": [3, provenance["tile_px"], provenance["tile_px"]],
        "fixed_input_size": False,
        "interpolation": "bilinear",
        "crop_pct": 1.0,
        "crop_mode": "center",
        "mean": [(value - low) / (high - low) for value in provenance["mean"]],
        "std": [value / (high - low) for value in provenance["std"]],
        "num_classes": 0,
        "pool_size": None,
        "first_conv": "conv1",
        "classifier": "fc",
    }
    if provenance["licence"]:
        feeding["license"] = provenance["licence"]
    return {
        "architecture": name,
        "num_classes": 0,
        "num_features": architecture.feature_width,
        "global_pool": "avg",
        **({"model_args": arguments} if arguments else {}),
        "pretrained_cfg": feeding,
        KEY: provenance,
    }


def _timm_name(architecture: Architecture) -> tuple[str, dict[str, Any]]:
    """timm's name of it; one that timm has not is another one with fewer blocks."""
    if architecture.name == "resnet10":
        return "resnet18", {"layers": list(architecture.blocks)}
    return architecture.name, {}


def config_problems(folder: Path, provenance: Provenance) -> list[str]:
    """What config.json says otherwise than model.safetensors; further keys are the user's."""
    try:
        said, wanted = read_config(folder), config(provenance)
    except ExportFileError as error:
        return [str(error)]
    wrong = [
        key for key, value in wanted.items() if key != "pretrained_cfg" and said.get(key) != value
    ]
    feeding = said.get("pretrained_cfg")
    feeding = feeding if isinstance(feeding, dict) else {}
    expected = wanted["pretrained_cfg"]
    wrong += [f"pretrained_cfg.{k}" for k, v in expected.items() if feeding.get(k) != v]
    if not wrong:
        return []
    named = ", ".join(f"`{name}`" for name in wrong)
    return [f"{CONFIG} contradicts the metadata in {WEIGHTS}: {named}"]


def read_config(folder: Path) -> dict[str, Any]:
    """config.json of a folder.

    Raises:
      ExportFileError: none there, or no JSON object of reasonable size.
    """
    path = folder / CONFIG
    if not path.is_file():
        raise ExportFileError(f"{path}: there is no such file, export the folder again.")
    try:
        with path.open("rb") as file:
            content = json.loads(file.read(LARGEST_CONFIG + 1))
    except (OSError, ValueError, RecursionError) as error:
        raise ExportFileError(
            f"{path}: cannot be read as JSON, export the folder again."
        ) from error
    if not isinstance(content, dict):
        raise ExportFileError(f"{path}: holds no JSON object, export the folder again.")
    return content


def safetensors_pieces(
    tensors: Mapping[str, Tensor], provenance: Provenance
) -> Iterator[bytes | memoryview]:
    """The bytes of a safetensors file: length, JSON header, then tensor after tensor.

    Streamed, because the library's writer copies every tensor first and orders the metadata by
    chance: here equal content gives equal bytes. Widest types first, which keeps all aligned.
    """
    order = sorted(tensors, key=lambda name: -tensors[name].element_size())
    header: dict[str, Any] = {"__metadata__": to_strings(provenance)}
    start = 0
    for name in order:
        tensor = tensors[name]
        end = start + tensor.numel() * tensor.element_size()
        shape = list(tensor.shape)
        entry = {"dtype": DTYPE_NAMES[tensor.dtype], "shape": shape, "data_offsets": [start, end]}
        header[name], start = entry, end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    yield len(text).to_bytes(8, "little") + text
    for name in order:
        yield raw(tensors[name])


def raw(tensor: Tensor) -> memoryview:
    """The bytes of a tensor, not copied."""
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data
