"""The stages of our training step as runners: each compiled alone, on tiles that are there."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from jaxhisto.bench import flops, traffic
from jaxhisto.bench.record import OURS, Row
from jaxhisto.bench.runner import Runner, Seconds
from jaxhisto.config import ModelConfig, OptimConfig, PretrainConfig
from jaxhisto.distributed import make_mesh, to_global
from jaxhisto.pretrain.loss import nt_xent
from jaxhisto.pretrain.step import (
    TrainState,
    augmented,
    init_state,
    make_loss_and_grads,
    make_project,
    make_train_step,
    make_update,
)

SCHEDULE = (1000, 100)
"""Steps, and steps of an epoch, of the learning rate's schedule: they change no time."""


@dataclass(frozen=True)
class Point:
    """One setting of a sweep.

    Attributes:
      model, tile_px, batch, precision: as in `PretrainConfig`.
      devices: to shard the batch over; 0: all.
    """

    model: str
    tile_px: int
    batch: int
    precision: str
    devices: int = 1

    def config(self) -> PretrainConfig:
        """The training settings: the paper's views, LARS, no warm-up."""
        return PretrainConfig(
            out="",
            batch_size=self.batch,
            tile_px=self.tile_px,
            precision=self.precision,  # type: ignore[arg-type]  # BenchConfig has checked it
            model=ModelConfig(name=self.model),  # type: ignore[arg-type]
            optim=OptimConfig(warmup_epochs=0.0),
        )


