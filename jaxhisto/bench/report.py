"""The report: tables in Markdown from records, and what no record covers, named as such."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from jaxhisto.bench import cost as cost_to_train
from jaxhisto.bench import growth_report
from jaxhisto.bench import variants as of_the_step
from jaxhisto.bench.record import (
    BOUND,
    OF_DATA,
    OF_MODEL,
    OURS,
    STAGES,
    Record,
    Row,
    find,
    read_record,
)
from jaxhisto.bench.variants import LEAST
from jaxhisto.bench.verdict import KEYS, peaks_of, same, verdicts
from jaxhisto.console import counted
from jaxhisto.errors import RunError
from jaxhisto.runlog import write_atomically

EXPECTED = ("NVIDIA H200", "NVIDIA H100")
"""Accelerators that the report names in any case."""
OF_A_POINT = tuple(stage for stage in (*OF_DATA, *OF_MODEL) if stage != "pipeline")

Section = Callable[[Record], str]


def write_report(records: Sequence[str | Path], out: str | Path) -> Path:
    """Writes OUT, and beside it a picture where matplotlib is installed.

    Raises:
      RunError: a file that is no record, or a place that cannot be written.
    """
    paths, out = [Path(path) for path in records], Path(out)
    found = [read_record(path) for path in paths]
    if not out.parent.is_dir():
        raise RunError(f"{out.parent}: no such folder; make it, or give --out another place.")
    found = [
        growth_report.drawn(record, out.with_name(f"{out.stem}-growth-{i}.png"))
        for i, record in enumerate(found)
    ]
    picture = drawn(found, out)
    write_atomically(out, text(found, [path.name for path in paths], picture))
    return out


def drawn(records: Sequence[Record], out: Path) -> str:
    """Name of the picture beside the report; empty without matplotlib, or with nothing to draw."""
    try:
        from jaxhisto.bench.pictures import draw
    except ImportError:
        return ""
    path = draw(records, out.with_suffix(".png"))
    return path.name if path else ""


def text(records: Sequence[Record], names: Sequence[str], picture: str = "") -> str:
    """The report."""
    parts = [HEAD]
    if picture:
        parts.append(f"![Seconds of an image by stage; images a second by batch]({picture})\n")
    parts.append(devices(records, names))
    for record, name in zip(records, names, strict=True):
        parts += [titled(record, name), *(s for section in SECTIONS if (s := section(record)))]
    parts.append(COUNTED)
    return "\n".join(parts)


HEAD = """# How fast training is

What `jaxhisto bench` measured, stage by stage. This page is written by it; measure your machine and
write your own:

    jaxhisto bench --out RECORD.json
    jaxhisto bench --report RECORD.json --out benchmarks.md

(`python -m jaxhisto.bench` takes the same flags where tyro is not installed.) An image counts once,
though it is seen twice (views/s). Rows of one stage at one setting took turns; `spread` is slowest
over fastest, less 1.
"""

COUNTED = f"""## How it is counted

- **Spread.** A row whose turns spread by more than {BOUND:.0%} is *inconclusive*: nothing should be
  concluded from it.
- **Images/core s**: images a second that a core worked for them, on a CPU: what other programs on
  the machine leave alone, and so what to believe where the clock is inconclusive.
- **Operations.** A multiply-add is two. Forward and backward are counted from the network's shapes
  (`jaxhisto/bench/flops.py`), taps on the padding included, as torchvision and He et al. count; so
  every implementation is held against the same figure. The views' gradient is not counted, since
  nobody computes it; the loss's similarities are. Those of augmentation and optimizer are XLA's.
- **Bytes** are what the compiled program reads and writes after fusion, as XLA counts, operands and
  results of library calls added: the traffic if caches help nothing. Of `to_device` they are the
  batch's, of `communication` what the devices send.
- **Peaks** are measured on the machine in the same run: products of large matrices, and reading and
  writing a large array. Of `f32`, in float32 throughout (no TF32).
- **Backward** is what the gradient adds: forward and backward in one program less forward alone.
- **Floor**: no program for this step is quicker on this machine. The longer of its operations at
  the peak and of the least bytes at the bandwidth: each convolution's input and output once, their
  gradients once, weights and optimizer, everything else fused away.
- **Verdict**: a step is compute-, memory- or communication-bound by which of three would take the
  largest share of it alone: operations at the peak, bytes at the bandwidth, collectives as they
  were measured. Bytes that a cache holds can make the second more than the whole. Training from a
  store is input-bound where it is more than 10 % slower than the step beside it.
- **Variants** are tried, not predicted. *Kept* is one whose slowest turn is at least {LEAST:.0%}
  quicker than the fastest of the plain step beside it; where the clock is inconclusive, on a CPU by
  the seconds that its cores worked. The loss compared is that of the second step, which has the
  first's gradient in it. Options of fast math are left out: they change what is learnt.
