"""What each foreground detector keeps of tissue, glass and pen marks, and what the pen guard takes.

    python benchmarks/foreground.py DATA [--json FILE] [--sheet FILE]

DATA holds the folders her2st_spots, bcss_tumor, nct_crc_mini, dsb2018_stained, tissue_qc and wsi.
Every set is laid out as one slide at 8 um/px, its images apart on glass, so that Otsu has glass to
tell from and the close does not lead from one image to the next. A tile is kept where half of it
is foreground, as `jaxhisto tile` does it. Pictures of a known mixture are cut into cells of 64 um
(pen marks: 24) and counted inside areas drawn by hand (`AREAS`, shares of width and height). What
is `made` has no real counterpart here: tissue with its eosin turned into DAB, ink over real images.
The sheet shows, a row a set: the images, each detector's mask, and the ink.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from jaxhisto.config import TileConfig
from jaxhisto.slides.fit import fit_note
from jaxhisto.slides.foreground import STAINS, foreground
from jaxhisto.slides.pen import MOST, pen_marks
from jaxhisto.slides.pixel_size import GivenPixelSize
from jaxhisto.slides.reader import Overview, Slide

MPP = 8.0
GLASS = (242, 242, 242)
GAP = 26  # px between images, more than twice the close's radius
CELL_UM, PEN_CELL_UM = 64.0, 24.0
CLOSE_UM = 100.0
HALF = 0.5
DETECTORS = {
    "ciga2022": ("ciga2022", CLOSE_UM),
    "without its close": ("ciga2022", 0.0),
    "otsu": ("otsu", 0.0),
    "od": ("od", 0.0),
}
GUARDS = ("green_blue", "all")
UNKNOWN_MPP = 0.5  # taken where a set states none
Area = Sequence[tuple[float, float]]
ALL: Area = ((0, 0), (1, 0), (1, 1), (0, 1))


def box(left: float, top: float, right: float, bottom: float) -> Area:
    """A rectangle, in shares of width and height."""
    return ((left, top), (right, top), (right, bottom), (left, bottom))


AREAS: dict[str, Area] = {
    "no-tissue-green-pen": ((0, 0.62), (0.75, 0.1), (1, 0.05), (1, 0.4), (0.55, 0.95), (0, 0.97)),
    "medium-nuclei-score-green-pen-level1": ((0, 0.1), (1, 0), (1, 0.42), (0.5, 0.42), (0, 0.55)),
    "very-low-nuclei-score-red-pen-level1": (
        *((0.2, 0.95), (0.4, 0.72), (0.65, 0.72), (0.72, 0.4), (1, 0.3), (1, 0.6)),
        *((0.85, 0.95), (0.8, 1), (0.2, 1)),
    ),
}
SLIDE_AREAS: dict[str, dict[str, Area]] = {
    "her2st_C2_pyramid.tiff": {"glass": box(0, 0, 0.17, 1), "smear": box(0.88, 0.2, 1, 0.6)},
    "CMU-1-Small-Region.svs": {"glass": box(0.78, 0, 1, 0.18)},
    "camelyon16_lowres_tiledfull.dcm": {"glass": box(0, 0.93, 1, 1)},
}
SLIDE_STAINS = {
    "her2st_C2_pyramid.tiff": "bluish H&E",
    "OS-1-detail.ome.tif": "violet H&E",
    "camelyon16_lowres_tiledfull.dcm": "violet H&E",
}
BARE = ("glass", "smear")
"""Ends of names that the sheet leaves out."""
INKS = {"green": (40, 170, 140), "blue": (40, 80, 180), "red": (214, 40, 60), "black": (45, 45, 50)}


@dataclass
class Set:
    """One line of the table.

    Fields:
      want: `tissue`, `glass` or `pen`.
      rgb: (h, w, 3) uint8, `mpp` um/px.
      cells: (left, top, width, height) of what is counted, pixels.
      shown: of the sheet.
    """

    name: str
    stain: str
    want: str
    rgb: np.ndarray
    cells: list[tuple[int, int, int, int]]
    mpp: float = MPP
    shown: list[tuple[int, int, int, int]] = field(default_factory=list)


def main() -> None:
    """Prints the tables and writes the record and the sheet."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--sheet", type=Path)
    args = parser.parse_args()
    slides = overviews(args.data / "wsi")
    sets = [*tile_sets(args.data), *qc_sets(args.data / "tissue_qc"), *slide_sets(slides)]
    sets += made_sets(args.data)
    record = {"sets": [counted(s) for s in sets], "slides": [judged(*s) for s in slides]}
    print(tables(record))
    if args.json:
        args.json.write_text(json.dumps(record, indent=1) + "\n")
    if args.sheet:
        cv2.imwrite(str(args.sheet), sheet(sets, slides)[..., ::-1])


