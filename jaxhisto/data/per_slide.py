"""A file of features a slide, of one with many slides."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from jaxhisto.data.features import Features, Floats, need_h5py, unwritable, write_hdf5
from jaxhisto.errors import StoreError


def write_per_slide(found: Features, folder: Path | str) -> list[Path]:
    """Writes FOLDER/SLIDE.h5 for each slide; images that are of none stay out.

    Raises:
      StoreError: no slides, two that would share a file, or one cannot be written.
    """
    of: dict[str, list[int]] = {}
    for row, slide in enumerate(found.slides):
        if slide:
            of.setdefault(slide, []).append(row)
    if not of:
        raise StoreError(f"{found.path}: has tiles of no slide; leave --per-slide out.")
    files: dict[Path, str] = {}
    for slide in of:
        file = Path(folder) / f"{Path(slide).with_suffix('')}.h5"
        if file in files:
            raise StoreError(
                f"{file}: would hold both {files[file]} and {slide}; rename one, or leave "
                "--per-slide out."
            )
        files[file] = slide
    h5py = need_h5py(found.path)
    for file, slide in files.items():
        rows = of[slide]

        def read(at: NDArray[np.int64], rows: list[int] = rows) -> tuple[Floats, NDArray[np.int64]]:
            index = np.asarray(rows)[at]
            # HDF5 is quick at spans, not at lists of rows.
            span = found.read(int(index.min()), int(index.max()) + 1)
            return span[index - index.min()], found.coords[index]

        temporary = file.with_name(f".{file.name}.{os.getpid()}")
        told = [found.names[i] for i in rows], [slide] * len(rows), found.spans[rows]
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            write_hdf5(
                h5py, temporary, found.width, read, *told, found.attributes | {"slide": slide}
            )
            os.replace(temporary, file)
        except OSError as error:
            temporary.unlink(missing_ok=True)
            raise unwritable(file, error) from error
    return list(files)
