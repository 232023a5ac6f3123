"""The loop: a run folder from a config, started or resumed."""

from __future__ import annotations

import fcntl
import json
import math
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxhisto import config as settings
from jaxhisto import plots
from jaxhisto.checkpoints import Checkpoints, open_checkpoints
from jaxhisto.config import PretrainConfig
from jaxhisto.data.loader import batches
from jaxhisto.data.sources import Batch, Tiles, open_tiles
from jaxhisto.distributed import is_main, make_mesh, to_global
from jaxhisto.errors import RunError
from jaxhisto.pretrain.start import starting_weights
from jaxhisto.pretrain.step import augmented, init_state, make_train_step
from jaxhisto.runlog import RunLog, environment, read_metrics, write_atomically

SHEET_TILES = 8
BEGUN = {"env.json", "data.json", ".lock"}
"""What a start that was killed before its config.json may leave; it counts as nothing."""


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
        feed = batches(
            tiles, config.data, config.batch_size, config.seed, start, steps,
            process=jax.process_index(), processes=jax.process_count(),
        )  # fmt: skip
        with closing(feed), new_log(config, out, start, steps) as log:
            pending = Pending(log, checkpoints)
            for step, batch, wait_s in timed(feed):
                rows = to_global((batch.tiles, batch.sizes), mesh)
                if step == 0:
                    draw_views(config, out, batch, rows)
                state, metrics = train_step(state, *rows)
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


def check_batch(config: PretrainConfig, n_tiles: int, devices: int) -> None:
    """Refuses a batch that the devices cannot share or the data cannot fill."""
    if config.batch_size % devices:
        raise RunError(
            f"--batch-size {config.batch_size}: not divisible by {devices} devices; take "
            f"{max(1, config.batch_size // devices) * devices} or set --devices."
        )
    if config.batch_size > n_tiles:
        raise RunError(
            f"--batch-size {config.batch_size}: larger than the data, {n_tiles} tiles; take at "
            f"most {n_tiles // devices * devices} or add stores."
        )


def schedule_length(config: PretrainConfig, n_tiles: int) -> tuple[int, int]:
    """(steps of the whole run, steps of one pass over the data)."""
    steps_per_epoch = n_tiles // config.batch_size
    if config.steps is not None:
        return config.steps, steps_per_epoch
    epochs = 1000.0 if config.epochs is None else config.epochs
    return max(1, round(epochs * steps_per_epoch)), steps_per_epoch


def open_run(config: PretrainConfig, tiles: Tiles) -> Path:
    """Makes the run folder, or checks that it is this same run.

    Raises:
      RunError: the folder holds something else, lies inside the data, or holds a run with
        another identity or other data.
    """
    out = Path(config.out)
    found = out / "config.json"
    for store in config.data.stores:
        if out.resolve().is_relative_to(Path(store).resolve()):
            raise RunError(f"{out}: lies inside the data, {store}; give --out another folder.")
    if found.exists():
        check_same_run(config, tiles, out)
    elif out.exists() and (not out.is_dir() or {p.name for p in out.iterdir()} - BEGUN):
        raise RunError(f"{out}: exists and is no run folder; give --out an empty or new folder.")
    if is_main():
        out.mkdir(parents=True, exist_ok=True)
        devices = [f"{d.platform} {d.device_kind}" for d in jax.devices()]
        write_atomically(out / "env.json", json.dumps(environment(devices), indent=1) + "\n")
        write_atomically(out / "data.json", json.dumps(described(tiles), indent=1) + "\n")
        write_atomically(found, settings.to_json(config))
    return out


def check_same_run(config: PretrainConfig, tiles: Tiles, out: Path) -> None:
    """Refuses to resume under another config or on other data, naming what differs."""
    before = settings.from_json(PretrainConfig, (out / "config.json").read_text())
    ours, theirs = settings.identity(config), settings.identity(before)
    for name in ("out", *(("steps", "epochs") if config.extend else ())):
        ours.pop(name)
        theirs.pop(name)
    # Where the data lies may change between two starts; what it is may not (data_hash).
    ours.pop("data.stores"), theirs.pop("data.stores")
    lengths = [schedule_length(c, len(tiles))[0] for c in (before, config)]
    if config.extend and lengths[1] < lengths[0]:
        raise RunError(
            f"{out}: --extend to {lengths[1]} steps is shorter than the run's {lengths[0]}; give "
            "more steps, or another --out."
        )
    differing = settings.differences(theirs, ours)
    if differing:
        raise RunError(
            f"{out}: holds a run with another config ({'; '.join(differing)}); repeat its flags, "
            "pass --extend where only the length differs, or give another --out."
        )
    data_hash = json.loads((out / "data.json").read_text())["hash"]
    if data_hash != tiles.hash:
        raise RunError(
            f"{out}: was trained on other data ({data_hash[:12]}, now {tiles.hash[:12]}); give "
            "the same stores in the same order, or another --out."
        )


def described(tiles: Tiles) -> dict[str, Any]:
    """What was trained on: goes into data.json, and from there into the export."""
    return {
        "hash": tiles.hash,
        "tiles": len(tiles),
        "mpp_range": tiles.mpp_range(),
        "dropped": [{"name": name, "reason": reason} for name, reason in tiles.dropped],
        "summary": tiles.summary(),
    }


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


@contextmanager
def locked(out: Path) -> Iterator[None]:
    """Holds the run folder for this process (on each host, for its own file system's view).

    Raises:
      RunError: another process trains in it.
    """
    if not is_main():
        yield
        return
    with (out / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise RunError(
                f"{out}: another process is training in it; wait for it, or give another --out."
            ) from error
        yield


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
