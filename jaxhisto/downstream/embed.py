"""`jaxhisto embed`: tiles -> FEATURES.h5, over all devices, going on where it was killed."""

from __future__ import annotations

import functools
import shutil
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from jaxhisto import __version__
from jaxhisto.console import say, warn
from jaxhisto.data.features import PARTIAL, Features, FeatureWriter
from jaxhisto.data.per_slide import write_per_slide
from jaxhisto.data.sources import Tiles
from jaxhisto.distributed import make_mesh, to_global
from jaxhisto.downstream.encoders import Encoder, encoder_of, make_features
from jaxhisto.downstream.inputs import open_inputs, read_blocks
from jaxhisto.downstream_config import EmbedConfig
from jaxhisto.errors import ConfigError, StoreError
from jaxhisto.progress import Progress

IN_FLIGHT = 2  # blocks on the devices at a time: one computes while the next one's bytes travel


@dataclass(frozen=True)
class Embedded:
    """What `embed` left behind: the file, its rows and width, rows of an earlier start, whether
    they are of slides, files of single slides."""

    out: Path
    rows: int
    width: int
    earlier: int
    of_slides: bool
    per_slide: tuple[Path, ...] = ()


def embed(config: EmbedConfig) -> Embedded:
    """Writes the features of all tiles, or finds that they are there already.

    Raises:
      ExportError, ConfigError: no such encoder, or nothing says how it wants to be fed.
      StoreError, SlideError: tiles that cannot be read, features that are not finite, a file
        that cannot be written or holds something else.
      RunError: fewer devices than asked for.
    """
    out = Path(config.out)
    if out.is_dir():
        raise StoreError(f"{out}: is a folder; give --out a file, such as {out / 'features.h5'}.")
    encoder = encoder_of(config)
    if config.layer != 4 and not encoder.params:
        raise ConfigError(f"--layer {config.layer}: {encoder.name} has no layers; leave it out.")
    side = config.tile_px or encoder.tile_px or 224
    tiles = open_inputs(config, side)
    if config.per_slide and not tiles.located(0, (0, 0)).slide:  # now, not after the work
        raise ConfigError(f"--per-slide: {config.tiles[0]} holds tiles of no slide; leave it out.")
    say(tiles.summary())
    _say_feeding(encoder, tiles, side)
    width = encoder.width(config.layer)
    identity = identity_of(config, encoder, tiles, side)
    if config.force:
        out.unlink(missing_ok=True)
        shutil.rmtree(out.with_name(out.name + PARTIAL), ignore_errors=True)
    earlier = len(tiles)
    if out.exists():
        _refuse_other(out, identity, len(tiles))
        # A kill after the file had got its name left the rows.
        shutil.rmtree(out.with_name(out.name + PARTIAL), ignore_errors=True)
    else:
        attributes = {
            **identity,
            "depth": encoder.depth,
            "encoder": encoder.name,
            "code_version": __version__,
        }
        with FeatureWriter(out, identity, width, config.batch) as writer:
            earlier = writer.done
            _fill(writer, config, encoder, tiles, side)
            places = [tiles.located(i, at) for i, at in _coords(writer)]
            writer.finish(
                [place.name for place in places],
                [place.slide for place in places],
                np.array([place.span for place in places], np.float64),
                attributes,
                [place.sha256 for place in places],
            )
    files: list[Path] = []
    if config.per_slide:
        with Features(out) as found:
            files = write_per_slide(found, config.per_slide)
    of_slides = bool(tiles.located(0, (0, 0)).slide)
    return Embedded(out, len(tiles), width, earlier, of_slides, tuple(files))


def identity_of(config: EmbedConfig, encoder: Encoder, tiles: Tiles, side: int) -> dict[str, Any]:
    """What makes two files of features the same."""
    return {
        "encoder_sha256": encoder.sha256,
        "data_hash": tiles.hash,
        "arch": encoder.arch,
        "mean": list(encoder.mean),
        "std": list(encoder.std),
        "side": side,
        "layer": config.layer,
        "precision": config.precision,
        "batch": config.batch,
    }


