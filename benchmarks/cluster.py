"""k-means on features beside scikit-learn's MiniBatchKMeans, in one process, taking turns.

    taskset -c 0 python benchmarks/cluster.py [--case N,D,K ... --repeats 3 --json FILE]
    taskset -c 0 python benchmarks/cluster.py --memory 1400000,512,100 --json FILE

Both get the same rows (`mixture`) and the same cores; a turn of each, repeatedly, another seed each
time. Ours includes the mean and the total sum of squares, which the explained variance needs, and
of the first turn compilation, which is given apart. Seconds are both of the clock and of the
processor (all threads of the process): on a machine that others use, compare the latter. --memory
writes the rows to an HDF5 file and clusters it from there, and says what memory that takes above
the interpreter with its libraries.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxhisto.clusters import kmeans as km
from jaxhisto.distributed import make_mesh
from jaxhisto.runlog import environment, write_atomically

GROUPS, RANK = 300, 32


def main() -> None:
    """Prints a line a case and writes the record."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--case", type=case, nargs="*", default=[])
    parser.add_argument("--memory", type=case)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    record: dict[str, Any] = {"cases": [compare(*each, args.repeats) for each in args.case]}
    if args.memory:
        record["memory"] = from_file(*args.memory)
    if args.json:
        devices = [str(device) for device in jax.devices()]
        text = json.dumps(record | environment(devices), indent=1)
        write_atomically(args.json, text + "\n")


def case(text: str) -> tuple[int, int, int]:
    """`n,d,k`."""
    n, d, k = map(int, text.split(","))
    return n, d, k


def mixture(n: int, width: int, seed: int = 0) -> np.ndarray:
    """(n, width) float32, nonnegative: unlike overlapping groups of low rank, and noise."""
    random = np.random.default_rng(0)
    shares = random.dirichlet(np.ones(GROUPS))
    basis = random.standard_normal((RANK, width), np.float32) / np.float32(np.sqrt(RANK))
    centres = np.float32(1.5) * random.standard_normal((GROUPS, RANK), np.float32)
    spread = random.uniform(0.3, 1.2, GROUPS).astype(np.float32)
    random = np.random.default_rng([1, seed])
    labels = random.choice(GROUPS, n, p=shares)
    rows = centres[labels] + spread[labels, None] * random.standard_normal((n, RANK), np.float32)
    noise = np.float32(0.3) * random.standard_normal((n, width), np.float32)
    return np.maximum(rows @ basis + noise, 0)


def compare(n: int, width: int, k: int, repeats: int) -> dict[str, Any]:
    """Times and inertias of both, taking turns."""
    from sklearn.cluster import MiniBatchKMeans

    rows, mesh = mixture(n, width), make_mesh(1)

    def ours(seed: int) -> float:
        with jax.set_mesh(mesh):
            held = km.Held(rows)
            return km.kmeans(held, k, seed, km.moments(held), mesh).inertia

    def theirs(seed: int) -> float:
        return float(MiniBatchKMeans(k, random_state=seed).fit(rows).inertia_)

    first = timed(ours, 0)
    turns = {"jaxhisto": [], "scikit-learn": []}
    for seed in range(repeats):
        turns["jaxhisto"].append(timed(ours, seed))
        turns["scikit-learn"].append(timed(theirs, seed))
    found: dict[str, Any] = {"n": n, "d": width, "k": k, "first_turn_s": first[0]}
    for name, results in turns.items():
        wall, processor, inertia = (list(column) for column in zip(*results, strict=True))
        found[name] = {"wall_s": wall, "processor_s": processor, "inertia": inertia}
    a, b = found["jaxhisto"], found["scikit-learn"]
    found["inertia_ratio"] = statistics.mean(a["inertia"]) / statistics.mean(b["inertia"])
    for key in ("wall_s", "processor_s"):
        found[f"speedup_{key[:-2]}"] = statistics.median(b[key]) / statistics.median(a[key])
    print(
        f"{n:,} x {width}, k = {k:,}: processor {statistics.median(a['processor_s']):.2f} s, "
        f"scikit-learn {statistics.median(b['processor_s']):.2f} s (x "
        f"{found['speedup_processor']:.2f}; by the clock x {found['speedup_wall']:.2f}); inertia "
        f"{found['inertia_ratio']:.4f} of its; first turn {first[1]:.2f} s",
        flush=True,
    )
    return found


def from_file(n: int, width: int, k: int) -> dict[str, Any]:
    """Memory and seconds of clustering an HDF5 file of features."""
    import h5py

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.h5"
        with h5py.File(path, "w") as file:
            made = file.create_dataset("features", (n, width), "<f4")
            for start in range(0, n, 20_000):
                made[start : start + 20_000] = mixture(min(20_000, n - start), width, start)
        with h5py.File(path) as file:
            rows, mesh = km.Held(file["features"]), make_mesh(1)
            with jax.set_mesh(mesh):
                small = km.Held(mixture(8 * km.BATCH, width))
                km.kmeans(small, k, 0, km.moments(small), mesh)  # compilers are part of the base
                before = peak_mb()
                start = time.perf_counter(), time.process_time()
                known = km.moments(rows)
                found = km.kmeans(rows, k, 0, known, mesh)
            wall, processor = time.perf_counter() - start[0], time.process_time() - start[1]
    result = {"n": n, "d": width, "k": k, "rows_mb": n * width * 4 / 2**20}
    result |= {"before_mb": before, "peak_mb": peak_mb(), "wall_s": wall, "processor_s": processor}
    result |= {"explained_variance": found.explained}
    print(
        f"{n:,} x {width} ({result['rows_mb']:,.0f} MiB) from HDF5, k = {k:,}: peak "
        f"{result['peak_mb']:,.0f} MiB, of which {before:,.0f} before; {wall:.0f} s by the clock, "
        f"{processor:.0f} s of the processor; {found.explained:.1%} explained"
    )
    return result


def timed(act: Callable[[int], float], seed: int) -> tuple[float, float, float]:
    """Seconds by the clock, of the processor, and what `act` returns."""
    start = time.perf_counter(), time.process_time()
    value = act(seed)
    return time.perf_counter() - start[0], time.process_time() - start[1], value


def peak_mb() -> float:
    """Largest memory of this process so far, MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


if __name__ == "__main__":
    main()
