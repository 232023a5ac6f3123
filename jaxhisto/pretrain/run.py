"""The loop: a run folder from a config, started or resumed."""

from __future__ import annotations

import math
import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxhisto import plots
from jaxhisto.checkpoints import Checkpoints, open_checkpoints
from jaxhisto.config import PretrainConfig
from jaxhisto.data.loader import batches
from jaxhisto.data.sources import Batch, open_tiles
from jaxhisto.distributed import is_main, make_mesh, to_global
from jaxhisto.errors import RunError
from jaxhisto.pretrain.folder import locked, open_run
from jaxhisto.pretrain.monitor import CollapseGuard, Monitor
from jaxhisto.pretrain.plan import check_batch, schedule_length
from jaxhisto.pretrain.profiling import check_profile, profiled
from jaxhisto.pretrain.start import starting_weights
from jaxhisto.pretrain.step import augmented, init_state, make_train_step
from jaxhisto.pretrain.timing import StepClock
from jaxhisto.pretrain.trust import report_trust_ratios
from jaxhisto.runlog import RunLog, read_metrics

SHEET_TILES = 8

Times = Callable[[], dict[str, float]]


def pretrain(config: PretrainConfig) -> Path:
    """Trains until the last step of the config, or goes on where RUN stopped.

    Returns:
      The run folder: config.json, data.json, env.json, views.png, trust_ratios.csv,
      metrics.jsonl, monitor.jsonl where asked for, checkpoints/, loss.png.

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
    check_profile(config.profile, steps)
    monitor = Monitor(config, tiles, mesh, steps, steps_per_epoch, tell)
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
        monitor.open(out, start)
        compiled = make_train_step(config, steps, steps_per_epoch)
        feed = batches(
            tiles, config.data, config.batch_size, config.seed, start, steps,
            process=jax.process_index(), processes=jax.process_count(),
        )  # fmt: skip
        with (
            closing(feed),
            new_log(config, out, start, steps) as log,
            profiled(config.profile, out, start, compiled, tell) as train_step,
        ):
            clock = StepClock()
            pending = Pending(log, checkpoints, clock, monitor.guard)
            for step, batch, wait_s in clock.timed(feed):
                rows = to_global((batch.tiles, batch.sizes), mesh)
                if step == 0:
                    draw_views(config, out, batch, rows)
                    if monitor.due(0):
                        log.board(0, monitor.measure(0, state), "monitor/")
                state, metrics = train_step(state, *rows)
                if step == 0:
                    tell(report_trust_ratios(config.optim, out, state.params, metrics))
                pending.record(step + 1, metrics, wait_s)
                last, stopping = step + 1 == steps, stop.is_set()
                if monitor.due(step + 1) and (last or not stopping):
                    pending.flush()
                    with clock.holding("monitor_s"):
                        log.board(step + 1, monitor.measure(step + 1, state), "monitor/")
                if last or stopping or (step + 1) % config.checkpoint_every == 0:
                    pending.flush()
                    with clock.holding("checkpoint_s"):
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

    def __init__(
        self, log: RunLog, checkpoints: Checkpoints, clock: StepClock, guard: CollapseGuard
    ) -> None:
        self._log, self._checkpoints, self._clock, self._guard = log, checkpoints, clock, guard
        self._held: tuple[int, dict[str, Any], float, Times] | None = None

    def record(self, step: int, metrics: dict[str, jax.Array], wait_s: float) -> None:
        """Takes the metrics of `step`, reads and logs those of the step before."""
        times = self._clock.handed_over(metrics["loss"])
        self.flush()
        scalars = {name: value for name, value in metrics.items() if value.ndim == 0}
        self._held = step, scalars, wait_s, times

    def flush(self) -> None:
        """Reads and logs what is held.

        Raises:
          RunError: the loss, the gradient or the new weights are not finite.
        """
        if self._held is None:
            return
        step, arrays, wait_s, times = self._held
        self._held = None
        metrics = {name: float(value) for name, value in arrays.items()}
        self._log.scalars(step, metrics | times(), wait_s)
        for name in ("loss", "grad_norm", "state_norm"):
            if not math.isfinite(metrics[name]):
                raise RunError(self._sentence(step, name, metrics[name]))
        self._guard.step(step, metrics["neg_sim"])

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
