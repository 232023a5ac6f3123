"""The contrastive gradient of a large batch, in micro-batches and with all its negatives.

The loss couples all images of a batch, but through their projections alone. So a first pass
embeds every micro-batch and keeps nothing else; the loss and its slope in each projection are
taken over the whole batch; and a second pass, micro-batch by micro-batch, carries each slope
back to the parameters ("gradient cache", Gao et al. 2021, arXiv 2101.06983). By the chain rule
the sum is the gradient of the whole batch, no approximation of it. It costs a second forward
pass and the memory of one micro-batch.

BatchNorm couples images too. Where its groups (`bn_group`) lie within micro-batches, the
training is the same as with the whole batch at once; the caller sees to it.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from jaxhisto.errors import RunError

Tree = dict[str, Any]
Metrics = dict[str, jax.Array]
Embed = Callable[[Tree, Any, Any], tuple[jax.Array, Tree]]
Contrast = Callable[[jax.Array], tuple[jax.Array, Metrics]]
LossAndGrads = Callable[[Tree, Any, Any], tuple[jax.Array, Metrics, Tree, Tree]]

AXIS = "data"


def in_micro_batches(embed: Embed, contrast: Contrast, parts: int) -> LossAndGrads:
    """`contrast` of `embed` and its gradient, with the activations of one micro-batch at a time.

    A micro-batch is a slice of each device's own rows: the j-th takes the j-th of `parts` equal
    slices on every device, so no image moves between devices. Devices exchange the projections
    once, for the loss, and the sums of gradients and statistics once, at the end.

    Args:
      embed: (params, fixed, rows) -> (z (n, 2, D), batch_stats), on one device's n rows; the new
        batch_stats are linear in what the rows add to them, as moving averages are.
      contrast: z (N, 2, D), sharded over `data` -> (loss, metrics).
      parts: micro-batches.

    Returns:
      (params, fixed, rows) -> (loss, metrics, batch_stats, grads); call it with the mesh set.
      `fixed` is any pytree that lies on every device and has no gradient, `rows` one of arrays
      (N, ...) sharded over `data`. It raises RunError where N is not divisible by devices times
      `parts`.
    """

    @partial(jax.shard_map, in_specs=(P(), P(), P(AXIS)), out_specs=(P(AXIS), P()))
    def embed_all(params: Tree, fixed: Any, rows: Any) -> tuple[jax.Array, Tree]:
        z, stats = jax.lax.map(lambda micro: embed(params, fixed, micro), cut(rows, parts))
        # Each micro-batch moved the same statistics by its own mean: their mean is the move by
        # the mean over all.
        mean = jax.tree.map(lambda stat: jax.lax.pmean(stat.mean(0), AXIS), stats)
        return z.reshape(-1, *z.shape[2:]), mean

    @partial(jax.shard_map, in_specs=(P(), P(), P(AXIS), P(AXIS)), out_specs=P())
    def pull_back(params: Tree, fixed: Any, rows: Any, slope: jax.Array) -> Tree:
        # As each device's own copy: the gradient of what all share would be summed over the
        # devices in every micro-batch.
        mine, zeros = own(params), own(jax.tree.map(jnp.zeros_like, params))

        def add(total: Tree, micro: tuple[Any, jax.Array]) -> tuple[Tree, None]:
            rows, slope = micro
            _, pull = jax.vjp(lambda params: embed(params, fixed, rows)[0], mine)
            return jax.tree.map(jnp.add, total, pull(slope)[0]), None

        total, _ = jax.lax.scan(add, zeros, cut((rows, slope), parts))
        return jax.lax.psum(total, AXIS)

    def loss_and_grads(
        params: Tree, fixed: Any, rows: Any
    ) -> tuple[jax.Array, Metrics, Tree, Tree]:
        check_rows(rows, parts)
        z, stats = embed_all(params, fixed, rows)
        (loss, metrics), slope = jax.value_and_grad(contrast, has_aux=True)(z)
        return loss, metrics, stats, pull_back(params, fixed, rows, slope)

    return loss_and_grads


def check_rows(rows: Any, parts: int) -> None:
    """Refuses rows that are not `parts` equal slices on every device."""
    devices = jax.sharding.get_abstract_mesh().size
    for count in {leaf.shape[0] for leaf in jax.tree.leaves(rows)}:
        if count % (devices * parts):
            raise RunError(
                f"--memory.accumulate {parts}: {count} images on {devices} device(s) cannot be "
                f"cut into {parts} equal micro-batches; take another batch size."
            )


def cut(rows: Any, parts: int) -> Any:
    """Each leaf (n, ...) of one device as (parts, n / parts, ...), consecutive rows together."""
    return jax.tree.map(lambda leaf: leaf.reshape(parts, -1, *leaf.shape[1:]), rows)


def own(tree: Any) -> Any:
    """What all devices share, as a copy of each."""
    return jax.tree.map(lambda leaf: jax.lax.pcast(leaf, AXIS, to="varying"), tree)
