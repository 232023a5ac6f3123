"""The eight sets of the paper's App. C.1, in the form in which they are published.

Each reader takes the folder that the archive was unpacked to, or one above it, and says what is
there less than was published. Where the names of images tell patient or slide, that is the group,
so that splits keep it whole; the paper divided by image (`--task.split-by image`).
"""

from __future__ import annotations

import csv
import os
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np

from jaxhisto.console import counted
from jaxhisto.data.folder_source import image_names
from jaxhisto.data.labelled import Labelled, few, read_labelled
from jaxhisto.data.named_images import NamedImages
from jaxhisto.errors import StoreError
from jaxhisto.special_files import no_pipe
from jaxhisto.task_config import TaskConfig
from jaxhisto.tasks.bach_slides import bach_segmentation
from jaxhisto.tasks.digestpath import digestpath2019
from jaxhisto.tasks.gleason import gleason2019
from jaxhisto.tasks.set_folders import count_note, find_folder, regex_groups
from jaxhisto.tasks.splits import by_image, checked_split
from jaxhisto.tasks.task import Task
from jaxhisto.tasks.task_files import labelled_task, numbers

BACH = ("Normal", "Benign", "InSitu", "Invasive")
BACH_LABELS = "microscopy_ground_truth.csv"
BREAKHIS = ("benign", "malignant")
# SOB_B_A-14-22549AB-40-001.png: biopsy, class, type, patient (year-number), magnification, number
BREAKHIS_PATIENT = r"SOB_[BM]_[A-Z]+-(\d+-[0-9A-Z]+)-(?:40|100|200|400)-\d+\.png$"
NCT = ("ADI", "BACK", "DEB", "LYM", "MUC", "MUS", "NORM", "STR", "TUM")
NCT_TRAIN, NCT_TEST = "NCT-CRC-HE-100K", "CRC-VAL-HE-7K"
LYMPH = ("CLL", "FL", "MCL")
LYMPH_CASE = r"([^/]+?)(?:-R\d+)?_\d+\.tif$"  # sj-05-588-R1_003.tif: case, section, number
BREASTPATHQ = (("train", "train_labels.csv"), ("validation", "val_labels.csv"))


def bach(config: TaskConfig) -> Task:
    """BACH, part A: 400 photographs of breast, four classes (Aresta et al. 2019).

    `Photos/CLASS/*.tif` and Photos/microscopy_ground_truth.csv, headerless (file, class), which
    has to agree with the folders. No patients are published.
    """
    photos = find_folder(config.data, "Photos", BACH)
    found = read_labelled(photos, classes=config.classes or BACH)
    note = _check_bach_labels(photos, found)
    return labelled_task("BACH", found, notes=(*count_note(len(found), 400), *note))


def breakhis(config: TaskConfig) -> Task:
    """BreakHis: 7,909 images of breast at four magnifications, benign or malignant.

    `breast/CLASS/SOB/TYPE/PATIENT/{40,100,200,400}X/*.png` (Spanhol et al. 2016); the group is the
    patient. Patient 13412 is published under two types, both malignant.
    """
    breast = find_folder(config.data, "breast", BREAKHIS)
    found = read_labelled(breast, classes=config.classes or BREAKHIS)
    groups = regex_groups(found.names, BREAKHIS_PATIENT, "the patient")
    return labelled_task("BreakHis", found, groups, count_note(len(found), 7909))


def nct_crc(config: TaskConfig) -> Task:
    """NCT-CRC-HE-100K with CRC-VAL-HE-7K as test set: nine classes of colorectal tissue.

    `NCT-CRC-HE-100K/CLASS/*.tif` is divided 3 : 1 into training and validation, of each class:
    75,000 and 25,000 (paper); all of `CRC-VAL-HE-7K/CLASS/*.tif`, 7,180, is tested on.
    """
    train_folder = find_folder(config.data, NCT_TRAIN, NCT)
    test_folder = find_folder(config.data, NCT_TEST, NCT)
    # Unpacked into a folder each, they lie in folders of their own names.
    root = Path(os.path.commonpath([train_folder, test_folder]))
    classes = config.classes or NCT
    parts = [read_labelled(folder, classes=classes) for folder in (train_folder, test_folder)]
    names = tuple(
        f"{part.folder.relative_to(root).as_posix()}/{name}"
        for part in parts
        for name in part.names
    )
    task = labelled_task(
        "NCT-CRC",
        Labelled(root, names, np.concatenate([part.labels for part in parts]), tuple(classes)),
        notes=(
            *count_note(len(parts[0]), 100_000, NCT_TRAIN),
            *count_note(len(parts[1]), 7180, NCT_TEST),
        ),
    )
    rows = np.arange(len(parts[0]))
    train, validation = by_image(task, task.labels, rows, (3, 1), config.split_seed)
    fixed = checked_split(task, train, validation, np.arange(len(rows), len(task)))
    return task.with_split(fixed)


def lymph(config: TaskConfig) -> Task:
    """Malignant lymphoma: 374 images of three kinds (Orlov et al. 2010; IICBU 2008).

    `{CLL,FL,MCL}/*.tif`; the group is the case in the name, whose sections (R1, R2) stay
    together. The paper pretrained on this set too (F.13, "andrewjanowczyk lymphoma").
    """
    root = find_folder(config.data, "", LYMPH)
    found = read_labelled(root, classes=config.classes or LYMPH)
    groups = regex_groups(found.names, LYMPH_CASE, "the case")
    return labelled_task("Lymph", found, groups, count_note(len(found), 374))


