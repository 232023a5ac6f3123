"""Images in a zip or tar file, read where they lie; nothing is ever unpacked to disk.

The index is taken once on opening. A member is then one read at a known place, which any number
of threads do at once. Names are only names here: one with `..` in it leads nowhere.
"""

from __future__ import annotations

import bz2
import lzma
import os
import struct
import tarfile
import weakref
import zipfile
import zlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from jaxhisto.config import DataConfig
from jaxhisto.data.image_source import ImageSource, is_image, readable
from jaxhisto.data.images import SUFFIXES, ImageError
from jaxhisto.errors import StoreError

LOCAL_HEADER = struct.Struct("<4s22xHH")  # of a zip member; last the lengths of name and extra
ENCRYPTED = 0x1  # zip flag bit
MOST_BYTES = 1 << 30  # of one image file; more is no tile, and may be made to fill the memory
BLOCK = 512  # of tar
AGAIN = "copy the archive again"


@dataclass(frozen=True, slots=True)
class Member:
    """Where an image lies in the archive; `flaw` says why it cannot be had.

    Fields:
      offset: of the data in a tar, of the local header in a zip, bytes.
      packed, size: bytes in the archive and unpacked.
      method, crc: zip's.
    """

    name: str
    offset: int
    packed: int
    size: int
    method: int = zipfile.ZIP_STORED
    crc: int = 0
    flaw: str = ""
    remedy: str = ""


class ArchiveSource(ImageSource):
    """The images of an archive in the order of their names; suffixes and dot files as in folders.

    Raises:
      StoreError: damaged, cut off, without images, with two images of one name, or holding a
        tile store.
    """

    def __init__(self, path: Path, config: DataConfig) -> None:
        members = [m for m in self.members(path) if _is_seen(m.name)]
        count = Counter(member.name for member in members)
        for name, times in count.items():
            if times > 1:
                raise StoreError(
                    f"{path}: holds {times} images called {readable(name)}; pack it anew with each "
                    "once."
                )
        if not members:
            raise StoreError(
                f"{path}: no images ({', '.join(s[1:] for s in SUFFIXES)}) in this {self.kind}; "
                "check the path."
            )
        self._members = {member.name: member for member in members}
        self._fd = os.open(path, os.O_RDONLY)
        weakref.finalize(self, os.close, self._fd)
        super().__init__(path, sorted(self._members), config)

    def members(self, path: Path) -> list[Member]:
        """All files of the archive."""
        raise NotImplementedError

    def _at(self, offset: int, count: int) -> bytes:
        """Bytes of the archive; the position is given with each read, so threads share the file."""
        data = os.pread(self._fd, count, offset)
        if len(data) < count:
            raise ImageError("is cut off with the archive's end", AGAIN)
        return data

    def _whole(self, name: str) -> Member:
        member = self._members[name]
        if member.flaw:
            raise ImageError(member.flaw, member.remedy)
        if max(member.packed, member.size) > MOST_BYTES:
            raise ImageError(f"has {member.size:,} bytes", "take it out: no tile is so large")
        return member