- **Peak memory**: on an accelerator the most since the process began, so that a stage's is at most
  that; stages that take more come later. On a CPU, the process's while the stage ran.
"""


def devices(records: Sequence[Record], names: Sequence[str]) -> str:
    """What was measured on what, and what was not."""
    rows = [
        [device_of(record), "measured", day(record), f"`{name}`"]
        for record, name in zip(records, names, strict=True)
    ]
    for expected in EXPECTED:
        if not any(expected in device_of(record) for record in records):
            rows.append([expected, "unmeasured", "", "none"])
    return "## Machines\n\n" + table(("device", "", "date", "record"), rows)


def device_of(record: Record) -> str:
    """Device, how many, and cores."""
    machine = record.machine
    many = len(machine.get("devices", ())) or 1
    times = f" x {many}" if many > 1 else ""
    return f"{machine.get('device', 'unknown')}{times}, {counted(machine.get('cores', 1), 'core')}"


def day(record: Record) -> str:
    """The date, without the time."""
    return str(record.machine.get("date", ""))[:10]


def titled(record: Record, name: str) -> str:
    """A record's heading, its versions and peaks."""
    machine = record.machine
    versions = ", ".join(f"{k} {v}" for k, v in machine.get("versions", {}).items() if v)
    lines = [f"## {device_of(record)}, {day(record)}", ""]
    lines.append(f"Record `{name}`; python {machine.get('python')}, {versions}.")
    if peaks := machine.get("peaks"):
        products = ", ".join(f"{v:.3g} in {k}" for k, v in peaks["tflops"].items())
        lines.append(
            f"Peaks as measured: {products} TFLOP/s, {peaks['gb_per_s']:.3g} GB/s of memory."
        )
    return "\n".join(lines) + "\n"


def says(record: Record) -> str:
    """The verdicts."""
    found = verdicts(record)["of"]  # of the rows, as they are worded now
    if not found:
        return ""
    lines = ["### Verdict", ""]
    for verdict in found:
        line = f"- {worded(verdict['settings'])}: {verdict['says']}"
        if verdict.get("floor_s"):
            line += f"; the floor is {verdict['floor_s']:.3g} s, {verdict['floor_share']:.0%}"
        if verdict.get("augment_share"):
            line += f"; augmentation alone is {verdict['augment_share']:.1%} of the step"
        lines.append(f"{line}.")
    return "\n".join(lines) + "\n"


def worded(settings: Any) -> str:
    """A setting in a few words."""
    units = {"tile_px": "{} px", "batch": "batch {}", "devices": "{} device(s)",
             "threads": "{} core(s)", "cache": "cache {}", "data": "{} tiles"}  # fmt: skip
    return ", ".join(units.get(k, "{}").format(v) for k, v in settings.items())


def stages(record: Record) -> str:
    """A table a setting: its stages, ours and the peers'."""
    parts = []
    for point in points(record):
        rows = [cells(row, record) for row in of_point(record, point)]
        head = ("stage", "who", "images/s", "views/s", "s, median", "spread", "images/core s",
                "TFLOP/s", "of peak", "GB/s", "of bandwidth", "peak memory, GB",
                "ours / theirs", "by core s")  # fmt: skip
        parts.append(f"### {worded(point)}\n\n{table(head, rows)}")
    return "\n".join(parts)


def points(record: Record) -> list[dict[str, Any]]:
    """The settings that have rows of an encoder, in order; without any, those of the data."""
    rows = [row for row in record.rows if row.stage in OF_A_POINT and "beside" not in row.settings]
    of_models = [row for row in rows if "model" in row.settings]
    found: list[dict[str, Any]] = []
    for row in of_models or rows:
        point = same(row.settings, KEYS)
        if point not in found and row.who == OURS:
            found.append(point)
    return found


def of_point(record: Record, point: dict[str, Any]) -> Iterator[Row]:
    """The rows of a point, by stage; those of the data belong to every encoder."""
    for row in sorted(record.rows, key=lambda row: STAGES.index(row.stage)):
        if row.stage not in OF_A_POINT or "beside" in row.settings:
            continue
        names = ("tile_px", "batch", "threads") if row.stage == "read" else KEYS
        shared = [n for n in names if n in row.settings and n in point]
        if all(row.settings[name] == point[name] for name in shared):
            yield row


