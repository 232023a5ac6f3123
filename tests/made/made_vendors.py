"""TIFFs with the tags and XML by which OpenSlide knows Leica, Philips, Trestle and Ventana files.

Two levels each, as far as OpenSlide looks at them: no scanner wrote these. Tiles of 256 px are
packed without loss, where scanners write JPEG, so that pixels can be compared exactly.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import tifffile

TILE = 256
HOW = {"tile": (TILE, TILE), "photometric": "rgb", "compression": "zlib", "metadata": None}


def write_trestle(path: Path, image: np.ndarray, mpp: float) -> Path:
    """um/px stand in the resolution tags, without a unit."""
    said = "Background Color = FFFFFF;White Balance = 0;Objective Power = 20;OverlapsXY = 0 0 0 0"
    with tifffile.TiffWriter(path) as tiff:
        for step in (1, 2):
            tiff.write(
                _reduced(image, step), description=said, software="MedScan",
                resolution=(mpp * step, mpp * step), resolutionunit="NONE", **HOW,
            )  # fmt: skip
    return path


def write_leica(
    path: Path, image: np.ndarray, mpp: float, at: tuple[int, int], slide: tuple[int, int]
) -> Path:
    """The image at `at` (x, y) in a glass slide of `slide` (w, h) px, else empty; and a macro."""
    height, width = image.shape[:2]
    nm = mpp * 1000
    macro = np.full((512, TILE, 3), 240, np.uint8)

    def described(name: str, levels: list[tuple[int, int]], first: int, box: tuple[float, ...]):
        dimensions = "".join(
            f'<dimension sizeX="{w}" sizeY="{h}" r="{r}" ifd="{first + r}"/>'
            for r, (w, h) in enumerate(levels)
        )
        w, h, x, y = (round(side) for side in box)
        return (
            f'<image name="{name}" uuid="{name}"><creationDate>2020-01-01T00:00:00Z</creationDate>'
            '<device model="Leica SCN400" version="1"/>'
            f'<pixels sizeX="{levels[0][0]}" sizeY="{levels[0][1]}">{dimensions}</pixels>'
            f'<view sizeX="{w}" sizeY="{h}" offsetX="{x}" offsetY="{y}" spacingZ="0"/>'
            "<scanSettings><objectiveSettings><objective>20</objective></objectiveSettings>"
            "<illuminationSettings><illuminationSource>brightfield</illuminationSource>"
            "</illuminationSettings></scanSettings></image>"
        )

    whole = slide[0] * nm, slide[1] * nm
    levels = [(width, height), (width // 4, height // 4)]
    place = (width * nm, height * nm, at[0] * nm, at[1] * nm)
    xml = (
        '<?xml version="1.0"?><scn xmlns="http://www.leica-microsystems.com/scn/2010/10/01">'
        f'<collection name="c" uuid="u" sizeX="{whole[0]:.0f}" sizeY="{whole[1]:.0f}">'
        + described("macro", [(TILE, 512)], 2, (*whole, 0, 0))
        + described("main", levels, 0, place)
        + "</collection></scn>"
    )
    with tifffile.TiffWriter(path, bigtiff=True) as tiff:
        for page, step in ((image, 1), (image, 4), (macro, 1)):
            per_cm = 1e4 / mpp / step
            tiff.write(
                _reduced(page, step), description=xml, resolution=(per_cm, per_cm),
                resolutionunit="CENTIMETER", **HOW,
            )  # fmt: skip
            xml = ""
    return path


def write_philips(path: Path, image: np.ndarray, mpp: float) -> Path:
    """Levels are filled up to whole tiles; the XML says how much of them is the image."""
    height, width = image.shape[:2]

    def spacing(step: int) -> str:
        one = f"&quot;{mpp * step / 1000:.8f}&quot;"
        return f'<Attribute Name="DICOM_PIXEL_SPACING" PMSVR="IDoubleArray">{one} {one}</Attribute>'

    items = "".join(
        f'<DataObject ObjectType="PixelDataRepresentation">{spacing(step)}'
        f'<Attribute Name="PIIM_PIXEL_DATA_REPRESENTATION_NUMBER">{level}</Attribute>'
        f'<Attribute Name="PIIM_PIXEL_DATA_REPRESENTATION_COLUMNS">{width // step}</Attribute>'
        f'<Attribute Name="PIIM_PIXEL_DATA_REPRESENTATION_ROWS">{height // step}</Attribute>'
        "</DataObject>"
        for level, step in enumerate((1, 2))
    )
    xml = (
        '<?xml version="1.0" encoding="UTF-8" ?><DataObject ObjectType="DPUfsImport">'
        '<Attribute Name="DICOM_MANUFACTURER">PHILIPS</Attribute>'
        '<Attribute Name="PIM_DP_SCANNED_IMAGES"><Array><DataObject ObjectType="DPScannedImage">'
        f'<Attribute Name="PIM_DP_IMAGE_TYPE">WSI</Attribute>{spacing(1)}'
        f'<Attribute Name="PIIM_PIXEL_DATA_REPRESENTATION_SEQUENCE"><Array>{items}</Array>'
        "</Attribute></DataObject></Array></Attribute></DataObject>"
    )
    with tifffile.TiffWriter(path, bigtiff=True) as tiff:
        for step in (1, 2):
            page = _reduced(image, step)
            page = np.pad(page, [(0, -side % TILE) for side in page.shape[:2]] + [(0, 0)])
            tiff.write(page, description=xml, software="Philips DP v1.0",
                       subfiletype=int(step > 1), **HOW)  # fmt: skip
            xml = ""
    return path


def write_ventana(path: Path, image: np.ndarray, mpp: float) -> Path:
    """Tiles are numbered from the lower left, every other row backwards, and do not overlap."""
    rows, columns = image.shape[0] // TILE, image.shape[1] // TILE
    scanned = f'<iScan ScanRes="{mpp}" Magnification="40" Z-layers="1" ScannerModel="VENTANA"/>'

    def number(column: int, row: int) -> int:
        up = rows - 1 - row
        return up * columns + (columns - 1 - column if up % 2 else column) + 1

    def joint(direction: str, one: int, two: int) -> str:
        return (
            f'<TileJointInfo FlagJoined="1" Confidence="100" Direction="{direction}" '
            f'Tile1="{one}" Tile2="{two}" OverlapX="0" OverlapY="0"/>'
        )

    joints = [
        joint("RIGHT", number(c, r), number(c + 1, r))
        for r in range(rows)
        for c in range(columns - 1)
    ] + [
        joint("UP", number(c, r + 1), number(c, r)) for r in range(rows - 1) for c in range(columns)
    ]
    encoded = (
        f'<EncodeInfo Ver="2"><SlideInfo><AoiInfo XIMAGESIZE="{TILE}" YIMAGESIZE="{TILE}" '
        f'NUM-COLS="{columns}" NUM-ROWS="{rows}" Pos-X="0" Pos-Y="0"/></SlideInfo><SlideStitchInfo>'
        f'<ImageInfo AOIScanned="1" AOIIndex="0" NumRows="{rows}" NumCols="{columns}" '
        f'Width="{TILE}" Height="{TILE}" Pos-X="0" Pos-Y="0">{"".join(joints)}</ImageInfo>'
        '</SlideStitchInfo><AoiOrigin><AOI0 OriginX="0" OriginY="0"/></AoiOrigin></EncodeInfo>'
    )

    def xmp(text: str) -> list[tuple[int, int, int, bytes, bool]]:
        return [(700, 1, len(text), text.encode(), True)]

    with tifffile.TiffWriter(path, bigtiff=True) as tiff:
        label = np.full((64, 64, 3), 240, np.uint8)
        tiff.write(label, photometric="rgb", metadata=None, description="Label_Image",
                   extratags=xmp(scanned))  # fmt: skip
        for level, step in enumerate((1, 2)):
            tiff.write(
                _reduced(image, step), description=f"level={level} mag={40 / step:g} quality=95",
                extratags=[] if level else xmp(encoded), **HOW,
            )  # fmt: skip
    return path


def _reduced(image: np.ndarray, step: int) -> np.ndarray:
    return np.ascontiguousarray(image[::step, ::step])
