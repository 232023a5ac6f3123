"""A few steps with their energy, in the process that `child.ask` starts for `cost`."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, replace
from typing import Any

from jaxhisto.bench.energy import Meter
from jaxhisto.bench.ours import ON_ACCELERATOR, Point, Setup
from jaxhisto.bench.record import OURS, Row, row_to_json
from jaxhisto.bench.runner import Runner, attempt
from jaxhisto.config import PretrainConfig
from jaxhisto.settings import from_json

LONG_S = 5.0
"""Power is sampled a few times a second: turns go on until there are samples to speak of."""
GPU_WARM_S, GPU_LONG_S = 2.0, 15.0
"""A GPU's power rises for a second or two and is told as a mean over one, so that it runs before
the meter begins, and for longer."""


def answers(job: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """One answer: {row, energy of all its turns, images that they did}."""
    import jax

    point = Point(**job["point"])
    platform = jax.default_backend()
    calls = 1 if platform == "cpu" else ON_ACCELERATOR
    setup = Setup(point, trained(from_json(PretrainConfig, job["recipe"]), point), calls)
    runner = attempt(lambda: setup.runner("step"), "step", OURS, setup.settings)  # type: ignore[arg-type, return-value]
    if isinstance(runner, Row):
        yield {"row": row_to_json(runner), "energy": {}, "images": 0}
        return
    warm_s, long_s = (GPU_WARM_S, GPU_LONG_S) if platform == "gpu" else (0.0, LONG_S)
    meter = Meter(platform, setup.mesh.size)
    yield measured(runner, meter, job["repeats"], warm_s, long_s)


def trained(recipe: PretrainConfig, point: Point) -> PretrainConfig:
    """The recipe as it is measured: its augmentation, optimizer and memory, the point's batch."""
    measured = replace(recipe, batch_size=point.batch, precision=point.precision)  # type: ignore[arg-type]
    if point.batch == recipe.batch_size:
        return measured
    # Micro-batches and groups of BatchNorm are parts of the recipe's batch: another lacks them.
    whole, all_of_it = replace(recipe.memory, accumulate=1), replace(recipe.model, bn_group=0)
    return replace(measured, memory=whole, model=all_of_it)


def measured(
    runner: Runner, meter: Meter, repeats: int, warm_s: float = 0.0, long_s: float = LONG_S
) -> dict[str, Any]:
    """`repeats` turns or more, until `long_s` are over, after one or `warm_s` that do not count."""
    runner.run()
    began = time.perf_counter()
    while time.perf_counter() - began < warm_s:
        runner.run()
    taken: list[float] = []
    worked: list[float] = []
    meter.start()
    while len(taken) < repeats or sum(taken) < long_s:
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
