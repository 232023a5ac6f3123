"""Figures of a study in the form of the paper's Figs. 3 and 4, and its page and text."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from html import escape
from pathlib import Path
from textwrap import fill
from typing import Any

import numpy as np

from jaxhisto.console import counted
from jaxhisto.plots import plain
from jaxhisto.slides.report_parts import STYLE
from jaxhisto.study.cells import Ready
from jaxhisto.study.file import Study
from jaxhisto.study.grids import Grid
from jaxhisto.study.results import PARTS, Found, Part
from jaxhisto.study.tables import SHOWN, drawn, measures_of

COLUMNS = 3
MARKERS = "osD^vPX*<>"
BARS = 6  # encoders, of which more bars would be a thicket


def label_curves(part: Part, path: Path) -> Path:
    """Scores against the share of the labels: a panel a task, a line an encoder (extra `plots`).

    Dots are means, bands a standard deviation over repeats and pretraining seeds, as in the
    paper's figures, whose shares lie evenly on the axis too; there is none where there is one run.
    Bars are 95 % intervals, of up to `BARS` encoders.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    percents = [p for p in part.percents if any(k[2] == p for k in part.summaries)]
    count = len(part.tasks)
    columns = 2 if count == 4 else min(COLUMNS, count)
    lines = -(-len(part.tasks) // columns)
    width = max(5.0, 4.2 * columns)
    beside = max(1, min(4, int(width / (0.6 + 0.085 * max(map(len, part.rows))))))
    size = width, 3.3 * lines + 0.25 * -(-len(part.rows) // beside)
    figure = Figure(size, layout=ConstrainedLayoutEngine(h_pad=0.1, w_pad=0.1))
    FigureCanvasAgg(figure)
    grid = list(figure.subplots(lines, columns, squeeze=False).flat)
    for axes, ready in zip(grid, part.tasks, strict=False):
        for i, row in enumerate(part.rows):
            _line(axes, part, ready.name, row, percents, i)
        measure = part.measure(ready)
        better = "higher" if measure.higher_is_better else "lower"
        axes.set_title(fill(plain(ready.name), 34), fontsize="medium")
        axes.set_ylabel(f"{measure.title}\n({better} is better)")
        axes.set_xticks(range(len(percents)), [f"{p:g}" for p in percents])
        axes.set_xlim(-0.3, len(percents) - 0.7)
        axes.set_xlabel("% of the training labels")
        axes.spines[["top", "right"]].set_visible(False)
    for axes in grid[len(part.tasks) :]:
        axes.set_axis_off()
    handles, labels = grid[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", frameon=False,
                  ncols=min(beside, len(labels)))  # fmt: skip
    path.parent.mkdir(parents=True, exist_ok=True)
    # No version of matplotlib in the file: the same study gives the same bytes.
    figure.savefig(path, dpi=120, metadata={"Software": None})
    return path


def _line(axes: Any, part: Part, task: str, row: str, percents: Sequence[float], i: int) -> None:
    from matplotlib import colormaps

    colour = colormaps["tab10"](i % 10)
    style = "-" if i < 10 else "--"
    # A little beside each other, so that no bar hides another one.
    aside = (i - (len(part.rows) - 1) / 2) * min(0.05, 0.3 / len(part.rows))
    of = [(x + aside, part.summaries.get((task, row, p))) for x, p in enumerate(percents)]
    found = [(x, summary) for x, summary in of if summary is not None]
    at = np.array([x for x, _ in found])
    means, sds, lows, highs = np.array([(s.mean, s.sd, s.low, s.high) for _, s in found]
                                       or np.empty((0, 4))).T  # fmt: skip
    axes.plot(at, means, style, color=colour, marker=MARKERS[i % len(MARKERS)], markersize=4,
              linewidth=1.4, label=plain(row))  # fmt: skip
    axes.fill_between(at, means - sds, means + sds, color=colour, alpha=0.15, linewidth=0)
    if len(part.rows) <= BARS:
        axes.vlines(at, lows, highs, color=colour, linewidth=1, alpha=0.8)


def markdown(found: Found, grids: Sequence[tuple[Part | None, list[Grid]]]) -> str:
    """report.md: what was compared, then the tables, with their figures."""
    lines = [f"# {found.study.title}", "", *(f"- {line}" for line in facts(found)), ""]
    for part, of in grids:
        if part is None:
            continue
        lines += [f"## {heading(part)}", "", f"![{heading(part)}]({figure_name(part)})", ""]
        lines += [f"{caption(part).capitalize()}.", ""]
        for grid in of:
            lines += [shortened(grid).markdown(), ""] if shown(grid) else []
    return "\n".join(lines)


def page(
    found: Found,
    grids: Sequence[tuple[Part | None, list[Grid]]],
    out: Path,
    failures: Sequence[tuple[str, str]],
) -> str:
    """report.html: the same with the figures inside; nothing to load."""
    study = found.study
    numbers = [
        (len(study.encoders), "encoder" + "s" * (len(study.encoders) != 1)),
        (len(study.tasks), "task" + "s" * (len(study.tasks) != 1)),
        (study.repeats, "repeat" + "s" * (study.repeats != 1)),
        (len(found.cells) - found.missing, f"of {len(found.cells):,} cells"),
    ]
    head = "".join(f"<div><b>{n:,}</b><span>{escape(what)}</span></div>" for n, what in numbers)
    body = [f"<section><h2>What was compared</h2><ul>{_items(facts(found))}</ul></section>"]
    if failures:
        title = f"<h2>{counted(len(failures), 'cell')} failed</h2>"
        body.insert(0, f"<div class=failures>{title}<ul>{_items(_causes(failures))}</ul></div>")
    for part, of in grids:
        if part is None:
            continue
        picture = base64.b64encode((out / figure_name(part)).read_bytes()).decode()
        tables = "".join(shortened(grid).html() for grid in of if shown(grid))
        body.append(
            f'<section><h2>{escape(heading(part))}</h2><figure><img class=curve alt="score against '
            f'share of the labels" src="data:image/png;base64,{picture}"><figcaption>'
            f"{escape(caption(part))}</figcaption></figure>{tables}</section>"
        )
    return f"""<!doctype html>
<html lang=en><head><meta charset=utf-8><meta name=viewport content="width=device-width">
<title>{escape(study.title)}</title><style>{STYLE}
.curve{{display:block;max-width:100%;margin:0 auto}}
section .scroll{{border:0;padding:0;margin:0 0 1rem}}
</style></head><body>
<header><div><p>jaxhisto study</p><h1>{escape(study.title)}</h1></div>
<div class=numbers>{head}</div></header>
<main>{"".join(body)}</main></body></html>
"""


def caption(part: Part) -> str:
    """What is drawn."""
    bars = "; bars: 95 % intervals" * (len(part.rows) <= BARS)
    return f"dots: means; bands: a standard deviation over repeats and pretraining seeds{bars}"


def facts(found: Found) -> list[str]:
    """What was compared, a line each: tasks and how sure they can be, encoders."""
    lines = []
    for ready in found.tasks:
        parts = ", ".join(
            f"{len(ready.split.part(p)):,} {p}" for p in ("train", "validation", "test")
        )
        lines.append(
            f"{ready.name}: {ready.task.kind}, {parts} (split {ready.split.sha256[:12]}), "
            f"{fed(found.study, ready)}; intervals draw {drawn(ready)}"
        )
    for row, encoder in found.study.encoders.items():
        of = [e for e in found.entries if e.row == row]
        hashes = ", ".join(e.sha256[:12] for e in of)
        seeds = f"{len(of)} pretraining seeds" if len(of) > 1 else "one file"
        paper = f"; paper: {encoder.paper}" if encoder.paper else ""
        lines.append(f"{row}: {of[0].arch}, {seeds} ({hashes}){paper}")
    return lines


def fed(study: Study, ready: Ready) -> str:
    """How large the network's images are."""
    if ready.task.kind == "segmentation":
        return f"trained on crops of {study.others['segment'].crop_px} px"
    return f"fed at {ready.config.side} px"


def heading(part: Part) -> str:
    """Of a part of the report."""
    return f"{PARTS[part.name][0].capitalize()}: {measures_of(part)}"


def figure_name(part: Part) -> str:
    """Of its picture, below the study's folder."""
    return f"figures/labels-{part.name}-{part.measures}.png"


def shown(grid: Grid) -> bool:
    """Whether a grid is for people; the others are CSV files alone."""
    return not grid.name.startswith(("scores", "numbers"))


def shortened(grid: Grid) -> Grid:
    """The grid as the report shows it: of many comparisons those at the largest share."""
    if not grid.name.startswith("pairs-") or len(grid.rows) <= SHOWN:
        return grid
    of = tuple(row for row in grid.rows if row[1] == grid.rows[0][1])
    note = f"{grid.note} The other {len(grid.rows) - len(of):,} rows are in {grid.name}.csv."
    return Grid(grid.name, grid.title, grid.header, of, note, grid.labels)


def _causes(failures: Sequence[tuple[str, str]]) -> list[str]:
    """A line a sentence: how many cells it ended, and the first of them."""
    cells: dict[str, list[str]] = {}
    for cell, sentence in failures:
        cells.setdefault(sentence, []).append(cell)
    return [
        f"{sentence} ({of[0]}{f' and {len(of) - 1:,} more' if len(of) > 1 else ''})"
        for sentence, of in cells.items()
    ]


def _items(lines: Sequence[str]) -> str:
    return "".join(f"<li>{escape(line)}</li>" for line in lines)
