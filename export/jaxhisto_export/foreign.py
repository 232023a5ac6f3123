"""Read an encoder, or a UNet, that somebody else trained, in whatever file and wrapping.

By content, not by suffix: PyTorch checkpoints (without torch, and without running their
pickle), safetensors, a folder as timm writes it, and ONNX files of this project. Every tensor
of a ResNet must be there; what was left out or converted is said.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from jaxhisto_export.architecture import ARCHITECTURES, COUNT_SUFFIX, Architecture
from jaxhisto_export.errors import ExportFileError
from jaxhisto_export.foreign_files import Content, read_content
from jaxhisto_export.foreign_names import (
    KNOWN_PREFIXES,
    NUMBERED,
    PREFERENCE,
    SIGNS,
    Place,
    Table,
    check,
    choose,
    left_out,
    tables,
)
from jaxhisto_export.foreign_unet import FORMATS, check_unet, encoder_of, unet_around
from jaxhisto_export.lazy_tensors import Array, LazyTensor
from jaxhisto_export.pickles import Stub, shown
from jaxhisto_export.provenance import ENCODER_FIELDS, UNET_FIELDS, Provenance, problems

__all__ = [
    "KNOWN_PREFIXES",
    "NUMBERED",
    "PREFERENCE",
    "SIGNS",
    "TORCHVISION_FILES",
    "Feeding",
    "Imported",
    "read_foreign",
]

PUBLISHED_PREFIX = "model.resnet."
PUBLISHED_STATISTIC = (0.5, 0.5, 0.5)  # mean and std (issue 2 of its repository)

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
TORCHVISION_FILES = {
    "f37072fd": "resnet18",
    "b627a593": "resnet34",
    "0676ba61": "resnet50",
    "11ad3fa6": "resnet50",
    "63fe2227": "resnet101",
    "cd907fc2": "resnet101",
}
"""How the SHA-256 of torchvision's ImageNet files begins, as their own names say."""

Part = Literal["", "encoder", "unet"]

FLOATS = ("float32", "float16", "bfloat16", "float64")
INTEGERS = ("int64", "int32", "int16", "int8", "uint8")


@dataclass(frozen=True)
class Feeding:
    """How pixels become input: value / 255, minus mean, divided by std; RGB.

    Attributes:
      source: where that is known from.
      licence: of the weights, where the source says so, else empty.
    """

    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    source: str
    licence: str = ""


@dataclass(frozen=True)
class Imported:
    """A ResNet, or a UNet around one, taken out of a file.

    Attributes:
      path: the file; of a folder, the one in it that holds the weights.
      tensors: torchvision's names in torchvision's order, float32 and int64 counters, then
        the head if there is one; of a UNet smp's names in smp's order. Views of the file where
        nothing had to be converted.
      projection: width of the projection, 0 without head.
      classes: of a UNet, 0 for an encoder.
      recognised: what kind of file it is, for a person.
      feeding: None where nothing says it.
      provenance: what a file of this project says about itself, else empty.
      notes: one clause each on what was left out, added or converted.
      sha256: of the file.
    """

    path: Path
    architecture: Architecture
    tensors: dict[str, Array]
    projection: int
    recognised: str
    feeding: Feeding | None
    provenance: Provenance
    notes: tuple[str, ...]
    sha256: str
    classes: int = 0


def read_foreign(path: Path, arch: str | None = None, part: Part = "encoder") -> Imported:
    """Takes the ResNet out of a file or a folder, or the UNet of which it is the encoder.

    Args:
      path: .pth, .pt, .ckpt, .tar, .bin, .safetensors or .onnx, told apart by content, or a
        folder with model.safetensors and config.json.
      arch: what the user takes it for; None takes what is found.
      part: `encoder`; `unet`, the whole smp.Unet with its default decoder (another interpolation
        or activation shows in no tensor); `` (empty), the UNet where there is one.

    Raises:
      ExportFileError: no such file, damaged, of a kind that is not read, no ResNet of ours or
        another than `arch`, no UNet or another one where that is asked for, incomplete, not
        finite, or contradicting its own metadata.
    """
    if arch is not None and arch not in ARCHITECTURES:
        raise ExportFileError(
            f"{path}: cannot be read as `{shown(arch)}`, give one of {', '.join(ARCHITECTURES)}."
        )
    source = read_content(Path(path))
    try:
        return _take(source, arch, part)
    except ValueError as error:  # a clause of ours
        remedy = "give a ResNet v1 with torchvision's names, or export it again"
        raise ExportFileError(f"{source.path}: {error}, {remedy}.") from error


