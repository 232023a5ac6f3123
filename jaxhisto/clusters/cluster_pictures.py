"""The pictures of a clustering: its sheet, a random sheet beside it, the curve, the slides."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from jaxhisto.clusters import sheets, slide_maps
from jaxhisto.clusters.kmeans import Clusters
from jaxhisto.clusters.pictures import Picture, Pictures, short
from jaxhisto.clusters.sheets import CELL, Box, Cell
from jaxhisto.console import say, warn
from jaxhisto.data.features import Features
from jaxhisto.downstream_config import ClusterConfig
from jaxhisto.errors import SlideError
from jaxhisto.slides.reader import Overview, Slide

MOSAIC = 96  # side of a tile in a mosaic, px


def draw_all(
    folder: Path, config: ClusterConfig, features: Features, found: Clusters,
    record: dict[str, Any], pictures: Pictures,
) -> None:  # fmt: skip
    """Writes clusters.png, random.png, curve.png and map-SLIDE.png, as far as there is a use."""
    palette = slide_maps.colours(found.centres)
    about = _about(features, found, record)
    missing = [pictures.note()] if pictures.missing and pictures.given else []
    if len(record["curve"]) > 1:
        ks, explained = (
            [at[name] for at in record["curve"]] for name in ("k", "explained_variance")
        )
        try:
            sheets.curve(folder / "curve.png", ks, explained, record["elbow"])
        except ImportError:
            say("curve.png is left out: it needs matplotlib, `pip install 'jaxhisto[plots]'`")
    if pictures.given and config.shown:
        random = np.random.default_rng([config.seed, 5])
        shown = _shown(found, config, random)
        boxes = cluster_boxes(found, shown, config.nearest, palette, pictures)
        title = f"{config.nearest} tiles nearest to the centre, of {len(shown)} clusters"
        sheets.sheet(boxes, folder / "clusters.png", title, [about, *missing])
        rows = random.permutation(len(features))[: len(shown) * config.nearest]
        cells = [Cell(pictures.read(int(row), CELL)) for row in sorted(rows)]
        each = [
            Box("", "", (150, 150, 158), cells[i : i + config.nearest])
            for i in range(0, len(cells), config.nearest)
        ]
        title = f"{len(cells)} tiles drawn at random, of the same {len(features):,}"
        sheets.sheet(each, folder / "random.png", title, missing)
    if config.maps:
        draw_maps(folder, config, features, found, pictures, about)


def cluster_boxes(
    found: Clusters, shown: Iterable[int], nearest: int, palette: Sequence[Any], pictures: Pictures
) -> list[Box]:
    """A box a cluster: the rows nearest to its centre, with their distances from it."""
    boxes = []
    for cluster in shown:
        rows = np.flatnonzero(found.labels == cluster)
        rows = rows[np.argsort(found.distances[rows], kind="stable")][:nearest]
        cells = [
            Cell(pictures.read(int(row), CELL), f"d {found.distances[row]:.3g}") for row in rows
        ]
        size = int(found.sizes[cluster])
        share = size / len(found.labels)
        boxes.append(
            Box(
                f"cluster {cluster}",
                f"{size:,} tile{'s' * (size > 1)}, {share:.1%}",
                palette[cluster],
                cells,
            )
        )
    return boxes


def draw_maps(
    folder: Path, config: ClusterConfig, features: Features, found: Clusters, pictures: Pictures,
    about: str,
) -> None:  # fmt: skip
    """Paints the slides that have most tiles."""
    of: dict[str, list[int]] = defaultdict(list)
    for row, slide in enumerate(features.slides):
        if slide:
            of[slide].append(row)
    chosen = sorted(of, key=lambda slide: (-len(of[slide]), slide))[: config.maps]
    if config.highlight:
        # Where they are to be seen comes first.
        hits = {s: int(np.isin(found.labels[of[s]], config.highlight).sum()) for s in of}
        chosen = sorted(of, key=lambda s: (-hits[s], -len(of[s]), s))[: config.maps]
    palette, names = slide_maps.colours(found.centres), set[str]()
    for slide in chosen:
        rows = np.array(of[slide])
        name = re.sub(r"[^\w.+-]+", "_", slide)
        name = name if name not in names else f"{name}-{len(names)}"
        names.add(name)
        base = base_of(slide, rows, features, pictures)
        slide_maps.draw(
            folder / f"map-{name}.png", slide, f"{len(rows):,} tiles of it; {about}", base,
            features.coords[rows], features.spans[rows], found.labels[rows], palette,
            config.highlight,
        )  # fmt: skip


def base_of(name: str, rows: np.ndarray, features: Features, pictures: Pictures) -> slide_maps.Base:
    """The slide's overview, or a mosaic of its tiles where it is not there."""
    slide = pictures.slide(name)
    seen = _overview(slide) if slide is not None else None
    if slide is not None and seen is not None:
        scale = max(seen.rgb.shape[:2]) / slide_maps.LONGEST
        rgb: np.ndarray = seen.rgb
        down = seen.downsample
        if scale > 1:
            size = (round(rgb.shape[1] / scale), round(rgb.shape[0] / scale))
            rgb, down = cv2.resize(rgb, size, interpolation=cv2.INTER_AREA), down * scale
        return slide_maps.Base(np.ascontiguousarray(rgb), 0.0, 0.0, down, slide.mpp, "the slide")
    found: list[Picture] = [pictures.read(int(row), MOSAIC) for row in rows]
    spans = features.spans[rows]
    um = {round(p.um / s, 4) for p, s in zip(found, spans, strict=True) if p.um}
    mpp = um.pop() if len(um) == 1 else None
    return slide_maps.mosaic(features.coords[rows], spans, [p.rgb for p in found], mpp)


def _overview(slide: Slide) -> Overview | None:
    try:
        return slide.overview(max(slide.width, slide.height) / slide_maps.LONGEST)
    except SlideError as error:
        warn(f"{error}; its tiles are painted without it")
        return None


def _shown(found: Clusters, config: ClusterConfig, random: np.random.Generator) -> list[int]:
    """Clusters of the sheet: those highlighted, and others that are not empty, drawn."""
    first = [c for c in config.highlight if found.sizes[c]]
    rest = np.setdiff1d(np.flatnonzero(found.sizes), first)
    count = max(0, config.shown - len(first))
    return first + sorted(random.permutation(rest)[:count].tolist())


def _about(features: Features, found: Clusters, record: dict[str, Any]) -> str:
    return (
        f"{short(str(features.path))}: {len(features):,} tiles, k = {record['k']:,}, "
        f"{found.explained:.1%} of the variance explained; d: Euclidean distance from the centre, "
        f"on average {found.distances.mean():.3g}"
    )