def cells(row: Row, record: Record) -> list[str]:
    """A row of a table."""
    if row.why:
        return [row.stage, row.who, row.why, *[""] * 11]
    peak, width = peaks_of(row, record)
    moves_memory = row.stage not in ("to_device", "communication")
    products = row.stage in ("forward", "backward", "step")
    ours, on_cpu = ours_of(row, record), record.machine.get("platform") == "cpu"
    # A network's products are as many whoever computes them; a peer counts none.
    count = row.flops
    if count is None and products and ours and ours.flops:
        count = ours.flops / ours.images * row.images
    speed = count / row.median if count and row.median > 0 else None
    rate = row.bytes / row.median if row.bytes and row.median > 0 else None
    return [
        row.stage,
        row.who,
        number(row.images_per_s),
        number(row.views_per_s),
        f"{row.median:.3g}",
        f"{row.spread:.0%}" + ("" if row.conclusive else ", inconclusive"),
        number(row.images_per_cpu_s) if on_cpu else "",
        number(speed and speed / 1e12),
        percent(speed and peak and speed / peak) if products else "",
        number(rate and rate / 1e9),
        percent(rate and width and rate / width) if moves_memory else "",
        number(row.peak_bytes and row.peak_bytes / 1e9),
        against(row, ours),
        against(row, ours, "images_per_cpu_s") if on_cpu else "",
    ]


def ours_of(row: Row, record: Record) -> Row | None:
    """Of a peer: our row at its setting, where it has a figure."""
    if row.who == OURS:
        return None
    ours = find(record.rows, row.stage, OURS, beside=None, **same(row.settings, (*KEYS, "cache")))
    return ours if ours and ours.seconds else None


def against(row: Row, ours: Row | None, speed: str = "images_per_s") -> str:
    """Our speed over a peer's; by the clock only as far as both are conclusive."""
    if ours is None or not row.seconds:
        return ""
    ratio = getattr(ours, speed) / getattr(row, speed)
    if not math.isfinite(ratio):
        return ""
    sure = speed != "images_per_s" or (ours.conclusive and row.conclusive)
    return f"{ratio:.2f}" + ("" if sure else ", inconclusive")


def pipelines(record: Record) -> str:
    """Training from a store, by cache."""
    rows = []
    for row in record.rows:
        beside = row.stage == "step" and row.settings.get("beside") == "pipeline"
        if row.stage != "pipeline" and not beside:
            continue
        name = "tiles that are there" if beside else f"cache {row.settings.get('cache')}"
        at = worded({k: v for k, v in row.settings.items() if k in KEYS})
        speed = row.why or number(row.images_per_s)
        noise = "" if row.conclusive or row.why else ", inconclusive"
        spread = "" if row.why else f"{row.spread:.0%}{noise}"
        rows.append([at, name, row.settings.get("data", ""), row.who, speed, spread])
    if not rows:
        return ""
    head = ("setting", "input", "tiles", "who", "images/s", "spread")
    return "### Training from a store, by turns\n\n" + table(head, sorted(rows, key=lambda r: r[0]))


def starts(record: Record) -> str:
    """Start-up of the command line, and compilation."""
    rows = []
    for row in record.rows:
        seconds = row.why or f"{row.median:.3g}"
        worked = f"{statistics.median(row.cpu_seconds):.3g}" if row.cpu_seconds else ""
        if row.stage == "startup":
            what = str(row.settings.get("line", ""))
            rows.append([what, row.who, seconds, worked, f"{row.spread:.0%}"])
        elif row.stage == "compile":
            what = "compile the step, " + worded(same(row.settings, KEYS))
            rows.append([what, row.who, seconds, worked, "one go"])
            if again := row.settings.get("from_cache_s"):
                what = "the same, from the cache on disk"
                rows.append([what, row.who, f"{again:.3g}", "", "one go"])
    if not rows:
        return ""
    return "### Start\n\n" + table(("what", "who", "s", "core s", "spread"), rows)


def variants(record: Record) -> str:
    """The step in other forms."""
    on_cpu = record.machine.get("platform") == "cpu"
    rows = [
        of_the_step.cells(row, record.rows, worded(same(row.settings, KEYS)), on_cpu)
        for row in record.rows
        if "variant" in row.settings
    ]
    if not rows:
        return ""
    return "### Variants of the step, by turns\n\n" + table(of_the_step.HEAD, rows)


def growth(record: Record) -> str:
    """Exponents, where they were measured."""
    found = record.more.get("growth")
    return growth_report.section(found) if found else ""


def cost(record: Record) -> str:
    """What training costs, where it was projected."""
    found = record.more.get("cost")
    return cost_to_train.section(found) if found else ""


SECTIONS: tuple[Section, ...] = (says, stages, pipelines, variants, starts, growth, cost)
"""What a record has a part for, in order."""


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Markdown; columns that are empty throughout are left out."""
    kept = [i for i, name in enumerate(head) if any(row[i] for row in rows) or not rows]
    lines = [[head[i] for i in kept], ["---"] * len(kept)]
    lines += [[str(row[i]) for i in kept] for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def number(value: float | None) -> str:
    """Three figures; empty for what is not known."""
    if value is None or not math.isfinite(value):
        return ""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def percent(value: float | None) -> str:
    """Whole per cent; empty for what is not known."""
    return f"{value:.0%}" if value else ""
