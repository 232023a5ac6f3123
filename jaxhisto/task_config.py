"""The settings of a task: a labelled set on which an encoder is judged."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from jaxhisto.config import MANY, within


@dataclass(frozen=True)
class TaskConfig:
    """A labelled set on which an encoder is judged, and how it is divided."""

    data: str = ""
    """Folder of the images; of a published set, the folder it was unpacked to."""
    layout: Literal[
        "auto",
        "bach",
        "breakhis",
        "nct_crc",
        "lymph",
        "gleason2019",
        "bach_segmentation",
        "digestpath2019",
        "breastpathq",
    ] = "auto"
    """`auto`: a folder a class, or a folder with `labels` or `masks`; else one of the paper's
    sets (App. C.1) in the form in which it is published."""
    labels: str = ""
    """CSV file (.tsv: tab-separated) with a row an image."""
    file: str = "file"
    """Its column of image names, relative to `data`."""
    label: str = ""
    """Its column of classes: a classification task."""
    target: str = ""
    """Its column of numbers: a regression task."""
    target_scale: float = within(1.0, 1e-9, 1e9)
    """What these numbers are multiplied by; 100 turns a share into percent, as the paper's."""
    masks: str = ""
    """Folder with a mask an image, of the same name but for the suffix: a segmentation task."""
    masks_are: Literal["classes", "instances"] = "classes"
    """What a mask's pixels are: class ids (of two classes also 0 and 255), or `instances`, each
    with a number of its own, of which all become one foreground."""
    classes: tuple[str, ...] = ()
    """Classes in their order. Of labels: those wanted, others are left out; empty: all, sorted.
    Of masks: the names of the ids 0, 1, ...; empty: background and foreground."""
    group: str = ""
    """Column of patient, slide, section or region; what is of one group is never divided."""
    group_pattern: str = ""
    """Instead: a regular expression, whose group in an image's relative name is the group."""
    window: int = within(0, 0, 65536)
    """Cut images and masks into windows of this side, px; 0: whole images. Of
    `bach_segmentation` 0 means 1024 (paper)."""
    windows: Literal["all", "annotated"] = "all"
    """Of `bach_segmentation`: all windows, or those that an annotation touches."""
    split_by: Literal["group", "image"] = "group"
    """`group`: no group is divided, where the images have any; `image`: groups are ignored (paper),
    so that images of one patient may be on both sides. A set's own split stays as it is."""
    side: int = within(224, 8, 8192)
    """Side to which an image's centre square is resized, px."""
    test: tuple[str, ...] = ()
    """Groups to test on; empty: drawn."""
    split: str = ""
    """Split file to use; empty: the set's own split, or one that is drawn."""
    split_seed: int = within(0, 0, MANY)
    """Seed of the draw of the split."""
    validation_by_image: bool = False
    """Draw the validation images from the groups that are trained on: where too few groups are
    left for one of their own. The test stays clean, the validation score is too good."""
