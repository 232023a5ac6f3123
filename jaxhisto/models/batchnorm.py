"""BatchNorm with PyTorch's running statistics, over the whole batch or over groups of rows."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec as P

STATISTICS = "batchnorm_statistics"
"""Name of a batch's means of x and of its square, for a policy of `jax.checkpoint` to keep."""


class BatchNorm(nnx.Module):
    """BatchNorm with PyTorch's running statistics, in float32 over the global batch.

    Flax keeps the biased variance as running variance, PyTorch the unbiased one (n/(n-1)).

    Args:
      width: channels.
      group: consecutive rows of the global batch that are normalised together, on any number of
        devices the same ones; 0: all. The running statistics then follow the mean over the
        groups of their means and unbiased variances.
    """

    MOMENTUM = 0.9  # PyTorch calls it 0.1
    EPSILON = 1e-5

    def __init__(self, width: int, group: int = 0):
        self.group = group
        self.scale = nnx.Param(jnp.ones((width,), jnp.float32))
        self.bias = nnx.Param(jnp.zeros((width,), jnp.float32))
        self.mean = nnx.BatchStat(jnp.zeros((width,), jnp.float32))
        self.var = nnx.BatchStat(jnp.ones((width,), jnp.float32))

    def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
        """(N, H, W, C), normalised by the batch (and recorded) or by the running statistics.

        Raises:
          ValueError: rows that are no whole number of groups; the global batch asked for where a
            device sees its own rows alone.
        """
        if train and self.group:
            gain, offset = self._by_groups(x)
        else:
            mean, var = self._from_batch(x) if train else (self.mean[...], self.var[...])
            gain = self.scale[...] * jax.lax.rsqrt(var + self.EPSILON)
            offset = self.bias[...] - mean * gain
            gain, offset = gain[None], offset[None]
        y = x.astype(jnp.float32) * gain[:, None, None] + offset[:, None, None]
        return y.astype(x.dtype)

    def _from_batch(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Mean and variance (C,) of the global batch."""
        if jax.sharding.get_abstract_mesh().manual_axes:
            raise ValueError(
                "BatchNorm over the global batch where a device sees its own rows alone; give "
                "bn_group."
            )
        x32 = x.astype(jnp.float32)
        axes = (0, 1, 2)
        mean, square = checkpoint_name((x32.mean(axes), (x32 * x32).mean(axes)), STATISTICS)
        # E[x^2] - E[x]^2 reads x once; rounding may take a constant channel below 0.
        var = jnp.maximum(square - mean * mean, 0.0)
        self._record(mean, var, x.size // x.shape[-1])
        return mean, var

    def _by_groups(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Gain and offset (N, C) of each row, by the statistics of its group."""
        n, height, width, channels = x.shape
        if n % self.group:
            raise ValueError(f"{n} rows are no whole number of groups of {self.group}.")
        x32 = x.astype(jnp.float32)
        count = self.group * height * width
        sums = jnp.stack([x32.sum((1, 2)), (x32 * x32).sum((1, 2))], 1)
        moments = _sum_groups(sums.reshape(n, 2 * channels), self.group) / count
        moments = checkpoint_name(moments, STATISTICS)
        mean, square = moments[:, :channels], moments[:, channels:]
        var = jnp.maximum(square - mean * mean, 0.0)
        self._record(mean.mean(0), var.mean(0), count)
        gain = self.scale[...][None] * jax.lax.rsqrt(var + self.EPSILON)
        offset = self.bias[...][None] - mean * gain
        rows = _to_rows(jnp.concatenate([gain, offset], 1), self.group, x)
        return rows[:, :channels], rows[:, channels:]

    def _record(self, mean: jax.Array, var: jax.Array, count: int) -> None:
        """Moves the running statistics to those of `count` values a channel."""
        unbiased = var * (count / max(count - 1, 1))
        for running, new in ((self.mean, mean), (self.var, unbiased)):
            blended = self.MOMENTUM * running[...] + (1 - self.MOMENTUM) * new
            running[...] = jax.lax.stop_gradient(blended)


def _sum_groups(values: jax.Array, group: int) -> jax.Array:
    """(N, C) to (N/group, C), the sums over consecutive rows."""
    n, width = values.shape
    axes, shards = _split_over(values)
    if (n // group) % shards == 0:  # no group crosses a border between devices: nothing is sent
        return values.reshape(n // group, group, width).sum(1)
    belongs = jax.reshard(_belongs(n, group), P(None, axes))
    return jnp.matmul(belongs, values, precision=jax.lax.Precision.HIGHEST, out_sharding=P())


def _to_rows(values: jax.Array, group: int, like: jax.Array) -> jax.Array:
    """(N/group, C) to (N, C), each group's values for all its rows; sharded as `like` (N, ...)."""
    groups, width = values.shape
    n = groups * group
    axes, shards = _split_over(like)
    if groups % shards == 0:
        return jnp.broadcast_to(values[:, None], (groups, group, width)).reshape(n, width)
    belongs = jax.reshard(_belongs(n, group), P(None, axes))
    return jnp.matmul(
        belongs.T, values, precision=jax.lax.Precision.HIGHEST, out_sharding=P(axes, None)
    )


def _belongs(n: int, group: int) -> jax.Array:
    """(N/group, N) float32: 1 where a row belongs to a group, else 0."""
    of_row = jnp.arange(n, dtype=jnp.int32) // group
    return (jnp.arange(n // group, dtype=jnp.int32)[:, None] == of_row[None]).astype(jnp.float32)


def _split_over(x: jax.Array) -> tuple[str | tuple[str, ...] | None, int]:
    """The mesh axes that the rows of `x` are split over, and into how many parts."""
    sharding = jax.typeof(x).sharding
    axes = sharding.spec[0] if len(sharding.spec) else None
    names = (axes,) if isinstance(axes, str) else axes or ()
    return axes, math.prod(sharding.mesh.shape[name] for name in names)
