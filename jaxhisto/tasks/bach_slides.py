"""BACH, part B: ten slides of breast with outlined lesions, in windows (Aresta et al. 2019).

`WSI/A01.svs` .. `A10.svs`, each with an `A01.xml` of ImageScope beside it: polygons in level-0
pixels, called benign, carcinoma in situ or invasive carcinoma; what none encloses is normal, glass
too. Polygons are filled in the order of the file, later ones over earlier ones, as the organisers
do. Five, three and two slides are trained, validated and tested on (paper; which, it does not
say: they are drawn, the first of 32 draws with every class in every part).
"""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from jaxhisto.console import counted
from jaxhisto.data.labelled import drawn_order, few
from jaxhisto.errors import StoreError
from jaxhisto.special_files import no_pipe
from jaxhisto.task_config import TaskConfig
from jaxhisto.tasks.polygons import fill_polygon
from jaxhisto.tasks.set_folders import count_note
from jaxhisto.tasks.splits import checked_split
from jaxhisto.tasks.task import Task, Window
from jaxhisto.tasks.windows import grid, window_name

CLASSES = ("Normal", "Benign", "InSitu", "Invasive")
WORDS = (("benign", 1), ("in situ", 2), ("in-situ", 2), ("invasive", 3))
WINDOW = 1024  # px (paper)
SHARES = (5, 3, 2)  # slides to train, validate and test on (paper)
DRAWS = 32
ELLIPSE, OPEN = "2", ("3", "4")  # ImageScope's types of region; open are arrows and rulers


@dataclass(frozen=True, eq=False)
class Outline:
    """A polygon: (n, 2) int32 of level-0 (x, y), and the class inside."""

    points: NDArray[np.int32]
    label: int

    def touches(self, window: Window, side: int) -> bool:
        """Whether its bounding box meets the window."""
        (left, top), (right, bottom) = self.points.min(axis=0), self.points.max(axis=0)
        across = left < window.x + side and right >= window.x
        return bool(across and top < window.y + side and bottom >= window.y)


def bach_segmentation(config: TaskConfig) -> Task:
    """Windows of the slides with their masks; the group is the slide."""
    folder, slides = _slides(config.data)
    side = config.window or WINDOW
    left_out: list[str] = []
    outlines = {name: read_outlines(outline_file(folder, name), left_out) for name in slides}
    images = SlideWindows(folder, slides)
    windows, lost = grid(slides, images.sizes, side)
    masks = OutlineMasks(folder, outlines, windows, side)
    notes = [*count_note(len(slides), 10), f"{lost:.1%} of the pixels, at edges, in no window"]
    if left_out:
        notes.append(f"{counted(len(left_out), 'region')} that enclose nothing: {few(left_out)}")
    if config.windows == "annotated":
        kept = [i for i in range(len(windows)) if masks.read(i).any()]
        notes.append(f"{len(windows) - len(kept):,} windows without annotation left out")
        windows = tuple(windows[i] for i in kept)
        masks = OutlineMasks(folder, outlines, windows, side)
    if not any(outlines.values()):
        raise StoreError(f"{folder}: no outline in any of the XML files; unpack them again.")
    images = SlideWindows(folder, slides, windows, side, images.sizes)
    task = Task(
        "BACH segmentation",
        "segmentation",
        images,
        masks,
        CLASSES,
        tuple(w.source for w in windows),
        windows=windows,
        notes=tuple(notes),
    )
    if config.test or config.split:
        return task
    there = {s: {o.label for o in outlines[s]} for s in {w.source for w in windows}}
    parts = divide_slides(there, config.split_seed)
    rows = [
        np.array([i for i, w in enumerate(windows) if w.source in part], np.int64) for part in parts
    ]
    return task.with_split(checked_split(task, *rows))


def read_outlines(path: Path, left_out: list[str] | None = None) -> list[Outline]:
    """The polygons of an ImageScope file, in its order.

    Args:
      left_out: what encloses nothing is added to it, by name: arrows, rulers, outlines of fewer
        than three corners, as a slip of the hand leaves them.

    Raises:
      StoreError: not there, no XML, an ellipse, or a region of unknown class.
    """
    try:
        root = ElementTree.fromstring(no_pipe(path).read_bytes())
    except (OSError, ElementTree.ParseError) as error:
        raise StoreError(f"{path}: cannot be read as XML ({error}); unpack it again.") from error
    outlines = []
    for region in root.iter("Region"):
        name = f"region {region.get('Id')}"
        if region.get("Type") == ELLIPSE:
            raise StoreError(f"{path}: {name} is an ellipse; outline it by hand.")
        if region.get("Type") in OPEN or sum(1 for _ in region.iter("Vertex")) < 3:
            (left_out if left_out is not None else []).append(f"{path.name} {name}")
            continue
        text = " ".join(
            [region.get("Text") or "", *(a.get("Value") or "" for a in region.iter("Attribute"))]
        ).lower()
        labels = {label for word, label in WORDS if word in text}
        if len(labels) != 1:
            raise StoreError(
                f"{path}: {name} is called {text.strip()!r}, which is not one "
                f"of {', '.join(word for word, _ in WORDS)}; name it in the file."
            )
        try:
            points = [
                (round(float(v.attrib["X"])), round(float(v.attrib["Y"])))
                for v in region.iter("Vertex")
            ]
        except (KeyError, ValueError) as error:
            raise StoreError(f"{path}: {name} has a vertex without X and Y; restore it.") from error
        outlines.append(Outline(np.array(points, np.int32), labels.pop()))
    return outlines


