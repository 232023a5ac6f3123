"""What a run is worth while it trains: probes on frozen features, spread, a guard on collapse.

Everything is measured on running statistics and in float32, as the exported encoder is used, and
nothing of it reaches the run: neither its random numbers nor its weights. With several processes
all take part in the features, process 0 alone in the figures.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jaxhisto import probes
from jaxhisto.config import MonitorConfig, PretrainConfig
from jaxhisto.data.labelled import read_labelled
from jaxhisto.data.sources import Tiles
from jaxhisto.distributed import is_main, to_global
from jaxhisto.errors import RunError
from jaxhisto.models import simclr
from jaxhisto.optim import warmup_steps
from jaxhisto.pretrain.chunked_loss import everywhere
from jaxhisto.pretrain.step import TrainState, augmented, normalise
from jaxhisto.runlog import MONITOR, append_line, keep_steps

PER_DEVICE = 64
"""Most images a device takes at a time: some 200 MB of a ResNet50's largest maps at 224 px."""

VIEWS_AT = 2**31 - 1
"""The views looked at are drawn as those of this step, and of those before it for more batches:
the same at each measurement, and never those of a real step."""

SAME, PATIENCE = 0.99, 50

TRANSDUCTIVE = ": the probes are transductive, no estimate for images that the run does not see"

Say = Callable[[str], None]
Arrays = tuple[np.ndarray, np.ndarray]


@dataclass(frozen=True)
class ProbeSet:
    """A labelled set as it is fed: images (n, S, S, 3) uint8, labels (n,), rows of both sides."""

    images: np.ndarray
    labels: np.ndarray
    classes: int
    train: np.ndarray
    test: np.ndarray
    hash: str


def open_probe_set(config: MonitorConfig, side: int, tiles: Tiles, say: Say) -> ProbeSet | None:
    """The labelled set that the config names, decoded; None without one.

    Args:
      side: of the images as fed, pixels.
      tiles: the run's data, in which labelled images are looked for.
      say: takes a line on what was read, and one where the set leaks.

    Raises:
      StoreError: a set that is not sound; see `read_labelled`, `Labelled.split`, `.load`.
      RunError: settings of a set, but no images.
    """
    if not config.images:
        given = [n for n in ("labels", "label", "group", "test") if getattr(config, n)]
        if given:
            raise RunError(
                f"--monitor.{given[0]}: needs --monitor.images, the folder of labelled images."
            )
        return None
    found = read_labelled(
        config.images, config.labels, config.label, config.group,
        file=config.file, classes=config.classes,
    )  # fmt: skip
    some = found.sample(config.limit)
    train, test = some.split(config.test)
    drawn = f", {len(some):,} of them drawn" if len(some) < len(found) else ""
    say(f"probes on {found.summary()}{drawn}\n  fitted on {len(train):,}, tested on {len(test):,}")
    digests = some.digests()
    for side_name, part in (("fitted on", train), ("tested on", test)):
        for clause in some.subset(part).leakage(tiles, [digests[i] for i in part]):
            say(f"  of those {side_name}, {clause}{TRANSDUCTIVE if part is test else ''}")
    rows = [some.names, some.labels.tolist(), test.tolist(), [d.hex() for d in digests], side]
    content = hashlib.sha256(json.dumps(rows).encode()).hexdigest()
    images = some.load(side)
    return ProbeSet(images, some.labels, len(some.classes), train, test, content[:12])


