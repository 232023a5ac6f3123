"""The images below a folder."""

from __future__ import annotations

import os
from pathlib import Path

from jaxhisto.config import DataConfig
from jaxhisto.data.image_source import ImageSource, is_image
from jaxhisto.data.images import SUFFIXES
from jaxhisto.data.store import MANIFEST, UNFINISHED
from jaxhisto.errors import StoreError
from jaxhisto.special_files import no_pipe


class FolderSource(ImageSource):
    """The images below a folder, in the order of their names; folders of labels are only names."""

    kind = "folder"

    def __init__(self, path: Path, config: DataConfig) -> None:
        super().__init__(path, image_names(path), config)

    def load(self, name: str) -> bytes:
        return no_pipe(self.path / name).read_bytes()

    def place(self, name: str) -> str:
        return str(self.path / name)


def image_names(folder: Path) -> list[str]:
    """Names of the images below a folder, sorted, with / between parts; dot files are not seen.

    A tile store in there, whole or not, is refused: its report holds pictures, which are no tiles.
    """
    names, seen = [], set()
    for root, dirs, files in os.walk(folder, onerror=_cannot_list, followlinks=True):
        real = os.path.realpath(root)
        if real in seen:  # a link back to where the walk has been
            dirs.clear()
            continue
        seen.add(real)
        dirs[:] = sorted(d for d in dirs if not d.startswith("."))
        if UNFINISHED in dirs and _is_tiling(Path(root, UNFINISHED)):
            raise StoreError(f"{root}: tiling was stopped; run the same `jaxhisto tile` again.")
        if any(".array_record" in name for name in files):
            raise StoreError(
                f"{root}: is a tile store inside an image folder, or one without its {MANIFEST}; "
                "list finished stores by their own path."
            )
        inside = Path(root).relative_to(folder)
        names += [(inside / f).as_posix() for f in files if is_image(f)]
    if not names:
        raise StoreError(
            f"{folder}: no images ({', '.join(s[1:] for s in SUFFIXES)}) and no tile store in "
            "here; check the path, and cut slides with `jaxhisto tile`."
        )
    return sorted(names)


def _is_tiling(folder: Path) -> bool:
    return (folder / "settings.json").exists() or any(folder.glob("*.array_record"))


def _cannot_list(error: OSError) -> None:
    raise StoreError(
        f"{error.filename}: cannot be listed ({error.strerror}); check its permissions."
    )
