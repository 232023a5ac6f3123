"""DigestPath2019, colonoscopy tissue: 250 images with the mask of what is malignant (Li et al.).

`tissue-train-pos-v1/NAME.jpg` with `NAME_mask.jpg`, about 5000 px a side. Image and mask are
resized to 1024 x 1024 as a whole (paper; those that are not square are stretched). Masks are JPEG,
so their edges ring: 128 and above is malignant. The images of `tissue-train-neg` have no masks and
are no part of the task.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

from jaxhisto.console import counted
from jaxhisto.data.folder_source import image_names
from jaxhisto.data.labelled import few
from jaxhisto.data.named_images import NamedImages
from jaxhisto.errors import StoreError
from jaxhisto.task_config import TaskConfig
from jaxhisto.tasks.masks import image_size, numbered, read_ids
from jaxhisto.tasks.set_folders import count_note, find_folder
from jaxhisto.tasks.task import Task

CLASSES = ("benign", "malignant")
POSITIVE = ("tissue-train-pos-v1", "tissue-train-pos")
MASK = "_mask"
RESIZED = 1024  # px (paper)
MALIGNANT = 128  # least grey of a malignant pixel


def digestpath2019(config: TaskConfig) -> Task:
    """The images with masks; the group is the case in the name."""
    folder = _folder(config.data)
    there = set(image_names(folder))
    masks = {n: _image_of(n) for n in there if Path(n).stem.endswith(MASK)}
    images = sorted(there - set(masks))
    names = tuple(n for n in images if n in masks.values())
    bare = [n for n in images if n not in masks.values()]
    missing = sorted(n for n, image in masks.items() if image not in there)
    notes = [*count_note(len(names), 250)]
    if missing:
        notes.append(f"{counted(len(missing), 'mask')} without their image: {few(missing)}")
    if bare:
        notes.append(f"{counted(len(bare), 'image')} without a mask: {few(bare)}")
    if not names:
        raise StoreError(f"{folder}: no image NAME.jpg with NAME_mask.jpg; unpack both.")
    mask_of = {image: mask for mask, image in masks.items()}
    paths = tuple(folder / mask_of[n] for n in names)
    for name, path in zip(names, paths, strict=True):
        (h, w), (mask_h, mask_w) = image_size(folder / name), image_size(path)
        if (h, w) != (mask_h, mask_w):
            raise StoreError(
                f"{path}: is {mask_w} x {mask_h} px, but its image is {w} x {h}; unpack it again."
            )
    return Task(
        "DigestPath2019",
        "segmentation",
        ResizedImages(NamedImages(folder, names)),
        ResizedMasks(paths),
        CLASSES,
        tuple(case(n) for n in names),
        notes=(*notes, f"each image and mask resized to {RESIZED} x {RESIZED}"),
    )


def case(name: str) -> str:
    """The case in a published name.

    2018_64982_1-3_2019-02-25 21_57_36-lv1-21183-10192-6169-5810.jpg is a crop of a scan of block
    1-3 of case 2018_64982. The scan's date and all that follows is no part of the case; where a
    name begins with the date, the scan stands for it.
    """
    scan = Path(name).stem.partition("-lv1")[0]
    before = re.split(r"20\d\d-\d\d-\d\d", scan)[0].rstrip("_- ")
    numbered = re.match(r"(?:19|20)\d\d[_-]\d+", before)
    return numbered[0] if numbered else before or scan


@dataclass(frozen=True)
class ResizedImages:
    """Images resized to 1024 x 1024, areas averaged."""

    images: NamedImages

    def __len__(self) -> int:
        return len(self.images)

    @property
    def names(self) -> tuple[str, ...]:
        return self.images.names

    def read(self, i: int) -> NDArray[np.uint8]:
        """Image i, (1024, 1024, 3) uint8 RGB; StoreError where it cannot be had."""
        image = self.images.read(i)
        kind = cv2.INTER_AREA if min(image.shape[:2]) > RESIZED else cv2.INTER_LINEAR
        return np.asarray(cv2.resize(image, (RESIZED, RESIZED), interpolation=kind), np.uint8)

    def files(self) -> dict[str, Path]:
        """A file an image, by its name."""
        return self.images.files()


@dataclass(frozen=True)
class ResizedMasks:
    """Their masks; a pixel takes the class under its centre."""

    paths: tuple[Path, ...]

    def read(self, i: int) -> NDArray[np.uint8]:
        """Mask i, (1024, 1024) uint8, 1 malignant; StoreError where it cannot be had."""
        grey = read_ids(self.paths[i])
        h, w = grey.shape
        odd = 2 * np.arange(RESIZED) + 1
        rows, columns = odd * h // (2 * RESIZED), odd * w // (2 * RESIZED)
        return (grey[np.ix_(rows, columns)] >= MALIGNANT).astype(np.uint8)

    def files(self) -> dict[str, Path]:
        """A file a mask, by its row and name."""
        return numbered(self.paths)


def _image_of(mask: str) -> str:
    path = Path(mask)
    return path.with_name(path.stem.removesuffix(MASK) + path.suffix).as_posix()


def _folder(data: str) -> Path:
    for name in POSITIVE:
        if Path(data).expanduser().absolute().name == name:
            return Path(data).expanduser()
    for name in POSITIVE:
        try:
            return find_folder(data, "", (name,)) / name
        except StoreError:
            if name == POSITIVE[-1]:
                raise
    raise AssertionError
