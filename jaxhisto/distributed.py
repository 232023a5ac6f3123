"""Processes, the mesh, and how a host's rows become one global array."""

from __future__ import annotations

import json
import os
import re
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxhisto.errors import JaxhistoError, RunError
from jaxhisto.launch import Launch, hostname, inherited
from jaxhisto.rollcall import differing

Result = TypeVar("Result")

LOST_PEER = re.compile(
    r"gloo|connection (closed|reset|refused)|broken pipe|nccl|socket closed|unavailable"
    r"|deadline.exceeded|coordination service|barrier",
    re.IGNORECASE,
)
"""What collectives say when the process at their other end has gone."""
SLACK_S = 10.0


def join(launch: Launch) -> None:
    """Makes this process one of those that train together; before any other use of JAX.

    The roll call has found that all are there, so this waits for nobody but in trouble.
    """
    # On a CPU the default has no collectives between processes; elsewhere this does nothing.
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(
        launch.coordinator,
        launch.processes,
        launch.process,
        local_device_ids=launch.local_devices,
        cluster_detection_method="deactivate",
        initialization_timeout=launch.start_timeout,
        heartbeat_timeout_seconds=launch.heartbeat,
        shutdown_timeout_seconds=launch.start_timeout,
    )


def leave() -> None:
    """Parts from the other processes in good order; waits for all of them."""
    jax.distributed.shutdown()


def make_mesh(devices: int = 0) -> Mesh:
    """A 1-D mesh `("data",)` over `devices` devices, as many of each process; 0: all.

    Set it with `jax.set_mesh` around everything that traces, also for one device. Its axis is
    explicit: where an array lies is part of its type, and a missing reshard fails in tracing.

    Raises:
      RunError: fewer devices than asked for, or processes with unlike shares.
    """
    # In the order of the processes, each of which reads the rows of its own place in a batch.
    # jax.make_mesh may reorder a TPU's devices, and a batch's rows with them.
    found = sorted(jax.devices(), key=lambda d: (d.process_index, d.id))
    if devices > len(found):
        raise RunError(
            f"--devices {devices}: there are {len(found)} ({found[0].platform}); "
            f"ask for at most {len(found)}, or 0 for all."
        )
    shares = Counter(d.process_index for d in found)
    if len(set(shares.values())) > 1:
        counts = ", ".join(f"{shares[p]} in process {p}" for p in sorted(shares))
        raise RunError(
            f"the processes have unlike numbers of devices ({counts}); give each as many, for "
            "example by CUDA_VISIBLE_DEVICES."
        )
    if devices % len(shares):
        raise RunError(
            f"--devices {devices}: does not divide among {len(shares)} processes; take a multiple "
            f"of {len(shares)}, or 0 for all."
        )
    share = (devices or len(found)) // len(shares)
    taken = [d for i, d in enumerate(found) if i % shares[d.process_index] < share]
    return Mesh(np.array(taken), ("data",), axis_types=(AxisType.Explicit,))


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


def exchange(text: str) -> list[str]:
    """What each process says, in the order of the processes; all must call it together."""
    if jax.process_count() == 1:
        return [text]
    data = text.encode()
    longest = int(np.max(multihost_utils.process_allgather(np.int32(len(data)))))
    padded = np.zeros(longest, np.uint8)
    padded[: len(data)] = np.frombuffer(data, np.uint8)
    gathered = np.asarray(multihost_utils.process_allgather(padded))
    return [bytes(row).rstrip(b"\0").decode() for row in gathered]


def agree(record: Mapping[str, Mapping[str, Any]]) -> None:
    """Returns where all processes hold the same record; all must call it together.

    Args:
      record: dicts of fields by kind, as {"data": {"hash": "3f.."}}.

    Raises:
      RunError: on every process, naming the first that differs from process 0, and in what.
    """
    texts = exchange(json.dumps({"host": hostname(), **record}, sort_keys=True))
    sentence = differing({index: json.loads(text) for index, text in enumerate(texts)})
    if sentence:
        raise RunError(sentence)


def main_first(act: Callable[[], Result]) -> Result:
    """Runs `act` in process 0, then in the others; all must call it together.

    Raises:
      JaxhistoError: in each process where `act` does; what process 0 refuses, all refuse.
    """
    if not is_main():
        _refuse_what_main_refused()
        return act()
    try:
        result = act()
    except Exception as error:
        exchange(str(error) or type(error).__name__)
        raise
    exchange("")
    return result


def _refuse_what_main_refused() -> None:
    sentence = exchange("")[0]
    if sentence:
        raise RunError(sentence)


@contextmanager
def held_together() -> Iterator[None]:
    """Leaves it to the supervisor to say which process was lost when a collective fails.

    The error of the collective names an address at best. The supervisor knows the process and
    its host, says so, and ends this process; an error that has another cause comes through
    after a while.
    """
    try:
        yield
    except JaxhistoError:
        raise
    except Exception as error:
        supervised = inherited(os.environ)
        if supervised is not None and LOST_PEER.search(str(error)):
            time.sleep(supervised.heartbeat + SLACK_S)
        raise
