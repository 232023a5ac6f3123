"""A step's metrics, read one step late; what is not finite ends the run with its tiles named."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from jaxhisto.checkpoints import Checkpoints
from jaxhisto.distributed import is_main
from jaxhisto.errors import RunError
from jaxhisto.pretrain.monitor import CollapseGuard
from jaxhisto.pretrain.timing import StepClock
from jaxhisto.runlog import write_atomically

Times = Callable[[], dict[str, float]]


class Pending:
    """Hands a step's metrics to the log one step later.

    Reading a metric waits for its step; read one step late, the device always has the next
    step to work on meanwhile.
    """

    def __init__(
        self,
        log: Any,
        checkpoints: Checkpoints,
        clock: StepClock,
        guard: CollapseGuard,
        out: Path,
        names: Callable[[int], list[str]],
    ) -> None:
        """Takes where to log, and `names` of the tiles in the batch of a step."""
        self._log, self._checkpoints, self._clock, self._guard = log, checkpoints, clock, guard
        self._out, self._names = out, names
        self._held: tuple[int, dict[str, Any], float, Times] | None = None

    def record(self, step: int, metrics: dict[str, jax.Array], wait_s: float) -> None:
        """Takes the metrics of `step`, reads and logs those of the step before."""
        times = self._clock.handed_over(metrics["loss"])
        self.flush()
        scalars = {name: value for name, value in metrics.items() if value.ndim == 0}
        self._held = step, scalars, wait_s, times

    def flush(self) -> None:
        """Reads and logs what is held.

        Raises:
          RunError: the loss, the gradient or the new weights are not finite.
        """
        if self._held is None:
            return
        step, arrays, wait_s, times = self._held
        self._held = None
        metrics = {name: float(value) for name, value in arrays.items()}
        self._log.scalars(step, metrics | times(), wait_s)
        for name in ("loss", "grad_norm", "state_norm"):
            if not math.isfinite(metrics[name]):
                listed = self._list_tiles(step, metrics)
                raise RunError(self._sentence(step, name, metrics[name]) + listed)
        self._guard.step(step, metrics["neg_sim"])

    def _list_tiles(self, step: int, metrics: dict[str, float]) -> str:
        """Writes which tiles the batch held, and says where."""
        path = self._out / f"nonfinite-{step}.json"
        shown = {name: repr(value) for name, value in metrics.items()}  # JSON knows no NaN
        content = {"step": step, "metrics": shown, "tiles": self._names(step)}
        try:
            if is_main():
                write_atomically(path, json.dumps(content, indent=1) + "\n")
        except OSError:  # a full disk must not hide what is said here
            return ""
        return f" {path} lists the batch's tiles."

    def _sentence(self, step: int, name: str, value: float) -> str:
        self._checkpoints.settle()
        kept = self._checkpoints.latest_step
        good = "no checkpoint was written yet" if kept is None else f"checkpoint {kept} is kept"
        return (
            f"step {step}: {name} is {value}; {good}; lower --optim.rate, raise "
            "--optim.temperature or use --precision f32, in a new run folder."
        )
