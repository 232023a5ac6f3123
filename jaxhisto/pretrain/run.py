"""The loop: a run folder from a config, started or resumed."""

from __future__ import annotations

import math
from contextlib import closing, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from jaxhisto import plots, xla_flags
from jaxhisto.checkpoints import open_checkpoints
from jaxhisto.config import PretrainConfig
from jaxhisto.console import say
from jaxhisto.data.loader import global_indices
from jaxhisto.data.sources import Tiles, open_tiles
from jaxhisto.distributed import agree, is_main, main_first, make_mesh, own_rows
from jaxhisto.pretrain.feed import PlacedBatch, open_feed
from jaxhisto.pretrain.folder import locked, open_run, stamped
from jaxhisto.pretrain.handshake import must_be_equal
from jaxhisto.pretrain.monitor import Monitor
from jaxhisto.pretrain.pending import Pending
from jaxhisto.pretrain.plan import check_batch, schedule_length
from jaxhisto.pretrain.profiling import check_profile, profiled
from jaxhisto.pretrain.room import step_bytes
from jaxhisto.pretrain.saving import Saving
from jaxhisto.pretrain.start import starting_weights
from jaxhisto.pretrain.step import augmented, init_state, make_train_step
from jaxhisto.pretrain.stopping import Stopped, StopRequest, stop_requests
from jaxhisto.pretrain.timing import StepClock
from jaxhisto.pretrain.trust import report_trust_ratios
from jaxhisto.pretrain.xla import check_options
from jaxhisto.runlog import RunLog, read_metrics

SHEET_TILES = 8


def pretrain(config: PretrainConfig) -> Path:
    """Trains until the last step of the config, or goes on where RUN stopped.

    Returns:
      The run folder: config.json, data.json, env.json, views.png, trust_ratios.csv,
      metrics.jsonl, monitor.jsonl where asked for, checkpoints/, loss.png.

    Raises:
      ConfigError: an option that XLA does not take.
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
    check_options(config.step.xla)
    tiles = open_tiles(config.data)
    stop.check()
    check_batch(config, len(tiles), mesh.size)
    steps, steps_per_epoch = schedule_length(config, len(tiles))
    check_profile(config.profile, steps)
    monitor = Monitor(config, tiles, mesh, steps, steps_per_epoch, say)
    begin = starting_weights(config)
    agree(must_be_equal(config, tiles, begin) | monitor.record())
    out = main_first(lambda: open_run(config, tiles))
    say(f"{tiles.summary()}\n{steps} steps of {config.batch_size} images on {mesh.size} device(s)")

    with (
        jax.set_mesh(mesh),
        locked(out),
        open_checkpoints(out, config.keep, config.keep_every) as checkpoints,
    ):
        state = init_state(config, steps, steps_per_epoch, mesh, begin)
        if (found := checkpoints.restore(state, stamped(tiles))) is not None:
            state = found[1]
        start = int(state.step)
        agree({"run folder": {"newest checkpoint": start}})
        say(whence(config, begin, start))
        monitor.open(out, start)
        compiled = make_train_step(config, steps, steps_per_epoch)

        def taken() -> int:
            with stop.compiling():
                return step_bytes(compiled, state, config, tiles, mesh)

        feed = open_feed(config, tiles, mesh, start, steps, taken)
        with (
            closing(feed),
            new_log(config, out, start, steps) as log,
            profiled(config.profile, out, start, compiled, say) as train_step,
        ):
            clock = StepClock()
            names = partial(batch_names, config, tiles)
            pending = Pending(log, checkpoints, clock, monitor.guard, out, names)
            saving = Saving(checkpoints, config.checkpoint_every, stamped(tiles))
            for step, batch, wait_s in clock.timed(feed):
                if step == 0:
                    with stop.compiling():
                        look_before(config, out, batch, state, monitor, log)
                with stop.first_step(step == start):
                    state, metrics = train_step(state, batch.tiles, batch.sizes)
                if step == start:
                    look_after(config, out, step, state, metrics)
                pending.record(step + 1, metrics, wait_s)
                last, stopping = step + 1 == steps, asked_to_stop(stop, step)
                if monitor.due(step + 1) and (last or not stopping):
                    pending.flush()
                    with clock.holding("monitor_s"):
                        log.board(step + 1, monitor.measure(step + 1, state), "monitor/")
                if saving.due(step + 1, now=last or stopping):
                    pending.flush()
                    with clock.holding("checkpoint_s"):
                        saving.start(step + 1, state)
                if stopping and not last:
                    main_first(partial(finish, saving, log))
                    raise stopped(out, step + 1, steps)
            main_first(partial(finish, saving, log))
    draw_loss(config, out)
    return out


def look_before(
    config: PretrainConfig, out: Path, batch: Any, state: Any, monitor: Monitor, log: Any
) -> None:
    """What is there before the first update: the views of the first tiles, and the probes."""
    draw_views(config, out, batch)
    log.board(0, monitor.measure(0, state) if monitor.due(0) else {}, "monitor/")


def look_after(
    config: PretrainConfig, out: Path, step: int, state: Any, metrics: dict[str, Any]
) -> None:
    """What the first update of this start leaves: kernels as they were tuned, trust ratios."""
    if is_main():
        xla_flags.keep_autotune(out)
    if step == 0:
        say(report_trust_ratios(config.optim, out, state.params, metrics))


def stopped(out: Path, step: int, steps: int) -> Stopped:
    """What ends a run that was asked to stop."""
    return Stopped(
        f"{out}: stopped at step {step} of {steps}, checkpoint written; start the same line again."
    )


def finish(saving: Saving, log: Any) -> None:
    """Returns when the last checkpoint and every line of the log are on disk."""
    saving.finish()
    log.finish()


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


def new_log(config: PretrainConfig, out: Path, start: int, steps: int) -> Any:
    """The run's log, from step `start` on; process 0 writes it."""
    if not is_main():
        return nullcontext(NoLog())
    return RunLog(
        out,
        start_step=start,
        steps=steps,
        batch_size=config.batch_size,
        every=config.log_every,
        tensorboard=config.tensorboard,
    )


