"""Whether decoded tiles fit into memory beside a training step; asked before any is decoded."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxhisto.config import PretrainConfig
from jaxhisto.data.memory import available_bytes
from jaxhisto.data.sources import Tiles
from jaxhisto.distributed import exchange
from jaxhisto.errors import RunError
from jaxhisto.launch import hostname
from jaxhisto.pretrain.device_cache import Layout

Step = Callable[[], int]

MARGIN = 0.05
"""Share of a memory that stays free: fragments, the allocator's rounding, what else is there."""


def step_bytes(
    train_step: Any, state: Any, config: PretrainConfig, tiles: Tiles, mesh: Mesh
) -> int:
    """Bytes that a step takes on each device beside its state and batch, as XLA planned it.

    Compiles the step as its first call would; that call then finds it compiled.

    Args:
      train_step: from `make_train_step`; the mesh is set.
      state: the state it will be called with.
      config, tiles, mesh: of the run.
    """
    sharding, n = NamedSharding(mesh, P("data")), config.batch_size
    pixels = jax.ShapeDtypeStruct((n, *tiles.canvas, 3), jnp.uint8, sharding=sharding)
    sizes = jax.ShapeDtypeStruct((n, 2), jnp.int32, sharding=sharding)
    plan = train_step.lower(state, pixels, sizes).compile().memory_analysis()
    if plan is None:
        return 0
    new = plan.output_size_in_bytes - plan.alias_size_in_bytes
    return int(plan.temp_size_in_bytes + new + plan.generated_code_size_in_bytes)


def check_host(config: PretrainConfig, tiles: Tiles, mesh: Mesh, step: Step) -> None:
    """Refuses tiles that the host's memory cannot hold.

    Kept free: `MARGIN`, the batches that are ahead, and, where the devices are CPUs, what a step
    takes on each.

    Args:
      config, tiles, mesh: of the run.
      step: gives the bytes of a step; asked where the tiles alone would fit.

    Raises:
      RunError: with the sizes.
    """
    sharing, there = processes_here(), available_bytes()
    if there is None:
        return
    there = int(there * (1 - MARGIN)) // sharing
    layout, local = Layout(len(tiles), tiles.canvas, mesh.size), len(mesh.local_devices)
    needed = len(tiles) * layout.tile_bytes
    kept = 4 * local * (config.batch_size // mesh.size) * layout.tile_bytes
    if needed + kept <= there and on_cpu(mesh):
        kept += local * step()
    if needed + kept > there:
        raise RunError(
            f"--data.cache host: {described(layout)} in each process, and {gb(kept)} more are "
            f"wanted for training, where {gb(there)} of memory are free; use fewer tiles, or pass "
            "--data.cache none."
        )


def check_device(config: PretrainConfig, tiles: Tiles, mesh: Mesh, step: Step) -> None:
    """Refuses tiles that the devices' memory cannot hold.

    Kept free on each: `MARGIN` of its memory, what a step takes, two batches (the one in use and
    the next), and what a gather takes. The state is there already.

    Args:
      config, tiles, mesh: of the run.
      step: gives the bytes of a step; asked where the tiles alone would fit.

    Raises:
      RunError: with the sizes.
    """
    there = free_on_each(mesh)
    if there is None:
        return
    layout, n = Layout(len(tiles), tiles.canvas, mesh.size), config.batch_size
    needed = layout.device_bytes
    kept = 2 * (n // mesh.size) * layout.tile_bytes + layout.gather_bytes(n)
    if needed + kept <= there:
        kept += step()
    if needed + kept > there:
        raise RunError(
            f"--data.cache device: {described(layout)}, {gb(needed)} on each of {mesh.size} "
            f"device(s), and {gb(kept)} more are wanted there for training, where {gb(there)} are "
            f"free; {remedy(layout, mesh, there - kept)}."
        )


def remedy(layout: Layout, mesh: Mesh, room: int) -> str:
    """What to do about tiles that do not fit into `room` bytes on each device."""
    if on_cpu(mesh):
        return "use fewer tiles, or pass --data.cache none"
    said = "use fewer tiles, pass --data.cache host"
    if room > 0:
        said += (
            f", take {math.ceil(layout.device_bytes * layout.devices / room)} devices like these"
        )
    if mesh.local_devices[0].platform == "gpu":
        said += ", or raise XLA_PYTHON_CLIENT_MEM_FRACTION (JAX's share of a GPU is 0.75)"
    return said


def free_on_each(mesh: Mesh) -> int | None:
    """Bytes free on the fullest of this process's devices, less `MARGIN`; None: not known.

    CPU devices share the host's memory.
    """
    local = mesh.local_devices
    if on_cpu(mesh):
        sharing, there = processes_here() * len(local), available_bytes()
        return None if there is None else int(there * (1 - MARGIN)) // sharing
    stats = [device.memory_stats() or {} for device in local]
    if any("bytes_limit" not in s for s in stats):
        return None
    return min(int(s["bytes_limit"] * (1 - MARGIN)) - s.get("bytes_in_use", 0) for s in stats)


def processes_here() -> int:
    """Processes of the run on this host, which share its memory; all must call it together."""
    return exchange(hostname()).count(hostname())


def on_cpu(mesh: Mesh) -> bool:
    """True where the devices are the host's own cores."""
    return bool(mesh.local_devices[0].platform == "cpu")


def described(layout: Layout) -> str:
    """How much the tiles are."""
    h, w = layout.canvas
    total = gb(layout.tiles * layout.tile_bytes)
    return f"{layout.tiles:,} tiles on a canvas of {h} x {w} px are {total}"


def gb(count: int) -> str:
    """Bytes, for a sentence."""
    return f"{count / 1e9:,.1f} GB" if count >= 1e8 else f"{count / 1e6:,.1f} MB"