def _take(source: Content, arch: str | None, part: Part) -> Imported:
    found = _tables_of(source)
    place = choose(found)
    check(place)
    architecture = place.architecture
    if arch not in (None, architecture.name):
        raise ExportFileError(
            f"{source.path}: is a {architecture.name}, not the {arch} asked for, ask for that."
        )
    whole = None if part == "encoder" else unet_around(place)
    if whole is not None:
        return _take_unet(source, found, place, whole)
    if part == "unet":
        raise ExportFileError(
            f"{source.path}: holds no Unet of segmentation_models_pytorch around its "
            f"{architecture.name}, import it without --part unet."
        )
    provenance = _checked_provenance(source.provenance, architecture)
    head = _head(place, strict=bool(provenance) or place.prefix == PUBLISHED_PREFIX)
    wanted = [*architecture.backbone(), *head]
    notes = _notes_left_out(source, found, place, {n for n in wanted if n in place.names})
    tensors, converted = _converted(place, wanted)
    digest = _sha256(source.path)
    feeding, known = _feeding(source, place, provenance, digest, bool(head))
    return Imported(
        path=source.path,
        architecture=architecture,
        tensors=tensors,
        projection=tensors["fc.3.weight"].shape[0] if head else 0,
        recognised=known or _recognised(source, place, provenance, bool(head)),
        feeding=feeding,
        provenance=provenance,
        notes=tuple(notes + converted),
        sha256=digest,
    )


def _take_unet(source: Content, found: list[Table], place: Place, whole: Place) -> Imported:
    try:
        classes = check_unet(whole, place)
    except ValueError as error:
        raise ExportFileError(
            f"{source.path}: {error}, import its encoder with --part encoder."
        ) from error
    ours = source.provenance
    _checked_provenance(ours, place.architecture)
    if ours.get("classes", classes) != classes:
        raise ValueError(f"says that it has {ours['classes']} classes, and has {classes}")
    wanted = list(place.architecture.unet(classes))
    notes = left_out(found, whole, {name for name in wanted if name in whole.names})
    tensors, converted = _converted(whole, wanted)
    digest = _sha256(source.path)
    feeding, known = _feeding(source, place, ours, digest, head=False)
    kind = f"file of this project ({ours['format']})" if ours else source.kind
    return Imported(
        path=source.path,
        architecture=place.architecture,
        tensors=tensors,
        projection=0,
        recognised=known or f"{kind}, Unet of segmentation_models_pytorch, {classes} classes",
        feeding=feeding,
        provenance=ours,
        notes=tuple(notes + converted),
        sha256=digest,
        classes=classes,
    )


def _tables_of(source: Content) -> list[Table]:
    """Every dict with tensors; an error where there is none, naming what there is instead."""
    content, found = source.content, tables(source.content)
    if found:
        return found
    top = [content, *(content.values() if isinstance(content, dict) else ())]
    stubs = [value for value in top if isinstance(value, Stub) and value.args is not None]
    if stubs:
        raise ExportFileError(
            f"{source.path}: holds a pickled {stubs[0].path}, save its state_dict() instead."
        )
    raise ValueError("holds no tensors")


# What the file says about itself


def _checked_provenance(provenance: Provenance, architecture: Architecture) -> Provenance:
    unet = provenance.get("format") in FORMATS
    wrong = problems(provenance, UNET_FIELDS if unet else ENCODER_FIELDS) if provenance else []
    if wrong:
        raise ValueError(f"has wrong {shown(wrong[0])}")
    if provenance and provenance["arch"] != architecture.name:
        raise ValueError(
            f"says that it is a {provenance['arch']}, and its tensors are a {architecture.name}"
        )
    return encoder_of(provenance) if unet else provenance


def _recognised(source: Content, place: Place, provenance: Provenance, head: bool) -> str:
    if provenance:
        return f"file of this project ({provenance['format']})"
    if place.prefix == PUBLISHED_PREFIX and head:
        return f"published layout ({source.kind})"
    parts = place.path.split(".")
    if "encoder_q" in parts:
        return "MoCo training file, encoder_q"
    if place.numbered:
        return f"{source.kind}, ResNet under `{shown(place.path)}` with numbered children"
    if place.path.strip("."):
        return f"{source.kind}, ResNet under `{shown(place.path)}`"
    return source.kind if source.config else f"{source.kind}, torchvision's names"


