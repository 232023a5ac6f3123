"""Progress of `jaxhisto tile`: the tiles so far on a terminal, a line a slide elsewhere."""

from __future__ import annotations

from types import TracebackType

from jaxhisto.progress import Progress


class SlideProgress:
    """Counts finished slides.

    Args:
      slides: how many there are.
    """

    def __init__(self, slides: int) -> None:
        self.tiles = 0
        self._progress = Progress("tile", slides, every=1)

    def __enter__(self) -> SlideProgress:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        self._progress.close()

    def done(self, slide: str, text: str, tiles: int) -> None:
        """One slide is in the store."""
        self.tiles += tiles
        self._step(f"{slide}: {text}")

    def failed(self, reason: str) -> None:
        """One slide will not be in the store."""
        self._progress.complain(f"failed: {reason}")
        self._step(f"failed: {reason}")

    def _step(self, line: str) -> None:
        self._progress.advance(text=f"{self.tiles:,} tiles" if self._progress.bar else line)
