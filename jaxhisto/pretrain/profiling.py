"""A profiler trace of some steps, on request."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax

from jaxhisto.distributed import is_main
from jaxhisto.errors import RunError

Step = Callable[..., Any]


def check_profile(span: tuple[int, int] | None, steps: int) -> None:
    """Refuses steps that the run does not have.

    Raises:
      RunError: the last one lies beyond the run.
    """
    if span is not None and span[1] > steps:
        raise RunError(
            f"--profile {span[0]} {span[1]}: the run has {steps} steps; give steps of it."
        )


@contextmanager
def profiled(
    span: tuple[int, int] | None,
    out: Path,
    start: int,
    train_step: Step,
    say: Callable[[str], None],
) -> Iterator[Step]:
    """The step, which also writes a trace of the steps `span` (from 1, both included).

    Process 0 writes it into OUT/profile. Steps that were done before this start cannot be traced.

    Args:
      start: steps done before.
      say: takes the line that tells how to open it.
    """
    if span is None or not is_main():
        yield train_step
        return
    first, last = max(span[0], start + 1), span[1]
    if first > last:
        say(f"--profile {span[0]} {span[1]}: these steps are done already, nothing is traced")
    folder, step, tracing = out / "profile", start, False

    def traced(state: Any, *batch: Any) -> Any:
        nonlocal step, tracing
        step += 1
        if step == first <= last:
            jax.block_until_ready(state)  # the step before has no part in it
            jax.profiler.start_trace(str(folder))
            tracing = True
        result = train_step(state, *batch)
        if tracing and step == last:
            jax.block_until_ready(result)
            jax.profiler.stop_trace()
            tracing = False
            say(
                f"{folder}: trace of steps {first} to {last}; open the newest trace.json.gz in it "
                f"at ui.perfetto.dev, or run `tensorboard --logdir {folder}` (needs xprof)"
            )
        return result

    try:
        yield traced
    finally:
        if tracing:
            jax.profiler.stop_trace()
