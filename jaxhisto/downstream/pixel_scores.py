"""Scores of masks from a matrix that counts pixels, as scikit-learn has them of the pixels.

A class that is in neither truth nor prediction has no F1 and is left out of the mean; one that is
in one of the two alone has 0 (scikit-learn's rule, and that of `probes.macro_f1`).
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

IGNORED = 255
"""In a mask of the loop: this pixel does not count."""

Counts = NDArray[np.int64]


def confusion(truth: NDArray[Any], predicted: NDArray[Any], classes: int) -> Counts:
    """(C, C) int64: pixels by true class (row) and predicted class (column).

    Args:
      truth: class ids; `IGNORED` pixels are left out.
      predicted: class ids below C, of the same shape.
      classes: C.
    """
    counted = truth != IGNORED
    pairs = truth[counted].astype(np.int64) * classes + predicted[counted]
    return np.bincount(pairs, minlength=classes * classes).reshape(classes, classes)


def class_f1(counts: Counts) -> NDArray[np.float64]:
    """(C,) F1 of each class, 0..1; NaN of a class that is nowhere."""
    hits, both = np.diag(counts).astype(np.float64), counts.sum(0) + counts.sum(1)
    return np.divide(2 * hits, both, out=np.full(len(counts), np.nan), where=both > 0)


def class_iou(counts: Counts) -> NDArray[np.float64]:
    """(C,) intersection over union of each class, 0..1; NaN of a class that is nowhere."""
    hits = np.diag(counts).astype(np.float64)
    union = counts.sum(0) + counts.sum(1) - hits
    return np.divide(hits, union, out=np.full(len(counts), np.nan), where=union > 0)


def scores(counts: Counts) -> dict[str, float]:
    """`macro_f1`, `mean_iou` and `accuracy` of the pixels, 0..1; NaN without any."""
    known = ~np.isnan(class_f1(counts))
    if not known.any():
        return dict.fromkeys(("macro_f1", "mean_iou", "accuracy"), float("nan"))
    return {
        "macro_f1": float(class_f1(counts)[known].mean()),
        "mean_iou": float(class_iou(counts)[known].mean()),
        "accuracy": float(np.diag(counts).sum() / counts.sum()),
    }
