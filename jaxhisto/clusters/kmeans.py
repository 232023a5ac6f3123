"""Mini-batch k-means in JAX on rows that need not fit in memory (Sculley 2010; paper, sec. 5.3).

Seeds are drawn from a sample by k-means++ in rounds; mini-batches in a seeded order move the
centres to the running means of the rows nearest to them; an exact pass over all rows in order
(Lloyd) ends it, and one more assigns each row. Distances are computed in blocks of `BLOCK` rows
whatever the number of devices, and sums in one order, so that a seed gives the same numbers on 1
and on 4 devices.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import jax
import numpy as np
from jax.sharding import Mesh
from numpy.typing import NDArray

from jaxhisto.clusters.kmeans_programs import BATCH, Floats, Stepper, drawn, padded_k
from jaxhisto.distributed import make_mesh
from jaxhisto.errors import RunError

SAMPLE = 4096  # rows, or 3 k where that is more, that seeds are drawn from
ROUNDS = 128  # of seeding, at most; up to as many centres it is k-means++ as published
RUN = 64  # neighbouring rows read together where the rows do not fit in memory
FITS = 1 << 30  # bytes of rows that are read once and kept
STEPS = 24  # mini-batches at least
TINY = 0.01  # share of a cluster's even share of rows below which its centre is moved
CACHED = 256  # rows whose sums are taken at a time
CHUNK = 1 << 26  # bytes of rows read at a time


class Rows(Protocol):
    """(n, d) float32 that can be read in pieces."""

    def __len__(self) -> int: ...
    @property
    def width(self) -> int: ...
    def read(self, start: int, stop: int) -> Floats: ...


class Held:
    """An array, a memory map or an HDF5 dataset as `Rows`."""

    def __init__(self, array: NDArray[np.float32]) -> None:
        self._array = array

    def __len__(self) -> int:
        return len(self._array)

    @property
    def width(self) -> int:
        return int(self._array.shape[1])

    def read(self, start: int, stop: int) -> Floats:
        return np.asarray(self._array[start:stop], np.float32)


@dataclass(frozen=True)
class Moments:
    """Of all rows: (d,) float64 mean, and the sum of their squared distances from it."""

    mean: NDArray[np.float64]
    total: float


@dataclass(frozen=True)
class Clusters:
    """A clustering.

    Fields:
      centres: (k, d) float32, in the rows' units.
      labels: (n,) int32, the nearest centre of each row; of equal ones the first.
      distances: (n,) float32, Euclidean, of each row from it.
      sizes: (k,) int64, rows of each.
      inertia: sum of the squared distances.
      explained: 1 - inertia / total, the explained variance, 0..1.
    """

    centres: Floats
    labels: NDArray[np.int32]
    distances: Floats
    sizes: NDArray[np.int64]
    inertia: float
    explained: float


def moments(rows: Rows) -> Moments:
    """Mean and total sum of squares in one pass over shifted rows.

    Sums of `CACHED` rows are in float32, those over them in float64: six digits, at the speed of
    memory.

    Raises:
      RunError: no two rows differ.
    """
    shift = rows.read(0, 1)[0]
    sums, squares, n = np.zeros(rows.width), 0.0, len(rows)
    ones = np.ones(CACHED, np.float32)
    for _, chunk in in_chunks(rows):
        for start in range(0, len(chunk), CACHED):
            moved = chunk[start : start + CACHED] - shift
            sums += ones[: len(moved)] @ moved
            squares += float(np.vdot(moved, moved))
    total = squares - float(sums @ sums) / n
    # Rounding leaves some of the squares even where all rows are one.
    if not total > 1e-9 * squares:
        raise RunError(
            f"all {n:,} rows of features are the same, there is nothing to cluster; check the "
            "encoder and the tiles."
        )
    return Moments(shift + sums / n, total)


def kmeans(rows: Rows, k: int, seed: int, known: Moments, mesh: Mesh) -> Clusters:
    """Clusters rows by Euclidean distance.

    Memory: `FITS` or the rows, whichever is less; a sample of max(`SAMPLE`, 3 k) rows; a few
    k x d and k x `BLOCK` arrays.

    Args:
      rows: (n, d), finite.
      k: clusters, 1..n.
      seed: of the sample, the seeds and the order.
      known: `moments(rows)`.
      mesh: the devices that share the distances; set around the call.

    Raises:
      RunError: more clusters than rows.
    """
    if k > len(rows):
        raise RunError(
            f"--k {k:,}: there are {len(rows):,} rows; ask for at most as many clusters."
        )
    mean = known.mean.astype(np.float32)
    centred = _Centred(rows, mean)
    stepper = Stepper(mesh, k, rows.width)
    centres = _mini_batches(centred, _seeds(centred, k, seed), stepper, seed)
    centres = _lloyd(centred, centres, stepper)
    labels, squares, _, sizes = _assigned(centred, centres, stepper)
    inertia = float(squares.sum(dtype=np.float64))
    return Clusters(
        centres + mean,
        labels,
        np.sqrt(squares),
        sizes,
        inertia,
        max(0.0, 1 - inertia / known.total),
    )


def elbow(ks: NDArray[np.int64], explained: NDArray[np.float64]) -> int | None:
    """Where the curve of explained variance bends most (Satopaa et al. 2011, "kneedle").

    Both axes are scaled to 0..1 over the range measured; the elbow is the k whose point lies
    highest above the chord from the first to the last one, the smallest of equal ones.

    Args:
      ks: (m,) ascending.
      explained: (m,) of each.

    Returns:
      The k, or none: fewer than three points, or no point above the chord.
    """
    if len(ks) < 3:
        return None
    x = (ks - ks[0]) / (ks[-1] - ks[0])
    span = explained[-1] - explained[0]
    above = (explained - explained[0]) / span - x if span > 0 else np.zeros(len(ks))
    best = int(np.argmax(above))
    return int(ks[best]) if above[best] > 1e-9 else None


def in_chunks(rows: Rows) -> Iterator[tuple[int, Floats]]:
    """(first row, rows) in order, `CHUNK` bytes at a time."""
    step = max(1, CHUNK // (4 * rows.width))
    for start in range(0, len(rows), step):
        yield start, rows.read(start, min(start + step, len(rows)))


class _Centred:
    """Rows less their mean, in a seeded order: a common offset would cost distances their digits.

    What fits in memory is read once and shuffled row by row, the rest is read from its file in
    runs of `RUN` neighbours; that depends on the size of the data alone.
    """

    def __init__(self, rows: Rows, mean: Floats) -> None:
        self._n, self.width = len(rows), rows.width
        self._rows, self._mean = rows, mean
        self._held: Floats | None = None
        if self._n * self.width * 4 <= FITS:
            self._held = rows.read(0, self._n)

    def __len__(self) -> int:
        return self._n

    def read(self, start: int, stop: int) -> Floats:
        """Rows in the order of the file."""
        rows = self._rows if self._held is None else Held(self._held)
        return rows.read(start, stop) - self._mean

    def batches(self, seed: int, number: int, most: int) -> Iterator[Floats]:
        """All rows once, in the order of (seed, number), in batches of at most `most` rows."""
        random = np.random.default_rng([seed, number])
        count = math.ceil(self._n / most)
        if self._held is not None:
            for chosen in np.array_split(random.permutation(self._n), count):
                yield self._held[chosen] - self._mean
            return
        for runs in np.array_split(random.permutation(math.ceil(self._n / RUN)), count):
            parts = [self.read(at * RUN, min((at + 1) * RUN, self._n)) for at in runs]
            whole = np.concatenate(parts)
            for start in range(0, len(whole), most):  # a split of runs may be a run too long
                yield whole[start : start + most]


def _seeds(rows: _Centred, k: int, seed: int) -> Floats:
    """(k, d) rows of a sample, drawn by greedy k-means++ (Arthur & Vassilvitskii 2007).

    Each round draws some candidates with probability as their squared distance from what is
    chosen, several times, and takes the draw that leaves the least sum of squares. A round adds
    one centre up to `ROUNDS` of them, more beyond, as k-means|| does (Bahmani et al. 2012).
    """
    wanted = min(len(rows), max(SAMPLE, 3 * k))
    parts: list[Floats] = []
    for batch in rows.batches(seed, 0, BATCH):
        parts.append(batch[: wanted - sum(map(len, parts))])
        if sum(map(len, parts)) == wanted:
            break
    each = math.ceil(k / ROUNDS)
    draws = 2 + int(math.log(padded_k(k))) if each == 1 else 3
    # One device: what the others would do beside it is the same.
    with jax.set_mesh(make_mesh(1)):
        sample, key, rounds = np.concatenate(parts), jax.random.key(seed), math.ceil(k / each)
        chosen = drawn(sample, key, np.int32(rounds), padded_k(k) // each + 1, each, draws)
        return sample[np.asarray(chosen)[:k]]


def _mini_batches(rows: _Centred, centres: Floats, stepper: Stepper, seed: int) -> Floats:
    """Passes over the rows in mini-batches; centres that hold next to nothing are moved."""
    k, moved = len(centres), stepper.put(_filled(centres))
    counts = stepper.put(np.zeros(len(moved), np.float32))
    for number in range(1, passes_over(len(rows)) + 1):
        for batch in rows.batches(seed, number, BATCH):
            # Half a pass ago the centres were others: what was counted then is forgotten.
            keep = max(0.0, 1 - 2 * len(batch) / len(rows))
            held = stepper.padded(batch)
            moved, counts, squares = stepper.step(moved, counts, held, len(batch), keep)
        of = np.asarray(counts)[:k]
        tiny = np.flatnonzero(of < TINY * of.mean())
        far = np.asarray(squares)[: len(batch)].astype(np.float64)
        tiny = tiny[: int((far > 0).sum())]
        if len(tiny):
            random = np.random.default_rng([seed, number, 1])
            at = random.choice(len(batch), len(tiny), replace=False, p=far / far.sum())
            fresh, fewer = np.array(moved), np.array(counts)
            fresh[tiny], fewer[tiny] = batch[at], 0
            moved, counts = stepper.put(fresh), stepper.put(fewer)
    return np.asarray(moved)[:k]


def _filled(centres: Floats) -> Floats:
    """Zeros below the centres."""
    return np.pad(centres, ((0, padded_k(len(centres)) - len(centres)), (0, 0)))


def passes_over(n: int) -> int:
    """Passes in mini-batches over n rows: one, and more where that is fewer than `STEPS`."""
    return max(1, math.ceil(STEPS / math.ceil(n / BATCH)))


def _assigned(
    rows: _Centred, centres: Floats, stepper: Stepper, sums: bool = False
) -> tuple[NDArray[np.int32], Floats, Floats | None, NDArray[np.int64]]:
    """Labels and squared distances of all rows, and sums (where asked for) and sizes of clusters.

    Of what was read before the next is, so that the devices have work and memory stays bounded.
    """
    on_devices = stepper.put(_filled(centres))
    labels, squares = np.empty(len(rows), np.int32), np.empty(len(rows), np.float32)
    total: tuple[jax.Array, jax.Array] | None = None
    waiting: tuple[int, int, jax.Array, jax.Array] | None = None

    def collect(start: int, held: int, near: jax.Array, far: jax.Array) -> None:
        labels[start : start + held] = np.asarray(near)[:held]
        squares[start : start + held] = np.asarray(far)[:held]

    for start in range(0, len(rows), BATCH):
        chunk = rows.read(start, min(start + BATCH, len(rows)))
        padded = stepper.padded(chunk)
        near, far = stepper.nearest(padded, on_devices)
        if sums:
            new = stepper.sums(padded, near, len(chunk))
            total = new if total is None else stepper.add(total, new)
        if waiting is not None:
            collect(*waiting)
        waiting = start, len(chunk), near, far
    if waiting is not None:
        collect(*waiting)
    sizes = np.bincount(labels, minlength=len(centres)).astype(np.int64)
    return labels, squares, None if total is None else np.asarray(total[0])[: len(centres)], sizes


def _lloyd(rows: _Centred, centres: Floats, stepper: Stepper) -> Floats:
    """Each centre at the mean of its rows; those without any at the rows that lie farthest."""
    _, squares, sums, sizes = _assigned(rows, centres, stepper, sums=True)
    assert sums is not None
    means = np.where(
        sizes[:, None] > 0, sums / np.maximum(sizes, 1)[:, None].astype(np.float32), centres
    ).astype(np.float32, copy=False)
    empty = np.flatnonzero(sizes == 0)
    for cluster, row in zip(empty, np.argsort(-squares, kind="stable")[: len(empty)], strict=True):
        means[cluster] = rows.read(int(row), int(row) + 1)[0]
    return means
