"""Tasks without files, for tests of what is done with names, labels and groups."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from jaxhisto.task_config import TaskConfig
from jaxhisto.tasks.task import Task, open_task


@dataclass(frozen=True)
class Nameless:
    """Images that are all grey, by their names."""

    names: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.names)

    def read(self, i: int) -> np.ndarray:
        return np.full((8, 8, 3), i % 256, np.uint8)


def made_task(labels: Sequence[int], groups: Sequence[str] | None = None, names=()) -> Task:
    """A classification task with these labels; its images are called i000000, ..."""
    names = tuple(names) or tuple(f"i{i:06}" for i in range(len(labels)))
    classes = tuple(f"c{c}" for c in range(max(labels) + 1))
    return Task(
        "made",
        "classification",
        Nameless(names),
        np.array(labels, np.int64),
        classes,
        None if groups is None else tuple(groups),
    )


def shuffled(task: Task, seed: int = 1) -> Task:
    """The same task with its rows in another order."""
    order = np.random.default_rng(seed).permutation(len(task))
    return made_task(
        task.labels[order].tolist(),
        None if task.groups is None else [task.groups[i] for i in order],
        [task.names[i] for i in order],
    )


def opened(layout: str, folder: Path, **options) -> Task:
    """The task of a published layout below a folder."""
    return open_task(TaskConfig(layout=layout, data=str(folder), **options))


def named(task: Task, rows: np.ndarray) -> set[str]:
    return {task.names[i] for i in rows}
