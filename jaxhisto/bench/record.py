"""What was measured: rows, and the record that holds them with all one must know to repeat them."""

from __future__ import annotations

import dataclasses
import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

from jaxhisto.bench_config import Stage
from jaxhisto.errors import RunError
from jaxhisto.runlog import write_atomically

FORMAT = "jaxhisto bench 1"
STAGES: tuple[str, ...] = get_args(Stage)
"""In the order in which they are measured and reported."""
OF_DATA = ("read", "to_device", "augment")
"""Stages that know no encoder: measured once for all of them."""
OF_MODEL = ("optimizer", "forward", "backward", "communication", "step", "pipeline")
"""Those that do, by the memory they take: on an accelerator a peak is that of all before, too."""
OURS = "jaxhisto"
GIVEN = "given views"
"""`beside` of a step without augmentation, on either side: the ratio of networks and optimizers."""
VIEWS = 2
BOUND = 0.25
"""Spread (slowest over fastest, less 1) above which a row concludes nothing: on a machine where
a repeat takes a quarter longer than another, a median of five is no figure to compare by."""
FEWEST = 3
"""Turns that it takes to know a spread."""


@dataclass(frozen=True)
class Row:
    """One stage, measured at one setting.

    Attributes:
      stage: one of STAGES.
      who: `jaxhisto`, or a peer: pytorch, torchvision, lightly, ...
      settings: what one must know to run it again: model, tile_px, batch, precision, data
        (synthetic, made or store), cache, devices, threads, ...
      seconds: one a repeat, each for `images` images; empty where there is no figure.
      images: images of a repeat, counted once, not once a view; 0 where a stage has none.
      flops: floating-point operations of one repeat, counted (docs/benchmarks.md says how).
      bytes: moved to and from memory by one repeat, likewise.
      peak_bytes: memory at its peak while it ran: a device's, or the process's where that is a CPU.
      why: why there is no figure: "out of memory", "not installed: pip install ...".
      cpu_seconds: what the cores of this process worked, one a repeat; work of other programs
        is in `seconds`, not in these.
    """

    stage: str
    who: str
    settings: Mapping[str, Any]
    seconds: tuple[float, ...] = ()
    images: int = 0
    flops: float | None = None
    bytes: float | None = None
    peak_bytes: int | None = None
    why: str = ""
    cpu_seconds: tuple[float, ...] = ()

    @property
    def median(self) -> float:
        """Seconds of a repeat; nan without a figure."""
        return statistics.median(self.seconds) if self.seconds else float("nan")

    @property
    def images_per_s(self) -> float:
        """By the clock and the median; nan where there is no figure, or no time was taken."""
        return self.images / self.median if self.seconds and self.median > 0 else float("nan")

    @property
    def views_per_s(self) -> float:
        """Each image is seen twice."""
        return VIEWS * self.images_per_s

    @property
    def images_per_cpu_s(self) -> float:
        """Images a second of one core's work; nan where it is not known."""
        if not self.cpu_seconds or not statistics.median(self.cpu_seconds) > 0:
            return float("nan")
        return self.images / statistics.median(self.cpu_seconds)

    @property
    def spread(self) -> float:
        """Slowest over fastest, less 1."""
        return spread_of(self.seconds)

    @property
    def conclusive(self) -> bool:
        """Whether there is a figure, and one to compare by: see `doubt`."""
        return bool(self.seconds) and not self.doubt

    @property
    def doubt(self) -> str:
        """Why nothing should be concluded from the turns: `spreads by 40 %`; empty where it may."""
        return doubt_of(self.seconds) if self.seconds else ""


def spread_of(seconds: Sequence[float]) -> float:
    """Slowest over fastest, less 1; 0 of none, infinite where only some took any time."""
    if not seconds or max(seconds) <= 0:
        return 0.0
    return max(seconds) / min(seconds) - 1 if min(seconds) > 0 else math.inf


def doubt_of(seconds: Sequence[float]) -> str:
    """What stands against turns of these lengths; empty where nothing does."""
    if seconds and min(seconds) <= 0:
        return "has a turn that took no time"
    if len(seconds) < FEWEST:
        return f"has {len(seconds)} of the {FEWEST} turns that a spread needs"
    spread = spread_of(seconds)
    return f"spreads by {spread:.0%}" if spread > BOUND else ""


@dataclass(frozen=True)
class Record:
    """A run of the bench: settings, machine, rows, and what follows from them.

    Attributes:
      what: the settings of the bench.
      machine: device, cores, versions and date (`runlog.environment`), and `peaks` as measured:
        {"tflops": {"f32": .., "bf16": ..}, "gb_per_s": ..}.
      rows: as measured.
      verdict: what bounds training at each setting, with the number that says so.
      more: other parts by name (growth, cost), as JSON.
    """

    what: Mapping[str, Any]
    machine: Mapping[str, Any]
    rows: tuple[Row, ...] = ()
    verdict: Mapping[str, Any] = field(default_factory=dict)
    more: Mapping[str, Any] = field(default_factory=dict)


def find(rows: tuple[Row, ...], stage: str, who: str = OURS, **settings: Any) -> Row | None:
    """The first row of a stage that holds these settings, or None."""
    for row in rows:
        held = all(row.settings.get(name) == value for name, value in settings.items())
        if row.stage == stage and row.who == who and held:
            return row
    return None


def write_record(path: str | Path, record: Record) -> None:
    """Writes a record as JSON, whole or not at all."""
    table = {"format": FORMAT, **{k: v for k, v in vars(record).items() if k != "more"}}
    table["rows"] = [row_to_json(row) for row in record.rows]
    write_atomically(path, json.dumps(table | dict(record.more), indent=1) + "\n")


def read_record(path: str | Path) -> Record:
    """What `write_record` wrote.

    Raises:
      RunError: no record of the bench.
    """
    try:
        table = json.loads(Path(path).read_text(encoding="utf-8"))
        if table.pop("format", "") != FORMAT:
            raise ValueError("another format")
        rows = tuple(row_from_json(row) for row in table.pop("rows"))
        parts = {name: table.pop(name) for name in ("what", "machine", "verdict")}
    except FileNotFoundError as error:
        raise RunError(f"{path}: no such file; name a record of `jaxhisto bench`.") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise RunError(
            f"{path}: is no record of `jaxhisto bench` ({error}); measure it again with --out."
        ) from error
    return Record(rows=rows, more=table, **parts)


def row_to_json(row: Row) -> dict[str, Any]:
    """A row as plain JSON values."""
    return {f.name: getattr(row, f.name) for f in dataclasses.fields(row)}


def row_from_json(table: Mapping[str, Any]) -> Row:
    """What `row_to_json` made; TypeError for a key that is not known or missing."""
    lists = {name: tuple(table.get(name, ())) for name in ("seconds", "cpu_seconds")}
    return Row(**{**table, **lists})
