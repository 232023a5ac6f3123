"""`jaxhisto retrieve`: the tiles most like a tile; `jaxhisto sheet`: many datasets on one sheet."""

from __future__ import annotations

import csv
import io
import os
from collections import defaultdict
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from jaxhisto.clusters import sheets
from jaxhisto.clusters.kmeans import Rows, in_chunks
from jaxhisto.clusters.pictures import Picture, Pictures, rows_named, short, square
from jaxhisto.clusters.sheets import CELL, Box, Cell
from jaxhisto.clusters.slide_maps import FEW
from jaxhisto.config import DataConfig
from jaxhisto.data.features import Features
from jaxhisto.data.listed import Listed
from jaxhisto.data.manifest import write_manifest
from jaxhisto.data.sampling import sample
from jaxhisto.data.sources import open_tiles
from jaxhisto.downstream_config import RetrieveConfig, SheetConfig
from jaxhisto.errors import ConfigError, RunError
from jaxhisto.file_config import SampleConfig
from jaxhisto.runlog import write_atomically


def nearest(
    rows: Rows, queries: NDArray[np.float32], count: int, left_out: NDArray[np.bool_] | None = None
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """The rows with the largest cosines, in bounded memory.

    Args:
      rows: n of width d.
      queries: (q, d).
      count: wanted of each, at most n.
      left_out: (q, n), rows that are not wanted.

    Returns:
      (q, count) row numbers, -1 where there are no more, and their cosines, best first; of equal
      ones the first row. A row of zeros has cosine 0 with all.
    """
    wanted = _unit(queries)
    best = np.empty((len(wanted), 0), np.int64)
    score = np.empty((len(wanted), 0), np.float32)
    for start, chunk in in_chunks(rows):
        cosine = wanted @ _unit(chunk).T
        number = np.broadcast_to(np.arange(start, start + len(chunk)), cosine.shape)
        if left_out is not None:
            cosine[left_out[:, start : start + len(chunk)]] = -np.inf
        numbers, cosines = np.hstack([best, number]), np.hstack([score, cosine])
        order = np.argsort(-cosines, axis=1, kind="stable")[:, :count]
        best = np.take_along_axis(numbers, order, 1)
        score = np.take_along_axis(cosines, order, 1)
    return np.where(np.isfinite(score), best, -1), score


def retrieve(config: RetrieveConfig) -> Path:
    """Draws the sheet and writes the CSV file beside it.

    Raises:
      StoreError, SlideError: features or pictures that cannot be read or are of other data.
      ConfigError: a name that is not there, or files of that name that are.
      RunError: they cannot be written.
    """
    if not config.query:
        raise ConfigError("--query names no tile; give the names of tiles in the features.")
    out = _png(config.out, config.force)
    table = out.with_suffix(".csv")
    if table.exists() and not config.force:
        raise ConfigError(
            f"--out {out}: its names and cosines would replace {table}; give another name, or "
            "--force."
        )
    with Features(config.features) as features:
        queries = rows_named(features, config.query)
        pictures = Pictures(features, config.show)
        rows = np.concatenate([features.read(q, q + 1) for q in queries])
        left_out = np.zeros((len(queries), len(features)), bool)
        slides = np.array(features.slides, object)
        for n, q in enumerate(queries):
            left_out[n] = (slides == slides[q]) if config.other_slides and slides[q] else False
            left_out[n, q] = True
        found, cosines = nearest(features, rows, config.count, left_out)
        boxes, lines = [], io.StringIO()
        writer = csv.writer(lines, lineterminator="\n")
        writer.writerow(["query", "rank", "name", "cosine"])
        for n, (q, near, cosine) in enumerate(zip(queries, found, cosines, strict=True)):
            cells = [Cell(pictures.read(q, CELL), "query", framed=True)]
            for rank, (row, value) in enumerate(zip(near.tolist(), cosine, strict=True), 1):
                if row < 0:
                    break
                cells.append(Cell(pictures.read(row, CELL), f"{rank}: cosine {value:.3f}"))
                writer.writerow([features.names[q], rank, features.names[row], f"{value:.6f}"])
            boxes.append(Box(short(features.names[q], 60), "", FEW[n % len(FEW)], cells))
        pictures.close()
    apart = "; tiles of the query's own slide left out" if config.other_slides else ""
    about = f"of {len(left_out[0]):,} tiles of {short(config.features)}, by cosine{apart}"
    missing = [pictures.note()] if pictures.note() else []
    _save(boxes, out, f"The {config.count} nearest tiles", [about, *missing], across=1)
    try:
        write_atomically(table, lines.getvalue())
    except OSError as error:
        out.unlink(missing_ok=True)  # with it the same line would be refused
        raise _unwritable(table, error) from error
    return out


def diversity(config: SheetConfig) -> tuple[Path, int, int]:
    """Draws tiles of each dataset; returns the file, the tiles and the datasets.

    Raises:
      StoreError, ConfigError: as `jaxhisto sample`.
      RunError: it cannot be written.
    """
    out = _png(config.out, config.force)
    drawn = sample(
        SampleConfig(
            config.sources,
            "",
            per_dataset=config.per_dataset,
            per_slide=0,
            exclude=config.exclude,
            seed=config.seed,
            failures_allowed=config.failures_allowed,
        )
    )
    manifest = out.with_name(f".{out.stem}.{os.getpid()}.jsonl")
    try:
        write_manifest(manifest, drawn.manifest)
        tiles = open_tiles(DataConfig(stores=tuple(drawn.paths), manifest=str(manifest)))
    finally:
        manifest.unlink(missing_ok=True)
    cells: dict[str, list[Cell]] = defaultdict(list)
    (source,) = tiles.sources
    assert isinstance(source, Listed)
    for (entry, _), i in zip(drawn.manifest.tiles(), source.first_cells(), strict=True):
        image = tiles.read(i)
        um = entry.mpp * min(image.shape[:2]) if entry.mpp else None
        cells[entry.dataset].append(Cell(Picture(square(image, CELL), um)))
    about = {d["name"]: d for d in drawn.manifest.datasets}
    boxes = []
    for n, (name, of) in enumerate(cells.items()):
        more = [about[name]["organ"], about[name]["stain"], f"{about[name]['available']:,} tiles"]
        boxes.append(Box(name, ", ".join(filter(None, more)), FEW[n % len(FEW)], of))
    count = len(drawn.manifest)
    title = f"{count:,} tiles of {len(boxes)} datasets"
    line = f"{config.per_dataset} of each or all it has, drawn at random, seed {config.seed}"
    _save(boxes, out, title, [line])
    return out, count, len(boxes)


def _png(text: str, force: bool) -> Path:
    out = Path(text)
    if out.suffix.lower() != ".png":
        raise ConfigError(f"--out {out}: is drawn as PNG; give a name that ends in .png.")
    if out.exists() and (out.is_dir() or not force):
        remedy = "give another name" if out.is_dir() else "pass --force to replace it"
        raise ConfigError(f"--out {out}: exists; {remedy}.")
    return out


def _save(boxes: list[Box], out: Path, title: str, lines: list[str], across: int = 0) -> None:
    temporary = out.with_name(f".{out.stem}.{os.getpid()}.png")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        sheets.sheet(boxes, temporary, title, lines, across)
        os.replace(temporary, out)
    except OSError as error:
        raise _unwritable(out, error) from error
    finally:
        temporary.unlink(missing_ok=True)


def _unwritable(path: Path, error: OSError) -> RunError:
    return RunError(
        f"{path}: cannot be written ({error.strerror or error}); make room or give another name."
    )


def _unit(x: NDArray[np.float32]) -> NDArray[np.float32]:
    return x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), np.float32(1e-12))
