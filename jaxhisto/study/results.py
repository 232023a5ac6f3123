"""The finished cells of a study as scores with intervals and comparisons, by what is reported."""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from jaxhisto.study import weighted
from jaxhisto.study.cells import Cell, Entry, Outcome, Ready, read_cell, train_rows
from jaxhisto.study.file import Study
from jaxhisto.study.stats import (
    Comparison,
    Runs,
    Summary,
    compare,
    drawn_means,
    holm,
    overlaps_of,
    summarise,
)

Floats = NDArray[np.float64]
Score = Callable[[Any, Floats, Floats], Floats]
Key = tuple[str, str, float]  # task, row, percent


@dataclass(frozen=True)
class Measure:
    """A score: its name in cells, what it is multiplied by, decimals (None: by its size)."""

    name: str
    title: str
    scale: float
    decimals: int | None
    higher_is_better: bool = True


F1 = Measure("macro_f1", "macro F1", 100.0, 1)
MAE = Measure("mae", "mean absolute error", 1.0, None, False)
AUC = Measure("auc", "AUC", 1.0, 3)
PEARSON = Measure("pearson", "correlation", 1.0, 3)

MEASURES: Mapping[str, Mapping[str, Measure]] = {
    "paper": {"classification": F1, "regression": MAE, "segmentation": F1},
    "ranks": {"classification": AUC, "regression": PEARSON},
}
"""By kind of task: the paper's, and those that ask for the order of the images alone."""
PARTS: Mapping[str, tuple[str, tuple[str, ...]]] = {
    "fine-tuned": ("all layers trained", ("finetune", "segment")),
    "last-layer": ("frozen encoder, last layer trained", ("last_layer",)),
    "linear": ("frozen encoder, linear probe at its optimum", ("linear",)),
    "knn": ("frozen encoder, nearest neighbours", ("knn",)),
}
"""Parts of a report, by name: a title, and the settings that belong in it."""
SCORES: Mapping[str, Score] = {
    "macro_f1": weighted.macro_f1,
    "auc": weighted.auc,
    "mae": weighted.mae,
    "pearson": weighted.pearson,
}


@dataclass(frozen=True, eq=False)
class Found:
    """Cells with what they found; None where a cell is not finished."""

    study: Study
    entries: Sequence[Entry]
    tasks: Sequence[Ready]
    cells: Sequence[tuple[Cell, Outcome | None]]

    @property
    def missing(self) -> int:
        """Cells that are not finished."""
        return sum(outcome is None for _, outcome in self.cells)


@dataclass(frozen=True, eq=False)
class Part:
    """Scores of one part of the report by one set of measures.

    Fields:
      name: a key of `PARTS`; measures: a key of `MEASURES`.
      rows, tasks, percents: that have scores, in the study's order.
      summaries: by (task, row, percent).
      means: (1 + B,) the mean and its draws, by the same.
      comparisons: all pairs of rows, corrected over those of one percent.
      incomplete: of these, those in which cells are missing.
    """

    name: str
    measures: str
    rows: tuple[str, ...]
    tasks: tuple[Ready, ...]
    percents: tuple[float, ...]
    summaries: dict[Key, Summary] = field(default_factory=dict)
    means: dict[Key, Floats] = field(default_factory=dict)
    comparisons: list[Comparison] = field(default_factory=list)
    incomplete: set[Key] = field(default_factory=set)

    def measure(self, ready: Ready) -> Measure:
        """The measure of a task."""
        return MEASURES[self.measures][ready.task.kind]


def collect(study: Study, entries: Sequence[Entry], tasks: Sequence[Ready],
            cells: Sequence[Cell]) -> Found:  # fmt: skip
    """Reads what is finished."""
    return Found(study, entries, tasks, [(cell, read_cell(cell)) for cell in cells])


def parts_of(found: Found) -> list[Part]:
    """All parts that have a score, in the order of `PARTS` and `MEASURES`."""
    parts = []
    for name in PARTS:
        for measures in MEASURES:
            part = _part(found, name, measures)
            if part.summaries:
                parts.append(part)
    return parts