def draw_views(config: PretrainConfig, out: Path, batch: PlacedBatch) -> None:
    """views.png: the first tiles of the first batch, and what the network sees of them."""
    rows = (batch.tiles, batch.sizes)
    views = jax.jit(augmented, static_argnums=0)(config, np.int32(0), *rows)
    if is_main():  # whose own rows are the batch's first
        tiles, sizes, shown = (own_rows(array)[:SHEET_TILES] for array in (*rows, views))
        cut = [t[:h, :w] for t, (h, w) in zip(tiles, sizes, strict=True)]
        path = plots.view_sheet(cut, shown, out / "views.png")
        say(f"{path}: tiles and their two views")


def draw_loss(config: PretrainConfig, out: Path) -> None:
    """loss.png, where matplotlib is installed."""
    if not is_main():
        return
    try:
        chance = math.log(2 * config.batch_size - 1)
        say(f"{plots.loss_curve(read_metrics(out), chance, out / 'loss.png')}: the loss curve")
    except ImportError:
        say("no loss.png: matplotlib is not installed; pip install 'jaxhisto[plots]'")


def asked_to_stop(stop: StopRequest, step: int) -> bool:
    """Whether the run ends with this step (0-based); True in all processes at the same one.

    With several processes JAX listens for SIGTERM: one to any of them reaches all, at a step that
    none has begun.
    """
    return stop.is_set() or multihost_utils.reached_preemption_sync_point(step)


class NoLog:
    """Takes what process 0 logs, in the others."""

    def scalars(self, step: int, metrics: dict[str, float], wait_s: float) -> None:
        """Writes nothing."""

    def board(self, step: int, values: dict[str, float], prefix: str = "") -> None:
        """Shows nothing."""

    def finish(self) -> None:
        """Writes nothing."""
