"""`jaxhisto cluster`: features -> clusters, the elbow of their number, sheets, maps, a pick."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from numpy.typing import NDArray

from jaxhisto import __version__
from jaxhisto.clusters import cluster_pictures, kmeans
from jaxhisto.clusters.kmeans import Clusters, Moments
from jaxhisto.clusters.pictures import Pictures
from jaxhisto.console import counted, say
from jaxhisto.data.features import PARTIAL, Features
from jaxhisto.data.manifest import write_manifest
from jaxhisto.distributed import make_mesh
from jaxhisto.downstream_config import ClusterConfig
from jaxhisto.errors import ConfigError, JaxhistoError, RunError
from jaxhisto.runlog import environment

RECORD, CENTRES, ASSIGNMENTS, PICKED = (
    "clusters.json", "centres.npy", "assignments.h5", "picked.jsonl",
)  # fmt: skip
FORMAT = "jaxhisto-clusters-1"
LOCK = "lock"
CURVE = ("k", "inertia", "explained_variance")
STEPS = 10  # values of k that are tried where none are given
LARGEST = 10_000  # of them (paper)
ROWS_EACH = 20  # rows a cluster, of the largest


@dataclass(frozen=True)
class Clustered:
    """What `cluster` left behind: the folder, and lines for the person who asked."""

    out: Path
    lines: Sequence[str]
    picked: Path | None


def cluster(config: ClusterConfig) -> Clustered:
    """Clusters features and writes the folder, whole or not at all.

    Raises:
      StoreError, SlideError: features or pictures that cannot be read or are of other data.
      ConfigError: settings that contradict each other or the features.
      RunError: nothing to cluster, or a folder that cannot be written; a picture that cannot be
        read, when the clusters are there already.
    """
    out = Path(config.out)
    if out.name in ("", ".."):
        raise ConfigError(f"--out {out}: the folder is replaced as a whole; give one a name.")
    if config.pick_from and not config.pick:
        raise ConfigError("--pick-from: nothing is picked; pass --pick with how many tiles.")
    with Features(config.features) as features:
        ks = _ks(config, len(features))
        identity = _identity(config, features, ks)
        earlier = _earlier(out, identity, config.force)
        pictures = Pictures(features, config.show)
        if config.pick:
            pictures.origins()  # refused before the work, not after it
        if pictures.note():
            say(pictures.note())
        try:
            with _workplace(out) as folder:
                found, record = earlier or _clustered(config, features, ks, identity)
                _refuse_absent(config, found)
                lines, undrawn = _write(folder, config, features, found, record, pictures)
                _replace(folder, out, config.force)
        finally:
            pictures.close()
    if undrawn is not None:
        raise RunError(
            f"{undrawn} The clusters are in {out}; the same line with --force draws them."
        ) from undrawn
    return Clustered(out, lines, out / PICKED if config.pick else None)


@contextlib.contextmanager
def _workplace(out: Path) -> Iterator[Path]:
    """A folder beside OUT, held for this process, to take OUT's place; empty but for its lock.

    Raises:
      RunError: it cannot be written, now or later, or another process is at work there.
    """
    folder = out.with_name(f".{out.name}{PARTIAL}")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / LOCK).open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            try:
                for left in folder.iterdir():  # by a kill
                    if left.name != LOCK:
                        left.unlink()
                yield folder
            finally:
                shutil.rmtree(folder, ignore_errors=True)
    except BlockingIOError as error:
        raise RunError(
            f"{out}: another `jaxhisto cluster` is at work there; wait for that one, or give "
            "another --out."
        ) from error
    except OSError as error:
        raise RunError(
            f"{error.filename or out}: cannot be written ({error.strerror or error}); make room or "
            "give --out another folder."
        ) from error


def tried(n: int) -> tuple[int, ...]:
    """The values of k that are tried of n rows where none are given: ten even steps."""
    largest = max(1, min(LARGEST, n // ROWS_EACH))
    return tuple(sorted({max(1, round(largest * i / STEPS)) for i in range(1, STEPS + 1)}))


def pick(
    labels: NDArray[np.int32], distances: NDArray[np.float32], n: int, only: Sequence[int] = ()
) -> list[int]:
    """Rows that stand for the clusters: in turn the next nearest to each centre, largest first.

    So a rare look is taken as often as a common one, until its cluster is used up.

    Args:
      labels, distances: (m,), of each row its cluster and its distance from the centre.
      n: rows wanted.
      only: clusters to take from; empty: all.

    Returns:
      At most n rows, in the order in which they are taken.
    """
    allowed = np.flatnonzero(np.isin(labels, list(only))) if only else np.arange(len(labels))
    order = allowed[np.lexsort((allowed, distances[allowed], labels[allowed]))]
    _, starts, sizes = np.unique(labels[order], return_index=True, return_counts=True)
    turn = np.arange(len(order)) - np.repeat(starts, sizes)
    size = np.repeat(sizes, sizes)
    return order[np.lexsort((labels[order], -size, turn))][:n].tolist()


def _ks(config: ClusterConfig, n: int) -> tuple[int, ...]:
    if n < 2:
        raise RunError(
            f"{config.features}: has {counted(n, 'row')}, there is nothing to cluster; embed more "
            "tiles."
        )
    ks = tuple(sorted(set(config.k))) or tried(n)
    if ks[-1] > n:
        raise ConfigError(
            f"--k {ks[-1]:,}: {config.features} has {n:,} rows; ask for at most as many clusters."
        )
    return ks


def _identity(config: ClusterConfig, features: Features, ks: tuple[int, ...]) -> dict[str, Any]:
    return {
        "rows": len(features),
        "width": features.width,
        "encoder_sha256": features.encoder_sha256,
        "data_hash": features.data_hash,
        "tried": list(ks),
        "seed": config.seed,
    }


def _clustered(
    config: ClusterConfig, features: Features, ks: Sequence[int], identity: dict[str, Any]
) -> tuple[Clusters, dict[str, Any]]:
    """The clustering at the elbow of `ks`, and its record."""
    mesh = make_mesh(config.devices)
    known = kmeans.moments(features)
    curve, kept = [], dict[int, Clusters]()
    with jax.set_mesh(mesh):
        for k in ks:
            found = kmeans.kmeans(features, k, config.seed, known, mesh)
            curve.append((k, found.inertia, found.explained))
            say(f"k = {k:,}: {found.explained:.1%} of the variance explained")
            elbow = kmeans.elbow(
                np.array(ks[: len(curve)]), np.array([value for _, _, value in curve])
            )
            # Of many only those that may be the answer: a million rows have labels of 12 MB each.
            kept = {one: kept[one] for one in kept if one == elbow} | {k: found}
    elbow = kmeans.elbow(np.array(ks), np.array([value for _, _, value in curve]))
    chosen = elbow or ks[-1]
    if chosen not in kept:
        with jax.set_mesh(mesh):
            kept[chosen] = kmeans.kmeans(features, chosen, config.seed, known, mesh)
    found = kept[chosen]
    record = {
        "format": FORMAT,
        "code_version": __version__,
        "identity": identity,
        "k": chosen,
        "elbow": elbow,
        "inertia": found.inertia,
        "explained_variance": found.explained,
        "total_sum_of_squares": known.total,
        "moments_sha256": _digest(known),
        "curve": [dict(zip(CURVE, at, strict=True)) for at in curve],
        "empty": int((found.sizes == 0).sum()),
        "sizes": found.sizes.tolist(),
    }
    return found, record


def _digest(known: Moments) -> str:
    """Of the rows' mean and total: equal for equal features."""
    return hashlib.sha256(known.mean.tobytes() + np.float64(known.total).tobytes()).hexdigest()


