"""Whether two files, of whatever layouts, hold the same weights."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from jaxhisto_export.errors import ExportFileError
from jaxhisto_export.foreign import Imported, read_foreign
from jaxhisto_export.verify import VerifyResult
from jaxhisto_export.weights_file import SHOWN

HEAD = "fc."


def compare(path: Path, other: Path, result: VerifyResult) -> None:
    """Adds to `result` how `path` and `other` compare, tensor by tensor, bit by bit.

    Layouts may differ; a projection that only one of them has is said and is no problem.
    """
    try:
        ours, theirs = _whole(path), _whole(other)
        if ours is None or theirs is None:
            if ours or theirs:
                result.lines.append("note: only one of the files is a UNet, encoders are compared")
            ours, theirs = read_foreign(path), read_foreign(other)
    except ExportFileError as error:
        result.problems.append(str(error))
        return
    if ours.architecture != theirs.architecture:
        result.problems.append(
            f"{path} is a {ours.architecture.name}, {other} a {theirs.architecture.name}"
        )
        return
    _compare_tensors(ours, theirs, result)
    if ours.feeding and theirs.feeding:
        for name in ("mean", "std"):
            values = [tuple(map(float, getattr(f.feeding, name))) for f in (ours, theirs)]
            if values[0] != values[1]:
                result.problems.append(
                    f"{path} wants {name} {values[0]}, {other} {values[1]}: fed alike, one of "
                    "them gives wrong features"
                )


def _whole(path: Path) -> Imported | None:
    """The UNet in a file; none where there is another network, or a fault in it."""
    try:
        return read_foreign(path, part="unet")
    except ExportFileError:
        return None


def _compare_tensors(ours: Imported, theirs: Imported, result: VerifyResult) -> None:
    shared = [name for name in ours.tensors if name in theirs.tensors]
    differing = [name for name in shared if not _same(ours.tensors[name], theirs.tensors[name])]
    result.lines.append(
        f"against {theirs.path}: {len(shared) - len(differing)} of {len(shared)} shared tensors "
        f"equal bit for bit ({theirs.recognised})"
    )
    for name, has, lacks in (("first", ours, theirs), ("second", theirs, ours)):
        alone = [n for n in has.tensors if n not in lacks.tensors]
        if alone:
            what = (
                "its projection" if all(n.startswith(HEAD) for n in alone) else f"{alone[:SHOWN]}"
            )
            result.lines.append(f"note: only the {name} file holds {what}, {len(alone)} tensors")
    if differing:
        worst = max(differing, key=lambda n: _relative(ours.tensors[n], theirs.tensors[n]))
        result.problems.append(
            f"{len(differing)} of {len(shared)} tensors differ from {theirs.path}, the most "
            f"`{worst}`, by {_relative(ours.tensors[worst], theirs.tensors[worst]):.1e} of its norm"
        )


def _same(a: np.ndarray, b: np.ndarray) -> bool:
    """Bit for bit: a zero of the other sign is another tensor."""
    return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()


def _relative(a: np.ndarray, b: np.ndarray) -> float:
    """Norm of the difference over the norm; infinite for other shapes."""
    if a.shape != b.shape:
        return float("inf")
    norm = float(np.linalg.norm(b.astype(np.float64)))
    return float(np.linalg.norm(a.astype(np.float64) - b.astype(np.float64))) / (norm or 1.0)
