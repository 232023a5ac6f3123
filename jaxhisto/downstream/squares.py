"""A task's images at one side, read from their files once where memory allows."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from jaxhisto.tasks.task import Task

Rows = NDArray[np.int64]
Squares = Callable[[Rows], NDArray[np.uint8]]


def squares(task: Task, side: int, rows: int, cache_gb: float, threads: int) -> Squares:
    """What gives images (m, side, side, 3) uint8 by row, as `Task.load`; not from two threads.

    Args:
      rows: how many different ones will be asked for.
      cache_gb: that they may take in memory; where they need more, each is read every time.
      threads: that read and decode; 0: one a core.
    """
    if rows * side * side * 3 > cache_gb * 1e9:
        return lambda wanted: task.load(wanted, side, threads)
    kept: dict[int, NDArray[np.uint8]] = {}

    def cached(wanted: Rows) -> NDArray[np.uint8]:
        new = [row for row in dict.fromkeys(wanted.tolist()) if row not in kept]
        if new:
            kept.update(zip(new, task.load(new, side, threads), strict=True))
        return np.stack([kept[row] for row in wanted.tolist()])

    return cached
