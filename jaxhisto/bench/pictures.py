"""The report's picture: where an image's time goes, and images a second by batch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

from jaxhisto.bench.record import OURS, Record, Row
from jaxhisto.bench.verdict import KEYS, same
from jaxhisto.console import counted

COLOURS = {
    "read": "#bbbbbb",
    "to_device": "#888888",
    "augment": "#e69f00",
    "forward": "#56b4e9",
    "backward": "#0072b2",
    "optimizer": "#009e73",
    "communication": "#cc79a7",
}
"""Okabe and Ito's, which most people can tell apart."""


def draw(records: Sequence[Record], path: Path) -> Path | None:
    """Writes the picture; None where no record has a step to draw."""
    steps = [(record, row) for record in records for row in of_steps(record)]
    if not steps:
        return None
    from matplotlib import pyplot as plt

    lines = swept(steps)
    size = (12.0 if lines else 8.0, max(3.2, 1.6 + 0.55 * len(steps)))
    widths = (3, 2) if lines else (1,)
    figure, axes = plt.subplots(
        1, len(widths), figsize=size, width_ratios=widths, layout="constrained", squeeze=False
    )
    bars(axes[0, 0], steps)
    if lines:
        speeds(axes[0, 1], lines)
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return path


def of_steps(record: Record) -> list[Row]:
    """Our steps that have a figure."""
    return [
        row
        for row in record.rows
        if row.stage == "step" and row.who == OURS and row.seconds and "beside" not in row.settings
    ]


def bars(axes: Any, steps: Sequence[tuple[Record, Row]]) -> None:
    """Milliseconds of an image, by stage, above a mark for the whole step."""
    for y, (record, step) in enumerate(steps):
        x = 0.0
        for stage, colour in COLOURS.items():
            row = of_stage(record, stage, step)
            if row is None:
                continue
            width = 1e3 * row.median / row.images
            axes.barh(y, width, left=x, color=colour, height=0.6)
            x += width
        whole = 1e3 * step.median / step.images
        axes.plot([whole, whole], [y - 0.42, y + 0.42], color="black", linewidth=2)
        if theirs := quickest_peer(record, step):
            at = 1e3 * theirs.median / theirs.images
            axes.plot([at, at], [y - 0.42, y + 0.42], color="red", linewidth=2, linestyle="--")
    axes.set_yticks(range(len(steps)), [label(record, row) for record, row in steps])
    axes.invert_yaxis()
    axes.set_xlabel("ms an image (black: the whole step; red: the quickest peer's)")
    from matplotlib.patches import Patch

    marks = [Patch(color=colour, label=stage) for stage, colour in COLOURS.items()]
    axes.legend(handles=marks, ncols=4, loc="lower left", bbox_to_anchor=(0, 1), frameon=False)


def of_stage(record: Record, stage: str, step: Row) -> Row | None:
    """Our row of a stage at the step's setting, with a figure."""
    names = ("tile_px", "batch", "threads") if stage == "read" else KEYS
    for row in record.rows:
        shared = {k: v for k, v in same(row.settings, names).items() if k in step.settings}
        held = all(step.settings[name] == value for name, value in shared.items())
        if row.stage == stage and row.who == OURS and row.seconds and row.images and held:
            return row
    return None


def quickest_peer(record: Record, step: Row) -> Row | None:
    """The peer whose step at this setting takes the least time an image."""
    at = same(step.settings, KEYS)
    theirs = [
        row
        for row in record.rows
        if row.stage == "step"
        and row.who != OURS
        and row.seconds
        and same(row.settings, KEYS) == at
    ]
    return max(theirs, key=lambda row: row.images_per_s, default=None)


def label(record: Record, row: Row) -> str:
    """A setting on two lines."""
    of = row.settings
    return (
        f"{of['model']}, {of['tile_px']} px, batch {of['batch']}, {of['precision']}\n"
        f"{record.machine.get('device', '')}, {counted(record.machine.get('cores', 1), 'core')}"
    )


def swept(steps: Sequence[tuple[Record, Row]]) -> dict[str, list[tuple[int, Row]]]:
    """(batch, step) by network, side and device, of those that have several batches."""
    lines: dict[str, list[tuple[int, Row]]] = {}
    for record, row in steps:
        of = row.settings
        name = f"{of['model']}, {of['tile_px']} px, {record.machine.get('device', '')}"
        lines.setdefault(name, []).append((of["batch"], row))
    return {name: found for name, found in lines.items() if len({b for b, _ in found}) > 1}


def speeds(axes: Any, lines: dict[str, list[tuple[int, Row]]]) -> None:
    """Images a second of the step over the batch, a line a network and side."""
    for name, found in lines.items():
        found.sort(key=lambda item: item[0])
        batches = [batch for batch, _ in found]
        middle = [row.images_per_s for _, row in found]
        low = [m - row.images / max(row.seconds) for m, (_, row) in zip(middle, found, strict=True)]
        high = [
            row.images / min(row.seconds) - m for m, (_, row) in zip(middle, found, strict=True)
        ]
        axes.errorbar(batches, middle, yerr=(low, high), marker="o", capsize=4, label=name)
    axes.set_xscale("log", base=2)
    ticks = sorted({batch for found in lines.values() for batch, _ in found})
    axes.set_xticks(ticks, [f"{batch:,}" for batch in ticks])
    axes.minorticks_off()
    axes.set_ylim(bottom=0)
    axes.set_xlabel("batch, images")
    axes.set_ylabel("step, images/s")
    axes.set_title("bars: slowest to fastest", fontsize="small")
    axes.legend(frameon=False, fontsize="small")
