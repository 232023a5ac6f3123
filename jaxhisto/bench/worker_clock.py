"""What cores worked for a process and those that it started, and which cores they may use."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterable, Iterator


def cpu_seconds(workers: Iterable[int | None] = ()) -> float:
    """Of this process and of some that it started (Linux; elsewhere of this one alone)."""
    if not hasattr(time, "clock_gettime"):
        return time.process_time()
    # Linux's clock of another process: clock_getcpuclockid(3), which Python does not have.
    clocks = [(~pid << 3) | 2 for pid in workers if pid]
    with contextlib.suppress(OSError):
        return time.process_time() + sum(time.clock_gettime(clock) for clock in clocks)
    return time.process_time()


@contextlib.contextmanager
def on_cores(count: int) -> Iterator[None]:
    """Threads and processes that are started inside use the first `count` cores of those here."""
    if not hasattr(os, "sched_setaffinity"):
        yield
        return
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, sorted(before)[:count])
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)
