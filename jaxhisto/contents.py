"""contents.json: what a checkpoint holds, with a sum of every file; checked before any is read."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxhisto.errors import RunError

CONTENTS = "contents.json"
FORMAT = "jaxhisto-checkpoint-1"
SHOWN = 3  # tensors named where two lists of them differ


class Damaged(Exception):
    """A checkpoint is not what was written; the message is the fact."""


@dataclass(frozen=True)
class Contents:
    """What a checkpoint says that it holds.

    Fields:
      step: the step it was saved at.
      tensors: dtype and shape of each array, by dotted name.
      metadata: what `save_async` was given.
      files: size in bytes and sha256 of each file, by name relative to the checkpoint.
    """

    step: int
    tensors: dict[str, str]
    metadata: dict[str, Any]
    files: dict[str, tuple[int, str]]


def seal(checkpoint: Path, step: int, tensors: dict[str, str], metadata: dict[str, Any]) -> None:
    """Sums every file in a folder, writes contents.json, and returns when all is on the disk."""
    contents = Contents(step, tensors, metadata, _sums(checkpoint))
    fields = {"format": FORMAT, **vars(contents)}
    # With a sum over itself: this file too must be told from one that was changed.
    text = json.dumps({**fields, "sha256": _sum_of(fields)}, indent=1)
    with (checkpoint / CONTENTS).open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    sync_folder(checkpoint)


def check(checkpoint: Path) -> Contents:
    """The contents of a checkpoint, once each of its files is what was written.

    Raises:
      Damaged: it is not.
      RunError: it may not be read.
    """
    try:
        contents = _from_json((checkpoint / CONTENTS).read_bytes())
        if str(contents.step) != checkpoint.name:
            raise Damaged(f"it holds step {contents.step}")
        for name, (size, digest) in contents.files.items():
            found = (checkpoint / name).stat().st_size
            if found != size:
                raise Damaged(f"{name} has {found:,} bytes of {size:,}")
            if _sha256(checkpoint / name) != digest:
                raise Damaged(f"{name} is not the file that was written, its sha256 differs")
    except FileNotFoundError as error:
        absent = Path(str(error.filename)).relative_to(checkpoint)
        raise Damaged(f"{absent} is missing") from error
    except NotADirectoryError as error:
        raise Damaged("it is no folder") from error
    except PermissionError as error:
        raise RunError(
            f"{error.filename}: cannot be read ({error.strerror}); mend that and start again."
        ) from error
    except OSError as error:
        raise Damaged(f"a file of it cannot be read, {error.strerror}") from error
    return contents


def compare(
    path: Path,
    contents: Contents,
    names: Mapping[str, Any],
    metadata: Mapping[str, Any],
    partial: bool,
) -> None:
    """Refuses a sound checkpoint that belongs to another run, naming what differs."""
    for key, wanted in metadata.items():
        found = contents.metadata.get(key)
        if found != wanted:
            raise RunError(
                f"{path}: belongs to another run ({key} {str(found)[:12]}, here "
                f"{str(wanted)[:12]}); put the run's own checkpoints back, or give another --out."
            )
    ours = {name: describe(leaf) for name, leaf in names.items()}
    theirs = {n: t for n, t in contents.tensors.items() if not partial or n in ours}
    differing = [
        f"{name} is {theirs.get(name, 'absent')} there and {ours.get(name, 'absent')} here"
        for name in dict.fromkeys([*ours, *theirs])
        if ours.get(name) != theirs.get(name)
    ]
    if differing:
        more = f", and {len(differing) - SHOWN} more" if len(differing) > SHOWN else ""
        raise RunError(
            f"{path}: holds another model or optimizer ({'; '.join(differing[:SHOWN])}{more}); "
            "put the run's own checkpoints back, or give another --out."
        )


def describe(leaf: Any) -> str:
    """`float32[64, 3]` of anything with dtype and shape."""
    return f"{np.dtype(leaf.dtype).name}{list(leaf.shape)}"


def by_name(tree: Any) -> dict[str, Any]:
    """The leaves by dotted name, in the tree's order: what is on disk must outlive our classes."""
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {".".join(_name(key) for key in path): leaf for path, leaf in leaves}


def nested_dict(leaves: Mapping[str, Any]) -> dict[str, Any]:
    """Plain nested dicts of leaves by dotted name."""
    nested: dict[str, Any] = {}
    for name, leaf in leaves.items():
        *folders, last = name.split(".")
        place = nested
        for folder in folders:
            place = place.setdefault(folder, {})
        place[last] = leaf
    return nested


def flat_names(nested: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted name, leaf) of plain nested dicts: the reverse of `nested_dict`."""
    for key, value in nested.items():
        if isinstance(value, dict):
            yield from flat_names(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def sync_folder(path: Path) -> None:
    """Puts a folder's names on the disk: without, a power cut may undo a rename."""
    opened = os.open(path, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)


def _name(key: Any) -> str:
    for attribute in ("key", "name", "idx"):
        if hasattr(key, attribute):
            return str(getattr(key, attribute))
    return str(key)


def _from_json(text: bytes) -> Contents:
    try:
        fields = json.loads(text)
        digest = fields.pop("sha256")
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise Damaged(f"{CONTENTS} cannot be read") from error
    if digest != _sum_of(fields) or fields.pop("format", None) != FORMAT:
        raise Damaged(f"{CONTENTS} is not the file that was written")
    return Contents(**fields)


def _sum_of(fields: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()


def _sums(folder: Path) -> dict[str, tuple[int, str]]:
    """Size and sha256 of each file below a folder, all of them on the disk when it returns."""
    sums = {}
    for path in sorted(folder.rglob("*")):
        if path.is_dir():
            sync_folder(path)
        else:
            sums[path.relative_to(folder).as_posix()] = path.stat().st_size, _sha256(path, os.fsync)
    return sums


def _sha256(path: Path, also: Callable[[int], None] | None = None) -> str:
    with path.open("rb") as file:
        if also is not None:
            also(file.fileno())
        return hashlib.file_digest(file, "sha256").hexdigest()


def in_groups(names: Mapping[str, Any], size: int) -> Iterator[list[str]]:
    """The names, in groups of at most `size` bytes or of one larger array."""
    group, total = list[str](), 0
    for name, leaf in names.items():
        held = int(np.prod(leaf.shape)) * np.dtype(leaf.dtype).itemsize
        if group and total + held > size:
            yield group
            group, total = [], 0
        group.append(name)
        total += held
    yield group
