"""Supervised training of a whole network: what `finetune` and `segment` have in common.

    learner = Learner(params, batch_stats, loss_of, outcome_of, score)
    best = fit(learner, train, validation, adam(config, arch), config, out)

The order of the images is a function of (seed, epoch), the augmentation one of (seed, epoch, row):
a run that was stopped goes on as if it had not been, and one on four devices differs from one on
one device by the order of sums alone.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh
from numpy.typing import NDArray

from jaxhisto.checkpoints import Checkpoints, open_checkpoints
from jaxhisto.console import say
from jaxhisto.distributed import is_main, make_mesh, to_global
from jaxhisto.downstream.batches import Part, Rows, ahead, epoch_order, fitting_batch
from jaxhisto.downstream.learner import (
    FitState,
    Learner,
    Outcomes,
    Step,
    evaluate,
    initial_state,
    make_outcomes,
    make_step,
)
from jaxhisto.errors import RunError
from jaxhisto.pretrain.folder import locked
from jaxhisto.pretrain.step import replicate
from jaxhisto.pretrain.stopping import Stopped, StopRequest, stop_requests
from jaxhisto.progress import Progress
from jaxhisto.runlog import append_line, keep_steps
from jaxhisto.training_config import TrainingConfig

Tree = dict[str, Any]


@dataclass(frozen=True)
class Fitted:
    """What training ended with.

    Fields:
      params, batch_stats: of the best validation score, on the host.
      epoch: that it was reached in, from 1.
      metrics: of the validation part there.
      epochs, steps: done in all.
      batch: images in a batch, which may be lower than asked for.
    """

    params: Tree
    batch_stats: Tree
    epoch: int
    metrics: dict[str, float]
    epochs: int
    steps: int
    batch: int


def adam(config: TrainingConfig, arch: str) -> optax.GradientTransformation:
    """Adam as torch.optim.Adam: weight decay is L2 in the gradient of every parameter."""
    return optax.chain(
        optax.add_decayed_weights(weight_decay(config, arch)), optax.adam(config.rate)
    )


def weight_decay(config: TrainingConfig, arch: str) -> float:
    """The config's, or the paper's: 1e-5 for ResNet18 (and 10), 1e-4 for the deeper ones."""
    if config.weight_decay is not None:
        return config.weight_decay
    return 1e-5 if arch in ("resnet10", "resnet18") else 1e-4


def fit(
    learner: Learner,
    train: Part,
    validation: Part,
    tx: optax.GradientTransformation,
    config: TrainingConfig,
    out: str | Path,
    *,
    verb: str,
    facts: Mapping[str, Any] | None = None,
) -> Fitted:
    """Trains, or goes on where RUN stopped, and gives the weights of the best validation score.

    An epoch takes each image once. Its last batch is filled up with images from its beginning,
    which weigh 0 in the loss; BatchNorm sees them. Equal scores: the earlier epoch's weights.

    Args:
      learner: the network.
      train, validation: what to train on, and what to choose the epoch by.
      tx: the optimizer.
      config: epochs, batch, seed, augmentation, devices.
      out: the run folder, which exists; gets checkpoints/ and metrics.jsonl, a line an epoch.
      verb: for progress and for what is said when the run is stopped.
      facts: what a checkpoint must have been trained with to be gone on from, as hashes; JSON.

    Raises:
      RunError: no images in a part, a batch that the devices cannot share, a loss that is not
        finite, a disk that is full, another process at work in the folder.
      Stopped: SIGTERM or SIGINT, after a checkpoint or before the first step.
    """
    for part, what in ((train, "train on"), (validation, "validate on")):
        if not len(part.rows):
            raise RunError(f"{out}: the split has no images to {what}; name another split.")
    mesh = make_mesh(config.devices)
    batch = fitting_batch(config.batch, len(train.rows), mesh.size)
    path = Path(out)
    with (
        stop_requests(str(out), verb=verb) as stop,
        locked(path),
        jax.set_mesh(mesh),
        open_checkpoints(path, keep=2) as checkpoints,
    ):
        state = replicate(initial_state(learner, tx), mesh)
        metadata = {"seed": config.seed, "batch": batch, **(facts or {})}
        found = checkpoints.restore(state, metadata)
        state = state if found is None else found[1]
        loop = _Loop(learner, train, validation, tx, config, mesh, batch, path, verb, metadata)
        return loop.run(state, checkpoints, stop)


@dataclass(frozen=True, eq=False)
class _Loop:
    """The loop over epochs; see `fit`."""

    learner: Learner
    train: Part
    validation: Part
    tx: optax.GradientTransformation
    config: TrainingConfig
    mesh: Mesh
    batch: int
    out: Path
    verb: str
    metadata: dict[str, Any]

    def run(self, state: FitState, checkpoints: Checkpoints, stop: StopRequest) -> Fitted:
        epochs, each = self.config.epochs, math.ceil(len(self.train.rows) / self.batch)
        start = int(state.step)
        if start:
            say(f"going on at step {start} of {epochs * each}")
        if is_main():
            keep_steps(self.out / "metrics.jsonl", start)
        fixed = replicate(self.learner.fixed, self.mesh)
        step, outcomes = make_step(self.learner, self.tx, self.config), make_outcomes(self.learner)
        progress = Progress(self.verb, epochs * each, start, every=self.config.log_every)
        try:
            for epoch in range(start // each, epochs):
                if self._had_enough(state, epoch):
                    break
                began = time.perf_counter()
                state = self._epoch(
                    epoch, state, fixed, step, checkpoints, stop, progress, epoch == start // each
                )
                done = int(state.step)
                state = self._validated(state, fixed, outcomes, epoch, began)
                stopping = stop.is_set()
                last = epoch + 1 == epochs or self._had_enough(state, epoch + 1)
                if last or stopping or (epoch + 1) % self.config.checkpoint_every == 0:
                    checkpoints.save_async(done, state, self.metadata)
                if stopping and not last:
                    checkpoints.wait()
                    raise self._stopped(done, epochs * each)
            checkpoints.wait()
        finally:
            progress.close()
        return self._fitted(state, fixed, outcomes, each)

    def _epoch(
        self,
        epoch: int,
        state: FitState,
        fixed: Tree,
        step: Step,
        checkpoints: Checkpoints,
        stop: StopRequest,
        progress: Progress,
        compiles: bool,
    ) -> FitState:
        """The steps of an epoch that are not done yet; `compiles`: the first one does."""
        places, weights = epoch_order(self.config.seed, epoch, len(self.train.rows), self.batch)
        each, begin = len(places), int(state.step) - epoch * len(places)
        before: tuple[int, jax.Array] | None = None
        for i, images, targets in ahead(self.train, places, epoch, begin):
            rows = self.train.rows[places[i]].astype(np.int32)
            share = self._share(rows, weights[i])
            placed = to_global((*share, images, targets), self.mesh)
            with stop.first_step(compiles and i == begin):
                state, loss = step(state, fixed, np.int32(epoch), *placed)
            # The loss of the step before: this one's would make the device wait for the host.
            if before is not None:
                self._check(epoch, *before, places)
            before = i, loss
            progress.update(epoch * each + i + 1, f"epoch {epoch + 1}")
            if stop.is_set() and i + 1 < each:
                self._check(epoch, i, loss, places)
                checkpoints.save_async(epoch * each + i + 1, state, self.metadata)
                checkpoints.wait()
                raise self._stopped(epoch * each + i + 1, self.config.epochs * each)
        if before is not None:
            self._check(epoch, *before, places)
        return state

    def _share(self, *arrays: NDArray[Any]) -> list[NDArray[Any]]:
        """This process's rows of a batch."""
        share, index = self.batch // jax.process_count(), jax.process_index()
        return [array[share * index : share * (index + 1)] for array in arrays]

    def _check(self, epoch: int, i: int, loss: jax.Array, places: Rows) -> None:
        if math.isfinite(value := float(loss)):
            return
        rows = self.train.rows[places[i]].tolist()
        names = ", ".join(self.train.name(row) for row in rows[:4])
        more = f" and {len(rows) - 4} more" if len(rows) > 4 else ""
        raise RunError(
            f"{self.out}: the loss is {value} in epoch {epoch + 1}, batch {i + 1}, of {names}"
            f"{more}; lower --training.rate, or look at these images."
        )

    def _validated(
        self, state: FitState, fixed: Tree, outcomes: Outcomes, epoch: int, began: float
    ) -> FitState:
        """The state after an epoch's validation, which is logged; the best so far is kept."""
        metrics = self._metrics(outcomes, state.params, state.batch_stats, fixed)
        loss = float(state.loss_sum) / len(self.train.rows)
        best = metrics["score"] > float(state.best_score)
        state = replace(state, loss_sum=replicate(np.float32(0), self.mesh))
        if best:
            # Copies: the next step's state takes the memory of this one's.
            state = replace(
                state,
                best_score=replicate(np.float32(metrics["score"]), self.mesh),
                best_epoch=replicate(np.int32(epoch + 1), self.mesh),
                best_params=jax.tree.map(jnp.copy, state.params),
                best_stats=jax.tree.map(jnp.copy, state.batch_stats),
            )
        if is_main():
            line = {"step": int(state.step), "epoch": epoch + 1, "loss": loss}
            seconds = round(time.perf_counter() - began, 3)
            shown = {f"validation_{name}": value for name, value in metrics.items()}
            append_line(self.out / "metrics.jsonl", line | shown | {"epoch_s": seconds})
        mark = "  best so far" if best else ""
        say(f"epoch {epoch + 1}: loss {loss:.4f}, validation {metrics['score']:.4f}{mark}")
        return state

    def _metrics(
        self, outcomes: Outcomes, params: Tree, stats: Tree, fixed: Tree
    ) -> dict[str, float]:
        found = evaluate(outcomes, params, stats, fixed, self.validation, self.batch, self.mesh)
        metrics = {name: float(value) for name, value in self.learner.score(found).items()}
        if not math.isfinite(metrics["score"]):
            raise RunError(
                f"{self.out}: the validation score is {metrics['score']}; look at the validation "
                "images and their targets."
            )
        return metrics

    def _had_enough(self, state: FitState, epoch: int) -> bool:
        """Whether `patience` epochs have gone by without a better score; `epoch` are done."""
        patience, best = self.config.patience, int(state.best_epoch)
        return bool(patience and best and epoch - best >= patience)

    def _stopped(self, step: int, steps: int) -> Stopped:
        return Stopped(
            f"{self.out}: stopped at step {step} of {steps}, checkpoint written; start the same "
            "line again."
        )

    def _fitted(self, state: FitState, fixed: Tree, outcomes: Outcomes, each: int) -> Fitted:
        metrics = self._metrics(outcomes, state.best_params, state.best_stats, fixed)
        params, stats = jax.tree.map(np.asarray, (state.best_params, state.best_stats))
        steps = int(state.step)
        return Fitted(
            params, stats, int(state.best_epoch), metrics, steps // each, steps, self.batch
        )
