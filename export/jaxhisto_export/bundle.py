"""All layouts of one encoder as a folder that can be uploaded as it is.

README.md  config.json  model.safetensors      the model card; what timm and model hubs read
published.ckpt  torchvision.pth  dsmil.pth  smp.pth  encoder.onnx
encoder.safetensors  golden.safetensors  loss.png  SHA256SUMS
"""

from __future__ import annotations

import importlib.util
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxhisto_export.errors import ExportFileError
from jaxhisto_export.files import new_folder, refuse_existing
from jaxhisto_export.layouts import Layout, convert, read_encoder
from jaxhisto_export.model_card import write_card
from jaxhisto_export.weights_file import file_sha256

FILES: dict[Layout, str] = {
    "published": "published.ckpt",
    "dsmil": "dsmil.pth",
    "torchvision": "torchvision.pth",
    "smp": "smp.pth",
    "onnx": "encoder.onnx",
}
WITH_HEAD = {"published", "dsmil"}
NAMES = {
    *FILES.values(),
    *(f"{name}.json" for name in FILES.values()),
    *("README.md", "SHA256SUMS", "config.json", "loss.png"),
    *("encoder.safetensors", "golden.safetensors", "model.safetensors"),
}
"""What a bundle may hold: a folder with anything else in it is never replaced."""


def write_bundle(
    encoder: Path,
    out: str | Path,
    golden: Path | None = None,
    story: Mapping[str, Any] | None = None,
    *,
    force: bool = False,
) -> list[Path]:
    """Writes the folder whole or not at all.

    Args:
      encoder: encoder.safetensors; without a projection, `published` and `dsmil` are left out.
      out: the folder.
      golden: golden.safetensors of the same encoder.
      story: what the card tells of the run.
      force: replace an earlier bundle; one with other files in it is refused all the same.

    Returns:
      The files in it.

    Raises:
      ExportFileError: an encoder that is damaged, a folder that exists, or one that cannot be
        written.
    """
    target = Path(out)
    refuse_existing([target], force)
    if target.is_file():
        raise ExportFileError(f"{target}: is a file, give the name of a folder.")
    head = bool(read_encoder(encoder).provenance["projection_width"])
    with new_folder(target, NAMES) as folder:
        _fill(folder, encoder, golden, story or {}, head)
    return sorted(target.iterdir())


def _fill(
    folder: Path, encoder: Path, golden: Path | None, story: Mapping[str, Any], head: bool
) -> None:
    """Every layout, the encoder itself, one golden file for all, card and checksums."""
    for file in convert(encoder, "timm", folder / "timm"):
        if file.is_file():
            file.rename(folder / file.name)
    (folder / "timm").rmdir()
    for layout, name in FILES.items():
        if (layout in WITH_HEAD and not head) or (layout == "onnx" and not _has("onnx")):
            continue
        convert(encoder, layout, folder / name)
    shutil.copyfile(encoder, folder / "encoder.safetensors")
    if golden is not None:
        shutil.copyfile(golden, folder / "golden.safetensors")
    write_card(folder, encoder, story, list(folder.iterdir()))
    sums = [f"{file_sha256(f)}  {f.name}\n" for f in sorted(folder.iterdir())]
    (folder / "SHA256SUMS").write_text("".join(sums), encoding="utf-8")


def _has(package: str) -> bool:
    return importlib.util.find_spec(package) is not None
