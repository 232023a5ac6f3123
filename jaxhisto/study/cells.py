"""The cells of a study: what makes each one the same, and its file, written when it is finished.

A cell is one training and test: encoder x task x share of the labels x repeat x setting. Its file
is named by a hash of all that it depends on, so a changed study computes what has changed alone.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from jaxhisto.errors import StoreError
from jaxhisto.metrics import Scores
from jaxhisto.runlog import write_atomically
from jaxhisto.settings import identity
from jaxhisto.study.file import FROZEN, OWN, PROBE_FIELDS, Study
from jaxhisto.task_config import TaskConfig
from jaxhisto.tasks.splits import fraction
from jaxhisto.tasks.task import Split, Task

FORMAT = "jaxhisto-cell-1"
CELLS, RUNS = "cells", "runs"
ALWAYS_ALIKE = ("linear", "knn")  # of the same images the same: one repeat at 100 % says it all
Three = tuple[float, float, float]


@dataclass(frozen=True)
class Entry:
    """One encoder of a row.

    Fields:
      row: of the tables; index: its place among the row's files (the pretraining seed).
      name: as `open_encoder` takes it; mean, std: what the file does not say.
      sha256, arch: of the encoder.
    """

    row: str
    index: int
    name: str
    mean: Three | None
    std: Three | None
    sha256: str
    arch: str


@dataclass(frozen=True, eq=False)
class Ready:
    """A task that was opened: `data_hash` is of its images, `hash` of all that is learnt from."""

    name: str
    config: TaskConfig
    task: Task
    split: Split
    data_hash: str
    hash: str


@dataclass(frozen=True, eq=False)
class Cell:
    """One training and test.

    Fields:
      features: of the task's images from this encoder, (n, d) float32, when called.
      out: the study's folder.
      devices, threads: to compute with.
    """

    study: Study
    setting: str
    entry: Entry
    ready: Ready
    percent: float
    repeat: int
    features: Callable[[Entry, Ready], NDArray[np.float32]]
    out: Path
    devices: int = 0
    threads: int = 0

    @property
    def training_seed(self) -> int:
        """Of initial weights and batches: another one for each repeat."""
        return training_seed(self.study, self.repeat)

    @property
    def train(self) -> NDArray[np.int64]:
        """The training rows of this share and repeat."""
        return train_rows(self.study, self.ready, self.percent, self.repeat)

    def identity(self) -> dict[str, Any]:
        """All that its scores depend on, as JSON values."""
        study = self.study
        if self.setting in FROZEN:
            own = {name: getattr(study.probe, name) for name in PROBE_FIELDS}
        else:
            own = {
                key: value
                for key, value in identity(study.others[self.setting]).items()
                if key.split(".")[0] not in OWN
            }
        return {
            "format": FORMAT,
            "setting": self.setting,
            "encoder_sha256": self.entry.sha256,
            "feeding": [self.entry.mean, self.entry.std],
            "task_sha256": self.ready.hash,
            "split_sha256": self.ready.split.sha256,
            "side": self.ready.config.side,
            "percent": self.percent,
            "repeat": self.repeat,
            "seed": study.seed,
            "scarce": study.probe.scarce,
            "settings": own,
        }

    @cached_property
    def hash(self) -> str:
        """Of `identity`, hexadecimal."""
        text = json.dumps(self.identity(), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()

    @property
    def stem(self) -> str:
        """Of its files' names."""
        return f"{self.setting}-{self.hash[:24]}"

    @property
    def run(self) -> Path:
        """Folder in which a setting that trains a network goes on after a kill."""
        return self.out / RUNS / self.stem

    @property
    def words(self) -> str:
        """`last_layer, random (file 2), her2st, 5 %, repeat 3`: for a person."""
        return (
            f"{self.setting}, {self.entry.row} (file {self.entry.index + 1}), {self.ready.name}, "
            f"{self.percent:g} %, repeat {self.repeat}"
        )


@dataclass(frozen=True, eq=False)
class Outcome:
    """What a cell found.

    Fields:
      chosen: what the validation images chose, by name.
      validation, test: scores by name; NaN where one is not defined.
      predictions: of the test images, in the order of the split: (m, C) class probabilities, (m,)
        numbers, or (m, C, C) pixels by true and predicted class.
    """

    chosen: Mapping[str, float]
    validation: Scores
    test: Scores
    predictions: NDArray[Any]


