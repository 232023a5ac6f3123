"""One step of supervised training, and one of evaluation, as pure functions.

The mesh is explicit and 1-D: the batch is sharded over `data`, the state lies on every device.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from jaxhisto.distributed import to_global
from jaxhisto.downstream.augmentation import augmented
from jaxhisto.downstream.batches import Part, ahead
from jaxhisto.training_config import TrainingConfig

Tree = dict[str, Any]


@dataclass(frozen=True)
class Learner:
    """A network and what is asked of it, as pure functions; images are (N, S, S, 3), RGB in 0..1.

    Fields:
      params, batch_stats: initial trees of float32 arrays, on the host; `params` are trained.
      loss_of: (params, batch_stats, fixed, images, targets) -> losses (N,) float32, the
        batch_stats after them; in training mode, BatchNorm over the global batch.
      outcome_of: (params, batch_stats, fixed, images, targets) -> a pytree of arrays (N, ...), of
        each image its own: logits, errors, a confusion matrix; in evaluation mode.
      score: the outcomes of a part, (n, ...) each in the order of its rows -> metrics, of which
        `score` decides, the more the better.
      fixed: weights that are used and not trained.
      masks: targets are masks (N, S, S), to which the images' geometry is done.
    """

    params: Tree
    batch_stats: Tree
    loss_of: Callable[[Tree, Tree, Tree, jax.Array, jax.Array], tuple[jax.Array, Tree]]
    outcome_of: Callable[[Tree, Tree, Tree, jax.Array, jax.Array], Any]
    score: Callable[[Any], Mapping[str, float]]
    fixed: Tree = field(default_factory=dict)
    masks: bool = False


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class FitState:
    """Everything training needs to go on; `step` counts from the first epoch's first batch."""

    step: jax.Array
    params: Tree
    batch_stats: Tree
    opt_state: Any
    loss_sum: jax.Array
    """() float32: of the epoch's images so far."""
    best_score: jax.Array
    best_epoch: jax.Array
    """() int32, from 1; 0: none yet."""
    best_params: Tree
    best_stats: Tree


Step = Callable[..., tuple[FitState, jax.Array]]
Outcomes = Callable[[Tree, Tree, Tree, jax.Array, jax.Array], Any]


def make_step(learner: Learner, tx: optax.GradientTransformation, config: TrainingConfig) -> Step:
    """The compiled step; call it with the mesh set. The state passed in is consumed.

    Returns:
      (state, fixed, epoch () int32, rows (N,) int32, weights (N,) float32, images (N, S, S, 3)
      uint8, targets (N, ...)) -> (state, loss () float32: the mean over those that weigh).
    """

    def loss_of(params: Tree, stats: Tree, fixed: Tree, *batch: jax.Array) -> Any:
        images, targets, weights = batch
        losses, stats = learner.loss_of(params, stats, fixed, images, targets)
        return jnp.sum(losses * weights) / jnp.sum(weights), stats

    def step(
        state: FitState,
        fixed: Tree,
        epoch: jax.Array,
        rows: jax.Array,
        weights: jax.Array,
        images: jax.Array,
        targets: jax.Array,
    ) -> tuple[FitState, jax.Array]:
        masks = targets if learner.masks else None
        seen, turned = augmented(config, epoch, rows, images, masks)
        batch = (seen, targets if turned is None else turned, weights)
        value_and_grad = jax.value_and_grad(loss_of, has_aux=True)
        (loss, stats), grads = value_and_grad(state.params, state.batch_stats, fixed, *batch)
        # optax's Adam raises a float to an integer power, which strict promotion refuses.
        with jax.numpy_dtype_promotion("standard"):
            updates, opt_state = tx.update(grads, state.opt_state, state.params)
        new = replace(
            state,
            step=state.step + 1,
            params=optax.apply_updates(state.params, updates),
            batch_stats=stats,
            opt_state=opt_state,
            loss_sum=state.loss_sum + loss * jnp.sum(weights),
        )
        return new, loss

    return jax.jit(step, donate_argnums=0)


def make_outcomes(learner: Learner) -> Outcomes:
    """The compiled (params, batch_stats, fixed, images uint8, targets) -> outcomes, everywhere."""

    def outcomes(params: Tree, stats: Tree, fixed: Tree, images: jax.Array, targets: Any) -> Any:
        seen = images.astype(jnp.float32) / jnp.float32(255)
        found = learner.outcome_of(params, stats, fixed, seen, targets)
        return jax.tree.map(lambda leaf: jax.reshard(leaf, P()), found)

    return jax.jit(outcomes)


def evaluate(
    outcomes: Outcomes, params: Tree, stats: Tree, fixed: Tree, part: Part, batch: int, mesh: Mesh
) -> Any:
    """The outcomes of a part: a pytree of host arrays (n, ...) in the order of its rows.

    Args:
      outcomes: of `make_outcomes`.
      params, stats, fixed: trees on the mesh.
      batch: images at a time, which the devices can share.
      mesh: set by the caller.
    """
    n = len(part.rows)
    places = np.resize(np.arange(n), math.ceil(n / batch) * batch).reshape(-1, batch)
    found = []
    for _, images, targets in ahead(part, places, 0):
        placed = to_global((images, targets), mesh)
        found.append(jax.tree.map(np.asarray, outcomes(params, stats, fixed, *placed)))
    return jax.tree.map(lambda *leaves: np.concatenate(leaves)[:n], *found)


def initial_state(learner: Learner, tx: optax.GradientTransformation) -> FitState:
    return FitState(
        step=jnp.zeros((), jnp.int32),
        params=learner.params,
        batch_stats=learner.batch_stats,
        opt_state=tx.init(learner.params),
        loss_sum=jnp.zeros((), jnp.float32),
        best_score=jnp.full((), -jnp.inf, jnp.float32),
        best_epoch=jnp.zeros((), jnp.int32),
        best_params=learner.params,
        best_stats=learner.batch_stats,
    )
