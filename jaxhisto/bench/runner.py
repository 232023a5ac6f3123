"""Runs what is to be compared by turns, and records what each turn took.

By turns, because a machine's speed drifts: what runs second in every pair has met the same
machine as what runs first. The first turn of each is not counted (it compiles, fills caches and
starts threads).
"""

from __future__ import annotations

import gc
import re
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from jaxhisto.bench import memory
from jaxhisto.bench.record import Row
from jaxhisto.errors import JaxhistoError

Say = Callable[[str], None]
Seconds = float | tuple[float, float] | None
FAILED = "failed: "
"""Begins the reason of a row whose measurement ended in an error that nobody foresaw."""
PLACES = re.compile(r"(?<![\w.:/])/(?:[\w.@+-]+/)+")  # folders of an absolute path


class CannotRun(Exception):
    """What is measured failed, for the reason that its row then gives; the others go on."""


@dataclass(frozen=True)
class Runner:
    """What measures one row.

    Attributes:
      stage, who, images, settings, flops, bytes: as in `Row`.
      run: does `images` images once and returns when the device is done. A number it returns is
        the seconds it took, where the clock around it would count more than is meant; a pair,
        those and the seconds that cores worked for it. Raises CannotRun where it failed.
      close: frees what it holds.
      peak: the most memory that was held since the last turn began; the default asks JAX's
        devices, and on a CPU the process.
      child: it works in another process, so that this process's CPU seconds say nothing.
    """

    stage: str
    who: str
    run: Callable[[], Seconds]
    images: int
    settings: Mapping[str, Any]
    flops: float | None = None
    bytes: float | None = None
    close: Callable[[], None] = lambda: None
    peak: Callable[[], int | None] = memory.peak_bytes
    child: bool = False


@dataclass
class _Turns:
    """What one runner's turns gave so far."""

    seconds: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)
    peak: int | None = None
    why: str = ""


def measure(
    runners: Sequence[Runner | Row], repeats: int, say: Say = lambda text: None
) -> list[Row]:
    """A row for each runner, measured by turns after one turn each that does not count.

    Args:
      runners: in the order of their turns; a Row among them (a peer that is not installed) is
        handed back as it is.
      repeats: turns that count.
      say: takes a line of progress.

    A runner that fails gets a row that says why, out of memory or otherwise, and the others go on.
    """
    found = {i: _Turns() for i, one in enumerate(runners) if isinstance(one, Runner)}
    for turn in range(repeats + 1):
        for i, turns in found.items():
            runner = runners[i]
            assert isinstance(runner, Runner)
            if turns.why:
                continue
            _turn(runner, turns, counted=turn > 0)
            if turns.why:
                say(f"{runner.stage}, {runner.who}: {turns.why}")
    return [one if isinstance(one, Row) else _row(one, found[i]) for i, one in enumerate(runners)]


def attempt(
    make: Callable[[], Runner], stage: str, who: str, settings: Mapping[str, Any]
) -> Runner | Row:
    """A runner, or the row that says why there is none: see `reason`."""
    try:
        return make()
    except Exception as error:
        return Row(stage, who, settings, why=reason(error))


def reason(error: Exception) -> str:
    """Why a row has no figure: a package is missing, memory is out, or what nobody foresaw.

    The last begins with FAILED and has its traceback on stderr; folders, which are others on
    another machine, are left out.
    """
    if isinstance(error, CannotRun):
        return str(error)
    if isinstance(error, ImportError) and not (error.name or "").startswith("jaxhisto"):
        return missing(error)
    if out := memory.why(error):
        return out
    traceback.print_exception(error, file=sys.stderr)
    return FAILED + told(error)


def told(error: Exception) -> str:
    """An error as one line without folders: its type and first line; of ours, the sentence."""
    line = PLACES.sub("", (str(error).strip().splitlines() or [""])[0][:300])
    return line if isinstance(error, JaxhistoError) else f"{type(error).__name__}: {line}"


def missing(error: ImportError) -> str:
    """What to install: the package whose import failed, as pip knows it."""
    package = (error.name or str(error)).partition(".")[0]
    return f"not installed: pip install {PIP_NAMES.get(package, package)}"


PIP_NAMES = {
    "array_record": "array-record",
    "cv2": "opencv-python-headless",
    "PIL": "pillow",
    "tensorflow_datasets": "tensorflow-datasets",
}


def _turn(runner: Runner, turns: _Turns, counted: bool) -> None:
    memory.forget_peak()
    cpu, start = time.process_time(), time.perf_counter()
    try:
        own = runner.run()
    except Exception as error:
        turns.why = reason(error)
        error.__traceback__ = None  # its frames hold the arrays that filled the memory
        del error
        runner.close()
        gc.collect()
        return
    wall = time.perf_counter() - start
    worked = time.process_time() - cpu
    if isinstance(own, tuple):
        wall, worked = own
    if counted:
        turns.seconds.append(own if isinstance(own, float) else wall)
        if isinstance(own, tuple) or (own is None and not runner.child):
            turns.cpu.append(worked)
    peak = runner.peak()
    if peak is not None:
        turns.peak = max(turns.peak or 0, peak)


def _row(runner: Runner, turns: _Turns) -> Row:
    shared = (runner.stage, runner.who, dict(runner.settings))
    if turns.why:
        return Row(*shared, images=runner.images, why=turns.why)
    return Row(
        *shared,
        seconds=tuple(turns.seconds),
        images=runner.images,
        flops=runner.flops,
        bytes=runner.bytes,
        peak_bytes=turns.peak,
        cpu_seconds=tuple(turns.cpu),
    )