def divide_slides(labels: dict[str, set[int]], seed: int) -> list[set[str]]:
    """Slides to train, validate and test on, 5 : 3 : 2, at least one each.

    Args:
      labels: the classes that are outlined on each slide.

    Raises:
      StoreError: fewer than three slides.
    """
    slides = sorted(labels)
    n = len(slides)
    if n < 3:
        raise StoreError(f"{n} slides ({few(slides)}) cannot make three parts; add slides.")
    validation, test = (max(1, round(n * share / sum(SHARES))) for share in SHARES[1:])
    ends = (n - validation - test, n - test)
    every = set().union(*labels.values())
    best: tuple[int, list[set[str]]] | None = None
    for draw in range(DRAWS):
        order = [slides[i] for i in drawn_order(slides, range(n), seed * DRAWS + draw)]
        parts = [set(order[: ends[0]]), set(order[ends[0] : ends[1]]), set(order[ends[1] :])]
        lacking = sum(len(every - set().union(*(labels[s] for s in part))) for part in parts)
        if best is None or lacking < best[0]:
            best = lacking, parts
        if not lacking:
            break
    assert best is not None
    return best[1]


class SlideWindows:
    """Windows of slides at level 0, by OpenSlide."""

    def __init__(
        self,
        folder: Path,
        slides: Sequence[str],
        windows: tuple[Window, ...] = (),
        side: int = WINDOW,
        sizes: Sequence[tuple[int, int]] = (),
    ) -> None:
        self.names = tuple(window_name(w) for w in windows)
        self._windows, self._side = windows, side
        self._folder = folder
        self._open: dict[str, Any] = {}
        self.sizes = list(sizes) or [self._slide(name).dimensions[::-1] for name in slides]

    def __len__(self) -> int:
        return len(self.names)

    def read(self, i: int) -> NDArray[np.uint8]:
        """Window i, (side, side, 3) uint8 RGB.

        Raises:
          StoreError: it cannot be decoded, or the slide holds no pixels there.
        """
        import openslide

        window = self._windows[i]
        try:
            region = self._slide(window.source).read_region(
                (window.x, window.y), 0, (self._side, self._side)
            )
        except openslide.OpenSlideError as error:
            self._open.pop(window.source, None)  # a handle that failed stays failed
            raise StoreError(
                f"{self._folder / window.source}: cannot be decoded at y {window.y} x {window.x} "
                f"({error}); restore the slide."
            ) from error
        pixels = np.asarray(region)
        if (pixels[..., 3] < 255).any():
            raise StoreError(
                f"{self._folder / window.source}: holds no pixels in a part of the window at y "
                f"{window.y} x {window.x}; restore the slide."
            )
        return np.ascontiguousarray(pixels[..., :3])

    def files(self) -> dict[str, Path]:
        """The slides, by their names."""
        return {window.source: self._folder / window.source for window in self._windows}

    def _slide(self, name: str) -> Any:
        import openslide

        if name not in self._open:
            try:
                self._open[name] = openslide.OpenSlide(no_pipe(self._folder / name))
            except (openslide.OpenSlideError, OSError) as error:
                raise StoreError(
                    f"{self._folder / name}: is no slide that OpenSlide reads ({error}); restore "
                    "it."
                ) from error
        return self._open[name]


class OutlineMasks:
    """The masks of windows, filled from the polygons when they are read."""

    def __init__(
        self,
        folder: Path,
        outlines: dict[str, list[Outline]],
        windows: tuple[Window, ...],
        side: int,
    ) -> None:
        self._folder = folder
        self._outlines, self._windows, self._side = outlines, windows, side

    def read(self, i: int) -> NDArray[np.uint8]:
        """Mask i, (side, side) uint8, index into the classes."""
        window = self._windows[i]
        mask = np.zeros((self._side, self._side), np.uint8)
        for outline in self._outlines[window.source]:
            if outline.touches(window, self._side):
                corner = np.array([window.x, window.y], np.int32)
                fill_polygon(mask, outline.points - corner, outline.label)
        return mask

    def files(self) -> dict[str, Path]:
        """The files of outlines, by the slides' names."""
        return {name: outline_file(self._folder, name) for name in self._outlines}


def outline_file(folder: Path, slide: str) -> Path:
    """The XML file beside a slide."""
    return folder / Path(slide).with_suffix(".xml")


def _slides(data: str) -> tuple[Path, list[str]]:
    top = Path(data).expanduser()
    if not top.is_dir():
        fact = "is not a folder" if top.exists() else "does not exist"
        raise StoreError(f"{top}: {fact}; name the folder of the slides A01.svs to A10.svs.")
    found = sorted(top.rglob("A[0-9][0-9].svs"))
    folders = {path.parent for path in found}
    if len(folders) != 1:
        fact = "slides in two folders" if found else "no slides A01.svs to A10.svs in here"
        raise StoreError(f"{top}: {fact}; name the folder WSI of the unpacked archive.")
    folder = folders.pop()
    bare = [p.name for p in found if not p.with_suffix(".xml").exists()]
    if bare:
        raise StoreError(
            f"{folder}: {len(bare)} slides have no XML file beside them ({few(bare)}); put the "
            "annotations there."
        )
    return folder, [p.name for p in found]
