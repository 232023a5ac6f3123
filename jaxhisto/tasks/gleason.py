"""Gleason2019: cores of prostate with the maps of up to six pathologists (Nir et al. 2018).

`Train Imgs/SLIDE_CORE.jpg` and `Maps1_T` .. `Maps6_T/SLIDE_CORE_classimg_nonconvex.png`, each
pixel 0 (not mapped), 1 (benign) or the Gleason grade 3, 4 or 5. Not every pathologist mapped every
core. Ids above 5 are slips and mean 1 (so in the corrected maps that others published).

The paper makes a class of each image and does not say how. Ours: on every s-th pixel both ways (a
grid of about 1,000 a side) the grade is the one that most pathologists gave, the higher of two
equals. A core in which at least 5 % of the mapped pixels are cancer (grade 2 or more) has the most
frequent of these grades, again the higher of equals; any other is benign.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from jaxhisto.data.folder_source import image_names
from jaxhisto.data.labelled import Labelled, few
from jaxhisto.errors import ConfigError, StoreError
from jaxhisto.task_config import TaskConfig
from jaxhisto.tasks.masks import image_size, read_ids
from jaxhisto.tasks.set_folders import count_note, find_folder, regex_groups
from jaxhisto.tasks.task import Task
from jaxhisto.tasks.task_files import labelled_task

IMAGES = ("Train Imgs", "Train_imgs", "Train_Imgs", "train")
MAPS = tuple(f"Maps{i}_T" for i in range(1, 7))
SUFFIX = "_classimg_nonconvex.png"
HIGHEST = 5
GRADES = ("unmapped", "benign", "grade 2", "grade 3", "grade 4", "grade 5")
CANCER = 0.05  # least share of the mapped pixels. Ours
COUNTED = 1000  # pixels a side of the grid that is counted


def gleason2019(config: TaskConfig) -> Task:
    """The cores with a class each; the group is the slide (tissue array) in the name."""
    root, folder = _folders(config.data)
    maps: dict[str, list[Path]] = {}
    for expert in MAPS:
        for path in sorted((root / expert).rglob(f"[!.]*{SUFFIX}")):  # macOS adds ._ files
            maps.setdefault(path.name.removesuffix(SUFFIX), []).append(path)
    there = image_names(folder)
    names = [n for n in there if Path(n).stem in maps]
    if not names:
        raise StoreError(f"{root}: no map has the name of a core in {folder}; unpack both.")
    cores = {Path(n).stem for n in names}
    missing = sorted(set(maps) - cores)
    bare = [n for n in there if Path(n).stem not in maps]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        grades = list(pool.map(lambda n: _grade(folder / n, maps[Path(n).stem]), names))
    found = sorted(set(grades))
    wanted = config.classes or tuple(GRADES[g] for g in found)
    unknown = [c for c in wanted if c not in GRADES or GRADES.index(c) not in found]
    if unknown:
        here = few([GRADES[g] for g in found])
        raise ConfigError(f"--task.classes {unknown[0]}: no core of that class; there is {here}.")
    if len(wanted) < 2:
        raise StoreError(f"{root}: all cores are {wanted[0]}; unpack all of the set.")
    kept = [(n, wanted.index(GRADES[g])) for n, g in zip(names, grades, strict=True)
            if GRADES[g] in wanted]  # fmt: skip
    kept_names = tuple(n for n, _ in kept)
    labelled = Labelled(
        folder,
        kept_names,
        np.array([label for _, label in kept], np.int64),
        tuple(wanted),
        regex_groups(kept_names, r"(slide\d+)_core\d+\.\w+$", "the slide"),
        missing=tuple(f"{n}{SUFFIX}" for n in missing),
        unlabelled=tuple(bare),
        other=len(names) - len(kept),
    )
    rule = (
        f"class: majority of the maps; the most frequent cancer grade where cancer is at least "
        f"{CANCER:.0%} of what is mapped, else benign (the paper states no rule)"
    )
    return labelled_task("Gleason2019", labelled, notes=(*count_note(len(kept), 244), rule))


def core_grade(maps: Sequence[NDArray[np.integer]]) -> int:
    """The grade 1..5 of a core from its maps, (h, w) each, by the rule above.

    Raises:
      ValueError: nothing is mapped.
    """
    clean = [np.where(ids > HIGHEST, 1, ids) for ids in maps]
    votes = np.stack(
        [np.sum([ids == g for ids in clean], axis=0, dtype=np.uint8) for g in range(6)]
    )
    agreed = HIGHEST - np.argmax(votes[::-1], axis=0)  # of equals the higher grade
    pixels = np.bincount(agreed.reshape(-1), minlength=6).tolist()
    mapped, cancer = sum(pixels[1:]), sum(pixels[2:])
    if not mapped:
        raise ValueError("nothing is mapped")
    if cancer < CANCER * mapped:
        return 1
    return max(range(2, 6), key=lambda g: (pixels[g], g))


def _grade(image: Path, maps: Sequence[Path]) -> int:
    ids = [read_ids(path) for path in maps]
    size = image_size(image)
    for path, found in zip(maps, ids, strict=True):
        if found.shape != size:
            (h, w), (image_h, image_w) = found.shape, size
            raise StoreError(
                f"{path}: is {w} x {h} px, but its core is {image_w} x {image_h}; unpack it again."
            )
    step = max(1, min(size) // COUNTED)
    try:
        return core_grade([found[::step, ::step] for found in ids])
    except ValueError as error:
        raise StoreError(f"{maps[0]}: {error} in any map of this core; remove the core.") from error


def _folders(data: str) -> tuple[Path, Path]:
    """The folder of the maps, and that of the cores."""
    root = find_folder(data, "", MAPS[:1])
    for name in IMAGES:
        if (root / name).is_dir():
            return root, root / name
    raise StoreError(f"{root}: no folder {IMAGES[0]!r} beside the maps; unpack it there.")
