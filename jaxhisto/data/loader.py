"""Tiles -> shuffle -> decode -> host batches; what is in a batch is f(seed, step, row).

There is no loader state: a run resumes by asking for its next step, and 1, 2 or 4 processes
see the same global batch, each its own rows of it. Reading runs in threads (decoders let go of
Python's lock).
"""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakValueDictionary, finalize

import numpy as np
from numpy.typing import NDArray

from jaxhisto.config import DataConfig
from jaxhisto.data.sources import Batch, Tiles
from jaxhisto.errors import ConfigError, StoreError

# Rows that one thread reads at a go: enough that handing them over costs nothing beside
# decoding them, few enough that a small batch still keeps several threads busy.
PIECE_ROWS = 8

ROUNDS = 8


def batches(
    tiles: Tiles,
    config: DataConfig,
    batch_size: int,
    seed: int,
    start_step: int,
    stop_step: int,
    process: int = 0,
    processes: int = 1,
) -> Generator[tuple[int, Batch], None, None]:
    """Yields (step, this process's rows of the batch) for start_step <= step < stop_step.

    Args:
      batch_size: N, rows of the global batch; process p gets rows p*N/processes onwards.
      config: `threads` and `prefetch`; neither changes what is yielded.

    Closing the generator (or dropping it) stops the threads.

    Raises:
      StoreError: on the call, fewer tiles than rows; while iterating, a tile that cannot be
        read, which is named.
      ConfigError: on the call, rows that do not divide among the processes.
    """
    rows = process_rows(tiles.name, len(tiles), batch_size, process, processes)
    pieces = _Pieces(tiles, batch_size, seed, range(start_step, stop_step), rows)
    return _joined(pieces, config)


def process_rows(name: str, n_tiles: int, batch_size: int, process: int, processes: int) -> range:
    """The rows of a global batch that are a process's: p*N/processes onwards.

    Raises:
      StoreError: fewer tiles than rows; `name` says of what.
      ConfigError: rows that do not divide among the processes.
    """
    if batch_size > n_tiles:
        raise StoreError(
            f"{name}: {n_tiles} tiles cannot fill a batch of {batch_size} without "
            f"repeating some; pass --batch-size {n_tiles} or less, or add data."
        )
    if batch_size < 1 or batch_size % processes:
        raise ConfigError(
            f"--batch-size {batch_size} does not divide among {processes} processes; "
            f"pass a multiple of {processes}."
        )
    n = batch_size // processes
    return range(process * n, (process + 1) * n)


