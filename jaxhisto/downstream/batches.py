"""Which images a batch of supervised training is made of, and how they are read."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from numpy.typing import NDArray

from jaxhisto.console import say
from jaxhisto.errors import RunError

Rows = NDArray[np.int64]
Batch = tuple[NDArray[np.uint8], NDArray[Any]]


@dataclass(frozen=True)
class Part:
    """Images to train or to validate on.

    Fields:
      rows: (n,) int64, a number each, below 2^31; what order and augmentation are drawn for.
      load: (rows (m,), epoch) -> images (m, S, S, 3) uint8 RGB and targets (m, ...), of one shape
        for all; a function of its arguments alone. Epochs count from 0.
      name: what a row is called in errors.
    """

    rows: Rows
    load: Callable[[Rows, int], Batch]
    name: Callable[[int], str] = str


def fitting_batch(batch: int, images: int, devices: int) -> int:
    """Images in a batch: as asked for, or where there are fewer, as many eights as there are.

    Of fewer than eight images an epoch is one batch, which is filled up (`epoch_order`).

    Raises:
      RunError: the devices cannot share it.
    """
    if images >= batch:
        if batch % devices:
            raise RunError(
                f"--training.batch {batch}: {devices} devices cannot share it; take a multiple, or "
                "fewer --training.devices."
            )
        return batch
    # In eights, so that 1, 2, 4 and 8 devices train on the same batches.
    fewer = images - images % 8 or min(batch, 8)
    fewer = math.ceil(fewer / devices) * devices
    if fewer != batch:
        say(f"batch of {fewer} instead of {batch}: there are {images} images to train on")
    return fewer


def epoch_order(seed: int, epoch: int, n: int, batch: int) -> tuple[Rows, NDArray[np.float32]]:
    """The places of an epoch's images, batch after batch, and what each weighs in the loss.

    Returns:
      (batches, batch) int64 below n, and float32 0 or 1; each place weighs 1 once.
    """
    order = np.random.default_rng([seed, epoch]).permutation(n)
    batches = math.ceil(n / batch)
    places = np.resize(order, batches * batch)  # begins again with the first where they end
    weighs = (np.arange(batches * batch) < n).astype(np.float32)
    return places.reshape(batches, batch), weighs.reshape(batches, batch)


def ahead(
    part: Part, places: Rows, epoch: int, begin: int = 0
) -> Iterator[tuple[int, NDArray[np.uint8], NDArray[Any]]]:
    """(number, images, targets) of each batch, of this process's rows; one is read ahead."""
    share = places.shape[1] // jax.process_count()
    mine = places[:, share * jax.process_index() :][:, :share]
    with ThreadPoolExecutor(1, thread_name_prefix="batch") as pool:
        read = pool.submit(part.load, part.rows[mine[begin]], epoch)
        for i in range(begin, len(mine)):
            images, targets = read.result()
            if i + 1 < len(mine):
                read = pool.submit(part.load, part.rows[mine[i + 1]], epoch)
            yield i, images, targets
