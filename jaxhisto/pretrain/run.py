"""The loop: a run folder from a config, started or resumed."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxhisto import plots, xla_flags
from jaxhisto.checkpoints import Checkpoints, open_checkpoints
from jaxhisto.config import PretrainConfig
from jaxhisto.data.loader import batches, global_indices
from jaxhisto.data.sources import Batch, Tiles, open_tiles
from jaxhisto.distributed import is_main, make_mesh, to_global
from jaxhisto.errors import RunError
from jaxhisto.pretrain.folder import locked, open_run
from jaxhisto.pretrain.plan import check_batch, schedule_length
from jaxhisto.pretrain.saving import Saving
from jaxhisto.pretrain.start import starting_weights
from jaxhisto.pretrain.step import augmented, init_state, make_train_step
from jaxhisto.pretrain.stopping import Stopped, StopRequest, stop_requests
from jaxhisto.runlog import RunLog, read_metrics, write_atomically

SHEET_TILES = 8


def pretrain(config: PretrainConfig) -> Path:
    """Trains until the last step of the config, or goes on where RUN stopped.

    Returns:
      The run folder: config.json, data.json, env.json, views.png, metrics.jsonl, checkpoints/,
      loss.png.

    Raises:
      StoreError: data that is missing, damaged or smaller than a batch.
      ExportError: an encoder to start from that is none.
      RunError: another run in the folder, an encoder that does not fit, a batch the devices
        cannot share, a loss that is not finite, a disk that is full at the end, checkpoints of
        which none is sound.
      Stopped: SIGTERM or SIGINT, after a checkpoint or before the first step.
    """
    with stop_requests(config.out) as stop:
        return train(config, stop)


def train(config: PretrainConfig, stop: StopRequest) -> Path:
    """`pretrain`, between requests to stop."""
    mesh = make_mesh(config.devices)
    if config.deterministic:
        xla_flags.check_deterministic(mesh.devices.flat[0].platform)
    tiles = open_tiles(config.data)
    stop.check()
    check_batch(config, len(tiles), mesh.size)
    steps, steps_per_epoch = schedule_length(config, len(tiles))
    begin = starting_weights(config)
    out = open_run(config, tiles)
    tell(f"{tiles.summary()}\n{steps} steps of {config.batch_size} images on {mesh.size} device(s)")

    with (
        jax.set_mesh(mesh),
        locked(out),
        open_checkpoints(out, config.keep, config.keep_every) as checkpoints,
    ):
        state = init_state(config, steps, steps_per_epoch, mesh, begin)
        if (found := checkpoints.restore(state, {"data_hash": tiles.hash})) is not None:
            state = found[1]
        start = int(state.step)
        tell(whence(config, begin, start))
        train_step = make_train_step(config, steps, steps_per_epoch)
        feed = batches(
            tiles, config.data, config.batch_size, config.seed, start, steps,
            process=jax.process_index(), processes=jax.process_count(),
        )  # fmt: skip
        with closing(feed), new_log(config, out, start, steps) as log:
            pending = Pending(log, checkpoints, out, partial(batch_names, config, tiles))
            saving = Saving(checkpoints, config.checkpoint_every, {"data_hash": tiles.hash})
            for step, batch, wait_s in timed(feed):
                rows = to_global((batch.tiles, batch.sizes), mesh)
                if step == 0:
                    draw_views(config, out, batch, rows)
                with stop.first_step(step == start):
                    state, metrics = train_step(state, *rows)
                if step == start:
                    xla_flags.keep_autotune(out)
                pending.record(step + 1, metrics, wait_s)
                last, stopping = step + 1 == steps, stop.is_set()
                if saving.due(step + 1, now=last or stopping):
                    pending.flush()
                    saving.start(step + 1, state)
                if stopping and not last:
                    saving.finish()
                    log.finish()
                    raise Stopped(
                        f"{out}: stopped at step {step + 1} of {steps}, checkpoint written; start "
                        "the same line again."
                    )
            saving.finish()
            log.finish()
    draw_loss(config, out)
    return out


class Pending:
    """Hands a step's metrics to the log one step later.

    Reading a metric waits for its step; read one step late, the device always has the next
    step to work on meanwhile.
    """

    def __init__(
        self,
        log: RunLog,
        checkpoints: Checkpoints,
        out: Path,
        names: Callable[[int], list[str]],
    ) -> None:
        """Takes where to log, and `names` of the tiles in the batch of a step."""
        self._log, self._checkpoints, self._out, self._names = log, checkpoints, out, names
        self._held: tuple[int, dict[str, Any], float] | None = None

    def record(self, step: int, metrics: dict[str, jax.Array], wait_s: float) -> None:
        """Takes the metrics of `step`, reads and logs those of the step before."""
        self.flush()
        self._held = step, metrics, wait_s

    def flush(self) -> None:
        """Reads and logs what is held.

        Raises:
          RunError: the loss, the gradient or the new weights are not finite.
        """
        if self._held is None:
            return
        step, arrays, wait_s = self._held
        self._held = None
        metrics = {name: float(value) for name, value in arrays.items()}
        self._log.scalars(step, metrics, wait_s)
        for name in ("loss", "grad_norm", "state_norm"):
            if not math.isfinite(metrics[name]):
                listed = self._list_tiles(step, metrics)
                raise RunError(self._sentence(step, name, metrics[name]) + listed)

    def _list_tiles(self, step: int, metrics: dict[str, float]) -> str:
        """Writes which tiles the batch held, and says where."""
        path = self._out / f"nonfinite-{step}.json"
        shown = {name: repr(value) for name, value in metrics.items()}  # JSON knows no NaN
        content = {"step": step, "metrics": shown, "tiles": self._names(step)}
        try:
            if is_main():
                write_atomically(path, json.dumps(content, indent=1) + "\n")
        except OSError:  # a full disk must not hide what is said here
            return ""
        return f" {path} lists the batch's tiles."

    def _sentence(self, step: int, name: str, value: float) -> str:
        self._checkpoints.settle()
        kept = self._checkpoints.latest_step
        good = "no checkpoint was written yet" if kept is None else f"checkpoint {kept} is kept"
        return (
            f"step {step}: {name} is {value}; {good}; lower --optim.rate, raise "
            "--optim.temperature or use --precision f32, in a new run folder."
        )


def whence(config: PretrainConfig, begin: tuple[Any, Any] | None, start: int) -> str:
    """Where the weights of the first step come from, as one line."""
    if start:
        return f"resuming at step {start}"
    if begin is None:
        return f"starting from random weights, seed {config.seed}"
    whose = "its" if "projection" in begin[0] else "a new"
    return f"starting from {config.init}, with {whose} head"


def batch_names(config: PretrainConfig, tiles: Tiles, step: int) -> list[str]:
    """Where the tiles of the global batch come from whose step ends with `step` steps done."""
    indices = global_indices(config.seed, step - 1, len(tiles), config.batch_size)
    return [tiles.names(i) for i in indices.tolist()]


def new_log(config: PretrainConfig, out: Path, start: int, steps: int) -> RunLog:
    """The run's log, from step `start` on."""
    return RunLog(
        out,
        start_step=start,
        steps=steps,
        batch_size=config.batch_size,
        every=config.log_every,
        tensorboard=config.tensorboard,
    )


