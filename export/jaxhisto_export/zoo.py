"""Published encoders by name: where they are, how to know them, how to get them whole.

The registry is zoo.json. Nothing is downloaded but by `get` and `locate`, and nothing is handed
out whose size and SHA-256 are not those of the registry, unless that is asked for in words.
"""

from __future__ import annotations

import contextlib
import difflib
import errno
import hashlib
import importlib
import json
import logging
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from jaxhisto_export.download import Download, reason, say
from jaxhisto_export.errors import ExportFileError

CACHE_VARIABLE = "JAXHISTO_CACHE"


@dataclass(frozen=True)
class Entry:
    """One published file."""

    name: str
    architecture: str
    """A key of `architecture.ARCHITECTURES`."""
    title: str
    url: str
    bytes: int | None
    """Size of the file; None where nobody wrote it down."""
    sha256: str | None
    """Of the file, lower case; None where nobody wrote it down."""
    layout: str
    """`published`, or `Lightning`: the same state dict among pickled classes."""
    mean: tuple[float, float, float]
    """Subtracted from RGB in 0..1."""
    std: tuple[float, float, float]
    """Then divided by."""
    licence: str
    citation: str
    note: str

    @property
    def asset(self) -> str:
        """File name at the publisher's, and in a mirror."""
        return self.url.rpartition("/")[2]

    @property
    def cached(self) -> str:
        """File name in the cache: assets of two publishers may share theirs."""
        return self.name + Path(self.asset).suffix


@cache
def entries() -> tuple[Entry, ...]:
    """The registry, in its order."""
    text = Path(__file__).with_name("zoo.json").read_text(encoding="utf-8")
    return tuple(
        Entry(**{**row, "mean": tuple(row["mean"]), "std": tuple(row["std"])})
        for row in json.loads(text)["entries"]
    )


def find(name: str) -> Entry:
    """The entry of this name.

    Raises:
      ExportFileError: there is none; the sentence names the closest, or all.
    """
    for entry in entries():
        if entry.name == name:
            return entry
    raise ExportFileError(f"{name}: not a published encoder that is known here, {_advice(name)}.")


def known(sha256: str, size: int) -> Entry | None:
    """The entry whose file has this SHA-256 (hexadecimal) and this size in bytes, if any."""
    for entry in entries():
        if entry.sha256 is not None and (entry.sha256, entry.bytes) == (sha256.lower(), size):
            return entry
    return None


def table() -> str:
    """The registry as aligned lines for a person, with a line of headings."""
    rows = [("name", "architecture", "MB", "licence", "checked", "what it is")]
    for entry in entries():
        size = "?" if entry.bytes is None else f"{entry.bytes / 1e6:.1f}"
        checked = "SHA-256" if entry.sha256 else "no"
        rows.append((entry.name, entry.architecture, size, entry.licence, checked, entry.title))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    )


def locate(name_or_path: str) -> Path:
    """An existing file or folder of this name, else the zoo's file of this name (see `get`).

    Raises:
      ExportFileError: it is neither, or the download failed.
    """
    path = Path(name_or_path)
    if name_or_path and path.exists():
        return path
    if any(entry.name == name_or_path for entry in entries()):
        return get(name_or_path)
    raise ExportFileError(
        f"{name_or_path}: neither a file that is there nor a published encoder that is known "
        f"here, check the path, or {_advice(name_or_path)}."
    )


def get(name: str, source: str = "", folder: Path | None = None, unchecked: bool = False) -> Path:
    """The zoo's file of this name in the cache, downloaded if it is not there whole.

    A download that broke off goes on where it stopped, also in another process; several
    processes at once wait for one download. What is done is said on stderr.

    Args:
      name: of an entry.
      source: instead of the registry's address: a folder or http(s) address that holds the file
        under the publisher's file name, or the file itself.
      folder: of the cache; $JAXHISTO_CACHE or the system's cache folder if None.
      unchecked: take a file whose SHA-256 the registry does not know; nothing else is waived.

    Raises:
      ExportFileError: unknown name; no SHA-256 known and `unchecked` not set; the file cannot
        be had; what came has another size or SHA-256 (it is deleted).
    """
    entry = find(name)
    if entry.sha256 is None and not unchecked:
        raise ExportFileError(
            f"{name}: its size and SHA-256 are not known, so that a download cannot be checked, "
            "pass --unchecked to take it as it comes."
        )
    target = _cache_folder(folder) / entry.cached
    try:
        if _is_whole(target, entry):
            return target
        target.parent.mkdir(parents=True, exist_ok=True)
        with _locked(target.with_name(target.name + ".lock"), entry):
            if not _is_whole(target, entry):  # another process may have been faster
                _fetch(entry, source, target)
    except OSError as error:
        raise ExportFileError(
            f"{target}: cannot be written ({reason(error)}), make room or set "
            f"{CACHE_VARIABLE} to a folder of your own."
        ) from error
    return target


