"""A slide as files: what it consists of, their hash, and whether they were changed."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

from jaxhisto.errors import SlideError
from jaxhisto.special_files import no_pipe


def content_hash(path: Path, others: Sequence[Path] = ()) -> str:
    """sha256 of the slide's bytes.

    A slide of several files is hashed as the sorted list of their names and hashes: those in
    `others` (the rest of a DICOM series) and MIRAX's data folder. A Hamamatsu .vms or .vmu is
    hashed by its index file alone.
    """
    files = _files(path, others)
    if len(files) == 1:
        return _file_hash(path)
    lines = "".join(f"{name} {_file_hash(file)}\n" for name, file in files)
    return hashlib.sha256(lines.encode()).hexdigest()


def file_stamp(path: Path, others: Sequence[Path] = ()) -> str:
    """What tells whether a slide was changed without reading it: name, size and time of change of
    each file that `content_hash` takes in."""
    try:
        stats = [(name, no_pipe(file).stat()) for name, file in _files(path, others)]
    except OSError as error:
        raise SlideError(f"{path}: cannot be read ({error.strerror}); check the path") from error
    lines = "".join(f"{name} {found.st_size} {found.st_mtime_ns}\n" for name, found in stats)
    return hashlib.sha256(lines.encode()).hexdigest()[:20]


def _files(path: Path, others: Sequence[Path]) -> list[tuple[str, Path]]:
    """The files of a slide, by name relative to its folder."""
    if path.suffix.lower() == ".mrxs" and path.with_suffix("").is_dir():
        others = [*others, *(p for p in path.with_suffix("").rglob("*") if p.is_file())]
    return sorted((p.relative_to(path.parent).as_posix(), p) for p in (path, *others))


def _file_hash(path: Path) -> str:
    try:
        with no_pipe(path).open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise SlideError(f"{path}: cannot be read ({error.strerror}); check the path") from error
