"""The tables of a study, in the form of the paper's Tables 1, 2, D.7 and D.8."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

import numpy as np

from jaxhisto.metrics import FEW_GROUPS
from jaxhisto.study.cells import Ready
from jaxhisto.study.file import Study
from jaxhisto.study.grids import NONE, Grid, decimals_of, number
from jaxhisto.study.paper_tables import FROZEN_TABLE, SETS, average
from jaxhisto.study.paper_tables import number as printed
from jaxhisto.study.results import MEASURES, PARTS, Found, Measure, Part
from jaxhisto.study.stats import interval

KINDS = ("classification", "regression", "segmentation")
MARK = "*"  # of a mean of which cells are missing
SHOWN = 40  # comparisons in the report; all are in the CSV file


def tables_of(found: Found, parts: Sequence[Part]) -> list[tuple[Part | None, list[Grid]]]:
    """The grids of each part; those of none are of the whole study."""
    grids: list[tuple[Part | None, list[Grid]]] = [(None, [scores(found)])]
    for part in parts:
        of = [summary(found.study, part), detail(found.study, part), fractions(part),
              comparisons(part), numbers(found.study, part)]  # fmt: skip
        grids.append((part, [grid for grid in of if grid.rows]))
    return grids


def at_most(part: Part) -> float:
    """The largest share of the labels that has scores: that of the main tables."""
    return max(percent for _, _, percent in part.summaries)


def summary(study: Study, part: Part) -> Grid:
    """A row an encoder, a column a kind of task: means over its tasks (Tables 1 and 2)."""
    percent = at_most(part)
    kinds = [k for k in KINDS if any(t.task.kind == k for t in part.tasks)]
    rows: list[tuple[str, ...]] = []
    for row in part.rows:
        cells, ours = [], []
        for kind in kinds:
            of = _mean_over(part, kind, row, percent)
            decimals = _kind_decimals(part, kind, percent)
            ours.append(float("nan") if of is None else float(of[0]))
            if of is None:
                cells.append(NONE)
            else:
                of_kind = {(t.name, row, percent) for t in part.tasks if t.task.kind == kind}
                mark = MARK * bool(of_kind & part.incomplete)
                cells.append(_bracketed(float(of[0]), *interval(of[1:]), decimals, mark))
        rows.append((row, *cells))
        theirs = [_paper_average(study, part, row, kind) for kind in kinds]
        rows += _beside(part, kinds, ours, theirs, percent)
    header = tuple(f"{k.capitalize()} ({_kind_measure(part, k).title})" for k in kinds)
    note = (
        f"{percent:g} % of the labels. Means over the tasks of a kind, with 95 % intervals over "
        f"test images, repeats and pretraining seeds.{_note(rows)}"
    )
    title = f"{_title(part)}: averages"
    return Grid(
        f"summary-{part.name}-{part.measures}", title, ("Encoder", *header), tuple(rows), note
    )


def detail(study: Study, part: Part) -> Grid:
    """A row an encoder, a column a task, as Tables D.7 and D.8; below it the paper's row."""
    percent = at_most(part)
    rows: list[tuple[str, ...]] = []
    for row in part.rows:
        cells, ours, theirs = [], [], []
        for ready in part.tasks:
            of = part.summaries.get((ready.name, row, percent))
            decimals = _decimals(part, ready, percent)
            ours.append(of.mean if of else float("nan"))
            theirs.append(_paper_number(study, part, row, ready))
            if of is None:
                cells.append(NONE)
                continue
            sd = "" if math.isnan(of.sd) else f" ± {number(of.sd, decimals)}"
            cells.append(
                f"{number(of.mean, decimals)}{_mark(part, ready, row, percent)}{sd} "
                f"[{number(of.low, decimals)}, {number(of.high, decimals)}]"
            )
        rows.append((row, *cells))
        if any(v is not None for v in theirs):
            shown = [_decimals(part, ready, percent) for ready in part.tasks]
            rows += _pair(ours, theirs, shown)
    header = tuple(f"{t.name} ({part.measure(t).title})" for t in part.tasks)
    note = (
        f"{percent:g} % of the labels. Mean ± standard deviation over repeats and pretraining "
        f"seeds [95 % interval over test images, repeats and seeds].{_note(rows)}"
    )
    name = f"detail-{part.name}-{part.measures}"
    return Grid(name, f"{_title(part)}: each task", ("Encoder", *header), tuple(rows), note)