def timed(feed: Iterator[tuple[int, Batch]]) -> Iterator[tuple[int, Batch, float]]:
    """(step, batch, seconds waited for it)."""
    while True:
        asked = time.perf_counter()
        item = next(feed, None)
        if item is None:
            return
        yield *item, time.perf_counter() - asked


def draw_views(config: PretrainConfig, out: Path, batch: Batch, rows: Any) -> None:
    """views.png: the first tiles of the first batch, and what the network sees of them."""
    views = jax.jit(augmented, static_argnums=0)(config, np.int32(0), *rows)
    if is_main():
        shown = np.asarray(views[:SHEET_TILES]) if views.is_fully_addressable else None
        tiles = [t[:h, :w] for t, (h, w) in zip(batch.tiles, batch.sizes, strict=True)]
        if shown is not None:
            path = plots.view_sheet(tiles[: len(shown)], shown, out / "views.png")
            tell(f"{path}: tiles and their two views")


def draw_loss(config: PretrainConfig, out: Path) -> None:
    """loss.png, where matplotlib is installed."""
    if not is_main():
        return
    try:
        chance = math.log(2 * config.batch_size - 1)
        tell(f"{plots.loss_curve(read_metrics(out), chance, out / 'loss.png')}: the loss curve")
    except ImportError:
        tell("no loss.png: matplotlib is not installed; pip install 'jaxhisto[plots]'")


def tell(text: str) -> None:
    """One line for the person at the terminal, from one process."""
    if is_main():
        print(text, flush=True)