def cores() -> int:
    """The cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def pixels(count: int, side: int) -> np.ndarray:
    """(count, side, side, 3) uint8, smooth at the scale of nuclei, with noise."""
    rng = np.random.default_rng(0)
    coarse = rng.integers(40, 216, (min(count, 64), side // 8 + 1, side // 8 + 1, 3))
    fine = coarse.repeat(8, 1).repeat(8, 2)[:, :side, :side]
    tiles = (fine + rng.integers(-30, 30, fine.shape)).astype(np.uint8)
    return np.resize(tiles, (count, side, side, 3))


class Setup:
    """What the stages of a point share: mesh, state, a batch, and the programs, each made once.

    Every program is compiled for the arrays it is called with, so that a turn times no compiler.

    Args:
      point: what is measured. config: in other settings than the point's own; it has its batch.
    """

    def __init__(self, point: Point, config: PretrainConfig | None = None) -> None:
        self.point, self.config = point, config or point.config()
        self.mesh: Mesh = make_mesh(point.devices)
        self._steps: dict[tuple[int, ...], Any] = {}
        self.settings = asdict(point) | {
            "devices": self.mesh.size,
            "threads": cores(),
            "data": "synthetic",
        }

    def runner(self, stage: str) -> Runner | Row:
        """The runner of a stage that needs no store.

        Raises:
          XlaRuntimeError, MemoryError: there is no room for it.
          RunError: a batch that the devices cannot share.
        """
        with jax.set_mesh(self.mesh):
            return getattr(self, f"_{stage}")()

    @cached_property
    def host(self) -> tuple[np.ndarray, np.ndarray]:
        """(tiles (N, S, S, 3) uint8, sizes (N, 2) int32) in the host's memory."""
        n, side = self.point.batch, self.point.tile_px
        return pixels(n, side), np.full((n, 2), side, np.int32)

    @cached_property
    def placed(self) -> tuple[jax.Array, jax.Array]:
        """The same on the devices."""
        return to_global(self.host, self.mesh)

    def state(self) -> TrainState:
        """A fresh state; a step consumes it."""
        return init_state(self.config, *SCHEDULE, self.mesh)

    @cached_property
    def views(self) -> jax.Array:
        """(N, 2, S, S, 3) float32 views of the batch."""
        make = jax.jit(lambda tiles, sizes: augmented(self.config, jnp.int32(0), tiles, sizes))
        return jax.block_until_ready(make(*self.placed))

    @cached_property
    def jitted(self) -> Any:
        """The training step, not yet compiled."""
        return make_train_step(self.config, *SCHEDULE)

    def step(self, tiles: jax.Array, sizes: jax.Array) -> Any:
        """The training step, compiled for such a batch."""
        if tiles.shape not in self._steps:
            lowered = self.jitted.lower(self.state(), tiles, sizes)
            self._steps[tiles.shape] = lowered.compile()
        return self._steps[tiles.shape]

    @cached_property
    def forward(self) -> Any:
        """The compiled function (params, batch_stats, views) -> (loss, batch_stats)."""
        project, config = make_project(self.config), self.config
        columns = config.memory.columns(config.batch_size)

        def loss_of(params: Any, stats: Any, views: jax.Array) -> Any:
            z, stats = project(params, stats, views)
            return nt_xent(z, config.optim.temperature, columns)[0], stats

        state = self.state()
        return jax.jit(loss_of).lower(state.params, state.batch_stats, self.views).compile()

    def _to_device(self) -> Runner:
        rows = self.host

        def run() -> None:
            jax.block_until_ready(to_global(rows, self.mesh))

        return self._made("to_device", run, moved=sum(a.nbytes for a in rows), model=None)

    def _augment(self) -> Runner:
        rows, step = self.placed, iter(range(1 << 30))
        number = jax.ShapeDtypeStruct((), np.int32)
        views = jax.jit(lambda step, tiles, sizes: augmented(self.config, step, tiles, sizes))
        compiled = views.lower(number, *rows).compile()

        def run() -> None:
            jax.block_until_ready(compiled(np.int32(next(step)), *rows))

        return self._made("augment", run, compiled, model=None)

    def _forward(self) -> Runner:
        state = self.state()
        args = (state.params, state.batch_stats, self.views)

        def run() -> None:
            jax.block_until_ready(self.forward(*args))

        return self._made("forward", run, self.forward, flops.forward_flops)

    def _backward(self) -> Runner:
        """What the gradient adds: forward and backward in one program, less forward alone."""
        state = self.state()
        args = (state.params, state.batch_stats, self.views)
        both = jax.jit(make_loss_and_grads(self.config)).lower(*args).compile()
        own, added = (traffic.cost(p, self.mesh.size) for p in (self.forward, both))
        moved = added["bytes"] - own["bytes"] if own and added else None

        def run() -> tuple[float, float]:
            alone = seconds_of(lambda: jax.block_until_ready(self.forward(*args)))
            whole = seconds_of(lambda: jax.block_until_ready(both(*args)))
            return max(whole[0] - alone[0], 0.0), max(whole[1] - alone[1], 0.0)

        return self._made("backward", run, count=flops.backward_flops, moved=moved)

    def _optimizer(self) -> Runner:
        state = self.state()
        grads = jax.tree.map(lambda leaf: leaf * np.float32(1e-3), state.params)
        update = jax.jit(make_update(self.config, *SCHEDULE), donate_argnums=0)
        compiled = update.lower(state, grads).compile()

        def run() -> None:
            nonlocal state
            state, metrics = compiled(state, grads)
            jax.block_until_ready((state, metrics))

        return self._made("optimizer", run, compiled)

    def _communication(self) -> Runner:
        """The step's collectives alone, one after the other: what they take if nothing hides them.

        The gradients' sum, the projections' all-gather, and BatchNorm's sums, of which none can
        begin before the one before is done: two numbers a channel forward, two backward.
        """
        if self.mesh.size == 1:
            return self._made("communication", lambda: 0.0, moved=0.0)
        params, stats = self.state().params, self.state().batch_stats
        z = to_global(np.zeros((self.point.batch, 2, self.config.model.projection), np.float32),
                      self.mesh)  # fmt: skip
        compiled = jax.jit(exchanges(self.mesh)).lower(params, stats, z).compile()

        def run() -> None:
            jax.block_until_ready(compiled(params, stats, z))

        sent = 2 * nbytes(params) + 4 * nbytes(stats) + z.nbytes
        others = (self.mesh.size - 1) / self.mesh.size
        return self._made("communication", run, moved=self.mesh.size * others * sent)

    def _step(self) -> Runner:
        compiled, state = self.step(*self.placed), self.state()

        def run() -> None:
            nonlocal state
            state, metrics = compiled(state, *self.placed)
            jax.block_until_ready((state, metrics))

        return self._made("step", run, compiled, flops.step_flops)

    def _given(self) -> Runner:
        """The step on views that are there: without drawing and making them."""
        loss_and_grads, state = make_loss_and_grads(self.config), self.state()
        update = make_update(self.config, *SCHEDULE)

        def step(state: TrainState, views: jax.Array) -> tuple[TrainState, jax.Array]:
            loss, _, stats, grads = loss_and_grads(state.params, state.batch_stats, views)
            return update(replace(state, batch_stats=stats), grads)[0], loss

        compiled = jax.jit(step, donate_argnums=0).lower(state, self.views).compile()

        def run() -> None:
            nonlocal state
            state, loss = compiled(state, self.views)
            jax.block_until_ready((state, loss))

        made = self._made("step", run, compiled, flops.step_flops)
        return replace(made, settings={**made.settings, "beside": "given views"})

    def _compile(self) -> Row:
        """Seconds to trace and compile the step: the first time, and again from the cache on disk,
        which must have been empty."""
        args = (self.state(), *self.placed)

        def compile_it() -> None:
            jax.clear_caches()
            jitted: Any = make_train_step(self.config, *SCHEDULE)
            jitted.lower(*args).compile()

        first, again = seconds_of(compile_it), seconds_of(compile_it)
        settings = self.settings | {"from_cache_s": again[0]}
        return Row("compile", OURS, settings, first[:1], cpu_seconds=first[1:])

    def _made(
        self,
        stage: str,
        run: Callable[[], Seconds],
        compiled: Any = None,
        count: Callable[[str, int, int], float] | None = None,
        moved: float | None = None,
        model: str | None = "",
    ) -> Runner:
        """A runner with its operations and bytes; `model` None: the stage has no network."""
        point = self.point
        of_xla = traffic.cost(compiled, self.mesh.size) if compiled is not None else {}
        settings = dict(self.settings)
        if model is None:
            del settings["model"], settings["precision"]
        return Runner(
            stage,
            OURS,
            lambda: self._on_mesh(run),
            point.batch,
            settings,
            flops=count(point.model, point.tile_px, point.batch) if count else of_xla.get("flops"),
            bytes=of_xla.get("bytes") if moved is None else moved,
        )

    def _on_mesh(self, run: Callable[[], Seconds]) -> Seconds:
        with jax.set_mesh(self.mesh):
            return run()


