"""Files and folders that appear whole or not at all."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any

from jaxhisto_export.errors import ExportFileError

Writer = Callable[[IO[bytes]], Any]


def refuse_existing(paths: Iterable[Path], force: bool) -> None:
    """Refuses what is there already; a link that leads nowhere is there too.

    Raises:
      ExportFileError: one of them exists and `force` is not given.
    """
    for path in paths:
        if not force and os.path.lexists(path):
            raise ExportFileError(f"{path}: exists, pass --force to replace it.")


def replace_files(writers: Mapping[Path, Writer], stale: Iterable[Path] = ()) -> None:
    """Writes all under temporary names, removes `stale`, then renames in the mapping's order.

    Raises:
      ExportFileError: a file cannot be written; all are as they were.
    """
    temporary = {path: _beside(path, "tmp") for path in writers}
    path = next(iter(writers))
    try:
        for path, write in writers.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            write_file(temporary[path], write)
        for path in stale:
            path.unlink(missing_ok=True)
        for path in writers:
            os.replace(temporary[path], path)
    except (OSError, RuntimeError) as error:  # torch.save turns a full disk into RuntimeError
        raise _unwritable(path, error) from error
    finally:
        for leftover in temporary.values():
            with contextlib.suppress(OSError):  # the folder itself may be unreachable
                leftover.unlink(missing_ok=True)


@contextlib.contextmanager
def new_folder(target: Path, replaceable: Iterable[str] | None = None) -> Iterator[Path]:
    """A folder beside its place, for the body to fill, which is renamed there afterwards.

    Args:
      target: where it goes; a link to a folder is followed. A folder that is there is replaced
        as a whole, moved away first and deleted last.
      replaceable: names that an earlier folder may hold: one that holds others is not ours to
        delete. None: it may hold anything.

    Raises:
      ExportFileError: the earlier folder holds other things, or this one cannot be written; the
        earlier one is as it was.
    """
    target = target.resolve()
    folder, old = _beside(target, "tmp"), _beside(target, "old")
    try:
        if replaceable is not None and target.exists():
            _refuse_others(target, set(replaceable))
        folder.mkdir(parents=True)
        yield folder
        if target.exists():
            target.rename(old)
        try:
            folder.rename(target)
        except OSError:
            if old.exists():
                old.rename(target)
            raise
    except (OSError, RuntimeError) as error:  # see `replace_files`
        raise _unwritable(target, error) from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    shutil.rmtree(old, ignore_errors=True)


def _refuse_others(folder: Path, known: set[str]) -> None:
    others = sorted({entry.name for entry in folder.iterdir()} - known)
    if others:
        raise ExportFileError(
            f"{folder}: holds other things (`{others[0]}`), give the name of a new folder."
        )


def write_file(path: Path, write: Writer) -> None:
    """Writes and waits for the disk: a rename must not overtake the content."""
    with path.open("wb") as stream:
        write(stream)
        stream.flush()
        os.fsync(stream.fileno())


def _beside(path: Path, suffix: str) -> Path:
    return path.with_name(f".{path.name}.{os.getpid()}.{suffix}")


def _unwritable(path: Path, error: Exception) -> ExportFileError:
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return ExportFileError(
        f"{path}: cannot be written ({reason}), make room or name another place."
    )