def _earlier(
    out: Path, identity: dict[str, Any], force: bool
) -> tuple[Clusters, dict[str, Any]] | None:
    """The clusters that are in a folder already, where it may be replaced and they are the same."""
    if out.exists() and not out.is_dir():
        raise ConfigError(f"--out {out}: is a file; give a folder.")
    if not out.is_dir() or not any(out.iterdir()):
        return None
    if not (out / RECORD).is_file():
        raise ConfigError(f"--out {out}: holds something else; give another folder.")
    if not force:
        raise ConfigError(f"--out {out}: holds clusters; pass --force to replace them.")
    import h5py

    try:
        record = json.loads((out / RECORD).read_text())
        if record["identity"] != identity or record["format"] != FORMAT:
            return None
        with h5py.File(out / ASSIGNMENTS) as file:
            labels, distances = file["cluster"][:], file["distance"][:]
        centres = np.load(out / CENTRES)
    except (OSError, ValueError, KeyError):
        return None
    if len(labels) != identity["rows"] or centres.shape != (record["k"], identity["width"]):
        return None
    say(f"{out}: the clusters of these features are kept")
    sizes = np.array(record["sizes"], np.int64)
    return Clusters(
        centres, labels, distances, sizes, record["inertia"], record["explained_variance"]
    ), record