class ZipSource(ArchiveSource):
    """A zip file; members stored, or packed with deflate, bzip2 or lzma."""

    kind = "zip file"

    def members(self, path: Path) -> list[Member]:
        try:
            with zipfile.ZipFile(path) as archive:
                infos = archive.infolist()
        # NotImplementedError: a later zip version; the others: a damaged directory.
        except (
            zipfile.BadZipFile, OSError, ValueError, NotImplementedError, struct.error,
        ) as error:  # fmt: skip
            raise StoreError(f"{path}: is no whole zip file ({error}); {AGAIN}.") from error
        return [
            Member(
                i.filename, i.header_offset, i.compress_size, i.file_size, i.compress_type, i.CRC,
                *(("is encrypted", "pack it anew without") if i.flag_bits & ENCRYPTED else ()),
            )
            for i in infos
            if not i.is_dir()
        ]  # fmt: skip

    def load(self, name: str) -> bytes:
        member = self._whole(name)
        magic, *lengths = LOCAL_HEADER.unpack(self._at(member.offset, LOCAL_HEADER.size))
        if magic != b"PK\3\4":
            raise ImageError("is not where the zip's directory says", AGAIN)
        packed = self._at(member.offset + LOCAL_HEADER.size + sum(lengths), member.packed)
        try:
            data = _unpacked(packed, member)
        except (zlib.error, lzma.LZMAError, OSError, EOFError, ValueError, struct.error) as error:
            raise ImageError(f"cannot be unpacked ({error})", AGAIN) from error
        if len(data) != member.size or zlib.crc32(data) != member.crc:
            raise ImageError("is damaged (its checksum differs)", AGAIN)
        return data


class TarSource(ArchiveSource):
    """A tar file that is not packed as a whole (`.tar.gz` has no place to start reading at)."""

    kind = "tar file"

    def members(self, path: Path) -> list[Member]:
        try:
            end = path.stat().st_size
            with tarfile.open(path, "r:") as archive:
                found = list(_tar_members(archive))
                tail = archive.offset  # where tarfile met a block of zeros, or gave up
            with path.open("rb") as file:
                file.seek(tail)
                closing = file.read(BLOCK)
        except (tarfile.TarError, OSError, ValueError) as error:
            raise StoreError(f"{path}: is no whole tar file ({error}); {AGAIN}.") from error
        # tarfile takes a file cut between two members, or in a header, for one that ends there.
        if closing != bytes(BLOCK) or any(m.offset + m.packed > end for m in found):
            raise StoreError(f"{path}: is cut off (its end mark is missing); {AGAIN}.")
        return found

    def load(self, name: str) -> bytes:
        member = self._whole(name)
        return self._at(member.offset, member.packed)


def _tar_members(archive: tarfile.TarFile) -> Iterator[Member]:
    for info in archive:
        # `tar cf FILE .` writes all names with ./ before them.
        place = info.name.removeprefix("./"), info.offset_data
        if info.issym() or info.islnk():
            yield Member(*place, 0, 0, flaw="is a link", remedy="pack it anew with `tar -h`")
        elif info.issparse():
            yield Member(*place, 0, 0, flaw="is a sparse file", remedy="pack it anew without -S")
        elif info.isreg():
            yield Member(*place, info.size, info.size)


def _unpacked(packed: bytes, member: Member) -> bytes:
    """At most one byte more than the size stated: what unpacks to more than it says is refused."""
    most = member.size + 1
    if member.method == zipfile.ZIP_STORED:
        return packed
    if member.method == zipfile.ZIP_DEFLATED:
        return zlib.decompressobj(-15).decompress(packed, most)
    if member.method == zipfile.ZIP_BZIP2:
        return bz2.BZ2Decompressor().decompress(packed, most)
    if member.method == zipfile.ZIP_LZMA:  # version, length of the properties, properties, data
        (length,) = struct.unpack_from("<2xH", packed)
        kind = lzma._decode_filter_properties(lzma.FILTER_LZMA1, packed[4 : 4 + length])  # type: ignore[attr-defined]
        unpacker = lzma.LZMADecompressor(lzma.FORMAT_RAW, filters=[kind])
        return unpacker.decompress(packed[4 + length :], most)
    raise ValueError(f"method {member.method}, where deflate, bzip2 and lzma are known")


def _is_seen(name: str) -> bool:
    """An image that no part of the name hides: dot files, and what macOS adds, are not seen."""
    parts = name.split("/")
    if ".array_record" in parts[-1]:
        raise StoreError(f"{name}: is part of a tile store in an archive; unpack the store.")
    hidden = any(p.startswith(".") and p not in (".", "..") for p in parts[:-1])
    return is_image(parts[-1]) and not hidden