def breastpathq(config: TaskConfig) -> Task:
    """BreastPathQ: cellularity of 2,579 patches of breast, 0 to 100 % (Akbar et al. 2019).

    `datasets/{train,validation}/SLIDE_RID.tif`, with train_labels.csv and val_labels.csv (columns
    slide, rid, y in 0..1); the latter is published with the test patches, in
    `breastpathq-test`. Both parts are one set here, divided anew (paper: 2,579 patches; the test
    patches' scores are not public). The group is the slide.
    """
    root = find_folder(config.data, "", ("train", "validation"))
    names: list[str] = []
    values: list[float] = []
    notes: list[str] = []
    for part, table_name in BREASTPATHQ:
        table = _find_file(config.data, root, table_name)
        rows = _scores(table, part)
        there = set(image_names(root / part))
        used = [(f"{part}/{n}", y) for n, y in rows.items() if n in there]
        numeric = numbers(table, used, "y")
        wrong = [n for (n, _), y in zip(used, numeric, strict=True) if not 0 <= y <= 1]
        if wrong:
            raise StoreError(
                f"{table}: {len(wrong):,} cellularities are not in 0..1 ({few(wrong)}); restore "
                "the file as it was published."
            )
        names += [n for n, _ in used]
        values += numeric
        missing = [n for n in rows if n not in there]
        bare = sorted(there - set(rows))
        if missing:
            lost = counted(len(missing), "row")
            notes.append(f"{table_name}: {lost} without image: {few(missing)}")
        if bare:
            notes.append(f"{part}: {counted(len(bare), 'image')} without a score: {few(bare)}")
    if len(set(values)) < 2:
        raise StoreError(f"{root}: its patches have fewer than two cellularities; unpack all.")
    return Task(
        "BreastPathQ",
        "regression",
        NamedImages(root, tuple(names)),
        np.array(values, np.float64) * 100,
        groups=regex_groups(names, r"/(\d+)_\d+\.tif$", "the slide"),
        notes=(*count_note(len(names), 2579), *notes),
    )


READERS: dict[str, Callable[[TaskConfig], Task]] = {
    "bach": bach,
    "breakhis": breakhis,
    "nct_crc": nct_crc,
    "lymph": lymph,
    "gleason2019": gleason2019,
    "bach_segmentation": bach_segmentation,
    "digestpath2019": digestpath2019,
    "breastpathq": breastpathq,
}
"""The reader of each layout."""


def _check_bach_labels(photos: Path, found: Labelled) -> tuple[str, ...]:
    """What microscopy_ground_truth.csv says of images that are not there.

    Raises:
      StoreError: it contradicts a folder, or lists an image twice.
    """
    table = photos / BACH_LABELS
    if not table.exists():
        return (f"{BACH_LABELS} is not there: the folders alone say the class",)
    rows: dict[str, str] = {}
    for line, row in enumerate(_table(table), 1):
        if len(row) != 2:
            raise StoreError(f"{table}: line {line} is not FILE,CLASS; restore the file.")
        name, label = (cell.strip() for cell in row)
        if name in rows:
            raise StoreError(f"{table}: line {line} lists {name} a second time; keep one.")
        rows[name] = label
    folders = {n.rpartition("/")[2]: n.partition("/")[0] for n in found.names}
    wrong = [n for n, label in rows.items() if folders.get(n, label) != label]
    if wrong:
        raise StoreError(
            f"{table}: calls {wrong[0]} {rows[wrong[0]]}, but it lies in {folders[wrong[0]]} "
            f"({len(wrong):,} contradictions: {few(wrong)}); unpack the archive again."
        )
    missing = [n for n in rows if n not in folders and rows[n] in found.classes]
    bare = [n for n in folders if n not in rows]
    notes = []
    if missing:
        notes.append(f"{BACH_LABELS}: {counted(len(missing), 'row')} without image: {few(missing)}")
    if bare:
        notes.append(f"{len(bare):,} images are not in {BACH_LABELS}: {few(bare)}")
    return tuple(notes)


def _scores(table: Path, part: str) -> dict[str, str]:
    """The text of y by SLIDE_RID.tif."""
    rows: dict[str, str] = {}
    header, *lines = _table(table) or [[]]
    columns = [cell.strip().lower() for cell in header]
    absent = [c for c in ("slide", "rid", "y") if c not in columns]
    if absent:
        raise StoreError(
            f"{table}: no column {absent[0]!r}; its columns are {few(columns)}: restore the file "
            "as it was published."
        )
    slide, rid, y = (columns.index(c) for c in ("slide", "rid", "y"))
    for number, row in enumerate(lines, 2):
        if len(row) <= max(slide, rid, y):
            raise StoreError(f"{table}: line {number} is cut short; restore the file.")
        name = f"{_whole(row[slide])}_{_whole(row[rid])}.tif"
        if name in rows:
            raise StoreError(f"{table}: line {number} lists {name} a second time; keep one.")
        rows[name] = row[y].strip()
    return rows


def _whole(cell: str) -> str:
    """A whole number as it stands in file names: spreadsheets save 12 as 12.0."""
    return re.sub(r"\.0+$", "", cell.strip())


def _table(path: Path) -> list[list[str]]:
    """The rows of a CSV file that are not empty."""
    try:
        with no_pipe(path).open(newline="", encoding="utf-8-sig") as text:
            return [row for row in csv.reader(text) if any(cell.strip() for cell in row)]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise StoreError(f"{path}: cannot be read as CSV ({error}); check the file.") from error


def _find_file(data: str, root: Path, name: str) -> Path:
    """A file beside `root`'s folders, or the only one of that name below `data`."""
    if (root / name).is_file():
        return root / name
    found = sorted(Path(data).expanduser().rglob(name))
    if len(found) > 1:
        raise StoreError(f"{found[0]} and {found[1]} could both be meant; keep one.")
    if found:
        return found[0]
    raise StoreError(f"{data}: no {name} in here; unpack the archive that holds it here too.")
