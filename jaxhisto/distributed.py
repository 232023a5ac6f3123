"""The mesh, who is process 0, and how a host's rows become one global array."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxhisto.errors import RunError


def make_mesh(devices: int = 0) -> Mesh:
    """A 1-D mesh `("data",)` over the first `devices` devices of all processes; 0: all.

    Set it with `jax.set_mesh` around everything that traces, also for one device. Its axis is
    explicit: where an array lies is part of its type, and a missing reshard fails in tracing.

    Raises:
      RunError: fewer devices than asked for.
    """
    found = jax.devices()
    if devices > len(found):
        raise RunError(
            f"--devices {devices}: there are {len(found)} ({found[0].platform}); "
            f"ask for at most {len(found)}, or 0 for all."
        )
    count = devices or len(found)
    return jax.make_mesh((count,), ("data",), (AxisType.Explicit,), devices=found[:count])


def to_global(arrays: Any, mesh: Mesh) -> Any:
    """This process's rows of a batch, as global arrays sharded over `data` on axis 0.

    Args:
      arrays: pytree of host arrays (n, ...), n = N / processes.
      mesh: from `make_mesh`.

    Returns:
      The same pytree of (N, ...) arrays.
    """
    sharding = NamedSharding(mesh, P("data"))

    def place(rows: np.ndarray) -> jax.Array:
        return jax.make_array_from_process_local_data(sharding, rows)

    return jax.tree.map(place, arrays)


def own_rows(array: jax.Array) -> np.ndarray:
    """The rows of an array sharded over `data` that lie on this process's devices, in order."""
    shards = {shard.index[0].start or 0: shard.data for shard in array.addressable_shards}
    return np.concatenate([np.asarray(shards[start]) for start in sorted(shards)])


def is_main() -> bool:
    """True in the one process that writes logs, checkpoints and reports."""
    return jax.process_index() == 0