def _part(found: Found, name: str, measures: str) -> Part:
    chosen: dict[Key, dict[tuple[int, int], Outcome | None]] = {}
    for cell, outcome in found.cells:
        if cell.setting in PARTS[name][1] and cell.ready.task.kind in MEASURES[measures]:
            key = cell.ready.name, cell.entry.row, cell.percent
            chosen.setdefault(key, {})[cell.entry.index, cell.repeat] = outcome
    rows = tuple(r for r in found.study.encoders if any(k[1] == r for k in chosen))
    tasks = tuple(t for t in found.tasks if any(k[0] == t.name for k in chosen))
    part = Part(name, measures, rows, tasks, found.study.percents)
    for ready in tasks:
        for percent in found.study.percents:
            _fill(part, found, ready, percent, chosen)
    _correct(part)
    return part


def _fill(
    part: Part,
    found: Found,
    ready: Ready,
    percent: float,
    chosen: Mapping[Key, Mapping[tuple[int, int], Outcome | None]],
) -> None:
    """Summaries and comparisons of one task and share."""
    study = found.study
    # One draw of the test images a task, whatever is compared on it.
    seed = (study.seed, zlib.crc32(ready.name.encode()))
    runs: dict[str, Runs] = {}
    held: dict[tuple[str, int, int], Outcome] = {}
    whole: dict[str, tuple[int, tuple[int, ...]]] = {}
    for row in part.rows:
        there = chosen.get((ready.name, row, percent), {})
        if any(outcome is None for outcome in there.values()):
            part.incomplete.add((ready.name, row, percent))
        seeds = 1 + max((k for k, _ in there), default=-1)
        repeats = tuple(sorted({
            r for _, r in there if all(there.get((k, r)) is not None for k in range(seeds))
        }))  # fmt: skip
        if not repeats:
            continue
        whole[row] = seeds, repeats
        for k in range(seeds):
            for r in repeats:
                outcome = there[k, r]
                assert outcome is not None
                held[row, k, r] = outcome
    scores = _scores(part.measure(ready), ready, held, study.draws, seed)
    for row, (seeds, repeats) in whole.items():
        grid = np.stack([np.stack([scores[row, k, r] for r in repeats]) for k in range(seeds)])
        runs[row] = Runs(row, grid, repeats)
    means = {row: drawn_means(of, seed) for row, of in runs.items()}
    for row, of in runs.items():
        part.summaries[ready.name, row, percent] = summarise(of, means[row])
        part.means[ready.name, row, percent] = means[row]
    # Rows that lack a repeat are compared with those that lack the same ones.
    for repeats in dict.fromkeys(of.repeats for of in runs.values()):
        alike = {row: of for row, of in runs.items() if of.repeats == repeats}
        trained = [train_rows(study, ready, percent, r) for r in repeats]
        part.comparisons.extend(compare(alike, means, ready.name, percent, overlaps_of(trained)))


def _scores(
    measure: Measure,
    ready: Ready,
    held: Mapping[tuple[str, int, int], Outcome],
    draws: int,
    seed: Sequence[int],
) -> dict[tuple[str, int, int], Floats]:
    """(1 + B,) scores of each run: of the test part, and of its draws."""
    test = ready.split.test
    groups = None if ready.task.groups is None else [ready.task.groups[i] for i in test]
    found: dict[tuple[str, int, int], list[Floats]] = {key: [] for key in held}
    segmented = ready.task.kind == "segmentation"
    targets = None if segmented else np.asarray(ready.task.values)[test]
    for weights in weighted.resamples(groups, len(test), draws, seed):
        for key, outcome in held.items():
            if segmented:
                found[key].append(weighted.pixel_f1(outcome.predictions, weights))
            else:
                score = SCORES[measure.name]
                found[key].append(score(targets, outcome.predictions, weights))
    return {key: measure.scale * np.concatenate(blocks) for key, blocks in found.items()}


def _correct(part: Part) -> None:
    """Holm over all comparisons of one share of the labels."""
    for percent in part.percents:
        at = [i for i, c in enumerate(part.comparisons) if c.percent == percent]
        of = [part.comparisons[i] for i in at]
        images, labels = holm([c.p for c in of]), holm([c.p_labels for c in of])
        for i, c, p, p_labels in zip(at, of, images, labels, strict=True):
            part.comparisons[i] = dataclasses.replace(c, p_holm=p, p_labels_holm=p_labels)
