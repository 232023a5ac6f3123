"""What frozen features are worth, and how they are spread: functions of NumPy arrays.

Probes: k nearest neighbours by cosine, and ridge regression on one-hot targets in closed form.
Scores: accuracy, macro F1, area under the ROC curve. Spread: effective rank, alignment and
uniformity. Everything is computed in float64 and has no state and no randomness.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]
Ints = NDArray[Any]

LAMBDAS = np.logspace(-2, 6, 17)
"""Ridge strengths tried. Standardised features have a scatter matrix of trace n d, so this spans
from no shrinking to shrinking everything for any n d up to some 1e7."""

AT_ONCE = 1024


def knn_scores(
    train: ArrayLike, labels: Ints, test: ArrayLike, classes: int, k: int = 20, tau: float = 0.07
) -> Floats:
    """Class scores by weighted nearest neighbours (Wu et al. 2018, sec. 3.4; as in DINO).

    Each of the k training rows nearest by cosine s votes for its class with exp(s / tau).

    Args:
      train, test: (n, d) and (m, d) features, of any length.
      labels: (n,) integers in 0..classes-1.
      k: neighbours, at most n are taken. Wu et al. use 200, DINO reports 20.
      tau: temperature of the votes (Wu et al.: 0.07).

    Returns:
      (m, classes) float64, each row sums to 1.
    """
    votes = knn_values(train, np.eye(classes)[np.asarray(labels)], test, k, tau)
    return votes / votes.sum(1, keepdims=True)


def knn_values(
    train: ArrayLike, values: ArrayLike, test: ArrayLike, k: int = 20, tau: float = 0.07
) -> Floats:
    """The mean of (n, v) values over nearest neighbours, weighted as in `knn_scores`.

    Returns:
      (m, v) float64.
    """
    values = np.asarray(values, np.float64)
    a, b = unit(train), unit(test)
    k = min(k, len(a))
    means = np.zeros((len(b), values.shape[1]))
    for start in range(0, len(b), AT_ONCE):
        similarity = b[start : start + AT_ONCE] @ a.T
        nearest = np.argpartition(-similarity, k - 1, axis=1)[:, :k]
        near = np.take_along_axis(similarity, nearest, axis=1)
        # The row's largest is taken off: exp(1 / tau) would overflow for a small tau.
        votes = np.exp((near - near.max(1, keepdims=True)) / tau)
        votes /= votes.sum(1, keepdims=True)
        means[start : start + AT_ONCE] = np.einsum("mk,mkv->mv", votes, values[nearest])
    return means


def ridge_scores(
    train: ArrayLike,
    labels: Ints,
    test: ArrayLike,
    classes: int,
    lambdas: ArrayLike = LAMBDAS,
) -> tuple[Floats, float]:
    """Class scores by ridge regression on one-hot targets, with an unpenalised intercept.

    Features are standardised with the training rows' mean and deviation. Of `lambdas` the one
    with the least squared leave-one-out error on the training rows is taken; that error is exact
    without refitting: the residual over one minus the leverage (Allen 1974, PRESS).

    Args:
      train, test: (n, d) and (m, d) features.
      labels: (n,) integers in 0..classes-1.

    Returns:
      (m, classes) float64 scores (about 1 for the class, 0 for the others), and the lambda.
    """
    x, offset, scale = standardised(train)
    y = np.eye(classes)[np.asarray(labels)]
    mean = y.mean(0)
    u, s, vt = np.linalg.svd(x, full_matrices=False)
    uy = u.T @ (y - mean)
    errors = [_left_out(u, s, uy, y - mean, lam) for lam in np.asarray(lambdas, float)]
    lam = float(np.asarray(lambdas, float)[int(np.argmin(errors))])
    weights = vt.T @ ((s / (s**2 + lam))[:, None] * uy)
    return ((np.asarray(test, np.float64) - offset) / scale) @ weights + mean, lam


def standardised(train: ArrayLike) -> tuple[Floats, Floats, Floats]:
    """((n, d) with mean 0 and deviation 1, the mean, the deviation; 1 for a constant column)."""
    x = np.asarray(train, np.float64)
    offset, scale = x.mean(0), x.std(0)
    # A column of one value gets a deviation of rounding errors, which would blow it up.
    scale = np.where(scale > 1e-12 * np.abs(x).max(0), scale, 1.0)
    return (x - offset) / scale, offset, scale


def accuracy(labels: Ints, scores: Floats) -> float:
    """Share of rows whose largest score is the label's, 0..1."""
    return float((scores.argmax(1) == labels).mean())