def features_of(
    encoder: Encoder, images: Iterator[np.ndarray], batch: int, mesh: Mesh, **settings: Any
) -> Iterator[np.ndarray]:
    """Features (m, d) float32 of each block (m, S, S, 3) uint8, m at most `batch` a device.

    The rows of a device are always `batch`: a short block is filled up with its last image. So a
    tile's features depend on its place among those rows alone, and on no number of devices.
    """
    if not encoder.params:
        function = make_features(encoder)
        yield from (function(block) for block in images)
        return
    rows = batch * mesh.size
    with jax.set_mesh(mesh):
        function = make_features(encoder, mesh=mesh, **settings)
        waiting: deque[tuple[int, jax.Array]] = deque()
        for block in images:
            filled = np.concatenate([block, np.repeat(block[-1:], rows - len(block), axis=0)])
            waiting.append((len(block), function(to_global(filled, mesh))))
            if len(waiting) > IN_FLIGHT:
                yield _fetched(*waiting.popleft())
        while waiting:
            yield _fetched(*waiting.popleft())


def _fill(
    writer: FeatureWriter, config: EmbedConfig, encoder: Encoder, tiles: Tiles, side: int
) -> None:
    """Computes the rows that are not there."""
    mesh = make_mesh(config.devices)
    start, stop = writer.done, len(tiles)
    if start:
        say(f"{writer.partial}: {start:,} of {stop:,} rows are there, going on")
    blocks = read_blocks(
        tiles, start, stop, config.batch * mesh.size, side, config.threads, config.prefetch
    )
    coords: deque[np.ndarray] = deque()

    def images() -> Iterator[np.ndarray]:
        for block, at in blocks:
            coords.append(at)
            yield block

    settings = {"layer": config.layer, "precision": config.precision}
    with Progress("embed", stop, start) as progress:
        try:
            for rows in features_of(encoder, images(), config.batch, mesh, **settings):
                names = functools.partial(_name, tiles, writer.done)
                writer.append(rows, coords.popleft(), names)
                progress.advance(len(rows))
        finally:
            blocks.close()


def _coords(writer: FeatureWriter) -> Iterator[tuple[int, tuple[int, int]]]:
    """(row, (x, y)) of all rows that are there."""
    for start in range(0, writer.done, 65536):
        stop = min(start + 65536, writer.done)
        yield from enumerate(map(tuple, writer.coords(start, stop).tolist()), start)


def _name(tiles: Tiles, first: int, i: int) -> str:
    return tiles.names(first + i)


def _fetched(count: int, rows: jax.Array) -> np.ndarray:
    return np.asarray(rows)[:count]


def _refuse_other(out: Path, identity: dict[str, Any], rows: int) -> None:
    """Returns where a finished file is the one asked for."""
    with Features(out) as found:
        theirs = found.attributes
        differing = [
            f"{key} {str(theirs.get(key))[:12]} there, {str(value)[:12]} here"
            for key, value in identity.items()
            if theirs.get(key) != value
        ]
        if len(found) != rows:
            differing.append(f"{len(found):,} rows there, {rows:,} tiles here")
    if differing:
        raise StoreError(
            f"{out}: holds other features ({'; '.join(differing)}); give another --out, or "
            "--force to replace it."
        )


def _say_feeding(encoder: Encoder, tiles: Tiles, side: int) -> None:
    """How tiles are fed, and a warning where the encoder has seen other pixel sizes."""
    resized = "" if tiles.canvas == (side, side) else f", resized from up to {tiles.canvas[1]} px"
    say(f"{encoder.name}: {encoder.arch}, {encoder.sha256[:12]}; tiles fed at {side} px{resized}")
    mpp = tiles.mpp_range()
    if not mpp or not encoder.mpp_range:
        return
    # A tile that is resized has other um/px.
    scale = tiles.canvas[1] / side
    low, high = mpp[0] * scale, mpp[1] * scale
    if low < 0.8 * encoder.mpp_range[0] or high > 1.25 * encoder.mpp_range[1]:
        warn(
            f"warning: tiles are fed at {low:.3g} to {high:.3g} um/px, and the encoder was "
            f"trained on {encoder.mpp_range[0]:.3g} to {encoder.mpp_range[1]:.3g}"
        )