def _refuse_absent(config: ClusterConfig, found: Clusters) -> None:
    for flag, asked in (("--highlight", config.highlight), ("--pick-from", config.pick_from)):
        beyond = [c for c in asked if c >= len(found.sizes)]
        if beyond:
            raise ConfigError(
                f"{flag} {beyond[0]}: there are clusters 0 to {len(found.sizes) - 1}; name those."
            )


def _write(
    folder: Path, config: ClusterConfig, features: Features, found: Clusters,
    record: dict[str, Any], pictures: Pictures,
) -> tuple[list[str], JaxhistoError | None]:  # fmt: skip
    """All files; returns what to say of them, and why there are no pictures where that failed."""
    k = record["k"]
    np.save(folder / CENTRES, found.centres)
    _write_assignments(folder / ASSIGNMENTS, features, found)
    empty = f", {record['empty']} empty" if record["empty"] else ""
    lines = [
        f"{len(features):,} rows in {counted(k, 'cluster')} ({_chosen(config, record)}), "
        f"{found.explained:.1%} of the variance explained, inertia {found.inertia:.6g}",
        f"sizes {found.sizes.min():,} to {found.sizes.max():,}, median "
        f"{int(np.median(found.sizes)):,}{empty}",
    ]
    undrawn = None
    try:
        cluster_pictures.draw_all(folder, config, features, found, record, pictures)
    except JaxhistoError as error:  # of an image that cannot be read any more
        undrawn = error
    record["pictures_missing"] = len(pictures.missing) if pictures.given else None
    if config.pick:
        rows = pick(found.labels, found.distances, config.pick, config.pick_from)
        there = [row for row in rows if pictures.at[row] >= 0]
        rule = {"verb": "cluster", "k": k, "pick": config.pick}
        rule |= {"pick_from": list(config.pick_from), "moments_sha256": record["moments_sha256"]}
        manifest = pictures.origins().manifest(
            (int(pictures.at[row]) for row in there), rule, config.seed
        )
        write_manifest(folder / PICKED, manifest)
        record["picked"] = {"tiles": len(manifest), "sha256": manifest.hash}
        lost = len(rows) - len(there)
        lines.append(
            f"picked {len(manifest):,} tiles of {len(np.unique(found.labels[there])):,} clusters"
            + (f", {lost:,} more are not in --show.tiles" if lost else "")
        )
    record["environment"] = environment([str(device) for device in jax.devices()])
    # Last: a folder with clusters.json is whole.
    (folder / RECORD).write_text(json.dumps(record, indent=1) + "\n")
    return lines, undrawn


def _chosen(config: ClusterConfig, record: dict[str, Any]) -> str:
    """Why so many clusters."""
    values = len(record["curve"])
    if record["elbow"]:
        return f"the elbow of {values} values of k"
    if values > 1:
        return "the most, their curve has no elbow"
    return "as asked" if config.k else "so few rows have no elbow"


def _write_assignments(path: Path, features: Features, found: Clusters) -> None:
    import h5py

    text = h5py.string_dtype("utf-8")
    with h5py.File(path, "w") as file:
        file.create_dataset("cluster", data=found.labels)
        file.create_dataset("distance", data=found.distances)
        file.create_dataset("names", data=np.array(features.names, object), dtype=text)
        file.create_dataset("slides", data=np.array(features.slides, object), dtype=text)
        file.create_dataset("coords", data=features.coords)
        file.create_dataset("spans", data=features.spans)


def _replace(new: Path, out: Path, force: bool) -> None:
    """Puts the folder in its place; an earlier one goes only when the new one is there.

    Raises:
      RunError: another process has written one meanwhile.
    """
    if not force and out.is_dir() and any(out.iterdir()):
        raise RunError(
            f"{out}: another process has written clusters there meanwhile; give another --out, or "
            "--force to replace them."
        )
    (new / LOCK).unlink()
    old = out.with_name(f".{out.name}.{os.getpid()}.old")
    if out.exists():
        os.replace(out, old)
    os.replace(new, out)
    shutil.rmtree(old, ignore_errors=True)
