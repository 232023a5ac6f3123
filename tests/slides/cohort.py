"""A cohort of made slides, some broken in each way that real ones are, of which all is known.

A slide is glass with one rectangle of tissue painted on the tile grid: what can be cut of it
follows from four numbers here, not from the code under test. JPEG-tiled pyramids, 15 ms each; run
as a script it makes a cohort and prints what should come of it:

    python tests/slides/cohort.py FOLDER 2000
"""

from __future__ import annotations

import itertools
import os
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import cv2
import numpy as np
import tifffile
from made_slides import GLASS, PINK, spoil

TILE = 64  # px, side of a tile at level 0
MAX_TILES = 20  # of a slide; some hold more
FLAGS = ("--tile-px", str(TILE), "--max-tiles", str(MAX_TILES))
DATASETS = ("TCGA-BRCA", "größe 厚み", "c", "d" * 100)
APERIO = "Aperio Image Library v1\r\n{}x{} |AppMag = 20|MPP = 0.5"


@dataclass(frozen=True)
class Expected:
    """What must become of a slide: its counts, or what the reason of its failure must say."""

    tiles: int = 0
    rejected: dict[str, int] = field(default_factory=dict)
    reason: str = ""
    kind: str = ""


@dataclass(frozen=True)
class Plan:
    """Size in px, the tissue's cells (left, top, across, down), um/px, levels."""

    width: int
    height: int
    tissue: tuple[int, int, int, int]
    mpp: float = 0.5
    levels: int = 2

    def expected(self, unreadable: int = 0) -> Expected:
        """Counted by hand: the grid's cells, the rectangle's, and the cap."""
        cells = (self.width // TILE) * (self.height // TILE)
        all_cells = -(-self.width // TILE) * -(-self.height // TILE)
        painted = self.tissue[2] * self.tissue[3]
        tiles = min(painted - unreadable, MAX_TILES)
        return Expected(
            tiles,
            {
                "background": cells - painted,
                "pen": 0,
                "outside": all_cells - cells,
                "unreadable": unreadable,
                "over_cap": painted - unreadable - tiles,
                "transparent": 0,
            },
        )


def plan(rng: np.random.Generator) -> Plan:
    """A size, a rectangle of tissue, a pixel size and a pyramid at random."""
    across, down = (int(n) for n in rng.integers(5, 14, 2))
    left, top = int(rng.integers(0, across - 3)), int(rng.integers(0, down - 3))
    size = int(rng.integers(2, across - left + 1)), int(rng.integers(2, down - top + 1))
    more = rng.integers(0, TILE, 2)
    return Plan(
        across * TILE + int(more[0]),
        down * TILE + int(more[1]),
        (left, top, *size),
        float(rng.choice([0.25, 0.4, 0.5])),
        int(rng.integers(1, 4)),
    )


def image_of(plan: Plan, seed: int) -> np.ndarray:
    """(height, width, 3) uint8; a little noise, so that no two are alike."""
    image = np.empty((plan.height, plan.width, 3), np.uint8)
    image[:] = GLASS
    left, top, across, down = (n * TILE for n in plan.tissue)
    image[top : top + down, left : left + across] = PINK
    strip = np.random.default_rng(seed).integers(0, 7, (TILE, *image.shape[1:]), np.uint8)
    for y in range(0, plan.height, TILE):
        image[y : y + TILE] -= strip[: plan.height - y]
    return image


def write(path: Path, plan: Plan, seed: int, **changes: object) -> Path:
    """A JPEG-tiled pyramid that states its um/px in its resolution tags."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = image_of(plan, seed)
    per_cm = 1e4 / plan.mpp
    options = {
        "tile": (256, 256),
        "photometric": "rgb",
        "compression": "jpeg",
        "compressionargs": {"level": 95},
        "metadata": None,
        "resolution": (per_cm, per_cm),
        "resolutionunit": "CENTIMETER",
        **changes,
    }
    with tifffile.TiffWriter(path) as tiff:
        for level in range(plan.levels):
            tiff.write(image, subfiletype=int(level > 0), **options)
            options |= {"resolution": None, "resolutionunit": None, "description": None}
            image = cv2.resize(image, None, fx=0.5, fy=0.5, interpolation=cv2.INTER_AREA)
    return path


WHOLE = Plan(700, 520, (1, 1, 4, 4))  # rows 1 to 4 and columns 1 to 4 of 10 x 8 cells


def _truncated(path: Path, seed: int) -> Expected:
    """Within the header: there is no image in it."""
    os.truncate(write(path, WHOLE, seed), 100)
    return Expected(reason="the file is damaged or cut off", kind="damaged")


def _cut_off(path: Path, seed: int) -> Expected:
    """Where the second row of 256-px blocks begins: all cells of rows 4 to 7 are tried and lost."""
    with tifffile.TiffFile(write(path, WHOLE, seed)) as tiff:
        end = tiff.pages[0].dataoffsets[3]
    os.truncate(path, end)
    rejected = WHOLE.expected(unreadable=40).rejected
    return Expected(12, rejected | {"background": 28, "over_cap": 0})


def _empty(path: Path, _: int) -> Expected:
    path.touch()
    return Expected(reason="is empty (0 bytes)", kind="empty file")


def _text(path: Path, _: int) -> Expected:
    path.write_text("no slide", encoding="utf-8")
    return Expected(reason="OpenSlide does not read this file", kind="not a slide")


def _pixel_size(resolution: tuple[float, float] | None, said: str) -> Callable[..., Expected]:
    def make(path: Path, seed: int) -> Expected:
        unit = "CENTIMETER" if resolution else None
        write(path, WHOLE, seed, resolution=resolution, resolutionunit=unit)
        return Expected(reason=said, kind="no usable pixel size")

    return make


def _ome_zero(path: Path, seed: int) -> Expected:
    sizes = {"axes": "YXS", "PhysicalSizeX": 0.0, "PhysicalSizeY": 0.0}
    tifffile.imwrite(path, image_of(WHOLE, seed), ome=True, tile=(256, 256), photometric="rgb",
                     compression="jpeg", metadata=sizes)  # fmt: skip
    return Expected(reason="ome.PhysicalSize states 0 x 0 um/px", kind="no usable pixel size")


def _spoilt_block(path: Path, seed: int) -> Expected:
    """The first 256-px block holds 4 x 4 cells, of which 3 x 3 are tissue."""
    spoil(write(path, WHOLE, seed), 0)
    return WHOLE.expected(unreadable=9)


def _spoilt_jpeg2000(path: Path, seed: int) -> Expected:
    """As an Aperio scanner packs it; no pyramid, so that the overview loses the block too."""
    single = Plan(WHOLE.width, WHOLE.height, WHOLE.tissue, levels=1)
    write(
        path, single, seed, compression="aperio_jp2000_rgb", compressionargs=None,
        description=APERIO.format(single.width, single.height),
    )  # fmt: skip
    spoil(path, 0)
    # Of the whole block nobody knows what was glass: its 16 cells are tried and counted.
    rejected = single.expected(unreadable=9).rejected | {"unreadable": 16}
    return Expected(7, rejected | {"background": rejected["background"] - 7})


def _every_block(path: Path, seed: int) -> Expected:
    spoil(write(path, Plan(500, 500, (1, 1, 4, 4), levels=1), seed), 0, 1, 2, 3)
    return Expected(reason="49 of 49 cells cannot be read", kind="damaged")


def _huge_claim(side: int) -> Callable[..., Expected]:
    def make(path: Path, seed: int) -> Expected:
        write(path, Plan(WHOLE.width, WHOLE.height, WHOLE.tissue, levels=1), seed)
        with tifffile.TiffFile(path, mode="r+") as tiff:
            for tag in ("ImageWidth", "ImageLength"):
                tiff.pages[0].tags[tag].overwrite(side)
        return Expected(reason="the file is damaged or cut off", kind="damaged")

    return make


def _glass(path: Path, seed: int) -> Expected:
    write(path, Plan(500, 400, (0, 0, 0, 0)), seed)
    return Expected(reason="no foreground, none of 42 tiles", kind="no foreground")


def _tiny(path: Path, seed: int) -> Expected:
    write(path, Plan(60, 300, (0, 0, 0, 0), levels=1), seed)
    return Expected(reason="60 x 300 px is smaller than one tile", kind="smaller than a tile")


def _loop(path: Path, _: int) -> Expected:
    path.symlink_to(path.name)
    return Expected(reason="Too many levels of symbolic links", kind="cannot be read")


def _gone(path: Path, _: int) -> Expected:
    path.symlink_to("nowhere.tif")
    return Expected(reason="No such file or directory", kind="cannot be read")


def _locked(path: Path, seed: int) -> Expected:
    write(path, WHOLE, seed)
    path.chmod(0)
    return Expected(reason="Permission denied", kind="cannot be read")


def _mirax(path: Path, _: int) -> Expected:
    path.write_bytes(b"\xff\xd8\xff\xe0 a MIRAX index begins as a JPEG")
    return Expected(reason=f"{path.stem}, which holds the pixels, is missing beside it",
                    kind="part of the slide is missing")  # fmt: skip


def _grey(path: Path, seed: int) -> Expected:
    tifffile.imwrite(path, image_of(WHOLE, seed)[..., 0], tile=(256, 256), photometric="minisblack")
    return Expected(reason="is not 8-bit RGB", kind="not 8-bit RGB")


NO_SIZE = "no usable pixel size"
BROKEN: dict[str, tuple[str, Callable[[Path, int], Expected]]] = {
    "truncated": ("tif", _truncated),
    "cut-off": ("tif", _cut_off),
    "empty": ("svs", _empty),
    "text": ("svs", _text),
    "unstated": ("tif", _pixel_size(None, NO_SIZE)),
    "zero": ("tif", _pixel_size((2**32 - 1, 2**32 - 1), "um/px, which is not plausible")),
    "ome-zero": ("ome.tif", _ome_zero),
    "thousand": ("tif", _pixel_size((10, 10), "1000 x 1000 um/px, which is not plausible")),
    "oblong": ("tif", _pixel_size((2e4, 4e4), "0.5 x 0.25 um/px, which is not plausible")),
    "spoilt-block": ("tif", _spoilt_block),
    "spoilt-jpeg2000": ("svs", _spoilt_jpeg2000),
    "spoilt-all": ("tif", _every_block),
    "huge": ("tif", _huge_claim(100_000)),
    "huger": ("tif", _huge_claim(2**31 - 1)),
    "glass": ("tif", _glass),
    "tiny": ("tif", _tiny),
    "loop": ("tif", _loop),
    "gone": ("tif", _gone),
    "mirax": ("mrxs", _mirax),
    "grey": ("tif", _grey),
}
if os.geteuid() != 0:  # root may read everything
    BROKEN["locked"] = ("tif", _locked)


def make_cohort(folder: Path, slides: int, seed: int = 0, every: int = 11) -> dict[str, Expected]:
    """Writes `slides` slides in folders by dataset: slide id -> what must become of it.

    One in `every` is broken, in every way in turn; some are copies of others, have the same name in
    two folders, are named in other scripts or as long as the file system allows.
    """
    rng = np.random.default_rng(seed)
    found: dict[str, Expected] = {}
    ways = itertools.cycle(BROKEN.items())
    last = None
    for i in range(slides):
        dataset = DATASETS[i % len(DATASETS)]
        if i % every == every // 2:
            way, (suffix, make) = next(ways)
            name = f"{dataset}/{way}-{i:05d}.{suffix}"
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            found[name] = make(folder / name, i)
            continue
        name = f"{dataset}/{_stem(i)}.tif"
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        if last and i % 50 == 7:
            shutil.copyfile(folder / last, folder / name)
            found[name] = found[last]
            continue
        drawn = plan(rng)
        write(folder / name, drawn, i)
        found[name], last = drawn.expected(), name
    return found


def _stem(i: int) -> str:
    if i % 40 < 4:
        return f"same/{i // 40:05d}"  # four slides of one name, in the folders of four datasets
    if i % 100 == 11:
        return f"Präparat №{i} 肺"
    return f"{i:05d}" + "x" * 246 if i % 100 == 23 else f"{i:05d}"


if __name__ == "__main__":
    expected = make_cohort(Path(sys.argv[1]), int(sys.argv[2]))
    failing = sum(bool(e.reason) for e in expected.values())
    print(f"{sum(e.tiles for e in expected.values())} tiles of {len(expected) - failing} slides; "
          f"{failing} must fail. Cut it: jaxhisto tile {sys.argv[1]} --dataset-by-folder "
          f"{' '.join(FLAGS)} --failures-allowed {failing} --out STORE")  # fmt: skip
