"""Scores of predictions, as scikit-learn and SciPy define them, and how sure they are.

Accuracy, macro F1 and the area under the ROC curve are those of `probes`; here are the others, all
of a task's scores at once, and bootstrap intervals. Functions of NumPy arrays, in float64.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from jaxhisto.probes import accuracy, auc, macro_f1

Floats = NDArray[np.float64]
Ints = NDArray[Any]
Scores = dict[str, float]

CLASSIFICATION = ("macro_f1", "auc", "balanced_accuracy", "accuracy")
REGRESSION = ("mae", "r2", "pearson", "spearman")
LEVEL = 0.95
FEW_GROUPS = 10
"""Below this a percentile bootstrap covers far less than it says: of two groups there are three
draws, and its variance is half of theirs."""


@dataclass(frozen=True)
class Interval:
    """A score and where it lies: percentiles of a bootstrap over images or groups."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"


def classification(labels: Ints, scores: Floats) -> Scores:
    """`CLASSIFICATION` of (n,) labels and (n, C) scores, 0..1 each; auc is NaN of one class."""
    return {
        "macro_f1": macro_f1(labels, scores),
        "auc": auc(labels, scores),
        "balanced_accuracy": balanced_accuracy(labels, scores),
        "accuracy": accuracy(labels, scores),
    }


def regression(targets: Floats, predictions: Floats) -> Scores:
    """`REGRESSION` of (n,) targets and predictions; mae in the targets' unit (paper: 0..100)."""
    return {
        "mae": float(np.abs(targets - predictions).mean()),
        "r2": r2(targets, predictions),
        "pearson": pearson(targets, predictions),
        "spearman": pearson(ranks(targets), ranks(predictions)),
    }


def balanced_accuracy(labels: Ints, scores: Floats) -> float:
    """Mean over the classes that are a label of the share found, 0..1."""
    right = scores.argmax(1) == labels
    return float(np.mean([right[labels == c].mean() for c in np.unique(labels)]))


def r2(targets: Floats, predictions: Floats) -> float:
    """Coefficient of determination, 1 at best; NaN where the targets do not vary."""
    spread = ((targets - targets.mean()) ** 2).sum()
    return float(1 - ((targets - predictions) ** 2).sum() / spread) if spread else float("nan")


def pearson(a: Floats, b: Floats) -> float:
    """Linear correlation, -1..1; NaN where one of the two does not vary."""
    x, y = a - a.mean(), b - b.mean()
    length = np.sqrt((x**2).sum() * (y**2).sum())
    return float(np.clip((x * y).sum() / length, -1, 1)) if length else float("nan")


def ranks(values: Floats) -> Floats:
    """1 for the smallest; equal values share the mean of their places."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    return np.asarray((np.cumsum(counts) - (counts - 1) / 2)[inverse], np.float64)


def bootstrap(
    score: Callable[[Ints, Floats], Scores],
    targets: Ints,
    predictions: Floats,
    groups: Sequence[str] | None = None,
    draws: int = 1000,
    seed: int = 0,
) -> dict[str, Interval]:
    """Each score with its 95 % percentile interval over resampled rows.

    Args:
      score: `classification` or `regression`.
      targets, predictions: n rows.
      groups: n names; whole groups are drawn, as their images are no independent ones. With
        fewer than two groups images are drawn, see `drawn_by`.
      draws: resamples; those in which a score is NaN (one class alone) do not count for it.

    Returns:
      By the score's name.
    """
    rng = np.random.default_rng(seed)
    members = _members(groups, len(targets))
    whole = score(targets, predictions)
    found: dict[str, list[float]] = {name: [] for name in whole}
    for _ in range(draws):
        chosen = rng.integers(0, len(members), len(members))
        rows = np.concatenate([members[i] for i in chosen])
        for name, value in score(targets[rows], predictions[rows]).items():
            found[name].append(value)
    return {name: _interval(whole[name], np.array(found[name])) for name in whole}


def drawn_by(groups: Sequence[str] | None) -> str:
    """What `bootstrap` draws: `group`, or `image`."""
    return "group" if groups is not None and len(set(groups)) > 1 else "image"


def told(images: int, groups: Sequence[str] | None) -> str:
    """What the intervals of so many test images, of these groups, are over."""
    text = f"95 % bootstrap interval over {images:,} test images"
    if drawn_by(groups) == "group":
        count = len(set(groups or ()))
        narrow = ", of so few it is too narrow" if count < FEW_GROUPS else ""
        return f"{text}, drawn by {count:,} groups{narrow}"
    return f"{text}, all of one group: it says nothing of other groups" if groups else text


def _members(groups: Sequence[str] | None, n: int) -> list[NDArray[np.int64]]:
    if drawn_by(groups) == "image":
        return list(np.arange(n).reshape(n, 1))
    names = np.array(groups)
    return [np.flatnonzero(names == name) for name in np.unique(names)]


def _interval(value: float, found: Floats) -> Interval:
    known = found[~np.isnan(found)]
    if not len(known):
        return Interval(value, float("nan"), float("nan"))
    low, high = np.percentile(known, [50 * (1 - LEVEL), 50 * (1 + LEVEL)])
    return Interval(value, float(low), float(high))
