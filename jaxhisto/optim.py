"""LARS, LAMB and Adam with the paper's rates, warm-up and cosine, and what they leave alone."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxhisto.config import OptimConfig
from jaxhisto.errors import ConfigError

EXEMPT = ("bias", "scale")
"""Leaf names of biases and of BatchNorm's two parameters."""

LAMB = {"b1": 0.9, "b2": 0.999, "eps": 1e-6}
"""LAMB's moments and epsilon: optax's defaults, the paper names its rate alone."""


def build_optimizer(
    config: OptimConfig, batch_size: int, steps: int, steps_per_epoch: float
) -> tuple[optax.GradientTransformation, optax.Schedule]:
    """The optimizer and its learning rate.

    Args:
      config: name, rate, decay and warm-up.
      batch_size: N, images in the global batch; the paper's rates depend on it.
      steps: optimizer steps of the whole run, >= 1; the cosine ends at 0 there.
      steps_per_epoch: optimizer steps in a pass over the data.

    Returns:
      The transformation, and the schedule: step (0-based) -> learning rate.
    """
    schedule = build_schedule(config, batch_size, steps, steps_per_epoch)
    return _OPTIMIZERS[config.name](config, schedule), schedule


def build_schedule(
    config: OptimConfig, batch_size: int, steps: int, steps_per_epoch: float
) -> optax.Schedule:
    """Linear from 0 over the warm-up, then a cosine to 0 at `steps`, per step (ours).

    Equal to `optax.warmup_cosine_decay_schedule`, which mixes integers and floats and so does
    not trace under strict dtype promotion.
    """
    peak = peak_rate(config, batch_size)
    warmup = warmup_steps(config, steps, steps_per_epoch)

    def schedule(step: jax.Array | int) -> jax.Array:
        t = jnp.asarray(step, jnp.float32)
        done = jnp.clip((t - warmup) / max(steps - warmup, 1), 0.0, 1.0)
        return peak * jnp.where(t < warmup, t / max(warmup, 1), 0.5 * (1 + jnp.cos(jnp.pi * done)))

    return schedule


def warmup_steps(config: OptimConfig, steps: int, steps_per_epoch: float) -> int:
    """Steps of warm-up: `warmup_epochs`, but at most `warmup_share` of the run."""
    return int(min(config.warmup_epochs * steps_per_epoch, config.warmup_share * steps))


def peak_rate(config: OptimConfig, batch_size: int) -> float:
    """The configured rate, or the paper's rule for a global batch of N images (sec. 4, C.6)."""
    if config.rate is not None:
        return config.rate
    if config.name == "lars":
        return 0.3 * batch_size / 256
    if config.name == "lamb":
        return 4 / (2 ** (3 - (math.log2(batch_size) - 9) / 2) * 100)
    return 1e-4


def decayed(params: Any) -> Any:
    """True for each weight that decays and adapts, False for biases and BatchNorm, by name.

    Raises:
      ConfigError: a parameter's name and its number of axes contradict each other.
    """
    leaves, treedef = jax.tree_util.tree_flatten_with_path(params)
    flags = [path[-1].key not in EXEMPT for path, _ in leaves]
    wrong = [
        jax.tree_util.keystr(path, simple=True, separator=".")
        for (path, leaf), flag in zip(leaves, flags, strict=True)
        if flag != (leaf.ndim > 1)
    ]
    if wrong:
        raise ConfigError(
            f"{', '.join(wrong)}: name and shape disagree on whether this is a weight; name "
            f"vectors {' or '.join(EXEMPT)} and nothing else."
        )
    return jax.tree_util.tree_unflatten(treedef, flags)


