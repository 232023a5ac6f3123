"""Scores of many resamples at once: a resample is a whole number for each row, how often it is in.

The same numbers as `metrics` gives of the rows so repeated, for B resamples in a few matrix
products instead of B calls. Functions of NumPy arrays, in float64.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from jaxhisto.metrics import drawn_by

Floats = NDArray[np.float64]
Ints = NDArray[Any]
AT_ONCE = 1 << 22  # numbers in a block of weights: 32 MiB


def resamples(
    groups: Sequence[str] | None, n: int, draws: int, seed: Sequence[int]
) -> Iterator[Floats]:
    """Weights of the rows (b, n) in blocks, 1 + draws in all: the rows as they are, then each draw.

    Args:
      groups: n names, of which as many as there are are drawn with replacement; None or all of one
        name: rows are.
    """
    rng = np.random.default_rng(seed)
    unit = np.arange(n)
    if drawn_by(groups) == "group":
        unit = np.unique(np.array(groups), return_inverse=True)[1]
    units = int(unit.max()) + 1
    yield np.ones((1, n))
    block = max(1, AT_ONCE // max(n, units))
    for start in range(0, draws, block):
        count = min(block, draws - start)
        chosen = rng.integers(0, units, (count, units))
        flat = (chosen + units * np.arange(count)[:, None]).ravel()
        times = np.bincount(flat, minlength=count * units).reshape(count, units)
        yield times[:, unit].astype(np.float64)


def macro_f1(labels: Ints, scores: Floats, weights: Floats) -> Floats:
    """(B,) mean F1 over the classes that are a label or a prediction, of (n,) and (n, C)."""
    classes = np.arange(scores.shape[1])
    predicted = scores.argmax(1)[:, None] == classes
    true = np.asarray(labels)[:, None] == classes
    hits, said, there = (weights @ x.astype(float) for x in (predicted & true, predicted, true))
    return mean_f1(hits, said, there)


def pixel_f1(confusion: Floats, weights: Floats) -> Floats:
    """(B,) the same over pixels, of (n, C, C) counts by true and predicted class."""
    n, classes, _ = confusion.shape
    total = (weights @ confusion.reshape(n, -1).astype(float)).reshape(-1, classes, classes)
    return mean_f1(np.einsum("bcc->bc", total), total.sum(1), total.sum(2))


def mean_f1(hits: Floats, said: Floats, there: Floats) -> Floats:
    """(B,) from counts (B, C) of true positives, predictions and labels."""
    known = said + there > 0
    f1 = np.where(known, 2 * hits / np.where(known, said + there, 1), 0.0)
    return np.asarray(f1.sum(1) / known.sum(1))


def auc(labels: Ints, scores: Floats, weights: Floats) -> Floats:
    """(B,) area under the ROC curve as `probes.auc` has it; NaN where one class alone is in."""
    labels = np.asarray(labels)
    if scores.shape[1] == 2:
        return _area(labels == 1, scores[:, 1], weights)
    areas = np.stack([_area(labels == c, scores[:, c], weights) for c in range(scores.shape[1])])
    known = ~np.isnan(areas)
    total = np.where(known, areas, 0).sum(0)
    count = known.sum(0)
    return np.where(count > 0, total / np.maximum(count, 1), np.nan)


def mae(targets: Floats, predictions: Floats, weights: Floats) -> Floats:
    """(B,) mean absolute error."""
    return np.asarray(weights @ np.abs(targets - predictions) / weights.sum(1))


def pearson(targets: Floats, predictions: Floats, weights: Floats) -> Floats:
    """(B,) linear correlation; NaN where one of the two does not vary."""
    total = weights.sum(1)
    x, y = targets - targets.mean(), predictions - predictions.mean()
    mx, my = weights @ x / total, weights @ y / total
    both = weights @ (x * y) / total - mx * my
    # What is left of equal numbers is rounding, which no correlation may be made of.
    vx, vy = _spread(x, mx, weights, total), _spread(y, my, weights, total)
    known = (vx > 0) & (vy > 0)
    length = np.sqrt(np.where(known, vx * vy, 1))
    return np.where(known, np.clip(both / length, -1, 1), np.nan)


def _spread(x: Floats, mean: Floats, weights: Floats, total: Floats) -> Floats:
    square = weights @ (x * x) / total
    spread = square - mean**2
    return np.where(spread > 1e-12 * np.maximum(square, 1e-300), spread, 0.0)


def _area(positive: NDArray[np.bool_], score: Floats, weights: Floats) -> Floats:
    order = np.argsort(score, kind="stable")
    first = np.flatnonzero(np.r_[True, np.diff(score[order]) != 0])
    ordered = weights[:, order]
    is_positive = positive[order]
    ones = np.add.reduceat(ordered * is_positive, first, axis=1)
    zeros = np.add.reduceat(ordered * ~is_positive, first, axis=1)
    below = np.cumsum(zeros, axis=1) - zeros
    pairs = ones.sum(1) * zeros.sum(1)
    area = (ones * (below + zeros / 2)).sum(1)
    return np.where(pairs > 0, area / np.where(pairs > 0, pairs, 1), np.nan)
