"""When a run's state is saved, and what a save that failed means."""

from __future__ import annotations

from typing import Any

from jaxhisto.checkpoints import Checkpoints, SaveError
from jaxhisto.console import warn
from jaxhisto.errors import RunError

REMEDY = "make room (or lower --keep) or mend permissions"


class Saving:
    """Saves every `every` steps and where the loop asks; a full disk does not end a run of days.

    A save that failed is said in one line. It is tried again a tenth of `every` later (at least
    one step) and at every checkpoint, with the state of that time, until one succeeds. The last
    save must succeed: `finish` raises where it does not.
    """

    def __init__(self, checkpoints: Checkpoints, every: int, metadata: dict[str, Any]) -> None:
        self._checkpoints, self._every, self._metadata = checkpoints, every, metadata
        self._told: SaveError | None = None
        self._again: int | None = None
        self._saved = 0

    def due(self, step: int, now: bool) -> bool:
        """True where the state after `step` is to be saved; `now`: the loop wants it saved."""
        self._take_note(step)
        return now or step % self._every == 0 or (self._again is not None and step >= self._again)

    def start(self, step: int, state: Any) -> None:
        """Begins to save; waits where the save before is still being written."""
        self._checkpoints.settle()
        self._take_note(step, next_try=step)
        self._again, self._saved = None, step
        self._checkpoints.save_async(step, state, self._metadata)

    def finish(self) -> None:
        """Returns when the last save is on disk.

        Raises:
          RunError: it could not be written.
        """
        try:
            self._checkpoints.wait()
        except SaveError as error:
            kept = self._checkpoints.latest_step
            onward = "from the start" if kept is None else f"from checkpoint {kept}"
            raise RunError(
                f"{error}; {REMEDY} and start the same line again, it goes on {onward}."
            ) from error

    def _take_note(self, step: int, next_try: int | None = None) -> None:
        error = self._checkpoints.failure()
        if error is None:
            if self._told is not None and self._checkpoints.latest_step == self._saved:
                self._told = None
                warn(f"checkpoint {self._saved} is written, saving works again")
            return
        if error is self._told:
            return
        self._told = error
        self._again = step + -(-self._every // 10)
        if next_try is None:
            next_try = min(self._again, step + self._every - step % self._every)
        warn(f"{error}; training goes on and tries again at step {next_try}: {REMEDY}")
