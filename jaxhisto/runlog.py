"""What a run says: metrics.jsonl (the record), TensorBoard on request, progress for a person."""

from __future__ import annotations

import json
import math
import os
import platform
import sys
import time
from collections import deque
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from types import TracebackType
from typing import Any

from jaxhisto.config import PretrainConfig
from jaxhisto.console import warn
from jaxhisto.errors import RunError
from jaxhisto.progress import Progress
from jaxhisto.settings import common

PACKAGES = ("jaxhisto", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")


MONITOR = "monitor.jsonl"


class RunLog:
    """Writes one line a step to RUN/metrics.jsonl and shows progress.

    A line holds `step` (1 for the first), the step's metrics and times (see `StepClock`),
    `images_per_s` (over the last steps), `wait_s` (time this step waited for data) and `time`
    (seconds since the epoch).
    Lines are flushed as they are written. On a resume, lines of steps that are done again
    are cut off first, so that each step stands in the file once. A disk that is full does not
    end the run: its lines wait in memory (`Lines`).
    """

    def __init__(
        self,
        run: str | Path,
        *,
        start_step: int,
        steps: int,
        batch_size: int,
        every: int = 50,
        tensorboard: bool = False,
    ) -> None:
        self.path = Path(run) / "metrics.jsonl"
        keep_steps(self.path, start_step)
        self._lines = Lines(self.path)
        self._batch_size, self._every, self._steps = batch_size, every, steps
        self._timing = False
        self._times: deque[float] = deque([time.perf_counter()], maxlen=21)
        self._board = _tensorboard(run, start_step + 1) if tensorboard else None
        self._progress = Progress("pretraining", steps, start_step, every=every)

    def scalars(self, step: int, metrics: Mapping[str, float], wait_s: float) -> None:
        """Records the metrics of `step`, the number of steps done with it."""
        now = time.perf_counter()
        self._times.append(now)
        speed = (len(self._times) - 1) * self._batch_size / (now - self._times[0])
        if not self._timing:  # the first step compiles; it says nothing of the others
            self._timing = True
            self._times = deque([now], maxlen=21)
        line = {"step": step, **metrics, "images_per_s": speed, "wait_s": wait_s}
        self._lines.append(_json_line(line))
        self.board(step, line)
        self._progress.update(step, f"loss {metrics['loss']:.4f}  {speed:.1f} images/s")

    def board(self, step: int, values: Mapping[str, float], prefix: str = "") -> None:
        """Shows values in TensorBoard, where that is on."""
        if self._board is not None:
            for name, value in values.items():
                self._board.add_scalar(prefix + name, value, step)

    def finish(self) -> None:
        """Returns when every line is in the file.

        Raises:
          RunError: some found no room.
        """
        self._lines.finish()

    def __enter__(self) -> RunLog:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._progress.close()
        self._lines.close()
        if self._board is not None:
            self._board.close()


class Lines:
    """Appends lines to a file; those that find no room wait in memory and go first when there is.

    At most `HELD` wait; beyond, the oldest are lost, and counted.
    """

    HELD = 100_000  # some 25 MB

    def __init__(self, path: Path) -> None:
        # Unbuffered: after an error it is known which bytes are in the file and which are not.
        self._path, self._file = path, path.open("ab", buffering=0)
        self._waiting: deque[bytes] = deque()
        self._rest = b""
        self._lost = 0
        self._full: OSError | None = None

    def append(self, line: str) -> None:
        """Writes the line and those that wait; says once when there is no room, and when again."""
        self._waiting.append(line.encode())
        if len(self._waiting) > self.HELD:
            self._waiting.popleft()
            self._lost += 1
        was_full = self._full is not None
        self._drain()
        if self._full is not None and not was_full:
            warn(
                f"{self._path}: cannot be written ({self._full.strerror}); lines wait in memory, "
                "training goes on: make room"
            )
        elif was_full and self._full is None:
            warn(f"{self._path}: can be written again")

    def finish(self) -> None:
        """Writes what waits.

        Raises:
          RunError: there is still no room, or there was none for too long.
        """
        self._drain()
        missing = self._lost + len(self._waiting) + bool(self._rest)
        if missing:
            why = self._full.strerror if self._full is not None else "there was no room for long"
            raise RunError(
                f"{self._path}: lacks {missing} lines ({why}); make room before the next start, "
                "the weights are not touched by it."
            )

    def close(self) -> None:
        self._file.close()

    def _drain(self) -> None:
        try:
            while self._rest or self._waiting:
                self._rest = self._rest or self._waiting.popleft()
                self._rest = self._rest[self._file.write(self._rest) :]
            self._full = None
        except OSError as error:
            self._full = error


def environment(devices: list[str]) -> dict[str, Any]:
    """What a result needs beside it to be believed: versions, devices, command, host, date."""
    return {
        "command": sys.argv,
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "devices": devices,
        "python": platform.python_version(),
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores",
        "versions": {name: _version(name) for name in PACKAGES},
    }


def run_record(config: PretrainConfig) -> dict[str, dict[str, Any]]:
    """Settings and versions that all processes of a run must hold alike, by kind and name."""
    return {"settings": common(config), **versions_record()}


def versions_record() -> dict[str, dict[str, Any]]:
    """Versions that must be the same on all hosts of a pod."""
    found = environment([])
    python = ".".join(found["python"].split(".")[:2])
    return {"versions": {"python": python, **found["versions"]}}


def read_metrics(run: str | Path) -> list[dict[str, Any]]:
    """The lines of RUN/metrics.jsonl; a last line torn by a kill is left out."""
    path = Path(run) / "metrics.jsonl"
    if not path.exists():
        raise RunError(f"{path}: no such file; name a run folder that `jaxhisto pretrain` wrote.")
    return [line for _, line in _whole_lines(path)]


def write_atomically(path: str | Path, text: str) -> None:
    """Writes a text file so that a reader sees the old one or the new one, never half."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def read_monitor(run: str | Path) -> list[dict[str, Any]]:
    """The lines of RUN/monitor.jsonl; none where nothing was measured."""
    path = Path(run) / MONITOR
    return [line for _, line in _whole_lines(path)] if path.exists() else []


def append_line(path: Path, values: Mapping[str, Any]) -> None:
    """Appends a line of JSON with the time, all of it or nothing; what is not finite becomes null.

    Raises:
      RunError: it cannot be written.
    """
    try:
        with path.open("ab", buffering=0) as file:
            whole, line = file.seek(0, os.SEEK_END), _json_line(values).encode()
            try:
                while line:
                    line = line[file.write(line) :]
            except OSError:
                # A full disk takes the beginning of a line; the next one must not go on from it.
                file.truncate(whole)
                raise
    except OSError as error:
        raise _cannot_write(path, error) from error


def keep_steps(path: Path, last: int) -> None:
    """Cuts off the lines of steps after `last`, and one torn by a kill."""
    if path.exists():
        kept = [text for text, line in _whole_lines(path) if line["step"] <= last]
        write_atomically(path, "".join(kept))


def _whole_lines(path: Path) -> list[tuple[str, dict[str, Any]]]:
    with path.open(encoding="utf-8") as file:
        return [(text, json.loads(text)) for text in file if text.endswith("}\n")]


def _json_line(values: Mapping[str, Any]) -> str:
    """A line of JSON, which knows no NaN: null stands for it."""
    finite = {
        k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()
    }
    return json.dumps(finite | {"time": round(time.time(), 3)}) + "\n"


def _cannot_write(path: Path, error: OSError) -> RunError:
    return RunError(
        f"{path}: cannot be written ({error.strerror}); make room and start the same line again."
    )


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _tensorboard(run: str | Path, first: int) -> Any:
    try:
        from tensorboardX import SummaryWriter
    except ImportError as error:
        raise RunError(
            "--tensorboard: tensorboardX is not installed; pip install 'jaxhisto[tensorboard]'."
        ) from error
    return SummaryWriter(str(Path(run) / "tensorboard"), purge_step=first)
