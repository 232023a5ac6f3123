"""encoder.safetensors or unet.safetensors -> a file or folder that public code loads.

published     {"state_dict": ..., provenance}: keys under `model.resnet.`, head last; the
              layout of ozanciga/self-supervised-histopathology's native file.
torchvision   flat, without a head, with a zero 1000-way `fc`, or with a fine-tuned one.
dsmil         flat, in torchvision's order, head last: for loaders that go by position.
smp           flat, without a head, for the encoders of segmentation_models_pytorch; of a UNet
              the whole state dict of its Unet.
timm          a folder: model.safetensors and config.json.
onnx          a graph with the weights in it.

Flat files have their provenance in the OrderedDict's `_metadata["jaxhisto"]` and in FILE.json:
a further key in the state dict would break strict and positional loaders.
"""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Iterable
from pathlib import Path
from typing import IO, Any, Literal, get_args

import torch
from torch import Tensor

from jaxhisto_export import onnx_graph, timm_folder
from jaxhisto_export.errors import ExportFileError
from jaxhisto_export.files import (
    Writer,
    new_folder,
    refuse_existing,
    replace_files,
    write_file,
)
from jaxhisto_export.provenance import Provenance, problems, rules_of
from jaxhisto_export.torch_unet import SMP_ENCODERS
from jaxhisto_export.weights_file import (
    CLASSES,
    FLAT,
    PREFIX,
    WITH_HEAD,
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

Layout = Literal["published", "torchvision", "dsmil", "timm", "smp", "onnx"]
Fc = Literal["none", "zero", "trained"]
HEAD = "head.safetensors"
"""Beside a fine-tuned encoder.safetensors: its last layer."""
OTHER_SUFFIXES = {".safetensors", ".onnx"}
"""Of a PyTorch file: they name another format."""


def convert(
    encoder_path: str | Path,
    layout: Layout,
    out: str | Path,
    golden: str | Path | None = None,
    fc: Fc = "none",
    *,
    force: bool = False,
    normalise: bool = False,
) -> list[Path]:
    """Writes one layout, whole or not at all.

    Args:
      encoder_path: encoder.safetensors or unet.safetensors of a run or an import.
      layout: see the module; `published` and `dsmil` need a projection in the encoder, and a
        UNet has `smp` alone.
      out: the file to write, or the folder of layout timm.
      golden: golden tiles of the same file, copied to OUT.golden.safetensors, or into
        the folder; `verify` misses it where it is not given.
      fc: of layout torchvision: `none`, `zero` for loaders that insist on a 1000-way fc, or
        `trained`: that of head.safetensors beside a fine-tuned encoder.
      force: replace OUT and what lies beside it under its name. A folder is replaced as a whole,
        and only if it holds nothing but what this package writes into one.
      normalise: of layout onnx: take uint8 RGB tiles and normalise inside the graph.

    Returns:
      The files written, the one with the weights first.

    Raises:
      ExportFileError: weights that are damaged or incomplete, golden tiles of other weights, a
        layout that is unknown or not for a UNet, an OUT that exists or cannot be written.
    """
    encoder, target = Path(encoder_path), Path(out)
    _check_request(layout, target, fc, normalise)
    beside = [] if layout == "timm" else [sidecar_beside(target), golden_beside(target)]
    refuse_existing([target, *beside], force)
    file = _read_complete(encoder)
    if file.layout == "unet":
        _check_unet(file, layout)
    provenance = {**file.provenance, file.own_sha256: file_sha256(encoder)}
    if layout in WITH_HEAD and not provenance["projection_width"]:
        raise ExportFileError(
            f"{encoder}: has no projection, which layout {layout} needs; take layout torchvision."
        )
    if golden is not None:
        _check_golden(Path(golden), file.own_sha256, provenance[file.own_sha256])
    tiles = None if golden is None else Path(golden).read_bytes()
    tensors = _tensors(file, layout, fc)
    if fc == "trained":
        layer, about = _trained_layer(encoder, provenance[file.own_sha256])
        tensors |= layer
        provenance |= about
    provenance = _of_this_file(file, provenance, layout, tensors)
    if layout == "timm":
        return _write_folder(target, tensors, provenance, tiles)
    writers = _companions(target, layout, provenance, tiles)
    # The file itself comes last: whoever sees it sees its companions too.
    writers[target] = _writer(layout, file, tensors, provenance, normalise)
    replace_files(writers, stale=set(beside) - writers.keys())
    return [*writers][::-1]


def read_encoder(path: Path) -> WeightsFile:
    """Reads and checks an encoder.safetensors; all that is wrong with it is in the error."""
    file = _read_complete(path)
    if file.layout != "encoder":
        raise ExportFileError(f"{path}: is of layout {file.layout}, give RUN/encoder.safetensors.")
    return file


def _read_complete(path: Path) -> WeightsFile:
    file = read_weights(path)
    if file.layout not in ("encoder", "unet"):
        raise ExportFileError(f"{path}: is of layout {file.layout}, give RUN/encoder.safetensors.")
    found = problems(file.provenance, rules_of(file.layout)) or tensor_problems(file)
    if found:
        raise ExportFileError(
            f"{path}: not a complete {file.layout} ({one_sentence(found)}), export the run again."
        )
    return file


def _check_unet(file: WeightsFile, layout: str) -> None:
    if layout != "smp":
        raise ExportFileError(
            f"{file.path}: is a UNet, which layout {layout} has no place for, take layout smp."
        )
    if file.architecture.name not in SMP_ENCODERS:
        raise ExportFileError(
            f"{file.path}: is a UNet of {file.architecture.name}, which "
            f"segmentation_models_pytorch has not, train one of {', '.join(SMP_ENCODERS)}."
        )


def _check_request(layout: str, target: Path, fc: str, normalise: bool) -> None:
    if layout not in get_args(Layout):
        raise ExportFileError(f"{layout}: no such layout, take one of {get_args(Layout)}.")
    if fc not in get_args(Fc):
        raise ExportFileError(f"fc {fc}: no such choice, take one of {get_args(Fc)}.")
    if fc != "none" and layout != "torchvision":
        what = "1000-way" if fc == "zero" else "trained"
        raise ExportFileError(
            f"{target}: layout {layout} has no {what} fc, take fc {fc} with layout torchvision."
        )
    if normalise and layout != "onnx":
        raise ExportFileError(
            f"{target}: layout {layout} cannot normalise, take normalise with layout onnx."
        )
    _check_name(layout, target)


def _check_name(layout: str, target: Path) -> None:
    if layout == "timm":
        if target.is_file():
            raise ExportFileError(f"{target}: is a file, give the name of a folder.")
        return
    if target.is_dir():
        raise ExportFileError(f"{target}: is a folder, give the name of a file.")
    if layout == "onnx":
        if target.suffix != ".onnx":
            raise ExportFileError(f"{target}: holds an ONNX graph, call it .onnx.")
    elif target.suffix in OTHER_SUFFIXES:
        raise ExportFileError(f"{target}: holds a PyTorch file, call it .pth or .pt.")


def _check_golden(path: Path, field: str, sha256: str) -> None:
    _, metadata = read_safetensors(path)
    if metadata.get(field) != sha256:
        unet = field == "unet_sha256"
        what, whose = ("logits", "UNet") if unet else ("features", "encoder")
        raise ExportFileError(
            f"{path}: holds the golden {what} of other weights than the {whose}'s, "
            "export the run again."
        )


def _tensors(file: WeightsFile, layout: Layout, fc: Fc) -> OrderedDict[str, Tensor]:
    """The layout's tensors under its names, in torchvision's order: safetensors keeps none."""
    architecture = file.architecture
    if file.layout == "unet":
        return OrderedDict((name, file.tensors[name]) for name in architecture.unet(file.classes))
    names = list(architecture.backbone())
    if layout in WITH_HEAD:
        names += architecture.head(file.provenance["projection_width"])
    prefix = PREFIX if layout == "published" else ""
    tensors = OrderedDict((prefix + name, file.tensors[name]) for name in names)
    if fc == "zero":
        tensors["fc.weight"] = torch.zeros(CLASSES, architecture.feature_width)
        tensors["fc.bias"] = torch.zeros(CLASSES)
    return tensors


def _trained_layer(encoder: Path, sha256: str) -> tuple[OrderedDict[str, Tensor], Provenance]:
    """fc.weight (C, d) and fc.bias (C,), and what its outputs are: classes, class_names."""
    path = encoder.with_name(HEAD)
    if not path.is_file():
        raise ExportFileError(
            f"{path}: is not there, take fc trained with the encoder.safetensors of a finished "
            "`jaxhisto finetune`."
        )
    tensors, about = read_safetensors(path)
    if about.get("encoder_sha256") != sha256:
        raise ExportFileError(
            f"{path}: is the last layer of another encoder, keep the files of one fine-tuning "
            "together."
        )
    layer = OrderedDict((name, tensors[name]) for name in ("fc.weight", "fc.bias"))
    names = json.loads(about["class_names"]) or None
    return layer, {"classes": len(layer["fc.bias"]), "class_names": names}


def _of_this_file(
    file: WeightsFile, provenance: Provenance, layout: Layout, tensors: OrderedDict[str, Tensor]
) -> Provenance:
    """The provenance of encoder or UNet, and what the new file says of itself.

    In the fields' order: safetensors keeps none, and equal encoders make equal files.
    """
    names = sorted(provenance, key=[*rules_of(file.layout), *sorted(provenance)].index)
    written = "smp-unet" if file.layout == "unet" else layout
    return {name: provenance[name] for name in names} | {
        "format": f"jaxhisto-{written}-1",
        "tensors_sha256": tensors_sha256(tensors),
    }


def _writer(
    layout: Layout,
    file: WeightsFile,
    tensors: OrderedDict[str, Tensor],
    provenance: Provenance,
    normalise: bool,
) -> Writer:
    """What writes the file with the weights."""
    if layout == "onnx":
        arrays = {name: tensor.numpy() for name, tensor in tensors.items()}
        pieces = onnx_graph.onnx_pieces(arrays, file.architecture, provenance, normalise)
        return _all(pieces)
    if layout == "published":
        content = {"state_dict": tensors, **provenance}
        return lambda stream: torch.save(content, stream)
    # Survives torch.save and a strict load; a further key would break strict loaders.
    tensors._metadata = OrderedDict(jaxhisto=provenance)  # type: ignore[attr-defined]  # as torch does
    return lambda stream: torch.save(tensors, stream)


def _companions(
    target: Path, layout: Layout, provenance: Provenance, tiles: bytes | None
) -> dict[Path, Writer]:
    """What goes beside the file: FILE.json of a flat layout, FILE.golden.safetensors."""
    writers: dict[Path, Writer] = {}
    if layout in FLAT:
        writers[sidecar_beside(target)] = _all([_json(provenance)])
    if tiles is not None:
        writers[golden_beside(target)] = _all([tiles])
    return writers


def _write_folder(
    target: Path, tensors: OrderedDict[str, Tensor], provenance: Provenance, tiles: bytes | None
) -> list[Path]:
    writers = {
        timm_folder.WEIGHTS: _all(timm_folder.safetensors_pieces(tensors, provenance)),
        timm_folder.CONFIG: _all([_json(timm_folder.config(provenance))]),
    }
    if tiles is not None:
        writers[timm_folder.GOLDEN] = _all([tiles])
    with new_folder(target, timm_folder.COMPANIONS) as folder:
        for name, write in writers.items():
            write_file(folder / name, write)
    return [target / name for name in writers]


def _all(pieces: Iterable[bytes | memoryview]) -> Writer:
    def write(stream: IO[bytes]) -> None:
        for piece in pieces:
            stream.write(piece)

    return write


def _json(content: dict[str, Any]) -> bytes:
    return (json.dumps(content, indent=1) + "\n").encode()
