"""The loop: a run folder from a config, started or resumed."""

from __future__ import annotations

import math
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxhisto import plots
from jaxhisto.checkpoints import Checkpoints, open_checkpoints
from jaxhisto.config import PretrainConfig
from jaxhisto.data.sources import open_tiles
from jaxhisto.distributed import is_main, make_mesh, own_rows
from jaxhisto.errors import RunError
from jaxhisto.pretrain.feed import PlacedBatch, open_feed
from jaxhisto.pretrain.folder import locked, open_run
from jaxhisto.pretrain.plan import check_batch, schedule_length
from jaxhisto.pretrain.room import step_bytes
from jaxhisto.pretrain.start import starting_weights
from jaxhisto.pretrain.step import augmented, init_state, make_train_step
from jaxhisto.runlog import RunLog, read_metrics

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
        cannot share, a loss that is not finite, a disk that is full.
      Stopped: SIGTERM or SIGINT, after a checkpoint.
    """
    mesh = make_mesh(config.devices)
    tiles = open_tiles(config.data)
    check_batch(config, len(tiles), mesh.size)
    steps, steps_per_epoch = schedule_length(config, len(tiles))
    begin = starting_weights(config)
    out = open_run(config, tiles)
    tell(f"{tiles.summary()}\n{steps} steps of {config.batch_size} images on {mesh.size} device(s)")

    with (
        jax.set_mesh(mesh),
        locked(out),
        open_checkpoints(out, config.keep) as checkpoints,
        stop_requests() as stop,
    ):
        state = init_state(config, steps, steps_per_epoch, mesh, begin)
        if checkpoints.latest_step is not None:
            state = checkpoints.restore(state)
        start = int(state.step)
        tell(whence(config, begin, start))
        train_step = make_train_step(config, steps, steps_per_epoch)
        taken = partial(step_bytes, train_step, state, config, tiles, mesh)
        feed = open_feed(config, tiles, mesh, start, steps, taken)
        with closing(feed), new_log(config, out, start, steps) as log:
            pending = Pending(log, checkpoints)
            for step, batch, wait_s in timed(feed):
                if step == 0:
                    draw_views(config, out, batch)
                state, metrics = train_step(state, batch.tiles, batch.sizes)
                pending.record(step + 1, metrics, wait_s)
                last, stopping = step + 1 == steps, stop.is_set()
                if last or stopping or (step + 1) % config.checkpoint_every == 0:
                    pending.flush()
                    checkpoints.save_async(step + 1, state, {"data_hash": tiles.hash})
                if stopping and not last:
                    checkpoints.wait()
                    raise Stopped(
                        f"{out}: stopped at step {step + 1} of {steps}, checkpoint written; start "
                        "the same line again."
                    )
            checkpoints.wait()
    draw_loss(config, out)
    return out


class Stopped(RunError):
    """Asked to stop and stopped in good order: start the same line again."""

    exit_code = 75


class Pending:
    """Hands a step's metrics to the log one step later.

    Reading a metric waits for its step; read one step late, the device always has the next
    step to work on meanwhile.
    """

    def __init__(self, log: RunLog, checkpoints: Checkpoints) -> None:
        self._log, self._checkpoints = log, checkpoints
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
                raise RunError(self._sentence(step, name, metrics[name]))

    def _sentence(self, step: int, name: str, value: float) -> str:
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


def timed(feed: Iterator[tuple[int, PlacedBatch]]) -> Iterator[tuple[int, PlacedBatch, float]]:
    """(step, batch, seconds waited for it)."""
    while True:
        asked = time.perf_counter()
        item = next(feed, None)
        if item is None:
            return
        yield *item, time.perf_counter() - asked


def draw_views(config: PretrainConfig, out: Path, batch: PlacedBatch) -> None:
    """views.png: the first tiles of the first batch, and what the network sees of them."""
    rows = (batch.tiles, batch.sizes)
    views = jax.jit(augmented, static_argnums=0)(config, np.int32(0), *rows)
    if is_main():  # whose own rows are the batch's first
        tiles, sizes, shown = (own_rows(array)[:SHEET_TILES] for array in (*rows, views))
        cut = [t[:h, :w] for t, (h, w) in zip(tiles, sizes, strict=True)]
        path = plots.view_sheet(cut, shown, out / "views.png")
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


@contextmanager
def stop_requests() -> Iterator[threading.Event]:
    """An event that SIGTERM and SIGINT set, so that the loop ends with a checkpoint.

    A second signal ends the process at once.
    """
    stop = threading.Event()

    def ask(number: int, frame: Any) -> None:
        if stop.is_set():
            os._exit(128 + number)
        stop.set()

    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    before = {s: signal.signal(s, ask) for s in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def tell(text: str) -> None:
    """One line for the person at the terminal, from one process."""
    if is_main():
        print(text, flush=True)
