"""encoder.safetensors -> a PyTorch file in a layout that public code loads.

published     {"state_dict": ..., provenance}: keys under `model.resnet.`, head last; the
              layout of ozanciga/self-supervised-histopathology's native file.
torchvision   flat, without a head or with a zero 1000-way `fc`; provenance in the
              OrderedDict's `_metadata["jaxhisto"]` and in FILE.json.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any, Literal, get_args

import torch
from torch import Tensor

from jaxhisto_export.architecture import ARCHITECTURES, Architecture
from jaxhisto_export.errors import ExportFileError
from jaxhisto_export.provenance import ENCODER_FIELDS, Provenance, problems
from jaxhisto_export.weights_file import (
    CLASSES,
    PREFIX,
    WeightsFile,
    file_sha256,
    golden_beside,
    one_sentence,
    read_safetensors,
    read_weights,
    sidecar_beside,
    tensor_problems,
    tensors_sha256,
)

Layout = Literal["published", "torchvision"]
Fc = Literal["none", "zero"]
Writer = Callable[[IO[bytes]], Any]


def convert(
    encoder_path: str | Path,
    layout: Layout,
    out: str | Path,
    golden: str | Path | None = None,
    fc: Fc = "none",
) -> list[Path]:
    """Writes one layout, whole or not at all; an earlier file of that name is replaced.

    Args:
      encoder_path: encoder.safetensors of a run.
      layout: `published` or `torchvision`.
      out: the PyTorch file to write.
      golden: golden.safetensors of the same run, copied to OUT.golden.safetensors; without
        it an OUT.golden.safetensors of earlier weights is removed, and `verify` will miss it.
      fc: of layout `torchvision`: `none`, or `zero` for loaders that insist on a 1000-way fc.

    Returns:
      The files written, OUT first.

    Raises:
      ExportFileError: an encoder that is damaged or incomplete, golden features of other
        weights, an unknown layout, or an OUT that cannot be written.
    """
    encoder, target = Path(encoder_path), Path(out)
    _check_request(encoder, layout, target, fc)
    file = read_encoder(encoder)
    provenance = {**file.provenance, "encoder_sha256": file_sha256(encoder)}
    if golden is not None:
        _check_golden(Path(golden), provenance["encoder_sha256"])
    content, provenance = _arrange(file, provenance, layout, fc)
    writers = _companions(target, layout, provenance, golden)
    # The file itself comes last: whoever sees it sees its companions too.
    writers[target] = lambda stream: torch.save(content, stream)
    stale = {sidecar_beside(target), golden_beside(target)} - writers.keys()
    _replace_all(writers, stale)
    return [*writers][::-1]


def read_encoder(path: Path) -> WeightsFile:
    """Reads and checks an encoder.safetensors; all that is wrong with it is in the error."""
    file = read_weights(path)
    if file.layout != "encoder":
        raise ExportFileError(f"{path}: not a safetensors file, give RUN/encoder.safetensors.")
    found = problems(file.provenance, ENCODER_FIELDS) or tensor_problems(file)
    if found:
        raise ExportFileError(
            f"{path}: not a complete encoder ({one_sentence(found)}), export the run again."
        )
    return file


def _check_request(encoder: Path, layout: str, target: Path, fc: str) -> None:
    if layout not in get_args(Layout):
        raise ExportFileError(f"{layout}: no such layout, take one of {get_args(Layout)}.")
    if fc not in get_args(Fc):
        raise ExportFileError(f"fc {fc}: no such choice, take one of {get_args(Fc)}.")
    if fc == "zero" and layout != "torchvision":
        raise ExportFileError(
            f"{target}: layout {layout} has its own head, take fc zero with layout torchvision."
        )
    if target.is_dir():
        raise ExportFileError(f"{target}: is a folder, give the name of a file.")
    if target.suffix == ".safetensors":
        raise ExportFileError(f"{target}: holds a PyTorch file, call it .pth or .pt.")


def _check_golden(path: Path, encoder_sha256: str) -> None:
    _, metadata = read_safetensors(path)
    if metadata.get("encoder_sha256") != encoder_sha256:
        raise ExportFileError(
            f"{path}: holds the golden features of other weights than the encoder's, "
            "export the run again."
        )


def _arrange(
    file: WeightsFile, provenance: Provenance, layout: Layout, fc: Fc
) -> tuple[Any, Provenance]:
    """What torch.save gets, and the provenance of this file."""
    architecture = ARCHITECTURES[file.provenance["arch"]]
    tensors = _ordered(file.tensors, architecture, int(provenance["projection_width"]))
    if layout == "published":
        state = OrderedDict((PREFIX + name, tensor) for name, tensor in tensors.items())
    else:
        state = OrderedDict((k, v) for k, v in tensors.items() if not k.startswith("fc."))
        if fc == "zero":
            state["fc.weight"] = torch.zeros(CLASSES, architecture.feature_width)
            state["fc.bias"] = torch.zeros(CLASSES)
    # In the fields' order: safetensors keeps none, and equal encoders make equal files.
    names = sorted(provenance, key=[*ENCODER_FIELDS, *sorted(provenance)].index)
    provenance = {name: provenance[name] for name in names} | {
        "format": f"jaxhisto-{layout}-1",
        "tensors_sha256": tensors_sha256(state),
    }
    if layout == "published":
        return {"state_dict": state, **provenance}, provenance
    # Survives torch.save and a strict load; a further key would break strict loaders.
    state._metadata = OrderedDict(jaxhisto=provenance)  # type: ignore[attr-defined]  # as torch does
    return state, provenance


def _ordered(
    tensors: dict[str, Tensor], architecture: Architecture, projection: int
) -> dict[str, Tensor]:
    """The tensors in torchvision's order, head last: safetensors keeps none."""
    names = architecture.backbone() | architecture.head(projection)
    return {name: tensors[name] for name in names}


def _companions(
    target: Path, layout: Layout, provenance: Provenance, golden: str | Path | None
) -> dict[Path, Writer]:
    """What goes beside the file: FILE.json of a flat layout, FILE.golden.safetensors."""
    writers: dict[Path, Writer] = {}
    if layout == "torchvision":
        text = (json.dumps(provenance, indent=1) + "\n").encode()
        writers[sidecar_beside(target)] = lambda stream: stream.write(text)
    if golden is not None:
        tiles = Path(golden).read_bytes()
        writers[golden_beside(target)] = lambda stream: stream.write(tiles)
    return writers


def _replace_all(writers: dict[Path, Writer], stale: set[Path]) -> None:
    """Writes all under temporary names, then renames: each is old or new, never half."""
    temporary = {path: path.with_name(f".{path.name}.{os.getpid()}.tmp") for path in writers}
    path = next(iter(writers))
    try:
        for path, write in writers.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            with temporary[path].open("wb") as stream:
                write(stream)
                stream.flush()
                os.fsync(stream.fileno())
        for path in stale:
            path.unlink(missing_ok=True)
        for path in writers:
            os.replace(temporary[path], path)
    except (OSError, RuntimeError) as error:  # torch.save turns a full disk into RuntimeError
        reason = str(error).strip().splitlines()[0]
        raise ExportFileError(
            f"{path}: cannot be written ({reason}), make room or name another place."
        ) from error
    finally:
        for leftover in temporary.values():
            with contextlib.suppress(OSError):  # the folder itself may be unreachable
                leftover.unlink(missing_ok=True)