def exchanges(mesh: Mesh) -> Callable[[Any, Any, jax.Array], Any]:
    """(gradients, BatchNorm statistics, z sharded on axis 0) -> the step's collectives' results."""

    def on_each(grads: Any, stats: Any, z: jax.Array) -> Any:
        chain, leaves = jnp.zeros((), jnp.float32), jax.tree.leaves(stats)
        norms = list(zip(leaves[::2], leaves[1::2], strict=True))  # (mean, variance) of each
        for pair in norms * 2:  # forward, then backward
            # The sum before goes in, times nothing that a compiler can see is nothing.
            summed = lax.psum([varying(leaf + chain) for leaf in pair], "data")
            chain = summed[0].reshape(-1)[0] * np.float32(1e-30)
        every = lax.all_gather(z, "data", tiled=True).sum(keepdims=True)
        return chain, every.reshape(1), lax.psum(jax.tree.map(varying, grads), "data")

    def varying(leaf: jax.Array) -> jax.Array:
        return lax.pcast(leaf, ("data",), to="varying")

    return jax.shard_map(
        on_each,
        mesh=mesh,
        in_specs=(P(), P(), P("data")),
        out_specs=(P(), P("data"), P()),
    )


def nbytes(tree: Any) -> int:
    """Bytes of all arrays of a tree."""
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))


def seconds_of(act: Callable[[], Any]) -> tuple[float, float]:
    """By the clock, and those that this process's cores worked."""
    start, worked = time.perf_counter(), time.process_time()
    act()
    return time.perf_counter() - start, time.process_time() - worked
