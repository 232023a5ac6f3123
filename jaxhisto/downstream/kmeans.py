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
from functools import cache, partial
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from numpy.typing import NDArray

from jaxhisto.distributed import make_mesh
from jaxhisto.errors import RunError

Floats = NDArray[np.float32]
Pair = tuple[jax.Array, jax.Array]
EXACT = jax.lax.Precision.HIGHEST  # TF32 would move rows between clusters

BLOCK = 1024  # rows of one product
BATCH = 4096  # rows of a mini-batch
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
      explained: 1 - inertia / total, the explained variance, at most 1.
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
    stepper = _Stepper(mesh, k, rows.width)
    centres = _mini_batches(centred, _seeds(centred, k, seed), stepper, seed)
    centres = _lloyd(centred, centres, stepper)
    labels, squares, _, sizes = _assigned(centred, centres, stepper)
    inertia = float(squares.sum(dtype=np.float64))
    return Clusters(
        centres + mean, labels, np.sqrt(squares), sizes, inertia, 1 - inertia / known.total
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
        chosen = _drawn(sample, key, np.int32(rounds), padded_k(k) // each + 1, each, draws)
        return sample[np.asarray(chosen)[:k]]


@partial(jax.jit, static_argnums=(3, 4, 5))
def _drawn(
    sample: jax.Array, key: jax.Array, rounds: jax.Array, most: int, each: int, draws: int
) -> jax.Array:
    """(most * each,) int32 rows of the sample, of which the first rounds * each are drawn."""
    s = len(sample)
    squares = (sample * sample).sum(1)

    def one_round(r: jax.Array, state: tuple[jax.Array, jax.Array]):
        chosen, distance = state
        noise = jax.random.gumbel(jax.random.fold_in(key, r), (draws, s))
        # The largest of log p + Gumbel noise are draws without replacement (Vieira 2014).
        found = jax.lax.top_k(jnp.log(distance)[None] + noise, each)[1]
        flat = found.reshape(-1)
        product = jnp.matmul(sample[flat], sample.T, precision=EXACT)
        near = squares[flat][:, None] + squares[None] - 2 * product
        near = jnp.maximum(near, 0.0).reshape(draws, each, s).min(1)
        # Before the first round all distances are one, for equal chances.
        left = jnp.where(r == 0, near, jnp.minimum(near, distance[None]))
        best = jnp.argmin(left.sum(1))
        chosen = jax.lax.dynamic_update_slice(chosen, found[best].astype(jnp.int32), (r * each,))
        return chosen, left[best]

    start = jnp.zeros(most * each, jnp.int32), jnp.ones(s, jnp.float32)
    chosen, _ = jax.lax.fori_loop(jnp.int32(0), rounds, one_round, start)
    return chosen


def _mini_batches(rows: _Centred, centres: Floats, stepper: _Stepper, seed: int) -> Floats:
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


def padded_k(k: int) -> int:
    """Centres of a compiled program for k: up to an eighth more, so that few k's need their own."""
    step = 1 << max(0, k.bit_length() - 4)
    return max(64, -(-k // step) * step)


def _filled(centres: Floats) -> Floats:
    """Zeros below the centres."""
    return np.pad(centres, ((0, padded_k(len(centres)) - len(centres)), (0, 0)))


def passes_over(n: int) -> int:
    """Passes in mini-batches over n rows: one, and more where that is fewer than `STEPS`."""
    return max(1, math.ceil(STEPS / math.ceil(n / BATCH)))


def _assigned(
    rows: _Centred, centres: Floats, stepper: _Stepper, sums: bool = False
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


def _lloyd(rows: _Centred, centres: Floats, stepper: _Stepper) -> Floats:
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


class _Stepper:
    """The compiled programs, and rows brought to the devices in one shape."""

    def __init__(self, mesh: Mesh, k: int, width: int) -> None:
        devices = mesh.devices.size
        self.rows = math.ceil(BATCH / (BLOCK * devices)) * BLOCK * devices
        self._whole = NamedSharding(mesh, P())
        self._k = np.int32(k)
        programs = _programs(mesh, padded_k(k))
        self._nearest, self._sums, self._step, self._add = programs

    def put(self, array: np.ndarray) -> jax.Array:
        """The array on every device."""
        return jax.device_put(array, self._whole)

    def padded(self, rows: Floats) -> jax.Array:
        """Up to `self.rows` rows, zeros below them, on every device."""
        if len(rows) < self.rows:
            full = np.zeros((self.rows, rows.shape[1]), np.float32)
            full[: len(rows)] = rows
            rows = full
        return self.put(rows)

    def nearest(self, rows: jax.Array, centres: jax.Array) -> Pair:
        """Labels and squared distances; see `_nearest`."""
        return self._nearest(rows, centres, self._k)

    def sums(self, rows: jax.Array, labels: jax.Array, held: int) -> Pair:
        """Sums and counts of the first `held` rows by label."""
        return self._sums(rows, labels, np.int32(held))

    def add(self, a: Pair, b: Pair) -> Pair:
        """Sum by sum."""
        return self._add(a, b)

    def step(
        self, centres: jax.Array, counts: jax.Array, rows: jax.Array, held: int, keep: float
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """A mini-batch; see `_step`."""
        return self._step(centres, counts, rows, self._k, np.int32(held), np.float32(keep))


@cache
def _programs(mesh: Mesh, size: int) -> tuple[Any, Any, Any, Any]:
    """`_nearest`, `_sums`, `_step` and an addition, compiled once for all k of one padded size."""
    # Atomic additions of a GPU's scatter come in any order; a product does not.
    scatter = mesh.devices.flat[0].platform == "cpu"
    return (
        jax.jit(partial(_nearest, mesh)),
        jax.jit(partial(_sums, size, scatter)),
        jax.jit(partial(_step, mesh, size, scatter)),
        jax.jit(lambda a, b: jax.tree.map(jnp.add, a, b)),
    )


def _nearest(mesh: Mesh, rows: jax.Array, centres: jax.Array, k: jax.Array) -> Pair:
    """Of (m, d) rows: (m,) int32 nearest of the first k centres, (m,) float32 squared distance."""

    def share(rows: jax.Array, centres: jax.Array, k: jax.Array) -> tuple[jax.Array, jax.Array]:
        number = jnp.arange(len(centres), dtype=jnp.int32)
        half = jnp.where(number < k, 0.5 * (centres * centres).sum(1), jnp.inf)

        def block(rows: jax.Array) -> tuple[jax.Array, jax.Array]:
            score = half[:, None] - jnp.matmul(centres, rows.T, precision=EXACT)
            least = score.min(0)
            # Two plain reductions: XLA's argmin costs as much as the product on a CPU.
            hits = jnp.where(score == least[None], number[:, None], jnp.int32(len(centres)))
            return hits.min(0), 2 * least + (rows * rows).sum(1)

        # A product's rounding depends on its shape: blocks of one size on any number of devices.
        labels, squares = jax.lax.map(block, rows.reshape(-1, BLOCK, rows.shape[1]))
        return labels.reshape(-1), squares.reshape(-1)

    split = jax.shard_map(share, mesh=mesh, in_specs=(P("data"), P(), P()), out_specs=P("data"))
    labels, squares = split(jax.reshard(rows, P("data")), centres, k)
    return jax.reshard(labels, P()), jnp.maximum(jax.reshard(squares, P()), 0.0)


def _sums(
    k: int, scatter: bool, rows: jax.Array, labels: jax.Array, held: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """(k, d) sum and (k,) float32 number of the first `held` rows of each label."""
    labels = jnp.where(jnp.arange(len(labels), dtype=jnp.int32) < held, labels, jnp.int32(k))
    counts = jnp.bincount(labels, length=k + 1)[:k].astype(jnp.float32)
    if scatter:
        return jax.ops.segment_sum(rows, labels, k + 1)[:k], counts
    member = jax.nn.one_hot(labels, k, dtype=jnp.float32)
    return jnp.matmul(member.T, rows, precision=EXACT), counts


def _step(
    mesh: Mesh,
    size: int,
    scatter: bool,
    centres: jax.Array,
    counts: jax.Array,
    rows: jax.Array,
    k: jax.Array,
    held: jax.Array,
    keep: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """A mini-batch: each centre moves to the weighted mean of the rows counted for it.

    Args:
      centres, counts: (size, d) and (size,) float32, of which the first k are centres.
      rows: (m, d), of which the first `held` count.
      keep: share of the earlier counts that still counts.
    """
    labels, squares = _nearest(mesh, rows, centres, k)
    sums, new = _sums(size, scatter, rows, labels, held)
    total = keep * counts + new
    moved = centres + (sums - new[:, None] * centres) / jnp.maximum(total, 1.0)[:, None]
    return moved, total, squares