def train_rows(study: Study, ready: Ready, percent: float, repeat: int) -> NDArray[np.int64]:
    """The rows trained on: so many percent of the training part."""
    if percent >= 100:
        return ready.split.train
    # `segment` draws with the seed of its training, which is the repeat's own.
    segmented = ready.task.kind == "segmentation"
    seed = training_seed(study, repeat) if segmented else study.seed
    return fraction(ready.task, ready.split, percent, repeat, seed, study.probe.scarce)


def training_seed(study: Study, repeat: int) -> int:
    """Of initial weights and batches in a repeat."""
    return 1000 * study.seed + repeat


def cells_of(
    study: Study,
    entries: list[Entry],
    tasks: list[Ready],
    features: Callable[[Entry, Ready], NDArray[np.float32]],
    out: Path,
    devices: int = 0,
    threads: int = 0,
) -> Iterator[Cell]:
    """All cells, those of one encoder and task after each other, as they share features."""
    for ready in tasks:
        for entry in entries:
            for setting in study.settings:
                if not applies(setting, ready.task.kind, entry.arch):
                    continue
                for percent in study.percents:
                    once = setting in ALWAYS_ALIKE and percent >= 100
                    for repeat in range(1 if once else study.repeats):
                        yield Cell(
                            study,
                            setting,
                            entry,
                            ready,
                            percent,
                            repeat,
                            features,
                            out,
                            devices,
                            threads,
                        )


def applies(setting: str, kind: str, arch: str) -> bool:
    """Whether a setting is one for such a task and encoder."""
    if (setting == "segment") != (kind == "segmentation"):
        return False
    return setting in FROZEN or arch.startswith("resnet")


def write_cell(cell: Cell, outcome: Outcome) -> None:
    """Writes the predictions and then the record, each whole or not at all.

    Raises:
      StoreError: it cannot be written.
    """
    folder = cell.out / CELLS
    record = {
        **cell.identity(),
        "encoder": cell.entry.name,
        "task": cell.ready.name,
        "images": {
            "train": len(cell.train),
            "validation": len(cell.ready.split.validation),
            "test": len(cell.ready.split.test),
        },
        "chosen": _numbers(outcome.chosen),
        "validation": _numbers(outcome.validation),
        "test": _numbers(outcome.test),
    }
    held = io.BytesIO()
    names = np.array([cell.ready.task.names[i] for i in cell.ready.split.test])
    np.savez_compressed(held, predictions=outcome.predictions, names=names)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / cell.stem
        temporary = path.with_name(f".{path.name}.{os.getpid()}")
        try:
            temporary.write_bytes(held.getvalue())
            os.replace(temporary, f"{path}.npz")
        finally:
            temporary.unlink(missing_ok=True)  # of a full disk
        write_atomically(f"{path}.json", json.dumps(record, indent=1) + "\n")
    except OSError as error:
        raise StoreError(
            f"{folder}: cannot be written ({error.strerror}); free some space or choose another "
            "--out; finished cells are kept."
        ) from error
    shutil.rmtree(cell.run, ignore_errors=True)


def read_cell(cell: Cell) -> Outcome | None:
    """What is there of a cell; None where it has to be computed."""
    path = cell.out / CELLS / cell.stem
    try:
        record = json.loads(Path(f"{path}.json").read_text(encoding="utf-8"))
        with np.load(f"{path}.npz") as held:
            predictions = held["predictions"]
        chosen, validation, test = (_floats(record[k]) for k in ("chosen", "validation", "test"))
        return Outcome(chosen, validation, test, predictions)
    except (OSError, ValueError, KeyError, EOFError):
        return None  # absent, or cut short by a full disk


def clear_halves(out: Path) -> None:
    """Removes what a kill left of cells that were being written; OUT is this process's own."""
    for path in (out / CELLS).glob(".*"):
        path.unlink(missing_ok=True)


def is_there(cell: Cell) -> bool:
    """Whether a cell is finished; `read_cell` says whether it is sound."""
    path = cell.out / CELLS / cell.stem
    return Path(f"{path}.json").is_file() and Path(f"{path}.npz").is_file()


def _numbers(values: Mapping[str, float]) -> dict[str, float | None]:
    return {k: float(v) if np.isfinite(v) else None for k, v in values.items()}


def _floats(values: Mapping[str, float | None]) -> dict[str, float]:
    return {k: float("nan") if v is None else v for k, v in values.items()}
