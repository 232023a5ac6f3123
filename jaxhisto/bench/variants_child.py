"""The variants of a step, in the process that `child.ask` starts for `variants`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import jax

from jaxhisto.bench import flops, memory, traffic
from jaxhisto.bench.ours import SCHEDULE, Point, Setup
from jaxhisto.bench.record import OURS, Row
from jaxhisto.bench.runner import CannotRun, Runner, measure
from jaxhisto.bench.variants import Variant, settings_of
from jaxhisto.config import StepConfig
from jaxhisto.models.convolution import convolutions
from jaxhisto.pretrain.step import make_train_step
from jaxhisto.pretrain.xla import reason

LOOKED = 2
"""Steps after which the losses are compared: that of the second has the first's gradient in it."""


def rows(job: Mapping[str, Any], say: Callable[[str], None]) -> Iterator[Row]:
    """As `variants.measured` asks for: the plain step's, then two of each variant."""
    setup = Setup(Point(**job["point"]))
    plain = made(setup, Variant(""), setup.settings, job["steps"])
    if isinstance(plain, Row):
        if plain.why != memory.OUT:
            raise RuntimeError(plain.why)
        yield plain
        return
    if job["first"]:
        say("the plain step ...")
        yield from measure([plain], job["repeats"], say)
    for table in job["variants"]:
        variant = Variant(**{**table, "xla": tuple(table["xla"])})
        say(f"{variant.name} ...")
        settings = setup.settings | settings_of(variant)
        runner = made(setup, variant, settings, job["steps"])
        if isinstance(runner, Row):
            yield runner
            continue
        beside = replace(plain, settings={**plain.settings, "beside": variant.name})
        yield from measure([beside, runner], job["repeats"], say)


def made(setup: Setup, variant: Variant, settings: Mapping[str, Any], steps: int) -> Runner | Row:
    """The runner of a variant, compiled, after LOOKED steps; or why there is none."""
    step = StepConfig(stem=variant.stem, xla=variant.xla)  # type: ignore[arg-type]
    config, point = replace(setup.config, step=step), setup.point
    try:
        with jax.set_mesh(setup.mesh), convolutions(variant.forms):  # type: ignore[arg-type]
            state, rows = setup.state(), setup.placed
            compiled: Any = make_train_step(config, *SCHEDULE)
            compiled = compiled.lower(state, *rows).compile()
            for _ in range(LOOKED):
                state, metrics = compiled(state, *rows)
            loss = float(metrics["loss"])
    except (jax.errors.JaxRuntimeError, MemoryError) as error:
        why = memory.OUT if memory.is_out_of_memory(error) else f"XLA refuses: {reason(error)}"
        return Row("step", OURS, settings, why=why)

    def run() -> None:
        nonlocal state
        try:
            with jax.set_mesh(setup.mesh):
                for _ in range(steps):
                    state, metrics = compiled(state, *rows)
                jax.block_until_ready((state, metrics))
        except jax.errors.JaxRuntimeError as error:
            if memory.is_out_of_memory(error):
                raise
            raise CannotRun(f"XLA fails: {reason(error)}") from error

    moved = traffic.cost(compiled, setup.mesh.size).get("bytes")
    return Runner(
        "step",
        OURS,
        run,
        point.batch * steps,
        {**settings, "loss": loss},
        flops=steps * flops.step_flops(point.model, point.tile_px, point.batch),
        bytes=steps * moved if moved else None,
    )
