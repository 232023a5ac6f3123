"""Finding one's way in an unpacked archive."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path

from jaxhisto.data.labelled import few
from jaxhisto.errors import StoreError

DEEPEST = 5  # folders below the one named that are searched
APPLE = "__MACOSX"
"""Where archives packed on macOS keep its attributes: the same folders, without the files."""


def find_folder(data: str, name: str, holds: Sequence[str]) -> Path:
    """The shallowest folder at or below `data` that is called `name` and has these folders in it.

    An empty name stands for any.

    Raises:
      StoreError: there is none, or two at one depth.
    """
    top = Path(data).expanduser()
    if not top.is_dir():
        fact = "is not a folder" if top.exists() else "does not exist"
        raise StoreError(f"{top}: {fact}; name the folder that the archive was unpacked to.")
    level = [top]
    for _ in range(DEEPEST + 1):
        found = [
            folder
            for folder in level
            if (not name or folder.absolute().name == name)
            and all((folder / inner).is_dir() for inner in holds)
        ]
        if len(found) > 1:
            raise StoreError(f"{found[0]} and {found[1]} both fit; name one of them.")
        if found:
            return found[0]
        level = [Path(entry.path) for folder in level for entry in _folders(folder)]
    called = f"no folder {name} with" if name else "no folder with"
    raise StoreError(
        f"{top}: {called} {', '.join(holds)} in it, up to {DEEPEST} folders deep; unpack the "
        "archive as it is published, or choose another --task.layout."
    )


def regex_groups(names: Sequence[str], pattern: str, what: str) -> tuple[str, ...]:
    """The group in each published name; StoreError where one does not have the published form."""
    expression = re.compile(pattern)
    found = [expression.search(name) for name in names]
    other = [n for n, match in zip(names, found, strict=True) if match is None]
    if other:
        raise StoreError(
            f"{other[0]}: its name does not tell {what} ({len(other):,} of {len(names):,} do not: "
            f"{few(other)}); keep the names as they were published."
        )
    return tuple(match[1] for match in found if match)


def count_note(here: int, published: int, what: str = "") -> tuple[str, ...]:
    """A line where fewer or more images are there than were published."""
    where = f"{what}: " if what else ""
    return (f"{where}published with {published:,} images, {here:,} here",) * (here != published)


def _folders(folder: Path) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            return sorted(
                (e for e in entries if e.is_dir() and e.name != APPLE and e.name[0] != "."),
                key=lambda entry: entry.name,
            )
    except OSError as error:
        raise StoreError(
            f"{folder}: cannot be listed ({error.strerror}); check its permissions."
        ) from error
