"""The pixel size of a slide, and where that number came from.

The ladder, first usable rung wins:

1. `openslide.mpp` what the scanner wrote, as OpenSlide reads it (Aperio, DICOM, MIRAX, ...)
2. `ome.PhysicalSize` the same from OME-XML, in whatever unit it is there
3. `aperio.MPP`    the same from the Aperio description, where OpenSlide gives none
4. `tiff-resolution` the TIFF resolution tags; OpenSlide's um/px of a generic TIFF is this too
5. `objective-power` 10 um/px divided by the magnification (40x is 0.25 um/px)
6. `mpp.csv`       a list that names this slide: it is more specific than a flag for all
7. `flag` or `assumed`: `--mpp`

The file's own statement wins over list and flag, but only if it is plausible: finite,
`PLAUSIBLE` um/px, x and y within `SQUARE` of each other (their mean is taken). TIFF resolution
must be finer still, because programs that know nothing write a printer's 72 to 1200 dpi there.
A statement that is passed over is told in `PixelSize.notes`.
"""

from __future__ import annotations

import csv
import functools
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from jaxhisto.errors import SlideError

SIDECAR = "mpp.csv"
PLAUSIBLE = (0.02, 100.0)  # um/px; from oil immersion to the overview of a whole slide
PLAUSIBLE_TIFF = (0.02, 10.0)  # um/px; 10 is 2540 dpi: coarser figures are print resolutions
SQUARE = 0.02  # largest relative difference of x and y that is still a square pixel
POWERS = (1.0, 150.0)  # objective magnifications that exist


@dataclass(frozen=True)
class GivenPixelSize:
    """What the user says of slides that do not state their pixel size.

    Args:
      mpp: um/px at level 0 for every such slide, or None.
      source: recorded with it: `flag`, or `assumed` for a guess.
      folders: where `mpp.csv` is looked for, nearest to the slide first.
    """

    mpp: float | None = None
    source: str = "flag"
    folders: tuple[Path, ...] = ()


@dataclass(frozen=True)
class PixelSize:
    """um/px at level 0, the rung it came from, and what was passed over."""

    mpp: float
    source: str
    notes: tuple[str, ...] = ()


def pixel_size(path: Path, properties: Mapping[str, str], given: GivenPixelSize) -> PixelSize:
    """Climbs the ladder for one slide.

    Args:
      path: of the slide, for messages and for the list.
      properties: OpenSlide's, or those of `tiff_reader`.

    Raises:
      SlideError: no usable figure anywhere, or a list or flag that is not a pixel size.
    """
    notes: list[str] = []
    for source, x, y, (low, high) in _stated(properties):
        if low <= x <= high and low <= y <= high and abs(x - y) <= SQUARE * max(x, y):
            return PixelSize((x + y) / 2, source, (*notes, *_unused(path, (x + y) / 2, given)))
        note = f"{source} states {x:g} x {y:g} um/px, which is not plausible"
        notes += [note] if note not in notes else []  # OpenSlide repeats a TIFF's own figures
    listed = _listed(path, given.folders)
    if listed is not None:
        return PixelSize(listed, SIDECAR, tuple(notes))
    if given.mpp is not None:
        return PixelSize(_plausible(given.mpp, "--mpp"), given.source, tuple(notes))
    why = f" ({'; '.join(notes)})" if notes else ""
    raise SlideError(
        f"{path}: the file has no usable pixel size{why} (looked at openslide.mpp-x, OME "
        f"PhysicalSizeX, aperio.MPP, TIFF resolution, objective power): pass --mpp 0.25 (um/px "
        f"at level 0) or list the slide in {SIDECAR} (columns slide,mpp)"
    )


