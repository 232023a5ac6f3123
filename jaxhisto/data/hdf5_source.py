"""Patches in an HDF5 file, as PatchCamelyon (`x`) and CLAM (`imgs`) write them."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import numpy as np

from jaxhisto.config import DataConfig
from jaxhisto.data.image_source import ImageSource, Pixels
from jaxhisto.errors import StoreError

DATASETS = ("x", "imgs")
CHUNKS = 64 << 20  # bytes of unpacked chunks kept: opening reads patches in order, chunk by chunk


class Hdf5Source(ImageSource):
    """The patches of dataset `x` or `imgs`, (n, h, w, 3) uint8 RGB, in its order; named `x/17`.

    Read one by one when asked for. HDF5 lets one thread in at a time, so packed chunks are
    unpacked on one core; the file should be written with a patch a chunk, or unpacked.

    Raises:
      StoreError: h5py is missing, the file is damaged, or its dataset is another than that.
    """

    kind = "HDF5 file"

    def __init__(self, path: Path, config: DataConfig) -> None:
        try:
            h5py = importlib.import_module("h5py")
        except ImportError as error:
            raise StoreError(
                f"{path}: is an HDF5 file, which needs h5py; install it with "
                "`pip install 'jaxhisto[hdf5]'`."
            ) from error
        try:
            self._file = h5py.File(path, "r", rdcc_nbytes=CHUNKS)
            found = {key: self._file.get(key) for key in self._file}
        except (OSError, RuntimeError, KeyError) as error:
            raise StoreError(f"{path}: is no whole HDF5 file ({error}); copy it again.") from error
        name = next((key for key in DATASETS if key in found), "")
        self._data: Any = found.get(name)
        if not isinstance(self._data, h5py.Dataset) or not _are_patches(self._data):
            held = ", ".join(f"{key} {_shape(item)}" for key, item in found.items()) or "nothing"
            raise StoreError(
                f"{path}: needs a dataset {' or '.join(DATASETS)} of (n, h, w, 3) uint8 patches, "
                f"and holds {held[:300]}; write the patches so."
            )
        super().__init__(path, [f"{name}/{i}" for i in range(len(self._data))], config)

    def load(self, name: str) -> Pixels:
        try:
            return np.asarray(self._data[int(name.rpartition("/")[2])])
        except (RuntimeError, KeyError, ValueError) as error:  # h5py's, beside OSError
            raise OSError(str(error)) from error


def _are_patches(data: Any) -> bool:
    return bool(
        data.dtype == np.uint8 and data.ndim == 4 and data.shape[3] == 3 and min(data.shape) > 0
    )


def _shape(item: Any) -> str:
    shape, dtype = getattr(item, "shape", None), getattr(item, "dtype", None)
    return "(a group)" if shape is None else f"{shape} {dtype}"
