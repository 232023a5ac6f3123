"""DICOM whole slides for tests (PS3.3 A.32.8), written by pydicom: one file a level, one a label.

A frame is one tile, those at the right and lower edge filled up as scanners do; what lies beyond
the image is `BEYOND`, so that a reader that shows it is seen.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from pathlib import Path

import numpy as np
from pydicom.dataset import Dataset, FileDataset, FileMetaDataset
from pydicom.encaps import encapsulate
from pydicom.uid import (
    CTImageStorage,
    ExplicitVRLittleEndian,
    VLWholeSlideMicroscopyImageStorage,
    generate_uid,
)

BEYOND = (0, 255, 0)
VOLUME, REDUCED = "ORIGINAL\\PRIMARY\\VOLUME\\NONE", "DERIVED\\PRIMARY\\VOLUME\\RESAMPLED"
LABEL, OVERVIEW = "ORIGINAL\\PRIMARY\\LABEL\\NONE", "ORIGINAL\\PRIMARY\\OVERVIEW\\NONE"
THUMBNAIL = "DERIVED\\PRIMARY\\THUMBNAIL\\RESAMPLED"
FULL, SPARSE = "TILED_FULL", "TILED_SPARSE"

Encode = Callable[[np.ndarray], bytes]


def new_series(name: str) -> str:
    """A UID, the same for the same name."""
    return str(generate_uid(entropy_srcs=["series", name]))


def tiles_of(image: np.ndarray, side: int) -> list[np.ndarray]:
    """The frames of an image, row by row."""
    down, right = -image.shape[0] % side, -image.shape[1] % side
    whole = np.empty((image.shape[0] + down, image.shape[1] + right, 3), np.uint8)
    whole[:] = BEYOND
    whole[: image.shape[0], : image.shape[1]] = image
    return [
        np.ascontiguousarray(whole[y : y + side, x : x + side])
        for y in range(0, whole.shape[0], side)
        for x in range(0, whole.shape[1], side)
    ]


def write_dicom(
    path: Path,
    image: np.ndarray,
    series: str,
    mpp: float | tuple[float, float] = 0.5,
    kind: str = VOLUME,
    organization: str = FULL,
    side: int = 64,
    syntax: str = ExplicitVRLittleEndian,
    encode: Encode | None = None,
    photometric: str = "RGB",
    left_out: Collection[int] = (),
) -> Path:
    """One file of a series.

    Args:
      image: (h, w, 3) uint8.
      mpp: um/px, or those in x and in y.
      encode: a frame's bytes in `syntax`; None: as they are.
      left_out: numbers of tiles that the file does not hold; of TILED_SPARSE alone.
    """
    every = tiles_of(image, side)
    numbers = [i for i in range(len(every)) if i not in left_out]
    frames = [every[i] for i in numbers]
    data = _instance(VLWholeSlideMicroscopyImageStorage, syntax, series, path.name)
    data.Modality, data.ImageType = "SM", kind
    data.TotalPixelMatrixRows, data.TotalPixelMatrixColumns = image.shape[:2]
    data.TotalPixelMatrixFocalPlanes = data.NumberOfOpticalPaths = 1
    data.DimensionOrganizationType = organization
    data.NumberOfFrames, data.Rows, data.Columns = len(frames), side, side
    x, y = mpp if isinstance(mpp, tuple) else (mpp, mpp)
    measures, shared = Dataset(), Dataset()
    measures.PixelSpacing = [f"{y / 1000:.10g}", f"{x / 1000:.10g}"]  # rows first, mm
    measures.SliceThickness = "0.001"
    shared.PixelMeasuresSequence = [measures]
    data.SharedFunctionalGroupsSequence = [shared]
    if organization == SPARSE:
        across = -(-image.shape[1] // side)
        places = [(i % across * side + 1, i // across * side + 1) for i in numbers]
        data.PerFrameFunctionalGroupsSequence = [_place(*place) for place in places]
    _set_pixels(data, frames, encode, photometric)
    data.save_as(path, enforce_file_format=True)
    return path


def write_ct(path: Path) -> Path:
    """A DICOM file that is no slide: one grey slice of 16 bits."""
    data = _instance(CTImageStorage, ExplicitVRLittleEndian, new_series("ct"), path.name)
    data.Modality, data.ImageType = "CT", "ORIGINAL\\PRIMARY\\AXIAL"
    data.Rows = data.Columns = 64
    data.SamplesPerPixel, data.PhotometricInterpretation = 1, "MONOCHROME2"
    data.BitsAllocated, data.BitsStored, data.HighBit, data.PixelRepresentation = 16, 16, 15, 0
    data.PixelData = np.arange(64 * 64, dtype=np.uint16).tobytes()
    data["PixelData"].VR = "OW"
    data.save_as(path, enforce_file_format=True)
    return path


def _instance(storage: str, syntax: str, series: str, name: str) -> FileDataset:
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID, meta.TransferSyntaxUID = storage, syntax
    meta.MediaStorageSOPInstanceUID = generate_uid(entropy_srcs=[series, name])
    data = FileDataset(name, {}, preamble=bytes(128), file_meta=meta)
    data.SOPClassUID, data.SOPInstanceUID = storage, meta.MediaStorageSOPInstanceUID
    data.StudyInstanceUID = generate_uid(entropy_srcs=["study", series])
    data.SeriesInstanceUID, data.FrameOfReferenceUID = series, series
    other = Dataset()  # series that a file refers to come before its own
    other.SeriesInstanceUID = new_series("another")
    data.ReferencedSeriesSequence = [other]
    data["ReferencedSeriesSequence"].is_undefined_length = True
    other.is_undefined_length_sequence_item = True
    data.PatientName, data.PatientID, data.InstanceNumber = "Made^Up", "1", "1"
    return data


def _place(column: int, row: int) -> Dataset:
    """Where a frame lies in the whole image, counted from 1."""
    place, group = Dataset(), Dataset()
    place.ColumnPositionInTotalImagePixelMatrix = column
    place.RowPositionInTotalImagePixelMatrix = row
    group.PlanePositionSlideSequence = [place]
    return group


def _set_pixels(
    data: Dataset, frames: Sequence[np.ndarray], encode: Encode | None, photometric: str
) -> None:
    data.SamplesPerPixel, data.PhotometricInterpretation = 3, photometric
    data.PlanarConfiguration = data.PixelRepresentation = 0
    data.BitsAllocated, data.BitsStored, data.HighBit = 8, 8, 7
    if encode is None:
        data.PixelData = b"".join(frame.tobytes() for frame in frames)
        data["PixelData"].VR = "OB"
    else:
        data.PixelData = encapsulate([encode(frame) for frame in frames])
        data["PixelData"].VR = "OB"
        data["PixelData"].is_undefined_length = True
