"""One series of `growth`, measured in the process that `child.ask` starts for it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxhisto.bench import flops
from jaxhisto.bench.growth import place
from jaxhisto.bench.ours import SCHEDULE, Point, pixels
from jaxhisto.bench.runner import reason
from jaxhisto.config import MemoryConfig
from jaxhisto.data.memory import available_bytes
from jaxhisto.distributed import make_mesh, to_global
from jaxhisto.pretrain.loss import nt_xent
from jaxhisto.pretrain.step import init_state, make_train_step

WIDTH, TEMPERATURE = 128, 0.1
ROOM = 0.8
"""Share of the free memory that a program's plan may take: what was planned is not all there is."""
BEGIN = 0.05
"""Seconds that even the smallest call takes; what is expected grows from the last one measured."""


class Program:
    """A compiled program and what makes its arguments, which are made only to run it.

    Attributes:
      planned_bytes: on each device: temporaries, results and arguments; what is updated in place
        counts once.
      device: where it runs.
    """

    def __init__(self, compiled: Any, arguments: Callable[[], Any], keeps: bool, mesh: Mesh):
        self._compiled, self._arguments, self._keeps, self._mesh = compiled, arguments, keeps, mesh
        plan = compiled.memory_analysis()
        self.planned_bytes = int(
            plan.temp_size_in_bytes
            + plan.output_size_in_bytes
            + plan.argument_size_in_bytes
            - plan.alias_size_in_bytes
        )
        self.device = mesh.local_devices[0]

    def seconds(self, repeats: int, enough: float) -> list[float]:
        """Of each turn that counts; of the first alone where that took longer than `enough`."""
        taken: list[float] = []
        with jax.set_mesh(self._mesh):
            first, *rest = self._arguments()
            for turn in range(repeats + 1):
                start = time.perf_counter()
                out = jax.block_until_ready(self._compiled(first, *rest))
                taken.append(time.perf_counter() - start)
                if self._keeps:  # a training step consumes its state
                    first = out[0]
                if turn == 0 and taken[0] > enough:
                    return taken
        return taken[1:]


def entries(job: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """An entry for each size, in order.

    Each is {size, x, planned_bytes, and `seconds`, one a turn, or `why` there are none}.
    """
    series, last = job["series"], (0.0, 0.0)
    program: Program | None = None  # one at a time is held
    for size in series["sizes"]:
        x = place(series["axis"], size)
        entry: dict[str, Any] = {"size": size, "x": x}
        try:
            if why := hopeless(series, size):
                entry["why"] = why
                yield entry
                continue
            program = program_of(series, size)
            entry["planned_bytes"] = program.planned_bytes
            why = unfit(program, expected(series, x, last), job["limit_s"])
            if why:
                entry["why"] = why
            else:
                entry["seconds"] = program.seconds(job["repeats"], job["limit_s"])
                last = (x, sorted(entry["seconds"])[len(entry["seconds"]) // 2])
        except Exception as error:
            # As of a row: out of memory, or `failed: ` and what it was.
            entry["why"] = reason(error)
            error.__traceback__ = None  # its frames hold the arrays that filled the memory
        program = None
        yield entry


def hopeless(series: Mapping[str, Any], size: Any) -> str:
    """Why a size is not even compiled; empty where it may fit, and on a CPU, whose compiler tries
    nothing out.

    A GPU's runs each convolution in several ways, for minutes, with arrays that must fit.
    """
    if series["what"] != "step":
        return ""
    point = point_of(series, size)
    mesh = make_mesh(point.devices)
    device = mesh.local_devices[0]
    if device.platform == "cpu":
        return ""
    needed = flops.kept_bytes(point.model, point.tile_px, point.batch, point.precision)
    return lacking(needed / mesh.size, free_bytes(device))


def lacking(needed: float, free: int | None) -> str:
    """That so many bytes are more than those free; empty where they are not, or nobody knows."""
    if free is None or needed <= free:
        return ""
    return f"not run: needs at least {needed / 1e9:.0f} GB, {free / 1e9:.0f} GB are free"


def expected(series: Mapping[str, Any], x: float, last: tuple[float, float]) -> float:
    """Seconds that a size will take at most, from the last one that was run."""
    quadratic = series["what"].startswith("loss") or series["axis"] == "tile_px"
    return max(last[1], BEGIN) * (x / last[0]) ** (2 if quadratic else 1) if last[0] else 0.0


def unfit(program: Program, seconds: float, limit_s: float) -> str:
    """Why a program is not run; empty where it is."""
    free = free_bytes(program.device)
    if free is not None and program.planned_bytes > ROOM * free:
        return (
            f"not run: needs {program.planned_bytes / 1e9:.1f} GB, {ROOM:.0%} of the "
            f"{free / 1e9:.1f} GB free are less"
        )
    if seconds > limit_s:
        return f"not run: {seconds:.0f} s expected, the limit is {limit_s:g} s"
    return ""


def free_bytes(device: Any) -> int | None:
    """Of the device, or of the host where that is the device."""
    if device.platform == "cpu":
        return available_bytes()
    stats = device.memory_stats() or {}
    if "bytes_limit" not in stats:
        return None
    return int(stats["bytes_limit"]) - int(stats.get("bytes_in_use", 0))


def program_of(series: Mapping[str, Any], size: Any) -> Program:
    """The program of a series at a size, compiled from shapes alone."""
    point = point_of(series, size)
    if series["what"] == "step":
        return step_program(point)
    return loss_program(point.batch, series["what"] == "loss, chunked", point.devices)


def point_of(series: Mapping[str, Any], size: Any) -> Point:
    """The setting at a size."""
    axis = {"depth": "model"}.get(series["axis"], series["axis"])
    return Point(**{**series["point"], axis: size})


def step_program(point: Point) -> Program:
    """The training step, from uint8 tiles to updated weights."""
    config, mesh = point.config(), make_mesh(point.devices)
    N, side = point.batch, point.tile_px
    rows = NamedSharding(mesh, P("data"))
    tiles = jax.ShapeDtypeStruct((N, side, side, 3), jnp.uint8, sharding=rows)
    sizes = jax.ShapeDtypeStruct((N, 2), jnp.int32, sharding=rows)

    def arguments() -> tuple[Any, ...]:
        placed = to_global((pixels(N, side), np.full((N, 2), side, np.int32)), mesh)
        return (init_state(config, *SCHEDULE, mesh), *placed)

    with jax.set_mesh(mesh):
        state = init_state(config, *SCHEDULE, mesh)
        step: Any = make_train_step(config, *SCHEDULE)
        compiled = step.lower(state, tiles, sizes).compile()
    return Program(compiled, arguments, True, mesh)


def loss_program(N: int, chunked: bool, devices: int) -> Program:
    """NT-Xent and its gradient on given projections, (N, 2, 128) float32."""
    mesh = make_mesh(devices)
    columns = MemoryConfig().loss_chunk if chunked else 0
    loss = partial(nt_xent, temperature=TEMPERATURE, chunk=columns)
    rows = NamedSharding(mesh, P("data"))
    z = jax.ShapeDtypeStruct((N, 2, WIDTH), jnp.float32, sharding=rows)

    def arguments() -> Any:
        made = np.random.default_rng(0).standard_normal((N, 2, WIDTH), np.float32)
        return to_global((made,), mesh)

    with jax.set_mesh(mesh):
        compiled = jax.jit(jax.value_and_grad(loss, has_aux=True)).lower(z).compile()
    return Program(compiled, arguments, False, mesh)