def tile_sets(data: Path) -> list[Set]:
    """The labelled tiles: all tissue, but for one class of nct_crc_mini."""
    her2st = sorted((data / "her2st_spots" / "images").iterdir())
    bcss = sorted((data / "bcss_tumor" / "images").iterdir())
    nct = sorted(p for p in (data / "nct_crc_mini").glob("*/*") if p.parent.name.isupper())
    fat = [p for p in nct if p.parent.name == "ADI"]
    back = [p for p in nct if p.parent.name == "BACK"]
    dsb = sorted((data / "dsb2018_stained" / "images").iterdir())
    return [
        *(
            laid_out(f"her2st_spots {s}", "bluish H&E", "tissue", only(her2st, s), 0.688)
            for s in ("C2", "C3", "C4", "C5")
        ),
        laid_out("bcss_tumor", "pink H&E", "tissue", bcss, 0.24),
        laid_out("nct_crc_mini, 7 classes", "pink H&E", "tissue", without(nct, fat + back), 0.5),
        laid_out("nct_crc_mini ADI (fat)", "pink H&E", "tissue", fat, 0.5),
        laid_out("dsb2018_stained", "violet", "tissue", dsb, UNKNOWN_MPP),
        laid_out("nct_crc_mini BACK", "violet cast", "glass", back, 0.5),
    ]


def only(files: Iterable[Path], start: str) -> list[Path]:
    """Those whose name starts so."""
    return [p for p in files if p.name.startswith(start)]


def without(files: Iterable[Path], others: Sequence[Path]) -> list[Path]:
    """Those that are not among the others."""
    return [p for p in files if p not in others]


def qc_sets(folder: Path) -> list[Set]:
    """tissue_qc, in cells: of pen marks those that the ink covers."""
    wants = {"tissue": "tissue", "no_tissue": "glass", "pen_mark": "pen"}
    sets = []
    for kind, want in wants.items():
        for file in sorted((folder / kind).glob("*.png")):
            name = file.stem.split("-level")[0]
            made = laid_out(f"tissue_qc {name}", "H&E", want, [file], UNKNOWN_MPP)
            made.cells = inside(
                made.shown[0],
                AREAS.get(file.stem, ALL),
                (PEN_CELL_UM if want == "pen" else CELL_UM) / MPP,
            )
            sets.append(made)
    return sets


def slide_sets(slides: Sequence[tuple[str, Overview, float]]) -> list[Set]:
    """Areas of slides that hold nothing but glass."""
    return [
        Set(f"{name.split('.')[0]} {what}", stain_of(name), "glass", view.rgb, cells, mpp, [whole])
        for name, view, mpp in slides
        for whole in [(0, 0, view.rgb.shape[1], view.rgb.shape[0])]
        for what, area in SLIDE_AREAS.get(name, {}).items()
        for cells in [inside(whole, area, max(1.0, CELL_UM / mpp))]
    ]


