"""Tasks in files of one's own: a folder a class, a CSV file of labels or numbers, or masks."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from jaxhisto.console import counted
from jaxhisto.data.folder_source import image_names
from jaxhisto.data.labelled import Labelled, few, label_rows, read_labelled, strangers
from jaxhisto.data.named_images import NamedImages
from jaxhisto.errors import ConfigError, StoreError
from jaxhisto.task_config import TaskConfig
from jaxhisto.tasks.masks import MaskFiles, image_size
from jaxhisto.tasks.task import Task
from jaxhisto.tasks.windows import WindowedImages, WindowedMasks, grid

FOREGROUND = ("background", "foreground")


def open_files(config: TaskConfig) -> Task:
    """A task of layout `auto`, told by which of masks, target and label is named.

    Raises:
      ConfigError: more than one is named, or what belongs to another.
      StoreError: what is named is not there or does not fit together.
    """
    named = [f for f in ("masks", "target", "label") if getattr(config, f)]
    if len(named) > 1:
        raise ConfigError(
            f"--task.{named[0]} and --task.{named[1]} are two tasks; name one of them."
        )
    if config.group and config.group_pattern:
        raise ConfigError(
            "--task.group and --task.group-pattern both say what a group is; name one."
        )
    if config.window and not config.masks:
        raise ConfigError("--task.window cuts images with masks; drop it, or name --task.masks.")
    if config.masks:
        return _segmentation(config)
    return _regression(config) if config.target else _classification(config)


def pattern_groups(names: Sequence[str], pattern: str) -> tuple[str, ...] | None:
    """The group of each name, by the first group of a regular expression; None without one.

    Raises:
      ConfigError: it is none, or has no group.
      StoreError: names that it does not match.
    """
    if not pattern:
        return None
    try:
        expression = re.compile(pattern)
    except re.error as error:
        raise ConfigError(f"--task.group-pattern {pattern!r}: {error}; mend it.") from error
    if not expression.groups:
        raise ConfigError(f"--task.group-pattern {pattern!r}: put ( ) around what names the group.")
    found = [expression.search(name) for name in names]
    missed = [n for n, match in zip(names, found, strict=True) if not match or not match[1]]
    if missed:
        raise StoreError(
            f"--task.group-pattern {pattern!r}: gives no group of {len(missed):,} images "
            f"({few(missed)}); make it match every name."
        )
    return tuple(match[1] for match in found if match)


def labelled_task(
    name: str,
    found: Labelled,
    groups: tuple[str, ...] | None = None,
    notes: Sequence[str] = (),
) -> Task:
    """A set with classes as a task; `groups` where the set names none itself."""
    return Task(
        name,
        "classification",
        NamedImages(found.folder, found.names),
        found.labels,
        found.classes,
        found.groups or groups,
        notes=(*notes, *(line.strip() for line in found.summary().split("\n")[1:])),
    )


def numbers(table: Path, rows: Sequence[tuple[str, str]], what: str) -> list[float]:
    """The number in each (name, text); StoreError names those that are none."""

    def finite(text: str) -> float:
        try:
            return math.nan if "_" in text else float(text)  # Python reads 1_0 as 10
        except ValueError:
            return math.nan

    values = [finite(text) for _, text in rows]
    bad = [
        f"{name} has {text!r}"
        for (name, text), v in zip(rows, values, strict=True)
        if not math.isfinite(v)
    ]
    if bad:
        raise StoreError(
            f"{table}: no number in {counted(len(bad), 'cell')} of {what} ({few(bad)}); mend it, "
            "or empty the cells to leave these images out."
        )
    return values


def _classification(config: TaskConfig) -> Task:
    found = read_labelled(
        config.data,
        config.labels,
        config.label,
        config.group,
        file=config.file,
        classes=config.classes,
    )
    return labelled_task(_name(config), found, pattern_groups(found.names, config.group_pattern))


def _regression(config: TaskConfig) -> Task:
    if not config.labels:
        raise ConfigError(
            f"--task.target {config.target} is a column; name its CSV file by --task.labels."
        )
    if config.classes:
        raise ConfigError(
            "--task.classes belongs to labels and masks; drop it for a regression task."
        )
    folder, table = _folder(config.data), Path(config.labels).expanduser()
    there = image_names(folder)
    rows = label_rows(table, folder, config.file, config.target, config.group)
    images = set(there)
    if rows and not images.intersection(rows):
        raise StoreError(strangers(table, folder, list(rows), there))
    used = [(n, target) for n, (target, _) in rows.items() if n in images and target]
    values = numbers(table, used, config.target)
    if len(used) < 2 or len(set(values)) < 2:
        fact = f"all targets are {values[0]:g}" if values else "no image has a target"
        raise StoreError(f"{table}: {fact}; name another column or file.")
    names = tuple(n for n, _ in used)
    return Task(
        _name(config),
        "regression",
        NamedImages(folder, names),
        np.array(values, np.float64) * config.target_scale,
        groups=tuple(rows[n][1] for n in names)
        if config.group
        else pattern_groups(names, config.group_pattern),
        notes=_left_out(
            [n for n in rows if n not in images],
            [n for n in there if not rows.get(n, ("", ""))[0]],
            "a target",
        ),
    )


def _segmentation(config: TaskConfig) -> Task:
    folder, masks = _folder(config.data), _folder(config.masks)
    found = _by_stem(masks)
    there = image_names(folder)
    names = [n for n in there if _stem(n) in found]
    if not names:
        raise StoreError(
            f"{masks}: no mask has the name of an image in {folder} (but for the suffix); give "
            "each the name of its image."
        )
    _refuse_shared(folder, names, found)
    notes = _left_out(
        sorted(set(found.values()) - {found[_stem(n)] for n in names}),
        [n for n in there if _stem(n) not in found],
        "a mask",
    )
    groups = _groups_of_masks(config, folder, names)
    instances = config.masks_are == "instances"
    classes = config.classes or FOREGROUND
    if len(classes) < 2 or (instances and len(classes) != 2) or len(classes) > 256:
        raise ConfigError(
            f"--task.classes names {len(classes)}; masks need a name for each id, two for "
            "instances."
        )
    files = MaskFiles(tuple(masks / found[_stem(n)] for n in names), len(classes), instances)
    sizes = [image_size(folder / n) for n in names]
    pixels = files.check(sizes)
    shares = ", ".join(
        f"{c} {p / pixels.sum():.1%}" for c, p in zip(classes, pixels.tolist(), strict=True)
    )
    if (pixels > 0).sum() < 2:
        raise StoreError(
            f"{masks}: all pixels are {classes[int(pixels.argmax())]}; check the masks, and which "
            "ids they hold."
        )
    task = Task(
        _name(config),
        "segmentation",
        NamedImages(folder, tuple(names)),
        files,
        tuple(classes),
        groups,
        notes=(f"pixels: {shares}", *notes),
    )
    return windowed(task, sizes, config.window) if config.window else task


def _refuse_shared(folder: Path, names: Sequence[str], masks: Mapping[str, str]) -> None:
    """StoreError for two images of one stem, whose mask, by stem in `masks`, would be the same."""
    of_stem: dict[str, str] = {}
    for name in names:
        other = of_stem.setdefault(_stem(name), name)
        if other != name:  # most likely one image in two formats, on both sides of a split
            raise StoreError(
                f"{folder}: {other} and {name} would share the mask {masks[_stem(name)]}; keep one."
            )


def _groups_of_masks(
    config: TaskConfig, folder: Path, names: Sequence[str]
) -> tuple[str, ...] | None:
    """The group of each image, of a column of the table or by the pattern; None: neither.

    Raises:
      ConfigError: a column without its table.
      StoreError: an image without a group.
    """
    if not config.group:
        return pattern_groups(names, config.group_pattern)
    if not config.labels:
        raise ConfigError(
            f"--task.group {config.group} is a column; name its CSV file by --task.labels."
        )
    table = Path(config.labels).expanduser()
    rows = label_rows(table, folder, config.file, config.group, config.group)
    none = [n for n in names if not rows.get(n, ("", ""))[1]]
    if none:
        raise StoreError(
            f"{table}: no {config.group} of {len(none):,} images ({few(none)}); an image of an "
            "unknown group could be on both sides of a split: fill it in."
        )
    return tuple(rows[n][1] for n in names)


def windowed(task: Task, sizes: Sequence[tuple[int, int]], side: int) -> Task:
    """A segmentation task in windows; without groups an image is one, so that none is torn."""
    windows, lost = grid(task.names, sizes, side)
    groups = dict(zip(task.names, task.groups or task.names, strict=True))
    return replace(
        task,
        images=WindowedImages(task.images, windows, side),
        targets=WindowedMasks(task.masks, task.names, windows, side),
        groups=tuple(groups[w.source] for w in windows),
        windows=windows,
        notes=(*task.notes, f"{lost:.1%} of the pixels, at edges, in no window"),
    )


def _folder(name: str) -> Path:
    folder = Path(name).expanduser()
    if not folder.is_dir():
        fact = "is not a folder" if folder.exists() else "does not exist"
        raise StoreError(f"{folder}: {fact}; name the folder of the images or masks.")
    return folder


def _name(config: TaskConfig) -> str:
    """What the set is called: its folder, or the one above where that is called `images`."""
    folder = Path(config.data).expanduser().absolute()
    if folder.name.lower() in ("images", "image", "img", "tiles"):
        folder = folder.parent
    what = config.label or config.target or ("masks" if config.masks else "")
    return f"{folder.name} {what}".strip()


def _stem(name: str) -> str:
    return str(Path(name).with_suffix(""))


def _by_stem(masks: Path) -> dict[str, str]:
    found: dict[str, str] = {}
    for name in image_names(masks):
        stem = _stem(name)
        if stem in found:
            raise StoreError(f"{masks}: {found[stem]} and {name} are masks of one image; keep one.")
        found[stem] = name
    return found


def _left_out(missing: Sequence[str], bare: Sequence[str], what: str) -> tuple[str, ...]:
    lines = []
    if missing:
        row = "mask" if what == "a mask" else "row"
        lines.append(f"{counted(len(missing), row)} without their image: {few(missing)}")
    if bare:
        lines.append(f"{counted(len(bare), 'image')} without {what}: {few(bare)}")
    return tuple(lines)