def fractions(part: Part) -> Grid:
    """A row a task and encoder, a column a share of the labels: what the figure draws."""
    percents = [p for p in part.percents if any(k[2] == p for k in part.summaries)]
    rows = []
    for ready in part.tasks:
        decimals = max(_decimals(part, ready, p) for p in percents)
        for row in part.rows:
            cells = []
            for percent in percents:
                of = part.summaries.get((ready.name, row, percent))
                if of is None:
                    cells.append(NONE)
                    continue
                sd = "" if math.isnan(of.sd) else f" ± {number(of.sd, decimals)}"
                mark = _mark(part, ready, row, percent)
                cells.append(f"{number(of.mean, decimals)}{mark}{sd}")
            rows.append((f"{ready.name} ({part.measure(ready).title})", row, *cells))
    header = ("Task", "Encoder", *(f"{p:g} %" for p in percents))
    title = f"{_title(part)}: by share of the labels"
    note = f"Mean ± standard deviation over repeats and pretraining seeds.{_note(rows)}"
    return Grid(f"labels-{part.name}-{part.measures}", title, header, tuple(rows), note, labels=2)


def comparisons(part: Part) -> Grid:
    """A row a pair of encoders on a task, at each share of the labels; the largest share first."""
    readies = {ready.name: ready for ready in part.tasks}
    rows = []
    for c in sorted(part.comparisons, key=lambda c: -c.percent):
        ready = readies[c.task]
        decimals = _decimals(part, ready, c.percent)
        better = c.difference > 0 if part.measure(ready).higher_is_better else c.difference < 0
        rows.append(
            (
                c.task,
                f"{c.percent:g} %",
                c.a,
                c.b,
                NONE if c.difference == 0 else c.a if better else c.b,
                number(c.difference, decimals, sign=True),
                f"[{number(c.low, decimals, True)}, {number(c.high, decimals, True)}]",
                *(_probability(p) for p in (c.p, c.p_holm, c.p_labels, c.p_labels_holm)),
            )
        )
    header = ("Task", "Labels", "Encoder", "less", "Better", "Difference", "95 % interval",
              "p images", "p images, Holm", "p labels", "p labels, Holm")  # fmt: skip
    note = (
        "p images: over other test images (or groups), repeats and seeds, by bootstrap; p labels: "
        "over other training images, by the corrected resampled t test, which 100 % of the labels "
        "have not. Holm: corrected for all pairs and tasks at that share."
    )
    title = f"{_title(part)}: encoder against encoder"
    return Grid(f"pairs-{part.name}-{part.measures}", title, header, tuple(rows), note, labels=5)


def numbers(study: Study, part: Part) -> Grid:
    """A row a task, encoder and share: all that the other tables show, in full."""
    header = ("task", "encoder", "percent", "measure", "mean", "sd", "sd_seeds", "low", "high",
              "runs", "complete", "paper")  # fmt: skip
    rows = []
    for (task, row, percent), of in part.summaries.items():
        ready = next(t for t in part.tasks if t.name == task)
        paper = _paper_number(study, part, row, ready) if percent == at_most(part) else None
        values = (of.mean, of.sd, of.sd_seeds, of.low, of.high)
        rows.append(
            (
                task,
                row,
                f"{percent:g}",
                part.measure(ready).name,
                *("" if math.isnan(v) else repr(float(v)) for v in values),
                str(of.runs),
                "no" if (task, row, percent) in part.incomplete else "yes",
                "" if paper is None else str(paper),
            )
        )
    return Grid(f"numbers-{part.name}-{part.measures}", "In full", header, tuple(rows), labels=4)


def scores(found: Found) -> Grid:
    """A row a finished cell, with every score; numbers in full, for one's own statistics."""
    cells = [(cell, outcome) for cell, outcome in found.cells if outcome is not None]
    names = list(dict.fromkeys(name for _, o in cells for name in o.test))
    rows = tuple(
        (
            cell.setting,
            cell.ready.name,
            cell.entry.row,
            str(cell.entry.index),
            cell.entry.sha256,
            f"{cell.percent:g}",
            str(cell.repeat),
            str(len(cell.train)),
            *("" if np.isnan(o.test.get(n, np.nan)) else repr(float(o.test[n])) for n in names),
        )
        for cell, o in cells
    )
    header = ("setting", "task", "encoder", "seed", "encoder_sha256", "percent", "repeat",
              "train_images", *names)  # fmt: skip
    return Grid("scores", "Every cell", header, rows, labels=5)


