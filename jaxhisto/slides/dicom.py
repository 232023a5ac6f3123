"""What a DICOM file says of itself before its pixels: enough to name it where OpenSlide refuses it.

OpenSlide tells neither the series of a file that it cannot open nor what is odd about it: a series
of five files in a packing that it does not know would be five failures without a remedy.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from jaxhisto.special_files import no_pipe

PREAMBLE, MAGIC = 128, b"DICM"
WHOLE_SLIDE = "1.2.840.10008.5.1.4.1.1.77.1.6"  # VL Whole Slide Microscopy Image Storage
KINDS = {  # SOP classes that lie beside slides, PS3.4 B.5
    "1.2.840.10008.5.1.4.1.1.2": "CT",
    "1.2.840.10008.5.1.4.1.1.4": "MR",
    "1.2.840.10008.5.1.4.1.1.7": "secondary capture",
    "1.2.840.10008.5.1.4.1.1.66.4": "segmentation",
    "1.2.840.10008.5.1.4.1.1.77.1.2": "microscope photograph",
    "1.2.840.10008.5.1.4.1.1.88.34": "structured report",
    "1.2.840.10008.5.1.4.1.1.91.1": "annotations",
    "1.2.840.10008.1.3.10": "directory",
}
IMPLICIT = "1.2.840.10008.1.2"
ANOTHER = ("1.2.840.10008.1.2.1.99", "1.2.840.10008.1.2.2")  # deflated, big endian: not looked into
READ = (  # the transfer syntaxes of OpenSlide 4.0
    "1.2.840.10008.1.2.1",
    "1.2.840.10008.1.2.4.50",
    "1.2.840.10008.1.2.4.90",
    "1.2.840.10008.1.2.4.91",
)
PACKINGS = {  # other ones, PS3.6 A.1, by the end of their UID
    ".1.2": "implicit VR", ".1.2.1.99": "deflated", ".1.2.2": "big endian", ".1.2.5": "RLE",
    ".4.51": "12-bit JPEG", ".4.57": "lossless JPEG", ".4.70": "lossless JPEG",
    ".4.80": "JPEG-LS", ".4.81": "JPEG-LS", ".4.92": "JPEG 2000 part 2",
    ".4.93": "JPEG 2000 part 2", ".4.110": "JPEG XL", ".4.111": "JPEG XL", ".4.112": "JPEG XL",
    ".4.201": "HTJ2K", ".4.202": "HTJ2K", ".4.203": "HTJ2K",
}  # fmt: skip

META, SYNTAX, STORAGE, SERIES = 0x0002, (0x0002, 0x0010), (0x0002, 0x0002), (0x0020, 0x000E)
ITEM, ITEM_END, SEQUENCE_END = (0xFFFE, 0xE000), (0xFFFE, 0xE00D), (0xFFFE, 0xE0DD)
LONG = (b"OB", b"OD", b"OF", b"OL", b"OV", b"OW", b"SQ", b"SV", b"UC", b"UN", b"UR", b"UT", b"UV")
OPEN_END, MOST_UID, MOST_DEPTH = 0xFFFFFFFF, 64, 16

Tag = tuple[int, int]


@dataclass(frozen=True)
class DicomHeader:
    """UIDs of a DICOM file: of its kind (SOP class), its packing (transfer syntax) and its series,
    which is empty where it is not found."""

    storage: str
    syntax: str
    series: str

    def refusal(self) -> str:
        """Why OpenSlide does not read it, where the header says so: the end of a sentence."""
        if self.storage != WHOLE_SLIDE:
            kind = KINDS.get(self.storage, "another")
            return (
                f"is DICOM, but no whole slide: its SOP class is {self.storage} ({kind}); "
                "leave it out"
            )
        if self.syntax not in READ:
            named = (name for end, name in PACKINGS.items() if self.syntax.endswith(end))
            return (
                f"is packed as {next(named, 'something else')} (DICOM transfer syntax "
                f"{self.syntax}), which OpenSlide does not read; write it anew as JPEG, JPEG 2000 "
                "or uncompressed with explicit VR, or leave it out"
            )
        return ""


def dicom_header(path: Path) -> DicomHeader | None:
    """None: no DICOM file, or damaged before its kind is told."""
    try:
        with no_pipe(path).open("rb") as file:
            file.seek(PREAMBLE)
            if file.read(len(MAGIC)) != MAGIC:
                return None
            found = _Elements(file, explicit=True).until(SERIES, stop_after=META)
            syntax = found.get(SYNTAX, "")
            series = ""
            if syntax and syntax not in ANOTHER:
                body = _Elements(file, explicit=syntax != IMPLICIT)
                series = body.until(SERIES).get(SERIES, "")
            return DicomHeader(found.get(STORAGE, ""), syntax, series) if syntax else None
    except OSError:
        return None


class _Elements:
    """The elements of a little-endian data set from where the file stands (PS3.5, 7.1)."""

    def __init__(self, file: BinaryIO, explicit: bool) -> None:
        self._file, self._explicit = file, explicit

    def until(self, last: Tag, stop_after: int = 0xFFFF) -> dict[Tag, str]:
        """UIDs by tag, up to the tag `last`, or to the first group after `stop_after`.

        Elements are in ascending order; what is not a short text is skipped, and what is damaged
        ends the search.
        """
        found: dict[Tag, str] = {}
        while True:
            start = self._file.tell()
            if (head := self._head()) is None:
                return found
            tag, length = head
            if tag[0] > stop_after or tag > last:
                self._file.seek(start)
                return found
            if length == OPEN_END:
                if not self._skip_items(MOST_DEPTH):
                    return found
            elif length <= MOST_UID:
                found[tag] = self._file.read(length).decode("ascii", "replace").rstrip(" \0")
            else:
                self._file.seek(length, 1)

    def _head(self) -> tuple[Tag, int] | None:
        """Tag and length of the next element, the file behind both; None: at the end."""
        if len(data := self._file.read(8)) < 8:
            return None
        group, element = struct.unpack("<HH", data[:4])
        if not self._explicit or group == ITEM[0]:
            return (group, element), struct.unpack("<I", data[4:])[0]
        if data[4:6] not in LONG:
            return (group, element), struct.unpack("<H", data[6:])[0]
        if len(data := self._file.read(4)) < 4:
            return None
        return (group, element), struct.unpack("<I", data)[0]

    def _skip_items(self, depth: int) -> bool:
        """Past a sequence or an item of no stated length; False: damaged or too deep."""
        while depth and (head := self._head()):
            tag, length = head
            if tag in (ITEM_END, SEQUENCE_END):
                return True
            if length != OPEN_END:
                self._file.seek(length, 1)
            elif not self._skip_items(depth - 1):
                return False
        return False