def _advice(name: str) -> str:
    names = [entry.name for entry in entries()]
    close = difflib.get_close_matches(name, names, n=1)
    return f"did you mean {close[0]}" if close else f"the encoders are {', '.join(names)}"


def _pooch() -> Any:
    try:
        return importlib.import_module("pooch")
    except ModuleNotFoundError as error:
        raise ExportFileError(
            f"{error.name} is not installed, which downloads encoders: pip install pooch"
        ) from error


def _cache_folder(folder: Path | None) -> Path:
    if folder is not None:
        return folder
    own = os.environ.get(CACHE_VARIABLE)
    return Path(own).expanduser() if own else Path(_pooch().os_cache("jaxhisto"))


def _is_whole(path: Path, entry: Entry) -> bool:
    """Whether the entry's file is there; one with other bytes is deleted, and that is said."""
    try:
        size = path.stat().st_size
        if entry.sha256 is None:
            wrong = size == 0
        else:
            wrong = size != entry.bytes or _sha256(path) != entry.sha256
    except FileNotFoundError:
        return False
    if wrong:
        path.unlink(missing_ok=True)
        say(f"{path}: not the bytes that were published, deleted")
    return not wrong


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextlib.contextmanager
def _locked(path: Path, entry: Entry) -> Iterator[None]:
    """Waits until no other process downloads this file.

    Where there are no such locks (Windows, some network disks) two processes may spoil each
    other's download; the SHA-256 then refuses it.
    """
    try:
        fcntl: Any = importlib.import_module("fcntl")
    except ModuleNotFoundError:
        yield
        return
    with path.open("ab") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say(f"{entry.name}: another process is downloading it, waiting")
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.ENOTSUP):
                raise
        yield  # the lock goes with the open file, also when the process is killed


def _fetch(entry: Entry, source: str, target: Path) -> None:
    """Puts the file there under its name, checked."""
    pooch = _pooch()
    path = _mirrored(entry, source)
    url = entry.url
    if source and path is None:
        base = source.rstrip("/")
        url = base if base.endswith("/" + entry.asset) else f"{base}/{entry.asset}"
    part = target.with_name(f"{target.name}.part")
    downloader = _Copy(path) if path else Download(entry.name, entry.asset, entry.bytes, part)
    logger = pooch.get_logger()
    level = logger.level
    logger.setLevel(logging.WARNING)  # it would say in two lines what is said here in one
    try:
        pooch.retrieve(url, entry.sha256, target.name, target.parent, downloader=downloader)
    except ValueError as error:  # pooch's word for another hash; it has deleted the file
        raise ExportFileError(
            f"{entry.name}: what came from {path or url} has not the published SHA-256 and was "
            "deleted, try again or give another place with --from."
        ) from error
    finally:
        logger.setLevel(level)
    checked = "as published" if entry.sha256 else f"{_sha256(target)}, checked against nothing"
    say(f"{entry.name}: {target}, {target.stat().st_size / 1e6:.1f} MB, SHA-256 {checked}")


def _mirrored(entry: Entry, source: str) -> Path | None:
    """The file that `source` names, None if `source` is empty or an address."""
    if not source or source.startswith(("http://", "https://")):
        return None
    given = Path(source).expanduser()
    for path in (given / entry.asset, given / entry.cached, given):
        if path.is_file():
            return path
    raise ExportFileError(
        f"{source}: holds no {entry.asset}, give a folder that does, the file itself or an "
        "address that begins with http:// or https://."
    )


@dataclass
class _Copy:
    """A downloader for pooch that copies a file."""

    path: Path

    def __call__(self, url: str, output_file: str, pooch: Any) -> None:
        try:
            shutil.copyfile(self.path, output_file)
        except PermissionError as error:
            raise ExportFileError(
                f"{self.path}: cannot be read ({reason(error)}), change its permissions."
            ) from error
