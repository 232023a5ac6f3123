"""How far a long verb is, on stderr: a bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import sys
import time
from types import TracebackType

import rich.console
import rich.progress

EVERY_S = 10.0


class Progress:
    """Counts tiles, and says how long the rest takes.

    Args:
      verb: what is at work.
      total: tiles in all.
      done: of them, by an earlier start.
      unit: what is counted.
    """

    def __init__(self, verb: str, total: int, done: int = 0, unit: str = "tiles") -> None:
        self._verb, self._total, self._start, self._done = verb, total, done, done
        self._unit = unit
        self._began = self._told = time.monotonic()
        self._bar: rich.progress.Progress | None = None
        if sys.stderr.isatty():
            self._bar = rich.progress.Progress(
                rich.progress.TextColumn(verb),
                rich.progress.BarColumn(),
                rich.progress.MofNCompleteColumn(),
                rich.progress.TimeRemainingColumn(),
                console=rich.console.Console(stderr=True),
            )
            self._task = self._bar.add_task("", total=total, completed=done)

    def __enter__(self) -> Progress:
        if self._bar:
            self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        if self._bar:
            self._bar.stop()

    def advance(self, count: int) -> None:
        """So many more are done."""
        self._done += count
        if self._bar:
            self._bar.update(self._task, completed=self._done)
            return
        now = time.monotonic()
        if now - self._told < EVERY_S:
            return
        self._told = now
        rate = (self._done - self._start) / (now - self._began)
        left = (self._total - self._done) / rate
        print(
            f"{self._verb} {self._done:,}/{self._total:,}  {_rate(rate, self._unit)}  "
            f"{_span(left)} left",
            file=sys.stderr,
            flush=True,
        )


def _rate(rate: float, unit: str) -> str:
    """`1,200 tiles/s`, `3.5 cells/min`."""
    return f"{rate:,.0f} {unit}/s" if rate >= 10 else f"{60 * rate:,.1f} {unit}/min"


def _span(seconds: float) -> str:
    """`3 h 20 min`, `4 min`, `12 s`."""
    if seconds >= 3600:
        return f"{int(seconds // 3600)} h {int(seconds % 3600 // 60)} min"
    return f"{int(seconds // 60)} min" if seconds >= 120 else f"{int(seconds)} s"