def drawn(ready: Ready) -> str:
    """What the intervals draw on a task's test part."""
    rows = ready.split.test
    if ready.task.groups is None:
        return f"{len(rows):,} test images"
    groups = len({ready.task.groups[i] for i in rows})
    if groups == 1:
        return f"{len(rows):,} test images, all of one group: they say nothing of other groups"
    narrow = ", of so few they are too narrow" if groups < FEW_GROUPS else ""
    return f"{groups:,} test groups of {len(rows):,} images{narrow}"


def decimals(part: Part, ready: Ready) -> int:
    """Decimals of a task's scores over all shares."""
    return max(_decimals(part, ready, p) for p in part.percents)


def measures_of(part: Part) -> str:
    """`macro F1 and mean absolute error`: what its tasks are judged by."""
    kinds = {t.task.kind for t in part.tasks}
    of = MEASURES[part.measures]
    return " and ".join(dict.fromkeys(of[k].title for k in KINDS if k in kinds))


def _probability(p: float) -> str:
    return "< 0.0001" if p < 0.0001 else number(p, 4)


def _title(part: Part) -> str:
    return f"{PARTS[part.name][0].capitalize()} ({measures_of(part)})"


def _mark(part: Part, ready: Ready, row: str, percent: float) -> str:
    return MARK if (ready.name, row, percent) in part.incomplete else ""


def _note(rows: Sequence[Sequence[str]]) -> str:
    """What the mark means, where a row bears one."""
    marked = any(re.match(rf"-?[\d.]+{re.escape(MARK)}", cell) for row in rows for cell in row)
    return f" {MARK}: of the cells that are there; some are missing." if marked else ""


def _kind_measure(part: Part, kind: str) -> Measure:
    return MEASURES[part.measures][kind]


def _mean_over(part: Part, kind: str, row: str, percent: float) -> np.ndarray | None:
    """(1 + B,) mean over the tasks of a kind; None where the row lacks one of them."""
    tasks = [t for t in part.tasks if t.task.kind == kind]
    means = [part.means.get((t.name, row, percent)) for t in tasks]
    held = [m for m in means if m is not None]
    return np.mean(held, axis=0) if len(held) == len(tasks) else None


def _decimals(part: Part, ready: Ready, percent: float) -> int:
    measure = part.measure(ready)
    if measure.decimals is not None:
        return measure.decimals
    return decimals_of([s.mean for (t, _, p), s in part.summaries.items()
                        if t == ready.name and p == percent])  # fmt: skip


def _kind_decimals(part: Part, kind: str, percent: float) -> int:
    return max(_decimals(part, t, percent) for t in part.tasks if t.task.kind == kind)


def _bracketed(value: float, low: float, high: float, decimals: int, mark: str) -> str:
    return f"{number(value, decimals)}{mark} [{number(low, decimals)}, {number(high, decimals)}]"


def _table(study: Study, part: Part) -> str:
    """The paper's table that a part stands beside; none of a part that it does not have.

    All but D.8 are of networks whose layers were all trained.
    """
    if part.measures != "paper":
        return ""
    return {"fine-tuned": study.paper or "D.7", "last-layer": FROZEN_TABLE}.get(part.name, "")


def _paper_number(study: Study, part: Part, row: str, ready: Ready) -> float | None:
    column = study.columns.get(ready.name, "")
    return printed(_table(study, part), study.encoders[row].paper, column)


def _paper_average(study: Study, part: Part, row: str, kind: str) -> float | None:
    """Only where the study has all the sets of that kind that the paper averages over."""
    of = [t.name for t in part.tasks if t.task.kind == kind]
    if {study.columns.get(name, "") for name in of} != SETS[kind]:
        return None
    return average(_table(study, part), study.encoders[row].paper, kind)


def _beside(
    part: Part,
    kinds: Sequence[str],
    ours: Sequence[float],
    theirs: Sequence[float | None],
    percent: float,
) -> list[tuple[str, ...]]:
    if all(v is None for v in theirs):
        return []
    return _pair(ours, theirs, [_kind_decimals(part, kind, percent) for kind in kinds])


def _pair(
    ours: Sequence[float], theirs: Sequence[float | None], decimals: Sequence[int]
) -> list[tuple[str, ...]]:
    """The paper's row, and ours less it."""
    less = [None if b is None else a - b for a, b in zip(ours, theirs, strict=True)]
    return [
        ("  paper", *(number(v, d) for v, d in zip(theirs, decimals, strict=True))),
        ("  difference", *(number(v, d, True) for v, d in zip(less, decimals, strict=True))),
    ]
