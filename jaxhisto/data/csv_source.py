"""Images that a CSV file lists."""

from __future__ import annotations

import csv
import math
from collections.abc import Iterable
from pathlib import Path

from jaxhisto.config import DataConfig
from jaxhisto.data.image_source import ImageSource, matches
from jaxhisto.errors import StoreError
from jaxhisto.special_files import no_pipe

PATHS = ("path", "file", "image", "filename", "file_path", "image_path")


class CsvSource(ImageSource):
    """The images of a CSV file in its order, by the paths in it, relative to the file.

    The header names a column of paths (one of `PATHS`); `mpp` (um/px), `dataset` and `slide` may
    follow, others are not looked at. `exclude` patterns match paths, slides and datasets. Paths
    stand in the hash as they are written.

    Raises:
      StoreError: not UTF-8, no column of paths, a row without one or with one given before, an
        mpp that is no number above 0; and as for folders: a missing file is an unusable image.
    """

    kind = "list"

    def __init__(self, path: Path, config: DataConfig) -> None:
        self._rows = _rows(path)
        super().__init__(path, list(self._rows), config)

    def load(self, name: str) -> bytes:
        return no_pipe(self.path.parent / name).read_bytes()

    def place(self, name: str) -> str:
        return str(self.path.parent / name)

    def excluded_by(self, name: str, patterns: Iterable[str]) -> set[str]:
        row = self._rows[name]
        also = (row.get("slide"), row.get("dataset"))
        return matches(name, patterns).union(*(matches(text, patterns) for text in also if text))

    def mpp_range(self) -> tuple[float, float] | None:
        known = [float(mpp) for im in self.images if (mpp := self._rows[im.name].get("mpp"))]
        return (min(known), max(known)) if known else None


def _rows(path: Path) -> dict[str, dict[str, str]]:
    """Path -> row, all without surrounding spaces."""
    try:
        with no_pipe(path).open(newline="", encoding="utf-8-sig") as file:
            table = csv.DictReader(file, restval="")
            column = _column(path, table.fieldnames or ())
            rows: dict[str, dict[str, str]] = {}
            for number, row in enumerate(table, 2):
                row.pop(None, None)  # cells beyond the header
                clean = {key: text.strip() for key, text in row.items()}
                name, where = clean[column], f"{path} row {number}"
                if not name or "\0" in name:
                    raise StoreError(f"{where}: has no {column}; complete it, or take it out.")
                if name in rows:
                    raise StoreError(f"{where}: lists {name} a second time; take one out.")
                _check_mpp(clean.get("mpp", ""), where)
                rows[name] = clean
    except (UnicodeDecodeError, csv.Error) as error:
        raise StoreError(f"{path}: cannot be read ({error}); save it as UTF-8 text.") from error
    except OSError as error:
        raise StoreError(f"{path}: cannot be read ({error.strerror}); check the path.") from error
    if not rows:
        raise StoreError(f"{path}: lists no image; check the file.")
    return rows


def _column(path: Path, header: Iterable[str]) -> str:
    for name in PATHS:
        if name in header:
            return name
    raise StoreError(
        f"{path}: has no column of paths ({', '.join(PATHS)}) but {', '.join(header) or 'none'}; "
        "name it so in the first line, commas between columns."
    )


def _check_mpp(text: str, where: str) -> None:
    try:
        good = not text or 0 < float(text) < math.inf
    except ValueError:
        good = False
    if not good:
        raise StoreError(f"{where}: {text!r} is no um/px; write a number such as 0.5, or nothing.")