def _feeding(
    source: Content, place: Place, provenance: Provenance, digest: str, head: bool
) -> tuple[Feeding | None, str]:
    """How to feed it, and what file it is, where its checksum is known."""
    from jaxhisto_export.zoo import known

    entry = known(digest, source.path.stat().st_size)
    if entry is not None:
        feeding = Feeding(entry.mean, entry.std, "known file", entry.licence)
        return feeding, f"known file: {entry.title} (SHA-256 matches)"
    if TORCHVISION_FILES.get(digest[:8]) == place.architecture.name:
        feeding = Feeding(IMAGENET_MEAN, IMAGENET_STD, "known file")
        return feeding, f"torchvision ImageNet {place.architecture.name}"
    stated = _config_feeding(source)
    if provenance:
        mean, std = _three(provenance["mean"]), _three(provenance["std"])
        if stated and (stated.mean, stated.std) != (mean, std):
            raise ValueError("contradicts its config.json on mean and std")
        return Feeding(mean, std, "file metadata", str(provenance["licence"])), ""
    if stated is None and place.prefix == PUBLISHED_PREFIX and head:
        stated = Feeding(PUBLISHED_STATISTIC, PUBLISHED_STATISTIC, "published layout")
    return stated, ""


def _config_feeding(source: Content) -> Feeding | None:
    """mean and std of config.json: in pretrained_cfg, or beside it in older folders."""
    nested = source.config.get("pretrained_cfg")
    said = nested if isinstance(nested, dict) and "mean" in nested else source.config
    if "mean" not in said and "std" not in said:
        return None
    fields = {name: said.get(name) for name in ("mean", "std")}
    wrong = problems(fields, {name: ENCODER_FIELDS[name] for name in fields}) if fields else []
    if wrong:
        raise ValueError(f"has a config.json whose {shown(wrong[0])}")
    licence = said.get("license", source.config.get("license", ""))
    mean, std = _three(fields["mean"]), _three(fields["std"])
    return Feeding(mean, std, "config.json", licence if isinstance(licence, str) else "")


def _three(values: Any) -> tuple[float, float, float]:
    red, green, blue = values
    return float(red), float(green), float(blue)


# Tensors


def _head(place: Place, strict: bool) -> list[str]:
    """Names of the projection d -> d -> p, if that is there.

    Raises:
      ValueError: `strict`, and there is a part of it.
    """
    own = {name: t.shape for name, t in place.tensors.items() if name.startswith("fc.")}
    last = own.get("fc.3.weight", ())
    head = place.architecture.head(last[0] if last else 0)
    if own == head and last[0] > 0:
        return list(head)
    if strict and own.keys() - {"fc.weight", "fc.bias"}:
        raise ValueError("has a projection head whose names or shapes are not d -> d -> p")
    return []


def _notes_left_out(source: Content, found: list[Table], place: Place, kept: set[str]) -> list[str]:
    notes, named = [], set(kept)
    classes = place.tensors.get("fc.weight")
    if classes is not None and len(classes.shape) == 2:
        notes.append(f"fc ({classes.shape[0]} classes) left out")
        named |= {"fc.weight", "fc.bias"} & place.names.keys()
    notes += left_out(found, place, named)
    keys = source.content.keys() if isinstance(source.content, dict) else ()
    if any(isinstance(key, str) and key.startswith("optim") for key in keys):
        notes.append("optimizer state left out")
    return notes


def _converted(place: Place, wanted: list[str]) -> tuple[dict[str, Array], list[str]]:
    """The tensors in the order of `wanted`, float32 and int64, and what was done to them."""
    given, tensors, changed = place.tensors, {}, dict[str, int]()
    absent = 0
    for name in wanted:
        if name not in given:  # `check` lets counters alone be absent
            tensors[name] = np.zeros((), np.int64)
            absent += 1
            continue
        counter = name.endswith(COUNT_SUFFIX)
        tensors[name] = (_counter if counter else _float)(name, given[name])
        if given[name].dtype != ("int64" if counter else "float32"):
            said = f"{given[name].dtype}, converted to {'int64' if counter else 'float32'}"
            changed[said] = changed.get(said, 0) + 1
    notes = [f"{count} tensors were {said}" for said, count in changed.items()]
    if absent:
        notes.append("num_batches_tracked absent, written as 0")
    return tensors, notes


def _float(name: str, tensor: LazyTensor) -> Array:
    if tensor.dtype not in FLOATS:
        raise ValueError(f"holds `{name}` as {tensor.dtype}, which is not a plain floating type")
    with np.errstate(over="ignore"):  # looked for below
        array = np.require(tensor.numpy(), np.float32, ["C_CONTIGUOUS", "ALIGNED"])
    if not np.isfinite(array).all():
        raise ValueError(f"holds NaN or infinity in `{name}`")
    return array


def _counter(name: str, tensor: LazyTensor) -> Array:
    if tensor.dtype not in (*INTEGERS, *FLOATS):
        raise ValueError(f"holds `{name}` as {tensor.dtype}, which is not a number")
    value = float(tensor.numpy())
    if not 0 <= value < 2**53 or value != int(value):
        raise ValueError(f"holds `{name}` = {value:g}, which is not a count")
    return np.array(int(tensor.numpy()), np.int64)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
