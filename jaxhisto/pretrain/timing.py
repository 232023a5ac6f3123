"""Where a step's time goes, seen from the host without making the device wait."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import TypeVar

import jax

T = TypeVar("T")

HELD = ("checkpoint_s", "monitor_s")
MEMORY = {"bytes_in_use": "memory_bytes", "peak_bytes_in_use": "memory_peak_bytes"}


class StepClock:
    """Stamps when a step's batch was there, and when its result was.

    The result is waited for in a thread of its own: the loop reads it one step late, and where
    data is slow that is long after the device was done.
    """

    def __init__(self) -> None:
        self._begun = self._ended = time.perf_counter()
        self._held = dict.fromkeys(HELD, 0.0)

    def timed(self, feed: Iterator[tuple[int, T]]) -> Iterator[tuple[int, T, float]]:
        """(step, batch, seconds waited for it)."""
        while True:
            asked = time.perf_counter()
            item = next(feed, None)
            if item is None:
                return
            self._begun = time.perf_counter()
            yield *item, self._begun - asked

    @contextmanager
    def holding(self, name: str) -> Iterator[None]:
        """Counts the time inside as held up by `name`, one of HELD; the next step's line has it."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self._held[name] += time.perf_counter() - began

    def handed_over(self, result: jax.Array) -> Callable[[], dict[str, float]]:
        """To be called with an output of the step as soon as the step is handed over.

        Returns:
          A function that waits for the step and returns its seconds and bytes: `step_s`, from
          the batch being there, or the step before being done where that was later, to the result
          being there (in a run's first step this holds the compilation); `checkpoint_s` and
          `monitor_s`, how long the loop was held by a save or a measurement before this step;
          `memory_bytes` and `memory_peak_bytes` of the fullest local device, where it says.
        """
        begun, held = self._begun, self._held
        self._held = dict.fromkeys(HELD, 0.0)
        ready: list[float] = []

        def watch() -> None:
            with suppress(Exception):  # a step's error is raised where its metrics are read
                jax.block_until_ready(result)
            ready.append(time.perf_counter())

        # A daemon: a step that never ends (a peer died) must not keep the process from ending.
        watcher = threading.Thread(target=watch, daemon=True)
        watcher.start()

        def times() -> dict[str, float]:
            watcher.join()
            step_s = ready[0] - max(begun, self._ended)
            self._ended = ready[0]
            return {"step_s": step_s, **held, **memory()}

        return times


def memory() -> dict[str, float]:
    """Bytes in use and at most in use on the fullest local device; empty where none says (CPU)."""
    stats = [s for device in jax.local_devices() if (s := device.memory_stats())]
    return {
        ours: float(max(s[theirs] for s in stats))
        for theirs, ours in MEMORY.items()
        if stats and all(theirs in s for s in stats)
    }