def made_sets(data: Path) -> list[Set]:
    """Brown tissue, and ink over glass and over tissue."""
    bcss = sorted((data / "bcss_tumor" / "images").iterdir())
    her2st = only(sorted((data / "her2st_spots" / "images").iterdir()), "C5")
    sets = [
        laid_out("made: bcss_tumor", "DAB", "tissue", bcss, 0.24, as_dab),
        laid_out("made: her2st_spots C5", "DAB", "tissue", her2st, 0.688, as_dab),
    ]
    for name, colour in INKS.items():
        for what, files, mpp in (("glass", her2st, 0.688), ("bcss_tumor", bcss, 0.24)):
            glass = what == "glass"
            sets.append(
                laid_out(
                    f"made: {name} ink over {what}",
                    "" if glass else "pink H&E",
                    "pen",
                    files[:: len(files) // 100][:100],
                    mpp,
                    lambda rgb, colour=colour, glass=glass: inked(rgb, colour, glass),
                )
            )
    return sets


def laid_out(
    name: str,
    stain: str,
    want: str,
    files: Sequence[Path],
    mpp: float,
    change: Callable[[np.ndarray], np.ndarray] = lambda rgb: rgb,
) -> Set:
    """The images at 8 um/px, apart on glass, each of them one cell."""
    images = [change(reduced(file, MPP / mpp)) for file in files]
    side = GAP + max(max(image.shape[:2]) for image in images)
    columns = int(np.ceil(np.sqrt(len(images))))
    rows = -(-len(images) // columns)
    canvas = np.full((rows * side + GAP, columns * side + GAP, 3), GLASS, np.uint8)
    cells = []
    for n, image in enumerate(images):
        h, w = image.shape[:2]
        x, y = GAP + n % columns * side, GAP + n // columns * side
        canvas[y : y + h, x : x + w] = image
        cells.append((x, y, w, h))
    return Set(name, stain, want, canvas, cells, shown=cells[:: max(1, len(cells) // 6)][:6])


def reduced(file: Path, factor: float) -> np.ndarray:
    """(h, w, 3) uint8 RGB, smaller by the factor; areas are averaged."""
    image = cv2.cvtColor(cv2.imread(str(file), cv2.IMREAD_COLOR), cv2.COLOR_BGR2RGB)
    size = tuple(max(1, round(s / factor)) for s in image.shape[1::-1])
    return cv2.resize(image, size, interpolation=cv2.INTER_AREA)


def density(rgb: np.ndarray) -> np.ndarray:
    """Decadic optical density of each channel."""
    return -np.log10(np.maximum(rgb, 1) / 255)


def as_dab(rgb: np.ndarray) -> np.ndarray:
    """Haematoxylin stays, as much DAB as there was eosin (Ruifrok and Johnston's vectors)."""
    vectors = STAINS / np.linalg.norm(STAINS, axis=1, keepdims=True)
    amounts = np.maximum(density(rgb) @ np.linalg.inv(vectors), 0)
    amounts[..., 2], amounts[..., 1] = amounts[..., 1], 0
    return np.rint(255 * 10 ** -(amounts @ vectors)).clip(0, 255).astype(np.uint8)


def inked(rgb: np.ndarray, colour: tuple[int, int, int], glass: bool) -> np.ndarray:
    """Ink of 0.5 to 1.2 times the colour's density, drawn from the content, over all of it."""
    much = np.random.default_rng(int(rgb.astype(np.int64).sum())).uniform(0.5, 1.2)
    beneath = np.full_like(rgb, GLASS[0]) if glass else rgb
    both = density(beneath) + much * density(np.array(colour))
    return np.rint(255 * 10**-both).astype(np.uint8)


def inside(
    whole: tuple[int, int, int, int], area: Area, side: float
) -> list[tuple[int, int, int, int]]:
    """Cells of a grid whose corners all lie in the area."""
    x, y, w, h = whole
    polygon = np.array([(x + a * w, y + b * h) for a, b in area], np.float32)
    cells = []
    for top in np.arange(y, y + h - side + 1e-6, side):
        for left in np.arange(x, x + w - side + 1e-6, side):
            corners = [(left + a * side, top + b * side) for a in (0, 1) for b in (0, 1)]
            near = (cv2.pointPolygonTest(polygon, c, True) >= -1 for c in corners)
            if all(near):
                cells.append((round(left), round(top), round(side), round(side)))
    return cells


def overviews(folder: Path) -> list[tuple[str, Overview, float]]:
    """(name, overview, its um/px) of each slide."""
    found = []
    for file in sorted(p for p in folder.iterdir() if p.suffix != ".md"):
        with Slide(file, GivenPixelSize(0.25, "assumed")) as slide:
            view = slide.overview(MPP / slide.mpp)
            found.append((file.name, view, slide.mpp * view.downsample))
    return found


def stain_of(slide: str) -> str:
    """As seen by eye."""
    return SLIDE_STAINS.get(slide, "pink H&E")


def masks(rgb: np.ndarray, mpp: float) -> dict[str, np.ndarray]:
    """Of each detector."""
    return {name: foreground(rgb, d, mpp, close) for name, (d, close) in DETECTORS.items()}


def counted(s: Set) -> dict[str, Any]:
    """Cells of a set that each detector keeps, and of which each guard says pen."""

    def reach(mask: np.ndarray, share: float) -> int:
        return sum(bool(mask[y : y + h, x : x + w].mean() >= share) for x, y, w, h in s.cells)

    kept = {name: reach(mask, HALF) for name, mask in masks(s.rgb, s.mpp).items()}
    pen = {guard: reach(pen_marks(s.rgb, guard, s.mpp), MOST) for guard in GUARDS}
    there = np.ones(s.rgb.shape[:2], bool)
    view = Overview(s.rgb, there, there, 1.0)
    mask = foreground(s.rgb, TileConfig.foreground, s.mpp, CLOSE_UM)
    note = fit_note(view, mask, TileConfig.foreground, s.mpp)
    about = {"set": s.name, "stain": s.stain, "want": s.want, "n": len(s.cells)}
    return about | {"kept": kept, "pen": pen, "note": note}


def judged(name: str, view: Overview, mpp: float) -> dict[str, Any]:
    """Share of a slide that each detector takes, of what od takes, and what a user is told."""
    found = {d: mask & view.there for d, mask in masks(view.rgb, mpp).items()}
    of_od = {d: float((m & found["od"]).sum() / found["od"].sum()) for d, m in found.items()}
    note = fit_note(view, found[TileConfig.foreground], TileConfig.foreground, mpp)
    pen = {guard: float(pen_marks(view.rgb, guard, mpp).mean()) for guard in GUARDS}
    share = {d: float(mask.mean()) for d, mask in found.items()}
    about = {"slide": name, "stain": stain_of(name), "share": share, "of_od": of_od}
    return about | {"pen": pen, "note": note}


def tables(record: dict[str, Any]) -> str:
    """Both tables as Markdown; docs/foreground.md holds them."""
    lines = []
    for want, title in (("tissue", "Tissue"), ("glass", "Glass"), ("pen", "Pen")):
        heads = (title, "stain", "n", *DETECTORS, *(f"ink: {g}" for g in GUARDS))
        heads += ("advice",) * (want == "tissue")
        lines += ["| " + " | ".join(heads) + " |", "|---|---|" + "--:|" * (len(heads) - 2)]
        for row in record["sets"]:
            if row["want"] == want:
                counts = [*row["kept"].values(), *row["pen"].values()]
                cells = [row["set"], row["stain"], str(row["n"])]
                cells += [percent(k, row["n"]) for k in counts]
                # Glass or ink alone is no slide to advise on.
                cells += [row["note"].rpartition("--foreground ")[2] or "-"] * (want == "tissue")
                lines.append("| " + " | ".join(cells) + " |")
        lines.append("")
    heads = ("Slide", "stain", *DETECTORS, "ciga2022 of od", "ink: all", "said")
    lines += ["| " + " | ".join(heads) + " |", "|---|---|" + "--:|" * 6 + "---|"]
    for row in record["slides"]:
        shares = [*row["share"].values(), row["of_od"]["ciga2022"], row["pen"]["all"]]
        cells = [row["slide"], row["stain"], *(f"{100 * s:.1f}" for s in shares)]
        lines.append("| " + " | ".join([*cells, row["note"] or "nothing"]) + " |")
    return "\n".join(lines)


def percent(k: int, n: int) -> str:
    """k of n in percent, where n is below 100 with Wilson's 95 % interval."""
    if n >= 100:
        return f"{100 * k / n:.1f}"
    z = 1.96
    middle = (k + z * z / 2) / (n + z * z)
    half = z / (n + z * z) * np.sqrt(k * (n - k) / n + z * z / 4)
    return f"{100 * k / n:.0f} ({abs(100 * (middle - half)):.0f}..{100 * (middle + half):.0f})"


def sheet(sets: Sequence[Set], slides: Sequence[tuple[str, Overview, float]]) -> np.ndarray:
    """A row a set: its images, then each detector's mask and the ink over them, tinted."""
    side, width = 64, 6 * 66
    heads = ["", *DETECTORS, "ink: all"]
    rows = [np.concatenate([titled(text, width + 4) for text in heads], axis=1)]
    strips = [(s.name, s.rgb, s.mpp, s.shown) for s in sets if s.name.split()[-1] not in BARE]
    strips += [(n, v.rgb, mpp, [(0, 0, *v.rgb.shape[1::-1])]) for n, v, mpp in slides]
    for name, rgb, mpp, shown in strips:
        rows.append(titled(name, 6 * (width + 4)))
        views = [rgb, *(tinted(rgb, mask) for mask in masks(rgb, mpp).values())]
        views.append(tinted(rgb, pen_marks(rgb, "all", mpp)))
        strip = []
        tall = side if len(shown) > 1 else 3 * side
        for view in views:
            cell = np.full((tall, width, 3), 255, np.uint8)
            for n, (x, y, w, h) in enumerate(shown):
                factor = min(tall / h, (width if len(shown) == 1 else side) / w)
                size = (max(1, int(w * factor)), max(1, int(h * factor)))
                small = cv2.resize(view[y : y + h, x : x + w], size, interpolation=cv2.INTER_AREA)
                cell[: size[1], n * 66 : n * 66 + size[0]] = small
            strip += [cell, np.zeros((tall, 4, 3), np.uint8)]
        rows += [np.concatenate(strip, axis=1), np.zeros((4, 6 * (width + 4), 3), np.uint8)]
    return np.concatenate(rows)


def titled(text: str, width: int) -> np.ndarray:
    """(18, width, 3) uint8, a line of text."""
    line = np.full((18, width, 3), 255, np.uint8)
    return cv2.putText(line, text, (4, 14), cv2.FONT_HERSHEY_SIMPLEX, 0.45, (0, 0, 0), 1)


def tinted(rgb: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Half yellow where the mask is set."""
    return np.where(mask[..., None], (rgb // 2 + np.array([127, 127, 0])), rgb).astype(np.uint8)


if __name__ == "__main__":
    main()