class Monitor:
    """Measures a run's weights at some of its steps, into RUN/monitor.jsonl.

    A line holds `step` (0: before the first), of two views each of fixed tiles of the run:
    `effective_rank` (of the encoder's features), `effective_rank_z`, `alignment`, `uniformity`,
    `pos_sim` and `neg_sim` (of z at unit length), and where a labelled set is named `knn_f1`,
    `knn_auc`, `knn_accuracy`, `ridge_f1`, `ridge_auc`, `ridge_accuracy`, `ridge_lambda` and
    `set`, which is another where set, split or size are; `monitor_s` (seconds) and `time`.
    """

    def __init__(
        self,
        config: PretrainConfig,
        tiles: Tiles,
        mesh: Mesh,
        steps: int,
        steps_per_epoch: float,
        say: Say,
    ) -> None:
        self._config, self._mesh, self._steps, self._say = config, mesh, steps, say
        self._every = config.monitor.every
        if config.monitor.images and not self._every:
            self._every = config.checkpoint_every
        side = config.monitor.tile_px or config.tile_px
        self._set = open_probe_set(config.monitor, side, tiles, say)
        warmup = warmup_steps(config.optim, steps, steps_per_epoch)
        self.guard = CollapseGuard(warmup, config.monitor.min_rank, say)
        if self._every:
            self._tiles, self._sizes = fixed_tiles(tiles, config.monitor.tiles)
            most = max(2 * len(self._tiles), 0 if self._set is None else len(self._set.images))
            self._batch = batch_of(most, mesh.size)
            self._embed = make_embed_both(config)
            self._views = jax.jit(_flat_views, static_argnums=0)

    def record(self) -> dict[str, dict[str, Any]]:
        """What all processes must hold alike, for `distributed.agree`: each feeds its own rows."""
        return {"monitor": {"labelled set": None if self._set is None else self._set.hash}}

    def open(self, out: Path, start: int) -> None:
        """Begins at `start` steps done; lines of steps that are done again are cut off."""
        self._path = out / MONITOR
        if is_main():
            keep_steps(self._path, start if start else -1)

    def due(self, step: int) -> bool:
        """Whether to measure when `step` steps are done; the same in every process."""
        return bool(self._every) and (step in (0, self._steps) or step % self._every == 0)

    def measure(self, step: int, state: TrainState) -> dict[str, float]:
        """Measures, writes the line and says it; to be called in every process, mesh set.

        Returns:
          The figures by name; empty in any process but 0.
        """
        began = time.perf_counter()
        features, z = self._on_views(state)
        of_set = None if self._set is None else self._on_images(state, self._set.images)
        if not is_main():
            return {}
        values = spread(features, z)
        if self._set is not None and of_set is not None:
            values |= probed(of_set, self._set, self._config.monitor.k)
        line: dict[str, Any] = {"step": step, **values}
        if self._set is not None:
            line["set"] = self._set.hash
        line["monitor_s"] = time.perf_counter() - began
        try:
            append_line(self._path, line)
        except RunError as error:  # a full disk does not end a run of days
            self._say(f"{error} Training goes on; this measurement is in no file.")
        self._say(sentence(step, values, features.shape[1], z.shape[2]))
        self.guard.measured(step, values["effective_rank_z"])
        return values

    def _on_views(self, state: TrainState) -> Arrays:
        """Features (2M, d) and z (M, 2, D) of the views of the fixed tiles."""
        found = []
        for b, (tiles, sizes) in enumerate(_blocks(self._batch // 2, self._tiles, self._sizes)):
            step = np.int32(VIEWS_AT - b)
            views = self._views(self._config, step, *to_global((tiles, sizes), self._mesh))
            found.append(self._embed(state.params, state.batch_stats, views))
        features, z = _joined(found, 2 * len(self._tiles))
        return features, z.reshape(len(self._tiles), 2, -1)

    def _on_images(self, state: TrainState, images: np.ndarray) -> np.ndarray:
        """Features (n, d) of (n, S, S, 3) uint8 images."""
        found = []
        for (block,) in _blocks(self._batch, images):
            fed = to_global(block.astype(np.float32) / np.float32(255), self._mesh)
            found.append(self._embed(state.params, state.batch_stats, fed))
        return _joined(found, len(images))[0]


class CollapseGuard:
    """Says in one line that a run looks collapsed, once until it looks sound again.

    After the warm-up: z's effective rank below `min_rank` at a measurement, or the mean cosine of
    negatives above 0.99 for 50 steps on end. It warns and stops nothing.
    """

    def __init__(self, warmup: int, min_rank: float, say: Say) -> None:
        self._warmup, self._min_rank, self._say = warmup, min_rank, say
        self._alike, self._low = 0, False

    def step(self, step: int, neg_sim: float) -> None:
        """Takes a step's mean cosine of negatives."""
        self._alike = self._alike + 1 if step > self._warmup and neg_sim > SAME else 0
        if self._alike == PATIENCE:
            self._warn(
                step, f"the mean cosine of negatives was above {SAME} for {PATIENCE} steps on end"
            )

    def measured(self, step: int, rank: float) -> None:
        """Takes a measured effective rank of z."""
        low = step > self._warmup and rank < self._min_rank
        if low and not self._low:
            self._warn(
                step,
                f"the effective rank of z is {rank:.2f}, below {self._min_rank:g} "
                "(--monitor.min-rank)",
            )
        self._low = low

    def _warn(self, step: int, fact: str) -> None:
        self._say(
            f"step {step}: the embedding looks collapsed: {fact}; try a lower --optim.rate, "
            "stronger augmentation or a larger --batch-size, in a new run folder."
        )


def spread(features: np.ndarray, z: np.ndarray) -> dict[str, float]:
    """Ranks, alignment, uniformity and cosines of features (2M, d) and z (M, 2, D) of views.

    Uniformity is the mean over the two views, as in Wang & Isola's code.
    """
    pos_sim, neg_sim = probes.pair_cosines(z)
    return {
        "effective_rank": probes.effective_rank(features),
        "effective_rank_z": probes.effective_rank(probes.unit(z).reshape(len(features), -1)),
        "alignment": probes.alignment(z),
        "uniformity": (probes.uniformity(z[:, 0]) + probes.uniformity(z[:, 1])) / 2,
        "pos_sim": pos_sim,
        "neg_sim": neg_sim,
    }


def probed(features: np.ndarray, of: ProbeSet, k: int) -> dict[str, float]:
    """Scores on the test rows of both probes, fitted on the others; NaN where features are."""
    train, test = features[of.train], features[of.test]
    names = ("f1", "auc", "accuracy")
    if not np.isfinite(features).all():
        return {f"{probe}_{name}": float("nan") for probe in ("knn", "ridge") for name in names}
    labels, truth = of.labels[of.train], of.labels[of.test]
    ridge, strength = probes.ridge_scores(train, labels, test, of.classes)
    knn = probes.knn_scores(train, labels, test, of.classes, k)
    measures = dict(zip(names, (probes.macro_f1, probes.auc, probes.accuracy), strict=True))
    values = {
        f"{probe}_{name}": measure(truth, scores)
        for probe, scores in (("knn", knn), ("ridge", ridge))
        for name, measure in measures.items()
    }
    return values | {"ridge_lambda": strength}


def sentence(step: int, values: dict[str, float], d: int, width: int) -> str:
    """The measurement as a line for a person."""
    probe = "".join(
        f"{name} macro F1 {values[f'{key}_f1']:.3f}, AUC {values[f'{key}_auc']:.3f}; "
        for key, name in (("knn", "kNN"), ("ridge", "ridge"))
        if f"{key}_f1" in values
    )
    return (
        f"step {step}: {probe}effective rank {values['effective_rank']:.1f} of {d}, of z "
        f"{values['effective_rank_z']:.1f} of {width}; alignment {values['alignment']:.2f}, "
        f"uniformity {values['uniformity']:.2f}"
    )


def make_embed_both(config: PretrainConfig) -> Callable[..., tuple[jax.Array, jax.Array]]:
    """The compiled model in evaluation mode, float32; call it with the mesh set.

    Returns:
      (params, batch_stats, images (N, S, S, 3) float32 in 0..1, sharded over `data`) ->
      (features (N, d), z (N, D)), on every device.
    """
    graphdef, _, _ = simclr.structure(config.model.name, config.model.projection)

    def embed(params: Any, batch_stats: Any, images: jax.Array) -> tuple[jax.Array, jax.Array]:
        inputs = normalise(images, config.model)
        features, z = simclr.features_and_z(graphdef, params, batch_stats, inputs)
        return everywhere(features), everywhere(z)

    return jax.jit(embed)


def fixed_tiles(tiles: Tiles, count: int) -> Arrays:
    """At most `count` tiles, evenly spread over the data: canvases (M, H, W, 3), sizes (M, 2)."""
    index = np.unique(np.linspace(0, len(tiles) - 1, min(count, len(tiles))).round().astype(int))
    canvas = np.zeros((len(index), *tiles.canvas, 3), np.uint8)
    sizes = np.zeros((len(index), 2), np.int32)
    for row, i in enumerate(index.tolist()):
        tile = tiles.read(i)
        sizes[row] = h, w = tile.shape[:2]
        canvas[row, :h, :w] = tile
    return canvas, sizes


def batch_of(most: int, devices: int) -> int:
    """Images in a batch: the same even number for each device, no more than `most` ask for."""
    each = min(PER_DEVICE, -(-most // devices))
    return devices * (each + each % 2)


def _flat_views(
    config: PretrainConfig, step: jax.Array, tiles: jax.Array, sizes: jax.Array
) -> jax.Array:
    """(n, H, W, 3) uint8 tiles to their (2n, S, S, 3) views, those of a tile side by side."""
    views = augmented(config, step, tiles, sizes)
    return jnp.reshape(views, (2 * views.shape[0], *views.shape[2:]))


def _blocks(size: int, *arrays: np.ndarray) -> Iterator[tuple[np.ndarray, ...]]:
    """This process's rows of blocks of `size` rows; the last is filled up with its last row."""
    n = size // jax.process_count()
    first = n * jax.process_index()
    for start in range(0, len(arrays[0]), size):
        rows = np.minimum(np.arange(start + first, start + first + n), len(arrays[0]) - 1)
        yield tuple(array[rows] for array in arrays)


def _joined(found: list[tuple[jax.Array, jax.Array]], count: int) -> Arrays:
    features, z = (
        np.concatenate([np.asarray(x) for x in part])[:count] for part in zip(*found, strict=True)
    )
    return features, z
