"""What a DICOM file says of itself before its pixels: enough to name it where OpenSlide refuses it.

OpenSlide tells neither the series of a file that it cannot open nor what is odd about it: a series
of five files in a packing that it does not know would be five failures without a remedy.
"""

from __future__ import annotations

import warnings
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

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
DEFLATED = "1.2.840.10008.1.2.1.99"  # the whole file would be unpacked for its series
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
    from pydicom import dcmread
    from pydicom.filereader import read_file_meta_info

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # odd values elsewhere in the header
        try:
            meta = read_file_meta_info(no_pipe(path))
        except Exception:  # of a damaged file pydicom raises what comes
            return None
        storage, syntax = (
            str(meta.get(name, "")) for name in ("MediaStorageSOPClassUID", "TransferSyntaxUID")
        )
        series = ""
        if syntax and syntax != DEFLATED:
            with suppress(Exception):
                told = dcmread(path, stop_before_pixels=True, specific_tags=["SeriesInstanceUID"])
                series = str(told.get("SeriesInstanceUID", ""))
    return DicomHeader(storage, syntax, series) if syntax else None
