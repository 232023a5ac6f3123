"""`jaxhisto classify`: a fine-tuned encoder and tiles -> a CSV file of what it says of them."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from jaxhisto.console import say
from jaxhisto.distributed import make_mesh
from jaxhisto.downstream.embed import features_of
from jaxhisto.downstream.encoders import open_encoder
from jaxhisto.downstream.finetune_files import ENCODER, as_csv, read_head, said
from jaxhisto.downstream.inputs import open_inputs, read_blocks
from jaxhisto.downstream_config import EmbedConfig
from jaxhisto.errors import ExportError, StoreError
from jaxhisto.progress import Progress
from jaxhisto.runlog import write_atomically
from jaxhisto.training_config import ClassifyConfig


def run_classify(config: ClassifyConfig) -> int:
    """Writes a row a tile, and returns how many.

    Raises:
      ExportError: no finished fine-tuning.
      StoreError, SlideError: tiles that cannot be read; a file that is there already, or cannot
        be written.
    """
    folder, out = Path(config.model), Path(config.out)
    if not (folder / ENCODER).is_file():
        raise ExportError(
            f"{folder}: has no {ENCODER}; give the folder of a finished `jaxhisto finetune`."
        )
    if out.is_dir():
        raise StoreError(f"{out}: is a folder; give --out a file, such as {out / 'classes.csv'}.")
    if out.exists() and not config.force:
        raise StoreError(f"{out}: exists; pass --force to replace it, or another --out.")
    encoder = open_encoder(str(folder / ENCODER))
    head = read_head(folder, encoder.sha256)
    inputs = EmbedConfig(
        encoder.name,
        config.tiles,
        config.out,
        kind=config.kind,
        exclude=config.exclude,
        max_side=config.max_side,
        failures_allowed=config.failures_allowed,
        cut=config.cut,
    )
    tiles = open_inputs(inputs, encoder.tile_px)
    say(tiles.summary())
    mesh = make_mesh(config.devices)
    blocks = read_blocks(
        tiles, 0, len(tiles), config.batch * mesh.size, encoder.tile_px, config.threads
    )
    places: deque[np.ndarray] = deque()

    def images() -> Iterator[np.ndarray]:
        for block, at in blocks:
            places.append(at)
            yield block

    names = [f"score_{name}" for name in head.classes]
    rows = [["name", "x", "y", "predicted", *names]]
    with Progress("classify", len(tiles)) as progress:
        try:
            for features in features_of(encoder, images(), config.batch, mesh):
                found = head.predictions(features)
                for at, values in zip(places.popleft(), found, strict=True):
                    x, y = (int(v) for v in at)
                    place = tiles.located(len(rows) - 1, (x, y))
                    rows.append([place.name, str(x), str(y), *said(values, head.classes)])
                progress.advance(len(features))
        finally:
            blocks.close()
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(out, as_csv(rows))
    except OSError as error:
        raise StoreError(
            f"{out}: cannot be written ({error.strerror}); give another --out."
        ) from error
    return len(rows) - 1