def trust_norms(config: OptimConfig, params: Any, grads: Any, opt_state: Any) -> jax.Array | None:
    """The norms of which LARS and LAMB make this step's trust ratios; None for Adam.

    Args:
      config: of the optimizer.
      params: before the step.
      grads: of the step.
      opt_state: after the step (LAMB's moments are read from it).

    Returns:
      (3, P) float32, a column a parameter in the order of `jax.tree.leaves`: the L2 norms of the
      weights, of the gradient, and of what the ratio divides by: the gradient (LARS) or Adam's
      direction (LAMB), with the weight decay in it.
    """
    if config.name == "adam":
        return None
    directions = grads
    if config.name == "lamb":
        directions = _adam_directions(opt_state[0])
    whole = jax.tree.map(
        lambda w, d, decays: d + config.weight_decay * w if decays else d,
        params,
        directions,
        decayed(params),
    )
    norms = [[_norm(x) for x in jax.tree.leaves(t)] for t in (params, grads, whole)]
    return jnp.stack([jnp.stack(row) for row in norms])


def _norm(x: jax.Array) -> jax.Array:
    # All norms come from here: spelled alike, those of optimizer and metrics are taken once.
    return jnp.sqrt(jnp.sum(x * x))


def _adam_directions(state: optax.ScaleByAdamState) -> Any:
    """What `optax.scale_by_adam` made of its moments in the step that led to this state."""
    count = state.count.astype(jnp.float32)
    b1, b2, epsilon = LAMB.values()
    return jax.tree.map(
        lambda m, v: m / (1 - b1**count) / (jnp.sqrt(v / (1 - b2**count)) + epsilon),
        state.mu,
        state.nu,
    )


def _lars(config: OptimConfig, schedule: optax.Schedule) -> optax.GradientTransformation:
    # The rate multiplies before the momentum buffer, as in google-research/simclr; the form
    # with the rate outside it is another optimizer as soon as the rate changes.
    return optax.chain(
        optax.masked(_adapt(config.trust_coefficient, config.weight_decay), decayed),
        # optax.lars decays first and then adapts; with its state, its checkpoints can be read.
        optax.masked(optax.identity(), decayed),
        optax.scale_by_learning_rate(schedule),
        optax.trace(config.momentum),
    )


def _lamb(config: OptimConfig, schedule: optax.Schedule) -> optax.GradientTransformation:
    return optax.chain(  # as optax.lamb
        optax.scale_by_adam(**LAMB),
        optax.add_decayed_weights(config.weight_decay, decayed),
        _adapt(1.0),
        optax.scale_by_learning_rate(schedule),
    )


def _adapt(coefficient: float, decay: float = 0.0) -> optax.GradientTransformation:
    """`optax.add_decayed_weights(decay)`, then `optax.scale_by_trust_ratio(coefficient)`.

    Equal to them within rounding, without their temporaries. optax's norm is made to be
    differentiated at 0: it takes every norm twice, the second time of a copy. And the sum of
    gradient and decay would be kept between its norm and its use; here its parts are scaled.
    """

    def adapted(update: jax.Array, param: jax.Array) -> jax.Array:
        ratio = _trust_ratio(coefficient, param, update + decay * param if decay else update)
        return ratio * update + (ratio * decay) * param if decay else ratio * update

    def apply(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        return jax.tree.map(adapted, updates, params), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), apply)


def _trust_ratio(coefficient: float, param: jax.Array, update: jax.Array) -> jax.Array:
    """() float32; 1 where a norm is zero, or what is zero would stay so."""
    of_param, of_update = _norm(param), _norm(update)
    still = (of_param == 0) | (of_update == 0)
    return jnp.where(still, jnp.ones_like(of_param), coefficient * of_param / of_update)


def _adam(config: OptimConfig, schedule: optax.Schedule) -> optax.GradientTransformation:
    # L2 in the gradient of every parameter, as torch.optim.Adam; not AdamW.
    return optax.chain(optax.add_decayed_weights(config.weight_decay), optax.adam(schedule))


_OPTIMIZERS = {"lars": _lars, "lamb": _lamb, "adam": _adam}
