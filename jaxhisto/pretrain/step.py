"""One optimizer step of SimCLR as a pure function of state and batch.

The mesh is explicit and 1-D: the batch is sharded over `data`, the state lies on every device.
All communication is BatchNorm's statistics, the all-gather of the projections in the loss (and of
three numbers a view where it is chunked), and the sum of the gradients.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxhisto.augment import two_views
from jaxhisto.config import ModelConfig, PretrainConfig
from jaxhisto.models import simclr
from jaxhisto.optim import build_optimizer, trust_norms
from jaxhisto.pretrain.accumulate import Embed, LossAndGrads, in_micro_batches
from jaxhisto.pretrain.loss import nt_xent
from jaxhisto.pretrain.plan import check_groups
from jaxhisto.pretrain.xla import Options, merged, parsed

Tree = dict[str, Any]
Metrics = dict[str, jax.Array]

DTYPES = {"bf16": jnp.bfloat16, "f32": jnp.float32}


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TrainState:
    """Everything a run needs to go on.

    `step` is the number of steps taken, () int32. `params` and `batch_stats` are nested dicts
    of float32 arrays with torchvision's names, `opt_state` is optax's.
    """

    step: jax.Array
    params: Tree
    batch_stats: Tree
    opt_state: Any


def init_state(
    config: PretrainConfig,
    steps: int,
    steps_per_epoch: float,
    mesh: Mesh,
    start: tuple[Tree, Tree] | None = None,
) -> TrainState:
    """The state before the first step: a function of the seed, the same on any mesh.

    Args:
      config: the run's settings.
      steps, steps_per_epoch: of the schedule.
      mesh: where the state goes.
      start: (params, batch_stats) to begin with instead of the seed's; where they lack the
        projection, the seed's is taken.
    """
    tx, _ = build_optimizer(config.optim, config.batch_size, steps, steps_per_epoch)
    params, stats = simclr.init(config.model.name, config.model.projection, config.seed)
    if start is not None:
        params, stats = params | start[0], start[1]
    state = TrainState(jnp.zeros((), jnp.int32), params, stats, tx.init(params))
    return replicate(state, mesh)


def replicate(tree: Any, mesh: Mesh) -> Any:
    """A pytree of arrays on every device; each process gives its own copy, none is sent."""

    def place(leaf: Any) -> jax.Array:
        host = np.asarray(leaf)
        sharding = NamedSharding(mesh, P())
        return jax.make_array_from_callback(host.shape, sharding, lambda _: host)

    return jax.tree.map(place, tree)


def make_train_step(
    config: PretrainConfig, steps: int, steps_per_epoch: float, *, with_gradient: bool = False
) -> Callable[[TrainState, jax.Array, jax.Array], tuple[TrainState, Metrics]]:
    """The compiled step; call it with the mesh set. The state passed in is consumed.

    Args:
      config: the run's settings.
      steps, steps_per_epoch: of the schedule.
      with_gradient: also hand out the gradient, as the metric `gradient`, for checks.

    Returns:
      (state, tiles (N, H, W, 3) uint8, sizes (N, 2) int32) -> (state, metrics), tiles and
      sizes sharded over `data`. Metrics are () float32: `loss`, `rate`, `grad_norm` (L2 over
      all gradients), `state_norm` (over the new parameters and BatchNorm statistics),
      `pos_sim`, `neg_sim`, `accuracy`; under LARS and LAMB there is also `trust_norms`, (3, P)
      float32 (see `optim.trust_norms`).
    """
    loss_and_grads = of_tiles(config)
    update = make_update(config, steps, steps_per_epoch)

    def step(state: TrainState, tiles: jax.Array, sizes: jax.Array) -> tuple[TrainState, Metrics]:
        rows = (tiles, sizes, row_numbers(sizes))
        fixed = (state.batch_stats, state.step)
        loss, metrics, stats, grads = loss_and_grads(state.params, fixed, rows)
        new, of_update = update(replace(state, batch_stats=stats), grads)
        handed_out: dict[str, Any] = {"gradient": grads} if with_gradient else {}
        return new, {"loss": loss} | of_update | metrics | handed_out

    return jax.jit(step, donate_argnums=0, compiler_options=compiler_options(config))


def compiler_options(config: PretrainConfig) -> Options:
    """What XLA is told: `step.xla`, and that what is to be computed again is not kept after all.

    Its CPU compiler drops the barriers between a value and its recomputation, and then merges
    the two as the same expression; on an accelerator it keeps them.

    Raises:
      ConfigError: as `xla.parsed`.
    """
    keep = config.memory.remat == "block" and jax.default_backend() == "cpu"
    own: Options = {"xla_disable_hlo_passes": "cse_barrier_expander"} if keep else {}
    return merged(own, parsed(config.step.xla))


def augmented(
    config: PretrainConfig,
    step: jax.Array,
    tiles: jax.Array,
    sizes: jax.Array,
    rows: jax.Array | None = None,
) -> jax.Array:
    """(N, 2, S, S, 3) float32 views in 0..1 of a batch of tiles: f(seed, step, row).

    `rows` (N,) int32 are the tiles' numbers in the global batch; none: 0 to N - 1.
    """
    key = jax.random.fold_in(jax.random.key(config.seed), step)
    rows = row_numbers(sizes) if rows is None else rows

    def views(key: jax.Array, tiles: jax.Array, sizes: jax.Array, rows: jax.Array) -> jax.Array:
        return two_views(key, tiles, sizes, config.tile_px, config.augment, rows=rows)

    if jax.sharding.get_abstract_mesh().manual_axes:  # one device's rows: nothing to place
        return views(key, tiles, sizes, rows)
    # The compiler may place what lies inside: each row is its own, so nothing has to move, and
    # the augmentation need not say where each of its reshapes lies.
    return jax.sharding.auto_axes(views)(key, tiles, sizes, rows, out_sharding=P("data"))


def row_numbers(sizes: jax.Array) -> jax.Array:
    """(N,) int32, 0 to N - 1, sharded as `sizes` (N, 2)."""
    return jnp.arange(sizes.shape[0], dtype=jnp.int32) + jnp.zeros_like(sizes[:, 0])


def make_loss_and_grads(config: PretrainConfig) -> LossAndGrads:
    """The pure function (params, batch_stats, views) -> (loss, metrics, batch_stats, grads).

    `views` are (N, 2, S, S, 3) in 0..1; `grads` has the shape of `params`.
    """
    return differentiated(config, make_project(config))


def of_tiles(config: PretrainConfig) -> LossAndGrads:
    """As `make_loss_and_grads`, from tiles, whose views are made where they are needed.

    Returns:
      (params, (batch_stats, step), (tiles (N, H, W, 3) uint8, sizes (N, 2) int32, row numbers
      (N,) int32)) -> (loss, metrics, batch_stats, grads).
    """
    project = make_project(config)

    def embed(params: Tree, fixed: tuple[Tree, jax.Array], rows: Any) -> tuple[jax.Array, Tree]:
        batch_stats, step = fixed
        return project(params, batch_stats, augmented(config, step, *rows))

    return differentiated(config, embed)


def make_project(config: PretrainConfig) -> Embed:
    """(params, batch_stats, views (n, 2, S, S, 3)) -> (z (n, 2, D), batch_stats), to train."""
    graphdef, _, _ = simclr.structure(
        config.model.name,
        config.model.projection,
        DTYPES[config.precision],
        bn_group=config.model.bn_group,
        remat=config.memory.remat == "block",
        stem=config.step.stem,
    )

    def project(params: Tree, batch_stats: Tree, views: jax.Array) -> tuple[jax.Array, Tree]:
        n, _, *image = views.shape
        # Both views are one batch to BatchNorm. Merging axis 1 into the sharded axis 0 moves
        # nothing; concatenating the views on the batch axis would.
        images = normalise(views.reshape(2 * n, *image), config.model)
        z, stats = simclr.project(graphdef, params, batch_stats, images, train=True)
        return z.reshape(n, 2, -1), stats

    return project


def differentiated(config: PretrainConfig, embed: Embed) -> LossAndGrads:
    """The loss of what `embed` gives, and its gradient: at once, or in micro-batches.

    Returns:
      (params, fixed, rows) -> (loss, metrics, batch_stats, grads); `embed` takes the same.

    Raises:
      RunError: when traced, micro-batches that the batch or BatchNorm do not allow.
    """

    def contrast(z: jax.Array) -> tuple[jax.Array, Metrics]:
        return nt_xent(z, config.optim.temperature, config.memory.columns(config.batch_size))

    def loss_of(params: Tree, fixed: Any, rows: Any) -> tuple[jax.Array, Any]:
        z, stats = embed(params, fixed, rows)
        loss, metrics = contrast(z)
        return loss, (metrics, stats)

    def loss_and_grads(
        params: Tree, fixed: Any, rows: Any
    ) -> tuple[jax.Array, Metrics, Tree, Tree]:
        parts = config.memory.accumulate
        if parts > 1:
            check_groups(config, jax.sharding.get_abstract_mesh().size)
            return in_micro_batches(embed, contrast, parts)(params, fixed, rows)
        value_and_grad = jax.value_and_grad(loss_of, has_aux=True)
        (loss, (metrics, stats)), grads = value_and_grad(params, fixed, rows)
        return loss, metrics, stats, grads

    return loss_and_grads


def make_update(
    config: PretrainConfig, steps: int, steps_per_epoch: float
) -> Callable[[TrainState, Tree], tuple[TrainState, Metrics]]:
    """The pure function (state, grads) -> (state one step on, {rate, grad_norm, state_norm}).

    Under LARS and LAMB the metrics also hold `trust_norms`.
    """
    tx, schedule = build_optimizer(config.optim, config.batch_size, steps, steps_per_epoch)

    def update(state: TrainState, grads: Tree) -> tuple[TrainState, Metrics]:
        # optax's Adam and LAMB raise a float to an integer power, which strict promotion refuses.
        with jax.numpy_dtype_promotion("standard"):
            updates, opt_state = tx.update(grads, state.opt_state, state.params)
            norms = trust_norms(config.optim, state.params, grads, opt_state)
        params = optax.apply_updates(state.params, updates)
        rate = jnp.asarray(schedule(state.step), jnp.float32)
        metrics = {
            "rate": rate,
            "grad_norm": norm(grads),
            "state_norm": norm((params, state.batch_stats)),
        }
        if norms is not None:
            metrics["trust_norms"] = norms
        return TrainState(state.step + 1, params, state.batch_stats, opt_state), metrics

    return update


def norm(tree: Any) -> jax.Array:
    """() float32, the L2 norm over all arrays of a tree; not finite where one of them is not."""
    squares = jnp.stack([jnp.sum(leaf * leaf) for leaf in jax.tree.leaves(tree)])
    return jnp.sqrt(squares.sum())


def make_embed(model: ModelConfig) -> Callable[[Tree, Tree, jax.Array], jax.Array]:
    """The compiled encoder in evaluation mode (running statistics), in float32.

    Returns:
      (params, batch_stats, images (n, H, W, 3) float32 in 0..1) -> (n, d) float32.
    """
    graphdef = simclr.encoder_structure(model.name)

    def embed(params: Tree, batch_stats: Tree, images: jax.Array) -> jax.Array:
        return simclr.features(graphdef, params, batch_stats, normalise(images, model))

    return jax.jit(embed)


def normalise(images: jax.Array, model: ModelConfig) -> jax.Array:
    """(..., 3) RGB in 0..1 to the encoder's input, (x - mean) / std."""
    shape = (1,) * (images.ndim - 1) + (3,)
    mean = jnp.asarray(model.mean, images.dtype).reshape(shape)
    std = jnp.asarray(model.std, images.dtype).reshape(shape)
    return (images - mean) / std
