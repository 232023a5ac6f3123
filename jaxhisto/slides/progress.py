"""Progress of `jaxhisto tile`: a bar on a terminal, a line a slide elsewhere. On stderr."""

from __future__ import annotations

import sys
from types import TracebackType

import rich.console
import rich.markup
import rich.progress


class Progress:
    """Counts finished slides.

    Args:
      slides: how many there are.
    """

    def __init__(self, slides: int) -> None:
        self.slides = slides
        self.finished = 0
        self.tiles = 0
        self._bar: rich.progress.Progress | None = None
        if sys.stderr.isatty():
            self._bar = rich.progress.Progress(
                rich.progress.TextColumn("tile"),
                rich.progress.BarColumn(),
                rich.progress.MofNCompleteColumn(),
                rich.progress.TextColumn("{task.description}"),
                rich.progress.TimeRemainingColumn(),
                console=rich.console.Console(stderr=True),
            )
            self._task = self._bar.add_task("", total=slides)

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

    def done(self, slide: str, text: str, tiles: int) -> None:
        """One slide is in the store."""
        self.tiles += tiles
        self._step(f"{slide}: {text}")

    def failed(self, reason: str) -> None:
        """One slide will not be in the store."""
        self._step(f"failed: {reason}")

    def _step(self, line: str) -> None:
        self.finished += 1
        if self._bar:
            if line.startswith("failed"):
                self._bar.console.print(rich.markup.escape(line), style="red", highlight=False)
            self._bar.update(self._task, advance=1, description=f"{self.tiles} tiles")
        else:
            print(f"tile {self.finished}/{self.slides}  {line}", file=sys.stderr, flush=True)