def macro_f1(labels: Ints, scores: Floats) -> float:
    """Mean F1 over the classes that are a label or a prediction, 0..1 (scikit-learn's rule)."""
    predicted = scores.argmax(1)
    f1 = []
    for c in np.union1d(labels, predicted):
        hits = ((predicted == c) & (labels == c)).sum()
        f1.append(2 * hits / ((predicted == c).sum() + (labels == c).sum()))
    return float(np.mean(f1))


def auc(labels: Ints, scores: Floats) -> float:
    """Area under the ROC curve, 0..1; NaN where one class alone is there.

    Of two classes: of the second one's score. Of more: the mean over classes of each against the
    rest, over those classes that are there and are not all (scikit-learn refuses absent ones).
    """
    labels = np.asarray(labels)
    if scores.shape[1] == 2:
        return _area(labels == 1, scores[:, 1])
    areas = [_area(labels == c, scores[:, c]) for c in range(scores.shape[1])]
    known = [area for area in areas if not np.isnan(area)]
    return float(np.mean(known)) if known else float("nan")


def effective_rank(x: ArrayLike) -> float:
    """exp of the entropy of the singular values' shares (Roy & Vetterli 2007; RankMe 2023).

    p_i = s_i / sum(s), rank = exp(-sum p_i log p_i), of the rows as they are, not centred.

    Args:
      x: (n, d).

    Returns:
      1 (all rows on a line) to min(n, d); NaN for values that are not finite or all zero.
    """
    x = np.asarray(x, np.float64)
    if not np.isfinite(x).all() or not x.any():
        return float("nan")
    s = np.linalg.svd(x, compute_uv=False)
    p = s[s > 0] / s.sum()
    return float(np.exp(-(p * np.log(p)).sum()))


def alignment(z: ArrayLike, alpha: float = 2.0) -> float:
    """Mean of ||a - b||^alpha over positive pairs on the unit sphere (Wang & Isola 2020).

    Args:
      z: (n, 2, D), the two views of each image, of any length.

    Returns:
      0 (views coincide) to 2^alpha.
    """
    z = unit(z)
    return float((np.linalg.norm(z[:, 0] - z[:, 1], axis=-1) ** alpha).mean())


def uniformity(z: ArrayLike, t: float = 2.0) -> float:
    """log of the mean over pairs i < j of exp(-t ||z_i - z_j||^2) (Wang & Isola 2020).

    Args:
      z: (n, D), one view of each of n >= 2 images, of any length.

    Returns:
      0 (all at one point) down to about -2 t (spread over the sphere).
    """
    z = unit(z)
    above = np.triu_indices(len(z), 1)
    squares = 2 - 2 * (z @ z.T)[above]
    return float(np.log(np.exp(-t * np.maximum(squares, 0)).mean()))


def pair_cosines(z: ArrayLike) -> tuple[float, float]:
    """(mean cosine of positives, of negatives) over (n, 2, D), n >= 2; a negative is any view
    of another image, as in NT-Xent."""
    z = unit(z)
    n = len(z)
    positive = (z[:, 0] * z[:, 1]).sum(-1)
    flat = z.reshape(2 * n, -1)
    # The sum over all pairs is the squared length of the sum; selves and positives come off.
    whole = (flat.sum(0) ** 2).sum() - (flat**2).sum() - 2 * positive.sum()
    return float(positive.mean()), float(whole / (2 * n * (2 * n - 2)))


def unit(x: ArrayLike) -> Floats:
    """Rows of length 1 along the last axis, float64; a row of zeros stays zero."""
    x = np.asarray(x, np.float64)
    return x / np.maximum(np.linalg.norm(x, axis=-1, keepdims=True), 1e-12)


def _left_out(u: Floats, s: Floats, uy: Floats, y: Floats, lam: float) -> float:
    """Mean squared error of each row under the ridge fitted to all other rows."""
    shrink = s**2 / (s**2 + lam)
    residual = y - u @ (shrink[:, None] * uy)
    # 1 / n is the intercept's leverage.
    leverage = (u**2) @ shrink + 1 / len(u)
    return float(((residual / np.maximum(1 - leverage, 1e-12)[:, None]) ** 2).mean())


def _area(positive: NDArray[np.bool_], score: Floats) -> float:
    """Share of (positive, other) pairs that the score puts in order, ties one half."""
    n = int(positive.sum())
    if n in (0, len(positive)):
        return float("nan")
    _, inverse, counts = np.unique(score, return_inverse=True, return_counts=True)
    ranks = (np.cumsum(counts) - (counts - 1) / 2)[inverse]
    pairs = n * (len(positive) - n)
    return float((ranks[positive].sum() - n * (n + 1) / 2) / pairs)
