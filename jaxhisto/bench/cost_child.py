"""A few steps with their energy, in the process that `child.ask` starts for `cost`."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, replace
from typing import Any

from jaxhisto.bench.energy import Meter
from jaxhisto.bench.ours import Point, Setup
from jaxhisto.bench.record import OURS, Row, row_to_json
from jaxhisto.bench.runner import Runner, attempt
from jaxhisto.config import PretrainConfig
from jaxhisto.settings import from_json

LONG_S = 5.0
"""Power is sampled a few times a second: turns go on until there are samples to speak of."""


def answers(job: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """One answer: {row, energy of all its turns, images that they did}."""
    import jax

    point = Point(**job["point"])
    setup = Setup(point, trained(from_json(PretrainConfig, job["recipe"]), point))
    runner = attempt(lambda: setup.runner("step"), "step", OURS, setup.settings)  # type: ignore[arg-type, return-value]
    if isinstance(runner, Row):
        yield {"row": row_to_json(runner), "energy": {}, "images": 0}
        return
    yield measured(runner, Meter(jax.default_backend(), setup.mesh.size), job["repeats"])


def trained(recipe: PretrainConfig, point: Point) -> PretrainConfig:
    """The recipe as it is measured: its augmentation, optimizer and memory, the point's batch."""
    measured = replace(recipe, batch_size=point.batch, precision=point.precision)  # type: ignore[arg-type]
    if point.batch == recipe.batch_size:
        return measured
    # Micro-batches and groups of BatchNorm are parts of the recipe's batch: another lacks them.
    whole, all_of_it = replace(recipe.memory, accumulate=1), replace(recipe.model, bn_group=0)
    return replace(measured, memory=whole, model=all_of_it)


def measured(runner: Runner, meter: Meter, repeats: int) -> dict[str, Any]:
    """`repeats` turns or more, until LONG_S are over, after one that does not count."""
    runner.run()
    taken: list[float] = []
    worked: list[float] = []
    meter.start()
    while len(taken) < repeats or sum(taken) < LONG_S:
        start, cpu = time.perf_counter(), time.process_time()
        runner.run()
        taken.append(time.perf_counter() - start)
        worked.append(time.process_time() - cpu)
    energy = meter.stop()
    row = Row(
        "step",
        OURS,
        runner.settings,
        tuple(taken),
        runner.images,
        runner.flops,
        runner.bytes,
        cpu_seconds=tuple(worked),
    )
    return {
        "row": row_to_json(row),
        "energy": asdict(energy),
        "images": runner.images * len(taken),
    }
