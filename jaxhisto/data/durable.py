"""Files that are whole or not there: a temporary name, the disk's word for it, then a rename."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from jaxhisto.data.store import UNFINISHED
from jaxhisto.errors import StoreError


def write_file(store: Path, file: Path, text: str, durable: bool = True) -> None:
    """Writes text under a temporary name and renames it; StoreError if the disk refuses.

    Args:
      store: whose file it is, for messages.
      file: to write; its folder is made.
      text: of it.
      durable: wait until it would survive a loss of power.
    """
    with writing(store):
        # There, since that is where a stopped run's are looked for.
        temporary = temporary_name(store / UNFINISHED / file.name)
        for folder in (file.parent, temporary.parent):
            folder.mkdir(parents=True, exist_ok=True)
        try:
            temporary.write_text(text, encoding="utf-8")
            if durable:
                settle(temporary, file)
            else:
                os.replace(temporary, file)
        finally:
            with suppress(OSError):
                temporary.unlink(missing_ok=True)


def temporary_name(file: Path) -> Path:
    """A name beside the file that no other process takes, on whatever host."""
    return file.with_name(f"{file.name}.{secrets.token_hex(4)}.tmp")


def settle(temporary: Path, file: Path) -> None:
    """Renames a written file once its bytes, and then its name, are on the disk."""
    sync(temporary)
    os.replace(temporary, file)
    sync(file.parent)


def sync(path: Path) -> None:
    """Returns when a file's bytes, or a folder's names, would survive a loss of power."""
    opened = os.open(path, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)


@contextmanager
def writing(store: Path) -> Iterator[None]:
    """Turns what the disk refuses into a StoreError with a remedy."""
    try:
        yield
    except (OSError, RuntimeError) as error:  # ArrayRecord reports a full disk as RuntimeError
        why = error.strerror if isinstance(error, OSError) else str(error).split(";")[0]
        raise StoreError(
            f"{store}: cannot be written ({why}); free space or rights there and run the same "
            "command again, or choose another --out"
        ) from error
