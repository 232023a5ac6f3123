"""A few steps with their energy, in the process that `child.ask` starts for `cost`."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from typing import Any

from jaxhisto.bench.energy import Meter
from jaxhisto.bench.ours import Point, Setup
from jaxhisto.bench.record import OURS, Row, row_to_json
from jaxhisto.bench.runner import Runner, attempt

LONG_S = 5.0
"""Power is sampled a few times a second: turns go on until there are samples to speak of."""


def answers(job: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """One answer: {row, energy of all its turns, images that they did}."""
    import jax

    setup = Setup(Point(**job["point"]))
    runner = attempt(lambda: setup.runner("step"), "step", OURS, setup.settings)  # type: ignore[arg-type, return-value]
    if isinstance(runner, Row):
        yield {"row": row_to_json(runner), "energy": {}, "images": 0}
        return
    yield measured(runner, Meter(jax.default_backend(), setup.mesh.size), job["repeats"])


def measured(runner: Runner, meter: Meter, repeats: int) -> dict[str, Any]:
    """`repeats` turns or more, until LONG_S are over, after one that does not count."""
    runner.run()
    taken: list[float] = []
    meter.start()
    while len(taken) < repeats or sum(taken) < LONG_S:
        start = time.perf_counter()
        runner.run()
        taken.append(time.perf_counter() - start)
    energy = meter.stop()
    row = Row("step", OURS, runner.settings, tuple(taken), runner.images, runner.flops)
    return {
        "row": row_to_json(row),
        "energy": asdict(energy),
        "images": runner.images * len(taken),
    }