def cores() -> int:
    """The cores this process may use: fewer than the machine's in a container or under taskset."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def global_indices(seed: int, step: int, n_tiles: int, batch_size: int) -> NDArray[np.int64]:
    """The tiles in the global batch of a step, by row.

    Each epoch has n_tiles // batch_size steps and is a permutation of its own, so no tile is
    twice in a batch or in an epoch. The n_tiles % batch_size tiles at a permutation's end are
    left out of that epoch; they are others in the next.

    Returns:
      (batch_size,) int64 in 0..n_tiles-1; a function of the arguments alone.
    """
    return _indices(seed, step, n_tiles, batch_size, range(batch_size))


@dataclass(frozen=True)
class _Piece:
    """Rows of a batch that have been read; all pieces of a batch hold the same one."""

    batch: Batch
    rows: slice


class _Pieces(Sequence[_Piece]):
    """The rows of all steps, cut into pieces of at most PIECE_ROWS that never span two steps.

    A batch is allocated with the first of its pieces, and each is decoded to its place in it:
    joining them afterwards would copy every pixel once more. It lives as long as anyone holds a
    piece of it.
    """

    def __init__(self, tiles: Tiles, batch_size: int, seed: int, steps: range, rows: range) -> None:
        self.tiles, self.batch_size, self.seed, self.steps = tiles, batch_size, seed, steps
        self.rows = rows
        self.parts = [
            slice(i, min(i + PIECE_ROWS, len(rows))) for i in range(0, len(rows), PIECE_ROWS)
        ]
        self._lock = threading.Lock()
        self._begun: WeakValueDictionary[int, Batch] = WeakValueDictionary()
        self._canvases = _Canvases((len(rows), *tiles.canvas, 3))

    def __len__(self) -> int:
        return len(self.steps) * len(self.parts)

    def __getitem__(self, i: int) -> _Piece:  # type: ignore[override]  # Grain takes no slices
        step, part = divmod(i, len(self.parts))
        with self._lock:
            batch = self._begun.get(step)
            if batch is None:
                batch = self._begun[step] = self._empty(self.steps[step])
        piece = _Piece(batch, self.parts[part])
        _read(self.tiles, piece)
        return piece

    def _empty(self, step: int) -> Batch:
        index = _indices(self.seed, step, len(self.tiles), self.batch_size, self.rows)
        return Batch(index, self._canvases.take(), np.zeros((len(index), 2), np.int32))


class _Canvases:
    """Memory of batches, taken again once no array refers to it any more.

    To get it anew from the system, page by page, took a tenth of the time of a batch.
    """

    def __init__(self, shape: tuple[int, ...]) -> None:
        self._shape, self._free = shape, list[NDArray[np.uint8]]()

    def take(self) -> NDArray[np.uint8]:
        """An array of the shape, with anything in it."""
        try:
            memory = self._free.pop()
        except IndexError:
            memory = np.empty(self._shape, np.uint8)
        lent = _Lent(memory.__array_interface__)
        # When the array and all views of it are gone, whoever made them: each holds `lent`.
        finalize(lent, self._free.append, memory).atexit = False
        return np.asarray(lent)


class _Lent:
    """What NumPy makes an array of and then holds, as the array's and its views' `base`."""

    def __init__(self, interface: dict[str, Any]) -> None:
        self.__array_interface__ = interface


def _read(tiles: Tiles, piece: _Piece) -> None:
    batch, rows = piece.batch, piece.rows
    for row, i in enumerate(batch.index[rows].tolist(), rows.start):
        canvas = batch.tiles[row]
        tile = tiles.read(i, canvas)
        h, w = tile.shape[:2]
        if tile is not canvas:
            canvas[:h, :w] = tile
            canvas[h:] = canvas[:h, w:] = 0
        batch.sizes[row] = h, w


def _joined(pieces: _Pieces, config: DataConfig) -> Generator[tuple[int, Batch], None, None]:
    if not len(pieces):
        return
    import grain  # imports jax, which takes a second: only where batches are wanted

    a_step = len(pieces.parts)
    ahead = config.prefetch * a_step
    # A queue shorter than the threads would leave some idle, and Grain complains.
    threads = min(config.threads or cores(), max(ahead, 1))
    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=ahead)
    dataset = grain.MapDataset.source(pieces).to_iter_dataset(options)
    iterator = iter(
        grain.experimental.ThreadPrefetchIterDataset(
            dataset.batch(a_step, batch_fn=_whole), prefetch_buffer_size=min(config.prefetch, 1)
        )
    )
    try:
        yield from zip(pieces.steps, iterator, strict=True)
    finally:
        iterator.close()


def _whole(pieces: Sequence[_Piece]) -> Batch:
    """The batch that these are all pieces of."""
    batch = pieces[0].batch
    if any(piece.batch is not batch for piece in pieces):
        raise AssertionError("pieces of two batches under one step")  # rows would be missing
    return batch


def _indices(seed: int, step: int, n_tiles: int, batch_size: int, rows: range) -> NDArray[np.int64]:
    epoch, position = divmod(step, n_tiles // batch_size)
    places = np.arange(rows.start, rows.stop, dtype=np.uint64) + np.uint64(position * batch_size)
    return _permute(places, n_tiles, _keys(seed, epoch)).astype(np.int64)


def _keys(seed: int, epoch: int) -> NDArray[np.uint64]:
    digest = hashlib.blake2b(f"jaxhisto order {seed} {epoch}".encode(), digest_size=8 * ROUNDS)
    return np.frombuffer(digest.digest(), "<u8").astype(np.uint64)


def _permute(places: NDArray[np.uint64], size: int, keys: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Where a keyed permutation of 0..size-1 sends `places`: a Feistel network, cycle-walked.

    Ours, because the order is part of a run's identity: NumPy may change its permutations
    between releases (NEP 19), a whole permutation of a large set is memory, and Grain's
    index_shuffle at its 4 rounds leaves a tenth too many neighbours side by side.
    """
    half = np.uint64((max(size - 1, 1).bit_length() + 1) // 2)
    out = _feistel(places, half, keys)
    while (outside := out >= size).any():
        out[outside] = _feistel(out[outside], half, keys)
    return out


def _feistel(
    x: NDArray[np.uint64], half: np.uint64, keys: NDArray[np.uint64]
) -> NDArray[np.uint64]:
    mask = (np.uint64(1) << half) - np.uint64(1)
    left, right = x >> half, x & mask
    for key in keys:
        left, right = right, left ^ (_mix(right ^ key) & mask)
    return (left << half) | right


def _mix(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    # SplitMix64's finaliser (Steele, Lea, Flood 2014): every input bit reaches every output bit.
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
