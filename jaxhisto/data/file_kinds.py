"""Which source a path is that is no folder: told by how the file starts, by its name for CSV."""

from __future__ import annotations

import os
from pathlib import Path

from jaxhisto.config import DataConfig
from jaxhisto.data.archive_source import TarSource, ZipSource
from jaxhisto.data.csv_source import CsvSource
from jaxhisto.data.hdf5_source import Hdf5Source
from jaxhisto.data.image_source import ImageSource
from jaxhisto.data.tfds_source import PREFIX, TfdsSource
from jaxhisto.errors import StoreError
from jaxhisto.special_files import no_pipe

ZIP = (b"PK\3\4", b"PK\5\6")  # the second is an empty one
HDF5 = b"\x89HDF\r\n\x1a\n"
HDF5_AT = (0, 512, 1024, 2048)  # after a user block, whose size is a power of two
USTAR, USTAR_AT = b"ustar", 257
STREAMS = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ\0": "xz", b"\x28\xb5\x2f\xfd": "zstd"}
START = 2056  # bytes that hold all of these


def opened(path: Path, config: DataConfig) -> ImageSource:
    """The source at a path that is no folder.

    Raises:
      StoreError: not there, not readable, none of the kinds, or not whole.
    """
    if str(path).startswith(PREFIX):
        return TfdsSource(path, config)
    if not os.path.exists(path):
        raise StoreError(f"{path}: does not exist; pass a tile store or a folder of images.")
    try:
        with no_pipe(path).open("rb") as file:
            start = file.read(START)
    except OSError as error:
        raise StoreError(
            f"{path}: cannot be read ({error.strerror}); check its permissions."
        ) from error
    suffix = path.suffix.lower()
    if start.startswith(ZIP):
        return ZipSource(path, config)
    if any(start[at : at + len(HDF5)] == HDF5 for at in HDF5_AT):
        return Hdf5Source(path, config)
    if start[USTAR_AT : USTAR_AT + len(USTAR)] == USTAR or suffix == ".tar":
        return TarSource(path, config)
    for magic, name in STREAMS.items():
        if start.startswith(magic):
            raise StoreError(
                f"{path}: is packed as one {name} stream, of which no image can be read alone; "
                "unpack it to a plain tar or a folder, or pack the images as zip."
            )
    if suffix == ".csv":
        return CsvSource(path, config)
    if suffix in (".zip", ".h5", ".hdf5"):
        raise StoreError(f"{path}: does not start as a {suffix} file does; copy it again.")
    raise StoreError(
        f"{path}: is not a folder, nor a zip, tar, HDF5 or CSV file; pass a tile store or a folder "
        "of images."
    )