def _stated(properties: Mapping[str, str]) -> Iterator[tuple[str, float, float, tuple[float, ...]]]:
    """(source, x, y, plausible range) of each statement in the file, best first."""
    x, y = _number(properties, "openslide.mpp-x"), _number(properties, "openslide.mpp-y")
    if x is not None and properties.get("openslide.vendor") == "generic-tiff":
        yield "tiff-resolution", x, x if y is None else y, PLAUSIBLE_TIFF
    elif x is not None:
        yield "openslide.mpp", x, x if y is None else y, PLAUSIBLE
    x, y = _number(properties, "ome.PhysicalSizeX"), _number(properties, "ome.PhysicalSizeY")
    if x is not None:
        yield "ome.PhysicalSize", x, x if y is None else y, PLAUSIBLE
    aperio = _number(properties, "aperio.MPP")
    if aperio is not None:
        yield "aperio.MPP", aperio, aperio, PLAUSIBLE
    unit = {"inch": 25400.0, "centimeter": 10000.0}.get(properties.get("tiff.ResolutionUnit", ""))
    x, y = _number(properties, "tiff.XResolution"), _number(properties, "tiff.YResolution")
    if unit and x and y:
        yield "tiff-resolution", unit / x, unit / y, PLAUSIBLE_TIFF
    power = _number(properties, "openslide.objective-power")
    if power is not None and POWERS[0] <= power <= POWERS[1]:
        yield "objective-power", 10 / power, 10 / power, PLAUSIBLE


def _number(properties: Mapping[str, str], key: str) -> float | None:
    """The property as a finite number, or None; files hold `0,25` and empty strings too."""
    try:
        value = float(properties[key].replace(",", "."))
    except (KeyError, ValueError):
        return None
    return value if math.isfinite(value) else None


def _unused(path: Path, stated: float, given: GivenPixelSize) -> tuple[str, ...]:
    """A note when the list names a slide that states another figure itself."""
    listed = _listed(path, given.folders)
    if listed is None or abs(listed - stated) <= SQUARE * stated:
        return ()
    return (f"{SIDECAR} says {listed:g} um/px; the file's own {stated:g} was taken",)


def _listed(path: Path, folders: tuple[Path, ...]) -> float | None:
    """um/px of the slide in the nearest `mpp.csv` that names it, by path below it or by name."""
    for folder in folders:
        sidecar = folder / SIDECAR
        if not sidecar.is_file():
            continue
        sizes = _read_sidecar(sidecar)
        relative = path.relative_to(folder).as_posix() if path.is_relative_to(folder) else path.name
        for name in (relative, path.name):
            if name in sizes:
                return sizes[name]
    return None


def _read_sidecar(path: Path) -> Mapping[str, float]:
    """Slide name -> um/px; raises SlideError naming the line that is wrong."""
    try:
        found = path.stat()
    except OSError as error:
        raise SlideError(f"{path}: cannot be read ({error.strerror}); check the path") from error
    return _read_version(path, found.st_size, found.st_mtime_ns)


@functools.lru_cache(maxsize=16)
def _read_version(path: Path, size: int, changed: int) -> Mapping[str, float]:
    """The list as it is now: read for each of 25 thousand slides, it would take an hour."""
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            rows = csv.DictReader(file)
            if not {"slide", "mpp"} <= set(rows.fieldnames or ()):
                raise SlideError(f"{path}: needs the columns slide,mpp in its first line")
            return {
                (row["slide"] or "").strip(): _plausible(row["mpp"], f"{path} line {rows.line_num}")
                for row in rows
            }
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise SlideError(f"{path}: cannot be read ({error}); write it as UTF-8 text") from error


def _plausible(value: float | str | None, where: str) -> float:
    """The number, if it can be the pixel size of a slide."""
    try:
        mpp = float(value or "")
    except ValueError:
        mpp = math.nan
    if not PLAUSIBLE[0] <= mpp <= PLAUSIBLE[1]:
        raise SlideError(
            f"{where}: {value!r} is not a pixel size; give um/px at level 0 between "
            f"{PLAUSIBLE[0]:g} and {PLAUSIBLE[1]:g}, such as 0.25"
        )
    return mpp
