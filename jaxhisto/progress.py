"""How far a long piece of work is, on stderr: a bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import Any

EVERY_S = 10.0


class Progress:
    """Counts what is done, and says how fast it goes and how long the rest takes.

    Args:
      what: is at work: a verb, mostly.
      total: items in all.
      done: of them, by an earlier start.
      every: items from one plain line to the next, beside those of the first and the last one; 0:
        a line in ten seconds, so that short work says nothing.
      unit: of the items, for their rate, which is said where there is no other text.
    """

    def __init__(
        self, what: str, total: int, done: int = 0, *, every: int = 0, unit: str = "tiles"
    ) -> None:
        self._what, self._total, self._done = what, total, done
        self._every, self._unit = every, unit
        self._begun: tuple[int, float] | None = None
        self._first, self._told = done + 1, time.perf_counter()
        self._bar = _bar(what, total, done) if sys.stderr.isatty() else None

    @property
    def bar(self) -> bool:
        """Whether there is a terminal, and a bar on it."""
        return self._bar is not None

    def advance(self, count: int = 1, text: str = "") -> None:
        """So many more are done."""
        self.update(self._done + count, text)

    def update(self, done: int, text: str = "") -> None:
        """`done` of the total are done."""
        self._done = done
        if self._begun is None:  # the first one compiles, so the clock starts after it
            self._begun = done, time.perf_counter()
        text = text or self._rate()
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], completed=done, text=text)
        elif self._due():
            self._told = time.perf_counter()
            line = f"{self._what} {done:,}/{self._total:,}  {text}  ETA {self._eta()}"
            print(line, file=sys.stderr, flush=True)

    def complain(self, line: str) -> None:
        """Leaves a line above the bar, in red; nothing elsewhere."""
        if self._bar is not None:
            self._bar.console.print(line, style="red", markup=False, highlight=False)

    def close(self) -> None:
        """Leaves the terminal as it was."""
        if self._bar is not None:
            self._bar.stop()

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _due(self) -> bool:
        if self._every:
            return self._done % self._every == 0 or self._done in (self._first, self._total)
        return time.perf_counter() - self._told >= EVERY_S

    def _each(self) -> float | None:
        """Seconds an item takes; None of the first ones."""
        assert self._begun is not None
        counted = self._done - self._begun[0]
        return (time.perf_counter() - self._begun[1]) / counted if counted > 0 else None

    def _rate(self) -> str:
        """`1,200 tiles/s`, `3.5 cells/min`."""
        each = self._each()
        if not each:
            return ""
        if each <= 0.1:
            return f"{1 / each:,.0f} {self._unit}/s"
        return f"{60 / each:,.1f} {self._unit}/min"

    def _eta(self) -> str:
        each = self._each()
        if each is None:
            return "?"
        seconds = round(each * (self._total - self._done))
        return f"{seconds // 3600}:{seconds // 60 % 60:02d}:{seconds % 60:02d}"


def _bar(what: str, total: int, done: int) -> Any:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    bar = Bar(
        TextColumn(what, markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[text]}", markup=False),
        TextColumn("ETA"),
        TimeRemainingColumn(),
        console=Console(stderr=True),
    )
    bar.add_task(what, total=total, completed=done, text="")
    bar.start()
    return bar
